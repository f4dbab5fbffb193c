//! An event as it is kept, queued and written: encoded once, its bytes shared by all who get it.
//!
//! What the journal says of an event stands before what goes out on the wire, in the same buffer.

use crate::event::Id;
use std::sync::Arc;

/// One write to a live subscriber takes at most this much: loopback buffers megabytes, but a real link only about 65
/// kB, so larger batches would push every distant subscriber behind.
pub const BATCH_BYTES: usize = 32 * 1024;
/// An event as it is kept, queued and written: its bytes are shared, never copied per subscriber. What the journal says
/// of it stands before what goes out, in the same buffer.
#[derive(Clone)]
pub struct Encoded {
    pub id: Id,
    pub block: Arc<[u8]>,
    /// Where in `block` the bytes begin that go out; before them stands what only the journal needs.
    pub frame_at: usize,
}

impl Encoded {
    pub fn new(id: Id, frame: impl Into<Vec<u8>>) -> Encoded {
        Encoded { id, block: frame.into().into(), frame_at: 0 }
    }

    /// What goes out on the wire.
    pub fn frame(&self) -> &[u8] {
        &self.block[self.frame_at..]
    }
}

/// Encoded events in the order of their ids, one after another in one buffer, so that one write can take them all.
#[derive(Default)]
pub struct Run {
    pub events: Vec<(Encoded, usize)>, // with the offset in `bytes` where it ends
    pub bytes: Vec<u8>,
}

impl Run {
    pub fn push(&mut self, event: &Encoded) {
        self.bytes.extend_from_slice(event.frame());
        self.events.push((event.clone(), self.bytes.len()));
    }

    pub fn has_room_for(&self, event: &Encoded) -> bool {
        self.bytes.is_empty() || self.bytes.len() + event.frame().len() <= BATCH_BYTES
    }

    /// Where the first `count` events end.
    pub fn end_of(&self, count: usize) -> usize {
        if count == 0 { 0 } else { self.events[count - 1].1 }
    }

    pub fn newest(&self) -> Id {
        self.events.last().map_or(Id::default(), |(event, _)| event.id)
    }

    pub fn clear(&mut self) {
        self.events.clear();
        self.bytes.clear();
        self.bytes.shrink_to(2 * BATCH_BYTES); // one event of 448 KiB must not stay for ever
    }
}
