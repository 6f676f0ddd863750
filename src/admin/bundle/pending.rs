//! The list of files that come and go with a change of a bundle.
//!
//! Two lines: the checksum of the second one, and a JSON array of names. A list that a power cut
//! tore is none; nothing had been done when it was written.
//!
//! A name that a user has chosen might be given to a file of the user's, once an interrupted change
//! is forgotten. So such a name comes with what its file is: `[NAME, INODE, LENGTH]`.

use serde::{Deserialize, Serialize};
use std::path::{Component, Path};

/// The list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pending {
    /// Names in the bundle's directory.
    pub names: Vec<Listed>,
}

/// A name, and what its file must be to be meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Listed {
    /// Nobody else has a file of this name.
    Name(String),
    /// Inode, where the host has such, and length.
    Proven(String, Option<u64>, u64),
}

impl Listed {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Name(name) | Self::Proven(name, ..) => name,
        }
    }
}

fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!(
        (parts.next(), parts.next()),
        (Some(Component::Normal(only)), None) if only == name
    )
}

impl Pending {
    pub(super) fn encode(&self) -> Vec<u8> {
        let names = serde_json::json!(self.names).to_string();
        let sum = crc32c::crc32c(names.as_bytes());
        format!("ploopfs-pending {sum:08x}\n{names}\n").into_bytes()
    }

    /// `None` for what is no such list.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let (head, rest) = text.split_once('\n')?;
        let sum = head.strip_prefix("ploopfs-pending ")?;
        let list = rest.strip_suffix('\n')?;
        if sum != format!("{:08x}", crc32c::crc32c(list.as_bytes())) {
            return None;
        }
        let mut names: Vec<Listed> = serde_json::from_str(list).ok()?;
        // Whoever made the bundle may have written this too.
        names.retain(|listed| is_plain(listed.name()));
        Some(Self { names })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_comes_back_and_a_torn_one_does_not() {
        let list = Pending {
            names: vec![
                Listed::Name("a".to_owned()),
                Listed::Name("b\n\"c\"".to_owned()),
                Listed::Proven("d".to_owned(), Some(7), 1 << 40),
                Listed::Proven("e".to_owned(), None, 0),
            ],
        };
        let bytes = list.encode();
        assert_eq!(Pending::decode(&bytes), Some(list));
        for at in 0..bytes.len() {
            assert_eq!(Pending::decode(&bytes[..at]), None, "{at}");
            let mut torn = bytes.clone();
            torn[at] = 0;
            assert_eq!(Pending::decode(&torn), None, "{at}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_left_out() {
        let names = ["../x", "a/b", "/etc/passwd", "", ".", "ok", "./a"];
        let list = Pending {
            names: names.map(|name| Listed::Name(name.to_owned())).to_vec(),
        };
        let found = Pending::decode(&list.encode()).map(|list| list.names);
        assert_eq!(found, Some(vec![Listed::Name("ok".to_owned())]));
    }
}
