//! Random streams: a few instructions in a row, with branches among them and a loop around them,
//! on registers and on the case's memory. What single instructions cannot show: blocks, chaining,
//! flags that are computed late, what a branch skips.

use super::classes::{self, Class};
use super::machine::{self, Stepping};
use super::values::{self, Rng};
use super::{BATCH, Case, End, MAX_CODE, SCRATCH, scratch_address};

/// The address of the middle of the case's memory; nothing writes it.
const BASE: u32 = 28;
/// Counts the loop's rounds; nothing else writes it.
const COUNTER: u32 = 26;
/// Offset of what [`BASE`] points to.
const MIDDLE: u64 = 512;

const NOP: u32 = 0xD503_201F;

/// Classes that the streams draw from.
const DATA: &[&str] = &[
    "int-add-sub-immediate",
    "int-logical-immediate",
    "int-move-wide",
    "int-bitfield",
    "int-extract",
    "int-logical-shifted",
    "int-add-sub-shifted",
    "int-add-sub-extended",
    "int-add-sub-carry",
    "int-conditional-compare",
    "int-conditional-select",
    "int-data2",
    "int-data1",
    "int-data3",
    "int-pc-relative",
    "system-nzcv",
    "simd",
    "crypto",
    "fp",
];
const MEMORY: &[&str] = &[
    "mem-unscaled",
    "mem-unsigned",
    "mem-pair",
    "mem-structures",
    "mem-structure",
    "mem-exclusive",
    "mem-atomic",
    "mem-cas",
    "mem-literal",
];

/// A source of streams.
#[derive(Debug)]
pub struct Streams {
    data: Vec<u32>,
    memory: Vec<u32>,
}

impl Streams {
    /// Finds allocated words of all classes.
    ///
    /// # Errors
    /// Those of [`machine::run`].
    pub fn new(rng: &mut Rng) -> anyhow::Result<Self> {
        Ok(Self { data: pool(DATA, rng)?, memory: pool(MEMORY, rng)? })
    }

    /// A random stream, number `index` of its batch.
    pub fn case(&self, rng: &mut Rng, index: usize) -> Case {
        let length = 4 + rng.below(MAX_CODE as u32 - 6);
        let mut code: Vec<u32> = (0..length).map(|at| self.word(rng, length - at)).collect();
        let mut state = values::state(rng);
        state.x[COUNTER as usize] = 1;
        if rng.one_in(2) {
            state.x[COUNTER as usize] = 1 + u64::from(rng.below(20));
            let back = code.len() as u32 + 1;
            code.push(0xD100_0400 | COUNTER << 5 | COUNTER); // sub
            code.push(0xB500_0000 | (back.wrapping_neg() & 0x7FFFF) << 5 | COUNTER); // cbnz
        }
        let memory =
            (0..SCRATCH / 8).flat_map(|_| values::integer(rng, 64).to_le_bytes()).collect();
        let mut case = Case { code, state, memory };
        relocate(&mut case, index);
        case
    }

    /// A word with `left` words from it to the end.
    fn word(&self, rng: &mut Rng, left: u32) -> u32 {
        let offset = 1 + rng.below(left.min(5));
        let reg = rng.below(32);
        match rng.below(16) {
            0 => 0x5400_0000 | offset << 5 | rng.below(14),
            1 => {
                0x3400_0000
                    | rng.below(4) << 24 & 0x0100_0000
                    | rng.below(2) << 31
                    | offset << 5
                    | reg
            }
            2 => {
                0x3600_0000
                    | rng.below(2) << 24
                    | rng.below(2) << 31
                    | rng.below(32) << 19
                    | offset << 5
                    | reg
            }
            3 if rng.one_in(3) => 0x1400_0000 | offset,
            3..=6 => self.memory[rng.below(self.memory.len() as u32) as usize],
            _ => self.data[rng.below(self.data.len() as u32) as usize],
        }
    }
}

/// Points the base into the memory of case `index`.
pub fn relocate(case: &mut Case, index: usize) {
    case.state.x[BASE as usize] = scratch_address(index) + MIDDLE;
}

/// The case with every instruction made a NOP that `differs` does not need.
///
/// # Errors
/// Those of `differs`.
pub fn minimise(
    case: &Case,
    mut differs: impl FnMut(&[Case]) -> anyhow::Result<Vec<bool>>,
) -> anyhow::Result<Case> {
    let mut best = case.clone();
    // Without its decrement a loop would not end.
    let looped = best.code.last().is_some_and(|last| last >> 24 == 0xB5);
    let removable = best.code.len() - if looped { 2 } else { 0 };
    loop {
        let candidates: Vec<_> = (0..removable)
            .filter(|at| best.code[*at] != NOP)
            .map(|at| {
                let mut candidate = best.clone();
                candidate.code[at] = NOP;
                candidate
            })
            .enumerate()
            .map(|(index, mut candidate)| {
                relocate(&mut candidate, index);
                candidate
            })
            .collect();
        let found = differs(&candidates)?.iter().position(|differs| *differs);
        match found {
            Some(index) => best = candidates[index].clone(),
            None => return Ok(best),
        }
    }
}

/// Words of the classes that end without a signal, changed to leave both reserved registers alone.
fn pool(names: &[&str], rng: &mut Rng) -> anyhow::Result<Vec<u32>> {
    let classes: Vec<&Class> = names.iter().flat_map(|name| classes::named(name)).collect();
    let mut pool = Vec::new();
    while pool.len() < 8 * BATCH {
        let cases: Vec<_> = (0..BATCH)
            .map(|index| {
                let class = classes[rng.below(classes.len() as u32) as usize];
                let insn = tame(class, class.word(rng), rng);
                let mut case = class.operands.case(insn, rng, index);
                relocate(&mut case, index);
                case
            })
            .collect();
        let outcomes = machine::run(&cases, Stepping::Blocks)?;
        let done = cases.iter().zip(outcomes).filter(|(_, outcome)| outcome.end == End::Next);
        pool.extend(done.map(|(case, _)| case.insn()));
    }
    Ok(pool)
}

/// The word with other registers where it writes a reserved one, and an address in the memory.
fn tame(class: &Class, mut insn: u32, rng: &mut Rng) -> u32 {
    let mut spare = |at: u32| {
        if [BASE, COUNTER].contains(&(insn >> at & 31)) {
            insn ^= 1 << at;
        }
    };
    spare(0);
    if matches!(class.name, "mem-pair" | "mem-exclusive") {
        spare(10);
    }
    if matches!(class.name, "mem-exclusive" | "mem-atomic" | "mem-cas") {
        spare(16);
    }
    if class.name.starts_with("mem") && class.name != "mem-literal" {
        insn = insn & !(31 << 5) | BASE << 5;
    }
    let insn = match class.name {
        "mem-unsigned" => insn & !(0xFFF << 10) | rng.below(16) << 10,
        // A plain offset of at most 16 registers.
        "mem-pair" => {
            let offset = rng.below(32).wrapping_sub(16) & 0x7F;
            insn & !(3 << 23 | 0x7F << 15) | 2 << 23 | offset << 15
        }
        // A store-exclusive of another size than the load's may fail or not: doublewords only.
        "mem-exclusive" if insn >> 23 & 1 == 0 => (insn | 3 << 30) & !(1 << 21),
        _ => insn,
    };
    class.operands.avoid_unpredictable(insn)
}
