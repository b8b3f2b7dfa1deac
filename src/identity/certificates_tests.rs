use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::*;

/// An authority that can be broken and slowed down, and counts its calls.
struct Fake {
    issuer: Issuer<'static, KeyPair>,
    root: rustls::pki_types::CertificateDer<'static>,
    down: AtomicBool,
    calls: AtomicUsize,
    running: AtomicUsize,
    most: AtomicUsize,
    takes: Duration,
    lifetime: Duration,
}

impl Fake {
    fn new(takes: Duration, lifetime: Duration) -> Arc<Self> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().clone();
        Arc::new(Self {
            issuer: Issuer::new(params, key),
            root,
            down: AtomicBool::new(false),
            calls: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            takes,
            lifetime,
        })
    }

    fn sign(&self, identity: &Identity) -> TlsIdentity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into().unwrap())];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.not_before = SystemTime::now().into();
        params.not_after = (SystemTime::now() + self.lifetime).into();
        let leaf = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        TlsIdentity::new(
            vec![leaf],
            key,
            vec![self.root.clone()],
            &Default::default(),
        )
        .unwrap()
    }
}

impl Authority for Fake {
    fn issue<'a>(
        &'a self,
        identity: &'a Identity,
    ) -> BoxFuture<'a, Result<TlsIdentity, IdentityError>> {
        Box::pin(async move {
            self.calls.fetch_add(1, Ordering::SeqCst);
            let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(running, Ordering::SeqCst);
            tokio::time::sleep(self.takes).await;
            self.running.fetch_sub(1, Ordering::SeqCst);
            if self.down.load(Ordering::SeqCst) {
                return Err(IdentityError::Signing {
                    code: "Unavailable".into(),
                    message: "down".into(),
                });
            }
            Ok(self.sign(identity))
        })
    }
}

fn id(name: &str) -> Identity {
    Identity::new("td", "ns", name)
}

fn started(fake: &Arc<Fake>) -> Certificates {
    let certificates = Certificates::new(fake.clone());
    tokio::spawn(certificates.clone().run());
    certificates
}

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn everyone_who_waits_gets_the_same_certificate_of_one_call() {
    let fake = Fake::new(Duration::from_millis(50), HOUR);
    let certificates = started(&fake);
    assert!(certificates.cached(&id("a")).is_none());
    let wanted = id("a");
    let (one, two) = tokio::join!(certificates.fetch(&wanted), certificates.fetch(&wanted));
    assert!(Arc::ptr_eq(&one.unwrap(), &two.unwrap()));
    assert!(certificates.cached(&wanted).is_some());
    assert_eq!(fake.calls.load(Ordering::SeqCst), 1);
    assert_eq!(certificates.dump()[0]["state"], "Available");
}

#[tokio::test]
async fn at_most_eight_calls_run_at_once() {
    let fake = Fake::new(Duration::from_millis(30), HOUR);
    let certificates = started(&fake);
    for n in 0..40 {
        certificates.prefetch(&id(&n.to_string()));
    }
    for n in 0..40 {
        certificates.fetch(&id(&n.to_string())).await.unwrap();
    }
    assert_eq!(fake.most.load(Ordering::SeqCst), CALLS);
}

#[tokio::test]
async fn a_failing_authority_is_an_error_at_once_and_recovery_comes_by_itself() {
    let fake = Fake::new(Duration::ZERO, HOUR);
    fake.down.store(true, Ordering::SeqCst);
    let certificates = started(&fake);
    let error = certificates.fetch(&id("a")).await.unwrap_err();
    assert_eq!(error.to_string(), "signing gRPC error (Unavailable): down");
    assert_eq!(certificates.fetch(&id("a")).await.unwrap_err(), error);
    assert_eq!(
        fake.calls.load(Ordering::SeqCst),
        1,
        "asking again is left to the retry"
    );
    fake.down.store(false, Ordering::SeqCst);
    let recovered = async {
        while certificates.fetch(&id("a")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), recovered)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_certificate_is_renewed_at_half_its_life_and_kept_while_that_fails() {
    let fake = Fake::new(Duration::ZERO, Duration::from_secs(6));
    let certificates = started(&fake);
    let first = certificates.fetch(&id("a")).await.unwrap();
    fake.down.store(true, Ordering::SeqCst);
    let renewing = async {
        while fake.calls.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), renewing)
        .await
        .unwrap();
    assert!(Arc::ptr_eq(
        &certificates.fetch(&id("a")).await.unwrap(),
        &first
    ));
    fake.down.store(false, Ordering::SeqCst);
    let renewed = async {
        while Arc::ptr_eq(&certificates.fetch(&id("a")).await.unwrap(), &first) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), renewed)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_forgotten_identity_is_told_to_whoever_waits() {
    let fake = Fake::new(HOUR, HOUR);
    let certificates = started(&fake);
    let wanted = id("a");
    let waiting = certificates.fetch(&wanted);
    let forgetting = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        certificates.forget(&wanted);
    };
    let (result, ()) = tokio::join!(waiting, forgetting);
    assert_eq!(
        result.unwrap_err().to_string(),
        "the identity is no longer needed"
    );
}

/// A delivery with certificates of those names.
fn delivery(fake: &Fake, names: &[&str]) -> Delivered {
    let one = |name: &&str| (id(name), Arc::new(fake.sign(&id(name))));
    Delivered {
        set: Some(Arc::new(names.iter().map(one).collect())),
        trouble: None,
    }
}

