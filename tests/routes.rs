//! What is at a path.

use crate::common::*;
use brooklet::{Config, Event};
use std::io::ErrorKind;
use std::time::Duration;

#[test]
fn options_names_the_methods() {
    let server = serve_default();
    for (target, allow) in [
        ("/events/a", "GET, HEAD, POST, PUT, DELETE, OPTIONS"),
        ("*", "GET, HEAD, POST, PUT, DELETE, OPTIONS"),
        ("/health", "GET, HEAD, OPTIONS"),
    ] {
        let answer =
            Wire::ask(server.addr().unwrap(), &format!("OPTIONS {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        assert_eq!((answer.status, answer.header("allow")), (204, Some(allow)), "{target}");
        assert_eq!(answer.header("content-length"), None, "RFC 9110 §8.6");
    }
}

#[test]
fn pages_and_handlers_live_beside_the_topics() {
    let server = bind(Config::default()).unwrap();
    server.page("/style.css", "text/css", "body {}").unwrap();
    server
        .stream("/echo", |stream| {
            stream.comment("two\nlines")?;
            let text = format!("{:?} {:?}", stream.request().query("q"), stream.request().last_event_id());
            stream.send(&Event::new(text).name("echo").id("7").retry(Duration::from_millis(9)))?;
            assert!(stream.send(&Event::new("x").name("a\nb")).is_err());
            Ok(())
        })
        .unwrap();
    for path in ["relative", "/events/a", "/health", "/topics"] {
        assert!(server.page(path, "text/plain", "x").is_err(), "{path}");
    }
    // What goes into a head, or could never be asked for.
    for path in ["/a\r\nX-Evil: 1", "/a\0", "/a\u{7f}", "/a?b=c", "/a#b"] {
        assert!(server.page(path, "text/plain", "x").is_err(), "{path:?}");
        assert!(server.stream(path, |_| Ok(())).is_err(), "{path:?}");
    }
    let types =
        ["text/plain\r\nX-Evil: 1", "text/plain\n", "text/plain\0", "", "text", "/plain", "text/", "text/plain é"];
    for content_type in types {
        let error = server.page("/a", content_type, "x").unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains("is no content type"), "{error}");
    }
    for content_type in ["text/html; charset=utf-8", "image/svg+xml", "text/plain ;a=\"b c\""] {
        server.page("/types", content_type, "x").unwrap();
    }
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    let page = get(addr, "/style.css");
    assert_eq!((page.status, page.header("content-type"), page.body.as_str()), (200, Some("text/css"), "body {}"));
    let mut stream = Wire::stream(addr, "/echo?q=a%20b", "Last-Event-ID: 6\r\n");
    let expected = ":two\n:lines\nevent: echo\nid: 7\ndata: Some(\"a b\") Some(\"6\")\nretry: 9\n\n";
    assert_eq!(String::from_utf8(stream.rest()).unwrap(), expected);
}
