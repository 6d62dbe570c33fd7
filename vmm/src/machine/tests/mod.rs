//! The life-cycle, on a backend without a CPU.

mod fake;

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use squib_devices::{device::PauseError, map};
use squib_formats::persist::Section;
use vm_memory::{Bytes, GuestAddress};

use self::fake::{FakeVm, Step};
use super::{devices::Disks, *};
use crate::hypervisor::{Exit, HypervisorError};

const SOON: Duration = Duration::from_millis(20);
const AMPLE: Duration = Duration::from_secs(60);

fn config(vcpus: u32) -> MachineConfig {
    MachineConfig { vcpus, memory: map::RAM_MIN, ..MachineConfig::new("test", "/none") }
}

fn machine_of(vcpus: u32) -> (Arc<FakeVm>, Machine) {
    let (vm, config) = (FakeVm::new(vcpus), config(vcpus));
    let ram = GuestRam::new(config.memory).unwrap();
    let machine = Machine::assemble_on(
        vm.clone(),
        config,
        ram,
        &Disks::Open(BTreeMap::new()),
        Box::new(std::io::sink()),
    )
    .unwrap();
    (vm, machine)
}

fn hypercall(machine: &Machine, vm: &FakeVm, vcpu: u32, args: [u64; 4]) {
    machine.pause(AMPLE).unwrap();
    machine
        .on_vcpu(vcpu, move |vcpu| {
            for (n, arg) in (0..).zip(args) {
                vcpu.set_x(n, arg).unwrap();
            }
        })
        .unwrap();
    vm.puppets[vcpu as usize].push(Step::Exit(Exit::Hypercall { imm: 0 }));
    machine.resume().unwrap();
}

/// A device that comes to rest only when it is told to.
#[derive(Default)]
struct Stubborn {
    yields: AtomicBool,
    resumes: AtomicU32,
}

impl MachineDevice for Stubborn {
    fn mmio_read(&self, _offset: u64, _size: u8) -> u64 {
        0
    }

    fn mmio_write(&self, _offset: u64, _size: u8, _value: u64) {}

    fn pause(&self, _deadline: Instant) -> Result<(), PauseError> {
        if self.yields.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(PauseError::Deadline { device: "stubborn".to_owned(), in_flight: 3 })
    }

    fn resume(&self) {
        self.resumes.fetch_add(1, Ordering::Relaxed);
    }

    fn kind(&self) -> &'static str {
        "stubborn"
    }

    fn save(&self, instance: &str) -> Result<Section, PersistError> {
        let (kind, instance) = (self.kind().to_owned(), instance.to_owned());
        Ok(Section { kind, instance, version: 1, payload: Vec::new() })
    }

    fn restore(&self, _section: &Section) -> Result<(), PersistError> {
        Ok(())
    }
}

#[test]
fn pause_and_resume_are_idempotent_and_time_stands_still_between_them() {
    let (vm, machine) = machine_of(2);
    assert_eq!(machine.state(), RunState::Paused);
    assert_eq!(machine.timings().first_instruction(), None);
    machine.resume().unwrap();
    machine.resume().unwrap();
    vm.puppets[0].wait_run(0);
    assert!(machine.timings().first_instruction().is_some());
    assert!(vm.counter.running.load(Ordering::Relaxed));
    assert_eq!(machine.state(), RunState::Running);
    machine.pause(AMPLE).unwrap();
    machine.pause(AMPLE).unwrap();
    assert!(!vm.counter.running.load(Ordering::Relaxed));
    let runs = vm.puppets[0].runs();
    std::thread::sleep(SOON);
    assert_eq!(vm.puppets[0].runs(), runs, "a paused vCPU entered the guest");
}

#[test]
fn a_vcpu_that_does_not_stop_in_time_lets_everything_run_on() {
    let (vm, machine) = machine_of(2);
    machine.resume().unwrap();
    vm.puppets[0].wait_run(0);
    vm.puppets[0].set_deaf(true);
    let found = machine.pause(SOON);
    let Err(MachineError::VcpuDeadline { vcpus, deadline: SOON }) = found else {
        panic!("{found:?}")
    };
    assert_eq!(vcpus, [0]);
    assert_eq!(machine.state(), RunState::Running);
    assert!(vm.counter.running.load(Ordering::Relaxed));
    vm.puppets[0].set_deaf(false);
    let runs = vm.puppets[0].runs();
    vm.puppets[0].push(Step::Exit(Exit::Cancelled));
    vm.puppets[0].wait_run(runs);
    machine.pause(AMPLE).unwrap();
}

