//! One vCPU: running the guest, and what its exits mean.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use applevisor::prelude::{ExitReason, Reg, SysReg, VcpuExit};
use squib_devices::gic::affinity;

use super::{
    Machine,
    error::{Doing, HvfError},
    lifetime::{Door, OwnedCpu},
    redistributor,
    registers::{PFR1_SME, X},
    state::{self, Layout, RESET_PSTATE},
    syndrome::{self, Access, SystemAccess},
    sys,
};
use crate::hypervisor::{Exit, HypervisorError, Kick, SystemCounter, Vcpu, VcpuState};

/// MPIDR_EL1 bit 31, RES1.
const MPIDR_RES1: u64 = 1 << 31;
/// CNTV_CTL_EL0: ENABLE and IMASK.
const TIMER_ENABLE: u64 = 1 << 0;
const TIMER_MASKED: u64 = 1 << 1;
/// CNTPCT_EL0 and CNTPCTSS_EL0: the host's counter, by which the physical timer fires.
const CNTPCT: u16 = 0xdf01;
const CNTPCTSS: u16 = 0xdf05;
const INSTRUCTION: u64 = 4;
/// SMCCC: NOT_SUPPORTED.
const NOT_SUPPORTED: u64 = u64::MAX;
/// How often one access to RAM may fault with nothing between. A granule has three states, so that two faults
/// bring it all rights, and every pause has another exit between.
const MOST_FAULTS: u32 = 64;

/// A vCPU of the framework, on the thread that made it.
pub(super) struct HvfVcpu {
    index: u32,
    // Before `machine`, so that it is gone before the virtual machine may be.
    cpu: OwnedCpu,
    machine: Arc<Machine>,
    kicked: Arc<AtomicBool>,
    layout: Layout,
    /// All registers as they were after reset.
    reset: VcpuState,
    /// The virtual timer's offset that the framework knows.
    offset: Option<u64>,
    /// CNTV_CTL_EL0 of a restored state, until the first run.
    timer_control: Option<u64>,
    /// The last exit, if it was a fault in RAM.
    fault: Option<RamFault>,
    /// The load that waits for its value.
    loading: Option<Access>,
    /// System registers that were reported.
    reported: HashSet<u16>,
}

/// An access to RAM that stage 2 did not allow.
#[derive(Clone, Copy)]
struct RamFault {
    syndrome: u64,
    address: u64,
    /// How often it came with nothing between.
    times: u32,
}

impl HvfVcpu {
    pub(super) fn new(machine: &Arc<Machine>, index: u32) -> Result<Self, HvfError> {
        sys::prefer_fast_cores();
        let cpu = machine.vm.create_vcpu(index)?;
        // Before anything else: accesses to the redistributor need it.
        let mpidr = MPIDR_RES1 | affinity(index);
        cpu.set_sys_reg(SysReg::MPIDR_EL1, mpidr)
            .doing(|| format!("setting MPIDR_EL1 of vCPU {index}"))?;
        // Its debug registers and exceptions are the guest's.
        let debugging = || format!("leaving debugging to the guest of vCPU {index}");
        cpu.set_trap_debug_exceptions(false).doing(debugging)?;
        cpu.set_trap_debug_reg_accesses(false).doing(debugging)?;
        let base = cpu
            .get_redistributor_base()
            .doing(|| format!("asking for the redistributor of vCPU {index}"))?;
        if base != redistributor(index) {
            let (found, needed) = (base, redistributor(index));
            return Err(HvfError::Chip { what: "a redistributor's address", found, needed });
        }
        let features = cpu
            .get_sys_reg(SysReg::ID_AA64PFR1_EL1)
            .doing(|| format!("reading ID_AA64PFR1_EL1 of vCPU {index}"))?;
        if features & PFR1_SME != 0 {
            cpu.set_sys_reg(SysReg::ID_AA64PFR1_EL1, features & !PFR1_SME)
                .doing(|| format!("hiding SME from vCPU {index}"))?;
        }
        // vCPUs are made one after the other.
        let unreadable = match machine.unreadable.get() {
            Some(known) => known,
            None => {
                let found = state::unreadable(&cpu, index)?;
                machine.unreadable.get_or_init(|| found)
            }
        };
        let layout = Layout::new(index, unreadable);
        let reset = layout.read(&cpu)?;
        machine.doors.lock().push(cpu.door());
        Ok(Self {
            index,
            cpu,
            machine: Arc::clone(machine),
            kicked: Arc::default(),
            layout,
            reset,
            offset: None,
            timer_control: None,
            fault: None,
            loading: None,
            reported: HashSet::new(),
        })
    }

