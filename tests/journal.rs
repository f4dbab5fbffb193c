//! The journal: what was answered with 200 survives, whatever happens to the process and to the file.

use crate::common::*;
use brooklet::{Config, Event, Handle, Id};
use std::collections::BTreeSet;
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{fs, thread};

#[test]
fn after_a_restart_events_keys_gaps_and_ids_are_as_before() {
    let dir = Scratch::new();
    let config = with_journal(&dir.path("events")).with(|config| config.keep_events = 5);
    let server = serve(config.clone());
    let hub = server.hub();
    let ids: Vec<Id> =
        (0..9).map(|n| hub.publish("a", Event::new(n.to_string()).key(format!("k{n}"))).unwrap()).collect();
    let other = hub.publish("b", Event::new("other")).unwrap();
    let targets = [
        "a?since=earliest".into(),
        "a,b?since=earliest".into(),
        format!("a?last_event_id={}", ids[2]),
        format!("a?last_event_id={}", ids[3]),
        format!("a,b?last_event_id={}", ids[6]),
        "c?last_event_id=1-1".into(),
        "b?last_event_id=99999999999999-0".into(),
        "a".into(),
    ];
    let look = |server: &Handle| -> Vec<Vec<u8>> {
        let polled = |target: &String| {
            let join = if target.contains('?') { '&' } else { '?' };
            Wire::stream(server.addr().unwrap(), &format!("/events/{target}{join}poll=1ms"), "").rest()
        };
        targets.iter().map(polled).collect()
    };
    let before = look(&server);
    drop(server);
    for round in 0..2 {
        let server = serve(config.clone());
        for (now, then) in look(&server).iter().zip(&before) {
            assert_eq!(str::from_utf8(now), str::from_utf8(then), "round {round}");
        }
        assert_eq!(server.hub().publish("a", Event::new("again").key("k8")).unwrap(), ids[8], "the key is known");
        assert!(server.hub().publish("new", Event::new("x").key(format!("r{round}"))).unwrap() > other);
        drop(server);
        // The rest compares with the same newest id again.
        let bytes = fs::read(config.journal.as_ref().unwrap()).unwrap();
        let all = blocks(&bytes);
        fs::write(config.journal.as_ref().unwrap(), all[..all.len() - 1].concat()).unwrap();
    }
}

#[test]
fn a_cursor_from_before_the_journal_hears_a_gap() {
    let dir = Scratch::new();
    let server = serve(with_journal(&dir.path("events")));
    for cursor in ["1-1", "99999999999999-0"] {
        let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), &format!("/events/a?last_event_id={cursor}"), "");
        assert!(stream.event().unwrap().is_gap());
    }
}

/// Where the process of the moment listens, for those who outlive many. Between two they wait: knocking at the one that is
/// gone would take the processor from the one that starts.
#[derive(Default)]
struct Current {
    addr: Mutex<Option<SocketAddr>>,
    changed: Condvar,
}

impl Current {
    fn set(&self, addr: Option<SocketAddr>) {
        *self.addr.lock().unwrap() = addr;
        self.changed.notify_all();
    }

    fn wait(&self) -> SocketAddr {
        let addr = self.addr.lock().unwrap();
        let (addr, _) = self.changed.wait_timeout_while(addr, PATIENCE, |addr| addr.is_none()).unwrap();
        addr.expect("the next process to start")
    }
}

#[test]
fn two_hundred_kills_lose_nothing_that_was_answered_and_repeat_nothing() {
    const ROUNDS: usize = 200;
    let dir = Scratch::new();
    let path = dir.path("events");
    // At an address of its own: the port of who was killed may next be another test's, and be asked meanwhile.
    let flags = ["--listen", "127.0.0.2:0", "--journal", &path, "--log", "off"];
    let flags = [&flags[..], &["--keep-events", "10000000", "--keep-bytes", "1GiB"]].concat();
    let start_once = || Process::from(Command::new(BROOKLET).args(&flags));
    let (current, done) = (Arc::new(Current::default()), Arc::new(AtomicBool::new(false)));
    let acknowledged = Arc::new(Mutex::new(Vec::new()));

    // Each speaks with whatever process there is, and begins again with the next one.
    let publishers: Vec<_> = (0..4)
        .map(|n| {
            let (current, done, acknowledged) = (current.clone(), done.clone(), acknowledged.clone());
            thread::spawn(move || {
                while !done.load(SeqCst) {
                    let Ok(socket) = TcpStream::connect(current.wait()) else { continue };
                    let mut wire = Wire::on(socket);
                    let request = post_request(&format!("/events/t{n}"), "event");
                    while !done.load(SeqCst) && wire.socket.write_all(request.as_bytes()).is_ok() {
                        let Some(head) = wire.take_until(b"\r\n\r\n") else { break };
                        assert!(head.starts_with(b"HTTP/1.1 200 "), "{:?}", String::from_utf8_lossy(&head));
                        let Some(id) = wire.take_until(b"\n") else { break };
                        acknowledged.lock().unwrap().push(str::from_utf8(&id).unwrap().trim().parse::<Id>().unwrap());
                    }
                }
            })
        })
        .collect();
    let subscribers: Vec<_> = (0..20)
        .map(|n| {
            let (current, done) = (current.clone(), done.clone());
            thread::spawn(move || {
                let (mut seen, mut cursor): (Vec<Id>, Option<Id>) = (Vec::new(), None);
                let topics = if n % 2 == 0 { "t0,t1,t2,t3" } else { "t0,t1,t2,t3,unused" };
                loop {
                    let addr = current.wait();
                    let Ok(socket) = TcpStream::connect(addr) else { continue };
                    let mut wire = Wire::on(socket);
                    let from = cursor.map_or("?since=earliest".into(), |id| format!("?last_event_id={id}"));
                    let request = format!("GET /events/{topics}{from} HTTP/1.1\r\nHost: localhost\r\n\r\n");
                    if wire.socket.write_all(request.as_bytes()).is_err() || wire.head_if_any().is_none() {
                        continue;
                    }
                    while let Some(block) = wire.block() {
                        assert!(!block.is_gap(), "{block:?} after {cursor:?}");
                        if block.data.is_some() {
                            if block.event.as_deref() == Some("last") {
                                return seen;
                            }
                            seen.push(block.id());
                        }
                        cursor = block.id.as_ref().map(|_| block.id()).or(cursor);
                    }
                    assert!(!done.load(SeqCst) || addr != current.wait() || wire.buffer.is_empty());
                }
            })
        })
        .collect();

    let mut random = Random(17);
    for _ in 0..ROUNDS {
        let process = start_once();
        current.set(Some(process.addr));
        thread::sleep(Duration::from_millis(10 + random.below(40) as u64));
        current.set(None);
        drop(process); // kill -9
    }
    let process = start_once();
    current.set(Some(process.addr));
    done.store(true, SeqCst);
    publishers.into_iter().for_each(|publisher| publisher.join().unwrap());
    assert_eq!(post(process.addr, "/events/t0?event=last", "").status, 200);
    let acknowledged: BTreeSet<Id> = acknowledged.lock().unwrap().iter().copied().collect();
    assert!(acknowledged.len() >= ROUNDS, "only {} were published", acknowledged.len());
    for (n, subscriber) in subscribers.into_iter().enumerate() {
        let seen = subscriber.join().unwrap();
        assert!(seen.is_sorted_by(|a, b| a < b), "subscriber {n}: out of order, or twice");
        let seen: BTreeSet<Id> = seen.into_iter().collect();
        let lost: Vec<_> = acknowledged.difference(&seen).collect();
        assert!(lost.is_empty(), "subscriber {n} lost {} of {}: {lost:?}", lost.len(), acknowledged.len());
    }
    eprintln!("{ROUNDS} kills, {} events, 20 subscribers: none lost, none twice", acknowledged.len());
}

