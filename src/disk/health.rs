//! The latch: after the first failed sync or table write the disk is read-only for good.
//!
//! What the host still has in its cache after a failed sync proves nothing: it marks the pages
//! clean and the next sync may report success for bytes that are lost. So no later flush of this
//! process reports success, whoever started the one that failed.

use crate::error::{Error, ErrorKind, Result};
use crate::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the disk may still be written to.
#[derive(Debug, Default)]
pub struct Health {
    latched: AtomicBool,
    reason: Mutex<Option<String>>,
}

impl Health {
    /// An error once the latch has fallen.
    #[inline]
    pub fn check(&self) -> Result<()> {
        if self.latched.load(Ordering::Acquire) {
            return Err(self.error());
        }
        Ok(())
    }

    /// True once the latch has fallen.
    #[must_use]
    pub fn is_latched(&self) -> bool {
        self.latched.load(Ordering::Acquire)
    }

    /// Why it has.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        self.reason.lock().clone()
    }

    /// Lets the latch fall; the first reason stays.
    pub fn latch(&self, reason: &str) {
        let mut kept = self.reason.lock();
        if kept.is_none() {
            log::error!("the disk is read-only from now on: {reason}");
            *kept = Some(reason.to_owned());
        }
        self.latched.store(true, Ordering::Release);
    }

    /// What every later write and flush is told.
    #[must_use]
    pub fn error(&self) -> Error {
        let reason = self.reason().unwrap_or_default();
        Error::why(ErrorKind::Latched, reason)
            .fix("unmount, look at the host's log, and mount again: the image is then examined")
    }
}
