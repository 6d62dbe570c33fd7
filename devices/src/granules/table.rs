//! What is allowed, granule by granule.

use std::{
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, Ordering},
    },
};

/// Granules of a leaf.
const LEAF: u64 = 4096;

/// One byte of rights a granule. Read by anybody at any time, changed under the lock of the granules.
#[derive(Debug)]
pub(super) enum Table {
    /// One behind the other, for those that read it on their own. An entry for 64 KiB of RAM.
    Flat(Arc<[AtomicU8]>),
    /// In leaves, which take no room while all granules of one have the same rights. A disk may be a thousand
    /// times as large as what is in it.
    Sparse(Box<[Leaf]>),
}

#[derive(Debug)]
pub(super) struct Leaf {
    /// The rights of all, until they have their own.
    uniform: AtomicU8,
    own: OnceLock<Box<[AtomicU8]>>,
}

impl Table {
    pub(super) fn flat(count: u64, access: u8) -> Self {
        Self::Flat((0..count).map(|_| AtomicU8::new(access)).collect())
    }

    pub(super) fn sparse(count: u64, access: u8) -> Self {
        let leaf = |_| Leaf { uniform: AtomicU8::new(access), own: OnceLock::new() };
        Self::Sparse((0..count.div_ceil(LEAF)).map(leaf).collect())
    }

    /// The rights of `granule`. Acquire: what was done before they were given is seen.
    #[inline]
    pub(super) fn get(&self, granule: u64) -> u8 {
        match self {
            Self::Flat(all) => all[granule as usize].load(Ordering::Acquire),
            Self::Sparse(leaves) => {
                let leaf = &leaves[(granule / LEAF) as usize];
                match leaf.own.get() {
                    Some(own) => own[(granule % LEAF) as usize].load(Ordering::Acquire),
                    None => leaf.uniform.load(Ordering::Acquire),
                }
            }
        }
    }

    /// Changes the rights of every granule in `granules`.
    pub(super) fn update(&self, granules: Range<u64>, change: impl Fn(u8) -> u8) {
        let update = |rights: &AtomicU8| {
            let old = rights.load(Ordering::Acquire);
            let new = change(old);
            if old != new {
                rights.store(new, Ordering::Release);
            }
        };
        let leaves = match self {
            Self::Flat(all) => {
                let all = &all[granules.start as usize..granules.end as usize];
                return all.iter().for_each(update);
            }
            Self::Sparse(leaves) => leaves,
        };
        let mut next = granules.start;
        while next < granules.end {
            let (leaf, first) = (&leaves[(next / LEAF) as usize], next / LEAF * LEAF);
            let (from, to) = (next - first, (granules.end - first).min(LEAF));
            next = first + to;
            // That of what lies behind the last granule says nothing.
            let whole = (from, to) == (0, LEAF);
            let uniform = leaf.uniform.load(Ordering::Acquire);
            if leaf.own.get().is_none() && (whole || change(uniform) == uniform) {
                update(&leaf.uniform);
                continue;
            }
            let own = || (0..LEAF).map(|_| AtomicU8::new(uniform)).collect();
            leaf.own.get_or_init(own)[from as usize..to as usize].iter().for_each(update);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparse_table_says_what_a_flat_one_says() {
        let count = 3 * LEAF + 5;
        let (flat, sparse) = (Table::flat(count, 1), Table::sparse(count, 1));
        for (granules, set, clear) in [
            (7..9, 2, 0),
            (0..count, 0, 2),
            (LEAF..2 * LEAF, 2, 0),
            (LEAF - 1..2 * LEAF + 1, 4, 1),
            (count - 1..count, 2, 0),
            (3 * LEAF..count, 0, 1),
            (5..5, 7, 7),
        ] {
            for table in [&flat, &sparse] {
                table.update(granules.clone(), |rights| rights & !clear | set);
            }
            for granule in 0..count {
                assert_eq!(flat.get(granule), sparse.get(granule), "{granule} after {granules:?}");
            }
        }
    }

    #[test]
    fn equal_rights_take_no_room() {
        let table = Table::sparse(1 << 24, 0);
        table.update(0..1 << 24, |_| 1);
        table.update(5..6, |_| 1);
        let Table::Sparse(leaves) = &table else { panic!() };
        assert_eq!(
            (leaves.len(), leaves.iter().filter(|leaf| leaf.own.get().is_some()).count()),
            (4096, 0)
        );
        table.update(5..6, |_| 3);
        assert_eq!(leaves.iter().filter(|leaf| leaf.own.get().is_some()).count(), 1);
    }
}
