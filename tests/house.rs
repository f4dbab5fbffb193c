//! The rooms of `src`: `lib.rs` lists them from the top of the house to the bottom, and a room uses only rooms below it.
//! So whoever reads a room need know nothing of those above, and no two rooms are tied into a knot. This reads the sources
//! as text: a path into another room begins with `crate::`, or with `super::` where a room stands at the top of its file.

use std::fs;
use std::path::{Path, PathBuf};

/// A room has about 450 lines at most: what is longer has mostly grown a second idea.
const ROOM_LINES: usize = 470;

/// Files that are programs of their own. They, and what they list as theirs, use of the rooms only what is public.
const PROGRAMS: [&str; 2] = ["main", "minimal"];

fn lib<'a>(house: &[(&str, &'a str)]) -> &'a str {
    house.iter().find(|(name, _)| *name == "lib").expect("a lib.rs").1
}

/// The rooms that `lib.rs` lists, from the top.
fn rooms(lib: &str) -> Vec<&str> {
    let listed = |line| {
        let line: &str = str::split(line, " //").next()?.trim(); // a word on each room may follow it
        line.strip_prefix("pub ").unwrap_or(line).strip_prefix("mod ")?.strip_suffix(';')
    };
    lib.lines().filter_map(listed).collect()
}

/// What is wrong with a house of these files, each with its name (without `.rs`) and its text.
fn faults(house: &[(&str, &str)]) -> Vec<String> {
    let rooms = rooms(lib(house));
    let place = |name: &str| rooms.iter().position(|room| *room == name);
    let of_programs = house.iter().filter(|(name, _)| PROGRAMS.contains(name)).flat_map(|(_, text)| self::rooms(text));
    let outside: Vec<&str> = PROGRAMS.into_iter().chain(of_programs.filter(|name| place(name).is_none())).collect();
    let mut faults = Vec::new();
    for (name, text) in house {
        let lines = text.lines().count();
        if lines > ROOM_LINES {
            faults.push(format!("src/{name}.rs has {lines} lines, more than {ROOM_LINES}: it may hold two ideas"));
        }
        if *name == "lib" {
            continue;
        }
        let is_program = outside.contains(name);
        let own = place(name);
        if own.is_none() && !is_program {
            faults.push(format!("src/{name}.rs is no room that lib.rs lists"));
        }
        for (line, used) in uses(text) {
            let wrong = match (own, place(&used)) {
                (None, None) if is_program => continue, // a module of its own
                (None, _) => format!("{name} -> {used}: a program uses only what is public"),
                (Some(_), None) => format!("{name} -> lib ({used}): name the room that has it"),
                (Some(own), Some(other)) if own == other => format!("{name} -> {used}: that is itself"),
                (Some(own), Some(other)) if own > other => format!("{name} -> {used}, which stands above it"),
                _ => continue,
            };
            faults.push(format!("src/{name}.rs:{line}: {wrong}"));
        }
        if is_program {
            let taken = self::rooms(text).into_iter().filter(|room| place(room).is_some());
            faults.extend(
                taken.map(|room| format!("src/{name}.rs takes {room}.rs in: a program uses only what is public")),
            );
        }
    }
    faults
}

/// The names that this text takes from the top of the crate, each with its line.
fn uses(text: &str) -> Vec<(usize, String)> {
    let text = code(text);
    let mut uses = Vec::new();
    for path in ["crate::", "super::"] {
        for (at, _) in text.match_indices(path) {
            // `super::super::` goes no further up than `super::`, for there is nothing above the crate.
            if text[..at].ends_with(is_name) || text[..at].ends_with("super::") {
                continue;
            }
            let rest = text[at..].trim_start_matches(path);
            let line = text[..at].matches('\n').count() + 1;
            match rest.strip_prefix('{') {
                Some(group) => uses.extend(firsts(group).into_iter().map(|(more, name)| (line + more, name))),
                None => uses.push((line, first(rest))),
            }
        }
    }
    uses.sort();
    uses
}

