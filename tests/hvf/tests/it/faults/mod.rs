//! What happens when the framework fails.

mod ends;
mod every_call;
mod life;

use squib_hvf_stand_in::{Session, hv_error_t};
use squib_vmm::{
    hypervisor::{HypervisorError, hvf::HvfError},
    machine::{MachineError, Outcome},
};
use std::{
    collections::BTreeMap,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
};

/// Every code but success.
const CODES: [hv_error_t; 9] = [
    hv_error_t::HV_ERROR,
    hv_error_t::HV_BUSY,
    hv_error_t::HV_BAD_ARGUMENT,
    hv_error_t::HV_ILLEGAL_GUEST_STATE,
    hv_error_t::HV_NO_RESOURCES,
    hv_error_t::HV_NO_DEVICE,
    hv_error_t::HV_DENIED,
    hv_error_t::HV_FAULT,
    hv_error_t::HV_UNSUPPORTED,
];

/// Calls whose failure is no error of what is being done: there is another way, or the machine is going away.
/// See `ends`.
const BORNE: [&str; 4] = ["hv_vcpus_exit", "hv_vcpu_destroy", "hv_vm_destroy", "hv_vm_unmap"];

/// The calls that `work` makes, with how often, but for those that are borne.
fn calls<T>(session: &Session, work: impl FnOnce() -> T) -> (BTreeMap<&'static str, u32>, T) {
    let before = session.calls();
    let done = work();
    let mut calls = session.calls();
    calls.iter_mut().for_each(|(call, times)| *times -= before.get(call).unwrap_or(&0));
    calls.retain(|call, times| *times > 0 && !BORNE.contains(call));
    (calls, done)
}

/// A place among `times`, another one for each of `what`.
fn somewhere(times: u32, what: impl Hash) -> u32 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    (hasher.finish() % u64::from(times)) as u32
}

/// What an error of `call` must say.
fn says(call: &str) -> &'static [&'static str] {
    match call {
        "hv_vm_create" | "hv_gic_create" => &["creating the virtual machine"],
        "hv_vcpu_create" => &["creating vCPU 0"],
        "hv_vm_get_max_vcpu_count" => &["asking for the most vCPUs"],
        "hv_vm_config_get_default_ipa_size" => &["the width of guest-physical addresses"],
        "hv_vcpu_config_get_feature_reg" => &["reading "],
        "hv_gic_state_create" | "hv_gic_state_get_size" | "hv_gic_state_get_data" => {
            &["saving the interrupt controller's state"]
        }
        "hv_gic_set_state" => {
            &["setting the interrupt controller's state", "it was made on this build"]
        }
        "hv_gic_set_spi" => &["driving interrupt "],
        "hv_gic_get_redistributor_base" => &["the redistributor of vCPU 0"],
        "hv_vcpu_get_reg"
        | "hv_vcpu_get_sys_reg"
        | "hv_vcpu_get_simd_fp_reg"
        | "hv_gic_get_icc_reg" => &["vCPU 0", "reading "],
        "hv_vcpu_set_reg"
        | "hv_vcpu_set_sys_reg"
        | "hv_vcpu_set_simd_fp_reg"
        | "hv_gic_set_icc_reg" => &["vCPU 0", "setting "],
        "hv_vcpu_set_vtimer_offset" => &["setting the counter's offset of vCPU 0"],
        "hv_vcpu_set_trap_debug_exceptions" | "hv_vcpu_set_trap_debug_reg_accesses" => {
            &["leaving debugging to the guest of vCPU 0"]
        }
        "hv_vcpu_set_vtimer_mask" => &["unmasking the timer of vCPU 0"],
        "hv_vcpu_run" => &["running vCPU 0"],
        "hv_vm_map" => &["mapping ", " bytes of RAM at 0x8"],
        "hv_vm_protect" => &["protecting ", " bytes of RAM at 0x8"],
        _ if call.starts_with("hv_gic_config_set") => &["placing the interrupt controller"],
        _ if call.starts_with("hv_gic_get") => &["the interrupt controller's geometry"],
        _ => panic!("nobody has said what an error of {call} says"),
    }
}

/// What reaches the caller of `code`.
fn answered(call: &str, code: hv_error_t) -> hv_error_t {
    // It answers with an object or none.
    if call == "hv_gic_state_create" { hv_error_t::HV_ERROR } else { code }
}

/// The framework's own words for `code`.
fn words(call: &str, code: hv_error_t) -> String {
    let code = (answered(call, code) as i32).into();
    let error = HvfError::Call { doing: String::new(), code }.to_string();
    // What usually helps depends on what was being done.
    let error = error.trim_start_matches("Hypervisor.framework: : ");
    error.split(';').next().unwrap_or_default().to_owned()
}

/// Whether `text` is that of the framework's error `code` at `call`.
fn assert_says(text: &str, call: &str, code: hv_error_t) {
    assert!(text.contains("Hypervisor.framework: "), "{call}: {text}");
    assert!(text.contains(&words(call, code)), "{call} {code:?}: {text}");
    for part in says(call) {
        assert!(text.contains(part), "{call}: no `{part}` in: {text}");
    }
}

/// Whether `error` is the framework's, by its type and by what it says.
fn assert_framework(error: &MachineError, call: &str, code: hv_error_t) {
    match error {
        MachineError::Hypervisor(HypervisorError::Hvf(
            HvfError::Call { code: found, .. }
            | HvfError::Register { code: found, .. }
            | HvfError::ChipState { code: found, .. },
        )) => assert_eq!(*found, (answered(call, code) as i32).into(), "{call}: {error}"),
        other => panic!("{call}: {other:?}"),
    }
    assert_says(&error.to_string(), call, code);
}

/// Whether the machine has ended with the framework's error.
fn assert_crashed(outcome: Option<Outcome>, call: &str, code: hv_error_t) {
    let Some(Outcome::Crashed(crash)) = outcome else { panic!("{call} {code:?}: {outcome:?}") };
    assert_says(&crash.why, call, code);
}

/// All files below `folder` with what is in them.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => {
                found.extend(files(&path));
                found.insert(path, Vec::new());
            }
            false => drop(found.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    found
}
