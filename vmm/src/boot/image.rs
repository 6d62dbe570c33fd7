//! Kernel images: what a file holds, and the arm64 `Image` inside it.
//!
//! The header is described in the kernel's Documentation/arch/arm64/booting.rst, section 4.

use std::io::Read;

/// Bytes of the header of an arm64 `Image`.
const HEADER: usize = 64;
/// "ARM\x64" at offset 56.
const MAGIC: u32 = 0x644d_5241;
/// Image flags bit 0: the kernel is big-endian.
const FLAG_BIG_ENDIAN: u64 = 1;
/// Where a kernel older than 3.17 wants to be, which leaves image_size zero.
const OLD_TEXT_OFFSET: u64 = 0x8_0000;

/// An arm64 kernel, ready to be placed.
#[derive(Debug, PartialEq, Eq)]
pub struct Image {
    /// The bytes to be copied.
    pub bytes: Vec<u8>,
    /// Offset from a 2 MiB boundary at which they go.
    pub text_offset: u64,
    /// Bytes that the kernel needs there, BSS included.
    pub size: u64,
    /// Its translation granule.
    pub page_size: PageSize,
}

/// Translation granule of a kernel (image flags, bits 1 and 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// The header does not tell.
    Unspecified,
    /// 4 KiB.
    Kib4,
    /// 16 KiB.
    Kib16,
    /// 64 KiB.
    Kib64,
}

/// Why a file is not a kernel for this machine.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file is a kernel or program for something else.
    #[error("it is {found}; an arm64 Image is needed")]
    OtherArchitecture {
        /// What it is.
        found: String,
    },
    /// Nothing that is known.
    #[error("it is no arm64 Image, raw, gzip, zstd or EFI zboot; it begins with {start}")]
    Unknown {
        /// Its first bytes in hexadecimal.
        start: String,
    },
    /// A big-endian kernel.
    #[error("it is a big-endian arm64 kernel; only little-endian ones are supported")]
    BigEndian,
    /// The compressed part is damaged.
    #[error("its {format} data does not decompress: {source}")]
    Damaged {
        /// The compression.
        format: &'static str,
        /// What the decompressor met.
        source: std::io::Error,
    },
    /// It is larger than it may be.
    #[error("it decompresses to more than {limit} bytes, which is what the memory holds")]
    TooLarge {
        /// Bytes allowed.
        limit: u64,
    },
    /// The file ends before the kernel does.
    #[error("it is cut short: its header names {needed} bytes, and there are {length}")]
    Cut {
        /// Bytes up to the end of the last part that the header names.
        needed: u64,
        /// Bytes of the file, decompressed.
        length: u64,
    },
    /// An EFI zboot image with a compression that is not supported.
    #[error("it is an EFI zboot image compressed with `{name}`; gzip and zstd are supported")]
    Compression {
        /// Name in its header.
        name: String,
    },
    /// An EFI zboot image whose header leaves the file.
    #[error(
        "its EFI zboot header names {size} bytes at offset {offset}, but the file has {length}"
    )]
    Zboot {
        /// Payload offset.
        offset: u32,
        /// Payload size.
        size: u32,
        /// Length of the file.
        length: usize,
    },
}

/// Finds the arm64 `Image` in the content of a kernel file and unpacks it. It may have `limit` bytes.
pub fn unpack(file: Vec<u8>, limit: u64) -> Result<Image, ImageError> {
    if let Some(bytes) = decompress(&file, limit)? {
        return parse(bytes, limit);
    }
    if file.starts_with(b"MZ") && file.get(4..8) == Some(b"zimg") {
        return parse(zboot(&file, limit)?, limit);
    }
    parse(file, limit)
}