/// The text without its comments, and without what modules inside of the file mean by `super::`: the file itself.
fn code(text: &str) -> String {
    let mut inside = false;
    let mut code = String::new();
    for line in text.lines() {
        let line = if line.trim_start().starts_with("//") { "" } else { line.split(" // ").next().unwrap_or("") };
        inside |= (line.starts_with("mod ") || line.starts_with("pub mod ")) && line.ends_with('{');
        inside &= line != "}";
        code += &if inside { line.replacen("super::", "", 1) } else { line.to_string() };
        code += "\n";
    }
    code
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The name that a path begins with, or `*`.
fn first(path: &str) -> String {
    let name: String = path.chars().take_while(|c| is_name(*c)).collect();
    if name.is_empty() { "*".into() } else { name }
}

/// The names that the paths of a group begin with, up to its closing brace, each with the lines before it.
fn firsts(group: &str) -> Vec<(usize, String)> {
    let (mut depth, mut start, mut firsts) = (1, true, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => start = true,
            c if start && !c.is_whitespace() => {
                firsts.push((group[..at].matches('\n').count(), first(&group[at..])));
                start = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    firsts
}

const LIB: &str = "//! mod server;\nmod hub; // publishing\npub mod journal;\n\nmod event;\npub use event::Event;\n";

/// A house of three rooms, where one file has this text.
fn with(name: &str, text: &str) -> Vec<String> {
    let mut house = vec![("lib", LIB), ("hub", ""), ("journal", ""), ("event", ""), ("main", "use brooklet::Event;\n")];
    house.retain(|(other, _)| *other != name);
    house.push((name, text));
    faults(&house)
}

#[test]
fn no_room_uses_one_that_stands_above_it() {
    let files =
        fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap().map(|file| file.unwrap().path());
    let sources = files.filter(|file| file.extension().is_some_and(|end| end == "rs"));
    let read = |file: PathBuf| (file.file_stem().unwrap().to_str().unwrap().into(), fs::read_to_string(&file).unwrap());
    let mut house: Vec<(String, String)> = sources.map(read).collect();
    house.sort();
    let house: Vec<(&str, &str)> = house.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let faults = faults(&house);
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
    let found = rooms(lib(&house)).len();
    assert!(found >= 15, "only {found} rooms were found, which shows nothing");
}

#[test]
fn a_house_where_all_arrows_run_down_has_no_faults() {
    assert_eq!(rooms(LIB), ["hub", "journal", "event"]);
    assert_eq!(
        with("hub", "use crate::event::Event;\nuse crate::{\n    event,\n    journal::{self, File},\n};\n"),
        [""; 0]
    );
    assert_eq!(with("journal", "pub(crate) fn f() -> crate::event::Id { super::event::id() }\n"), [""; 0]);
    assert_eq!(with("event", "mod tests {\n    use super::*;\n}\n"), [""; 0], "the room itself");
    let own = [("lib", LIB), ("hub", ""), ("main", "mod redis;\n"), ("redis", "use brooklet::Hub;\nuse super::say;\n")];
    assert_eq!(faults(&own), [""; 0], "a room of the command");
    assert_eq!(with("main", "mod redis;\nuse brooklet::Server;\nuse crate::redis::Redis;\n"), [""; 0]);
}

#[test]
fn an_arrow_up_is_found_wherever_it_stands() {
    for (text, line) in [
        ("use crate::hub::Hub;\n", 1),
        ("\nuse super::hub;\n", 2),
        ("fn f() {\n    let x = g(crate::hub::count());\n}\n", 2),
        ("use crate::{event::{Event, Id}, hub::Hub};\n", 1),
        ("use crate::{\n    event::{\n        Event,\n    },\n    hub,\n};\n", 5),
        ("let url = \"http://x\"; crate::hub::go(); // and more\n", 1),
        ("mod tests {\n    use super::super::hub;\n}\n", 2),
        ("mod tests {\n}\nuse super::hub;\n", 3),
    ] {
        assert_eq!(with("journal", text), [format!("src/journal.rs:{line}: journal -> hub, which stands above it")]);
    }
}

#[test]
fn what_a_comment_names_is_no_arrow() {
    let text = "//! See crate::hub.\n/// [`crate::hub::Hub`]\nfn f() {} // as crate::hub does\n    // super::hub\n";
    assert_eq!(with("event", text), [""; 0]);
}

#[test]
fn a_room_that_goes_through_the_top_of_the_crate_or_names_itself_is_found() {
    let lib = "journal -> lib (Event): name the room that has it";
    assert_eq!(with("journal", "use crate::Event;\n"), [format!("src/journal.rs:1: {lib}")]);
    assert_eq!(with("journal", "use crate::{event, Event};\n"), [format!("src/journal.rs:1: {lib}")]);
    assert_eq!(with("journal", "use super::*;\n"), ["src/journal.rs:1: journal -> lib (*): name the room that has it"]);
    assert_eq!(with("event", "use crate::event::Id;\n"), ["src/event.rs:1: event -> event: that is itself"]);
}

#[test]
fn a_file_that_is_not_listed_or_too_long_is_found() {
    assert_eq!(with("attic", "use crate::event::Id;\n")[0], "src/attic.rs is no room that lib.rs lists");
    assert_eq!(with("hub", &"\n".repeat(ROOM_LINES)), [""; 0]);
    let found = with("hub", &"\n".repeat(ROOM_LINES + 1));
    assert_eq!(found, ["src/hub.rs has 471 lines, more than 470: it may hold two ideas"]);
}

#[test]
fn a_program_that_reaches_into_a_room_is_found() {
    let public = "a program uses only what is public";
    assert_eq!(with("main", "use crate::hub::Hub;\n"), [format!("src/main.rs:1: main -> hub: {public}")]);
    assert_eq!(with("minimal", "mod event;\n"), [format!("src/minimal.rs takes event.rs in: {public}")]);
}
