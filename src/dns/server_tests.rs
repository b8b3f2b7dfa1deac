use std::cell::RefCell;

use hickory_proto::op::Query;
use tokio::task::LocalSet;

use super::*;

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
