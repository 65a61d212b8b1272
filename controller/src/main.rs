//! `daisy-controller`: decides which backend owns which bucket, and publishes the tables.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use daisy_controller::api::{self, App};
use daisy_controller::hub::Hub;
use daisy_controller::store::Embedded;
use tracing_subscriber::EnvFilter;

/// Decides which backend owns which bucket, and publishes the tables to muxes and agents.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  daisy-controller --store /var/lib/daisy/controller.redb\n  \
                  daisy-controller --listen 10.0.0.5:7600 --store /var/lib/daisy/controller.redb --token-file /etc/daisy/token"
)]
struct Flags {
    /// The address to listen on; port 0 takes a free one. Off loopback a token is required.
    #[arg(long, default_value = "127.0.0.1:7600")]
    listen: SocketAddr,
    /// The file that keeps the state; made if there is none.
    #[arg(long, default_value = "controller.redb")]
    store: PathBuf,
    /// How long a node may be silent, in milliseconds.
    #[arg(long, default_value_t = 3000, value_parser = clap::value_parser!(u64).range(100..=3_600_000))]
    lease_ms: u64,
    /// A file with the bearer token that every request must carry.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// How to write log lines.
    #[arg(long, default_value = "text")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

fn main() -> ExitCode {
    let flags = match Flags::try_parse() {
        Ok(flags) => flags,
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => {
            // The first paragraph says what is wrong; the rest is help.
            let text = error.to_string();
            let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
            let line = lines.collect::<Vec<_>>().join(" ");
            return complain(&anyhow::anyhow!("{}", line.trim_start_matches("error: ")), 2);
        }
    };
    match start_log(flags.log_format).and_then(|()| prepare(&flags)) {
        Ok(ready) => match ready.run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => complain(&error, 1),
        },
        Err(error) => complain(&error, 2),
    }
}

fn complain(error: &anyhow::Error, code: u8) -> ExitCode {
    // Nothing is left to do if standard error is closed.
    let _closed = writeln!(std::io::stderr(), "daisy-controller: {error:#}");
    ExitCode::from(code)
}

fn start_log(format: LogFormat) -> anyhow::Result<()> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => {
            text.parse::<EnvFilter>().with_context(|| format!("RUST_LOG={text}"))?
        }
        _ => EnvFilter::new("info"),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Whoever reads the log may end before the controller does, which is no reason to end: to complain about that
    // on standard error would panic.
    let builder = builder.log_internal_errors(false);
    match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

/// Everything that can be wrong at the start has been checked.
struct Ready {
    runtime: tokio::runtime::Runtime,
    listener: tokio::net::TcpListener,
    store: Embedded,
    state: daisy_controller::model::State,
    lease_ms: u64,
    token: Option<Arc<str>>,
}

fn prepare(flags: &Flags) -> anyhow::Result<Ready> {
    let token = flags.token_file.as_deref().map(read_token).transpose()?;
    if token.is_none() && !flags.listen.ip().is_loopback() {
        bail!("--listen {}: an address off loopback needs --token-file", flags.listen);
    }
    let (store, state) = Embedded::open(&flags.store)?;
    let runtime = tokio::runtime::Runtime::new().context("runtime")?;
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind(flags.listen))
        .with_context(|| format!("--listen {}", flags.listen))?;
    Ok(Ready { runtime, listener, store, state, lease_ms: flags.lease_ms, token })
}

fn read_token(path: &Path) -> anyhow::Result<Arc<str>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("--token-file {}", path.display()))?;
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        bail!("--token-file {}: not one word of visible ASCII", path.display());
    }
    Ok(token.into())
}

impl Ready {
    fn run(self) -> anyhow::Result<()> {
        let Ready { runtime, listener, store, state, lease_ms, token } = self;
        let listening = listener.local_addr().context("listening address")?;
        let (services, backends) = (state.services.len(), state.backends.len());
        let (hub, writer) = Hub::start(store, state, lease_ms).context("writer thread")?;
        let app = App { hub: Arc::clone(&hub), listening, token };
        let (writer_ended, writer_end) = tokio::sync::oneshot::channel();
        let watcher = std::thread::spawn(move || {
            let result = writer.join();
            // The receiver is gone if the server ended first.
            let _gone = writer_ended.send(());
            result
        });
        runtime.block_on(async {
            let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
                .context("signal handler")?;
            tracing::info!(%listening, services, backends, lease_ms, "ready");
            tokio::select! {
                result = axum::serve(listener, api::router(app)) => result.context("HTTP server")?,
                _ = terminate.recv() => tracing::info!("stopping on SIGTERM"),
                _ = tokio::signal::ctrl_c() => tracing::info!("stopping on SIGINT"),
                _ = writer_end => {}
            }
            anyhow::Ok(())
        })?;
        hub.stop();
        match watcher.join() {
            Ok(Ok(result)) => Ok(result?),
            _ => bail!("the writer thread panicked"),
        }
    }
}
