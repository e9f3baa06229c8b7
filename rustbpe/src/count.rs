//! Counts the distinct words of a stream of texts, on several threads, in memory that grows with the
//! number of distinct words only.

use std::hash::{BuildHasher, Hash};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Mutex, OnceLock};

use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::{Error, Splitter};

/// Words up to this length are keys of one machine word: their bytes below, their length on top.
pub const SHORT: usize = 15;

/// Masks of as many low bytes.
const LOW_BYTES: [u128; SHORT + 1] = {
    let mut masks = [0; SHORT + 1];
    let mut len = 1;
    while len <= SHORT {
        masks[len] = masks[len - 1] << 8 | 0xFF;
        len += 1;
    }
    masks
};

/// A short word as one number. `text[start..end]` must be at most [`SHORT`] bytes.
#[inline(always)]
pub fn short_key(text: &[u8], start: usize, end: usize) -> u128 {
    let len = end - start;
    let bytes = match text.get(start..start + 16) {
        Some(sixteen) => u128::from_le_bytes(sixteen.try_into().expect("16 bytes")) & LOW_BYTES[len],
        None => {
            let mut padded = [0; 16];
            padded[..len].copy_from_slice(&text[start..end]);
            u128::from_le_bytes(padded)
        }
    };
    bytes | (len as u128) << 120
}

/// Some texts, one after the other in one buffer: what a thread takes at a time.
#[derive(Default)]
pub struct Batch {
    text: String,
    ends: Vec<usize>,
}

impl Batch {
    /// Large enough that handing it over costs nothing, small enough to stay in a cache.
    pub const FULL: usize = 1 << 20;

    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.ends.push(self.text.len());
    }

    /// Bytes of text so far.
    pub fn size(&self) -> usize {
        self.text.len()
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.text[start..end])
    }
}

/// Distinct words and how often each came.
#[derive(Default)]
pub struct WordCounts {
    short: FxHashMap<u128, u64>,
    long: FxHashMap<Box<[u8]>, u64>,
}

impl WordCounts {
    #[inline(always)]
    fn add(&mut self, text: &[u8], start: usize, end: usize) {
        if end - start <= SHORT {
            *self.short.entry(short_key(text, start, end)).or_default() += 1;
        } else if let Some(count) = self.long.get_mut(&text[start..end]) {
            *count += 1;
        } else {
            self.long.insert(text[start..end].into(), 1);
        }
    }

    pub fn len(&self) -> usize {
        self.short.len() + self.long.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `word(bytes, count)` for each word, in no particular order.
    pub fn for_each(&self, mut word: impl FnMut(&[u8], u64)) {
        for (key, &count) in &self.short {
            let bytes = key.to_le_bytes();
            word(&bytes[..bytes[15] as usize], count);
        }
        for (bytes, &count) in &self.long {
            word(bytes, count);
        }
    }
}

/// The counts of all threads: each shard holds the words with one value of some bits of their hash.
struct Shared {
    shards: Vec<Mutex<WordCounts>>,
}

/// A thread hands its words over when it holds this many; frequent ones have then been counted often,
/// and the memory of a thread stays at a few megabytes.
const HAND_OVER: usize = 1 << 16;

impl Shared {
    fn new() -> Self {
        Self { shards: (0..64).map(|_| Mutex::default()).collect() }
    }

    fn shard_of<T: Hash>(key: &T) -> usize {
        (FxBuildHasher.hash_one(key) >> 40) as usize % 64 // bits that the hash maps do not look at
    }

    fn take_over(&self, counts: &mut WordCounts) {
        let mut short: Vec<Vec<(u128, u64)>> = vec![Vec::new(); 64];
        let mut long: Vec<Vec<(Box<[u8]>, u64)>> = vec![Vec::new(); 64];
        for (key, count) in counts.short.drain() {
            short[Self::shard_of(&key)].push((key, count));
        }
        for (key, count) in counts.long.drain() {
            long[Self::shard_of(&key)].push((key, count));
        }
        for ((shard, short), long) in self.shards.iter().zip(short).zip(long) {
            let mut shard = shard.lock().expect("no thread panics while counting");
            for (key, count) in short {
                *shard.short.entry(key).or_default() += count;
            }
            for (key, count) in long {
                *shard.long.entry(key).or_default() += count;
            }
        }
    }
}

/// Counts the words of every batch that `fill` makes, on `threads` threads beside the caller's, which
/// runs `fill` until it returns false. At most two batches per thread are in memory at a time.
pub fn count_words<E: From<Error>>(
    splitter: &Splitter,
    threads: usize,
    mut fill: impl FnMut(&mut Batch) -> Result<bool, E>,
) -> Result<Vec<WordCounts>, E> {
    let shared = Shared::new();
    let failed = AtomicBool::new(false);
    let failure: OnceLock<Error> = OnceLock::new();
    let (sender, receiver) = sync_channel::<Batch>(threads);
    let receiver = Mutex::new(receiver);
    let work = || {
        let mut counts = WordCounts::default();
        while let Some(batch) = next(&receiver) {
            for text in batch.texts() {
                let split = splitter.split(text, |start, end| counts.add(text.as_bytes(), start, end));
                if let Err(error) = split {
                    let _ = failure.set(error); // the first one is told
                    failed.store(true, Relaxed);
                }
                if counts.len() >= HAND_OVER {
                    shared.take_over(&mut counts);
                }
            }
        }
        shared.take_over(&mut counts);
    };
    std::thread::scope(|scope| {
        let sender = sender; // dropped when this closure ends, also early: the workers then finish
        for _ in 0..threads {
            scope.spawn(work);
        }
        loop {
            let mut batch = Batch::default();
            let more = fill(&mut batch)?;
            sender.send(batch).expect("the workers receive until we are done");
            if !more || failed.load(Relaxed) {
                return Ok::<(), E>(());
            }
        }
    })?;
    match failure.into_inner() {
        Some(error) => Err(error.into()),
        None => {
            Ok(shared.shards.into_iter().map(|shard| shard.into_inner().expect("not poisoned")).collect())
        }
    }
}

fn next(receiver: &Mutex<Receiver<Batch>>) -> Option<Batch> {
    receiver.lock().expect("no thread panics while receiving").recv().ok()
}
