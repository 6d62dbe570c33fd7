//! Whole machines on the software CPU, with guests of a few instructions.

use std::{
    io::Write,
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;
use proptest::prelude::*;
use squib_devices::{map, memory::GuestRam};
use squib_formats::persist::Section;
use squib_vmm::{
    config::{Deterministic, MachineConfig},
    machine::{Identity, Machine, MachineError, Outcome, RestoreOptions, RunState, RunUntil},
};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

/// Where the kernel lies.
const KERNEL: GuestAddress = GuestAddress(map::RAM_BASE + map::SYSTEM_AREA_SIZE);
const AMPLE: Duration = Duration::from_secs(60);

/// A64 encodings (Arm ARM C6.2) of what the guests need.
mod a64 {
    pub(super) const HVC: u32 = 0xd400_0002;
    pub(super) const WFI: u32 = 0xd503_207f;
    /// Branch to itself.
    pub(super) const HANG: u32 = 0x1400_0000;

    /// MOVZ Xd, #imm, LSL #16.
    pub(super) fn movz_high(d: u32, imm: u32) -> u32 {
        0xd2a0_0000 | imm << 5 | d
    }

    /// MOVZ Xd, #imm.
    pub(super) fn movz(d: u32, imm: u32) -> u32 {
        0xd280_0000 | imm << 5 | d
    }

    /// MOVK Xd, #imm.
    pub(super) fn movk(d: u32, imm: u32) -> u32 {
        0xf280_0000 | imm << 5 | d
    }

    /// ADD Xd, Xn, #imm.
    pub(super) fn add(d: u32, n: u32, imm: u32) -> u32 {
        0x9100_0000 | imm << 10 | n << 5 | d
    }

    /// STRB Wt, [Xn].
    pub(super) fn strb(t: u32, n: u32) -> u32 {
        0x3900_0000 | n << 5 | t
    }

    /// LDRB Wt, [Xn, #offset].
    pub(super) fn ldrb(t: u32, n: u32, offset: u32) -> u32 {
        0x3940_0000 | offset << 10 | n << 5 | t
    }

    /// STR Xt, [Xn].
    pub(super) fn str(t: u32, n: u32) -> u32 {
        0xf900_0000 | n << 5 | t
    }

    /// Branch by a number of instructions.
    pub(super) fn b(by: i32) -> u32 {
        0x1400_0000 | (by as u32 & 0x03ff_ffff)
    }

    /// TBZ Wt, #bit, by a number of instructions.
    pub(super) fn tbz(t: u32, bit: u32, by: i32) -> u32 {
        0x3600_0000 | bit << 19 | (by as u32 & 0x3fff) << 5 | t
    }
}

/// X1 = the serial port.
fn serial_port() -> u32 {
    a64::movz_high(1, (map::SERIAL.base >> 16) as u32)
}

/// PSCI SYSTEM_OFF.
fn power_off() -> [u32; 4] {
    [a64::movz_high(0, 0x8400), a64::movk(0, 8), a64::HVC, a64::HANG]
}

/// What the guest wrote.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Console {
    fn text(&self) -> Vec<u8> {
        self.0.lock().clone()
    }
}

/// Writes an arm64 Image whose code is `code`.
fn image(dir: &Path, code: &[u32]) -> MachineConfig {
    let mut file = vec![0; 64];
    file[..4].copy_from_slice(&a64::b(16).to_le_bytes());
    file[16..24].copy_from_slice(&0x1_0000u64.to_le_bytes());
    file[56..60].copy_from_slice(b"ARM\x64");
    file.extend(code.iter().flat_map(|word| word.to_le_bytes()));
    let path = dir.join("Image");
    std::fs::write(&path, file).unwrap();
    MachineConfig { memory: map::RAM_MIN, ..MachineConfig::new("tiny", path) }
}

/// A guest that counts in X2, and writes each count to RAM and, its low byte, to the console.
fn counting(dir: &Path) -> MachineConfig {
    let code = [
        serial_port(),
        a64::movz_high(3, 0x8030),
        a64::add(2, 2, 1),
        a64::str(2, 3),
        a64::strb(2, 1),
        a64::b(-3),
    ];
    let deterministic = Some(Deterministic { seed: 42, ..Deterministic::default() });
    MachineConfig { deterministic, ..image(dir, &code) }
}

