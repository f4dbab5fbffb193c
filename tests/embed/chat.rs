//! A chat with session cookies: whoever has logged in may read and write.
//!
//! ```console
//! $ curl -c jar -d ada localhost:3000/login
//! $ curl -b jar -N localhost:3000/chat
//! $ curl -b jar -d 'hello' localhost:3000/chat
//! ```
//! In a page it is `fetch('/login', {method: 'POST', body: name})` and then `new EventSource('/chat')`: the browser sends
//! the cookie by itself. A page of another site cannot write, since the server lets no foreign page `POST`.

use brooklet::{Answer, Config, Event, Request, Server};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::sync::Mutex;

/// Whose each session is.
static SESSIONS: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
/// Beyond this many, nobody new is let in: what strangers can fill has a bound.
const MOST_SESSIONS: usize = 10_000;

fn main() -> io::Result<()> {
    server("127.0.0.1:3000")?.run()
}

pub fn server(address: &str) -> io::Result<Server> {
    let server = Server::bind(address, Config::default())?;
    server.route("POST /login", |request| {
        let (name, session) = (request.text()?.trim(), new_session()?);
        let mut sessions = SESSIONS.lock().unwrap();
        if !(1..=40).contains(&name.len()) {
            return Ok(Answer::text(400, "POST your name, of 40 bytes at most"));
        } else if sessions.len() == MOST_SESSIONS {
            return Ok(Answer::text(503, "too many are logged in"));
        }
        sessions.insert(session.clone(), name.into());
        Ok(Answer::empty(204).field("Set-Cookie", format!("session={session}; HttpOnly; SameSite=Strict; Path=/")))
    })?;
    server.route("GET /chat", |request| match user(request) {
        Some(_) => request.follow(["chat"]),
        None => Ok(Answer::text(401, "log in first: POST your name to /login")),
    })?;
    server.route("POST /chat", |request| {
        let Some(name) = user(request) else { return Ok(Answer::text(401, "log in first")) };
        let said = Event::new(format!("{name}: {}", request.text()?));
        Ok(Answer::text(200, request.hub().publish("chat", said)?))
    })?;
    Ok(server)
}

fn user(request: &Request) -> Option<String> {
    SESSIONS.lock().unwrap().get(request.cookie("session")?).cloned()
}

/// A name that nobody can guess.
fn new_session() -> io::Result<String> {
    let mut random = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}
