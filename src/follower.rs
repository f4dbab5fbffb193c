//! Subscribing in the program: the same streams of topics, without a connection.
//!
//! A follower is a subscriber that is always behind: it has a cursor, and reads the history after it whenever it is
//! asked. So it needs no queue, and none can overflow. One that is slow holds nothing up and takes no more memory than
//! one that is quick: what it comes too late for was forgotten by the history, and it is told so by a gap. Nothing is
//! lost or comes twice, since nothing changes hands; that it wakes for each event is shown in `bell.rs`.

use crate::bell::Bell;
use crate::cursor::{Next, Start};
use crate::encoded::{Framing, Run};
use crate::event::{Event, Id};
use crate::hub::{Core, Hub, check_topic};
use crate::text::{LONGEST, invalid};
use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError};
use std::collections::VecDeque;
use std::io;
use std::iter;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most topics of one stream: each step of a replay looks at all of them.
pub const TOPICS_PER_STREAM: usize = 16;

/// Where a subscription begins: see [`Hub::subscribe`] and [`Request::follow_since`](crate::Request::follow_since).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Since {
    /// With the next event that is published.
    Now,
    /// With the oldest event that is kept.
    Earliest,
    /// With what was published in this time before now.
    Ago(Duration),
    /// After this id, which need not be any event's.
    After(Id),
}

impl From<Since> for Start {
    fn from(since: Since) -> Start {
        match since {
            Since::Now => Start::Now,
            Since::Earliest => Start::Earliest,
            Since::Ago(time) => Start::Ago(time),
            Since::After(id) => Start::After(Some(id)),
        }
    }
}

/// What a follower gets next.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum News {
    /// An event, in the order of the ids over all topics of the follower.
    Event(Published),
    /// Events before the next one may be missing: they were forgotten before this follower asked for them.
    Gap {
        /// From this event on, nothing is missing; None where no such event is kept.
        oldest: Option<Id>,
    },
}

/// An event that was published, as its subscribers see it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Published {
    /// The topic that it was published to.
    pub topic: Arc<str>,
    /// Its place in the one order over all topics.
    pub id: Id,
    /// Its type; None stands for `message`.
    pub name: Option<String>,
    /// Its data, in which LF alone ends a line.
    pub data: String,
    /// The reconnection time that it sets.
    pub retry: Option<Duration>,
}

impl Published {
    /// Reads the bytes of an event, which are ours: see `Event::lines`.
    fn read(topic: Arc<str>, id: Id, frame: &[u8]) -> Published {
        let mut published = Published { topic, id, name: None, data: String::new(), retry: None };
        let mut data = Vec::new();
        let frame = String::from_utf8_lossy(frame);
        for (field, value) in frame.split('\n').filter_map(|line| line.split_once(": ")) {
            match field {
                "event" => published.name = Some(value.into()),
                "data" => data.push(value),
                "retry" => published.retry = value.parse().ok().map(Duration::from_millis),
                _ => {}
            }
        }
        published.data = data.join("\n");
        published
    }
}

/// Reads the events of a run, whose bytes are plain. `topics` are theirs, in the same order.
fn read_all(run: &Run, topics: Vec<Arc<str>>) -> impl Iterator<Item = Published> {
    let mut start = 0;
    run.events.iter().zip(topics).map(move |((event, end), topic)| {
        let frame = &run.bytes[start..*end];
        start = *end;
        Published::read(topic, event.id, frame)
    })
}

/// For a stream of one's own, with the id that it was published with: a page that reconnects then says how far it came.
/// To publish it to another topic, take the id out: [`Event::new`] with the data.
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// # use brooklet::{Config, Server};
/// # let server = Server::bind("127.0.0.1:0", Config::default())?;
/// let hub = server.hub();
/// server.stream("/newest", move |stream| match hub.newest("news")? {
///     Some(newest) => stream.send(&newest.into()),
///     None => stream.comment("no news yet"),
/// })?;
/// # Ok(()) }
/// ```
impl From<Published> for Event {
    fn from(published: Published) -> Event {
        let Published { id, name, data, retry, .. } = published;
        Event { name, id: Some(id.to_string()), data, retry, key: None }
    }
}

