//! An engine outside of the server that gives events their order, for topics that outgrow one machine.
//!
//! One server numbers its events itself. Several that share topics need one order over all of them, or a client that
//! comes back to another server could not resume there. So with an [`Engine`] nothing is numbered here: publishing asks
//! the engine, and whatever the engine has taken comes back to every server through its [`Feed`](crate::Feed), in one
//! order and with the same ids. The engine keeps the events, too, so it takes the place of the journal.
//!
//! An engine has three duties: it numbers, it feeds every server, and it says so where something may be missing. How it
//! does that is its own business; [`Entry::fields`] are how an entry can be written down in it.

use crate::event::{Event, Id, parse_retry};
use crate::text::invalid;
use std::io;

/// Gives the events of several servers one order. The servers share it; see [`Server::bind_with_engine`].
///
/// This one does it in memory, for servers of one process. The adapter of the command for Redis has the same parts.
/// ```
#[doc = include_str!("../tests/memory_engine.rs")]
///
/// // Two servers that share it:
/// use brooklet::{Config, Event, Server};
/// use std::sync::Arc;
///
/// # fn main() -> io::Result<()> {
/// let engine = Arc::new(Memory::default());
/// let (north, feed) = Server::bind_with_engine("127.0.0.1:0", Config::default(), engine.clone())?;
/// engine.join(feed);
/// let (south, feed) = Server::bind_with_engine("127.0.0.1:0", Config::default(), engine.clone())?;
/// engine.join(feed);
/// let first = north.hub().publish("news", Event::new("hello").key("7"))?; // to followers on either server
/// let again = south.hub().publish("news", Event::new("hello").key("7"))?;
/// assert_eq!(first, again); // published once
/// # Ok(()) }
/// ```
///
/// [`Server::bind_with_engine`]: crate::Server::bind_with_engine
pub trait Engine: Send + Sync {
    /// Gives each of these its id, above all that were given before, and sees to it that every server is shown them.
    /// [`Id::ms`] is the Unix time, by which a server that is shown an event late knows its age. The entries follow one
    /// another in the order, and where one is refused, none is taken. An event whose [key](Entry::key) was published
    /// before to its topic is not taken again: its id is the first one's. Forgetting a topic forgets its keys, too.
    ///
    /// Called on the publisher's thread, by many at once, and no lock of the server's is held. It must come back within
    /// half a second, or stopping the server would have to wait for it.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) is answered with 400; [`StorageFull`](io::ErrorKind::StorageFull)
    /// with 507 and everything else with 503, both with a `Retry-After`. Where nobody knows whether the entries were
    /// taken, the message must say so.
    fn publish(&self, entries: &[Entry]) -> io::Result<Vec<Id>>;

    /// The newest id that was given, or a later one up to which everything will be shown. Asked where a client resumes
    /// from an id that this server has not been shown yet: it may come from a server that is ahead. It must come back
    /// within half a second.
    ///
    /// # Errors
    /// Whatever it is, the client is told to come back later.
    fn newest(&self) -> io::Result<Id>;
}

/// Asks an engine, and looks whether it has kept its word.
pub fn publish(engine: &dyn Engine, entries: &[Entry]) -> io::Result<Vec<Id>> {
    let ids = if entries.is_empty() { Vec::new() } else { engine.publish(entries)? };
    match ids.len() == entries.len() {
        true => Ok(ids),
        false => Err(io::Error::other(format!("the engine gave {} ids to {} entries", ids.len(), entries.len()))),
    }
}

/// What an engine puts in order: an event of a topic, or that everything up to here is to be forgotten of a topic.
///
/// ```
/// use brooklet::{Entry, Event};
/// let entry = Entry::new("orders", Event::new("7").name("created").key("order-7"));
/// assert_eq!((entry.topic(), entry.key(), entry.is_forget()), ("orders", Some("order-7"), false));
/// assert_eq!(
///     entry.fields(),
///     [("topic", "orders".into()), ("event", "created".into()), ("data", "7".to_string())]
/// );
/// assert!(Entry::forget("orders").is_forget());
/// ```
#[derive(Clone, Debug)]
pub struct Entry {
    pub(crate) topic: String,
    /// None where the topic is to be forgotten.
    pub(crate) event: Option<Event>,
}

impl Entry {
    /// An event of this topic.
    pub fn new(topic: impl Into<String>, event: Event) -> Entry {
        Entry { topic: topic.into(), event: Some(event) }
    }

    /// Everything of this topic is to be forgotten.
    pub fn forget(topic: impl Into<String>) -> Entry {
        Entry { topic: topic.into(), event: None }
    }

    /// The topic's name.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// The event's [key](Event::key), if it has one.
    pub fn key(&self) -> Option<&str> {
        self.event.as_ref()?.key.as_deref()
    }

    /// Whether the topic is to be forgotten.
    pub fn is_forget(&self) -> bool {
        self.event.is_none()
    }

    /// The entry as pairs of a name and a value: `topic`; then `event`, `retry` and `data`, of which only the last must
    /// be there; or `forget` without a value. The key is not among them: it is the engine's to look up and to keep.
    pub fn fields(&self) -> Vec<(&'static str, String)> {
        let mut fields = vec![("topic", self.topic.clone())];
        match &self.event {
            Some(event) => {
                fields.extend(event.name.clone().map(|name| ("event", name)));
                fields.extend(event.retry.map(|time| ("retry", time.as_millis().to_string())));
                fields.push(("data", event.data.clone()));
            }
            None => fields.push(("forget", String::new())),
        }
        fields
    }

    /// Reads what [`Entry::fields`] has written. Pairs with other names are passed over.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](io::ErrorKind::InvalidInput) where a field is missing or is nothing that an event
    /// can have.
    ///
    /// ```
    /// let entry = brooklet::Entry::from_fields([("topic", "news"), ("data", "hello")]).unwrap();
    /// assert_eq!(entry.fields(), [("topic", "news".to_string()), ("data", "hello".to_string())]);
    /// ```
    pub fn from_fields(fields: impl IntoIterator<Item = (impl AsRef<str>, impl Into<String>)>) -> io::Result<Entry> {
        let (mut topic, mut data, mut event, mut forget) = (None, None, Event::default(), false);
        for (name, value) in fields {
            match name.as_ref() {
                "topic" => topic = Some(value.into()),
                "data" => data = Some(value.into()),
                "event" => event.name = Some(value.into()),
                "retry" => event.retry = Some(parse_retry(&value.into())?),
                "forget" => forget = true,
                _ => {}
            }
        }
        let Some(topic) = topic else { return invalid("an entry without a topic") };
        match data {
            _ if forget => Ok(Entry::forget(topic)),
            Some(data) => Ok(Entry::new(topic, Event { data, ..event })),
            None => invalid("an entry without data"),
        }
    }
}
