//! A software CPU as the framework shows a vCPU: registers between two runs, and exits.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
};

use applevisor_sys as hv;
use squib_devices::map;
use squib_soft::{Counter, Cpu, CpuState, Exit, Ram, Shared, SysReg};

use crate::{
    decode,
    gic::{self, Chip},
    host::host,
    rules::{self, Answer, BAD_ARGUMENT, Report, Walk, violation},
    time,
    vcpu::Entry,
    vm,
};

const WFX: u64 = 0x01;
const HVC: u64 = 0x16;
const SMC: u64 = 0x17;
const SYSTEM: u64 = 0x18;
const INSTRUCTION_ABORT: u64 = 0x20;
const DATA_ABORT: u64 = 0x24;
/// DFSC: translation or permission fault, level 3.
const TRANSLATION_FAULT: u64 = 0b000111;
const PERMISSION_FAULT: u64 = 0b001111;
const S1PTW: u64 = 1 << 7;
/// CM with WnR.
const CACHE_MAINTENANCE: u64 = 1 << 8 | 1 << 6;

/// What the caller must have done to PC before the next run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pc {
    /// It was free to do anything.
    Free,
    /// It carried out the instruction here, so PC must be behind.
    Behind(u64),
    /// The instruction is executed again, or PC is behind it already.
    At(u64),
}

/// A vCPU as its own thread sees it.
pub(crate) struct Local {
    pub(crate) entry: Arc<Entry>,
    pub(crate) exit: *mut hv::hv_vcpu_exit_t,
    pub(crate) offset: u64,
    pub(crate) timer_masked: bool,
    pub(crate) cpu: Option<(Arc<Shared>, Cpu)>,
    /// The virtual machine's counter.
    counter: Arc<Counter>,
    /// The registers; true if they are newer than the CPU's.
    regs: Option<(CpuState, bool)>,
    pc: u64,
    expected: Pc,
    /// General register of a load that the caller has carried out.
    loading: Option<u8>,
    /// One of the timers' outputs is high.
    timer_line: bool,
    pub(crate) mpidr: Option<u64>,
    pub(crate) sme_hidden: bool,
    /// Registers of the framework that the software CPU lacks.
    pub(crate) extra: BTreeMap<u16, u64>,
}

impl Local {
    pub(crate) fn new(
        entry: Arc<Entry>,
        exit: *mut hv::hv_vcpu_exit_t,
        counter: Arc<Counter>,
    ) -> Self {
        Self {
            entry,
            exit,
            offset: 0,
            timer_masked: false,
            cpu: None,
            counter,
            regs: Some((reset(), true)),
            pc: 0,
            expected: Pc::Free,
            loading: None,
            timer_line: false,
            mpidr: None,
            sme_hidden: false,
            extra: BTreeMap::new(),
        }
    }

    pub(crate) fn pc(&self) -> u64 {
        self.pc
    }

    pub(crate) fn set_pc(&mut self, pc: u64) {
        self.pc = pc;
    }

    pub(crate) fn x(&self, n: usize) -> u64 {
        match (&self.regs, &self.cpu) {
            (Some((regs, _)), _) => regs.x[n],
            (None, Some((_, cpu))) => cpu.x(n as u32),
            (None, None) => 0,
        }
    }

    pub(crate) fn set_x(&mut self, n: usize, value: u64) {
        match (&mut self.regs, &mut self.cpu) {
            (Some((regs, newer)), _) => {
                regs.x[n] = value;
                *newer = true;
            }
            (None, Some((_, cpu))) => cpu.set_x(n as u32, value),
            (None, None) => {}
        }
    }

    /// All registers, for reading.
    pub(crate) fn regs(&mut self) -> &CpuState {
        let Self { regs, cpu, .. } = self;
        &regs
            .get_or_insert_with(|| match cpu {
                Some((_, cpu)) => (cpu.state(), false),
                None => (reset(), true),
            })
            .0
    }

