//! The `ploopfs` program.

fn main() {}
