use std::{
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicUsize, Ordering},
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

fn overwrite(granules: &Granules<Memory>, first: usize, count: usize, byte: u8) {
    let done = granules.overwrite((first * SIZE) as u64, (count * SIZE) as u64, || {
        (first..first + count).for_each(|at| granules.store().0[at].lock().fill(byte));
        Ok::<_, Unavailable>(())
    });
    done.unwrap();
}

#[test]
fn what_is_overwritten_whole_is_not_brought_for_it() {
    let (granules, numbers) = absent(6);
    overwrite(&granules, 1, 2, 0x55);
    assert_eq!(numbers.loads.load(Ordering::SeqCst), 0);
    assert!((1..3).all(|at| granules.is_changed(at) && !granules.is_absent(at)));
    // A part of 3 and all of 4: one is brought.
    let done = granules.overwrite((3 * SIZE + 1) as u64, (2 * SIZE - 1) as u64, || {
        assert_eq!(granules.store().0[3].lock()[0], number(3));
        Ok::<_, Unavailable>(())
    });
    done.unwrap();
    assert_eq!(numbers.loads.load(Ordering::SeqCst), 1);
    granules.allow(0, 6 * SIZE as u64, false).unwrap();
    assert_eq!(granules.store().0[1].lock()[9], 0x55, "it is not brought afterwards");
}

#[test]
fn a_granule_that_is_being_overwritten_is_waited_for() {
    let (granules, numbers) = absent(1);
    let inside = Barrier::new(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            let done = granules.overwrite(0, SIZE as u64, || {
                inside.wait();
                thread::sleep(Duration::from_millis(20));
                granules.store().0[0].lock().fill(0x77);
                Ok::<_, Unavailable>(())
            });
            done.unwrap();
        });
        inside.wait();
        granules.allow(5, 1, false).unwrap();
        assert_eq!(granules.store().0[0].lock()[5], 0x77);
    });
    assert_eq!(numbers.loads.load(Ordering::SeqCst), 0);
}

#[test]
fn a_moment_keeps_what_is_overwritten_before_it_was_brought() {
    let (granules, numbers) = absent(4);
    let frozen = granules.freeze(u64::MAX).unwrap();
    assert_eq!(read(&frozen, 2), [2; SIZE]);
    frozen.skip(3 << SHIFT, SIZE);
    overwrite(&granules, 1, 3, 0xaa);
    assert_eq!(read(&frozen, 1), [1; SIZE]);
    assert_eq!(granules.store().0[1].lock()[0], 0xaa);
    assert_eq!(numbers.loads.load(Ordering::SeqCst), 2, "3 will not be read and is not brought");
}

#[test]
fn an_overwrite_that_fails_leaves_absent_granules_absent() {
    let (granules, numbers) = absent(4);
    let failed = granules.overwrite(0, 4 * SIZE as u64, || {
        (0..3).for_each(|at| granules.store().0[at].lock()[..100].fill(0xbb));
        Err::<(), _>(io::Error::other("the disk is full"))
    });
    assert_eq!(failed.unwrap_err().to_string(), "the disk is full");
    assert!((0..4).all(|at| granules.is_absent(at)));
    granules.allow(0, 4 * SIZE as u64, false).unwrap();
    for at in 0..4 {
        assert_eq!(*granules.store().0[at].lock(), [number(at as u64); SIZE], "{at}");
    }
    assert_eq!(numbers.loads.load(Ordering::SeqCst), 4);
}

#[test]
fn nothing_absent_is_overwritten_once_something_could_not_be_had() {
    let (granules, numbers) = absent(3);
    numbers.broken.store(true, Ordering::SeqCst);
    granules.allow(0, 1, false).unwrap_err();
    let refused = granules.overwrite(SIZE as u64, SIZE as u64, || Ok::<_, Unavailable>(()));
    assert!(refused.is_err());
    assert!(granules.is_absent(1));
}

proptest! {
    /// Whatever is read, written, prefetched and frozen, in any order, a moment's bytes are the moment's.
    #[test]
    fn any_order_of_work_reads_the_frozen_moment(
        before in prop::collection::vec((0usize..12, any::<u8>()), 0..12),
        after in prop::collection::vec((0usize..12, any::<u8>(), 0u8..5), 0..40),
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
                3 => overwrite(&granules, granule, (12 - granule).min(3), byte),
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

/// Knows to the byte where it has no zeros, as a file knows its holes.
struct Holes(Memory);

impl Store for Holes {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        self.0.read(offset, into)
    }

    fn fill(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.fill(offset, bytes)
    }

    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let is_data = |at: &u64| self.0.0[*at as usize / SIZE].lock()[*at as usize % SIZE] != 0;
        // Every byte of a granule is the same.
        let granules =
            (range.start..range.end).step_by(SIZE).map(|at| at / SIZE as u64 * SIZE as u64);
        let mut granules = granules.filter(is_data);
        let Some(start) = granules.next() else { return Ok(None) };
        Ok(Some(start.max(range.start)..(start + SIZE as u64).min(range.end)))
    }
}

