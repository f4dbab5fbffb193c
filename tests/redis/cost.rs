//! The figures of the README's pages about Redis: what it costs a publisher and a delivery to go through it, beside the same
//! server alone in the same run, and what Redis and a server spend themselves, from which the page about a million subscribers
//! follows. Prints its tables as they stand there, each row when it is known.

use super::crowd::{Crowd, May};
use super::*;
use crate::common::wait_longer_for;

/// Of each event.
const BODY_BYTES: usize = 100;
const SUBSCRIBERS: usize = 500;

/// What a server costs: how many events publishers bring in, how long one takes, and the processor time of a delivery.
struct Cost {
    rate: f64,
    median_us: u128,
    late_us: u128,
    cpu_us: f64,
}

pub fn print_tables() {
    println!(
        "| publishers | events/s | alone | median µs | alone | p99 µs | alone | µs CPU a delivery, {SUBSCRIBERS} subscribers | alone |"
    );
    println!("|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    for publishers in [1, 4, 16] {
        let redis = Redis::start();
        let [shared, alone] = [&["--redis", &redis.url()][..], &[]]
            .map(|flags| cost(&Process::start(&[flags, &["--log", "off"]].concat()), publishers));
        println!(
            "| {publishers} | {:.0} | {:.0} | {} | {} | {} | {} | {:.1} | {:.1} |",
            shared.rate,
            alone.rate,
            shared.median_us,
            alone.median_us,
            shared.late_us,
            alone.late_us,
            shared.cpu_us,
            alone.cpu_us
        );
    }
    println!("\n| measured | each published for itself | lines of a `PUT` |\n|---|---:|---:|");
    let [[one, one_of_many], [six, six_of_many]] =
        [1, 6].map(|servers| [false, true].map(|put| of_redis(servers, put)));
    let sent = [six.less(&one), six_of_many.less(&one_of_many)];
    println!("| Redis takes an event | {:.1} µs | {:.1} µs |", one.us - sent[0].us, one_of_many.us - sent[1].us);
    println!("| Redis sends it to one server | {:.1} µs | {:.1} µs |", sent[0].us, sent[1].us);
    println!("| in so many bytes | {:.0} | {:.0} |", sent[0].bytes, sent[1].bytes);
    let [plain, keyed] = memory();
    println!("\n| measured | |\n|---|---:|");
    println!("| Redis keeps an event of {BODY_BYTES} bytes | {plain:.0} bytes |");
    println!("| and its key | {keyed:.0} bytes |");
    println!("| a server sends it to a subscriber | {} bytes |", wire_bytes());
    println!("| a subscriber comes to a server, and goes | {:.0} µs |", arrival_us());
}

fn cost(server: &Process, publishers: usize) -> Cost {
    // Publishing alone, each event as soon as the one before is answered.
    let began = Instant::now();
    let mut times = publish_each(&[server.addr], publishers, 20_000);
    let rate = times.len() as f64 / began.elapsed().as_secs_f64();
    times.sort_unstable();
    // Then a steady stream of events, one at a time, to a crowd.
    let mut wires: Vec<Wire> = (0..SUBSCRIBERS).map(|_| Wire::subscribe(server.addr, "/events/steady", "").0).collect();
    let (before, steady) = (server.processor_ticks(), 500);
    let mut publisher = Wire::connect(server.addr);
    for n in 0..steady {
        assert_eq!(publisher.post("/events/steady", &format!("{n} {}", "x".repeat(BODY_BYTES))).status, 200);
        for wire in &mut wires {
            assert!(wire.event().unwrap().data().starts_with(&format!("{n} ")));
        }
    }
    let cpu_us = ticks_us(server.processor_ticks() - before) / (steady * SUBSCRIBERS) as f64;
    Cost { rate, median_us: times[times.len() / 2], late_us: times[times.len() * 99 / 100], cpu_us }
}

