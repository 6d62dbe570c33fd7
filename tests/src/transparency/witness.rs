//! Everything about a machine that must be equal.

use std::fs::File;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use squib_devices::map::RAM_BASE;
use squib_formats::image::Control;
use squib_snapshot::restore::finish_disks;
use squib_vmm::machine::{Machine, RunUntil};
use vm_memory::{Bytes, GuestAddress};

/// Bytes of memory that are compared as one.
const CHUNK: usize = 64 << 10;

/// What is compared of a machine at one instruction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// How the run stopped.
    stopped: String,
    /// Retired instructions.
    retired: Vec<Option<u64>>,
    /// Chunks of memory that are not zero: address and digest.
    memory: Vec<(u64, String)>,
    /// Digests of the disks by id.
    disks: Vec<(String, String)>,
    /// Digests of the saved states by kind and instance: registers of vCPUs, devices, interrupt
    /// controller and time.
    states: Vec<(String, String)>,
    /// All bytes on the console since the boot.
    pub(super) console: Vec<u8>,
}

impl Witness {
    /// The witness of `machine`, which stopped as `stopped` says.
    pub(super) fn of(machine: &Machine, stopped: &RunUntil, console: Vec<u8>) -> Result<Self> {
        let ended = matches!(stopped, RunUntil::Ended(_));
        // The vCPUs of a machine that has ended cannot be asked any more.
        let states = if ended { Vec::new() } else { states(machine)? };
        let retired = if ended { Vec::new() } else { machine.retired()? };
        let stopped = format!("{stopped:?}");
        Ok(Self {
            stopped,
            retired,
            memory: memory(machine)?,
            disks: disks(machine)?,
            states,
            console,
        })
    }

    /// The last line on the console that is not empty.
    pub(super) fn last_line(&self) -> String {
        let text = String::from_utf8_lossy(&self.console);
        text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().to_owned()
    }

    /// What differs in `found`, one line each.
    pub(super) fn differences(&self, found: &Self) -> Vec<String> {
        let Self { stopped, retired, memory, disks, states, console } = self;
        let mut lines = Vec::new();
        if *stopped != found.stopped || *retired != found.retired {
            lines.push(format!(
                "it stopped {} after {:?} instructions instead of {stopped} after {retired:?}",
                found.stopped, found.retired
            ));
        }
        let chunks = unequal(memory, &found.memory).map(|address| format!("{address:#x}"));
        let chunks: Vec<String> = chunks.collect();
        if !chunks.is_empty() {
            lines.push(format!("memory, in the 64 KiB at {}", chunks.join(", ")));
        }
        lines.extend(unequal(disks, &found.disks).map(|id| format!("disk {id}")));
        lines.extend(unequal(states, &found.states).map(|name| format!("state {name}")));
        if *console != found.console {
            let same = console.iter().zip(&found.console).take_while(|(a, b)| a == b).count();
            lines.push(format!(
                "the console, from byte {same} of {}: {:?} instead of {:?}",
                console.len(),
                shown(&found.console, same),
                shown(console, same)
            ));
        }
        lines
    }
}

fn memory(machine: &Machine) -> Result<Vec<(u64, String)>> {
    let mut chunks = Vec::new();
    let mut buffer = vec![0; CHUNK];
    for offset in (0..machine.ram().size()).step_by(CHUNK) {
        machine.ram().read_slice(&mut buffer, GuestAddress(RAM_BASE + offset))?;
        if buffer.iter().any(|byte| *byte != 0) {
            chunks.push((RAM_BASE + offset, blake3::hash(&buffer).to_hex().to_string()));
        }
    }
    Ok(chunks)
}

fn disks(machine: &Machine) -> Result<Vec<(String, String)>> {
    finish_disks(machine, Control::default())?;
    let digest = |path| -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(path)?)?;
        Ok(hasher.finalize().to_hex().to_string())
    };
    let disks = machine.config().disks.iter();
    disks
        .map(|disk| {
            let digest = digest(&disk.path).with_context(|| format!("{}", disk.path.display()))?;
            Ok((disk.id.clone(), digest))
        })
        .collect()
}

fn states(machine: &Machine) -> Result<Vec<(String, String)>> {
    let sections = machine.save()?.into_iter();
    Ok(sections
        .map(|section| {
            let name = format!("{} {}", section.kind, section.instance);
            (name, blake3::hash(&section.payload).to_hex().to_string())
        })
        .collect())
}

/// Keys whose values differ, or that are on one side only.
fn unequal<'a, K: PartialEq, V: PartialEq>(
    expected: &'a [(K, V)],
    found: &'a [(K, V)],
) -> impl Iterator<Item = &'a K> {
    let differs = |others: &'a [(K, V)]| {
        move |(key, value): &&(K, V)| !others.iter().any(|(k, v)| k == key && v == value)
    };
    let only = move |(key, _): &&(K, V)| !expected.iter().any(|(k, _)| k == key);
    expected.iter().filter(differs(found)).chain(found.iter().filter(only)).map(|(key, _)| key)
}

fn shown(bytes: &[u8], from: usize) -> String {
    let rest = &bytes[from..];
    String::from_utf8_lossy(&rest[..rest.len().min(80)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn witness() -> Witness {
        let pair = |a: &str| (a.to_owned(), "0".to_owned());
        Witness {
            stopped: "Reached".into(),
            retired: vec![Some(1)],
            memory: vec![(RAM_BASE, "0".into())],
            disks: vec![pair("disk")],
            states: vec![pair("serial 0"), pair("vcpu 0")],
            console: b"abc".to_vec(),
        }
    }

    #[test]
    fn every_difference_is_named() {
        type Change = fn(&mut Witness);
        let changes: [(&str, Change); 8] = [
            ("it stopped", |w| w.stopped = "Idle".into()),
            ("it stopped", |w| w.retired = vec![Some(2)]),
            ("memory, in the 64 KiB at 0x80000000", |w| w.memory[0].1 = "1".into()),
            ("memory, in the 64 KiB at 0x80010000", |w| {
                w.memory.push((RAM_BASE + 0x1_0000, "0".into()))
            }),
            ("disk disk", |w| w.disks[0].1 = "1".into()),
            ("state vcpu 0", |w| w.states.truncate(1)),
            ("the console, from byte 1 of 3", |w| w.console = b"axc".to_vec()),
            ("the console, from byte 3 of 3", |w| w.console.push(b'd')),
        ];
        assert!(witness().differences(&witness()).is_empty());
        for (expected, change) in changes {
            let mut found = witness();
            change(&mut found);
            let lines = witness().differences(&found);
            assert!(lines.len() == 1 && lines[0].starts_with(expected), "{lines:?}");
        }
    }
}
