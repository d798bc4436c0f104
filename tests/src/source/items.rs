//! The items of a file: functions, types, constants, `impl` blocks with what stands in them.

#![forbid(unsafe_code)]

use super::tokens::{Token, attribute, group_end, item_end};
use std::ops::Range;

/// What an item is, as far as it matters for the question whether a program has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A function whose body becomes code.
    Function,
    /// A type, trait, constant, macro or `const fn`, which other code has to name to make use of it.
    Named(String),
    /// `use …;` with the names that it brings.
    Use(Vec<String>),
    /// `mod name;`
    Module(String),
    /// The head and the closing brace of an `impl`; it goes with what it contains, or with the types it names.
    Impl,
    /// `name! { … }`: nobody knows what comes out of it.
    MacroCall,
    /// Attributes of the file, `const _`: they go with the file.
    Other,
}

/// One item, without those that stand in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// What it is.
    pub kind: Kind,
    /// Its tokens, attributes included; more than one range for what has a head and a closing brace.
    pub tokens: Vec<Range<usize>>,
    /// The `impl`, `trait` or inline `mod` that it stands in, as an index.
    pub parent: Option<usize>,
}

/// All items of a file; parents stand before what they contain.
pub fn items(tokens: &[Token]) -> Vec<Item> {
    let mut found = Vec::new();
    take_items(tokens, 0..tokens.len(), None, &mut found);
    found
}

fn take_items(tokens: &[Token], range: Range<usize>, parent: Option<usize>, found: &mut Vec<Item>) {
    let mut at = range.start;
    while at < range.end {
        if let Some(inner) = attribute(tokens, at).filter(|attribute| attribute.is_inner) {
            found.push(Item {
                kind: Kind::Other,
                tokens: std::iter::once(at..inner.end).collect(),
                parent,
            });
            at = inner.end;
            continue;
        }
        let end = end_of(tokens, at).clamp(at + 1, range.end);
        let (kind, body) = classify(tokens, at..end);
        let index = found.len();
        let own = match &body {
            Some(body) => vec![at..body.start, body.end..end],
            None => std::iter::once(at..end).collect(),
        };
        found.push(Item {
            kind,
            tokens: own,
            parent,
        });
        if let Some(body) = body {
            take_items(tokens, body, Some(index), found);
        }
        at = end;
    }
}

/// The first token behind attributes and visibility.
fn keyword_at(tokens: &[Token], mut at: usize) -> usize {
    while let Some(more) = attribute(tokens, at) {
        at = more.end;
    }
    let is = |at: usize, text: &str| tokens.get(at).is_some_and(|token| token.is(text));
    if is(at, "pub") {
        at += 1;
        if is(at, "(") {
            at = group_end(tokens, at);
        }
    }
    at
}

fn end_of(tokens: &[Token], at: usize) -> usize {
    let keyword = keyword_at(tokens, at);
    let Some(bang) =
        (keyword..keyword + 3).find(|index| tokens.get(*index).is_some_and(|token| token.is("!")))
    else {
        return item_end(tokens, at);
    };
    // `name! { … }`, `name!(…);`, `macro_rules! name { … }`; an `impl !Send` does not get here.
    let Some(open) = (bang..bang + 3).find(|index| {
        tokens
            .get(*index)
            .is_some_and(|token| token.is("{") || token.is("(") || token.is("["))
    }) else {
        return item_end(tokens, at);
    };
    let end = group_end(tokens, open);
    end + usize::from(tokens.get(end).is_some_and(|token| token.is(";")))
}

