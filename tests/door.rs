//! Who gets in: tokens, origins, hosts, and what a browser asks before it does.

use crate::common::*;
use brooklet::{Config, Server, Token};
use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;
use std::time::Duration;

fn token(text: &str) -> Token {
    text.parse().unwrap()
}

/// One request with these header lines, each with its CRLF; Host is localhost unless they say another.
fn ask(addr: SocketAddr, method: &str, target: &str, fields: &str) -> Answer {
    let host = if fields.contains("Host: ") { "" } else { "Host: localhost\r\n" };
    let length = if method == "POST" || method == "PUT" { "Content-Length: 2\r\n" } else { "" };
    let mut wire = Wire::connect(addr);
    wire.send(format!("{method} {target} HTTP/1.1\r\n{host}{length}{fields}\r\n").as_bytes());
    if !length.is_empty() {
        let _ = std::io::Write::write_all(&mut wire.socket, b"x\n");
    }
    let head = wire.head();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let length = header(&head, "content-length").map_or(0, |value| value.parse().unwrap());
    let body = if method == "HEAD" { String::new() } else { String::from_utf8(wire.take(length)).unwrap() };
    Answer { status, head, body }
}

#[test]
fn each_token_opens_its_own_doors_and_no_other() {
    let (publish_tokens, subscribe_tokens) = (["write-1", "write-2"].map(token), ["read-1", "read-2"].map(token));
    let (publish_tokens, subscribe_tokens) = (publish_tokens.to_vec(), subscribe_tokens.to_vec());
    let server = bind(Config::default().with(|config| {
        config.publish_tokens = publish_tokens;
        config.subscribe_tokens = subscribe_tokens;
    }))
    .unwrap();
    server.stream("/mine", |stream| stream.comment("here")).unwrap();
    server.page("/page", "text/plain", "page").unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    let bearer = |token: &str| format!("Authorization: Bearer {token}\r\n");
    let cookie = |token: &str| format!("Cookie: theme=dark; brooklet_token={token}; x=y\r\n");
    for (method, target, good, bad) in [
        ("POST", "/events/a", ["write-1", "write-2"], ["read-1", "write-3"]),
        ("PUT", "/events/a", ["write-1", "write-2"], ["read-1", "write-11"]),
        ("GET", "/events/a", ["read-1", "read-2"], ["write-1", "read-"]),
        ("HEAD", "/events/a", ["read-1", "read-2"], ["write-1", "READ-1"]),
        ("GET", "/mine", ["read-1", "read-2"], ["write-1", "wrong"]),
        ("DELETE", "/events/a", ["write-1", "write-2"], ["read-1", "write-"]),
        ("GET", "/topics", ["read-1", "read-2"], ["write-1", "read-1x"]),
        ("GET", "/metrics", ["read-1", "read-2"], ["write-1", "read-1x"]),
    ] {
        for good in good {
            assert_eq!(ask(addr, method, target, &bearer(good)).status, 200, "{method} {target} {good}");
            assert_eq!(ask(addr, method, target, &cookie(good)).status, 200, "{method} {target} {good} as a cookie");
            let both = bearer("wrong") + &cookie(good);
            assert_eq!(ask(addr, method, target, &both).status, 200, "{method} {target}: one of two is good");
        }
        for bad in bad {
            for fields in [bearer(bad), cookie(bad)] {
                let answer = ask(addr, method, target, &fields);
                assert_eq!(answer.status, 403, "{method} {target} {bad}");
                assert!(!answer.body.contains(bad) && !answer.head.contains(bad), "{answer:?}");
            }
        }
        for fields in
            ["", "Authorization: Basic d3JpdGUtMTp4\r\n", "Authorization: write-1\r\n", "Cookie: token=write-1\r\n"]
        {
            let answer = ask(addr, method, target, fields);
            assert_eq!(answer.status, 401, "{method} {target} {fields}");
            assert!(answer.header("www-authenticate").unwrap().starts_with("Bearer"), "{answer:?}");
        }
    }
    for target in ["/health", "/page"] {
        assert_eq!(ask(addr, "GET", target, "").status, 200, "{target} is open");
    }
    assert_eq!(ask(addr, "OPTIONS", "/events/a", "").status, 204, "a preflight carries no token");
}

