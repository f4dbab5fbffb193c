//! Thousands of subscribers of one topic on one thread, each of whom must have every event once and in order, whichever server
//! it is on. Sixty million deliveries would take minutes if each were parsed. But all servers give an event the same id, and
//! so the same bytes: whoever is the first to have an event writes it down, and everybody else's bytes are compared to that.
//! In the end, what was written down is held against what the publishers were told.

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

/// Takes a whole chunk off the front. Returns what it holds, and how many bytes it is; none where it is not whole.
fn next_chunk(bytes: &[u8]) -> Result<Option<(&[u8], usize)>, String> {
    const SIZE_BYTES: usize = 8; // more than a chunk of ours needs
    let Some(at) = bytes
        .iter()
        .take(SIZE_BYTES)
        .position(|byte| *byte == b'\r')
        .or((bytes.len() >= SIZE_BYTES).then_some(SIZE_BYTES))
    else {
        return Ok(None);
    };
    let size = str::from_utf8(&bytes[..at]).ok().and_then(|size| usize::from_str_radix(size, 16).ok());
    let size = size.ok_or_else(|| format!("{:?} came for the size of a chunk", excerpt(bytes, 0)))?;
    let (start, end) = (at + 2, at + 2 + size + 2);
    Ok(bytes.get(start..end).map(|chunk| (&chunk[..size], end)))
}

fn excerpt(bytes: &[u8], at: usize) -> String {
    String::from_utf8_lossy(&bytes[at.saturating_sub(60)..bytes.len().min(at + 60)]).into_owned()
}

/// The id with which an event or another block of a stream ends.
fn last_id(bytes: &[u8]) -> Option<String> {
    let end = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(60)..]).into_owned();
    Some(end.rsplit_once("\nid: ")?.1.split('\n').next()?.to_string())
}

/// The events that streams have held, in their chunks, from the first one on.
#[derive(Default)]
pub struct Reference {
    bytes: Vec<u8>,
}

impl Reference {
    /// Takes what came on a stream that has had `at` bytes before, and says how many it has then.
    ///
    /// # Errors
    /// It is not what others have had there: an event was lost, came twice, out of order or changed.
    pub fn compare(&mut self, at: usize, came: &[u8]) -> Result<usize, String> {
        let known = &self.bytes[at..];
        let both = known.len().min(came.len());
        if known[..both] != came[..both] {
            let at = (0..both).find(|n| known[*n] != came[*n]).unwrap_or_default();
            return Err(format!("{:?} came, where others had {:?}", excerpt(came, at), excerpt(known, at)));
        }
        self.bytes.extend_from_slice(&came[both..]);
        Ok(at + came.len())
    }

    /// # Errors
    /// The events that came are not those that publishers were told of, in the order of the ids.
    pub fn check(&self, taken: &BTreeMap<Id, String>) -> Result<(), String> {
        let expected: String = taken.iter().map(|(id, data)| chunk(*id, data)).collect();
        Reference { bytes: expected.clone().into_bytes() }.compare(0, &self.bytes)?;
        match self.bytes.len() == expected.len() {
            true => Ok(()),
            false => Err(format!("{} bytes of events came, of {}", self.bytes.len(), expected.len())),
        }
    }
}

/// What may happen to a stream, beside events: nothing, unless somebody sees to it.
#[derive(Clone, Copy, Default)]
pub struct May {
    /// Its server may be killed.
    pub be_cut: bool,
    /// Nobody knows what Redis may have lost.
    pub have_gaps: bool,
}

/// A subscriber.
struct Member {
    /// None while it has to connect.
    socket: Option<TcpStream>,
    /// The server that it was on last.
    server: usize,
    /// Whether head and first block of its stream were read.
    is_open: bool,
    /// What has come of a head, or of a chunk, that is not whole.
    begun: Vec<u8>,
    /// Its last event id.
    cursor: Option<String>,
    /// Of the reference, how much it has had.
    at: usize,
    gaps: usize,
}

pub struct Crowd {
    servers: Servers,
    poll: Poll,
    members: Vec<Member>,
    reference: Reference,
    buffer: Vec<u8>,
    /// How many streams were cut after they had opened.
    pub cuts: usize,
    may: May,
}

