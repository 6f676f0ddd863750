//! Bugs on purpose, one at a time, so that the tests can prove that they would find them.
//!
//! Imports: nothing.
//! Never: does anything unless the crate is built with the feature `planted`, which only its own
//! tests ask for; without it `planted` is the constant `false` and leaves no code behind.
//!
//! Each bug is one line at the place where somebody might write it by mistake. `tests/planted.rs`
//! plants each and expects the simulation of `tests/sim` to complain, or what `tests/check` says of
//! repairs.

#[cfg(feature = "planted")]
use std::sync::atomic::{AtomicU8, Ordering};

macro_rules! bugs {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// A way to lose or mix data.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Bug {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Bug {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)+];
        }
    };
}

bugs! {
    /// The table is written without a sync of the data before it.
    NoDataSync,
    /// One barrier instead of two where clusters were copied up from a lower level.
    OneBarrierForCopies,
    /// One barrier instead of two where freed clusters have been used again.
    OneBarrierForReused,
    /// One barrier instead of two where the file became longer since the last sync.
    GrowthStable,
    /// A sync that fails is taken for one that did not.
    SyncErrorSwallowed,
    /// After a failed sync the next one is believed.
    FailedSyncRetried,
    /// A freed cluster is free at once.
    NoQuarantine,
    /// A freed cluster is given out while a request still uses it.
    ReleaseBeforeDrain,
    /// The quarantine's batch is sealed after the pages were copied.
    SealLate,
    /// A freed cluster is punched after it was made free.
    PunchAfterHandOver,
    /// What a write does not cover of a copied cluster is left as it is.
    NoFill,
    /// What a write does not cover is filled after the payload was written.
    FillLate,
    /// A cluster is published before it holds its payload.
    PublishEarly,
    /// A discard drops the entry although a lower level maps the cluster too.
    DiscardUncovers,
    /// Pages are copied for the file after the data was synced.
    LivePages,
    /// Pages that changed since they were copied count as clean.
    PagesAlwaysClean,
    /// That there is unsynced data is noted before the bytes are down.
    DirtyNotedEarly,
    /// Zeroing does not count as unsynced data.
    ZeroNotNoted,
    /// A flush that comes during a round is answered with that round.
    RunningRoundJoined,
    /// A read-write open believes what may be in the host's cache only.
    NoSyncAtOpen,
    /// After a kill or a failed sync, what the host has cached is believed.
    CacheBelieved,
    /// Entries of lower levels are written to the table of the top.
    MergedEntryWritten,
    /// The in-use mark is not synced before the first change.
    MarkNotSynced,
    /// The header comes back as it was at open, without its mark.
    StaleHeader,
    /// A close leaves out the last flush.
    CloseDoesNotFlush,
    /// The cut of the file is not synced before the mark is cleared.
    TrimNotSynced,
    /// All free clusters inside the file are taken for zeros.
    FreeIsZero,
    /// A cluster that was given back unused is still taken for zeros.
    AbortKeepsZero,
    /// A write does not wait for another one that gives the same cluster a place.
    PendingIgnored,
    /// Changed pages are evicted.
    DirtyEvicted,
    /// Two load the same page, and the slower one wins.
    StalePageInserted,
    /// Writes do not keep the clusters that they write to from being freed.
    WritesDoNotPin,
    /// Entries name the new places of moved clusters before the data there is durable.
    MovedNotSynced,
    /// The old places of moved clusters are changed before the entries are durable.
    OldPlaceEarly,
    /// Clusters are moved to places that were freed before that is durable.
    FreedNotSynced,
    /// The header of another size is written before what its table covers is zeroed.
    ResizedEarly,
    /// The end of a disk that shrinks goes before the header has the new size.
    CutEarly,
    /// The descriptor gets the new size of the disk before the header has it.
    DescriptorEarly,
    /// The in-use mark of a resized image goes before the descriptor is right.
    UnmarkedEarly,
    /// A change of a bundle does not say which files come and go.
    NothingAnnounced,
    /// A descriptor gets its name before it has its bytes.
    DescriptorNotSynced,
    /// A descriptor names files whose own names a power cut may take.
    NamesNotSynced,
    /// Files are removed before the descriptor that does not name them is durable.
    RenameNotSynced,
    /// A merge writes entries before the data that they name.
    MergeNamesFirst,
    /// A merge does not sync the data before the entries that name it.
    MergeDataNotSynced,
    /// After a kill or a failed sync, a merge believes what the host has cached.
    MergeBelievesCache,
    /// A punch counts as durable at once: a round with nothing else to sync leaves its sync out.
    PunchBelieved,
    /// The same of a longer file, whose new clusters have nothing but zeros in them.
    GrowthBelieved,
    /// A close cuts the file before its last flush, by what is free in memory by then.
    TrimBeforeFlush,
    /// The lock of the file's length is taken under the one of the table.
    LocksInverted,
    /// A job panics between its payload and its publishing.
    Panic,
    /// A repair looks at what is in the host's cache only.
    RepairOnUnsynced,
    /// After a kill or a failed sync, a repair believes what the host has cached.
    RepairBelievesCache,
    /// A repair goes on with an undo file that only the host's cache may have.
    UndoCacheBelieved,
    /// A repair changes the image before its undo file is durable.
    UndoFileNotSynced,
    /// A repair changes the image before the undo file's name is durable.
    UndoFileNameNotSynced,
    /// A repair lengthens the file before the entries that it cleared are durable.
    ClearsNotSynced,
    /// A repair lets entries name copies before those are durable.
    CopiesNotSynced,
    /// A repair gives clusters back before it is durable that nothing names them.
    RepointsNotSynced,
    /// A repair takes the mark away before all else is durable.
    CutsNotSynced,
    /// A repair takes the mark away before its undo file says what it leaves.
    ClosedBeforeTold,
    /// A repair is over before the last name of its undo file is durable.
    LastNameNotSynced,
    /// An undo does not look whether somebody has written to the image since.
    UndoUnverified,
    /// An undo changes the image before its file's name says so durably.
    UndoNameNotSynced,
    /// An undo does not note in its file that it has begun.
    UndoBegunSilently,
    /// An undo changes an image that has no mark.
    UndoNotMarked,
    /// An undo brings back the table before what it names is durable.
    UndoTurnsNotSynced,
    /// An undo removes its file before the image is durable.
    UndoEndsUnsynced,
    /// FSYNC is answered when the flush has been asked for.
    FsyncAnsweredEarly,
}

