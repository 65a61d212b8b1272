//! `daisy-agent`: the agent beside a backend.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use daisy_agent::daemon;
use daisy_agent::datapath;
use daisy_node::interface::Interface;
use daisy_node::log::{self, die, read_token};
use daisy_node::stop::Stop;
use daisy_node::xdp::Mode;
use daisy_shared::service::MIN_BUCKETS;

/// The agent: delivers packets to the local service, or sends them down the chain.
#[derive(Debug, Parser)]
#[command(
    version,
    arg_required_else_help = false,
    after_help = "Example:\n  daisy-agent run --name web-1 --interface eth0 --controller http://192.0.2.1:7600"
)]
struct Cli {
    /// How log lines look: text or json. RUST_LOG chooses what is logged.
    #[arg(long, global = true, default_value = "text", value_name = "FORMAT")]
    log_format: log::Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the agent. SIGTERM and SIGINT end the daemon and leave the data path attached.
    Run(Run),
    /// Removes everything that an agent has put on this host: programs, pins, and addresses on lo.
    Unload(Unload),
}

#[derive(Debug, Args)]
struct Run {
    /// The node's name, unique among nodes.
    #[arg(long)]
    name: String,
    /// The underlay interface: encapsulated packets arrive there and leave there.
    #[arg(long)]
    interface: String,
    /// A controller's URL, such as http://192.0.2.1:7600; repeat for several, they are tried in turn.
    #[arg(long = "controller", value_name = "URL", required = true)]
    controllers: Vec<String>,
    /// A file with the bearer token that the controllers want.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Where the last good tables are kept.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/daisy-agent")]
    state_dir: PathBuf,
    /// A bpf filesystem, for what outlives the daemon.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,
    /// Accept encapsulated packets from this prefix, beside the directory's muxes and backends; repeat for
    /// several. Default: the prefix that is connected through the interface.
    #[arg(long, value_name = "PREFIX")]
    trust: Vec<Prefix>,
    /// The UDP port of encapsulated packets.
    #[arg(long, value_name = "PORT", default_value_t = daisy_shared::wire::gue::PORT,
          value_parser = clap::value_parser!(u16).range(1..))]
    gue_port: u16,
    /// Where the XDP program runs: auto, native (in the driver) or generic.
    #[arg(long, value_name = "MODE", default_value = "auto")]
    xdp_mode: Mode,
    /// How many buckets all services together may have.
    #[arg(long, value_name = "N", default_value_t = 262_144,
          value_parser = clap::value_parser!(u32).range(i64::from(MIN_BUCKETS)..=1 << 26))]
    bucket_capacity: u32,
    /// Deliver every packet locally. Breaks connections when tables change: for comparison only.
    #[arg(long)]
    no_chaining: bool,
    /// After a reboot, take packets with the tables on disk though no controller has answered. Connections of other
    /// backends may be reset if a mux is behind, too.
    #[arg(long)]
    bootstrap: bool,
    /// Take everything down at the end.
    #[arg(long)]
    unload_on_exit: bool,
}

#[derive(Debug, Args)]
struct Unload {
    /// The underlay interface.
    #[arg(long)]
    interface: String,
    /// The bpf filesystem that the agent used.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,
    /// The state directory that the agent used.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/daisy-agent")]
    state_dir: PathBuf,
}

/// An IPv4 prefix, such as `192.0.2.0/24`; an address alone is a prefix of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Prefix(Ipv4Addr, u8);

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a prefix of IPv4 addresses, such as 192.0.2.0/24")]
struct BadPrefix(String);

impl FromStr for Prefix {
    type Err = BadPrefix;

    fn from_str(text: &str) -> Result<Prefix, BadPrefix> {
        let bad = || BadPrefix(text.to_owned());
        let (address, len) = text.split_once('/').unwrap_or((text, "32"));
        let address = address.parse().map_err(|_| bad())?;
        let len = len.parse().ok().filter(|len| *len <= 32).ok_or_else(bad)?;
        Ok(Prefix(address, len))
    }
}

fn main() {
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        if !error.use_stderr() {
            error.exit();
        }
        // What is wrong, without the usage that follows it.
        let text = error.to_string();
        let line = text.split("\n\n").next().unwrap_or_default();
        die(line.strip_prefix("error: ").unwrap_or(line))
    });
    let result = log::init(cli.log_format).and_then(|()| match cli.command {
        Command::Run(args) => run(args),
        Command::Unload(args) => daemon::unload(&args.interface, &args.bpffs, &args.state_dir),
    });
    if let Err(error) = result {
        die(format!("{error:#}"));
    }
}

fn run(args: Run) -> anyhow::Result<()> {
    let stop = Stop::on_signals()?;
    let interface = Interface::find(&args.interface)?;
    let token = args.token_file.as_deref().map(read_token).transpose()?;
    let mut trust: Vec<_> = args.trust.iter().map(|Prefix(address, len)| (*address, *len)).collect();
    if trust.is_empty() {
        trust.push((interface.address, interface.prefix_len));
    }
    let datapath = datapath::Config {
        interface: args.interface,
        address: interface.address,
        gue_port: args.gue_port,
        bpffs: args.bpffs,
        mode: args.xdp_mode,
        bucket_capacity: args.bucket_capacity,
        chaining: !args.no_chaining,
    };
    let config = daemon::Config {
        name: args.name,
        interface,
        controllers: args.controllers,
        token,
        state_dir: args.state_dir,
        trust,
        datapath,
        bootstrap: args.bootstrap,
        unload_on_exit: args.unload_on_exit,
    };
    daemon::run(config, &stop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn prefixes_are_read() {
        assert_eq!("10.1.2.0/24".parse::<Prefix>().unwrap(), Prefix(Ipv4Addr::new(10, 1, 2, 0), 24));
        assert_eq!("10.1.2.3".parse::<Prefix>().unwrap(), Prefix(Ipv4Addr::new(10, 1, 2, 3), 32));
        for bad in ["", "10.1.2/24", "10.1.2.0/33", "10.1.2.0/", "::/0", "10.1.2.0/-1"] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad:?}");
        }
    }
}
