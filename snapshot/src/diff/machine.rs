//! Two machines' configurations and CPUs.

use serde::Serialize;
use squib_formats::{
    digest::Digest,
    image::Scheme,
    manifest::{DeterministicInfo, DiskRecord, DiskStorage, MachineInfo, Manifest, Operation},
};

use crate::compat;

/// Something of the machine that is not the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// What it is: "vCPUs", "disk vda: path", "ID_AA64ISAR0_EL1".
    pub what: String,
    /// In the first snapshot.
    pub a: String,
    /// In the second snapshot.
    pub b: String,
}

/// What is not the same, and whether the bytes of all disks outside the snapshots are.
pub(super) fn compare(a: &Manifest, b: &Manifest) -> (Vec<Change>, bool) {
    let mut changes = Vec::new();
    let mut differ = |what: &str, a: String, b: String| {
        if a != b {
            changes.push(Change { what: what.to_owned(), a, b });
        }
    };
    let (disks_before, disks_now) = (&a.machine.disks, &b.machine.disks);
    let (before, now) = (properties(a), properties(b));
    for ((what, before), (_, now)) in before.into_iter().zip(now) {
        differ(what, before, now);
    }
    let mut same_bytes = true;
    let find = |list: &'_ [DiskRecord], id: &str| list.iter().find(|d| d.id == id).cloned();
    let mut ids: Vec<&str> = disks_before.iter().map(|disk| &*disk.id).collect();
    ids.extend(disks_now.iter().map(|d| &*d.id).filter(|id| find(disks_before, id).is_none()));
    for id in ids {
        let (was, is) = (find(disks_before, id), find(disks_now, id));
        let (Some(was), Some(is)) = (&was, &is) else {
            let there = |disk: &Option<DiskRecord>| match disk {
                Some(disk) => format!("{} bytes from {}", disk.size, disk.path),
                None => "not there".to_owned(),
            };
            same_bytes = false;
            differ(&format!("disk {id}"), there(&was), there(&is));
            continue;
        };
        for ((what, was), (_, is)) in disk(was).into_iter().zip(disk(is)) {
            differ(&format!("disk {id}: {what}"), was, is);
        }
        // Of a captured disk the image shows where the bytes differ.
        let outside = [was, is].iter().any(|disk| disk.storage != DiskStorage::Captured);
        let (old, new) = (scheme(a, was), scheme(b, is));
        if outside && (old, was.digest) != (new, is.digest) {
            // Digests of two schemes cannot be compared, so the bytes are not known to be the same.
            same_bytes = false;
            let text = |digest: Digest, scheme| match scheme {
                _ if old == new => digest.to_string(),
                Scheme::Chunks => format!("{digest}, of each chunk"),
                Scheme::Runs => format!("{digest}, of runs of chunks"),
            };
            differ(&format!("disk {id}: bytes"), text(was.digest, old), text(is.digest, new));
        }
    }
    let order = |disks: &[DiskRecord]| {
        disks.iter().map(|disk| disk.id.clone()).collect::<Vec<_>>().join(", ")
    };
    if disks_before.len() == disks_now.len() {
        differ("order of disks", order(disks_before), order(disks_now));
    }
    for mismatch in compat::compare(&a.cpu, &b.cpu) {
        differ(&mismatch.what, mismatch.snapshot, mismatch.host);
    }
    (changes, same_bytes)
}

/// How the digest of `disk` counts chunks.
fn scheme(manifest: &Manifest, disk: &DiskRecord) -> Scheme {
    match disk.storage {
        DiskStorage::Captured => manifest.scheme(),
        DiskStorage::Reference(scheme) => scheme,
    }
}

/// Everything but the disks, for people.
fn properties(manifest: &Manifest) -> [(&'static str, String); 11] {
    let MachineInfo {
        name,
        memory_size,
        vcpus,
        cmdline,
        kernel,
        kernel_digest,
        initrd,
        disks: _,
        rng,
        // Part of the CPU's identity.
        backend: _,
        deterministic,
    } = &manifest.machine;
    let Operation { on_reset, initrd_digest } = manifest.operation.clone().unwrap_or_default();
    let none = || "none".to_owned();
    let deterministic = deterministic.map_or_else(none, |DeterministicInfo { seed, epoch }| {
        format!("seed {seed}, epoch {epoch}")
    });
    [
        ("name", name.clone()),
        ("memory", format!("{memory_size} bytes")),
        ("vCPUs", vcpus.to_string()),
        ("kernel command line", cmdline.clone()),
        ("kernel", kernel.clone()),
        ("kernel's digest", kernel_digest.map_or_else(none, |digest| digest.to_string())),
        ("initrd", initrd.clone().unwrap_or_else(none)),
        ("initrd's digest", initrd_digest.map_or_else(none, |digest| digest.to_string())),
        ("on reset", on_reset.name().to_owned()),
        ("virtio-rng", if *rng { "there" } else { "not there" }.to_owned()),
        ("deterministic", deterministic),
    ]
}

fn disk(disk: &DiskRecord) -> [(&'static str, String); 4] {
    let DiskRecord { id: _, path, size, read_only, storage, digest: _ } = disk;
    let storage = match storage {
        DiskStorage::Captured => "captured",
        DiskStorage::Reference(_) => "outside",
    };
    [
        ("path", path.clone()),
        ("size", format!("{size} bytes")),
        ("access", if *read_only { "read-only" } else { "writable" }.to_owned()),
        ("bytes kept", storage.to_owned()),
    ]
}
