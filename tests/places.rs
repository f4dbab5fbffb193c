//! Who is here, and who makes room. Whoever was there before a crowd is served on, whoever comes meanwhile is answered, and
//! when the crowd has gone, everything is as it was.

use crate::common::*;
use brooklet::Config;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const MEMBERS: usize = 1_000;

/// What each member of a crowd does: it says this at once, and then this again and again.
#[derive(Clone, Copy)]
struct Manner {
    opening: fn(usize) -> Vec<u8>,
    drip: &'static [u8],
    /// With a small receive buffer and a real link's segments, nothing of which is read.
    reads_nothing: bool,
}

/// A crowd that comes 500 a second, and comes back where it is shown the door.
struct Siege {
    over: Arc<AtomicBool>,
    came: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Siege {
    fn lay(addr: SocketAddr, manner: Manner) -> Siege {
        let (over, came) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stop, count) = (over.clone(), came.clone());
        let besiege = move || {
            let mut members: Vec<Option<TcpStream>> = (0..MEMBERS).map(|_| None).collect();
            while !stop.load(SeqCst) {
                for (n, member) in members.iter_mut().enumerate() {
                    if !member.as_mut().is_some_and(|socket| linger(socket, manner)) && !stop.load(SeqCst) {
                        *member = join(addr, manner, n).ok();
                        count.fetch_add(1, SeqCst);
                        thread::sleep(Duration::from_millis(2));
                    }
                }
                thread::sleep(Duration::from_millis(50));
            }
        };
        Siege { over, came, thread: Some(thread::spawn(besiege)) }
    }

    fn came(&self) -> usize {
        self.came.load(SeqCst)
    }
}

impl Drop for Siege {
    fn drop(&mut self) {
        self.over.store(true, SeqCst);
        let _ = self.thread.take().unwrap().join();
    }
}

fn join(addr: SocketAddr, manner: Manner, n: usize) -> io::Result<TcpStream> {
    let mut socket = match manner.reads_nothing {
        true => narrow_socket(addr, 4_096, Some(1_448))?,
        false => TcpStream::connect(addr)?,
    };
    socket.set_nonblocking(true)?;
    let _ = socket.write(&(manner.opening)(n));
    Ok(socket)
}

/// Says a little more. Returns whether the connection still stands.
fn linger(socket: &mut TcpStream, manner: Manner) -> bool {
    let wrote = socket.write(manner.drip);
    if !manner.reads_nothing {
        let _ = socket.read(&mut [0; 4_096]);
    }
    let peeked = socket.peek(&mut [0]);
    let stands = |error: &io::Error| error.kind() == ErrorKind::WouldBlock;
    wrote.as_ref().err().is_none_or(stands)
        && (peeked.as_ref().is_ok_and(|n| *n > 0) || peeked.as_ref().is_err_and(stands))
}

/// Limits that a crowd of a thousand is far above, and the defaults.
const LIMITS: [&[&str]; 2] = [&["--connections", "100", "--subscribers", "100"], &[]];

/// Puts a crowd before the server, once with each of the limits.
fn besiege(what: &str, manner: Manner, streams_fill: bool) {
    for flags in LIMITS {
        let (process, began) = (Process::start(flags), Instant::now());
        let (addr, lowered) = (process.addr, !flags.is_empty());
        for _ in 0..40 {
            assert_eq!(post(addr, "/events/large", &"x".repeat(60_000)).status, 200);
        }
        let mut bystander = Bystander::new(addr);
        bystander.probe();
        let before = process.at_rest();
        let siege = Siege::lay(addr, manner);
        let enough = if !lowered {
            900
        } else if streams_fill {
            100
        } else {
            190
        };
        let (mut held, mut rounds, started) = (0, 0, Instant::now());
        while rounds < 20 {
            assert!(started.elapsed() < PATIENCE, "{what}: only {held} were there, so it shows nothing");
            let room = bystander.probe_with();
            assert!(room || (lowered && streams_fill), "{what}: no room for a stream");
            rounds += usize::from(held >= enough && siege.came() >= MEMBERS);
            held = held.max(metric(addr, "connections") + metric(addr, "subscribers"));
            thread::sleep(Duration::from_millis(20));
        }
        println!("{what}: {} came, {held} were there, limits {flags:?}", siege.came());
        drop(siege);
        process.wait_until_at_most(before);
        bystander.probe();
        bystander.finish(&format!("{what} {flags:?}"));
        assert_few_warnings(&process.finish(), began);
    }
}

