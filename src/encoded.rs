//! An event as it is kept, queued and written: encoded once, its bytes shared by all who get it.
//!
//! A stream goes out in chunks (RFC 9112 §7.1), so that its reader can tell its end from a cut, and each event from the
//! next; a peer of HTTP/1.0, which knows no chunks, gets the same bytes without them. An event is one chunk, made once:
//! what the journal says of it, the chunk's size, the frame and the chunk's end stand beside each other in one buffer,
//! and each form is a slice of it. Nobody changes a buffer once it is made.

use crate::event::Id;
use crate::form::Form;
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

/// One write to a live subscriber takes at most this much, unless a single event is larger. Loopback buffers megabytes,
/// but a real link only about 65 kB: larger batches would push every distant subscriber behind.
pub const BATCH_BYTES: usize = 32 * 1024;
const _: () = assert!(BATCH_BYTES < 65_000, "a batch fits into the buffer of a real link");
/// What ends a chunk.
const CHUNK_END: &[u8] = b"\r\n";
/// The beginning of the next chunk's size, where a zero more means nothing (RFC 9112 §7.1). Once only, since some clients
/// count the digits of a size.
const LEADING_ZERO: &[u8] = b"0";

/// How the bytes of a stream stand on its connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// In chunks, of which an empty one is the last (RFC 9112 §7.1).
    Chunked,
    /// As they are, up to the end of the connection: for HTTP/1.0.
    Plain,
}

/// How a stream goes out: what its events look like, and how their bytes stand on the connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub form: Form,
    pub framing: Framing,
}

impl Shape {
    /// Almost everybody's, for which an event's bytes are a slice of its buffer.
    pub const USUAL: Shape = Shape { form: Form::Events, framing: Framing::Chunked };

    /// What keeps a silent stream open, in forms that have that.
    pub fn heartbeat(self) -> Option<Vec<u8>> {
        self.form.heartbeat().map(|text| self.framing.wrap(text.as_bytes()))
    }

    /// What a peer that has gone answers with a reset, and one that still reads passes over. Lines without chunks have no
    /// such thing; there the next event asks.
    pub fn question(self) -> Vec<u8> {
        match (self.heartbeat(), self.framing) {
            (Some(heartbeat), _) => heartbeat,
            (None, Framing::Chunked) => LEADING_ZERO.into(),
            (None, Framing::Plain) => Vec::new(),
        }
    }

    /// The end of a stream, after a whole frame: why, when to come back, and after which id, if that is not the last one
    /// that was sent. Only an event stream has a place for these; other forms just end.
    pub fn end(self, why: &str, retry: Duration, id: Option<Id>) -> Vec<u8> {
        let id = id.map_or(String::new(), |id| format!("id: {id}\n"));
        let block = format!(": {why}\nretry: {}\n{id}\n", retry.as_millis());
        let last = if self.form == Form::Events { self.framing.wrap(block.as_bytes()) } else { Vec::new() };
        [&last, self.framing.end()].concat()
    }
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
        let size = size_line(frame); // in hexadecimal, as RFC 9112 §7.1 has it
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

    /// What goes out on the wire to a stream of this shape. Other forms than the event stream are made here, each time.
    pub fn shaped(&self, shape: Shape, topic: Option<&str>) -> Cow<'_, [u8]> {
        match shape.form {
            Form::Events => self.bytes(shape.framing).into(),
            form => {
                let made = form.make(self.id, topic, &String::from_utf8_lossy(self.frame()));
                shape.framing.wrap(made.as_bytes()).into()
            }
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
    shape: Shape,
    /// Each with the offset in `bytes` where it ends.
    pub events: Vec<(Encoded, usize)>,
    /// All of them in this run's shape.
    pub bytes: Vec<u8>,
    /// The topic of the events from each of these indexes on.
    topics: Vec<(usize, Arc<str>)>,
}

impl Run {
    /// A run of the usual shape; others are made from it.
    pub fn new() -> Run {
        Run { shape: Shape::USUAL, events: Vec::new(), bytes: Vec::new(), topics: Vec::new() }
    }

    /// The same events for streams of another shape. Copies them all, so it is made only where somebody reads that.
    pub fn in_shape(&self, shape: Shape) -> Run {
        let mut run = Run { shape, ..Run::new() };
        for (index, (event, _)) in self.events.iter().enumerate() {
            run.push(self.topic(index), event);
        }
        run
    }

    pub fn push(&mut self, topic: &Arc<str>, event: &Encoded) {
        if self.topics.last().is_none_or(|(_, last)| !Arc::ptr_eq(last, topic)) {
            self.topics.push((self.events.len(), topic.clone()));
        }
        self.bytes.extend_from_slice(&event.shaped(self.shape, Some(topic)));
        self.events.push((event.clone(), self.bytes.len()));
    }

    /// The topic of the event at this index, which must be there.
    pub fn topic(&self, index: usize) -> &Arc<str> {
        let later = self.topics.partition_point(|(first, _)| *first <= index);
        &self.topics[later - 1].1
    }

    /// Whether the event still fits into one write; an empty run takes any event, however large.
    pub fn has_room_for(&self, event: &Encoded) -> bool {
        self.bytes.is_empty() || self.bytes.len() + event.bytes(Framing::Chunked).len() <= BATCH_BYTES
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
        self.topics.clear();
        self.events.clear();
        self.bytes.clear();
        self.bytes.shrink_to(2 * BATCH_BYTES); // one event of 448 KiB must not stay for ever
    }
}

/// A batch's run in all shapes that somebody reads, each made when it is first asked for.
pub struct Shapes<'a> {
    usual: &'a Run,
    others: Vec<Run>,
}

impl Shapes<'_> {
    pub fn of(usual: &Run) -> Shapes<'_> {
        Shapes { usual, others: Vec::new() }
    }

    pub fn get(&mut self, shape: Shape) -> &Run {
        if shape == Shape::USUAL {
            return self.usual;
        }
        let made = self.others.iter().position(|run| run.shape == shape);
        let index = made.unwrap_or_else(|| {
            self.others.push(self.usual.in_shape(shape));
            self.others.len() - 1
        });
        &self.others[index]
    }
}
