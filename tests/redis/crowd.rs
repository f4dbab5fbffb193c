//! Thousands of subscribers of one topic on one thread, each of whom must have every event once and in order, whichever server
//! it is on. Sixty million deliveries would take minutes if each were parsed. But all servers give an event the same id, and
//! so the same bytes: whoever is the first to have an event writes it down, and everybody else's bytes are compared to that.
//! In the end, what was written down is held against what the publishers were told. A gap, a heartbeat or an end of a stream
//! is no event, so it would be found, too.

use super::*;
use crate::common::{header, wait_longer_for};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use std::io::{self, Read, Write};

/// Between two looks at the sockets, of which each then has a good deal to read: the processor is for the servers.
const PAUSE: Duration = Duration::from_millis(25);
/// Connected between two looks: fewer than wait in a listening socket's queue.
const WAVE: usize = 100;

/// The chunk that holds an event on every server, as this test alone knows it.
pub fn chunk(id: Id, data: &str) -> String {
    let frame = format!("data: {data}\nid: {id}\n\n");
    format!("{:x}\r\n{frame}\r\n", frame.len())
}

/// What the streams have held, from the first event on.
#[derive(Default)]
pub struct Reference {
    bytes: Vec<u8>,
}

impl Reference {
    /// Takes what came on a stream that has had `at` bytes before, and says how many it has then.
    ///
    /// # Errors
    /// It is not what others have had there: an event was lost, came twice or out of order, or something else came.
    pub fn compare(&mut self, at: usize, came: &[u8]) -> Result<usize, String> {
        let known = &self.bytes[at..];
        let both = known.len().min(came.len());
        if known[..both] != came[..both] {
            let differ = (0..both).find(|n| known[*n] != came[*n]).unwrap_or_default();
            let near = |bytes: &[u8]| {
                String::from_utf8_lossy(&bytes[differ.saturating_sub(60)..bytes.len().min(differ + 60)]).into_owned()
            };
            return Err(format!("{:?} came, where others had {:?}", near(came), near(known)));
        }
        self.bytes.extend_from_slice(&came[both..]);
        Ok(at + came.len())
    }

    /// The last event that was whole after `at` bytes: where it ends, and its id.
    fn last_whole(&self, at: usize) -> Option<(usize, &str)> {
        const END: &[u8] = b"\n\n\r\n";
        let end = self.bytes[..at].windows(END.len()).rposition(|bytes| bytes == END)? + END.len();
        let frame = str::from_utf8(&self.bytes[end.saturating_sub(100)..end - END.len()]).unwrap();
        Some((end, frame.rsplit("id: ").next().unwrap()))
    }

    /// # Errors
    /// The events that came are not those that publishers were told of, in the order of the ids.
    pub fn check(&self, taken: &BTreeMap<Id, String>) -> Result<(), String> {
        let expected: String = taken.iter().map(|(id, data)| chunk(*id, data)).collect();
        let mut all = Reference { bytes: expected.into_bytes() };
        match all.compare(0, &self.bytes)? == all.bytes.len() && self.bytes.len() == all.bytes.len() {
            true => Ok(()),
            false => Err(format!("{} bytes of events came, of {}", self.bytes.len(), all.bytes.len())),
        }
    }
}

/// A subscriber.
struct Member {
    /// None while it has to connect.
    socket: Option<TcpStream>,
    /// The server that it was on last.
    server: usize,
    /// What has come of the head and of the block that opens the stream; none once both are whole.
    opening: Option<Vec<u8>>,
    /// Its last event id.
    cursor: Option<String>,
    /// Of the reference, how much it has had.
    at: usize,
}

pub struct Crowd {
    servers: Servers,
    poll: Poll,
    members: Vec<Member>,
    reference: Reference,
    buffer: Vec<u8>,
    /// How many streams were cut after they had opened.
    pub cuts: usize,
    may_cut: bool,
}

