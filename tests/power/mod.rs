//! Power loss, as a test. `--fsync` promises that a machine's death loses nothing, and without it nothing is lost in
//! silence. So the command itself is run, publishes, deletes, and is cut off; strace writes down what it did to its files
//! (`trace`), a model of a harsh disk says what a crash at any point may leave of that (`disk`, `file`), the command is
//! started on it, and held against what it had promised (`promises`). What a crash has left is worked on and crashes
//! again, for several runs (`trial`, `work`). Nothing here knows how the journal is written.
//!
//! `make power` does so for as long as one likes.

mod disk;
mod file;
mod look;
mod promises;
mod server;
mod trace;
mod trial;
mod work;

use crate::common::{has, left_out, shell};
use disk::LeftOut;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};
use trial::{Broken, Counts, Fault, Plan};

/// Runs trials, two at a time, for as long as `goes_on` with the next seed.
fn trials(from: u64, goes_on: impl Fn(u64) -> bool + Sync, ended: impl Fn(u64, Result<Counts, Fault>) + Sync) {
    let next = AtomicU64::new(from);
    let run = || {
        loop {
            let seed = next.fetch_add(1, SeqCst);
            if !goes_on(seed) {
                return;
            }
            // On every other disk, something fails.
            ended(seed, trial::run(Plan { seed, disk_fails: seed % 2 == 1, grows: seed % 16 < 2, broken: None }));
        }
    };
    thread::scope(|scope| [(); 2].map(|()| scope.spawn(run)).map(|thread| thread.join().unwrap()));
}

fn can_run() -> bool {
    let boot = "unshare -rm mount --bind /dev/null /proc/sys/kernel/random/boot_id";
    has("strace") && has("prlimit") && (shell(boot) || left_out(&format!("a boot of its own ({boot})")))
}

#[test]
fn what_was_promised_is_there_after_any_crash() {
    const SEEDS: u64 = 24;
    if !can_run() {
        return;
    }
    let (counts, faults) = (Mutex::new(Counts::default()), Mutex::new(BTreeMap::new()));
    trials(
        1,
        |seed| seed <= SEEDS,
        |seed, result| match result {
            Ok(more) => *counts.lock().unwrap() += more,
            Err(fault) => drop(faults.lock().unwrap().insert(seed, fault)),
        },
    );
    let faults = faults.into_inner().unwrap();
    for (seed, Fault { what, .. }) in &faults {
        eprintln!("seed {seed}: {what}");
    }
    assert!(faults.is_empty(), "{}", faults.values().next().map_or("", |fault| &fault.story));
    eprintln!("{SEEDS} trials, {}: what was promised is there", counts.into_inner().unwrap());
}

/// As long as wanted: see `make power`.
#[test]
#[ignore = "make power runs it"]
fn power_is_lost_until_time_is_over() {
    assert!(can_run());
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let (from, time) = (number("POWER_SEED").unwrap_or(1), Duration::from_secs(number("POWER_SECONDS").unwrap_or(60)));
    let (started, so_far) = (Instant::now(), Mutex::new((0, Counts::default(), Vec::new(), Instant::now())));
    trials(
        from,
        |seed| seed == from || started.elapsed() < time,
        |seed, result| {
            let mut so_far = so_far.lock().unwrap();
            let (trials, counts, faults, told) = &mut *so_far;
            *trials += 1;
            match result {
                Ok(more) => *counts += more,
                Err(Fault { what, story }) => {
                    eprintln!("seed {seed}: {what}");
                    if faults.is_empty() {
                        eprintln!("{story}");
                    }
                    faults.push(seed);
                }
            }
            if told.elapsed() > Duration::from_secs(10) || started.elapsed() >= time {
                *told = Instant::now();
                let took = started.elapsed().as_secs();
                eprintln!("{took} s: {trials} trials, {counts}, {} faults", faults.len());
            }
        },
    );
    let faults = &so_far.lock().unwrap().2;
    assert!(faults.is_empty(), "promises were broken with the seeds {faults:?}: the stories are in target/tmp");
}

/// A journal that is wrong in this way fails a trial that the real one passes. Only what it loses or shows counts: that it
/// does not start may have other reasons.
fn is_caught(broken: Broken) {
    const SEEDS: u64 = 40;
    if !can_run() {
        return;
    }
    // What is cut off is what was refused: a torn end alone hides nothing that follows it.
    let disk_fails = matches!(broken, Broken::LeavesOut(LeftOut::Truncations));
    let honest = |seed| Plan { seed, disk_fails, grows: false, broken: None };
    let caught = (1..=SEEDS).find_map(|seed| {
        let fault = trial::run(Plan { broken: Some(broken), ..honest(seed) }).err();
        let is_other = |what: &str| what.starts_with(trial::DOES_NOT_START) || what.starts_with(trial::MODEL_IS_WRONG);
        let fault = fault.filter(|fault| !is_other(&fault.what))?;
        trial::run(honest(seed)).ok().map(|_| (seed, fault.what))
    });
    let (seed, what) = caught.unwrap_or_else(|| panic!("{broken:?} goes unnoticed"));
    eprintln!("{broken:?}: caught with seed {seed}: {what}");
}

#[test]
fn a_journal_that_does_not_sync_is_caught() {
    is_caught(Broken::LeavesOut(LeftOut::Syncs));
}

#[test]
fn a_journal_that_does_not_sync_its_directory_is_caught() {
    is_caught(Broken::LeavesOut(LeftOut::DirectorySyncs));
}

#[test]
fn a_journal_that_is_written_anew_and_not_synced_before_it_is_renamed_is_caught() {
    is_caught(Broken::LeavesOut(LeftOut::SyncsBesideTheJournal));
}

#[test]
fn a_journal_that_leaves_what_was_refused_where_it_is_is_caught() {
    is_caught(Broken::LeavesOut(LeftOut::Truncations));
}

#[test]
fn a_journal_that_trusts_a_failed_sync_is_caught() {
    is_caught(Broken::TrustsFailedSyncs);
}
