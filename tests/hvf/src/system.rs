//! The operating system that the framework is a part of: its build, and what that build does not tell.

use std::{
    collections::BTreeSet,
    ffi::{CStr, c_char, c_int, c_void},
};

use parking_lot::Mutex;

use crate::rules::Session;

/// What `sysctl kern.osversion` says unless a test wants another.
const BUILD: &str = "24A335";

static SYSTEM: Mutex<System> = Mutex::new(System { build: None, secret: BTreeSet::new() });

struct System {
    build: Option<String>,
    secret: BTreeSet<u16>,
}

impl Session {
    /// Makes the host's operating system one of `build`. It takes only the states of interrupt controllers
    /// that were made on it.
    pub fn update_host(&self, build: &str) {
        SYSTEM.lock().build = Some(build.to_owned());
    }

    /// Lets nobody read or set the system or ICC register of that encoding.
    pub fn hide_register(&self, register: u16) {
        SYSTEM.lock().secret.insert(register);
    }

    /// Ends what [`hide_register`](Self::hide_register) began.
    pub fn show_register(&self, register: u16) {
        SYSTEM.lock().secret.remove(&register);
    }
}

/// Forgets what a test wanted.
pub(crate) fn reset() {
    *SYSTEM.lock() = System { build: None, secret: BTreeSet::new() };
}

/// The build of the host's operating system.
pub(crate) fn build() -> String {
    SYSTEM.lock().build.clone().unwrap_or_else(|| BUILD.to_owned())
}

/// Whether a register of the framework cannot be read on this host.
pub(crate) fn is_secret(register: u16) -> bool {
    SYSTEM.lock().secret.contains(&register)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sysctlbyname(
    name: *const c_char,
    old: *mut c_void,
    old_len: *mut usize,
    _new: *const c_void,
    _new_len: usize,
) -> c_int {
    // SAFETY: the caller gives a name that ends with a zero byte.
    if unsafe { CStr::from_ptr(name) } != c"kern.osversion" {
        return -1;
    }
    let text = [build().as_bytes(), &[0]].concat();
    // SAFETY: the caller gives a buffer of as many bytes as it says, and a place for how many are used.
    unsafe {
        if *old_len < text.len() {
            return -1;
        }
        *old_len = text.len();
        old.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len());
    }
    0
}
