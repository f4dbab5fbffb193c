//! Reading the stream of a Redis, and showing a server what it holds.
//!
//! First what is kept and not too old; then whatever comes, on a connection of its own that waits in Redis for it. Why
//! nothing is missing without a word is shown in `redis.rs`; what it demands of a reader is here.

use crate::redis_link::{CHECK, Link, NEWEST, NONSENSE, REPLY_TIME, Session, id, list, taken, text, words};
use brooklet::{Entry, Feed, Id};
use redis::Value;
use std::io;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

/// How long the reader waits in Redis for the next event. Then it looks whether the stream is still the one it was,
/// which is how soon a flush is noticed on which nothing follows.
const BLOCK_TIME: Duration = Duration::from_millis(300);
/// How long its reply may take then.
pub const TURN_TIME: Duration = BLOCK_TIME.saturating_add(REPLY_TIME);
/// Between two tries to reach a Redis that is away: doubled from the first to the second.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// Entries of one read, so that they take some megabytes of memory at most.
const READ_COUNT: usize = 128;

/// Where the reader is: in which stream, and after which of its entries.
pub struct Position {
    epoch: String,
    cursor: Id,
}

/// An entry of the stream as it was read. None where it is a mark; an error where it is nothing that we know.
type Read = (Id, io::Result<Option<Entry>>);

/// Shows what is kept and not too old.
pub fn load(link: &Link, session: &mut Session, feed: &Feed) -> Result<Position, String> {
    let now = UNIX_EPOCH.elapsed().map_or(0, |time| time.as_millis() as u64);
    let oldest = Id { ms: now.saturating_sub(link.keep_ms), seq: 0 };
    let mut cursor = None;
    loop {
        // From what was read last, which must still be there: else what follows may be trimmed, too.
        let mut read = range(link, session, cursor.unwrap_or(oldest))?;
        let is_last = read.len() < READ_COUNT;
        match read.first() {
            Some((first, _)) if cursor == Some(*first) => drop(read.remove(0)),
            Some((first, _)) => feed.missing_up_to(first.before()).map_err(words)?,
            None => {}
        }
        cursor = show(link, feed, read)?.or(cursor);
        match cursor {
            Some(id) if is_last => return Ok(Position { epoch: session.epoch.clone(), cursor: id }),
            Some(_) => {}
            None => match taken(session.one(&link.script(NEWEST))?)? {
                Value::Nil => {
                    let broken = session.epoch.clone();
                    link.settle(session, &broken)?; // there must be an entry to begin after
                }
                newest => {
                    let newest = id(newest)?;
                    if newest >= oldest {
                        continue; // it has just come
                    }
                    feed.missing_up_to(newest).map_err(words)?;
                    link.see(newest);
                    return Ok(Position { epoch: session.epoch.clone(), cursor: newest });
                }
            },
        }
    }
}

/// The reader, for as long as there is a server to feed.
pub fn follow(link: &Link, session: Session, mut at: Position, feed: &Feed) {
    let (mut session, mut pause) = (Some(session), FIRST_PAUSE);
    let mut away: Option<(Instant, String)> = None; // since when, and why at last
    while !feed.is_over() {
        let turn = session.take().map_or_else(|| link.join(TURN_TIME), Ok).and_then(|mut joined| {
            let turn = take_turn(link, &mut joined, &mut at, feed);
            turn.map(|()| joined)
        });
        match turn {
            Ok(joined) => {
                session = Some(joined);
                if let Some((since, _)) = away.take() {
                    feed.log(format_args!("Redis is back, after {:.1} s", since.elapsed().as_secs_f64()));
                }
                pause = FIRST_PAUSE;
            }
            Err(why) => {
                link.outages.fetch_add(1, SeqCst);
                let (since, last) = away.take().unwrap_or_else(|| (Instant::now(), String::new()));
                if why != last && !feed.is_over() {
                    feed.log(format_args!("Redis is away: {why}; streams stay open, publishers are refused"));
                }
                away = Some((since, why));
                thread::sleep(pause);
                pause = LAST_PAUSE.min(2 * pause);
            }
        }
    }
}

