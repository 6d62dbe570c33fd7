//! A guest that writes to its console and ends at once.

use super::{
    IMAGE_SIZE,
    asm::{Asm, NE},
    program::header,
};

/// PSCI SYSTEM_OFF and SYSTEM_RESET (Arm DEN 0022, 5.11 and 5.12), or nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It switches the machine off.
    PowerOff,
    /// It resets the machine.
    Reset,
    /// It sleeps for ever.
    Sleep,
}

/// The guest's parameters.
#[derive(Clone, Copy, Debug)]
pub struct Burst {
    /// How many bytes it writes: [`Burst::output`].
    pub bytes: u32,
    /// What it does then, with the next instruction.
    pub ending: Ending,
}

impl Burst {
    /// What it writes: the bytes of a counter.
    pub fn output(&self) -> Vec<u8> {
        (0..self.bytes).map(|n| n as u8).collect()
    }

    /// The guest as an arm64 `Image`.
    pub fn image(&self) -> Vec<u8> {
        let mut a = Asm::default();
        let start = a.label();
        header(&mut a, start);
        a.place(start);
        a.mov(1, squib_devices::map::SERIAL.base);
        a.mov(2, 0);
        a.mov(3, self.bytes.into());
        let next = a.here();
        a.str(1, 2, 1, 0);
        a.add_imm(2, 2, 1);
        a.cmp(2, 3);
        a.b_if(NE, next);
        match self.ending {
            Ending::PowerOff => a.mov(0, 0x8400_0008),
            Ending::Reset => a.mov(0, 0x8400_0009),
            Ending::Sleep => {}
        }
        if self.ending != Ending::Sleep {
            a.hvc();
        }
        let sleep = a.here();
        a.wfi();
        a.b(sleep);
        let mut image = a.finish();
        image.resize(IMAGE_SIZE as usize, 0);
        image
    }
}
