//! What a program asks of its hub.

use crate::common::*;
use brooklet::{Config, Event, News, Since};
use std::io::ErrorKind;

#[test]
fn what_is_kept_is_read_some_at_a_time_and_the_newest_alone() {
    let server = serve_default();
    let hub = server.hub();
    assert_eq!((hub.kept("a").unwrap().count(), hub.newest("a").unwrap()), (0, None));
    // More than one run of 32 KiB.
    for n in 0..100 {
        hub.publish("a", numbered(n, 1_000)).unwrap();
        hub.publish("b", Event::new("of another topic")).unwrap();
    }
    let mut kept = hub.kept("a").unwrap();
    assert!(kept.next().unwrap().data.starts_with("0 "));
    hub.publish("a", Event::new("after it was asked for")).unwrap();
    assert_eq!(kept.zip(1..).filter(|(event, n)| event.data.starts_with(&format!("{n} "))).count(), 99);
    let newest = hub.newest("a").unwrap().unwrap();
    assert_eq!((&*newest.topic, newest.data.as_str()), ("a", "after it was asked for"));
    for wrong in [hub.kept("a b").map(drop), hub.newest("a b").map(drop)] {
        assert_eq!(wrong.unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn an_event_for_several_topics_comes_to_all_or_to_none() {
    let server = serve(Config::default().with(|config| config.topics = 3));
    let hub = server.hub();
    let (mut wire, _) = Wire::subscribe(server.addr().unwrap(), "/events/a,b", "");
    let ids = hub.publish_each(["b", "a", "b"], Event::new("both").key("k")).unwrap();
    assert_eq!(ids.len(), 2);
    let seen = [wire.event().unwrap(), wire.event().unwrap()];
    assert_eq!(seen.map(|event| (event.id(), event.data.unwrap())), [(ids[0], "both".into()), (ids[1], "both".into())]);
    assert_eq!(hub.publish_each(["a", "b"], Event::new("again").key("k")).unwrap(), [ids[1], ids[0]]);
    let error = |topics: &[&str]| hub.publish_each(topics, Event::new("x")).unwrap_err().kind();
    assert_eq!(error(&["a", "c", "d"]), ErrorKind::QuotaExceeded);
    assert_eq!((error(&["a", "b c"]), error(&[])), (ErrorKind::InvalidInput, ErrorKind::InvalidInput));
    assert_eq!(hub.newest("a").unwrap().unwrap().id, ids[1], "nothing came of the others");
}

#[test]
fn of_several_events_those_before_the_one_that_cannot_be_published_are() {
    let server = serve_default();
    let hub = server.hub();
    let (ids, result) = hub.publish_all("a", ["one", "two"].map(Event::new));
    assert!(result.is_ok() && ids.len() == 2 && ids[0] < ids[1]);
    let (ids, result) = hub.publish_all("a", [Event::new("three"), Event::new("x").name("gap"), Event::new("never")]);
    assert_eq!((ids.len(), result.unwrap_err().kind()), (1, ErrorKind::InvalidInput));
    assert_eq!(hub.kept("a").unwrap().map(|event| event.data).collect::<Vec<_>>(), ["one", "two", "three"]);
}

#[test]
fn a_topic_that_is_forgotten_is_a_gap_for_whoever_had_not_read_it() {
    let server = serve_default();
    let hub = server.hub();
    let mut up_to_date = hub.subscribe(["a"], Since::Now).unwrap();
    let mut behind = hub.subscribe(["a"], Since::Now).unwrap();
    let id = hub.publish("a", Event::new("x")).unwrap();
    assert!(matches!(up_to_date.try_next(), Ok(News::Event(_))));
    assert_eq!((hub.forget("a").unwrap(), hub.forget("a").unwrap()), (Some(id), None));
    assert_eq!(hub.kept("a").unwrap().count(), 0);
    let next = hub.publish("a", Event::new("y")).unwrap();
    assert!(matches!(up_to_date.try_next(), Ok(News::Event(event)) if event.id == next));
    assert_eq!(behind.try_next(), Ok(News::Gap { oldest: Some(next) }));
    assert!(matches!(behind.try_next(), Ok(News::Event(event)) if event.id == next));
}

#[test]
fn the_topics_are_told_with_all_who_follow_them() {
    let server = serve_default();
    let hub = server.hub();
    let id = hub.publish("b", Event::new("x")).unwrap();
    let (_wire, _) = Wire::subscribe(server.addr().unwrap(), "/events/a,b", "");
    let _follower = hub.subscribe(["a"], Since::Now).unwrap();
    let topics = hub.topics();
    let seen: Vec<_> =
        topics.iter().map(|topic| (&*topic.name, topic.subscribers, topic.events, topic.newest)).collect();
    assert_eq!(seen, [("a", 2, 0, None), ("b", 1, 1, Some(id))]);
    assert!(topics[0].bytes == 0 && topics[1].bytes > 0);
}
