//! Cuts text into the words that merges never cross: nanochat's pattern by hand, any other by regex.

use std::sync::OnceLock;

use fancy_regex::Regex;

use crate::Error;

/// GPT-4's split pattern with numbers in groups of one or two digits instead of three: small
/// vocabularies have better uses for their ids (validated upstream at 32K: 1-2 beats both 1 and 1-3).
pub const PATTERN: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// Cuts text into words; what a pattern does not match is left out, as in tiktoken.
pub enum Splitter {
    /// [`PATTERN`], by hand.
    Nanochat(&'static Classes),
    /// Any pattern, and the slow twin of the one above.
    Regex(Box<Regex>),
}

impl Splitter {
    /// The fastest splitter there is for `pattern`.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        if pattern == PATTERN { Ok(Self::Nanochat(Classes::get())) } else { Self::regex(pattern) }
    }

    /// A splitter that runs `pattern` as a regular expression, even when it is our own.
    pub fn regex(pattern: &str) -> Result<Self, Error> {
        match Regex::new(pattern) {
            Ok(regex) => Ok(Self::Regex(Box::new(regex))),
            Err(error) => {
                Err(Error::new(format!("the split pattern is not a valid regular expression: {error}")))
            }
        }
    }

    /// Calls `word(start, end)` for every word of `text`, in order, as byte offsets.
    #[inline(always)]
    pub fn split(&self, text: &str, mut word: impl FnMut(usize, usize)) -> Result<(), Error> {
        let mut found = match self {
            Self::Nanochat(_) => Vec::new(),
            Self::Regex(regex) => matches(regex, text)?,
        }
        .into_iter();
        let mut place = 0;
        // One loop with one call of `word`, which the compiler then puts in place.
        loop {
            let (start, end) = match self {
                Self::Nanochat(_) if place == text.len() => return Ok(()),
                Self::Nanochat(classes) => (place, classes.word_end(text.as_bytes(), place)),
                Self::Regex(_) => match found.next() {
                    Some(span) => span,
                    None => return Ok(()),
                },
            };
            word(start, end);
            place = end;
        }
    }
}

/// Where the matches that are not empty start and end.
fn matches(regex: &Regex, text: &str) -> Result<Vec<(usize, usize)>, Error> {
    let mut spans = Vec::new();
    for found in regex.find_iter(text) {
        let found =
            found.map_err(|error| Error::new(format!("the split pattern gave up on a text: {error}")))?;
        if found.start() < found.end() {
            spans.push((found.start(), found.end()));
        }
    }
    Ok(spans)
}

/// What a character is to [`PATTERN`]: `\p{L}`, `\p{N}`, `\s` other than line ends, `[\r\n]`, anything else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Class {
    Other,
    Letter,
    Number,
    Space,
    Newline,
}
use Class::{Letter, Newline, Number, Other, Space};

/// The class of every Unicode character, in blocks of 256 of which most are alike.
pub struct Classes {
    ascii: [Class; 128],
    block_of: Vec<u16>,
    blocks: Vec<[Class; 256]>,
}

