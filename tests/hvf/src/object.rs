//! Objects that a caller owns until it releases them.

use std::{collections::BTreeSet, ffi::c_void};

use parking_lot::Mutex;

use crate::rules::violation;

/// Addresses of the objects that were given out and not released.
static LIVE: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());

/// What is behind a pointer that was given out.
pub(crate) enum Object {
    VmConfig {
        ipa_bits: u32,
    },
    GicConfig {
        gicd: Option<u64>,
        gicr: Option<u64>,
        msi: Option<u64>,
        msi_intids: Option<(u32, u32)>,
    },
    VcpuConfig,
    GicState(Vec<u8>),
}

impl Object {
    pub(crate) fn give(self) -> *mut c_void {
        let pointer = Box::into_raw(Box::new(self));
        LIVE.lock().insert(pointer as usize);
        pointer.cast()
    }

    /// The object at `pointer`; none for null, and for what is no object, which is a violation.
    ///
    /// # Safety
    ///
    /// Nobody else may use the object meanwhile.
    pub(crate) unsafe fn of<'a>(pointer: *mut c_void) -> Option<&'a mut Self> {
        if pointer.is_null() {
            return None;
        }
        if !LIVE.lock().contains(&(pointer as usize)) {
            violation("an object is used that is none, or was released");
            return None;
        }
        // SAFETY: it is from `give` and was not released; the rest is the caller's promise.
        unsafe { pointer.cast::<Self>().as_mut() }
    }
}

/// Forgets all objects, and answers how many were not released.
pub(crate) fn forget() -> usize {
    std::mem::take(&mut *LIVE.lock()).len()
}

#[unsafe(no_mangle)]
extern "C" fn os_release(object: *mut c_void) {
    if object.is_null() {
        return;
    }
    if !LIVE.lock().remove(&(object as usize)) {
        violation("an object is released that is none, or was released before");
        return;
    }
    // SAFETY: it is from `give` and was not released; the caller owns it, and gives it back.
    drop(unsafe { Box::from_raw(object.cast::<Object>()) });
}
