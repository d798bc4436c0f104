#![forbid(unsafe_code)]
//! Runs the processors of one VM. Started by `bulkhead`, with the control socket as descriptor 3.

use std::process::ExitCode;

fn main() -> ExitCode {
    match sandbox::inherited_control_fd() {
        Ok(control) => vmm_core::run::main(control),
        Err(error) => {
            eprintln!("bulkhead-vcpu is started by bulkhead, not by hand: {error}");
            ExitCode::FAILURE
        }
    }
}
