//! Servers that share their topics through a real Redis, and what becomes of that when either is hurt.

#[allow(dead_code)]
#[path = "../common.rs"]
mod common;
mod cost;
mod crowd;
mod load;
mod world;

use brooklet::Id;
use common::{
    BROOKLET, Clock, PATIENCE, Process, Scratch, Wire, get, has, left_out, metric, output, post, shell, start, wait_for,
};
use crowd::May;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};
use world::*;

fn three(url: &str, flags: &[&str]) -> Vec<Process> {
    (0..3).map(|_| server(url, flags)).collect()
}

fn is_open(stream: &mut Wire, addr: std::net::SocketAddr, topic: &str) {
    let id = publish(addr, &format!("/events/{topic}"), "still here");
    loop {
        let event = stream.event().unwrap();
        if event.id.as_deref() == Some(&id) {
            return;
        }
    }
}

#[test]
fn a_start_that_cannot_be_says_why_and_shows_no_password() {
    if !has_redis() {
        return;
    }
    let locked = Redis::with(&["--save", "", "--requirepass", "sesame"]);
    let replica = Redis::with(&["--save", "", "--replicaof", "127.0.0.1 1"]);
    let other = Redis::start();
    other.cli(&["set", "brooklet", "of another program"]);
    let still = Redis::start();
    still.signal("STOP");
    let port = |redis: &Redis| redis.port.to_string();
    for (flags, code, said) in [
        (vec!["--redis", "nonsense"], 2, "write redis://:PASSWORD@HOST:6379/0"),
        (vec!["--redis", "redis://:secret@127.0.0.1:1"], 1, "cannot be used: Connection refused"),
        (vec!["--redis", &format!("redis://127.0.0.1:{}", port(&locked))], 1, "it wants a password"),
        (
            vec!["--redis", &format!("redis://:secret@127.0.0.1:{}", port(&locked))],
            1,
            "the password of the URL is wrong",
        ),
        (vec!["--redis", &replica.url()], 1, "it is a replica"),
        (vec!["--redis", &other.url()], 1, "WRONGTYPE"),
        (vec!["--redis", &still.url()], 1, "cannot be used: it does not answer"),
        (vec!["--redis", "@/nowhere"], 2, "--redis: /nowhere: No such file"),
        (vec!["--redis", &locked.url(), "--journal", "x"], 2, "--journal: with --redis"),
        (vec!["--redis", &locked.url(), "--redis-length", "0"], 2, "--redis-length: 0 would keep nothing"),
    ] {
        let output = output(Command::new(BROOKLET).args(["--listen", "127.0.0.1:0"]).args(&flags));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(said) && stderr.lines().count() == 1, "{flags:?}: {stderr}");
        assert!(!stderr.contains("secret"), "{stderr}");
        assert_eq!(output.status.code(), Some(code), "{stderr}");
    }
    let url = format!("redis://:sesame@127.0.0.1:{}", locked.port);
    let dir = Scratch::new();
    let file = dir.path("url");
    std::fs::write(&file, format!("{url}\n")).unwrap();
    let server = server(&format!("@{file}"), &[]);
    publish(server.addr, "/events/a", "the password is right");
}

#[test]
fn help_names_the_flags_that_this_build_has_more() {
    let said = output(Command::new(BROOKLET).arg("--help"));
    let help = String::from_utf8(said.stdout).unwrap();
    for flag in ["--redis URL", "--redis-stream NAME", "--redis-length N"] {
        assert!(help.contains(flag), "{flag}");
    }
    assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
}

#[test]
fn every_subscriber_of_three_servers_has_every_event_of_its_topics_once_and_in_order() {
    if !has_redis() {
        return;
    }
    load::many_topics();
}

#[test]
#[ignore = "sixty million deliveries, for an optimized build: make redis-test"]
fn sixty_million_deliveries_come_once_and_in_order() {
    if has_redis() {
        load::sixty_million_deliveries(&mut Redis::start(), May::default(), |_, _, _, _| {});
    }
}

#[test]
#[ignore = "sixty million deliveries, for an optimized build: make redis-test"]
fn sixty_million_deliveries_come_once_and_in_order_while_servers_are_killed() {
    if !has_redis() {
        return;
    }
    let may = May { be_cut: true, ..May::default() };
    let crowd = load::sixty_million_deliveries(&mut Redis::start(), may, |progress, redis, servers, addrs| {
        for kill in 0..9 {
            progress.reach(kill + 1, 10);
            let killed = &mut servers[kill % 3];
            killed.child.kill().unwrap();
            killed.child.wait().unwrap();
            *killed = server(&redis.url(), &load::FLAGS);
            addrs.lock().unwrap()[kill % 3] = killed.addr;
        }
    });
    assert!(crowd.cuts >= crowd.len(), "only {} streams were cut", crowd.cuts);
}

#[test]
#[ignore = "sixty million deliveries, for an optimized build: make redis-test"]
fn sixty_million_deliveries_come_once_and_in_order_while_redis_stands_still_and_is_killed() {
    if !has_redis() {
        return;
    }
    let may = May { have_gaps: true, ..May::default() };
    let flags = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""];
    let crowd = load::sixty_million_deliveries(&mut Redis::with(&flags), may, |progress, redis, _, _| {
        for hurt in 0..4 {
            progress.reach(hurt + 1, 5);
            if hurt % 2 == 0 {
                redis.signal("STOP");
                thread::sleep(Duration::from_millis(1_200)); // longer than anybody waits for it
                redis.signal("CONT");
            } else {
                redis.kill();
                redis.flags[3] = "everysec".into(); // the next time it is killed
                redis.restart();
            }
        }
    });
    assert!(crowd.least_gaps() > 0, "nobody knows what another process lacks");
}

