//! What each request gets.
//!
//! Never strand a browser: an `EventSource` gives up for good on any answer but 200 ([the
//! standard](https://html.spec.whatwg.org/multipage/server-sent-events.html#sse-processing-model)). So where there is
//! no room for a stream, it is opened all the same, told when to come back, and ended (`conversation.rs`). Only what
//! will not mend by itself, such as a path that does not exist or a query that cannot be read, is refused for good.
//! Whatever answers a request passes through here, so hosts, origins and tokens are checked here, before anything else
//! is done.

use crate::asked::Parts;
use crate::connection::STOPPING;
use crate::cursor::Start;
use crate::door::Door;
use crate::handler::{Handled, Handler};
use crate::history::{TopicOverview, Totals};
use crate::hub::Hub;
use crate::log::OncePerSecond;
use crate::metrics::{self, Gauges};
use crate::names::{check_topic, topic_names};
use crate::places::Counts;
use crate::pool::Threads;
use crate::publishing::Publishing;
use crate::reader::Reader;
use crate::request::Request;
use crate::response::{Response, decline};
use crate::rights::{ALL, Act};
use crate::subscription::Streams;
use crate::sync::enter;
use crate::target::CURSOR_PARAMETERS;
use crate::text::{invalid, quoted};
use crate::wanted::{STREAM_PARAMETERS, Wanted};
use std::borrow::Cow;
use std::fmt::Write;
use std::io::{self, ErrorKind};
use std::mem;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

/// Where the topics are; programs' own paths may not begin with it.
const EVENTS: &str = "/events/";
const READ_METHODS: &str = "GET, HEAD, OPTIONS";
const TOPIC_METHODS: &str = "GET, HEAD, POST, PUT, DELETE, OPTIONS";
const PROGRAM_METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";
/// What a program's route may be for. HEAD goes where GET does, and OPTIONS is answered without the program.
const ROUTE_METHODS: [&str; 5] = ["GET", "POST", "PUT", "PATCH", "DELETE"];
/// Where a query may hold a token (RFC 6750 §2.3).
const QUERY_TOKEN: &str = "access_token";
/// Other paths of the server's own.
const OWN_PATHS: [&str; 3] = ["/health", "/metrics", "/topics"];

/// What a program has put at a path of its own.
#[derive(Clone)]
pub struct Route {
    /// The one method that it is for; None for all.
    pub method: Option<&'static str>,
    pub kind: Kind,
    /// Called once for each request, on its connection's thread, so by several at the same time.
    pub handler: Arc<Handler>,
}

/// What is checked before a program's handler is called. Hosts always are, and so is the origin of whatever is not only
/// read: a foreign page must not act in the name of its visitor, and no session cookie keeps it from that.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes for everybody.
    Page,
    /// A stream: with a token where topics need one to be read.
    Stream,
    /// The rest is the program's decision, also who may ask.
    Own,
}

/// What a request gets: a response now, a stream of topics, or what a handler makes of it.
pub enum Reply {
    Response(Response),
    /// From here on the request and its buffers are not needed any more, so their memory is given up before it is
    /// served.
    Topics(Wanted),
    Handler(Handled),
}

/// Shared by all connections.
pub struct Routes {
    pub door: Arc<Door>,
    publishing: Publishing,
    streams: Arc<Streams>,
    /// The program's routes by their paths: few, so a list is searched. Locked shortly, and under no other lock.
    table: Mutex<Vec<(String, Route)>>,
    /// Publishers that are refused in a flood must not hide other warnings.
    refusals: OncePerSecond,
}

impl Routes {
    pub fn new(hub: Hub, door: Arc<Door>, streams: Arc<Streams>) -> Routes {
        let publishing = Publishing { hub, places: streams.places.clone() };
        Routes { door, publishing, streams, table: Mutex::default(), refusals: OncePerSecond::default() }
    }