    /// All registers, for changing.
    pub(crate) fn regs_mut(&mut self) -> &mut CpuState {
        self.regs();
        match &mut self.regs {
            Some((regs, newer)) => {
                *newer = true;
                regs
            }
            None => unreachable!("they were just taken"),
        }
    }

    pub(crate) fn set_pstate(&mut self, pstate: u64) {
        self.regs_mut().pstate = pstate;
        // Who sets it puts the vCPU somewhere else altogether.
        self.expected = Pc::Free;
        self.loading = None;
    }

    pub(crate) fn run(&mut self) -> Answer {
        let (Some(mpidr), Some(index)) = (self.mpidr, self.entry.index()) else {
            return Err(violation("a run without MPIDR_EL1"));
        };
        let chip = gic::chip()?;
        if host().sme && !self.sme_hidden {
            return Err(violation("a guest sees SME, whose registers nobody saves"));
        }
        if host().timer_exits && self.timer_masked {
            return Err(violation("a run with the timer masked since it left the guest"));
        }
        if let Some(exit) = rules::exit_this_run() {
            self.expected = Pc::Free;
            return self.leave(exit.reason, exit.syndrome, exit.address);
        }
        if self.entry.exit_requested.swap(false, Ordering::SeqCst) || rules::cancel_this_run() {
            return self.leave(hv::hv_exit_reason_t::CANCELED, 0, 0);
        }
        self.check_pc()?;
        let shared = self.enter()?;
        let done =
            self.prepare(&shared, mpidr, index, &chip).and_then(|()| self.execute(index, &chip));
        self.entry.running.store(false, Ordering::SeqCst);
        done
    }

    fn check_pc(&mut self) -> Answer {
        let expected = std::mem::replace(&mut self.expected, Pc::Free);
        let pc = self.pc;
        match expected {
            Pc::Behind(at) if pc != at + 4 => {
                let why = format!("PC is {pc:#x} after the instruction at {at:#x} was carried out");
                Err(violation(why))
            }
            Pc::At(at) if pc != at => {
                Err(violation(format!("PC is {pc:#x}, and the guest must go on at {at:#x}")))
            }
            _ => Ok(()),
        }
    }

    /// Marks the vCPU as running, and lets the counter follow its offset.
    fn enter(&mut self) -> Answer<Arc<Shared>> {
        let (entry, offset) = (&self.entry, self.offset);
        vm::with(|vm| {
            if vm.offset != Some(offset) {
                if gic::is_running(vm) {
                    return Err(violation("vCPUs run with different offsets of the counter"));
                }
                vm.counter.stop();
                vm.counter.set(time::mach_absolute_time().wrapping_sub(offset));
                vm.counter.start();
                vm.offset = Some(offset);
            }
            vm.ran = true;
            entry.running.store(true, Ordering::SeqCst);
            Ok(vm.shared())
        })
    }

    /// Gives the CPU what was set since the last run.
    fn prepare(&mut self, shared: &Arc<Shared>, mpidr: u64, index: u32, chip: &Chip) -> Answer {
        if !self.cpu.as_ref().is_some_and(|(made_for, _)| Arc::ptr_eq(made_for, shared)) {
            self.regs_mut();
            let cpu = Cpu::new(shared, mpidr);
            chip.connect(index, &cpu.signals());
            self.entry.connect(cpu.signals());
            self.cpu = Some((Arc::clone(shared), cpu));
        }
        if let Some((_, cpu)) = &self.cpu
            && self.pc != cpu.pc()
        {
            self.regs_mut();
        }
        let Some((_, cpu)) = &mut self.cpu else { return Err(BAD_ARGUMENT) };
        if let Some(register) = self.loading.take() {
            let value = match (&self.regs, register) {
                (_, 31) => 0,
                (Some((regs, _)), n) => regs.x[usize::from(n)],
                (None, n) => cpu.x(n.into()),
            };
            cpu.complete_mmio_read(value);
        }
        if let Some((mut regs, true)) = self.regs.take() {
            regs.pc = self.pc;
            // The CPU tells of its timers' lines when they are not low.
            chip.gic.set_ppi(index, map::CNTV_INTID, false);
            chip.gic.set_ppi(index, map::CNTP_INTID, false);
            if let Err(error) = cpu.set_state(&regs) {
                violation(format!("a state that no CPU has: {error}"));
                return Err(hv::hv_error_t::HV_ILLEGAL_GUEST_STATE as hv::hv_return_t);
            }
        }
        Ok(())
    }