#[test]
#[ignore = "figures for the README: make redis-load"]
fn what_it_costs_to_go_through_redis() {
    if has_redis() {
        cost::print_tables();
    }
}

#[test]
fn servers_are_killed_and_their_subscribers_go_on_elsewhere() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let mut servers = three(&redis.url(), &[]);
    let (addrs, over) = (addresses(&servers), Over::default());
    let followers: Vec<_> = (0..60).map(|n| follower(n, &addrs, "/events/a")).collect();
    let publishers = [0, 1, 2, 3].map(|n| publisher(&format!("p{n}"), &addrs, &over, "a"));
    for round in 0..9 {
        thread::sleep(Duration::from_millis(300)); // load between two kills, not a condition
        let killed = &mut servers[round % 3];
        killed.child.kill().unwrap();
        killed.child.wait().unwrap();
        *killed = server(&redis.url(), &[]);
        addrs.lock().unwrap()[round % 3] = killed.addr;
    }
    over.store(true, SeqCst);
    let mut taken = BTreeMap::new();
    for publisher in publishers {
        taken.append(&mut publisher.join().unwrap().taken);
    }
    publish_surely(&addrs, "/events/a", "end");
    let kept = redis.events();
    assert!(taken.len() > 300, "{} events in all", taken.len());
    for follower in followers {
        let had = follower.join().unwrap();
        check(&had, &taken, &kept);
        assert!(!had.contains(&Had::Gap), "nothing was lost, so nobody need hear of a gap");
    }
}

/// Events are published and followed while `hurt` does what it likes to Redis.
fn while_hurt(redis: &mut Redis, hurt: impl FnOnce(&mut Redis)) -> (Vec<Vec<Had>>, usize) {
    let servers = three(&redis.url(), &[]);
    let (addrs, over) = (addresses(&servers), Over::default());
    let followers: Vec<_> = (0..30).map(|n| follower(n, &addrs, "/events/a")).collect();
    let publishers = [0, 1].map(|n| publisher(&format!("p{n}"), &addrs, &over, "a"));
    hurt(redis);
    publish_surely(&addrs, "/events/a", "again");
    over.store(true, SeqCst);
    let (mut taken, mut refused) = (BTreeMap::new(), 0);
    for publisher in publishers {
        let mut published = publisher.join().unwrap();
        taken.append(&mut published.taken);
        refused += published.refused + published.perhaps.len();
    }
    publish_surely(&addrs, "/events/a", "end");
    let kept = redis.events();
    let had: Vec<_> = followers.into_iter().map(|follower| follower.join().unwrap()).collect();
    had.iter().for_each(|had| check(had, &taken, &kept));
    assert!(taken.len() > 20, "{} events in all", taken.len());
    (had, refused)
}

#[test]
fn redis_stands_still_and_goes_on() {
    if !has_redis() {
        return;
    }
    let (had, refused) = while_hurt(&mut Redis::start(), |redis| {
        for _ in 0..2 {
            thread::sleep(Duration::from_millis(300));
            redis.signal("STOP");
            thread::sleep(Duration::from_millis(1_200));
            redis.signal("CONT");
        }
    });
    assert!(refused > 0, "publishers are refused meanwhile");
    assert!(had.iter().all(|had| !had.contains(&Had::Gap)), "it has lost nothing");
}

#[test]
fn redis_is_killed_and_comes_back_with_what_it_has_written() {
    if !has_redis() {
        return;
    }
    for sync in ["always", "everysec"] {
        let flags = ["--appendonly", "yes", "--appendfsync", sync, "--save", ""];
        let (had, refused) = while_hurt(&mut Redis::with(&flags), |redis| {
            for _ in 0..2 {
                thread::sleep(Duration::from_millis(500));
                redis.kill();
                thread::sleep(Duration::from_millis(300));
                redis.restart();
            }
        });
        assert!(refused > 0);
        assert!(had.iter().all(|had| had.contains(&Had::Gap)), "another process: nobody knows what it lacks");
    }
}

#[test]
fn redis_forgets_everything_and_all_hear_a_gap() {
    if !has_redis() {
        return;
    }
    let (had, _) = while_hurt(&mut Redis::start(), |redis| {
        thread::sleep(Duration::from_millis(500));
        redis.kill();
        redis.restart(); // with an empty memory
        thread::sleep(Duration::from_millis(300));
        redis.cli(&["flushall"]);
        thread::sleep(Duration::from_millis(300));
        redis.cli(&["del", "brooklet"]);
        thread::sleep(Duration::from_millis(300));
    });
    let gaps = |had: &Vec<Had>| had.iter().filter(|had| **had == Had::Gap).count();
    assert!(had.iter().all(|had| gaps(had) >= 3), "{:?}", had.iter().map(gaps).collect::<Vec<_>>());
}

/// What happens to Redis while nobody publishes. Live streams must hear a gap without a new event, and then new events.
fn a_gap_and_then_new_events(redis: &Redis, hurt: impl FnOnce(&Redis)) {
    let servers = three(&redis.url(), &[]);
    let mut streams: Vec<Wire> = servers.iter().map(|server| Wire::subscribe(server.addr, "/events/a", "").0).collect();
    let mut old = Id::default();
    for n in 0..10 {
        old = publish(servers[n % 3].addr, "/events/a", &n.to_string()).parse().unwrap();
    }
    for stream in &mut streams {
        (0..10).for_each(|n: usize| assert_eq!(stream.event().unwrap().data(), n.to_string()));
    }
    hurt(redis);
    streams.iter_mut().for_each(|stream| assert!(stream.event().unwrap().is_gap()));
    let new = publish(servers[1].addr, "/events/a", "new");
    for stream in &mut streams {
        let event = loop {
            let event = stream.event().unwrap();
            if !event.is_gap() {
                break event;
            }
        };
        assert_eq!((event.data(), event.id.as_deref()), ("new", Some(new.as_str())));
    }
    assert!(new.parse::<Id>().unwrap() > old, "ids never go back");
    // Whoever comes back with an id from before, to a server of then or a new one, hears of it, too.
    let late = server(&redis.url(), &[]);
    for addr in [servers[0].addr, late.addr] {
        let (mut stream, _) = Wire::subscribe(addr, "/events/a", &format!("Last-Event-ID: {old}\r\n"));
        assert!(stream.event().unwrap().is_gap());
        assert_eq!(stream.event().unwrap().data(), "new");
    }
}

