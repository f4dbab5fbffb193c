//! Every limit that an operator may want to move, with its default and the reason for it.
//!
//! Whatever comes from outside has a bound: bytes, counts and waits. A limit that operators need is a field here and a
//! flag of the command; one that follows from the protocol or the design is a constant in the room that it binds.
//! [`Config::check`] rejects what makes no sense before anything else sees it, so the other rooms take every value as
//! sensible.

use crate::authority::{is_authority, split_port};
use crate::sync::call;
use crate::text::{LONGEST, invalid, quoted};
use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// How often a lane looks at its subscribers, so that a closed tab is noticed within two seconds. A look costs about
/// 0.7 µs: at 10,000 subscribers that is half a percent of a core.
pub const SWEEP: Duration = Duration::from_millis(1_750);
/// More than any machine has cores; each lane is a thread and wakes for every event.
const MOST_LANES: usize = 256;
/// With fewer there is no share for each kind of connection (`pool.rs`).
pub const FEWEST_THREADS: usize = 4;
/// Places in an event's bytes are counted in 32 bits (`encoded.rs`), and data that is all newlines becomes seven times
/// as much.
const MOST_DATA_BYTES: usize = 512 * 1024 * 1024;
const _: () = assert!(7 * MOST_DATA_BYTES as u64 + 1024 * 1024 < u32::MAX as u64, "with all other fields");
const _: () = assert!(
    SWEEP.as_millis() == 1_750 && MOST_LANES == 256 && FEWEST_THREADS == 4,
    "the messages of `check` name them"
);

