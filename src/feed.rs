//! What an engine shows to its server.
//!
//! A server with an [`Engine`](crate::Engine) numbers nothing: the engine shows it what all servers have published,
//! each entry with its id, in rising order. So ids never go back here. An engine whose ids may (its newest entries were
//! lost, and it numbers on from before them) must first give an id above all that it has ever shown, and say that
//! everything up to it may be missing: then each subscriber, live or not, and each client that comes back with an older
//! id, hears a gap before anything else. That is enough to start over, and no cursor has to be judged in two ways.
//!
//! A feed does not keep its server alive: a program that drops the server's handle need not think of the engine.

use crate::config::Log;
use crate::connection::STOPPING;
use crate::cursor::Start;
use crate::encoded::Parts;
use crate::engine::Entry;
use crate::event::{Event, Id};
use crate::hub::Core;
use crate::lane::Lane;
use crate::names::check_topic;
use crate::sync::{enter, wait};
use crate::text::invalid;
use crate::unwritten::Order;
use std::fmt::Display;
use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How long a client that is ahead of this server waits for the engine to show as much here. While engines keep up it
/// is some milliseconds; after this time the client is told to come back.
const REACH_TIME: Duration = Duration::from_millis(500);
/// Said to a client that is ahead for longer.
pub const NOT_REACHED: &str = "events that another server has sent have not come here yet";

/// By this an engine shows its server what was published. Cheap to clone.
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// # use brooklet::{Config, Engine, Entry, Event, Id, Server};
/// # #[derive(Default)]
/// # struct Nothing;
/// # impl Engine for Nothing {
/// #     fn publish(&self, _: &[Entry]) -> std::io::Result<Vec<Id>> { Ok(Vec::new()) }
/// #     fn newest(&self) -> std::io::Result<Id> { Ok(Id::default()) }
/// # }
/// # let engine = std::sync::Arc::new(Nothing);
/// let (server, feed) = Server::bind_with_engine("127.0.0.1:0", Config::default(), engine)?;
/// let id = |seq| Id { ms: 4_000_000_000_000, seq };
/// feed.missing_up_to(id(1))?; // what came before, this server has not seen
/// feed.show(id(2), Entry::new("news", Event::new("hello")))?;
/// assert_eq!(server.hub().newest("news")?.map(|event| event.id), Some(id(2)));
/// assert!(feed.show(id(2), Entry::new("news", Event::new("again"))).is_err()); // ids rise
/// feed.log("the engine is here"); // where `Config::log` lets it through
/// drop(server);
/// assert!(feed.is_over());
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Feed {
    pub(crate) core: Weak<Core>,
}

impl Feed {
    /// Shows an entry to the server, which keeps it and hands it to whoever follows the topic. Ids must rise from call
    /// to call; they need not follow one another. Waits while the server has too much to write.
    ///
    /// # Errors
    /// [`ErrorKind::NotConnected`](io::ErrorKind::NotConnected) once the server has stopped;
    /// [`ErrorKind::InvalidInput`](io::ErrorKind::InvalidInput) for an id that is not above the last one, and for an
    /// entry that cannot be shown, which is passed over.
    pub fn show(&self, id: Id, entry: Entry) -> io::Result<()> {
        let core = self.core()?;
        let mut order = enter(&core.turns.order); // as publishing does: ids, history and queues have one order
        advance(&core, &mut order, id)?;
        let is_forget = entry.is_forget();
        let checked = check_topic(&entry.topic).and_then(|()| entry.event.as_ref().map_or(Ok(()), Event::check));
        match entry.event.filter(|_| checked.is_ok()) {
            // It is kept nowhere, so a client of this topic that comes later has to hear of a gap; nobody follows it
            // now.
            Some(_) if core.history().check_room(&[&entry.topic]).is_err() => core.history().pass_over(id),
            Some(event) => {
                let frame = event.encode_with_id(id);
                core.hand_out(&entry.topic, &Parts::new(id, b"", frame.as_bytes()), event.key.as_deref());
            }
            // Its id counts all the same: a client that has it from another server resumes after it.
            None => core.history().reach(id),
        }
        if is_forget && checked.is_ok() {
            core.history().forget(&entry.topic, id);
            drop(order);
            core.free_forgotten();
        }
        checked
    }

    /// Says that anything up to this id may be missing, in every topic. All streams hear a gap before they go on, and
    /// so does whoever resumes from before this id. What was shown stays. Ids must rise, as for [`Feed::show`]: say it
    /// before anything above this id is shown. To repeat the last id does nothing.
    ///
    /// # Errors
    /// As for [`Feed::show`].
    pub fn missing_up_to(&self, id: Id) -> io::Result<()> {
        let core = self.core()?;
        let mut order = enter(&core.turns.order);
        if id == order.newest {
            return Ok(());
        }
        advance(&core, &mut order, id)?;
        core.history().miss_up_to(id);
        // After the history, and under the order lock, as events are. So whoever turned live before this is sent back
        // by its lane, which knows it by then; and whoever turns live after this has looked at the history after it,
        // too.
        core.lanes.iter().for_each(Lane::look);
        core.bells.ring_all();
        Ok(())
    }

    /// Whether the server has stopped, so that it need not be fed any more.
    pub fn is_over(&self) -> bool {
        self.core().is_err()
    }

    /// Writes a line to the server's log.
    pub fn log(&self, line: impl Display) {
        if let Ok(core) = self.core() {
            core.log.line(Log::Info, format_args!("{line}"));
        }
    }

    fn core(&self) -> io::Result<Arc<Core>> {
        let core = self.core.upgrade().ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, STOPPING))?;
        core.check_running().map(|()| core)
    }
}

/// Takes an id for the newest. Must be done before anything is kept or handed out under it.
fn advance(core: &Core, order: &mut Order, id: Id) -> io::Result<()> {
    core.check_running()?;
    if id <= order.newest {
        return invalid(format!("the id {id} is not above {}, which was shown before", order.newest));
    }
    order.newest = id;
    if order.waiting > 0 {
        core.turns.ended.notify_all();
    }
    Ok(())
}

/// Waits until the engine has shown all that a client which resumes from `start` may have seen: it may come from a
/// server that is ahead of this one. False where that takes too long, or the engine cannot be asked.
pub fn reach(core: &Core, start: &Start) -> bool {
    let (Some(engine), Start::After(Some(asked))) = (&core.engine, start) else { return true };
    if *asked <= enter(&core.turns.order).newest {
        return true;
    }
    let Ok(newest) = engine.newest() else { return false };
    let (goal, deadline) = (newest.min(*asked), Instant::now() + REACH_TIME);
    let mut order = enter(&core.turns.order);
    while order.newest < goal {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || core.is_stopping() {
            return false;
        }
        order.waiting += 1;
        order = wait(&core.turns.ended, order, left);
        order.waiting -= 1;
    }
    true
}
