//! The files that a user hands to `run`: what is taken where none is named, and what a file is instead of
//! what it should be.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use rustix::termios::{isatty, tcgetwinsize};
use squib_vmm::config::{DiskConfig, default_cmdline};

use super::absolute;
use crate::{
    args::RunArgs,
    exit::{Code, Failure, Result, WithCode},
    kit::Kit,
    output::say,
};

/// What the guest boots from.
pub(super) struct Boot {
    pub(super) kernel: PathBuf,
    pub(super) initrd: Option<PathBuf>,
    pub(super) cmdline: String,
}

impl Boot {
    /// What the user named, and the guest kit's where nothing is named. The kit's kernel has its drivers as
    /// modules: without the kit's initrd it finds no disk.
    pub(super) fn choose(args: &RunArgs, disks: &[DiskConfig]) -> Result<Self> {
        let named = args.kernel.as_deref().map(absolute).transpose()?;
        let initrd = args.initrd.as_deref().map(absolute).transpose()?;
        let kit = match (&named, &initrd) {
            (Some(kernel), None)
                if Kit::cached_kernel().is_some_and(|kit| is_same(kernel, &kit)) =>
            {
                Kit::cached().code(Code::Failed)?
            }
            (Some(_), _) => None,
            (None, _) => Some(Kit::cached().code(Code::Failed)?.ok_or_else(no_kernel)?),
        };
        let Some(kit) = kit else {
            let kernel = named.ok_or_else(no_kernel)?;
            let cmdline = || default_cmdline(initrd.is_some(), disks) + &terminal_size();
            let cmdline = args.cmdline.clone().unwrap_or_else(cmdline);
            return Ok(Self { kernel, initrd, cmdline });
        };
        let taken = match (&named, &initrd) {
            (None, None) => format!("kernel {} and its initrd", kit.release),
            (None, Some(_)) => format!("kernel {}", kit.release),
            (Some(_), _) => "initrd, which has the drivers of this kernel".to_owned(),
        };
        say!("squib: taking the guest kit's {taken}");
        let initrd_is_the_kits = initrd.is_none();
        // The kit's initrd mounts what `root=` names and runs its init, or is a shell.
        let cmdline = || default_cmdline(!initrd_is_the_kits, disks) + &terminal_size();
        let cmdline = args.cmdline.clone().unwrap_or_else(cmdline);
        Ok(Self { kernel: kit.kernel, initrd: Some(initrd.unwrap_or(kit.initrd)), cmdline })
    }
}

/// The word of the kernel command line that tells the guest kit how large the terminal is: a serial line does
/// not. Nothing where there is no terminal.
fn terminal_size() -> String {
    let (input, output) = (rustix::stdio::stdin(), rustix::stdio::stdout());
    match tcgetwinsize(output) {
        Ok(size) if isatty(input) && size.ws_row > 0 && size.ws_col > 0 => {
            format!(" squib.size={}x{}", size.ws_row, size.ws_col)
        }
        _ => String::new(),
    }
}

fn no_kernel() -> Failure {
    let why = "no --kernel, and there is no guest kit: `squib kit fetch` makes one";
    Failure::new(Code::Usage, anyhow::anyhow!(why))
}

/// Refuses a file that is given for two disks. Locks would refuse the second one too, but as another VM's.
pub(super) fn check_twice(disks: &[DiskConfig]) -> Result {
    for (at, disk) in disks.iter().enumerate() {
        if let Some(other) = disks[..at].iter().find(|other| is_same(&other.path, &disk.path)) {
            let why = anyhow::anyhow!(
                "{}: disk {} of this VM is the same file as its disk {}",
                disk.path.display(),
                disk.id,
                other.id
            );
            return Err(Failure::new(Code::Usage, why));
        }
    }
    Ok(())
}

/// Whether both are the same file, by whatever names. False if that cannot be told.
fn is_same(a: &Path, b: &Path) -> bool {
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// Refuses a disk that is an image in a format of its own: as raw bytes it makes no sense to a guest, which
/// would overwrite the image's own structures.
pub(super) fn check_raw(path: &Path) -> Result {
    // What cannot be opened is reported where it is opened as a disk.
    let Ok(Some(format)) = format_of(path) else { return Ok(()) };
    let path = path.display();
    let Format { name, driver } = format;
    let advice = match driver {
        Some(driver) => {
            format!("`qemu-img convert -f {driver} -O raw {path} {path}.raw` makes a raw one of it")
        }
        None => "it may be given as read-only bytes".to_owned(),
    };
    let why = anyhow::anyhow!(
        "{path}: it is a {name} image, and a disk is raw bytes: {advice}; \
         with `,format=raw` behind the path the guest gets these very bytes"
    );
    Err(Failure::new(Code::Usage, why))
}

/// A format of disk images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Format {
    /// Its name.
    name: &'static str,
    /// What qemu-img calls it; `None` for one that is raw bytes itself.
    driver: Option<&'static str>,
}

