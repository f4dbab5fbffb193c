//! What answers look like.

use crate::{both, common::*};
use brooklet::{Answer, Config, Event, Id};
use std::io::{self, Read};
use std::process::{Command, Stdio};
use std::time::Duration;

#[test]
fn head_answers_with_the_head_alone() {
    let server = serve_default();
    server.hub().publish("a", Event::new("x")).unwrap();
    for target in ["/health", "/metrics", "/nothing", "/events/a?since=earliest"] {
        let mut wire = Wire::connect(server.addr().unwrap());
        let request = format!("HEAD {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        wire.send(request.as_bytes());
        let head = wire.head();
        assert_eq!(head.contains("text/event-stream"), target.starts_with("/events"), "{head}");
        assert!(wire.rest().is_empty(), "{target}");
    }
    for (target, fields) in [("/?x=%zz", ""), ("/", "Host: localhost\r\n")] {
        let mut wire = Wire::connect(server.addr().unwrap());
        wire.send(format!("HEAD {target} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n").as_bytes());
        assert!(wire.head().starts_with("HTTP/1.1 400 "), "{target}");
        assert!(wire.rest().is_empty(), "what cannot be read is refused without a body, too");
    }
}

#[test]
fn the_date_of_an_answer_is_the_systems() {
    let server = serve_default();
    let system = || {
        let output = output(Command::new("date").args(["-u", "+%a, %d %b %Y %H:%M:%S GMT"]).env("LC_ALL", "C"));
        String::from_utf8(output.stdout).unwrap().trim_end().to_string()
    };
    wait_for("both to be asked in the same second", || {
        let (before, answer, after) = (system(), get(server.addr().unwrap(), "/health"), system());
        assert!(answer.header("date").is_some());
        (before == after).then(|| assert_eq!(answer.header("date"), Some(before.as_str())))
    });
}

#[test]
fn the_head_of_a_stream_keeps_proxies_from_holding_it_back() {
    let server = serve_default();
    let head = both::the_head_of_a_stream_keeps_proxies_from_holding_it_back(server.addr().unwrap());
    assert!(header(&head, "date").is_some_and(|date| date.ends_with(" GMT") && date.len() == 29), "{head}");
    assert_eq!(header(&head, "transfer-encoding"), Some("chunked"));
}

/// The bytes of a stream of HTTP/1.1, from its first block on: an event is one chunk, which no proxy and no client need put
/// together.
#[test]
fn each_event_of_a_stream_is_exactly_one_chunk() {
    let server = serve(Config::default().with(|config| config.retry = Duration::from_millis(1234)));
    let (addr, hub) = (server.addr().unwrap(), server.hub());
    let kept = hub.publish("a", Event::new("kept")).unwrap();
    let mut wire = Wire::connect(addr);
    wire.send(b"GET /events/a?last_event_id=1-1 HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(wire.take_until(b"\r\n\r\n").is_some()); // the head, without reading on as chunks
    let mut next_is = |frame: String| {
        let chunk = format!("{:x}\r\n{frame}\r\n", frame.len());
        assert_eq!(String::from_utf8(wire.take(chunk.len())).unwrap(), chunk);
    };
    let before = match kept.seq {
        0 => Id { ms: kept.ms - 1, seq: u64::MAX },
        seq => Id { seq: seq - 1, ..kept },
    };
    next_is("retry: 1234\n\n".into()); // the gap brings the id
    next_is(format!("event: gap\ndata: {{\"after\":\"1-1\",\"oldest\":\"{kept}\"}}\nid: {before}\n\n"));
    next_is(format!("data: kept\nid: {kept}\n\n")); // replayed
    wait_for_metric(addr, "subscribers", 1);
    let ids: Vec<Id> = (0..20).map(|n| hub.publish("a", Event::new(format!("live {n}"))).unwrap()).collect();
    for (n, id) in ids.into_iter().enumerate() {
        next_is(format!("data: live {n}\nid: {id}\n\n"));
    }
}

/// What HTTP/1.0 gets is the same without chunks, also where both follow a topic.
#[test]
fn http_1_0_gets_the_same_stream_without_chunks() {
    let server = bind(Config::default().with(|config| config.heartbeat = Duration::from_secs(4))).unwrap();
    server
        .stream("/two", |stream| {
            stream.send(&Event::new("one"))?;
            stream.comment("two")
        })
        .unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    let ask = |version: &str, target: &str| {
        let mut wire = Wire::connect(addr);
        wire.send(format!("GET {target} HTTP/{version}\r\nHost: localhost\r\n\r\n").as_bytes());
        let head = wire.head();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && header(&head, "connection") == Some("close"), "{head}");
        assert_eq!(header(&head, "transfer-encoding"), (version == "1.1").then_some("chunked"), "{head}");
        wire
    };
    let mut wires = ["1.0", "1.1", "1.0", "1.1"].map(|version| ask(version, "/events/a"));
    let mut bytes: Vec<_> = wires.iter_mut().map(|wire| wire.take_until(b"\n\n").unwrap()).collect();
    for n in 0..100 {
        server.hub().publish("a", Event::new(format!("{n} {}", "x".repeat(n * 20)))).unwrap();
    }
    // The last of what is compared is a heartbeat each.
    for (bytes, wire) in bytes.iter_mut().zip(&mut wires) {
        bytes.extend(wire.take_until(b"\n\n:\n").unwrap());
    }
    assert!(bytes.iter().all(|other| *other == bytes[0]), "the same events for all");
    assert_eq!(bytes[0].windows(6).filter(|w| w == b"data: ").count(), 100);
    assert!(!bytes[0].contains(&b'\r'));
    assert_eq!(String::from_utf8(ask("1.0", "/two").rest()).unwrap(), "data: one\n\n:two\n");
    drop(server);
    for mut wire in wires {
        let end = String::from_utf8(wire.rest()).unwrap();
        assert!(end.ends_with("\n\n") && !end.contains('\r'), "{end:?}");
    }
}

/// Wherever the server ends a stream after a whole frame, the last chunk says so; where it is cut, nothing does.
#[test]
fn a_stream_that_the_server_ends_has_its_last_chunk_and_a_cut_one_has_none() {
    let config = Config::default().with(|config| {
        config.subscribers = 1;
        config.lifetime = Duration::from_millis(300);
    });
    let server = bind(config).unwrap();
    server.stream("/done", |stream| stream.send(&Event::new("x"))).unwrap();
    server.stream("/nothing", |_| Ok(())).unwrap();
    server.stream("/error", |_| Err(std::io::Error::other("on purpose"))).unwrap();
    server.stream("/waits", |stream| stream.sleep(Duration::from_secs(3_600))).unwrap();
    server
        .stream("/panic", |stream| {
            stream.send(&Event::new("x"))?;
            panic!("on purpose")
        })
        .unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    for (target, ends) in [
        ("/events/a", true),
        ("/events/a?poll=1ms", true),
        ("/done", true),
        ("/nothing", true),
        ("/error", true),
        ("/panic", false),
    ] {
        wait_for_metric(addr, "subscribers", 0);
        let mut wire = Wire::stream(addr, target, "");
        wire.rest();
        assert_eq!(wire.is_over(), ends, "{target}");
    }
    wait_for_metric(addr, "subscribers", 0);
    let mut waits = Wire::stream(addr, "/waits", "");
    wait_for_metric(addr, "subscribers", 1);
    let mut away = Wire::stream(addr, "/events/a", "");
    away.rest();
    assert!(away.is_over(), "no room");
    drop(server);
    waits.rest();
    assert!(waits.is_over(), "stopping");
}

/// 18 is a transfer that ended before its end: what a script needs to tell an end from a cut.
#[test]
fn curl_can_tell_a_streams_end_from_a_cut() {
    if !has("curl") {
        return;
    }
    let mut process = Process::start(&["--lifetime", "1s"]);
    let url = format!("http://{}/events/a", process.addr);
    let curl = |url: &str| Command::new("curl").args(["-sN", url]).stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(curl(&url).wait().unwrap().code(), Some(0), "the lifetime is over");
    assert_eq!(curl(&format!("{url}?poll=1ms")).wait().unwrap().code(), Some(0), "the poll is over");
    let mut cut = curl(&format!("http://{}/test", process.addr));
    cut.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap(); // it has the head
    process.child.kill().unwrap();
    assert_eq!(cut.wait().unwrap().code(), Some(18));
}

#[test]
fn an_answer_without_content_names_no_type() {
    let server = bind(Config::default()).unwrap();
    server
        .route("/mine/", |request| {
            let status = request.rest().parse().map_err(io::Error::other)?;
            Ok(Answer::new(status, "text/plain", ""))
        })
        .unwrap();
    let server = server.spawn().unwrap();
    let mut wire = Wire::connect(server.addr().unwrap());
    for (request, status) in [
        ("OPTIONS /events/a", 204),
        ("OPTIONS *", 204),
        ("OPTIONS /mine/", 204),
        ("GET /mine/204", 204),
        ("GET /mine/304", 304),
        ("GET /mine/200", 200),
    ] {
        wire.send(format!("{request} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes());
        let answer = wire.answer();
        assert_eq!((answer.status, answer.body.as_str()), (status, ""), "{request}");
        let is_named = answer.header("content-type").is_some() || answer.header("content-length").is_some();
        assert_eq!(is_named, status == 200, "{request}: {}", answer.head);
    }
}
