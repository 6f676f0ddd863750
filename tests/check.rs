//! Check and repair: every way to break an image, power cuts at every operation, other programs.
//!
//! A repair is cut after each operation, with any of what was not durable kept or lost. What is
//! left must be mended by another repair to the very bytes that an undisturbed one leaves, and
//! until the repair is complete the undo file must give every old byte back.

#[path = "check/beside.rs"]
mod beside;
#[path = "check/bundles.rs"]
mod bundles;
#[path = "check/cuts.rs"]
mod cuts;
#[path = "check/damage.rs"]
mod damage;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "check/interop.rs"]
mod interop;
#[path = "check/kills.rs"]
mod kills;
#[path = "check/kinds.rs"]
mod kinds;
#[path = "check/mending.rs"]
mod mending;
#[path = "sim/mod.rs"]
mod sim;
#[path = "check/stage.rs"]
mod stage;

use damage::{broken, spec};
use forge::corrupt;
use forge::extension::BitmapSpec;
use forge::image::{ImageSpec, V21};

/// The image with a dirty bitmap, for the corruptions of extensions.
fn spec_with_bitmap() -> ImageSpec {
    let mut spec = spec(2);
    spec.mark = V21;
    spec.bitmap = Some(BitmapSpec::new(vec![0, 3, 40]));
    spec
}
