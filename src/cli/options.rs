//! The words of `-o`, for the command line, fstab and mount(8) alike.
//!
//! Imports: `error`, `chain`, `disk`, `fuse`.
//! Never: ignores a word that it does not know; a misspelt `ro` must not mount for writing.

use super::size::{parse_millis, parse_size};
use crate::chain::bundle::Selection;
use crate::disk::{DiskOptions, EnospcPolicy};
use crate::error::Error;
use crate::fuse::mount::{Access, MountOptions};
use crate::fuse::session::{Transport, expect_flat};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// Words that mean something to others: mount(8), systemd, the boot scripts. The kernel's own
/// defaults and what we never allow (`dev`, `suid`: programs in front of us add them always) too.
const IGNORED: [&str; 26] = [
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "_netdev",
    "dev",
    "suid",
    "nodev",
    "nosuid",
    "exec",
    "async",
    "atime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "diratime",
    "nodiratime",
    "lazytime",
    "nolazytime",
    "rw",
    "silent",
];

/// Words with no value that do something.
const FLAGS: [&str; 18] = [
    "ro",
    "noexec",
    "noatime",
    "sync",
    "allow_other",
    "allow_root",
    "default_permissions",
    "auto_unmount",
    "nonempty",
    "nofail",
    "drop_bitmaps",
    "trust_header",
    "no_reflink",
    "direct",
    "raw",
    "replace_dead",
    "lock_memory",
    "linearize",
];

/// Words with a value.
const VALUES: [&str; 20] = [
    "fsname",
    "subtype",
    "max_read",
    "uid",
    "gid",
    "umask",
    "fmask",
    "dmask",
    "snapshot",
    "threads",
    "pool_threads",
    "cache",
    "inline_order",
    "enospc",
    "grow_step",
    "flush_interval",
    "lower",
    "allow_outside",
    "partitions",
    "transport",
];

/// Who owns the files of the mount, and their modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// Owner; the mounting user's if not given.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits that files do not get.
    pub file_mask: u16,
    /// Permission bits that directories do not get.
    pub dir_mask: u16,
}

/// All that can be asked of a mount.
#[derive(Clone, Debug)]
pub struct Settings {
    /// For the mount itself.
    pub mount: MountOptions,
    /// For the disk below it.
    pub disk: DiskOptions,
    /// Which disk.
    pub selection: Selection,
    /// Of the files.
    pub ownership: Ownership,
    /// Threads that take requests.
    pub threads: usize,
    /// How requests come in.
    pub transport: Transport,
    /// Show partitions as files.
    pub partitions: bool,
    /// A missing image is no failure.
    pub nofail: bool,
    /// What a dead daemon of ours left makes way.
    pub replace_dead: bool,
    /// The daemon's memory stays in memory.
    pub lock_memory: bool,
    /// The kernel reads the disk from a flat clone.
    pub linearize: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mount: MountOptions::default(),
            disk: DiskOptions::default(),
            selection: Selection {
                write: true,
                ..Selection::default()
            },
            ownership: Ownership {
                uid: nix::unistd::getuid().as_raw(),
                gid: nix::unistd::getgid().as_raw(),
                file_mask: 0o077,
                dir_mask: 0o077,
            },
            threads: 8,
            transport: Transport::default(),
            partitions: true,
            nofail: false,
            replace_dead: false,
            lock_memory: false,
            linearize: false,
        }
    }
}

/// Splits at commas; a backslash takes a comma or backslash as it is.
#[must_use]
pub fn split(text: &OsStr) -> Vec<OsString> {
    let mut words = Vec::new();
    let mut word = Vec::new();
    let mut bytes = text.as_bytes().iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' if matches!(bytes.peek(), Some(b',' | b'\\')) => word.extend(bytes.next()),
            b',' => words.push(std::mem::take(&mut word)),
            _ => word.push(byte),
        }
    }
    words.push(word);
    words
        .into_iter()
        .filter(|word| !word.is_empty())
        .map(OsString::from_vec)
        .collect()
}

fn number<T: std::str::FromStr>(name: &str, text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("{name}={text}: not a number that can be used here"))
}

fn mask(name: &str, text: &str) -> Result<u16, String> {
    match u16::from_str_radix(text, 8) {
        Ok(mask) if mask <= 0o777 => Ok(mask),
        _ => Err(format!("{name}={text}: not an octal mask such as 077")),
    }
}

/// Reads `wait`, `fail` or a number of seconds.
pub fn parse_enospc(text: &str) -> Result<EnospcPolicy, String> {
    match text {
        "wait" => Ok(EnospcPolicy::Wait),
        "fail" => Ok(EnospcPolicy::Fail),
        seconds => seconds
            .parse()
            .map(EnospcPolicy::Seconds)
            .map_err(|_| format!("'{text}': use wait, fail or a number of seconds")),
    }
}

