//! Where the bytes of kept events are: one buffer, in cells of one size.
//!
//! What is kept lives long, and every publisher brings it. Allocated one by one, kept bytes lie in the memory of all
//! the threads that have published (malloc gives them arenas of their own), with holes between them that no other
//! thread uses: ten times what is kept, after publishers that came in turn. So the bytes are copied into this one
//! buffer. An event is a chain of cells, anywhere in it, so that a free cell fits every event, whatever was there
//! before. Where too many cells are free, the last ones move to the free places, and the buffer is cut off behind them.
//! So it is never much larger than what is in it, and the system has the rest back.
//!
//! A large buffer is memory that malloc maps by itself: it is cut in place, and what was never touched of it takes no
//! memory. So the buffer has its whole size at once, as address space, which nobody else can use up then.

use std::ops::Range;

/// Bytes in each cell: two cache lines. A small event fits into one, and of the last cell half is lost on average,
/// whatever the event's size.
const ROOM: usize = 128;
/// Stands where no cell follows.
const NONE: u32 = u32::MAX;
/// So many cells may be free, and a sixteenth of those in use: else publishing would grow and cut the buffer all the
/// time.
const FREE_CELLS: usize = 2 * 1024;
/// The buffer is cut where so much was used behind its end (1 MiB), or a sixteenth. Where there is no room for all of
/// it at once, it grows by as much.
const STEP_CELLS: usize = 8 * 1024;
/// What a cell takes with its link.
const CELL_BYTES: usize = ROOM + size_of::<Link>();
/// More cannot be numbered: some 500 GiB.
pub const MOST_BYTES: usize = CELL_BYTES.saturating_mul(NONE as usize - 1);

/// What stands before and after a cell.
#[derive(Clone, Copy)]
struct Link {
    before: Before,
    /// The next cell of the chain, or of the free ones.
    next: u32,
}

/// What stands before a cell, and so names it.
#[derive(Clone, Copy)]
enum Before {
    /// It is the first of this chain.
    Chain(u32),
    /// The one before it in its chain.
    Cell(u32),
    /// It is free; the free one before it, or `NONE`.
    Free(u32),
}

/// A place in a chain: so many bytes behind the beginning of this cell.
struct Place {
    cell: u32,
    at: usize,
}

/// Bytes in [`Cells`], until they are removed. Its number stays while its cells move.
pub struct Chain(u32);

pub struct Cells {
    cells: Vec<[u8; ROOM]>,
    /// One for each cell. Apart from the cells, so that the bytes of neighbours stand together: most chains are
    /// neighbours.
    links: Vec<Link>,
    /// The first cell of each chain; where a number is not in use, the next such number.
    firsts: Vec<u32>,
    /// The first of the numbers that are not in use, or `NONE`.
    free_number: u32,
    /// The first free cell, or `NONE`.
    free: u32,
    free_count: usize,
    /// So many cells have room at once.
    most: usize,
    /// So many have been used since the buffer was last cut: they are in memory.
    touched: usize,
}

impl Cells {
    /// Room for about so many bytes.
    pub fn new(bytes: usize) -> Cells {
        let most = bytes / CELL_BYTES / 16 * 17 + STEP_CELLS;
        let (cells, links, firsts) = (Vec::new(), Vec::new(), Vec::new());
        let mut all = Cells { cells, links, firsts, free_number: NONE, free: NONE, free_count: 0, most, touched: 0 };
        all.cut();
        all
    }

    /// What a chain of so many bytes takes of memory, with its number.
    pub fn memory(length: usize) -> usize {
        length.div_ceil(ROOM).max(1) * CELL_BYTES + size_of::<u32>()
    }

    /// What the buffer takes of memory, with what is free in it.
    #[cfg(test)]
    pub fn taken(&self) -> usize {
        self.touched * CELL_BYTES + self.firsts.capacity() * size_of::<u32>()
    }

