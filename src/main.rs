//! The command around the library: flags, the article's stream, Ctrl-C. It uses nothing that an embedder cannot.

#[cfg(feature = "redis")]
mod redis;
#[cfg(feature = "redis")]
mod redis_link;
#[cfg(feature = "redis")]
mod redis_reader;

use brooklet::{Config, Event, Log, Server, Token, parse_duration};
use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::{self, Thread};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const HELP: &str = "\
brooklet: a Server-Sent Events server; curl is enough to use it

  brooklet                                       serve 127.0.0.1:3000
  brooklet --listen 127.0.0.1:8080 --retry=1s    another port, a shorter retry

  curl -N localhost:3000/test                    a counter, one event a second
  curl -N localhost:3000/events/news             the stream of a topic
  curl -d 'hello' localhost:3000/events/news     publish an event to the topic
  tail -F app.log | curl -T - http://localhost:3000/events/log     each line
  curl localhost:3000/topics                     what topics there are
  curl -X DELETE localhost:3000/events/news      forget what a topic keeps

Flags and their defaults. Times: 500ms 15s 10m 24h. Sizes: 900 64KiB 1MiB.
Each has an environment variable, such as BROOKLET_LISTEN=ADDR, BROOKLET_OPEN=1;
the flag wins. T and ORIGIN can be given several times.

  --listen ADDR          127.0.0.1:3000  other than loopback: needs a publish
                                         token, --tokens, or --open
  --open                 off             whoever reaches it may publish
  --publish-token T      none            publishers must show T, which is a
                                         token, or @FILE with one token a line
  --subscribe-token T    none            readers must show T
  --tokens FILE          none            tokens with rights to some topics each,
                                         read again whenever it changes
  --query-tokens         off             readers may show T as ?access_token=T
  --allow-origin ORIGIN  none            web pages from there may read and
                                         publish; '*' lets all others read
  --subscribers N        100000          streams open at once
  --connections N        1000            other connections open at once
  --threads N            4000            threads, for all but live streams
  --head-bytes SIZE      16KiB           longest request head
  --body-bytes SIZE      64KiB           longest body of a POST
  --line-bytes SIZE      64KiB           longest line of a PUT
  --head-time TIME       10s             for a whole request head to arrive
  --body-time TIME       30s             for a POST's body, or a line of a PUT
  --put-idle-time TIME   12h             for the next line of a PUT
  --idle-time TIME       75s             for the next request on a connection
  --heartbeat TIME       15s             longest silence on a stream (from 3.5s)
  --lifetime TIME        10m             longest life of a topic's stream
  --stall-time TIME      10s             for a slow reader to accept something
  --retry TIME           3s              clients wait this long to reconnect
  --keep-events N        1000            newest events kept of each topic
  --keep-bytes SIZE      64MiB           bytes kept of all topics together
  --keep-age TIME        24h             events are deleted after this time
  --topics N             10000           topics in use at once
  --journal FILE         none            store events: they survive a restart
  --fsync                off             sync each write: and a power cut, too
  --lanes N              half the cores  threads that write to subscribers
  --log off|info|debug   info            what to log to stderr
  --help  --version
";

/// What a flag takes.
#[derive(Clone, Copy, PartialEq)]
enum Takes {
    Nothing,
    Value,
    /// A value each time that it is given.
    Values,
}

/// Every flag that the environment can give, too. A variable of another name that begins with `BROOKLET_` is not ours
/// to refuse: Kubernetes sets some for a service that is called brooklet.
const FLAGS: [(&str, Takes); 32] = [
    ("--listen", Takes::Value),
    ("--open", Takes::Nothing),
    ("--publish-token", Takes::Values),
    ("--subscribe-token", Takes::Values),
    ("--tokens", Takes::Value),
    ("--query-tokens", Takes::Nothing),
    ("--allow-origin", Takes::Values),
    ("--subscribers", Takes::Value),
    ("--connections", Takes::Value),
    ("--threads", Takes::Value),
    ("--head-bytes", Takes::Value),
    ("--body-bytes", Takes::Value),
    ("--line-bytes", Takes::Value),
    ("--head-time", Takes::Value),
    ("--body-time", Takes::Value),
    ("--put-idle-time", Takes::Value),
    ("--idle-time", Takes::Value),
    ("--heartbeat", Takes::Value),
    ("--lifetime", Takes::Value),
    ("--stall-time", Takes::Value),
    ("--retry", Takes::Value),
    ("--keep-events", Takes::Value),
    ("--keep-bytes", Takes::Value),
    ("--keep-age", Takes::Value),
    ("--topics", Takes::Value),
    ("--journal", Takes::Value),
    ("--fsync", Takes::Nothing),
    ("--redis", Takes::Value),
    ("--redis-stream", Takes::Value),
    ("--redis-length", Takes::Value),
    ("--lanes", Takes::Value),
    ("--log", Takes::Value),
];

