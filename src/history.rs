//! What each topic keeps, and what it has forgotten.
//!
//! A topic keeps its newest events, bounded by count and age; all topics together stay inside a budget of bytes, and
//! the oldest event of all goes first. A topic remembers the newest id that it has forgotten: whoever resumes from
//! before that may have missed something, and is told so by a `gap`. A topic that nobody follows and that keeps nothing
//! leaves the table; the newest id that such topics have forgotten is one number, which counts for every topic that is
//! not in the table. At the start that number is the base, so whatever an earlier process had is a gap, too.
//!
//! Ids never go back, also when the clock does, so an id does not tell an age: each event has its moment beside it
//! ([`Steady`]). Moments and ids rise together, in each topic and over all. Nothing here waits: the caller has the
//! lock.

use crate::cells::{Chain, MOST_BYTES};
use crate::clock::{Steady, millis};
use crate::config::Config;
use crate::encoded::Parts;
use crate::entry::{Entry, Point};
use crate::event::Id;
use crate::store::Store;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::mem::replace;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// A topic may keep a million events, and to forget one takes some 100 ns to 2 µs with the lock held. So no more go at
/// a time, and others may have the lock in between.
pub const FORGOTTEN_AT_ONCE: usize = 1_000;

/// What subscribers ask of it is in `cursor.rs`, and what the journal does in `kept.rs`.
pub struct History {
    topics: HashMap<Arc<str>, Topic>,
    /// All kept events. They cost at most `keep_bytes`.
    store: Store,
    /// The oldest event of each topic that keeps any. The first of them is the oldest of all: the next to be forgotten.
    oldest: BTreeMap<Point, Arc<str>>,
    /// The newest id that subscribers may have seen, over all topics.
    newest: Id,
    /// The newest that was forgotten by topics which have left the table; a topic that enters it begins with this.
    newest_forgotten: Point,
    clock: Steady,
    /// An engine gives the ids, and not this server's clock.
    is_fed: bool,
    /// The newest moment of all events.
    moment_ms: u64,
    /// What was published before this moment is too old. It counts as forgotten, also before it is.
    limit_ms: u64,
    keep_events: usize,
    keep_bytes: usize,
    keep_age: Duration,
    topic_limit: usize,
}

#[derive(Default)]
pub struct Topic {
    pub name: Arc<str>,
    /// Oldest first.
    events: VecDeque<Chain>,
    /// What they cost.
    bytes: usize,
    newest_forgotten: Point,
    subscribers: usize,
}

/// What there is of one topic: see [`Hub::topics`](crate::Hub::topics), which has an example.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicOverview {
    /// Its name.
    pub name: Arc<str>,
    /// How many follow it now.
    pub subscribers: usize,
    /// How many events it keeps.
    pub events: usize,
    /// What they take of [`Config::keep_bytes`](crate::Config::keep_bytes), with bookkeeping.
    pub bytes: usize,
    /// The id of the newest event that is kept.
    pub newest: Option<Id>,
}

/// How much is kept.
pub struct Totals {
    pub topics: usize,
    pub events: usize,
    /// With what is kept beside the events' bytes.
    pub bytes: usize,
}

impl History {
    /// Nothing is kept, and everything up to `base` counts as forgotten.
    pub fn new(base: Id, is_fed: bool, config: &Config) -> History {
        let clock = Steady::start();
        History {
            topics: HashMap::new(),
            store: Store::new(config.keep_bytes.min(MOST_BYTES)),
            oldest: BTreeMap::new(),
            newest: base,
            newest_forgotten: Point { id: base, moment_ms: clock.before_start(base.ms) },
            clock,
            is_fed,
            moment_ms: 0,
            limit_ms: 0,
            keep_events: config.keep_events,
            keep_bytes: config.keep_bytes.min(MOST_BYTES),
            keep_age: config.keep_age,
            topic_limit: config.topics,
        }
    }

    pub fn newest(&self) -> Id {
        self.newest
    }

