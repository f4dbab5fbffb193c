//! All tests in one program: it is linked once, and its tests share the machine from the first to the last. Each file has
//! the tests of one part of the server.

mod block;
mod body;
mod both;
mod command;
mod common;
mod conversation;
mod corpus;
mod door;
mod event;
mod history;
mod hub;
mod journal;
mod lane;
mod log;
mod places;
mod request;
mod response;
mod routes;
mod server;
mod stream;
mod subscription;
mod system;