fn parse(bytes: Vec<u8>, limit: u64) -> Result<Image, ImageError> {
    if bytes.len() < HEADER || u32_at(&bytes, 56) != Some(MAGIC) {
        return Err(match foreign(&bytes) {
            Some(found) => ImageError::OtherArchitecture { found },
            None => ImageError::Unknown { start: start_of(&bytes) },
        });
    }
    if bytes.len() as u64 > limit {
        return Err(ImageError::TooLarge { limit });
    }
    // The length was checked above.
    let field = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
    let (text_offset, image_size, flags) = (field(8), field(16), field(24));
    if flags & FLAG_BIG_ENDIAN != 0 {
        return Err(ImageError::BigEndian);
    }
    let page_size = match flags >> 1 & 3 {
        0 => PageSize::Unspecified,
        1 => PageSize::Kib4,
        2 => PageSize::Kib16,
        _ => PageSize::Kib64,
    };
    let length = bytes.len() as u64;
    // image_size counts BSS, which no file holds; only the EFI header tells what the file should have.
    let needed = efi_length(&bytes);
    if needed > length {
        return Err(ImageError::Cut { needed, length });
    }
    Ok(match image_size {
        0 => Image { bytes, text_offset: OLD_TEXT_OFFSET, size: length, page_size },
        size => Image { bytes, text_offset, size: size.max(length), page_size },
    })
}

/// Where the last section in the PE/COFF header of an `Image` with an EFI stub ends, in bytes; 0 without one.
fn efi_length(file: &[u8]) -> u64 {
    let sections = || {
        let pe = u32_at(file, 0x3c)? as usize;
        if !file.starts_with(b"MZ") || file.get(pe..pe.checked_add(4)?) != Some(b"PE\0\0") {
            return None;
        }
        let count = usize::from(u16_at(file, pe + 6)?);
        let table = pe + 24 + usize::from(u16_at(file, pe + 20)?);
        let end = |section: usize| {
            let at = table + section * 40;
            let (size, offset) = (u32_at(file, at + 16)?, u32_at(file, at + 20)?);
            Some(u64::from(offset) + u64::from(size))
        };
        (0..count).filter_map(end).max()
    };
    sections().unwrap_or(0)
}

/// The unpacked content if `data` is compressed.
fn decompress(data: &[u8], limit: u64) -> Result<Option<Vec<u8>>, ImageError> {
    if data.starts_with(&[0x1f, 0x8b]) {
        let reader = flate2::read::MultiGzDecoder::new(data);
        return read_bounded("gzip", reader, limit).map(Some);
    }
    if data.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let reader = zstd::stream::read::Decoder::with_buffer(data)
            .map_err(|source| ImageError::Damaged { format: "zstd", source })?;
        return read_bounded("zstd", reader, limit).map(Some);
    }
    Ok(None)
}

fn read_bounded(
    format: &'static str,
    reader: impl Read,
    limit: u64,
) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::new();
    let read = reader.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|source| ImageError::Damaged { format, source })?;
    if bytes.len() as u64 > limit {
        return Err(ImageError::TooLarge { limit });
    }
    Ok(bytes)
}

/// Unpacks an EFI zboot image (drivers/firmware/efi/libstub/zboot-header.S in the kernel): payload
/// offset at 8, its size at 12, the name of the compression at 24.
fn zboot(file: &[u8], limit: u64) -> Result<Vec<u8>, ImageError> {
    let (offset, size) = (u32_at(file, 8).unwrap_or(0), u32_at(file, 12).unwrap_or(0));
    let end = (offset as usize).checked_add(size as usize);
    let payload = end.and_then(|end| file.get(offset as usize..end)).ok_or(ImageError::Zboot {
        offset,
        size,
        length: file.len(),
    })?;
    let name: Vec<u8> = file.iter().skip(24).take(32).copied().take_while(|b| *b != 0).collect();
    let name = String::from_utf8_lossy(&name).into_owned();
    match decompress(payload, limit)? {
        Some(bytes) if name.starts_with("gzip") || name.starts_with("zstd") => Ok(bytes),
        _ => Err(ImageError::Compression { name: name.escape_debug().to_string() }),
    }
}

/// What the file is, if it is something well known.
fn foreign(file: &[u8]) -> Option<String> {
    if file.starts_with(b"\x7fELF") {
        // e_machine lies at 18, in the byte order that e_ident[EI_DATA] at 5 names.
        let two: [u8; 2] = file.get(18..20)?.try_into().ok()?;
        let machine = if file[5] == 2 { u16::from_be_bytes(two) } else { u16::from_le_bytes(two) };
        return Some(match elf_machine(machine) {
            Some(name) => format!("an ELF file for {name}"),
            None => format!("an ELF file for machine {machine}"),
        });
    }
    if u16_at(file, 0x1fe) == Some(0xaa55) && file.get(0x202..0x206) == Some(b"HdrS") {
        return Some("an x86 bzImage".to_owned());
    }
    if u32_at(file, 56) == Some(0x0543_5352) {
        return Some("a riscv Image".to_owned());
    }
    if u32_at(file, 0x24) == Some(0x016f_2818) {
        return Some("a 32-bit ARM zImage".to_owned());
    }
    if file.starts_with(&[0x27, 0x05, 0x19, 0x56]) {
        return Some("a U-Boot uImage".to_owned());
    }
    if file.starts_with(b"MZ") {
        let header = u32_at(file, 0x3c)? as usize;
        if file.get(header..header.checked_add(4)?) == Some(b"PE\0\0") {
            let machine = u16_at(file, header + 4)?;
            return Some(match pe_machine(machine) {
                Some(name) => format!("an EFI program for {name}"),
                None => format!("an EFI program for machine {machine:#x}"),
            });
        }
    }
    None
}

