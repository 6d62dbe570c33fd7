use proptest::prelude::*;
use squib_formats::persist::{restore_section, save_section};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    map::RAM_BASE,
    virtio::{
        rng::{Entropy, Rng},
        test_driver::{
            AVAIL, BUFFERS, DESC, Driver, INDIRECT, NEXT, RAM_SIZE, TABLE, USED, WRITE, line,
        },
    },
};

type RngDriver = Driver<Rng>;

fn rng() -> Rng {
    Rng::new(Entropy::seeded([3; 32]))
}

fn started() -> RngDriver {
    Driver::started(rng(), u64::MAX)
}

#[test]
fn the_identity_registers_say_what_the_device_is() {
    let mut driver = Driver::new(rng());
    assert_eq!([driver.r(0), driver.r(4), driver.r(8)], [0x7472_6976, 2, 4]);
    assert_eq!(driver.r(0xc).to_le_bytes(), *b"sqib");
    assert_eq!(driver.r(0x34), 64);
    driver.w(0x30, 1);
    assert_eq!(driver.r(0x34), 0, "there is no second queue");
    for shared_memory in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(driver.r(shared_memory), u32::MAX);
    }
    assert_eq!(driver.offered(), TRANSPORT_FEATURES);
    driver.w(0x14, 2);
    assert_eq!(driver.r(0x10), 0);
}

#[test]
fn registers_answer_32_bit_accesses_only() {
    let mut driver = Driver::new(rng());
    for size in [1, 2, 8] {
        assert_eq!(driver.dev.read(0, size), 0);
        driver.dev.write(0x70, size, 1);
        assert_eq!(driver.r(0x70), 0);
    }
}

#[test]
fn features_that_were_not_offered_clear_features_ok() {
    for accepted in [VIRTIO_F_VERSION_1 | 1 << 5, VIRTIO_F_VERSION_1 | 1 << 40, 1 << 29] {
        let mut driver = Driver::new(rng());
        driver.w(0x70, 1);
        driver.w(0x70, 3);
        driver.accept(accepted);
        driver.w(0x70, 0xb);
        assert_eq!(driver.r(0x70), 3);
        driver.accept(VIRTIO_F_VERSION_1);
        driver.w(0x70, 0xb);
        assert_eq!(driver.r(0x70), 0xb);
    }
}

#[test]
fn features_are_frozen_by_features_ok() {
    let mut driver = Driver::new(rng());
    driver.negotiate(VIRTIO_F_EVENT_IDX);
    driver.accept(u64::MAX);
    let accepted = save_section("rng", &driver.dev).unwrap();
    driver.accept(VIRTIO_F_VERSION_1);
    assert_eq!(save_section("rng", &driver.dev).unwrap().payload, accepted.payload);
}

#[test]
fn status_bits_come_in_order_and_only_a_reset_clears_them() {
    let mut driver = Driver::new(rng());
    driver.w(0x70, 4);
    assert_eq!(driver.r(0x70), 0, "DRIVER_OK out of the blue");
    driver.w(0x70, 2);
    assert_eq!(driver.r(0x70), 0, "DRIVER before ACKNOWLEDGE");
    driver.w(0x70, 3);
    driver.w(0x70, 7);
    assert_eq!(driver.r(0x70), 3, "DRIVER_OK before FEATURES_OK");
    driver.w(0x70, 1);
    assert_eq!(driver.r(0x70), 3, "a bit is cleared");
    driver.w(0x70, 0x43);
    assert_eq!(driver.r(0x70), 3, "DEVICE_NEEDS_RESET is the device's");
    driver.w(0x70, 0x83);
    assert_eq!(driver.r(0x70), 0x83);
    driver.w(0x70, 0);
    assert_eq!(driver.r(0x70), 0);
}

#[test]
fn a_reset_brings_every_register_back() {
    let fresh = save_section("rng", &Driver::new(Rng::new(Entropy::Os)).dev).unwrap();
    let mut driver = Driver::started(Rng::new(Entropy::Os), u64::MAX);
    let head = driver.chain(&[(BUFFERS, 8, WRITE)]);
    driver.submit(head);
    assert_eq!(driver.r(0x60), 1);
    driver.w(0x30, 5);
    driver.w(0x70, 0);
    assert_eq!(save_section("rng", &driver.dev).unwrap(), fresh);
    assert_eq!(driver.r(0x60), 0);
}

