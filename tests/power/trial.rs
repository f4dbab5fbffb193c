//! One trial: from a seed, a line of runs of the server, each on what a crash of the one before has left (or on what it
//! left itself), with crashes at every other point looked at beside it.

use super::disk::{Disk, LeftOut, of_seed};
use super::file::Reached;
use super::promises::{self, News, Promises};
use super::server::{Publisher, Server, Settings};
use super::trace::Call;
use crate::common::{Random, Scratch, shell};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

pub const TOPICS: [&str; 3] = ["a", "b", "c"];

pub const DOES_NOT_START: &str = "it does not start";
pub const MODEL_IS_WRONG: &str = "the model has missed something";

/// Crashes of a run that are looked at beside the one that goes on.
const LOOKS: usize = 3;

#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// All choices follow from it.
    pub seed: u64,
    /// Whether syncs, writes and renames fail, too.
    pub disk_fails: bool,
    /// Whether events are so large that the journal is written anew because it has grown.
    pub grows: bool,
    pub broken: Option<Broken>,
}

/// Journals that are wrong, each in its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    LeavesOut(LeftOut),
    /// strace tells it that all is well where a sync fails.
    TrustsFailedSyncs,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// States of the disk that a server was started on.
    pub states: usize,
    pub events: usize,
    /// How often a journal got a new file while it was in use.
    pub rewrites: usize,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.states += other.states;
        self.events += other.events;
        self.rewrites += other.rewrites;
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Counts { states, events, rewrites } = self;
        write!(f, "{states} crash states, {events} events, {rewrites} times written anew while in use")
    }
}

/// A promise that was not kept, and how it came to that.
#[derive(Debug)]
pub struct Fault {
    pub what: String,
    pub story: String,
}

pub fn run(plan: Plan) -> Result<Counts, Fault> {
    let mut trial = Trial::new(plan);
    let Err(what) = trial.run() else {
        return Ok(Counts { events: trial.promises.events.len(), ..trial.counts });
    };
    let mut story = std::mem::take(&mut trial.story);
    if plan.broken.is_none() {
        let kept = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("power-{}", plan.seed));
        let _ = fs::remove_dir_all(&kept);
        shell(&format!("cp -r {} {}", trial.scratch.0.display(), kept.display()));
        let _ = writeln!(story, "  its files are in {}", kept.display());
        let _ = fs::write(kept.join("story"), format!("{what}\n{story}"));
    }
    Err(Fault { what, story })
}

pub struct Trial {
    pub plan: Plan,
    pub random: Random,
    scratch: Scratch,
    /// What the last run has left, and where that is, if there is a directory of it.
    pub disk: Disk,
    dir: Option<PathBuf>,
    pub promises: Promises,
    /// Counts what clients do, one after the other.
    pub step: usize,
    runs: usize,
    boot: usize,
    pub fsync: bool,
    /// What a block of the journal takes beside its data.
    pub overhead: Option<usize>,
    counts: Counts,
    story: String,
}

/// A run that has ended.
struct Run {
    calls: Vec<Call>,
    /// What the calls have done, where that is something.
    said: Vec<Option<String>>,
    /// What became known, each with how much of the log there was.
    news: Vec<(u64, News)>,
    /// How much there was when it was ready.
    ready: Option<u64>,
    /// The promises as they were when it began.
    before: Promises,
}

impl Run {
    fn is_past(&self, mark: u64, point: usize) -> bool {
        self.calls.iter().take_while(|call| call.end <= mark).count() <= point
    }
}

