//! `daisyctl`: drives a daisy controller.

fn main() -> std::process::ExitCode {
    daisy_controller::ctl::main()
}