impl Bug {
    /// Those that show in changes of bundles: `tests/snapshot_planted.rs` looks for them.
    pub const OF_BUNDLES: &[Self] = &[
        Self::NothingAnnounced,
        Self::DescriptorNotSynced,
        Self::NamesNotSynced,
        Self::RenameNotSynced,
        Self::MergeNamesFirst,
        Self::MergeDataNotSynced,
        Self::MergeBelievesCache,
    ];

    /// Those that show behind the kernel only: `tests/doors.rs` looks for them.
    pub const OF_DOORS: &[Self] = &[Self::FsyncAnsweredEarly];
}

#[cfg(feature = "planted")]
static PLANTED: AtomicU8 = AtomicU8::new(u8::MAX);

/// Plants one bug in the whole process, in place of any other; `None` for none.
#[cfg(feature = "planted")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.store(bug.map_or(u8::MAX, |bug| bug as u8), Ordering::SeqCst);
}

/// True when this bug is planted.
#[must_use]
#[inline(always)]
pub fn planted(bug: Bug) -> bool {
    #[cfg(feature = "planted")]
    let planted = PLANTED.load(Ordering::SeqCst) == bug as u8;
    #[cfg(not(feature = "planted"))]
    let planted = {
        let _ = bug;
        false
    };
    planted
}
