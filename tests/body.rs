//! Bodies: one event, or a line each, whole or broken off.

use crate::common::*;
use brooklet::{Config, Event};
use std::thread;

/// Whoever only asks may send a body, too, and needs no token for it.
#[test]
fn bodies_that_are_of_no_use_are_not_kept() {
    let process = Process::start(&["--publish-token", "t", "--subscribe-token", "t", "--body-bytes", "1MiB"]);
    let (addr, memory) = (process.addr, process.status("VmHWM"));
    let head = "GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000001\r\n\r\n";
    let mut wires: Vec<Wire> = (0..40).map(|_| Wire::connect(addr)).collect();
    wires.iter_mut().for_each(|wire| wire.send(format!("{head}{}", "x".repeat(1_000_000)).as_bytes()));
    wires.iter_mut().for_each(|wire| wire.send(b"x")); // only now is any of them whole
    assert!(wires.iter_mut().all(|wire| wire.answer().status == 200));
    let more = process.status("VmHWM") - memory;
    println!("bodies of no use: {more} kB more at most");
    assert!(more < 4 * 1024, "{more} kB more");
    process.finish();
}

/// Each line of no bytes takes hundreds as an event, with its copy of the name.
#[test]
fn lines_of_no_bytes_from_many_connections_at_once_stay_small() {
    let process = Process::start(&["--keep-bytes", "4MiB"]);
    let (addr, memory) = (process.addr, process.status("VmRSS"));
    let name = "e".repeat(256);
    let newlines = "\n".repeat(4 * 1024);
    let length = newlines.len();
    let head = format!("PUT /events/a?event={name} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n");
    let mut wires: Vec<Wire> = (0..60).map(|_| Wire::connect(addr)).collect();
    wires.iter_mut().for_each(|wire| wire.send(format!("{head}{newlines}").as_bytes()));
    let mut most = 0;
    wait_for_growth("all lines", wires.len() * length, || {
        most = most.max(process.status("VmRSS").saturating_sub(memory));
        metric(addr, "published_total") as usize
    });
    println!("lines of no bytes: {most} kB more");
    assert!(most < 40 * 1024, "{most} kB more");
    assert!(wires.iter_mut().all(|wire| wire.answer().body.starts_with("published 4096,")));
    process.finish();
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
    put.send(HEALTH.as_bytes());
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
    let server = serve(Config::default().with(|config| {
        config.line_bytes = 10;
        config.body_bytes = 10;
    }));
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

/// Its LF may never come; then its CR is not part of it either.
#[test]
fn the_last_line_of_a_put_has_no_cr() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
    for (body, lines) in [
        ("one\r\ntwo\r", vec!["one", "two"]),
        ("x\n\r", vec!["x", ""]),
        ("\r", vec![""]),
        ("a\rb\r\r", vec!["a\nb\n"]), // a CR that no end of a line follows begins a new one
        ("x\n", vec!["x"]),
    ] {
        for chunk in [1, body.len()] {
            let chunks = body
                .as_bytes()
                .chunks(chunk)
                .map(|part| format!("{:x}\r\n{}\r\n", part.len(), str::from_utf8(part).unwrap()));
            let chunks: String = chunks.collect();
            let head = "PUT /events/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
            let answer = Wire::ask(addr, &format!("{head}{chunks}0\r\n\r\n"));
            assert!(answer.body.starts_with(&format!("published {},", lines.len())), "{body:?}: {}", answer.body);
            for line in &lines {
                assert_eq!(stream.event().unwrap().data(), *line, "{body:?}");
            }
        }
    }
}
