//! Servers that share their topics by an engine: what the engine is asked, and what it shows.

use self::memory::Memory;
use crate::common::*;

use brooklet::crossbeam_channel::TryRecvError;
use brooklet::{Config, Engine, Entry, Event, Feed, Handle, Id, News, Server, Since};
use std::io::{self, ErrorKind};
use std::net::TcpListener;
use std::sync::{Arc, LazyLock, Mutex};
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

#[path = "memory_engine.rs"]
mod memory;

fn bind_with(config: Config, engine: Arc<dyn Engine>) -> (Handle, Feed) {
    let (server, feed) = Server::bind_with_engine("127.0.0.1:0", config, engine).unwrap();
    (server.spawn().unwrap(), feed)
}

fn two_servers(config: &Config) -> (Arc<Memory>, [Handle; 2]) {
    let engine = Arc::new(Memory::default());
    let servers = [(), ()].map(|()| {
        let (server, feed) = bind_with(config.clone(), engine.clone());
        engine.join(feed);
        server
    });
    (engine, servers)
}

/// An engine that a test drives by hand.
#[derive(Default)]
struct Puppet {
    newest: Mutex<Option<Id>>,
    asked: Mutex<Vec<Entry>>,
}

impl Engine for Puppet {
    fn publish(&self, entries: &[Entry]) -> io::Result<Vec<Id>> {
        self.asked.lock().unwrap().extend_from_slice(entries);
        Err(io::Error::new(ErrorKind::TimedOut, "the engine is away"))
    }

    fn newest(&self) -> io::Result<Id> {
        self.newest.lock().unwrap().ok_or_else(|| io::Error::other("away"))
    }
}

fn puppet() -> (Arc<Puppet>, Handle, Feed) {
    let engine = Arc::new(Puppet::default());
    let (server, feed) = bind_with(Config::default().with(|config| config.lanes = 2), engine.clone());
    (engine, server, feed)
}

/// Ids of the last minutes, since ages go by them.
fn id(ms: u64) -> Id {
    static BASE: LazyLock<u64> = LazyLock::new(|| now_ms() - 100_000);
    Id { ms: *BASE + ms, seq: 0 }
}

fn now_ms() -> u64 {
    UNIX_EPOCH.elapsed().unwrap().as_millis() as u64
}

fn after(id: Id) -> String {
    format!("Last-Event-ID: {id}\r\n")
}

fn show(feed: &Feed, ms: u64, topic: &str) {
    feed.show(id(ms), Entry::new(topic, Event::new(ms.to_string()))).unwrap();
}

#[test]
fn what_is_published_on_any_server_comes_to_the_subscribers_of_all_in_one_order() {
    let (_engine, servers) = two_servers(&Config::default());
    let addrs = servers.each_ref().map(|server| server.addr().unwrap());
    let mut streams = addrs.map(|addr| Wire::subscribe(addr, "/events/a,b", "").0);
    thread::scope(|scope| {
        for (n, server) in servers.iter().enumerate() {
            let hub = server.hub();
            scope.spawn(move || {
                (0..500).for_each(|m| drop(hub.publish(["a", "b"][m % 2], Event::new(format!("{n} {m}")))))
            });
        }
    });
    let answer =
        Wire::ask(addrs[0], "PUT /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n\r\none\ntwo\n");
    assert!(answer.body.starts_with("published 2, last id "), "{answer:?}");
    let last = publish(addrs[1], "/events/b", "last");
    let [north, south] =
        streams.each_mut().map(|stream| (0..1_003).map(|_| stream.event().unwrap()).collect::<Vec<_>>());
    assert!(north.is_sorted_by(|a, b| a.id() < b.id()));
    assert_eq!(north, south);
    assert_eq!(north[1_002].id.as_deref(), Some(last.as_str()));
    for n in 0..2 {
        let data = |m: usize| format!("{n} {m}");
        let own: Vec<&str> = north.iter().map(Seen::data).filter(|data| data.starts_with(&format!("{n} "))).collect();
        assert_eq!(own, (0..500).map(data).collect::<Vec<_>>(), "a publisher's order");
    }
}

