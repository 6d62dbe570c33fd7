//! Requests of a block device (5.2.6), from a chain to its status byte.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR as S_IOERR, VIRTIO_BLK_S_OK as S_OK, VIRTIO_BLK_S_UNSUPP as S_UNSUPP,
    VIRTIO_BLK_T_DISCARD as T_DISCARD, VIRTIO_BLK_T_FLUSH as T_FLUSH,
    VIRTIO_BLK_T_GET_ID as T_GET_ID, VIRTIO_BLK_T_IN as T_IN, VIRTIO_BLK_T_OUT as T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES as T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP as RANGE_UNMAP,
};
use vm_memory::{GuestMemoryError, VolatileSlice};

use super::{
    MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_WRITE_ZEROES_SECTORS, MAX_WRITE_ZEROES_SEGMENTS,
    SECTOR_SIZE, SERIAL_SIZE,
    disk::{Disk, MAX_BATCH},
};
use crate::{
    memory::GuestRam,
    virtio::queue::{Buffers, Chain, QueueFault},
};

/// Bytes of `struct virtio_blk_req` before the data: type, reserved, sector.
const HEADER_SIZE: u64 = 16;
/// Bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE_SIZE: u64 = 16;

/// A chain that is well-formed: it has a header and a place for the status.
pub(super) struct Request {
    kind: u32,
    sector: u64,
    /// Bytes behind the header that the driver sent.
    sent: u64,
    /// Bytes before the status that the driver can take.
    room: u64,
}

/// What a request is carried out on.
pub(super) struct Target<'a> {
    pub(super) id: &'a str,
    pub(super) disk: &'a dyn Disk,
    pub(super) ram: &'a GuestRam,
    pub(super) serial: &'a [u8; SERIAL_SIZE],
    pub(super) read_only: bool,
    /// Every write goes to stable storage before it is answered.
    pub(super) write_through: bool,
}

