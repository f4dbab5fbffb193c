//! Topics as a client on the wire sees them: publishing, ids, replaying, gaps, polls.

use crate::common::*;
use brooklet::{Config, Event, Id};
use std::thread;
use std::time::Duration;

#[test]
fn a_published_event_arrives_with_exactly_these_bytes() {
    let server = serve_default();
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), "/events/a", "");
    let answer = post(server.addr().unwrap(), "/events/a?event=greeting&retry=1500", "one\ntwo");
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/plain; charset=utf-8")));
    let id = answer.body.trim_end();
    assert_eq!(format!("{}\n", id.parse::<Id>().unwrap()), answer.body);
    let frame = stream.take_until(b"\n\n").unwrap();
    let expected = format!("event: greeting\nid: {id}\ndata: one\ndata: two\nretry: 1500\n\n");
    assert_eq!(String::from_utf8(frame).unwrap(), expected);
}

#[test]
fn a_stream_begins_with_a_block_that_dispatches_nothing_and_names_where_it_starts() {
    let server = serve(Config { retry: Duration::from_millis(2345), ..Config::default() });
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
fn the_head_of_a_stream_keeps_proxies_from_holding_it_back() {
    let server = serve_default();
    let mut wire = Wire::connect(server.addr().unwrap());
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
    assert!(header(&head, "date").is_some_and(|date| date.ends_with(" GMT") && date.len() == 29), "{head}");
    assert!(header(&head, "transfer-encoding").or(header(&head, "content-length")).is_none(), "{head}");
}

#[test]
fn every_kind_of_line_end_in_the_data_begins_a_new_line_and_nul_may_stand_in_it() {
    let server = serve_default();
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), "/events/a", "");
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
        assert_eq!(post(server.addr().unwrap(), "/events/a", body).status, 200, "{body:?}");
        let seen = stream.event().unwrap();
        assert_eq!((seen.data(), &seen.event), (data, &None), "{body:?}");
    }
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
fn a_stream_resumes_after_the_header_or_either_parameter_and_the_header_wins() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let ids: Vec<Id> = (0..3).map(|n| server.hub().publish("a", Event::new(n.to_string())).unwrap()).collect();
    let next = |target: String, fields: String| Wire::subscribe(addr, &target, &fields).0.event().unwrap().id();
    let header = format!("Last-Event-ID: {}\r\n", ids[1]);
    assert_eq!(next("/events/a".into(), header.clone()), ids[2]);
    assert_eq!(next(format!("/events/a?last_event_id={}", ids[0]), String::new()), ids[1]);
    assert_eq!(next(format!("/events/a?lastEventId={}", ids[0]), String::new()), ids[1]);
    assert_eq!(next(format!("/events/a?last_event_id={}&since=earliest", ids[0]), header.clone()), ids[2]);
    assert_eq!(next("/events/a?since=earliest".into(), String::new()), ids[0]);
    assert_eq!(next("/events/a?since=earliest".into(), header), ids[2], "a page that comes back goes on where it was");
    assert_eq!(next("/events/a?since=earliest&lastEventId=".into(), "Last-Event-ID: \r\n".into()), ids[0]);
    assert_eq!(next(format!("/events/a?since={}", ids[0]), String::new()), ids[1]);
    let seen = Wire::subscribe(addr, "/events/a?since=10m", "").0.event().unwrap();
    assert!(seen.is_gap(), "ten minutes ago this server did not run yet: {seen:?}");
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
fn a_key_makes_publishing_repeatable_for_as_long_as_its_event_is_kept() {
    let server = serve(Config { keep_events: 2, ..Config::default() });
    let addr = server.addr().unwrap();
    let first = post(addr, "/events/a?key=k1", "one").body;
    assert_eq!(post(addr, "/events/a?key=k1", "other").body, first);
    assert_ne!(post(addr, "/events/b?key=k1", "other topic").body, first);
    post(addr, "/events/a?key=k2", "two");
    post(addr, "/events/a", "three");
    assert_ne!(post(addr, "/events/a?key=k1", "again").body, first, "the first was let go");
    assert_eq!(metric(addr, "published_total"), 5);
}

