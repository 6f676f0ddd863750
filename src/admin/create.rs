//! Makes a new disk: an image by itself, or a bundle.
//!
//! Order, and what each reordering would break:
//!
//! 1. all files are made and synced, the last of them the descriptor, under a temporary name
//!    (`NAME.creating.` and eight digits, of a long name its start), which no program takes for a
//!    disk;
//! 2. a bundle's directory is synced;
//! 3. the temporary name becomes the disk's, unless somebody has taken that meanwhile. Before 1 or
//!    2, a power cut could leave a disk under its own name with files that are not whole;
//! 4. the directory around it is synced: only then is the disk there to stay.
//!
//! What fails or is stopped removes what it has made. Of what is killed the temporary name is left,
//! which is in nobody's way: the next attempt takes another. It also removes what is left of former
//! ones for the same name, unless somebody holds that ([`Directory::hold`]): who makes a disk holds
//! it from the start until it has its own name. Between the making and the holding somebody else
//! may clear it away, and then it is made once more.

pub(super) mod content;
pub mod mkfs;

pub use content::NewFile;

use crate::admin::progress::Progress;
use crate::chain::bundle::{self, DESCRIPTOR, FLAT, unfinished, unfinished_name};
use crate::delta::create::{NewImage, Shape};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::ImageType;
use crate::format::descriptor::write::{self, NewDescriptor, Style};
use crate::format::guid::Guid;
use crate::format::header::Version;
use crate::format::xml;
use crate::storage::directory::HostDirectory;
use crate::storage::lock::PATIENCE;
use crate::storage::{Directory, Hold, SharedStorage};
use crate::sys::random;
use crate::units::{ClusterSize, FileOffset, SECTOR, SectorCount};
use mkfs::FileSystem;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Bytes of a cluster where none are asked for.
pub const CLUSTER_BYTES: u64 = 1 << 20;
/// A name that is cleared away so often as soon as it is made is left to others.
const TRIES: u32 = 5;

/// How the disk's bytes are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// The image grows with what is written.
    #[default]
    Expanding,
    /// Every cluster has its place, and the host's blocks, from the start.
    Preallocated,
    /// The disk byte for byte, with holes.
    Plain,
}

impl Kind {
    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Expanding => "expanding",
            Self::Preallocated => "preallocated",
            Self::Plain => "plain",
        }
    }
}

/// Whose programs must be able to open the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Product {
    /// As many as can be.
    #[default]
    Any,
    /// Parallels Desktop.
    Desktop,
    /// ploop.
    Virtuozzo,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Bytes of the disk.
    pub size: u64,
    /// How they are kept.
    pub kind: Kind,
    /// The unit of the entries, where it is asked for.
    pub version: Option<Version>,
    /// Bytes of a cluster, where they are asked for.
    pub cluster: Option<u64>,
    /// Who must be able to open it.
    pub product: Product,
    /// What the disk holds at first.
    pub file_system: Option<FileSystem>,
}

/// What is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Size, cluster and version.
    pub shape: Shape,
    /// How the bytes are kept.
    pub kind: Kind,
    /// Who must be able to open it.
    pub product: Product,
    /// A bundle, or an image by itself.
    pub is_bundle: bool,
}

impl Plan {
    /// Bytes of the disk.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.shape.size.get().saturating_mul(SECTOR)
    }

    fn is_plain(&self) -> bool {
        self.kind == Kind::Plain
    }
}

fn usage(why: impl Into<String>) -> Error {
    Error::why(ErrorKind::Usage, why)
}

/// Decides what a request makes under this name, and refuses what cannot be. Sizes are rounded up
/// to whole clusters: ploop takes a cluster that the disk's end cuts for none of the disk.
pub fn plan(path: &Path, request: &Request) -> Result<Plan> {
    let extension = path.extension().and_then(|extension| extension.to_str());
    let is_bundle = match extension.map(str::to_ascii_lowercase).as_deref() {
        Some("hdd") => true,
        Some("hds") => false,
        _ => {
            let fix = "NAME.hdd makes a bundle, NAME.hds an image by itself";
            return Err(usage("the name ends neither in .hdd nor in .hds").fix(fix));
        }
    };
    if request.kind == Kind::Plain {
        if !is_bundle {
            let why = "a plain disk has no header: only a bundle's descriptor says what it is";
            let fix = "NAME.hdd makes such a bundle; `truncate -s SIZE NAME.img` a raw disk";
            return Err(usage(why).fix(fix));
        }
        if request.version.is_some() {
            let why = "a plain disk has no header, and so no version";
            return Err(usage(why).fix("leave --image-version away, or take another format"));
        }
    }
    plan_as(is_bundle, request, true)
}

