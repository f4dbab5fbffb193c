//! A program's route: its handler, and what it answers.
//!
//! A handler is called with a request that was read whole, and says what the request gets: an answer, a stream of its
//! own, or the topics that it may follow. What goes into a head is checked here, since a line break in a field would
//! begin another field, and a length that is not the body's own would make the rest of it the next request's answer
//! ([RFC 9112 §11.1](https://www.rfc-editor.org/rfc/rfc9112#section-11.1)). Whatever a handler does, its connection
//! ends in order: an error becomes an answer while there is none yet, a panic too.

use crate::asked::{Opener, Parts, Request};
use crate::clock::spread;
use crate::connection::{Connection, LINGER, PATIENCE, Phase, Reason, STOPPING};
use crate::follower::Since;
use crate::hub::Core;
use crate::names::distinct;
use crate::response::Response;
use crate::stream::Stream;
use crate::sync::{call, enter};
use crate::text::{invalid, quoted, skip_space, skip_token};
use crate::wanted::Wanted;
use std::borrow::Cow;
use std::fmt::Display;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// What answers the requests of a route.
pub type Handler = dyn Fn(&Request) -> io::Result<Answer> + Send + Sync;

/// Fields that the server writes itself, or that would say something untrue about the connection.
const OWN_FIELDS: [&str; 9] = [
    "connection",
    "content-length",
    "date",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-content-type-options",
];
/// On a stream these are the server's, too.
const STREAM_FIELDS: [&str; 3] = ["cache-control", "content-type", "x-accel-buffering"];
const NO_FIELDS: [(&str, &str); 0] = [];
/// Who may read an answer from another origin is said once, by `Config::allow_origins`.
const CORS: &str = "access-control-";

/// What a handler gives back: an answer to the request, or how it is answered otherwise.
///
/// ```
/// # use brooklet::Answer;
/// Answer::text(404, "no such job");
/// Answer::new(200, "application/json", r#"{"done":true}"#).field("Cache-Control", "no-store");
/// Answer::empty(303).field("Location", "/login").field("Set-Cookie", "session=; Max-Age=0");
/// Answer::empty(204); // to an EventSource: do not come back
/// ```
#[must_use = "a handler returns it"]
pub struct Answer {
    kind: Kind,
    fields: Vec<(String, String)>,
}

enum Kind {
    Response {
        status: u16,
        body: Arc<[u8]>,
    },
    Topics(Wanted),
    /// Its stream is over.
    Ended,
}

impl Answer {
    /// An answer with a body of this type, such as `text/html; charset=utf-8`. `status` is 200 to 599. 204, 205 and 304
    /// have no body: [`Answer::empty`]. A wrong answer becomes a 500 when the handler returns it, and the log says
    /// why.
    ///
    /// ```
    /// let answer = brooklet::Answer::new(200, "image/svg+xml", "<svg xmlns='http://www.w3.org/2000/svg'/>");
    /// ```
    pub fn new(status: u16, content_type: impl Into<String>, body: impl Into<Vec<u8>>) -> Answer {
        Answer::shared(status, content_type.into(), body.into().into())
    }

    /// One line of plain text, to which the line's end is added, as the server's own answers are.
    ///
    /// ```
    /// let answer = brooklet::Answer::text(404, format_args!("there is no job {:?}", "7"));
    /// ```
    pub fn text(status: u16, line: impl Display) -> Answer {
        Answer::new(status, "text/plain; charset=utf-8", format!("{line}\n"))
    }

    /// An answer without a body. 204 tells an `EventSource` not to come back:
    /// <https://html.spec.whatwg.org/multipage/server-sent-events.html#sse-processing-model>.
    ///
    /// ```
    /// let answer = brooklet::Answer::empty(303).field("Location", "/login");
    /// ```
    pub fn empty(status: u16) -> Answer {
        Answer::of(Kind::Response { status, body: Arc::default() })
    }

    /// The same body for many: it is not copied.
    pub(crate) fn shared(status: u16, content_type: String, body: Arc<[u8]>) -> Answer {
        Answer::of(Kind::Response { status, body }).field("Content-Type", content_type)
    }

