//! Pause, snapshot, restore, reset, rate limits.

use super::*;

#[test]
fn a_pause_waits_for_the_request_in_flight_and_fails_at_its_deadline() {
    let disk = MemDisk::new();
    let mut driver = Driver::started(disk.device(Execution::Worker), ALL);
    disk.gate.set(true);
    let head = driver.prepare(IN, 0, 512);
    driver.offer(head);
    driver.ring();
    disk.gate.wait_for_a_visitor();
    let error = driver.dev.pause(Instant::now()).unwrap_err();
    assert!(matches!(error, PauseError::Deadline { in_flight: 1, .. }), "{error}");
    driver.dev.resume();
    disk.gate.set(false);
    assert_eq!(driver.wait(), (u32::from(head), 513), "the device works on");
    assert_eq!(driver.request(IN, 0, 512), (OK, 513));
    let far = Instant::now() + Duration::from_secs(600);
    driver.dev.pause(far).unwrap();
    driver.dev.pause(far).unwrap();
    let head = driver.prepare(IN, 0, 512);
    driver.offer(head);
    driver.ring();
    let section = save_section("root", &driver.dev).unwrap();
    assert_eq!(save_section("root", &driver.dev).unwrap(), section);
    assert_eq!((driver.used_idx(), driver.status()), (2, 0xaa), "nothing while it is paused");
    driver.dev.resume();
    driver.dev.resume();
    assert_eq!(driver.wait(), (u32::from(head), 513));
}

#[test]
fn a_pause_takes_effect_between_two_requests_and_the_rest_comes_after() {
    for _ in 0..20 {
        let disk = MemDisk::new();
        let mut driver = Driver::started(disk.device(Execution::Worker), ALL);
        let head = driver.prepare(IN, 0, 512);
        for _ in 0..12 {
            driver.offer(head);
        }
        driver.ring();
        driver.dev.pause(Instant::now() + Duration::from_secs(600)).unwrap();
        let section = save_section("root", &driver.dev).unwrap();
        let before = driver.used_idx();
        let mut other = driver.moved_to(disk.device(Execution::Worker));
        restore_section(&mut other.dev, &section).unwrap();
        assert_eq!(save_section("root", &other.dev).unwrap(), section);
        assert_eq!((driver.used_idx(), other.used_idx()), (before, before));
        other.dev.resume();
        driver.dev.resume();
        for _ in 0..12 {
            assert_eq!((other.wait().1, driver.wait().1), (513, 513));
        }
        assert_eq!(other.request(FLUSH, 0, 0), (OK, 1));
    }
}

#[test]
fn a_doorbell_rung_before_the_snapshot_is_answered_inline_after_it() {
    let disk = MemDisk::new();
    let mut driver = Driver::started(disk.device(Execution::Worker), ALL);
    driver.dev.pause(Instant::now() + Duration::from_secs(600)).unwrap();
    let head = driver.prepare(IN, 0, 512);
    driver.offer(head);
    driver.ring();
    let section = save_section("root", &driver.dev).unwrap();
    let mut other = driver.moved_to(disk.device(Execution::Inline));
    restore_section(&mut other.dev, &section).unwrap();
    assert_eq!(other.used_idx(), 0, "not before the machine goes on");
    other.dev.resume();
    assert_eq!(other.used_idx(), 1);
}

#[test]
fn a_reset_waits_for_the_request_in_flight() {
    let disk = MemDisk::new();
    let mut driver = Driver::started(disk.device(Execution::Worker), ALL);
    disk.gate.set(true);
    let head = driver.prepare(IN, 0, 512);
    driver.offer(head);
    driver.ring();
    disk.gate.wait_for_a_visitor();
    let gate = disk.gate.clone();
    let opener = std::thread::spawn(move || gate.set(false));
    driver.w(0x70, 0);
    assert_eq!(disk.gate.waiting.load(Ordering::SeqCst), 0);
    let settled = driver.used_idx();
    opener.join().unwrap();
    assert_eq!((driver.used_idx(), driver.r(0x60)), (settled, 0));
    driver.set_indexes(0);
    driver.start(ALL);
    assert_eq!(driver.request(IN, 0, 512), (OK, 513));
}