#[test]
fn a_key_holds_on_all_servers() {
    let (_engine, servers) = two_servers(&Config::default());
    let [north, south] = servers.each_ref().map(|server| server.addr().unwrap());
    let (mut stream, _) = Wire::subscribe(south, "/events/a", "");
    let first = publish(north, "/events/a?key=7", "once");
    assert_eq!(publish(south, "/events/a?key=7", "twice"), first);
    publish(south, "/events/a", "then");
    assert_eq!([0, 1].map(|_| stream.event().unwrap().data.unwrap()), ["once", "then"]);
}

#[test]
fn an_event_of_several_topics_and_the_end_of_a_topic_have_their_place_in_the_order() {
    let (_engine, servers) = two_servers(&Config::default());
    let [north, south] = servers.each_ref().map(|server| server.addr().unwrap());
    let (mut stream, start) = Wire::subscribe(south, "/events/a,b", "");
    let ids = publish(north, "/events/a,b", "both");
    let seen = [0, 1].map(|_| stream.event().unwrap());
    assert_eq!(seen.each_ref().map(Seen::data), ["both", "both"]);
    assert_eq!(ids, format!("{}\n{}", seen[0].id(), seen[1].id()));
    publish(north, "/events/a?key=k", "old");
    let answer = Wire::ask(south, "DELETE /events/a HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(answer.body, "forgotten\n");
    publish(south, "/events/a?key=k", "new"); // the key is forgotten, too
    assert_eq!([0, 1].map(|_| stream.event().unwrap().data.unwrap()), ["old", "new"]);
    for addr in [north, south] {
        let (mut stream, _) = Wire::subscribe(addr, "/events/a,b", &after(start));
        assert!(stream.event().unwrap().is_gap());
        assert_eq!([0, 1].map(|_| stream.event().unwrap().data.unwrap()), ["both", "new"]);
    }
}

#[test]
fn a_client_resumes_on_another_server() {
    let (_engine, servers) = two_servers(&Config::default());
    let [north, south] = servers.each_ref().map(|server| server.addr().unwrap());
    let ids: Vec<String> = (0..3).map(|n| publish(north, "/events/a", &n.to_string())).collect();
    let (mut stream, cursor) = Wire::subscribe(south, "/events/a", &format!("Last-Event-ID: {}\r\n", ids[0]));
    assert_eq!(cursor.to_string(), ids[0]);
    assert_eq!([0, 1].map(|_| stream.event().unwrap().data.unwrap()), ["1", "2"]);
}

#[test]
fn a_server_that_joins_late_says_that_it_lacks_what_came_before() {
    let (engine, servers) = two_servers(&Config::default());
    let before = publish(servers[0].addr().unwrap(), "/events/a", "before");
    publish(servers[0].addr().unwrap(), "/events/a", "missed");
    let (late, feed) = bind_with(Config::default(), engine.clone());
    engine.join(feed);
    let (mut stream, _) = Wire::subscribe(late.addr().unwrap(), "/events/a", &format!("Last-Event-ID: {before}\r\n"));
    publish(servers[0].addr().unwrap(), "/events/a", "after");
    assert!(stream.event().unwrap().is_gap());
    assert_eq!(stream.event().unwrap().data(), "after");
}

#[test]
fn where_something_may_be_missing_live_streams_hear_a_gap_and_go_on() {
    let (_engine, server, feed) = puppet();
    let addr = server.addr().unwrap();
    show(&feed, 10, "a");
    // One has the newest event, one is of a quiet topic, and one of both.
    let mut streams = ["/events/a", "/events/quiet", "/events/a,quiet", "/events/a"]
        .map(|target| Wire::subscribe(addr, &format!("{target}?since=earliest"), "").0);
    for (n, stream) in streams.iter_mut().enumerate() {
        if n != 1 {
            assert_eq!(stream.event().unwrap().id(), id(10));
        }
    }
    for round in 2..50 {
        feed.missing_up_to(id(10 * round)).unwrap();
        feed.missing_up_to(id(10 * round)).unwrap(); // once is enough
        show(&feed, 10 * round + 1, "a");
        show(&feed, 10 * round + 2, "quiet");
        for (stream, topics) in streams.iter_mut().zip([&[1][..], &[2], &[1, 2], &[1]]) {
            let gap = stream.event().unwrap();
            assert!(gap.is_gap() && gap.id() < id(10 * round + topics[0]), "{gap:?}");
            for topic in topics {
                assert_eq!(stream.event().unwrap().id(), id(10 * round + topic));
            }
        }
    }
    assert_eq!(metric(addr, "gaps_total"), 48 * 4);
}

#[test]
fn who_resumes_from_before_what_may_be_missing_hears_a_gap() {
    let (_engine, server, feed) = puppet();
    let addr = server.addr().unwrap();
    show(&feed, 10, "a");
    feed.missing_up_to(id(20)).unwrap();
    show(&feed, 30, "a");
    for (cursor, is_gap) in [(9, true), (10, true), (19, true), (20, false), (29, false)] {
        let (mut stream, _) = Wire::subscribe(addr, "/events/a", &after(id(cursor)));
        let first = stream.event().unwrap();
        assert_eq!(first.is_gap(), is_gap, "{cursor}: {first:?}");
        let kept: &[u64] = if cursor == 9 { &[10, 30] } else { &[30] };
        let mut next = if is_gap { stream.event().unwrap() } else { first };
        for ms in kept {
            assert_eq!(next.id(), id(*ms), "{cursor}");
            if *ms != 30 {
                next = stream.event().unwrap();
            }
        }
    }
}

#[test]
fn a_client_that_is_ahead_waits_until_the_engine_has_shown_as_much_and_is_told_nothing_twice() {
    let (engine, server, feed) = puppet();
    let addr = server.addr().unwrap();
    show(&feed, 10, "a");
    *engine.newest.lock().unwrap() = Some(id(40));
    let ahead = thread::spawn(move || Wire::subscribe(addr, "/events/a", &after(id(30))));
    wait_for("its request", || (metric(addr, "subscribers") == 1).then_some(()));
    show(&feed, 20, "a");
    show(&feed, 30, "a");
    let (mut stream, cursor) = ahead.join().unwrap();
    assert_eq!(cursor, id(30));
    show(&feed, 40, "a");
    assert_eq!(stream.event().unwrap().id(), id(40));
}

#[test]
fn an_id_that_the_engine_has_not_given_gets_a_gap_and_all_that_is_kept() {
    let (engine, server, feed) = puppet();
    show(&feed, 10, "a");
    *engine.newest.lock().unwrap() = Some(id(10));
    // One of the past, by the clock: who lost the newest entries may have given it.
    for cursor in [id(11), Id { ms: 99_999_999_999_999_999, seq: 0 }] {
        let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), "/events/a", &after(cursor));
        assert!(stream.event().unwrap().is_gap());
        assert_eq!(stream.event().unwrap().id(), id(10));
    }
}

