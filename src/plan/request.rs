//! The size class of a request, which decides where it is served.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

/// Requests of this order and above go to the pool unless `--inline-order` says otherwise:
/// 4 KiB << 6 = 256 KiB, the order that dm-ploop starts from.
pub const INLINE_ORDER_DEFAULT: RequestOrder = RequestOrder(6);

/// log2 of the 4 KiB pages that a request's bytes need, rounded up: 0 up to 4 KiB, 8 at 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestOrder(pub u32);

impl RequestOrder {
    /// The order of a request of this many bytes.
    #[must_use]
    #[inline]
    pub fn of(len: usize) -> Self {
        let pages = len.div_ceil(4096).max(1);
        // `next_power_of_two` of at most usize::MAX / 4096 cannot overflow.
        Self(pages.next_power_of_two().trailing_zeros())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_round_up() {
        for (len, order) in [
            (0, 0),
            (1, 0),
            (4096, 0),
            (4097, 1),
            (8192, 1),
            (8193, 2),
            (128 << 10, 5),
            ((128 << 10) + 1, 6),
            (256 << 10, 6),
            (1 << 20, 8),
        ] {
            assert_eq!(RequestOrder::of(len), RequestOrder(order), "{len}");
        }
    }
}
