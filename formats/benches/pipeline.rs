//! How fast images are written, read and digested, beside what the same bytes cost at least: a copy in
//! memory, blake3 alone, plain zstd at the same level in frames of a chunk on as many threads, and writing
//! as many bytes to the same disk.
//!
//! `cargo bench -p squib-formats --bench pipeline -- [FILE OR DIRECTORY] [MIB]`: the raw bytes are those of
//! a file (for example the memory of a guest), or of the files below a directory (default /usr/lib) with
//! three runs of zeros for every run of data, as guest memory has it; then of those without the zeros, and with
//! few of them between many zeros.

use std::{
    env, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use squib_formats::{
    image::{
        CHUNK_SIZE, Content, Control, ImageOptions, ImageReader, LEVEL, Sink, Source,
        digest_source, write_image,
    },
    manifest::{CpuIdentity, MachineInfo, Manifest},
    publish::{Durability, Existing, Staging},
    sections::write_sections,
    snapshot_dir::Snapshot,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Cargo adds `--bench`.
    let args: Vec<_> = env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let path = args.first().map_or("/usr/lib", String::as_str);
    let mib: usize = args.get(1).map_or(Ok(512), |arg| arg.parse())?;
    let raw = raw(Path::new(path), mib << 20)?;
    measure(path, &raw)?;
    let data: Vec<u8> = not_zero(&raw).flatten().copied().collect();
    measure(&format!("{path} without zeros"), &data)?;
    let mut sparse = vec![0; raw.len()];
    for (place, chunk) in sparse.chunks_mut(32 * CHUNK_SIZE as usize).zip(not_zero(&raw)) {
        place[..chunk.len()].copy_from_slice(chunk);
    }
    measure("one chunk of data in 32", &sparse)
}

/// The chunks of `raw` that have anything in them.
fn not_zero(raw: &[u8]) -> impl Iterator<Item = &[u8]> {
    raw.chunks(CHUNK_SIZE as usize).filter(|chunk| chunk.iter().any(|byte| *byte != 0))
}

fn measure(what: &str, raw: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
    let data: usize = not_zero(raw).map(<[u8]>::len).sum();
    let threads = Control::default().threads;
    println!(
        "{what}: {} MiB raw, {} MiB in chunks that are not zero; {threads} threads",
        raw.len() >> 20,
        data >> 20
    );

    // Touched beforehand, so that no page fault is measured.
    let mut copy = vec![1; raw.len()];
    let copied = best(|| copy.copy_from_slice(raw));
    report("copy in memory, one thread", raw.len(), copied);
    let hashed = best(|| assert_ne!(blake3::hash(raw).as_bytes(), &[0; 32]));
    report("blake3, one thread", raw.len(), hashed);
    let mut plain = 0;
    let compressed = best(|| plain = zstd_frames(raw, threads.get()));
    report(&format!("plain zstd -{LEVEL} in frames of a chunk"), raw.len(), compressed);
    let digested = best(|| drop(digest_source("raw", &Memory(raw), Control::default())));
    report("image digest", raw.len(), digested);

    let dir = tempfile::tempdir()?;
    for durability in [Durability::None, Durability::Full] {
        let path = dir.path().join(format!("{durability:?}"));
        let (mut stored, mut publish) = (0, Duration::ZERO);
        let written = best(|| {
            // What a run before has left is no part of this one.
            let _ = fs::remove_dir_all(&path);
            (stored, publish) = write(&path, &Memory(raw), durability).expect("disk");
        });
        report(&format!("create, durability {durability:?}"), raw.len(), written);
        let disk = best(|| write_plain(dir.path(), stored, durability).expect("disk"));
        let peer = compressed.wall.max(disk.wall);
        println!(
            "    {:.2} of the throughput of the slower of plain zstd and disk ({:.0} ms for {} MiB); \
             {:.2} times the CPU time of plain zstd",
            peer.as_secs_f64() / written.wall.as_secs_f64(),
            disk.wall.as_secs_f64() * 1e3,
            stored >> 20,
            ratio(written, compressed)
        );
        println!(
            "    {} MiB stored, 1:{:.2} of all, 1:{:.2} of what is not zero; plain zstd {} MiB; \
             sync and rename {:.0} ms",
            stored >> 20,
            raw.len() as f64 / stored as f64,
            data as f64 / stored as f64,
            plain >> 20,
            publish.as_secs_f64() * 1e3
        );
    }
    let snapshot = Snapshot::open(&dir.path().join("Full"))?;
    copy.fill(0);
    let target = Target(copy.chunks_mut(CHUNK_SIZE as usize).map(Mutex::new).collect());
    let loaded = best(|| {
        let image = ImageReader::open(&snapshot, "memory").expect("just written");
        image.load(&target, Control::default()).expect("just written");
    });
    report("load", raw.len(), loaded);
    println!("    {:.1} times the CPU time of a copy in memory", ratio(loaded, copied));
    assert!(copy == raw, "loaded bytes are the raw bytes");
    Ok(())
}

fn raw(path: &Path, size: usize) -> io::Result<Vec<u8>> {
    if path.is_file() {
        return fs::read(path);
    }
    let mut raw = Vec::with_capacity(size);
    let mut left: Vec<PathBuf> = vec![path.to_owned()];
    while let Some(next) = left.pop() {
        if next.is_symlink() {
            continue;
        }
        if next.is_dir() {
            left.extend(fs::read_dir(&next)?.flatten().map(|entry| entry.path()));
        } else if let Ok(bytes) = fs::read(&next) {
            for run in bytes.chunks(1 << 20) {
                raw.extend_from_slice(run);
                raw.resize(raw.len() + 3 * run.len(), 0);
            }
        }
        if raw.len() >= size {
            break;
        }
    }
    raw.truncate(size);
    Ok(raw)
}

/// Every chunk as a frame of its own, on `threads` threads, and the frames thrown away. Answers their bytes.
fn zstd_frames(raw: &[u8], threads: usize) -> usize {
    let chunks = Mutex::new(raw.chunks(16 * CHUNK_SIZE as usize));
    let work = || {
        let mut compressor = zstd::bulk::Compressor::new(LEVEL).expect("memory");
        let mut frame = vec![0; zstd::zstd_safe::compress_bound(CHUNK_SIZE as usize)];
        let mut total = 0;
        loop {
            let Some(next) = chunks.lock().expect("nobody panics").next() else {
                return total;
            };
            for chunk in next.chunks(CHUNK_SIZE as usize) {
                total += compressor.compress_to_buffer(chunk, &mut frame[..]).expect("room");
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().expect("nobody panics")).sum()
    })
}

/// As many bytes as a snapshot has, written in one go.
fn write_plain(dir: &Path, stored: u64, durability: Durability) -> io::Result<()> {
    let path = dir.join("plain");
    let mut file = fs::File::create(&path)?;
    let block = vec![0xa5; 1 << 20];
    let mut left = stored as usize;
    while left > 0 {
        let step = left.min(block.len());
        file.write_all(&block[..step])?;
        left -= step;
    }
    if durability == Durability::Full {
        file.sync_all()?;
    }
    fs::remove_file(path)
}

fn write(
    path: &Path,
    source: &Memory<'_>,
    durability: Durability,
) -> Result<(u64, Duration), squib_formats::error::FormatError> {
    let mut staging = Staging::new(path, Existing::Refuse)?;
    staging.durability(durability);
    let sections = write_sections(&mut staging, &[])?;
    let image =
        write_image(&mut staging, "memory", source, ImageOptions::default(), Control::default())?;
    let manifest = Manifest {
        writer: String::new(),
        host: String::new(),
        created: 0,
        parent: None,
        parent_hint: None,
        host_backend: None,
        operation: None,
        machine: MachineInfo {
            name: String::new(),
            memory_size: image.record.size,
            vcpus: 1,
            cmdline: String::new(),
            kernel: String::new(),
            kernel_digest: None,
            initrd: None,
            disks: vec![],
            rng: false,
            backend: String::new(),
            deterministic: None,
        },
        cpu: CpuIdentity { backend: String::new(), id_registers: vec![], counter_frequency: 0 },
        images: vec![image.record],
        sections,
        files: vec![],
    };
    let started = Instant::now();
    staging.publish(manifest)?;
    Ok((image.stored, started.elapsed()))
}

fn ratio(this: Took, that: Took) -> f64 {
    this.cpu.as_secs_f64() / that.cpu.as_secs_f64()
}

/// What something took: on the clock, and of all CPUs together. The second does not suffer from what
/// else the machine does.
#[derive(Clone, Copy)]
struct Took {
    wall: Duration,
    cpu: Duration,
}

/// The fastest of three runs.
fn best(mut work: impl FnMut()) -> Took {
    let runs = [(); 3].map(|()| time(&mut work));
    runs.into_iter().min_by_key(|took| took.wall).expect("three")
}

fn time(work: impl FnOnce()) -> Took {
    let cpu = || {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    };
    let (wall, before) = (Instant::now(), cpu());
    work();
    Took { wall: wall.elapsed(), cpu: cpu() - before }
}

fn report(what: &str, bytes: usize, took: Took) {
    let rate = |time: Duration| bytes as f64 / 1e6 / time.as_secs_f64();
    println!(
        "{what}: {:.0} ms, {:.0} MB/s; {:.0} MB/s a CPU",
        took.wall.as_secs_f64() * 1e3,
        rate(took.wall),
        rate(took.cpu)
    );
}

struct Memory<'a>(&'a [u8]);

impl Source for Memory<'_> {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        into.copy_from_slice(&self.0[offset as usize..][..into.len()]);
        Ok(Content::Data)
    }
}

/// A place for each chunk, so that threads need not wait for each other.
struct Target<'a>(Vec<Mutex<&'a mut [u8]>>);

impl Sink for Target<'_> {
    fn is_zero(&self, _: u64, _: u64) -> bool {
        true
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let chunk = &self.0[(offset / u64::from(CHUNK_SIZE)) as usize];
        chunk.lock().expect("nobody panics").copy_from_slice(bytes);
        Ok(())
    }
}
