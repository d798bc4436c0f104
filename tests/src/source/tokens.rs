//! Tokens of Rust source, without comments, with the contents of strings left out, and optionally without test code.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;

/// A word, a number, one character of punctuation, or a literal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The text; `"` for any string, `'` for any character, `'a` for a lifetime.
    pub text: String,
    /// Line, from 1, where the token begins.
    pub line: usize,
    /// Line where it ends; differs only for strings.
    pub last_line: usize,
}

impl Token {
    /// Is this the word or punctuation `text`?
    pub fn is(&self, text: &str) -> bool {
        self.text == text
    }

    /// Is this a word?
    pub fn is_word(&self) -> bool {
        self.text
            .starts_with(|first: char| first == '_' || first.is_alphabetic())
    }
}

/// All tokens of a file.
pub fn tokenize(source: &str) -> Vec<Token> {
    let characters: Vec<char> = source.chars().collect();
    let mut lexer = Lexer {
        characters: &characters,
        at: 0,
        line: 1,
    };
    let mut tokens = Vec::new();
    while let Some(token) = lexer.next_token() {
        tokens.push(token);
    }
    tokens
}

/// The tokens that are left when items for tests only are taken out: `#[cfg(test)]` and the like, `#[test]`, `loom`.
pub fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        match attribute(tokens, at) {
            Some(attribute) if attribute.is_for_tests && attribute.is_inner => return Vec::new(),
            Some(attribute) if attribute.is_for_tests => at = item_end(tokens, attribute.end),
            _ => {
                kept.push(tokens[at].clone());
                at += 1;
            }
        }
    }
    kept
}

/// How many lines hold at least one of these tokens.
pub fn line_count(tokens: &[Token]) -> usize {
    tokens
        .iter()
        .flat_map(|token| token.line..=token.last_line)
        .collect::<BTreeSet<_>>()
        .len()
}

pub(super) struct Attribute {
    pub(super) is_inner: bool,
    is_for_tests: bool,
    /// The index behind the closing bracket.
    pub(super) end: usize,
}

pub(super) fn attribute(tokens: &[Token], at: usize) -> Option<Attribute> {
    if !tokens.get(at)?.is("#") {
        return None;
    }
    let is_inner = tokens.get(at + 1)?.is("!");
    let open = at + 1 + usize::from(is_inner);
    if !tokens.get(open)?.is("[") {
        return None;
    }
    let end = group_end(tokens, open);
    let inside = &tokens[open + 1..end.saturating_sub(1).max(open + 1)];
    let has = |word: &str| inside.iter().any(|token| token.is(word));
    let is_cfg = inside.first().is_some_and(|token| token.is("cfg"));
    let is_for_tests =
        (is_cfg && (has("test") || has("loom")) && !has("not")) || (inside.len() == 1 && has("test"));
    Some(Attribute {
        is_inner,
        is_for_tests,
        end,
    })
}

/// The index behind the group that opens at `open`.
pub(super) fn group_end(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0usize;
    for (index, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return index + 1;
                }
            }
            _ => {}
        }
    }
    tokens.len()
}

/// The index behind the item, field, arm or statement that begins at `at`.
pub(super) fn item_end(tokens: &[Token], mut at: usize) -> usize {
    while let Some(more) = attribute(tokens, at) {
        at = more.end;
    }
    let mut first = at;
    if tokens.get(first).is_some_and(|token| token.is("pub")) {
        first += 1;
        if tokens.get(first).is_some_and(|token| token.is("(")) {
            first = group_end(tokens, first);
        }
    }
    let keyword = tokens.get(first).map_or("", |token| token.text.as_str());
    let ends_with_semicolon = matches!(keyword, "use" | "const" | "static" | "let" | "type")
        && !tokens
            .get(first + 1)
            .is_some_and(|token| token.is("fn") || token.is("unsafe"));
    let ends_with_body = matches!(
        keyword,
        "fn" | "mod"
            | "impl"
            | "struct"
            | "enum"
            | "union"
            | "trait"
            | "macro_rules"
            | "unsafe"
            | "extern"
            | "const"
            | "{"
    );
    while at < tokens.len() {
        match tokens[at].text.as_str() {
            ";" => return at + 1,
            "," if !ends_with_semicolon && !ends_with_body => return at + 1,
            ")" | "]" | "}" => return at,
            "{" if !ends_with_semicolon && ends_with_body => return group_end(tokens, at),
            "(" | "[" | "{" => at = group_end(tokens, at),
            _ => at += 1,
        }
    }
    tokens.len()
}

struct Lexer<'a> {
    characters: &'a [char],
    at: usize,
    line: usize,
}

