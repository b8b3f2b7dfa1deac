use std::hash::Hasher;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::LocalSet;
use xxhash_rust::xxh64::Xxh64;

use super::*;
use crate::proxy::pipes::tests::pipes;

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// A pair whose receiver has a small window.
async fn narrow_pair() -> (TcpStream, TcpStream) {
    let listener = TcpSocket::new_v4().unwrap();
    listener.set_recv_buffer_size(16 << 10).unwrap();
    listener.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = listener.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// Bytes that tell their places apart.
fn piece(seed: u64, size: usize) -> Vec<u8> {
    let mut x = seed | 1;
    let next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    std::iter::repeat_with(next).take(size).collect()
}

/// Writes so many pieces of odd sizes; gives their number of bytes and their hash.
async fn produce(to: &mut (impl AsyncWriteExt + Unpin), pieces: u64, size: usize) -> (u64, u64) {
    let mut hash = Xxh64::new(0);
    let mut total = 0;
    for number in 0..pieces {
        let bytes = piece(number, 1 + (number as usize * 7919 + size) % (2 * size));
        to.write_all(&bytes).await.unwrap();
        hash.update(&bytes);
        total += bytes.len() as u64;
    }
    (total, hash.finish())
}

/// Reads to the end, resting after each so many bytes; gives their number and their hash.
async fn consume(from: &mut (impl AsyncReadExt + Unpin), rest_after: usize) -> (u64, u64) {
    let mut hash = Xxh64::new(0);
    let (mut total, mut since) = (0, 0);
    let mut buffer = vec![0; 100_003];
    loop {
        let read = from.read(&mut buffer).await.unwrap();
        if read == 0 {
            return (total, hash.finish());
        }
        hash.update(&buffer[..read]);
        total += read as u64;
        since += read;
        if since > rest_after {
            since = 0;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
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
    let (result, read) = tokio::join!(relay(near, far, &sent, &received), server.read(&mut buffer));
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

/// Runs flows of `pieces` both ways at once and checks every byte and every count.
async fn carry(flows: usize, pieces: u64, size: usize, rest_after: usize) {
    let work = async {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..flows {
            tasks.spawn_local(async move {
                let (mut client, near) = pair().await;
                let (far, mut server) = narrow_pair().await;
                let (sent, received) = (Cell::new(0), Cell::new(0));
                let relayed = relay(near, far, &sent, &received);
                let (mut client_read, mut client_write) = client.split();
                let (mut server_read, mut server_write) = server.split();
                let up = async {
                    let told = produce(&mut client_write, pieces, size).await;
                    client_write.shutdown().await.unwrap();
                    told
                };
                let down = async {
                    let told = produce(&mut server_write, pieces / 2, size).await;
                    server_write.shutdown().await.unwrap();
                    told
                };
                let (result, up, up_seen, down, down_seen) = tokio::join!(
                    relayed,
                    up,
                    consume(&mut server_read, rest_after),
                    down,
                    consume(&mut client_read, rest_after)
                );
                result.unwrap();
                assert_eq!((up, down), (up_seen, down_seen));
                assert_eq!((sent.get(), received.get()), (up.0, down.0));
            });
        }
        while let Some(flow) = tasks.join_next().await {
            flow.unwrap();
        }
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn bulk_arrives_whole_both_ways_at_once() {
    carry(3, 60, 150_000, usize::MAX).await;
    assert!(pipes().0 > 0, "nothing was spliced");
    assert_eq!(pipes().1, 0);
}

#[tokio::test]
async fn slow_readers_get_everything_and_counts_are_exact() {
    carry(4, 40, 120_000, 300_000).await;
    assert!(pipes().0 > 0, "nothing was spliced");
    assert_eq!(pipes().1, 0);
}

#[tokio::test]
async fn questions_and_answers_are_never_spliced() {
    let (mut client, near) = pair().await;
    let (far, mut server) = pair().await;
    let (sent, received) = (Cell::new(0), Cell::new(0));
    let peers = async {
        let mut buffer = [0; 9_000];
        for _ in 0..500 {
            client.write_all(&[1; 700]).await.unwrap();
            server.read_exact(&mut buffer[..700]).await.unwrap();
            server.write_all(&[2; 9_000]).await.unwrap();
            client.read_exact(&mut buffer).await.unwrap();
        }
        drop((client, server));
    };
    let (result, ()) = tokio::join!(relay(near, far, &sent, &received), peers);
    result.unwrap();
    assert_eq!((sent.get(), received.get()), (500 * 700, 500 * 9_000));
    assert_eq!(pipes(), (0, 0));
}

#[tokio::test]
async fn a_direction_that_alternates_between_bulk_and_small_pieces_loses_nothing() {
    let (mut client, near) = pair().await;
    let (far, mut server) = pair().await;
    let (sent, received) = (Cell::new(0), Cell::new(0));
    let up = async {
        let mut hash = Xxh64::new(0);
        let mut total = 0;
        for round in 0..300_u64 {
            let size = if round / 30 % 2 == 0 { 200_003 } else { 37 };
            let bytes = piece(round, size);
            client.write_all(&bytes).await.unwrap();
            if size == 37 {
                tokio::time::sleep(Duration::from_micros(300)).await;
            }
            hash.update(&bytes);
            total += size as u64;
        }
        client.shutdown().await.unwrap();
        (total, hash.finish())
    };
    let down = async {
        let seen = consume(&mut server, usize::MAX).await;
        drop(server);
        seen
    };
    let (result, told, seen) = tokio::join!(relay(near, far, &sent, &received), up, down);
    result.unwrap();
    assert_eq!(told, seen);
    assert_eq!(sent.get(), told.0);
}

/// Sends bulk until the relay splices and the far side's reader is behind; gives what `client` wrote.
async fn fill(client: &mut TcpStream, bytes: &[u8]) -> u64 {
    let mut total = 0;
    loop {
        match tokio::time::timeout(Duration::from_millis(100), client.write(bytes)).await {
            Ok(written) => total += written.unwrap() as u64,
            Err(_) => return total,
        }
    }
}

#[tokio::test]
async fn what_waits_in_a_pipe_arrives_before_the_half_close() {
    let (mut client, near) = pair().await;
    let (far, mut server) = narrow_pair().await;
    let (sent, received) = (Cell::new(0), Cell::new(0));
    let bytes = vec![7; 1 << 20];
    let peers = async {
        // The reader drains for a while, so that the direction is spliced, and then rests.
        let mut sink = vec![0; 1 << 20];
        let mut read = 0;
        let (mut total, mut round) = (0, 0);
        while pipes() == (0, 0) && round < 1000 {
            round += 1;
            total += client.write(&bytes).await.unwrap() as u64;
            read += server.read(&mut sink).await.unwrap() as u64;
        }
        total += fill(&mut client, &bytes).await;
        assert_eq!(pipes().1, 1, "nothing waits in a pipe");
        client.shutdown().await.unwrap();
        read += consume(&mut server, usize::MAX).await.0;
        assert_eq!(read, total);
        server.write_all(b"bye").await.unwrap();
        drop(server);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"bye");
        total
    };
    let (result, total) = tokio::join!(relay(near, far, &sent, &received), peers);
    result.unwrap();
    assert_eq!((sent.get(), received.get()), (total, 3));
    assert_eq!(pipes().1, 0);
}

#[tokio::test]
async fn a_reset_while_spliced_arrives_and_its_pipe_is_not_used_again() {
    let (mut client, near) = pair().await;
    let (far, server) = narrow_pair().await;
    let (sent, received) = (Cell::new(0), Cell::new(0));
    let bytes = vec![7; 1 << 20];
    let peers = async {
        let mut sink = vec![0; 1 << 20];
        let mut round = 0;
        while pipes() == (0, 0) && round < 1000 {
            round += 1;
            client.write_all(&bytes[..200_000]).await.unwrap();
            while matches!(server.try_read(&mut sink), Ok(1..)) {
                tokio::task::yield_now().await;
            }
        }
        fill(&mut client, &bytes).await;
        assert_eq!(pipes().1, 1, "nothing waits in a pipe");
        reset(server);
        let error = loop {
            match client.read(&mut sink).await {
                Ok(0) => panic!("an orderly end"),
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    };
    let before = pipes().0;
    let (result, ()) = tokio::join!(relay(near, far, &sent, &received), peers);
    assert!(result.is_err());
    assert_eq!(pipes().1, 0);
    assert!(pipes().0 <= before + 1);
}

#[tokio::test]
async fn idle_flows_hold_no_pipe_and_many_flows_leak_nothing() {
    let descriptors = || std::fs::read_dir("/proc/thread-self/fd").unwrap().count();
    carry(2, 20, 150_000, usize::MAX).await;
    let before = (descriptors(), pipes().0);
    for _ in 0..6 {
        carry(5, 20, 150_000, usize::MAX).await;
    }
    // A pipe is two descriptors; other tests of this process open and close theirs meanwhile.
    let pooled = 2 * (pipes().0 - before.1);
    assert!(
        descriptors() < before.0 + pooled + 60,
        "{} descriptors",
        descriptors()
    );
    assert_eq!(pipes().1, 0);
}

#[tokio::test]
async fn an_idle_bulk_flow_gives_its_pipe_back() {
    let (mut client, near) = pair().await;
    let (far, mut server) = pair().await;
    let (sent, received) = (Cell::new(0), Cell::new(0));
    let peers = async {
        let bytes = vec![1; 20 << 20];
        let write = client.write_all(&bytes);
        let mut back = vec![0; 20 << 20];
        let (written, read) = tokio::join!(write, server.read_exact(&mut back));
        written.unwrap();
        read.unwrap();
        assert!(pipes().0 > 0, "nothing was spliced");
        assert_eq!(pipes().1, 0);
        drop((client, server));
    };
    let (result, ()) = tokio::join!(relay(near, far, &sent, &received), peers);
    result.unwrap();
    assert_eq!(sent.get(), 20 << 20);
}

#[tokio::test]
async fn a_relay_is_small() {
    let (_client, near) = pair().await;
    let (far, _server) = pair().await;
    let (sent, received) = (Cell::new(0), Cell::new(0));
    let size = std::mem::size_of_val(&relay(near, far, &sent, &received));
    assert!(size <= 320, "{size} bytes");
}
