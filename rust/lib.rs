//! The core of cano. `core` decides, `py` drives, the Python package describes.

pub mod core;

#[cfg(feature = "python")]
mod py;
