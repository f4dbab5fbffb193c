//! What the command and the server in one file both promise. Each body asks a running program for nothing that only one of
//! them has; what else the command promises in the same place, its own tests say.

use crate::common::*;
use brooklet::Id;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

/// Returns what the log says of its end.
pub fn the_articles_stream_has_exactly_these_bytes(process: &Process) -> String {
    let before = now_ms();
    let mut stream = Wire::stream(process.addr, "/test", "");
    let mut last_id = 0;
    for count in 0..7 {
        let frame = String::from_utf8(stream.take_until(b"\n\n").unwrap()).unwrap();
        let id: u64 = frame.split("id: ").nth(1).and_then(|rest| rest.lines().next()?.parse().ok()).unwrap();
        let name = if count == 5 { "pause" } else { "test" };
        assert_eq!(frame, format!("event: {name}\nid: {id}\ndata: {count}\nretry: 10000\n\n"));
        assert!(id > before && id > last_id && id <= now_ms());
        last_id = id;
    }
    assert!(last_id >= before + 6_900, "once a second, not faster");
    stream.close();
    process.wait_for_log("closed")
}

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

pub fn each_stream_has_its_own_timer(process: &Process) {
    let mut first = Wire::stream(process.addr, "/test", "");
    assert_eq!(first.event().unwrap().data(), "0");
    let mut second = Wire::stream(process.addr, "/test", "");
    assert_eq!(second.event().unwrap().data(), "0");
    first.close();
    assert_eq!(second.event().unwrap().data(), "1");
}

/// `publish` publishes to the topic `a`, and returns the id. No more than 500 events are kept for who was cut off.
pub fn who_is_cut_off_200_times_sees_every_event_once_and_in_order(
    addr: SocketAddr,
    publish: impl Fn(&str) -> String + Sync,
) {
    let (mut cursor, mut random, mut cuts) = (publish("begin"), Random(7), 0);
    let seen = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..2_000 {
                wait_for("the reader to come near", || (n < seen.load(SeqCst) + 500).then_some(()));
                publish(&format!("{n} {}", "x".repeat(50)));
                thread::sleep(Duration::from_micros(200)); // so that it is now live and now behind
            }
        });
        while seen.load(SeqCst) < 2_000 {
            let mut wire = Wire::stream(addr, "/events/a", &format!("Last-Event-ID: {cursor}\r\n"));
            for n in (seen.load(SeqCst)..2_000).take(random.below(18)) {
                let event = wire.event().unwrap();
                assert_eq!(event.data().split(' ').next().unwrap(), n.to_string());
                cursor = event.id.unwrap(); // as it came, for it is the server's own
                seen.store(n + 1, SeqCst);
            }
            drop(wire); // with unread bytes: a reset
            cuts += 1;
        }
    });
    assert!(cuts >= 200, "{cuts}");
}

/// Four publish at the same time, none of them more than 400 events ahead of the reader; who was told which id for what is
/// what the reader must have seen.
pub fn events_of_several_publishers_come_once_and_in_order_however_the_stream_is_cut(addr: SocketAddr) {
    const EACH: usize = 500;
    let mut cursor = publish(addr, "/events/a", "begin");
    let seen = AtomicUsize::new(0);
    let publish_all = |publisher: usize| {
        let publish = |n: usize| {
            wait_for("the reader to come near", || (4 * n < seen.load(SeqCst) + 400).then_some(()));
            let data = format!("{publisher} {n}");
            (publish(addr, "/events/a", &data).parse().unwrap(), data)
        };
        (0..EACH).map(publish).collect::<Vec<(Id, String)>>()
    };
    let (got, mut published) = thread::scope(|scope| {
        let publish_all = &publish_all;
        let publishers: Vec<_> = (0..4).map(|publisher| scope.spawn(move || publish_all(publisher))).collect();
        let (mut random, mut got) = (Random(17), Vec::new());
        while got.len() < 4 * EACH {
            let mut wire = Wire::stream(addr, "/events/a", &format!("Last-Event-ID: {cursor}\r\n"));
            for _ in 0..random.below(30).min(4 * EACH - got.len()) {
                let event = wire.event().unwrap();
                got.push((event.id(), event.data().to_string()));
                cursor = event.id.unwrap();
                seen.store(got.len(), SeqCst);
            }
        }
        let published: Vec<_> = publishers.into_iter().flat_map(|publisher| publisher.join().unwrap()).collect();
        (got, published)
    });
    published.sort();
    assert!(got == published, "once, and in the order of the ids");
}