/// What the last seconds of a machine brought may be missing from a file that was not synced, and nothing in it shows that.
/// Makes a journal one that was begun before the machine has restarted.
fn as_in_another_boot(path: &str) {
    let bytes = fs::read(path).unwrap();
    let old = String::from_utf8(blocks(&bytes)[0].clone()).unwrap();
    let frame = &old[old.find("id: ").unwrap()..];
    let new = sealed("boot: 00000000-0000-0000-0000-000000000000\n", frame);
    fs::write(path, [new.as_bytes(), &bytes[old.len()..]].concat()).unwrap();
}

#[test]
fn after_another_boot_pages_hear_a_gap_unless_everything_was_synced() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let head = || String::from_utf8(blocks(&fs::read(&path).unwrap())[0].clone()).unwrap();
    let starts_with = |cursor: Id, fsync: bool| {
        let server = serve(with_journal(&path).with(|config| config.fsync = fsync));
        let id = server.hub().publish("a", Event::new("next")).unwrap();
        let target = format!("/events/a?last_event_id={cursor}");
        let is_gap = Wire::subscribe(server.addr().unwrap(), &target, "").0.event().unwrap().is_gap();
        (is_gap, id)
    };
    let in_another_boot = || as_in_another_boot(&path);
    drop(serve(with_journal(&path)));
    let cursor = id_of(head().as_bytes());
    let (is_gap, cursor) = starts_with(cursor, false);
    assert!(!is_gap && head().starts_with(&format!("boot: {boot}sum: ")), "{}", head());
    in_another_boot();
    let (is_gap, cursor) = starts_with(cursor, false);
    assert!(is_gap);
    let (is_gap, cursor) = starts_with(cursor, false);
    assert!(!is_gap, "what was written after the boot is there");
    in_another_boot();
    let (is_gap, cursor) = starts_with(cursor, true);
    assert!(is_gap && head().starts_with("sum: "), "{}", head());
    let (is_gap, cursor) = starts_with(cursor, true);
    assert!(!is_gap);
    let (is_gap, cursor) = starts_with(cursor, false);
    assert!(!is_gap && head().starts_with("boot: "), "{}", head());
    // Where there is no room to write that down, it is said again at the next start.
    in_another_boot();
    fs::create_dir_all(format!("{path}.new/in the way")).unwrap();
    let (is_gap, cursor) = starts_with(cursor, false);
    assert!(is_gap);
    let (is_gap, cursor) = starts_with(cursor, false);
    assert!(is_gap);
    fs::remove_dir_all(format!("{path}.new")).unwrap();
    let (is_gap, cursor) = starts_with(cursor, false);
    assert!(is_gap);
    let (is_gap, _) = starts_with(cursor, false);
    assert!(!is_gap);
}

/// The power may undo a new name although the directory was synced since: where an earlier sync of it had failed, the
/// kernel may have forgotten that there was anything to write. The file that comes back may be one that was synced, so that
/// it shows no loss, or one after which the same ids would be given again.
#[test]
fn nothing_is_published_to_a_journal_whose_name_may_be_undone() {
    if !has("strace") {
        return;
    }
    for (fault, before) in ["error=EIO", "signal=KILL"]
        .into_iter()
        .flat_map(|fault| ["synced", "of another boot", "damaged", "new"].map(|before| (fault, before)))
    {
        let dir = Scratch::new();
        let path = dir.path("events");
        let inode = || fs::metadata(&path).map(|found| std::os::unix::fs::MetadataExt::ino(&found)).ok();
        let config = with_journal(&path);
        let begin =
            |fsync| serve(config.clone().with(|config| config.fsync = fsync)).hub().publish("a", Event::new("x"));
        match before {
            "synced" => drop(begin(true).unwrap()),
            "of another boot" => {
                begin(false).unwrap();
                as_in_another_boot(&path);
            }
            "damaged" => {
                begin(false).unwrap();
                let bytes = fs::read(&path).unwrap();
                fs::write(&path, [&bytes, &b"data\n\n"[..]].concat()).unwrap();
            }
            _ => {}
        }
        let old = inode();
        // Only the calls on the directory are counted.
        let mut strace = Command::new("timeout");
        strace.args(["30", "strace", "-f", "-o", "/dev/null", "-e", "trace=fsync", "-P", dir.0.to_str().unwrap()]);
        strace.args(["-e", &format!("inject=fsync:{fault}"), BROOKLET, "--listen", "127.0.0.1:0", "--journal", &path]);
        assert!(!output(&mut strace).status.success(), "{before}: it starts, though {fault}");
        let unsure = inode();
        assert_ne!(unsure, old, "{before}: it has the name");
        drop(serve(config.clone()));
        let sure = inode();
        assert_ne!(sure, unsure, "{before}, {fault}: it is written anew");
        drop(serve(config.clone()));
        assert_eq!(inode(), sure, "{before}, {fault}: and that is enough");
    }
}

#[test]
fn a_journal_that_was_moved_to_where_it_is_is_written_anew_if_its_name_cannot_be_synced() {
    if !has("strace") {
        return;
    }
    for flags in [&["--fsync"][..], &[]] {
        let dir = Scratch::new();
        let path = dir.path("events");
        let config = with_journal(&path).with(|config| config.fsync = !flags.is_empty());
        serve(config).hub().publish("a", Event::new("x")).unwrap();
        let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap());
        let moved = inode();
        drop(Traced::start_on(&[dir.0.to_str().unwrap()], &["fsync:error=EIO:when=1"], &path, flags));
        assert_ne!(inode(), moved, "{flags:?}");
    }
}

/// Earlier versions named the boot in a synced file, too, before an unsynced one took its name.
#[test]
fn a_synced_journal_that_names_a_boot_at_its_end_tells_of_what_it_lacks() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let start = |fsync: bool| serve(with_journal(&path).with(|config| config.fsync = fsync));
    let cursor = start(true).hub().publish("a", Event::new("x")).unwrap();
    let synced = fs::read(&path).unwrap();
    let this = format!("boot: {}", fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap());
    let other = "boot: 00000000-0000-0000-0000-000000000000\n";
    for (boot, fsync, hears_gap) in [(&this[..], false, false), (other, false, true), (other, true, true)] {
        fs::write(&path, [&synced, sealed(boot, "id: 0-0\n\n").as_bytes()].concat()).unwrap();
        let server = start(fsync);
        let target = format!("/events/a?last_event_id={cursor}&poll=1ms");
        let first = Wire::stream(server.addr().unwrap(), &target, "").event();
        assert_eq!(first.is_some_and(|first| first.is_gap()), hears_gap, "{boot} {fsync}");
        assert_eq!(fs::read(&path).unwrap().starts_with(b"boot: "), !fsync, "it is written anew");
    }
}

