//! Many subscribers on three servers, of which each must have every event of its topics, once and in the order of the ids.

use super::crowd::{Crowd, May};
use super::*;
use crate::common::{wait_for_growth, wait_longer_for};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::sync::OnceLock;
use std::sync::atomic::AtomicUsize;

/// No stream may end or say anything but events meanwhile, and what a slow machine's readers lack must not be forgotten.
pub const FLAGS: [&str; 10] =
    ["--log", "off", "--lifetime", "1h", "--heartbeat", "1h", "--keep-events", "20000", "--stall-time", "1m"];
const EVENTS: usize = 20_000;
const PUBLISHERS: usize = 4;

/// How many events were published by now.
#[derive(Default)]
pub struct Progress(AtomicUsize);

impl Progress {
    /// Waits until this share of all events was published.
    pub fn reach(&self, share: usize, of: usize) {
        wait_longer_for("publishers to go on", || (self.0.load(SeqCst) >= EVENTS * share / of).then_some(()));
    }
}

/// Publishes all events to one topic, which 3,000 subscribers follow on three servers, while `hurt` does to them and to Redis
/// what it likes. Every subscriber must have every event once and in order, wherever it goes on.
pub fn sixty_million_deliveries(
    redis: &mut Redis,
    may: May,
    hurt: impl FnOnce(&Progress, &mut Redis, &mut [Process], &Servers) + Send,
) -> Crowd {
    let mut servers: Vec<Process> = (0..3).map(|_| server(&redis.url(), &FLAGS)).collect();
    let addrs = addresses(&servers);
    let mut crowd = Crowd::subscribe(&addrs, subscribers(), may);
    let (began, progress, bytes) = (Instant::now(), Progress::default(), OnceLock::new());
    let taken = thread::scope(|scope| {
        let (addrs, progress, bytes) = (&addrs, &progress, &bytes);
        let share = |p| scope.spawn(move || publish_share(p, addrs, progress, |_| "a".into()));
        let publishers: Vec<_> = (0..PUBLISHERS).map(share).collect();
        scope.spawn(|| hurt(progress, redis, &mut servers, addrs));
        let taken = scope.spawn(move || {
            let shares = publishers.into_iter().flat_map(|publisher| publisher.join().unwrap());
            let taken: BTreeMap<Id, String> = shares.collect();
            bytes.get_or_init(|| taken.iter().map(|(id, data)| crowd::chunk(*id, data).len()).sum::<usize>());
            taken
        });
        crowd.read(|| bytes.get().copied());
        taken.join().unwrap()
    });
    let took = began.elapsed();
    assert_eq!(taken.values().collect::<BTreeSet<_>>().len(), EVENTS, "each was published once");
    let delivered = crowd.check(&taken);
    assert_eq!(delivered, EVENTS * crowd.len());
    println!(
        "{delivered} deliveries of {EVENTS} events to {} subscribers of three servers, {} streams cut, {} gaps or more each: \
         every event came once and in order, in {took:.1?}",
        crowd.len(),
        crowd.cuts,
        crowd.least_gaps()
    );
    crowd
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
fn publish_share(
    p: usize,
    addrs: &Servers,
    published: &Progress,
    topic: impl Fn(usize) -> String,
) -> Vec<(Id, String)> {
    let mut taken = Vec::new();
    let mut wires: [Option<Wire>; 3] = [None, None, None];
    for n in (p..EVENTS).step_by(PUBLISHERS) {
        let (data, target, mut server) = (n.to_string(), format!("/events/{}?key={n}", topic(n)), n / PUBLISHERS + p);
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
        published.0.fetch_add(1, SeqCst);
    }
    taken
}

/// A subscriber of some of many topics, of whose events only the numbers are looked at.
struct Member {
    socket: std::net::TcpStream,
    topics: Vec<usize>,
    buffer: Vec<u8>,
    /// The numbers of the events, as they came.
    had: Vec<u32>,
}

impl Member {
    fn subscribe(addr: std::net::SocketAddr, topics: Vec<usize>) -> Member {
        let names: Vec<String> = topics.iter().map(|topic| format!("t{topic}")).collect();
        let (wire, _) = Wire::subscribe(addr, &format!("/events/{}", names.join(",")), "");
        wire.socket.set_nonblocking(true).unwrap();
        Member { socket: wire.socket, topics, buffer: wire.buffer, had: Vec::new() }
    }

    /// Takes what has come.
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

/// 3,000 subscribers of one of 100 topics each, and 30 of 16 topics.
pub fn many_topics() {
    const TOPICS: usize = 100;
    let redis = Redis::start();
    let servers = three(&redis.url(), &FLAGS);
    let addrs = addresses(&servers);
    let (of_one, of_many) = (subscribers(), 30);
    let topics = |n: usize| match n.checked_sub(of_one) {
        None => vec![n % TOPICS],
        Some(n) => (0..16).map(|topic| (n + topic) % TOPICS).collect(),
    };
    let (count, readers) = (of_one + of_many, 4);
    let mut members: Vec<Vec<Member>> = (0..readers).map(|_| Vec::new()).collect();
    for n in 0..count {
        members[n % readers].push(Member::subscribe(servers[n % 3].addr, topics(n)));
    }
    let (began, published) = (Instant::now(), Progress::default());
    // Three events in a row are of one topic, so its order is that of several publishers and servers.
    let topic = |n: usize| n / 3 % TOPICS;
    let mut taken: Vec<(Id, u32)> = thread::scope(|scope| {
        let (addrs, published) = (&addrs, &published);
        let share = |p| scope.spawn(move || publish_share(p, addrs, published, |n| format!("t{}", topic(n))));
        let publishers: Vec<_> = (0..PUBLISHERS).map(share).collect();
        for members in &mut members {
            scope.spawn(move || {
                let of = |member: &Member| (0..EVENTS).filter(|n| member.topics.contains(&topic(*n))).count();
                let expected: usize = members.iter().map(of).sum();
                wait_for_growth("events", expected, || {
                    thread::sleep(Duration::from_millis(50)); // the processor is for the servers
                    members.iter_mut().for_each(Member::read);
                    members.iter().map(|member| member.had.len()).sum()
                });
            });
        }
        let taken = publishers.into_iter().flat_map(|publisher| publisher.join().unwrap());
        taken.map(|(id, data)| (id, data.parse().unwrap())).collect()
    });
    let took = began.elapsed();
    taken.sort_unstable();
    let mut delivered = 0;
    for member in members.iter().flatten() {
        let expected = taken.iter().map(|(_, n)| *n).filter(|n| member.topics.contains(&topic(*n as usize)));
        assert!(expected.eq(member.had.iter().copied()), "once and in order");
        delivered += member.had.len();
    }
    println!("{EVENTS} events, {count} subscribers of three servers, {delivered} deliveries: {took:.1?}");
}
