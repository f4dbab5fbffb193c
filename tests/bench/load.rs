//! The load generator: holds subscribers, publishes at a rate, and counts what arrives, when, and what it has cost.

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

pub const AS_FAST_AS_IT_GOES: u64 = u64::MAX;
const BODY_BYTES: usize = 100;
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub struct Load {
    pub subscribers: usize,
    pub rate: u64,
    pub events: u64,
    /// So many are published at once, in one write.
    pub burst: u64,
    /// What the subscribers ask for.
    pub query: &'static str,
}

/// One event at a time, to event streams.
pub const PLAIN: Load = Load { subscribers: 0, rate: 0, events: 0, burst: 1, query: "" };

#[derive(Clone)]
pub struct Measured {
    pub cpu_us: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub per_second: f64,
    pub lost: u64,
}

struct Subscriber {
    socket: TcpStream,
    asked: bool,
    ready: bool,
    line: Vec<u8>, // what has come of the line that is not whole yet
    next: u64,
}

impl Load {
    pub fn rate_text(&self) -> String {
        match (self.rate, self.burst) {
            (AS_FAST_AS_IT_GOES, _) => "max".into(),
            (rate, 1) => rate.to_string(),
            (rate, burst) => format!("{}x{burst}", rate / burst),
        }
    }

    /// `threads_end`: the server has one for each request. What has ended counts in hundredths of a second alone.
    pub fn run(&self, addr: SocketAddr, pid: u32, threads_end: bool) -> Measured {
        let processor_ns = if threads_end { processor_ns_of_all } else { processor_ns };
        let mut crowd = Crowd::connect(addr, self.subscribers, self.query);
        let epoch = Instant::now();
        let before = processor_ns(pid);
        let load = self.clone();
        let publisher = thread::spawn(move || load.publish(addr, epoch));
        let expected = self.events * self.subscribers as u64;
        let started = Instant::now();
        while (crowd.latencies_ns.len() as u64) < expected && started.elapsed() < PATIENCE {
            crowd.turn(Some(epoch));
        }
        let seconds = started.elapsed().as_secs_f64();
        // The publisher's connection is held open until the figures are read: its thread's time counts, too.
        let publisher = publisher.join().expect("the publisher");
        let cpu_ns = processor_ns(pid) - before;
        drop(publisher);
        let mut latencies = std::mem::take(&mut crowd.latencies_ns);
        latencies.sort_unstable();
        let at =
            |part: f64| latencies.get((latencies.len() as f64 * part) as usize).map_or(f64::NAN, |ns| *ns as f64 / 1e6);
        let delivered = latencies.len().max(1) as f64;
        Measured {
            cpu_us: cpu_ns as f64 / 1e3 / delivered,
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            per_second: delivered / seconds,
            lost: expected - latencies.len() as u64,
        }
    }

    /// Publishes numbered events that say when they were sent, each burst once the one before is answered.
    fn publish(&self, addr: SocketAddr, epoch: Instant) -> std::net::TcpStream {
        let mut socket = std::net::TcpStream::connect(addr).expect("connecting the publisher");
        socket.set_nodelay(true).expect("nodelay");
        let (mut due, mut answer) = (Instant::now(), [0; 1024]);
        for first in (0..self.events).step_by(self.burst as usize) {
            if self.rate != AS_FAST_AS_IT_GOES {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                due += Duration::from_secs(1) * self.burst as u32 / self.rate as u32;
            }
            let requests = (first..first + self.burst).map(|n| request(n, epoch)).collect::<String>();
            socket.write_all(requests.as_bytes()).expect("publishing");
            let (mut got, mut left, mut closes) = (0, self.burst, false);
            while left > 0 {
                got += socket.read(&mut answer[got..]).ok().filter(|got| *got > 0).expect("an answer");
                while let Some(length) = whole(&answer[..got]) {
                    closes |= String::from_utf8_lossy(&answer[..length]).contains("Connection: close");
                    answer.copy_within(length..got, 0);
                    got -= length;
                    left -= 1;
                }
            }
            if closes {
                socket = std::net::TcpStream::connect(addr).expect("connecting the publisher again");
            }
        }
        socket
    }
}

fn request(n: u64, epoch: Instant) -> String {
    let mut body = format!("{n} {} ", epoch.elapsed().as_nanos());
    body.extend(std::iter::repeat_n('x', BODY_BYTES - body.len()));
    format!("POST /events/bench HTTP/1.1\r\nHost: localhost\r\nContent-Length: {BODY_BYTES}\r\n\r\n{body}")
}

/// How long the first answer is, once it has come.
fn whole(answer: &[u8]) -> Option<usize> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let length = head.split("Content-Length: ").nth(1).and_then(|rest| rest.lines().next()?.parse().ok()).unwrap_or(0);
    (body.len() >= length).then_some(head.len() + 4 + length)
}

