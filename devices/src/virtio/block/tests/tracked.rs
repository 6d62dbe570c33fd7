//! Disks whose granules are tracked: brought, overwritten, frozen.

use squib_formats::{digest::Digest, image::Content};

use super::*;
use crate::granules::{Baseline, Frozen, Origin, OriginError};

const SHIFT: u32 = 14;
const GRANULE: usize = 1 << SHIFT;
/// The last granule is a short one.
const SIZE: usize = 6 * GRANULE + 1024;
const COUNT: usize = SIZE.div_ceil(GRANULE);

/// What the disk held before; every third granule is zeros. Counts what is loaded.
struct Past {
    bytes: Vec<u8>,
    loads: AtomicUsize,
    /// A granule that cannot be had.
    damaged: Option<u64>,
}

impl Past {
    fn new(damaged: Option<u64>) -> Arc<Self> {
        let mut bytes = pattern(SIZE);
        bytes.chunks_mut(GRANULE).step_by(3).for_each(|granule| granule.fill(0));
        Arc::new(Self { bytes, loads: AtomicUsize::new(0), damaged })
    }
}

fn part(bytes: &[u8], granule: u64) -> &[u8] {
    let start = granule as usize * GRANULE;
    &bytes[start..(start + GRANULE).min(bytes.len())]
}

fn digest(bytes: &[u8], granule: u64) -> Digest {
    let mut whole = part(bytes, granule).to_vec();
    whole.resize(GRANULE, 0);
    Digest::of(&whole)
}

impl Origin for Past {
    fn load(
        &self,
        granule: u64,
        put: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), OriginError> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        if self.damaged == Some(granule) {
            return Err("root.zst: chunk 4 has the wrong digest".into());
        }
        match part(&self.bytes, granule) {
            bytes if bytes.iter().all(|byte| *byte == 0) => Ok(()),
            bytes => Ok(put(bytes)?),
        }
    }
}

impl Baseline for Past {
    fn digest(&self, granule: u64) -> Option<Digest> {
        Some(digest(&self.bytes, granule))
    }
}

fn file() -> FileDisk {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE as u64).unwrap();
    FileDisk::from_file(file, "root".as_ref(), false).unwrap()
}

/// A disk of which nothing is there yet.
fn absent(past: &Arc<Past>) -> (Arc<DiskGranules>, TrackedDisk) {
    let granules = Arc::new(TrackedDisk::absent("root", file(), SHIFT));
    granules.set_origin(past.clone());
    granules.set_baseline(past.clone());
    (granules.clone(), TrackedDisk::new(granules))
}

fn write(disk: &TrackedDisk, at: usize, bytes: &mut [u8]) -> io::Result<()> {
    let middle = bytes.len() / 2;
    let (a, b) = bytes.split_at_mut(middle);
    disk.write_at(at as u64, &[VolatileSlice::from(a), VolatileSlice::from(b)])
}

fn read(disk: &TrackedDisk, at: usize, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0xee; len];
    disk.read_at(at as u64, &[VolatileSlice::from(&mut bytes[..])])?;
    Ok(bytes)
}

fn frozen_part(frozen: &Frozen<FileDisk>, granule: u64) -> Vec<u8> {
    let offset = granule as usize * GRANULE;
    let mut bytes = vec![0xee; GRANULE.min(SIZE - offset)];
    if frozen.read(offset as u64, &mut bytes).unwrap() == Content::Zero {
        bytes.fill(0);
    }
    bytes
}

#[test]
fn a_disk_that_is_not_there_yet_reads_right_and_is_brought_by_what_is_touched() {
    let past = Past::new(None);
    let (granules, disk) = absent(&past);
    assert_eq!(read(&disk, GRANULE + 512, 1024).unwrap(), past.bytes[GRANULE + 512..][..1024]);
    assert_eq!(past.loads.load(Ordering::SeqCst), 1);
    write(&disk, 2 * GRANULE + 512, &mut [7; 512]).unwrap();
    assert_eq!(past.loads.load(Ordering::SeqCst), 2);
    write(&disk, 4 * GRANULE, &mut [8; GRANULE]).unwrap();
    disk.discard(5 * GRANULE as u64, (GRANULE + 1024) as u64).unwrap();
    assert_eq!(past.loads.load(Ordering::SeqCst), 2, "what is overwritten whole is not brought");
    let changed: Vec<_> = (0..COUNT as u64).filter(|at| granules.is_changed(*at)).collect();
    assert_eq!(changed, [2, 4, 5, 6]);
    let mut expected = past.bytes.clone();
    expected[2 * GRANULE + 512..][..512].fill(7);
    expected[4 * GRANULE..][..GRANULE].fill(8);
    expected[5 * GRANULE..].fill(0);
    assert_eq!(read(&disk, 0, SIZE).unwrap(), expected);
}

#[test]
fn holes_of_the_file_are_zeros_that_are_not_read() {
    let past = Past::new(None);
    let (granules, disk) = absent(&past);
    disk.write_zeroes(0, SIZE as u64, true).unwrap();
    let frozen = granules.freeze(u64::MAX).unwrap();
    assert_eq!(frozen.changed(), COUNT as u64);
    let mut bytes = [0xee; GRANULE];
    assert_eq!(frozen.read(GRANULE as u64, &mut bytes).unwrap(), Content::Zero);
    assert_eq!(bytes, [0xee; GRANULE]);
}

