//! Which token may do what with which topics, as a file says it.
//!
//! One right a line: a token, `publish`, `subscribe` or `both`, topics with commas between them (names, or beginnings
//! that end in `*`), and perhaps `until=` with the Unix time in seconds at which it is over. A token may have several
//! lines. Errors name the line and never show what is in it: the word that stands where it should not may be a token.
//!
//! Nothing here takes longer where more of a token is right. Tokens are found by a hash whose key nobody knows, and
//! compared in constant time only with those of the same hash.

use crate::config::Token;
use crate::names::{check_topic, is_of_name};
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::time::{SystemTime, UNIX_EPOCH};

/// What stands for all topics. It is no name, so only a right to all of them covers it.
pub const ALL: &str = "*";

/// What a right is to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// To publish, and so to delete.
    Publish,
    Subscribe,
}

/// What a stream was opened with, so that it can be judged again.
pub struct Pass {
    pub tokens: Vec<String>,
    pub topics: Vec<String>,
}

/// All rights of a file.
#[derive(Default)]
pub struct Rights {
    by_hash: HashMap<u64, Vec<Right>>,
    hasher: RandomState,
    /// When rights are over, in rising order.
    ends: Vec<u64>,
}

struct Right {
    token: Token,
    acts: &'static [Act],
    topics: Box<[Topics]>,
    /// In seconds of Unix time.
    until: Option<u64>,
}

enum Topics {
    Named(String),
    Beginning(String),
}

impl Rights {
    /// Reads a whole file.
    ///
    /// # Errors
    /// The first line that cannot be understood, and what would be right. A last line without its LF is one, too: the
    /// file may be half written, and half a name is another name.
    pub fn parse(text: &str) -> Result<Rights, String> {
        let mut rights = Rights::default();
        for (line, number) in text.split_inclusive('\n').zip(1..) {
            let at = |what: String| format!("line {number}: {what}");
            if !line.ends_with('\n') {
                return Err(at("its end is missing: end each line with LF".into()));
            }
            let words: Vec<&str> = line.split_whitespace().collect();
            if words.first().is_none_or(|first| first.starts_with('#')) {
                continue;
            }
            let right = Right::parse(&words).map_err(at)?;
            rights.ends.extend(right.until);
            let hash = rights.hasher.hash_one(words[0]);
            // Mostly it is the only one; by itself a list begins with room for four.
            rights.by_hash.entry(hash).or_insert_with(|| Vec::with_capacity(1)).push(right);
        }
        rights.ends.sort_unstable();
        Ok(rights)
    }

    /// Whether these tokens together have the right to all of these topics now.
    pub fn allow(&self, act: Act, tokens: &[String], topics: &[String]) -> bool {
        let now = unix_time();
        let of_token = |presented: &String| {
            let candidates = self.by_hash.get(&self.hasher.hash_one(presented.as_str()));
            candidates.into_iter().flatten().filter(|right| right.token.is(presented)).collect::<Vec<_>>()
        };
        let holds = |right: &&Right| right.acts.contains(&act) && right.until.is_none_or(|until| now < until);
        let rights: Vec<&Right> = tokens.iter().flat_map(of_token).filter(holds).collect();
        topics.iter().all(|name| rights.iter().any(|right| right.topics.iter().any(|topics| topics.cover(name))))
    }

    /// Whether any right has ended after `before`, up to `now`.
    pub fn has_ended_between(&self, before: u64, now: u64) -> bool {
        let first = self.ends.partition_point(|end| *end <= before);
        self.ends.get(first).is_some_and(|end| *end <= now)
    }

    /// How many tokens there are, for the log.
    pub fn count(&self) -> usize {
        self.by_hash.len()
    }
}

impl Right {
    fn parse(words: &[&str]) -> Result<Right, String> {
        let (token, act, topics, until) = match words {
            [token, act, topics] => (token, act, topics, None),
            [token, act, topics, until] => (token, act, topics, Some(until)),
            _ => {
                let count = words.len();
                return Err(format!(
                    "{count} words, where TOKEN publish|subscribe|both TOPICS [until=UNIX-SECONDS] stand"
                ));
            }
        };
        let until = match until.map(|word| word.strip_prefix("until=").and_then(|seconds| seconds.parse().ok())) {
            None => None,
            Some(Some(seconds)) => Some(seconds),
            Some(None) => return Err("its fourth word is not until= with a Unix time in whole seconds".into()),
        };
        let acts: &[Act] = match *act {
            "publish" => &[Act::Publish],
            "subscribe" => &[Act::Subscribe],
            "both" => &[Act::Publish, Act::Subscribe],
            _ => return Err("its second word is none of publish, subscribe and both".into()),
        };
        let topics: Option<Box<[Topics]>> = topics.split(',').map(Topics::parse).collect();
        let what = "its third word is no list of topics: write names with commas between them, or beginnings with a *";
        Ok(Right {
            token: token.parse().map_err(|error| format!("{error}"))?,
            acts,
            topics: topics.ok_or(what)?,
            until,
        })
    }
}

impl Topics {
    fn parse(word: &str) -> Option<Topics> {
        match word.strip_suffix('*') {
            Some(beginning) if beginning.bytes().all(is_of_name) => Some(Topics::Beginning(beginning.into())),
            Some(_) => None,
            None => check_topic(word).ok().map(|()| Topics::Named(word.into())),
        }
    }

    fn cover(&self, name: &str) -> bool {
        match self {
            Topics::Named(known) => known == name,
            Topics::Beginning(beginning) => name.starts_with(beginning.as_str()),
        }
    }
}

/// By the clock on the wall, as the file says it.
pub fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
