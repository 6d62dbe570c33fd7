//! Serial port: a 16550A (National Semiconductor PC16550D) whose interrupt is a level.
//!
//! Our own model, since the interrupt of the 16550 follows from its registers at every moment, and a
//! level-triggered line must fall when the cause is gone; a trigger that is only ever called when
//! something begins cannot drive it, and its state could not be saved.
//!
//! Transmission takes no time: the transmitter holding register is always empty. Received bytes wait
//! in the FIFO of 16 bytes; a character time-out is reported at once, so that a driver is told of few
//! bytes without a wait. One byte register at each of the offsets 0 to 7.
//!
//! Input is taken only from a guest that listens: one that has received-data interrupts enabled, or that
//! polls the line status. A driver that is not there yet resets the FIFO when it comes, and what was
//! typed ahead, or piped in, would be lost.

use std::{collections::VecDeque, io::Write};

use squib_formats::{
    first_version,
    persist::{Persist, PersistError},
};

use crate::{
    device::{MmioDevice, Pause},
    irq::IrqLine,
};
pub use state::SerialState;

/// Bytes of the receiver FIFO (PC16550D, section 8.0).
const FIFO_SIZE: usize = 16;

/// Reads of LSR in a row that show a guest waiting for input. The transmitter is never busy, so nobody
/// reads LSR more than a few times to send.
const LISTENING_POLLS: u8 = 16;

/// Register offsets (PC16550D, table II).
mod reg {
    /// RBR, THR, and DLL with the divisor latch open.
    pub(super) const DATA: u64 = 0;
    /// IER, and DLM with the divisor latch open.
    pub(super) const IER: u64 = 1;
    /// IIR when read, FCR when written.
    pub(super) const IIR_FCR: u64 = 2;
    pub(super) const LCR: u64 = 3;
    pub(super) const MCR: u64 = 4;
    pub(super) const LSR: u64 = 5;
    pub(super) const MSR: u64 = 6;
    pub(super) const SCR: u64 = 7;
}

/// IER: received data available.
const IER_ERBFI: u8 = 1 << 0;
/// IER: transmitter holding register empty.
const IER_ETBEI: u8 = 1 << 1;
/// IER: receiver line status.
const IER_ELSI: u8 = 1 << 2;
/// IER: modem status.
const IER_EDSSI: u8 = 1 << 3;
/// The bits that IER has.
const IER_MASK: u8 = 0x0f;

// IIR by falling priority (PC16550D, table IV).
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_RECEIVED: u8 = 0x04;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_THR_EMPTY: u8 = 0x02;
const IIR_MODEM_STATUS: u8 = 0x00;
const IIR_NONE: u8 = 0x01;
/// IIR bits 7 and 6: FIFOs enabled.
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_RESET_RECEIVER: u8 = 1 << 1;

const LCR_DLAB: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
/// The bits that MCR has.
const MCR_MASK: u8 = 0x1f;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_THR_EMPTY: u8 = 1 << 5;
const LSR_IDLE: u8 = 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
/// MSR's delta bits; RI has its delta on the trailing edge only.
const MSR_DELTA_MASK: u8 = 0x0f;
const MSR_TERI: u8 = 1 << 2;

/// The serial port.
pub struct Serial {
    // Runtime glue.
    out: Box<dyn Write + Send>,
    irq: IrqLine,
    on_room: Option<Box<dyn Fn() + Send>>,
    /// [`enqueue`](Self::enqueue) had to leave bytes with its caller.
    turned_away: bool,
    // What the guest sees.
    registers: Registers,
}

struct Registers {
    ier: u8,
    fifo_enabled: bool,
    /// FCR bits 7 and 6.
    rx_trigger: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    /// DLM and DLL.
    divisor: u16,
    /// MSR bits 3 to 0.
    msr_delta: u8,
    /// THR has become empty and neither IIR was read since nor was the interrupt's cause removed.
    thr_empty_pending: bool,
    /// LSR bit 1.
    overrun: bool,
    /// Reads of LSR since any other access but of RBR, at most [`LISTENING_POLLS`].
    polls: u8,
    rx: VecDeque<u8>,
}

impl Serial {
    /// A port in its reset state that sends to `out`.
    ///
    /// `out` gets each byte by one call from inside the guest's register access: it must not block,
    /// and passes the bytes on by itself (it is never flushed). A byte that it refuses is lost, as on
    /// an unconnected line.
    pub fn new(irq: IrqLine, out: Box<dyn Write + Send>) -> Self {
        Self { out, irq, on_room: None, turned_away: false, registers: Registers::new() }
    }

