//! The software CPU with the GICv3 model beside it.

use std::sync::{Arc, OnceLock};

use squib_devices::{
    device::MachineDevice,
    gic::{CpuOutputs, Gic, GicDistributor, GicRedistributors, GicState, affinity},
    granules,
    irq::IrqChip,
    map::{self, Range},
    memory::GuestRam,
};
use squib_formats::persist::{PersistError, Section, Versioned};
use squib_soft::{
    CNTFRQ_HZ, Counter, Cpu, CpuState, Granules, Ram, Shared, Signals, StateError, SysReg,
};

use super::{
    Backend, CpuIdentity, ExclusiveMonitor, Exit, HypervisorError, Kick, Limits, SystemCounter,
    Vcpu, VcpuState, Vm,
};
use crate::config::{BackendKind, MEMORY_MAX, MachineConfig};

// Both sides look at the same bytes.
const _: () = assert!(
    squib_soft::READABLE == granules::READABLE && squib_soft::WRITABLE == granules::WRITABLE
);

/// MPIDR_EL1 bit 31, RES1.
const MPIDR_RES1: u64 = 1 << 31;

/// A deterministic machine does not sleep on to a timer beyond this, 146 years: the guest means never, and a
/// machine on the host's clock would not live to see it either.
const NEVER: u64 = 1 << 62;

/// A machine of software CPUs.
pub struct SoftVm {
    shared: Arc<Shared>,
    counter: Arc<Counter>,
    gic: Arc<Gic>,
    inputs: Arc<Inputs>,
}

impl SoftVm {
    /// A machine of `vcpus` CPUs on `ram`. Its counter follows the host's clock, or with
    /// `deterministic` counts the instructions of its one CPU; it is stopped at zero.
    pub fn new(vcpus: u32, ram: &GuestRam, deterministic: bool) -> Self {
        let counter =
            Arc::new(if deterministic { Counter::instructions(0) } else { Counter::host(0) });
        // SAFETY: the mapping is page-aligned, `size` bytes long and lives as long as the clone that
        // is kept; `GuestRam` hands out no references to its bytes.
        let view =
            unsafe { Ram::new(ram.host_ptr(), ram.size(), ram.base(), Arc::new(ram.clone())) };
        let (access, shift) = ram.rights();
        let view = view.with_granules(Granules { access, shift });
        let inputs = Arc::new(Inputs { vcpus: (0..vcpus).map(|_| OnceLock::new()).collect() });
        let gic = Gic::new(vcpus, Arc::clone(&inputs) as Arc<dyn CpuOutputs>);
        Self { shared: Shared::new(view, Arc::clone(&counter)), counter, gic, inputs }
    }

    /// What the guest sees of its CPUs; the same in every machine of this build.
    pub fn identity() -> CpuIdentity {
        let mut id_registers: Vec<_> = squib_soft::id_registers()
            .into_iter()
            .map(|(SysReg(reg), value)| (reg, value))
            .collect();
        id_registers.sort_unstable();
        CpuIdentity { backend: BackendKind::Soft, counter_hz: CNTFRQ_HZ, id_registers }
    }
}

/// The software CPU as a backend.
pub(super) struct Soft;

impl Backend for Soft {
    fn create(
        &self,
        config: &MachineConfig,
        ram: &GuestRam,
    ) -> Result<Arc<dyn Vm>, HypervisorError> {
        Ok(Arc::new(SoftVm::new(config.vcpus, ram, config.deterministic.is_some())))
    }

    fn identity(&self) -> Result<CpuIdentity, HypervisorError> {
        Ok(SoftVm::identity())
    }

    fn limits(&self) -> Result<Limits, HypervisorError> {
        Ok(Limits { vcpus: map::MAX_VCPUS, memory: MEMORY_MAX })
    }

    fn host_build(&self) -> Option<String> {
        None
    }
}

impl Vm for SoftVm {
    fn identity(&self) -> CpuIdentity {
        Self::identity()
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, HypervisorError> {
        let cpu = Cpu::new(&self.shared, MPIDR_RES1 | affinity(index));
        let slot = self.inputs.vcpus.get(index as usize);
        if slot.is_none_or(|slot| slot.set(cpu.signals()).is_err()) {
            return Err(HypervisorError::Call {
                call: "create_vcpu",
                why: format!("vCPU {index} exists already or is none of this machine"),
            });
        }
        let (gic, counter) = (Arc::clone(&self.gic), Arc::clone(&self.counter));
        Ok(Box::new(SoftVcpu { index, cpu, gic, counter, timer_line: false, fresh: false }))
    }

    fn irq_chip(&self) -> Arc<dyn IrqChip> {
        Arc::clone(&self.gic) as Arc<dyn IrqChip>
    }

    fn irq_chip_frames(&self) -> Vec<(Range, Arc<dyn MachineDevice>)> {
        let gicr =
            Range { base: map::GICR.base, size: self.inputs.vcpus.len() as u64 * map::GICR_STRIDE };
        vec![
            (map::GICD, Arc::new(GicDistributor(Arc::clone(&self.gic)))),
            (gicr, Arc::new(GicRedistributors(Arc::clone(&self.gic)))),
        ]
    }

    fn irq_chip_kind(&self) -> &'static str {
        GicState::KIND
    }

