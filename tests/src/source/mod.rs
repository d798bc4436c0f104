//! Reads our own Rust source, well enough for house rules and line counts.
//!
//! This is no parser of Rust. [`tokens`] takes comments, strings and test code away; [`tree`] finds a crate's modules by
//! their `mod` lines; [`paths`] finds the paths that a file names; [`reach`] follows them from a program's root to all
//! the modules that it can use; [`items`] cuts files into items and [`linked`] finds those that a program has;
//! [`rules`] complains. Where that is not exact it errs on the side of more: see [`reach`].

#![forbid(unsafe_code)]

pub mod items;
pub mod linked;
pub mod paths;
pub mod reach;
pub mod rules;
pub mod tokens;
pub mod tree;
