//! What a program asks of its hub: several events at once, which topics there are, what they keep.
//!
//! All of it has a form on the network, too (`POST` to several topics, `PUT`, `DELETE`, `/topics`), with the same
//! promises. What is kept is read some at a time: whoever reads all of it holds nobody up, and takes the memory of one
//! write.

use crate::cursor::Next;
use crate::encoded::{Framing, Run};
use crate::event::{Event, Id};
use crate::form::values;
use crate::history::TopicOverview;
use crate::hub::Hub;
use crate::names::{check_topic, distinct};
use std::io;
use std::iter;
use std::sync::Arc;
use std::time::Duration;

/// An event that was published, as its subscribers see it.
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// # use brooklet::{Config, Event, Server};
/// # let server = Server::bind("127.0.0.1:0", Config::default())?;
/// server.hub().publish("orders", Event::new("7").name("created"))?;
/// let order = server.hub().newest("orders")?.expect("it is kept");
/// assert_eq!((&*order.topic, order.name.as_deref(), order.data.as_str()), ("orders", Some("created"), "7"));
/// # Ok(()) }
/// ```
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
    /// Reads the frame of an event.
    fn read(topic: Arc<str>, id: Id, frame: &[u8]) -> Published {
        let frame = String::from_utf8_lossy(frame);
        let name = values(&frame, "event").next().map(String::from);
        let data = values(&frame, "data").collect::<Vec<_>>().join("\n");
        let retry = values(&frame, "retry").next().and_then(|text| text.parse().ok()).map(Duration::from_millis);
        Published { topic, id, name, data, retry }
    }
}

/// Reads the events of a run, whose bytes are plain.
pub fn read_all(run: &Run) -> impl Iterator<Item = Published> {
    run.events.iter().enumerate().map(|(index, (id, end))| {
        let frame = &run.bytes[run.end_of(index)..*end];
        Published::read(run.topic(index).clone(), *id, frame)
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

impl Hub {
    /// Publishes one event to each of these topics: to all of them, as neighbours in the order of the ids, or to none.
    /// Returns the id in each, in the same order; a topic that is named twice has it once. A topic that keeps an event
    /// of this [`key`](Event::key) stays as it is, and its id is that event's.
    ///
    /// # Errors
    /// As for [`Hub::publish`]; also [`InvalidInput`](io::ErrorKind::InvalidInput) for no topic, and for more than 64.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let ids = server.hub().publish_each(["user-1", "user-2"], Event::new("a letter for you both"))?;
    /// assert!(ids[0] < ids[1]);
    /// # Ok(()) }
    /// ```
    pub fn publish_each(&self, topics: impl IntoIterator<Item = impl AsRef<str>>, event: Event) -> io::Result<Vec<Id>> {
        let names = distinct(topics)?;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.core.publish_each(&names, &event)
    }

    /// Publishes events to one topic, one after another with no other event of the topic between them; with a journal,
    /// they share what writing costs. Where one cannot be published, those after it are not either. Returns the ids of
    /// those that were, in any case.
    ///
    /// # Errors
    /// As for [`Hub::publish`], for the first that was not published.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let (ids, result) = server.hub().publish_all("log", "one\ntwo".lines().map(Event::new));
    /// result?;
    /// assert_eq!(ids.len(), 2);
    /// # Ok(()) }
    /// ```
    pub fn publish_all(&self, topic: &str, events: impl IntoIterator<Item = Event>) -> (Vec<Id>, io::Result<()>) {
        self.core.publish_all(topic, events.into_iter().collect())
    }

    /// Forgets what a topic keeps, in the order of the ids: all that was published before, and nothing after. Streams
    /// go on. Whoever resumes from before the newest of it hears a gap. Returns that newest one's id; None where
    /// nothing was kept. An [`Engine`](crate::Engine) gives the forgetting an id of its own, which is returned then.
    ///
    /// # Errors
    /// As for [`Hub::publish`]. Nothing is forgotten then.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// # let hub = server.hub();
    /// let id = hub.publish("orders", Event::new("7"))?;
    /// assert_eq!(hub.forget("orders")?, Some(id));
    /// assert!(hub.newest("orders")?.is_none());
    /// # Ok(()) }
    /// ```
    pub fn forget(&self, topic: &str) -> io::Result<Option<Id>> {
        self.core.forget(topic)
    }

    /// The topics that are in use, in the order of their names: those with subscribers, the program's own included, and
    /// those that keep events.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// # let hub = server.hub();
    /// hub.publish("orders", Event::new("7"))?;
    /// for topic in hub.topics() {
    ///     println!("{}: {} subscribers, {} events", topic.name, topic.subscribers, topic.events);
    /// #   assert_eq!((&*topic.name, topic.subscribers, topic.events), ("orders", 0, 1));
    /// }
    /// # Ok(()) }
    /// ```
    pub fn topics(&self) -> Vec<TopicOverview> {
        self.core.topics()
    }

    /// What a topic keeps now, oldest first; nothing for a topic that is not in use. It is read some at a time, as it
    /// is asked for, so what is forgotten meanwhile is left out.
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
            let Next::Events(run) = history.next(&names, read_to, &history.told(&names), &[], Framing::Plain) else {
                return None;
            };
            drop(history);
            read_to = run.newest();
            Some(read_all(&run).collect::<Vec<_>>())
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
        let Some(id) = history.newest_of(topic) else { return Ok(None) };
        let next = history.next(&names, id.before(), &history.told(&names), &[], Framing::Plain);
        drop(history);
        Ok(if let Next::Events(run) = next { read_all(&run).next() } else { None })
    }
}
