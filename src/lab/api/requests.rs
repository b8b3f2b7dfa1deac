//! What a request asks for, and the answer.

use serde_json::{Value, json};

use super::resources::{Resource, discovery};
use super::selectors::Selection;
use super::store::{Store, key};
use super::{Options, Review};

/// The most that is read of a body, in bytes.
pub const BODY: usize = 3 << 20;

/// A status and what goes with it.
pub type Answer = (u16, Value);

/// The part of a request that decides.
#[derive(Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub query: Vec<(String, String)>,
    pub content_type: String,
    pub body: Vec<u8>,
}

impl Request {
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let found = self.query.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }

    pub fn is_set(&self, name: &str) -> bool {
        matches!(self.parameter(name), Some("1" | "true"))
    }
}

/// An object, or all of its kind.
#[derive(Clone, Debug)]
pub struct Target {
    pub resource: &'static Resource,
    pub namespace: Option<String>,
    pub name: Option<String>,
    /// `status`, `token`.
    pub part: Option<String>,
}

impl Target {
    /// What a path is about.
    pub fn of(path: &str) -> Option<Self> {
        let mut words = path.trim_matches('/').split('/').peekable();
        let group = match words.next()? {
            "api" => "",
            "apis" => words.next()?,
            _ => return None,
        };
        words.next()?;
        let mut namespace = None;
        let mut plural = words.next()?;
        if plural == "namespaces" {
            let rest: Vec<_> = words.clone().collect();
            if rest.len() > 1 && rest[1] != "status" && rest[1] != "finalize" {
                namespace = words.next().map(str::to_string);
                plural = words.next()?;
            }
        }
        let target = Self {
            resource: Resource::named(group, plural)?,
            namespace,
            name: words.next().map(str::to_string),
            part: words.next().map(str::to_string),
        };
        words.next().is_none().then_some(target)
    }

    fn key(&self) -> super::store::Key {
        let (namespace, name) = (self.namespace.as_deref(), self.name.as_deref());
        key(
            self.resource,
            namespace.unwrap_or_default(),
            name.unwrap_or_default(),
        )
    }
}

/// A failure as Kubernetes words it.
pub fn failure(code: u16, message: impl Into<String>) -> Answer {
    let reason = match code {
        400 => "BadRequest",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        405 => "MethodNotAllowed",
        409 => "Conflict",
        410 => "Expired",
        413 => "RequestEntityTooLarge",
        415 => "UnsupportedMediaType",
        422 => "Invalid",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message.into(), "reason": reason, "code": code});
    (code, status)
}

/// Answers everything but watches.
pub fn answer(store: &mut Store, options: &Options, request: &Request) -> Answer {
    let target = match Target::of(&request.path) {
        Some(target) => target,
        None => return elsewhere(options, request),
    };
    match (
        request.method.as_str(),
        &target.name,
        target.part.as_deref(),
    ) {
        ("GET", None, None) => list(store, &target, request),
        ("GET", Some(_), None | Some("status")) => match store.get(&target.key()) {
            Some(object) => (200, object.clone()),
            None => missing(&target),
        },
        ("POST", None, None) => create(store, &target, request),
        ("POST", Some(_), Some("token")) => token(store, options, &target, request),
        ("PUT", Some(_), None | Some("status")) => replace(store, &target, request),
        ("PATCH", Some(_), None | Some("status")) => patch(store, &target, request),
        ("DELETE", Some(_), None) => match store.delete(target.resource, &target.key()) {
            Some(object) => (200, object),
            None => missing(&target),
        },
        (method, ..) => failure(405, format!("{method} is not served at {}", request.path)),
    }
}

fn elsewhere(options: &Options, request: &Request) -> Answer {
    let path = request.path.as_str();
    match (request.method.as_str(), path) {
        ("GET", "/healthz" | "/livez" | "/readyz") => (200, json!("ok")),
        ("POST", "/apis/authentication.k8s.io/v1/tokenreviews") => review(options, request),
        ("GET", _) => match discovery(path) {
            Some(served) => (200, served),
            None => failure(404, format!("{path} is not served")),
        },
        _ => failure(404, format!("{path} is not served")),
    }
}

fn missing(target: &Target) -> Answer {
    let name = target.name.as_deref().unwrap_or_default();
    failure(
        404,
        format!("{} \"{name}\" not found", target.resource.plural),
    )
}

/// The selection of a list or a watch.
///
/// # Errors
/// What of it cannot be understood.
pub fn selection(target: &Target, request: &Request) -> Result<Selection, Answer> {
    let (labels, fields) = (
        request.parameter("labelSelector"),
        request.parameter("fieldSelector"),
    );
    Selection::parse(target.namespace.clone(), labels, fields)
        .map_err(|reason| failure(400, reason))
}

