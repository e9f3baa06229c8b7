//! Applies merges: text to ids, ids to bytes.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use rustc_hash::{FxHashMap, FxHashSet};

use crate::count::{SHORT, short_key};
use crate::{BYTES, Error, Pair, Splitter};

const NONE: u32 = u32::MAX;

/// The id that a pair of ids merges into, if any: also its rank, since ids are given in order.
struct PairIds {
    bytes: Vec<u32>, // the pairs of two bytes, by first * 256 + second
    slots: Vec<(u64, u32)>,
    shift: u32,
}

impl PairIds {
    fn new(merges: &[Pair]) -> Self {
        let bits = (2 * merges.len().max(8)).next_power_of_two().trailing_zeros();
        let mut table = Self {
            bytes: vec![NONE; BYTES * BYTES],
            slots: vec![(u64::MAX, NONE); 1 << bits],
            shift: 64 - bits,
        };
        for (index, &(a, b)) in merges.iter().enumerate() {
            let id = (BYTES + index) as u32;
            if (a as usize) < BYTES && (b as usize) < BYTES {
                table.bytes[a as usize * BYTES + b as usize] = id;
            } else {
                let mut slot = table.slot(a, b);
                while table.slots[slot].0 != u64::MAX {
                    slot = (slot + 1) & (table.slots.len() - 1);
                }
                table.slots[slot] = (key(a, b), id);
            }
        }
        table
    }

    #[inline(always)]
    fn slot(&self, a: u32, b: u32) -> usize {
        (key(a, b).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize
    }

    #[inline(always)]
    fn get(&self, a: u32, b: u32) -> u32 {
        if (a | b) < BYTES as u32 {
            return self.bytes[a as usize * BYTES + b as usize];
        }
        let wanted = key(a, b);
        let mut slot = self.slot(a, b);
        loop {
            let (found, id) = self.slots[slot];
            if found == wanted || found == u64::MAX {
                return id;
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
    }
}

#[inline(always)]
fn key(a: u32, b: u32) -> u64 {
    u64::from(a) << 32 | u64::from(b)
}

/// A thread's memory of short words and their ids: a slot each, the latest word wins.
struct Cache {
    slots: Vec<Slot>,
}

/// A word of at most [`SHORT`] bytes and four ids; unused ones are `NONE`.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Slot {
    word: u128,
    ids: [u32; 4],
}

const CACHE_BITS: u32 = 15; // 1 MB: the second-level cache of one core

impl Cache {
    fn new() -> Self {
        Self { slots: vec![Slot { word: u128::MAX, ids: [NONE; 4] }; 1 << CACHE_BITS] }
    }

    #[inline(always)]
    fn slot(&mut self, word: u128) -> &mut Slot {
        let mixed = (word as u64 ^ ((word >> 64) as u64).rotate_left(29)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        &mut self.slots[(mixed >> (64 - CACHE_BITS)) as usize]
    }
}

/// Ids of several texts in one row: `ends[i]` is where those of text i end.
#[derive(Default)]
pub struct Ids {
    pub ids: Vec<u32>,
    pub ends: Vec<usize>,
}

/// Merges, ready for use. Ids of special tokens follow those of the merges and never come out of text.
pub struct Encoder {
    splitter: Splitter,
    pairs: PairIds,
    bytes: Vec<u8>, // of all tokens, one after the other
    ends: Vec<usize>,
    caches: Mutex<Vec<Cache>>,
}

impl Encoder {
    pub fn new(merges: &[Pair], specials: &[String], splitter: Splitter) -> Result<Self, Error> {
        if merges.len() + specials.len() > (NONE as usize) - BYTES {
            return Err(Error::new("there are more merges than ids"));
        }
        let mut bytes: Vec<u8> = (0..=255).collect();
        let mut ends: Vec<usize> = (1..=BYTES).collect();
        let mut pairs = FxHashSet::default();
        let mut tokens = FxHashMap::default();
        for (index, &(a, b)) in merges.iter().enumerate() {
            let id = BYTES + index;
            if a as usize >= id || b as usize >= id {
                return Err(Error::new(format!(
                    "merge {index} is ({a}, {b}), but only ids below {id} exist by then"
                )));
            }
            if !pairs.insert((a, b)) {
                return Err(Error::new(format!(
                    "merge {index} is ({a}, {b}), which an earlier merge is too"
                )));
            }
            for part in [a, b] {
                let part = part as usize;
                let start = if part == 0 { 0 } else { ends[part - 1] };
                bytes.extend_from_within(start..ends[part]);
            }
            let start = ends[id - 1];
            ends.push(bytes.len());
            if let Some(other) = tokens.insert(bytes[start..].to_vec(), id) {
                return Err(Error::new(format!(
                    "merge {index} makes id {id} of the same bytes as id {other}"
                )));
            }
        }
        for special in specials {
            bytes.extend(special.as_bytes());
            ends.push(bytes.len());
        }
        Ok(Self { splitter, pairs: PairIds::new(merges), bytes, ends, caches: Mutex::default() })
    }

    /// Number of ids: bytes, merges and specials.
    pub fn vocab_size(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of an id that exists.
    pub fn token(&self, id: usize) -> &[u8] {
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..self.ends[id]]
    }

    /// The bytes of all ids, joined.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut out = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            if id as usize >= self.vocab_size() {
                return Err(Error::new(format!(
                    "id {id} is outside the vocabulary of {} ids",
                    self.vocab_size()
                )));
            }
            out.extend_from_slice(self.token(id as usize));
        }
        Ok(out)
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut out = Vec::with_capacity(text.len() / 3 + 4);
        let mut cache = self.take_cache();
        let result = self.encode_into(text, &mut cache, &mut out);
        self.give_back(cache);
        result.map(|()| out)
    }

