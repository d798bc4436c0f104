//! Which logical units a controller has, and what it says for those that it does not have.
//!
//! Linux looks at logical unit 0 of 8 buses x 2 targets on each scan. All disks are on bus 0, target 0; the
//! other 15 targets answer that they have nothing.

use super::cdb::Command;
use super::disk::{self, Action, Disk};
use super::inquiry;
use super::sense::Sense;

/// Limit: logical units 0 to 254; Linux refuses 255 and more with a warning
/// (Linux 6.1 storvsc `STORVSC_MAX_LUNS_PER_TARGET` 255).
pub const MAX_LUN: u8 = 254;

/// Where a command goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// SCSI bus.
    pub path: u8,
    /// SCSI target.
    pub target: u8,
    /// Logical unit.
    pub lun: u8,
}

/// Who answers a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Routed {
    /// The unit with this index in [`Target::disks`] says what to do.
    Unit(usize, Action),
    /// The controller itself answers: done, or refused.
    Controller(Action),
    /// No such unit: SRB status "invalid LUN", at which Linux removes a unit that it knew.
    NoUnit,
}

/// The logical units of a controller.
#[derive(Clone, Debug, Default)]
pub struct Target {
    units: Vec<(u8, Disk)>,
}

/// Why a set of units is not possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Two disks want the same number.
    #[error("two disks have the logical unit number {0}")]
    DuplicateLun(u8),
    /// Guests do not look that far.
    #[error("logical unit number {0} is greater than {MAX_LUN}")]
    LunTooLarge(u8),
}

impl Target {
    /// A controller with these disks; index into `units` is what [`Routed::Unit`] gives back.
    pub fn new(units: Vec<(u8, Disk)>) -> Result<Self, UnitError> {
        let mut luns: Vec<u8> = units.iter().map(|(lun, _)| *lun).collect();
        luns.sort_unstable();
        if let Some(pair) = luns.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(UnitError::DuplicateLun(pair[0]));
        }
        match luns.last() {
            Some(lun) if *lun > MAX_LUN => Err(UnitError::LunTooLarge(*lun)),
            _ => Ok(Self { units }),
        }
    }

    /// The units in the order of [`Target::new`].
    pub fn disks(&self) -> impl Iterator<Item = (u8, &Disk)> {
        self.units.iter().map(|(lun, disk)| (*lun, disk))
    }

    /// The unit with index `unit` of [`Routed::Unit`].
    pub fn disk(&self, unit: usize) -> Option<&Disk> {
        self.units.get(unit).map(|(_, disk)| disk)
    }

    /// What to do for a command to `address`.
    pub fn on_command(&self, address: Address, command: &Command) -> Routed {
        if let Command::ReportLuns {
            select_report,
            allocation_bytes,
        } = *command
        {
            return Routed::Controller(self.report_luns(address, select_report, allocation_bytes));
        }
        match self.find(address) {
            Some((unit, disk)) => Routed::Unit(unit, disk.on_command(command)),
            None => match *command {
                Command::Inquiry { allocation_bytes, .. } => {
                    Routed::Controller(disk::data(inquiry::absent_unit(), allocation_bytes))
                }
                _ => Routed::NoUnit,
            },
        }
    }

    fn find(&self, address: Address) -> Option<(usize, &Disk)> {
        if (address.path, address.target) != (0, 0) {
            return None;
        }
        let unit = self.units.iter().position(|(lun, _)| *lun == address.lun)?;
        self.units.get(unit).map(|(_, disk)| (unit, disk))
    }

    /// SPC-4 6.33: LUN LIST LENGTH, then 8 bytes a unit, single-level peripheral addressing.
    fn report_luns(&self, address: Address, select_report: u8, allocation_bytes: u32) -> Action {
        let mut luns = match select_report {
            // 0: all but well known units; 2: all. There are no well known units.
            0x00 | 0x02 if (address.path, address.target) == (0, 0) => {
                self.units.iter().map(|(lun, _)| *lun).collect()
            }
            0x00..=0x02 => Vec::new(),
            _ => return Action::Check(Sense::INVALID_FIELD_IN_CDB),
        };
        luns.sort_unstable();
        // At most 255 units: the length cannot overflow.
        let mut bytes = ((luns.len() * 8) as u32).to_be_bytes().to_vec();
        bytes.extend_from_slice(&[0; 4]);
        for lun in luns {
            bytes.extend_from_slice(&[0, lun, 0, 0, 0, 0, 0, 0]);
        }
        disk::data(bytes, allocation_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::{Identity, Limits};
    use super::super::mode::ModeState;
    use super::*;

    fn disk() -> Disk {
        Disk {
            identity: Identity::new("s", [0; 16], 0),
            limits: Limits {
                physical_block_bytes: 512,
                max_transfer_blocks: 8,
                unmap: None,
            },
            block_count: 8,
            mode: ModeState {
                read_only: false,
                write_cache: true,
            },
        }
    }

    fn at(path: u8, target: u8, lun: u8) -> Address {
        Address { path, target, lun }
    }

    fn run(target: &Target, address: Address, cdb: &[u8]) -> Routed {
        target.on_command(address, &Command::parse(cdb))
    }

    const INQUIRY: [u8; 6] = [0x12, 0, 0, 0, 36, 0];
    const REPORT_LUNS: [u8; 12] = [0xA0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0];

    #[test]
    fn inquiry_of_an_absent_unit_gives_data_that_says_so() {
        let target = Target::new(vec![(0, disk())]).unwrap();
        for address in [at(0, 0, 1), at(0, 1, 0), at(7, 1, 0)] {
            let Routed::Controller(Action::Data(bytes)) = run(&target, address, &INQUIRY) else {
                panic!("no data for {address:?}")
            };
            assert_eq!((bytes.len(), bytes[0]), (36, 0x7F));
        }
        assert!(matches!(
            run(&target, at(0, 0, 0), &INQUIRY),
            Routed::Unit(0, Action::Data(_))
        ));
    }

    #[test]
    fn anything_else_to_an_absent_unit_says_no_unit() {
        let target = Target::new(vec![(0, disk())]).unwrap();
        for opcode in [0x00u8, 0x25, 0x28, 0x2A, 0x35, 0x1A, 0xFF] {
            assert_eq!(run(&target, at(0, 0, 5), &[opcode]), Routed::NoUnit);
        }
    }

    #[test]
    fn report_luns_answers_at_every_address() {
        let target = Target::new(vec![(3, disk()), (1, disk())]).unwrap();
        let expected = vec![
            0, 0, 0, 16, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0,
        ];
        for lun in [0, 1, 9] {
            assert_eq!(
                run(&target, at(0, 0, lun), &REPORT_LUNS),
                Routed::Controller(Action::Data(expected.clone()))
            );
        }
        assert_eq!(
            run(&target, at(4, 1, 0), &REPORT_LUNS),
            Routed::Controller(Action::Data(vec![0; 8]))
        );
    }

    #[test]
    fn units_need_numbers_of_their_own_that_guests_look_at() {
        let units = |luns: &[u8]| Target::new(luns.iter().map(|lun| (*lun, disk())).collect()).err();
        assert_eq!(units(&[0, 254, 7]), None);
        assert_eq!(units(&[2, 0, 2]), Some(UnitError::DuplicateLun(2)));
        assert_eq!(units(&[255]), Some(UnitError::LunTooLarge(255)));
    }
}
