//! The tiny guest: a bare-metal program in the shape of an arm64 kernel, for tests that must be fast.
//!
//! It runs with the MMU on, takes virtual-timer, serial and virtio-blk interrupts through the GICv3,
//! and repeats for ever: mix a buffer into a hash, dirty a page, write a sector of the disk in slot 0,
//! read another back, and now and then print a line such as
//!
//! ```text
//! n=0000000c t=0000001f r=00000018 i=00000000 h=5f0a31cc8d1e2b47
//! ```
//!
//! with the rounds done, timer ticks, disk requests, a hash of the bytes received on the serial port, and the
//! hash of everything. It switches the machine off when it receives [`POWER_OFF`], resets it when it receives
//! [`RESET`], as Linux does after a panic when it receives [`WARM_RESET`], and switches it off after printing
//! what is wrong on an exception (`X` and ESR_EL1) or a failed disk request (`E`). Without a disk it
//! does the rest.

mod asm;
mod burst;
mod noise;
mod program;

use std::{fs, io, path::Path};

pub use burst::{Burst, Ending};
pub use noise::noise;

/// The byte that makes the guest switch the machine off.
pub const POWER_OFF: u8 = b'q';
/// The byte that makes the guest ask for a reset.
pub const RESET: u8 = 0xf1;
/// The byte that makes the guest ask for a warm reset, as Linux with `reboot=panic_warm` does after a panic.
pub const WARM_RESET: u8 = 0xf2;

/// Bytes that the guest needs behind the start of its image.
pub const IMAGE_SIZE: u64 = 0x2_0000;

/// The guest's parameters.
#[derive(Clone, Copy, Debug)]
pub struct Tiny {
    /// Ticks of the virtual counter between two timer interrupts.
    pub timer_ticks: u32,
    /// Rounds between two printed lines; at least 1.
    pub print_every: u32,
}

impl Default for Tiny {
    /// For a machine whose counter counts instructions: a timer interrupt in about 5,000 of them, a
    /// line every second round.
    fn default() -> Self {
        Self { timer_ticks: 5_003, print_every: 2 }
    }
}

impl Tiny {
    /// The guest as an arm64 `Image`.
    pub fn image(&self) -> Vec<u8> {
        program::assemble(self)
    }

    /// Writes the image to `path`.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        fs::write(path, self.image())
    }
}

/// What the guest prints as `i` after it received `bytes`.
pub fn input_hash(bytes: &[u8]) -> u32 {
    let add =
        |hash: u64, byte: &u8| hash.wrapping_mul(program::MULTIPLIER).wrapping_add((*byte).into());
    bytes.iter().fold(0, add) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_has_an_arm64_header() {
        let image = Tiny::default().image();
        assert_eq!(&image[56..60], b"ARM\x64");
        assert_eq!(image[16..24], IMAGE_SIZE.to_le_bytes());
        assert!(image.len() as u64 <= IMAGE_SIZE);
        assert_eq!(image[3] >> 2, 0b000101, "the first instruction is a branch");
    }

    /// As printed on qemu-system-aarch64, from the program with that machine's addresses.
    #[test]
    fn the_hash_of_input_is_what_the_guest_computes() {
        assert_eq!(input_hash(b"abc"), 0xe3ed_7f86);
    }
}