fn boot(config: &MachineConfig) -> (Machine, Console) {
    let console = Console::default();
    (Machine::boot(config.clone(), Box::new(console.clone())).unwrap(), console)
}

fn memory(machine: &Machine) -> Vec<u8> {
    let mut bytes = vec![0; machine.ram().size() as usize];
    machine.ram().read_slice(&mut bytes, GuestAddress(map::RAM_BASE)).unwrap();
    bytes
}

fn restore(
    config: &MachineConfig,
    sections: Vec<Section>,
    image: &[u8],
    identity: Identity,
) -> (Machine, Console) {
    let console = Console::default();
    let options = RestoreOptions { identity, ..RestoreOptions::default() };
    let ram = GuestRam::new(config.memory).unwrap();
    ram.write_slice(image, GuestAddress(map::RAM_BASE)).unwrap();
    let sink = Box::new(console.clone());
    let machine = Machine::restore(config.clone(), sections, options, ram, sink).unwrap();
    (machine, console)
}

#[test]
fn a_guest_writes_to_its_console_and_powers_off() {
    let dir = TempDir::new().unwrap();
    let mut code = vec![serial_port()];
    for byte in b"hi" {
        code.extend([a64::movz(2, u32::from(*byte)), a64::strb(2, 1)]);
    }
    code.extend(power_off());
    let (machine, console) = boot(&image(dir.path(), &code));
    machine.resume().unwrap();
    assert_eq!(machine.wait(), Outcome::PowerOff);
    assert!(machine.drain_console(AMPLE));
    assert_eq!(console.text(), b"hi");
    assert!(machine.timings().first_console_byte() >= machine.timings().first_instruction());
}

#[test]
fn console_input_reaches_the_guest_in_order_however_much_it_is() {
    let dir = TempDir::new().unwrap();
    // Sends back each byte until one has bit 7 set.
    let mut code = vec![
        serial_port(),
        // LSR.DR
        a64::ldrb(2, 1, 5),
        a64::tbz(2, 0, -1),
        a64::ldrb(2, 1, 0),
        a64::strb(2, 1),
        a64::tbz(2, 7, -4),
    ];
    code.extend(power_off());
    let (machine, console) = boot(&image(dir.path(), &code));
    let mut sent: Vec<u8> = (0..1000u32).map(|n| n as u8 & 0x7f).collect();
    sent.push(0x80);
    machine.resume().unwrap();
    machine.console_input().send(&sent).unwrap();
    assert_eq!(machine.wait(), Outcome::PowerOff);
    assert!(machine.drain_console(AMPLE));
    assert_eq!(console.text(), sent);
}

#[test]
fn every_vcpu_is_switched_on_through_psci() {
    let dir = TempDir::new().unwrap();
    let entry = (map::RAM_BASE + map::SYSTEM_AREA_SIZE) as u32 + 64 + 4 * 9;
    // CPU_ON of vCPU 1, then sleep for ever.
    let mut code = vec![
        a64::movz_high(0, 0xc400),
        a64::movk(0, 3),
        a64::movz(1, 1),
        a64::movz_high(2, entry >> 16),
        a64::movk(2, entry & 0xffff),
        a64::movz(3, u32::from(b'!')),
        a64::HVC,
        a64::WFI,
        a64::b(-1),
    ];
    // vCPU 1: writes its context and powers off.
    code.extend([serial_port(), a64::strb(0, 1)]);
    code.extend(power_off());
    let config = MachineConfig { vcpus: 2, ..image(dir.path(), &code) };
    let (machine, console) = boot(&config);
    machine.resume().unwrap();
    assert_eq!(machine.wait(), Outcome::PowerOff);
    assert!(machine.drain_console(AMPLE));
    assert_eq!(console.text(), b"!");
}

#[test]
fn a_sleeping_guest_can_be_paused_and_a_deterministic_one_is_idle() {
    let dir = TempDir::new().unwrap();
    let config = image(dir.path(), &[a64::WFI, a64::b(-1)]);
    let (machine, _) = boot(&config);
    for _ in 0..10 {
        machine.resume().unwrap();
        machine.pause(AMPLE).unwrap();
    }
    assert_eq!(machine.state(), RunState::Paused);
    let deterministic = Some(Deterministic::default());
    let (machine, _) = boot(&MachineConfig { deterministic, ..config });
    assert_eq!(machine.run_until(1000).unwrap(), RunUntil::Idle);
}