#[test]
fn a_device_that_does_not_settle_in_time_lets_everything_run_on() {
    let (vm, mut machine) = machine_of(1);
    let stubborn = Arc::new(Stubborn::default());
    let device = Arc::clone(&stubborn) as Arc<dyn MachineDevice>;
    machine.devices.push(Part { instance: "0".to_owned(), device });
    machine.resume().unwrap();
    let resumes = stubborn.resumes.load(Ordering::Relaxed);
    let error = machine.pause(AMPLE).unwrap_err();
    assert!(matches!(error, MachineError::DevicePause(PauseError::Deadline { in_flight: 3, .. })));
    assert_eq!(machine.state(), RunState::Running);
    assert!(vm.counter.running.load(Ordering::Relaxed));
    assert_eq!(stubborn.resumes.load(Ordering::Relaxed), resumes + 1);
    let runs = vm.puppets[0].runs();
    vm.puppets[0].push(Step::Exit(Exit::Cancelled));
    vm.puppets[0].wait_run(runs);
    stubborn.yields.store(true, Ordering::Relaxed);
    machine.pause(AMPLE).unwrap();
    assert_eq!(machine.state(), RunState::Paused);
}

#[test]
fn only_a_paused_machine_saves_and_it_saves_equal_bytes_twice() {
    let (_vm, machine) = machine_of(2);
    machine.resume().unwrap();
    assert!(matches!(machine.save(), Err(MachineError::NotPaused { .. })));
    machine.pause(AMPLE).unwrap();
    let without_time = |mut sections: Vec<Section>| {
        let time: TimeState = sections.pop().unwrap().decode().unwrap();
        (sections, time.counter)
    };
    let first = without_time(machine.save().unwrap());
    assert_eq!(first, without_time(machine.save().unwrap()));
    let names: Vec<_> = first.0.iter().map(|s| format!("{} {}", s.kind, s.instance)).collect();
    let expected = [
        "serial 0",
        "rtc 0",
        "virtio-rng rng",
        "vmgenid 0",
        "fake-chip 0",
        "psci 0",
        "vcpu 0",
        "vcpu 1",
    ];
    assert_eq!(names, expected);
}

#[test]
fn a_machine_that_has_lost_an_interrupt_is_not_saved() {
    let (vm, machine) = machine_of(1);
    vm.lost.store(true, Ordering::Relaxed);
    let error = machine.save().unwrap_err();
    assert!(matches!(
        error,
        MachineError::Hypervisor(HypervisorError::Call { call: "set_spi", .. })
    ));
    vm.lost.store(false, Ordering::Relaxed);
    machine.save().unwrap();
}

fn saved() -> Vec<Section> {
    let (vm, machine) = machine_of(2);
    machine.on_vcpu(0, |vcpu| vcpu.start(0x8020_0000, 7)).unwrap().unwrap();
    machine.generation.lock().set_first([5; 16]).unwrap();
    vm.counter.set(123);
    machine.save().unwrap()
}

fn restored(
    sections: Vec<Section>,
    identity: Identity,
) -> Result<(Arc<FakeVm>, Machine), MachineError> {
    let (vm, machine) = machine_of(2);
    let sections = machine.sort(sections)?;
    machine.take_over(sections, RestoreOptions { identity, clock: ClockPolicy::Freeze })?;
    Ok((vm, machine))
}

#[test]
fn a_restored_machine_saves_what_it_was_restored_from() {
    let before = saved();
    let (vm, machine) = restored(before.clone(), Identity::Same).unwrap();
    assert_eq!(vm.counter.now(), 123);
    let after = machine.save().unwrap();
    assert_eq!(after[..after.len() - 1], before[..before.len() - 1]);
    assert!(vm.chip.raised.lock().is_empty());
}

#[test]
fn a_clone_learns_that_it_is_one_before_it_runs() {
    let (vm, machine) = restored(saved(), Identity::Clone).unwrap();
    assert_eq!(*vm.chip.raised.lock(), [map::VMGENID_INTID]);
    let id: [u8; 16] = machine.ram().read_obj(GuestAddress(map::VMGENID.base)).unwrap();
    assert_ne!(id, [5; 16]);
    assert_eq!(machine.generation.lock().id(), id);
}

