//! A directory of simulated files in which an image is repaired, and what power cuts leave of it.

use crate::sim::directory::{Names, SimDirectory};
use crate::sim::media::Media;
use crate::sim::storage::{Event, Manners, SimStorage, World};
use ploopfs::admin::repair::{KeepOld, Repaired, repair_image, undo_image};
use ploopfs::error::Result;
use ploopfs::plan::repair::Policy;
use std::sync::Arc;

/// The name of the image.
pub(crate) const IMAGE: &str = "x";

/// Files and their names at one moment, as reads see them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    files: Vec<Vec<u8>>,
    names: Names,
}

impl Left {
    /// An image, and nothing beside it.
    pub(crate) fn image(bytes: &[u8]) -> Self {
        Self {
            files: vec![bytes.to_vec()],
            names: Names::from([(IMAGE.to_owned(), 0)]),
        }
    }

    pub(crate) fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.names.get(name).map(|file| &self.files[*file][..])
    }

    /// The image's bytes.
    pub(crate) fn x(&self) -> &[u8] {
        self.bytes(IMAGE).expect("nobody takes the image's name")
    }

    pub(crate) fn names(&self) -> Vec<&str> {
        self.names.keys().map(String::as_str).collect()
    }

    /// The file beside the image.
    pub(crate) fn undo_file(&self) -> Option<&str> {
        self.names().into_iter().find(|name| *name != IMAGE)
    }
}

/// The files, and all that is done to them.
#[derive(Debug)]
pub(crate) struct Stage {
    first: Left,
    world: Arc<World>,
}

impl Stage {
    pub(crate) fn new(first: &Left) -> Self {
        Self::with(first, Manners::default())
    }

    pub(crate) fn with(first: &Left, manners: Manners) -> Self {
        let world = World::new(first.files.clone(), manners, true);
        world.set_names(first.names.clone());
        Self {
            first: first.clone(),
            world,
        }
    }

    pub(crate) fn world(&self) -> &Arc<World> {
        &self.world
    }

    pub(crate) fn directory(&self) -> SimDirectory {
        SimDirectory::new(&self.world)
    }

    /// The image, for the process that is at work now.
    pub(crate) fn x(&self) -> Arc<SimStorage> {
        self.world.open(self.first.names[IMAGE], true)
    }

    pub(crate) fn repair(&self) -> Result<Repaired> {
        let keep = KeepOld::In {
            directory: &self.directory(),
            image: IMAGE,
        };
        repair_image(&*self.x(), keep, &Policy::default())
    }

    pub(crate) fn undo(&self, name: &str) -> Result<()> {
        undo_image(&*self.x(), &self.directory(), name)
    }

    /// What reads see now.
    pub(crate) fn left(&self) -> Left {
        Left {
            files: self.world.files(),
            names: self.world.names(),
        }
    }

    /// Events so far.
    pub(crate) fn moments(&self) -> usize {
        self.world.log().len()
    }

    /// Cuts the power `attempts` times at each moment from `from` on. `judge` gets the number of
    /// the moment, whether it is the last one, and what is left.
    pub(crate) fn cut(
        &self,
        from: usize,
        attempts: u32,
        dice: &mut u64,
        mut judge: impl FnMut(usize, bool, Left) -> Result<(), String>,
    ) -> Result<u32, String> {
        let log = self.world.log();
        let mut media = Media::new(&self.first.files, self.first.names.clone());
        let mut cuts = 0;
        for (number, event) in log.iter().enumerate() {
            let changes = media.take(event);
            if !changes || number < from {
                continue;
            }
            for _ in 0..attempts {
                let left = after_cut(&media, dice);
                judge(number, number + 1 == log.len(), left)?;
                cuts += 1;
            }
        }
        Ok(cuts)
    }

    /// What a power cut leaves after so many events.
    pub(crate) fn cut_at(&self, events: usize, dice: &mut u64) -> Left {
        let mut media = Media::new(&self.first.files, self.first.names.clone());
        for event in self.world.log().iter().take(events) {
            media.take(event);
        }
        after_cut(&media, dice)
    }

    /// A sync of the image fails: what was not durable never will be, and reads still see it.
    pub(crate) fn fail_sync(&self) {
        let file = self.first.names[IMAGE];
        self.world.note(Event::SyncFailed { file });
    }
}

fn after_cut(media: &Media, dice: &mut u64) -> Left {
    let (files, names) = media.after_cut(dice);
    Left { files, names }
}
