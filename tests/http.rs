//! HTTP over raw bytes: what is understood, and the answer that each kind of bad input gets.

use crate::common::*;
use brooklet::{Config, Event, Server};
use std::net::TcpStream;
use std::process::Command;
use std::thread;
use std::time::Duration;

const GET: &str = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";

fn short_times() -> Config {
    let short = Duration::from_millis(200);
    Config { head_time: short, body_time: short, idle_time: short, ..Config::default() }
}

#[test]
fn each_bad_request_gets_the_answer_of_the_table_and_the_next_connection_works() {
    let server = serve(short_times());
    let addr = server.addr().unwrap();
    let host = "Host: localhost\r\n";
    let long = "x".repeat(64 * 1024 + 1);
    let head = |lines: &str| format!("GET /health HTTP/1.1\r\n{host}{lines}\r\n");
    let to = |method: &str, target: &str| format!("{method} {target} HTTP/1.1\r\n{host}\r\n");
    let body = |target: &str, fields: &str, body: &str| format!("POST {target} HTTP/1.1\r\n{host}{fields}\r\n{body}");
    let length = |n: usize| format!("Content-Length: {n}\r\n");
    let chunked = "Transfer-Encoding: chunked\r\n";
    for (status, said, request) in [
        // What is asked for.
        (404, "there is nothing at \"/nothing\"", to("GET", "/nothing")),
        (404, "there is nothing at", to("GET", "/events")),
        (404, "there is nothing at", to("POST", "/nothing")),
        (405, "DELETE is not for", to("DELETE", "/events/a")),
        (405, "POST is not for", to("POST", "/health")),
        (501, "the method \"BREW\" is not known", to("BREW", "/health")),
        (400, "is no topic name", to("GET", "/events/")),
        (400, "is no topic name", to("GET", "/events/a,")),
        (400, "hides a slash", to("GET", "/events/a%2Fb")),
        (400, "is no topic name", to("GET", "/events/a%00")),
        (400, "is no topic name", to("GET", &format!("/events/{}", "n".repeat(65)))),
        (400, "is no topic name", to("POST", "/events/a,b")),
        (400, "is no topic name", to("PUT", "/events/a%20b")),
        (
            400,
            "up to 16 topics",
            to("GET", &format!("/events/{}", (0..17).map(|n| n.to_string()).collect::<Vec<_>>().join(","))),
        ),
        (400, "since is earliest", to("GET", "/events/a?since=yesterday")),
        (400, "since is earliest", to("GET", "/events/a?since=")),
        (400, "is no length of time", to("GET", "/events/a?poll=10")),
        (400, "the parameter \"evnet\" is not known", to("POST", "/events/a?evnet=x")),
        (400, "the parameter \"key\" is not known", to("PUT", "/events/a?key=x")),
        (400, "holds CR, LF or NUL", to("POST", "/events/a?event=a%0Ab")),
        (400, "holds CR, LF or NUL", to("POST", "/events/a?event=a%0Db")),
        (400, "holds CR, LF or NUL", to("POST", "/events/a?event=a%00b")),
        (400, "the key \"a\\nb\" holds CR, LF or NUL", to("POST", "/events/a?key=a%0Ab")),
        (400, "holds CR, LF or NUL", to("POST", "/events/a?key=a%0D")),
        (400, "holds CR, LF or NUL", to("POST", "/events/a?key=%00a")),
        (400, "the event name gap", to("POST", "/events/a?event=gap")),
        (400, "a key of 0 bytes", to("POST", "/events/a?key=")),
        (400, "a key of 129 bytes", to("POST", &format!("/events/a?key={}", "k".repeat(129)))),
        (400, "no number of milliseconds", to("POST", "/events/a?retry=5s")),
        (400, "no number of milliseconds", to("POST", "/events/a?retry=%2B5")),
        (400, "no number of milliseconds", to("POST", "/events/a?retry=99999999999")),
        (400, "is not percent-encoded UTF-8", to("GET", "/events/%FF")),
        (400, "is not percent-encoded UTF-8", to("GET", "/events/%4")),
        (400, "is not percent-encoded UTF-8", to("GET", "/events/a?since=%zz")),
        (400, "is not percent-encoded UTF-8", to("GET", "/events/%+1")),
        // How it is asked.
        (400, "is no target", to("GET", "health")),
        (400, "is no target", to("GET", "*")),
        (400, "is no target", to("GET", "/health#top")),
        (501, "is for proxies", to("CONNECT", "localhost:80")),
        (400, "Host is missing", "GET /health HTTP/1.1\r\n\r\n".into()),
        (400, "Host stands twice", head("Host: other\r\n")),
        (400, "Host stands twice", head(host)),
        (400, "cannot be read", head("Folded: a\r\n b\r\n")),
        (400, "cannot be read", head("Space : a\r\n")),
        (400, "cannot be read", head("Bare: a\rb\r\n")),
        (400, "cannot be read", head("Nul: a\0b\r\n")),
        (400, "cannot be read", "GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n".into()),
        (400, "ends with LF alone", "GET /health HTTP/1.1\nHost: x\n\n".into()),
        (400, "ends with LF alone", "GET /health HTTP/1.1\r\nHost: x\n\r\n".into()),
        (505, "only HTTP/1.0 and HTTP/1.1", "GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n".into()),
        (400, "an event name of 257 bytes", to("POST", &format!("/events/a?event={}", "n".repeat(257)))),
        (400, "the transfer coding", body("/events/a", "Transfer-Encoding: \u{a0}chunked\r\n", "")),
        (400, "is no Content-Length", body("/events/a", "Content-Length: \u{3000}2\r\n", "hi")),
        (417, "is not expected", head("Expect: a-miracle\r\n")),
        (431, "more than 100 header lines", head(&"X: y\r\n".repeat(200))),
        (431, "the head is longer than the 16384 bytes", head(&format!("X: {}\r\n", "y".repeat(20_000)))),
        (414, "the request line is longer than", format!("GET /{} HTTP/1.1\r\n", "y".repeat(20_000))),
        (408, "did not come whole", "GET /health HTTP/1.1\r\n".into()),
        // Bodies.
        (413, "longer than 65536 bytes", body("/events/a", &length(65_537), &long)),
        (413, "longer than 65536 bytes", body("/events/a", chunked, &format!("10001\r\n{long}\r\n0\r\n\r\n"))),
        (413, "longer than 65536 bytes", body("/events/a", &length(usize::MAX), "")),
        (413, "longer than 65536 bytes", body("/events/a", &format!("{}Expect: 100-continue\r\n", length(70_000)), "")),
        (
            400,
            "together say two things",
            body("/events/a", &format!("{}{chunked}", length(5)), "5\r\nhello\r\n0\r\n\r\n"),
        ),
        (400, "Content-Length stands twice", body("/events/a", &format!("{}{}", length(5), length(6)), "hello!")),
        (400, "is no Content-Length", body("/events/a", "Content-Length: +5\r\n", "hello")),
        (400, "is no Content-Length", body("/events/a", "Content-Length: 5, 5\r\n", "hello")),
        (400, "is no Content-Length", body("/events/a", "Content-Length: 99999999999999999999\r\n", "hello")),
        (400, "is no Content-Length", body("/events/a", "Content-Length: \r\n", "hello")),
        (501, "the transfer coding", body("/events/a", "Transfer-Encoding: gzip, chunked\r\n", "")),
        (400, "Transfer-Encoding stands twice", body("/events/a", &format!("{chunked}{chunked}"), "")),
        (400, "HTTP/1.0 has no Transfer-Encoding", format!("POST /events/a HTTP/1.0\r\n{chunked}\r\n")),
        (400, "is no chunk size", body("/events/a", chunked, "+5\r\nhello\r\n0\r\n\r\n")),
        (400, "is no chunk size", body("/events/a", chunked, "0x5\r\nhello\r\n0\r\n\r\n")),
        (400, "is no chunk size", body("/events/a", chunked, "\r\nhello\r\n0\r\n\r\n")),
        (400, "is no chunk size", body("/events/a", chunked, "11111111111111111\r\nhello\r\n0\r\n\r\n")),
        (400, "does not end with CRLF", body("/events/a", chunked, "5\nhello\r\n0\r\n\r\n")),
        (400, "longer than its size says", body("/events/a", chunked, "5\r\nhello!\r\n0\r\n\r\n")),
        (400, "a chunk's line is longer", body("/events/a", chunked, &format!("5;{}", "e".repeat(5_000)))),
        (400, "a chunk's line is longer", body("/events/a", chunked, &format!("5;{}\r\nhello\r\n", "e".repeat(300)))),
        (400, "is no trailer field", body("/events/a", chunked, "0\r\nno field\r\n\r\n")),
        (408, "the body took too long", body("/events/a", &length(5), "hel")),
        (408, "the body took too long", body("/events/a", chunked, "5\r\nhel")),
        (408, "the body took too long", format!("PUT /events/a HTTP/1.1\r\n{host}{}\r\nbegun", length(50))),
    ] {
        let mut wire = Wire::connect(addr);
        wire.send(request.as_bytes());
        let answer = wire.answer();
        let shown = &request[..request.len().min(120)];
        assert_eq!(answer.status, status, "{shown:?}: {}", answer.body);
        assert!(answer.body.contains(said), "{shown:?} got {:?}, which does not say {said:?}", answer.body);
        assert!(answer.body.ends_with('\n') && answer.body.matches('\n').count() == 1, "one line: {:?}", answer.body);
        assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
        assert_eq!(answer.header("allow").is_some(), status == 405, "{shown:?}");
        assert_eq!(get(addr, "/health").body, "ok\n", "after {shown:?}");
    }
    assert_eq!(metric(addr, "published_total"), 0);
    let mut wire = Wire::connect(addr);
    wire.send(b"POST /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nab\xff\xfe");
    let answer = wire.answer();
    assert_eq!((answer.status, answer.body.as_str()), (400, "the body is not UTF-8 from byte 2 on\n"));
}

