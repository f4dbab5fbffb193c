//! The hand-over and the journal's elected writer, run in many orders.
//!
//! All of the server is the real one: only what threads wait with, time, and the other end of each socket are the model's
//! (`std/`, `channel/`). A model starts a server, hands it sockets, publishes, closes, stops, and looks at what came out. In
//! which order threads go on is explored with shuttle (`std/src/check.rs`), which runs one thread at a time.
//!
//! What is left out: what processors may do to memory that is shared without a lock, since every atomic is as if it were
//! `SeqCst`; what a kernel does to a socket beyond being full, closed or reset; accepting; more than one lane. The hub's
//! snapshots and the journal's rewriting run only where a disk has failed.

use crate::{Config, Event, Handle, Id, Log, Server, Stream};
use std::check::check;
use std::io::take_lines;
use std::net::{Peer, pair};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::{Duration, be_punctual};
use std::{below, point};

mod behind;
mod close;
mod handlers;
mod journal;
mod live;
mod old;
mod threads;

/// Longer than anybody waits in a model, and less than the minute that the clerk sleeps where nobody rings.
const PATIENCE: Duration = Duration::from_secs(50);

/// Enough for any answer.
const ROOMY: usize = 1 << 20;

fn start(config: Config) -> Handle {
    start_with(config, |_| {})
}

fn start_with(config: Config, set_up: impl FnOnce(&Server)) -> Handle {
    let server = Server::bind("127.0.0.1:3000", config.with(|config| config.lanes = 1)).unwrap();
    set_up(&server);
    server.spawn().unwrap()
}

/// Hands a connection to the server that sends these bytes, and whose sockets hold so many for the peer.
fn connect(server: &Handle, request: &str, capacity: usize) -> Peer {
    static PORT: AtomicU16 = AtomicU16::new(1);
    let (socket, peer) = pair(PORT.fetch_add(1, SeqCst), capacity);
    peer.send(request.as_bytes());
    server.serve(socket).unwrap();
    peer
}

fn get(server: &Handle, path: &str, capacity: usize) -> Peer {
    get_with(server, path, "", capacity)
}

fn get_with(server: &Handle, path: &str, fields: &str, capacity: usize) -> Peer {
    connect(server, &format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:3000\r\n{fields}\r\n"), capacity)
}

fn post(server: &Handle, path: &str, body: &str) -> Peer {
    let length = body.len();
    let head = format!("POST {path} HTTP/1.1\r\nHost: 127.0.0.1:3000\r\nContent-Length: {length}\r\n\r\n");
    connect(server, &(head + body), ROOMY)
}

/// Stops the server, for which nobody may be slow: then every connection ends in time.
fn stop(server: Handle) {
    be_punctual();
    assert_eq!(server.stop(), 0, "connections that have not ended");
}

fn spawn<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    thread::Builder::new().name(name.into()).spawn(work).unwrap()
}

/// Lets others go on for a while, so that what comes next meets them anywhere.
fn dawdle() {
    (0..below(100)).for_each(|_| point());
}

/// An event that was published, or heard: its id and data.
type Heard = (Id, String);

/// Publishes so many events to topic `a`, with a pause after each. Returns those that were published.
fn publisher(server: &Handle, name: &'static str, count: usize, pause: Duration) -> JoinHandle<Vec<Heard>> {
    let hub = server.hub();
    let publish = move |n: usize| {
        let data = format!("{name} {n}");
        let id = hub.publish("a", Event::new(&data)).ok()?;
        thread::sleep(pause);
        Some((id, data))
    };
    spawn("publisher", move || (0..count).map_while(publish).collect())
}

/// What a subscriber has read.
#[derive(Default)]
struct Seen {
    bytes: Vec<u8>,
}

/// One block of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Block {
    id: Option<Id>,
    name: Option<String>,
    data: Option<String>,
}

impl Seen {
    /// Reads on, so much at a time, until so many events with data have come, or the stream has ended.
    fn read(&mut self, peer: &Peer, at_once: usize, events: usize) {
        while self.events().len() < events && self.read_some(peer, at_once) {}
    }

    /// False where the stream has ended.
    fn read_some(&mut self, peer: &Peer, at_once: usize) -> bool {
        peer.take(at_once).map(|bytes| self.bytes.extend(bytes)).is_some()
    }

    /// The body without its chunks. What is not whole is left out.
    fn body(&self) -> String {
        let text = std::str::from_utf8(&self.bytes).unwrap();
        let Some((head, mut rest)) = text.split_once("\r\n\r\n") else { return String::new() };
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("Transfer-Encoding: chunked"), "{head}");
        let mut body = String::new();
        while let Some((size, chunk)) = rest.split_once("\r\n") {
            let Ok(size) = usize::from_str_radix(size, 16) else { panic!("no size of a chunk: {size:?} in {text:?}") };
            let Some(end) = chunk.get(size..size + 2) else { break };
            assert_eq!(end, "\r\n", "a chunk's end in {text:?}");
            body += &chunk[..size];
            rest = &chunk[size + 2..];
        }
        body
    }

    fn blocks(&self) -> Vec<Block> {
        let body = self.body();
        let whole = body.rfind("\n\n").map_or("", |end| &body[..end]);
        whole.split("\n\n").map(block).collect()
    }

    /// The blocks that a page hears of.
    fn events(&self) -> Vec<Block> {
        self.blocks().into_iter().filter(|block| block.data.is_some()).collect()
    }

    /// The events, of which none may say that there is a gap.
    fn heard(&self) -> Vec<Heard> {
        let heard = |event: Block| {
            assert_eq!(event.name, None, "{:?}", self.body());
            (event.id.expect("an event has an id"), event.data.unwrap_or_default())
        };
        self.events().into_iter().map(heard).collect()
    }
}

fn block(text: &str) -> Block {
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let own = |name| value(name).map(String::from);
    Block { id: value("id").map(|id| id.parse().unwrap()), name: own("event"), data: own("data") }
}
