//! Who may do what: hosts, origins, tokens.
//!
//! A browser sends requests for every page that it shows, from inside the user's own network. So a page from anywhere
//! could publish to a server that its author cannot reach; or its author could have a name of theirs resolved to the
//! server's address (DNS rebinding), and the page would read as if it came from there. Therefore a page of another
//! origin may publish only where that is allowed, and a server on loopback answers only to names that it knows. What
//! does not come from a browser has no origin: against that, only tokens help.

use crate::authority::{is_authority, is_loopback, split_port};
use crate::config::{Config, Token};
use crate::request::Request;
use crate::response::{Response, decline, refuse};
use crate::text::quoted;
use std::net::{SocketAddr, TcpStream};

/// Set at the start; every check reads it without a lock.
pub struct Door {
    /// The port, if the server listens on loopback only. Elsewhere it cannot know its own names.
    loopback_port: Option<u16>,
    /// The program accepts: each connection is asked whether it came over loopback.
    is_handed_in: bool,
    /// As `Config::allow_origins` has them, `*` included.
    origins: Vec<String>,
    /// Without any, everybody may publish.
    publish_tokens: Vec<Token>,
    /// Without any, everybody may read.
    subscribe_tokens: Vec<Token>,
}

impl Door {
    /// `address` is where it listens; None where the program accepts.
    pub fn new(config: &Config, address: Option<SocketAddr>) -> Door {
        Door {
            loopback_port: address.filter(|address| address.ip().is_loopback()).map(|address| address.port()),
            is_handed_in: address.is_none(),
            origins: config.allow_origins.clone(),
            publish_tokens: config.publish_tokens.clone(),
            subscribe_tokens: config.subscribe_tokens.clone(),
        }
    }

    /// Whether publishers must present a token.
    pub fn knows_publishers(&self) -> bool {
        !self.publish_tokens.is_empty()
    }

    /// 401 without a token, 403 with a wrong one.
    pub fn check_publisher(&self, request: &Request) -> Result<(), Response> {
        check_token(&self.publish_tokens, "publishing", request)
    }

    /// The same for streams and `/metrics`. Both are final: a browser does not reconnect after them.
    pub fn check_subscriber(&self, request: &Request) -> Result<(), Response> {
        check_token(&self.subscribe_tokens, "reading", request)
    }

    /// On loopback only names of loopback are this server's, and the hosts of allowed origins, which a proxy passes on.
    /// Every request is checked, or a rebound name could read. 403 otherwise.
    pub fn check_host(&self, request: &Request, socket: &TcpStream) -> Result<(), Response> {
        let Some(host) = request.host.as_deref().map(|host| split_port(host).0) else { return Ok(()) };
        // Without its port: a proxy may pass the request on from another one.
        let names_it = |origin: &String| {
            origin.split_once("://").is_some_and(|(_, authority)| split_port(authority).0.eq_ignore_ascii_case(host))
        };
        let is_on_loopback = self.loopback_port.is_some()
            || self.is_handed_in && socket.local_addr().is_ok_and(|address| address.ip().is_loopback());
        if !is_on_loopback || is_loopback(host) || self.origins.iter().any(names_it) {
            return Ok(());
        }
        refuse(
            403,
            format!(
                "{} is not this server: behind a proxy, name the public origin in allow_origins (--allow-origin https://…), and pass that host on",
                quoted(host)
            ),
        )
    }

    /// Whether the page that sends this request may publish; 403 otherwise. A `POST` of plain text needs no preflight,
    /// so the browser alone would not ask (<https://fetch.spec.whatwg.org/#cors-safelisted-method>).
    pub fn check_origin(&self, request: &Request) -> Result<(), Response> {
        let Some(origin) = request.origin.as_deref() else { return Ok(()) };
        let host = request.host.as_deref().unwrap_or_default();
        let is_of_host = |origin: &str| origin.split_once("://").is_some_and(|(_, own)| own.eq_ignore_ascii_case(host));
        // Where the public origin is named with its scheme, only that one counts: a page that came over plain HTTP
        // could have been changed on its way by anybody.
        let is_own = is_of_host(origin) && !self.origins.iter().any(|known| is_of_host(known));
        if is_own || self.is_allowed(origin) {
            return Ok(());
        }
        decline(
            403,
            format!("pages of {} may not publish: name them in allow_origins (--allow-origin)", quoted(origin)),
        )
    }

    /// The header lines, each with its CRLF, that let a page of another origin read a response:
    /// <https://fetch.spec.whatwg.org/#http-cors-protocol>. `Vary` keeps a cache from giving one origin what another
    /// was allowed.
    pub fn cors(&self, request: &Request) -> String {
        let origin = request.origin.as_deref().unwrap_or_default();
        let is_open_to_all = self.origins.iter().any(|known| known == "*");
        let (mut lines, methods, fields) = match (self.is_allowed(origin), is_open_to_all) {
            (true, _) => (
                format!("Access-Control-Allow-Origin: {origin}\r\nAccess-Control-Allow-Credentials: true\r\n"),
                "GET, HEAD, POST, PUT, PATCH, DELETE",
                "Authorization, Cache-Control, Content-Type, Last-Event-ID",
            ),
            (_, true) => ("Access-Control-Allow-Origin: *\r\n".into(), "GET, HEAD", "Cache-Control, Last-Event-ID"),
            _ => return if self.origins.is_empty() { String::new() } else { "Vary: Origin\r\n".into() },
        };
        if request.method == "OPTIONS" {
            // A preflight asks for these; ten minutes, so that a change of the settings is soon seen.
            lines += &format!("Access-Control-Allow-Methods: {methods}\r\nAccess-Control-Allow-Headers: {fields}\r\n");
            lines += "Access-Control-Max-Age: 600\r\n";
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
        is_ours && is_authority(host) || self.origins.iter().any(|known| known == origin && known != "*")
    }
}

/// Checks that one of these tokens is presented. All are compared, also after one fits: the time says nothing about
/// which.
fn check_token(known: &[Token], what: &str, request: &Request) -> Result<(), Response> {
    let fitting = |presented: &String| known.iter().filter(|token| token.is(presented)).count();
    if known.is_empty() || request.tokens.iter().map(fitting).sum::<usize>() > 0 {
        return Ok(());
    } else if request.tokens.is_empty() {
        let reason = format!("{what} needs a token: Authorization: Bearer TOKEN, or the cookie brooklet_token");
        return Err(Response::text(401, reason).field("WWW-Authenticate", "Bearer realm=\"brooklet\""));
    }
    decline(403, format!("this token is not good for {what}"))
}