    /// Copies these bytes, one part after the other, into a new chain.
    pub fn insert(&mut self, parts: &[&[u8]]) -> Chain {
        let number = self.take_number();
        let first = self.take(Before::Chain(number));
        self.firsts[number as usize] = first;
        let (mut last, length) = (first, parts.iter().map(|part| part.len()).sum::<usize>());
        for _ in 1..length.div_ceil(ROOM) {
            let next = self.take(Before::Cell(last));
            self.link(last).next = next;
            last = next;
        }
        let mut place = Place { cell: first, at: 0 };
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() {
                let range = self.together(&mut place, rest.len());
                let (now, later) = rest.split_at(range.len());
                self.cells.as_flattened_mut()[range].copy_from_slice(now);
                rest = later;
            }
        }
        Chain(number)
    }

    /// The first bytes of a chain, without copying them. What stands behind its end means nothing.
    pub fn first(&self, chain: &Chain) -> &[u8; ROOM] {
        &self.cells[self.firsts[chain.0 as usize] as usize]
    }

    /// Appends the `count` bytes of a chain from `start` on to `out`.
    pub fn copy(&self, chain: &Chain, start: usize, count: usize, out: &mut Vec<u8>) {
        let mut place = Place { cell: self.firsts[chain.0 as usize], at: start };
        let mut left = count;
        out.reserve(count);
        while left > 0 {
            let range = self.together(&mut place, left);
            left -= range.len();
            out.extend_from_slice(&self.cells.as_flattened()[range]);
        }
    }

    /// Where bytes of a chain stand together from a place on, at most `most` of them. The place moves behind them;
    /// there must be some.
    fn together(&self, place: &mut Place, most: usize) -> Range<usize> {
        while place.at >= ROOM {
            *place = Place { cell: self.links[place.cell as usize].next, at: place.at - ROOM };
        }
        let start = place.cell as usize * ROOM + place.at;
        let mut end = start - place.at + ROOM;
        while end < start + most && self.links[place.cell as usize].next == place.cell + 1 {
            place.cell += 1;
            end += ROOM;
        }
        place.at = ROOM - end.saturating_sub(start + most);
        start..end.min(start + most)
    }

    /// Forgets a chain. Its cells are free, or the system's.
    pub fn remove(&mut self, chain: Chain) {
        let first = std::mem::replace(&mut self.firsts[chain.0 as usize], self.free_number);
        self.free_number = chain.0;
        // In the same order, before those that are free already: so neighbours stay neighbours.
        let (mut last, mut cell) = (NONE, first);
        while cell != NONE {
            self.link(cell).before = Before::Free(last);
            self.free_count += 1;
            (last, cell) = (cell, self.link(cell).next);
        }
        self.link(last).next = self.free;
        if self.free != NONE {
            self.link(self.free).before = Before::Free(last);
        }
        self.free = first;
        self.shrink();
    }

    fn link(&mut self, number: u32) -> &mut Link {
        &mut self.links[number as usize]
    }

    fn take_number(&mut self) -> u32 {
        if self.free_number == NONE {
            self.firsts.push(NONE);
            return self.firsts.len() as u32 - 1;
        }
        let number = self.free_number;
        self.free_number = self.firsts[number as usize];
        number
    }

    /// A cell that is the last of its chain, for now.
    fn take(&mut self, before: Before) -> u32 {
        if self.free != NONE {
            let number = self.free;
            self.unlink(number);
            *self.link(number) = Link { before, next: NONE };
            return number;
        }
        if self.cells.len() == self.cells.capacity() {
            let step = STEP_CELLS.max(self.cells.len() / 16);
            self.cells.reserve_exact(step);
            self.links.reserve_exact(step);
        }
        self.cells.push([0; ROOM]);
        self.links.push(Link { before, next: NONE });
        self.touched = self.touched.max(self.cells.len());
        self.cells.len() as u32 - 1
    }

    /// Takes a cell out of the free ones.
    fn unlink(&mut self, number: u32) {
        let Link { before: Before::Free(before), next } = *self.link(number) else { return };
        match before {
            NONE => self.free = next,
            _ => self.link(before).next = next,
        }
        if next != NONE {
            self.link(next).before = Before::Free(before);
        }
        self.free_count -= 1;
    }

    /// Moves cells from the end to where others are free, one for each that was freed too many, and gives the end back.
    fn shrink(&mut self) {
        while self.free_count > FREE_CELLS + (self.cells.len() - self.free_count) / 16 {
            let last = self.cells.len() as u32 - 1;
            self.unlink(last); // if it is free
            let moved = *self.link(last);
            if !matches!(moved.before, Before::Free(_)) {
                let to = self.free;
                self.unlink(to);
                *self.link(to) = moved;
                self.cells[to as usize] = self.cells[last as usize];
                match moved.before {
                    Before::Chain(number) => self.firsts[number as usize] = to,
                    Before::Cell(before) | Before::Free(before) => self.link(before).next = to,
                }
                if moved.next != NONE {
                    self.link(moved.next).before = Before::Cell(to);
                }
            }
            self.cells.pop();
            self.links.pop();
        }
        if self.touched > self.cells.len() + STEP_CELLS.max(self.cells.len() / 16) {
            self.cut();
        }
    }

    /// Gives the system back what was used behind the end, and takes the address space for all again. Where it is not
    /// to be had, the buffer grows step by step.
    fn cut(&mut self) {
        let least = self.cells.len().max(1); // given back whole, it would count for malloc as a usual size
        let more = self.most.saturating_sub(self.cells.len());
        self.cells.shrink_to(least);
        self.links.shrink_to(least);
        self.touched = self.cells.len();
        let _ = self.cells.try_reserve_exact(more).and_then(|()| self.links.try_reserve_exact(more));
    }
}
