//! Turning live, while others publish.

use super::*;

#[test]
fn who_turns_live_while_others_publish_hears_each_event_once_and_in_order() {
    check("turning live", PATIENCE, || {
        let server = start(Config::default());
        let readers: Vec<_> = [("/events/a?since=earliest", ROOMY), ("/events/b,a?since=earliest", 300)]
            .into_iter()
            .map(|(path, capacity)| {
                let peer = get(&server, path, capacity);
                spawn("reader", move || {
                    let mut seen = Seen::default();
                    seen.read(&peer, 200, 4);
                    seen.heard()
                })
            })
            .collect();
        let publishers = ["one", "other"].map(|name| publisher(&server, name, 2, Duration::ZERO));
        let mut published: Vec<_> = publishers.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        published.sort();
        for reader in readers {
            assert_eq!(reader.join().unwrap(), published);
        }
        stop(server);
    });
}
