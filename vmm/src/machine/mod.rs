//! One machine: RAM, devices, vCPU threads.
//!
//! ```no_run
//! use std::time::Duration;
//! use squib_vmm::{config::MachineConfig, machine::{Machine, Outcome}};
//!
//! # fn main() -> Result<(), squib_vmm::machine::MachineError> {
//! let config = MachineConfig::new("vm", "/boot/Image");
//! let machine = Machine::boot(config, Box::new(std::io::stdout()))?;
//! machine.resume()?;
//! machine.pause(Duration::from_secs(2))?;
//! let sections = machine.save()?;
//! machine.resume()?;
//! assert_eq!(machine.wait(), Outcome::PowerOff);
//! # let _ = sections; Ok(()) }
//! ```
//!
//! A pause has three steps (and so has the way back, from the last to the first): vCPUs are kicked and
//! park at the gate; the counter stops; devices settle what is in flight. On a missed deadline
//! everything wakes again.

mod alarm;
mod build;
mod console;
mod devices;
mod gate;
mod places;
mod reboot;
#[cfg(test)]
mod tests;
mod time;
mod types;
mod vcpu;

use std::{
    any::Any,
    collections::BTreeMap,
    io::Write,
    sync::{Arc, OnceLock},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use squib_devices::{
    clock::Clock,
    device::MachineDevice,
    granules::Frozen,
    memory::{GuestRam, RamStore},
    virtio::block::DiskGranules,
    vmgenid::VmGenId,
};
use squib_formats::persist::{self, PersistError, Section};

pub use console::ConsoleInput;
pub use places::{Place, irq_chip, places};
pub use reboot::Reboot;
pub use types::{
    ClockPolicy, Contents, Crash, Identity, MachineError, Outcome, RestoreOptions, RunState,
    RunUntil, TimeAway, TimeState, Timings,
};

use self::{alarm::AlarmClock, console::Output, time::TimeKeeper, vcpu::Board};
use crate::{
    boot,
    config::MachineConfig,
    hypervisor::{CpuIdentity, HostSystem, HypervisorError, SystemCounter},
};

/// How long [`Machine::run_until`] gives devices to come to rest. A deterministic machine's devices
/// work inside register accesses and need no time at all.
const SETTLE: Duration = Duration::from_secs(10);
/// How long the end of a machine waits for the host to take console output.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long the end of a machine waits for a vCPU to leave the guest, which takes a moment unless the backend
/// fails.
const PARTING: Duration = Duration::from_secs(10);
/// A deadline so far away that it does not come.
const NEVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// A machine. All methods may be called from any thread.
pub struct Machine {
    config: MachineConfig,
    ram: GuestRam,
    board: Arc<Board>,
    devices: Vec<Part>,
    /// The granules of the disks of `config`, in their order.
    disks: Vec<Arc<DiskGranules>>,
    generation: Arc<Mutex<VmGenId>>,
    alarm: Arc<AlarmClock>,
    counter: Arc<dyn SystemCounter>,
    clock: Arc<dyn Clock>,
    keeper: Arc<TimeKeeper>,
    time_away: OnceLock<TimeAway>,
    console: ConsoleInput,
    output: Arc<Output>,
    /// Carries console output to the host; it may hang there.
    writer: Option<JoinHandle<()>>,
    threads: Vec<JoinHandle<()>>,
    /// Held through each change of the run state.
    control: Arc<Mutex<Control>>,
    /// Woken when the last hold is given back.
    released: Condvar,
    attached: Mutex<Vec<Box<dyn Any + Send>>>,
}

struct Control {
    paused: bool,
    /// Those who need it to stay paused.
    holds: u32,
}

/// Keeps a machine paused: see [`Machine::hold`].
pub struct Hold<'a>(&'a Machine);

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.0.control.lock().holds -= 1;
        self.0.released.notify_all();
    }
}

/// A device with the name of its section.
struct Part {
    instance: String,
    device: Arc<dyn MachineDevice>,
}

impl Machine {
    /// A paused machine whose first instruction is the kernel's. Its clock policy is
    /// [`ClockPolicy::Advance`]. What the guest writes to its console
    /// goes to `console`, from a thread of its own; while that is behind by 64 KiB the guest waits.
    pub fn boot(
        config: MachineConfig,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        Self::boot_with(config, BTreeMap::new(), console)
    }

