//! Reading and setting all registers of a vCPU.

use applevisor::prelude::{GicIccReg, HypervisorError as Code, Reg, SysReg, Vcpu as Cpu};
use squib_formats::persist::{PersistError, Versioned};

use super::{
    error::HvfError,
    registers::{self, ICC, NEEDED, NEEDED_ICC, V, X},
    sys,
};
use crate::hypervisor::VcpuState;

/// Registers with ISTATUS.
const TIMER_CONTROLS: [SysReg; 2] = [SysReg::CNTV_CTL_EL0, SysReg::CNTP_CTL_EL0];
/// CNTV_CTL_EL0.ISTATUS, CNTP_CTL_EL0.ISTATUS.
const TIMER_STATUS: u64 = 1 << 2;
/// PSTATE after reset: EL1h, D, A, I and F masked.
pub(super) const RESET_PSTATE: u64 = 0x3c5;
/// PSTATE.M: EL0t, EL1t, EL1h. Bit 4 would be AArch32.
const MODES: [u64; 3] = [0, 4, 5];
const PSTATE_MODE: u64 = 0x1f;

/// The registers of a vCPU that this host's framework lets one read, and may not. Others are no part of its
/// state.
pub(super) struct Layout {
    vcpu: u32,
    system: Vec<SysReg>,
    icc: Vec<GicIccReg>,
}

impl Layout {
    /// All registers but those that are `unreadable`.
    pub(super) fn new(vcpu: u32, unreadable: &[u16]) -> Self {
        let readable = |encoding: u16| unreadable.binary_search(&encoding).is_err();
        let system = registers::system().filter(|reg| readable(*reg as u16)).collect();
        let icc = ICC.into_iter().filter(|reg| readable(*reg as u16)).collect();
        Self { vcpu, system, icc }
    }

    /// Whether the register is a part of the state.
    pub(super) fn has(&self, register: SysReg) -> bool {
        self.system.contains(&register)
    }

    /// All registers. What the framework does not tell, which is the exclusive monitor and whether the vCPU
    /// sleeps, the architecture lets anybody lose.
    pub(super) fn read(&self, cpu: &Cpu) -> Result<VcpuState, HvfError> {
        let get = |reg| cpu.get_reg(reg).map_err(self.refused("reading", || format!("{reg:?}")));
        let get_system =
            |reg| cpu.get_sys_reg(reg).map_err(self.refused("reading", || format!("{reg:?}")));
        let mut x = [0; 31];
        for (value, reg) in x.iter_mut().zip(X) {
            *value = get(reg)?;
        }
        let mut v = [0; 32];
        for (value, reg) in v.iter_mut().zip(V) {
            let read = cpu.get_simd_fp_reg(reg);
            *value = read.map_err(self.refused("reading", || format!("{reg:?}")))?;
        }
        let mut sysregs = Vec::with_capacity(self.system.len() + self.icc.len());
        for reg in &self.system {
            // Whether it has fired follows from the counter, which the framework does not hold in a pause.
            let derived = if TIMER_CONTROLS.contains(reg) { TIMER_STATUS } else { 0 };
            sysregs.push((*reg as u16, get_system(*reg)? & !derived));
        }
        for reg in &self.icc {
            let value = cpu.get_icc_reg(*reg);
            let value = value.map_err(self.refused("reading", || icc_name(*reg)))?;
            sysregs.push((*reg as u16, value));
        }
        sysregs.sort_unstable();
        Ok(VcpuState {
            x,
            sp_el0: get_system(SysReg::SP_EL0)?,
            sp_el1: get_system(SysReg::SP_EL1)?,
            pc: get(Reg::PC)?,
            pstate: get(Reg::CPSR)?,
            v,
            fpcr: get(Reg::FPCR)?,
            fpsr: get(Reg::FPSR)?,
            sysregs,
            exclusive: None,
            waiting: false,
            retired: 0,
        })
    }

