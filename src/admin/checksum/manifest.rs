//! The manifest as text and as JSON.
//!
//! ```text
//! ploopfs-checksum 1 crc32c
//! size 104857600
//! cluster 1048576
//! 0 8ec1a4f3
//! 17 02b6d05c
//! end 2 5d7b1c90
//! ```
//!
//! Each line between is a cluster and its crc32c; a cluster that is not listed is all zeros. The
//! last line counts those lines and has the crc32c of all lines above it, so that a manifest that
//! was cut or changed is not taken for one. The JSON has the same members and no such line: a cut
//! document is no JSON.

use crate::error::{Error, ErrorKind, Result};
use crate::units::len_u64;
use serde::Deserialize;
use std::io::{BufRead, Read};

/// First words of the text.
const TITLE: &str = "ploopfs-checksum 1 crc32c";
/// The most bytes of a line with its end; those of a manifest are shorter.
const LINE_MAX: u64 = 128;
/// The most bytes of the JSON, which is read as a whole.
const JSON_MAX: u64 = 256 << 20;
/// Version of both forms.
pub const SCHEMA_VERSION: u32 = 1;

/// The sum of one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    /// Its number on the disk.
    pub cluster: u64,
    /// The crc32c of its bytes.
    pub crc: u32,
}

/// The sums of a disk, in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster: u64,
    /// Clusters that are not all zeros, in rising order.
    pub sums: Vec<Sum>,
}

/// Makes a manifest line by line.
#[derive(Debug)]
pub struct Writer {
    is_json: bool,
    count: u64,
    crc: u32,
}

impl Writer {
    /// Begins; the text is the beginning.
    #[must_use]
    pub fn new(size: u64, cluster: u64, is_json: bool) -> (Self, String) {
        let mut this = Self {
            is_json,
            count: 0,
            crc: 0,
        };
        let text = if is_json {
            format!(
                "{{\"schema_version\":{SCHEMA_VERSION},\"algorithm\":\"crc32c\",\
                 \"size_bytes\":{size},\"cluster_bytes\":{cluster},\"clusters\":["
            )
        } else {
            format!("{TITLE}\nsize {size}\ncluster {cluster}\n")
        };
        this.crc = crc32c::crc32c(text.as_bytes());
        (this, text)
    }

    /// Appends a sum.
    pub fn push(&mut self, sum: Sum, text: &mut String) {
        use std::fmt::Write;
        let start = text.len();
        let Sum { cluster, crc } = sum;
        // Writing to a string cannot fail.
        let _ = match (self.is_json, self.count) {
            (false, _) => writeln!(text, "{cluster} {crc:08x}"),
            (true, 0) => write!(text, "\n[{cluster},\"{crc:08x}\"]"),
            (true, _) => write!(text, ",\n[{cluster},\"{crc:08x}\"]"),
        };
        self.count += 1;
        let added = text.as_bytes().get(start..).unwrap_or_default();
        self.crc = crc32c::crc32c_append(self.crc, added);
    }

    /// The end.
    #[must_use]
    pub fn end(&self) -> String {
        if self.is_json {
            return "]}\n".to_owned();
        }
        format!("end {} {:08x}\n", self.count, self.crc)
    }
}

#[derive(Deserialize)]
struct Document {
    schema_version: u32,
    algorithm: String,
    size_bytes: u64,
    cluster_bytes: u64,
    clusters: Vec<(u64, String)>,
}

/// What a manifest cannot be used for.
fn spoilt(why: impl std::fmt::Display) -> Error {
    let why = format!("it cannot be used: {why}");
    Error::why(ErrorKind::Manifest, why).fix("make it anew: `ploopfs checksum IMAGE >FILE`")
}

impl Manifest {
    /// Reads either form. What is no manifest is refused at its first line, however long it is.
    pub fn read(mut input: impl BufRead) -> Result<Self> {
        let mut first = input.fill_buf()?.first().copied();
        // Who made a manifest by hand may have put blanks before it.
        for _ in 0..LINE_MAX {
            if !first.is_some_and(|byte| byte.is_ascii_whitespace()) {
                break;
            }
            input.consume(1);
            first = input.fill_buf()?.first().copied();
        }
        let read = if first == Some(b'{') {
            let mut bytes = Vec::new();
            input.take(JSON_MAX + 1).read_to_end(&mut bytes)?;
            if len_u64(bytes.len()) > JSON_MAX {
                let why = format!("its JSON has more than {JSON_MAX} bytes");
                return Err(spoilt(why).fix("make it anew without --json"));
            }
            parse_json(&bytes)
        } else {
            parse_text(input)
        };
        let manifest = read?;
        super::check_cluster(manifest.cluster)
            .map_err(|e| spoilt(e.why_text().unwrap_or_default()))?;
        if i64::try_from(manifest.size).is_err() {
            return Err(spoilt("no disk is so large"));
        }
        Ok(manifest)
    }

    fn push(&mut self, sum: Sum) -> Result<()> {
        let Sum { cluster, .. } = sum;
        let is_in_order = self.sums.last().is_none_or(|last| last.cluster < cluster);
        let start = cluster.checked_mul(self.cluster);
        if !is_in_order || start.is_none_or(|start| start >= self.size) {
            let why = format!("cluster {cluster} is out of order or past the disk's end");
            return Err(spoilt(why));
        }
        self.sums.push(sum);
        Ok(())
    }
}

fn parse_json(bytes: &[u8]) -> Result<Manifest> {
    let found: Document = serde_json::from_slice(bytes).map_err(spoilt)?;
    if found.schema_version != SCHEMA_VERSION || found.algorithm != "crc32c" {
        let (version, algorithm) = (found.schema_version, found.algorithm);
        return Err(spoilt(format!(
            "it is of version {version}, with {algorithm}"
        )));
    }
    let mut manifest = Manifest {
        size: found.size_bytes,
        cluster: found.cluster_bytes,
        sums: Vec::new(),
    };
    for (cluster, crc) in found.clusters {
        let crc = parse_crc(&crc)?;
        manifest.push(Sum { cluster, crc })?;
    }
    Ok(manifest)
}

