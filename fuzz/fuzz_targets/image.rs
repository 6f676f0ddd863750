//! Any bytes as a single image: opened read-only and read, opened for writing and written to,
//! closed, opened again.
//!
//! Twelve bytes choose the length of the file and what is done to it; the rest is its start. A dumb
//! reader that knows of nothing but the format says what must be read. README.md says how to run
//! it.
#![no_main]

mod support;

use libfuzzer_sys::fuzz_target;
use ploopfs::chain::bundle::{OpenedFile, OpenedImages, OpenedPart, Plain};
use ploopfs::delta::image::Image;
use ploopfs::delta::survey::survey;
use ploopfs::disk::{self, Disk};
use ploopfs::units::SectorCount;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::dice::Dice;
use support::sparse::SparseFile;
use support::window::{Shown, Windows, steps};

/// Bytes of the input that are no bytes of the file.
const CONTROL: usize = 12;
/// Bytes of the file behind those that the input gives: a pattern, so that clusters differ.
const PATTERN: u64 = 64 << 10;
/// Clusters that are written to: larger ones only cost time.
const CLUSTER_MAX: u64 = 128 << 10;
const IN_USE: u32 = 0x746f_6e59;

/// The header's numbers as the dumb reader sees them.
struct Fields {
    is_v1: bool,
    cluster: u128,
    entries: u128,
    /// First byte that may hold data.
    data: u128,
    in_use: u32,
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

impl Fields {
    fn of(file: &SparseFile) -> Self {
        let bytes = file.get(0, 64).expect("an image that opens has a header");
        let is_v1 = bytes[..16] == *b"WithoutFreeSpace";
        let cluster = u128::from(le32(&bytes, 28)) * 512;
        let entries = u128::from(le32(&bytes, 32));
        let table_end = 64 + 4 * entries;
        let data = match u128::from(le32(&bytes, 48)) {
            0 if is_v1 => table_end.div_ceil(512) * 512,
            0 => table_end.div_ceil(cluster) * cluster,
            first => (first * 512).max(table_end),
        };
        Self {
            is_v1,
            cluster,
            entries,
            data,
            in_use: le32(&bytes, 44),
        }
    }

    /// The place of a disk byte in the file: `Err` where the entry is bad, `None` in a hole.
    fn place(&self, file: &SparseFile, at: u128) -> Result<Option<u128>, u128> {
        let index = at / self.cluster;
        if index >= self.entries {
            return Ok(None);
        }
        let entry = file
            .get(64 + 4 * index as u64, 4)
            .expect("the table is there");
        let entry = u128::from(le32(&entry, 0));
        let start = entry * if self.is_v1 { 512 } else { self.cluster };
        if entry == 0 {
            Ok(None)
        } else if start < self.data || start + self.cluster > u128::from(file.size()) {
            Err(start)
        } else {
            Ok(Some(start + at % self.cluster))
        }
    }