#[test]
fn after_a_flush_there_is_a_gap_though_nothing_is_published() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    a_gap_and_then_new_events(&redis, |redis| drop(redis.cli(&["flushall"])));
    a_gap_and_then_new_events(&redis, |redis| drop(redis.cli(&["del", "brooklet"])));
}

#[test]
fn after_the_stream_is_set_back_there_is_a_gap_and_then_new_events() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    a_gap_and_then_new_events(&redis, |redis| {
        // In one step, or the servers would put a mark between the two.
        redis.cli(&[
            "eval",
            "redis.call('xtrim', 'brooklet', 'maxlen', 0) redis.call('xsetid', 'brooklet', '1-1')",
            "0",
        ]);
    });
}

#[test]
fn in_a_stream_that_was_set_back_200_means_all_the_same_that_the_event_is_shown() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let server = server(&redis.url(), &[]);
    let (mut stream, _) = Wire::subscribe(server.addr, "/events/a", "");
    let mut ahead: Id = publish(server.addr, "/events/a", "first").parse().unwrap();
    for (round, target) in ["/events/a?key=", "/events/a?event=", "/events/a,b?key="].repeat(4).into_iter().enumerate()
    {
        // As a primary would number it whose clock is fast; then one takes over that lacks it, and whose clock is right.
        ahead.ms += 60_000;
        redis.cli(&["xadd", "brooklet", &ahead.to_string(), "topic", "a", "data", "ahead"]);
        while stream.event().unwrap().data() != "ahead" {}
        redis.cli(&[
            "eval",
            "redis.call('xtrim', KEYS[1], 'maxlen', 0) redis.call('xsetid', KEYS[1], '1-1')",
            "1",
            "brooklet",
        ]);
        // Before the reader has looked, or after: that is a matter of luck.
        let (status, body) = try_post(server.addr, &format!("{target}{round}"), &round.to_string()).unwrap();
        if status == 200 {
            let id: Id = body.lines().next().unwrap().parse().unwrap();
            assert!(id > ahead, "{target}: {id} is below {ahead}, which was shown, so nobody will be shown it");
            while stream.event().unwrap().data() != round.to_string() {}
        } else {
            assert!(status == 503 && body.contains("was set back"), "{target}: {status} {body}");
            while !stream.event().unwrap().is_gap() {}
        }
        ahead = ahead.max(publish(server.addr, "/events/a", "next").parse().unwrap());
    }
}

#[test]
fn readers_that_were_trimmed_past_hear_a_gap() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let servers = three(&redis.url(), &["--log", "off"]);
    let (mut stream, _) = Wire::subscribe(servers[0].addr, "/events/a", "");
    let first = publish(servers[1].addr, "/events/a", "0");
    assert_eq!(stream.event().unwrap().data(), "0");
    servers[0].signal("STOP"); // it lags
    for n in 1..50 {
        publish(servers[1].addr, "/events/a", &n.to_string());
    }
    redis.cli(&["xtrim", "brooklet", "maxlen", "10"]);
    servers[0].signal("CONT");
    let mut next = stream.event().unwrap();
    // It may have been asked for the next ones already, before it stood still.
    let mut expected = 1;
    while !next.is_gap() {
        assert_eq!(next.data(), expected.to_string());
        expected += 1;
        next = stream.event().unwrap();
    }
    assert!(expected < 40, "a gap, where there is one");
    (40..50).for_each(|n| assert_eq!(stream.event().unwrap().data(), n.to_string()));
    // A new server has what is left, and knows that it is not all.
    let late = server(&redis.url(), &[]);
    let (mut stream, _) = Wire::subscribe(late.addr, "/events/a", &format!("Last-Event-ID: {first}\r\n"));
    assert!(stream.event().unwrap().is_gap());
    assert_eq!(stream.event().unwrap().data(), "40");
}

/// Three servers, each with a stream, before a fail-over. They know one address. What stands behind it changes, as with a
/// virtual address or a proxy.
struct World {
    primary: Redis,
    replica: Redis,
    relay: Relay,
    servers: Vec<Process>,
    streams: Vec<Wire>,
    /// The id of the one event that the replica has.
    kept: String,
}

impl World {
    /// The replica is cut off from its primary, which goes on for a while.
    fn with_a_replica_that_is_cut_off() -> World {
        let primary = Redis::start();
        let replica = Redis::with(&["--save", "", "--replicaof", &format!("127.0.0.1 {}", primary.port)]);
        let relay = Relay::to(primary.port);
        let servers = three(&relay.url(), &[]);
        let streams = servers.iter().map(|server| Wire::subscribe(server.addr, "/events/a", "").0).collect();
        let kept = publish(servers[0].addr, "/events/a", "kept");
        wait_for("the replica", || (replica.events() == primary.events()).then_some(()));
        replica.cli(&["replicaof", "no", "one"]);
        World { primary, replica, relay, servers, streams, kept }
    }
}