    /// Texts in groups as they were handed out to the threads, in order.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], threads: usize) -> Result<Vec<Ids>, Error> {
        let groups = group(texts);
        let next = AtomicUsize::new(0);
        let results: Vec<Mutex<Result<Ids, Error>>> =
            groups.iter().map(|_| Mutex::new(Ok(Ids::default()))).collect();
        let work = || {
            let mut cache = self.take_cache();
            loop {
                let index = next.fetch_add(1, Relaxed);
                let Some(group) = groups.get(index) else { break };
                let mut done = Ids::default();
                let result = texts[group.clone()].iter().try_for_each(|text| {
                    self.encode_into(text.as_ref(), &mut cache, &mut done.ids)?;
                    done.ends.push(done.ids.len());
                    Ok(())
                });
                *results[index].lock().expect("not poisoned") = result.map(|()| done);
            }
            self.give_back(cache);
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.min(groups.len()) {
                scope.spawn(work);
            }
            work();
        });
        results.into_iter().map(|result| result.into_inner().expect("not poisoned")).collect()
    }

    fn take_cache(&self) -> Cache {
        self.caches.lock().expect("not poisoned").pop().unwrap_or_else(Cache::new)
    }

    fn give_back(&self, cache: Cache) {
        self.caches.lock().expect("not poisoned").push(cache);
    }

    fn encode_into(&self, text: &str, cache: &mut Cache, out: &mut Vec<u32>) -> Result<(), Error> {
        let bytes = text.as_bytes();
        self.splitter.split(text, |start, end| {
            if end - start == 1 {
                out.push(u32::from(bytes[start]));
            } else if end - start <= SHORT {
                let word = short_key(bytes, start, end);
                let slot = cache.slot(word);
                if slot.word != word {
                    let first = out.len();
                    self.merge_short(&bytes[start..end], out);
                    if out.len() - first <= 4 {
                        slot.word = word;
                        slot.ids = [NONE; 4];
                        slot.ids[..out.len() - first].copy_from_slice(&out[first..]);
                    }
                    return;
                }
                out.extend_from_slice(&slot.ids);
                let unused = slot.ids.iter().filter(|&&id| id == NONE).count();
                out.truncate(out.len() - unused);
            } else if end - start <= 128 {
                self.merge_short(&bytes[start..end], out);
            } else {
                self.merge_long(&bytes[start..end], out);
            }
        })
    }

    /// Always the lowest rank, the leftmost among equals, found by looking at all: quadratic, best for a few.
    fn merge_short(&self, word: &[u8], out: &mut Vec<u32>) {
        let first = out.len();
        out.extend(word.iter().map(|&byte| u32::from(byte)));
        let ids = &mut out[first..];
        let mut ranks = [NONE; 128];
        let mut len = ids.len();
        for i in 0..len - 1 {
            ranks[i] = self.pairs.get(ids[i], ids[i + 1]);
        }
        while len > 1 {
            let (mut at, mut rank) = (0, ranks[0]);
            for (i, &other) in ranks[..len - 1].iter().enumerate() {
                if other < rank {
                    (at, rank) = (i, other);
                }
            }
            if rank == NONE {
                break;
            }
            ids[at] = rank;
            ids.copy_within(at + 2..len, at + 1);
            ranks.copy_within(at + 1..len - 1, at);
            len -= 1;
            if at > 0 {
                ranks[at - 1] = self.pairs.get(ids[at - 1], rank);
            }
            if at + 1 < len {
                ranks[at] = self.pairs.get(rank, ids[at + 1]);
            }
        }
        out.truncate(first + len);
    }

    /// The same for a word of any length in n log n: a heap of (rank, position) over a linked list.
    fn merge_long(&self, word: &[u8], out: &mut Vec<u32>) {
        const GONE: u32 = u32::MAX;
        let len = word.len();
        let mut ids: Vec<u32> = word.iter().map(|&byte| u32::from(byte)).collect();
        let mut next: Vec<usize> = (1..=len).collect(); // len: none
        let mut previous: Vec<usize> = (0..len).map(|i| i.wrapping_sub(1)).collect(); // wraps: none
        let rank_at = |ids: &[u32], next: &[usize], i: usize| {
            if next[i] < len { self.pairs.get(ids[i], ids[next[i]]) } else { NONE }
        };
        let mut heap: BinaryHeap<Reverse<(u32, usize)>> = (0..len)
            .map(|i| Reverse((rank_at(&ids, &next, i), i)))
            .filter(|entry| entry.0.0 != NONE)
            .collect();
        while let Some(Reverse((rank, i))) = heap.pop() {
            if ids[i] == GONE || rank_at(&ids, &next, i) != rank {
                continue; // a neighbour was merged meanwhile
            }
            let right = next[i];
            ids[i] = rank;
            ids[right] = GONE;
            next[i] = next[right];
            if next[i] < len {
                previous[next[i]] = i;
            }
            for j in [previous[i], i] {
                if j < len {
                    let rank = rank_at(&ids, &next, j);
                    if rank != NONE {
                        heap.push(Reverse((rank, j)));
                    }
                }
            }
        }
        out.extend(ids.into_iter().filter(|&id| id != GONE));
    }
}

/// Consecutive texts of together about 64 KB.
fn group<T: AsRef<str>>(texts: &[T]) -> Vec<std::ops::Range<usize>> {
    let mut groups = Vec::new();
    let (mut start, mut size) = (0, 0);
    for (i, text) in texts.iter().enumerate() {
        size += text.as_ref().len();
        if size >= 1 << 16 || i + 1 == texts.len() {
            groups.push(start..i + 1);
            (start, size) = (i + 1, 0);
        }
    }
    groups
}
