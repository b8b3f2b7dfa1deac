//! The state machine frame by frame, and against bytes that no peer should send.

use super::connection::{Connection, Event, Fault, Limits, Role};
use super::frame::{self, HEADER, Head, PREFACE, Reason, flag, kind, setting};
use super::hpack::Encoder;

fn limits() -> Limits {
    Limits {
        stream_window: 100_000,
        connection_window: 400_000,
        frame_size: 1 << 20,
        header_list: 16 << 10,
        streams: 3,
    }
}

fn new(role: Role) -> Connection<()> {
    Connection::new(role, limits(), 100)
}

/// Feeds all of `bytes` and gives what the events say, one line each.
fn feed(to: &mut Connection<()>, mut bytes: &[u8]) -> Result<Vec<String>, Fault> {
    let mut seen = Vec::new();
    while let Some(event) = to.receive(&mut bytes)? {
        seen.push(match event {
            Event::Request(place, fields) => {
                format!("request {place} {}", fields.authority.unwrap_or_default())
            }
            Event::Answer(place, fields) => format!("answer {place} {:?}", fields.status),
            Event::Data(place, bytes) => format!("data {place} {}", bytes.len()),
            Event::End(place) => format!("end {place}"),
            Event::Reset(place, reason) => {
                to.forget(place);
                format!("reset {place} {reason}")
            }
            other => format!("{other:?}"),
        });
    }
    Ok(seen)
}

/// Moves what `from` has to say to `to`.
fn pass(from: &mut Connection<()>, to: &mut Connection<()>) -> Vec<String> {
    let bytes = std::mem::take(&mut from.control);
    feed(to, &bytes).unwrap()
}

/// Both ends, with their first frames exchanged.
fn pair() -> (Connection<()>, Connection<()>) {
    let (mut client, mut server) = (new(Role::Client), new(Role::Server));
    pass(&mut client, &mut server);
    pass(&mut server, &mut client);
    pass(&mut client, &mut server);
    (client, server)
}

/// A stream that is open at both ends, at place 0.
fn open() -> (Connection<()>, Connection<()>) {
    let (mut client, mut server) = pair();
    assert_eq!(client.open("10.0.0.1:80", |_| {}), Some(0));
    assert_eq!(pass(&mut client, &mut server), ["request 0 10.0.0.1:80"]);
    server.answer(0, 200, false, |_| {});
    assert_eq!(pass(&mut server, &mut client), ["answer 0 Some(200)"]);
    (client, server)
}

fn send(from: &mut Connection<()>, length: usize, end: bool) -> Vec<u8> {
    let mut bytes = from.data(0, length, end).to_vec();
    bytes.resize(HEADER + length, 7);
    bytes
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame::put(&mut bytes, kind, flags, stream, payload);
    bytes
}

fn fault(to: &mut Connection<()>, bytes: &[u8]) -> Reason {
    feed(to, bytes).unwrap_err().reason
}

#[test]
fn bytes_and_ends_pass_however_they_are_cut() {
    let (mut client, mut server) = open();
    let bytes = [send(&mut client, 30, false), send(&mut client, 0, true)].concat();
    let mut seen = Vec::new();
    for byte in bytes {
        seen.extend(feed(&mut server, &[byte]).unwrap());
    }
    assert_eq!(seen.len(), 31);
    assert_eq!((seen[0].as_str(), seen[30].as_str()), ("data 0 1", "end 0"));
    server.consumed(0, 30);
    let answer = send(&mut server, 10, true);
    assert_eq!(feed(&mut client, &answer).unwrap(), ["data 0 10", "end 0"]);
    client.consumed(0, 10);
    client.close(0, Reason::NO_ERROR);
    server.close(0, Reason::NO_ERROR);
    assert!(client.control.is_empty() && server.control.is_empty());
    assert_eq!((client.streams(), server.streams()), (0, 0));
}

#[test]
fn windows_stop_a_sender_and_consumption_lets_it_go_on() {
    let (mut client, mut server) = open();
    assert_eq!(client.room(0), 100_000);
    let bytes = send(&mut client, 100_000, false);
    feed(&mut server, &bytes).unwrap();
    assert_eq!(client.room(0), 0);
    server.consumed(0, 10_000);
    assert!(server.control.is_empty() || client.room(0) == 0);
    server.consumed(0, 90_000);
    let seen = pass(&mut server, &mut client);
    assert!(seen.contains(&"Window(0)".to_string()), "{seen:?}");
    assert_eq!(client.room(0), 100_000);
}

