//! `BPF_PROG_TEST_RUN`, for tests and measurements. aya's borrows the program, which tables own while they change.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use aya::programs::ProgramFd;

use super::syscall::bpf;

const BPF_PROG_TEST_RUN: libc::c_int = 10;

/// A program that can be run on frames, by any thread.
#[derive(Debug)]
pub struct Runner(ProgramFd);

/// What a program did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// What it returned: an XDP action.
    pub action: u32,
    /// The frame as it left it.
    pub frame: Vec<u8>,
    /// The mean duration of a round, in whole nanoseconds.
    pub duration: Duration,
}

/// The start of `struct xdp_md`.
#[repr(C)]
#[derive(Default)]
struct Context {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

/// The part of `union bpf_attr` that belongs to `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    zero: u32,
}

impl Runner {
    /// Of a loaded program.
    pub fn new(program: ProgramFd) -> Runner {
        Runner(program)
    }

    /// The program.
    pub fn fd(&self) -> &ProgramFd {
        &self.0
    }

    /// Runs the program on a frame that came in by the interface of this number (the kernel's), `repeat` times, each
    /// time on what the round before left.
    ///
    /// # Errors
    /// What the kernel says: a frame shorter than an Ethernet header is refused.
    pub fn run(&self, frame: &[u8], interface: u32, repeat: u32) -> io::Result<Run> {
        let mut out = vec![0; frame.len() + 256];
        let context =
            Context { data_end: frame.len() as u32, ingress_ifindex: interface, ..Context::default() };
        let mut attributes = Attributes {
            prog_fd: self.0.as_fd().as_raw_fd().cast_unsigned(),
            data_size_in: frame.len() as u32,
            data_in: frame.as_ptr() as u64,
            data_size_out: out.len() as u32,
            data_out: out.as_mut_ptr() as u64,
            repeat,
            ctx_size_in: size_of::<Context>() as u32,
            ctx_in: (&raw const context) as u64,
            ..Attributes::default()
        };
        // SAFETY: the kernel reads `data_size_in` bytes of `frame` and `ctx_size_in` of `context`, and writes at most
        // `data_size_out` bytes of `out`; all outlive the call.
        unsafe { bpf(BPF_PROG_TEST_RUN, &mut attributes) }?;
        out.truncate(attributes.data_size_out as usize);
        let duration = Duration::from_nanos(attributes.duration.into());
        Ok(Run { action: attributes.retval, frame: out, duration })
    }
}
