//! A Debian arm64 root file system as an ext4 image, made without root.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use squib_formats::storage;

use super::{
    CLOCK, KitError,
    apt::{self, Apt},
};

const INIT: &str = include_str!("root-init.sh");
const PACKAGES: &[&str] = &[
    "base-files",
    "base-passwd",
    "bash",
    "coreutils",
    "dash",
    "diffutils",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "libc-bin",
    "mawk",
    "mount",
    "perl-base",
    "procps",
    "python3",
    "sed",
    "tar",
    "util-linux",
    "xz-utils",
];

/// What a user can still put on it.
const FREE_MIB: u64 = 128;

/// Identifies what [`make`] makes of the same archive with `extra` packages.
pub(super) fn recipe(extra: &[String]) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(INIT.as_bytes());
    hasher.update(CLOCK.as_bytes());
    for name in names(extra) {
        hasher.update(name.as_bytes());
        hasher.update(b"\0");
    }
    hasher.finalize().to_hex()[..12].to_owned()
}

fn names(extra: &[String]) -> Vec<&str> {
    PACKAGES.iter().copied().chain(extra.iter().map(String::as_str)).collect()
}

/// Where the programs are that make the file system.
pub(super) fn tools() -> Result<(PathBuf, PathBuf), KitError> {
    Ok((apt::require("mke2fs", "e2fsprogs")?, apt::require("debugfs", "e2fsprogs")?))
}

/// Makes the image `target` with `extra` packages, in `stage` first. `kit` holds busybox.
pub(super) fn make(
    apt: &Apt,
    extra: &[String],
    stage: &Path,
    target: &Path,
    kit: &Path,
    progress: &dyn Fn(&str),
) -> Result<(), KitError> {
    let (mke2fs, debugfs) = tools()?;
    let packages = apt.closure(&names(extra))?;
    progress(&format!("downloading {} packages of the root file system", packages.len()));
    let debs = stage.join("root-debs");
    let root = stage.join("root");
    for dir in [&debs, &root] {
        fs::create_dir(dir).map_err(|e| KitError::io(dir, e))?;
    }
    let names: Vec<String> = packages.iter().map(|p| format!("{}={}", p.name, p.version)).collect();
    apt.download(&names, &debs)?;
    progress("unpacking the root file system");
    let mut debs = apt::debs(&debs)?;
    // base-files brings /bin, /lib and /sbin as links into /usr: whatever else comes has to follow them.
    debs.sort_by_key(|deb| {
        !deb.file_name().is_some_and(|n| n.to_string_lossy().starts_with("base-files_"))
    });
    for deb in &debs {
        apt::extract(deb, &root)?;
    }
    configure(&root, kit)?;
    progress("writing the ext4 image");
    let used = usage(&root)?;
    let mib = (used >> 20) * 5 / 4 + FREE_MIB;
    let image = stage.join("root.ext4");
    let mut command = Command::new(mke2fs);
    command
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-L", "squib-root", "-E", "root_owner=0:0"])
        // Features that every kernel of the last years reads.
        .args(["-O", "^metadata_csum_seed,^orphan_file", "-d"])
        .arg(&root)
        .arg(&image)
        .arg(format!("{mib}M"));
    // Older versions do not know of a feature that they could leave out.
    let mut plain = Command::new(command.get_program());
    plain.args(
        command.get_args().filter(|a| *a != "-O" && *a != "^metadata_csum_seed,^orphan_file"),
    );
    apt::output(command).or_else(|_| apt::output(plain))?;
    give_to_root(&debugfs, &root, &image)?;
    fs::File::open(&image).and_then(storage::sync).map_err(|e| KitError::io(&image, e))?;
    fs::rename(&image, target).map_err(|e| KitError::io(target, e))
}

