//! Frames from a capture file, and what is sent into another. Ethernet only.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pcap_file::pcap::{PcapHeader, PcapPacket, PcapReader, PcapWriter};
use pcap_file::{DataLink, PcapError};

use super::memory::Memory;
use super::{IoError, PacketIo, Worker};
use crate::pipeline::{Slot, Verdict};

/// A capture file to read, and one to write.
pub struct Pcap {
    input: PcapReader<BufReader<File>>,
    input_path: PathBuf,
    output: PcapWriter<BufWriter<File>>,
    output_path: PathBuf,
}

fn failed(path: &Path, error: impl ToString) -> IoError {
    IoError::Unusable { place: path.display().to_string(), reason: error.to_string() }
}

impl Pcap {
    /// Opens `input`, and creates `output`.
    ///
    /// # Errors
    /// If a file cannot be opened, or if `input` is no capture of Ethernet frames.
    pub fn open(input: &Path, output: &Path) -> Result<Pcap, IoError> {
        let file = File::open(input).map_err(|error| failed(input, error))?;
        let reader = PcapReader::new(BufReader::new(file)).map_err(|error| failed(input, error))?;
        let link = reader.header().datalink;
        if link != DataLink::ETHERNET {
            return Err(failed(input, format!("holds frames of type {link:?}, not Ethernet")));
        }
        let file = File::create(output).map_err(|error| failed(output, error))?;
        let header = PcapHeader { datalink: DataLink::ETHERNET, ..reader.header() };
        let writer =
            PcapWriter::with_header(BufWriter::new(file), header).map_err(|error| failed(output, error))?;
        Ok(Pcap {
            input: reader,
            input_path: input.to_owned(),
            output: writer,
            output_path: output.to_owned(),
        })
    }
}

impl PacketIo for Pcap {
    fn turn(&mut self, worker: &mut Worker, _wait: Duration) -> Result<usize, IoError> {
        let mut damage = None;
        let mut times = Vec::new();
        let next = || match self.input.next_packet()? {
            Ok(packet) => {
                times.push(packet.timestamp);
                Some(packet.data.into_owned())
            }
            Err(error) => {
                damage = Some(error);
                None
            }
        };
        let mut packets = Vec::new();
        let taken = Memory::burst(worker, next, |slot: &Slot<'_>| {
            let sent = matches!(slot.verdict, Verdict::Send { .. });
            packets.push(sent.then(|| slot.frame().to_vec()));
            Ok::<_, PcapError>(())
        });
        for (time, packet) in times.into_iter().zip(packets) {
            let Some(data) = packet else { continue };
            let packet = PcapPacket::new_owned(time, data.len() as u32, data);
            self.output.write_packet(&packet).map_err(|error| failed(&self.output_path, error))?;
        }
        match damage {
            Some(error) => Err(failed(&self.input_path, error)),
            None => taken.map_err(|error| failed(&self.output_path, error)),
        }
    }

    fn close(mut self, worker: &mut Worker) -> Result<(), IoError> {
        while self.turn(worker, Duration::ZERO)? > 0 {}
        self.output.into_writer().flush().map_err(|error| failed(&self.output_path, error))
    }
}
