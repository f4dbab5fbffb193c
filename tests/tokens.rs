//! The tokens' file: rights to some topics each, changed while streams are open.

use crate::common::*;
use brooklet::{Config, Event, Handle, Id, Stream};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Lines, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Writes the file as programs should: beside it, and renamed.
fn write(path: &str, text: &str) {
    let new = format!("{path}.new");
    fs::write(&new, text).unwrap();
    fs::rename(&new, path).unwrap();
}

fn with_tokens(path: &str) -> Config {
    Config::default().with(|config| config.tokens = Some(path.into()))
}

fn bearer(token: &str) -> String {
    if token.is_empty() { String::new() } else { format!("Authorization: Bearer {token}\r\n") }
}

fn ask(addr: SocketAddr, method: &str, target: &str, token: &str) -> Answer {
    let body = if method == "POST" || method == "PUT" { "Content-Length: 2\r\n\r\nx\n" } else { "\r\n" };
    let mut wire = Wire::connect(addr);
    wire.send(format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n{}{body}", bearer(token)).as_bytes());
    let head = wire.head();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let has_body = method != "HEAD";
    let length = header(&head, "content-length").filter(|_| has_body).map_or(0, |value| value.parse().unwrap());
    Answer { status, body: String::from_utf8(wire.take(length)).unwrap(), head }
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// The end of a stream: its comment, and whether the last chunk came.
fn end_of(stream: &mut Wire) -> (Vec<String>, bool) {
    let mut last = Vec::new();
    while let Some(block) = stream.block() {
        last = block.comments;
    }
    (last, stream.is_over())
}

const WITHDRAWN: &str = "the right of its token has ended";

#[test]
fn each_token_of_the_file_has_its_acts_its_topics_and_its_time() {
    let dir = Scratch::new();
    let path = dir.path("tokens");
    let (past, future) = (unix_time() - 1, unix_time() + 3_600);
    let text = format!(
        "# who may do what\n\nreader subscribe news,user-42\r\nwriter\tpublish  room-*,x:y@z\nroot both *\n\
         several subscribe a\nseveral publish b until={future}\nlate both * until={past}\n"
    );
    write(&path, &text);
    let server =
        bind(with_tokens(&path).with(|config| config.subscribe_tokens = vec!["flag".parse().unwrap()])).unwrap();
    server.stream("/mine", |stream| stream.comment("here")).unwrap();
    server.page("/page", "text/plain", "page").unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    for (method, target, good, bad) in [
        ("GET", "/events/news", &["reader", "root", "flag"][..], &["writer", "several", "late", "wrong", "reade"][..]),
        ("GET", "/events/news,user-42", &["reader", "root"], &["writer"]),
        ("GET", "/events/news,user-4", &["root"], &["reader"]),
        ("GET", "/events/user-421", &["root"], &["reader"]),
        ("HEAD", "/events/room-1", &["root"], &["writer", "reader"]),
        ("GET", "/events/a", &["several"], &["reader"]),
        ("GET", "/events/b", &["root"], &["several"]),
        ("POST", "/events/b", &["several"], &["reader", "flag"]),
        ("POST", "/events/room-1", &["writer", "root"], &["reader", "flag", "late"]),
        ("POST", "/events/room-,room-2,x:y@z", &["writer", "root"], &["several"]),
        ("POST", "/events/room-1,room", &["root"], &["writer"]),
        ("PUT", "/events/x:y@z", &["writer"], &["reader"]),
        ("DELETE", "/events/room-1", &["writer"], &["reader", "several"]),
        ("GET", "/metrics", &["root", "flag"], &["reader", "writer", "late"]),
        ("GET", "/topics", &["root", "flag"], &["reader", "writer"]),
        ("GET", "/mine", &["root", "flag"], &["reader", "writer"]),
    ] {
        for token in good {
            assert_eq!(ask(addr, method, target, token).status, 200, "{method} {target} {token}");
        }
        for token in bad {
            let answer = ask(addr, method, target, token);
            assert_eq!(answer.status, 403, "{method} {target} {token}");
            assert!(!answer.body.contains(token), "{answer:?}");
        }
        assert_eq!(ask(addr, method, target, "").status, 401, "{method} {target}");
    }
    for target in ["/health", "/page"] {
        assert_eq!(ask(addr, "GET", target, "").status, 200, "{target} is open");
    }
    // Two tokens of one request add up, and a cookie is as good.
    let fields = "Cookie: brooklet_token=several\r\nAuthorization: Bearer reader\r\n";
    drop(Wire::stream(addr, "/events/a,news", fields));
}

#[test]
fn nothing_tells_whether_a_topic_or_a_token_exists_to_who_may_not_read_it() {
    let dir = Scratch::new();
    let path = dir.path("tokens");
    write(&path, "mine both mine\nother both secret\nroot both *\n");
    let server = serve(with_tokens(&path).with(|config| config.topics = 4));
    let addr = server.addr().unwrap();
    assert_eq!(ask(addr, "POST", "/events/secret?key=k", "other").status, 200);
    let told = |method: &str, topic: &str, token: &str| {
        let answer = ask(addr, method, &format!("/events/{topic}"), token);
        let head = answer.head.lines().filter(|line| !line.starts_with("Date:")).collect::<Vec<_>>().join("\n");
        (answer.status, head, answer.body)
    };
    for method in ["GET", "POST", "PUT", "DELETE"] {
        let existing = told(method, "secret", "mine");
        assert_eq!(existing.0, 403);
        assert_eq!(existing, told(method, "nothing", "mine"), "{method}: a topic that is not there");
        assert_eq!(existing, told(method, "secret", "no-token"), "{method}: a token that is not there");
    }
    assert_eq!(told("DELETE", "mine", "mine"), told("DELETE", "mine", "root"), "nothing is kept there");
    assert_eq!(ask(addr, "POST", "/events/mine", "mine").status, 200);
    let (_, _, body) = told("DELETE", "mine", "mine");
    assert_eq!(body, "forgotten\n", "something was kept there");
}

#[test]
fn a_stream_whose_right_is_withdrawn_or_over_ends_within_seconds_and_no_other_does() {
    let dir = Scratch::new();
    let path = dir.path("tokens");
    let steady = "steady both *\n";
    let later = unix_time() + 3_600;
    write(
        &path,
        &format!("{steady}gone subscribe a,b\ncut subscribe a,b\nsoon subscribe a until={later}\nput publish a\n"),
    );
    let server = bind(with_tokens(&path)).unwrap();
    server
        .stream("/mine", |stream| {
            stream.comment("here")?;
            loop {
                stream.sleep(Duration::from_secs(60))?;
            }
        })
        .unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    let open = |target: &str, token: &str| Wire::subscribe(addr, target, &bearer(token)).0;
    let (mut kept, mut gone, mut poll) =
        (open("/events/a,b", "steady"), open("/events/a", "gone"), open("/events/b?poll=60s", "gone"));
    let (mut cut, mut over) = (open("/events/a,b", "cut"), open("/events/a", "soon"));
    let mut put = Wire::connect(addr);
    put.send(
        format!("PUT /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n{}\r\none\n", bearer("put"))
            .as_bytes(),
    );
    assert_eq!(kept.event().unwrap().data(), "one");
    let soon = unix_time() + 3;
    write(&path, &format!("{steady}cut subscribe a,c\nsoon subscribe a until={soon}\n"));
    for (what, stream) in [("its token is gone", &mut gone), ("a poll", &mut poll), ("one of its topics is", &mut cut)]
    {
        assert_eq!(end_of(stream), (vec![format!(" {WITHDRAWN}").trim().to_string()], true), "{what}");
    }
    assert_eq!(ask(addr, "GET", "/events/a", "gone").status, 403, "who comes back");
    put.send(b"two\n");
    let refused = put.answer();
    assert_eq!((refused.status, refused.header("connection")), (403, Some("close")), "{refused:?}");
    assert!(refused.body.starts_with("this token is not good for publishing; published 1, last id "), "{refused:?}");
    assert_eq!(end_of(&mut over), (vec![WITHDRAWN.into()], true), "its time is over");
    assert!(unix_time() >= soon && ask(addr, "GET", "/events/a", "soon").status == 403);
    server.hub().publish("a", Event::new("three")).unwrap();
    assert_eq!(kept.event().unwrap().data(), "three", "it goes on, and never saw what was refused");
    // A handler's stream, whose handler sleeps.
    let mut mine = Wire::stream(addr, "/mine", &bearer("steady"));
    assert!(mine.take_until(b":here\n").is_some());
    write(&path, "steady both a,b\n");
    assert!(mine.rest().iter().all(|byte| b":\n".contains(byte)), "cut, since nobody ends it");
    server.hub().publish("b", Event::new("four")).unwrap();
    assert_eq!(kept.event().unwrap().data(), "four");
}

#[test]
fn a_stream_whose_right_came_back_at_once_ends_when_it_is_withdrawn_again() {
    let dir = Scratch::new();
    let path = dir.path("tokens");
    write(&path, "root both *\n");
    let (server, round) = (bind(with_tokens(&path)).unwrap(), Arc::new(AtomicUsize::new(0)));
    let now = round.clone();
    let says_the_round = move |stream: &mut Stream| {
        loop {
            stream.comment(&format!("round {}.", now.load(SeqCst)))?;
            stream.sleep(Duration::from_millis(100))?;
        }
    };
    server.stream("/mine", says_the_round).unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    let has_right = |token: &str| ask(addr, "GET", "/topics", token).status == 200;
    // On a busy machine the right may come back too late: then the stream is cut, and another is tried.
    let mut mine = wait_longer_for("a stream to keep its right", || {
        write(&path, "root both *\npage both *\nother both *\n");
        wait_for("the rights", || (has_right("page") && has_right("other")).then_some(()));
        let [mut mine, mut other] = ["page", "other"].map(|token| Wire::stream(addr, "/mine", &bearer(token)));
        write(&path, "root both *\n");
        wait_for("the rights to go", || (!has_right("page")).then_some(()));
        write(&path, "root both *\npage both *\n");
        other.rest(); // it was cut, so both have been looked at again
        let round = round.fetch_add(1, SeqCst) + 1;
        mine.take_until(format!(":round {round}.\n").as_bytes()).map(|_| mine)
    });
    write(&path, "root both *\n");
    assert_eq!(mine.take_until(b"no more"), None, "it is cut");
}

#[test]
fn a_page_that_closes_when_its_right_has_just_ended_is_seen_to_close() {
    let dir = Scratch::new();
    let path = dir.path("tokens");
    write(&path, "root both *\n");
    let (lines, log) = mpsc::channel();
    let mut config = with_tokens(&path);
    config.log = brooklet::Log::Info;
    config.log_to = brooklet::LogTo::lines(move |line| lines.send(line.to_string()).unwrap());
    let server = bind(config).unwrap();
    server.stream("/mine", |stream| stream.sleep(Duration::from_secs(600))).unwrap();
    let server = server.spawn().unwrap();
    let addr = server.addr().unwrap();
    let has_right = || ask(addr, "GET", "/topics", "page").status == 200;
    wait_longer_for("the page's end, before its stream is cut", || {
        write(&path, "root both *\npage both *\n");
        wait_for("the right", || has_right().then_some(()));
        let mine = Wire::stream(addr, "/mine", &bearer("page"));
        write(&path, "root both *\n");
        wait_for("the right to go", || (!has_right()).then_some(()));
        mine.close();
        let line = log.iter().find(|line| line.contains("path=\"/mine\"")).unwrap();
        line.contains("reason=\"the peer ").then_some(())
    });
}

#[test]
fn a_request_whose_right_ends_before_its_body_has_come_gets_no_event() {
    let dir = Scratch::new();
    let path = dir.path("tokens");
    write(&path, "page both a\n");
    let server = serve(with_tokens(&path));
    let addr = server.addr().unwrap();
    server.hub().publish("a", Event::new("a secret")).unwrap();
    let fields = format!("Host: localhost\r\nContent-Length: 1\r\nExpect: 100-continue\r\n{}", bearer("page"));
    let mut wire = Wire::connect(addr);
    wire.send(format!("GET /events/a?since=earliest HTTP/1.1\r\n{fields}\r\n").as_bytes());
    assert_eq!(wire.head(), "HTTP/1.1 100 Continue\r\n\r\n", "it has the right");
    let (mut other, _) = Wire::subscribe(addr, "/events/a", &bearer("page"));
    write(&path, "root both *\n");
    assert_eq!(end_of(&mut other), (vec![WITHDRAWN.into()], true)); // and those before it were looked at, too
    wire.send(b"x");
    assert!(wire.head().starts_with("HTTP/1.1 200 OK\r\n"));
    let stream = String::from_utf8(wire.rest()).unwrap();
    assert!(stream.contains(WITHDRAWN) && !stream.contains("a secret"), "{stream}");
}

#[test]
fn a_reader_that_takes_nothing_is_cut_when_its_right_is_gone() {
    let dir = Scratch::new();
    let path = dir.path("tokens");
    write(&path, "slow subscribe a\nroot both *\n");
    let server = serve(patient().with(|config| config.tokens = Some(path.clone().into())));
    let addr = server.addr().unwrap();
    let mut slow = narrow(addr, 4_096, Some(536));
    slow.send(format!("GET /events/a HTTP/1.1\r\nHost: localhost\r\n{}\r\n", bearer("slow")).as_bytes());
    assert!(slow.head().starts_with("HTTP/1.1 200"));
    for _ in 0..200 {
        server.hub().publish("a", Event::new("x".repeat(60_000))).unwrap();
    }
    write(&path, "root both *\n");
    let subscribers = || {
        let answer = ask(addr, "GET", "/metrics", "root").body;
        answer.lines().any(|line| line == "brooklet_subscribers 0").then_some(())
    };
    wait_for("the slow one to be gone", subscribers);
}

#[test]
fn a_file_that_cannot_be_understood_stops_the_start_with_its_line_and_shows_no_token() {
    let dir = Scratch::new();
    let path = dir.path("tokens");
    for (text, said) in [
        ("a both *\nSECRET\n", "line 2: 1 words, where TOKEN publish|subscribe|both TOPICS [until=UNIX-SECONDS] stand"),
        ("SECRET both a b c\n", "line 1: 5 words"),
        ("publish SECRET a\n", "line 1: its second word is none of publish, subscribe and both"),
        ("x both a until=SECRET\n", "line 1: its fourth word is not until= with a Unix time in whole seconds"),
        ("x both a SECRET\n", "line 1: its fourth word"),
        ("x both a until=-1\n", "line 1: its fourth word"),
        ("x both SECRET;\n", "line 1: its third word is no list of topics"),
        ("x both a,,SECRET\n", "line 1: its third word is no list of topics"),
        ("x both SECRET**\n", "line 1: its third word is no list of topics"),
        ("x both *SECRET\n", "line 1: its third word is no list of topics"),
        ("SECRET; both a\n", "line 1: a token is made of"),
        ("# ok\nSECRET both a", "line 2: its end is missing: end each line with LF"),
    ] {
        write(&path, text);
        let error = bind(with_tokens(&path)).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let error = error.to_string();
        assert!(error.starts_with(&format!("tokens: {path}: ")) && error.contains(said), "{text:?}: {error}");
        assert!(!error.contains("SECRET"), "{error}");
    }
    fs::write(&path, b"x both a\n\xff\n").unwrap();
    assert!(bind(with_tokens(&path)).err().unwrap().to_string().contains("it is not UTF-8 from byte 9 on"));
    let missing = bind(with_tokens(&dir.path("missing"))).err().unwrap().to_string();
    assert!(missing.contains("No such file"), "{missing}");
    let other = bind(with_tokens("/dev/null")).err().unwrap().to_string();
    assert_eq!(other, "tokens: /dev/null: it is no regular file: write the rights into one");
}

#[test]
fn a_file_that_goes_bad_or_away_changes_nothing_and_is_logged_once_with_its_line() {
    let dir = Scratch::new();
    let path = dir.path("tokens");
    write(&path, "first-secret both *\n");
    let process = Process::start(&["--tokens", &path, "--log", "debug"]);
    let addr = process.addr;
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", &bearer("first-secret"));
    write(&path, "second-secret both *\nthird-secret neither *\n");
    let line = process.wait_for_log("rights stay as they were");
    assert!(line.contains("tokens: line 2: its second word is none of"), "{line}");
    fs::remove_file(&path).unwrap();
    process.wait_for_log("No such file");
    assert_eq!(ask(addr, "GET", "/topics", "first-secret").status, 200);
    assert_eq!(ask(addr, "GET", "/topics", "second-secret").status, 403);
    assert_eq!(ask(addr, "POST", "/events/a", "first-secret").status, 200);
    assert_eq!(stream.event().unwrap().data(), "x\n");
    write(&path, "second-secret both *\n");
    wait_for("the file that is good again", || {
        (ask(addr, "GET", "/topics", "second-secret").status == 200).then_some(())
    });
    assert_eq!(end_of(&mut stream), (vec![WITHDRAWN.into()], true));
    process.wait_for_log("were read again: there are 1");
    let log = process.log();
    assert_eq!(log.matches("rights stay as they were").count(), 2, "{log}");
    assert!(!log.contains("-secret"), "{log}");
    process.finish();
}

/// To open a pipe waits for whoever writes to it; and what was read from one once is not there to be read again.
#[test]
fn a_pipe_in_place_of_the_file_changes_nothing_and_rights_end_in_time() {
    let dir = Scratch::new();
    let path = dir.path("tokens");
    write(&path, &format!("page subscribe a until={}\n", unix_time() + 4));
    let server = serve(with_tokens(&path));
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), "/events/a", &bearer("page"));
    fs::remove_file(&path).unwrap();
    assert!(shell(&format!("mkfifo {path}")));
    assert_eq!(end_of(&mut stream), (vec![WITHDRAWN.into()], true));
}