/// Reads a number of threads.
pub fn parse_threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(threads @ 1..=64) => Ok(threads),
        _ => Err(format!("'{text}': use a number of threads from 1 to 64")),
    }
}

/// Reads how requests come in; what the error does not name is for tests.
pub fn parse_transport(text: &str) -> Result<Transport, String> {
    match text {
        "auto" => Ok(Transport::Auto),
        "fuser" => Ok(Transport::Fuser),
        "uring" => Ok(Transport::Uring),
        "dev" => Ok(Transport::Device),
        "crowd" => Ok(Transport::Crowded),
        "lame" => Ok(Transport::Lame),
        "refused" => Ok(Transport::Refused),
        "partly" => Ok(Transport::PartlyRefused),
        "late" => Ok(Transport::Late),
        _ => Err(format!("'{text}': use auto, fuser or uring")),
    }
}

/// Reads an order: log2 of a number of 4 KiB pages.
pub fn parse_order(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(order @ 0..=20) => Ok(order),
        _ => Err(format!("'{text}': use an order from 0 (4 KiB) to 20")),
    }
}

/// Reads a step by which files grow.
pub fn parse_step(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        0 => Err("the file cannot grow by 0".into()),
        step => Ok(step),
    }
}

impl Settings {
    /// Takes all words of one `-o`; later ones win.
    pub fn apply(&mut self, text: &OsStr) -> Result<(), String> {
        split(text).iter().try_for_each(|word| self.word(word))
    }

    /// Fails if a flat clone is wanted that there cannot be, whatever the image.
    pub fn expect_linear(&self) -> Result<(), Error> {
        match self.linearize {
            true => expect_flat(self.transport, self.disk.read_only),
            false => Ok(()),
        }
    }

    /// Nobody may write, or everybody who could.
    pub fn set_read_only(&mut self, read_only: bool) {
        self.mount.read_only = read_only;
        self.disk.read_only = read_only;
        self.selection.write = !read_only;
    }

    fn word(&mut self, word: &OsStr) -> Result<(), String> {
        let bytes = word.as_bytes();
        let (name, value) = match bytes.iter().position(|byte| *byte == b'=') {
            Some(at) => {
                let (name, value) = bytes.split_at(at);
                (
                    name,
                    Some(OsStr::from_bytes(value.get(1..).unwrap_or_default())),
                )
            }
            None => (bytes, None),
        };
        let name = String::from_utf8_lossy(name).into_owned();
        if name.starts_with("x-") || (IGNORED.contains(&name.as_str()) && name != "rw") {
            return Ok(());
        }
        match value {
            None => self.flag(&name),
            Some(value) => self.value(&name, value),
        }
    }

    fn flag(&mut self, name: &str) -> Result<(), String> {
        match name {
            "ro" => self.set_read_only(true),
            "rw" => self.set_read_only(false),
            "noexec" => self.mount.noexec = true,
            "noatime" => self.mount.noatime = true,
            "sync" => self.mount.sync = true,
            "allow_other" => self.mount.access = Access::Everybody,
            "allow_root" => self.mount.access = Access::Root,
            "default_permissions" => self.mount.default_permissions = true,
            "auto_unmount" => self.mount.auto_unmount = true,
            "nonempty" => self.mount.nonempty = true,
            "nofail" => self.nofail = true,
            "drop_bitmaps" => self.disk.drop_bitmaps = true,
            "no_reflink" => self.disk.reflink = false,
            "direct" => self.disk.direct = true,
            "trust_header" => self.selection.trust_header = true,
            "raw" => self.selection.raw = true,
            "replace_dead" => self.replace_dead = true,
            "lock_memory" => self.lock_memory = true,
            "linearize" => self.linearize = true,
            _ if VALUES.contains(&name) => return Err(format!("-o {name} needs a value")),
            _ => return Err(unknown(name)),
        }
        Ok(())
    }