    /// [`boot`](Self::boot) with the disks of these ids open already.
    fn boot_with(
        config: MachineConfig,
        disks: BTreeMap<String, Arc<DiskGranules>>,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        config.validate()?;
        let ram = GuestRam::new(config.memory)
            .map_err(|source| MachineError::Memory { size: config.memory, source })?;
        let mut machine = Self::assemble(config, Contents { ram, disks }, console)?;
        let entry = boot::load(&machine.config, &machine.ram)?;
        machine.config.kernel_digest = Some(entry.kernel_digest);
        machine.config.initrd_digest = entry.initrd_digest;
        if entry.page_size == boot::PageSize::Kib64 {
            let backend = machine.config.backend;
            return Err(MachineError::Granule { pages: entry.page_size, backend });
        }
        machine.first_identity()?;
        machine.keeper.set_policy(ClockPolicy::Advance);
        machine.on_vcpu(0, move |vcpu| vcpu.start(entry.pc, entry.fdt))??;
        machine.board.vm.check()?;
        Ok(machine)
    }

    /// A paused machine that goes on where `sections` were saved, with memory and disks of that moment as
    /// `contents`, whose bytes may still be on their way. Every section must have its place and every place its section.
    /// What the guest will see of its CPUs, [`hypervisor::identity`](crate::hypervisor::identity) says before.
    pub fn restore(
        config: MachineConfig,
        sections: Vec<Section>,
        options: RestoreOptions,
        contents: impl Into<Contents>,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        let machine = Self::assemble(config, contents.into(), console)?;
        let sections = machine.sort(sections)?;
        machine.take_over(sections, options)?;
        machine.board.vm.check()?;
        Ok(machine)
    }

    /// Lets a paused machine run. Waits while it is [held](Self::hold). Idempotent.
    pub fn resume(&self) -> Result<(), MachineError> {
        let mut control = self.unheld();
        self.check_alive()?;
        if control.paused {
            self.wake(None)?;
            control.paused = false;
        }
        Ok(())
    }

    /// Brings vCPUs, time and devices to rest within `deadline`. On an error the machine runs on.
    /// Idempotent.
    pub fn pause(&self, deadline: Duration) -> Result<(), MachineError> {
        let mut control = self.control.lock();
        self.check_alive()?;
        if control.paused {
            return Ok(());
        }
        let now = Instant::now();
        let until = now.checked_add(deadline).unwrap_or_else(|| now + NEVER);
        self.output.hurry(true);
        let closed = self.board.gate.close_until(until);
        self.output.hurry(false);
        // It may have ended on its way to the gate.
        self.check_alive()?;
        closed.map_err(|vcpus| MachineError::VcpuDeadline { vcpus, deadline })?;
        self.settle(until)?;
        control.paused = true;
        Ok(())
    }

