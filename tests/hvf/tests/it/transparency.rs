//! A restored guest cannot tell that it was away, to the instruction; and at the same instruction the software
//! CPU's state is the same.

use std::{collections::BTreeMap, fs, path::Path, time::Instant};

use squib_devices::gic::{GicState, IccState};
use squib_formats::persist::{Section, Versioned};
use squib_snapshot::{
    TemplateCache,
    capture::{CaptureOptions, capture},
    restore::MemoryLoad,
};
use squib_tests::{
    console::Capture,
    scenario,
    transparency::{Point, random_points},
};
use squib_vmm::{
    config::{BackendKind, Deterministic, MachineConfig},
    hypervisor::VcpuState,
    machine::{Machine, RunUntil},
};

use crate::{
    Session,
    common::{PATIENCE, bare, memory},
    snapshots::{back, options},
};

/// Seed of the points.
const SEED: u64 = 0x6876_6600;

/// The tiny guest without its disk, whose interrupts come from a thread of the host and thus at any
/// instruction.
fn guest(folder: &Path) -> MachineConfig {
    let mut config = scenario::tiny(folder).unwrap();
    config.backend = BackendKind::Hvf;
    config.deterministic = None;
    config.disks.clear();
    config
}

/// Everything about a machine but the host's wall clock.
#[derive(PartialEq, Eq)]
struct Witness {
    memory: Vec<u8>,
    sections: Vec<Section>,
    counter: u64,
    console: String,
}

/// Lets a paused machine retire `instructions`.
fn go(session: &Session, machine: &Machine, instructions: u64) {
    machine.resume().unwrap();
    assert!(session.run_for(instructions), "the guest stopped before");
    machine.pause(PATIENCE).unwrap();
    assert!(machine.drain_console(PATIENCE));
}

fn witness(machine: &Machine, console: &Capture) -> Witness {
    let mut sections = machine.save().unwrap();
    // It has the host's wall clock, and the counter, which is looked at by itself.
    sections.pop();
    let (memory, counter) = (memory(machine), machine.time().counter);
    Witness { memory, sections, counter, console: console.text() }
}

#[test]
fn a_restored_guest_is_where_it_would_have_been_at_20_random_points() {
    let session = Session::begin();
    session.count_instructions();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let base = at("base");
    let machine = Machine::boot(guest(folder.path()), Box::new(Capture::default())).unwrap();
    capture(&machine, &base, &options()).unwrap();
    drop(machine);

    let live = CaptureOptions { live: true, ..options() };
    let diff = CaptureOptions { parent: Some(base.clone()), ..options() };
    let captures = [("full", options()), ("live", live), ("diff", diff)];
    let template = || MemoryLoad::Template(TemplateCache::new(at("templates"), u64::MAX));
    let loads =
        [MemoryLoad::Lazy, template(), MemoryLoad::Eager, MemoryLoad::Record, MemoryLoad::Lazy];
    for (n, point) in random_points(SEED, 20, 400_000, 100_000).into_iter().enumerate() {
        let (how, capturing) = &captures[n % captures.len()];
        let load = &loads[n % loads.len()];
        let back = |from: &Path, load: &MemoryLoad, console: &Capture| {
            back(from, &at("disks"), load.clone(), console).unwrap().machine
        };
        let console = Capture::default();
        let never_away = back(&base, &MemoryLoad::Eager, &console);
        go(&session, &never_away, point.end());
        let expected = witness(&never_away, &console);
        drop(never_away);

        let console = Capture::default();
        let machine = back(&base, load, &console);
        go(&session, &machine, point.at);
        capture(&machine, &at("middle"), capturing).unwrap();
        drop(machine);
        let machine = back(&at("middle"), load, &console);
        go(&session, &machine, point.more);
        let found = witness(&machine, &console);
        drop(machine);
        assert_equal(&expected, &found, &format!("{how} at {point}, then {load:?}"));
        fs::remove_dir_all(at("middle")).unwrap();
    }
}

#[test]
fn a_guest_that_is_one_instruction_ahead_is_found_out() {
    let session = Session::begin();
    session.count_instructions();
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    let machine = Machine::boot(guest(folder.path()), Box::new(Capture::default())).unwrap();
    capture(&machine, &base, &options()).unwrap();
    drop(machine);
    let at = |instructions| {
        let console = Capture::default();
        let disks = folder.path().join("disks");
        let machine = back(&base, &disks, MemoryLoad::Eager, &console).unwrap().machine;
        go(&session, &machine, instructions);
        witness(&machine, &console)
    };
    let (expected, ahead) = (at(50_000), at(50_001));
    assert!(expected != ahead);
    assert_eq!(ahead.counter, expected.counter + 1);
    assert!(expected == at(50_000));
}

fn assert_equal(expected: &Witness, found: &Witness, what: &str) {
    let Witness { memory, sections, counter, console } = expected;
    assert_eq!(*counter, found.counter, "{what}: the counter");
    for (expected, found) in sections.iter().zip(&found.sections) {
        let name = format!("{} {}", expected.kind, expected.instance);
        if expected.kind == VcpuState::KIND {
            let decode = |section: &Section| section.decode::<VcpuState>().unwrap();
            assert_eq!(decode(expected), decode(found), "{what}: {name}");
        }
        assert!(expected == found, "{what}: {name}");
    }
    assert_eq!(sections.len(), found.sections.len(), "{what}");
    let chunks = memory.chunks(1 << 12).zip(found.memory.chunks(1 << 12));
    let differ: Vec<_> = chunks.enumerate().filter(|(_, (a, b))| a != b).map(|(n, _)| n).collect();
    assert!(differ.is_empty(), "{what}: memory, in the 4 KiB pages {differ:x?}");
    assert_eq!(*console, found.console, "{what}: the console");
}