/// Why a request is answered with an error; the queue goes on.
enum Refusal {
    Unsupported,
    /// The request itself is wrong: sectors out of range, odd lengths, a read-only disk.
    Invalid(&'static str),
    Io(io::Error),
    Memory(GuestMemoryError),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<GuestMemoryError> for Refusal {
    fn from(error: GuestMemoryError) -> Self {
        Self::Memory(error)
    }
}

impl Request {
    /// Reads the header. A chain without room for header or status cannot even be answered.
    pub(super) fn parse(chain: &Chain, ram: &GuestRam) -> Result<Self, QueueFault> {
        let fault = |why| QueueFault::Chain { head: chain.head, why };
        let sent = chain.readable.len().checked_sub(HEADER_SIZE);
        let sent = sent.ok_or_else(|| fault("has no room for a request header"))?;
        let room = chain.writable.len().checked_sub(1);
        let room = room.ok_or_else(|| fault("has no room for a status"))?;
        let mut header = [0; HEADER_SIZE as usize];
        chain.readable.read(ram, 0, &mut header)?;
        let [kind, _, low, high] = words(header);
        Ok(Self { kind, sector: u64::from(high) << 32 | u64::from(low), sent, room })
    }

    /// Bytes that count against a bandwidth limit.
    pub(super) fn cost(&self) -> u64 {
        match self.kind {
            T_IN => self.room,
            T_OUT => self.sent,
            _ => 0,
        }
    }

    /// Carries the request out and writes its status. Gives the bytes written to the chain.
    pub(super) fn execute(&self, chain: &Chain, target: &Target<'_>) -> Result<u32, QueueFault> {
        let (status, data) = match self.perform(chain, target) {
            Ok(data) => (S_OK, data),
            Err(refusal) => {
                let Self { kind, sector, .. } = *self;
                let device = target.id;
                match &refusal {
                    Refusal::Unsupported => {
                        tracing::debug!(device, kind, "a request that is not supported");
                    }
                    Refusal::Invalid(why) => tracing::debug!(device, kind, sector, why),
                    Refusal::Io(error) => tracing::warn!(device, kind, sector, "{error}"),
                    Refusal::Memory(error) => tracing::debug!(device, kind, sector, "{error}"),
                }
                let unsupported = matches!(refusal, Refusal::Unsupported);
                (if unsupported { S_UNSUPP } else { S_IOERR }, 0)
            }
        };
        chain.writable.write(target.ram, self.room, &[status as u8])?;
        // Below 2^32: a chain is not longer. On an error the data part may hold anything.
        Ok((data + 1) as u32)
    }

    /// Gives the bytes of data written to the chain.
    fn perform(&self, chain: &Chain, target: &Target<'_>) -> Result<u64, Refusal> {
        let Target { disk, ram, read_only, write_through, .. } = *target;
        let writes = matches!(self.kind, T_OUT | T_DISCARD | T_WRITE_ZEROES);
        if writes && read_only {
            return Err(Refusal::Invalid("the disk is read-only"));
        }
        match self.kind {
            T_IN => {
                let at = byte_range(self.sector, self.room, disk.size())?;
                moved(&chain.writable, 0, self.room, ram, at, |at, part| disk.read_at(at, part))?;
                return Ok(self.room);
            }
            T_OUT => {
                let at = byte_range(self.sector, self.sent, disk.size())?;
                moved(&chain.readable, HEADER_SIZE, self.sent, ram, at, |at, part| {
                    disk.write_at(at, part)
                })?;
            }
            T_FLUSH if read_only => {}
            T_FLUSH => disk.flush()?,
            T_GET_ID => {
                let len = self.room.min(SERIAL_SIZE as u64);
                chain.writable.write(ram, 0, &target.serial[..len as usize])?;
                return Ok(len);
            }
            T_DISCARD => self.ranges(chain, target, MAX_DISCARD_SEGMENTS, |range| {
                if range.unmap {
                    return Err(Refusal::Unsupported);
                }
                range.check(MAX_DISCARD_SECTORS, disk).map(|_| ())
            })?,
            T_WRITE_ZEROES => {
                self.ranges(chain, target, MAX_WRITE_ZEROES_SEGMENTS, |range| {
                    range.check(MAX_WRITE_ZEROES_SECTORS, disk).map(|_| ())
                })?;
            }
            _ => return Err(Refusal::Unsupported),
        }
        if writes && write_through {
            disk.flush()?;
        }
        Ok(0)
    }

    /// Checks all ranges of a discard or write-zeroes, then carries them out.
    fn ranges(
        &self,
        chain: &Chain,
        target: &Target<'_>,
        most: u32,
        check: impl Fn(&SectorRange) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let Target { disk, ram, .. } = *target;
        let count = self.sent / RANGE_SIZE;
        if !self.sent.is_multiple_of(RANGE_SIZE) || count == 0 || count > u64::from(most) {
            return Err(Refusal::Invalid("the list of ranges has a length that is not allowed"));
        }
        // Read once: between two reads the guest could change what was checked.
        let mut ranges = [SectorRange::default(); MAX_DISCARD_SEGMENTS as usize];
        let ranges = &mut ranges[..count as usize];
        for (index, range) in ranges.iter_mut().enumerate() {
            let mut bytes = [0; RANGE_SIZE as usize];
            chain.readable.read(ram, HEADER_SIZE + index as u64 * RANGE_SIZE, &mut bytes)?;
            let [low, high, sectors, flags] = words(bytes);
            if flags & !RANGE_UNMAP != 0 {
                return Err(Refusal::Unsupported);
            }
            let sector = u64::from(high) << 32 | u64::from(low);
            *range = SectorRange { sector, sectors, unmap: flags & RANGE_UNMAP != 0 };
            check(range)?;
        }
        for range in ranges.iter().filter(|range| range.sectors > 0) {
            // Checked above: inside the disk.
            let (at, len) = (range.sector * SECTOR_SIZE, u64::from(range.sectors) * SECTOR_SIZE);
            if self.kind == T_DISCARD {
                disk.discard(at, len)?;
            } else {
                disk.write_zeroes(at, len, range.unmap)?;
            }
        }
        Ok(())
    }
}

/// One range of a discard or write-zeroes.
#[derive(Clone, Copy, Default)]
struct SectorRange {
    sector: u64,
    sectors: u32,
    unmap: bool,
}

impl SectorRange {
    fn check(&self, most: u32, disk: &dyn Disk) -> Result<u64, Refusal> {
        if self.sectors > most {
            return Err(Refusal::Invalid("a range is longer than the device allows"));
        }
        byte_range(self.sector, u64::from(self.sectors) * SECTOR_SIZE, disk.size())
    }
}

/// The byte offset of `sector`, if `len` bytes from there are whole sectors inside the disk.
fn byte_range(sector: u64, len: u64, size: u64) -> Result<u64, Refusal> {
    if !len.is_multiple_of(SECTOR_SIZE) {
        return Err(Refusal::Invalid("the data is not a multiple of 512 bytes"));
    }
    let start = sector.checked_mul(SECTOR_SIZE);
    let inside = start.filter(|start| start.checked_add(len).is_some_and(|end| end <= size));
    inside.ok_or(Refusal::Invalid("the sectors are not on the disk"))
}

/// Hands `len` bytes of `buffers` from `offset` on to `call` in batches, with their places on the
/// disk from `at` on. All of them are checked to be in RAM before the first is touched.
fn moved(
    buffers: &Buffers,
    offset: u64,
    len: u64,
    ram: &GuestRam,
    mut at: u64,
    mut call: impl FnMut(u64, &[VolatileSlice<'_>]) -> io::Result<()>,
) -> Result<(), Refusal> {
    buffers.slices(ram, offset, len, |_| Ok::<(), GuestMemoryError>(()))?;
    let mut batch = [VolatileSlice::from(&mut [][..]); MAX_BATCH];
    let mut filled = 0;
    buffers.slices(ram, offset, len, |slice| {
        batch[filled] = slice;
        filled += 1;
        if filled < MAX_BATCH {
            return Ok(());
        }
        filled = 0;
        call(at, &batch)?;
        at += batch.iter().map(|slice| slice.len() as u64).sum::<u64>();
        Ok::<(), Refusal>(())
    })?;
    if filled > 0 {
        call(at, &batch[..filled])?;
    }
    Ok(())
}

/// Four little-endian words.
fn words(bytes: [u8; 16]) -> [u32; 4] {
    let word =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [word(0), word(4), word(8), word(12)]
}
