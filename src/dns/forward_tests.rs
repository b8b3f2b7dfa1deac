use super::*;
use std::net::Ipv4Addr;

struct Direct;

impl Sockets for Direct {
    fn udp(&self, server: SocketAddr) -> io::Result<UdpSocket> {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.connect(server)?;
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    }

    async fn tcp(&self, server: SocketAddr) -> io::Result<TcpStream> {
        TcpStream::connect(server).await
    }
}

/// A query for `ab.` of type A with number 1.
const QUERY: &[u8] = b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02ab\x00\x00\x01\x00\x01";

fn response(query: &[u8], flags: u8) -> Vec<u8> {
    let mut response = query.to_vec();
    response[2] |= 0x80 | flags;
    response
}

#[test]
fn nameservers_are_read_and_the_rest_is_passed_over() {
    let text = "# comment\nsearch a.b\nnameserver 10.0.0.1\nnameserver bad\nnameserver fd00::1 # x\noptions ndots:5\n";
    assert_eq!(
        servers(text),
        [
            "10.0.0.1:53".parse().unwrap(),
            "[fd00::1]:53".parse().unwrap()
        ]
    );
}

#[test]
fn search_domains_are_those_of_the_last_list() {
    let text = "domain a.b\nsearch Corp.Example. x\nnameserver 10.0.0.1\n";
    assert_eq!(search(text), ["corp.example", "x"]);
    assert!(search("nameserver 10.0.0.1\n").is_empty());
}

#[tokio::test]
async fn guesses_are_ignored_and_the_clients_number_comes_back() {
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = upstream.local_addr().unwrap();
    let serving = async {
        let mut buffer = [0; 512];
        let (length, client) = upstream.recv_from(&mut buffer).await.unwrap();
        let query = buffer[..length].to_vec();
        assert_eq!(query[..2], [0xab, 0xcd]);
        let mut wrong_number = response(&query, 0);
        wrong_number[0] ^= 1;
        let mut wrong_name = response(&query, 0);
        wrong_name[13] = b'x';
        for packet in [
            wrong_number,
            wrong_name,
            query.clone(),
            b"x".to_vec(),
            response(&query, 4),
        ] {
            upstream.send_to(&packet, client).await.unwrap();
        }
    };
    let servers = Upstream::new(vec![address]);
    let (answer, ()) = tokio::join!(forward(QUERY, 0xabcd, &servers, &Direct), serving);
    let answer = answer.unwrap();
    assert_eq!(answer[..2], [0, 1]);
    assert_eq!(answer[2] & 4, 0, "not authoritative");
}

#[tokio::test]
async fn a_truncated_answer_is_asked_for_again_over_tcp() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let upstream = UdpSocket::bind(address).await.unwrap();
    let serving = async {
        let mut buffer = [0; 512];
        let (length, client) = upstream.recv_from(&mut buffer).await.unwrap();
        upstream
            .send_to(&response(&buffer[..length], 2), client)
            .await
            .unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        let length = stream.read_u16().await.unwrap();
        let mut query = vec![0; usize::from(length)];
        stream.read_exact(&mut query).await.unwrap();
        let mut long = response(&query, 0);
        long.extend([7; 2000]);
        stream.write_all(&framed(&long)).await.unwrap();
    };
    let servers = Upstream::new(vec![address]);
    let (answer, ()) = tokio::join!(forward(QUERY, 9, &servers, &Direct), serving);
    assert_eq!(answer.unwrap().len(), QUERY.len() + 2000);
}

#[tokio::test]
async fn a_dead_server_gives_way_to_the_next() {
    let dead = UdpSocket::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let servers = Upstream::new(vec![dead, upstream.local_addr().unwrap()]);
    let serving = async {
        let mut buffer = [0; 512];
        let (length, client) = upstream.recv_from(&mut buffer).await.unwrap();
        upstream
            .send_to(&response(&buffer[..length], 0), client)
            .await
            .unwrap();
    };
    let start = std::time::Instant::now();
    let (answer, ()) = tokio::join!(forward(QUERY, 9, &servers, &Direct), serving);
    answer.unwrap();
    assert!(start.elapsed() < ANSWER, "the refusal was noticed");
    assert!(
        forward(QUERY, 9, &Upstream::default(), &Direct)
            .await
            .is_err()
    );
}

/// A server that answers every query with what `respond` makes of it.
async fn serving(upstream: UdpSocket, respond: impl Fn(&[u8]) -> Vec<u8>) {
    let mut buffer = [0; 512];
    loop {
        let (length, client) = upstream.recv_from(&mut buffer).await.unwrap();
        let answer = respond(&buffer[..length]);
        upstream.send_to(&answer, client).await.unwrap();
    }
}

/// Asks two servers, of which the first answers with a code, whole or only its header; gives the answer.
async fn after(first_code: u8, header_only: bool) -> io::Result<Vec<u8>> {
    let first = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let second = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let servers = Upstream::new(vec![
        first.local_addr().unwrap(),
        second.local_addr().unwrap(),
    ]);
    let failing = serving(first, |query| {
        let mut answer = response(query, 0);
        answer[3] |= first_code;
        if header_only {
            answer.truncate(12);
            answer[5] = 0;
        }
        answer
    });
    let helping = serving(second, |query| {
        [&response(query, 0)[..], b"second"].concat()
    });
    tokio::select! {
        answer = forward(QUERY, 9, &servers, &Direct) => answer,
        () = failing => unreachable!(),
        () = helping => unreachable!(),
    }
}