/// Whoever opens this file waits, as on a disk that is stuck: perl has a lease on it (`fcntl(2)`), which it gives back when its
/// input ends, and which the system takes back after 45 s. None where there are no leases.
fn stick(path: &str) -> Option<(Child, Lines<BufReader<ChildStdout>>)> {
    const LEASE: &str = "$SIG{IO} = 'IGNORE'; $| = 1; open(F, '+<', $ARGV[0]) or die; \
        sub nap { select undef, undef, undef, 0.01 } \
        until (fcntl(F, 1024, 1)) { $!{EAGAIN} or die qq(no lease: $!); nap } print qq(stuck\n); \
        nap while fcntl(F, 1025, 0) == 1; print qq(somebody waits\n); <STDIN>";
    let mut perl = start(Command::new("perl").args(["-e", LEASE, path]).stdin(Stdio::piped()).stdout(Stdio::piped()));
    let mut lines = BufReader::new(perl.stdout.take().unwrap()).lines();
    match lines.next() {
        Some(line) => assert_eq!(line.unwrap(), "stuck"),
        None => return perl.wait().map(|_| None).unwrap(),
    }
    Some((perl, lines))
}

#[test]
fn while_the_disk_of_the_file_is_stuck_rights_end_in_time() {
    let dir = Scratch::new();
    let (path, next) = (dir.path("tokens"), dir.path("next"));
    let text = format!("steady both *\npage subscribe a until={}\n", unix_time() + 10);
    write(&path, &text);
    let server = serve(with_tokens(&path));
    let addr = server.addr().unwrap();
    write(&next, &(text + "late both *\n"));
    if !has("perl") {
        return;
    }
    let Some((mut perl, mut lines)) = stick(&next) else {
        left_out("leases on files");
        return;
    };
    fs::rename(&next, &path).unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "somebody waits");
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", &bearer("page"));
    assert_eq!(end_of(&mut stream), (vec![WITHDRAWN.into()], true));
    assert_eq!(ask(addr, "GET", "/topics", "late").status, 403, "it is still stuck");
    drop(perl.stdin.take());
    wait_for("the file to be read", || (ask(addr, "GET", "/topics", "late").status == 200).then_some(()));
    assert!(perl.wait().unwrap().success());
}

