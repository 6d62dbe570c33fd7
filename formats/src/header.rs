//! The 64 plain bytes at the start of the manifest, readable by every build for ever.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 2 | major format version |
//! | 10 | 2 | minor format version |
//! | 12 | 2 | architecture, an ELF `e_machine` number |
//! | 14 | 6 | version of the writer: major, minor, patch |
//! | 20 | 4 | zero |
//! | 24 | 8 | length of the body |
//! | 32 | 32 | blake3 of the 32 bytes above followed by the body |
//!
//! All numbers are little-endian. A build reads every minor version of its major version up to its
//! own; what changes the layout of the first 64 bytes changes the magic.

use crate::{digest::Digest, error::FormatError};

/// Length of the header in bytes.
pub const LEN: usize = 64;
/// The first eight bytes. The odd first byte and the line end show a transfer that mangled them.
pub const MAGIC: [u8; 8] = *b"\x89SQUIB\r\n";
/// Major format version that this build writes and reads.
pub const MAJOR: u16 = 1;
/// The minor format version that this build writes, and the newest that it reads. Before 1.4 a snapshot
/// had the oldest version that could hold it: 1.0 for a full one, 1.1 for a difference to another, 1.2
/// for one with raw images, 1.3 for one of a backend that is a part of the host's system.
pub const MINOR: u16 = 4;
/// `EM_AARCH64`, the only architecture so far.
pub const ARCH_AARCH64: u16 = 183;
/// Longest body, in bytes.
pub const MAX_BODY: u64 = crate::codec::MAX_PAYLOAD as u64;

/// Bytes before the digest: what the digest covers of the header.
const COVERED: usize = 32;

/// The parsed header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Major format version.
    pub major: u16,
    /// Minor format version.
    pub minor: u16,
    /// Architecture of the guest, an ELF `e_machine` number.
    pub arch: u16,
    /// Version of the squib that wrote the snapshot: major, minor, patch.
    pub writer: [u16; 3],
    /// Length of the body behind the header, in bytes.
    pub body_length: u64,
    /// blake3 of the first 32 bytes of the header and the body.
    pub digest: Digest,
}

impl Header {
    /// The header of `body`, which is of format 1.`minor`, as this build writes it.
    pub fn new(arch: u16, minor: u16, body: &[u8]) -> Self {
        let mut header = Self {
            major: MAJOR,
            minor,
            arch,
            writer: own_version(),
            body_length: body.len() as u64,
            digest: Digest([0; 32]),
        };
        header.digest = header.digest_over(body);
        header
    }

