//! What a disk holds of one file, and what a crash may leave of it.

use crate::common::Random;

/// How much of what is not sure has reached the disk.
#[derive(Clone, Copy, Debug)]
pub enum Reached {
    Nothing,
    Everything,
    /// Each thing by itself.
    Some,
}

#[derive(Clone)]
pub struct File {
    /// As processes see it.
    pub bytes: Vec<u8>,
    block_bytes: usize,
    length: Versions<usize>,
    /// Where one is shorter than a block, zeros follow.
    blocks: Vec<Versions<Vec<u8>>>,
}

impl File {
    pub fn holding(bytes: Vec<u8>, block_bytes: usize) -> File {
        let blocks = bytes.chunks(block_bytes).map(|block| Versions::sure(block.to_vec())).collect();
        File { length: Versions::sure(bytes.len()), blocks, bytes, block_bytes }
    }

    pub fn write(&mut self, at: usize, bytes: &[u8], time: u64) {
        let from = at.min(self.bytes.len());
        self.bytes.resize(self.bytes.len().max(at + bytes.len()), 0);
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.change(from, at + bytes.len(), time);
    }

    pub fn cut(&mut self, length: usize, time: u64) {
        let (from, to) = (self.bytes.len().min(length), self.bytes.len().max(length));
        let cut = self.blocks.get(from / self.block_bytes).is_some_and(Versions::is_given_up);
        self.bytes.resize(length, 0);
        if from < to {
            self.change(from, to, time);
        }
        if cut {
            self.blocks[from / self.block_bytes].give_up(time); // cutting writes no data
        }
    }

    fn change(&mut self, from: usize, to: usize, time: u64) {
        for at in from / self.block_bytes..to.div_ceil(self.block_bytes) {
            if self.blocks.len() <= at {
                self.blocks.resize(at + 1, Versions::sure(Vec::new()));
            }
            let end = self.bytes.len().min((at + 1) * self.block_bytes);
            self.blocks[at].change(time, self.bytes.get(at * self.block_bytes..end).unwrap_or_default().to_vec());
        }
        if *self.length.seen() != self.bytes.len() {
            self.length.change(time, self.bytes.len());
        }
    }

    /// A sync that began then has succeeded.
    pub fn sync(&mut self, began: u64) {
        self.length.sync(began);
        self.blocks.iter_mut().for_each(|block| block.sync(began));
    }

    /// A sync that began then has failed: what the kernel could not write, it gives up, or keeps for the next one.
    pub fn give_up(&mut self, began: u64, mut is_given_up: impl FnMut() -> bool) {
        if is_given_up() {
            self.length.give_up(began);
        }
        self.blocks.iter_mut().filter(|_| is_given_up()).for_each(|block| block.give_up(began));
    }

    pub fn after_power_loss(&self, reached: Reached, random: &mut Random) -> File {
        let (one, other) = self.length.two(reached, random);
        let length = one.min(other) + random.below(one.abs_diff(other) + 1);
        let mut bytes = Vec::new();
        for versions in &self.blocks {
            let (mut older, mut newer) = versions.two(reached, random);
            older.resize(self.block_bytes, 0);
            newer.resize(self.block_bytes, 0);
            let torn_at = random.below(self.block_bytes + 1);
            bytes.extend_from_slice(&newer[..torn_at]);
            bytes.extend_from_slice(&older[torn_at..]);
        }
        bytes.resize(length, 0);
        File::holding(bytes, self.block_bytes)
    }

    /// The kernel has used the memory of what is clean for something else, and reads it from the disk again.
    pub fn read_again(&mut self, random: &mut Random) {
        for (block, seen) in self.blocks.iter_mut().zip(self.bytes.chunks_mut(self.block_bytes)) {
            if block.is_given_up() {
                let mut found = block.two(Reached::Some, random).0;
                *block = Versions::sure(found.clone());
                found.resize(seen.len(), 0);
                seen.copy_from_slice(&found);
            }
        }
    }

