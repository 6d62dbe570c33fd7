//! What goes wrong with the framework, and what usually helps.

use applevisor::prelude::HypervisorError as Code;

/// A call into Hypervisor.framework, or what it answered, that a machine cannot go on with.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HvfError {
    /// The framework refused a call.
    #[error("Hypervisor.framework: {doing}: {code}{}", help(*.code, .doing))]
    Call {
        /// What was being done, and to which vCPU or address.
        doing: String,
        /// What it answered.
        code: Code,
    },
    /// A register cannot be read or set.
    #[error("Hypervisor.framework: vCPU {vcpu}: {doing} {register}: {code}")]
    Register {
        /// The vCPU.
        vcpu: u32,
        /// "reading" or "setting".
        doing: &'static str,
        /// The register's name.
        register: String,
        /// What the framework answered.
        code: Code,
    },
    /// The process cannot have a virtual machine, since its last one could not be destroyed.
    #[error(
        "Hypervisor.framework: the last virtual machine of this process is still there and cannot be destroyed: {code}; there is one virtual machine a process: run another squib for another machine"
    )]
    Left {
        /// What the framework answered now.
        code: Code,
    },
    /// The framework's interrupt controller does not fit the machine.
    #[error(
        "the framework's interrupt controller: {what} is {found:#x}, this machine needs {needed:#x}"
    )]
    Chip {
        /// What does not fit.
        what: &'static str,
        /// What the framework has.
        found: u64,
        /// What the machine has room for.
        needed: u64,
    },
    /// A register has another value than the one that was set.
    #[error(
        "Hypervisor.framework: vCPU {vcpu}: {register} was set to {wanted:#x} and is {found:#x}"
    )]
    NotTaken {
        /// The vCPU.
        vcpu: u32,
        /// The register's name.
        register: String,
        /// What was set.
        wanted: u64,
        /// What is there.
        found: u64,
    },
    /// The framework does not take the saved state of an interrupt controller.
    #[error(
        "Hypervisor.framework: setting the interrupt controller's state: {code}; {}",
        chip_help(.made_on, .here)
    )]
    ChipState {
        /// Build of the operating system that made it.
        made_on: String,
        /// Build of this host's.
        here: String,
        /// What the framework answered.
        code: Code,
    },
    /// More of something than this host's framework can give.
    #[error("{wanted} {what} are wanted, this host's framework has at most {most}")]
    Limit {
        /// What: "vCPUs", "bits of guest-physical address".
        what: &'static str,
        /// How many are needed.
        wanted: u64,
        /// How many there are.
        most: u64,
    },
    /// RAM does not lie on the framework's pages.
    #[error(
        "RAM at host address {host:#x} or its {size:#x} bytes are not whole pages of {page} bytes"
    )]
    Unaligned {
        /// Host address.
        host: u64,
        /// Size in bytes.
        size: u64,
        /// The framework's page in bytes.
        page: u64,
    },
    /// The guest accessed a device with an instruction that the CPU does not describe.
    #[error(
        "vCPU {vcpu}: the instruction at {pc:#x} accesses {address:#x}, where no RAM is, in a way that cannot be emulated (syndrome {syndrome:#x})"
    )]
    NotDescribed {
        /// The vCPU.
        vcpu: u32,
        /// Address of the instruction.
        pc: u64,
        /// Guest-physical address.
        address: u64,
        /// ESR_EL2.
        syndrome: u64,
    },
    /// The guest executes where no RAM is.
    #[error("vCPU {vcpu} executes at {pc:#x}, guest-physical {address:#x}, where no RAM is")]
    NoCode {
        /// The vCPU.
        vcpu: u32,
        /// Address of the instruction.
        pc: u64,
        /// Guest-physical address.
        address: u64,
    },
    /// An access to RAM faults again and again, though it is allowed.
    #[error(
        "vCPU {vcpu}: the instruction at {pc:#x} faults for ever at guest-physical {address:#x}, which it may access (syndrome {syndrome:#x})"
    )]
    Stuck {
        /// The vCPU.
        vcpu: u32,
        /// Address of the instruction.
        pc: u64,
        /// Guest-physical address.
        address: u64,
        /// ESR_EL2.
        syndrome: u64,
    },
    /// An exit that nothing here expects.
    #[error(
        "vCPU {vcpu}: exit {reason} at {pc:#x}, exception class {class:#x}, syndrome {syndrome:#x}"
    )]
    Unexpected {
        /// The vCPU.
        vcpu: u32,
        /// The exit's reason.
        reason: String,
        /// Address of the instruction.
        pc: u64,
        /// ESR_EL2.EC.
        class: u64,
        /// ESR_EL2.
        syndrome: u64,
    },
    /// The host does not say how fast its counter is.
    #[error("the host does not tell the frequency of its counter")]
    NoFrequency,
}

/// Says what was being done when the framework refused.
pub(super) trait Doing<T> {
    /// `doing` is only asked for when something is wrong.
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T, HvfError>;
}

impl<T> Doing<T> for Result<T, Code> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T, HvfError> {
        self.map_err(|code| HvfError::Call { doing: doing(), code })
    }
}

/// What being done makes "busy" mean.
pub(super) const CREATING_VM: &str = "creating the virtual machine and its interrupt controller";

fn help(code: Code, doing: &str) -> &'static str {
    match code {
        Code::Denied => {
            "; the program needs the entitlement com.apple.security.hypervisor, which an ad-hoc signature gives: codesign --force --sign - --entitlements cli/squib.entitlements PROGRAM (or cli/sign PROGRAM)"
        }
        Code::Busy if doing == CREATING_VM => {
            "; there is one virtual machine a process: run another squib for another machine"
        }
        Code::Unsupported => {
            "; the host is too old or is itself a virtual machine: macOS 15 on Apple silicon is needed"
        }
        Code::NoResources => "; another program may use up the host's virtual machines or memory",
        _ => "",
    }
}

/// The state is the framework's own, and only its build knows which it takes.
fn chip_help(made_on: &str, here: &str) -> String {
    match made_on == here {
        true => format!(
            "it was made on this build, {here}: the snapshot is damaged or of another machine"
        ),
        false => format!(
            "it was made on build {} and this host has {here}: restore it on a host of that build, or boot the guest anew",
            // It comes from the snapshot.
            made_on.escape_debug()
        ),
    }
}
