//! The command as a person runs it: flags, the page, stopping.

use crate::{both, common::*};
use base64::prelude::*;
use sha2::{Digest, Sha256};
use std::fs::OpenOptions;
use std::io::{PipeReader, PipeWriter, Write};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
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
    let all_are_told = |signal, count: usize| {
        let mut process = Process::start(&["--log", "off"]);
        let target = |n| ["/events/a", "/events/a,b", "/test", "/events/c?poll=1h"][n % 4];
        let streams: Vec<Wire> = (0..count).map(|n| Wire::stream(process.addr, target(n), "")).collect();
        let mut publisher = Wire::connect(process.addr);
        publisher.send(b"PUT /events/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\na\n\r\n");
        wait_for_metric(process.addr, "published_total", 1);
        wait_for_metric(process.addr, "subscribers", count as u64);
        let Some(retries) = both::stopping_ends_each_stream_with_a_retry(&mut process, signal, streams) else {
            return false;
        };
        assert!(retries.iter().all(|retry| (1_500..=4_500).contains(retry)), "{retries:?}");
        let answer = publisher.answer();
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("3")));
        assert!(answer.body.starts_with("the server is stopping; published 1, last id"), "{}", answer.body);
        true
    };
    for (signal, count) in [("INT", 1_000), ("TERM", 50)] {
        assert!([count, count / 4, count / 16].into_iter().any(|count| all_are_told(signal, count)), "SIG{signal}");
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
    assert!(help.lines().count() <= 50 && help.lines().all(|line| line.chars().count() <= 80), "{help}");
    let flags = "listen open publish-token subscribe-token tokens query-tokens allow-origin journal fsync subscribers connections threads head-bytes body-bytes line-bytes head-time body-time put-idle-time idle-time heartbeat \
                 lifetime stall-time retry keep-events keep-bytes keep-age topics lanes log help version";
    for flag in flags.split_whitespace() {
        assert!(help.contains(&format!("--{flag}")), "{flag}");
    }
}

#[test]
fn a_bad_flag_is_told_what_was_expected() {
    for (flags, said) in [
        (&["--nonsense"][..], "--nonsense: there is no such flag"),
        (
            &["--redis", "redis://localhost"],
            "--redis: this program was built without it: cargo build --release --features redis",
        ),
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
        (&["--head-time=0s"][..], "--head-time: 0 leaves no time"),
        (&["--heartbeat=2s"], "--heartbeat: silence is looked for"),
        (&["--connections=0"], "give at least 1"),
        (&["--topics=0"], "give at least 1"),
        (&["--head-bytes=0"], "give some KiB"),
        (&["--body-bytes=513MiB"], "--body-bytes: too much for one event: give at most 512MiB"),
        (&["--line-bytes=1024GiB"], "--line-bytes: too much for one event: give at most 512MiB"),
        (&["--lifetime", "0s"], "--lifetime: 0 leaves no time"),
        (&["--allow-origin", "app.example"], "--allow-origin: \"app.example\" is no origin"),
        (&["--allow-origin", "a b://app.example"], "is no origin"),
        (&["--allow-origin", "https://app.example:443"], "give https://app.example"),
        (&["--lanes=1000"], "--lanes: more than any machine"),
        (&["--listen", "0.0.0.0:0"], "is beyond loopback, so whoever reaches it could publish"),
    ] {
        let output = run(flags);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), error.contains(said)), (Some(2), true), "{flags:?}: {error}");
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

/// The flags that `--help` names, each with a value that it takes; the switches have none.
fn flags_of_the_help() -> Vec<(String, Option<&'static str>)> {
    let help = String::from_utf8(run(&["--help"]).stdout).unwrap();
    let flags = help.lines().filter_map(|line| {
        let (flag, rest) = line.trim_start().strip_prefix("--")?.split_once(' ')?;
        let value = match rest.split(' ').next()? {
            "ADDR" => Some("127.0.0.1:0"),
            "N" => Some("1"),
            "SIZE" => Some("64KiB"),
            "TIME" => Some("5s"),
            "T" => Some("token"),
            "ORIGIN" => Some("https://app.example"),
            "FILE" => Some("journal"),
            "off|info|debug" => Some("off"),
            "" => None,
            other => panic!("what is {other}?"),
        };
        Some((format!("--{flag}"), value))
    });
    flags.filter(|(flag, _)| flag != "--help").collect()
}

/// How `--retry` is spelled in the environment, for instance.
fn variable(flag: &str) -> String {
    format!("BROOKLET_{}", flag[2..].to_uppercase().replace('-', "_"))
}