#[test]
fn a_stream_that_nobody_reads_does_not_starve_its_siblings() {
    let (mut client, mut server) = pair();
    for round in 0..20 {
        assert_eq!(client.open("a:1", |_| {}), Some(0), "{round}");
        pass(&mut client, &mut server);
        server.answer(0, 200, false, |_| {});
        pass(&mut server, &mut client);
        // Nothing of it is ever consumed; in the end the client gives up.
        assert_eq!(client.room(0), 100_000, "{round}");
        let bytes = send(&mut client, 100_000, false);
        feed(&mut server, &bytes).unwrap();
        pass(&mut server, &mut client);
        client.close(0, Reason::CANCEL);
        assert_eq!(pass(&mut client, &mut server), ["reset 0 CANCEL"]);
        pass(&mut server, &mut client);
    }
}

#[test]
fn more_than_the_windows_is_refused() {
    let (_, mut server) = open();
    let too_much = frame(kind::DATA, 0, 1, &[0; 100_001]);
    assert_eq!(
        feed(&mut server, &too_much).unwrap(),
        ["reset 0 FLOW_CONTROL_ERROR"]
    );
    let (_, mut server) = open();
    let much = frame(kind::DATA, 0, 1, &[0; 400_001]);
    assert_eq!(fault(&mut server, &much), Reason::FLOW_CONTROL_ERROR);
}

#[test]
fn smaller_windows_of_the_peer_take_effect_at_once() {
    let (mut client, mut server) = open();
    send(&mut client, 50_000, false);
    let settings = |value: u32| {
        let mut bytes = Vec::new();
        frame::put_settings(&mut bytes, &[(setting::INITIAL_WINDOW_SIZE, value)]);
        bytes
    };
    feed(&mut client, &settings(1_000)).unwrap();
    assert_eq!(client.room(0), 0);
    let seen = feed(&mut client, &settings(50_001)).unwrap();
    assert_eq!((seen, client.room(0)), (vec!["WindowOfAll".to_string()], 1));
    server.control.clear();
}

#[test]
fn padding_counts_and_is_left_out() {
    let (_, mut server) = open();
    let padded = frame(
        kind::DATA,
        flag::PADDED | flag::END_STREAM,
        1,
        &[3, b'x', 0, 0, 0],
    );
    assert_eq!(feed(&mut server, &padded).unwrap(), ["data 0 1", "end 0"]);
    let (_, mut server) = open();
    let wrong = frame(kind::DATA, flag::PADDED, 1, &[9, b'x']);
    assert_eq!(fault(&mut server, &wrong), Reason::PROTOCOL_ERROR);
}

#[test]
fn long_headers_come_in_pieces_but_not_for_ever() {
    let (mut client, mut server) = pair();
    client.open("10.0.0.1:80", |encoder| {
        encoder.field("baggage", &"x".repeat(9000))
    });
    let whole = std::mem::take(&mut client.control);
    let mut pieces = Vec::new();
    frame::put_headers(&mut pieces, 1, false, &whole[HEADER..], 1000);
    assert_eq!(
        feed(&mut server, &pieces).unwrap(),
        ["request 0 10.0.0.1:80"]
    );
    // Something else in between breaks the rules (RFC 9113 §4.3).
    let (_, mut server) = pair();
    let interrupted = [&pieces[..HEADER + 1000], &frame(kind::PING, 0, 0, &[0; 8])].concat();
    assert_eq!(fault(&mut server, &interrupted), Reason::PROTOCOL_ERROR);
    let (_, mut server) = pair();
    let mut endless = frame(kind::HEADERS, 0, 1, &[]);
    for _ in 0..100 {
        endless.extend(frame(kind::CONTINUATION, 0, 1, &[]));
    }
    assert_eq!(fault(&mut server, &endless), Reason::ENHANCE_YOUR_CALM);
    let (_, mut server) = pair();
    let huge = frame(kind::HEADERS, 0, 1, &vec![0; 40_000]);
    assert_eq!(fault(&mut server, &huge), Reason::ENHANCE_YOUR_CALM);
}

