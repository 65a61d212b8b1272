//! The smallest network a forwarder can stand in: one link. Generator and sink are at its far end, so what is
//! measured is the forwarder, and not the hosts around it.
//!
//! ```text
//!  outside 10.99.0.1 ── far<n> ═══ near<n> ── 10.99.0.2 balancer
//!  sends frames for the virtual address, counts what the balancer sends to 10.99.1.0/24
//! ```
//!
//! Backends (10.99.1.1 and so on) exist as neighbours only: everything that is sent to them is counted and gone.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use daisy_tests::{Namespace, cleanup, netns};

use super::contestant::{Balancer, Contestant, Site};
use super::cpu::{self, Watch};
use super::generator::{Count, Mac, Sender, Settings, Traffic};
use super::memory::Memory;

const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const PORT: u16 = 7000;
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
const BACKENDS: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 99, 1, 1),
    Ipv4Addr::new(10, 99, 1, 2),
    Ipv4Addr::new(10, 99, 1, 3),
    Ipv4Addr::new(10, 99, 1, 4),
];
const BACKEND_NETWORK: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 99, 1, 0), 24);

/// Packets under way at most. Less than any ring on the way holds (a veth's: 256), so that none is lost, and enough
/// for a forwarder that works in batches of 64.
const WINDOW: u32 = 192;

/// Far longer than a packet takes, also if a time slice passes meanwhile; and, where many are refused, not so long that
/// the run waits for nothing else.
const PATIENCE: Duration = Duration::from_millis(20);
const VISIT_PATIENCE: Duration = Duration::from_millis(4);

/// How the CPUs are shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The forwarder has a CPU to itself.
    Apart,
    /// Everything is done on the CPU that sends: generator, forwarder, sink; on this many CPUs, each with a queue.
    Chains(usize),
}

/// A forwarder between a generator and a sink.
pub struct Wire {
    /// Who it is.
    pub contestant: Contestant,
    layout: Layout,
    settings: Settings,
    // In this order they end: the balancer, the programs, the namespaces.
    balancer: Balancer,
    traffic: Traffic,
    host: Namespace,
    outside: Namespace,
}

/// What a run found.
#[derive(Clone, Copy, Debug)]
pub struct Forwarded {
    /// Packets.
    pub count: Count,
    /// Seconds that it took.
    pub wall_s: f64,
    /// Seconds for which the balancer's CPU was busy.
    pub busy_s: f64,
}

impl Forwarded {
    /// Packets per second.
    pub fn per_second(&self) -> f64 {
        self.count.arrived as f64 / self.wall_s
    }

    /// Packets per second of CPU time.
    pub fn per_cpu_second(&self) -> f64 {
        self.count.arrived as f64 / self.busy_s
    }
}

