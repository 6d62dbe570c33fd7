//! Seeds for what the guest must not be able to guess, or, in a deterministic machine, must be able
//! to meet again.

/// Bytes from the host's entropy source, or a reproducible stream.
pub(crate) enum Seeds {
    /// The host's entropy.
    Host,
    /// SplitMix64 from this state.
    Stream(u64),
}

impl Seeds {
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