/// A reader that takes nothing is cut off, others do not notice, and when it comes back it gets all that it missed.
pub fn a_slow_reader_is_cut_off_and_comes_back_to_what_it_missed(process: &Process) {
    const EVENTS: usize = 250; // 15 MB: sockets hold less, and both programs keep more
    let (addr, before) = (process.addr, process.at_rest().1);
    let begin = publish(addr, "/events/a", "begin");
    let from_the_beginning = format!("Last-Event-ID: {begin}\r\n");
    let mut fast = Wire::stream(addr, "/events/a", &from_the_beginning);
    let mut slow = narrow(addr, 4_096, None);
    slow.send(format!("GET /events/a HTTP/1.1\r\nHost: localhost\r\n{from_the_beginning}\r\n").as_bytes());
    let number = |seen: &Seen| seen.data().split(' ').next().unwrap().parse::<usize>().unwrap();
    for n in 0..EVENTS {
        publish(addr, "/events/a", &format!("{n} {}", "x".repeat(60_000)));
        assert_eq!(number(&fast.event().expect("the fast one's stream")), n);
    }
    // A write that times out in its middle counts as taken, so it may be a second or third one that ends the stream.
    wait_longer_for("the slow one to be cut off", || (process.descriptors() <= before + 1).then_some(()));
    assert!(slow.head().starts_with("HTTP/1.1 200 OK\r\n"));
    let (mut next, mut cursor) = (0, begin);
    while let Some(seen) = slow.event() {
        assert_eq!(number(&seen), next);
        (next, cursor) = (next + 1, seen.id.unwrap());
    }
    assert!(next < EVENTS, "it had everything: this shows nothing");
    let mut back = Wire::stream(addr, "/events/a", &format!("Last-Event-ID: {cursor}\r\n"));
    for n in next..EVENTS {
        assert_eq!(number(&back.event().expect("what was missed")), n);
    }
}

/// Nothing of a stream stays once its reader has closed it, and the log says so. `meanwhile` may give the server what it
/// needs to notice.
pub fn a_closed_stream_is_noticed(process: &Process, target: &str, meanwhile: impl Fn()) -> String {
    let before = process.at_rest().1;
    let stream = Wire::stream(process.addr, target, "");
    assert!(process.descriptors() > before, "it is open");
    stream.close();
    wait_for("the stream to be closed", || {
        meanwhile();
        (process.descriptors() <= before).then_some(())
    });
    process.wait_for_log("closed")
}

/// Nothing stays of 200 streams whose readers have gone. A first write to one brings back a reset, and the second one fails.
pub fn closed_streams_leave_no_timer_no_thread_and_no_descriptor(process: &Process) {
    assert_eq!(get(process.addr, "/").status, 200);
    let before = process.at_rest();
    let streams: Vec<_> = (0..200).map(|n| Wire::stream(process.addr, ["/events/a", "/test"][n % 2], "")).collect();
    assert!(process.descriptors() >= before.1 + 200, "they are open");
    drop(streams);
    for _ in 0..2 {
        publish(process.addr, "/events/a", "x");
    }
    process.wait_until_at_most(before);
}

