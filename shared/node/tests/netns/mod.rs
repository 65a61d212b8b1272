//! Test hosts: threads, each in a network namespace of its own. The namespaces have no names and vanish with
//! their threads, whatever becomes of the test.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;

type Task = Box<dyn FnOnce() + Send>;

/// A host.
pub struct Host {
    tasks: Option<Sender<Task>>,
    thread: Option<JoinHandle<()>>,
    namespace: String,
}

impl Host {
    /// A host with a loopback interface that is up.
    pub fn new() -> Host {
        let (tasks, inbox) = channel::<Task>();
        let (namespace, outbox) = channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace (these tests need root)");
            namespace.send(format!("/proc/{}/task/{}/ns/net", std::process::id(), gettid())).unwrap();
            for task in inbox {
                task();
            }
        });
        let namespace = outbox.recv().expect("a new network namespace");
        let host = Host { tasks: Some(tasks), thread: Some(thread), namespace };
        host.sh("ip link set lo up");
        host
    }

    /// Runs something on the host and returns what it returns. Threads that it starts stay on the host.
    pub fn run<T: Send + 'static>(&self, task: impl FnOnce() -> T + Send + 'static) -> T {
        let (result, outbox) = channel::<Result<T, Box<dyn Any + Send>>>();
        let task = Box::new(move || {
            let _nobody_waits = result.send(catch_unwind(AssertUnwindSafe(task)));
        });
        self.tasks.as_ref().unwrap().send(task).unwrap();
        outbox.recv().unwrap().unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Runs a shell command on the host, which must succeed.
    pub fn sh(&self, script: &str) {
        let script = script.to_owned();
        self.run(move || {
            let output = Command::new("sh").args(["-ec", &script]).output().unwrap();
            assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        });
    }

    /// Joins two hosts with a veth pair; both ends are up.
    pub fn join(&self, interface: &str, other: &Host, other_interface: &str) {
        self.sh(&format!(
            "ip link add {interface} type veth peer name {other_interface} netns {}; ip link set {interface} up",
            other.namespace
        ));
        other.sh(&format!("ip link set {other_interface} up"));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.tasks.take());
        let _panicked = self.thread.take().map(JoinHandle::join);
    }
}