fn trouble() -> IdentityError {
    IdentityError::WorkloadApi {
        socket: "/run/api.sock".into(),
        reason: "gone".into(),
    }
}

/// Certificates whose deliveries come from the sender.
fn pushed() -> (watch::Sender<Delivered>, Certificates) {
    let (deliver, delivered) = watch::channel(Delivered::default());
    let certificates = Certificates::pushed(delivered);
    tokio::spawn(certificates.clone().run());
    (deliver, certificates)
}

/// Waits until a delivery has reached an identity that was asked for before.
async fn until(certificates: &Certificates, name: &str, there: bool) {
    let reached = async {
        while certificates.cached(&id(name)).is_some() != there {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), reached)
        .await
        .unwrap();
}

#[tokio::test]
async fn who_waits_for_the_first_delivery_gets_its_certificate_or_learns_that_there_is_none() {
    let fake = Fake::new(Duration::ZERO, HOUR);
    let (deliver, certificates) = pushed();
    let (a, b) = (id("a"), id("b"));
    let delivering = async {
        // After both have been found waiting.
        while certificates.dump().as_array().map(Vec::len) != Some(2) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        deliver.send_replace(delivery(&fake, &["a"]));
    };
    let (there, missing, ()) =
        tokio::join!(certificates.fetch(&a), certificates.fetch(&b), delivering);
    assert_eq!(there.unwrap().identity(), Some(&a));
    assert_eq!(missing.unwrap_err(), IdentityError::NoEntry(b));
    assert!(certificates.fetch(&id("c")).await.is_err());
    assert_eq!(fake.calls.load(Ordering::SeqCst), 0, "nobody is asked");
}

#[tokio::test]
async fn a_delivery_replaces_adds_and_withdraws() {
    let fake = Fake::new(Duration::ZERO, HOUR);
    let (deliver, certificates) = pushed();
    deliver.send_replace(delivery(&fake, &["a", "b"]));
    let first = certificates.fetch(&id("a")).await.unwrap();
    certificates.fetch(&id("b")).await.unwrap();
    deliver.send_replace(delivery(&fake, &["a", "c"]));
    until(&certificates, "b", false).await;
    let second = certificates.fetch(&id("a")).await.unwrap();
    assert_ne!(first.chain(), second.chain());
    assert_eq!(
        certificates.fetch(&id("b")).await.unwrap_err().to_string(),
        "the SPIFFE Workload API server has no entry for spiffe://td/ns/ns/sa/b \
         (hint: add one whose selectors match this proxy's process)"
    );
    // While nothing newer comes, it may have one by now.
    let mut late = delivery(&fake, &["a", "c"]);
    late.trouble = Some(IdentityError::WorkloadApi {
        socket: "/s".to_string(),
        reason: "gone".to_string(),
    });
    deliver.send_replace(late);
    let told = loop {
        let error = certificates.fetch(&id("b")).await.unwrap_err();
        if !matches!(error, IdentityError::NoEntry(_)) {
            break error.to_string();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert!(
        told.starts_with("the SPIFFE Workload API server had no entry for spiffe://td/ns/ns/sa/b, and nothing newer came: ")
            && told.contains("gone"),
        "{told}"
    );
    certificates.fetch(&id("c")).await.unwrap();
    deliver.send_replace(delivery(&fake, &["b"]));
    until(&certificates, "b", true).await;
}

#[tokio::test]
async fn trouble_is_an_error_only_without_a_valid_certificate() {
    let fake = Fake::new(Duration::ZERO, HOUR);
    let (deliver, certificates) = pushed();
    deliver.send_modify(|delivered| delivered.trouble = Some(trouble()));
    let error = certificates.fetch(&id("a")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "SPIFFE Workload API at /run/api.sock: gone"
    );
    deliver.send_replace(delivery(&fake, &["a"]));
    until(&certificates, "a", true).await;
    certificates.prefetch(&id("b"));
    deliver.send_replace(Delivered {
        trouble: Some(trouble()),
        ..delivery(&fake, &["a", "b"])
    });
    until(&certificates, "b", true).await;
    assert!(certificates.fetch(&id("a")).await.is_ok());
    assert!(certificates.cached(&id("a")).is_some());
}

#[tokio::test]
async fn a_delivered_certificate_is_used_until_it_expires() {
    let fake = Fake::new(Duration::ZERO, Duration::from_secs(2));
    let (deliver, certificates) = pushed();
    deliver.send_replace(delivery(&fake, &["a"]));
    assert!(certificates.fetch(&id("a")).await.is_ok());
    deliver.send_modify(|delivered| delivered.trouble = Some(trouble()));
    until(&certificates, "a", false).await;
    assert_eq!(
        certificates.fetch(&id("a")).await.unwrap_err().to_string(),
        "the certificate of spiffe://td/ns/ns/sa/a has expired and none newer came: \
         SPIFFE Workload API at /run/api.sock: gone"
    );
}

#[tokio::test]
async fn a_forgotten_identity_is_found_again_in_what_was_delivered() {
    let fake = Fake::new(Duration::ZERO, HOUR);
    let (deliver, certificates) = pushed();
    deliver.send_replace(delivery(&fake, &["a"]));
    let first = certificates.fetch(&id("a")).await.unwrap();
    certificates.forget(&id("a"));
    assert!(certificates.cached(&id("a")).is_none());
    let second = certificates.fetch(&id("a")).await.unwrap();
    assert!(Arc::ptr_eq(&first, &second));
}
