//! Signals: SIGTERM and SIGINT drain the mount, SIGUSR1 logs statistics.
//!
//! Imports: nothing of this crate.
//! Never: interrupts a request. All signals are blocked in every thread and taken by one thread
//! that waits for them.
//!
//! Draining ends the mount for newcomers and goes on serving those who hold a file in it, a loop
//! device for instance; the session then ends by itself with the last of them. A second signal
//! changes nothing. Before there is a mount there is nobody to wait for: the process just ends,
//! which is safe at any moment.

use nix::sys::signal::{SigSet, Signal};
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;

type Action = Box<dyn Fn() + Send>;
/// True when newcomers can no longer reach the mount; false when nothing could be done.
type DrainAction = Box<dyn Fn() -> bool + Send>;

enum Stage {
    Starting,
    Serving { drain: DrainAction },
    Draining,
    Ending,
}

/// What signals do at this moment of the daemon's life.
pub struct Signals {
    stage: Mutex<Stage>,
    statistics: Mutex<Option<Action>>,
}

impl std::fmt::Debug for Signals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signals")
    }
}

fn handled() -> SigSet {
    [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ]
    .into_iter()
    .collect()
}

impl Signals {
    /// Blocks the signals and starts the thread that takes them. Call it before any other thread is
    /// started: threads inherit what is blocked.
    pub fn start() -> io::Result<Arc<Self>> {
        let set = handled();
        set.thread_block()?;
        let this = Arc::new(Self {
            stage: Mutex::new(Stage::Starting),
            statistics: Mutex::new(None),
        });
        let signals = Arc::clone(&this);
        let run = move || loop {
            match set.wait() {
                Ok(signal) => signals.take(signal),
                Err(e) => log::debug!("waiting for signals: {e}"),
            }
        };
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(run)?;
        Ok(this)
    }

    /// Makes the mount; from then on signals drain it by the action that comes with it. No signal
    /// can come between the two.
    pub fn serving<T, E>(
        &self,
        make: impl FnOnce() -> Result<(T, DrainAction), E>,
    ) -> Result<T, E> {
        let mut stage = self.stage.lock();
        let (made, drain) = make()?;
        *stage = Stage::Serving { drain };
        Ok(made)
    }

    /// What SIGUSR1 does.
    pub fn on_statistics(&self, action: Action) {
        *self.statistics.lock() = Some(action);
    }

    /// The session is over and the image is being closed: nothing may disturb that.
    pub fn ending(&self) {
        *self.stage.lock() = Stage::Ending;
        *self.statistics.lock() = None;
    }

    fn take(&self, signal: Signal) {
        match signal {
            Signal::SIGUSR1 => {
                if let Some(action) = self.statistics.lock().as_ref() {
                    action();
                }
            }
            Signal::SIGTERM | Signal::SIGINT => self.stop(signal),
            _ => log::debug!("{signal} does nothing"),
        }
    }

    fn stop(&self, signal: Signal) {
        let mut stage = self.stage.lock();
        match std::mem::replace(&mut *stage, Stage::Draining) {
            Stage::Starting => {
                log::warn!("stopped by {signal} before there was a mount");
                #[allow(clippy::as_conversions)]
                std::process::exit(128 + signal as i32);
            }
            Stage::Serving { drain } => {
                // The action talks to a mount that the session threads serve; let go of the lock,
                // so that a session that ends meanwhile can say so.
                drop(stage);
                log::info!("{signal}: draining");
                let drained = drain();
                let mut stage = self.stage.lock();
                if !drained && matches!(*stage, Stage::Draining) {
                    *stage = Stage::Serving { drain };
                }
            }
            before @ (Stage::Draining | Stage::Ending) => {
                *stage = before;
                log::info!("{signal}: ending already, goes on");
            }
        }
    }
}