impl Lexer<'_> {
    fn peek(&self, ahead: usize) -> char {
        self.characters.get(self.at + ahead).copied().unwrap_or('\0')
    }

    fn advance(&mut self) {
        if self.peek(0) == '\n' {
            self.line += 1;
        }
        self.at += 1;
    }

    fn next_token(&mut self) -> Option<Token> {
        self.skip_blank();
        if self.at >= self.characters.len() {
            return None;
        }
        let line = self.line;
        let text = self.scan();
        Some(Token {
            text,
            line,
            last_line: self.line,
        })
    }

    fn skip_blank(&mut self) {
        loop {
            if self.peek(0).is_whitespace() {
                self.advance();
            } else if self.peek(0) == '/' && self.peek(1) == '/' {
                while self.at < self.characters.len() && self.peek(0) != '\n' {
                    self.advance();
                }
            } else if self.peek(0) == '/' && self.peek(1) == '*' {
                self.skip_block_comment();
            } else {
                return;
            }
        }
    }

    fn skip_block_comment(&mut self) {
        let mut depth = 0usize;
        while self.at < self.characters.len() {
            let step = match (self.peek(0), self.peek(1)) {
                ('/', '*') => {
                    depth += 1;
                    2
                }
                ('*', '/') => {
                    depth -= 1;
                    2
                }
                _ => 1,
            };
            (0..step).for_each(|_| self.advance());
            if depth == 0 {
                return;
            }
        }
    }

    fn scan(&mut self) -> String {
        let first = self.peek(0);
        if first == '"' {
            self.skip_string();
            return "\"".into();
        }
        if first == '\'' {
            return self.scan_quote();
        }
        if !(first == '_' || first.is_alphanumeric()) {
            self.advance();
            return first.into();
        }
        let mut word = String::new();
        while self.peek(0) == '_' || self.peek(0).is_alphanumeric() {
            word.push(self.peek(0));
            self.advance();
        }
        let is_raw = matches!(word.as_str(), "r" | "br" | "cr");
        if is_raw && (self.peek(0) == '"' || (self.peek(0) == '#' && matches!(self.peek(1), '"' | '#'))) {
            self.skip_raw_string();
            return "\"".into();
        }
        if matches!(word.as_str(), "b" | "c") && self.peek(0) == '"' {
            self.skip_string();
            return "\"".into();
        }
        if word == "b" && self.peek(0) == '\'' {
            return self.scan_quote();
        }
        word
    }

    fn skip_string(&mut self) {
        self.advance();
        while self.at < self.characters.len() && self.peek(0) != '"' {
            if self.peek(0) == '\\' {
                self.advance();
            }
            self.advance();
        }
        self.advance();
    }

    fn skip_raw_string(&mut self) {
        let mut hashes = 0;
        while self.peek(0) == '#' {
            hashes += 1;
            self.advance();
        }
        self.advance();
        while self.at < self.characters.len() {
            let closes = self.peek(0) == '"' && (1..=hashes).all(|ahead| self.peek(ahead) == '#');
            self.advance();
            if closes {
                (0..hashes).for_each(|_| self.advance());
                return;
            }
        }
    }

    /// A character literal, or a lifetime.
    fn scan_quote(&mut self) -> String {
        let is_literal = self.peek(1) == '\\' || self.peek(2) == '\'';
        self.advance();
        if !is_literal {
            let mut lifetime = String::from("'");
            while self.peek(0) == '_' || self.peek(0).is_alphanumeric() {
                lifetime.push(self.peek(0));
                self.advance();
            }
            return lifetime;
        }
        while self.at < self.characters.len() && self.peek(0) != '\'' {
            if self.peek(0) == '\\' {
                self.advance();
            }
            self.advance();
        }
        self.advance();
        "'".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(source: &str) -> String {
        without_tests(&tokenize(source))
            .iter()
            .map(|token| token.text.as_str())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn comments_and_the_contents_of_strings_are_left_out() {
        assert_eq!(
            words("a /* b /* c */ d */ \"// e\" // f\n'\\'' 'x' g"),
            "a \" ' ' g"
        );
        assert_eq!(words("r#\"a \"b\" c\"# d<'e> b\"f\" b'g'"), "\" d < 'e > \" '");
    }

    #[test]
    fn items_for_tests_are_left_out_and_nothing_else() {
        assert_eq!(words("a(); #[cfg(test)] mod tests { x; } b"), "a ( ) ; b");
        assert_eq!(words("#[cfg(test)] mod tests; b"), "b");
        assert_eq!(words("#[cfg(all(test, loom))] use a::{b, c}; d"), "d");
        assert_eq!(words("#[cfg(test)] pub(crate) const A: [u8; 2] = [1, 2]; d"), "d");
        assert_eq!(
            words("struct S { #[cfg(test)] a: u8, b: u8 }"),
            "struct S { b : u8 }"
        );
        assert_eq!(words("#[test] #[should_panic] fn f<A, B>() -> u8 { 1 } c"), "c");
        assert_eq!(words("#![cfg(test)] a"), "");
        assert_eq!(words("#[cfg(not(test))] a"), "# [ cfg ( not ( test ) ) ] a");
    }

    #[test]
    fn only_lines_with_code_count() {
        let source =
            "//! Text.\n\nfn f() {\n    // why\n    let a = \"x\n y\";\n}\n#[cfg(test)]\nmod tests {\n}\n";
        assert_eq!(line_count(&without_tests(&tokenize(source))), 4);
    }
}
