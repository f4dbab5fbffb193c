//! What is kept, what was let go, and what a cursor hears of it.

use crate::{both, common::*};
use brooklet::{Config, Event, Id};
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Publishes all of these, and says how many were taken. The requests are pipelined.
fn publish_all(addr: SocketAddr, targets: impl Iterator<Item = String>, body: &str) -> usize {
    let (mut wire, mut taken) = (Wire::connect(addr), 0);
    let targets: Vec<String> = targets.collect();
    for some in targets.chunks(100) {
        wire.send(some.iter().map(|target| post_request(target, body)).collect::<String>().as_bytes());
        taken += some.iter().filter(|_| wire.answer().status == 200).count();
    }
    taken
}

#[test]
fn floods_of_topics_keys_and_subscriptions_stay_inside_the_limits_and_pass() {
    let budget = 4 * 1024 * 1024;
    let process = Process::start(&["--keep-bytes", "4MiB", "--keep-events", "100000", "--subscribers", "1200"]);
    let addr = process.addr;
    let mut bystander = Bystander::new(addr);
    bystander.probe();
    let (at_rest, memory) = (process.at_rest(), process.status("VmRSS"));
    let inside = |what: &str| {
        let (kept, grown) = (metric(addr, "kept_bytes"), process.status("VmRSS").saturating_sub(memory));
        println!("flood of {what}: {kept} bytes kept, {grown} kB more memory");
        assert!(kept <= budget, "{what}: {kept} bytes are kept");
        assert!(grown < 64 * 1024, "{what}: {grown} kB more");
    };

    let taken = publish_all(addr, (0..12_000).map(|n| format!("/events/topic-{n}")), "x");
    assert_eq!((taken, metric(addr, "topics")), (9_999, 10_000));
    bystander.probe();
    inside("topics");

    let key = "k".repeat(120);
    let taken = publish_all(addr, (0..15_000).map(|n| format!("/events/calm-keys?key={key}{n}")), "x");
    assert_eq!(taken, 0, "all names are in use");
    let taken = publish_all(addr, (0..15_000).map(|n| format!("/events/topic-0?key={key}{n}")), "x");
    assert_eq!(taken, 15_000);
    inside("keys");
    wait_for("the topics to be let go", || {
        publish_all(addr, (0..20).map(|_| "/events/topic-0".into()), &"x".repeat(60_000));
        (metric(addr, "topics") <= 2).then_some(())
    });
    bystander.probe();

    let sixteen = |n: usize| (0..16).map(|k| format!("s{n}-{k}")).collect::<Vec<_>>().join(",");
    let mut streams = Vec::new();
    let mut rejected = 0;
    for n in 0..800 {
        let mut wire = Wire::stream(addr, &format!("/events/{}", sixteen(n)), "");
        let first = wire.block().unwrap();
        match first.id {
            Some(_) => streams.push(wire),
            None => rejected += usize::from(first.comments == ["all topic names are in use"] && first.retry.is_some()),
        }
    }
    assert_eq!((streams.len(), rejected), (468, 332), "sixteen names each; a quarter is for publishing");
    bystander.probe();
    inside("subscriptions");
    drop(streams);

    for n in 0..3_000 {
        let Ok(mut socket) = TcpStream::connect(addr) else { panic!("it is gone: {}", process.log()) };
        let _ = socket.write_all([&b"GET /events/calm HTTP/1.1\r\nHost: localhost\r\n\r\n"[..], b"GET /", b""][n % 3]);
        if n % 100 == 0 {
            bystander.probe();
        }
    }
    process.wait_until_at_most(at_rest);
    wait_for_metric(addr, "topics", 2);
    bystander.probe();
    inside("connections");
    bystander.finish("floods");
    process.finish();
}

