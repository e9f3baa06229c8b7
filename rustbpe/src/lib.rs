//! Byte pair encoding.
#[cfg(any(feature = "python", feature = "extension-module"))]
mod py;
