//! The journal's format, whole, cut, and damaged.

use crate::common::*;
use brooklet::{Event, Id};
use std::fs;
use std::io::ErrorKind;
use std::time::UNIX_EPOCH;

#[test]
fn the_journal_is_an_event_stream_of_topic_key_sum_and_the_bytes_on_the_wire() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let server = serve(with_journal(&path));
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), "/events/a,b", "");
    post(server.addr().unwrap(), "/events/a?event=greeting&retry=1500&key=sum:%20x", "one\ntwo");
    post(server.addr().unwrap(), "/events/b", "sum: 3");
    let frames = [stream.take_until(b"\n\n").unwrap(), stream.take_until(b"\n\n").unwrap()];
    let written = blocks(&fs::read(&path).unwrap());
    assert!(!is_event(&written[0]), "the first says from where on ids are known");
    assert_eq!(str::from_utf8(&written[1]).unwrap(), sealed("", "id: 0-0\n\n"), "its name is on the disk");
    for (block, (head, frame)) in written[2..].iter().zip(["topic: a\nkey: sum: x\n", "topic: b\n"].iter().zip(&frames))
    {
        let mut crc = crc32fast::Hasher::new();
        crc.update(head.as_bytes());
        crc.update(frame);
        let expected = [format!("{head}sum: {:08x}\n", crc.finalize()).as_bytes(), frame].concat();
        assert_eq!(str::from_utf8(block), str::from_utf8(&expected));
    }
    assert_eq!(written.len(), 4);
}

#[test]
fn a_file_cut_at_any_byte_of_its_last_three_events_recovers_all_before_and_goes_on() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let server = serve(with_journal(&path));
    for n in 0..5 {
        let event = Event::new(format!("line {n}\nsum: 1\n\u{1f980}")).name("n").key(format!("key {n}"));
        server.hub().publish(["a", "b"][n % 2], event).unwrap();
    }
    drop(server);
    let whole = fs::read(&path).unwrap();
    let all = blocks(&whole);
    let first_cut = all[..4].iter().map(Vec::len).sum();
    for cut in first_cut..=whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        let expected: Vec<_> = blocks(&whole[..cut])[2..].iter().map(|block| frame(block)).collect();
        let server = serve(with_journal(&path));
        assert_eq!(kept(server.addr().unwrap(), "a,b"), expected, "cut at {cut}");
        let id = server.hub().publish("a", Event::new("after")).unwrap();
        assert!(expected.iter().all(|frame| id_of(frame) < id));
        drop(server);
        let appended = blocks(&fs::read(&path).unwrap());
        assert_eq!(appended.len(), expected.len() + 3);
        assert_eq!(appended.concat(), fs::read(&path).unwrap(), "whole blocks only");
        let server = serve(with_journal(&path));
        assert_eq!(kept(server.addr().unwrap(), "a,b").len(), expected.len() + 1, "cut at {cut}");
    }
}