    /// Sets all registers that differ: interrupt controller, system registers, the rest. A register that the
    /// framework does not let one set is therefore no obstacle while it has the right value.
    pub(super) fn write(&self, cpu: &Cpu, state: &VcpuState) -> Result<(), HvfError> {
        let now = self.read(cpu)?;
        let wanted = |encoding: u16| {
            let value = of(state, encoding)?;
            (of(&now, encoding) != Some(value)).then_some(value)
        };
        for reg in &self.icc {
            if let Some(value) = wanted(*reg as u16) {
                let set = cpu.set_icc_reg(*reg, value);
                set.map_err(self.refused("setting", || icc_name(*reg)))?;
            }
        }
        // An interrupt in service stays so by these alone: without them the guest would not hear of the next.
        for reg in NEEDED_ICC {
            let wanted = of(state, reg as u16);
            let found = cpu.get_icc_reg(reg);
            let found = found.map_err(self.refused("reading", || icc_name(reg)))?;
            if let Some(wanted) = wanted.filter(|wanted| *wanted != found) {
                let (vcpu, register) = (self.vcpu, icc_name(reg));
                return Err(HvfError::NotTaken { vcpu, register, wanted, found });
            }
        }
        let set_system = |reg: SysReg, value| {
            cpu.set_sys_reg(reg, value).map_err(self.refused("setting", || format!("{reg:?}")))
        };
        for reg in &self.system {
            if let Some(value) = wanted(*reg as u16) {
                set_system(*reg, value)?;
            }
        }
        set_system(SysReg::SP_EL0, state.sp_el0)?;
        set_system(SysReg::SP_EL1, state.sp_el1)?;
        let set = |reg, value| {
            cpu.set_reg(reg, value).map_err(self.refused("setting", || format!("{reg:?}")))
        };
        for (reg, value) in X.into_iter().zip(state.x) {
            set(reg, value)?;
        }
        set(Reg::PC, state.pc)?;
        set(Reg::CPSR, state.pstate)?;
        for (reg, value) in V.into_iter().zip(state.v) {
            let set = sys::set_vector(cpu, reg, value);
            set.map_err(self.refused("setting", || format!("{reg:?}")))?;
        }
        set(Reg::FPCR, state.fpcr)?;
        set(Reg::FPSR, state.fpsr)
    }

    fn refused(
        &self,
        doing: &'static str,
        register: impl FnOnce() -> String,
    ) -> impl FnOnce(Code) -> HvfError {
        let vcpu = self.vcpu;
        move |code| HvfError::Register { vcpu, doing, register: register(), code }
    }
}

