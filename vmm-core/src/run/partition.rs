#![forbid(unsafe_code)]
//! The guest's side of the hypervisor interface, carried out: synthetic MSRs with their overlay pages, message slots,
//! event flags, and the interrupt of SINT 2.
//!
//! The cores in `hyperv/` decide; this is where their decisions meet memory and KVM. One `Partition` lives from
//! one power-on to the next; the pages and guest RAM live as long as the VM.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::ensure;
use vm_memory::{Bytes, GuestAddress};
use vmbus::mem::{Access, HostError, SharedMap, sealed_memfd};

use crate::hyperv::hypercall_page;
use crate::hyperv::msr::{Answer, Effect, GeneralProtection, Msrs};
use crate::hyperv::overlay::{Change, Overlays, Page};
use crate::hyperv::reference_tsc::ReferenceClock;
use crate::hyperv::synic::{MessageQueues, SlotMemory};
use crate::hyperv::{VMBUS_SINT, synic};
use crate::kvm::{GuestMapping, KvmError, Vm};

const PAGE_BYTES: usize = 4096;
/// Pages of the memfd that belongs to the partition as a whole.
const HYPERCALL_PAGE: u64 = 0;
const REFERENCE_TSC_PAGE: u64 = 1;

/// A memfd with pages of ours.
#[derive(Debug)]
struct PageFile {
    fd: OwnedFd,
    map: SharedMap,
}

impl PageFile {
    fn new(name: &str, pages: usize) -> Result<Self, HostError> {
        let fd = sealed_memfd(name, (pages * PAGE_BYTES) as u64)?;
        let map = SharedMap::map(fd.as_fd(), pages * PAGE_BYTES, Access::ReadWrite)?;
        Ok(Self { fd, map })
    }

    /// Gives the page new content; what is not given is zero.
    fn fill(&self, page: u64, content: &[u8]) {
        let mut bytes = [0; PAGE_BYTES];
        bytes[..content.len()].copy_from_slice(content);
        self.map
            .write(page * PAGE_BYTES as u64, &bytes)
            .expect(PAGES_EXIST);
    }
}

const PAGES_EXIST: &str = "page numbers are VP indexes, and there is a page for each VP";

/// Every page of ours that can show in guest memory.
#[derive(Debug)]
pub struct Pages {
    own: PageFile,
    simp: PageFile,
    /// Shared with every device server; made before the first one attaches, and never exchanged.
    siefp: PageFile,
}

impl Pages {
    pub fn new(vp_count: u16) -> Result<Self, HostError> {
        let vps = usize::from(vp_count);
        Ok(Self {
            own: PageFile::new("partition-pages", 2)?,
            simp: PageFile::new("simp-pages", vps)?,
            siefp: PageFile::new("siefp-pages", vps)?,
        })
    }

    /// The event-flag pages, for device servers.
    pub fn siefp_fd(&self) -> BorrowedFd<'_> {
        self.siefp.fd.as_fd()
    }

    fn locate(&self, page: Page) -> (&PageFile, u64) {
        match page {
            Page::Hypercall => (&self.own, HYPERCALL_PAGE),
            Page::ReferenceTsc => (&self.own, REFERENCE_TSC_PAGE),
            Page::Simp(vp) => (&self.simp, u64::from(vp)),
            Page::Siefp(vp) => (&self.siefp, u64::from(vp)),
        }
    }

    /// Sets an event flag of SINT 2; true if it was clear. TLFS 6.0b section 11.9: 2,048 flags in 256 bytes.
    fn set_event_flag(&self, vp: u16, flag: u32) -> bool {
        let area = u64::from(vp) * PAGE_BYTES as u64 + u64::from(VMBUS_SINT) * 256;
        let offset = area + u64::from(flag % 2048 / 32) * 4;
        let bit = 1 << (flag % 32);
        // Ordering: SeqCst pairs with the guest's test-and-clear: what was written before the flag is seen after it.
        self.siefp
            .map
            .fetch_or_u32(offset, bit, Ordering::SeqCst)
            .expect(PAGES_EXIST)
            & bit
            == 0
    }
}

