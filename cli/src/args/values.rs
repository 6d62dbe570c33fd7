//! Values of several parts.

use std::{num::NonZeroUsize, path::PathBuf, str::FromStr};

use squib_formats::image::{MAX_THREADS, is_chunk_size};
use squib_vmm::config::MachineConfig;

use crate::api::types::{DiskMode, DiskModeParam};

/// `PATH[,ro][,id=ID][,format=raw]`. A comma in the path is written twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskArg {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) id: Option<String>,
    /// Take it as raw bytes whatever it looks like.
    pub(crate) raw: bool,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A doubled comma stands for one inside the path; no argument holds a zero byte.
        let masked = text.replace(",,", "\0");
        let mut words = masked.split(',').map(|word| word.replace('\0', ","));
        let path = words.next().unwrap_or_default();
        if path.is_empty() {
            return Err("a path is expected: PATH[,ro][,id=ID][,format=raw]".into());
        }
        let mut disk = Self { path: path.into(), read_only: false, id: None, raw: false };
        for word in words {
            match word.split_once('=') {
                None if word == "ro" && !disk.read_only => disk.read_only = true,
                Some(("id", id)) if disk.id.is_none() => disk.id = Some(id.to_owned()),
                Some(("format", "raw")) if !disk.raw => disk.raw = true,
                Some(("format", other)) if other != "raw" => {
                    return Err(format!("format `{other}`: only raw disks can be used"));
                }
                _ => {
                    return Err(format!(
                        "`{word}` is not an option of a disk, or is given twice: \
                         PATH[,ro][,id=ID][,format=raw], a comma in the path written twice"
                    ));
                }
            }
        }
        Ok(disk)
    }
}

/// `ID=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskPlace {
    pub(crate) id: String,
    pub(crate) path: PathBuf,
}

impl FromStr for DiskPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((id, path)) if !id.is_empty() && !path.is_empty() => {
                Ok(Self { id: id.to_owned(), path: path.into() })
            }
            _ => {
                Err("ID=PATH is expected, with the disk's id from `squib snapshot inspect`".into())
            }
        }
    }
}

/// capture|reference[=ID,...]: where the bytes of some disks, or without ids of all, go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskModeArg {
    pub(crate) mode: DiskMode,
    pub(crate) ids: Vec<String>,
}

impl FromStr for DiskModeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not capture or reference, with =ID,... for some disks");
        let (mode, ids) = match text.split_once('=') {
            Some((mode, ids)) => (mode, ids.split(',').map(str::to_owned).collect()),
            None => (text, Vec::new()),
        };
        let mode = match mode {
            "capture" => DiskMode::Capture,
            "reference" => DiskMode::Reference,
            _ => return Err(wrong()),
        };
        if ids.iter().any(String::is_empty) {
            return Err(wrong());
        }
        Ok(Self { mode, ids })
    }
}

impl DiskModeArg {
    /// As the control API has it.
    pub(crate) fn params(&self) -> Vec<DiskModeParam> {
        let param = |disk_id| DiskModeParam { mode: self.mode, disk_id };
        match self.ids.is_empty() {
            true => vec![param(None)],
            false => self.ids.iter().cloned().map(Some).map(param).collect(),
        }
    }
}

/// A number of bytes: plain numbers are MiB, as is the suffix M; K, G and T likewise with powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a size: 256, 256M and 1G are");
        let short = text.strip_suffix("iB").or_else(|| text.strip_suffix('B')).unwrap_or(text);
        let (digits, shift) = match short.chars().last().map(|c| c.to_ascii_uppercase()) {
            Some('K') => (&short[..short.len() - 1], 10),
            Some('M') => (&short[..short.len() - 1], 20),
            Some('G') => (&short[..short.len() - 1], 30),
            Some('T') => (&short[..short.len() - 1], 40),
            _ if short.len() == text.len() => (short, 20),
            _ => return Err(wrong()),
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

/// The size of a guest's memory.
pub(crate) fn memory(text: &str) -> Result<Size, String> {
    let size: Size = text.parse()?;
    MachineConfig::check_memory(size.0).map_err(|why| why.to_string())?;
    Ok(size)
}

/// A number of vCPUs.
pub(crate) fn cpus(text: &str) -> Result<u32, String> {
    let count = text.parse().map_err(|_| "a number of vCPUs is expected".to_owned())?;
    MachineConfig::check_vcpus(count).map_err(|why| why.to_string())?;
    Ok(count)
}

/// A number of threads.
pub(crate) fn threads(text: &str) -> Result<NonZeroUsize, String> {
    let count = text.parse().ok().filter(|count: &NonZeroUsize| count.get() <= MAX_THREADS);
    count.ok_or_else(|| format!("1 to {MAX_THREADS} threads are possible"))
}

/// The size of a chunk.
pub(crate) fn chunk_size(text: &str) -> Result<u32, String> {
    let size: Size = text.parse()?;
    let size = u32::try_from(size.0).ok().filter(|size| is_chunk_size(*size));
    size.ok_or_else(|| "a power of two from 16K to 4M is expected".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_mib_unless_they_say_otherwise() {
        for (text, bytes) in
            [("256", 256 << 20), ("256M", 256 << 20), ("1g", 1 << 30), ("65536KiB", 64 << 20)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "M", "-1", "1.5G", "12B", "99999999999T", "+1M", "ä"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_disk_mode_is_for_all_disks_or_for_some() {
        let param = |mode, id: Option<&str>| DiskModeParam { mode, disk_id: id.map(Into::into) };
        let params = |text: &str| text.parse::<DiskModeArg>().map(|mode| mode.params());
        assert_eq!(params("reference"), Ok(vec![param(DiskMode::Reference, None)]));
        let both = vec![param(DiskMode::Capture, Some("a")), param(DiskMode::Capture, Some("b"))];
        assert_eq!(params("capture=a,b"), Ok(both));
        for text in ["", "copy", "capture=", "reference=a,", "=a"] {
            assert!(params(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_disk_is_a_path_with_options() {
        let disk = |text: &str| text.parse::<DiskArg>();
        let plain = DiskArg { path: "a.img".into(), read_only: false, id: None, raw: false };
        assert_eq!(disk("a.img"), Ok(plain.clone()));
        let full = DiskArg { read_only: true, id: Some("data".into()), ..plain };
        assert_eq!(disk("a.img,ro,id=data"), Ok(full.clone()));
        assert_eq!(disk("a,,b.img,ro").unwrap().path, PathBuf::from("a,b.img"));
        for text in ["", ",ro", "a,rw", "a,ro,ro", "a,id=x,id=y", "a,"] {
            assert!(disk(text).is_err(), "{text}");
        }
    }
}
