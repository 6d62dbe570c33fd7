//! What lies in RAM before the first instruction: kernel, initrd and device tree.

mod fdt;
mod image;
mod load;

pub use fdt::{FdtError, Guest, device_tree};
pub use image::{Image, ImageError, PageSize, unpack};
pub use load::{BootError, Entry, FDT_AREA, load};
