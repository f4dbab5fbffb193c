//! What a stream's parameters do: where it begins (`last`, `since=latest`), where it ends (`take`), and the forms for scripts
//! (`as`), each alone and all of them together, against a model of what must come.

use crate::common::*;
use brooklet::{Config, Event, Hub, Id};
use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

/// What a stream is read as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Events,
    Lines,
    Json,
}

const FORMS: [Form; 3] = [Form::Events, Form::Lines, Form::Json];
const VERSIONS: [&str; 2] = ["1.1", "1.0"];

impl Form {
    fn parameter(self) -> &'static str {
        match self {
            Form::Events => "_=",
            Form::Lines => "as=lines",
            Form::Json => "as=json",
        }
    }

    fn content_type(self) -> &'static str {
        match self {
            Form::Events => "text/event-stream",
            Form::Lines => "text/plain; charset=utf-8",
            Form::Json => "application/x-ndjson",
        }
    }
}

/// An event, or a gap, which is of no topic.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
    id: Id,
    topic: Option<String>,
    name: String,
    data: String,
}

impl Told {
    fn is_gap(&self) -> bool {
        self.topic.is_none()
    }
}

/// A stream in any form, read strictly.
struct Reading {
    socket: TcpStream,
    form: Form,
    head: String,
    is_chunked: bool,
    raw: Vec<u8>,
    /// What stood in whole chunks, or came without them, and was not taken yet.
    body: Vec<u8>,
    /// The last chunk has come.
    is_over: bool,
}

impl Reading {
    fn open(addr: SocketAddr, target: &str, form: Form) -> Reading {
        Reading::on(TcpStream::connect(addr).unwrap(), target, form, "1.1", "")
    }

    fn on(mut socket: TcpStream, target: &str, form: Form, version: &str, fields: &str) -> Reading {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all(format!("GET {target} HTTP/{version}\r\nHost: localhost\r\n{fields}\r\n").as_bytes()).unwrap();
        let mut reading = Reading {
            socket,
            form,
            head: String::new(),
            is_chunked: version == "1.1",
            raw: Vec::new(),
            body: Vec::new(),
            is_over: false,
        };
        let end = loop {
            match reading.raw.windows(4).position(|end| end == b"\r\n\r\n") {
                Some(at) => break at + 4,
                None => assert!(reading.read(), "no head for {target}"),
            }
        };
        reading.head = String::from_utf8(reading.raw.drain(..end).collect()).unwrap();
        let head = &reading.head;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{target}: {head}");
        assert_eq!(header(head, "content-type"), Some(form.content_type()), "{target}");
        assert_eq!(header(head, "transfer-encoding"), reading.is_chunked.then_some("chunked"), "{target}");
        reading.unwrap_chunks();
        reading
    }

