//! Many servers, one order: topics that outgrow a machine go through a Redis (or Valkey) stream.
//!
//! One stream for all topics numbers the events, keeps them, and brings them to every server: whatever is published on
//! one of them is appended with `XADD`, and each server reads the stream on a connection of its own and shows what it
//! reads. So the ids are the same everywhere, and a client may come back to any server. 200 means that Redis has the event.
//!
//! # Why nothing is missing without a word
//! Redis may lose what it had acknowledged: it was killed before it wrote, a replica took over that lacked the newest
//! entries, somebody flushed it or set it back. So beside the stream stands who has it: the `run_id` of the Redis process,
//! a random epoch, and the id of a *mark*, which is an entry of the stream that says "anything before this may be missing".
//! 1. Whoever connects compares the `run_id`, before it reads or publishes, and where it differs sets a new epoch and a
//!    mark, in one script ([`JOIN`]). So after each restart and fail-over there is a mark before the first new event, in
//!    the stream itself, where servers find it that were not there at the time.
//! 2. A mark is above every id that its server has seen, so ids never go back, though the stream that is left may be older.
//! 3. After each read the reader looks whether the entry that it had read last is still there ([`CHECK`]). Trimming goes
//!    from the oldest on, so if it is, nothing behind it was missed. If it is not, but later ones are, those in between
//!    may be trimmed: a gap. If nothing later is there, either, the stream was flushed or set back: a new epoch and a mark.
//! 4. An epoch that another server has set is taken over if its mark is still to be read; a mark that is not above what
//!    was read belongs to a stream that has parted from the one that was read, so it needs another that is.
//! 5. `NOMKSTREAM`: nobody publishes into a stream that was deleted, before there is a mark in it again.

use brooklet::{Engine, Entry, Feed, Id};
use crossbeam_channel::{Receiver, Sender, bounded};
use redis::{
    Client, Cmd, Connection, ConnectionInfo, ErrorKind, IntoConnectionInfo, ProtocolVersion, RedisError, Value,
};
use std::fmt::Display;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

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
/// How long the threads here wait for one reply.
const REPLY_TIME: Duration = Duration::from_millis(400);
const _: () = assert!(REPLY_TIME.as_millis() < PATIENCE.as_millis() && PATIENCE.as_millis() < 500);
/// How long the reader waits in Redis for the next event. Then it looks whether the stream is still the one it was, which
/// is how soon a flush is noticed on which nothing follows.
const BLOCK_TIME: Duration = Duration::from_millis(300);
/// Between two tries to reach a Redis that is away: doubled from the first to the second.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// Entries of one read, so that they take some megabytes of memory at most.
const READ_COUNT: usize = 128;
/// What is sent to Redis in one go: publishers that come at the same time share the way.
const BATCH_BYTES: usize = 1024 * 1024;
/// Publishers that wait their turn; the server's `--connections` bounds them, too.
const QUEUED_JOBS: usize = 1024;
/// Keys are kept this long at most, in milliseconds: Redis takes no time that overflows its clock.
const LONGEST_MS: u128 = 10 * 365 * 24 * 3600 * 1000;

/// KEYS: the stream, what stands beside it. ARGV: `run_id`, a new epoch, the epoch that was found to be broken (or none),
/// the id above all that this server has seen, the length. Returns epoch and mark. The first `XADD` gives a mark by Redis's
/// clock, which nearly always is above what any server has seen; the second fails unless the first is not.
const JOIN: &str = "
local known = redis.call('HMGET', KEYS[2], 'run', 'epoch', 'mark')
if known[1] == ARGV[1] and known[2] ~= ARGV[3] and redis.call('EXISTS', KEYS[1]) == 1 then
  return {known[2], known[3]}
end
local mark = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[5], '*', 'gap', '')
local above = redis.pcall('XADD', KEYS[1], 'MAXLEN', '~', ARGV[5], ARGV[4], 'gap', '')
if type(above) == 'string' then mark = above end
redis.call('HSET', KEYS[2], 'run', ARGV[1], 'epoch', ARGV[2], 'mark', mark)
return {ARGV[2], mark}";

