//! A guest that makes its disk complain as often as it can.

use super::{
    IMAGE_SIZE,
    asm::{Asm, NE},
    program::header,
};

// virtio-mmio registers (virtio 1.3, section 4.2.2).
const DRIVER_FEATURES: u32 = 0x20;
const DRIVER_FEATURES_SEL: u32 = 0x24;
const QUEUE_NUM: u32 = 0x38;
const QUEUE_READY: u32 = 0x44;
const DEVICE_STATUS: u32 = 0x70;
const QUEUE_DESC_LOW: u32 = 0x80;

/// As an arm64 `Image`: it readies a queue that lies nowhere, `times` times, and switches the machine off.
pub fn noise(times: u32) -> Vec<u8> {
    let mut a = Asm::default();
    let start = a.label();
    header(&mut a, start);
    a.place(start);
    a.mov(1, squib_devices::map::VIRTIO.base);
    let set_up = [
        (DEVICE_STATUS, 1),
        (DEVICE_STATUS, 1 | 2),
        // VIRTIO_F_VERSION_1, bit 32.
        (DRIVER_FEATURES_SEL, 1),
        (DRIVER_FEATURES, 1),
        (DEVICE_STATUS, 1 | 2 | 8),
        (QUEUE_NUM, 8),
        // Not aligned to 16.
        (QUEUE_DESC_LOW, 1),
    ];
    for (register, value) in set_up {
        a.mov(2, value);
        a.str(4, 2, 1, register);
    }
    a.mov(2, 1);
    a.mov(3, times.into());
    let next = a.here();
    a.str(4, 2, 1, QUEUE_READY);
    a.sub_imm(3, 3, 1);
    a.cmp_imm(3, 0);
    a.b_if(NE, next);
    // PSCI SYSTEM_OFF.
    a.mov(0, 0x8400_0008);
    a.hvc();
    let mut image = a.finish();
    image.resize(IMAGE_SIZE as usize, 0);
    image
}
