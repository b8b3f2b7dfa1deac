//! TLS records on keys that a finished handshake hands over: many at once, between two buffers of the caller.
//!
//! Key updates, alerts and the limits of the cipher are kept here (RFC 8446 §4.6.3, §5, §6; RFC 5288 for TLS 1.2).

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets, ProtocolVersion};
use thiserror::Error;

/// The largest plaintext of a record.
const PLAIN: usize = 1 << 14;
const HEADER: usize = 5;
const TAG: usize = 16;
/// The nonce that a TLS 1.2 record carries.
const EXPLICIT: usize = 8;
/// What sealing adds to a record at most.
const OVERHEAD: usize = HEADER + EXPLICIT + TAG + 1;
/// Records sealed with one key before it is replaced, well below what AES-GCM allows (RFC 8446 §5.5).
const REKEY: u64 = 1 << 23;
/// The largest ciphertext of a record (RFC 8446 §5.2, RFC 5246 §6.2.3).
const CIPHER: usize = PLAIN + 2048;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION: u8 = 23;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
const CLOSE_NOTIFY: u8 = 0;
const BAD_RECORD_MAC: u8 = 20;
const USER_CANCELED: u8 = 90;

/// Records that cannot be read or written; the connection is of no use then.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RecordError {
    #[error("the peer sent the TLS alert {:?}", rustls::AlertDescription::from(*.0))]
    Alert(u8),
    #[error("a TLS record cannot be decrypted")]
    Decrypt,
    #[error("the peer broke TLS: {0}")]
    Unexpected(&'static str),
    #[error("the TLS keys are used up")]
    Exhausted,
    #[error("TLS keys: {0}")]
    Keys(String),
}

/// What was opened of a buffer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// Bytes of ciphertext that are done with; what follows is the start of a record.
    pub consumed: usize,
    /// Bytes of plaintext.
    pub plain: usize,
    /// Whether the peer will send no more.
    pub closed: bool,
}

/// What rustls keeps of the connection: the secrets that new keys are made of.
enum Secrets {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

struct Direction {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

/// Both directions of a TLS connection after its handshake.
pub struct Records {
    sealing: Direction,
    opening: Direction,
    secrets: Secrets,
    tls12: bool,
    /// The peer asked that this end's key be replaced too.
    rekey: bool,
    /// A handshake message as far as its records came.
    message: Vec<u8>,
}

impl Records {
    pub fn client(
        (keys, kernel): (ExtractedSecrets, KernelConnection<ClientConnectionData>),
    ) -> Result<Self, RecordError> {
        let version = kernel.protocol_version();
        Self::new(keys, version, Secrets::Client(kernel))
    }

    pub fn server(
        (keys, kernel): (ExtractedSecrets, KernelConnection<ServerConnectionData>),
    ) -> Result<Self, RecordError> {
        let version = kernel.protocol_version();
        Self::new(keys, version, Secrets::Server(kernel))
    }

    fn new(
        keys: ExtractedSecrets,
        version: ProtocolVersion,
        secrets: Secrets,
    ) -> Result<Self, RecordError> {
        Ok(Self {
            sealing: Direction::new(keys.tx)?,
            opening: Direction::new(keys.rx)?,
            secrets,
            tls12: version == ProtocolVersion::TLSv1_2,
            rekey: false,
            message: Vec::new(),
        })
    }

    /// The most bytes that `seal` writes for so many bytes of plaintext, a key update included.
    pub const fn sealed(plain: usize) -> usize {
        plain + (plain / PLAIN + 2) * OVERHEAD + 5
    }

    /// Whether there is something to be sealed even without plaintext.
    pub fn wants_to_seal(&self) -> bool {
        self.rekey
    }

    /// Seals application data; gives the bytes written to `out`, which must have room for `sealed` of them.
    pub fn seal(&mut self, plain: &[u8], out: &mut [u8]) -> Result<usize, RecordError> {
        let mut written = 0;
        if self.rekey {
            written += self.replace_key(out)?;
        }
        for chunk in plain.chunks(PLAIN) {
            if self.sealing.sequence >= REKEY {
                written += self.replace_key(&mut out[written..])?;
            }
            written += self.seal_one(APPLICATION, chunk, &mut out[written..])?;
        }
        Ok(written)
    }

