//! A chat with session cookies: whoever has logged in may read and write.
//!
//! ```console
//! $ curl -c jar -d ada localhost:3000/login
//! $ curl -b jar -N localhost:3000/chat
//! $ curl -b jar -d 'hello' localhost:3000/chat
//! ```
//! In a page it is `fetch('/login', {method: 'POST', body: name})` and then `new EventSource('/chat')`: the browser sends
//! the cookie by itself. A page of another site cannot write, since the server lets no foreign page `POST`.

use brooklet::{Answer, Config, Event, Server};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};

/// Beyond this many, nobody new is let in: what strangers can fill has a bound.
const SESSIONS: usize = 10_000;
const NAME_BYTES: usize = 40;

/// Who is who: the name of each session.
#[derive(Clone, Default)]
struct Sessions(Arc<Mutex<HashMap<String, String>>>);

fn main() -> io::Result<()> {
    server("127.0.0.1:3000")?.run()
}

pub fn server(address: &str) -> io::Result<Server> {
    let server = Server::bind(address, Config::default())?;
    let sessions = Sessions::default();

    let known = sessions.clone();
    server.route("/login", move |request| {
        let name = request.text()?.trim();
        if request.method() != "POST" || name.is_empty() || name.len() > NAME_BYTES {
            return Ok(Answer::text(400, "POST your name, of 40 bytes at most"));
        }
        match known.begin(name)? {
            Some(session) => {
                Ok(Answer::empty(204)
                    .field("Set-Cookie", format!("session={session}; HttpOnly; SameSite=Strict; Path=/")))
            }
            None => Ok(Answer::text(503, "too many are logged in")),
        }
    })?;

    let hub = server.hub();
    server.route("/chat", move |request| {
        let Some(name) = request.cookie("session").and_then(|session| sessions.name(session)) else {
            return Ok(Answer::text(401, "log in first: POST your name to /login"));
        };
        match request.method() {
            "GET" => request.follow(["chat"]),
            "POST" => {
                let id = hub.publish("chat", Event::new(format!("{name}: {}", request.text()?)))?;
                Ok(Answer::text(200, id))
            }
            _ => Ok(Answer::text(405, "GET or POST").field("Allow", "GET, POST")),
        }
    })?;
    Ok(server)
}

impl Sessions {
    /// A new session, under a name that nobody can guess; None where there are too many.
    fn begin(&self, name: &str) -> io::Result<Option<String>> {
        let mut random = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let session: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if sessions.len() >= SESSIONS {
            return Ok(None);
        }
        sessions.insert(session.clone(), name.into());
        Ok(Some(session))
    }

    fn name(&self, session: &str) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(session).cloned()
    }
}