#[test]
fn sections_without_a_place_and_places_without_a_section_are_named() {
    let mut unknown = saved();
    unknown[0].kind = "floppy".to_owned();
    let error = restored(unknown, Identity::Same).err().unwrap();
    assert!(matches!(&error, MachineError::UnknownSection { section } if section == "`floppy` 0"));
    for missing in 0..saved().len() {
        let mut sections = saved();
        let gone = sections.remove(missing);
        let error = restored(sections, Identity::Same).err().unwrap();
        let name = section_name(&gone.kind, &gone.instance);
        assert!(matches!(&error, MachineError::MissingSection { section } if *section == name));
    }
    let mut twice = saved();
    twice.push(twice[2].clone());
    let error = restored(twice, Identity::Same).err().unwrap();
    assert!(matches!(error, MachineError::DuplicateSection { .. }));
    let mut damaged = saved();
    damaged[6].payload.pop();
    let error = restored(damaged, Identity::Same).err().unwrap().to_string();
    assert!(error.starts_with("`vcpu` 0: "), "{error}");
}

fn with_time(change: impl Fn(&mut TimeState)) -> Vec<Section> {
    let mut sections = saved();
    let mut time: TimeState = sections.pop().unwrap().decode().unwrap();
    change(&mut time);
    sections.push(Section::encode("0", &time).unwrap());
    sections
}

#[test]
fn a_counter_of_another_frequency_is_refused() {
    let error = restored(with_time(|time| time.frequency = 24_000_000), Identity::Same);
    assert!(error.err().unwrap().to_string().contains("`frequency`"));
}

#[test]
fn a_counter_at_its_end_is_taken_over_and_makes_no_jump() {
    for counter in [1 << 62, u64::MAX] {
        for clock in [ClockPolicy::Freeze, ClockPolicy::Advance] {
            let (vm, machine) = machine_of(2);
            let sections = with_time(|time| (time.counter, time.wall_ns) = (counter, 0));
            let options = RestoreOptions { clock, ..RestoreOptions::default() };
            machine.take_over(machine.sort(sections).unwrap(), options).unwrap();
            assert_eq!(vm.counter.now(), counter, "{clock:?}");
        }
    }
}

#[test]
fn an_advanced_clock_begins_where_it_was_saved() {
    let advanced = |wall: fn(u64) -> u64| {
        let mut sections = saved();
        let mut time: TimeState = sections.pop().unwrap().decode().unwrap();
        time.wall_ns = wall(time.wall_ns);
        sections.push(Section::encode("0", &time).unwrap());
        let (vm, machine) = machine_of(2);
        let options = RestoreOptions { clock: ClockPolicy::Advance, ..RestoreOptions::default() };
        machine.take_over(machine.sort(sections).unwrap(), options).unwrap();
        vm.counter.now()
    };
    assert_eq!(advanced(|wall| wall - 1_000_000_000 * 2), 123);
    assert_eq!(advanced(|wall| wall - 1_000_000_000 * 3600), 123);
    assert_eq!(advanced(|wall| wall + 1_000_000_000 * 3600), 123);
}

/// A machine that was away for `seconds`, with its counter at 123 when it was saved.
fn away(seconds: u64) -> (Arc<FakeVm>, Machine) {
    let mut sections = saved();
    let mut time: TimeState = sections.pop().unwrap().decode().unwrap();
    time.wall_ns -= seconds * 1_000_000_000;
    sections.push(Section::encode("0", &time).unwrap());
    let (vm, machine) = machine_of(2);
    let options = RestoreOptions { clock: ClockPolicy::Advance, ..RestoreOptions::default() };
    machine.take_over(machine.sort(sections).unwrap(), options).unwrap();
    (vm, machine)
}

#[test]
fn the_counter_makes_up_for_some_seconds_in_steps_and_not_for_more() {
    let (_long, left_alone) = away(4);
    let Some(TimeAway::Advanced { counter, .. }) = left_alone.time_away() else { panic!() };
    assert_eq!(counter, Duration::ZERO);
    let (vm, machine) = away(2);
    machine.resume().unwrap();
    // The fake counter has 1000 ticks a second.
    while vm.counter.now() < 123 + 2000 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let sets = vm.counter.sets.lock().clone();
    assert_eq!(sets[0], 123);
    assert!(sets.windows(2).all(|pair| pair[1] - pair[0] <= 100), "{sets:?}");
    assert!(vm.puppets[0].runs() + 1 >= sets.len() as u64, "it runs between steps: {sets:?}");
}

#[test]
fn a_guest_that_does_not_take_its_ticks_gets_no_steps() {
    let (vm, machine) = away(2);
    vm.puppets[0].set_timer_due(true);
    machine.resume().unwrap();
    // Each step that is refused lets it run again.
    vm.puppets[0].wait_run(3);
    assert_eq!(vm.counter.now(), 123);
}

