//! What a program adds to its server: routes that see the request first, and the hook for subscribers.

use crate::common::*;
use brooklet::{Answer, Config, Event, Handle, Log, LogTo, Presence, Request, Server, Since, Token};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::panic::panic_any;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;

/// What comes back, whereas `Answer` is what a handler gives.
type Got = crate::common::Answer;

/// A server with one route.
fn with_route(
    path: &str,
    config: Config,
    handler: impl Fn(&Request) -> io::Result<Answer> + Send + Sync + 'static,
) -> (Handle, SocketAddr) {
    let server = bind(config).unwrap();
    server.route(path, handler).unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    (server, addr)
}

fn ask(addr: SocketAddr, head: &str, body: &str) -> Got {
    Wire::ask(addr, &format!("{head}\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}", body.len()))
}

#[test]
fn a_handler_sees_all_of_a_request() {
    let (_server, addr) = with_route("/jobs/", Config::default(), |request| {
        let said = format!(
            "{} {} {:?} q={:?} all={:?} fields={} accept={:?} session={:?} none={:?} id={:?} body={:?} local={}",
            request.method(),
            request.path(),
            request.rest(),
            request.query("q"),
            request.queries().collect::<Vec<_>>(),
            request.fields().count(),
            request.field("ACCEPT"),
            request.cookie("session"),
            request.cookie("sess"),
            request.last_event_id(),
            request.text()?,
            request.peer().ip().is_loopback(),
        );
        assert_eq!(request.body(), request.text()?.as_bytes());
        Ok(Answer::text(200, said))
    });
    let head = "POST /jobs/7/a%20b?q=1%2B1&q=2&flag HTTP/1.1\r\nHost: localhost\r\naccept: \t text/plain \r\n\
                Cookie: a=b; sessions=no\r\nCookie: c=d;session=x=y\r\nLast-Event-ID: 5-0\r\nTransfer-Encoding: chunked\r\n\r\n";
    let answer = Wire::ask(addr, &format!("{head}3\r\nhey\r\n4\r\n you\r\n0\r\n\r\n"));
    assert_eq!(
        answer.body,
        "POST /jobs/7/a b \"7/a b\" q=Some(\"1+1\") all=[(\"q\", \"1+1\"), (\"q\", \"2\"), (\"flag\", \"\")] fields=6 \
         accept=Some(\"text/plain\") session=Some(\"x=y\") none=None id=Some(\"5-0\") body=\"hey you\" local=true\n"
    );
    // A polyfill that cannot set the field says it in the query.
    assert!(get(addr, "/jobs/?lastEventId=6-0").body.contains("id=Some(\"6-0\")"));
}

