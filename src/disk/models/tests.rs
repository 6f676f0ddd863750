//! Small scenes with what takes no lock, in every order that threads and memory may take.
//!
//! Each promise has its scene, made of the real [`Epochs`], [`MapPage`] and flags of a part, and
//! next to it the mistakes that the scene must find: a scene that finds none proves nothing.
//! Mistakes within a type are planted in a copy of it, whose right version must pass as well.

mod flags;

use crate::atomics::{AtomicBool, AtomicU64, Ordering};
use crate::chain::page::{Frames, MapPage, Word};
use crate::disk::epoch::Epochs;
use crate::format::layout::PageIndex;
use crate::sys::raced::Raced;
use crate::units::Level;
use Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use loom::sync::{Arc, Mutex};
use loom::thread;

/// For two threads: changes from one to the other that nothing forces. Every mistake here is found
/// with two.
const MANY: Option<usize> = Some(5);
/// For three.
const FEW: Option<usize> = Some(3);

/// Runs a scene in all orders that have at most so many changes of thread.
fn holds(preemptions: Option<usize>, scene: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = preemptions;
    model.check(scene);
}

/// Runs a scene that must not hold, and gives what was found.
fn fails(preemptions: Option<usize>, scene: impl Fn() + Sync + Send + 'static) -> String {
    // Loom is not to be used again by a thread on which a model has failed.
    let run = std::thread::spawn(move || holds(preemptions, scene));
    let payload = run.join().expect_err("the mistake was not found");
    let text = payload.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_default()
}

/// The mistake makes one thread use what is another's by now.
fn races(preemptions: Option<usize>, scene: impl Fn() + Sync + Send + 'static) {
    let found = fails(preemptions, scene);
    assert!(found.contains("Causality violation"), "{found}");
}

fn page(first: Word) -> MapPage {
    let frames = std::sync::Arc::new(Frames::new(0).expect("memory"));
    let page = MapPage::new(PageIndex(0), &frames).expect("memory");
    page.set_word(0, first);
    page
}

fn mapped() -> Word {
    Word::mapped(Level::new(0), 7)
}

/// Counts who still uses a freed cluster; the real one and copies with mistakes.
trait Counting: Sync + Send + 'static {
    fn pinned(&self, work: &dyn Fn());
    fn end(&self) -> u64;
    fn has_drained(&self, epoch: u64) -> bool;
}

impl Counting for Epochs {
    fn pinned(&self, work: &dyn Fn()) {
        let _pin = self.pin();
        work();
    }

    fn end(&self) -> u64 {
        Self::end(self)
    }

    fn has_drained(&self, epoch: u64) -> bool {
        Self::has_drained(self, epoch)
    }
}

/// The copy, with what can be done wrong in it.
struct Copied {
    current: AtomicU64,
    pins: [AtomicU64; 2],
    count: Ordering,
    uncount: Ordering,
    looks_again: bool,
}

impl Copied {
    fn new(count: Ordering, uncount: Ordering, looks_again: bool) -> Self {
        Self {
            current: AtomicU64::default(),
            pins: Default::default(),
            count,
            uncount,
            looks_again,
        }
    }

    fn slot(&self, epoch: u64) -> &AtomicU64 {
        &self.pins[usize::from(epoch % 2 == 1)]
    }
}

impl Counting for Copied {
    fn pinned(&self, work: &dyn Fn()) {
        let slot = loop {
            let epoch = self.current.load(SeqCst);
            let slot = self.slot(epoch);
            slot.fetch_add(1, self.count);
            if !self.looks_again || self.current.load(SeqCst) == epoch {
                break slot;
            }
            slot.fetch_sub(1, self.uncount);
        };
        work();
        slot.fetch_sub(1, self.uncount);
    }

    fn end(&self) -> u64 {
        self.current.fetch_add(1, SeqCst)
    }

    fn has_drained(&self, epoch: u64) -> bool {
        self.slot(epoch).load(SeqCst) == 0
    }
}

/// A disk cluster in the map, the file cluster that it has, and who uses that.
struct Disk<C> {
    epochs: C,
    page: MapPage,
    cluster: Raced,
}

