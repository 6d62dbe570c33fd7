//! The guest: the kit's kernel and initramfs, data of many kinds in its memory, and a loop that prints.
//!
//! The data are files of the initramfs, so they lie in the guest's memory, and in the same way whoever
//! runs it. The loop never sleeps: output that comes late after a restore is late because of the restore.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use squib::kit::Kit;

/// `init_on_free`: the kernel's own copy of the initramfs is to be zero, not data, once it is unpacked.
const CMDLINE: &str = "quiet panic=-1 init_on_free=1 rdinit=/versus-init";
const INIT: &str = "#!/bin/sh
i=0
while :; do
    i=$((i + 1))
    echo \"tick $i\"
done
";
/// Bytes of data in one file of the guest.
const FILE: usize = 1 << 20;
/// Bytes that are of one kind. Not a whole number of chunks, as in life.
const REGION: usize = 52 << 10;
/// What kernel and busybox use by themselves.
const SYSTEM: u64 = 24 << 20;
const MOST_DATA: u64 = 488 << 20;

/// A guest of one size.
pub(super) struct Guest {
    /// The kernel.
    pub(super) kernel: PathBuf,
    /// The kit's initramfs with the data and the loop.
    pub(super) initrd: PathBuf,
    /// Bytes of memory.
    pub(super) memory: u64,
    /// Bytes of data in it.
    pub(super) data: u64,
}

impl Guest {
    /// Writes the initramfs of a guest of `memory` bytes into `dir`. A quarter of `like` bytes is in use, at
    /// most 512 MiB.
    pub(super) fn make(kit: &Kit, memory: u64, like: u64, dir: &Path) -> Result<Self> {
        let data = (like / 4).saturating_sub(SYSTEM).clamp(8 << 20, MOST_DATA);
        let initrd = dir.join(format!("initrd-{}.cpio", memory >> 20));
        let write = || -> io::Result<u64> {
            let mut out = BufWriter::with_capacity(1 << 20, File::create(&initrd)?);
            io::copy(&mut File::open(&kit.initrd)?, &mut out)?;
            let files = data / FILE as u64;
            entry(&mut out, "versus-init", 0o100_755, INIT.as_bytes())?;
            entry(&mut out, "mix", 0o040_755, &[])?;
            let mut mix = Mix::new();
            for number in 0..files {
                entry(&mut out, &format!("mix/{number}"), 0o100_644, mix.file())?;
            }
            entry(&mut out, "TRAILER!!!", 0, &[])?;
            out.flush()?;
            Ok(files * FILE as u64)
        };
        let data = write().with_context(|| initrd.display().to_string())?;
        Ok(Self { kernel: kit.kernel.clone(), initrd, memory, data })
    }

    /// The kernel's command line, with the console on `device`.
    pub(super) fn cmdline(device: &str) -> String {
        format!("console={device} {CMDLINE}")
    }
}

/// Writes one entry of a "newc" cpio archive; a whole archive may follow another in an initramfs.
fn entry(out: &mut impl Write, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
    // Inode, mode, uid, gid, links, mtime, size, device of the file (2), device it is (2), name, check.
    let length = data.len() as u32;
    let fields = [0, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, path.len() as u32 + 1, 0];
    out.write_all(b"070701")?;
    for field in fields {
        write!(out, "{field:08x}")?;
    }
    out.write_all(path.as_bytes())?;
    // The name ends with a zero; header (110 bytes) and name, and the data, are padded to 4 bytes.
    let padding = [0; 4];
    out.write_all(&padding[..4 - (110 + path.len()) % 4])?;
    out.write_all(data)?;
    out.write_all(&padding[..data.len().next_multiple_of(4) - data.len()])
}

/// Data as programs keep it in memory: log text, records with pointers and small numbers, bytes that do not
/// compress, zeros, and repetitions.
struct Mix {
    random: u64,
    record: u64,
    file: Vec<u8>,
}