    /// Hands received bytes to the port, as many as its FIFO has room for, and returns that number.
    /// The caller keeps the others until there is room; see [`on_room`](Self::on_room).
    pub fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.room());
        self.registers.rx.extend(&bytes[..count]);
        self.turned_away = count < bytes.len();
        self.drive();
        count
    }

    /// How many bytes [`enqueue`](Self::enqueue) would take now; none while the guest does not listen, and
    /// none in loopback mode.
    pub fn room(&self) -> usize {
        let registers = &self.registers;
        match registers.listens() && !registers.looped() {
            true => registers.capacity().saturating_sub(registers.rx.len()),
            false => 0,
        }
    }

    /// Has `hook` called when there is room again after [`enqueue`](Self::enqueue) left bytes with its
    /// caller. It is called from inside the guest's register access, with the port locked: it must
    /// not block and not use the port.
    pub fn on_room(&mut self, hook: Box<dyn Fn() + Send>) {
        self.on_room = Some(hook);
    }

    /// Brings the interrupt line, and whoever waits for room, up to date.
    fn drive(&mut self) {
        self.irq.set(self.registers.interrupt() != IIR_NONE);
        if self.turned_away && self.room() > 0 {
            self.turned_away = false;
            if let Some(hook) = &self.on_room {
                hook();
            }
        }
    }
}

impl MmioDevice for Serial {
    fn read(&mut self, offset: u64, _size: u8) -> u64 {
        let value = self.registers.read(offset);
        self.drive();
        value.into()
    }

    fn write(&mut self, offset: u64, _size: u8, value: u64) {
        if let Some(sent) = self.registers.write(offset, value as u8)
            && let Err(error) = self.out.write_all(&[sent])
        {
            tracing::debug!(%error, "serial: a byte sent by the guest is lost");
        }
        self.drive();
    }
}

/// All work is done inside register accesses.
impl Pause for Serial {
    fn resume(&mut self) {
        self.drive();
    }
}

impl Registers {
    fn new() -> Self {
        Self {
            ier: 0,
            fifo_enabled: false,
            rx_trigger: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            divisor: 0,
            msr_delta: 0,
            thr_empty_pending: false,
            overrun: false,
            polls: 0,
            rx: VecDeque::with_capacity(FIFO_SIZE),
        }
    }

    fn read(&mut self, offset: u64) -> u8 {
        self.polls = match offset {
            // One that found a byte was not in vain: the guest still listens when it has read that.
            reg::LSR => (self.polls + 1).min(LISTENING_POLLS),
            reg::DATA => self.polls,
            _ => 0,
        };
        let divisor = self.divisor.to_le_bytes();
        match offset {
            reg::DATA if self.divisor_open() => divisor[0],
            reg::IER if self.divisor_open() => divisor[1],
            reg::DATA => self.rx.pop_front().unwrap_or(0),
            reg::IER => self.ier,
            reg::IIR_FCR => {
                let interrupt = self.interrupt();
                if interrupt == IIR_THR_EMPTY {
                    self.thr_empty_pending = false;
                }
                interrupt | if self.fifo_enabled { IIR_FIFOS } else { 0 }
            }
            reg::LCR => self.lcr,
            reg::MCR => self.mcr,
            reg::LSR => {
                let ready = if self.rx.is_empty() { 0 } else { LSR_DATA_READY };
                let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
                ready | overrun | LSR_THR_EMPTY | LSR_IDLE
            }
            reg::MSR => self.modem_inputs() | std::mem::take(&mut self.msr_delta),
            reg::SCR => self.scr,
            _ => 0,
        }
    }

    /// Writes a register; returns a byte that goes out on the line.
    fn write(&mut self, offset: u64, value: u8) -> Option<u8> {
        self.polls = 0;
        let [low, high] = self.divisor.to_le_bytes();
        match offset {
            reg::DATA if self.divisor_open() => self.divisor = u16::from_le_bytes([value, high]),
            reg::IER if self.divisor_open() => self.divisor = u16::from_le_bytes([low, value]),
            reg::DATA => {
                // Sent at once, so THR is empty again.
                self.thr_empty_pending = true;
                if !self.looped() {
                    return Some(value);
                }
                if self.rx.len() < self.capacity() {
                    self.rx.push_back(value);
                } else {
                    self.overrun = true;
                }
            }
            reg::IER => {
                // Enabling the interrupt while THR is empty raises it: drivers rely on that to start
                // transmission, and test for it.
                self.thr_empty_pending |= value & !self.ier & IER_ETBEI != 0;
                self.ier = value & IER_MASK;
            }
            reg::IIR_FCR => {
                let enable = value & FCR_ENABLE != 0;
                // Enabling the FIFOs clears them on the real thing; a byte that came in between the enabling
                // of its interrupt and that of the FIFOs is kept here, for it would be lost.
                let leaves_fifo_mode = self.fifo_enabled && !enable;
                if leaves_fifo_mode || (enable && value & FCR_RESET_RECEIVER != 0) {
                    self.rx.clear();
                }
                self.fifo_enabled = enable;
                // The other bits are programmed only if bit 0 is set in the same write.
                self.rx_trigger = if enable { value >> 6 } else { 0 };
            }
            reg::LCR => self.lcr = value,
            reg::MCR => {
                let before = self.modem_inputs();
                self.mcr = value & MCR_MASK;
                let after = self.modem_inputs();
                let changed = (before ^ after) >> 4 & !MSR_TERI;
                let ring_ended = (before & !after & MSR_RI) >> 4;
                self.msr_delta |= changed | ring_ended;
            }
            reg::SCR => self.scr = value,
            // LSR and MSR are read-only.
            _ => {}
        }
        None
    }

