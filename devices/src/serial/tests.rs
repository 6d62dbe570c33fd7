use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use parking_lot::Mutex;
use proptest::prelude::*;
use squib_formats::persist::{restore_section, save_section};

use super::*;
use crate::{irq::IrqChip, map::SERIAL_INTID};

#[derive(Default)]
struct Line(AtomicBool);

impl IrqChip for Line {
    fn set_spi(&self, intid: u32, level: bool) {
        assert_eq!(intid, SERIAL_INTID);
        self.0.store(level, Ordering::Relaxed);
    }
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Port {
    serial: Serial,
    line: Arc<Line>,
    sink: Sink,
}

impl Port {
    fn new() -> Self {
        let (line, sink) = (Arc::new(Line::default()), Sink::default());
        let irq = IrqLine::new(line.clone(), SERIAL_INTID);
        Self { serial: Serial::new(irq, Box::new(sink.clone())), line, sink }
    }

    fn with_fifo() -> Self {
        let mut port = Self::new();
        port.write(reg::IIR_FCR, FCR_ENABLE);
        port
    }

    fn read(&mut self, offset: u64) -> u8 {
        self.serial.read(offset, 1) as u8
    }

    fn write(&mut self, offset: u64, value: u8) {
        self.serial.write(offset, 1, value.into());
    }

    fn irq(&self) -> bool {
        self.line.0.load(Ordering::Relaxed)
    }
}

#[test]
fn bytes_written_reach_the_sink_in_order() {
    let mut port = Port::new();
    for byte in *b"squib" {
        assert_eq!(port.read(reg::LSR), LSR_THR_EMPTY | LSR_IDLE);
        port.write(reg::DATA, byte);
    }
    assert_eq!(*port.sink.0.lock(), b"squib");
}

#[test]
fn the_line_stays_high_until_the_last_received_byte_is_read() {
    let mut port = Port::with_fifo();
    port.write(reg::IER, IER_ERBFI);
    assert_eq!(port.serial.enqueue(b"ab"), 2);
    assert!(port.irq());
    assert_eq!(port.read(reg::IIR_FCR), IIR_FIFOS | IIR_RECEIVED);
    assert!(port.irq(), "reading IIR does not remove the cause");
    assert_eq!(port.read(reg::DATA), b'a');
    assert!(port.irq());
    assert_eq!(port.read(reg::DATA), b'b');
    assert!(!port.irq());
    assert_eq!(port.read(reg::IIR_FCR), IIR_FIFOS | IIR_NONE);
}

#[test]
fn fewer_bytes_than_the_trigger_level_are_a_time_out() {
    let mut port = Port::with_fifo();
    port.write(reg::IIR_FCR, FCR_ENABLE | 2 << 6);
    port.write(reg::IER, IER_ERBFI);
    port.serial.enqueue(&[0; 7]);
    assert_eq!(port.read(reg::IIR_FCR), IIR_FIFOS | IIR_TIMEOUT);
    port.serial.enqueue(&[0]);
    assert_eq!(port.read(reg::IIR_FCR), IIR_FIFOS | IIR_RECEIVED);
}

#[test]
fn input_that_does_not_fit_stays_with_the_caller_who_is_told_of_room_once() {
    let mut port = Port::with_fifo();
    port.write(reg::IER, IER_ERBFI);
    let calls = Arc::new(AtomicU32::new(0));
    let counter = calls.clone();
    port.serial.on_room(Box::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    }));
    assert_eq!(port.serial.enqueue(&[1; 20]), 16);
    assert_eq!(port.serial.enqueue(&[1; 4]), 0);
    assert_eq!(calls.load(Ordering::Relaxed), 0);
    port.read(reg::DATA);
    port.read(reg::DATA);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    assert_eq!(port.serial.enqueue(&[1; 2]), 2);
    port.read(reg::DATA);
    assert_eq!(calls.load(Ordering::Relaxed), 1, "nobody waits");
}