/// Nanoseconds that the threads of a process have run. It must end no thread meanwhile.
fn processor_ns(pid: u32) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads").flatten();
    let of = |path: std::path::PathBuf| {
        std::fs::read_to_string(path.join("schedstat")).ok()?.split(' ').next()?.parse::<u64>().ok()
    };
    threads.filter_map(|thread| of(thread.path())).sum()
}

/// As far as /proc tells it of threads that have ended, too: in hundredths of a second.
fn processor_ns_of_all(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("its times");
    let times = stat.rsplit_once(')').expect("its name").1.split_whitespace().skip(11).take(2);
    times.map(|ticks| ticks.parse::<u64>().expect("a number") * 10_000_000).sum()
}

struct Crowd {
    query: &'static str,
    poll: Poll,
    events: Events,
    members: Vec<Subscriber>,
    latencies_ns: Vec<u64>,
    buffer: Vec<u8>,
}

impl Crowd {
    fn connect(addr: SocketAddr, count: usize, query: &'static str) -> Crowd {
        let (poll, events) = (Poll::new().expect("epoll"), Events::with_capacity(4096));
        let mut crowd =
            Crowd { query, poll, events, members: Vec::new(), latencies_ns: Vec::new(), buffer: vec![0; 64 * 1024] };
        let started = Instant::now();
        while crowd.members.iter().filter(|member| member.ready).count() < count {
            assert!(started.elapsed() < PATIENCE, "the subscribers did not get their streams");
            // In waves, so that the listening socket's queue is never overrun.
            for _ in 0..100.min(count - crowd.members.len()) {
                let mut socket = TcpStream::connect(addr).expect("connecting");
                let token = Token(crowd.members.len());
                let registry = crowd.poll.registry();
                registry.register(&mut socket, token, Interest::READABLE | Interest::WRITABLE).expect("registering");
                crowd.members.push(Subscriber { socket, asked: false, ready: false, line: Vec::new(), next: 0 });
            }
            let all = crowd.members.len();
            while crowd.members.iter().skip(all.saturating_sub(100)).any(|member| !member.ready) {
                assert!(started.elapsed() < PATIENCE, "the subscribers did not get their streams");
                crowd.turn(None);
            }
        }
        crowd
    }

    /// Reads what has come. Events count once `epoch` has begun.
    fn turn(&mut self, epoch: Option<Instant>) {
        let Crowd { query, poll, events, members, latencies_ns, buffer } = self;
        poll.poll(events, Some(Duration::from_millis(20))).expect("polling");
        for event in events.iter() {
            let member = &mut members[event.token().0];
            if !member.asked {
                let request = format!("GET /events/bench{query} HTTP/1.1\r\nHost: localhost\r\n\r\n");
                member.asked = member.socket.write(request.as_bytes()).is_ok_and(|written| written == request.len());
            }
            loop {
                match member.socket.read(buffer) {
                    Ok(0) => panic!("a stream ended"),
                    Ok(got) => member.take(&buffer[..got], epoch, latencies_ns),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if [ErrorKind::WouldBlock, ErrorKind::NotConnected].contains(&error.kind()) => break,
                    Err(error) => panic!("a stream failed: {error}"),
                }
            }
        }
    }
}

impl Subscriber {
    fn take(&mut self, bytes: &[u8], epoch: Option<Instant>, latencies_ns: &mut Vec<u64>) {
        let now = epoch.map_or(0, |epoch| epoch.elapsed().as_nanos() as u64);
        self.line.extend_from_slice(bytes);
        let whole = self.line.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        for line in self.line[..whole].split(|b| *b == b'\n') {
            if line == b"\r" || line.starts_with(b"retry: ") {
                self.ready = true; // the head is over
            } else if let Some(data) = data_of(line) {
                let mut words =
                    data.split(|b| *b == b' ').map(|word| str::from_utf8(word).unwrap_or("").parse::<u64>());
                let (number, sent) = (words.next(), words.next());
                assert_eq!(number, Some(Ok(self.next)), "once, and in order");
                self.next += 1;
                latencies_ns.push(now.saturating_sub(sent.and_then(Result::ok).unwrap_or(0)));
            }
        }
        self.line.drain(..whole);
    }
}

/// The data in a line of any form; chunks' sizes have no space in them.
fn data_of(line: &[u8]) -> Option<&[u8]> {
    const IN_JSON: &[u8] = b"\"data\":\"";
    match line.first()? {
        b'{' => line.windows(IN_JSON.len()).position(|at| at == IN_JSON).map(|at| &line[at + IN_JSON.len()..]),
        b'0'..=b'9' => Some(line).filter(|line| line.contains(&b' ')),
        _ => line.strip_prefix(b"data: "),
    }
}
