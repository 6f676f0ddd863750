//! A set of cluster numbers, in pieces of 4 KiB that exist only where the set has members.
//!
//! Finding the lowest member costs a bounded number of steps whatever the size: the set is used
//! under the lock that all allocations share. Nothing here ever allocates more than 4 KiB at once
//! after [`BitSet::new`].

use crate::error::{Error, Result};
use std::ops::Range;

const WORDS: usize = 512;
const CHUNK_BITS: u64 = 64 * 512;

/// A set of numbers below a fixed bound.
#[derive(Clone, Debug)]
pub struct BitSet {
    chunks: Vec<Option<Box<[u64; WORDS]>>>,
    /// Members in each chunk.
    counts: Vec<u32>,
    /// One bit for each chunk that has members.
    occupied: Vec<u64>,
    bound: u64,
    len: u64,
}

fn reserve<T: Clone>(count: usize, value: T) -> Result<Vec<T>> {
    let mut list = Vec::new();
    list.try_reserve_exact(count)
        .map_err(|_| Error::errno(libc::ENOMEM))?;
    list.resize(count, value);
    Ok(list)
}

fn locate(number: u64) -> (usize, usize, u64) {
    let chunk = usize::try_from(number / CHUNK_BITS).unwrap_or(usize::MAX);
    let within = number % CHUNK_BITS;
    (
        chunk,
        usize::try_from(within / 64).unwrap_or(0),
        1 << (within % 64),
    )
}

impl BitSet {
    /// An empty set of numbers below `bound`. Fails where memory for its directory is short.
    pub fn new(bound: u64) -> Result<Self> {
        let chunks =
            usize::try_from(bound.div_ceil(CHUNK_BITS)).map_err(|_| Error::errno(libc::ENOMEM))?;
        Ok(Self {
            chunks: reserve(chunks, None)?,
            counts: reserve(chunks, 0)?,
            occupied: reserve(chunks.div_ceil(64), 0)?,
            bound,
            len: 0,
        })
    }

    /// The numbers of a range below `bound` that are not in `other`, whole words at a time.
    pub fn range_without(bound: u64, range: Range<u64>, other: &Self) -> Result<Self> {
        let mut set = Self::new(bound)?;
        let end = range.end.min(bound);
        let mut chunk = usize::try_from(range.start / CHUNK_BITS).unwrap_or(usize::MAX);
        while chunk < set.chunks.len() && number_of(chunk, 0, 1) < end {
            set.fill_chunk(chunk, range.start..end, other);
            chunk += 1;
        }
        Ok(set)
    }

    fn fill_chunk(&mut self, chunk: usize, range: Range<u64>, other: &Self) {
        let excluded = other.chunks.get(chunk).and_then(Option::as_ref);
        let mut words = [0; WORDS];
        let mut count = 0;
        for (index, word) in words.iter_mut().enumerate() {
            let first = number_of(chunk, index, 1);
            let inside = |number: u64| number.saturating_sub(first).min(64);
            let below = |bits: u64| {
                if bits == 64 {
                    u64::MAX
                } else {
                    (1 << bits) - 1
                }
            };
            let wanted = below(inside(range.end)) & !below(inside(range.start));
            *word = wanted & !excluded.map_or(0, |words| words[index]);
            count += word.count_ones();
        }
        if count > 0 {
            self.chunks[chunk] = Some(Box::new(words));
            self.counts[chunk] = count;
            self.occupied[chunk / 64] |= 1 << (chunk % 64);
            self.len += u64::from(count);
        }
    }

    /// Number of members.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True without members.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// True for a member.
    #[must_use]
    pub fn contains(&self, number: u64) -> bool {
        let (chunk, word, mask) = locate(number);
        match self.chunks.get(chunk) {
            Some(Some(words)) => words[word] & mask != 0,
            _ => false,
        }
    }

    /// Adds a number; `false` when it was there, or is not below the bound.
    #[inline]
    pub fn insert(&mut self, number: u64) -> bool {
        if number >= self.bound {
            return false;
        }
        let (chunk, word, mask) = locate(number);
        let words = self.chunks[chunk].get_or_insert_with(|| Box::new([0; WORDS]));
        if words[word] & mask != 0 {
            return false;
        }
        words[word] |= mask;
        if self.counts[chunk] == 0 {
            self.occupied[chunk / 64] |= 1 << (chunk % 64);
        }
        self.counts[chunk] += 1;
        self.len += 1;
        true
    }

    /// Removes a number; `false` when it was not there.
    pub fn remove(&mut self, number: u64) -> bool {
        let (chunk, word, mask) = locate(number);
        let Some(Some(words)) = self.chunks.get_mut(chunk) else {
            return false;
        };
        if words[word] & mask == 0 {
            return false;
        }
        words[word] &= !mask;
        self.counts[chunk] -= 1;
        if self.counts[chunk] == 0 {
            self.occupied[chunk / 64] &= !(1 << (chunk % 64));
        }
        self.len -= 1;
        true
    }