#[test]
fn many_publishers_of_one_key_publish_once() {
    let server = serve_default();
    for round in 0..200 {
        let ids: Vec<Id> = thread::scope(|scope| {
            let publish = || server.hub().publish("a", Event::new("x").key(format!("k{round}"))).unwrap();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(publish)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    }
    assert_eq!(metric(server.addr().unwrap(), "published_total"), 200);
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

#[test]
fn polling_over_and_over_loses_nothing() {
    let server = serve_default();
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
fn put_publishes_every_line_while_the_body_is_still_arriving() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let (mut stream, _) = Wire::subscribe(addr, "/events/log", "");
    let mut put = Wire::connect(addr);
    put.send(b"PUT /events/log?event=line HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
    for (chunk, lines) in [
        ("4;ext=1\r\none\n\r\n", vec!["one"]),
        ("3\r\ntwo\r\n1\r\n\n\r\n", vec!["two"]),
        ("B\r\n\nthr\ree\nfou\r\n", vec!["", "thr\nee"]),
        ("4\r\nr\r\n\n\r\n", vec!["four", ""]),
    ] {
        put.send(chunk.as_bytes());
        for line in lines {
            let seen = stream.event().unwrap();
            assert_eq!((seen.data(), seen.event.as_deref()), (line, Some("line")));
        }
    }
    put.send(b"4\r\nlast\r\n0\r\nTrailer: x\r\n\r\n");
    let last = stream.event().unwrap();
    assert_eq!(last.data(), "last");
    let answer = put.answer();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body, format!("published 7, last id {}\n", last.id()));
    put.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(put.answer().body, "ok\n", "the connection stays");
}

#[test]
fn a_put_that_breaks_off_keeps_its_whole_lines_only() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let (mut stream, _) = Wire::subscribe(addr, "/events/log", "");
    let mut put = Wire::connect(addr);
    put.send(b"PUT /events/log HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nwhole\nha");
    assert_eq!(stream.event().unwrap().data(), "whole");
    put.socket.shutdown(std::net::Shutdown::Write).unwrap();
    let answer = put.answer();
    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("published 1, last id"), "{}", answer.body);
    server.hub().publish("log", Event::new("next")).unwrap();
    assert_eq!(stream.event().unwrap().data(), "next");
}

#[test]
fn put_says_which_line_it_could_not_take_and_what_it_has_published() {
    let server = serve(Config { line_bytes: 10, body_bytes: 10, ..Config::default() });
    let addr = server.addr().unwrap();
    for (body, status, said) in [
        (&b"one\ntwo\n\xff\xfe\nfour\n"[..], 400, "line 3 is not UTF-8"),
        (b"one\ntwo\n0123456789A\n", 413, "longer than 10 bytes"),
        (b"one\ntwo\n0123456789ABCDEF", 413, "longer than 10 bytes"),
    ] {
        let mut put = Wire::connect(addr);
        put.send(
            format!("PUT /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(),
        );
        put.send(body);
        let answer = put.answer();
        assert_eq!(answer.status, status, "{}", answer.body);
        assert!(answer.body.contains(said) && answer.body.contains("published 2, last id"), "{}", answer.body);
    }
}

#[test]
fn ids_increase_strictly_over_all_topics_and_publishers() {
    let server = serve_default();
    let hub = server.hub();
    let mut ids: Vec<Id> = thread::scope(|scope| {
        let publish = |n: usize| (0..500).map(|_| hub.publish(&format!("t{n}"), Event::new("x")).unwrap()).collect();
        let threads: Vec<_> = (0..4).map(|n| scope.spawn(move || publish(n))).collect::<Vec<_>>();
        threads.into_iter().flat_map(|thread: thread::ScopedJoinHandle<Vec<Id>>| thread.join().unwrap()).collect()
    });
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 2_000);
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

#[test]
fn a_heartbeat_is_one_line_and_comes_only_after_silence() {
    let server = serve(Config { heartbeat: Duration::from_secs(4), ..Config::default() });
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), "/events/a", "");
    let silence = stream.take_until(b":\n:\n").expect("two heartbeats");
    assert_eq!(silence, b":\n:\n");
    server.hub().publish("a", Event::new("after")).unwrap();
    assert_eq!(stream.event().unwrap().data(), "after");
}

#[test]
fn a_lifetime_ends_with_the_reason_and_a_reconnection_time() {
    let server = serve(Config { lifetime: Duration::from_millis(100), ..Config::default() });
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), "/events/a", "");
    assert_eq!(String::from_utf8(stream.rest()).unwrap(), ": the lifetime is over\nretry: 3000\n\n");
}