/// Earlier versions locked a file of this name.
#[test]
fn what_stands_beside_the_journal_is_left_alone_and_a_server_of_an_earlier_version_is_seen() {
    let dir = Scratch::new();
    let (path, lock) = (dir.path("events"), dir.path("events.lock"));
    drop(serve(with_journal(&path)));
    assert!(!fs::exists(&lock).unwrap(), "nothing lies beside the journal");
    assert!(shell(&format!("mkfifo {lock}"))); // to open it would never end
    drop(serve(with_journal(&path)));
    fs::remove_file(&lock).unwrap();
    for left in [&b"process 77\n"[..], b"proc", b"dear reader"] {
        fs::write(&lock, left).unwrap();
        let server = serve(with_journal(&path));
        let file = fs::File::open(&lock).unwrap();
        assert!(matches!(file.try_lock(), Err(fs::TryLockError::WouldBlock)), "an earlier version would not start");
        drop(server);
        file.try_lock().unwrap();
        assert_eq!(bind(with_journal(&path)).err().unwrap().kind(), ErrorKind::ResourceBusy);
        assert_eq!(fs::read(&lock).unwrap(), left);
    }
}

#[test]
fn a_second_server_on_the_same_journal_is_told_who_holds_it() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let first = Process::start(&["--journal", &path]);
    let second = output(Command::new(BROOKLET).args(["--listen", "127.0.0.1:0", "--journal", &path]));
    let said = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("process {} ", first.child.id())) && said.contains(&path), "{said}");
    drop(first); // kill -9: the lock goes with the process
    drop(Process::start(&["--journal", &path]));
}

#[test]
fn dropping_the_handle_gives_the_journal_free_though_a_hub_lives_on() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let server = serve(with_journal(&path));
    let hub = server.hub();
    hub.publish("a", Event::new("one")).unwrap();
    assert_eq!(bind(with_journal(&path)).err().unwrap().kind(), ErrorKind::ResourceBusy, "held by this process");
    drop(server);
    assert_eq!(hub.publish("a", Event::new("two")).unwrap_err().kind(), ErrorKind::NotConnected);
    let server = serve(with_journal(&path));
    assert_eq!(kept(server.addr().unwrap(), "a").len(), 1);
}

#[test]
fn programs_that_publish_while_the_server_stops_are_told_and_the_journal_is_free() {
    let dir = Scratch::new();
    for round in 0..100 {
        let config = with_journal(&dir.path(&format!("events{round}"))).with(|config| config.fsync = round % 2 == 0);
        let server = serve(config.clone());
        let (hub, back) = (server.hub(), Arc::new(Mutex::new(Vec::new())));
        for _ in 0..16 {
            let (hub, back) = (hub.clone(), back.clone());
            thread::spawn(move || {
                let mut last = Id::default();
                let error = loop {
                    match hub.publish("a", Event::new("x".repeat(20_000))) {
                        Ok(id) => last = id,
                        Err(error) => break error,
                    }
                };
                back.lock().unwrap().push((last, error.kind()));
            });
        }
        wait_for("something to be published", || {
            (fs::metadata(config.journal.as_ref()?).ok()?.len() > 500_000).then_some(())
        });
        drop(server);
        wait_for(&format!("all publishers to be answered in round {round}"), || {
            (back.lock().unwrap().len() == 16).then_some(())
        });
        let told = back.lock().unwrap().clone();
        assert!(told.iter().all(|(_, kind)| *kind == ErrorKind::NotConnected), "{told:?}");
        let server = serve(config); // though `hub` is still there
        let found: BTreeSet<Id> = kept(server.addr().unwrap(), "a").iter().map(|frame| id_of(frame)).collect();
        assert!(told.iter().all(|(last, _)| *last == Id::default() || found.contains(last)), "round {round}");
        drop(hub);
    }
}

#[test]
fn what_cannot_be_a_journal_is_refused_with_a_clear_error_and_left_alone() {
    let dir = Scratch::new();
    fs::write(dir.path("text"), "a letter\n\nto someone\n\n").unwrap();
    for (path, part) in [
        (dir.0.to_str().unwrap().to_string(), "directory"),
        (dir.path("missing/events"), "No such file"),
        ("/dev/null".into(), "no regular file"),
        (dir.path("text"), "no journal"),
    ] {
        let error = bind(with_journal(&path)).err().unwrap().to_string();
        assert!(error.contains(part) && error.contains(&path), "{error}");
    }
    assert_eq!(fs::read_to_string(dir.path("text")).unwrap(), "a letter\n\nto someone\n\n");
    let error = bind(Config::default().with(|config| config.fsync = true)).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[test]
fn a_journal_that_has_grown_is_written_anew_and_forgets_nothing_that_matters() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let config = with_journal(&path).with(|config| config.keep_events = 10);
    let server = serve(config.clone());
    let first = server.hub().publish("a", Event::new("first")).unwrap();
    server.hub().publish("rare", Event::new("kept").key("k")).unwrap();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
    let body = "x".repeat(50_000);
    for _ in 0..5 {
        let length = || fs::metadata(&path).unwrap().len();
        while length() < 2_000_000 {
            server.hub().publish("a", Event::new(body.clone())).unwrap();
        }
        server.hub().publish("a", Event::new(body.clone())).unwrap();
        wait_for("it to be written anew", || (length() < 1_000_000).then_some(()));
    }
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o640, "its permissions stay");
    drop(server);
    let server = serve(config);
    assert_eq!(kept(server.addr().unwrap(), "a").len(), 10);
    assert_eq!(kept(server.addr().unwrap(), "rare").len(), 1);
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), &format!("/events/a?last_event_id={first}"), "");
    assert!(stream.event().unwrap().is_gap());
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), &format!("/events/rare?last_event_id={first}"), "");
    assert!(!stream.event().unwrap().is_gap(), "this topic has let nothing go");
    let files: Vec<_> = fs::read_dir(&dir.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
}

/// Found by fuzzing: the mark for topics that are gone raised the marks of those that came after it in the file.
#[test]
fn writing_anew_does_not_raise_what_a_topic_has_let_go() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let config = with_journal(&path).with(|config| {
        config.keep_events = 3;
        config.keep_bytes = 300_000;
    });
    let server = serve(config.clone());
    let (_, start) = Wire::subscribe(server.addr().unwrap(), "/events/any", "");
    let body = "x".repeat(60_000);
    let publish = |topic: &str, count: usize| {
        for _ in 0..count {
            server.hub().publish(topic, Event::new(body.clone())).unwrap();
        }
    };
    publish("gone", 1);
    server.hub().publish("rare", Event::new("kept")).unwrap();
    publish("first", 3);
    publish("second", 1); // the budget is used up, and the oldest of all goes, with its topic
    assert_eq!(kept(server.addr().unwrap(), "gone").len(), 0);
    publish("first", 60);
    wait_for("it to be written anew", || (fs::metadata(&path).unwrap().len() < 2_000_000).then_some(()));
    drop(server);
    let server = serve(config);
    for (topic, is_gap) in [("gone", true), ("first", true), ("rare", false)] {
        let target = format!("/events/{topic}?last_event_id={start}");
        let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), &target, "");
        assert_eq!(stream.event().unwrap().is_gap(), is_gap, "{topic}");
    }
}

