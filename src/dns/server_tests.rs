use std::cell::RefCell;

use std::net::UdpSocket as StdUdpSocket;
use std::os::fd::AsFd;
use std::sync::Arc;

use cni::CaptureConfig;
use hickory_proto::op::Query;
use tokio::task::LocalSet;

use super::*;
use crate::dns::forward::{self, Sockets};
use crate::node::testing::{config, linked, namespace, skip};
use crate::node::{Connector, PodNetns, Toward, sockets};

/// Knows `web`, `many`, `alias` and `broken`; forwards the rest to nobody.
#[derive(Default)]
struct Fake {
    log: RefCell<Vec<String>>,
}

impl Resolver for Fake {
    async fn resolve(&self, question: &Question) -> Result<Resolution, String> {
        let v4 = |n: u8| IpAddr::from([10, 96, 0, n]);
        let known = |addresses| {
            Ok(Resolution::Known {
                alias: None,
                addresses,
            })
        };
        match &*question.name {
            "web" if question.kind == RecordType::A => known(vec![v4(1)]),
            "web" => known(vec![]),
            "many" => known((0..100).map(v4).collect()),
            "alias.search" => Ok(Resolution::Known {
                alias: Some("alias".to_string()),
                addresses: vec![v4(2)],
            }),
            "broken" => Err("unknown client".to_string()),
            _ => Ok(Resolution::Forward),
        }
    }