#[test]
fn what_one_topic_lets_go_is_not_hidden_by_what_another_had_let_go() {
    let server = serve(patient().with(|config| config.keep_events = 100));
    let addr = server.addr().unwrap();
    let hub = server.hub();
    let publish = |topic: &str, n: usize| hub.publish(topic, Event::new(format!("{topic}{n} {}", "x".repeat(60_000))));
    let first = publish("b", 0).unwrap();
    (1..100).for_each(|n| assert!(publish("b", n).is_ok()));
    (0..200).for_each(|n| assert!(publish("a", n).is_ok()));
    let mut wire = narrow(addr, 4_096, None);
    open(&mut wire, "/events/a,b?since=earliest");
    assert_eq!(wire.event().unwrap().id(), first);
    (100..200).for_each(|n| assert!(publish("b", n).is_ok())); // b lets go what this reader has not had yet
    // How much of it the server's thread has written by then depends on how fast both are; but each hole is told.
    let (mut last, mut is_told, mut holes) = (0, false, 0);
    while last != 199 {
        let seen = wire.event().unwrap();
        is_told |= seen.is_gap();
        let of_b = seen.data().strip_prefix('b').and_then(|data| data.split(' ').next()?.parse().ok());
        if let Some(number) = of_b {
            assert!(number == last + 1 || is_told, "b{number} came after b{last}, and no gap before it");
            holes += usize::from(number != last + 1);
            (last, is_told) = (number, false);
        }
    }
    assert!(holes > 0, "nothing was let go in front of the reader");
}

#[test]
fn a_cursor_that_cannot_be_answered_is_told_of_the_gap_and_then_gets_all_that_is_kept() {
    let server = serve(Config::default().with(|config| config.keep_events = 2));
    let addr = server.addr().unwrap();
    let (_holder, base) = Wire::subscribe(addr, "/events/a", "");
    let ids: Vec<Id> = (0..4).map(|n| server.hub().publish("a", Event::new(n.to_string())).unwrap()).collect();
    let before = |id: Id| if id.seq > 0 { Id { seq: id.seq - 1, ..id } } else { Id { ms: id.ms - 1, seq: u64::MAX } };
    let future = Id { ms: ids[3].ms + 1_000_000, seq: 7 };
    let quoted = |id: Id| format!("\"{id}\"");
    for (cursor, after) in [
        (base.to_string(), quoted(base)),
        (ids[0].to_string(), quoted(ids[0])),
        (future.to_string(), quoted(future)),
        ("12".into(), "\"12-0\"".into()),
        ("nonsense".into(), "null".into()),
        ("-".into(), "null".into()),
        ("+5-0".into(), "null".into()),
        ("99999999999999999999999".into(), "null".into()),
        ("\u{fc}".into(), "null".into()),
    ] {
        let (mut stream, first) = Wire::subscribe(addr, "/events/a", &format!("Last-Event-ID: {cursor}\r\n"));
        let gap = stream.event().unwrap();
        assert!(gap.is_gap(), "{cursor}: {gap:?}");
        assert_eq!(gap.data(), format!("{{\"after\":{after},\"oldest\":\"{}\"}}", ids[2]), "{cursor}");
        assert_eq!((gap.id(), first), (before(ids[2]), before(ids[2])), "{cursor}");
        assert_eq!((stream.event().unwrap().id(), stream.event().unwrap().id()), (ids[2], ids[3]), "{cursor}");
    }
    let (mut stream, cursor) = Wire::subscribe(addr, "/events/a", &format!("Last-Event-ID: {}\r\n", ids[1]));
    assert_eq!((stream.event().unwrap().id(), cursor), (ids[2], ids[1]), "nothing was let go after this cursor");
}

#[test]
fn a_topic_that_has_gone_from_the_table_still_leaves_a_gap() {
    let server = serve(Config::default().with(|config| config.keep_age = Duration::from_millis(300)));
    let addr = server.addr().unwrap();
    let (_, base) = Wire::subscribe(addr, "/events/other", "");
    let id = server.hub().publish("a", Event::new("gone soon")).unwrap();
    wait_for("the topic to go", || (metric(addr, "topics") == 0).then_some(()));
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", &format!("Last-Event-ID: {base}\r\n"));
    let gap = stream.event().unwrap();
    assert!(gap.is_gap(), "{gap:?}");
    assert_eq!((gap.data(), gap.id()), (format!("{{\"after\":\"{base}\",\"oldest\":null}}").as_str(), id));
    let next = server.hub().publish("a", Event::new("new")).unwrap();
    assert_eq!(stream.event().unwrap().id(), next, "the stream goes on after the gap");
}

