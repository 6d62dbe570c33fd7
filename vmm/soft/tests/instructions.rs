//! Recorded cases of single instructions on a whole vCPU at EL1, in Normal memory at its physical address:
//! `INSN name=value... -> name=value...`, in hexadecimal. Registers that are not named are zero
//! before, and unchanged after.

use std::sync::Arc;

use squib_soft::{Counter, Cpu, CpuState, Exit, Ram, Shared, SysReg};

const BASE: u64 = 0x1600_0000;
const SIZE: usize = 5 << 20;
/// The instruction lies behind the memory that the cases use.
const CODE: u64 = BASE + (4 << 20);
/// A level 1 and a level 2 table, behind the code.
const TABLE: u64 = CODE + 0x1_0000;
const CPACR_EL1: SysReg = SysReg::new(3, 0, 1, 0, 2);
const SCTLR_EL1: SysReg = SysReg::new(3, 0, 1, 0, 0);
const TTBR0_EL1: SysReg = SysReg::new(3, 0, 2, 0, 0);
const TCR_EL1: SysReg = SysReg::new(3, 0, 2, 0, 2);
const MAIR_EL1: SysReg = SysReg::new(3, 0, 10, 2, 0);

#[repr(align(4096))]
struct Page(#[expect(dead_code, reason = "only its size and alignment count")] [u8; 4096]);

struct Keep(#[expect(dead_code, reason = "held for its memory")] Vec<Page>);

struct Machine {
    cpu: Cpu,
    host: *mut u8,
}

impl Machine {
    fn new() -> Self {
        let mut pages: Vec<Page> = Vec::new();
        pages.resize_with(SIZE / 4096, || Page([0; 4096]));
        let host = pages.as_mut_ptr().cast::<u8>();
        // SAFETY: the vector lives in `keep` and is not touched as such any more.
        let ram = unsafe { Ram::new(host, SIZE as u64, BASE, Arc::new(Keep(pages))) };
        let shared = Shared::new(ram, Arc::new(Counter::instructions(0)));
        Self { cpu: Cpu::new(&shared, 1 << 31), host }
    }

    fn byte(&self, address: u64) -> *mut u8 {
        assert!((BASE..BASE + SIZE as u64).contains(&address), "{address:#x}");
        // SAFETY: checked.
        unsafe { self.host.add((address - BASE) as usize) }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        for (at, byte) in (address..).zip(bytes) {
            // SAFETY: `byte` has checked the address, and no vCPU runs.
            unsafe { self.byte(at).write(*byte) };
        }
    }

    fn read(&self, address: u64) -> u64 {
        // SAFETY: as above.
        u64::from_le_bytes(std::array::from_fn(|n| unsafe { self.byte(address + n as u64).read() }))
    }

    /// What the cases find in memory at `address`.
    fn pattern(address: u64) -> u64 {
        let byte = |n| (((address + n) as u32 & 1023).wrapping_mul(0x9E37_79B9) >> 24) as u8;
        u64::from_le_bytes(std::array::from_fn(|n| byte(n as u64)))
    }

    fn fresh(&mut self) -> CpuState {
        self.cpu.start(CODE, 0);
        let mut state = self.cpu.state();
        // Blocks of 2 MiB with AF set, those of the cases' memory for EL0 too.
        self.write(TABLE, &((TABLE + 0x1000) | 3).to_le_bytes());
        for at in (BASE..BASE + SIZE as u64).step_by(2 << 20) {
            let user = if at < CODE { 1 << 6 } else { 0 };
            let block = at | 1 << 10 | user | 1;
            self.write(TABLE + 0x1000 + 8 * (at >> 21), &block.to_le_bytes());
        }
        for (reg, value) in &mut state.sysregs {
            match *reg {
                CPACR_EL1 => *value = 3 << 20, // FPEN
                SCTLR_EL1 => *value |= 1,      // M
                TTBR0_EL1 => *value = TABLE,
                TCR_EL1 => *value = 25, // T0SZ: 39 bits
                MAIR_EL1 => *value = 0xff,
                _ => {}
            }
        }
        state
    }
}

/// A name and its value, in one assignment of a case.
fn parse(assignment: &str) -> (&str, &str, u128) {
    let (name, value) = assignment.split_once('=').expect(assignment);
    let value = u128::from_str_radix(value, 16).expect(assignment);
    let digits = name.find(|c: char| c.is_ascii_digit()).unwrap_or(name.len());
    let (kind, number) = name.split_at(digits);
    (kind, number, value)
}

/// Sets a register; false if it is memory.
fn set(state: &mut CpuState, assignment: &str) -> bool {
    let (kind, number, value) = parse(assignment);
    let number = || number.parse::<usize>().expect(assignment);
    match kind {
        "x" => state.x[number()] = value as u64,
        "v" => state.v[number()] = value,
        "sp" => state.sp_el1 = value as u64,
        "nzcv" => state.pstate = state.pstate & 0x0FFF_FFFF | value as u64,
        "fpcr" => state.fpcr = value as u32,
        "fpsr" => state.fpsr = value as u32,
        "m" => return false,
        _ => panic!("{assignment}"),
    }
    true
}

/// Runs every case and compares all registers and the memory around it; the number of cases.
fn check(text: &str) -> usize {
    let mut machine = Machine::new();
    let words = (BASE..CODE).step_by(8);
    words.for_each(|at| machine.write(at, &Machine::pattern(at).to_le_bytes()));
    let mut count = 0;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (before, after) = line.split_once(" -> ").expect(line);
        let mut words = before.split(' ');
        let insn = u32::from_str_radix(words.next().expect(line), 16).expect(line);
        machine.write(CODE, &insn.to_le_bytes());
        let mut state = machine.fresh();
        words.for_each(|word| assert!(set(&mut state, word), "{line}"));
        machine.cpu.set_state(&state).expect(line);
        let limit = state.retired + 1;
        while machine.cpu.run(Some(limit)) != Exit::Limit {}
        let mut actual = machine.cpu.state();

        let mut expected = state;
        for word in after.split(' ').filter(|word| !word.is_empty()) {
            if !set(&mut expected, word) {
                let (_, _, value) = parse(word);
                let (name, _) = word.split_once('=').expect(line);
                let address = u64::from_str_radix(&name[1..], 16).expect(line);
                assert_eq!(machine.read(address), value as u64, "{line}");
                machine.write(address, &Machine::pattern(address).to_le_bytes());
            }
        }
        assert_eq!(actual.pc, CODE + 4, "undefined or a fault: {line}");
        // Not part of the cases.
        (actual.pc, actual.retired, actual.exclusive) =
            (expected.pc, expected.retired, expected.exclusive);
        assert_eq!(actual, expected, "{line}");
        count += 1;
    }
    let changed = (BASE..CODE).step_by(8).find(|at| machine.read(*at) != Machine::pattern(*at));
    assert_eq!(changed, None, "written by no case");
    count
}

#[test]
fn integer_instructions_give_what_qemu_gives() {
    let count = check(include_str!("integer.txt"));
    assert!(count > 150, "{count} cases");
}

#[test]
fn loads_and_stores_give_what_qemu_gives() {
    let count = check(include_str!("memory.txt"));
    assert!(count > 400, "{count} cases");
}

#[test]
fn loads_and_stores_of_absent_features_are_undefined() {
    const VBAR_OFFSET: u64 = 0x200;
    let mut machine = Machine::new();
    for (insn, what) in [
        (0x089f_7c00_u32, "stllrb w0, [x0]"),
        (0x48df_7c00, "ldlarh w0, [x0]"),
        (0x38bf_c000, "ldaprb w0, [x0]"),
        (0xd900_0000, "stlur x0, [x0]"),
        (0xd920_0800, "stg x0, [x0]"),
        (0xf820_0400, "ldraa x0, [x0]"),
        (0x4821_7c00, "casp with an odd pair"),
    ] {
        machine.write(CODE, &insn.to_le_bytes());
        let mut state = machine.fresh();
        state.x[0] = BASE;
        machine.cpu.set_state(&state).expect(what);
        machine.cpu.run(Some(state.retired + 1));
        // VBAR_EL1 is zero: the current level with SP_EL1.
        assert_eq!(machine.cpu.pc(), VBAR_OFFSET, "{what}");
    }
}
