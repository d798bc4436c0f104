//! Puts Debian's programs into a tree: busybox with its applets, others with the libraries that they are linked with.

#![forbid(unsafe_code)]

use super::archive::Tree;
use super::packages::{Sysroot, output_of};
use anyhow::Result;
use std::process::Command;

/// Puts busybox into a tree, with a link for each of its applets, and the links of a merged `/usr`.
pub fn install_busybox(tree: &mut Tree, sysroot: &Sysroot) -> Result<()> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        tree.directory(&format!("usr/{name}"));
        tree.symlink(name, &format!("usr/{name}"));
    }
    let busybox = sysroot.root.join("usr/bin/busybox");
    tree.file("usr/bin/busybox", 0o755, busybox.clone());
    for applet in output_of(Command::new(busybox).arg("--list-full"))?.lines() {
        let merged = if applet.starts_with("usr/") {
            applet.to_string()
        } else {
            format!("usr/{applet}")
        };
        if !tree.contains(&merged) {
            tree.symlink(&merged, "/usr/bin/busybox");
        }
    }
    Ok(())
}

/// Puts a program of the sysroot into a tree, with all the libraries that it is linked with.
pub fn install_program(tree: &mut Tree, sysroot: &Sysroot, program: &str) -> Result<()> {
    tree.file(program, 0o755, sysroot.root.join(program));
    for library in sysroot.libraries_of(program)? {
        tree.file(&library, 0o755, sysroot.root.join(&library));
    }
    Ok(())
}
