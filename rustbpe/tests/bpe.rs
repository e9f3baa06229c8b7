//! The crate without Python: each part against a slow twin, on texts from a seeded generator.

use std::collections::HashMap;

use nanochat_bpe::{Batch, Encoder, Error, PATTERN, Pair, Splitter, WordCounts, count_words, learn_merges};

/// Every alternative of the pattern, its borders, and characters that only look like a case of it.
const AWKWARD: &str = "abstdmlvreSTDMLVREx'’ſ'' \t\n\r\u{b}\u{85}\u{a0}\u{2028}\u{3000}\u{200b}.,!-_/1234567890½Ⅷ٣é\u{301}Ä한글中文عر👍🏽\u{200d}\0";

/// Knuth's linear congruential generator; only its high bits are used.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }

    fn text(&mut self, alphabet: &[char], longest: usize) -> String {
        (0..self.below(longest + 1)).map(|_| alphabet[self.below(alphabet.len())]).collect()
    }
}

fn words(splitter: &Splitter, text: &str) -> Vec<String> {
    let mut words = Vec::new();
    splitter.split(text, |start, end| words.push(text[start..end].to_string())).unwrap();
    words
}

fn count(documents: &[String], threads: usize) -> Vec<WordCounts> {
    let splitter = Splitter::new(PATTERN).unwrap();
    let mut rest = documents.iter();
    let fill = |batch: &mut Batch| {
        let next = rest.next();
        next.iter().for_each(|document| batch.push(document));
        Ok::<bool, Error>(next.is_some())
    };
    count_words(&splitter, threads, fill).unwrap()
}

fn learn(documents: &[String], vocab_size: usize) -> Vec<Pair> {
    learn_merges(count(documents, 2), vocab_size, |_, _| Ok::<(), Error>(())).unwrap()
}

fn merge(ids: &[u32], pair: Pair, new: u32) -> Vec<u32> {
    let (mut out, mut i) = (Vec::new(), 0);
    while i < ids.len() {
        let found = ids[i..].starts_with(&[pair.0, pair.1]);
        out.push(if found { new } else { ids[i] });
        i += if found { 2 } else { 1 };
    }
    out
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn slow_merges(documents: &[String], vocab_size: usize) -> Vec<Pair> {
    let splitter = Splitter::regex(PATTERN).unwrap();
    let mut all: Vec<Vec<u32>> =
        documents.iter().flat_map(|document| words(&splitter, document)).map(|word| bytes(&word)).collect();
    let mut merges = Vec::new();
    while 256 + merges.len() < vocab_size {
        let mut counts: HashMap<Pair, u64> = HashMap::new();
        for ids in &all {
            ids.windows(2).for_each(|two| *counts.entry((two[0], two[1])).or_default() += 1);
        }
        let Some((&pair, _)) = counts.iter().min_by_key(|&(&pair, &count)| (u64::MAX - count, pair)) else {
            break;
        };
        let new = 256 + merges.len() as u32;
        all.iter_mut().for_each(|ids| *ids = merge(ids, pair, new));
        merges.push(pair);
    }
    merges
}

fn slow_encode(merges: &[Pair], text: &str) -> Vec<u32> {
    let splitter = Splitter::regex(PATTERN).unwrap();
    let encode = |word: String| {
        let ranked = merges.iter().zip(256..);
        ranked.fold(bytes(&word), |ids, (&pair, new)| merge(&ids, pair, new))
    };
    words(&splitter, text).into_iter().flat_map(encode).collect()
}

#[test]
fn the_splitter_equals_the_regex() {
    let (by_hand, by_regex) = (Splitter::new(PATTERN).unwrap(), Splitter::regex(PATTERN).unwrap());
    let alphabet: Vec<char> = AWKWARD.chars().collect();
    let mut random = Random(1);
    for _ in 0..100_000 {
        let text = random.text(&alphabet, 20);
        assert_eq!(words(&by_hand, &text), words(&by_regex, &text), "{text:?}");
    }
}

#[test]
fn every_character_is_what_the_regex_says() {
    let (by_hand, by_regex) = (Splitter::new(PATTERN).unwrap(), Splitter::regex(PATTERN).unwrap());
    for char in '\0'..=char::MAX {
        let text = format!("a{char}b 1{char} '{char}x");
        assert_eq!(words(&by_hand, &text), words(&by_regex, &text), "{text:?}");
    }
}

#[test]
fn merges_and_ids_equal_the_slow_twins() {
    let alphabet: Vec<char> = AWKWARD.chars().collect();
    let mut random = Random(2);
    for round in 0..150 {
        let some = &alphabet[..[2, 5, 30, alphabet.len()][round % 4]];
        let documents: Vec<String> = (0..=random.below(12)).map(|_| random.text(some, 80)).collect();
        let documents = [documents, vec!["ab".repeat(100)]].concat(); // words of every length
        let merges = learn(&documents, 300);
        assert_eq!(merges, slow_merges(&documents, 300), "{documents:?}");
        let encoder = Encoder::new(&merges, &[], Splitter::new(PATTERN).unwrap()).unwrap();
        for text in documents.iter().chain([&random.text(some, 400)]) {
            let ids = encoder.encode(text).unwrap();
            assert_eq!(ids, slow_encode(&merges, text), "{text:?}");
            assert_eq!(encoder.decode(&ids).unwrap(), text.as_bytes());
        }
    }
}

#[test]
fn counts_do_not_depend_on_threads() {
    let mut random = Random(3);
    let alphabet: Vec<char> = "abc ".chars().collect();
    let documents: Vec<String> = (0..300).map(|_| random.text(&alphabet, 3000)).collect();
    let counts = |threads| {
        let mut all = Vec::new();
        for shard in count(&documents, threads) {
            shard.for_each(|word, count| all.push((word.to_vec(), count)));
        }
        all.sort();
        all
    };
    let one = counts(1);
    assert_eq!(one, counts(4));
    let splitter = Splitter::regex(PATTERN).unwrap();
    let expected: usize = documents.iter().map(|document| words(&splitter, document).len()).sum();
    assert_eq!(one.iter().map(|(_, count)| count).sum::<u64>(), expected as u64);
}

#[test]
fn an_error_of_the_source_or_of_the_progress_ends_the_training() {
    let splitter = Splitter::new(PATTERN).unwrap();
    let source = count_words(&splitter, 2, |_| Err::<bool, Error>(Error::new("the disk is gone")));
    assert_eq!(source.err().unwrap().to_string(), "the disk is gone");
    let words = count(&["hello hello".into()], 1);
    let stopped =
        learn_merges(words, 300, |done, _| if done == 2 { Err(Error::new("stop")) } else { Ok(()) });
    assert_eq!(stopped.err().unwrap().to_string(), "stop");
}

#[test]
fn bad_input_is_a_sentence() {
    let merges = |merges: &[Pair]| {
        let splitter = Splitter::new(PATTERN).unwrap();
        Encoder::new(merges, &[], splitter).err().expect("an error").to_string()
    };
    assert_eq!(merges(&[(0, 256)]), "merge 0 is (0, 256), but only ids below 256 exist by then");
    assert_eq!(merges(&[(0, 1), (0, 1)]), "merge 1 is (0, 1), which an earlier merge is too");
    assert!(Splitter::new("(").err().unwrap().to_string().contains("not a valid regular expression"));
    let nothing = learn_merges(Vec::new(), 300, |_, _| Ok::<(), Error>(()));
    assert!(nothing.err().unwrap().to_string().contains("the corpus is empty"));
}
