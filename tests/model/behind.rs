//! Falling behind, while others publish, the stream's life ends, or the server stops.

use super::*;

/// Reads streams, one after another, each from where the one before ended, until it has heard so many events.
fn persist(server: &Handle, path: &str, capacity: usize, at_once: usize, count: usize) -> Vec<Heard> {
    let (mut heard, mut last) = (Vec::new(), None);
    while heard.len() < count {
        let fields = last.map_or(String::new(), |id| format!("Last-Event-ID: {id}\r\n"));
        let peer = get_with(server, path, &fields, capacity);
        let mut seen = Seen::default();
        seen.read(&peer, at_once, count - heard.len());
        peer.close();
        heard.extend(seen.heard());
        last = seen.blocks().iter().rev().find_map(|block| block.id).or(last);
    }
    heard
}

#[test]
fn who_is_slow_and_whose_life_ends_hears_each_event_once_when_it_comes_back() {
    check("a short life", PATIENCE, || {
        let server = Arc::new(start(Config::default().with(|config| config.lifetime = Duration::from_secs(2))));
        let readers: Vec<_> = [(ROOMY, ROOMY), (90, 40)]
            .into_iter()
            .map(|(capacity, at_once)| {
                let server = server.clone();
                spawn("reader", move || persist(&server, "/events/a?since=earliest", capacity, at_once, 5))
            })
            .collect();
        let quiet = get(&server, "/events/quiet", ROOMY);
        let ending = spawn("reader", move || Seen::default().read(&quiet, ROOMY, 1));
        let published = publisher(&server, "event", 5, Duration::from_millis(600)).join().unwrap();
        ending.join().unwrap(); // whether or not anything comes
        readers.into_iter().for_each(|reader| assert_eq!(reader.join().unwrap(), published));
        stop(Arc::into_inner(server).unwrap());
    });
}

#[test]
fn polls_that_end_while_others_publish_hear_each_event_once() {
    check("polls", PATIENCE, || {
        let server = Arc::new(start(Config::default()));
        let reader = {
            let server = server.clone();
            spawn("reader", move || persist(&server, "/events/a?since=earliest&poll=1s", ROOMY, ROOMY, 4))
        };
        let published = publisher(&server, "event", 4, Duration::from_millis(500)).join().unwrap();
        assert_eq!(reader.join().unwrap(), published);
        stop(Arc::into_inner(server).unwrap());
    });
}

#[test]
fn what_a_stopping_server_has_not_sent_stands_after_the_last_id_that_it_gives() {
    check("stopping", PATIENCE, || {
        let server = start(Config::default());
        let readers: Vec<_> = [(ROOMY, ROOMY), (120, 40)]
            .into_iter()
            .map(|(capacity, at_once)| {
                let peer = get(&server, "/events/a?since=earliest", capacity);
                spawn("reader", move || {
                    let mut seen = Seen::default();
                    seen.read(&peer, at_once, usize::MAX);
                    (seen, capacity)
                })
            })
            .collect();
        let publishing = publisher(&server, "event", 6, Duration::ZERO);
        let others = server.hub();
        let quiet = spawn("publisher", move || _ = others.publish("b", Event::new("of another topic")));
        dawdle();
        stop(server);
        quiet.join().unwrap();
        let published = publishing.join().unwrap();
        for reader in readers {
            let (seen, capacity) = reader.join().unwrap();
            let heard = seen.heard();
            assert_eq!(heard, published[..heard.len()], "the first of them, each once");
            let last = seen.blocks().iter().rev().find_map(|block| block.id).unwrap_or_default();
            let passed_over = published[heard.len()..].iter().filter(|(id, _)| *id <= last).count();
            assert_eq!(passed_over, 0, "events that nobody will ask for: {:?} after {heard:?}", seen.body());
            // What does not fit into a socket is not waited for.
            let ends_in_order = seen.bytes.is_empty() || seen.bytes.ends_with(b"0\r\n\r\n");
            assert!(ends_in_order || capacity < ROOMY, "{:?} ends in order", seen.body());
        }
    });
}
