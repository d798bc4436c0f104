//! The room for what has no safe wrapper: making a process, and a few raw system calls.
//!
//! The invariant of this room: between `clone3` and `execve` the child runs only `launch.rs`, which makes raw
//! system calls on memory that was prepared before, and nothing else. It allocates nothing, takes no lock and
//! cannot unwind, because the other threads of the parent, and whatever they held, do not exist in it.
//! All else here is a single system call whose arguments live as long as the call.

pub mod attempt;
pub mod fds;
pub(crate) mod launch;
pub mod pidfd;
pub(crate) mod probe;
pub(crate) mod process;
pub mod spawn;
pub mod tap;
