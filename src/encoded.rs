//! An event as it is kept, queued and written: encoded once, its bytes shared by all who get it.
//!
//! A stream goes out in chunks (RFC 9112 §7.1), so that its reader can tell its end from a cut, and each event from the
//! next; a peer of HTTP/1.0, which knows no chunks, gets the same bytes without them. An event is one chunk, made once:
//! what the journal says of it, the chunk's size, the frame and the chunk's end stand beside each other in one buffer,
//! and each form is a slice of it. Nobody changes a buffer once it is made.

use crate::event::Id;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Weak};

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

/// The bytes of an event that is published, before anybody shares them: what only the journal needs, the chunk's size, the
/// frame, the chunk's end.
pub struct Parts<'a> {
    pub id: Id,
    fields: &'a [u8],
    size: Cow<'a, [u8]>, // in hexadecimal, as RFC 9112 §7.1 has it
    frame: &'a [u8],
}

/// An event as it is queued and written: its bytes are shared, never copied per subscriber.
#[derive(Clone)]
pub struct Encoded {
    pub id: Id,
    pub layout: Layout,
    buffer: Arc<Vec<u8>>,
}

/// Where the forms of an event stand in its bytes, wherever these are.
#[derive(Clone, Copy)]
pub struct Layout {
    /// Where the chunk begins with its size line: `..chunk_at` are the journal's fields.
    pub chunk_at: u32,
    /// Where the frame begins, which is the event as the standard defines it.
    pub frame_at: u32,
    /// How many bytes there are.
    pub length: u32,
}

impl Layout {
    /// What goes out on the wire.
    pub fn wire(self, framing: Framing) -> Range<usize> {
        match framing {
            Framing::Chunked => self.chunk_at as usize..self.length as usize,
            Framing::Plain => self.frame_at as usize..self.length as usize - CHUNK_END.len(),
        }
    }

    /// What stands in the journal, which is an event stream without chunks: the fields, and the frame.
    pub fn block(self) -> [Range<usize>; 2] {
        [0..self.chunk_at as usize, self.wire(Framing::Plain)]
    }

    /// How many bytes of the journal that takes.
    pub fn block_len(self) -> usize {
        self.block().iter().map(ExactSizeIterator::len).sum()
    }
}

impl<'a> Parts<'a> {
    /// `fields` are what the journal says of it; without a journal, nothing.
    pub fn new(id: Id, fields: &'a [u8], frame: &'a [u8]) -> Parts<'a> {
        Parts { id, fields, size: size_line(frame).into_bytes().into(), frame }
    }

    pub fn layout(&self) -> Layout {
        let chunk_at = self.fields.len() as u32;
        let frame_at = chunk_at + self.size.len() as u32;
        Layout { chunk_at, frame_at, length: frame_at + (self.frame.len() + CHUNK_END.len()) as u32 }
    }

    /// All of its bytes, one part after another.
    pub fn bytes(&self) -> [&[u8]; 4] {
        [self.fields, &self.size, self.frame, CHUNK_END]
    }

    pub fn encode(&self) -> Encoded {
        Encoded { id: self.id, layout: self.layout(), buffer: Arc::new(self.bytes().concat()) }
    }
}

impl Encoded {
    /// As [`Parts::new`].
    pub fn new(id: Id, fields: &[u8], frame: &[u8]) -> Encoded {
        Parts::new(id, fields, frame).encode()
    }

    /// The same, as it is kept.
    pub fn parts(&self) -> Parts<'_> {
        let Layout { chunk_at, frame_at, .. } = self.layout;
        let [fields, frame] = self.block();
        Parts { id: self.id, fields, size: self.buffer[chunk_at as usize..frame_at as usize].into(), frame }
    }

    /// An event of which only the wire's bytes are there.
    fn of_wire(id: Id, wire: &[u8], framing: Framing) -> Encoded {
        let frame_at = match framing {
            Framing::Chunked => wire.iter().position(|b| *b == b'\n').map_or(0, |lf| lf + 1),
            Framing::Plain => 0,
        };
        let end = if framing == Framing::Chunked { CHUNK_END.len() } else { 0 };
        Encoded::new(id, b"", &wire[frame_at..wire.len() - end])
    }

    /// What goes out on the wire.
    pub fn bytes(&self, framing: Framing) -> &[u8] {
        &self.buffer[self.layout.wire(framing)]
    }

    /// What stands in the journal.
    pub fn block(&self) -> [&[u8]; 2] {
        self.layout.block().map(|part| &self.buffer[part])
    }

    /// What its bytes take of memory, counted once however many share them: budgets of memory go by this.
    pub fn memory(&self) -> usize {
        self.buffer.len()
    }
}