#[test]
fn a_crash_at_any_step_of_writing_anew_leaves_one_whole_journal() {
    if !has("strace") {
        return;
    }
    // Without the first, of the new file alone; its directory is synced once at the start, and by the journal's own thread
    // once the new file has been synced.
    for (call, nth) in [("write", 1), ("write", 3), ("fdatasync", 1), ("fsync", 1), ("rename", 1), ("fsync", 2)] {
        let dir = Scratch::new();
        let (path, new_path) = (dir.path("events"), dir.path("events.new"));
        let config = with_journal(&path).with(|config| {
            config.keep_events = 10;
            config.fsync = true;
        });
        drop(serve(config.clone()));
        let paths: &[&str] = if nth == 2 { &[] } else { &[&new_path] };
        let inject = [format!("{call}:signal=KILL:when={nth}")];
        let flags = ["--keep-events", "10", "--fsync"];
        let mut traced = Traced::start_on(paths, &inject.each_ref().map(|what| &what[..]), &path, &flags);
        let (mut wire, mut last, body) = (Wire::connect(traced.process.addr), None, "x".repeat(50_000));
        for count in 0.. {
            assert!(count < 1_000, "{call} {nth} was never reached");
            let sent = wire.socket.write_all(post_request("/events/a", &body).as_bytes()).is_ok();
            let Some(head) = Some(()).filter(|()| sent).and_then(|()| wire.take_until(b"\r\n\r\n")) else { break };
            assert!(head.starts_with(b"HTTP/1.1 200"));
            last = wire.take_until(b"\n").map(|id| str::from_utf8(&id).unwrap().trim().parse::<Id>().unwrap());
        }
        traced.process.child.wait().unwrap();
        let before = fs::metadata(&path).unwrap().len();
        let server = serve(config);
        let found = kept(server.addr().unwrap(), "a");
        assert!(found.iter().any(|frame| Some(id_of(frame)) == last), "{call} {nth}: the last that was answered");
        assert_eq!(found.len(), 10, "{call} {nth}");
        assert_eq!(before > 2_000_000, (call, nth) != ("fsync", 2), "{call} {nth}: the old one, or the new one");
        server.hub().publish("a", Event::new(body)).unwrap();
        assert_eq!(kept(server.addr().unwrap(), "a").len(), 10);
        drop(traced);
        let files: Vec<_> = fs::read_dir(&dir.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(files.len(), 1, "{call} {nth}: {files:?}");
    }
}

/// Runs the command on a file system of its own, of 2 MB; `None` where the system does not let a test have one.
fn on_a_small_disk(dir: &Scratch, options: &str, flags: &str) -> Option<Command> {
    if !(has("unshare") && shell("unshare -rm true") || left_out("a file system of its own (unshare -rm)")) {
        return None;
    }
    fs::create_dir(dir.path("disk")).unwrap();
    let script = format!(
        "mount -t tmpfs -o size=2m tmpfs $1/disk && head -c 1000000 /dev/zero >$1/disk/filler && {options} {{
             (until [ -e $1/trigger ] || ! [ -d $1 ]; do sleep 0.05; done; rm -f $1/disk/filler) &
             exec $2 --listen 127.0.0.1:0 --journal $1/disk/events {flags}
         }}"
    );
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", &script, "sh", dir.0.to_str().unwrap(), BROOKLET]);
    Some(command)
}

#[test]
fn a_full_disk_is_answered_with_507_and_works_again_once_there_is_room() {
    let dir = Scratch::new();
    let Some(mut command) = on_a_small_disk(&dir, "", "--keep-events 100000") else { return };
    let process = Process::from(&mut command);
    let journal = format!("/proc/{}/root{}", process.child.id(), dir.path("disk/events"));
    let (mut stream, _) = Wire::subscribe(process.addr, "/events/a", "");
    let (mut wire, body) = (Wire::connect(process.addr), "x".repeat(10_000));
    let mut ids: Vec<Id> = Vec::new();
    let refused = loop {
        let answer = wire.post("/events/a", &body);
        if answer.status != 200 {
            break answer;
        }
        ids.push(answer.body.trim().parse().unwrap());
        assert!(ids.len() < 1_000, "the disk is never full");
    };
    assert_eq!((refused.status, refused.header("retry-after")), (507, Some("3")), "{refused:?}");
    assert!(refused.body.contains("No space left on device"), "{refused:?}");
    for _ in 0..3 {
        assert_eq!(wire.post("/events/a", &body).status, 507);
    }
    let lines = "PUT /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000\r\n\r\n".to_string()
        + &"y\n".repeat(10_000);
    let mut put = Wire::connect(process.addr);
    put.send(lines.as_bytes());
    let answer = put.answer();
    assert_eq!(answer.status, 507, "{answer:?}");
    let count: usize =
        answer.body.split("published ").nth(1).unwrap().split([',', '\n']).next().unwrap().parse().unwrap();
    let bytes = fs::read(&journal).unwrap();
    assert_eq!(blocks(&bytes).concat(), bytes, "the half-written event is cut back");
    assert_eq!(blocks(&bytes).len(), 2 + ids.len() + count, "what was answered is there, and nothing else");
    let health = get(process.addr, "/health");
    assert!(health.status == 503 && health.body.contains("journal"), "{health:?}");

    fs::write(dir.path("trigger"), "").unwrap();
    wait_for("the journal to be well again, though nobody publishes", || {
        (get(process.addr, "/health").status == 200).then_some(())
    });
    let after: Id = wait_for("room", || {
        let answer = wire.post("/events/a", &body);
        (answer.status == 200).then(|| answer.body.trim().parse().unwrap())
    });
    for id in &ids {
        assert_eq!(stream.event().unwrap().id(), *id);
    }
    for _ in 0..count {
        assert_eq!(stream.event().unwrap().data(), "y");
    }
    assert_eq!(stream.event().unwrap().id(), after, "what was refused is sent to nobody");
    let bytes = fs::read(&journal).unwrap();
    assert_eq!(blocks(&bytes).concat(), bytes);
}

#[test]
fn a_disk_that_cannot_be_written_is_an_error_at_the_start() {
    let dir = Scratch::new();
    let Some(mut command) = on_a_small_disk(&dir, "mount -o remount,ro $1/disk &&", "") else { return };
    fs::write(dir.path("trigger"), "").unwrap();
    let output = output(&mut command);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Read-only file system") && said.contains("disk/events"), "{said}");
}

#[test]
fn a_clock_set_back_by_an_hour_does_not_set_ids_back() {
    if !has("faketime") {
        return;
    }
    let dir = Scratch::new();
    let path = dir.path("events");
    let first = Process::start(&["--journal", &path]);
    let before: Id = post(first.addr, "/events/a", "x").body.trim().parse().unwrap();
    drop(first);
    let mut faketime = Command::new("faketime");
    faketime.args(["-f", "-1h", BROOKLET, "--listen", "127.0.0.1:0", "--journal", &path]);
    let second = Process::from(faketime.env("FAKETIME_DONT_FAKE_MONOTONIC", "1"));
    let _holder = Holder::of(&path);
    let date = get(second.addr, "/health").header("date").unwrap().to_string();
    let after: Vec<Id> = (0..3).map(|_| post(second.addr, "/events/a", "x").body.trim().parse().unwrap()).collect();
    assert!(before < after[0] && after.is_sorted_by(|a, b| a < b), "{before} then {after:?}, at {date}");
    assert_eq!(after[0].ms, before.ms, "the clock really was behind at {date}");
}

