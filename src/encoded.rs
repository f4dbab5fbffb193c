//! An event as it is kept, queued and written: encoded once, its bytes shared by all who get it.
//!
//! A stream goes out in chunks (RFC 9112 §7.1), so that its reader can tell its end from a cut, and each event from the
//! next; a peer of HTTP/1.0, which knows no chunks, gets the same bytes without them. An event is one chunk, made once:
//! what the journal says of it, the chunk's size, the frame and the chunk's end stand beside each other in one buffer,
//! and each form is a slice of it. Nobody changes a buffer once it is made.

use crate::event::Id;
use crate::form::Form;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// One write to a live subscriber takes at most this much, unless a single event is larger. Loopback buffers megabytes,
/// but a real link only about 65 kB: larger batches would push every distant subscriber behind.
pub const BATCH_BYTES: usize = 32 * 1024;
const _: () = assert!(BATCH_BYTES < 65_000, "a batch fits into the buffer of a real link");
/// What ends a chunk.
const CHUNK_END: &[u8] = b"\r\n";
/// The beginning of the next chunk's size, where a zero more means nothing (RFC 9112 §7.1). Once only, since some
/// clients count the digits of a size.
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

    /// What a peer that has gone answers with a reset, and one that still reads passes over. Lines without chunks have
    /// no such thing; there the next event asks.
    pub fn question(self) -> Vec<u8> {
        match (self.heartbeat(), self.framing) {
            (Some(heartbeat), _) => heartbeat,
            (None, Framing::Chunked) => LEADING_ZERO.into(),
            (None, Framing::Plain) => Vec::new(),
        }
    }

    /// The end of a stream, after a whole frame: why, when to come back, and after which id, if that is not the last
    /// one that was sent. Only an event stream has a place for these; other forms just end.
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

/// The bytes of an event that is published, before anybody shares them: what only the journal needs, the chunk's size,
/// the frame, the chunk's end.
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
        let size_len = wire.iter().position(|b| *b == b'\n').map_or(0, |lf| lf + 1);
        let frame = match framing {
            Framing::Chunked => &wire[size_len..wire.len() - CHUNK_END.len()],
            Framing::Plain => wire,
        };
        Encoded::new(id, b"", frame)
    }

    /// What goes out on the wire.
    pub fn bytes(&self, framing: Framing) -> &[u8] {
        &self.buffer[self.layout.wire(framing)]
    }

    /// What goes out on the wire to a stream of this shape. Other forms than the event stream are made here, each time.
    pub fn shaped(&self, shape: Shape, topic: Option<&str>) -> Cow<'_, [u8]> {
        match shape.form {
            Form::Events => self.bytes(shape.framing).into(),
            form => {
                let made = form.make(self.id, topic, &String::from_utf8_lossy(self.bytes(Framing::Plain)));
                shape.framing.wrap(made.as_bytes()).into()
            }
        }
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
    shape: Shape,
    /// Each event's id, with the offset in `bytes` where it ends.
    pub events: Vec<(Id, usize)>,
    /// All of them in this run's shape.
    pub bytes: Vec<u8>,
    /// The same events, where they came encoded: not straight from the history.
    encoded: Vec<Encoded>,
    /// The topic of the events from each of these indexes on.
    topics: Vec<(usize, Arc<str>)>,
}

impl Run {
    /// A run of event streams; other forms are made from it.
    pub fn new(framing: Framing) -> Run {
        Run::of(Shape { form: Form::Events, framing })
    }

    fn of(shape: Shape) -> Run {
        Run { shape, events: Vec::new(), bytes: Vec::new(), encoded: Vec::new(), topics: Vec::new() }
    }

    /// The same events for streams of another shape. Copies them all, so it is made only where somebody reads that.
    fn in_shape(&self, shape: Shape) -> Run {
        let mut run = Run::of(shape);
        (0..self.events.len()).for_each(|index| run.push(self.topic(index), &self.event(index)));
        run
    }

    pub fn push(&mut self, topic: &Arc<str>, event: &Encoded) {
        let shape = self.shape;
        self.append(topic, event.id, |bytes| bytes.extend_from_slice(&event.shaped(shape, Some(topic))));
        self.encoded.push(event.clone());
    }

    /// Adds the event that `copy` appends to the buffer, in this run's shape.
    pub fn append(&mut self, topic: &Arc<str>, id: Id, copy: impl FnOnce(&mut Vec<u8>)) {
        if self.topics.last().is_none_or(|(_, last)| !Arc::ptr_eq(last, topic)) {
            self.topics.push((self.events.len(), topic.clone()));
        }
        copy(&mut self.bytes);
        self.events.push((id, self.bytes.len()));
    }

    /// The topic of the event at `index`, which must be there.
    pub fn topic(&self, index: usize) -> &Arc<str> {
        let later = self.topics.partition_point(|(first, _)| *first <= index);
        &self.topics[later - 1].1
    }

    /// Whether an event of this layout still fits into one write; an empty run takes any event, however large.
    pub fn has_room_for(&self, layout: Layout) -> bool {
        self.bytes.is_empty() || self.bytes.len() + layout.wire(self.shape.framing).len() <= BATCH_BYTES
    }

    /// The event at `index`, for who has to remember it. Where it came from the history, it is cut out of the bytes:
    /// only event streams are copied straight from there.
    pub fn event(&self, index: usize) -> Encoded {
        let copy = || {
            let (id, end) = self.events[index];
            Encoded::of_wire(id, &self.bytes[self.end_of(index)..end], self.shape.framing)
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
        self.topics.clear();
        self.events.clear();
        self.encoded.clear();
        self.bytes.clear();
        self.bytes.shrink_to(2 * BATCH_BYTES); // one event of 448 KiB must not stay for ever
    }
}

/// A run in all shapes that somebody reads, each made when it is first asked for.
pub struct Shapes<'a> {
    usual: &'a Run,
    others: Vec<Run>,
}

impl Shapes<'_> {
    pub fn of(usual: &Run) -> Shapes<'_> {
        Shapes { usual, others: Vec::new() }
    }

    pub fn get(&mut self, shape: Shape) -> &Run {
        if shape == self.usual.shape {
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