    fn save_irq_chip(&self) -> Result<Section, HypervisorError> {
        Ok(self.gic.save_section("0")?)
    }

    fn restore_irq_chip(&self, section: &Section) -> Result<(), HypervisorError> {
        Ok(self.gic.restore_section(section)?)
    }

    /// The CPUs look at the granules of the RAM themselves; only what they remember has to be forgotten.
    fn write_protect(&self) -> Result<(), HypervisorError> {
        self.shared.forget_translations();
        Ok(())
    }

    fn grant(&self, _: Range, _: bool) -> Result<(), HypervisorError> {
        Ok(())
    }

    fn counter(&self) -> Arc<dyn SystemCounter> {
        Arc::new(SoftCounter(Arc::clone(&self.counter)))
    }
}

/// The interrupt lines into the vCPUs, known once each has been made.
struct Inputs {
    vcpus: Vec<OnceLock<Arc<Signals>>>,
}

impl Inputs {
    fn of(&self, vcpu: u32) -> Option<&Arc<Signals>> {
        self.vcpus.get(vcpu as usize)?.get()
    }
}

impl CpuOutputs for Inputs {
    fn set_irq(&self, vcpu: u32, level: bool) {
        if let Some(signals) = self.of(vcpu) {
            signals.set_irq(level);
        }
    }

    fn set_fiq(&self, vcpu: u32, level: bool) {
        if let Some(signals) = self.of(vcpu) {
            signals.set_fiq(level);
        }
    }
}

struct SoftCounter(Arc<Counter>);

impl SystemCounter for SoftCounter {
    fn frequency(&self) -> u64 {
        CNTFRQ_HZ
    }

    fn now(&self) -> u64 {
        self.0.now()
    }

    fn start(&self) {
        self.0.start();
    }

    fn stop(&self) {
        self.0.stop();
    }

    fn set(&self, ticks: u64) {
        self.0.set(ticks);
    }

    fn lease(&self, ticks: u64) {
        self.0.lease(ticks);
    }
}

struct SoftKick(Arc<Signals>);

impl Kick for SoftKick {
    fn kick(&self) {
        self.0.kick();
    }
}

struct SoftVcpu {
    index: u32,
    cpu: Cpu,
    gic: Arc<Gic>,
    counter: Arc<Counter>,
    /// One of the timer outputs was high when the interrupt controller was last told.
    timer_line: bool,
    /// The state was taken over and has not run yet.
    fresh: bool,
}

impl Vcpu for SoftVcpu {
    fn kick(&self) -> Arc<dyn Kick> {
        Arc::new(SoftKick(self.cpu.signals()))
    }

    fn run(&mut self, limit: Option<u64>) -> Result<Exit, HypervisorError> {
        if std::mem::take(&mut self.fresh) {
            // The CPU reports its timers' outputs when they differ from low, and the interrupt
            // controller may have been saved before it heard of the last change.
            self.gic.set_ppi(self.index, map::CNTV_INTID, false);
            self.gic.set_ppi(self.index, map::CNTP_INTID, false);
        }
        loop {
            match self.cpu.run(limit) {
                squib_soft::Exit::MmioRead { address, size } => {
                    return Ok(Exit::MmioRead { address, size });
                }
                squib_soft::Exit::MmioWrite { address, size, value } => {
                    return Ok(Exit::MmioWrite { address, size, value });
                }
                squib_soft::Exit::Memory { address, write } => {
                    return Ok(Exit::MemoryFault { address, write });
                }
                squib_soft::Exit::Hvc { imm } => return Ok(Exit::Hypercall { imm }),
                // There is no EL3 to call.
                squib_soft::Exit::Smc { .. } => self.cpu.undefined(),
                squib_soft::Exit::SysRegRead { reg } => {
                    match self.gic.icc_read(self.index, reg.0) {
                        Some(value) => self.cpu.complete_sysreg_read(value),
                        None => self.undefined("MRS", reg),
                    }
                }
                squib_soft::Exit::SysRegWrite { reg, value } => {
                    if !self.gic.icc_write(self.index, reg.0, value) {
                        self.undefined("MSR", reg);
                    }
                }
                squib_soft::Exit::TimerLines { virt, phys } => {
                    self.gic.set_ppi(self.index, map::CNTV_INTID, virt);
                    self.gic.set_ppi(self.index, map::CNTP_INTID, phys);
                    self.timer_line = virt || phys;
                }
                squib_soft::Exit::Wfi => return Ok(Exit::WaitForInterrupt),
                squib_soft::Exit::Kicked => return Ok(Exit::Cancelled),
                squib_soft::Exit::Limit => return Ok(Exit::Limit),
            }
        }
    }