#[test]
fn after_a_reboot_with_the_clock_set_back_ids_begin_above_what_may_be_lost() {
    let dir = Scratch::new();
    let Some(clock) = Clock::new(&dir) else { return };
    let path = dir.path("events");
    clock.set("+1h");
    let first = clock.start(&["--journal", &path]);
    wait_for("an event in a millisecond of its own", || {
        let id = |answer: Answer| answer.body.trim().parse::<Id>().unwrap();
        (id(post(first.addr, "/events/a", "x")).ms > id_of(&blocks(&fs::read(&path).unwrap())[0]).ms).then_some(())
    });
    drop(first);
    let before = id_of(blocks(&fs::read(&path).unwrap()).last().unwrap());
    as_in_another_boot(&path);
    clock.set("+0");
    let second = clock.start(&["--journal", &path]);
    let after: Id = post(second.addr, "/events/a", "x").body.trim().parse().unwrap();
    assert!(after.ms >= before.ms + 60_000, "the kernel may have held back what came after {before}, but {after}");
}

#[test]
fn thirty_quick_reboots_do_not_put_ids_half_an_hour_ahead_and_repeat_none() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let (mut newest, mut given) = (Id::default(), BTreeSet::new());
    for boot in 0..30 {
        let server = serve(with_journal(&path));
        // What the machine had not written when it died is lost, but its id may be known to somebody.
        let lost_from = fs::metadata(&path).unwrap().len();
        let id = server.hub().publish("a", Event::new("x")).unwrap();
        assert!(given.insert(id) && id > newest, "{id} after {newest}");
        newest = id;
        drop(server);
        if boot % 2 == 0 {
            fs::File::options().write(true).open(&path).unwrap().set_len(lost_from).unwrap();
        }
        as_in_another_boot(&path);
    }
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let ahead = newest.ms.saturating_sub(now_ms);
    assert!(ahead <= 61_000, "{ahead} ms ahead");
}

/// The server that has the journal, where strace or faketime stand in between: they would leave it running. Killed when
/// dropped.
pub struct Holder(String);

impl Holder {
    fn of(journal: &str) -> Holder {
        let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(journal).unwrap());
        // The kernel lists them in pieces: one may be left out where another goes meanwhile.
        let holder = || {
            let locks = fs::read_to_string("/proc/locks").unwrap();
            let line = locks.lines().find(|line| line.contains("FLOCK") && line.contains(&format!(":{inode} ")))?;
            Some(line.split_whitespace().nth(4)?.into())
        };
        Holder(wait_for("the lock of the journal", holder))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        shell(&format!("kill -9 {} 2>/dev/null", self.0));
        wait_for("the server to be gone", || (!fs::exists(format!("/proc/{}", self.0)).unwrap()).then_some(()));
    }
}

/// The command under strace, which makes system calls fail. Calls are counted for each thread by itself, and a connection
/// has a thread of its own.
pub struct Traced {
    _holder: Holder, // goes first
    pub process: Process,
    calls: String,
}

impl Traced {
    pub fn start(inject: &[&str], journal: &str, flags: &[&str]) -> Traced {
        Traced::start_on(&[], inject, journal, flags)
    }

    /// Sees, counts and injects only the calls on these paths; with none, on all.
    fn start_on(paths: &[&str], inject: &[&str], journal: &str, flags: &[&str]) -> Traced {
        let calls = format!("{journal}.calls");
        let mut strace = Command::new("strace");
        strace.args(["-f", "-o", &calls, "-e", "trace=write,fsync,fdatasync,ftruncate,rename,unlink"]);
        for path in paths {
            strace.args(["-P", path]);
        }
        for what in inject {
            strace.args(["-e", &format!("inject={what}")]);
        }
        strace.args([BROOKLET, "--listen", "127.0.0.1:0", "--journal", journal]).args(flags);
        let process = Process::from(&mut strace);
        Traced { _holder: Holder::of(journal), process, calls }
    }

    fn count(&self, call: &str) -> usize {
        fs::read_to_string(&self.calls).unwrap().lines().filter(|line| line.contains(&format!(" {call}("))).count()
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.calls);
    }
}

#[test]
fn a_failed_write_is_not_answered_with_200_and_not_sent() {
    if !has("strace") {
        return;
    }
    let dir = Scratch::new();
    let path = dir.path("events");
    drop(serve(with_journal(&path)));
    let traced = Traced::start(&["write:error=ENOSPC:when=5"], &path, &[]);
    let (mut stream, _) = Wire::subscribe(traced.process.addr, "/events/a", "");
    let mut wire = Wire::connect(traced.process.addr);
    for _ in 0..4 {
        assert_eq!(wire.post("/events/a", "one").status, 200);
    }
    let refused = wire.post("/events/a?key=k", "two");
    assert_eq!(refused.status, 507, "{refused:?}");
    assert!(refused.body.contains("No space left on device"), "{refused:?}");
    assert_eq!(wire.post("/events/a?key=k", "three").status, 200, "the key of what was refused is free");
    for data in ["one", "one", "one", "one", "three"] {
        assert_eq!(stream.event().unwrap().data(), data);
    }
    traced.process.wait_for_log("No space left on device");
    assert_eq!(blocks(&fs::read(&path).unwrap()).len(), 2 + 5);
}

#[test]
fn a_failed_sync_is_never_tried_again_as_if_nothing_were_lost() {
    if !has("strace") {
        return;
    }
    // The second sync of an event fails; then the first time that the journal is written anew fails, too: at the new file's
    // own sync, or, once it has the name, at the directory's (which the main thread has synced once at the start).
    for (at_directory, failing) in [(false, "fsync:error=EIO:when=1"), (true, "fsync:error=EIO:when=2")] {
        let dir = Scratch::new();
        let (path, new_path) = (dir.path("events"), dir.path("events.new"));
        let paths: &[&str] = if at_directory { &[] } else { &[&path, &new_path] };
        drop(serve(with_journal(&path).with(|config| config.fsync = true))); // or the start would write it anew
        let traced = Traced::start_on(paths, &["fdatasync:error=EIO:when=2", failing], &path, &["--fsync"]);
        let (mut stream, _) = Wire::subscribe(traced.process.addr, "/events/a", "");
        let mut wire = Wire::connect(traced.process.addr);
        assert_eq!(wire.post("/events/a", "one").status, 200);
        for refused in ["two", "three"] {
            let refused = wire.post("/events/a", refused);
            assert!(refused.status == 507 && refused.body.contains("Input/output error"), "{refused:?}");
        }
        let renamed = usize::from(at_directory);
        wait_for("the journal to be written anew", || {
            let answer = wire.post("/events/a", "four");
            (answer.status == 200).then_some(())
        });
        assert_eq!(traced.count("rename"), renamed + 1, "it was not simply tried again");
        assert_eq!(stream.event().unwrap().data(), "one");
        assert_eq!(stream.event().unwrap().data(), "four");
        drop(traced);
        let server = serve(with_journal(&path));
        let found = kept(server.addr().unwrap(), "a");
        assert!(found.len() == 2 && found[1].starts_with(b"data: four\n"), "{}", found.len());
    }
}