#[test]
fn streams_above_the_limit_are_refused_and_places_come_back() {
    let (mut client, mut server) = pair();
    for _ in 0..3 {
        client.open("a:1", |_| {}).unwrap();
    }
    assert!(!client.has_room());
    assert_eq!(client.open("a:1", |_| {}), None);
    assert_eq!(pass(&mut client, &mut server).len(), 3);
    let mut block = Vec::new();
    Encoder(&mut block).connect("a:1");
    let fourth = frame(kind::HEADERS, flag::END_HEADERS, 7, &block);
    assert_eq!(feed(&mut server, &fourth).unwrap(), [""; 0]);
    let refusal = Head::parse(server.control[..HEADER].try_into().unwrap());
    assert_eq!((refusal.kind, refusal.stream), (kind::RST_STREAM, 7));
    client.close(1, Reason::CANCEL);
    assert!(client.has_room());
}

#[test]
fn a_graceful_shutdown_serves_what_is_under_way() {
    let (mut client, mut server) = open();
    server.shut_down();
    // The client opens one more before it hears of it.
    client.open("late:1", |_| {}).unwrap();
    let late = std::mem::take(&mut client.control);
    let seen = pass(&mut server, &mut client);
    assert_eq!(seen, [format!("GoAway({}, Reason(0))", i32::MAX)]);
    assert!(client.is_ending() && client.open("later:1", |_| {}).is_none());
    assert_eq!(feed(&mut server, &late).unwrap(), ["request 1 late:1"]);
    pass(&mut client, &mut server);
    assert!(server.is_shut_down());
    assert_eq!(pass(&mut server, &mut client), ["GoAway(3, Reason(0))"]);
}

#[test]
fn a_smaller_header_table_is_acknowledged() {
    let (mut client, _) = pair();
    let mut bytes = Vec::new();
    frame::put_settings(&mut bytes, &[(setting::HEADER_TABLE_SIZE, 0)]);
    feed(&mut client, &bytes).unwrap();
    client.control.clear();
    client.open("a:1", |_| {}).unwrap();
    assert_eq!(client.control[HEADER], 0x20);
    client.control.clear();
    client.open("a:1", |_| {}).unwrap();
    assert_ne!(client.control[HEADER], 0x20);
}

#[test]
fn floods_are_answered_by_going_away() {
    let (_, mut server) = pair();
    let mut block = Vec::new();
    Encoder(&mut block).connect("a:1");
    let mut rapid = Vec::new();
    for id in (1..1000).step_by(2) {
        rapid.extend(frame(kind::HEADERS, flag::END_HEADERS, id, &block));
        rapid.extend(frame(kind::RST_STREAM, 0, id, &8u32.to_be_bytes()));
    }
    assert_eq!(fault(&mut server, &rapid), Reason::ENHANCE_YOUR_CALM);
    let (_, mut server) = open();
    let empty = frame(kind::DATA, 0, 1, &[]).repeat(10_001);
    assert_eq!(fault(&mut server, &empty), Reason::ENHANCE_YOUR_CALM);
}

#[test]
fn frames_that_break_the_rules_end_the_connection() {
    let big = frame(kind::DATA, 0, 1, &vec![0; (1 << 20) + 1]);
    let cases: &[(&[u8], Reason)] = &[
        (&frame(kind::DATA, 0, 0, b"x"), Reason::PROTOCOL_ERROR),
        (&frame(kind::DATA, 0, 9, b"x"), Reason::PROTOCOL_ERROR),
        (&big[..HEADER], Reason::FRAME_SIZE_ERROR),
        (
            &frame(kind::HEADERS, flag::END_HEADERS, 2, b"\x88"),
            Reason::PROTOCOL_ERROR,
        ),
        (
            &frame(kind::HEADERS, flag::END_HEADERS, 5, b"\xff"),
            Reason::COMPRESSION_ERROR,
        ),
        (
            &frame(kind::SETTINGS, 0, 0, b"12345"),
            Reason::FRAME_SIZE_ERROR,
        ),
        (&frame(kind::SETTINGS, 0, 1, b""), Reason::PROTOCOL_ERROR),
        (
            &frame(kind::SETTINGS, flag::ACK, 0, b"123456"),
            Reason::FRAME_SIZE_ERROR,
        ),
        (
            &frame(kind::PING, 0, 0, b"1234567"),
            Reason::FRAME_SIZE_ERROR,
        ),
        (
            &frame(kind::PING, 0, 1, b"12345678"),
            Reason::PROTOCOL_ERROR,
        ),
        (
            &frame(kind::GOAWAY, 0, 0, b"1234567"),
            Reason::FRAME_SIZE_ERROR,
        ),
        (
            &frame(kind::WINDOW_UPDATE, 0, 0, &[0; 4]),
            Reason::PROTOCOL_ERROR,
        ),
        (
            &frame(kind::WINDOW_UPDATE, 0, 0, &[0x7f, 255, 255, 255]),
            Reason::FLOW_CONTROL_ERROR,
        ),
        (
            &frame(kind::WINDOW_UPDATE, 0, 9, &[0, 0, 0, 1]),
            Reason::PROTOCOL_ERROR,
        ),
        (
            &frame(kind::RST_STREAM, 0, 9, &[0; 4]),
            Reason::PROTOCOL_ERROR,
        ),
        (
            &frame(kind::RST_STREAM, 0, 1, &[0; 3]),
            Reason::FRAME_SIZE_ERROR,
        ),
        (
            &frame(kind::PUSH_PROMISE, 0, 1, &[0; 8]),
            Reason::PROTOCOL_ERROR,
        ),
        (
            &frame(kind::CONTINUATION, flag::END_HEADERS, 1, &[]),
            Reason::PROTOCOL_ERROR,
        ),
        (&frame(77, 0, 0, &vec![0; 20_000]), Reason::FRAME_SIZE_ERROR),
    ];
    for (bytes, reason) in cases {
        let (_, mut server) = open();
        assert_eq!(
            fault(&mut server, bytes),
            *reason,
            "{:x?}",
            &bytes[..bytes.len().min(20)]
        );
    }
    assert_eq!(
        fault(&mut new(Role::Server), b"GET / HTTP/1.1\r\n"),
        Reason::PROTOCOL_ERROR
    );
    let early = [PREFACE, &frame(kind::PING, 0, 0, &[0; 8])].concat();
    assert_eq!(
        fault(&mut new(Role::Server), &early),
        Reason::PROTOCOL_ERROR
    );
}

