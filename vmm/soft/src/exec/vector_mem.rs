//! LD1 to LD4 and ST1 to ST4 of multiple and single structures (Arm ARM C4.1.94).

use std::ptr;

use crate::{cpu::Cpu, op::Op};

/// One element to move: `rpt` and `selem` of the pseudocode, flattened.
struct Element {
    register: usize,
    lane: usize,
}

/// LD1-LD4, ST1-ST4 (multiple structures). The op keeps the word; `imm` is 1 with write-back.
pub(crate) unsafe fn multiple(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if cpu.fp_trap {
        return cpu.op_fp_trap(o);
    }
    let insn = o.insn();
    if insn >> 5 & 31 == 31 && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let (q, load) = (insn >> 30 & 1, insn >> 22 & 1 != 0);
    let size = insn >> 10 & 3;
    let (rpt, selem) = match insn >> 12 & 15 {
        0b0000 => (1, 4),
        0b0010 => (4, 1),
        0b0100 => (1, 3),
        0b0110 => (3, 1),
        0b0111 => (1, 1),
        0b1000 => (1, 2),
        _ => (2, 1),
    };
    let esize = 1u64 << size;
    let lanes = (8 << q >> size) as usize;
    let rt = (insn & 31) as usize;
    let base = base(cpu, insn);
    let mut at = base;
    let mut values = [[0u8; 16]; 4];
    let register = |rep: usize, s: usize| rep + s;
    for rep in 0..rpt {
        for lane in 0..lanes {
            for s in 0..selem {
                let n = register(rep, s);
                let element = Element { register: n, lane };
                if !transfer(cpu, o, at, load, size, rt, &element, &mut values) {
                    return ptr::null();
                }
                at = at.wrapping_add(esize);
            }
        }
    }
    if load {
        for (n, value) in values.iter().enumerate().take(rpt * selem) {
            cpu.r.v[(rt + n) % 32] = u128::from_le_bytes(*value);
        }
    }
    write_back(cpu, o, insn, base, at.wrapping_sub(base));
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// LD1-LD4, ST1-ST4 (single structure) and LD1R-LD4R. The op keeps the word.
pub(crate) unsafe fn single(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if cpu.fp_trap {
        return cpu.op_fp_trap(o);
    }
    let insn = o.insn();
    if insn >> 5 & 31 == 31 && cpu.refuse_sp(o) {
        return ptr::null();
    }
    let (q, load) = (insn >> 30 & 1, insn >> 22 & 1 != 0);
    let (s, size) = (insn >> 12 & 1, insn >> 10 & 3);
    let opcode = insn >> 13 & 7;
    let selem = ((opcode & 1) << 1 | insn >> 21 & 1) as usize + 1;
    let rt = (insn & 31) as usize;
    let (replicate, scale, lane) = match opcode >> 1 {
        0 => (false, 0, q << 3 | s << 2 | size),
        1 => (false, 1, q << 2 | s << 1 | size >> 1),
        2 if size & 1 == 0 => (false, 2, q << 1 | s),
        2 => (false, 3, q),
        _ => (true, size, 0),
    };
    let base = base(cpu, insn);
    let mut at = base;
    let mut values = [[0u8; 16]; 4];
    for (n, value) in values.iter_mut().enumerate() {
        *value = cpu.r.v[(rt + n) % 32].to_le_bytes();
    }
    for n in 0..selem {
        let element = Element { register: n, lane: lane as usize };
        if !transfer(cpu, o, at, load, scale, rt, &element, &mut values) {
            return ptr::null();
        }
        at = at.wrapping_add(1 << scale);
    }
    if load {
        for (n, value) in values.iter_mut().enumerate().take(selem) {
            if replicate {
                let esize = 1 << scale;
                for lane in 1..(8 << q) / esize {
                    value.copy_within(..esize, lane * esize);
                }
                if q == 0 {
                    value[8..].fill(0);
                }
            }
            cpu.r.v[(rt + n) % 32] = u128::from_le_bytes(*value);
        }
    }
    write_back(cpu, o, insn, base, at.wrapping_sub(base));
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// Moves one element; false if the access did not happen.
#[expect(
    clippy::too_many_arguments,
    reason = "one element of one instruction, all of them its fields"
)]
#[inline(always)]
fn transfer(
    cpu: &mut Cpu,
    o: &Op,
    at: u64,
    load: bool,
    scale: u32,
    rt: usize,
    element: &Element,
    values: &mut [[u8; 16]; 4],
) -> bool {
    let from = element.lane << scale;
    let to = from + (1 << scale);
    if load {
        let loaded = match scale {
            0 => cpu.load::<u8>(o, at).map(u64::from),
            1 => cpu.load::<u16>(o, at).map(u64::from),
            2 => cpu.load::<u32>(o, at).map(u64::from),
            _ => cpu.load::<u64>(o, at),
        };
        let Ok(value) = loaded else { return false };
        values[element.register][from..to].copy_from_slice(&value.to_le_bytes()[..1 << scale]);
        true
    } else {
        let value = (cpu.r.v[(rt + element.register) % 32] >> (8 * from)) as u64;
        match scale {
            0 => cpu.store(o, at, value as u8),
            1 => cpu.store(o, at, value as u16),
            2 => cpu.store(o, at, value as u32),
            _ => cpu.store(o, at, value),
        }
        .is_ok()
    }
}

fn base(cpu: &Cpu, insn: u32) -> u64 {
    let rn = insn >> 5 & 31;
    if rn == 31 { cpu.r.x[crate::regs::SP as usize] } else { cpu.r.x(rn) }
}

fn write_back(cpu: &mut Cpu, o: &Op, insn: u32, base: u64, moved: u64) {
    if o.imm == 0 {
        return;
    }
    let rm = insn >> 16 & 31;
    let by = if rm == 31 { moved } else { cpu.r.x(rm) };
    let to = base.wrapping_add(by);
    match insn >> 5 & 31 {
        31 => cpu.r.x[crate::regs::SP as usize] = to,
        rn => cpu.r.set_x(rn, to),
    }
}
