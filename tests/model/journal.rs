//! The journal's elected writer: against a disk that fails or is stuck, a writer that panics, and stopping.

use super::*;
use crate::hub::STOP_WAIT;
use crate::sync::enter;
use std::fs::{self, Disk, set_disk};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;
use std::{env, process};

/// A journal's path, of which nothing is left afterwards, also where the model fails.
struct Place(PathBuf);

impl Place {
    fn new() -> Place {
        let memory = PathBuf::from("/dev/shm"); // nobody pulls the plug here
        let directory = if memory.is_dir() { memory } else { env::temp_dir() };
        let place = Place(directory.join(format!("brooklet-model-{}", process::id())));
        place.clear();
        place
    }

    fn clear(&self) {
        let _ = fs::remove_file(&self.0);
        let _ = fs::remove_file(self.0.with_extension("new"));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clear();
    }
}

/// What a publisher was told of its event.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Published(Id),
    Refused,
    /// "It may be published, or not."
    Unknown,
}

/// The journal's own thread takes a turn each second, after which everybody looks again.
const WAKE_TIME: Duration = Duration::from_millis(500);

/// What was published, what its publisher was told, and when.
type Answer = (String, Told, Instant);

/// Publishes. With a disk that works, and nobody slow, no time passes meanwhile: else nobody was woken.
fn try_publishing(server: &Handle, name: usize, is_watched: bool) -> JoinHandle<Vec<Answer>> {
    let hub = server.hub();
    let publish = move |n: usize| {
        let data = format!("{name}.{n}");
        let began = Instant::now();
        let published = catch_unwind(AssertUnwindSafe(|| hub.publish("a", Event::new(&data))));
        assert!(!is_watched || began.elapsed() < WAKE_TIME, "a publisher slept for {:?}", began.elapsed());
        let told = match published {
            Ok(Ok(id)) => Told::Published(id),
            Ok(Err(error)) if error.to_string().contains("may be published") => Told::Unknown,
            _ => Told::Refused,
        };
        (data, told, Instant::now())
    };
    spawn("publisher", move || (0..2).map(publish).collect())
}

/// Publishes from several threads, has the trouble come and go, and stops meanwhile or afterwards. Whatever the publishers
/// were told must hold, for who is live and for who comes after the next start.
fn run(trouble: Disk) {
    let place = Place::new();
    let config = Config::default().with(|config| {
        config.journal = Some(place.0.clone());
        config.fsync = below(2) == 0;
    });
    let is_watched = trouble == Disk::Works && below(2) == 0;
    if is_watched {
        be_punctual();
    }
    let server = start(config.clone());
    let peer = get(&server, "/events/a?since=earliest", ROOMY);
    let live = Arc::new(Mutex::new(Vec::new()));
    let heard = live.clone();
    let reader = spawn("reader", move || {
        let mut seen = Seen::default();
        while seen.read_some(&peer, ROOMY) {
            *enter(&heard) = seen.heard();
        }
    });
    let stops_at_once = below(2) == 0;
    // While the journal's own thread writes, publishers have their answers though the disk stays as it is.
    let lasts = stops_at_once && config.fsync;
    if lasts {
        set_disk(trouble);
    }
    let publishers: Vec<_> = (0..3).map(|name| try_publishing(&server, name, is_watched)).collect();
    let troubling = (!lasts).then(|| {
        spawn("trouble", move || {
            set_disk(trouble);
            thread::sleep(Duration::from_millis([0, 3, 2_000][below(3)]));
            set_disk(Disk::Works);
        })
    });
    let mut told: Vec<_> = Vec::new();
    if stops_at_once {
        dawdle();
        be_punctual();
        let stopping = Instant::now();
        stop(server);
        publishers.into_iter().for_each(|thread| told.extend(thread.join().unwrap()));
        let latest = told.iter().map(|(_, _, at)| at.duration_since(stopping)).max().unwrap_or_default();
        assert!(!lasts || latest < STOP_WAIT + WAKE_TIME / 2, "the last answer came {latest:?} after stopping");
    } else {
        publishers.into_iter().for_each(|thread| told.extend(thread.join().unwrap()));
        let published = told.iter().filter(|(_, told, _)| matches!(told, Told::Published(_))).count();
        while enter(&live).len() < published {
            thread::sleep(Duration::from_millis(100));
        }
        stop(server);
    }
    if lasts {
        set_disk(Disk::Works);
    }
    troubling.into_iter().for_each(|thread| thread.join().unwrap());
    reader.join().unwrap();
    let live = enter(&live);
    let again = loop {
        match Server::bind("127.0.0.1:3000", config.clone().with(|config| config.lanes = 1)) {
            Ok(server) => break server.spawn().unwrap(),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy, "{error}"),
        }
        thread::sleep(Duration::from_millis(100)); // its thread closes the journal once the disk has answered
    };
    let mut kept = Seen::default();
    kept.read(&get(&again, "/events/a?since=earliest&poll=1s", ROOMY), ROOMY, usize::MAX);
    stop(again);
    let kept = kept.heard();
    assert!(kept.is_sorted() && live.is_sorted(), "in the order of the ids");
    assert_eq!(*live, kept[..live.len()], "who was live has heard the first of them, each once");
    for (data, told, _) in told {
        let found = kept.iter().find(|(_, other)| *other == data).map(|(id, _)| *id);
        match told {
            Told::Published(id) => assert_eq!(found, Some(id), "{data} was published"),
            Told::Refused => assert_eq!(found, None, "{data} was refused"),
            Told::Unknown => {}
        }
    }
}

#[test]
fn publishers_have_their_answers_whoever_writes_and_whenever_the_server_stops() {
    check("the journal", PATIENCE, || run(Disk::Works));
}

#[test]
fn what_a_full_disk_refuses_nobody_hears() {
    check("a full disk", PATIENCE, || run(Disk::IsFull));
}

#[test]
fn a_stuck_disk_leaves_no_publisher_without_an_answer() {
    check("a stuck disk", PATIENCE, || run(Disk::IsStuck));
}

#[test]
fn a_writer_that_panics_takes_no_other_publisher_along() {
    check("a panicking writer", PATIENCE, || run(Disk::Panics));
}