    pub(crate) fn ended() -> Answer {
        Answer::of(Kind::Ended)
    }

    fn of(kind: Kind) -> Answer {
        Answer { kind, fields: Vec::new() }
    }

    /// Adds a field to the head, also to that of a stream of topics ([`Request::follow`]). It is checked when the
    /// handler returns: a name or a value that is not allowed (an empty name, a space in it; a control character in the
    /// value), and a field that the server writes itself (`Date`, `Content-Length`, `Connection`, `Access-Control-…`
    /// and the like; of a stream also `Content-Type`, `Cache-Control` and `X-Accel-Buffering`), make it a 500, and the
    /// log says why. The head of a stream that has ended was sent when it was opened: see [`Request::stream_with`].
    ///
    /// ```
    /// let answer = brooklet::Answer::text(503, "too many jobs wait").field("Retry-After", 5);
    /// ```
    pub fn field(mut self, name: impl Into<String>, value: impl Display) -> Answer {
        self.fields.push((name.into(), value.to_string()));
        self
    }
}

impl Request<'_> {
    /// Opens a stream: here the head goes out, and a place among the streams is taken. Anything that the request gets
    /// besides, it gets on the stream.
    ///
    /// # Errors
    /// [`Other`](io::ErrorKind::Other): there is no room (the page was told when to come back), the page has gone, the
    /// server is stopping, the request is a `HEAD`, or a stream was opened before. Return the error from the handler;
    /// nothing else can be answered.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("/count", |request| {
    ///     let Some(Ok(up_to)) = request.query("to").map(str::parse::<u32>) else {
    ///         return Ok(Answer::text(400, "to is missing, or no number"));
    ///     };
    ///     let mut stream = request.stream()?;
    ///     for n in 0..up_to {
    ///         stream.send(&Event::new(n.to_string()))?;
    ///     }
    ///     stream.end()
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn stream(&self) -> io::Result<Stream<'_>> {
        self.stream_with(NO_FIELDS)
    }

    /// The same, with fields of the program's own in the head, which are checked as [`Answer::field`] says.
    ///
    /// # Errors
    /// As for [`Request::stream`]; also [`Other`](io::ErrorKind::Other) for a field that is not allowed: nothing was
    /// sent then, so the handler may still answer, and to return the error is a 500.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("/hello", |request| {
    ///     let mut stream = request.stream_with([("Set-Cookie", "seen=1; SameSite=Strict")])?;
    ///     stream.send(&Event::new("hello"))?;
    ///     stream.end()
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn stream_with<N, V>(&self, fields: impl IntoIterator<Item = (N, V)>) -> io::Result<Stream<'_>>
    where
        N: AsRef<str>,
        V: Display,
    {
        let lines = stream_lines(fields)?;
        let mut opened = None;
        let first = self.opened.get_or_init(|| {
            if self.is_head() {
                let _ = self.lines.set(lines);
                return Err("HEAD asks for the head alone");
            }
            let (stream, lane) = Stream::open(self, &lines)?;
            opened = Some(stream);
            Ok(lane)
        });
        match (first, opened) {
            (_, Some(stream)) => Ok(stream),
            (Ok(_), None) => Err(io::Error::other("the stream is open already")),
            (Err(reason), None) => Err(io::Error::other(*reason)),
        }
    }

    /// Lets the connection follow these topics, as `GET /events/a,b` does, but without a token: whoever calls this has
    /// checked who may. The handler's thread is free at once.
    ///
    /// A page that reconnects goes on after its last event; one that comes first begins now. The parameters of such a
    /// `GET` mean the same here: `since` and `last` say where it begins, `poll` and `take` when it ends, `as` what its
    /// events look like. So whoever may follow a topic may also read what it keeps. Other parameters are the program's.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) for what is no topic name, for none, for more than 64, and for
    /// a parameter whose value cannot be read; [`Other`](io::ErrorKind::Other) after a stream was opened.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// # fn user_of(session: &str) -> Option<u64> { session.parse().ok() }
    /// server.route("/inbox", |request| match request.cookie("session").and_then(user_of) {
    ///     Some(user) => request.follow([format!("user-{user}"), "everybody".into()]),
    ///     None => Ok(Answer::text(401, "log in first")),
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn follow(&self, topics: impl IntoIterator<Item = impl AsRef<str>>) -> io::Result<Answer> {
        self.follow_since(topics, Since::Now)
    }

    /// The same, where a page that comes first and does not say where begins elsewhere: with all that is kept, for
    /// example.
    ///
    /// # Errors
    /// As for [`Request::follow`].
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Server, Since};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("GET /values", |request| request.follow_since(["load", "memory"], Since::Newest(1)))?;
    /// # Ok(()) }
    /// ```
    pub fn follow_since(&self, topics: impl IntoIterator<Item = impl AsRef<str>>, since: Since) -> io::Result<Answer> {
        if self.opened.get().is_some() {
            return Err(io::Error::other("the stream is open already: it cannot follow topics, too"));
        }
        let wanted = Wanted::read(distinct(topics)?, &self.parts.query, self.last_event_id(), since.into())?;
        Ok(Answer::of(Kind::Topics(wanted)))
    }
}