    pub fn is_fed(&self) -> bool {
        self.is_fed
    }

    pub fn totals(&self) -> Totals {
        Totals { topics: self.topics.len(), events: self.store.events, bytes: self.store.bytes }
    }

    /// How many bytes of the journal all kept events take.
    pub fn block_bytes(&self) -> u64 {
        self.store.block_bytes
    }

    /// What is in the table, in no order.
    pub fn overview(&self) -> Vec<TopicOverview> {
        let overview = |topic: &Topic| TopicOverview {
            name: topic.name.clone(),
            subscribers: topic.subscribers,
            events: topic.events.len(),
            bytes: topic.bytes,
            newest: topic.events.back().map(|chain| Entry::of(&self.store.cells, chain).point.id),
        };
        self.topics.values().map(overview).collect()
    }

    /// The newest event that a topic keeps.
    pub fn newest_of(&self, name: &str) -> Option<Id> {
        let newest = Entry::of(&self.store.cells, self.topics.get(name)?.events.back()?).point;
        Some(newest.id).filter(|_| newest.moment_ms >= self.limit_ms)
    }

    /// The id of the kept event that was published to this topic with this key.
    pub fn id_of_key(&self, name: &str, key: &str) -> Option<Id> {
        let id = self.store.id_of_key(name, key)?;
        let (entry, chain) = self.from(self.topics.get(name)?, |point| point.id >= id).next()?;
        Some(id).filter(|_| entry.point.id == id && entry.key(&self.store.cells, chain).as_deref() == Some(key))
    }

    /// Whether an event may be published to all of these topics, or too many names are in use.
    pub fn check_room(&self, names: &[&str]) -> io::Result<()> {
        self.check_room_within(self.topic_limit, names)
    }

    fn check_room_within(&self, limit: usize, names: &[&str]) -> io::Result<()> {
        let new = names.iter().filter(|name| !self.topics.contains_key(**name)).count();
        if new > 0 && self.topics.len() + new > limit {
            let reason = format!("all {limit} topic names are in use: use one of them, or try again later");
            return Err(io::Error::new(ErrorKind::QuotaExceeded, reason));
        }
        Ok(())
    }

    /// Keeps an event that is published now; ids must rise from call to call. Returns its topic's name if anyone
    /// follows it: only then must the lanes know of the event, since whoever follows the topic later finds it kept. And
    /// whether the budget is exceeded by then, so that the caller must [`History::fit`].
    pub fn insert(&mut self, name: &str, event: &Parts, key: Option<&str>) -> (Option<Arc<str>>, bool) {
        let moment_ms = if self.is_fed { self.moment_of(event.id) } else { self.clock.now_ms() };
        (self.keep(name, event, key, moment_ms), self.fit())
    }

    /// When an event was published that an engine shows, perhaps long after: at its start, or after it was away.
    /// Moments rise as ids do, and none is in the future.
    fn moment_of(&mut self, id: Id) -> u64 {
        self.moment_ms = id.ms.min(self.clock.now_ms()).max(self.moment_ms);
        self.moment_ms
    }

    /// Notes an id that belongs to no event here.
    pub fn reach(&mut self, id: Id) {
        self.newest = self.newest.max(id);
    }

    /// Counts everything up to `id` as forgotten by the topics that are not in the table.
    pub fn pass_over(&mut self, id: Id) {
        self.reach(id);
        self.newest_forgotten = Point { id: self.newest, moment_ms: self.moment_of(id) };
    }

    /// Counts everything up to `id` as forgotten, in every topic, where an engine has said so.
    pub fn miss_up_to(&mut self, id: Id) {
        self.pass_over(id);
        self.topics.values_mut().for_each(|topic| topic.newest_forgotten = self.newest_forgotten);
    }

    /// Keeps an event of an earlier process. What is too old goes at once, or a long journal would fill memory.
    pub fn restore(&mut self, name: &str, event: &Parts, key: Option<&str>) {
        self.expire();
        let moment_ms = self.clock.before_start(event.id.ms);
        self.keep(name, event, key, moment_ms);
        while self.fit() {}
    }

