//! What a disk is called until it is whole: by that is known what was left of the making of one.

/// What such a name has behind the disk's.
const CREATING: &str = ".creating.";
/// What a flat file has behind that.
pub const FLAT: &str = ".flat";
/// Digits of such a name.
const DIGITS: usize = 8;
/// The most bytes of a name on any usual file system.
const NAME_MAX: usize = 255;

/// The start of such names. Long ones of disks lose their end: what is left of them and what is put
/// behind it have room together.
fn start_of(name: &str) -> String {
    let most = NAME_MAX - CREATING.len() - DIGITS - FLAT.len();
    let mut kept = name.len().min(most);
    while !name.is_char_boundary(kept) {
        kept -= 1;
    }
    format!("{}{CREATING}", &name[..kept])
}

/// What a disk of this name is called until it is whole.
#[must_use]
pub fn unfinished_name(name: &str, digits: &str) -> String {
    format!("{}{digits}", start_of(name))
}

/// Those of a directory's names that disks have until they are whole: all, or those of a disk that
/// is to have this name.
#[must_use]
pub fn unfinished<'a>(names: &'a [String], disk: Option<&str>) -> Vec<&'a str> {
    let start = disk.map(start_of);
    let is_one = |name: &&str| {
        let name = name.strip_suffix(FLAT).unwrap_or(name);
        let Some((before, digits)) = name.rsplit_once(CREATING) else {
            return false;
        };
        let is_number = digits.len() == DIGITS && digits.bytes().all(|b| b.is_ascii_hexdigit());
        let is_its = match &start {
            Some(start) => start.strip_suffix(CREATING) == Some(before),
            None => !before.is_empty(),
        };
        is_number && is_its
    };
    names.iter().map(String::as_str).filter(is_one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_by_their_ends() {
        let long = "\u{e4}".repeat(120) + ".hdd";
        let own = [
            unfinished_name("a.hdd", "0123abcd"),
            unfinished_name("a.hdd", "0123abcd") + FLAT,
            unfinished_name(&long, "0123ABCD") + FLAT,
        ];
        assert_eq!(own[0], "a.hdd.creating.0123abcd");
        assert!(own[2].len() <= NAME_MAX);
        let mut names = own.to_vec();
        for other in [
            "a.hdd",
            "a.hdd.creating.0123abc",
            "a.hdd.creating.0123abcg",
            "a.hdd.creating.0123abcd.x",
            "a.hdd.creating.",
            ".creating.0123abcd",
        ] {
            names.push(other.to_owned());
        }
        assert_eq!(unfinished(&names, None), own);
        assert_eq!(unfinished(&names, Some("a.hdd")), own[..2]);
        assert_eq!(unfinished(&names, Some(&long)), own[2..]);
        assert_eq!(unfinished(&names, Some("b.hdd")), [""; 0]);
    }
}
