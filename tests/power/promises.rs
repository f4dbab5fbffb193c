//! What the server has promised, and whether it keeps it: what was answered with 200 or shown to anybody is there with its
//! data, what was refused or deleted is not, nothing comes twice or out of nowhere, ids rise, what was sent to several topics
//! is in all of them or in none, a topic is deleted whole or not at all, and who may have missed something hears a gap.

use super::look::{Seen, Sight};
use brooklet::Id;
use std::fmt;
use std::ops::Range;

#[derive(Clone, Debug)]
pub struct Event {
    pub topic: String,
    /// No two events of a topic have the same; the first word is enough to tell them apart.
    pub data: String,
    pub key: Option<String>,
    /// The numbers of all that are sent in one request, with the same data, each to another topic.
    pub together: Range<usize>,
    pub id: Option<Id>,
    pub state: State,
    /// None of those that were sent together was there before: so all of them are published, or none.
    is_part: bool,
    deletion: Deletion,
    /// It was deleted, and may be there again after a loss of power: sent anew, it would be there twice.
    pub may_come_back: bool,
    /// It was there before the power was lost, which may have taken it.
    was_here: bool,
    /// In which step it was sent last: what is sent in a later one is sent after this one's answer.
    step: usize,
}

/// What is known of an event. What is not durable holds while the machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It was sent, and nobody knows what became of it.
    Open,
    Here {
        durable: bool,
    },
    Gone {
        durable: bool,
    },
}

/// Whether a `DELETE` of its topic, sent in this step, may have taken an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deletion {
    None,
    /// Nobody knows what became of it.
    Open(usize),
    /// It was refused, or has not happened. It still may where the power is lost, until it is safe that it has been undone.
    Undone(usize),
}

/// What a client came to know while a server ran.
#[derive(Clone, Debug)]
pub enum News {
    /// Events, by their numbers, were about to be sent together in this step, perhaps again.
    Sent(Range<usize>, usize),
    /// One was answered with 200 and this id (a line of many has none).
    Published(usize, Option<Id>),
    Refused(usize),
    /// A topic was about to be deleted in this step.
    DeletionSent(String, usize),
    Deleted(String),
    NotDeleted(String),
    /// A whole stream of all topics, from the earliest on, as the first thing after a start.
    SawAtStart(Vec<Seen>),
    /// The same later, while the disk may hold what must yet be undone.
    Saw(Vec<Seen>),
}

#[derive(Clone)]
pub struct Promises {
    pub events: Vec<Event>,
    /// How many the server keeps of each topic.
    pub keep_events: usize,
    /// The highest id that anybody has seen.
    pub highest: Id,
    /// The topic and the id of all that anybody has seen, also of what is gone by now.
    pub shown: Vec<(String, Id)>,
    /// Whoever has not seen more than this must hear a gap: what came before was not synced when the power was lost.
    pub may_miss_up_to: Option<Id>,
}

impl Promises {
    pub fn none(keep_events: usize) -> Promises {
        let (events, shown) = (Vec::new(), Vec::new());
        Promises { events, keep_events, highest: Id::default(), shown, may_miss_up_to: None }
    }

    /// Thinks of an event to send to these topics at once, and gives its number in each.
    pub fn event(&mut self, topics: &[&str], data: &str, key: Option<String>) -> Range<usize> {
        let together = self.events.len()..self.events.len() + topics.len();
        self.events.extend(topics.iter().map(|topic| Event {
            topic: topic.to_string(),
            data: data.into(),
            key: key.clone(),
            together: together.clone(),
            id: None,
            state: State::Gone { durable: true },
            is_part: false,
            deletion: Deletion::None,
            may_come_back: false,
            was_here: false,
            step: 0,
        }));
        together
    }