/// Magic numbers: offset in the file, bytes, format.
const MAGICS: &[(usize, &[u8], Format)] = &[
    (0, b"QFI\xfb", format("qcow2", "qcow2")),
    (0, b"QED\0", format("QED", "qed")),
    (0, b"KDMV", format("VMDK", "vmdk")),
    (0, b"COWD", format("VMDK", "vmdk")),
    (0, b"# Disk DescriptorFile", format("VMDK", "vmdk")),
    (0, b"vhdxfile", format("VHDX", "vhdx")),
    (0, b"conectix", format("VHD", "vpc")),
    (0, b"WithoutFreeSpace", format("Parallels", "parallels")),
    (0, b"WithouFreSpacExt", format("Parallels", "parallels")),
    (0x40, &[0x7f, 0x10, 0xda, 0xbe], format("VDI", "vdi")),
    (0x8001, b"CD001", Format { name: "ISO 9660", driver: None }),
];
/// Bytes from the beginning in which those lie.
const HEAD: u64 = 0x8006;
/// The footer that ends a VHD of fixed size, behind its raw bytes.
const VHD_FOOTER: u64 = 512;

const fn format(name: &'static str, driver: &'static str) -> Format {
    Format { name, driver: Some(driver) }
}

fn format_of(path: &Path) -> io::Result<Option<Format>> {
    let kind = fs::metadata(path)?.file_type();
    // Opening a FIFO would wait for its other end.
    if !kind.is_file() && !kind.is_block_device() {
        return Ok(None);
    }
    let mut file = File::open(path)?;
    let mut head = Vec::new();
    (&mut file).take(HEAD).read_to_end(&mut head)?;
    let found = MAGICS
        .iter()
        .find(|(at, magic, _)| head.get(*at..).is_some_and(|bytes| bytes.starts_with(magic)));
    if let Some((.., format)) = found {
        return Ok(Some(*format));
    }
    let length = file.seek(SeekFrom::End(0))?;
    if length > VHD_FOOTER {
        file.seek(SeekFrom::Start(length - VHD_FOOTER))?;
        let mut footer = [0; 8];
        file.read_exact(&mut footer)?;
        if footer == *b"conectix" {
            return Ok(Some(format("VHD", "vpc")));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(id: &str, path: &Path) -> DiskConfig {
        DiskConfig { id: id.into(), path: path.to_owned(), read_only: false }
    }

    #[test]
    fn images_in_a_format_of_their_own_are_known_and_raw_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for (at, magic, format) in MAGICS {
            let mut bytes = vec![0; 0x1_0000];
            bytes[*at..*at + magic.len()].copy_from_slice(magic);
            fs::write(&path, bytes).unwrap();
            assert_eq!(format_of(&path).unwrap(), Some(*format));
            let error = check_raw(&path).unwrap_err();
            assert_eq!(error.code, Code::Usage);
            let said = error.to_string();
            assert!(said.contains(format.name) && said.contains(",format=raw"), "{said}");
        }
        let mut fixed = vec![0; 0x1_0000];
        fixed[0x1_0000 - 512..][..8].copy_from_slice(b"conectix");
        fs::write(&path, fixed).unwrap();
        assert_eq!(format_of(&path).unwrap(), Some(format("VHD", "vpc")));
        for raw in [&[0; 0x1_0000][..], &[0x55; 700], &[1; 3], &[]] {
            fs::write(&path, raw).unwrap();
            assert_eq!(format_of(&path).unwrap(), None);
        }
        // Not opened, so not waited for.
        assert_eq!(format_of(Path::new("/dev/null")).unwrap(), None);
    }

    #[test]
    fn a_file_given_twice_is_found_by_whatever_name() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("a"), [0; 512]).unwrap();
        fs::write(at("b"), [0; 512]).unwrap();
        fs::hard_link(at("a"), at("hard")).unwrap();
        std::os::unix::fs::symlink(at("a"), at("soft")).unwrap();
        check_twice(&[disk("vda", &at("a")), disk("vdb", &at("b"))]).unwrap();
        for other in ["a", "hard", "soft"] {
            let error = check_twice(&[disk("vda", &at("a")), disk("vdb", &at(other))]).unwrap_err();
            let said = error.to_string();
            assert!(
                said.contains("disk vdb of this VM is the same file as its disk vda"),
                "{said}"
            );
        }
        check_twice(&[disk("vda", &at("none")), disk("vdb", &at("none"))]).unwrap();
    }
}
