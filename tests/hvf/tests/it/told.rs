//! What a Mac is to tell: printed with `--nocapture`, and asserted where there is one right answer. No time is.

use std::time::Instant;

use squib_formats::snapshot_dir::Snapshot;
use squib_snapshot::{TemplateCache, capture::capture, compat, restore::MemoryLoad};
use squib_tests::console::Capture;
use squib_vmm::{
    hypervisor::{self, VcpuState},
    machine::Machine,
};

use crate::{
    Session,
    common::{kernel, lines, power_off, tiny, wait},
    snapshots::{back, begun, options},
};

#[test]
fn the_guest_s_counter_runs_as_fast_as_the_manifest_says() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny(folder.path());
    config.disks.clear();
    let code = [
        0xd53b_e001, // mrs x1, CNTFRQ_EL0
        0xd2a1_c142, // mov x2, #0x0e0a0000: the serial port
        0x5280_0203, // mov w3, #16
        0x93c1_f021, // next: ror x1, x1, #60
        0x1200_0c24, // and w4, w1, #15
        0x1100_c084, // add w4, w4, #48
        0x3900_0044, // strb w4, [x2]
        0x7100_0463, // subs w3, w3, #1
        0x54ff_ff61, // b.ne next
        0x5280_0144, // mov w4, #10
        0x3900_0044, // strb w4, [x2]
        0xd503_207f, // wfi
        0x17ff_ffff, // b #-4
    ];
    std::fs::write(&config.kernel, kernel(&code)).unwrap();
    let identity = hypervisor::identity(&config).unwrap();
    let console = Capture::default();
    let machine = Machine::boot(config, Box::new(console.clone())).unwrap();
    machine.resume().unwrap();
    wait(&machine, &console, |text| text.ends_with('\n')).unwrap();
    // Digits from `0` on, the greatest first.
    let digits = console.taken();
    let seen = digits[..16].iter().fold(0, |value, byte| value << 4 | u64::from(byte - b'0'));
    println!("CNTFRQ_EL0: {seen} Hz");
    let path = folder.path().join("snap");
    capture(&machine, &path, &options()).unwrap();
    let said = Snapshot::open(&path).unwrap().manifest().cpu.counter_frequency;
    assert_eq!((seen, seen), (said, identity.counter_hz), "the guest sees the first");
}

#[test]
fn the_interrupt_chip_is_the_same_byte_for_byte_after_a_restore() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let (machine, console) = begun(folder.path());
    let chip = |machine: &Machine| {
        let sections = machine.save().unwrap();
        sections.into_iter().find(|section| section.kind == "hvf-gic").unwrap()
    };
    let first = chip(&machine);
    println!("state of the interrupt chip: {} bytes", first.payload.len());
    let path = folder.path().join("snap");
    capture(&machine, &path, &options()).unwrap();
    drop(machine);
    let disks = folder.path().join("disks");
    let there = back(&path, &disks, MemoryLoad::Eager, &console).unwrap().machine;
    let again = chip(&there);
    let differ = first.payload.iter().zip(&again.payload).filter(|(a, b)| a != b).count();
    assert!(first == again, "{differ} of {} bytes differ", first.payload.len());
}

#[test]
fn the_registers_of_a_vcpu_that_can_be_read_are_its_state() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let (machine, _) = begun(folder.path());
    let path = folder.path().join("snap");
    capture(&machine, &path, &options()).unwrap();
    let snapshot = Snapshot::open(&path).unwrap();
    let host = snapshot.manifest().host_backend.as_ref().unwrap();
    let names: Vec<_> = host.unreadable.iter().copied().map(compat::name).collect();
    println!("host build {}; registers that it keeps to itself: {}", host.build, names.join(" "));
    let sections = machine.save().unwrap();
    let vcpu = sections.iter().find(|section| section.kind == "vcpu").unwrap();
    let state: VcpuState = vcpu.decode().unwrap();
    println!("{} system registers", state.sysregs.len());
    for (register, value) in &state.sysregs {
        println!("  {register:#06x} {:<22} {value:#018x}", compat::name(*register));
    }
    // SCTLR, TTBR0, VBAR, CNTV_CTL, ICC_PMR: without them nothing goes on.
    for needed in [0xc080, 0xc100, 0xc600, 0xdf19, 0xc230] {
        let there = state.sysregs.iter().any(|(register, _)| *register == needed);
        assert!(there, "{needed:#06x} is missing");
    }
    let both = state.sysregs.iter().find(|(register, _)| host.unreadable.contains(register));
    assert_eq!(both, None, "it was read");
}

#[test]
fn the_times_to_the_first_line_are_told() {
    let _session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let console = Capture::default();
    let started = Instant::now();
    let machine = Machine::boot(tiny(folder.path()), Box::new(console.clone())).unwrap();
    machine.resume().unwrap();
    lines(&machine, &console, 1).unwrap();
    println!("tiny guest: boot to the first line {:?}", started.elapsed());
    capture(&machine, &at("snap"), &options()).unwrap();
    drop(machine);
    let template = || MemoryLoad::Template(TemplateCache::new(at("templates"), u64::MAX));
    for (way, load) in [
        ("eager", MemoryLoad::Eager),
        ("lazy", MemoryLoad::Lazy),
        ("a template that is made", template()),
        ("a template that is there", template()),
    ] {
        let console = Capture::default();
        let started = Instant::now();
        let restored = back(&at("snap"), &at(way), load, &console).unwrap();
        restored.machine.resume().unwrap();
        lines(&restored.machine, &console, 1).unwrap();
        let (all, timings) = (started.elapsed(), restored.timings);
        println!("tiny guest: restore, {way}: to the first line {all:?}; {timings:?}");
        power_off(&restored.machine).unwrap();
    }
}
