//! `PUT` of an event stream: another server's events, published here.

use crate::common::*;
use brooklet::{Config, Handle};
use std::net::SocketAddr;
use std::time::Duration;

/// As public streams of changes are: comments, a reconnection time, types, ids that are JSON, data of several lines, ends of
/// lines of each kind. The last event is not whole.
const RECORDED: &str = "\u{feff}:ok\r\nretry: 5000\r\n\r\n\
    event: message\r\nid: [{\"topic\":\"eqiad.recentchange\",\"partition\":0,\"timestamp\":1700000000123},{\"topic\":\"codfw.recentchange\",\"partition\":0,\"offset\":-1}]\r\ndata: {\"title\":\"Zürich\",\"bot\":false}\r\n\r\n\
    : keep-alive\r\n\r\n\
    id: 1700000000123-1\ndata: {\ndata:   \"lines\": 3\ndata: }\n\n\
    event: add\rid: 7\rdata\r\r\
    id: 1700000000123-2\nevent: remove\ndata:73857293\nretry: 1\n\n\
    id: cursor-only\n\n\
    data: nobody's id\nevent: none\nid\n\n\
    event: gap\ndata: {\"after\":\"1-0\",\"oldest\":null}\nid: 1-0\n\n\
    data: not whole\n";

/// What must come of it: types and data.
const EXPECTED: [(Option<&str>, &str); 6] = [
    (Some("message"), "{\"title\":\"Zürich\",\"bot\":false}"),
    (None, "{\n  \"lines\": 3\n}"),
    (Some("add"), ""),
    (Some("remove"), "73857293"),
    (Some("none"), "nobody's id"),
    (Some("relayed-gap"), "{\"after\":\"1-0\",\"oldest\":null}"),
];

fn begin(addr: SocketAddr, length: usize) -> Wire {
    let mut wire = Wire::connect(addr);
    let fields = format!("Content-Type: Text/Event-Stream; charset=utf-8\r\nContent-Length: {length}\r\n");
    wire.send(format!("PUT /events/a HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n").as_bytes());
    wire
}

fn relay(addr: SocketAddr, bytes: &[u8]) -> Answer {
    let mut wire = begin(addr, bytes.len());
    wire.send(bytes);
    wire.answer()
}

fn seen(server: &Handle) -> Vec<(Option<String>, String)> {
    let mut stream = Wire::stream(server.addr().unwrap(), "/events/a?since=earliest&poll=1ms", "");
    let events: Vec<_> = std::iter::from_fn(|| stream.event()).collect();
    stream.reset();
    events.into_iter().map(|event| (event.event.clone(), event.data().to_string())).collect()
}

fn expected(events: &[(Option<&str>, &str)]) -> Vec<(Option<String>, String)> {
    events.iter().map(|(name, data)| (name.map(String::from), data.to_string())).collect()
}

#[test]
fn the_events_of_a_recorded_stream_are_published_with_their_types_and_data() {
    let server = serve_default();
    let answer = relay(server.addr().unwrap(), RECORDED.as_bytes());
    assert_eq!(answer.status, 200);
    assert!(answer.body.starts_with("published 6, last id "), "{answer:?}");
    assert_eq!(seen(&server), expected(&EXPECTED));
}

#[test]
fn a_relay_that_is_cut_anywhere_and_starts_again_publishes_nothing_twice() {
    // Without an id there is nothing to know an event by: it would come again, and is left out here.
    let (before, rest) = RECORDED.split_once("data: nobody's id").unwrap();
    let stream = [before, rest.split_once("\n\n").unwrap().1].concat();
    let all: Vec<_> = expected(&EXPECTED).into_iter().filter(|(_, data)| data != "nobody's id").collect();
    let dir = Scratch::new();
    for cut in (0..stream.len()).filter(|cut| cut % 3 == 0) {
        let path = dir.path(&cut.to_string());
        let config = if cut % 2 == 0 { Config::default() } else { with_journal(&path) };
        let mut server = serve(config.clone());
        let mut wire = begin(server.addr().unwrap(), stream.len());
        wire.send(&stream.as_bytes()[..cut]);
        wire.socket.shutdown(std::net::Shutdown::Write).unwrap(); // in the middle of the body
        assert_eq!(wire.answer().status, 400);
        if cut % 2 == 1 {
            drop(server);
            server = serve(config); // keys survive
        }
        assert_eq!(relay(server.addr().unwrap(), stream.as_bytes()).status, 200);
        assert_eq!(seen(&server), all, "cut after {cut} bytes");
    }
}