#[tokio::test]
async fn a_server_that_cannot_help_gives_way_to_the_next() {
    let start = std::time::Instant::now();
    for (code, header_only) in [(2, false), (4, false), (5, false), (1, true), (5, true)] {
        let answer = after(code, header_only).await.unwrap();
        assert!(answer.ends_with(b"second"), "{code}");
    }
    // That a name does not exist is an answer.
    let answer = after(3, false).await.unwrap();
    assert_eq!((answer.len(), answer[3] & 0x0f), (QUERY.len(), 3));
    assert!(start.elapsed() < ANSWER, "nothing was waited for");
}

#[tokio::test]
async fn when_nobody_can_help_the_client_hears_why() {
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let servers = Upstream::new(vec![upstream.local_addr().unwrap()]);
    let refusing = serving(upstream, |query| {
        let mut answer = response(query, 0);
        answer[3] |= 5;
        answer
    });
    tokio::select! {
        answer = forward(QUERY, 9, &servers, &Direct) => assert_eq!(answer.unwrap()[3] & 0x0f, 5),
        () = refusing => unreachable!(),
    }
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let servers = Upstream::new(vec![upstream.local_addr().unwrap()]);
    let refusing = serving(upstream, |query| {
        [&query[..2], &[0x81, 1, 0, 0, 0, 0, 0, 0, 0, 0]].concat()
    });
    let error = tokio::select! {
        answer = forward(QUERY, 9, &servers, &Direct) => answer.unwrap_err(),
        () = refusing => unreachable!(),
    };
    assert!(
        error
            .to_string()
            .starts_with("the upstream server refuses: "),
        "{error}"
    );
}

#[tokio::test]
async fn a_forwarded_answer_claims_no_more_than_we_know() {
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let servers = Upstream::new(vec![upstream.local_addr().unwrap()]);
    let boasting = serving(upstream, |query| {
        let mut answer = response(query, 0x04);
        answer[3] |= 0x20;
        // Beyond the usual limits of a datagram.
        answer.resize(20_000, 0);
        answer
    });
    let answer = tokio::select! {
        answer = forward(QUERY, 9, &servers, &Direct) => answer.unwrap(),
        () = boasting => unreachable!(),
    };
    // Recursion is available, and neither authority nor authenticity is claimed.
    assert_eq!(answer[2..4], [0x81, 0x80]);
    assert_eq!(answer.len(), 20_000);
}

#[test]
fn numbers_of_questions_do_not_repeat_in_a_pattern() {
    let ids: std::collections::HashSet<u16> = (0..1000).map(|_| random_id()).collect();
    assert!(ids.len() > 950, "{}", ids.len());
    let mut steps: Vec<u16> = (0..1000)
        .map(|_| random_id().wrapping_sub(random_id()))
        .collect();
    steps.sort_unstable();
    steps.dedup();
    assert!(steps.len() > 950, "{}", steps.len());
}

#[test]
fn no_message_is_too_odd_to_compare() {
    let mut state = 1u32;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    let whole = response(QUERY, 0);
    for _ in 0..20_000 {
        let (mut query, mut message) = (QUERY.to_vec(), whole.clone());
        for _ in 0..random() % 4 {
            let at = random() as usize;
            query[at % QUERY.len()] = random() as u8;
            message[at % QUERY.len()] = random() as u8;
        }
        query.truncate(random() as usize % 30);
        message.truncate(random() as usize % 30);
        answers(&query, &message);
    }
    assert_eq!(answers(QUERY, &whole), Reply::Answer);
}

#[tokio::test]
async fn a_silent_server_holds_nobody_up_and_is_not_asked_first_again() {
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let second = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let servers = vec![silent.local_addr().unwrap(), second.local_addr().unwrap()];
    let upstream = Upstream::new(servers);
    let helping = serving(second, |query| response(query, 0));
    let asking = async {
        for _ in 0..3 {
            forward(QUERY, 9, &upstream, &Direct).await.unwrap();
        }
    };
    tokio::select! {
        () = asking => {}
        () = helping => unreachable!(),
    }
    let mut buffer = [0; 512];
    assert!(silent.try_recv(&mut buffer).is_ok());
    assert!(silent.try_recv(&mut buffer).is_err(), "it was asked once");
}

#[test]
fn the_addresses_of_an_answer_are_kept_as_long_as_its_shortest_record() {
    use hickory_proto::rr::RData;
    use hickory_proto::rr::rdata::{A, CNAME};
    let name = |text| Name::from_ascii(text).unwrap();
    let mut message = Message::new(1, MessageType::Response, OpCode::Query);
    let alias = RData::CNAME(CNAME(name("b.")));
    message.add_answer(Record::from_rdata(name("a."), 7, alias));
    let address = RData::A(A(Ipv4Addr::new(10, 0, 0, 1)));
    message.add_answer(Record::from_rdata(name("b."), 60, address));
    let (found, kept) = addresses(&message.to_vec().unwrap()).unwrap();
    assert_eq!(found, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(kept, Duration::from_secs(7));
    message.metadata.response_code = ResponseCode::NXDomain;
    assert!(addresses(&message.to_vec().unwrap()).is_err());
    assert!(addresses(b"x").is_err());
}
