//! What the system allows, and a system that has nothing left to give: whoever was there before is served on, whoever comes
//! meanwhile is answered, and when the crowd has gone, everything is as it was.

use crate::common::*;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn limits_that_the_system_does_not_allow_are_lowered_with_a_warning() {
    let process = Process::under("ulimit -n 256", "");
    let line = process.wait_for_log("");
    assert!(line.contains("the limit is on open files (ulimit -n)"), "{line}");
    let mut streams = Vec::new();
    let mut rejected = 0;
    for _ in 0..300 {
        let mut wire = Wire::stream(process.addr, "/events/a", "");
        match wire.block().unwrap().id {
            Some(_) => streams.push(wire),
            None => rejected += 1,
        }
        assert_eq!(get(process.addr, "/health").status, 200);
    }
    assert!(streams.len() > 150 && rejected > 50, "{} and {rejected}", streams.len());
    assert_eq!(post(process.addr, "/events/a", "to all").status, 200);
    assert!(streams.iter_mut().all(|wire| wire.event().unwrap().data() == "to all"));
}

/// A thread takes four memory mappings, and each buffer of 128 KiB or more another; without one, the process aborts.
#[test]
fn large_limits_leave_mappings_for_their_buffers() {
    let mappings: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    for (flag, for_each) in [("--line-bytes=64KiB", 4), ("--line-bytes=1MiB", 6), ("--head-bytes=1MiB", 6)] {
        let process = Process::start(&["--threads", &mappings.to_string(), flag]);
        let line = process.wait_for_log(" threads only");
        let said = line.split("room for ").nth(1).unwrap();
        let threads: usize = said.split(' ').next().unwrap().parse().unwrap();
        assert!(threads * for_each < mappings, "{line}");
    }
}

#[test]
fn where_the_system_has_no_room_at_all_it_does_not_start() {
    for descriptors in [5, 8, 12] {
        let script = format!("ulimit -n {descriptors}; exec {BROOKLET} --listen 127.0.0.1:0");
        let output = output(Command::new("sh").args(["-c", &script]));
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "with {descriptors} descriptors");
        assert!(error.contains("the limit is on open files (ulimit -n)"), "with {descriptors}: {error}");
    }
}

/// The command, while strace makes system calls fail as `inject` says; with what strace wrote down of them.
fn with_failing(calls: &str, inject: &str, flags: &[&str]) -> (Process, Scratch) {
    let dir = Scratch::new();
    let mut strace = Command::new("strace");
    // With -D, strace is the grandchild: the child is the server itself.
    strace.args(["-D", "-f", "--seccomp-bpf", "-o", &dir.path("calls"), "-e", &format!("trace={calls}")]);
    strace.args(["-e", &format!("inject={calls}:{inject}")]);
    strace.args([BROOKLET, "--listen", "127.0.0.1:0"]).args(flags);
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
    // For as long as the crowd is there, nobody's time is over: it is the tasks that are short.
    let (process, started) = (group.start("--head-time 1h"), Instant::now());
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
    // Calls are counted for each thread by itself, so these are the clerk's own; start-up needs fewer in any thread.
    let (process, dir) =
        with_failing("clone,clone3", "error=EAGAIN:when=20..120", &["--lanes", "1", "--idle-time", "10m"]);
    let (addr, started) = (process.addr, Instant::now());
    let failed = || std::fs::read_to_string(dir.path("calls")).unwrap().matches("EAGAIN").count();
    let (mut early, _) = Wire::subscribe(addr, "/events/calm", "");
    let mut publish = |body: &str| {
        insist(addr, &post_request("/events/calm", body));
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
        (failed() == 101).then_some(())
    });
    drop(crowd);
    publish("after");
    assert_eq!(get(addr, "/health").status, 200);
    let log = process.finish();
    assert!(log.contains("no thread for those who wait: "), "{log}");
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
        insist(process.addr, HEALTH);
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
        let (process, started) =
            (Process::under(&format!("ulimit -v {kilobytes}"), "--keep-bytes 1MiB"), Instant::now());
        let addr = process.addr;
        let (mut early, _) = Wire::subscribe(addr, "/events/calm", "");
        for round in 0..2 {
            let crowd = idle_crowd(addr, 1_600);
            assert_eq!(crowd.len(), 1_600, "it is gone: {}", process.log());
            drop(crowd);
            wait_for("room again", || {
                let mut wire = Wire::connect(addr);
                let sent = wire.socket.write_all(post_request("/events/calm", "x").as_bytes());
                sent.ok().and_then(|()| wire.take_until(b"\r\n\r\n")).filter(|head| head.starts_with(b"HTTP/1.1 200"))
            });
            assert_eq!(early.event().unwrap().data(), "x", "round {round}");
        }
        let log = process.finish();
        assert!(log.contains("no address space"), "it did not run out, so it shows nothing: {log}");
        assert_few_warnings(&log, started);
    }
}

/// malloc takes 64 MiB of address space at a time for threads, so what it leaves in the end depends on the limit: these go
/// through all that may be left.
#[test]
fn where_address_space_is_short_publishers_and_health_are_answered_beside_the_streams() {
    for kilobytes in (300_000..370_000).step_by(10_000) {
        let process = Process::under(&format!("ulimit -v {kilobytes}"), "--keep-bytes 8MiB");
        let addr = process.addr;
        let idle = idle_crowd(addr, 100); // each has a thread for a while
        let mut streams = press_in(addr, 200);
        for n in 0..10 {
            let ask = |request: &str| {
                let mut wire = Wire::connect(addr);
                wire.send(request.as_bytes());
                wire.take_until(b"\r\n\r\n").is_some_and(|head| head.starts_with(b"HTTP/1.1 200 "))
            };
            let log = || process.log();
            assert!(ask(HEALTH), "health at {kilobytes}, the {n}th time: {}", log());
            let request = post_request("/events/a", &format!("{n} {}", "x".repeat(60_000)));
            assert!(ask(&request), "publishing at {kilobytes}, the {n}th time: {}", log());
        }
        println!("{kilobytes} kB: {} of 200 streams", streams.members.len());
        streams.read_until(10);
        drop(idle);
        process.finish();
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
