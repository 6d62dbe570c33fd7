//! Copies of one guest are told that they are copies.

use std::{collections::HashSet, thread};

use squib_devices::{
    gic::GicState,
    map::{SPI_BASE, VMGENID, VMGENID_INTID},
};
use squib_formats::persist::Versioned;
use squib_tests::linux::Shell;
use squib_vmm::machine::{ClockPolicy, Identity, Machine, RestoreOptions};
use vm_memory::{Bytes, GuestAddress};

/// Copies at once.
const CLONES: usize = 4;
/// What the kernel logs when its random number generator has taken a new generation id.
const RESEEDED: &str = "crng reseeded due to virtual machine fork";

fn generation(machine: &Machine) -> [u8; 16] {
    machine.ram().read_obj(GuestAddress(VMGENID.base)).unwrap()
}

/// Whether the interrupt that tells of a new generation id waits for the guest.
fn is_pending(machine: &Machine) -> bool {
    let sections = machine.save().unwrap();
    let gic = sections.iter().find(|section| section.kind == GicState::KIND).unwrap();
    let state: GicState = gic.decode().unwrap();
    state.spis[0].pending_latch >> (VMGENID_INTID - SPI_BASE) & 1 == 1
}

fn options(identity: Identity) -> RestoreOptions {
    RestoreOptions { identity, clock: ClockPolicy::Freeze }
}

fn reseeds(shell: &Shell) -> String {
    shell.ask(&format!("dmesg | grep -c '{RESEEDED}'")).unwrap()
}

#[test]
fn clones_of_one_linux_reseed_and_have_random_numbers_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let Some(shell) = Shell::boot(folder.path()).unwrap() else {
        eprintln!(
            "SKIPPED clones_of_one_linux_reseed_and_have_random_numbers_of_their_own: the guest kit \
             is not in the cache (`squib kit fetch` gets it)"
        );
        return;
    };
    assert_eq!(shell.ask("grep -c vmgenid /proc/interrupts").unwrap(), "1", "{}", shell.text());
    assert_eq!(reseeds(&shell), "0");
    let first = generation(&shell.machine);
    let snap = folder.path().join("snap");
    shell.save(&snap).unwrap();

    let clone = |n: usize| {
        let disks = folder.path().join(format!("clone{n}"));
        let shell = Shell::restore(&snap, &disks, options(Identity::Clone)).unwrap();
        // All of it before the first instruction.
        let id = generation(&shell.machine);
        assert!(is_pending(&shell.machine));
        shell.machine.resume().unwrap();
        let urandom = shell.ask("head -c 16 /dev/urandom | od -An -tx1").unwrap();
        assert_eq!(urandom.split_whitespace().count(), 16, "{urandom}");
        assert_eq!(reseeds(&shell), "1", "{}", shell.text());
        // What the driver had fetched before the snapshot comes first.
        let rng = shell.ask("head -c 1024 /dev/hwrng | tail -c 16 | od -An -tx1").unwrap();
        assert_eq!(rng.split_whitespace().count(), 16, "{rng}");
        assert!(!is_pending_after(&shell));
        (id, urandom, rng)
    };
    let clones: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = (0..CLONES).map(|n| scope.spawn(move || clone(n))).collect();
        running.into_iter().map(|clone| clone.join().unwrap()).collect()
    });
    let ids: HashSet<[u8; 16]> = clones.iter().map(|clone| clone.0).chain([first]).collect();
    assert_eq!(ids.len(), CLONES + 1, "every copy has an id of its own");
    let urandom: HashSet<&str> = clones.iter().map(|clone| &*clone.1).collect();
    assert_eq!(urandom.len(), CLONES, "{urandom:?}");
    let rng: HashSet<&str> = clones.iter().map(|clone| &*clone.2).collect();
    assert_eq!(rng.len(), CLONES, "{rng:?}");

    let disks = folder.path().join("same");
    let same = Shell::restore(&snap, &disks, options(Identity::Same)).unwrap();
    assert_eq!(generation(&same.machine), first);
    assert!(!is_pending(&same.machine));
    same.machine.resume().unwrap();
    assert_eq!(reseeds(&same), "0");
}

/// Whether the interrupt still waits in a running guest, which is paused to look.
fn is_pending_after(shell: &Shell) -> bool {
    shell.machine.pause(std::time::Duration::from_secs(60)).unwrap();
    is_pending(&shell.machine)
}