    /// Adds what is at a path for a method, or replaces it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a path that is not allowed.
    pub fn add(&self, path: &str, route: Route) -> io::Result<()> {
        if !path.starts_with('/') {
            let methods = ROUTE_METHODS.join(", ");
            let right = format!("begin it with a slash, or with one of {methods}, a space and a slash");
            return invalid(format!("{} cannot be routed: {right}", quoted(path)));
        }
        if is_servers(path) {
            return invalid(format!("{} cannot be routed: it is the server's own; choose another", quoted(path)));
        }
        if let Some(c) = path.chars().find(|c| c.is_control() || "?#".contains(*c)) {
            return invalid(format!("{} cannot be routed: no path has {c:?}", quoted(path)));
        }
        let mut table = enter(&self.table);
        table.retain(|(known, there)| known != path || there.method != route.method);
        table.push((path.into(), route));
        Ok(())
    }

    /// What a program has put at a path, a route for each method or one for all, and where in the path begins what
    /// follows them. The longest that fits counts: a whole path before any that ends in a slash. Cloned, so that the
    /// table is not locked while a handler runs.
    fn find(&self, path: &str) -> (Vec<Route>, usize) {
        let is_above = |known: &str, kind: Kind| kind == Kind::Own && known.ends_with('/') && path.starts_with(known);
        if is_servers(path) {
            return (Vec::new(), 0);
        }
        let table = enter(&self.table);
        let fits = |(known, route): &&(String, Route)| known == path || is_above(known, route.kind);
        let longest = table.iter().filter(fits).map(|(known, _)| known.len()).max().unwrap_or(0);
        let fitting = table.iter().filter(fits).filter(|(known, _)| known.len() == longest);
        (fitting.map(|(_, route)| route.clone()).collect(), longest)
    }

    /// Checks a request, reads its body, does what it asks, and says what it gets.
    ///
    /// # Errors
    /// A refusal is a response, too; it says whether the connection goes on.
    pub fn reply(&self, reader: &mut Reader, request: &mut Request) -> Result<Reply, Response> {
        self.door.check_host(request, &reader.c.socket)?;
        let path = request.path.clone();
        let (own, rest_at) = self.find(&path);
        let Some(allow) = methods_of(&path, &own) else {
            return decline(404, format!("there is nothing at {}: topics are at /events/NAME", quoted(&path)));
        };
        let is_allowed = request.method != "OPTIONS" && allow.split(", ").any(|method| method == request.method);
        let fitting = own.into_iter().filter(|route| is_allowed && is_for(route, &request.method));
        if let Some(route) = fitting.max_by_key(|route| route.method.is_some()) {
            return self.call(reader, request, route, rest_at);
        }
        match (request.method.as_str(), path.strip_prefix(EVENTS)) {
            // Before any token is looked at: browsers send none with a preflight. The door adds what it allows.
            ("OPTIONS", _) => Ok(Reply::Response(Response::new(204, "", []).field("Allow", allow))),
            ("POST" | "PUT" | "DELETE", Some(topics)) => {
                let published = self.publish(reader, request, topics);
                published.inspect_err(|refusal| self.note_refusal(reader, refusal)).map(Reply::Response)
            }
            ("GET" | "HEAD", Some(list)) => {
                self.take_query_token(request);
                self.door.check_presented(Act::Subscribe, request)?;
                let wanted = wanted_topics(request, list)?;
                self.check_stream(reader, request, &wanted.names)?;
                // A GET may have a body, which means nothing (RFC 9110 §9.3.1), but has to be out of the way.
                request.read_body(reader, &self.streams.core.config, false)?;
                Ok(Reply::Topics(wanted))
            }
            ("GET" | "HEAD", None) if OWN_PATHS.contains(&path.as_str()) => self.get(reader, request, &path),
            // A known method that is not for this path is 405, an unknown one 501 (RFC 9110 §9.1).
            (method @ ("GET" | "HEAD" | "POST" | "PUT" | "DELETE" | "PATCH" | "TRACE"), _) => {
                let reason = format!("{method} is not for {}: use one of {allow}", quoted(&path));
                Err(Response::text(405, reason).field("Allow", allow))
            }
            (method, _) => decline(501, format!("the method {} is not known", quoted(method))),
        }
    }