fn list(store: &Store, target: &Target, request: &Request) -> Answer {
    let selection = match selection(target, request) {
        Ok(selection) => selection,
        Err(answer) => return answer,
    };
    let mut items = store.list(target.resource, &selection);
    let mut metadata = json!({"resourceVersion": store.version.to_string()});
    // Pages go by number; what changes between two pages is told by the watch from the first page's version on.
    let (first, version) = match request.parameter("continue") {
        None => (0, store.version),
        Some(text) => {
            let numbers = text.split_once('-').and_then(|(first, version)| {
                Some((first.parse::<usize>().ok()?, version.parse::<u64>().ok()?))
            });
            match numbers {
                Some((_, version)) if version != store.version => {
                    return failure(410, "the list has changed since its first page");
                }
                Some(numbers) => numbers,
                None => return failure(400, "the continue token is not one of ours"),
            }
        }
    };
    items.drain(..first.min(items.len()));
    let limit = request
        .parameter("limit")
        .and_then(|text| text.parse::<usize>().ok());
    if let Some(limit) = limit.filter(|limit| *limit > 0 && items.len() > *limit) {
        metadata["remainingItemCount"] = (items.len() - limit).into();
        metadata["continue"] = format!("{}-{version}", first + limit).into();
        items.truncate(limit);
    }
    let kind = format!("{}List", target.resource.kind);
    let version = target.resource.api_version();
    (
        200,
        json!({"kind": kind, "apiVersion": version, "metadata": metadata, "items": items}),
    )
}

fn body(request: &Request) -> Result<Value, Answer> {
    let yaml = request.content_type.contains("yaml");
    let parsed: Result<Value, String> = match yaml {
        true => serde_yaml_ng::from_slice(&request.body).map_err(|error| error.to_string()),
        false => serde_json::from_slice(&request.body).map_err(|error| error.to_string()),
    };
    match parsed {
        Ok(object) if object.is_object() => Ok(object),
        Ok(_) => Err(failure(400, "the body is not an object")),
        Err(error) => Err(failure(
            400,
            format!("the body cannot be understood: {error}"),
        )),
    }
}

fn create(store: &mut Store, target: &Target, request: &Request) -> Answer {
    let mut object = match body(request) {
        Ok(object) => object,
        Err(answer) => return answer,
    };
    if let Some(namespace) = &target.namespace {
        object["metadata"]["namespace"] = namespace.as_str().into();
    }
    if object["metadata"]["name"].is_null()
        && let Some(prefix) = object["metadata"]["generateName"].as_str()
    {
        object["metadata"]["name"] = format!("{prefix}{:05x}", store.version).into();
    }
    let Some(name) = object["metadata"]["name"].as_str() else {
        return failure(422, "metadata.name is required");
    };
    let target = Target {
        name: Some(name.to_string()),
        ..target.clone()
    };
    if store.get(&target.key()).is_some() {
        let (_, mut status) = failure(
            409,
            format!("{} \"{name}\" already exists", target.resource.plural),
        );
        status["reason"] = "AlreadyExists".into();
        return (409, status);
    }
    (201, store.put(target.resource, object))
}

/// Whether an object may be written over another: the version and the UID that it names, if any, must be the other's.
fn conflict(before: &Value, object: &Value) -> Option<Answer> {
    ["resourceVersion", "uid"].iter().find_map(|field| {
        let named = &object["metadata"][*field];
        let differs = !named.is_null() && *named != before["metadata"][*field];
        differs.then(|| {
            failure(
                409,
                format!("the object's {field} is another by now; read it again"),
            )
        })
    })
}

fn replace(store: &mut Store, target: &Target, request: &Request) -> Answer {
    let mut object = match body(request) {
        Ok(object) => object,
        Err(answer) => return answer,
    };
    let Some(before) = store.get(&target.key()).cloned() else {
        return missing(target);
    };
    if let Some(answer) = conflict(&before, &object) {
        return answer;
    }
    match target.part.is_some() {
        true => object = with_status(&before, object),
        // A status is only written where it is asked to be.
        false if !before["status"].is_null() => object["status"] = before["status"].clone(),
        false => {}
    }
    (200, store.put(target.resource, object))
}

