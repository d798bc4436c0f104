//! The page that the guest fetches from its host: a web server that knows one answer.

#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

/// A running server. Its thread lives as long as the process.
#[derive(Debug)]
pub struct Page {
    /// Where it listens.
    pub address: SocketAddr,
    /// One message for each time that the page was fetched.
    pub fetched: Receiver<()>,
}

/// Serves `text` to everyone who asks, on a free port of `host`.
pub fn serve(host: IpAddr, text: String) -> Result<Page> {
    let listener = TcpListener::bind((host, 0)).with_context(|| format!("cannot listen on {host}"))?;
    let address = listener.local_addr()?;
    let (sender, fetched) = channel();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if answer(stream, &text).is_ok() && sender.send(()).is_err() {
                return;
            }
        }
    });
    Ok(Page { address, fetched })
}

fn answer(mut stream: TcpStream, text: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    // The request ends with an empty line; whatever it asks for, there is one page.
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    write!(
        stream,
        "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{text}",
        text.len()
    )
}