    /// Keeps a paused machine paused until what this returns is dropped, so that its memory and disks
    /// can be read without anybody else letting it run. Whoever tries waits.
    pub fn hold(&self) -> Result<Hold<'_>, MachineError> {
        let mut control = self.control.lock();
        self.check_paused(&control, "be held")?;
        control.holds += 1;
        Ok(Hold(self))
    }

    /// The state of a paused machine but for its memory: devices, interrupt chip, vCPUs, time. Two
    /// calls in a row give equal sections, but for the wall clock's reading in the last one.
    pub fn save(&self) -> Result<Vec<Section>, MachineError> {
        let control = self.control.lock();
        self.check_paused(&control, "save its state")?;
        // A state without an interrupt that a device has raised waits for it for ever.
        self.board.vm.check()?;
        let mut sections = Vec::new();
        for Part { instance, device } in &self.devices {
            let name = || section_name(device.kind(), instance);
            sections.push(device.save(instance).map_err(|source| state_error(name(), source))?);
        }
        sections.push(
            self.encode("0", "vmgenid", || persist::save_section("0", &*self.generation.lock()))?,
        );
        let vm = &self.board.vm;
        let chip = vm.save_irq_chip();
        sections.push(chip.map_err(|error| chip_error(vm.irq_chip_kind(), error))?);
        sections.push(self.encode("0", "psci", || persist::save_section("0", &*self.board.psci))?);
        for index in 0..self.config.vcpus {
            let state = self.on_vcpu(index, |vcpu| vcpu.save())??;
            sections.push(self.encode(&index.to_string(), "vcpu", || {
                Section::encode(index.to_string(), &state)
            })?);
        }
        let time = self.time();
        sections.push(self.encode("0", "time", || Section::encode("0", &time))?);
        Ok(sections)
    }

    /// The memory of a paused machine as it is now, for reading while the machine goes on: what it writes to
    /// meanwhile is put aside, at most `limit` bytes; then it waits until they have been read.
    pub fn freeze(&self, limit: u64) -> Result<Frozen<RamStore>, MachineError> {
        let control = self.control.lock();
        self.check_paused(&control, "freeze its memory")?;
        let frozen = self.ram.granules().freeze(limit).ok_or(MachineError::Frozen)?;
        self.board.vm.write_protect()?;
        Ok(frozen)
    }

    /// Keeps `thing` for as long as the machine lives: what brings its memory, for example.
    pub fn attach(&self, thing: Box<dyn Any + Send>) {
        self.attached.lock().push(thing);
    }

    /// Runs a paused deterministic machine until exactly `retired` instructions have been retired since
    /// its boot, and pauses it there.
    pub fn run_until(&self, retired: u64) -> Result<RunUntil, MachineError> {
        let what = "run to an instruction count";
        let mut control = self.unheld();
        if self.config.deterministic.is_none() {
            return Err(MachineError::NotDeterministic { what });
        }
        self.check_paused(&control, what)?;
        if self.on_vcpu(0, |vcpu| vcpu.retired())?.is_some_and(|now| now >= retired) {
            return Ok(RunUntil::Reached);
        }
        self.wake(Some(retired))?;
        let idle = self.board.gate.wait_parked();
        // If that fails the machine runs on.
        control.paused = false;
        self.settle(Instant::now() + SETTLE)?;
        control.paused = true;
        self.output.drain(SETTLE);
        Ok(match self.board.gate.outcome() {
            Some(outcome) => RunUntil::Ended(outcome),
            None if idle => RunUntil::Idle,
            None => RunUntil::Reached,
        })
    }

    /// Instructions that each vCPU has retired since its boot, where the backend counts them. The
    /// machine must be paused.
    pub fn retired(&self) -> Result<Vec<Option<u64>>, MachineError> {
        let control = self.control.lock();
        self.check_paused(&control, "count its instructions")?;
        (0..self.config.vcpus).map(|n| self.on_vcpu(n, |vcpu| vcpu.retired())).collect()
    }

    /// Ends the machine without asking the guest. Its outcome is [`Outcome::Stopped`], unless it had
    /// ended before.
    pub fn stop(&self) {
        self.board.gate.end(Outcome::Stopped);
    }

    /// Waits until the machine ends.
    pub fn wait(&self) -> Outcome {
        loop {
            // Without a deadline it only comes back with an outcome.
            if let Some(outcome) = self.board.gate.wait_outcome(None) {
                return outcome;
            }
        }
    }

    /// Waits until the machine ends, at most for `timeout`.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Outcome> {
        self.board.gate.wait_outcome(Instant::now().checked_add(timeout))
    }

    /// Whether it runs.
    pub fn state(&self) -> RunState {
        match self.board.gate.outcome() {
            Some(outcome) => RunState::Ended(outcome),
            None if self.control.lock().paused => RunState::Paused,
            None => RunState::Running,
        }
    }

    /// What it is made of.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Its memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What is there of the disk of that id and what has changed. Its store is the file
    /// that was opened and locked, whatever lies at its path now.
    ///
    /// It may be frozen only while the machine is paused and [held](Self::hold).
    pub fn disk_granules(&self, id: &str) -> Option<&Arc<DiskGranules>> {
        let at = self.config.disks.iter().position(|disk| disk.id == id)?;
        self.disks.get(at)
    }

    /// What the guest sees of its CPUs.
    pub fn cpu_identity(&self) -> CpuIdentity {
        self.board.vm.identity()
    }

    /// What is known of the host's operating system, if the backend is a part of it.
    pub fn host_system(&self) -> Option<HostSystem> {
        self.board.vm.host_system()
    }

    /// What the next machine boots from, when this one has ended with a reset.
    pub fn reboot(&self) -> Reboot {
        Reboot::of(self)
    }

    /// When things first happened.
    pub fn timings(&self) -> &Timings {
        &self.board.timings
    }

    /// The way to the guest's console.
    pub fn console_input(&self) -> ConsoleInput {
        self.console.clone()
    }

    /// Waits until everything that the guest wrote to its console has reached the sink; false if that
    /// took longer than `timeout`.
    pub fn drain_console(&self, timeout: Duration) -> bool {
        self.output.drain(timeout)
    }

    /// What a restore made of the time since the save; none in a machine that was booted.
    pub fn time_away(&self) -> Option<TimeAway> {
        self.time_away.get().copied()
    }

    /// For the end: once the vCPUs of a machine that has ended are at rest, waits until everything that the
    /// guest wrote to its console has reached the sink. Gives up when that takes nothing for `stall`, or
    /// once `most` is over. Returns the number of bytes that are lost with that; a second call does not count them
    /// again.
    pub fn finish_console(&self, stall: Duration, most: Duration) -> usize {
        if self.board.gate.outcome().is_some() {
            // One that waits for room must come to the gate.
            self.output.hurry(true);
            // A vCPU that does not come is told of when the machine goes away.
            let _ = self.board.gate.close_until(Instant::now() + PARTING);
        }
        self.output.finish(stall, most)
    }

    /// The time that this machine saves now.
    pub fn time(&self) -> TimeState {
        TimeState {
            counter: self.counter.now(),
            frequency: self.counter.frequency(),
            wall_ns: self.clock.wall_ns(),
        }
    }

    fn encode(
        &self,
        instance: &str,
        kind: &str,
        encode: impl FnOnce() -> Result<Section, PersistError>,
    ) -> Result<Section, MachineError> {
        encode().map_err(|source| state_error(section_name(kind, instance), source))
    }

    /// The third step of a pause, or everything wakes again.
    fn settle(&self, until: Instant) -> Result<(), MachineError> {
        self.keeper.stopping();
        self.counter.stop();
        self.console.hold();
        for part in &self.devices {
            if let Err(error) = part.device.pause(until) {
                // Resuming a device that was not paused does nothing. An outcome keeps the vCPUs parked.
                let _ = self.wake(None);
                return Err(error.into());
            }
        }
        Ok(())
    }

    fn wake(&self, limit: Option<u64>) -> Result<(), MachineError> {
        for part in &self.devices {
            part.device.resume();
        }
        self.console.release();
        self.counter.start();
        self.keeper.started();
        self.board.gate.open(limit).map_err(MachineError::Ended)
    }

    /// Carries out `work` on a parked vCPU's own thread.
    fn on_vcpu<R: Send + 'static>(
        &self,
        index: u32,
        work: impl FnOnce(&mut dyn crate::hypervisor::Vcpu) -> R + Send + 'static,
    ) -> Result<R, MachineError> {
        self.board.gate.on_vcpu(index, work).ok_or(MachineError::VcpuGone { vcpu: index })
    }

    fn check_alive(&self) -> Result<(), MachineError> {
        match self.board.gate.outcome() {
            Some(outcome) => Err(MachineError::Ended(outcome)),
            None => Ok(()),
        }
    }

    /// The run state, once nobody holds the machine.
    fn unheld(&self) -> MutexGuard<'_, Control> {
        let mut control = self.control.lock();
        while control.holds > 0 {
            self.released.wait(&mut control);
        }
        control
    }

    fn check_paused(&self, control: &Control, what: &'static str) -> Result<(), MachineError> {
        self.check_alive()?;
        if control.paused { Ok(()) } else { Err(MachineError::NotPaused { what }) }
    }
}

