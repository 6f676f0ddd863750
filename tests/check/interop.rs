//! What other programs say of an image that was repaired.