    fn value(&mut self, name: &str, raw: &OsStr) -> Result<(), String> {
        let text = &*raw.to_string_lossy();
        let told = |e: String| format!("-o {name}={e}");
        match name {
            "fsname" => self.mount.fsname = Some(raw.to_owned()),
            "subtype" => self.mount.subtype = Some(text.to_owned()),
            "max_read" => self.mount.max_read = Some(number(name, text)?),
            "uid" => self.ownership.uid = number(name, text)?,
            "gid" => self.ownership.gid = number(name, text)?,
            "umask" => {
                self.ownership.file_mask = mask(name, text)?;
                self.ownership.dir_mask = mask(name, text)?;
            }
            "fmask" => self.ownership.file_mask = mask(name, text)?,
            "dmask" => self.ownership.dir_mask = mask(name, text)?,
            "snapshot" => self.selection.snapshot = Some(text.to_owned()),
            "threads" => self.threads = parse_threads(text).map_err(told)?,
            "transport" => self.transport = parse_transport(text).map_err(told)?,
            "pool_threads" => self.disk.pool_threads = parse_threads(text).map_err(told)?,
            "cache" => self.disk.bat_cache = parse_size(text).map_err(told)?,
            "inline_order" => self.disk.inline_order = parse_order(text).map_err(told)?,
            "enospc" => self.disk.enospc = parse_enospc(text).map_err(told)?,
            "grow_step" => self.disk.grow_step = parse_step(text).map_err(told)?,
            "flush_interval" => self.disk.flush_interval_ms = parse_millis(text).map_err(told)?,
            "lower" => self.selection.lower.push(PathBuf::from(raw)),
            "allow_outside" => self.selection.allow_outside.push(PathBuf::from(raw)),
            "partitions" => match text {
                "ro" => self.partitions = true,
                "off" => self.partitions = false,
                _ => return Err("-o partitions= takes ro or off".into()),
            },
            "format" if text == "raw" => self.selection.raw = true,
            "format" => return Err("-o format= takes raw only; the rest is recognised".into()),
            _ if FLAGS.contains(&name) => return Err(format!("-o {name} takes no value")),
            _ => return Err(unknown(name)),
        }
        Ok(())
    }
}

fn unknown(name: &str) -> String {
    let known = FLAGS
        .iter()
        .chain(&VALUES)
        .chain(&IGNORED)
        .chain(&["format"]);
    let nearest = known.map(|word| (distance(name, word), *word)).min();
    match nearest {
        Some((distance, word)) if distance <= name.len().div_ceil(2) => {
            format!("unknown option '{name}' after -o; did you mean '{word}'?")
        }
        _ => format!("unknown option '{name}' after -o"),
    }
}

/// Letters to change, add or take away to make one word of the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut before = i + 1;
        let mut diagonal = i;
        for (cell, y) in row.iter_mut().skip(1).zip(b.bytes()) {
            let change = diagonal + usize::from(x != y);
            diagonal = *cell;
            *cell = change.min(diagonal + 1).min(before + 1);
            before = *cell;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> Result<Settings, String> {
        let mut settings = Settings::default();
        settings.apply(OsStr::new(text)).map(|()| settings)
    }

    #[test]
    fn words_of_others_are_let_through() {
        let settings =
            parsed("rw,dev,suid,noauto,nofail,_netdev,x-systemd.automount,user").unwrap();
        assert!(settings.nofail && !settings.disk.read_only && settings.selection.write);
    }

    #[test]
    fn the_last_of_ro_and_rw_wins() {
        assert!(parsed("rw,ro").unwrap().disk.read_only);
        assert!(!parsed("ro,rw").unwrap().mount.read_only);
    }

    #[test]
    fn unknown_words_are_refused_with_the_nearest_known() {
        assert!(parsed("snapshto=x").unwrap_err().contains("'snapshot'"));
        assert!(parsed("alow_other").unwrap_err().contains("'allow_other'"));
        assert!(!parsed("qqqqqqqqqqq").unwrap_err().contains("mean"));
        assert!(parsed("ro=1").is_err());
        assert!(parsed("snapshot").unwrap_err().contains("needs a value"));
        assert!(parsed("umask=999").is_err());
    }

    #[test]
    fn values_are_read() {
        let text =
            "snapshot=a\\,b,cache=1M,enospc=wait,threads=3,fmask=022,allow_root,grow_step=2M";
        let settings = parsed(text).unwrap();
        assert!(!settings.replace_dead && !settings.lock_memory);
        let both = parsed("replace_dead,lock_memory,linearize").unwrap();
        assert!(both.replace_dead && both.lock_memory && both.linearize);
        assert_eq!(settings.selection.snapshot.as_deref(), Some("a,b"));
        assert_eq!(settings.disk.bat_cache, 1 << 20);
        assert_eq!(settings.disk.enospc, EnospcPolicy::Wait);
        assert_eq!((settings.threads, settings.ownership.file_mask), (3, 0o022));
        assert!(settings.mount.default_permissions);
        assert_eq!(settings.mount.access, Access::Root);
    }

    #[test]
    fn distances_count_changes() {
        for (a, b, expected) in [("", "ab", 2), ("ro", "ro", 0), ("kitten", "sitting", 3)] {
            assert_eq!(distance(a, b), expected);
        }
    }

    proptest! {
        #[test]
        fn joined_words_split_into_themselves(
            words in proptest::collection::vec("[a-z=,\\\\ ]{1,12}", 0..6)
        ) {
            let joined = words
                .iter()
                .map(|word| word.replace('\\', "\\\\").replace(',', "\\,"))
                .collect::<Vec<_>>()
                .join(",");
            let split: Vec<_> = split(OsStr::new(&joined));
            prop_assert_eq!(split, words.iter().map(OsString::from).collect::<Vec<_>>());
        }
    }
}