#[test]
fn a_follower_in_the_program_hears_of_it_too() {
    let (engine, server, feed) = puppet();
    let hub = server.hub();
    show(&feed, 10, "a");
    let mut follower = hub.subscribe(["a"], Since::After(id(10))).unwrap();
    assert_eq!(follower.try_next(), Err(TryRecvError::Empty));
    let waiting = thread::spawn(move || (follower.recv_timeout(PATIENCE), follower));
    feed.missing_up_to(id(20)).unwrap();
    let (news, mut follower) = waiting.join().unwrap();
    assert_eq!(news, Ok(News::Gap { oldest: None }));
    show(&feed, 30, "a");
    assert!(matches!(follower.recv_timeout(PATIENCE), Ok(News::Event(event)) if event.id == id(30)));
    *engine.newest.lock().unwrap() = Some(id(50));
    let error = hub.subscribe(["a"], Since::After(id(40))).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(hub.publish_all("a", [Event::new("x"), Event::new("y")]).1.is_err());
    assert_eq!(engine.asked.lock().unwrap().len(), 2, "in one go");
}

#[test]
fn a_client_that_is_ahead_is_told_to_come_back_where_the_engine_is_away_or_lags() {
    let (engine, server, feed) = puppet();
    show(&feed, 10, "a");
    for newest in [None, Some(id(30))] {
        *engine.newest.lock().unwrap() = newest;
        let mut stream = Wire::stream(server.addr().unwrap(), "/events/a", &after(id(20)));
        let end = stream.block().unwrap();
        assert!(end.retry.is_some() && end.id.is_none() && end.data.is_none(), "{end:?}");
        assert_eq!(end.comments, ["events that another server has sent have not come here yet"]);
        assert!(stream.block().is_none() && stream.is_over());
    }
}

