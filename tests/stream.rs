//! A handler's stream.

use crate::common::*;
use brooklet::crossbeam_channel::{RecvTimeoutError, TryRecvError, select, unbounded};
use brooklet::{Config, Event, News, Since};
use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

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

#[test]
fn a_handler_that_waits_is_told_when_its_stream_is_over() {
    let server = bind(Config::default()).unwrap();
    let (sender, reasons) = mpsc::channel();
    server
        .stream("/floods", move |stream| {
            assert_eq!(stream.closed().try_recv(), Err(TryRecvError::Empty));
            let error = (0..).find_map(|n: u64| stream.send(&Event::new(n.to_string())).err()).unwrap();
            // Whatever has found that the page has gone, all others hear of it at once.
            assert_eq!(stream.closed().try_recv(), Err(TryRecvError::Disconnected));
            assert_eq!(stream.send(&Event::new("late")).unwrap_err().to_string(), error.to_string());
            sender.send(error.to_string()).unwrap();
            Err(error)
        })
        .unwrap();
    let server = server.spawn().unwrap();
    let mut page = Wire::stream(server.addr().unwrap(), "/floods", "");
    page.event().unwrap();
    page.reset();
    assert_eq!(reasons.recv_timeout(PATIENCE).unwrap(), "the peer reset the connection");
}

/// Their sockets are looked at every 1.75 s, whatever the handlers are doing.
#[test]
fn two_hundred_handlers_that_wait_for_ever_end_when_their_pages_close() {
    let server = bind(Config::default()).unwrap();
    let (_never, moves) = unbounded::<String>();
    let ended = Arc::new(AtomicUsize::new(0));
    let count = ended.clone();
    server
        .stream("/moves", move |stream| {
            select! {
                recv(stream.closed()) -> _ => count.fetch_add(1, SeqCst),
                recv(moves) -> _ => unreachable!("nobody moves"),
            };
            Ok(())
        })
        .unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    let pages: Vec<_> = (0..200).map(|_| Wire::stream(addr, "/moves", "")).collect();
    wait_for_metric(addr, "subscribers", 200);
    drop(pages);
    let closed = Instant::now();
    wait_for_metric(addr, "subscribers", 0);
    println!("200 handlers ended {:?} after their pages", closed.elapsed());
    assert_eq!(ended.load(SeqCst), 200);
}

#[test]
fn a_handler_that_is_silent_has_its_heartbeats_written() {
    let server = bind(Config::default().with(|config| config.heartbeat = Duration::from_secs(4))).unwrap();
    let (go_on, silence) = unbounded::<()>();
    server
        .stream("/silent", move |stream| {
            stream.send(&Event::new("before"))?;
            silence.recv().map_err(io::Error::other)?;
            stream.send(&Event::new("after"))
        })
        .unwrap();
    let server = server.spawn().unwrap();
    let mut page = Wire::stream(server.addr().unwrap(), "/silent", "");
    assert_eq!(page.event().unwrap().data(), "before");
    for _ in 0..3 {
        assert_eq!(page.take_until(b"\n").unwrap(), b":\n");
    }
    go_on.send(()).unwrap();
    let after = page.event().unwrap();
    assert_eq!(after.data(), "after");
    assert!(page.rest().is_empty() && page.is_over());
}

#[test]
fn while_a_handler_waits_for_something_else_heartbeats_go_out_and_closing_is_noticed() {
    let server = bind(Config::default().with(|config| config.heartbeat = Duration::from_millis(3_500))).unwrap();
    let (go_on, news) = mpsc::channel::<()>();
    let (sender, errors) = mpsc::channel();
    let (handlers, closed) = mpsc::channel();
    let news = std::sync::Mutex::new(news);
    server
        .stream("/waits", move |stream| {
            handlers.send(stream.closed().clone()).unwrap();
            stream.send(&Event::new("first"))?;
            news.lock().unwrap().recv().unwrap();
            let sent = stream.send(&Event::new("second"));
            sender.send(sent.as_ref().err().map(ToString::to_string)).unwrap();
            sent
        })
        .unwrap();
    let server = server.spawn().unwrap();
    let mut stream = Wire::stream(server.addr().unwrap(), "/waits", "");
    assert_eq!(stream.event().unwrap().data(), "first");
    assert_eq!(stream.take_until(b":\n").unwrap(), b":\n", "a heartbeat, though the handler is elsewhere");
    go_on.send(()).unwrap();
    assert_eq!(stream.event().unwrap().data(), "second");
    assert_eq!(errors.recv().unwrap(), None);
    let mut stream = Wire::stream(server.addr().unwrap(), "/waits", "");
    assert_eq!(stream.event().unwrap().data(), "first");
    stream.close();
    let closed = closed.iter().nth(1).unwrap();
    assert_eq!(closed.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected), "it is noticed meanwhile");
    go_on.send(()).unwrap();
    assert_eq!(errors.recv().unwrap().as_deref(), Some("the peer closed the connection"), "the first write fails");
}