#[test]
fn after_a_fail_over_to_a_replica_that_lacks_the_newest_there_is_a_gap_and_then_new_events() {
    if !has_redis() {
        return;
    }
    let World { mut primary, replica, relay, servers, mut streams, kept } = World::with_a_replica_that_is_cut_off();
    publish(servers[1].addr, "/events/a", "lost");
    let lost = publish(servers[2].addr, "/events/a", "lost");
    for stream in &mut streams {
        let seen = [0, 1, 2].map(|_| stream.event().unwrap().data.unwrap());
        assert_eq!(seen, ["kept", "lost", "lost"]);
    }
    primary.kill();
    relay.turn_to(replica.port);
    streams.iter_mut().for_each(|stream| assert!(stream.event().unwrap().is_gap()));
    let new: Id = wait_for("an event to be taken", || {
        let (status, body) = try_post(servers[1].addr, "/events/a", "new")?;
        (status == 200).then(|| body.trim().parse().unwrap())
    });
    assert!(new > lost.parse().unwrap(), "above what was lost");
    for stream in &mut streams {
        let next = wait_for("an event", || stream.event().filter(|event| !event.is_gap()));
        assert_eq!(next.data(), "new");
    }
    let late = server(&relay.url(), &[]);
    for addr in [servers[0].addr, late.addr] {
        for cursor in [&kept, &lost] {
            let (mut stream, _) = Wire::subscribe(addr, "/events/a", &format!("Last-Event-ID: {cursor}\r\n"));
            assert!(stream.event().unwrap().is_gap());
            let next = stream.event().unwrap();
            // The server that was there has what was lost, and shows it to whoever has not had it.
            let shown = if addr == late.addr || cursor == &lost { "new" } else { "lost" };
            assert_eq!(next.data(), shown);
        }
    }
}

#[test]
fn ids_do_not_go_back_where_a_replica_with_a_slow_clock_takes_over() {
    if !has_redis() {
        return;
    }
    let World { mut primary, replica, relay, servers, mut streams, kept } = World::with_a_replica_that_is_cut_off();
    // As a primary would number it whose clock is a minute fast.
    let lost = Id { ms: kept.parse::<Id>().unwrap().ms + 60_000, seq: 7 };
    primary.cli(&["xadd", "brooklet", &lost.to_string(), "topic", "a", "data", "lost"]);
    for stream in &mut streams {
        assert_eq!([0, 1].map(|_| stream.event().unwrap().data.unwrap()), ["kept", "lost"]);
    }
    primary.kill();
    relay.turn_to(replica.port);
    for (n, server) in servers.iter().enumerate() {
        let new: Id = wait_for("an event to be taken", || {
            let (status, body) = try_post(server.addr, "/events/a", &n.to_string())?;
            (status == 200).then(|| body.trim().parse().unwrap())
        });
        assert!(new > lost, "{new} is not above {lost}");
    }
    for stream in &mut streams {
        assert!(stream.event().unwrap().is_gap());
        let mut next = || wait_for("an event", || stream.event().filter(|event| !event.is_gap()));
        assert_eq!([0, 1, 2].map(|_| next().data.unwrap()), ["0", "1", "2"]);
    }
}

#[test]
fn a_server_that_is_cut_off_catches_up_without_a_gap_and_tells_nobody_anything_twice() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let relay = Relay::to(redis.port);
    let (near, cut) = (server(&redis.url(), &[]), server(&relay.url(), &[]));
    let (mut stream, _) = Wire::subscribe(cut.addr, "/events/a", "");
    publish(near.addr, "/events/a", "before");
    assert_eq!(stream.event().unwrap().data(), "before");
    relay.turn_to(1); // where nobody listens
    cut.wait_for_log("Redis is away");
    let seen = publish(near.addr, "/events/a", "seen elsewhere");
    // Whoever has had that from the other server is ahead of this one.
    let ahead = format!("Last-Event-ID: {seen}\r\n");
    let mut early = Wire::stream(cut.addr, "/events/a", &ahead);
    let end = early.block().unwrap();
    assert!(end.retry.is_some() && end.comments == ["events that another server has sent have not come here yet"]);
    relay.turn_to(redis.port);
    cut.wait_for_log("Redis is back");
    let (mut resumed, cursor) = Wire::subscribe(cut.addr, "/events/a", &ahead);
    assert_eq!(cursor.to_string(), seen);
    publish(cut.addr, "/events/a", "after");
    assert_eq!(resumed.event().unwrap().data(), "after");
    assert_eq!([0, 1].map(|_| stream.event().unwrap().data.unwrap()), ["seen elsewhere", "after"]);
}

#[test]
fn a_primary_that_becomes_a_replica_takes_nothing_until_it_is_a_primary_again() {
    if !has_redis() {
        return;
    }
    let (redis, other) = (Redis::start(), Redis::start());
    let server = server(&redis.url(), &[]);
    let (mut stream, _) = Wire::subscribe(server.addr, "/events/a", "");
    is_open(&mut stream, server.addr, "a");
    redis.cli(&["replicaof", "127.0.0.1", &other.port.to_string()]);
    wait_for("publishing to be refused", || (try_post(server.addr, "/events/a", "x")?.0 == 503).then_some(()));
    server.wait_for_log("it is a replica");
    assert_eq!(get(server.addr, "/health").status, 200);
    redis.cli(&["replicaof", "no", "one"]);
    wait_for("publishing to go on", || (try_post(server.addr, "/events/a", "x")?.0 == 200).then_some(()));
    is_open(&mut stream, server.addr, "a");
}

