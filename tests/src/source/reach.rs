//! Which modules of our crates a program can use.
//!
//! Starting at the program's root file, each module that an included file names is included; a module's ancestors come
//! with it. A re-export (`pub use`) is followed only for the names that somebody asks for, so a folder's `mod.rs` does
//! not drag in what the program leaves alone. Not exact, and on the side of more:
//!
//! - a module counts whole, even if the program calls one function of it;
//! - a module with an `impl` for a type that is defined elsewhere in its crate counts as soon as its parent does: such
//!   code is reached by method calls, which name no path.

#![forbid(unsafe_code)]

use super::paths::{code_paths, imports};
use super::tree::{CrateTree, Module};
use std::collections::{BTreeMap, BTreeSet};

/// A module: the crate's name and the path within it.
pub type ModuleId = (String, Vec<String>);

/// Limit: re-exports that point at each other end here.
const MAX_REEXPORT_DEPTH: usize = 8;

/// All modules that can be reached from the root of `program`. `crates` holds the program itself and our libraries, by
/// the names used in paths.
pub fn reachable(crates: &BTreeMap<String, CrateTree>, program: &str) -> BTreeSet<ModuleId> {
    let mut walk = Walk {
        crates,
        found: BTreeSet::new(),
        waiting: Vec::new(),
    };
    walk.include(&(program.to_string(), Vec::new()));
    while let Some(id) = walk.waiting.pop() {
        walk.follow(&id);
    }
    walk.found
}

struct Walk<'a> {
    crates: &'a BTreeMap<String, CrateTree>,
    found: BTreeSet<ModuleId>,
    waiting: Vec<ModuleId>,
}

impl Walk<'_> {
    fn module(&self, id: &ModuleId) -> Option<&Module> {
        self.crates.get(&id.0)?.modules.get(&id.1)
    }

    /// Includes a module and its ancestors.
    fn include(&mut self, id: &ModuleId) {
        for length in 0..=id.1.len() {
            let ancestor = (id.0.clone(), id.1[..length].to_vec());
            if self.module(&ancestor).is_some() && self.found.insert(ancestor.clone()) {
                self.waiting.push(ancestor);
            }
        }
    }

    fn follow(&mut self, id: &ModuleId) {
        let Some(module) = self.module(id) else { return };
        let (imports, paths) = (imports(&module.tokens), code_paths(&module.tokens));
        let extended: Vec<ModuleId> = module
            .children
            .iter()
            .map(|child| self.child(id, child))
            .filter(|child| self.module(child).is_some_and(extends_foreign_types))
            .collect();
        for child in extended {
            self.include(&child);
        }
        for import in imports.iter().filter(|import| !import.is_reexport) {
            self.resolve(id, &import.path, 0);
        }
        for path in paths {
            // `name::…` where `name` is an import of this file.
            let import = imports.iter().find(|import| import.name == path[0]);
            let full = import.map_or_else(|| path.clone(), |import| [&import.path[..], &path[1..]].concat());
            self.resolve(id, &full, 0);
        }
    }

    fn child(&self, id: &ModuleId, name: &str) -> ModuleId {
        (id.0.clone(), [&id.1[..], &[name.to_string()]].concat())
    }

    /// Includes what a path written in module `from` leads to; a path out of our crates leads nowhere.
    fn resolve(&mut self, from: &ModuleId, path: &[String], depth: usize) {
        let Some((first, mut rest)) = path.split_first() else {
            return;
        };
        let mut at = match first.as_str() {
            "crate" => (from.0.clone(), Vec::new()),
            "self" => from.clone(),
            "super" => (from.0.clone(), from.1[..from.1.len().saturating_sub(1)].to_vec()),
            name if self.module(&self.child(from, name)).is_some() => self.child(from, name),
            name if self.crates.contains_key(name) => (name.to_string(), Vec::new()),
            _ => return,
        };
        while let Some((segment, tail)) = rest.split_first() {
            let next = match segment.as_str() {
                "super" => (at.0.clone(), at.1[..at.1.len().saturating_sub(1)].to_vec()),
                name => self.child(&at, name),
            };
            if self.module(&next).is_none() {
                break;
            }
            (at, rest) = (next, tail);
        }
        self.include(&at);
        if let (Some(name), true) = (rest.first(), depth < MAX_REEXPORT_DEPTH) {
            self.follow_reexports(&at, name, &rest[1..], depth);
        }
    }

    fn follow_reexports(&mut self, at: &ModuleId, name: &str, rest: &[String], depth: usize) {
        let Some(module) = self.module(at) else { return };
        for import in imports(&module.tokens) {
            if import.name == name || name == "*" {
                self.resolve(at, &[&import.path[..], rest].concat(), depth + 1);
            } else if import.name == "*" && import.is_reexport {
                let stem = &import.path[..import.path.len() - 1];
                self.resolve(at, &[stem, &[name.to_string()], rest].concat(), depth + 1);
            }
        }
    }
}

