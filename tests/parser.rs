//! The parser of event streams, beside the plainest way to write one down: from a whole text, line by line. Part of the
//! library, since nothing outside of it reaches the parser alone; the fuzz target compares the same two.

use crate::parser::{Parsed, Parser};

/// What the standard makes of a whole stream.
fn model(bytes: &[u8]) -> Vec<Parsed> {
    let text = String::from_utf8_lossy(bytes);
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text).replace("\r\n", "\n").replace('\r', "\n");
    let lines: Vec<&str> = text.split('\n').collect();
    let (mut events, mut event, mut data) = (Vec::new(), Parsed::default(), String::new());
    for line in &lines[..lines.len() - 1] {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" if line.is_empty() => {
                if let Some(data) = data.strip_suffix('\n') {
                    events.push(Parsed { data: data.into(), ..event });
                }
                (event, data) = (Parsed::default(), String::new());
            }
            "event" => event.name = value.into(),
            "data" => data += &format!("{value}\n"),
            "id" if value.contains('\0') => {}
            "id" => event.id = (!value.is_empty()).then(|| value.into()),
            _ => {}
        }
    }
    events
}

/// Reads the stream in pieces, whose lengths `next` gives.
fn parse(bytes: &[u8], mut next: impl FnMut() -> usize) -> Vec<Parsed> {
    let (mut parser, mut events, mut rest) = (Parser::new(1_000_000, 1_000_000), Vec::new(), bytes);
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at(next().clamp(1, rest.len()));
        let mut piece = piece;
        while !piece.is_empty() {
            let mut some = Vec::new();
            let used = parser.feed(piece, &mut some, 1).unwrap();
            assert!(used > 0 && some.len() <= 1, "it goes on");
            events.append(&mut some);
            piece = &piece[used..];
        }
        rest = behind;
    }
    events
}

/// The two agree, however the bytes come.
pub fn check(bytes: &[u8]) {
    let expected = model(bytes);
    assert_eq!(parse(bytes, || usize::MAX), expected, "in one piece: {:?}", String::from_utf8_lossy(bytes));
    assert_eq!(parse(bytes, || 1), expected, "byte by byte: {:?}", String::from_utf8_lossy(bytes));
    let mut seed = bytes.iter().fold(1_u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(*byte)));
    let random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as usize % 9
    };
    assert_eq!(parse(bytes, random), expected, "in pieces: {:?}", String::from_utf8_lossy(bytes));
}

#[cfg(test)]
fn event(name: &str, data: &str, id: Option<&str>) -> Parsed {
    Parsed { name: name.into(), data: data.into(), id: id.map(String::from) }
}