/// The same, whatever the name; rounded up only if asked for.
pub(super) fn plan_as(is_bundle: bool, request: &Request, rounds: bool) -> Result<Plan> {
    let bytes = request.cluster.unwrap_or(CLUSTER_BYTES);
    let sectors = u32::try_from(bytes / SECTOR).ok();
    let cluster = sectors.and_then(ClusterSize::from_sectors);
    let cluster = cluster.filter(|cluster| cluster.bytes() == bytes);
    let Some(cluster) = cluster else {
        let why = format!("{bytes} bytes are no size of a cluster");
        return Err(usage(why).fix("use a power of two from 32K to 64M"));
    };
    let is_desktop = request.product == Product::Desktop;
    let natural = if is_desktop { Version::V1 } else { Version::V2 };
    let version = request.version.unwrap_or(natural);
    if is_desktop && version != Version::V1 {
        return Err(usage("Parallels Desktop opens version 1 only"));
    }
    if is_desktop && cluster.bytes() != CLUSTER_BYTES {
        return Err(usage("Parallels Desktop opens clusters of 1 MiB only"));
    }
    let unit = if rounds { cluster.bytes() } else { SECTOR };
    let size = request.size.checked_next_multiple_of(unit);
    let size = size
        .map(|bytes| bytes / SECTOR)
        .ok_or_else(|| usage("a disk of so many bytes cannot be"))?;
    let shape = Shape {
        version,
        cluster,
        size: SectorCount::new(size),
    };
    if request.kind == Kind::Plain {
        // Only the disk's own size counts.
        if i64::try_from(request.size).is_err() || size == 0 {
            return Err(usage(format!("a disk of {} bytes cannot be", request.size)));
        }
    } else {
        shape.layout()?;
    }
    Ok(Plan {
        shape,
        kind: request.kind,
        product: request.product,
        is_bundle,
    })
}

/// What makes this disk differ from any other.
#[derive(Clone, Debug)]
pub struct Ids {
    /// The end of the temporary name.
    pub temporary: String,
    /// The disk's own GUID.
    pub uid: Guid,
}

impl Ids {
    /// New ones.
    pub fn new() -> Result<Self> {
        let uid = Guid::random(random::sixteen()?);
        let digits = Guid::random(random::sixteen()?).bare();
        Ok(Self {
            temporary: digits.chars().take(8).collect(),
            uid,
        })
    }

    /// What a disk of this name is called until it is whole.
    #[must_use]
    pub fn temporary_name(&self, name: &str) -> String {
        unfinished_name(name, &self.temporary)
    }
}

/// Makes the disk that a request asks for.
pub fn create(path: &Path, request: &Request, progress: &Progress) -> Result<Plan> {
    let plan = plan(path, request)?;
    let (parent, name) = place_for(path)?;
    check_name(name, &plan)?;
    let ids = Ids::new()?;
    match &request.file_system {
        None => create_in(&parent, name, &plan, &ids, progress, |_| Ok(()))?,
        Some(file_system) => {
            let flat = format!("{}{FLAT}", ids.temporary_name(name));
            let content = mkfs::content(&parent, &flat, plan.size_bytes(), file_system, progress)?;
            create_in(&parent, name, &plan, &ids, progress, |file| {
                content.copy_to(file, plan.shape.cluster, progress)
            })?;
        }
    }
    Ok(plan)
}

/// The directory that a new disk is to be in, and its name there, which nothing has yet.
pub(super) fn place_for(path: &Path) -> Result<(HostDirectory, &str)> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| usage("it needs a name, in UTF-8 as descriptors are"))?;
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let parent = HostDirectory::open(parent)?;
    // A link counts for itself; what else is there is refused with the other names.
    let kind = path.symlink_metadata().map(|meta| meta.file_type());
    if kind.is_ok_and(|kind| !kind.is_file() && !kind.is_dir() && !kind.is_symlink()) {
        let why = format!("{name} is a device, a pipe or a socket, and no place for a new disk");
        let fix = "for its bytes as they are: `ploopfs convert SRC - >DST`";
        return Err(usage(why).fix(fix));
    }
    refuse_existing(&parent, name)?;
    Ok((parent, name))
}