/// Does the module have an `impl` for a type that it does not define itself?
fn extends_foreign_types(module: &Module) -> bool {
    let tokens = &module.tokens;
    let defined: BTreeSet<&str> = tokens
        .windows(2)
        .filter(|two| ["struct", "enum", "union", "trait", "type"].contains(&two[0].text.as_str()))
        .map(|two| two[1].text.as_str())
        .collect();
    let starts_item =
        |index: usize| index == 0 || [";", "}", "]", "unsafe"].contains(&tokens[index - 1].text.as_str());
    let blocks = tokens
        .iter()
        .enumerate()
        .filter(|(index, token)| token.is("impl") && starts_item(*index));
    blocks.into_iter().any(|(index, _)| {
        let header: Vec<&str> = tokens[index + 1..]
            .iter()
            .take_while(|token| !token.is("{"))
            .map(|token| token.text.as_str())
            .collect();
        !header.iter().any(|word| defined.contains(word))
    })
}

#[cfg(test)]
mod tests {
    use super::super::tokens::{tokenize, without_tests};
    use super::super::tree::declared_modules;
    use super::*;

    fn tree(files: &[(&str, &str)]) -> CrateTree {
        let mut tree = CrateTree::default();
        for (path, source) in files {
            let path: Vec<String> = path.split_terminator("::").map(str::to_string).collect();
            let tokens = without_tests(&tokenize(source));
            let children = declared_modules(&tokens);
            tree.modules.insert(
                path,
                Module {
                    file: Default::default(),
                    tokens,
                    children,
                },
            );
        }
        tree
    }

    fn reached(program: &str, library: &[(&str, &str)]) -> Vec<String> {
        let crates = BTreeMap::from([
            ("bin".to_string(), tree(&[("", program)])),
            ("lib".to_string(), tree(library)),
        ]);
        let found = reachable(&crates, "bin");
        found
            .into_iter()
            .filter(|(name, _)| name == "lib")
            .map(|(_, path)| path.join("::"))
            .collect()
    }

    const LIBRARY: &[(&str, &str)] = &[
        ("", "pub mod a; pub mod b; pub mod c;"),
        ("a", "mod x; mod y; pub use x::X; pub use y::Y;"),
        ("a::x", "pub struct X; impl X {}"),
        ("a::y", "use crate::b; pub struct Y; fn f() { b::g() }"),
        ("b", "pub fn g() {}"),
        ("c", "pub struct C; mod more;"),
        ("c::more", "impl super::C {}"),
    ];

    #[test]
    fn a_reexport_is_followed_only_for_the_names_asked_for() {
        assert_eq!(reached("use lib::a::X; fn main() {}", LIBRARY), ["", "a", "a::x"]);
        assert_eq!(
            reached("fn main() { lib::a::Y }", LIBRARY),
            ["", "a", "a::y", "b"]
        );
        assert_eq!(reached("use lib::a::*;", LIBRARY), ["", "a", "a::x", "a::y", "b"]);
    }

    #[test]
    fn a_module_that_extends_a_type_comes_with_its_parent() {
        assert_eq!(reached("use lib::c::C;", LIBRARY), ["", "c", "c::more"]);
    }

    #[test]
    fn an_imported_module_is_followed_through_its_local_name() {
        assert_eq!(
            reached("use lib::a as other; fn main() { other::X }", LIBRARY),
            ["", "a", "a::x"]
        );
    }

    #[test]
    fn what_nobody_names_is_not_reached() {
        assert_eq!(reached("fn main() {}", LIBRARY), [""; 0]);
    }
}
