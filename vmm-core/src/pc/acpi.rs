#![forbid(unsafe_code)]
//! The ACPI tables: RSDP, XSDT, FADT (hardware-reduced), MADT, DSDT.
//!
//! ```text
//!   \_SB.VMOD        ACPI0004, a module with an MMIO window for VMBus devices that want one
//!   \_SB.VMOD.VMBS   "VMBus": binds hv_vmbus. _CRS must exist, and may be empty
//!   \_SB.COM1        PNP0501, ports 0x3f8.., interrupt 4
//!   \_SB.MBRD        PNP0C02, the ports of ours that no driver may claim
//!   \_SB.PWRB, GED   the power button, by way of a generic event device on interrupt 5
//!   \_S5             how to switch off
//! ```
//!
//! The boot architecture flags say "no CMOS clock" and "no VGA": without the first, Linux polls ports 0x70/0x71
//! through its start. The string "VMBus" is no valid _HID by the book (compilers refuse it), and exactly what
//! Linux's and Windows' drivers look for.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Method, Name, Notify, ONE, Package,
    Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::memory_map::{ACPI_TABLES, ACPI_TABLES_END, IOAPIC, LOCAL_APIC};
use super::ports::{POWER_BUTTON_GSI, RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS, SLEEP_TYPE_OFF};
use super::serial::{COM1_BASE, COM1_GSI, COM1_PORTS};

const OEM_ID: [u8; 6] = *b"BULKHD";
const OEM_TABLE_ID: [u8; 8] = *b"BULKHEAD";
const OEM_REVISION: u32 = 1;

/// FADT IAPC_BOOT_ARCH (ACPI 6.5 section 5.2.9.3): no VGA (2), no CMOS clock (5).
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

/// Eight ports from here cover both ports of the hypercall page. The supervisor, whose tables these are, cannot reach
/// `hyperv/`; a test compares.
const HYPERCALL_PORTS: u16 = 0x520;

/// The window that VMBus devices with MMIO would use. No RAM, no APIC.
const MMIO_START: u32 = 0xF800_0000;
const MMIO_END: u32 = 0xFBFF_FFFF;

/// What goes into guest memory, and where the RSDP is.
pub struct Tables {
    /// To be copied to [`ACPI_TABLES`].
    pub bytes: Vec<u8>,
    /// Guest-physical address of the RSDP.
    pub rsdp: u64,
}

/// Builds the tables for `vp_count` processors, whose local APIC ids are their numbers.
pub fn tables(vp_count: u16) -> Tables {
    let mut image = Image { bytes: Vec::new() };
    let dsdt = image.append(&dsdt());
    let fadt = image.append(&fadt(dsdt));
    let madt = image.append(&madt(vp_count));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = image.append(&xsdt);
    let rsdp = image.append(&Rsdp::new(OEM_ID, xsdt));
    assert!(
        image.bytes.len() as u64 <= ACPI_TABLES_END - ACPI_TABLES,
        "the tables of MAX_VPS processors fit"
    );
    Tables {
        bytes: image.bytes,
        rsdp,
    }
}

struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Appends a table on a 16-byte boundary (the RSDP needs it) and returns its guest-physical address.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = ACPI_TABLES + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let register = |port: u16| GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Power and sleep buttons are no fixed features.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = register(RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(SLEEP_CONTROL);
    fadt.sleep_status_reg = register(SLEEP_STATUS);
    fadt.finalize()
}

fn madt(vp_count: u16) -> MADT {
    let apic = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, apic);
    for id in 0..vp_count as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    madt
}

fn dsdt() -> Dsdt {
    let mut sdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut aml = Vec::new();
    system_bus(&mut aml);
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &ZERO, &ZERO, &ZERO]);
    Name::new(Path::new("_S5_"), &off).to_aml_bytes(&mut aml);
    sdt.append_slice(&aml);
    sdt.update_checksum();
    Dsdt(sdt)
}