    /// False at the end.
    fn read(&mut self) -> bool {
        let mut bytes = [0; 16 * 1024];
        match self.socket.read(&mut bytes) {
            Ok(got) => {
                self.raw.extend_from_slice(&bytes[..got]);
                got > 0
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => true,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("{error}, after {:?}", String::from_utf8_lossy(&self.body)),
        }
    }

    fn fill(&mut self) -> bool {
        let has_more = self.read();
        self.unwrap_chunks();
        has_more
    }

    /// A chunk is whole lines. Its size may begin with one zero more, which asks a peer that seems to have gone.
    fn unwrap_chunks(&mut self) {
        if !self.is_chunked {
            return self.body.append(&mut self.raw);
        }
        let mut rest = &self.raw[..];
        while let Some(at) = rest.windows(2).position(|pair| pair == b"\r\n") {
            let line = str::from_utf8(&rest[..at]).unwrap();
            let size = usize::from_str_radix(line, 16).unwrap_or_else(|_| panic!("{line:?} is no chunk's size"));
            let Some((chunk, behind)) = rest[at + 2..].split_at_checked(size).filter(|(_, end)| end.len() >= 2) else {
                break;
            };
            assert!(!self.is_over && behind.starts_with(b"\r\n") && (size == 0 || chunk.ends_with(b"\n")));
            self.is_over = size == 0;
            self.body.extend_from_slice(chunk);
            rest = &behind[2..];
        }
        self.raw = rest.to_vec();
        assert!(!self.is_over || self.raw.is_empty(), "something follows the last chunk");
    }

    /// Everything up to and with `end`; `None` where the stream ends before.
    fn take_until(&mut self, end: &[u8]) -> Option<String> {
        let mut searched = 0;
        loop {
            let from = &self.body[searched..];
            if let Some(at) = from.windows(end.len()).position(|window| window == end) {
                let taken = self.body.drain(..searched + at + end.len()).collect();
                return Some(String::from_utf8(taken).unwrap());
            }
            searched = self.body.len().saturating_sub(end.len() - 1);
            if !self.fill() {
                return None;
            }
        }
    }

    /// The next block with data, or object that is no heartbeat. For lines, see [`Reading::expect`].
    fn next(&mut self) -> Option<Told> {
        loop {
            match self.form {
                Form::Events => {
                    let seen = Seen::parse(self.take_until(b"\n\n")?.as_bytes());
                    if seen.data.is_some() {
                        let topic = (!seen.is_gap()).then_some("any".into());
                        let name = seen.event.clone().unwrap_or("message".into());
                        return Some(Told { id: seen.id(), topic, name, data: seen.data().into() });
                    }
                }
                Form::Json => {
                    let object = self.object()?;
                    if object["event"] != "heartbeat" {
                        let text = |name: &str| object[name].as_str().map(String::from);
                        let [id, name, data] = ["id", "event", "data"].map(|name| text(name).expect("a string"));
                        return Some(Told { id: id.parse().unwrap(), topic: text("topic"), name, data });
                    }
                }
                Form::Lines => panic!("lines have no ids"),
            }
        }
    }

    fn object(&mut self) -> Option<serde_json::Value> {
        let line = self.take_until(b"\n")?;
        let is_one = |text: &str| !text.contains(|c: char| c.is_control() || "\u{2028}\u{2029}".contains(c));
        assert!(is_one(line.trim_end_matches('\n')), "{line:?} is more than a line to somebody");
        let object: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert_eq!(object.as_object().expect("an object").len(), 4, "{line}");
        Some(object)
    }

    /// Reads what must come next, and fails where anything else does.
    fn expect(&mut self, told: &Told) {
        match self.form {
            Form::Lines => {
                for line in told.data.split('\n') {
                    let came = self.take_until(b"\n").unwrap_or_else(|| panic!("the end, instead of {told:?}"));
                    assert_eq!(came, format!("{line}\n"), "of {told:?}");
                }
            }
            Form::Events => {
                let came = self.next().unwrap_or_else(|| panic!("the end, instead of {told:?}"));
                assert_eq!((came.id, &came.name, &came.data), (told.id, &told.name, &told.data));
                assert_eq!(came.is_gap(), told.is_gap());
            }
            Form::Json => assert_eq!(self.next().as_ref(), Some(told)),
        }
    }

    /// Reads the end that the server made: an event stream says why and when to come back. Returns the block, where there is
    /// one.
    fn expect_end(&mut self) -> Option<Seen> {
        while self.fill() {}
        assert_eq!(self.is_over, self.is_chunked, "it was cut");
        let body = String::from_utf8(std::mem::take(&mut self.body)).unwrap();
        if self.form != Form::Events {
            assert_eq!(body, "", "something came before the end");
            return None;
        }
        let blocks: Vec<&str> = body.split_inclusive("\n\n").collect();
        let last = Seen::parse(blocks.last().expect("the end's block").as_bytes());
        // Without an event before it, the first block stands there, too.
        let first = blocks[..blocks.len() - 1].iter().map(|block| Seen::parse(block.as_bytes()));
        assert!(first.into_iter().all(|first| first.data.is_none() && first.comments.is_empty()), "{body:?}");
        assert!(last.comments.len() == 1 && last.retry.is_some() && last.data.is_none(), "{body:?}");
        Some(last)
    }
}

fn reset(socket: &TcpStream) {
    socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO)).unwrap();
}

