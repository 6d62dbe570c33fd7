//! Requests, from right to hostile.

use super::*;

#[test]
fn data_written_is_read_back_and_lies_in_the_file() {
    for execution in [Execution::Inline, Execution::Worker] {
        let dir = tempfile::tempdir().unwrap();
        let config = config(image(&dir));
        let mut driver = Driver::started(open(&config, execution), ALL);
        assert_eq!(driver.request(IN, 3, 1024), (OK, 1025));
        assert_eq!(driver.get_vec(DATA, 1024), pattern(DISK_SIZE)[1536..2560]);
        let new = vec![0x5a; 1536];
        driver.put(DATA, &new);
        assert_eq!(driver.request(OUT, 8, 1536), (OK, 1));
        driver.put(DATA, &[0; 1536]);
        assert_eq!(driver.request(IN, 8, 1536), (OK, 1537));
        assert_eq!(driver.get_vec(DATA, 1536), new);
        assert_eq!(driver.request(FLUSH, 0, 0), (OK, 1));
        let mut file = vec![0; DISK_SIZE];
        File::open(&config.path).unwrap().read_exact_at(&mut file, 0).unwrap();
        let mut expected = pattern(DISK_SIZE);
        expected[4096..4096 + 1536].copy_from_slice(&new);
        assert!(file == expected, "only the sectors that were written have changed");
    }
}

#[test]
fn the_configuration_space_describes_the_disk() {
    let mut driver = Driver::new(MemDisk::new().device(Execution::Inline));
    assert_eq!(driver.dev.read(0x100, 8), DISK_SIZE as u64 / 512);
    assert_eq!(driver.r(0x10c), SEG_MAX);
    assert_eq!(driver.r(0x114), 512);
    assert_eq!(driver.dev.read(0x118, 1), 3);
    assert_eq!(driver.dev.read(0x120, 1), 1);
    assert_eq!([driver.r(0x124), driver.r(0x128), driver.r(0x12c)], [1 << 22, 16, 8]);
    assert_eq!([driver.r(0x130), driver.r(0x134)], [1 << 17, 1]);
    assert_eq!(driver.dev.read(0x138, 1), 1);
    for behind in [0x13c, 0x800, 0xffc] {
        assert_eq!(driver.r(behind), 0);
    }
    let offered = driver.offered();
    for feature in [feature::DISCARD, feature::WRITE_ZEROES, feature::CONFIG_WCE, feature::FLUSH] {
        assert_ne!(offered & feature, 0);
    }
    assert_eq!(offered & feature::RO, 0);
}

#[test]
fn the_serial_number_is_the_id_cut_to_its_room() {
    let config = BlockConfig { id: "a-very-long-name-of-a-disk".into(), ..config(PathBuf::new()) };
    let clock = ManualClock::new(0, 0);
    let disk = Box::new(MemDisk::new());
    let device = Block::with_disk(&config, disk, Execution::Inline, clock).unwrap();
    let mut driver = Driver::started(device, ALL);
    assert_eq!(driver.request(GET_ID, 0, 20), (OK, 21));
    assert_eq!(&driver.get::<20>(DATA), b"a-very-long-name-of-");
    driver.put(DATA, &[0xee; 20]);
    assert_eq!(driver.request(GET_ID, 0, 5), (OK, 6));
    assert_eq!(&driver.get::<6>(DATA), b"a-ver\xee");
}

#[test]
fn a_request_may_be_divided_in_any_way() {
    let disk = MemDisk::new();
    let layouts: [fn(&mut BlockDriver) -> u16; 5] = [
        // The header in three pieces, one of them empty.
        |d| {
            let header = [(HEADER, 1, 0), (HEADER + 1, 0, 0), (HEADER + 1, 15, 0)];
            d.chain(&[&header[..], &[(DATA, 1024, WRITE), (STATUS, 1, WRITE)]].concat())
        },
        // Data in odd pieces.
        |d| {
            d.chain(&[
                (HEADER, 16, 0),
                (DATA, 3, WRITE),
                (DATA + 3, 1000, WRITE),
                (DATA + 1003, 21, WRITE),
                (STATUS, 1, WRITE),
            ])
        },
        // Data and status in one piece; the status lands behind the data.
        |d| {
            let head = d.chain(&[(HEADER, 16, 0), (DATA, 1025, WRITE)]);
            d.put(DATA + 1024, &[0xaa]);
            head
        },
        // An indirect table.
        |d| d.indirect(&[(HEADER, 16, 0), (DATA, 1024, WRITE), (STATUS, 1, WRITE)]),
        // More pieces than one system call takes.
        |d| {
            let data = (0..128).map(|at| (DATA + 8 * at, 8, WRITE));
            let descs: Vec<Desc> =
                [(HEADER, 16, 0)].into_iter().chain(data).chain([(STATUS, 1, WRITE)]).collect();
            d.indirect(&descs)
        },
    ];
    let dir = tempfile::tempdir().unwrap();
    let file = config(image(&dir));
    for (index, layout) in layouts.into_iter().enumerate() {
        for device in [disk.device(Execution::Worker), open(&file, Execution::Inline)] {
            let mut driver = Driver::started(device, ALL);
            driver.header(IN, 5);
            let head = layout(&mut driver);
            assert_eq!(driver.submit(head), 1025, "layout {index}");
            let status = if index == 2 { driver.get::<1>(DATA + 1024)[0] } else { driver.status() };
            assert_eq!(status, OK, "layout {index}");
            assert_eq!(driver.get_vec(DATA, 1024), pattern(DISK_SIZE)[2560..3584], "{index}");
        }
    }
}

