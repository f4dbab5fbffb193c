//! Crowds, floods, and a system that has nothing left to give. Whoever was there before is served on, whoever comes
//! meanwhile is answered, and when the crowd has gone, everything is as it was.

use crate::common::*;
use brooklet::Config;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const MEMBERS: usize = 1_000;
/// The median of any probe; the expectation is a tenth of it.
const PROBE_TIME: Duration = Duration::from_secs(1);

/// Someone who has nothing to do with the crowd: subscribed before it came, and asks, publishes and subscribes anew while
/// it is there.
struct Bystander {
    addr: SocketAddr,
    early: Wire,
    published: usize,
    /// How long health, publishing, and a new stream with its first event took.
    times: [Vec<Duration>; 3],
}

impl Bystander {
    fn new(addr: SocketAddr) -> Bystander {
        let (early, _) = Wire::subscribe(addr, "/events/calm", "");
        Bystander { addr, early, published: 0, times: Default::default() }
    }

    fn probe(&mut self) {
        assert!(self.probe_with(), "no room for a stream");
    }

    /// Where streams are full, a new one is sent away, kindly. Returns whether there was room.
    fn probe_with(&mut self) -> bool {
        let started = Instant::now();
        let health = get(self.addr, "/health");
        self.times[0].push(started.elapsed());
        assert_eq!((health.status, health.body.as_str()), (200, "ok\n"));
        let started = Instant::now();
        self.publish();
        self.times[1].push(started.elapsed());
        let started = Instant::now();
        let mut stream = Wire::stream(self.addr, "/events/calm", "");
        let first = stream.block().expect("a first block");
        if first.id.is_none() {
            assert!(first.retry.is_some() && stream.rest().is_empty(), "{first:?}");
            return false;
        }
        self.publish();
        assert_eq!(stream.event().expect("an event").data(), (self.published - 1).to_string());
        self.times[2].push(started.elapsed());
        true
    }

    fn publish(&mut self) {
        let answer = post(self.addr, "/events/calm", &self.published.to_string());
        assert_eq!(answer.status, 200, "{answer:?}");
        self.published += 1;
    }

    /// The stream from before the crowd has had every event.
    fn finish(mut self, what: &str) {
        for n in 0..self.published {
            assert_eq!(self.early.event().expect("the early stream goes on").data(), n.to_string());
        }
        for (kind, times) in ["health", "publish", "stream"].iter().zip(&mut self.times) {
            times.sort();
            let (Some(last), median) = (times.last(), times.get(times.len() / 2)) else { continue };
            println!("{what}: {kind} {} times, median {median:?}, longest {last:?}", times.len());
            assert!(median.is_none_or(|median| *median < PROBE_TIME), "{what}: {kind} took {median:?}");
        }
    }
}

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
    let opening = |_| b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec();
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
        let limits = Config { connections: 20, subscribers: 20, head_time: PATIENCE, ..Config::default() };
        let server = serve(Config { publish_tokens, ..limits });
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
        newcomer.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(newcomer.answer().status, 200, "before {later} others");
    }
}

/// Opens streams until `attempts` have been made. Those without room are told when to come back, and their stream ends.
fn press_in(addr: SocketAddr, attempts: usize) -> Crowd {
    let mut crowd = Crowd { members: Vec::new() };
    for _ in 0..attempts {
        let mut wire = Wire::stream(addr, "/events/a", "");
        let first = wire.block().expect("a first block");
        if first.id.is_some() {
            wire.socket.set_nonblocking(true).unwrap();
            crowd.members.push((wire.socket, wire.buffer, 0));
        } else {
            assert!(first.retry.is_some(), "{first:?}");
            assert_eq!((first.comments, wire.rest().len()), (vec!["no room for another stream".to_string()], 0));
        }
    }
    crowd
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
    // Each stream is one thread and one descriptor, and nothing is left of those that were sent away.
    process.wait_until_at_most((before.0 + inside, before.1 + inside));
    drop(crowd);
    process.wait_until_at_most(before);
    assert_eq!(press_in(addr, 1).members.len(), 1, "there is room again");
}