#[test]
fn a_redis_that_is_full_or_has_lost_its_replicas_refuses_events_and_no_stream_ends() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let server = server(&redis.url(), &[]);
    let (mut stream, _) = Wire::subscribe(server.addr, "/events/a", "");
    let set = |name: &str, value: &str| drop(redis.cli(&["config", "set", name, value]));
    for (name, on, off, said) in [("maxmemory", "1", "0", "OOM"), ("min-replicas-to-write", "1", "0", "NOREPLICAS")] {
        is_open(&mut stream, server.addr, "a");
        set(name, on);
        for target in ["/events/a", "/events/a?key=k", "/events/a,b"] {
            let refused = || {
                let answer = post(server.addr, target, "refused");
                (answer.status == 503 && answer.body.contains(said)).then_some(answer)
            };
            let answer = wait_for("a refusal", refused);
            assert_eq!(answer.header("retry-after"), Some("1"), "{answer:?}");
            assert!(answer.body.starts_with("Redis refuses it: "), "{answer:?}");
        }
        set(name, off);
        is_open(&mut stream, server.addr, "a");
    }
    assert!(redis.events().values().all(|data| data != "refused"), "what was refused is not there");
}

#[test]
fn while_redis_is_away_streams_stay_and_publishers_are_told_when_to_try_again() {
    if !has_redis() {
        return;
    }
    let mut redis = Redis::with(&["--appendonly", "yes", "--appendfsync", "always", "--save", ""]);
    let server = server(&redis.url(), &[]);
    let (mut stream, _) = Wire::subscribe(server.addr, "/events/a", "");
    is_open(&mut stream, server.addr, "a");
    redis.kill();
    let line = server.wait_for_log("Redis is away");
    assert!(line.contains("streams stay open"), "{line}");
    for (request, body) in [
        ("POST /events/a", "x"),
        ("POST /events/a?key=k", "x"),
        ("POST /events/a,b", "x"),
        ("PUT /events/a", "x\ny\n"),
        ("DELETE /events/a", ""),
    ] {
        let head = format!("{request} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", body.len());
        let answer = Wire::ask(server.addr, &format!("{head}{body}"));
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{request}: {answer:?}");
        assert!(answer.body.contains("Redis is away, so nothing was published: "), "{request}: {answer:?}");
    }
    assert_eq!(get(server.addr, "/health").body, "ok\n");
    redis.restart();
    wait_for("publishing to go on", || (try_post(server.addr, "/events/a", "x")?.0 == 200).then_some(()));
    server.wait_for_log("Redis is back");
    is_open(&mut stream, server.addr, "a");
}

#[test]
fn a_redis_that_stands_still_holds_neither_publishers_nor_stopping() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let mut server = server(&redis.url(), &[]);
    publish(server.addr, "/events/a", "x");
    redis.signal("STOP");
    let addr = server.addr;
    let answers: Vec<_> = (0..20).map(|_| thread::spawn(move || post(addr, "/events/a", "x"))).collect();
    for answer in answers {
        let answer = answer.join().unwrap();
        assert_eq!(answer.status, 503, "{answer:?}");
    }
    let _waiting = thread::spawn(move || try_post(addr, "/events/a", "x"));
    let stopping = |server: &mut Process| {
        let began = Instant::now();
        server.signal("TERM");
        assert!(wait_for("it to end", || server.child.try_wait().unwrap()).success());
        began.elapsed()
    };
    let (with, without) = (stopping(&mut server), stopping(&mut Process::start(&[])));
    assert!(with < (3 * without).max(Duration::from_secs(3)), "{with:?}, and without Redis {without:?}");
    redis.signal("CONT");
}

#[test]
fn a_key_holds_on_all_servers_after_a_restart_and_for_as_long_as_events_are_kept() {
    if !has_redis() {
        return;
    }
    let mut redis = Redis::with(&["--appendonly", "yes", "--appendfsync", "always", "--save", ""]);
    let servers = [(), ()].map(|()| server(&redis.url(), &["--keep-age", "3s"]));
    let began = Instant::now();
    let first = publish(servers[0].addr, "/events/a?key=k", "once");
    let again = || try_post(servers[1].addr, "/events/a?key=k", "twice").filter(|(status, _)| *status == 200);
    let other = publish(servers[1].addr, "/events/b?key=k", "another topic");
    assert_ne!(other, first);
    redis.kill();
    redis.restart();
    let second = wait_for("Redis to be back", again).1;
    assert!(second.trim() == first || began.elapsed() > Duration::from_secs(3), "{second} is not {first}");
    wait_for("the key to be forgotten", || again().filter(|(_, id)| id.trim() != first));
}

#[test]
fn a_key_of_a_topic_that_was_deleted_before_holds_as_long_as_any_other() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let server = server(&redis.url(), &[]);
    let script = |script: &str| redis.cli(&["eval", script, "0"]);
    let left = |name: &str| script(&format!("return redis.call('pttl', '{{brooklet}}:{name}')"));
    publish(server.addr, "/events/a?key=k", "once");
    Wire::ask(server.addr, "DELETE /events/a HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let whole: u64 = wait_for("the topic to be deleted", || left("forgotten/a").parse().ok());
    wait_for("some time to pass", || (left("forgotten/a").parse::<u64>().unwrap() < whole - 50).then_some(()));
    let first = publish(server.addr, "/events/a?key=k", "once more");
    // A key counts only together with what says when its topic was deleted: that must not be gone before it.
    let outlives =
        "return redis.call('pttl', '{brooklet}:forgotten/a') >= redis.call('pttl', '{brooklet}:key/a/k') and 1";
    assert_eq!(script(outlives), "1");
    assert_eq!(publish(server.addr, "/events/a?key=k", "twice"), first);
}

