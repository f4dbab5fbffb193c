//! What a subscriber follows, while nobody serves it.
//!
//! A live subscriber has no thread, and one that is queued has none yet. What a thread needs to go on, or to end the
//! stream, lies in the connection's state meanwhile; whoever takes it out of there serves the subscriber
//! (`subscription.rs`). It is made once, when the stream is opened, and never copied.

use crate::event::Id;
use std::sync::Arc;
use std::time::Instant;

/// A stream of topics.
pub struct Subscriber {
    /// Shared with its lane; each is the topic's own string.
    pub names: Arc<[Arc<str>]>,
    /// What each topic had forgotten when the subscriber was last told of a gap.
    pub told: Vec<Id>,
    /// Up to where each topic is passed over, until all from before the stream has been replayed; then none.
    pub floors: Box<[Id]>,
    /// Which lane writes to it. It stays the same, or its events could overtake each other.
    pub lane: usize,
    /// Whether its lane has been told of it.
    pub has_joined: bool,
    /// When the clerk is to end it, at the latest: a poll sooner than its lifetime.
    pub due: Instant,
    /// When its lifetime is over: no write waits longer.
    pub deadline: Instant,
    /// The newest id when a poll's first event had gone out: what is newer is for the next poll.
    pub poll_until: Option<Id>,
    pub opened: Opened,
}

/// What the log says of a stream when it has ended.
pub struct Opened {
    /// As it was asked for.
    pub path: Box<str>,
    pub at: Instant,
}
