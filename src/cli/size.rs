//! Sizes and times as people write them.
//!
//! Imports: `admin`, `units`.
//! Never: rounds what was written.

use crate::admin::resize::disk::Change;
use crate::units::SECTOR;

/// Reads `10G`, `10GiB`, `1.5T`, `4096`, `20480s`. K, M, G and T count in 1024, `kB`, `MB`, `GB`
/// and `TB` in 1000, `s` in sectors; a plain number is bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = factor(unit).ok_or_else(|| {
        format!("'{text}' is no size: use a number with K, M, G or T, kB, MB, GB, or s for sectors")
    })?;
    let bytes = scaled(number, factor)
        .ok_or_else(|| format!("'{text}' is no size: '{number}' is no number of {unit}"))?;
    Ok(bytes)
}

/// Reads a new size, or with a sign before it by how much a size changes.
pub fn parse_change(text: &str) -> Result<Change, String> {
    if let Some(more) = text.strip_prefix('+') {
        return parse_size(more).map(Change::Plus);
    }
    match text.strip_prefix('-') {
        Some(less) => parse_size(less).map(Change::Minus),
        None => parse_size(text).map(Change::To),
    }
}

/// Reads the size of a disk. ploop counts plain numbers in sectors, so a small one is asked about.
pub fn parse_disk_size(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if text.bytes().all(|byte| byte.is_ascii_digit()) && bytes < 1 << 20 {
        return Err(format!(
            "a plain number is bytes, and so few make no disk: {text}s for sectors, {text}M for MiB"
        ));
    }
    Ok(bytes)
}

fn factor(unit: &str) -> Option<u64> {
    let power = |base: u64, letter: char| {
        let power = "kmgt"
            .find(letter.to_ascii_lowercase())
            .and_then(|at| u32::try_from(at).ok());
        power.and_then(|power| base.checked_pow(power.saturating_add(1)))
    };
    let mut letters = unit.chars();
    match (letters.next(), letters.as_str()) {
        (None, _) => Some(1),
        (Some('s'), "") => Some(SECTOR),
        (Some('B' | 'b'), "") => Some(1),
        (Some(letter), "" | "iB" | "ib") => power(1024, letter),
        (Some(letter), "B") => power(1000, letter),
        _ => None,
    }
}

/// A decimal number times a factor, exactly.
fn scaled(number: &str, factor: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 9 {
        return None;
    }
    let mut total = whole.parse::<u64>().ok()?.checked_mul(factor)?;
    if !fraction.is_empty() {
        let tenths = 10_u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
        let product = fraction.parse::<u64>().ok()?.checked_mul(factor)?;
        if product.checked_rem(tenths) != Some(0) {
            return None;
        }
        total = total.checked_add(product.checked_div(tenths)?)?;
    }
    (number.split('.').count() <= 2).then_some(total)
}

/// Shows bytes with one decimal in units of 1024.
#[must_use]
pub fn show_size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut unit, mut scale) = (0, 1_u64);
    while unit + 1 < units.len() && bytes / scale >= 1024 {
        unit += 1;
        scale <<= 10;
    }
    let name = units.get(unit).copied().unwrap_or("B");
    let tenths = u128::from(bytes) * 10 / u128::from(scale);
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} {name}"),
        (whole, tenth) => format!("{whole}.{tenth} {name}"),
    }
}

/// Reads a time in seconds (`30`, `30s`, `1.5`) or milliseconds (`500ms`), as milliseconds.
pub fn parse_millis(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no time: use seconds (5, 0.5s) or milliseconds (500ms)");
    match text.strip_suffix("ms") {
        Some(number) => scaled(number, 1).ok_or_else(wrong),
        None => scaled(text.strip_suffix('s').unwrap_or(text), 1000).ok_or_else(wrong),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_written() {
        let good = [
            ("4096", 4096),
            ("0", 0),
            ("20480s", 20480 * 512),
            ("10G", 10 << 30),
            ("10GiB", 10 << 30),
            ("1.5T", 3 << 39),
            ("64k", 65536),
            ("64kB", 64000),
            ("1MB", 1_000_000),
            ("12B", 12),
            ("0.5K", 512),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "G",
            "1X",
            "1.2.3K",
            "-1",
            "1 G",
            ".5K",
            "99999999T",
            "0.3s",
            "1e3",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_sign_makes_a_size_a_change() {
        assert_eq!(parse_change("2K"), Ok(Change::To(2048)));
        assert_eq!(parse_change("+1s"), Ok(Change::Plus(512)));
        assert_eq!(parse_change("-1M"), Ok(Change::Minus(1 << 20)));
        for text in ["+-1", "--1", "+", "-"] {
            assert!(parse_change(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_small_plain_number_is_no_disk() {
        assert!(parse_disk_size("20480").unwrap_err().contains("20480s"));
        for (text, bytes) in [
            ("20480s", 20480 * 512),
            ("1048576", 1 << 20),
            ("64K", 65536),
        ] {
            assert_eq!(parse_disk_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (64 << 30, "64 GiB"),
        ] {
            assert_eq!(show_size(bytes), text);
        }
        assert_eq!(show_size(u64::MAX), "15.9 EiB");
    }

    #[test]
    fn times_are_seconds_unless_they_say_otherwise() {
        for (text, millis) in [
            ("5", 5000),
            ("0.5", 500),
            ("2s", 2000),
            ("250ms", 250),
            ("0", 0),
        ] {
            assert_eq!(parse_millis(text), Ok(millis), "{text}");
        }
        assert!(parse_millis("soon").is_err());
    }
}
