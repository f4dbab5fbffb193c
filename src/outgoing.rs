//! What is on its way out, and how much of it is out already.
//!
//! A write that does not wait may stop anywhere. What it has begun must be finished before anything else is written, or
//! the reader would see two frames mixed. So it is remembered with the offset that it has come to, as what it is and
//! not as bytes: an event shares its memory with all others who read it, and the cursor moves only once it is out
//! whole.

use crate::encoded::{Encoded, Shape};
use std::borrow::Cow;
use std::sync::Arc;

/// What has been begun, or must come first.
pub struct Unfinished {
    pub what: Outgoing,
    /// How many of its bytes are out.
    pub offset: usize,
}

/// What goes out in one piece.
pub enum Outgoing {
    /// An event of this topic. The cursor moves once it is out.
    Event(Encoded, Arc<str>),
    /// Of no topic, and not counted as an event, but a cursor, too.
    Gap(Encoded),
    /// A response's head and a stream's first block, or a heartbeat.
    Other(Vec<u8>),
}

impl Unfinished {
    /// Takes out the rest of what is no event and no gap; those stay.
    pub fn take_other(unfinished: &mut Option<Unfinished>) -> Option<(Vec<u8>, usize)> {
        match unfinished.take() {
            Some(Unfinished { what: Outgoing::Other(bytes), offset }) => Some((bytes, offset)),
            other => {
                *unfinished = other;
                None
            }
        }
    }
}

impl Outgoing {
    /// Its bytes. A form is made anew wherever it goes on, so what is unfinished takes no memory of its own.
    pub fn bytes(&self, shape: Shape) -> Cow<'_, [u8]> {
        match self {
            Outgoing::Event(event, topic) => event.shaped(shape, Some(topic)),
            Outgoing::Gap(gap) => gap.shaped(shape, None),
            Outgoing::Other(bytes) => bytes.into(),
        }
    }
}
