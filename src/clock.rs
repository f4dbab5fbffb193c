//! The clock: Unix milliseconds for ids, ages that setting the clock cannot change, the date for responses, and random
//! times.
//!
//! Two clocks, for two questions. An id says when an event was published as people read it, so it comes from the wall
//! clock, which may jump. How old an event is, and how long to wait, is measured by the monotonic clock; otherwise
//! setting the clock forward by a day would delete everything that is kept.

use crate::sync::enter;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Unix time in milliseconds, by the wall clock; 0 while that stands before 1970, as on devices without a battery.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

/// A time in milliseconds; the largest number where it is longer than that.
pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds that go on evenly, whatever the clock is set to: they begin as Unix time and are counted by the
/// monotonic clock from there. The history takes an event's age from this and not from its id, since ids run ahead of a
/// clock that was set back.
pub struct Steady {
    start: Instant,
    /// What the wall clock said at `start`.
    start_ms: u64,
}

impl Steady {
    pub fn start() -> Steady {
        Steady { start: Instant::now(), start_ms: now_ms() }
    }

    pub fn now_ms(&self) -> u64 {
        self.start_ms.saturating_add(self.start.elapsed().as_millis() as u64)
    }

    /// The moment of something that happened before the start and was given this Unix time. It cannot be in the future:
    /// where it seems so, the clock has been set back since. Nothing more is known then, and it counts as new.
    pub fn before_start(&self, unix_ms: u64) -> u64 {
        unix_ms.min(self.start_ms)
    }
}

/// The date of now, for a response. Nearly every response has the same one as the response before, and to format it
/// anew would cost as much as the rest of the head: so each second's is made once and shared.
pub fn date() -> Arc<str> {
    static DATE: Mutex<Option<(u64, Arc<str>)>> = Mutex::new(None);
    let (second, mut date) = (now_ms() / 1000, enter(&DATE));
    match &*date {
        Some((of, text)) if *of == second => text.clone(),
        _ => date.insert((second, http_date(second).into())).1.clone(),
    }
}

/// Unix seconds as RFC 9110 §5.6.7 writes a moment: `Sun, 06 Nov 1994 08:49:37 GMT`. Years are counted from March, so
/// that the leap day is a year's last, in eras of 400 years (146,097 days), after which the calendar repeats.
fn http_date(seconds: u64) -> String {
    let days = seconds / 86_400 + 719_468; // since 0000-03-01
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // From March on, the months' lengths repeat: 31, 30, 31, 30, 31, which is 153 days for five of them.
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let year = days / 146_097 * 400 + year_of_era + u64::from(from_march >= 10);
    let month = &"MarAprMayJunJulAugSepOctNovDecJanFeb"[from_march as usize * 3..][..3];
    let weekday = &"ThuFriSatSunMonTueWed"[(days + 6) as usize % 7 * 3..][..3];
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{weekday}, {day:02} {month} {year:04} {hour:02}:{minute:02}:{second:02} GMT")
}

/// A random time between these percentages of `time`: clients that were cut or rejected at the same moment must not
/// return at the same moment.
pub fn spread(time: Duration, from: u64, to: u64) -> Duration {
    // The standard library's one source of randomness: every `RandomState` has keys of its own. Good enough to spread
    // times, and never used for a secret.
    let percent = from + RandomState::new().hash_one(0) % (to - from + 1);
    Duration::from_millis((time.as_millis() as u64).saturating_mul(percent) / 100)
}