#[test]
fn of_12_000_who_come_10_000_are_inside_and_the_others_are_told_when_to_come_back() {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
    if files.is_none_or(|files| files.parse().is_ok_and(|files: usize| files < 15_000)) {
        left_out("15,000 descriptors (ulimit -n)");
        return;
    }
    let process = Process::start(&["--log", "off", "--connections", "500"]);
    those_inside_get_everything(&process, 12_000, 10_000..=10_000);
    process.finish();
}

#[test]
fn with_256_descriptors_those_inside_get_every_event_and_the_others_are_told_when_to_come_back() {
    let process = under("ulimit -n 256", "");
    those_inside_get_everything(&process, 500, 150..=256);
    process.finish();
}

/// The command after a line of shell, which has limited what the system gives.
fn under(line: &str, flags: &str) -> Process {
    let script = format!("{line}; exec {} --listen 127.0.0.1:0 {flags}", env!("CARGO_BIN_EXE_brooklet"));
    Process::from(Command::new("sh").args(["-c", &script]))
}

/// The command, while strace makes system calls fail as `inject` says; with what strace wrote down of them.
fn with_failing(calls: &str, inject: &str, flags: &[&str]) -> (Process, Scratch) {
    let dir = Scratch::new();
    let mut strace = Command::new("strace");
    // With -D, strace is the grandchild: the child is the server itself.
    strace.args(["-D", "-f", "--seccomp-bpf", "-o", &dir.path("calls"), "-e", &format!("trace={calls}")]);
    strace.args(["-e", &format!("inject={calls}:{inject}")]);
    strace.args([env!("CARGO_BIN_EXE_brooklet"), "--listen", "127.0.0.1:0"]).args(flags);
    (Process::from(&mut strace), dir)
}

/// Opens connections that say nothing, some of which may find nobody; no faster than they can be accepted, since a full
/// backlog makes them wait for a second.
fn idle_crowd(addr: SocketAddr, count: usize) -> Vec<TcpStream> {
    let join = |_| {
        thread::sleep(Duration::from_micros(300));
        TcpStream::connect(addr).ok()
    };
    (0..count).filter_map(join).collect()
}

/// What was said about a shortage: not more than a line a second, and one for the second in which it began.
fn assert_few_warnings(log: &str, since: Instant) {
    let lines: Vec<&str> = log.lines().filter(|line| !line.contains(" closed peer=")).collect();
    assert!(lines.len() as u64 <= since.elapsed().as_secs() + 3, "{} lines: {log}", lines.len());
}

/// While nothing can be had, the processor must not be kept busy with asking for it.
fn assert_idle(process: &Process) {
    let (before, started) = (process.processor_ticks(), Instant::now());
    thread::sleep(Duration::from_secs(1));
    let (used, elapsed) = (process.processor_ticks() - before, started.elapsed().as_secs_f64());
    assert!((used as f64) < 30.0 * elapsed, "{used} hundredths of a second in {elapsed:.1} s");
}

#[test]
fn in_a_group_of_40_tasks_it_serves_on_and_recovers() {
    let Some(group) = Cgroup::new("pids", [&[("pids.max", "40")], &[("pids.max", "40")]]) else { return };
    let (process, started) = (group.start(""), Instant::now());
    let mut bystander = Bystander::new(process.addr);
    bystander.probe();
    let before = process.at_rest();
    for streams in [false, true] {
        let crowd = if streams { press_in(process.addr, 200) } else { Crowd { members: Vec::new() } };
        let idle = idle_crowd(process.addr, 200);
        assert_idle(&process);
        for _ in 0..10 {
            assert!(bystander.probe_with() || streams);
        }
        assert!(process.status("Threads") > 15, "only {} threads, so it shows nothing", process.status("Threads"));
        drop((crowd, idle));
        process.wait_until_at_most(before);
        bystander.probe();
    }
    bystander.finish("40 tasks");
    assert_few_warnings(&process.finish(), started);
}

/// Asks on new connections until one is not closed for want of something.
fn insist(addr: SocketAddr, request: &str) {
    wait_for("an answer", || {
        let mut wire = Wire::connect(addr);
        wire.socket.write_all(request.as_bytes()).ok()?;
        wire.take_until(b"\r\n\r\n").filter(|head| head.starts_with(b"HTTP/1.1 200 "))
    });
}