#[test]
fn what_was_refused_for_a_failed_sync_is_not_there_after_a_restart() {
    if !has("strace") {
        return;
    }
    // The second: the file cannot be cut back, either.
    for (inject, signal) in [
        (&["fdatasync:error=EIO:when=2"][..], "TERM"),
        (&["fdatasync:error=EIO:when=2"], "KILL"),
        (&["fdatasync:error=EIO:when=2", "ftruncate:error=EIO"], "TERM"),
        (&["fdatasync:error=EIO:when=2", "ftruncate:error=EIO"], "KILL"),
    ] {
        let dir = Scratch::new();
        let path = dir.path("events");
        drop(serve(with_journal(&path).with(|config| config.fsync = true)));
        let traced = Traced::start(inject, &path, &["--fsync"]);
        let mut wire = Wire::connect(traced.process.addr);
        assert_eq!(wire.post("/events/a", "one").status, 200);
        assert_eq!(wire.post("/events/a", "two").status, 507);
        shell(&format!("kill -{signal} {}", traced._holder.0));
        drop(traced);
        for fsync in [true, false] {
            let server = serve(with_journal(&path).with(|config| config.fsync = fsync));
            let found = kept(server.addr().unwrap(), "a");
            assert_eq!(found.len(), 1, "{inject:?} {signal}: {}", String::from_utf8_lossy(&found.concat()));
        }
    }
}

/// Whether a dead process was in the middle of a failing sync, nobody knows: what it wrote may be in memory alone.
#[test]
fn with_fsync_a_start_trusts_only_a_journal_that_ended_in_order() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap());
    let config = with_journal(&path).with(|config| config.fsync = true);
    let server = serve(config.clone());
    server.hub().publish("a", Event::new("one")).unwrap();
    drop(server);
    let in_order = (inode(), fs::read(&path).unwrap());
    let process = Process::start(&["--journal", &path, "--fsync"]);
    assert_eq!(inode(), in_order.0, "who ended in order is trusted");
    post(process.addr, "/events/a", "two");
    drop(process); // kill -9
    let unsure = (inode(), fs::read(&path).unwrap());
    assert_eq!(unsure.0, in_order.0);
    drop(serve(config.clone()));
    assert_ne!(inode(), unsure.0, "what a killed process left is written anew");
    let cut_off = [&in_order.1[..], b"topic: a\n"].concat();
    let earlier = blocks(&in_order.1)[..2].concat(); // an earlier version wrote no end
    for untrusted in [&cut_off, &earlier] {
        fs::write(&path, untrusted).unwrap();
        let before = inode();
        let server = serve(config.clone());
        assert_ne!(inode(), before);
        assert_eq!(kept(server.addr().unwrap(), "a").len(), 1);
    }
}

#[test]
fn a_journal_that_is_moved_cut_or_deleted_in_use_is_written_anew_though_nobody_publishes() {
    for (what, said) in [
        ("rm J", "deleted or moved"),
        ("mv J J.old", "deleted or moved"),
        ("truncate -s 50 J", "cut"),
        ("echo >>J", "somebody else"),
        ("cp J J.copy && mv J.copy J", "replaced"),
        (": >J.empty && mv J.empty J", "replaced"),
    ] {
        let dir = Scratch::new();
        let path = dir.path("events");
        for fsync in [&[][..], &["--fsync"]] {
            let _ = fs::remove_file(&path);
            let process = Process::start(&[&["--journal", &path][..], fsync].concat());
            for n in 0..3 {
                assert_eq!(post(process.addr, "/events/a", &n.to_string()).status, 200);
            }
            let events = || Some(blocks(&fs::read(&path).ok()?).into_iter().filter(|block| is_event(block)).collect());
            let before: Option<Vec<_>> = events();
            assert!(shell(&what.replace('J', &path)));
            process.wait_for_log(said);
            wait_for("the journal to be there again", || (events() == before).then_some(()));
            assert_eq!(post(process.addr, "/events/a", "3").status, 200);
            drop(process);
            let server = serve(with_journal(&path));
            assert_eq!(kept(server.addr().unwrap(), "a").len(), 4, "{what}");
            let copies = fs::read_dir(&dir.0)
                .unwrap()
                .filter(|entry| entry.as_ref().unwrap().file_name().to_str().unwrap().contains(".replaced."));
            let is_kept = what.starts_with("cp");
            assert!((copies.count() > 0) == is_kept, "{what}: what stood there is kept, unless it is empty");
        }
    }
}

#[test]
fn where_the_directory_of_the_journal_is_gone_nothing_is_published_until_it_is_back() {
    let dir = Scratch::new();
    fs::create_dir(dir.path("data")).unwrap();
    let path = dir.path("data/events");
    let process = Process::start(&["--journal", &path]);
    assert_eq!(post(process.addr, "/events/a", "one").status, 200);
    fs::remove_dir_all(dir.path("data")).unwrap();
    process.wait_for_log("deleted or moved");
    let answer = post(process.addr, "/events/a", "two");
    assert!(answer.status == 507 && answer.body.contains("No such file"), "{answer:?}");
    wait_for("health to say so", || (get(process.addr, "/health").status == 503).then_some(()));
    fs::create_dir(dir.path("data")).unwrap();
    wait_for("health", || (get(process.addr, "/health").status == 200).then_some(()));
    assert_eq!(post(process.addr, "/events/a", "three").status, 200);
    drop(process);
    let server = serve(with_journal(&path));
    assert_eq!(kept(server.addr().unwrap(), "a").len(), 2);
}

