//! Byte pair encoding for nanochat: learns merges from text, and turns text into ids and back.
//!
//! The way of a corpus: [`split`] cuts text into words, [`count`] counts the distinct ones in parallel,
//! [`train`] learns the merges from those counts, [`encode`] applies them. None of it knows Python; the
//! binding is `py.rs` alone, behind the feature `python`.

pub mod count;
pub mod encode;
mod error;
#[cfg(feature = "python")]
mod py;
pub mod split;
pub mod train;

pub use count::{Batch, WordCounts, count_words};
pub use encode::Encoder;
pub use error::Error;
pub use split::{PATTERN, Splitter};
pub use train::learn_merges;

/// Two neighbouring ids, left and right.
pub type Pair = (u32, u32);

/// Ids 0..256 are the bytes themselves; merge number i makes id 256 + i.
pub const BYTES: usize = 256;
