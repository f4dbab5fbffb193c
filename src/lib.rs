//! brooklet: a Server-Sent Events server on blocking threads and the standard library.
//!
//! # Five lines
//! ```
//! # fn main() -> std::io::Result<()> {
//! use brooklet::{Config, Event, Server};
//!
//! let server = Server::bind("127.0.0.1:0", Config::default())?.spawn()?; // port 0: any free one
//! let id = server.hub().publish("news", Event::new("hello"))?;
//! println!("curl -N http://{}/events/news?since=earliest   # begins with {id}", server.addr()?);
//! # Ok(()) }
//! ```
//! Dropping what [`Server::spawn`] returns stops everything; [`Server::run`] serves until the process ends.
//!
//! # In a program
//! A program adds [routes](Server::route), which see a [request](Request) first and then [answer](Answer) it, open a
//! [stream](Request::stream), or let the page [follow](Request::follow) topics; [pages](Server::page) and
//! [streams](Server::stream) are the short forms. It [subscribes](Hub::subscribe) in itself, reads what is
//! [kept](Hub::kept), sees the [topics](Hub::topics), and is told [who comes and goes](Server::on_subscription). Every
//! limit is a field of [`Config`]. `tests/embed` has three programs of about 60 lines: a job queue, a chat, a
//! dashboard.
//!
//! ```
//! # fn main() -> std::io::Result<()> {
//! # use brooklet::{Answer, Config, Event, Server};
//! # let server = Server::bind("127.0.0.1:0", Config::default())?;
//! server.route("GET /inbox", |request| match request.cookie("user") {
//!     Some(user) => request.follow([format!("user-{user}")]), // a real program checks a session here
//!     None => Ok(Answer::text(401, "log in first")),
//! })?;
//! server.route("POST /tell/", |request| {
//!     let id = request.hub().publish(&format!("user-{}", request.rest()), Event::new(request.text()?))?;
//!     Ok(Answer::text(200, id))
//! })?;
//! # Ok(()) }
//! ```
//!
//! # The idea: a live subscriber is never waited for
//! Server-Sent Events go one way. Once its request is read, a subscriber sends nothing, so there is nothing to wait
//! for: a write to it succeeds, would block, or fails. So who has everything needs no thread, and is written to by a
//! lane with many others; only who must be waited for has a thread:
//!
//! ```text
//!                 publish: number it, keep it, hand it to every lane (crossbeam channel, bounded)
//!                                       │
//!   ┌───────────────────────────────────┴───────────────────────┐
//!   ▼ lane thread (one for two cores)                            ▼ kept events (of each topic)
//!  LIVE: one non-blocking write of the encoded bytes            BEHIND: replays everything after its cursor,
//!  straight into the socket; no thread                          on a thread of the pool
//!   ├── would block ──▶ QUEUED for a thread ──▶ BEHIND           │
//!   │                          ◀── others need the thread ──────┤
//!   │  LIVE ◀────────────────────── nothing newer is kept ───────┘
//!   └── failed ──▶ CLOSED: the clerk notes its end
//! ```
//!
//! Connecting, resuming and being slow are the same thing, *being behind*, and have one code path. No thread is woken
//! to deliver an event, which would cost several times the write itself. Whose a subscriber is, and why no event is
//! lost or repeated when it changes hands, is shown in `subscription.rs`.
//!
//! # Beyond one machine
//! Servers that share their topics need one order over all events, so that a client resumes on any of them. An
//! [`Engine`] gives it: it numbers what is published, and shows it to every server through a [`Feed`]. The command has
//! one for Redis.
//!
//! # The house
//! Each room has one idea, which its first paragraph says, and uses only rooms that stand below it in this list. One
//! event's way goes down through them once: `routes` → `publishing` → `hub` → `journal` → `history` → `lane` →
//! `connection`. A stream's way is `conversation` → `routes` (what is wanted) → `subscription`, then `cursor` while it
//! is behind and `lane` while it is live, both through `connection`; from its lane it comes back by way of the `desk`
//! and the `clerk`. What is `pub` in a room is for the rooms above it; what is for the world is named at the end of
//! this file. A `Connection` is called `c`.
//!
//! # Where a change goes
//! *A parameter of a stream* is named and read in `wanted`. Where the stream starts is decided in `cursor`; when it
//! ends, in `subscription` (`Served::step`); what its events look like, in `form`. Live or behind, the events of its
//! topics are written by `Connection::deliver`, or by `Connection::finish` where one fitted only in part.
//!
//! *Another kind of storage* replaces `journal`, which only `hub`, `tending`, `unwritten` and `kept` name; `kept`
//! stands between its blocks and the history. One that numbers events itself is an [`Engine`]: `Core::publish_outside`
//! asks it, and its [`Feed`] gives what comes back to `Core::hand_out`, which only demands that ids rise. That an id
//! has a time of this server's clock in it, and a position just before it, is relied on in `cursor`; when the process
//! starts, also in `kept` (`recover`) and `history` (`restore`).
//!
//! # Locks, outermost first
//! | lock | held | guards |
//! |---|---|---|
//! | the order, in `hub` | from numbering an event to the last lane's queue; with a journal twice, to number it and to hand it out, but not while it is written | that ids, kept events, queues have one order; whose turn the journal is |
//! | the history, in `hub` | shortly; never during I/O once others may look at it | the kept events and the table of topics |
//! | the state, in `connection` | during one non-blocking write | whose the socket is, and the cursor |
//! | the bells, in `bell` | shortly, under the order lock or alone | who in the program waits for which topic |
//! | the changes, in `lane`, the papers, in `desk`, and the begun events, in `hub` | shortly, and nothing is locked under them | who joins and leaves a lane; whom lanes let go; the bytes that slow readers share |
//! | the tables, in `places` and `routes`, the lines, in `pool`, the queue, in `presence`, and the reserve, in `system` | shortly, under no other lock | which connections are open; what is at a path; who waits for a thread; what the program's hook is still to hear; the address space that is held back |
//! | the rights, in `door` | shortly, and nothing is locked under it | what the tokens' file says |
//! | the date of now, in `clock` | shortly, and nothing is locked under it | one line of every response |
//!
//! No lock is held while waiting for a peer. A panic under a lock does not take the others along: they enter the
//! poisoned lock, since every update here leaves its data whole.
//!
//! # For those new to threads in Rust
//! An `Arc<T>` is a value with several owners, counted. A `Mutex<T>` holds a value that one thread at a time may touch:
//! `enter(&mutex)` waits for its turn and returns a guard, through which the value is reached; the lock is free again
//! when the guard goes out of scope or is given to `drop`. To wait on a `Condvar` frees the lock, sleeps until another
//! thread notifies, and takes the lock again. An `Atomic…` is a number that needs no lock. A channel is a queue between
//! threads; `bounded` ones let the sender wait while they are full.
//!
//! # Not for
//! Two-way traffic (use WebSockets), TLS (put a proxy before it), events that need a database's queries.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