fn before(id: Id) -> Id {
    if id.seq > 0 { Id { seq: id.seq - 1, ..id } } else { Id { ms: id.ms - 1, seq: u64::MAX } }
}

/// Where the model's stream begins.
#[derive(Clone, Copy, Debug)]
enum Start {
    Now,
    Earliest,
    Newest(usize),
    /// Ten minutes ago, which is before the server was there.
    Ago,
    /// None for what is no id.
    After(Option<Id>),
}

/// What each topic keeps, and has forgotten.
struct Model {
    kept: BTreeMap<String, VecDeque<Told>>,
    forgotten: BTreeMap<String, Id>,
    base: Id,
    newest: Id,
    keep: usize,
}

impl Model {
    fn publish(&mut self, hub: &Hub, random: &mut Random, topic: &str) -> Told {
        const DATA: [&str; 14] = [
            "",
            "x",
            "one\ntwo",
            "\n",
            "\n\n\nx\n",
            "tab\tquote\"back\\slash/",
            "nul\0bell\x07escape\x1b",
            "crlf\r\nand cr\rend",
            "two\u{2028}more\u{2029}ends\u{85}of lines",
            " a blank before",
            "data: like a field\nid: 1-1\n\n: comment",
            "{\"json\":[1,\"\\u0000\"]}",
            "ünïcode 🦀",
            "\u{7f}",
        ];
        const NAMES: [Option<&str>; 6] = [None, Some("note"), Some(""), Some("ü \"quoted\" \\ \t"), Some("data"), None];
        let mut data = DATA[random.below(DATA.len())].to_string();
        if random.below(30) == 0 {
            data = format!("{data} long ").repeat(1_000);
        }
        let name = NAMES[random.below(NAMES.len())];
        let mut event = Event::new(data.clone());
        if let Some(name) = name {
            event = event.name(name);
        }
        if random.below(4) == 0 {
            event = event.retry(Duration::from_secs(2));
        }
        let id = hub.publish(topic, event).unwrap();
        let name = name.filter(|name| !name.is_empty()).unwrap_or("message").into();
        let data = data.replace("\r\n", "\n").replace('\r', "\n");
        let told = Told { id, topic: Some(topic.into()), name, data };
        self.newest = id;
        let kept = self.kept.entry(topic.into()).or_default();
        kept.push_back(told.clone());
        if kept.len() > self.keep {
            let oldest = kept.pop_front().unwrap();
            self.forgotten.insert(topic.into(), oldest.id);
        }
        told
    }

    /// What these topics keep after an id, in order.
    fn after(&self, names: &[&str], id: Id) -> Vec<Told> {
        let kept = names.iter().filter_map(|name| self.kept.get(*name)).flatten();
        let mut all: Vec<Told> = kept.filter(|told| told.id > id).cloned().collect();
        all.sort_by_key(|told| told.id);
        all.dedup(); // a topic that is named twice
        all
    }

    /// The cursor that a stream begins after, and all that it is told at once. Of a gap after some time, nobody knows what it
    /// says.
    fn begin(&self, names: &[&str], start: Start) -> (Id, Vec<Told>) {
        let forgotten = names.iter().map(|name| *self.forgotten.get(*name).unwrap_or(&self.base)).max().unwrap();
        let (asked, known) = match start {
            Start::Now => return (self.newest, Vec::new()),
            Start::Earliest => return (Id::default(), self.after(names, Id::default())),
            Start::Newest(count) => {
                let newest = |name: &&str| {
                    let kept = self.after(&[name], Id::default());
                    kept[kept.len().saturating_sub(count)..].to_vec()
                };
                let mut all: Vec<Told> = names.iter().flat_map(newest).collect();
                all.sort_by_key(|told| told.id);
                all.dedup();
                return (self.newest, all);
            }
            Start::Ago => (None, None),
            Start::After(asked) => {
                let is_future = |id: &Id| id.ms > self.newest.ms + 1_000_000;
                (asked, asked.filter(|id| !is_future(id)).map(|id| id.min(self.newest)))
            }
        };
        if let Some(cursor) = known.filter(|cursor| *cursor >= forgotten) {
            return (cursor, self.after(names, cursor));
        }
        let cursor = known.unwrap_or_default();
        let mut all = self.after(names, cursor);
        let id = all.first().map_or(forgotten, |first| before(first.id));
        let oldest = self.after(names, cursor.max(forgotten)).first().map(|told| told.id);
        let json = |id: Option<Id>| id.map_or("null".into(), |id| format!("\"{id}\""));
        let data = format!("{{\"after\":{},\"oldest\":{}}}", json(asked), json(oldest));
        all.insert(0, Told { id, topic: None, name: "gap".into(), data });
        (id, all)
    }
}