#[test]
fn a_write_gathers_header_and_data_from_one_buffer() {
    let disk = MemDisk::new();
    let mut driver = Driver::started(disk.device(Execution::Inline), ALL);
    driver.header(OUT, 1);
    driver.put(HEADER + 16, &[0x11; 200]);
    driver.put(DATA, &[0x22; 312]);
    let head = driver.chain(&[(HEADER, 216, 0), (DATA, 312, 0), (STATUS + 0x400, 1, WRITE)]);
    assert_eq!(driver.submit(head), 1);
    assert_eq!(driver.get::<1>(STATUS + 0x400), [OK]);
    let bytes = disk.bytes.lock().unwrap();
    assert_eq!(bytes[512..1024], [[0x11; 200].as_slice(), &[0x22; 312]].concat());
}

#[test]
fn wrong_requests_are_answered_with_an_error_and_change_nothing() {
    let disk = MemDisk::new();
    let last = DISK_SIZE as u64 / 512;
    let mut driver = Driver::started(disk.device(Execution::Inline), ALL);
    driver.put(DATA, &[0x77; 4096]);
    for (kind, sector, len, status) in [
        (IN, last, 512, IOERR),
        (IN, last - 1, 1024, IOERR),
        (IN, u64::MAX, 512, IOERR),
        (IN, u64::MAX / 512, 512, IOERR),
        (IN, 0, 511, IOERR),
        (OUT, last, 512, IOERR),
        (OUT, 1 << 55, 512, IOERR),
        (OUT, 0, 100, IOERR),
        (2, 0, 512, UNSUPP),
        (99, 0, 0, UNSUPP),
        (u32::MAX, 0, 512, UNSUPP),
        (DISCARD, 0, 0, IOERR),
        (DISCARD, 0, 15, IOERR),
        (DISCARD, 0, 16 * 17, IOERR),
        (WRITE_ZEROES, 0, 32, IOERR),
    ] {
        assert_eq!(driver.request(kind, sector, len), (status, 1), "{kind} {sector} {len}");
    }
    assert!(*disk.bytes.lock().unwrap() == pattern(DISK_SIZE));
    assert_eq!(driver.request(IN, last - 1, 512), (OK, 513), "the device goes on");
}

#[test]
fn data_outside_ram_is_an_error_of_the_request_alone() {
    let disk = MemDisk::new();
    let mut driver = Driver::started(disk.device(Execution::Inline), ALL);
    for (addr, len) in [(0x1000, 512), (u64::MAX - 100, 512), (BUFFERS + RAM_SIZE - 0x1_0100, 512)]
    {
        for (kind, flags) in [(IN, WRITE), (OUT, 0)] {
            driver.header(kind, 0);
            let data = (DATA, 512, flags);
            let head =
                driver.chain(&[(HEADER, 16, 0), data, (addr, len, flags), (STATUS, 1, WRITE)]);
            assert_eq!(driver.submit(head), 1);
            assert_eq!(driver.status(), IOERR);
        }
    }
    assert!(*disk.bytes.lock().unwrap() == pattern(DISK_SIZE), "half a write");
    assert_eq!(driver.r(0x70), 0xf);
}