impl Trial {
    fn new(plan: Plan) -> Trial {
        let mut random = of_seed(plan.seed);
        let block_bytes = if plan.grows { 4096 } else { [512, 1024, 4096][random.below(3)] };
        let mut disk = Disk::new(block_bytes, plan.seed);
        if let Some(Broken::LeavesOut(what)) = plan.broken {
            disk.left_out = Some(what);
        }
        let story = format!(
            "seed {}: blocks of {block_bytes} bytes{}{}\n",
            plan.seed,
            if plan.disk_fails { ", a disk that fails" } else { "" },
            if plan.grows { ", events of 60 kB" } else { "" }
        );
        Trial {
            plan,
            scratch: Scratch::new(),
            disk,
            dir: None,
            promises: Promises::none(if plan.grows { 2 } else { 1000 }),
            step: 0,
            runs: 2 + random.below(4),
            boot: 1,
            fsync: random.below(4) > 0,
            overhead: None,
            counts: Counts::default(),
            story,
            random,
        }
    }

    fn tell(&mut self, text: impl std::fmt::Display) {
        let _ = writeln!(self.story, "  {text}");
    }

    fn run(&mut self) -> Result<(), String> {
        for number in 1..=self.runs {
            // Where threads take turns in another way, a run has some calls more or less: no later one shall be another one
            // for that.
            self.random = of_seed(self.plan.seed.wrapping_mul(100).wrapping_add(number as u64));
            if self.random.below(5) == 0 {
                self.fsync = !self.fsync;
            }
            let run = self.record(number)?;
            let points: Vec<usize> = (0..run.calls.len()).filter(|at| run.said[*at].is_some()).collect();
            let point = |random: &mut Random| match random.below(points.len() + 2) {
                at if at < points.len() => points[at],
                _ => run.calls.len(),
            };
            let renamed = points.iter().rposition(|at| run.said[*at].as_deref().is_some_and(is_rename));
            for look in 0..LOOKS {
                let soon = 1 + self.random.below(8);
                let at = match renamed.filter(|_| look == 0) {
                    // What a new file lacks is hidden again by what is written to it.
                    Some(renamed) => points.get(renamed + soon).copied().unwrap_or(run.calls.len()),
                    None => point(&mut self.random),
                };
                self.look_at(&run, at, &format!("run{number}-crash{look}"))?;
            }
            let goes_on_in_place = self.random.below(4) == 0 && self.disk.left_out.is_none();
            let at = if goes_on_in_place { run.calls.len() } else { point(&mut self.random) };
            let (disk, promises, boot, how) = self.crash(&run, at, goes_on_in_place);
            self.tell_run(&run, at);
            self.tell(how);
            (self.disk, self.promises, self.boot) = (disk, promises, boot);
            if !goes_on_in_place {
                self.dir = None;
            }
        }
        Ok(())
    }

    /// Starts the server on what there is, works with it, and ends it.
    fn record(&mut self, number: usize) -> Result<Run, String> {
        let dir = self.dir.take().unwrap_or_else(|| {
            let dir = self.scratch.0.join(format!("run{number}"));
            self.disk.make(&dir);
            dir
        });
        let faults = self.faults();
        let fsync = if self.fsync { ", with --fsync" } else { "" };
        self.tell(format!("run {number}, boot {}{fsync} {}", self.boot, faults.join(" ")));
        let server = Server::start(&Settings {
            dir: &dir,
            notes: self.scratch.0.join(format!("run{number}-notes")),
            boot: self.boot,
            fsync: self.fsync,
            keep_events: self.promises.keep_events,
            recorded: Some(&faults),
        });
        self.counts.states += 1;
        let (mut news, before) = (Vec::new(), self.promises.clone());
        let mut ready = None;
        if server.addr.is_some() {
            ready = Some(server.mark());
            let result = self.check_start(&server, &mut news).and_then(|()| self.work(&server, &dir, &mut news));
            result.inspect_err(|_| self.tell(format_args!("this is known:\n{}", self.promises.describe())))?;
        } else {
            let said = server.said();
            self.tell(format_args!("{DOES_NOT_START}: {}", said.trim_end()));
            if !faults.iter().any(|fault| fault.contains(":error=")) {
                return Err(format!("{DOES_NOT_START}: {said}"));
            }
        }
        let signal = ["KILL", "TERM"][self.random.below(2)];
        let said = server.said();
        let mut calls = server.end(signal);
        self.tell(format_args!("ended by SIG{signal}"));
        if said.contains("panicked") {
            return Err(said);
        }
        let (path, left) = (dir.to_str().unwrap(), files_in(&dir));
        let (mut disk, mut said) = (self.disk.clone(), Vec::new());
        for call in &mut calls {
            call.outcome = disk.settle(call, path, &left);
            let what = disk.apply(call, path);
            let is_in_use = ready.is_some_and(|mark| call.end > mark);
            self.counts.rewrites += usize::from(is_in_use && what.as_deref().is_some_and(is_rename));
            said.push(what);
        }
        if self.disk.left_out.is_none() && disk.seen() != left {
            let names = |files: &BTreeMap<String, Vec<u8>>| {
                files.iter().map(|(name, bytes)| format!("{name} of {} bytes", bytes.len())).collect::<Vec<_>>()
            };
            return Err(format!("{MODEL_IS_WRONG}: {:?} are there, and not {:?}", names(&left), names(&disk.seen())));
        }
        let before = before.before(&self.promises);
        self.dir = Some(dir);
        Ok(Run { calls, said, news, ready, before })
    }

