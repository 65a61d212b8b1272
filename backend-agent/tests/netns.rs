//! The data path on an interface: a real TCP service behind it, a mux made of one thread in front of it.
//!
//! ```text
//! client ── c0 | c1 ── mux ── m0 | eth0 ── backend (agent, service on the VIP)
//! ```

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use aya::programs::Xdp;
use aya::programs::xdp::XdpMode;
use aya::{Ebpf, include_bytes_aligned};
use common::frames::{ACK, SYN, Segment, encapsulated, ethernet, gue, tcp_checksum, underlay};
use common::netns::{Netns, Wire};
use common::{ME, MUX, PORT, VIP, chain, config, enter_new_host, ip, mount_bpffs, run, service};
use daisy_agent::datapath::{Attached, Datapath, Installed, layout};
use daisy_node::xdp::{Attached as In, Mode};
use daisy_shared::chain::Generation;
use daisy_shared::service::ServiceId;
use daisy_shared::wire::probe;

/// An XDP program that passes everything: what a veth needs on the other side of one that sends by XDP_TX.
static PASS: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench.bpf.o"));
const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);
const PATIENCE: Duration = Duration::from_secs(10);
/// A port of the backend that has nothing to do with daisy.
const PLAIN_PORT: u16 = 2222;
const MAX_MSS: u16 = (1500 - 40 - layout::RESERVE) as u16;

/// The three hosts. The calling thread is the backend.
struct Hosts {
    mux: Netns,
    client: Netns,
    eth0: [u8; 6],
    m0: [u8; 6],
    _pass: Ebpf,
}

impl Hosts {
    fn new() -> Hosts {
        let (mux, client) = (Netns::new(), Netns::new());
        ip("link add eth0 type veth peer name m0");
        mux.take("m0");
        ip(&format!("address add {ME}/24 dev eth0"));
        ip("link set eth0 up");
        ip(&format!("address add {VIP}/32 dev lo"));
        ip(&format!("route add 192.0.2.0/24 via {MUX}"));
        for file in ["all", "eth0"] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{file}/rp_filter"), "0").unwrap();
        }
        let mut pass = Ebpf::load(PASS).unwrap();
        mux.inside(|| {
            ip(&format!("address add {MUX}/24 dev m0"));
            ip("link set m0 up");
            ip("link add c1 type veth peer name c0");
            client.take("c0");
            ip("address add 192.0.2.1/24 dev c1");
            ip("link set c1 up");
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            let program: &mut Xdp = pass.program_mut("bench_empty").unwrap().try_into().unwrap();
            program.load().unwrap();
            program.attach("m0", XdpMode::Driver).unwrap();
        });
        client.inside(|| {
            ip(&format!("address add {CLIENT}/24 dev c0"));
            ip("link set c0 up");
            ip("route add default via 192.0.2.1");
            // Or its checksums would be left to a device that there is not.
            run("ethtool", "-K c0 tx off");
        });
        let eth0 = mac("eth0");
        let m0 = mux.inside(|| mac("m0"));
        Hosts { mux, client, eth0, m0, _pass: pass }
    }

    fn wire(&self) -> Wire {
        self.mux.inside(|| Wire::open("m0", PATIENCE))
    }

    /// A frame from the mux with this UDP payload.
    fn frame(&self, payload: &[u8]) -> Vec<u8> {
        ethernet(self.eth0, self.m0, &underlay(MUX, 50_000, payload))
    }

    /// Encapsulates what the client sends to the VIP, until the flag is set; counts.
    fn start_mux(&self, stop: &Arc<AtomicBool>, sent: &Arc<AtomicU64>) -> thread::JoinHandle<()> {
        let from = self.mux.inside(|| Wire::open("c1", Duration::from_millis(100)));
        let to = self.wire();
        let (stop, sent) = (stop.clone(), sent.clone());
        let (eth0, m0) = (self.eth0, self.m0);
        thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                let Some(frame) = from.receive() else { continue };
                if frame[12..14] == [8, 0] && frame[30..34] == VIP.octets() {
                    let len = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
                    let payload = gue(None, &frame[14..14 + len]);
                    sent.fetch_add(1, Ordering::SeqCst);
                    to.send(&ethernet(eth0, m0, &underlay(MUX, 50_000, &payload)));
                }
            }
        })
    }
}