impl SlotMemory for SharedMap {
    fn load(&self, offset: u64) -> u32 {
        // Ordering: SeqCst, because a load after `set_bits` must not be reordered before it (synic.rs).
        self.load_u32(offset, Ordering::SeqCst).expect(PAGES_EXIST)
    }
    fn set_bits(&self, offset: u64, bits: u32) {
        self.fetch_or_u32(offset, bits, Ordering::SeqCst)
            .expect(PAGES_EXIST);
    }
    fn write(&self, offset: u64, bytes: &[u8]) {
        SharedMap::write(self, offset, bytes).expect(PAGES_EXIST);
    }
    fn publish(&self, offset: u64, word: u32) {
        // Ordering: release pairs with the guest's read of the type before the rest of the slot.
        self.store_u32(offset, word, Ordering::Release)
            .expect(PAGES_EXIST);
    }
}

/// A crash that the guest's kernel reported.
#[derive(Debug)]
pub struct CrashReport {
    pub parameters: [u64; 5],
    pub text: Option<String>,
}

/// The partition between two resets.
#[derive(Debug)]
pub struct Partition {
    pub vm: Vm,
    vp_count: u16,
    memory: Arc<GuestMapping>,
    pages: Arc<Pages>,
    clock: ReferenceClock,
    msrs: Msrs,
    overlays: Overlays,
    queues: MessageQueues,
}

impl Partition {
    /// A partition in its power-on state: nothing shows over RAM.
    pub fn new(
        vm: Vm,
        vp_count: u16,
        memory: Arc<GuestMapping>,
        pages: Arc<Pages>,
        clock: ReferenceClock,
    ) -> Self {
        Self {
            vm,
            vp_count,
            msrs: Msrs::new(vp_count, memory.layout().clone(), clock),
            clock,
            memory,
            pages,
            overlays: Overlays::default(),
            queues: MessageQueues::new(vp_count),
        }
    }

    /// RDMSR. `tsc` reads the VP's TSC, for the one MSR that needs it.
    pub fn read_msr(&self, vp: u16, msr: u32, tsc: impl FnOnce() -> u64) -> Result<u64, GeneralProtection> {
        Ok(match self.msrs.read(vp, msr)? {
            Answer::Value(value) => value,
            Answer::ReferenceTime => self.clock.at(tsc()),
        })
    }

    /// WRMSR. Returns the crash that the write reported, if it did.
    pub fn write_msr(
        &mut self,
        vp: u16,
        msr: u32,
        value: u64,
    ) -> Result<Result<Option<CrashReport>, KvmError>, GeneralProtection> {
        let effects = self.msrs.write(vp, msr, value)?;
        Ok(effects
            .into_iter()
            .try_fold(None, |crash, effect| Ok(self.apply(effect)?.or(crash))))
    }

    /// Whether there is such a VP.
    pub fn check_vp(&self, vp: u16) -> anyhow::Result<()> {
        ensure!(
            vp < self.vp_count,
            "bulkhead-bus names VP {vp}, which is not there"
        );
        Ok(())
    }

    /// Queues a channel message for a VP and delivers it if its slot is free.
    pub fn post_to_guest(&mut self, vp: u16, payload: &[u8]) -> anyhow::Result<()> {
        self.check_vp(vp)?;
        self.queues.push(vp, payload)?;
        Ok(self.pump(vp, false)?)
    }

    /// Whether the guest must wait before it posts more.
    pub fn is_full(&self) -> bool {
        self.queues.waiting() >= synic::MAX_WAITING_MESSAGES
    }

    /// Looks at all queues again.
    pub fn pump_all(&mut self, by_timer: bool) -> Result<(), KvmError> {
        (0..self.vp_count).try_for_each(|vp| self.pump(vp, by_timer))
    }

    /// When to call [`Self::pump_all`] by timer, in milliseconds.
    pub fn retry_delay_ms(&self) -> Option<u64> {
        self.queues.retry_delay_ms()
    }

    /// Sets a channel's event flag on a VP and raises SINT 2 there.
    pub fn raise_event(&self, vp: u16, flag: u32) -> anyhow::Result<()> {
        self.check_vp(vp)?;
        self.pages.set_event_flag(vp, flag);
        Ok(self.raise(vp)?)
    }

    /// Takes every overlay away, so that RAM can be used for something else. No vCPU runs.
    pub fn remove_overlays(&mut self) -> std::io::Result<()> {
        let changes = self.overlays.clear();
        self.change(changes)
    }

