//! The sockets of a thread, with the kernel's side of their rings played by the test.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::ring::{Consumer, Producer, RING_LEN, Ring};
use super::*;
use crate::common::{self, LINK, UNDERLAY, VIP};
use daisy_mux::table::{NextHop, Tables};

const INTERFACES: usize = 2;
const PORTS: usize = 2 * INTERFACES;
/// Room that the kernel leaves before a frame, and ours.
const START: u64 = 256 + 64;

/// The kernel's side of one socket.
struct Kernel {
    fill: Consumer<u64>,
    completion: Producer<u64>,
    receive: Producer<libc::xdp_desc>,
    send: Consumer<libc::xdp_desc>,
    /// Frames that the device has.
    device: VecDeque<u64>,
}

impl Kernel {
    fn pair(number: u16) -> (Port, Kernel) {
        let (fill, completion) = (Ring::in_memory(), Ring::in_memory());
        let (receive, send) = (Ring::in_memory(), Ring::in_memory());
        let kernel = Kernel {
            fill: Consumer::new(fill.clone()),
            completion: Producer::new(completion.clone()),
            receive: Producer::new(receive.clone()),
            send: Consumer::new(send.clone()),
            device: VecDeque::new(),
        };
        (Port::in_memory(number, (fill, completion, receive, send)), kernel)
    }

    /// A frame has come. Returns whether there was a place for it.
    fn receive(&mut self, io: &AfXdp, frame: &[u8]) -> bool {
        let Some(address) = self.fill.pop() else { return false };
        self.fill.release();
        assert_eq!(address % FRAME_LEN as u64, 0);
        let room = io.umem.memory().part((address + START) as usize, frame.len());
        // SAFETY: within the mapping, in a frame that was given to the kernel and that nobody else touches.
        unsafe { room.copy_from_nonoverlapping(std::ptr::NonNull::from(frame).cast(), frame.len()) };
        let packet = libc::xdp_desc { addr: address + START, len: frame.len() as u32, options: 0 };
        assert!(self.receive.push(packet), "as many entries as frames");
        self.receive.submit();
        true
    }

    /// The device takes a frame to send. Returns its bytes.
    fn send(&mut self, io: &AfXdp) -> Option<Vec<u8>> {
        let packet = self.send.pop()?;
        self.send.release();
        let bytes = io.umem.memory().part(packet.addr as usize, packet.len as usize);
        // SAFETY: within the mapping, in a frame that was given to the kernel and that nobody else touches.
        let bytes = unsafe { std::slice::from_raw_parts(bytes.as_ptr(), packet.len as usize) }.to_vec();
        self.device.push_back(packet.addr);
        Some(bytes)
    }

    /// The device has sent a frame.
    fn complete(&mut self) -> bool {
        let Some(address) = self.device.pop_front() else { return false };
        assert!(self.completion.push(address), "as many entries as may be on their way");
        self.completion.submit();
        true
    }
}

/// Backend 1 is behind interface 0 and has the even buckets, backend 2 is behind interface 1 and has the odd ones.
fn tables() -> Tables {
    let mut tables = Tables::new(UNDERLAY, [LINK, LINK]);
    tables.set_directory(&common::directory(1, 1..=2));
    for backend in 1..=2u16 {
        let next_hop = NextHop { egress: backend as u8 - 1, mac: common::mac(backend) };
        tables.set_next_hop(common::address(backend), Some(next_hop));
    }
    let mut piece = common::snapshot(&common::service(), 5, &[1]);
    for entry in piece.entries.iter_mut().skip(1).step_by(2) {
        *entry = common::entry(entry.bucket, 5, &[2]);
    }
    tables.apply(&common::service(), &piece).unwrap();
    tables
}

fn thread() -> (AfXdp, Vec<Kernel>) {
    let (ports, kernels) = (0..PORTS as u16).map(Kernel::pair).unzip();
    let at = (0..PORTS).map(|port| At { interface: (port % INTERFACES) as u8, queue: 0 }).collect();
    let umem = Umem::new(PORTS).unwrap();
    let mut io = AfXdp { ports, at, interfaces: INTERFACES, busy_poll: None, turns: 0, umem };
    for port in &mut io.ports {
        port.refill(&mut io.umem);
    }
    (io, kernels)
}

/// What happens next.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// So many frames come, of flows from this one on.
    Receive(usize, u16, u16),
    /// The thread serves a socket.
    Serve(usize),
    /// The device takes so many frames.
    Send(usize, u16),
    /// The device has sent so many.
    Complete(usize, u16),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    // Bursts are large beside the rings, so that these fill and wrap.
    let many = 0..1500u16;
    let event = prop_oneof![
        (0..PORTS, any::<u16>(), many.clone()).prop_map(|(port, flow, n)| Event::Receive(port, flow, n)),
        (0..PORTS).prop_map(Event::Serve),
        (0..PORTS).prop_map(Event::Serve),
        (0..PORTS, many.clone()).prop_map(|(port, n)| Event::Send(port, n)),
        (0..PORTS, many).prop_map(|(port, n)| Event::Complete(port, n)),
    ];
    prop::collection::vec(event, 1..200)
}

