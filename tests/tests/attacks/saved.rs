//! What can be saved can be restored.

use std::{collections::BTreeMap, io};

use proptest::prelude::*;
use squib_devices::{map, memory::GuestRam};
use squib_formats::{
    contract::{Field, Role},
    persist::{Section, Versioned},
};
use squib_vmm::{
    config::{Deterministic, MachineConfig},
    hypervisor::VcpuState,
    machine::{Machine, Outcome, RestoreOptions, RunUntil, TimeState},
};

use crate::parts::fields_of;

/// CNTV_CTL_EL0 and CNTV_CVAL_EL0 as they stand in a vCPU's state: op0, op1, CRn, CRm, op2.
const CNTV_CTL: u16 = 3 << 14 | 3 << 11 | 14 << 7 | 3 << 3 | 1;
const CNTV_CVAL: u16 = 3 << 14 | 3 << 11 | 14 << 7 | 3 << 3 | 2;

/// An arm64 Image that arms the virtual timer at its end and sleeps, again and again.
fn sleeper() -> Vec<u8> {
    let mut image = vec![0; 4096];
    let mut word = |at: usize, word: u32| image[at..at + 4].copy_from_slice(&word.to_le_bytes());
    word(0, 0x1400_0010); // b #64
    word(16, 4096); // image_size
    word(24, 2); // flags: 4 KiB pages
    word(56, 0x644d_5241); // "ARM\x64"
    word(64, 0x9280_0000); // mov x0, #-1
    word(68, 0xd280_0021); // mov x1, #1
    word(72, 0xd51b_e340); // msr cntv_cval_el0, x0
    word(76, 0xd51b_e321); // msr cntv_ctl_el0, x1
    word(80, 0xd503_207f); // wfi
    word(84, 0x9100_0442); // add x2, x2, #1
    word(88, 0x17ff_fffe); // b wfi
    image
}

fn config(dir: &std::path::Path) -> MachineConfig {
    let kernel = dir.join("Image");
    std::fs::write(&kernel, sleeper()).unwrap();
    MachineConfig {
        memory: map::RAM_MIN,
        deterministic: Some(Deterministic::default()),
        ..MachineConfig::new("sleeper", kernel)
    }
}

fn try_back(config: &MachineConfig, sections: &[Section]) -> Result<(), String> {
    let options = RestoreOptions::default();
    Machine::try_restore(config.clone(), sections.to_vec(), options, BTreeMap::new())
        .map_err(|error| error.to_string())
}

fn back(config: &MachineConfig, sections: &[Section], ram: &GuestRam) -> Machine {
    let sink = Box::new(io::sink());
    let options = RestoreOptions::default();
    Machine::restore(config.clone(), sections.to_vec(), options, ram.clone(), sink).unwrap()
}

fn section<'a>(sections: &'a mut [Section], kind: &str) -> &'a mut Section {
    sections.iter_mut().find(|section| section.kind == kind).unwrap()
}

fn state<S: Versioned>(sections: &mut [Section]) -> S {
    section(sections, S::KIND).decode().unwrap()
}

fn put<S: Versioned>(sections: &mut [Section], state: &S) {
    let section = section(sections, S::KIND);
    *section = Section::encode(section.instance.clone(), state).unwrap();
}

#[test]
fn a_guest_that_sleeps_to_the_end_of_the_counter_is_saved_and_restored() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let machine = Machine::boot(config.clone(), Box::new(io::sink())).unwrap();
    assert_eq!(machine.run_until(100_000).unwrap(), RunUntil::Idle);
    let sections = machine.save().unwrap();
    let ram = machine.ram().clone();
    drop(machine);
    let again = back(&config, &sections, &ram);
    assert_eq!(again.save().unwrap(), sections);
    assert_eq!(again.run_until(100_000).unwrap(), RunUntil::Idle);
}