#[test]
fn ten_thousand_damaged_files_never_panic_and_never_invent_or_withhold_an_event() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let server = serve(with_journal(&path));
    for n in 0..12 {
        let mut event = Event::new(format!("data {n}\n\nmore"));
        if n % 3 == 0 {
            event = event.key(format!("k{n}")).name("named");
        }
        server.hub().publish(&format!("t{}", n % 3), event).unwrap();
    }
    drop(server);
    let whole = fs::read(&path).unwrap();
    let originals = blocks(&whole);
    let (mut random, mut refused) = (Random(23), 0);
    for round in 0..10_000 {
        let mut bytes = whole.clone();
        for _ in 0..random.below(4) {
            let at = random.below(bytes.len());
            bytes[at] = [bytes[at] ^ (1 << random.below(8)), b'\n', random.below(256) as u8][random.below(3)];
        }
        match random.below(4) {
            0 => bytes.truncate(random.below(bytes.len() + 1)),
            1 => drop(bytes.splice(0..0, b"\n\n"[..random.below(3)].iter().copied())),
            2 => {
                let at = random.below(bytes.len());
                bytes.drain(at..(at + random.below(200)).min(whole.len()));
            }
            _ => {}
        }
        fs::write(&path, &bytes).unwrap();
        // Blank lines are nothing; a good block may stand at the end of one that has lost its own.
        let found: Vec<_> = blocks(&bytes).into_iter().filter(|block| block != b"\n").collect();
        let whole_in = |block: &Vec<u8>| {
            let mut behind = originals.iter().filter(|good| block.ends_with(good) && good.starts_with(b"topic: "));
            if originals.contains(block) { Some(block.clone()) } else { behind.next().cloned() }
        };
        let good: Vec<_> = found.iter().filter_map(whole_in).collect();
        let expected: Vec<_> = good.iter().filter(|block| is_event(block)).map(|block| frame(block)).collect();
        match bind(with_journal(&path)) {
            Ok(server) => {
                let server = server.spawn().unwrap();
                assert_eq!(kept(server.addr().unwrap(), "t0,t1,t2"), expected, "round {round}");
                drop(server);
                let copies = fs::read_dir(&dir.0).unwrap().filter_map(|entry| {
                    let entry = entry.unwrap().path();
                    entry.to_str().unwrap().contains(".damaged.").then_some(entry)
                });
                let copies: Vec<_> = copies.collect();
                let is_damaged = found.iter().any(|block| !originals.contains(block))
                    || found.first().is_some_and(|first| *first != originals[0]);
                // An end without its blank line is torn where it begins as a block did; else it may be damage, too.
                let tail = &bytes[blocks(&bytes).concat().len()..];
                if is_damaged || originals.iter().any(|block| block.starts_with(tail)) {
                    assert_eq!(copies.len(), usize::from(is_damaged), "round {round}");
                }
                for copy in copies {
                    assert_eq!(fs::read(&copy).unwrap(), bytes, "round {round}");
                    fs::remove_file(copy).unwrap();
                }
                let after = fs::read(&path).unwrap();
                assert_eq!(blocks(&after).concat(), after, "round {round}");
            }
            Err(error) => {
                assert!(good.is_empty() && error.kind() == ErrorKind::InvalidData, "round {round}: {error}");
                assert_eq!(fs::read(&path).unwrap(), bytes, "what is no journal stays as it is");
                refused += 1;
            }
        }
    }
    assert!(refused < 1_000, "{refused} had nothing left to read");
}

/// As a file system may leave them that lost the machine between the length and the bytes.
#[test]
fn a_block_of_zeros_or_without_its_end_takes_no_other_along() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let server = serve(with_journal(&path));
    for n in 0..4 {
        server.hub().publish("a", Event::new(n.to_string()).key(format!("topic: {n}"))).unwrap();
    }
    drop(server);
    let all = blocks(&fs::read(&path).unwrap());
    let zeros = |length: usize| vec![0; length];
    let cut = |cut: usize| all[3][..all[3].len() - cut].to_vec();
    let half = [&all[3][..20], &zeros(all[3].len() - 20)].concat();
    let beyond_all_limits = zeros(300_000);
    for (n, damaged) in [zeros(all[3].len()), half, cut(1), cut(2), cut(9), beyond_all_limits].iter().enumerate() {
        let bytes = [&all[..3].concat(), &damaged[..], &all[4..].concat()].concat();
        fs::write(&path, bytes).unwrap();
        let server = serve(with_journal(&path).with(|config| {
            config.keep_bytes = 100_000;
            config.body_bytes = 1_000;
            config.line_bytes = 1_000;
        }));
        let found: Vec<_> = kept(server.addr().unwrap(), "a");
        let expected: Vec<_> = [2, 4, 5].iter().map(|n| frame(&all[*n])).collect();
        assert_eq!(found, expected, "damage {n}");
        assert!(Wire::subscribe(server.addr().unwrap(), "/events/a?last_event_id=1-1", "").0.event().unwrap().is_gap());
    }
}

