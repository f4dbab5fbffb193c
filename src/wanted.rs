//! What a request for a stream of topics asks for: where it begins, when it ends, what its events look like.
//!
//! `GET /events/a` says so in its query, and so does a request that a program's route lets follow topics. Both are read
//! here, so a page says the same in the same words to both, and polling, which needs the query, works with both. What
//! cannot be read is refused with what would be right. Only a cursor is not: a browser gives up for good on a refusal,
//! so it gets a gap.

use crate::cursor::Start;
use crate::form::Form;
use crate::target::Query;
use crate::text::{invalid, parse_duration, quoted};
use std::io;
use std::time::Duration;

/// What a stream's query may say, beside the cursor.
pub const STREAM_PARAMETERS: [&str; 5] = ["since", "last", "poll", "take", "as"];
/// How long `?poll` waits for its first event: less than the 30 s after which some proxies cut a silent answer.
const POLL_TIME: Duration = Duration::from_secs(25);

/// What a request for a stream of topics has asked for.
pub struct Wanted {
    /// Each once.
    pub names: Vec<String>,
    pub start: Start,
    /// How long it waits for its first event; then it ends. None for a stream that goes on.
    pub poll: Option<Duration>,
    /// It ends after so many events, gaps not counted.
    pub take: Option<u64>,
    pub form: Form,
}

impl Wanted {
    /// Reads the query of a request for these topics. It resumes after `cursor`, if there is one; else it begins where
    /// the query says, or at `start` where it says nothing.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](io::ErrorKind::InvalidInput) for a time, a number, a form or a `since` that cannot
    /// be read. A cursor that cannot be read is no error.
    pub fn read(names: Vec<String>, query: &Query, cursor: Option<&str>, start: Start) -> io::Result<Wanted> {
        let poll = match query.get("poll") {
            None => None,
            Some("") => Some(POLL_TIME),
            Some(time) => Some(parse_duration(time).or_else(|error| invalid(format!("poll: {error}")))?),
        };
        let since = wanted_start(query)?.unwrap_or(start);
        let take = query.get("take").map(|text| count("take", text)).transpose()?;
        let form = match query.get("as").map(|text| (text, Form::parse(text))) {
            None => Form::Events,
            Some((_, Some(form))) => form,
            Some((text, None)) => {
                let reason = format!("as is lines or json, or left out for an event stream; not {}", quoted(text));
                return invalid(reason);
            }
        };
        // `since` or `last` is in the page's URL for good; a browser that reconnects adds its cursor, which is newer
        // and wins.
        let start = cursor.map_or(since, |text| Start::After(text.parse().ok()));
        Ok(Wanted { names, start, poll, take, form })
    }
}

/// Where a stream begins that has no cursor, if the query says it.
fn wanted_start(query: &Query) -> io::Result<Option<Start>> {
    Ok(Some(match (query.get("since"), query.get("last")) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => return invalid("since and last each say where to begin: leave one of them out"),
        (None, Some(text)) => Start::Newest(count("last", text)?),
        (Some("earliest"), None) => Start::Earliest,
        (Some("latest"), None) => Start::Newest(1),
        (Some(text), None) => match (parse_duration(text), text.parse()) {
            // A time needs its unit, so that `10` is an id and `10s` is not.
            (Ok(time), _) => Start::Ago(time),
            (_, Ok(id)) => Start::After(Some(id)),
            _ => {
                let reason = format!("since is earliest, latest, a time such as 10m, or an id; not {}", quoted(text));
                return invalid(reason);
            }
        },
    }))
}

/// A number of events, of which there is at least one. `parse` alone would take a sign.
fn count(name: &str, text: &str) -> io::Result<u64> {
    match text.parse() {
        Ok(count) if count > 0 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(count),
        _ => invalid(format!("{name} is a number of events, 1 or more; not {}", quoted(text))),
    }
}
