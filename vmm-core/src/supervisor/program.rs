#![forbid(unsafe_code)]
//! The program of a device's servers: a file, whatever becomes of its name.
//!
//! An upgrade of a host puts another file under the name. Servers that are started because others died are of the file that
//! served so far, and so is a standby; the new one comes when a person says so, and there is a way back from it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fstat};

/// A program, by its name until it is held.
#[derive(Clone, Debug)]
pub struct Program {
    pub path: PathBuf,
    file: Option<Arc<OwnedFd>>,
}

impl Program {
    /// The file that has this name when it is held.
    pub fn named(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    /// One that another supervisor held.
    pub fn adopt(path: PathBuf, file: Option<OwnedFd>) -> Self {
        let file = file.map(Arc::new);
        Self { path, file }
    }

    /// The file that has this name now.
    ///
    /// # Errors
    /// A sentence for a person who has named it.
    pub fn open(path: &Path) -> Result<Self> {
        let mut program = Self::named(path.to_owned());
        program.hold()?;
        Ok(program)
    }

    /// From now on it is the file that has its name now. Does nothing to one that is held.
    pub fn hold(&mut self) -> Result<()> {
        if self.file.is_some() {
            return Ok(());
        }
        let shown = self.path.display();
        // Without the right to read it: to execute it is enough.
        let file = open(&self.path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(io::Error::from)
            .with_context(|| format!("cannot find the program {shown}"))?;
        let file = File::from(file);
        let metadata = file
            .metadata()
            .with_context(|| format!("cannot look at the program {shown}"))?;
        if !metadata.is_file() {
            bail!("{shown} is no program: it is not a regular file");
        }
        if metadata.permissions().mode() & 0o111 == 0 {
            bail!("the program {shown} is not executable: chmod +x it");
        }
        self.file = Some(Arc::new(file.into()));
        Ok(())
    }

    /// `None`: it is not held.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(|file| file.as_fd())
    }

    /// Whether both are the same file, as far as they are held, by the same name: a program may do what its name says.
    pub fn is(&self, other: &Program) -> bool {
        let is_same_file = match (self.identity(), other.identity()) {
            (Some(one), Some(other)) => one == other,
            _ => true,
        };
        is_same_file && self.path == other.path
    }

    /// Device and inode of what is held.
    fn identity(&self) -> Option<(u64, u64)> {
        let stat = fstat(self.file()?).ok()?;
        Some((stat.st_dev, stat.st_ino))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Puts another executable file under a name, as a package manager does.
    fn put(folder: &Path, name: &str, text: &str) -> PathBuf {
        let (path, new) = (folder.join(name), folder.join("new"));
        std::fs::write(&new, text).expect("a file can be written");
        std::fs::set_permissions(&new, PermissionsExt::from_mode(0o755)).expect("it is ours");
        std::fs::rename(&new, &path).expect("it can be renamed");
        path
    }

    #[test]
    fn a_program_is_the_file_that_it_was_when_another_has_its_name() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let path = put(folder.path(), "server", "old");
        let old = Program::open(&path).expect("it is executable");
        put(folder.path(), "server", "new");
        let new = Program::open(&path).expect("it is executable");
        assert!(!old.is(&new) && old.is(&old.clone()));
    }

    #[test]
    fn what_is_no_program_is_refused_with_what_to_do() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let path = put(folder.path(), "server", "text");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).expect("it is ours");
        for (path, part) in [
            (path.as_path(), "is not executable: chmod +x it"),
            (folder.path(), "is no program: it is not a regular file"),
            (&folder.path().join("none"), "cannot find the program"),
        ] {
            let error = Program::open(path).expect_err(part);
            assert!(format!("{error:#}").contains(part), "{error:#}");
        }
    }
}
