//! `daisyctl`: nouns and verbs over the API.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub mod client;
mod run;
mod show;

/// Drives a daisy controller.
#[derive(Parser)]
#[command(
    name = "daisyctl",
    version,
    propagate_version = true,
    after_help = "Examples:\n  daisyctl service add web --vip 203.0.113.1 --port 80\n  \
                  daisyctl backend add web b1 --address 10.0.0.11\n  \
                  daisyctl backend drain b1 --dry-run\n  \
                  daisyctl status --output json\n\n\
                  Exit status: 0 done, 1 refused or no controller, 2 wrong usage."
)]
pub struct Flags {
    /// Where the controller is.
    #[arg(long, global = true, env = "DAISY_CONTROLLER", default_value = "http://127.0.0.1:7600")]
    controller: String,
    /// A file with the bearer token.
    #[arg(long, global = true, env = "DAISY_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// How to show the answer.
    #[arg(long, global = true, default_value = "table")]
    output: Output,
    #[command(subcommand)]
    noun: Noun,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// Aligned columns, for people.
    Table,
    /// What the controller says, for programs.
    Json,
}

#[derive(Subcommand)]
enum Noun {
    /// Virtual addresses and their tables.
    #[command(subcommand)]
    Service(Service),
    /// Servers.
    #[command(subcommand)]
    Backend(Backend),
    /// Muxes.
    #[command(subcommand)]
    Mux(Mux),
    /// Muxes and agents, and what they have applied.
    #[command(subcommand)]
    Node(List),
    /// Backends that give up their buckets.
    #[command(subcommand)]
    Drain(List),
    /// Who owns which bucket.
    #[command(subcommand)]
    Table(Table),
    /// Everything at a glance.
    Status,
    /// What happened lately.
    #[command(subcommand)]
    Event(Event),
}

#[derive(Args)]
struct Change {
    /// Show what would happen, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Subcommand)]
enum Service {
    /// Add a service.
    #[command(
        after_help = "Examples:\n  daisyctl service add web --vip 203.0.113.1 --port 80 --buckets 65536\n  \
                      daisyctl service add bulk --vip 203.0.113.2 --port 873 --encapsulation ipip"
    )]
    Add {
        /// Its name.
        name: String,
        /// The address that clients connect to.
        #[arg(long)]
        vip: std::net::IpAddr,
        /// The port that clients connect to.
        #[arg(long)]
        port: u16,
        /// The transport protocol.
        #[arg(long, default_value = "tcp")]
        protocol: String,
        /// How many buckets its table has: a power of two.
        #[arg(long, default_value_t = daisy_shared::service::DEFAULT_BUCKETS)]
        buckets: u32,
        /// How its packets travel while nothing moves: gue costs 32 bytes each and spreads flows over paths and
        /// receive queues, ipip costs 20 and does not.
        #[arg(long, default_value = "gue", value_parser = ["gue", "ipip"])]
        encapsulation: String,
        #[command(flatten)]
        change: Change,
    },
    /// List the services.
    List,
    /// Show a service and its backends.
    Show {
        /// Its name.
        name: String,
    },
    /// Remove a service with all its backends, at once.
    Remove {
        /// Its name.
        name: String,
        #[command(flatten)]
        change: Change,
    },
}

#[derive(Subcommand)]
enum Backend {
    /// Add a backend to a service.
    #[command(after_help = "Example:\n  daisyctl backend add web b1 --address 10.0.0.11 --weight 200")]
    Add {
        /// The service.
        service: String,
        /// The backend's name.
        name: String,
        /// Its address, where its agent takes encapsulated packets.
        #[arg(long)]
        address: std::net::IpAddr,
        /// Its share is this weight of the sum of all.
        #[arg(long)]
        weight: Option<u32>,
        #[command(flatten)]
        change: Change,
    },
    /// List the backends of a service, or of all.
    List {
        /// The service.
        service: Option<String>,
    },
    /// Change a backend's weight.
    #[command(after_help = "Example:\n  daisyctl backend weight web b1 50 --dry-run")]
    Weight {
        /// The service.
        service: String,
        /// The backend.
        name: String,
        /// Its new weight.
        weight: u32,
        #[command(flatten)]
        change: Change,
    },
    /// Give up all of a backend's buckets; its connections live on.
    #[command(after_help = "Example:\n  daisyctl backend drain b1\n  daisyctl drain list")]
    Drain {
        /// The backend.
        name: String,
        /// Only in this service; otherwise in all that it serves.
        #[arg(long)]
        service: Option<String>,
        #[command(flatten)]
        change: Change,
    },
    /// Call a drain off.
    Undrain {
        /// The backend.
        name: String,
        /// Only in this service; otherwise in all that it serves.
        #[arg(long)]
        service: Option<String>,
        #[command(flatten)]
        change: Change,
    },
    /// Drain a backend, and let it leave the service when its last connection has closed.
    #[command(
        after_help = "Example:\n  daisyctl backend remove web b1\n  daisyctl backend remove web b1 --force"
    )]
    Remove {
        /// The service.
        service: String,
        /// The backend.
        name: String,
        /// At once; connections that it holds break.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        change: Change,
    },
}

#[derive(Subcommand)]
enum Mux {
    /// List the muxes.
    List,
    /// Forget a mux that is gone for good: agents take no packets from its address any more.
    Remove {
        /// Its name.
        name: String,
        #[command(flatten)]
        change: Change,
    },
}

#[derive(Subcommand)]
enum List {
    /// List them.
    List,
}

#[derive(Subcommand)]
enum Table {
    /// Show the chains of a service's buckets, newest owner first.
    #[command(after_help = "Example:\n  daisyctl table show web --bucket 42")]
    Show {
        /// The service.
        service: String,
        /// Only this bucket.
        #[arg(long)]
        bucket: Option<u32>,
    },
}

#[derive(Subcommand)]
enum Event {
    /// List the last events, oldest first.
    List {
        /// Only those after this sequence number.
        #[arg(long, default_value_t = 0)]
        after: u64,
    },
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let flags = Flags::parse();
    match run::run(&flags) {
        Ok(text) => match write_out(&text) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => complain(&error.to_string()),
        },
        Err(error) => complain(&format!("{error:#}")),
    }
}

fn write_out(text: &str) -> std::io::Result<()> {
    use std::io::{ErrorKind, Write};
    match writeln!(std::io::stdout(), "{}", text.trim_end()) {
        // Whoever read, `head` for instance, has read enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

fn complain(error: &str) -> ExitCode {
    use std::io::Write;
    // Nothing is left to do if standard error is closed.
    let _closed = writeln!(std::io::stderr(), "daisyctl: {error}");
    ExitCode::FAILURE
}
