//! An image as the place that absent granules come from.

use std::{io, sync::Arc};

use squib_devices::granules::{Origin, OriginError};
use squib_formats::image::ImageReader;

/// The chunks of an image, each verified before it is handed over. Many threads may ask at once.
pub(crate) struct ImageOrigin {
    image: Arc<ImageReader>,
}

impl ImageOrigin {
    pub(crate) fn new(image: Arc<ImageReader>) -> Self {
        Self { image }
    }
}

impl Origin for ImageOrigin {
    fn load(
        &self,
        granule: u64,
        put: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), OriginError> {
        let mut reader = self.image.chunks(0)?;
        match reader.read(granule)? {
            Some(bytes) => Ok(put(bytes)?),
            None => Ok(()),
        }
    }
}
