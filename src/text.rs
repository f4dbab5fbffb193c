//! Text that came from outside: durations are parsed, HTTP tokens skipped, and whatever goes into a message is quoted.
//!
//! A message is one line, whatever a peer sent. So text from outside goes through [`quoted`] before it enters an error
//! or the log: a line break in a path would otherwise let anybody write log lines of their own, and 16 KiB of it would
//! fill the log.

use std::borrow::Cow;
use std::io::{self, ErrorKind};
use std::time::Duration;

/// Ten years. An `Instant` plus a longer time may overflow, and that panics; so every duration from outside is at most
/// this.
pub const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Reads a length of time as flags and queries write it: `500ms`, `15s`, `10m`, `24h`; at most ten years.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for any other text.
///
/// ```
/// assert_eq!(brooklet::parse_duration("10m").unwrap().as_secs(), 600);
/// assert!(brooklet::parse_duration("10").is_err());
/// ```
pub fn parse_duration(text: &str) -> io::Result<Duration> {
    // Digits alone: `parse` would take a sign as well.
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let unit_ms = match &text[digits..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    match text[..digits].parse::<u64>().ok().and_then(|n| n.checked_mul(unit_ms)) {
        Some(ms) if unit_ms > 0 && ms <= LONGEST.as_millis() as u64 => Ok(Duration::from_millis(ms)),
        _ => invalid(format!("{} is no length of time: write 500ms, 15s, 10m or 24h", quoted(text))),
    }
}

/// An [`ErrorKind::InvalidInput`]: over HTTP it becomes a 400, at the start the command's exit code 2.
pub fn invalid<T>(reason: impl Into<String>) -> io::Result<T> {
    Err(io::Error::new(ErrorKind::InvalidInput, reason.into()))
}

/// Text from outside, fit for a one-line message: quoted, control characters escaped, cut after 80 characters.
pub fn quoted(text: &str) -> String {
    // By characters, not bytes: to cut in the middle of one would panic.
    match text.char_indices().nth(80) {
        Some((cut, _)) => format!("{:?}…", &text[..cut]),
        None => format!("{text:?}"),
    }
}

/// A line with the control characters in it escaped. Most have none: what comes from a peer was quoted before. But the
/// errors of a program's handlers and of its engine are whatever the program has made of it.
pub fn one_line(text: String) -> String {
    let escape = |c: char| if c.is_control() { c.escape_debug().to_string() } else { c.to_string() };
    if text.contains(char::is_control) { text.chars().map(escape).collect() } else { text }
}

/// Text whose lines end with LF alone. Event streams take LF, CRLF and CR for a line's end, so a CR left in the data
/// would end its `data:` line. Copied only where there is a CR.
/// <https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream>
pub fn with_lf(text: &str) -> Cow<'_, str> {
    match text.contains('\r') {
        true => Cow::Owned(text.replace("\r\n", "\n").replace('\r', "\n")),
        false => Cow::Borrowed(text),
    }
}

/// What follows optional white space, which is space and tab only (RFC 9110 §5.6.3); `trim` would take more, and other
/// readers of the same request would not.
pub fn skip_space(text: &str) -> &str {
    text.trim_start_matches([' ', '\t'])
}

/// What follows a token; `None` where there is none (RFC 9110 §5.6.2).
pub fn skip_token(text: &str) -> Option<&str> {
    let rest = text.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c));
    Some(rest).filter(|rest| rest.len() < text.len())
}