    fn execute(&mut self, index: u32, chip: &Chip) -> Answer {
        loop {
            let allowance = time::allowance();
            if allowance == Some(0) {
                time::stand_still(&self.entry.exit_requested);
            }
            let Some((_, cpu)) = &mut self.cpu else { return Err(BAD_ARGUMENT) };
            let limit = allowance.map(|allowance| cpu.retired() + allowance);
            let exit = time::account(cpu, &self.counter, |cpu| cpu.run(limit));
            let pc = cpu.pc();
            self.pc = pc;
            // Behind the instruction, in all exits but a memory fault.
            let at = pc.wrapping_sub(4);
            match exit {
                Exit::MmioRead { address, size } => {
                    if let Some((frame, offset)) = chip.frame(address) {
                        let last = chip.last_bit(address)?;
                        cpu.complete_mmio_read(frame.mmio_read(offset, size) | last);
                        continue;
                    }
                    return self.abort(at, address, false);
                }
                Exit::MmioWrite { address, size, value } => {
                    if let Some((frame, offset)) = chip.frame(address) {
                        frame.mmio_write(offset, size, value);
                        continue;
                    }
                    return self.abort(at, address, true);
                }
                Exit::Memory { address, write } => {
                    self.expected = Pc::At(pc);
                    let instruction = cpu.instruction_at(pc);
                    let class = if instruction.is_none() { INSTRUCTION_ABORT } else { DATA_ABORT };
                    let readable = vm::with(|vm| Ok(vm.is_readable(address)))?;
                    let fault = if readable { PERMISSION_FAULT } else { TRANSLATION_FAULT };
                    if readable
                        && write
                        && let Some(walk) = rules::walk()
                    {
                        let fetch = walk == Walk::Fetch;
                        let class = if fetch { INSTRUCTION_ABORT } else { DATA_ABORT };
                        return self.trap(decode::syndrome(class, S1PTW | fault), address);
                    }
                    let iss = decode::access(instruction, write) | fault;
                    return self.trap(decode::syndrome(class, iss), address);
                }
                Exit::SysRegRead { reg } => match chip.gic.icc_read(index, reg.0) {
                    Some(value) => cpu.complete_sysreg_read(value),
                    None => return self.system(at, reg, true),
                },
                Exit::SysRegWrite { reg, value } => {
                    if !chip.gic.icc_write(index, reg.0, value) {
                        return self.system(at, reg, false);
                    }
                }
                Exit::Hvc { imm } => {
                    self.expected = Pc::At(pc);
                    return self.trap(decode::syndrome(HVC, imm.into()), 0);
                }
                Exit::Smc { imm } => {
                    self.carried_out(at);
                    return self.trap(decode::syndrome(SMC, imm.into()), 0);
                }
                // With its own interrupt controller the framework sleeps itself.
                Exit::Wfi if !host().shows_wfi => {
                    self.entry.asleep.store(true, Ordering::SeqCst);
                    self.sleep();
                    self.entry.asleep.store(false, Ordering::SeqCst);
                }
                Exit::Wfi => {
                    self.carried_out(at);
                    // Whether to sleep is the caller's affair: a guest that runs again has been woken.
                    self.regs_mut().waiting = false;
                    return self.trap(decode::syndrome(WFX, 0), 0);
                }
                Exit::TimerLines { virt, phys } => {
                    self.timer_line = virt || phys;
                    chip.gic.set_ppi(index, map::CNTV_INTID, virt);
                    chip.gic.set_ppi(index, map::CNTP_INTID, phys);
                    if virt && host().timer_exits {
                        self.timer_masked = true;
                        return self.leave(hv::hv_exit_reason_t::VTIMER_ACTIVATED, 0, 0);
                    }
                }
                Exit::Limit => {}
                Exit::Kicked => {
                    self.entry.exit_requested.store(false, Ordering::SeqCst);
                    return self.leave(hv::hv_exit_reason_t::CANCELED, 0, 0);
                }
            }
        }
    }

