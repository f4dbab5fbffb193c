//! An event's bytes.

use crate::{both, common::*};
use brooklet::Id;

#[test]
fn a_published_event_arrives_with_exactly_these_bytes() {
    let server = serve_default();
    let (mut stream, _) = Wire::subscribe(server.addr().unwrap(), "/events/a", "");
    let answer = post(server.addr().unwrap(), "/events/a?event=greeting&retry=1500", "one\ntwo");
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/plain; charset=utf-8")));
    let id = answer.body.trim_end();
    assert_eq!(format!("{}\n", id.parse::<Id>().unwrap()), answer.body);
    let frame = stream.take_until(b"\n\n").unwrap();
    let expected = format!("event: greeting\nid: {id}\ndata: one\ndata: two\nretry: 1500\n\n");
    assert_eq!(String::from_utf8(frame).unwrap(), expected);
}

#[test]
fn every_kind_of_line_end_in_the_data_begins_a_new_line_and_nul_may_stand_in_it() {
    let server = serve_default();
    both::every_kind_of_line_end_in_the_data_begins_a_new_line_and_nul_may_stand_in_it(server.addr().unwrap());
}