/// Refuses a name that the descriptor of such a disk would have to hold and cannot.
pub(super) fn check_name(name: &str, plan: &Plan) -> Result<()> {
    let is_held = plan.is_bundle && plan.product == Product::Desktop;
    match name.chars().find(|character| !xml::can_hold(*character)) {
        Some(character) if is_held => {
            let code = u32::from(character);
            let why = format!(
                "the descriptor has the disk's name in it, and XML cannot hold U+{code:04X}"
            );
            Err(usage(why).fix("choose a name without control characters"))
        }
        _ => Ok(()),
    }
}

/// Refuses to make something in a bundle of which it is made: that would change the source, which
/// is what people call `source` and has these files.
pub(super) fn refuse_within(parent: &HostDirectory, source: &Path, files: &[&Path]) -> Result<()> {
    let real = |path: &Path| std::fs::canonicalize(path).map_err(|e| Error::from(e).in_file(path));
    let target = real(parent.path())?;
    let is_bundle = |place: &&Path| place.join(DESCRIPTOR).symlink_metadata().is_ok();
    let around = files.iter().filter_map(|file| file.parent());
    let around = around.map(|place| {
        if place == Path::new("") {
            Path::new(".")
        } else {
            place
        }
    });
    // A bundle may have all of its files elsewhere.
    let subject = bundle::subject(source).ok();
    for place in around.chain(subject.as_deref()).filter(is_bundle) {
        if target.starts_with(real(place)?) {
            let why = "what is made would lie in the disk that it is made of";
            return Err(usage(why).in_file(place).fix("choose another directory"));
        }
    }
    Ok(())
}

pub(super) fn exists(name: &str) -> Error {
    usage(format!("{name} is there already, and is left as it is"))
        .fix("choose another name, or remove it first")
}

/// Returns all names that are there.
fn refuse_existing(parent: &dyn Directory, name: &str) -> Result<Vec<String>> {
    let there = parent.entries()?;
    if there.iter().any(|entry| entry == name) {
        return Err(exists(name));
    }
    Ok(there)
}

/// Makes a disk in a directory; `fill` writes what it holds at first.
pub fn create_in(
    parent: &dyn Directory,
    name: &str,
    plan: &Plan,
    ids: &Ids,
    progress: &Progress,
    fill: impl Fn(&NewFile) -> Result<()>,
) -> Result<()> {
    make_in(
        parent,
        name,
        plan.is_bundle,
        ids,
        progress,
        |place| match place {
            Place::Bundle(inner) => make_bundle(&**inner, name, plan, ids, &fill),
            Place::Image(file) => make_image(Arc::clone(file), plan, &fill),
        },
    )
}

/// Where a disk is made.
pub(super) enum Place {
    /// The directory of a bundle.
    Bundle(Arc<dyn Directory>),
    /// The file of an image.
    Image(SharedStorage),
}

/// Makes a disk under a temporary name and then gives it its own; `make` leaves all that it makes
/// durable, the names in a bundle too.
pub(super) fn make_in(
    parent: &dyn Directory,
    name: &str,
    is_bundle: bool,
    ids: &Ids,
    progress: &Progress,
    make: impl FnOnce(&Place) -> Result<()>,
) -> Result<()> {
    let there = refuse_existing(parent, name)?;
    for left in unfinished(&there, Some(name)) {
        if let Err(e) = clear(parent, left) {
            log::debug!("{left} stays: {e}");
        }
    }
    let temporary = ids.temporary_name(name);
    let (place, _held) = place_in(parent, &temporary, is_bundle)?;
    let named = make(&place).and_then(|()| {
        progress.check()?;
        parent.rename_new(&temporary, name)
    });
    if let Err(e) = named {
        let left = remove(parent, &temporary, &place);
        return Err(match (left, e.kind()) {
            (Err(_), _) => e.fix(format!("remove what was left: {temporary}")),
            (Ok(()), ErrorKind::Io(libc::EEXIST)) => exists(name),
            (Ok(()), _) => e,
        });
    }
    parent.sync().inspect_err(|_| {
        let left = remove(parent, name, &place);
        log::debug!("the disk that may not last was removed: {left:?}");
    })
}

