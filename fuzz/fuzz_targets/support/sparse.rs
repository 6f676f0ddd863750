//! A file in memory that stores only what is not a hole, so that a small input can be a large
//! image.

use parking_lot::Mutex;
use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::storage::{FileId, Keep, Storage};
use ploopfs::units::FileOffset;
use std::collections::BTreeMap;
use std::ops::Range;

const PAGE: u64 = 4096;

/// Its length, and the pages that are no holes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    len: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

/// The file.
#[derive(Debug, Default)]
pub(crate) struct SparseFile {
    state: Mutex<State>,
}

/// The pieces of a range, each within one page: page, offset in it, offset in the range, length.
fn pieces(at: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let here = at + done as u64;
        let within = here % PAGE;
        let piece = (len - done).min((PAGE - within) as usize);
        let found = (here / PAGE, within as usize, done, piece);
        done += piece;
        (piece > 0).then_some(found)
    })
}

impl State {
    fn read(&self, at: u64, buf: &mut [u8]) {
        for (page, within, start, len) in pieces(at, buf.len()) {
            let target = &mut buf[start..start + len];
            match self.pages.get(&page) {
                Some(page) => target.copy_from_slice(&page[within..within + len]),
                None => target.fill(0),
            }
        }
    }

    fn write(&mut self, at: u64, buf: &[u8]) {
        for (page, within, start, len) in pieces(at, buf.len()) {
            let page = self.pages.entry(page);
            let page = page.or_insert_with(|| vec![0; PAGE as usize].into());
            page[within..within + len].copy_from_slice(&buf[start..start + len]);
        }
        self.len = self.len.max(at + buf.len() as u64);
    }

    fn zero(&mut self, range: Range<u64>) {
        let end = range.end.min(self.len);
        let touched: Vec<u64> = self
            .pages
            .range(range.start / PAGE..end.div_ceil(PAGE).max(range.start / PAGE))
            .map(|(page, _)| *page)
            .collect();
        for page in touched {
            let from = range.start.max(page * PAGE) - page * PAGE;
            let to = end.min((page + 1) * PAGE).saturating_sub(page * PAGE);
            if (from, to) == (0, PAGE) {
                self.pages.remove(&page);
            } else if from < to {
                let page = self.pages.get_mut(&page).expect("a page that was listed");
                page[from as usize..to as usize].fill(0);
            }
        }
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len..self.len);
            self.pages.split_off(&len.div_ceil(PAGE));
        }
        self.len = len;
    }
}

impl SparseFile {
    /// A file of this length that starts with these bytes, as far as there is room for them.
    pub(crate) fn new(bytes: &[u8], len: u64) -> Self {
        let file = Self::default();
        {
            let mut state = file.state.lock();
            let fitting = usize::try_from(len).map_or(bytes.len(), |len| len.min(bytes.len()));
            state.write(0, &bytes[..fitting]);
            state.len = len;
        }
        file
    }

    /// A copy.
    pub(crate) fn copy(&self) -> Self {
        let state = Mutex::new(self.state.lock().clone());
        Self { state }
    }

    /// True when both hold the same bytes.
    pub(crate) fn same_as(&self, other: &Self) -> bool {
        let (one, other) = (self.state.lock().clone(), other.state.lock().clone());
        let pages: Vec<u64> = one
            .pages
            .keys()
            .chain(other.pages.keys())
            .copied()
            .collect();
        let content = |state: &State, page: u64| {
            let mut bytes = [0; PAGE as usize];
            state.read(page * PAGE, &mut bytes);
            bytes
        };
        one.len == other.len
            && pages
                .iter()
                .all(|page| content(&one, *page) == content(&other, *page))
    }

    /// The bytes of a range, or `None` where the file ends before it does.
    pub(crate) fn get(&self, at: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_at(FileOffset::new(at), &mut bytes).ok()?;
        Some(bytes)
    }

    /// Writes bytes.
    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.state.lock().write(at, bytes);
    }

    /// Length in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.state.lock().len
    }
}

impl Storage for SparseFile {
    fn len(&self) -> Result<FileOffset> {
        Ok(FileOffset::new(self.size()))
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        let state = self.state.lock();
        let end = at.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end.get() > state.len) {
            return Err(Error::new(ErrorKind::Truncated).at_offset(at));
        }
        state.read(at.get(), buf);
        Ok(())
    }

    fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()> {
        self.state.lock().write(at.get(), buf);
        Ok(())
    }

    fn sync_data(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: FileOffset) -> Result<()> {
        self.state.lock().set_len(len.get());
        Ok(())
    }

    fn allocate(&self, range: Range<FileOffset>) -> Result<()> {
        let mut state = self.state.lock();
        state.len = state.len.max(range.end.get());
        Ok(())
    }

    fn zero(&self, range: Range<FileOffset>, _keep: Keep) -> Result<()> {
        self.state.lock().zero(range.start.get()..range.end.get());
        Ok(())
    }

    fn copy_from(&self, _: FileOffset, _: &dyn Storage, _: Range<FileOffset>) -> Result<bool> {
        Ok(false)
    }

    fn next_data(&self, from: FileOffset) -> Result<Option<Range<FileOffset>>> {
        let state = self.state.lock();
        let mut pages = state
            .pages
            .range(from.get() / PAGE..)
            .map(|(page, _)| *page);
        let Some(first) = pages.next() else {
            return Ok(None);
        };
        let start = (first * PAGE).max(from.get());
        let mut end = (first + 1) * PAGE;
        while pages.next() == Some(end / PAGE) {
            end += PAGE;
        }
        let end = end.min(state.len);
        Ok((start < end).then(|| FileOffset::new(start)..FileOffset::new(end)))
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.state.lock().pages.len() as u64 * PAGE)
    }

    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }
}