#[test]
fn a_head_full_of_cookies_is_not_hundreds_of_guesses() {
    let server = serve(Config::default().with(|config| config.publish_tokens = vec![token("t")]));
    let wrong = |count: usize| format!("Cookie: {}brooklet_token=t\r\n", "brooklet_token=x; ".repeat(count));
    let ask = |fields: &str| ask(server.addr().unwrap(), "POST", "/events/a", fields).status;
    assert_eq!((ask(&wrong(7)), ask(&wrong(8))), (200, 403));
    assert_eq!(ask(&(wrong(8) + "Authorization: Bearer t\r\n")), 200, "that one comes first");
}

#[test]
fn who_may_not_publish_need_not_send_the_body() {
    let server = serve(Config::default().with(|config| config.publish_tokens = vec![token("secret")]));
    let mut wire = Wire::connect(server.addr().unwrap());
    wire.send(b"POST /events/a HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 60000\r\n\r\n");
    let answer = wire.answer();
    assert_eq!((answer.status, answer.header("connection")), (401, Some("close")));
    assert_eq!(metric(server.addr().unwrap(), "published_total"), 0);
}

#[test]
fn tokens_come_from_flags_files_and_the_environment_and_stand_in_no_log() {
    let dir = Scratch::new();
    fs::write(dir.path("tokens"), "from-file-1\nfrom-file-2\n").unwrap();
    let file = format!("@{}", dir.path("tokens"));
    let flags = ["--listen", "127.0.0.1:0", "--log", "debug", "--publish-token", "from-flag", "--publish-token", &file];
    let mut command = Command::new(BROOKLET);
    command
        .args(flags)
        .env("BROOKLET_PUBLISH_TOKEN", "from-env-1\nfrom-env-2")
        .env("BROOKLET_SUBSCRIBE_TOKEN", "reader");
    let process = Process::from(&mut command);
    for token in ["from-flag", "from-file-1", "from-file-2", "from-env-1", "from-env-2"] {
        let fields = format!("Authorization: Bearer {token}\r\n");
        assert_eq!(ask(process.addr, "POST", "/events/a", &fields).status, 200, "{token}");
    }
    assert_eq!(ask(process.addr, "POST", "/events/a", "Authorization: Bearer guess-1\r\n").status, 403);
    assert_eq!(ask(process.addr, "GET", "/events/a", "Cookie: brooklet_token=guess-2\r\n").status, 403);
    wait_for("the log", || (process.log().matches("\" 403").count() == 2).then_some(()));
    for secret in ["from-", "reader", "guess-"] {
        assert!(!process.log().contains(secret), "{}", process.log());
    }
    let config = Config::default().with(|config| config.publish_tokens = vec![token("very-secret")]);
    assert!(!format!("{config:?}").contains("very-secret"));
}

#[test]
fn a_token_that_cannot_be_one_stops_the_start_and_is_not_shown() {
    for (flags, environment) in [
        (&["--publish-token", "a-secret of several words"][..], None),
        (&["--publish-token", "semi;colon-secret"], None),
        (&["--publish-token", ""], None),
        (&["--subscribe-token", "@/nowhere/at/all"], None),
        (&[], Some(OsStr::new(""))),
        (&[], Some(OsStr::new("semi;colon-secret"))),
        (&[], Some(OsStr::from_bytes(b"no-utf8-\xff-secret"))), // unread, it must not leave the door open
    ] {
        let mut command = Command::new(BROOKLET);
        command.args(["--listen", "127.0.0.1:0"]).args(flags);
        if let Some(text) = environment {
            command.env("BROOKLET_PUBLISH_TOKEN", text);
        }
        let output = output(&mut command);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{flags:?} {environment:?}: {said}");
        assert!(said.to_lowercase().contains("token") && !said.contains("-secret"), "{said}");
    }
}

