use std::{fs::File, io::Write, os::unix::fs::FileExt};

use super::*;
use crate::virtio::test_driver::{BUFFERS, Driver, ManualClock, WRITE};

/// All features.
const ALL: u64 = u64::MAX;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;
const DISK_SIZE: usize = 256 << 10;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 512) as u8).collect()
}

/// A disk image in the folder, filled with a pattern.
fn image(dir: &tempfile::TempDir) -> PathBuf {
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().write_all(&pattern(DISK_SIZE)).unwrap();
    path
}

fn config(path: PathBuf) -> BlockConfig {
    BlockConfig { id: "root".into(), path, read_only: false, rate_limiter: None }
}

fn open(config: &BlockConfig, execution: Execution) -> Block {
    Block::open(config, execution, ManualClock::new(0, 0)).unwrap()
}

type BlockDriver = Driver<Block>;

impl BlockDriver {
    fn header(&self, kind: u32, sector: u64) {
        self.put(HEADER, &kind.to_le_bytes());
        self.put(HEADER + 4, &[0; 4]);
        self.put(HEADER + 8, &sector.to_le_bytes());
        self.put(STATUS, &[0xaa]);
    }

    /// One request with `len` bytes at `DATA`; gives status and bytes written.
    fn request(&mut self, kind: u32, sector: u64, len: u32) -> (u8, u32) {
        self.header(kind, sector);
        let flags = if matches!(kind, 0 | 8) { WRITE } else { 0 };
        let mut descs = vec![(HEADER, 16, 0), (DATA, len, flags), (STATUS, 1, WRITE)];
        if len == 0 {
            descs.remove(1);
        }
        let head = self.chain(&descs);
        let written = self.submit(head);
        (self.get::<1>(STATUS)[0], written)
    }
}

#[test]
fn data_written_is_read_back_and_lies_in_the_file() {
    for execution in [Execution::Inline, Execution::Worker] {
        let dir = tempfile::tempdir().unwrap();
        let config = config(image(&dir));
        let mut driver = Driver::started(open(&config, execution), ALL);
        assert_eq!(driver.request(0, 3, 1024), (0, 1025));
        assert_eq!(driver.get_vec(DATA, 1024), pattern(DISK_SIZE)[1536..2560]);
        let new = vec![0x5a; 1536];
        driver.put(DATA, &new);
        assert_eq!(driver.request(1, 8, 1536), (0, 1));
        driver.put(DATA, &[0; 1536]);
        assert_eq!(driver.request(0, 8, 1536), (0, 1537));
        assert_eq!(driver.get_vec(DATA, 1536), new);
        assert_eq!(driver.request(4, 0, 0), (0, 1));
        let mut file = vec![0; 1536];
        File::open(&config.path).unwrap().read_exact_at(&mut file, 4096).unwrap();
        assert_eq!(file, new);
    }
}
