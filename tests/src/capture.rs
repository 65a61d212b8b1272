//! Packets kept for whoever has to find out why a suite failed.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::netns::Namespace;
use crate::process::Process;

/// A `tcpdump` that writes the first 160 bytes of every packet of a namespace to a file, until it is dropped.
#[derive(Debug)]
pub struct Capture(Process);

impl Capture {
    /// Starts it on every interface of `namespace`.
    ///
    /// # Errors
    /// If `tcpdump` cannot be started.
    pub fn start(name: &str, namespace: &Namespace, file: &Path, log: &Path) -> Result<Capture> {
        let mut command = Command::new("tcpdump");
        command.args(["-i", "any", "-n", "-U", "-s", "160", "-Z", "root", "-w"]).arg(file);
        Ok(Capture(Process::start(name, namespace, command, log, false)?))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // It writes out what it holds at SIGTERM.
        let _ = self.0.stop();
    }
}
