//! The contract by which everything that a guest can observe is saved and brought back.
//!
//! How a device joins in:
//!
//! 1. At the foot of the device's file a `mod state` holds a plain `#[derive(Serialize, Deserialize)]`
//!    struct. It models the device as the guest sees it, never the runtime struct.
//! 2. That struct implements [`Versioned`]: a stable kind, a version, and a decoder for every version
//!    that was ever shipped (`V1 -> V2 -> ...`, one step at a time).
//! 3. The device implements [`Persist`]. `save` destructures the runtime struct exhaustively, so that a
//!    new field does not compile until someone has decided whether it is state. `restore` checks every
//!    field before it changes anything: after an error the device is as it was before the call.
//!
//! Enums that reach the disk are stored as integers with hand-assigned values.

use crate::codec;

/// A state type with a stable name and a version, able to decode everything that was ever shipped.
pub trait Versioned: Sized {
    /// Stable name of the state, as it stands in the manifest ("serial", "virtio-blk").
    const KIND: &'static str;
    /// The version that [`encode`](Self::encode) writes.
    const VERSION: u16;
    /// Longest payload of any version, in bytes. A longer one is refused before it is read.
    const LONGEST: u64 = 64 << 10;

    /// The payload bytes of the current version. Equal states give equal bytes.
    fn encode(&self) -> Result<Vec<u8>, PersistError>;

    /// Reads a payload of `version`, upgrading step by step. Bytes left over are an error.
    fn decode(version: u16, payload: &[u8]) -> Result<Self, PersistError>;
}

/// Implements [`Versioned`] for a state type that has had one version only.
///
/// A third argument is [`LONGEST`](Versioned::LONGEST), for a state that takes more than most.
///
/// A type with a second version writes the trait by hand: a `match` on the version with one arm for
/// every version ever shipped.
#[macro_export]
macro_rules! first_version {
    ($state:ty, $kind:literal $(, longest: $longest:expr)?) => {
        impl $crate::persist::Versioned for $state {
            const KIND: &'static str = $kind;
            const VERSION: u16 = 1;
            $(const LONGEST: u64 = $longest;)?

            fn encode(&self) -> Result<Vec<u8>, $crate::persist::PersistError> {
                $crate::codec::encode($kind, self)
            }

            fn decode(version: u16, payload: &[u8]) -> Result<Self, $crate::persist::PersistError> {
                match version {
                    1 => $crate::codec::decode($kind, version, payload),
                    found => Err($crate::persist::PersistError::UnknownVersion {
                        kind: $kind,
                        found,
                        newest: 1,
                    }),
                }
            }
        }
    };
}

/// Something with state that a snapshot must hold.
pub trait Persist {
    /// The saved form.
    type State: Versioned;

    /// The state as the guest sees it now. Called only while the machine is paused; two calls in a
    /// row give equal states.
    fn save(&self) -> Result<Self::State, PersistError>;

    /// Takes over `state`, which comes from disk and is hostile. On an error nothing has changed.
    fn restore(&mut self, state: Self::State) -> Result<(), PersistError>;
}

/// Why a state could not be saved or taken over.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// The payload was written by a newer build, or its version number is damaged.
    #[error("{kind}: version {found} cannot be read, the newest that this build knows is {newest}")]
    UnknownVersion {
        /// Kind of the state.
        kind: &'static str,
        /// Version in the snapshot.
        found: u16,
        /// Newest version that this build reads.
        newest: u16,
    },
    /// The payload does not decode.
    #[error("{kind} version {version}: the payload does not decode: {why}")]
    Decode {
        /// Kind of the state.
        kind: &'static str,
        /// Version in the snapshot.
        version: u16,
        /// What the codec met.
        why: String,
    },
    /// The payload decodes, but is longer than the state.
    #[error("{kind} version {version}: {left} bytes are left over behind the payload")]
    LeftOver {
        /// Kind of the state.
        kind: &'static str,
        /// Version in the snapshot.
        version: u16,
        /// Bytes behind the state.
        left: usize,
    },
    /// A field holds a value that the device can never have had.
    #[error("{kind}: field `{field}`: {why}")]
    Invalid {
        /// Kind of the state.
        kind: &'static str,
        /// Path of the field inside the state.
        field: &'static str,
        /// The value met and what is allowed.
        why: String,
    },
    /// The state cannot be saved right now.
    #[error("{kind}: cannot be saved: {why}")]
    Save {
        /// Kind of the state.
        kind: &'static str,
        /// What stands in the way.
        why: String,
    },
}

impl PersistError {
    /// A field that holds a value that the device can never have had.
    pub fn invalid(kind: &'static str, field: &'static str, why: impl Into<String>) -> Self {
        Self::Invalid { kind, field, why: why.into() }
    }
}

/// A saved state on its way to or from a snapshot: one section's payload with its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// [`Versioned::KIND`] of the state.
    pub kind: String,
    /// Which of several of that kind: "0", "1" for vCPUs, the device's id for devices.
    pub instance: String,
    /// Version of the payload.
    pub version: u16,
    /// The encoded state.
    pub payload: Vec<u8>,
}

impl Section {
    /// Encodes `state` as the section of `instance`.
    pub fn encode<S: Versioned>(
        instance: impl Into<String>,
        state: &S,
    ) -> Result<Self, PersistError> {
        Ok(Self {
            kind: S::KIND.to_owned(),
            instance: instance.into(),
            version: S::VERSION,
            payload: state.encode()?,
        })
    }

    /// Decodes the section as a state of type `S`; the caller has checked the kind.
    pub fn decode<S: Versioned>(&self) -> Result<S, PersistError> {
        S::decode(self.version, &self.payload)
    }
}

/// Saves any [`Persist`] as the section of `instance`.
pub fn save_section<P: Persist>(
    instance: impl Into<String>,
    from: &P,
) -> Result<Section, PersistError> {
    Section::encode(instance, &from.save()?)
}

/// Restores any [`Persist`] from its section.
pub fn restore_section<P: Persist>(into: &mut P, section: &Section) -> Result<(), PersistError> {
    into.restore(codec::checked_kind::<P::State>(section)?)
}
