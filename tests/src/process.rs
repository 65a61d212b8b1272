//! Processes inside namespaces: started with a log file, ended by their own id and waited for.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::cleanup;
use crate::netns::Namespace;

/// How long a process that was asked to end may take before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// A child of ours, in a process group of its own: what it starts is ended with it, and Ctrl-C reaches it only
/// through us.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    /// How long the log was when the process started: a predecessor may have written to it.
    log_start: u64,
    child: Child,
    ended: bool,
}

impl Process {
    /// Starts `command` inside `namespace`. What it writes to stderr (and to stdout, unless that is `piped`) is
    /// appended to the file `log`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(
        name: &str,
        namespace: &Namespace,
        mut command: Command,
        log: &Path,
        piped: bool,
    ) -> Result<Process> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot open the log {}", log.display()))?;
        let log_start = file.metadata()?.len();
        command.stderr(file.try_clone()?).process_group(0);
        if piped {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        } else {
            command.stdin(Stdio::null()).stdout(file);
        }
        let child = namespace
            .run(|| command.spawn().with_context(|| format!("cannot start {:?}", command.get_program())))?;
        let log = log.to_owned();
        let process = Process { name: name.to_owned(), log, log_start, child, ended: false };
        cleanup::add_group(process.leader());
        Ok(process)
    }

    fn leader(&self) -> i32 {
        // Process ids fit: the kernel's largest is 2²².
        self.child.id() as i32
    }

    /// Its name, for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its stdin and stdout, if they are pipes and were not taken yet.
    pub fn pipes(&mut self) -> Option<(ChildStdin, ChildStdout)> {
        Some((self.child.stdin.take()?, self.child.stdout.take()?))
    }

    /// Its exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.try_wait().ok().flatten();
        self.ended |= status.is_some();
        status
    }

    /// # Errors
    /// If it has ended, with the end of its log.
    pub fn check(&mut self) -> Result<()> {
        match self.ended() {
            None => Ok(()),
            Some(status) => {
                bail!("{} ended ({status}); its log ends with:\n{}", self.name, tail(&self.log, 15))
            }
        }
    }

    /// What it has written to its log.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn output(&self) -> Result<String> {
        let mut file = File::open(&self.log)?;
        file.seek(SeekFrom::Start(self.log_start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits until it has written a line with this word.
    ///
    /// # Errors
    /// If it ends, or takes longer than `limit`.
    pub fn wait_for_line(&mut self, word: &str, limit: Duration) -> Result<()> {
        let found = |text: &str| text.split(|c: char| !c.is_ascii_alphabetic()).any(|found| found == word);
        let end = Instant::now() + limit;
        while !found(&self.output()?) {
            self.check()?;
            if Instant::now() >= end {
                bail!(
                    "{} did not say `{word}` within {limit:?}; its log ends with:\n{}",
                    self.name,
                    tail(&self.log, 15)
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Sends a signal to it and to what it started.
    pub fn signal(&self, signal: Signal) {
        if !self.ended {
            // A group that has just ended is no error.
            let _ = killpg(Pid::from_raw(self.leader()), signal);
        }
    }

    /// Ends it with SIGKILL, and waits.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        // The only error is that it was waited for already.
        let _ = self.child.wait();
        self.forget();
    }

    /// Asks it to end with SIGTERM, waits, and kills it if it takes longer than five seconds.
    ///
    /// # Errors
    /// If it had to be killed, or did not end with status 0 (SIGTERM itself counts as 0).
    pub fn stop(&mut self) -> Result<()> {
        if self.ended {
            return Ok(());
        }
        self.signal(Signal::SIGTERM);
        if !cleanup::poll_until(GRACE, || matches!(self.child.try_wait(), Ok(Some(_)) | Err(_))) {
            let threads = threads(self.id());
            self.kill();
            let log = tail(&self.log, 15);
            bail!("{} did not end within {GRACE:?} of SIGTERM and was killed ({threads}):\n{log}", self.name);
        }
        let status = self.child.wait()?;
        self.forget();
        if !status.success() && status.signal() != Some(Signal::SIGTERM as i32) {
            bail!("{} ended with {status}; its log ends with:\n{}", self.name, tail(&self.log, 15));
        }
        Ok(())
    }

    fn forget(&mut self) {
        self.ended = true;
        cleanup::remove_group(self.leader());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.ended {
            self.kill();
        }
        cleanup::remove_group(self.leader());
    }
}

/// What each thread of a process does: its state, and where in the kernel it waits.
fn threads(pid: u32) -> String {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return "gone".into() };
    let about = |task: &Path, file: &str| std::fs::read_to_string(task.join(file)).unwrap_or_default();
    let lines = tasks.flatten().map(|task| {
        let status = about(&task.path(), "status");
        let state = status.lines().find_map(|line| line.strip_prefix("State:\t")).unwrap_or("?").to_owned();
        format!("{} {state} in {}", task.file_name().display(), about(&task.path(), "wchan"))
    });
    lines.collect::<Vec<_>>().join(", ")
}

/// The last lines of a file; empty if it cannot be read.
pub fn tail(path: &Path, lines: usize) -> String {
    let Ok(file) = File::open(path) else { return String::new() };
    let all: Vec<String> = BufReader::new(file).lines().map_while(Result::ok).collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
