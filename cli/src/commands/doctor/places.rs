//! Folders: whether they can be written, what they are on, how much room they have, and what is in them.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use squib_vmm::config::NAME_MAX;

use super::Property;
use crate::{
    commands::snapshot::template_cache,
    home::{Home, folder::nearest},
    kit::{self, Kit, cache_dir},
    output::bytes,
};

/// Less free room than that is worth a word: about what a guest with its disk and a snapshot take.
const LITTLE: u64 = 2 << 30;

pub(super) fn properties() -> Vec<Property> {
    let mut properties = Vec::new();
    match Home::folders() {
        Ok((run, state)) => {
            properties.push(run_folder(&run));
            properties.push(folder("state folder", &state).required());
            properties.push(socket_path());
            properties.push(room("room, state", &state));
        }
        Err(error) => properties.push(Property::missing("run folder", error).required()),
    }
    match cache_dir() {
        Ok(cache) => {
            properties.push(folder("cache folder", &cache));
            properties.push(room("room, cache", &cache));
            properties.push(clones("clones, cache", &cache));
        }
        Err(error) => properties.push(Property::missing("cache folder", error)),
    }
    properties.push(room("room, here", Path::new(".")));
    properties.push(clones("clones, here", Path::new(".")));
    properties.push(templates());
    properties.push(guest_kit());
    properties
}

/// The run-time folder. Nothing is made: a VM's start does that.
fn run_folder(run: &Path) -> Property {
    match Home::find() {
        Ok(_) => folder("run folder", run).required(),
        Err(error) => Property::missing("run folder", said(&error))
            .advice("set SQUIB_HOME to a folder of your own that others cannot write to")
            .required(),
    }
}

/// An error with its causes, each said once.
fn said(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !said.contains(&text) {
            said = format!("{said}: {text}");
        }
        next = cause.source();
    }
    said
}

/// Whether a file can be made in `dir`, or where `dir` is not there, in what it would be made in.
fn folder(name: &str, dir: &Path) -> Property {
    let there = nearest(dir);
    let place = dir.display();
    let can = match there == dir {
        true => "is writable",
        false => "is not there yet and can be made",
    };
    match Trial::new(there, "w") {
        Ok(_) if in_memory(there) => {
            Property::ok(name, format!("{place} {can}, in memory (tmpfs)"))
        }
        Ok(_) => Property::ok(name, format!("{place} {can}")),
        Err(error) => Property::missing(name, format!("{place} cannot be written: {error}"))
            .advice(
                "see its owner and mode, or name another folder with SQUIB_HOME or SQUIB_CACHE",
            ),
    }
}

/// Whether control sockets fit into socket addresses.
fn socket_path() -> Property {
    let name = "socket path";
    let home = match Home::find() {
        Ok(home) => home,
        Err(error) => return Property::missing(name, said(&error)).required(),
    };
    // The name that a VM has by default.
    let least = "vm-4194304".len();
    let longest = home.longest_name();
    match longest {
        NAME_MAX.. => Property::ok(name, "every name of a VM fits into a socket's address"),
        _ if longest >= least => {
            Property::note(name, format!("names of VMs fit up to {longest} bytes"))
                .advice("set SQUIB_HOME to a shorter folder for longer names")
        }
        _ => Property::missing(name, format!("names of VMs fit up to {longest} bytes"))
            .advice("set SQUIB_HOME to a shorter folder")
            .required(),
    }
}

