#![forbid(unsafe_code)]
//! Power-on: guest memory filled, a new VM, vCPUs at the kernel's entry. At the first start and at each reset alike.

use std::fs::File;
use std::sync::Arc;

use vmbus::ipc::{KernelFormat, Populate};

use super::partition::{Pages, Partition};
use super::populate;
use crate::hyperv::reference_tsc::ReferenceClock;
use crate::kvm::{Event, GuestMapping, Kvm, Vcpu, Vm};
use crate::pc::acpi::POWER_BUTTON_GSI;
use crate::pc::boot::{self, Boot};
use crate::pc::serial::COM1_GSI;

/// What does not change from one power-on to the next.
pub struct Hardware {
    pub kvm: Kvm,
    pub memory: Arc<GuestMapping>,
    pub pages: Arc<Pages>,
    pub vp_count: u16,
    pub kernel: File,
    pub kernel_format: KernelFormat,
    pub initrd: Option<File>,
    pub command_line: String,
    pub populate: Populate,
    /// Interrupt line of the serial port.
    pub serial_interrupt: Event,
    /// Interrupt line of the power button.
    pub button: Event,
}

/// A machine whose vCPUs only need to be run.
pub struct PoweredOn {
    pub partition: Partition,
    pub vcpus: Vec<Vcpu>,
    /// How guest RAM gets its pages.
    pub ram_pages: &'static str,
}

impl Hardware {
    /// Makes the machine anew. Guest RAM is zero: it has just been made, or wiped.
    pub fn power_on(&self) -> anyhow::Result<PoweredOn> {
        let ram_pages = populate::prepare(&self.memory, self.populate)?;
        let boot = Boot {
            kernel: &self.kernel,
            format: self.kernel_format,
            initrd: self.initrd.as_ref(),
            command_line: &self.command_line,
            vp_count: self.vp_count,
        };
        let entry = boot::load(&boot, self.memory.memory(), self.memory.layout())?;
        let vm = Vm::new(&self.kvm, self.memory.clone())?;
        vm.bind_pin(&self.serial_interrupt, COM1_GSI)?;
        vm.bind_pin(&self.button, POWER_BUTTON_GSI)?;
        let vcpus = vm.create_vcpus(&self.kvm, self.vp_count)?;
        let first = vcpus
            .first()
            .ok_or_else(|| anyhow::anyhow!("a VM has at least one vCPU"))?;
        first.enter_kernel(entry)?;
        let tsc_khz = first.tsc_khz()?;
        let clock = ReferenceClock::new(tsc_khz, first.tsc()?)
            .ok_or_else(|| anyhow::anyhow!("a TSC of {tsc_khz} kHz cannot be the guest's clock"))?;
        let (memory, pages) = (self.memory.clone(), self.pages.clone());
        let partition = Partition::new(vm, self.vp_count, memory, pages, clock);
        Ok(PoweredOn {
            partition,
            vcpus,
            ram_pages,
        })
    }
}
