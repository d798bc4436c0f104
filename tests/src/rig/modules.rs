//! Which kernel modules a module needs, from Debian's `modules.dep`.

#![forbid(unsafe_code)]

use super::archive::Tree;
use super::packages::Kernel;
use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// The modules of one kernel and what each needs.
#[derive(Debug)]
pub struct ModuleTable {
    /// Path of a module (as in modules.dep) and the paths of those to load before it, in load order.
    needs: BTreeMap<String, Vec<String>>,
    by_name: BTreeMap<String, String>,
    builtin: BTreeSet<String>,
}

impl ModuleTable {
    pub fn read(kernel: &Kernel) -> Result<ModuleTable> {
        let read = |name: &str| {
            let path = kernel.modules.join(name);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        Ok(ModuleTable::parse(
            &read("modules.dep")?,
            &read("modules.builtin")?,
        ))
    }

    fn parse(dep: &str, builtin: &str) -> ModuleTable {
        let mut needs = BTreeMap::new();
        let mut by_name = BTreeMap::new();
        for line in dep.lines() {
            let Some((path, others)) = line.split_once(':') else {
                continue;
            };
            // modules.dep lists what a module needs from the nearest to the farthest.
            let others: Vec<String> = others.split_whitespace().rev().map(str::to_string).collect();
            by_name.insert(module_name(path), path.to_string());
            needs.insert(path.to_string(), others);
        }
        let builtin = builtin.lines().map(module_name).collect();
        ModuleTable {
            needs,
            by_name,
            builtin,
        }
    }

    /// The paths of `names` and of all that they need, in an order in which they can be loaded one by one. A name that
    /// is built into the kernel needs nothing.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<String>> {
        let mut order: Vec<String> = Vec::new();
        for name in names {
            let name = name.replace('-', "_");
            if self.builtin.contains(&name) {
                continue;
            }
            let path = self
                .by_name
                .get(&name)
                .with_context(|| format!("the kernel package has no module {name}"))?;
            for needed in self.needs.get(path).into_iter().flatten().chain([path]) {
                if !order.contains(needed) {
                    order.push(needed.clone());
                }
            }
        }
        Ok(order)
    }
}

/// Puts modules into a tree where `modprobe` finds them, with the lists it reads cut down to what is there.
pub fn install(tree: &mut Tree, kernel: &Kernel, paths: &[String]) -> Result<()> {
    let base = format!("usr/lib/modules/{}", kernel.release);
    for path in paths {
        tree.file(&format!("{base}/{path}"), 0o644, kernel.modules.join(path));
    }
    let there: BTreeSet<String> = paths.iter().map(|path| module_name(path)).collect();
    let dep = fs::read_to_string(kernel.modules.join("modules.dep"))?;
    let dep = keep_lines(&dep, |line| {
        line.split_once(':')
            .is_some_and(|(path, _)| there.contains(&module_name(path)))
    });
    tree.file(&format!("{base}/modules.dep"), 0o644, dep.into_bytes());
    let alias = fs::read_to_string(kernel.modules.join("modules.alias"))?;
    let alias = keep_lines(&alias, |line| {
        line.rsplit(' ').next().is_some_and(|name| there.contains(name))
    });
    tree.file(&format!("{base}/modules.alias"), 0o644, alias.into_bytes());
    tree.file(
        &format!("{base}/modules.builtin"),
        0o644,
        kernel.modules.join("modules.builtin"),
    );
    Ok(())
}

fn keep_lines(text: &str, keep: impl Fn(&str) -> bool) -> String {
    text.lines()
        .filter(|line| keep(line))
        .fold(String::new(), |kept, line| kept + line + "\n")
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.trim_end_matches(".ko").replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/c.ko: kernel/b.ko kernel/a-a.ko\nkernel/b.ko: kernel/a-a.ko\nkernel/a-a.ko:\n";

    #[test]
    fn what_a_module_needs_is_loaded_before_it() {
        let table = ModuleTable::parse(DEP, "kernel/built-in.ko\n");
        assert_eq!(
            table.closure(&["c", "b"]).unwrap(),
            ["kernel/a-a.ko", "kernel/b.ko", "kernel/c.ko"]
        );
    }

    #[test]
    fn a_builtin_module_needs_nothing_and_an_unknown_one_is_an_error() {
        let table = ModuleTable::parse(DEP, "kernel/built-in.ko\n");
        assert!(table.closure(&["built-in"]).unwrap().is_empty());
        assert!(table.closure(&["nonesuch"]).is_err());
    }
}
