//! The command around the library: flags, the article's stream, Ctrl-C. It uses nothing that an embedder cannot.

use brooklet::{Config, Event, Log, Server, Token, parse_duration};
use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::{self, Thread};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const HELP: &str = "\
brooklet: a Server-Sent Events server that curl is a complete client of

  brooklet                                       serve 127.0.0.1:3000
  brooklet --listen 127.0.0.1:8080 --retry=1s    elsewhere, and reconnect sooner

  curl -N localhost:3000/test                    a counter, one event a second
  curl -N localhost:3000/events/news             the stream of a topic
  curl -d 'hello' localhost:3000/events/news     publish an event to it
  tail -f app.log | curl -T - http://localhost:3000/events/log     each line

flags, with their defaults (times: 500ms 15s 10m 24h; sizes: 900 64KiB 1MiB)
  --listen ADDR          127.0.0.1:3000   beyond loopback: a token to
                                          publish, or --open
  --publish-token T      none             to publish: a token, or @FILE of some;
                                          or in $BROOKLET_PUBLISH_TOKEN
  --subscribe-token T    none             to read: likewise
  --allow-origin ORIGIN  none             its pages may read and publish; again
                                          for more; * lets all others read
  --subscribers N        10000            streams at once
  --connections N        1000             connections beside them
  --head-bytes SIZE      16KiB            a request's head
  --body-bytes SIZE      64KiB            the body of a POST
  --line-bytes SIZE      64KiB            a line of a PUT
  --head-time TIME       10s              to send a whole head
  --body-time TIME       30s              to send a whole body, or a PUT's line
  --idle-time TIME       15s              between a connection's requests
  --heartbeat TIME       15s              longest silence, 3.5s or more
  --lifetime TIME        10m              of a topic's stream, 80 to 100 % of it
  --stall-time TIME      10s              in which a slow reader takes something
  --retry TIME           3s               when pages reconnect
  --keep-events N        1000             kept of each topic
  --keep-bytes SIZE      64MiB            kept of all topics together
  --keep-age TIME        24h              how long they are kept
  --topics N             10000            topic names in use at once
  --journal FILE         none             events survive the process in it
  --fsync                off              and the machine, too
  --lanes N              half the cores   threads that write to subscribers
  --log off|info|debug   info             to stderr
  --help  --version
";

/// Signals in this time after the first one belong to it: a terminal that closes sends SIGHUP and its shell another, a
/// service manager SIGTERM and then SIGHUP. They come some milliseconds apart, on a busy machine more. A person who
/// presses Ctrl-C again because nothing happens is slower, and does not lose much: the server needs a second at most.
const ONE_SIGNAL: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let args: Result<Vec<String>, _> = std::env::args_os().skip(1).map(|arg| arg.into_string()).collect();
    let command =
        args.map_err(|_| "the arguments are not UTF-8".into()).and_then(|args| Command::parse(args.into_iter()));
    let command = match command {
        Ok(Some(command)) => command,
        Ok(None) => return ExitCode::SUCCESS,
        Err(reason) => return fail(2, &reason),
    };
    match command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(1, &error.to_string()),
    }
}

fn fail(code: u8, reason: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "brooklet: {reason}");
    ExitCode::from(code)
}

fn say(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes()); // a closed stdout is no reason to stop serving
}

struct Command {
    listen: SocketAddr,
    config: Config,
}

impl Command {
    /// Reads the flags, or prints what `--help` and `--version` ask for.
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Command>, String> {
        let mut command = Command {
            listen: SocketAddr::from(([127, 0, 0, 1], 3000)),
            config: Config { log: Log::Info, ..Config::default() },
        };
        for (flag, variable) in
            [("--publish-token", "BROOKLET_PUBLISH_TOKEN"), ("--subscribe-token", "BROOKLET_SUBSCRIBE_TOKEN")]
        {
            if let Some(text) = std::env::var_os(variable) {
                // Whoever cannot read a token must not leave the door open.
                let mut text = || text.clone().into_string().map_err(|_| "it is not UTF-8".into());
                command.set(flag, &mut text).map_err(|reason| format!("{variable}: {reason}"))?;
            }
        }
        while let Some(arg) = args.next() {
            let (flag, mut value) = match arg.split_once('=') {
                Some((flag, value)) => (flag, Some(value.to_string())),
                None => (arg.as_str(), None),
            };
            match flag {
                "--help" | "-h" => say(HELP),
                "--version" | "-V" => say(concat!("brooklet ", env!("CARGO_PKG_VERSION"), "\n")),
                "--open" => command.config.open = true,
                "--fsync" => command.config.fsync = true,
                _ => {
                    let mut next = || value.take().or_else(|| args.next()).ok_or("a value is missing".to_string());
                    command.set(flag, &mut next).map_err(|reason| format!("{flag}: {reason} (see brooklet --help)"))?;
                    continue;
                }
            }
            if value.is_some() {
                return Err(format!("{flag}: no value is taken (see brooklet --help)"));
            } else if ["--help", "-h", "--version", "-V"].contains(&flag) {
                return Ok(None);
            }
        }
        Ok(Some(command))
    }

