//! What must not outlive us: processes, mounts and namespaces, undone in `Drop`, and by [`install`]'s thread when
//! the program is told to stop by a signal.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Everything to undo, in the order in which it was done.
#[derive(Default)]
struct Register {
    groups: Vec<i32>,
    mounts: Vec<PathBuf>,
    namespaces: Vec<String>,
    directories: Vec<PathBuf>,
}

static REGISTER: Mutex<Option<Register>> = Mutex::new(None);

fn register() -> MutexGuard<'static, Option<Register>> {
    REGISTER.lock().unwrap_or_else(PoisonError::into_inner)
}

fn with(change: impl FnOnce(&mut Register)) {
    change(register().get_or_insert_default());
}

pub(crate) fn add_group(leader: i32) {
    with(|r| r.groups.push(leader));
}

pub(crate) fn remove_group(leader: i32) {
    with(|r| r.groups.retain(|known| *known != leader));
}

pub(crate) fn add_mount(path: &Path) {
    with(|r| r.mounts.push(path.to_owned()));
}

pub(crate) fn remove_mount(path: &Path) {
    with(|r| r.mounts.retain(|known| known != path));
}

pub(crate) fn add_namespace(name: &str) {
    with(|r| r.namespaces.push(name.to_owned()));
}

pub(crate) fn remove_namespace(name: &str) {
    with(|r| r.namespaces.retain(|known| known != name));
}

pub(crate) fn add_directory(path: &Path) {
    with(|r| r.directories.push(path.to_owned()));
}

pub(crate) fn remove_directory(path: &Path) {
    with(|r| r.directories.retain(|known| known != path));
}

/// Undoes everything that is registered: ends processes, unmounts, deletes namespaces, removes directories.
pub fn undo_all() {
    // Taken, not borrowed: destructors that run at the same time find nothing left to do.
    let Some(all) = register().take() else { return };
    for leader in &all.groups {
        // A group that is gone already is what we want.
        let _ = killpg(Pid::from_raw(*leader), Signal::SIGKILL);
    }
    for path in all.mounts.iter().rev() {
        unmount(path);
    }
    for name in all.namespaces.iter().rev() {
        delete_namespace(name);
    }
    for path in all.directories.iter().rev() {
        if let Err(error) = std::fs::remove_dir_all(path) {
            eprintln!("cannot remove {}: {error}", path.display());
        }
    }
}

/// Undoes everything when SIGINT, SIGTERM or SIGHUP arrives, and exits with 128 + the signal's number, as a shell
/// would say. Calling it again changes nothing.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut signals = match Signals::new([SIGINT, SIGTERM, SIGHUP]) {
            Ok(signals) => signals,
            Err(error) => {
                eprintln!("cannot watch for signals: {error}");
                return;
            }
        };
        std::thread::spawn(move || {
            if let Some(signal) = signals.forever().next() {
                eprintln!("signal {signal}: cleaning up");
                undo_all();
                std::process::exit(128 + signal);
            }
        });
    });
}

pub(crate) fn unmount(path: &Path) {
    if let Err(error) = umount2(path, MntFlags::MNT_DETACH) {
        eprintln!("cannot unmount {}: {error}", path.display());
    }
}

pub(crate) fn delete_namespace(name: &str) {
    match Command::new("ip").args(["netns", "delete", name]).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            eprintln!("cannot delete namespace {name}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Err(error) => eprintln!("cannot delete namespace {name}: ip: {error}"),
    }
}

/// Removes what a run that was ended with SIGKILL has left: namespaces with our prefix whose process is gone, and
/// the processes in them. Names carry the process id, so that nothing of a live run is touched.
pub fn sweep() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(owner) = owner_of(&name) else { continue };
        if Path::new(&format!("/proc/{owner}")).exists() {
            continue;
        }
        eprintln!("removing namespace {name}, left by process {owner}");
        for pid in processes_in(&entry.path()) {
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        delete_namespace(&name);
    }
}

/// The process id in a name that [`crate::Namespace::create`] gave.
fn owner_of(name: &str) -> Option<u32> {
    let mut parts = name.strip_prefix("daisy-")?.splitn(3, '-');
    let owner = parts.next()?.parse().ok()?;
    // A topology's number follows as `t1`; other users of the prefix clean up after themselves.
    parts.next()?.strip_prefix('t')?.parse::<u32>().ok()?;
    parts.next()?;
    Some(owner)
}

/// The processes whose network namespace is the one at `path`.
pub(crate) fn processes_in(path: &Path) -> Vec<i32> {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(wanted) = std::fs::metadata(path) else { return Vec::new() };
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            std::fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|found| found.ino() == wanted.ino() && found.dev() == wanted.dev())
        })
        .collect()
}

/// Waits until `done` says so. Returns whether it did before `limit` was over.
pub(crate) fn poll_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_we_give_have_an_owner() {
        assert_eq!(owner_of("daisy-42-t1-router"), Some(42));
        assert_eq!(owner_of("daisy-42-x"), None);
        assert_eq!(owner_of("daisy-42-x-router"), None);
        assert_eq!(owner_of("other-42-t1-router"), None);
    }
}