#[test]
fn where_no_thread_can_be_started_those_inside_are_served_on_and_it_recovers() {
    if !has("strace") {
        return;
    }
    // Calls are counted for each thread by itself, so these are the two acceptors' own; start-up needs fewer in any thread.
    let (process, dir) =
        with_failing("clone,clone3", "error=EAGAIN:when=20..120", &["--lanes", "1", "--idle-time", "10m"]);
    let (addr, started) = (process.addr, Instant::now());
    let failed = || std::fs::read_to_string(dir.path("calls")).unwrap().matches("EAGAIN").count();
    let (mut early, _) = Wire::subscribe(addr, "/events/calm", "");
    let mut publish = |body: &str| {
        let length = body.len();
        insist(
            addr,
            &format!("POST /events/calm HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}"),
        );
        assert_eq!(early.event().unwrap().data(), body);
    };
    publish("before");
    let mut crowd = Vec::new();
    wait_for("no thread to be startable", || {
        crowd.append(&mut idle_crowd(addr, 5));
        (failed() >= 20).then_some(())
    });
    publish("while there is none");
    assert_idle(&process);
    wait_for("threads to be startable again", || {
        crowd.append(&mut idle_crowd(addr, 5));
        (failed() == 202).then_some(())
    });
    drop(crowd);
    publish("after");
    assert_eq!(get(addr, "/health").status, 200);
    let log = process.finish();
    assert!(log.contains("no thread for 127.0.0.1:"), "{log}");
    assert_few_warnings(&log, started);
}

