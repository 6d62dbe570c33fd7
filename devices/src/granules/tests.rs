use std::{
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicUsize},
        mpsc,
    },
    thread,
    time::Duration,
};

use proptest::prelude::*;

use super::*;

const SHIFT: u32 = 14;
const SIZE: usize = 1 << SHIFT;

/// Bytes in memory, a lock for each granule.
struct Memory(Vec<Mutex<Vec<u8>>>);

impl Memory {
    fn new(count: usize) -> Self {
        Self((0..count).map(|_| Mutex::new(vec![0; SIZE])).collect())
    }
}

impl Store for Memory {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        let start = offset as usize % SIZE;
        into.copy_from_slice(&self.0[offset as usize / SIZE].lock()[start..start + into.len()]);
        Ok(Content::Data)
    }

    fn fill(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0[offset as usize / SIZE].lock()[..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

/// Granule n is full of n; every third is zero. Counts what it was asked for.
#[derive(Default)]
struct Numbers {
    loads: AtomicUsize,
    broken: AtomicBool,
}

fn number(granule: u64) -> u8 {
    if granule.is_multiple_of(3) { 0 } else { granule as u8 }
}

impl Origin for Numbers {
    fn load(
        &self,
        granule: u64,
        put: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), OriginError> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        if self.broken.load(Ordering::SeqCst) {
            return Err(format!("granule {granule} has the wrong digest").into());
        }
        match number(granule) {
            0 => Ok(()),
            byte => Ok(put(&[byte; SIZE])?),
        }
    }
}

impl Baseline for Numbers {
    fn digest(&self, granule: u64) -> Option<Digest> {
        Some(Digest::of(&[number(granule); SIZE]))
    }
}

fn absent(count: usize) -> (Arc<Granules<Memory>>, Arc<Numbers>) {
    let numbers = Arc::new(Numbers::default());
    let size = (count * SIZE) as u64;
    let granules = Granules::new("test memory", Memory::new(count), size, SHIFT, 0);
    granules.set_origin(numbers.clone());
    granules.set_baseline(numbers.clone());
    (Arc::new(granules), numbers)
}

fn write(granules: &Granules<Memory>, granule: usize, byte: u8) {
    granules.allow((granule * SIZE) as u64, SIZE as u64, true).unwrap();
    granules.store().0[granule].lock().fill(byte);
}

fn read(frozen: &Frozen<Memory>, granule: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; SIZE];
    if frozen.read((granule * SIZE) as u64, &mut bytes).unwrap() == Content::Zero {
        bytes.fill(0);
    }
    bytes
}

#[test]
fn an_absent_granule_is_brought_once_however_many_want_it() {
    let (granules, numbers) = absent(8);
    let start = Barrier::new(4);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                start.wait();
                granules.allow(0, 8 * SIZE as u64, false).unwrap();
                for granule in 0..8 {
                    assert_eq!(granules.store().0[granule].lock()[7], number(granule as u64));
                }
            });
        }
    });
    assert_eq!(numbers.loads.load(Ordering::SeqCst), 8);
    assert!((0..8).all(|granule| !granules.is_absent(granule) && !granules.is_changed(granule)));
}

#[test]
fn what_cannot_be_had_is_named_to_the_hook_and_to_everybody_after() {
    let (granules, numbers) = absent(4);
    let (sender, told) = mpsc::channel();
    granules.on_failure(move |failure| sender.send(failure.to_string()).unwrap());
    granules.allow(0, 1, false).unwrap();
    numbers.broken.store(true, Ordering::SeqCst);
    let error = granules.allow(SIZE as u64, 1, true).unwrap_err().to_string();
    let expected =
        "test memory: the 16384 bytes at 0x4000 cannot be loaded: granule 1 has the wrong digest";
    assert_eq!(error, expected);
    assert_eq!(told.try_recv().unwrap(), expected);
    numbers.broken.store(false, Ordering::SeqCst);
    assert!(granules.allow(2 * SIZE as u64, 1, false).is_err(), "nothing more is brought");
    assert!(told.try_recv().is_err(), "the hook is called once");
    granules.allow(0, 1, true).unwrap();
    assert_eq!(granules.store().0[1].lock()[0], 0, "nothing was put there");
}

#[test]
fn needed_granules_with_bytes_are_recorded_in_order_and_prefetched_ones_are_not() {
    let (granules, numbers) = absent(8);
    granules.start_recording();
    for granule in [5u64, 3, 1, 5] {
        granules.allow(granule << SHIFT, 1, false).unwrap();
    }
    granules.prefetch(7, &*numbers).unwrap();
    granules.allow(7 << SHIFT, 1, true).unwrap();
    assert_eq!(granules.recorded(), [5, 1]);
}

#[test]
fn a_frozen_moment_stays_what_it_was() {
    let (granules, _) = absent(6);
    write(&granules, 1, 0xa1);
    let frozen = granules.freeze(u64::MAX).unwrap();
    assert!(granules.freeze(u64::MAX).is_none());
    assert_eq!(frozen.changed(), 1);
    for granule in [0, 1, 2] {
        write(&granules, granule, 0xff);
    }
    assert_eq!(read(&frozen, 1), [0xa1; SIZE]);
    assert_eq!(read(&frozen, 2), [2; SIZE]);
    assert_eq!(read(&frozen, 0), [0; SIZE]);
    assert_eq!(read(&frozen, 4), [4; SIZE]);
    // Read already: nothing is put aside any more.
    write(&granules, 4, 0xfe);
    assert_eq!(granules.slow.lock().freeze.as_ref().unwrap().aside_bytes, 0);
    let error = frozen.read(4 << SHIFT, &mut [0; SIZE]).unwrap_err().to_string();
    assert!(error.contains("has been read before"), "{error}");
}

