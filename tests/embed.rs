//! The programs of `tests/embed`, which embedders start from, over the wire.

use crate::common::*;
use brooklet::{Event, Handle};
use std::net::SocketAddr;

#[allow(dead_code)] // their `main`
#[path = "embed/chat.rs"]
mod chat;
#[allow(dead_code)]
#[path = "embed/dashboard.rs"]
mod dashboard;
#[allow(dead_code)]
#[path = "embed/jobs.rs"]
mod jobs;

fn start(server: std::io::Result<brooklet::Server>) -> (Handle, SocketAddr) {
    let server = server.unwrap().spawn().unwrap();
    let addr = server.addr().unwrap();
    (server, addr)
}

const HERE: &str = "127.0.0.1:0";

#[test]
fn a_job_is_posted_and_its_progress_is_the_answer() {
    let (server, addr) = start(jobs::server(HERE));
    let mut page = Wire::connect(addr);
    page.send(post_request("/jobs", "once upon a time").as_bytes());
    assert!(page.head().contains("\r\nContent-Type: text/event-stream\r\n"));
    let words: Vec<_> = (0..4).map(|_| page.event().unwrap()).collect();
    assert_eq!(words.iter().map(|word| word.data()).collect::<Vec<_>>(), ["ONCE", "UPON", "A", "TIME"]);
    let done = page.event().unwrap();
    assert_eq!((done.event.as_deref(), page.rest().len(), page.is_over()), (Some("done"), 0, true));
    // Its page had to reload after the second word.
    let (mut again, _) = Wire::subscribe(addr, "/jobs/1", &format!("Last-Event-ID: {}\r\n", words[1].id()));
    assert_eq!((again.event().unwrap().data(), again.event().unwrap().data()), ("A", "TIME"));
    assert_eq!(again.event().unwrap().event.as_deref(), Some("done"));
    let over = format!("GET /jobs/1 HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: {}\r\n\r\n", done.id());
    assert_eq!(Wire::ask(addr, &over).status, 204);
    assert_eq!(
        (get(addr, "/jobs/2").status, get(addr, "/jobs/a%20b").status, get(addr, "/jobs").status),
        (404, 400, 405)
    );
    assert_eq!(server.stop(), 0);
}

#[test]
fn only_who_has_logged_in_chats() {
    let (_server, addr) = start(chat::server(HERE));
    assert_eq!((get(addr, "/chat").status, post(addr, "/chat", "x").status), (401, 401));
    assert_eq!(post(addr, "/login", "").status, 400);
    let cookies = ["ada", "bob"].map(|name| {
        let answer = post(addr, "/login", name);
        let cookie = answer.header("set-cookie").unwrap();
        assert!(answer.status == 204 && cookie.ends_with("; HttpOnly; SameSite=Strict; Path=/"), "{answer:?}");
        format!("Cookie: {}\r\n", cookie.split(';').next().unwrap())
    });
    assert_ne!(cookies[0], cookies[1]);
    let (mut ada, _) = Wire::subscribe(addr, "/chat", &cookies[0]);
    let say = |cookie: &str, origin: &str| {
        let fields = format!("Host: localhost\r\n{cookie}{origin}Content-Length: 5\r\n");
        Wire::ask(addr, &format!("POST /chat HTTP/1.1\r\n{fields}\r\nhello")).status
    };
    assert_eq!(say(&cookies[1], "Origin: https://evil.example\r\n"), 403);
    assert_eq!(say("Cookie: session=guessed\r\n", ""), 401);
    assert_eq!(say(&cookies[1], ""), 200);
    assert_eq!(ada.event().unwrap().data(), "bob: hello");
}

#[test]
fn a_dashboard_shows_the_newest_value_first() {
    let (server, addr) = start(dashboard::server(HERE));
    assert!(get(addr, "/").body.contains("new EventSource('values')"));
    let hub = server.hub();
    for n in 0..5 {
        hub.publish("load", Event::new(n.to_string())).unwrap();
        hub.publish("memory", Event::new((10 * n).to_string())).unwrap();
    }
    let mut page = Wire::stream(addr, "/values", "");
    let mut seen = || {
        let value = page.event().unwrap();
        (value.event.clone().unwrap(), value.data().to_string())
    };
    assert_eq!(seen(), ("load".into(), "4".into()));
    assert_eq!(seen(), ("memory".into(), "40".into()));
    hub.publish("requests", Event::new("7")).unwrap();
    assert_eq!(seen(), ("requests".into(), "7".into()));
}
