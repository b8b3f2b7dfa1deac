//! What runs in the pods of the tests, and what asks it.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::harness::Proxy;

/// Says `hello` to everyone and closes.
pub fn greet(listener: TcpListener) {
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.write_all(b"hello").await;
        }
    });
}

/// Says to everyone what it hears.
pub fn echo(listener: TcpListener) {
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = socket.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
}

/// What a flow to `target` reads to its end.
pub async fn ask(proxy: &Proxy, target: &str) -> String {
    let mut text = Vec::new();
    if let Ok(mut socket) = proxy.connect(target).await {
        let _ = socket.read_to_end(&mut text).await;
    }
    String::from_utf8(text).unwrap()
}

/// Asks the SOCKS5 listener for a connection: the answer's code, and what was read then.
pub async fn socks(proxy: &Proxy, request: &[u8]) -> (u8, String) {
    // A proxy that has just started may not listen yet.
    let mut attempts = 0..500;
    let mut socket = loop {
        match proxy.connect("127.0.0.1:15080").await {
            Ok(socket) => break socket,
            Err(error) => assert!(attempts.next().is_some(), "{error}"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    let hello = [5, 1, 0];
    socket.write_all(&hello).await.unwrap();
    let mut chosen = [0; 2];
    socket.read_exact(&mut chosen).await.unwrap();
    assert_eq!(chosen, [5, 0]);
    socket.write_all(request).await.unwrap();
    let mut reply = [0; 10];
    socket.read_exact(&mut reply).await.unwrap();
    let mut text = Vec::new();
    let _ = socket.read_to_end(&mut text).await;
    (reply[1], String::from_utf8(text).unwrap())
}

/// A SOCKS5 request for an address.
pub fn to_address(ip: [u8; 4], port: u16) -> Vec<u8> {
    [&[5, 1, 0, 1][..], &ip, &port.to_be_bytes()].concat()
}