/// A subscriber in the program: see [`Hub::subscribe`]. Dropping it ends the subscription.
///
/// As an iterator it waits for each event, and ends when the server has stopped:
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// # use brooklet::{Config, Event, News, Server, Since};
/// # let server = Server::bind("127.0.0.1:0", Config::default())?;
/// let news = server.hub().subscribe(["news"], Since::Now)?;
/// let counting = std::thread::spawn(move || {
///     news.filter(|item| matches!(item, News::Event(event) if event.data.contains("rust"))).count()
/// });
/// server.hub().publish("news", Event::new("rust 2.0"))?;
/// drop(server);
/// assert_eq!(counting.join().unwrap(), 1);
/// # Ok(()) }
/// ```
pub struct Follower {
    core: Arc<Core>,
    names: Arc<[Arc<str>]>,
    /// Everything up to here was read, or is not for this follower.
    read_to: Id,
    /// What each topic had forgotten when the follower was last told of a gap.
    told: Vec<Id>,
    bell: Bell,
    /// What was read and not taken yet, each with its id: at most one run, or one event if it is larger.
    read: VecDeque<(Id, News)>,
    /// The id of what was taken last.
    cursor: Id,
}

impl Hub {
    /// Subscribes to topics in the program. The follower reads what is kept, so it takes no memory for what it has not
    /// asked for yet; if it is slower than the events are forgotten, it is told of a [gap](News::Gap), as a page would
    /// be.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) for what is no topic name, for no topic, and for more than 16;
    /// [`QuotaExceeded`](io::ErrorKind::QuotaExceeded) when all topic names are in use;
    /// [`NotConnected`](io::ErrorKind::NotConnected) once the server is stopping.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, News, Server, Since};
    /// # use std::time::Duration;
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let hub = server.hub();
    /// hub.publish("orders", Event::new("7").name("created"))?;
    /// let mut orders = hub.subscribe(["orders"], Since::Earliest)?;
    /// match orders.recv_timeout(Duration::from_secs(1)) {
    ///     Ok(News::Event(order)) => assert_eq!((order.name.as_deref(), order.data.as_str()), (Some("created"), "7")),
    ///     other => panic!("a gap, or nothing in time: {other:?}"),
    /// }
    /// # Ok(()) }
    /// ```
    pub fn subscribe(&self, topics: impl IntoIterator<Item = impl AsRef<str>>, since: Since) -> io::Result<Follower> {
        let wanted = topic_names(topics)?;
        let core = self.core.clone();
        core.check_running()?;
        let mut history = core.history();
        let names = history.subscribe(&wanted)?;
        let (cursor, gap) = history.start(&names, since.into());
        let told = history.told(&names);
        let oldest = history.whole_from(&names, cursor);
        drop(history);
        let gap = gap.map(|gap| (gap.id, News::Gap { oldest }));
        let bell = core.bells.add(&names);
        Ok(Follower { core, names, read_to: cursor, told, bell, read: gap.into_iter().collect(), cursor })
    }

    /// What a topic keeps now, oldest first; nothing for a topic that is not in use. It is read some at a time, as it is
    /// asked for, so what is forgotten meanwhile is left out.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) for what is no topic name.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// # let hub = server.hub();
    /// hub.publish("load", Event::new("0.4"))?;
    /// hub.publish("load", Event::new("0.7"))?;
    /// let values: Vec<String> = hub.kept("load")?.map(|event| event.data).collect();
    /// assert_eq!(values, ["0.4", "0.7"]);
    /// # Ok(()) }
    /// ```
    pub fn kept(&self, topic: &str) -> io::Result<impl Iterator<Item = Published> + use<>> {
        check_topic(topic)?;
        let (core, names) = (self.core.clone(), [Arc::from(topic)]);
        let (mut read_to, until) = (Id::default(), core.history().newest());
        let step = move || {
            let history = core.history();
            // With all that was forgotten told already, there is no gap.
            let Next::Events(run) = history.next(&names, read_to, &history.told(&names), Framing::Plain) else {
                return None;
            };
            drop(history);
            read_to = run.newest();
            Some(read_all(&run, vec![names[0].clone(); run.events.len()]).collect::<Vec<_>>())
        };
        Ok(iter::from_fn(step).flatten().take_while(move |event| event.id <= until))
    }

    /// The newest event that a topic keeps, if there is any.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) for what is no topic name.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// # let hub = server.hub();
    /// hub.publish("load", Event::new("0.7"))?;
    /// assert_eq!(hub.newest("load")?.map(|event| event.data).as_deref(), Some("0.7"));
    /// # Ok(()) }
    /// ```
    pub fn newest(&self, topic: &str) -> io::Result<Option<Published>> {
        check_topic(topic)?;
        let names = [Arc::from(topic)];
        let history = self.core.history();
        let Some(id) = history.newest_kept(&names[0]) else { return Ok(None) };
        let next = history.next(&names, id.before(), &history.told(&names), Framing::Plain);
        drop(history);
        Ok(match next {
            Next::Events(run) => read_all(&run, names.to_vec()).next(),
            _ => None,
        })
    }
}

