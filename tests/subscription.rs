//! A stream of topics: where it begins, what it resumes, and what becomes of it while it is behind.

use crate::{both, common::*};
use brooklet::{Config, Event, Hub, Id};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

#[test]
fn a_subscriber_that_is_cut_off_200_times_sees_every_event_once_and_in_order() {
    let server = serve(Config::default().with(|config| config.keep_events = 2_000));
    let hub = server.hub();
    both::who_is_cut_off_200_times_sees_every_event_once_and_in_order(server.addr().unwrap(), |data| {
        hub.publish("a", Event::new(data)).unwrap().to_string()
    });
}

#[test]
fn events_of_several_publishers_come_once_and_in_order_however_the_stream_is_cut() {
    let server = serve_default();
    both::events_of_several_publishers_come_once_and_in_order_however_the_stream_is_cut(server.addr().unwrap());
}

#[test]
fn a_slow_reader_is_cut_off_and_comes_back_to_what_it_missed() {
    let process = Process::start(&["--stall-time", "1s"]);
    both::a_slow_reader_is_cut_off_and_comes_back_to_what_it_missed(&process);
    process.finish();
}

/// Publishes to sixteen topics in bursts of one topic and in alternation, each event saying its topic.
fn publish_to_sixteen(hub: &Hub, random: &mut Random, total: usize, sizes: [usize; 3]) -> Vec<(String, Id)> {
    let mut published = Vec::new();
    while published.len() < total {
        let topic = format!("t{}", random.below(16));
        for _ in 0..[1, 1, 2, 40][random.below(4)] {
            let event = Event::new(format!("{topic} {}", "x".repeat(sizes[random.below(3)]))).name("e");
            published.push((topic.clone(), hub.publish(&topic, event).unwrap()));
        }
        thread::sleep(Duration::from_micros(300));
    }
    published
}

/// How far a reader has come, and whether it shall take nothing.
#[derive(Default)]
struct Pace {
    got: AtomicUsize,
    held: AtomicBool,
}

