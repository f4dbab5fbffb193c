//! A turn at the journal that panics: from the inside, since nothing from outside can bring that about.

use crate::config::Config;
use crate::encoded::Encoded;
use crate::event::Id;
use crate::journal::Journal;
use crate::log::Logger;
use crate::sync::enter;
use crate::unwritten::{Change, Order, Turn, Turns};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread;

#[test]
fn a_panic_of_whoever_writes_the_journal_leaves_nobody_asleep() {
    let path = std::env::temp_dir().join(format!("brooklet-turn-{}", std::process::id()));
    let config = Config::default();
    let log = Arc::new(Logger::start(&config).unwrap());
    let (journal, _) = Journal::open(&path, &config, &log, &mut |_, _| {}).unwrap();
    let order = Mutex::new(Order::new(Id::default(), Some(journal)));
    let turns = Turns::new(order);
    let block = Encoded::new(Id::default(), b"", b"data: x\n\n");
    let change = Change::Publish { events: vec![("a".into(), block.clone())], key: None };
    let outcome = enter(&turns.order).push(change, block);
    thread::scope(|scope| {
        let (is_waiting, waits) = crossbeam_channel::bounded(0);
        let (turns, outcome) = (&turns, &outcome);
        let waiter = scope.spawn(move || {
            let mut order = enter(&turns.order);
            is_waiting.send(()).unwrap();
            while outcome.get().is_none() {
                order = turns.ended.wait(order).unwrap();
            }
            outcome.get().cloned()
        });
        waits.recv().unwrap();
        let journal = enter(&turns.order).journal.take().unwrap(); // once it waits, for it holds the lock until then
        let turn = catch_unwind(AssertUnwindSafe(|| {
            let _turn = Turn::new(turns, journal);
            panic!("on purpose");
        }));
        assert!(turn.is_err());
        assert!(matches!(waiter.join().unwrap(), Some(Err(reason)) if reason.contains("panicked")));
    });
    let order = enter(&turns.order);
    assert!(order.journal.is_some() && order.unwritten.is_empty() && order.unwritten_bytes == 0);
    let _ = std::fs::remove_file(&path);
}