/// Every limit of a [`Server`](crate::Server); each is a flag of the command, too. [`Config::default`] has the defaults
/// named here. A program sets the fields that it wants otherwise by [`Config::with`], or one after another. More fields
/// may come without breaking it.
///
/// ```
/// # use brooklet::Config;
/// let small = Config::default().with(|config| {
///     config.subscribers = 100;
///     config.keep_bytes = 1024 * 1024;
/// });
/// assert_eq!(small.heartbeat.as_secs(), 15);
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// Listen beyond loopback though nobody needs a token to publish: whoever reaches the port may (default: no).
    pub open: bool,
    /// Any of these lets its holder publish (none: no token is needed). Several, so that they can be changed without a
    /// gap.
    pub publish_tokens: Vec<Token>,
    /// Any of these lets its holder read streams, `/topics` and `/metrics` (none: no token is needed).
    pub subscribe_tokens: Vec<Token>,
    /// A file of tokens with rights to some topics each, read again whenever it changes (none). One right a line: a
    /// token, `publish`, `subscribe` or `both`, topics with commas between them (names, or beginnings that end in `*`),
    /// and perhaps `until=` with a Unix time in seconds. With it, everybody needs a token. Handlers' streams,
    /// `/metrics` and `/topics` need a right to `*`.
    pub tokens: Option<PathBuf>,
    /// Readers may show their token as `?access_token=`, too (no): URLs stand in logs and histories.
    pub query_tokens: bool,
    /// Origins whose pages may read and publish, with the browser's cookies: `https://app.example`,
    /// `https://*.app.example` for all names below it (but not for itself), `null` for pages from files; `*` lets all
    /// others read, without cookies (none).
    pub allow_origins: Vec<String>,
    /// Streams at once (100,000). Each takes a descriptor, some 1 kB here and 3 kB in the kernel; lowered at the start
    /// where the system gives fewer descriptors.
    pub subscribers: usize,
    /// Connections beside the streams (1,000): publishing and `/health` have room also while all streams are taken.
    pub connections: usize,
    /// Connections that are waited for at the same time, each by a thread (4,000, at least 4): half of them at most for
    /// requests, a quarter for handlers, and three quarters for handlers and subscribers that are behind. A thread
    /// takes 4 memory mappings: near the usual limit of 65,530 the process aborts. Lowered at the start where the
    /// system has less room.
    pub threads: usize,
    /// Bytes of a request's head (16 KiB): cookies and proxies make heads of several KiB.
    pub head_bytes: usize,
    /// Bytes of one `POST` body (64 KiB). An event published from the program may have as many, or `line_bytes` if that
    /// is more.
    pub body_bytes: usize,
    /// Bytes of one line of a `PUT` (64 KiB).
    pub line_bytes: usize,
    /// Time to send a whole head, from its first byte on; also for a new connection's first byte (10 s).
    pub head_time: Duration,
    /// Time to send a whole body; of a `PUT`, a line once begun; and for a peer to take a whole answer (30 s).
    pub body_time: Duration,
    /// How long a `PUT` may be silent between two lines (12 h: a log may be, overnight). The standard library cannot
    /// turn TCP keepalive on, so a publisher that vanished without a packet is known by its silence alone.
    pub put_idle_time: Duration,
    /// How long a connection that is kept alive may be idle between two requests (75 s): longer than the 60 s of many
    /// load balancers, which would otherwise send a request just when it is closed. Responses say it in `Keep-Alive`,
    /// and it is closed a second later.
    pub idle_time: Duration,
    /// Longest silence on a stream of topics (15 s, at least 3.5 s): proxies cut silent streams, many after 60 s, some
    /// after 30. <https://html.spec.whatwg.org/multipage/server-sent-events.html#authoring-notes>
    pub heartbeat: Duration,
    /// How long a stream of topics lasts at most (10 min; each stream draws its own time, 80 to 100 % of this). A proxy
    /// may keep a stream open long after its reader has gone; clients that are still there reconnect and miss nothing.
    pub lifetime: Duration,
    /// A subscriber that is behind and takes nothing for this long is closed (10 s; what its system has buffered may
    /// double it).
    pub stall_time: Duration,
    /// Reconnection time that streams are told (3 s); spread over 50 to 150 % where many may end at the same moment.
    pub retry: Duration,
    /// Newest events kept of each topic (1,000).
    pub keep_events: usize,
    /// Bytes kept of all topics together (64 MiB), counted as the memory that they take: an event with its bookkeeping
    /// is cut into pieces of 128 bytes, which take 140 each. So a small event counts as some 150 bytes.
    pub keep_bytes: usize,
    /// How long an event is kept (24 h).
    pub keep_age: Duration,
    /// Topic names in use at once (10,000): those with subscribers or kept events. A quarter is left for publishing.
    /// With a journal, each publisher that waits for it may bring one more.
    pub topics: usize,
    /// The file in which events survive the process (none). An event is in it before it is published; it is read at the
    /// start.
    pub journal: Option<PathBuf>,
    /// Events survive a power cut, too: publishing returns once the disk has them (no).
    pub fsync: bool,
    /// Lane threads. 0, the default, is one for every two cores: publishers, the network and other programs need some,
    /// too, and every event wakes all lanes. One for each core reaches the last of a crowd sooner, for 15 % more
    /// processor time.
    pub lanes: usize,
    /// What is logged (nothing; the command's default is `info`).
    pub log: Log,
    /// Where the lines of the log go (stderr).
    pub log_to: LogTo,
}

impl Default for Config {
    fn default() -> Config {
        let seconds = Duration::from_secs;
        Config {
            open: false,
            publish_tokens: Vec::new(),
            subscribe_tokens: Vec::new(),
            tokens: None,
            query_tokens: false,
            allow_origins: Vec::new(),
            subscribers: 100_000,
            connections: 1_000,
            threads: 4_000,
            head_bytes: 16 * 1024,
            body_bytes: 64 * 1024,
            line_bytes: 64 * 1024,
            head_time: seconds(10),
            body_time: seconds(30),
            put_idle_time: seconds(12 * 3600),
            idle_time: seconds(75),
            heartbeat: seconds(15),
            lifetime: seconds(600),
            stall_time: seconds(10),
            retry: seconds(3),
            keep_events: 1_000,
            keep_bytes: 64 * 1024 * 1024,
            keep_age: seconds(24 * 3600),
            topics: 10_000,
            journal: None,
            fsync: false,
            lanes: 0,
            log: Log::Off,
            log_to: LogTo::default(),
        }
    }
}

