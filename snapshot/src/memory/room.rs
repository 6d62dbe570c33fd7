//! Whether this host has the memory that a snapshot takes.
//!
//! The size of a machine's memory is a promise, not a need: a guest of 64 GiB that has touched 1 GiB takes 1 GiB.
//! So a size above the host's is only worth a word, unless it is so far above that no guest can mean it. What the
//! snapshot certainly takes, on the other hand, has to be there: the indexes, which are read whole, and the bytes
//! of memory that are not zero, where the restore brings them by itself.

use squib_formats::{image::Index, manifest::Manifest, snapshot_dir::Snapshot};

use crate::{disks::data_bytes, host::HostMemory};

/// A machine's memory may be this many times the host's.
pub const MOST_OVERCOMMIT: u64 = 4;

/// A share of what is available that the thread of a lazy restore leaves to others: one part in this many.
const SPARED: u64 = 4;

/// Why there is no room in this host's memory, or in what a control group leaves of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The machine's memory is far above the host's.
    #[error(
        "{size} bytes of guest memory are more than {MOST_OVERCOMMIT} times the {total} bytes \
         of {}", place(.group)
    )]
    Size {
        /// Bytes of the machine's memory.
        size: u64,
        /// Bytes of the host's, or of the control group.
        total: u64,
        /// The control group.
        group: Option<String>,
    },
    /// The bytes that are brought would not fit.
    #[error(
        "{needed} bytes of guest memory would be loaded, and {available} bytes of {} are \
         available", place(.group)
    )]
    Data {
        /// Bytes that are not zero.
        needed: u64,
        /// Bytes that are available.
        available: u64,
        /// The control group.
        group: Option<String>,
    },
    /// The indexes, which have to be in memory, would not fit.
    #[error(
        "the indexes of the snapshot take {needed} bytes, and {available} bytes of {} are \
         available", place(.group)
    )]
    Indexes {
        /// Bytes of all indexes.
        needed: u64,
        /// Bytes that are available.
        available: u64,
        /// The control group.
        group: Option<String>,
    },
}

fn place(group: &Option<String>) -> String {
    group.as_ref().map_or("this host".to_owned(), |group| format!("the control group {group}"))
}

/// The memory of this host, and whether its user takes the risk that it is too small.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    pub(crate) host: Option<HostMemory>,
    pub(crate) overcommit: bool,
}

impl Room {
    /// Of this host, now.
    pub(crate) fn here(overcommit: bool) -> Self {
        Self { host: crate::host::memory(), overcommit }
    }

    /// Whether a machine with `size` bytes of memory may be made. What is allowed but worth a word comes back
    /// as one.
    pub(crate) fn size(&self, size: u64) -> Result<Option<String>, MemoryError> {
        let Some(HostMemory { total, ref group, .. }) = self.host else { return Ok(None) };
        if size > total.saturating_mul(MOST_OVERCOMMIT) && !self.overcommit {
            return Err(MemoryError::Size { size, total, group: group.clone() });
        }
        let place = place(group);
        Ok((size > total).then(|| {
            format!("{size} bytes of guest memory are more than the {total} bytes of {place}: a guest that uses them will be ended by the system")
        }))
    }

    /// Whether the indexes of `snapshot` and of all that it builds on may be read.
    pub(crate) fn indexes(&self, snapshot: &Snapshot) -> Result<(), MemoryError> {
        let needed =
            snapshot.chain().map(|link| index_bytes(link.manifest())).fold(0, u64::saturating_add);
        let error = |available, group| MemoryError::Indexes { needed, available, group };
        self.holds(needed, error)
    }

    /// Whether the bytes of the memory with `index` that are not zero may be brought.
    pub(crate) fn data(&self, index: &Index) -> Result<(), MemoryError> {
        let needed = data_bytes(index);
        self.holds(needed, |available, group| MemoryError::Data { needed, available, group })
    }

    fn holds(
        &self,
        needed: u64,
        error: impl FnOnce(u64, Option<String>) -> MemoryError,
    ) -> Result<(), MemoryError> {
        match &self.host {
            Some(HostMemory { available: Some(available), group, .. })
                if needed > *available && !self.overcommit =>
            {
                Err(error(*available, group.clone()))
            }
            _ => Ok(()),
        }
    }
}

