#![forbid(unsafe_code)]
//! A description in a TOML file. Mistakes are named with file, line and column.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::value::Console;
use super::{DiskSource, Draft};

/// Limit: a description is a screen long.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why a file is no description.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("cannot read {}: {error}", .path.display())]
    Read { path: PathBuf, error: io::Error },
    #[error("{} is longer than a description of a VM can be", .0.display())]
    TooLong(PathBuf),
    #[error("{}:{line}:{column}: {message}", .path.display())]
    Wrong {
        path: PathBuf,
        line: usize,
        column: usize,
        message: String,
    },
}

/// Reads a description. Paths in it are relative to the folder that it is in.
pub fn read_file(path: &Path) -> Result<Draft, FileError> {
    let read_error = |error| FileError::Read {
        path: path.to_owned(),
        error,
    };
    let mut text = String::new();
    // Of a device or a pipe nobody knows how long it is.
    let file = fs::File::open(path).map_err(read_error)?;
    let read = file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text);
    if read.map_err(read_error)? as u64 > MAX_FILE_BYTES {
        return Err(FileError::TooLong(path.to_owned()));
    }
    let mut draft = parse(path, &text)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    for file in [&mut draft.kernel, &mut draft.initrd].into_iter().flatten() {
        *file = folder.join(&*file);
    }
    for disk in &mut draft.disks {
        if let DiskSource::Path(file) = &mut disk.source {
            *file = folder.join(&*file);
        }
    }
    if let Some(Console::File(file)) = &mut draft.console {
        *file = folder.join(&*file);
    }
    Ok(draft)
}

fn parse(path: &Path, text: &str) -> Result<Draft, FileError> {
    toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        let (line, column) = line_and_column(text, at);
        FileError::Wrong {
            path: path.to_owned(),
            line,
            column,
            message: error.message().replace('\n', ", "),
        }
    })
}

/// Both from 1; the column counts characters.
fn line_and_column(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    (line, column)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{NetBackend, OnCrash, Restart, Size};

    fn mistake(text: &str) -> String {
        parse(Path::new("vm.toml"), text).expect_err(text).to_string()
    }

    #[test]
    fn a_file_says_what_flags_can_say() {
        let text = r#"
            name = "web"
            kernel = "vmlinuz"
            initrd = "/boot/initrd"
            cmdline = "quiet"
            memory = "1G"
            vcpus = 4
            console = "file=out.log"
            on-reset = "exit"
            on-crash = "exit"
            restart = "always"
            populate = "never"
            require-full-sandbox = true
            log = "info"
            [[disk]]
            path = "root.img"
            serial = "ROOT"
            [[disk]]
            memory = "64M"
            readonly = true
            [[net]]
            user = true
            [[net]]
            tap-fd = 7
            mac = "52:54:00:00:00:01"
        "#;
        let draft = parse(Path::new("vm.toml"), text).expect("right");
        assert_eq!(draft.memory, Some(Size(1 << 30)));
        assert_eq!(draft.on_crash, Some(OnCrash::Exit));
        assert_eq!(draft.restart, Some(Restart::Always));
        assert_eq!(draft.disks.len(), 2);
        let backends: Vec<_> = draft.nets.iter().map(|net| net.backend.clone()).collect();
        assert_eq!(backends, [NetBackend::User, NetBackend::TapFd(7)]);
    }

    #[test]
    fn mistakes_have_a_line_and_a_column() {
        for (text, at, part) in [
            (
                "kernel = \"a\"\nkernal = \"b\"\n",
                "vm.toml:2:1",
                "unknown field `kernal`",
            ),
            (
                "kernel = \"a\"\n[[disk]]\npath = \"b\"\nreadnoly = true\n",
                "vm.toml:4:1",
                "unknown field `readnoly`",
            ),
            ("vcpus = 65\n", "vm.toml:1:9", "65 virtual processors"),
            ("vcpus = \"two\"\n", "vm.toml:1:9", "invalid type"),
            ("\n\nmemory = \"512\"\n", "vm.toml:3:10", "no size"),
            (
                "[[net]]\nuser = true\nmac = \"x\"\n",
                "vm.toml:3:7",
                "no MAC address",
            ),
            ("[[disk]]\nreadonly = true\n", "vm.toml:1:1", "needs a path"),
            ("name = \"a\"\nname = \"b\"\n", "vm.toml:2:1", "duplicate key"),
            ("on-reset = \"x\"\n", "vm.toml:1:12", "reset or exit"),
            ("kernel = \n", "vm.toml:1:", ""),
            (
                "memory = 512\n",
                "vm.toml:1:10",
                "\"512\" is no size: say a number and K",
            ),
            (
                "[disk]\npath = \"a\"\n",
                "vm.toml:1:1",
                "[[disk]], [[net]], with two brackets",
            ),
            (
                "patience = -1\n",
                "vm.toml:1:12",
                "\"-1\" is no number of seconds",
            ),
            (
                "log = \"storvsp=debug\"\n",
                "vm.toml:1:7",
                "a module of device_block",
            ),
        ] {
            let said = mistake(text);
            assert!(said.starts_with(at) && said.contains(part), "{text:?}: {said}");
            assert!(!said.contains('\n'), "{said:?}");
        }
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("vm.toml");
        fs::write(&path, "kernel = \"k\"\ninitrd = \"/i\"\n[[disk]]\npath = \"d\"\n").expect("written");
        let draft = read_file(&path).expect("right");
        assert_eq!(draft.kernel, Some(folder.path().join("k")));
        assert_eq!(draft.initrd, Some("/i".into()));
        assert_eq!(draft.disks[0].source, DiskSource::Path(folder.path().join("d")));
    }

    #[test]
    fn what_has_no_end_is_no_description() {
        let error = read_file(Path::new("/dev/zero"))
            .expect_err("endless")
            .to_string();
        assert_eq!(error, "/dev/zero is longer than a description of a VM can be");
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = read_file(Path::new("/nonexistent/vm.toml")).expect_err("no file");
        assert!(
            error
                .to_string()
                .starts_with("cannot read /nonexistent/vm.toml: ")
        );
    }
}