#[test]
fn a_crowd_of_slow_heads_keeps_nobody_out() {
    let opening = |n| match n % 3 {
        0 => Vec::new(),
        1 => b"GET /events/calm HTTP/1.1\r\nHost: localhost\r\nX-".to_vec(),
        _ => b"POST /eve".to_vec(),
    };
    besiege("slow heads", Manner { opening, drip: b"a", reads_nothing: false }, false);
}

#[test]
fn a_crowd_of_slow_bodies_keeps_nobody_out() {
    let opening = |n| match n % 2 {
        0 => b"POST /events/slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\na".to_vec(),
        _ => b"PUT /events/slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\na".to_vec(),
    };
    besiege("slow bodies", Manner { opening, drip: b"a", reads_nothing: false }, false);
}

#[test]
fn a_crowd_of_idle_connections_keeps_nobody_out() {
    let opening = |_| HEALTH.into();
    besiege("idle", Manner { opening, drip: b"", reads_nothing: false }, false);
}

#[test]
fn a_crowd_that_does_not_read_its_streams_keeps_nobody_out() {
    let opening = |_| b"GET /events/large?since=earliest HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec();
    besiege("slow reading of streams", Manner { opening, drip: b"", reads_nothing: true }, true);
}

#[test]
fn a_crowd_that_does_not_read_its_answers_keeps_nobody_out() {
    let opening = |_| b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(400);
    besiege("slow reading of answers", Manner { opening, drip: b"", reads_nothing: true }, false);
}

/// While all places are taken by others that are busy, with a token or without, each newcomer would be the only one that
/// waits.
#[test]
fn who_has_only_just_come_is_not_the_first_to_make_room() {
    for (publish_tokens, later) in [(vec![], 20), (vec!["t".parse().unwrap()], 10)] {
        let limits = Config::default().with(|config| {
            config.connections = 20;
            config.subscribers = 20;
            config.head_time = PATIENCE;
        });
        let server = serve(limits.with(|config| config.publish_tokens = publish_tokens));
        let addr = server.addr().unwrap();
        let slow_body = || {
            let mut wire = Wire::connect(addr);
            wire.send(
                b"POST /events/a HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer t\r\n\
                  Expect: 100-continue\r\nContent-Length: 9\r\n\r\n",
            );
            assert!(wire.head().starts_with("HTTP/1.1 100 "), "it is busy from here on");
            wire
        };
        let _crowd: Vec<Wire> = (0..50).map(|_| slow_body()).collect();
        let mut newcomer = Wire::connect(addr);
        let _later: Vec<Wire> = (0..later).map(|_| slow_body()).collect();
        newcomer.send(HEALTH.as_bytes());
        assert_eq!(newcomer.answer().status, 200, "before {later} others");
    }
}

fn those_inside_get_everything(process: &Process, attempts: usize, places: std::ops::RangeInclusive<usize>) {
    let addr = process.addr;
    assert_eq!(get(addr, "/health").status, 200);
    let before = process.at_rest();
    let mut crowd = press_in(addr, attempts);
    let inside = crowd.members.len();
    assert!(places.contains(&inside), "{inside} of {attempts} are inside");
    for n in 0..10 {
        assert_eq!(post(addr, "/events/a", &format!("{n} to all")).status, 200);
    }
    crowd.read_until(10);
    // Each stream is one descriptor and no thread, and nothing is left of those that were rejected.
    process.wait_until_at_most((before.0, before.1 + inside));
    drop(crowd);
    process.wait_until_at_most(before);
    assert_eq!(press_in(addr, 1).members.len(), 1, "there is room again");
}