    /// Adds a range of numbers, whole words at a time.
    pub fn insert_range(&mut self, range: Range<u64>) {
        let mut number = range.start;
        let end = range.end.min(self.bound);
        while number < end {
            let (chunk, word, _) = locate(number);
            if number % 64 == 0 && end - number >= 64 {
                let words = self.chunks[chunk].get_or_insert_with(|| Box::new([0; WORDS]));
                let added = words[word].count_zeros();
                words[word] = u64::MAX;
                self.counts[chunk] += added;
                self.occupied[chunk / 64] |= 1 << (chunk % 64);
                self.len += u64::from(added);
                number += 64;
            } else {
                self.insert(number);
                number += 1;
            }
        }
    }

    /// Adds a range of which no number is a member yet; adds nothing and says `false` where one is,
    /// or where the range goes past the bound.
    pub fn insert_new(&mut self, range: Range<u64>) -> bool {
        let is_free = range.end <= self.bound
            && self
                .first_from(range.start)
                .is_none_or(|first| first >= range.end);
        if is_free {
            self.insert_range(range);
        }
        is_free
    }

    /// The lowest member at or above `from`.
    #[must_use]
    pub fn first_from(&self, from: u64) -> Option<u64> {
        let (first_chunk, first_word, _) = locate(from);
        if let Some(Some(words)) = self.chunks.get(first_chunk) {
            let mut mask = u64::MAX << (from % 64);
            for (index, word) in words.iter().enumerate().skip(first_word) {
                let found = word & mask;
                if found != 0 {
                    return Some(number_of(first_chunk, index, found));
                }
                mask = u64::MAX;
            }
        }
        let chunk = self.next_occupied(first_chunk + 1)?;
        let words = self.chunks[chunk].as_ref()?;
        let index = words.iter().position(|word| *word != 0)?;
        Some(number_of(chunk, index, words[index]))
    }

    fn next_occupied(&self, from: usize) -> Option<usize> {
        let mut mask = u64::MAX << (from % 64);
        for (index, group) in self.occupied.iter().enumerate().skip(from / 64) {
            let found = group & mask;
            if found != 0 {
                return Some(index * 64 + found.trailing_zeros() as usize);
            }
            mask = u64::MAX;
        }
        None
    }

    /// The lowest run of members at or above `from`, at most `longest` long.
    #[must_use]
    pub fn run_from(&self, from: u64, longest: u64) -> Option<Range<u64>> {
        let start = self.first_from(from)?;
        let mut end = start + 1;
        while end - start < longest && self.contains(end) {
            end += 1;
        }
        Some(start..end)
    }
}

fn number_of(chunk: usize, word: usize, bits: u64) -> u64 {
    let chunk = u64::try_from(chunk).unwrap_or(u64::MAX);
    let word = u64::try_from(word).unwrap_or(u64::MAX);
    chunk * CHUNK_BITS + word * 64 + u64::from(bits.trailing_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Against adding and removing one by one.
        #[test]
        fn a_range_without_a_set_has_the_rest(
            start in 0..200_000_u64,
            len in 0..200_000_u64,
            runs in proptest::collection::vec((0..200_000_u64, 0..70_000_u64), 0..6)
        ) {
            let (bound, range) = (190_000, start..start + len);
            // One that ends elsewhere than the new one.
            let mut other = BitSet::new(bound - 50_000).unwrap();
            for (from, len) in runs {
                other.insert_range(from..from + len);
            }
            let mut expected = BitSet::new(bound).unwrap();
            expected.insert_range(range.clone());
            for number in range.clone() {
                if other.contains(number) {
                    expected.remove(number);
                }
            }
            let found = BitSet::range_without(bound, range.clone(), &other).unwrap();
            assert_eq!(found.len(), expected.len());
            for number in 0..bound {
                assert_eq!(found.contains(number), expected.contains(number), "{}", number);
            }
            let mut next = 0;
            while let Some(number) = expected.first_from(next) {
                assert_eq!(found.first_from(next), Some(number));
                next = number + 1;
            }
            assert_eq!(found.first_from(next), None);
        }

        /// Against the set of the standard library.
        #[test]
        fn behaves_like_a_set(
            steps in proptest::collection::vec((0..5_u8, 0..200_000_u64, 0..5000_u64), 1..60)
        ) {
            let bound = 190_000;
            let mut bits = BitSet::new(bound).unwrap();
            let mut model = BTreeSet::new();
            for (step, number, len) in steps {
                match step {
                    0 => assert_eq!(bits.insert(number), number < bound && model.insert(number)),
                    1 => assert_eq!(bits.remove(number), model.remove(&number)),
                    2 => {
                        bits.insert_range(number..number + len);
                        model.extend((number..number + len).filter(|n| *n < bound));
                    }
                    3 => {
                        let mut range = number..number + len;
                        let is_new = range.end <= bound && !range.any(|n| model.contains(&n));
                        assert_eq!(bits.insert_new(number..number + len), is_new);
                        model.extend((number..number + len).filter(|_| is_new));
                    }
                    _ => {
                        let first = model.range(number..).next().copied();
                        assert_eq!(bits.first_from(number), first);
                        if let Some(start) = first {
                            let mut end = start;
                            while end - start < len.max(1) && model.contains(&end) {
                                end += 1;
                            }
                            assert_eq!(bits.run_from(number, len.max(1)), Some(start..end));
                        }
                    }
                }
                assert_eq!(bits.len(), model.len() as u64);
            }
        }
    }
}
