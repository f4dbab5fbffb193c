//! Who may do what: hosts, origins, tokens.
//!
//! A browser sends requests for every page that it shows, from inside the user's own network. So a page from anywhere
//! could publish to a server that its author cannot reach; or its author could have a name of theirs resolved to the
//! server's address (DNS rebinding), and the page would read as if it came from there. Therefore a page of another
//! origin may publish only where that is allowed, and a server on loopback answers only to names that it knows. What
//! does not come from a browser has no origin: against that, only tokens help.

use crate::authority::{covers, covers_host, is_authority, is_loopback, is_loopback_address, split_port};
use crate::config::{Config, Token};
use crate::connection::{State, WITHDRAWN};
use crate::request::Request;
use crate::response::{Response, decline, refuse};
use crate::rights::{ALL, Act, Pass, Rights};
use crate::sync::{Mutex, enter};
use crate::text::quoted;
use std::mem::replace;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

/// Set at the start, but for the rights of the tokens' file.
pub struct Door {
    /// The port, if the server listens on loopback only. Elsewhere it cannot know its own names.
    loopback_port: Option<u16>,
    /// The program accepts: each connection is asked whether it came over loopback.
    is_handed_in: bool,
    /// As `Config::allow_origins` has them, `*` included.
    origins: Vec<String>,
    /// Without any, and without a tokens' file, everybody may publish.
    publish_tokens: Vec<Token>,
    /// Without any, and without a tokens' file, everybody may read.
    subscribe_tokens: Vec<Token>,
    /// As the tokens' file has them now, if there is one. Locked shortly.
    rights: Option<Mutex<Arc<Rights>>>,
}

impl Door {
    /// `address` is where it listens; None where the program accepts.
    pub fn new(config: &Config, rights: Option<Rights>, address: Option<SocketAddr>) -> Door {
        Door {
            loopback_port: address.filter(|address| is_loopback_address(address.ip())).map(|address| address.port()),
            is_handed_in: address.is_none(),
            origins: config.allow_origins.clone(),
            publish_tokens: config.publish_tokens.clone(),
            subscribe_tokens: config.subscribe_tokens.clone(),
            rights: rights.map(|rights| Mutex::new(Arc::new(rights))),
        }
    }

    /// From now on these are the rights of the tokens' file.
    pub fn change_rights(&self, rights: Rights) {
        if let Some(known) = &self.rights {
            let old = replace(&mut *enter(known), Arc::new(rights));
            drop(old); // without the lock: there may be hundreds of thousands
        }
    }

    /// The rights of the tokens' file, as they are now.
    pub fn rights(&self) -> Option<Arc<Rights>> {
        self.rights.as_ref().map(|rights| enter(rights).clone())
    }

    /// Whether a token must be presented.
    pub fn needs_token(&self, act: Act) -> bool {
        self.rights.is_some() || !self.tokens_for(act).is_empty()
    }

    /// 401 where a token is needed and none is presented. What else is wrong is only for those who present one.
    pub fn check_presented(&self, act: Act, request: &Request) -> Result<(), Response> {
        if !self.needs_token(act) || !request.tokens.is_empty() {
            return Ok(());
        }
        let reason =
            format!("{} needs a token: Authorization: Bearer TOKEN, or the cookie brooklet_token", name_of(act));
        Err(Response::text(401, reason).field("WWW-Authenticate", "Bearer realm=\"brooklet\""))
    }

    /// 403 where these tokens have no right to one of these topics. Whether there is such a topic or token makes no
    /// difference. Like 401, it is final: a browser does not reconnect after it.
    pub fn check_right(&self, act: Act, tokens: &[String], topics: &[String]) -> Result<(), Response> {
        match self.allows(act, tokens, topics) {
            true => Ok(()),
            false => decline(403, format!("this token is not good for {}", name_of(act))),
        }
    }

    /// Both, for what is no topic: handlers' streams, `/metrics` and `/topics` need a right to all topics.
    pub fn check_reader(&self, request: &Request) -> Result<(), Response> {
        self.check_presented(Act::Subscribe, request)?;
        self.check_right(Act::Subscribe, &request.tokens, &[ALL.into()])
    }

    /// Notes what a stream's right will rest on, before it is checked (`tokens.rs`). Only a file's rights are
    /// withdrawn.
    pub fn note_pass(&self, state: &mut State, tokens: &[String], topics: &[String]) {
        if self.rights.is_some() {
            state.pass = Some(Box::new(Pass { tokens: tokens.to_vec(), topics: topics.to_vec() }));
        }
    }

    /// No stream came of it: the connection may ask for something else.
    pub fn forget_pass(&self, state: &mut State) {
        state.pass = None;
        state.ending = state.ending.filter(|why| *why != WITHDRAWN);
    }

    /// Whether the right of a stream is gone.
    pub fn is_withdrawn(&self, state: &State) -> bool {
        let is_good = |pass: &Pass| self.allows(Act::Subscribe, &pass.tokens, &pass.topics);
        state.pass.as_ref().is_some_and(|pass| !is_good(pass))
    }

    /// All known tokens are compared, also after one fits: the time says nothing about which.
    fn allows(&self, act: Act, presented: &[String], topics: &[String]) -> bool {
        let known = self.tokens_for(act);
        let fitting = |presented: &String| known.iter().filter(|token| token.is(presented)).count();
        if !self.needs_token(act) || presented.iter().map(fitting).sum::<usize>() > 0 {
            return true;
        }
        self.rights().is_some_and(|rights| rights.allow(act, presented, topics))
    }

