//! `make bench`: what a delivery costs, beside what the kernel alone charges for it.
//!
//! The floor is no server: it writes each event to every socket in turn, once. The server and the floor are driven in turn by
//! the same load generator, so that their ratio holds on a noisy machine where neither figure would alone. Measured are
//! processor time of the serving process a delivery, and the time from publishing to each subscriber. The third table has the
//! server in one file in the floor's place: what a thread for each subscriber costs, which is woken for each event. The last
//! one has what forms and limits cost 1,000 subscribers beside the plain stream. A table's title as an argument measures that
//! one alone: `cargo bench --bench bench -- forms`.

mod floor;
mod load;
mod plot;

use load::{AS_FAST_AS_IT_GOES, Load, Measured, PLAIN};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

/// A few seconds a row, so that all of it takes four minutes.
const BY_SUBSCRIBERS: [Load; 4] = [
    Load { subscribers: 10, rate: 100, events: 200, ..PLAIN },
    Load { subscribers: 100, rate: 50, events: 100, ..PLAIN },
    Load { subscribers: 1_000, rate: 20, events: 60, ..PLAIN },
    Load { subscribers: 10_000, rate: 3, events: 12, ..PLAIN },
];
const BY_RATE: [Load; 5] = [
    Load { subscribers: 1_000, rate: 1, events: 4, ..PLAIN },
    Load { subscribers: 1_000, rate: 10, events: 20, ..PLAIN },
    Load { subscribers: 1_000, rate: 100, events: 200, ..PLAIN },
    Load { subscribers: 1_000, rate: 1_000, events: 500, ..PLAIN },
    Load { subscribers: 1_000, rate: AS_FAST_AS_IT_GOES, events: 1_500, ..PLAIN },
];
/// At higher rates the server in one file drops whoever has not read in time.
const OF_MINIMAL: [Load; 3] = [
    Load { subscribers: 10, rate: 100, events: 200, ..PLAIN },
    Load { subscribers: 100, rate: 50, events: 100, ..PLAIN },
    Load { subscribers: 1_000, rate: 20, events: 60, ..PLAIN },
];
const BURSTS: Load = Load { subscribers: 1_000, rate: 250, events: 500, burst: 50, query: "" };
const FLOOD: Load = Load { subscribers: 1_000, rate: AS_FAST_AS_IT_GOES, events: 1_500, ..PLAIN };
const OF_FORMS: [Load; 6] = [
    Load { query: "?as=json", ..BURSTS },
    Load { query: "?as=lines", ..BURSTS },
    Load { query: "?take=1000000", ..BURSTS },
    Load { query: "?as=json", ..FLOOD },
    Load { query: "?as=lines", ..FLOOD },
    Load { query: "?take=1000000", ..FLOOD },
];
const ROUNDS: usize = 3;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|arg| arg == "floor") {
        return floor::serve();
    }
    if cfg!(debug_assertions) {
        return println!("bench: left out: run it as `make bench`, in a release build");
    }
    let started = std::time::Instant::now();
    let mut charts = Vec::new();
    for (title, other, loads) in [
        ("subscribers", "floor", &BY_SUBSCRIBERS[..]),
        ("events a second", "floor", &BY_RATE),
        ("minimal", "minimal", &OF_MINIMAL),
        ("forms", "plain", &OF_FORMS),
    ] {
        let named = args.iter().skip(1).filter(|arg| !arg.starts_with('-')); // cargo adds `--bench`
        if named.clone().count() > 0 && !named.clone().any(|name| name == title) {
            continue;
        }
        println!("\n{:>12} {:>9}   {:^24}   {:^21}   {:^21}", "", "", "processor µs a delivery", "p50 ms", "p99 ms");
        println!(
            "{:>12} {:>9}   {:>7} {other:>7} {:>8}   {:>7} {other:>7}   {:>9} {other:>9}   {:>8}  lost",
            "subscribers", "events/s", "ours", "ratio", "ours", "ours", "sent/s"
        );
        let mut points = Vec::new();
        for load in loads {
            let (ours, theirs, ratio) = compare(load, other);
            let (rate, lost) = (load.rate_text(), ours.lost + theirs.lost);
            let who = if load.query.is_empty() { load.subscribers.to_string() } else { load.query.into() };
            println!(
                "\r{who:>12} {rate:>9}   {:>7.2} {:>7.2} {ratio:>8.2}   {:>7.2} {:>7.2}   {:>9.2} {:>9.2}   {:>8.0}  {lost}",
                ours.cpu_us, theirs.cpu_us, ours.p50_ms, theirs.p50_ms, ours.p99_ms, theirs.p99_ms, ours.per_second
            );
            points.push((load.clone(), ours, theirs));
        }
        if other == "floor" {
            charts.push((title, points));
        }
    }
    let plot = if charts.is_empty() { "there is none".into() } else { plot::draw(&charts) };
    println!("\nmedians of {ROUNDS} rounds in turn; the plot: {plot}; {:.0} s", started.elapsed().as_secs_f64());
}

/// Drives the server and another in turn, and gives the medians, and the median of the ratios of each turn.
fn compare(load: &Load, other: &str) -> (Measured, Measured, f64) {
    let rounds = if load.subscribers >= 10_000 || load.rate == 1 { 1 } else { ROUNDS };
    let mut turns = Vec::new();
    for round in 1..=rounds {
        for (name, results) in [("ours", 0), (other, 1)] {
            eprint!("\r{:>12} {:>9}   {name} {round}/{rounds} …   ", load.subscribers, load.rate_text());
            let _ = std::io::stderr().flush();
            let server = Served::start(name);
            let query = if name == "ours" { load.query } else { "" };
            let measured = Load { query, ..load.clone() }.run(server.addr, server.child.id(), name == "minimal");
            if results == 0 {
                turns.push((measured, None));
            } else if let Some(turn) = turns.last_mut() {
                turn.1 = Some(measured);
            }
        }
    }
    let turns: Vec<(Measured, Measured)> = turns.into_iter().filter_map(|(ours, other)| Some((ours, other?))).collect();
    let ratio = median(turns.iter().map(|(ours, other)| ours.cpu_us / other.cpu_us).collect());
    let middle = |of: fn(&(Measured, Measured)) -> &Measured| {
        let figure = |figure: fn(&Measured) -> f64| median(turns.iter().map(|turn| figure(of(turn))).collect());
        Measured {
            cpu_us: figure(|m| m.cpu_us),
            p50_ms: figure(|m| m.p50_ms),
            p99_ms: figure(|m| m.p99_ms),
            per_second: figure(|m| m.per_second),
            lost: turns.iter().map(|turn| of(turn).lost).sum(),
        }
    };
    (middle(|turn| &turn.0), middle(|turn| &turn.1), ratio)
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// A server, or the floor, in a process of its own, so that its processor time is its own.
struct Served {
    child: Child,
    addr: SocketAddr,
}

impl Served {
    fn start(name: &str) -> Served {
        let itself = std::env::current_exe().expect("the path of this program");
        let (program, arguments) = match name {
            "ours" | "plain" => {
                (env!("CARGO_BIN_EXE_brooklet").into(), &["--listen", "127.0.0.1:0", "--log", "off"][..])
            }
            "minimal" => (env!("CARGO_BIN_EXE_brooklet-minimal").into(), &["127.0.0.1:0"][..]),
            _ => (itself, &["floor"][..]),
        };
        let mut command = Command::new(program);
        command.args(arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("starting the server");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("its output");
        BufReader::new(stdout).read_line(&mut line).expect("its first line");
        let addr = line.split("http://").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        Served { child, addr: addr.expect("its address") }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
