//! A program's route: its handler, and what it answers.
//!
//! A handler is called with a request that was read whole, and says what the request gets: an answer, a stream of its
//! own, or the topics that it may follow. What goes into a head is checked here, since a line break in a field would
//! begin another field, and a length that is not the body's own would make the rest of it the next request's answer
//! ([RFC 9112 §11.1](https://www.rfc-editor.org/rfc/rfc9112#section-11.1)). Whatever a handler does, its connection
//! ends in order: an error becomes an answer while there is none yet, a panic too.

use crate::asked::{Opener, Parts, Request};
use crate::clock::spread;
use crate::connection::{Connection, LINGER, Phase, Reason, STOPPING};
use crate::cursor::Start;
use crate::follower::Since;
use crate::hub::Core;
use crate::names::distinct;
use crate::response::Response;
use crate::stream::Stream;
use crate::subscription::Wanted;
use crate::sync::enter;
use crate::text::{invalid, quoted, skip_space, skip_token};
use std::borrow::Cow;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
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
pub struct Answer(Kind);

enum Kind {
    Response {
        status: u16,
        fields: Vec<(String, String)>,
        body: Arc<[u8]>,
    },
    Topics(Wanted),
    /// Its stream is over.
    Ended,
}

impl Answer {
    /// An answer with a body of this type, such as `text/html; charset=utf-8`. `status` is 200 to 599; without a body
    /// it has no type either: [`Answer::empty`].
    pub fn new(status: u16, content_type: impl Into<String>, body: impl Into<Vec<u8>>) -> Answer {
        Answer::shared(status, content_type.into(), body.into().into())
    }

    /// One line of plain text, to which the line's end is added, as the server's own answers are.
    pub fn text(status: u16, line: impl std::fmt::Display) -> Answer {
        Answer::new(status, "text/plain; charset=utf-8", format!("{line}\n"))
    }

    /// An answer without a body. 204 tells an `EventSource` not to come back:
    /// <https://html.spec.whatwg.org/multipage/server-sent-events.html#sse-processing-model>.
    pub fn empty(status: u16) -> Answer {
        Answer(Kind::Response { status, fields: Vec::new(), body: Arc::default() })
    }

    /// The same body for many: it is not copied.
    pub(crate) fn shared(status: u16, content_type: String, body: Arc<[u8]>) -> Answer {
        Answer(Kind::Response { status, fields: vec![("Content-Type".into(), content_type)], body })
    }

    pub(crate) fn ended() -> Answer {
        Answer(Kind::Ended)
    }

    /// Adds a field to the head. It is checked when the handler returns: a name or a value that may not be (an empty
    /// name, a space in it; a control character in the value), and a field that the server writes itself (`Date`,
    /// `Content-Length`, `Connection`, `Access-Control-…` and the like), make it a 500, and the log says why. To an answer
    /// that is none, such as a stream's end, nothing is added.
    pub fn field(mut self, name: impl Into<String>, value: impl std::fmt::Display) -> Answer {
        if let Kind::Response { fields, .. } = &mut self.0 {
            fields.push((name.into(), value.to_string()));
        }
        self
    }
}

