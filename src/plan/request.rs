//! The size class of a request, which decides where it is served.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

/// Requests of this order and above go to the pool unless `--inline-order` says otherwise.
///
/// 7 is 512 KiB, what a loop device makes of a large read or write. With 6 (256 KiB, where dm-ploop
/// starts) reads of 256 KiB lose a fifth of their speed; with 8 and more, large reads are a little
/// faster alone, but small requests beside them wait several times as long, because all session
/// threads are busy copying. `tools/bench --contestants 'identity,a=--inline-order 8'` measures it.
pub const INLINE_ORDER_DEFAULT: RequestOrder = RequestOrder(7);

/// log2 of the whole 4 KiB pages in a request, rounded down: 0 below 8 KiB, 8 from 1 MiB on. A
/// request is below the threshold N exactly when it is shorter than 4 KiB << N.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestOrder(pub u32);

impl RequestOrder {
    /// The order of a request of this many bytes.
    #[must_use]
    #[inline]
    pub fn of(len: usize) -> Self {
        Self(len.div_euclid(4096).max(1).ilog2())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_below_a_threshold_when_it_is_shorter() {
        for len in [
            0,
            1,
            4096,
            8191,
            8192,
            8193,
            131_072,
            262_143,
            262_144,
            1 << 20,
            5 << 20,
        ] {
            for order in 1..12 {
                let below = RequestOrder::of(len) < RequestOrder(order);
                assert_eq!(below, len < 4096 << order, "{len} {order}");
            }
            assert!(
                RequestOrder::of(len) >= RequestOrder(0),
                "0 keeps nothing inline"
            );
        }
    }
}
