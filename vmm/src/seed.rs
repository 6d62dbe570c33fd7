//! Seeds for what the guest must not be able to guess, or, in a deterministic machine, must be able
//! to meet again.

/// Bytes from the host's entropy source, or a reproducible stream.
pub(crate) enum Seeds {
    /// The host's entropy.
    Host,
    /// SplitMix64 from this state.
    Stream(u64),
}

/// What a stream is for. Streams of one machine have nothing to do with each other.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lane {
    /// Seeds in the device tree.
    DeviceTree = 1,
    /// virtio-rng.
    VirtioRng = 2,
    /// The generation id.
    Generation = 3,
}

impl Seeds {
    /// The stream of a machine's `seed` for `lane`.
    pub(crate) fn stream(seed: u64, lane: Lane) -> Self {
        // Seeds next to each other would give overlapping streams if they were added to.
        let mut state = seed ^ (lane as u64).rotate_right(8);
        Self::Stream(splitmix64(&mut state))
    }

    /// Fills `out`.
    pub(crate) fn fill(&mut self, out: &mut [u8]) -> Result<(), getrandom::Error> {
        match self {
            Self::Host => getrandom::fill(out),
            Self::Stream(state) => {
                for chunk in out.chunks_mut(8) {
                    let word = splitmix64(state).to_le_bytes();
                    chunk.copy_from_slice(&word[..chunk.len()]);
                }
                Ok(())
            }
        }
    }

    /// One number.
    pub(crate) fn u64(&mut self) -> Result<u64, getrandom::Error> {
        let mut bytes = [0; 8];
        self.fill(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A generation id.
    pub(crate) fn id(&mut self) -> Result<[u8; 16], getrandom::Error> {
        let mut id = [0; 16];
        self.fill(&mut id)?;
        Ok(id)
    }
}

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_gives_the_published_sequence() {
        // First outputs of the reference implementation for seed 1234567.
        let mut seeds = Seeds::Stream(1_234_567);
        assert_eq!(seeds.u64().unwrap(), 6_457_827_717_110_365_317);
        assert_eq!(seeds.u64().unwrap(), 3_203_168_211_198_807_973);
    }
}
