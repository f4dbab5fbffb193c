//! The target of a request: what it asks for, percent-decoded once ([RFC 9112
//! §3.2](https://www.rfc-editor.org/rfc/rfc9112#section-3.2)).
//!
//! A proxy before this server decides by the path who may ask for it, so both must read the same path. What could be
//! read in two ways is refused: a slash that is encoded, a character that should be and is not, bytes that are not
//! UTF-8. Decoding happens here and nowhere else: decoded twice, `%2541` would become a letter that no proxy has seen.

use crate::authority::is_authority;
use crate::response::{Response, decline, refuse};
use crate::text::quoted;

/// Most parameters of a query; no request here needs ten.
const QUERY_PARAMETERS: usize = 100;
/// The parameters that say after which event to resume, for clients that cannot set `Last-Event-ID`; a widely used
/// polyfill has its own spelling, and so have pages that were written for Mercure.
pub const CURSOR_PARAMETERS: [&str; 3] = ["last_event_id", "lastEventId", "lastEventID"];

/// A target, decoded.
pub struct Target {
    /// Begins with a slash; or `*`, for OPTIONS of the whole server.
    pub path: String,
    pub query: Query,
    /// The host and port, where the target names them (`GET http://host/…`): they win over the field `Host`.
    pub authority: Option<String>,
}

/// The parameters of a query, in their order. A plus sign stays one: it means a space only in HTML forms.
#[derive(Default)]
pub struct Query(pub Vec<(String, String)>);

impl Query {
    /// The value of the first parameter of this name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// Refuses a parameter that means nothing here, or `?evnet=x` and `?sinse=1h` would do something else than was
    /// meant. Those that begin with an underscore belong to scripts that must make each URL a new one, and are ignored.
    pub fn check(&self, known: &[&str]) -> Result<(), Response> {
        let is_strange = |name: &&String| !name.starts_with('_') && !known.contains(&name.as_str());
        match self.0.iter().map(|(name, _)| name).find(is_strange) {
            None => Ok(()),
            Some(name) if known.is_empty() => {
                decline(400, format!("the parameter {} is not known: none is taken here", quoted(name)))
            }
            Some(name) => {
                decline(400, format!("the parameter {} is not known: {} are", quoted(name), known.join(", ")))
            }
        }
    }

    fn parse(text: &str) -> Result<Query, Response> {
        let mut parts = Vec::new();
        for part in text.split('&').filter(|part| !part.is_empty()) {
            if parts.len() == QUERY_PARAMETERS {
                return refuse(400, format!("more than {QUERY_PARAMETERS} parameters"));
            }
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let name = percent_decode(name)?;
            let value = match percent_decode(value) {
                // A cursor that cannot be decoded is none of ours, and gets a gap: a refusal would strand the browser.
                Err(_) if CURSOR_PARAMETERS.contains(&name.as_str()) => value.into(),
                decoded => decoded?,
            };
            parts.push((name, value));
        }
        Ok(Query(parts))
    }
}

impl Target {
    /// Reads a target of the origin form, the absolute form, or `*`.
    ///
    /// # Errors
    /// 400 where it is none of these, or could be read in two ways. A cursor that cannot be read is no error.
    pub fn parse(method: &str, target: &str) -> Result<Target, Response> {
        if target == "*" && method == "OPTIONS" {
            return Ok(Target { path: "*".into(), query: Query::default(), authority: None });
        }
        if let Some(c) = target.chars().find(|c| !c.is_ascii_graphic() || "\"<>\\^`{|}".contains(*c)) {
            return refuse(400, format!("{} is no target: {c:?} must be percent-encoded", quoted(target)));
        }
        // Servers must accept the absolute form, too, though only proxies are sent it (RFC 9112 §3.2.2).
        let (authority, origin_form) = split_authority(target);
        let begins_well = authority.map_or(origin_form.starts_with('/'), is_authority);
        if !begins_well || target.contains('#') {
            return refuse(400, format!("{} is no target: it begins with a slash, or http://HOST", quoted(target)));
        }
        let (path, query) = origin_form.split_once('?').unwrap_or((origin_form, ""));
        let query = Query::parse(query)?;
        // Before decoding, which would hide it.
        if path.to_ascii_lowercase().contains("%2f") {
            return refuse(400, format!("{} hides a slash, which a proxy may take for none", quoted(path)));
        }
        let path = percent_decode(if path.is_empty() { "/" } else { path })?;
        Ok(Target { path, query, authority: authority.map(String::from) })
    }
}

/// Takes `http://HOST` off the front, if the target is of the absolute form.
fn split_authority(target: &str) -> (Option<&str>, &str) {
    let scheme = "http://";
    match target.split_at_checked(scheme.len()) {
        Some((start, rest)) if start.eq_ignore_ascii_case(scheme) => {
            let (authority, origin_form) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
            (Some(authority), origin_form)
        }
        _ => (None, target),
    }
}

/// Decodes once. A refusal closes the connection: what else is wrong with the head nobody knows.
fn percent_decode(text: &str) -> Result<String, Response> {
    let bad =
        || Response { close: true, ..Response::text(400, format!("{} is not percent-encoded UTF-8", quoted(text))) };
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(mut byte) = rest.next() {
        if byte == b'%' {
            let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16)).ok_or_else(bad);
            byte = (digit()? * 16 + digit()?) as u8;
        }
        bytes.push(byte);
    }
    // Bytes that are not UTF-8 would have to be replaced, and two names would become one.
    String::from_utf8(bytes).map_err(|_| bad())
}
