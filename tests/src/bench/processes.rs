//! What the kernel says of a monitor's processes.

#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;

/// A process and all that descend from it.
pub fn family(root: u32) -> Result<Vec<u32>> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        next += 1;
        for task in
            fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid} is gone"))?
        {
            let children = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
            found.extend(
                children
                    .split_whitespace()
                    .filter_map(|word| word.parse::<u32>().ok()),
            );
        }
    }
    Ok(found)
}

/// One look at a family.
#[derive(Debug)]
pub struct Reading {
    /// Proportional set size of all processes together, guest RAM left out.
    pub pss_mib: f64,
    /// Each process with what it holds, for people.
    pub processes: Vec<String>,
    /// Voluntary context switches of each process's threads, those that run a vCPU left out.
    wakeups: BTreeMap<u32, u64>,
}

impl Reading {
    /// Looks at the processes of a guest with this much memory.
    pub fn of(processes: &[u32], guest_mib: u64) -> Result<Reading> {
        let mut pss_kib = 0;
        let mut lines = Vec::new();
        let mut wakeups = BTreeMap::new();
        for &pid in processes {
            let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
            let kib = pss_without_guest_ram(&smaps, guest_mib);
            pss_kib += kib;
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            lines.push(format!("{} {kib} KiB", name.trim()));
            wakeups.insert(pid, voluntary_switches(pid)?);
        }
        Ok(Reading {
            pss_mib: pss_kib as f64 / 1024.0,
            processes: lines,
            wakeups,
        })
    }

    /// How often the process that woke most has done so since `before`.
    pub fn most_wakeups_since(&self, before: &Reading) -> f64 {
        self.wakeups
            .iter()
            .map(|(pid, count)| count.saturating_sub(before.wakeups.get(pid).copied().unwrap_or(0)))
            .max()
            .unwrap_or(0) as f64
    }
}

fn voluntary_switches(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = task?.path();
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        if name.starts_with("vcpu") || name.contains("/KVM") {
            continue;
        }
        let status = fs::read_to_string(path.join("status")).unwrap_or_default();
        sum += status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
            .and_then(|number| number.trim().parse::<u64>().ok())
            .unwrap_or(0);
    }
    Ok(sum)
}

/// KiB of Pss in a `/proc/PID/smaps`, without mappings of guest RAM: those of a memfd named for it, however overlays have
/// cut them up, and anonymous ones as large as the guest.
fn pss_without_guest_ram(smaps: &str, guest_mib: u64) -> u64 {
    let mut skip = false;
    let mut sum = 0;
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let size = u64::from_str_radix(end, 16)
                .unwrap_or(0)
                .saturating_sub(u64::from_str_radix(start, 16).unwrap_or(0));
            skip = line.contains("/memfd:guest-ram") || size >= guest_mib << 20;
        } else if first == "Pss:" && !skip {
            sum += line
                .split_whitespace()
                .nth(1)
                .and_then(|word| word.parse::<u64>().ok())
                .unwrap_or(0);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_left_out_of_the_sum() {
        let smaps = "7f0000000000-7f0010000000 rw-s 00000000 00:01 5 /memfd:guest-ram (deleted)\nPss: 90000 kB\n\
                     7f1000000000-7f1000001000 rw-s 00000000 00:01 6 /memfd:siefp (deleted)\nPss: 4 kB\n\
                     7f2000000000-7f2010000000 rw-p 00000000 00:00 0\nPss: 70000 kB\n\
                     55d0c0000000-55d0c0002000 r-xp 00000000 fe:00 9 /usr/bin/x\nPss: 8 kB\n";
        assert_eq!(pss_without_guest_ram(smaps, 256), 12);
    }
}