    /// What a crash just before the call of this number leaves, and what is promised then. `in_place` it is no crash, but
    /// just the end of the process.
    fn crash(&mut self, run: &Run, point: usize, in_place: bool) -> (Disk, Promises, usize, String) {
        let mut random = of_seed(self.random.below(usize::MAX) as u64);
        let dir = self.dir.as_ref().unwrap().to_str().unwrap();
        let mut disk = self.disk.clone();
        run.calls[..point].iter().for_each(|call| drop(disk.apply(call, dir)));
        let mut how = String::new();
        if self.plan.disk_fails && random.below(2) == 0 {
            disk.fail_what_is_begun();
        }
        let mut promises = run.before.clone();
        for (mark, news) in &run.news {
            if run.is_past(*mark, point) {
                promises.learn(news, self.fsync);
            }
        }
        if in_place {
            return (disk.after_kill(false, &mut random), promises, self.boot, "the next run goes on in place".into());
        }
        let (disk, boot) = if random.below(2) == 0 {
            how += "the process is killed";
            if let Some(call) = run.calls.get(point)
                && let Some(part) = disk.apply_part(call, dir, &mut random)
            {
                let _ = write!(how, " after {part} bytes of it");
            }
            let may_read_again = self.plan.disk_fails && !promises.hang_on_memory();
            (disk.after_kill(may_read_again, &mut random), self.boot)
        } else {
            let reached = [Reached::Nothing, Reached::Everything, Reached::Some, Reached::Some][random.below(4)];
            let _ = write!(how, "the power is lost (of what was not synced, {reached:?} has reached the disk)");
            promises.lose_power(self.fsync, run.ready.is_some_and(|mark| run.is_past(mark, point)));
            (disk.after_power_loss(reached, &mut random), self.boot + 1)
        };
        let _ = write!(how, "; left is\n{}", disk.describe());
        (disk, promises, boot, how)
    }

    /// Starts the server on what a crash at this point leaves, and holds it against what was promised.
    fn look_at(&mut self, run: &Run, point: usize, name: &str) -> Result<(), String> {
        let (disk, promises, boot, how) = self.crash(run, point, false);
        let dir = self.scratch.0.join(name);
        disk.make(&dir);
        let server = Server::start(&Settings {
            dir: &dir,
            notes: self.scratch.0.join(format!("{name}-notes")),
            boot,
            fsync: self.fsync,
            keep_events: self.promises.keep_events,
            recorded: None,
        });
        self.counts.states += 1;
        let found = self.hold_against(&server, promises);
        found.inspect_err(|_| {
            self.tell_run(run, point);
            self.tell(how);
        })?;
        drop(server);
        let _ = fs::remove_dir_all(dir);
        Ok(())
    }