#[test]
fn a_deterministic_machine_whose_only_vcpu_is_off_is_idle() {
    let dir = TempDir::new().unwrap();
    // PSCI CPU_OFF is 0x8400_0002.
    let code = [a64::movz_high(0, 0x8400), a64::movk(0, 2), a64::HVC, a64::HANG];
    let deterministic = Some(Deterministic::default());
    let config = MachineConfig { deterministic, ..image(dir.path(), &code) };
    let (machine, _) = boot(&config);
    assert_eq!(machine.run_until(1000).unwrap(), RunUntil::Idle);
    // It can be saved, and is still off afterwards.
    let image = memory(&machine);
    let sections = machine.save().unwrap();
    drop(machine);
    let (restored, _) = restore(&config, sections, &image, Identity::Same);
    assert_eq!(restored.run_until(2000).unwrap(), RunUntil::Idle);
}

#[test]
fn a_deterministic_machine_stops_at_the_exact_count() {
    let dir = TempDir::new().unwrap();
    let (machine, _) = boot(&counting(dir.path()));
    for count in [1, 2, 3, 10, 1000, 1001, 123_456] {
        assert_eq!(machine.run_until(count).unwrap(), RunUntil::Reached);
        assert_eq!(machine.retired().unwrap(), [Some(count)]);
    }
    // One branch, two set-up instructions, then four for each count.
    let mut count = [0; 8];
    machine.ram().read_slice(&mut count, GuestAddress(0x8030_0000)).unwrap();
    assert!((123_456u64 - 3).abs_diff(4 * u64::from_le_bytes(count)) <= 4);
}

#[test]
fn a_restored_machine_goes_on_as_if_nothing_had_happened() {
    let dir = TempDir::new().unwrap();
    let config = counting(dir.path());
    for (first, second) in [(1, 1), (7, 100), (50_001, 60_013)] {
        let (machine, console) = boot(&config);
        machine.run_until(first).unwrap();
        let (sections, image) = (machine.save().unwrap(), memory(&machine));
        let before = console.text();
        machine.run_until(first + second).unwrap();
        let (other, rest) = restore(&config, sections, &image, Identity::Same);
        other.run_until(first + second).unwrap();
        assert_eq!(other.save().unwrap(), machine.save().unwrap());
        assert!(memory(&other) == memory(&machine), "memory differs");
        assert_eq!([before, rest.text()].concat(), console.text());
    }
}