    fn set(&mut self, flag: &str, value: &mut dyn FnMut() -> Result<String, String>) -> Result<(), String> {
        let config = &mut self.config;
        match flag {
            "--listen" => self.listen = address(&value()?)?,
            "--subscribers" => config.subscribers = count(&value()?)?,
            "--connections" => config.connections = count(&value()?)?,
            "--head-bytes" => config.head_bytes = size(&value()?)?,
            "--body-bytes" => config.body_bytes = size(&value()?)?,
            "--line-bytes" => config.line_bytes = size(&value()?)?,
            "--head-time" => config.head_time = time(&value()?)?,
            "--body-time" => config.body_time = time(&value()?)?,
            "--idle-time" => config.idle_time = time(&value()?)?,
            "--heartbeat" => config.heartbeat = time(&value()?)?,
            "--lifetime" => config.lifetime = time(&value()?)?,
            "--stall-time" => config.stall_time = time(&value()?)?,
            "--retry" => config.retry = time(&value()?)?,
            "--keep-events" => config.keep_events = count(&value()?)?,
            "--keep-bytes" => config.keep_bytes = size(&value()?)?,
            "--keep-age" => config.keep_age = time(&value()?)?,
            "--topics" => config.topics = count(&value()?)?,
            "--publish-token" => config.publish_tokens.extend(tokens(&value()?)?),
            "--subscribe-token" => config.subscribe_tokens.extend(tokens(&value()?)?),
            "--allow-origin" => config.allow_origins.push(value()?),
            "--journal" => config.journal = Some(value()?.into()),
            "--lanes" => config.lanes = count(&value()?)?,
            "--log" => {
                config.log = match value()?.as_str() {
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

    fn run(self) -> io::Result<()> {
        let server = Server::bind(self.listen, self.config).map_err(|error| {
            let hint = if error.kind() == ErrorKind::AddrInUse { ": give another with --listen" } else { "" };
            io::Error::new(error.kind(), format!("cannot serve {}: {error}{hint}", self.listen))
        })?;
        server.page("/", "text/html; charset=utf-8", include_str!("page.html"))?;
        server.stream("/test", |stream| {
            let opened = Instant::now();
            for count in 0.. {
                let due = opened + Duration::from_secs(count + 1); // a sleep ends some ms late: they must not add up
                stream.sleep(due.saturating_duration_since(Instant::now()))?;
                let name = if count == 5 { "pause" } else { "test" }; // pausing is the page's decision: the counter goes on
                let id = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis());
                let event = Event::new(count.to_string()).name(name).id(id.to_string());
                stream.send(&event.retry(Duration::from_secs(10)))?;
            }
            Ok(())
        })?;
        stop_on_signals(thread::current())?;
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

static STOPPING: AtomicBool = AtomicBool::new(false);

/// The first Ctrl-C, SIGTERM or SIGHUP stops the server in order; one that does not belong to the first, at once.
fn stop_on_signals(serving: Thread) -> io::Result<()> {
    if hangup_is_ignored() {
        // Under nohup the server outlives its terminal. ctrlc would take the hang-up for a request to stop, so its handler
        // stays out, and SIGTERM ends the process without farewell.
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

fn address(text: &str) -> Result<SocketAddr, String> {
    let found = text.to_socket_addrs().ok().and_then(|mut found| found.next());
    found.ok_or_else(|| format!("{text:?} is no address: write HOST:PORT, such as 127.0.0.1:8080"))
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
