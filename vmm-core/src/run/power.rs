#![forbid(unsafe_code)]
//! Power-on: guest memory filled, a new VM, vCPUs at the kernel's entry. At the first start and at each reset alike.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::sync::Arc;

use anyhow::Context;
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};
use vmbus::ipc::{BootPlan, Populate};

use super::partition::{Pages, Partition};
use super::populate;
use crate::hyperv::reference_tsc::ReferenceClock;
use crate::kvm::{Event, GuestMapping, Kvm, KvmError, Vcpu, Vm};
use crate::pc::ports::POWER_BUTTON_GSI;
use crate::pc::serial::COM1_GSI;

/// What does not change from one power-on to the next.
pub struct Hardware {
    pub kvm: Kvm,
    pub memory: Arc<GuestMapping>,
    pub pages: Arc<Pages>,
    pub vp_count: u16,
    pub boot: BootPlan,
    /// What the plan copies from.
    pub boot_files: Vec<File>,
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
        self.fill_memory()?;
        let vm = Vm::new(&self.kvm, self.memory.clone())?;
        vm.bind_pin(&self.serial_interrupt, COM1_GSI)?;
        vm.bind_pin(&self.button, POWER_BUTTON_GSI)?;
        let vcpus = vm.create_vcpus(&self.kvm, self.vp_count)?;
        let first = vcpus
            .first()
            .ok_or_else(|| anyhow::anyhow!("a VM has at least one vCPU"))?;
        first.enter_kernel(self.boot.rip, self.boot.rsi)?;
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

    /// Takes the interrupt lines from a VM that is over; the next one is to have them.
    pub fn power_off(&self, vm: &Vm) -> Result<(), KvmError> {
        vm.unbind_pin(&self.serial_interrupt, COM1_GSI)?;
        vm.unbind_pin(&self.button, POWER_BUTTON_GSI)
    }

    /// Carries out the boot plan. The files' offsets are ours alone: nobody else reads by them.
    fn fill_memory(&self) -> anyhow::Result<()> {
        let memory = self.memory.memory();
        for segment in &self.boot.segments {
            let (gpa, bytes) = (segment.gpa, segment.bytes);
            let file = self.boot_files.get(usize::from(segment.file));
            let mut file = file.context("the boot plan names a file that was not handed over")?;
            file.seek(SeekFrom::Start(segment.offset))?;
            memory
                .read_exact_volatile_from(GuestAddress(gpa), &mut file, bytes as usize)
                .with_context(|| format!("cannot copy {bytes} bytes of the boot plan to {gpa:#x}"))?;
        }
        // Version 4 UUIDs are the kernel's random bits, all but six of each 128.
        let seed = [(); BootPlan::SEED_BYTES / 16].map(|()| *Uuid::new_v4().as_bytes());
        memory.write_slice(seed.as_flattened(), GuestAddress(self.boot.seed_gpa))?;
        Ok(())
    }
}
