//! Where a stream starts in the history, what comes next, and which gaps it is told of.
//!
//! A cursor is an id: the subscriber has had everything up to it. Whether it has just connected, resumes or was too slow,
//! it asks the same of the history: what comes after the cursor, in all of its topics, in one order? What was forgotten
//! after the cursor is never passed over in silence: a `gap` comes first. The gap's own id is a cursor, too, after which
//! comes all that is still kept. Like all of the history, nothing here waits: the caller has the lock.

use crate::clock::{millis, now_ms};
use crate::encoded::{Encoded, Framing, Run};
use crate::event::{Event, Id};
use crate::history::History;
use std::slice;
use std::sync::Arc;
use std::time::Duration;

/// Where a new stream wants to begin: now, with all that is kept, some time ago, or after an id.
#[derive(Clone, Copy)]
pub enum Start {
    Now,
    Earliest,
    Ago(Duration),
    /// None where it cannot be read. It gets a gap: a browser gives up for good on a refusal.
    After(Option<Id>),
}

/// What a subscriber that is behind gets next.
pub enum Next {
    /// The event that says that events before the next one may have been forgotten.
    Gap(Encoded),
    Events(Run),
    Nothing,
}

impl History {
    /// The cursor that a new stream starts after, and the gap that it must hear first.
    pub fn start(&self, names: &[Arc<str>], from: Start) -> (Id, Option<Encoded>) {
        match from {
            Start::Now => (self.newest(), None),
            Start::Earliest => (self.oldest_after(names, Id::default()).map_or(self.newest(), Id::before), None),
            Start::Ago(time) => self.start_ago(names, time),
            Start::After(cursor) => self.resume(names, cursor),
        }
    }

    /// From that long ago. By moments, not ids; only what the gap says of it is by the clock on the wall.
    fn start_ago(&self, names: &[Arc<str>], time: Duration) -> (Id, Option<Encoded>) {
        let limit_ms = self.ago_ms(time);
        let first = self.topics(names).filter_map(|topic| self.first_since(topic, limit_ms)).min();
        let cursor = first.map_or(self.newest(), Id::before);
        if self.newest_forgotten_of(names).moment_ms < limit_ms {
            return (cursor, None);
        }
        let after = Id { ms: now_ms().saturating_sub(millis(time)), seq: 0 };
        let gap = self.gap(names, Some(after), cursor);
        (gap.id, Some(gap))
    }

    fn resume(&self, names: &[Arc<str>], asked: Option<Id>) -> (Id, Option<Encoded>) {
        // An id later than both the newest id and the clock can only be from before this server's history was lost: all
        // that is kept is new to its owner. An id between the two means "from now on", which is after the newest: if
        // the clock is set back, ids up to the asked one are still to come.
        // With an engine, ids are its alone, and it has been asked (`feed::reach`): nobody has given a later one.
        let is_known = |asked: &Id| *asked <= self.newest() || !self.is_fed() && asked.ms <= now_ms();
        let known = asked.filter(is_known).map(|asked| asked.min(self.newest()));
        match known {
            Some(cursor) if cursor >= self.newest_forgotten_of(names).id => (cursor, None),
            _ => {
                let gap = self.gap(names, asked, known.unwrap_or_default());
                (gap.id, Some(gap))
            }
        }
    }

    /// Whether [`History::next`] has anything for a subscriber at `cursor`.
    pub fn has_news(&self, names: &[Arc<str>], cursor: Id, told: &[Id]) -> bool {
        self.has_untold(names, cursor, told) || self.oldest_after(names, cursor).is_some()
    }

    fn has_untold(&self, names: &[Arc<str>], cursor: Id, told: &[Id]) -> bool {
        self.topics(names).zip(told).any(|(topic, told)| topic.newest_forgotten.id > cursor.max(*told))
    }

    /// What comes after `cursor` in all of these topics, in one order, up to one run. A gap comes first where a topic
    /// has forgotten something after the cursor that the subscriber was not told of. `told` has an id for each topic:
    /// with one for all, a gap told for one topic would hide what another forgets later.
    pub fn next(&self, names: &[Arc<str>], cursor: Id, told: &[Id], framing: Framing) -> Next {
        if self.has_untold(names, cursor, told) {
            return Next::Gap(self.gap(names, Some(cursor), cursor));
        }
        let mut run = Run::new(framing);
        let mut heads: Vec<_> = self.topics(names).map(|topic| self.after(topic, cursor).peekable()).collect();
        loop {
            // In each topic the ids rise, so the next of all is the lowest of the topics' next ones.
            let ahead = heads.iter_mut().filter_map(|head| Some((head.peek()?.0.point, head)));
            let Some((_, head)) = ahead.min_by_key(|(point, _)| *point) else { break };
            let Some((entry, chain)) = head.next_if(|(entry, _)| run.has_room_for(entry.layout)) else { break };
            run.append(entry.point.id, |bytes| self.copy(chain, entry.layout.wire(framing), bytes));
        }
        if run.bytes.is_empty() { Next::Nothing } else { Next::Events(run) }
    }

    /// Which of these topics keeps the event of this id.
    pub fn topic_of(&self, names: &[Arc<str>], id: Id) -> Option<Arc<str>> {
        names.iter().find(|name| self.oldest_after(slice::from_ref(*name), id.before()) == Some(id)).cloned()
    }

    /// The newest id that each of these topics has forgotten: kept by a subscriber that has just been told of a gap.
    pub fn told(&self, names: &[Arc<str>]) -> Vec<Id> {
        self.topics(names).map(|topic| topic.newest_forgotten.id).collect()
    }

    fn oldest_after(&self, names: &[Arc<str>], cursor: Id) -> Option<Id> {
        self.topics(names).filter_map(|topic| self.after(topic, cursor).next()).map(|(entry, _)| entry.point.id).min()
    }

    /// The first event after the cursor from which on all of these topics are whole.
    pub fn whole_from(&self, names: &[Arc<str>], cursor: Id) -> Option<Id> {
        self.oldest_after(names, cursor.max(self.newest_forgotten_of(names).id))
    }

    /// The event that says that something may be missing between `after`, the id that was asked for, and `oldest`, from
    /// which on all of these topics are whole. Its own id is just before all that is kept after the cursor, so whoever
    /// resumes from it gets all of that, though one topic may keep what is older than something that another forgot.
    fn gap(&self, names: &[Arc<str>], asked: Option<Id>, cursor: Id) -> Encoded {
        let newest_forgotten = self.newest_forgotten_of(names).id;
        let id = self.oldest_after(names, cursor).map_or(newest_forgotten, Id::before);
        let oldest = self.whole_from(names, cursor);
        let json = |id: Option<Id>| id.map_or("null".into(), |id| format!("\"{id}\""));
        let data = format!("{{\"after\":{},\"oldest\":{}}}", json(asked), json(oldest));
        Encoded::new(id, b"", Event::new(data).name("gap").encode_with_id(id).as_bytes())
    }
}
