//! Forgetting in pieces: from the inside, since outside a piece shows only as a matter of time.

use crate::clock::now_ms;
use crate::config::Config;
use crate::cursor::{Next, Start};
use crate::encoded::{Framing, Parts};
use crate::event::{Event, Id, ids_from};
use crate::history::{FORGOTTEN_AT_ONCE, History};
use std::time::Duration;

const PIECES: usize = 3;
const HOUR: Duration = Duration::from_secs(3600);

/// A history whose ids are not this server's clock's, so that events may be old when they come.
fn history(set: impl FnOnce(&mut Config)) -> History {
    let config = Config::default().with(|config| (config.keep_events, config.keep_age) = (usize::MAX, HOUR));
    History::new(Id::default(), true, &config.with(set))
}

/// Keeps an event of topic `a`, whose key is its id. Returns whether there is more to be forgotten for it.
fn keep(history: &mut History, id: Id, data: &str) -> bool {
    keep_with(history, id, data, &id.to_string())
}

fn keep_with(history: &mut History, id: Id, data: &str, key: &str) -> bool {
    let frame = Event::new(data).encode_with_id(id);
    history.insert("a", &Parts::new(id, b"", frame.as_bytes()), Some(key)).1
}

#[test]
fn what_is_too_old_goes_in_pieces_and_nobody_sees_the_rest_of_it() {
    let mut history = history(|_| {});
    let (now, long_ago) = (now_ms(), now_ms() - 2 * HOUR.as_millis() as u64);
    let old = |n: usize| Id { ms: long_ago, seq: n as u64 };
    let (first, last, new) = (old(1), old(PIECES * FORGOTTEN_AT_ONCE), Id { ms: now, seq: 0 });
    (1..=PIECES * FORGOTTEN_AT_ONCE).for_each(|n| assert!(!keep(&mut history, old(n), "old")));
    assert_eq!(history.newest_of("a"), Some(last), "nobody has looked for what is too old yet");
    let topics = history.subscribe(&["a".into()]).unwrap();
    for left in (0..PIECES).rev() {
        assert!(history.expire());
        if left == PIECES - 2 {
            assert!(!keep(&mut history, new, "new")); // beside what is left of the old ones
        }
        let is_new = left < PIECES - 1;
        assert_eq!(history.totals().events, left * FORGOTTEN_AT_ONCE + usize::from(is_new));
        assert_eq!((history.newest_of("a"), history.newest_forgotten("a")), (is_new.then_some(new), last));
        assert_eq!(history.id_of_key("a", &last.to_string()), None, "its key is free");
        let before = if is_new { new.before() } else { last };
        for start in [Start::Earliest, Start::Newest(5)] {
            assert!(matches!(history.start(&topics, start), (cursor, None) if cursor == before));
        }
        for start in [Start::After(Some(first)), Start::Ago(3 * HOUR)] {
            assert!(matches!(history.start(&topics, start), (_, Some(gap)) if gap.id == before));
        }
        let next = |cursor, told: &[Id]| history.next(&topics, cursor, told, &[], Framing::Plain);
        assert!(matches!(next(first, &[first]), Next::Gap(gap) if gap.id == before));
        match next(first, &history.told(&topics)) {
            Next::Events(run) => assert!(is_new && run.events.len() == 1 && run.newest() == new),
            next => assert!(!is_new && matches!(next, Next::Nothing), "one gap is told for all of the pieces"),
        }
    }
    assert!(!history.expire());
    assert_eq!((history.totals().events, history.newest_forgotten("a")), (1, last));
}

#[test]
fn what_is_deleted_is_gone_at_once_and_freed_in_pieces() {
    let mut history = history(|_| {});
    let ids: Vec<Id> = ids_from(Id { ms: now_ms(), seq: 0 }).take(PIECES * FORGOTTEN_AT_ONCE + 1).collect();
    let (new, old) = ids.split_last().unwrap();
    let (last, key) = (*old.last().unwrap(), old[0].to_string());
    old.iter().for_each(|id| assert!(!keep(&mut history, *id, "old")));
    history.forget("a", last);
    assert_eq!(history.totals().events, old.len(), "nothing is freed yet");
    assert_eq!((history.newest_of("a"), history.id_of_key("a", &key)), (None, None));
    assert_eq!((history.newest_forgotten("a"), history.totals().topics), (last, 0), "its name is free");
    let topics = history.subscribe(&["a".into()]).unwrap();
    assert!(matches!(history.start(&topics, Start::Earliest), (cursor, None) if cursor == last));
    assert!(matches!(history.start(&topics, Start::After(Some(old[0]))), (cursor, Some(_)) if cursor == last));
    assert!(!keep_with(&mut history, *new, "new", &key), "whoever publishes need not free anything");
    for left in (0..PIECES).rev() {
        assert!(history.has_more() && history.expire());
        assert_eq!(history.totals().events, 1 + left * FORGOTTEN_AT_ONCE);
    }
    assert!(!history.has_more());
    assert_eq!((history.totals().events, history.newest_of("a"), history.newest_forgotten("a")), (1, Some(*new), last));
    assert_eq!(history.id_of_key("a", &key), Some(*new), "whoever has the key now keeps it");
    history.forget("a", *new);
    while history.expire() {}
    assert_eq!((history.totals().events, history.totals().bytes, history.block_bytes()), (0, 0, 0));
}

#[test]
fn what_makes_room_for_a_large_event_goes_in_pieces() {
    const BUDGET: usize = 8 * 1024 * 1024;
    let mut history = history(|config| config.keep_bytes = BUDGET);
    let mut ids = ids_from(Id { ms: now_ms(), seq: 0 });
    let mut next = || ids.next().unwrap();
    while history.totals().events < PIECES * FORGOTTEN_AT_ONCE {
        assert!(!keep(&mut history, next(), "small"));
    }
    let count = history.totals().events + 1;
    assert!(keep(&mut history, next(), &"x".repeat(BUDGET - 64 * 1024)), "there is more to be forgotten");
    assert_eq!(history.totals().events, count - FORGOTTEN_AT_ONCE);
    assert!(history.fit());
    assert_eq!(history.totals().events, count - 2 * FORGOTTEN_AT_ONCE);
    while history.fit() {}
    let totals = history.totals();
    assert!(totals.bytes <= BUDGET && totals.events < FORGOTTEN_AT_ONCE, "{} events", totals.events);
}