impl Crowd {
    /// Connects a crowd to all servers, spread evenly. Streams may be cut only if some server is to be killed.
    pub fn subscribe(servers: &Servers, count: usize, may_cut: bool) -> Crowd {
        let member = |server| Member { socket: None, server, opening: None, cursor: None, at: 0 };
        let mut crowd = Crowd {
            servers: servers.clone(),
            poll: Poll::new().unwrap(),
            members: (0..count).map(member).collect(),
            reference: Reference::default(),
            buffer: vec![0; 256 * 1024],
            cuts: 0,
            may_cut,
        };
        wait_longer_for("all subscribers to be there", || {
            crowd.turn();
            crowd.members.iter().all(|member| member.socket.is_some() && member.opening.is_none()).then_some(())
        });
        crowd
    }

    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Reads until everybody has had so many bytes of events, once all are known.
    pub fn read(&mut self, all: impl Fn() -> Option<usize>) {
        let (mut had, mut deadline) = (0, Instant::now() + 3 * PATIENCE);
        while all().is_none_or(|all| self.members.iter().any(|member| member.at < all)) {
            self.turn();
            let now = self.members.iter().map(|member| member.at).sum();
            deadline = if now > had { Instant::now() + 3 * PATIENCE } else { deadline };
            had = now;
            assert!(Instant::now() < deadline, "{had} bytes have come, and no more come");
        }
    }

    /// Holds what came against what publishers were told. Returns how many events were delivered.
    pub fn check(&self, taken: &BTreeMap<Id, String>) -> usize {
        self.reference.check(taken).unwrap_or_else(|why| panic!("{why}"));
        assert!(self.members.iter().all(|member| member.at == self.reference.bytes.len()), "all have had all");
        taken.len() * self.members.len()
    }

    fn turn(&mut self) {
        for n in (0..self.members.len()).filter(|n| self.members[*n].socket.is_none()).take(WAVE).collect::<Vec<_>>() {
            self.connect(n);
        }
        thread::sleep(PAUSE);
        let mut events = Events::with_capacity(self.members.len() + 1);
        self.poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
        events.iter().for_each(|event| self.read_from(event.token().0, event.is_read_closed() || event.is_error()));
    }

    /// To another server than before, from where it was. Where that one is away, it is the next one's turn next time.
    fn connect(&mut self, n: usize) {
        let member = &mut self.members[n];
        member.server = (member.server + 1) % 3;
        let addr = { self.servers.lock().unwrap()[member.server] };
        let Ok(mut socket) = std::net::TcpStream::connect(addr) else { return };
        let field = member.cursor.as_ref().map_or(String::new(), |id| format!("Last-Event-ID: {id}\r\n"));
        let request = format!("GET /events/a HTTP/1.1\r\nHost: localhost\r\n{field}\r\n");
        if socket.write_all(request.as_bytes()).is_err() {
            return;
        }
        socket.set_nonblocking(true).unwrap();
        let mut socket = TcpStream::from_std(socket);
        self.poll.registry().register(&mut socket, Token(n), Interest::READABLE).unwrap();
        member.socket = Some(socket);
        member.opening = Some(Vec::new());
    }