    /// Whether the promises bear this news.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, news: &News) -> Result<(), String> {
        match news {
            News::Published(number, Some(id)) => {
                let event = &self.events[*number];
                let again = event.id.filter(|_| matches!(event.state, State::Here { .. }));
                match again {
                    Some(first) if first != *id => Err(format!(
                        "{} is there with the id {first}, and was published again as {id}",
                        name(&event.data)
                    )),
                    None if *id <= self.highest && event.id != Some(*id) => {
                        Err(format!("{} got the id {id}, though {} was seen before", name(&event.data), self.highest))
                    }
                    _ => Ok(()),
                }
            }
            News::SawAtStart(seen) | News::Saw(seen) => self.check_seen(seen),
            _ => Ok(()),
        }
    }

    fn check_seen(&self, seen: &[Seen]) -> Result<(), String> {
        if let Some(pair) = seen.windows(2).find(|pair| pair[0].id >= pair[1].id) {
            let (one, other) = (&pair[0], &pair[1]);
            return Err(format!(
                "{} with {} comes after {} with {}",
                name(&other.data),
                other.id,
                name(&one.data),
                one.id
            ));
        }
        for Seen { topic, id, data } in seen {
            if seen.iter().filter(|other| (&other.topic, &other.data) == (topic, data)).count() > 1 {
                return Err(format!("{} is there twice in {topic}, once with {id}", name(data)));
            } else if !self.events.iter().any(|event| (&event.topic, &event.data) == (topic, data)) {
                return Err(format!("nobody has sent {data:?} to {topic}, which has {id}"));
            }
        }
        for event in &self.events {
            match (event.state, event.find_in(seen), event.id) {
                (State::Here { .. }, None, id) if !event.may_be_deleted() && !self.may_be_forgotten(event, seen) => {
                    let id = id.map_or(String::new(), |id| format!(", with the id {id}"));
                    return Err(format!("{event} is lost, which was published or shown{id}"));
                }
                (State::Here { .. }, Some(found), Some(id)) if found.id != id => {
                    return Err(format!("{event} had the id {id}, and has {}", found.id));
                }
                (State::Gone { .. }, Some(found), _) => {
                    let was = "which was refused or deleted, or was not there when the server was asked";
                    return Err(format!("{event} is there with {}, {was}", found.id));
                }
                _ => {}
            }
        }
        self.check_whole(seen)
    }

    /// What was sent together, and the events of a topic that may have been deleted, are all there or none.
    fn check_whole(&self, seen: &[Seen]) -> Result<(), String> {
        let is_known = |event: &&Event| !self.may_be_forgotten(event, seen);
        for event in self.events.iter().filter(is_known) {
            let others = self.events.iter().filter(is_known);
            let (others, why): (Vec<&Event>, _) = match event.state {
                State::Open | State::Here { .. } if event.is_part && event.deletion == Deletion::None => {
                    let is_other = |other: &&Event| {
                        let is_known = !matches!(other.state, State::Gone { .. }) && other.deletion == Deletion::None;
                        other.together == event.together && other.is_part && is_known
                    };
                    (others.filter(is_other).collect(), "though they were sent together")
                }
                State::Here { .. } if event.may_be_deleted() => {
                    let is_other = |other: &&Event| {
                        let is_here = matches!(other.state, State::Here { .. });
                        other.topic == event.topic && other.deletion == event.deletion && is_here
                    };
                    (others.filter(is_other).collect(), "though their topic was deleted as a whole")
                }
                _ => continue,
            };
            let is_there = event.find_in(seen).is_some();
            if let Some(other) = others.iter().find(|other| other.find_in(seen).is_some() != is_there) {
                let [there, not] = if is_there { [event, *other] } else { [*other, event] };
                return Err(format!("{there} is there and {not} is not, {why}"));
            }
        }
        Ok(())
    }

    /// Whoever resumes hears a gap where something is missing after the cursor, whatever it was that took it.
    ///
    /// # Errors
    /// What was passed over in silence.
    pub fn check_resumed(&self, topic: &str, cursor: Id, found: &Sight) -> Result<(), String> {
        let is_found = |id: &Id| found.events.iter().any(|seen| seen.id == *id);
        let mut after = self.shown.iter().filter(|(of, id)| of == topic && *id > cursor);
        match after.find(|(_, id)| !is_found(id)) {
            Some((_, id)) if !found.begins_with_gap => {
                Err(format!("who resumes {topic} after {cursor} hears no gap, though {id} is missing"))
            }
            _ => Ok(()),
        }
    }

    fn may_be_forgotten(&self, event: &Event, seen: &[Seen]) -> bool {
        seen.iter().filter(|seen| seen.topic == event.topic).count() >= self.keep_events
    }

    /// As they were before a run, with the events that it has sent.
    pub fn before(&self, run: &Promises) -> Promises {
        let mut events = self.events.clone();
        for sent in &run.events[events.len()..] {
            let (id, state, is_part, deletion) = (None, State::Gone { durable: true }, false, Deletion::None);
            let (may_come_back, was_here) = (false, false);
            events.push(Event { id, state, is_part, deletion, may_come_back, was_here, ..sent.clone() });
        }
        Promises { events, ..self.clone() }
    }

    /// Takes the news in. With `fsync`, what it promises is durable.
    pub fn learn(&mut self, news: &News, fsync: bool) {
        match news {
            News::Sent(numbers, step) => {
                let is_here = |event: &Event| matches!(event.state, State::Here { .. });
                let is_new = !self.events[numbers.clone()].iter().any(is_here);
                for event in &mut self.events[numbers.clone()] {
                    event.step = *step;
                    if !is_here(event) {
                        (event.state, event.is_part, event.deletion) = (State::Open, is_new, Deletion::None);
                    }
                }
            }
            News::Published(number, id) => {
                let (step, state) = (self.events[*number].step, self.events[*number].state);
                let is_repeated = matches!(state, State::Here { .. }); // nothing was written for it
                self.events[*number].id = id.or(self.events[*number].id);
                self.is_here(*number, fsync);
                // What was refused before must have been undone, and that be safe, before more is written.
                for event in self.events.iter_mut().filter(|_| fsync && !is_repeated) {
                    match &mut event.state {
                        State::Gone { durable } if event.step < step => *durable = true,
                        _ => {}
                    }
                    if matches!(event.deletion, Deletion::Undone(of) if of < step) {
                        event.deletion = Deletion::None;
                    }
                }
            }
            News::Refused(number) => {
                let state = &mut self.events[*number].state;
                if !matches!(state, State::Here { .. }) {
                    *state = State::Gone { durable: false };
                }
            }
            News::DeletionSent(topic, step) => {
                for event in self.of_topic(topic).filter(|event| !matches!(event.state, State::Gone { .. })) {
                    event.deletion = Deletion::Open(*step);
                }
            }
            News::Deleted(topic) => {
                self.of_topic(topic).filter(|event| event.may_be_deleted()).for_each(|event| event.take_away(fsync));
            }
            News::NotDeleted(topic) => self.of_topic(topic).for_each(Event::undo_deletion),
            News::SawAtStart(seen) | News::Saw(seen) => {
                let is_start = matches!(news, News::SawAtStart(_));
                for number in 0..self.events.len() {
                    match self.events[number].find_in(seen) {
                        Some(found) => {
                            self.events[number].id = Some(found.id);
                            self.is_here(number, fsync);
                            match &mut self.events[number] {
                                event if is_start && fsync => event.deletion = Deletion::None,
                                event if is_start => event.undo_deletion(),
                                _ => {}
                            }
                        }
                        None => {
                            let is_lost = !self.may_be_forgotten(&self.events[number], seen);
                            if std::mem::take(&mut self.events[number].was_here) && is_lost {
                                self.may_miss_up_to = Some(self.highest);
                            }
                            let event = &mut self.events[number];
                            let was_gone = event.state == State::Gone { durable: true };
                            let durable = is_start && fsync || was_gone;
                            match event.may_be_deleted() {
                                true => event.take_away(durable),
                                false => event.state = State::Gone { durable },
                            }
                            event.deletion = Deletion::None;
                        }
                    }
                }
            }
        }
    }

    fn of_topic(&mut self, topic: &str) -> impl Iterator<Item = &mut Event> {
        self.events.iter_mut().filter(move |event| event.topic == topic)
    }

    fn is_here(&mut self, number: usize, fsync: bool) {
        let event = &mut self.events[number];
        let was_durable = event.state == State::Here { durable: true };
        event.state = State::Here { durable: fsync || was_durable };
        event.was_here = false;
        if let Some(shown) = event.id.map(|id| (event.topic.clone(), id)) {
            self.highest = self.highest.max(shown.1);
            if !self.shown.contains(&shown) {
                self.shown.push(shown);
            }
        }
    }

    /// Whether something was promised that the disk may never have had. Should the disk fail, that is lost when the kernel
    /// needs its memory, and nobody has promised otherwise.
    pub fn hang_on_memory(&self) -> bool {
        self.events.iter().any(|event| event.state == State::Here { durable: false })
    }

    /// What still holds where the power was lost while a server ran, which was ready, or was starting.
    pub fn lose_power(&mut self, fsync: bool, was_ready: bool) {
        let is_unsure = |event: &Event| event.state == State::Here { durable: false };
        if !fsync && (was_ready || self.events.iter().any(is_unsure)) {
            self.may_miss_up_to = Some(self.highest);
        }
        for event in &mut self.events {
            event.was_here = is_unsure(event) && event.deletion == Deletion::None;
            // Without `--fsync`, a journal that was just written anew may lack its end, and has a block for each topic.
            event.is_part &= fsync && !is_unsure(event);
            if matches!(event.state, State::Here { durable: false } | State::Gone { durable: false }) {
                event.state = State::Open;
            }
            if let Deletion::Undone(step) = event.deletion {
                event.deletion = Deletion::Open(step);
            }
        }
    }

    pub fn describe(&self) -> String {
        let line = |event: &Event| {
            let id = event.id.map_or("-".into(), |id| id.to_string());
            format!("    {event} {id} {:?}, deletion {:?}\n", event.state, event.deletion)
        };
        self.events.iter().map(line).collect()
    }
}

