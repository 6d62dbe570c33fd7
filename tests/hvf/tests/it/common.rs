//! Machines and what they print.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use squib_tests::{
    console::Capture,
    scenario,
    tiny::{POWER_OFF, Tiny},
};
use squib_vmm::{
    config::{BackendKind, MachineConfig},
    machine::{Machine, Outcome},
};
use vm_memory::{Bytes, GuestAddress};

/// Long enough for the slowest host.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// Rounds of the tiny guest between two lines.
pub(crate) const PRINT_EVERY: u32 = 20;

/// The tiny guest on the hvf backend.
pub(crate) fn tiny(folder: &Path) -> MachineConfig {
    let mut config = scenario::tiny(folder).unwrap();
    config.deterministic = None;
    config.backend = BackendKind::Hvf;
    Tiny { timer_ticks: 1_000_000, print_every: PRINT_EVERY }.write(&config.kernel).unwrap();
    config
}

/// The last whole line's field `name`.
pub(crate) fn field(text: &str, name: &str) -> Option<u64> {
    let whole = &text[..text.rfind('\n')?];
    let line = whole.lines().last()?;
    let value = line.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('='))?;
    u64::from_str_radix(value, 16).ok()
}

/// The field `n` of all whole lines: rounds done.
pub(crate) fn rounds(text: &str) -> Vec<u64> {
    let whole = &text[..text.rfind('\n').unwrap_or(0)];
    whole.lines().filter_map(|line| u64::from_str_radix(line.get(2..10)?, 16).ok()).collect()
}

/// Waits until `found` is happy with the console, or the machine has ended.
pub(crate) fn wait(
    machine: &Machine,
    console: &Capture,
    found: impl Fn(&str) -> bool,
) -> Result<()> {
    let start = Instant::now();
    while !found(&console.text()) {
        if let Some(outcome) = machine.wait_timeout(Duration::from_millis(2)) {
            machine.drain_console(PATIENCE);
            bail!("{outcome}: {}", console.text());
        }
        if start.elapsed() > PATIENCE {
            bail!("the guest stands still: {}", console.text());
        }
    }
    Ok(())
}

/// Waits for `more` lines.
pub(crate) fn lines(machine: &Machine, console: &Capture, more: usize) -> Result<()> {
    let before = rounds(&console.text()).len();
    wait(machine, console, |text| rounds(text).len() >= before + more)
}

pub(crate) fn power_off(machine: &Machine) -> Result<()> {
    machine.console_input().send(&[POWER_OFF])?;
    match machine.wait_timeout(PATIENCE) {
        Some(Outcome::PowerOff) => Ok(()),
        other => bail!("{other:?}"),
    }
}

pub(crate) fn memory(machine: &Machine) -> Vec<u8> {
    let mut bytes = vec![0; machine.ram().size() as usize];
    machine.ram().read_slice(&mut bytes, GuestAddress(machine.ram().base())).unwrap();
    bytes
}

/// A kernel of `words`, which begin with a branch over the header.
pub(crate) fn kernel(words: &[u32]) -> Vec<u8> {
    let mut image = vec![0u8; 0x1000];
    image[0..4].copy_from_slice(&0x1400_0010u32.to_le_bytes()); // b #64
    image[16..24].copy_from_slice(&0x1000u64.to_le_bytes());
    image[24..32].copy_from_slice(&0b1010u64.to_le_bytes());
    image[56..60].copy_from_slice(b"ARM\x64");
    for (at, word) in words.iter().enumerate() {
        image[64 + 4 * at..][..4].copy_from_slice(&word.to_le_bytes());
    }
    image
}

/// What `code` does on a machine without disks.
pub(crate) fn bare(folder: &Path, code: &[u32]) -> Machine {
    let mut config = tiny(folder);
    config.disks.clear();
    std::fs::write(&config.kernel, kernel(code)).unwrap();
    let machine = Machine::boot(config, Box::new(std::io::sink())).unwrap();
    machine.resume().unwrap();
    machine
}