    fn reg(&self, reg: Reg) -> Result<u64, HvfError> {
        self.cpu.get_reg(reg).map_err(|code| self.refused("reading", format!("{reg:?}"), code))
    }

    fn set_reg(&self, reg: Reg, value: u64) -> Result<(), HvfError> {
        self.cpu
            .set_reg(reg, value)
            .map_err(|code| self.refused("setting", format!("{reg:?}"), code))
    }

    fn refused(
        &self,
        doing: &'static str,
        register: String,
        code: applevisor::error::HypervisorError,
    ) -> HvfError {
        HvfError::Register { vcpu: self.index, doing, register, code }
    }

    /// X0 to X30, or the zero register.
    fn general(&self, n: u8) -> Result<u64, HvfError> {
        X.get(usize::from(n)).map_or(Ok(0), |reg| self.reg(*reg))
    }

    fn set_general(&self, n: u8, value: u64) -> Result<(), HvfError> {
        X.get(usize::from(n)).map_or(Ok(()), |reg| self.set_reg(*reg, value))
    }

    /// Goes on behind the instruction that was carried out here.
    fn advance(&self) -> Result<(), HvfError> {
        self.set_reg(Reg::PC, self.reg(Reg::PC)?.wrapping_add(INSTRUCTION))
    }

    /// Tells the framework what the counter shows. All vCPUs get the same.
    fn set_offset(&mut self) -> Result<(), HvfError> {
        let offset = self.machine.counter.offset();
        if self.offset != Some(offset) {
            self.cpu
                .set_vtimer_offset(offset)
                .doing(|| format!("setting the counter's offset of vCPU {}", self.index))?;
            let before = self.offset.replace(offset).unwrap_or(0);
            self.shift_physical_timer(offset.wrapping_sub(before))?;
        }
        Ok(())
    }

    /// The offset is the virtual counter's alone; the guest's physical timer is moved by it, so that it fires as
    /// much later as the guest was away.
    fn shift_physical_timer(&self, ticks: u64) -> Result<(), HvfError> {
        let register = SysReg::CNTP_CVAL_EL0;
        if ticks == 0 || !self.layout.has(register) {
            return Ok(());
        }
        let refused = |doing| move |code| self.refused(doing, format!("{register:?}"), code);
        let at = self.cpu.get_sys_reg(register).map_err(refused("reading"))?;
        let moved = self.cpu.set_sys_reg(register, at.wrapping_add(ticks));
        moved.map_err(refused("setting"))
    }

    /// What an exception means; none if the guest can go on.
    fn exception(
        &mut self,
        exit: VcpuExit,
        before: Option<RamFault>,
    ) -> Result<Option<Exit>, HvfError> {
        let syndrome = exit.exception.syndrome;
        let address = exit.exception.physical_address;
        match syndrome::class(syndrome) {
            syndrome::WFX => {
                self.advance()?;
                let event = syndrome::waits_for_event(syndrome);
                Ok((!event).then_some(Exit::WaitForInterrupt))
            }
            // PC points behind it already.
            syndrome::HVC => Ok(Some(Exit::Hypercall { imm: syndrome::immediate(syndrome) })),
            syndrome::SMC => {
                // There is no EL3 to call.
                self.set_reg(Reg::X0, NOT_SUPPORTED)?;
                self.advance()?;
                Ok(None)
            }
            syndrome::SYSTEM => {
                self.system_access(SystemAccess::of(syndrome))?;
                Ok(None)
            }
            syndrome::INSTRUCTION_ABORT | syndrome::DATA_ABORT
                if self.machine.stage2.is_ram(address) =>
            {
                self.memory_fault(syndrome, address, before).map(Some)
            }
            syndrome::INSTRUCTION_ABORT if !syndrome::is_table_walk(syndrome) => {
                let (vcpu, pc) = (self.index, self.reg(Reg::PC)?);
                Err(HvfError::NoCode { vcpu, pc, address })
            }
            syndrome::INSTRUCTION_ABORT => self.not_described(syndrome, address),
            syndrome::DATA_ABORT if syndrome::is_table_walk(syndrome) => {
                self.not_described(syndrome, address)
            }
            // No device has a cache over it.
            syndrome::DATA_ABORT if syndrome::is_cache_maintenance(syndrome) => {
                self.advance()?;
                Ok(None)
            }
            syndrome::DATA_ABORT => self.device_access(syndrome, address).map(Some),
            _ => self.unexpected(exit),
        }
    }