#[cfg(shuttle)] // `make model`: locks, threads, time and sockets that run in many orders
extern crate model_std as std;

mod program; // what a program adds to its server
mod stopping; // how a server stops
mod server; // bind, start, accept
mod tokens; // the tokens' file, and whose right is gone
mod clerk; // what lanes and acceptors may not do, since they never wait
mod conversation; // one connection's requests, one after another
mod routes; // what each request gets
mod publishing; // POST, PUT, DELETE
mod handler; // a program's route: its handler, and what it answers
mod subscription; // a stream of topics: opened, replayed, ended
mod wanted; // what a request for one asks for
mod stream; // a handler's stream
mod asked; // what a program's route sees of a request
mod follower; // subscribing in the program
mod shelf; // what a program asks of its hub
mod feed; // what an engine shows to its server
mod tending; // the journal's own thread
mod hub; // publishing: number, write down, hand out
mod bell; // wakes those in the program who wait for a topic
mod presence; // tells the program of subscribers that come and go
mod unwritten; // what waits for the journal, and whose turn it is
mod kept; // between the journal's blocks and the history
mod journal; // the file that outlives the process
mod rewrite; // the new file that takes its place
mod watch; // whether the file still has its name
mod locked; // whose a file is
mod recovery; // reading the journal at the start
mod block; // what it is made of
mod cursor; // where a stream starts, what comes next, gaps
mod history; // kept events, and what was forgotten
mod store; // the kept events of all topics: memory, keys
mod entry; // a kept event in its cells
mod cells; // where the bytes of all of them are
mod lane; // writing to whoever is live
mod door; // who may do what: hosts, origins, tokens
mod engine; // what gives several servers one order
mod relay; // the events of a PUT, where it is an event stream
mod lines; // its lines, where it is none
mod parser; // an event stream, read as the standard says
mod request; // a request's head, read strictly
mod target; // its path and query
mod body; // its body, of a length or in chunks
mod reader; // what came on a connection and is not used yet
mod response; // what is answered
mod places; // who is here, and who makes room
mod pool; // threads for those who must be waited for
mod desk; // what waits for the clerk
mod connection; // one socket, and whose it is
mod outgoing; // what is on its way out, and how much of it is out
mod subscriber; // what a subscriber follows, while nobody serves it
mod encoded; // an event's bytes, shared by all who get it
mod form; // what scripts read instead of an event stream
mod system; // what the system allows
mod rights; // which token may do what
mod names; // what topics may be called
mod log; // its lines
mod metrics; // what is counted
mod event; // Event, Id, and their bytes
mod config; // every limit
mod clock; // the date, ids' milliseconds, spread times
mod sync; // locks that outlive a panic, threads
mod authority; // hosts and ports
mod text; // durations, quoting

pub use asked::Request;
pub use config::{Config, Log, LogTo, Token};
pub use crossbeam_channel;
pub use engine::{Engine, Entry};
pub use event::{Event, Id};
pub use feed::Feed;
pub use follower::{Follower, News, Since};
pub use handler::Answer;
pub use history::TopicOverview;
pub use hub::Hub;
pub use presence::Presence;
pub use server::{Handle, Server};
pub use shelf::Published;
pub use stream::Stream;
pub use text::parse_duration;

#[cfg(fuzzing)]
#[path = "../tests/fuzz/reach.rs"]
pub mod fuzzing;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {} // its Rust must compile

#[cfg(all(test, not(shuttle)))]
#[path = "../tests/turn.rs"]
mod turn;

#[cfg(any(test, fuzzing))]
#[path = "../tests/parser.rs"]
mod parsing;

#[cfg(test)]
#[path = "../tests/cells.rs"]
mod cells_test;

#[cfg(all(test, not(shuttle)))]
#[path = "../tests/expiry.rs"]
mod expiry;

#[cfg(all(test, shuttle))]
#[path = "../tests/model/mod.rs"]
mod model;