impl Wire {
    /// Sets it up, and sees whether packets come through. Logs go to `directory`.
    ///
    /// # Errors
    /// If anything is missing or refused, or nothing comes through.
    pub fn new(contestant: Contestant, layout: Layout, directory: PathBuf) -> Result<Wire> {
        cleanup::install();
        cleanup::sweep();
        std::fs::create_dir_all(&directory)?;
        let number = netns::next_number();
        let (far_end, near_end) = (format!("far{number}"), format!("near{number}"));
        let outside = Namespace::create(number, "outside")?;
        let host = Namespace::create(number, "balancer")?;
        let cpus = match layout {
            Layout::Apart => None,
            Layout::Chains(cpus) => Some(cpus),
        };
        let queues = format!("numrxqueues {0} numtxqueues {0}", cpus.unwrap_or(1));
        let host_name = host.name();
        outside.ip(&[
            format!("link add {far_end} mtu 1500 {queues} type veth peer name {near_end} mtu 1500 {queues} netns {host_name}"),
            format!("address add {OUTSIDE}/16 dev {far_end}"),
            format!("link set {far_end} up"),
        ])?;
        host.ip(&[format!("address add {HOST}/16 dev {near_end}"), format!("link set {near_end} up")])?;
        let (far, near) = (mac(&outside, &far_end)?, mac(&host, &near_end)?);
        let far_text = far.map(|byte| format!("{byte:02x}")).join(":");
        let neighbours =
            BACKENDS.iter().map(|b| format!("neigh add {b} lladdr {far_text} dev {near_end} nud permanent"));
        host.ip(&neighbours.collect::<Vec<_>>())?;
        // The generator's frames are taken only by a device that polls (NAPI), and only such a one can be given a CPU.
        // An XDP program makes it poll, and so does this. No packets are merged: these have no payload.
        host.output("ethtool", &["-K", &near_end, "gro", "on"])?;
        let traffic = Traffic::attach(&outside, &far_end)?;
        let settings = Settings {
            to: near,
            from: far,
            vip: VIP,
            port: PORT,
            flows: 1024,
            window: WINDOW,
            cpus: cpus.unwrap_or(1),
            patience: PATIENCE,
            network: BACKEND_NETWORK,
        };
        traffic.count_only(&settings)?;
        let site = Site {
            host: &host,
            device: &near_end,
            vip: VIP,
            ports: vec![(PORT, BACKENDS.to_vec())],
            next_hop: BACKENDS[0],
            controller: (&outside, OUTSIDE),
            directory: &directory,
            cpus,
        };
        if let Some(cpus @ 2..) = cpus {
            cpu::align(&host, &near_end, cpus)?;
        }
        // A daemon that pins its threads itself has to be allowed to.
        cpus.map_or(Ok(()), cpu::allow)?;
        let balancer = contestant.set_up(&site);
        cpu::pin(0, cpu::OTHERS)?;
        let balancer = balancer?;
        if layout == Layout::Apart {
            for (namespace, end, cpu) in
                [(&host, &near_end, cpu::BALANCER), (&outside, &far_end, cpu::OTHERS)]
            {
                if cpu::place(namespace, end, cpu)? == 0 {
                    bail!(
                        "{end} has no thread to receive with: threaded NAPI is needed, Linux 5.12 or newer"
                    );
                }
            }
            cpu::hurry(&far_end)?;
            for process in balancer.processes() {
                cpu::pin_process(process, cpu::BALANCER)?;
            }
        }
        let wire = Wire { contestant, layout, settings, balancer, traffic, host, outside };
        wire.try_out().with_context(|| format!("{contestant} between generator and sink"))?;
        Ok(wire)
    }

    fn try_out(&self) -> Result<()> {
        let before = self.traffic.count()?;
        for _ in 0..20 {
            if self.visit(256)? > 0 {
                return Ok(());
            }
        }
        bail!("nothing comes through: {:?}", self.traffic.count()?.since(before))
    }

    /// The balancer's memory.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn memory(&self) -> Result<Memory> {
        self.balancer.memory(&self.host)
    }

    /// Sends packets of `flows` flows for `time`, with the window that keeps the forwarder busy, and says what came
    /// through.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forward(&self, flows: u32, time: Duration) -> Result<Forwarded> {
        let settings = Settings { flows, ..self.settings };
        let senders: Vec<Sender> = match self.layout {
            Layout::Apart => vec![Sender { cpu: cpu::OTHERS, yields: false }],
            // A daemon on the same CPU has to get it before the generator has waited for a whole time slice.
            Layout::Chains(cpus) => (0..cpus).map(|cpu| Sender { cpu, yields: true }).collect(),
        };
        self.traffic.send_while(&self.outside, &settings, &senders, || {
            // Flows become known, caches warm, threads wake.
            std::thread::sleep(time / 5);
            self.watch(time)
        })
    }

    fn watch(&self, time: Duration) -> Result<Forwarded> {
        let before = self.traffic.count()?;
        let watch = Watch::start(cpu::BALANCER)?;
        std::thread::sleep(time);
        let (busy_s, wall_s) = watch.busy_and_wall()?;
        Ok(Forwarded { count: self.traffic.count()?.since(before), wall_s, busy_s })
    }

    /// Sends a packet of each of `flows` flows, twice, and says how many of the second time came through.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn visit(&self, flows: u32) -> Result<u64> {
        let settings = Settings { flows, patience: VISIT_PATIENCE, ..self.settings };
        let sender = Sender { cpu: cpu::OTHERS, yields: false };
        let mut arrived = 0;
        for _ in 0..2 {
            let before = self.traffic.count()?;
            self.traffic.send(&self.outside, &settings, sender, u64::from(flows))?;
            // What is under way arrives.
            std::thread::sleep(Duration::from_millis(100));
            arrived = self.traffic.count()?.since(before).arrived;
        }
        Ok(arrived)
    }
}

fn mac(namespace: &Namespace, device: &str) -> Result<Mac> {
    let text = namespace.output("ip", &["-o", "link", "show", "dev", device])?;
    let word = text.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
    let bytes: Vec<u8> = word
        .with_context(|| format!("{device} has no Ethernet address: {text}"))?
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    bytes.try_into().map_err(|_| anyhow::anyhow!("{device}: no Ethernet address: {text}"))
}
