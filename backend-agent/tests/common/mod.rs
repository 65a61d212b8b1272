//! Hosts for tests of the data path: threads in network and mount namespaces of their own, which the kernel takes
//! down with the thread, however the test ends.
#![allow(dead_code, reason = "each test uses its part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

pub mod frames;
pub mod netns;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use daisy_agent::datapath::{Config, Datapath};
use daisy_node::xdp::Mode;
use daisy_shared::chain::{Generation, Knowledge, Owners};
use daisy_shared::flow::HashKey;
use daisy_shared::service::{Encapsulation, Protocol, Service, ServiceId};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

pub const ME: Ipv4Addr = Ipv4Addr::new(10, 11, 0, 2);
pub const MUX: Ipv4Addr = Ipv4Addr::new(10, 11, 0, 1);
pub const VIP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub const PORT: u16 = 80;
pub const GUE_PORT: u16 = daisy_shared::wire::gue::PORT;

/// A bpf filesystem of the test's own.
pub struct Bpffs {
    folder: tempfile::TempDir,
}

impl Bpffs {
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        nix::mount::umount(self.folder.path()).expect("the bpf filesystem can be unmounted");
    }
}

/// Moves the calling thread to a new network namespace, with loopback up. Not to a new mount namespace: its mounts
/// could not be made private where the root folder is no mount point, as in a chroot.
pub fn enter_new_host() {
    unshare(CloneFlags::CLONE_NEWNET).expect("these tests make network namespaces and need root");
    // /sys is of the network namespace it was mounted in, and ip(8) looks there for some things.
    ip("link set lo up");
}

/// Runs `test` on a host of its own, with a bpf filesystem.
pub fn on_new_host<R: Send>(test: impl FnOnce(&Path) -> R + Send) -> R {
    thread::scope(|scope| {
        let host = scope.spawn(|| {
            enter_new_host();
            let bpffs = mount_bpffs();
            test(bpffs.path())
        });
        host.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

pub fn mount_bpffs() -> Bpffs {
    let folder = tempfile::tempdir().unwrap();
    mount(Some("bpf"), folder.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
    Bpffs { folder }
}

/// Runs a command in the calling thread's namespaces and returns what it prints.
pub fn run(program: &str, args: &str) -> String {
    let output = Command::new(program).args(args.split_whitespace()).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {args}: {} {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// ip(8).
pub fn ip(args: &str) -> String {
    run("ip", args)
}

/// A veth pair with both ends here, `eth0` with the agent's address.
pub fn lone_interface() {
    ip("link add eth0 type veth peer name wire0");
    ip(&format!("address add {ME}/24 dev eth0"));
    ip("link set eth0 up");
    ip("link set wire0 up");
}

pub fn config(bpffs: &Path) -> Config {
    Config {
        interface: "eth0".to_owned(),
        address: ME,
        gue_port: GUE_PORT,
        bpffs: PathBuf::from(bpffs),
        mode: Mode::Auto,
        bucket_capacity: 4096,
        chaining: true,
    }
}

pub fn service(id: u32, port: u16, buckets: u32) -> Service {
    Service {
        id: ServiceId(id),
        name: format!("service{id}"),
        vip: VIP.into(),
        protocol: Protocol::Tcp,
        port,
        buckets,
        hash_key: HashKey(*b"an agent's tests"),
        encapsulation: Encapsulation::Gue,
    }
}

pub fn chain(owners: &[Ipv4Addr]) -> Owners<Ipv4Addr> {
    owners.iter().copied().collect()
}

/// What a table says.
pub fn known(generation: u32, owners: &[Ipv4Addr]) -> Knowledge<Ipv4Addr> {
    Knowledge { generation: Generation(generation), chain: chain(owners), from_table: true }
}

/// The counters that are not zero.
pub fn counted(datapath: &Datapath) -> Vec<(String, u64)> {
    datapath.counters().unwrap().into_iter().filter(|(_, count)| *count > 0).collect()
}
