//! One program for all targets; `FUZZ_TARGET` names the one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| match std::env::var("FUZZ_TARGET").as_deref() {
    Ok("requests") => brooklet::fuzzing::requests,
    Ok("body") => brooklet::fuzzing::body,
    Ok("target") => |bytes| str::from_utf8(bytes).map(brooklet::fuzzing::target).unwrap_or(()),
    Ok("cursor") => |bytes| str::from_utf8(bytes).map(brooklet::fuzzing::cursor).unwrap_or(()),
    Ok("journal") => brooklet::fuzzing::journal,
    Ok("events") => brooklet::fuzzing::events,
    other => panic!("FUZZ_TARGET is {other:?}, not one of requests, body, target, cursor, journal and events"),
});

fuzz_target!(|bytes: &[u8]| TARGET(bytes));
