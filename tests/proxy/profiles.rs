//! What the proxy tells of its own insides: profiles and the metrics of its runtimes.

use std::io::Read;
use std::time::Duration;

use crate::applications::greet;
use crate::harness::Node;
use crate::tunnel::status;

const APPLICATION: &str = "10.0.0.9:8080";
const CPU: &str = "/debug/pprof/profile";
const HEAP: &str = "/debug/pprof/heap";

/// A field of a protobuf message.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}

/// A message's fields with their numbers; panics on what is none.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Field<'_>)> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let field = match tag & 7 {
            0 => Field::Number(varint(&mut bytes)),
            2 => {
                let length = varint(&mut bytes) as usize;
                let (field, rest) = bytes.split_at(length);
                bytes = rest;
                Field::Bytes(field)
            }
            other => panic!("wire type {other} in a profile"),
        };
        all.push((tag >> 3, field));
    }
    all
}

/// The message's parts with that number.
fn parts(message: &[u8], number: u64) -> impl Iterator<Item = &[u8]> {
    let part = move |(found, field)| match field {
        Field::Bytes(bytes) if found == number => Some(bytes),
        _ => None,
    };
    fields(message).into_iter().filter_map(part)
}

/// What the tests look at in a profile.
struct Profile {
    /// By their names, e.g. `cpu`.
    kinds: Vec<String>,
    /// The values of each sample.
    samples: Vec<Vec<u64>>,
    functions: Vec<String>,
    threads: Vec<String>,
}

impl Profile {
    fn read(bytes: &[u8]) -> Self {
        let strings: Vec<String> = parts(bytes, 6)
            .map(|text| String::from_utf8(text.to_vec()).unwrap())
            .collect();
        assert_eq!(strings[0], "");
        let text = |message, number| {
            let mut all = fields(message).into_iter();
            all.find_map(|(found, field)| match field {
                Field::Number(place) if found == number => Some(strings[place as usize].clone()),
                _ => None,
            })
            .unwrap_or_default()
        };
        let values = |sample| {
            parts(sample, 2)
                .flat_map(|mut packed| {
                    let mut values = Vec::new();
                    while !packed.is_empty() {
                        values.push(varint(&mut packed));
                    }
                    values
                })
                .collect()
        };
        let labels = parts(bytes, 2).flat_map(|sample| parts(sample, 3));
        Self {
            kinds: parts(bytes, 1).map(|kind| text(kind, 1)).collect(),
            samples: parts(bytes, 2).map(values).collect(),
            functions: parts(bytes, 5).map(|function| text(function, 2)).collect(),
            threads: labels.map(|label| text(label, 2)).collect(),
        }
    }

    fn unpack(packed: &[u8]) -> Self {
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(packed)
            .read_to_end(&mut bytes)
            .unwrap();
        Self::read(&bytes)
    }

    fn sum(&self, kind: &str) -> u64 {
        let place = self.kinds.iter().position(|known| known == kind).unwrap();
        self.samples.iter().map(|values| values[place]).sum()
    }

    fn names_a_function_of(&self, library: &str) -> bool {
        let marks = [format!("{library}::"), format!("<{library}::")];
        let is_of = |name: &String| marks.iter().any(|mark| name.contains(mark));
        self.functions.iter().any(is_of)
    }
}

/// Tunnels and flows, one after the other, until something else is done.
async fn under_load<T>(node: &Node, work: impl Future<Output = T>) -> T {
    let load = async {
        loop {
            assert_eq!(status(node, APPLICATION).await, 200);
        }
    };
    tokio::select! {
        result = work => result,
        () = load => unreachable!(),
    }
}

#[tokio::test]
async fn a_cpu_profile_names_the_functions_that_ran() {
    let Some(node) = Node::start("cpu-profile", &[]).await else {
        return;
    };
    greet(node.listen(8080));
    // However slow the machine is: the load runs until there are samples.
    for seconds in [1, 2, 4, 8] {
        let path = format!("{CPU}?seconds={seconds}&frequency=1000");
        let (code, body) = under_load(&node, node.fetch("GET", 15000, &path)).await;
        assert_eq!(code, 200, "{}", String::from_utf8_lossy(&body));
        let profile = Profile::read(&body);
        assert_eq!(profile.kinds, ["samples", "cpu"]);
        let workers = profile
            .threads
            .iter()
            .any(|name| name.starts_with("worker-"));
        if workers && profile.names_a_function_of("warren") && profile.names_a_function_of("hbone")
        {
            assert!(profile.sum("cpu") > 0 && profile.sum("samples") > 0);
            return;
        }
    }
    panic!("no function of the data plane was seen at work");
}