    fn keep(&mut self, name: &str, event: &Parts, key: Option<&str>, moment_ms: u64) -> Option<Arc<str>> {
        let (entry, chain) = self.store.keep(name, event, key, moment_ms);
        let topic = self.topic(name);
        let is_first = topic.events.is_empty();
        topic.events.push_back(chain);
        topic.bytes += entry.cost();
        let (name, count, is_followed) = (topic.name.clone(), topic.events.len(), topic.subscribers > 0);
        self.newest = self.newest.max(event.id);
        if is_first {
            self.oldest.insert(entry.point, name.clone());
        }
        if count > self.keep_events {
            self.forget_oldest_of(&name);
        }
        is_followed.then_some(name)
    }

    /// Forgets what a topic keeps up to `id`, all at once; [`History::expire`] frees it. Whoever resumes from before
    /// the newest of it hears a gap, and nobody else: what was not kept any more was forgotten before.
    pub fn forget(&mut self, name: &str, id: Id) {
        let Some(topic) = self.topics.get_mut(name) else { return };
        let entry = |chain: &Chain| Entry::of(&self.store.cells, chain);
        let count = topic.events.partition_point(|chain| entry(chain).point.id <= id);
        let rest = topic.events.split_off(count); // at the start there may be some
        let forgotten = replace(&mut topic.events, rest);
        let (Some(first), Some(last)) = (forgotten.front().map(entry), forgotten.back().map(entry)) else { return };
        let next = topic.events.front().map(|next| entry(next).point);
        topic.bytes = topic.events.iter().map(|chain| entry(chain).cost()).sum();
        topic.newest_forgotten = topic.newest_forgotten.max(last.point);
        let name = topic.name.clone();
        self.oldest.remove(&first.point);
        self.store.give_up(name.clone(), forgotten);
        self.note_oldest_of(&name, next);
    }

    /// Forgets some of what is too old, and hides the rest of it; but first it frees some of what was forgotten.
    /// Whoever looks at the history calls this first (`Core::history`). False once that is all.
    pub fn expire(&mut self) -> bool {
        self.limit_ms = self.ago_ms(self.keep_age);
        self.forget_oldest_while(|history, oldest| oldest.moment_ms < history.limit_ms)
    }

    /// Forgets some of what does not fit into the budget. False once that is all.
    pub fn fit(&mut self) -> bool {
        let is_over = |history: &History| history.store.bytes > history.keep_bytes;
        is_over(self) && self.forget_oldest_while(|history, _| is_over(history))
    }

    fn forget_oldest_while(&mut self, is_due: impl Fn(&History, &Point) -> bool) -> bool {
        for _ in self.store.free_some(FORGOTTEN_AT_ONCE)..FORGOTTEN_AT_ONCE {
            let oldest = self.oldest.first_key_value().filter(|(oldest, _)| is_due(self, oldest));
            let Some(name) = oldest.map(|(_, name)| name.clone()) else { return false };
            self.forget_oldest_of(&name);
        }
        true
    }

    /// Counts a new subscriber of these topics, or of none of them. The last quarter of the names is for publishing:
    /// whoever may only read must not use them up with invented ones.
    pub fn subscribe(&mut self, names: &[String]) -> io::Result<Arc<[Arc<str>]>> {
        let limit = self.topic_limit - self.topic_limit / 4;
        let mut taken: Vec<Arc<str>> = Vec::with_capacity(names.len());
        for name in names {
            if let Err(full) = self.check_room_within(limit, &[name]) {
                self.unsubscribe(&taken);
                return Err(full);
            }
            let topic = self.topic(name);
            topic.subscribers += 1;
            taken.push(topic.name.clone());
        }
        Ok(taken.into())
    }

