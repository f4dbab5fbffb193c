//! What each request gets.
//!
//! Never strand a browser: an `EventSource` gives up for good on any answer but 200 ([the
//! standard](https://html.spec.whatwg.org/multipage/server-sent-events.html#sse-processing-model)). So where there is
//! no room for a stream, it is opened all the same, told when to come back, and ended (`conversation.rs`). Only what
//! will not mend by itself, such as a path that does not exist or a query that cannot be read, is refused for good.
//! Whatever answers a request passes through here, so hosts, origins and tokens are checked here, before anything else
//! is done.

use crate::connection::STOPPING;
use crate::cursor::Start;
use crate::door::Door;
use crate::history::{TopicOverview, Totals};
use crate::hub::Hub;
use crate::log::OncePerSecond;
use crate::metrics::{self, Gauges};
use crate::names::topic_names;
use crate::places::Counts;
use crate::pool::Threads;
use crate::publishing::Publishing;
use crate::reader::Reader;
use crate::request::Request;
use crate::response::{Response, decline};
use crate::stream::{Handled, Handler};
use crate::subscription::{POLL_TIME, Streams, Wanted};
use crate::sync::enter;
use crate::target::CURSOR_PARAMETERS;
use crate::text::{invalid, parse_duration, quoted, skip_space, skip_token};
use std::fmt::Write;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

/// Where the topics are; programs' own paths may not begin with it.
const EVENTS: &str = "/events/";
const READ_METHODS: &str = "GET, HEAD, OPTIONS";
const TOPIC_METHODS: &str = "GET, HEAD, POST, PUT, DELETE, OPTIONS";
/// What a stream's query may say, beside the cursor.
const STREAM_PARAMETERS: [&str; 2] = ["since", "poll"];
/// Other paths of the server's own.
const OWN_PATHS: [&str; 3] = ["/health", "/metrics", "/topics"];

/// What a program has put at a path of its own.
#[derive(Clone)]
pub enum Route {
    /// Of this content type, and with this body.
    Page(String, Arc<[u8]>),
    /// Called once for each stream, on the stream's thread, so by several at the same time.
    Stream(Arc<Handler>),
}

/// What a request gets: a response now, or a stream.
pub enum Reply {
    Response(Response),
    /// From here on the request and its buffers are not needed any more, so their memory is given up before it is
    /// served.
    Stream(Source),
}

/// Where the events of a stream come from.
pub enum Source {
    Topics(Wanted),
    Handler(Handled),
}

impl Source {
    pub fn is_handler(&self) -> bool {
        matches!(self, Source::Handler(_))
    }
}

/// Shared by all connections.
pub struct Routes {
    pub door: Door,
    publishing: Publishing,
    streams: Arc<Streams>,
    /// The program's routes by their paths: few, so a list is searched. Locked shortly, and under no other lock.
    table: Mutex<Vec<(String, Route)>>,
    /// Publishers that are refused in a flood must not hide other warnings.
    refusals: OncePerSecond,
}

impl Routes {
    pub fn new(hub: Hub, door: Door, streams: Arc<Streams>) -> Routes {
        let publishing = Publishing { hub, places: streams.places.clone() };
        Routes { door, publishing, streams, table: Mutex::default(), refusals: OncePerSecond::default() }
    }

    /// Adds what is at a path, or replaces it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](io::ErrorKind::InvalidInput) for a path or a content type that may not be.
    pub fn add(&self, path: &str, route: Route) -> io::Result<()> {
        if !path.starts_with('/') {
            return invalid(format!("{} cannot be routed: begin it with a slash", quoted(path)));
        }
        if path.starts_with(EVENTS) || OWN_PATHS.contains(&path) {
            return invalid(format!("{} cannot be routed: it is the server's own; choose another", quoted(path)));
        }
        if let Some(c) = path.chars().find(|c| c.is_control() || "?#".contains(*c)) {
            return invalid(format!("{} cannot be routed: no path has {c:?}", quoted(path)));
        }
        if let Route::Page(content_type, _) = &route
            && !is_content_type(content_type)
        {
            return invalid(format!("{} is no content type: write text/html; charset=utf-8", quoted(content_type)));
        }
        let mut table = enter(&self.table);
        table.retain(|(known, _)| known != path);
        table.push((path.into(), route));
        Ok(())
    }