/// A request that the model knows the answer to.
struct Asked {
    form: Form,
    version: &'static str,
    start: Start,
    take: Option<usize>,
    is_poll: bool,
    target: String,
    fields: String,
}

impl Asked {
    /// Any combination that may be, in any order. `resume` is the place of a stream that was cut off.
    fn any(random: &mut Random, model: &Model, names: &[&str], resume: Option<Start>) -> Asked {
        let form = FORMS[random.below(3)];
        let mut parameters = vec![form.parameter().to_string()];
        let mut fields = String::new();
        let some_id = |random: &mut Random| {
            let all = model.after(names, Id::default());
            match random.below(6) {
                0 => Id { ms: model.base.ms / 2, seq: 3 },
                1 => Id { ms: model.newest.ms + 10_000_000, seq: 0 },
                2 => Id { seq: model.newest.seq + 7, ..model.newest },
                3 if !all.is_empty() => before(all[random.below(all.len())].id),
                _ if !all.is_empty() => all[random.below(all.len())].id,
                _ => model.newest,
            }
        };
        // What stands in the page's URL; a cursor wins over it.
        let mut start = match random.below(8) {
            0 => Start::Now,
            1 => Start::Earliest,
            2 => Start::Newest(1),
            3 | 4 => Start::Newest(1 + random.below(6)),
            5 => Start::Ago,
            _ => Start::After(Some(some_id(random))),
        };
        match start {
            Start::Now => {}
            Start::Earliest => parameters.push("since=earliest".into()),
            Start::Newest(1) if random.below(2) == 0 => parameters.push("since=latest".into()),
            Start::Newest(count) => parameters.push(format!("last={count}")),
            Start::Ago => parameters.push("since=10m".into()),
            Start::After(id) => parameters.push(format!("since={}", id.unwrap())),
        }
        let cursor = match (resume, random.below(4)) {
            (Some(Start::After(Some(id))), _) => Some(id.to_string()),
            (_, 0) => Some(some_id(random).to_string()),
            (_, 1) if random.below(3) == 0 => Some("none-of-ours".into()),
            _ => None,
        };
        if let Some(cursor) = cursor {
            start = Start::After(cursor.parse().ok());
            match random.below(3) {
                0 => fields = format!("Last-Event-ID: {cursor}\r\n"),
                1 => parameters.push(format!("last_event_id={cursor}")),
                _ => parameters.push(format!("lastEventId={cursor}")),
            }
        }
        let take = (random.below(2) == 0).then(|| 1 + random.below(6));
        parameters.extend(take.map(|count| format!("take={count}")));
        let is_poll = random.below(4) == 0;
        parameters.extend(is_poll.then_some("poll=30s".into()));
        for n in (1..parameters.len()).rev() {
            parameters.swap(n, random.below(n + 1));
        }
        let target = format!("/events/{}?{}", names.join(","), parameters.join("&"));
        Asked { form, version: VERSIONS[random.below(2)], start, take, is_poll, target, fields }
    }
}

const TOPICS: [&str; 5] = ["a", "b", "c", "d", "never"];

