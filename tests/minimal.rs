//! The server in one file. What it promises like the command is tested by the same bodies; the rest is about its own limits,
//! which stand in the file and not in flags.

use crate::{both, common::*, corpus};
use std::io::Write;
use std::net::{Shutdown, TcpListener};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// As a program of one's own takes it in; the lints say if that leaves anything unused.
#[path = "../src/minimal.rs"]
mod one_file;

const CONNECTIONS: usize = 1_100;
const KEPT_BYTES: usize = 16 * 1024 * 1024;

#[test]
fn a_program_takes_it_as_a_module_serves_with_it_and_stops_it() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let (stop, stopping) = crossbeam_channel::bounded(0);
    let serving = thread::spawn(|| one_file::serve(listener, stopping));
    let mut stream = Wire::stream(addr, "/events/a", "");
    stream.block().expect("the first block: from here on it is subscribed");
    publish(addr, "/events/a", "hello");
    assert_eq!(stream.event().unwrap().data(), "hello");
    drop(stop);
    let end = stream.block().unwrap();
    assert_eq!((end.comments, end.retry), (vec!["the server is stopping".to_string()], Some(3_000)));
    assert!(stream.rest().is_empty());
    serving.join().unwrap().unwrap();
    assert!(TcpListener::bind(addr).is_ok(), "the port is free again");
}

#[test]
fn the_articles_stream_has_exactly_these_bytes() {
    let process = Process::minimal();
    let line = both::the_articles_stream_has_exactly_these_bytes(&process);
    assert!(line.starts_with("127.0.0.1:") && line.contains(" /test closed: "), "{line}");
    process.finish();
}

#[test]
fn each_stream_has_its_own_timer() {
    both::each_stream_has_its_own_timer(&Process::minimal());
}

#[test]
fn closed_streams_leave_no_timer_no_thread_and_no_descriptor() {
    let process = Process::minimal();
    both::closed_streams_leave_no_timer_no_thread_and_no_descriptor(&process);
    let log = process.finish();
    assert_eq!(log.lines().filter(|line| line.contains(" closed: ")).count(), 200, "{log}");
}

#[test]
fn a_closed_stream_is_noticed_and_logged() {
    let process = Process::minimal();
    both::a_closed_stream_is_noticed(&process, "/test", || {});
    both::a_closed_stream_is_noticed(&process, "/events/a", || drop(publish(process.addr, "/events/a", "x")));
    process.wait_for_log(" /events/a closed: ");
    process.finish();
}

#[test]
fn who_is_cut_off_200_times_sees_every_event_once_and_in_order() {
    let process = Process::minimal();
    let publish = |data: &str| publish(process.addr, "/events/a", data);
    both::who_is_cut_off_200_times_sees_every_event_once_and_in_order(process.addr, publish);
    process.finish();
}

#[test]
fn events_of_several_publishers_come_once_and_in_order_however_the_stream_is_cut() {
    let process = Process::minimal();
    both::events_of_several_publishers_come_once_and_in_order_however_the_stream_is_cut(process.addr);
    process.finish();
}

#[test]
fn a_slow_reader_is_cut_off_and_comes_back_to_what_it_missed() {
    let process = Process::minimal();
    both::a_slow_reader_is_cut_off_and_comes_back_to_what_it_missed(&process);
    process.wait_for_log(" closed: a write failed: Resource temporarily unavailable");
    process.finish();
}