/// The entry of the file says the same after a change, as far as a program can bring that about.
#[test]
fn a_change_that_leaves_length_and_time_as_they_were_is_noticed() {
    let dir = Scratch::new();
    let path = dir.path("tokens");
    write(&path, "aaaa both *\n");
    let server = serve(with_tokens(&path));
    let addr = server.addr().unwrap();
    for round in 0..3 {
        let (now, then) = if round % 2 == 0 { ("bbbb", "aaaa") } else { ("aaaa", "bbbb") };
        let time = fs::metadata(&path).unwrap().modified().unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap(); // the same file, in place
        (&file).write_all(now.as_bytes()).unwrap();
        file.set_modified(time).unwrap();
        drop(file);
        wait_for("the change", || (ask(addr, "GET", "/topics", now).status == 200).then_some(()));
        assert_eq!(ask(addr, "GET", "/topics", then).status, 403);
    }
}

#[test]
fn a_token_in_the_query_is_taken_only_where_that_is_wanted_and_for_reading_alone() {
    let dir = Scratch::new();
    let path = dir.path("tokens");
    write(&path, "secret both *\n");
    let process = Process::start(&["--tokens", &path, "--query-tokens", "--log", "debug"]);
    let addr = process.addr;
    assert_eq!(ask(addr, "GET", "/events/a?since=earliest&access_token=secret", "").status, 200);
    assert_eq!(ask(addr, "GET", "/topics?access_token=secret", "").status, 200);
    assert_eq!(ask(addr, "GET", "/test?access_token=secret", "").status, 200);
    assert_eq!(ask(addr, "GET", "/events/a?access_token=wrong", "").status, 403);
    assert_eq!(ask(addr, "GET", "/events/a?access_token=wrong", "secret").status, 200, "one of two is good");
    assert_eq!(ask(addr, "POST", "/events/a?access_token=secret", "").status, 401);
    assert_eq!(
        ask(addr, "POST", "/events/a?access_token=secret", "secret").status,
        400,
        "it is no parameter of a POST"
    );
    process.wait_for_log("POST \"/events/a\" 400");
    assert!(!process.log().contains("secret"), "{}", process.log());
    process.finish();
    let server = serve(with_tokens(&path));
    assert_eq!(ask(server.addr().unwrap(), "GET", "/events/a?access_token=secret", "").status, 401);
    let answer = ask(server.addr().unwrap(), "GET", "/events/a?access_token=secret", "secret");
    assert!(answer.status == 400 && !answer.body.contains("secret"), "{answer:?}");
}

