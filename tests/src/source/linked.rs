//! Which lines of our own a built program has.
//!
//! A module that a program can reach ([`super::reach`]) may hold functions that nothing in the program calls; the linker
//! leaves these out. What it kept stands in the program's line table (DWARF `.debug_line`). The program that is looked
//! at is built without any optimization: nothing is inlined, merged or folded away, so each function that some call,
//! table or pointer of the program leads to has code and lines of its own. It can only be more than what is in the
//! released program. From that follows the rest:
//!
//! - a function counts, whole, if the program has code for any line of it;
//! - what is not a function (a type, trait, constant, macro, and `const fn`, whose code may run in the compiler only)
//!   counts, whole, if code that counts names it: the bare name will do, whatever it means there;
//! - an `impl` counts if anything in it does, or if it is empty and its types count; with it count its types and
//!   constants; a re-export counts if code that counts has one of its names;
//! - macro calls outside of functions count always;
//! - all other lines of a file in which anything counts do, too: `use`, `mod`, attributes, `const _`.

#![forbid(unsafe_code)]

use super::items::{Item, Kind, items};
use super::tokens::Token;
use anyhow::{Context, Result};
use gimli::{Dwarf, EndianSlice, LittleEndian, SectionId};
use object::{Object, ObjectSection, SectionKind};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The lines for which a program has code, by source file.
pub type CodeLines = BTreeMap<PathBuf, BTreeSet<usize>>;

/// Reads the line table of a program.
pub fn code_lines(program: &Path) -> Result<CodeLines> {
    let bytes = std::fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    let file = object::File::parse(&*bytes)?;
    let code: Vec<_> = file
        .sections()
        .filter(|section| section.kind() == SectionKind::Text)
        .map(|section| section.address()..section.address() + section.size())
        .collect();
    let load = |id: SectionId| -> Result<EndianSlice<'_, LittleEndian>> {
        let section = file.section_by_name(id.name());
        let data = section.map_or(Ok(&[][..]), |section| section.data())?;
        Ok(EndianSlice::new(data, LittleEndian))
    };
    let dwarf = Dwarf::load(load)?;
    let mut lines = CodeLines::new();
    let mut units = dwarf.units();
    while let Some(header) = units.next()? {
        let unit = dwarf.unit(header)?;
        let Some(table) = unit.line_program.clone() else {
            continue;
        };
        let mut rows = table.rows();
        while let Some((header, row)) = rows.next_row()? {
            // What the linker has thrown away is left at addresses without code.
            let is_code = code.iter().any(|range| range.contains(&row.address()));
            if let (true, false, Some(line), Some(file)) =
                (is_code, row.end_sequence(), row.line(), row.file(header))
            {
                let mut path = PathBuf::new();
                if let Some(folder) = unit.comp_dir {
                    path.push(folder.to_string_lossy().as_ref());
                }
                if let Some(folder) = file.directory(header) {
                    path.push(dwarf.attr_string(&unit, folder)?.to_string_lossy().as_ref());
                }
                path.push(
                    dwarf
                        .attr_string(&unit, file.path_name())?
                        .to_string_lossy()
                        .as_ref(),
                );
                lines.entry(path).or_default().insert(line.get() as usize);
            }
        }
    }
    Ok(lines)
}

/// A file that a program can reach.
#[derive(Debug)]
pub struct Source<'a> {
    pub path: &'a Path,
    pub tokens: &'a [Token],
}

struct Part<'a> {
    file: usize,
    item: Item,
    tokens: Vec<&'a Token>,
    counts: bool,
}