#[test]
fn another_brooklet_is_relayed_as_it_goes_on_and_from_its_beginning_again() {
    let source = serve_default();
    let target = serve_default();
    let (from, to) = (source.addr().unwrap(), target.addr().unwrap());
    let (mut reader, _) = Wire::subscribe(to, "/events/a", "");
    for round in 0..3 {
        // Each time from the beginning, so that all of the earlier rounds comes again.
        let mut stream = Wire::stream(from, "/events/b?since=earliest", "");
        let mut wire = Wire::connect(to);
        let fields = "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n";
        wire.send(format!("PUT /events/a HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n").as_bytes());
        for n in 0..5 {
            publish(from, &format!("/events/b?event=type-{n}"), &format!("{round}\n{n}"));
        }
        for _ in 0..5 * (round + 1) + 1 {
            let block = stream.take_until(b"\n\n").unwrap();
            wire.send(&[format!("{:x}\r\n", block.len()).as_bytes(), &block, b"\r\n"].concat());
        }
        for n in 0..5 {
            let event = reader.event().unwrap(); // before the PUT has ended
            assert_eq!(
                (event.data(), event.event.as_deref()),
                (&*format!("{round}\n{n}"), Some(&*format!("type-{n}")))
            );
        }
        wire.close();
    }
}

#[test]
fn the_largest_event_of_one_brooklet_is_relayed_to_another_with_the_same_limits() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let data = "x".repeat(Config::default().body_bytes);
    publish(addr, "/events/source", &data);
    let event = Wire::stream(addr, "/events/source?since=earliest&poll", "").rest();
    let answer = relay(addr, &event);
    assert!(answer.body.starts_with("published 1, last id "), "{answer:?}");
    assert_eq!(seen(&server), [(None, data)]);
}

#[test]
fn what_cannot_be_published_of_a_stream_is_said_after_what_came_before_it() {
    let server = serve(Config::default().with(|config| {
        config.line_bytes = 100;
        config.body_bytes = 100;
    }));
    let addr = server.addr().unwrap();
    for (status, text, said) in [
        (413, format!("data: {}", "x".repeat(101)), "a line of event 2 is longer than 106 bytes (line_bytes)"),
        (413, "data: 12345678901234567890\n".repeat(5), "the data of event 2 is longer than 100 bytes (line_bytes)"),
        (400, "event: a\0b\ndata: x\n\n".into(), "the event name \"a\\0b\" holds CR, LF or NUL"),
    ] {
        let answer = relay(addr, format!("data: first\n\n{text}\n\n").as_bytes());
        assert_eq!((answer.status, answer.header("connection")), (status, Some("close")), "{answer:?}");
        assert!(answer.body.contains(said) && answer.body.contains("; published 1, last id "), "{answer:?}");
    }
    let server = serve_default();
    let long = format!("id: {}\ndata: x\n\n", "i".repeat(1_025));
    let answer = relay(server.addr().unwrap(), long.as_bytes());
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (400, "a key of 1025 bytes, where 1 to 1024 are taken; published 0\n")
    );
    let query = "PUT /events/a?event=x HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/event-stream\r\n\r\n";
    let answer = Wire::ask(server.addr().unwrap(), query);
    assert_eq!((answer.status, answer.body.contains("the parameter \"event\" is not known")), (400, true));
}

#[test]
fn an_event_once_begun_must_end_in_time_and_between_events_silence_may_last() {
    let short = Duration::from_millis(300);
    let server = serve(Config::default().with(|config| config.body_time = short));
    let mut wire = begin(server.addr().unwrap(), 100);
    wire.send(b"data: one\n\n: comment\n");
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), "/events/a?since=earliest", "");
    assert_eq!(stream.event().unwrap().data(), "one");
    std::thread::sleep(2 * short); // what is shown is that nothing happens
    wire.send(b"data: two\n\ndata: three\n");
    assert_eq!(stream.event().unwrap().data(), "two");
    let answer = wire.answer();
    assert_eq!(answer.status, 408, "{answer:?}");
    assert!(answer.body.contains("; published 2, last id "), "{answer:?}");
    let server = serve(Config::default().with(|config| config.put_idle_time = short));
    let mut wire = begin(server.addr().unwrap(), 100);
    wire.send(b"data: one\n\n");
    let answer = wire.answer();
    assert!(answer.status == 408 && answer.body.starts_with("nothing came within 300ms (put_idle_time)"), "{answer:?}");
}

#[test]
fn a_body_of_another_type_is_lines_whatever_stands_in_them() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    for content_type in ["", "Content-Type: text/plain\r\n", "Content-Type: application/text/event-stream\r\n"] {
        let request =
            format!("PUT /events/a HTTP/1.1\r\nHost: localhost\r\n{content_type}Content-Length: 9\r\n\r\ndata: x\n\n");
        assert!(Wire::ask(addr, &request).body.starts_with("published 2, "), "{content_type}");
    }
    assert_eq!(seen(&server)[..2], expected(&[(None, "data: x"), (None, "")]));
}
