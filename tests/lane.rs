//! Writing to whoever is live, and the hand-over between a connection and its lane, by force.

use crate::{both, common::*};
use brooklet::{Config, Event};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

#[test]
fn a_thousand_subscribers_see_every_event_once_and_in_order() {
    let server = serve_default();
    let mut crowd = Crowd::subscribe(server.addr().unwrap(), "/events/a", 1_000);
    let hub = server.hub();
    let publisher = thread::spawn(move || {
        for n in 0..200 {
            hub.publish("a", numbered(n, 100)).unwrap();
            thread::sleep(Duration::from_millis(if n % 20 == 0 { 20 } else { 0 }));
        }
    });
    crowd.read_until(200);
    publisher.join().unwrap();
}

#[test]
fn turning_live_while_others_publish_neither_loses_nor_repeats() {
    let server = serve(Config::default().with(|config| {
        config.keep_events = 100_000;
        config.lanes = 3;
    }));
    let addr = server.addr().unwrap();
    let (_, base) = Wire::subscribe(addr, "/events/a", "");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let hub = server.hub();
            let mut n = 0;
            while !stop.load(SeqCst) {
                hub.publish("a", numbered(n, 0)).unwrap();
                n += 1;
                thread::sleep(Duration::from_micros(if n % 64 == 0 { 500 } else { 0 }));
            }
        });
        let readers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut cursor = base;
                    let mut next: u64 = 0;
                    for _ in 0..150 {
                        let fields = format!("Last-Event-ID: {cursor}\r\n");
                        let (mut wire, _) = Wire::subscribe(addr, "/events/a", &fields);
                        for _ in 0..40 {
                            let event = wire.event().unwrap();
                            assert_eq!(event.data().trim_end(), next.to_string());
                            (cursor, next) = (event.id(), next + 1);
                        }
                    }
                })
            })
            .collect();
        let results: Vec<_> = readers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        stop.store(true, SeqCst);
        assert!(results.iter().all(Result::is_ok));
    });
}

#[test]
fn subscribers_behind_a_real_links_segments_stay_live() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let subscribe = |_| {
        let mut wire = narrow(addr, 65_536, Some(1_448));
        open(&mut wire, "/events/a");
        wire.block().unwrap();
        wire.socket.set_nonblocking(true).unwrap();
        (wire, 0)
    };
    let mut crowd = Crowd { members: (0..50).map(subscribe).collect() };
    wait_for_metric(addr, "live", 50);
    for n in 0..100 {
        server.hub().publish("a", numbered(n, 1_000)).unwrap();
        if n % 5 == 4 {
            crowd.read_until(n + 1); // no more at once than a link takes
        }
    }
    assert_eq!(metric(addr, "woken_total"), 0, "no thread is woken for a delivery");
}

#[test]
fn a_closed_subscriber_is_noticed_without_an_event() {
    let server = bind(Config::default()).unwrap();
    server.stream("/slow", |stream| stream.sleep(Duration::from_secs(3_600))).unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    for target in ["/events/a", "/slow"] {
        let wire = Wire::stream(addr, target, "");
        wait_for_metric(addr, "subscribers", 1);
        wire.close();
        wait_for_metric(addr, "subscribers", 0);
    }
}

#[test]
fn the_end_of_a_stream_that_its_reader_closed_is_logged_with_the_reason() {
    let process = Process::start(&[]);
    for target in ["/events/a", "/test"] {
        both::a_closed_stream_is_noticed(&process, target, || {});
        let line = process.wait_for_log(&format!("path={target:?}"));
        assert!(line.contains("reason=\"the peer closed the connection\""), "{line}");
    }
    process.finish();
}

#[test]
fn stray_bytes_on_a_stream_are_thrown_away_up_to_a_limit() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
    stream.send(HEALTH.as_bytes());
    wire_arrives(&server, &mut stream);
    stream.send(&[b'x'; 16 * 1024]);
    wait_for_metric(addr, "subscribers", 0);
}

#[test]
fn a_heartbeat_is_one_line_and_comes_only_after_silence() {
    let server = serve(Config::default().with(|config| config.heartbeat = Duration::from_millis(3_500)));
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), "/events/a", "");
    let silence = stream.take_until(b":\n:\n").expect("two heartbeats");
    assert_eq!(silence, b":\n:\n");
    server.hub().publish("a", Event::new("after")).unwrap();
    assert_eq!(stream.event().unwrap().data(), "after");
}