impl Stream<'_> {
    /// Ends the stream in order. The page's `EventSource` reconnects after its reconnection time, unless that request
    /// is answered 204. A handler that returns otherwise ends it, too.
    ///
    /// # Errors
    /// The page has gone already, or the server is stopping.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("POST /shout", |request| {
    ///     let mut stream = request.stream()?;
    ///     stream.send(&Event::new(request.text()?.to_uppercase()))?;
    ///     stream.end()
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn end(self) -> io::Result<Answer> {
        self.check_open().map(|()| Answer::ended())
    }
}

/// A handler, and the request that it is to be called with.
pub struct Handled {
    pub handler: Arc<Handler>,
    pub parts: Parts,
}

/// What comes after a handler.
pub enum Outcome {
    Respond(Response),
    /// The error of a handler that has not answered.
    Failed(io::Error),
    /// The connection becomes a stream of these topics, with these lines in its head; to a HEAD, the head alone.
    Follow(Wanted, String),
    /// A HEAD was asked by a handler that would stream, with these lines in its head.
    Head(String),
    /// Its stream is over, and why. Nothing may follow.
    Ended(Cow<'static, str>),
}

impl Handled {
    /// Calls the handler. No lock may be held: it takes its time.
    pub fn run(self, core: &Arc<Core>, c: &Arc<Connection>, open: &Opener) -> Outcome {
        let Handled { handler, parts } = self;
        let request = Request { parts, c, core, open, opened: OnceLock::new(), lines: OnceLock::new() };
        let is_head = request.is_head();
        let result = call(|| handler(&request));
        let has_panicked = result.is_none();
        let result = result.unwrap_or_else(|| Err(io::Error::other(PANICKED)));
        match (request.opened.get(), result) {
            (None, Ok(Answer { kind: Kind::Response { status, body }, fields })) => {
                response(status, fields, body).map_or_else(Outcome::Failed, Outcome::Respond)
            }
            (None, Ok(Answer { kind: Kind::Topics(wanted), fields })) => {
                stream_lines(fields).map_or_else(Outcome::Failed, |lines| Outcome::Follow(wanted, lines))
            }
            // Only a stream can be ended, and this handler's request has opened none.
            (None, Ok(Answer { kind: Kind::Ended, .. })) => {
                Outcome::Failed(io::Error::other("it ended a stream of another request"))
            }
            (None, Err(error)) => Outcome::Failed(error),
            (Some(Err(_)), _) if is_head => Outcome::Head(request.lines.get().cloned().unwrap_or_default()),
            (Some(Err(reason)), _) => Outcome::Ended((*reason).into()),
            (Some(Ok(lane)), result) => Outcome::Ended(end_stream(core, c, *lane, result, has_panicked)),
        }
    }
}

const PANICKED: Reason = "the handler panicked";

/// Takes the socket from its lane, ends the stream whose handler has returned, and says why it ended.
fn end_stream(
    core: &Core,
    c: &Arc<Connection>,
    lane: usize,
    result: io::Result<Answer>,
    has_panicked: bool,
) -> Cow<'static, str> {
    let mut state = enter(&c.state);
    if state.phase == Phase::Live {
        state.phase = Phase::Behind;
    }
    state.open = None;
    drop(state);
    core.lanes[lane].leave(c.serial, &Arc::default());
    let finished = c.finish(Instant::now() + LINGER, &|| PATIENCE);
    // An end is written only after a whole frame; a stream that is closed may be in the middle of one. Nobody
    // knows what a panic has left unsaid, so its stream looks cut.
    if let (Phase::Closed(reason), _) | (_, Err(reason)) = (enter(&c.state).phase, finished) {
        return reason.into();
    } else if core.is_stopping() {
        return c.end(STOPPING, spread(core.config.retry, 50, 150), None).into();
    } else if !has_panicked {
        c.end_silently();
    }
    match result {
        Ok(Answer { kind: Kind::Ended, .. }) => "the handler returned".into(),
        Ok(_) => "the handler answered after it had opened a stream".into(),
        Err(error) => error.to_string().into(),
    }
}

