//! Compiles the XDP program with clang.

use std::env;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Command;

const SOURCE: &str = "bpf/filter.bpf.c";
const COMPILERS: [&str; 2] = ["clang-14", "clang"];

fn main() {
    println!("cargo::rerun-if-changed={SOURCE}");
    let object = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("filter.bpf.o");
    // The kernel's headers lie in a folder of the host's architecture, which clang does not search for bpf.
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    for compiler in COMPILERS {
        let run = Command::new(compiler)
            .args(["-g", "-O2", "-Wall", "-Werror", "-target", "bpf", "-c", SOURCE, "-o"])
            .arg(&object)
            .arg("-idirafter")
            .arg(format!("/usr/include/{arch}-linux-gnu"))
            .status();
        match run {
            Ok(status) if status.success() => return,
            Ok(status) => panic!("{compiler} {SOURCE}: {status}"),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => panic!("{compiler}: {error}"),
        }
    }
    panic!("no clang to compile {SOURCE}: apt-get install clang-14 libbpf-dev linux-libc-dev");
}
