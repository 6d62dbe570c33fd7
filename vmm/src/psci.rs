//! Power State Coordination Interface 1.1 (Arm DEN 0022) and the one call of the SMC Calling
//! Convention (Arm DEN 0028) that finds it, over HVC.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};
use squib_devices::{gic::affinity, map::Range};
use squib_formats::persist::{Persist, PersistError};

pub use state::{PowerState, PsciState};

/// SMCCC_VERSION.
const SMCCC_VERSION: u32 = 0x8000_0000;
const PSCI_VERSION: u32 = 0x8400_0000;
const CPU_SUSPEND: u32 = 0x8400_0001;
const CPU_OFF: u32 = 0x8400_0002;
const CPU_ON: u32 = 0x8400_0003;
const AFFINITY_INFO: u32 = 0x8400_0004;
const MIGRATE_INFO_TYPE: u32 = 0x8400_0006;
const SYSTEM_OFF: u32 = 0x8400_0008;
const SYSTEM_RESET: u32 = 0x8400_0009;
const PSCI_FEATURES: u32 = 0x8400_000a;
const SYSTEM_RESET2: u32 = 0x8400_0012;
/// The only reset type of SYSTEM_RESET2 that the architecture defines (section 5.17).
const SYSTEM_WARM_RESET: u64 = 0;
/// Set in a function identifier: 64-bit arguments.
const SMC64: u32 = 1 << 30;

/// Version 1.1, major number in the high half.
const VERSION_1_1: u64 = 0x1_0001;
/// "Trusted OS is either not present or does not require migration".
const NO_MIGRATION: u64 = 2;
const SUCCESS: u64 = 0;
const NOT_SUPPORTED: u64 = -1i64 as u64;
const INVALID_PARAMETERS: u64 = -2i64 as u64;
const ALREADY_ON: u64 = -4i64 as u64;
const ON_PENDING: u64 = -5i64 as u64;
const INVALID_ADDRESS: u64 = -9i64 as u64;
/// Bits of MPIDR_EL1 that name a CPU: Aff3 and Aff2 to Aff0.
const AFFINITY_MASK: u64 = 0xff_00ff_ffff;

/// Power of one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// It runs.
    On,
    /// It waits for CPU_ON.
    Off,
    /// CPU_ON was called for it, and it has not begun yet.
    OnPending {
        /// First instruction.
        entry: u64,
        /// x0.
        context: u64,
    },
}

/// What the caller's thread does about a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Goes on with this in x0.
    Return(u64),
    /// Goes on with zero in x0 after the next interrupt.
    Standby,
    /// Waits for CPU_ON.
    Off,
    /// The machine is switched off.
    SystemOff,
    /// The machine is reset.
    SystemReset,
    /// The machine is reset, and asked for a warm one.
    WarmReset,
}

/// Power of all vCPUs.
#[derive(Debug)]
pub struct Psci {
    /// Where code may lie.
    ram: Range,
    power: Mutex<Vec<Power>>,
    changed: Condvar,
}

impl Psci {
    /// vCPU 0 on, the others off. `ram` is where CPU_ON may enter.
    pub fn new(vcpus: u32, ram: Range) -> Self {
        let power = (0..vcpus).map(|n| if n == 0 { Power::On } else { Power::Off }).collect();
        Self { ram, power: Mutex::new(power), changed: Condvar::new() }
    }

