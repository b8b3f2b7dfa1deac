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
