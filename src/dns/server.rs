//! The DNS server of one pod: messages in, messages out.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::answer::Resolution;
use super::forward::framed;

/// How long answers may be kept, in seconds.
const TTL: u32 = 30;
/// How long a TCP client may be silent.
const IDLE: Duration = Duration::from_secs(5);
/// Queries that are worked on at a time; more are dropped, and asked again by their clients.
const CONCURRENT: usize = 1024;
/// The largest answer over UDP to a client that does not say what it can take (RFC 1035).
const PLAIN_UDP: u16 = 512;
/// The largest datagram that IPv4 can carry.
const LARGEST_UDP: u16 = 65_507;

/// How a query came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// A question of a client.
#[derive(Clone, Debug)]
pub struct Question {
    /// Lower case, without the final dot.
    pub name: String,
    pub kind: RecordType,
    pub transport: Transport,
}

/// Knows the answers.
pub trait Resolver {
    /// Resolves an A or AAAA question; an error when the client itself is not known.
    fn resolve(&self, question: &Question) -> impl Future<Output = Result<Resolution, String>>;
    /// Passes the query on; gives the whole answer.
    fn forward(
        &self,
        query: &[u8],
        question: &Question,
    ) -> impl Future<Output = io::Result<Vec<u8>>>;
    /// Hears of every question that was answered, once.
    fn answered(&self, question: &Question, result: &str, answers: usize);
    /// A number below `bound`, for the order of addresses.
    fn random(&self, bound: u64) -> u64;
}

/// Serves until dropped.
pub async fn serve<R: Resolver + 'static>(
    resolver: Rc<R>,
    udp: Vec<UdpSocket>,
    tcp: Vec<TcpListener>,
) {
    let mut servers = JoinSet::new();
    for socket in udp {
        servers.spawn_local(serve_udp(resolver.clone(), Rc::new(socket)));
    }
    for listener in tcp {
        servers.spawn_local(serve_tcp(resolver.clone(), listener));
    }
    while servers.join_next().await.is_some() {}
}

async fn serve_udp<R: Resolver + 'static>(resolver: Rc<R>, socket: Rc<UdpSocket>) {
    let mut buffer = vec![0; 4096];
    let mut queries = JoinSet::new();
    loop {
        tokio::select! {
            received = socket.recv_from(&mut buffer) => match received {
                Ok((length, client)) if queries.len() < CONCURRENT => {
                    let work = answer_udp(resolver.clone(), socket.clone(), buffer[..length].to_vec(), client);
                    queries.spawn_local(work);
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!("DNS query lost: {error}");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            },
            Some(_) = queries.join_next(), if !queries.is_empty() => {}
        }
    }
}

async fn answer_udp<R: Resolver>(
    resolver: Rc<R>,
    socket: Rc<UdpSocket>,
    query: Vec<u8>,
    client: SocketAddr,
) {
    if let Some(answer) = answer(&*resolver, &query, Transport::Udp).await
        && let Err(error) = socket.send_to(&answer, client).await
    {
        tracing::debug!("DNS answer lost: {error}");
    }
}

async fn serve_tcp<R: Resolver + 'static>(resolver: Rc<R>, listener: TcpListener) {
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if clients.len() < CONCURRENT => match accepted {
                Ok((stream, _)) => {
                    clients.spawn_local(client(resolver.clone(), stream));
                }
                Err(error) => {
                    tracing::error!("Failed TCP handshake {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = clients.join_next(), if !clients.is_empty() => {}
        }
    }
}

async fn client<R: Resolver>(resolver: Rc<R>, mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    loop {
        let read = async {
            let length = stream.read_u16().await?;
            let mut query = vec![0; usize::from(length)];
            stream.read_exact(&mut query).await?;
            Ok::<_, io::Error>(query)
        };
        let Ok(Ok(query)) = timeout(IDLE, read).await else {
            return;
        };
        let Some(answer) = answer(&*resolver, &query, Transport::Tcp).await else {
            return;
        };
        let Ok(Ok(())) = timeout(IDLE, stream.write_all(&framed(&answer))).await else {
            return;
        };
    }
}

