//! The entropy device (5.4). Requests complete inside the doorbell: they wait for nothing.

use std::time::Instant;

use squib_formats::persist::PersistError;

pub use state::{RngState, SeededState};

use super::{
    DriverLink, VirtioDevice,
    queue::{Chain, QueueFault, VirtQueue},
    state::TransportState,
};
use crate::device::PauseError;

/// Entries of the queue.
pub const QUEUE_SIZE: u16 = 64;
/// Most bytes that one request gets; a driver with a larger buffer is told how many there are.
pub const MAX_REQUEST: u64 = 64 << 10;

/// Times that the queue is looked at again within one doorbell because the driver went on meanwhile.
const MAX_ROUNDS: u32 = 64;

/// Where random bytes come from.
pub enum Entropy {
    /// The operating system. Nothing is saved: a restored guest gets fresh bytes.
    Os,
    /// A stream that depends on a seed only, for a deterministic machine. Its place in the stream is saved.
    Seeded(Seeded),
}

/// Random bytes from a seed: the request's number, hashed with the seed as the key by blake3, whose
/// output is as long as needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seeded {
    seed: [u8; 32],
    requests: u64,
}

/// The operating system gives no entropy.
#[derive(Debug, thiserror::Error)]
#[error("the operating system gives no entropy: {0}")]
struct NoEntropy(getrandom::Error);

impl Entropy {
    /// The stream of `seed`, from its start.
    pub fn seeded(seed: [u8; 32]) -> Self {
        Self::Seeded(Seeded { seed, requests: 0 })
    }

    /// Calls `each` with `len` random bytes, piece by piece.
    fn stream<E: From<NoEntropy>>(
        &mut self,
        len: u64,
        mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut piece = [0; 4096];
        let mut reader = match self {
            Self::Os => None,
            Self::Seeded(Seeded { seed, requests }) => {
                let request = requests.to_le_bytes();
                *requests = requests.wrapping_add(1);
                Some(blake3::Hasher::new_keyed(seed).update(&request).finalize_xof())
            }
        };
        let mut done = 0;
        while done < len {
            let part = &mut piece[..(len - done).min(4096) as usize];
            match &mut reader {
                None => getrandom::fill(part).map_err(NoEntropy)?,
                Some(reader) => reader.fill(part),
            }
            each(done, part)?;
            done += part.len() as u64;
        }
        Ok(())
    }
}

/// An entropy device.
pub struct Rng {
    entropy: Entropy,
    /// Set by DRIVER_OK.
    link: Option<DriverLink>,
    /// Set by QueueReady.
    queue: Option<VirtQueue>,
    /// Kept between requests for its memory only.
    chain: Chain,
}