    /// Carries out a hypercall of `vcpu` with `args` from x0 on.
    pub fn call(&self, vcpu: u32, imm: u16, args: [u64; 4]) -> Action {
        // DEN 0028 section 2.5: the immediate is zero.
        if imm != 0 {
            return Action::Return(NOT_SUPPORTED);
        }
        let function = args[0] as u32;
        let wide = function & SMC64 != 0;
        if !is_known(function) {
            tracing::debug!(vcpu, "hypercall {function:#x} is not supported");
            return Action::Return(NOT_SUPPORTED);
        }
        let arg = |n: usize| if wide { args[n] } else { args[n] & 0xffff_ffff };
        Action::Return(match function & !SMC64 {
            SMCCC_VERSION | PSCI_VERSION => VERSION_1_1,
            PSCI_FEATURES if is_known(arg(1) as u32) => SUCCESS,
            PSCI_FEATURES => NOT_SUPPORTED,
            MIGRATE_INFO_TYPE => NO_MIGRATION,
            CPU_ON => self.cpu_on(arg(1), arg(2), arg(3)),
            AFFINITY_INFO => self.affinity_info(arg(1), arg(2)),
            // Powering down is allowed to be carried out as a standby (section 5.4.2).
            CPU_SUSPEND => return Action::Standby,
            CPU_OFF => {
                self.power.lock()[vcpu as usize] = Power::Off;
                return Action::Off;
            }
            SYSTEM_OFF => return Action::SystemOff,
            SYSTEM_RESET => return Action::SystemReset,
            SYSTEM_RESET2 if arg(1) & 0xffff_ffff == SYSTEM_WARM_RESET => {
                return Action::WarmReset;
            }
            SYSTEM_RESET2 => INVALID_PARAMETERS,
            _ => NOT_SUPPORTED,
        })
    }

    /// Where `vcpu` begins, once someone has switched it on; none if it runs already. Waits while it
    /// is off and `stop` is not set; with `stop` set it may give up with `Err`.
    pub fn wait_until_on(
        &self,
        vcpu: u32,
        stop: &AtomicBool,
    ) -> Result<Option<(u64, u64)>, Stopped> {
        let mut power = self.power.lock();
        loop {
            match power[vcpu as usize] {
                Power::On => return Ok(None),
                Power::OnPending { entry, context } => {
                    power[vcpu as usize] = Power::On;
                    return Ok(Some((entry, context)));
                }
                Power::Off if stop.load(Ordering::Acquire) => return Err(Stopped),
                Power::Off => self.changed.wait(&mut power),
            }
        }
    }

    /// Whether `vcpu` is off, and nobody has switched it on since.
    pub fn is_off(&self, vcpu: u32) -> bool {
        matches!(self.power.lock()[vcpu as usize], Power::Off)
    }

    /// Makes waiting vCPUs look at `stop` again.
    pub fn interrupt(&self) {
        // Taking the lock orders the change of `stop` against a thread that is about to wait.
        drop(self.power.lock());
        self.changed.notify_all();
    }

    fn cpu_on(&self, target: u64, entry: u64, context: u64) -> u64 {
        let mut power = self.power.lock();
        let Some(target) = find(target, power.len()) else { return INVALID_PARAMETERS };
        let inside = (self.ram.base..self.ram.end()).contains(&entry);
        if !inside || !entry.is_multiple_of(4) {
            return INVALID_ADDRESS;
        }
        match power[target] {
            Power::On => ALREADY_ON,
            Power::OnPending { .. } => ON_PENDING,
            Power::Off => {
                power[target] = Power::OnPending { entry, context };
                drop(power);
                self.changed.notify_all();
                SUCCESS
            }
        }
    }

    fn affinity_info(&self, target: u64, lowest_level: u64) -> u64 {
        let power = self.power.lock();
        match find(target, power.len()) {
            Some(target) if lowest_level == 0 => match power[target] {
                Power::On => 0,
                Power::Off => 1,
                Power::OnPending { .. } => 2,
            },
            // Affinity levels above 0 are optional since 1.0 (section 5.7.2).
            _ => INVALID_PARAMETERS,
        }
    }
}

/// The wait was given up because of `stop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

fn find(target: u64, vcpus: usize) -> Option<usize> {
    (0..vcpus)
        .find(|n| affinity(*n as u32) == target & AFFINITY_MASK && target & !AFFINITY_MASK == 0)
}

fn is_known(function: u32) -> bool {
    let has_wide_form =
        matches!(function & !SMC64, CPU_SUSPEND | CPU_ON | AFFINITY_INFO | SYSTEM_RESET2);
    let known = [
        SMCCC_VERSION,
        PSCI_VERSION,
        CPU_OFF,
        MIGRATE_INFO_TYPE,
        SYSTEM_OFF,
        SYSTEM_RESET,
        PSCI_FEATURES,
    ];
    has_wide_form || known.contains(&function)
}