    /// What a step of the disk holds.
    fn step(&self, file: &SparseFile, at: u64, len: u64) -> Shown {
        let mut bytes = vec![0; len as usize];
        let mut done = 0;
        while done < len {
            let here = u128::from(at + done);
            let left = (self.cluster - here % self.cluster).min(u128::from(len - done));
            if let Some(place) = self.place(file, here).ok()? {
                let piece = file.get(place as u64, left as usize)?;
                bytes[done as usize..][..piece.len()].copy_from_slice(&piece);
            }
            done += left as u64;
        }
        Some(bytes)
    }
}

fn open(file: &Arc<SparseFile>, write: bool) -> ploopfs::error::Result<Arc<Disk>> {
    let opened = OpenedFile {
        path: PathBuf::from("image"),
        storage: Arc::clone(file) as Arc<dyn ploopfs::storage::Storage>,
        plain: Plain::No,
        guid: None,
    };
    let part = OpenedPart {
        start: SectorCount::ZERO,
        end: None,
        blocksize: None,
        files: vec![opened],
    };
    let images = Arc::new(OpenedImages::from_parts(PathBuf::from("image"), vec![part]));
    let mut options = support::options(!write);
    options.drop_bitmaps = true;
    disk::open_with(images, &options, support::resources()).map(|(disk, _)| disk)
}

/// The file that an input describes, and the seed of what is done to it.
fn file_of(data: &[u8]) -> Option<(SparseFile, u64)> {
    let (control, bytes) = data.split_at_checked(CONTROL)?;
    let len = (u64::from(control[0]) + 1) << (control[1] % 18);
    let len = len + u64::from(control[2]) * 512 + u64::from(control[3]);
    let file = SparseFile::new(bytes, len);
    let start = bytes.len() as u64;
    let mut dice = Dice(u64::from(control[3]));
    let end = len.min(PATTERN);
    if control[1] & 0x80 != 0 && start < end {
        let header_end = start.next_multiple_of(512).min(end);
        file.put(header_end, &dice.bytes(end - header_end));
    }
    if control[1] & 0x40 != 0 {
        bless_extension(&file);
    }
    let seed = u64::from_le_bytes(control[4..].try_into().expect("eight bytes"));
    Some((file, seed))
}

/// Gives the format extension, where there could be one, a right checksum.
fn bless_extension(file: &SparseFile) {
    let Some(header) = file.get(0, 64) else {
        return;
    };
    let at = u64::from(le32(&header, 56)) * 512;
    let len = u64::from(le32(&header, 28)) * 512;
    if len > 64 << 10 || len < 512 {
        return;
    }
    if let Some(cluster) = file.get(at, len as usize) {
        file.put(at + 8, &md5::compute(&cluster[24..]).0);
    }
}

/// Reads all that is looked at and holds it against the dumb reader.
fn check_reading(file: &Arc<SparseFile>) -> Option<Windows> {
    let before = file.copy();
    let disk = open(file, false).ok()?;
    let fields = Fields::of(file);
    let found = Windows::of(&disk);
    disk.close().expect("nothing to do");
    let expected = steps(disk_size(file));
    assert!(found.iter().map(|(step, _)| step).eq(expected));
    for ((at, len), shown) in found.iter() {
        assert_eq!(*shown, fields.step(file, at, len), "{len} bytes at {at}");
    }
    assert!(file.same_as(&before), "reading changes nothing");
    Some(found)
}

fn disk_size(file: &SparseFile) -> u64 {
    let header = file.get(0, 64).expect("a header");
    let upper = if header[..16] == *b"WithoutFreeSpace" {
        0
    } else {
        u64::from(le32(&header, 40))
    };
    (u64::from(le32(&header, 36)) | upper << 32) * 512
}

fn check_writing(file: &Arc<SparseFile>, seen: &Windows, dice: &mut Dice) {
    let before = file.copy();
    let disk = match open(file, true) {
        Ok(disk) => disk,
        Err(_) => {
            assert!(file.same_as(&before), "what is refused is left alone");
            return;
        }
    };
    let mut windows = Windows::of(&disk);
    seen.assert_kept_by(&windows, "opened for writing");
    assert!(windows.is_whole(), "open for writing, with bad entries");
    windows.change(&disk, dice, 1 + dice.0 % 12);
    windows.assert_kept_by(&Windows::of(&disk), "written");
    disk.close().expect("it closes");
    let again = check_reading(file).expect("it opens again");
    windows.assert_kept_by(&again, "closed and opened");
    assert_ne!(
        Fields::of(file).in_use,
        IN_USE,
        "a closed image has no mark"
    );
    let storage = Arc::clone(file) as Arc<dyn ploopfs::storage::Storage>;
    let image = Image::expanding(Path::new("image"), storage).expect("a header");
    let found = survey(&image, image.header().expect("a header")).expect("a table");
    assert_eq!(found.fault_count, 0);
    // A file that was never written to keeps its odd end.
    assert!(found.tail_len == 0 || file.same_as(&before));
}

fn run(file: SparseFile, seed: u64) {
    let file = Arc::new(file);
    let Some(seen) = check_reading(&file) else {
        return;
    };
    if Fields::of(&file).cluster <= u128::from(CLUSTER_MAX) {
        check_writing(&file, &seen, &mut Dice(seed));
    }
}

fuzz_target!(|data: &[u8]| {
    if let Some((file, seed)) = file_of(data) {
        support::alone::run(|| run(file, seed));
    }
});