/// Why the device cannot go on.
#[derive(Debug, thiserror::Error)]
enum RngFault {
    #[error(transparent)]
    Queue(#[from] QueueFault),
    #[error(transparent)]
    NoEntropy(#[from] NoEntropy),
}

impl Rng {
    /// A device that hands out `entropy`.
    pub fn new(entropy: Entropy) -> Self {
        Self { entropy, link: None, queue: None, chain: Chain::default() }
    }

    fn run(&mut self) {
        let fault = self.drain();
        if let Some(queue) = &mut self.queue {
            queue.notified = false;
        }
        if let (Err(fault), Some(link)) = (fault, &self.link) {
            tracing::warn!(device = "rng", "{fault}");
            link.signals.fail(true);
        }
    }

    fn drain(&mut self) -> Result<(), RngFault> {
        let Self { entropy, link, queue, chain } = self;
        let (Some(link), Some(queue)) = (link, queue) else { return Ok(()) };
        let DriverLink { features: _, ram, signals } = link;
        if signals.failed() {
            return Ok(());
        }
        for _ in 0..MAX_ROUNDS {
            for _ in 0..queue.size() {
                if !queue.pop(ram, chain)? {
                    break;
                }
                let len = chain.writable.len().min(MAX_REQUEST);
                entropy.stream(len, |at, bytes| {
                    let written = chain.writable.write(ram, at, bytes);
                    written.map_err(|error| RngFault::Queue(error.into()))
                })?;
                // MAX_REQUEST at most.
                if queue.complete(ram, chain.head, len as u32)? {
                    signals.used();
                }
            }
            if !queue.rearm(ram).map_err(RngFault::Queue)? {
                return Ok(());
            }
        }
        Ok(())
    }
}

impl VirtioDevice for Rng {
    const DEVICE_TYPE: u32 = 4;
    const QUEUE_MAX_SIZES: &'static [u16] = &[QUEUE_SIZE];
    type State = RngState;
    type Checked = Option<Seeded>;

    fn id(&self) -> &str {
        "rng"
    }

    fn offered_features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, link: DriverLink) {
        self.link = Some(link);
    }

    fn set_queue(&mut self, _index: usize, queue: Option<VirtQueue>) {
        self.queue = queue;
    }

    fn inspect_queue<R>(&self, _index: usize, look: impl FnOnce(&VirtQueue) -> R) -> Option<R> {
        self.queue.as_ref().map(look)
    }

    fn notify(&mut self, _index: usize) {
        self.run();
    }

    fn reset(&mut self) {
        // The stream goes on: a driver that resets must not get the same bytes again.
        self.link = None;
        self.queue = None;
    }

    fn pause(&mut self, _deadline: Instant) -> Result<(), PauseError> {
        Ok(())
    }

    /// Only a doorbell that a saved state says was rung is answered: the guest has not rung for
    /// anything else yet, and answering early would be seen.
    fn resume(&mut self) {
        if self.queue.as_ref().is_some_and(|queue| queue.notified) {
            self.run();
        }
    }

    fn save(&self, transport: TransportState) -> Result<RngState, PersistError> {
        let Self { entropy, link: _, queue: _, chain: _ } = self;
        let seeded = match entropy {
            Entropy::Os => None,
            Entropy::Seeded(Seeded { seed, requests }) => {
                Some(SeededState { seed: *seed, requests: *requests })
            }
        };
        Ok(RngState { transport, seeded })
    }

    fn check(&self, state: RngState) -> Result<(TransportState, Option<Seeded>), PersistError> {
        let RngState { transport, seeded } = state;
        let seeded = seeded.map(|SeededState { seed, requests }| Seeded { seed, requests });
        Ok((transport, seeded))
    }

    /// The machine decides where entropy comes from: one that takes it from the operating system
    /// does so whatever the saved one did, and a seeded one goes on where the saved one stood.
    fn apply(&mut self, checked: Option<Seeded>) {
        if let (Entropy::Seeded(here), Some(saved)) = (&mut self.entropy, checked) {
            *here = saved;
        }
    }
}

mod state {
    use serde::{Deserialize, Serialize};
    use squib_formats::first_version;

    use crate::virtio::state::TransportState;

    /// An entropy device and its transport.
    #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub struct RngState {
        /// The registers.
        pub transport: TransportState,
        /// Seed and place in its stream, on a deterministic machine.
        pub seeded: Option<SeededState>,
    }