#[test]
fn a_counter_at_any_value_is_taken_over_goes_on_and_is_saved() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let machine = Machine::boot(config.clone(), Box::new(io::sink())).unwrap();
    machine.run_until(3).unwrap();
    let good = machine.save().unwrap();
    let ram = machine.ram().clone();
    drop(machine);
    let values =
        [0, 1, (1 << 62) - 1, 1 << 62, (1 << 62) + 1, i64::MAX as u64, u64::MAX - 2, u64::MAX];
    for counter in values {
        for retired in values {
            for cval in values {
                let mut sections = good.clone();
                let mut time: TimeState = state(&mut sections);
                time.counter = counter;
                put(&mut sections, &time);
                let mut vcpu: VcpuState = state(&mut sections);
                vcpu.retired = retired;
                let timer =
                    |register: &u16| vcpu.sysregs.iter().any(|(found, _)| found == register);
                assert!([CNTV_CTL, CNTV_CVAL].iter().all(timer));
                for (register, value) in &mut vcpu.sysregs {
                    match *register {
                        CNTV_CTL => *value = 1,
                        CNTV_CVAL => *value = cval,
                        _ => {}
                    }
                }
                put(&mut sections, &vcpu);
                let what = format!("counter {counter:#x}, retired {retired:#x}, timer {cval:#x}");
                try_back(&config, &sections).unwrap_or_else(|error| panic!("{what}: {error}"));
                let machine = back(&config, &sections, &ram);
                assert_eq!(machine.time().counter, counter, "{what}");
                let ended = machine.run_until(retired.saturating_add(500));
                assert!(!matches!(ended, Ok(RunUntil::Ended(_)) | Err(_)), "{what}: {ended:?}");
                let saved = machine.save().unwrap();
                drop(machine);
                assert_eq!(back(&config, &saved, &ram).save().unwrap(), saved, "{what}");
            }
        }
    }
}

/// A change of one field: which section, which field, and to what.
type Change = (usize, usize, u128, bool);

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let value = prop_oneof![
        Just(0),
        Just(1),
        Just(u128::MAX),
        any::<u128>(),
        any::<u64>().prop_map(u128::from)
    ];
    prop::collection::vec((any::<usize>(), any::<usize>(), value, any::<bool>()), 1..24)
}

/// A machine whose guest drives every device, its state, and the fields of each section.
struct Driven {
    _dir: tempfile::TempDir,
    config: MachineConfig,
    sizes: BTreeMap<String, u64>,
    sections: Vec<Section>,
    fields: Vec<Vec<Field>>,
    ram: Vec<u8>,
}

fn driven() -> &'static Driven {
    static DRIVEN: std::sync::OnceLock<Driven> = std::sync::OnceLock::new();
    DRIVEN.get_or_init(|| {
        use squib_tests::hostile::{disk, machine};
        use vm_memory::{Bytes, GuestAddress};

        let dir = tempfile::tempdir().unwrap();
        // Read-only, so that machines of several tests may use it at once.
        let machine = machine(dir.path(), vec![disk(dir.path(), "vda", true, 1 << 20)]);
        let sections = machine.save().unwrap();
        let mut ram = vec![0; machine.ram().size() as usize];
        machine.ram().read_slice(&mut ram, GuestAddress(machine.ram().base())).unwrap();
        let fields = sections.iter().map(|section| {
            let fields = fields_of(section);
            fields.into_iter().filter(|field| field.role == Role::Number).collect()
        });
        Driven {
            config: machine.config().clone(),
            sizes: BTreeMap::from([("vda".to_owned(), 1 << 20)]),
            fields: fields.collect(),
            sections,
            ram,
            _dir: dir,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Changes that a machine takes, one after the other, make a legal state of all parts. The guest goes on
    /// from it, and what is saved then is restored, and saved as it was.
    #[test]
    fn any_legal_state_goes_on_and_is_saved_and_restored(changes in changes()) {
        use vm_memory::{Bytes, GuestAddress};

        let driven = driven();
        let mut sections = driven.sections.clone();
        let takes = |sections: &[Section]| {
            let (config, sizes) = (driven.config.clone(), driven.sizes.clone());
            let options = RestoreOptions::default();
            Machine::try_restore(config, sections.to_vec(), options, sizes).is_ok()
        };
        for (number, field, value, extreme) in changes {
            let number = number % sections.len();
            let fields = &driven.fields[number];
            let field = &fields[field % fields.len()];
            let payload = sections[number].payload.clone();
            let changed = &mut sections[number].payload;
            match extreme {
                true => {
                    let extremes = field.extremes(&payload);
                    *changed = extremes[value as usize % extremes.len()].1.clone();
                }
                false => changed[field.offset..field.offset + field.width]
                    .copy_from_slice(&value.to_le_bytes()[..field.width]),
            }
            if !takes(&sections) {
                sections[number].payload = payload;
            }
        }
        let ram = GuestRam::new(driven.config.memory).unwrap();
        ram.write_slice(&driven.ram, GuestAddress(ram.base())).unwrap();
        let machine = back(&driven.config, &sections, &ram);
        let fresh = machine.save().unwrap();
        prop_assert!(takes(&fresh));
        let now = machine.retired().unwrap()[0].unwrap();
        let ended = machine.run_until(now.saturating_add(8_000));
        if let Ok(RunUntil::Ended(Outcome::Crashed(crash))) = &ended {
            panic!("{crash}");
        }
        if let Ok(saved) = machine.save() {
            drop(machine);
            let again = back(&driven.config, &saved, &ram);
            prop_assert_eq!(again.save().unwrap(), saved);
        }
    }
}
