//! Starting, stopping, and what is left behind.

use crate::{both, common::*};
use brooklet::{Config, Event, Server, crossbeam_channel};
use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;

#[test]
fn while_it_stops_a_connection_already_open_is_told_that_the_server_is_not_well() {
    let mut process = Process::start(&["--keep-events", "100000"]);
    let mut health = Wire::connect(process.addr);
    health.send(HEALTH.as_bytes());
    assert_eq!(health.answer().status, 200);
    // A reader that takes nothing holds the server for its grace.
    let stalled = Wire::stream(process.addr, "/events/a", "");
    let body = "x".repeat(60_000);
    wait_for("the reader to fall behind", || {
        assert_eq!(post(process.addr, "/events/a", &body).status, 200);
        (metric(process.addr, "woken_total") > 0).then_some(())
    });
    process.signal("TERM");
    wait_for("the answer to change", || {
        health.send(HEALTH.as_bytes());
        Some(health.answer()).filter(|answer| answer.status == 503)
    });
    assert!(process.child.wait().unwrap().success());
    drop(stalled);
}

/// Stopping takes no lock that publishers hold while they wait for a lane's queue to have room: once anybody can see that it
/// stops, nothing more is published.
#[test]
fn publishers_that_stand_in_line_do_not_hold_up_stopping() {
    let server = serve(Config::default().with(|config| config.lanes = 1));
    let addr = server.addr().unwrap();
    let _crowd = Crowd::subscribe(addr, "/events/a,b", 500);
    let (published, stopping, afterwards) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for n in 0..200 {
            let (hub, published, stopping, afterwards) = (server.hub(), &published, &stopping, &afterwards);
            scope.spawn(move || {
                for topic in ["a", "b"].iter().cycle().skip(n % 2) {
                    let late = stopping.load(SeqCst);
                    if hub.publish(topic, Event::new("x")).is_err() {
                        return;
                    }
                    published.fetch_add(1, SeqCst);
                    afterwards.fetch_add(late.into(), SeqCst);
                }
            });
        }
        let mut wire = Wire::connect(addr);
        scope.spawn({
            let stopping = &stopping;
            move || {
                while wire.socket.write_all(HEALTH.as_bytes()).is_ok()
                    && wire.take_until(b"\r\n\r\n").is_some_and(|head| head.starts_with(b"HTTP/1.1 200 "))
                {
                    assert_eq!(wire.take(3), b"ok\n");
                }
                stopping.store(true, SeqCst);
            }
        });
        wait_for("the lane's queue to be full", || (published.load(SeqCst) > 5_000).then_some(()));
        server.stop();
    });
    assert_eq!(afterwards.into_inner(), 0, "events that were published while it was seen to stop");
}

#[test]
fn closed_streams_leave_no_timer_no_thread_and_no_descriptor() {
    let process = Process::start(&[]);
    both::closed_streams_leave_no_timer_no_thread_and_no_descriptor(&process);
    process.finish();
}

