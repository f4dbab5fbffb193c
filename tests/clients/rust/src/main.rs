//! Rust: reqwest-eventsource, which reconnects by itself after every error.

use futures_util::StreamExt;
use reqwest_eventsource::{Event, EventSource};
use serde_json::json;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let url = std::env::args().nth(1).expect("a URL");
    let mut source = EventSource::get(url);
    while let Some(event) = source.next().await {
        match event {
            Ok(Event::Open) => println!("{}", json!({ "open": true })),
            Ok(Event::Message(event)) => {
                println!("{}", json!({ "type": event.event, "id": event.id, "data": event.data }));
            }
            Err(error) => println!("{}", json!({ "end": error.to_string() })),
        }
    }
}
