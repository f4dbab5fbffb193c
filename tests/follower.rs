//! Subscribing in the program.

use crate::common::*;
use brooklet::crossbeam_channel::{RecvTimeoutError, TryRecvError, select};
use brooklet::{Config, Event, Follower, Hub, News, Published, Since};
use std::io::ErrorKind;
use std::thread;
use std::time::Duration;

fn publish_to(hub: &Hub, topic: &str, count: std::ops::Range<u64>) {
    for n in count {
        hub.publish(topic, Event::new(n.to_string())).unwrap();
    }
}

fn next(follower: &mut Follower) -> Published {
    match follower.recv_timeout(PATIENCE) {
        Ok(News::Event(event)) => event,
        other => panic!("no event: {other:?}"),
    }
}

fn all(follower: &mut Follower) -> Vec<String> {
    std::iter::from_fn(|| follower.try_next().ok())
        .map(|news| match news {
            News::Event(event) => event.data,
            other => format!("{other:?}"),
        })
        .collect()
}

#[test]
fn a_follower_in_the_program_sees_what_one_on_the_network_sees() {
    let server = serve_default();
    let hub = server.hub();
    let mut news = hub.subscribe(["a", "b", "a"], Since::Now).unwrap();
    let (mut wire, _) = Wire::subscribe(server.addr().unwrap(), "/events/a,b", "");
    assert_eq!(news.try_next(), Err(TryRecvError::Empty));
    let event = Event::new("one\r\ntwo: three\n\nfour").name("note").retry(Duration::from_millis(7)).key("k");
    let id = hub.publish("b", event).unwrap();
    hub.publish("c", Event::new("of another topic")).unwrap();
    hub.publish("a", Event::new("")).unwrap();
    let first = next(&mut news);
    let seen = wire.event().unwrap();
    assert_eq!((&*first.topic, first.id, first.name.as_deref()), ("b", id, Some("note")));
    assert_eq!((first.data.as_str(), first.retry), ("one\ntwo: three\n\nfour", Some(Duration::from_millis(7))));
    assert_eq!((seen.data(), seen.id(), seen.event.as_deref()), (first.data.as_str(), id, Some("note")));
    let second = next(&mut news);
    assert_eq!((&*second.topic, second.name, second.data.as_str()), ("a", None, ""));
    assert_eq!(news.cursor(), second.id);
    assert_eq!(news.recv_timeout(Duration::from_millis(1)), Err(RecvTimeoutError::Timeout));
}

#[test]
fn it_begins_where_it_is_told_to() {
    let server = serve_default();
    let hub = server.hub();
    publish_to(&hub, "a", 0..3);
    let second = hub.kept("a").unwrap().nth(1).unwrap().id;
    let from = |since| all(&mut hub.subscribe(["a"], since).unwrap());
    assert_eq!(from(Since::Now), [""; 0]);
    assert_eq!(from(Since::Earliest), ["0", "1", "2"]);
    assert_eq!(from(Since::After(second)), ["2"]);
    assert_eq!([0, 1, 2, u64::MAX].map(|count| from(Since::Newest(count)).len()), [0, 1, 2, 3]);
    let ago = from(Since::Ago(Duration::from_secs(3_600)));
    assert_eq!(ago.len(), 4, "what was before the server started is a gap: {ago:?}");
    let mut first = hub.subscribe(["a"], Since::Earliest).unwrap();
    next(&mut first);
    assert_eq!(from(Since::After(first.cursor())), ["1", "2"], "the cursor is of what was taken, not of what was read");
}

#[test]
fn one_that_is_slow_takes_no_memory_and_is_told_of_the_gap() {
    let server = serve(Config::default().with(|config| config.keep_events = 3));
    let hub = server.hub();
    let mut slow = hub.subscribe(["a", "b"], Since::Now).unwrap();
    publish_to(&hub, "a", 0..2);
    assert_eq!(all(&mut slow), ["0", "1"]);
    publish_to(&hub, "b", 0..1);
    publish_to(&hub, "a", 2..20);
    let oldest = hub.kept("a").unwrap().next().unwrap().id;
    assert_eq!(slow.next(), Some(News::Gap { oldest: Some(oldest) }));
    assert_eq!(all(&mut slow), ["0", "17", "18", "19"], "told once");
    assert_eq!(
        hub.subscribe(["a"], Since::After("1-0".parse().unwrap())).unwrap().next(),
        Some(News::Gap { oldest: Some(oldest) })
    );
}

