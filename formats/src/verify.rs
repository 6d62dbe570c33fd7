//! Checking every byte of a snapshot.

use std::{
    collections::HashMap,
    fmt,
    io::Read,
    path::{Path, PathBuf},
};

use crate::{
    digest::Digest,
    error::FormatError,
    image::{Control, FileSource, ImageReader, Loaded, digest_chunks},
    sections::Sections,
    snapshot_dir::Snapshot,
};

/// What [`verify`] has checked.
#[derive(Debug)]
pub struct Verified {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Each image's name, and what was read of it.
    pub images: Vec<(String, Loaded)>,
    /// Files in the directory that do not belong to the snapshot.
    pub unlisted: Vec<String>,
}

/// Everything that is wrong with a snapshot; at least one thing. Of several damaged chunks of an image it
/// names the first.
#[derive(Debug)]
pub struct Damage(pub Vec<FormatError>);

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if at == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl std::error::Error for Damage {}

/// Checks the snapshot at `path` whole: header, manifest, every file's digest, every section, every
/// index record and every chunk. Of the snapshots that a difference builds on, which are looked for in
/// `parents` and where [`Snapshot::open_chain`] says, everything that it needs is checked.
pub fn verify(path: &Path, parents: &[PathBuf], control: Control<'_>) -> Result<Verified, Damage> {
    let snapshot = Snapshot::open_chain(path, parents).map_err(|error| Damage(vec![error]))?;
    let mut damage = Vec::new();
    let mut images = Vec::new();
    if let Err(error) = Sections::read(&snapshot) {
        damage.push(error);
    }
    for record in &snapshot.manifest().images {
        let verified =
            ImageReader::open(&snapshot, &record.name).and_then(|image| image.verify(control));
        match verified {
            Ok(loaded) => images.push((record.name.clone(), loaded)),
            Err(error) => damage.push(error),
        }
    }
    // What no record points at is found by the file's digest only. A file whose digest or length has
    // been named above is not named again, and the raw file of an image that is right is right.
    let raw_files = snapshot.manifest().images.iter().map(|image| (image.raw_file(), &image.name));
    let raw_files: HashMap<_, _> = raw_files.collect();
    let is_right = |name: &str| {
        let image = raw_files.get(name);
        image.is_some_and(|image| images.iter().any(|(right, _)| right == *image))
    };
    for file in &snapshot.manifest().files {
        let named = |error: &FormatError| {
            matches!(error, FormatError::Digest { .. } | FormatError::Length { .. })
                && error.file() == Some(&*file.name)
        };
        if !damage.iter().any(named)
            && !is_right(&file.name)
            && let Err(error) = check_file(&snapshot, &file.name, control)
        {
            damage.push(error);
        }
    }
    let unlisted = snapshot.unlisted().unwrap_or_else(|error| {
        damage.push(error);
        Vec::new()
    });
    match damage.is_empty() {
        true => Ok(Verified { snapshot, images, unlisted }),
        false => Err(Damage(damage)),
    }
}

fn check_file(snapshot: &Snapshot, name: &str, control: Control<'_>) -> Result<(), FormatError> {
    let (mut file, record) = snapshot.open_file(name)?;
    let images = &snapshot.manifest().images;
    if let Some(image) = images.iter().find(|image| image.raw_file() == name) {
        let source = FileSource::new(file).map_err(|error| FormatError::io(name, "read", error))?;
        let scheme = snapshot.manifest().scheme();
        let found = digest_chunks(name, &source, image.chunk_size, scheme, control)?;
        return record.check(found.digest);
    }
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        control.check()?;
        let len = file.read(&mut buffer).map_err(|error| FormatError::io(name, "read", error))?;
        if len == 0 {
            break;
        }
        hasher.update(&buffer[..len]);
    }
    let found: Digest = hasher.finalize().into();
    record.check(found)
}
