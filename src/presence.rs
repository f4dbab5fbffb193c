//! Tells the program of subscribers that come and go.
//!
//! The program's hook may take its time, publish, or panic; so it is called with no lock held, never from a lane, and what
//! it panics with ends here.

use crate::connection::Reason;
use crate::sync::enter;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

/// A subscriber of topics that has come, or gone: see [`Server::on_subscription`](crate::Server::on_subscription).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Presence<'a> {
    /// The topics that it follows, each once.
    pub topics: &'a [Arc<str>],
    /// The other end's address; behind a proxy, the proxy's. Together with the port it names one subscription.
    pub peer: SocketAddr,
    /// Why it has ended, in the log's words; None where it begins.
    pub ended: Option<Reason>,
}

type Hook = dyn Fn(&Presence) + Send + Sync;

/// The program's hook, if it has set one.
#[derive(Default)]
pub struct PresenceHook(Mutex<Option<Arc<Hook>>>);

impl PresenceHook {
    pub fn set(&self, hook: impl Fn(&Presence) + Send + Sync + 'static) {
        *enter(&self.0) = Some(Arc::new(hook));
    }

    /// Lets go of the hook, which may hold a hub, and so what holds the hook.
    pub fn clear(&self) {
        *enter(&self.0) = None;
    }

    /// Calls the hook: once when a subscription begins, once with the reason when it ends. No lock may be held.
    pub fn tell(&self, topics: &[Arc<str>], peer: SocketAddr, ended: Option<Reason>) {
        let hook = enter(&self.0).clone(); // given up before the call: the hook may set another
        if let Some(hook) = hook {
            let _ = catch_unwind(AssertUnwindSafe(|| hook(&Presence { topics, peer, ended })));
        }
    }
}