#[test]
fn what_cannot_be_had_is_an_io_error_and_is_told_by_name() {
    for execution in [Execution::Inline, Execution::Worker] {
        let past = Past::new(Some(4));
        let (granules, tracked) = absent(&past);
        let (sender, told) = std::sync::mpsc::channel();
        granules.on_failure(move |failure| sender.send(failure.to_string()).unwrap());
        let config = config(PathBuf::new());
        let clock = ManualClock::new(0, 0);
        let block = Block::with_disk(&config, Box::new(tracked), execution, clock).unwrap();
        let mut driver = Driver::started(block, ALL);
        assert_eq!(driver.request(IN, (GRANULE / 512) as u64, 512), (OK, 513));
        assert_eq!(driver.request(IN, (4 * GRANULE / 512) as u64, 512).0, IOERR);
        assert_eq!(
            told.recv().unwrap(),
            "disk `root`: the 16384 bytes at 0x10000 cannot be loaded: root.zst: chunk 4 has the \
             wrong digest"
        );
    }
}

#[test]
fn a_disk_that_was_opened_has_changed_all_over_unless_it_is_read_only() {
    for (read_only, changed) in [(false, 2), (true, 0)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, pattern(65536 + 512)).unwrap();
        let disk = FileDisk::open(&path, read_only).unwrap();
        let granules = Arc::new(TrackedDisk::granules_of("root", disk, read_only));
        let frozen = granules.freeze(0).unwrap();
        assert_eq!(frozen.changed(), changed);
        assert_eq!(frozen.known_digest(0, 65536), None);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Read(usize, usize),
    Write(usize, usize, u8),
    Discard(usize, usize),
    Zero(usize, usize, bool),
    Prefetch(u64),
    Freeze,
    ReadFrozen(u64),
    Keep,
    GiveUp,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // In sectors; every other range begins and ends with a granule.
    let sectors = SIZE / 512;
    let range = (0..sectors, 1..80usize, any::<bool>()).prop_map(move |(at, len, whole)| {
        let granule = GRANULE / 512;
        let at = if whole { at / granule * granule } else { at };
        let len = if whole { len.div_ceil(granule) * granule } else { len };
        (at * 512, len.min(sectors - at) * 512)
    });
    let granule = 0..COUNT as u64;
    let step = prop_oneof![
        3 => range.clone().prop_map(|(at, len)| Step::Read(at, len)),
        6 => (range.clone(), any::<u8>()).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        2 => range.clone().prop_map(|(at, len)| Step::Discard(at, len)),
        2 => (range, any::<bool>()).prop_map(|((at, len), unmap)| Step::Zero(at, len, unmap)),
        2 => granule.clone().prop_map(Step::Prefetch),
        2 => Just(Step::Freeze),
        5 => granule.prop_map(Step::ReadFrozen),
        1 => Just(Step::Keep),
        1 => Just(Step::GiveUp),
    ];
    proptest::collection::vec(step, 1..60)
}

/// The digests of a moment.
struct Moment(Vec<u8>);

impl Baseline for Moment {
    fn digest(&self, granule: u64) -> Option<Digest> {
        Some(digest(&self.0, granule))
    }
}

proptest! {
    /// The guest sees a plain disk, a moment stays what it was, and a digest that is said to be known is right,
    /// whatever is done in whatever order.
    #[test]
    fn a_tracked_disk_is_a_plain_disk(steps in steps()) {
        let past = Past::new(None);
        let (granules, disk) = absent(&past);
        let mut model = past.bytes.clone();
        let mut moment: Option<(Frozen<FileDisk>, Vec<u8>, [bool; COUNT])> = None;
        for step in steps {
            match step {
                Step::Read(at, len) => {
                    prop_assert_eq!(&read(&disk, at, len).unwrap(), &model[at..at + len]);
                }
                Step::Write(at, len, byte) => {
                    write(&disk, at, &mut vec![byte; len]).unwrap();
                    model[at..at + len].fill(byte);
                }
                Step::Discard(at, len) => {
                    disk.discard(at as u64, len as u64).unwrap();
                    model[at..at + len].fill(0);
                }
                Step::Zero(at, len, unmap) => {
                    disk.write_zeroes(at as u64, len as u64, unmap).unwrap();
                    model[at..at + len].fill(0);
                }
                Step::Prefetch(granule) => granules.prefetch(granule, &*past).unwrap(),
                Step::Freeze => {
                    if moment.is_none() {
                        let frozen = granules.freeze(u64::MAX).unwrap();
                        moment = Some((frozen, model.clone(), [false; COUNT]));
                    }
                }
                Step::ReadFrozen(granule) => {
                    if let Some((frozen, bytes, done)) = &mut moment {
                        let expected = part(bytes, granule);
                        let offset = granule << SHIFT;
                        if let Some(known) = frozen.known_digest(offset, expected.len()) {
                            prop_assert_eq!(known, digest(bytes, granule));
                        }
                        if !std::mem::replace(&mut done[granule as usize], true) {
                            prop_assert_eq!(&frozen_part(frozen, granule), expected);
                        }
                    }
                }
                Step::Keep => {
                    if let Some((frozen, bytes, _)) = moment.take() {
                        frozen.keep(Arc::new(Moment(bytes)));
                    }
                }
                Step::GiveUp => moment = None,
            }
        }
        prop_assert_eq!(&read(&disk, 0, SIZE).unwrap(), &model);
    }
}
