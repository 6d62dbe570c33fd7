//! What a linked Mach-O binary says of itself, read on any system: which system it is for, which libraries it
//! loads, and which symbols of Hypervisor.framework it takes from where.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use object::{
    Endianness, Object as _, ObjectSegment as _,
    macho::{self, LinkeditDataCommand, MachHeader64},
    read::macho::{MachHeader as _, MachOFile64},
};

/// Where the framework is on a Mac.
pub const FRAMEWORK: &str = "/Hypervisor.framework/";

const ENTITLEMENT: &[u8] = b"<key>com.apple.security.hypervisor</key>";
/// The macOS from which on the framework has an interrupt controller.
const FRAMEWORK_MACOS: u32 = 15;

/// A linked binary for Apple silicon.
#[derive(Debug, PartialEq, Eq)]
pub struct Binary {
    /// The least macOS that it asks for, as major and minor number.
    pub least_macos: Option<(u32, u32)>,
    /// Alignment of its segments in memory: at least the page of Apple silicon.
    pub page: u64,
    /// Whether it has a code signature of any kind. Without one the kernel does not start it.
    pub signed: bool,
    /// Whether the signature claims the entitlement for Hypervisor.framework.
    pub entitled: bool,
    /// Names of the imported symbols, by the library that each is taken from.
    pub imports: BTreeMap<String, Vec<String>>,
}

