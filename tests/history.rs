//! What is kept, what was let go, and what a cursor hears of it.

use crate::common::*;
use brooklet::{Config, Event, Id};
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

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
    let mut sent_away = 0;
    for n in 0..800 {
        let mut wire = Wire::stream(addr, &format!("/events/{}", sixteen(n)), "");
        let first = wire.block().unwrap();
        match first.id {
            Some(_) => streams.push(wire),
            None => sent_away += usize::from(first.comments == ["all topic names are in use"] && first.retry.is_some()),
        }
    }
    assert_eq!((streams.len(), sent_away), (468, 332), "sixteen names each; a quarter is for publishing");
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
    let server = serve(Config { keep_events: 100, ..Config::default() });
    let addr = server.addr().unwrap();
    let big = |n: usize| Event::new(format!("{n} {}", "x".repeat(60_000)));
    let hub = server.hub();
    let early: Vec<Id> = (0..100).map(|n| hub.publish("b", big(n)).unwrap()).collect();
    for n in 0..200 {
        hub.publish("a", big(n)).unwrap();
    }
    let mut wire = narrow(addr, 4_096, None);
    open(&mut wire, "/events/a,b?since=earliest");
    assert_eq!(wire.event().unwrap().id(), early[0]);
    for n in 100..200 {
        hub.publish("b", big(n)).unwrap(); // b lets go what this reader has not had yet
    }
    let mut gaps = 0;
    let mut of_b = Vec::new();
    while of_b.last() != Some(&199) {
        let seen = wire.event().unwrap();
        gaps += usize::from(seen.is_gap());
        of_b.extend(seen.data().split(' ').next().and_then(|n| n.parse::<usize>().ok()));
    }
    assert_eq!(gaps, 1, "the hole is told, once");
}

#[test]
fn a_cursor_that_cannot_be_answered_is_told_of_the_gap_and_then_gets_all_that_is_kept() {
    let server = serve(Config { keep_events: 2, ..Config::default() });
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
    let server = serve(Config { keep_age: Duration::from_millis(300), ..Config::default() });
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
    let server = serve(Config { keep_bytes: 10_000, ..Config::default() });
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
    let server = serve(Config { keep_events: 2, ..Config::default() });
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
    let server = serve(Config { topics: 2, ..Config::default() });
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
