//! The stage 1 translation table walk (Arm ARM D8) for EL1&0: 4 KiB and 16 KiB granules, 48-bit
//! addresses.

use crate::{
    shared::{Place, Ram},
    sys::Sys,
};

/// What an access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Execute,
}

/// A failed translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The guest gets an abort with this fault status code, ISS.DFSC or ISS.IFSC.
    Abort(u32),
    /// A translation table at this physical address is not there now.
    Withheld(u64),
}

// Fault status codes, Arm ARM D17.2.37, ESR_EL1 ISS encoding for a Data Abort.
const FSC_ADDRESS_SIZE: u32 = 0b00_0000;
const FSC_TRANSLATION: u32 = 0b00_0100;
const FSC_ACCESS_FLAG: u32 = 0b00_1000;
const FSC_PERMISSION: u32 = 0b00_1100;
pub(crate) const FSC_EXTERNAL: u32 = 0b01_0000;
const FSC_EXTERNAL_ON_WALK: u32 = 0b01_0100;
pub(crate) const FSC_ALIGNMENT: u32 = 0b10_0001;

/// A successful translation of one page or block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Translation {
    /// Physical address of the byte that was asked for.
    pub(crate) pa: u64,
    /// Size of the page or block that the descriptor maps, bytes.
    pub(crate) size: u64,
    /// Not only for the ASID in use: nG is clear.
    pub(crate) global: bool,
    /// The memory type, as MAIR_EL1 encodes it.
    pub(crate) attributes: u8,
    /// The shareability domain, as PAR_EL1.SH encodes it.
    pub(crate) shareability: u8,
    perms: Permissions,
    level: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Permissions {
    el0: bool,
    writable: bool,
    uxn: bool,
    pxn: bool,
}

// SCTLR_EL1 fields, Arm ARM D17.2.118.
pub(crate) const SCTLR_M: u64 = 1 << 0;
pub(crate) const SCTLR_A: u64 = 1 << 1;
pub(crate) const SCTLR_SA: u64 = 1 << 3;
pub(crate) const SCTLR_SA0: u64 = 1 << 4;
const SCTLR_WXN: u64 = 1 << 19;

/// TTBRn_EL1.BADDR, with CnP left out.
pub(crate) const TTBR_BADDR: u64 = 0x0000_ffff_ffff_fffe;

// TCR_EL1 fields, Arm ARM D17.2.131.
const TCR_TBI0: u64 = 1 << 37;
const TCR_TBI1: u64 = 1 << 38;

/// Physical address bits that are implemented (ID_AA64MMFR0_EL1.PARange = 2).
pub(crate) const PA_BITS: u32 = 40;

const OUTER_SHAREABLE: u8 = 0b10;

impl Translation {
    /// Whether data that are not aligned cannot be accessed here.
    pub(crate) fn is_device(&self) -> bool {
        is_device(self.attributes)
    }

    /// Checks that `access` from EL0 or EL1 is allowed.
    pub(crate) fn check(
        &self,
        sys: &Sys,
        access: Access,
        el0: bool,
        pan: bool,
    ) -> Result<(), Fault> {
        if sys.sctlr & SCTLR_M == 0 {
            return Ok(());
        }
        let p = self.perms;
        let wxn = sys.sctlr & SCTLR_WXN != 0;
        let allowed = match (access, el0) {
            (Access::Read, true) => p.el0,
            (Access::Write, true) => p.el0 && p.writable,
            (Access::Read, false) => !(pan && p.el0),
            (Access::Write, false) => p.writable && !(pan && p.el0),
            // EL0 may execute what it may not read.
            (Access::Execute, true) => !(p.uxn || p.writable && p.el0 && wxn),
            // What EL0 may write, EL1 never executes.
            (Access::Execute, false) => !(p.pxn || p.writable && (p.el0 || wxn)),
        };
        if allowed { Ok(()) } else { Err(Fault::Abort(FSC_PERMISSION | self.level)) }
    }
}

/// `va` without what may stand in its top byte: a sign extension of bit 55.
pub(crate) fn untagged(va: u64) -> u64 {
    ((va << 8) as i64 >> 8) as u64
}

/// Whether `va` is in the upper half, that of TTBR1_EL1. Bit 55 says it, with and without a tag.
pub(crate) fn is_upper(va: u64) -> bool {
    va >> 55 & 1 != 0
}

/// TCR_EL1.TBI0 or TBI1, which count with the MMU off too: the top byte of `va` is no part of the address.
pub(crate) fn ignores_top_byte(sys: &Sys, va: u64) -> bool {
    let bit = if is_upper(va) { TCR_TBI1 } else { TCR_TBI0 };
    sys.tcr & bit != 0
}