    /// Who may publish, and so delete, is decided before anything of the body is read.
    fn publish(&self, reader: &mut Reader, request: &mut Request, topics: &str) -> Result<Response, Response> {
        self.door.check_origin(request)?;
        self.door.check_presented(Act::Publish, request)?;
        let names = match request.method.as_str() {
            "POST" => topic_names(topics),
            _ => check_topic(topics).map(|()| vec![topics.into()]),
        };
        let names = names.map_err(|error| Response::text(400, error))?;
        // Asked again before anything is published: a body may take a while, a `PUT` days.
        let tokens = mem::take(&mut request.tokens);
        let check = || self.door.check_right(Act::Publish, &tokens, &names);
        check()?;
        if self.door.needs_token(Act::Publish) {
            self.streams.places.trust(reader.c); // only where tokens exist: else everybody would be trusted
        }
        match request.method.as_str() {
            "POST" => self.publishing.post(reader, request, &names, &check),
            "PUT" => self.publishing.put(reader, request, &names[0], &check),
            _ => self.publishing.delete(reader, request, &names[0], &check),
        }
    }

    /// Reads all of a request that is the program's to answer.
    fn call(
        &self,
        reader: &mut Reader,
        request: &mut Request,
        route: Route,
        rest_at: usize,
    ) -> Result<Reply, Response> {
        if !["GET", "HEAD"].contains(&request.method.as_str()) {
            self.door.check_origin(request)?;
        }
        self.take_query_token(request);
        if route.kind == Kind::Stream {
            self.door.check_presented(Act::Subscribe, request)?;
            self.check_stream(reader, request, &[ALL.into()])?;
        }
        // A GET may have a body, which means nothing (RFC 9110 §9.3.1), but has to be out of the way.
        let body = request.read_body(reader, &self.streams.core.config, route.kind == Kind::Own)?;
        let parts = Parts {
            method: request.method.clone(),
            path: request.path.clone(),
            rest_at,
            last_event_id: cursor_of(request).map(String::from),
            query: mem::take(&mut request.query),
            fields: mem::take(&mut request.fields),
            tokens: mem::take(&mut request.tokens),
            body,
        };
        Ok(Reply::Handler(Handled { handler: route.handler, parts }))
    }

    /// One of `OWN_PATHS`.
    fn get(&self, reader: &mut Reader, request: &mut Request, path: &str) -> Result<Reply, Response> {
        if ["/metrics", "/topics"].contains(&path) {
            self.take_query_token(request);
            self.door.check_reader(request)?;
        }
        request.read_body(reader, &self.streams.core.config, false)?;
        Ok(Reply::Response(if path == "/metrics" {
            Response::new(200, "text/plain; version=0.0.4", self.metrics().into_bytes())
        } else if path == "/topics" {
            Response::new(200, "text/plain; charset=utf-8", self.topics())
        } else if self.streams.core.is_stopping() {
            // 503 tells a load balancer to send nobody else here; streams go on all the same.
            self.publishing.unavailable(STOPPING)
        } else if self.streams.core.is_journal_failing() {
            self.publishing.unavailable("the journal cannot be written, so nothing is published")
        } else {
            Response::text(200, "ok")
        }))
    }

    /// The answer to a handler's error. The hub's own errors are answered as those of a `POST` are; another says what
    /// is wrong with the program, which is for its log and not for the peer.
    pub fn failed(&self, error: &io::Error) -> Response {
        use ErrorKind::{InvalidInput, NotConnected, QuotaExceeded, ResourceBusy, StorageFull};
        match error.kind() {
            InvalidInput | NotConnected | QuotaExceeded | ResourceBusy | StorageFull
                if error.raw_os_error().is_none() =>
            {
                self.publishing.not_published(error)
            }
            _ => Response::text(500, "the program failed to answer; its log, if it has one, says why"),
        }
    }