impl Crowd {
    /// Connects a crowd to all servers, spread evenly.
    pub fn subscribe(servers: &Servers, count: usize, may: May) -> Crowd {
        let member =
            |server| Member { socket: None, server, is_open: false, begun: Vec::new(), cursor: None, at: 0, gaps: 0 };
        let mut crowd = Crowd {
            servers: servers.clone(),
            poll: Poll::new().unwrap(),
            members: (0..count).map(member).collect(),
            reference: Reference::default(),
            buffer: vec![0; 256 * 1024],
            cuts: 0,
            may,
        };
        wait_longer_for("all subscribers to be there", || {
            crowd.turn();
            crowd.members.iter().all(|member| member.is_open).then_some(())
        });
        crowd
    }

    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// The fewest gaps that any of them has heard of.
    pub fn least_gaps(&self) -> usize {
        self.members.iter().map(|member| member.gaps).min().unwrap_or_default()
    }

    /// Reads until everybody has had so many bytes of events, once it is known how many there are.
    pub fn read(&mut self, all: impl Fn() -> Option<usize>) {
        let (mut had, mut deadline) = (0, Instant::now() + PATIENCE);
        while all().is_none_or(|all| self.members.iter().any(|member| member.at < all)) {
            self.turn();
            let now = self.members.iter().map(|member| member.at).sum();
            deadline = if now > had { Instant::now() + PATIENCE } else { deadline };
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
        for event in &events {
            self.read_from(event.token().0, event.is_read_closed() || event.is_error());
        }
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
    }

    /// Reads what has come, up to the end of the stream if that `is_over`.
    fn read_from(&mut self, n: usize, is_over: bool) {
        let Crowd { members, reference, buffer, may, .. } = self;
        let member = &mut members[n];
        while let Some(socket) = &mut member.socket {
            match socket.read(buffer) {
                Ok(0) => self.cuts += member.cut(*may),
                Ok(got) => {
                    let taken = member.take(&buffer[..got], reference, *may);
                    taken.unwrap_or_else(|why| panic!("subscriber {n}: {why}"));
                    if got < buffer.len() && !is_over {
                        break; // it was all, and when more comes, it is said anew
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.cuts += member.cut(*may),
            }
        }
    }
}

impl Member {
    fn take(&mut self, came: &[u8], reference: &mut Reference, may: May) -> Result<(), String> {
        let joined;
        let mut rest = match self.begun.is_empty() {
            true => came,
            false => {
                self.begun.extend_from_slice(came);
                joined = std::mem::take(&mut self.begun);
                &joined
            }
        };
        if !self.is_open {
            let Some(read) = self.open(rest, may)? else {
                self.begun = rest.to_vec();
                return Ok(());
            };
            rest = &rest[read..];
        }
        let mut run = 0; // events that follow one another
        while let Some((block, size)) = next_chunk(&rest[run..])? {
            if block.starts_with(b"data: ") {
                run += size;
                continue;
            }
            self.compare(&rest[..run], reference)?;
            let text = String::from_utf8_lossy(block);
            if text.starts_with("event: gap\n") && may.have_gaps {
                self.gaps += 1;
                self.cursor = last_id(block);
            } else if text != ":\n" {
                return Err(format!("{text:?} came after {:?}", self.cursor));
            }
            (rest, run) = (&rest[run + size..], 0);
        }
        self.compare(&rest[..run], reference)?;
        self.begun = rest[run..].to_vec();
        Ok(())
    }

    fn compare(&mut self, events: &[u8], reference: &mut Reference) -> Result<(), String> {
        if !events.is_empty() {
            self.at = reference.compare(self.at, events)?;
            self.cursor = last_id(events);
        }
        Ok(())
    }

    /// Reads the head and the first block. Returns how many bytes they are, once they are there.
    fn open(&mut self, bytes: &[u8], may: May) -> Result<Option<usize>, String> {
        let Some(head) = bytes.windows(4).position(|end| end == b"\r\n\r\n").map(|at| at + 4) else { return Ok(None) };
        let text = String::from_utf8_lossy(&bytes[..head]);
        if !text.starts_with("HTTP/1.1 200 ") || header(&text, "transfer-encoding") != Some("chunked") {
            return Err(format!("{text:?} came"));
        }
        let Some((block, size)) = next_chunk(&bytes[head..])? else { return Ok(None) };
        let text = String::from_utf8_lossy(block);
        let cursor = last_id(block);
        match &cursor {
            None if text.contains("\n: ") => {
                self.socket = None; // told why, and to come back
                return Ok(None);
            }
            None if may.have_gaps => {} // a gap comes next
            Some(id) if self.cursor.as_ref().is_none_or(|last| id == last) => self.cursor = cursor,
            _ => return Err(format!("{text:?} came, to whom had {:?}", self.cursor)),
        }
        self.is_open = true;
        Ok(Some(head + size))
    }

    /// The stream has ended in the middle of it. What has come of an event that is not whole counts for nothing, as for a page.
    /// Returns 1 where it had opened.
    fn cut(&mut self, may: May) -> usize {
        assert!(may.be_cut, "a stream was cut, and its server was not");
        (self.socket, self.begun) = (None, Vec::new());
        std::mem::take(&mut self.is_open).into()
    }
}

#[test]
fn the_crowd_notices_an_event_that_is_lost_doubled_changed_or_out_of_order() {
    let taken: BTreeMap<Id, String> = (1..=4).map(|n| (Id { ms: 7, seq: n }, format!("number {n}"))).collect();
    let chunks: Vec<String> = taken.iter().map(|(id, data)| chunk(*id, data)).collect();
    let had = |order: &[usize]| order.iter().map(|n| chunks[*n].as_str()).collect::<String>().into_bytes();
    let all = had(&[0, 1, 2, 3]);
    let member = || Member {
        socket: None,
        server: 0,
        is_open: true,
        begun: Vec::new(),
        cursor: Some("7-0".into()),
        at: 0,
        gaps: 0,
    };
    let (mut reference, strict) = (Reference::default(), May::default());
    // Wherever it is torn apart; and a heartbeat is no event.
    for at in 0..all.len() {
        let mut member = member();
        member.take(b"2\r\n:\n\r\n", &mut reference, strict).unwrap();
        member.take(&all[..at], &mut reference, strict).unwrap();
        assert_eq!(member.cursor, Some(format!("7-{}", at / chunks[0].len())), "the last one that was whole");
        member.take(&all[at..], &mut reference, strict).unwrap();
        assert_eq!((member.at, member.cursor.as_deref()), (all.len(), Some("7-4")));
    }
    reference.check(&taken).unwrap();
    let changed = String::from_utf8(all.clone()).unwrap().replace("number 3", "number 8").into_bytes();
    for wrong in [had(&[0, 2, 3]), had(&[0, 1, 1, 2, 3]), had(&[0, 2, 1, 3]), had(&[1, 2, 3]), changed] {
        let text = String::from_utf8(wrong.clone()).unwrap();
        assert!(member().take(&wrong, &mut reference, strict).is_err(), "{text:?}, as others had it right");
        let mut first = Reference::default();
        member().take(&wrong, &mut first, strict).unwrap();
        assert!(first.check(&taken).is_err(), "{text:?}, where all had it wrong");
    }
    for wrong in [had(&[0, 1, 2]), had(&[0, 1, 2, 3, 3])] {
        let mut first = Reference::default();
        member().take(&wrong, &mut first, strict).unwrap();
        assert!(first.check(&taken).is_err(), "the last one is missing, or there twice");
    }
    let gap = "event: gap\ndata: {}\nid: 7-0\n\n";
    let gap = format!("{:x}\r\n{gap}\r\n", gap.len());
    for wrong in [&gap, "0\r\n\r\n", "nonsense\r\n"] {
        assert!(member().take(wrong.as_bytes(), &mut reference, strict).is_err(), "{wrong:?}");
    }
    let mut told = member();
    told.take(gap.as_bytes(), &mut reference, May { have_gaps: true, ..strict }).unwrap();
    assert_eq!((told.gaps, told.at), (1, 0));
}
