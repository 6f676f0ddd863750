//! GUIDs of snapshots: 16 bytes, written `{8-4-4-4-12}` in lower case.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use std::fmt;

/// The name of a state of the disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Guid([u8; 16]);

impl Guid {
    /// All zeros: "no parent" and "no encryption engine".
    pub const NONE: Self = Self([0; 16]);
    /// The top where the descriptor does not name one: `{5fbaabe3-6958-40ff-92a7-860e329aab41}`.
    pub const TOP: Self = Self([
        0x5f, 0xba, 0xab, 0xe3, 0x69, 0x58, 0x40, 0xff, 0x92, 0xa7, 0x86, 0x0e, 0x32, 0x9a, 0xab,
        0x41,
    ]);

    /// Takes over the bytes, in the order in which they are written.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// A GUID of 122 random bits.
    #[must_use]
    pub const fn random(mut bytes: [u8; 16]) -> Self {
        let [.., version, _, variant, _, _, _, _, _, _, _] = &mut bytes;
        *version = (*version & 0x0f) | 0x40;
        *variant = (*variant & 0x3f) | 0x80;
        Self(bytes)
    }

    /// Reads a GUID with or without braces, in any case; `None` for anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let inner = match text.strip_prefix('{') {
            Some(rest) => rest.strip_suffix('}')?,
            None => text,
        };
        if inner.len() != 36 {
            return None;
        }
        let mut bytes = [0_u8; 16];
        let mut digits = 0_usize;
        for (at, byte) in inner.bytes().enumerate() {
            if matches!(at, 8 | 13 | 18 | 23) {
                if byte != b'-' {
                    return None;
                }
                continue;
            }
            let digit = u8::try_from(char::from(byte).to_digit(16)?).ok()?;
            let slot = bytes.get_mut(digits >> 1)?;
            *slot = (*slot << 4) | digit;
            digits = digits.saturating_add(1);
        }
        (digits == 32).then_some(Self(bytes))
    }

    /// False for the all-zero GUID.
    #[must_use]
    pub fn is_some(self) -> bool {
        self != Self::NONE
    }

    /// Without the braces, as bitmaps and command lines have it.
    #[must_use]
    pub fn bare(self) -> String {
        let mut text = String::with_capacity(36);
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                text.push('-');
            }
            for nibble in [byte >> 4, byte & 15] {
                text.push(char::from_digit(nibble.into(), 16).unwrap_or('0'));
            }
        }
        text
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{}}}", self.bare())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_is_the_same_guid_and_shows_in_one() {
        let shown = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
        assert_eq!(Guid::TOP.to_string(), shown);
        assert_eq!(format!("{:?}", Guid::TOP), shown);
        assert_eq!(Guid::parse(shown), Some(Guid::TOP));
        assert_eq!(Guid::parse(&shown.to_uppercase()), Some(Guid::TOP));
        assert_eq!(Guid::parse(&shown[1..37]), Some(Guid::TOP));
        assert!(Guid::TOP.is_some() && !Guid::NONE.is_some());
    }

    #[test]
    fn random_ones_say_that_they_are() {
        let ones = Guid::random([0xff; 16]).bare();
        assert_eq!(ones, "ffffffff-ffff-4fff-bfff-ffffffffffff");
        let zeros = Guid::random([0; 16]).bare();
        assert_eq!(zeros, "00000000-0000-4000-8000-000000000000");
    }

    #[test]
    fn what_is_no_guid_is_none() {
        for bad in [
            "",
            "{}",
            "{",
            "{5fbaabe3-6958-40ff-92a7-860e329aab41",
            "5fbaabe3-6958-40ff-92a7-860e329aab41}",
            "{5fbaabe3-6958-40ff-92a7-860e329aab4}",
            "{5fbaabe3-6958-40ff-92a7-860e329aab4g}",
            "{5fbaabe3069580-40ff92a7-860e329aab41}",
            "{5fbaabe3-6958-40ff-92a7-860e329aab4\u{e9}}",
        ] {
            assert_eq!(Guid::parse(bad), None, "{bad}");
        }
    }
}