#[test]
fn without_fifos_one_byte_is_held() {
    let mut port = Port::new();
    port.write(reg::IER, IER_ERBFI);
    assert_eq!(port.serial.enqueue(b"ab"), 1);
    assert_eq!(port.read(reg::LSR) & LSR_DATA_READY, 1);
    port.write(reg::IIR_FCR, FCR_ENABLE);
    assert_eq!(port.serial.enqueue(b"b"), 1, "enabling the FIFOs makes room and loses nothing");
    assert_eq!(port.read(reg::DATA), b'a');
    port.write(reg::IIR_FCR, 0);
    assert_eq!(port.read(reg::LSR) & LSR_DATA_READY, 0, "disabling them clears");
}

#[test]
fn a_guest_that_does_not_listen_gets_no_input_until_it_does() {
    let mut port = Port::with_fifo();
    let told = Arc::new(AtomicBool::new(false));
    let hook = told.clone();
    port.serial.on_room(Box::new(move || hook.store(true, Ordering::Relaxed)));
    assert_eq!(port.serial.enqueue(b"ab"), 0);
    for _ in 0..100 {
        port.read(reg::LSR);
        port.write(reg::DATA, b'x');
    }
    assert!(!told.load(Ordering::Relaxed), "it only sends");
    port.write(reg::IIR_FCR, FCR_ENABLE | FCR_RESET_RECEIVER);
    port.write(reg::IER, IER_ERBFI);
    assert!(told.load(Ordering::Relaxed));
    assert_eq!(port.serial.enqueue(b"ab"), 2);
}

#[test]
fn a_guest_that_polls_listens() {
    let mut port = Port::with_fifo();
    assert_eq!(port.serial.enqueue(b"abc"), 0);
    for _ in 0..LISTENING_POLLS {
        port.read(reg::LSR);
    }
    assert_eq!(port.serial.enqueue(b"abc"), 3);
    for byte in *b"abc" {
        assert_eq!(port.read(reg::LSR) & LSR_DATA_READY, 1);
        assert_eq!(port.read(reg::DATA), byte);
    }
    assert_eq!(port.serial.enqueue(b"d"), 1);
}

#[test]
fn the_thr_interrupt_is_raised_by_enabling_it_and_cleared_by_reading_iir() {
    let mut port = Port::new();
    port.write(reg::IER, IER_ETBEI);
    assert!(port.irq());
    assert_eq!(port.read(reg::IIR_FCR), IIR_THR_EMPTY);
    assert!(!port.irq());
    assert_eq!(port.read(reg::IIR_FCR), IIR_NONE);
    port.write(reg::DATA, b'x');
    assert!(port.irq());
    port.write(reg::IER, 0);
    assert!(!port.irq());
}

#[test]
fn received_data_hides_the_thr_interrupt_without_clearing_it() {
    let mut port = Port::with_fifo();
    port.write(reg::IER, IER_ETBEI | IER_ERBFI);
    port.serial.enqueue(b"a");
    assert_eq!(port.read(reg::IIR_FCR) & 0xf, IIR_RECEIVED);
    port.read(reg::DATA);
    assert_eq!(port.read(reg::IIR_FCR) & 0xf, IIR_THR_EMPTY);
}

#[test]
fn loopback_returns_bytes_and_modem_outputs() {
    let mut port = Port::with_fifo();
    port.write(reg::MCR, MCR_LOOP | MCR_OUT2 | MCR_RTS);
    assert_eq!(port.read(reg::MSR) & 0xf0, MSR_DCD | MSR_CTS);
    for byte in 0..17 {
        port.write(reg::DATA, byte);
    }
    assert!(port.sink.0.lock().is_empty());
    assert_eq!(port.serial.room(), 0);
    assert_eq!(port.read(reg::LSR) & 0xf, LSR_DATA_READY | LSR_OVERRUN);
    assert_eq!(port.read(reg::LSR) & 0xf, LSR_DATA_READY, "reading LSR clears the overrun");
    assert_eq!(port.read(reg::DATA), 0);
    assert_eq!(port.read(reg::DATA), 1);
}