#[test]
fn an_engine_that_is_away_refuses_publishers_and_leaves_streams_and_health_alone() {
    let (engine, server, feed) = puppet();
    let addr = server.addr().unwrap();
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
    let answer = post(addr, "/events/a?event=x&retry=5&key=k", "lost");
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("3")), "{answer:?}");
    assert_eq!(answer.body, "the engine is away\n");
    let asked = std::mem::take(&mut *engine.asked.lock().unwrap());
    assert_eq!((asked[0].topic(), asked[0].key(), asked[0].is_forget()), ("a", Some("k"), false));
    let text = |pairs: &[(&'static str, &str)]| pairs.iter().map(|(k, v)| (*k, v.to_string())).collect::<Vec<_>>();
    assert_eq!(asked[0].fields(), text(&[("topic", "a"), ("event", "x"), ("retry", "5"), ("data", "lost")]));
    assert_eq!(post(addr, "/events/a?event=gap", "x").status, 400, "what may not be is not even asked");
    assert!(engine.asked.lock().unwrap().is_empty());
    assert_eq!(get(addr, "/health").status, 200);
    show(&feed, 10, "a");
    assert_eq!(stream.event().unwrap().id(), id(10));
}

#[test]
fn what_an_engine_shows_is_checked() {
    let (_engine, server, feed) = puppet();
    let addr = server.addr().unwrap();
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
    show(&feed, 10, "a");
    for (ms, entry) in [
        (10, Entry::new("a", Event::new("the same id"))),
        (9, Entry::new("a", Event::new("a lower id"))),
        (11, Entry::new("no topic", Event::new(""))),
        (12, Entry::new("a", Event::new("").name("x\nid: 7"))),
        (13, Entry::new("a", Event::new("").name("gap"))),
    ] {
        let error = feed.show(id(ms), entry).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    assert!(feed.missing_up_to(id(5)).is_err());
    show(&feed, 20, "a");
    assert_eq!([0, 1].map(|_| stream.event().unwrap().id()), [id(10), id(20)]);
    // The ids of what was passed over count: a client may have them from a server that takes more.
    let (_, cursor) = Wire::subscribe(addr, "/events/a", &after(id(13)));
    assert_eq!(cursor, id(13));
    for fields in [&[("data", "x")][..], &[("topic", "a")], &[("topic", "a"), ("data", "x"), ("retry", "soon")]] {
        assert_eq!(Entry::from_fields(fields.iter().copied()).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn every_reconnection_time_that_is_published_can_be_read_back_from_an_entry() {
    let retry = |ms| Event::new("x").retry(Duration::from_millis(ms));
    let entry = Entry::new("a", retry(u32::MAX.into()));
    assert_eq!(Entry::from_fields(entry.fields()).unwrap().fields(), entry.fields());
    let (engine, alone) = (Arc::new(Puppet::default()), serve_default());
    let (server, feed) = bind_with(Config::default(), engine);
    let too_long = retry(u64::from(u32::MAX) + 1);
    for error in [
        alone.hub().publish("a", too_long.clone()).unwrap_err(),
        server.hub().publish("a", too_long.clone()).unwrap_err(),
        feed.show(id(1), Entry::new("a", too_long)).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    alone.hub().publish("a", retry(u32::MAX.into())).unwrap();
}

#[test]
fn a_topic_for_which_there_is_no_name_left_has_a_gap_later() {
    let engine = Arc::new(Puppet::default());
    let (server, feed) = bind_with(
        Config::default().with(|config| {
            config.topics = 4;
            config.keep_events = 1;
        }),
        engine,
    );
    for (n, topic) in ["a", "b", "c", "d"].iter().enumerate() {
        show(&feed, 10 + n as u64, topic);
    }
    show(&feed, 20, "e");
    assert_eq!(metric(server.addr().unwrap(), "topics"), 4);
    let mut gone = Wire::stream(server.addr().unwrap(), "/events/e", &after(id(19)));
    assert!(gone.block().unwrap().comments.contains(&"all topic names are in use".to_string()));
    let answer = post(server.addr().unwrap(), "/events/e", "x");
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.body.starts_with("all 4 topic names are in use"), "{answer:?}");
}

#[test]
fn the_retry_of_an_entry_is_digits_alone_and_counts_in_32_bits() {
    for retry in ["soon", "+5", "4294967296"] {
        let read = Entry::from_fields([("topic", "a"), ("data", "x"), ("retry", retry)]);
        assert_eq!(read.unwrap_err().kind(), ErrorKind::InvalidInput, "{retry}");
    }
}

#[test]
fn many_events_of_a_new_topic_take_one_name() {
    let config = Config::default().with(|config| config.topics = 4);
    let (_engine, [server, _other]) = two_servers(&config);
    let (ids, result) = server.hub().publish_all("a", (0..100).map(|n| numbered(n, 1)));
    assert!(result.is_ok() && ids.len() == 100, "{result:?}");
    let each = server.hub().publish_each(["a", "b", "c", "d", "e"], Event::new("x"));
    assert_eq!(each.unwrap_err().kind(), ErrorKind::QuotaExceeded);
}

#[test]
fn the_age_of_what_is_shown_late_goes_by_its_id() {
    let (_engine, server, feed) = puppet();
    let ago = |ms| Id { ms: now_ms() - ms, seq: 0 };
    let recent = ago(1_000);
    feed.missing_up_to(ago(7_200_000)).unwrap();
    feed.show(ago(3_600_000), Entry::new("a", Event::new("an hour ago"))).unwrap();
    feed.show(recent, Entry::new("a", Event::new("a second ago"))).unwrap();
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), "/events/a?since=10m", "");
    assert_eq!(stream.event().unwrap().id(), recent, "an hour old is not within ten minutes, and no gap");
}

#[test]
fn an_engine_does_without_a_journal_and_a_feed_does_not_keep_its_server() {
    let config = Config::default().with(|config| config.journal = Some("nowhere".into()));
    let bound = Server::bind_with_engine("127.0.0.1:0", config.clone(), Arc::new(Puppet::default()));
    for error in
        [bound, Server::new_with_engine(config, Arc::new(Puppet::default()))].map(|server| server.err().unwrap())
    {
        let is_named = error.to_string().starts_with("journal: ");
        assert_eq!((error.kind(), is_named), (ErrorKind::InvalidInput, true), "{error}");
    }
    let (_engine, server, feed) = puppet();
    assert!(!feed.is_over());
    drop(server);
    assert!(feed.is_over());
    assert_eq!(feed.show(id(1), Entry::forget("a")).unwrap_err().kind(), ErrorKind::NotConnected);
}

#[test]
fn a_server_that_listens_nowhere_may_have_an_engine_too() {
    let engine = Arc::new(Memory::default());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (server, feed) = Server::new_with_engine(Config::default(), engine.clone()).unwrap();
    engine.join(feed);
    assert_eq!(server.addr().unwrap_err().kind(), ErrorKind::AddrNotAvailable);
    let (server, (other, feed)) = (server.spawn().unwrap(), bind_with(Config::default(), engine.clone()));
    engine.join(feed);
    let client = thread::spawn({
        let addr = listener.local_addr().unwrap();
        move || Wire::subscribe(addr, "/events/a", "").0
    });
    server.serve(listener.accept().unwrap().0).unwrap();
    let mut stream = client.join().unwrap();
    let id = other.hub().publish("a", Event::new("from the other")).unwrap();
    assert_eq!(stream.event().unwrap().id(), id);
}