#[test]
fn of_12_000_who_come_10_000_are_inside_and_the_others_are_told_when_to_come_back() {
    alone("places::of_12_000_who_come_10_000_are_inside_and_the_others_are_told_when_to_come_back", || {
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
        let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
        if files.is_none_or(|files| files.parse().is_ok_and(|files: usize| files < 15_000)) {
            left_out("15,000 descriptors (ulimit -n)");
            return;
        }
        let process = Process::start(&["--log", "off", "--subscribers", "10000", "--connections", "500"]);
        those_inside_get_everything(&process, 12_000, 10_000..=10_000);
        process.finish();
    });
}

#[test]
fn with_256_descriptors_those_inside_get_every_event_and_the_others_are_told_when_to_come_back() {
    let process = Process::under("ulimit -n 256", "");
    those_inside_get_everything(&process, 500, 150..=256);
    process.finish();
}

#[test]
fn at_the_limit_the_connection_that_waited_longest_makes_room() {
    let server = serve(Config::default().with(|config| {
        config.connections = 4;
        config.subscribers = 0;
    }));
    let addr = server.addr().unwrap();
    let mut slow: Vec<Wire> = (0..4).map(|_| Wire::connect(addr)).collect();
    slow.iter_mut().for_each(|wire| wire.send(b"GET /health HTTP/1.1\r\n"));
    let mut newcomer = Wire::connect(addr);
    newcomer.send(HEALTH.as_bytes());
    assert_eq!(newcomer.answer().status, 200);
    assert!(slow.remove(0).rest().is_empty(), "the oldest was closed");
    let mut second = Wire::connect(addr);
    second.send(HEALTH.as_bytes());
    assert_eq!(second.answer().status, 200);
}

#[test]
fn when_all_places_are_taken_the_one_that_is_busy_longest_makes_room() {
    let server = serve(Config::default().with(|config| {
        config.connections = 2;
        config.subscribers = 1;
    }));
    let addr = server.addr().unwrap();
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
    let mut publishers: Vec<Wire> = (0..2).map(|_| Wire::connect(addr)).collect();
    for wire in &mut publishers {
        wire.send(b"PUT /events/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\na\n\r\n");
        assert_eq!(stream.event().unwrap().data(), "a");
    }
    // The first says something again, so the second has been silent for longer now.
    publishers[0].send(b"2\r\nb\n\r\n");
    assert_eq!(stream.event().unwrap().data(), "b");
    assert_eq!(get(addr, "/health").status, 200, "a crowd of slow bodies does not lock others out");
    assert!(publishers[1].rest().is_empty(), "closed without an answer");
    publishers[0].send(b"0\r\n\r\n");
    assert_eq!(publishers[0].answer().status, 200);
}

#[test]
fn a_stream_without_room_gets_200_a_retry_and_its_end() {
    let server = serve(Config::default().with(|config| config.subscribers = 2));
    let addr = server.addr().unwrap();
    let streams: Vec<_> = (0..2).map(|_| Wire::subscribe(addr, "/events/a", "")).collect();
    let mut retries = Vec::new();
    for _ in 0..20 {
        let mut wire = Wire::stream(addr, "/events/a", "");
        let seen = wire.block().unwrap();
        assert_eq!((seen.comments.len(), &seen.data, &seen.id), (1, &None, &None), "{seen:?}");
        retries.push(seen.retry.unwrap());
        assert!(wire.rest().is_empty());
    }
    assert!(retries.iter().all(|retry| (1_500..=4_500).contains(retry)), "{retries:?}");
    retries.dedup();
    assert!(retries.len() > 5, "the times are spread: {retries:?}");
    assert_eq!(get(addr, "/health").status, 200);
    assert_eq!(post(addr, "/events/a", "x").status, 200);
    drop(streams);
    wait_for("a place", || Wire::stream(addr, "/events/a", "").block()?.id);
}

