//! Learns merges from word counts: always the most frequent pair, the smallest pair among equals.
//!
//! Every word lies in one flat arena and is merged in place. Each pair knows in which words it was seen;
//! such a list may name words that have lost the pair since, but never misses one, because a pair gains
//! occurrences only in the step that makes the younger of its two ids. The counts in the queue are for
//! the same reason upper bounds, so that a stale entry is put right when it comes up.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::{BYTES, Error, Pair, WordCounts};

/// Words in a row, each as `length, count (low), count (high), ids...`; a place is the index of a length.
struct Arena(Vec<u32>);

const HEADER: usize = 3;

impl Arena {
    fn new(shards: &[WordCounts]) -> Result<Self, Error> {
        let mut size = 0;
        for shard in shards {
            shard.for_each(|bytes, _| size += if bytes.len() > 1 { HEADER + bytes.len() } else { 0 });
        }
        if size > u32::MAX as usize {
            return Err(Error::new(format!(
                "the corpus has {size} bytes of distinct words; the trainer holds 4.2e9"
            )));
        }
        let mut arena = Vec::with_capacity(size);
        for shard in shards {
            shard.for_each(|bytes, count| {
                if bytes.len() > 1 {
                    arena.extend([bytes.len() as u32, count as u32, (count >> 32) as u32]);
                    arena.extend(bytes.iter().map(|&byte| u32::from(byte)));
                }
            });
        }
        Ok(Self(arena))
    }

    fn count(&self, place: usize) -> i64 {
        i64::from(self.0[place + 1]) | i64::from(self.0[place + 2]) << 32
    }
}

/// How often a pair occurs now, and the stretch of `places` with the words in which it was seen.
struct Seen {
    count: i64,
    start: usize,
    len: usize,
}

/// What one merge does to the pairs (x, left) and (right, y), for every neighbour x or y.
#[derive(Default)]
struct Neighbour {
    lost: i64,   // occurrences of (x, left) or (right, y) that are gone
    gained: i64, // occurrences of (x, new) or (new, y)
    places: usize,
    last_place: u32,
    touched: bool,
}

/// One side of a merge: its neighbours by id, and where they were met in order.
struct Side {
    by_id: Vec<Neighbour>,
    touched: Vec<u32>,
    met: Vec<(u32, u32)>, // (neighbour, place)
}

impl Side {
    fn new(vocab_size: usize) -> Self {
        let by_id = (0..vocab_size).map(|_| Neighbour::default()).collect();
        Self { by_id, touched: Vec::new(), met: Vec::new() }
    }

    #[inline(always)]
    fn of(&mut self, id: u32) -> &mut Neighbour {
        let neighbour = &mut self.by_id[id as usize];
        if !neighbour.touched {
            *neighbour = Neighbour { touched: true, last_place: u32::MAX, ..Neighbour::default() };
            self.touched.push(id);
        }
        neighbour
    }

    #[inline(always)]
    fn gain(&mut self, id: u32, place: u32, count: i64) {
        let neighbour = self.of(id);
        neighbour.gained += count;
        if neighbour.last_place != place {
            neighbour.last_place = place;
            neighbour.places += 1;
            self.met.push((id, place));
        }
    }
}

struct Trainer {
    arena: Arena,
    places: Vec<u32>,
    pairs: FxHashMap<Pair, Seen>,
    queue: BinaryHeap<(i64, Reverse<Pair>)>,
    left: Side,
    right: Side,
}

impl Trainer {
    fn new(shards: &[WordCounts], vocab_size: usize) -> Result<Self, Error> {
        let arena = Arena::new(shards)?;
        let vocab_size = vocab_size.min(BYTES + arena.0.len()); // more ids than that never come about
        let mut trainer = Self {
            arena,
            places: Vec::new(),
            pairs: FxHashMap::default(),
            queue: BinaryHeap::new(),
            left: Side::new(vocab_size),
            right: Side::new(vocab_size),
        };
        trainer.count_byte_pairs();
        Ok(trainer)
    }

    /// Counts and places of the pairs of bytes, each list of places in a stretch of its own.
    fn count_byte_pairs(&mut self) {
        let mut counts = vec![0i64; BYTES * BYTES];
        let mut sizes = vec![0usize; BYTES * BYTES];
        self.each_byte_pair(|pair, count, _, first| {
            counts[pair] += count;
            sizes[pair] += usize::from(first);
        });
        let mut end = 0;
        let starts: Vec<usize> = sizes.iter().map(|size| (end, end += size).0).collect();
        let mut places = vec![0u32; end];
        let mut next = starts.clone();
        self.each_byte_pair(|pair, _, place, first| {
            if first {
                places[next[pair]] = place as u32;
                next[pair] += 1;
            }
        });
        self.places = places;
        for (index, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let pair = ((index / BYTES) as u32, (index % BYTES) as u32);
            self.pairs.insert(pair, Seen { count, start: starts[index], len: sizes[index] });
            self.queue.push((count, Reverse(pair)));
        }
    }