#[test]
fn where_accepting_fails_for_want_of_memory_it_waits_instead_of_spinning() {
    if !has("strace") {
        return;
    }
    for error in ["ENOMEM", "ENOBUFS", "EMFILE", "ENFILE"] {
        let started = Instant::now();
        let (process, dir) = with_failing("accept4", &format!("error={error}:when=1..30"), &[]);
        insist(process.addr, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert!(started.elapsed() >= Duration::from_millis(500), "thirty times in {:?}", started.elapsed());
        let calls = std::fs::read_to_string(dir.path("calls")).unwrap();
        assert!(calls.matches(error).count() >= 30, "{calls}");
        let log = process.finish();
        assert!(log.contains("accepting failed"), "{log}");
        assert_few_warnings(&log, started);
    }
}

#[test]
fn where_descriptors_run_out_under_way_those_inside_are_served_on_and_it_recovers() {
    if !has("prlimit") {
        return;
    }
    let (process, started) = (Process::start(&[]), Instant::now());
    let limit = |count: &str| shell(&format!("prlimit --pid {} --nofile={count}", process.child.id()));
    let mut bystander = Bystander::new(process.addr);
    bystander.probe();
    let before = process.at_rest();
    assert!(limit("64:20000"));
    let mut crowd = idle_crowd(process.addr, 200);
    assert_idle(&process);
    process.wait_for_log("accepting failed: Too many open files");
    // Who keeps it waiting makes room, so others come through, in time.
    for _ in 0..3 {
        bystander.probe();
    }
    crowd.append(&mut idle_crowd(process.addr, 100));
    assert!(limit("20000:20000"));
    drop(crowd);
    process.wait_until_at_most(before);
    bystander.probe();
    bystander.finish("out of descriptors");
    assert_few_warnings(&process.finish(), started);
}

/// A thread's start-up inside std aborts the process where there is no room for its signal stack. (malloc takes 64 MiB a
/// piece, so little less than a multiple of that is left to begin with.)
#[test]
fn where_address_space_runs_out_it_does_not_abort() {
    for kilobytes in [200_000, 400_000] {
        let (process, started) = (under(&format!("ulimit -v {kilobytes}"), "--keep-bytes 1MiB"), Instant::now());
        let addr = process.addr;
        let (mut early, _) = Wire::subscribe(addr, "/events/calm", "");
        for round in 0..2 {
            let crowd = idle_crowd(addr, 700);
            assert_eq!(crowd.len(), 700, "it is gone: {}", process.log());
            drop(crowd);
            wait_for("room again", || {
                let mut wire = Wire::connect(addr);
                let sent = wire
                    .socket
                    .write_all(b"POST /events/calm HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx");
                sent.ok().and_then(|()| wire.take_until(b"\r\n\r\n")).filter(|head| head.starts_with(b"HTTP/1.1 200"))
            });
            assert_eq!(early.event().unwrap().data(), "x", "round {round}");
        }
        let log = process.finish();
        assert!(log.contains("no address space"), "it did not run out, so it shows nothing: {log}");
        assert_few_warnings(&log, started);
    }
}

/// What each connection may cost at most, all at once. Of 64 MB: 8 MiB of kept events, which are as much again in the lanes'
/// queues; 100 connections, each with its thread (28 kB in the kernel), its head (16 KiB), and a body or line in two copies
/// (128 KiB); encoding is one at a time (448 KiB, copied once); and what malloc holds back in its arenas.
#[test]
fn in_a_group_of_64_megabytes_the_largest_requests_of_all_connections_do_not_end_it() {
    let bytes = (64 * 1024 * 1024).to_string();
    let settings: [&[(&str, &str)]; 2] =
        [&[("memory.limit_in_bytes", &bytes)], &[("memory.max", &bytes), ("memory.swap.max", "0")]];
    let Some(group) = Cgroup::new("memory", settings) else { return };
    let process = group.start("--subscribers 50 --connections 50 --keep-bytes 8MiB");
    let addr = process.addr;
    let (mut early, _) = Wire::subscribe(addr, "/events/calm", "");
    let stalled: Vec<Wire> = (0..30)
        .map(|_| {
            let mut wire = narrow(addr, 4_096, Some(1_448));
            open(&mut wire, "/events/a?since=earliest");
            wire
        })
        .collect();
    let head = "x".repeat(15_900);
    let many = "key&".repeat(3_900);
    let newlines = "\n".repeat(64 * 1024);
    let line = "x".repeat(64 * 1024);
    let requests = [
        format!(
            "POST /events/a HTTP/1.1\r\nHost: localhost\r\nX-Fill: {head}\r\nContent-Length: 65536\r\n\r\n{newlines}"
        ),
        format!("POST /events/a?{many} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 65536\r\n\r\n{newlines}"),
        format!("PUT /events/a HTTP/1.1\r\nHost: localhost\r\nX-Fill: {head}\r\nContent-Length: 65537\r\n\r\n{line}\n"),
        format!(
            "PUT /events/a?event={} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 65536\r\n\r\n{newlines}",
            "e".repeat(256)
        ),
        format!("GET /events/a HTTP/1.1\r\nHost: localhost\r\nX-Fill: {head}"),
        format!("GET /test?{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "a&".repeat(8_000)),
    ];
    thread::scope(|scope| {
        for n in 0..60 {
            let request = &requests[n % requests.len()];
            scope.spawn(move || {
                for _ in 0..5 {
                    let Ok(mut socket) = TcpStream::connect(addr) else { return };
                    let _ = socket.set_read_timeout(Some(Duration::from_secs(1)));
                    let _ = socket.write_all(request.as_bytes());
                    let _ = socket.read(&mut [0; 4_096]);
                }
            });
        }
    });
    drop(stalled);
    assert_eq!(post(addr, "/events/calm", "x").status, 200, "{}", process.log());
    assert_eq!(early.event().unwrap().data(), "x");
    assert!(metric(addr, "kept_bytes") <= 8 * 1024 * 1024);
    println!("64 MB: at most {} bytes were used", group.read("memory.max_usage_in_bytes").trim());
    for file in ["memory.oom_control", "memory.events"] {
        let text = group.read(file);
        assert!(text.lines().all(|line| !line.starts_with("oom_kill ") || line == "oom_kill 0"), "{text}");
    }
    process.finish();
}

/// Publishes all of these, and says how many were taken. The requests are pipelined.
fn publish_all(addr: SocketAddr, targets: impl Iterator<Item = String>, body: &str) -> usize {
    let (mut wire, mut taken) = (Wire::connect(addr), 0);
    let targets: Vec<String> = targets.collect();
    for some in targets.chunks(100) {
        let request = |target| {
            format!("POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        };
        wire.send(some.iter().map(request).collect::<String>().as_bytes());
        taken += some.iter().filter(|_| wire.answer().status == 200).count();
    }
    taken
}

#[test]
fn floods_of_topics_keys_and_subscriptions_stay_inside_the_limits_and_pass() {
    let budget = 4 * 1024 * 1024;
    let process = Process::start(&["--keep-bytes", "4MiB", "--keep-events", "100000", "--subscribers", "1200"]);
    let addr = process.addr;
    let mut bystander = Bystander::new(addr);
    bystander.probe();
    let (at_rest, memory) = (process.at_rest(), process.status("VmRSS"));
    let inside = |what: &str| {
        let (kept, grown) = (metric(addr, "kept_bytes"), process.status("VmRSS").saturating_sub(memory));
        println!("flood of {what}: {kept} bytes kept, {grown} kB more memory");
        assert!(kept <= budget, "{what}: {kept} bytes are kept");
        assert!(grown < 64 * 1024, "{what}: {grown} kB more");
    };

    let taken = publish_all(addr, (0..12_000).map(|n| format!("/events/topic-{n}")), "x");
    assert_eq!((taken, metric(addr, "topics")), (9_999, 10_000));
    bystander.probe();
    inside("topics");

    let key = "k".repeat(120);
    let taken = publish_all(addr, (0..15_000).map(|n| format!("/events/calm-keys?key={key}{n}")), "x");
    assert_eq!(taken, 0, "all names are in use");
    let taken = publish_all(addr, (0..15_000).map(|n| format!("/events/topic-0?key={key}{n}")), "x");
    assert_eq!(taken, 15_000);
    inside("keys");
    wait_for("the topics to be let go", || {
        publish_all(addr, (0..20).map(|_| "/events/topic-0".into()), &"x".repeat(60_000));
        (metric(addr, "topics") <= 2).then_some(())
    });
    bystander.probe();

    let sixteen = |n: usize| (0..16).map(|k| format!("s{n}-{k}")).collect::<Vec<_>>().join(",");
    let mut streams = Vec::new();
    let mut sent_away = 0;
    for n in 0..800 {
        let mut wire = Wire::stream(addr, &format!("/events/{}", sixteen(n)), "");
        let first = wire.block().unwrap();
        match first.id {
            Some(_) => streams.push(wire),
            None => sent_away += usize::from(first.comments == ["all topic names are in use"] && first.retry.is_some()),
        }
    }
    assert_eq!((streams.len(), sent_away), (468, 332), "sixteen names each; a quarter is for publishing");
    bystander.probe();
    inside("subscriptions");
    drop(streams);

    for n in 0..3_000 {
        let Ok(mut socket) = TcpStream::connect(addr) else { panic!("it is gone: {}", process.log()) };
        let _ = socket.write_all([&b"GET /events/calm HTTP/1.1\r\nHost: localhost\r\n\r\n"[..], b"GET /", b""][n % 3]);
        if n % 100 == 0 {
            bystander.probe();
        }
    }
    process.wait_until_at_most(at_rest);
    wait_for_metric(addr, "topics", 2);
    bystander.probe();
    inside("connections");
    bystander.finish("floods");
    process.finish();
}

/// Each of these became more than a hundred bytes, for as long as the stream was open.
#[test]
fn a_query_of_very_many_parameters_is_refused() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let many = |count: usize| format!("/events/a?poll=1ms&{}", "a&".repeat(count - 1));
    assert_eq!(get(addr, &many(100)).status, 200);
    let refused = get(addr, &many(101));
    assert_eq!((refused.status, refused.body.as_str()), (400, "more than 100 parameters\n"));
}

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
    wait_for("all lines", || {
        most = most.max(process.status("VmRSS").saturating_sub(memory));
        (metric(addr, "published_total") == (wires.len() * length) as u64).then_some(())
    });
    println!("lines of no bytes: {most} kB more");
    assert!(most < 40 * 1024, "{most} kB more");
    assert!(wires.iter_mut().all(|wire| wire.answer().body.starts_with("published 4096,")));
    process.finish();
}
