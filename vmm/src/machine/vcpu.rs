//! The thread of one vCPU.

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering, mpsc},
};

use parking_lot::Mutex;
use squib_devices::{bus::Bus, map::Range, memory::GuestRam};

use super::{
    gate::{Gate, Next},
    types::{Crash, Outcome, Timings},
};
use crate::{
    hypervisor::{Exit, HypervisorError, Vcpu, Vm},
    psci::{Action, Psci},
};

/// Addresses without a device that are remembered, so that each is reported once.
const MOST_UNCLAIMED: usize = 256;

/// What all vCPU threads of a machine share.
pub(super) struct Board {
    pub(super) vm: Arc<dyn Vm>,
    pub(super) ram: GuestRam,
    pub(super) bus: Bus,
    pub(super) psci: Arc<Psci>,
    pub(super) gate: Gate,
    pub(super) timings: Arc<Timings>,
    pub(super) unclaimed: Mutex<HashSet<u64>>,
    /// Whether the guest's kernel asks for a warm reset after a panic only.
    pub(super) panic_is_warm: bool,
}

/// Body of the thread of vCPU `index`. `ready` hears whether it could be made.
pub(super) fn vcpu_thread(
    board: &Board,
    index: u32,
    ready: mpsc::SyncSender<Result<(), HypervisorError>>,
) {
    let _farewell = Farewell { board, index };
    let mut vcpu = match board.vm.create_vcpu(index) {
        Ok(vcpu) => vcpu,
        Err(error) => {
            // The builder waits for this answer.
            let _ = ready.send(Err(error));
            return;
        }
    };
    board.gate.enter(index, vcpu.kick());
    let _ = ready.send(Ok(()));
    drop(ready);
    let runner = Runner { board, index, limit: None };
    runner.serve(&mut *vcpu);
}

struct Runner<'a> {
    board: &'a Board,
    index: u32,
    limit: Option<u64>,
}

impl Runner<'_> {
    fn serve(mut self, vcpu: &mut dyn Vcpu) {
        loop {
            match self.board.gate.park(self.index, vcpu) {
                Next::Exit => return,
                Next::Run { limit } => self.limit = limit,
            }
            match self.run(vcpu) {
                Ok(()) => {}
                // Whoever met it first ends the machine too, perhaps a moment later.
                Err(HypervisorError::Memory(unavailable)) => {
                    self.board.gate.end(Outcome::Damaged(unavailable));
                }
                Err(error) => {
                    let (vcpu, pc, why) = (self.index, vcpu.pc().ok(), error.to_string());
                    let crash = Crash { vcpu, pc, why };
                    tracing::error!("{crash}");
                    self.board.gate.end(Outcome::Crashed(crash));
                }
            }
        }
    }

    /// Runs until the gate is closed.
    fn run(&self, vcpu: &mut dyn Vcpu) -> Result<(), HypervisorError> {
        let board = self.board;
        let park = board.gate.must_park();
        // After a restore it may be off, or switched on without having begun.
        if !self.begin(vcpu)? {
            return Ok(());
        }
        board.timings.mark_first_instruction();
        while !park.load(Ordering::Acquire) {
            match vcpu.run(self.limit)? {
                Exit::MmioRead { address, size } => {
                    let value = board.bus.read(address, size);
                    vcpu.complete_read(value.unwrap_or_else(|| {
                        self.report_unclaimed("read", address);
                        0
                    }))?;
                }
                Exit::MmioWrite { address, size, value } => {
                    if !board.bus.write(address, size, value) {
                        self.report_unclaimed("write", address);
                    }
                }
                Exit::MemoryFault { address, write } => self.memory_fault(address, write)?,
                Exit::Hypercall { imm } => {
                    if !self.hypercall(vcpu, imm)? {
                        return Ok(());
                    }
                }
                Exit::WaitForInterrupt => self.wait(vcpu)?,
                Exit::Limit => board.gate.stop_here(false),
                Exit::Cancelled => {}
            }
        }
        Ok(())
    }

    /// Waits until the access is allowed, and tells the backend. If the bytes cannot be had the error ends
    /// the machine: the guest never sees others in their place.
    fn memory_fault(&self, address: u64, write: bool) -> Result<(), HypervisorError> {
        let ram = &self.board.ram;
        let granules = ram.granules();
        let Some(offset) = address.checked_sub(ram.base()).filter(|at| *at < ram.size()) else {
            return Err(HypervisorError::NotRam { address });
        };
        granules.allow(offset, 1, write)?;
        let size = granules.granule_size();
        let start = offset & !(size - 1);
        let range = Range { base: ram.base() + start, size: size.min(ram.size() - start) };
        self.board.vm.grant(range, write)
    }

    /// Waits until the vCPU is on. False if the gate was closed meanwhile.
    fn begin(&self, vcpu: &mut dyn Vcpu) -> Result<bool, HypervisorError> {
        // With a limit there is one vCPU, and nobody who could switch it on.
        if self.limit.is_some() && self.board.psci.is_off(self.index) {
            self.board.gate.stop_here(true);
            return Ok(false);
        }
        match self.board.psci.wait_until_on(self.index, self.board.gate.must_park()) {
            Ok(Some((entry, context))) => {
                vcpu.start(entry, context)?;
                Ok(true)
            }
            Ok(None) => Ok(true),
            Err(_) => Ok(false),
        }
    }

    /// Carries out a hypercall. False if the thread must go to the gate.
    fn hypercall(&self, vcpu: &mut dyn Vcpu, imm: u16) -> Result<bool, HypervisorError> {
        let args = [vcpu.x(0)?, vcpu.x(1)?, vcpu.x(2)?, vcpu.x(3)?];
        match self.board.psci.call(self.index, imm, args) {
            Action::Return(value) => vcpu.set_x(0, value)?,
            Action::Standby => {
                vcpu.set_x(0, 0)?;
                self.wait(vcpu)?;
            }
            Action::Off => return self.begin(vcpu),
            Action::SystemOff => self.board.gate.end(Outcome::PowerOff),
            Action::SystemReset => self.board.gate.end(Outcome::Reset),
            Action::WarmReset if self.board.panic_is_warm => self.board.gate.end(Outcome::Panic),
            Action::WarmReset => self.board.gate.end(Outcome::Reset),
        }
        Ok(true)
    }

    /// Sleeps. With a limit, nothing comes from outside: then a guest that sleeps for ever stops the run.
    fn wait(&self, vcpu: &mut dyn Vcpu) -> Result<(), HypervisorError> {
        let block = self.limit.is_none();
        if !vcpu.wait(block)? && !block {
            self.board.gate.stop_here(true);
        }
        Ok(())
    }

    fn report_unclaimed(&self, access: &str, address: u64) {
        let mut seen = self.board.unclaimed.lock();
        if seen.len() < MOST_UNCLAIMED && seen.insert(address) {
            tracing::debug!("vCPU {}: {access} at {address:#x}, where no device is", self.index);
        }
    }
}

/// Tells the gate when the thread ends, however it ends.
struct Farewell<'a> {
    board: &'a Board,
    index: u32,
}

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        let crash = std::thread::panicking().then(|| Crash {
            vcpu: self.index,
            pc: None,
            why: "its thread panicked, which is a bug".to_owned(),
        });
        self.board.gate.leave(self.index, crash);
    }
}
