//! More who must be waited for than there are threads.

use super::*;
use crate::desk::Desk;
use crate::pool::{Kind, Pool, Seat};
use std::time::Instant;

#[test]
fn a_crowd_that_is_behind_shares_few_threads_and_loses_nobody() {
    check("few threads", PATIENCE, || {
        let config = Config::default().with(|config| config.threads = 4);
        let server = Arc::new(start_with(config, |server| {
            server.stream("/panic", |_| std::panic::on_purpose()).unwrap();
            server.stream("/works", |stream| stream.send(&Event::new("it works"))).unwrap();
        }));
        let published = publisher(&server, "event", 3, Duration::ZERO).join().unwrap();
        let panicking = get(&server, "/panic", ROOMY);
        // Each takes a little, pauses for longer than a turn lasts, and takes the rest.
        let readers: Vec<_> = (0..4)
            .map(|_| {
                let server = server.clone();
                spawn("reader", move || {
                    let (peer, first) = insist(|| get(&server, "/events/a?since=earliest", 60), 30);
                    thread::sleep(Duration::from_millis(300));
                    let mut seen = Seen { bytes: first };
                    seen.read(&peer, 80, 3);
                    peer.close();
                    seen.heard()
                })
            })
            .collect();
        // Requests have a share of their own.
        let requesters: Vec<_> = (0..3)
            .map(|_| {
                let server = server.clone();
                spawn("requester", move || insist(|| post(&server, "/events/b", "x"), ROOMY).1)
            })
            .collect();
        for requester in requesters {
            let answer = requester.join().unwrap();
            assert!(answer.starts_with(b"HTTP/1.1 200 "), "{:?}", String::from_utf8_lossy(&answer));
        }
        readers.into_iter().for_each(|reader| assert_eq!(reader.join().unwrap(), published));
        while panicking.take(ROOMY).is_some() {}
        // There is room for one handler, which the other may still have.
        while !hears_something(&get(&server, "/works", ROOMY)) {
            thread::sleep(Duration::from_millis(100));
        }
        stop(Arc::into_inner(server).unwrap());
    });
}

fn hears_something(peer: &Peer) -> bool {
    let mut seen = Seen::default();
    seen.read(peer, ROOMY, 1);
    seen.events().len() == 1
}

/// Connects until something comes: whoever has waited too long for a thread makes room for others.
fn insist(connect: impl Fn() -> Peer, most: usize) -> (Peer, Vec<u8>) {
    loop {
        let peer = connect();
        if let Some(first) = peer.take(most) {
            return (peer, first);
        }
    }
}

#[test]
fn each_job_runs_once_and_one_that_panics_gives_its_share_back() {
    check("jobs", PATIENCE, || {
        let pool = Pool::start(4, Arc::new(Desk::default())).unwrap();
        let ran = Arc::new(AtomicU16::new(0));
        for n in 0..12 {
            let ran = ran.clone();
            let job = move |_: &mut Seat| {
                ran.fetch_add(1, SeqCst);
                if n % 3 == 0 {
                    std::panic::on_purpose();
                }
            };
            pool.hand(if n % 2 == 0 { Kind::Request } else { Kind::Behind }, Box::new(job));
        }
        while ran.load(SeqCst) < 12 {
            thread::sleep(Duration::from_millis(100));
        }
        be_punctual();
        pool.close();
        assert_eq!(pool.wait_for_threads(Instant::now() + Duration::from_secs(1)), 0, "threads that have not ended");
        assert_eq!(ran.load(SeqCst), 12, "each once");
    });
}

#[test]
fn a_job_that_comes_while_the_pool_closes_runs_or_is_dropped() {
    check("late jobs", PATIENCE, || {
        let pool = Pool::start(4, Arc::new(Desk::default())).unwrap();
        let held = Arc::new(()); // by each job, as a connection is
        let handing = {
            let (pool, held) = (pool.clone(), held.clone());
            spawn("handing", move || {
                for kind in [Kind::Request, Kind::Behind, Kind::Request] {
                    let held = held.clone();
                    pool.hand(kind, Box::new(move |_: &mut Seat| drop(held)));
                }
            })
        };
        dawdle();
        pool.close();
        handing.join().unwrap();
        be_punctual();
        assert_eq!(pool.wait_for_threads(Instant::now() + Duration::from_secs(1)), 0, "threads that have not ended");
        assert_eq!(Arc::strong_count(&held), 1, "a job is held for ever");
    });
}

#[test]
fn whoever_comes_while_the_server_stops_is_closed_with_it() {
    check("late comers", PATIENCE, || {
        let server = Arc::new(start(Config::default().with(|config| config.threads = 4)));
        let _hub = server.hub(); // which the program has longer
        let path = ["/health", "/events/a"][below(2)];
        let coming = {
            let server = server.clone();
            spawn("coming", move || {
                let (socket, peer) = pair(7, ROOMY);
                peer.send(format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:3000\r\n\r\n").as_bytes());
                let _ = server.serve(socket);
                peer
            })
        };
        dawdle();
        server.stop(); // while anybody may be slow
        let peer = coming.join().unwrap();
        peer.close(); // whoever still reads from it sees that
        drop(Arc::into_inner(server));
        be_punctual();
        while !peer.is_closed() {
            thread::sleep(Duration::from_millis(500));
        }
    });
}