/// An ICMP echo request.
fn ping(hosts: &Hosts) -> Vec<u8> {
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2(hosts.m0, hosts.eth0)
        .ipv4(MUX.octets(), ME.octets(), 64)
        .icmpv4_echo_request(7, 1)
        .write(&mut frame, b"ping")
        .unwrap();
    frame
}

fn mac(interface: &str) -> [u8; 6] {
    daisy_node::interface::Interface::find(interface).unwrap().mac.0
}

fn load(bpffs: &Path, mode: Mode) -> Datapath {
    let mut config = config(bpffs);
    config.mode = mode;
    let mut datapath = Datapath::load(&config).unwrap();
    datapath.set_service(&service(1, PORT, 16)).unwrap();
    datapath.set_trusted(&[(MUX, 32)]).unwrap();
    let table: Vec<Installed> =
        (0..16).map(|bucket| Installed { bucket, generation: Generation(1), chain: chain(&[ME]) }).collect();
    datapath.install(ServiceId(1), &table).unwrap();
    datapath
}

/// On the backend, in a thread of its own.
fn on_backend(test: impl FnOnce(&Hosts, &Path) + Send) {
    thread::scope(|scope| {
        let backend = scope.spawn(|| {
            enter_new_host();
            let bpffs = mount_bpffs();
            test(&Hosts::new(), bpffs.path());
        });
        backend.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Everything that was received has come to exactly one end.
fn assert_conserved(datapath: &Datapath) {
    let counters = datapath.counters().unwrap();
    let ends = ["delivered", "accepted", "answered", "sent_on", "returned", "probes_answered"];
    let dropped = counters.iter().filter(|(name, _)| name.starts_with("dropped_")).map(|(_, count)| count);
    let sum: u64 = ends.iter().map(|name| &counters[*name]).chain(dropped).sum();
    assert_eq!(counters["received"], sum, "{counters:?}");
}

fn serve_through(mode: Mode, expected: In) {
    on_backend(|hosts, bpffs| {
        let mut datapath = load(bpffs, mode);
        assert_eq!(datapath.attach().unwrap(), Attached { mode: expected, replaced: false });
        // The kernel fills checksums in behind the tc program, as it does before a device that cannot.
        run("ethtool", "-K eth0 tx off");
        let listener = TcpListener::bind((VIP, PORT)).unwrap();
        let wire = hosts.wire();
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mux = hosts.start_mux(&stop, &sent);

        let mut stream = hosts.client.inside(|| TcpStream::connect((VIP, PORT)).unwrap());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let (mut server, from) = listener.accept().unwrap();
        assert_eq!(from.ip(), CLIENT, "the service sees the client's address");
        server.set_read_timeout(Some(PATIENCE)).unwrap();

        // The MSS of the SYN-ACK is lowered, and its checksum is right.
        let is_syn_ack = |frame: &[u8]| frame[12..14] == [8, 0] && frame[23] == 6 && frame[47] == SYN | ACK;
        let syn_ack = wire.receive_that(is_syn_ack).expect("a SYN-ACK leaves");
        let len = usize::from(u16::from_be_bytes([syn_ack[16], syn_ack[17]]));
        assert_eq!(syn_ack[54..56], [2, 4], "the MSS comes first");
        assert_eq!(u16::from_be_bytes([syn_ack[56], syn_ack[57]]), MAX_MSS);
        let (source, destination) = (VIP.octets(), CLIENT.octets());
        assert_eq!(tcp_checksum(source, destination, &syn_ack[34..14 + len]), 0);

        // Much data both ways, whole.
        let data: Vec<u8> = (0..1_000_000u32).map(|at| (at * 7 / 3) as u8).collect();
        let echo = thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            loop {
                match server.read(&mut buffer).unwrap() {
                    0 => return,
                    len => server.write_all(&buffer[..len]).unwrap(),
                }
            }
        });
        let mut back = vec![0; data.len()];
        let mut writer = stream.try_clone().unwrap();
        let to_send = data.clone();
        let writing = thread::spawn(move || writer.write_all(&to_send).unwrap());
        stream.read_exact(&mut back).unwrap();
        assert!(back == data);
        writing.join().unwrap();
        drop(stream);
        echo.join().unwrap();

        stop.store(true, Ordering::SeqCst);
        mux.join().unwrap();
        let counters = datapath.counters().unwrap();
        assert_eq!(counters["accepted"], 1);
        assert_eq!(counters["received"], sent.load(Ordering::SeqCst));
        assert_eq!(counters["delivered"] + 1, counters["received"]);
        assert_conserved(&datapath);
        Datapath::unload("eth0", bpffs).unwrap();
    });
}

#[test]
fn a_service_is_reached_through_the_driver() {
    serve_through(Mode::Auto, In::Native);
}

#[test]
fn a_service_is_reached_through_the_generic_path() {
    serve_through(Mode::Generic, In::Generic);
}

#[test]
fn what_is_not_daisys_passes_untouched() {
    on_backend(|hosts, bpffs| {
        let mut datapath = load(bpffs, Mode::Auto);
        datapath.attach().unwrap();
        let listener = TcpListener::bind((ME, PLAIN_PORT)).unwrap();
        let wire = hosts.wire();
        wire.send(&ping(hosts));
        let is_answer = |frame: &[u8]| frame[12..14] == [8, 0] && frame[23] == 1 && frame[34..36] == [0, 0];
        wire.receive_that(is_answer).expect("an answer to a ping");
        let mut stream = hosts.mux.inside(|| TcpStream::connect((ME, PLAIN_PORT)).unwrap());
        let (mut server, _) = listener.accept().unwrap();
        stream.write_all(b"hello").unwrap();
        let mut back = [0; 5];
        server.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"hello");
        // Its SYN-ACK offers what the link carries.
        let is_syn_ack = |frame: &[u8]| frame[12..14] == [8, 0] && frame[23] == 6 && frame[47] == SYN | ACK;
        let syn_ack = wire.receive_that(is_syn_ack).unwrap();
        assert_eq!(u16::from_be_bytes([syn_ack[56], syn_ack[57]]), 1460);
        let counters = datapath.counters().unwrap();
        assert_eq!(counters["received"], 0);
        assert!(counters["passed"] >= 4, "{counters:?}");
    });
}

