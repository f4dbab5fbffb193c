//! Explores the schedules of a model, each from a seed of its own.
//!
//! Even seeds choose whoever goes on at each point, at random. Odd ones give each thread a priority, and let the one with
//! the highest go on, which falls behind all others at some points: a fault that needs few of them, at the right places, is
//! found far sooner so ("A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs", ASPLOS 2010). How often time
//! jumps though others can go on is up to the seed, too.

use crate::fs::{Disk, set_disk};
use crate::time;
use ::std::collections::{HashMap, VecDeque};
use ::std::env;
use ::std::time::{Duration, Instant};
use shuttle::scheduler::{Schedule, Scheduler, Task, TaskId};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

/// Which of the threads lets time pass: the model's is the first, this the second.
const TIME: usize = 1;
/// More points than any schedule has that comes to an end.
const MOST_POINTS: usize = 300_000;
/// So many of the last points are reported where a model fails.
const TRAIL: usize = 40;
const STACK_BYTES: usize = 256 * 1024;

/// Runs the model in many schedules: `SCHEDULES` of them, or as many as fit into `MODEL_SECONDS`. `SEED` repeats one, and
/// `MODEL` leaves the others out. Fails where the model does, where all sleep, or where somebody still waits after `limit`
/// of the model's time.
pub fn check(name: &'static str, limit: Duration, model: impl Fn() + Send + Sync + 'static) {
    let number = |name| env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if env::var("MODEL").is_ok_and(|wanted| !wanted.is_empty() && wanted != name) {
        return;
    }
    let seed = number("SEED");
    let most = if seed.is_some() { 1 } else { number("SCHEDULES").unwrap_or(u64::MAX) };
    let mut config = Config::new();
    config.stack_size = STACK_BYTES;
    config.failure_persistence = FailurePersistence::None;
    config.max_steps = MaxSteps::FailAfter(MOST_POINTS);
    let seconds = number("MODEL_SECONDS").or((most == u64::MAX).then_some(5));
    config.max_time = seconds.map(Duration::from_secs);
    config.silence_warnings = true;
    let (explorer, started) = (Explorer::new(name, seed.unwrap_or(0), most), Instant::now());
    let schedules = Runner::new(explorer, config).run(move || {
        time::begin(limit);
        let passing = shuttle::thread::Builder::new().name("time".into()).spawn(time::pass).unwrap();
        set_disk(Disk::Works);
        crate::io::take_lines();
        model();
        time::end();
        passing.join().unwrap();
    });
    println!("model {name}: {schedules} schedules in {:.1} s", started.elapsed().as_secs_f64());
}

struct Explorer {
    name: &'static str,
    started: Instant,
    next_seed: u64,
    left: u64,
    explored: u64,
    random: Random,
    /// Of each thread that has been seen, in a schedule by priorities: the highest goes on.
    priorities: Option<HashMap<usize, i64>>,
    /// At which points the thread that goes on falls behind all others.
    changes: Vec<u64>,
    lowest: i64,
    points: u64,
    /// One of so many choices lets time jump though others can go on; 0 for none.
    early: u64,
    /// Of all choices of this schedule, and of the first one, which is run twice.
    hash: u64,
    first: Option<u64>,
    /// Who went on last, and what everybody is called, for the report.
    trail: VecDeque<usize>,
    names: HashMap<usize, String>,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

impl Explorer {
    fn new(name: &'static str, next_seed: u64, left: u64) -> Explorer {
        let (started, random) = (Instant::now(), Random(0));
        let (priorities, changes, trail, names) = (None, Vec::new(), VecDeque::new(), HashMap::new());
        let (explored, lowest, points, early, hash, first) = (0, 0, 0, 0, 0, None);
        Explorer {
            name,
            started,
            next_seed,
            left,
            explored,
            random,
            priorities,
            changes,
            lowest,
            points,
            early,
            hash,
            first,
            trail,
            names,
        }
    }

