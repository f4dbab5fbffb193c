//! Time stands still while anybody can go on; then it jumps to the next moment that somebody waits for. Now and then it
//! jumps before, if that is near: whoever could go on was slow.

use crate::point;
use ::std::cell::RefCell;
use ::std::collections::BTreeMap;
use ::std::ops::{Add, AddAssign, Sub};
use ::std::sync::Arc;
use ::std::sync::atomic::{AtomicBool, Ordering::SeqCst};
pub use ::std::time::*;

/// Where a model's time begins: later than any span that is taken off.
const START: Duration = Duration::from_secs(1_000_000);
/// Nobody is slow for longer than this at a time: more than a lane's sweep.
const SLOWEST: Duration = Duration::from_secs(2);
/// To ask for the time takes a while, so that whoever asks again and again gets on.
const LOOK: Duration = Duration::from_micros(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(Duration);

/// The clock on the wall, which nobody sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SystemTime(Duration);

pub const UNIX_EPOCH: SystemTime = SystemTime(Duration::ZERO);

#[derive(Default)]
struct Clock {
    now: Duration,
    /// Who waits until when.
    timers: BTreeMap<(Duration, u64), Arc<Sleeper>>,
    next_timer: u64,
    /// How long nobody has been able to go on, in all, and how long that may be.
    idle: Duration,
    limit: Duration,
    /// The names of all who sleep, with or without a timer.
    asleep: Vec<String>,
    is_over: bool,
    /// Nobody is slow any more.
    is_punctual: bool,
    /// Nobody else can go on.
    is_alone: bool,
}

thread_local! {
    static CLOCK: RefCell<Clock> = RefCell::default();
}

impl Clock {
    /// Jumps to the moment of a timer, and returns whom it wakes.
    fn jump(&mut self, timer: (Duration, u64)) -> Option<Arc<Sleeper>> {
        let time = timer.0.saturating_sub(self.now);
        if self.is_alone {
            self.idle += time;
            assert!(self.idle < self.limit, "after {:?} these still wait: {}", self.idle, self.asleep.join(", "));
        } else if time > SLOWEST || self.is_punctual {
            return None;
        }
        self.now += time;
        self.timers.remove(&timer)
    }
}

fn with<T>(work: impl FnOnce(&mut Clock) -> T) -> T {
    CLOCK.with_borrow_mut(work)
}

impl Instant {
    pub fn now() -> Instant {
        with(|clock| {
            clock.now += LOOK;
            Instant(clock.now)
        })
    }

    pub fn duration_since(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    pub fn saturating_duration_since(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    pub fn elapsed(self) -> Duration {
        Instant::now().duration_since(self)
    }

    pub fn checked_add(self, time: Duration) -> Option<Instant> {
        self.0.checked_add(time).map(Instant)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, time: Duration) -> Instant {
        Instant(self.0 + time)
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, time: Duration) {
        self.0 += time;
    }
}

impl Sub<Duration> for Instant {
    type Output = Instant;
    fn sub(self, time: Duration) -> Instant {
        Instant(self.0 - time)
    }
}

impl Sub for Instant {
    type Output = Duration;
    fn sub(self, earlier: Instant) -> Duration {
        self.duration_since(earlier)
    }
}

impl SystemTime {
    pub fn now() -> SystemTime {
        SystemTime(Instant::now().0)
    }

    pub fn duration_since(self, earlier: SystemTime) -> Result<Duration, SystemTimeError> {
        Ok(self.0.saturating_sub(earlier.0))
    }
}

/// Somebody who waits to be woken.
pub(crate) struct Sleeper {
    thread: shuttle::thread::Thread,
    is_awake: AtomicBool,
}

impl Sleeper {
    pub fn wake(&self) {
        self.is_awake.store(true, SeqCst);
        self.thread.unpark();
    }
}

/// Those who wait for one thing.
#[derive(Default)]
pub(crate) struct Sleepers(::std::sync::Mutex<Vec<Arc<Sleeper>>>);

impl Sleepers {
    pub const fn new() -> Sleepers {
        Sleepers(::std::sync::Mutex::new(Vec::new()))
    }

    /// Sleeps until somebody wakes this thread, or until the time has come: true then. There is no point before it sleeps.
    pub fn sleep(&self, until: Option<Instant>) -> bool {
        let me = Arc::new(Sleeper { thread: shuttle::thread::current(), is_awake: false.into() });
        self.0.lock().unwrap().push(me.clone());
        let timer = until.map(|Instant(at)| {
            with(|clock| {
                clock.next_timer += 1;
                clock.timers.insert((at, clock.next_timer), me.clone());
                (at, clock.next_timer)
            })
        });
        let name = me.thread.name().unwrap_or("the model").to_string();
        with(|clock| clock.asleep.push(name.clone()));
        while !me.is_awake.load(SeqCst) {
            shuttle::thread::park();
        }
        with(|clock| clock.asleep.iter().position(|other| *other == name).map(|at| clock.asleep.swap_remove(at)));
        if let Some(timer) = timer {
            with(|clock| clock.timers.remove(&timer));
        }
        let mut sleepers = self.0.lock().unwrap();
        let here = sleepers.iter().position(|other| Arc::ptr_eq(other, &me));
        here.map(|at| sleepers.remove(at)).is_some()
    }

    /// Wakes one of them, whichever.
    pub fn wake_one(&self) {
        let count = self.0.lock().unwrap().len();
        if count > 0 {
            let woken = self.0.lock().unwrap().remove(crate::below(count));
            woken.wake();
        }
    }

    pub fn wake_all(&self) {
        let woken: Vec<_> = self.0.lock().unwrap().drain(..).collect();
        woken.iter().for_each(|sleeper| sleeper.wake());
    }
}

pub(crate) fn sleep(time: Duration) {
    point();
    Sleepers::new().sleep(Some(Instant::now() + time));
}

/// Begins a run, which fails where nobody can go on for longer than this.
pub(crate) fn begin(limit: Duration) {
    with(|clock| *clock = Clock { now: START, limit, ..Clock::default() });
}

pub(crate) fn end() {
    with(|clock| clock.is_over = true);
}

/// From here on time passes only while nobody can go on: for what must be over in time where nobody is slow.
pub fn be_punctual() {
    with(|clock| clock.is_punctual = true);
}

/// The scheduler has chosen time to go on: because nobody else can?
pub(crate) fn note_choice(is_alone: bool) {
    with(|clock| clock.is_alone = is_alone);
}

/// The thread that lets time pass.
pub(crate) fn pass() {
    loop {
        let (next, is_over) = with(|clock| (clock.timers.first_key_value().map(|(key, _)| *key), clock.is_over));
        let is_alone = with(|clock| clock.is_alone);
        match next {
            Some(key) => {
                let sleeper = with(|clock| clock.jump(key));
                sleeper.iter().for_each(|sleeper| sleeper.wake());
            }
            None if is_over && is_alone => return, // whoever slept has ended, or never will: shuttle says so
            None => assert!(!is_alone, "nobody can go on: asleep are {}", with(|clock| clock.asleep.join(", "))),
        }
        point();
    }
}