#[test]
fn beyond_loopback_a_tokens_file_is_enough() {
    let dir = Scratch::new();
    let path = dir.path("tokens");
    write(&path, "");
    assert!(brooklet::Server::bind("0.0.0.0:0", with_tokens(&path)).is_ok());
}

/// A reader that comes back whenever its stream ends, and what it got: when, and of which topic's event.
fn follow(addr: SocketAddr, topic: &str, until: &AtomicBool, got: &Mutex<Vec<(Instant, Id)>>) -> usize {
    let (mut ends, mut cursor) = (0, None::<Id>);
    while !until.load(SeqCst) {
        let Ok(socket) = TcpStream::connect(addr) else { continue }; // the server has ended
        let mut wire = Wire::on(socket);
        let resume = cursor.map_or(String::new(), |id| format!("Last-Event-ID: {id}\r\n"));
        let fields = format!("{}{resume}", bearer(topic));
        let request = format!("GET /events/{topic}?since=earliest HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n");
        let sent = wire.socket.write_all(request.as_bytes());
        let Some(head) = sent.ok().and_then(|()| wire.head_if_any()) else { continue };
        if head.starts_with("HTTP/1.1 403") {
            thread::sleep(Duration::from_millis(20));
            continue;
        }
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        while let Some(block) = wire.block() {
            if let Some(id) = block.id.as_deref() {
                cursor = Some(id.parse().unwrap());
            }
            if block.data.is_some() && !block.is_gap() {
                got.lock().unwrap().push((Instant::now(), block.id()));
            }
        }
        ends += 1;
    }
    ends
}