/// Follows sixteen topics through a narrow socket, now fast and now slow, cut off now and then. Returns what it got: the
/// topic and id of each event, and `None` for each gap.
fn follow_sixteen(addr: SocketAddr, first: Id, cuts: bool, pace: &Pace) -> Vec<Option<(String, Id)>> {
    let target = format!("/events/{}", (0..16).map(|n| format!("t{n}")).collect::<Vec<_>>().join(","));
    let (mut random, mut got, mut cursor) = (Random(13), Vec::new(), first);
    loop {
        let mut wire = narrow(addr, 4_096, None);
        open(&mut wire, &format!("{target}?last_event_id={cursor}"));
        let quota = if cuts { 50 + random.below(400) } else { usize::MAX };
        for _ in 0..quota {
            let seen = wire.event().unwrap();
            cursor = seen.id();
            match seen.event.as_deref() {
                Some("gap") => got.push(None),
                Some("end") => return got,
                _ => got.push(Some((seen.data().split(' ').next().unwrap().to_string(), cursor))),
            }
            pace.got.store(got.len(), SeqCst);
            while pace.held.load(SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            if random.below(60) == 0 {
                thread::sleep(Duration::from_millis(20)); // in which the buffers fill, and it falls behind
            }
        }
    }
}

#[test]
fn a_stream_of_sixteen_topics_loses_nothing_while_it_is_pushed_behind_again_and_again() {
    let server = serve(patient().with(|config| {
        config.keep_events = 1_000_000;
        config.keep_bytes = 1 << 30;
    }));
    let addr = server.addr().unwrap();
    let (_, first) = Wire::subscribe(addr, "/events/a", "");
    let pace = Pace::default();
    let (got, published) = thread::scope(|scope| {
        let reader = scope.spawn(|| follow_sixteen(addr, first, true, &pace));
        let (mut random, mut published) = (Random(11), Vec::new());
        // Once the reader has had everything, it is live, or about to be; then it takes nothing, while more is published
        // than sockets hold.
        for _ in 0..40 {
            published.extend(publish_to_sixteen(&server.hub(), &mut random, 700, [10, 500, 3_000]));
            wait_for("the reader to have had everything", || {
                (pace.got.load(SeqCst) == published.len() || reader.is_finished()).then_some(())
            });
            pace.held.store(true, SeqCst);
            published.extend(publish_to_sixteen(&server.hub(), &mut random, 400, [20_000; 3]));
            pace.held.store(false, SeqCst);
            if metric(addr, "woken_total") >= 5 {
                break;
            }
        }
        server.hub().publish("t0", Event::new("end").name("end")).unwrap();
        (reader.join().unwrap(), published)
    });
    let got: Vec<(String, Id)> = got.into_iter().map(|event| event.expect("no gap: everything is kept")).collect();
    assert_eq!(got.len(), published.len());
    assert!(got == published);
    assert!(metric(addr, "woken_total") >= 5, "it was never behind: the test shows nothing");
}

/// For every event that did not come, a gap must have been told after the last event of its topic before it, and before
/// anything newer than it.
#[test]
fn events_that_are_let_go_under_a_stream_of_sixteen_topics_are_never_a_silent_hole() {
    for cuts in [false, true] {
        let server = serve(patient().with(|config| config.keep_events = 20));
        let addr = server.addr().unwrap();
        let (_, first) = Wire::subscribe(addr, "/events/a", "");
        let pace = Pace::default();
        let (got, all) = thread::scope(|scope| {
            let reader = scope.spawn(|| follow_sixteen(addr, first, cuts, &pace));
            let (mut random, mut all) = (Random(11), Vec::new());
            for gaps in 1..=3 {
                all.extend(publish_to_sixteen(&server.hub(), &mut random, 1_000, [10, 5_000, 20_000]));
                // It takes nothing, while much more is let go than sockets hold.
                pace.held.store(true, SeqCst);
                all.extend(publish_to_sixteen(&server.hub(), &mut random, 1_000, [20_000; 3]));
                pace.held.store(false, SeqCst);
                wait_for("a gap to be told", || {
                    (metric(addr, "gaps_total") >= gaps || reader.is_finished()).then_some(())
                });
            }
            server.hub().publish("t0", Event::new("end").name("end")).unwrap();
            (reader.join().unwrap(), all)
        });
        let mut published: HashMap<String, Vec<Id>> = HashMap::new();
        for (topic, id) in all {
            published.entry(topic).or_default().push(id);
        }
        let ids: Vec<Id> = got.iter().flatten().map(|(_, id)| *id).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]), "once, and in order");
        let places: HashMap<Id, usize> =
            got.iter().enumerate().filter_map(|(place, event)| Some((event.as_ref()?.1, place))).collect();
        let gaps: Vec<usize> = (0..got.len()).filter(|place| got[*place].is_none()).collect();
        let mut missing = 0;
        for ids in published.values() {
            let mut after = 0; // the place after the last event of this topic that came
            for id in ids {
                if let Some(place) = places.get(id) {
                    after = place + 1;
                    continue;
                }
                missing += 1;
                let newer = got.iter().position(|event| event.as_ref().is_some_and(|(_, other)| other > id));
                let before = newer.unwrap_or(got.len());
                let told = gaps.iter().any(|gap| (after..before).contains(gap));
                assert!(told, "{id} is missing between {after} and {before}; gaps at {gaps:?}");
            }
        }
        assert!(missing > 0 && gaps.len() > 1, "nothing was let go: the test shows nothing");
    }
}

