//! A dashboard that shows the newest value first, and never an old one: a page that opens sees the current value of each
//! topic at once, and one that is slow skips what has been overtaken meanwhile.
//!
//! ```console
//! $ curl -d 0.7 localhost:3000/events/load
//! $ curl -N localhost:3000/values
//! ```

use brooklet::crossbeam_channel::select;
use brooklet::{Config, Event, News, Server, Since};
use std::collections::BTreeMap;
use std::io;

/// What is measured; each is a topic, to which anything may publish.
const VALUES: [&str; 3] = ["load", "memory", "requests"];

const PAGE: &str = "<!doctype html><title>dashboard</title><dl><dt>load<dd id=load>?<dt>memory<dd id=memory>?
<dt>requests<dd id=requests>?</dl><script>
const source = new EventSource('values');
for (const value of document.querySelectorAll('dd'))
  source.addEventListener(value.id, event => value.textContent = event.data);
</script>";

fn main() -> io::Result<()> {
    server("127.0.0.1:3000")?.run()
}

pub fn server(address: &str) -> io::Result<Server> {
    let server = Server::bind(address, Config::default())?;
    server.page("/", "text/html; charset=utf-8", PAGE)?;
    let hub = server.hub();
    server.stream("/values", move |stream| {
        // All that is kept comes first: of that, the newest of each topic is sent.
        let mut news = hub.subscribe(VALUES, Since::Earliest)?;
        loop {
            let mut newest = BTreeMap::new();
            while let Ok(item) = news.try_next() {
                if let News::Event(value) = item {
                    newest.insert(value.topic.clone(), value.data);
                }
            }
            // A page that takes its time here finds the next round's values newer still.
            for (topic, data) in newest {
                stream.send(&Event::new(data).name(&*topic))?;
            }
            select! {
                recv(stream.closed()) -> _ => return Ok(()),
                recv(news.ready()) -> _ => {}
            }
        }
    })?;
    Ok(server)
}
