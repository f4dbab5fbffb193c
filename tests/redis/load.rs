//! Many subscribers on three servers, of which each must have every event of its topics, once and in the order of the ids.

use super::crowd::Crowd;
use super::*;
use crate::common::wait_longer_for;
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

/// No stream may end or say anything but events meanwhile, and what a slow machine's readers lack must not be forgotten.
const FLAGS: [&str; 10] =
    ["--log", "off", "--lifetime", "1h", "--heartbeat", "1h", "--keep-events", "20000", "--stall-time", "1m"];
const EVENTS: usize = 20_000;
const PUBLISHERS: usize = 4;

/// Publishes all events to one topic, which 3,000 subscribers follow on three servers, of which so many are killed meanwhile.
/// Every subscriber must have every event once and in order, wherever it goes on.
pub fn sixty_million_deliveries(kills: usize) {
    let redis = Redis::start();
    let mut servers = three(&redis.url(), &FLAGS);
    let addrs = addresses(&servers);
    let mut crowd = Crowd::subscribe(&addrs, subscribers(), kills > 0);
    let (began, published, over) = (Instant::now(), AtomicUsize::new(0), Mutex::new(None));
    let taken = thread::scope(|scope| {
        let publishers: Vec<_> = (0..PUBLISHERS)
            .map(|p| {
                let (addrs, published) = (&addrs, &published);
                scope.spawn(move || publish_share(p, addrs, published))
            })
            .collect();
        scope.spawn(|| {
            for kill in 0..kills {
                // Evenly spread over the events, the last ones in the middle of the end.
                let due = EVENTS * (kill + 1) / (kills + 1);
                wait_longer_for("the next kill", || (published.load(SeqCst) >= due).then_some(()));
                let killed = &mut servers[kill % 3];
                killed.child.kill().unwrap();
                killed.child.wait().unwrap();
                *killed = server(&redis.url(), &FLAGS);
                addrs.lock().unwrap()[kill % 3] = killed.addr;
            }
        });
        let all = scope.spawn(|| {
            let taken: BTreeMap<Id, String> =
                publishers.into_iter().flat_map(|publisher| publisher.join().unwrap()).collect();
            let bytes = taken.iter().map(|(id, data)| crowd::chunk(*id, data).len()).sum();
            *over.lock().unwrap() = Some(bytes);
            taken
        });
        crowd.read(|| *over.lock().unwrap());
        all.join().unwrap()
    });
    let took = began.elapsed();
    assert_eq!(taken.values().collect::<BTreeSet<_>>().len(), EVENTS, "each was published once");
    let delivered = crowd.check(&taken);
    assert_eq!(delivered, EVENTS * crowd.len());
    assert!(kills == 0 || crowd.cuts >= crowd.len(), "only {} streams were cut", crowd.cuts);
    println!(
        "{delivered} deliveries of {EVENTS} events to {} subscribers of three servers, {kills} times killed, {} streams cut: \
         every event once and in order, in {took:.1?}",
        crowd.len(),
        crowd.cuts
    );
}

/// 3,000, or as many as the system gives descriptors for.
fn subscribers() -> usize {
    let (wanted, others) = (3_000, 500);
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
    let files = files.and_then(|files| files.parse().ok()).unwrap_or(usize::MAX);
    if files < wanted + others {
        left_out(&format!("{} descriptors (ulimit -n) to have {wanted} subscribers, and has fewer", wanted + others));
    }
    wanted.min(files.saturating_sub(others).max(100))
}

/// Publishes every fourth event, each on another server than the one before. An event that may have been published, since
/// its server was killed or Redis did not answer in time, is published again with its key.
fn publish_share(p: usize, addrs: &Servers, published: &AtomicUsize) -> Vec<(Id, String)> {
    let mut taken = Vec::new();
    let mut wires: [Option<Wire>; 3] = [None, None, None];
    for n in (p..EVENTS).step_by(PUBLISHERS) {
        let (data, target, mut server) = (n.to_string(), format!("/events/a?key={n}"), n / PUBLISHERS + p);
        let id = wait_longer_for("an event to be taken", || {
            server += 1;
            let wire = &mut wires[server % 3];
            if wire.is_none() {
                let addr = { addrs.lock().unwrap()[server % 3] };
                *wire = std::net::TcpStream::connect(addr).ok().map(Wire::on);
            }
            let answer = wire.as_mut().and_then(|wire| try_post_on(wire, &target, &data));
            match answer {
                Some((200, body)) => Some(body.trim().parse().unwrap()),
                Some((503, _)) => None,
                Some(other) => panic!("{other:?}"),
                None => {
                    *wire = None;
                    None
                }
            }
        });
        taken.push((id, data));
        published.fetch_add(1, SeqCst);
    }
    taken
}

