//! Threads for those who must be waited for, and who goes first.

use crate::common::*;
use brooklet::Config;
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn a_live_subscriber_has_no_thread() {
    let process = Process::start(&["--log", "off"]);
    let mut crowd = Crowd::subscribe(process.addr, "/events/a", 1_000);
    post(process.addr, "/events/a", "0 to all");
    crowd.read_until(1);
    assert_eq!(metric(process.addr, "live"), 1_000);
    wait_for("threads to end", || (process.status("Threads") < 20).then_some(()));
    post(process.addr, "/events/a", "1 to all");
    crowd.read_until(2);
    assert!(process.status("Threads") < 20, "{} threads", process.status("Threads"));
}

/// Slow readers of one topic, far behind; and healthy ones of another.
#[test]
fn a_crowd_that_is_behind_keeps_nobody_out_and_each_of_it_catches_up() {
    let process = Process::start(&["--threads", "8", "--log", "off", "--stall-time", "1h"]);
    let addr = process.addr;
    let body = "x".repeat(2_000);
    let mut slow: Vec<Wire> = (0..40).map(|_| narrow(addr, 4_096, Some(1_448))).collect();
    slow.iter_mut().for_each(|wire| open(wire, "/events/slow"));
    wait_for_metric(addr, "subscribers", 40);
    let mut bystander = Bystander::new(addr);
    let mut healthy = Crowd::subscribe(addr, "/events/healthy", 20);
    (0..100).for_each(|_| drop(publish(addr, "/events/slow", &body)));
    wait_for("more to be behind than there are threads", || (metric(addr, "queued") >= 20).then_some(()));
    assert!(process.status("Threads") < 8 + 10, "{} threads", process.status("Threads"));
    for n in 0..10 {
        bystander.probe();
        publish(addr, "/events/healthy", &format!("{n} on time"));
        healthy.read_until(n + 1);
    }
    bystander.finish("behind");
    // A newcomer that takes what it gets need not stand in their line.
    let (mut newcomer, _) = Wire::subscribe(addr, "/events/new", "");
    publish(addr, "/events/new", "at once");
    assert_eq!(newcomer.event().unwrap().data(), "at once");
    assert!(metric(addr, "queued") > 0, "nobody waited any more: the test shows nothing");
    for wire in &mut slow {
        (0..100).for_each(|_| assert_eq!(wire.event().unwrap().data(), body));
    }
    wait_for_metric(addr, "live", 61);
}

#[test]
fn handlers_have_a_share_of_the_threads_and_whoever_finds_none_is_told_when_to_come_back() {
    let process = Process::start(&["--threads", "8", "--log", "off"]);
    let mut streams: Vec<Wire> = (0..2).map(|_| Wire::stream(process.addr, "/test", "")).collect();
    streams.iter_mut().for_each(|stream| assert_eq!(stream.event().unwrap().data(), "0"));
    for _ in 0..3 {
        let rest = String::from_utf8(Wire::stream(process.addr, "/test", "").rest()).unwrap();
        assert!(rest.starts_with(": no thread for another stream of a handler\nretry: "), "{rest:?}");
    }
    let (mut wire, _) = Wire::subscribe(process.addr, "/events/a", "");
    publish(process.addr, "/events/a", "topics have their own share");
    assert_eq!(wire.event().unwrap().data(), "topics have their own share");
    drop(streams);
    wait_for("a thread for a handler", || {
        Wire::stream(process.addr, "/test", "").event().filter(|event| event.event.is_some())
    });
}

#[test]
fn a_crowd_of_slow_heads_makes_room_for_those_that_wait_for_a_thread() {
    // Were there no room made for it, the first would be answered after the longest that anything is waited for here.
    let process = Process::start(&["--threads", "8", "--log", "off", "--head-time", "1h"]);
    let crowd: Vec<Wire> = (0..60)
        .map(|_| {
            let mut wire = Wire::connect(process.addr);
            wire.send(b"GET /hea");
            wire
        })
        .collect();
    (0..5).for_each(|_| assert_eq!(get(process.addr, "/health").status, 200));
    drop(crowd);
}

