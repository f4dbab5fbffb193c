//! What topics may be called, alone and in lists.
//!
//! A name stands in paths, in lists with commas, in the columns of `/topics`, in logs and in the journal, and needs no
//! escaping in any of them. Every topic that comes from outside passes through here.

use crate::text::{invalid, quoted};
use std::io;

/// A name is kept for as long as it is in use.
const TOPIC_NAME_BYTES: usize = 128;
/// Most topics of one stream: each step of a replay looks at all of them. As many may be published to at once.
pub const TOPICS_AT_ONCE: usize = 64;
const _: () = assert!(TOPICS_AT_ONCE * (TOPIC_NAME_BYTES + 1) < 16 * 1024, "the longest list fits into a head");

/// Checks one name.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](io::ErrorKind::InvalidInput), with what a name is.
pub fn check_topic(name: &str) -> io::Result<()> {
    if (1..=TOPIC_NAME_BYTES).contains(&name.len()) && name.bytes().all(is_of_name) {
        return Ok(());
    }
    invalid(format!("{} is no topic name: that is 1 to {TOPIC_NAME_BYTES} of A-Z a-z 0-9 . _ ~ - : @", quoted(name)))
}

/// Whether a byte may stand in a name.
pub fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._~-:@".contains(&byte)
}

/// The names of a list with commas: see [`distinct`].
///
/// # Errors
/// As for [`check_topic`]; and where they are too many.
pub fn topic_names(list: &str) -> io::Result<Vec<String>> {
    distinct(list.split(','))
}

/// Names, each once: a topic that is named twice would get, or send, every event twice.
///
/// # Errors
/// As for [`check_topic`]; and where there are none, or too many.
pub fn distinct(list: impl IntoIterator<Item = impl AsRef<str>>) -> io::Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    for name in list {
        let name = name.as_ref();
        check_topic(name)?;
        if names.iter().any(|known| known == name) {
            continue;
        } else if names.len() == TOPICS_AT_ONCE {
            return invalid(format!("up to {TOPICS_AT_ONCE} topics are taken at once, and these are more"));
        }
        names.push(name.into());
    }
    if names.is_empty() { invalid("a topic's name is missing: at least one is taken") } else { Ok(names) }
}