#[test]
fn a_reader_that_takes_nothing_is_closed_after_the_stall_time_and_costs_no_processor_until_then() {
    let process = Process::start(&["--stall-time", "1s", "--log", "info"]);
    let mut stalled: Vec<Wire> = (0..12).map(|_| narrow(process.addr, 4_096, Some(1_448))).collect();
    stalled.iter_mut().for_each(|wire| open(wire, "/events/a"));
    wait_for_metric(process.addr, "subscribers", 12);
    let mut put = Wire::connect(process.addr);
    put.send(b"PUT /events/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
    let line = "x".repeat(30);
    let lines = format!("{line}\n").repeat(100);
    wait_for("all to be closed", || {
        put.send(format!("{:x}\r\n{lines}\r\n", lines.len()).as_bytes());
        (metric(process.addr, "subscribers") == 0).then_some(())
    });
    process.wait_for_log("the peer took nothing in the stall time");
}

#[test]
fn a_hundred_readers_that_stall_change_nothing_for_the_others() {
    let budget_kb = 16 * 1024;
    let process = Process::start(&["--keep-bytes", "16MiB", "--keep-events", "5000", "--stall-time", "4s"]);
    let addr = process.addr;
    let mut others = Crowd::subscribe(addr, "/events/a", 20);
    let before = process.status("VmRSS");
    let mut stalled: Vec<Wire> = (0..100).map(|n| narrow(addr, 4_096, (n % 2 == 0).then_some(1_448))).collect();
    stalled.iter_mut().for_each(|wire| open(wire, "/events/a"));
    wait_for_metric(addr, "subscribers", 120);
    let (go_on, may_go_on) = mpsc::channel();
    let feeder = thread::spawn(move || {
        let mut put = Wire::connect(addr);
        put.send(b"PUT /events/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
        for n in 0..20_000 {
            if n % 2_000 == 0 {
                may_go_on.recv().unwrap(); // the others have seen all so far, so nothing is let go before they see it
            }
            let line = format!("{n} {}\n", "x".repeat(1_000));
            put.send(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes());
        }
        put.send(b"0\r\n\r\n");
        assert!(put.answer().body.starts_with("published 20000, last id"));
    });
    // Two of them read again at once: everything kept after where they were follows, behind a gap where more was let go.
    let woken = [stalled.pop().unwrap(), stalled.pop().unwrap()].map(|mut wire| {
        thread::spawn(move || {
            let mut next = 0;
            while next != 20_000 {
                let seen = wire.event().expect("a reader that takes something is not closed");
                if seen.is_gap() {
                    next = u64::MAX;
                    continue;
                }
                let n: u64 = seen.data().split(' ').next().unwrap().parse().unwrap();
                assert!(n == next || next == u64::MAX, "{n} instead of {next} without a gap");
                next = n + 1;
                if n < 100 {
                    thread::sleep(Duration::from_millis(5));
                }
            }
        })
    });
    for n in 0..10 {
        go_on.send(()).unwrap();
        others.read_until(2_000 * (n + 1));
    }
    feeder.join().unwrap();
    let grown = process.status("VmRSS").saturating_sub(before);
    assert!(grown < budget_kb + 16 * 1024, "{grown} kB for a budget of {budget_kb} kB");
    woken.into_iter().for_each(|thread| thread.join().unwrap());
    // The rest is closed for taking nothing, and gets what is missing by reconnecting.
    wait_for_metric(addr, "subscribers", 20);
    let mut wire = stalled.pop().unwrap();
    let (mut last, mut next, mut gaps) = (None, 0, 0);
    while next != 20_000 {
        let Some(seen) = wire.block() else {
            wire = Wire::stream(addr, "/events/a", &format!("Last-Event-ID: {}\r\n", last.take().unwrap()));
            continue;
        };
        last = seen.id.clone().or(last);
        if seen.is_gap() {
            (next, gaps) = (u64::MAX, gaps + 1);
        } else if seen.data.is_some() {
            let n: u64 = seen.data().split(' ').next().unwrap().parse().unwrap();
            assert!(n == next || next == u64::MAX, "{n} instead of {next} without a gap");
            next = n + 1;
        }
    }
    assert!(gaps >= 1, "more was let go than sockets hold");
}

#[test]
fn a_herd_that_comes_back_at_once_is_caught_up_without_sending_anyone_away() {
    let server = serve(Config::default().with(|config| {
        config.connections = 10;
        config.subscribers = 600;
    }));
    let addr = server.addr().unwrap();
    let (first, base) = Wire::subscribe(addr, "/events/a", "");
    first.close();
    wait_for_metric(addr, "subscribers", 0); // or it would have the place of one of the 600
    (0..100).for_each(|n| assert!(server.hub().publish("a", numbered(n, 100)).is_ok()));
    let request = format!("GET /events/a HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: {base}\r\n\r\n");
    let mut herd: Vec<Wire> = (0..600).map(|_| Wire::connect(addr)).collect();
    herd.iter_mut().for_each(|wire| wire.send(request.as_bytes()));
    for wire in &mut herd {
        assert!(wire.head().starts_with("HTTP/1.1 200"));
        (0..100).for_each(|n| assert!(wire.event().unwrap().data().starts_with(&format!("{n} "))));
    }
    assert_eq!(metric(addr, "sent_away_total"), 0);
}

#[test]
fn a_stream_begins_with_a_block_that_dispatches_nothing_and_names_where_it_starts() {
    let server = serve(Config::default().with(|config| config.retry = Duration::from_millis(2345)));
    let addr = server.addr().unwrap();
    let mut stream = Wire::stream(addr, "/events/a", "");
    let first = String::from_utf8(stream.take_until(b"\n\n").unwrap()).unwrap();
    let (retry, id) = first.split_once('\n').unwrap();
    assert_eq!(retry, "retry: 2345");
    let base: Id = id.strip_prefix("id: ").unwrap().trim_end().parse().unwrap();
    let published = server.hub().publish("elsewhere", Event::new("x")).unwrap();
    assert!(base < published);
    let (_, cursor) = Wire::subscribe(addr, "/events/a", "");
    assert_eq!(cursor, published, "the newest id over all topics");
    let (_, cursor) = Wire::subscribe(addr, "/events/a", &format!("Last-Event-ID: {base}\r\n"));
    assert_eq!(cursor, base, "the cursor that the stream resumes after");
}

#[test]
fn one_stream_of_several_topics_has_one_order() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let (mut stream, _) = Wire::subscribe(addr, "/events/a,b,a,c", "");
    let ids: Vec<Id> =
        (0..300).map(|n| server.hub().publish(["a", "b", "c"][n % 3], Event::new(n.to_string())).unwrap()).collect();
    for (n, id) in ids.iter().enumerate() {
        let seen = stream.event().unwrap();
        assert_eq!((seen.data(), seen.id()), (n.to_string().as_str(), *id));
    }
    let (mut replayed, cursor) = Wire::subscribe(addr, "/events/c,b,a", &format!("Last-Event-ID: {}\r\n", ids[9]));
    assert_eq!(cursor, ids[9]);
    for id in &ids[10..] {
        assert_eq!(replayed.event().unwrap().id(), *id);
    }
}

#[test]
fn a_stream_resumes_after_the_header_or_any_parameter_and_the_header_wins() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let ids: Vec<Id> = (0..3).map(|n| server.hub().publish("a", Event::new(n.to_string())).unwrap()).collect();
    let next = |target: String, fields: String| Wire::subscribe(addr, &target, &fields).0.event().unwrap().id();
    let header = format!("Last-Event-ID: {}\r\n", ids[1]);
    assert_eq!(next("/events/a".into(), header.clone()), ids[2]);
    assert_eq!(next(format!("/events/a?last_event_id={}", ids[0]), String::new()), ids[1]);
    assert_eq!(next(format!("/events/a?lastEventId={}", ids[0]), String::new()), ids[1]);
    assert_eq!(next(format!("/events/a?_={}&lastEventID={}", ids[1], ids[0]), String::new()), ids[1]);
    assert_eq!(next(format!("/events/a?last_event_id={}&since=earliest", ids[0]), header.clone()), ids[2]);
    assert_eq!(next("/events/a?since=earliest".into(), String::new()), ids[0]);
    assert_eq!(next("/events/a?since=earliest".into(), header), ids[2], "a page that comes back goes on where it was");
    assert_eq!(next("/events/a?since=earliest&lastEventId=".into(), "Last-Event-ID: \r\n".into()), ids[0]);
    assert_eq!(next(format!("/events/a?since={}", ids[0]), String::new()), ids[1]);
    let seen = Wire::subscribe(addr, "/events/a?since=10m", "").0.event().unwrap();
    assert!(seen.is_gap(), "ten minutes ago this server did not run yet: {seen:?}");
}