impl Binary {
    /// Reads the file's bytes. Anything but an arm64 executable is an error.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        let file = MachOFile64::<Endianness>::parse(bytes).context("not a 64-bit Mach-O file")?;
        let header: &MachHeader64<_> = file.macho_header();
        let endian = file.endian();
        if header.cputype(endian) != macho::CPU_TYPE_ARM64 {
            bail!("it is for CPU type {:#x}, not for arm64", header.cputype(endian));
        }
        if header.filetype(endian) != macho::MH_EXECUTE {
            bail!("its file type is {}, not an executable", header.filetype(endian));
        }
        let mut binary = Self {
            least_macos: None,
            // What an address of every segment is a multiple of.
            page: file.segments().map(|segment| lowest_bit(segment.address())).min().unwrap_or(0),
            signed: false,
            entitled: false,
            imports: BTreeMap::new(),
        };
        let mut commands = header.load_commands(endian, bytes, 0)?;
        while let Some(command) = commands.next()? {
            if let Some(version) = command.build_version()? {
                let platform = version.platform.get(endian);
                if platform != macho::PLATFORM_MACOS {
                    bail!("it is for platform {platform}, not for macOS");
                }
                let least = version.minos.get(endian);
                binary.least_macos = Some((least >> 16, least >> 8 & 0xff));
            }
            // A library without symbols counts too: the binary does not start where it is not.
            if let Some(dylib) = command.dylib()? {
                let name = command.string(endian, dylib.dylib.name)?;
                binary.imports.entry(text(name)).or_default();
            }
            if command.cmd() == macho::LC_CODE_SIGNATURE {
                binary.signed = true;
                let place: &LinkeditDataCommand<_> = command.data()?;
                let start = place.dataoff.get(endian) as usize;
                let end = start.saturating_add(place.datasize.get(endian) as usize);
                // The claims lie there as the text of a property list.
                let signature = bytes.get(start..end).unwrap_or_default();
                binary.entitled = signature.windows(ENTITLEMENT.len()).any(|at| at == ENTITLEMENT);
            }
        }
        for import in file.imports()? {
            let library = binary.imports.entry(text(import.library())).or_default();
            library.push(text(import.name()).trim_start_matches('_').to_owned());
        }
        Ok(binary)
    }

    /// The imported functions of Hypervisor.framework.
    pub fn hypervisor(&self) -> Vec<&str> {
        let named = |name: &&str| name.starts_with("hv_");
        let mut names: Vec<&str> =
            self.imports.values().flatten().map(String::as_str).filter(named).collect();
        names.sort_unstable();
        names
    }

    /// What it is for and what it takes from where, a line each.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some((major, minor)) = self.least_macos {
            lines.push(format!("macOS {major}.{minor} or later"));
        }
        lines.push(match (self.signed, self.entitled) {
            (_, true) => "signed, with the entitlement for Hypervisor.framework".to_owned(),
            (true, false) => "signed, without the entitlement for Hypervisor.framework".to_owned(),
            (false, false) => "not signed".to_owned(),
        });
        for (library, symbols) in &self.imports {
            lines.push(format!("{:>4} symbols of {library}", symbols.len()));
        }
        let hypervisor = self.hypervisor();
        if hypervisor.is_empty() {
            lines.push("no function of Hypervisor.framework is in use: no hvf backend".to_owned());
        }
        lines.extend(hypervisor.iter().map(|name| format!("     {name}")));
        lines
    }

    /// What would keep it from working on a Mac that has nothing but the system, a line each; with `hvf`, what
    /// would keep the backend on the framework from working.
    pub fn faults(&self, hvf: bool) -> Vec<String> {
        let mut faults = Vec::new();
        if hvf && self.hypervisor().is_empty() {
            faults.push("no hv_* symbol is imported: it has no hvf backend".to_owned());
        }
        for (library, symbols) in &self.imports {
            let system =
                library.starts_with("/usr/lib/") || library.starts_with("/System/Library/");
            if !system {
                let of = symbols.first().map_or("", String::as_str);
                faults.push(format!("`{library}` is not a library of the system (for `{of}`)"));
            }
            for symbol in symbols.iter().filter(|symbol| symbol.starts_with("hv_")) {
                if !library.contains(FRAMEWORK) {
                    faults.push(format!("{symbol} is taken from `{library}`, not the framework"));
                }
            }
        }
        let hypervisor = self.hypervisor().len();
        if let Some((major, minor)) = self.least_macos
            && hypervisor > 0
            && major < FRAMEWORK_MACOS
        {
            // It would be started there, and end before its first instruction.
            faults.push(format!(
                "it says macOS {major}.{minor} or later, and takes {hypervisor} functions from a framework \
                 that has them from macOS {FRAMEWORK_MACOS} on: set MACOSX_DEPLOYMENT_TARGET"
            ));
        }
        if self.page < 0x4000 {
            faults.push(format!("its segments are aligned to {:#x}, pages have 0x4000", self.page));
        }
        if self.least_macos.is_none() {
            faults.push("it does not say which macOS it is for".to_owned());
        }
        if !self.signed {
            faults.push("it has no code signature, not even the linker's".to_owned());
        }
        faults
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The largest power of two that divides it; of zero, any does.
fn lowest_bit(address: u64) -> u64 {
    match address {
        0 => u64::MAX,
        address => 1 << address.trailing_zeros(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAMEWORK_PATH: &str = "/System/Library/Frameworks/Hypervisor.framework/Hypervisor";

    /// An executable with these commands, then one undefined symbol of the first library.
    fn executable(cpu: u32, commands: &[Vec<u8>], symbol: Option<&str>) -> Vec<u8> {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut commands = commands.to_vec();
        let mut tail = Vec::new();
        if let Some(symbol) = symbol {
            let at = 32 + commands.iter().map(Vec::len).sum::<usize>() as u32 + 24 + 80;
            let strings = [&b"\0"[..], symbol.as_bytes(), b"\0"].concat();
            commands.push(words(&[2, 24, at, 1, at + 16, strings.len() as u32]));
            let mut dysymtab = vec![0; 20];
            dysymtab[..2].copy_from_slice(&[0xb, 80]);
            // iundefsym, nundefsym
            dysymtab[6..8].copy_from_slice(&[0, 1]);
            commands.push(words(&dysymtab));
            // Undefined, external, of the first library.
            tail.extend([1, 0, 0, 0, 1, 0, 0, 1]);
            tail.extend(0u64.to_le_bytes());
            tail.extend(strings);
        }
        let size = commands.iter().map(Vec::len).sum::<usize>() as u32;
        let two_level = 0x80;
        let mut file: Vec<u8> =
            words(&[0xfeed_facf, cpu, 0, 2, commands.len() as u32, size, two_level, 0]);
        file.extend(commands.concat());
        file.extend(tail);
        file
    }

    fn dylib(name: &str) -> Vec<u8> {
        let size = (24 + name.len() as u32 + 1).next_multiple_of(8);
        let mut command: Vec<u8> =
            [0xc, size, 24, 0, 0, 0].iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
        command.extend(name.as_bytes());
        command.resize(size as usize, 0);
        command
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    const ARM64: u32 = 0x0100_000c;

    /// macOS 15.2, a signature, and a segment without sections.
    fn commands(library: &str) -> Vec<Vec<u8>> {
        commands_for(0x000f_0200, library)
    }

    fn commands_for(macos: u32, library: &str) -> Vec<Vec<u8>> {
        let version = words(&[0x32, 24, 1, macos, macos, 0]);
        let mut segment = vec![0; 18];
        segment[..2].copy_from_slice(&[0x19, 72]);
        // Address and size.
        segment[6..9].copy_from_slice(&[0x4000, 1, 0x4000]);
        vec![version, words(&[0x1d, 16, 0, 0]), words(&segment), dylib(library)]
    }

    #[test]
    fn the_framework_s_symbols_and_the_system_are_read() {
        let file = executable(ARM64, &commands(FRAMEWORK_PATH), Some("_hv_vm_create"));
        let binary = Binary::read(&file).unwrap();
        assert_eq!(binary.hypervisor(), ["hv_vm_create"]);
        let lines = binary.lines().join("\n");
        for said in ["macOS 15.2 or later", FRAMEWORK_PATH, "hv_vm_create"] {
            assert!(lines.contains(said), "{lines}");
        }
        assert_eq!(binary.faults(true), [""; 0]);
        assert_eq!(binary.least_macos, Some((15, 2)));
        assert!(binary.signed);
        assert_eq!(binary.faults(false), [""; 0]);
    }

    #[test]
    fn a_binary_without_the_framework_is_a_fault_where_it_is_wanted() {
        let commands = commands("/usr/lib/libSystem.B.dylib");
        let binary = Binary::read(&executable(ARM64, &commands, Some("_exit"))).unwrap();
        assert_eq!(binary.faults(false), [""; 0]);
        assert!(binary.lines().join("\n").contains("no hvf backend"));
        assert!(binary.faults(true)[0].contains("no hv_* symbol"));
    }

    #[test]
    fn a_symbol_of_another_library_is_a_fault() {
        let file = executable(ARM64, &commands("@rpath/libhv.dylib"), Some("_hv_vm_create"));
        let faults = Binary::read(&file).unwrap().faults(false).join("\n");
        assert!(faults.contains("hv_vm_create is taken from `@rpath/libhv.dylib`"), "{faults}");
        assert!(faults.contains("not a library of the system"), "{faults}");
    }

    #[test]
    fn a_system_on_which_it_cannot_start_is_a_fault() {
        let old = commands_for(0x000b_0000, FRAMEWORK_PATH);
        let with = Binary::read(&executable(ARM64, &old, Some("_hv_gic_create"))).unwrap();
        let faults = with.faults(false).join("\n");
        assert!(faults.contains("macOS 11.0") && faults.contains("DEPLOYMENT_TARGET"), "{faults}");
        let without = Binary::read(&executable(ARM64, &old, Some("_exit"))).unwrap();
        assert_eq!(without.faults(false), [""; 0]);
    }

    #[test]
    fn the_entitlement_is_found_in_the_signature_and_nowhere_else() {
        let list = include_bytes!("../../cli/squib.entitlements");
        let file = executable(ARM64, &commands(FRAMEWORK_PATH), Some("_hv_vm_create"));
        let with = |start: usize, size: usize| {
            let mut file = [&file[..], list].concat();
            // The second command, after the header and the version.
            file[32 + 24 + 8..][..4].copy_from_slice(&(start as u32).to_le_bytes());
            file[32 + 24 + 12..][..4].copy_from_slice(&(size as u32).to_le_bytes());
            Binary::read(&file).unwrap()
        };
        assert!(with(file.len(), list.len()).entitled);
        assert!(!with(file.len(), 8).entitled);
        assert!(!with(usize::MAX, list.len()).entitled);
        let said = with(0, 0).lines().join("\n");
        assert!(said.contains("without the entitlement"), "{said}");
    }

    #[test]
    fn a_binary_without_version_and_signature_is_told() {
        let file = executable(ARM64, &[dylib("/usr/lib/libSystem.B.dylib")], None);
        let faults = Binary::read(&file).unwrap().faults(false).join("\n");
        assert!(faults.contains("which macOS") && faults.contains("no code signature"), "{faults}");
    }

    #[test]
    fn other_files_are_refused() {
        assert!(Binary::read(b"\x7fELF").is_err());
        let x86 = executable(0x0100_0007, &[], None);
        let error = Binary::read(&x86).unwrap_err().to_string();
        assert!(error.contains("not for arm64"), "{error}");
        let whole = executable(ARM64, &commands(FRAMEWORK_PATH), Some("_hv_vm_create"));
        for len in 0..whole.len() {
            // Whatever it says, it says it without a panic.
            let _ = Binary::read(&whole[..len]);
        }
    }
}
