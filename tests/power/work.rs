//! What clients do while a server runs, and what fails meanwhile.

use super::disk::JOURNAL;
use super::promises::{Event, News};
use super::server::{Publisher, Server};
use super::trial::{Broken, TOPICS, Trial};
use std::fs;
use std::path::Path;
use std::thread;

impl Trial {
    /// What fails in the next run, as arguments for strace, which counts the calls of each thread by itself.
    pub fn faults(&mut self) -> Vec<String> {
        let random = &mut self.random;
        if self.plan.broken == Some(Broken::TrustsFailedSyncs) {
            return vec!["-e".into(), format!("inject=fdatasync,fsync:retval=0:when={}+", 2 + random.below(4))];
        } else if !self.plan.disk_fails || random.below(4) == 0 {
            return Vec::new();
        }
        let mut faults = Vec::new();
        for _ in 0..1 + random.below(2) {
            let calls = [
                "fdatasync",
                "fdatasync",
                "fsync",
                "fdatasync,fsync",
                "ftruncate",
                "?rename,?renameat,renameat2",
                "?unlink,unlinkat",
            ][random.below(7)];
            let error = ["EIO", "ENOSPC"][random.below(2)];
            let when = 1 + random.below(6);
            let when = match random.below(3) {
                0 => format!("{when}+"),
                1 => format!("{when}..{}", when + 2),
                _ => when.to_string(),
            };
            faults.extend(["-e".into(), format!("inject={calls}:error={error}:when={when}")]);
        }
        faults
    }

    /// Publishes, looks, publishes again.
    pub fn work(&mut self, server: &Server, dir: &Path, news: &mut Vec<(u64, News)>) -> Result<(), String> {
        let mut publisher = Publisher::to(server);
        let steps = if self.plan.grows { 24 } else { 3 + self.random.below(10) };
        for _ in 0..steps {
            self.step += 1;
            let is_limited = self.plan.disk_fails && self.random.below(6) == 0;
            let journal_bytes = fs::metadata(dir.join(JOURNAL)).map_or(0, |file| file.len());
            if is_limited {
                server.limit_files(Some(journal_bytes + self.random.below(400) as u64))?;
            }
            let mut found = Vec::new();
            match self.random.below(if self.plan.grows { 6 } else { 11 }) {
                0..6 => {
                    let (event, is_plain) = self.next(journal_bytes);
                    self.send(server, &[event], news);
                    found = self.publish(server, &mut publisher, event);
                    if let [(_, News::Published(..))] = found[..]
                        && is_plain
                    {
                        let grown = fs::metadata(dir.join(JOURNAL)).map_or(0, |file| file.len()) as usize;
                        let length = self.promises.events[event].data.len();
                        self.overhead = grown.checked_sub(journal_bytes as usize + length).filter(|rest| *rest < 200);
                    }
                }
                6 => {
                    let events: Vec<_> = (0..2 + self.random.below(2)).map(|_| self.next(journal_bytes).0).collect();
                    self.send(server, &events, news);
                    found = self.publish_at_once(server, &events);
                }
                7 => {
                    let events: Vec<_> = (0..2 + self.random.below(3)).map(|_| self.line(journal_bytes)).collect();
                    self.send(server, &events, news);
                    found = self.publish_lines(server, &mut publisher, &events);
                }
                8 | 9 => {
                    let events = &self.promises.events;
                    let keyed: Vec<_> = (0..events.len()).filter(|at| events[*at].key.is_some()).collect();
                    if !keyed.is_empty() {
                        let event = keyed[self.random.below(keyed.len())];
                        self.send(server, &[event], news);
                        found = self.publish(server, &mut publisher, event);
                    }
                }
                _ => self.take(server, News::Saw(server.look(&TOPICS, None)?.events), news)?,
            }
            if is_limited {
                server.limit_files(None)?;
            }
            for (mark, what) in found {
                self.promises.check(&what)?;
                self.promises.learn(&what, self.fsync);
                news.push((mark, what));
            }
        }
        Ok(())
    }

    fn send(&mut self, server: &Server, events: &[usize], news: &mut Vec<(u64, News)>) {
        for event in events {
            let what = News::Sent(*event, self.step);
            self.promises.learn(&what, self.fsync);
            news.push((server.mark(), what));
        }
    }

    /// An event to publish, and whether it takes as much room beside its data as others do.
    fn next(&mut self, journal_bytes: u64) -> (usize, bool) {
        let topic = TOPICS[self.random.below(TOPICS.len())];
        let is_plain = self.random.below(2) == 0;
        let data = self.data(journal_bytes, is_plain);
        let key = (!is_plain).then(|| format!("k{}", self.promises.events.len()));
        (self.promises.event(topic, data, key), is_plain)
    }

    fn line(&mut self, journal_bytes: u64) -> usize {
        let data = self.data(journal_bytes, true);
        self.promises.event(TOPICS[0], data, None)
    }

    fn data(&mut self, journal_bytes: u64, is_plain: bool) -> String {
        let (random, block) = (&mut self.random, self.disk.block_bytes);
        let name = format!("e{} ", self.promises.events.len());
        let to_the_border = self.overhead.map(|overhead| journal_bytes as usize + overhead + name.len());
        let length = match (random.below(10), to_the_border) {
            _ if self.plan.grows => 60_000,
            (0..3, Some(used)) if is_plain => used.next_multiple_of(block) - used + block * random.below(3),
            (0..6, _) => random.below(50),
            _ => random.below(3 * block),
        };
        name + &"x".repeat(length)
    }

    fn publish(&self, server: &Server, publisher: &mut Publisher, number: usize) -> Vec<(u64, News)> {
        let Event { topic, data, key, .. } = &self.promises.events[number];
        let key = key.as_ref().map_or(String::new(), |key| format!("?key={key}"));
        let news = match publisher.ask("POST", &format!("/events/{topic}{key}"), data) {
            Some((200, id)) => News::Published(number, id.trim().parse().ok()),
            Some(_) => News::Refused(number),
            None => return Vec::new(),
        };
        vec![(server.mark(), news)]
    }

    fn publish_at_once(&self, server: &Server, events: &[usize]) -> Vec<(u64, News)> {
        let mut all = thread::scope(|scope| {
            let publish = |event| scope.spawn(move || self.publish(server, &mut Publisher::to(server), event));
            let each: Vec<_> = events.iter().map(|event| publish(*event)).collect();
            each.into_iter().flat_map(|one| one.join().unwrap()).collect::<Vec<_>>()
        });
        // In the order of the ids, as they are held against the highest so far.
        all.sort_by_key(|(_, news)| if let News::Published(_, id) = news { *id } else { None });
        all
    }

    fn publish_lines(&self, server: &Server, publisher: &mut Publisher, events: &[usize]) -> Vec<(u64, News)> {
        let lines: String = events.iter().map(|event| self.promises.events[*event].data.clone() + "\n").collect();
        let Some((_, answer)) = publisher.ask("PUT", "/events/a", &lines) else { return Vec::new() };
        let mark = server.mark();
        let said = answer.split("published ").nth(1).unwrap_or("0").trim();
        let (count, last) = said.split_once(", last id ").map_or((said, None), |(count, id)| (count, id.parse().ok()));
        let count: usize = count.parse().unwrap_or_else(|_| panic!("how many were published? {answer:?}"));
        let news = |(at, event): (usize, &usize)| match at {
            _ if at + 1 == count => News::Published(*event, last),
            _ if at < count => News::Published(*event, None),
            _ => News::Refused(*event),
        };
        events.iter().enumerate().map(|event| (mark, news(event))).collect()
    }
}
