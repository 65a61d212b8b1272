//! Compiles the XDP program that passes everything.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=bpf/pass.c");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("pass.o");
    for clang in ["clang-14", "clang"] {
        let mut command = Command::new(clang);
        command.args(["-g", "-O2", "-Wall", "-Werror", "-target", "bpf", "-c", "bpf/pass.c", "-o"]).arg(&out);
        match command.status() {
            Ok(status) if status.success() => return,
            Ok(status) => fail(&format!("{clang} could not compile tests/bpf/pass.c: {status}")),
            Err(_) => continue,
        }
    }
    fail("there is no clang to compile eBPF with: apt-get install clang-14");
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    std::process::exit(1);
}