#[test]
fn probes_are_answered_and_malformed_packets_counted() {
    on_backend(|hosts, bpffs| {
        let mut datapath = load(bpffs, Mode::Auto);
        datapath.attach().unwrap();
        let wire = hosts.wire();
        wire.send(&hosts.frame(&probe::emit(probe::REQUEST, *b"question")));
        let answer =
            wire.receive_that(|frame| frame[12..14] == [8, 0] && frame[23] == 17).expect("an answer");
        assert_eq!(answer[0..12], [hosts.m0, hosts.eth0].concat());
        assert_eq!(answer[26..34], [ME.octets(), MUX.octets()].concat());
        assert_eq!(answer[34..38], [0x17, 0xc0, 0xc3, 0x50]);
        assert_eq!(probe::parse(&answer[42..58]), Some((probe::REPLY, *b"question")));
        let (ip, _) = etherparse::Ipv4Header::from_slice(&answer[14..]).unwrap();
        assert_eq!(ip.header_checksum, ip.calc_header_checksum());

        let inner = Segment::new((CLIENT, 7), ACK).to_bytes();
        let mut bad_sum = hosts.frame(&gue(None, &inner));
        bad_sum[24] ^= 1;
        let mut fragment = inner.clone();
        fragment[6] = 0x20;
        fragment[10] = fragment[10].wrapping_add(0x20);
        let stranger = ethernet(hosts.eth0, hosts.m0, &underlay(CLIENT, 7, &gue(None, &inner)));
        let mut other_port = Segment::new((CLIENT, 7), ACK);
        other_port.service.1 = 81;
        let frames = [
            bad_sum,
            stranger,
            hosts.frame(&[0x40, 4, 0, 0]),
            hosts.frame(&[1, 4, 0, 0, 0x10, 0, 0, 0]),
            hosts.frame(&gue(None, &inner[..30])),
            hosts.frame(&gue(None, &other_port.to_bytes())),
            hosts.frame(&gue(None, &inner)),
        ];
        for frame in &frames {
            wire.send(frame);
        }
        // The wire keeps the order: when this one is answered, the others have been seen.
        wire.send(&hosts.frame(&probe::emit(probe::REQUEST, *b"the last")));
        let is_last = |frame: &[u8]| frame.len() >= 58 && &frame[50..58] == b"the last";
        wire.receive_that(is_last).expect("an answer");
        let counters = datapath.counters().unwrap();
        let expected = [
            ("received", 9),
            ("delivered", 1),
            ("probes_answered", 2),
            ("dropped_bad_ip_checksum", 1),
            ("dropped_untrusted_source", 1),
            ("dropped_gue_unsupported", 1),
            ("dropped_gue_malformed", 1),
            ("dropped_truncated", 1),
            ("dropped_unknown_service", 1),
        ];
        for (name, count) in expected {
            assert_eq!(counters[name], count, "{name} in {counters:?}");
        }
        assert_conserved(&datapath);
    });
}