impl Drop for Machine {
    /// Ends the threads and waits for them. Console output that the host does not take within a second
    /// is lost, unless [`finish_console`](Self::finish_console) came before. A vCPU that the backend
    /// cannot get out of the guest stays there, with the machine's memory.
    fn drop(&mut self) {
        self.console.close();
        self.keeper.close();
        self.alarm.close();
        self.output.hurry(true);
        let stuck = self.board.gate.dismiss(PARTING);
        for (index, thread) in (0..).zip(self.threads.drain(..)) {
            // The threads of the vCPUs come first.
            if stuck.contains(&index) {
                tracing::error!(
                    "vCPU {index} cannot be made to leave the guest, and is left there"
                );
                continue;
            }
            // A panic in it has been reported as the outcome.
            let _ = thread.join();
        }
        self.output.close();
        match self.output.finish(FAREWELL, FAREWELL) {
            0 => {}
            lost => tracing::warn!("{lost} bytes of console output are lost: nothing takes them"),
        }
        if self.output.is_done()
            && let Some(writer) = self.writer.take()
        {
            let _ = writer.join();
        }
    }
}

fn section_name(kind: &str, instance: &str) -> String {
    format!("`{kind}` {instance}")
}

/// Saving or taking over the interrupt chip or a vCPU failed.
fn chip_error(instance: impl Into<String>, error: HypervisorError) -> MachineError {
    match error {
        HypervisorError::State(source) => state_error(instance, source),
        other => other.into(),
    }
}

fn state_error(instance: impl Into<String>, source: PersistError) -> MachineError {
    MachineError::State { instance: instance.into(), source }
}
