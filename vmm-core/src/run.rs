#![forbid(unsafe_code)]
//! The program `bulkhead-vcpu`: runs the guest's processors, and knows no device.
//!
//! | thread | does | waits for |
//! | --- | --- | --- |
//! | `vcpu0`, `vcpu1`, … | KVM_RUN and the answers to its exits ([`processor`]) | the guest, one short lock |
//! | control (the first) | sockets, timers, console input, the life of the VM ([`control`]) | its epoll |
//! | `console` | writes what the guest printed | whoever reads it |
//!
//! Between them stands [`machine::Machine`] behind one lock. The pure cores ([`crate::hyperv`], [`crate::pc`]) decide;
//! the files here carry out, through [`crate::kvm`], sockets and eventfds. What channels there are, and who serves them,
//! is known to `bulkhead-bus` alone ([`crate::control_plane`]), which gets the guest's messages unread.
//!
//! The order at the start: `Start` with all descriptors; the sandbox, while there is one thread; guest RAM, which
//! `bulkhead-bus` is told of; kernel, VM and vCPUs; threads; `Ready`; `Run`. No path is opened, ever.
//!
//! What does not pass through here: a kick goes from the guest by KVM to the server, an interrupt from the server
//! by KVM to the guest, and data lies in memory that both map.

mod console;
mod control;
mod gate;
mod machine;
mod partition;
mod populate;
mod power;
mod processor;
mod signals;
mod slot_timer;
mod start;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use sandbox::Jail;
use vmbus::ipc::hello::PROTOCOL;
use vmbus::ipc::{ExitCause, Socket, VcpuToBus, VcpuToSupervisor};
use vmbus::mem::RamLayout;

use self::console::{Input, Writer};
use self::control::{Control, Parts, Source};
use self::gate::Gate;
use self::machine::Machine;
use self::partition::Pages;
use self::power::{Hardware, PoweredOn};
use self::processor::Shared;
use self::slot_timer::SlotTimer;
use self::start::Start;
use crate::child::{Link, init_logging};
use crate::kvm::{Event, GuestMapping, Kvm, install_kick_handler};
use crate::pc::serial::{Console, Output};

/// The program. `control` is the socket to the supervisor.
pub fn main(control: OwnedFd, jail: Jail) -> ExitCode {
    let mut socket = Socket::new(control);
    let control = match start::receive(&mut socket).and_then(|start| build(start, jail, &mut socket)) {
        Ok(control) => control,
        Err(error) => {
            let message = format!("{error:#}");
            // The supervisor says it to the person; if that is gone, too, the exit status does.
            socket.send(&VcpuToSupervisor::Failed { message }, &[]).ok();
            return ExitCode::FAILURE;
        }
    };
    match control.run() {
        ExitCause::Fault { message } => {
            tracing::error!("{message}");
            ExitCode::FAILURE
        }
        ExitCause::PowerOff | ExitCause::Reset | ExitCause::Quit | ExitCause::Console => ExitCode::SUCCESS,
    }
}

/// Locks the process in, makes the machine, and says ready.
fn build(start: Start, jail: Jail, socket: &mut Socket) -> anyhow::Result<Control> {
    let config = start.config;
    init_logging(&config.log)?;
    let report = jail.lock_in()?;
    install_kick_handler()?;

    let layout = RamLayout::for_size(config.memory_bytes);
    let memory = Arc::new(GuestMapping::new(layout.clone())?);
    let pages = Arc::new(Pages::new(config.vcpus)?);
    let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
    let mut bus = Link::new(start.bus, Source::Bus.token(), &epoll)?;
    let told = VcpuToBus::Machine {
        protocol: PROTOCOL,
        ram: layout,
        vp_count: config.vcpus,
    };
    bus.send(&told, &[memory.fd(), pages.siefp_fd()])?;
    let (serial_interrupt, button) = (Event::new()?, Event::new()?);
    let (attention, console_room) = (Event::new()?, Event::new()?);
    let output = Arc::new(Output::default());
    let console = Console::new(
        output.clone(),
        serial_interrupt.try_clone()?.into_inner(),
        console_room.try_clone()?.into_inner(),
    );
    let hardware = Hardware {
        kvm: Kvm::new(start.kvm)?,
        memory: memory.clone(),
        pages: pages.clone(),
        vp_count: config.vcpus,
        boot: config.boot,
        boot_files: start.boot_files,
        populate: config.populate,
        serial_interrupt,
        button,
    };
    let PoweredOn {
        partition,
        vcpus,
        ram_pages,
    } = hardware.power_on()?;

    let supervisor = socket.as_fd().try_clone_to_owned()?;
    let supervisor = Link::new(supervisor, Source::Supervisor.token(), &epoll)?;
    let slot_timer = SlotTimer::new()?;
    for (fd, source) in [
        (slot_timer.as_fd(), Source::Timer),
        (attention.as_fd(), Source::Attention),
        (console_room.as_fd(), Source::ConsoleRoom),
    ] {
        epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, source.token()))?;
    }
    let machine = Machine::new(
        partition,
        (supervisor, bus),
        slot_timer,
        memory,
        attention.try_clone()?,
    );
    let gate = Gate::new(attention.try_clone()?);
    let shared = Arc::new(Shared::new(machine, console, gate, attention, config.vcpus));
    let parts = Parts {
        input: Input::new(start.console_in, &epoll),
        writer: Writer::start(start.console_out, output)?,
        shared,
        epoll,
        hardware,
        console_room,
        on_reset: config.on_reset,
        ram_pages,
    };
    let control = Control::new(parts, vcpus)?;
    let report = serde_json::to_string(&report)?;
    socket.send(&VcpuToSupervisor::Ready { report }, &[])?;
    Ok(control)
}
