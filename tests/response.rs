//! What answers look like.

use crate::{both, common::*};
use brooklet::Event;
use std::process::Command;

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
}