pub struct Size {
    pub subscribers: usize,
    /// Subscribers of many topics, beside the others, which have one each.
    pub of_many: usize,
    pub topics: usize,
    pub events: usize,
    pub publishers: usize,
}

struct Member {
    socket: std::net::TcpStream,
    topics: Vec<usize>,
    buffer: Vec<u8>,
    /// The numbers of the events, as they came.
    had: Vec<u32>,
}

impl Member {
    /// Takes what has come. The numbers are all that is looked at: what else a stream holds, others test.
    fn read(&mut self) {
        let mut chunk = [0; 64 * 1024];
        loop {
            match self.socket.read(&mut chunk) {
                Ok(0) => panic!("a stream ended"),
                Ok(got) => self.buffer.extend_from_slice(&chunk[..got]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        let whole = self.buffer.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        for line in str::from_utf8(&self.buffer[..whole]).unwrap().lines() {
            assert_ne!(line, "event: gap");
            if let Some(number) = line.strip_prefix("data: ") {
                self.had.push(number.parse().unwrap());
            }
        }
        self.buffer.drain(..whole);
    }
}

fn subscribe(addr: std::net::SocketAddr, topics: Vec<usize>) -> Member {
    let names: Vec<String> = topics.iter().map(|topic| format!("t{topic}")).collect();
    let (wire, _) = Wire::subscribe(addr, &format!("/events/{}", names.join(",")), "");
    wire.socket.set_nonblocking(true).unwrap();
    Member { socket: wire.socket, topics, buffer: wire.buffer, had: Vec::new() }
}

pub fn run(size: &Size) {
    let redis = Redis::start();
    // No stream may end meanwhile, and a burst must not be forgotten before a slow machine's readers have it.
    let flags = ["--log", "off", "--lifetime", "1h", "--keep-events", "20000", "--stall-time", "1m"];
    let servers = three(&redis.url(), &flags);
    let topics = |n: usize| match n.checked_sub(size.subscribers) {
        None => vec![n % size.topics],
        Some(n) => (0..16.min(size.topics)).map(|topic| (n + topic) % size.topics).collect(),
    };
    let count = size.subscribers + size.of_many;
    let readers = 4;
    let mut members: Vec<Vec<Member>> = (0..readers).map(|_| Vec::new()).collect();
    for n in 0..count {
        members[n % readers].push(subscribe(servers[n % 3].addr, topics(n)));
    }
    let began = Instant::now();
    let mut taken: Vec<(Id, usize, u32)> = thread::scope(|scope| {
        let publish = |p: usize| {
            let mut wires: Vec<Wire> = servers.iter().map(|server| Wire::connect(server.addr)).collect();
            let mut taken = Vec::new();
            for n in (p..size.events).step_by(size.publishers) {
                let (topic, server) = (n / 3 % size.topics, (n / size.publishers + p) % 3);
                // On a busy machine Redis may be too slow for an answer: the key makes it safe to try again.
                let answer = wait_longer_for("an event to be taken", || {
                    let answer = wires[server].post(&format!("/events/t{topic}?key={n}"), &n.to_string());
                    assert!([200, 503].contains(&answer.status), "{answer:?}");
                    Some(answer).filter(|answer| answer.status == 200)
                });
                taken.push((answer.body.trim().parse().unwrap(), topic, n as u32));
            }
            taken
        };
        let publishers: Vec<_> = (0..size.publishers).map(|p| scope.spawn(move || publish(p))).collect();
        let expected = |member: &Member| {
            let of_topics = (0..size.events).filter(|n| member.topics.contains(&(n / 3 % size.topics)));
            of_topics.count()
        };
        for members in &mut members {
            scope.spawn(move || {
                let expected: usize = members.iter().map(expected).sum();
                let (mut had, mut deadline) = (0, Instant::now() + PATIENCE);
                while had < expected {
                    members.iter_mut().for_each(Member::read);
                    let now = members.iter().map(|member| member.had.len()).sum();
                    deadline = if now > had { Instant::now() + PATIENCE } else { deadline };
                    had = now;
                    thread::sleep(Duration::from_millis(50)); // the processor is for the servers
                    assert!(Instant::now() < deadline, "{had} of {expected} events, and no more come");
                }
            });
        }
        publishers.into_iter().flat_map(|publisher| publisher.join().unwrap()).collect()
    });
    let took = began.elapsed();
    taken.sort_unstable();
    let mut delivered = 0;
    for member in members.iter().flatten() {
        let expected = taken.iter().filter(|(_, topic, _)| member.topics.contains(topic)).map(|(.., n)| *n);
        assert!(expected.eq(member.had.iter().copied()), "once and in order");
        delivered += member.had.len();
    }
    println!("{} events, {count} subscribers of three servers, {delivered} deliveries: {took:.1?}", size.events);
}

/// What a server costs: how many events publishers bring in, how long one takes, and the processor time of a delivery.
struct Cost {
    publishers: usize,
    rate: f64,
    median_us: u128,
    late_us: u128,
    cpu_us: f64,
}

/// Prints what it costs to go through Redis, beside the same server alone, in the same run.
pub fn compare_cost() {
    let redis = Redis::start();
    println!("publishers | events/s | median µs | p99 µs | µs CPU a delivery (500 subscribers)");
    for publishers in [1, 4, 16] {
        for (name, flags) in [("alone", vec![]), ("Redis", vec!["--redis".into(), redis.url()])] {
            let flags: Vec<&str> = flags.iter().map(String::as_str).chain(["--log", "off"]).collect();
            let cost = cost(&Process::start(&flags), publishers);
            let Cost { rate, median_us, late_us, cpu_us, .. } = cost;
            println!("{name}: {:10} | {rate:8.0} | {median_us:9} | {late_us:6} | {cpu_us:.2}", cost.publishers);
        }
    }
}

fn cost(server: &Process, publishers: usize) -> Cost {
    let (events, subscribers) = (20_000 / publishers, 500);
    let addr = server.addr;
    // Publishing alone, each event as soon as the one before is answered.
    let began = Instant::now();
    let mut times: Vec<u128> = thread::scope(|scope| {
        let publish = || {
            let mut wire = Wire::connect(addr);
            let mut time = |_| {
                let began = Instant::now();
                assert_eq!(wire.post("/events/quiet", &"x".repeat(100)).status, 200);
                began.elapsed().as_micros()
            };
            (0..events).map(&mut time).collect::<Vec<_>>()
        };
        let threads: Vec<_> = (0..publishers).map(|_| scope.spawn(publish)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let rate = times.len() as f64 / began.elapsed().as_secs_f64();
    times.sort_unstable();
    // Then a steady stream of events, one at a time, to a crowd.
    let mut members: Vec<Member> = (0..subscribers).map(|_| subscribe(addr, vec![0])).collect();
    let (before, steady) = (cpu_us(server), 500);
    let mut wire = Wire::connect(addr);
    for n in 0..steady {
        assert_eq!(wire.post("/events/t0", &n.to_string()).status, 200);
        let expected = n + 1;
        wait_longer_for("an event everywhere", || {
            members.iter_mut().for_each(Member::read);
            members.iter().all(|member| member.had.len() == expected).then_some(())
        });
    }
    let cpu_us = (cpu_us(server) - before) as f64 / (steady * subscribers) as f64;
    Cost { publishers, rate, median_us: times[times.len() / 2], late_us: times[times.len() * 99 / 100], cpu_us }
}

/// What a process has had of the processor, which the kernel counts in hundredths of a second.
fn cpu_us(server: &Process) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/stat", server.child.id())).unwrap();
    let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()) * 10_000
}
