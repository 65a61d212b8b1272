//! Compiles the XDP programs with clang, against a header made from `daisy-shared`.

use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use daisy_shared::bucket::BackendId;
use daisy_shared::drop::DropReason;
use daisy_shared::service::{DEFAULT_BUCKETS, MAX_BUCKETS};
use daisy_shared::wire::{gue, outer};

#[path = "src/io/xdp/layout.rs"]
#[allow(dead_code, reason = "the control side uses the rest")]
mod layout;

/// Headers that the programs of muxes and agents share.
const SHARED: &str = "../shared/bpf";
const COMPILERS: [&str; 2] = ["clang-14", "clang"];

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-changed={SHARED}");
    println!("cargo::rerun-if-changed=src/io/xdp/layout.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::write(out.join("daisy_constants.h"), constants()).expect("OUT_DIR is writable");
    for name in ["filter", "mux", "bench"] {
        compile(Path::new(&format!("bpf/{name}.bpf.c")), &out.join(format!("{name}.bpf.o")), &out);
    }
}

fn compile(source: &Path, object: &Path, include: &Path) {
    // The kernel's headers lie in a folder of the host's architecture, which clang does not search for bpf.
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    for compiler in COMPILERS {
        let run = Command::new(compiler)
            .args(["-g", "-O2", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v3", "-c"])
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
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => panic!("{compiler}: {error}"),
        }
    }
    panic!("no clang to compile {}: apt-get install clang-14 libbpf-dev linux-libc-dev", source.display());
}

/// The header `daisy_constants.h`.
fn constants() -> String {
    let mut text = String::from("/* Made by build.rs from daisy-shared and layout.rs. */\n#pragma once\n");
    let mut define = |name: &str, value: usize| {
        writeln!(text, "#define {name} {value:#x}").expect("writing to a string cannot fail");
    };
    for (name, value) in [
        ("OUTER_LEN", outer::LEN),
        ("OUTER_SOURCE_PORTS", usize::from(outer::source_port(0))),
        ("GUE_BASE_LEN", gue::BASE_LEN),
        ("GUE_WALK_BASE_LEN", gue::WALK_BASE_LEN),
        ("GUE_WALK_VERSION", usize::from(gue::WALK_VERSION)),
        ("DEFAULT_BUCKETS", DEFAULT_BUCKETS as usize),
        ("MAX_BUCKETS", MAX_BUCKETS as usize),
        ("NEAR_BACKENDS", layout::NEAR_BACKENDS),
        ("NOBODY", usize::from(BackendId::NONE.0)),
        ("MAX_LINKS", layout::MAX_LINKS),
        ("MAX_TABLES", layout::MAX_TABLES as usize),
        ("CELLS", layout::CELLS),
        ("CELL_SHIFT", layout::CELL_SHIFT as usize),
        ("MAX_PROBES", layout::MAX_PROBES),
        ("HEADER_WORDS", layout::HEADER_WORDS),
        ("COUNTERS", layout::COUNTERS),
        ("REACH_UNKNOWN", usize::from(layout::REACH_UNKNOWN)),
        ("REACH_NO_NEXT_HOP", usize::from(layout::REACH_NO_NEXT_HOP)),
        ("REACH_RESOLVED", usize::from(layout::REACH_RESOLVED)),
    ] {
        define(name, value);
    }
    for (index, name) in layout::OUTCOMES.iter().enumerate() {
        define(&name.to_uppercase(), index);
    }
    for reason in DropReason::ALL {
        let name = format!("DROP_{}", reason.label().to_uppercase());
        define(&name, layout::OUTCOMES.len() + *reason as usize);
    }
    text
}