fn parse_crc(digits: &str) -> Result<u32> {
    let crc = u32::from_str_radix(digits, 16).ok();
    crc.filter(|_| digits.len() == 8)
        .ok_or_else(|| spoilt(format!("{digits:?} is no sum of eight digits")))
}

/// The lines of a text, and the sum of those that have been read.
struct Lines<R> {
    input: R,
    line: Vec<u8>,
    crc: u32,
}

impl<R: BufRead> Lines<R> {
    /// The next line, and the sum of all before it; `None` at the end.
    fn next(&mut self) -> Result<Option<(&str, u32)>> {
        self.line.clear();
        let mut bounded = self.input.by_ref().take(LINE_MAX);
        bounded.read_until(b'\n', &mut self.line)?;
        if self.line.is_empty() {
            return Ok(None);
        }
        if len_u64(self.line.len()) == LINE_MAX {
            return Err(spoilt("it has lines that are too long for one"));
        }
        let before = self.crc;
        self.crc = crc32c::crc32c_append(before, &self.line);
        let line = std::str::from_utf8(&self.line).map_err(|_| spoilt("it is no text"))?;
        Ok(Some((line.trim_end_matches('\n'), before)))
    }

    /// The number in a line of this name.
    fn number(&mut self, name: &str) -> Result<u64> {
        let line = self.next()?.map_or("", |(line, _)| line);
        let digits = line.strip_prefix(name);
        let digits = digits.and_then(|rest| rest.strip_prefix(' '));
        digits
            .and_then(|digits| digits.parse().ok())
            .ok_or_else(|| spoilt(format!("it has no line with the {name}")))
    }
}

fn parse_text(input: impl BufRead) -> Result<Manifest> {
    let mut lines = Lines {
        input,
        line: Vec::new(),
        crc: 0,
    };
    if lines.next()?.map(|(line, _)| line) != Some(TITLE) {
        return Err(spoilt(format!("its first line is not {TITLE:?}")));
    }
    let mut manifest = Manifest {
        size: lines.number("size")?,
        cluster: lines.number("cluster")?,
        sums: Vec::new(),
    };
    loop {
        let Some((line, before)) = lines.next()? else {
            return Err(spoilt("it is cut, its last line is missing"));
        };
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        if word == "end" {
            let count = len_u64(manifest.sums.len());
            let is_whole = rest == format!("{count} {before:08x}");
            if !is_whole || lines.next()?.is_some() {
                return Err(spoilt("it was changed, its own sum is wrong"));
            }
            return Ok(manifest);
        }
        let cluster = word.parse();
        let cluster = cluster.map_err(|_| spoilt(format!("{line:?} is no line of one")))?;
        let crc = parse_crc(rest)?;
        manifest.push(Sum { cluster, crc })?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Manifest {
        let sum = |cluster| Sum {
            cluster,
            crc: u32::try_from(cluster).unwrap() ^ 0x8ec1_a4f3,
        };
        Manifest {
            size: 100_000,
            cluster: 4096,
            sums: [0, 3, 24].map(sum).to_vec(),
        }
    }

    fn written(manifest: &Manifest, is_json: bool) -> String {
        let (mut writer, mut text) = Writer::new(manifest.size, manifest.cluster, is_json);
        for sum in &manifest.sums {
            writer.push(*sum, &mut text);
        }
        text + &writer.end()
    }

    #[test]
    fn both_forms_are_read_back() {
        let empty = Manifest {
            sums: Vec::new(),
            ..some()
        };
        for manifest in [some(), empty] {
            for is_json in [false, true] {
                let text = written(&manifest, is_json);
                assert_eq!(Manifest::read(text.as_bytes()).unwrap(), manifest);
            }
        }
    }

    #[test]
    fn what_was_cut_or_changed_is_refused() {
        for is_json in [false, true] {
            let text = written(&some(), is_json);
            for len in 0..text.trim_end().len() {
                let cut = Manifest::read(&text.as_bytes()[..len]);
                assert!(cut.is_err(), "{len} of {text}");
            }
        }
        let text = written(&some(), false);
        for at in 0..text.len() - 1 {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            assert!(Manifest::read(&bytes[..]).is_err(), "byte {at}");
        }
        let more = format!("{text}25 00000000\n");
        assert!(Manifest::read(more.as_bytes()).is_err());
    }

    #[test]
    fn what_never_ends_is_refused_at_its_first_line() {
        for byte in [0, b'a', 0xff, b'{'] {
            let endless = std::io::BufReader::new(std::io::repeat(byte).take(1 << 33));
            let refused = Manifest::read(endless).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Manifest);
        }
    }

    #[test]
    fn senseless_numbers_are_refused() {
        for (size, cluster, sums) in [
            (100, 0, vec![]),
            (100, 513, vec![]),
            (1 << 40, 1 << 40, vec![]),
            (4096, 4096, vec![1]),
            (1 << 40, 4096, vec![3, 3]),
            (1 << 40, 4096, vec![3, 2]),
            (u64::MAX, 4096, vec![u64::MAX]),
        ] {
            let sum = |cluster| Sum { cluster, crc: 1 };
            let manifest = Manifest {
                size,
                cluster,
                sums: sums.into_iter().map(sum).collect(),
            };
            for is_json in [false, true] {
                let text = written(&manifest, is_json);
                let refused = Manifest::read(text.as_bytes()).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::Manifest, "{text}");
            }
        }
    }
}
