//! The destination: lets pages land, verifies them, and takes the guest over.

pub mod assembler;
pub mod blobs;
pub mod config;
pub mod error;
pub mod lane;
pub mod session;

pub use config::{Config, ConfigBuilder, ConfigError};
pub use error::{Error, Fault};
pub use session::{Ownership, Session};