    fn tokens_for(&self, act: Act) -> &[Token] {
        match act {
            Act::Publish => &self.publish_tokens,
            Act::Subscribe => &self.subscribe_tokens,
        }
    }

    /// On loopback only names of loopback are this server's, and the hosts of allowed origins, which a proxy passes on.
    /// Every request is checked, or a rebound name could read. 403 otherwise.
    pub fn check_host(&self, request: &Request, socket: &TcpStream) -> Result<(), Response> {
        let Some(host) = request.host.as_deref().map(|host| split_port(host).0) else { return Ok(()) };
        // Without its port: a proxy may pass the request on from another one.
        let names_it = |origin: &String| {
            origin.split_once("://").is_some_and(|(_, authority)| covers_host(split_port(authority).0, host))
        };
        let is_on_loopback = self.loopback_port.is_some()
            || self.is_handed_in && socket.local_addr().is_ok_and(|address| is_loopback_address(address.ip()));
        if !is_on_loopback || is_loopback(host) || self.origins.iter().any(names_it) {
            return Ok(());
        }
        let mend = "name the public origin in allow_origins (--allow-origin https://…), and pass that host on";
        refuse(403, format!("{} is not this server: behind a proxy, {mend}", quoted(host)))
    }

    /// Whether the page that sends this request may do more than read; 403 otherwise. A `POST` of plain text needs no
    /// preflight, so the browser alone would not ask (<https://fetch.spec.whatwg.org/#cors-safelisted-method>).
    pub fn check_origin(&self, request: &Request) -> Result<(), Response> {
        let Some(origin) = request.origin.as_deref() else { return Ok(()) };
        let host = request.host.as_deref().unwrap_or_default();
        let is_of_host = |known: &str| known.split_once("://").is_some_and(|(_, own)| covers(own, host));
        // A star stands for other names only where the settings have it. In what a page says of itself it is a name:
        // of somebody who has one such as `*.example.com`.
        let names_host = origin.split_once("://").is_some_and(|(_, own)| own.eq_ignore_ascii_case(host));
        // Where the public origin is named with its scheme, only that one counts: a page that came over plain HTTP
        // could have been changed on its way by anybody.
        let is_own = names_host && !self.origins.iter().any(|known| is_of_host(known));
        if is_own || self.is_allowed(origin) {
            return Ok(());
        }
        let (method, pages) = (&request.method, quoted(origin));
        decline(403, format!("pages of {pages} may not {method}: name their origin in allow_origins (--allow-origin)"))
    }

    /// The header lines, each with its CRLF, that let a page of another origin read a response:
    /// <https://fetch.spec.whatwg.org/#http-cors-protocol>. `Vary` keeps a cache from giving one origin what another
    /// was allowed.
    pub fn cors(&self, request: &Request) -> String {
        let origin = request.origin.as_deref().unwrap_or_default();
        let is_open_to_all = self.origins.iter().any(|known| known == "*");
        let asked = request.asked_fields();
        let (mut lines, methods, fields) = match (self.is_allowed(origin), is_open_to_all) {
            (true, _) => (
                format!("Access-Control-Allow-Origin: {origin}\r\nAccess-Control-Allow-Credentials: true\r\n"),
                "GET, HEAD, POST, PUT, PATCH, DELETE",
                if asked.is_empty() { "Authorization, Cache-Control, Content-Type, Last-Event-ID" } else { &asked },
            ),
            (_, true) => ("Access-Control-Allow-Origin: *\r\n".into(), "GET, HEAD", "Cache-Control, Last-Event-ID"),
            _ => return if self.origins.is_empty() { String::new() } else { "Vary: Origin\r\n".into() },
        };
        if request.method == "OPTIONS" {
            // A preflight asks for these; ten minutes, so that a change of the settings is soon seen.
            lines += &format!("Access-Control-Allow-Methods: {methods}\r\nAccess-Control-Allow-Headers: {fields}\r\n");
            lines += "Access-Control-Max-Age: 600\r\n";
            if request.asks_private_network {
                // From a page of the internet to a server of the user's own network:
                // https://wicg.github.io/private-network-access/
                lines += "Access-Control-Allow-Private-Network: true\r\n";
            }
        }
        lines + "Vary: Origin\r\n"
    }

    /// Named as allowed, or one of ours: all names of loopback at this server's own port are one origin. `*` allows
    /// nobody to publish.
    fn is_allowed(&self, origin: &str) -> bool {
        let authority = origin.strip_prefix("http://").unwrap_or_default();
        let (host, port) = split_port(authority);
        let is_ours =
            is_loopback(host) && self.loopback_port.is_some_and(|own| port.unwrap_or("80").parse() == Ok(own));
        is_ours && is_authority(host) || self.origins.iter().any(|known| known != "*" && is_of(known, origin))
    }
}

/// Whether an origin is the allowed one, or one of those that `https://*.example.com` stands for.
fn is_of(known: &str, origin: &str) -> bool {
    match (known.split_once("://"), origin.split_once("://")) {
        (Some((scheme, authority)), Some((own_scheme, own))) if authority.starts_with('*') => {
            scheme == own_scheme && covers(authority, own)
        }
        _ => known == origin,
    }
}

fn name_of(act: Act) -> &'static str {
    match act {
        Act::Publish => "publishing",
        Act::Subscribe => "reading",
    }
}