#[test]
fn beyond_loopback_it_starts_only_with_a_publish_token_or_when_told() {
    let bind = |config| Server::bind("0.0.0.0:0", config).map(drop).map_err(|error| error.kind());
    assert_eq!(bind(Config::default()), Err(ErrorKind::PermissionDenied));
    let subscribe_tokens = vec![token("x")];
    assert_eq!(
        bind(Config::default().with(|config| config.subscribe_tokens = subscribe_tokens)),
        Err(ErrorKind::PermissionDenied)
    );
    assert_eq!(bind(Config::default().with(|config| config.publish_tokens = vec![token("x")])), Ok(()));
    assert_eq!(bind(Config::default().with(|config| config.open = true)), Ok(()));
}

#[test]
fn on_loopback_only_names_of_loopback_and_of_allowed_origins_are_answered() {
    let allow_origins = vec!["https://app.example".into(), "null".into(), "*".into()];
    let server = serve(Config::default().with(|config| config.allow_origins = allow_origins));
    let addr = server.addr().unwrap();
    for host in [
        "localhost",
        "LOCALHOST:9",
        "127.0.0.1",
        "127.1.2.3:80",
        "[::1]:3000",
        "a.localhost",
        "app.example",
        "App.Example:81",
    ] {
        assert_eq!(ask(addr, "GET", "/health", &format!("Host: {host}\r\n")).status, 200, "{host}");
    }
    for host in
        ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "app.example.evil", "[::2]", "10.0.0.1"]
    {
        for (method, target) in
            [("GET", "/events/a"), ("POST", "/events/a"), ("GET", "/health"), ("OPTIONS", "/events/a")]
        {
            let answer = ask(addr, method, target, &format!("Host: {host}\r\nOrigin: http://{host}\r\n"));
            assert_eq!(answer.status, 403, "{host} {method} {target}");
            assert!(method == "HEAD" || answer.body.contains("--allow-origin"), "{answer:?}");
        }
    }
    assert_eq!(metric(addr, "published_total"), 0);
    // Beyond loopback, the names that lead here are not known.
    let server =
        Server::bind("0.0.0.0:0", Config::default().with(|config| config.open = true)).unwrap().spawn().unwrap();
    let addr = SocketAddr::from(([127, 0, 0, 1], server.addr().unwrap().port()));
    assert_eq!(ask(addr, "GET", "/health", "Host: any.example\r\n").status, 200);
}

#[test]
fn a_page_of_another_origin_cannot_publish_unless_it_is_allowed() {
    let server =
        serve(Config::default().with(|config| config.allow_origins = vec!["https://app.example".into(), "*".into()]));
    let addr = server.addr().unwrap();
    let port = addr.port();
    for origin in [
        "https://evil.example",
        "null",
        "https://app.example.evil",
        "http://app.example",
        "https://app.example:8443",
        "http://localhost:1",
        "http://127.0.0.1",
        "HTTPS://APP.EXAMPLE",
        "*",
        "",
    ] {
        for method in ["POST", "PUT", "DELETE"] {
            let answer = ask(addr, method, "/events/a", &format!("Origin: {origin}\r\n"));
            assert_eq!(answer.status, 403, "{method} {origin}");
        }
    }
    assert_eq!(metric(addr, "published_total"), 0);
    for (count, origin) in
        ["https://app.example".into(), format!("http://localhost:{port}"), format!("http://[::1]:{port}")]
            .iter()
            .enumerate()
    {
        assert_eq!(ask(addr, "POST", "/events/a", &format!("Origin: {origin}\r\n")).status, 200, "{origin}");
        assert_eq!(metric(addr, "published_total"), count as u64 + 1);
    }
    let own = format!("Host: localhost:{port}\r\nOrigin: http://localhost:{port}\r\n");
    assert_eq!(ask(addr, "POST", "/events/a", &own).status, 200, "its own page");
    // A star in what a page says of itself stands for nobody else.
    for (origin, host) in
        [("http://*", "localhost"), ("http://*.0.0.1", "127.0.0.1"), ("http://*.localhost", "a.localhost")]
    {
        let fields = format!("Host: {host}:{port}\r\nOrigin: {origin}:{port}\r\n");
        assert_eq!(ask(addr, "POST", "/events/a", &fields).status, 403, "{origin} to {host}");
    }
    // A proxy passes the public host on; what came over plain HTTP, somebody on the way may have written.
    for (origin, status) in [("https://app.example", 200), ("http://app.example", 403), ("ftp://app.example", 403)] {
        let fields = format!("Host: app.example\r\nOrigin: {origin}\r\n");
        assert_eq!(ask(addr, "POST", "/events/a", &fields).status, status, "{origin}");
    }
}