/// What an item is, and the inside of its braces if items stand in there.
fn classify(tokens: &[Token], range: Range<usize>) -> (Kind, Option<Range<usize>>) {
    let keyword = keyword_at(tokens, range.start);
    let word = |at: usize| tokens.get(at).map_or("", |token| token.text.as_str());
    let inside = || {
        let open = (keyword..range.end).find(|at| tokens[*at].is("{"))?;
        Some(open + 1..range.end - 1)
    };
    let function = (keyword..range.end.min(keyword + 5)).find(|at| tokens[*at].is("fn"));
    let first = match word(keyword) {
        "unsafe" => word(keyword + 1),
        first => first,
    };
    match first {
        "impl" => (Kind::Impl, inside()),
        "trait" => (Kind::Named(name_behind(tokens, keyword, "trait")), inside()),
        "mod" if word(keyword + 2) == ";" => (Kind::Module(word(keyword + 1).to_string()), None),
        "mod" => (Kind::Impl, inside()),
        "use" => {
            let imports = super::paths::imports(&tokens[range]);
            let names = imports
                .into_iter()
                .flat_map(|import| [Some(import.name), import.path.last().cloned()])
                .flatten();
            (Kind::Use(names.collect()), None)
        }
        _ if function.is_some_and(|at| tokens[keyword..at].iter().any(|token| token.is("const"))) => {
            (Kind::Named(name_behind(tokens, keyword, "fn")), None)
        }
        _ if function.is_some() => {
            // A function without a body is part of its trait.
            let has_body = tokens[range.clone()].last().is_some_and(|token| token.is("}"));
            let kind = if has_body { Kind::Function } else { Kind::Other };
            (kind, None)
        }
        "const" | "static" if word(keyword + 1) == "_" => (Kind::Other, None),
        "struct" | "enum" | "union" | "const" | "static" | "type" => {
            let name = word(keyword + 1);
            let name = if name == "mut" { word(keyword + 2) } else { name };
            (Kind::Named(name.to_string()), None)
        }
        "macro_rules" => (Kind::Named(word(keyword + 2).to_string()), None),
        _ if tokens[keyword..range.end].iter().any(|token| token.is("!")) => (Kind::MacroCall, None),
        _ => (Kind::Other, None),
    }
}

fn name_behind(tokens: &[Token], from: usize, keyword: &str) -> String {
    let at = tokens[from..]
        .iter()
        .position(|token| token.is(keyword))
        .map_or(from, |at| from + at + 1);
    tokens.get(at).map(|token| token.text.clone()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::tokens::tokenize;
    use super::*;

    fn kinds(source: &str) -> String {
        let tokens = tokenize(source);
        let shown = items(&tokens).into_iter().map(|item| {
            let parent = item.parent.map_or(String::new(), |parent| format!("@{parent}"));
            let kind = match item.kind {
                Kind::Function => "fn".to_string(),
                Kind::Named(name) => name,
                Kind::Use(names) => format!("use {}", names.join(",")),
                Kind::Module(name) => format!("mod {name}"),
                Kind::Impl => "impl".to_string(),
                Kind::MacroCall => "call".to_string(),
                Kind::Other => "other".to_string(),
            };
            format!("{kind}{parent}")
        });
        shown.collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn a_file_is_cut_at_its_items() {
        assert_eq!(
            kinds(
                "#![a] use b::{C, d as e}; mod f; pub(crate) struct G(u8); #[h] pub enum I { J { k: u8 } }"
            ),
            "other; use C,C,e,d; mod f; G; I"
        );
        assert_eq!(
            kinds(
                "const A: [u8; 2] = [1, 2]; const _: () = assert!(A[0] == 1); pub static mut B: u8 = 0; type C = D;"
            ),
            "A; other; B; C"
        );
        assert_eq!(
            kinds("table! { a: b, } macro_rules! c { () => { fn d() {} }; } e!(f); fn g() { fn h() {} }"),
            "call; c; call; fn"
        );
    }

    #[test]
    fn what_stands_in_an_impl_or_a_trait_is_its_child() {
        assert_eq!(
            kinds("impl<T> A for B<T> where T: C { type D = E; pub unsafe fn f() {} const fn g() {} }"),
            "impl; D@0; fn@0; g@0"
        );
        assert_eq!(
            kinds("pub trait A { fn b(); fn c() { 1 } } unsafe impl Send for A {}"),
            "A; other@0; fn@0; impl"
        );
    }
}
