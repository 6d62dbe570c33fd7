//! The initial root file system: busybox, the modules, and our `/init`.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use super::{CLOCK, KitError, cpio::Archive};

const INIT: &str = include_str!("init.sh");

/// Programs that `/init` calls before, or without, busybox having installed the rest of its links.
const APPLETS: &[&str] = &[
    "cat",
    "chmod",
    "dd",
    "echo",
    "hostname",
    "insmod",
    "ip",
    "ls",
    "mkdir",
    "mount",
    "nproc",
    "sh",
    "sha256sum",
    "sleep",
    "stty",
    "switch_root",
    "sync",
    "umount",
    "uname",
];

/// Modules that the guest loads before anything else, and those that are there to be loaded.
const BOOT_MODULES: &[&str] = &["virtio_mmio", "virtio_blk", "virtio_rng"];
const MORE_MODULES: &[&str] =
    &["virtio_net", "vmw_vsock_virtio_transport", "virtio_balloon", "virtio_mem", "overlay"];

/// Identifies what [`build`] makes of the same packages.
pub(super) fn recipe() -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(INIT.as_bytes());
    hasher.update(CLOCK.as_bytes());
    for name in APPLETS.iter().chain(BOOT_MODULES).chain(MORE_MODULES) {
        hasher.update(name.as_bytes());
        hasher.update(b"\0");
    }
    hasher.update(env!("CARGO_PKG_VERSION").as_bytes());
    hasher.finalize().to_hex()[..12].to_owned()
}

/// Copies the modules that a guest needs, decompressed, from an unpacked kernel package into `into`.
pub(super) fn collect_modules(package: &Path, into: &Path) -> Result<(), KitError> {
    let mut files = BTreeMap::new();
    find_modules(package, &mut files)?;
    fs::create_dir_all(into).map_err(|e| KitError::io(into, e))?;
    let mut wanted: Vec<String> =
        BOOT_MODULES.iter().chain(MORE_MODULES).map(|name| (*name).to_owned()).collect();
    while let Some(name) = wanted.pop() {
        let target = into.join(format!("{name}.ko"));
        // A module that is not there is built into this kernel.
        let Some(path) = files.get(&name) else { continue };
        if target.exists() {
            continue;
        }
        let module = read_module(path)?;
        wanted.extend(depends(&module));
        fs::write(&target, module).map_err(|e| KitError::io(&target, e))?;
    }
    Ok(())
}