/// It takes something in time, so it is not stalled; but its queue has overflowed. It gets what was in there, and its end.
#[test]
fn a_reader_whose_queue_overflows_gets_its_end_in_order_and_resumes() {
    const EVENTS: usize = 800; // of 1,000 bytes: more than the sockets and the queue hold, and less than is kept
    let process = Process::minimal();
    let mut slow = narrow(process.addr, 4_096, Some(1_400));
    open(&mut slow, "/events/a");
    let mut cursor = slow.block().unwrap().id.unwrap();
    for n in 0..EVENTS {
        publish(process.addr, "/events/a", &format!("{n} {}", "x".repeat(1_000)));
    }
    let number = |seen: &Seen| seen.data().split(' ').next().unwrap().parse::<usize>().unwrap();
    let (mut next, mut last) = (0, Seen::default());
    while let Some(seen) = slow.block() {
        if seen.data.is_some() {
            assert_eq!(number(&seen), next);
            (next, cursor) = (next + 1, seen.id.clone().unwrap());
        }
        last = seen;
    }
    assert!(next < EVENTS, "nothing overflowed");
    if process.wait_for_log("closed").contains("too slow") {
        assert_eq!((last.comments, last.retry), (vec!["the subscriber is too slow".to_string()], Some(3_000)));
    } // else this machine took ten seconds for it
    let mut back = Wire::stream(process.addr, "/events/a", &format!("Last-Event-ID: {cursor}\r\n"));
    for n in next..EVENTS {
        assert_eq!(number(&back.event().unwrap()), n);
    }
    process.finish();
}

#[test]
fn a_restart_is_a_gap_that_is_told_once() {
    both::a_restart_is_a_gap_that_is_told_once(Process::minimal(), Process::minimal);
}

#[test]
fn a_cursor_that_cannot_be_answered_is_told_of_the_gap_and_gets_all_that_is_kept() {
    let process = Process::minimal();
    let begin = publish(process.addr, "/events/a", "begin");
    let data = "x".repeat(32 * 1024);
    let count = KEPT_BYTES / data.len() + 10; // more than are kept
    let ids: Vec<String> = (0..count).map(|_| publish(process.addr, "/events/a", &data)).collect();
    let stream = |cursor: &str| Wire::stream(process.addr, "/events/a", &format!("Last-Event-ID: {cursor}\r\n"));
    let mut forgotten = 0;
    for cursor in [&begin, "1", "99999999999999999", "99999999999999999999999", "nonsense", "-1", "12-0", "\u{fc}"] {
        let mut stream = stream(cursor);
        let gap = stream.block().unwrap();
        assert!(gap.is_gap() && gap.retry == Some(3_000), "{cursor}: {gap:?}");
        let newest_forgotten = ids.iter().position(|id| Some(id) == gap.id.as_ref()).expect("one that was published");
        assert!((1..count / 10).contains(&newest_forgotten), "{newest_forgotten} of {count}");
        forgotten = newest_forgotten;
        for id in &ids[forgotten + 1..] {
            assert_eq!(stream.event().unwrap().id.as_ref(), Some(id), "{cursor}");
        }
    }
    let ids = &ids[forgotten..];
    for (next, cursor) in ids.iter().enumerate().map(|(n, id)| (n + 1, id)).step_by(99) {
        assert_eq!(stream(cursor).event().unwrap().id.as_ref(), ids.get(next), "nothing is missing after {cursor}");
    }
    let mut now = stream("");
    now.block().unwrap();
    publish(process.addr, "/events/a", "next");
    assert_eq!(now.event().unwrap().data(), "next", "no id is no cursor");
    process.finish();
}

#[test]
fn a_quiet_stream_has_a_heartbeat_every_15_seconds() {
    let process = Process::minimal();
    let started = Instant::now();
    let mut stream = Wire::stream(process.addr, "/events/a", "");
    stream.block().unwrap();
    assert_eq!(stream.take_until(b"\n").unwrap(), b":\n");
    assert!(started.elapsed() >= Duration::from_secs(14), "{:?}", started.elapsed());
    process.finish();
}

#[test]
fn every_kind_of_line_end_in_the_data_begins_a_new_line_and_nul_may_stand_in_it() {
    both::every_kind_of_line_end_in_the_data_begins_a_new_line_and_nul_may_stand_in_it(Process::minimal().addr);
}

#[test]
fn the_head_of_a_stream_keeps_proxies_from_holding_it_back() {
    both::the_head_of_a_stream_keeps_proxies_from_holding_it_back(Process::minimal().addr);
}