    /// Checks a request, reads its body, does what it asks, and says what it gets.
    ///
    /// # Errors
    /// A refusal is a response, too; it says whether the connection goes on.
    pub fn reply(&self, reader: &mut Reader, request: &mut Request) -> Result<Reply, Response> {
        self.door.check_host(request)?;
        let path = request.path.clone();
        let Some(allow) = self.methods_of(&path) else {
            return decline(404, format!("there is nothing at {}: topics are at /events/NAME", quoted(&path)));
        };
        match (request.method.as_str(), path.strip_prefix(EVENTS)) {
            // Before any token is looked at: browsers send none with a preflight. The door adds what it allows.
            ("OPTIONS", _) => Ok(Reply::Response(Response::text(204, "").field("Allow", allow))),
            ("POST" | "PUT" | "DELETE", Some(topics)) => {
                let published = self.publish(reader, request, topics);
                published.inspect_err(|refusal| self.note_refusal(reader, refusal)).map(Reply::Response)
            }
            ("GET" | "HEAD", Some(names)) => {
                self.door.check_subscriber(request)?;
                // A GET may have a body, which means nothing (RFC 9110 §9.3.1), but has to be out of the way.
                request.read_body(reader, &self.streams.core.config, false)?;
                Ok(Reply::Stream(Source::Topics(wanted_topics(request, names)?)))
            }
            ("GET" | "HEAD", None) => self.get(reader, request, &path),
            // A known method that is not for this path is 405, an unknown one 501 (RFC 9110 §9.1).
            (method @ ("POST" | "PUT" | "DELETE" | "PATCH" | "TRACE"), _) => {
                let reason = format!("{method} is not for {}: use one of {allow}", quoted(&path));
                Err(Response::text(405, reason).field("Allow", allow))
            }
            (method, _) => decline(501, format!("the method {} is not known", quoted(method))),
        }
    }

    /// Who may publish, and so delete, is decided before anything of the body is read.
    fn publish(&self, reader: &mut Reader, request: &mut Request, topics: &str) -> Result<Response, Response> {
        self.door.check_origin(request)?;
        self.door.check_publisher(request)?;
        if self.door.knows_publishers() {
            self.streams.places.trust(reader.c); // only where tokens exist: else everybody would be trusted
        }
        match request.method.as_str() {
            "POST" => self.publishing.post(reader, request, topics),
            "PUT" => self.publishing.put(reader, request, topics),
            _ => self.publishing.delete(reader, request, topics),
        }
    }

    /// A page, a handler's stream or one of `OWN_PATHS`; `path` is known to be one of them.
    fn get(&self, reader: &mut Reader, request: &mut Request, path: &str) -> Result<Reply, Response> {
        // Cloned, so that the table is not locked while a body is read or a page is sent.
        let route = enter(&self.table).iter().find(|(known, _)| known == path).map(|(_, route)| route.clone());
        if ["/metrics", "/topics"].contains(&path) || matches!(route, Some(Route::Stream(_))) {
            self.door.check_subscriber(request)?;
        }
        request.read_body(reader, &self.streams.core.config, false)?;
        Ok(match route {
            Some(Route::Stream(handler)) => {
                let (query, last_event_id) = (std::mem::take(&mut request.query), request.last_event_id.take());
                Reply::Stream(Source::Handler(Handled { handler, query, last_event_id }))
            }
            Some(Route::Page(content_type, body)) => {
                // In a frame of another site, a page that publishes could be made to take a click not meant for it.
                Reply::Response(Response::new(200, content_type, body).field("X-Frame-Options", "SAMEORIGIN"))
            }
            None if path == "/metrics" => {
                Reply::Response(Response::new(200, "text/plain; version=0.0.4", self.metrics().into_bytes()))
            }
            None if path == "/topics" => {
                Reply::Response(Response::new(200, "text/plain; charset=utf-8", self.topics()))
            }
            // From here on it is `/health`. 503 tells a load balancer to send nobody else here; streams go on all the
            // same.
            None if self.streams.core.is_stopping() => Reply::Response(self.publishing.unavailable(STOPPING)),
            None if self.streams.core.is_journal_failing() => {
                Reply::Response(self.publishing.unavailable("the journal cannot be written, so nothing is published"))
            }
            None => Reply::Response(Response::text(200, "ok")),
        })
    }