#[test]
fn a_handler_answers_with_any_status_field_and_bytes_and_the_connection_goes_on() {
    let (_server, addr) = with_route("/", Config::default(), |request| {
        Ok(match request.rest() {
            "bytes" => Answer::new(200, "application/octet-stream", [0, 159, 255]).field("ETag", "\"7\""),
            "cookies" => Answer::empty(303)
                .field("Location", "/in")
                .field("Set-Cookie", "a=1; HttpOnly")
                .field("Set-Cookie", "b=2"),
            "204" => Answer::empty(204),
            "304" => Answer::empty(304).field("ETag", "\"7\""),
            "odd" => Answer::new(599, "text/plain", "odd"),
            other => Answer::text(404, format_args!("no {other:?}")),
        })
    });
    let mut wire = Wire::connect(addr);
    let mut ask = |target: &str| {
        wire.send(format!("GET /{target} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes());
        let head = wire.head();
        let length = header(&head, "content-length").map_or(0, |length| length.parse().unwrap());
        (head, wire.take(length))
    };
    let (head, body) = ask("bytes");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("\r\nETag: \"7\"\r\n"), "{head}");
    assert_eq!((header(&head, "content-type"), body), (Some("application/octet-stream"), vec![0, 159, 255]));
    let (head, body) = ask("cookies");
    assert!(
        head.starts_with("HTTP/1.1 303 See Other\r\n") && head.contains("\r\nSet-Cookie: a=1; HttpOnly\r\n"),
        "{head}"
    );
    assert!(head.contains("\r\nSet-Cookie: b=2\r\n") && header(&head, "content-length") == Some("0"), "{head}");
    assert!(header(&head, "content-type").is_none() && body.is_empty(), "{head}");
    for (target, begin) in [("204", "HTTP/1.1 204 No Content\r\n"), ("304", "HTTP/1.1 304 Not Modified\r\n")] {
        let (head, _) = ask(target);
        assert!(head.starts_with(begin) && header(&head, "content-length").is_none(), "RFC 9110 §8.6: {head}");
    }
    assert_eq!(ask("odd").1, b"odd");
    assert_eq!(ask("nothing/here").1, b"no \"nothing/here\"\n");
    assert_eq!(ask("health").1, b"ok\n", "the server's own paths come first");
    // Two in one: the second waits until the handler has answered the first.
    wire.send(&b"GET /one HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(2));
    assert_eq!([wire.answer().body, wire.answer().body], ["no \"one\"\n"; 2]);
}

#[test]
fn what_may_not_stand_in_a_head_is_answered_with_500_and_never_sent() {
    let (lines, log) = mpsc::channel();
    let mut config = Config::default().with(|config| config.log = brooklet::Log::Info);
    config.log_to = brooklet::LogTo::lines(move |line| lines.send(line.to_string()).unwrap());
    let (_server, addr) = with_route("/", config, |request| {
        Ok(match request.rest() {
            "status" => Answer::text(199, "x"),
            "high" => Answer::text(600, "x"),
            "body" => Answer::new(204, "text/plain", "x"),
            "type" => Answer::new(200, "text/plain\r\nX-Evil: 1", "x"),
            "name" => Answer::text(200, "x").field("X-Evil: 1\r\nX", "1"),
            "empty" => Answer::text(200, "x").field("", "1"),
            "value" => Answer::text(200, "x").field("X", "1\r\nX-Evil: 1"),
            "nul" => Answer::text(200, "x").field("X", "\0"),
            own => Answer::text(200, "x").field(own, "1"),
        })
    });
    let own = ["Content-Length", "transfer-encoding", "CONNECTION", "Date", "Access-Control-Allow-Origin", "Upgrade"];
    for target in ["status", "high", "body", "type", "name", "empty", "value", "nul"].into_iter().chain(own) {
        let answer = get(addr, &format!("/{target}"));
        assert_eq!((answer.status, answer.header("x-evil")), (500, None), "{target}: {answer:?}");
        assert_eq!(answer.body, "the program failed to answer; its log, if it has one, says why\n");
    }
    let line = log.iter().find(|line| line.contains("the handler of")).unwrap();
    assert!(line.ends_with("the handler of \"/status\" failed: the status 199 is none of 200 to 599"), "{line}");
}

#[test]
fn the_longest_route_that_fits_is_called() {
    let server = bind(Config::default()).unwrap();
    for path in ["/a/", "/a/b/", "/a/b", "/c"] {
        server.route(path, move |request| Ok(Answer::text(200, format_args!("{path} {}", request.rest())))).unwrap();
    }
    server.page("/p/", "text/plain", "page").unwrap();
    server.route("/c", |_| Ok(Answer::text(200, "anew"))).unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    for (target, said) in [
        ("/a/", "/a/ \n"),
        ("/a/x", "/a/ x\n"),
        ("/a/b", "/a/b \n"),
        ("/a/b/", "/a/b/ \n"),
        ("/a/b/c/d", "/a/b/ c/d\n"),
        ("/c", "anew\n"),
        ("/p/", "page"),
    ] {
        assert_eq!(get(addr, target).body, said, "{target}");
    }
    // Nothing is below a path that does not end in a slash, nor below a page.
    for target in ["/", "/a", "/c/", "/cc", "/p/x"] {
        assert_eq!(get(addr, target).status, 404, "{target}");
    }
}

#[test]
fn a_handlers_error_becomes_the_answer() {
    let (_server, addr) = with_route("/", Config::default().with(|config| config.topics = 1), |request| {
        Err(match request.rest() {
            "text" => return Ok(Answer::text(200, request.text()?)),
            "secret" => io::Error::other("the password is c0ffee"),
            "file" => std::fs::read("/nowhere").unwrap_err(),
            "panic" => panic!("on purpose"),
            kind => io::Error::new(
                match kind {
                    "quota" => ErrorKind::QuotaExceeded,
                    "full" => ErrorKind::StorageFull,
                    _ => ErrorKind::InvalidInput,
                },
                "as the hub says it",
            ),
        })
    });
    let mut wire = Wire::connect(addr);
    for (target, status, body) in [
        ("secret", 500, "the program failed to answer; its log, if it has one, says why\n"),
        ("file", 500, "the program failed to answer; its log, if it has one, says why\n"),
        ("panic", 500, "the program failed to answer; its log, if it has one, says why\n"),
        ("quota", 503, "as the hub says it\n"),
        ("full", 507, "as the hub says it\n"),
        ("wrong", 400, "as the hub says it\n"),
    ] {
        wire.send(format!("GET /{target} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes());
        let answer = wire.answer();
        assert_eq!((answer.status, answer.body.as_str()), (status, body), "{target}");
        assert_eq!(answer.header("retry-after").is_some(), [503, 507].contains(&status), "{target}");
    }
    let head = "POST /text HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\n".as_bytes();
    wire.send(&[head, &[b'a', 159, b'b']].concat());
    let answer = wire.answer();
    assert_eq!((answer.status, answer.body.as_str()), (400, "the body is not UTF-8 from byte 1 on\n"));
}

#[test]
fn a_handlers_error_is_one_line_of_the_log_whatever_stands_in_it() {
    let (lines, log) = mpsc::channel();
    let config = Config::default().with(|config| {
        config.log = brooklet::Log::Info;
        config.log_to = brooklet::LogTo::lines(move |line| lines.send(line.to_string()).unwrap());
    });
    let (_server, addr) = with_route("/", config, |request| {
        Err(io::Error::other(format!("no such job: {}", request.rest()))) // not quoted, as it should be
    });
    assert_eq!(get(addr, "/7%0Aa%20line%20of%20the%20peer's%1B[2J").status, 500);
    let line = log.iter().find(|line| line.contains("the handler of")).unwrap();
    assert!(line.ends_with(r"failed: no such job: 7\na line of the peer's\u{1b}[2J"), "{line}");
}

#[test]
fn a_head_request_is_seen_as_a_get_and_gets_the_head_alone() {
    let (_server, addr) = with_route("/", Config::default(), |request| {
        assert_eq!(request.method(), "GET");
        match request.rest() {
            "stream" => request.stream()?.end(),
            "follow" => request.follow(["a"]),
            _ => Ok(Answer::text(200, "hello")),
        }
    });
    let head = |target: &str| {
        let mut wire = Wire::connect(addr);
        wire.send(format!("HEAD /{target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes());
        String::from_utf8(wire.rest()).unwrap()
    };
    let text = head("text");
    assert!(text.contains("\r\nContent-Length: 6\r\n") && text.ends_with("\r\n\r\n"), "{text}");
    for target in ["stream", "follow"] {
        let text = head(target);
        assert!(text.contains("\r\nContent-Type: text/event-stream\r\n") && text.ends_with("\r\n\r\n"), "{text}");
    }
}

#[test]
fn methods_that_no_program_takes_are_answered_by_the_server() {
    let (_server, addr) = with_route("/mine", Config::default(), |request| Ok(Answer::text(200, request.method())));
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE"] {
        assert_eq!(ask(addr, &format!("{method} /mine HTTP/1.1"), "").body, format!("{method}\n"));
    }
    let allow = Some("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");
    for (method, status) in [("OPTIONS", 204), ("TRACE", 405)] {
        let answer = ask(addr, &format!("{method} /mine HTTP/1.1"), "");
        assert_eq!((answer.status, answer.header("allow")), (status, allow), "{method}");
    }
    assert_eq!(ask(addr, "FETCH /mine HTTP/1.1", "").status, 501);
}

#[test]
fn a_route_may_be_for_one_method_and_all_others_are_refused_with_what_is_taken() {
    let server = bind(Config::default()).unwrap();
    let say = |said: &'static str| move |_: &Request| Ok(Answer::text(200, said));
    server.route("/any", say("all others")).unwrap();
    for (route, said) in [
        ("POST /jobs", "old"),
        ("POST /jobs", "posted"),
        ("GET /jobs", "got"),
        ("DELETE /any", "deleted"),
        ("GET /jobs/", "below"),
        ("PUT /", "root"),
        ("PATCH /with space", "patched"),
    ] {
        server.route(route, say(said)).unwrap();
    }
    server.page("/page", "text/plain", "a page").unwrap();
    server.route("POST /page", say("posted to a page")).unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    for (request, said) in [
        ("POST /jobs", "posted\n"),
        ("GET /jobs", "got\n"),
        ("GET /jobs/7", "below\n"),
        ("DELETE /any", "deleted\n"),
        ("PUT /any", "all others\n"),
        ("PUT /elsewhere", "root\n"),
        ("PATCH /with%20space", "patched\n"),
        ("GET /page", "a page"),
        ("POST /page", "posted to a page\n"),
    ] {
        assert_eq!(ask(addr, &format!("{request} HTTP/1.1"), "").body, said, "{request}");
    }
    for (request, status, allow) in [
        ("DELETE /jobs", 405, "GET, HEAD, POST, OPTIONS"),
        ("POST /jobs/7", 405, "GET, HEAD, OPTIONS"), // and not what is above it
        ("GET /with%20space", 405, "PATCH, OPTIONS"),
        ("PUT /page", 405, "GET, HEAD, POST, OPTIONS"),
        ("OPTIONS /page", 204, "GET, HEAD, POST, OPTIONS"),
        ("OPTIONS /any", 204, "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
        ("OPTIONS /jobs", 204, "GET, HEAD, POST, OPTIONS"),
    ] {
        let answer = ask(addr, &format!("{request} HTTP/1.1"), "");
        assert_eq!((answer.status, answer.header("allow")), (status, Some(allow)), "{request}");
    }
    let mut wire = Wire::connect(addr);
    wire.send(b"HEAD /jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let head = wire.head();
    assert!(header(&head, "content-length") == Some("4") && wire.rest().is_empty(), "{head}");
    let server = bind(Config::default()).unwrap();
    for wrong in ["HEAD /x", "OPTIONS /x", "get /x", "POST", "POST x", "POST  /x", " /x", "POST /events/a", "GET /x?y"]
    {
        let error = server.route(wrong, say("never")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{wrong}: {error}");
    }
    let error = server.route("HEAD /x", say("never")).unwrap_err().to_string();
    assert!(
        error.ends_with("begin it with a slash, or with one of GET, POST, PUT, PATCH, DELETE, a space and a slash")
    );
}

#[test]
fn a_body_beyond_the_limit_never_reaches_a_handler() {
    let config = Config::default().with(|config| config.body_bytes = 10);
    let (_server, addr) = with_route("/mine", config, |request| Ok(Answer::text(200, request.body().len())));
    assert_eq!(ask(addr, "POST /mine HTTP/1.1", &"x".repeat(10)).body, "10\n");
    assert_eq!(ask(addr, "POST /mine HTTP/1.1", &"x".repeat(11)).status, 413);
}

#[test]
fn a_route_is_closed_to_foreign_hosts_and_to_what_foreign_pages_do_but_asks_for_no_token() {
    let config = Config::default().with(|config| {
        config.publish_tokens = vec!["p".parse().unwrap()];
        config.subscribe_tokens = vec!["s".parse().unwrap()];
    });
    let (_server, addr) = with_route("/mine", config, |_| Ok(Answer::text(200, "here")));
    assert_eq!(ask(addr, "POST /mine HTTP/1.1", "").status, 200);
    assert_eq!(ask(addr, "POST /mine HTTP/1.1\r\nOrigin: https://evil.example", "").status, 403);
    let refused = ask(addr, "DELETE /mine HTTP/1.1\r\nOrigin: null", "");
    let said = "pages of \"null\" may not DELETE: name their origin in allow_origins (--allow-origin)\n";
    assert_eq!((refused.status, refused.body.as_str()), (403, said));
    let read = ask(addr, "GET /mine HTTP/1.1\r\nOrigin: https://evil.example", "");
    assert_eq!((read.status, read.header("access-control-allow-origin")), (200, None), "its page cannot read that");
    let rebound = Wire::ask(addr, "GET /mine HTTP/1.1\r\nHost: evil.example\r\n\r\n");
    assert_eq!(rebound.status, 403);
}

#[test]
fn a_route_may_ask_for_a_token_of_its_own() {
    let operator: Token = "c0ffee".parse().unwrap();
    let handler = move |request: &Request| Ok(Answer::text(if request.shows(&operator) { 200 } else { 401 }, "x"));
    let (_server, addr) = with_route("/state", Config::default(), handler);
    for (fields, status) in [
        ("", 401),
        ("Authorization: Bearer c0ffe\r\n", 401),
        ("Authorization: Bearer c0ffee\r\n", 200),
        ("Cookie: a=b; brooklet_token=c0ffee\r\n", 200),
    ] {
        let answer = Wire::ask(addr, &format!("GET /state HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n"));
        assert_eq!(answer.status, status, "{fields}");
    }
}

#[test]
fn a_session_cookie_is_enough_to_follow_topics_and_a_page_that_comes_back_misses_nothing() {
    let config = Config::default().with(|config| config.subscribe_tokens = vec!["s".parse().unwrap()]);
    let (server, addr) = with_route("/inbox", config, |request| match request.cookie("session") {
        Some(user) => request.follow_since([format!("user-{user}"), "all".into()], Since::Earliest),
        None => Ok(Answer::text(401, "log in first")),
    });
    assert_eq!(get(addr, "/inbox").status, 401);
    let hub = server.hub();
    hub.publish("user-42", Event::new("one")).unwrap();
    hub.publish("user-43", Event::new("not yours")).unwrap();
    let (mut wire, _) = Wire::subscribe(addr, "/inbox", "Cookie: session=42\r\n");
    let one = wire.event().unwrap();
    assert_eq!(one.data(), "one");
    wire.close();
    hub.publish("all", Event::new("two")).unwrap();
    let (mut wire, _) =
        Wire::subscribe(addr, "/inbox", &format!("Cookie: session=42\r\nLast-Event-ID: {}\r\n", one.id()));
    assert_eq!(wire.event().unwrap().data(), "two");
    let asked_wrong = Wire::stream(addr, "/inbox", "Cookie: session=42\r\nLast-Event-ID: nonsense\r\n").block();
    assert!(asked_wrong.unwrap().id.is_none(), "a gap follows, and no refusal");
    // A name from outside that may not be is the request's fault.
    assert_eq!(ask(addr, "GET /inbox HTTP/1.1\r\nCookie: session=a/b", "").status, 400);
}

/// What `GET /events/a,b` takes, and refuses, in the same words: a page that must poll can poll here, too.
#[test]
fn a_page_that_may_follow_says_where_it_begins_when_it_ends_and_in_which_form() {
    let (server, addr) = with_route("/inbox", Config::default(), |request| {
        let topics = request.query("topics").unwrap_or("a").split(',');
        request.follow_since(topics, Since::Newest(1))
    });
    let hub = server.hub();
    let ids = ["one", "two", "three"].map(|data| hub.publish("a", Event::new(data)).unwrap());
    let ask = |query: &str, fields: &str| {
        let mut wire = Wire::connect(addr);
        wire.send(format!("GET /inbox?{query} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n").as_bytes());
        let head = wire.head();
        (header(&head, "content-type").unwrap().to_string(), String::from_utf8(wire.rest()).unwrap())
    };
    let lines = |query: &str, fields: &str| ask(&format!("as=lines&{query}"), fields).1;
    assert_eq!(lines("poll", ""), "three\n", "as its handler says");
    assert_eq!(lines("poll&since=earliest", ""), "one\ntwo\nthree\n");
    assert_eq!(lines("poll=10s&last=2&_=7", ""), "two\nthree\n");
    assert_eq!(lines("take=2&since=earliest", ""), "one\ntwo\n");
    assert_eq!(lines(&format!("poll&since={}", ids[1]), ""), "three\n");
    assert_eq!(lines("poll&last=3", &format!("Last-Event-ID: {}\r\n", ids[1])), "three\n", "the cursor wins");
    assert_eq!(lines("poll=1ms&since=earliest&topics=b", ""), "", "a parameter of the program's own");
    let (content_type, json) = ask("as=json&take=1", "");
    assert_eq!(content_type, "application/x-ndjson");
    assert!(json.contains("\"data\":\"three\""), "{json}");
    let (content_type, polled) = ask("poll", "");
    assert_eq!(content_type, "text/event-stream");
    assert!(polled.ends_with(": the poll is over\nretry: 100\n\n") && polled.contains("data: three\n"), "{polled}");
    for (query, said) in [
        ("poll=soon", "\"soon\""),
        ("take=0", "take is a number of events"),
        ("as=xml", "as is lines or json"),
        ("since=yesterday", "since is earliest"),
        ("last=-1", "last is a number of events"),
        ("since=1-0&last=1", "leave one of them out"),
        ("topics=a%20b", "is no topic name"),
    ] {
        let answer = get(addr, &format!("/inbox?{query}"));
        assert!(answer.status == 400 && answer.body.contains(said), "{query}: {answer:?}");
    }
    // What `/events/` says of the same.
    assert_eq!(get(addr, "/inbox?take=0").body, get(addr, "/events/a?take=0").body);
}

#[test]
fn streams_have_the_programs_fields_in_their_heads() {
    let (_server, addr) = with_route("/", Config::default(), |request| match request.rest() {
        "stream" => request.stream_with([("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")])?.end(),
        "follow" => Ok(request.follow(["a"])?.field("Set-Cookie", "a=1").field("set-cookie", "b=2")),
        "late" => Ok(request.stream()?.end()?.field("Set-Cookie", "c=3")),
        own => Ok(request.follow(["a"])?.field(own, "x")),
    });
    for (method, target) in [("GET", "stream"), ("GET", "follow?poll=1ms"), ("HEAD", "stream"), ("HEAD", "follow")] {
        let mut wire = Wire::connect(addr);
        wire.send(format!("{method} /{target} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes());
        let head = wire.head();
        assert_eq!(header(&head, "content-type"), Some("text/event-stream"), "{method} {target}: {head}");
        let cookies: Vec<_> = head.lines().filter(|line| line.to_lowercase().starts_with("set-cookie: ")).collect();
        assert_eq!(
            cookies,
            ["Set-Cookie: a=1", if target == "stream" { "Set-Cookie: b=2" } else { "set-cookie: b=2" }]
        );
        assert!(wire.rest().is_empty() || target.contains("poll"), "{method} {target}");
    }
    let late = Wire::stream(addr, "/late", "").rest();
    assert!(late.is_empty(), "its head was sent before: {late:?}");
    for own in ["Content-Type", "cache-control", "X-Accel-Buffering", "Transfer-Encoding", "Date", "a b"] {
        assert_eq!(get(addr, &format!("/{}", own.replace(' ', "%20"))).status, 500, "{own}");
    }
}

#[test]
fn a_stream_whose_head_may_not_be_is_not_opened() {
    let (_server, addr) = with_route("/", Config::default(), |request| {
        let (name, value) = request.rest().split_once('/').unwrap();
        match request.stream_with([(name, value)]) {
            Ok(stream) => stream.end(),
            Err(error) if request.query("answers").is_some() => Ok(Answer::text(409, error)),
            Err(error) => Err(error),
        }
    });
    assert!(Wire::stream(addr, "/X-Mine/1", "").rest().is_empty());
    for target in ["/X/a%0d%0aX-Evil:1", "/X%0aY/1", "/Content-Type/text%0Dplain", "/Cache-Control/public", "/Date/now"]
    {
        let answer = get(addr, target);
        assert_eq!((answer.status, answer.header("x-evil")), (500, None), "{target}: {answer:?}");
    }
    let answer = get(addr, "/Date/now?answers");
    assert_eq!((answer.status, answer.body.as_str()), (409, "the field Date is the server's own: leave it out\n"));
}

#[test]
fn a_post_may_be_answered_with_a_stream() {
    let (_server, addr) = with_route("/ask", Config::default(), |request| {
        let mut stream = request.stream()?;
        assert_eq!(request.stream().map(drop).unwrap_err().to_string(), "the stream is open already");
        assert!(request.follow(["a"]).is_err(), "it is a stream already");
        for word in stream.request().text()?.split(' ') {
            stream.send(&Event::new(word))?;
        }
        stream.end()
    });
    let mut wire = Wire::connect(addr);
    wire.send(post_request("/ask", "a b").as_bytes());
    assert!(wire.head().contains("\r\nContent-Type: text/event-stream\r\n"));
    assert_eq!(String::from_utf8(wire.rest()).unwrap(), "data: a\n\ndata: b\n\n");
    assert!(wire.is_over(), "with its last chunk");
}

#[test]
fn a_stream_without_room_is_told_when_to_come_back_and_its_handler_why() {
    let (sender, errors) = mpsc::channel();
    let config = Config::default().with(|config| config.subscribers = 0);
    let (_server, addr) = with_route("/mine", config, move |request| {
        let error = request.stream().map(drop).unwrap_err();
        sender.send(error.to_string()).unwrap();
        Err(error)
    });
    let mut wire = Wire::stream(addr, "/mine", "");
    let end = wire.block().unwrap();
    assert!(end.retry.is_some() && end.comments == ["no room for another stream"], "{end:?}");
    assert_eq!((wire.rest().len(), wire.is_over()), (0, true));
    assert_eq!(errors.recv_timeout(PATIENCE).unwrap(), "no room for another stream");
}

#[test]
fn the_hook_hears_of_each_subscription_that_begins_and_ends() {
    let server = bind(Config::default()).unwrap();
    let (sender, heard) = mpsc::channel();
    let hub = server.hub();
    let set = server.on_subscription(move |Presence { topics, peer, ended, .. }| {
        let _ = hub.publish("lobby", Event::new("x")); // no lock is held that this would need
        let _ = sender.send((topics.join(","), *peer, *ended));
        assert!(topics.len() < 2, "a hook that panics is called again");
    });
    set.unwrap();
    assert_eq!(server.on_subscription(|_| {}).unwrap_err().kind(), ErrorKind::AlreadyExists);
    server.route("/own", |request| request.stream()?.end()).unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    let next = || heard.recv_timeout(PATIENCE).unwrap();
    let (both, _) = Wire::subscribe(addr, "/events/b,a", "");
    let peer = both.socket.local_addr().unwrap();
    assert_eq!(next(), ("b,a".into(), peer, None));
    both.reset();
    assert_eq!(next(), ("b,a".into(), peer, Some("the peer reset the connection")));
    Wire::stream(addr, "/own", "").rest(); // a handler knows of its own
    let (mut one, _) = Wire::subscribe(addr, "/events/c", "");
    let peer = one.socket.local_addr().unwrap();
    assert_eq!(next(), ("c".into(), peer, None));
    server.stop();
    one.rest();
    assert_eq!(next(), ("c".into(), peer, Some("the server is stopping")));
    drop(server);
    assert_eq!(
        heard.recv_timeout(PATIENCE),
        Err(mpsc::RecvTimeoutError::Disconnected),
        "the hook goes with its server"
    );
}

/// What a program panics with, which panics in its turn where it is dropped.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("once more, on purpose");
    }
}

#[test]
fn whatever_the_program_panics_with_it_is_called_again() {
    let ((calls, heard), (lines, log)) = (mpsc::channel(), mpsc::channel());
    let config = Config::default().with(|config| {
        config.log = Log::Debug;
        config.log_to = LogTo::lines(move |line| {
            lines.send(line.to_string()).unwrap();
            panic_any(Bomb)
        });
    });
    let server = bind(config).unwrap();
    let hook = move |presence: &Presence| {
        calls.send(presence.ended.is_some()).unwrap();
        panic_any(Bomb)
    };
    server.on_subscription(hook).unwrap();
    server.route("/answer", |_| panic_any(Bomb)).unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    for _ in 0..2 {
        assert_eq!(get(addr, "/answer").status, 500);
        Wire::subscribe(addr, "/events/a", "").0.reset();
        assert_eq!([(); 2].map(|()| heard.recv_timeout(PATIENCE)), [Ok(false), Ok(true)]);
    }
    let failed = |line: &String| line.ends_with("the handler of \"/answer\" failed: the handler panicked");
    let answered = |line: &String| line.ends_with(" GET \"/answer\" 500");
    wait_for("the log", || log.try_iter().find(failed));
    wait_for("a line of the log after that", || log.try_iter().find(answered));
}

#[test]
fn a_hook_that_takes_its_time_holds_up_neither_streams_nor_their_ends() {
    let server = bind(Config::default()).unwrap();
    let (sender, heard) = mpsc::channel();
    let (release, held) = mpsc::channel::<()>();
    let hook = move |presence: &Presence| {
        let _ = held.recv(); // until all of it is over
        let _ = sender.send((presence.peer, presence.ended.is_some()));
    };
    server.on_subscription(hook).unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    let mut streams: Vec<_> = (0..10).map(|_| Wire::subscribe(addr, "/events/a", "").0).collect();
    streams.iter_mut().for_each(|stream| wire_arrives_alone(&server, stream));
    let peers: Vec<_> = streams.iter().map(|stream| stream.socket.local_addr().unwrap()).collect();
    streams.into_iter().for_each(Wire::reset);
    wait_for_metric(addr, "subscribers", 0);
    drop(release);
    let calls: Vec<_> = (0..20).map(|_| heard.recv_timeout(PATIENCE).unwrap()).collect();
    assert_eq!(calls[..10], peers.iter().map(|peer| (*peer, false)).collect::<Vec<_>>());
    assert!(peers.iter().all(|peer| calls[10..].contains(&(*peer, true))), "{calls:?}");
}

#[test]
fn a_hook_that_is_stuck_locks_out_nobody_but_new_streams() {
    const MOST_CALLS: usize = 1_024; // as `presence.rs` has it
    let server = bind(Config::default().with(|config| config.threads = 8)).unwrap();
    let (release, held) = mpsc::channel::<()>();
    server.on_subscription(move |_| held.recv().unwrap_or_default()).unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    // Half of them come, and half of them go. The hook has the first.
    for _ in 0..MOST_CALLS / 2 + 1 {
        Wire::subscribe(addr, "/events/a", "").0.reset();
    }
    wait_for_metric(addr, "subscribers", 0);
    // More than there are threads for requests. Some of them may have to make room.
    let mut late: Vec<_> = (0..8).map(|_| Wire::connect(addr)).collect();
    for wire in &mut late {
        wire.send(b"GET /events/a HTTP/1.1\r\nHost: localhost\r\n\r\n");
    }
    assert_eq!(get(addr, "/health").body, "ok\n");
    late.iter_mut().for_each(|wire| drop(wire.rest())); // each has its end
    let end = Wire::stream(addr, "/events/a", "").block().unwrap();
    assert!(end.retry.is_some() && end.comments == ["the program's hook is far behind"], "{end:?}");
    drop(release);
    wait_for("a newcomer to be let in", || {
        let mut wire = Wire::stream(addr, "/events/a", "");
        wire.block().filter(|first| first.id.is_some())
    });
}

/// The next event, whichever it is, so that each of several streams has one.
fn wire_arrives_alone(server: &Handle, stream: &mut Wire) {
    server.hub().publish("a", Event::new("x")).unwrap();
    assert_eq!(stream.event().unwrap().data(), "x");
}

#[test]
fn routes_can_be_added_from_any_thread_and_a_request_lent_to_others() {
    fn is_shared<T: Send + Sync>() {}
    is_shared::<Server>();
    is_shared::<Handle>();
    is_shared::<Answer>();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let kept = seen.clone();
    let (_server, addr) = with_route("/scoped", Config::default(), move |request| {
        let mut stream = request.stream()?;
        thread::scope(|scope| scope.spawn(|| kept.lock().unwrap().push(request.path().to_string())).join()).unwrap();
        thread::scope(|scope| scope.spawn(|| stream.send(&Event::new("from another thread"))).join()).unwrap()?;
        stream.end()
    });
    assert_eq!(Wire::stream(addr, "/scoped", "").rest(), b"data: from another thread\n\n");
    assert_eq!(*seen.lock().unwrap(), ["/scoped"]);
}