fn index_bytes(manifest: &Manifest) -> u64 {
    let files = manifest.images.iter().filter_map(|image| manifest.file(&image.index_file()).ok());
    files.map(|file| file.length).fold(0, u64::saturating_add)
}

/// How far a thread that brings memory ahead of the guest may go.
pub(crate) struct Ration {
    memory: fn() -> Option<HostMemory>,
    /// Bytes that it may bring before it looks again.
    left: u64,
    /// Bytes that stay available.
    spared: u64,
}

impl Ration {
    /// How often it looks, in bytes that were brought.
    const STEP: u64 = 32 << 20;

    /// From what `memory` says now.
    pub(crate) fn new(memory: fn() -> Option<HostMemory>) -> Self {
        let available = memory().and_then(|host| host.available).unwrap_or(0);
        Self { memory, left: 0, spared: available / SPARED }
    }

    /// Whether `bytes` more may be brought. Where the system does not tell what is available, they may.
    pub(crate) fn take(&mut self, bytes: u64) -> bool {
        if self.left < bytes {
            let available = (self.memory)().and_then(|host| host.available);
            let free = available.map_or(u64::MAX, |now| now.saturating_sub(self.spared));
            self.left = free.min(Self::STEP.max(bytes));
        }
        match self.left.checked_sub(bytes) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const GIB: u64 = 1 << 30;

    fn room(available: Option<u64>) -> Room {
        Room {
            host: Some(HostMemory { total: 24 * GIB, available, group: None }),
            overcommit: false,
        }
    }

    #[test]
    fn a_size_above_the_hosts_is_worth_a_word_and_one_far_above_is_refused() {
        let host = room(None);
        assert_eq!(host.size(24 * GIB), Ok(None));
        assert!(host.size(24 * GIB + 1).unwrap().unwrap().contains("more than"));
        assert!(host.size(96 * GIB).unwrap().is_some());
        let error = host.size(1022 * GIB).unwrap_err().to_string();
        assert!(error.contains("1097364144128 bytes of guest memory are more than 4 times the 25769803776 bytes of this host"), "{error}");
        let group = Some("/docker/id".to_owned());
        let memory = HostMemory { total: GIB, available: None, group };
        let limited = Room { host: Some(memory), overcommit: false };
        let error = limited.size(24 * GIB).unwrap_err().to_string();
        assert!(error.contains("the control group /docker/id"), "{error}");
        let asked = Room { overcommit: true, ..room(None) };
        assert!(asked.size(u64::MAX).unwrap().is_some());
        assert_eq!(Room { host: None, overcommit: false }.size(u64::MAX), Ok(None));
    }

    #[test]
    fn what_is_certainly_taken_has_to_be_available() {
        let error = |available, group| MemoryError::Data { needed: 3 * GIB, available, group };
        room(Some(3 * GIB)).holds(3 * GIB, error).unwrap();
        room(Some(3 * GIB - 1)).holds(3 * GIB, error).unwrap_err();
        room(None).holds(u64::MAX, error).unwrap();
        Room { overcommit: true, ..room(Some(0)) }.holds(u64::MAX, error).unwrap();
    }

    #[test]
    fn a_quarter_of_what_is_available_is_spared() {
        static AVAILABLE: AtomicU64 = AtomicU64::new(GIB);
        fn memory() -> Option<HostMemory> {
            let available = Some(AVAILABLE.load(Ordering::Relaxed));
            Some(HostMemory { total: 2 * GIB, available, group: None })
        }
        let mut ration = Ration::new(memory);
        let (mut brought, chunk) = (0, 1 << 16);
        while ration.take(chunk) {
            brought += chunk;
            AVAILABLE.fetch_sub(chunk, Ordering::Relaxed);
        }
        assert_eq!(brought, GIB / 4 * 3);
        // Somebody else has taken it.
        AVAILABLE.store(GIB, Ordering::Relaxed);
        let mut ration = Ration::new(memory);
        assert!(ration.take(chunk));
        AVAILABLE.store(0, Ordering::Relaxed);
        let taken = (0..).take_while(|_| ration.take(chunk)).count() as u64 * chunk;
        assert!(taken < Ration::STEP);
        let mut unknown = Ration::new(|| None);
        assert!((0..10_000).all(|_| unknown.take(4 << 20)));
    }
}
