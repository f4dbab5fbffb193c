//! Several topics at once, deleting, and the list of what there is.

use crate::common::*;
use crate::journal::Traced;
use brooklet::{Config, Event, Handle, Id};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::thread;

fn delete(addr: SocketAddr, topic: &str) -> Answer {
    Wire::ask(addr, &format!("DELETE /events/{topic} HTTP/1.1\r\nHost: localhost\r\n\r\n"))
}

fn ids(answer: &Answer) -> Vec<Id> {
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body.lines().map(|line| line.parse().unwrap()).collect()
}

/// The servers that a promise is shown on: without a journal, with one, and with one that is synced.
fn servers(dir: &Scratch) -> [Config; 3] {
    let journal = with_journal(&dir.path("events"));
    [
        Config::default(),
        journal.clone(),
        journal.with(|config| {
            config.fsync = true;
            config.journal = Some(dir.path("synced").into());
        }),
    ]
}

/// What a client gets that resumes after `cursor`: whether a gap comes first, and the data of what is kept.
fn resumed(addr: SocketAddr, topics: &str, cursor: Id) -> (bool, Vec<String>) {
    let mut stream = Wire::stream(addr, &format!("/events/{topics}?last_event_id={cursor}&poll=1ms"), "");
    let mut seen: Vec<_> = std::iter::from_fn(|| stream.event()).collect();
    stream.reset();
    let has_gap = seen.first().is_some_and(|first| first.is_gap());
    let data: Vec<_> = seen.split_off(has_gap.into()).iter().map(|event| event.data().to_string()).collect();
    (has_gap, data)
}

#[test]
fn an_event_for_several_topics_comes_to_each_with_neighbouring_ids() {
    let dir = Scratch::new();
    for config in servers(&dir) {
        let server = serve(config);
        let addr = server.addr().unwrap();
        let (mut both, _) = Wire::subscribe(addr, "/events/a,b", "");
        let (mut one, _) = Wire::subscribe(addr, "/events/b", "");
        let mut together = Vec::new();
        let others: Vec<Id> = thread::scope(|scope| {
            let publish = || (0..500).map(|_| server.hub().publish("c", Event::new("between")).unwrap()).collect();
            let others: thread::ScopedJoinHandle<Vec<Id>> = scope.spawn(publish);
            for n in 0..50 {
                together.push(ids(&post(addr, "/events/a,b,a?event=pair", &n.to_string())));
            }
            others.join().unwrap()
        });
        for (n, pair) in together.iter().enumerate() {
            assert_eq!(pair.len(), 2, "a topic that is named twice gets it once");
            assert!(!others.iter().any(|id| pair[0] < *id && *id < pair[1]), "{pair:?} are no neighbours");
            for (seen, id) in [(both.event(), pair[0]), (both.event(), pair[1]), (one.event(), pair[1])] {
                let seen = seen.unwrap();
                assert_eq!((seen.data(), seen.id(), seen.event.as_deref()), (&*n.to_string(), id, Some("pair")));
            }
        }
        let all: BTreeSet<Id> = together.iter().flatten().chain(&others).copied().collect();
        assert_eq!(all.len(), 600, "each id is given once");
    }
}

#[test]
fn with_several_topics_a_key_counts_for_each_by_itself() {
    let dir = Scratch::new();
    for config in servers(&dir) {
        let has_journal = config.journal.is_some();
        let server = serve(config.clone());
        let addr = server.addr().unwrap();
        let first = ids(&post(addr, "/events/b?key=k", "alone"));
        let three = ids(&post(addr, "/events/a,b,c?key=k", "three"));
        assert_eq!((three.len(), three[1]), (3, first[0]), "b has it already");
        assert!(first[0] < three[0] && three[0] < three[2]);
        assert_eq!(ids(&post(addr, "/events/c,a?key=k", "again")), [three[2], three[0]]);
        let look = |addr| ["a", "b", "c"].map(|topic| resumed(addr, topic, first[0]));
        let known = look(addr).map(|(_, data)| data);
        assert_eq!(known, [vec!["three".to_string()], vec![], vec!["three".into()]]);
        if has_journal {
            drop(server);
            let server = serve(config);
            let addr = server.addr().unwrap();
            assert_eq!(look(addr).map(|(_, data)| data), known);
            assert_eq!(ids(&post(addr, "/events/a,b,c?key=k", "after a restart")), three);
        }
    }
}