#[test]
fn modem_changes_are_reported_until_msr_is_read() {
    let mut port = Port::new();
    port.write(reg::IER, IER_EDSSI);
    assert!(!port.irq());
    port.write(reg::MCR, MCR_LOOP | MCR_OUT1 | MCR_RTS);
    assert!(port.irq());
    assert_eq!(port.read(reg::IIR_FCR), IIR_MODEM_STATUS);
    assert_eq!(port.read(reg::MSR), MSR_CTS | MSR_RI | 0b1010, "DSR and DCD fell");
    assert!(!port.irq());
    port.write(reg::MCR, MCR_LOOP | MCR_RTS);
    assert_eq!(port.read(reg::MSR), MSR_CTS | MSR_TERI);
}

#[test]
fn the_divisor_latch_covers_data_and_ier() {
    let mut port = Port::new();
    port.write(reg::LCR, LCR_DLAB | 3);
    port.write(reg::DATA, 0x34);
    port.write(reg::IER, 0x12);
    assert_eq!((port.read(reg::DATA), port.read(reg::IER)), (0x34, 0x12));
    port.write(reg::LCR, 3);
    assert_eq!((port.read(reg::DATA), port.read(reg::IER)), (0, 0));
    assert!(port.sink.0.lock().is_empty());
}

#[test]
fn a_restored_port_drives_its_line_and_keeps_its_input() {
    let mut port = Port::with_fifo();
    port.write(reg::IER, IER_ERBFI);
    port.serial.enqueue(b"xyz");
    let section = save_section("0", &port.serial).unwrap();
    let mut other = Port::new();
    restore_section(&mut other.serial, &section).unwrap();
    assert!(other.irq());
    assert_eq!([0; 3].map(|_| other.read(reg::DATA)), *b"xyz");
    assert!(!other.irq());
}

#[test]
fn a_state_that_cannot_be_is_refused_by_field() {
    let mut port = Port::with_fifo();
    let good = port.serial.save().unwrap();
    type Damage = fn(&mut SerialState);
    let cases: [(&str, Damage); 7] = [
        ("ier", |s| s.ier = 0x10),
        ("mcr", |s| s.mcr = 0x20),
        ("rx_trigger", |s| s.rx_trigger = 4),
        ("msr_delta", |s| s.msr_delta = 0x10),
        ("polls", |s| s.polls = 17),
        ("rx", |s| s.rx = vec![0; 17]),
        ("rx", |s| (s.fifo_enabled, s.rx) = (false, vec![0; 2])),
    ];
    for (expected, damage) in cases {
        let mut bad = good.clone();
        damage(&mut bad);
        match port.serial.restore(bad) {
            Err(PersistError::Invalid { field, .. }) => assert_eq!(field, expected),
            other => panic!("{expected}: {other:?}"),
        }
        assert_eq!(port.serial.save().unwrap(), good);
    }
}

proptest! {
    /// After any traffic the line equals what a restored port derives from the registers.
    #[test]
    fn any_traffic_leaves_a_state_that_restores(
        ops in prop::collection::vec((0u64..12, any::<u8>(), 0u8..3), 0..100),
    ) {
        let mut port = Port::new();
        for (offset, value, op) in ops {
            match op {
                0 => drop(port.read(offset)),
                1 => port.write(offset, value),
                _ => drop(port.serial.enqueue(&vec![value; usize::from(value % 20)])),
            }
        }
        let section = save_section("0", &port.serial).unwrap();
        let mut other = Port::new();
        restore_section(&mut other.serial, &section).unwrap();
        prop_assert_eq!(other.irq(), port.irq());
        prop_assert_eq!(save_section("0", &other.serial).unwrap(), section);
    }
}

squib_formats::persist_contract! {
    mod contract,
    device: Serial,
    fresh: || Port::new().serial,
    change: |serial| {
        let writes = [
            (reg::LCR, LCR_DLAB), (reg::DATA, 0x12), (reg::IER, 0x34), (reg::LCR, 3),
            (reg::IIR_FCR, FCR_ENABLE | 2 << 6), (reg::IER, IER_MASK), (reg::SCR, 0x5a),
            (reg::DATA, b'x'), (reg::MCR, MCR_LOOP | MCR_OUT2),
        ];
        for (offset, value) in writes {
            serial.write(offset, 1, value.into());
        }
        for byte in 0..17 {
            serial.write(reg::DATA, 1, byte);
        }
    },
}
