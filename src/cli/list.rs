//! `ploopfs list`.
//!
//! Imports: `error`, `fuse`.
//! Never: looks into a mount, which may be dead.

use super::output::{Report, print};
use crate::error::{Error, Result, Shown};
use crate::fuse::registry::{Record, Registry};
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

#[derive(Serialize)]
struct Row<'a> {
    state: &'static str,
    #[serde(flatten)]
    record: &'a Record,
}

#[derive(Serialize)]
struct Document<'a> {
    schema_version: u32,
    mounts: Vec<Row<'a>>,
}

/// Runs the command.
pub fn run(json: bool) -> Result<(), Box<Report>> {
    let text = list(json).map_err(|e| Report::new("cannot list the mounts", &e))?;
    print(&text);
    Ok(())
}

fn list(json: bool) -> Result<String> {
    let records = Registry::open()?.all()?;
    if !json {
        return Ok(table(&records));
    }
    let rows = |record| Row {
        state: state(record),
        record,
    };
    let document = Document {
        schema_version: 1,
        mounts: records.iter().map(rows).collect(),
    };
    let text = serde_json::to_string_pretty(&document)
        .map_err(|e| Error::from(std::io::Error::from(e)))?;
    Ok(text + "\n")
}

fn state(record: &Record) -> &'static str {
    match record {
        record if record.error.is_some() => "failed",
        record if !record.is_alive() => "dead",
        record if record.mountpoint.is_some() && !record.has_mount() => "draining",
        _ => "served",
    }
}

fn table(records: &[Record]) -> String {
    if records.is_empty() {
        return String::new();
    }
    let head = ["IMAGE", "AT", "MODE", "PID", "FOR"].map(str::to_owned);
    let mut rows = vec![head];
    for record in records {
        let show = |path: &Path| Shown(&path.to_string_lossy()).to_string();
        let mut at: Vec<String> = [&record.mountpoint, &record.device, &record.file_system]
            .into_iter()
            .flatten()
            .map(|path| show(&path.0))
            .collect();
        match state(record) {
            "served" => {}
            state => at.push(format!("({state})")),
        }
        let mode = if record.read_only { "ro" } else { "rw" };
        rows.push([
            show(&record.image.0),
            at.join(" "),
            mode.into(),
            record.pid.to_string(),
            age(record.since),
        ]);
    }
    let mut text = String::new();
    for row in &rows {
        let width = |column: usize| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
        };
        let cells = row.iter().enumerate();
        let line: Vec<String> = cells
            .map(|(column, cell)| format!("{cell:<width$}", width = width(column).unwrap_or(0)))
            .collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// How long ago a time was, in its largest unit.
fn age(since: u64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs();
    let seconds = now.saturating_sub(since);
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}min", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::registry::RecordedPath;

    #[test]
    fn columns_line_up() {
        let mut record = Record::of_this_process(Path::new("/a.hdd"), true).unwrap();
        record.mountpoint = Some(RecordedPath("/mnt/long/place".into()));
        let text = table(&[record]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0].find("MODE"), lines[1].find("ro"));
        assert_eq!(table(&[]), "");
    }

    #[test]
    fn a_name_cannot_break_the_table() {
        let record = Record::of_this_process(Path::new("/a\n\u{1b}[31mb.hdd"), true).unwrap();
        let text = table(&[record]);
        assert_eq!(text.lines().count(), 2);
        assert!(!text.contains('\u{1b}'), "{text}");
    }
}
