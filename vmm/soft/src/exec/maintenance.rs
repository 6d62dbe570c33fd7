//! Maintenance of caches and translations, here and on the other vCPUs.

use std::{
    ptr,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use crate::{
    cpu::Cpu,
    debug::Watched,
    exec::system::SCTLR_DZE,
    mem::Stopped,
    mmu::{self, Access, Fault, Translation},
    op::Op,
    shared::Maintenance,
    tlb::Regime,
};

// SCTLR_EL1 fields that open instructions to EL0 (Arm ARM D17.2.118).
const SCTLR_UCI: u64 = 1 << 26;

/// DSB: also waits until the other vCPUs have carried out this one's maintenance.
pub(crate) unsafe fn dsb(cpu: &mut Cpu, op: *const Op) -> *const Op {
    fence(Ordering::SeqCst);
    if cpu.unsettled {
        cpu.unsettled = false;
        for peer in cpu.shared.peers() {
            if ptr::eq(&*peer, &*cpu.peer) {
                continue;
            }
            while !peer.settled() {
                // The other one may wait for this one at its own DSB.
                cpu.maintain();
                std::thread::yield_now();
            }
        }
    }
    // SAFETY: `Exec`'s contract; another op follows.
    unsafe { op.add(1) }
}

/// A system instruction with CRn 7 by its op1, CRm and op2 (Arm ARM C5.3 and C5.5).
const fn maintenance(op1: u32, crm: u32, op2: u32) -> u32 {
    op1 << 7 | crm << 3 | op2
}

const IC_IALLUIS: u32 = maintenance(0, 1, 0);
const IC_IALLU: u32 = maintenance(0, 5, 0);
const IC_IVAU: u32 = maintenance(3, 5, 1);
const DC_IVAC: u32 = maintenance(0, 6, 1);
const DC_ISW: u32 = maintenance(0, 6, 2);
const DC_CSW: u32 = maintenance(0, 10, 2);
const DC_CISW: u32 = maintenance(0, 14, 2);
const DC_CVAC: u32 = maintenance(3, 10, 1);
const DC_CVAU: u32 = maintenance(3, 11, 1);
const DC_CIVAC: u32 = maintenance(3, 14, 1);
const DC_ZVA: u32 = maintenance(3, 4, 1);
/// Bytes of a data cache line, CTR_EL0.DminLine.
const DC_LINE: u64 = 64;
const AT_S1E1R: u32 = maintenance(0, 8, 0);
const AT_S1E1W: u32 = maintenance(0, 8, 1);
const AT_S1E0R: u32 = maintenance(0, 8, 2);
const AT_S1E0W: u32 = maintenance(0, 8, 3);

/// SYS with CRn 7: caches and address translation. `imm` is op1 << 7 | CRm << 3 | op2, slot `b` the
/// argument.
pub(crate) unsafe fn cache(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    let what = o.imm as u32;
    let va = cpu.r.x[o.b as usize];
    if !cpu.pstate.el1() {
        let open = match what {
            DC_ZVA => cpu.sys.sctlr & SCTLR_DZE != 0,
            IC_IVAU | DC_CVAC | DC_CVAU | DC_CIVAC => cpu.sys.sctlr & SCTLR_UCI != 0,
            _ => return cpu.op_undefined(o),
        };
        if !open {
            let (op1, crm, op2) = (what >> 7, what >> 3 & 15, what & 7);
            let rt = u32::from(o.d);
            let iss = 1 << 20 | op2 << 17 | op1 << 14 | 7 << 10 | rt << 5 | crm << 1;
            return cpu.op_system_trap(o, iss);
        }
    }
    match what {
        // SAFETY: the same op.
        DC_ZVA => return unsafe { super::loadstore::dc_zva(cpu, op) },
        // There are no data caches: only the address is checked.
        DC_CVAC | DC_CVAU | DC_CIVAC => {
            if cpu.fast_read(cpu.regime, va, 1).is_none()
                && let Err(fault) = cpu.translate(va, Access::Read, cpu.regime)
            {
                cpu.cache_fault(o, va, fault);
                return ptr::null();
            }
        }
        // Loses what is in the line, so it needs the right to write, and watchpoints take it for a store.
        DC_IVAC => {
            if let Err(fault) = cpu.translate(va, Access::Write, cpu.regime) {
                cpu.cache_fault(o, va, fault);
                return ptr::null();
            }
            let (regime, line) = (cpu.regime, va & !(DC_LINE - 1));
            if cpu.watch(regime, o, line, DC_LINE, Watched::Invalidate).is_err() {
                return ptr::null();
            }
        }
        DC_ISW | DC_CSW | DC_CISW => {}
        IC_IVAU => match cpu.translate(va, Access::Read, cpu.regime) {
            Err(fault) => {
                cpu.cache_fault(o, va, fault);
                return ptr::null();
            }
            Ok(translation) => {
                if cpu.shared.ram.contains(translation.pa) {
                    let page = cpu.shared.ram.page_index(translation.pa);
                    // Nothing to forget where nobody has decoded anything since the last time.
                    if cpu.shared.has_code[page].swap(0, Ordering::SeqCst) != 0 {
                        cpu.broadcast(Maintenance::Code(page));
                        return cpu.leave_after(o);
                    }
                }
            }
        },
        IC_IALLUIS => {
            cpu.broadcast(Maintenance::AllCode);
            return cpu.leave_after(o);
        }
        IC_IALLU => {
            cpu.apply(Maintenance::AllCode);
            return cpu.leave_after(o);
        }
        AT_S1E1R | AT_S1E1W | AT_S1E0R | AT_S1E0W => {
            let write = matches!(what, AT_S1E1W | AT_S1E0W);
            let access = if write { Access::Write } else { Access::Read };
            let el0 = matches!(what, AT_S1E0R | AT_S1E0W);
            if cpu.translate_to_par(o, va, access, el0).is_err() {
                return ptr::null();
            }
        }
        _ => return cpu.op_undefined(o),
    }
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// TLBI: `imm` is CRm << 3 | op2, slot `b` the argument.
pub(crate) unsafe fn tlbi(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    let value = cpu.r.x[o.b as usize];
    // Bits 43 to 0 are the address's bits 55 to 12.
    let va = mmu::untagged(value << 12);
    let inner_shareable = match o.imm >> 3 {
        3 => true,
        7 => false,
        _ => return cpu.op_undefined(o),
    };
    let what = match o.imm & 7 {
        _ if !cpu.pstate.el1() => return cpu.op_undefined(o),
        // VMALLE1.
        0 => Maintenance::AllTranslations,
        // VAE1, VAAE1, VALE1, VAALE1.
        1 | 3 | 5 | 7 => Maintenance::Page(va),
        // ASIDE1.
        2 => Maintenance::Asid((value >> 48) as u16),
        _ => return cpu.op_undefined(o),
    };
    if inner_shareable {
        cpu.broadcast(what);
    } else {
        cpu.apply(what);
    }
    cpu.leave_after(o)
}

impl Cpu {
    /// A maintenance instruction at `o` whose address does not translate.
    fn cache_fault(&mut self, o: &Op, va: u64, fault: Fault) {
        match fault {
            Fault::Abort(fsc) => {
                self.leave_at(o);
                self.take_data_abort(va, fsc, true, true);
            }
            Fault::Withheld(address) => drop(self.withheld(o, address, false)),
        }
    }

    /// AT: the result goes to PAR_EL1 (Arm ARM D17.2.102).
    fn translate_to_par(
        &mut self,
        o: &Op,
        va: u64,
        access: Access,
        el0: bool,
    ) -> Result<(), Stopped> {
        let regime = if el0 { Regime::El0 } else { Regime::El1 };
        self.sys.par = match self.translate(va, access, regime) {
            Ok(translation) => {
                let Translation { pa, attributes, shareability, .. } = translation;
                u64::from(attributes) << 56
                    | 1 << 11
                    | u64::from(shareability) << 7
                    | pa & 0x000f_ffff_ffff_f000
            }
            Err(Fault::Abort(fsc)) => 1 << 11 | u64::from(fsc) << 1 | 1,
            Err(Fault::Withheld(address)) => return Err(self.withheld(o, address, false)),
        };
        Ok(())
    }

    /// Carries out `what` here and asks all others to.
    fn broadcast(&mut self, what: Maintenance) {
        self.apply(what);
        let peers = self.shared.peers.read().unwrap_or_else(|poison| poison.into_inner());
        for peer in peers.iter().filter(|peer| !ptr::eq(&***peer, &*self.peer)) {
            peer.ask(what);
            self.unsettled = true;
        }
    }

    /// Carries out `what` here.
    fn apply(&mut self, what: Maintenance) {
        match what {
            Maintenance::AllTranslations => {
                self.tlb.forget_all();
                self.refresh_space();
            }
            Maintenance::Page(va) => {
                self.tlb.forget_page(va);
                self.refresh_space();
            }
            Maintenance::Asid(asid) => {
                self.tlb.forget_asid(asid & self.asid_bits());
                self.refresh_space();
            }
            Maintenance::Code(page) => self.code.forget_page(page),
            Maintenance::AllCode => self.code.drop_all(),
        }
    }

    /// Carries out what peers have asked for.
    pub(crate) fn maintain(&mut self) {
        if !self.peer.is_asked() {
            return;
        }
        let (requests, ticket) = self.peer.begin();
        for what in requests {
            self.apply(what);
        }
        let peer = Arc::clone(&self.peer);
        peer.finish(ticket);
    }
}
