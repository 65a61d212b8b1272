//! The XDP program that passes everything, for the far ends of links.

use anyhow::{Context as _, Result};
use aya::programs::{Xdp, XdpMode};
use aya::{Ebpf, include_bytes_aligned};

use crate::netns::Namespace;

/// A native XDP program that passes everything, attached for as long as this lives.
///
/// The peer of a veth whose program transmits needs one (`tests/bpf/pass.c`).
pub struct PassProgram {
    _program: Ebpf,
}

impl PassProgram {
    /// Attaches it to `interface` in `namespace`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn attach(namespace: &Namespace, interface: &str) -> Result<PassProgram> {
        let mut object = Ebpf::load(include_bytes_aligned!(concat!(env!("OUT_DIR"), "/pass.o")))
            .context("cannot load the XDP program that passes everything")?;
        let program: &mut Xdp = object.program_mut("pass").context("pass.o lacks `pass`")?.try_into()?;
        program.load().context("the kernel refuses the XDP program that passes everything")?;
        namespace.run(|| {
            program
                .attach(interface, XdpMode::Driver)
                .with_context(|| format!("cannot attach an XDP program to {interface}"))?;
            Ok(())
        })?;
        Ok(PassProgram { _program: object })
    }
}