/// The cpio archive made of `dir`, which holds `busybox` and `modules`.
pub(super) fn build(dir: &Path, release: &str) -> Result<Vec<u8>, KitError> {
    let read = |path: PathBuf| fs::read(&path).map_err(|e| KitError::io(&path, e));
    let mut modules = BTreeMap::new();
    let place = dir.join("modules");
    for entry in fs::read_dir(&place).map_err(|e| KitError::io(&place, e))? {
        let path = entry.map_err(|e| KitError::io(&place, e))?.path();
        if let Some(stem) = path.file_stem().and_then(|s| s.to_str()) {
            modules.insert(stem.to_owned(), read(path.clone())?);
        }
    }

    let mut archive = Archive::new();
    let module_dir = format!("lib/modules/{release}");
    for path in ["bin", "sbin", "usr", "usr/bin", "usr/sbin", "dev", "proc", "sys", "root", "tmp"] {
        archive.dir(path);
    }
    for path in ["etc", "lib", "lib/modules", &module_dir] {
        archive.dir(path);
    }
    archive.char_device("dev/console", 0o600, 5, 1);
    archive.file("bin/busybox", 0o755, &read(dir.join("busybox"))?);
    for applet in APPLETS {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    archive.file("etc/passwd", 0o644, b"root::0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    let mut dependencies = String::new();
    for (name, module) in &modules {
        archive.file(&format!("{module_dir}/{name}.ko"), 0o644, module);
        let needs: Vec<String> =
            load_order(name, &modules).into_iter().rev().skip(1).map(|n| n + ".ko").collect();
        dependencies += &format!("{name}.ko: {}\n", needs.join(" "));
    }
    archive.file(&format!("{module_dir}/modules.dep"), 0o644, dependencies.as_bytes());
    let mut boot = Vec::new();
    for name in BOOT_MODULES {
        for module in load_order(name, &modules) {
            if !boot.contains(&module) {
                boot.push(module);
            }
        }
    }
    let boot: String = boot.iter().map(|name| format!("/{module_dir}/{name}.ko\n")).collect();
    archive.file("lib/modules/squib-boot", 0o644, boot.as_bytes());
    archive.file("sbin/squib-clock", 0o755, CLOCK.as_bytes());
    archive.file("init", 0o755, INIT.as_bytes());
    Ok(archive.finish())
}

/// `name` and all it depends on, dependencies first; empty when the kernel has it built in.
fn load_order(name: &str, modules: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
    fn visit(
        name: &str,
        modules: &BTreeMap<String, Vec<u8>>,
        seen: &mut Vec<String>,
        out: &mut Vec<String>,
    ) {
        let Some(module) = modules.get(name) else { return };
        if seen.iter().any(|s| s == name) {
            return;
        }
        seen.push(name.to_owned());
        for needed in depends(module) {
            visit(&needed, modules, seen, out);
        }
        out.push(name.to_owned());
    }
    let mut out = Vec::new();
    visit(name, modules, &mut Vec::new(), &mut out);
    out
}

/// What a module's `.modinfo` says that it depends on.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &module[at + KEY.len()..];
    let value = &value[..value.iter().position(|b| *b == 0).unwrap_or(value.len())];
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(normal_name)
        .collect()
}

/// Module names treat `-` and `_` as the same; `_` is the canonical one.
fn normal_name(name: &str) -> String {
    name.replace('-', "_")
}

fn find_modules(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), KitError> {
    for entry in fs::read_dir(dir).map_err(|e| KitError::io(dir, e))? {
        let entry = entry.map_err(|e| KitError::io(dir, e))?;
        let path = entry.path();
        if entry.file_type().map_err(|e| KitError::io(&path, e))?.is_dir() {
            find_modules(&path, files)?;
        } else if let Some((stem, _)) =
            path.file_name().and_then(|n| n.to_str()).and_then(|n| n.split_once(".ko"))
        {
            files.insert(normal_name(stem), path);
        }
    }
    Ok(())
}

fn read_module(path: &Path) -> Result<Vec<u8>, KitError> {
    let raw = fs::read(path).map_err(|e| KitError::io(path, e))?;
    super::decompress(path, raw)
}

/// Undoes xz, zstd or gzip, whichever `raw` starts with; anything else is given back as it is.
pub(super) fn inflate(raw: Vec<u8>) -> std::io::Result<Vec<u8>> {
    let mut out = Vec::new();
    match raw.as_slice() {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            lzma_rs::xz_decompress(&mut raw.as_slice(), &mut out)
                .map_err(|e| std::io::Error::other(format!("{e:?}")))?;
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            zstd::Decoder::new(raw.as_slice())?.read_to_end(&mut out)?;
        }
        [0x1f, 0x8b, ..] => {
            flate2::read::GzDecoder::new(raw.as_slice()).read_to_end(&mut out)?;
        }
        _ => return Ok(raw),
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(depends: &str) -> Vec<u8> {
        format!("\x7fELF..\0license=GPL\0depends={depends}\0name=x\0").into_bytes()
    }

    #[test]
    fn dependencies_are_loaded_before_what_needs_them() {
        let modules = BTreeMap::from([
            ("virtio_net".to_owned(), module("net-failover")),
            ("net_failover".to_owned(), module("failover,built_in")),
            ("failover".to_owned(), module("")),
        ]);
        assert_eq!(load_order("virtio_net", &modules), ["failover", "net_failover", "virtio_net"]);
        assert!(load_order("built_in", &modules).is_empty());
    }

    #[test]
    fn modules_that_depend_on_each_other_do_not_hang() {
        let modules =
            BTreeMap::from([("a".to_owned(), module("b")), ("b".to_owned(), module("a"))]);
        assert_eq!(load_order("a", &modules), ["b", "a"]);
    }

    #[test]
    fn the_recipe_covers_every_program_that_init_calls_by_link() {
        for applet in ["insmod", "mount", "stty", "sha256sum", "switch_root", "chmod"] {
            assert!(INIT.contains(applet) && APPLETS.contains(&applet), "{applet}");
        }
    }
}
