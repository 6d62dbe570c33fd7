//! A backend whose vCPUs do what a test tells them.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use squib_devices::{device::MachineDevice, irq::IrqChip, map::Range};
use squib_formats::{
    first_version,
    persist::{Section, Versioned},
};

use crate::{
    config::BackendKind,
    hypervisor::{CpuIdentity, Exit, HypervisorError, Kick, SystemCounter, Vcpu, VcpuState, Vm},
};

/// What a vCPU does next.
pub(super) enum Step {
    /// Leaves the guest.
    Exit(Exit),
    /// Fails.
    Fail,
    /// Panics.
    Panic,
}

/// One vCPU as a test sees it.
#[derive(Default)]
pub(super) struct Puppet {
    state: Mutex<Strings>,
    changed: Condvar,
}

#[derive(Default)]
struct Strings {
    steps: VecDeque<Step>,
    kicked: bool,
    /// Kicks do not reach the guest.
    deaf: bool,
    runs: u64,
    timer_due: bool,
    registers: Option<VcpuState>,
    reads: Vec<u64>,
    entered: Option<(u64, u64)>,
}

impl Puppet {
    pub(super) fn push(&self, step: Step) {
        self.state.lock().steps.push_back(step);
        self.changed.notify_all();
    }

    pub(super) fn set_deaf(&self, deaf: bool) {
        self.state.lock().deaf = deaf;
        self.changed.notify_all();
    }

    /// The guest does not take its timer's interrupt.
    pub(super) fn set_timer_due(&self, due: bool) {
        self.state.lock().timer_due = due;
    }

    /// Waits until the guest has been entered more than `before` times.
    pub(super) fn wait_run(&self, before: u64) {
        let mut state = self.state.lock();
        while state.runs <= before {
            self.changed.wait(&mut state);
        }
    }

    pub(super) fn runs(&self) -> u64 {
        self.state.lock().runs
    }

    /// Values that loads got.
    pub(super) fn reads(&self) -> Vec<u64> {
        self.state.lock().reads.clone()
    }

    /// Waits until the vCPU was started; where, and with which x0.
    pub(super) fn wait_entered(&self) -> (u64, u64) {
        let mut state = self.state.lock();
        loop {
            match state.entered {
                Some(entered) => return entered,
                None => self.changed.wait(&mut state),
            }
        }
    }
}

impl Kick for Puppet {
    fn kick(&self) {
        self.state.lock().kicked = true;
        self.changed.notify_all();
    }
}

/// The backend.
pub(super) struct FakeVm {
    pub(super) puppets: Vec<Arc<Puppet>>,
    pub(super) counter: Arc<FakeCounter>,
    pub(super) chip: Arc<FakeChip>,
    /// A device's interrupt was not taken.
    pub(super) lost: AtomicBool,
}

impl FakeVm {
    pub(super) fn new(vcpus: u32) -> Arc<Self> {
        let puppets = (0..vcpus).map(|_| Arc::default()).collect();
        let lost = AtomicBool::new(false);
        Arc::new(Self { puppets, counter: Arc::default(), chip: Arc::default(), lost })
    }
}

#[derive(Default)]
pub(super) struct FakeCounter {
    pub(super) value: AtomicU64,
    pub(super) running: AtomicBool,
    /// What it was set to.
    pub(super) sets: Mutex<Vec<u64>>,
}

#[derive(Default)]
pub(super) struct FakeChip {
    /// INTIDs of rising edges.
    pub(super) raised: Mutex<Vec<u32>>,
}

#[derive(Serialize, Deserialize)]
struct FakeChipState {
    raised: Vec<u32>,
}

first_version!(FakeChipState, "fake-chip");

impl IrqChip for FakeChip {
    fn set_spi(&self, intid: u32, level: bool) {
        if level {
            self.raised.lock().push(intid);
        }
    }
}

impl SystemCounter for FakeCounter {
    fn frequency(&self) -> u64 {
        1000
    }

    fn now(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }

    fn start(&self) {
        self.running.store(true, Ordering::Relaxed);
    }

    fn stop(&self) {
        self.running.store(false, Ordering::Relaxed);
    }

    fn set(&self, ticks: u64) {
        self.sets.lock().push(ticks);
        self.value.store(ticks, Ordering::Relaxed);
    }
}

impl Vm for FakeVm {
    fn check(&self) -> Result<(), HypervisorError> {
        match self.lost.load(Ordering::Relaxed) {
            true => Err(HypervisorError::Call { call: "set_spi", why: "told to".into() }),
            false => Ok(()),
        }
    }