/// Signals in this time after the first one belong to it: a terminal that closes sends SIGHUP and its shell another, a
/// service manager SIGTERM and then SIGHUP. They come some milliseconds apart, on a busy machine more. A person who
/// presses Ctrl-C again because nothing happens is slower, and does not lose much: the server needs a second at most.
const ONE_SIGNAL: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let command = Command::parse(std::env::args_os().skip(1));
    match command.and_then(|command| command.map_or(Ok(()), Command::run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = writeln!(io::stderr(), "brooklet: {}", failure.reason);
            ExitCode::from(failure.code)
        }
    }
}

fn say(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes()); // a closed stdout is no reason to stop serving
}

/// Why it does not serve: 2 is for what can never be, 1 for what the system refuses this time.
struct Failure {
    code: u8,
    reason: String,
}

impl Failure {
    fn usage(reason: impl Display) -> Failure {
        Failure { code: 2, reason: format!("{reason} (see brooklet --help)") }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure { code: 1, reason: error.to_string() }
    }
}

struct Command {
    listen: SocketAddr,
    config: Config,
    redis: RedisFlags,
}

/// What is shared with other servers, and by what.
struct RedisFlags {
    /// None: nothing.
    url: Option<String>,
    /// The key of the stream.
    stream: String,
    length: usize,
}

impl Command {
    /// Reads the flags and then the environment, or prints what `--help` and `--version` ask for.
    fn parse(args: impl Iterator<Item = OsString>) -> Result<Option<Command>, Failure> {
        let mut command = Command {
            listen: SocketAddr::from(([127, 0, 0, 1], 3000)),
            config: Config::default().with(|config| config.log = Log::Info),
            redis: RedisFlags { url: None, stream: "brooklet".into(), length: 100_000 },
        };
        // What cannot be read is not shown: it may hold a token.
        let text = |(arg, n): (OsString, usize)| {
            arg.into_string().map_err(|_| Failure::usage(format_args!("argument {n} is not UTF-8")))
        };
        let args: Vec<String> = args.zip(1..).map(text).collect::<Result<_, _>>()?;
        let (mut args, mut given) = (args.into_iter().peekable(), Vec::new());
        while let Some(arg) = args.next() {
            let (flag, value) = match arg.split_once('=') {
                Some((flag, value)) => (flag, Some(value.to_string())),
                None => (arg.as_str(), None),
            };
            let refuse = |reason: String| Failure::usage(format_args!("{flag}: {reason}"));
            let info = match flag {
                "--help" | "-h" => HELP,
                "--version" | "-V" => concat!("brooklet ", env!("CARGO_PKG_VERSION"), "\n"),
                _ => "",
            };
            if !info.is_empty() {
                say(info);
                #[cfg(feature = "redis")]
                if info == HELP {
                    say(redis::HELP);
                }
                return Ok(None);
            }
            let Some((name, takes)) = FLAGS.into_iter().find(|(name, _)| *name == flag) else {
                return Err(refuse("there is no such flag".into()));
            };
            if takes == Takes::Nothing && value.is_some() {
                return Err(refuse("no value is taken".into()));
            } else if takes == Takes::Value && given.contains(&name) {
                return Err(refuse("it is given twice, and takes one value: leave one out".into()));
            }
            given.push(name);
            let value = match takes {
                Takes::Nothing => "1".into(),
                // Whoever forgets a value has not asked for a journal that is called --fsync.
                _ => value.or_else(|| args.next_if(|next| !next.starts_with("--"))).unwrap_or_default(),
            };
            command.set(name, &value).map_err(refuse)?;
        }
        command.read_environment(&given)?;
        Ok(Some(command))
    }

    /// Takes what the flags have not said from variables such as `BROOKLET_LISTEN`. What may be given several times
    /// adds up, so that a token can be changed without a gap.
    fn read_environment(&mut self, given: &[&str]) -> Result<(), Failure> {
        for (flag, takes) in FLAGS {
            let variable = format!("BROOKLET{}", flag[1..].replace('-', "_").to_uppercase());
            let is_settled = takes != Takes::Values && given.contains(&flag);
            if let Some(text) = std::env::var_os(&variable).filter(|_| !is_settled) {
                // Whoever cannot read a token must not leave the door open.
                let text = text.into_string().map_err(|_| "it is not UTF-8".to_string());
                let set = text.and_then(|text| self.set(flag, &text));
                set.map_err(|reason| Failure::usage(format_args!("{variable}: {reason}")))?;
            }
        }
        Ok(())
    }

