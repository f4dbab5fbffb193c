//! Where a stream starts in the history, what comes next, and which gaps it is told of.
//!
//! A cursor is an id: the subscriber has had everything up to it. Whether it has just connected, resumes or was too
//! slow, it asks the same of the history: what comes after the cursor, in all of its topics, in one order? What was
//! forgotten after the cursor is never passed over in silence: a `gap` comes first. The gap's own id is a cursor, too,
//! after which comes all that is still kept. Like all of the history, nothing here waits: the caller has the lock.
//!
//! One cursor is not enough where each topic starts at its own newest events: the cursor begins before the first of all
//! of them, and each topic has a floor besides, up to which its events are passed over. Floors are ids of events that
//! were published before the stream began, so they only matter until all from before that has been replayed.

use crate::cells::Chain;
use crate::clock::{millis, now_ms};
use crate::encoded::{Encoded, Framing, Run};
use crate::entry::Entry;
use crate::event::{Event, Id};
use crate::history::{History, Topic};
use std::sync::Arc;
use std::time::Duration;

/// Where a new stream wants to begin: now, with all that is kept, with the newest of each topic, some time ago, or
/// after an id.
#[derive(Clone, Copy)]
pub enum Start {
    Now,
    Earliest,
    Newest(u64),
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
            Start::Newest(_) => (self.floors(names, from).into_iter().min().unwrap_or(self.newest()), None),
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

    /// Up to where each topic is passed over, for streams that begin with the newest of each. Where a topic keeps
    /// nothing, whatever comes is wanted.
    pub fn floors(&self, names: &[Arc<str>], from: Start) -> Box<[Id]> {
        match from {
            Start::Newest(count) => {
                let floor = |topic: &Topic| self.first_of_newest(topic, count).map_or(self.newest(), Id::before);
                self.topics(names).map(floor).collect()
            }
            _ => Box::default(),
        }
    }

    /// Whether [`History::next`] has anything for a subscriber at `cursor`.
    pub fn has_news(&self, names: &[Arc<str>], cursor: Id, told: &[Id], floors: &[Id]) -> bool {
        let mut heads = self.heads(names, cursor, floors);
        self.has_untold(names, cursor, told, floors) || heads.any(|(_, mut head)| head.next().is_some())
    }

    fn has_untold(&self, names: &[Arc<str>], cursor: Id, told: &[Id], floors: &[Id]) -> bool {
        let mut topics = self.topics(names).zip(told).zip(places(cursor, floors));
        topics.any(|((topic, told), place)| self.forgotten_by(topic).id > place.max(*told))
    }

    /// What of each topic comes after the cursor and its floor, oldest first.
    fn heads<'a>(
        &'a self,
        names: &'a [Arc<str>],
        cursor: Id,
        floors: &'a [Id],
    ) -> impl Iterator<Item = (&'a Topic, impl Iterator<Item = (Entry, &'a Chain)>)> {
        self.topics(names).zip(places(cursor, floors)).map(|(topic, place)| (topic, self.after(topic, place)))
    }

    /// What comes after `cursor` in all of these topics, in one order, up to one run. A gap comes first where a topic
    /// has forgotten something after the cursor and its floor that the subscriber was not told of. `told` has an id for
    /// each topic: with one for all, a gap told for one topic would hide what another forgets later. `floors` may be
    /// missing.
    pub fn next(&self, names: &[Arc<str>], cursor: Id, told: &[Id], floors: &[Id], framing: Framing) -> Next {
        if self.has_untold(names, cursor, told, floors) {
            return Next::Gap(self.gap(names, Some(cursor), cursor));
        }
        let mut run = Run::new(framing);
        let heads = self.heads(names, cursor, floors);
        let mut heads: Vec<_> = heads.map(|(topic, head)| (topic, head.peekable())).collect();
        loop {
            // In each topic the ids rise, so the next of all is the lowest of the topics' next ones.
            let ahead = heads.iter_mut().filter_map(|(topic, head)| Some((head.peek()?.0.point, topic, head)));
            let Some((_, topic, head)) = ahead.min_by_key(|(point, ..)| *point) else { break };
            let Some((entry, chain)) = head.next_if(|(entry, _)| run.has_room_for(entry.layout)) else { break };
            let wire = entry.layout.wire(framing);
            run.append(&topic.name, entry.point.id, |bytes| self.copy(chain, wire, bytes));
        }
        if run.bytes.is_empty() { Next::Nothing } else { Next::Events(run) }
    }

    /// The newest id that each of these topics has forgotten: kept by a subscriber that has just been told of a gap.
    pub fn told(&self, names: &[Arc<str>]) -> Vec<Id> {
        self.topics(names).map(|topic| self.forgotten_by(topic).id).collect()
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

/// After which id each topic goes on: the cursor, or its floor.
fn places(cursor: Id, floors: &[Id]) -> impl Iterator<Item = Id> {
    (0..).map(move |index| floors.get(index).copied().unwrap_or_default().max(cursor))
}
