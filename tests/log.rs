//! The log: nothing waits for it, and what it leaves out is counted.

use crate::common::*;
use brooklet::{Config, Log, LogTo};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;

/// A server whose stderr nobody reads.
fn with_blocked_stderr() -> (Child, SocketAddr) {
    let mut command = Command::new(BROOKLET);
    command
        .args(["--listen", "127.0.0.1:0", "--log", "debug", "--subscribers", "100"]) // fits: no line says otherwise
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = start(&mut command);
    let addr = address(child.stdout.take().unwrap()).unwrap_or_else(|first| panic!("no address in {first:?}"));
    (child, addr)
}

#[test]
fn a_blocked_stderr_holds_up_nothing() {
    let (mut child, addr) = with_blocked_stderr();
    let long = "x".repeat(8_000);
    for _ in 0..2_000 {
        assert_eq!(get(addr, &format!("/{long}")).status, 404);
    }
    assert!(shell(&format!("kill {}", child.id())));
    assert!(child.wait().unwrap().success());
}

#[test]
fn lines_that_the_log_leaves_out_are_counted() {
    let (mut child, addr) = with_blocked_stderr();
    let padding = "x".repeat(70);
    let ask = |n: usize| assert_eq!(get(addr, &format!("/{n}/{padding}")).status, 404);
    (0..2_000).for_each(ask); // a pipe holds some 500 lines, the queue 1,024
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let found = thread::spawn(move || {
        let mut lines = lines.map(Result::unwrap).enumerate();
        lines.find(|(_, line)| line.contains("were left out"))
    });
    let mut next = 2_000;
    while !found.is_finished() {
        ask(next);
        next += 1;
        assert!(next < 10_000, "nothing is said of lines that were left out");
    }
    let (written, line) = found.join().unwrap().unwrap();
    let number = |before: &str| -> usize {
        let rest = line.split(before).nth(1).unwrap();
        rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap()].parse().unwrap()
    };
    let (request, left_out) = (number("GET \"/"), number(" ("));
    assert_eq!(written + left_out, request, "{line}");
    assert!(shell(&format!("kill {}", child.id())));
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_program_has_the_log_line_by_line_and_nothing_where_it_asks_for_nothing() {
    let (lines, log) = mpsc::channel();
    let mut config = Config::default().with(|config| config.log = Log::Debug);
    config.log_to = LogTo::lines(move |line| {
        lines.send(line.to_string()).unwrap();
        panic!("a line that is not taken is no reason to end");
    });
    let silent = config.clone().with(|config| config.log = Log::Off);
    let server = serve(config);
    for target in ["/one", "/two%0A"] {
        get(server.addr().unwrap(), target);
    }
    // At its start, it may have said that the system has room for fewer connections.
    let mut requests = log.iter().filter(|line| line.contains(" GET "));
    assert!(requests.next().unwrap().ends_with(" GET \"/one\" 404"));
    assert!(requests.next().unwrap().ends_with(" GET \"/two\\n\" 404"), "one line, whatever was asked");
    drop(server);
    let server = serve(silent);
    get(server.addr().unwrap(), "/three");
    drop(server);
    assert_eq!(log.recv_timeout(PATIENCE), Err(mpsc::RecvTimeoutError::Disconnected));
}