fn system_bus(aml: &mut Vec<u8>) {
    let vmbus_id = Name::new("_HID".into(), &"VMBus");
    let uid = Name::new("_UID".into(), &ZERO);
    let present = Name::new("_STA".into(), &0x0Fu8);
    let nothing = Name::new("_CRS".into(), &ResourceTemplate::new(vec![]));
    let vmbus = Device::new("VMBS".into(), vec![&vmbus_id, &uid, &present, &nothing]);

    let module_id = Name::new("_HID".into(), &"ACPI0004");
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        MMIO_START,
        MMIO_END,
        None,
    );
    let window = ResourceTemplate::new(vec![&window]);
    let window = Name::new("_CRS".into(), &window);
    let module = Device::new("VMOD".into(), vec![&module_id, &uid, &window, &vmbus]);

    let serial_id = EISAName::new("PNP0501");
    let serial_id = Name::new("_HID".into(), &serial_id);
    let serial_ports = IO::new(COM1_BASE, COM1_BASE, 1, COM1_PORTS);
    let serial_interrupt = Interrupt::new(true, true, false, false, COM1_GSI);
    let serial_resources = ResourceTemplate::new(vec![&serial_ports, &serial_interrupt]);
    let serial_resources = Name::new("_CRS".into(), &serial_resources);
    let serial = Device::new("COM1".into(), vec![&serial_id, &uid, &serial_resources]);

    let board_id = EISAName::new("PNP0C02");
    let board_id = Name::new("_HID".into(), &board_id);
    // Three are power control.
    let hypercall_ports = IO::new(HYPERCALL_PORTS, HYPERCALL_PORTS, 1, 8);
    let power_ports = IO::new(SLEEP_CONTROL, SLEEP_CONTROL, 1, 3);
    let board_resources = ResourceTemplate::new(vec![&hypercall_ports, &power_ports]);
    let board_resources = Name::new("_CRS".into(), &board_resources);
    let board = Device::new("MBRD".into(), vec![&board_id, &uid, &board_resources]);

    let button_id = EISAName::new("PNP0C0C");
    let button_id = Name::new("_HID".into(), &button_id);
    let button = Device::new("PWRB".into(), vec![&button_id, &uid]);

    let event_id = Name::new("_HID".into(), &"ACPI0013");
    let event_interrupt = Interrupt::new(true, true, false, false, POWER_BUTTON_GSI);
    let event_resources = ResourceTemplate::new(vec![&event_interrupt]);
    let event_resources = Name::new("_CRS".into(), &event_resources);
    // 0x80: the button was pressed (ACPI 6.5 table 5.168).
    let button_path = Path::new("\\_SB_.PWRB");
    let pressed = Notify::new(&button_path, &0x80u8);
    let event = Method::new("_EVT".into(), 1, true, vec![&pressed]);
    let events = Device::new("GED_".into(), vec![&event_id, &ONE_UID, &event_resources, &event]);

    Scope::new("\\_SB_".into(), vec![&module, &serial, &board, &button, &events]).to_aml_bytes(aml);
}

/// `_UID` 1, where another device of the same scope could be taken for the same one.
struct OneUid;
const ONE_UID: OneUid = OneUid;

impl Aml for OneUid {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Name::new("_UID".into(), &ONE).to_aml_bytes(sink);
    }
}

struct Dsdt(Sdt);

impl Aml for Dsdt {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(tables: &Tables, address: u64) -> &[u8] {
        &tables.bytes[(address - ACPI_TABLES) as usize..]
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
    }

