//! The text of `info`: one screen, whatever the disk.

use super::{DiskInfo, FileInfo};
use crate::error::Shown;
use crate::units::SECTOR;
use std::fmt::Write;

/// The most files, snapshots, warnings and problems of each kind that are shown.
const SHOWN: usize = 8;

/// Bytes in the unit that people use for so many.
fn size(bytes: u64) -> String {
    let mut unit = 0;
    let mut scaled = bytes;
    let mut rest = 0;
    while scaled >= 1024 && unit < 6 {
        rest = scaled % 1024;
        scaled /= 1024;
        unit += 1;
    }
    let name = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][unit];
    match rest * 10 / 1024 {
        0 => format!("{scaled} {name}"),
        tenths => format!("{scaled}.{tenths} {name}"),
    }
}

/// Renders as text, with a line break at the end.
#[must_use]
pub fn render(info: &DiskInfo) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_all(info, &mut out);
    out
}

fn write_all(info: &DiskInfo, out: &mut String) -> std::fmt::Result {
    writeln!(out, "{} ({})", Shown(&info.image), info.kind)?;
    match info.size_bytes {
        Some(bytes) => writeln!(out, "  disk       {} ({bytes} bytes)", size(bytes))?,
        None => writeln!(out, "  disk       unknown size")?,
    }
    let (long, allocated) = (size(info.file_bytes), size(info.allocated_bytes));
    writeln!(
        out,
        "  files      {long} long, {allocated} allocated on the host"
    )?;
    if let Some(how) = &info.encryption {
        writeln!(
            out,
            "  encrypted  {how}; contents are passed on as they are stored"
        )?;
    }
    if let Some(selected) = &info.selected {
        let role = if info.top.as_ref() == Some(selected) {
            "the top"
        } else {
            "a snapshot"
        };
        writeln!(out, "  shown      {selected}, {role}")?;
    }
    let mut shown = 0;
    for (number, part) in info.parts.iter().enumerate() {
        if info.parts.len() > 1 && shown < SHOWN {
            let (start, end) = (part.start_sector.unwrap_or(0), part.end_sector.unwrap_or(0));
            let bytes = end.saturating_sub(start).saturating_mul(SECTOR);
            writeln!(
                out,
                "part {number}: sectors {start} to {end}, {}",
                size(bytes)
            )?;
        } else if number == 0 {
            writeln!(out, "chain, top first:")?;
        }
        for (level, file) in part.files.iter().enumerate().rev() {
            if shown < SHOWN {
                write_file(level, file, out)?;
            }
            shown += 1;
        }
    }
    more(shown, "files", out)?;
    write_snapshots(info, out)?;
    for (title, lines) in [("warning", &info.warnings), ("problem", &info.problems)] {
        for line in lines.iter().take(SHOWN) {
            writeln!(out, "{title}: {}", Shown(line))?;
        }
        more(lines.len(), title, out)?;
    }
    Ok(())
}

fn more(count: usize, what: &str, out: &mut String) -> std::fmt::Result {
    match count.checked_sub(SHOWN) {
        None | Some(0) => Ok(()),
        Some(rest) => writeln!(out, "  ... {rest} more {what}; --json lists all"),
    }
}

fn write_file(level: usize, file: &FileInfo, out: &mut String) -> std::fmt::Result {
    writeln!(out, "  {level:>3} {}", Shown(&file.path))?;
    let mut facts = Vec::new();
    match (file.version, file.format) {
        (Some(version), _) => facts.push(format!("version {version}")),
        (None, format) => facts.push(format.to_owned()),
    }
    if let Some(bytes) = file.cluster_bytes {
        facts.push(format!("clusters of {}", size(bytes)));
    }
    if let (Some(mapped), Some(entries)) = (file.mapped_clusters, file.bat_entries) {
        facts.push(format!("{mapped} of {entries} mapped"));
    }
    if let (Some(len), Some(allocated)) = (file.file_bytes, file.allocated_bytes) {
        facts.push(format!("{} long, {} allocated", size(len), size(allocated)));
    }
    if file.in_use {
        facts.push("IN USE".to_owned());
    }
    facts.extend(file.closed_mark.as_ref().map(|mark| format!("mark {mark}")));
    writeln!(out, "      {}", facts.join(", "))?;
    if let Some(bad) = file.bad_entries.filter(|bad| *bad > 0) {
        writeln!(out, "      {} BAT entries point where no data can be", bad)?;
    }
    if let Some(extension) = &file.extension {
        match &extension.problem {
            Some(why) => writeln!(out, "      extension not valid: {why}")?,
            None => {
                for bitmap in extension.bitmaps.iter().take(SHOWN) {
                    let unit = size(bitmap.granularity_bytes);
                    writeln!(out, "      dirty bitmap {}, {unit} a bit, valid", bitmap.id)?;
                }
            }
        }
    }
    if let Some(why) = &file.write_refusal {
        writeln!(out, "      read-only: {why}")?;
    }
    for holder in file.holders.iter().flatten().take(SHOWN) {
        match holder.pid {
            0 => writeln!(out, "      locked by another program")?,
            pid => writeln!(out, "      locked by pid {pid} ({})", holder.command)?,
        }
    }
    Ok(())
}

fn write_snapshots(info: &DiskInfo, out: &mut String) -> std::fmt::Result {
    if info.snapshots.is_empty() {
        return Ok(());
    }
    writeln!(out, "snapshots, parents first:")?;
    for shot in info.snapshots.iter().take(SHOWN) {
        let name = shot
            .name
            .as_ref()
            .map(|name| format!(" {name:?}"))
            .unwrap_or_default();
        match &shot.parent {
            Some(parent) => writeln!(out, "  {}{name}, of {parent}", shot.guid)?,
            None => writeln!(out, "  {}{name}, a root", shot.guid)?,
        }
    }
    more(info.snapshots.len(), "snapshots", out)
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