/// Encodings of the registers that cannot be read, in ascending order. The same for all vCPUs of a machine, so
/// that only the first, `vcpu`, is asked: for the others a failure is one. So it is for a register that a
/// restored guest cannot do without.
pub(super) fn unreadable(cpu: &Cpu, vcpu: u32) -> Result<Vec<u16>, HvfError> {
    let refused =
        |register, code| Err(HvfError::Register { vcpu, doing: "reading", register, code });
    let mut found = Vec::new();
    // Twice, so that a failure that passes does not cost the guest a register.
    for reg in registers::system() {
        match cpu.get_sys_reg(reg).or_else(|_| cpu.get_sys_reg(reg)) {
            Err(code) if NEEDED.contains(&reg) => return refused(format!("{reg:?}"), code),
            Err(_) => found.push(reg as u16),
            Ok(_) => {}
        }
    }
    for reg in ICC {
        match cpu.get_icc_reg(reg).or_else(|_| cpu.get_icc_reg(reg)) {
            Err(code) if NEEDED_ICC.contains(&reg) => return refused(icc_name(reg), code),
            Err(_) => found.push(reg as u16),
            Ok(_) => {}
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Checks a state from disk against `reset`, that of the vCPU it is for.
pub(super) fn check(state: &VcpuState, reset: &VcpuState) -> Result<(), PersistError> {
    let VcpuState {
        x: _,
        sp_el0: _,
        sp_el1: _,
        pc: _,
        pstate,
        v: _,
        fpcr,
        fpsr,
        sysregs,
        exclusive,
        waiting,
        retired,
    } = state;
    if exclusive.is_some() || *waiting || *retired != 0 {
        let why = "the framework tells of no exclusive monitor, no sleep and no count".to_owned();
        return Err(invalid("exclusive, waiting, retired", why));
    }
    if pstate >> 32 != 0 || !MODES.contains(&(pstate & PSTATE_MODE)) {
        return Err(invalid("pstate", format!("{pstate:#x} is not one of AArch64 EL0 or EL1")));
    }
    for (field, value) in [("fpcr", fpcr), ("fpsr", fpsr)] {
        if value >> 32 != 0 {
            return Err(invalid(field, format!("{value:#x} has bits above 31")));
        }
    }
    let bad = |encoding: u16, why: &str| {
        let name = squib_soft::SysReg(encoding);
        Err(invalid("sysregs", format!("system register {name} {why}")))
    };
    if let Some(pair) = sysregs.windows(2).find(|pair| pair[0].0 >= pair[1].0) {
        return bad(pair[1].0, "is out of order");
    }
    if let Some((unknown, _)) = sysregs.iter().find(|(found, _)| of(reset, *found).is_none()) {
        return bad(*unknown, "is unknown on this host");
    }
    for (encoding, here) in &reset.sysregs {
        match of(state, *encoding) {
            None if needed(*encoding) => return bad(*encoding, "is missing"),
            // The host of the snapshot did not tell it, so it stays as it is after reset.
            None => {}
            // The guest has seen it, and the framework would take any value.
            Some(found) if is_identity(*encoding) && found != *here => {
                return bad(*encoding, &format!("is {found:#x}, this vCPU's is {here:#x}"));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Moves the physical timer's value by `ticks`. All backends save it by the virtual counter; in the framework it is
/// by the host's.
pub(super) fn shift_physical_timer(state: &mut VcpuState, ticks: u64) {
    const CVAL: u16 = SysReg::CNTP_CVAL_EL0 as u16;
    if let Ok(at) = state.sysregs.binary_search_by_key(&CVAL, |(encoding, _)| *encoding) {
        let value = &mut state.sysregs[at].1;
        *value = value.wrapping_add(ticks);
    }
}

/// Puts what `change` makes of CNTV_CTL_EL0 into its place, and answers what was there, if it is a part of the
/// state.
pub(super) fn replace_timer_control(
    state: &mut VcpuState,
    change: impl FnOnce(u64) -> u64,
) -> Option<u64> {
    const CONTROL: u16 = SysReg::CNTV_CTL_EL0 as u16;
    let at = state.sysregs.binary_search_by_key(&CONTROL, |(encoding, _)| *encoding).ok()?;
    let value = &mut state.sysregs[at].1;
    let before = *value;
    *value = change(before);
    Some(before)
}

/// Whether a guest does not go on without the register.
fn needed(encoding: u16) -> bool {
    NEEDED.iter().any(|reg| *reg as u16 == encoding)
        || NEEDED_ICC.iter().any(|reg| *reg as u16 == encoding)
}

/// MIDR_EL1, MPIDR_EL1 and the ID registers: op0 = 3, op1 = 0, CRn = 0.
fn is_identity(encoding: u16) -> bool {
    encoding >> 7 == 0xc000 >> 7
}

fn of(state: &VcpuState, encoding: u16) -> Option<u64> {
    let at = state.sysregs.binary_search_by_key(&encoding, |(encoding, _)| *encoding).ok()?;
    Some(state.sysregs[at].1)
}

fn icc_name(reg: GicIccReg) -> String {
    format!("ICC_{reg:?}")
}

fn invalid(field: &'static str, why: String) -> PersistError {
    PersistError::invalid(VcpuState::KIND, field, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reset() -> VcpuState {
        VcpuState {
            x: [0; 31],
            sp_el0: 0,
            sp_el1: 0,
            pc: 0,
            pstate: RESET_PSTATE,
            v: [0; 32],
            fpcr: 0,
            fpsr: 0,
            sysregs: vec![(0xc005, 0x8000_0001), (0xc080, 7), (0xc100, 9)],
            exclusive: None,
            waiting: false,
            retired: 0,
        }
    }

    #[test]
    fn a_state_that_is_not_this_vcpus_is_refused_by_name() {
        let refused = |change: fn(&mut VcpuState)| {
            let mut state = reset();
            change(&mut state);
            check(&state, &reset()).unwrap_err().to_string()
        };
        check(&reset(), &reset()).unwrap();
        assert!(refused(|state| state.pstate = 0x3c9).contains("EL0 or EL1"), "EL2");
        assert!(refused(|state| state.pstate = 0x1d0).contains("pstate"), "AArch32");
        assert!(refused(|state| state.fpsr = 1 << 32).contains("fpsr"));
        assert!(refused(|state| state.sysregs.swap(1, 2)).contains("out of order"));
        assert!(refused(|state| state.sysregs[2].0 = 0xc101).contains("unknown"));
        assert!(refused(|state| state.sysregs.truncate(2)).contains("S3_0_C2_C0_0 is missing"));
        assert!(refused(|state| state.waiting = true).contains("waiting"));
        assert!(refused(|state| state.retired = 1).contains("retired"));
        assert!(refused(|state| state.sysregs[0].1 = 0x8000_0000).contains("0x80000000"));
    }
}
