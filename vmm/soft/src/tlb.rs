//! Cached translations: for data a host address a page, for code the page's decoded blocks.
//!
//! An entry's tag is the virtual page number in bits 63 to 12 and a generation in bits 11 to 2. A
//! generation belongs to one half of an address space (its table and its ASID, or all ASIDs where the
//! upper half has global pages only), so forgetting a space costs nothing: it gets a new generation.
//! Direct-mapped by page number, so that forgetting one page in all spaces is forgetting one slot.
//!
//! Only addresses without a tag in their top byte are remembered, so that a page has one number: bit 63
//! then says, as bit 55 always does, which half it is in. Other addresses match no entry.

use crate::{
    code::PageCode,
    mmu::{self, Translation},
};

/// Entries in one bank of data translations.
pub(crate) const DATA_ENTRIES: usize = 512;
/// Entries in one bank of code translations.
const CODE_ENTRIES: usize = 256;
/// Bits of a virtual address that a tag holds.
pub(crate) const PAGE_MASK: u64 = !0xfff;

/// Which permissions an entry was checked for. Discriminants are bank numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Regime {
    El0 = 0,
    El1 = 1,
    /// EL1 with PSTATE.PAN set.
    El1Pan = 2,
}

/// Where a page's bytes lie in host memory.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct DataEntry {
    pub(crate) read_tag: u64,
    pub(crate) write_tag: u64,
    /// Host address minus virtual address.
    pub(crate) addend: u64,
}

/// Where a page's decoded blocks are.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct CodeEntry {
    pub(crate) tag: u64,
    pub(crate) code: *mut PageCode,
}

/// In the tag of an entry for aligned accesses only: the quick way, which does not look at alignment, does
/// not find it.
const ALIGNED_ONLY: u64 = 1;
/// Matches no address: bit 1 of a tag is never set.
const NO_TAG: u64 = 3;
const NO_DATA: DataEntry = DataEntry { read_tag: NO_TAG, write_tag: NO_TAG, addend: 0 };
const NO_CODE: CodeEntry = CodeEntry { tag: NO_TAG, code: std::ptr::null_mut() };

/// Half of an address space.
#[derive(Clone, Copy)]
struct Space {
    /// TTBR0_EL1 or TTBR1_EL1.
    ttbr: u64,
    asid: u16,
    /// No page that is not global has been met. In the upper half such a space serves every ASID.
    global: bool,
    generation: u64,
}

/// Spaces of each half whose entries are kept over a switch to another one.
const SPACES: usize = 16;

/// The spaces of one half.
#[derive(Clone, Copy)]
struct Half {
    spaces: [Option<Space>; SPACES],
    current: usize,
    next: usize,
}

const LOWER: usize = 0;
const UPPER: usize = 1;
const NO_SPACES: Half = Half { spaces: [None; SPACES], current: 0, next: 0 };

/// The translations of one vCPU.
pub(crate) struct Tlb {
    data: Box<[[DataEntry; DATA_ENTRIES]; 3]>,
    code: Box<[[CodeEntry; CODE_ENTRIES]; 2]>,
    /// Generations in use, in place in a tag: lower half, upper half.
    pub(crate) generations: [u64; 2],
    next_generation: u64,
    halves: [Half; 2],
    /// Address ranges mapped by blocks larger than a page, merged where they meet: forgetting any
    /// address of a block forgets all of it.
    blocks: Vec<(u64, u64)>,
}

/// Ranges of blocks that are told apart.
const MAX_BLOCK_RANGES: usize = 64;

impl Tlb {
    /// Without a space: [`switch_space`](Self::switch_space) comes before anything else.
    pub(crate) fn new() -> Self {
        Self {
            data: Box::new([[NO_DATA; DATA_ENTRIES]; 3]),
            code: Box::new([[NO_CODE; CODE_ENTRIES]; 2]),
            generations: [0; 2],
            next_generation: 0,
            halves: [NO_SPACES; 2],
            blocks: Vec::with_capacity(MAX_BLOCK_RANGES + 1),
        }
    }

    /// The slot for `va` in the bank of `regime`.
    #[inline(always)]
    pub(crate) fn data(&self, regime: Regime, va: u64) -> &DataEntry {
        &self.data[regime as usize][(va >> 12) as usize % DATA_ENTRIES]
    }

    /// The slot for `va` in EL0's or EL1's bank.
    #[inline(always)]
    pub(crate) fn code(&self, el1: bool, va: u64) -> &CodeEntry {
        &self.code[usize::from(el1)][(va >> 12) as usize % CODE_ENTRIES]
    }

    /// The tag that an entry for `va` has now.
    #[inline(always)]
    pub(crate) fn tag(&self, va: u64) -> u64 {
        va & PAGE_MASK | self.generations[(va >> 63) as usize]
    }

    /// The tag that an entry for `va` and aligned accesses has now.
    pub(crate) fn tag_aligned(&self, va: u64) -> u64 {
        self.tag(va) | ALIGNED_ONLY
    }