fn elf_machine(machine: u16) -> Option<&'static str> {
    Some(match machine {
        3 => "x86",
        8 => "MIPS",
        20 => "PowerPC",
        21 => "PowerPC 64",
        22 => "s390",
        40 => "32-bit ARM",
        62 => "x86-64",
        183 => "arm64 (a vmlinux, not an Image)",
        243 => "riscv",
        258 => "LoongArch",
        _ => return None,
    })
}

fn pe_machine(machine: u16) -> Option<&'static str> {
    Some(match machine {
        0x14c => "x86",
        0x8664 => "x86-64",
        0x1c2 | 0x1c4 => "32-bit ARM",
        0xaa64 => "arm64 (not a kernel Image)",
        0x5032 | 0x5064 => "riscv",
        0x6232 | 0x6264 => "LoongArch",
        _ => return None,
    })
}

fn u16_at(file: &[u8], at: usize) -> Option<u16> {
    let bytes = file.get(at..at.checked_add(2)?)?;
    Some(u16::from_le_bytes(bytes.try_into().ok()?))
}

fn u32_at(file: &[u8], at: usize) -> Option<u32> {
    let bytes = file.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// Whether the file is a kernel for this machine or another, as far as its first bytes tell.
pub(super) fn is_kernel(file: &[u8]) -> bool {
    u32_at(file, 56) == Some(MAGIC)
        || file.get(4..8) == Some(b"zimg")
        || foreign(file).is_some_and(|_| !file.starts_with(b"\x7fELF"))
}

/// The first bytes of `file`, for people.
pub(super) fn start_of(file: &[u8]) -> String {
    if file.is_empty() {
        return "nothing: it is empty".to_owned();
    }
    let bytes: Vec<_> = file.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use super::*;

    const LIMIT: u64 = 64 << 20;

    /// A kernel of `length` bytes with this header.
    pub(in crate::boot) fn kernel(
        text_offset: u64,
        image_size: u64,
        flags: u64,
        length: usize,
    ) -> Vec<u8> {
        let mut file = vec![0x5a; length];
        file[8..16].copy_from_slice(&text_offset.to_le_bytes());
        file[16..24].copy_from_slice(&image_size.to_le_bytes());
        file[24..32].copy_from_slice(&flags.to_le_bytes());
        file[56..60].copy_from_slice(b"ARM\x64");
        file
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zboot_file(name: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 64];
        file[..2].copy_from_slice(b"MZ");
        file[4..8].copy_from_slice(b"zimg");
        file[8..12].copy_from_slice(&64u32.to_le_bytes());
        file[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file[24..24 + name.len()].copy_from_slice(name);
        file.extend(payload);
        file
    }

    #[test]
    fn a_kernel_that_ends_before_its_last_efi_section_is_cut_short() {
        let mut file = kernel(0, 0x8000, 0, 0x3000);
        file[..2].copy_from_slice(b"MZ");
        file[0x3c..0x40].copy_from_slice(&0x40u32.to_le_bytes());
        // PE header at 0x40: 2 sections behind 16 bytes of optional header.
        file[0x40..0x44].copy_from_slice(b"PE\0\0");
        file[0x46..0x48].copy_from_slice(&2u16.to_le_bytes());
        file[0x54..0x56].copy_from_slice(&16u16.to_le_bytes());
        for (section, size, offset) in [(0, 0x1000u32, 0x1000u32), (1, 0x1000, 0x2000)] {
            let at = 0x40 + 24 + 16 + section * 40;
            file[at + 16..at + 20].copy_from_slice(&size.to_le_bytes());
            file[at + 20..at + 24].copy_from_slice(&offset.to_le_bytes());
        }
        unpack(file.clone(), LIMIT).unwrap();
        file.pop();
        let error = unpack(file.clone(), LIMIT).unwrap_err().to_string();
        assert!(error.contains("12288 bytes") && error.contains("12287"), "{error}");
        // A hostile header does not overflow, nor leave the file.
        for at in [0x3c, 0x46, 0x54, 0x40 + 24 + 16 + 16, 0x40 + 24 + 16 + 20] {
            let mut bad = file.clone();
            bad[at..at + 2].fill(0xff);
            let _ = unpack(bad, LIMIT);
        }
    }

    #[test]
    fn every_packing_gives_the_same_image() {
        let raw = kernel(0, 0x3000, 0b010, 0x1000);
        let zstd = zstd::bulk::compress(&raw, 1).unwrap();
        let packings = [
            raw.clone(),
            gzip(&raw),
            zstd.clone(),
            zboot_file(b"gzip", &gzip(&raw)),
            zboot_file(b"zstd22", &zstd),
        ];
        for file in packings {
            let image = unpack(file, LIMIT).unwrap();
            let page_size = PageSize::Kib4;
            let expected = Image { bytes: raw.clone(), text_offset: 0, size: 0x3000, page_size };
            assert_eq!(image, expected);
        }
    }

    #[test]
    fn a_kernel_without_a_size_goes_where_old_kernels_went() {
        let image = unpack(kernel(7, 0, 0, 0x1000), LIMIT).unwrap();
        assert_eq!((image.text_offset, image.size), (0x8_0000, 0x1000));
    }

    #[test]
    fn other_architectures_are_named() {
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 62;
        let mut bz = vec![0; 0x400];
        bz[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        bz[0x202..0x206].copy_from_slice(b"HdrS");
        let mut riscv = vec![0; 64];
        riscv[56..60].copy_from_slice(b"RSC\x05");
        let mut zimage = vec![0; 64];
        zimage[0x24..0x28].copy_from_slice(&0x016f_2818u32.to_le_bytes());
        let mut pe = vec![0; 128];
        pe[..2].copy_from_slice(b"MZ");
        pe[0x3c] = 64;
        pe[64..70].copy_from_slice(b"PE\0\0\x64\x86");
        let cases = [
            (elf, "x86-64"),
            (bz, "bzImage"),
            (riscv, "riscv"),
            (zimage, "zImage"),
            (pe, "x86-64"),
        ];
        for (file, name) in cases {
            // Compressed or not, the message says what it is.
            for file in [gzip(&file), file] {
                let error = unpack(file, LIMIT).unwrap_err();
                assert!(matches!(error, ImageError::OtherArchitecture { .. }), "{error}");
                assert!(error.to_string().contains(name), "{error}");
            }
        }
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_name() {
        assert!(unpack(Vec::new(), LIMIT).unwrap_err().to_string().contains("empty"));
        assert!(matches!(unpack(vec![1; 9], LIMIT), Err(ImageError::Unknown { .. })));
        assert!(matches!(unpack(kernel(0, 1, 1, 64), LIMIT), Err(ImageError::BigEndian)));
        let mut cut = gzip(&kernel(0, 64, 0, 4096));
        cut.truncate(20);
        assert!(matches!(unpack(cut, LIMIT), Err(ImageError::Damaged { format: "gzip", .. })));
        let bomb = gzip(&vec![0; 1 << 20]);
        assert!(matches!(unpack(bomb, 1 << 16), Err(ImageError::TooLarge { limit: 0x1_0000 })));
        let lzma = zboot_file(b"lzma", &[0x5d, 0, 0, 0]);
        assert!(matches!(unpack(lzma, LIMIT), Err(ImageError::Compression { .. })));
        let mut outside = zboot_file(b"gzip", &[1, 2]);
        outside[8..16].fill(0xff);
        assert!(matches!(unpack(outside, LIMIT), Err(ImageError::Zboot { .. })));
    }

    #[test]
    fn truncated_headers_never_panic() {
        for file in [zboot_file(b"gzip", &[]), kernel(0, 0, 0, 64), b"\x7fELF".to_vec()] {
            for length in 0..file.len() {
                // Any answer will do but a panic.
                let _ = unpack(file[..length].to_vec(), LIMIT);
            }
        }
    }
}
