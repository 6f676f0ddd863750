//! Writes odd images for the tests.
fn main() {}