    /// Seals the alert that ends the connection in peace.
    pub fn close(&mut self, out: &mut [u8]) -> Result<usize, RecordError> {
        self.seal_one(ALERT, &[1, CLOSE_NOTIFY], out)
    }

    /// Seals the alert that tells the peer why its last record was refused.
    pub fn abort(&mut self, error: &RecordError, out: &mut [u8]) -> Result<usize, RecordError> {
        let alert = match error {
            RecordError::Decrypt => BAD_RECORD_MAC,
            RecordError::Unexpected(_) => 10,
            _ => 80,
        };
        self.seal_one(ALERT, &[2, alert], out)
    }

    fn replace_key(&mut self, out: &mut [u8]) -> Result<usize, RecordError> {
        if self.tls12 {
            return Err(RecordError::Exhausted);
        }
        self.rekey = false;
        let written = self.seal_one(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0], out)?;
        let new = match &mut self.secrets {
            Secrets::Client(kernel) => kernel.update_tx_secret(),
            Secrets::Server(kernel) => kernel.update_tx_secret(),
        };
        self.sealing = Direction::new(new.map_err(|error| RecordError::Keys(error.to_string()))?)?;
        Ok(written)
    }

    fn seal_one(&mut self, kind: u8, plain: &[u8], out: &mut [u8]) -> Result<usize, RecordError> {
        let sequence = self.sealing.sequence;
        let nonce = self.sealing.nonce(sequence);
        let explicit: [u8; EXPLICIT] = [4, 5, 6, 7, 8, 9, 10, 11].map(|at| nonce[at]);
        let nonce = Nonce::assume_unique_for_key(nonce);
        self.sealing.sequence += 1;
        let sealed = if self.tls12 {
            let length = EXPLICIT + plain.len() + TAG;
            let [a, b] = (length as u16).to_be_bytes();
            out[..HEADER].copy_from_slice(&[kind, 3, 3, a, b]);
            out[HEADER..HEADER + EXPLICIT].copy_from_slice(&explicit);
            let aad = aad12(sequence, kind, plain.len());
            let (cipher, rest) = out[HEADER + EXPLICIT..].split_at_mut(plain.len());
            let key = &self.sealing.key;
            key.seal_out_of_place_scatter(
                nonce,
                Aad::from(aad),
                plain,
                cipher,
                &[],
                &mut rest[..TAG],
            )
            .map(|()| HEADER + length)
        } else {
            let length = plain.len() + 1 + TAG;
            let [a, b] = (length as u16).to_be_bytes();
            let header = [APPLICATION, 3, 3, a, b];
            out[..HEADER].copy_from_slice(&header);
            let (cipher, rest) = out[HEADER..].split_at_mut(plain.len());
            let (aad, rest) = (Aad::from(header), &mut rest[..1 + TAG]);
            let key = &self.sealing.key;
            key.seal_out_of_place_scatter(nonce, aad, plain, cipher, &[kind], rest)
                .map(|()| HEADER + length)
        };
        sealed.map_err(|_| RecordError::Exhausted)
    }

    /// Opens the whole records of `cipher` into `plain`, which must be as large.
    pub fn open(&mut self, cipher: &[u8], plain: &mut [u8]) -> Result<Opened, RecordError> {
        let mut opened = Opened::default();
        while let Some((header, rest)) = cipher[opened.consumed..].split_first_chunk::<HEADER>() {
            let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
            if length > CIPHER {
                return Err(RecordError::Unexpected("a record is too large"));
            }
            let Some(body) = rest.get(..length) else {
                break;
            };
            let (kind, size) = self.open_one(header, body, &mut plain[opened.plain..])?;
            opened.consumed += HEADER + length;
            let content = &plain[opened.plain..opened.plain + size];
            match kind {
                APPLICATION if self.message.is_empty() => opened.plain += size,
                ALERT => match *content {
                    [_, CLOSE_NOTIFY] => {
                        opened.closed = true;
                        break;
                    }
                    [_, USER_CANCELED] => {}
                    [_, alert] => return Err(RecordError::Alert(alert)),
                    _ => return Err(RecordError::Unexpected("a malformed alert")),
                },
                HANDSHAKE if !self.tls12 && size > 0 => {
                    self.message.extend_from_slice(content);
                    self.messages()?;
                }
                _ => return Err(RecordError::Unexpected("a record out of place")),
            }
        }
        Ok(opened)
    }