    pub fn unsubscribe(&mut self, names: &[Arc<str>]) {
        for name in names {
            if let Some(topic) = self.topics.get_mut(name) {
                topic.subscribers -= 1;
            }
            self.remove_if_unused(name);
        }
    }

    /// Notes what an earlier process has forgotten: of one topic, or of all that are not in the table. What was
    /// restored of that topic, up to this id, was deleted.
    pub fn restore_newest_forgotten(&mut self, name: Option<&str>, id: Id) {
        let point = Point { id, moment_ms: self.clock.before_start(id.ms) };
        match name {
            None => self.newest_forgotten = self.newest_forgotten.max(point),
            Some(name) => {
                // Looked up first: a topic that keeps nothing leaves the table. It may have forgotten more than that.
                let known = self.topics.get(name).map_or(point, |topic| topic.newest_forgotten);
                self.forget(name, id);
                self.store.free_some(usize::MAX);
                self.topic(name).newest_forgotten = known.max(point);
            }
        }
        self.newest = self.newest.max(id);
    }

    /// Ends restoring: topics of which only a mark was found leave the table.
    pub fn remove_unused(&mut self) {
        let unused = self.topics.values().filter(|topic| topic.events.is_empty());
        let names: Vec<_> = unused.map(|topic| topic.name.clone()).collect();
        names.iter().for_each(|name| self.remove_if_unused(name));
    }

    /// Counts everything up to `id` as forgotten, in every topic.
    pub fn count_as_forgotten(&mut self, id: Id) {
        self.newest = self.newest.max(id);
        self.newest_forgotten = Point { id: self.newest, moment_ms: self.clock.now_ms() };
        self.topics.values_mut().for_each(|topic| topic.newest_forgotten = self.newest_forgotten);
    }

    /// The oldest event of each topic that keeps any.
    pub fn oldest_of_each(&self) -> impl Iterator<Item = (Id, Arc<str>)> {
        self.oldest.iter().map(|(point, name)| (point.id, name.clone()))
    }

    /// The newest id that this topic has forgotten, or any other where it is not in the table.
    pub fn newest_forgotten(&self, name: &str) -> Id {
        self.topics.get(name).map_or(self.newest_forgotten, |topic| self.forgotten_by(topic)).id
    }

    /// The newest that a topic has forgotten.
    pub fn forgotten_by(&self, topic: &Topic) -> Point {
        let old = self.count_old(topic).checked_sub(1).and_then(|last| topic.events.get(last));
        let newest = old.map_or(topic.newest_forgotten, |chain| Entry::of(&self.store.cells, chain).point);
        newest.max(topic.newest_forgotten)
    }

    /// Whether there is more to be forgotten, or freed.
    pub fn has_more(&self) -> bool {
        self.store.has_given_up() || self.has_old()
    }

    fn has_old(&self) -> bool {
        self.oldest.keys().next().is_some_and(|oldest| oldest.moment_ms < self.limit_ms)
    }

    /// How many events of a topic are too old, and to be forgotten yet.
    fn count_old(&self, topic: &Topic) -> usize {
        let count = || {
            topic.events.partition_point(|chain| Entry::of(&self.store.cells, chain).point.moment_ms < self.limit_ms)
        };
        if self.has_old() { count() } else { 0 }
    }

    /// The topics that keep events, each with the newest id that it has forgotten; and the newest of any other topic.
    pub fn newest_forgotten_of_each(&self) -> (Vec<(Arc<str>, Id)>, Id) {
        let (used, unused): (Vec<_>, Vec<_>) = self.topics.values().partition(|topic| !topic.events.is_empty());
        let others = unused.iter().map(|topic| topic.newest_forgotten).fold(self.newest_forgotten, Point::max);
        (used.iter().map(|topic| (topic.name.clone(), self.forgotten_by(topic).id)).collect(), others.id)
    }

    /// The topic, put into the table if it is not there. The caller must keep an event or count a subscriber at once:
    /// nothing removes a topic that was never used.
    fn topic(&mut self, name: &str) -> &mut Topic {
        let name: Arc<str> = name.into();
        let new = Topic { name: name.clone(), newest_forgotten: self.newest_forgotten, ..Topic::default() };
        self.topics.entry(name).or_insert(new)
    }

