//! The thread that brings what nobody has asked for yet.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use squib_devices::granules::{Granules, Store};
use squib_formats::{
    error::FormatError,
    image::{ImageReader, Record},
};

use super::{origin::Sweep, room::Ration};

/// Chunks that are looked at for one read ahead.
const AHEAD: usize = 64;

/// Brings absent granules one after the other while it lives.
pub(crate) struct Loader {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    /// Brings the granules of `granules` from `image`: those of `first` in that order, and then all others. If
    /// one cannot be had, the granules tell whoever runs the guest, and it ends. With a `ration` it ends where
    /// that does, and what is left comes when it is touched.
    pub(crate) fn start<S: Store>(
        granules: &Arc<Granules<S>>,
        image: &ImageReader,
        first: &[u32],
        mut ration: Option<Ration>,
    ) -> Result<Self, FormatError> {
        let sweep = Sweep::new(image)?;
        let count = image.index().chunks();
        let first = first.iter().map(|chunk| u64::from(*chunk)).filter(|chunk| *chunk < count);
        let data = image.index().runs().filter(|(_, record)| **record != Record::Zero);
        let order: Vec<u64> = first.chain(data.flat_map(|(chunks, _)| chunks)).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let (granules, stopped) = (Arc::clone(granules), Arc::clone(&stop));
        let load = move || {
            for (at, chunk) in order.iter().enumerate() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                if granules.is_absent(*chunk) {
                    let size = granules.granule_size();
                    if ration.as_mut().is_some_and(|ration| !ration.take(size)) {
                        let left = (order.len() - at) as u64;
                        tracing::warn!(
                            "memory is getting scarce on this host: {left} chunks of {size} bytes are \
                             loaded only when the guest touches them, and the snapshot has to stay"
                        );
                        return;
                    }
                    sweep.read_ahead(&order[at..(at + AHEAD).min(order.len())]);
                    if granules.prefetch(*chunk, &sweep).is_err() {
                        return;
                    }
                }
            }
            // Of what is all zeros nothing is to be brought. Then nothing depends on the snapshot any more.
            let mut next = 0;
            while let Some(chunk) = granules.next_absent(next) {
                if stopped.load(Ordering::Relaxed) || granules.prefetch(chunk, &sweep).is_err() {
                    return;
                }
                next = chunk + 1;
            }
        };
        let thread = thread::Builder::new().name("loader".into()).spawn(load);
        let thread = thread.map_err(|e| FormatError::io(&image.record().name, "load", e))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been reported by the runtime; what it left undone is brought on first touch.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{num::NonZeroUsize, time::Duration};

    use squib_devices::{map, memory::GuestRam};
    use squib_formats::{
        image::{Control, FileSource, ImageOptions, write_image},
        manifest::{CpuIdentity, MEMORY_IMAGE, MachineInfo, Manifest},
        publish::{Durability, Existing, Staging},
        sections::write_sections,
        snapshot_dir::Snapshot,
    };
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::{
        host::HostMemory,
        memory::{absent_ram, load_lazily},
    };

    const SIZE: u64 = 1 << 20;

    /// The image of 1 MiB of memory without a zero chunk.
    fn image(dir: &std::path::Path) -> Arc<ImageReader> {
        let raw = dir.join("raw");
        let bytes: Vec<u8> = (0..SIZE).map(|at| (at >> 14) as u8 | 0x80).collect();
        std::fs::write(&raw, bytes).unwrap();
        let mut staging = Staging::new(&dir.join("snap"), Existing::Refuse).unwrap();
        staging.durability(Durability::None);
        let sections = write_sections(&mut staging, &[]).unwrap();
        let source = FileSource::new(std::fs::File::open(raw).unwrap()).unwrap();
        let control = Control { threads: NonZeroUsize::MIN, ..Control::default() };
        let options = ImageOptions::default();
        let written = write_image(&mut staging, MEMORY_IMAGE, &source, options, control).unwrap();
        let text = String::new;
        let machine = MachineInfo {
            name: text(),
            memory_size: SIZE,
            vcpus: 1,
            cmdline: text(),
            kernel: text(),
            kernel_digest: None,
            initrd: None,
            disks: vec![],
            rng: false,
            backend: "soft".into(),
            deterministic: None,
        };
        let cpu =
            CpuIdentity { backend: "soft".into(), id_registers: vec![], counter_frequency: 1 };
        let manifest = Manifest {
            writer: text(),
            host: text(),
            created: 0,
            parent: None,
            parent_hint: None,
            host_backend: None,
            operation: None,
            machine,
            cpu,
            images: vec![written.record],
            sections,
            files: vec![],
        };
        staging.publish(manifest).unwrap();
        let snapshot = Snapshot::open(&dir.join("snap")).unwrap();
        Arc::new(ImageReader::open(&snapshot, MEMORY_IMAGE).unwrap())
    }

    fn absent(ram: &GuestRam) -> u64 {
        let granules = ram.granules();
        (0..granules.count()).filter(|granule| granules.is_absent(*granule)).count() as u64
    }

    #[test]
    fn memory_that_is_scarce_is_left_alone_and_the_guest_still_gets_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let image = image(dir.path());
        let ram = absent_ram(&image).unwrap();
        load_lazily(&ram, &image);
        let none = || Some(HostMemory { total: 1 << 30, available: Some(0), group: None });
        let loader = Loader::start(ram.granules(), &image, &[3], Some(Ration::new(none))).unwrap();
        // It ends by itself.
        while !loader.thread.as_ref().unwrap().is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(absent(&ram), ram.granules().count());
        let byte: u8 = ram.read_obj(GuestAddress(map::RAM_BASE + SIZE - 1)).unwrap();
        assert_eq!(byte, 63 | 0x80);
        drop(loader);

        let ample = || Some(HostMemory { total: 1 << 30, available: Some(1 << 30), group: None });
        let loader = Loader::start(ram.granules(), &image, &[3], Some(Ration::new(ample))).unwrap();
        while !loader.thread.as_ref().unwrap().is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(absent(&ram), 0);
    }
}