    /// Gives the record's content type and the length of its content.
    fn open_one(
        &mut self,
        header: &[u8; HEADER],
        body: &[u8],
        plain: &mut [u8],
    ) -> Result<(u8, usize), RecordError> {
        let sequence = self.opening.sequence;
        if header[1..3] != [3, 3] {
            return Err(RecordError::Unexpected("a record of another version"));
        }
        let explicit = if self.tls12 { EXPLICIT } else { 0 };
        if body.len() < explicit + TAG {
            return Err(RecordError::Decrypt);
        }
        let (nonce, sealed) = body.split_at(explicit);
        let (cipher, tag) = sealed.split_at(sealed.len() - TAG);
        let size = cipher.len();
        let key = &self.opening.key;
        let result = if self.tls12 {
            let mut full = self.opening.iv;
            full[4..].copy_from_slice(nonce);
            let nonce = Nonce::assume_unique_for_key(full);
            let aad = Aad::from(aad12(sequence, header[0], size));
            key.open_separate_gather(nonce, aad, cipher, tag, &mut plain[..size])
        } else {
            if header[0] != APPLICATION {
                return Err(RecordError::Unexpected("a record that is not encrypted"));
            }
            let nonce = Nonce::assume_unique_for_key(self.opening.nonce(sequence));
            key.open_separate_gather(nonce, Aad::from(*header), cipher, tag, &mut plain[..size])
        };
        result.map_err(|_| RecordError::Decrypt)?;
        self.opening.sequence += 1;
        let (kind, size) = if self.tls12 {
            (header[0], size)
        } else {
            // The type is the last byte that is not padding.
            let last = plain[..size].iter().rposition(|byte| *byte != 0);
            let last = last.ok_or(RecordError::Unexpected("a record without a type"))?;
            (plain[last], last)
        };
        match size > PLAIN {
            true => Err(RecordError::Unexpected("a record is too large")),
            false => Ok((kind, size)),
        }
    }

    /// Acts on the handshake messages that are complete.
    fn messages(&mut self) -> Result<(), RecordError> {
        while let [kind, a, b, c, ..] = *self.message {
            let length = 4 + u32::from_be_bytes([0, a, b, c]) as usize;
            if length > PLAIN {
                return Err(RecordError::Unexpected("a handshake message is too large"));
            }
            if self.message.len() < length {
                break;
            }
            match (kind, &self.message[4..length]) {
                // Tunnels are not resumed.
                (NEW_SESSION_TICKET, _) => {}
                (KEY_UPDATE, [asked @ (0 | 1)]) if self.message.len() == length => {
                    self.rekey |= *asked == 1;
                    let new = match &mut self.secrets {
                        Secrets::Client(kernel) => kernel.update_rx_secret(),
                        Secrets::Server(kernel) => kernel.update_rx_secret(),
                    };
                    let new = new.map_err(|error| RecordError::Keys(error.to_string()))?;
                    self.opening = Direction::new(new)?;
                }
                _ => return Err(RecordError::Unexpected("a handshake message out of place")),
            }
            self.message.drain(..length);
        }
        if self.message.is_empty() {
            self.message = Vec::new();
        }
        Ok(())
    }
}

impl Direction {
    fn new((sequence, secret): (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        let (algorithm, key, iv) = match &secret {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            _ => return Err(RecordError::Keys("not an AES-GCM suite".to_string())),
        };
        let wrong = || RecordError::Keys("of a wrong length".to_string());
        Ok(Self {
            key: LessSafeKey::new(UnboundKey::new(algorithm, key.as_ref()).map_err(|_| wrong())?),
            iv: iv.as_ref().try_into().map_err(|_| wrong())?,
            sequence,
        })
    }

    fn nonce(&self, sequence: u64) -> [u8; 12] {
        let mut nonce = self.iv;
        for (byte, counter) in nonce[4..].iter_mut().zip(sequence.to_be_bytes()) {
            *byte ^= counter;
        }
        nonce
    }
}

fn aad12(sequence: u64, kind: u8, length: usize) -> [u8; 13] {
    let mut aad = [0; 13];
    aad[..8].copy_from_slice(&sequence.to_be_bytes());
    aad[8..11].copy_from_slice(&[kind, 3, 3]);
    aad[11..].copy_from_slice(&(length as u16).to_be_bytes());
    aad
}