/// The head of a `PUT` that shows its token, and the answer to its first line: it is in its place then.
fn put_with_token(addr: SocketAddr, watcher: &mut Wire) -> Wire {
    let mut put = Wire::connect(addr);
    put.send(b"PUT /events/log HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer t\r\nContent-Length: 1000\r\n\r\nfirst\n");
    assert_eq!(watcher.event().expect("its line").data(), "first");
    put
}

#[test]
fn publishers_that_have_vanished_make_room_for_live_ones_also_where_both_hold_a_token() {
    let config = Config::default().with(|config| {
        config.publish_tokens = vec!["t".parse().unwrap()];
        config.connections = 60;
        config.subscribers = 1;
    });
    let server = serve(config);
    let addr = server.addr().unwrap();
    let (mut watcher, _) = Wire::subscribe(addr, "/events/log", "");
    let vanished: Vec<Wire> = (0..30).map(|_| put_with_token(addr, &mut watcher)).collect();
    // Sixty live ones have room. Of a hundred, those forty make room that have been silent longest.
    let mut live: Vec<Wire> = (0..60).map(|_| put_with_token(addr, &mut watcher)).collect();
    for (n, put) in live.iter_mut().enumerate() {
        put.send(format!("{n}\n").as_bytes());
        assert_eq!(watcher.event().unwrap().data(), n.to_string(), "it has lost its place");
    }
    for mut put in vanished {
        put.rest(); // until it is closed
    }
    let mut more: Vec<Wire> = (0..40).map(|_| put_with_token(addr, &mut watcher)).collect();
    for put in live[40..].iter_mut().chain(&mut more) {
        put.send(b"again\n");
        assert_eq!(watcher.event().unwrap().data(), "again", "it has lost its place");
    }
}

#[test]
fn a_crowd_without_a_token_does_not_make_a_silent_publisher_with_one_go() {
    let config = Config::default().with(|config| {
        config.publish_tokens = vec!["t".parse().unwrap()];
        config.connections = 20;
        config.subscribers = 1;
    });
    let server = serve(config);
    let addr = server.addr().unwrap();
    let (mut watcher, _) = Wire::subscribe(addr, "/events/log", "");
    let mut puts: Vec<Wire> = (0..15).map(|_| put_with_token(addr, &mut watcher)).collect();
    let _crowd: Vec<Wire> = (0..60)
        .map(|_| {
            let mut wire = Wire::connect(addr);
            wire.send(b"GET /hea");
            wire
        })
        .collect();
    assert_eq!(get(addr, "/health").status, 200); // who came before has been let in, and others have gone for them
    for put in &mut puts {
        put.send(b"still here\n");
        assert_eq!(watcher.event().unwrap().data(), "still here");
    }
}

#[test]
fn a_put_that_says_nothing_for_too_long_is_told_what_has_come_and_gives_up_its_place() {
    let server = serve(Config::default().with(|config| config.put_idle_time = Duration::from_millis(300)));
    let addr = server.addr().unwrap();
    for (opening, count) in [("", 0), ("one\ntwo\n", 2)] {
        let mut put = Wire::connect(addr);
        put.send(
            format!("PUT /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{opening}").as_bytes(),
        );
        let answer = put.answer();
        assert_eq!(answer.status, 408, "{}", answer.body);
        let said = format!("nothing came within 300ms (put_idle_time); published {count}");
        assert!(answer.body.starts_with(&said), "{}", answer.body);
        assert!(put.rest().is_empty());
    }
    wait_for_metric(addr, "connections", 1);
}
