//! The core of cano. `core` decides, `store` keeps, `py` drives, the Python package describes.

pub mod core;

#[cfg(feature = "sqlite")]
pub mod store;

#[cfg(feature = "python")]
mod py;