#[test]
fn a_chain_that_cannot_be_answered_asks_for_a_reset() {
    let cases: [&[Desc]; 6] = [
        &[(HEADER, 15, 0), (STATUS, 1, WRITE)],
        &[(HEADER, 16, 0)],
        &[(HEADER, 16, 0), (STATUS, 0, WRITE)],
        &[(STATUS, 1, WRITE)],
        &[(0x1000, 16, 0), (STATUS, 1, WRITE)],
        &[(HEADER, 16, 0), (0x1000, 1, WRITE)],
    ];
    for execution in [Execution::Inline, Execution::Worker] {
        for descs in cases {
            let disk = MemDisk::new();
            let mut driver = Driver::started(disk.device(execution), ALL);
            driver.header(FLUSH, 0);
            let head = driver.chain(descs);
            driver.offer(head);
            driver.ring();
            while driver.r(0x70) == 0xf {
                std::thread::yield_now();
            }
            assert_eq!((driver.r(0x70), driver.r(0x60)), (0x4f, 2));
            assert_eq!(driver.used_idx(), 0);
            driver.w(0x70, 0);
            driver.set_indexes(0);
            driver.start(ALL);
            assert_eq!(driver.request(IN, 0, 512), (OK, 513));
        }
    }
}

#[test]
fn a_read_only_disk_refuses_every_kind_of_write() {
    let dir = tempfile::tempdir().unwrap();
    let config = BlockConfig { read_only: true, ..config(image(&dir)) };
    let mut driver = Driver::started(open(&config, Execution::Worker), ALL);
    let offered = driver.offered();
    assert_ne!(offered & feature::RO, 0);
    assert_eq!(offered & (feature::DISCARD | feature::WRITE_ZEROES | feature::CONFIG_WCE), 0);
    assert_eq!(driver.request(IN, 0, 512), (OK, 513));
    assert_eq!(driver.request(OUT, 0, 512), (IOERR, 1));
    assert_eq!(driver.ranges(DISCARD, &[(0, 8, 0)]), IOERR);
    assert_eq!(driver.ranges(WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
    assert_eq!(driver.request(FLUSH, 0, 0), (OK, 1));
    assert!(std::fs::read(&config.path).unwrap() == pattern(DISK_SIZE));
}

#[test]
fn discard_and_write_zeroes_change_their_ranges_only() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(image(&dir));
    let mut driver = Driver::started(open(&config, Execution::Worker), ALL);
    assert_eq!(driver.ranges(WRITE_ZEROES, &[(3, 5, 0)]), OK);
    assert_eq!(driver.ranges(WRITE_ZEROES, &[(17, 30, 1)]), OK);
    assert_eq!(driver.ranges(DISCARD, &[(64, 8, 0), (100, 0, 0), (80, 16, 0)]), OK);
    assert_eq!(driver.request(FLUSH, 0, 0), (OK, 1));
    let mut expected = pattern(DISK_SIZE);
    let file = std::fs::read(&config.path).unwrap();
    for (sector, sectors, may_stay) in
        [(3, 5, false), (17, 30, false), (64, 8, true), (80, 16, true)]
    {
        let range = sector * 512..(sector + sectors) * 512;
        // A discard is a hint: a file system without holes keeps the data.
        if !may_stay || file[range.clone()] != expected[range.clone()] {
            expected[range].fill(0);
        }
    }
    assert!(file == expected);
}

#[test]
fn wrong_ranges_are_refused_before_any_is_carried_out() {
    let disk = MemDisk::new();
    let last = DISK_SIZE as u64 / 512;
    let mut driver = Driver::started(disk.device(Execution::Inline), ALL);
    let good = (0, 8, 0);
    for (bad, status) in [
        ((0, 8, 1), UNSUPP),
        ((0, 8, 2), UNSUPP),
        ((last, 1, 0), IOERR),
        ((0, last as u32 + 1, 0), IOERR),
        ((u64::MAX, 1, 0), IOERR),
        ((0, MAX_DISCARD_SECTORS + 1, 0), IOERR),
        ((0, u32::MAX, 0), IOERR),
    ] {
        assert_eq!(driver.ranges(DISCARD, &[good, bad]), status, "{bad:?}");
    }
    for (bad, status) in [((0, 8, 2), UNSUPP), ((last, 1, 1), IOERR), ((0, u32::MAX, 0), IOERR)] {
        assert_eq!(driver.ranges(WRITE_ZEROES, &[bad]), status, "{bad:?}");
    }
    assert!(*disk.bytes.lock().unwrap() == pattern(DISK_SIZE));
}

#[test]
fn the_cache_mode_decides_whether_a_write_is_flushed() {
    let flushes_of_a_write = |features, writeback: Option<u64>| {
        let disk = MemDisk::new();
        let mut driver = Driver::started(disk.device(Execution::Worker), features);
        if let Some(value) = writeback {
            driver.dev.write(0x120, 1, value);
            assert_eq!(driver.dev.read(0x120, 1), value);
        }
        assert_eq!(driver.request(OUT, 0, 512), (OK, 1));
        disk.flushes.load(Ordering::SeqCst)
    };
    assert_eq!(flushes_of_a_write(ALL, None), 0);
    assert_eq!(flushes_of_a_write(ALL, Some(0)), 1);
    assert_eq!(flushes_of_a_write(ALL, Some(1)), 0);
    assert_eq!(flushes_of_a_write(feature::FLUSH, None), 0);
    assert_eq!(flushes_of_a_write(0, None), 1, "a driver that cannot flush");
}

#[test]
fn an_error_of_the_host_is_an_error_of_the_request_alone() {
    let disk = MemDisk { error: Some(28), ..MemDisk::new() };
    let mut driver = Driver::started(disk.device(Execution::Worker), ALL);
    assert_eq!(driver.request(OUT, 0, 512), (IOERR, 1));
    assert_eq!(driver.request(IN, 0, 512), (IOERR, 1));
    assert_eq!(driver.request(FLUSH, 0, 0), (OK, 1));
}

#[test]
fn a_disk_that_cannot_be_used_is_refused_by_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let try_open = |path: PathBuf| {
        Block::open(&config(path), Execution::Inline, ManualClock::new(0, 0)).err().unwrap()
    };
    let missing = try_open(dir.path().join("missing"));
    assert!(
        matches!(&missing, BlockError::Open { source, .. } if source.kind() == io::ErrorKind::NotFound)
    );
    assert!(matches!(try_open(dir.path().into()), BlockError::NotADisk { .. }));
    for size in [0, 511, 513] {
        let path = dir.path().join(size.to_string());
        File::create(&path).unwrap().set_len(size).unwrap();
        assert!(matches!(try_open(path), BlockError::Size { size: found, .. } if found == size));
    }
    let limits = RateLimiterConfig { bandwidth: None, ops: None };
    let limited = BlockConfig { rate_limiter: Some(limits), ..config(image(&dir)) };
    let error = Block::open(&limited, Execution::Inline, ManualClock::new(0, 0)).err().unwrap();
    assert!(matches!(error, BlockError::RateLimitInline { .. }));
    let bucket = BucketConfig { size: 0, one_time_burst: 0, refill_time_ms: 1 };
    let limits = RateLimiterConfig { bandwidth: None, ops: Some(bucket) };
    let limited = BlockConfig { rate_limiter: Some(limits), ..limited };
    let error = Block::open(&limited, Execution::Worker, ManualClock::new(0, 0)).err().unwrap();
    assert!(matches!(error, BlockError::RateLimit { .. }));
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let dir = tempfile::tempdir().unwrap();
    let rw = config(image(&dir));
    let ro = BlockConfig { read_only: true, ..rw.clone() };
    let try_open = |config| Block::open(config, Execution::Worker, ManualClock::new(0, 0));
    let writer = try_open(&rw).unwrap();
    for config in [&rw, &ro] {
        let error = try_open(config).err().unwrap();
        assert!(matches!(error, BlockError::InUse { .. }));
        assert!(error.to_string().contains("in use by another VM"));
    }
    drop(writer);
    let readers = [try_open(&ro).unwrap(), try_open(&ro).unwrap()];
    assert!(matches!(try_open(&rw).err().unwrap(), BlockError::InUse { .. }));
    drop(readers);
    try_open(&rw).unwrap();
}

