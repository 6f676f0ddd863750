//! Snapshots of bundles of the host.