#[test]
fn no_packet_meets_an_interface_without_a_program() {
    on_backend(|hosts, bpffs| {
        load(bpffs, Mode::Auto).attach().unwrap();
        let wire = hosts.wire();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let question = |number: u64| hosts.frame(&probe::emit(probe::REQUEST, number.to_be_bytes()));
        let mut frame = question(0);
        let probing = thread::spawn(move || {
            let mut number = 0u64;
            while !stopped.load(Ordering::SeqCst) {
                number += 1;
                frame[50..58].copy_from_slice(&number.to_be_bytes());
                wire.send(&frame);
                let is_answer = |frame: &[u8]| frame.len() >= 58 && frame[50..58] == number.to_be_bytes();
                wire.receive_that(is_answer).unwrap_or_else(|| panic!("probe {number} was not answered"));
            }
            number
        });
        for _ in 0..5 {
            let mut datapath = load(bpffs, Mode::Auto);
            assert_eq!(datapath.attach().unwrap(), Attached { mode: In::Native, replaced: true });
        }
        stop.store(true, Ordering::SeqCst);
        let probes = probing.join().unwrap();
        let counters = load(bpffs, Mode::Auto).counters().unwrap();
        assert_eq!((counters["probes_answered"], counters["received"]), (probes, probes));
    });
}

const CHILD_BPFFS: &str = "DAISY_TEST_BPFFS";

/// Not a test: what `a_killed_daemon_leaves_the_data_path_running` starts and kills.
#[test]
#[ignore = "a child process of another test"]
fn a_daemon_that_will_be_killed() {
    let bpffs = std::env::var(CHILD_BPFFS).expect("started by the other test");
    let mut datapath = load(Path::new(&bpffs), Mode::Auto);
    println!("\nattached {}", datapath.attach().unwrap().replaced);
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

#[test]
fn a_killed_daemon_leaves_the_data_path_running() {
    on_backend(|hosts, bpffs| {
        let wire = hosts.wire();
        for round in 0..3u64 {
            let mut daemon = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "a_daemon_that_will_be_killed", "--ignored", "--nocapture"])
                .env(CHILD_BPFFS, bpffs)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(daemon.stdout.take().unwrap()).lines().map(Result::unwrap);
            let line = lines.find(|line| line.starts_with("attached")).expect("it attaches");
            assert_eq!(line, format!("attached {}", round > 0));
            daemon.kill().unwrap();
            daemon.wait().unwrap();
            wire.send(&hosts.frame(&probe::emit(probe::REQUEST, round.to_be_bytes())));
            let is_answer = |frame: &[u8]| frame.len() >= 58 && frame[50..58] == round.to_be_bytes();
            wire.receive_that(is_answer).expect("the data path answers without its daemon");
        }
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        assert_eq!(datapath.services(), [ServiceId(1)]);
        assert_eq!(datapath.counters().unwrap()["probes_answered"], 3);
        assert_eq!(run("tc", "filter show dev eth0 egress").matches("handle 0xda1 ").count(), 1);
        Datapath::unload("eth0", bpffs).unwrap();
        assert!(!ip("-details link show dev eth0").contains("prog/xdp"));
        assert!(!bpffs.join("daisy-agent").exists());
    });
}

