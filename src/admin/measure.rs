//! What a conversion will need: bytes of the target's file.
//!
//! Only the extents of the source are looked at. What is told is an upper bound: a conversion finds
//! zeros that the source has written as data.

use crate::admin::create::{Kind, Product, Request, plan_as};
use crate::admin::source::Source;
use crate::admin::source::work::DataCursor;
use crate::error::Result;
use serde::Serialize;

/// Cluster size of images that we make without being told another.
pub const CLUSTER_DEFAULT: u64 = 1 << 20;
/// Cluster size of qcow2 that QEMU makes without being told another.
pub const QCOW2_CLUSTER: u64 = 1 << 16;
/// Bytes of a qcow2's table entry, and bits of a reference count.
const QCOW2_ENTRY: u64 = 8;
const QCOW2_REFCOUNT_BITS: u64 = 16;
/// A descriptor fits in here.
const DESCRIPTOR: u64 = 4096;

/// What the target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The disk's bytes as they are.
    Raw,
    /// A single image of ours, with this cluster size.
    Image(u64),
    /// A bundle of ours, with this cluster size.
    Bundle(u64),
    /// QEMU's format.
    Qcow2,
}

/// What it will need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Measured {
    /// Bytes of the file for what the disk holds now.
    pub required: u64,
    /// Bytes of the file when every cluster has been written.
    #[serde(rename = "fully-allocated")]
    pub fully_allocated: u64,
    /// Bytes of the disk that may be something else than zeros. QEMU does not tell this.
    pub data: u64,
}

/// Measures the conversion of a disk.
pub fn measure(source: &dyn Source, target: Target) -> Result<Measured> {
    let mut cursor = DataCursor::new(source);
    let mut clusters = Clusters::new(target);
    let (mut at, mut data) = (0, 0_u64);
    while let Some(range) = cursor.at(at)? {
        data += range.end - range.start;
        at = range.end;
        clusters.add(range.start, range.end);
    }
    of(source.size(), clusters.count, data, target)
}

/// Measures an empty disk of a size.
pub fn measure_size(size: u64, target: Target) -> Result<Measured> {
    of(size, 0, 0, target)
}

/// Counts the target's clusters that ranges in rising order touch.
struct Clusters {
    size: u64,
    count: u64,
    /// One past the last that was counted.
    end: u64,
}

impl Clusters {
    fn new(target: Target) -> Self {
        Self {
            size: match target {
                Target::Raw => 1,
                Target::Image(size) | Target::Bundle(size) => size.max(1),
                Target::Qcow2 => QCOW2_CLUSTER,
            },
            count: 0,
            end: 0,
        }
    }

    fn add(&mut self, start: u64, end: u64) {
        let first = (start / self.size).max(self.end);
        let last = end.div_ceil(self.size);
        self.count += last.saturating_sub(first);
        self.end = self.end.max(last);
    }
}

fn of(size: u64, clusters: u64, data: u64, target: Target) -> Result<Measured> {
    let (overhead, cluster) = match target {
        Target::Raw => {
            return Ok(Measured {
                required: size,
                fully_allocated: size,
                data,
            });
        }
        Target::Image(cluster) => (table(size, cluster)?, cluster),
        Target::Bundle(cluster) => (table(size, cluster)?.saturating_add(DESCRIPTOR), cluster),
        Target::Qcow2 => (qcow2_metadata(size), QCOW2_CLUSTER),
    };
    let whole = size.div_ceil(cluster).saturating_mul(cluster);
    Ok(Measured {
        required: overhead.saturating_add(clusters.saturating_mul(cluster)),
        fully_allocated: overhead.saturating_add(whole),
        data,
    })
}

/// Header and table of an image, in whole clusters; an error where no conversion can make it.
fn table(size: u64, cluster: u64) -> Result<u64> {
    let request = Request {
        size,
        kind: Kind::Expanding,
        version: None,
        cluster: Some(cluster),
        product: Product::Any,
        file_system: None,
    };
    let layout = plan_as(false, &request, false)?.shape.layout()?;
    let first = layout.first_cluster();
    Ok(layout.cluster().file_start(first).get())
}

/// Header, mapping tables and reference counts of a qcow2, in whole clusters.
fn qcow2_metadata(size: u64) -> u64 {
    let per_cluster = QCOW2_CLUSTER / QCOW2_ENTRY;
    let data = size.div_ceil(QCOW2_CLUSTER);
    let second = data.div_ceil(per_cluster);
    let first = second.div_ceil(per_cluster);
    let mapped = 1_u64
        .saturating_add(second)
        .saturating_add(first)
        .saturating_add(data);
    // The blocks of reference counts are counted in themselves, as is the table of those blocks.
    let counts_per_block = QCOW2_CLUSTER * 8 / QCOW2_REFCOUNT_BITS;
    let mut counts = 0_u64;
    loop {
        let blocks = mapped.saturating_add(counts).div_ceil(counts_per_block);
        let needed = blocks.saturating_add(blocks.div_ceil(per_cluster));
        if needed <= counts {
            break;
        }
        counts = needed;
    }
    mapped
        .saturating_sub(data)
        .saturating_add(counts)
        .saturating_mul(QCOW2_CLUSTER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::format::header::ENTRY_COUNT_MAX;

    #[test]
    fn clusters_that_two_ranges_share_count_once() {
        let mut clusters = Clusters::new(Target::Image(100));
        for (start, end, count) in [(0, 1, 1), (50, 99, 1), (99, 101, 2), (350, 600, 5)] {
            clusters.add(start, end);
            assert_eq!(clusters.count, count, "{start}..{end}");
        }
    }

    #[test]
    fn an_image_has_its_table_in_front() {
        let mib = 1 << 20;
        let measured = of(100 * mib, 3, 0, Target::Image(mib)).unwrap();
        assert_eq!(
            (measured.required, measured.fully_allocated),
            (4 * mib, 101 * mib)
        );
        // One entry more than fits beside the header takes another cluster.
        assert_eq!(table(262_128 * mib, mib).unwrap(), mib);
        assert_eq!(table(262_129 * mib, mib).unwrap(), 2 * mib);
        // As `convert` would refuse them: too many clusters, a size that none has, no disk.
        let most = u64::from(ENTRY_COUNT_MAX) * (64 << 10);
        assert!(table(most, 64 << 10).is_ok());
        for (size, cluster) in [
            (most + 1, 64 << 10),
            (u64::MAX, 64 << 20),
            (mib, 16 << 10),
            (mib, 48 << 10),
            (0, mib),
        ] {
            let refused = measure_size(size, Target::Bundle(cluster)).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Usage, "{size} {cluster}");
        }
    }

    #[test]
    fn huge_sizes_end() {
        for size in [0, 1, 1 << 44, 1 << 62, u64::MAX] {
            assert!(qcow2_metadata(size) >= 2 * QCOW2_CLUSTER, "{size}");
        }
    }
}