#[test]
fn a_poll_waits_for_the_first_event_sends_what_there_is_and_ends() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let (mut poll, cursor) = Wire::subscribe(addr, "/events/a?poll", "");
    wait_for_metric(addr, "subscribers", 1);
    server.hub().publish("b", Event::new("not for it")).unwrap();
    let id = server.hub().publish("a", Event::new("hello")).unwrap();
    assert!(cursor < id);
    assert_eq!(poll.event().unwrap().id(), id);
    let end = String::from_utf8(poll.rest()).unwrap();
    assert!(end.starts_with(": ") && end.ends_with("\nretry: 100\n\n"), "{end:?}");

    let ids: Vec<Id> = (0..500).map(|n| server.hub().publish("a", Event::new(n.to_string())).unwrap()).collect();
    let (mut poll, _) = Wire::subscribe(addr, "/events/a?poll=1h", &format!("Last-Event-ID: {id}\r\n"));
    for id in &ids {
        assert_eq!(poll.event().unwrap().id(), *id);
    }
    assert!(poll.event().is_none());

    let (mut all, _) = Wire::subscribe(addr, "/events/a?poll=0s&since=earliest", "");
    assert_eq!((0..501).filter(|_| all.event().is_some()).count(), 501, "a poll that does not wait gets all there is");

    let (mut empty, _) = Wire::subscribe(addr, "/events/a?poll=50ms", "");
    assert_eq!(empty.event(), None);
}