#[test]
fn a_pause_is_no_time_away() {
    let (vm, machine) = machine_of(1);
    machine.keeper.set_policy(ClockPolicy::Advance);
    machine.resume().unwrap();
    machine.pause(AMPLE).unwrap();
    std::thread::sleep(Duration::from_millis(700));
    machine.resume().unwrap();
    vm.puppets[0].wait_run(1);
    assert_eq!(vm.counter.now(), 0);
}

#[test]
fn the_guests_power_off_and_reset_end_the_machine() {
    for (function, outcome) in [(0x8400_0008, Outcome::PowerOff), (0x8400_0009, Outcome::Reset)] {
        let (vm, machine) = machine_of(2);
        hypercall(&machine, &vm, 0, [function, 0, 0, 0]);
        assert_eq!(machine.wait(), outcome);
        assert_eq!(machine.state(), RunState::Ended(outcome.clone()));
        assert!(matches!(machine.pause(AMPLE), Err(MachineError::Ended(_))));
        assert!(matches!(machine.resume(), Err(MachineError::Ended(_))));
        machine.stop();
        assert_eq!(machine.wait(), outcome, "the first outcome counts");
    }
}

#[test]
fn a_stopped_machine_says_so() {
    let (_vm, machine) = machine_of(2);
    assert_eq!(machine.wait_timeout(Duration::ZERO), None);
    machine.resume().unwrap();
    machine.stop();
    assert_eq!(machine.wait_timeout(AMPLE), Some(Outcome::Stopped));
}

#[test]
fn a_vcpu_switched_on_begins_at_its_entry_also_across_a_pause() {
    let (vm, machine) = machine_of(3);
    // CPU_ON of the second and third vCPU.
    hypercall(&machine, &vm, 0, [0xc400_0003, 1, 0x8020_0000, 11]);
    assert_eq!(vm.puppets[1].wait_entered(), (0x8020_0000, 11));
    machine.pause(AMPLE).unwrap();
    machine.resume().unwrap();
    hypercall(&machine, &vm, 1, [0xc400_0003, 2, 0x8030_0000, 12]);
    assert_eq!(vm.puppets[2].wait_entered(), (0x8030_0000, 12));
}

#[test]
fn a_vcpu_that_fails_or_panics_ends_the_machine_with_its_pc() {
    let (vm, machine) = machine_of(2);
    machine.on_vcpu(0, |vcpu| vcpu.start(0x8020_0040, 0)).unwrap().unwrap();
    vm.puppets[0].push(Step::Fail);
    machine.resume().unwrap();
    let Outcome::Crashed(crash) = machine.wait() else { panic!("no crash") };
    assert_eq!((crash.vcpu, crash.pc), (0, Some(0x8020_0040)));
    assert!(crash.to_string().contains("0x80200040"), "{crash}");

    let (vm, machine) = machine_of(1);
    vm.puppets[0].push(Step::Panic);
    machine.resume().unwrap();
    assert!(matches!(machine.wait(), Outcome::Crashed(Crash { vcpu: 0, .. })));
    assert!(matches!(machine.save(), Err(MachineError::Ended(_))));
}

#[test]
fn addresses_without_a_device_read_as_zero_and_ignore_writes() {
    let (vm, machine) = machine_of(1);
    let exits = [
        Exit::MmioRead { address: 0x1000, size: 4 },
        Exit::MmioWrite { address: u64::MAX, size: 8, value: 1 },
        // The transport's magic value.
        Exit::MmioRead { address: map::VIRTIO.base, size: 4 },
        Exit::MmioRead { address: u64::MAX, size: 8 },
    ];
    for exit in exits {
        vm.puppets[0].push(Step::Exit(exit));
    }
    machine.resume().unwrap();
    vm.puppets[0].wait_run(4);
    assert_eq!(vm.puppets[0].reads(), [0, 0x7472_6976, 0]);
}

#[test]
fn pauses_from_many_threads_do_not_get_in_each_others_way() {
    let (vm, machine) = machine_of(4);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..100 {
                    machine.resume().unwrap();
                    machine.pause(AMPLE).unwrap();
                }
            });
        }
    });
    assert_eq!(machine.state(), RunState::Paused);
    machine.save().unwrap();
    assert!(!vm.counter.running.load(Ordering::Relaxed));
}

#[test]
fn a_machine_that_is_not_deterministic_cannot_run_to_a_count() {
    let (_vm, machine) = machine_of(1);
    assert!(matches!(machine.run_until(5), Err(MachineError::NotDeterministic { .. })));
}