#[test]
fn the_oldest_of_all_topics_goes_first_when_the_budget_is_full() {
    let server = serve(Config::default().with(|config| config.keep_bytes = 10_000));
    let addr = server.addr().unwrap();
    let ids: Vec<Id> =
        (0..40).map(|n| server.hub().publish(&format!("t{}", n % 4), Event::new("x".repeat(800))).unwrap()).collect();
    assert!(metric(addr, "kept_bytes") <= 10_000);
    let kept = metric(addr, "kept_events") as usize;
    assert!((8..=10).contains(&kept), "{kept}");
    let (mut stream, _) = Wire::subscribe(addr, "/events/t0,t1,t2,t3?since=earliest", "");
    for id in &ids[40 - kept..] {
        assert_eq!(stream.event().unwrap().id(), *id);
    }
}

#[test]
fn earliest_of_several_topics_replays_all_that_is_kept_without_a_gap() {
    let server = serve(Config::default().with(|config| config.keep_events = 2));
    let first = server.hub().publish("quiet", Event::new("old")).unwrap();
    let busy: Vec<Id> = (0..5).map(|_| server.hub().publish("busy", Event::new("new")).unwrap()).collect();
    let (mut stream, cursor) = Wire::subscribe(server.addr().unwrap(), "/events/quiet,busy?since=earliest", "");
    assert!(cursor < first);
    for id in [first, busy[3], busy[4]] {
        assert_eq!(stream.event().unwrap().id(), id);
    }
}

#[test]
fn a_topic_table_that_is_full_refuses_publishers_and_sends_pages_away_until_there_is_room() {
    let server = serve(Config::default().with(|config| config.topics = 2));
    let addr = server.addr().unwrap();
    let (held, _) = Wire::subscribe(addr, "/events/a", "");
    post(addr, "/events/b", "x");
    let answer = post(addr, "/events/c", "x");
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("3")));
    assert!(answer.body.contains("all 2 topic names are in use"), "{}", answer.body);
    let mut away = Wire::stream(addr, "/events/c,a", "");
    let end = String::from_utf8(away.rest()).unwrap();
    assert!(end.starts_with(": ") && end.contains("\nretry: "), "{end:?}");
    held.close();
    wait_for("the place of a topic that nobody uses", || (post(addr, "/events/c", "x").status == 200).then_some(()));
}

/// What a poll that does not wait gets: its events and gaps, and the last id that its client then has.
fn polled(addr: SocketAddr, target: &str) -> (Vec<Seen>, Id) {
    let join = if target.contains('?') { '&' } else { '?' };
    let mut wire = Wire::stream(addr, &format!("{target}{join}poll=1ms"), "");
    read_to_the_end(&mut wire)
}

fn read_to_the_end(wire: &mut Wire) -> (Vec<Seen>, Id) {
    let (mut events, mut last) = (Vec::new(), None);
    while let Some(seen) = wire.block() {
        last = seen.id.clone().or(last);
        events.extend(Some(seen).filter(|seen| seen.data.is_some()));
    }
    (events, last.expect("an id").parse().unwrap())
}