    /// Counts and logs a publisher that was refused: its operator should learn of it here, too.
    fn note_refusal(&self, reader: &Reader, refusal: &Response) {
        self.streams.core.counters.refused.fetch_add(1, Relaxed);
        let line = format_args!("{} could not publish: {} {}", reader.c.peer, refusal.status, refusal.reason());
        self.streams.log.warn_within(&self.refusals, line);
    }

    /// The methods that a path takes, for `Allow`; none where there is nothing.
    fn methods_of(&self, path: &str) -> Option<&'static str> {
        match path {
            _ if path.starts_with(EVENTS) || path == "*" => Some(TOPIC_METHODS),
            _ if OWN_PATHS.contains(&path) => Some(READ_METHODS),
            _ => enter(&self.table).iter().any(|(known, _)| known == path).then_some(READ_METHODS),
        }
    }

    /// A line for each topic that is in use, in columns for `cut` and `column -t`; where no event is kept, `-` stands for
    /// the newest one's id.
    fn topics(&self) -> Vec<u8> {
        let mut lines = String::from("name\tsubscribers\tevents\tbytes\tnewest\n");
        for TopicOverview { name, subscribers, events, bytes, newest } in self.streams.core.topics() {
            let newest = newest.map_or("-".into(), |id| id.to_string());
            let _ = writeln!(lines, "{name}\t{subscribers}\t{events}\t{bytes}\t{newest}");
        }
        lines.into_bytes()
    }

    /// The gauges are taken one after another, each under its own lock.
    fn metrics(&self) -> String {
        let Counts { idle, busy, trusted, topics: subscribers, handlers } = self.streams.places.counts();
        let Threads { threads, behind, queued } = self.streams.pool.threads();
        let Totals { topics, events, bytes } = self.streams.core.history().totals();
        let gauges = Gauges {
            subscribers: subscribers + handlers,
            // Whoever changes hands between two of these counts is counted as live.
            live: subscribers.saturating_sub(behind + queued),
            behind,
            queued,
            threads,
            connections: idle + busy + trusted,
            topics,
            kept_events: events,
            kept_bytes: bytes,
        };
        metrics::render(&gauges, &self.streams.core.counters)
    }
}

/// `type "/" subtype`, and perhaps parameters (RFC 9110 §8.3.1). It goes into a head, so it must not contain a line
/// break.
fn is_content_type(text: &str) -> bool {
    let subtype = skip_token(text).and_then(|rest| rest.strip_prefix('/'));
    let parameters = subtype.and_then(skip_token).map(skip_space);
    text.chars().all(|c| c.is_ascii_graphic() || c == ' ')
        && parameters.is_some_and(|rest| rest.is_empty() || rest.starts_with(';'))
}

/// What a request for a stream of these topics wants.
///
/// # Errors
/// 400 for a parameter that is not known, and for a topic, a time or a `since` that cannot be read. A cursor that cannot be read is no error: it gets a gap.
pub fn wanted_topics(request: &Request, list: &str) -> Result<Wanted, Response> {
    let query = &request.query;
    query.check(&[&STREAM_PARAMETERS[..], &CURSOR_PARAMETERS[..]].concat())?;
    let poll = match query.get("poll") {
        None => None,
        Some("") => Some(POLL_TIME),
        Some(time) => Some(parse_duration(time).map_err(|error| Response::text(400, error))?),
    };
    let since = match query.get("since") {
        None => Start::Now,
        Some("earliest") => Start::Earliest,
        Some(text) => match (parse_duration(text), text.parse()) {
            // A time needs its unit, so that `10` is an id and `10s` is not.
            (Ok(time), _) => Start::Ago(time),
            (_, Ok(id)) => Start::After(Some(id)),
            _ => return decline(400, format!("since is earliest, a time such as 10m, or an id; not {}", quoted(text))),
        },
    };
    // `since` is in the page's URL for good; a browser that reconnects adds its cursor, which is newer and wins.
    // An empty cursor says that the client has seen no id yet.
    let parameters = CURSOR_PARAMETERS.iter().filter_map(|name| query.get(name));
    let cursor = request.last_event_id.as_deref().into_iter().chain(parameters).find(|text| !text.is_empty());
    let start = cursor.map_or(since, |text| Start::After(text.parse().ok()));
    let names = topic_names(list).map_err(|error| Response::text(400, error))?;
    Ok(Wanted { names, start, poll })
}
