//! An image as the place that absent granules come from.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use squib_devices::granules::{Origin, OriginError};
use squib_formats::{
    error::FormatError,
    image::{ChunkReader, ImageReader},
};

/// The chunks of an image, each verified before it is handed over. Many threads may ask at once.
pub(crate) struct ImageOrigin {
    image: Arc<ImageReader>,
    /// Readers that no thread is using.
    idle: Mutex<Vec<ChunkReader>>,
}

impl ImageOrigin {
    pub(crate) fn new(image: Arc<ImageReader>) -> Self {
        Self { image, idle: Mutex::default() }
    }
}

impl Origin for ImageOrigin {
    fn load(
        &self,
        granule: u64,
        put: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), OriginError> {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let free = idle().pop();
        let mut reader = match free {
            Some(reader) => reader,
            None => self.image.chunks(0)?,
        };
        hand_over(&mut reader, granule, put)?;
        idle().push(reader);
        Ok(())
    }
}

/// The chunks of an image for one thread that goes through many of them in a known order.
pub(crate) struct Sweep {
    reader: Mutex<ChunkReader>,
}

impl Sweep {
    pub(crate) fn new(image: &ImageReader) -> Result<Self, FormatError> {
        Ok(Self { reader: Mutex::new(image.chunks(0)?) })
    }

    /// Reads what is stored of the first of the chunks `upcoming`, and with it of those that follow. What
    /// cannot be read shows when the chunk is loaded.
    pub(crate) fn read_ahead(&self, upcoming: &[u64]) {
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = reader.read_ahead(upcoming) {
            tracing::debug!("reading ahead: {error}");
        }
    }
}

impl Origin for Sweep {
    fn load(
        &self,
        granule: u64,
        put: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), OriginError> {
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        hand_over(&mut reader, granule, put)
    }
}

fn hand_over(
    reader: &mut ChunkReader,
    granule: u64,
    put: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), OriginError> {
    match reader.read(granule)? {
        Some(bytes) => Ok(put(bytes)?),
        None => Ok(()),
    }
}
