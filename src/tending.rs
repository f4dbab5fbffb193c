//! The journal's own thread.
//!
//! With `--fsync` it does all of the writing, so that a disk that is stuck never holds a publisher. Else it does only
//! what no publisher should have to wait for: it checks the file's name, writes a new file step by step, and closes it.
//! It ends once the server has stopped and nothing waits.

use crate::config::Log;
use crate::hub::Core;
use crate::journal::Journal;
use crate::sync::{enter, start_thread, wait};
use crate::unwritten::Turn;
use crate::watch::LOOK_TIME;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

/// Starts the thread, if there is a journal.
///
/// # Errors
/// No thread can be started.
pub fn start(core: &Arc<Core>) -> io::Result<()> {
    if core.config.journal.is_some() {
        let core = core.clone();
        start_thread("journal".into(), Box::new(move || tend(&core)))?;
    }
    Ok(())
}

fn tend(core: &Core) {
    let (mut look_at, mut failed) = (Instant::now() + LOOK_TIME, None);
    while !enter(&core.turns.order).is_closed {
        let tended = catch_unwind(AssertUnwindSafe(|| take_turn(core, &mut look_at, &mut failed)));
        if tended.is_err() {
            core.log.line(Log::Info, format_args!("the journal's thread has panicked, and goes on"));
            thread::sleep(LOOK_TIME); // what made it panic may do so again: not in a loop
        }
    }
}

/// One turn. `failed` is what went wrong since the last one, when this thread had no journal.
fn take_turn(core: &Core, look_at: &mut Instant, failed: &mut Option<io::Error>) {
    let mut turn = Turn::new(&core.turns, wait_for_turn(core, *look_at));
    core.write_batch(&mut turn);
    if *look_at <= Instant::now() {
        *look_at = Instant::now() + LOOK_TIME;
        let looked = turn.journal().look_after(core.is_journal_failing(), &|boot| core.snapshot(boot));
        core.note_journal(looked.is_err(), turn.journal().length());
    }
    if let Some(error) = failed.take() {
        turn.journal().abandon(&error);
    }
    let pause = turn.journal().step(&|boot| core.snapshot(boot));
    core.note_journal(core.is_journal_failing(), turn.journal().length());
    let has_ended = core.is_stopping() && enter(&core.turns.order).unwritten.is_empty();
    if has_ended {
        return turn.close();
    }
    drop(turn); // the pause may take a while, in which others append
    *failed = pause.pass().err();
}

/// Waits until there is something to do, claims the next turn, and waits for the journal.
fn wait_for_turn(core: &Core, look_at: Instant) -> Journal {
    let mut order = enter(&core.turns.order);
    loop {
        let left = look_at.saturating_duration_since(Instant::now());
        let wants_step = order.journal.as_ref().is_some_and(Journal::wants_step);
        let has_events = core.config.fsync && !order.unwritten.is_empty();
        let has_work = wants_step || has_events || left.is_zero() || core.is_stopping();
        if has_work && let Some(journal) = order.journal.take() {
            order.is_claimed = false;
            return journal;
        }
        // Somebody is writing: claimed, the journal is ours next, and the end of that turn wakes us.
        order.is_claimed |= has_work;
        let left = if has_work { LOOK_TIME } else { left };
        order = wait(&core.turns.work, order, left);
    }
}