impl<C: Counting> Disk<C> {
    fn new(epochs: C) -> Arc<Self> {
        Arc::new(Self {
            epochs,
            page: page(mapped()),
            cluster: Raced::default(),
        })
    }

    /// A read, or a write in place: look up, then use what was found.
    fn request(&self) {
        self.epochs.pinned(&|| {
            if self.page.word(0) == mapped() {
                self.cluster.read();
            }
        });
    }

    /// Ends an epoch in which nothing was freed; `false` while somebody is left in it.
    fn turn(&self) -> bool {
        let ended = self.epochs.end();
        self.epochs.has_drained(ended)
    }

    /// A discard and the flush after it; the cluster then gets another owner's bytes.
    fn reuse(&self) {
        self.page.set_word(0, Word::HOLE);
        let ended = self.epochs.end();
        if self.epochs.has_drained(ended) {
            self.cluster.change();
        }
    }
}

/// Requests on threads of their own, against one who frees the cluster, in a later epoch if told.
fn freeing<C: Counting>(
    requests: usize,
    make: impl Fn() -> C + Sync + Send + 'static,
    request: fn(&Disk<C>),
    free: fn(&Disk<C>),
) -> impl Fn() + Sync + Send + 'static {
    move || {
        let disk = Disk::new(make());
        let threads: Vec<_> = (0..requests)
            .map(|_| {
                let disk = Arc::clone(&disk);
                thread::spawn(move || request(&disk))
            })
            .collect();
        free(&disk);
        threads.into_iter().for_each(|t| t.join().expect("it ends"));
    }
}

fn after_one_turn<C: Counting>(disk: &Disk<C>) {
    // The flush releases, and so ends the next epoch, only when the one before has drained.
    if disk.turn() {
        disk.reuse();
    }
}

#[test]
fn a_freed_cluster_is_not_reused_under_a_request() {
    holds(
        MANY,
        freeing(1, Epochs::default, Disk::request, Disk::reuse),
    );
    holds(
        MANY,
        freeing(1, Epochs::default, Disk::request, after_one_turn),
    );
    holds(FEW, freeing(2, Epochs::default, Disk::request, Disk::reuse));
    holds(
        FEW,
        freeing(2, Epochs::default, Disk::request, after_one_turn),
    );
}

#[test]
fn a_request_that_comes_late_is_not_missed_over_many_epochs() {
    let free = |disk: &Disk<Epochs>| {
        if disk.turn() && disk.turn() && disk.turn() {
            disk.reuse();
        }
    };
    let twice = |disk: &Disk<Epochs>| {
        disk.request();
        disk.request();
    };
    holds(MANY, freeing(1, Epochs::default, twice, free));
}

#[test]
fn pinning_after_the_look_up_is_found() {
    let late = |disk: &Disk<Epochs>| {
        let found = disk.page.word(0);
        disk.epochs.pinned(&|| {
            if found == mapped() {
                disk.cluster.read();
            }
        });
    };
    races(MANY, freeing(1, Epochs::default, late, Disk::reuse));
}

#[test]
fn unpinning_before_the_last_byte_is_found() {
    let early = |disk: &Disk<Epochs>| {
        let mut found = Word::HOLE;
        let look = std::cell::Cell::new(found);
        disk.epochs.pinned(&|| look.set(disk.page.word(0)));
        found = look.get();
        if found == mapped() {
            disk.cluster.read();
        }
    };
    races(MANY, freeing(1, Epochs::default, early, Disk::reuse));
}

#[test]
fn a_request_without_a_pin_is_found() {
    let unpinned = |disk: &Disk<Epochs>| {
        if disk.page.word(0) == mapped() {
            disk.cluster.read();
        }
    };
    races(MANY, freeing(1, Epochs::default, unpinned, Disk::reuse));
}

#[test]
fn waiting_for_the_own_epoch_only_is_found() {
    let own_only = |disk: &Disk<Epochs>| {
        let _ = disk.turn();
        disk.reuse();
    };
    races(MANY, freeing(1, Epochs::default, Disk::request, own_only));
}

