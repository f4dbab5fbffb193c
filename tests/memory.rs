//! Memory is what is kept, and little more, whoever has published it and in whatever order. Each publisher is a connection with
//! a thread of its own, and malloc gives up to eight threads for each core a memory of their own: what one of them left behind
//! there is of no use to the others.

use crate::common::*;
use std::net::SocketAddr;

/// As many as malloc has memories for on two cores.
const PUBLISHERS: usize = 16;
/// What is kept: little, so that a test takes seconds. Publishers in turn bring many times as much.
const KEPT: &str = "--keep-bytes=8MiB";
/// What one publisher brings in its turn, in bytes: nearly all that is kept.
const TURN: usize = 8_000_000;

/// A process, and connections to it that publish in turn and stay.
struct Publishers {
    process: Process,
    wires: Vec<Wire>,
}

impl Publishers {
    fn start(flags: &[&str]) -> Publishers {
        let process = Process::start(&[&["--idle-time", "10m", "--head-time", "10m"], flags].concat());
        let wires = (0..PUBLISHERS).map(|_| Wire::connect(process.addr)).collect();
        Publishers { process, wires }
    }

    fn addr(&self) -> SocketAddr {
        self.process.addr
    }

    /// `count` events of `bytes` each: large ones by `POST`, small ones as the lines of a `PUT`, which is faster.
    fn publish(&mut self, publisher: usize, topic: &str, bytes: usize, count: usize) {
        let (wire, text) = (&mut self.wires[publisher], "x".repeat(bytes));
        if bytes >= 5_000 {
            (0..count).for_each(|_| assert_eq!(wire.post(&format!("/events/{topic}"), &text).status, 200));
            return;
        }
        let head = format!(
            "PUT /events/{topic} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n",
            (bytes + 1) * count
        );
        wire.send((head + &format!("{text}\n").repeat(count)).as_bytes());
        assert_eq!(wire.answer().status, 200);
    }

    /// One and a half of what is kept, and 16 MB.
    fn assert_small(&self, what: &str) {
        let (kept, resident) = (metric(self.addr(), "kept_bytes") as usize, self.process.status("VmRSS") * 1024);
        println!("{what}: {kept} bytes are kept, {resident} resident");
        assert!(resident <= kept * 3 / 2 + 16_000_000, "{what}: {resident} bytes resident for {kept} kept");
    }
}

#[test]
fn large_events_of_publishers_in_turn_take_no_more_than_is_kept() {
    large_events_in_turn(&[KEPT]);
}

/// Half of what is kept is of the publisher whose turn it is, and a little of each of the others.
fn large_events_in_turn(flags: &[&str]) {
    let mut all = Publishers::start(&[flags, &["--keep-events", "60"]].concat());
    for publisher in 0..PUBLISHERS {
        all.publish(publisher, "big", 60_000, 100);
        all.publish(publisher, "pinned", 60_000, 3);
        all.assert_small(&format!("after {publisher}"));
    }
}

#[test]
fn large_and_small_events_in_any_order_take_no_more_than_is_kept() {
    let mut all = Publishers::start(&[KEPT]);
    for publisher in 0..PUBLISHERS {
        let small = format!("small-{publisher}");
        let mut order = [("big", 60_000, TURN / 60_000), (&small, 100, 1_000), ("pinned", 20_000, 2)];
        order.rotate_left(publisher % 3);
        order.into_iter().for_each(|(topic, bytes, count)| all.publish(publisher, topic, bytes, count));
        all.assert_small(&format!("after {publisher}"));
    }
}

#[test]
fn events_whose_sizes_change_take_no_more_than_is_kept() {
    let mut all = Publishers::start(&[KEPT, "--keep-events", "100000"]);
    for publisher in 0..PUBLISHERS {
        let bytes = [60_000, 200, 20_000, 1_000, 5_000][publisher % 5];
        all.publish(publisher, "turn", bytes, TURN / 2 / bytes);
        all.publish(publisher, "pinned", bytes, 3);
        all.assert_small(&format!("{bytes} bytes each"));
    }
}

/// What a topic has no room for any more by its count lies between events of others that stay.
#[test]
fn topics_whose_events_are_forgotten_by_count_give_their_memory_back() {
    let mut all = Publishers::start(&["--keep-events", "100", "--keep-bytes", "64MiB"]);
    let topic = |n: usize| format!("topic-{n}");
    for _ in 0..100 {
        (0..80).for_each(|n| all.publish(n % PUBLISHERS, &topic(n), 5_000, 1));
    }
    all.assert_small("full");
    (0..76).for_each(|n| all.publish(n % PUBLISHERS, &topic(n), 1, 100));
    all.assert_small("nearly all forgotten");
    (0..76).for_each(|n| all.publish(n % PUBLISHERS, &topic(n), 5_000, 100));
    all.assert_small("full again");
}

#[test]
fn with_a_journal_publishers_in_turn_take_no_more_than_is_kept() {
    let dir = Scratch::new();
    large_events_in_turn(&[KEPT, "--journal", &dir.path("events")]);
}

/// A few bytes of data each: what is known of an event is most of it.
#[test]
fn small_events_in_many_topics_take_no_more_than_is_kept() {
    let mut all = Publishers::start(&[KEPT]);
    for publisher in 0..PUBLISHERS {
        (0..50).for_each(|n| all.publish(publisher, &format!("topic-{publisher}-{n}"), 1, 1_000));
        all.publish(publisher, &format!("pinned-{publisher}"), 5_000, 3);
        all.assert_small(&format!("after {publisher}"));
    }
}