    /// Everything that is known, as `path = value` pairs.
    pub fn inspect(&self) -> Vec<(String, String)> {
        let counters = self.queues.counters;
        let mut entries = vec![
            ("synic.waiting".to_owned(), self.queues.waiting().to_string()),
            ("synic.delivered".to_owned(), counters.delivered.to_string()),
            ("synic.dropped".to_owned(), counters.dropped.to_string()),
            ("synic.raised_again".to_owned(), counters.raised_again.to_string()),
            (
                "guest.os_id".to_owned(),
                format!("{:#x}", self.msrs.guest_os_id()),
            ),
        ];
        for vp in 0..self.vp_count {
            let vector = self
                .msrs
                .sint_vector(vp)
                .map_or("masked".to_owned(), |vector| format!("{vector:#x}"));
            entries.push((format!("synic.vp.{vp}.vector"), vector));
        }
        for (gpn, page) in self.overlays.iter() {
            entries.push((format!("overlay.{page:?}"), format!("{:#x}", gpn << 12)));
        }
        entries
    }

    fn apply(&mut self, effect: Effect) -> Result<Option<CrashReport>, KvmError> {
        match effect {
            Effect::Place { page, gpn } => self.place(page, gpn)?,
            Effect::SintChanged { vp } => {
                let vectors: Vec<_> = (0..self.vp_count).map(|vp| self.msrs.sint_vector(vp)).collect();
                self.vm.set_routes(&vectors)?;
                // What was signalled while there was no route was lost: let the guest look once.
                self.raise(vp)?;
                self.pump(vp, false)?;
            }
            Effect::EndOfMessage => self.pump_all(false)?,
            Effect::Crash { parameters, text } => {
                let text = text.and_then(|(gpa, bytes)| self.read_text(gpa.0, bytes));
                return Ok(Some(CrashReport { parameters, text }));
            }
        }
        Ok(None)
    }

    fn place(&mut self, page: Page, gpn: Option<u64>) -> Result<(), KvmError> {
        let (file, number) = self.pages.locate(page);
        match page {
            Page::Hypercall => file.fill(number, &hypercall_page::page()),
            Page::ReferenceTsc => file.fill(number, &self.clock.page()),
            // No stale message, no stale flag, whatever an earlier guest left.
            Page::Simp(_) | Page::Siefp(_) => file.fill(number, &[]),
        }
        if let Page::Simp(vp) = page {
            self.queues.drop_waiting(vp);
        }
        let changes = self.overlays.place(page, gpn);
        self.change(changes)
            .map_err(|error| KvmError::host("change the guest's memory", error))
    }

    fn change(&self, changes: Vec<Change>) -> std::io::Result<()> {
        for change in changes {
            match change {
                Change::Show { gpn, page } => {
                    let (file, number) = self.pages.locate(page);
                    self.memory.show(gpn, file.fd.as_fd(), number)?;
                }
                Change::Restore { gpn } => self.memory.restore(gpn)?,
            }
        }
        Ok(())
    }

    fn pump(&mut self, vp: u16, by_timer: bool) -> Result<(), KvmError> {
        let takes = self.msrs.takes_messages(vp);
        if self.queues.pump(vp, takes, by_timer, &self.pages.simp.map).raise {
            self.raise(vp)
        } else {
            Ok(())
        }
    }

    /// Raises SINT 2 on a VP, unless it is masked there.
    fn raise(&self, vp: u16) -> Result<(), KvmError> {
        match self.msrs.sint_vector(vp) {
            Some(vector) => self.vm.raise(vp, vector),
            None => Ok(()),
        }
    }

    /// The guest's last words: text from one page, or the part of it that is RAM; without control characters that
    /// could steer the operator's terminal.
    fn read_text(&self, gpa: u64, bytes: usize) -> Option<String> {
        let mut copy = vec![0; bytes.min(PAGE_BYTES)];
        let read = self.memory.memory().read(&mut copy, GuestAddress(gpa)).ok()?;
        copy.truncate(read);
        let text = String::from_utf8_lossy(&copy);
        Some(
            text.chars()
                .filter(|c| !c.is_control() || matches!(c, '\n' | '\t'))
                .collect(),
        )
    }
}