    fn complete_read(&mut self, value: u64) -> Result<(), HypervisorError> {
        self.cpu.complete_mmio_read(value);
        Ok(())
    }

    fn wait(&mut self, block: bool) -> Result<bool, HypervisorError> {
        let now = self.counter.now();
        let deadline = match self.cpu.next_timer() {
            // It has fired, and that did not end the wait: its interrupt is disabled.
            Some(at) if at <= now && self.timer_line => None,
            Some(at) if at > NEVER.max(now) => None,
            other => other,
        };
        match deadline {
            Some(at) if self.counter.is_deterministic() => self.cpu.skip_to(at),
            Some(_) => self.cpu.signals().wait(self.cpu.until_timer()),
            None if block => self.cpu.signals().wait(None),
            None => return Ok(false),
        }
        Ok(true)
    }

    fn timer_due(&mut self) -> Result<bool, HypervisorError> {
        Ok(self.cpu.next_timer().is_some_and(|at| at <= self.counter.now()))
    }

    fn x(&mut self, n: u8) -> Result<u64, HypervisorError> {
        Ok(self.cpu.x(n.into()))
    }

    fn set_x(&mut self, n: u8, value: u64) -> Result<(), HypervisorError> {
        self.cpu.set_x(n.into(), value);
        Ok(())
    }

    fn start(&mut self, pc: u64, x0: u64) -> Result<(), HypervisorError> {
        self.cpu.start(pc, x0);
        Ok(())
    }

    fn pc(&mut self) -> Result<u64, HypervisorError> {
        Ok(self.cpu.pc())
    }

    fn retired(&mut self) -> Option<u64> {
        Some(self.cpu.retired())
    }

    fn save(&mut self) -> Result<VcpuState, HypervisorError> {
        let CpuState {
            x,
            sp_el0,
            sp_el1,
            pc,
            pstate,
            v,
            fpcr,
            fpsr,
            sysregs,
            retired,
            exclusive,
            waiting,
        } = self.cpu.state();
        let monitor = |(address, size, value)| ExclusiveMonitor { address, size, value };
        Ok(VcpuState {
            x,
            sp_el0,
            sp_el1,
            pc,
            pstate,
            v,
            fpcr: fpcr.into(),
            fpsr: fpsr.into(),
            sysregs: sysregs.into_iter().map(|(SysReg(reg), value)| (reg, value)).collect(),
            exclusive: exclusive.map(monitor),
            waiting,
            retired,
        })
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), HypervisorError> {
        let VcpuState {
            x,
            sp_el0,
            sp_el1,
            pc,
            pstate,
            v,
            fpcr,
            fpsr,
            ref sysregs,
            exclusive,
            waiting,
            retired,
        } = *state;
        let low = |field, value: u64| {
            u32::try_from(value)
                .map_err(|_| invalid(field, format!("{value:#x} has bits above 31")))
        };
        let state = CpuState {
            x,
            sp_el0,
            sp_el1,
            pc,
            pstate,
            v,
            fpcr: low("fpcr", fpcr)?,
            fpsr: low("fpsr", fpsr)?,
            sysregs: sysregs.iter().map(|(reg, value)| (SysReg(*reg), *value)).collect(),
            retired,
            exclusive: exclusive
                .map(|ExclusiveMonitor { address, size, value }| (address, size, value)),
            waiting,
        };
        self.cpu.set_state(&state).map_err(|error| {
            let field = match error {
                StateError::Pstate(_) => "pstate",
                StateError::Fp { .. } => "fpcr, fpsr",
                StateError::Exclusive(_) => "exclusive",
                StateError::Unknown(_)
                | StateError::Missing(_)
                | StateError::Order(_)
                | StateError::Mpidr { .. } => "sysregs",
            };
            invalid(field, error.to_string())
        })?;
        self.fresh = true;
        Ok(())
    }
}

fn invalid(field: &'static str, why: String) -> PersistError {
    PersistError::invalid(VcpuState::KIND, field, why)
}

impl SoftVcpu {
    fn undefined(&mut self, instruction: &str, reg: SysReg) {
        tracing::debug!(vcpu = self.index, "{instruction} {reg} is undefined");
        self.cpu.undefined();
    }
}
