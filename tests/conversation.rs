//! One connection's requests, one after another.

use crate::common::*;
use brooklet::Config;
use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let server = serve_default();
    let mut wire = Wire::connect(server.addr().unwrap());
    let post = "POST /events/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n";
    let missing = "GET /missing HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let options = "OPTIONS /events/a HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let last = "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive, Close\r\n\r\n";
    wire.send(format!("{HEALTH}\r\n{post}{missing}{options}{last}{HEALTH}").as_bytes());
    let statuses: Vec<u16> = (0..5).map(|_| wire.answer().status).collect();
    assert_eq!(statuses, [200, 200, 404, 204, 200]);
    assert!(wire.rest().is_empty(), "nothing after Connection: close");
}

#[test]
fn a_stream_may_follow_other_requests_on_its_connection() {
    let server = serve_default();
    let mut wire = Wire::connect(server.addr().unwrap());
    wire.send(format!("{HEALTH}GET /events/a HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes());
    assert_eq!(wire.answer().body, "ok\n");
    assert!(wire.head().contains("text/event-stream"));
    assert!(wire.block().is_some());
    wire_arrives(&server, &mut wire);
}

#[test]
fn http_1_0_is_answered_and_closed() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let mut wire = Wire::connect(addr);
    wire.send(b"GET /health HTTP/1.0\r\n\r\n");
    let answer = wire.answer();
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    assert!(wire.rest().is_empty());
    let mut wire = Wire::connect(addr);
    wire.send(b"GET /events/a HTTP/1.0\r\n\r\n");
    assert!(wire.head().contains("text/event-stream"));
    assert!(wire.block().is_some());
    wire_arrives(&server, &mut wire);
}

#[test]
fn silent_and_idle_connections_are_closed_without_a_word() {
    let server = serve(short_times());
    let addr = server.addr().unwrap();
    assert!(Wire::connect(addr).rest().is_empty());
    let mut wire = Wire::connect(addr);
    wire.send(HEALTH.as_bytes());
    assert_eq!(wire.answer().status, 200);
    assert!(wire.rest().is_empty());
    wait_for_metric(addr, "connections", 1);
}

#[test]
fn who_asks_just_when_the_idle_time_ends_is_answered() {
    let server = serve(Config::default().with(|config| config.idle_time = Duration::from_secs(1)));
    let addr = server.addr().unwrap();
    let ask_once = |n: u64| {
        let (asked, mut wire) = (Instant::now(), Wire::connect(addr));
        wire.send(HEALTH.as_bytes());
        let first = wire.answer();
        assert_eq!(first.header("Keep-Alive"), Some("timeout=1"));
        thread::sleep(Duration::from_millis(980 + n)); // from just before its end to just after
        wire.socket.write_all(HEALTH.as_bytes()).ok().filter(|()| asked.elapsed() < Duration::from_secs(2))?;
        Some(wire.answer().status)
    };
    // The server waits a second longer than it says; a busy machine may miss even that, and tries again.
    let ask = |n| assert_eq!(wait_for("a request in time", || ask_once(n)), 200);
    thread::scope(|all| (0..40).for_each(|n| drop(all.spawn(move || ask(n)))));
}