/// KEYS as above; ARGV: the id of an entry. Returns epoch, mark, and whether the entry is there.
const CHECK: &str = "
local known = redis.call('HMGET', KEYS[2], 'epoch', 'mark')
return {known[1] or '', known[2] or '', #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])}";

/// The id of the newest entry.
const NEWEST: &str = "
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
return newest and newest[1]";

/// Appends entries that follow one another. KEYS: the stream; then for a keyed entry, where its key is kept and when its
/// topic was last forgotten; for one that forgets, the latter. ARGV: the length, how long keys are kept in ms; then for each
/// entry its kind, the number of its fields, and these. What a key's first event got is kept with what was forgotten by
/// then: once the topic is forgotten, they differ, and the key counts no more.
const APPEND: &str = "
local ids, arg, key = {}, 3, 2
while ARGV[arg] do
  local kind, count = ARGV[arg], tonumber(ARGV[arg + 1])
  local first = nil
  if kind == 'keyed' then
    local id, at = string.match(redis.call('GET', KEYS[key]) or '', '^(%S+) (.*)$')
    if at == (redis.call('GET', KEYS[key + 1]) or '') then first = id end
  end
  if not first then
    first = redis.call('XADD', KEYS[1], 'NOMKSTREAM', 'MAXLEN', '~', ARGV[1], '*', unpack(ARGV, arg + 2, arg + 1 + count))
    if not first then return false end
    if kind == 'keyed' then
      redis.call('SET', KEYS[key], first .. ' ' .. (redis.call('GET', KEYS[key + 1]) or ''), 'PX', ARGV[2])
    elseif kind == 'forget' then
      redis.call('SET', KEYS[key], first, 'PX', ARGV[2])
    end
  end
  key = key + (kind == 'keyed' and 2 or kind == 'forget' and 1 or 0)
  arg = arg + 2 + count
  ids[#ids + 1] = first
end
return ids";

/// The engine of the command. Its threads end with the server that it feeds, or the process.
pub struct Redis {
    link: Arc<Link>,
    jobs: Sender<Job>,
}

/// How to reach the stream, and what is known of it.
struct Link {
    client: Client,
    stream: String,
    beside: String,
    length: usize,
    keep_ms: u64,
    /// The highest id that this server has seen: read, or been given.
    seen: Mutex<Id>,
    /// How often the reader has lost Redis. The publisher's connection is lost then, too, though it may not know yet.
    outages: AtomicUsize,
}

/// A connection that has joined: there is a mark for this Redis process in the stream.
struct Session {
    connection: Connection,
    /// Of [`Link::outages`], when it was made.
    outages: usize,
    run: String,
    epoch: String,
}

/// Where the reader is: in which stream, and after which of its entries.
struct Position {
    epoch: String,
    cursor: Id,
}

/// A publisher that waits, or somebody who asks for the newest id.
struct Job {
    /// The command, as it is sent.
    bytes: Vec<u8>,
    /// How many ids are expected.
    count: usize,
    /// None of the ids can be that of an earlier event with the same key.
    must_rise: bool,
    /// Whoever takes it decides: the thread that sends it, or the publisher who gives up before it was sent.
    taken: Arc<AtomicBool>,
    reply: Sender<Result<Vec<Id>, String>>,
}

/// An entry of the stream as it was read. None where it is a mark; an error where it is nothing that we know.
type Read = (Id, io::Result<Option<Entry>>);

impl Redis {
    /// Connects, and starts the thread that publishes.
    ///
    /// # Errors
    /// Redis cannot be used: why, without the password that the URL may hold.
    pub fn connect(url: &str, stream: &str, length: usize, keep_age: Duration) -> Result<Redis, String> {
        let info = url.into_connection_info().map_err(|error| {
            format!("{}: write redis://:PASSWORD@HOST:6379/0, or rediss:// for TLS", reason(&error))
        })?;
        let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP2).set_skip_set_lib_name();
        let info: ConnectionInfo = info.set_redis_settings(redis);
        let address = info.addr().to_string();
        let link = Link {
            client: Client::open(info).map_err(|error| reason(&error))?,
            stream: stream.into(),
            beside: format!("{{{}}}:epoch", stream),
            length,
            keep_ms: keep_age.as_millis().clamp(1, LONGEST_MS) as u64,
            seen: Mutex::default(),
            outages: AtomicUsize::new(0),
        };
        let (link, (jobs, queue)) = (Arc::new(link), bounded(QUEUED_JOBS));
        let session = link.join().map_err(|error| format!("the Redis at {address} cannot be used: {error}"))?;
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
        let mut session = link.join()?;
        let position = load(&link, &mut session, &feed)?;
        spawn("redis read", move || follow(&link, session, position, &feed)).map_err(|error| error.to_string())
    }

    /// Has the publishing thread send a command, and waits for its reply.
    fn ask(&self, command: Cmd, count: usize, must_rise: bool) -> io::Result<Vec<Id>> {
        let deadline = Instant::now() + PATIENCE;
        let (reply, replied) = bounded(1);
        let taken = Arc::new(AtomicBool::new(false));
        let job = Job { bytes: command.get_packed_command(), count, must_rise, taken: taken.clone(), reply };
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

const UNKNOWN: &str = "Redis has not answered: it may be published, or not; publish it again with the same key";

impl Engine for Redis {
    fn publish(&self, entries: &[Entry]) -> io::Result<Vec<Id>> {
        let must_rise = entries.iter().all(|entry| entry.key().is_none());
        self.ask(self.link.append(entries), entries.len(), must_rise)
    }

    fn newest(&self) -> io::Result<Id> {
        Ok(self.ask(self.link.script(NEWEST), 1, false)?[0])
    }
}

impl Link {
    /// Connects and joins.
    ///
    /// # Errors
    /// The reason in words.
    fn join(&self) -> Result<Session, String> {
        let connection = self.client.get_connection_with_timeout(REPLY_TIME).map_err(|error| reason(&error))?;
        connection.set_write_timeout(Some(REPLY_TIME)).map_err(|error| reason(&error))?;
        let outages = self.outages.load(SeqCst);
        let mut session = Session { connection, outages, run: String::new(), epoch: String::new() };
        let mut commands = [redis::cmd("INFO"), redis::cmd("INFO")];
        commands[0].arg("server");
        commands[1].arg("replication");
        let info = session.ask(&commands, REPLY_TIME)?;
        let info: Vec<String> = info.into_iter().map(|part| text(taken(part)?)).collect::<Result<_, _>>()?;
        let field = |name: &str| {
            let line = info.iter().flat_map(|part| part.lines()).find_map(|line| line.strip_prefix(name));
            line.map(|value| value.trim().to_string()).ok_or(format!("it does not tell its {name}"))
        };
        if field("role:")? != "master" {
            return Err("it is a replica, which takes nothing: give the URL of the primary".into());
        }
        session.run = field("run_id:")?;
        self.settle(&mut session, "")?;
        Ok(session)
    }

    /// Sees to it that there is a mark for this Redis process, and for another epoch than the broken one.
    fn settle(&self, session: &mut Session, broken: &str) -> Result<(), String> {
        let epoch = format!("{:016x}", RandomState::new().hash_one(0));
        let seen = *lock(&self.seen);
        let above = match seen.seq.checked_add(1) {
            Some(seq) => Id { ms: seen.ms, seq },
            None => Id { ms: seen.ms.saturating_add(1), seq: 0 },
        };
        let mut command = self.script(JOIN);
        command.arg(&session.run).arg(epoch).arg(broken).arg(above.to_string()).arg(self.length);
        let settled = list(taken(session.one(&command, REPLY_TIME)?)?)?;
        session.epoch = settled.into_iter().next().map_or_else(|| Err(NONSENSE.into()), text)?;
        Ok(())
    }

    fn script(&self, script: &str) -> Cmd {
        let mut command = redis::cmd("EVAL");
        command.arg(script).arg(2).arg(&self.stream).arg(&self.beside);
        command
    }

    /// A single event without a key is the common case, and needs no script.
    fn append(&self, entries: &[Entry]) -> Cmd {
        if let [entry] = entries
            && entry.key().is_none()
            && !entry.is_forget()
        {
            let mut command = redis::cmd("XADD");
            command.arg(&self.stream).arg("NOMKSTREAM").arg("MAXLEN").arg("~").arg(self.length).arg("*");
            command.arg(entry.fields());
            return command;
        }
        let (mut keys, mut args) = (vec![self.stream.clone()], Vec::new());
        for entry in entries {
            // No topic has a slash in its name.
            let forgotten = format!("{{{}}}:forgotten/{}", self.stream, entry.topic());
            let kind = match entry.key() {
                Some(key) => {
                    keys.extend([format!("{{{}}}:key/{}/{key}", self.stream, entry.topic()), forgotten]);
                    "keyed"
                }
                None if entry.is_forget() => {
                    keys.push(forgotten);
                    "forget"
                }
                None => "plain",
            };
            let fields = entry.fields();
            args.extend([kind.to_string(), (2 * fields.len()).to_string()]);
            args.extend(fields.into_iter().flat_map(|(name, value)| [name.to_string(), value]));
        }
        let mut command = redis::cmd("EVAL");
        command.arg(APPEND).arg(keys.len()).arg(keys).arg(self.length).arg(self.keep_ms).arg(args);
        command
    }

    fn see(&self, id: Id) {
        let mut seen = lock(&self.seen);
        *seen = id.max(*seen);
    }
}

impl Session {
    /// Sends commands in one go. A reply may be an error of the one command.
    ///
    /// # Errors
    /// The connection is of no use any more.
    fn ask(&mut self, commands: &[Cmd], wait: Duration) -> Result<Vec<Value>, String> {
        let bytes: Vec<u8> = commands.iter().flat_map(Cmd::get_packed_command).collect();
        let mut replies = Vec::new();
        self.send(&bytes, commands.len(), wait, |reply| replies.push(reply)).map(|()| replies)
    }

    fn one(&mut self, command: &Cmd, wait: Duration) -> Result<Value, String> {
        self.ask(std::slice::from_ref(command), wait)?.pop().ok_or_else(|| NONSENSE.into())
    }

    /// Gives each reply to `take` as it comes, so that those before an error count. (The package's own pipelines wait for
    /// every single reply of a connection that is silent.)
    fn send(&mut self, bytes: &[u8], count: usize, wait: Duration, mut take: impl FnMut(Value)) -> Result<(), String> {
        let lost = |error| reason(&error);
        let deadline = Instant::now() + wait;
        self.connection.set_read_timeout(Some(wait)).map_err(lost)?;
        self.connection.send_packed_command(bytes).map_err(lost)?;
        for _ in 0..count {
            if Instant::now() > deadline {
                return Err("it is too slow".into());
            }
            take(self.connection.recv_response().map_err(lost)?);
        }
        Ok(())
    }
}

/// The thread that publishes.
struct Publisher {
    link: Arc<Link>,
    session: Option<Session>,
}

impl Publisher {
    fn work(&mut self, queue: &Receiver<Job>) {
        while let Ok(first) = queue.recv() {
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
        let mut session = match session.map_or_else(|| self.link.join(), Ok) {
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
        let sent = session.send(&bytes, count, REPLY_TIME, |reply| {
            let Some(job) = jobs.next() else { return };
            is_fit &= !matches!(reply, Value::ServerError(_) | Value::Nil);
            match reply {
                Value::Nil if is_first => gone.push(job),
                reply => drop(job.reply.send(self.link.ids_of(reply, &job, seen))),
            }
        });
        jobs.for_each(|job| drop(job.reply.send(Err(UNKNOWN.into()))));
        // A stream that is gone is made anew by joining; and a Redis that refuses may have become a replica.
        self.session = Some(session).filter(|_| sent.is_ok() && is_fit);
        gone
    }
}

impl Link {
    /// The ids that a reply holds, one for each entry.
    fn ids_of(&self, reply: Value, job: &Job, seen: Id) -> Result<Vec<Id>, String> {
        let ids = match reply {
            Value::ServerError(_) => Err(format!("Redis refuses it: {}", taken(reply).unwrap_err())),
            Value::Nil => Err("the stream in Redis is gone: nothing was published; try again".into()),
            Value::Array(ids) => ids.into_iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        }?;
        if ids.len() != job.count {
            return Err(NONSENSE.into());
        } else if job.must_rise && ids.iter().any(|id| *id <= seen) {
            // Set back since the reader has looked: nobody will be shown this one.
            return Err(format!("the stream in Redis was set back, and {UNKNOWN}"));
        }
        ids.iter().for_each(|id| self.see(*id));
        Ok(ids)
    }

    /// The entries of a range, from the oldest.
    fn range(&self, session: &mut Session, from: &str) -> Result<Vec<Read>, String> {
        let mut command = redis::cmd("XRANGE");
        command.arg(&self.stream).arg(from).arg("+").arg("COUNT").arg(READ_COUNT);
        entries(taken(session.one(&command, REPLY_TIME)?)?)
    }
}

/// Shows what is kept and not too old.
fn load(link: &Link, session: &mut Session, feed: &Feed) -> Result<Position, String> {
    let now = UNIX_EPOCH.elapsed().map_or(0, |time| time.as_millis() as u64);
    let mut from = format!("{}-0", now.saturating_sub(link.keep_ms));
    let mut cursor = None;
    loop {
        let read = link.range(session, &from)?;
        let is_last = read.len() < READ_COUNT;
        if let (None, Some((first, _))) = (cursor, read.first()) {
            feed.missing_up_to(before(*first)).map_err(words)?;
        }
        cursor = show(link, feed, read)?.or(cursor);
        match cursor {
            Some(id) if is_last => return Ok(Position { epoch: session.epoch.clone(), cursor: id }),
            Some(id) => from = format!("({id}"),
            // Nothing but what is too old, or nothing at all: a mark to begin with.
            None => {
                let broken = session.epoch.clone();
                link.settle(session, &broken)?;
            }
        }
    }
}

/// The reader, for as long as there is a server to feed.
fn follow(link: &Link, session: Session, mut at: Position, feed: &Feed) {
    let (mut session, mut away, mut pause) = (Some(session), None, FIRST_PAUSE);
    while !feed.is_over() {
        let turn = session.take().map_or_else(|| link.join(), Ok).and_then(|mut joined| {
            let turn = take_turn(link, &mut joined, &mut at, feed);
            turn.map(|()| joined)
        });
        match turn {
            Ok(joined) => {
                session = Some(joined);
                if let Some(since) = away.take().map(|since: Instant| since.elapsed()) {
                    feed.log(format_args!("Redis is back, after {:.1} s", since.as_secs_f64()));
                }
                pause = FIRST_PAUSE;
            }
            Err(why) => {
                link.outages.fetch_add(1, SeqCst);
                if away.is_none() && !feed.is_over() {
                    away = Some(Instant::now());
                    feed.log(format_args!("Redis is away: {why}; streams stay open, publishers are refused"));
                }
                thread::sleep(pause);
                pause = LAST_PAUSE.min(2 * pause);
            }
        }
    }
}

/// Waits for what comes next, makes sure that nothing is missing before it, and shows it.
fn take_turn(link: &Link, session: &mut Session, at: &mut Position, feed: &Feed) -> Result<(), String> {
    let cursor = at.cursor.to_string();
    let (mut read, mut check) = (redis::cmd("XREAD"), link.script(CHECK));
    read.arg("COUNT").arg(READ_COUNT).arg("BLOCK").arg(BLOCK_TIME.as_millis() as u64);
    read.arg("STREAMS").arg(&link.stream).arg(&cursor);
    check.arg(&cursor);
    let mut replies = session.ask(&[read, check], BLOCK_TIME + REPLY_TIME)?.into_iter();
    let mut next = || replies.next().ok_or(NONSENSE.to_string()).and_then(taken);
    let (read, check) = (streams(next()?)?, list(next()?)?);
    let [epoch, mark, Value::Int(is_here)] = <[Value; 3]>::try_from(check).map_err(|_| NONSENSE)? else {
        return Err(NONSENSE.into());
    };
    let (epoch, mark, is_here) = (text(epoch)?, text(mark)?.parse::<Id>().ok(), is_here > 0);
    let is_other = epoch != at.epoch;
    let has_parted = is_other && mark.is_none_or(|mark| mark <= at.cursor);
    let is_emptied = !is_other && !is_here && read.is_empty();
    if has_parted || is_emptied {
        // What was read may be of either stream. It is read again behind the mark, or before it, after a gap.
        feed.log("Redis has lost entries, or was set back: everyone hears a gap");
        link.settle(session, &epoch)?;
        at.epoch.clone_from(&session.epoch);
        return Ok(());
    }
    at.epoch = epoch;
    if let (false, Some((first, Err(_) | Ok(Some(_))))) = (is_here, read.first()) {
        feed.missing_up_to(before(*first)).map_err(words)?; // trimmed past us; a mark would say it itself
    }
    at.cursor = show(link, feed, read)?.unwrap_or(at.cursor);
    Ok(())
}

/// Shows entries in their order. Returns the last one's id.
fn show(link: &Link, feed: &Feed, read: Vec<Read>) -> Result<Option<Id>, String> {
    let mut last = None;
    for (id, entry) in read {
        link.see(id);
        last = Some(id);
        let shown = match entry {
            Ok(Some(entry)) => feed.show(id, entry),
            Ok(None) => feed.missing_up_to(id),
            Err(error) => Err(error),
        };
        match shown {
            Err(error) if error.kind() != io::ErrorKind::InvalidInput => return Err(words(error)),
            Err(error) => feed.log(format_args!("the entry {id} in Redis is passed over: {error}")),
            Ok(()) => {}
        }
    }
    Ok(last)
}

/// The position just before an id.
fn before(id: Id) -> Id {
    match id.seq.checked_sub(1) {
        Some(seq) => Id { ms: id.ms, seq },
        None => Id { ms: id.ms.saturating_sub(1), seq: u64::MAX },
    }
}

const NONSENSE: &str = "it answers what is not understood";

/// What `XREAD` found in the one stream; nothing where it has waited in vain.
fn streams(reply: Value) -> Result<Vec<Read>, String> {
    if reply == Value::Nil {
        return Ok(Vec::new());
    }
    let stream = list(reply)?.pop().map(list).ok_or(NONSENSE)??;
    entries(stream.into_iter().nth(1).ok_or(NONSENSE)?)
}

fn entries(reply: Value) -> Result<Vec<Read>, String> {
    let entry = |value| {
        let [at, fields] = <[Value; 2]>::try_from(list(value)?).map_err(|_| NONSENSE)?;
        let fields: Result<Vec<String>, String> = list(fields)?.into_iter().map(text).collect();
        Ok((id(at)?, fields.map_err(io::Error::other).and_then(read_entry)))
    };
    list(reply)?.into_iter().map(entry).collect()
}

fn read_entry(fields: Vec<String>) -> io::Result<Option<Entry>> {
    if fields.first().is_some_and(|name| name == "gap") {
        return Ok(None);
    }
    let pairs = fields.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone()));
    Entry::from_fields(pairs).map(Some)
}

/// A reply, or the error that Redis gave for it.
fn taken(reply: Value) -> Result<Value, String> {
    match reply {
        Value::ServerError(error) => Err(reason(&error.into())),
        reply => Ok(reply),
    }
}

fn list(value: Value) -> Result<Vec<Value>, String> {
    if let Value::Array(values) = value { Ok(values) } else { Err(NONSENSE.into()) }
}

fn text(value: Value) -> Result<String, String> {
    let bytes = match value {
        Value::BulkString(bytes) => bytes,
        Value::SimpleString(text) => return Ok(text),
        _ => return Err(NONSENSE.into()),
    };
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8".into())
}

fn id(value: Value) -> Result<Id, String> {
    text(value)?.parse().map_err(words)
}

/// An error of Redis or of the way to it, in words. The URL is not in it, which may hold a password.
fn reason(error: &RedisError) -> String {
    match (error.kind(), error.code(), error.detail()) {
        (ErrorKind::AuthenticationFailed, ..) => {
            "the user or the password of the URL is wrong, or Redis has none".into()
        }
        (_, Some("NOAUTH"), _) => "it wants a password: redis://:PASSWORD@HOST:6379/0".into(),
        (_, Some(code), Some(detail)) => format!("{code} {detail}"),
        _ if error.is_timeout() => "it does not answer".into(),
        _ => error.to_string(),
    }
}

fn words(error: impl Display) -> String {
    error.to_string()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).spawn(work).map(drop)
}
