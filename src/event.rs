//! An event and its id, and the bytes that a subscriber gets.
//!
//! The form of these bytes was decided by what 29 clients make of them: LF alone ends a line, one blank line ends an
//! event, nothing else stands between. In a topic's event the id stands last: some clients take an id at once, and a
//! client that was cut off between the id and the data would resume after an event that it never saw. A handler's event
//! has the order of the article that this server is born from.
//! <https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation>

use crate::clock::now_ms;
use crate::config::Config;
use crate::text::{invalid, quoted, with_lf};
use std::fmt::{self, Write as _};
use std::io;
use std::str::FromStr;
use std::time::Duration;

/// A name is a word for `addEventListener`, not a place for data: beside the data, this bounds an event's bytes.
const EVENT_NAME_BYTES: usize = 256;
/// A key is kept as long as its event. The ids of relayed streams are keys, and those of some public ones are JSON of
/// some hundred bytes.
const KEY_BYTES: usize = 1024;

/// One event, to be published to a topic or sent on a handler's stream.
///
/// ```
/// use brooklet::Event;
/// let event = Event::new("line one\nline two").name("note").key("order-7");
/// ```
/// It is checked where it is used: what may not be is [`InvalidInput`](io::ErrorKind::InvalidInput) there.
#[derive(Clone, Debug, Default)]
pub struct Event {
    pub(crate) name: Option<String>,
    /// For handlers' streams; a topic's event gets its [`Id`] from the hub.
    pub(crate) id: Option<String>,
    pub(crate) data: String,
    pub(crate) retry: Option<Duration>,
    /// Never sent: only the hub and the journal know it.
    pub(crate) key: Option<String>,
}

impl Event {
    /// An event with this data. LF, CRLF and CR in it each begin a new `data:` line; the page gets them as LF.
    ///
    /// ```
    /// let event = brooklet::Event::new("a: 1\nb: 2"); // goes out as data: a: 1 ⏎ data: b: 2 ⏎
    /// ```
    pub fn new(data: impl Into<String>) -> Event {
        Event { data: data.into(), ..Event::default() }
    }

    /// The event's type, which pages listen for; without it, `message`. At most 256 bytes without CR, LF or NUL; `gap`
    /// is reserved.
    ///
    /// ```
    /// let event = brooklet::Event::new("7").name("created"); // source.addEventListener('created', …)
    /// ```
    pub fn name(mut self, name: impl Into<String>) -> Event {
        self.name = Some(name.into());
        self
    }

    /// The last event ID, on a handler's stream only (topics number their events). May not hold CR, LF or NUL.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.stream("/clock", |stream| {
    ///     stream.send(&Event::new("tick").id("1")) // whoever reconnects says Last-Event-ID: 1
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn id(mut self, id: impl Into<String>) -> Event {
        self.id = Some(id.into());
        self
    }

    /// The reconnection time, in whole milliseconds: up to 4,294,967,295, which are 49 days.
    ///
    /// ```
    /// use std::time::Duration;
    /// let event = brooklet::Event::new("7").retry(Duration::from_secs(10)); // retry: 10000
    /// ```
    pub fn retry(mut self, time: Duration) -> Event {
        self.retry = Some(time);
        self
    }

    /// Makes publishing repeatable: a second event of the same topic with this key (1 to 1,024 bytes without CR, LF or
    /// NUL) is not published, and gets the first one's id, for as long as the first is kept.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let hub = server.hub();
    /// let first = hub.publish("orders", Event::new("created").key("order-7"))?;
    /// assert_eq!(hub.publish("orders", Event::new("created").key("order-7"))?, first);
    /// # Ok(()) }
    /// ```
    pub fn key(mut self, key: impl Into<String>) -> Event {
        self.key = Some(key.into());
        self
    }

    /// Rejects an event that would break its stream: a line break in a field begins another field, and browsers ignore
    /// an id with NUL in it (the standard's "id" field). `gap` is how the server says that events may be missing, so
    /// nobody else may say it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](io::ErrorKind::InvalidInput), with the field.
    pub(crate) fn check(&self) -> io::Result<()> {
        let length = self.name.as_ref().map_or(0, String::len);
        if length > EVENT_NAME_BYTES {
            return invalid(format!("an event name of {length} bytes, where at most {EVENT_NAME_BYTES} are taken"));
        }
        if self.retry.is_some_and(|time| time.as_millis() > u32::MAX.into()) {
            return invalid(format!("a retry of more than {} milliseconds: give at most 49 days", u32::MAX));
        }
        if self.name.as_deref() == Some("gap") {
            return invalid("the event name gap is the server's own: choose another");
        }
        for (field, text) in [("event name", &self.name), ("id", &self.id), ("key", &self.key)] {
            if let Some(text) = text.as_deref().filter(|t| t.contains(['\r', '\n', '\0'])) {
                return invalid(format!("the {field} {} holds CR, LF or NUL: leave them out", quoted(text)));
            }
        }
        Ok(())
    }