#[test]
fn memory_beside_the_buffers_is_not_touched() {
    let mut driver = Driver::started(MemDisk::new().device(Execution::Inline), ALL);
    driver.put(DATA - 1, &[0xcc; 514]);
    assert_eq!(driver.request(IN, 0, 512), (OK, 513));
    assert_eq!((driver.get::<1>(DATA - 1), driver.get::<1>(DATA + 512)), ([0xcc], [0xcc]));
    let all: Vec<u8> = driver.get_vec(DATA, 512);
    assert_eq!(all, pattern(512));
}

#[test]
fn a_file_that_was_cut_behind_our_back_gives_errors_and_no_end_of_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(image(&dir));
    for execution in [Execution::Inline, Execution::Worker] {
        let mut driver = Driver::started(open(&config, execution), ALL);
        let file = File::options().write(true).open(&config.path).unwrap();
        file.set_len(1000).unwrap();
        assert_eq!(driver.request(IN, 0, 512), (OK, 513));
        assert_eq!(driver.request(IN, 1, 512), (IOERR, 1));
        assert_eq!(driver.request(IN, 100, 512), (IOERR, 1));
        file.set_len(DISK_SIZE as u64).unwrap();
        assert_eq!(driver.request(IN, 100, 512), (OK, 513));
    }
}