    fn set(&mut self, flag: &str, value: &str) -> Result<(), String> {
        if value.trim().is_empty() {
            return Err("a value is missing".into());
        }
        let config = &mut self.config;
        match flag {
            "--listen" => self.listen = address(value)?,
            "--open" => config.open = switch(value)?,
            "--publish-token" => config.publish_tokens.extend(tokens(value)?),
            "--subscribe-token" => config.subscribe_tokens.extend(tokens(value)?),
            "--tokens" => config.tokens = Some(value.into()),
            "--query-tokens" => config.query_tokens = switch(value)?,
            // In the environment several may stand, with spaces between, which no origin holds.
            "--allow-origin" => config.allow_origins.extend(value.split_whitespace().map(String::from)),
            "--subscribers" => config.subscribers = count(value)?,
            "--connections" => config.connections = count(value)?,
            "--threads" => config.threads = count(value)?,
            "--head-bytes" => config.head_bytes = size(value)?,
            "--body-bytes" => config.body_bytes = size(value)?,
            "--line-bytes" => config.line_bytes = size(value)?,
            "--head-time" => config.head_time = time(value)?,
            "--body-time" => config.body_time = time(value)?,
            "--put-idle-time" => config.put_idle_time = time(value)?,
            "--idle-time" => config.idle_time = time(value)?,
            "--heartbeat" => config.heartbeat = time(value)?,
            "--lifetime" => config.lifetime = time(value)?,
            "--stall-time" => config.stall_time = time(value)?,
            "--retry" => config.retry = time(value)?,
            "--keep-events" => config.keep_events = count(value)?,
            "--keep-bytes" => config.keep_bytes = size(value)?,
            "--keep-age" => config.keep_age = time(value)?,
            "--topics" => config.topics = count(value)?,
            "--journal" => config.journal = Some(value.into()),
            "--fsync" => config.fsync = switch(value)?,
            "--lanes" => config.lanes = count(value)?,
            _ if flag.starts_with("--redis") && cfg!(not(feature = "redis")) => {
                return Err("this program was built without it: cargo build --release --features redis".into());
            }
            "--redis" => self.redis.url = Some(first_line(value)?),
            "--redis-stream" => self.redis.stream = value.into(),
            "--redis-length" => {
                self.redis.length = count(value)?;
                if self.redis.length == 0 {
                    return Err("0 would keep nothing: give at least 1".into());
                }
            }
            "--log" => {
                config.log = match value {
                    "off" => Log::Off,
                    "info" => Log::Info,
                    "debug" => Log::Debug,
                    other => return Err(format!("{other:?} is none of off, info and debug")),
                }
            }
            _ => return Err("there is no such flag".into()),
        }
        Ok(())
    }

    /// Binds the server, alone or with others that share its topics.
    fn bind(self) -> Result<Server, Failure> {
        let listen = self.listen;
        let needs_token = !self.config.publish_tokens.is_empty() || self.config.tokens.is_some();
        let is_open = self.config.open || needs_token || listen.ip().to_canonical().is_loopback();
        #[cfg(feature = "redis")]
        if let Some(url) = self.redis.url {
            if self.config.journal.is_some() {
                return Err(Failure::usage("--journal: with --redis it is Redis that keeps the events: leave one out"));
            }
            let refused = |reason| Failure { code: 1, reason: format!("--redis: {reason}") };
            let RedisFlags { stream, length, .. } = self.redis;
            let link = redis_link::Link::new(&url, &stream, length, self.config.keep_age);
            let link = link.map_err(|reason| Failure::usage(format_args!("--redis: {reason}")))?;
            let engine = std::sync::Arc::new(redis::Redis::connect(link).map_err(refused)?);
            let bound = Server::bind_with_engine(listen, self.config, engine.clone());
            let (server, feed) = bound.map_err(|error| failure(error, listen, is_open))?;
            engine.feed(feed).map_err(refused)?;
            return Ok(server);
        }
        Server::bind(listen, self.config).map_err(|error| failure(error, listen, is_open))
    }

