//! What reads bytes from outside, without a server around it, for the fuzz targets. Part of the library under `cfg(fuzzing)`
//! alone. Each function panics where something does not hold.
#![allow(missing_docs)]

use crate::authority::{is_authority, is_loopback, split_port};
use crate::block::Block;
use crate::body::{Body, skip_quoted};
use crate::config::{Config, Token};
use crate::connection::Connection;
use crate::event::Id;
use crate::form::Form;
use crate::history::History;
use crate::kept::{Kept, restore};
use crate::lines::Lines;
use crate::names::{TOPICS_AT_ONCE, check_topic};
use crate::reader::Reader;
use crate::recovery::Found;
use crate::request::Request;
use crate::rewrite::Snapshot;
use crate::routes::wanted_topics;
use crate::sync::enter;
use crate::target::{Query, Target};
use crate::text::{parse_duration, skip_token};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

fn small() -> Config {
    let (head_bytes, body_bytes, line_bytes, keep_events, keep_bytes) = (2_000, 500, 300, 5, 4_000);
    let keep_age = Duration::MAX; // what is too old depends on when one looks
    Config::default().with(|config| {
        config.head_bytes = head_bytes;
        config.body_bytes = body_bytes;
        config.line_bytes = line_bytes;
        config.keep_events = keep_events;
        config.keep_bytes = keep_bytes;
        config.keep_age = keep_age;
    })
}

/// A connection whose peer has gone, so that reading ends at once.
fn gone() -> &'static Connection {
    static GONE: OnceLock<Connection> = OnceLock::new();
    GONE.get_or_init(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, address) = listener.accept().unwrap();
        drop(peer);
        Connection::new(0, address, socket, Duration::from_secs(10))
    })
}

fn reader(bytes: &[u8]) -> Reader<'static> {
    Reader::with(gone(), bytes)
}

/// Requests on one connection, with their bodies, until one is refused.
pub fn requests(bytes: &[u8]) {
    let (mut reader, config) = (reader(bytes), small());
    while let Ok(Some(mut request)) = Request::read(&mut reader, &config) {
        request.expects_continue = false;
        assert!(request.host.as_deref().is_none_or(is_authority));
        assert!(request.path.starts_with('/') || request.path == "*");
        assert!(skip_token(&request.method) == Some(""));
        if let Some(names) = request.path.strip_prefix("/events/") {
            streams(&request, names);
        }
        if request.method == "PUT" {
            let Request { body, .. } = &mut request;
            lines(&mut reader, body, &config);
        } else {
            let is_wanted = request.method == "POST";
            let body = request.read_body(&mut reader, &config, is_wanted).unwrap_or_default();
            assert!(body.len() <= if is_wanted { config.body_bytes } else { 0 });
        }
        if !request.body.is_over() || request.close {
            return;
        }
    }
}

/// A chunked body alone, as lines and in one piece.
pub fn body(bytes: &[u8]) {
    let config = small();
    lines(&mut reader(bytes), &mut Body::chunked(), &config);
    let (mut reader, mut body, mut out) = (reader(bytes), Body::chunked(), Vec::new());
    while body.read(&mut reader, &mut out).unwrap_or(false) {}
    assert!(out.len() + reader.unread().len() <= bytes.len());
}

fn lines(reader: &mut Reader, body: &mut Body, config: &Config) {
    let mut lines = Lines::new(reader, body, config);
    while let Ok(Some(line)) = lines.next() {
        assert!(line.len() <= config.line_bytes && !line.contains(&b'\n'));
    }
}

fn streams(request: &Request, names: &str) {
    if let Ok(wanted) = wanted_topics(request, names) {
        assert!((1..=TOPICS_AT_ONCE).contains(&wanted.names.len()));
        assert!(wanted.names.iter().all(|name| check_topic(name).is_ok()));
        assert!(wanted.take != Some(0));
    }
}

/// The target of a request: what it decodes to, encoded again, is read as the same.
pub fn target(text: &str) {
    let Ok(Target { path, query, authority }) = Target::parse("GET", text) else { return };
    assert!(text.bytes().all(|byte| byte.is_ascii_graphic()));
    assert!(authority.as_deref().is_none_or(is_authority) && path.starts_with('/'));
    let encode = |text: &str| text.bytes().map(|byte| format!("%{byte:02x}")).collect::<String>();
    let parts: Vec<_> = query.0.iter().map(|(name, value)| format!("{}={}", encode(name), encode(value))).collect();
    let path_again: Vec<_> = path.split('/').map(encode).collect();
    let again = format!("{}?{}", path_again.join("/"), parts.join("&"));
    let second = Target::parse("GET", &again).ok().expect("what was read once");
    assert_eq!((second.path, second.query.0), (path, query.0));
}

