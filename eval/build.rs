//! Compiles the packet generator and its sink.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=bpf/traffic.c");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("traffic.o");
    // The kernel's headers lie in a folder of the host's architecture, which clang does not search for bpf.
    let arch = std::env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    for clang in ["clang-14", "clang"] {
        let mut command = Command::new(clang);
        command
            .args(["-g", "-O2", "-Wall", "-Werror", "-target", "bpf", "-c", "bpf/traffic.c", "-o"])
            .arg(&out)
            .arg("-idirafter")
            .arg(format!("/usr/include/{arch}-linux-gnu"));
        match command.status() {
            Ok(status) if status.success() => return,
            Ok(status) => fail(&format!("{clang} could not compile eval/bpf/traffic.c: {status}")),
            Err(_) => continue,
        }
    }
    fail("there is no clang to compile eBPF with: apt-get install clang-14");
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    std::process::exit(1);
}