/// The response that an answer describes.
///
/// # Errors
/// The status, a field, or a body where there may be none.
fn response(status: u16, fields: Vec<(String, String)>, body: Arc<[u8]>) -> io::Result<Response> {
    if !(200..600).contains(&status) {
        return wrong(format!("the status {status} is none of 200 to 599"));
    }
    if [204, 205, 304].contains(&status) && !body.is_empty() {
        return wrong(format!("an answer of status {status} has no body")); // RFC 9110 §15.3.5, §15.3.6, §15.4.5
    }
    let mut response = Response::new(status, "", body);
    for (name, value) in fields {
        check_field(&name, &value, &[])?;
        if name.eq_ignore_ascii_case("content-type") {
            check_content_type(&value).or_else(|error| wrong(error.to_string()))?;
            response.content_type = value.into();
        } else {
            response = response.field(&name, value);
        }
    }
    Ok(response)
}

/// A program's fields for the head of a stream, each a line with its CRLF.
///
/// # Errors
/// A field that is not allowed.
fn stream_lines(fields: impl IntoIterator<Item = (impl AsRef<str>, impl Display)>) -> io::Result<String> {
    let mut lines = String::new();
    for (name, value) in fields {
        let (name, value) = (name.as_ref(), value.to_string());
        check_field(name, &value, &STREAM_FIELDS)?;
        lines.extend([name, ": ", &value, "\r\n"]);
    }
    Ok(lines)
}

/// Whether a field may stand in a head, where these are the server's own besides `OWN_FIELDS`.
fn check_field(name: &str, value: &str, own: &[&str]) -> io::Result<()> {
    let small = name.to_ascii_lowercase();
    if skip_token(name) != Some("") {
        return wrong(format!("{} is no field name", quoted(name)));
    } else if OWN_FIELDS.iter().chain(own).any(|own| *own == small) || small.starts_with(CORS) {
        return wrong(format!("the field {name} is the server's own: leave it out"));
    } else if value.chars().any(|c| c.is_control() && c != '\t') {
        return wrong(format!("the value {} of the field {name} has a control character", quoted(value)));
    }
    Ok(())
}

/// The program's fault, and not the request's: `InvalidInput` would blame the latter.
fn wrong<T>(reason: String) -> io::Result<T> {
    Err(io::Error::other(reason))
}

/// `type "/" subtype`, and perhaps parameters (RFC 9110 §8.3.1).
pub fn check_content_type(text: &str) -> io::Result<()> {
    let subtype = skip_token(text).and_then(|rest| rest.strip_prefix('/'));
    let parameters = subtype.and_then(skip_token).map(skip_space);
    if text.chars().all(|c| c.is_ascii_graphic() || c == ' ')
        && parameters.is_some_and(|rest| rest.is_empty() || rest.starts_with(';'))
    {
        return Ok(());
    }
    invalid(format!("{} is no content type: write text/html; charset=utf-8", quoted(text)))
}
