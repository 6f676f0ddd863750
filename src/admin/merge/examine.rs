//! Whether images can be merged, and what that takes. Changes nothing.

use super::{Amount, Lower, Merge, WINDOW, bad_size, entries, windows};
use crate::admin::resize;
use crate::delta::image::{Image, header_error};
use crate::delta::survey::survey;
use crate::error::{Error, ErrorKind, REPAIR_HINT, Result};
use crate::format::header::{Header, IN_USE, Version};
use crate::format::layout::Layout;
use crate::plan::merge::Place;
use crate::units::{ClusterSize, DiskCluster, len_u64};

/// What helps where the lower image cannot take the content.
pub(super) const INTO_NEW: &str = "merge into a new file: `ploopfs merge --into-new FILE`";

fn same_clusters(image: &Image, wanted: ClusterSize) -> Result<()> {
    match image.layout().map(Layout::cluster) {
        Some(own) if own != wanted => {
            let (own, wanted) = (own.bytes(), wanted.bytes());
            let why = format!("clusters of {own} bytes here, of {wanted} bytes in the disk");
            Err(bad_size(why, image))
        }
        _ => Ok(()),
    }
}

/// Every entry of an upper image must lead to its content: what cannot be read is lost with the
/// image.
fn readable(image: &Image, cluster: ClusterSize) -> Result<()> {
    let Some(layout) = image.layout() else {
        return Ok(());
    };
    let clusters = cluster.count_for(image.disk_len()).get();
    let mut first = 0;
    while first < clusters {
        let found = entries(image, first, WINDOW)?;
        for (entry, number) in found.iter().zip(first..clusters) {
            let check = || layout.check_entry(*entry, image.len());
            if let (true, Err(why)) = (*entry != 0, check()) {
                let error = Error::new(ErrorKind::Corrupt).because(why);
                return Err(error
                    .in_file(image.path())
                    .at_cluster(DiskCluster::new(number))
                    .fix(REPAIR_HINT));
            }
        }
        first += len_u64(WINDOW);
    }
    Ok(())
}

fn amount(
    uppers: &[Image],
    lower: Lower<'_>,
    cluster: ClusterSize,
    window: usize,
) -> Result<Amount> {
    let mut amount = Amount::default();
    windows(uppers, lower, cluster, window, &mut |moves| {
        for item in moves {
            amount.clusters += 1;
            amount.fresh += u64::from(item.place == Place::Fresh);
            amount.bytes += item.len;
        }
        Ok(())
    })?;
    Ok(amount)
}

/// An image of this layout can have so many clusters of data.
fn has_room(layout: &Layout, cluster: ClusterSize, clusters: u64) -> bool {
    let unit = match layout.version() {
        Version::V1 => cluster.sectors().get(),
        Version::V2 => 1,
    };
    let end = layout.first_cluster().get().saturating_add(clusters);
    end <= u64::from(u32::MAX) / unit
}

/// What it takes to merge images, the lowest first, into a new one of this layout. However large
/// the disk is, a window of each table is held at a time. What an image has behind the
/// end of the uppermost one is left out.
pub fn examine_new(sources: &[Image], cluster: ClusterSize, layout: &Layout) -> Result<Amount> {
    for image in sources {
        same_clusters(image, cluster)?;
        readable(image, cluster)?;
    }
    let amount = amount(sources, Lower::New(layout), cluster, WINDOW)?;
    if !has_room(layout, cluster, amount.fresh) {
        let why = "the new image would be larger than its version can be";
        return Err(Error::why(ErrorKind::Unsupported, why));
    }
    Ok(amount)
}

/// Refuses an image whose dirty bitmaps the merged one would not have.
pub fn refuse_bitmaps(image: &Image) -> Result<()> {
    let raw = image.header().map(|header| *header.raw());
    if raw.is_some_and(|raw| raw.extension != 0 && ![0, IN_USE].contains(&raw.in_use)) {
        let why = "the merged image will have none, and the next backup must be a full one";
        return Err(Error::why(ErrorKind::BitmapPresent, why)
            .in_file(image.path())
            .fix("to lose it: --drop-bitmaps"));
    }
    Ok(())
}

impl Merge<'_> {
    /// Finds out whether the images can be merged, and what that takes. Changes nothing.
    pub fn examine(&self) -> Result<Amount> {
        let sources = self.uppers.iter();
        sources
            .chain([self.lower])
            .try_for_each(|image| same_clusters(image, self.cluster))?;
        for image in self.uppers {
            readable(image, self.cluster)?;
        }
        let used = match self.lower.header() {
            Some(header) => Some(self.writable(header)?),
            None => None,
        };
        let lower = Lower::There(self.lower);
        let amount = amount(self.uppers, lower, self.cluster, self.window)?;
        if let (Some(used), Some(layout)) = (used, self.lower.layout()) {
            if !has_room(layout, self.cluster, used + amount.fresh) {
                let why = "the lower image would be larger than its version can be";
                return Err(bad_size(why.to_owned(), self.lower).fix(INTO_NEW));
            }
        }
        Ok(amount)
    }

    /// The clusters that the lower image uses, where it can be written to.
    fn writable(&self, header: &Header) -> Result<u64> {
        if let Some(refusal) = header.write_refusal() {
            return Err(header_error(refusal).in_file(self.lower.path()));
        }
        let found = survey(self.lower, header)?;
        self.sound(&found)?;
        let layout = self.grown_layout(header)?;
        if let Some(request) = self.resize_first(&layout) {
            resize::plan_image(&**self.lower.storage(), &[], &request)
                .map_err(|e| e.in_file(self.lower.path()))?;
        } else if layout.table_end() > layout.data_start() {
            let why = "the table of the lower image has no room for the entries of the upper one";
            return Err(bad_size(why.to_owned(), self.lower).fix(INTO_NEW));
        }
        Ok(found.used.len())
    }
}
