//! A kept event, as it stands in its chain of cells: what must be known of it, its bytes in all of their forms, its
//! key.

use crate::cells::{Cells, Chain};
use crate::encoded::{Layout, Parts};
use crate::event::Id;
use std::ops::Range;

/// Bytes that a kept event costs beside its cells: its part of its topic's queue, which may be half empty.
const EVENT_OVERHEAD: usize = 8;
/// The same for its key: its part of the index, which may be half empty, too.
const KEY_OVERHEAD: usize = 64;
/// Of an [`Entry`] at the beginning of its chain: five numbers.
const ENTRY_BYTES: usize = 5 * 8;

/// An id and its moment.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    pub id: Id,
    pub moment_ms: u64,
}

/// What stands before the event's bytes. The event follows, and then its key.
#[derive(Clone, Copy)]
pub struct Entry {
    pub point: Point,
    pub layout: Layout,
    /// Bytes of the key; 0 where there is none.
    key: u32,
}

impl Entry {
    /// Copies an event into a chain of its own.
    pub fn keep(cells: &mut Cells, event: &Parts, key: &str, moment_ms: u64) -> (Entry, Chain) {
        let point = Point { id: event.id, moment_ms };
        let entry = Entry { point, layout: event.layout(), key: key.len() as u32 };
        let [fields, size, frame, end] = event.bytes();
        (entry, cells.insert(&[&entry.encode(), fields, size, frame, end, key.as_bytes()]))
    }

    /// Reads what stands at the beginning of a chain.
    pub fn of(cells: &Cells, chain: &Chain) -> Entry {
        let (numbers, _) = cells.first(chain).as_chunks();
        let number = |n: usize| u64::from_le_bytes(numbers[n]);
        let pair = |n: usize| [(number(n) >> 32) as u32, number(n) as u32];
        let ([chunk_at, frame_at], [length, key]) = (pair(3), pair(4));
        let point = Point { id: Id { ms: number(0), seq: number(1) }, moment_ms: number(2) };
        Entry { point, layout: Layout { chunk_at, frame_at, length }, key }
    }

    fn encode(&self) -> [u8; ENTRY_BYTES] {
        let Layout { chunk_at, frame_at, length } = self.layout;
        let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        let Point { id, moment_ms } = self.point;
        let numbers = [id.ms, id.seq, moment_ms, pair(chunk_at, frame_at), pair(length, self.key)];
        let mut bytes = [0; ENTRY_BYTES];
        bytes.as_chunks_mut().0.iter_mut().zip(numbers).for_each(|(place, number)| *place = number.to_le_bytes());
        bytes
    }

    /// Appends some of the event's bytes to `out`: a part of its layout.
    pub fn copy(cells: &Cells, chain: &Chain, part: Range<usize>, out: &mut Vec<u8>) {
        cells.copy(chain, ENTRY_BYTES + part.start, part.len(), out);
    }

    /// The key that it was published with, if any.
    pub fn key(&self, cells: &Cells, chain: &Chain) -> Option<String> {
        let (mut key, at) = (Vec::new(), self.layout.length as usize);
        Entry::copy(cells, chain, at..at + self.key as usize, &mut key);
        String::from_utf8(key).ok().filter(|key| !key.is_empty())
    }

    /// What it takes of memory.
    pub fn cost(&self) -> usize {
        let key = if self.key > 0 { KEY_OVERHEAD } else { 0 };
        Cells::memory(ENTRY_BYTES + self.layout.length as usize + self.key as usize) + EVENT_OVERHEAD + key
    }
}