    /// Whether this event may be published to a topic. Its data may still be missing: queries are checked before bodies
    /// are read.
    pub(crate) fn check_for_topic(&self, config: &Config) -> io::Result<()> {
        self.check()?;
        let limit = config.data_bytes();
        if self.id.is_some() {
            return invalid("a topic numbers its events itself: leave the id out");
        } else if self.data.len() > limit {
            return invalid(format!("{} bytes of data, where at most {limit} are taken", self.data.len()));
        }
        match self.key.as_ref().map(String::len) {
            Some(length) if !(1..=KEY_BYTES).contains(&length) => {
                invalid(format!("a key of {length} bytes, where 1 to {KEY_BYTES} are taken"))
            }
            _ => Ok(()),
        }
    }

    /// The bytes of a handler's event: `event`, `id`, `data`, `retry`.
    pub(crate) fn encode(&self) -> String {
        self.lines(self.id.as_deref(), None)
    }

    /// The bytes of a topic's event: `event`, `data`, `retry`, `id`.
    pub(crate) fn encode_with_id(&self, id: Id) -> String {
        self.lines(None, Some(id))
    }

    /// The lines of an event, with the blank line that ends it. An empty name is left out: browsers take it for
    /// `message`, as they do a missing one.
    fn lines(&self, id_before: Option<&str>, id_after: Option<Id>) -> String {
        // For the names of the fields, and data of one line.
        let mut out = String::with_capacity(self.data.len() + 96);
        if let Some(name) = self.name.as_deref().filter(|n| !n.is_empty()) {
            out.extend(["event: ", name, "\n"]);
        }
        if let Some(id) = id_before {
            out.extend(["id: ", id, "\n"]);
        }
        let data = with_lf(&self.data);
        let (first, others) = data.split_once('\n').map_or((&*data, None), |(first, others)| (first, Some(others)));
        out.extend(["data: ", first, "\n"]);
        if let Some(others) = others {
            // All at once: 64 KiB of newlines become 448, and what grows by doubling takes up to three times as much.
            let breaks = others.bytes().filter(|b| *b == b'\n').count();
            out.reserve_exact(others.len() + (breaks + 1) * "data: ".len() + 96);
            others.split('\n').for_each(|line| out.extend(["data: ", line, "\n"]));
        }
        if let Some(retry) = self.retry {
            let _ = writeln!(out, "retry: {}", retry.as_millis());
        }
        if let Some(id) = id_after {
            let _ = writeln!(out, "id: {id}");
        }
        out.push('\n');
        out
    }
}

/// The position of an event in the one order over all topics, written `MILLISECONDS-SEQUENCE` as Redis streams do.
///
/// ```
/// use brooklet::Id;
/// let id: Id = "1700000000000-2".parse().unwrap();
/// assert!(id > "1700000000000".parse().unwrap()); // that is 1700000000000-0
/// assert_eq!(id.to_string(), "1700000000000-2");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    /// Unix time in milliseconds when the event was published.
    pub ms: u64,
    /// Counts the events of one millisecond from 0.
    pub seq: u64,
}

impl Id {
    /// The id for an event published now: above this one, also when the clock has gone back. Where it has, ids go on
    /// counting in the newest millisecond until the clock has passed it.
    ///
    /// ```
    /// use brooklet::Id;
    /// let ahead = Id { ms: 100_000_000_000_000, seq: 7 }; // of a far future, before the clock was set right
    /// assert_eq!(ahead.next().to_string(), "100000000000000-8");
    /// assert!(Id::default().next().ms > 1_700_000_000_000); // else it is the time
    /// ```
    pub fn next(self) -> Id {
        self.next_at(now_ms())
    }

    /// The same at a time in Unix milliseconds; at 0, the very next one.
    pub(crate) fn next_at(self, now_ms: u64) -> Id {
        match self.seq.checked_add(1) {
            Some(seq) if now_ms <= self.ms => Id { ms: self.ms, seq },
            // A later millisecond; or this one's sequence numbers are used up.
            _ => Id { ms: now_ms.max(self.ms.saturating_add(1)), seq: 0 },
        }
    }

    /// The position just before this one: who resumes from it gets this one first. It need not belong to any event. Starts
    /// and gaps in the history rest on it, and so on ids being pairs of numbers with nothing between two neighbours.
    ///
    /// ```
    /// use brooklet::Id;
    /// let id = Id { ms: 1_700_000_000_000, seq: 2 };
    /// assert_eq!(id.before().to_string(), "1700000000000-1");
    /// ```
    pub fn before(self) -> Id {
        match self.seq {
            0 => Id { ms: self.ms.saturating_sub(1), seq: u64::MAX },
            seq => Id { ms: self.ms, seq: seq - 1 },
        }
    }
}

/// The ids of events that are published together, from the first one on. A journal names the first alone, so that these
/// must not depend on the clock.
pub fn ids_from(first: Id) -> impl Iterator<Item = Id> {
    std::iter::successors(Some(first), |id| Some(id.next_at(0)))
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.seq)
    }
}

impl FromStr for Id {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Id> {
        // `u64::from_str` alone would take a sign.
        let number = |t: &str| {
            if t.bytes().all(|b| b.is_ascii_digit()) { t.parse().ok() } else { None }
        };
        let (ms, seq) = text.split_once('-').unwrap_or((text, "0"));
        match (number(ms), number(seq)) {
            (Some(ms), Some(seq)) => Ok(Id { ms, seq }),
            _ => invalid(format!("{} is no event id: write MILLISECONDS-SEQUENCE", quoted(text))),
        }
    }
}
