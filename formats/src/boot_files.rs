//! The optional files with what the guest was booted from, so that it can boot again wherever it is.

use std::io::{self, Read};

use crate::{
    digest::Digest,
    error::FormatError,
    manifest::{INITRD_FILE, KERNEL_FILE},
    publish::Staging,
    snapshot_dir::Snapshot,
};

/// Bytes that are copied at a time.
const PIECE: usize = 1 << 20;

/// Copies `source` into the snapshot as the file `name`, which is [`KERNEL_FILE`] or [`INITRD_FILE`]. An error
/// if its blake3 is not `expected`, or if it has more than `limit` bytes.
pub fn write_boot_file(
    staging: &mut Staging,
    name: &'static str,
    source: &mut dyn Read,
    expected: Digest,
    limit: u64,
) -> Result<(), FormatError> {
    let mut file = staging.create(name)?;
    let mut hasher = blake3::Hasher::new();
    let mut piece = vec![0; PIECE];
    loop {
        let read = match source.read(&mut piece) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(FormatError::io(name, "copy", error)),
        };
        hasher.update(&piece[..read]);
        file.write(&piece[..read])?;
        if file.length() > limit {
            let why = format!("more than {limit} bytes, what the guest was booted from is smaller");
            return Err(FormatError::field(name, "length", why));
        }
    }
    let found = hasher.finalize().into();
    if found != expected {
        let what = "what the guest was booted from".into();
        return Err(FormatError::Digest { file: name.into(), what, expected, found });
    }
    staging.finish(file)
}

/// blake3 of what `source` holds.
pub fn digest_boot_file(source: &mut dyn Read) -> io::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(source)?;
    Ok(hasher.finalize().into())
}

/// Copies those files of `snapshot`, if it has any, into a snapshot that is written from it.
pub fn copy_boot_files(staging: &mut Staging, snapshot: &Snapshot) -> Result<(), FormatError> {
    for name in [KERNEL_FILE, INITRD_FILE] {
        let Ok(record) = snapshot.manifest().file(name) else { continue };
        let (digest, length) = (record.digest, record.length);
        let (mut file, _) = snapshot.open_file(name)?;
        write_boot_file(staging, name, &mut file, digest, length)?;
    }
    Ok(())
}