    /// Whether a stream may be opened.
    fn check_stream(&self, reader: &Reader, request: &Request, topics: &[String]) -> Result<(), Response> {
        self.door.note_pass(&mut enter(&reader.c.state), &request.tokens, topics);
        let checked = self.door.check_right(Act::Subscribe, &request.tokens, topics);
        checked.inspect_err(|_| self.door.forget_pass(&mut enter(&reader.c.state)))
    }

    /// Takes `access_token` out of the query, where tokens may stand there: nobody else needs to see it.
    fn take_query_token(&self, request: &mut Request) {
        if self.streams.core.config.query_tokens {
            let all = mem::take(&mut request.query.0);
            let (tokens, others): (Vec<_>, _) = all.into_iter().partition(|(name, _)| name == QUERY_TOKEN);
            request.query.0 = others;
            request.tokens.extend(tokens.into_iter().map(|(_, token)| token).take(1));
        }
    }

    /// Counts and logs a publisher that was refused: its operator should learn of it here, too.
    fn note_refusal(&self, reader: &Reader, refusal: &Response) {
        self.streams.core.counters.refused.fetch_add(1, Relaxed);
        let line = format_args!("{} could not publish: {} {}", reader.c.peer, refusal.status, refusal.reason());
        self.streams.log.warn_within(&self.refusals, line);
    }

    /// A line for each topic that is in use, in columns for `cut` and `column -t`; where no event is kept, `-` stands
    /// for the newest one's id.
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

/// Whether a path is the server's own, which no program's route takes over.
fn is_servers(path: &str) -> bool {
    path.starts_with(EVENTS) || OWN_PATHS.contains(&path)
}

/// Takes the method off the front of what a program routes, such as `POST /jobs`.
pub fn split_method(route: &str) -> (Option<&'static str>, &str) {
    let split = |method| Some((Some(method), route.strip_prefix(method)?.strip_prefix(' ')?));
    ROUTE_METHODS.into_iter().find_map(split).unwrap_or((None, route))
}

/// Whether a route takes this method.
fn is_for(route: &Route, method: &str) -> bool {
    let method = if method == "HEAD" { "GET" } else { method };
    route.method.is_none_or(|own| own == method)
}

/// The methods that a path takes, for `Allow`; none where there is nothing. `own` is what the program has put there.
fn methods_of(path: &str, own: &[Route]) -> Option<Cow<'static, str>> {
    if path.starts_with(EVENTS) || path == "*" {
        return Some(TOPIC_METHODS.into());
    } else if OWN_PATHS.contains(&path) {
        return Some(READ_METHODS.into());
    } else if own.is_empty() {
        return None;
    }
    let is_taken = |method: &&str| *method == "OPTIONS" || own.iter().any(|route| is_for(route, method));
    Some(PROGRAM_METHODS.split(", ").filter(is_taken).collect::<Vec<_>>().join(", ").into())
}

/// What a request for a stream of these topics wants.
///
/// # Errors
/// 400 for a parameter that is not known, for a topic, and for what [`Wanted::read`] cannot read.
pub fn wanted_topics(request: &Request, list: &str) -> Result<Wanted, Response> {
    request.query.check(&[&STREAM_PARAMETERS[..], &CURSOR_PARAMETERS[..]].concat())?;
    let wanted =
        topic_names(list).and_then(|names| Wanted::read(names, &request.query, cursor_of(request), Start::Now));
    wanted.map_err(|error| Response::text(400, error))
}

/// After which event to resume. An empty one says that the client has seen no id yet.
fn cursor_of(request: &Request) -> Option<&str> {
    let parameters = CURSOR_PARAMETERS.iter().filter_map(|name| request.query.get(name));
    request.last_event_id.as_deref().into_iter().chain(parameters).find(|text| !text.is_empty())
}