/// Translates `va` by the tables that `sys` names; permissions are checked apart.
pub(crate) fn walk(sys: &Sys, ram: &Ram, va: u64) -> Result<Translation, Fault> {
    let va = if ignores_top_byte(sys, va) { untagged(va) } else { va };
    if sys.sctlr & SCTLR_M == 0 {
        return if va >> PA_BITS == 0 { Ok(flat(va)) } else { Err(Fault::Abort(FSC_ADDRESS_SIZE)) };
    }
    let upper = is_upper(va);
    let tcr = sys.tcr;
    let (ttbr, tsz, epd, granule) = if upper {
        // TG1: 01 is 16 KiB, 10 is 4 KiB.
        let granule = match tcr >> 30 & 3 {
            1 => 14,
            _ => 12,
        };
        (sys.ttbr1, tcr >> 16 & 63, tcr >> 23 & 1, granule)
    } else {
        // TG0: 00 is 4 KiB, 10 is 16 KiB.
        let granule = match tcr >> 14 & 3 {
            2 => 14,
            _ => 12,
        };
        (sys.ttbr0, tcr & 63, tcr >> 7 & 1, granule)
    };
    // Out-of-range TxSZ behaves as the nearest supported value.
    let va_bits = 64 - (tsz.clamp(16, 39) as u32);
    let sign = if upper { u64::MAX } else { 0 };
    if (va ^ sign) >> va_bits != 0 || epd != 0 {
        return Err(Fault::Abort(FSC_TRANSLATION));
    }

    // TCR_EL1.IPS may say less than PARange; the values above mean more.
    let pa_bits = match tcr >> 32 & 7 {
        0 => 32,
        1 => 36,
        _ => PA_BITS,
    };
    let stride = granule - 3;
    let levels = (va_bits - granule).div_ceil(stride);
    let mut level = 4 - levels;
    let mut table = ttbr & TTBR_BADDR;
    // The first table may be smaller than a page: its index has what is left of the address.
    let mut index_bits = va_bits - granule - stride * (levels - 1);
    table &= !((8u64 << index_bits) - 1);
    let (mut table_el0, mut table_ro, mut table_uxn, mut table_pxn) = (true, false, false, false);
    loop {
        let shift = granule + stride * (3 - level);
        let index = va >> shift & ((1 << index_bits) - 1);
        let address = table + index * 8;
        if table >> pa_bits != 0 {
            let level = if level == 4 - levels { 0 } else { level };
            return Err(Fault::Abort(FSC_ADDRESS_SIZE | level));
        }
        let host = match ram.place(address, 8, false) {
            Place::Ram(host) => host,
            Place::Withheld => return Err(Fault::Withheld(address)),
            Place::Elsewhere => return Err(Fault::Abort(FSC_EXTERNAL_ON_WALK | level)),
        };
        // SAFETY: `host` is in RAM and, tables being aligned, aligned to 8.
        let descriptor = u64::from_le(unsafe { host.cast::<u64>().read_volatile() });
        let next = descriptor & ((1 << 48) - 1) & !((1 << granule) - 1);
        match (descriptor & 3, level) {
            (3, 0..=2) => {
                table_el0 &= descriptor >> 61 & 1 == 0;
                table_ro |= descriptor >> 62 & 1 != 0;
                table_uxn |= descriptor >> 60 & 1 != 0;
                table_pxn |= descriptor >> 59 & 1 != 0;
                table = next;
                index_bits = stride;
                level += 1;
            }
            (3, 3) | (1, 1 | 2) => {
                // A 16 KiB granule has blocks at level 2 only.
                if descriptor & 3 == 1 && granule == 14 && level == 1 {
                    return Err(Fault::Abort(FSC_TRANSLATION | level));
                }
                let attributes = (sys.mair >> (8 * (descriptor >> 2 & 7))) as u8;
                let shareability = if is_device(attributes) || attributes == NON_CACHEABLE {
                    OUTER_SHAREABLE
                } else {
                    (descriptor >> 8 & 3) as u8
                };
                let size = 1u64 << shift;
                let base = next & !(size - 1);
                if base >> pa_bits != 0 {
                    return Err(Fault::Abort(FSC_ADDRESS_SIZE | level));
                }
                if descriptor >> 10 & 1 == 0 {
                    return Err(Fault::Abort(FSC_ACCESS_FLAG | level));
                }
                return Ok(Translation {
                    pa: base | va & (size - 1),
                    size,
                    global: descriptor >> 11 & 1 == 0,
                    attributes,
                    shareability,
                    perms: Permissions {
                        el0: descriptor >> 6 & 1 != 0 && table_el0,
                        writable: descriptor >> 7 & 1 == 0 && !table_ro,
                        uxn: descriptor >> 54 & 1 != 0 || table_uxn,
                        pxn: descriptor >> 53 & 1 != 0 || table_pxn,
                    },
                    level,
                });
            }
            _ => return Err(Fault::Abort(FSC_TRANSLATION | level)),
        }
    }
}

/// Device memory of any kind: Attr 0b0000xxxx.
fn is_device(attributes: u8) -> bool {
    attributes >> 4 == 0
}

/// Normal memory that is not cached anywhere.
const NON_CACHEABLE: u8 = 0x44;

/// The identity, as with the MMU off, where all data are in Device-nGnRnE memory.
fn flat(va: u64) -> Translation {
    let perms = Permissions { el0: true, writable: true, uxn: false, pxn: false };
    Translation {
        pa: va,
        size: 1 << PA_BITS,
        global: true,
        attributes: 0,
        shareability: OUTER_SHAREABLE,
        perms,
        level: 0,
    }
}
