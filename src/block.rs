//! A block of the journal, which is a block of an event stream.
//!
//! Its first lines are fields that readers of event streams ignore, as the standard demands of unknown ones: the topic,
//! perhaps the key, and a checksum of everything else. Then come the very bytes that go out on the wire. A block
//! without data is a mark: it says up to which id a topic has forgotten; without a topic, it speaks of every topic that
//! is not in the file, and perhaps names the boot. An event that was published to several topics at once is one block,
//! with their names between commas and the first one's id; the others' ids follow on (`ids_from`). A block whose sum
//! does not fit is never taken: half-written bytes must not become an event.
//! <https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation>

use crate::encoded::Encoded;
use crate::event::{Id, ids_from};
use std::fmt::Write;
use std::io::{self, BufRead, Read};

/// A key may contain the word that a block begins with, so more than one beginning is tried; but each try costs a
/// checksum of the rest, and a damaged file may hold that word everywhere.
const TRIED_BEGINNINGS: usize = 4;

/// What a block of the journal says; its bytes stay where they were read.
pub struct Block<'a> {
    pub id: Id,
    /// The boot of the machine that the file was begun in (`journal.rs`).
    pub boot: Option<&'a str>,
    /// Several names, with commas between them, of an event that was published to all of them at once.
    pub topic: Option<&'a str>,
    pub key: Option<&'a str>,
    /// It has no data: everything up to its id is forgotten.
    pub is_mark: bool,
    /// Where the frame begins, after the fields of the journal.
    pub frame_at: usize,
}

/// What stands before it is sure to outlive the machine: all of a journal that was synced, since its server has ended
/// in order; of one that was not, the name (`journal.rs`). It forgets nothing: no event has an id this low.
pub fn sure_mark() -> Encoded {
    encode_block(Id::default(), &[], "id: 0-0\n\n")
}

impl Block<'_> {
    /// The highest id in it: the first one's, unless it is an event of several topics.
    pub fn newest(&self) -> Id {
        let others = self.topic.map_or(0, |names| names.bytes().filter(|byte| *byte == b',').count());
        ids_from(self.id).nth(others).unwrap_or(self.id)
    }

    /// Finds a good block at the end of damage, and where it begins. A block that has lost its blank line is read
    /// together with the next one. That next one is whole, so the last line `sum:` is its own, with its topic and
    /// perhaps its key just before.
    pub fn parse_after_damage(bytes: &[u8]) -> Option<(usize, Block<'_>)> {
        let sum_at = bytes.windows(6).rposition(|window| window == b"\nsum: ")? + 1;
        let line_before = |end: usize| bytes[..end - 1].iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        let above = line_before(sum_at);
        for start in [above, if above > 0 { line_before(above) } else { 0 }] {
            let lines = bytes[start..sum_at].windows(7).enumerate().rev();
            let begins = lines.filter(|(_, window)| *window == b"topic: ").take(TRIED_BEGINNINGS);
            let mut parsed = begins.map(|(at, _)| Some((start + at, Block::parse(&bytes[start + at..])?)));
            if let Some(found) = parsed.find_map(|found| found) {
                return Some(found);
            }
        }
        None
    }

    /// Reads a block with its blank line; `None` where its sum does not fit, or it could not be one of ours. The fuzzer
    /// has no use for sums.
    pub fn parse(bytes: &[u8]) -> Option<Block<'_>> {
        let text = str::from_utf8(bytes).ok()?;
        let (boot, rest) = field(text, "boot: ");
        let (topic, rest) = field(rest, "topic: ");
        let (key, rest) = field(rest, "key: ");
        let before_sum = text.len() - rest.len();
        let (sum, frame) = field(rest, "sum: ");
        if sum? != format!("{:08x}", crc32([&bytes[..before_sum], frame.as_bytes()])) && !cfg!(fuzzing) {
            return None;
        }
        let (id, is_mark, is_last) = id_of(frame)?;
        let frame_at = text.len() - frame.len();
        // Only a mark without a topic names the boot, and it has no key.
        let good = if topic.is_some() { boot.is_none() } else { is_mark && key.is_none() };
        let can_be_parted = is_last || topic.is_none_or(|names| !names.contains(','));
        let ids_may_follow = id.seq <= u64::MAX / 2; // as many as will ever be published
        Some(Block { id, boot, topic, key, is_mark, frame_at }).filter(|_| good && can_be_parted && ids_may_follow)
    }
}

