//! Guest RAM as the source and the target of an image.

use std::io;

use squib_devices::{
    map::SYSTEM_AREA_SIZE,
    memory::{GuestRam, Untouched},
};
use squib_formats::image::{Content, Sink, Source};
use vm_memory::{Bytes, GuestAddress};

/// The RAM of a paused machine. What nobody has touched is not read.
pub(crate) struct RamSource<'a> {
    ram: &'a GuestRam,
    untouched: Option<Untouched>,
}

impl<'a> RamSource<'a> {
    pub(crate) fn new(ram: &'a GuestRam) -> Self {
        Self { ram, untouched: ram.untouched() }
    }
}

impl Source for RamSource<'_> {
    fn size(&self) -> u64 {
        self.ram.size()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Content> {
        if self.untouched.as_ref().is_some_and(|map| map.covers(offset, into.len() as u64)) {
            return Ok(Content::Zero);
        }
        let read = self.ram.read_slice(into, address(self.ram, offset)?);
        read.map_err(io::Error::other)?;
        Ok(Content::Data)
    }
}

/// The RAM of a machine that is being restored: nobody has written to it but for the system area.
pub(crate) struct RamSink<'a>(pub(crate) &'a GuestRam);

impl Sink for RamSink<'_> {
    fn is_zero(&self, offset: u64, _: usize) -> bool {
        offset >= SYSTEM_AREA_SIZE
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let written = self.0.write_slice(bytes, address(self.0, offset)?);
        written.map_err(io::Error::other)
    }
}

fn address(ram: &GuestRam, offset: u64) -> io::Result<GuestAddress> {
    let address = ram.base().checked_add(offset).map(GuestAddress);
    address.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}
