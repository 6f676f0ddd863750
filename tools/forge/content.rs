//! What each sector of a forged disk holds.
//!
//! Imports: std only.
//! Never: keeps state; every answer follows from the numbers given.
//!
//! A sector names its seed, its level and its place on the disk, so a misplaced one tells where it
//! came from; the rest is filled from a generator started with the three.

use super::image::ImageSpec;

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;
/// First bytes of each forged sector.
pub(crate) const MARK: &[u8; 6] = b"forge:";
/// What stands after the end of a disk in its last, partial cluster, where garbage is asked for.
pub(crate) const GARBAGE: u8 = 0xa5;

/// One step of the splitmix64 generator.
pub(crate) fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// A number that depends on all of the numbers.
pub(crate) fn mix(numbers: &[u64]) -> u64 {
    let mut state = 0;
    for number in numbers {
        state ^= number;
        state = splitmix(&mut state);
    }
    state
}

/// The 512 bytes of a disk sector as a level of a chain holds them.
pub(crate) fn sector(seed: u64, level: u16, disk_sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes[..6].copy_from_slice(MARK);
    bytes[6..8].copy_from_slice(&level.to_le_bytes());
    bytes[8..16].copy_from_slice(&disk_sector.to_le_bytes());
    bytes[16..24].copy_from_slice(&seed.to_le_bytes());
    let mut state = mix(&[seed, u64::from(level), disk_sector]);
    for word in bytes[24..].chunks_exact_mut(8) {
        word.copy_from_slice(&splitmix(&mut state).to_le_bytes());
    }
    bytes
}

/// Tells what a sector claims to be; for the text of a failed comparison.
pub(crate) fn describe(bytes: &[u8]) -> String {
    if bytes.iter().all(|byte| *byte == 0) {
        return "zeros".to_string();
    }
    match (
        bytes.get(..6),
        bytes.get(6..8),
        bytes.get(8..16),
        bytes.get(16..24),
    ) {
        (Some(mark), Some(level), Some(at), Some(seed)) if mark == MARK => {
            let level = level
                .iter()
                .rev()
                .fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
            let at = at
                .iter()
                .rev()
                .fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
            let seed = seed
                .iter()
                .rev()
                .fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
            format!("forged sector {at} of level {level}, seed {seed}")
        }
        _ => "other bytes".to_string(),
    }
}

/// One level of a part, as a pure description.
#[derive(Clone, Debug)]
pub(crate) enum Level {
    /// A plain base of so many bytes.
    Plain {
        /// Seed of the content.
        seed: u64,
        /// Level number that the sectors carry.
        level: u16,
        /// Length of the file, which may be odd.
        bytes: u64,
    },
    /// An image.
    Image(ImageSpec),
}

/// One part of a disk: `[start, end)` in sectors, base first.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// First sector.
    pub(crate) start: u64,
    /// One past the last sector.
    pub(crate) end: u64,
    /// Base first, top last.
    pub(crate) levels: Vec<Level>,
}

/// A whole disk as a pure description: the bytes that a right reader must show.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    /// In disk order.
    pub(crate) parts: Vec<Part>,
}

impl Part {
    /// The sector at a place counted from the start of the part.
    fn sector(&self, local: u64) -> [u8; 512] {
        for level in self.levels.iter().rev() {
            match level {
                Level::Plain { seed, level, bytes } => {
                    let mut found = [0; 512];
                    let valid = bytes.saturating_sub(local * SECTOR).min(SECTOR) as usize;
                    let whole = sector(*seed, *level, self.start + local);
                    found[..valid].copy_from_slice(&whole[..valid]);
                    return found;
                }
                Level::Image(spec) => {
                    if !spec.maps(local / u64::from(spec.cluster_sectors)) {
                        continue;
                    }
                    // Past the end of a lower delta's own disk its last cluster means nothing.
                    if local >= spec.disk_sectors {
                        return [0; 512];
                    }
                    return sector(spec.seed, spec.level, self.start + local);
                }
            }
        }
        [0; 512]
    }
}

impl Model {
    /// A disk of one image.
    pub(crate) fn of(spec: &ImageSpec) -> Self {
        let levels = vec![Level::Image(spec.clone())];
        Self {
            parts: vec![Part {
                start: 0,
                end: spec.disk_sectors,
                levels,
            }],
        }
    }

    /// Bytes of the disk.
    pub(crate) fn bytes(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.end * SECTOR)
    }

    /// The same disk as its lowest levels alone show it, as a snapshot does.
    pub(crate) fn frozen(&self, levels: usize) -> Self {
        let mut frozen = self.clone();
        for part in &mut frozen.parts {
            part.levels.truncate(levels);
        }
        frozen
    }

    /// What a read of whole sectors must return.
    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        let mut here = at / SECTOR;
        let skip = (at % SECTOR) as usize;
        while bytes.len() < skip + len {
            let part = self
                .parts
                .iter()
                .find(|part| (part.start..part.end).contains(&here));
            bytes.extend(part.map_or([0; 512], |part| part.sector(here - part.start)));
            here += 1;
        }
        bytes.drain(..skip);
        bytes.truncate(len);
        bytes
    }
}

/// The first sector in which two equally long ranges differ, told in words.
pub(crate) fn first_difference(at: u64, expected: &[u8], found: &[u8]) -> Option<String> {
    if expected.len() != found.len() {
        return Some(format!(
            "{} bytes instead of {}",
            found.len(),
            expected.len()
        ));
    }
    let mut pairs = expected.iter().zip(found).enumerate();
    let (first, _) = pairs.find(|(_, (want, have))| want != have)?;
    let start = first.saturating_sub((at as usize + first) % 512);
    let sector = |bytes: &[u8]| {
        let whole = &bytes[start..bytes.len().min(start + 512)];
        let near = &bytes[first..bytes.len().min(first + 8)];
        format!("{} ({near:02x?} there)", describe(whole))
    };
    let (number, byte) = ((at + start as u64) / SECTOR, first - start);
    let (want, have) = (sector(expected), sector(found));
    Some(format!(
        "disk sector {number}, byte {byte}: expected {want}, found {have}"
    ))
}