#[test]
fn the_lines_of_a_put_and_an_event_of_several_topics_go_to_redis_together() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let relay = Relay::watched(redis.port, move |is_for_redis, bytes| {
        // Each command or script that appends has this word in it once.
        let words = bytes.windows(10).filter(|word| is_for_redis && *word == b"NOMKSTREAM").count();
        count.fetch_add(words, SeqCst);
        true
    });
    let server = server(&relay.url(), &[]);
    let (mut stream, _) = Wire::subscribe(server.addr, "/events/a", "");
    let mut send = |request: &str, body: &str, events: usize| {
        let head = format!("{request} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", body.len());
        let times = wait_for("it to be published", || {
            let before = asked.load(SeqCst);
            let answer = Wire::ask(server.addr, &format!("{head}{body}"));
            assert!([200, 503].contains(&answer.status), "{answer:?}"); // a busy machine's Redis may be too slow
            (answer.status == 200).then(|| asked.load(SeqCst) - before)
        });
        (0..events).for_each(|_| drop(stream.event().unwrap()));
        times
    };
    let asked = [
        send("POST /events/a,b,c", "x", 1),
        send("POST /events/a,b,c?key=k", "x", 1),
        send("PUT /events/a", &"x\n".repeat(1_000), 1_000),
    ];
    assert!(asked[0] == 1 && asked[1] == 1 && asked[2] <= 20, "{asked:?} times");
}

#[test]
fn an_event_whose_reply_was_lost_is_never_published_again() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let is_deaf = Arc::new(AtomicBool::new(false));
    let deaf = is_deaf.clone();
    let relay = Relay::watched(redis.port, move |is_for_redis, _| is_for_redis || !deaf.load(SeqCst));
    let server = server(&relay.url(), &[]);
    let (mut stream, _) = Wire::subscribe(server.addr, "/events/a", "");
    is_open(&mut stream, server.addr, "a");
    is_deaf.store(true, SeqCst);
    let mut answers = Vec::new();
    for target in ["/events/a", "/events/a?key=k"] {
        relay.turn_to(redis.port); // or it would have noticed by the first that nothing comes
        is_deaf.store(false, SeqCst);
        is_open(&mut stream, server.addr, "a");
        is_deaf.store(true, SeqCst);
        answers.push(post(server.addr, target, "in doubt"));
    }
    for answer in answers {
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{answer:?}");
        assert!(answer.body.contains("it may be published, or not; publish it again with the same key"), "{answer:?}");
    }
    is_deaf.store(false, SeqCst);
    let again = publish(server.addr, "/events/a?key=k", "in doubt");
    is_open(&mut stream, server.addr, "a");
    let mut ids = redis.events().into_iter().filter(|(_, data)| data == "in doubt").map(|(id, _)| id.to_string());
    assert!(ids.next() < ids.next() && ids.next().is_none(), "each of the two once");
    let keyed = redis.events().into_iter().filter(|(_, data)| data == "in doubt").map(|(id, _)| id).max();
    assert_eq!(keyed, again.parse().ok(), "the key finds what was published then");
}

#[test]
fn a_server_that_is_trimmed_past_while_it_starts_knows_that_it_lacks_something() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let first = server(&redis.url(), &[]);
    let ids: Vec<String> = (0..400).map(|n| publish(first.addr, "/events/a", &n.to_string())).collect();
    let (port, reads) = (redis.port.to_string(), AtomicUsize::new(0));
    let relay = Relay::watched(redis.port, move |is_for_redis, bytes| {
        let is_read = is_for_redis && bytes.windows(6).any(|word| word == b"XRANGE") && !bytes.starts_with(b"*2");
        if is_read && !bytes.windows(4).any(|word| word == b"EVAL") && reads.fetch_add(1, SeqCst) == 1 {
            let trimmed = output(Command::new("redis-cli").args(["-p", &port, "xtrim", "brooklet", "maxlen", "100"]));
            assert!(trimmed.status.success());
        }
        true
    });
    let late = server(&relay.url(), &[]);
    let (mut stream, _) = Wire::subscribe(late.addr, "/events/a", &format!("Last-Event-ID: {}\r\n", ids[100]));
    let mut had = Vec::new();
    while had.last().is_none_or(|last| last != "399") {
        let event = stream.event().unwrap();
        had.push(if event.is_gap() { "gap".into() } else { event.data().to_string() });
    }
    assert!(had.iter().any(|had| had == "gap") && had[had.len() - 100] == "300", "a hole without a word: {had:?}");
}

#[test]
fn a_cursor_is_judged_by_redis_and_not_by_the_clock_of_the_server() {
    if !has_redis() {
        return;
    }
    let dir = Scratch::new();
    let Some(clock) = Clock::new(&dir) else { return };
    let redis = Redis::start();
    let right = server(&redis.url(), &[]);
    for offset in ["-1h", "+1h"] {
        clock.set(offset);
        let wrong = clock.start(&["--redis", &redis.url(), "--retry", "100ms"]);
        let mut last = publish(right.addr, "/events/a", "0");
        for n in 1..4 {
            // Each is an id that was given just now, on another server: by the wrong clock an hour early or late.
            let (mut stream, cursor) = Wire::subscribe(wrong.addr, "/events/a", &format!("Last-Event-ID: {last}\r\n"));
            assert_eq!(cursor.to_string(), last, "{offset}");
            last = publish(right.addr, "/events/a", &n.to_string());
            let next = stream.event().unwrap();
            assert_eq!((next.data(), next.id.as_deref()), (n.to_string().as_str(), Some(last.as_str())), "{offset}");
        }
        // One that Redis has not given: half an hour from now, which by one of the clocks is long ago.
        let newest: Id = last.parse().unwrap();
        let never = Id { ms: newest.ms + 1_800_000, seq: 0 };
        let (mut stream, _) = Wire::subscribe(wrong.addr, "/events/a", &format!("Last-Event-ID: {never}\r\n"));
        assert!(stream.event().unwrap().is_gap(), "{offset}");
    }
}

