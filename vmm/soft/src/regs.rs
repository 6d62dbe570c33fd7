//! The registers that instructions work on.

/// Slot of the zero register as a source: never written, so it always reads as zero.
pub(crate) const ZERO: u8 = 31;
/// Slot that takes what is written to the zero register: never read.
pub(crate) const SINK: u8 = 32;
/// Slot of the current stack pointer.
pub(crate) const SP: u8 = 33;

/// General, flag, FP and SIMD registers.
///
/// The decoder turns register fields into slots, so that handlers need no test for register 31:
/// 0..=30 are x0 to x30, then [`ZERO`], [`SINK`] and [`SP`]. The array has 256 slots so that a `u8`
/// indexes it without a bounds check.
#[repr(C)]
pub(crate) struct Regs {
    pub(crate) x: [u64; 256],
    /// Sign bit (63) is PSTATE.N.
    pub(crate) nf: u64,
    /// PSTATE.Z is set when this is zero.
    pub(crate) zf: u64,
    /// PSTATE.C.
    pub(crate) cf: bool,
    /// PSTATE.V.
    pub(crate) vf: bool,
    /// FPCR: AHP, DN, FZ, RMode, FZ16 and nothing else.
    pub(crate) fpcr: u32,
    /// FPSR: QC and the cumulative exception bits.
    pub(crate) fpsr: u32,
    /// V0 to V31.
    pub(crate) v: [u128; 32],
}

impl Regs {
    pub(crate) fn new() -> Self {
        Self { x: [0; 256], nf: 0, zf: 1, cf: false, vf: false, fpcr: 0, fpsr: 0, v: [0; 32] }
    }

    /// Xn by its field, 31 reads as zero.
    #[inline]
    pub(crate) fn x(&self, n: u32) -> u64 {
        self.x[(n & 31) as usize]
    }

    /// Writes Xn by its field, 31 is discarded.
    #[inline]
    pub(crate) fn set_x(&mut self, n: u32, value: u64) {
        if n & 31 != 31 {
            self.x[(n & 31) as usize] = value;
        }
    }

    /// N, Z, C and V in bits 31 to 28.
    #[inline]
    pub(crate) fn nzcv(&self) -> u32 {
        ((self.nf >> 63) as u32) << 31
            | u32::from(self.zf == 0) << 30
            | u32::from(self.cf) << 29
            | u32::from(self.vf) << 28
    }

    /// Sets the flags from bits 31 to 28.
    #[inline]
    pub(crate) fn set_nzcv(&mut self, nzcv: u32) {
        self.nf = u64::from(nzcv) << 32;
        self.zf = u64::from(!nzcv >> 30 & 1);
        self.cf = nzcv >> 29 & 1 != 0;
        self.vf = nzcv >> 28 & 1 != 0;
    }
}