/// Within a second, if the machine has nothing else to do.
#[test]
fn ctrl_c_ends_200_streams_with_a_retry_although_others_have_not_sent_a_request() {
    let all_are_told = |signal, count| {
        let mut process = Process::minimal();
        let silent: Vec<Wire> = (0..20).map(|_| Wire::connect(process.addr)).collect();
        let streams: Vec<Wire> =
            (0..count).map(|n| Wire::stream(process.addr, ["/events/a", "/test"][n % 2], "")).collect();
        let started = Instant::now();
        let retries = both::stopping_ends_each_stream_with_a_retry(&mut process, signal, streams);
        println!("SIG{signal}: gone and seen by all after {:?}", started.elapsed());
        drop(silent);
        retries.is_some()
    };
    for signal in ["INT", "TERM"] {
        assert!([200, 50, 12].into_iter().any(|count| all_are_told(signal, count)), "SIG{signal}");
    }
}

#[test]
fn each_bad_request_gets_one_line_that_says_what_is_wrong() {
    let process = Process::minimal();
    let host = "Host: localhost\r\n";
    let head = |lines: &str| format!("GET / HTTP/1.1\r\n{host}{lines}\r\n");
    let to = |method: &str, target: &str| format!("{method} {target} HTTP/1.1\r\n{host}\r\n");
    let body = |fields: &str, body: &str| format!("POST /events/a HTTP/1.1\r\n{host}{fields}\r\n{body}");
    let from =
        |host: &str, origin: &str| format!("POST /events/a HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\n\r\n");
    let table = [
        (404, "GET and POST /events/NAME", to("GET", "/nothing")),
        (404, "with 1 to 64 of A-Z a-z 0-9 . _ ~ -", to("GET", "/events/")),
        (404, "there are GET /", to("GET", "/events/a,b")),
        (404, "there are GET /", to("GET", "/events/a/b")),
        (404, "there are GET /", to("POST", "/events/a%20b")),
        (404, "there are GET /", to("POST", &format!("/events/{}", "n".repeat(65)))),
        (404, "there are GET /", to("GET", "events/a")),
        (404, "there are GET /", to("POST", "/test")),
        (404, "there are GET /", to("POST", "/")),
        (501, "there are GET and POST", to("PUT", "/events/a")),
        (501, "there are GET and POST", to("BREW", "/events/a")),
        (501, "there are GET and POST", to("DELETE", "/")),
        (400, "one Host", "GET / HTTP/1.1\r\n\r\n".into()),
        (400, "one Host", head("Host: localhost\r\n")),
        (400, "one Host", head("host: evil.example\r\n")),
        (400, "no request of HTTP/1.1", head("Folded: a\r\n b\r\n")),
        (400, "no request of HTTP/1.1", head("Space : a\r\n")),
        (400, "no request of HTTP/1.1", head("Nul: a\0b\r\n")),
        (400, "no request of HTTP/1.1", "\x16\x03\x01\0\x05\x01\0\0\x01\0\r\n\r\n".into()),
        (400, "invalid HTTP version", "GET / HTTP/2.0\r\nHost: localhost\r\n\r\n".into()),
        (400, "too many headers", head(&"X: y\r\n".repeat(64))),
        (431, "a head is 16 KiB", head(&format!("X: {}\r\n", "y".repeat(16 * 1024)))),
        (431, "a head is 16 KiB", format!("GET /{}", "y".repeat(20_000))),
        (413, "64 KiB", body("Content-Length: 65537\r\n", &"x".repeat(65_537))),
        (413, "64 KiB", body("Content-Length: 9999999999\r\nExpect: 100-continue\r\n", "")),
        (400, "65536 at most", body("Content-Length: 99999999999999999999\r\n", "")),
        (400, "must be a number", body("Content-Length: +5\r\n", "hello")),
        (400, "must be a number", body("Content-Length: 5, 5\r\n", "hello")),
        (400, "must be a number", body("Content-Length: \r\n", "hello")),
        (400, "must be a number", body("Content-Length: 5\r\nContent-Length: 5\r\n", "hello")),
        (501, "send a Content-Length", body("Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n")),
        (501, "send a Content-Length", body("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", "hello")),
        (501, "send a Content-Length", body("Content-Length: 5\r\nTransfer-Encoding:\r\n", "hello")),
        (417, "send the body at once", body("Content-Length: 5\r\nExpect: 100-continue\r\n", "")),
        (400, "of loopback: localhost or 127.0.0.1", "GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n".into()),
        (400, "of loopback", "GET /test HTTP/1.1\r\nHost: localhost.evil.example:3000\r\n\r\n".into()),
        (400, "of loopback", "GET / HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n".into()),
        (403, "pages of another origin", from("localhost:3000", "http://evil.example")),
        (403, "pages of another origin", from("localhost:3000", "http://localhost:3001")),
        (403, "pages of another origin", from("localhost:3000", "https://localhost:3000")),
        (403, "pages of another origin", from("localhost:3000", "null")),
        (
            403,
            "pages of another origin",
            from("localhost:3000", "http://localhost:3000\r\nOrigin: http://localhost:3000"),
        ),
        (400, "of loopback", from("evil.example", "http://evil.example")),
    ];
    let mut stream = Wire::stream(process.addr, "/events/a", "");
    both::each_bad_request_gets_its_answer(process.addr, &table, |after| {
        assert_eq!(get(process.addr, "/").status, 200, "after {after:?}");
    });
    for (request, status, said) in [
        (
            &b"POST /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nab\xff\xfe"[..],
            400,
            "is not UTF-8\n",
        ),
        (b"GET / HT", 408, "did not come whole within 10 s\n"),
        (b"", 408, "did not come whole within 10 s\n"),
    ] {
        let mut wire = Wire::connect(process.addr);
        wire.send(request);
        wire.socket.shutdown(Shutdown::Write).unwrap();
        let answer = wire.answer();
        assert!(answer.status == status && answer.body.ends_with(said), "{answer:?}");
    }
    for host in ["localhost", "LOCALHOST:9", "127.0.0.1", "127.1.2.3:80", "[::1]:3000", "[::1]"] {
        let answer = Wire::ask(process.addr, &from(host, &format!("http://{host}")));
        assert_eq!(answer.status, 200, "{host}: {answer:?}");
        assert_eq!(stream.event().unwrap().id.unwrap(), answer.body.trim_end(), "nothing else was published");
    }
    process.finish();
}