#[test]
fn a_ring_that_cannot_be_used_asks_for_a_reset_and_the_reset_helps() {
    let end = RAM_BASE + RAM_SIZE;
    for (register, address) in [
        (0x80, RAM_BASE - 16),
        (0x80, end - 16),
        (0x80, DESC + 8),
        (0x80, u64::MAX - 15),
        (0x90, 0),
        (0x90, end - 4),
        (0x90, AVAIL + 1),
        (0xa0, end - 8),
        (0xa0, USED + 2),
        (0xa0, u64::MAX - 3),
    ] {
        let mut driver = Driver::new(rng());
        driver.negotiate(u64::MAX);
        driver.set_up_queue();
        driver.w(0x44, 0);
        driver.w(register, address as u32);
        driver.w(register + 4, (address >> 32) as u32);
        driver.w(0x44, 1);
        assert_eq!((driver.r(0x44), driver.r(0x70)), (0, 0x4b), "{register:#x} {address:#x}");
        assert_eq!(driver.interrupts(), 0, "the driver is not ready for one");
        driver.start(u64::MAX);
        let head = driver.chain(&[(BUFFERS, 8, WRITE)]);
        assert_eq!(driver.submit(head), 8);
    }
}

#[test]
fn a_queue_size_that_is_not_allowed_is_not_taken() {
    let mut driver = Driver::new(rng());
    driver.negotiate(u64::MAX);
    let before = save_section("rng", &driver.dev).unwrap();
    for num in [0, 3, 65, 128, 0x1_0010, u32::MAX] {
        driver.w(0x38, num);
    }
    assert_eq!(save_section("rng", &driver.dev).unwrap(), before);
}

#[test]
fn a_queue_is_not_moved_while_it_is_ready() {
    let mut driver = started();
    let before = save_section("rng", &driver.dev).unwrap();
    for register in [0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
        driver.w(register, 8);
    }
    assert_eq!(save_section("rng", &driver.dev).unwrap(), before);
}

#[test]
fn a_stopped_queue_is_left_alone_and_starts_anew() {
    let mut driver = started();
    let head = driver.chain(&[(BUFFERS, 8, WRITE)]);
    driver.submit(head);
    driver.w(0x44, 0);
    assert_eq!(driver.r(0x44), 0);
    driver.offer(head);
    driver.ring();
    assert_eq!(driver.used_idx(), 1);
    driver.set_indexes(0);
    driver.w(0x44, 1);
    assert_eq!(driver.submit(head), 8);
    assert_eq!(driver.used_idx(), 1);
}

#[test]
fn nothing_is_served_before_driver_ok() {
    let mut driver = Driver::new(rng());
    driver.negotiate(u64::MAX);
    driver.set_up_queue();
    let head = driver.chain(&[(BUFFERS, 8, WRITE)]);
    driver.offer(head);
    driver.ring();
    assert_eq!(driver.used_idx(), 0);
    driver.w(0x70, 0xf);
    driver.ring();
    assert_eq!(driver.wait(), (0, 8));
}

#[test]
fn every_event_is_an_edge_and_the_driver_acknowledges_it() {
    let mut driver = Driver::started(rng(), 0);
    for count in 1..=3 {
        let head = driver.chain(&[(BUFFERS, 8, WRITE)]);
        driver.submit(head);
        assert_eq!((driver.r(0x60), driver.interrupts()), (1, count));
    }
    driver.w(0x64, 2);
    assert_eq!(driver.r(0x60), 1);
    driver.w(0x64, 1);
    assert_eq!(driver.r(0x60), 0);
}

#[test]
fn no_interrupt_where_the_driver_wants_none() {
    let mut driver = Driver::started(rng(), 0);
    driver.set_avail_flags(1);
    let head = driver.chain(&[(BUFFERS, 8, WRITE)]);
    driver.submit(head);
    assert_eq!((driver.r(0x60), driver.interrupts()), (0, 0));
    driver.set_avail_flags(0);
    driver.submit(head);
    assert_eq!((driver.r(0x60), driver.interrupts()), (1, 1));
}

#[test]
fn with_event_idx_the_interrupt_comes_at_the_index_asked_for() {
    let mut driver = started();
    driver.set_used_event(2);
    let head = driver.chain(&[(BUFFERS, 8, WRITE)]);
    for (used, interrupts) in [(1, 0), (2, 0), (3, 1), (4, 1)] {
        driver.submit(head);
        assert_eq!((driver.used_idx(), driver.interrupts()), (used, interrupts));
        assert_eq!(driver.avail_event(), used, "the next chain is to be rung for");
    }
    // Three in one go, and the index asked for is the one in the middle.
    driver.set_used_event(5);
    for _ in 0..3 {
        driver.offer(head);
    }
    driver.ring();
    assert_eq!((driver.used_idx(), driver.interrupts()), (7, 2));
}

