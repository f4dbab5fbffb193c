//! What a stream's parameters do: where it begins (`last`, `since=latest`), where it ends (`take`), and the forms for scripts
//! (`as`), each alone and all of them together, against a model of what must come.

use crate::common::*;
use brooklet::{Config, Event, Hub, Id};
use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
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
    /// What stood in whole chunks, or came without them; up to `taken` it was taken.
    body: Vec<u8>,
    taken: usize,
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
            taken: 0,
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
            Err(error) => panic!("{error}, after {:?}", String::from_utf8_lossy(&self.body[self.taken..])),
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
        loop {
            let rest = &self.body[self.taken..];
            if let Some(at) = rest.windows(end.len()).position(|window| window == end) {
                let taken = &rest[..at + end.len()];
                self.taken += taken.len();
                return Some(str::from_utf8(taken).unwrap().into());
            }
            self.body.drain(..std::mem::take(&mut self.taken));
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
        let body = str::from_utf8(&self.body[self.taken..]).unwrap();
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
    let server = serve(Config::default().with(|config| {
        config.keep_events = keep;
        config.lanes = 2;
    }));
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

/// Numbered, and with what must be escaped and has lines of its own.
fn awkward(n: usize, bytes: usize) -> String {
    format!("{n} \"\\\n\u{1}é\n{}", "a rather long line of which there are many \"\n".repeat(bytes / 46))
}

fn publish_told(hub: &Hub, topic: &str, data: String) -> Told {
    let id = hub.publish(topic, Event::new(data.clone())).unwrap();
    Told { id, topic: Some(topic.into()), name: "message".into(), data }
}

#[test]
fn json_is_one_object_a_line_and_lines_are_the_data_alone() {
    let server = serve_default();
    let (addr, hub) = (server.addr().unwrap(), server.hub());
    let first = hub.publish("a", Event::new("one\ntwo \"\\\"\t\0\u{85}é").name("note")).unwrap();
    let second = hub.publish("b", Event::new("")).unwrap();
    let mut json = Reading::open(addr, "/events/a,b?as=json&since=earliest&take=2", Form::Json);
    while json.fill() {}
    let first = format!(r#"{{"id":"{first}","topic":"a","event":"note","data":"one\ntwo \"\\\"\u0009\u0000\u0085é"}}"#);
    let second = format!(r#"{{"id":"{second}","topic":"b","event":"message","data":""}}"#);
    assert_eq!(String::from_utf8(json.body).unwrap(), format!("{first}\n{second}\n"));
    let mut lines = Reading::open(addr, "/events/a,b?as=lines&since=earliest&take=2", Form::Lines);
    while lines.fill() {}
    assert_eq!(String::from_utf8(lines.body).unwrap(), "one\ntwo \"\\\"\t\0\u{85}é\n\n");
}

#[test]
fn a_journals_event_without_data_is_an_empty_line_and_does_not_end_the_stream() {
    let dir = Scratch::new();
    let path = dir.path("journal");
    let frames = ["retry: 5\nid: 6-0\n\n", "data: x\nid: 7-0\n\n"].map(|frame| sealed("topic: a\n", frame));
    std::fs::write(&path, sealed("", "id: 5-0\n\n") + &frames.concat()).unwrap();
    let server = serve(with_journal(&path).with(|config| config.keep_age = Duration::MAX));
    let target = "/events/a?last=9&take=2&as=lines";
    let mut lines = Reading::open(server.addr().unwrap(), target, Form::Lines);
    while lines.fill() {}
    assert_eq!((str::from_utf8(&lines.body), lines.is_over), (Ok("\nx\n"), true));
}

#[test]
fn a_gap_and_a_heartbeat_are_objects_in_json_and_nothing_in_lines() {
    let server = serve(Config::default().with(|config| config.heartbeat = Duration::from_millis(3_500)));
    let addr = server.addr().unwrap();
    let target = "/events/a?last_event_id=1-1&as=";
    let mut lines = Reading::open(addr, &format!("{target}lines"), Form::Lines);
    let mut json = Reading::open(addr, &format!("{target}json"), Form::Json);
    let gap = json.next().unwrap();
    assert!(gap.is_gap() && gap.name == "gap" && gap.data == "{\"after\":\"1-1\",\"oldest\":null}", "{gap:?}");
    for _ in 0..2 {
        let beat = json.take_until(b"\n").unwrap();
        assert_eq!(beat, "{\"id\":null,\"topic\":null,\"event\":\"heartbeat\",\"data\":null}\n");
    }
    let event = publish_told(&server.hub(), "a", "after".into());
    json.expect(&event);
    lines.expect(&event);
    server.hub().publish("a", Event::new("end")).unwrap();
    assert_eq!(lines.take_until(b"\n").as_deref(), Some("end\n"));
}

#[test]
fn a_poll_of_lines_waits_for_its_first_event_though_a_gap_comes_first() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let mut polls = FORMS
        .map(|form| Reading::open(addr, &format!("/events/a?last_event_id=1-1&poll=30s&{}", form.parameter()), form));
    for poll in &mut polls[..] {
        if poll.form != Form::Lines {
            assert!(poll.next().unwrap().is_gap());
            poll.expect_end();
        }
    }
    let event = publish_told(&server.hub(), "a", "x".into());
    polls[1].expect(&event);
    polls[1].expect_end();
    let mut empty = Reading::open(addr, "/events/a?poll=1ms&as=lines", Form::Lines);
    empty.expect_end();
}

#[test]
fn head_says_the_form() {
    let addr = serve_default();
    let addr = addr.addr().unwrap();
    for form in FORMS {
        for version in VERSIONS {
            let mut wire = Wire::connect(addr);
            let target = format!("/events/a?{}", form.parameter());
            wire.send(format!("HEAD {target} HTTP/{version}\r\nHost: localhost\r\n\r\n").as_bytes());
            let head = String::from_utf8(wire.rest()).unwrap();
            assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
            assert_eq!(header(&head, "content-type"), Some(form.content_type()));
        }
    }
}

#[test]
fn what_cannot_be_read_is_refused_and_says_what_can() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    for (query, says) in [
        ("last=3&since=earliest", "leave one of them out"),
        ("since=latest&last=3", "leave one of them out"),
        ("last=1&since=10m&last_event_id=1-1", "leave one of them out"),
        ("last=", "last is a number of events, 1 or more; not \"\""),
        ("last=0", "not \"0\""),
        ("last=-1", "not \"-1\""),
        ("last=%2B1", "not \"+1\""),
        ("last=1.5", "1 or more"),
        ("last=18446744073709551616", "1 or more"),
        ("take=0", "take is a number of events, 1 or more; not \"0\""),
        ("take=all", "1 or more"),
        ("as=xml", "as is lines or json"),
        ("as=", "as is lines or json"),
        ("as=JSON", "as is lines or json"),
        ("since=newest", "since is earliest, latest, a time such as 10m, or an id"),
    ] {
        let answer = get(addr, &format!("/events/a?{query}"));
        assert_eq!((answer.status, answer.body.contains(says)), (400, true), "{query}: {answer:?}");
    }
    server.hub().publish("a", Event::new("x")).unwrap();
    for query in ["last=18446744073709551615", "take=18446744073709551615&since=earliest"] {
        let mut wire = Wire::stream(addr, &format!("/events/a?{query}"), "");
        assert_eq!(wire.event().unwrap().data(), "x", "{query}");
    }
}

#[test]
fn a_script_that_finds_no_room_gets_503_where_a_browser_gets_a_stream_that_ends() {
    let config = Config::default().with(|config| {
        config.subscribers = 1;
        config.allow_origins = vec!["http://page.example".into()];
    });
    let server = serve(config);
    let addr = server.addr().unwrap();
    let _holder = Wire::subscribe(addr, "/events/a", "");
    for form in ["json", "lines"] {
        for version in VERSIONS {
            let origin = "Origin: http://page.example\r\n";
            let request = format!("GET /events/a?as={form} HTTP/{version}\r\nHost: localhost\r\n{origin}\r\n");
            let answer = Wire::ask(addr, &request);
            assert_eq!((answer.status, &*answer.body), (503, "no room for another stream\n"), "{answer:?}");
            let seconds: u64 = answer.header("retry-after").unwrap().parse().unwrap();
            assert!((1..=15).contains(&seconds), "{answer:?}");
            assert_eq!(answer.header("access-control-allow-origin"), Some("http://page.example"));
        }
    }
    let mut wire = Wire::stream(addr, "/events/a", "");
    assert_eq!(wire.block().unwrap().comments, ["no room for another stream"]);
    assert_eq!(metric(addr, "sent_away_total"), 5);
}

#[test]
fn when_the_server_stops_every_form_ends_after_a_whole_line() {
    let server = serve_default();
    let addr = server.addr().unwrap();
    let mut readings = Vec::new();
    for form in FORMS {
        for version in VERSIONS {
            let target = format!("/events/a?{}", form.parameter());
            readings.push(Reading::on(TcpStream::connect(addr).unwrap(), &target, form, version, ""));
        }
    }
    wait_for_metric(addr, "live", readings.len() as u64); // who is behind when the server stops resumes later
    let event = publish_told(&server.hub(), "a", "last".into());
    let stopper = thread::spawn(move || drop(server));
    for reading in &mut readings {
        reading.expect(&event);
        reading.expect_end();
    }
    stopper.join().unwrap();
}

#[test]
fn take_is_exact_in_bursts_however_many_follow() {
    let server = serve(Config::default().with(|config| config.lanes = 2));
    let (addr, hub) = (server.addr().unwrap(), server.hub());
    let mut random = Random(5);
    let readers: Vec<_> = (0..60)
        .map(|n| {
            let (form, version, take) = (FORMS[n % 3], VERSIONS[n % 2], 1 + random.below(300));
            let target = format!("/events/a,b?{}&take={take}", form.parameter());
            (take, Reading::on(TcpStream::connect(addr).unwrap(), &target, form, version, ""))
        })
        .collect();
    let mut told = Vec::new();
    while told.len() < 300 {
        let topic = ["a", "b"][random.below(2)];
        for _ in 0..[1, 1, 7, 50][random.below(4)] {
            told.push(publish_told(&hub, topic, awkward(told.len(), 30)));
        }
    }
    for (take, mut reading) in readers {
        told[..take].iter().for_each(|told| reading.expect(told));
        reading.expect_end();
    }
    wait_for_metric(addr, "subscribers", 0);
}

/// In each form a reader that takes nothing is pushed behind by its lane, in the middle of an event; and so again.
#[test]
fn who_is_pushed_behind_in_the_middle_gets_the_rest_in_its_form_and_no_more_than_it_takes() {
    for (form, version) in FORMS.into_iter().flat_map(|form| VERSIONS.map(|version| (form, version))) {
        let server = serve(patient().with(|config| {
            config.keep_events = 1_000_000;
            config.keep_bytes = 1 << 30;
            config.lanes = 1;
        }));
        let (addr, hub) = (server.addr().unwrap(), server.hub());
        let take = 1_000;
        let target = format!("/events/a,b?take={take}&{}", form.parameter());
        let mut reading = Reading::on(narrow_socket(addr, 32_768, Some(1_448)).unwrap(), &target, form, version, "");
        let (mut told, mut read) = (Vec::new(), 0);
        for round in 1..=2 {
            wait_for_metric(addr, "live", 1); // it has had everything
            while metric(addr, "woken_total") < round {
                for _ in 0..5 {
                    told.push(publish_told(&hub, ["a", "b"][told.len() / 7 % 2], awkward(told.len(), 50_000)));
                }
                assert!(told.len() < take, "more than sockets hold, and it is not behind");
            }
            told[read..].iter().for_each(|told| reading.expect(told));
            read = told.len();
        }
        told.extend((read..take + 50).map(|n| publish_told(&hub, "a", awkward(n, 10))));
        told[read..take].iter().for_each(|told| reading.expect(told));
        reading.expect_end();
    }
}

#[test]
fn what_is_older_than_the_newest_n_does_not_come_and_is_no_gap_when_it_is_forgotten() {
    for form in FORMS {
        let server = serve(patient().with(|config| {
            config.keep_events = 150;
            config.keep_bytes = 1 << 30;
        }));
        let (addr, hub) = (server.addr().unwrap(), server.hub());
        let mut told: Vec<Told> = (0..100).map(|n| publish_told(&hub, "a", awkward(n, 60_000))).collect();
        told.extend((0..150).map(|n| publish_told(&hub, "b", awkward(n, 10))));
        told.push(publish_told(&hub, "a", awkward(100, 10)));
        // Of `a`, all but the first; of `b`, the newest hundred.
        let target = format!("/events/b,a,c?last=100&{}", form.parameter());
        let mut reading = Reading::on(narrow_socket(addr, 32_768, Some(1_448)).unwrap(), &target, form, "1.1", "");
        told.drain(100..150);
        told.remove(0);
        told[..7].iter().for_each(|told| reading.expect(told));
        // It is in the middle of `a`, which came first: what `b` forgets now, it has not asked for.
        told.extend((0..50).map(|n| publish_told(&hub, "b", awkward(n, 10))));
        told.push(publish_told(&hub, "c", "end".into()));
        told[7..].iter().for_each(|told| reading.expect(told));
        assert_eq!(metric(addr, "gaps_total"), 0);
    }
}

#[test]
fn what_is_forgotten_of_the_newest_n_before_it_came_is_a_gap_that_take_does_not_count() {
    let server = serve(patient().with(|config| {
        config.keep_events = 150;
        config.keep_bytes = 1 << 30;
    }));
    let (addr, hub) = (server.addr().unwrap(), server.hub());
    (0..150).for_each(|n| drop(publish_told(&hub, "b", awkward(n, 60_000))));
    let target = "/events/a,b?last=100&take=140&as=json";
    let mut reading = Reading::on(narrow_socket(addr, 32_768, Some(1_448)).unwrap(), target, Form::Json, "1.1", "");
    assert!(reading.next().unwrap().data.starts_with("50 "));
    // The newest hundred of then, and the first of those that are published now, are forgotten before they have come.
    (150..320).for_each(|n| drop(publish_told(&hub, "b", awkward(n, 10))));
    let (mut last, mut gaps, mut holes, mut is_told) = (50, 0, 0, false);
    for _ in 1..140 {
        let mut came = reading.next().unwrap();
        while came.is_gap() {
            (gaps, is_told) = (gaps + 1, true);
            came = reading.next().unwrap();
        }
        let n: usize = came.data.split(' ').next().unwrap().parse().unwrap();
        assert!(n == last + 1 || n > last && is_told, "{n} after {last}, and no gap before it");
        holes += usize::from(n != last + 1);
        (last, is_told) = (n, false);
    }
    reading.expect_end();
    assert!(gaps >= holes && holes > 0, "{gaps} gaps, {holes} holes");
}

#[test]
fn lines_have_no_heartbeat_and_a_reader_that_closed_is_noticed_all_the_same() {
    let server = serve(Config::default().with(|config| config.lanes = 1));
    let (addr, hub) = (server.addr().unwrap(), server.hub());
    let open = |version| {
        let socket = TcpStream::connect(addr).unwrap();
        Reading::on(socket, "/events/a?as=lines", Form::Lines, version, "")
    };
    let closed = open("1.1");
    wait_for_metric(addr, "subscribers", 1);
    drop(closed);
    wait_for_metric(addr, "subscribers", 0);
    // One that has only ended its sending side keeps its stream. It is swept before the one that has closed behind it.
    let mut readings = VERSIONS.map(open);
    let marker = open("1.1");
    wait_for_metric(addr, "live", 3);
    readings.iter().for_each(|reading| reading.socket.shutdown(Shutdown::Write).unwrap());
    drop(marker);
    wait_for_metric(addr, "subscribers", 2);
    for data in ["one", "two\nlines"] {
        let event = publish_told(&hub, "a", data.into());
        readings.iter_mut().for_each(|reading| reading.expect(&event));
    }
    // They have said already that they send nothing more: now only an event tells.
    drop(readings);
    wait_for("the next event to find nobody", || {
        hub.publish("a", Event::new("x")).unwrap();
        (metric(addr, "subscribers") == 0).then_some(())
    });
}