#[test]
fn every_event_wakes_whoever_waits_for_it() {
    let server = serve_default();
    let hub = server.hub();
    thread::scope(|scope| {
        for topics in [&["a"][..], &["b"], &["a", "b"]] {
            let mut news = hub.subscribe(topics, Since::Now).unwrap();
            let expected = 500 * topics.len() as u64;
            scope.spawn(move || {
                let mut counts = [0, 0];
                for _ in 0..expected {
                    let event = next(&mut news);
                    let count = &mut counts[usize::from(&*event.topic == "b")];
                    assert_eq!(event.data, count.to_string(), "of {}", event.topic);
                    *count += 1;
                }
            });
        }
        scope.spawn(|| publish_to(&hub, "a", 0..500));
        scope.spawn(|| publish_to(&hub, "b", 0..500));
    });
}

#[test]
fn it_can_be_waited_for_beside_other_channels() {
    let server = serve_default();
    let hub = server.hub();
    publish_to(&hub, "a", 0..1);
    let mut news = hub.subscribe(["a"], Since::Earliest).unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        select! {
            recv(news.ready()) -> _ => seen.extend(all(&mut news)),
            default(PATIENCE) => panic!("not woken after {seen:?}"),
        }
        publish_to(&hub, "a", 5..6);
    }
    assert_eq!(seen[..3], ["0", "5", "5"]);
}

#[test]
fn it_ends_when_the_server_stops_after_all_that_was_published() {
    let server = serve_default();
    let hub = server.hub();
    let mut news = hub.subscribe(["a"], Since::Now).unwrap();
    let waiting = hub.subscribe(["a"], Since::Now).unwrap();
    let waiter = thread::spawn(move || waiting.count());
    publish_to(&hub, "a", 0..2);
    drop(server);
    assert_eq!(waiter.join().unwrap(), 2);
    assert_eq!(all(&mut news), ["0", "1"]);
    assert_eq!(news.try_next(), Err(TryRecvError::Disconnected));
    assert_eq!((news.recv_timeout(PATIENCE), news.next()), (Err(RecvTimeoutError::Disconnected), None));
    assert_eq!(hub.subscribe(["a"], Since::Now).map(drop).unwrap_err().kind(), ErrorKind::NotConnected);
}

#[test]
fn its_topics_are_in_use_until_it_is_dropped() {
    let server = serve(Config::default().with(|config| config.topics = 4));
    let (hub, addr) = (server.hub(), server.addr().unwrap());
    let news = hub.subscribe(["a", "b", "c"], Since::Now).unwrap();
    assert_eq!(metric(addr, "topics"), 3);
    let subscribe = |topics: &[&str]| hub.subscribe(topics, Since::Now).map(drop).map_err(|error| error.kind());
    assert_eq!(subscribe(&["d"]), Err(ErrorKind::QuotaExceeded));
    drop(news);
    assert_eq!(metric(addr, "topics"), 0);
    assert_eq!(subscribe(&["d"]), Ok(()));
    assert_eq!(subscribe(&["a b"]), Err(ErrorKind::InvalidInput));
    assert_eq!(subscribe(&[]), Err(ErrorKind::InvalidInput));
}

/// A dashboard: each topic's current value, whichever came first, and then whatever comes.
#[test]
fn it_begins_with_the_newest_of_each_topic_as_one_on_the_network_does() {
    let server = serve_default();
    let hub = server.hub();
    publish_to(&hub, "b", 10..12);
    publish_to(&hub, "a", 0..3);
    publish_to(&hub, "b", 12..13);
    let mut news = hub.subscribe(["a", "b", "none"], Since::Newest(1)).unwrap();
    let (mut wire, cursor) = Wire::subscribe(server.addr().unwrap(), "/events/a,b,none?last=1", "");
    assert_eq!(news.cursor(), cursor);
    publish_to(&hub, "none", 7..8);
    publish_to(&hub, "b", 13..14);
    assert_eq!(all(&mut news), ["2", "12", "7", "13"]);
    assert_eq!(["2", "12", "7", "13"].map(|_| wire.event().unwrap().data().to_string()), ["2", "12", "7", "13"]);
}