impl Classes {
    /// Built once, from the tables of the regex engine itself, so that both know the same Unicode.
    fn get() -> &'static Self {
        static CLASSES: OnceLock<Classes> = OnceLock::new();
        CLASSES.get_or_init(Self::build)
    }

    fn build() -> Self {
        let mut flat = vec![Other; 0x11_0000];
        for (name, class) in [(r"\p{L}", Letter), (r"\p{N}", Number), (r"\s", Space), (r"[\r\n]", Newline)] {
            let parsed = regex_syntax::parse(name).expect("a class known to regex-syntax");
            let regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(set)) = parsed.kind()
            else {
                unreachable!("{name} is a class of characters")
            };
            for range in set.iter() {
                flat[range.start() as usize..=range.end() as usize].fill(class);
            }
        }
        let mut blocks: Vec<[Class; 256]> = Vec::new();
        let mut block_of = Vec::new();
        for block in flat.chunks_exact(256) {
            let block: [Class; 256] = block.try_into().expect("chunks of 256");
            let known = blocks.iter().position(|other| *other == block);
            block_of.push(known.unwrap_or_else(|| {
                blocks.push(block);
                blocks.len() - 1
            }) as u16);
        }
        let ascii = flat[..128].try_into().expect("128 classes");
        Self { ascii, block_of, blocks }
    }

    /// The class and the length in bytes of the character at `i`, which must be a boundary before the end.
    #[inline(always)]
    fn at(&self, text: &[u8], i: usize) -> (Class, usize) {
        let byte = text[i];
        if byte < 0x80 { (self.ascii[byte as usize], 1) } else { self.beyond_ascii(text, i) }
    }

    #[inline]
    fn beyond_ascii(&self, text: &[u8], i: usize) -> (Class, usize) {
        let low = |k: usize| u32::from(text[i + k] & 0x3F);
        let lead = u32::from(text[i]);
        let (char, len) = match lead {
            0..0xE0 => ((lead & 0x1F) << 6 | low(1), 2),
            0xE0..0xF0 => ((lead & 0x0F) << 12 | low(1) << 6 | low(2), 3),
            _ => ((lead & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3), 4),
        };
        let block = self.block_of[(char >> 8) as usize];
        (self.blocks[block as usize][(char & 0xFF) as usize], len)
    }

    /// The first place at or after `i` that is not of `class`.
    #[inline(always)]
    fn skip(&self, text: &[u8], mut i: usize, class: Class) -> usize {
        while i < text.len() {
            let (found, len) = self.at(text, i);
            if found != class {
                break;
            }
            i += len;
        }
        i
    }

    /// `\p{L}*`, sixteen ASCII letters at a time: words are too short for a loop to be foreseen by the CPU.
    #[inline(always)]
    fn skip_letters(&self, text: &[u8], mut i: usize) -> usize {
        const ONES: u128 = u128::from_ne_bytes([1; 16]);
        while let Some(sixteen) = text.get(i..i + 16) {
            let bytes = u128::from_le_bytes(sixteen.try_into().expect("16 bytes"));
            let lower = (bytes | (ONES * 0x20)) & (ONES * 0x7F);
            let from_a = lower + ONES * (0x80 - b'a' as u128); // top bit of each byte: >= 'a'
            let past_z = lower + ONES * (0x7F - b'z' as u128); // top bit of each byte: > 'z'
            let others = !(from_a & !past_z & !bytes) & (ONES * 0x80);
            if others == 0 {
                i += 16;
                continue;
            }
            i += others.trailing_zeros() as usize / 8;
            if text[i] < 0x80 {
                return i;
            }
            let (class, len) = self.beyond_ascii(text, i);
            if class != Letter {
                return i;
            }
            i += len;
        }
        self.skip(text, i, Letter)
    }

    /// `[^\s\p{L}\p{N}]*[\r\n]*`
    #[inline(always)]
    fn skip_marks(&self, text: &[u8], i: usize) -> usize {
        let end = self.skip(text, i, Other);
        self.skip(text, end, Newline)
    }

    /// Where the word that starts at `start` ends: the first alternative of [`PATTERN`] that matches there.
    #[inline(always)]
    fn word_end(&self, text: &[u8], start: usize) -> usize {
        // Most words by far are ASCII letters after at most one character that is no digit or line end; one
        // test for all of them keeps the CPU's guesses right.
        if let Some(&[first, second]) = text.get(start..start + 2) {
            let (first_class, second_class) =
                (self.ascii[first as usize & 127], self.ascii[second as usize & 127]);
            let leads = (first_class == Space) | (first_class == Other);
            let letters = (first_class == Letter) | (leads & (second_class == Letter));
            if letters & ((first | second) < 0x80) & (first != b'\'') {
                return self.skip_letters(text, start + 1);
            }
        }
        let (class, len) = self.at(text, start);
        let next = start + len;
        let next_class = if next < text.len() { Some(self.at(text, next).0) } else { None };
        match class {
            Letter => self.skip_letters(text, next),
            Number if next_class == Some(Number) => next + self.at(text, next).1,
            Number => next,
            Other => {
                if text[start] == b'\''
                    && let Some(end) = contraction_end(text, next)
                {
                    return end;
                }
                if next_class == Some(Letter) {
                    self.skip_letters(text, next)
                } else {
                    self.skip_marks(text, next)
                }
            }
            Space if next_class == Some(Letter) => self.skip_letters(text, next),
            Space if next_class == Some(Other) && text[start] == b' ' => self.skip_marks(text, next),
            Space | Newline => self.blank_end(text, start),
        }
    }

    /// `\s*[\r\n]|\s+(?!\S)|\s+` where white space begins: through the last line end of the run; else
    /// all of it at the end of the text; else all but its last character, which goes with what follows.
    fn blank_end(&self, text: &[u8], start: usize) -> usize {
        let (mut i, mut last, mut line_end) = (start, start, None);
        while i < text.len() {
            let (class, len) = self.at(text, i);
            if class != Space && class != Newline {
                break;
            }
            last = i;
            i += len;
            if class == Newline {
                line_end = Some(i);
            }
        }
        match line_end {
            Some(end) => end,
            None if i == text.len() || last == start => i,
            None => last,
        }
    }
}

/// `(?i:[sdmt]|ll|ve|re)` after an apostrophe. Without case, "s" is also the long s (U+017F).
fn contraction_end(text: &[u8], i: usize) -> Option<usize> {
    let lower = |k: usize| text.get(i + k).map(u8::to_ascii_lowercase);
    match (lower(0)?, lower(1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(i + 1),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) | (0xC5, Some(0xBF)) => Some(i + 2),
        _ => None,
    }
}