    /// Those of these topics that are in the table: of a subscriber's, all.
    pub fn topics(&self, names: &[Arc<str>]) -> impl Iterator<Item = &Topic> {
        names.iter().filter_map(|name| self.topics.get(name))
    }

    fn forget_oldest_of(&mut self, name: &Arc<str>) {
        let Some(topic) = self.topics.get_mut(name) else { return };
        let Some(chain) = topic.events.pop_front() else { return };
        let entry = Entry::of(&self.store.cells, &chain);
        self.oldest.remove(&entry.point);
        topic.bytes -= entry.cost();
        topic.newest_forgotten = topic.newest_forgotten.max(entry.point);
        // Room that a busier hour has reserved is given back: the budget does not count it.
        if topic.events.len() * 4 < topic.events.capacity() {
            topic.events.shrink_to(topic.events.len() * 2);
        }
        let next = topic.events.front().map(|next| Entry::of(&self.store.cells, next).point);
        self.store.free(name, chain);
        self.note_oldest_of(name, next);
    }

    /// Notes which event of a topic is the oldest now.
    fn note_oldest_of(&mut self, name: &Arc<str>, oldest: Option<Point>) {
        match oldest {
            Some(oldest) => drop(self.oldest.insert(oldest, name.clone())),
            None => self.remove_if_unused(name),
        }
    }

    /// What it had forgotten goes into the one number first, or a later subscriber would hear no gap.
    fn remove_if_unused(&mut self, name: &str) {
        if let Some(topic) = self.topics.get(name).filter(|t| t.subscribers == 0 && t.events.is_empty()) {
            self.newest_forgotten = self.newest_forgotten.max(topic.newest_forgotten);
            self.topics.remove(name);
        }
    }

    /// The moment that long ago.
    pub fn ago_ms(&self, time: Duration) -> u64 {
        self.clock.now_ms().saturating_sub(millis(time))
    }

    /// The newest that any of these topics has forgotten.
    pub fn newest_forgotten_of(&self, names: &[Arc<str>]) -> Point {
        self.topics(names).map(|topic| self.forgotten_by(topic)).max().unwrap_or(self.newest_forgotten)
    }

    /// The kept events of a topic after `cursor`, oldest first.
    pub fn after<'a>(&'a self, topic: &'a Topic, cursor: Id) -> impl Iterator<Item = (Entry, &'a Chain)> {
        self.from(topic, move |point| point.id > cursor)
    }

    /// The first of the newest `count` events that a topic keeps.
    pub fn first_of_newest(&self, topic: &Topic, count: u64) -> Option<Id> {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let first = topic.events.get(topic.events.len().saturating_sub(count).max(self.count_old(topic)))?;
        Some(Entry::of(&self.store.cells, first).point.id)
    }

    /// The first kept event of a topic since that moment.
    pub fn first_since(&self, topic: &Topic, moment_ms: u64) -> Option<Id> {
        self.from(topic, |point| point.moment_ms >= moment_ms).next().map(|(entry, _)| entry.point.id)
    }

    /// The kept events of a topic from the first one on that `is_there`.
    fn from<'a>(
        &'a self,
        topic: &'a Topic,
        is_there: impl Fn(Point) -> bool,
    ) -> impl Iterator<Item = (Entry, &'a Chain)> {
        let first = topic.events.partition_point(|chain| !is_there(Entry::of(&self.store.cells, chain).point));
        topic.events.range(first.max(self.count_old(topic))..).map(|chain| (Entry::of(&self.store.cells, chain), chain))
    }

    /// Appends a part of a kept event's bytes to `out`.
    pub fn copy(&self, chain: &Chain, part: Range<usize>, out: &mut Vec<u8>) {
        Entry::copy(&self.store.cells, chain, part, out);
    }
}
