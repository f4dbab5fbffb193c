//! A job queue with progress, as front ends of language models want it: the answer to the `POST` is a stream.
//!
//! ```console
//! $ curl -N -d 'once upon a time' localhost:3000/jobs
//! ```
//! A job goes on when its page has gone. What comes of it is a topic of its own, `job-1`, so the page can come back with
//! `new EventSource('/jobs/1')`, gets what it has missed, and once the job is done is told to stay away.

use brooklet::{Answer, Config, Event, Hub, News, Server, Since, crossbeam_channel::bounded};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::{io, thread, time::Duration};

fn main() -> io::Result<()> {
    server("127.0.0.1:3000")?.run()
}

pub fn server(address: &str) -> io::Result<Server> {
    let hour = Duration::from_secs(3_600); // a page may be away for so long
    let server = Server::bind(address, Config::default().with(|config| config.keep_age = hour))?;
    let (queue, jobs) = bounded::<(String, String)>(100); // whoever comes when so many wait is told to try again
    let hub = server.hub();
    thread::spawn(move || jobs.iter().for_each(|(topic, prompt)| work(&hub, &topic, &prompt)));

    let numbers = AtomicU64::new(1);
    server.route("POST /jobs", move |request| {
        let topic = format!("job-{}", numbers.fetch_add(1, Relaxed));
        let mut news = request.hub().subscribe([&topic], Since::Now)?; // first, so that nothing of the job is missed
        if queue.try_send((topic, request.text()?.into())).is_err() {
            return Ok(Answer::text(503, "too many jobs wait").field("Retry-After", 5));
        }
        let mut stream = request.stream()?;
        loop {
            let News::Event(event) = stream.wait_for(&mut news)? else { continue };
            let is_last = event.name.as_deref() == Some("done");
            stream.send(&event.into())?;
            if is_last {
                return stream.end();
            }
        }
    })?;
    server.route("GET /jobs/", |request| {
        let topic = format!("job-{}", request.rest());
        match request.hub().newest(&topic)? {
            None => Ok(Answer::text(404, "there is no such job, or it was long ago")),
            Some(last) if last.name.is_some() && request.last_event_id() == Some(&last.id.to_string()) => {
                Ok(Answer::empty(204)) // it has had all of it: an EventSource that gets this does not come back
            }
            Some(_) => request.follow_since([topic], Since::Earliest),
        }
    })?;
    Ok(server)
}

/// The work: here, each word of the prompt in capitals. One that cannot be published is missing.
fn work(hub: &Hub, topic: &str, prompt: &str) {
    for word in prompt.split_whitespace() {
        let _ = hub.publish(topic, Event::new(word.to_uppercase()));
    }
    let _ = hub.publish(topic, Event::new("").name("done"));
}
