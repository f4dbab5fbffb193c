//! Publishing: ids and keys.

use crate::common::*;
use brooklet::{Config, Event, Id};
use std::thread;

#[test]
fn a_key_makes_publishing_repeatable_for_as_long_as_its_event_is_kept() {
    let server = serve(Config::default().with(|config| config.keep_events = 2));
    let addr = server.addr().unwrap();
    let first = post(addr, "/events/a?key=k1", "one").body;
    assert_eq!(post(addr, "/events/a?key=k1", "other").body, first);
    assert_ne!(post(addr, "/events/b?key=k1", "other topic").body, first);
    post(addr, "/events/a?key=k2", "two");
    post(addr, "/events/a", "three");
    assert_ne!(post(addr, "/events/a?key=k1", "again").body, first, "the first was let go");
    assert_eq!(metric(addr, "published_total"), 5);
}

#[test]
fn many_publishers_of_one_key_publish_once() {
    let server = serve_default();
    for round in 0..200 {
        let ids: Vec<Id> = thread::scope(|scope| {
            let publish = || server.hub().publish("a", Event::new("x").key(format!("k{round}"))).unwrap();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(publish)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    }
    assert_eq!(metric(server.addr().unwrap(), "published_total"), 200);
}

#[test]
fn ids_increase_strictly_over_all_topics_and_publishers() {
    let server = serve_default();
    let hub = server.hub();
    let mut ids: Vec<Id> = thread::scope(|scope| {
        let publish = |n: usize| (0..500).map(|_| hub.publish(&format!("t{n}"), Event::new("x")).unwrap()).collect();
        let threads: Vec<_> = (0..4).map(|n| scope.spawn(move || publish(n))).collect::<Vec<_>>();
        threads.into_iter().flat_map(|thread: thread::ScopedJoinHandle<Vec<Id>>| thread.join().unwrap()).collect()
    });
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 2_000);
}