#[test]
fn the_mss_is_lowered_never_raised_and_the_checksum_follows() {
    common::on_new_host(|bpffs| {
        common::lone_interface();
        let datapath = load(bpffs, Mode::Auto);
        // As the service sends it: source and destination change places.
        let answer = |port: u16, flags: u8, options: &[u8]| {
            let mut segment = Segment::new((VIP, port), flags);
            segment.service = (CLIENT, 7);
            segment.tcp_options = options.to_vec();
            ethernet([2; 6], [4; 6], &segment.to_bytes())
        };
        let mss = |value: u16| value.to_be_bytes();
        let [high, low] = mss(1460);
        let [max_high, max_low] = mss(MAX_MSS);
        let rows: &[(&str, Vec<u8>, Option<usize>)] = &[
            ("first option", answer(PORT, SYN | ACK, &[2, 4, high, low, 1, 1, 4, 2]), Some(56)),
            ("at an odd offset", answer(PORT, SYN | ACK, &[1, 2, 4, high, low, 1, 1, 1]), Some(57)),
            (
                "behind a timestamp",
                answer(PORT, SYN | ACK, &[8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 2, 4, high, low, 0, 0]),
                Some(66),
            ),
            ("already lower", answer(PORT, SYN | ACK, &[2, 4, 2, 0]), None),
            ("just so", answer(PORT, SYN | ACK, &[2, 4, max_high, max_low]), None),
            ("no MSS", answer(PORT, SYN | ACK, &[4, 2, 1, 1]), None),
            ("behind the end", answer(PORT, SYN | ACK, &[0, 2, 4, high, low, 0, 0, 0]), None),
            ("option of length 0", answer(PORT, SYN | ACK, &[9, 0, 2, 4, high, low, 1, 1]), None),
            ("option of another length", answer(PORT, SYN | ACK, &[2, 3, high, 1]), None),
            ("another port", answer(81, SYN | ACK, &[2, 4, high, low]), None),
            ("not a SYN-ACK", answer(PORT, ACK, &[2, 4, high, low]), None),
            ("a SYN", answer(PORT, SYN, &[2, 4, high, low]), None),
        ];
        for (what, frame, at) in rows {
            let run = datapath.test_run_program("daisy_mss", frame, 1).unwrap();
            assert_eq!(run.returned, u32::MAX, "{what}: left to the next filter");
            let mut expected = frame.clone();
            if let Some(at) = at {
                expected[*at..at + 2].copy_from_slice(&mss(MAX_MSS));
                expected[50..52].copy_from_slice(&run.packet[50..52]);
            }
            assert_eq!(run.packet, expected, "{what}");
            assert_eq!(tcp_checksum(VIP.octets(), CLIENT.octets(), &run.packet[34..]), 0, "{what}");
        }
    });
}

/// A library reads in the frames of these tests what was meant.
#[test]
fn frames_of_the_tests_are_well_formed() {
    let frame = encapsulated(None, &Segment::new((CLIENT, 7), SYN).to_bytes());
    let outer = etherparse::SlicedPacket::from_ethernet(&frame).unwrap();
    let Some(etherparse::TransportSlice::Udp(udp)) = outer.transport else { panic!("UDP") };
    let inner = etherparse::SlicedPacket::from_ip(&udp.payload()[4..]).unwrap();
    let Some(etherparse::TransportSlice::Tcp(tcp)) = inner.transport else { panic!("TCP") };
    assert!(tcp.syn() && !tcp.ack());
}