    /// Reads what has come, up to the end of the stream if that `is_over`.
    fn read_from(&mut self, n: usize, is_over: bool) {
        let Crowd { members, reference, buffer, .. } = self;
        let member = &mut members[n];
        while let Some(socket) = &mut member.socket {
            match socket.read(buffer) {
                Ok(0) => self.cuts += member.cut(reference, self.may_cut),
                Ok(got) => {
                    member.take(&buffer[..got], reference).unwrap_or_else(|why| panic!("subscriber {n}: {why}"));
                    if got < buffer.len() && !is_over {
                        break; // it was all, and when more comes, it is said anew
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.cuts += member.cut(reference, self.may_cut),
            }
        }
    }
}

impl Member {
    fn take(&mut self, came: &[u8], reference: &mut Reference) -> Result<(), String> {
        let Some(opening) = &mut self.opening else {
            self.at = reference.compare(self.at, came)?;
            return Ok(());
        };
        opening.extend_from_slice(came);
        let text = String::from_utf8_lossy(opening).into_owned();
        let Some((head, rest)) = text.split_once("\r\n\r\n") else { return Ok(()) };
        let Some((block, events)) = rest.split_once("\n\n\r\n") else { return Ok(()) };
        if !head.starts_with("HTTP/1.1 200 ") || header(head, "transfer-encoding") != Some("chunked") {
            return Err(format!("{head:?} came"));
        }
        let cursor = block.split_once("id: ").map(|(_, id)| id.to_string());
        if cursor.is_none() && block.contains("\n: ") {
            self.socket = None; // told why, and to come back
            return Ok(());
        }
        if cursor.is_none() || self.cursor.is_some() && cursor != self.cursor {
            return Err(format!("{block:?} came, to whom had {:?}", self.cursor));
        }
        (self.cursor, self.opening) = (cursor, None);
        self.take(events.as_bytes(), reference)
    }

    /// The stream has ended in the middle of it. What has come of an event that is not whole counts for nothing, as for a page.
    /// Returns 1 where it had opened.
    fn cut(&mut self, reference: &Reference, may_cut: bool) -> usize {
        self.socket = None;
        if self.opening.take().is_some() {
            return 0;
        }
        assert!(may_cut, "a stream was cut, and its server was not");
        match reference.last_whole(self.at) {
            Some((at, id)) => (self.at, self.cursor) = (at, Some(id.to_string())),
            None => self.at = 0,
        }
        1
    }
}

#[test]
fn the_crowd_notices_an_event_that_is_lost_doubled_changed_or_out_of_order() {
    let taken: BTreeMap<Id, String> = (1..=4).map(|n| (Id { ms: 7, seq: n }, format!("number {n}"))).collect();
    let chunks: Vec<String> = taken.iter().map(|(id, data)| chunk(*id, data)).collect();
    let had = |order: &[usize]| order.iter().map(|n| chunks[*n].as_str()).collect::<String>().into_bytes();
    let all = had(&[0, 1, 2, 3]);
    let mut reference = Reference::default();
    let middle = all.len() / 2 - 3; // somewhere in an event
    let at = reference.compare(0, &all[..middle]).unwrap();
    assert_eq!(reference.last_whole(at).unwrap(), (chunks[0].len(), "7-1"));
    assert_eq!(reference.compare(0, &all).unwrap(), all.len(), "who is ahead writes down what it has");
    assert_eq!(reference.compare(at, &all[middle..]).unwrap(), all.len());
    reference.check(&taken).unwrap();
    let changed = String::from_utf8(all.clone()).unwrap().replace("number 3", "number 8").into_bytes();
    let ended = [&had(&[0, 1])[..], b"0\r\n\r\n"].concat();
    let quiet = [&had(&[0, 1])[..], b"2\r\n:\n\r\n", &had(&[2, 3])].concat();
    for wrong in [had(&[0, 2, 3]), had(&[0, 1, 1, 2, 3]), had(&[0, 2, 1, 3]), changed, ended, quiet] {
        let text = String::from_utf8(wrong.clone()).unwrap();
        assert!(reference.compare(0, &wrong).is_err(), "{text:?}, as others had it right");
        let mut first = Reference::default();
        first.compare(0, &wrong).unwrap();
        assert!(first.check(&taken).is_err(), "{text:?}, where all had it wrong");
    }
    let mut short = Reference::default();
    short.compare(0, &had(&[0, 1, 2])).unwrap();
    assert!(short.check(&taken).is_err(), "the last one is missing");
    short.compare(short.bytes.len(), &had(&[3, 3])).unwrap();
    assert!(short.check(&taken).is_err(), "the last one is there twice");
}