/// The same with the limits as they are: many proxies cut a stream that is silent for 60 s, some one of 30 s.
#[test]
fn a_handler_may_be_silent_for_forty_seconds() {
    let silence = Duration::from_secs(40);
    let server = bind(Config::default()).unwrap();
    server
        .stream("/silent", move |stream| {
            stream.send(&Event::new("before"))?;
            std::thread::sleep(silence); // not `stream.sleep`, which would write heartbeats itself
            stream.send(&Event::new("after"))?;
            stream.send(&Event::new("and on"))
        })
        .unwrap();
    let server = server.spawn().unwrap();
    let (began, mut heartbeats) = (Instant::now(), Vec::new());
    let mut page = Wire::stream(server.addr().unwrap(), "/silent", "");
    assert_eq!(page.event().unwrap().data(), "before");
    let after = loop {
        match page.take_until(b"\n").unwrap() {
            line if line == b":\n" => heartbeats.push(began.elapsed()),
            line => break line,
        }
    };
    println!("heartbeats after {heartbeats:?} of silence");
    assert!(heartbeats.len() >= 2 && began.elapsed() >= silence, "{heartbeats:?}");
    assert_eq!((after, page.take(1)), (b"data: after\n".to_vec(), b"\n".to_vec()));
    assert_eq!((page.event().unwrap().data(), page.rest().len(), page.is_over()), ("and on", 0, true));
}

#[test]
fn a_stream_waits_for_a_follower_as_long_as_its_page_and_both_servers_are_there() {
    let server = bind(Config::default()).unwrap();
    let other = serve_default();
    let (hub, elsewhere) = (server.hub(), other.hub());
    let (sender, errors) = mpsc::channel();
    server
        .route("/relay", move |request| {
            let mut stream = request.stream()?;
            let hub = if request.query("other").is_some() { &elsewhere } else { &request.hub() };
            let mut news = hub.subscribe(["a"], Since::Newest(1))?;
            let error = loop {
                match stream.wait_for(&mut news) {
                    Ok(News::Event(event)) => stream.send(&Event::new(event.data.to_uppercase()))?,
                    Ok(gap) => panic!("{gap:?}"),
                    Err(error) => break error,
                }
            };
            sender.send(error.to_string()).unwrap();
            Err(error)
        })
        .unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    hub.publish_all("a", ["one", "two"].map(Event::new)).1.unwrap();
    let mut page = Wire::stream(addr, "/relay", "");
    assert_eq!(page.event().unwrap().data(), "TWO");
    hub.publish("a", Event::new("three")).unwrap();
    assert_eq!(page.event().unwrap().data(), "THREE");
    page.close();
    assert_eq!(errors.recv_timeout(PATIENCE).unwrap(), "the peer closed the connection");
    // A follower may be of another server of the program's.
    other.hub().publish("a", Event::new("four")).unwrap();
    let mut page = Wire::stream(addr, "/relay?other", "");
    assert_eq!(page.event().unwrap().data(), "FOUR");
    drop(other);
    assert_eq!(errors.recv_timeout(PATIENCE).unwrap(), "the server is stopping");
    assert!(page.rest().is_empty() && page.is_over());
    let mut page = Wire::stream(addr, "/relay", "");
    assert_eq!(page.event().unwrap().data(), "THREE");
    assert_eq!(server.stop(), 0);
    assert_eq!(errors.recv_timeout(PATIENCE).unwrap(), "the server is stopping");
}