#[test]
fn indirect_and_divided_buffers_are_filled_as_one() {
    let mut driver = started();
    let parts = [(BUFFERS, 3, WRITE), (BUFFERS + 100, 0, WRITE), (BUFFERS + 200, 5, WRITE)];
    let head = driver.indirect(&parts);
    assert_eq!(driver.submit(head), 8);
    let divided = [driver.get_vec(BUFFERS, 3), driver.get_vec(BUFFERS + 200, 5)].concat();
    let mut whole = started();
    let head = whole.chain(&[(BUFFERS, 8, WRITE)]);
    assert_eq!(whole.submit(head), 8);
    assert_eq!(divided, whole.get_vec(BUFFERS, 8));
}

#[test]
fn a_hostile_chain_ends_in_a_reset_request_and_nothing_else() {
    const W: (u64, u32, u16) = (BUFFERS, 8, WRITE);
    type Build = fn(&mut RngDriver) -> u16;
    let cases: [(&str, Build); 9] = [
        ("a loop of one", |d| {
            d.raw_desc(0, (W.0, W.1, WRITE | NEXT), 0);
            0
        }),
        ("a loop of two", |d| {
            d.raw_desc(0, (W.0, W.1, WRITE | NEXT), 1);
            d.raw_desc(1, (W.0, W.1, WRITE | NEXT), 0);
            0
        }),
        ("a head behind the table", |_| 16),
        ("a successor behind the table", |d| {
            d.raw_desc(0, (W.0, W.1, WRITE | NEXT), 0xffff);
            0
        }),
        ("readable behind writable", |d| d.chain(&[W, (BUFFERS, 8, 0)])),
        ("an indirect table of an odd length", |d| d.chain(&[(TABLE, 17, INDIRECT)])),
        ("an empty indirect table", |d| d.chain(&[(TABLE, 0, INDIRECT)])),
        ("an indirect table inside another", |d| {
            d.put_desc(TABLE, 0, (TABLE, 16, INDIRECT), 0);
            d.chain(&[(TABLE, 16, INDIRECT)])
        }),
        ("an indirect table outside RAM", |d| d.chain(&[(u64::MAX - 15, 16, INDIRECT)])),
    ];
    for (what, build) in cases {
        let mut driver = started();
        let head = build(&mut driver);
        driver.offer(head);
        driver.ring();
        assert_eq!(driver.r(0x70), 0x4f, "{what}");
        assert_eq!((driver.r(0x60), driver.interrupts()), (2, 1), "{what}");
        driver.ring();
        assert_eq!((driver.used_idx(), driver.interrupts()), (0, 1), "{what}");
        let section = save_section("rng", &driver.dev).unwrap();
        let mut restored = driver.moved_to(rng());
        restore_section(&mut restored.dev, &section).unwrap();
        restored.dev.resume();
        assert_eq!(restored.r(0x70), 0x4f, "{what}");
        assert_eq!(restored.used_idx(), 0, "{what}");
    }
}

#[test]
fn a_chain_of_too_many_descriptors_is_refused() {
    let mut driver = started();
    let table = BUFFERS + 0x1000;
    for index in 0..2000 {
        driver.put_desc(table, index, (BUFFERS, 1, WRITE | NEXT), index + 1);
    }
    let head = driver.chain(&[(table, 16 * 2000, INDIRECT)]);
    driver.offer(head);
    driver.ring();
    assert_eq!(driver.r(0x70), 0x4f);
}

#[test]
fn an_available_index_that_jumps_too_far_is_refused() {
    let mut driver = started();
    driver.set_avail_idx(17);
    driver.ring();
    assert_eq!(driver.r(0x70), 0x4f);
    assert_eq!(driver.used_idx(), 0);
}

#[test]
fn negotiation_goes_on_after_a_restore_at_any_step() {
    let steps: [fn(&mut RngDriver); 9] = [
        |d| d.w(0x70, 1),
        |d| d.w(0x70, 3),
        |d| d.w(0x24, 1),
        |d| d.w(0x20, 1),
        |d| d.w(0x24, 0),
        |d| d.w(0x20, 1 << 29),
        |d| d.w(0x70, 0xb),
        |d| d.set_up_queue(),
        |d| d.w(0x70, 0xf),
    ];
    for away in 0..=steps.len() {
        let mut driver = Driver::new(rng());
        for (at, step) in steps.iter().enumerate() {
            if at == away {
                driver = reborn(&driver);
            }
            step(&mut driver);
        }
        if away == steps.len() {
            driver = reborn(&driver);
        }
        assert_eq!(driver.r(0x70), 0xf);
        let head = driver.chain(&[(BUFFERS, 8, WRITE)]);
        assert_eq!(driver.submit(head), 8);
        assert_eq!(driver.avail_event(), 1, "event_idx was accepted");
    }
}