#[test]
fn freeing_before_the_map_is_changed_is_found() {
    let late = |disk: &Disk<Epochs>| {
        let ended = disk.epochs.end();
        disk.page.set_word(0, Word::HOLE);
        if disk.epochs.has_drained(ended) {
            disk.cluster.change();
        }
    };
    races(MANY, freeing(1, Epochs::default, Disk::request, late));
}

#[test]
fn orders_that_are_too_weak_for_the_count_are_found() {
    let copy = |count, uncount, looks_again| move || Copied::new(count, uncount, looks_again);
    for free in [Disk::reuse, after_one_turn] {
        holds(
            MANY,
            freeing(1, copy(SeqCst, SeqCst, true), Disk::request, free),
        );
    }
    races(
        MANY,
        freeing(1, copy(Relaxed, SeqCst, true), Disk::request, Disk::reuse),
    );
    races(
        MANY,
        freeing(1, copy(AcqRel, SeqCst, true), Disk::request, Disk::reuse),
    );
    races(
        MANY,
        freeing(1, copy(SeqCst, Relaxed, true), Disk::request, Disk::reuse),
    );
    races(
        MANY,
        freeing(
            1,
            copy(SeqCst, SeqCst, false),
            Disk::request,
            after_one_turn,
        ),
    );
}

#[test]
fn an_entry_and_its_level_are_never_torn() {
    let (old, new) = (mapped(), Word::mapped(Level::new(1), 9).covering_lower());
    holds(MANY, move || {
        let page = Arc::new(page(old));
        let writer = {
            let page = Arc::clone(&page);
            thread::spawn(move || {
                page.set_word(0, old.pending());
                page.set_word(0, new);
            })
        };
        let seen = [page.word(0), page.word(0), page.word(0)];
        let order = [old, old.pending(), new];
        let place = |word: &Word| order.iter().position(|known| known == word);
        let places: Vec<_> = seen
            .iter()
            .map(|w| place(w).expect("a whole word"))
            .collect();
        assert!(places.is_sorted(), "went back in time: {seen:?}");
        writer.join().expect("it ends");
    });
    let found = fails(MANY, || {
        let parts = Arc::new((AtomicU64::new(0), AtomicU64::new(7)));
        let writer = {
            let parts = Arc::clone(&parts);
            thread::spawn(move || {
                parts.0.store(1, SeqCst);
                parts.1.store(9, SeqCst);
            })
        };
        let seen = (parts.0.load(SeqCst), parts.1.load(SeqCst));
        assert!([(0, 7), (1, 9)].contains(&seen), "torn");
        writer.join().expect("it ends");
    });
    assert!(found.contains("torn"), "{found}");
}

/// What was published is found with all that was written before it.
#[test]
fn bytes_are_there_before_the_word_that_names_them() {
    let scene = |publish: fn(&Disk<Epochs>)| {
        move || {
            let disk = Disk::new(Epochs::default());
            disk.page.set_word(0, Word::HOLE);
            let writer = {
                let disk = Arc::clone(&disk);
                thread::spawn(move || publish(&disk))
            };
            disk.request();
            writer.join().expect("it ends");
        }
    };
    holds(
        MANY,
        scene(|disk| {
            disk.cluster.change();
            disk.page.set_word(0, mapped());
        }),
    );
    races(
        MANY,
        scene(|disk| {
            disk.page.set_word(0, mapped());
            disk.cluster.change();
        }),
    );
}

/// The directory's place of one page, as the map has it, and the entry in the file.
struct Directory {
    /// Stands for the atomic pointer, each use of which is one step.
    place: Mutex<Option<std::sync::Arc<MapPage>>>,
    loading: Mutex<()>,
    table: Mutex<()>,
    file: AtomicU64,
}

impl Directory {
    fn get(&self) -> Option<std::sync::Arc<MapPage>> {
        self.place.lock().expect("nobody panics").clone()
    }

    fn put(&self, page: Option<std::sync::Arc<MapPage>>) {
        *self.place.lock().expect("nobody panics") = page;
    }

    fn load(&self, alone: bool) -> std::sync::Arc<MapPage> {
        let _sole_loader = alone.then(|| self.loading.lock().expect("nobody panics"));
        if let Some(page) = self.get() {
            return page;
        }
        let entry = u32::try_from(self.file.load(SeqCst)).expect("a small number");
        let page = std::sync::Arc::new(page(Word::mapped(Level::new(0), entry)));
        let _table = self.table.lock().expect("nobody panics");
        self.put(Some(std::sync::Arc::clone(&page)));
        page
    }

