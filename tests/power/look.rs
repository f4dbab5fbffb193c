//! What a client sees of the topics.
//!
//! Only a stream with its last chunk is all that there is. The kernel resets connections where the machine's memory for TCP
//! is used up, by whomever; a client that is cut off comes back, and so does this one.
//! <https://docs.kernel.org/networking/ip-sysctl.html#tcp-variables> (`tcp_mem`)

use crate::common::{PATIENCE, Wire};
use brooklet::Id;
use serde_json::Value;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

/// An event of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub topic: String,
    pub id: Id,
    pub data: String,
}

/// Everything that some topics keep after a cursor, and whether a gap comes before it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    pub begins_with_gap: bool,
    pub events: Vec<Seen>,
}

/// Looks at what topics keep; from a cursor, or from the earliest on.
///
/// # Errors
/// What came instead of a whole stream.
pub fn look(addr: SocketAddr, topics: &[&str], cursor: Option<Id>) -> Result<Sight, String> {
    let from = cursor.map_or("since=earliest".into(), |id| format!("last_event_id={id}"));
    let target = format!("/events/{}?{from}&poll=1ms&as=json", topics.join(","));
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = match ask(addr, &target)? {
            (text, true) => return read(&text),
            (text, false) => text,
        };
        if Instant::now() > deadline {
            return Err(format!("{target} is cut again and again, once after {text:?}"));
        }
    }
}

/// One answer, and whether it came to its end.
fn ask(addr: SocketAddr, target: &str) -> Result<(String, bool), String> {
    let socket = TcpStream::connect(addr).map_err(|error| format!("nobody serves {target}: {error}"))?;
    let mut wire = Wire::on(socket);
    let is_sent = wire.socket.write_all(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes());
    let Some(head) = is_sent.ok().and_then(|()| wire.head_if_any()) else { return Ok((String::new(), false)) };
    let text = String::from_utf8(wire.rest()).map_err(|error| error.to_string())?;
    match head.split(' ').nth(1) {
        Some("200") => Ok((text, wire.is_over())),
        _ => Err(format!("{target} is answered {head}{text}")),
    }
}

fn read(text: &str) -> Result<Sight, String> {
    let mut sight = Sight::default();
    for line in text.lines() {
        let object: Value = serde_json::from_str(line).map_err(|error| format!("{error}: {line:?}"))?;
        let text = |name: &str| object[name].as_str();
        match (text("event"), text("topic"), text("id").and_then(|id| id.parse().ok()), text("data")) {
            (Some("heartbeat"), ..) => {} // the machine is slow
            (Some("gap"), ..) => sight.begins_with_gap |= sight.events.is_empty(),
            (_, Some(topic), Some(id), Some(data)) => {
                sight.events.push(Seen { topic: topic.into(), id, data: data.into() })
            }
            _ => return Err(format!("no event: {line:?}")),
        }
    }
    Ok(sight)
}

mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    #[test]
    fn what_came_before_a_reset_is_not_all_that_there_is() {
        const HEAD: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        const EVENT: &str = "39\r\n{\"id\":\"7-0\",\"topic\":\"a\",\"event\":\"message\",\"data\":\"e0 x\"}\n\r\n";
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        // So much comes of each answer, and then a reset.
        let cut = ["", HEAD, &[HEAD, EVENT].concat()].map(String::from);
        let server = thread::spawn(move || {
            for answer in cut {
                let mut wire = Wire::on(listener.accept().unwrap().0);
                wire.take_until(b"\r\n\r\n").unwrap();
                wire.send(answer.as_bytes());
                wire.reset();
            }
            let mut wire = Wire::on(listener.accept().unwrap().0);
            wire.take_until(b"\r\n\r\n").unwrap();
            wire.send([HEAD, EVENT, "0\r\n\r\n"].concat().as_bytes());
        });
        let seen = Seen { topic: "a".into(), id: "7-0".parse().unwrap(), data: "e0 x".into() };
        assert_eq!(look(addr, &["a"], None), Ok(Sight { begins_with_gap: false, events: vec![seen] }));
        server.join().unwrap();
    }
}
