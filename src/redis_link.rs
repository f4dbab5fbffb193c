//! One Redis and its stream: connecting, joining, and what is sent.
//!
//! Whatever must not be torn apart is a script, since Redis runs a script as one step. They are sent with their text,
//! which Redis knows by then, so nobody has to find out whether it does. Every wait has a bound. Errors are words: what
//! happens next never depends on which error it was, but for a refusal (nothing was done) and a connection that is lost
//! (nobody knows). The URL is in none of them, since it may hold a password.

use brooklet::{Entry, Id};
use redis::{
    Client, Cmd, Connection, ConnectionInfo, ErrorKind, IntoConnectionInfo, ProtocolVersion, RedisError, Value,
};
use std::fmt::Display;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the threads here wait for one reply.
pub const REPLY_TIME: Duration = Duration::from_millis(400);
/// How long a start waits for each reply: nobody waits for it yet, and a busy Redis is no reason to fail.
pub const START_TIME: Duration = Duration::from_secs(5);
/// How long a connection is waited for, which with TLS takes several ways there and back.
const CONNECT_TIME: Duration = Duration::from_secs(1);
/// Keys are kept this long at most, in milliseconds: Redis takes no time that overflows its clock.
const LONGEST_MS: u128 = 10 * 365 * 24 * 3600 * 1000;

