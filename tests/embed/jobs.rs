//! A job queue with progress, as the front ends of language models want it: the answer to the `POST` is the stream of what
//! comes of it.
//!
//! ```console
//! $ curl -N -d 'once upon a time' localhost:3000/jobs
//! ```
//! A job goes on when its page has gone. What comes of it is a topic of its own, `job-1`, so the page can come back with
//! `new EventSource('/jobs/1')`, gets what it has missed, and once the job is done is told to stay away.

use brooklet::crossbeam_channel::{bounded, select};
use brooklet::{Answer, Config, Event, Follower, Hub, News, Request, Server, Since};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

/// How many jobs may wait for the worker. Whoever comes then is told to try again.
const WAITING_JOBS: usize = 100;

fn main() -> io::Result<()> {
    server("127.0.0.1:3000")?.run()
}

pub fn server(address: &str) -> io::Result<Server> {
    let server = Server::bind(address, Config::default())?;
    let (queue, jobs) = bounded::<(String, String)>(WAITING_JOBS);
    let hub = server.hub();
    thread::spawn(move || jobs.iter().try_for_each(|(topic, prompt)| work(&hub, &topic, &prompt)));

    let (hub, numbers) = (server.hub(), AtomicU64::new(1));
    server.route("/jobs", move |request| {
        if request.method() != "POST" {
            return Ok(Answer::text(405, "POST a prompt").field("Allow", "POST"));
        }
        let topic = format!("job-{}", numbers.fetch_add(1, Relaxed));
        let news = hub.subscribe([&topic], Since::Now)?; // before the job begins, so that nothing of it is missed
        match queue.try_send((topic, request.text()?.into())) {
            Ok(()) => relay(request, news),
            Err(_) => Ok(Answer::text(503, "too many jobs wait").field("Retry-After", 5)),
        }
    })?;

    let hub = server.hub();
    server.route("/jobs/", move |request| {
        let topic = format!("job-{}", request.rest());
        match hub.newest(&topic)? {
            None => Ok(Answer::text(404, "there is no such job, or it was long ago")),
            Some(last) if request.last_event_id() == Some(&last.id.to_string()) && is_done(&last.name) => {
                Ok(Answer::empty(204)) // it has had all of it: an EventSource that gets this does not come back
            }
            Some(_) => request.follow_since([topic], Since::Earliest),
        }
    })?;
    Ok(server)
}

/// The work: here, each word of the prompt in capitals.
fn work(hub: &Hub, topic: &str, prompt: &str) -> io::Result<()> {
    for word in prompt.split_whitespace() {
        hub.publish(topic, Event::new(word.to_uppercase()))?;
    }
    hub.publish(topic, Event::new("").name("done")).map(drop)
}

/// Sends what comes of a job until it is done, or its page has gone.
fn relay(request: &Request, mut news: Follower) -> io::Result<Answer> {
    let mut stream = request.stream()?;
    loop {
        select! {
            recv(stream.closed()) -> _ => return stream.end(),
            recv(news.ready()) -> _ => {}
        }
        while let Ok(item) = news.try_next() {
            let News::Event(event) = item else { continue }; // a gap: the page was slower than what is kept
            let is_last = is_done(&event.name);
            stream.send(&event.into())?;
            if is_last {
                return stream.end();
            }
        }
    }
}

fn is_done(name: &Option<String>) -> bool {
    name.as_deref() == Some("done")
}
