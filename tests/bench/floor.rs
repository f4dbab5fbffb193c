//! The floor: no server, just one write for each event and socket, which is what the kernel charges.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

pub fn serve() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("binding");
    println!("http://{}", listener.local_addr().expect("the address"));
    let subscribers: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
    while let Ok((socket, _)) = listener.accept() {
        let _ = socket.set_nodelay(true);
        let mut reader = BufReader::new(socket);
        match read_head(&mut reader) {
            Some(None) => {
                let mut socket = reader.into_inner();
                let _ = socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\nretry: 3000\n\n");
                subscribers.lock().expect("no panic under it").push(socket);
            }
            Some(Some(length)) => {
                let subscribers = subscribers.clone();
                thread::spawn(move || publish(reader, length, &subscribers));
            }
            None => {}
        }
    }
}

/// Reads a head. For a POST, the length of its body.
fn read_head(reader: &mut BufReader<TcpStream>) -> Option<Option<usize>> {
    let mut length = None;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        } else if let Some(value) = line.strip_prefix("Content-Length: ") {
            length = value.trim().parse().ok();
        } else if line == "\r\n" {
            return Some(length);
        }
    }
}

fn publish(mut reader: BufReader<TcpStream>, first: usize, subscribers: &Mutex<Vec<TcpStream>>) {
    let mut next = Some(Some(first));
    while let Some(Some(length)) = next {
        let mut body = vec![0; length];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        // As many bytes as the server writes for this event.
        let frame = [b"id: 1795350909308-0\ndata: ", &body[..], b"\n\n"].concat();
        for mut socket in subscribers.lock().expect("no panic under it").iter() {
            let _ = socket.write(&frame);
        }
        let _ = reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        next = read_head(&mut reader);
    }
}
