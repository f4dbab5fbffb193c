//! The command as a person runs it: flags, the page, stopping.

use crate::{both, common::*};
use base64::prelude::*;
use sha2::{Digest, Sha256};
use std::process::{Command, Output};

fn run(flags: &[&str]) -> Output {
    output(Command::new(BROOKLET).args(flags))
}

#[test]
fn the_articles_stream_has_exactly_these_bytes_and_its_counter_goes_on_after_the_pause() {
    let line = both::the_articles_stream_has_exactly_these_bytes(&Process::start(&[]));
    for part in
        ["peer=127.0.0.1:", "path=\"/test\"", "reason=\"the peer closed the connection\"", "seconds=", "events=7"]
    {
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn each_stream_has_its_own_timer() {
    both::each_stream_has_its_own_timer(&Process::start(&[]));
}

#[test]
fn ctrl_c_ends_a_thousand_streams_with_a_retry_and_the_process_with_success() {
    for (signal, count) in [("INT", 1_000), ("TERM", 50_usize)] {
        let mut process = Process::start(&["--log", "off"]);
        let target = |n| ["/events/a", "/events/a,b", "/test", "/events/c?poll"][n % 4];
        let streams: Vec<Wire> = (0..count).map(|n| Wire::stream(process.addr, target(n), "")).collect();
        let mut publisher = Wire::connect(process.addr);
        publisher.send(b"PUT /events/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\na\n\r\n");
        wait_for_metric(process.addr, "published_total", 1);
        wait_for_metric(process.addr, "subscribers", count as u64);
        let last_blocks = both::stopping_ends_each_stream_with_a_retry(&mut process, signal, streams);
        assert!(last_blocks.iter().all(|last| last.comments == ["the server is stopping"]), "{last_blocks:?}");
        let retries: Vec<u64> = last_blocks.iter().map(|last| last.retry.unwrap()).collect();
        assert!(retries.iter().all(|retry| (1_500..=4_500).contains(retry)), "{retries:?}");
        let answer = publisher.answer();
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("3")));
        assert!(answer.body.starts_with("the server is stopping; published 1, last id"), "{}", answer.body);
    }
}

#[test]
fn under_nohup_it_survives_the_end_of_its_terminal() {
    let mut nohup = Command::new("nohup");
    let process = Process::from(nohup.args([BROOKLET, "--listen", "127.0.0.1:0"]));
    process.signal("HUP");
    for _ in 0..20 {
        assert_eq!(get(process.addr, "/health").status, 200);
    }
}

#[test]
fn help_fits_one_screen_and_names_every_flag() {
    let output = run(&["--help"]);
    assert!(output.status.success());
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(help.lines().count() <= 40 && help.lines().all(|line| line.chars().count() <= 80), "{help}");
    let flags = "listen open publish-token subscribe-token allow-origin journal fsync subscribers connections head-bytes body-bytes line-bytes head-time body-time idle-time heartbeat \
                 lifetime stall-time retry keep-events keep-bytes keep-age topics lanes log help version";
    for flag in flags.split_whitespace() {
        assert!(help.contains(&format!("--{flag}")), "{flag}");
    }
}

#[test]
fn a_bad_flag_is_told_what_was_expected() {
    for (flags, said) in [
        (&["--nonsense"][..], "--nonsense: there is no such flag"),
        (&["listen"], "listen: there is no such flag"),
        (&["--retry"], "--retry: a value is missing"),
        (&["--retry", "5"], "--retry: \"5\" is no length of time: write 500ms, 15s, 10m or 24h"),
        (&["--retry=5 s"], "is no length of time"),
        (&["--heartbeat=99999999999999999999h"], "is no length of time"),
        (&["--topics=many"], "--topics: \"many\" is no count"),
        (&["--topics", "-1"], "\"-1\" is no count"),
        (&["--keep-bytes", "64KB"], "\"64KB\" is no size: write 900, 64KiB or 1MiB"),
        (&["--keep-bytes=99999999999999GiB"], "is no size"),
        (&["--log=loud"], "\"loud\" is none of off, info and debug"),
        (&["--listen", "3001"], "--listen: \"3001\" is no address: write HOST:PORT"),
        (&["--open=yes"], "--open: no value is taken"),
    ] {
        let output = run(flags);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{flags:?}");
        assert!(error.contains(said) && error.contains("see brooklet --help"), "{flags:?}: {error}");
    }
    for (flags, said) in [
        (&["--head-time=0s"][..], "head_time: 0 leaves no time"),
        (&["--heartbeat=2s"], "heartbeat: silence is looked for"),
        (&["--connections=0"], "give at least 1"),
        (&["--topics=0"], "give at least 1"),
        (&["--head-bytes=0"], "give some KiB"),
        (&["--allow-origin", "app.example"], "is no origin"),
        (&["--allow-origin", "a b://app.example"], "is no origin"),
        (&["--allow-origin", "https://app.example:443"], "give https://app.example"),
        (&["--lanes=1000"], "lanes: more than any machine"),
        (&["--listen", "0.0.0.0:0"], "is beyond loopback, so whoever reaches it could publish"),
    ] {
        let output = run(flags);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), error.contains(said)), (Some(1), true), "{flags:?}: {error}");
    }
}

#[test]
fn an_address_in_use_is_named() {
    let process = Process::start(&[]);
    let error = String::from_utf8(run(&["--listen", &process.addr.to_string()]).stderr).unwrap();
    assert!(
        error.contains(&format!("cannot serve {}", process.addr)) && error.contains("another with --listen"),
        "{error}"
    );
}

#[test]
fn both_ways_to_write_a_flag_work() {
    let process = Process::start(&["--retry=1234ms", "--lifetime", "1h", "--open", "--log=debug"]);
    assert_eq!(Wire::stream(process.addr, "/events/a", "").block().unwrap().retry, Some(1234));
    get(process.addr, "/health");
    process.wait_for_log("GET \"/health\" 200");
}

/// The page's policy allows exactly its own script and style, by their hashes, and nothing from elsewhere.
#[test]
fn the_pages_policy_names_the_hashes_of_its_script_and_style() {
    let process = Process::start(&[]);
    let page = get(process.addr, "/").body;
    for (tag, directive) in [("script", "script-src"), ("style", "style-src")] {
        let text = page.split(&format!("<{tag}>")).nth(1).unwrap().split(&format!("</{tag}>")).next().unwrap();
        let hash = BASE64_STANDARD.encode(Sha256::digest(text));
        assert!(page.contains(&format!("{directive} 'sha256-{hash}'")), "{directive} should be 'sha256-{hash}'");
    }
    assert!(page.contains("default-src 'none'"));
    for unsafe_way in ["innerHTML", "insertAdjacentHTML", "document.write", "eval(", "https://", "src=\"http"] {
        assert!(!page.contains(unsafe_way), "{unsafe_way}");
    }
}