impl Request<'_> {
    /// Opens a stream: here the head goes out, and a place among the streams is taken. Anything that the request gets
    /// besides, it gets on the stream.
    ///
    /// # Errors
    /// There is no room (the page was told when to come back), the page has gone, the server is stopping, the request
    /// is a `HEAD`, or a stream was opened before. Return the error from the handler; nothing else can be answered.
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
        let mut opened = None;
        let first = self.opened.get_or_init(|| {
            if self.is_head() {
                return Err("HEAD asks for the head alone");
            }
            let (stream, lane) = Stream::open(self)?;
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
    /// checked who may. A page that reconnects goes on after its last event; one that comes first begins now. The
    /// handler's thread is free at once.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) for what is no topic name, for no topic, and for more than 64;
    /// [`Other`](io::ErrorKind::Other) after a stream was opened.
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

    /// The same, where a page that comes first begins elsewhere: with all that is kept, for example.
    ///
    /// # Errors
    /// As for [`Request::follow`].
    pub fn follow_since(&self, topics: impl IntoIterator<Item = impl AsRef<str>>, since: Since) -> io::Result<Answer> {
        if self.opened.get().is_some() {
            return Err(io::Error::other("the stream is open already: it cannot follow topics, too"));
        }
        let names = distinct(topics)?;
        // A cursor that cannot be read gets a gap, and no refusal: a browser gives up for good on one.
        let start = self.last_event_id().map_or(since.into(), |text| Start::After(text.parse().ok()));
        Ok(Answer(Kind::Topics(Wanted { names, start, poll: None })))
    }
}

impl Stream<'_> {
    /// Ends the stream in order. The page's `EventSource` reconnects after its reconnection time, unless that request
    /// is answered 204. A handler that returns otherwise ends it, too.
    ///
    /// # Errors
    /// The page has gone already, or the server is stopping.
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
    /// The connection becomes a stream of these topics; to a HEAD, the head alone.
    Follow(Wanted),
    /// A HEAD was asked by a handler that would stream.
    Head,
    /// Its stream is over, and why. Nothing may follow.
    Ended(Cow<'static, str>),
}

impl Handled {
    /// Calls the handler. No lock may be held: it takes its time.
    pub fn run(self, core: &Core, c: &Arc<Connection>, open: &Opener) -> Outcome {
        let Handled { handler, parts } = self;
        let request = Request { parts, c, core, open, opened: OnceLock::new() };
        let is_head = request.is_head();
        let result = catch_unwind(AssertUnwindSafe(|| handler(&request)));
        let has_panicked = result.is_err();
        let result = result.unwrap_or_else(|_| Err(io::Error::other(PANICKED)));
        match (request.opened.get(), result) {
            (None, Ok(Answer(Kind::Response { status, fields, body }))) => {
                response(status, &fields, body).map_or_else(Outcome::Failed, Outcome::Respond)
            }
            (None, Ok(Answer(Kind::Topics(wanted)))) => Outcome::Follow(wanted),
            // Only a stream can be ended, and this handler's request has opened none.
            (None, Ok(Answer(Kind::Ended))) => {
                Outcome::Failed(io::Error::other("it ended a stream of another request"))
            }
            (None, Err(error)) => Outcome::Failed(error),
            (Some(Err(_)), _) if is_head => Outcome::Head,
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
    let finished = c.finish(Instant::now() + LINGER, &|| true);
    // An end is written only after a whole frame; a stream that is closed may be in the middle of one. What a panic has
    // left unsaid nobody knows: such a stream looks cut.
    if let (Phase::Closed(reason), _) | (_, Err(reason)) = (enter(&c.state).phase, finished) {
        return reason.into();
    } else if core.is_stopping() {
        return c.end(STOPPING, spread(core.config.retry, 50, 150), None).into();
    } else if !has_panicked {
        c.end_silently();
    }
    match result {
        Ok(Answer(Kind::Ended)) => "the handler returned".into(),
        Ok(_) => "the handler answered after it had opened a stream".into(),
        Err(error) => error.to_string().into(),
    }
}

/// The response that an answer describes.
///
/// # Errors
/// [`InvalidInput`](io::ErrorKind::InvalidInput): the status, a field, or a body where there may be none.
fn response(status: u16, fields: &[(String, String)], body: Arc<[u8]>) -> io::Result<Response> {
    if !(200..600).contains(&status) {
        return wrong(format!("the status {status} is none of 200 to 599"));
    }
    if [204, 205, 304].contains(&status) && !body.is_empty() {
        return wrong(format!("an answer of status {status} has no body")); // RFC 9110 §15.3.5, §15.3.6, §15.4.5
    }
    let mut response = Response::new(status, "", body);
    for (name, value) in fields {
        let small = name.to_ascii_lowercase();
        if skip_token(name) != Some("") {
            return wrong(format!("{} is no field name", quoted(name)));
        } else if OWN_FIELDS.contains(&small.as_str()) || small.starts_with(CORS) {
            return wrong(format!("the field {name} is the server's own: leave it out"));
        } else if value.chars().any(|c| c.is_control() && c != '\t') {
            return wrong(format!("the value {} of the field {name} has a control character", quoted(value)));
        } else if small == "content-type" {
            check_content_type(value).or_else(|error| wrong(error.to_string()))?;
            response.content_type = value.clone().into();
        } else {
            response = response.field(name, value);
        }
    }
    Ok(response)
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
