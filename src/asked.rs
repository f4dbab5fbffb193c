//! What a program's route sees of a request.
//!
//! All of it was read before the program is called: the head strictly, the body within its limit and time. So whatever
//! a handler does with it, it waits for nothing, and a peer that sends slowly holds no handler. Text from outside
//! stands here as it came, but whole and decoded once: quote it before it goes into a page or a log.

use crate::config::Token;
use crate::connection::{Connection, Reason};
use crate::hub::{Core, Hub};
use crate::target::Query;
use crate::text::invalid;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

/// Finds a place among the streams and writes the head, with these lines in it, and returns the lane for it; else the
/// stream is rejected in a way that a browser comes back from, and this says why.
pub type Opener<'a> = dyn Fn(&str) -> Result<usize, Reason> + Sync + 'a;

/// What a request says, taken out of its head and its body.
pub struct Parts {
    pub method: String,
    pub path: String,
    /// Where in the path begins what follows the route.
    pub rest_at: usize,
    pub query: Query,
    /// The fields of its head, each line with its CRLF.
    pub fields: String,
    /// As topics read them.
    pub tokens: Vec<String>,
    pub last_event_id: Option<String>,
    pub body: Vec<u8>,
}

/// A request to a route of the program: see [`Server::route`](crate::Server::route).
///
/// Its handler answers it with an [`Answer`](crate::Answer), opens a [stream](Request::stream), or lets it
/// [follow](Request::follow) topics.
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// # use brooklet::{Answer, Config, Server};
/// # let server = Server::bind("127.0.0.1:0", Config::default())?;
/// server.route("PUT /notes/", |request| {
///     if request.field("Content-Type") != Some("text/plain") {
///         return Ok(Answer::text(415, "notes are text/plain"));
///     }
///     let (name, bytes) = (request.rest(), request.body().len());
///     Ok(Answer::text(201, format!("{name}: {bytes} bytes from {}", request.peer())))
/// })?;
/// # let server = server.spawn()?;
/// # let mut client = std::net::TcpStream::connect(server.addr()?)?;
/// # let head = "PUT /notes/a HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nConnection: close\r\n";
/// # std::io::Write::write_all(&mut client, format!("{head}Content-Length: 2\r\n\r\nhi").as_bytes())?;
/// # let answer = std::io::read_to_string(client)?;
/// # assert!(answer.starts_with("HTTP/1.1 201 ") && answer.contains("\r\n\r\na: 2 bytes from 127.0.0.1:"), "{answer}");
/// # Ok(()) }
/// ```
pub struct Request<'a> {
    pub(crate) parts: Parts,
    pub(crate) c: &'a Arc<Connection>,
    pub(crate) core: &'a Arc<Core>,
    pub(crate) open: &'a Opener<'a>,
    /// Set once a stream was asked for: its lane, or why there is none.
    pub(crate) opened: OnceLock<Result<usize, Reason>>,
    /// What a HEAD gets of the stream that it does not open: the program's own lines of its head.
    pub(crate) lines: OnceLock<String>,
}

