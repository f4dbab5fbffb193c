//! Peers that vanish, while the socket changes hands.

use super::*;

/// Waits until so many streams are open, and returns how many topics are in use then.
fn wait_for_streams(server: &Handle, count: &str) -> String {
    loop {
        let peer = get(server, "/metrics", ROOMY);
        let mut bytes = Vec::new();
        while !String::from_utf8_lossy(&bytes).contains("brooklet_evicted_total ") {
            bytes.extend(peer.take(ROOMY).expect("an answer"));
        }
        peer.close();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().to_string();
        if value("brooklet_subscribers ") == count {
            return value("brooklet_topics ");
        }
        thread::sleep(Duration::from_millis(500));
    }
}

#[test]
fn whoever_vanishes_is_noted_once_and_nothing_is_left_of_it() {
    check("closing", PATIENCE, || {
        let server = start(Config::default().with(|config| config.log = Log::Info));
        let path = "/events/a,quiet?since=earliest";
        let peers = [get(&server, path, 400), get(&server, path, ROOMY), get(&server, path, 500)];
        let publishing = publisher(&server, "event", 4, Duration::ZERO);
        let vanish = |peer: &Peer, how: fn(&Peer)| {
            let peer = peer.clone();
            spawn("peer", move || {
                let _ = peer.take(300);
                how(&peer);
            })
        };
        let vanishing = [vanish(&peers[0], Peer::close), vanish(&peers[1], Peer::reset)];
        // Who only ends its sending side reads on.
        peers[2].end();
        let mut seen = Seen::default();
        seen.read(&peers[2], 100, 4);
        assert_eq!(seen.heard(), publishing.join().unwrap());
        vanishing.into_iter().for_each(|thread| thread.join().unwrap());
        wait_for_streams(&server, "1");
        peers[2].close();
        assert_eq!(wait_for_streams(&server, "0"), "1", "topics in use: nobody follows the quiet one");
        // Its lane forgets it, too.
        while !peers.iter().all(Peer::is_closed) {
            thread::sleep(Duration::from_millis(500));
        }
        stop(server);
        let ends = take_lines().iter().filter(|line| line.contains("closed peer=")).count();
        assert_eq!(ends, peers.len(), "ends in the log");
    });
}