    /// Asks for the right, unless that was of no use before.
    fn memory_fault(
        &mut self,
        syndrome: u64,
        address: u64,
        before: Option<RamFault>,
    ) -> Result<Exit, HvfError> {
        let again = before.filter(|fault| (fault.syndrome, fault.address) == (syndrome, address));
        let times = again.map_or(1, |fault| fault.times + 1);
        self.fault = Some(RamFault { syndrome, address, times });
        if times > MOST_FAULTS {
            let (vcpu, pc) = (self.index, self.reg(Reg::PC)?);
            return Err(HvfError::Stuck { vcpu, pc, address, syndrome });
        }
        // Whoever is called out by taking memory away does not bring it back: others would stay in the guest.
        if self.kicked.swap(false, Ordering::SeqCst) {
            self.fault = None;
            return Ok(Exit::Cancelled);
        }
        Ok(Exit::MemoryFault { address, write: syndrome::is_write(syndrome) })
    }

    fn not_described<T>(&self, syndrome: u64, address: u64) -> Result<T, HvfError> {
        let (vcpu, pc) = (self.index, self.reg(Reg::PC)?);
        Err(HvfError::NotDescribed { vcpu, pc, address, syndrome })
    }

    fn device_access(&mut self, syndrome: u64, address: u64) -> Result<Exit, HvfError> {
        let Some(access) = Access::of(syndrome) else {
            return self.not_described(syndrome, address);
        };
        let size = access.size;
        if syndrome::is_write(syndrome) {
            let value = access.stored(self.general(access.register)?);
            self.advance()?;
            return Ok(Exit::MmioWrite { address, size, value });
        }
        self.loading = Some(access);
        Ok(Exit::MmioRead { address, size })
    }

    /// But for the physical counter, the register is none that this machine has: it reads as zero and ignores
    /// what is written.
    fn system_access(&mut self, access: SystemAccess) -> Result<(), HvfError> {
        let SystemAccess { system, register, read } = access;
        let is_counter = [CNTPCT, CNTPCTSS].contains(&system);
        if !is_counter && self.reported.insert(system) {
            let name = squib_soft::SysReg(system);
            tracing::debug!(vcpu = self.index, "{name} is trapped: zero when read, else ignored");
        }
        if read {
            let value = if is_counter { sys::host_ticks() } else { 0 };
            self.set_general(register, value)?;
        }
        self.advance()
    }

    fn unexpected<T>(&self, exit: VcpuExit) -> Result<T, HvfError> {
        let syndrome = exit.exception.syndrome;
        Err(HvfError::Unexpected {
            vcpu: self.index,
            reason: format!("{:?}", exit.reason),
            pc: self.reg(Reg::PC)?,
            class: syndrome::class(syndrome),
            syndrome,
        })
    }

    fn unmask_timer(&self) -> Result<(), HvfError> {
        let unmask = self.cpu.set_vtimer_mask(false);
        unmask.doing(|| format!("unmasking the timer of vCPU {}", self.index))
    }

    /// A timer that fired while the run was being cancelled may have been masked for an exit that nobody has
    /// seen; then a guest that sleeps would not be woken by it. Setting its value makes it fire again.
    fn rearm_timer(&self) -> Result<(), HvfError> {
        self.unmask_timer()?;
        match self.timer()? {
            Some(at) if at <= self.machine.counter.now() => {
                let set = self.cpu.set_sys_reg(SysReg::CNTV_CVAL_EL0, at);
                set.map_err(|code| self.refused("setting", "CNTV_CVAL_EL0".to_owned(), code))
            }
            _ => Ok(()),
        }
    }

    /// When the virtual timer fires or has fired, in ticks of the counter, if it may.
    fn timer(&self) -> Result<Option<u64>, HvfError> {
        let read = |reg| {
            self.cpu
                .get_sys_reg(reg)
                .map_err(|code| self.refused("reading", format!("{reg:?}"), code))
        };
        let control = read(SysReg::CNTV_CTL_EL0)?;
        if control & (TIMER_ENABLE | TIMER_MASKED) != TIMER_ENABLE {
            return Ok(None);
        }
        Ok(Some(read(SysReg::CNTV_CVAL_EL0)?))
    }

    /// How long it is until the virtual timer fires, if it does.
    fn until_timer(&self) -> Result<Option<Duration>, HvfError> {
        let Some(at) = self.timer()? else { return Ok(None) };
        let counter = &self.machine.counter;
        let left = at.saturating_sub(counter.now());
        let nanos = u128::from(left) * 1_000_000_000 / u128::from(counter.frequency());
        Ok(Some(Duration::from_nanos(nanos.try_into().unwrap_or(u64::MAX))))
    }
}

impl Vcpu for HvfVcpu {
    fn kick(&self) -> Arc<dyn Kick> {
        Arc::new(HvfKick {
            machine: Arc::clone(&self.machine),
            door: self.cpu.door(),
            kicked: Arc::clone(&self.kicked),
        })
    }