/// Four tenants' rights come and go, while the file changes all the time and everybody publishes; four keep theirs.
#[test]
fn a_tokens_file_that_is_changed_a_thousand_times_under_load_cuts_whom_it_names_and_nobody_else() {
    const CHANGES: usize = 1_000;
    let dir = Scratch::new();
    let path = dir.path("tokens");
    let names: Vec<String> = (0..8).map(|n| format!("tenant-{n}")).collect();
    let text = |held: &[bool], change: usize| {
        let rights =
            names.iter().zip(held).filter(|(_, held)| **held).map(|(name, _)| format!("{name} subscribe {name}\n"));
        rights.chain((0..change % 50).map(|n| format!("decoy-{n}-{change} both x\n"))).collect::<String>()
    };
    let mut held = [true; 8];
    write(&path, &text(&held, 0));
    let server: Handle = serve(with_tokens(&path));
    let (addr, hub) = (server.addr().unwrap(), server.hub());
    let is_over = AtomicBool::new(false);
    let got: Vec<Mutex<Vec<(Instant, Id)>>> = names.iter().map(|_| Mutex::default()).collect();
    // When each tenant had no right: from the moment after the file was there without it, until just before it came back.
    let mut without: Vec<(usize, Instant, Instant)> = Vec::new();
    let mut since: [Option<Instant>; 8] = [None; 8];
    let (mut published, mut slowest) = (vec![Vec::new(); 8], Duration::ZERO);
    let ends: Vec<usize> = thread::scope(|scope| {
        let readers: Vec<_> = (0..8)
            .map(|n| {
                let (name, got, is_over) = (&names[n], &got[n], &is_over);
                scope.spawn(move || follow(addr, name, is_over, got))
            })
            .collect();
        for change in 1..=CHANGES {
            if change % 25 == 0 {
                // One of the first four each time, so that each is without its right for two seconds, and has it for two.
                let n = change / 25 % 4;
                held[n] = !held[n];
                if held[n] {
                    without.extend(since[n].take().map(|from| (n, from, Instant::now())));
                }
                write(&path, &text(&held, change));
                if !held[n] {
                    since[n] = Some(Instant::now());
                }
            } else {
                write(&path, &text(&held, change));
            }
            for (n, name) in names.iter().enumerate() {
                published[n].push((Instant::now(), hub.publish(name, Event::new("x")).unwrap()));
            }
            let slept = Instant::now();
            thread::sleep(Duration::from_millis(20));
            slowest = slowest.max(slept.elapsed()); // how long this machine may hold a thread up
        }
        without.extend((0..4).filter_map(|n| since[n].take().map(|from| (n, from, Instant::now()))));
        // The steady ones must have everything before their streams end with the server.
        for got in &got[4..] {
            wait_for("everything", || (got.lock().unwrap().len() == CHANGES).then_some(()));
        }
        is_over.store(true, SeqCst);
        drop(server);
        readers.into_iter().map(|reader| reader.join().unwrap()).collect()
    });
    for n in 4..8 {
        assert_eq!(ends[n], 1, "tenant {n} kept its right, and its stream ended only with the server");
        let ids: Vec<Id> = got[n].lock().unwrap().iter().map(|(_, id)| *id).collect();
        assert_eq!(ids, published[n].iter().map(|(_, id)| *id).collect::<Vec<_>>(), "tenant {n}: once and in order");
    }
    assert!(without.len() >= 12, "{without:?}");
    let grace = Duration::from_secs(1) + slowest;
    for (n, from, to) in without {
        let hidden: Vec<Id> =
            published[n].iter().filter(|(at, _)| *at > from + grace && *at < to).map(|(_, id)| *id).collect();
        let read = got[n].lock().unwrap().iter().filter(|(at, id)| hidden.contains(id) && *at < to).count();
        assert_eq!(read, 0, "tenant {n} read what was published a second after its right was gone");
        assert!(ends[n] > 1, "tenant {n} was cut");
    }
    println!("1,000 changes; the machine held a thread up for at most {slowest:?}");
    assert!(Path::new(&path).exists());
}
