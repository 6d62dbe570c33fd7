//! Branches, exception generation and system instructions (Arm ARM C4.1.93).

use super::{Decoded, bit, destination, ends, field, signed, source};
use crate::{
    SysReg,
    exec::{
        branch::{b, b_cond, bl, br, cb, tb},
        instance, maintenance, system,
    },
    op::{Exec, Op},
    regs::SINK,
    sys,
};

pub(super) fn decode(insn: u32) -> Option<Decoded> {
    match field(insn, 29, 3) {
        0b000 | 0b100 => {
            let imm = (signed(insn, 0, 26) * 4) as u64;
            let exec: Exec = if bit(insn, 31) { bl } else { b };
            Some(ends(Op::new(exec).imm(imm)))
        }
        0b001 | 0b101 => {
            if bit(insn, 25) {
                let imm = (signed(insn, 5, 14) * 4) as u64;
                let exec = instance!(tb [] bool bit(insn, 24));
                let bit = field(insn, 31, 1) << 5 | field(insn, 19, 5);
                Some(Op::new(exec).imm(imm).regs(0, source(insn, 0), 0).d(bit as u8).into())
            } else {
                let imm = (signed(insn, 5, 19) * 4) as u64;
                let exec = instance!(cb [] bool bit(insn, 31), bool bit(insn, 24));
                Some(Op::new(exec).imm(imm).regs(0, source(insn, 0), 0).into())
            }
        }
        0b010 => {
            if bit(insn, 25) || bit(insn, 24) || bit(insn, 4) {
                return None;
            }
            let imm = (signed(insn, 5, 19) * 4) as u64;
            let cond = field(insn, 0, 4);
            let exec: Exec = instance!(b_cond [] of16 cond);
            Some(Op::new(exec).imm(imm).into())
        }
        0b110 if bit(insn, 25) => register(insn),
        0b110 if !bit(insn, 24) => exception(insn),
        0b110 if field(insn, 22, 2) == 0 => system_instruction(insn),
        _ => None,
    }
}

fn register(insn: u32) -> Option<Decoded> {
    if field(insn, 16, 5) != 31 || field(insn, 10, 6) != 0 || field(insn, 0, 5) != 0 {
        return None;
    }
    let target = source(insn, 5);
    let exec: Exec = match field(insn, 21, 4) {
        0b0000 | 0b0010 => br::<false>,
        0b0001 => br::<true>,
        0b0100 if target == 31 => system::eret,
        _ => return None,
    };
    Some(ends(Op::new(exec).regs(0, target, 0)))
}

fn exception(insn: u32) -> Option<Decoded> {
    let exec: Exec = match (field(insn, 21, 3), field(insn, 0, 5)) {
        (0, 1) => system::svc,
        (0, 2) => system::hvc,
        (0, 3) => system::smc,
        (1, 0) => system::brk,
        // HLT without halting debug is undefined, and so are DCPS1 to DCPS3.
        _ => return None,
    };
    Some(ends(Op::new(exec).imm(u64::from(field(insn, 5, 16)))))
}

fn system_instruction(insn: u32) -> Option<Decoded> {
    let (op0, op1) = (field(insn, 19, 2), field(insn, 16, 3));
    let (crn, crm, op2) = (field(insn, 12, 4), field(insn, 8, 4), field(insn, 5, 3));
    let rt = field(insn, 0, 5) as u8;
    if op0 >= 2 {
        let reg = SysReg(field(insn, 5, 16) as u16);
        let (exec, slot): (Exec, u8) = if bit(insn, 21) {
            let exec: Exec = match reg {
                sys::SP_EL0 => system::mrs_sp_el0,
                sys::TPIDR_EL1 => system::mrs_tpidr_el1,
                sys::TPIDR_EL0 => system::mrs_tpidr_el0,
                _ => system::mrs,
            };
            (exec, destination(insn, 0))
        } else {
            (system::msr, source(insn, 0))
        };
        return Some(Op::new(exec).imm(u64::from(reg.0)).regs(slot, 0, 0).d(rt).into());
    }
    if bit(insn, 21) {
        return None;
    }
    match (op0, crn) {
        (0, 4) if rt == 31 => {
            let what = op1 << 3 | op2;
            // SPSel, PAN, DAIFSet and DAIFClr; CFINV, UAO, SSBS, DIT and TCO are not implemented.
            let known = matches!((op1, op2), (0, 5) | (0, 4) | (3, 6) | (3, 7));
            known.then(|| Op::new(system::msr_imm).regs(SINK, 0, what as u8).d(crm as u8).into())
        }
        (0, 3) if op1 == 3 && rt == 31 => {
            let d = crm as u8;
            Some(match op2 {
                2 => Op::new(system::clrex).into(),
                // SSBB and PSSBB are DSBs with CRm 0 and 4.
                4 => Op::new(maintenance::dsb).d(d).into(),
                5 => Op::new(system::dmb).d(d).into(),
                6 => ends(Op::new(system::isb)),
                _ => return None,
            })
        }
        (0, 2) if op1 == 3 && rt == 31 => Some(match crm << 3 | op2 {
            1 | 2 => Op::new(system::wait_event).into(),
            3 => ends(Op::new(system::wfi)),
            4 | 5 => Op::new(system::sev).into(),
            // Hints of features that are not implemented are NOPs.
            _ => Op::new(system::nop).into(),
        }),
        (1, 7) => {
            let what = u64::from(op1 << 7 | crm << 3 | op2);
            Some(Op::new(maintenance::cache).imm(what).regs(0, source(insn, 0), 0).d(rt).into())
        }
        (1, 8) if op1 == 0 => {
            let what = u64::from(crm << 3 | op2);
            Some(Op::new(maintenance::tlbi).imm(what).regs(0, source(insn, 0), 0).d(rt).into())
        }
        _ => None,
    }
}