#[test]
fn a_password_that_changes_stops_publishers_and_no_stream() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let server = server(&redis.url(), &[]);
    let (mut stream, _) = Wire::subscribe(server.addr, "/events/a", "");
    is_open(&mut stream, server.addr, "a");
    redis.cli(&["config", "set", "requirepass", "sesame"]);
    redis.cli(&["--pass", "sesame", "--no-auth-warning", "client", "kill", "type", "normal"]);
    server.wait_for_log("Redis is away: it wants a password");
    let answer = post(server.addr, "/events/a", "x");
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{answer:?}");
    assert!(answer.body.contains("nothing was published: it wants a password"), "{answer:?}");
    redis.cli(&["--pass", "sesame", "--no-auth-warning", "config", "set", "requirepass", ""]);
    server.wait_for_log("Redis is back");
    is_open(&mut stream, server.addr, "a");
}

#[test]
fn an_event_of_several_topics_has_neighbouring_entries_and_a_deleted_topic_is_gone_on_all_servers() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let servers = three(&redis.url(), &[]);
    let (mut stream, start) = Wire::subscribe(servers[2].addr, "/events/a,b", "");
    let ids = publish(servers[0].addr, "/events/a,b?key=k", "both");
    assert_eq!(
        publish(servers[1].addr, "/events/b,a?key=k", "again"),
        ids.lines().rev().collect::<Vec<_>>().join("\n")
    );
    let seen = [0, 1].map(|_| stream.event().unwrap());
    assert_eq!(ids, format!("{}\n{}", seen[0].id(), seen[1].id()));
    let delete = |topic: &str| {
        let request = format!("DELETE /events/{topic} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let ask = || Some(Wire::ask(servers[1].addr, &request)).filter(|answer| answer.status == 200);
        wait_for("a topic to be deleted", ask).body
    };
    assert_eq!(delete("a"), "forgotten\n");
    let again = publish(servers[0].addr, "/events/a,b?key=k", "third");
    let (a, b) = again.split_once('\n').unwrap();
    assert!(a.parse::<Id>().unwrap() > seen[1].id(), "the topic's keys are forgotten");
    assert_eq!(b, seen[1].id.as_deref().unwrap(), "those of others are not");
    assert_eq!(stream.event().unwrap().data(), "third");
    // Also on a server that reads all of it at its start.
    let late = server(&redis.url(), &[]);
    for addr in servers.iter().map(|server| server.addr).chain([late.addr]) {
        let (mut stream, _) = Wire::subscribe(addr, "/events/a,b?since=earliest", "");
        let first = stream.event().unwrap();
        let first = if first.is_gap() { stream.event().unwrap() } else { first };
        assert_eq!((first.data(), first.id()), ("both", seen[1].id()), "of b alone");
        assert_eq!(stream.event().unwrap().data(), "third");
    }
    let (mut stream, _) = Wire::subscribe(servers[0].addr, "/events/a", &format!("Last-Event-ID: {start}\r\n"));
    assert!(stream.event().unwrap().is_gap());
}

#[test]
fn any_program_can_publish_by_xadd_and_nonsense_is_passed_over() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let server = server(&redis.url(), &[]);
    let (mut stream, _) = Wire::subscribe(server.addr, "/events/a", "");
    for fields in [
        &["data", "no topic"][..],
        &["topic", "a"],
        &["topic", "no/topic", "data", "x"],
        &["topic", "a", "data", "x", "event", "two\nlines"],
        &["topic", "a", "data", "x", "event", "gap"],
        &["topic", "a", "data", "x", "retry", "soon"],
        &["topic", "a", "event", "note", "data", "one\ntwo", "by", "hand"],
    ] {
        redis.cli(&[&["xadd", "brooklet", "*"], fields].concat());
    }
    redis.cli(&["eval", r"return redis.call('xadd', 'brooklet', '*', 'topic', 'a', 'data', '\255')", "0"]);
    publish(server.addr, "/events/a", "then");
    let note = stream.event().unwrap();
    assert_eq!((note.data(), note.event.as_deref()), ("one\ntwo", Some("note")));
    assert_eq!(stream.event().unwrap().data(), "then");
    server.wait_for_log("is passed over: an entry without a topic");
    // A server that starts reads the same.
    let late = world::server(&redis.url(), &[]);
    let (mut stream, _) = Wire::subscribe(late.addr, "/events/a?since=earliest", "");
    assert_eq!([0, 1].map(|_| stream.event().unwrap().data.unwrap()), ["one\ntwo", "then"]);
}

#[test]
fn a_stream_may_have_another_name_and_is_bounded() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let [north, south] =
        ["north", "south"].map(|name| server(&redis.url(), &["--redis-stream", name, "--redis-length", "500"]));
    let (mut stream, _) = Wire::subscribe(north.addr, "/events/a", "");
    publish(south.addr, "/events/a", "elsewhere");
    publish(north.addr, "/events/a", "here");
    assert_eq!(stream.event().unwrap().data(), "here");
    let lines = "x\n".repeat(400);
    let head = format!("PUT /events/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", lines.len());
    for round in 0..5 {
        let answer = wait_for("a PUT", || {
            Some(Wire::ask(north.addr, &format!("{head}{lines}"))).filter(|answer| answer.status == 200)
        });
        assert!(answer.body.starts_with("published 400, last id"), "{answer:?}");
        publish(north.addr, "/events/a", &format!("end {round}"));
        let (mut count, mut next) = (0, stream.event().unwrap());
        while next.data() == "x" {
            count += 1;
            next = stream.event().unwrap();
        }
        assert!(next.data() == format!("end {round}") && count >= 400, "{next:?} after {count}");
    }
    let length: usize = redis.cli(&["xlen", "north"]).parse().unwrap();
    assert!((500..=700).contains(&length), "{length}: about 500, since Redis trims by the node");
}

