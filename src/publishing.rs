//! Publishing over HTTP: `POST` publishes its body as one event, `PUT` every line of it as it arrives, and `DELETE`
//! makes a topic forget what was published. A `PUT` may also be an event stream, whose events are published.
//!
//! What is wrong with the query is said before the body is read: nobody should send a day's log to learn of a typing
//! error. A `PUT` cannot be undone, so an error in the middle of it says how many lines were published and which id the
//! last one has. 200 means that everything is published, and is in the journal if there is one.

use crate::connection::STOPPING;
use crate::event::{Event, Id, parse_retry};
use crate::hub::Hub;
use crate::lines::Lines;
use crate::places::Places;
use crate::reader::Reader;
use crate::relay::Relay;
use crate::request::Request;
use crate::response::Response;
use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::Arc;

/// Whether whoever publishes still may.
type Check<'a> = &'a dyn Fn() -> Result<(), Response>;

/// Waits for the next events of a body. False with the last ones.
type TakeSome<'a> = dyn FnMut(&mut Vec<Event>) -> Result<bool, Response> + 'a;

/// What all methods use. Who may publish was checked before.
pub struct Publishing {
    pub hub: Hub,
    pub places: Arc<Places>,
}

impl Publishing {
    /// Publishes the body as one event to each of some topics, all or none; the answer is a line with the id for each.
    ///
    /// # Errors
    /// 400 for a bad query or body, 408, 413; 503 or 507 where the hub has refused it.
    pub fn post(
        &self,
        reader: &mut Reader,
        request: &mut Request,
        topics: &[String],
        check: Check,
    ) -> Result<Response, Response> {
        let mut event = self.describe(request, &["event", "retry", "key"])?;
        let body =
            request.read_body(reader, &self.hub.core.config, true).map_err(|refusal| self.explain(refusal, ""))?;
        // Event streams are UTF-8 and nothing else (the standard): a page would see replacement characters.
        event.data = String::from_utf8(body).map_err(|error| {
            Response::text(400, format!("the body is not UTF-8 from byte {} on", error.utf8_error().valid_up_to()))
        })?;
        check()?;
        let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
        let ids = self.hub.core.publish_each(&topics, &event).map_err(|error| self.not_published(&error))?;
        Ok(Response::text(200, ids.iter().map(Id::to_string).collect::<Vec<_>>().join("\n")))
    }

    /// Forgets what a topic keeps.
    ///
    /// # Errors
    /// 400 for a query or a name that cannot be read; 503 or 507 where the hub has refused it.
    pub fn delete(
        &self,
        reader: &mut Reader,
        request: &mut Request,
        topic: &str,
        check: Check,
    ) -> Result<Response, Response> {
        request.query.check(&[])?;
        // As with GET, a body means nothing, but has to be out of the way (RFC 9110 §9.3.5).
        request.read_body(reader, &self.hub.core.config, false)?;
        check()?;
        // Whether anything was kept is for those who may read: to publish is enough for this.
        let forgotten = self.hub.core.forget(topic);
        forgotten.map(|_| Response::text(200, "forgotten")).map_err(|error| self.not_published(&error))
    }

    /// Publishes each line of the body, or each event of a body that is an event stream; the answer says how many, and
    /// the last id.
    ///
    /// # Errors
    /// As for [`Publishing::post`], with what was published before.
    pub fn put(
        &self,
        reader: &mut Reader,
        request: &mut Request,
        topic: &str,
        check: Check,
    ) -> Result<Response, Response> {
        let known: &[&str] = if request.is_event_stream { &[] } else { &["event", "retry"] };
        let event = self.describe(request, known)?;
        request.invite_body(reader)?;
        // Outside of the loop over the lines, since an error needs them, too.
        let (mut count, mut last) = (0, None);
        let result = self.put_all(reader, request, &event, &mut |events| {
            check()?;
            let (ids, published) = self.hub.core.publish_all(topic, events);
            count += ids.len();
            last = ids.last().copied().or(last);
            published.map_err(|error| self.not_published(&error))
        });
        let summary = format!("published {count}{}", last.map_or(String::new(), |id| format!(", last id {id}")));
        match result {
            Ok(()) => Ok(Response::text(200, summary)),
            Err(refusal) => Err(self.explain(refusal, &format!("; {summary}"))),
        }
    }

    /// All of them until the body ends or one is wrong; those before that are published.
    fn put_all(
        &self,
        reader: &mut Reader,
        request: &mut Request,
        event: &Event,
        publish: &mut dyn FnMut(Vec<Event>) -> Result<(), Response>,
    ) -> Result<(), Response> {
        let (c, config) = (reader.c, &self.hub.core.config);
        let mut take_some: Box<TakeSome> = if request.is_event_stream {
            let mut relay = Relay::new(reader, &mut request.body, config);
            Box::new(move |events| relay.take_some(events))
        } else {
            let mut lines = Lines::new(reader, &mut request.body, config);
            Box::new(move |events| lines.take_some(event, events))
        };
        loop {
            let mut events = Vec::new();
            let more = take_some(&mut events); // looked at below: what came before an error is published first
            self.places.refresh(c); // a publisher that sends is not the one to make room
            // What is left of the body is not read any more, so the connection must end.
            publish(events).map_err(|refusal| Response { close: true, ..refusal })?;
            if !more? {
                return Ok(());
            }
        }
    }

    /// The event that a request's query describes, checked; its data comes with the body. An unknown parameter is
    /// refused, or `?evnet=x` would publish something else than was meant.
    fn describe(&self, request: &Request, known: &[&str]) -> Result<Event, Response> {
        request.query.check(known)?;
        let mut event = Event::new("");
        event.name = request.query.get("event").map(String::from);
        event.key = request.query.get("key").map(String::from);
        let refuse = |error| self.not_published(&error);
        event.retry = request.query.get("retry").map(parse_retry).transpose().map_err(refuse)?;
        event.check_for_topic(&self.hub.core.config).map_err(refuse).map(|()| event)
    }

    /// The answer to an error of the hub: 400 where the request is wrong, 507 where the disk takes nothing, else 503.
    /// Only the latter two are worth another try, and say when.
    pub fn not_published(&self, error: &io::Error) -> Response {
        match error.kind() {
            ErrorKind::InvalidInput => Response::text(400, error),
            ErrorKind::StorageFull => Response { status: 507, ..self.unavailable(error) },
            _ => self.unavailable(error),
        }
    }

    /// Adds to a refusal how much was published before it.
    fn explain(&self, refusal: Response, so_far: &str) -> Response {
        // Stopping ends the reading side of the socket, which looks as if the sender had stopped in the middle.
        if self.hub.core.is_stopping() {
            return Response { close: true, ..self.unavailable(format!("{STOPPING}{so_far}")) };
        }
        Response { body: format!("{}{so_far}\n", refusal.reason()).into_bytes().into(), ..refusal }
    }

    /// 503, with the seconds after which to try again.
    pub fn unavailable(&self, reason: impl fmt::Display) -> Response {
        Response::text(503, reason).field("Retry-After", self.hub.core.config.retry.as_millis().div_ceil(1000))
    }
}
