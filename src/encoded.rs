//! An event as it is kept, queued and written: encoded once, its bytes shared by all who get it.
//!
//! A stream goes out in chunks (RFC 9112 §7.1), so that its reader can tell its end from a cut, and each event from the
//! next; a peer of HTTP/1.0, which knows no chunks, gets the same bytes without them. An event is one chunk, made once:
//! what the journal says of it, the chunk's size, the frame and the chunk's end stand beside each other in one buffer,
//! and each form is a slice of it. Nobody changes a buffer once it is made.

use crate::event::Id;
use std::sync::Arc;

/// One write to a live subscriber takes at most this much, unless a single event is larger. Loopback buffers megabytes,
/// but a real link only about 65 kB: larger batches would push every distant subscriber behind.
pub const BATCH_BYTES: usize = 32 * 1024;
const _: () = assert!(BATCH_BYTES < 65_000, "a batch fits into the buffer of a real link");
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
    /// Some bytes of a stream, in this framing. Must never be called with none: an empty chunk would end the stream.
    pub fn wrap(self, frame: &[u8]) -> Vec<u8> {
        match self {
            Framing::Chunked => [size_line(frame).as_bytes(), frame, CHUNK_END].concat(),
            Framing::Plain => frame.to_vec(),
        }
    }

    /// What ends a stream after a whole frame. A stream that ends without it was cut, and curl says so (exit code 18).
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
    /// Where the chunk begins with its size line: `..chunk_at` are the journal's fields.
    chunk_at: usize,
    /// Where the frame begins, which is the event as the standard defines it.
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

    /// How many bytes of the journal it takes.
    pub fn block_len(&self) -> usize {
        self.block().iter().map(|part| part.len()).sum()
    }

    /// What its bytes take of memory, counted once however many share them: budgets of memory go by this.
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

/// Encoded events in the order of their ids, one after another in one buffer, so that one write can send them all.
/// Where that write stops half-way, the offsets tell how many events are out whole.
pub struct Run {
    framing: Framing,
    /// Each with the offset in `bytes` where it ends.
    pub events: Vec<(Encoded, usize)>,
    /// All of them in this run's framing.
    pub bytes: Vec<u8>,
}

impl Run {
    pub fn new(framing: Framing) -> Run {
        Run { framing, events: Vec::new(), bytes: Vec::new() }
    }

    /// The same events for peers of another framing. Copies them all, so it is made only where such a peer is there.
    pub fn in_framing(&self, framing: Framing) -> Run {
        let mut run = Run::new(framing);
        self.events.iter().for_each(|(event, _)| run.push(event));
        run
    }

    pub fn push(&mut self, event: &Encoded) {
        self.bytes.extend_from_slice(event.bytes(self.framing));
        self.events.push((event.clone(), self.bytes.len()));
    }

    /// Whether the event still fits into one write; an empty run takes any event, however large.
    pub fn has_room_for(&self, event: &Encoded) -> bool {
        self.bytes.is_empty() || self.bytes.len() + event.bytes(self.framing).len() <= BATCH_BYTES
    }

    /// Where the first `count` events end.
    pub fn end_of(&self, count: usize) -> usize {
        if count == 0 { 0 } else { self.events[count - 1].1 }
    }

    /// The id of the last event; of an empty run, the lowest id.
    pub fn newest(&self) -> Id {
        self.events.last().map_or(Id::default(), |(event, _)| event.id)
    }

    pub fn clear(&mut self) {
        self.events.clear();
        self.bytes.clear();
        self.bytes.shrink_to(2 * BATCH_BYTES); // one event of 448 KiB must not stay for ever
    }
}