/// The events that readers who replay are in the middle of: where a thousand stop in the same one, its bytes are there
/// once.
#[derive(Default)]
pub struct Begun {
    events: BTreeMap<Id, Weak<Vec<u8>>>,
    /// How many there were when those that nobody holds any more were last taken out.
    counted: usize,
}

impl Begun {
    /// The same event, with the bytes that others hold already, if any do.
    pub fn share(&mut self, event: &Encoded) -> Encoded {
        if self.events.len() > 2 * self.counted {
            self.events.retain(|_, held| held.strong_count() > 0);
            self.counted = self.events.len().max(16);
        }
        match self.events.get(&event.id).and_then(Weak::upgrade) {
            Some(buffer) => Encoded { buffer, ..*event },
            None => {
                self.events.insert(event.id, Arc::downgrade(&event.buffer));
                event.clone()
            }
        }
    }
}

fn size_line(chunk: &[u8]) -> String {
    format!("{:x}\r\n", chunk.len())
}

/// Events in the order of their ids, one after another in one buffer, so that one write can send them all. Where that
/// write stops half-way, the offsets tell how many events are out whole.
pub struct Run {
    framing: Framing,
    /// Each event's id, with the offset in `bytes` where it ends.
    pub events: Vec<(Id, usize)>,
    /// All of them in this run's framing.
    pub bytes: Vec<u8>,
    /// The same events, where they came encoded: from a lane's queue, not from the history.
    encoded: Vec<Encoded>,
}

impl Run {
    pub fn new(framing: Framing) -> Run {
        Run { framing, events: Vec::new(), bytes: Vec::new(), encoded: Vec::new() }
    }

    /// The same events for peers of another framing. Copies them all, so it is made only where such a peer is there.
    pub fn in_framing(&self, framing: Framing) -> Run {
        let mut run = Run::new(framing);
        self.encoded.iter().for_each(|event| run.push(event));
        run
    }

    pub fn push(&mut self, event: &Encoded) {
        let framing = self.framing;
        self.append(event.id, |bytes| bytes.extend_from_slice(event.bytes(framing)));
        self.encoded.push(event.clone());
    }

    /// Adds the event that `copy` appends to the buffer, in this run's framing.
    pub fn append(&mut self, id: Id, copy: impl FnOnce(&mut Vec<u8>)) {
        copy(&mut self.bytes);
        self.events.push((id, self.bytes.len()));
    }

    /// Whether an event of this layout still fits into one write; an empty run takes any event, however large.
    pub fn has_room_for(&self, layout: Layout) -> bool {
        self.bytes.is_empty() || self.bytes.len() + layout.wire(self.framing).len() <= BATCH_BYTES
    }

    /// The event at `index`, for who has to remember it.
    pub fn event(&self, index: usize) -> Encoded {
        let copy = || {
            let (id, end) = self.events[index];
            Encoded::of_wire(id, &self.bytes[self.end_of(index)..end], self.framing)
        };
        self.encoded.get(index).cloned().unwrap_or_else(copy)
    }

    /// Where the first `count` events end.
    pub fn end_of(&self, count: usize) -> usize {
        if count == 0 { 0 } else { self.events[count - 1].1 }
    }

    /// The id of the last event; of an empty run, the lowest id.
    pub fn newest(&self) -> Id {
        self.events.last().map_or(Id::default(), |(id, _)| *id)
    }

    pub fn clear(&mut self) {
        self.events.clear();
        self.encoded.clear();
        self.bytes.clear();
        self.bytes.shrink_to(2 * BATCH_BYTES); // one event of 448 KiB must not stay for ever
    }
}
