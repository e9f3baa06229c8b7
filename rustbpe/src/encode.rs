//! Applies merges: text to ids, ids to bytes.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Condvar, Mutex};

use rustc_hash::{FxHashMap, FxHashSet};

use crate::count::{SHORT, short_key};
use crate::{BYTES, Error, Pair, Splitter};

const NONE: u32 = u32::MAX;

/// Words up to this length are merged without a heap, and remembered.
const FEW: usize = 1 << FEW_BITS;
const FEW_BITS: u32 = 6;

/// The id that a pair of ids merges into, if any: also its rank, since ids are given in order.
struct PairIds {
    bytes: Vec<u32>, // the pairs of two bytes, by first * 256 + second
    slots: Vec<u64>, // of the others: pair above, id below, each id in as many bits as fit
    shift: u32,
}

/// Two ids and the one they merge into share a number of 64 bits.
const ID_BITS: u32 = 21;
const MOST_IDS: usize = 1 << ID_BITS;
const EMPTY: u64 = u64::MAX; // a pair of ids that no vocabulary has

impl PairIds {
    fn new(merges: &[Pair]) -> Self {
        let bits = (2 * merges.len().max(8)).next_power_of_two().trailing_zeros();
        let mut table =
            Self { bytes: vec![NONE; BYTES * BYTES], slots: vec![EMPTY; 1 << bits], shift: 64 - bits };
        for (index, &(a, b)) in merges.iter().enumerate() {
            let id = (BYTES + index) as u32;
            if (a | b) < BYTES as u32 {
                table.bytes[a as usize * BYTES + b as usize] = id;
            } else {
                let mut slot = table.slot(key(a, b));
                while table.slots[slot] != EMPTY {
                    slot = (slot + 1) & (table.slots.len() - 1);
                }
                table.slots[slot] = key(a, b) << ID_BITS | u64::from(id);
            }
        }
        table
    }