    fn hold_against(&mut self, server: &Server, promises: Promises) -> Result<(), String> {
        if server.addr.is_none() {
            return Err(format!("{DOES_NOT_START}: {}", server.said()));
        }
        let kept = std::mem::replace(&mut self.promises, promises);
        let result = self.check_start(server, &mut Vec::new()).and_then(|()| {
            let probe = self.promises.event(&TOPICS[..1], "probe", None);
            self.promises.learn(&News::Sent(probe.clone(), self.step), self.fsync);
            match Publisher::to(server).ask("POST", "/events/a", "probe") {
                Some((200, id)) => {
                    let news = News::Published(probe.start, id.trim().parse().ok());
                    self.promises.check(&news)?;
                    self.promises.learn(&news, self.fsync);
                    self.promises.check(&News::Saw(server.look(&TOPICS, None)?.events))
                }
                other => Err(format!("after the start, publishing is answered {other:?}")),
            }
        });
        let promised = std::mem::replace(&mut self.promises, kept);
        result.inspect_err(|_| self.tell(format_args!("of the crash below, this is known:\n{}", promised.describe())))
    }

    /// What is there after a start, and whether those hear a gap who must.
    fn check_start(&mut self, server: &Server, news: &mut Vec<(u64, News)>) -> Result<(), String> {
        let seen = server.look(&TOPICS, None)?.events;
        self.take(server, News::SawAtStart(seen.clone()), news)?;
        self.check_resumed(server, &seen)?;
        let Some(may_miss_up_to) = self.promises.may_miss_up_to else { return Ok(()) };
        let cursors: Vec<_> = self.promises.events.iter().filter_map(|event| event.id).collect();
        let cursor = cursors.get(self.random.below(cursors.len().max(1))).filter(|id| **id <= may_miss_up_to);
        for cursor in cursor.into_iter().chain([&may_miss_up_to]) {
            if !server.look(&TOPICS, Some(*cursor))?.begins_with_gap {
                return Err(format!("{cursor} hears no gap, though the power was lost and not all was synced"));
            }
        }
        Ok(())
    }

    pub fn take(&mut self, server: &Server, what: News, news: &mut Vec<(u64, News)>) -> Result<(), String> {
        self.promises.check(&what)?;
        self.promises.learn(&what, self.fsync);
        news.push((server.mark(), what));
        Ok(())
    }

    /// Tells what the run did, and where it was cut off.
    fn tell_run(&mut self, run: &Run, point: usize) {
        let mut news = run.news.iter().peekable();
        let mut text = String::new();
        for (at, said) in run.said.iter().enumerate() {
            while let Some((_, what)) = news.next_if(|(mark, _)| run.is_past(*mark, at)) {
                let _ = writeln!(text, "      {}", self.describe(what));
            }
            if at == point {
                text += "      ---- here it ends ----\n";
            }
            if let Some(said) = said {
                let _ = writeln!(text, "    {at}: {said}");
            }
        }
        news.for_each(|(_, what)| _ = writeln!(text, "      {}", self.describe(what)));
        self.story += &text;
    }

    fn describe(&self, news: &News) -> String {
        let event = |number: &usize| &self.promises.events[*number];
        match news {
            News::Sent(numbers, _) => {
                let topics: Vec<_> = numbers.clone().map(|number| event(&number).topic.as_str()).collect();
                format!("{} is sent to {}", promises::name(&event(&numbers.start).data), topics.join(" and "))
            }
            News::Published(number, id) => format!("{}: 200 {}", event(number), id.unwrap_or_default()),
            News::Refused(number) => format!("{}: refused", event(number)),
            News::DeletionSent(topic, _) => format!("{topic} is to be deleted"),
            News::Deleted(topic) => format!("{topic} is deleted"),
            News::NotDeleted(topic) => format!("to delete {topic} is refused"),
            News::SawAtStart(seen) | News::Saw(seen) => {
                let names: Vec<_> =
                    seen.iter().map(|seen| format!("{}:{}", seen.topic, promises::name(&seen.data))).collect();
                format!("there is: {}", names.join(" "))
            }
        }
    }
}

fn is_rename(said: &str) -> bool {
    said.contains(" renamed ")
}

fn files_in(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}
