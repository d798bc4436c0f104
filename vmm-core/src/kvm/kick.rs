//! Gets a vCPU out of KVM_RUN from another thread.
//!
//! The kick is a signal to the vCPU's thread. Its handler sets `immediate_exit` in the vCPU's page, so that the
//! signal is not lost if it arrives just before KVM_RUN: KVM then returns at once. The order that makes it work:
//!
//! | thread that kicks | vCPU thread |
//! | --- | --- |
//! | 1. store what is wanted | a. clear `immediate_exit` |
//! | 2. send the signal | b. look at what is wanted |
//! | | c. KVM_RUN |
//!
//! If b misses 1, the signal comes after a, and c returns.

use std::cell::Cell;
use std::marker::PhantomData;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::{self, NonNull};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::KvmError;

thread_local! {
    /// The page of the vCPU that this thread runs; null between vCPUs. Constant initialisation and no destructor:
    /// access is a plain load, allowed in a signal handler.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// Installs the handler, once for the process.
pub fn install_kick_handler() -> Result<(), KvmError> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(KvmError::ioctl("install the vCPU signal handler"))
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let page = RUN_PAGE.with(Cell::get);
    if !page.is_null() {
        // SAFETY: the page is mapped while `Armed` lives, and this runs on the thread that owns both.
        unsafe { ptr::addr_of_mut!((*page).immediate_exit).write_volatile(1) };
    }
}

/// Marks the thread as the one that runs a vCPU. Not `Send`: it is dropped on the same thread.
#[derive(Debug)]
pub(super) struct Armed {
    page: NonNull<kvm_run>,
    not_send: PhantomData<*mut ()>,
}

impl Armed {
    /// # Safety
    /// `page` stays mapped while the result lives.
    pub(super) unsafe fn new(page: NonNull<kvm_run>) -> Self {
        RUN_PAGE.with(|cell| cell.set(page.as_ptr()));
        Self {
            page,
            not_send: PhantomData,
        }
    }

    /// Step a of the table above.
    pub(super) fn clear(&self) {
        // SAFETY: mapped by the promise of `new`; only this thread and its signal handler write the byte.
        unsafe { ptr::addr_of_mut!((*self.page.as_ptr()).immediate_exit).write_volatile(0) };
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        RUN_PAGE.with(|cell| cell.set(ptr::null_mut()));
    }
}

/// Whoever can be kicked: a vCPU thread.
pub trait Kick {
    /// Step 2 of the table above. Harmless if no vCPU runs.
    fn kick(&self);
}

impl<T> Kick for JoinHandle<T> {
    fn kick(&self) {
        // SAFETY: the thread has not been joined (that would have consumed the handle), so its id is valid. A
        // thread that has ended is reported as ESRCH, which is as good as kicked.
        unsafe { libc::pthread_kill(self.as_pthread_t(), SIGRTMIN()) };
    }
}