#[test]
fn two_thousand_random_requests_get_what_a_simple_model_says() {
    let keep = 4;
    let server = serve(Config { keep_events: keep, lanes: 2, ..Config::default() });
    let (addr, hub) = (server.addr().unwrap(), server.hub());
    let (_, base) = Wire::subscribe(addr, "/events/never", "");
    let (kept, forgotten) = Default::default();
    let mut model = Model { kept, forgotten, base, newest: base, keep };
    let mut random = Random(20_261_125);
    let mut resume: Option<(Vec<&str>, Start)> = None;
    let (mut gaps, mut cuts, mut ends, mut lived) = (0, 0, 0, 0);
    for round in 0..2_000 {
        for _ in 0..random.below(5) {
            let topic = TOPICS[random.below(4)];
            model.publish(&hub, &mut random, topic);
        }
        let (names, place) = match resume.take() {
            Some((names, place)) => (names, Some(place)),
            None => ((0..=random.below(4)).map(|_| TOPICS[random.below(5)]).collect(), None),
        };
        let asked = Asked::any(&mut random, &model, &names, place);
        let (cursor, mut told) = model.begin(&names, asked.start);
        told.retain(|told| asked.form != Form::Lines || !told.is_gap());
        let is_gap_alone = told.len() == 1 && told[0].is_gap();
        let what = format!("round {round}: {} {:?}, {} told", asked.target, asked.fields, told.len());
        println!("{what}"); // shown where it fails

        let events_at_once = told.iter().filter(|told| !told.is_gap()).count();
        let limit = asked.take.unwrap_or(usize::MAX);
        // Some of what is published while it is open; of a poll, its first event.
        let socket = TcpStream::connect(addr).unwrap();
        let mut reading = Reading::on(socket, &asked.target, asked.form, asked.version, &asked.fields);
        let is_whole = events_at_once >= limit || asked.is_poll && !told.is_empty();
        while told.iter().filter(|told| !told.is_gap()).count() > limit {
            told.pop();
        }
        if let Some(first) = told.first()
            && first.is_gap()
        {
            gaps += 1;
            if matches!(asked.start, Start::Ago) {
                let came = reading.next().unwrap();
                assert!(came.is_gap() && came.id == first.id, "{came:?} instead of {first:?}");
                told.remove(0);
            }
        }
        let quota = if random.below(3) == 0 { random.below(told.len() + 3) } else { usize::MAX };
        for told in told.iter().take(quota) {
            reading.expect(told);
        }
        let mut last = told.iter().take(quota).next_back().map(|told| told.id);
        let mut is_cut = quota < told.len();
        if !is_cut && !is_whole {
            let live = if asked.is_poll { 1 } else { 1 + random.below(keep) };
            let mut left = limit - events_at_once;
            for n in 0..live {
                let topic = if n + 1 == live { names[0] } else { TOPICS[random.below(5)] };
                let event = model.publish(&hub, &mut random, topic);
                if names.contains(&topic) && left > 0 {
                    left -= 1;
                    reading.expect(&event);
                    last = Some(event.id);
                    lived += 1;
                }
            }
            is_cut = left > 0 && !asked.is_poll;
            if !is_cut {
                reading.expect_end();
                ends += 1;
            }
        } else if !is_cut {
            let end = reading.expect_end();
            ends += 1;
            if let Some(end) = end {
                // Where nothing newer is kept, it says the newest id of all topics, if that is another.
                let cursor = last.unwrap_or(cursor);
                let is_ahead = model.newest > cursor && model.after(&names, cursor).is_empty();
                assert_eq!(end.id, is_ahead.then(|| model.newest.to_string()), "{what}");
            }
            assert!(!is_gap_alone || asked.is_poll);
        }
        if is_cut {
            cuts += 1;
            if random.below(2) == 0 {
                reset(&reading.socket);
            }
            resume = last.map(|id| (names, Start::After(Some(id))));
        }
    }
    println!("{gaps} gaps, {cuts} cut off, {ends} ended, {lived} live");
    assert!(gaps > 100 && cuts > 100 && ends > 100 && lived > 100, "it shows too little");
}
