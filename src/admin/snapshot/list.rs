//! What snapshots there are.