/// Cursors, `since`, lengths of time, hosts, tokens: what is read is written, and read again as the same.
pub fn cursor(text: &str) {
    if let Ok(id) = text.parse::<Id>() {
        assert_eq!(id.to_string().parse::<Id>().unwrap(), id);
        assert!(id.next_at(0) > id || id.ms == u64::MAX);
        assert!(id.before() < id || id == Id::default());
    }
    if let Ok(time) = parse_duration(text) {
        assert_eq!(parse_duration(&format!("{}ms", time.as_millis())).unwrap(), time);
    }
    let mut request = Request::parse(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").ok().expect("a plain request");
    request.query = Query(vec![("since".into(), text.into()), ("poll".into(), text.into())]);
    streams(&request, "a");
    request.query = Query(["last", "take", "as"].map(|name| (name.into(), text.into())).into());
    streams(&request, "a");
    request.query = Query(Vec::new());
    request.last_event_id = Some(text.into());
    streams(&request, text);
    let config = Config::default().with(|config| config.allow_origins = vec![text.into()]);
    if config.check().is_ok() && text.contains("://") {
        let authority = text.split_once("://").unwrap().1;
        assert!(is_authority(authority.strip_prefix("*.").unwrap_or(authority)));
    }
    let _ = (text.parse::<Token>(), is_loopback(split_port(text).0), check_topic(text));
    if let Some(rest) = skip_quoted(text) {
        assert!(text.ends_with(rest));
    }
}

/// An event stream, read in pieces and at once.
pub fn events(bytes: &[u8]) {
    crate::parsing::check(bytes);
}

fn is_mark(block: &[u8]) -> bool {
    Block::parse(block).expect("what was written").is_mark
}

/// A journal. Under `cfg(fuzzing)` no sum is compared, or hardly a block would be looked at; what is kept of it, written
/// anew with its right sums, is read as the same.
pub fn journal(bytes: &[u8]) {
    let (config, limit) = (small(), 8_096);
    let read = |bytes: &[u8]| {
        let mut history = History::new(Id::default(), false, &config);
        let mut take = |block: Block, bytes: &[u8]| restore(&mut history, block, bytes);
        let found = Found::read(bytes, bytes.len() as u64, limit, false, &mut take).unwrap();
        history.remove_unused();
        (found, Arc::new(Mutex::new(history)))
    };
    let snapshot = |history: &Arc<Mutex<History>>, boot: Option<&str>| {
        let mut kept = Kept::new(history, boot);
        let steps: Vec<_> = std::iter::from_fn(|| Some(kept.next()).filter(|blocks| !blocks.is_empty())).collect();
        assert!(kept.last().is_empty(), "nothing was forgotten meanwhile");
        String::from_utf8(steps.concat()).unwrap()
    };
    let (found, history) = read(bytes);
    assert!(found.whole <= bytes.len() as u64 && found.events + found.damaged <= found.blocks);
    let totals = enter(&history).totals();
    assert!(totals.bytes <= config.keep_bytes && totals.topics == enter(&history).newest_forgotten_of_each().0.len());
    let boot = found.boot.as_deref();
    for block in snapshot(&history, boot).split_inclusive("\n\n") {
        let Some(Block { id, frame_at, is_mark: false, .. }) = Block::parse(block.as_bytes()) else { continue };
        for form in [Form::Lines, Form::Json] {
            let made = form.make(id, Some("a"), &block[frame_at..]);
            let line = made.strip_suffix('\n').expect("an empty chunk would end the stream");
            assert!(form == Form::Lines || !line.contains(char::is_control));
        }
    }
    let blocks = |history: &Arc<Mutex<History>>| {
        let mut blocks: Vec<_> = snapshot(history, boot).split_inclusive("\n\n").map(String::from).collect();
        blocks[1..].sort(); // the marks are in no order of their own
        blocks
    };
    let whole = snapshot(&history, boot);
    let (second, again) = read(whole.as_bytes());
    assert_eq!((second.damaged, second.whole, &second.boot), (0, whole.len() as u64, &found.boot));
    let known = |history: &Arc<Mutex<History>>| {
        let history = enter(history); // one guard: a second one would wait for the first
        (history.newest(), history.totals().bytes)
    };
    assert_eq!(known(&again), known(&history));
    assert_eq!(blocks(&history).iter().filter(|block| !is_mark(block.as_bytes())).count(), totals.events);
    assert!(blocks(&history) == blocks(&again), "written anew, read, and written anew again");
}