/// The answer to a message; none to what is too short to have a number.
pub async fn answer(
    resolver: &impl Resolver,
    query: &[u8],
    transport: Transport,
) -> Option<Vec<u8>> {
    let id = u16::from_be_bytes(query.get(..12)?[..2].try_into().ok()?);
    let Ok(message) = Message::from_vec(query) else {
        return error(id, ResponseCode::FormErr);
    };
    if message.metadata.message_type == MessageType::Response {
        return error(id, ResponseCode::FormErr);
    }
    if message.metadata.op_code != OpCode::Query {
        return encode(reply(&message, ResponseCode::NotImp));
    }
    let [asked] = &message.queries[..] else {
        return encode(reply(&message, ResponseCode::FormErr));
    };
    let name = asked.name().to_lowercase().to_ascii();
    let question = Question {
        name: name.strip_suffix('.').unwrap_or(&name).to_string(),
        kind: asked.query_type(),
        transport,
    };
    let limit = match transport {
        Transport::Tcp => usize::from(u16::MAX),
        Transport::Udp => {
            let wanted = message.edns.as_ref().map_or(PLAIN_UDP, Edns::max_payload);
            usize::from(wanted.clamp(PLAIN_UDP, LARGEST_UDP))
        }
    };
    let internet = asked.query_class() == DNSClass::IN;
    let local = match question.kind {
        RecordType::A | RecordType::AAAA if internet => match resolver.resolve(&question).await {
            Ok(Resolution::Forward) => None,
            Ok(Resolution::Known { alias, addresses }) => Some((alias, addresses)),
            Err(reason) => {
                resolver.answered(&question, &reason, 0);
                return encode(reply(&message, ResponseCode::ServFail));
            }
        },
        _ => None,
    };
    if let Some((alias, addresses)) = local {
        let result = if addresses.is_empty() {
            "no records"
        } else {
            "success"
        };
        resolver.answered(&question, result, addresses.len());
        return fit(known(&message, alias, addresses, resolver), limit);
    }
    match resolver.forward(query, &question).await {
        Ok(answer) => {
            resolver.answered(&question, "forwarded", 0);
            if answer.len() <= limit {
                return Some(answer);
            }
            let Ok(parsed) = Message::from_vec(&answer) else {
                return encode(reply(&message, ResponseCode::ServFail));
            };
            encode(parsed.truncate())
        }
        Err(failed) => {
            resolver.answered(&question, &format!("forwarding failed ({failed})"), 0);
            encode(reply(&message, ResponseCode::ServFail))
        }
    }
}

fn known(
    query: &Message,
    alias: Option<String>,
    mut addresses: Vec<IpAddr>,
    resolver: &impl Resolver,
) -> Message {
    let mut response = reply(query, ResponseCode::NoError);
    response.metadata.authoritative = true;
    for position in (1..addresses.len()).rev() {
        addresses.swap(position, resolver.random(position as u64 + 1) as usize);
    }
    let asked = query
        .queries
        .first()
        .map(|question| question.name().clone())
        .unwrap_or_default();
    let mut owner = asked.clone();
    if let Some(alias) = alias.filter(|_| !addresses.is_empty())
        && let Ok(name) = Name::from_ascii(format!("{alias}."))
    {
        response.add_answer(Record::from_rdata(
            asked,
            TTL,
            RData::CNAME(CNAME(name.clone())),
        ));
        owner = name;
    }
    for address in addresses {
        let data = match address {
            IpAddr::V4(address) => RData::A(A(address)),
            IpAddr::V6(address) => RData::AAAA(AAAA(address)),
        };
        response.add_answer(Record::from_rdata(owner.clone(), TTL, data));
    }
    response
}

/// An empty answer to a query, with its question and EDNS settings.
fn reply(query: &Message, code: ResponseCode) -> Message {
    let mut response = Message::new(
        query.metadata.id,
        MessageType::Response,
        query.metadata.op_code,
    );
    response.metadata = Metadata::response_from_request(&query.metadata);
    response.metadata.recursion_available = true;
    response.metadata.response_code = code;
    response.add_queries(query.queries.iter().cloned());
    if let Some(asked) = &query.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(asked.max_payload().max(PLAIN_UDP));
        edns.set_version(asked.version());
        edns.set_dnssec_ok(asked.flags().dnssec_ok);
        response.set_edns(edns);
    }
    response
}

fn error(id: u16, code: ResponseCode) -> Option<Vec<u8>> {
    encode(Message::error_msg(id, OpCode::Query, code))
}

fn encode(message: Message) -> Option<Vec<u8>> {
    message
        .to_vec()
        .map_err(|error| tracing::warn!("a DNS answer cannot be encoded: {error}"))
        .ok()
}

fn fit(message: Message, limit: usize) -> Option<Vec<u8>> {
    let whole = message.to_vec().ok()?;
    if whole.len() <= limit {
        Some(whole)
    } else {
        encode(message.truncate())
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
