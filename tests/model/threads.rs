//! More who must be waited for than there are threads.

use super::*;

#[test]
fn a_crowd_that_is_behind_shares_few_threads_and_loses_nobody() {
    check("few threads", PATIENCE, || {
        let config = Config { threads: 4, ..Config::default() };
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