#[test]
fn where_another_server_has_the_name_of_the_journal_nothing_is_published() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let first = Process::start(&["--journal", &path]);
    assert_eq!(post(first.addr, "/events/a", "first").status, 200);
    fs::rename(&path, dir.path("moved")).unwrap();
    let mut second = None;
    // Whoever is quicker has the name: the first may have written it anew before the second comes.
    wait_for("the second to have the name", || {
        let _ = fs::remove_file(&path);
        let mut command = Command::new(BROOKLET);
        let mut child =
            command.args(["--listen", "127.0.0.1:0", "--journal", &path]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = [0; 200];
        let got = std::io::Read::read(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        let said = String::from_utf8_lossy(&line[..got]).into_owned();
        let addr: Option<SocketAddr> =
            said.split("http://").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
        match addr {
            Some(addr) => second = Some((addr, child)),
            None => drop(child.wait()),
        }
        addr
    });
    let (addr, mut child) = second.unwrap();
    let line = first.wait_for_log("nothing is published");
    assert!(line.contains(&format!("process {} ", child.id())), "{line}");
    let answer = post(first.addr, "/events/a", "refused");
    assert!(answer.status == 507 && answer.body.contains("name is not its own"), "{answer:?}");
    assert_eq!(get(first.addr, "/health").status, 503);
    assert_eq!(post(addr, "/events/a", "second").status, 200);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(post(first.addr, "/events/a", "refused").status, 507, "what stands there is still another's");
    let bytes = fs::read_to_string(&path).unwrap();
    assert!(bytes.contains("data: second") && !bytes.contains("data: first"), "{bytes}");
    fs::remove_file(&path).unwrap();
    wait_for("the first to have its name again", || (get(first.addr, "/health").status == 200).then_some(()));
    assert_eq!(post(first.addr, "/events/a", "again").status, 200);
    drop(first);
    assert_eq!(kept(serve(with_journal(&path)).addr().unwrap(), "a").len(), 2);
}

#[test]
fn events_go_out_while_the_journal_is_written_anew() {
    if !has("strace") {
        return;
    }
    let dir = Scratch::new();
    let (path, new_path) = (dir.path("events"), dir.path("events.new"));
    let body = "x".repeat(60_000);
    let server = serve(with_journal(&path).with(|config| config.fsync = true)); // so that the start writes it anew, too
    for _ in 0..20 {
        server.hub().publish("a", Event::new(body.clone())).unwrap();
    }
    drop(server);
    // Each sync of the new file takes so long that events which waited for one would be seen to wait.
    let delay = ["fdatasync:delay_enter=3000000"];
    let traced = Traced::start_on(&[&new_path], &delay, &path, &["--keep-events", "20"]);
    let (mut stream, _) = Wire::subscribe(traced.process.addr, "/events/b", "");
    let mut wire = Wire::connect(traced.process.addr);
    for _ in 0..40 {
        assert_eq!(wire.post("/events/a", &body).status, 200);
    }
    wait_for("it to be written anew", || fs::exists(&new_path).unwrap().then_some(()));
    for n in 0..20 {
        assert_eq!(wire.post("/events/b", &n.to_string()).status, 200);
        assert_eq!(stream.event().unwrap().data(), n.to_string());
    }
    assert_eq!(blocks(&Wire::stream(traced.process.addr, "/events/b?since=earliest&poll=1ms", "").rest()).len(), 22);
    assert!(fs::exists(&new_path).unwrap(), "all of this was during one sync");
    wait_for("the end of it", || (!fs::exists(&new_path).unwrap()).then_some(()));
    assert!(fs::metadata(&path).unwrap().len() < 2_000_000);
    drop(traced);
    assert_eq!(kept(serve(with_journal(&path)).addr().unwrap(), "b").len(), 20);
}

#[test]
fn a_journal_that_has_grown_and_keeps_little_is_synced_before_the_new_file_has_the_name() {
    if !has("strace") {
        return;
    }
    let dir = Scratch::new();
    let (path, new_path) = (dir.path("events"), dir.path("events.new"));
    drop(serve(with_journal(&path)));
    let traced = Traced::start_on(&[&new_path], &[], &path, &["--keep-events", "10"]);
    let mut wire = Wire::connect(traced.process.addr);
    for _ in 0..10 {
        assert_eq!(wire.post("/events/old", "what the disk has had for long").status, 200);
    }
    wait_for("the journal to be written anew", || {
        assert_eq!(wire.post("/events/a?key=k", &"x".repeat(50_000)).status, 200);
        wire.send(b"DELETE /events/a HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(wire.answer().status, 200);
        (traced.count("rename") > 0).then_some(())
    });
    let calls = fs::read_to_string(&traced.calls).unwrap();
    let of_new: Vec<_> = calls.lines().filter(|line| line.contains("sync(") || line.contains("rename(")).collect();
    assert!(of_new[0].contains("fdatasync("), "{of_new:?}");
}

/// A gap too many is allowed, a silent hole never.
#[test]
fn what_is_published_and_forgotten_while_the_journal_is_written_anew_is_kept_or_a_gap() {
    const TOPICS: usize = 40;
    let dir = Scratch::new();
    let path = dir.path("events");
    let mut random = Random(5);
    for round in 0..6 {
        let fsync = round % 2 == 1;
        let config = with_journal(&path).with(|config| {
            config.keep_events = 60;
            config.keep_bytes = 400_000;
            config.fsync = fsync;
        });
        let server = serve(config.clone());
        let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap());
        let (mut all, mut inodes) = (vec![Vec::new(); TOPICS], BTreeSet::from([inode()]));
        wait_for("it to be written anew, again and again", || {
            for _ in 0..500 {
                // Some topics are busy, and some leave the table and come back.
                let topic = random.below(TOPICS) * random.below(TOPICS) / TOPICS;
                let body = "x".repeat(random.below(1_000));
                all[topic].push(server.hub().publish(&format!("t{topic}"), Event::new(body)).unwrap());
            }
            inodes.insert(inode());
            (inodes.len() > 5).then_some(())
        });
        drop(server);
        let server = serve(config);
        for (topic, ids) in all.iter().enumerate() {
            for at in (0..ids.len()).rev().take(100).chain([0]).filter(|at| *at < ids.len()) {
                let target = format!("/events/t{topic}?last_event_id={}&poll=1ms", ids[at]);
                let answer = blocks(&Wire::stream(server.addr().unwrap(), &target, "").rest());
                let found: Vec<Id> = answer.iter().filter(|block| is_event(block)).map(|block| id_of(block)).collect();
                let has_gap = answer.iter().any(|block| block.starts_with(b"event: gap\n"));
                assert!(
                    has_gap || found == ids[at + 1..],
                    "round {round}, topic {topic}, after {}: {:?} of {:?}",
                    ids[at],
                    found,
                    &ids[at + 1..]
                );
            }
        }
    }
}

/// How many bytes that were sent over a connection on this machine have not been read, as the system tells it. None for a
/// moment, where the list of connections changes just then.
fn unread_by_peer(socket: &TcpStream) -> Option<u64> {
    let hex = |addr: SocketAddr| match addr {
        SocketAddr::V4(addr) => format!("{:08X}:{:04X}", u32::from_ne_bytes(addr.ip().octets()), addr.port()),
        SocketAddr::V6(addr) => panic!("{addr} stands in another list"),
    };
    let ends = [hex(socket.peer_addr().unwrap()), hex(socket.local_addr().unwrap())];
    let connections = fs::read_to_string("/proc/net/tcp").unwrap();
    let mut of_peer = connections.lines().map(|line| line.split_whitespace().skip(1).collect::<Vec<_>>());
    let queues = of_peer.find(|fields| fields[..2] == ends)?[3].to_string();
    Some(u64::from_str_radix(queues.split(':').nth(1)?, 16).unwrap())
}

#[test]
fn publishers_that_wait_for_a_stuck_disk_are_told_when_the_server_stops() {
    if !has("strace") {
        return;
    }
    let dir = Scratch::new();
    let path = dir.path("events");
    drop(serve(with_journal(&path).with(|config| config.fsync = true)));
    let traced = Traced::start_on(&[&path], &["fdatasync:delay_enter=20000000:when=2+"], &path, &["--fsync"]);
    let mut wires: Vec<_> = (0..5).map(|_| Wire::connect(traced.process.addr)).collect();
    assert_eq!(wires[0].post("/events/a", "zero").status, 200);
    // One is being written, and the others wait for it.
    let count = || blocks(&fs::read(&path).unwrap()).iter().filter(|block| is_event(block)).count();
    for wire in &mut wires {
        wire.send(post_request("/events/a", "stuck").as_bytes());
        wait_for("the server to take it", || (unread_by_peer(&wire.socket)? == 0).then_some(()));
        wait_for("the first to be written", || (count() == 2).then_some(()));
    }
    shell(&format!("kill -TERM {}", traced._holder.0));
    let answers: Vec<Answer> = wires.iter_mut().map(Wire::answer).collect();
    assert!(answers[0].body.contains("stopping, and the disk has not taken"), "{:?}", answers[0]);
    // The last ones may not wait for the disk yet when the signal comes: then nothing of theirs does.
    assert!(answers.iter().all(|answer| answer.status == 503 && answer.body.contains("stopping")), "{answers:?}");
}

#[test]
fn publishers_that_wait_at_the_same_time_share_one_sync_and_stay_in_order() {
    if !has("strace") {
        return;
    }
    const PUBLISHERS: usize = 32;
    let dir = Scratch::new();
    let path = dir.path("events");
    drop(serve(with_journal(&path)));
    let traced = Traced::start(&["fdatasync:delay_enter=300000"], &path, &["--fsync"]);
    let addr = traced.process.addr;
    let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
    let start = Arc::new(Barrier::new(PUBLISHERS));
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|n| {
            let (start, mut wire) = (start.clone(), Wire::connect(addr));
            thread::spawn(move || {
                start.wait();
                wire.post("/events/a", &n.to_string()).body.trim().parse::<Id>().unwrap()
            })
        })
        .collect();
    let ids: BTreeSet<Id> = publishers.into_iter().map(|publisher| publisher.join().unwrap()).collect();
    assert_eq!(ids.len(), PUBLISHERS);
    for id in ids {
        assert_eq!(stream.event().unwrap().id(), id, "in the order of the ids");
    }
    let syncs = traced.count("fdatasync");
    assert!(syncs < PUBLISHERS / 2, "{syncs} syncs");
    // A body of many lines that are there at once is one sync, too.
    let mut wire = Wire::connect(addr);
    wire.send(
        format!("PUT /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40\r\n\r\n{}", "y\n".repeat(20))
            .as_bytes(),
    );
    assert!(wire.answer().body.starts_with("published 20, "));
    assert!(traced.count("fdatasync") <= syncs + 3, "{} syncs for 20 lines", traced.count("fdatasync") - syncs);
}

