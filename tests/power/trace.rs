//! What strace has written down of one run: the calls that can touch files, in the order in which they ended. Nothing is
//! asked of the program itself, so its journal may be written in whatever way.

/// What strace is to write down, or the calls that `disk.rs` knows, and those that it must not overlook.
pub const CALLS: &str = "trace=?open,openat,?openat2,?creat,dup,?dup2,dup3,fcntl,close,lseek,write,writev,pwrite64,pwritev,\
    pwritev2,ftruncate,truncate,fallocate,copy_file_range,sendfile,splice,fsync,fdatasync,sync_file_range,sync,syncfs,\
    ?rename,?renameat,renameat2,?link,linkat,?symlink,symlinkat,?unlink,unlinkat,?mkdir,mkdirat,io_uring_setup";

#[derive(Clone, Debug)]
pub struct Call {
    /// How long the log was once this had been written. strace writes each line before the program goes on, so whoever
    /// has an answer and then looks how long the log is knows which calls came before it.
    pub end: u64,
    pub thread: u32,
    pub name: String,
    pub args: Vec<Arg>,
    pub outcome: Outcome,
}

/// What stands in the log, but for the strings in it, and these: one, or several buffers' one after the other.
#[derive(Clone, Debug, Default)]
pub struct Arg {
    pub text: String,
    pub bytes: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A sync covers what was written before it began. A descriptor is free for another thread to get while the one that
    /// closes it is still on its way back; nobody uses it once that has begun.
    Begun,
    Done(i64),
    /// strace answered in the kernel's place, and nothing was done.
    MadeUp,
    Failed,
    /// The process was killed in it: perhaps some of it was done.
    Killed,
}

impl Call {
    pub fn is_sync(&self) -> bool {
        self.name == "fsync" || self.name == "fdatasync"
    }

    fn is_close(&self) -> bool {
        self.name == "close"
    }

    pub fn number(&self, arg: usize) -> i64 {
        let number = self.args[arg].text.parse();
        number.unwrap_or_else(|_| panic!("argument {arg} of {} is no number: {:?}", self.name, self.args[arg].text))
    }

    pub fn path(&self, arg: usize) -> String {
        String::from_utf8(self.args[arg].bytes.clone()).unwrap()
    }

    /// A write of which only so many bytes were written.
    pub fn after(&self, bytes: usize) -> Call {
        Call { outcome: Outcome::Done(bytes as i64), ..self.clone() }
    }
}

/// Reads the log of a run that has ended.
pub fn parse(log: &str) -> Vec<Call> {
    let (mut calls, mut end, mut unfinished) = (Vec::new(), 0, Vec::<(u32, String)>::new());
    for line in log.split_inclusive('\n') {
        end += line.len() as u64;
        let Some((thread, text)) = line.trim_end().split_once(' ') else { continue };
        let thread = thread.parse().unwrap_or_else(|_| panic!("no thread: {line:?}"));
        let text = text.trim_start();
        if text.starts_with("+++") || text.ends_with("<detached ...>") || !line.ends_with('\n') {
            continue; // a thread's end; or what it was about to do when the program was killed
        } else if let Some(begun) = text.strip_suffix("<unfinished ...>") {
            let call = call(thread, end, begun, Outcome::Begun);
            calls.extend(Some(call).filter(|call| call.is_sync() || call.is_close()));
            unfinished.push((thread, begun.trim_end().into()));
            continue;
        }
        let (text, is_whole) = match text.strip_prefix("<... ") {
            None => (text.to_string(), true),
            Some(rest) => {
                let at = unfinished.iter().position(|(of, _)| *of == thread).expect("what is resumed was begun");
                let begun = unfinished.swap_remove(at).1;
                (begun + rest.split_once(" resumed>").expect("it says what is resumed").1, false)
            }
        };
        let close = text.match_indices(')').find(|(at, _)| text[at + 1..].trim_start().starts_with("= "));
        let close = close.unwrap_or_else(|| panic!("no call: {text:?}")).0;
        let result = text[close + 1..].trim_start().trim_start_matches("= ");
        let value = result.split(' ').next().unwrap();
        let outcome = match value.parse() {
            Ok(_) if result.ends_with("(INJECTED)") && !result.starts_with('-') => Outcome::MadeUp,
            Ok(value) if value >= 0 => Outcome::Done(value),
            Err(_) if value.starts_with("0x") => Outcome::Done(0), // flags
            Err(_) if value == "?" => Outcome::Killed,
            _ => Outcome::Failed,
        };
        let ended = call(thread, end, text[..close].trim_end_matches("<unfinished ...>"), outcome);
        if is_whole && ended.is_sync() {
            calls.push(Call { outcome: Outcome::Begun, ..ended.clone() });
        } else if !is_whole && ended.is_close() {
            continue; // it counts from when it began
        }
        calls.push(ended);
    }
    calls
}

fn call(thread: u32, end: u64, text: &str, outcome: Outcome) -> Call {
    let (name, args) = text.split_once('(').unwrap_or_else(|| panic!("no call: {text:?}"));
    let (mut all, mut depth) = (vec![Arg::default()], 0);
    // Every other part is a string, in hexadecimal, so that no quote, bracket or comma stands in one.
    for (at, part) in args.trim_end().trim_end_matches(',').split('"').enumerate() {
        if at % 2 == 1 {
            let digit = |c: u8| (c as char).to_digit(16).expect("strings are in hexadecimal") as u8;
            let bytes = part.as_bytes().chunks_exact(4).map(|hex| digit(hex[2]) << 4 | digit(hex[3]));
            all.last_mut().unwrap().bytes.extend(bytes);
            continue;
        }
        assert!(!part.starts_with("..."), "strace has cut {name} short");
        for c in part.chars() {
            match c {
                ',' if depth == 0 => all.push(Arg::default()),
                ' ' if depth == 0 => {}
                _ => {
                    depth += i32::from("[{(".contains(c)) - i32::from("]})".contains(c));
                    all.last_mut().unwrap().text.push(c);
                }
            }
        }
    }
    Call { end, thread, name: name.into(), args: all, outcome }
}
