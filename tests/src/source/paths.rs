//! The paths that a file names: `use` trees, taken apart, and paths within code.

#![forbid(unsafe_code)]

use super::tokens::Token;

/// One leaf of a `use` tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    /// The path as written; the last segment is `*` for a glob.
    pub path: Vec<String>,
    /// The name it has in this file; `*` for a glob.
    pub name: String,
    /// Is it visible outside of the file (`pub`, `pub(crate)`, …)?
    pub is_reexport: bool,
}

/// All imports of a file, wherever they stand.
pub fn imports(tokens: &[Token]) -> Vec<Import> {
    let mut found = Vec::new();
    for (index, token) in tokens.iter().enumerate() {
        // `use<'a>` of a return type is no import.
        if token.is("use") && !tokens.get(index + 1).is_some_and(|next| next.is("<")) {
            let is_reexport = index > 0 && (tokens[index - 1].is("pub") || tokens[index - 1].is(")"));
            let end = tokens[index..]
                .iter()
                .position(|token| token.is(";"))
                .map_or(tokens.len(), |at| index + at);
            let mut at = index + 1;
            take_use_tree(&tokens[..end], &mut at, &[], is_reexport, &mut found);
        }
    }
    found
}

fn take_use_tree(
    tokens: &[Token],
    at: &mut usize,
    prefix: &[String],
    is_reexport: bool,
    found: &mut Vec<Import>,
) {
    let mut path = prefix.to_vec();
    while let Some(token) = tokens.get(*at) {
        *at += 1;
        match token.text.as_str() {
            ":" => {}
            "{" => {
                while tokens.get(*at).is_some_and(|token| !token.is("}")) {
                    take_use_tree(tokens, at, &path, is_reexport, found);
                    if tokens.get(*at).is_some_and(|token| token.is(",")) {
                        *at += 1;
                    }
                }
                *at += 1;
                return;
            }
            "as" => {
                let name = tokens
                    .get(*at)
                    .map(|token| token.text.clone())
                    .unwrap_or_default();
                *at += 1;
                found.push(Import {
                    path,
                    name,
                    is_reexport,
                });
                return;
            }
            "," | "}" => {
                *at -= 1;
                break;
            }
            // `use a::{self}` names `a` itself.
            "self" if !path.is_empty() => {}
            segment => path.push(segment.to_string()),
        }
    }
    if let Some(name) = path.last().cloned() {
        found.push(Import {
            path,
            name,
            is_reexport,
        });
    }
}

/// All paths of two or more segments that stand in code, `use` lines not included.
pub fn code_paths(tokens: &[Token]) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if tokens[at].is("use") {
            at += tokens[at..].iter().position(|token| token.is(";")).unwrap_or(1);
            continue;
        }
        if !tokens[at].is_word() {
            at += 1;
            continue;
        }
        let mut path = vec![tokens[at].text.clone()];
        at += 1;
        while tokens.len() > at + 2
            && tokens[at].is(":")
            && tokens[at + 1].is(":")
            && tokens[at + 2].is_word()
        {
            path.push(tokens[at + 2].text.clone());
            at += 3;
        }
        if path.len() > 1 {
            found.push(path);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::tokens::tokenize;
    use super::*;

    fn imported(source: &str) -> Vec<String> {
        imports(&tokenize(source))
            .into_iter()
            .map(|import| {
                format!(
                    "{}{} {}",
                    if import.is_reexport { "+" } else { "" },
                    import.path.join("::"),
                    import.name
                )
            })
            .collect()
    }

    #[test]
    fn a_use_tree_is_taken_apart_to_its_leaves() {
        assert_eq!(imported("use a::b;"), ["a::b b"]);
        assert_eq!(
            imported("use a::{self, b::{c, d as e}, f::*};"),
            ["a a", "a::b::c c", "a::b::d e", "a::f::* *"]
        );
        assert_eq!(
            imported("pub use a::b; pub(crate) use {c::d, e};"),
            ["+a::b b", "+c::d d", "+e e"]
        );
        assert_eq!(imported("fn f() -> impl Fn() + use<'_> {}"), [""; 0]);
    }

    #[test]
    fn paths_in_code_are_found_but_not_those_of_use_lines() {
        let paths = code_paths(&tokenize("use x::y; fn f(a: b::C) -> d { e::f::g(h); }"));
        assert_eq!(paths, [vec!["b", "C"], vec!["e", "f", "g"]]);
    }
}