#[test]
fn who_ends_only_its_sending_side_keeps_its_stream() {
    let server = serve(Config::default().with(|config| config.heartbeat = Duration::from_secs(4)));
    let addr = server.addr().unwrap();
    let (mut half, _) = Wire::subscribe(addr, "/events/a", "");
    let (whole, _) = Wire::subscribe(addr, "/events/a", "");
    half.socket.shutdown(Shutdown::Write).unwrap();
    drop(whole);
    // Where the closed one is noticed, the other one was looked at, too.
    wait_for_metric(addr, "subscribers", 1);
    for n in 0..3 {
        publish(addr, "/events/a", &n.to_string());
        assert_eq!(half.event().unwrap().data(), n.to_string());
        thread::sleep(Duration::from_secs(2)); // longer than a sweep
    }
    assert!(half.take_until(b":\n").is_some(), "heartbeats go on");
    drop(half);
    wait_for_metric(addr, "subscribers", 0);
}

#[test]
fn a_lifetime_ends_in_time_also_where_the_reader_takes_nothing() {
    // Without the bound it would be the stall time.
    let process = Process::start(&["--lifetime", "4s", "--stall-time", "1h"]);
    let mut stuck = narrow(process.addr, 4_096, Some(1_448));
    open(&mut stuck, "/events/a");
    wait_for_metric(process.addr, "subscribers", 1);
    let body = "x".repeat(60_000);
    (0..60).for_each(|_| drop(publish(process.addr, "/events/a", &body)));
    wait_for_metric(process.addr, "subscribers", 0);
    let line = process.wait_for_log("closed peer=");
    assert!(line.contains("reason=\"the time is over, in the middle of a write\""), "{line}");
}

#[test]
fn a_crowd_that_comes_at_once_is_served_with_few_threads_and_nobody_is_closed_for_it() {
    let process = Process::start(&["--threads", "16", "--log", "off"]);
    publish(process.addr, "/events/a", "kept");
    let mut crowd: Vec<Wire> = (0..600)
        .map(|_| {
            let mut wire = Wire::connect(process.addr);
            wire.send(b"GET /events/a?since=earliest HTTP/1.1\r\nHost: localhost\r\n\r\n");
            wire
        })
        .collect();
    for wire in &mut crowd {
        assert!(wire.head().starts_with("HTTP/1.1 200 "));
        assert_eq!(wire.event().unwrap().data(), "kept");
    }
    assert_eq!(metric(process.addr, "evicted_total"), 0);
}

/// Eight readers share three threads, and each of them takes something all the time: of 80 kB a second, what is due by
/// then, so that one which is late catches up. The kernel makes room for a writer only in pieces of some 64 kB, so a stall
/// time must be longer than reading one takes. Without chunks, since a whole one would be read at once.
#[test]
fn slow_readers_that_take_something_in_their_turns_are_not_closed_for_stalling() {
    let process = Process::start(&["--threads", "4", "--stall-time", "5s", "--body-bytes", "1MiB", "--log", "off"]);
    let addr = process.addr;
    let body = "x".repeat(1_000_000);
    (0..4).for_each(|_| drop(publish(addr, "/events/a", &body)));
    let mut slow: Vec<Wire> = (0..8).map(|_| narrow(addr, 4_096, Some(1_448))).collect();
    for wire in &mut slow {
        wire.send(b"GET /events/a?since=earliest HTTP/1.0\r\nHost: localhost\r\n\r\n");
        assert!(wire.head().starts_with("HTTP/1.1 200 "));
    }
    wait_for("some to wait for a thread", || (metric(addr, "queued") > 0).then_some(()));
    let began = Instant::now();
    let time = Duration::from_secs(20); // of which each has a thread for more than the stall time
    thread::scope(|all| {
        for wire in &mut slow {
            all.spawn(move || {
                let mut taken = 0;
                while began.elapsed() < time {
                    let due = began.elapsed().as_millis() as usize * 80;
                    wire.take(due - taken);
                    taken = due;
                    thread::sleep(Duration::from_millis(50)); // so that nobody is at the end before the time is
                }
            });
        }
    });
    assert_eq!(metric(addr, "subscribers"), 8);
    assert!(metric(addr, "queued") > 0, "nobody waited any more: the test shows nothing");
}
