//! The modules of a crate, by the `mod` lines of its files.

#![forbid(unsafe_code)]

use super::tokens::{Token, tokenize, without_tests};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// One module that has a file of its own.
#[derive(Debug)]
pub struct Module {
    /// Its file.
    pub file: PathBuf,
    /// The file's tokens, without tests.
    pub tokens: Vec<Token>,
    /// The modules declared in the file that have files, tests not included.
    pub children: Vec<String>,
}

/// A crate: its modules by path; the root's path is empty.
#[derive(Debug, Default)]
pub struct CrateTree {
    pub modules: BTreeMap<Vec<String>, Module>,
}

impl CrateTree {
    /// Reads a crate from its root file.
    pub fn read(root: &Path) -> Result<CrateTree> {
        let mut tree = CrateTree::default();
        let folder = root.parent().context("a root file has a folder")?;
        tree.add(Vec::new(), root.to_path_buf(), folder)?;
        Ok(tree)
    }

    fn add(&mut self, path: Vec<String>, file: PathBuf, folder: &Path) -> Result<()> {
        let source = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let tokens = without_tests(&tokenize(&source));
        let children = declared_modules(&tokens);
        for child in &children {
            let mut child_path = path.clone();
            child_path.push(child.clone());
            self.add(child_path, module_file(folder, child)?, &folder.join(child))?;
        }
        self.modules.insert(
            path,
            Module {
                file,
                tokens,
                children,
            },
        );
        Ok(())
    }
}

/// Names of `mod name;` lines.
pub fn declared_modules(tokens: &[Token]) -> Vec<String> {
    tokens
        .windows(3)
        .filter(|three| three[0].is("mod") && three[1].is_word() && three[2].is(";"))
        .map(|three| three[1].text.clone())
        .collect()
}

/// The file of the module `name` whose parent's children live in `folder`.
pub fn module_file(folder: &Path, name: &str) -> Result<PathBuf> {
    let candidates = [
        folder.join(format!("{name}.rs")),
        folder.join(name).join("mod.rs"),
    ];
    candidates
        .into_iter()
        .find(|file| file.exists())
        .with_context(|| format!("module {name} has no file in {}", folder.display()))
}