/// The id of a frame, whether there is nothing else in it, and whether it is the last line, as in an event. Older
/// journals have it before the data.
fn id_of(frame: &str) -> Option<(Id, bool, bool)> {
    let (first, rest) = field(field(frame, "event: ").1, "id: ");
    let last = || frame.strip_suffix("\n\n")?.rsplit_once('\n')?.1.strip_prefix("id: ");
    let id = first.or_else(last)?.parse().ok()?;
    Some((id, first.is_some() && rest == "\n", first.is_none()))
}

/// A block of these fields, those that have a value, and this frame, with its sum.
pub fn encode_block(id: Id, fields: &[(&str, Option<&str>)], frame: &str) -> Encoded {
    let mut block = String::with_capacity(256); // the frame is not in it
    for (field, value) in fields {
        if let Some(value) = value {
            block.extend([field, ": ", value, "\n"]);
        }
    }
    let sum = crc32([block.as_bytes(), frame.as_bytes()]);
    let _ = writeln!(block, "sum: {sum:08x}");
    Encoded::new(id, block.as_bytes(), frame.as_bytes())
}

/// A mark: everything up to `id` is forgotten, of one topic, or of all that are not in the file.
pub fn mark(field: &str, value: Option<&str>, id: Id) -> Encoded {
    encode_block(id, &[(field, value)], &format!("id: {id}\n\n"))
}

/// Reads up to and with the next blank line, and returns how many bytes that was; `None` where the file ends before. Of
/// a block longer than `limit`, which is damage, only the last bytes stay in `block`: a good block may stand at their
/// end.
///
/// # Errors
/// The file cannot be read.
pub fn read_block(reader: &mut impl BufRead, block: &mut Vec<u8>, limit: usize) -> io::Result<Option<u64>> {
    block.clear();
    let (mut read, mut at_start) = (0, true);
    loop {
        let got = reader.take(64 * 1024).read_until(b'\n', block)?;
        let ended = block.ends_with(b"\n");
        read += got as u64;
        if got == 0 {
            return Ok(None);
        } else if at_start && ended && got == 1 {
            return Ok(Some(read));
        }
        at_start = ended;
        if block.len() > limit.saturating_add(limit / 4 + 64 * 1024) {
            block.drain(..block.len() - limit); // some more at once: moving the rest each time takes for ever
        }
    }
}

/// Whether these bytes are what a dying process leaves of a block: its beginning, up to any byte, and nothing else.
/// What else stands at the end of a journal was written over; NUL, which a lost page reads as, is taken for that, too.
pub fn is_torn_block(bytes: &[u8]) -> bool {
    const FIELDS: [&str; 8] = ["boot: ", "topic: ", "key: ", "sum: ", "event: ", "data: ", "retry: ", "id: "];
    let text = match str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => &String::from_utf8_lossy(&bytes[..error.valid_up_to()]),
        Err(_) => return false,
    };
    let mut next = 0; // the fields stand in this order; only data may stand on several lines
    for line in text.split('\n') {
        let fits = |field: &&str| line.starts_with(*field) || field.starts_with(line);
        let Some(found) = FIELDS[next..].iter().position(fits).map(|at| next + at) else { return line.is_empty() };
        let is_repeatable = FIELDS[found] == "data: ";
        next = if is_repeatable { found } else { found + 1 };
    }
    !text.contains('\0')
}

/// Takes a line of this field from the beginning of `text`, if it is there.
pub fn field<'a>(text: &'a str, name: &str) -> (Option<&'a str>, &'a str) {
    let line = text.strip_prefix(name).and_then(|rest| rest.split_once('\n'));
    line.map_or((None, text), |(value, rest)| (Some(value), rest))
}

/// The checksum of zip, PNG and Ethernet (CRC-32), over both parts as one. It finds accidents, not forgeries.
pub fn crc32(parts: [&[u8]; 2]) -> u32 {
    let step = |sum: u32, byte: &u8| CRC_TABLE[usize::from(sum as u8 ^ byte)] ^ (sum >> 8);
    !parts.into_iter().flatten().fold(!0, step)
}

/// What eight steps of the division make of each byte, computed by the compiler.
const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 * 8 {
        let entry = if n % 8 == 0 { n as u32 / 8 } else { table[n / 8] };
        table[n / 8] = (entry >> 1) ^ (0xEDB8_8320 * (entry & 1));
        n += 1;
    }
    table
};