/// What goes on while a moment is read.
#[derive(Clone, Debug)]
enum Meanwhile {
    /// The next bytes of the moment are looked for, and read if they may be something.
    Read,
    Write(u64, u8),
    /// All zeros, without what was there being brought.
    Punch(u64),
    Prefetch(u64),
}

fn meanwhile(count: u64) -> impl Strategy<Value = Meanwhile> {
    prop_oneof![
        4 => Just(Meanwhile::Read),
        2 => (0..count, any::<u8>()).prop_map(|(at, byte)| Meanwhile::Write(at, byte)),
        2 => (0..count).prop_map(Meanwhile::Punch),
        1 => (0..count).prop_map(Meanwhile::Prefetch),
    ]
}

const HOLES: u64 = 12;

proptest! {
    #[test]
    fn what_is_not_said_to_be_data_was_zero_whatever_happens_meanwhile(
        before in prop::collection::vec(meanwhile(HOLES), 0..12),
        during in prop::collection::vec(meanwhile(HOLES), 0..40),
        absent in any::<bool>(),
        known in any::<bool>(),
    ) {
        let store = Holes(Memory::new(HOLES as usize));
        let access = if absent { 0 } else { READABLE };
        let size = HOLES * SIZE as u64;
        let granules = Arc::new(Granules::new("test disk", store, size, SHIFT, access));
        let numbers = Arc::new(Numbers::default());
        let mut now: Vec<u8> = vec![0; HOLES as usize];
        if absent {
            granules.set_origin(numbers.clone());
            now = (0..HOLES).map(number).collect();
            // As a restore does with what is all zeros.
            granules.set(3..4, READABLE);
        }
        if known && absent {
            granules.set_baseline(numbers.clone());
        }
        let zero = Digest::of(&[0; SIZE]);
        let run = |step: &Meanwhile, now: &mut Vec<u8>| match step {
            Meanwhile::Write(at, byte) => {
                granules.allow(at * SIZE as u64, SIZE as u64, true).unwrap();
                granules.store().fill(at * SIZE as u64, &[*byte; SIZE]).unwrap();
                now[*at as usize] = *byte;
            }
            Meanwhile::Punch(at) => {
                let punch = || granules.store().fill(at * SIZE as u64, &[0; SIZE]).map_err(io::Error::other);
                granules.overwrite(at * SIZE as u64, SIZE as u64, punch).unwrap();
                now[*at as usize] = 0;
            }
            Meanwhile::Prefetch(at) if absent => granules.prefetch(*at, &*numbers).unwrap(),
            Meanwhile::Prefetch(_) | Meanwhile::Read => {}
        };
        before.iter().for_each(|step| run(step, &mut now));
        let moment = now.clone();
        let frozen = granules.freeze(u64::MAX).unwrap();
        let mut found = vec![0; HOLES as usize];
        let (mut next, mut ended) = (0, false);
        let rest = std::iter::repeat_n(&Meanwhile::Read, 2 * HOLES as usize);
        for step in during.iter().chain(rest) {
            run(step, &mut now);
            if !matches!(step, Meanwhile::Read) || ended {
                continue;
            }
            let Some(data) = frozen.data(next, zero).unwrap() else {
                ended = true;
                continue;
            };
            prop_assert!(next <= data.start && data.start < data.end && data.end <= size);
            // As a plan does: whole granules, one at a time.
            let granule = data.start / SIZE as u64;
            let mut bytes = [0; SIZE];
            let content = frozen.read(granule * SIZE as u64, &mut bytes).unwrap();
            found[granule as usize] = if content == Content::Zero { 0 } else { bytes[0] };
            next = (granule + 1) * SIZE as u64;
        }
        prop_assert_eq!(found, moment);
        drop(frozen);
        // What had changed, then or meanwhile, is not forgotten.
        for (granule, byte) in (0..).zip(&now) {
            if !granules.is_changed(granule) && absent {
                prop_assert_eq!(*byte, number(granule));
            }
        }
    }
}

#[test]
fn a_disk_of_a_tebibyte_is_frozen_looked_through_and_let_go_in_a_few_steps() {
    struct Nothing(AtomicUsize);
    impl Store for Nothing {
        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<Content> {
            unreachable!("there is nothing to read")
        }
        fn fill(&self, _: u64, _: &[u8]) -> io::Result<()> {
            unreachable!("nothing is brought")
        }
        fn data(&self, _: Range<u64>) -> io::Result<Option<Range<u64>>> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(None)
        }
    }
    let size = 1 << 40;
    let store = Nothing(AtomicUsize::new(0));
    let granules = Arc::new(Granules::new("disk", store, size, 16, READABLE | WRITABLE));
    let zero = Digest::of(&[0; 1 << 16]);
    for asked in 1..=3 {
        let frozen = granules.freeze(0).unwrap();
        assert_eq!(frozen.changed(), size >> 16);
        assert_eq!(frozen.data(0, zero).unwrap(), None);
        assert_eq!(granules.store().0.load(Ordering::Relaxed), asked);
        assert!(!granules.is_changed(5));
        drop(frozen);
        assert!(granules.is_changed(5));
    }
    assert!(granules.rights().is_none(), "no byte for each of 16 million granules");
    assert_eq!(granules.next_absent(0), None);
}
