//! Topologies of network namespaces, real traffic through them, and what the end-to-end suites measure with.
//!
//! ```no_run
//! use daisy_tests::{EchoOptions, Topology};
//!
//! # fn main() -> anyhow::Result<()> {
//! let mut net = Topology::new("example").clients(1).muxes(2).backends(4).start()?;
//! let mut echo = net.echo(0, &EchoOptions::default())?;
//! echo.wait_live(1_000)?;
//! net.drain("b1")?;
//! let report = echo.finish()?;
//! assert_eq!(report.broken, 0);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod api;
pub mod bpf;
pub mod builder;
pub mod capture;
pub mod cleanup;
mod control;
pub mod echo;
pub mod http;
pub mod netns;
pub mod node;
pub mod process;
pub mod topology;
pub mod traffic;

pub use api::Api;
pub use builder::{Builder, Io};
pub use echo::report::{Outcome, Report, Sample};
pub use netns::Namespace;
pub use process::Process;
pub use topology::Topology;
pub use traffic::{EchoClient, EchoOptions, Requests, STALL_LIMIT_MS};