#[test]
fn only_allowed_origins_may_read_and_only_those_by_name_with_credentials() {
    let allow_origins = ["https://app.example", "null"].map(String::from).to_vec();
    let named = serve(Config::default().with(|config| config.allow_origins = allow_origins));
    let all =
        serve(Config::default().with(|config| config.allow_origins = vec!["*".into(), "https://app.example".into()]));
    let none = serve_default();
    let own = format!("http://127.0.0.1:{}", named.addr().unwrap().port());
    for (server, origin, allowed, credentials) in [
        (&named, "https://app.example", Some("https://app.example"), true),
        (&named, "null", Some("null"), true),
        (&named, &own, Some(&*own), true),
        (&named, "https://evil.example", None, false),
        (&all, "https://app.example", Some("https://app.example"), true),
        (&all, "https://evil.example", Some("*"), false),
        (&all, "null", Some("*"), false),
        (&none, "https://app.example", None, false),
        (&none, "null", None, false),
    ] {
        // A stream, a stream that is rejected, an answer, an error: a page must be able to read each.
        for target in ["/events/a", "/events/a?poll=1ms", "/health", "/nowhere"] {
            let answer = ask(server.addr().unwrap(), "GET", target, &format!("Origin: {origin}\r\n"));
            assert_eq!(answer.header("access-control-allow-origin"), allowed, "{origin} {target}");
            let told = answer.header("access-control-allow-credentials");
            assert_eq!(told, credentials.then_some("true"), "{origin} {target}");
            let varies = !std::ptr::eq(server, &none);
            assert_eq!(answer.header("vary"), varies.then_some("Origin"), "{origin} {target}");
        }
    }
    assert_eq!(ask(named.addr().unwrap(), "GET", "/events/a", "").header("access-control-allow-origin"), None);
}

#[test]
fn a_preflight_is_told_what_a_page_may_send() {
    let allow_origins = vec!["https://app.example".into(), "*".into()];
    let server = serve(Config::default().with(|config| {
        config.allow_origins = allow_origins;
        config.publish_tokens = vec![token("x")];
    }));
    let asks = |origin: &str| {
        let fields = format!(
            "Origin: {origin}\r\nAccess-Control-Request-Method: POST\r\n\
             Access-Control-Request-Headers: authorization,last-event-id\r\n"
        );
        ask(server.addr().unwrap(), "OPTIONS", "/events/a", &fields)
    };
    let answer = asks("https://app.example");
    assert_eq!((answer.status, answer.header("access-control-allow-credentials")), (204, Some("true")));
    assert_eq!(answer.header("access-control-allow-methods"), Some("GET, HEAD, POST, PUT, PATCH, DELETE"));
    let fields = answer.header("access-control-allow-headers").unwrap();
    assert_eq!(fields, "authorization, last-event-id", "what it asks for");
    let answer = asks("https://elsewhere.example");
    assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
    assert_eq!(answer.header("access-control-allow-methods"), Some("GET, HEAD"), "reading only");
    assert_eq!(answer.header("access-control-allow-credentials"), None);
    assert!(!answer.header("access-control-allow-headers").unwrap().contains("Authorization"));
}

#[test]
fn what_is_no_origin_stops_the_start() {
    for origin in ["app.example", "https://app.example/", "https://", "https://App.example", "https://a b", "**", ""] {
        let error = bind(Config::default().with(|config| config.allow_origins = vec![origin.into()]));
        assert_eq!(error.err().map(|error| error.kind()), Some(ErrorKind::InvalidInput), "{origin:?}");
    }
}