/// A client that sends its whole body before it reads must not find the connection broken.
#[test]
fn for_a_while_after_a_refusal_what_is_still_sent_is_taken() {
    let process = Process::minimal();
    let mut wire = Wire::connect(process.addr);
    wire.send(b"POST /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 70000\r\n\r\n");
    assert_eq!(wire.answer().status, 413);
    let answered = Instant::now();
    assert!(wire.rest().is_empty(), "the answer is followed by the end");
    let is_taken = (0..100).all(|_| {
        thread::sleep(Duration::from_millis(2)); // so that a reset would have come back
        wire.socket.write_all(&[b'x'; 700]).is_ok()
    });
    assert!(is_taken || answered.elapsed() > Duration::from_secs(9), "it was cut off at once");
    process.finish();
}

/// An answer to `HEAD` may have no body, not even one that says why.
#[test]
fn a_query_changes_nothing_and_head_is_refused_without_a_body() {
    let process = Process::minimal();
    for (target, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/?a=b", "text/html; charset=utf-8"),
        ("/test?", "text/event-stream"),
        ("/events/a?_=1", "text/event-stream"),
        ("/nothing?/events/a", "text/plain; charset=utf-8"),
    ] {
        let mut get = Wire::connect(process.addr);
        get.send(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes());
        assert_eq!(header(&get.head(), "content-type"), Some(kind), "{target}");
        let mut wire = Wire::connect(process.addr);
        wire.send(format!("HEAD {target} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes());
        let head = wire.head();
        assert!(head.starts_with("HTTP/1.1 501 ") && wire.rest().is_empty(), "{target}: {head}");
    }
    process.finish();
}

#[test]
fn the_page_is_the_articles() {
    let page = get(Process::minimal().addr, "/").body;
    for part in ["new EventSource('test')", "'open', 'message', 'test', 'error'", "'pause'", "source.close()"] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    assert!(
        page.contains("source.readyState")
            && page.contains("source.url")
            && page.contains(".append(")
            && !page.contains("innerHTML")
    );
}

#[test]
fn the_corpus_of_malformed_requests_is_read_as_the_library_reads_it_or_refused() {
    let process = Process::minimal();
    corpus::what_is_published_is_what_the_library_reads(&process);
    corpus::each_request_is_answered_or_closed(&process);
    process.finish();
}

#[test]
fn ten_thousand_damaged_requests_leave_a_server_that_answers() {
    let process = Process::minimal();
    let (addr, before) = (process.addr, process.at_rest());
    let originals: [String; 5] = [
        "GET /events/a HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: 17\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost: localhost:80\r\nOrigin: http://localhost:80\r\n\r\n".into(),
        "HEAD /test?a=b HTTP/1.0\r\nHost: [::1]\r\nExpect: x\r\n\r\n".into(),
        "POST /events/a HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n".into(),
        post_request("/events/a", "one\r\ntwo"),
    ];
    let damage = |random: &mut Random| {
        let mut bytes = originals[random.below(5)].clone().into_bytes();
        for _ in 0..=random.below(3) {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes[at] = random.below(256) as u8,
                1 => drop(bytes.remove(at)),
                2 => bytes.insert(at, b"\r\n\0: 0+/\xff"[random.below(9)]),
                _ => drop(bytes.splice(at..at, originals[random.below(5)].bytes())),
            }
        }
        bytes
    };
    let hammer = |seed: u64| {
        let mut random = Random(seed);
        for _ in 0..2_500 {
            let bytes = damage(&mut random);
            let mut wire = Wire::connect(addr);
            let _ = wire.socket.write_all(&bytes);
            let _ = wire.socket.shutdown(Shutdown::Write);
            let head = wire.take_until(b"\r\n\r\n").map(|head| String::from_utf8(head).unwrap());
            let head = head.unwrap_or_else(|| panic!("no answer to {:?}", String::from_utf8_lossy(&bytes)));
            assert!(head.starts_with("HTTP/1.1 "), "{head}");
            wire.reset();
            if head.contains("text/event-stream") {
                publish(addr, "/events/a", "x"); // so that the reset is noticed
            }
        }
    };
    thread::scope(|scope| (1..=4).for_each(|seed| drop(scope.spawn(move || hammer(seed * 7_919)))));
    process.wait_until_at_most(before);
    assert_eq!(get(addr, "/").status, 200);
    process.finish();
}

/// The time is for all of a request, whatever comes of it now and then.
#[test]
fn a_request_that_does_not_come_whole_in_ten_seconds_is_refused() {
    let process = Process::minimal();
    let (addr, started) = (process.addr, Instant::now());
    let begun = [
        "GET / HTTP/1.1\r\nHost: localhost\r\nX: ",
        "POST /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n",
        "",
    ];
    let mut wires = begun.map(|begun| {
        let mut wire = Wire::connect(addr);
        wire.send(begun.as_bytes());
        wire
    });
    thread::scope(|scope| {
        for wire in &wires {
            let mut socket = wire.socket.try_clone().unwrap();
            scope.spawn(move || {
                while socket.write_all(b"x").is_ok() && started.elapsed() < PATIENCE {
                    thread::sleep(Duration::from_millis(100));
                }
            });
        }
        for wire in &mut wires {
            let answer = wire.answer();
            assert_eq!((answer.status, &*answer.body), (408, "the request did not come whole within 10 s\n"));
            let _ = wire.socket.shutdown(Shutdown::Both);
        }
    });
    assert!(started.elapsed() >= Duration::from_secs(10), "{:?}", started.elapsed());
    process.finish();
}

#[test]
fn a_thousand_streams_get_everything_and_a_connection_too_many_is_closed_without_a_word() {
    alone("minimal::a_thousand_streams_get_everything_and_a_connection_too_many_is_closed_without_a_word", || {
        const STREAMS: usize = 1_000;
        if !may_open(CONNECTIONS + 100) {
            left_out("1,200 descriptors (ulimit -n)");
            return;
        }
        let process = Process::minimal();
        let (addr, before) = (process.addr, process.at_rest());
        let mut crowd = press_in(addr, STREAMS);
        assert_eq!(crowd.members.len(), STREAMS);
        for n in 0..10 {
            publish(addr, "/events/a", &format!("{n} to all"));
        }
        crowd.read_until(10);
        process.wait_until_at_most((before.0 + STREAMS, before.1 + STREAMS));
        let silent: Vec<Wire> = (STREAMS..CONNECTIONS).map(|_| Wire::connect(addr)).collect();
        assert!(Wire::connect(addr).rest().is_empty(), "it has an answer");
        drop(silent);
        process.wait_until_at_most((before.0 + STREAMS, before.1 + STREAMS));
        publish(addr, "/events/a", "10 to all");
        crowd.read_until(11);
        drop(crowd);
        (0..2).for_each(|_| drop(publish(addr, "/events/a", "11 to nobody")));
        process.wait_until_at_most(before);
        assert_eq!(press_in(addr, 1).members.len(), 1, "there is room again");
        process.finish();
    });
}

fn may_open(descriptors: usize) -> bool {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
    files.is_some_and(|files| files.parse().map_or(files == "unlimited", |files: usize| files >= descriptors))
}

/// Each reader stands still at another place, with a full queue behind it: 28 MB for each, if the queue kept them. What is kept
/// takes 67 MB, and malloc holds back about as much.
#[test]
fn readers_that_stand_still_hold_no_events_that_are_not_kept() {
    let process = Process::minimal();
    let newlines = "\n".repeat(64 * 1024); // become 448 KiB
    let mut stalled = Vec::new();
    for _ in 0..10 {
        let mut wire = narrow(process.addr, 4_096, Some(1_400));
        open(&mut wire, "/events/a");
        stalled.push(wire);
        (0..70).for_each(|_| drop(publish(process.addr, "/events/a", &newlines)));
    }
    let peak = process.status("VmHWM");
    println!("at most {peak} kB");
    assert!(peak < 200_000, "{peak} kB");
    process.finish();
}

#[test]
fn without_descriptors_it_waits_for_some_and_can_be_stopped_meanwhile() {
    let script = format!("ulimit -n 32; exec {MINIMAL} 127.0.0.1:0");
    let process = Process::from(Command::new("sh").args(["-c", &script]));
    let ticks = process.processor_ticks();
    for _ in 0..2 {
        let silent: Vec<Wire> = (0..60).map(|_| Wire::connect(process.addr)).collect();
        process.wait_for_log("cannot accept: Too many open files");
        drop(silent);
        wait_for("a descriptor", || {
            let mut wire = Wire::connect(process.addr);
            wire.send(post_request("/events/a", "x").as_bytes());
            wire.take_until(b"\r\n\r\n").filter(|head| head.starts_with(b"HTTP/1.1 200"))
        });
    }
    let _silent: Vec<Wire> = (0..60).map(|_| Wire::connect(process.addr)).collect();
    assert!(process.processor_ticks() - ticks < 100, "it does not wait awake");
    process.finish();
}

#[test]
fn nobody_need_read_what_it_says() {
    let mut child = start(Command::new(MINIMAL).arg("127.0.0.1:0").stdout(Stdio::piped()).stderr(Stdio::piped()));
    drop(child.stderr.take());
    let addr = address(child.stdout.take().unwrap()).unwrap();
    for _ in 0..10 {
        Wire::stream(addr, "/events/a", "").close();
        (0..2).for_each(|_| drop(publish(addr, "/events/a", "x")));
    }
    assert!(shell(&format!("kill {}", child.id())));
    assert!(child.wait().unwrap().success());
}

#[test]
fn an_address_that_cannot_be_served_is_named_with_the_reason() {
    let process = Process::minimal();
    let taken = process.addr.to_string();
    for (arguments, reason) in [
        (&["0.0.0.0:0"][..], "beyond loopback anybody could publish"),
        (&["[::]:0"], "beyond loopback anybody could publish"),
        (&["3001"], "invalid socket address"),
        (&["127.0.0.1:99999"], "invalid port value"),
        (&["--help"], "invalid socket address"),
        (&[""], "invalid socket address"),
        (&[&taken], "Address already in use"),
    ] {
        let output = output(Command::new(MINIMAL).args(arguments));
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(said.contains(reason) && said.contains("try 127.0.0.1:8080"), "{arguments:?}: {said}");
        assert!(said.lines().count() == 1 && output.stdout.is_empty(), "{said}");
    }
    process.finish();
}