    fn run(self) -> Result<(), Failure> {
        // Before the port is bound: whoever has connected may send a signal, and reading a large journal takes a while.
        stop_on_signals(thread::current())?;
        let server = self.bind()?;
        server.page("/", "text/html; charset=utf-8", include_str!("page.html"))?;
        server.stream("/test", |stream| {
            let opened = Instant::now();
            for count in 0.. {
                let due = opened + Duration::from_secs(count + 1); // a sleep ends some ms late: they must not add up
                stream.sleep(due.saturating_duration_since(Instant::now()))?;
                let name = if count == 5 { "pause" } else { "test" }; // the page decides to pause: the counter goes on
                let id = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis());
                let event = Event::new(count.to_string()).name(name).id(id.to_string());
                stream.send(&event.retry(Duration::from_secs(10)))?;
            }
            Ok(())
        })?;
        let server = server.spawn()?;
        let url = format!("http://{}", server.addr()?);
        let text = format!("brooklet listens on {url} (open it in a browser; Ctrl-C stops it)\n  curl -N {url}/test\n");
        // Standard output may be a full pipe that nobody reads: then this thread waits, and not the one that stops.
        thread::Builder::new().name("first line".into()).spawn(move || say(&text))?;
        while !STOPPING.load(SeqCst) {
            thread::park();
        }
        server.stop();
        Ok(())
    }
}

/// An error of `bind`, in the words of the flags.
fn failure(error: io::Error, listen: SocketAddr, is_open: bool) -> Failure {
    let is_ours = error.raw_os_error().is_none();
    match error.kind() {
        ErrorKind::InvalidInput if is_ours => Failure::usage(by_flag(&error.to_string())),
        ErrorKind::PermissionDenied if is_ours && !is_open => Failure::usage(format_args!(
            "--listen: {listen} is beyond loopback, so whoever reaches it could publish: give --publish-token TOKEN or \
             --tokens FILE, or say --open"
        )),
        kind => {
            let hint = if kind == ErrorKind::AddrInUse { ": give another with --listen" } else { "" };
            Failure { code: 1, reason: format!("cannot serve {listen}: {error}{hint}") }
        }
    }
}

/// An error of the settings names its field first; here that is a flag. (`allow_origins` is `--allow-origin`.)
fn by_flag(error: &str) -> String {
    let (field, reason) = error.split_once(": ").unwrap_or_default();
    let name = format!("--{}", field.replace('_', "-"));
    let flag = FLAGS.iter().find(|(flag, _)| name.starts_with(flag));
    flag.map_or(error.into(), |(flag, _)| format!("{flag}: {reason}"))
}

static STOPPING: AtomicBool = AtomicBool::new(false);

/// The first Ctrl-C, SIGTERM or SIGHUP stops the server in order; one that does not belong to the first, at once.
fn stop_on_signals(serving: Thread) -> io::Result<()> {
    if hangup_is_ignored() {
        // Under nohup the server outlives its terminal. ctrlc would take the hang-up for a request to stop, so its
        // handler stays out, and SIGTERM ends the process without farewell.
        return Ok(());
    }
    let mut first: Option<Instant> = None;
    let handler = move || match first {
        None => {
            first = Some(Instant::now());
            STOPPING.store(true, SeqCst);
            serving.unpark();
        }
        Some(first) if first.elapsed() < ONE_SIGNAL => {}
        Some(_) => process::exit(130),
    };
    ctrlc::set_handler(handler).map_err(io::Error::other)
}

/// Whether this process was started with SIGHUP (signal 1) ignored, as Linux tells it.
fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 == 1)
}

/// A switch has a value in the environment only; `true` and `false` are what other files' booleans become there.
fn switch(text: &str) -> Result<bool, String> {
    match text {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err(format!("{text:?} is neither 1 nor 0")),
    }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let found = text.to_socket_addrs().ok().and_then(|mut found| found.next());
    found.ok_or_else(|| format!("{text:?} is no address: write HOST:PORT, such as 127.0.0.1:8080"))
}

/// A value that may be secret; or the first line of a file that is named after an @.
fn first_line(text: &str) -> Result<String, String> {
    let Some(path) = text.strip_prefix('@') else { return Ok(text.into()) };
    let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    text.lines().next().map(|line| line.trim().into()).ok_or_else(|| format!("{path}: it is empty"))
}

/// A token from a flag or the environment; or several, one a line, in a file that is named after an @.
fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let read = |path| std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    let list = text.strip_prefix('@').map_or(Ok(text.into()), read)?;
    let lines = list.lines().map(str::trim).filter(|line| !line.is_empty());
    let tokens: Result<Vec<Token>, _> = lines.map(str::parse).collect();
    tokens.map_err(|error| error.to_string()).and_then(|tokens| match tokens.is_empty() {
        true => Err("there is no token in it".into()),
        false => Ok(tokens),
    })
}

fn count(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| format!("{text:?} is no count: write a whole number such as 1000"))
}

fn time(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.to_string())
}

fn size(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit: usize = match &text[digits.len()..] {
        "" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => 0,
    };
    let bytes = digits.parse().ok().and_then(|number: usize| number.checked_mul(unit)).filter(|_| unit > 0);
    bytes.ok_or_else(|| format!("{text:?} is no size: write 900, 64KiB or 1MiB"))
}
