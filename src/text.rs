//! Text from outside: lengths of time are read, tokens of HTTP skipped, and what goes into a message is quoted.
//!
//! A message is one line, whatever a peer sent: what is quoted is escaped and cut.

use std::borrow::Cow;
use std::io::{self, ErrorKind};
use std::time::Duration;

/// Ten years: no time is longer, so that none overflows a clock.
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

pub fn invalid<T>(reason: impl Into<String>) -> io::Result<T> {
    Err(io::Error::new(ErrorKind::InvalidInput, reason.into()))
}

/// What came from outside, made fit for a one-line message: quoted, escaped and cut.
pub fn quoted(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((cut, _)) => format!("{:?}…", &text[..cut]),
        None => format!("{text:?}"),
    }
}

/// Text whose lines end with LF alone, whether they ended with LF, CRLF or CR.
pub fn with_lf(text: &str) -> Cow<'_, str> {
    match text.contains('\r') {
        true => Cow::Owned(text.replace("\r\n", "\n").replace('\r', "\n")),
        false => Cow::Borrowed(text),
    }
}

/// Optional white space is space and tab (RFC 9110 §5.6.3).
pub fn skip_space(text: &str) -> &str {
    text.trim_start_matches([' ', '\t'])
}

/// What follows a token; `None` where there is none (RFC 9110 §5.6.2).
pub fn skip_token(text: &str) -> Option<&str> {
    let rest = text.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c));
    Some(rest).filter(|rest| rest.len() < text.len())
}