impl Config {
    /// The same with some fields changed, so that it is made in one expression where it is needed. Outside of this
    /// crate `Config { .. }` cannot be written, or each new field would break the programs that do.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Server};
    /// let server = Server::bind("127.0.0.1:0", Config::default().with(|config| config.subscribers = 100))?;
    /// # Ok(()) }
    /// ```
    #[must_use = "it returns the changed one"]
    pub fn with(mut self, change: impl FnOnce(&mut Config)) -> Config {
        change(&mut self);
        self
    }

    /// Rejects limits that make no sense.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](io::ErrorKind::InvalidInput), with the name of the field, what is wrong with it, and
    /// what would be right. The command turns the field's name into its flag's.
    pub(crate) fn check(&self) -> io::Result<()> {
        // The standard library refuses a read timeout of 0, which to the kernel means none at all.
        let limits = [
            ("head_time", self.head_time),
            ("body_time", self.body_time),
            ("put_idle_time", self.put_idle_time),
            ("idle_time", self.idle_time),
            ("heartbeat", self.heartbeat),
            ("lifetime", self.lifetime),
            ("stall_time", self.stall_time),
        ];
        for (field, time) in limits {
            if time.as_millis() == 0 {
                return invalid(format!("{field}: 0 leaves no time for anything: give at least 1ms"));
            }
        }
        for (field, time) in limits.into_iter().chain([("retry", self.retry)]) {
            if time > LONGEST {
                return invalid(format!("{field}: more than ten years: give at most 87600h"));
            }
        }
        for (is_wrong, reason) in [
            // A heartbeat is written in the last sweep before it is due: with less time it would be in nearly every
            // one.
            (self.heartbeat < 2 * SWEEP, "heartbeat: silence is looked for every 1750 ms: give at least 3500ms"),
            (self.head_bytes == 0, "head_bytes: no head has 0 bytes: give some KiB"),
            (self.topics == 0, "topics: without any, nothing is published: give at least 1"),
            (self.connections == 0, "connections: without any, nobody could ask for a stream: give at least 1"),
            (self.threads < FEWEST_THREADS, "threads: each kind of connection needs its share: give at least 4"),
            (self.lanes > MOST_LANES, "lanes: more than any machine has cores: give at most 256"),
            (self.body_bytes > MOST_DATA_BYTES, "body_bytes: too much for one event: give at most 512MiB"),
            (self.line_bytes > MOST_DATA_BYTES, "line_bytes: too much for one event: give at most 512MiB"),
            (self.fsync && self.journal.is_none(), "fsync: only a journal can be synced: name its file, too"),
        ] {
            if is_wrong {
                return invalid(reason);
            }
        }
        self.allow_origins.iter().try_for_each(|origin| check_origin(origin))
    }

    /// The most data that one event may have, in bytes. On the wire it may be seven times as much, where each byte of
    /// it is a newline and becomes a `data:` line.
    pub(crate) fn data_bytes(&self) -> usize {
        self.body_bytes.max(self.line_bytes)
    }
}

/// An origin is compared with what browsers send, so it must be written as they do: in small letters, without the port
/// that is the scheme's own, and without a path.
/// <https://html.spec.whatwg.org/multipage/browsers.html#ascii-serialisation-of-an-origin>
fn check_origin(origin: &str) -> io::Result<()> {
    if ["*", "null"].contains(&origin) {
        return Ok(());
    }
    let small = origin.to_ascii_lowercase();
    let (scheme, rest) = small.split_once("://").unwrap_or_default();
    let authority = rest.split('/').next().unwrap_or_default();
    // Names below one: its own name must have a dot, or it would be everything below com.
    let is_name = |name: &&str| {
        let host = split_port(name).0;
        host == "localhost" || host.contains('.') && host.split('.').all(|label| !label.is_empty())
    };
    let below = authority.strip_prefix("*.").filter(is_name);
    let is_scheme = !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    if !is_scheme || !is_authority(below.unwrap_or(authority)) {
        return invalid(format!(
            "allow_origins: {} is no origin: write https://app.example, https://*.app.example, null or *",
            quoted(origin)
        ));
    }
    let written = match (scheme, split_port(authority)) {
        ("http", (host, Some("80"))) | ("https", (host, Some("443"))) | (_, (host, Some(""))) => {
            format!("{scheme}://{host}")
        }
        _ => format!("{scheme}://{authority}"),
    };
    if written == origin {
        return Ok(());
    }
    invalid(format!("allow_origins: {} is not as browsers write it: give {written}", quoted(origin)))
}

