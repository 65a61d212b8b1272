//! What a balancer keeps in memory, in the process and in the kernel.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use daisy_tests::Namespace;

/// What the kernel makes for a TCP socket of a process: the socket itself, its inode, its directory entry, its file.
const SOCKET_OBJECTS: [&str; 4] = ["TCP", "sock_inode_cache", "dentry", "filp"];
const PAGE_BYTES: u64 = 4096;

/// A balancer's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All of it that is counted.
    pub bytes: u64,
    /// Connections or flows that it knows of.
    pub entries: u64,
}

/// Of a daemon: resident pages, and the memory of its eBPF maps. Pages of a map that it has mapped are in both, and so
/// counted twice: better too much than too little.
///
/// # Errors
/// If it has gone.
pub fn of_daemon(id: u32) -> Result<Memory> {
    let mut bytes = resident(id)?;
    // Maps only: each file descriptor tells its map's memory. Two descriptors of one map tell the same id.
    let mut seen = std::collections::BTreeSet::new();
    let directory = format!("/proc/{id}/fdinfo");
    for entry in std::fs::read_dir(&directory).with_context(|| directory.clone())?.flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        if let Some((map, locked)) = map_memory(&text)
            && seen.insert(map)
        {
            bytes += locked;
        }
    }
    Ok(Memory { bytes, entries: 0 })
}

/// The id and the memory of the map that a file in `/proc/<pid>/fdinfo` speaks of.
fn map_memory(text: &str) -> Option<(u64, u64)> {
    let field = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<u64>().ok());
    Some((field("map_id:")?, field("memlock:")?))
}

/// Of connection tracking in a namespace. What an entry takes depends on its extensions, which share slabs with
/// everything else: so what all of the kernel's slabs have grown by since `slab_before`, and never less than the
/// entries alone.
///
/// # Errors
/// If the kernel does not tell.
pub fn of_conntrack(host: &Namespace, slab_before: u64) -> Result<Memory> {
    let entries = conntrack_count(host)?;
    let least = entries * object_bytes("nf_conntrack")?;
    Ok(Memory { bytes: least.max(slab_bytes()?.saturating_sub(slab_before)), entries })
}

/// Connections that the connection tracking of a namespace knows.
///
/// # Errors
/// If the kernel does not tell.
pub fn conntrack_count(host: &Namespace) -> Result<u64> {
    host.run(|| number(Path::new("/proc/sys/net/netfilter/nf_conntrack_count")))
}

/// The most that it may know.
///
/// # Errors
/// If the kernel does not tell.
pub fn conntrack_most() -> Result<u64> {
    number(Path::new("/proc/sys/net/netfilter/nf_conntrack_max"))
}

/// Of a proxy: resident pages, its sockets as kernel objects, and what is in their queues.
///
/// # Errors
/// If it has gone.
pub fn of_proxy(host: &Namespace, id: u32) -> Result<Memory> {
    let text = host.run(|| std::fs::read_to_string("/proc/thread-self/net/sockstat").context("sockstat"))?;
    let (sockets, pages) = sockstat(&text)?;
    let each = SOCKET_OBJECTS.iter().map(|name| object_bytes(name)).sum::<Result<u64>>()?;
    Ok(Memory { bytes: resident(id)? + sockets * each + pages * PAGE_BYTES, entries: sockets / 2 })
}

/// TCP sockets in use, and pages in their queues. The pages are those of the whole machine.
fn sockstat(text: &str) -> Result<(u64, u64)> {
    let line = text.lines().find(|line| line.starts_with("TCP:")).context("sockstat has no line on TCP")?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let of = |name: &str| words.iter().skip_while(|w| **w != name).nth(1).and_then(|w| w.parse().ok());
    Ok((of("inuse").context("sockstat: inuse")?, of("mem").context("sockstat: mem")?))
}

fn resident(id: u32) -> Result<u64> {
    let file = format!("/proc/{id}/status");
    let text = std::fs::read_to_string(&file).with_context(|| file.clone())?;
    kibibytes(&text, "VmRSS:").with_context(|| format!("{file} has no VmRSS"))
}

/// The kernel's slabs that it cannot give back.
///
/// # Errors
/// If the kernel does not tell.
pub fn slab_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    kibibytes(&text, "SUnreclaim:").context("/proc/meminfo has no SUnreclaim")
}

fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// The size of a kind of kernel object.
fn object_bytes(name: &str) -> Result<u64> {
    slab_object(&std::fs::read_to_string("/proc/slabinfo").context("/proc/slabinfo")?, name)
}

fn slab_object(text: &str, name: &str) -> Result<u64> {
    // name, active objects, objects, bytes of an object: slabinfo(5).
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(name));
    match line.and_then(|line| line.split_whitespace().nth(3)?.parse().ok()) {
        Some(bytes) => Ok(bytes),
        None => bail!("/proc/slabinfo has no `{name}`"),
    }
}

fn number(path: &Path) -> Result<u64> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    text.trim().parse().with_context(|| format!("{}: {text:?}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_prints_is_read() {
        assert_eq!(kibibytes("VmPeak: 9 kB\nVmRSS:\t  12 kB\n", "VmRSS:"), Some(12 * 1024));
        assert_eq!(slab_object("nf_conntrack 1 2 256 16 1 : tunables", "nf_conntrack").unwrap(), 256);
        assert!(slab_object("TCPv6 1 2 2496 13", "TCP").is_err());
        let sockets = "sockets: used 9\nTCP: inuse 6 orphan 0 tw 3 alloc 8 mem 2\nUDP: inuse 1 mem 0\n";
        assert_eq!(sockstat(sockets).unwrap(), (6, 2));
        let map = "pos:\t0\nmap_type:\t2\nmemlock:\t524608\nmap_id:\t4\nfrozen:\t0\n";
        assert_eq!(map_memory(map), Some((4, 524_608)));
        assert_eq!(map_memory("pos:\t0\nprog_id:\t4\nmemlock:\t4096\n"), None);
    }
}
