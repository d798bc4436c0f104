//! Trees of files, as cpio archives (newc) and as folders.
//!
//! The kernel unpacks newc as an initramfs, busybox reads and writes it, and archives may be concatenated: one format
//! serves for the initramfs of both machines and for the files that go in and out of a run.

#![forbid(unsafe_code)]

use super::spec::FileSource;
use anyhow::{Context, Result, bail, ensure};
use cpio::newc;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

const TYPE_MASK: u32 = 0o170000;
const TYPE_REGULAR: u32 = 0o100000;
const TYPE_DIRECTORY: u32 = 0o040000;
const TYPE_SYMLINK: u32 = 0o120000;
const TYPE_CHARACTER: u32 = 0o020000;

#[derive(Debug, Clone)]
enum Node {
    Directory,
    Symlink(String),
    File { mode: u32, source: FileSource },
    Character { major: u32, minor: u32 },
}

/// A tree of files to be written somewhere. Paths are relative, without a leading slash; parents appear by themselves.
#[derive(Debug, Clone, Default)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// An empty tree.
    pub fn new() -> Tree {
        Tree::default()
    }

    /// Adds an empty folder.
    pub fn directory(&mut self, path: &str) {
        self.parents_of(path);
        self.nodes.entry(path.to_string()).or_insert(Node::Directory);
    }

    /// Adds a file; one that is already there is replaced.
    pub fn file(&mut self, path: &str, mode: u32, source: impl Into<FileSource>) {
        self.parents_of(path);
        self.nodes.insert(
            path.to_string(),
            Node::File {
                mode,
                source: source.into(),
            },
        );
    }

    /// Adds a symbolic link; whatever is already there is replaced.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents_of(path);
        self.nodes
            .insert(path.to_string(), Node::Symlink(target.to_string()));
    }

    /// Adds a character device, mode 0600.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.parents_of(path);
        self.nodes
            .insert(path.to_string(), Node::Character { major, minor });
    }

    /// Is anything at this path?
    pub fn contains(&self, path: &str) -> bool {
        self.nodes.contains_key(path)
    }

    fn parents_of(&mut self, path: &str) {
        for (slash, _) in path.match_indices('/') {
            self.nodes
                .entry(path[..slash].to_string())
                .or_insert(Node::Directory);
        }
    }

    /// Writes the tree as a newc archive with its trailer, everything owned by root, padded to 512 bytes so that another
    /// archive may follow.
    pub fn write_cpio(&self, output: impl Write) -> Result<()> {
        let mut output = Counted {
            inner: output,
            bytes: 0,
        };
        for (index, (path, node)) in self.nodes.iter().enumerate() {
            let builder = newc::Builder::new(path).ino(u32::try_from(index)?.saturating_add(1));
            output = match node {
                Node::Directory => builder
                    .mode(TYPE_DIRECTORY | 0o755)
                    .nlink(2)
                    .write(output, 0)
                    .finish()?,
                Node::Symlink(target) => {
                    let mut entry = builder
                        .mode(TYPE_SYMLINK | 0o777)
                        .write(output, u32::try_from(target.len())?);
                    entry.write_all(target.as_bytes())?;
                    entry.finish()?
                }
                Node::File { mode, source } => {
                    let (length, mut reader) = source.open()?;
                    let length =
                        u32::try_from(length).context("a file of 4 GiB or more fits no newc archive")?;
                    let mut entry = builder.mode(TYPE_REGULAR | mode).write(output, length);
                    io::copy(&mut reader, &mut entry).with_context(|| format!("cannot archive {path}"))?;
                    entry.finish()?
                }
                Node::Character { major, minor } => builder
                    .mode(TYPE_CHARACTER | 0o600)
                    .rdev_major(*major)
                    .rdev_minor(*minor)
                    .write(output, 0)
                    .finish()?,
            };
        }
        let mut output = newc::trailer(output)?;
        let overhang = usize::try_from(output.bytes % 512)?;
        if overhang != 0 {
            output.write_all(&vec![0; 512 - overhang])?;
        }
        output.flush()?;
        Ok(())
    }

    /// The archive of [`Tree::write_cpio`] in memory.
    pub fn to_cpio(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.write_cpio(&mut bytes)?;
        Ok(bytes)
    }

    /// Writes the tree below an existing folder. Devices are left out: that would need rights.
    pub fn write_folder(&self, root: &Path) -> Result<()> {
        for (path, node) in &self.nodes {
            let target = root.join(path);
            match node {
                Node::Directory => fs::create_dir_all(&target).map_err(anyhow::Error::from),
                Node::Symlink(to) => symlink(to, &target).map_err(anyhow::Error::from),
                Node::File { mode, source } => source.open().and_then(|(_, mut reader)| {
                    io::copy(&mut reader, &mut File::create(&target)?)?;
                    Ok(fs::set_permissions(&target, fs::Permissions::from_mode(*mode))?)
                }),
                Node::Character { .. } => Ok(()),
            }
            .with_context(|| format!("cannot write {}", target.display()))?;
        }
        Ok(())
    }
}

/// The regular files of a newc archive, by path. An archive without its trailer is an error: it was cut off.
pub fn read_cpio(mut input: impl Read) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    loop {
        let mut reader = newc::Reader::new(input).context("the archive is cut off")?;
        if reader.entry().is_trailer() {
            return Ok(files);
        }
        let name = reader.entry().name().trim_start_matches("./").to_string();
        let length = u64::from(reader.entry().file_size());
        if reader.entry().mode() & TYPE_MASK == TYPE_REGULAR {
            ensure!(
                !name.split('/').any(|part| part == "..") && !name.starts_with('/'),
                "the archive names {name}"
            );
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes)?;
            if bytes.len() as u64 != length {
                bail!("the archive is cut off in {name}");
            }
            files.insert(name, bytes);
        }
        input = reader.finish().context("the archive is cut off")?;
    }
}

struct Counted<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buffer)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Tree {
        let mut tree = Tree::new();
        tree.file("a/b/one", 0o644, b"1".to_vec());
        tree.file("two", 0o755, b"22222".to_vec());
        tree.symlink("a/link", "b/one");
        tree.character_device("dev/console", 5, 1);
        tree
    }

    #[test]
    fn an_archive_read_back_holds_the_regular_files() {
        let files = read_cpio(&sample().to_cpio().unwrap()[..]).unwrap();
        let expected = [
            ("a/b/one".to_string(), b"1".to_vec()),
            ("two".to_string(), b"22222".to_vec()),
        ];
        assert_eq!(files, BTreeMap::from(expected));
    }

    #[test]
    fn an_archive_is_padded_so_that_another_may_follow() {
        assert_eq!(sample().to_cpio().unwrap().len() % 512, 0);
    }

    #[test]
    fn an_archive_cut_off_anywhere_is_refused() {
        let whole = sample().to_cpio().unwrap();
        let trailer = whole
            .windows(10)
            .position(|bytes| bytes == b"TRAILER!!!")
            .unwrap();
        for length in 0..trailer + 10 {
            assert!(
                read_cpio(&whole[..length]).is_err(),
                "{length} bytes were taken for a whole archive"
            );
        }
    }

    #[test]
    fn an_archive_that_points_out_of_its_folder_is_refused() {
        let mut tree = Tree::new();
        tree.file("../etc/passwd", 0o644, Vec::new());
        assert!(read_cpio(&tree.to_cpio().unwrap()[..]).is_err());
    }

    #[test]
    fn parents_appear_by_themselves_and_before_their_children() {
        let tree = sample();
        assert!(tree.contains("a") && tree.contains("a/b"));
    }
}
