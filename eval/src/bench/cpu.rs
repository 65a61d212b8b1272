//! Who may use which CPU, and how long each was busy.
//!
//! A balancer's work is done in soft interrupts, kernel threads and processes alike, and a soft interrupt is charged
//! to whoever runs when it strikes. So a balancer is given a CPU of its own: its interface's receive processing runs
//! in a kernel thread there (threaded NAPI), so do its processes, and everything else (clients, servers, router,
//! generator, sink) runs on the other. What the balancer costs is how long its CPU was not idle. That is the same
//! yardstick for a program in the kernel, for netfilter and for a daemon.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use daisy_tests::Namespace;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Generator, sink, clients, servers, router.
pub const OTHERS: usize = 0;
/// The balancer, and nobody else.
pub const BALANCER: usize = 1;

/// The kernel counts CPU time in hundredths of a second (`USER_HZ`).
const TICK: Duration = Duration::from_millis(10);

/// # Errors
/// If this machine has one CPU only.
pub fn check() -> Result<()> {
    let cpus = std::thread::available_parallelism()?.get();
    if cpus <= BALANCER {
        bail!("needs two CPUs, one for the balancer and one for everything else; this machine gives {cpus}");
    }
    Ok(())
}

/// Pins a process or thread; 0 is the calling thread.
///
/// # Errors
/// If it has gone, or the CPU has.
pub fn pin(id: i32, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(id), &set).with_context(|| format!("cannot pin {id} to CPU {cpu}"))
}

/// Lets the calling thread, and what it starts, use the first so many CPUs.
///
/// # Errors
/// If there are fewer.
pub fn allow(cpus: usize) -> Result<()> {
    let mut set = CpuSet::new();
    (0..cpus).try_for_each(|cpu| set.set(cpu))?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("there are fewer than {cpus} CPUs"))
}

/// Pins all threads of a process.
///
/// # Errors
/// If it has gone.
pub fn pin_process(id: u32, cpu: usize) -> Result<()> {
    let tasks = format!("/proc/{id}/task");
    for task in std::fs::read_dir(&tasks).with_context(|| tasks.clone())? {
        if let Some(task) = task?.file_name().to_str().and_then(|name| name.parse().ok()) {
            pin(task, cpu)?;
        }
    }
    Ok(())
}

/// Has the receive processing of an interface done on one CPU: in a kernel thread where the device polls (NAPI), by
/// receive packet steering where it does not. `device` has to be the only one of its name whose processing is so
/// placed, or all of that name have to go to the same CPU: kernel threads are found by it. Returns how many threads
/// devices of this name have: none if they do not poll.
///
/// # Errors
/// If the kernel refuses.
pub fn place(namespace: &Namespace, device: &str, cpu: usize) -> Result<usize> {
    let script = format!(
        "cd /sys/class/net/{device} && (echo 1 >threaded) 2>/dev/null; for q in queues/rx-*; do echo {:x} >$q/rps_cpus; done",
        1_u64 << cpu
    );
    // By `ip netns exec`, which mounts /sys anew: it shows the namespace that it was mounted in.
    namespace
        .output("ip", &["netns", "exec", namespace.name(), "sh", "-c", &script])
        .with_context(|| format!("receive processing of {device}"))?;
    let threads = kernel_threads(device)?;
    threads.iter().try_for_each(|thread| pin(*thread, cpu))?;
    Ok(threads.len())
}

/// Has each of the first so many CPUs send by a queue of its own (XPS), as network cards' drivers set it up: a veth
/// spreads by flow otherwise, and CPUs meet at its queues whoever forwards.
///
/// # Errors
/// If the kernel refuses.
pub fn align(namespace: &Namespace, device: &str, cpus: usize) -> Result<()> {
    let lines = (0..cpus).map(|cpu| format!("echo {:x} >queues/tx-{cpu}/xps_cpus", 1_u64 << cpu));
    let script = format!("cd /sys/class/net/{device} && {}", lines.collect::<Vec<_>>().join(" && "));
    namespace
        .output("ip", &["netns", "exec", namespace.name(), "sh", "-c", &script])
        .with_context(|| format!("queues of {device}"))?;
    Ok(())
}