/// The lines of each file that count; see the module.
pub fn counted_lines(files: &[Source<'_>], code: &CodeLines) -> Vec<BTreeSet<usize>> {
    let mut parts = Vec::new();
    for (file, source) in files.iter().enumerate() {
        let (first, has_code) = (parts.len(), code.get(source.path));
        for mut item in items(source.tokens) {
            item.parent = item.parent.map(|parent| first + parent);
            let tokens: Vec<&Token> = item
                .tokens
                .iter()
                .flat_map(|range| &source.tokens[range.clone()])
                .collect();
            let lines = tokens.first().map_or(0, |token| token.line)
                ..=tokens.last().map_or(0, |token| token.last_line);
            let has_code = has_code.is_some_and(|code| code.range(lines).next().is_some());
            parts.push(Part {
                file,
                counts: item.kind == Kind::MacroCall || item.kind == Kind::Function && has_code,
                item,
                tokens,
            });
        }
    }
    while count_more(&mut parts, files.len()) {}
    let mut lines = vec![BTreeSet::new(); files.len()];
    for part in parts.iter().filter(|part| part.counts) {
        let of_part = part.tokens.iter().flat_map(|token| token.line..=token.last_line);
        lines[part.file].extend(of_part);
    }
    lines
}

/// Marks what is named, or contained, by what counts; false once that is nothing new.
fn count_more(parts: &mut [Part<'_>], files: usize) -> bool {
    let (mut words, mut parents, mut counting_files) = (BTreeSet::new(), BTreeSet::new(), vec![false; files]);
    for part in parts.iter().filter(|part| part.counts) {
        parents.extend(part.item.parent);
        counting_files[part.file] = true;
        if !is_reexport(part) {
            let named = part.tokens.iter().filter(|token| token.is_word());
            words.extend(named.map(|token| token.text.as_str()));
        }
    }
    let holders: BTreeSet<usize> = parts.iter().filter_map(|part| part.item.parent).collect();
    let more: Vec<usize> = (0..parts.len())
        .filter(|index| !parts[*index].counts)
        .filter(|index| {
            let part = &parts[*index];
            let mut types = part.tokens.iter().filter(|token| starts_upper(&token.text));
            let has_parent = part.item.parent.is_some();
            let goes_with = match part.item.parent {
                Some(parent) => parts[parent].counts,
                None => counting_files[part.file],
            };
            parents.contains(index)
                || match &part.item.kind {
                    Kind::Function | Kind::MacroCall => false,
                    Kind::Named(name) => words.contains(name.as_str()) || has_parent && goes_with,
                    Kind::Use(names) if is_reexport(part) => names
                        .iter()
                        .any(|name| name == "*" || words.contains(name.as_str())),
                    Kind::Impl => {
                        !holders.contains(index) && types.all(|token| words.contains(token.text.as_str()))
                    }
                    Kind::Module(name) => goes_with || words.contains(name.as_str()),
                    Kind::Use(_) | Kind::Other => goes_with,
                }
        })
        .collect();
    more.iter().for_each(|index| parts[*index].counts = true);
    !more.is_empty()
}

fn is_reexport(part: &Part<'_>) -> bool {
    matches!(part.item.kind, Kind::Use(_)) && part.tokens.iter().any(|token| token.is("pub"))
}

fn starts_upper(text: &str) -> bool {
    text.starts_with(|first: char| first.is_uppercase())
}

#[cfg(test)]
mod tests {
    use super::super::tokens::tokenize;
    use super::*;

    /// The counted lines of two files; `code` holds the lines with code of the first.
    fn counted(first: &str, code: &[usize], second: &str) -> [Vec<usize>; 2] {
        let tokens = [tokenize(first), tokenize(second)];
        let files = [("a.rs", &tokens[0]), ("b.rs", &tokens[1])].map(|(path, tokens)| Source {
            path: Path::new(path),
            tokens,
        });
        let code = CodeLines::from([("a.rs".into(), code.iter().copied().collect())]);
        let lines = counted_lines(&files, &code);
        [0, 1].map(|file| lines[file].iter().copied().collect())
    }

    #[test]
    fn a_function_counts_whole_if_any_line_of_it_has_code_and_not_otherwise() {
        let source = "fn linked() {\n    a();\n\n    b();\n}\nfn left_out() {\n    c();\n}\n";
        assert_eq!(counted(source, &[4], "")[0], [1, 2, 4, 5]);
        assert_eq!(counted(source, &[], "")[0], [0; 0]);
    }

    #[test]
    fn a_type_or_constant_counts_if_counted_code_names_it_also_from_afar() {
        let source = "use b::T;\nfn f(t: T) {}\nfn left_out(u: U) {}\n";
        let types = "pub struct T {\n    v: V,\n}\nstruct U;\ntype V = u8;\n#![x]\n";
        assert_eq!(counted(source, &[2], types), [vec![1, 2], vec![1, 2, 3, 5, 6]]);
    }

    #[test]
    fn a_const_function_counts_by_its_name_because_it_may_leave_no_code() {
        let source = "fn f() { g() }\nconst fn g() {}\nconst fn h() {}\n";
        assert_eq!(counted(source, &[1], "")[0], [1, 2]);
    }

    #[test]
    fn a_macro_call_counts_and_so_does_its_macro() {
        let source = "macro_rules! a { () => {} }\nmacro_rules! b { () => {} }\na! {\n    X\n}\n";
        assert_eq!(counted(source, &[], "")[0], [1, 3, 4, 5]);
    }

    #[test]
    fn an_impl_counts_with_what_it_contains_or_with_its_types() {
        let source = "struct A;\nimpl A {\n    const X: u8 = 1;\n    fn f() {}\n    fn g() {}\n}\nunsafe impl Send for A {}\nimpl B {\n    fn f() {}\n}\n";
        assert_eq!(counted(source, &[4], "")[0], [1, 2, 3, 4, 6]);
        let sends = source.replace("fn f() {}\n    fn g", "fn f(_: impl Send) {}\n    fn g");
        assert_eq!(counted(&sends, &[4], "")[0], [1, 2, 3, 4, 6, 7]);
    }

    #[test]
    fn a_reexport_counts_for_the_names_that_are_used() {
        let source = "use b::T;\nfn f(t: T) {}\n";
        assert_eq!(
            counted(source, &[2], "pub use c::T;\npub use c::U;\n"),
            [vec![1, 2], vec![1]]
        );
    }

    mod never_called {
        const FIRST: usize = line!() as usize;
        #[expect(dead_code, reason = "that is the point")]
        pub fn function(x: u64) -> u64 {
            std::hint::black_box(x) + 1
        }
        pub const LINES: std::ops::Range<usize> = FIRST + 1..line!() as usize;
    }

    #[test]
    fn the_line_table_of_this_very_program_tells_what_is_linked_and_what_is_not() {
        #[inline(always)]
        fn inlined(x: u64) -> u64 {
            std::hint::black_box(x) + 1
        }
        let linked = line!() as usize - 2;
        assert!(inlined(1) == 2);
        let program = std::env::current_exe().expect("a program knows its file");
        let code = code_lines(&program).expect("its line table can be read");
        let here = code
            .iter()
            .find(|(path, _)| path.ends_with("tests/src/source/linked.rs"))
            .map(|(_, lines)| lines.clone())
            .expect("this file has code");
        assert!(here.contains(&linked), "an inlined function has lines");
        assert!(
            here.range(never_called::LINES).next().is_none(),
            "one that nobody calls has none"
        );
    }
}