#[test]
fn what_one_topic_refuses_is_published_to_none() {
    let dir = Scratch::new();
    for config in servers(&dir) {
        let server = serve(config.with(|config| config.topics = 4));
        let addr = server.addr().unwrap();
        publish(addr, "/events/known", "x");
        let refused = post(addr, "/events/known,a,b,c,d", "x");
        assert_eq!((refused.status, refused.body.contains("all 4 topic names are in use")), (503, true), "{refused:?}");
        assert_eq!(post(addr, "/events/known,a,b,not%20one", "x").status, 400);
        assert_eq!(metric(addr, "published_total"), 1);
        assert_eq!(ids(&post(addr, "/events/known,a,b,c", "x")).len(), 4, "there is room for these");
    }
}

#[test]
fn a_journal_that_was_cut_anywhere_has_an_event_for_all_of_its_topics_or_for_none() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let server = serve(with_journal(&path));
    let addr = server.addr().unwrap();
    publish(addr, "/events/a", "before");
    let before = fs::metadata(&path).unwrap().len() as usize;
    let together = ids(&post(addr, "/events/a,b:1,c@x?key=k", "one\nand id: two"));
    let was = kept(addr, "a,b:1,c@x");
    drop(server);
    let whole = fs::read(&path).unwrap();
    for length in before..=whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let server = serve(with_journal(&path));
        let now = kept(server.addr().unwrap(), "a,b:1,c@x");
        assert_eq!(now, if length == whole.len() { was.clone() } else { was[..1].to_vec() }, "{length}");
        if length == whole.len() {
            let again = ids(&post(server.addr().unwrap(), "/events/a,b:1,c@x?key=k", "again"));
            assert_eq!(again, together, "ids and keys are as before");
            assert!(server.hub().publish("a", Event::new("x")).unwrap() > together[2]);
        }
    }
}

#[test]
fn an_id_that_a_block_of_several_topics_gives_to_its_last_is_damage_in_another_block() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let ms = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    let block = |topics: &str, seq: u64| sealed(&format!("topic: {topics}\n"), &format!("data: x\nid: {ms}-{seq}\n\n"));
    let mark = sealed("", "id: 1-0\n\n");
    fs::write(&path, [mark, block("a,b", 0), block("c", 1), block("d", 2)].concat()).unwrap();
    let server = serve(with_journal(&path));
    let found = ["a", "b", "c", "d"].map(|topic| kept(server.addr().unwrap(), topic).len());
    assert_eq!(found, [1, 1, 0, 1], "b has the id that c says it has");
}

#[test]
fn where_the_journal_fails_an_event_for_several_topics_comes_to_none() {
    if !has("strace") {
        return;
    }
    let dir = Scratch::new();
    let path = dir.path("events");
    drop(serve(with_journal(&path)));
    let traced = Traced::start(&["write:error=ENOSPC:when=2"], &path, &[]);
    let addr = traced.process.addr;
    let mut wire = Wire::connect(addr);
    assert_eq!(wire.post("/events/a,b", "one").status, 200);
    assert_eq!(wire.post("/events/a,b?key=k", "two").status, 507);
    assert_eq!(wire.post("/events/a,b?key=k", "three").status, 200);
    let data: Vec<_> = kept(addr, "a,b").iter().map(|frame| String::from_utf8(frame.clone()).unwrap()).collect();
    assert!(data.len() == 4 && data[..2].iter().all(|event| event.contains("data: one\n")), "{data:?}");
    assert!(data[2..].iter().all(|event| event.contains("data: three\n")), "{data:?}");
}