#[test]
fn digests_are_known_of_what_nobody_has_written_to() {
    let (granules, numbers) = absent(4);
    write(&granules, 2, 9);
    granules.allow(SIZE as u64, 1, false).unwrap();
    let loads = numbers.loads.load(Ordering::SeqCst);
    let frozen = granules.freeze(u64::MAX).unwrap();
    let known = |granule: u64| frozen.known_digest(granule << SHIFT, SIZE);
    assert_eq!(known(0), Some(Digest::of(&[0; SIZE])));
    assert_eq!(known(1), Some(Digest::of(&[1; SIZE])));
    assert_eq!(known(2), None);
    assert_eq!(frozen.known_digest(1 << SHIFT, SIZE - 1), None, "not a whole granule");
    assert_eq!(frozen.known_digest(4 << SHIFT, SIZE), None, "behind the end");
    write(&granules, 1, 7);
    assert_eq!(known(1), Some(Digest::of(&[1; SIZE])), "as it was");
    assert_eq!(numbers.loads.load(Ordering::SeqCst), loads, "nothing is loaded for it");
}

#[test]
fn a_capture_that_fails_forgets_no_change_and_one_that_succeeds_begins_anew() {
    let (granules, numbers) = absent(4);
    write(&granules, 1, 1);
    let frozen = granules.freeze(u64::MAX).unwrap();
    write(&granules, 2, 2);
    drop(frozen);
    let changed = |granules: &Granules<Memory>| {
        (0..4).filter(|granule| granules.is_changed(*granule)).collect::<Vec<_>>()
    };
    assert_eq!(changed(&granules), [1, 2]);
    let frozen = granules.freeze(u64::MAX).unwrap();
    write(&granules, 3, 3);
    frozen.keep(numbers.clone());
    assert_eq!(changed(&granules), [3]);
}

#[test]
fn a_writer_that_outruns_the_reader_waits_for_it() {
    let (granules, _) = absent(8);
    granules.allow(0, 8 * SIZE as u64, true).unwrap();
    for granule in 0..8 {
        write(&granules, granule, granule as u8);
    }
    let frozen = granules.freeze(2 * SIZE as u64).unwrap();
    thread::scope(|scope| {
        let writer = scope.spawn(|| (0..8).for_each(|granule| write(&granules, granule, 0xff)));
        // Two are put aside; the third has to wait until something has been read.
        while frozen.throttled() == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(granules.slow.lock().freeze.as_ref().unwrap().aside_bytes <= 2 * SIZE as u64);
        for granule in 0..8 {
            assert_eq!(read(&frozen, granule), [granule as u8; SIZE]);
        }
        writer.join().unwrap();
    });
    assert_eq!(granules.store().0[7].lock()[0], 0xff);
}

#[test]
fn a_waiting_writer_goes_on_when_the_capture_is_given_up() {
    let (granules, _) = absent(4);
    granules.allow(0, 4 * SIZE as u64, true).unwrap();
    let frozen = granules.freeze(0).unwrap();
    thread::scope(|scope| {
        let writer = scope.spawn(|| (0..4).for_each(|granule| write(&granules, granule, 0xff)));
        while frozen.throttled() == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        drop(frozen);
        writer.join().unwrap();
    });
}

#[test]
fn pieces_of_granules_and_runs_of_them_are_read_likewise() {
    let (granules, _) = absent(4);
    write(&granules, 1, 0x11);
    let frozen = granules.freeze(u64::MAX).unwrap();
    write(&granules, 1, 0xff);
    let mut bytes = vec![0xee; SIZE];
    let half = SIZE / 2;
    frozen.read(SIZE as u64, &mut bytes[..half]).unwrap();
    write(&granules, 2, 0xff);
    frozen.read((SIZE + half) as u64, &mut bytes[half..]).unwrap();
    assert_eq!(bytes, [0x11; SIZE]);
    let mut run = vec![0xee; 2 * SIZE];
    frozen.read(2 * SIZE as u64, &mut run).unwrap();
    assert_eq!(run[..SIZE], [2; SIZE]);
    assert_eq!(run[SIZE..], [0; SIZE]);
}

proptest! {
    /// Whatever is read, written, prefetched and frozen, in any order, a moment's bytes are the moment's.
    #[test]
    fn any_order_of_work_reads_the_frozen_moment(
        before in prop::collection::vec((0usize..12, any::<u8>()), 0..12),
        after in prop::collection::vec((0usize..12, any::<u8>(), 0u8..4), 0..40),
    ) {
        let (granules, numbers) = absent(12);
        let mut model: Vec<u8> = (0..12).map(number).collect();
        for (granule, byte) in before {
            write(&granules, granule, byte);
            model[granule] = byte;
        }
        let frozen = granules.freeze(u64::MAX).unwrap();
        let mut read_already = [false; 12];
        for (granule, byte, what) in after {
            match what {
                0 => write(&granules, granule, byte),
                1 => granules.allow((granule * SIZE) as u64, 5, false).unwrap(),
                2 => granules.prefetch(granule as u64, &*numbers).unwrap(),
                _ if read_already[granule] => {}
                _ => {
                    prop_assert_eq!(read(&frozen, granule), [model[granule]; SIZE]);
                    read_already[granule] = true;
                }
            }
        }
        for granule in (0..12).filter(|granule| !read_already[*granule]) {
            prop_assert_eq!(read(&frozen, granule), [model[granule]; SIZE]);
        }
    }
}
