//! Objects that a caller owns until it releases them.

use std::ffi::c_void;

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
        Box::into_raw(Box::new(self)).cast()
    }

    /// # Safety
    ///
    /// `pointer` must be from [`give`](Self::give) and not released, and nobody else may use it meanwhile.
    pub(crate) unsafe fn of<'a>(pointer: *mut c_void) -> Option<&'a mut Self> {
        // SAFETY: as the caller promises; null is none.
        unsafe { pointer.cast::<Self>().as_mut() }
    }
}

#[unsafe(no_mangle)]
extern "C" fn os_release(object: *mut c_void) {
    if !object.is_null() {
        // SAFETY: the caller owns an object that `give` made, and gives it back.
        drop(unsafe { Box::from_raw(object.cast::<Object>()) });
    }
}
