//! Many servers, one order: topics that outgrow a machine go through a Redis (or Valkey) stream.
//!
//! One stream for all topics numbers the events, keeps them, and brings them to every server: whatever is published on
//! one of them is appended with `XADD`, and each server reads the stream on a connection of its own and shows what it
//! reads. So the ids are the same everywhere, and a client may come back to any server. 200 means that Redis has the
//! event.
//!
//! # Why nothing is missing without a word
//! Redis may lose what it had acknowledged: it was killed before it wrote, a replica took over that lacked the newest
//! entries, somebody flushed it or set it back. So beside the stream stands who has it: the `run_id` of the Redis
//! process, a random epoch, and the id of a *mark*, which is an entry of the stream that says "anything before this may
//! be missing".
//! 1. Whoever connects compares the `run_id`, before it reads or publishes, and where it differs sets a new epoch and a
//!    mark, in one script ([`JOIN`]). So after each restart and fail-over there is a mark before the first new event,
//!    in the stream itself, where servers find it that were not there at the time.
//! 2. A mark is above every id that its server has seen, so ids never go back, though the stream that is left may be
//!    older.
//! 3. After each read the reader looks whether the entry that it had read last is still there ([`CHECK`]). Trimming
//!    goes from the oldest on, so if it is, nothing behind it was missed. If it is not, but later ones are, those in
//!    between may be trimmed: a gap. If nothing later is there, either, the stream was flushed or set back: a new epoch
//!    and a mark.
//! 4. An epoch that another server has set is taken over if its mark is still to be read; a mark that is not above what
//!    was read belongs to a stream that has parted from the one that was read, so it needs another that is.
//! 5. `NOMKSTREAM`: nobody publishes into a stream that was deleted, before there is a mark in it again.

use crate::redis_link::{Link, NEWEST, NONSENSE, REPLY_TIME, START_TIME, Session, lock, taken, text, words};
use crate::redis_reader::{TURN_TIME, follow, load};
use brooklet::{Engine, Entry, Feed, Id};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use redis::{Cmd, Value};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

/// What `--help` says of this room's flags.
pub const HELP: &str = "
  --redis URL            none            share topics with other servers by this
                                         Redis: redis://:PASSWORD@HOST:6379/0,
                                         rediss:// for TLS; or @FILE with it
  --redis-stream NAME    brooklet        the key of the stream in Redis
  --redis-length N       100000          newest events that Redis keeps, of all
                                         topics together
";

/// How long a publisher waits for Redis, so that stopping the server stays quick; the server allows half a second.
const PATIENCE: Duration = Duration::from_millis(450);
const _: () = assert!(REPLY_TIME.as_millis() < PATIENCE.as_millis() && PATIENCE.as_millis() < 500);
/// What is sent to Redis in one go: publishers that come at the same time share the way.
const BATCH_BYTES: usize = 1024 * 1024;
/// After so much silence the publisher looks whether its connection is still there: what closes idle ones on the way
/// would else be noticed by an event of which nobody knows whether it was published.
const IDLE_TIME: Duration = Duration::from_secs(10);
/// Publishers that wait their turn; the server's `--connections` bounds them, too.
const QUEUED_JOBS: usize = 1024;

/// Said where nobody knows.
const UNKNOWN: &str = "Redis has not answered: it may be published, or not; publish it again with the same key";

/// The engine of the command. Its threads end with the server that it feeds, or the process.
pub struct Redis {
    link: Arc<Link>,
    jobs: Sender<Job>,
}

/// A publisher that waits, or somebody who asks for the newest id.
struct Job {
    /// The command, as it is sent.
    bytes: Vec<u8>,
    /// How many ids are expected.
    count: usize,
    /// Whether they are ids of new events, but for those whose key was published before.
    is_new: bool,
    /// Whoever takes it decides: the thread that sends it, or the publisher who gives up before it was sent.
    taken: Arc<AtomicBool>,
    reply: Sender<Result<Vec<Id>, String>>,
}

impl Redis {
    /// Connects, and starts the thread that publishes.
    ///
    /// # Errors
    /// Redis cannot be used: why, without the password that the URL may hold.
    pub fn connect(link: Link) -> Result<Redis, String> {
        let (link, (jobs, queue)) = (Arc::new(link), bounded(QUEUED_JOBS));
        let mut session = link
            .join(START_TIME)
            .map_err(|error| format!("the Redis at {} cannot be used: {error}", link.address()))?;
        session.wait = REPLY_TIME;
        let mut publisher = Publisher { link: link.clone(), session: Some(session) };
        spawn("redis publish", move || publisher.work(&queue)).map_err(|error| error.to_string())?;
        Ok(Redis { link, jobs })
    }

    /// Shows the server what is kept, and starts the thread that shows it what comes.
    ///
    /// # Errors
    /// Redis cannot be read.
    pub fn feed(&self, feed: Feed) -> Result<(), String> {
        let link = self.link.clone();
        let mut session = link.join(START_TIME)?;
        let position = load(&link, &mut session, &feed)?;
        session.wait = TURN_TIME;
        spawn("redis read", move || follow(&link, session, position, &feed)).map_err(|error| error.to_string())
    }

