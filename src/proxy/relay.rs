//! Copies bytes between two TCP sockets: the plaintext side of the data path.
//!
//! A flow owns bytes only while a peer does not take them: reads go to one scratch of the worker.

use std::cell::{Cell, RefCell};
use std::io;

use socket2::SockRef;
use tokio::net::TcpStream;

const SCRATCH: usize = 256 * 1024;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Relays until both directions have ended; a half-close is passed on, a reset is passed on as a reset.
///
/// `sent` counts bytes from `near` to `far`, `received` the others.
///
/// # Errors
/// What broke a direction; a connection that a peer reset is no error to the caller's log.
pub async fn relay(
    near: TcpStream,
    far: TcpStream,
    sent: &Cell<u64>,
    received: &Cell<u64>,
) -> io::Result<()> {
    let forward = copy(&near, &far, sent);
    let backward = copy(&far, &near, received);
    let result = tokio::try_join!(forward, backward);
    match result {
        Ok(_) => Ok(()),
        Err(error) => {
            reset(near);
            reset(far);
            Err(error)
        }
    }
}

/// Closes a socket with a reset rather than an orderly end.
pub fn reset(socket: TcpStream) {
    // A failure leaves an orderly close, which is the next best thing.
    let _ = SockRef::from(&socket).set_linger(Some(std::time::Duration::ZERO));
}

async fn copy(from: &TcpStream, to: &TcpStream, count: &Cell<u64>) -> io::Result<()> {
    loop {
        from.readable().await?;
        match step(from, to, count)? {
            Step::Blocked => {}
            Step::End => {
                return match SockRef::from(to).shutdown(std::net::Shutdown::Write) {
                    Err(e) if e.kind() != io::ErrorKind::NotConnected => Err(e),
                    _ => Ok(()),
                };
            }
            Step::Left(rest) => {
                let mut rest = &rest[..];
                while !rest.is_empty() {
                    to.writable().await?;
                    match to.try_write(rest) {
                        Ok(written) => {
                            count.set(count.get() + written as u64);
                            rest = &rest[written..];
                        }
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                        Err(e) => return Err(e),
                    }
                }
            }
        }
    }
}

enum Step {
    Blocked,
    End,
    /// What the far socket would not take.
    Left(Vec<u8>),
}

fn step(from: &TcpStream, to: &TcpStream, count: &Cell<u64>) -> io::Result<Step> {
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(SCRATCH, 0);
        let read = match from.try_read(buffer) {
            Ok(0) => return Ok(Step::End),
            Ok(read) => read,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Step::Blocked),
            Err(e) => return Err(e),
        };
        let mut done = 0;
        while done < read {
            match to.try_write(&buffer[done..read]) {
                Ok(written) => {
                    done += written;
                    count.set(count.get() + written as u64);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Step::Left(buffer[done..read].to_vec()));
                }
                Err(e) => return Err(e),
            }
        }
        Ok(Step::Blocked)
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        (near.unwrap(), far.unwrap().0)
    }

    #[tokio::test]
    async fn a_half_close_is_passed_on_and_bytes_are_counted() {
        let (mut client, near) = pair().await;
        let (far, mut server) = pair().await;
        let (sent, received) = (Cell::new(0), Cell::new(0));
        let peers = async {
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut question = String::new();
            server.read_to_string(&mut question).await.unwrap();
            server.write_all(b"an answer").await.unwrap();
            drop(server);
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            (question, answer)
        };
        let (result, (question, answer)) = tokio::join!(relay(near, far, &sent, &received), peers);
        result.unwrap();
        assert_eq!(
            (question.as_str(), answer.as_str()),
            ("question", "an answer")
        );
        assert_eq!((sent.get(), received.get()), (8, 9));
    }

    #[tokio::test]
    async fn a_reset_arrives_as_a_reset() {
        let (client, near) = pair().await;
        let (far, mut server) = pair().await;
        reset(client);
        let (sent, received) = (Cell::new(0), Cell::new(0));
        let mut buffer = [0; 1];
        let (result, read) =
            tokio::join!(relay(near, far, &sent, &received), server.read(&mut buffer));
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