#[test]
fn a_refused_body_does_not_destroy_its_answer() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    for _ in 0..20 {
        let mut wire = Wire::connect(addr);
        wire.send(b"POST /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000000\r\n\r\n");
        let mut copy = wire.socket.try_clone().unwrap();
        let sender = thread::spawn(move || std::io::Write::write_all(&mut copy, &vec![b'x'; 2_000_000]).is_ok());
        assert_eq!(wire.answer().status, 413);
        sender.join().unwrap();
    }
}

#[test]
fn a_request_may_come_one_byte_at_a_time() {
    let server = serve_default();
    let mut wire = Wire::connect(server.addr().unwrap());
    let chunked = "POST /events/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3 ;x=\"y\"\r\nabc\r\n0\r\n\r\n";
    for request in [GET, "POST /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc", chunked] {
        for byte in request.bytes() {
            wire.send(&[byte]);
        }
        assert_eq!(wire.answer().status, 200);
    }
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let server = serve_default();
    let mut wire = Wire::connect(server.addr().unwrap());
    let post = "POST /events/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n";
    let missing = "GET /missing HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let options = "OPTIONS /events/a HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let last = "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive, Close\r\n\r\n";
    wire.send(format!("{GET}\r\n{post}{missing}{options}{last}{GET}").as_bytes());
    let statuses: Vec<u16> = (0..5).map(|_| wire.answer().status).collect();
    assert_eq!(statuses, [200, 200, 404, 204, 200]);
    assert!(wire.rest().is_empty(), "nothing after Connection: close");
}