#[test]
fn ages_go_by_the_clock_also_while_ids_are_ahead_of_it() {
    let dir = Scratch::new();
    let Some(clock) = Clock::new(&dir) else { return };
    let (journal, publish) = (dir.path("events"), |process: &Process| post(process.addr, "/events/a", "x").body);
    let first = clock.start(&["--journal", &journal]);
    clock.set("+1h");
    publish(&first);
    clock.set("+0");
    publish(&first);
    let assert_ages = |process: &Process, what: &str| {
        let since = |time: &str| polled(process.addr, &format!("/events/a?since={time}")).0;
        wait_for(&format!("{what} to be older than a second"), || since("1s").is_empty().then_some(()));
        assert_eq!(since("30m").iter().filter(|seen| !seen.is_gap()).count(), 2, "{what}: both are still kept");
    };
    assert_ages(&first, "what was published");
    drop(first);
    let second = clock.start(&["--journal", &journal]);
    assert_ages(&second, "what was restored");
    drop(second);
    let third = clock.start(&["--journal", &journal, "--keep-age", "3s"]);
    wait_for_metric(third.addr, "kept_events", 0);
    clock.set("+1h");
    publish(&third);
    clock.set("+0");
    wait_for_metric(third.addr, "kept_events", 0);
}

#[test]
fn a_clock_that_is_a_day_ahead_for_a_moment_makes_nothing_old() {
    let dir = Scratch::new();
    let Some(clock) = Clock::new(&dir) else { return };
    let journal = dir.path("events");
    let kept = |process: &Process| polled(process.addr, "/events/a?since=earliest").0.len();
    let first = clock.start(&["--journal", &journal]);
    post(first.addr, "/events/a", "before");
    clock.set("+25h");
    post(first.addr, "/events/a", "meanwhile");
    assert_eq!((kept(&first), polled(first.addr, "/events/a?since=1h").0.len()), (2, 3), "with a gap");
    clock.set("+0");
    assert_eq!(kept(&first), 2);
    drop(first);
    assert_eq!(kept(&clock.start(&["--journal", &journal])), 2);
}

#[test]
fn a_cursor_between_the_newest_id_and_the_clock_means_from_now_on() {
    let server = serve(Config::default().with(|config| config.keep_events = 2));
    let addr = server.addr().unwrap();
    let old: Vec<Id> = (0..5).map(|_| server.hub().publish("a", Event::new("old")).unwrap()).collect();
    let mut newest = old[4];
    let now_ms = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    for (query, header) in [("?since=", ""), ("?last_event_id=", ""), ("", "Last-Event-ID: ")] {
        let cursor = wait_for("the clock to pass the newest id", || Some(now_ms()).filter(|now| *now > newest.ms));
        let value =
            |name: &str, end: &str| if name.is_empty() { name.into() } else { format!("{name}{cursor}-7{end}") };
        let target = format!("/events/a{}", value(query, ""));
        let (mut stream, first) = Wire::subscribe(addr, &target, &value(header, "\r\n"));
        assert_eq!(first, newest, "not the cursor: should the clock be set back, events may come before that");
        newest = server.hub().publish("a", Event::new("new")).unwrap();
        assert_eq!(stream.event().unwrap().id(), newest, "{query}{header}");
    }
    let ahead = Id { ms: now_ms() + 3_600_000, seq: 0 };
    let (events, _) = polled(addr, &format!("/events/a?since={ahead}"));
    assert!(events[0].is_gap() && events.len() == 3, "later than the clock, too: {events:?}");
}

#[test]
fn a_malformed_since_is_400() {
    let server = serve_default();
    for since in ["nonsense", "1-", "-1", "+5", "10x", "1-2-3", ""] {
        assert_eq!(get(server.addr().unwrap(), &format!("/events/a?since={since}")).status, 400, "{since:?}");
    }
}

/// Nothing is kept, so each event that is published here is forgotten at once, and its topic leaves the table.
fn keeping_nothing() -> Config {
    Config::default().with(|config| config.keep_bytes = 1)
}

