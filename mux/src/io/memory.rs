//! Frames in memory, for tests and measurements.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use super::{FRAME_START, IoError, PacketIo, Worker};
use crate::pipeline::{BURST, Slot, Verdict};

/// Frames to take in, and those that came out.
#[derive(Debug, Default)]
pub struct Memory {
    /// Frames still to be taken.
    pub input: VecDeque<Vec<u8>>,
    /// Frames that were sent, as they were sent.
    pub sent: Vec<Vec<u8>>,
    /// Every verdict, in the order of the input.
    pub verdicts: Vec<Verdict>,
}

impl Memory {
    /// These frames as input.
    pub fn new(input: impl IntoIterator<Item = Vec<u8>>) -> Memory {
        Memory { input: input.into_iter().collect(), ..Memory::default() }
    }

    /// Takes frames from `next`, a burst at most, through the worker, and shows each to `done` with its verdict.
    pub(super) fn burst<E>(
        worker: &mut Worker,
        next: impl FnMut() -> Option<Vec<u8>>,
        mut done: impl FnMut(&Slot<'_>) -> Result<(), E>,
    ) -> Result<usize, E> {
        let mut buffers: Vec<Vec<u8>> = std::iter::from_fn(next)
            .take(BURST)
            .map(|frame| {
                let mut buffer = vec![0; FRAME_START];
                buffer.extend_from_slice(&frame);
                buffer
            })
            .collect();
        let mut slots: Vec<Slot<'_>> = buffers
            .iter_mut()
            .map(|buffer| {
                let len = buffer.len() - FRAME_START;
                Slot::new(buffer, FRAME_START, len)
            })
            .collect();
        worker.decide(0, &mut slots);
        slots.iter().try_for_each(&mut done)?;
        worker.settle(&slots);
        Ok(slots.len())
    }
}

impl PacketIo for Memory {
    fn turn(&mut self, worker: &mut Worker, _wait: Duration) -> Result<usize, IoError> {
        let Memory { input, sent, verdicts } = self;
        let done = |slot: &Slot<'_>| {
            verdicts.push(slot.verdict);
            if let Verdict::Send { .. } = slot.verdict {
                sent.push(slot.frame().to_vec());
            }
            Ok::<_, Infallible>(())
        };
        let Ok(taken) = Memory::burst(worker, || input.pop_front(), done);
        Ok(taken)
    }

    fn close(mut self, worker: &mut Worker) -> Result<(), IoError> {
        while self.turn(worker, Duration::ZERO)? > 0 {}
        Ok(())
    }
}