/// The registers of one vCPU at one instruction.
struct Moment {
    vcpu: VcpuState,
    counter: u64,
    console: String,
    gic: Option<GicState>,
}

fn moment(machine: &Machine, console: &Capture) -> Moment {
    let sections = machine.save().unwrap();
    let of = |kind: &str| sections.iter().find(|section| section.kind == kind);
    Moment {
        vcpu: of(VcpuState::KIND).unwrap().decode().unwrap(),
        counter: machine.time().counter,
        console: console.text(),
        gic: of(GicState::KIND).map(|section| section.decode().unwrap()),
    }
}

/// Where both backends have a register, they have the same value in it.
fn assert_same_state(hvf: &Moment, soft: &Moment, point: u64) {
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
        // The framework does not tell.
        exclusive: _,
        waiting: _,
        retired: _,
    } = hvf.vcpu;
    let theirs = &soft.vcpu;
    assert_eq!(x, theirs.x, "X0 to X30 at {point}");
    assert_eq!((sp_el0, sp_el1), (theirs.sp_el0, theirs.sp_el1), "stack pointers at {point}");
    assert_eq!((pc, pstate), (theirs.pc, theirs.pstate), "PC and PSTATE at {point}");
    assert_eq!(v, theirs.v, "V0 to V31 at {point}");
    assert_eq!((fpcr, fpsr), (theirs.fpcr, theirs.fpsr), "FPCR and FPSR at {point}");
    assert_eq!(hvf.counter, soft.counter, "the counter at {point}");
    assert_eq!(hvf.console, soft.console, "the console at {point}");

    let ours: BTreeMap<u16, u64> = sysregs.iter().copied().collect();
    let mut both = 0;
    for (register, value) in &theirs.sysregs {
        if let Some(our) = ours.get(register) {
            let name = squib_soft::SysReg(*register);
            assert_eq!(our, value, "{name} at {point}");
            both += 1;
        }
    }
    assert!(both >= 30, "{both} registers in common");

    // The CPU interface is the interrupt controller's on soft, and the vCPU's here.
    let IccState { pmr, bpr0, bpr1, cbpr: _, eoi_mode: _, igrpen0, igrpen1, ap0r0, ap1r0 } =
        soft.gic.as_ref().unwrap().cpus[0].icc;
    let interface: [(u16, u64); 7] = [
        (0xc230, pmr.into()),
        (0xc643, bpr0.into()),
        (0xc663, bpr1.into()),
        (0xc644, ap0r0.into()),
        (0xc648, ap1r0.into()),
        (0xc666, igrpen0.into()),
        (0xc667, igrpen1.into()),
    ];
    for (register, value) in interface {
        let name = squib_soft::SysReg(register);
        assert_eq!(ours.get(&register), Some(&value), "{name} at {point}");
    }
}

#[test]
fn a_physical_timer_is_saved_by_the_virtual_counter_and_stays_as_far_away() {
    const CTL: u16 = 0xdf11;
    const CVAL: u16 = 0xdf12;
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let code = [
        0xd2e0_0201, // mov x1, #0x0010_0000_0000_0000
        0xd51b_e241, // msr CNTP_CVAL_EL0, x1
        0xd280_0022, // mov x2, #1: ENABLE
        0xd51b_e222, // msr CNTP_CTL_EL0, x2
        0x1400_0000, // b .
    ];
    let machine = bare(folder.path(), &code);
    let told = |machine: &Machine| {
        let state = moment(machine, &Capture::default()).vcpu;
        let of = |register| state.sysregs.iter().find(|(found, _)| *found == register).unwrap().1;
        (of(CTL), of(CVAL))
    };
    let set = (1, 0x0010_0000_0000_0000);
    let start = Instant::now();
    loop {
        machine.pause(PATIENCE).unwrap();
        if told(&machine) == set {
            break;
        }
        machine.resume().unwrap();
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    // By the host's counter, which goes on in a pause, it would be nearer each time.
    machine.resume().unwrap();
    machine.pause(PATIENCE).unwrap();
    assert_eq!(told(&machine), set);
    let path = folder.path().join("snap");
    capture(&machine, &path, &options()).unwrap();
    drop(machine);
    let disks = folder.path().join("disks");
    let there = back(&path, &disks, MemoryLoad::Eager, &Capture::default()).unwrap().machine;
    assert_eq!(told(&there), set);
    there.resume().unwrap();
    there.pause(PATIENCE).unwrap();
    assert_eq!(told(&there), set);
    drop((there, session));
}

#[test]
fn the_software_cpu_has_the_same_state_at_the_same_instruction() {
    let session = Session::begin();
    session.count_instructions();
    let folder = tempfile::tempdir().unwrap();
    let mut points: Vec<u64> =
        random_points(SEED, 40, 600_000, 1).into_iter().map(|Point { at, .. }| at).collect();
    points.sort_unstable();
    points.dedup();

    let mut config = guest(folder.path());
    let (hvf_console, soft_console) = (Capture::default(), Capture::default());
    let hvf = Machine::boot(config.clone(), Box::new(hvf_console.clone())).unwrap();
    config.backend = BackendKind::Soft;
    config.deterministic = Some(Deterministic::default());
    let soft = Machine::boot(config, Box::new(soft_console.clone())).unwrap();
    let mut before = 0;
    for point in points {
        go(&session, &hvf, point - before);
        assert_eq!(soft.run_until(point).unwrap(), RunUntil::Reached);
        let (hvf, soft) = (moment(&hvf, &hvf_console), moment(&soft, &soft_console));
        assert_same_state(&hvf, &soft, point);
        before = point;
    }
    assert!(hvf_console.text().lines().count() > 3, "{}", hvf_console.text());
}