    /// IIR bits 3 to 0: the interrupt with the highest priority.
    fn interrupt(&self) -> u8 {
        if self.ier & IER_ELSI != 0 && self.overrun {
            IIR_LINE_STATUS
        } else if self.ier & IER_ERBFI != 0 && !self.rx.is_empty() {
            if self.rx.len() >= self.trigger_level() { IIR_RECEIVED } else { IIR_TIMEOUT }
        } else if self.ier & IER_ETBEI != 0 && self.thr_empty_pending {
            IIR_THR_EMPTY
        } else if self.ier & IER_EDSSI != 0 && self.msr_delta != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    /// MSR bits 7 to 4: a connected line, or the outputs in loopback mode.
    fn modem_inputs(&self) -> u8 {
        if !self.looped() {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)]
            .into_iter()
            .filter(|(output, _)| self.mcr & output != 0)
            .fold(0, |inputs, (_, input)| inputs | input)
    }

    fn trigger_level(&self) -> usize {
        match (self.fifo_enabled, self.rx_trigger) {
            (false, _) => 1,
            (true, trigger) => [1, 4, 8, 14][usize::from(trigger & 3)],
        }
    }

    fn listens(&self) -> bool {
        self.ier & IER_ERBFI != 0 || self.polls >= LISTENING_POLLS
    }

    fn capacity(&self) -> usize {
        if self.fifo_enabled { FIFO_SIZE } else { 1 }
    }

    fn divisor_open(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn looped(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }
}

first_version!(SerialState, "serial");

impl Persist for Serial {
    type State = SerialState;

    fn save(&self) -> Result<SerialState, PersistError> {
        let Self { out: _, irq: _, on_room: _, turned_away: _, registers } = self;
        let Registers {
            ier,
            fifo_enabled,
            rx_trigger,
            lcr,
            mcr,
            scr,
            divisor,
            msr_delta,
            thr_empty_pending,
            overrun,
            polls,
            rx,
        } = registers;
        Ok(SerialState {
            ier: *ier,
            fifo_enabled: *fifo_enabled,
            rx_trigger: *rx_trigger,
            lcr: *lcr,
            mcr: *mcr,
            scr: *scr,
            divisor: *divisor,
            msr_delta: *msr_delta,
            thr_empty_pending: *thr_empty_pending,
            overrun: *overrun,
            polls: *polls,
            rx: rx.iter().copied().collect(),
        })
    }

    fn restore(&mut self, state: SerialState) -> Result<(), PersistError> {
        let SerialState {
            ier,
            fifo_enabled,
            rx_trigger,
            lcr,
            mcr,
            scr,
            divisor,
            msr_delta,
            thr_empty_pending,
            overrun,
            polls,
            rx,
        } = state;
        let fits = |field, value: u8, mask: u8| match value & !mask {
            0 => Ok(value),
            _ => Err(invalid(field, format!("{value:#x} has bits outside {mask:#x}"))),
        };
        let registers = Registers {
            ier: fits("ier", ier, IER_MASK)?,
            fifo_enabled,
            rx_trigger: fits("rx_trigger", rx_trigger, if fifo_enabled { 3 } else { 0 })?,
            lcr,
            mcr: fits("mcr", mcr, MCR_MASK)?,
            scr,
            divisor,
            msr_delta: fits("msr_delta", msr_delta, MSR_DELTA_MASK)?,
            thr_empty_pending,
            overrun,
            polls,
            rx: rx.into(),
        };
        if polls > LISTENING_POLLS {
            return Err(invalid("polls", format!("{polls}, it counts to {LISTENING_POLLS}")));
        }
        let (len, capacity) = (registers.rx.len(), registers.capacity());
        if len > capacity {
            return Err(invalid("rx", format!("{len} bytes in a FIFO of {capacity}")));
        }
        self.registers = registers;
        self.drive();
        Ok(())
    }
}

fn invalid(field: &'static str, why: String) -> PersistError {
    PersistError::invalid("serial", field, why)
}

mod state {
    use serde::{Deserialize, Serialize};

    /// The serial port's registers.
    #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
    pub struct SerialState {
        /// IER, bits 3 to 0.
        pub ier: u8,
        /// FCR bit 0.
        pub fifo_enabled: bool,
        /// FCR bits 7 and 6; zero with the FIFOs disabled.
        pub rx_trigger: u8,
        /// LCR.
        pub lcr: u8,
        /// MCR, bits 4 to 0.
        pub mcr: u8,
        /// SCR.
        pub scr: u8,
        /// DLM and DLL.
        pub divisor: u16,
        /// MSR, bits 3 to 0.
        pub msr_delta: u8,
        /// The THR-empty interrupt waits for IIR to be read.
        pub thr_empty_pending: bool,
        /// LSR bit 1.
        pub overrun: bool,
        /// Reads of LSR since any other access but of RBR, at most 16.
        pub polls: u8,
        /// Received bytes that the guest has not read: 16 at most, 1 with the FIFOs disabled.
        pub rx: Vec<u8>,
    }
}

#[cfg(test)]
mod tests;