    /// Calls `visit(pair, count, place, first)` for every pair of bytes; `first`: its first time in the word.
    fn each_byte_pair(&self, mut visit: impl FnMut(usize, i64, usize, bool)) {
        let mut last_place = vec![u32::MAX; BYTES * BYTES];
        let mut place = 0;
        while place < self.arena.0.len() {
            let len = self.arena.0[place] as usize;
            let count = self.arena.count(place);
            for ids in self.arena.0[place + HEADER..place + HEADER + len].windows(2) {
                let pair = ids[0] as usize * BYTES + ids[1] as usize;
                visit(pair, count, place, last_place[pair] != place as u32);
                last_place[pair] = place as u32;
            }
            place += HEADER + len;
        }
    }

    /// The most frequent pair, the smallest among equals; none when every word is one id.
    fn best(&mut self) -> Option<Pair> {
        while let Some((count, Reverse(pair))) = self.queue.pop() {
            let now = self.pairs[&pair].count;
            if now == count {
                return Some(pair);
            }
            if now > 0 {
                self.queue.push((now, Reverse(pair)));
            } else {
                self.pairs.remove(&pair);
            }
        }
        None
    }

    /// Replaces `pair` by `new` wherever it is, and brings counts, places and queue up to date.
    fn merge(&mut self, pair: Pair, new: u32) {
        let seen = self.pairs.remove(&pair).expect("the best pair is known");
        for index in seen.start..seen.start + seen.len {
            let place = self.places[index];
            self.merge_word(place as usize, pair, new);
        }
        self.settle(pair, new);
    }

    fn merge_word(&mut self, place: usize, (a, b): Pair, new: u32) {
        let count = self.arena.count(place);
        let len = self.arena.0[place] as usize;
        let ids = &mut self.arena.0[place + HEADER..place + HEADER + len];
        let Some(first) = ids.windows(2).position(|two| two == [a, b]) else { return };
        let (mut read, mut write) = (first, first);
        while read < len {
            if read + 1 < len && ids[read] == a && ids[read + 1] == b {
                if write > 0 {
                    let x = ids[write - 1];
                    if x == new {
                        self.right.of(a).gained -= count; // the (new, a) before it has become (new, new)
                    } else {
                        self.left.of(x).lost += count;
                    }
                    self.left.gain(x, place as u32, count);
                }
                if read + 2 < len {
                    let y = ids[read + 2];
                    self.right.of(y).lost += count;
                    self.right.gain(y, place as u32, count);
                }
                ids[write] = new;
                read += 2;
            } else {
                ids[write] = ids[read];
                read += 1;
            }
            write += 1;
        }
        self.arena.0[place] = write as u32;
    }

    /// Moves what a merge changed on both sides into the counts, the places and the queue.
    fn settle(&mut self, (a, b): Pair, new: u32) {
        for left_side in [true, false] {
            let side = if left_side { &mut self.left } else { &mut self.right };
            let mut end = self.places.len();
            for &id in &side.touched {
                let neighbour = &mut side.by_id[id as usize];
                neighbour.touched = false;
                let old = if left_side { (id, a) } else { (b, id) };
                if neighbour.lost > 0
                    && let Some(seen) = self.pairs.get_mut(&old)
                {
                    seen.count -= neighbour.lost;
                }
                let len = neighbour.places;
                if neighbour.gained > 0 {
                    let pair = if left_side { (id, new) } else { (new, id) };
                    self.pairs.insert(pair, Seen { count: neighbour.gained, start: end, len });
                    self.queue.push((neighbour.gained, Reverse(pair)));
                    neighbour.places = end; // from here on: where its next place goes
                    end += len;
                } else {
                    neighbour.places = usize::MAX;
                }
            }
            self.places.resize(end, 0);
            for &(id, place) in &side.met {
                let neighbour = &mut side.by_id[id as usize];
                if neighbour.places != usize::MAX {
                    self.places[neighbour.places] = place;
                    neighbour.places += 1;
                }
            }
            side.touched.clear();
            side.met.clear();
        }
    }
}

/// Merges in the order they are learned, as many as `vocab_size` has room for or the words give.
/// `progress(done, total)` is called after each merge and ends the training by an error of its own.
pub fn learn_merges<E: From<Error>>(
    shards: Vec<WordCounts>,
    vocab_size: usize,
    mut progress: impl FnMut(usize, usize) -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    if vocab_size < BYTES {
        return Err(Error::new(format!(
            "vocab_size is {vocab_size}; it must be at least {BYTES}, an id for each byte"
        ))
        .into());
    }
    if shards.iter().all(WordCounts::is_empty) {
        return Err(Error::new("the corpus is empty: there is no text to learn merges from").into());
    }
    let total = vocab_size - BYTES;
    let mut trainer = Trainer::new(&shards, vocab_size)?;
    drop(shards);
    let mut merges = Vec::new();
    while merges.len() < total {
        let Some(pair) = trainer.best() else { break };
        trainer.merge(pair, (BYTES + merges.len()) as u32);
        merges.push(pair);
        progress(merges.len(), total)?;
    }
    Ok(merges)
}