fn run_with(variables: &[(&str, &str)], flags: &[&str]) -> (Option<i32>, String) {
    let output = output(Command::new(BROOKLET).args(flags).envs(variables.iter().copied()));
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_flag_that_takes_one_value_is_refused_when_it_is_given_twice() {
    let flags = flags_of_the_help();
    assert_eq!(flags.len(), 29, "{flags:?}");
    for (flag, value) in flags {
        let Some(value) = value.filter(|value| !["token", "https://app.example"].contains(value)) else { continue };
        let (code, error) = run_with(&[], &[&flag, value, &format!("{flag}={value}")]);
        assert_eq!(code, Some(2), "{flag}: {error}");
        assert!(error.contains(&format!("brooklet: {flag}: it is given twice")), "{error}");
    }
}

#[test]
fn a_switch_may_be_given_twice_and_so_may_what_adds_up() {
    let origins = ["--allow-origin=https://a.example", "--allow-origin", "https://b.example"];
    let process = Process::start(&[&["--open", "--open", "--log=off"][..], &origins].concat());
    for host in ["a.example", "b.example"] {
        assert_eq!(Wire::ask(process.addr, &format!("GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n")).status, 200);
    }
}

#[test]
fn a_flag_without_its_value_does_not_take_the_next_flag_for_it() {
    for (flags, said) in [
        (&["--journal", "--fsync"][..], "--journal: a value is missing"),
        (&["--journal="], "--journal: a value is missing"),
        (&["--listen", ""], "--listen: a value is missing"),
    ] {
        let (code, error) = run_with(&[], &[flags, &["--lanes=1000"]].concat()); // it must not start whatever it takes
        assert_eq!((code, error.contains(said)), (Some(2), true), "{flags:?}: {error}");
    }
}

#[test]
fn every_flag_can_come_from_the_environment_and_a_bad_value_names_its_variable() {
    for (flag, value) in flags_of_the_help() {
        // What would be refused after the environment ends a server that has not read it.
        let refused = if flag == "--lanes" { "--head-bytes=0" } else { "--lanes=1000" };
        let name = variable(&flag);
        let bad = if value.is_none() { "maybe" } else { "" };
        let (code, error) = run_with(&[(&name, bad)], &[refused]);
        assert_eq!(code, Some(2), "{flag}: {error}");
        assert!(error.starts_with(&format!("brooklet: {name}: ")) && error.contains("brooklet --help"), "{error}");
    }
    for (name, value, said) in [
        ("BROOKLET_RETRY", "5", "BROOKLET_RETRY: \"5\" is no length of time"),
        ("BROOKLET_OPEN", "maybe", "BROOKLET_OPEN: \"maybe\" is neither 1 nor 0"),
        ("BROOKLET_FSYNC", "1", "--fsync: only a journal can be synced"),
        ("BROOKLET_LISTEN", "3001", "BROOKLET_LISTEN: \"3001\" is no address"),
    ] {
        let refused: &[&str] = if name == "BROOKLET_FSYNC" { &[] } else { &["--lanes=1000"] };
        let (code, error) = run_with(&[(name, value)], refused);
        assert_eq!((code, error.contains(said)), (Some(2), true), "{name}: {error}");
    }
}

#[test]
fn flags_win_over_the_environment_and_lists_add_up() {
    let mut command = Command::new(BROOKLET);
    command
        .args(["--listen", "127.0.0.1:0", "--retry", "1234ms", "--open", "--allow-origin", "https://c.example"])
        .envs([
            ("BROOKLET_LISTEN", "nowhere"), // not read, since the flag is given
            ("BROOKLET_RETRY", "4s"),
            ("BROOKLET_OPEN", "0"),
            ("BROOKLET_FSYNC", "0"),
            ("BROOKLET_LOG", "debug"),
            ("BROOKLET_ALLOW_ORIGIN", "https://a.example https://b.example"),
            ("BROOKLET_PORT", "tcp://10.0.0.1:3000"), // what Kubernetes sets for a service of that name is not ours
        ]);
    let process = Process::from(&mut command);
    assert_eq!(Wire::stream(process.addr, "/events/a", "").block().unwrap().retry, Some(1234));
    for host in ["a.example", "b.example", "c.example"] {
        assert_eq!(Wire::ask(process.addr, &format!("GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n")).status, 200);
    }
    process.wait_for_log("GET \"/health\" 200");
}

#[test]
fn what_can_never_be_ends_with_2_and_what_the_system_refuses_with_1() {
    let process = Process::start(&[]);
    let taken = process.addr.to_string();
    for (flags, expected, said) in [
        (&["--fsync"][..], 2, "brooklet: --fsync: only a journal can be synced"),
        (&["--listen", "0.0.0.0:0"], 2, "brooklet: --listen: 0.0.0.0:"),
        (
            &["--allow-origin", "https://app.example/"],
            2,
            "--allow-origin: \"https://app.example/\" is not as browsers write it: give https://app.example",
        ),
        (&["--listen", &taken], 1, "cannot serve 127.0.0.1:"),
        (&["--listen=127.0.0.1:0", "--journal=/nowhere/at/all"], 1, "the journal /nowhere/at/all: "),
    ] {
        let (code, error) = run_with(&[], flags);
        assert_eq!((code, error.contains(said)), (Some(expected), true), "{flags:?}: {error}");
    }
}

/// The writing end of a pipe that has not room for a single byte more, and the end that nobody reads.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    // Opened once more, it can be filled without waiting; the pipe's own end stays one that waits.
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    const O_NONBLOCK: i32 = 0o4000;
    let mut filler = OpenOptions::new().write(true).custom_flags(O_NONBLOCK).open(path).unwrap();
    for bytes in [&[0; 4096][..], &[0]] {
        while filler.write(bytes).is_ok() {}
    }
    (reader, writer)
}

