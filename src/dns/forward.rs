//! Questions that the mesh cannot answer, passed on to the upstream servers as they came.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// How long one server may take for one answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How often all servers are asked.
const ATTEMPTS: usize = 2;
/// The byte and bit that say that an answer over UDP was cut off.
const TRUNCATED: (usize, u8) = (2, 0b10);
/// The byte and bit that say that an answer is authoritative.
const AUTHORITATIVE: (usize, u8) = (2, 0b100);

/// Makes the sockets towards upstream servers, in the pod's namespace for example.
pub trait Sockets {
    /// A UDP socket connected to the server.
    fn udp(&self, server: SocketAddr) -> io::Result<UdpSocket>;
    /// A TCP connection to the server.
    fn tcp(&self, server: SocketAddr) -> impl Future<Output = io::Result<TcpStream>>;
}

/// The servers that a `resolv.conf` names.
pub fn servers(resolv_conf: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let address: IpAddr = words
            .next()
            .filter(|word| *word == "nameserver")
            .and(words.next())?
            .parse()
            .ok()?;
        Some(SocketAddr::new(address, 53))
    };
    resolv_conf.lines().filter_map(server).take(3).collect()
}

/// Asks the servers in turn until one answers; `id` is a random number for the question on its way up.
///
/// # Errors
/// The last server's error.
pub async fn forward(
    query: &[u8],
    id: u16,
    servers: &[SocketAddr],
    sockets: &impl Sockets,
) -> io::Result<Vec<u8>> {
    let Some(own_id) = query.get(..2) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let mut asked = query.to_vec();
    asked[..2].copy_from_slice(&id.to_be_bytes());
    let mut last = io::Error::new(io::ErrorKind::NotFound, "there is no upstream server");
    for server in servers.iter().cycle().take(servers.len() * ATTEMPTS) {
        match ask(&asked, *server, sockets).await {
            Ok(mut answer) => {
                answer[..2].copy_from_slice(own_id);
                answer[AUTHORITATIVE.0] &= !AUTHORITATIVE.1;
                return Ok(answer);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn ask(query: &[u8], server: SocketAddr, sockets: &impl Sockets) -> io::Result<Vec<u8>> {
    let over_udp = async {
        let socket = sockets.udp(server)?;
        socket.send(query).await?;
        let mut buffer = vec![0; 4096];
        loop {
            let length = socket.recv(&mut buffer).await?;
            // Whatever does not answer this question is somebody's guess.
            if answers(query, &buffer[..length]) {
                buffer.truncate(length);
                return Ok::<_, io::Error>(buffer);
            }
        }
    };
    let answer = timeout(ANSWER, over_udp).await??;
    if answer[TRUNCATED.0] & TRUNCATED.1 == 0 {
        return Ok(answer);
    }
    let over_tcp = async {
        let mut stream = sockets.tcp(server).await?;
        stream.write_all(&framed(query)).await?;
        let length = stream.read_u16().await?;
        let mut answer = vec![0; usize::from(length)];
        stream.read_exact(&mut answer).await?;
        if !answers(query, &answer) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the answer is to another question",
            ));
        }
        Ok(answer)
    };
    timeout(ANSWER, over_tcp).await?
}

/// A message as it goes over TCP, behind its length (RFC 1035 §4.2.2).
pub fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(&message[..usize::from(length)]);
    framed
}

/// Whether a message is the response to a query: same number, same question, letter case aside.
fn answers(query: &[u8], response: &[u8]) -> bool {
    let Some(end) = question_end(query) else {
        return false;
    };
    response.len() >= end
        && response[..2] == query[..2]
        && response[2] & 0x80 != 0
        && response[4..6] == query[4..6]
        && response[12..end].eq_ignore_ascii_case(&query[12..end])
}

/// Where the only question of a query ends.
fn question_end(query: &[u8]) -> Option<usize> {
    let mut at = 12;
    loop {
        let length = usize::from(*query.get(at)?);
        match length {
            0 => break,
            1..=63 => at += length + 1,
            _ => return None,
        }
    }
    (at + 5 <= query.len()).then_some(at + 5)
}

#[cfg(test)]
mod tests {
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
    const QUERY: &[u8] =
        b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02ab\x00\x00\x01\x00\x01";

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
        let servers = [address];
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
        let servers = [address];
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
        let servers = [dead, upstream.local_addr().unwrap()];
        let serving = async {
            let mut buffer = [0; 512];
            let (length, client) = upstream.recv_from(&mut buffer).await.unwrap();
            upstream
                .send_to(&response(&buffer[..length], 0), client)
                .await
                .unwrap();
        };
        let (answer, ()) = tokio::join!(forward(QUERY, 9, &servers, &Direct), serving);
        answer.unwrap();
        assert!(forward(QUERY, 9, &[], &Direct).await.is_err());
    }
}