    /// The table at an address, its length taken from its header, its checksum verified.
    fn table<'a>(tables: &'a Tables, address: u64, signature: &[u8; 4]) -> &'a [u8] {
        let bytes = at(tables, address);
        let bytes = &bytes[..u32_at(bytes, 4) as usize];
        assert_eq!(&bytes[..4], signature);
        assert_eq!(
            bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
            0,
            "checksum"
        );
        bytes
    }

    /// Walks from the RSDP as the guest does; returns FADT, MADT and DSDT.
    fn walk(tables: &Tables) -> (&[u8], &[u8], &[u8]) {
        assert_eq!(tables.rsdp % 16, 0);
        let rsdp = &at(tables, tables.rsdp)[..36];
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!(
            rsdp[..20].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        assert_eq!(rsdp.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let xsdt = table(tables, u64_at(rsdp, 24), b"XSDT");
        let fadt = table(tables, u64_at(xsdt, 36), b"FACP");
        let madt = table(tables, u64_at(xsdt, 44), b"APIC");
        let dsdt = table(tables, u64_at(fadt, 140), b"DSDT");
        (fadt, madt, dsdt)
    }

    #[test]
    fn the_fadt_is_hardware_reduced_and_names_the_power_ports() {
        let tables = tables(1);
        let (fadt, _, _) = walk(&tables);
        let flags = u32_at(fadt, 112);
        assert_ne!(flags & 1 << 20, 0, "HW_REDUCED_ACPI");
        assert_ne!(flags & 1 << 10, 0, "RESET_REG_SUP");
        assert_eq!(
            u16::from_le_bytes([fadt[109], fadt[110]]),
            0x24,
            "no VGA, no CMOS clock"
        );
        assert_eq!(
            (fadt[116], u64_at(fadt, 120), fadt[128]),
            (1, 0x602, 1),
            "reset register in I/O space"
        );
        assert_eq!((fadt[244], u64_at(fadt, 248)), (1, 0x600), "sleep control");
        assert_eq!((fadt[256], u64_at(fadt, 260)), (1, 0x601), "sleep status");
    }

    #[test]
    fn the_madt_lists_every_processor_once_and_the_io_apic() {
        let tables = tables(64);
        let (_, madt, _) = walk(&tables);
        assert_eq!(u32_at(madt, 36), 0xFEE0_0000);
        let mut entries = &madt[44..];
        let mut apic_ids = Vec::new();
        let mut io_apics = 0;
        while let [kind, length, rest @ ..] = entries {
            match kind {
                0 => apic_ids.push((rest[0], rest[1], u32_at(rest, 2))),
                1 => {
                    io_apics += 1;
                    assert_eq!(u32_at(rest, 2), 0xFEC0_0000);
                }
                other => panic!("entry type {other}"),
            }
            entries = &entries[usize::from(*length)..];
        }
        assert_eq!(apic_ids, (0..64).map(|id| (id, id, 1)).collect::<Vec<_>>());
        assert_eq!(io_apics, 1);
    }

    #[test]
    fn the_reserved_ports_are_those_of_the_hypercall_page() {
        use crate::hyperv::hypercall_page::{SIGNAL_PORT, SLOW_PORT};
        for port in [SIGNAL_PORT, SLOW_PORT] {
            assert!((HYPERCALL_PORTS..HYPERCALL_PORTS + 8).contains(&port));
        }
    }

    #[test]
    fn the_dsdt_has_the_vmbus_device_with_resources_and_the_reserved_ports() {
        let tables = tables(1);
        let (_, _, dsdt) = walk(&tables);
        let find = |needle: &[u8]| dsdt.windows(needle.len()).position(|window| window == needle);
        let module = find(b"ACPI0004\0").expect("module device");
        let vmbus = find(b"VMBus\0").expect("VMBus device");
        assert!(module < vmbus, "the VMBus device lies in the module");
        assert!(find(b"VMBS").is_some() && find(b"_S5_").is_some());
        // I/O descriptors: tag, decode 16 bits, minimum, maximum, alignment, length.
        assert!(
            find(&[0x47, 1, 0xF8, 0x03, 0xF8, 0x03, 1, 8]).is_some(),
            "serial port"
        );
        assert!(
            find(&[0x47, 1, 0x20, 0x05, 0x20, 0x05, 1, 8]).is_some(),
            "hypercall ports"
        );
        assert!(
            find(&[0x47, 1, 0x00, 0x06, 0x00, 0x06, 1, 3]).is_some(),
            "power ports"
        );
        // Extended interrupt: consumer, edge, active high; one interrupt: 4.
        assert!(
            find(&[0x89, 6, 0, 3, 1, 4, 0, 0, 0]).is_some(),
            "serial interrupt"
        );
    }
}