/// Checks a frame that leaves by a port: it goes to the backend behind that interface.
fn check(port: usize, frame: &[u8]) {
    let outer = common::decapsulate(frame);
    assert_eq!(outer.destination, common::address((port % INTERFACES) as u16 + 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Whatever comes in which order, and however slow a device is: no frame is lost, or is in two places.
    #[test]
    fn every_frame_is_accounted_for(events in events()) {
        let (mut io, mut kernels) = thread();
        let tables = tables();
        let mut worker = common::worker(&tables);
        let (mut came, mut left) = (0, 0);
        for event in events {
            match event {
                Event::Receive(port, flow, n) => {
                    let frames = (0..n).map(|i| common::tcp(flow.wrapping_add(i), VIP, 80, b"x"));
                    came += frames.filter(|frame| kernels[port].receive(&io, frame)).count();
                }
                Event::Serve(port) => while io.serve(port, &mut worker).unwrap() == BURST {},
                Event::Send(port, n) => {
                    for _ in 0..n {
                        let Some(frame) = kernels[port].send(&io) else { break };
                        check(port, &frame);
                        left += 1;
                    }
                }
                Event::Complete(port, n) => {
                    let _done = (0..n).take_while(|_| kernels[port].complete()).count();
                }
            }
            let [all, free, fill, send] = io.umem.totals();
            prop_assert_eq!(all, free + fill + send);
        }
        prop_assert!(io.umem.are_all_there());
        // The end: all that has come is served, and all that is sent is done with.
        loop {
            let served = io.serve_all(&mut worker).unwrap();
            let mut moved = 0;
            for (port, kernel) in kernels.iter_mut().enumerate() {
                while let Some(frame) = kernel.send(&io) {
                    check(port, &frame);
                    left += 1;
                    moved += 1;
                }
                while kernel.complete() {
                    moved += 1;
                }
            }
            if served + moved == 0 {
                break;
            }
        }
        let counters = *worker.counters();
        prop_assert!(counters.is_conserved());
        prop_assert_eq!((counters.received, counters.sent), (came as u64, left));
        prop_assert_eq!(counters.sent + counters.dropped_for(DropReason::TxFull), counters.received);
        prop_assert!(io.umem.are_all_there());
        let all = PORTS as u32 * 2 * RING_LEN;
        prop_assert_eq!(io.umem.totals(), [all, all / 2, all / 2, 0]);
    }
}

#[test]
fn a_device_that_is_stuck_does_not_stop_the_others() {
    let (mut io, mut kernels) = thread();
    let tables = tables();
    let mut worker = common::worker(&tables);
    let mut flow = 0u16;
    // Interface 1 takes nothing; half of what comes in by interface 0 is to leave by it.
    while worker.counters().received < 5 * 2 * u64::from(RING_LEN) {
        for _ in 0..BURST {
            flow = flow.wrapping_add(1);
            assert!(kernels[0].receive(&io, &common::tcp(flow, VIP, 80, b"")), "no frame to receive into");
        }
        assert_eq!(io.serve(0, &mut worker).unwrap(), BURST);
        while kernels[0].send(&io).is_some() {
            assert!(kernels[0].complete());
        }
    }
    let counters = worker.counters();
    let full = counters.dropped_for(DropReason::TxFull);
    assert!(counters.is_conserved() && full > 2 * u64::from(RING_LEN), "{counters:?}");
    assert_eq!(io.umem.held(1), umem::Held { fill: RING_LEN, send: RING_LEN });
    // It takes them again, and goes on.
    let mut sent = 0;
    while kernels[1].send(&io).is_some() {
        assert!(kernels[1].complete());
        sent += 1;
    }
    assert_eq!(sent, RING_LEN);
    io.serve_all(&mut worker).unwrap();
    assert_eq!(io.umem.held(1), umem::Held { fill: RING_LEN, send: 0 });
    assert!(io.umem.are_all_there());
}

#[test]
fn a_kernel_that_hands_back_what_it_does_not_have_is_caught() {
    let tables = tables();
    let mut worker = common::worker(&tables);
    // Done with a frame that was not to be sent.
    let (mut io, mut kernels) = thread();
    kernels[0].device.push_back(0);
    assert!(kernels[0].complete());
    let error = io.serve(0, &mut worker).unwrap_err().to_string();
    assert!(error.contains("frame 0 is to move from Send(0) to Free, but is in Fill(0)"), "{error}");
    // A packet in another socket's frame.
    let (mut io, mut kernels) = thread();
    assert!(kernels[1].receive.push(libc::xdp_desc { addr: START, len: 60, options: 0 }));
    kernels[1].receive.submit();
    let error = io.serve(1, &mut worker).unwrap_err().to_string();
    assert!(error.contains("from Fill(1) to Burst, but is in Fill(0)"), "{error}");
    assert!(error.contains("16384 in all"), "{error}");
    // And a frame that was forgotten, at the end.
    let (mut io, _kernels) = thread();
    let _forgotten = io.umem.take(Place::Burst);
    assert!(!io.umem.are_all_there());
}