#[test]
fn a_worker_that_ended_is_reported() {
    let disk = MemDisk { panics: true, ..MemDisk::new() };
    let mut driver = Driver::started(disk.device(Execution::Worker), ALL);
    disk.gate.set(true);
    let head = driver.prepare(IN, 0, 512);
    driver.offer(head);
    driver.ring();
    disk.gate.wait_for_a_visitor();
    disk.gate.set(false);
    let error = driver.dev.pause(Instant::now() + Duration::from_secs(600)).unwrap_err();
    assert!(matches!(error, PauseError::WorkerGone { .. }), "{error}");
    assert!(save_section("root", &driver.dev).is_err());
    driver.w(0x70, 0);
    assert_eq!(driver.r(0x70), 0);
}

#[test]
fn a_throttled_queue_is_served_when_its_time_comes() {
    let ops = Some(BucketConfig { size: 1, one_time_burst: 0, refill_time_ms: 1 });
    let limits = RateLimiterConfig { bandwidth: None, ops };
    let config = BlockConfig { rate_limiter: Some(limits), ..config(PathBuf::new()) };
    let clock = Arc::new(crate::clock::HostClock::new());
    let disk = Box::new(MemDisk::new());
    let device = Block::with_disk(&config, disk, Execution::Worker, clock).unwrap();
    let mut driver = Driver::started(device, ALL);
    let head = driver.prepare(IN, 0, 512);
    for _ in 0..5 {
        driver.offer(head);
    }
    driver.ring();
    for _ in 0..5 {
        assert_eq!(driver.wait(), (u32::from(head), 513));
    }
}

#[test]
fn a_throttled_queue_is_armed_again_by_a_restore() {
    const HOUR_NS: u64 = 3_600_000_000_000;
    let ops = Some(BucketConfig { size: 1, one_time_burst: 0, refill_time_ms: 3_600_000 });
    let limits = Some(RateLimiterConfig { bandwidth: None, ops });
    let disk = MemDisk::new();
    let clock = ManualClock::new(0, 1 << 60);
    let mut driver = Driver::started(disk.limited(Execution::Worker, limits, clock), ALL);
    let head = driver.prepare(IN, 0, 512);
    driver.offer(head);
    driver.offer(head);
    driver.ring();
    assert_eq!(driver.wait(), (u32::from(head), 513));
    driver.dev.pause(Instant::now() + Duration::from_secs(600)).unwrap();
    let section = save_section("root", &driver.dev).unwrap();
    let later = ManualClock::new(5, (1 << 60) + HOUR_NS);
    let mut other = driver.moved_to(disk.limited(Execution::Worker, limits, later));
    restore_section(&mut other.dev, &section).unwrap();
    assert_eq!(save_section("root", &other.dev).unwrap(), section);
    assert_eq!(other.used_idx(), 1);
    other.dev.resume();
    assert_eq!(other.wait(), (u32::from(head), 513));
    let mut unlimited = driver.moved_to(disk.device(Execution::Worker));
    assert!(restore_section(&mut unlimited.dev, &section).is_err());
}

