//! The TLS handshake of a tunnel, up to the keys that its records are sealed with.

use std::io;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ServerConfig};
use tokio::net::TcpStream;

use super::record::{RecordError, Records};
use crate::Identity;
use crate::spiffe_san::identities;

/// The most that a peer may have sent without ending its handshake.
const LARGEST: usize = 256 << 10;
/// How much is read at a time.
const READ: usize = 8 << 10;

/// A finished handshake.
pub struct Proven {
    pub records: Records,
    /// Who the peer proved to be.
    pub peer: Option<Identity>,
    /// What the peer proved it with.
    pub chain: Vec<CertificateDer<'static>>,
    /// Whether HTTP/2 was agreed on.
    pub http2: bool,
    /// Plaintext that came along with the end of the handshake.
    pub early: Vec<u8>,
    /// Ciphertext that came after that.
    pub rest: Vec<u8>,
}

/// Proves both ends, calling.
///
/// # Errors
/// The socket's, or `InvalidData` with the reason of the refusal.
pub async fn connect(socket: &TcpStream, config: Arc<ClientConfig>) -> io::Result<Proven> {
    // Nothing is sent of the name: SNI is off.
    let name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
    let mut connection = UnbufferedClientConnection::new(config, name).map_err(invalid)?;
    let buffers = prove(socket, &mut connection).await?;
    let agreed = Agreed::of(&connection);
    let keys = connection.dangerous_into_kernel_connection();
    let records = Records::client(keys.map_err(invalid)?);
    buffers.proven(records, agreed)
}

/// Proves both ends, called.
///
/// # Errors
/// As for `connect`.
pub async fn accept(socket: &TcpStream, config: Arc<ServerConfig>) -> io::Result<Proven> {
    let mut connection = UnbufferedServerConnection::new(config).map_err(invalid)?;
    let buffers = prove(socket, &mut connection).await?;
    let agreed = Agreed::of(&connection);
    let keys = connection.dangerous_into_kernel_connection();
    let records = Records::server(keys.map_err(invalid)?);
    buffers.proven(records, agreed)
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// What a handshake brought besides keys.
struct Agreed {
    chain: Vec<CertificateDer<'static>>,
    http2: bool,
}

impl Agreed {
    fn of(state: &CommonState) -> Self {
        let chain = state.peer_certificates().unwrap_or_default();
        Self {
            chain: chain.iter().map(|part| part.clone().into_owned()).collect(),
            http2: state.alpn_protocol() == Some(b"h2"),
        }
    }
}

#[derive(Default)]
struct Buffers {
    input: Vec<u8>,
    output: Vec<u8>,
    early: Vec<u8>,
}

/// What a handshake needs next.
enum Step {
    Again,
    Send,
    Read,
    Done,
}

/// Either end of rustls, as far as a handshake goes.
trait Handshake {
    /// Does the next thing; gives how much of the input was used up by it.
    fn step(&mut self, buffers: &mut Buffers) -> (usize, Result<Step, rustls::Error>);
}

impl Handshake for UnbufferedClientConnection {
    fn step(&mut self, buffers: &mut Buffers) -> (usize, Result<Step, rustls::Error>) {
        let handshaking = self.is_handshaking();
        let status = self.process_tls_records(&mut buffers.input);
        act(status, handshaking, &mut buffers.output, &mut buffers.early)
    }
}

impl Handshake for UnbufferedServerConnection {
    fn step(&mut self, buffers: &mut Buffers) -> (usize, Result<Step, rustls::Error>) {
        let handshaking = self.is_handshaking();
        let status = self.process_tls_records(&mut buffers.input);
        act(status, handshaking, &mut buffers.output, &mut buffers.early)
    }
}

fn act<D>(
    status: UnbufferedStatus<'_, '_, D>,
    handshaking: bool,
    output: &mut Vec<u8>,
    early: &mut Vec<u8>,
) -> (usize, Result<Step, rustls::Error>) {
    let discard = status.discard;
    let step = match status.state {
        Err(error) => Err(error),
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            let start = output.len();
            let mut room = 4096;
            loop {
                output.resize(start + room, 0);
                match data.encode(&mut output[start..]) {
                    Ok(length) => {
                        output.truncate(start + length);
                        break Ok(Step::Again);
                    }
                    Err(EncodeError::InsufficientSize(size)) => room = size.required_size,
                    Err(EncodeError::AlreadyEncoded) => {
                        output.truncate(start);
                        break Ok(Step::Again);
                    }
                }
            }
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Ok(Step::Send)
        }
        Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
            match traffic.next_record() {
                Some(Ok(record)) => early.extend_from_slice(record.payload),
                Some(Err(error)) => break Err(error),
                None => break Ok(Step::Again),
            }
        },
        Ok(ConnectionState::WriteTraffic(_)) if !handshaking => Ok(Step::Done),
        // The handshake ended in this very step; one more look finds whatever else it left.
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::Again),
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Err(rustls::Error::General(
            "the peer closed during the handshake".to_string(),
        )),
        Ok(_) => Ok(Step::Read),
    };
    (discard, step)
}

async fn prove(socket: &TcpStream, connection: &mut impl Handshake) -> io::Result<Buffers> {
    let mut buffers = Buffers::default();
    loop {
        let (discard, step) = connection.step(&mut buffers);
        buffers.input.drain(..discard);
        match step {
            Ok(Step::Again) => {}
            Ok(Step::Send) => send(socket, &mut buffers.output).await?,
            Ok(Step::Read) => read(socket, &mut buffers.input).await?,
            Ok(Step::Done) => return Ok(buffers),
            Err(error) => {
                // The peer is told why, if that can be done at once: what rustls has to say comes first.
                let _ = connection.step(&mut buffers);
                let _ = socket.try_write(&buffers.output);
                return Err(invalid(error));
            }
        }
    }
}

async fn send(socket: &TcpStream, output: &mut Vec<u8>) -> io::Result<()> {
    let mut sent = 0;
    while sent < output.len() {
        match socket.try_write(&output[sent..]) {
            Ok(written) => sent += written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.writable().await?,
            Err(error) => return Err(error),
        }
    }
    output.clear();
    Ok(())
}

async fn read(socket: &TcpStream, input: &mut Vec<u8>) -> io::Result<()> {
    if input.len() > LARGEST {
        return Err(invalid("the peer's handshake is too long"));
    }
    loop {
        socket.readable().await?;
        input.reserve(READ);
        match socket.try_read_buf(input) {
            Ok(0) => {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "tls handshake eof",
                ));
            }
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

impl Buffers {
    fn proven(self, records: Result<Records, RecordError>, agreed: Agreed) -> io::Result<Proven> {
        let Agreed { chain, http2 } = agreed;
        let leaf = chain.first();
        Ok(Proven {
            records: records.map_err(invalid)?,
            peer: leaf.and_then(|leaf| identities(leaf).into_iter().next()),
            chain,
            http2,
            early: self.early,
            rest: self.input,
        })
    }
}