/// The driver in front of a fresh device that took over the state of its own.
fn reborn(driver: &RngDriver) -> RngDriver {
    let section = save_section("rng", &driver.dev).unwrap();
    let mut other = driver.moved_to(rng());
    restore_section(&mut other.dev, &section).unwrap();
    other.dev.resume();
    assert_eq!(save_section("rng", &other.dev).unwrap(), section);
    other
}

#[test]
fn indexes_wrap_around_also_after_a_restore() {
    let mut driver = started();
    let mut state = driver.dev.save().unwrap();
    let queue = &mut state.transport.queues[0];
    (queue.next_avail, queue.next_used) = (0xffff, 0xffff);
    driver.dev.restore(state).unwrap();
    driver.set_indexes(0xffff);
    driver.set_used_event(0xffff);
    let head = driver.chain(&[(BUFFERS, 8, WRITE)]);
    for _ in 0..40 {
        assert_eq!(driver.submit(head), 8);
    }
    assert_eq!((driver.used_idx(), driver.interrupts()), (39, 1));
}

#[test]
fn a_state_that_no_driver_can_reach_is_refused_by_name() {
    let good = started().dev.save().unwrap();
    let mut driver = Driver::new(rng());
    type Damage = fn(&mut TransportState);
    let cases: [(&str, Damage); 14] = [
        ("transport.device_features", |s| s.device_features |= 1),
        ("transport.device_features", |s| s.device_features = 0),
        ("transport.driver_features", |s| s.driver_features |= 1),
        ("transport.driver_features", |s| s.driver_features = 0),
        ("transport.status", |s| s.status = 0x1f),
        ("transport.status", |s| s.status = 0x5),
        ("transport.interrupt_status", |s| s.interrupt_status = 4),
        ("transport.queues", |s| s.queues.clear()),
        ("transport.queues", |s| s.queues.push(s.queues[0].clone())),
        ("transport.queues.num", |s| s.queues[0].num = 12),
        ("transport.queues.num", |s| s.queues[0].num = 128),
        ("transport.queues", |s| s.queues[0].desc = 0),
        ("transport.queues.ready", |s| s.status = 3),
        ("transport.queues.next_avail", |s| s.queues[0].next_avail = 1),
    ];
    let before = save_section("rng", &driver.dev).unwrap();
    for (name, damage) in cases {
        let mut state = good.clone();
        damage(&mut state.transport);
        match driver.dev.restore(state) {
            Err(PersistError::Invalid { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
        assert_eq!(save_section("rng", &driver.dev).unwrap(), before, "{name}");
    }
    driver.dev.restore(good).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn random_register_traffic_on_random_memory_never_panics(
        seed in any::<[u8; 32]>(),
        traffic in prop::collection::vec((0u64..0x140, prop::sample::select(vec![1u8, 2, 4, 8]), any::<u64>(), any::<bool>()), 0..60),
        running in any::<bool>(),
        bias in 0u8..4,
    ) {
        let ram = GuestRam::new(RAM_SIZE).unwrap();
        let mut noise = vec![0; 0x8000];
        blake3::Hasher::new_keyed(&seed).finalize_xof().fill(&mut noise);
        // Small numbers make rings and chains that nearly hold together.
        noise.iter_mut().for_each(|byte| *byte &= [0xff, 0x0f, 0x03, 0x01][usize::from(bias)]);
        ram.write_slice(&noise, GuestAddress(RAM_BASE)).unwrap();
        let mut driver = Driver::with_ram(rng(), ram);
        if running {
            driver.start(u64::MAX);
        }
        for (offset, size, value, write) in traffic {
            let aligned = offset & !3;
            if write {
                driver.dev.write(aligned, size, value);
                driver.dev.write(offset, size, value & 0xf);
                driver.ring();
            } else {
                driver.dev.read(offset, size);
            }
        }
        let section = save_section("rng", &driver.dev).unwrap();
        let mut other = VirtioMmio::new(rng(), driver.ram.clone(), line());
        restore_section(&mut other, &section).unwrap();
        prop_assert_eq!(save_section("rng", &other).unwrap(), section);
    }
}
