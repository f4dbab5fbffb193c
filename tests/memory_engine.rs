use brooklet::{Config, Engine, Entry, Event, Feed, Id, Server};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::UNIX_EPOCH;

/// Gives the events of several servers one order, in memory.
#[derive(Default)]
pub struct Memory(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    newest: Id,
    keys: HashMap<(String, String), Id>, // a real engine forgets them after `--keep-age`
    feeds: Vec<Feed>,
}

impl Memory {
    /// Takes a server in. It has not seen what came before, so it must not answer as if there had been nothing.
    pub fn join(&self, feed: Feed) {
        let mut inner = self.0.lock().unwrap();
        feed.missing_up_to(inner.newest).unwrap();
        inner.feeds.push(feed);
    }
}

impl Engine for Memory {
    fn publish(&self, entries: &[Entry]) -> io::Result<Vec<Id>> {
        let mut inner = self.0.lock().unwrap(); // held until all servers have it: so the feeds have one order, too
        let mut place = |entry: &Entry| {
            let key = entry.key().map(|key| (entry.topic().to_string(), key.to_string()));
            if let Some(first) = key.as_ref().and_then(|key| inner.keys.get(key)) {
                return *first; // published before
            } else if entry.is_forget() {
                inner.keys.retain(|(topic, _), _| topic != entry.topic());
            }
            let now = UNIX_EPOCH.elapsed().map_or(0, |time| time.as_millis() as u64);
            let Id { ms, seq } = inner.newest;
            let id = if now > ms { Id { ms: now, seq: 0 } } else { Id { ms, seq: seq + 1 } };
            inner.newest = id;
            inner.keys.extend(key.map(|key| (key, id)));
            inner.feeds.retain(|feed| feed.show(id, entry.clone()).is_ok()); // or that server has stopped
            id
        };
        Ok(entries.iter().map(&mut place).collect())
    }

    fn newest(&self) -> io::Result<Id> {
        Ok(self.0.lock().unwrap().newest)
    }
}
