//! What a data abort's syndrome says of the instruction that caused it (Arm ARM, D24.2.40).

/// Instruction length: 32 bits.
const IL: u64 = 1 << 25;

/// ISS of a load or store of one general register without write-back; without ISV for all others.
pub(crate) fn access(instruction: Option<u32>, write: bool) -> u64 {
    let described = instruction.and_then(describe).unwrap_or(0);
    described | u64::from(write) << 6
}

fn describe(i: u32) -> Option<u64> {
    let field = |shift: u32, bits: u32| u64::from(i >> shift & ((1 << bits) - 1));
    let (size, v, opc, rt) = (field(30, 2), field(26, 1), field(22, 2), field(0, 5));
    let load_store = field(27, 3) == 0b111 && v == 0;
    // Unsigned offset; or unscaled, or register offset.
    let plain = field(24, 2) == 0b01
        || field(24, 2) == 0b00
            && (field(21, 1) == 0 && field(10, 2) == 0
                || field(21, 1) == 1 && field(10, 2) == 0b10);
    // Load-acquire and store-release.
    let ordered = field(24, 6) == 0b00_1000 && field(23, 1) == 1 && field(21, 1) == 0;
    if ordered {
        return Some(isv(size, false, rt, size == 3) | 1 << 14);
    }
    if !load_store || !plain {
        return None;
    }
    let (sign, wide) = match opc {
        0b00 | 0b01 => (false, size == 3),
        0b10 if size == 3 => return None,
        0b10 => (true, true),
        _ => (true, false),
    };
    Some(isv(size, sign, rt, wide))
}

const fn isv(size: u64, sign: bool, rt: u64, wide: bool) -> u64 {
    1 << 24 | size << 22 | (sign as u64) << 21 | rt << 16 | (wide as u64) << 15
}

/// ESR_EL2 of exception class `class` with `iss`.
pub(crate) const fn syndrome(class: u64, iss: u64) -> u64 {
    class << 26 | IL | iss
}

/// ISS of a trapped MRS (`read`) or MSR of `system` with general register `rt`.
pub(crate) fn system(system: u16, rt: u8, read: bool) -> u64 {
    let field = |shift: u32, bits: u32| u64::from(system >> shift & ((1 << bits) - 1));
    let (op0, op1, crn, crm, op2) =
        (field(14, 2), field(11, 3), field(7, 4), field(3, 4), field(0, 3));
    op0 << 20 | op2 << 17 | op1 << 14 | crn << 10 | u64::from(rt) << 5 | crm << 1 | u64::from(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_loads_and_stores_are_described() {
        let of = |instruction| access(Some(instruction), false);
        // ldr w3, [x1]; ldrb w3, [x1, x2]; ldrsw x3, [x1, #4]; str x3, [x1]; ldarb w3, [x1].
        assert_eq!(of(0xb940_0023), isv(2, false, 3, false));
        assert_eq!(of(0x3862_6823), isv(0, false, 3, false));
        assert_eq!(of(0xb980_0423), isv(2, true, 3, true));
        assert_eq!(of(0xf900_0023), isv(3, false, 3, true));
        assert_eq!(of(0x08df_fc23), isv(0, false, 3, false) | 1 << 14);
        // ldr w3, [x1], #4; ldp x3, x4, [x1]; ldr q3, [x1].
        assert_eq!([of(0xb840_4423), of(0xa940_1023), of(0x3dc0_0023)], [0; 3]);
    }
}