/// What a publisher or a subscriber must show: `Authorization: Bearer TOKEN`, or the cookie `brooklet_token`. It is in
/// no log, no error and no debug output.
///
/// ```
/// let token: brooklet::Token = "c0ffee".parse().unwrap();
/// assert!(!format!("{token:?}").contains("c0ffee"));
/// ```
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Whether this is the token that was presented: see [`Request::shows`](crate::Request::shows) for routes. Takes
    /// the same time wherever the two differ, or the time would tell an attacker how many of the first characters were
    /// right.
    pub(crate) fn is(&self, presented: &str) -> bool {
        // `black_box` keeps the compiler from leaving the loop early. Only the length shows, which is no secret.
        let differ =
            self.0.bytes().zip(presented.bytes()).fold(0, |differ, (a, b)| std::hint::black_box(differ | (a ^ b)));
        differ == 0 && self.0.len() == presented.len()
    }
}

impl FromStr for Token {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Token> {
        // RFC 6750 §2.1; a cookie may hold all of these, too.
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~+/=".contains(&b)) {
            return invalid("a token is made of A-Z a-z 0-9 - . _ ~ + / =, such as `openssl rand -hex 16` prints");
        }
        Ok(Token(text.into()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// How much is logged.
///
/// ```
/// use brooklet::Log;
/// assert!(Log::Debug > Log::Info && Log::default() == Log::Off);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Log {
    /// Nothing: a library stays silent unless it is asked.
    #[default]
    Off,
    /// Streams that closed, and what limits did.
    Info,
    /// Every request, too.
    Debug,
}

/// Where the lines of the log go: to stderr, or line by line to the program.
///
/// ```
/// use brooklet::{Config, Log, LogTo};
/// let log_to = LogTo::lines(|line| println!("sse: {line}"));
/// let config = Config::default().with(|config| {
///     config.log = Log::Info;
///     config.log_to = log_to;
/// });
/// ```
#[derive(Clone, Default)]
pub struct LogTo(Option<Arc<LogLines>>);

type LogLines = dyn Fn(&str) + Send + Sync;

impl LogTo {
    /// Calls `take` with each line, without the line's end, one after another on a thread of the log's own. So it may
    /// take its time: lines wait, 1,024 of them, and then are left out and counted. What it panics with is left out,
    /// too.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Log, LogTo, Server};
    /// let (lines, log) = std::sync::mpsc::channel();
    /// let config = Config::default().with(|config| {
    ///     config.log = Log::Debug;
    ///     config.log_to = LogTo::lines(move |line| drop(lines.send(line.to_string())));
    /// });
    /// let server = Server::bind("127.0.0.1:0", config)?.spawn()?;
    /// # let mut client = std::net::TcpStream::connect(server.addr()?)?;
    /// # std::io::Write::write_all(&mut client, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    /// # let deadline = std::time::Duration::from_secs(10);
    /// // Thu, 26 Nov 2026 02:00:00 GMT 127.0.0.1:50000 GET "/health" 200
    /// println!("{}", log.recv_timeout(deadline).unwrap());
    /// # Ok(()) }
    /// ```
    pub fn lines(take: impl Fn(&str) + Send + Sync + 'static) -> LogTo {
        LogTo(Some(Arc::new(take)))
    }

    /// Writes one line. An error of stderr is ignored: there is nowhere left to report it.
    pub(crate) fn write(&self, mut line: String) {
        if let Some(take) = &self.0 {
            call(|| take(&line));
            return;
        }
        line.push('\n');
        let _ = io::stderr().write_all(line.as_bytes()); // one write, so that no other's line comes in between
    }
}

impl fmt::Debug for LogTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "LogTo(lines)" } else { "LogTo(stderr)" })
    }
}