    /// A place in a seeded stream.
    #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub struct SeededState {
        /// The seed.
        pub seed: [u8; 32],
        /// Requests answered so far.
        pub requests: u64,
    }

    first_version!(RngState, "virtio-rng");
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use squib_formats::persist::{restore_section, save_section};

    use super::*;
    use crate::{
        device::{MmioDevice, Pause},
        memory::GuestRam,
        virtio::{
            mmio::VirtioMmio,
            test_driver::{BUFFERS, Driver, RAM_SIZE, WRITE, line},
        },
    };

    fn seeded() -> Rng {
        Rng::new(Entropy::seeded([7; 32]))
    }

    fn draw(driver: &mut Driver<Rng>, len: u32) -> Vec<u8> {
        let head = driver.chain(&[(BUFFERS, len, WRITE)]);
        let written = driver.submit(head);
        driver.get_vec(BUFFERS, written as usize)
    }

    squib_formats::persist_contract! {
        mod rng_contract,
        device: VirtioMmio<Rng>,
        fresh: || VirtioMmio::new(seeded(), GuestRam::new(RAM_SIZE).unwrap(), line()),
        change: |device| {
            let fresh = VirtioMmio::new(seeded(), GuestRam::new(RAM_SIZE).unwrap(), line());
            let mut driver = Driver::adopt(std::mem::replace(device, fresh));
            driver.start(u64::MAX);
            draw(&mut driver, 100);
            *device = driver.dev;
        },
    }

    #[test]
    fn every_request_gets_other_bytes_from_both_sources() {
        for entropy in [Entropy::Os, Entropy::seeded([1; 32])] {
            let mut driver = Driver::started(Rng::new(entropy), u64::MAX);
            let draws: HashSet<_> = (0..50).map(|_| draw(&mut driver, 32)).collect();
            assert_eq!(draws.len(), 50);
        }
    }

    #[test]
    fn equal_seeds_give_equal_bytes_and_other_seeds_others() {
        let first = |seed| {
            let mut driver = Driver::started(Rng::new(Entropy::seeded([seed; 32])), u64::MAX);
            (draw(&mut driver, 5000), draw(&mut driver, 3))
        };
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
    }

    #[test]
    fn a_request_gets_no_more_than_the_limit_and_is_told_so() {
        let mut driver = Driver::started(seeded(), u64::MAX);
        let head = driver.chain(&[(BUFFERS, 0x1_8001, WRITE)]);
        assert_eq!(u64::from(driver.submit(head)), MAX_REQUEST);
        assert_eq!(driver.get::<8>(BUFFERS + MAX_REQUEST), [0; 8]);
        assert_ne!(driver.get::<8>(BUFFERS + MAX_REQUEST - 8), [0; 8]);
    }

    #[test]
    fn a_buffer_outside_ram_asks_for_a_reset() {
        let mut driver = Driver::started(seeded(), u64::MAX);
        let head = driver.chain(&[(0x1000, 64, WRITE)]);
        driver.offer(head);
        driver.ring();
        assert_eq!(driver.r(0x70), 0x4f);
        assert_eq!(driver.used_idx(), 0);
    }

    #[test]
    fn a_restored_seeded_device_goes_on_in_its_stream() {
        let mut whole = Driver::started(seeded(), u64::MAX);
        draw(&mut whole, 10);
        let section = save_section("rng", &whole.dev).unwrap();
        let mut restored = whole.moved_to(Rng::new(Entropy::seeded([0; 32])));
        restore_section(&mut restored.dev, &section).unwrap();
        restored.dev.resume();
        assert_eq!(draw(&mut whole, 77), draw(&mut restored, 77));
    }

    #[test]
    fn a_restored_device_on_the_host_s_entropy_gets_fresh_bytes() {
        let mut whole = Driver::started(seeded(), u64::MAX);
        let section = save_section("rng", &whole.dev).unwrap();
        let mut clones: Vec<_> = (0..2).map(|_| whole.moved_to(Rng::new(Entropy::Os))).collect();
        let mut draws = HashSet::from([draw(&mut whole, 32)]);
        for clone in &mut clones {
            restore_section(&mut clone.dev, &section).unwrap();
            clone.dev.resume();
            draws.insert(draw(clone, 32));
        }
        assert_eq!(draws.len(), 3);
    }

    #[test]
    fn a_chain_that_was_not_rung_for_is_not_answered_by_a_resume() {
        let mut driver = Driver::started(seeded(), u64::MAX);
        let head = driver.chain(&[(BUFFERS, 16, WRITE)]);
        driver.offer(head);
        driver.dev.pause(Instant::now()).unwrap();
        driver.dev.resume();
        assert_eq!(driver.used_idx(), 0);
        driver.dev.write(0x50, 4, 0);
        assert_eq!(driver.wait(), (0, 16));
    }
}