/// Waits for what comes next, makes sure that nothing is missing before it, and shows it.
fn take_turn(link: &Link, session: &mut Session, at: &mut Position, feed: &Feed) -> Result<(), String> {
    let cursor = at.cursor.to_string();
    let (mut read, mut check) = (redis::cmd("XREAD"), link.script(CHECK));
    read.arg("COUNT").arg(READ_COUNT).arg("BLOCK").arg(BLOCK_TIME.as_millis() as u64);
    read.arg("STREAMS").arg(&link.stream).arg(&cursor);
    check.arg(&cursor);
    let mut replies = session.ask(&[read, check])?.into_iter();
    let mut next = || replies.next().ok_or(NONSENSE.to_string()).and_then(taken);
    let (read, check) = (streams(next()?)?, list(next()?)?);
    let [epoch, mark, Value::Int(is_here)] = <[Value; 3]>::try_from(check).map_err(|_| NONSENSE)? else {
        return Err(NONSENSE.into());
    };
    let (epoch, mark, is_here) = (text(epoch)?, text(mark)?.parse::<Id>().ok(), is_here > 0);
    let is_other = epoch != at.epoch;
    let has_parted = is_other && mark.is_none_or(|mark| mark <= at.cursor);
    let is_emptied = !is_other && !is_here && read.is_empty();
    if has_parted || is_emptied {
        // What was read may be of either stream. It is read again behind the mark, or before it, after a gap.
        feed.log("Redis has lost entries, or was set back: everyone hears a gap");
        link.settle(session, &epoch)?;
        at.epoch.clone_from(&session.epoch);
        return Ok(());
    }
    at.epoch = epoch;
    if let (false, Some((first, Err(_) | Ok(Some(_))))) = (is_here, read.first()) {
        feed.missing_up_to(first.before()).map_err(words)?; // trimmed past us; a mark would say it itself
    }
    at.cursor = show(link, feed, read)?.unwrap_or(at.cursor);
    Ok(())
}

/// Shows entries in their order. Returns the last one's id.
fn show(link: &Link, feed: &Feed, read: Vec<Read>) -> Result<Option<Id>, String> {
    let mut last = None;
    for (id, entry) in read {
        link.see(id);
        last = Some(id);
        let shown = match entry {
            Ok(Some(entry)) => feed.show(id, entry),
            Ok(None) => feed.missing_up_to(id),
            Err(error) => Err(error),
        };
        match shown {
            Err(error) if error.kind() != io::ErrorKind::InvalidInput => return Err(words(error)),
            Err(error) => feed.log(format_args!("the entry {id} in Redis is passed over: {error}")),
            Ok(()) => {}
        }
    }
    Ok(last)
}

/// What `XREAD` found in the one stream; nothing where it has waited in vain.
fn streams(reply: Value) -> Result<Vec<Read>, String> {
    if reply == Value::Nil {
        return Ok(Vec::new());
    }
    let stream = list(reply)?.pop().map(list).ok_or(NONSENSE)??;
    entries(stream.into_iter().nth(1).ok_or(NONSENSE)?)
}

fn entries(reply: Value) -> Result<Vec<Read>, String> {
    let entry = |value| {
        let [at, fields] = <[Value; 2]>::try_from(list(value)?).map_err(|_| NONSENSE)?;
        let fields: Result<Vec<String>, String> = list(fields)?.into_iter().map(text).collect();
        let fields = fields.map_err(|why| io::Error::new(io::ErrorKind::InvalidInput, why));
        Ok((id(at)?, fields.and_then(read_entry)))
    };
    list(reply)?.into_iter().map(entry).collect()
}

fn read_entry(fields: Vec<String>) -> io::Result<Option<Entry>> {
    if fields.first().is_some_and(|name| name == "gap") {
        return Ok(None);
    }
    let pairs = fields.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone()));
    Entry::from_fields(pairs).map(Some)
}

/// The entries from this id on.
fn range(link: &Link, session: &mut Session, from: Id) -> Result<Vec<Read>, String> {
    let mut command = redis::cmd("XRANGE");
    command.arg(&link.stream).arg(from.to_string()).arg("+").arg("COUNT").arg(READ_COUNT);
    entries(taken(session.one(&command)?)?)
}