#[test]
fn each_rule_of_the_standard_is_kept() {
    for (text, expected) in [
        // The examples of the standard.
        (
            "data: This is the first message.\n\ndata: This is the second message, it\ndata: has two lines.\n\n",
            vec![
                event("", "This is the first message.", None),
                event("", "This is the second message, it\nhas two lines.", None),
            ],
        ),
        (
            "event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\n",
            vec![event("add", "73857293", None), event("remove", "2153", None)],
        ),
        ("data: YHOO\ndata: +2\ndata: 10\n\n", vec![event("", "YHOO\n+2\n10", None)]),
        (
            ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
            vec![event("", "first event", Some("1")), event("", "second event", None), event("", " third event", None)],
        ),
        ("data\n\ndata\ndata\n\ndata:\n", vec![event("", "", None), event("", "\n", None)]),
        ("data:test\n\ndata: test\n\n", vec![event("", "test", None), event("", "test", None)]),
        // Ends of lines, each by itself and mixed.
        (
            "data: a\r\rdata: b\r\n\r\ndata: c\n\r\n",
            vec![event("", "a", None), event("", "b", None), event("", "c", None)],
        ),
        ("data: a\r\n\rdata: b\n\n", vec![event("", "a", None), event("", "b", None)]),
        ("\u{feff}data: a\n\n", vec![event("", "a", None)]),
        ("\u{feff}\u{feff}data: a\n\n", vec![]),
        ("\n\u{feff}data: a\n\n", vec![]),
        // Fields.
        ("id: 1\n\ndata: a\n\n", vec![event("", "a", None)]), // the id says where the stream is, not which event this is
        ("id: 1\nid: 2\ndata: a\nid: x\0\n\n", vec![event("", "a", Some("2"))]),
        ("id: 1\nid\ndata: a\n\n", vec![event("", "a", None)]),
        ("event: x\nevent\ndata: a\n\n", vec![event("", "a", None)]),
        ("event: x\n\ndata: a\n\n", vec![event("", "a", None)]),
        (
            "retry: 5\nDATA: no\n data: no\ndata : no\nunknown: x\ndata: a: b\n:data: no\n\n",
            vec![event("", "a: b", None)],
        ),
        // The end.
        ("data: a\n\ndata: b\n", vec![event("", "a", None)]),
        ("data: a\n\ndata: b", vec![event("", "a", None)]),
        ("", vec![]),
    ] {
        assert_eq!(model(text.as_bytes()), expected, "{text:?}");
        check(text.as_bytes());
    }
    assert_eq!(model(b"data: \xff\xe2\x82\n\n"), [event("", "\u{fffd}\u{fffd}", None)]);
}

#[test]
fn an_event_is_there_as_soon_as_a_lone_cr_has_ended_it() {
    let (mut parser, mut events) = (Parser::new(100, 100), Vec::new());
    parser.feed(b"data: a\r\r", &mut events, 9).unwrap();
    assert_eq!(events, [event("", "a", None)]);
    parser.feed(b"\ndata: b\n\n", &mut events, 9).unwrap();
    assert_eq!(events[1..], [event("", "b", None)], "the LF belonged to the CR");
}

#[test]
fn random_bytes_are_read_as_by_the_model_however_they_come() {
    const PIECES: [&[u8]; 18] = [
        b"data",
        b"event",
        b"id",
        b"retry",
        b":",
        b": ",
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"x",
        b" ",
        b"\0",
        b"\xff",
        "é€".as_bytes(),
        b"\xef\xbb\xbf",
        b"data: y\n",
        b"id: 7\n",
    ];
    let mut seed = 88_172_645_463_325_252_u64;
    let mut below = |limit: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % limit as u64) as usize
    };
    let mut events = 0;
    for _ in 0..10_000 {
        let bytes: Vec<u8> = (0..below(60)).flat_map(|_| PIECES[below(PIECES.len())].iter().copied()).collect();
        check(&bytes);
        events += model(&bytes).len();
    }
    assert!(events > 2_000, "only {events} events: that shows little");
}

#[test]
fn a_line_and_the_data_of_an_event_have_a_limit_each() {
    let read = |line_limit, data_limit, text: &str| {
        let (mut parser, mut events) = (Parser::new(line_limit, data_limit), Vec::new());
        text.bytes().try_for_each(|byte| parser.feed(&[byte], &mut events, 9).map(drop)).map(|()| events.len())
    };
    assert_eq!(read(7, 100, "data: a\r\n\r\ndata: b\n\n"), Ok(2));
    assert_eq!(
        read(7, 100, "data: a\n\ndata: bc"),
        Err("a line of event 2 is longer than 7 bytes (line_bytes)".into())
    );
    assert_eq!(read(7, 100, ": comment").unwrap_err().split(" of").next(), Some("a line"), "of whatever kind");
    assert_eq!(read(10, 3, "data: a\ndata: b\n\n"), Ok(1));
    assert_eq!(
        read(10, 3, "data: a\ndata: bc\n"),
        Err("the data of event 1 is longer than 3 bytes (line_bytes)".into())
    );
    assert!(read(10, 5, &"data\n".repeat(7)).is_err(), "ends of lines count, too");
}