    #[inline(always)]
    fn slot(&self, key: u64) -> usize {
        (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize
    }

    #[inline(always)]
    fn get(&self, a: u32, b: u32) -> u32 {
        if (a | b) < BYTES as u32 {
            return self.bytes[a as usize * BYTES + b as usize];
        }
        let wanted = key(a, b);
        let mut slot = self.slot(wanted);
        loop {
            let found = self.slots[slot];
            if found >> ID_BITS == wanted {
                return found as u32 & (MOST_IDS as u32 - 1);
            }
            if found == EMPTY {
                return NONE;
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
    }
}

#[inline(always)]
fn key(a: u32, b: u32) -> u64 {
    u64::from(a) << ID_BITS | u64::from(b)
}

/// A thread's memory of words and their ids. Short ones have a slot each, where the latest word wins.
struct Cache {
    slots: Vec<Slot>,
    long: FxHashMap<Box<[u8]>, Box<[u32]>>,
}

/// A word of at most [`SHORT`] bytes with up to four ids; the key's top four bits say how many.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Slot {
    word: u128,
    ids: [u32; 4],
}

impl Slot {
    #[inline(always)]
    fn holds(&self, word: u128) -> bool {
        (self.word ^ word) << 4 == 0
    }

    #[inline(always)]
    fn len(&self) -> usize {
        (self.word >> 124) as usize
    }
}

const CACHE_BITS: u32 = 17; // 4 MB: the 100,000 most frequent words are 99% of English
const LONG_WORDS: usize = 1 << 14; // a cache of longer words starts anew when it holds this many

impl Cache {
    fn new() -> Self {
        Self { slots: vec![Slot { word: 0, ids: [0; 4] }; 1 << CACHE_BITS], long: FxHashMap::default() }
    }

    #[inline(always)]
    fn index(word: u128) -> usize {
        let mixed = (word as u64 ^ ((word >> 64) as u64).rotate_left(29)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (mixed >> (64 - CACHE_BITS)) as usize
    }

    #[inline(always)]
    fn get(&self, word: u128) -> Option<&Slot> {
        let slot = &self.slots[Self::index(word)];
        slot.holds(word).then_some(slot)
    }

    fn put(&mut self, word: u128, ids: &[u32]) {
        if ids.len() <= 4 {
            let slot = &mut self.slots[Self::index(word)];
            slot.word = word | (ids.len() as u128) << 124;
            slot.ids[..ids.len()].copy_from_slice(ids);
        }
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
        if BYTES + merges.len() + specials.len() >= MOST_IDS {
            return Err(Error::new(format!(
                "{} merges are too many, there is room for {MOST_IDS} ids",
                merges.len()
            )));
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

    /// Encodes many texts on `threads` threads, the caller's among them, which also hands the ids to `take`,
    /// group by group and in order, as soon as they are there.
    pub fn encode_batch<T: AsRef<str> + Sync, E: From<Error>>(
        &self,
        texts: &[T],
        threads: usize,
        mut take: impl FnMut(Ids) -> Result<(), E>,
    ) -> Result<(), E> {
        let groups = group(texts);
        let next = AtomicUsize::new(0);
        let done: Mutex<Vec<Option<Result<Ids, Error>>>> = Mutex::new(groups.iter().map(|_| None).collect());
        let one_more = Condvar::new();
        let encode_next = |cache: &mut Cache| {
            let index = next.fetch_add(1, Relaxed);
            let Some(group) = groups.get(index) else { return false };
            let mut ids = Ids::default();
            let result = texts[group.clone()].iter().try_for_each(|text| {
                self.encode_into(text.as_ref(), cache, &mut ids.ids)?;
                ids.ends.push(ids.ids.len());
                Ok(())
            });
            done.lock().expect("not poisoned")[index] = Some(result.map(|()| ids));
            one_more.notify_one();
            true
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.min(groups.len()) {
                scope.spawn(|| {
                    let mut cache = self.take_cache();
                    while encode_next(&mut cache) {}
                    self.give_back(cache);
                });
            }
            let mut cache = self.take_cache();
            let mut result = Ok(());
            for index in 0..groups.len() {
                let ids = loop {
                    if let Some(ids) = done.lock().expect("not poisoned")[index].take() {
                        break ids;
                    }
                    if !encode_next(&mut cache) {
                        let waiting = done.lock().expect("not poisoned");
                        let missing = |done: &mut Vec<Option<_>>| done[index].is_none();
                        let mut found = one_more.wait_while(waiting, missing).expect("not poisoned");
                        break found[index].take().expect("there by now");
                    }
                };
                result = ids.map_err(E::from).and_then(&mut take);
                if result.is_err() {
                    next.store(groups.len(), Relaxed); // nothing more to do for the others
                    break;
                }
            }
            self.give_back(cache);
            result
        })
    }

    fn take_cache(&self) -> Cache {
        self.caches.lock().expect("not poisoned").pop().unwrap_or_else(Cache::new)
    }

    fn give_back(&self, cache: Cache) {
        self.caches.lock().expect("not poisoned").push(cache);
    }

    /// Appends the ids of a text. They are gathered in a small buffer first, where four can be stored at once
    /// whatever the number that counts.
    fn encode_into(&self, text: &str, cache: &mut Cache, out: &mut Vec<u32>) -> Result<(), Error> {
        const FULL: usize = 1024;
        let mut gathered = [0u32; FULL + 4];
        let mut len = 0;
        let bytes = text.as_bytes();
        let result = self.splitter.split(text, |start, end| {
            let known = if end - start <= SHORT {
                let word = short_key(bytes, start, end);
                cache.get(word)
            } else {
                None
            };
            if let Some(slot) = known {
                gathered[len..len + 4].copy_from_slice(&slot.ids);
                len += slot.len();
            }
            if known.is_none() || len >= FULL {
                out.extend_from_slice(&gathered[..len]);
                len = 0;
            }
            if known.is_none() {
                self.encode_word(&bytes[start..end], cache, out);
            }
        });
        out.extend_from_slice(&gathered[..len]);
        result
    }

    /// Appends the ids of a word that no slot holds, and remembers them.
    #[inline(never)]
    fn encode_word(&self, word: &[u8], cache: &mut Cache, out: &mut Vec<u32>) {
        let first = out.len();
        if word.len() <= SHORT {
            self.merge_few::<{ SHORT + 1 }>(word, out);
            let key = short_key(word, 0, word.len());
            cache.put(key, &out[first..]);
        } else if word.len() > FEW {
            self.merge_many(word, out);
        } else if let Some(ids) = cache.long.get(word) {
            out.extend_from_slice(ids);
        } else {
            self.merge_few::<FEW>(word, out);
            if cache.long.len() >= LONG_WORDS {
                cache.long.clear();
            }
            cache.long.insert(word.into(), out[first..].into());
        }
    }

    /// Always the lowest rank, the leftmost among equals, found by looking at all: quadratic, best for up to N.
    fn merge_few<const N: usize>(&self, word: &[u8], out: &mut Vec<u32>) {
        const NO_RANK: i32 = i32::MAX;
        let len = word.len();
        // A place has its id, its neighbours' places, and rank and place in one number: the smallest is next.
        // Signed, because that is what the smallest of many is found fastest of.
        let mut ids = [0u32; N];
        let mut next = [0u8; N];
        let mut previous = [0u8; N];
        let mut ranks = [NO_RANK; N];
        let rank_at = |place: usize, a: u32, b: u32| match self.pairs.get(a, b) {
            NONE => NO_RANK,
            id => (id << FEW_BITS) as i32 | place as i32,
        };
        for (i, &byte) in word.iter().enumerate() {
            ids[i] = u32::from(byte);
            next[i] = i as u8 + 1;
            previous[i] = (i as u8).wrapping_sub(1);
            if i > 0 {
                ranks[i - 1] = rank_at(i - 1, ids[i - 1], ids[i]);
            }
        }
        loop {
            let lowest = ranks.iter().fold(NO_RANK, |lowest, &rank| lowest.min(rank));
            if lowest == NO_RANK {
                break;
            }
            let (id, i) = (lowest as u32 >> FEW_BITS, lowest as usize % FEW);
            let gone = next[i] as usize;
            let right = next[gone] as usize;
            ids[i] = id;
            next[i] = right as u8;
            ranks[gone] = NO_RANK;
            ranks[i] = NO_RANK;
            if right < len {
                previous[right] = i as u8;
                ranks[i] = rank_at(i, id, ids[right]);
            }
            if i > 0 {
                let left = previous[i] as usize;
                ranks[left] = rank_at(left, ids[left], id);
            }
        }
        let mut i = 0;
        while i < len {
            out.push(ids[i]);
            i = next[i] as usize;
        }
    }

    /// The same for a word of any length in n log n: a heap of ranks and places over a linked list.
    fn merge_many(&self, word: &[u8], out: &mut Vec<u32>) {
        const GONE: u32 = NONE;
        const PLACE_BITS: u32 = 64 - ID_BITS; // rank and place in one number, the rank above
        let len = word.len();
        let mut ids: Vec<u32> = word.iter().map(|&byte| u32::from(byte)).collect();
        let mut next: Vec<usize> = (1..=len).collect(); // len: none
        let mut previous: Vec<usize> = (0..len).map(|i| i.wrapping_sub(1)).collect(); // wraps: none
        let rank_at = |ids: &[u32], next: &[usize], i: usize| {
            if next[i] < len { self.pairs.get(ids[i], ids[next[i]]) } else { NONE }
        };
        let entry = |rank: u32, i: usize| Reverse(u64::from(rank) << PLACE_BITS | i as u64);
        let ranked = (0..len - 1).map(|i| (rank_at(&ids, &next, i), i)).filter(|&(rank, _)| rank != NONE);
        let mut heap: BinaryHeap<Reverse<u64>> = ranked.map(|(rank, i)| entry(rank, i)).collect();
        while let Some(Reverse(lowest)) = heap.pop() {
            let (rank, i) = ((lowest >> PLACE_BITS) as u32, (lowest & ((1 << PLACE_BITS) - 1)) as usize);
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
                        heap.push(entry(rank, j));
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
