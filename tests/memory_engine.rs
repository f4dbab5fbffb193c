use brooklet::{Engine, Entry, Feed, Id};
use std::{collections::HashMap, io, sync::Mutex};

#[derive(Default)]
pub struct Memory(Mutex<Order>);
#[derive(Default)]
struct Order {
    newest: Id,
    keys: HashMap<String, HashMap<String, Id>>, // of each topic; a real engine forgets them after `--keep-age`
    feeds: Vec<Feed>,
}

impl Memory {
    pub fn join(&self, feed: Feed) {
        let order = &mut *self.0.lock().unwrap();
        feed.missing_up_to(order.newest).unwrap(); // this server has not seen what came before
        order.feeds.push(feed);
    }
}

impl Engine for Memory {
    fn publish(&self, entries: &[Entry]) -> io::Result<Vec<Id>> {
        let order = &mut *self.0.lock().unwrap(); // held until all servers have it: so they all have one order
        let place = |entry: &Entry| {
            let keys = order.keys.entry(entry.topic().to_string()).or_default();
            keys.retain(|_, _| !entry.is_forget());
            let next = order.newest.next();
            let id = entry.key().map_or(next, |key| *keys.entry(key.to_string()).or_insert(next));
            if id == next {
                order.newest = id; // else it was published before
                order.feeds.retain(|feed| feed.show(id, entry.clone()).is_ok()); // or that server has stopped
            }
            id
        };
        Ok(entries.iter().map(place).collect())
    }
    fn newest(&self) -> io::Result<Id> {
        Ok(self.0.lock().unwrap().newest)
    }
}
