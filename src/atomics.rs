//! The atomics of what takes no lock, so that a model checker can stand in for them.
//!
//! Imports: nothing of this crate.
//! Never: costs anything: outside of the checker's own build these are the standard library's.
//!
//! `tools/test` builds the unit tests once more with the feature `loom`. Then each atomic here is one of
//! loom's, and `disk/models/tests.rs` runs small scenes with it in every order that the threads and
//! the memory model allow. Loom keeps sequentially consistent loads from stale values only among
//! sequentially consistent stores, so there the first value of each atomic is such a store too.

#[cfg(not(all(test, feature = "loom")))]
pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

#[cfg(all(test, feature = "loom"))]
pub use checked::{AtomicBool, AtomicU32, AtomicU64};

pub use std::sync::atomic::Ordering;

#[cfg(all(test, feature = "loom"))]
mod checked {
    use super::Ordering;

    macro_rules! checked {
        ($name:ident, $value:ty) => {
            #[doc = concat!("As the standard library's `", stringify!($name), "`.")]
            #[derive(Debug)]
            pub struct $name(loom::sync::atomic::$name);

            impl $name {
                /// An atomic with this first value.
                pub fn new(value: $value) -> Self {
                    let atomic = loom::sync::atomic::$name::new(value);
                    atomic.store(value, Ordering::SeqCst);
                    Self(atomic)
                }

                /// The value.
                pub fn load(&self, order: Ordering) -> $value {
                    self.0.load(order)
                }

                /// Sets the value.
                pub fn store(&self, value: $value, order: Ordering) {
                    self.0.store(value, order);
                }

                /// Sets the value and gives the one before.
                pub fn swap(&self, value: $value, order: Ordering) -> $value {
                    self.0.swap(value, order)
                }
            }

            impl Default for $name {
                fn default() -> Self {
                    Self::new(<$value>::default())
                }
            }
        };
    }

    macro_rules! counting {
        ($name:ident, $value:ty) => {
            checked!($name, $value);

            impl $name {
                /// Adds and gives the value before.
                pub fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                    self.0.fetch_add(value, order)
                }

                /// Subtracts and gives the value before.
                pub fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                    self.0.fetch_sub(value, order)
                }
            }
        };
    }

    checked!(AtomicBool, bool);
    counting!(AtomicU32, u32);
    counting!(AtomicU64, u64);
}