fn patch(store: &mut Store, target: &Target, request: &Request) -> Answer {
    let kind = request
        .content_type
        .split(';')
        .next()
        .unwrap_or_default()
        .trim();
    let creates = match kind {
        "application/merge-patch+json" | "application/strategic-merge-patch+json" => false,
        "application/apply-patch+yaml" | "application/apply-patch+json" => true,
        _ => return failure(415, format!("patches of type {kind} are not served")),
    };
    let change = match body(request) {
        Ok(change) => change,
        Err(answer) => return answer,
    };
    let before = match store.get(&target.key()).cloned() {
        Some(before) => before,
        None if creates => {
            let name = target.name.as_deref().unwrap_or_default();
            json!({"metadata": {"name": name, "namespace": target.namespace}})
        }
        None => return missing(target),
    };
    if !creates && let Some(answer) = conflict(&before, &change) {
        return answer;
    }
    let mut after = before.clone();
    merge(&mut after, &change);
    if target.part.is_some() {
        after = with_status(&before, after);
    }
    (200, store.put(target.resource, after))
}

/// Of what is written to a status, the status and the labels and annotations count.
fn with_status(before: &Value, written: Value) -> Value {
    let mut after = before.clone();
    after["status"] = written["status"].clone();
    for field in ["annotations", "labels"] {
        if !written["metadata"][field].is_null() || !before["metadata"][field].is_null() {
            after["metadata"][field] = written["metadata"][field].clone();
        }
    }
    after
}

/// Merges as RFC 7396 says: objects member by member, null removes, the rest replaces.
pub fn merge(target: &mut Value, change: &Value) {
    let Value::Object(changes) = change else {
        *target = change.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in changes {
        match (value, target.as_object_mut()) {
            (Value::Null, Some(members)) => {
                members.remove(name);
            }
            (value, Some(members)) => {
                merge(members.entry(name.as_str()).or_insert(Value::Null), value)
            }
            _ => {}
        }
    }
}

fn token(store: &Store, options: &Options, target: &Target, request: &Request) -> Answer {
    let Some(issue) = &options.issue_token else {
        return failure(403, "this server issues no tokens");
    };
    if store.get(&target.key()).is_none() {
        return missing(target);
    }
    let mut asked = match body(request) {
        Ok(asked) => asked,
        Err(answer) => return answer,
    };
    let (namespace, name) = (target.namespace.as_deref(), target.name.as_deref());
    let token = issue(namespace.unwrap_or_default(), name.unwrap_or_default());
    asked["status"] = json!({"token": token, "expirationTimestamp": "2099-01-01T00:00:00Z"});
    (201, asked)
}

fn review(options: &Options, request: &Request) -> Answer {
    let mut asked = match body(request) {
        Ok(asked) => asked,
        Err(answer) => return answer,
    };
    let token = asked["spec"]["token"].as_str().unwrap_or_default();
    let reviewed = options.review_token.as_ref().map(|review| review(token));
    asked["status"] = match reviewed
        .unwrap_or_else(|| Err("this server knows no tokens".to_string()))
    {
        Ok(Review {
            user,
            uid,
            audiences,
        }) => {
            json!({"authenticated": true, "user": {"username": user, "uid": uid}, "audiences": audiences})
        }
        Err(error) => json!({"authenticated": false, "error": error}),
    };
    asked["spec"] = json!({});
    (201, asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_what_they_are_about() {
        let about = |path: &str| {
            let target = Target::of(path)?;
            let text = |part: &Option<String>| part.clone().unwrap_or_else(|| "-".into());
            Some(format!(
                "{} {} {} {}",
                target.resource.kind,
                text(&target.namespace),
                text(&target.name),
                text(&target.part)
            ))
        };
        for (path, expected) in [
            ("/api/v1/pods", Some("Pod - - -")),
            ("/api/v1/namespaces", Some("Namespace - - -")),
            ("/api/v1/namespaces/a", Some("Namespace - a -")),
            ("/api/v1/namespaces/a/status", Some("Namespace - a status")),
            ("/api/v1/namespaces/a/pods", Some("Pod a - -")),
            ("/api/v1/namespaces/a/pods/b/status", Some("Pod a b status")),
            (
                "/apis/apps/v1/namespaces/a/daemonsets/b",
                Some("DaemonSet a b -"),
            ),
            (
                "/apis/security.istio.io/v1beta1/authorizationpolicies",
                Some("AuthorizationPolicy - - -"),
            ),
            ("/api/v1/namespaces/a/pods/b/status/c", None),
            ("/api/v1/unknown", None),
            ("/apis", None),
            ("/", None),
        ] {
            assert_eq!(about(path).as_deref(), expected, "{path}");
        }
    }

    #[test]
    fn patches_merge_as_the_standard_says() {
        let mut target = json!({"a": {"b": 1, "c": 2}, "d": [1]});
        merge(
            &mut target,
            &json!({"a": {"b": null, "e": {"f": null, "g": 1}}, "d": [2]}),
        );
        assert_eq!(target, json!({"a": {"c": 2, "e": {"g": 1}}, "d": [2]}));
    }
}
