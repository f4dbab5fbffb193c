//! What the command and the server in one file both promise. Each body asks a running program for nothing that only one of
//! them has; what else the command promises in the same place, its own tests say.

use crate::common::*;
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

/// A reader that takes nothing is cut off, others do not notice, and when it comes back it gets all that it missed.
pub fn a_slow_reader_is_cut_off_and_comes_back_to_what_it_missed(process: &Process) {
    const EVENTS: usize = 300; // 18 MB: sockets hold less, and both programs keep more
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
    wait_for("the slow one to be cut off", || (process.descriptors() <= before + 1).then_some(()));
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

/// The last block that each of these streams gets when the program is told to stop. It ends with success.
pub fn stopping_ends_each_stream_with_a_retry(process: &mut Process, signal: &str, streams: Vec<Wire>) -> Vec<Seen> {
    let started = Instant::now();
    process.signal(signal);
    let status = process.child.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    let last_block = |mut wire: Wire| {
        let last = std::iter::from_fn(|| wire.block()).last().expect("a last block");
        assert!(last.data.is_none() && last.retry.is_some(), "{last:?}");
        last
    };
    streams.into_iter().map(last_block).collect()
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
