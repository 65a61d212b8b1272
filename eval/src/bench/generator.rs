//! The packet generator and the sink: two XDP programs (`bpf/traffic.c`), one run with live frames through
//! `BPF_PROG_TEST_RUN`, one attached to the interface at which packets come back. What has arrived is counted exactly.

use std::net::Ipv4Addr;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use aya::maps::{Array, Map, MapData};
use aya::programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp, XdpMode};
use aya::{Ebpf, include_bytes_aligned};
use daisy_tests::Namespace;

use super::cpu;

/// Frames in a call of the kernel, and in one of its batches. A call begins and ends with a grace period of the kernel,
/// milliseconds, so it had better be long; frames that are not to be sent take 30 ns.
const BURST: u32 = 1 << 22;
const BATCH: u32 = 64;
const FRAME_LEN: usize = 60;
/// `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
const CONTEXT_WORDS: usize = 6;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// What is sent, and what is counted.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Where frames go.
    pub to: Mac,
    /// And come from.
    pub from: Mac,
    /// The virtual address.
    pub vip: Ipv4Addr,
    /// Its port.
    pub port: u16,
    /// How many flows, a power of two: segments of what look like established connections.
    pub flows: u32,
    /// How many packets may be under way for each CPU that sends.
    pub window: u32,
    /// How many CPUs send, from 0.
    pub cpus: usize,
    /// When nothing has arrived for so long, what is under way counts as lost.
    pub patience: Duration,
    /// The sink counts what is addressed to this network, or to the virtual address.
    pub network: (Ipv4Addr, u8),
}

impl Settings {
    /// As `struct settings` of `bpf/traffic.c` has it.
    fn words(&self, most: u64) -> Row {
        let mac = |m: Mac| u64::from_ne_bytes([m[0], m[1], m[2], m[3], m[4], m[5], 0, 0]);
        let address = |a: Ipv4Addr| u64::from(u32::from_ne_bytes(a.octets()));
        let mask = u32::MAX.checked_shl(32 - u32::from(self.network.1)).unwrap_or(0).to_be();
        [
            mac(self.to),
            mac(self.from),
            address(self.vip),
            u64::from(self.port),
            u64::from(self.flows),
            u64::from(self.window),
            address(self.network.0),
            u64::from(mask),
            most,
            self.patience.as_nanos() as u64,
            self.cpus as u64,
            0,
            0,
            0,
            0,
            0,
        ]
    }
}

/// Packets since the programs were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Handed to the interface.
    pub sent: u64,
    /// Counted by the sink.
    pub arrived: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Count {
    /// What has happened since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Count) -> Count {
        Count {
            sent: self.sent - earlier.sent,
            arrived: self.arrived - earlier.arrived,
            bytes: self.bytes - earlier.bytes,
        }
    }
}

/// Both programs, on one interface.
pub struct Traffic {
    object: Ebpf,
    settings: Mutex<Array<MapData, Row>>,
    senders: Array<MapData, Line>,
    arrivals: Array<MapData, Line>,
    index: u32,
}

/// `struct settings`; `struct sender` and `struct arrived`.
type Row = [u64; 16];
type Line = [u64; 8];

