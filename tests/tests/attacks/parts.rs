//! Every section of every part.

use serde::Serialize;
use squib_devices::{
    gic::GicState,
    rtc::RtcState,
    serial::SerialState,
    virtio::{block::BlockState, rng::RngState},
    vmgenid::VmGenIdState,
};
use squib_formats::{
    contract::{Field, fields, length},
    persist::{Section, Versioned},
};
use squib_vmm::{hypervisor::VcpuState, machine::TimeState, psci::PsciState};

use crate::{Extent, target::Target};

/// The fields of a section's payload.
pub(crate) fn fields_of(section: &Section) -> Vec<Field> {
    fn of<S: Versioned + Serialize>(section: &Section) -> Vec<Field> {
        let state: S = section.decode().unwrap();
        assert_eq!(length(&state), section.payload.len(), "{}", S::KIND);
        fields(&state)
    }
    match &*section.kind {
        SerialState::KIND => of::<SerialState>(section),
        RtcState::KIND => of::<RtcState>(section),
        BlockState::KIND => of::<BlockState>(section),
        RngState::KIND => of::<RngState>(section),
        VmGenIdState::KIND => of::<VmGenIdState>(section),
        GicState::KIND => of::<GicState>(section),
        PsciState::KIND => of::<PsciState>(section),
        VcpuState::KIND => of::<VcpuState>(section),
        TimeState::KIND => of::<TimeState>(section),
        other => panic!("a section of the kind `{other}`: add it here"),
    }
}

#[test]
fn every_field_of_a_machine_with_devices_at_its_extremes_has_equal_answers() {
    let (accepted, refused) = sections(Target::devices(), Extent::Sample);
    assert!(accepted > 300 && refused > 200, "{accepted} accepted, {refused} refused");
}

#[test]
fn every_field_of_a_machine_of_two_vcpus_at_its_extremes_has_equal_answers() {
    let (accepted, refused) = sections(Target::smp(), Extent::Sample);
    assert!(accepted > 200 && refused > 100, "{accepted} accepted, {refused} refused");
}

#[test]
#[ignore = "takes minutes"]
fn every_field_of_every_part_at_its_extremes_has_equal_answers_without_samples() {
    for target in [Target::devices(), Target::smp()] {
        let (accepted, refused) = sections(target, Extent::All);
        println!("{accepted} accepted, {refused} refused");
    }
}

fn sections(mut target: Target, extent: Extent) -> (usize, usize) {
    for number in 0..target.manifest.sections.len() {
        let record = target.manifest.sections[number].clone();
        let payload = target.payload(&record).to_vec();
        let (kind, instance) = (record.kind, record.instance);
        let section = Section { kind, instance, version: record.version, payload };
        let attack = |target: &mut Target, what: &str, payload: &[u8]| {
            let what = format!("{} {}: {what}", section.kind, section.instance);
            let (manifest, state) = target.with_payload(number, payload);
            target.answers_with(&what, &manifest, &[("state", &state)])
        };
        for field in extent.of(fields_of(&section)) {
            for (value, payload) in field.extremes(&section.payload) {
                attack(&mut target, &format!("{} = {value:#x}", field.path), &payload);
            }
        }
        let end = section.payload.len();
        for end in [0, 1, end / 2, end - 1] {
            assert!(!attack(&mut target, "cut short", &section.payload[..end]));
        }
        assert!(!attack(&mut target, "a byte more", &[&section.payload[..], &[0]].concat()));
    }
    (target.accepted, target.refused)
}