#[test]
fn what_was_deleted_is_gone_for_good_and_only_who_lacked_some_of_it_hears_a_gap() {
    let dir = Scratch::new();
    for config in servers(&dir) {
        let server = serve(config.clone());
        let mut addr = server.addr().unwrap();
        let old: Vec<Id> = (0..3).map(|n| publish(addr, "/events/a?key=k", &n.to_string()).parse().unwrap()).collect();
        assert_eq!(old[0], old[2]);
        let old = [old[0], publish(addr, "/events/a", "1").parse().unwrap()];
        publish(addr, "/events/b", "of another topic");
        let (mut live, _) = Wire::subscribe(addr, "/events/a", "");
        for _ in 0..2 {
            assert_eq!(delete(addr, "a").body, "forgotten\n", "whether anything was kept is not told");
        }
        assert_eq!(resumed(addr, "a", old[1]), (false, vec![]), "who had everything");
        assert_eq!(resumed(addr, "a", old[0]), (true, vec![]));
        let new: Id = publish(addr, "/events/a?key=k", "new").parse().unwrap();
        assert!(new > old[1], "the key is gone with its event");
        let seen = live.event().unwrap();
        assert_eq!((seen.data(), seen.id()), ("new", new), "the stream goes on, without a gap");
        let look = |addr| {
            let starts = [Id::default(), old[0], old[1], new].map(|cursor| resumed(addr, "a", cursor));
            (starts, kept(addr, "a,b").len())
        };
        let expected = |gap: bool, data: &[&str]| (gap, data.iter().map(|text| text.to_string()).collect::<Vec<_>>());
        let starts =
            [expected(true, &["new"]), expected(true, &["new"]), expected(false, &["new"]), expected(false, &[])];
        assert_eq!(look(addr), (starts.clone(), 2));
        drop(server);
        for _ in 0..2 {
            if config.journal.is_some() {
                let server = serve(config.clone());
                addr = server.addr().unwrap();
                assert_eq!(look(addr), (starts.clone(), 2), "after a restart");
            }
        }
    }
}