/// Makes what has a temporary name, and holds it where the host can.
fn place_in(
    parent: &dyn Directory,
    temporary: &str,
    is_bundle: bool,
) -> Result<(Place, Option<Hold>)> {
    for _ in 0..TRIES {
        // Nothing of that name is ours yet, so what fails here has nothing to remove.
        let place = if is_bundle {
            Place::Bundle(parent.create_directory(temporary)?)
        } else {
            Place::Image(parent.create_new(temporary)?)
        };
        match parent.hold(temporary, Instant::now() + PATIENCE) {
            Ok(None) => log::debug!("{temporary} was cleared away"),
            Ok(held) => return Ok((place, held)),
            Err(e) => {
                // Then nobody can clear it away either.
                log::debug!("{temporary} is not held: {e}");
                return Ok((place, None));
            }
        }
    }
    let why = format!("{temporary} was cleared away by somebody else, again and again");
    Err(Error::why(ErrorKind::Locked, why))
}

/// Removes what is left of the making of a disk that was killed, unless somebody holds it.
fn clear(parent: &dyn Directory, left: &str) -> Result<()> {
    let Some(_held) = parent.hold(left, Instant::now())? else {
        return Ok(());
    };
    match parent.open_directory(left) {
        Ok(inner) => remove(parent, left, &Place::Bundle(inner)),
        Err(e) if e.kind() == ErrorKind::Io(libc::ENOTDIR) => parent.remove(left),
        Err(e) => Err(e),
    }
}

/// Takes back what was made.
fn remove(parent: &dyn Directory, name: &str, place: &Place) -> Result<()> {
    let Place::Bundle(inner) = place else {
        return parent.remove(name);
    };
    for file in inner.entries()? {
        inner.remove(&file)?;
    }
    parent.remove_directory(name)
}

/// Makes the image in its file, down to the sync.
fn make_image(
    file: SharedStorage,
    plan: &Plan,
    fill: &impl Fn(&NewFile) -> Result<()>,
) -> Result<()> {
    let new = match plan.kind {
        Kind::Expanding => NewFile::Image(NewImage::expanding(file, &plan.shape)?),
        Kind::Preallocated => NewFile::Image(NewImage::preallocated(file, &plan.shape)?),
        Kind::Plain => {
            file.set_len(FileOffset::new(plan.size_bytes()))?;
            NewFile::Plain(file)
        }
    };
    fill(&new)?;
    match new {
        NewFile::Image(image) => image.finish(),
        NewFile::Plain(file) => file.sync_data(),
    }
}

fn make_bundle(
    inner: &dyn Directory,
    name: &str,
    plan: &Plan,
    ids: &Ids,
    fill: &impl Fn(&NewFile) -> Result<()>,
) -> Result<()> {
    let image = match plan.product {
        Product::Any | Product::Virtuozzo => "root.hds".to_owned(),
        Product::Desktop => format!("{name}.0.{}.hds", Guid::TOP),
    };
    make_image(inner.create_new(&image)?, plan, fill)?;
    if plan.product == Product::Desktop {
        // Desktop looks for a file of the bundle's own name, and never at what is in it.
        inner.create_new(name)?.sync_data()?;
    }
    let stem = Path::new(name).file_stem().and_then(|stem| stem.to_str());
    let text = write::text(&NewDescriptor {
        style: match plan.product {
            Product::Any => Style::Common,
            Product::Desktop => Style::Desktop,
            Product::Virtuozzo => Style::Virtuozzo,
        },
        size: plan.shape.size,
        blocksize: u32::try_from(plan.shape.cluster.sectors().get()).unwrap_or(u32::MAX),
        kind: if plan.is_plain() {
            ImageType::Plain
        } else {
            ImageType::Compressed
        },
        preallocated: plan.kind == Kind::Preallocated,
        file: &image,
        uid: ids.uid,
        name: stem.unwrap_or(name),
    });
    let descriptor = inner.create_new(DESCRIPTOR)?;
    descriptor.write_at(FileOffset::ZERO, text.as_bytes())?;
    descriptor.sync_data()?;
    inner.sync()
}