    /// Changes the entry; a flush writes the page, and then it is evicted.
    fn change_flush_evict(&self, alone: bool, entry: u32) {
        let page = self.load(alone);
        {
            let _table = self.table.lock().expect("nobody panics");
            page.set_word(0, Word::mapped(Level::new(0), entry));
            page.changed();
        }
        self.file.store(entry.into(), SeqCst);
        let _table = self.table.lock().expect("nobody panics");
        page.cleaned();
        if !page.is_held() {
            self.put(None);
        }
    }
}

/// One loads a page while another loads, changes, writes and evicts it.
fn loading(alone: bool) -> impl Fn() {
    move || {
        let directory = Arc::new(Directory {
            place: Mutex::new(None),
            loading: Mutex::new(()),
            table: Mutex::new(()),
            file: AtomicU64::new(1),
        });
        let slow = {
            let directory = Arc::clone(&directory);
            thread::spawn(move || {
                let entry = directory.load(alone).word(0).entry();
                assert!(entry == 1 || entry == 2, "neither old nor new");
            })
        };
        directory.change_flush_evict(alone, 2);
        slow.join().expect("it ends");
        let entry = directory.load(alone).word(0).entry();
        assert_eq!(entry, 2, "a stale page came back");
    }
}

#[test]
fn a_page_has_one_loader_at_a_time() {
    holds(MANY, loading(true));
    let found = fails(MANY, loading(false));
    assert!(found.contains("a stale page came back"), "{found}");
}

/// A request that found a page before it was evicted still finds nothing there that was reused.
#[test]
fn an_evicted_page_is_harmless_to_those_who_pinned_first() {
    let scene = |pins_first: bool| {
        move || {
            let disk = Disk::new(Epochs::default());
            let evicted = Arc::new(page(mapped()));
            let reader = {
                let (disk, evicted) = (Arc::clone(&disk), Arc::clone(&evicted));
                let in_memory = Arc::new(AtomicBool::new(true));
                let seen = Arc::clone(&in_memory);
                let thread = thread::spawn(move || {
                    let look = || {
                        let page = if seen.load(SeqCst) {
                            &*evicted
                        } else {
                            &disk.page
                        };
                        std::ptr::from_ref(page).addr()
                    };
                    let use_it = |place: usize| {
                        let is_old = place == std::ptr::from_ref(&*evicted).addr();
                        let page = if is_old { &*evicted } else { &disk.page };
                        if page.word(0) == mapped() {
                            disk.cluster.read();
                        }
                    };
                    if pins_first {
                        disk.epochs.pinned(&|| use_it(look()));
                    } else {
                        let place = look();
                        disk.epochs.pinned(&|| use_it(place));
                    }
                });
                (thread, in_memory)
            };
            let (thread, in_memory) = reader;
            in_memory.store(false, SeqCst);
            disk.reuse();
            thread.join().expect("it ends");
        }
    };
    holds(MANY, scene(true));
    races(MANY, scene(false));
}

/// What the scenes rest on: loom's atomics, as they are used here, are sequentially consistent
/// where that is asked for, and not where it is not.
#[test]
fn the_checker_knows_its_orders() {
    let both_old = |store: Ordering, load: Ordering| {
        move || {
            let cells = Arc::new((AtomicU64::default(), AtomicU64::default()));
            let other = {
                let cells = Arc::clone(&cells);
                thread::spawn(move || {
                    cells.0.store(1, store);
                    cells.1.load(load)
                })
            };
            cells.1.store(1, store);
            let seen = cells.0.load(load);
            let seen = (seen, other.join().expect("it ends"));
            assert_ne!(seen, (0, 0), "both saw the past");
        }
    };
    holds(MANY, both_old(SeqCst, SeqCst));
    for (store, load) in [(Release, Acquire), (SeqCst, Acquire), (Relaxed, SeqCst)] {
        assert!(fails(MANY, both_old(store, load)).contains("both saw the past"));
    }
}
