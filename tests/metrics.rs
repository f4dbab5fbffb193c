//! What is counted: everything that is written to a subscriber, and everyone who was turned away.

use crate::common::*;
use brooklet::{Config, Event};

#[test]
fn events_larger_than_a_socket_and_those_of_handlers_count_as_delivered() {
    let server = bind(Config::default().with(|config| config.body_bytes = 4 << 20)).unwrap();
    server
        .stream("/two", |stream| {
            stream.send(&Event::new("one"))?;
            stream.comment("is no event")?;
            stream.send(&Event::new("two"))
        })
        .unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    let mut reader = Crowd::subscribe(addr, "/events/a", 1);
    for n in 0..8 {
        server.hub().publish("a", numbered(n, 1 << 20)).unwrap();
    }
    reader.read_until(8);
    wait_for_metric(addr, "delivered_total", 8);
    Wire::stream(addr, "/two", "").rest();
    wait_for_metric(addr, "delivered_total", 10);
}

#[test]
fn a_refusal_to_publish_is_counted_and_logged() {
    let process = Process::start(&["--publish-token", "secret"]);
    assert_eq!(post(process.addr, "/events/a", "hello").status, 401);
    assert_eq!(Wire::ask(process.addr, "PUT /events/a?key=k HTTP/1.1\r\nHost: localhost\r\n\r\n").status, 401);
    assert_eq!(metric(process.addr, "refused_total"), 2);
    assert_eq!(metric(process.addr, "published_total"), 0);
    process.wait_for_log("could not publish: 401 publishing needs a token");
}

#[test]
fn who_makes_room_for_another_is_counted_and_logged() {
    let process = Process::start(&["--connections", "3", "--subscribers", "1"]);
    let idle: Vec<_> = (0..12).map(|_| Wire::connect(process.addr)).collect();
    let evicted = wait_for("evictions", || Some(metric(process.addr, "evicted_total")).filter(|count| *count > 0));
    assert!(evicted <= 12, "{evicted}");
    process.wait_for_log("was closed: it made room for another");
    drop(idle);
}

#[test]
fn readers_that_stall_while_the_server_stops_are_logged_as_stopped_and_not_as_their_own_fault() {
    let process = Process::start(&["--stall-time", "60s", "--body-bytes", "4MiB"]);
    let mut readers: Vec<_> = (0..5).map(|_| narrow(process.addr, 4096, None)).collect();
    for wire in &mut readers {
        open(wire, "/events/a");
        wire.block().unwrap();
    }
    wait_for_metric(process.addr, "subscribers", 5);
    publish(process.addr, "/events/a", &"x".repeat(4 << 20)); // more than a socket holds
    let log = process.finish();
    let closed: Vec<_> = log.lines().filter(|line| line.contains(" closed peer=")).collect();
    assert_eq!(closed.len(), 5, "{log}");
    assert!(closed.iter().all(|line| line.contains("reason=\"the server is stopping\"")), "{log}");
}