/// Publishes events one after another on each of so many connections, in turn to these servers. How long each took, in µs.
fn publish_each(addrs: &[std::net::SocketAddr], publishers: usize, events: usize) -> Vec<u128> {
    thread::scope(|scope| {
        let publish = |p: usize| {
            let mut wire = Wire::connect(addrs[p % addrs.len()]);
            let mut time = |_| {
                let began = Instant::now();
                assert_eq!(wire.post("/events/quiet", &"x".repeat(BODY_BYTES)).status, 200);
                began.elapsed().as_micros()
            };
            (0..events / publishers).map(&mut time).collect::<Vec<_>>()
        };
        let threads: Vec<_> = (0..publishers).map(|p| scope.spawn(move || publish(p))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

/// What Redis spends on an event: time of its processor, and what it sends.
struct Spent {
    us: f64,
    bytes: f64,
}

impl Spent {
    /// For each of five servers more.
    fn less(&self, one: &Spent) -> Spent {
        Spent { us: (self.us - one.us) / 5.0, bytes: (self.bytes - one.bytes) / 5.0 }
    }
}

fn of_redis(servers: usize, put: bool) -> Spent {
    let redis = Redis::start();
    let servers: Vec<Process> = (0..servers).map(|_| server(&redis.url(), &["--log", "off"])).collect();
    let addrs: Vec<_> = servers.iter().map(|server| server.addr).collect();
    let mut streams: Vec<Wire> = addrs.iter().map(|addr| Wire::subscribe(*addr, "/events/end", "").0).collect();
    let sent = || redis.info("stats", "total_net_output_bytes");
    let before = (redis.processor_us(), sent());
    let mut all_have_read = || {
        publish(addrs[0], "/events/end", "all is read");
        streams.iter_mut().for_each(|stream| assert_eq!(stream.event().unwrap().data(), "all is read"));
    };
    let events = if put {
        let (puts, count) = (20, 10_000);
        let lines = format!("{}\n", "x".repeat(BODY_BYTES)).repeat(count);
        let head = format!("PUT /events/quiet HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", lines.len());
        let mut wire = Wire::connect(addrs[0]);
        for _ in 0..puts {
            wire.send(head.as_bytes());
            wire.send(lines.as_bytes());
            let answer = wire.answer();
            assert!(answer.body.starts_with(&format!("published {count}, ")), "{answer:?}");
            all_have_read(); // none may lag until Redis has deleted what it had not read
        }
        puts * count
    } else {
        let events = publish_each(&addrs[..1], 4, 40_000).len();
        all_have_read();
        events
    };
    let each = |before: u64, after: u64| (after - before) as f64 / events as f64;
    Spent { us: each(before.0, redis.processor_us()), bytes: each(before.1, sent()) }
}

/// What Redis keeps of an event, and of its key.
fn memory() -> [f64; 2] {
    let redis = Redis::start();
    let server = server(&redis.url(), &["--log", "off"]);
    let used = || redis.info("memory", "used_memory_dataset") as f64;
    let events = 20_000;
    let empty = used();
    publish_each(&[server.addr], 4, events);
    let plain = used();
    let mut wire = Wire::connect(server.addr);
    for n in 0..events {
        // Keys as long as a UUID.
        assert_eq!(wire.post(&format!("/events/quiet?key={n:036}"), &"x".repeat(BODY_BYTES)).status, 200);
    }
    let each = |before: f64, after: f64| (after - before) / events as f64;
    [each(empty, plain), each(plain, used()) - each(empty, plain)]
}

/// An event in its chunk, as a client receives it.
fn wire_bytes() -> usize {
    let server = Process::start(&["--log", "off"]);
    let (stream, _) = Wire::subscribe(server.addr, "/events/a", "");
    publish(server.addr, "/events/a", &"x".repeat(BODY_BYTES));
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\n\n\r\n") {
        let mut chunk = [0; 1024];
        let got = (&stream.socket).read(&mut chunk).unwrap();
        bytes.extend_from_slice(&chunk[..got]);
    }
    bytes.len()
}

/// The processor time of the servers for each subscriber who comes and goes.
fn arrival_us() -> f64 {
    let redis = Redis::start();
    let servers = three(&redis.url(), &["--log", "off"]);
    let (crowds, each) = (5, 3_000);
    for _ in 0..crowds {
        drop(Crowd::subscribe(&addresses(&servers), each, May::default()));
        for server in &servers {
            wait_longer_for("all to be gone", || (metric(server.addr, "subscribers") == 0).then_some(()));
        }
    }
    ticks_us(servers.iter().map(Process::processor_ticks).sum()) / (crowds * each) as f64
}

/// Linux counts hundredths of a second.
fn ticks_us(ticks: u64) -> f64 {
    ticks as f64 * 10_000.0
}