/// The port on which this process listens, as the system tells it.
fn port_of(pid: u32) -> Option<u16> {
    let sockets: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .ok()?
        .filter_map(|entry| Some(std::fs::read_link(entry.ok()?.path()).ok()?.to_string_lossy().into_owned()))
        .collect();
    std::fs::read_to_string("/proc/net/tcp").unwrap().lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_ours = fields.get(3) == Some(&"0A") && sockets.contains(&format!("socket:[{}]", fields.get(9)?));
        is_ours.then(|| u16::from_str_radix(fields[1].split(':').nth(1)?, 16).ok())?
    })
}

#[test]
fn a_full_standard_output_holds_up_neither_serving_nor_stopping() {
    let (_reader, writer) = full_pipe();
    let mut child = start(Command::new(BROOKLET).args(["--listen", "127.0.0.1:0", "--log=off"]).stdout(writer));
    let port = wait_for("it to listen", || port_of(child.id()));
    let addr = SocketAddr::from(([127, 0, 0, 1], port));
    assert_eq!(get(addr, "/health").status, 200);
    let mut stream = Wire::stream(addr, "/events/a", "");
    assert!(shell(&format!("kill -TERM {}", child.id())));
    let status = wait_for("SIGTERM to end it", || child.try_wait().unwrap());
    assert!(status.success(), "{status}");
    assert!(String::from_utf8(stream.rest()).unwrap().contains(": the server is stopping\nretry: "));
}

/// A server that needs its whole grace to stop, since one of its streams takes nothing; and that stream.
fn slow_to_stop() -> (Process, Wire) {
    let process = Process::start(&["--keep-events", "100000", "--stall-time", "1h", "--log=off"]);
    let stalled = Wire::stream(process.addr, "/events/stalled", "");
    let body = "x".repeat(60_000);
    wait_for("the reader to fall behind", || {
        assert_eq!(post(process.addr, "/events/stalled", &body).status, 200);
        (metric(process.addr, "woken_total") > 0).then_some(())
    });
    (process, stalled)
}

#[test]
fn the_two_signals_of_a_closing_terminal_are_one_and_streams_get_their_farewell() {
    for (first, second) in [("TERM", "HUP"), ("HUP", "TERM"), ("INT", "HUP")] {
        let (mut process, _stalled) = slow_to_stop();
        let mut stream = Wire::stream(process.addr, "/events/a", "");
        // Both wait for it at the moment when it goes on, so that they come together on any machine.
        for signal in ["STOP", first, second, "CONT"] {
            process.signal(signal);
        }
        let status = process.child.wait().unwrap();
        assert!(status.success(), "{first} and {second}: {status}");
        assert!(String::from_utf8(stream.rest()).unwrap().contains(": the server is stopping\nretry: "));
    }
}

/// Between the half second in which signals are one and the end of the grace there is a fifth of a second, which a busy
/// machine may miss: so it has several tries.
#[test]
fn a_second_ctrl_c_that_is_no_double_ends_it_at_once() {
    let ends_at_once = |_| {
        let (mut process, _stalled) = slow_to_stop();
        loop {
            process.signal("INT");
            if let Some(status) = process.child.try_wait().unwrap() {
                break status.code() == Some(130);
            }
        }
    };
    assert!((0..10).any(ends_at_once), "a second Ctrl-C changes nothing");
}

#[test]
fn the_page_names_nothing_from_the_root_so_that_it_works_under_a_prefix() {
    let page = include_str!("../src/page.html");
    for quote in ['\'', '"', '`', ' ', '>'] {
        for path in ["/test", "/events", "/metrics", "/health"] {
            assert!(!page.contains(&format!("{quote}{path}")), "{quote}{path}");
        }
    }
    assert!(page.contains("new URL('.', location)"), "the commands it shows begin with where it stands");
}