    async fn forward(&self, query: &[u8], question: &Question) -> io::Result<Vec<u8>> {
        if question.name == "down" {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut answer = query.to_vec();
        answer[2] |= 0x80;
        Ok(answer)
    }

    fn answered(&self, question: &Question, result: &str, answers: usize) {
        self.log.borrow_mut().push(format!(
            "{} {} {result} {answers}",
            question.name, question.kind
        ));
    }

    fn random(&self, _: u64) -> u64 {
        0
    }
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

async fn ask(message: &Message, transport: Transport) -> Message {
    let bytes = answer(&Fake::default(), &message.to_vec().unwrap(), transport)
        .await
        .unwrap();
    Message::from_vec(&bytes).unwrap()
}

fn answers(message: &Message) -> Vec<String> {
    message
        .answers
        .iter()
        .map(|record| format!("{} {} {}", record.name, record.ttl, record.data))
        .collect()
}

#[tokio::test]
async fn known_names_are_answered_with_authority() {
    let response = ask(&query("WEB.", RecordType::A), Transport::Udp).await;
    assert_eq!(answers(&response), ["WEB. 30 10.96.0.1"]);
    let header = &response.metadata;
    assert!(header.authoritative && header.recursion_available && header.id == 7);
    let empty = ask(&query("web.", RecordType::AAAA), Transport::Udp).await;
    assert_eq!(
        (empty.answers.len(), empty.metadata.response_code),
        (0, ResponseCode::NoError)
    );
    let alias = ask(&query("alias.search.", RecordType::A), Transport::Udp).await;
    assert_eq!(
        answers(&alias),
        ["alias.search. 30 alias.", "alias. 30 10.96.0.2"]
    );
}

#[tokio::test]
async fn answers_fit_what_the_client_can_take() {
    let mut many = query("many.", RecordType::A);
    let cut = ask(&many, Transport::Udp).await;
    assert!(cut.metadata.truncation && cut.answers.is_empty());
    assert_eq!(ask(&many, Transport::Tcp).await.answers.len(), 100);
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    many.set_edns(edns);
    let whole = ask(&many, Transport::Udp).await;
    assert_eq!(whole.answers.len(), 100);
    assert_eq!(whole.edns.map(|edns| edns.max_payload()), Some(4096));
}

#[tokio::test]
async fn failures_have_their_codes() {
    let code = async |message: &Message| ask(message, Transport::Udp).await.metadata.response_code;
    assert_eq!(
        code(&query("broken.", RecordType::A)).await,
        ResponseCode::ServFail
    );
    assert_eq!(
        code(&query("down.", RecordType::A)).await,
        ResponseCode::ServFail
    );
    assert_eq!(
        code(&query("down.", RecordType::MX)).await,
        ResponseCode::ServFail
    );
    assert_eq!(
        code(&query("up.", RecordType::MX)).await,
        ResponseCode::NoError
    );
    let mut update = query("web.", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    assert_eq!(code(&update).await, ResponseCode::NotImp);
    let mut response = query("web.", RecordType::A);
    response.metadata.message_type = MessageType::Response;
    assert_eq!(code(&response).await, ResponseCode::FormErr);
    let mut two = query("web.", RecordType::A);
    two.add_query(Query::query(Name::from_ascii("x.").unwrap(), RecordType::A));
    assert_eq!(code(&two).await, ResponseCode::FormErr);
}

#[tokio::test]
async fn garbage_gets_an_error_or_nothing() {
    let fake = Fake::default();
    for length in 0..12 {
        assert_eq!(
            answer(&fake, &vec![0xff; length], Transport::Udp).await,
            None
        );
    }
    let mut broken = query("web.", RecordType::A).to_vec().unwrap();
    broken.truncate(14);
    let response = answer(&fake, &broken, Transport::Udp).await.unwrap();
    assert_eq!(
        Message::from_vec(&response).unwrap().metadata.response_code,
        ResponseCode::FormErr
    );
    assert!(fake.log.borrow().is_empty());
}

#[tokio::test]
async fn both_transports_are_served() {
    let local = LocalSet::new();
    local
        .run_until(async {
            let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let (udp_at, tcp_at) = (udp.local_addr().unwrap(), tcp.local_addr().unwrap());
            let fake = Rc::new(Fake::default());
            tokio::task::spawn_local(serve(fake.clone(), vec![udp], vec![tcp]));
            let asked = query("web.", RecordType::A).to_vec().unwrap();
            let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            client.send_to(&asked, udp_at).await.unwrap();
            let mut buffer = [0; 512];
            let length = client.recv(&mut buffer).await.unwrap();
            assert_eq!(
                Message::from_vec(&buffer[..length]).unwrap().answers.len(),
                1
            );
            let mut stream = TcpStream::connect(tcp_at).await.unwrap();
            for _ in 0..2 {
                stream.write_all(&framed(&asked)).await.unwrap();
                let mut response = vec![0; usize::from(stream.read_u16().await.unwrap())];
                stream.read_exact(&mut response).await.unwrap();
                assert_eq!(Message::from_vec(&response).unwrap().answers.len(), 1);
            }
            assert_eq!(*fake.log.borrow(), vec!["web A success 1"; 3]);
        })
        .await;
}

#[tokio::test]
async fn only_the_internet_class_is_answered() {
    let mut chaos = query("web.", RecordType::A);
    chaos.queries[0].set_query_class(DNSClass::CH);
    let response = ask(&chaos, Transport::Udp).await;
    assert!(response.answers.is_empty() && !response.metadata.authoritative);
}

#[tokio::test]
async fn a_long_forwarded_answer_is_cut_for_udp_only() {
    struct Long;
    impl Resolver for Long {
        async fn resolve(&self, _: &Question) -> Result<Resolution, String> {
            Ok(Resolution::Forward)
        }
        async fn forward(&self, query: &[u8], _: &Question) -> io::Result<Vec<u8>> {
            let asked = Message::from_vec(query).unwrap();
            let mut answer = reply(&asked, ResponseCode::NoError);
            for last in 0..100 {
                let address = RData::A(A([192, 0, 2, last].into()));
                let name = asked.queries[0].name().clone();
                answer.add_answer(Record::from_rdata(name, 5, address));
            }
            Ok(answer.to_vec().unwrap())
        }
        fn answered(&self, _: &Question, _: &str, _: usize) {}
        fn random(&self, _: u64) -> u64 {
            0
        }
    }
    let asked = query("www.example.com.", RecordType::A).to_vec().unwrap();
    for (transport, cut) in [(Transport::Udp, true), (Transport::Tcp, false)] {
        let bytes = answer(&Long, &asked, transport).await.unwrap();
        let response = Message::from_vec(&bytes).unwrap();
        assert_eq!(response.metadata.truncation, cut);
        assert_eq!(response.answers.len(), if cut { 0 } else { 100 });
        assert_eq!(response.queries.len(), 1);
    }
}

#[tokio::test]
async fn whatever_bytes_arrive_there_is_an_answer_or_none() {
    let mut state = 7u32;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    let mut whole = query("alias.search.", RecordType::A);
    whole.set_edns(Edns::new());
    let whole = whole.to_vec().unwrap();
    let fake = Fake::default();
    for round in 0..20_000 {
        let mut bytes = whole.clone();
        for _ in 0..=random() % 6 {
            let at = random() as usize % bytes.len();
            bytes[at] = random() as u8;
        }
        bytes.truncate(whole.len() - random() as usize % 8 * usize::from(round % 3 == 0));
        if let Some(answered) = answer(&fake, &bytes, Transport::Udp).await {
            assert_eq!(answered[..2], bytes[..2]);
            assert!(answered[2] & 0x80 != 0);
        }
    }
}

#[tokio::test]
async fn a_silent_tcp_client_is_let_go() {
    let local = LocalSet::new();
    local
        .run_until(async {
            let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = tcp.local_addr().unwrap();
            tokio::task::spawn_local(serve(Rc::new(Fake::default()), vec![], vec![tcp]));
            let start = std::time::Instant::now();
            let mut silent = TcpStream::connect(address).await.unwrap();
            // Half a length, and nothing more.
            silent.write_all(&[0]).await.unwrap();
            assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
            assert!(start.elapsed() >= IDLE);
        })
        .await;
}

/// Knows `web` and forwards the rest to a server from inside a pod.
struct InPod {
    pod: Arc<PodNetns>,
    upstream: SocketAddr,
}

impl Resolver for InPod {
    async fn resolve(&self, question: &Question) -> Result<Resolution, String> {
        Fake::default().resolve(question).await
    }

    async fn forward(&self, query: &[u8], _: &Question) -> io::Result<Vec<u8>> {
        let upstream = forward::Upstream::new(vec![self.upstream]);
        forward::forward(query, forward::random_id(), &upstream, self).await
    }

    fn answered(&self, _: &Question, _: &str, _: usize) {}

    fn random(&self, _: u64) -> u64 {
        0
    }
}

impl Sockets for InPod {
    fn udp(&self, server: SocketAddr) -> io::Result<UdpSocket> {
        sockets::udp(&self.pod, &config(), server)
    }

    async fn tcp(&self, server: SocketAddr) -> io::Result<TcpStream> {
        Connector::new(self.pod.clone(), Arc::new(config()))
            .connect(server, Toward::Elsewhere)
            .await
    }
}

#[tokio::test]
async fn a_captured_pods_queries_are_answered_and_forwarded() {
    let Some(pod) = namespace() else {
        return skip("a_captured_pods_queries_are_answered_and_forwarded");
    };
    let gateway = linked(&pod);
    cni::capture(pod.as_fd(), &CaptureConfig::default()).unwrap();
    let mut one = config();
    one.workers = 1;
    let listeners = sockets::listen(&pod, &one).unwrap().remove(0);
    let udp = listeners.dns_udp.into_iter().map(UdpSocket::from_std);
    let tcp = listeners.dns_tcp.into_iter().map(TcpListener::from_std);
    let (udp, tcp) = (udp.map(Result::unwrap), tcp.map(Result::unwrap));
    let made = |socket: io::Result<StdUdpSocket>| {
        let socket = socket.unwrap();
        socket.set_nonblocking(true).unwrap();
        UdpSocket::from_std(socket).unwrap()
    };
    let upstream = made(gateway.run(|| StdUdpSocket::bind("10.77.0.1:53")));
    let clients = ["10.96.0.10:53", "[fd77::1]:53", "10.77.0.1:53"].map(|server| {
        made(pod.run(|| {
            let any = if server.starts_with('[') {
                "[::]:0"
            } else {
                "0.0.0.0:0"
            };
            let socket = StdUdpSocket::bind(any)?;
            socket.connect(server)?;
            Ok(socket)
        }))
    });
    let (udp, tcp) = (udp.collect(), tcp.collect());
    let resolver = InPod {
        pod: Arc::new(pod),
        upstream: upstream.local_addr().unwrap(),
    };
    let serving = serve(Rc::new(resolver), udp, tcp);
    let answering = async {
        let mut buffer = [0; 512];
        loop {
            let (length, client) = upstream.recv_from(&mut buffer).await.unwrap();
            assert_eq!(client.ip().to_string(), "10.77.0.2");
            buffer[2] |= 0x80;
            buffer[3] |= 3;
            upstream.send_to(&buffer[..length], client).await.unwrap();
        }
    };
    let asking = async {
        for client in clients {
            for (name, expected) in [
                ("web.", (ResponseCode::NoError, 1)),
                ("x.", (ResponseCode::NXDomain, 0)),
            ] {
                let asked = query(name, RecordType::A).to_vec().unwrap();
                client.send(&asked).await.unwrap();
                let mut buffer = [0; 512];
                let length = client.recv(&mut buffer).await.unwrap();
                let response = Message::from_vec(&buffer[..length]).unwrap();
                assert_eq!(
                    (response.metadata.response_code, response.answers.len()),
                    expected
                );
            }
        }
    };
    LocalSet::new()
        .run_until(async {
            tokio::select! {
                () = serving => unreachable!(),
                () = answering => unreachable!(),
                done = timeout(Duration::from_secs(5), asking) => done.unwrap(),
            }
        })
        .await;
}
