//! Where the disks of a snapshot would be, and whether there is room for them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use squib_devices::virtio::block::BlockError;
use squib_formats::{
    error::FormatError,
    manifest::{DiskRecord, DiskStorage},
    snapshot_dir::Snapshot,
};

use super::{CheckOptions, Lines, size};
use crate::{
    disks::{self, CheckError, DiskError, DiskLoad, Outside, data_bytes, free},
    observe::Phase,
};

impl Lines {
    /// Disks outside the snapshot are what they were, and those inside have a place and room.
    pub(super) fn disks(
        &mut self,
        snapshot: &Snapshot,
        options: &CheckOptions<'_>,
    ) -> Result<(), FormatError> {
        let records = &snapshot.manifest().machine.disks;
        for id in options.disk_places.keys().filter(|id| records.iter().all(|d| d.id != **id)) {
            let advice = "`squib snapshot inspect` lists its disks";
            self.differs(format!("disk {id}"), "the snapshot has no such disk", advice);
        }
        let (mut needed, mut largest) = (0u64, 0);
        for record in records {
            let what = format!("disk {}", record.id);
            match record.storage {
                DiskStorage::Captured if !options.disk_places.contains_key(&record.id) => {
                    let Some(index) = self.image(&what, snapshot, &record.image_name()) else {
                        continue;
                    };
                    let room = data_bytes(&index);
                    if options.disks != DiskLoad::Demand {
                        needed = needed.saturating_add(room);
                    }
                    largest = largest.max(record.size);
                    self.captured(&what, record, room, options.disk_dir.as_deref());
                }
                _ => self.outside(&what, record, snapshot, options)?,
            }
        }
        if let Some(dir) = &options.disk_dir
            && largest > 0
        {
            self.room(dir, needed, largest);
        }
        Ok(())
    }

    /// A disk that the restore would make.
    fn captured(&mut self, what: &str, record: &DiskRecord, room: u64, dir: Option<&Path>) {
        let found = format!("{} captured, takes {}", size(record.size), size(room));
        let Some(dir) = dir else {
            let found = format!("{found}, and there is no directory to put it into");
            return self.missing(what, found, "name one");
        };
        let path = dir.join(format!("{}.img", record.id));
        match fs::symlink_metadata(&path) {
            Ok(_) => {
                let found = format!("{} exists already", path.display());
                self.differs(what, found, "remove it, or name another directory");
            }
            Err(_) => self.ok(what, found),
        }
    }

    /// A disk that lies outside the snapshot. It is opened as the restored machine opens it.
    fn outside(
        &mut self,
        what: &str,
        record: &DiskRecord,
        snapshot: &Snapshot,
        options: &CheckOptions<'_>,
    ) -> Result<(), FormatError> {
        let kind = disks::digest_kind(snapshot.manifest(), record);
        let mut path = PathBuf::new();
        let phase = Phase::Disk(record.id.clone());
        let checked = options.run.phase(phase, |control| {
            let disk = Outside::open(record, &options.disk_places, &options.allowed_disks)?;
            path.clone_from(&disk.path);
            disks::check(record, disk, kind, options.changed_disks, control)
        });
        let changed = "bring back the disk as it was, or go on at the guest's risk with \
                       --allow-changed-disks";
        match checked {
            Ok(()) => {
                self.ok(what, format!("{} at {}, unchanged", size(record.size), path.display()));
            }
            Err(CheckError::Format(FormatError::Cancelled)) => return Err(FormatError::Cancelled),
            Err(CheckError::Disk(error @ DiskError::NotAllowed { .. })) => {
                let advice = "name the disk to use with --disk ID=PATH, or allow the place that the \
                              snapshot names with --allow-disk PATH-PREFIX";
                self.missing(what, error, advice);
            }
            Err(CheckError::Disk(error @ DiskError::Io { .. })) => {
                let advice = "bring it back, or say where it is with --disk ID=PATH";
                self.missing(what, error, advice);
            }
            Err(CheckError::Disk(error @ DiskError::Changed { .. })) => {
                self.differs(what, error, changed);
            }
            Err(CheckError::Disk(error @ DiskError::Size { .. })) => {
                self.differs(what, error, "bring back the disk as it was");
            }
            Err(CheckError::Block(error @ BlockError::InUse { .. })) => {
                self.missing(what, error, "end the VM that uses it, or give the restore a copy");
            }
            Err(error) => self.missing(what, error, "make it readable"),
        }
        Ok(())
    }

    /// Free space in `dir`, where `needed` bytes of disks would go, the largest of them a file of `largest`
    /// bytes.
    fn room(&mut self, dir: &Path, needed: u64, largest: u64) {
        match free(dir).and_then(|free| disks::can_make(dir, largest).map(|()| free)) {
            Ok(free) => {
                let found =
                    format!("{} needed in {}, {} free", size(needed), dir.display(), size(free));
                match free >= needed {
                    true => self.ok("room for disks", found),
                    false => self.missing("room for disks", found, "make room, or use --disk-dir"),
                }
            }
            Err(error) => {
                let found = format!("{}: {error}", dir.display());
                self.missing("room for disks", found, "make the directory, or name another");
            }
        }
    }
}