/// The saved form.
mod state {
    use serde::{Deserialize, Serialize};
    use squib_formats::first_version;

    /// Power of all vCPUs, by index.
    #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub struct PsciState {
        /// One for each vCPU.
        pub vcpus: Vec<PowerState>,
    }

    /// Power of one vCPU.
    #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub struct PowerState {
        /// 0 on, 1 off, 2 on pending: the values of AFFINITY_INFO.
        pub power: u8,
        /// First instruction if on pending, else zero.
        pub entry: u64,
        /// x0 if on pending, else zero.
        pub context: u64,
    }

    first_version!(PsciState, "psci");
}

impl Persist for Psci {
    type State = PsciState;

    fn save(&self) -> Result<PsciState, PersistError> {
        // `ram` is configuration, `changed` is glue.
        let Self { ram: _, power, changed: _ } = self;
        let saved = |power: &Power| match *power {
            Power::On => PowerState { power: 0, entry: 0, context: 0 },
            Power::Off => PowerState { power: 1, entry: 0, context: 0 },
            Power::OnPending { entry, context } => PowerState { power: 2, entry, context },
        };
        Ok(PsciState { vcpus: power.lock().iter().map(saved).collect() })
    }

    fn restore(&mut self, state: PsciState) -> Result<(), PersistError> {
        self.restore_shared(state)
    }
}