#[tokio::test]
async fn one_cpu_profile_at_a_time_and_none_outlives_the_proxy() {
    let Some(mut node) = Node::start("one-profile", &[]).await else {
        return;
    };
    for (query, text) in [
        ("seconds=0", "invalid seconds value; expected 1-300\n"),
        ("seconds=301", "invalid seconds value; expected 1-300\n"),
        (
            "frequency=1001",
            "invalid frequency value; expected 1-1000\n",
        ),
        ("frequency=x", "invalid frequency value; expected 1-1000\n"),
    ] {
        let answer = node.http("GET", 15000, &format!("{CPU}?{query}")).await;
        assert_eq!(answer, (400, text.to_string()), "{query}");
    }
    let path = format!("{CPU}?seconds=300");
    let (code, text) = tokio::select! {
        first = node.http("GET", 15000, &path) => first,
        second = node.http("GET", 15000, &path) => second,
    };
    assert_eq!(code, 409, "{text}");
    assert!(text.contains("try again when it has ended"), "{text}");
    assert_eq!(node.terminate().await, Some(0));
}

#[tokio::test]
async fn a_heap_profile_is_taken_while_it_is_switched_on() {
    let Some(node) = Node::start("heap-profile", &[]).await else {
        return;
    };
    greet(node.listen(8080));
    let inactive =
        "heap profiling not active; activate with /debug/pprof/heap/profiling?activate=true";
    let switch = async |value: &str| {
        let path = format!("{HEAP}/profiling?activate={value}");
        node.http("POST", 15000, &path).await
    };
    assert_eq!(
        node.http("GET", 15000, HEAP).await,
        (500, inactive.to_string())
    );
    assert_eq!(
        switch("maybe").await,
        (
            400,
            "invalid activate value \"maybe\"; expected true or false\n".to_string()
        )
    );
    for _ in 0..2 {
        assert_eq!(
            switch("true").await,
            (200, "heap profiling active: true\n".to_string())
        );
        let sampled = async {
            loop {
                let (code, body) = node.fetch("GET", 15000, HEAP).await;
                assert_eq!(code, 200);
                let profile = Profile::unpack(&body);
                if profile.names_a_function_of("warren") && profile.sum("alloc_space") > 0 {
                    return profile;
                }
            }
        };
        let sampled = tokio::time::timeout(Duration::from_secs(60), sampled);
        let profile = under_load(&node, sampled).await.unwrap();
        let kinds = [
            "alloc_objects",
            "alloc_space",
            "inuse_objects",
            "inuse_space",
        ];
        assert_eq!(profile.kinds, kinds);
        assert!(profile.sum("inuse_space") <= profile.sum("alloc_space"));
        assert_eq!(
            switch("false").await,
            (200, "heap profiling active: false\n".to_string())
        );
        assert_eq!(
            node.http("GET", 15000, HEAP).await,
            (500, inactive.to_string())
        );
    }
    assert_eq!(status(&node, APPLICATION).await, 200);
}

#[tokio::test]
async fn the_runtimes_metrics_stand_between_those_of_process_and_mesh() {
    let Some(node) = Node::start("runtimes", &[]).await else {
        return;
    };
    greet(node.listen(8080));
    assert_eq!(status(&node, APPLICATION).await, 200);
    let (_, text) = node.http("GET", 15020, "/metrics").await;
    let value = |name: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let value = line.unwrap_or_else(|| panic!("{name} in {text}"));
        value.trim().parse().unwrap()
    };
    assert_eq!(value("tokio_num_workers "), 2.0);
    assert!(value("tokio_num_alive_tasks ") > 4.0, "{text}");
    assert!(value("tokio_global_queue_depth ") >= 0.0);
    for worker in [0, 1] {
        let of = |name: &str| value(&format!("{name}_total{{worker=\"{worker}\"}} "));
        assert!(of("tokio_worker_total_busy_duration_seconds") > 0.0);
        assert!(of("tokio_worker_park_count") > 0.0);
        assert!(of("tokio_worker_park_unpark_count") > 0.0);
    }
    let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let mut groups: Vec<&str> = families
        .map(|name| name.split('_').next().unwrap())
        .collect();
    groups.retain(|group| ["process", "tokio", "istio", "workload"].contains(group));
    groups.dedup();
    assert_eq!(groups, ["process", "tokio", "istio", "workload"]);
}