    pub fn describe(&self) -> String {
        let lengths: Vec<usize> = self.length.all.iter().map(|(_, length)| *length).collect();
        let of = |is: fn(&Versions<Vec<u8>>) -> bool| {
            let blocks = self.blocks.iter().enumerate().filter(|(_, block)| is(block));
            blocks.map(|(at, _)| at).collect::<Vec<_>>()
        };
        let (dirty, given_up) = (of(Versions::is_dirty), of(Versions::is_given_up));
        format!(
            "{} bytes, on the disk one of {lengths:?}; blocks dirty {dirty:?}, given up {given_up:?}",
            self.bytes.len()
        )
    }
}

/// What of something may be on the disk: the first is, if nothing newer is. The last is what processes see.
#[derive(Clone)]
struct Versions<T> {
    all: Vec<(u64, T)>,
    /// So many of them no sync will write any more.
    clean: usize,
}

impl<T: Clone> Versions<T> {
    fn sure(value: T) -> Versions<T> {
        Versions { all: vec![(0, value)], clean: 1 }
    }

    fn seen(&self) -> &T {
        &self.all.last().expect("there is always one").1
    }

    fn change(&mut self, time: u64, value: T) {
        self.all.push((time, value));
    }

    fn until(&self, time: u64) -> usize {
        self.all.iter().take_while(|(of, _)| *of <= time).count()
    }

    fn sync(&mut self, began: u64) {
        let written = self.until(began);
        if written > self.clean {
            self.all.drain(..written - 1);
            self.clean = 1;
        }
    }

    fn give_up(&mut self, began: u64) {
        self.clean = self.clean.max(self.until(began));
    }

    fn is_dirty(&self) -> bool {
        self.clean < self.all.len()
    }

    /// It is as good as written for the kernel, and may not be.
    fn is_given_up(&self) -> bool {
        !self.is_dirty() && self.all.len() > 1
    }

    /// Two that the disk may hold, the older one first.
    fn two(&self, reached: Reached, random: &mut Random) -> (T, T) {
        let mut pick = || match reached {
            Reached::Nothing => 0,
            Reached::Everything => self.all.len() - 1,
            Reached::Some => random.below(self.all.len()),
        };
        let (one, other) = (pick(), pick());
        (self.all[one.min(other)].1.clone(), self.all[one.max(other)].1.clone())
    }
}

/// The model's own laws, on an `A` that is synced and a `B` after it that is not.
mod tests {
    use super::*;

    const BLOCK: usize = 4;

    fn a_and_b() -> File {
        let mut file = File::holding(Vec::new(), BLOCK);
        file.write(0, b"AAAA", 1);
        file.sync(1);
        file.write(4, b"BBBBBBBB", 2);
        file
    }

    fn left(file: &File) -> std::collections::BTreeSet<Vec<u8>> {
        (1..2_000).map(|seed| file.after_power_loss(Reached::Some, &mut Random(seed * 0x9E37_79B9)).bytes).collect()
    }

    #[test]
    fn what_is_not_synced_is_dropped_torn_at_any_byte_zeroed_or_there_and_what_is_stays() {
        let found = left(&a_and_b());
        for expected in [&b"AAAA"[..], b"AAAAB", b"AAAABBBBBB", b"AAAABBBBBBBB", b"AAAA\0\0\0\0BBBB", b"AAAABB\0\0"] {
            assert!(found.contains(expected), "{:?}", String::from_utf8_lossy(expected));
        }
        assert!(found.iter().all(|bytes| bytes.starts_with(b"AAAA")));
    }

    #[test]
    fn what_a_failed_sync_gave_up_no_later_one_writes_unless_it_is_written_again() {
        let mut file = a_and_b();
        file.give_up(2, || true);
        file.write(12, b"CC", 3);
        file.sync(3);
        let found = left(&file);
        assert!(file.bytes.starts_with(b"AAAABBBBBBBBCC"), "it can be read");
        assert!(found.contains(&b"AAAA\0\0\0\0\0\0\0\0CC"[..]) && found.contains(&b"AAAABBBBBBBBCC"[..]));
        file.write(4, b"BBBBBBBB", 4);
        file.sync(4);
        assert_eq!(left(&file).into_iter().collect::<Vec<_>>(), [b"AAAABBBBBBBBCC"]);
    }

    #[test]
    fn a_sync_covers_what_was_written_before_it_began() {
        let mut file = a_and_b();
        file.sync(1);
        assert!(left(&file).len() > 10);
        file.sync(2);
        assert_eq!(left(&file).len(), 1);
    }
}