#[test]
fn the_page_of_a_quiet_topic_hears_no_gap_after_its_lifetime_or_an_empty_poll() {
    let server = serve(keeping_nothing().with(|config| config.lifetime = Duration::from_secs(5)));
    let addr = server.addr().unwrap();
    for (target, end) in [("/events/quiet", "the lifetime is over"), ("/events/quiet?poll=3s", "the poll is over")] {
        let (mut stream, opened) = Wire::subscribe(addr, target, "");
        let newest = server.hub().publish("other", Event::new("x")).unwrap();
        assert!(opened < newest);
        let last = stream.block().unwrap();
        assert_eq!((last.comments.last().unwrap().as_str(), last.id()), (end, newest));
        assert_eq!(stream.block(), None);
        let (events, _) = polled(addr, &format!("/events/quiet?last_event_id={newest}"));
        assert_eq!(events, [], "{target}");
        // Who missed something hears of it all the same.
        let (events, _) = polled(addr, &format!("/events/other,quiet?last_event_id={opened}"));
        assert!(events[0].is_gap(), "{events:?}");
    }
}

#[test]
fn the_page_of_a_quiet_topic_hears_no_gap_after_a_restart_from_the_journal() {
    let dir = Scratch::new();
    let config = keeping_nothing().with(|config| config.journal = Some(dir.path("events").into()));
    let server = serve(config.clone());
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), "/events/quiet", "");
    let newest = server.hub().publish("other", Event::new("x")).unwrap();
    server.stop();
    let (events, last) = read_to_the_end(&mut stream);
    assert_eq!((events.len(), last), (0, newest));
    let server = serve(config);
    let (events, _) = polled(server.addr().unwrap(), &format!("/events/quiet?last_event_id={last}"));
    assert_eq!(events, []);
}

#[test]
fn an_end_names_no_id_beyond_what_its_reader_still_has_to_get() {
    let lifetime = Duration::from_secs(1);
    let server = serve(patient().with(|config| config.lifetime = lifetime));
    let ids: Vec<Id> = (0..200).map(|_| server.hub().publish("a", Event::new("x".repeat(60_000))).unwrap()).collect();
    let mut wire = narrow(server.addr().unwrap(), 4_096, Some(1_448));
    open(&mut wire, "/events/a?since=earliest");
    thread::sleep(lifetime); // its lifetime ends while an event is being written to it
    let (events, last) = read_to_the_end(&mut wire);
    assert!((1..200).contains(&events.len()), "the kernel has buffered {}: the test shows nothing", events.len());
    assert_eq!(last, ids[events.len() - 1]);
}

#[test]
fn what_a_gap_of_several_topics_tells_of_ends_before_its_oldest() {
    let server = serve(Config::default().with(|config| config.keep_events = 3));
    let hub = server.hub();
    let addr = server.addr().unwrap();
    let (_, base) = Wire::subscribe(addr, "/events/a,b,c", "");
    let publish = |topic: &str, count: usize| -> Vec<(String, Id)> {
        (0..count).map(|n| (topic.to_string(), hub.publish(topic, Event::new(n.to_string())).unwrap())).collect()
    };
    // `a` keeps what is older than much that `b` has forgotten.
    let published = [publish("a", 2), publish("b", 50), publish("c", 4), publish("a", 1), publish("b", 1)].concat();
    for cursor in ["nonsense".to_string(), base.to_string(), published[10].1.to_string()] {
        let (events, _) = polled(addr, &format!("/events/a,b,c?last_event_id={cursor}"));
        assert!(events[0].is_gap() && events[1..].iter().all(|seen| !seen.is_gap()), "{events:?}");
        let came: Vec<Id> = events[1..].iter().map(Seen::id).collect();
        let after: Id = cursor.parse().unwrap_or_default();
        let data = events[0].data().split("\"oldest\":\"").nth(1).unwrap();
        let oldest: Id = data.trim_end_matches("\"}").parse().unwrap();
        assert!(came.contains(&oldest) && events[0].id() < came[0], "{events:?}");
        assert!(came[0] < oldest, "what is kept before it follows, too");
        for (topic, id) in published.iter().filter(|(_, id)| *id > after && !came.contains(id)) {
            assert!(*id < oldest, "{id} of {topic} is missing after {oldest}");
        }
    }
}

#[test]
fn a_restart_is_a_gap_that_is_told_once() {
    both::a_restart_is_a_gap_that_is_told_once(Process::start(&[]), || Process::start(&[]));
}
