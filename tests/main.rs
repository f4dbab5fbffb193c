//! All tests are one program, which is linked once. Each file has the tests of one room of the server, `both` what the server
//! in one file promises, too, `corpus` the malformed requests, `house` the rules of the rooms, and `common` what they share.
//! Tests run beside each other in one process: whatever looks at threads, descriptors or memory looks at a process that it has
//! started itself.

mod block;
mod body;
mod both;
mod command;
mod common;
mod conversation;
mod corpus;
mod door;
mod embed;
mod engine;
mod event;
mod follower;
mod history;
mod house;
mod hub;
mod journal;
mod lane;
mod log;
mod memory;
mod metrics;
mod minimal;
mod places;
mod pool;
mod power;
mod program;
mod relay;
mod request;
mod response;
mod routes;
mod server;
mod shelf;
mod stream;
mod subscription;
mod system;
mod tokens;
mod topics;