#[test]
fn unknown_frames_and_late_ones_are_passed_over() {
    let (mut client, mut server) = open();
    server.close(0, Reason::CONNECT_ERROR);
    assert_eq!(pass(&mut server, &mut client), ["reset 0 CONNECT_ERROR"]);
    let late = [
        frame(77, 255, 1, b"what"),
        frame(2, 0, 1, &[0; 5]),
        frame(kind::DATA, flag::END_STREAM, 1, b"late"),
        frame(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1]),
        frame(kind::RST_STREAM, 0, 1, &[0; 4]),
    ]
    .concat();
    assert_eq!(feed(&mut server, &late).unwrap(), [""; 0]);
}

/// What both ends say in a short life, as seeds for the mutations.
fn corpus() -> Vec<(Role, Vec<u8>)> {
    let mut seeds: Vec<_> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/http2"))
        .unwrap()
        .map(|file| {
            let path = file.unwrap().path();
            let to_server = path.to_string_lossy().contains("to-server");
            let role = if to_server {
                Role::Server
            } else {
                Role::Client
            };
            (role, std::fs::read(path).unwrap())
        })
        .collect();
    seeds.sort_by(|a, b| a.1.cmp(&b.1));
    assert!(seeds.len() >= 4);
    seeds
}

/// A peer as the seeds assume it: the client has opened two streams.
fn peer(role: Role) -> Connection<()> {
    let mut connection = new(role);
    if role == Role::Client {
        connection.open("10.0.0.1:80", |_| {});
        connection.open("10.0.0.1:80", |_| {});
    }
    connection.control.clear();
    connection
}

#[test]
fn the_corpus_is_read_without_a_fault() {
    for (role, bytes) in corpus() {
        let seen = feed(&mut peer(role), &bytes).unwrap();
        assert!(!seen.is_empty());
    }
}

#[test]
fn mutated_bytes_end_in_a_fault_or_in_nothing_and_state_stays_bounded() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % bound.max(1) as u64) as usize
    };
    for (role, seed) in corpus() {
        for _ in 0..3000 {
            let mut bytes = seed.clone();
            for _ in 0..=random(4) {
                let at = random(bytes.len());
                match random(4) {
                    0 => bytes[at] = random(256) as u8,
                    1 => bytes[at] ^= 1 << random(8),
                    2 => drop(bytes.drain(at..(at + random(20)).min(bytes.len()))),
                    _ => {
                        let copy = bytes[at..(at + random(40)).min(bytes.len())].to_vec();
                        let to = random(bytes.len());
                        bytes.splice(to..to, copy);
                    }
                }
                if bytes.is_empty() {
                    break;
                }
            }
            let mut connection = peer(role);
            let _ = feed(&mut connection, &bytes);
            assert!(connection.streams() <= 3);
            assert!(connection.control.len() < 64 << 10);
        }
    }
}
