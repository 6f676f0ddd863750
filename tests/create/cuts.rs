//! Power cuts, failures and wishes to stop at every operation, on a simulated host.

use crate::host::{Host, Manners, State};
use crate::support::Outcome;
use crate::support::harness::trial;
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use ploopfs::admin::create::{Ids, Kind, NewFile, Plan, Product, Request, create_in, plan};
use ploopfs::admin::progress::Progress;
use ploopfs::error::ErrorKind;
use ploopfs::format::guid::Guid;
use ploopfs::format::header::Version;
use ploopfs::units::DiskCluster;
use std::collections::BTreeMap;
use std::path::Path;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("a_power_cut_leaves_all_or_nothing", &[], all_or_nothing),
        trial("a_failure_leaves_nothing", &[], a_failure_leaves_nothing),
        trial("a_wish_to_stop_leaves_nothing", &[], stopped),
        trial("a_name_taken_meanwhile_is_kept", &[], taken),
    ]
}

const NAME: &str = "x.disk";
const CLUSTER: u64 = 32 << 10;

/// Small disks of every kind.
fn plans() -> Result<Vec<Plan>> {
    let mut plans = Vec::new();
    for path in ["x.hds", "x.hdd"] {
        for kind in [Kind::Expanding, Kind::Preallocated, Kind::Plain] {
            if kind == Kind::Plain && path == "x.hds" {
                continue;
            }
            for (product, version) in [
                (Product::Any, Version::V2),
                (Product::Virtuozzo, Version::V1),
            ] {
                let request = Request {
                    size: 7 * CLUSTER,
                    kind,
                    version: (kind != Kind::Plain).then_some(version),
                    cluster: Some(CLUSTER),
                    product,
                    file_system: None,
                };
                plans.push(plan(Path::new(path), &request)?);
            }
        }
    }
    let desktop = Request {
        size: 1 << 20,
        kind: Kind::Expanding,
        version: None,
        cluster: None,
        product: Product::Desktop,
        file_system: None,
    };
    plans.push(plan(Path::new("x.hdd"), &desktop)?);
    Ok(plans)
}

fn fill(file: &NewFile, plan: &Plan) -> ploopfs::error::Result<()> {
    if plan.product == Product::Desktop {
        return Ok(());
    }
    let bytes = vec![0xa5; usize::try_from(CLUSTER).expect("small")];
    for cluster in [5, 0] {
        file.put(plan.shape.cluster, DiskCluster::new(cluster), &bytes)?;
    }
    Ok(())
}

fn create(host: &Host, plan: &Plan, progress: &Progress) -> ploopfs::error::Result<()> {
    let ids = Ids {
        temporary: "12345678".to_owned(),
        uid: Guid::random([3; 16]),
    };
    create_in(host, NAME, plan, &ids, progress, |file| fill(file, plan))
}

type Tree = BTreeMap<String, Option<Vec<u8>>>;

/// The whole disk, or none; what else is there has a name that tells what it is.
fn expect_all_or_nothing(left: &State, whole: &Tree, durable: bool) -> Outcome {
    let tree = left.tree();
    let ours = format!("/{NAME}");
    let temporary = format!("{ours}.creating.");
    let disk: Tree = tree
        .iter()
        .filter(|(path, _)| **path == ours || path.starts_with(&format!("{ours}/")))
        .map(|(path, bytes)| (path.clone(), bytes.clone()))
        .collect();
    ensure!(
        disk == *whole || (disk.is_empty() && !durable),
        "a part of a disk: {:?} of {:?}",
        disk.keys(),
        whole.keys()
    );
    for path in tree.keys().filter(|path| !disk.contains_key(*path)) {
        ensure!(path.starts_with(&temporary), "{path} was left");
    }
    Ok(())
}

/// Cuts everywhere; the first state that is wrong.
fn cut_everywhere(plan: &Plan, manners: Manners) -> Result<u32> {
    let host = Host::new(manners);
    create(&host, plan, &Progress::default())?;
    let whole = host.state().tree();
    ensure!(
        whole.keys().all(|path| !path.contains("creating")),
        "a temporary name is left"
    );
    let moments = host.moments();
    let (mut dice, mut cuts) = (1, 0);
    for (number, moment) in moments.iter().enumerate() {
        for attempt in 0..20 {
            let left = moment.after_cut(&mut dice);
            let durable = number + 1 == moments.len();
            expect_all_or_nothing(&left, &whole, durable)
                .with_context(|| format!("{plan:?}, operation {number}, attempt {attempt}"))?;
            cuts += 1;
        }
    }
    Ok(cuts)
}

fn all_or_nothing() -> Outcome {
    let mut cuts = 0;
    for plan in plans()? {
        cuts += cut_everywhere(&plan, Manners::default())?;
        // Were no sync made, this would be found.
        for manners in [
            Manners {
                lying_syncs: true,
                ..Manners::default()
            },
            Manners {
                lying_names: true,
                ..Manners::default()
            },
        ] {
            ensure!(
                cut_everywhere(&plan, manners).is_err(),
                "{plan:?}: nothing depends on the syncs of {manners:?}"
            );
        }
    }
    ensure!(cuts > 2000, "only {cuts} cuts");
    Ok(())
}

fn a_failure_leaves_nothing() -> Outcome {
    for plan in plans()? {
        let host = Host::new(Manners::default());
        create(&host, &plan, &Progress::default())?;
        let whole = host.state().tree();
        let count = host.moments().len() as u64 - 1;
        for number in 0..count {
            for errno in [libc::EIO, libc::ENOSPC] {
                let host = Host::new(Manners {
                    fails: Some((number, errno)),
                    ..Manners::default()
                });
                let failed = create(&host, &plan, &Progress::default());
                let failed = failed.err().context("a failure was lost")?;
                ensure!(failed.kind() == ErrorKind::Io(errno), "{failed}");
                let left = host.state().tree();
                ensure!(
                    left.is_empty(),
                    "{plan:?}, failure {number}: {:?}",
                    left.keys()
                );
                create(&host, &plan, &Progress::default())?;
                ensure!(host.state().tree() == whole, "it cannot be repeated");
            }
        }
    }
    Ok(())
}

fn stopped() -> Outcome {
    for plan in plans()? {
        let host = Host::new(Manners::default());
        let progress = Progress::default();
        progress.cancel();
        let stopped = create(&host, &plan, &progress).err();
        let stopped = stopped.context("it went on")?;
        ensure!(stopped.kind() == ErrorKind::Interrupted, "{stopped}");
        ensure!(host.state().tree().is_empty(), "{plan:?}");
    }
    Ok(())
}

/// Somebody makes the name while the disk is being made.
fn taken() -> Outcome {
    use ploopfs::storage::Directory;
    use ploopfs::units::FileOffset;
    for plan in plans()? {
        let host = Host::new(Manners::default());
        let ids = Ids::new()?;
        let refused = create_in(&host, NAME, &plan, &ids, &Progress::default(), |_| {
            let file = host.create_new(NAME)?;
            file.write_at(FileOffset::ZERO, b"somebody's")
        });
        let refused = refused.err().context("it was not refused")?;
        ensure!(refused.kind() == ErrorKind::Usage, "{refused}");
        let tree = host.state().tree();
        let there: Vec<_> = tree.into_iter().collect();
        let theirs = Some(b"somebody's".to_vec());
        ensure!(there == [(format!("/{NAME}"), theirs)], "{:?}", plan);
        ensure!(create(&host, &plan, &Progress::default()).is_err());
    }
    Ok(())
}