/// Does what the packages' own scripts would, as far as a shell and python3 need it.
fn configure(root: &Path, kit: &Path) -> Result<(), KitError> {
    let file = |path: &str, mode: u32, data: &[u8]| {
        let path = root.join(path);
        let write = || {
            fs::write(&path, data)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))
        };
        write().map_err(|e| KitError::io(&path, e))
    };
    for dir in ["dev", "proc", "sys", "run", "tmp", "root", "mnt", "etc", "usr/sbin", "usr/bin"] {
        let path = root.join(dir);
        fs::create_dir_all(&path).map_err(|e| KitError::io(&path, e))?;
    }
    for name in ["passwd", "group"] {
        let master = root.join(format!("usr/share/base-passwd/{name}.master"));
        let text = fs::read_to_string(&master).map_err(|e| KitError::io(&master, e))?;
        // No password: there is no login here, and `su` should not ask.
        file(&format!("etc/{name}"), 0o644, text.replace("root:*:", "root::").as_bytes())?;
    }
    file("etc/hostname", 0o644, b"squib\n")?;
    file("etc/hosts", 0o644, b"127.0.0.1 localhost\n127.0.1.1 squib\n")?;
    file("etc/fstab", 0o644, b"/dev/vda / ext4 defaults 0 1\n")?;
    file("usr/sbin/init", 0o755, INIT.as_bytes())?;
    file("usr/sbin/squib-clock", 0o755, CLOCK.as_bytes())?;
    let busybox = kit.join("busybox");
    file("usr/bin/busybox", 0o755, &fs::read(&busybox).map_err(|e| KitError::io(&busybox, e))?)?;
    for (name, call) in [("poweroff", "poweroff"), ("halt", "poweroff"), ("reboot", "reboot")] {
        // No service manager to ask: what is written is synced, then the machine is told.
        let script =
            format!("#!/bin/sh\nsync\nmount -o remount,ro / 2>/dev/null\nexec busybox {call} -f\n");
        file(&format!("usr/sbin/{name}"), 0o755, script.as_bytes())?;
    }
    for (link, target) in [("usr/bin/awk", "mawk"), ("usr/bin/sh", "dash")] {
        let path = root.join(link);
        if fs::symlink_metadata(&path).is_err() {
            symlink(target, &path).map_err(|e| KitError::io(&path, e))?;
        }
    }
    Ok(())
}

/// Bytes that the files below `dir` take, whole blocks counted.
fn usage(dir: &Path) -> Result<u64, KitError> {
    let mut sum = 0;
    each(dir, &mut |_, meta| sum += (meta.len() + 4096).next_multiple_of(4096))?;
    Ok(sum)
}

/// mke2fs takes over the owner of each file; where that is not root already, debugfs sets it.
fn give_to_root(debugfs: &Path, root: &Path, image: &Path) -> Result<(), KitError> {
    let mut commands = String::new();
    each(root, &mut |path, meta| {
        let Ok(inside) = path.strip_prefix(root) else { return };
        if meta.uid() != 0 || meta.gid() != 0 {
            let inside = inside.display();
            commands += &format!("sif \"/{inside}\" uid 0\nsif \"/{inside}\" gid 0\n");
        }
    })?;
    if commands.is_empty() {
        return Ok(());
    }
    let run = || {
        let mut child = Command::new(debugfs)
            .args(["-w", "-f", "-"])
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        child.stdin.take().expect("stdin was asked for").write_all(commands.as_bytes())?;
        child.wait()
    };
    let program = "debugfs".to_owned();
    let status = run().map_err(|source| KitError::Spawn { program: program.clone(), source })?;
    if status.success() {
        return Ok(());
    }
    let complaint = "setting the owner of the files".to_owned();
    Err(KitError::Tool { program, status: status.to_string(), complaint })
}

fn each(dir: &Path, call: &mut dyn FnMut(&Path, &fs::Metadata)) -> Result<(), KitError> {
    for entry in fs::read_dir(dir).map_err(|e| KitError::io(dir, e))? {
        let path = entry.map_err(|e| KitError::io(dir, e))?.path();
        let meta = fs::symlink_metadata(&path).map_err(|e| KitError::io(&path, e))?;
        call(&path, &meta);
        if meta.is_dir() {
            each(&path, call)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::recipe;

    #[test]
    fn every_list_of_extra_packages_has_an_image_of_its_own() {
        let of =
            |names: &[&str]| recipe(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        let recipes = [of(&[]), of(&["gdb"]), of(&["gdb", "gcc"]), of(&["gdbgcc"])];
        for (n, one) in recipes.iter().enumerate() {
            assert!(!recipes[..n].contains(one), "{recipes:?}");
        }
    }
}