    /// The 64 bytes.
    pub fn encode(&self) -> [u8; LEN] {
        let Self { major, minor, arch, writer, body_length, digest } = self;
        let mut bytes = [0; LEN];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&major.to_le_bytes());
        bytes[10..12].copy_from_slice(&minor.to_le_bytes());
        bytes[12..14].copy_from_slice(&arch.to_le_bytes());
        for (part, at) in writer.iter().zip([14, 16, 18]) {
            bytes[at..at + 2].copy_from_slice(&part.to_le_bytes());
        }
        bytes[24..32].copy_from_slice(&body_length.to_le_bytes());
        bytes[32..64].copy_from_slice(&digest.0);
        bytes
    }

    /// Parses any version's header. Only the magic is checked: use [`check_readable`](Self::check_readable)
    /// before the body, and [`check_body`](Self::check_body) with it.
    pub fn decode(bytes: &[u8; LEN]) -> Result<Self, FormatError> {
        if bytes[0..8] != MAGIC {
            let why =
                format!("`{}` instead of `{}`", bytes[0..8].escape_ascii(), MAGIC.escape_ascii());
            return Err(FormatError::field("manifest", "magic", why));
        }
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut body_length = [0; 8];
        body_length.copy_from_slice(&bytes[24..32]);
        let mut digest = [0; 32];
        digest.copy_from_slice(&bytes[32..64]);
        Ok(Self {
            major: u16_at(8),
            minor: u16_at(10),
            arch: u16_at(12),
            writer: [u16_at(14), u16_at(16), u16_at(18)],
            body_length: u64::from_le_bytes(body_length),
            digest: Digest(digest),
        })
    }

    /// Whether this build reads bodies of that format version and length.
    pub fn check_readable(&self) -> Result<(), FormatError> {
        if self.major != MAJOR || self.minor > MINOR {
            return Err(FormatError::Format {
                major: self.major,
                minor: self.minor,
                writer: self.writer_text(),
            });
        }
        if self.body_length > MAX_BODY {
            let why = format!("{} bytes, at most {MAX_BODY} are allowed", self.body_length);
            return Err(FormatError::field("manifest", "body length", why));
        }
        Ok(())
    }

    /// Whether the header and `body` are the bytes that were written.
    pub fn check_body(&self, bytes: &[u8; LEN], body: &[u8]) -> Result<(), FormatError> {
        if self.body_length != body.len() as u64 {
            return Err(FormatError::Length {
                file: "manifest".into(),
                what: "the body".into(),
                expected: self.body_length,
                found: body.len() as u64,
            });
        }
        let found = digest_over(bytes, body);
        if found != self.digest {
            return Err(FormatError::Digest {
                file: "manifest".into(),
                what: "the manifest".into(),
                expected: self.digest,
                found,
            });
        }
        if bytes[20..24] != [0; 4] {
            return Err(FormatError::field("manifest", "reserved bytes", "not zero"));
        }
        Ok(())
    }

    /// The writer's version as people write it.
    pub fn writer_text(&self) -> String {
        let [major, minor, patch] = self.writer;
        format!("{major}.{minor}.{patch}")
    }

    /// The architecture's name, as `uname -m` prints it.
    pub fn arch_text(&self) -> String {
        match self.arch {
            ARCH_AARCH64 => "aarch64".to_owned(),
            other => format!("ELF machine {other}"),
        }
    }

    fn digest_over(&self, body: &[u8]) -> Digest {
        digest_over(&self.encode(), body)
    }
}

/// The snapshot's id: blake3 of the whole manifest, header and body.
pub fn snapshot_id(header: &[u8; LEN], body: &[u8]) -> Digest {
    blake3::Hasher::new().update(header).update(body).finalize().into()
}

fn digest_over(header: &[u8; LEN], body: &[u8]) -> Digest {
    blake3::Hasher::new().update(&header[..COVERED]).update(body).finalize().into()
}

fn own_version() -> [u16; 3] {
    // Cargo checks that the three are numbers; a part above 65535 reads as 0.
    [
        env!("CARGO_PKG_VERSION_MAJOR"),
        env!("CARGO_PKG_VERSION_MINOR"),
        env!("CARGO_PKG_VERSION_PATCH"),
    ]
    .map(|part| part.parse().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back_as_written() {
        let header = Header::new(ARCH_AARCH64, 0, b"body");
        let bytes = header.encode();
        let back = Header::decode(&bytes).unwrap();
        assert_eq!(back, header);
        back.check_readable().unwrap();
        back.check_body(&bytes, b"body").unwrap();
        assert_eq!(back.arch_text(), "aarch64");
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let bytes = Header::new(ARCH_AARCH64, 0, b"body").encode();
        for bit in 0..LEN * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            let result = Header::decode(&damaged).and_then(|header| {
                header.check_readable()?;
                header.check_body(&damaged, b"body")
            });
            assert!(result.is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_newer_format_is_refused_with_its_version_and_writer() {
        let mut header = Header::new(ARCH_AARCH64, 0, b"");
        (header.major, header.minor, header.writer) = (MAJOR, MINOR + 1, [9, 8, 7]);
        let text = header.check_readable().unwrap_err().to_string();
        let format = format!("format {MAJOR}.{}", MINOR + 1);
        assert!(text.contains(&format) && text.contains("squib 9.8.7"), "{text}");
        (header.major, header.minor) = (MAJOR + 1, 0);
        assert!(header.check_readable().is_err());
    }

    #[test]
    fn a_body_length_beyond_the_limit_is_refused_before_it_is_read() {
        let mut header = Header::new(ARCH_AARCH64, 0, b"");
        header.body_length = MAX_BODY + 1;
        let text = header.check_readable().unwrap_err().to_string();
        assert!(text.contains("body length"), "{text}");
    }
}
