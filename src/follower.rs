//! Subscribing in the program: the same streams of topics, without a connection.
//!
//! A follower is a subscriber that is always behind: it has a cursor, and reads the history after it whenever it is
//! asked. So it needs no queue, and none can overflow. One that is slow holds nothing up and takes no more memory than
//! one that is quick: what it comes too late for was forgotten by the history, and it is told so by a gap. Nothing is
//! lost or comes twice, since nothing changes hands; that it wakes for each event is shown in `bell.rs`.

use crate::bell::Bell;
use crate::cursor::{Next, Start};
use crate::encoded::Framing;
use crate::event::Id;
use crate::feed::{NOT_REACHED, reach};
use crate::hub::{Core, Hub};
use crate::names::distinct;
use crate::shelf::{Published, read_all};
use crate::text::LONGEST;
use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where a subscription begins: see [`Hub::subscribe`] and [`Request::follow_since`](crate::Request::follow_since).
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// # use brooklet::{Config, Event, Server, Since};
/// # use std::time::Duration;
/// # let server = Server::bind("127.0.0.1:0", Config::default())?;
/// let (hub, hour) = (server.hub(), Duration::from_secs(3_600));
/// ["0.4", "0.5", "0.7"].iter().try_for_each(|load| hub.publish("load", Event::new(*load)).map(drop))?;
/// let count = |since| -> std::io::Result<usize> {
///     let mut news = hub.subscribe(["load"], since)?;
///     Ok(std::iter::from_fn(|| news.try_next().ok()).count())
/// };
/// assert_eq!(count(Since::Now)?, 0);
/// assert_eq!(count(Since::Newest(1))?, 1);
/// assert_eq!(count(Since::Earliest)?, 3);
/// assert_eq!(count(Since::Ago(hour))?, 4); // a gap first: the server is not that old
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Since {
    /// With the next event that is published.
    Now,
    /// With the oldest event that is kept.
    Earliest,
    /// With the newest so many events of each topic, all in one order: with `Newest(1)` a dashboard has its current
    /// values at once.
    Newest(u64),
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
            Since::Newest(count) => Start::Newest(count),
            Since::Ago(time) => Start::Ago(time),
            Since::After(id) => Start::After(Some(id)),
        }
    }
}

/// What a follower gets next.
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// # use brooklet::{Config, News, Server};
/// # let server = Server::bind("127.0.0.1:0", Config::default())?;
/// fn show(item: News) -> String {
///     match item {
///         News::Event(event) => format!("{} of {}: {}", event.id, event.topic, event.data),
///         News::Gap { oldest: Some(id) } => format!("some events before {id} may be missing"),
///         _ => "some events may be missing".into(),
///     }
/// }
/// # let mut news = server.hub().subscribe(["a"], brooklet::Since::After("1-0".parse()?))?;
/// # assert_eq!(show(news.try_next().unwrap()), "some events may be missing");
/// # Ok(()) }
/// ```
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
    /// Up to where each topic is passed over, because it begins with its newest events (`cursor.rs`).
    floors: Box<[Id]>,
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
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) for what is no topic name, for none, and for more than 64;
    /// [`QuotaExceeded`](io::ErrorKind::QuotaExceeded) when all topic names are in use;
    /// [`NotConnected`](io::ErrorKind::NotConnected) once the server is stopping; and with an [`Engine`](crate::Engine)
    /// [`TimedOut`](io::ErrorKind::TimedOut) where it has not shown everything up to this id yet: try again later.
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
        let wanted = distinct(topics)?;
        let core = self.core.clone();
        core.check_running()?;
        if !reach(&core, &since.into()) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, NOT_REACHED));
        }
        let mut history = core.history();
        let names = history.subscribe(&wanted)?;
        let (cursor, gap) = history.start(&names, since.into());
        let (told, floors) = (history.told(&names), history.floors(&names, since.into()));
        let oldest = history.whole_from(&names, cursor);
        drop(history);
        let gap = gap.map(|gap| (gap.id, News::Gap { oldest }));
        let bell = core.bells.add(&names);
        Ok(Follower { core, names, read_to: cursor, told, floors, bell, read: gap.into_iter().collect(), cursor })
    }
}

impl Follower {
    /// The next event or gap, if there is one now.
    ///
    /// # Errors
    /// [`TryRecvError::Empty`]: nothing newer is kept. [`TryRecvError::Disconnected`]: the same, and the server has
    /// stopped.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, News, Server, Since};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let mut news = server.hub().subscribe(["news"], Since::Now)?;
    /// assert!(news.try_next().is_err()); // nothing yet
    /// server.hub().publish("news", Event::new("hello"))?;
    /// assert!(matches!(news.try_next(), Ok(News::Event(event)) if event.data == "hello"));
    /// # Ok(()) }
    /// ```
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
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Server, Since};
    /// # use brooklet::crossbeam_channel::RecvTimeoutError;
    /// # use std::time::Duration;
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let mut news = server.hub().subscribe(["news"], Since::Now)?;
    /// match news.recv_timeout(Duration::from_millis(10)) {
    ///     Ok(item) => println!("{item:?}"),
    ///     Err(RecvTimeoutError::Timeout) => println!("no news"),
    ///     Err(RecvTimeoutError::Disconnected) => println!("the server has stopped"),
    /// }
    /// # Ok(()) }
    /// ```
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
    /// from here, also in another process where there is a journal. Of one that began with [`Since::Newest`] and has
    /// not taken all of these yet, that also gives what they have overtaken.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, News, Server, Since};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let hub = server.hub();
    /// ["one", "two"].iter().try_for_each(|data| hub.publish("news", Event::new(*data)).map(drop))?;
    /// let mut news = hub.subscribe(["news"], Since::Earliest)?;
    /// let _one = news.next();
    /// let mut later = hub.subscribe(["news"], Since::After(news.cursor()))?;
    /// assert!(matches!(later.next(), Some(News::Event(event)) if event.data == "two"));
    /// # Ok(()) }
    /// ```
    pub fn cursor(&self) -> Id {
        self.cursor
    }

    /// Reads what comes after the cursor: a gap, some events, or nothing.
    fn read_on(&mut self) {
        let history = self.core.history();
        match history.next(&self.names, self.read_to, &self.told, &self.floors, Framing::Plain) {
            Next::Nothing => {}
            Next::Gap(gap) => {
                self.told = history.told(&self.names);
                let oldest = history.whole_from(&self.names, self.read_to);
                self.read_to = self.read_to.max(gap.id);
                self.read.push_back((self.read_to, News::Gap { oldest }));
            }
            Next::Events(run) => {
                drop(history); // before the events are read
                self.read_to = run.newest();
                self.read.extend(read_all(&run).map(|event| (event.id, News::Event(event))));
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