/// What a topic was told: its events by their ids, and how far it has forgotten.
#[derive(Default)]
struct Model {
    events: BTreeMap<Id, (&'static str, String)>,
    forgotten: BTreeMap<&'static str, Id>,
    newest: Id,
}

const NAMES: [&str; 3] = ["a", "b:2", "c@d"];

impl Model {
    /// Compares what one client gets with what must come.
    fn check(&self, addr: SocketAddr, topics: &[&'static str], cursor: Id) {
        let (has_gap, data) = resumed(addr, &topics.join(","), cursor);
        let lost = topics.iter().any(|topic| self.forgotten.get(topic).is_some_and(|id| *id > cursor));
        // A gap too many is allowed where a topic is not in the table, but not for who had everything.
        assert!(has_gap || !lost, "{topics:?} after {cursor}: no gap");
        assert!(!has_gap || cursor < self.newest, "{topics:?} after {cursor}: a gap, after {}", self.newest);
        let mut after = self.events.range((std::ops::Bound::Excluded(cursor), std::ops::Bound::Unbounded));
        let expected: Vec<_> = after.by_ref().filter(|(_, (topic, _))| topics.contains(topic)).collect();
        assert_eq!(data, expected.iter().map(|(_, (_, data))| data.clone()).collect::<Vec<_>>(), "{topics:?} {cursor}");
    }
}

/// Publishing to one topic and to several, deleting, being written anew and restarts, beside a model of a few lines.
#[test]
fn whatever_is_published_and_deleted_each_client_gets_what_a_simple_model_says() {
    let dir = Scratch::new();
    for (round, config) in servers(&dir).into_iter().enumerate() {
        let mut random = Random(round as u64 + 7);
        let mut server: Option<Handle> = Some(serve(config.clone()));
        let mut model = Model::default();
        let mut cursors = vec![server.as_ref().unwrap().hub().publish("z", Event::new("x")).unwrap()];
        for step in 0..400 {
            let addr = server.as_ref().unwrap().addr().unwrap();
            let topics = &NAMES[random.below(3)..][..1];
            match random.below(20) {
                0..8 => {
                    let data = format!("{step} {}", "x".repeat(random.below(4_000)));
                    let id: Id = publish(addr, &format!("/events/{}", topics[0]), &data).parse().unwrap();
                    model.events.insert(id, (topics[0], data));
                    cursors.push(id);
                }
                8..12 => {
                    let data = format!("{step}");
                    for (id, topic) in
                        ids(&post(addr, &format!("/events/{}", NAMES.join(",")), &data)).iter().zip(NAMES)
                    {
                        model.events.insert(*id, (topic, data.clone()));
                        cursors.push(*id);
                    }
                }
                12..14 => {
                    let newest =
                        model.events.iter().filter(|(_, (topic, _))| *topic == topics[0]).map(|(id, _)| *id).max();
                    assert_eq!(delete(addr, topics[0]).status, 200);
                    model.events.retain(|_, (topic, _)| *topic != topics[0]);
                    model.forgotten.extend(newest.map(|id| (topics[0], id)));
                }
                14 if config.journal.is_some() => {
                    drop(server.take());
                    server = Some(serve(config.clone()));
                }
                _ => {}
            }
            model.newest = cursors.iter().copied().max().unwrap();
            let addr = server.as_ref().unwrap().addr().unwrap();
            let cursor = cursors[cursors.len() - 1 - random.below(cursors.len().min(12))];
            model.check(addr, if random.below(2) == 0 { topics } else { &NAMES }, cursor);
        }
    }
}

#[test]
fn what_is_deleted_while_the_journal_is_written_anew_stays_deleted() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let config = with_journal(&path).with(|config| config.keep_events = 400);
    let server = serve(config.clone());
    let addr = server.addr().unwrap();
    let mut rewritten = 0;
    let mut length = fs::metadata(&path).unwrap().len();
    let mut newest = Id::default();
    // Deleted over and over while a flood makes the journal grow past its limit again and again.
    thread::scope(|scope| {
        let flood = scope.spawn(|| {
            for n in 0..30_000 {
                server.hub().publish(["a", "b"][n % 2], Event::new("x".repeat(300))).unwrap();
            }
        });
        while !flood.is_finished() {
            newest = publish(addr, "/events/gone", "x").parse().unwrap();
            assert_eq!(delete(addr, "gone").status, 200);
            let now = fs::metadata(&path).map_or(length, |file| file.len());
            rewritten += usize::from(now < length);
            length = now;
        }
    });
    assert!(rewritten > 0, "the journal was not written anew");
    let before = kept(addr, "a,b,gone");
    drop(server);
    let server = serve(config);
    let addr = server.addr().unwrap();
    assert_eq!(kept(addr, "gone").len(), 0);
    assert!(kept(addr, "a,b,gone") == before, "nothing else is gone");
    assert!(resumed(addr, "gone", Id { ms: newest.ms - 1, seq: newest.seq }).0, "who lacked it is told");
}

#[test]
fn a_delete_has_its_place_among_what_waits_for_a_slow_disk() {
    if !has("strace") {
        return;
    }
    let dir = Scratch::new();
    let path = dir.path("events");
    drop(serve(with_journal(&path)));
    let traced = Traced::start(&["fdatasync:delay_enter=500000:when=2"], &path, &["--fsync"]);
    let addr = traced.process.addr;
    let first = publish(addr, "/events/a?key=k", "kept");
    let (mut busy, mut deletes, mut repeats) = (Wire::connect(addr), Wire::connect(addr), Wire::connect(addr));
    busy.send(post_request("/events/b", "slow").as_bytes());
    wait_for("the slow one", || fs::read_to_string(&path).unwrap().contains("data: slow").then_some(()));
    deletes.send(b"DELETE /events/a HTTP/1.1\r\nHost: localhost\r\n\r\n");
    // The delete is numbered when this one, on the same connection behind it, is: both wait for the same disk.
    let answers = thread::scope(|scope| {
        let deleted = scope.spawn(|| deletes.answer());
        let repeated = wait_for("the delete to be before the key", || {
            let id = repeats.post("/events/a?key=k", "after").body;
            (id.trim() != first).then_some(id)
        });
        (deleted.join().unwrap(), repeated, busy.answer())
    });
    assert_eq!(answers.0.status, 200);
    assert_eq!(answers.2.status, 200);
    assert_eq!(kept(addr, "a").len(), 1);
}

#[test]
fn where_the_journal_fails_nothing_is_deleted() {
    if !has("strace") {
        return;
    }
    let dir = Scratch::new();
    let path = dir.path("events");
    drop(serve(with_journal(&path)));
    let traced = Traced::start(&["write:error=ENOSPC:when=2"], &path, &[]);
    let addr = traced.process.addr;
    let mut wire = Wire::connect(addr);
    assert_eq!(wire.post("/events/a", "one").status, 200);
    wire.send(b"DELETE /events/a HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(wire.answer().status, 507);
    assert_eq!(kept(addr, "a").len(), 1);
    wire.send(b"DELETE /events/a HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(wire.answer().status, 200, "a disk that works again");
    assert_eq!(kept(addr, "a").len(), 0);
}

#[test]
fn the_list_of_topics_has_a_line_for_each_that_is_in_use() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let list = || {
        let answer = get(addr, "/topics");
        assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/plain; charset=utf-8")));
        let rows = answer.body.lines().map(|line| line.split('\t').map(String::from).collect::<Vec<_>>());
        rows.collect::<Vec<_>>()
    };
    let headings = ["name", "subscribers", "events", "bytes", "newest"];
    assert_eq!(list(), [headings]);
    publish(addr, "/events/b", "x");
    let id = publish(addr, "/events/b?key=k", "xyz");
    let (stream, _) = Wire::subscribe(addr, "/events/a:1@x,b", "");
    let rows = list();
    assert_eq!(
        (&rows[0][..], &rows[1][..]),
        (&headings.map(String::from)[..], &["a:1@x", "1", "0", "0", "-"].map(String::from)[..])
    );
    assert_eq!((&rows[2][..3], &rows[2][4]), (&["b", "1", "2"].map(String::from)[..], &id));
    assert_eq!(rows[2][3].parse::<u64>().unwrap(), metric(addr, "kept_bytes"), "the only topic that keeps any");
    delete(addr, "b");
    assert_eq!(list()[2], ["b", "1", "0", "0", "-"]);
    stream.close();
    wait_for("the topics to leave the table", || (list().len() == 1).then_some(()));
}

#[test]
fn names_may_have_colons_and_at_signs_and_128_bytes() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    for name in ["user:42@example.org", "@", ":", &"n".repeat(128)] {
        let id = publish(addr, &format!("/events/{name}"), name);
        let mut stream = Wire::stream(addr, &format!("/events/{name}?since=earliest"), "");
        let seen = stream.event().unwrap();
        assert_eq!((seen.data(), seen.id.as_deref()), (name, Some(&*id)));
    }
    let names: Vec<String> = (0..64).map(|n| format!("{n:0>128}")).collect();
    let (mut stream, _) = Wire::subscribe(addr, &format!("/events/{}", names.join(",")), "");
    for name in &names {
        publish(addr, &format!("/events/{name}"), name);
        assert_eq!(stream.event().unwrap().data(), name);
    }
    assert_eq!(ids(&post(addr, &format!("/events/{}", names.join(",")), "x")).len(), 64, "as many in one POST");
}
