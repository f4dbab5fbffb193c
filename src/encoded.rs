//! An event as it is kept, queued and written: encoded once, its bytes shared by all who get it.
//!
//! A stream goes out in chunks, so that its reader can tell its end from a cut, and each event from the next; a peer of
//! HTTP/1.0, which knows no chunks, gets the same bytes without them. An event is one chunk, made once: what the journal
//! says of it, the chunk's size, the frame and the chunk's end stand beside each other in one buffer, and each form is a
//! slice of it.

use crate::event::Id;
use std::sync::Arc;

/// One write to a live subscriber takes at most this much: loopback buffers megabytes, but a real link only about 65
/// kB, so larger batches would push every distant subscriber behind.
pub const BATCH_BYTES: usize = 32 * 1024;
/// What ends a chunk.
const CHUNK_END: &[u8] = b"\r\n";

/// How the bytes of a stream stand on its connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// In chunks, of which an empty one is the last (RFC 9112 §7.1).
    Chunked,
    /// As they are, up to the end of the connection: for HTTP/1.0.
    Plain,
}

impl Framing {
    /// Some bytes of a stream. Never none: an empty chunk would be the last.
    pub fn wrap(self, frame: &[u8]) -> Vec<u8> {
        match self {
            Framing::Chunked => [size_line(frame).as_bytes(), frame, CHUNK_END].concat(),
            Framing::Plain => frame.to_vec(),
        }
    }

    /// What ends a stream after a whole frame. Without it, the stream was cut.
    pub fn end(self) -> &'static [u8] {
        match self {
            Framing::Chunked => b"0\r\n\r\n",
            Framing::Plain => b"",
        }
    }
}

/// An event as it is kept, queued and written: its bytes are shared, never copied per subscriber.
#[derive(Clone)]
pub struct Encoded {
    pub id: Id,
    /// What only the journal needs, the chunk's size, the frame, the chunk's end.
    buffer: Arc<[u8]>,
    chunk_at: usize,
    frame_at: usize,
}

impl Encoded {
    /// `fields` are what the journal says of it; without a journal, nothing.
    pub fn new(id: Id, fields: &[u8], frame: &[u8]) -> Encoded {
        let size = size_line(frame);
        let (chunk_at, frame_at) = (fields.len(), fields.len() + size.len());
        let buffer = [fields, size.as_bytes(), frame, CHUNK_END].concat().into();
        Encoded { id, buffer, chunk_at, frame_at }
    }

    /// What goes out on the wire.
    pub fn bytes(&self, framing: Framing) -> &[u8] {
        match framing {
            Framing::Chunked => &self.buffer[self.chunk_at..],
            Framing::Plain => self.frame(),
        }
    }

    /// What stands in the journal, which is an event stream without chunks.
    pub fn block(&self) -> [&[u8]; 2] {
        [&self.buffer[..self.chunk_at], self.frame()]
    }

    pub fn block_len(&self) -> usize {
        self.block().iter().map(|part| part.len()).sum()
    }

    /// What its bytes take of the memory.
    pub fn memory(&self) -> usize {
        self.buffer.len()
    }

    fn frame(&self) -> &[u8] {
        &self.buffer[self.frame_at..self.buffer.len() - CHUNK_END.len()]
    }
}

fn size_line(chunk: &[u8]) -> String {
    format!("{:x}\r\n", chunk.len())
}

/// Encoded events in the order of their ids, one after another in one buffer, so that one write can take them all.
pub struct Run {
    framing: Framing,
    pub events: Vec<(Encoded, usize)>, // with the offset in `bytes` where it ends
    pub bytes: Vec<u8>,
}

impl Run {
    pub fn new(framing: Framing) -> Run {
        Run { framing, events: Vec::new(), bytes: Vec::new() }
    }

    /// The same events for peers of another framing.
    pub fn in_framing(&self, framing: Framing) -> Run {
        let mut run = Run::new(framing);
        self.events.iter().for_each(|(event, _)| run.push(event));
        run
    }

    pub fn push(&mut self, event: &Encoded) {
        self.bytes.extend_from_slice(event.bytes(self.framing));
        self.events.push((event.clone(), self.bytes.len()));
    }

    pub fn has_room_for(&self, event: &Encoded) -> bool {
        self.bytes.is_empty() || self.bytes.len() + event.bytes(self.framing).len() <= BATCH_BYTES
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
