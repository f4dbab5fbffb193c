//! What a program adds to its server: routes, pages, streams, and the hook for subscribers.
//!
//! A page and a stream are routes whose handlers are written already; the command serves its own page and `/test` by
//! them.

use crate::asked::Request;
use crate::handler::{Answer, check_content_type};
use crate::presence::Presence;
use crate::routes::{Kind, Route, split_method};
use crate::server::Server;
use crate::stream::Stream;
use std::io;
use std::sync::Arc;

impl Server {
    /// Answers whatever is asked of a path with what the handler says: see [`Request`] and [`Answer`]. `POST /jobs` is
    /// the route for one method (`GET`, `POST`, `PUT`, `PATCH` or `DELETE`), `/jobs` the one for all methods that have
    /// none of their own; a method without any is answered with 405. A `HEAD` goes where a `GET` does.
    ///
    /// A path that ends in a slash is also the route of everything below it, unless a longer one fits;
    /// [`Request::rest`] has what follows. The server's own paths (`/events/…`, `/topics`, `/health`, `/metrics`) come
    /// first. A path that had a route for this method gets the new one.
    ///
    /// What is checked before the handler is called: the request is whole and well-formed, its body is at most
    /// [`body_bytes`](crate::Config::body_bytes) and came within [`body_time`](crate::Config::body_time) (413, 408); on
    /// loopback, the host is one of this machine's names or of [`allow_origins`](crate::Config::allow_origins); and for
    /// all but `GET`, the page that asks is of this server's origin or an allowed one (403).
    /// [Tokens](crate::Config::publish_tokens) are for topics: who may use a route is decided by its handler.
    ///
    /// An error of the handler's becomes the answer while no stream is open: 400 for
    /// [`InvalidInput`](io::ErrorKind::InvalidInput), with its text, so that a handler can return the errors of
    /// [`Request::text`] and of the [hub](Server::hub); what the hub says when it has no room or is stopping, 503 or
    /// 507; any other 500, and its text stands only in the log. So does a panic's.
    ///
    /// The handler runs on a thread of the server's, beside those of other connections. Its stack has 128 KiB: what is
    /// large belongs on the heap. Until it answers or opens a stream it takes part in the threads that read requests
    /// (half of [`Config::threads`](crate::Config::threads)), and may lose its connection to a newcomer when all are
    /// taken; once it has a stream, in those of handlers (a quarter). A page that finds none free is told when to come
    /// back.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) for a path that does not begin with a slash, that is the server's
    /// own, or that has control characters, `?` or `#` in it.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Answer, Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.route("GET /rooms/", |request| request.follow([request.rest()]))?;
    /// server.route("POST /rooms/", |request| {
    ///     let id = request.hub().publish(request.rest(), Event::new(request.text()?))?;
    ///     Ok(Answer::text(201, id))
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn route<H>(&self, route: &str, handler: H) -> io::Result<()>
    where
        H: Fn(&Request) -> io::Result<Answer> + Send + Sync + 'static,
    {
        let (method, path) = split_method(route);
        self.add(path, method, Kind::Own, handler)
    }

    /// Answers `GET path` with these bytes: a page, a script, a small answer of one's own. Other sites may not show it
    /// in a frame.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) for a path that is not allowed, as for [`Server::route`]; and for
    /// what is no content type.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.page("/", "text/html; charset=utf-8", "<!doctype html><title>hello</title>")?;
    /// server.page("/dot.svg", "image/svg+xml", "<svg xmlns='http://www.w3.org/2000/svg'><circle r='9'/></svg>")?;
    /// # Ok(()) }
    /// ```
    pub fn page(&self, path: &str, content_type: &str, body: impl Into<Vec<u8>>) -> io::Result<()> {
        check_content_type(content_type)?;
        let (content_type, body): (String, Arc<[u8]>) = (content_type.into(), body.into().into());
        self.add(path, Some("GET"), Kind::Page, move |_| {
            // In a frame of another site, a page that publishes could be made to take a click not meant for it.
            Ok(Answer::shared(200, content_type.clone(), body.clone()).field("X-Frame-Options", "SAMEORIGIN"))
        })
    }

    /// Answers `GET path` with a stream that `handler` writes, until it returns or the page closes. Where
    /// [`subscribe_tokens`](crate::Config::subscribe_tokens) are set, one of them must be shown, as for topics. For all
    /// else it is a [route](Server::route) whose handler [opens a stream](Request::stream) at once.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) for a path that is not allowed, as for [`Server::route`].
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # use std::time::Duration;
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.stream("/clock", |stream| {
    ///     for tick in 0.. {
    ///         stream.send(&Event::new(tick.to_string()))?;
    ///         stream.sleep(Duration::from_secs(1))?; // ends at once when the page is closed
    ///     }
    ///     Ok(())
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn stream<H>(&self, path: &str, handler: H) -> io::Result<()>
    where
        H: Fn(&mut Stream) -> io::Result<()> + Send + Sync + 'static,
    {
        self.add(path, Some("GET"), Kind::Stream, move |request| {
            handler(&mut request.stream()?).map(|()| Answer::ended())
        })
    }

    fn add<H>(&self, path: &str, method: Option<&'static str>, kind: Kind, handler: H) -> io::Result<()>
    where
        H: Fn(&Request) -> io::Result<Answer> + Send + Sync + 'static,
    {
        self.handle.shared.routes.add(path, Route { method, kind, handler: Arc::new(handler) })
    }

    /// Calls `hook` for each subscriber of topics that comes over the network, and again when it has gone, with the
    /// reason. One call comes after another, in the order in which it happened, on a thread of its own and with no lock
    /// held: so the hook may take its time, publish, and panic. While 1,024 calls wait, pages that come are told to
    /// come back later.
    ///
    /// # Errors
    /// There is a hook already ([`AlreadyExists`](io::ErrorKind::AlreadyExists)); or no thread can be started.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let hub = server.hub();
    /// server.on_subscription(move |presence| {
    ///     let what = if presence.ended.is_some() { "left" } else { "came" };
    ///     let _ = hub.publish("lobby", Event::new(format!("{} {what}", presence.peer)));
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn on_subscription(&self, hook: impl Fn(&Presence) + Send + 'static) -> io::Result<()> {
        self.handle.shared.streams.core.presence.set(hook)
    }
}