    fn identity(&self) -> CpuIdentity {
        CpuIdentity { backend: BackendKind::Soft, counter_hz: 1000, id_registers: Vec::new() }
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, HypervisorError> {
        match self.puppets.get(index as usize) {
            Some(puppet) => {
                Ok(Box::new(FakeVcpu { puppet: Arc::clone(puppet), state: empty_state() }))
            }
            None => Err(HypervisorError::Call { call: "create_vcpu", why: "no puppet".into() }),
        }
    }

    fn irq_chip(&self) -> Arc<dyn IrqChip> {
        Arc::clone(&self.chip) as Arc<dyn IrqChip>
    }

    fn irq_chip_frames(&self) -> Vec<(Range, Arc<dyn MachineDevice>)> {
        Vec::new()
    }

    fn irq_chip_kind(&self) -> &'static str {
        FakeChipState::KIND
    }

    fn save_irq_chip(&self) -> Result<Section, HypervisorError> {
        Ok(Section::encode("0", &FakeChipState { raised: self.chip.raised.lock().clone() })?)
    }

    fn restore_irq_chip(&self, section: &Section) -> Result<(), HypervisorError> {
        *self.chip.raised.lock() = section.decode::<FakeChipState>()?.raised;
        Ok(())
    }

    fn write_protect(&self) -> Result<(), HypervisorError> {
        Ok(())
    }

    fn grant(&self, _: Range, _: bool) -> Result<(), HypervisorError> {
        Ok(())
    }

    fn counter(&self) -> Arc<dyn SystemCounter> {
        Arc::clone(&self.counter) as Arc<dyn SystemCounter>
    }
}

struct FakeVcpu {
    puppet: Arc<Puppet>,
    state: VcpuState,
}

fn empty_state() -> VcpuState {
    VcpuState {
        x: [0; 31],
        sp_el0: 0,
        sp_el1: 0,
        pc: 0,
        pstate: 0,
        v: [0; 32],
        fpcr: 0,
        fpsr: 0,
        sysregs: Vec::new(),
        exclusive: None,
        waiting: false,
        retired: 0,
    }
}

impl Vcpu for FakeVcpu {
    fn kick(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.puppet) as Arc<dyn Kick>
    }

    fn run(&mut self, _limit: Option<u64>) -> Result<Exit, HypervisorError> {
        let mut state = self.puppet.state.lock();
        state.runs += 1;
        self.puppet.changed.notify_all();
        loop {
            if state.kicked && !state.deaf {
                state.kicked = false;
                return Ok(Exit::Cancelled);
            }
            match state.steps.pop_front() {
                Some(Step::Exit(exit)) => return Ok(exit),
                Some(Step::Fail) => {
                    return Err(HypervisorError::Call { call: "run", why: "told to".into() });
                }
                Some(Step::Panic) => panic!("told to"),
                None => self.puppet.changed.wait(&mut state),
            }
        }
    }

    fn complete_read(&mut self, value: u64) -> Result<(), HypervisorError> {
        self.puppet.state.lock().reads.push(value);
        Ok(())
    }

    fn wait(&mut self, _block: bool) -> Result<bool, HypervisorError> {
        let mut state = self.puppet.state.lock();
        while !state.kicked && state.steps.is_empty() {
            self.puppet.changed.wait(&mut state);
        }
        Ok(true)
    }

    fn timer_due(&mut self) -> Result<bool, HypervisorError> {
        Ok(self.puppet.state.lock().timer_due)
    }

    fn x(&mut self, n: u8) -> Result<u64, HypervisorError> {
        Ok(self.state.x[usize::from(n)])
    }

    fn set_x(&mut self, n: u8, value: u64) -> Result<(), HypervisorError> {
        self.state.x[usize::from(n)] = value;
        Ok(())
    }

    fn start(&mut self, pc: u64, x0: u64) -> Result<(), HypervisorError> {
        self.state = VcpuState { pc, ..empty_state() };
        self.state.x[0] = x0;
        self.puppet.state.lock().entered = Some((pc, x0));
        self.puppet.changed.notify_all();
        Ok(())
    }

    fn pc(&mut self) -> Result<u64, HypervisorError> {
        Ok(self.state.pc)
    }

    fn retired(&mut self) -> Option<u64> {
        None
    }

    fn save(&mut self) -> Result<VcpuState, HypervisorError> {
        Ok(self.state.clone())
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), HypervisorError> {
        self.state = state.clone();
        self.puppet.state.lock().registers = Some(state.clone());
        Ok(())
    }
}
