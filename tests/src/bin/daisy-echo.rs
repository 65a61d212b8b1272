//! Traffic for tests: an echo server, an echo client with many long-lived connections, and short HTTP requests.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use daisy_tests::echo::{client, server};
use daisy_tests::{STALL_LIMIT_MS, http};

/// Traffic for tests: echo server, echo client, short HTTP requests.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Greets every connection with a name, then returns what it is sent; prints totals as JSON on SIGTERM.
    Server {
        /// Where to listen.
        #[arg(long, value_name = "ADDRESS:PORT")]
        listen: SocketAddr,
        /// The name to greet with.
        #[arg(long)]
        name: String,
    },
    /// Opens many connections, keeps each one talking, and checks every byte. Prints JSON lines: samples, and a
    /// report at the end. Takes commands on stdin: `open N`, `close N`, `close all`, `close backend NAME`,
    /// `finish`.
    Client {
        /// The server.
        #[arg(long, value_name = "ADDRESS:PORT")]
        target: SocketAddr,
        /// Connections to open at the start.
        #[arg(long, default_value_t = 1_000)]
        connections: usize,
        /// Connections to open in a second.
        #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
        open_per_second: u32,
        /// How often each connection sends a message.
        #[arg(long, default_value_t = 500)]
        interval_ms: u64,
        /// The size of messages: a number, or the least and the most as `64..512`.
        #[arg(long, default_value = "64..512", value_parser = parse_bytes)]
        message_bytes: (usize, usize),
        /// A wait for a reply that is longer counts as a stall.
        #[arg(long, default_value_t = STALL_LIMIT_MS)]
        stall_ms: u64,
        /// A wait for a reply that is longer ends the connection.
        #[arg(long, default_value_t = 20_000)]
        hang_ms: u64,
        /// How often to print a sample.
        #[arg(long, default_value_t = 1_000)]
        sample_ms: u64,
    },
    /// Sends short HTTP requests at a steady rate, each on a connection of its own. Prints totals as JSON lines;
    /// ends at the end of stdin or a line `finish`.
    Requests {
        /// The server.
        #[arg(long, value_name = "ADDRESS:PORT")]
        target: SocketAddr,
        /// The path to ask for.
        #[arg(long, default_value = "/")]
        path: String,
        /// Requests in a second.
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
        per_second: u32,
        /// How many requests may be under way at once.
        #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
        workers: u32,
        /// A request that takes longer has failed.
        #[arg(long, default_value_t = 10_000)]
        timeout_ms: u64,
        /// How often to print totals.
        #[arg(long, default_value_t = 1_000)]
        sample_ms: u64,
    },
}

fn parse_bytes(text: &str) -> Result<(usize, usize), String> {
    let number = |text: &str| text.parse::<usize>().map_err(|_| format!("`{text}` is no number of bytes"));
    let bytes = match text.split_once("..") {
        Some((least, most)) => (number(least)?, number(most)?),
        None => (number(text)?, number(text)?),
    };
    client::check_message_bytes(bytes)?;
    Ok(bytes)
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Server { listen, name } => server::serve(listen, &name).and_then(|report| {
            println!("{}", serde_json::to_string(&report)?);
            Ok(())
        }),
        Command::Client {
            target,
            connections,
            open_per_second,
            interval_ms,
            message_bytes,
            stall_ms,
            hang_ms,
            sample_ms,
        } => client::run(&client::Settings {
            target,
            connections,
            open_per_second,
            interval: Duration::from_millis(interval_ms),
            message_bytes,
            stall: Duration::from_millis(stall_ms),
            hang: Duration::from_millis(hang_ms),
            sample: Duration::from_millis(sample_ms),
        })
        .map(drop),
        Command::Requests { target, path, per_second, workers, timeout_ms, sample_ms } => {
            http::run(&http::Settings {
                target,
                path,
                per_second,
                workers,
                timeout: Duration::from_millis(timeout_ms),
                sample: Duration::from_millis(sample_ms),
            })
            .map(drop)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("daisy-echo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