impl Request<'_> {
    /// `GET`, `POST`, `PUT`, `PATCH` or `DELETE`. A `HEAD` is seen as the `GET` whose head it asks for, and its
    /// answer's body is not sent; `OPTIONS` is answered without the program.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("/state", |request| match request.method() {
    ///     "GET" => Ok(Answer::text(200, "all is well")),
    ///     other => Ok(Answer::text(501, format!("{other} is still to come"))),
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn method(&self) -> &str {
        match self.parts.method.as_str() {
            "HEAD" => "GET",
            method => method,
        }
    }

    /// The path, percent-decoded once; begins with a slash.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("/", |request| Ok(Answer::text(404, format!("there is no {:?}", request.path()))))?;
    /// # Ok(()) }
    /// ```
    pub fn path(&self) -> &str {
        &self.parts.path
    }

    /// What follows the route in the path: of `/jobs/7/log`, `7/log` for a route `/jobs/`. Empty for a route that does
    /// not end with a slash.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("GET /rooms/", |request| request.follow([request.rest()]))?; // of /rooms/tea: tea
    /// # Ok(()) }
    /// ```
    pub fn rest(&self) -> &str {
        &self.parts.path[self.parts.rest_at..]
    }

    /// The value of the query's first parameter of this name, percent-decoded; a plus sign stays one.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("GET /search", |request| match request.query("q") {
    ///     Some(words) => Ok(Answer::text(200, format!("nothing about {words:?}"))), // of ?q=black%20tea: black tea
    ///     None => Ok(Answer::text(400, "say ?q=WORDS")),
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn query(&self, name: &str) -> Option<&str> {
        self.parts.query.get(name)
    }

    /// All parameters of the query, in their order.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("GET /sum", |request| {
    ///     let terms = request.queries().filter(|(name, _)| *name == "term"); // ?term=1&term=2
    ///     Ok(Answer::text(200, terms.filter_map(|(_, value)| value.parse::<i64>().ok()).sum::<i64>()))
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn queries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.parts.query.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The value of the first field of this name, whose case does not matter. Bytes that are not UTF-8 are replaced.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("/hello", |request| {
    ///     let is_german = request.field("accept-language").is_some_and(|languages| languages.starts_with("de"));
    ///     Ok(Answer::text(200, if is_german { "guten Tag" } else { "hello" }))
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields().find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// All fields of the head, in their order and as they were written.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("/echo", |request| {
    ///     let lines: Vec<String> = request.fields().map(|(name, value)| format!("{name}: {value}")).collect();
    ///     Ok(Answer::text(200, lines.join("\n")))
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        let fields = self.parts.fields.split("\r\n").filter_map(|line| line.split_once(':'));
        fields.map(|(name, value)| (name, value.trim_matches([' ', '\t'])))
    }

    /// The value of the first cookie of this name. Where two paths or domains have set one of the same name, a browser
    /// sends both, in an order of its own; behind TLS a session cookie is therefore best called `__Host-…`
    /// (<https://datatracker.ietf.org/doc/html/draft-ietf-httpbis-rfc6265bis#section-4.1.3>).
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("/whoami", |request| Ok(Answer::text(200, request.cookie("user").unwrap_or("nobody"))))?;
    /// # Ok(()) }
    /// ```
    pub fn cookie(&self, name: &str) -> Option<&str> {
        let lines = self.fields().filter(|(field, _)| field.eq_ignore_ascii_case("cookie"));
        let mut cookies = lines.flat_map(|(_, cookies)| cookies.split(';')).filter_map(|cookie| cookie.split_once('='));
        cookies.find(|(cookie, _)| cookie.trim() == name).map(|(_, value)| value.trim())
    }

    /// Whether it shows this token, where topics look for one, too: `Authorization: Bearer TOKEN`, or the cookie
    /// `brooklet_token`.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Server, Token};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let operator: Token = "c0ffee".parse()?;
    /// server.route("/state", move |request| match request.shows(&operator) {
    ///     true => Ok(Answer::text(200, "all is well")),
    ///     false => Ok(Answer::text(401, "show the operator's token").field("WWW-Authenticate", "Bearer")),
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn shows(&self, token: &Token) -> bool {
        self.parts.tokens.iter().any(|presented| token.is(presented))
    }

    /// The id after which a page that reconnects wants to go on: the field `Last-Event-ID`, or a parameter of the query
    /// `last_event_id` (`lastEventId` and `lastEventID`, too, as some packages write it). None where it is empty.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("GET /count", |request| {
    ///     let begin = request.last_event_id().and_then(|id| id.parse::<u64>().ok()).map_or(0, |last| last + 1);
    ///     let mut stream = request.stream()?;
    ///     (begin..10).try_for_each(|n| stream.send(&Event::new(n.to_string()).id(n.to_string())))?;
    ///     stream.end()
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn last_event_id(&self) -> Option<&str> {
        self.parts.last_event_id.as_deref()
    }

    /// The body, whole: at most [`Config::body_bytes`](crate::Config::body_bytes).
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("POST /size", |request| Ok(Answer::text(200, format!("{} bytes", request.body().len()))))?;
    /// # Ok(()) }
    /// ```
    pub fn body(&self) -> &[u8] {
        &self.parts.body
    }

    /// The body as text.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) where it is not UTF-8; returned from the handler, it is answered
    /// with 400.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("POST /words", |request| Ok(Answer::text(200, request.text()?.split_whitespace().count())))?;
    /// # Ok(()) }
    /// ```
    pub fn text(&self) -> io::Result<&str> {
        match str::from_utf8(&self.parts.body) {
            Ok(text) => Ok(text),
            Err(error) => invalid(format!("the body is not UTF-8 from byte {} on", error.valid_up_to())),
        }
    }

    /// The other end's address: behind a proxy, the proxy's.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("/whoami", |request| Ok(Answer::text(200, request.peer().ip())))?;
    /// # Ok(()) }
    /// ```
    pub fn peer(&self) -> SocketAddr {
        self.c.peer
    }

    /// The server's hub, so that a handler need not bring one along.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("POST /say", |request| {
    ///     let id = request.hub().publish("chat", Event::new(request.text()?))?;
    ///     Ok(Answer::text(200, id))
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn hub(&self) -> Hub {
        Hub { core: self.core.clone() }
    }

    pub(crate) fn is_head(&self) -> bool {
        self.parts.method == "HEAD"
    }
}

/// Without fields and body: they may hold secrets.
impl fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Request({} {:?} from {})", self.parts.method, self.parts.path, self.c.peer)
    }
}
