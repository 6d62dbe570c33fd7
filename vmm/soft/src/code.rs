//! Decoded code, kept by physical page.
//!
//! Like a real instruction cache it does not see stores: the guest says with IC IVAU and friends
//! what it changed (CTR_EL0.DIC is clear). Each vCPU has its own.

use crate::{
    decode,
    op::{MAX_BLOCK, Op},
    shared::Ram,
};

/// Instructions on a 4 KiB page.
const PAGE_INSNS: usize = 1024;

/// The blocks decoded from one page.
pub(crate) struct PageCode {
    /// First op of the block that starts at each instruction, or null.
    pub(crate) blocks: [*mut Op; PAGE_INSNS],
    /// Number of the page in RAM.
    pub(crate) index: usize,
    /// The page's 4 KiB.
    host: *const u8,
    owned: Vec<Box<[Op]>>,
}

/// All decoded code of one vCPU.
pub(crate) struct CodeCache {
    /// By number of the page in RAM, in groups, so that a machine with much RAM begins as fast as one with
    /// little. A page's record stays where it is once it exists, since translations point to it.
    groups: Vec<Option<Box<Group>>>,
    /// Blocks that are out of use but may still be executing; freed by [`sweep`](Self::sweep).
    retired: Vec<Box<[Op]>>,
    /// Ops in use.
    ops: usize,
    /// Records in `pages`.
    records: usize,
}

/// Pages of a group: 2 MiB of RAM.
const GROUP: usize = 512;
type Group = [Option<Box<PageCode>>; GROUP];

/// When more ops than this are held, all are dropped and decoding starts anew: 96 MiB.
const MAX_OPS: usize = 4 << 20;
/// The same for records: 128 MiB. A guest that executes a little on every page of its RAM must not
/// take many times that RAM.
const MAX_RECORDS: usize = 16 << 10;

impl CodeCache {
    pub(crate) fn new(ram: &Ram) -> Self {
        let groups = (0..ram.pages().div_ceil(GROUP)).map(|_| None).collect();
        Self { groups, retired: Vec::new(), ops: 0, records: 0 }
    }

    /// The record of page number `index`, whose 4 KiB of RAM are at `host`.
    pub(crate) fn page(&mut self, index: usize, host: *const u8) -> *mut PageCode {
        let group =
            self.groups[index / GROUP].get_or_insert_with(|| Box::new([const { None }; GROUP]));
        let record = group[index % GROUP].get_or_insert_with(|| {
            self.records += 1;
            let blocks = [std::ptr::null_mut(); PAGE_INSNS];
            Box::new(PageCode { blocks, index, host, owned: Vec::new() })
        });
        &mut **record
    }

    /// Decodes the block that starts at byte `offset` of the page, and keeps it.
    pub(crate) fn decode(&mut self, code: &mut PageCode, offset: usize) -> *mut Op {
        let mut words = [0u32; MAX_BLOCK];
        let count = MAX_BLOCK.min((4096 - offset) / 4);
        for (n, word) in words[..count].iter_mut().enumerate() {
            // SAFETY: `host` is a page of RAM that outlives the cache; offset + 4 * n lies in it and
            // is a multiple of 4.
            let bytes = unsafe { code.host.add(offset + 4 * n).cast::<u32>().read_volatile() };
            *word = u32::from_le(bytes);
        }
        let mut block = decode::block(&words[..count], offset as u16).into_boxed_slice();
        let first = block.as_mut_ptr();
        self.ops += block.len();
        code.owned.push(block);
        code.blocks[offset / 4] = first;
        first
    }

    /// Takes the blocks of page number `page` out of use.
    pub(crate) fn forget_page(&mut self, page: usize) {
        if let Some(Some(group)) = self.groups.get_mut(page / GROUP)
            && let Some(code) = &mut group[page % GROUP]
        {
            code.blocks.fill(std::ptr::null_mut());
            self.ops -= code.owned.iter().map(|block| block.len()).sum::<usize>();
            self.retired.append(&mut code.owned);
        }
    }

    /// Takes all blocks out of use.
    pub(crate) fn drop_all(&mut self) {
        for group in 0..self.groups.len() {
            if self.groups[group].is_some() {
                (group * GROUP..(group + 1) * GROUP).for_each(|page| self.forget_page(page));
            }
        }
    }

    /// Frees what is out of use. When too much is held, everything is dropped, the records too, and
    /// the answer is true: no translation may lead to them any more. Called when no block is
    /// executing.
    #[must_use]
    pub(crate) fn sweep(&mut self) -> bool {
        self.retired.clear();
        if self.ops <= MAX_OPS && self.records <= MAX_RECORDS {
            return false;
        }
        self.groups.fill_with(|| None);
        (self.ops, self.records) = (0, 0);
        true
    }
}