#[test]
fn a_repeat_waits_for_the_first_where_that_is_still_being_written() {
    if !has("strace") {
        return;
    }
    let dir = Scratch::new();
    let path = dir.path("events");
    drop(serve(with_journal(&path)));
    // The second sync is slow and then fails: those who wait for it must not be told otherwise than who published it.
    let traced = Traced::start(&["fdatasync:error=EIO:delay_enter=500000:when=2"], &path, &["--fsync"]);
    let addr = traced.process.addr;
    let mut first = Wire::connect(addr);
    assert_eq!(first.post("/events/a", "zero").status, 200);
    first.send(post_request("/events/a?key=k", "one").as_bytes());
    wait_for("the first to be in the journal", || fs::read_to_string(&path).unwrap().contains("key: k").then_some(()));
    let mut second = Wire::connect(addr);
    second.send(post_request("/events/a?key=k", "two").as_bytes());
    assert_eq!((first.answer().status, second.answer().status), (507, 507));
    let id = wait_for("the journal to be written anew", || {
        let answer = first.post("/events/a?key=k", "three");
        (answer.status == 200).then_some(answer.body)
    });
    assert_eq!(second.post("/events/a?key=k", "four").body, id);
    assert_eq!(metric(addr, "published_total"), 2);
}

#[test]
fn who_watches_sees_how_far_a_long_recovery_has_come() {
    if !has("script") {
        return;
    }
    let dir = Scratch::new();
    let path = dir.path("events");
    let server = serve(with_journal(&path));
    for _ in 0..200 {
        server.hub().publish("a", Event::new("x".repeat(1_000))).unwrap();
    }
    drop(server);
    let command = format!("{} --listen 127.0.0.1:0 --journal {path}", BROOKLET);
    let mut script = Command::new("script");
    script.args(["-qfec", &command, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut script = start(&mut script);
    let (mut terminal, mut shown) = (script.stdout.take().unwrap(), Vec::new());
    let deadline = Instant::now() + PATIENCE;
    while !String::from_utf8_lossy(&shown).contains("kept 200 events") {
        let mut chunk = [0; 4096];
        let got = std::io::Read::read(&mut terminal, &mut chunk).unwrap();
        shown.extend_from_slice(&chunk[..got]);
        assert!(got > 0 && Instant::now() < deadline, "{}", String::from_utf8_lossy(&shown));
    }
    let shown = String::from_utf8_lossy(&shown);
    assert!(shown.contains("\rreading the journal: 50 %") && shown.contains("journal "), "{shown}");
    assert!(shown.contains("read 200 events"), "{shown}");
    drop(Holder::of(&path));
    script.wait().unwrap();
}

/// What a dying process leaves at the end is the beginning of a block. Anything else there was written over, and may have been
/// events that pages had seen.
#[test]
fn an_end_that_was_written_over_is_damage_and_every_cursor_hears_a_gap() {
    for (what, fsync) in [("zeros", false), ("zeros", true), ("the last byte", false), ("the last byte", true)] {
        let dir = Scratch::new();
        let path = dir.path("events");
        let config = || with_journal(&path).with(|config| config.fsync = fsync);
        let flags = ["--journal", &path, "--fsync"];
        let process = Process::start(&flags[..2 + usize::from(fsync)]);
        let ids: Vec<String> = (0..40).map(|n| publish(process.addr, "/events/a", &n.to_string())).collect();
        drop(process); // kill -9
        let mut bytes = fs::read(&path).unwrap();
        let from = if what == "the last byte" { bytes.len() - 1 } else { bytes.len() - 700 };
        bytes[from..].fill(if what == "zeros" { 0 } else { b'x' });
        fs::write(&path, &bytes).unwrap();
        let server = serve(config());
        let target = format!("/events/a?last_event_id={}&poll=1ms", ids[0]);
        let answer = blocks(&Wire::stream(server.addr().unwrap(), &target, "").rest());
        assert!(answer.iter().any(|block| block.starts_with(b"event: gap\n")), "{what}, {fsync}: no gap");
        let has_copy = fs::read_dir(dir.path(""))
            .unwrap()
            .any(|entry| entry.unwrap().file_name().to_string_lossy().contains(".damaged."));
        assert!(has_copy, "{what}, {fsync}: the file as it was is gone");
    }
}

#[test]
fn a_link_that_is_removed_while_it_names_the_journal_is_noticed() {
    let dir = Scratch::new();
    fs::create_dir(dir.path("data")).unwrap();
    let (link, path) = (dir.path("link"), dir.path("data/events"));
    fs::write(&path, "").unwrap();
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let process = Process::start(&["--journal", &link]);
    let first = publish(process.addr, "/events/a", "1");
    fs::remove_file(&link).unwrap();
    process.wait_for_log("was deleted or moved");
    wait_for("the journal to be written anew", || fs::exists(&link).unwrap().then_some(()));
    let second = publish(process.addr, "/events/a", "2");
    drop(process); // kill -9
    let found = kept(serve(with_journal(&link)).addr().unwrap(), "a");
    let found: Vec<String> = found.iter().map(|frame| id_of(frame).to_string()).collect();
    assert_eq!(found, [first.trim(), second.trim()]);
}

#[test]
fn a_file_that_is_none_of_ours_is_not_deleted_where_the_new_file_would_be_written() {
    let dir = Scratch::new();
    let (path, new) = (dir.path("events"), dir.path("events.new"));
    fs::write(&new, "thesis\n").unwrap();
    let error = bind(with_journal(&path)).err().expect("a refusal").to_string();
    assert!(error.contains("events.new") && error.contains("move it away"), "{error}");
    assert_eq!(fs::read_to_string(&new).unwrap(), "thesis\n");
}