    /// Has the publishing thread send a command, and waits for its reply.
    fn ask(&self, command: Cmd, count: usize, is_new: bool) -> io::Result<Vec<Id>> {
        let deadline = Instant::now() + PATIENCE;
        let (reply, replied) = bounded(1);
        let taken = Arc::new(AtomicBool::new(false));
        let job = Job { bytes: command.get_packed_command(), count, is_new, taken: taken.clone(), reply };
        let is_queued = self.jobs.send_deadline(job, deadline).is_ok();
        match replied.recv_deadline(deadline) {
            Ok(answer) => answer.map_err(io::Error::other),
            // Whoever gives up first is sure that it is never sent.
            Err(_) if !is_queued || !taken.swap(true, SeqCst) => {
                Err(io::Error::other("Redis does not answer: nothing was published; try again"))
            }
            Err(_) => Err(io::Error::other(UNKNOWN)),
        }
    }
}

impl Engine for Redis {
    fn publish(&self, entries: &[Entry]) -> io::Result<Vec<Id>> {
        self.ask(self.link.append(entries), entries.len(), true)
    }

    fn newest(&self) -> io::Result<Id> {
        Ok(self.ask(self.link.script(NEWEST), 1, false)?[0])
    }
}

/// The thread that publishes.
struct Publisher {
    link: Arc<Link>,
    session: Option<Session>,
}

impl Publisher {
    fn work(&mut self, queue: &Receiver<Job>) {
        loop {
            let first = match queue.recv_timeout(IDLE_TIME) {
                Ok(job) => job,
                Err(RecvTimeoutError::Timeout) => {
                    let lost = |session: &mut Session| session.one(&redis::cmd("PING")).is_err();
                    self.session.take_if(lost);
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let (mut size, mut jobs) = (first.bytes.len(), vec![first]);
            while size < BATCH_BYTES
                && let Ok(job) = queue.try_recv()
            {
                size += job.bytes.len();
                jobs.push(job);
            }
            let left = self.send(jobs, true);
            self.send(left, false);
        }
    }

    /// Sends what the jobs ask. Returns those whose stream was gone, so that nothing was published.
    fn send(&mut self, mut jobs: Vec<Job>, is_first: bool) -> Vec<Job> {
        if jobs.is_empty() {
            return jobs;
        }
        let outages = self.link.outages.load(SeqCst);
        let session = self.session.take().filter(|session| session.outages == outages);
        let mut session = match session.map_or_else(|| self.link.join(REPLY_TIME), Ok) {
            Ok(session) => session,
            Err(why) => {
                let refuse = |job: Job| job.reply.send(Err(format!("Redis is away, so nothing was published: {why}")));
                jobs.into_iter().for_each(|job| drop(refuse(job)));
                return Vec::new();
            }
        };
        jobs.retain(|job| !is_first || !job.taken.swap(true, SeqCst)); // or its publisher has given up
        let bytes: Vec<u8> = jobs.iter().flat_map(|job| job.bytes.iter().copied()).collect();
        let (count, seen) = (jobs.len(), *lock(&self.link.seen));
        let (mut jobs, mut gone, mut is_fit) = (jobs.into_iter(), Vec::new(), true);
        let sent = session.send(&bytes, count, |reply| {
            let Some(job) = jobs.next() else { return };
            is_fit &= !matches!(reply, Value::ServerError(_) | Value::Nil);
            match reply {
                Value::Nil if is_first => gone.push(job),
                reply => drop(job.reply.send(job.ids_of(reply, &self.link, seen))),
            }
        });
        jobs.for_each(|job| drop(job.reply.send(Err(UNKNOWN.into()))));
        // A stream that is gone is made anew by joining; and a Redis that refuses may have become a replica.
        self.session = Some(session).filter(|_| sent.is_ok() && is_fit);
        gone
    }
}

impl Job {
    /// The ids that a reply holds, one for each entry.
    fn ids_of(&self, reply: Value, link: &Link, seen: Id) -> Result<Vec<Id>, String> {
        let ids = match reply {
            Value::ServerError(_) => return Err(format!("Redis refuses it: {}", taken(reply).unwrap_err())),
            Value::Nil => return Err("the stream in Redis is gone: nothing was published; try again".into()),
            Value::Array(ids) => ids,
            one => vec![one],
        };
        let ids: Vec<(Id, bool)> = ids.into_iter().map(placed).collect::<Result<_, _>>()?;
        if ids.len() != self.count {
            return Err(NONSENSE.into());
        } else if self.is_new && ids.iter().any(|(id, is_new)| *is_new && *id <= seen) {
            // Set back since the reader has looked: nobody will be shown this one.
            return Err(format!("the stream in Redis was set back, and {UNKNOWN}"));
        }
        let ids: Vec<Id> = ids.into_iter().map(|(id, _)| id).collect();
        ids.iter().for_each(|id| link.see(*id));
        Ok(ids)
    }
}

/// The id in a reply, and whether it is a new one.
fn placed(reply: Value) -> Result<(Id, bool), String> {
    let text = text(reply)?;
    let (id, is_new) = text.strip_prefix('=').map_or((text.as_str(), true), |id| (id, false));
    Ok((id.parse().map_err(words)?, is_new))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).spawn(work).map(drop)
}