/// An origin that no browser writes so would never fit.
#[test]
fn an_origin_that_browsers_write_otherwise_is_named_as_they_write_it() {
    for (origin, written) in [
        ("https://app.example/", "https://app.example"),
        ("https://app.example/page", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:80/", "http://app.example"),
        ("http://app.example:", "http://app.example"),
        ("https://App.example:8443", "https://app.example:8443"),
    ] {
        let error = bind(Config::default().with(|config| config.allow_origins = vec![origin.into()])).err().unwrap();
        let said = format!("allow_origins: \"{origin}\" is not as browsers write it: give {written}");
        assert_eq!((error.kind(), error.to_string()), (ErrorKind::InvalidInput, said));
        assert!(
            bind(Config::default().with(|config| config.allow_origins = vec![written.into()])).is_ok(),
            "{written}"
        );
    }
}

#[test]
fn every_way_to_write_loopback_is_let_in() {
    let server = serve_default();
    for (host, status) in [
        ("[0:0:0:0:0:0:0:1]", 200),
        ("[0:0:0:0:0:0:0:1]:3000", 200),
        ("[::1]", 200),
        ("[::ffff:127.0.0.1]", 200),
        ("[::ffff:7f00:1]:80", 200),
        ("127.1.2.3", 200),
        ("localhost.", 200),
        ("LocalHost.:3000", 200),
        ("app.localhost.", 200),
        ("[::2]", 403),
        ("[::ffff:10.0.0.1]", 403),
        ("localhost..", 403),
        ("notlocalhost", 403),
        ("127.0.0.1.example", 403),
    ] {
        let answer = Wire::ask(server.addr().unwrap(), &format!("GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert_eq!(answer.status, status, "{host}: {}", answer.body);
    }
}

#[test]
fn an_error_of_the_settings_names_its_field() {
    let zero = Duration::ZERO;
    let ever = Duration::from_secs(11 * 365 * 24 * 3_600);
    let usual = Config::default;
    for (field, config) in [
        ("head_time", usual().with(|config| config.head_time = zero)),
        ("body_time", usual().with(|config| config.body_time = zero)),
        ("put_idle_time", usual().with(|config| config.put_idle_time = zero)),
        ("idle_time", usual().with(|config| config.idle_time = zero)),
        ("heartbeat", usual().with(|config| config.heartbeat = zero)),
        ("lifetime", usual().with(|config| config.lifetime = zero)),
        ("stall_time", usual().with(|config| config.stall_time = zero)),
        ("lifetime", usual().with(|config| config.lifetime = ever)),
        ("retry", usual().with(|config| config.retry = ever)),
        ("heartbeat", usual().with(|config| config.heartbeat = Duration::from_secs(1))),
        ("head_bytes", usual().with(|config| config.head_bytes = 0)),
        ("topics", usual().with(|config| config.topics = 0)),
        ("connections", usual().with(|config| config.connections = 0)),
        ("lanes", usual().with(|config| config.lanes = 257)),
        ("fsync", usual().with(|config| config.fsync = true)),
        ("allow_origins", usual().with(|config| config.allow_origins = vec!["x".into()])),
    ] {
        let error = bind(config).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().starts_with(&format!("{field}: ")), "{field}: {error}");
    }
}

#[test]
fn a_star_in_an_origin_stands_for_the_names_below_it_and_nothing_else() {
    let allow_origins = ["https://*.example.com", "http://*.dev.example:8080", "https://*.localhost"].map(String::from);
    let server = serve(Config::default().with(|config| config.allow_origins = allow_origins.to_vec()));
    let addr = server.addr().unwrap();
    for (origin, is_allowed) in [
        ("https://app.example.com", true),
        ("https://a.b.example.com", true),
        ("https://x.localhost", true),
        ("http://a.dev.example:8080", true),
        ("https://example.com", false),
        ("https://.example.com", false),
        ("https://evilexample.com", false),
        ("https://app.example.com.evil", false),
        ("https://app.example.com:8443", false),
        ("http://app.example.com", false),
        ("http://a.dev.example", false),
        ("http://a.dev.example:80800", false),
        ("https://evil/.example.com", false),
        ("https://user@app.example.com", false),
        ("https://*.example.com", false),
        ("null", false),
    ] {
        let answer = ask(addr, "POST", "/events/a", &format!("Origin: {origin}\r\n"));
        assert_eq!(answer.status, if is_allowed { 200 } else { 403 }, "{origin}");
        let answer = ask(addr, "GET", "/health", &format!("Origin: {origin}\r\n"));
        assert_eq!(answer.header("access-control-allow-origin"), is_allowed.then_some(origin), "{origin}");
    }
    // A proxy passes the public host on.
    for (host, status) in
        [("app.example.com", 200), ("APP.example.com:81", 200), ("example.com", 403), ("evilexample.com", 403)]
    {
        assert_eq!(ask(addr, "GET", "/health", &format!("Host: {host}\r\n")).status, status, "{host}");
    }
    // What came over plain HTTP, somebody on the way may have written, also where the host is the same.
    for (origin, status) in [("https://app.example.com", 200), ("http://app.example.com", 403)] {
        let fields = format!("Host: app.example.com\r\nOrigin: {origin}\r\n");
        assert_eq!(ask(addr, "POST", "/events/a", &fields).status, status, "{origin}");
    }
    for origin in [
        "https://*",
        "https://*..",
        "https://*.a..b",
        "https://*.com",
        "https://*.*.com",
        "https://a.*.com",
        "https://*a.example.com",
        "*.example.com",
    ] {
        let error = bind(Config::default().with(|config| config.allow_origins = vec![origin.into()])).err();
        assert!(
            error.unwrap().to_string().contains("is no origin: write https://app.example, https://*.app.example"),
            "{origin}"
        );
    }
}

#[test]
fn a_preflight_of_an_allowed_origin_gets_the_fields_that_it_asks_for_if_they_are_names() {
    let server =
        serve(Config::default().with(|config| config.allow_origins = vec!["https://app.example".into(), "*".into()]));
    let asks = |origin: &str, fields: &str| {
        let fields = format!("Origin: {origin}\r\nAccess-Control-Request-Method: DELETE\r\n{fields}");
        ask(server.addr().unwrap(), "OPTIONS", "/events/a", &fields)
    };
    let allowed = |fields: &str| {
        let answer = asks("https://app.example", fields);
        answer.header("access-control-allow-headers").unwrap().to_string()
    };
    let requested = "Access-Control-Request-Headers";
    assert_eq!(
        allowed(&format!("{requested}: x-request-id,\tx-b3 ,authorization\r\n")),
        "x-request-id, x-b3, authorization"
    );
    assert_eq!(allowed(&format!("{requested}: a\r\n{requested}: b\r\n")), "a, b");
    assert_eq!(allowed(&format!("{requested}: a b, c:d, \"e\", f, é\r\n")), "f");
    let usual = "Authorization, Cache-Control, Content-Type, Last-Event-ID";
    assert_eq!(allowed(""), usual);
    assert_eq!(allowed(&format!("{requested}: ,\r\n")), usual);
    let elsewhere = asks("https://elsewhere.example", &format!("{requested}: authorization,x-y\r\n"));
    assert_eq!(elsewhere.header("access-control-allow-headers"), Some("Cache-Control, Last-Event-ID"), "reading only");
    // From the internet to a server of the user's own network.
    let private = "Access-Control-Request-Private-Network";
    let answers = |fields: &str| {
        let answer = asks("https://app.example", fields);
        answer.header("access-control-allow-private-network").map(String::from)
    };
    assert_eq!(answers(&format!("{private}: true\r\n")), Some("true".into()));
    assert_eq!((answers(""), answers(&format!("{private}: no\r\n"))), (None, None));
    let closed = serve_default();
    let fields = format!("Origin: https://app.example\r\n{private}: true\r\n{requested}: x\r\n");
    let answer = ask(closed.addr().unwrap(), "OPTIONS", "/events/a", &fields);
    assert!(!answer.head.to_lowercase().contains("access-control"), "{answer:?}");
}
