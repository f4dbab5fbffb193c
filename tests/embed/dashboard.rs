//! A dashboard that shows the newest value first, and never an old one: a page that opens sees the current value of each
//! topic at once, and one that is slow skips what has been overtaken meanwhile.
//!
//! ```console
//! $ curl -d 0.7 localhost:3000/events/load
//! $ curl -N localhost:3000/values
//! ```

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
    server.stream("/values", |stream| {
        let mut news = stream.request().hub().subscribe(VALUES, Since::Newest(1))?;
        loop {
            // All that has come while the page took its time: of that, the newest of each topic is sent.
            let mut newest = BTreeMap::new();
            let first = stream.wait_for(&mut news)?;
            for item in [first].into_iter().chain(std::iter::from_fn(|| news.try_next().ok())) {
                if let News::Event(value) = item {
                    newest.insert(value.topic, value.data);
                }
            }
            for (topic, data) in newest {
                stream.send(&Event::new(data).name(&*topic))?;
            }
        }
    })?;
    Ok(server)
}