/// The reconnection time that each of these streams gets as its last when the program is told to stop, which ends with
/// success. For all that streams take to end it has 700 ms, in which a busy machine may not come to each of many; those that
/// are left are cut, and then this is `None`. Another try with fewer is to be made.
pub fn stopping_ends_each_stream_with_a_retry(
    process: &mut Process,
    signal: &str,
    streams: Vec<Wire>,
) -> Option<Vec<u64>> {
    let started = Instant::now();
    process.signal(signal);
    let status = wait_for("it to end", || process.child.try_wait().unwrap());
    let was_in_time = started.elapsed() < Duration::from_millis(700);
    assert!(status.success(), "{status}");
    let last_retry = |mut wire: Wire| {
        let last = std::iter::from_fn(|| wire.block()).last()?;
        let is_farewell = last.data.is_none() && last.comments == ["the server is stopping"];
        assert!(is_farewell || !was_in_time, "{last:?}");
        last.retry.filter(|_| is_farewell)
    };
    let retries: Option<Vec<u64>> = streams.into_iter().map(last_retry).collect();
    assert!(retries.is_some() || !was_in_time, "a stream got no reconnection time");
    retries
}

/// Each request, with the status of its answer and a part of the one line that says why. After each of them, which it
/// is given, `works` asks for something on a connection of its own.
pub fn each_bad_request_gets_its_answer(addr: SocketAddr, table: &[(u16, &str, String)], works: impl Fn(&str)) {
    for (status, said, request) in table {
        let mut wire = Wire::connect(addr);
        wire.send(request.as_bytes());
        let answer = wire.answer();
        let shown = &request[..request.len().min(120)];
        assert_eq!(answer.status, *status, "{shown:?}: {}", answer.body);
        assert!(answer.body.contains(said), "{shown:?} got {:?}, which does not say {said:?}", answer.body);
        assert!(answer.body.ends_with('\n') && answer.body.matches('\n').count() == 1, "one line: {:?}", answer.body);
        assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
        assert_eq!(answer.header("allow").is_some(), *status == 405, "{shown:?}");
        works(shown);
    }
}

/// `first` has ended before `second` began.
pub fn a_restart_is_a_gap_that_is_told_once(first: Process, start: impl Fn() -> Process) {
    let cursor = publish(first.addr, "/events/a", "lost");
    first.finish();
    let second = start();
    let mut stream = Wire::stream(second.addr, "/events/a", &format!("Last-Event-ID: {cursor}\r\n"));
    let gap = stream.event().unwrap();
    assert!(gap.is_gap(), "{gap:?}");
    publish(second.addr, "/events/a", "new");
    assert_eq!(stream.event().unwrap().data(), "new");
    let resumed = format!("Last-Event-ID: {}\r\n", gap.id.unwrap());
    assert_eq!(Wire::stream(second.addr, "/events/a", &resumed).event().unwrap().data(), "new");
    second.finish();
}

pub fn every_kind_of_line_end_in_the_data_begins_a_new_line_and_nul_may_stand_in_it(addr: SocketAddr) {
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
    for (body, data) in [
        ("a\nb\r\nc\rd", "a\nb\nc\nd"),
        ("\n", "\n"),
        ("", ""),
        ("\r", "\n"),
        ("\r\n\r\n", "\n\n"),
        (" leading", " leading"),
        ("\u{feff}bom", "\u{feff}bom"),
        ("nul\0nul", "nul\0nul"),
        ("{\n  \"k\": 1\n}", "{\n  \"k\": 1\n}"),
        ("id: 5\n\nevent: x", "id: 5\n\nevent: x"),
    ] {
        assert_eq!(post(addr, "/events/a", body).status, 200, "{body:?}");
        let seen = stream.event().unwrap();
        assert_eq!((seen.data(), &seen.event), (data, &None), "{body:?}");
    }
}

/// Returns the head.
pub fn the_head_of_a_stream_keeps_proxies_from_holding_it_back(addr: SocketAddr) -> String {
    let mut wire = Wire::connect(addr);
    wire.send(b"GET /events/a HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let head = wire.head();
    for (name, value) in [
        ("content-type", "text/event-stream"),
        ("cache-control", "no-store, no-transform"),
        ("x-accel-buffering", "no"),
        ("connection", "close"),
    ] {
        assert_eq!(header(&head, name), Some(value), "{name}");
    }
    assert!(header(&head, "content-length").is_none(), "{head}");
    head
}
