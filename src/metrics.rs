//! What the server counts, and how Prometheus reads it.
//!
//! Counters only grow, each from one thread or many, without a lock: their values need not fit each other to the last
//! event. The names are public, so they stay as they are even where a better word was found since.
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What every room counts as it goes; `Relaxed` throughout, since nothing is decided by them.
#[derive(Default)]
pub struct Counters {
    pub published: AtomicU64,
    /// Requests to publish that were refused.
    pub refused: AtomicU64,
    /// Events written to subscribers and by handlers; heartbeats are not counted.
    pub delivered: AtomicU64,
    /// How often a lane let a subscriber go: the design is about keeping this low.
    pub woken: AtomicU64,
    pub gaps: AtomicU64,
    /// Connections and streams that were rejected at once, mostly for want of room; in the metrics, `sent_away_total`.
    pub rejected: AtomicU64,
    /// Connections that were closed to make room for others.
    pub evicted: AtomicU64,
    /// The journal's length: the only one that may fall.
    pub journal_bytes: AtomicU64,
}

/// What is measured anew whenever somebody asks.
pub struct Gauges {
    pub subscribers: usize,
    pub live: usize,
    pub behind: usize,
    pub queued: usize,
    pub threads: usize,
    pub connections: usize,
    pub topics: usize,
    pub kept_events: usize,
    pub kept_bytes: usize,
}

/// The body of `/metrics`. To scrape it costs a few locks, so whoever may not read streams may not read it either.
pub fn render(gauges: &Gauges, counters: &Counters) -> String {
    let total = |counter: &AtomicU64| counter.load(Relaxed);
    let mut text = String::new();
    for (name, kind, value, help) in [
        ("subscribers", "gauge", gauges.subscribers as u64, "Streams that are open."),
        ("live", "gauge", gauges.live as u64, "Subscribers that have everything, and no thread."),
        ("behind", "gauge", gauges.behind as u64, "Subscribers that a thread replays to."),
        ("queued", "gauge", gauges.queued as u64, "Subscribers that wait for a thread."),
        ("threads", "gauge", gauges.threads as u64, "Threads for requests, handlers and those behind."),
        ("connections", "gauge", gauges.connections as u64, "Connections beside the streams."),
        ("topics", "gauge", gauges.topics as u64, "Topic names in use."),
        ("kept_events", "gauge", gauges.kept_events as u64, "Events kept for replaying."),
        ("kept_bytes", "gauge", gauges.kept_bytes as u64, "Bytes kept for replaying, with bookkeeping."),
        ("journal_bytes", "gauge", total(&counters.journal_bytes), "Size of the journal."),
        ("published_total", "counter", total(&counters.published), "Events published."),
        ("refused_total", "counter", total(&counters.refused), "Requests to publish that were refused."),
        (
            "delivered_total",
            "counter",
            total(&counters.delivered),
            "Events written to subscribers, those of handlers too.",
        ),
        (
            "woken_total",
            "counter",
            total(&counters.woken),
            "Times a live subscriber was given to a thread, or had closed.",
        ),
        ("gaps_total", "counter", total(&counters.gaps), "Gaps that subscribers were told of."),
        ("sent_away_total", "counter", total(&counters.rejected), "Connections and streams without room."),
        ("evicted_total", "counter", total(&counters.evicted), "Connections closed to make room for others."),
    ] {
        let _ = writeln!(text, "# HELP brooklet_{name} {help}\n# TYPE brooklet_{name} {kind}\nbrooklet_{name} {value}");
    }
    text
}