fn room(name: &str, dir: &Path) -> Property {
    let dir = nearest(dir);
    let stat = match rustix::fs::statvfs(dir) {
        Ok(stat) => stat,
        Err(error) => return Property::note(name, format!("{}: {error}", dir.display())),
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let kind = if in_memory(dir) { " of memory (tmpfs)" } else { "" };
    let found = format!("{}{kind} free", bytes(free));
    match free < LITTLE {
        true => Property::note(name, found).advice("disks and snapshots may need more"),
        false if !kind.is_empty() => {
            Property::note(name, found).advice("what is written there is gone after a reboot")
        }
        false => Property::ok(name, found),
    }
}

/// Whether the file system shares the blocks of copies, from a file that is cloned.
fn clones(name: &str, dir: &Path) -> Property {
    match try_clone(nearest(dir)) {
        Ok(()) => Property::ok(name, "copies of files share their blocks (reflink)"),
        Err(error) => Property::note(name, format!("no reflinks ({error})"))
            .advice("copies of disk images take time and room; btrfs, XFS and APFS share them"),
    }
}

fn try_clone(dir: &Path) -> io::Result<()> {
    let from = Trial::new(dir, "from")?;
    io::Write::write_all(&mut &from.file, &[1; 0x1_0000])?;
    clone(&from, dir)
}

#[cfg(target_os = "linux")]
fn clone(from: &Trial, dir: &Path) -> io::Result<()> {
    let to = Trial::new(dir, "to")?;
    Ok(rustix::fs::ioctl_ficlone(to.file.as_fd(), from.file.as_fd())?)
}

#[cfg(target_os = "macos")]
fn clone(from: &Trial, dir: &Path) -> io::Result<()> {
    use rustix::fs::{CloneFlags, fclonefileat};
    let path = trial_path(dir, "to");
    let cloned = fclonefileat(from.file.as_fd(), rustix::fs::CWD, &path, CloneFlags::empty());
    // It is there only if it was cloned.
    let _ = fs::remove_file(&path);
    Ok(cloned?)
}

#[cfg(target_os = "linux")]
fn in_memory(dir: &Path) -> bool {
    const TMPFS_MAGIC: u32 = 0x0102_1994;
    rustix::fs::statfs(dir).is_ok_and(|stat| stat.f_type as u32 == TMPFS_MAGIC)
}

#[cfg(not(target_os = "linux"))]
fn in_memory(_: &Path) -> bool {
    false
}

fn templates() -> Property {
    let name = "templates";
    let listed = match template_cache() {
        Ok(cache) => cache.list().map_err(|error| said(&error)),
        Err(failure) => Err(failure.to_string()),
    };
    match listed {
        Ok(templates) => {
            let stored: u64 = templates.iter().map(|template| template.stored).sum();
            Property::ok(name, format!("{} in the cache, {}", templates.len(), bytes(stored)))
        }
        Err(error) => Property::missing(name, error).advice("restore with --mode eager or lazy"),
    }
}

/// The guest kit: fetched, or whether it can be.
fn guest_kit() -> Property {
    let name = "guest kit";
    match (Kit::cached(), kit::check_tools()) {
        (Ok(Some(kit)), _) => {
            let rootfs = if kit.rootfs.is_some() { " and a root file system" } else { "" };
            Property::ok(name, format!("a kernel, an initramfs{rootfs}: {}", kit.release))
        }
        (Ok(None), Ok(())) => {
            Property::note(name, "not fetched").advice("`squib kit fetch --rootfs` fetches it")
        }
        (Ok(None), Err(error)) => Property::note(name, format!("not fetched; {error}")),
        (Err(error), _) => Property::missing(name, said(&error)),
    }
}

/// An empty file, removed when it is dropped.
struct Trial {
    file: File,
    path: PathBuf,
}

impl Trial {
    fn new(dir: &Path, name: &str) -> io::Result<Self> {
        let path = trial_path(dir, name);
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        Ok(Self { file, path })
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        // It is empty or small, and its name says whose it was.
        let _ = fs::remove_file(&self.path);
    }
}

fn trial_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!(".squib-doctor-{}-{name}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::Status;

    #[test]
    fn a_folder_is_tried_and_nothing_is_left_in_it() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(folder("f", &dir.path().join("a/b")).status, Status::Ok);
        let _ = clones("c", &dir.path().join("a/b"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let found = folder("f", &dir.path().join("file/below"));
        assert_eq!(found.status, Status::Missing, "{found}");
        assert!(found.advice.is_some());
    }
}