impl Psci {
    /// [`Persist::restore`] while others hold references. No vCPU runs.
    pub(crate) fn restore_shared(&self, state: PsciState) -> Result<(), PersistError> {
        let invalid = |field, why| PersistError::invalid("psci", field, why);
        let PsciState { vcpus } = state;
        let mut power = self.power.lock();
        if vcpus.len() != power.len() {
            let why = format!("{} vCPUs, this machine has {}", vcpus.len(), power.len());
            return Err(invalid("vcpus", why));
        }
        let load = |PowerState { power, entry, context }| match (power, entry, context) {
            (0, 0, 0) => Ok(Power::On),
            (1, 0, 0) => Ok(Power::Off),
            (2, entry, context)
                if (self.ram.base..self.ram.end()).contains(&entry) && entry.is_multiple_of(4) =>
            {
                Ok(Power::OnPending { entry, context })
            }
            (power @ 0..=2, ..) => {
                let why = format!("{entry:#x} (context {context:#x}) with power {power}");
                Err(invalid("vcpus.entry", why))
            }
            (power, ..) => Err(invalid("vcpus.power", format!("{power} is not 0, 1 or 2"))),
        };
        *power = vcpus.into_iter().map(load).collect::<Result<_, _>>()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RAM: Range = Range { base: 0x8000_0000, size: 0x400_0000 };
    const ENTRY: u64 = 0x8020_0000;

    fn psci() -> Psci {
        Psci::new(3, RAM)
    }

    fn call(psci: &Psci, function: u32, args: [u64; 3]) -> Action {
        psci.call(0, 0, [function.into(), args[0], args[1], args[2]])
    }

    fn code(value: i64) -> Action {
        Action::Return(value as u64)
    }

    #[test]
    fn a_vcpu_is_switched_on_once() {
        let psci = psci();
        let (on, info) = (CPU_ON | SMC64, AFFINITY_INFO | SMC64);
        assert_eq!(call(&psci, info, [1, 0, 0]), code(1));
        assert_eq!(call(&psci, on, [1, ENTRY, 77]), code(0));
        assert_eq!(call(&psci, on, [1, ENTRY, 77]), code(-5));
        assert_eq!(call(&psci, info, [1, 0, 0]), code(2));
        assert_eq!(psci.wait_until_on(1, &AtomicBool::new(true)), Ok(Some((ENTRY, 77))));
        assert_eq!(call(&psci, on, [1, ENTRY, 77]), code(-4));
        assert_eq!(call(&psci, info, [1, 0, 0]), code(0));
        assert_eq!(psci.call(1, 0, [CPU_OFF.into(), 0, 0, 0]), Action::Off);
        assert_eq!(call(&psci, info, [1, 0, 0]), code(1));
    }

    #[test]
    fn nonsense_is_refused() {
        let psci = psci();
        let on = CPU_ON | SMC64;
        assert_eq!(call(&psci, on, [3, ENTRY, 0]), code(-2));
        assert_eq!(call(&psci, on, [1 << 31 | 1, ENTRY, 0]), code(-2));
        assert_eq!(call(&psci, on, [1, 0x4000_0000, 0]), code(-9));
        assert_eq!(call(&psci, on, [1, ENTRY + 2, 0]), code(-9));
        assert_eq!(call(&psci, AFFINITY_INFO, [0, 1, 0]), code(-2));
        assert_eq!(psci.call(0, 1, [PSCI_VERSION.into(), 0, 0, 0]), code(-1));
        assert_eq!(call(&psci, PSCI_VERSION | SMC64, [0; 3]), code(-1));
        // SYSTEM_RESET2 with a reset type of a vendor's, and one that is reserved.
        for kind in [1 << 31, 1] {
            assert_eq!(call(&psci, SYSTEM_RESET2 | SMC64, [kind, 0, 0]), code(-2));
        }
    }

    #[test]
    fn thirty_two_bit_calls_ignore_the_high_halves() {
        let psci = psci();
        let high = 0xdead_0000_0000;
        assert_eq!(call(&psci, CPU_ON, [high | 1, high | ENTRY, high | 5]), code(0));
        assert_eq!(psci.wait_until_on(1, &AtomicBool::new(false)), Ok(Some((ENTRY, 5))));
    }

    #[test]
    fn features_tell_what_is_there() {
        let psci = psci();
        assert_eq!(call(&psci, PSCI_VERSION, [0; 3]), code(0x1_0001));
        for function in [SMCCC_VERSION, CPU_ON | SMC64, SYSTEM_RESET, CPU_SUSPEND] {
            assert_eq!(call(&psci, PSCI_FEATURES, [function.into(), 0, 0]), code(0));
        }
        for function in [SYSTEM_RESET2, SYSTEM_RESET2 | SMC64] {
            assert_eq!(call(&psci, PSCI_FEATURES, [function.into(), 0, 0]), code(0));
            assert_eq!(call(&psci, function, [0; 3]), Action::WarmReset);
        }
        // SYSTEM_SUSPEND.
        assert_eq!(call(&psci, PSCI_FEATURES, [0xc400_000e, 0, 0]), code(-1));
        assert_eq!(call(&psci, SYSTEM_OFF, [0; 3]), Action::SystemOff);
        assert_eq!(call(&psci, SYSTEM_RESET, [0; 3]), Action::SystemReset);
        assert_eq!(call(&psci, CPU_SUSPEND | SMC64, [0; 3]), Action::Standby);
    }

    #[test]
    fn a_vcpu_that_is_off_gives_up_waiting_when_asked_to() {
        let psci = psci();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| psci.wait_until_on(2, &stop));
            stop.store(true, Ordering::Release);
            psci.interrupt();
            assert_eq!(waiting.join().unwrap(), Err(Stopped));
        });
    }

    squib_formats::persist_contract! {
        mod contract,
        device: Psci,
        fresh: psci,
        change: |psci| {
            call(psci, CPU_ON, [1, ENTRY, 9]);
            psci.call(0, 0, [CPU_OFF.into(), 0, 0, 0]);
        },
    }

    proptest! {
        #[test]
        fn hostile_states_are_taken_whole_or_not_at_all(
            found in prop::collection::vec((0u8..5, 0x7fff_fff0u64..0x8000_0010, 0u64..2), 0..5),
        ) {
            let mut psci = psci();
            let before = psci.save().unwrap();
            let vcpus = found
                .into_iter()
                .map(|(power, entry, context)| PowerState { power, entry, context })
                .collect();
            let state = PsciState { vcpus };
            let after = match psci.restore(state.clone()) {
                Ok(()) => state,
                Err(_) => before,
            };
            prop_assert_eq!(psci.save().unwrap(), after);
        }
    }
}
