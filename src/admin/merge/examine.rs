//! Whether images can be merged, and what that takes. Changes nothing.

use super::behind::{Discard, discards};
use super::{Amount, Lower, Merge, WINDOW, bad_size, entries, windows};
use crate::admin::resize;
use crate::delta::image::{Image, header_error};
use crate::delta::survey::{Survey, survey};
use crate::error::{Error, ErrorKind, REPAIR_HINT, Result};
use crate::format::header::{Header, IN_USE, Version};
use crate::format::layout::Layout;
use crate::plan::merge::Place;
use crate::units::{ClusterSize, DiskCluster, len_u64};

/// What was found out about a merge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Examined {
    /// What moves.
    pub amount: Amount,
    /// What is lost, because the disk ends before it.
    pub discards: Vec<Discard>,
}

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
/// the disk is, a window of each table is held at a time. What an image has behind the end of the
/// uppermost one is left out, and refuses the merge where it is not to be lost.
pub fn examine_new(
    sources: &[Image],
    cluster: ClusterSize,
    layout: &Layout,
    force_discard: bool,
) -> Result<Examined> {
    for image in sources {
        same_clusters(image, cluster)?;
        readable(image, cluster)?;
    }
    let end = sources.last().map_or(0, Image::disk_len);
    let discards = discards(sources, end, force_discard)?;
    let amount = amount(sources, Lower::New(layout), cluster, WINDOW)?;
    if !has_room(layout, cluster, amount.fresh) {
        let why = "the new image would be larger than its version can be";
        return Err(Error::why(ErrorKind::Unsupported, why));
    }
    Ok(Examined { amount, discards })
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
    pub fn examine(&self) -> Result<Examined> {
        let mut sources = self.uppers.iter().chain([self.lower]);
        sources.try_for_each(|image| same_clusters(image, self.cluster))?;
        for image in self.uppers {
            readable(image, self.cluster)?;
        }
        let header = self.lower.header();
        let found = header.map(|header| self.writable(header)).transpose()?;
        let discards = self.discards()?;
        if let Some(header) = header {
            self.resizable(header)?;
        }
        let lower = Lower::There(self.lower);
        let amount = amount(self.uppers, lower, self.cluster, self.window)?;
        if let (Some(found), Some(layout)) = (found, self.lower.layout()) {
            if !has_room(layout, self.cluster, found.used.len() + amount.fresh) {
                let why = "the lower image would be larger than its version can be";
                return Err(bad_size(why.to_owned(), self.lower).fix(INTO_NEW));
            }
        }
        Ok(Examined { amount, discards })
    }

    /// What is lost, because the disk ends before it; refuses where it may not be.
    pub(super) fn discards(&self) -> Result<Vec<Discard>> {
        let images = self.uppers.iter().chain([self.lower]);
        discards(images, self.disk_len(), self.force_discard)
    }

    /// The lower image can be written to.
    fn writable(&self, header: &Header) -> Result<Survey> {
        if let Some(refusal) = header.write_refusal() {
            return Err(header_error(refusal).in_file(self.lower.path()));
        }
        let found = survey(self.lower, header)?;
        self.sound(&found)?;
        Ok(found)
    }

    /// The lower image can get the size of the disk.
    fn resizable(&self, header: &Header) -> Result<()> {
        let layout = self.grown_layout(header)?;
        if let Some(request) = self.resize_first(&layout) {
            resize::plan_image(&**self.lower.storage(), &[], &request)
                .map_err(|e| e.in_file(self.lower.path()))?;
        } else if layout.table_end() > layout.data_start() {
            let why = "the table of the lower image has no room for the entries of the upper one";
            return Err(bad_size(why.to_owned(), self.lower).fix(INTO_NEW));
        }
        Ok(())
    }
}
