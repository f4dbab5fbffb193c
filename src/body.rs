//! What is still to come of a request's body: of a length that its head has announced, or in chunks.
//!
//! Whatever two readers could take for two different bodies is refused ([RFC 9112
//! §6](https://www.rfc-editor.org/rfc/rfc9112#section-6)). If a proxy saw the body end in one place and this server in
//! another, what stands between would be a request that the proxy has never checked. So after a refusal here the
//! connection is always closed.

use crate::reader::Reader;
use crate::response::{Response, refuse};
use crate::text::{quoted, skip_space, skip_token};

/// Most trailer fields after a chunked body; they are checked and thrown away. As many as a head may have fields.
const TRAILER_LINES: usize = 100;

/// How far the body has been read. Nothing of it is kept here.
pub struct Body {
    /// Bytes to come of the body, or of the chunk that is being read.
    pub left: u64,
    /// More chunks may follow.
    is_chunked: bool,
    /// A chunk was begun, and the CRLF after its last byte is still to come.
    is_in_chunks: bool,
}

impl Body {
    /// The body that a head announces by its fields `Content-Length` and `Transfer-Encoding`; without either it is
    /// empty (RFC 9112 §6.3).
    pub fn announced(length: Option<&str>, coding: Option<&str>, is_http10: bool) -> Result<Body, Response> {
        match (length, coding) {
            (None, None) => Ok(Body::of_length(0)),
            (Some(_), Some(_)) => refuse(400, "Content-Length and Transfer-Encoding together say two things"),
            (Some(length), None) => match length.parse() {
                // `parse` alone would take a sign. A list such as `5, 5` is refused, too, as RFC 9112 §6.3 allows.
                Ok(count) if length.bytes().all(|b| b.is_ascii_digit()) => Ok(Body::of_length(count)),
                _ => refuse(400, format!("{} is no Content-Length", quoted(length))),
            },
            (None, Some(_)) if is_http10 => refuse(400, "HTTP/1.0 has no Transfer-Encoding"),
            (None, Some(coding)) if coding.eq_ignore_ascii_case("chunked") => Ok(Body::chunked()),
            (None, Some(list)) => {
                // Where chunked does not stand last, and there alone, nobody can tell where the body ends (RFC 9112
                // §6.3).
                let codings: Vec<&str> = list.split(',').map(|coding| coding.trim_matches([' ', '\t'])).collect();
                let first_chunked = codings.iter().position(|coding| coding.eq_ignore_ascii_case("chunked"));
                let status = if first_chunked == Some(codings.len() - 1) { 501 } else { 400 };
                refuse(status, format!("the transfer coding {} is not known: chunked is", quoted(list)))
            }
        }
    }

    /// A body of this many bytes.
    pub fn of_length(left: u64) -> Body {
        Body { left, is_chunked: false, is_in_chunks: false }
    }

    /// A body in chunks, of which none has been read.
    pub fn chunked() -> Body {
        Body { left: 0, is_chunked: true, is_in_chunks: false }
    }

    /// Whether all of it was read, so that the next request begins here. One that was not read whole ends the
    /// connection.
    pub fn is_over(&self) -> bool {
        self.left == 0 && !self.is_chunked
    }

    /// How many bytes are announced but not read: of the body, or of the chunk that is being read; where that is over,
    /// the size of the next one is waited for. 0 at the body's end.
    pub fn coming(&mut self, reader: &mut Reader) -> Result<u64, Response> {
        if self.left == 0 && self.is_chunked {
            self.next_chunk(reader)?;
        }
        Ok(self.left)
    }

    /// Appends what has come of the body to `out`, waiting until there is some. False at the body's end.
    pub fn read(&mut self, reader: &mut Reader, out: &mut Vec<u8>) -> Result<bool, Response> {
        if self.coming(reader)? == 0 {
            return Ok(false);
        }
        // What came with the head is used first; `unread` may also hold the next request, so only `left` bytes are
        // taken.
        if reader.unread().is_empty() {
            self.left -= reader.read_body(out, self.left)? as u64;
            return Ok(true);
        }
        let taken = usize::try_from(self.left).unwrap_or(usize::MAX).min(reader.unread().len());
        out.extend_from_slice(&reader.unread()[..taken]);
        reader.use_up(taken);
        self.left -= taken as u64;
        Ok(true)
    }

    /// Reads the size of the next chunk; after the last one, which is of size 0, the trailer fields (RFC 9112 §7.1).
    fn next_chunk(&mut self, reader: &mut Reader) -> Result<(), Response> {
        if self.is_in_chunks && !reader.chunk_line()?.is_empty() {
            return refuse(400, "a chunk is longer than its size says");
        }
        self.is_in_chunks = true;
        let line = reader.chunk_line()?;
        let Some(size) = chunk_size(&line) else { return refuse(400, format!("{} is no chunk size", quoted(&line))) };
        self.left = size;
        if size == 0 {
            self.skip_trailers(reader)?;
            self.is_chunked = false;
        }
        Ok(())
    }

    fn skip_trailers(&mut self, reader: &mut Reader) -> Result<(), Response> {
        for _ in 0..=TRAILER_LINES {
            let line = reader.chunk_line()?;
            if line.is_empty() {
                return Ok(());
            } else if !skip_token(&line).is_some_and(|rest| rest.starts_with(':')) {
                return refuse(400, format!("{} is no trailer field", quoted(&line)));
            }
        }
        refuse(400, format!("more than {TRAILER_LINES} trailer fields"))
    }
}

/// `1*HEXDIG *( BWS ";" BWS token [ BWS "=" BWS ( token / quoted-string ) ] )` (RFC 9112 §7.1.1); extensions are
/// ignored, but not what is none: other readers may take that for something else. `None` where the line is no size.
fn chunk_size(line: &str) -> Option<u64> {
    let digits = line.bytes().take_while(u8::is_ascii_hexdigit).count();
    let (size, mut rest) = line.split_at(digits);
    while let Some(extension) = skip_space(rest).strip_prefix(';') {
        rest = skip_token(skip_space(extension))?;
        if let Some(value) = skip_space(rest).strip_prefix('=').map(skip_space) {
            rest = value.strip_prefix('"').map_or_else(|| skip_token(value), skip_quoted)?;
        }
    }
    // 16 digits are all that fit; without any, `from_str_radix` fails.
    if rest.is_empty() && digits <= 16 { u64::from_str_radix(size, 16).ok() } else { None }
}

/// What follows a quoted string, whose first quote has been taken (RFC 9110 §5.6.4).
pub fn skip_quoted(text: &str) -> Option<&str> {
    let mut is_escaped = false;
    let end = text.find(|c| {
        let ends = c == '"' && !is_escaped;
        is_escaped = c == '\\' && !is_escaped;
        ends
    })?;
    Some(&text[end + 1..])
}