#[test]
fn five_thousand_opened_and_closed_leave_no_thread_and_no_descriptor() {
    let process = Process::start(&["--log", "off"]);
    assert_eq!(get(process.addr, "/health").status, 200);
    wait_for_metric(process.addr, "connections", 1);
    let before = process.at_rest();
    for wave in 0..25 {
        let streams: Vec<_> = (0..200)
            .map(|n| Wire::stream(process.addr, ["/events/a", "/test", "/events/a,b,c", "/events/a?poll"][n % 4], ""))
            .collect();
        if wave % 2 == 0 {
            assert_eq!(post(process.addr, "/events/a", "x").status, 200);
        }
        drop(streams);
    }
    process.wait_until_at_most(before);
    assert_eq!(get(process.addr, "/health").status, 200);
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
fn a_server_that_is_dropped_is_gone() {
    // At an address of its own, where no other test's server can get the port meanwhile.
    let server = Server::bind("127.0.0.3:0", Config::default()).unwrap().spawn().unwrap();
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
fn a_server_without_an_address_serves_the_sockets_of_another_accept_loop() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let server = Server::new(Config::default()).unwrap();
    assert_eq!(server.addr().unwrap_err().kind(), ErrorKind::AddrNotAvailable);
    server.page("/mine", "text/plain", "mine").unwrap();
    let server = Arc::new(server.spawn().unwrap());
    let accepting = thread::spawn({
        let server = server.clone();
        move || loop {
            let (socket, _) = listener.accept().unwrap();
            if let Err(error) = server.serve(socket) {
                return error.kind();
            }
        }
    });
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
    assert_eq!(get(addr, "/mine").body, "mine");
    wire_arrives(&server, &mut stream);
    // What comes over loopback is asked for a name of this machine, as where we listen ourselves.
    assert_eq!(Wire::ask(addr, "GET /mine HTTP/1.1\r\nHost: evil.example\r\n\r\n").status, 403);
    assert_eq!(server.stop(), 0);
    assert!(String::from_utf8(stream.rest()).unwrap().starts_with(": the server is stopping\n"));
    let mut late = TcpStream::connect(addr).unwrap();
    assert_eq!(accepting.join().unwrap(), ErrorKind::NotConnected);
    assert_eq!(std::io::Read::read(&mut late, &mut [0]).unwrap(), 0, "the socket is closed");
}

/// A listener of IPv6 mostly takes IPv4 as well, and then calls 127.0.0.1 `::ffff:127.0.0.1`.
#[test]
fn what_comes_over_loopback_is_known_by_a_mapped_address_too() {
    let Ok(listener) = TcpListener::bind("[::]:0") else { return eprintln!("left out: there is no IPv6 here") };
    let server = Server::new(Config::default()).unwrap().spawn().unwrap();
    let addr = (Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port()).into();
    thread::scope(|scope| {
        scope.spawn(|| (0..2).for_each(|_| server.serve(listener.accept().unwrap().0).unwrap()));
        assert_eq!(get(addr, "/health").status, 200);
        assert_eq!(Wire::ask(addr, "GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n").status, 403);
    });
    // Where only loopback can come, no token is needed.
    drop(Server::bind("[::ffff:127.0.0.1]:0", Config::default()).unwrap());
}

#[test]
fn a_connection_handed_in_while_the_server_stops_is_closed_too() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for _ in 0..100 {
        let server = Server::new(Config::default()).unwrap().spawn().unwrap();
        let pair = |_| (TcpStream::connect(listener.local_addr().unwrap()).unwrap(), listener.accept().unwrap().0);
        let (clients, sockets): (Vec<_>, Vec<_>) = (0..50).map(pair).unzip();
        let sockets = std::sync::Mutex::new(sockets.into_iter());
        let next = || sockets.lock().unwrap().next();
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while let Some(socket) = next() {
                        let _ = server.serve(socket);
                    }
                });
            }
            assert_eq!(server.stop(), 0);
        });
        for mut client in clients {
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            let ended = std::io::Read::read(&mut client, &mut [0]);
            assert!(
                ended.as_ref().map_or_else(|error| error.kind() == ErrorKind::ConnectionReset, |got| *got == 0),
                "{ended:?}"
            );
        }
    }
}

#[test]
fn a_server_that_listens_nowhere_has_nothing_to_run() {
    let error = Server::new(Config::default()).unwrap().run().unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (ErrorKind::AddrNotAvailable, "this server listens nowhere itself")
    );
    let open = Config::default().with(|config| config.open = false);
    let error = Server::bind("0.0.0.0:0", open).map(drop).unwrap_err();
    let error = error.to_string();
    assert!(error.starts_with("open: 0.0.0.0:") && error.ends_with("set publish_tokens or tokens, or open"), "{error}");
}

#[test]
fn the_address_is_known_before_it_runs() {
    let server = bind(Config::default()).unwrap();
    let (addr, hub) = (server.addr().unwrap(), server.hub());
    assert_ne!(addr.port(), 0);
    let running = thread::spawn(move || server.run());
    assert_eq!(get(addr, "/health").status, 200);
    assert!(hub.publish("a", Event::new("x")).is_ok() && !running.is_finished());
}

/// A handler that never returns cannot be ended, only counted; whoever stops the server is told, and so are all others who do.
#[test]
fn it_is_stopped_by_reference_and_says_how_many_handlers_have_not_returned() {
    let server = bind(Config::default()).unwrap();
    let (release, held) = crossbeam_channel::bounded::<()>(0);
    server.stream("/held", move |_| held.recv().map_err(std::io::Error::other)).unwrap();
    server.stream("/waits", |stream| stream.closed().recv().map(drop).map_err(std::io::Error::other)).unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    let held: Vec<_> = (0..2).map(|_| Wire::stream(addr, "/held", "")).collect();
    let mut waits = Wire::stream(addr, "/waits", "");
    thread::scope(|scope| {
        let stops: Vec<_> = (0..3).map(|_| scope.spawn(|| server.stop())).collect();
        stops.into_iter().for_each(|stop| assert_eq!(stop.join().unwrap(), 2));
    });
    assert_eq!(server.stop(), 2);
    let end = String::from_utf8(waits.rest()).unwrap();
    assert!(end.starts_with(": the server is stopping\nretry: "), "a handler that waits for its page is told: {end:?}");
    drop((release, held));
}
