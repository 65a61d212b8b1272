//! Network namespaces: made under a unique name, entered by threads, deleted in `Drop`.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cleanup;

/// A network namespace of ours.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
}

/// A number for each topology of this process, so that several may live side by side.
pub fn next_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Namespace {
    /// Makes the namespace `daisy-<pid>-t<number>-<host>`, with `lo` up, IPv6 off and no reverse-path filter.
    ///
    /// # Errors
    /// If `ip` cannot.
    pub fn create(number: u32, host: &str) -> Result<Namespace> {
        let name = format!("daisy-{}-t{number}-{host}", std::process::id());
        cleanup::add_namespace(&name);
        let made = run(Command::new("ip").args(["netns", "add", &name]), None).and_then(|_| {
            File::open(path_of(&name)).with_context(|| format!("cannot open namespace {name}"))
        });
        let file = match made {
            Ok(file) => file,
            Err(error) => {
                cleanup::remove_namespace(&name);
                return Err(error);
            }
        };
        let namespace = Namespace { name, file };
        namespace.ip(&["link set lo up"])?;
        for (key, value) in [
            ("net/ipv6/conf/all/disable_ipv6", "1"),
            ("net/ipv6/conf/default/disable_ipv6", "1"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/default/send_redirects", "0"),
            ("net/ipv4/ip_forward", "0"),
        ] {
            // A kernel without IPv6 has nothing to switch off.
            if key.starts_with("net/ipv6") && !PathBuf::from("/proc/sys").join(key).exists() {
                continue;
            }
            namespace.sysctl(key, value)?;
        }
        Ok(namespace)
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a thread inside the namespace. Processes that `work` starts are inside as well, and see the
    /// machine's own `/sys`, which `ip netns exec` would hide from them together with the BPF file system.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or what `work` returns.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("cannot enter namespace {}", self.name))?;
                work()
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Runs commands of `ip` inside, in one batch.
    ///
    /// # Errors
    /// If one fails.
    pub fn ip(&self, commands: &[impl AsRef<str> + Sync]) -> Result<String> {
        let batch = commands.iter().map(|c| format!("{}\n", c.as_ref())).collect::<String>();
        self.run(|| run(Command::new("ip").args(["-batch", "-"]), Some(&batch)))
            .with_context(|| format!("in namespace {}: {}", self.name, batch.trim().replace('\n', "; ")))
    }

    /// Runs a program inside to its end and returns what it printed.
    ///
    /// # Errors
    /// If it fails; the error carries what it said.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        self.run(|| run(Command::new(program).args(arguments), None))
    }

    /// Sets a kernel parameter of the namespace; `key` is its path below `/proc/sys`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| {
            std::fs::write(PathBuf::from("/proc/sys").join(key), value)
                .with_context(|| format!("cannot set {key} to {value}"))
        })
    }

    /// Gives `name`, a new link here, the other end `eth0` in `host`.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn link_to(&self, name: &str, host: &Namespace) -> Result<()> {
        self.ip(&[format!(
            "link add {name} mtu 1500 type veth peer name eth0 mtu 1500 netns {}",
            host.name
        )])?;
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let path = path_of(&self.name);
        if path.exists() {
            // Whatever still ran inside would keep the namespace alive without a name. Children of what was killed
            // may need a moment to go.
            let gone = || cleanup::processes_in(&path).is_empty();
            if !cleanup::poll_until(std::time::Duration::from_secs(1), gone) {
                for pid in cleanup::processes_in(&path) {
                    eprintln!("process {pid} outlived its owner in namespace {}", self.name);
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
            cleanup::delete_namespace(&self.name);
        }
        cleanup::remove_namespace(&self.name);
    }
}

fn path_of(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}

/// Runs a command to its end.
///
/// # Errors
/// If it cannot start or fails; the error carries what it wrote to stderr.
pub(crate) fn run(command: &mut Command, input: Option<&str>) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{program} failed ({}): {}{}", output.status, stderr.trim(), stdout.trim());
    }
    Ok(stdout)
}
