//! Reading a request, and the answer that each kind of bad one gets.

use crate::{both, common::*};
use std::thread;

/// Each of these became more than a hundred bytes, for as long as the stream was open.
#[test]
fn a_query_of_very_many_parameters_is_refused() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let many = |count: usize| format!("/events/a?poll=1ms&{}", "_a&".repeat(count - 1));
    assert_eq!(get(addr, &many(100)).status, 200);
    let refused = get(addr, &many(101));
    assert_eq!((refused.status, refused.body.as_str()), (400, "more than 100 parameters\n"));
}

#[test]
fn each_bad_request_gets_the_answer_of_the_table_and_the_next_connection_works() {
    let host = "Host: localhost\r\n";
    let long = "x".repeat(64 * 1024 + 1);
    let head = |lines: &str| format!("GET /health HTTP/1.1\r\n{host}{lines}\r\n");
    let to = |method: &str, target: &str| format!("{method} {target} HTTP/1.1\r\n{host}\r\n");
    let body = |target: &str, fields: &str, body: &str| format!("POST {target} HTTP/1.1\r\n{host}{fields}\r\n{body}");
    let length = |n: usize| format!("Content-Length: {n}\r\n");
    let chunked = "Transfer-Encoding: chunked\r\n";
    let table = [
        // What is asked for.
        (404, "there is nothing at \"/nothing\"", to("GET", "/nothing")),
        (404, "there is nothing at", to("GET", "/events")),
        (404, "there is nothing at", to("POST", "/nothing")),
        (405, "DELETE is not for", to("DELETE", "/health")),
        (405, "POST is not for", to("POST", "/topics")),
        (405, "POST is not for", to("POST", "/health")),
        (501, "the method \"BREW\" is not known", to("BREW", "/health")),
        (400, "is no topic name", to("GET", "/events/")),
        (400, "is no topic name", to("GET", "/events/a,")),
        (400, "hides a slash", to("GET", "/events/a%2Fb")),
        (400, "is no topic name", to("GET", "/events/a%00")),
        (400, "is no topic name", to("GET", &format!("/events/{}", "n".repeat(129)))),
        (400, "is no topic name", to("POST", "/events/a,b%20c")),
        (400, "is no topic name", to("POST", "/events/a,,b")),
        (400, "\"a,b\" is no topic name", to("PUT", "/events/a,b")),
        (400, "\"a,b\" is no topic name", to("DELETE", "/events/a,b")),
        (400, "is no topic name: that is 1 to 128 of A-Z a-z 0-9 . _ ~ - : @", to("DELETE", "/events/a%2A")),
        (400, "is no topic name", to("PUT", "/events/a%20b")),
        (
            400,
            "up to 64 topics",
            to("GET", &format!("/events/{}", (0..65).map(|n| n.to_string()).collect::<Vec<_>>().join(","))),
        ),
        (400, "since is earliest", to("GET", "/events/a?since=yesterday")),
        (400, "since is earliest", to("GET", "/events/a?since=")),
        (400, "poll: \"10\" is no length of time", to("GET", "/events/a?poll=10")),
        (
            400,
            "the parameter \"sinse\" is not known: since, last, poll, take, as, last_event_id, lastEventId, lastEventID are",
            to("GET", "/events/a?_=1&since=earliest&sinse=1h"),
        ),
        (400, "the parameter \"\" is not known", to("GET", "/events/a?=1")),
        (400, "the parameter \"evnet\" is not known: event, retry, key are", to("POST", "/events/a?evnet=x")),
        (400, "the parameter \"all\" is not known: none is taken here", to("DELETE", "/events/a?all")),
        (400, "the parameter \"key\" is not known", to("PUT", "/events/a?key=x")),
        (400, "holds CR, LF or NUL", to("POST", "/events/a?event=a%0Ab")),
        (400, "holds CR, LF or NUL", to("POST", "/events/a?event=a%0Db")),
        (400, "holds CR, LF or NUL", to("POST", "/events/a?event=a%00b")),
        (400, "the key \"a\\nb\" holds CR, LF or NUL", to("POST", "/events/a?key=a%0Ab")),
        (400, "holds CR, LF or NUL", to("POST", "/events/a?key=a%0D")),
        (400, "holds CR, LF or NUL", to("POST", "/events/a?key=%00a")),
        (400, "the event name gap", to("POST", "/events/a?event=gap")),
        (400, "a key of 0 bytes", to("POST", "/events/a?key=")),
        (400, "a key of 1025 bytes", to("POST", &format!("/events/a?key={}", "k".repeat(1025)))),
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
        (400, "is no request line", "GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n".into()),
        (400, "is no request line", to("GET", "/pa th")),
        (400, "is no request line", to("GET", "")),
        (400, "is no request line", to("G(ET", "/health")),
        (400, "is no request line", format!("GET /health\r\n{host}\r\n")),
        (400, "is no request line", format!("GET /health HTTP/ 1.1\r\n{host}\r\n")),
        (400, "\"HTTP/1\" is no version of HTTP", format!("GET / HTTP/1\r\n{host}\r\n")),
        (400, "\"HTTP/01.01\" is no version of HTTP", format!("GET / HTTP/01.01\r\n{host}\r\n")),
        (400, "\"HTTP/1.10\" is no version of HTTP", format!("GET / HTTP/1.10\r\n{host}\r\n")),
        (400, "\"http/1.1\" is no version of HTTP", format!("GET / http/1.1\r\n{host}\r\n")),
        (505, "HTTP/3.0 is not spoken here", format!("GET / HTTP/3.0\r\n{host}\r\n")),
        (400, "is no target: 'é' must be percent-encoded", to("GET", "/events/café")),
        (400, "is no target: '|' must be percent-encoded", to("GET", "/events/a?since=1|2")),
        (400, "ends with LF alone", "GET /health HTTP/1.1\nHost: x\n\n".into()),
        (400, "ends with LF alone", "GET /health HTTP/1.1\r\nHost: x\n\r\n".into()),
        (
            505,
            "HTTP/2.0 is not spoken here, only HTTP/1.0 and HTTP/1.1",
            "GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n".into(),
        ),
        (400, "an event name of 257 bytes", to("POST", &format!("/events/a?event={}", "n".repeat(257)))),
        (400, "the transfer coding", body("/events/a", "Transfer-Encoding: \u{a0}chunked\r\n", "")),
        (400, "is no Content-Length", body("/events/a", "Content-Length: \u{3000}2\r\n", "hi")),
        (417, "is not expected", head("Expect: a-miracle\r\n")),
        (431, "more than 100 header lines", head(&"X: y\r\n".repeat(200))),
        (431, "the head is longer than the 16384 bytes", head(&format!("X: {}\r\n", "y".repeat(20_000)))),
        (414, "the request line is longer than", format!("GET /{} HTTP/1.1\r\n", "y".repeat(20_000))),
        (501, "a method of more than 16384 bytes is not known", to(&"M".repeat(100_000), "/health")),
        (400, "is no request line", to(&"é".repeat(50_000), "/health")),
        (400, "is no request line", format!("GET /health HTTP/1.1{}\r\n", " ".repeat(20_000))),
        (408, "did not come whole", "GET /health HTTP/1.1\r\n".into()),
        // Bodies.
        (413, "longer than 65536 bytes", body("/events/a", &length(65_537), &long)),
        (413, "longer than 65536 bytes", body("/events/a", chunked, &format!("10001\r\n{long}\r\n0\r\n\r\n"))),
        (413, "longer than 65536 bytes", body("/events/a", &length(usize::MAX), "")),
        (413, "longer than 65536 bytes", body("/events/a", chunked, "10001\r\n")),
        (
            413,
            "longer than 65536 bytes",
            format!("GET /health HTTP/1.1\r\n{host}{chunked}\r\n{}", "ffffffffffffffff\r\n"),
        ),
        (
            413,
            "longer than 65536 bytes",
            body("/events/a", chunked, &format!("{:x}\r\n{}\r\n2\r\n", 65_535, &long[..65_535])),
        ),
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
        (400, "\"chunked, chunked\" is not known", body("/events/a", &format!("{chunked}{chunked}"), "")),
        (
            501,
            "\"gzip, chunked\" is not known",
            body("/events/a", &format!("Transfer-Encoding: gzip\r\n{chunked}"), ""),
        ),
        (
            400,
            "\"chunked, gzip\" is not known",
            body("/events/a", &format!("{chunked}Transfer-Encoding: gzip\r\n"), ""),
        ),
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
    ];
    let (late, others): (Vec<_>, Vec<_>) = table.into_iter().partition(|(status, ..)| *status == 408);
    let servers = [serve(short_times()), serve_default()];
    let [short, addr] = [0, 1].map(|n| servers[n].addr().unwrap());
    let ask = |addr, rows: &[_]| {
        let works = |after: &str| assert_eq!(get(addr, "/health").body, "ok\n", "after {after:?}");
        both::each_bad_request_gets_its_answer(addr, rows, works);
    };
    thread::scope(|scope| {
        late.chunks(1).for_each(|row| drop(scope.spawn(|| ask(short, row))));
        ask(addr, &others);
    });
    assert_eq!((metric(short, "published_total"), metric(addr, "published_total")), (0, 0));
    let mut wire = Wire::connect(addr);
    wire.send(b"POST /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nab\xff\xfe");
    let answer = wire.answer();
    assert_eq!((answer.status, answer.body.as_str()), (400, "the body is not UTF-8 from byte 2 on\n"));
}