/// Else a poll would go on for as long as events come faster than its reader takes them.
#[test]
fn a_poll_holds_what_there_is_at_its_first_event_and_not_what_comes_while_it_is_read() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let publish = |n| server.hub().publish("a", numbered(n, 60_000)).map(drop).unwrap();
    (0..200).for_each(publish); // more than the kernel buffers for one reader
    let mut poll = narrow(addr, 4_096, None);
    open(&mut poll, "/events/a?poll&since=earliest");
    wait_for("its second event", || (metric(addr, "delivered_total") >= 2).then_some(()));
    (200..400).for_each(publish);
    let seen = std::iter::from_fn(|| poll.event()).count();
    assert_eq!((seen, metric(addr, "delivered_total")), (200, 200));
    assert!(String::from_utf8(poll.rest()).unwrap().is_empty());
}

#[test]
fn polling_over_and_over_loses_nothing() {
    // All is kept, however far behind the poll is.
    let server = serve(Config::default().with(|config| config.keep_events = 2_000));
    let addr = server.addr().unwrap();
    let (_, mut cursor) = Wire::subscribe(addr, "/events/a", "");
    let hub = server.hub();
    let publisher = thread::spawn(move || {
        for n in 0..2_000 {
            hub.publish("a", Event::new(n.to_string())).unwrap();
            if n % 50 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let mut expected = 0;
    while expected < 2_000 {
        let (mut poll, _) = Wire::subscribe(addr, "/events/a?poll", &format!("Last-Event-ID: {cursor}\r\n"));
        while let Some(seen) = poll.event() {
            assert_eq!(seen.data(), expected.to_string());
            expected += 1;
            cursor = seen.id();
        }
    }
    publisher.join().unwrap();
}

#[test]
fn a_lifetime_ends_with_the_reason_and_a_reconnection_time() {
    let server = serve(Config::default().with(|config| config.lifetime = Duration::from_millis(100)));
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), "/events/a", "");
    assert_eq!(String::from_utf8(stream.rest()).unwrap(), ": the lifetime is over\nretry: 3000\n\n");
}

/// Without chunks as with them: what did not fit into the socket goes on at its very byte.
#[test]
fn a_reader_of_http_1_0_that_is_pushed_behind_gets_every_event_whole() {
    let server = serve(patient());
    let addr = server.addr().unwrap();
    for version in ["1.0", "1.1"] {
        let mut wire = narrow(addr, 4_096, None);
        wire.send(format!("GET /events/a HTTP/{version}\r\nHost: localhost\r\n\r\n").as_bytes());
        assert!(wire.head().starts_with("HTTP/1.1 200"));
        assert!(wire.block().unwrap().data.is_none());
        let (woken, mut published) = (metric(addr, "woken_total"), 0);
        wait_for("the reader to be pushed behind", || {
            server.hub().publish("a", numbered(published, 60_000)).unwrap();
            published += 1;
            (metric(addr, "woken_total") > woken).then_some(())
        });
        for n in published..published + 10 {
            server.hub().publish("a", numbered(n, 100)).unwrap();
        }
        for n in 0..published + 10 {
            let bytes = if n < published { 60_000 } else { 100 };
            let seen = wire.event().unwrap();
            assert!(seen.data() == format!("{n} {}", "x".repeat(bytes)), "{version}: {n}");
        }
        wire.close();
        wait_for_metric(addr, "subscribers", 0);
    }
}

#[test]
fn who_is_cut_off_before_the_gap_hears_of_it_when_coming_back() {
    let server = serve(Config::default().with(|config| config.keep_events = 1));
    let addr = server.addr().unwrap();
    let first = server.hub().publish("a", Event::new("first")).unwrap();
    for _ in 0..3 {
        server.hub().publish("a", Event::new("more")).unwrap();
    }
    let mut wire = Wire::stream(addr, "/events/a", &format!("Last-Event-ID: {first}\r\n"));
    let opening = wire.block().unwrap();
    assert_eq!((opening.id, opening.data), (None, None), "else a browser would resume from behind the gap");
    let gap = wire.block().unwrap();
    assert!(gap.is_gap() && gap.id.is_some(), "{gap:?}");
}
