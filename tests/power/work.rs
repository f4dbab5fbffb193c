//! What clients do while a server runs, and what fails meanwhile.

use super::disk::JOURNAL;
use super::look::Seen;
use super::promises::News;
use super::server::{Publisher, Server};
use super::trial::{Broken, TOPICS, Trial};
use brooklet::Id;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::thread;

impl Trial {
    /// What fails in the next run, or takes long, as arguments for strace, which counts the calls of each thread by itself.
    /// Of two for the same call, the later counts.
    pub fn faults(&mut self) -> Vec<String> {
        let random = &mut self.random;
        if self.plan.broken == Some(Broken::TrustsFailedSyncs) {
            return vec!["-e".into(), format!("inject=fdatasync,fsync:retval=0:when={}+", 2 + random.below(4))];
        }
        let mut faults = Vec::new();
        if random.below(3) == 0 {
            // Where some calls take long, as on a busy machine, threads meet that otherwise do not. In microseconds.
            let calls = ["close", "openat", "write", "fdatasync,fsync", "ftruncate"][random.below(5)];
            let side = ["enter", "exit"][random.below(2)];
            faults.extend(["-e".into(), format!("inject={calls}:delay_{side}=3000")]);
        }
        if !self.plan.disk_fails || random.below(4) == 0 {
            return faults;
        }
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

    /// Publishes, deletes, looks, publishes again.
    pub fn work(&mut self, server: &Server, dir: &Path, news: &mut Vec<(u64, News)>) -> Result<(), String> {
        let mut publisher = Publisher::to(server);
        let steps = if self.plan.grows { 8 } else { 3 + self.random.below(10) };
        for _ in 0..steps {
            self.step += 1;
            let is_limited = self.plan.disk_fails && self.random.below(6) == 0;
            let journal_bytes = fs::metadata(dir.join(JOURNAL)).map_or(0, |file| file.len());
            if is_limited {
                server.limit_files(Some(journal_bytes + self.random.below(400) as u64))?;
            }
            let mut found = Vec::new();
            let next = self.random.below(13);
            match if self.plan.grows && next != 6 { 7 } else { next } {
                0..6 => {
                    let (together, is_plain) = self.next(&TOPICS, journal_bytes);
                    self.send(server, &together, news);
                    found = self.publish(server, &mut publisher, &together);
                    if let [(_, News::Published(event, _))] = found[..]
                        && is_plain
                    {
                        let grown = fs::metadata(dir.join(JOURNAL)).map_or(0, |file| file.len()) as usize;
                        let length = self.promises.events[event].data.len();
                        self.overhead = grown.checked_sub(journal_bytes as usize + length).filter(|rest| *rest < 200);
                    }
                }
                6 => {
                    let topic = self.delete(server, news);
                    found = self.deleted(server, &mut publisher, topic);
                }
                7 | 8 => found = self.do_at_once(server, journal_bytes, news),
                9 => {
                    let events: Vec<_> = (0..2 + self.random.below(3)).map(|_| self.line(journal_bytes)).collect();
                    events.iter().for_each(|event| self.send(server, event, news));
                    found = self.publish_lines(server, &mut publisher, &events);
                }
                10 | 11 => {
                    let events = &self.promises.events;
                    let may_be_sent_again = |together: &Range<usize>| {
                        events[together.clone()].iter().all(|event| event.key.is_some() && !event.may_come_back)
                    };
                    let keyed = events.iter().map(|event| event.together.clone()).filter(may_be_sent_again);
                    let keyed: Vec<_> = keyed.collect();
                    if !keyed.is_empty() {
                        let together = keyed[self.random.below(keyed.len())].clone();
                        self.send(server, &together, news);
                        found = self.publish(server, &mut publisher, &together);
                    }
                }
                _ => {
                    let seen = server.look(&TOPICS, None)?.events;
                    self.take(server, News::Saw(seen.clone()), news)?;
                    self.check_resumed(server, &seen)?;
                }
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

    /// Whether somebody who comes back to a topic, after one of its events or before all, hears of what is missing. Who
    /// has everything else that is missing is the likeliest not to.
    pub fn check_resumed(&mut self, server: &Server, seen: &[Seen]) -> Result<(), String> {
        for topic in TOPICS {
            let shown = self.promises.shown.iter().filter(|(of, _)| of == topic).map(|(_, id)| *id);
            let mut shown: Vec<_> = shown.collect();
            let Some(first) = shown.iter().min() else { continue };
            shown.push(Id { ms: first.ms - 1, seq: 0 });
            shown.sort();
            let missing = shown.iter().rposition(|id| !seen.iter().any(|seen| seen.id == *id));
            let at = match self.random.below(4) {
                0 => self.random.below(shown.len()),
                _ => missing.unwrap_or_default().saturating_sub(1),
            };
            let cursor = shown[at];
            self.promises.check_resumed(topic, cursor, &server.look(&[topic], Some(cursor))?)?;
        }
        Ok(())
    }

    fn send(&mut self, server: &Server, together: &Range<usize>, news: &mut Vec<(u64, News)>) {
        self.note(server, News::Sent(together.clone(), self.step), news);
    }

    /// Notes that a topic is about to be deleted, and returns it.
    fn delete(&mut self, server: &Server, news: &mut Vec<(u64, News)>) -> &'static str {
        let topic = TOPICS[self.random.below(TOPICS.len())];
        self.note(server, News::DeletionSent(topic.into(), self.step), news);
        topic
    }

    fn note(&mut self, server: &Server, what: News, news: &mut Vec<(u64, News)>) {
        self.promises.learn(&what, self.fsync);
        news.push((server.mark(), what));
    }

    /// An event to publish, to one of these topics or to several at once, and whether it takes as much room beside its data as
    /// others do.
    fn next(&mut self, topics: &[&'static str], journal_bytes: u64) -> (Range<usize>, bool) {
        let mut topics = topics.to_vec();
        let (first, count) = (self.random.below(topics.len()), 1 + self.random.below(topics.len()));
        topics.rotate_left(first);
        topics.truncate(if self.random.below(3) == 0 { count } else { 1 });
        let is_plain = topics.len() == 1 && self.random.below(2) == 0;
        let data = self.data(journal_bytes, is_plain);
        let key = (!is_plain && self.random.below(4) > 0).then(|| format!("k{}", self.promises.events.len()));
        (self.promises.event(&topics, &data, key), is_plain)
    }

    fn line(&mut self, journal_bytes: u64) -> Range<usize> {
        let data = self.data(journal_bytes, true);
        self.promises.event(&TOPICS[..1], &data, None)
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

    fn publish(&self, server: &Server, publisher: &mut Publisher, together: &Range<usize>) -> Vec<(u64, News)> {
        let events = &self.promises.events[together.clone()];
        let topics: Vec<_> = events.iter().map(|event| event.topic.as_str()).collect();
        let key = events[0].key.as_ref().map_or(String::new(), |key| format!("?key={key}"));
        let answer = publisher.ask("POST", &format!("/events/{}{key}", topics.join(",")), &events[0].data);
        let mark = server.mark();
        let Some((status, body)) = answer else { return Vec::new() };
        let mut ids = body.lines().map(|id| id.parse().ok());
        let news = |event| match status {
            200 => News::Published(event, ids.next().flatten()),
            _ => News::Refused(event),
        };
        together.clone().map(news).map(|news| (mark, news)).collect()
    }

    fn deleted(&self, server: &Server, publisher: &mut Publisher, topic: &str) -> Vec<(u64, News)> {
        let news = match publisher.ask("DELETE", &format!("/events/{topic}"), "") {
            Some((200, _)) => News::Deleted(topic.into()),
            Some(_) => News::NotDeleted(topic.into()),
            None => return Vec::new(),
        };
        vec![(server.mark(), news)]
    }

    /// Two or three things from as many clients, which the journal may get in one write: events, or a topic is deleted
    /// and the others get some. Where the journal grows, a client sends several, so that some come while it is written
    /// anew.
    fn do_at_once(&mut self, server: &Server, journal_bytes: u64, news: &mut Vec<(u64, News)>) -> Vec<(u64, News)> {
        let (deletes_one_in, each) = if self.plan.grows { (4, 2) } else { (2, 1) };
        let deleted = (self.random.below(deletes_one_in) == 0).then(|| self.delete(server, news));
        let topics: Vec<_> = TOPICS.into_iter().filter(|topic| Some(*topic) != deleted).collect();
        let count = 2 + self.random.below(2) - usize::from(deleted.is_some());
        let events: Vec<_> = (0..count * each).map(|_| self.next(&topics, journal_bytes).0).collect();
        events.iter().for_each(|together| self.send(server, together, news));
        let this = &*self;
        let mut all = thread::scope(|scope| {
            let publish = |events: &[Range<usize>]| {
                let (events, mut publisher) = (events.to_vec(), Publisher::to(server));
                scope.spawn(move || {
                    events.iter().flat_map(|event| this.publish(server, &mut publisher, event)).collect()
                })
            };
            let mut each: Vec<_> = events.chunks(each).map(publish).collect();
            let delete = |topic| scope.spawn(move || this.deleted(server, &mut Publisher::to(server), topic));
            each.extend(deleted.map(delete));
            each.into_iter().flat_map(|one| one.join().unwrap()).collect::<Vec<_>>()
        });
        // In the order of the ids, as they are held against the highest so far.
        all.sort_by_key(|(_, news)| if let News::Published(_, id) = news { *id } else { None });
        all
    }

    fn publish_lines(&self, server: &Server, publisher: &mut Publisher, events: &[Range<usize>]) -> Vec<(u64, News)> {
        let lines: String = events.iter().map(|event| self.promises.events[event.start].data.clone() + "\n").collect();
        let Some((_, answer)) = publisher.ask("PUT", "/events/a", &lines) else { return Vec::new() };
        let mark = server.mark();
        let said = answer.split("published ").nth(1).unwrap_or("0").trim();
        let (count, last) = said.split_once(", last id ").map_or((said, None), |(count, id)| (count, id.parse().ok()));
        let count: usize = count.parse().unwrap_or_else(|_| panic!("how many were published? {answer:?}"));
        let news = |(at, event): (usize, &Range<usize>)| match at {
            _ if at + 1 == count => News::Published(event.start, last),
            _ if at < count => News::Published(event.start, None),
            _ => News::Refused(event.start),
        };
        events.iter().enumerate().map(|event| (mark, news(event))).collect()
    }
}
