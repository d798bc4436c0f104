#![forbid(unsafe_code)]
//! The VMBus control plane of one VM. Started by `bulkhead`, with the control socket as descriptor 3 and its jail as 4.

use std::process::ExitCode;

fn main() -> ExitCode {
    match sandbox::inherited() {
        Ok((control, jail)) => vmm_core::control_plane::main(control, jail),
        Err(error) => {
            eprintln!("bulkhead-bus is started by bulkhead, not by hand: {error}");
            ExitCode::FAILURE
        }
    }
}