#[test]
fn a_state_of_another_disk_is_refused_by_name() {
    let disk = MemDisk::new();
    let mut driver = Driver::started(disk.device(Execution::Inline), ALL);
    let good = driver.dev.save().unwrap();
    let clock = ManualClock::new(0, 0);
    let ro = BlockConfig { read_only: true, ..config(PathBuf::new()) };
    let ro = Block::with_disk(&ro, Box::new(disk), Execution::Inline, clock).unwrap();
    let mut ro = driver.moved_to(ro);
    let field = |result| match result {
        Err(PersistError::Invalid { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(field(ro.dev.restore(good.clone())), "read_only");
    let longer = BlockState { sectors: good.sectors + 1, ..good.clone() };
    assert_eq!(field(driver.dev.restore(longer)), "sectors");
    let other_mode = BlockState { read_only: true, ..good };
    assert_eq!(field(driver.dev.restore(other_mode)), "read_only");
}

fn limits() -> RateLimiterConfig {
    let bucket = |size| BucketConfig { size, one_time_burst: 1000, refill_time_ms: 50 };
    RateLimiterConfig { bandwidth: Some(bucket(1 << 20)), ops: Some(bucket(100)) }
}

fn machine(execution: Execution, limits: Option<RateLimiterConfig>) -> VirtioMmio<Block> {
    let block = MemDisk::new().limited(execution, limits, ManualClock::new(9, 1 << 60));
    VirtioMmio::new(block, GuestRam::new(RAM_SIZE).unwrap(), line())
}

fn use_it(device: &mut VirtioMmio<Block>, fresh: VirtioMmio<Block>) {
    let mut driver = Driver::adopt(std::mem::replace(device, fresh));
    driver.dev.resume();
    driver.start(ALL);
    driver.dev.write(0x120, 1, 0);
    for _ in 0..3 {
        assert_eq!(driver.request(IN, 0, 512), (OK, 513));
    }
    driver.dev.pause(Instant::now() + Duration::from_secs(600)).unwrap();
    *device = driver.dev;
}

squib_formats::persist_contract! {
    mod inline_contract,
    device: VirtioMmio<Block>,
    fresh: || machine(Execution::Inline, None),
    change: |device| use_it(device, machine(Execution::Inline, None)),
}

squib_formats::persist_contract! {
    mod worker_contract,
    device: VirtioMmio<Block>,
    fresh: || {
        let mut device = machine(Execution::Worker, Some(limits()));
        device.pause(Instant::now() + Duration::from_secs(600)).unwrap();
        device
    },
    change: |device| use_it(device, machine(Execution::Worker, Some(limits()))),
}

/// What a driver does next.
#[derive(Clone, Debug)]
enum Act {
    Offer { kind: u32, sector: u64, len: u32, indirect: bool, slot: u64 },
    Ring,
    Acknowledge,
    UsedEvent(u16),
    CacheMode(bool),
}

fn act() -> impl Strategy<Value = Act> {
    let kind = prop::sample::select(vec![IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 77]);
    prop_oneof![
        4 => (kind, 0u64..520, 0u32..9, any::<bool>(), 0u64..8).prop_map(
            |(kind, sector, len, indirect, slot)| {
                Act::Offer { kind, sector, len: len * 256, indirect, slot }
            }
        ),
        3 => Just(Act::Ring),
        1 => Just(Act::Acknowledge),
        1 => (0u16..60).prop_map(Act::UsedEvent),
        1 => any::<bool>().prop_map(Act::CacheMode),
    ]
}

fn perform(driver: &mut BlockDriver, open: &mut u32, act: &Act) {
    match *act {
        Act::Offer { kind, sector, len, indirect, slot } => {
            if *open == 4 {
                return;
            }
            *open += 1;
            let at = BUFFERS + 0x4000 * (1 + slot);
            driver.put(at, &kind.to_le_bytes());
            driver.put(at + 8, &sector.to_le_bytes());
            let flags = if matches!(kind, IN | GET_ID) { WRITE } else { 0 };
            if matches!(kind, DISCARD | WRITE_ZEROES) {
                driver.put(at + 0x1000, &sector.to_le_bytes());
                driver.put(at + 0x1008, &len.to_le_bytes());
                driver.put(at + 0x100c, &[0; 4]);
            }
            let len = if matches!(kind, DISCARD | WRITE_ZEROES) { 16 } else { len };
            let descs = [(at, 16, 0), (at + 0x1000, len, flags), (at + 0x3000, 1, WRITE)];
            let head = if indirect { driver.indirect(&descs) } else { driver.chain(&descs) };
            driver.offer(head);
        }
        Act::Ring => {
            *open = 0;
            driver.ring();
        }
        Act::Acknowledge => driver.w(0x64, 3),
        Act::UsedEvent(event) => driver.set_used_event(event),
        Act::CacheMode(writeback) => driver.dev.write(0x120, 1, writeback.into()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn inline_a_restored_device_goes_on_bit_for_bit(
        acts in prop::collection::vec(act(), 1..60),
        away in any::<prop::sample::Index>(),
        features in prop::sample::select(vec![ALL, 0, ALL & !(1 << 29)]),
    ) {
        let (stayed_disk, mut open) = (MemDisk::new(), 0);
        let mut stayed = Driver::started(stayed_disk.device(Execution::Inline), features);
        let (before, after) = acts.split_at(away.index(acts.len()));
        before.iter().for_each(|act| perform(&mut stayed, &mut open, act));

        stayed.dev.pause(Instant::now()).unwrap();
        let section = save_section("root", &stayed.dev).unwrap();
        let restored_disk = stayed_disk.copy();
        let mut restored = stayed.moved_to(restored_disk.device(Execution::Inline));
        restore_section(&mut restored.dev, &section).unwrap();
        restored.dev.resume();
        stayed.dev.resume();
        let edges = stayed.interrupts();

        let mut restored_open = open;
        for act in after {
            perform(&mut stayed, &mut open, act);
            perform(&mut restored, &mut restored_open, act);
            prop_assert_eq!(stayed.interrupts() - edges, restored.interrupts());
            prop_assert_eq!(stayed.r(0x60), restored.r(0x60));
        }
        let ram = |driver: &BlockDriver| driver.get_vec(driver.ram.base(), RAM_SIZE as usize);
        prop_assert!(ram(&stayed) == ram(&restored), "memory differs");
        prop_assert!(*stayed_disk.bytes.lock().unwrap() == *restored_disk.bytes.lock().unwrap());
        prop_assert_eq!(
            save_section("root", &stayed.dev).unwrap(),
            save_section("root", &restored.dev).unwrap()
        );
    }

    #[test]
    fn random_traffic_and_damaged_states_never_panic(
        seed in any::<[u8; 32]>(),
        traffic in prop::collection::vec((0u64..0x140, any::<u64>(), any::<bool>()), 0..40),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        inline in any::<bool>(),
        bias in 0u8..4,
    ) {
        let execution = if inline { Execution::Inline } else { Execution::Worker };
        let ram = GuestRam::new(RAM_SIZE).unwrap();
        let mut noise = vec![0; 0x8000];
        blake3::Hasher::new_keyed(&seed).finalize_xof().fill(&mut noise);
        noise.iter_mut().for_each(|byte| *byte &= [0xff, 0x0f, 0x03, 0x01][usize::from(bias)]);
        let mut driver = Driver::with_ram(MemDisk::new().device(execution), ram);
        driver.start(ALL);
        driver.request(IN, 0, 512);
        let good = save_section("root", &driver.dev).unwrap();
        driver.put(driver.ram.base(), &noise);
        for (offset, value, write) in &traffic {
            if *write {
                driver.w(offset & !3, *value as u32);
                driver.w(offset & !3, *value as u32 & 0xf);
                driver.ring();
            } else {
                driver.dev.read(*offset, 4);
            }
        }
        let mut section = good;
        for (index, value) in damage {
            let index = index.index(section.payload.len());
            section.payload[index] = value;
        }
        if restore_section(&mut driver.dev, &section).is_ok() {
            driver.dev.resume();
            driver.ring();
            driver.r(0x70);
        }
        driver.dev.pause(Instant::now() + Duration::from_secs(600)).unwrap();
        save_section("root", &driver.dev).unwrap();
    }
}