impl Follower {
    /// The next event or gap, if there is one now.
    ///
    /// # Errors
    /// [`TryRecvError::Empty`]: nothing newer is kept. [`TryRecvError::Disconnected`]: the same, and the server has
    /// stopped.
    pub fn try_next(&mut self) -> Result<News, TryRecvError> {
        // Asked first: what was published before the server stopped is still to be had.
        let is_over = self.core.is_stopping();
        if self.read.is_empty() {
            self.read_on();
        }
        let (id, news) =
            self.read.pop_front().ok_or(if is_over { TryRecvError::Disconnected } else { TryRecvError::Empty })?;
        self.cursor = id;
        Ok(news)
    }

    /// The next event or gap, waiting for it as long as this.
    ///
    /// # Errors
    /// [`RecvTimeoutError::Timeout`]: there was none in this time. [`RecvTimeoutError::Disconnected`]: the server has
    /// stopped.
    pub fn recv_timeout(&mut self, time: Duration) -> Result<News, RecvTimeoutError> {
        let deadline = Instant::now() + time.min(LONGEST); // a longer time may overflow, which panics
        loop {
            match self.try_next() {
                Ok(news) => return Ok(news),
                Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
                Err(TryRecvError::Empty) => {}
            }
            if self.bell.heard.recv_deadline(deadline) == Err(RecvTimeoutError::Timeout) {
                return Err(RecvTimeoutError::Timeout);
            }
        }
    }

    /// For a `select!`: it holds something when there may be news, and is disconnected once the server has stopped.
    /// Then take all there is with [`Follower::try_next`]; there may be none.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, News, Server, Since};
    /// use brooklet::crossbeam_channel::select;
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let hub = server.hub();
    /// server.stream("/shouted", move |stream| {
    ///     let mut news = hub.subscribe(["news"], Since::Now)?;
    ///     loop {
    ///         select! {
    ///             recv(stream.closed()) -> _ => return Ok(()),
    ///             recv(news.ready()) -> _ => {}
    ///         }
    ///         while let Ok(item) = news.try_next() {
    ///             if let News::Event(event) = item {
    ///                 stream.send(&Event::new(event.data.to_uppercase()))?;
    ///             }
    ///         }
    ///     }
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn ready(&self) -> &Receiver<()> {
        &self.bell.heard
    }

    /// The id of the event or gap that was taken last, or where the subscription began: `Since::After` this goes on
    /// from here, also in another process where there is a journal.
    pub fn cursor(&self) -> Id {
        self.cursor
    }

    /// Reads what comes after the cursor: a gap, some events, or nothing.
    fn read_on(&mut self) {
        let history = self.core.history();
        match history.next(&self.names, self.read_to, &self.told, Framing::Plain) {
            Next::Nothing => {}
            Next::Gap(gap) => {
                self.told = history.told(&self.names);
                let oldest = history.whole_from(&self.names, self.read_to);
                self.read_to = self.read_to.max(gap.id);
                self.read.push_back((self.read_to, News::Gap { oldest }));
            }
            Next::Events(run) => {
                let topic = |id| history.topic_of(&self.names, id).unwrap_or_default();
                let topics = run.events.iter().map(|(event, _)| topic(event.id)).collect();
                drop(history); // before the events are read
                self.read_to = run.newest();
                self.read.extend(read_all(&run, topics).map(|event| (event.id, News::Event(event))));
            }
        }
    }
}

impl Iterator for Follower {
    type Item = News;

    /// Waits for the next event or gap; None once the server has stopped.
    fn next(&mut self) -> Option<News> {
        loop {
            match self.recv_timeout(LONGEST) {
                Ok(news) => return Some(news),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.core.bells.remove(&self.names, &self.bell);
        self.core.history().unsubscribe(&self.names);
    }
}

/// The names of a list, each once: a topic that is named twice would send every event twice.
///
/// # Errors
/// [`InvalidInput`](io::ErrorKind::InvalidInput) for what is no topic name, for none, and for too many.
pub fn topic_names(list: impl IntoIterator<Item = impl AsRef<str>>) -> io::Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    for name in list {
        let name = name.as_ref();
        check_topic(name)?;
        if names.iter().any(|known| known == name) {
            continue;
        } else if names.len() == TOPICS_PER_STREAM {
            return invalid(format!("a stream takes up to {TOPICS_PER_STREAM} topics, and these are more"));
        }
        names.push(name.into());
    }
    if names.is_empty() {
        return invalid("a stream takes at least one topic, and this names none");
    }
    Ok(names)
}