#[test]
fn what_is_damaged_is_named_with_its_offset_and_every_cursor_hears_a_gap() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let server = serve(with_journal(&path));
    let first = server.hub().publish("a", Event::new("one")).unwrap();
    server.hub().publish("a", Event::new("two")).unwrap();
    let last = server.hub().publish("a", Event::new("three")).unwrap();
    drop(server);
    let mut bytes = fs::read(&path).unwrap();
    let offset: usize = blocks(&bytes)[..3].iter().map(Vec::len).sum();
    bytes[offset + 8] = b'!';
    fs::write(&path, &bytes).unwrap();
    let process = Process::start(&["--journal", &path]);
    for line in ["kept 2 events", &format!("1 of its blocks cannot be read, at bytes [{offset}]"), ".damaged."] {
        process.wait_for_log(line);
    }
    for cursor in [first, last] {
        let (mut stream, _) = Wire::subscribe(process.addr, &format!("/events/a?last_event_id={cursor}"), "");
        assert!(stream.event().unwrap().is_gap(), "after {cursor}");
        if cursor == first {
            assert_eq!(stream.event().unwrap().data(), "three");
        }
    }
}

#[test]
fn a_journal_without_its_beginning_tells_every_cursor_of_a_gap() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let server = serve(with_journal(&path));
    let ids: Vec<Id> = (0..4).map(|n| server.hub().publish("a", Event::new(n.to_string())).unwrap()).collect();
    drop(server);
    let all = blocks(&fs::read(&path).unwrap());
    // As copying and truncating, or tail, would leave it; where only the first block is missing, a mark comes first.
    for (missing, left) in [(4, 2), (1, 4)] {
        fs::write(&path, all[missing..].concat()).unwrap();
        let server = serve(with_journal(&path));
        let addr = server.addr().unwrap();
        let (mut stream, _) = Wire::subscribe(addr, &format!("/events/a?last_event_id={}", ids[0]), "");
        assert!(stream.event().unwrap().is_gap());
        assert_eq!(kept(addr, "a").len(), left);
    }
}

/// Whatever is published has a higher id than all before, or it would not be found again.
#[test]
fn an_id_that_leaves_no_room_for_others_is_damage() {
    let most = u64::MAX;
    let lasts = [
        format!("data: x\nid: {most}-{most}\n\n"),
        format!("id: {most}-{most}\ndata: x\n\n"), // as once
        format!("id: 9-{most}\n\n"),
    ];
    for last in lasts {
        let dir = Scratch::new();
        let path = dir.path("events");
        let all = [
            sealed("", "id: 1-0\n\n"),
            sealed("topic: a\n", &format!("id: {most}-7\ndata: one\n\n")),
            sealed("topic: a\n", &last),
        ];
        fs::write(&path, all.concat()).unwrap();
        for _ in 0..2 {
            let server = serve(with_journal(&path));
            let addr = server.addr().unwrap();
            let (mut stream, _) = Wire::subscribe(addr, "/events/a", "");
            let id = server.hub().publish("a", Event::new("next")).unwrap();
            assert_eq!(stream.event().unwrap().id(), id);
            assert_eq!(id_of(kept(addr, "a").last().unwrap()), id);
        }
        let server = serve(with_journal(&path));
        assert_eq!(kept(server.addr().unwrap(), "a").len(), 3, "one, and both that were published");
    }
}

/// The id once stood before the data. What such a journal holds goes out as it did then, and new events are appended.
#[test]
fn a_journal_of_before_whose_ids_stand_before_the_data_is_read() {
    let dir = Scratch::new();
    let path = dir.path("events");
    let now = UNIX_EPOCH.elapsed().unwrap().as_millis();
    let frames = [
        format!("event: greeting\nid: {now}-0\ndata: one\ndata: id: 7-7\nretry: 1500\n\n"),
        format!("id: {now}-1\ndata: id: 9-9\n\n"),
        format!("event: e\nid: {now}-2\ndata: \n\n"),
    ];
    let old: String = frames.iter().map(|frame| sealed("topic: a\nkey: k\n", frame)).collect();
    fs::write(&path, sealed("", "id: 1-0\n\n") + &old).unwrap();
    for round in 0..3 {
        let server = serve(with_journal(&path));
        let found = kept(server.addr().unwrap(), "a");
        assert_eq!(found.len(), 3 + round);
        for (frame, found) in frames.iter().zip(&found) {
            assert_eq!(str::from_utf8(found), Ok(frame.as_str()));
        }
        let id = server.hub().publish("a", Event::new("id: 9-9")).unwrap();
        let new = format!("data: id: 9-9\nid: {id}\n\n");
        assert_eq!(kept(server.addr().unwrap(), "a").last().unwrap(), new.as_bytes());
    }
}
