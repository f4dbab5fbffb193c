//! What the server has promised, and whether it keeps it: what was answered with 200 or shown to anybody is there with its
//! data, what was refused is not, nothing comes twice or out of nowhere, ids rise, and who may have missed something hears
//! a gap.

use super::look::Seen;
use brooklet::Id;

#[derive(Clone, Debug)]
pub struct Event {
    pub topic: String,
    /// No two events have the same; the first word is enough to tell them apart.
    pub data: String,
    pub key: Option<String>,
    pub id: Option<Id>,
    pub state: State,
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

/// What a client came to know while a server ran.
#[derive(Clone, Debug)]
pub enum News {
    /// An event, by its number, was about to be sent in this step, perhaps again.
    Sent(usize, usize),
    /// It was answered with 200 and this id (a line of many has none).
    Published(usize, Option<Id>),
    Refused(usize),
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
    /// Whoever has not seen more than this must hear a gap: what came before was not synced when the power was lost.
    pub may_miss_up_to: Option<Id>,
}

impl Promises {
    pub fn none(keep_events: usize) -> Promises {
        Promises { events: Vec::new(), keep_events, highest: Id::default(), may_miss_up_to: None }
    }

    /// Thinks of an event to send, and gives its number.
    pub fn event(&mut self, topic: &str, data: String, key: Option<String>) -> usize {
        let (topic, state) = (topic.into(), State::Gone { durable: true });
        self.events.push(Event { topic, data, key, id: None, state, was_here: false, step: 0 });
        self.events.len() - 1
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
            News::Sent(..) | News::Published(..) | News::Refused(_) => Ok(()),
            News::SawAtStart(seen) | News::Saw(seen) => self.check_seen(seen),
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
        for Seen { id, data, .. } in seen {
            if seen.iter().filter(|other| other.data == *data).count() > 1 {
                return Err(format!("{} is there twice, once with {id}", name(data)));
            } else if !self.events.iter().any(|event| event.data == *data) {
                return Err(format!("nobody has sent {data:?}, which has {id}"));
            }
        }
        for event in &self.events {
            let found = seen.iter().find(|seen| seen.data == event.data);
            match (event.state, found, event.id) {
                (State::Here { .. }, None, id) if !self.may_be_forgotten(event, seen) => {
                    let id = id.map_or(String::new(), |id| format!(", with the id {id}"));
                    return Err(format!("{} is lost, which was published or shown{id}", name(&event.data)));
                }
                (State::Here { .. }, Some(found), Some(id)) if found.id != id => {
                    return Err(format!("{} had the id {id}, and has {}", name(&event.data), found.id));
                }
                (State::Gone { .. }, Some(found), _) => {
                    let was = "which was refused, or was not there when the server was asked";
                    return Err(format!("{} is there with {}, {was}", name(&event.data), found.id));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn may_be_forgotten(&self, event: &Event, seen: &[Seen]) -> bool {
        let in_topic = |seen: &&Seen| self.events.iter().any(|of| of.data == seen.data && of.topic == event.topic);
        seen.iter().filter(in_topic).count() >= self.keep_events
    }

    /// As they were before a run, with the events that it has sent.
    pub fn before(&self, run: &Promises) -> Promises {
        let mut events = run.events.clone();
        for (number, event) in events.iter_mut().enumerate() {
            let known = self.events.get(number);
            let unsent = (None, State::Gone { durable: true });
            (event.id, event.state) = known.map_or(unsent, |known| (known.id, known.state));
        }
        Promises { events, ..self.clone() }
    }

    /// Takes the news in. With `fsync`, what it promises is durable.
    pub fn learn(&mut self, news: &News, fsync: bool) {
        match news {
            News::Sent(number, step) => {
                let event = &mut self.events[*number];
                event.step = *step;
                if !matches!(event.state, State::Here { .. }) {
                    event.state = State::Open;
                }
            }
            News::Published(number, id) => {
                let (step, state) = (self.events[*number].step, self.events[*number].state);
                let is_repeated = matches!(state, State::Here { .. }); // nothing was written for it
                self.events[*number].id = id.or(self.events[*number].id);
                self.is_here(*number, fsync);
                // What was refused before must have been undone, and that be safe, before more is written.
                for event in self.events.iter_mut().filter(|event| event.step < step && !is_repeated) {
                    if let State::Gone { durable } = &mut event.state {
                        *durable |= fsync;
                    }
                }
            }
            News::Refused(number) => {
                let state = &mut self.events[*number].state;
                if !matches!(state, State::Here { .. }) {
                    *state = State::Gone { durable: false };
                }
            }
            News::SawAtStart(seen) | News::Saw(seen) => {
                let is_start = matches!(news, News::SawAtStart(_));
                for number in 0..self.events.len() {
                    match seen.iter().find(|seen| seen.data == self.events[number].data) {
                        Some(found) => {
                            self.events[number].id = Some(found.id);
                            self.is_here(number, fsync);
                        }
                        None => {
                            if std::mem::take(&mut self.events[number].was_here) {
                                self.may_miss_up_to = Some(self.highest);
                            }
                            let was_gone = self.events[number].state == State::Gone { durable: true };
                            self.events[number].state = State::Gone { durable: is_start && fsync || was_gone };
                        }
                    }
                }
            }
        }
    }

    fn is_here(&mut self, number: usize, fsync: bool) {
        let event = &mut self.events[number];
        let was_durable = event.state == State::Here { durable: true };
        event.state = State::Here { durable: fsync || was_durable };
        event.was_here = false;
        self.highest = self.highest.max(event.id.unwrap_or_default());
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
            event.was_here = is_unsure(event);
            if matches!(event.state, State::Here { durable: false } | State::Gone { durable: false }) {
                event.state = State::Open;
            }
        }
    }

    pub fn describe(&self) -> String {
        let line = |event: &Event| {
            let Event { topic, data, id, state, .. } = event;
            let id = id.map_or("-".into(), |id| id.to_string());
            format!("    {topic} {} {id} {state:?}\n", name(data))
        };
        self.events.iter().map(line).collect()
    }
}

/// What an event is called: its first word.
pub fn name(data: &str) -> &str {
    data.split(' ').next().unwrap_or(data)
}
