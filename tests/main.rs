//! All tests in one program: it is linked once, and its tests share the machine from the first to the last. Each file has
//! the tests of one part of the server.

mod command;
mod common;
mod corpus;
mod crowd;
mod door;
mod fanout;
mod http;
mod journal;
mod topics;
