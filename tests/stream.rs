//! A handler's stream.

use crate::common::*;
use brooklet::{Config, Event};
use std::io::ErrorKind;
use std::sync::mpsc;

#[test]
fn a_handlers_stream_gets_its_head_at_once_and_nothing_its_handler_did_not_write() {
    let process = Process::start(&["--heartbeat", "4s"]);
    let mut stream = Wire::stream(process.addr, "/test", "");
    assert!(stream.buffer.is_empty(), "the head came alone");
    let frames = [stream.take_until(b"\n\n").unwrap(), stream.take_until(b"\n\n").unwrap()];
    assert!(frames.iter().all(|frame| frame.starts_with(b"event: test\nid: ")));
    process.signal("TERM");
    let end = String::from_utf8(stream.rest()).unwrap();
    let end = end.split("\n\n").last().map_or(end.as_str(), |_| end.trim_start_matches(|c| c != ':'));
    assert!(end.contains("\nretry: "), "{end:?}");
}

#[test]
fn a_handler_that_panics_ends_only_its_own_stream() {
    let server = bind(Config::default()).unwrap();
    server.stream("/panic", |_| panic!("on purpose")).unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    assert!(Wire::stream(addr, "/panic", "").rest().is_empty());
    wait_for_metric(addr, "subscribers", 0);
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
    wire_arrives(&server, &mut stream);
}

#[test]
fn each_line_of_a_comment_becomes_one_whatever_ends_it() {
    let server = bind(Config::default()).unwrap();
    server
        .stream("/comments", |stream| {
            ["a\r\nb", "c\nd\re", "", "\r\n"].into_iter().try_for_each(|text| stream.comment(text))
        })
        .unwrap();
    let server = server.spawn().unwrap();
    let rest = Wire::stream(server.addr().unwrap(), "/comments", "").rest();
    assert_eq!(String::from_utf8(rest).unwrap(), ":a\n:b\n:c\n:d\n:e\n:\n:\n:\n");
}

#[test]
fn a_gap_is_the_servers_own_word_on_a_handlers_stream_too() {
    let server = bind(Config::default()).unwrap();
    let (sender, errors) = mpsc::channel();
    server
        .stream("/gap", move |stream| {
            let error = stream.send(&Event::new("x").name("gap")).unwrap_err();
            sender.send(error.kind()).unwrap();
            stream.send(&Event::new("y").name("gaps"))
        })
        .unwrap();
    let server = server.spawn().unwrap();
    let rest = Wire::stream(server.addr().unwrap(), "/gap", "").rest();
    assert_eq!(String::from_utf8(rest).unwrap(), "event: gaps\ndata: y\n\n");
    assert_eq!(errors.recv().unwrap(), ErrorKind::InvalidInput);
}