/// Lets the receive processing of devices of this name, placed before, run as soon as there is something to receive:
/// who waits for it on the same CPU would otherwise spend a whole time slice waiting.
///
/// # Errors
/// If the kernel refuses.
pub fn hurry(device: &str) -> Result<()> {
    kernel_threads(device)?.into_iter().try_for_each(|thread| schedule("--fifo", "1", thread))
}

/// Has the calling thread run only when nobody else wants its CPU.
///
/// # Errors
/// If the kernel refuses.
pub fn yield_to_all() -> Result<()> {
    schedule("--idle", "0", nix::unistd::gettid().as_raw())
}

fn schedule(policy: &str, priority: &str, thread: i32) -> Result<()> {
    let done = Command::new("chrt").args([policy, "--pid", priority, &thread.to_string()]).output();
    let output = done.context("cannot start chrt")?;
    if !output.status.success() {
        bail!("chrt: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The NAPI threads of devices of this name.
fn kernel_threads(device: &str) -> Result<BTreeSet<i32>> {
    let prefix = format!("napi/{device}-");
    let processes = std::fs::read_dir("/proc")?.flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    Ok(ids
        .filter(|id| {
            std::fs::read_to_string(Path::new("/proc").join(id.to_string()).join("comm"))
                .is_ok_and(|name| name.starts_with(&prefix))
        })
        .collect())
}

/// A point in time from which a CPU is watched.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    cpu: usize,
    begun: Instant,
    unused: Duration,
}

impl Watch {
    /// From now on.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn start(cpu: usize) -> Result<Watch> {
        let unused = unused(&std::fs::read_to_string("/proc/stat")?, cpu)?;
        Ok(Watch { cpu, begun: Instant::now(), unused })
    }

    /// For how many seconds the CPU was used since, and how many have passed.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn busy_and_wall(&self) -> Result<(f64, f64)> {
        let unused = unused(&std::fs::read_to_string("/proc/stat")?, self.cpu)?;
        let wall = self.begun.elapsed();
        let busy = wall.saturating_sub(unused.saturating_sub(self.unused));
        Ok((busy.as_secs_f64(), wall.as_secs_f64()))
    }
}

/// The share of a CPU that others use while we do nothing: all figures of CPU time are too large by it.
///
/// # Errors
/// If the kernel does not tell.
pub fn share_of_strangers(cpu: usize, time: Duration) -> Result<f64> {
    let watch = Watch::start(cpu)?;
    std::thread::sleep(time);
    let (busy, wall) = watch.busy_and_wall()?;
    Ok(busy / wall)
}

/// How long a CPU has been idle, or taken away by the hypervisor. Idle time is measured; the kernel's other figures
/// are samples, one a tick.
fn unused(stat: &str, cpu: usize) -> Result<Duration> {
    let name = format!("cpu{cpu} ");
    let line = stat.lines().find_map(|line| line.strip_prefix(&name));
    let fields: Vec<u32> = line
        .with_context(|| format!("/proc/stat has no CPU {cpu}"))?
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()
        .with_context(|| format!("/proc/stat: cpu{cpu}"))?;
    // user nice system idle iowait irq softirq steal: proc_stat(5).
    let [_, _, _, idle, waiting, _, _, stolen, ..] = fields[..] else {
        bail!("/proc/stat has too few figures for CPU {cpu}")
    };
    Ok(TICK * (idle + waiting + stolen))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_is_unused_when_idle_waiting_or_stolen() {
        let stat = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\ncpu1 1 2 3 40 50 6 7 80 0 0\n";
        assert_eq!(unused(stat, 0).unwrap(), Duration::from_millis(170));
        assert_eq!(unused(stat, 1).unwrap(), Duration::from_millis(1_700));
        assert!(unused(stat, 2).is_err());
        assert!(unused("cpu0 1 2", 0).is_err());
    }
}
