//! What is given out is taken back.

use std::ptr;

use applevisor_sys::*;
use squib_hvf_stand_in::Session;

use super::{noticed, vm};

#[test]
fn objects_are_released_once_and_used_before_that() {
    let session = Session::begin();
    // SAFETY: the stand-in knows its objects, and does not follow a pointer to anything else.
    unsafe {
        let config = hv_gic_config_create();
        os_release(config.cast());
        os_release(config.cast());
        noticed(&session, "was released before");
        assert_ne!(hv_gic_config_set_distributor_base(config, 0x0800_0000), 0);
        let found = session.violations();
        assert!(found[0].contains("is used that is none"), "{found:?}");
        // Null is none, and is released as often as one likes.
        os_release(ptr::null_mut());
        let of_another_kind = hv_vm_config_create();
        assert_ne!(hv_gic_config_set_distributor_base(of_another_kind.cast(), 0x0800_0000), 0);
        noticed(&session, "of another kind");
        os_release(of_another_kind.cast());
    }
}

#[test]
fn a_session_ends_with_everything_taken_back() {
    let fails = |work: fn()| {
        std::panic::catch_unwind(|| {
            let _session = Session::begin();
            work();
        })
        .unwrap_err()
        .downcast::<String>()
        .unwrap()
    };
    // SAFETY: the call takes no pointers.
    let object = fails(|| assert!(!unsafe { hv_gic_config_create() }.is_null()));
    assert!(object.contains("1 objects were not released"), "{object}");
    assert!(fails(|| vm(false)).contains("was not destroyed"));
    // SAFETY: the call takes no pointers.
    let call = fails(|| assert_ne!(unsafe { hv_vm_destroy() }, 0));
    assert!(call.contains("without a virtual machine"), "{call}");
    drop(Session::begin());
}