#[test]
fn the_way_to_redis_may_be_encrypted() {
    if !has_redis() || !has("openssl") {
        return;
    }
    let dir = Scratch::new();
    let (key, cert) = (dir.path("key.pem"), dir.path("cert.pem"));
    let made = shell(&format!(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost \
         -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE -keyout {key} -out {cert} 2>/dev/null"
    ));
    assert!(made);
    let tls = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let flags = ["--tls-port", &tls, "--tls-cert-file", &cert, "--tls-key-file", &key, "--tls-auth-clients", "no"];
    let _redis = Redis::with(&[&["--save", ""], &flags[..]].concat());
    let url = format!("rediss://localhost:{tls}");
    let untrusted = output(Command::new(BROOKLET).args(["--listen", "127.0.0.1:0", "--redis", &url]));
    let stderr = String::from_utf8(untrusted.stderr).unwrap();
    assert!(stderr.contains("invalid peer certificate"), "{stderr}");
    let mut command = Command::new(BROOKLET);
    command.args(["--listen", "127.0.0.1:0", "--redis", &url]).env("SSL_CERT_FILE", &cert);
    let server = Process::from(&mut command);
    let (mut stream, _) = Wire::subscribe(server.addr, "/events/a", "");
    publish(server.addr, "/events/a", "unseen on the way");
    assert_eq!(stream.event().unwrap().data(), "unseen on the way");
}

#[test]
fn a_user_of_redis_needs_no_more_rights_than_the_readme_says() {
    if !has_redis() {
        return;
    }
    let redis = Redis::start();
    let readme = include_str!("../../README.md");
    let rights = readme.split('`').find(|words| words.starts_with("+info ")).expect("the rights in the README");
    let rights: Vec<&str> = rights.split(' ').collect();
    let user = ["acl", "setuser", "brook", "on", ">let", "~brooklet", "~{brooklet}:*"];
    redis.cli(&[&user[..], &rights].concat());
    let server = server(&format!("redis://brook:let@127.0.0.1:{}", redis.port), &[]);
    let (mut stream, _) = Wire::subscribe(server.addr, "/events/a", "");
    let first = publish(server.addr, "/events/a?key=k", "once");
    assert_eq!(publish(server.addr, "/events/a?key=k", "twice"), first);
    assert_eq!(stream.event().unwrap().data(), "once");
    redis.cli(&["flushall"]);
    assert!(stream.event().unwrap().is_gap());
    // An id of the future has the newest one asked for.
    let (mut stream, _) = Wire::subscribe(server.addr, "/events/a", "Last-Event-ID: 9999999999999-0\r\n");
    assert!(stream.event().unwrap().is_gap());
}

#[test]
fn the_readmes_page_of_commands_makes_three_servers_and_a_load_balancer() {
    if !has_redis() || !(std::path::Path::new("/usr/sbin/nginx").exists() || left_out("nginx")) {
        return;
    }
    let readme = include_str!("../../README.md");
    let block = readme.split("```sh many-servers\n").nth(1).expect("the block").split("```").next().unwrap();
    let free: Vec<_> = (0..5).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let ports: Vec<u16> = free.iter().map(|listener| listener.local_addr().unwrap().port()).collect();
    drop(free);
    let mut script = block.replace("target/release/brooklet", BROOKLET);
    for (name, port) in ["6379", "3001", "3002", "3003", "8080"].iter().zip(&ports) {
        script = script.replace(name, &port.to_string());
    }
    let dir = Scratch::new();
    let mut command = Command::new("setsid");
    command.args(["sh", "-c", &format!("{script}\nwait")]).current_dir(&dir.0);
    let group = Group(start(command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null())));
    let addr: std::net::SocketAddr = format!("127.0.0.1:{}", ports[4]).parse().unwrap();
    let ask = |path: &str| {
        let mut socket = std::net::TcpStream::connect(addr).ok()?;
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).ok()?;
        Some(socket)
    };
    // Until the last of them is there: nginx passes by who is not.
    for port in &ports[1..4] {
        wait_for("a server", || std::net::TcpStream::connect(("127.0.0.1", *port)).ok());
    }
    let mut streams: Vec<_> = (0..6).map(|_| wait_for("nginx", || ask("/events/news"))).collect();
    let read_until = |socket: &mut std::net::TcpStream, end: &str| {
        let mut read = Vec::new();
        let mut chunk = [0; 4096];
        while !String::from_utf8_lossy(&read).contains(end) {
            match socket.read(&mut chunk).unwrap() {
                0 => panic!("it ended after {:?}", String::from_utf8_lossy(&read)),
                got => read.extend_from_slice(&chunk[..got]),
            }
        }
    };
    streams.iter_mut().for_each(|stream| read_until(stream, "retry: 3000"));
    let each: Vec<u64> = ports[1..4].iter().map(|port| metric(([127, 0, 0, 1], *port).into(), "subscribers")).collect();
    assert_eq!(each, [2, 2, 2], "spread evenly");
    let (status, _) = wait_for("publishing", || try_post(addr, "/events/news", "hello"));
    assert_eq!(status, 200);
    streams.iter_mut().for_each(|stream| read_until(stream, "data: hello"));
    drop(group);
}

/// A shell and all that it has started, which end with it.
struct Group(std::process::Child);

impl Drop for Group {
    fn drop(&mut self) {
        // At once: a Redis that is told to end would save first, into a directory that is gone by then, and stay.
        shell(&format!("kill -KILL -{}", self.0.id()));
        let _ = self.0.wait();
    }
}
