//! Bundles of the host, as they are changed.

use super::{Bundle, Files};
use crate::chain::bundle::Changing;
use crate::error::Result;
use crate::format::descriptor::Image;
use crate::storage::SharedStorage;

impl Files for Changing {
    fn image(&self, image: &Image) -> Result<SharedStorage> {
        Changing::image(self, image)
    }

    fn own_name(&self, image: &Image) -> Option<String> {
        Changing::own_name(self, image)
    }

    fn claim(&self) -> Result<()> {
        Changing::claim(self)
    }
}

/// Reads the descriptor of a locked bundle.
pub fn open(changing: &Changing) -> Result<Bundle<'_>> {
    let place = changing.directory().path().join(changing.descriptor());
    Bundle::open(changing.directory(), changing.descriptor(), changing)
        .map_err(|e| e.in_file(&place))
}