#[test]
fn a_clone_differs_in_its_generation_id_only() {
    let dir = TempDir::new().unwrap();
    let config = counting(dir.path());
    let (machine, _) = boot(&config);
    machine.run_until(500).unwrap();
    let (sections, image) = (machine.save().unwrap(), memory(&machine));
    let (clone, _) = restore(&config, sections, &image, Identity::Clone);
    let clone = memory(&clone);
    let id = (map::VMGENID.base - map::RAM_BASE) as usize;
    let differing: Vec<_> = (0..image.len()).filter(|at| image[*at] != clone[*at]).collect();
    assert!(!differing.is_empty());
    assert!(differing.iter().all(|at| (id..id + 16).contains(at)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn damaged_states_are_refused_or_run_without_a_panic(
        at in any::<prop::sample::Index>(),
        bytes in prop::collection::vec(
            (any::<prop::sample::Index>(), prop_oneof![Just(0u8), Just(0xff), any::<u8>()]),
            1..6,
        ),
    ) {
        static GOOD: OnceLock<(TempDir, MachineConfig, Vec<Section>, Vec<u8>)> = OnceLock::new();
        let (_dir, config, sections, code) = GOOD.get_or_init(|| {
            let dir = TempDir::new().unwrap();
            let config = counting(dir.path());
            let (machine, _) = boot(&config);
            machine.run_until(100).unwrap();
            let mut code = vec![0; 0x1000];
            machine.ram().read_slice(&mut code, KERNEL).unwrap();
            let sections = machine.save().unwrap();
            (dir, config, sections, code)
        });
        let mut sections = sections.clone();
        let section = at.get_mut(&mut sections);
        for (at, byte) in &bytes {
            *at.get_mut(&mut section.payload) = *byte;
        }
        let ram = GuestRam::new(config.memory).unwrap();
        ram.write_slice(code, KERNEL).unwrap();
        let options = RestoreOptions::default();
        let sink = Box::new(std::io::sink());
        let restored = Machine::restore(config.clone(), sections, options, ram, sink);
        if let Ok(machine) = restored {
            let ended = machine.run_until(400);
            let panicked = matches!(&ended, Ok(RunUntil::Ended(Outcome::Crashed(_))));
            prop_assert!(!panicked, "{:?}", ended);
            machine.save().unwrap();
        }
    }
}

#[test]
fn two_runs_from_one_seed_are_equal_from_the_first_byte() {
    let dir = TempDir::new().unwrap();
    let config = counting(dir.path());
    let (a, b) = (boot(&config).0, boot(&config).0);
    for machine in [&a, &b] {
        machine.run_until(10_000).unwrap();
    }
    assert_eq!(a.save().unwrap(), b.save().unwrap());
    assert!(memory(&a) == memory(&b), "memory differs");
}

#[test]
fn a_kernel_with_64_kib_pages_is_refused() {
    let dir = TempDir::new().unwrap();
    let config = image(dir.path(), &[a64::HANG]);
    let mut file = std::fs::read(&config.kernel).unwrap();
    file[24] = 3 << 1;
    std::fs::write(&config.kernel, file).unwrap();
    let refused = Machine::boot(config, Box::new(std::io::sink())).err().unwrap();
    assert!(matches!(refused, MachineError::Granule { .. }));
}

#[test]
fn a_state_that_the_cpu_cannot_have_had_is_refused_by_name() {
    use squib_vmm::hypervisor::VcpuState;
    let dir = TempDir::new().unwrap();
    let config = counting(dir.path());
    let (machine, _) = boot(&config);
    machine.run_until(100).unwrap();
    let good = machine.save().unwrap();
    type Change = fn(&mut VcpuState);
    let changes: [(&str, Change); 6] = [
        ("pstate", |state| state.pstate = u64::MAX),
        ("fpcr", |state| state.fpcr = 1 << 40),
        ("fpsr", |state| state.fpsr = u64::from(u32::MAX)),
        ("sysregs", |state| state.sysregs.clear()),
        ("sysregs", |state| state.sysregs.reverse()),
        ("sysregs", |state| state.sysregs.push((u16::MAX, 0))),
    ];
    for (field, change) in changes {
        let mut sections = good.clone();
        let vcpu = sections.iter_mut().find(|section| section.kind == "vcpu").unwrap();
        let mut state: VcpuState = vcpu.decode().unwrap();
        change(&mut state);
        *vcpu = Section::encode("0", &state).unwrap();
        let ram = GuestRam::new(config.memory).unwrap();
        let options = RestoreOptions::default();
        let sink = Box::new(std::io::sink());
        let refused = Machine::restore(config.clone(), sections, options, ram, sink);
        let refused = refused.err().unwrap().to_string();
        assert!(refused.contains(field) && refused.contains("vcpu"), "{refused}");
    }
}

#[test]
fn any_count_of_instructions_is_taken_over_and_saved_back() {
    use squib_vmm::hypervisor::VcpuState;
    let dir = TempDir::new().unwrap();
    let config = counting(dir.path());
    let (machine, _) = boot(&config);
    machine.run_until(100).unwrap();
    let good = machine.save().unwrap();
    let count = |sections: &[Section]| {
        let vcpu = sections.iter().find(|section| section.kind == "vcpu").unwrap();
        vcpu.decode::<VcpuState>().unwrap().retired
    };
    for retired in [0, count(&good) + 1, u64::MAX - 1, u64::MAX] {
        let mut sections = good.clone();
        let vcpu = sections.iter_mut().find(|section| section.kind == "vcpu").unwrap();
        let mut state: VcpuState = vcpu.decode().unwrap();
        state.retired = retired;
        *vcpu = Section::encode("0", &state).unwrap();
        let ram = GuestRam::new(config.memory).unwrap();
        let (options, sink) = (RestoreOptions::default(), Box::new(std::io::sink()));
        let machine = Machine::restore(config.clone(), sections, options, ram, sink).unwrap();
        assert_eq!(count(&machine.save().unwrap()), retired);
    }
}