#[test]
fn a_request_may_come_one_byte_at_a_time() {
    let server = serve_default();
    let mut wire = Wire::connect(server.addr().unwrap());
    let chunked = "POST /events/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3 ;x=\"y\"\r\nabc\r\n0\r\n\r\n";
    for request in [HEALTH, "POST /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc", chunked] {
        for byte in request.bytes() {
            wire.send(&[byte]);
        }
        assert_eq!(wire.answer().status, 200);
    }
}

#[test]
fn the_absolute_form_of_a_target_is_taken() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    assert_eq!(get(addr, "http://localhost:80/health").body, "ok\n");
    assert_eq!(get(addr, "http://localhost").status, 404);
    assert_eq!(get(addr, "http://127.0.0.1?x=y").status, 404);
}

/// A minor version that is not known is read as the highest that is (RFC 9110 §2.5).
#[test]
fn http_1_2_is_read_as_1_1() {
    let server = serve_default();
    let mut wire = Wire::connect(server.addr().unwrap());
    for _ in 0..2 {
        wire.send(b"GET /health HTTP/1.2\r\nHost: localhost\r\n\r\n");
        let answer = wire.answer();
        assert_eq!((answer.status, answer.header("connection")), (200, Some("keep-alive")), "and its connection stays");
    }
    wire.send(b"GET /health HTTP/1.9\r\n\r\n");
    assert_eq!(wire.answer().status, 400, "without a Host");
}

#[test]
fn a_character_that_no_target_may_have_is_refused_and_the_same_encoded_is_read() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    for c in "\"<>\\^`{|}é\u{a0}".chars() {
        for target in [format!("/a{c}b"), format!("/health?a={c}")] {
            let answer = get(addr, &target);
            assert_eq!(answer.status, 400, "{target:?}: {}", answer.body);
            assert!(answer.body.contains("must be percent-encoded"), "{}", answer.body);
        }
        let encoded: String = c.to_string().bytes().map(|byte| format!("%{byte:02X}")).collect();
        assert_eq!(get(addr, &format!("/a{encoded}b")).status, 404);
        assert_eq!(get(addr, &format!("/health?a={encoded}")).status, 200);
    }
    assert_eq!(get(addr, "/health?a=!$&'()*+,;=:@/?-._~[]%20").status, 200);
}