impl Mix {
    fn new() -> Self {
        Self { random: 0x9e37_79b9_7f4a_7c15, record: 0, file: Vec::with_capacity(FILE) }
    }

    /// The next file's bytes.
    fn file(&mut self) -> &[u8] {
        // Of 20 regions: 7 text, 6 records, 3 incompressible, 2 zero, 2 seen before.
        const KINDS: &[u8; 20] = b"trxtrztdrtxrtztrxrdt";
        self.file.clear();
        for kind in KINDS.iter().cycle() {
            let until = (self.file.len() + REGION).min(FILE);
            match kind {
                b't' => self.text(until),
                b'r' => self.records(until),
                b'x' => self.noise(until),
                b'd' => {
                    let from = (self.next() as usize) % (self.file.len() - REGION);
                    self.file.extend_from_within(from..from + REGION);
                }
                _ => {}
            }
            self.file.resize(until, 0);
            if until == FILE {
                break;
            }
        }
        &self.file
    }

    fn text(&mut self, until: usize) {
        const WORDS: [&str; 24] = [
            "request",
            "from",
            "client",
            "the",
            "timeout",
            "after",
            "connection",
            "closed",
            "user",
            "session",
            "cache",
            "miss",
            "for",
            "key",
            "retry",
            "in",
            "queue",
            "worker",
            "started",
            "GET",
            "/index.html",
            "200",
            "bytes",
            "warning:",
        ];
        while self.file.len() < until {
            let stamp = self.next();
            let line =
                format!("2025-03-{:02} {:08} [{:x}]", stamp % 28, stamp >> 40, stamp & 0xfff);
            self.file.extend_from_slice(line.as_bytes());
            for _ in 0..4 + stamp % 9 {
                // Two draws: the first words are more frequent.
                let (a, b) = (self.next() % 24, self.next() % 24);
                self.file.push(b' ');
                self.file.extend_from_slice(WORDS[a.min(b) as usize].as_bytes());
                if a == b {
                    let number = (self.next() % 100_000).to_string();
                    self.file.extend_from_slice(number.as_bytes());
                }
            }
            self.file.push(b'\n');
        }
        self.file.truncate(until);
    }

    fn records(&mut self, until: usize) {
        while self.file.len() < until {
            self.record += 1;
            let random = self.next();
            let next = 0xffff_0000_4000_0000 | (random & 0x3f_ffff) << 6;
            let value = (self.record as f64 * 0.37).sin();
            for field in [
                next,
                self.record,
                random >> 60,
                value.to_bits() & !0xffff_ffff,
                (random >> 40 & 0xff) << 32 | 1,
                0,
                next + 24,
                random & 0xffff_ffff,
            ] {
                self.file.extend_from_slice(&field.to_le_bytes());
            }
        }
        self.file.truncate(until);
    }

    fn noise(&mut self, until: usize) {
        while self.file.len() < until {
            let word = self.next();
            self.file.extend_from_slice(&word.to_le_bytes());
        }
        self.file.truncate(until);
    }

    /// xorshift64*.
    fn next(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_are_neither_all_compressible_nor_all_random() {
        let mut mix = Mix::new();
        let (first, second) = (mix.file().to_vec(), mix.file().to_vec());
        assert_eq!((first.len(), second.len()), (FILE, FILE));
        assert_ne!(first, second);
        let packed = zstd::bulk::compress(&first, 1).unwrap().len();
        let ratio = FILE as f64 / packed as f64;
        assert!((2.0..5.0).contains(&ratio), "1:{ratio:.2}");
    }

    #[test]
    fn entries_are_padded_to_four_bytes() {
        for path in ["a", "ab", "abc", "abcd"] {
            let mut out = Vec::new();
            entry(&mut out, path, 0, b"12345").unwrap();
            assert_eq!(out.len() % 4, 0, "{path}");
            let name_end = 110 + path.len() + 1;
            assert_eq!(&out[name_end.next_multiple_of(4)..][..5], b"12345", "{path}");
        }
    }
}