    /// Remembers that reads, and with `writable` writes, of `va`'s page are allowed in `regime` and
    /// that `host` is where `va` lies; with `aligned` if they are aligned.
    pub(crate) fn fill_data(
        &mut self,
        regime: Regime,
        va: u64,
        host: *mut u8,
        writable: bool,
        aligned: bool,
        translation: &Translation,
    ) {
        self.note(va, translation);
        let tag = if aligned { self.tag_aligned(va) } else { self.tag(va) };
        let slot = &mut self.data[regime as usize][(va >> 12) as usize % DATA_ENTRIES];
        *slot = DataEntry {
            read_tag: tag,
            write_tag: if writable { tag } else { NO_TAG },
            addend: (host as u64).wrapping_sub(va),
        };
    }

    /// Remembers that `va`'s page may be executed and that its blocks are in `code`.
    pub(crate) fn fill_code(
        &mut self,
        el1: bool,
        va: u64,
        code: *mut PageCode,
        translation: &Translation,
    ) {
        self.note(va, translation);
        let tag = self.tag(va);
        self.code[usize::from(el1)][(va >> 12) as usize % CODE_ENTRIES] = CodeEntry { tag, code };
    }

    /// Goes over to the address space of `ttbr0` and `ttbr1`.
    pub(crate) fn switch_space(&mut self, ttbr0: u64, ttbr1: u64, asid: u16) {
        // Numbers may run out at the first of the two, which takes away what it has chosen.
        while !(self.switch_half(LOWER, ttbr0, asid) && self.switch_half(UPPER, ttbr1, asid)) {}
    }

    /// False if all entries and spaces were dropped meanwhile.
    fn switch_half(&mut self, half: usize, ttbr: u64, asid: u16) -> bool {
        let Half { spaces, .. } = &self.halves[half];
        let is_it = |space: &Space| {
            let any_asid = half == UPPER && space.global;
            space.ttbr == ttbr && (space.asid == asid || any_asid)
        };
        let known = spaces.iter().position(|space| space.as_ref().is_some_and(is_it));
        if let Some((n, space)) =
            known.and_then(|n| Some((n, self.halves[half].spaces[n].as_mut()?)))
        {
            space.asid = asid;
            self.generations[half] = space.generation;
            self.halves[half].current = n;
            return true;
        }
        let (generation, dropped) = self.fresh_generation();
        let Half { spaces, current, next } = &mut self.halves[half];
        spaces[*next] = Some(Space { ttbr, asid, global: true, generation });
        *current = *next;
        *next = (*next + 1) % SPACES;
        self.generations[half] = generation;
        !dropped
    }

    /// Forgets one page in every space.
    pub(crate) fn forget_page(&mut self, va: u64) {
        let in_block = |&(start, end): &(u64, u64)| start <= va && va < end;
        if self.blocks.iter().any(in_block) {
            self.forget_all();
            return;
        }
        // With a 16 KiB granule one page is four entries; with 4 KiB the other three only miss once.
        let first = (va >> 12) as usize & !3;
        for bank in self.data.iter_mut() {
            bank[first % DATA_ENTRIES..][..4].fill(NO_DATA);
        }
        for bank in self.code.iter_mut() {
            bank[first % CODE_ENTRIES..][..4].fill(NO_CODE);
        }
    }

    /// Forgets the spaces of `asid` but for upper halves that have global pages only. As after
    /// [`forget_all`](Self::forget_all) the caller goes on with [`switch_space`](Self::switch_space).
    pub(crate) fn forget_asid(&mut self, asid: u16) {
        for (half, spaces) in self.halves.iter_mut().enumerate() {
            for space in &mut spaces.spaces {
                if space.is_some_and(|s| s.asid == asid && !(half == UPPER && s.global)) {
                    *space = None;
                }
            }
        }
    }

    /// Forgets everything.
    pub(crate) fn forget_all(&mut self) {
        self.blocks.clear();
        self.halves = [NO_SPACES; 2];
    }

    /// A generation that no entry has, and whether all entries and spaces were dropped for it.
    fn fresh_generation(&mut self) -> (u64, bool) {
        self.next_generation += 1 << 2;
        let dropped = self.next_generation >= 1 << 12;
        if dropped {
            self.next_generation = 1 << 2;
            self.data.iter_mut().for_each(|bank| bank.fill(NO_DATA));
            self.code.iter_mut().for_each(|bank| bank.fill(NO_CODE));
            self.halves = [NO_SPACES; 2];
        }
        (self.next_generation, dropped)
    }

    /// Takes note of what an entry for `va` brings into its half.
    fn note(&mut self, va: u64, translation: &Translation) {
        debug_assert_eq!(va, mmu::untagged(va), "one page has one number");
        self.note_block(va, translation.size);
        if !translation.global {
            let Half { spaces, current, .. } = &mut self.halves[usize::from(mmu::is_upper(va))];
            if let Some(space) = &mut spaces[*current] {
                space.global = false;
            }
        }
    }

    fn note_block(&mut self, va: u64, size: u64) {
        if size <= 0x4000 {
            return;
        }
        let start = va & !(size - 1);
        let end = start.saturating_add(size);
        let meets = |&(s, e): &(u64, u64)| start <= e && s <= end;
        if let Some(range) = self.blocks.iter_mut().find(|range| meets(range)) {
            *range = (range.0.min(start), range.1.max(end));
            return;
        }
        self.blocks.push((start, end));
        if self.blocks.len() > MAX_BLOCK_RANGES {
            let low = self.blocks.iter().map(|r| r.0).min().unwrap_or(start);
            let high = self.blocks.iter().map(|r| r.1).max().unwrap_or(end);
            self.blocks.clear();
            self.blocks.push((low, high));
        }
    }
}