impl Event {
    fn find_in<'a>(&self, seen: &'a [Seen]) -> Option<&'a Seen> {
        seen.iter().find(|seen| (&seen.topic, &seen.data) == (&self.topic, &self.data))
    }

    fn may_be_deleted(&self) -> bool {
        matches!(self.deletion, Deletion::Open(_))
    }

    /// It was deleted. What was sent together with it may be deleted at another time, or not at all.
    fn take_away(&mut self, durable: bool) {
        (self.id, self.state, self.deletion) = (None, State::Gone { durable }, Deletion::None);
        self.is_part = false;
        self.may_come_back |= !durable;
    }

    fn undo_deletion(&mut self) {
        if let Deletion::Open(step) = self.deletion {
            self.deletion = Deletion::Undone(step);
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.topic, name(&self.data))
    }
}

/// What an event is called: its first word.
pub fn name(data: &str) -> &str {
    data.split(' ').next().unwrap_or(data)
}

/// What they object to, and what they bear.
mod tests {
    use super::*;

    const TOPICS: [&str; 2] = ["a", "b"];

    fn seen(topic: &str, ms: u64, data: &str) -> Seen {
        Seen { topic: topic.into(), id: Id { ms, seq: 0 }, data: data.into() }
    }

    fn learn(promises: &mut Promises, news: &[News]) {
        news.iter().for_each(|news| promises.learn(news, true));
    }