    fn run(&mut self, _limit: Option<u64>) -> Result<Exit, HypervisorError> {
        self.machine.stage2.begin()?;
        self.set_offset()?;
        if let Some(control) = self.timer_control.take() {
            let set = self.cpu.set_sys_reg(SysReg::CNTV_CTL_EL0, control);
            set.map_err(|code| self.refused("setting", "CNTV_CTL_EL0".to_owned(), code))?;
        }
        loop {
            if let Some(error) = self.machine.lost.lock().take() {
                return Err(error.into());
            }
            if self.kicked.swap(false, Ordering::SeqCst) {
                self.fault = None;
                return Ok(Exit::Cancelled);
            }
            self.cpu.run().doing(|| format!("running vCPU {}", self.index))?;
            let exit = self.cpu.get_exit_info();
            let fault = self.fault.take();
            // The syndrome means something in one case only.
            match exit.reason {
                ExitReason::CANCELED => {
                    self.kicked.store(false, Ordering::SeqCst);
                    self.rearm_timer()?;
                    return Ok(Exit::Cancelled);
                }
                ExitReason::EXCEPTION => {
                    if let Some(exit) = self.exception(exit, fault)? {
                        return Ok(exit);
                    }
                }
                // The framework's interrupt controller has seen the timer too; it was only masked.
                ExitReason::VTIMER_ACTIVATED => self.unmask_timer()?,
                ExitReason::UNKNOWN => return Ok(self.unexpected(exit)?),
            }
        }
    }

    fn complete_read(&mut self, value: u64) -> Result<(), HypervisorError> {
        if let Some(access) = self.loading.take() {
            self.set_general(access.register, access.loaded(value))?;
            self.advance()?;
        }
        Ok(())
    }

    /// Something may always come: only the framework knows.
    fn wait(&mut self, _block: bool) -> Result<bool, HypervisorError> {
        let timer = self.until_timer()?;
        self.machine.idle.wait(timer, &self.kicked);
        Ok(true)
    }

    /// The virtual timer's; the physical one is no part of what the framework reports.
    fn timer_due(&mut self) -> Result<bool, HypervisorError> {
        Ok(self.timer()?.is_some_and(|at| at <= self.machine.counter.now()))
    }

    fn x(&mut self, n: u8) -> Result<u64, HypervisorError> {
        Ok(self.general(n)?)
    }

    fn set_x(&mut self, n: u8, value: u64) -> Result<(), HypervisorError> {
        Ok(self.set_general(n, value)?)
    }

    fn start(&mut self, pc: u64, x0: u64) -> Result<(), HypervisorError> {
        self.loading = None;
        self.timer_control = None;
        let mut state = VcpuState { pc, pstate: RESET_PSTATE, ..self.reset.clone() };
        state.x[0] = x0;
        state::shift_physical_timer(&mut state, self.offset.unwrap_or(0));
        Ok(self.layout.write(&self.cpu, &state)?)
    }

    fn pc(&mut self) -> Result<u64, HypervisorError> {
        Ok(self.reg(Reg::PC)?)
    }

    /// The framework does not count.
    fn retired(&mut self) -> Option<u64> {
        None
    }

    fn save(&mut self) -> Result<VcpuState, HypervisorError> {
        let mut state = self.layout.read(&self.cpu)?;
        state::shift_physical_timer(&mut state, self.offset.unwrap_or(0).wrapping_neg());
        if let Some(control) = self.timer_control {
            state::replace_timer_control(&mut state, |_| control);
        }
        Ok(state)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), HypervisorError> {
        state::check(state, &self.reset)?;
        let before = self.layout.read(&self.cpu)?;
        self.set_offset()?;
        let mut here = state.clone();
        state::shift_physical_timer(&mut here, self.offset.unwrap_or(0));
        // In the framework the counter runs before the guest does, for hours if that waits in a pool: the timer is
        // switched on when the guest's time goes on.
        let control = state::replace_timer_control(&mut here, |control| control & !TIMER_ENABLE);
        if let Err(error) = self.layout.write(&self.cpu, &here) {
            if let Err(again) = self.layout.write(&self.cpu, &before) {
                tracing::warn!("vCPU {} keeps a part of the state: {again}", self.index);
            }
            return Err(error.into());
        }
        self.loading = None;
        self.timer_control = control;
        Ok(())
    }
}

struct HvfKick {
    machine: Arc<Machine>,
    door: Arc<Door>,
    kicked: Arc<AtomicBool>,
}

impl Kick for HvfKick {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.machine.idle.wake();
        self.machine.call_out(&self.door);
    }
}