#[test]
fn a_stream_may_follow_other_requests_on_its_connection() {
    let server = serve_default();
    let mut wire = Wire::connect(server.addr().unwrap());
    wire.send(format!("{GET}GET /events/a HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes());
    assert_eq!(wire.answer().body, "ok\n");
    assert!(wire.head().contains("text/event-stream"));
    assert!(wire.block().is_some());
    wire_arrives(&server, &mut wire);
}

fn wire_arrives(server: &brooklet::Handle, wire: &mut Wire) {
    server.hub().publish("a", Event::new("hello")).unwrap();
    assert_eq!(wire.event().unwrap().data(), "hello");
}

#[test]
fn a_client_that_waits_for_100_continue_is_told_to_go_on() {
    let server = serve_default();
    let mut wire = Wire::connect(server.addr().unwrap());
    for method in ["POST", "PUT"] {
        let head = format!(
            "{method} /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nExpect: 100-Continue\r\n\r\n"
        );
        wire.send(head.as_bytes());
        assert_eq!(wire.head(), "HTTP/1.1 100 Continue\r\n\r\n");
        wire.send(b"hi");
        assert_eq!(wire.answer().status, 200);
    }
    wire.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(wire.answer().status, 200, "no body, nothing to wait for");
}

#[test]
fn http_1_0_is_answered_and_closed() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let mut wire = Wire::connect(addr);
    wire.send(b"GET /health HTTP/1.0\r\n\r\n");
    let answer = wire.answer();
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    assert!(wire.rest().is_empty());
    let mut wire = Wire::connect(addr);
    wire.send(b"GET /events/a HTTP/1.0\r\n\r\n");
    assert!(wire.head().contains("text/event-stream"));
    assert!(wire.block().is_some());
    wire_arrives(&server, &mut wire);
}

#[test]
fn the_absolute_form_of_a_target_is_taken() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    assert_eq!(get(addr, "http://localhost:80/health").body, "ok\n");
    assert_eq!(get(addr, "http://localhost").status, 404);
    assert_eq!(get(addr, "http://127.0.0.1?x=y").status, 404);
}

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
fn options_names_the_methods() {
    let server = serve_default();
    for (target, allow) in [
        ("/events/a", "GET, HEAD, POST, PUT, OPTIONS"),
        ("*", "GET, HEAD, POST, PUT, OPTIONS"),
        ("/health", "GET, HEAD, OPTIONS"),
    ] {
        let answer =
            Wire::ask(server.addr().unwrap(), &format!("OPTIONS {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        assert_eq!((answer.status, answer.header("allow")), (204, Some(allow)), "{target}");
        assert_eq!(answer.header("content-length"), None, "RFC 9110 §8.6");
    }
}

#[test]
fn silent_and_idle_connections_are_closed_without_a_word() {
    let server = serve(short_times());
    let addr = server.addr().unwrap();
    assert!(Wire::connect(addr).rest().is_empty());
    let mut wire = Wire::connect(addr);
    wire.send(GET.as_bytes());
    assert_eq!(wire.answer().status, 200);
    assert!(wire.rest().is_empty());
    wait_for_metric(addr, "connections", 1);
}

#[test]
fn at_the_limit_the_connection_that_waited_longest_makes_room() {
    let server = serve(Config { connections: 4, subscribers: 0, ..Config::default() });
    let addr = server.addr().unwrap();
    let mut slow: Vec<Wire> = (0..4).map(|_| Wire::connect(addr)).collect();
    slow.iter_mut().for_each(|wire| wire.send(b"GET /health HTTP/1.1\r\n"));
    let mut newcomer = Wire::connect(addr);
    newcomer.send(GET.as_bytes());
    assert_eq!(newcomer.answer().status, 200);
    assert!(slow.remove(0).rest().is_empty(), "the oldest was closed");
    let mut second = Wire::connect(addr);
    second.send(GET.as_bytes());
    assert_eq!(second.answer().status, 200);
}

#[test]
fn when_all_places_are_taken_the_one_that_is_busy_longest_makes_room() {
    let server = serve(Config { connections: 2, subscribers: 1, ..Config::default() });
    let addr = server.addr().unwrap();
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
    let mut publishers: Vec<Wire> = (0..2).map(|_| Wire::connect(addr)).collect();
    for wire in &mut publishers {
        wire.send(b"PUT /events/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\na\n\r\n");
        assert_eq!(stream.event().unwrap().data(), "a");
    }
    // The first says something again, so the second has been silent for longer now.
    publishers[0].send(b"2\r\nb\n\r\n");
    assert_eq!(stream.event().unwrap().data(), "b");
    assert_eq!(get(addr, "/health").status, 200, "a crowd of slow bodies does not lock others out");
    assert!(publishers[1].rest().is_empty(), "closed without an answer");
    publishers[0].send(b"0\r\n\r\n");
    assert_eq!(publishers[0].answer().status, 200);
}

#[test]
fn a_stream_without_room_gets_200_a_retry_and_its_end() {
    let server = serve(Config { subscribers: 2, ..Config::default() });
    let addr = server.addr().unwrap();
    let streams: Vec<_> = (0..2).map(|_| Wire::subscribe(addr, "/events/a", "")).collect();
    let mut retries = Vec::new();
    for _ in 0..20 {
        let mut wire = Wire::stream(addr, "/events/a", "");
        let seen = wire.block().unwrap();
        assert_eq!((seen.comments.len(), &seen.data, &seen.id), (1, &None, &None), "{seen:?}");
        retries.push(seen.retry.unwrap());
        assert!(wire.rest().is_empty());
    }
    assert!(retries.iter().all(|retry| (1_500..=4_500).contains(retry)), "{retries:?}");
    retries.dedup();
    assert!(retries.len() > 5, "the times are spread: {retries:?}");
    assert_eq!(get(addr, "/health").status, 200);
    assert_eq!(post(addr, "/events/a", "x").status, 200);
    drop(streams);
    wait_for("a place", || Wire::stream(addr, "/events/a", "").block()?.id);
}

#[test]
fn pages_and_handlers_live_beside_the_topics() {
    let server = Server::bind("127.0.0.1:0", Config::default()).unwrap();
    server.page("/style.css", "text/css", "body {}").unwrap();
    server
        .stream("/echo", |stream| {
            stream.comment("two\nlines")?;
            let text = format!("{:?} {:?}", stream.query("q"), stream.last_event_id());
            stream.send(&Event::new(text).name("echo").id("7").retry(Duration::from_millis(9)))?;
            assert!(stream.send(&Event::new("x").name("a\nb")).is_err());
            Ok(())
        })
        .unwrap();
    for path in ["relative", "/events/a", "/health"] {
        assert!(server.page(path, "text/plain", "x").is_err(), "{path}");
    }
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    let page = get(addr, "/style.css");
    assert_eq!((page.status, page.header("content-type"), page.body.as_str()), (200, Some("text/css"), "body {}"));
    let mut stream = Wire::stream(addr, "/echo?q=a%20b", "Last-Event-ID: 6\r\n");
    let expected = ":two\n:lines\nevent: echo\nid: 7\ndata: Some(\"a b\") Some(\"6\")\nretry: 9\n\n";
    assert_eq!(String::from_utf8(stream.rest()).unwrap(), expected);
}

#[test]
fn a_handler_that_panics_ends_only_its_own_stream() {
    let server = Server::bind("127.0.0.1:0", Config::default()).unwrap();
    server.stream("/panic", |_| panic!("on purpose")).unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    assert!(Wire::stream(addr, "/panic", "").rest().is_empty());
    wait_for_metric(addr, "subscribers", 0);
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
    wire_arrives(&server, &mut stream);
}

#[test]
fn a_connection_that_another_accept_loop_took_can_be_handed_in() {
    let server = serve_default();
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = Wire::on(TcpStream::connect(other.local_addr().unwrap()).unwrap());
    let (socket, _) = other.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    server.serve(socket).unwrap();
    client.send(b"GET /events/a HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(client.head().contains("text/event-stream"));
    client.block().unwrap();
    wire_arrives(&server, &mut client);
}

#[test]
fn stray_bytes_on_a_stream_are_thrown_away_up_to_a_limit() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
    stream.send(GET.as_bytes());
    wire_arrives(&server, &mut stream);
    stream.send(&[b'x'; 16 * 1024]);
    wait_for_metric(addr, "subscribers", 0);
}

#[test]
fn a_server_that_is_dropped_is_gone() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let hub = server.hub();
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
    drop(server);
    let end = String::from_utf8(stream.rest()).unwrap();
    assert!(end.starts_with(": the server is stopping\nretry: ") && end.ends_with("\n\n"), "{end:?}");
    assert!(TcpStream::connect(addr).is_err());
    assert!(hub.publish("a", Event::new("x")).is_err());
    drop(Server::bind(addr, Config::default()).unwrap()); // bound but never served
}

#[test]
fn the_date_of_an_answer_is_the_systems() {
    let server = serve_default();
    let system = || {
        let output =
            Command::new("date").args(["-u", "+%a, %d %b %Y %H:%M:%S GMT"]).env("LC_ALL", "C").output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim_end().to_string()
    };
    wait_for("both to be asked in the same second", || {
        let (before, answer, after) = (system(), get(server.addr().unwrap(), "/health"), system());
        assert!(answer.header("date").is_some());
        (before == after).then(|| assert_eq!(answer.header("date"), Some(before.as_str())))
    });
}