impl Traffic {
    /// Attaches the sink to `interface` in `namespace`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn attach(namespace: &Namespace, interface: &str) -> Result<Traffic> {
        let mut object = Ebpf::load(include_bytes_aligned!(concat!(env!("OUT_DIR"), "/traffic.o")))
            .context("cannot load the packet generator")?;
        for name in ["generate", "sink"] {
            program(&mut object, name)?.load().with_context(|| format!("the kernel refuses `{name}`"))?;
        }
        let sink = program(&mut object, "sink")?;
        let index = namespace.run(|| {
            sink.attach(interface, XdpMode::Driver)
                .with_context(|| format!("cannot attach the sink to {interface}"))?;
            nix::net::if_::if_nametoindex(interface).with_context(|| format!("no interface {interface}"))
        })?;
        let settings = take(&mut object, "settings")?.try_into()?;
        let (senders, arrivals) = (take(&mut object, "senders")?, take(&mut object, "arrivals")?);
        let (senders, arrivals) = (senders.try_into()?, arrivals.try_into()?);
        Ok(Traffic { object, settings: Mutex::new(settings), senders, arrivals, index })
    }

    /// What to send and to count from now on, and how many packets each CPU may send in all.
    fn set(&self, settings: &Settings, most: u64) -> Result<()> {
        let mut words = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        words.set(0, settings.words(most), 0).context("the generator takes no settings")
    }

    /// What to count from now on. Nothing is sent.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn count_only(&self, settings: &Settings) -> Result<()> {
        self.set(settings, 0)
    }

    /// What has been sent and counted.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn count(&self) -> Result<Count> {
        let lines = |map: &Array<MapData, Line>| map.iter().collect::<Result<Vec<_>, _>>();
        let (senders, arrivals) = (lines(&self.senders)?, lines(&self.arrivals)?);
        let sum = |rows: &[Line], word: usize| rows.iter().map(|row| row[word]).sum();
        Ok(Count { sent: sum(&senders, 0), arrived: sum(&arrivals, 0), bytes: sum(&arrivals, 1) })
    }

    /// Sends from each of these CPUs, as fast as the settings allow, while `work` is done.
    ///
    /// # Errors
    /// If the kernel refuses, or what `work` returns.
    pub fn send_while<T>(
        &self,
        namespace: &Namespace,
        settings: &Settings,
        senders: &[Sender],
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        self.set(settings, u64::MAX)?;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let go_on = || !stop.load(Ordering::Relaxed);
            let threads: Vec<_> = senders
                .iter()
                .map(|sender| scope.spawn(move || self.run(namespace, *sender, go_on)))
                .collect();
            let found = work();
            stop.store(true, Ordering::Relaxed);
            let stopped = self.count_only(settings);
            for thread in threads {
                thread.join().map_err(|_| anyhow!("the generator panicked"))??;
            }
            stopped.and(found)
        })
    }

    /// Sends so many packets, from one CPU.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn send(&self, namespace: &Namespace, settings: &Settings, sender: Sender, count: u64) -> Result<()> {
        let index = u32::try_from(sender.cpu)?;
        let sent = || Ok::<_, anyhow::Error>(self.senders.get(&index, 0)?[0]);
        let end = sent()? + count;
        self.set(settings, end)?;
        self.run(namespace, sender, || sent().is_ok_and(|sent| sent < end))?;
        self.count_only(settings)
    }

    /// Runs the generator for as long as `go_on` says so.
    fn run(&self, namespace: &Namespace, sender: Sender, go_on: impl Fn() -> bool + Sync) -> Result<()> {
        let frame = [0; FRAME_LEN];
        let mut words = [0_u32; CONTEXT_WORDS];
        words[1] = FRAME_LEN as u32;
        words[3] = self.index;
        let context: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let generate: &Xdp =
            self.object.program("generate").context("traffic.o lacks `generate`")?.try_into()?;
        namespace.run(|| {
            cpu::pin(0, sender.cpu)?;
            if sender.yields {
                cpu::yield_to_all()?;
            }
            while go_on() {
                let options = TestRunOptions {
                    data_in: Some(&frame),
                    ctx_in: Some(&context),
                    repeat: BURST,
                    attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
                    ..TestRunOptions::new()
                };
                generate.test_run(options).context("the kernel refuses to run the generator")?;
            }
            Ok(())
        })
    }
}

/// Who sends.
#[derive(Clone, Copy, Debug)]
pub struct Sender {
    /// On this CPU.
    pub cpu: usize,
    /// Whether only when nobody else wants the CPU.
    pub yields: bool,
}

fn take(object: &mut Ebpf, name: &str) -> Result<Map> {
    object.take_map(name).with_context(|| format!("traffic.o lacks `{name}`"))
}

fn program<'a>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    Ok(object.program_mut(name).with_context(|| format!("traffic.o lacks `{name}`"))?.try_into()?)
}
