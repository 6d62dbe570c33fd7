//! Putting a machine together, and putting saved state back into it.

use std::{
    collections::{BTreeMap, HashSet},
    io::Write,
    sync::{Arc, OnceLock, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use squib_devices::{
    bus::Bus,
    clock::{Clock, HostClock},
    granules::Unavailable,
    map::{self, Range},
    memory::GuestRam,
    vmgenid::VmGenIdState,
};
use squib_formats::persist::{self, PersistError, Section, Versioned};

use super::{
    Control, Machine, Part, chip_error,
    console::{ConsoleInput, Feed, Output},
    devices::{self, Disks},
    gate::Gate,
    section_name, state_error,
    time::TimeKeeper,
    types::{
        ClockPolicy, Contents, Identity, MachineError, Outcome, RestoreOptions, TimeAway,
        TimeState, Timings,
    },
    vcpu::{Board, vcpu_thread},
};
use crate::{
    boot::BootError,
    config::{MachineConfig, WARM_PANIC},
    hypervisor::{self, SystemCounter, VcpuState, Vm},
    psci::{Psci, PsciState},
    seed::{Lane, Seeds},
};

/// Sections by kind and instance.
pub(super) type Sections = BTreeMap<(String, String), Section>;

/// Where a jump of the counter ends: 146 years at one tick a nanosecond.
const MOST_TICKS: u64 = 1 << 62;
/// Binary logarithm of the largest granule of RAM, 4 MiB.
const COARSEST: u32 = 22;
const NANOS: u128 = 1_000_000_000;

impl Machine {
    /// All parts of a machine in their reset state, at rest, with `contents` as they are.
    pub(super) fn assemble(
        config: MachineConfig,
        contents: Contents,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        config.validate()?;
        let size = contents.ram.size();
        if size != config.memory {
            return Err(MachineError::MemorySize { size, expected: config.memory });
        }
        let vm = hypervisor::create(&config, &contents.ram)?;
        let Contents { ram, disks } = contents;
        Self::assemble_on(vm, config, ram, &Disks::Open(disks), console)
    }

    /// Makes the machine that [`restore`](Self::restore) makes, over memory of which nothing is there and disks
    /// of `sizes` bytes, by id, that nobody can read, gives it `sections`, and drops it. So whatever a restore
    /// refuses in them is refused here, by the same code. No vCPU runs, no file is opened.
    pub fn try_restore(
        config: MachineConfig,
        sections: Vec<Section>,
        options: RestoreOptions,
        sizes: BTreeMap<String, u64>,
    ) -> Result<(), MachineError> {
        config.validate()?;
        let ram = GuestRam::absent(config.memory, COARSEST)
            .map_err(|source| MachineError::Memory { size: config.memory, source })?;
        let vm = hypervisor::create(&config, &ram)?;
        let sink = Box::new(std::io::sink());
        let machine = Self::assemble_on(vm, config, ram, &Disks::Sizes(sizes), sink)?;
        // A clone's identity is written to memory.
        let options = RestoreOptions { identity: Identity::Same, ..options };
        let sections = machine.sort(sections)?;
        machine.take_over(sections, options)?;
        Ok(machine.board.vm.check()?)
    }

    /// [`assemble`](Self::assemble) on a backend that was made before.
    pub(super) fn assemble_on(
        vm: Arc<dyn Vm>,
        config: MachineConfig,
        ram: GuestRam,
        disks: &Disks,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        let counter = vm.counter();
        let clock: Arc<dyn Clock> = match config.deterministic {
            Some(deterministic) => Arc::new(CounterClock {
                counter: Arc::clone(&counter),
                epoch_ns: u128::from(deterministic.epoch) * NANOS,
            }),
            None => Arc::new(HostClock::new()),
        };
        let timings = Arc::new(Timings::default());
        let feed = Feed::new();
        let mut bus = Bus::new();
        for (range, frame) in vm.irq_chip_frames() {
            bus.insert(range, frame)?;
        }
        let output = Output::new(Arc::clone(&timings));
        let host = devices::Host { irq: vm.irq_chip(), ram: &ram, clock: &clock };
        let built = devices::build(&config, &host, disks, &output, &feed)?;
        for (range, part) in &built.parts {
            bus.insert(*range, Arc::clone(&part.device))?;
        }

        let psci =
            Arc::new(Psci::new(config.vcpus, Range { base: map::RAM_BASE, size: config.memory }));
        let gate = Gate::new(config.vcpus, Arc::clone(&psci));
        let unclaimed = Mutex::new(HashSet::new());
        let panic_is_warm = config.cmdline.split_ascii_whitespace().any(|word| word == WARM_PANIC);
        let board = Arc::new(Board {
            vm,
            ram: ram.clone(),
            bus,
            psci,
            gate,
            timings,
            unclaimed,
            panic_is_warm,
        });
        // A device meets it too, and has nobody to tell but the guest, which must not go on.
        let ends = || {
            let end = Arc::downgrade(&board);
            move |failure: &Unavailable| {
                if let Some(board) = end.upgrade() {
                    board.gate.end(Outcome::Damaged(failure.clone()));
                }
            }
        };
        ram.granules().on_failure(ends());
        built.disks.iter().for_each(|disk| disk.on_failure(ends()));
        let control = Arc::new(Mutex::new(Control { paused: true, holds: 0 }));
        let keeper = TimeKeeper::new(
            &config,
            Arc::clone(&board),
            Arc::clone(&counter),
            Arc::clone(&clock),
            Arc::clone(&built.alarm),
            Arc::clone(&control),
        );
        let mut machine = Self {
            ram,
            board,
            devices: built.parts.into_iter().map(|(_, part)| part).collect(),
            disks: built.disks,
            counter,
            clock,
            keeper: Arc::clone(&keeper),
            time_away: OnceLock::new(),
            generation: built.generation,
            alarm: Arc::clone(&built.alarm),
            console: ConsoleInput::new(Arc::clone(&feed)),
            output: Arc::clone(&output),
            writer: None,
            threads: Vec::new(),
            control,
            released: Condvar::new(),
            attached: Mutex::default(),
            config,
        };
        // From here on, an error drops the machine, which ends the threads that were started.
        for part in &machine.devices {
            part.device.pause(std::time::Instant::now() + super::SETTLE)?;
        }
        machine.start_vcpus()?;
        let offer = built.offer;
        machine.spawn("rtc-alarm", move || built.alarm.watch())?;
        machine.spawn("time", move || keeper.watch())?;
        machine.spawn("console-in", move || feed.pump(offer))?;
        machine.writer = Some(spawn("console-out", move || output.write_to(console))?);
        Ok(machine)
    }

    /// Starts the vCPU threads. Each makes its vCPU before the next one begins: a backend may number its
    /// redistributors in the order in which vCPUs are made.
    fn start_vcpus(&mut self) -> Result<(), MachineError> {
        for vcpu in 0..self.config.vcpus {
            let (ready, answer) = mpsc::sync_channel(1);
            let board = Arc::clone(&self.board);
            self.spawn(&format!("vcpu{vcpu}"), move || vcpu_thread(&board, vcpu, ready))?;
            answer.recv().map_err(|_| MachineError::VcpuGone { vcpu })??;
        }
        Ok(())
    }

    fn spawn(
        &mut self,
        name: &str,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), MachineError> {
        self.threads.push(spawn(name, body)?);
        Ok(())
    }

    /// Every section that this machine saves, in that order.
    fn places(&self) -> Vec<(String, String)> {
        let name = |kind: &str, instance: &str| (kind.to_owned(), instance.to_owned());
        let mut places = Vec::new();
        places.extend(self.devices.iter().map(|part| name(part.device.kind(), &part.instance)));
        places.push(name(VmGenIdState::KIND, "0"));
        places.push(name(self.board.vm.irq_chip_kind(), "0"));
        places.push(name(PsciState::KIND, "0"));
        places.extend((0..self.config.vcpus).map(|n| name(VcpuState::KIND, &n.to_string())));
        places.push(name(TimeState::KIND, "0"));
        places
    }

    /// Checks that there is one section for every place and one place for every section.
    pub(super) fn sort(&self, sections: Vec<Section>) -> Result<Sections, MachineError> {
        let places = self.places();
        let mut sorted = BTreeMap::new();
        for section in sections {
            let key = (section.kind.clone(), section.instance.clone());
            let name = || section_name(&key.0, &key.1);
            if !places.contains(&key) {
                return Err(MachineError::UnknownSection { section: name() });
            }
            if sorted.contains_key(&key) {
                return Err(MachineError::DuplicateSection { section: name() });
            }
            sorted.insert(key, section);
        }
        match places.iter().find(|place| !sorted.contains_key(place)) {
            Some((kind, instance)) => {
                Err(MachineError::MissingSection { section: section_name(kind, instance) })
            }
            None => Ok(sorted),
        }
    }

    /// Puts saved state into the fresh parts: interrupt chip, time, vCPUs, devices, identity. Time comes
    /// before vCPUs, whose timers are measured against it.
    pub(super) fn take_over(
        &self,
        mut sections: Sections,
        options: RestoreOptions,
    ) -> Result<(), MachineError> {
        let mut take = |kind: &str, instance: &str| {
            let found = sections.remove(&(kind.to_owned(), instance.to_owned()));
            found.ok_or_else(|| MachineError::MissingSection {
                section: section_name(kind, instance),
            })
        };
        let vm = &self.board.vm;
        let chip = vm.irq_chip_kind();
        vm.restore_irq_chip(&take(chip, "0")?)
            .map_err(|error| chip_error(section_name(chip, "0"), error))?;

        let time = decode::<TimeState>(&take(TimeState::KIND, "0")?)?;
        self.restore_time(&time, options.clock)
            .map_err(|source| state_error(section_name(TimeState::KIND, "0"), source))?;

        let psci = decode::<PsciState>(&take(PsciState::KIND, "0")?)?;
        self.board
            .psci
            .restore_shared(psci)
            .map_err(|source| state_error(section_name(PsciState::KIND, "0"), source))?;
        for index in 0..self.config.vcpus {
            let instance = index.to_string();
            let state = decode::<VcpuState>(&take(VcpuState::KIND, &instance)?)?;
            self.on_vcpu(index, move |vcpu| vcpu.restore(&state))?
                .map_err(|error| chip_error(section_name(VcpuState::KIND, &instance), error))?;
        }
        for Part { instance, device } in &self.devices {
            let section = take(device.kind(), instance)?;
            device
                .restore(&section)
                .map_err(|source| state_error(section_name(device.kind(), instance), source))?;
        }
        let generation = take(VmGenIdState::KIND, "0")?;
        persist::restore_section(&mut *self.generation.lock(), &generation)
            .map_err(|source| state_error(section_name(VmGenIdState::KIND, "0"), source))?;
        match options.identity {
            Identity::Same => Ok(()),
            Identity::Clone => self.new_identity(),
        }
    }

    /// Gives a machine that boots its generation id.
    pub(super) fn first_identity(&self) -> Result<(), MachineError> {
        let id = match self.config.deterministic {
            Some(deterministic) => Seeds::stream(deterministic.seed, Lane::Generation),
            None => Seeds::Host,
        }
        .id()?;
        Ok(self.generation.lock().set_first(id).map_err(BootError::from)?)
    }

    /// Tells the guest that it is a copy. Two copies differ even if they are deterministic.
    fn new_identity(&self) -> Result<(), MachineError> {
        let id = Seeds::Host.id()?;
        Ok(self.generation.lock().new_generation(id).map_err(BootError::from)?)
    }

    fn restore_time(&self, saved: &TimeState, clock: ClockPolicy) -> Result<(), PersistError> {
        let TimeState { counter, frequency, wall_ns } = saved;
        let here = self.counter.frequency();
        if *frequency != here {
            let why = format!("{frequency} Hz, this backend's counter has {here} Hz");
            return Err(PersistError::invalid(TimeState::KIND, "frequency", why));
        }
        // It may be anywhere, at its end too: it was saved so.
        self.counter.set(*counter);
        self.keeper.set_policy(clock);
        let now = self.clock.wall_ns();
        let away = match clock {
            ClockPolicy::Freeze => TimeAway::Frozen,
            ClockPolicy::Advance if self.config.deterministic.is_some() => TimeAway::Deterministic,
            ClockPolicy::Advance => match now.checked_sub(*wall_ns) {
                None => TimeAway::WentBack { by: Duration::from_nanos(wall_ns - now) },
                Some(_) if *counter > MOST_TICKS - self.keeper.most_ticks() => {
                    TimeAway::CounterAtEnd
                }
                Some(away) => {
                    let away = Duration::from_nanos(away);
                    TimeAway::Advanced { away, counter: self.keeper.make_up(away) }
                }
            },
        };
        self.time_away.get_or_init(|| away);
        Ok(())
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, MachineError> {
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(body);
    spawned.map_err(|source| MachineError::Thread { name: name.to_owned(), source })
}

fn decode<S: Versioned>(section: &Section) -> Result<S, MachineError> {
    let name = || section_name(&section.kind, &section.instance);
    section.decode().map_err(|source| state_error(name(), source))
}

/// Time of a deterministic machine: the virtual counter.
struct CounterClock {
    counter: Arc<dyn SystemCounter>,
    epoch_ns: u128,
}

impl Clock for CounterClock {
    fn monotonic_ns(&self) -> u64 {
        // Below 2^64 for 584 years of virtual time.
        (u128::from(self.counter.now()) * NANOS / u128::from(self.counter.frequency().max(1)))
            as u64
    }

    fn wall_ns(&self) -> u64 {
        u64::try_from(self.epoch_ns + u128::from(self.monotonic_ns())).unwrap_or(u64::MAX)
    }
}