    fn fall_behind(&mut self, thread: usize) {
        self.lowest -= 1;
        let lowest = self.lowest;
        self.priorities.iter_mut().for_each(|priorities| _ = priorities.insert(thread, lowest));
    }
}

impl Scheduler for Explorer {
    fn new_execution(&mut self) -> Option<Schedule> {
        match (self.explored, self.first) {
            (1, None) => (self.first, self.next_seed) = (Some(self.hash), self.next_seed - 1),
            (2, Some(first)) => assert_eq!(self.hash, first, "the seed of a schedule must say all: it was run twice"),
            _ => {}
        }
        self.left = self.left.checked_sub(1)?;
        let seed = self.next_seed;
        self.next_seed += 1;
        self.hash = 0;
        self.explored += 1;
        self.random = Random(seed);
        self.random.next();
        self.priorities = (seed % 2 == 1).then(HashMap::new);
        // Few, and as often among the first ten points as among the next hundred; a thread that falls asleep keeps its own.
        let count = self.random.below(5);
        self.changes = (0..count)
            .map(|_| {
                let scale = self.random.below(13);
                self.random.below(1 << scale)
            })
            .collect();
        (self.lowest, self.points) = (0, 0);
        self.trail.clear();
        self.names.clear();
        self.early = [0, 20, 100, 500][self.random.below(4) as usize];
        Some(Schedule::new(seed))
    }

    fn next_task(&mut self, runnable: &[&Task], current: Option<TaskId>, is_yielding: bool) -> Option<TaskId> {
        let chosen = self.choose(runnable, current, is_yielding)?;
        self.hash = self.hash.wrapping_mul(31).wrapping_add(usize::from(chosen) as u64);
        if self.trail.len() == TRAIL {
            self.trail.pop_front();
        }
        self.trail.push_back(chosen.into());
        if let Some(task) = runnable.iter().find(|task| task.id() == chosen) {
            self.names.entry(chosen.into()).or_insert_with(|| task.display_name());
        }
        Some(chosen)
    }

    fn next_u64(&mut self) -> u64 {
        self.random.next()
    }
}

impl Explorer {
    fn choose(&mut self, runnable: &[&Task], current: Option<TaskId>, is_yielding: bool) -> Option<TaskId> {
        // shuttle lets those who sleep wake for no reason: nothing here needs that, and time would never pass.
        let awake = runnable.iter().filter(|task| task.runnable());
        let mut threads: Vec<usize> = awake.map(|task| task.id().into()).collect();
        let others: Vec<usize> = threads.iter().copied().filter(|thread| *thread != TIME).collect();
        if others.len() < threads.len() {
            let is_alone = others.is_empty();
            if is_alone || self.early > 0 && self.random.below(self.early) == 0 {
                time::note_choice(is_alone);
                return Some(TIME.into());
            }
            threads = others;
        }
        self.points += u64::from(threads.len() > 1);
        if let Some(current) = current.map(usize::from)
            && (is_yielding && threads.contains(&current) || threads.len() > 1 && self.changes.contains(&self.points))
        {
            self.fall_behind(current);
        }
        let Some(priorities) = &mut self.priorities else {
            return Some(threads[self.random.below(threads.len() as u64) as usize].into());
        };
        for thread in &threads {
            priorities.entry(*thread).or_insert_with(|| (self.random.next() >> 2) as i64);
        }
        threads.into_iter().max_by_key(|thread| priorities[thread]).map(TaskId::from)
    }
}

impl Drop for Explorer {
    fn drop(&mut self) {
        if ::std::thread::panicking() {
            let (name, explored, seconds) = (self.name, self.explored, self.started.elapsed().as_secs_f64());
            let seed = self.next_seed - 1;
            let trail: Vec<_> = self.trail.iter().map(|thread| self.names[thread].as_str()).collect();
            eprintln!("who went on at the last points: {}", trail.join(", "));
            eprintln!("model {name}: found in schedule {explored}, after {seconds:.1} s; again with SEED={seed}");
        }
    }
}
