//! How a child process of a VM is started, and how it locks itself in.
//!
//! Two halves. The supervisor uses [`spawn`]: it starts a program with an exact list of descriptors, in
//! namespaces of its own and with a [`Jail`] made of the program's [`Profile`], and gets a [`Child`] it can watch
//! without ever blocking. The program takes its jail by [`inherited`] and, when it holds every descriptor it needs, walks
//! through the stages described in [`stage`] by [`Jail::lock_in`], which comes back with a [`Report`] of what the host
//! gave. After that no path can be opened, and a system call that is not in the profile kills it.
//!
//! A process decides nothing about its own sandbox: it links neither the profiles nor what makes filters of them.
//!
//! [`mod@audit`] looks at a process from outside and says what it really has, so that nobody has to believe a
//! report. [`host`] asks the kernel, before any VM is started, what it would give.
//!
//! Needs Linux 5.11 (`close_range` with `CLOSE_RANGE_CLOEXEC`); all that is newer or can be switched off is
//! optional and, where it is absent, named in [`Report::missing`].

pub mod audit;
mod confine;
pub mod host;
mod identity;
mod jail;
mod lasting;
pub mod limits;
pub mod namespaces;
pub mod profile;
mod root;
mod seccomp;
pub mod stage;
// UNSAFETY: clone3, exec and a handful of raw system calls have no safe wrapper; the room's rule is in sys/mod.rs.
#[expect(unsafe_code)]
pub mod sys;
mod warden;

pub use audit::{Audit, audit};
pub use jail::{Jail, Report};
pub use lasting::Lasting;
pub use limits::Limits;
pub use namespaces::Namespaces;
pub use profile::{Profile, Rule, When};
pub use stage::{Options, SandboxError};
pub use sys::fds::{inherited, inherited_control_fd};
pub use sys::pidfd::{Child, ExitCause};
pub use sys::process::REFUSED;
pub use sys::spawn::{Identity, Spawn, SpawnError, spawn};
pub use sys::tap;