/// KEYS: the stream, what stands beside it. ARGV: `run_id`, a new epoch, the epoch that was found to be broken (or
/// none), the id above all that this server has seen, the length. Returns epoch and mark. The first `XADD` gives a mark
/// by Redis's clock, which nearly always is above what any server has seen; the second fails unless the first is not.
pub const JOIN: &str = "
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
pub const CHECK: &str = "
local known = redis.call('HMGET', KEYS[2], 'epoch', 'mark')
return {known[1] or '', known[2] or '', #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])}";

/// The id of the newest entry.
pub const NEWEST: &str = "
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
return newest and newest[1]";

/// Appends entries that follow one another. KEYS: the stream; then for a keyed entry, where its key is kept and when
/// its topic was last forgotten; for one that forgets, the latter. ARGV: the length, how long keys are kept in ms; then
/// for each entry its kind, the number of its fields, and these. What a key's first event got is kept with what was
/// forgotten by then: once the topic is forgotten, they differ, and the key counts no more. So the latter is kept for
/// as long as the newest key. Returns the ids; that of an earlier event, whose key it was, stands behind a `=`.
pub const APPEND: &str = "
local ids, arg, key = {}, 3, 2
while ARGV[arg] do
  local kind, count = ARGV[arg], tonumber(ARGV[arg + 1])
  local first, forgotten = nil, nil
  if kind == 'keyed' then
    local id, at = string.match(redis.call('GET', KEYS[key]) or '', '^(%S+) (.*)$')
    forgotten = redis.call('GET', KEYS[key + 1]) or ''
    if at == forgotten then first = '=' .. id end
  end
  if not first then
    first = redis.call('XADD', KEYS[1], 'NOMKSTREAM', 'MAXLEN', '~', ARGV[1], '*', unpack(ARGV, arg + 2, arg + 1 + count))
    if not first then return false end
    if kind == 'keyed' then
      redis.call('SET', KEYS[key], first .. ' ' .. forgotten, 'PX', ARGV[2])
      if forgotten ~= '' then redis.call('SET', KEYS[key + 1], forgotten, 'PX', ARGV[2]) end
    elseif kind == 'forget' then
      redis.call('SET', KEYS[key], first, 'PX', ARGV[2])
    end
  end
  key = key + (kind == 'keyed' and 2 or kind == 'forget' and 1 or 0)
  arg = arg + 2 + count
  ids[#ids + 1] = first
end
return ids";

/// How to reach the stream, and what is known of it.
pub struct Link {
    pub client: Client,
    pub stream: String,
    pub beside: String,
    pub length: usize,
    pub keep_ms: u64,
    /// The highest id that this server has seen: read, or been given.
    pub seen: Mutex<Id>,
    /// How often the reader has lost Redis. The publisher's connection is lost then, too, though it may not know yet.
    pub outages: AtomicUsize,
}

/// A connection that has joined: there is a mark for this Redis process in the stream.
pub struct Session {
    connection: Connection,
    /// How long each reply is waited for.
    pub wait: Duration,
    /// Of [`Link::outages`], when it was made.
    pub outages: usize,
    run: String,
    pub epoch: String,
}

impl Link {
    /// # Errors
    /// The URL is none.
    pub fn new(url: &str, stream: &str, length: usize, keep_age: Duration) -> Result<Link, String> {
        let info = url.into_connection_info().map_err(|error| {
            format!("{}: write redis://:PASSWORD@HOST:6379/0, or rediss:// for TLS", reason(&error))
        })?;
        let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP2).set_skip_set_lib_name();
        let info: ConnectionInfo = info.set_redis_settings(redis);
        Ok(Link {
            client: Client::open(info).map_err(|error| reason(&error))?,
            stream: stream.into(),
            beside: format!("{{{}}}:epoch", stream),
            length,
            keep_ms: keep_age.as_millis().clamp(1, LONGEST_MS) as u64,
            seen: Mutex::default(),
            outages: AtomicUsize::new(0),
        })
    }

    /// Without the user and the password.
    pub fn address(&self) -> String {
        self.client.get_connection_info().addr().to_string()
    }

    /// Connects and joins. Each reply is waited for so long, here and from then on.
    ///
    /// # Errors
    /// The reason in words.
    pub fn join(&self, wait: Duration) -> Result<Session, String> {
        let time = wait.max(CONNECT_TIME);
        let connection = self.client.get_connection_with_timeout(time).map_err(|error| reason(&error))?;
        let outages = self.outages.load(SeqCst);
        let mut session = Session { connection, wait: time, outages, run: String::new(), epoch: String::new() };
        let mut commands = [redis::cmd("INFO"), redis::cmd("INFO")];
        commands[0].arg("server");
        commands[1].arg("replication");
        let info = session.ask(&commands)?;
        session.wait = wait;
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
    pub fn settle(&self, session: &mut Session, broken: &str) -> Result<(), String> {
        let epoch = format!("{:016x}", RandomState::new().hash_one(0));
        let seen = *lock(&self.seen);
        let above = match seen.seq.checked_add(1) {
            Some(seq) => Id { ms: seen.ms, seq },
            None => Id { ms: seen.ms.saturating_add(1), seq: 0 },
        };
        let mut command = self.script(JOIN);
        command.arg(&session.run).arg(epoch).arg(broken).arg(above.to_string()).arg(self.length);
        let settled = list(taken(session.one(&command)?)?)?;
        session.epoch = settled.into_iter().next().map_or_else(|| Err(NONSENSE.into()), text)?;
        Ok(())
    }

    pub fn script(&self, script: &str) -> Cmd {
        let mut command = redis::cmd("EVAL");
        command.arg(script).arg(2).arg(&self.stream).arg(&self.beside);
        command
    }

    /// A single event without a key is the common case, and needs no script.
    pub fn append(&self, entries: &[Entry]) -> Cmd {
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

    pub fn see(&self, id: Id) {
        let mut seen = lock(&self.seen);
        *seen = id.max(*seen);
    }
}

impl Session {
    /// Sends commands in one go. A reply may be an error of the one command.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub fn ask(&mut self, commands: &[Cmd]) -> Result<Vec<Value>, String> {
        let bytes: Vec<u8> = commands.iter().flat_map(Cmd::get_packed_command).collect();
        let mut replies = Vec::new();
        self.send(&bytes, commands.len(), |reply| replies.push(reply)).map(|()| replies)
    }

    pub fn one(&mut self, command: &Cmd) -> Result<Value, String> {
        self.ask(std::slice::from_ref(command))?.pop().ok_or_else(|| NONSENSE.into())
    }

    /// Gives each reply to `take` as it comes, so that those before an error count. (The package's own pipelines wait
    /// for every single reply of a connection that is silent.)
    pub fn send(&mut self, bytes: &[u8], count: usize, mut take: impl FnMut(Value)) -> Result<(), String> {
        let lost = |error| reason(&error);
        let deadline = Instant::now() + self.wait;
        self.connection.set_write_timeout(Some(self.wait)).map_err(lost)?;
        self.connection.set_read_timeout(Some(self.wait)).map_err(lost)?;
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

pub const NONSENSE: &str = "it answers what is not understood";

/// A reply, or the error that Redis gave for it.
pub fn taken(reply: Value) -> Result<Value, String> {
    match reply {
        Value::ServerError(error) => Err(reason(&error.into())),
        reply => Ok(reply),
    }
}

pub fn list(value: Value) -> Result<Vec<Value>, String> {
    if let Value::Array(values) = value { Ok(values) } else { Err(NONSENSE.into()) }
}

pub fn text(value: Value) -> Result<String, String> {
    let bytes = match value {
        Value::BulkString(bytes) => bytes,
        Value::SimpleString(text) => return Ok(text),
        _ => return Err(NONSENSE.into()),
    };
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8".into())
}

pub fn id(value: Value) -> Result<Id, String> {
    text(value)?.parse().map_err(words)
}

/// An error of Redis or of the way to it, in words. The URL is not in it, which may hold a password.
pub fn reason(error: &RedisError) -> String {
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

pub fn words(error: impl Display) -> String {
    error.to_string()
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
