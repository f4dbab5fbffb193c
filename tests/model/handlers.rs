//! A handler's stream, to which its lane writes, too.

use super::*;

#[test]
fn a_handler_and_its_lane_write_whole_frames_and_a_closed_page_ends_both() {
    check("a handler", 10 * PATIENCE, || {
        let config = Config::default().with(|config| {
            config.heartbeat = Duration::from_millis(3_500);
            config.log = Log::Info;
        });
        let server = start_with(config, |server| {
            let write = |stream: &mut Stream| {
                for n in 0..4 {
                    stream.send(&Event::new(format!("event {n}")))?;
                    // Elsewhere, so that its lane sweeps, or on the socket.
                    match n % 2 {
                        0 => thread::sleep(Duration::from_secs(5)),
                        _ => stream.sleep(Duration::from_secs(2))?,
                    }
                }
                Ok(())
            };
            server.stream("/handler", write).unwrap();
        });
        let closing = get(&server, "/handler", 300);
        let peer = get(&server, "/handler", 25);
        let mut seen = Seen::default();
        // An event fits and a heartbeat after it does not, while it pauses; but a head must be taken in time.
        while seen.read_some(&peer, 20) {
            let heard = seen.events().len();
            if heard > 0 {
                thread::sleep(Duration::from_millis([0, 0, 0, 5_000][below(4)]));
            }
            if heard >= 2 {
                closing.close();
            }
        }
        let data: Vec<_> = seen.events().into_iter().filter_map(|event| event.data).collect();
        assert_eq!(data, ["event 0", "event 1", "event 2", "event 3"]);
        while !closing.is_closed() || !peer.is_closed() {
            thread::sleep(Duration::from_millis(500));
        }
        stop(server);
        let ends = take_lines().iter().filter(|line| line.contains("closed peer=")).count();
        assert_eq!(ends, 2, "ends in the log");
    });
}
