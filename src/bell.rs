//! Wakes those in the program who wait for a topic.
//!
//! A subscriber of the program's own has no queue: it reads the history whenever it is asked, as one on the network
//! does that is behind. A bell is all that it needs beside that, a channel of one place: full, it says that there may
//! be news. It is rung after the event was kept, so whoever hears it finds the event; and it rings once at the start,
//! so what was kept before is found, too.

use crate::sync::enter;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

/// The bells of all topics.
#[derive(Default)]
pub struct Bells {
    /// How many there are: most programs have none, and then publishing takes no lock for them. `Relaxed` will do,
    /// since both sides have the history's lock in between: who has found nothing kept there has counted itself before.
    count: AtomicUsize,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// Each with its number.
    by_topic: HashMap<Arc<str>, Vec<(u64, Sender<()>)>>,
    next: u64,
    /// The server has stopped: all bells are gone, and stay so.
    is_closed: bool,
}

/// Where a bell is heard. Give it back with [`Bells::remove`].
pub struct Bell {
    number: u64,
    /// Disconnected once the server has stopped.
    pub heard: Receiver<()>,
}

impl Bells {
    /// A bell for these topics, which has rung.
    pub fn add(&self, names: &[Arc<str>]) -> Bell {
        let (sender, heard) = bounded(1);
        let _ = sender.try_send(());
        let mut table = enter(&self.table);
        let number = table.next;
        table.next += 1;
        if !table.is_closed {
            for name in names {
                table.by_topic.entry(name.clone()).or_default().push((number, sender.clone()));
            }
            self.count.fetch_add(1, Relaxed);
        }
        Bell { number, heard }
    }

    pub fn remove(&self, names: &[Arc<str>], bell: &Bell) {
        let mut table = enter(&self.table);
        for name in names {
            let Some(bells) = table.by_topic.get_mut(name) else { return }; // closed
            bells.retain(|(number, _)| *number != bell.number);
            if bells.is_empty() {
                table.by_topic.remove(name);
            }
        }
        self.count.fetch_sub(1, Relaxed);
    }

    /// Tells whoever waits for this topic. Never waits: a bell that has rung and was not heard yet is enough.
    pub fn ring(&self, topic: &str) {
        if self.count.load(Relaxed) > 0
            && let Some(bells) = enter(&self.table).by_topic.get(topic)
        {
            for (_, bell) in bells {
                let _ = bell.try_send(());
            }
        }
    }

    /// Tells everybody: something was forgotten, in all topics.
    pub fn ring_all(&self) {
        for (_, bell) in enter(&self.table).by_topic.values().flatten() {
            let _ = bell.try_send(());
        }
    }

    /// The server stops: whoever waits wakes, and finds its bell disconnected.
    pub fn close(&self) {
        let mut table = enter(&self.table);
        table.is_closed = true;
        table.by_topic.clear();
    }
}
