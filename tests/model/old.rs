//! What is too old, while nobody looks.

use super::*;
use crate::history::FORGOTTEN_AT_ONCE;

#[test]
fn what_is_too_old_is_forgotten_also_where_nobody_looks() {
    check("too old", 2 * PATIENCE, || {
        let server = start(Config::default().with(|config| {
            (config.keep_events, config.keep_age) = (10 * FORGOTTEN_AT_ONCE, Duration::from_secs(1));
        }));
        let hub = server.hub();
        let (ids, published) = hub.publish_all("a", (0..FORGOTTEN_AT_ONCE + 100).map(|n| Event::new(n.to_string())));
        assert!(published.is_ok() && ids.len() > FORGOTTEN_AT_ONCE);
        thread::sleep(Duration::from_secs(70)); // nobody rings for the clerk, which looks once a minute
        assert_eq!(hub.topics(), [], "whoever looks forgets no more than one piece");
        stop(server);
    });
}