    /// Sent to both topics, without an answer; `one` was published to `a` before.
    fn sent() -> Promises {
        let mut promises = Promises::none(1000);
        let (one, two) = (promises.event(&TOPICS[..1], "one", None), promises.event(&TOPICS, "two", None));
        let published = News::Published(one.start, Some(Id { ms: 1, seq: 0 }));
        learn(&mut promises, &[News::Sent(one, 1), published, News::Sent(two, 2)]);
        promises
    }

    fn objects(promises: &Promises, found: &[Seen], to: &str) {
        let found = promises.check(&News::SawAtStart(found.to_vec()));
        assert!(found.as_ref().is_err_and(|what| what.contains(to)), "{found:?}");
    }

    #[test]
    fn what_was_sent_to_two_topics_is_in_both_or_in_none() {
        let one = seen("a", 1, "one");
        objects(&sent(), &[one.clone(), seen("a", 2, "two")], "a:two is there and b:two is not");
        objects(&sent(), &[one.clone(), seen("b", 3, "two")], "b:two is there and a:two is not");
        for whole in [vec![one.clone()], vec![one, seen("a", 2, "two"), seen("b", 3, "two")]] {
            assert_eq!(sent().check(&News::SawAtStart(whole)), Ok(()));
        }
    }

    #[test]
    fn a_deleted_topic_stays_deleted_and_who_lacks_some_of_it_hears_a_gap() {
        let mut promises = sent();
        learn(&mut promises, &[News::DeletionSent("a".into(), 3), News::Deleted("a".into())]);
        promises.lose_power(true, true);
        objects(&promises, &[seen("a", 1, "one")], "a:one is there with 1-0, which was refused or deleted");
        assert_eq!(promises.check(&News::SawAtStart(Vec::new())), Ok(()));
        let silent = Sight::default();
        assert!(promises.check_resumed("a", Id::default(), &silent).is_err_and(|what| what.contains("hears no gap")));
        assert_eq!(promises.check_resumed("a", Id { ms: 1, seq: 0 }, &silent), Ok(()), "it had all of it");
        let gap = Sight { begins_with_gap: true, ..silent };
        assert_eq!(promises.check_resumed("a", Id::default(), &gap), Ok(()));
    }

    #[test]
    fn a_topic_is_deleted_whole_and_not_where_that_was_refused() {
        let mut promises = sent();
        let all = [seen("a", 1, "one"), seen("a", 2, "two"), seen("b", 3, "two")];
        learn(&mut promises, &[News::Saw(all.to_vec()), News::DeletionSent("a".into(), 3)]);
        objects(&promises, &all[1..], "a:two is there and a:one is not, though their topic was deleted as a whole");
        for known in [&all[..], &all[2..]] {
            assert_eq!(promises.check(&News::SawAtStart(known.to_vec())), Ok(()));
        }
        learn(&mut promises, &[News::NotDeleted("a".into())]);
        objects(&promises, &all[2..], "a:one is lost");
        // What was refused may be on the disk, until more is written.
        let mut lost = promises.clone();
        lost.lose_power(true, true);
        assert_eq!(lost.check(&News::SawAtStart(all[2..].to_vec())), Ok(()));
        let three = promises.event(&TOPICS[1..], "three", None);
        let published = News::Published(three.start, Some(Id { ms: 4, seq: 0 }));
        learn(&mut promises, &[News::Sent(three, 4), published]);
        promises.lose_power(true, true);
        objects(&promises, &[all[2].clone(), seen("b", 4, "three")], "a:one is lost");
    }
}
