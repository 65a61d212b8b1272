//! Compiles the eBPF programs with clang, against a header made from `daisy-shared`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use daisy_shared::chain::{MAX_HOPS, MAX_OWNERS};
use daisy_shared::drop::DropReason;
use daisy_shared::wire::{gue, outer, probe};

#[path = "src/datapath/layout.rs"]
#[allow(dead_code, reason = "the data path uses the rest")]
mod layout;

/// Headers that the programs of muxes and agents share.
const SHARED: &str = "../shared/bpf";
const COMPILERS: [&str; 2] = ["clang-14", "clang"];

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-changed={SHARED}");
    println!("cargo::rerun-if-changed=src/datapath/layout.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::write(out.join("daisy_constants.h"), constants()).expect("OUT_DIR is writable");
    compile(Path::new("bpf/agent.bpf.c"), &out.join("agent.bpf.o"), &out);
    compile(Path::new("bpf/bench.bpf.c"), &out.join("bench.bpf.o"), &out);
}

fn compile(source: &Path, object: &Path, include: &Path) {
    // The kernel's headers lie in a folder of the host's architecture, which clang does not search for bpf.
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    for compiler in COMPILERS {
        let run = Command::new(compiler)
            .args([
                "-g",
                "-O2",
                "-Wall",
                "-Werror",
                "-fno-strict-aliasing",
                "-target",
                "bpf",
                "-mcpu=v3",
                "-c",
            ])
            .arg(format!("-D__TARGET_ARCH_{arch}"))
            .arg(source)
            .arg("-o")
            .arg(object)
            .arg("-I")
            .arg(include)
            .args(["-I", SHARED, "-idirafter"])
            .arg(format!("/usr/include/{arch}-linux-gnu"))
            .status();
        match run {
            Ok(status) if status.success() => return,
            Ok(status) => panic!("{compiler} {}: {status}", source.display()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => panic!("{compiler}: {error}"),
        }
    }
    panic!("no clang to compile {}: apt-get install clang-14 libbpf-dev linux-libc-dev", source.display());
}

/// The header `daisy_constants.h`.
fn constants() -> String {
    let mut text = String::from("/* Made by build.rs from daisy-shared and layout.rs. */\n#pragma once\n");
    let mut define = |name: &str, value: u64| {
        writeln!(text, "#define {name} {value:#x}").expect("writing to a string cannot fail");
    };
    for (name, value) in [
        ("MAX_OWNERS", MAX_OWNERS),
        ("MAX_HOPS", usize::from(MAX_HOPS)),
        ("GUE_BASE_LEN", gue::BASE_LEN),
        ("GUE_WALK_BASE_LEN", gue::WALK_BASE_LEN),
        ("GUE_MAX_LEN", gue::MAX_LEN),
        ("GUE_WALK_VERSION", usize::from(gue::WALK_VERSION)),
        ("GUE_PROTO_IPV4", usize::from(gue::PROTO_IPV4)),
        ("GUE_VERSION_MASK", usize::from(gue::VERSION_MASK)),
        ("GUE_CONTROL_BIT", usize::from(gue::CONTROL_BIT)),
        ("GUE_HLEN_MASK", usize::from(gue::HLEN_MASK)),
        ("GUE_FLAG_RETURNED", usize::from(gue::FLAG_RETURNED)),
        ("OUTER_LEN", outer::LEN),
        ("SOURCE_PORT_BASE", usize::from(outer::SOURCE_PORT_BASE)),
        ("SOURCE_PORT_SHIFT", outer::SOURCE_PORT_SHIFT as usize),
        ("OUTER_TTL", usize::from(outer::TTL)),
        ("PROBE_LEN", probe::LEN),
        ("PROBE_CTYPE", usize::from(probe::CTYPE)),
        ("PROBE_REQUEST", usize::from(probe::REQUEST)),
        ("PROBE_REPLY", usize::from(probe::REPLY)),
        ("BRIEF_OWNERS", layout::BRIEF_OWNERS),
        ("BATCH_HEADER_LEN", layout::BATCH_HEADER_LEN),
        ("BATCH_ENTRY_LEN", layout::BATCH_ENTRY_LEN),
        ("BATCH_MAX", layout::BATCH_MAX),
        ("OP_INSTALL", usize::from(layout::OP_INSTALL)),
        ("OP_CLEAR", usize::from(layout::OP_CLEAR)),
        ("BENCH_FRAME_LEN", layout::BENCH_FRAME_LEN),
        ("BENCH_FRAMES", layout::BENCH_FRAMES),
        ("COUNTER_COUNT", layout::COUNTER_COUNT),
        ("FIRST_SEND", layout::SENDS.start),
        ("FIRST_DROP", layout::COUNTERS.len()),
    ] {
        define(name, value as u64);
    }
    for (name, value) in [
        ("LEN_SHIFT", layout::LEN_SHIFT),
        ("WRITES_SHIFT", layout::WRITES_SHIFT),
        ("LINK_IPIP", layout::LINK_IPIP),
        ("PEER_RESOLVED", layout::PEER_RESOLVED),
        ("PEER_DEAD", layout::PEER_DEAD),
        ("MAX_SERVICES", layout::MAX_SERVICES),
        ("MAX_PEERS", layout::MAX_PEERS),
        ("MAX_TRUSTED", layout::MAX_TRUSTED),
        ("WANTED_BYTES", layout::WANTED_BYTES),
    ] {
        define(name, u64::from(value));
    }
    define("FLAG_KNOWN", layout::FLAG_KNOWN);
    define("FLAG_HEAD_IS_ME", layout::FLAG_HEAD_IS_ME);
    define("FLAG_FROM_TABLE", layout::FLAG_FROM_TABLE);
    for (index, name) in layout::COUNTERS.iter().enumerate() {
        define(&name.to_uppercase(), index as u64);
    }
    for reason in DropReason::ALL {
        let name = format!("DROP_{}", reason.label().to_uppercase());
        define(&name, (layout::COUNTERS.len() + *reason as usize) as u64);
    }
    text
}