    /// Waits for an interrupt, the timer or [`hv_vcpus_exit`](hv::hv_vcpus_exit).
    fn sleep(&mut self) {
        let Some((_, cpu)) = &mut self.cpu else { return };
        let counter = &self.counter;
        // One that has fired and did not end the sleep never will.
        match cpu.next_timer().filter(|at| *at > counter.now() || !self.timer_line) {
            Some(at) if counter.is_deterministic() => {
                time::account(cpu, counter, |cpu| cpu.skip_to(at));
            }
            Some(_) => cpu.signals().wait(cpu.until_timer()),
            None => cpu.signals().wait(None),
        }
    }

    /// The caller carries out the instruction at `at`.
    fn carried_out(&mut self, at: u64) {
        self.pc = at;
        self.expected = Pc::Behind(at);
    }

    /// An access to a device.
    fn abort(&mut self, at: u64, address: u64, write: bool) -> Answer {
        let Some(instruction) = self.instruction(at) else { return self.again(at) };
        self.carried_out(at);
        let report = rules::report_this(|report| match report {
            Report::Hidden => true,
            Report::CacheMaintenance => write,
        });
        if report == Some(Report::CacheMaintenance) {
            let iss = CACHE_MAINTENANCE | TRANSLATION_FAULT;
            return self.trap(decode::syndrome(DATA_ABORT, iss), address);
        }
        if !write {
            self.loading = Some((instruction & 31) as u8);
        }
        let shown = report.is_none().then_some(instruction);
        let iss = decode::access(shown, write) | TRANSLATION_FAULT;
        self.trap(decode::syndrome(DATA_ABORT, iss), address)
    }

    fn system(&mut self, at: u64, reg: SysReg, read: bool) -> Answer {
        let Some(instruction) = self.instruction(at) else { return self.again(at) };
        self.carried_out(at);
        let register = (instruction & 31) as u8;
        if read {
            self.loading = Some(register);
        }
        self.trap(decode::syndrome(SYSTEM, decode::system(reg.0, register, read)), 0)
    }

    fn instruction(&self, at: u64) -> Option<u32> {
        self.cpu.as_ref().and_then(|(_, cpu)| cpu.instruction_at(at))
    }

    /// The code was taken away since: the CPU forgets the instruction, and executes it again.
    fn again(&mut self, at: u64) -> Answer {
        self.regs_mut();
        self.pc = at;
        self.expected = Pc::At(at);
        self.leave(hv::hv_exit_reason_t::CANCELED, 0, 0)
    }

    fn trap(&mut self, syndrome: u64, address: u64) -> Answer {
        self.leave(hv::hv_exit_reason_t::EXCEPTION, syndrome, address)
    }

    /// Without a reason to look at it, the syndrome is nonsense.
    fn leave(
        &mut self,
        reason: hv::hv_exit_reason_t,
        syndrome: u64,
        physical_address: u64,
    ) -> Answer {
        let nonsense = reason != hv::hv_exit_reason_t::EXCEPTION;
        let syndrome = if nonsense { u64::MAX } else { syndrome };
        let exception =
            hv::hv_vcpu_exit_exception_t { syndrome, virtual_address: 0, physical_address };
        // SAFETY: the structure lives until the vCPU is destroyed, and is only used by this thread.
        unsafe { self.exit.write(hv::hv_vcpu_exit_t { reason, exception }) };
        Ok(())
    }
}

/// A software CPU out of reset.
fn reset() -> CpuState {
    let nowhere = Box::leak(Box::new([0u8; 0]));
    // SAFETY: no address is in a RAM of no bytes.
    let ram = unsafe { Ram::new(nowhere.as_mut_ptr(), 0, 0, Arc::new(())) };
    Cpu::new(&Shared::new(ram, Arc::new(Counter::host(0))), 0).state()
}
