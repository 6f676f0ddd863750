//! A report as people read it: on a terminal, and in the README.
//!
//! Imports: `contestants` (names), `jobs` and `races` (titles), `report`.
//! Never: measures anything, or changes a report.

use crate::contestants::{IDENTITY, RAW};
use crate::report::{Cell, Report};
use crate::{jobs, races};
use anyhow::{Context, Result};
use std::fmt::Write;
use std::path::Path;

/// Between these two lines of the README is what [`readme`] writes.
const BEGIN: &str = "<!-- tools/bench --readme: begin -->";
const END: &str = "<!-- tools/bench --readme: end -->";

fn number(value: f64) -> String {
    match value {
        value if value >= 10_000.0 => format!("{:.1}k", value / 1000.0),
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 1.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

/// The contestant that the others of a scene are compared with.
fn base(report: &Report, scene: &str) -> Option<String> {
    let names = report.contestants(scene);
    [RAW, "depth 1", "copied", IDENTITY]
        .into_iter()
        .find(|base| names.contains(base))
        .map(str::to_owned)
}

fn against(report: &Report, cell: &Cell, base: Option<&str>) -> Option<f64> {
    let base = base.filter(|base| *base != cell.contestant)?;
    let base = report.cell(&cell.scene, &cell.job, base)?;
    Some(cell.ratio_to(base)?.median)
}

/// All tables for a terminal.
pub(crate) fn text(report: &Report) -> String {
    let mut out = String::new();
    for scene in report.scenes() {
        let names = report.contestants(scene);
        let base = base(report, scene);
        let _ = write!(out, "\n{scene}: {}\n{:32}", races::title(scene), "");
        for name in &names {
            let _ = write!(out, " {name:>23}");
        }
        out.push('\n');
        for job in report.jobs(scene) {
            let unit = names
                .iter()
                .find_map(|name| report.cell(scene, job, name))
                .map_or("", |cell| cell.unit.name());
            let _ = write!(out, "{:32}", format!("{} {unit}", jobs::title(job)));
            for name in &names {
                let shown = report
                    .cell(scene, job, name)
                    .map_or_else(String::new, |cell| shown(report, cell, base.as_deref()));
                let _ = write!(out, " {shown:>23}");
            }
            out.push('\n');
        }
    }
    let _ = write!(
        out,
        "\nmedian +-spread xR/I: the median of the rounds' ratios to {RAW} (or depth 1) and to \
         {IDENTITY}; more is always better\n\n"
    );
    for verdict in &report.verdicts {
        let met = match verdict.met {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "-",
        };
        let _ = writeln!(
            out,
            "{met:6} {:>10}  {:24} {}",
            verdict.target, verdict.measured, verdict.what
        );
    }
    for skipped in &report.skipped {
        let _ = writeln!(out, "left out: {skipped}");
    }
    out
}

fn shown(report: &Report, cell: &Cell, base: Option<&str>) -> String {
    let mut shown = format!("{} +-{:.0}%", number(cell.median), cell.spread_percent);
    if let Some(ratio) = against(report, cell, base) {
        let _ = write!(shown, " x{ratio:.2}");
        if let Some(ratio) = against(report, cell, Some(IDENTITY)) {
            let _ = write!(shown, "/{ratio:.2}");
        }
    }
    shown
}

/// A command in lines that fit, broken before options.
fn folded(command: &str) -> String {
    let mut lines = String::new();
    for (number, option) in command.split(" --").enumerate() {
        let line = lines.rsplit('\n').next().unwrap_or_default();
        let is_full = line.len() + option.len() > 90;
        match (number, is_full) {
            (0, _) => {}
            (_, true) => lines.push_str("\n--"),
            (_, false) => lines.push_str(" --"),
        }
        lines.push_str(option);
    }
    lines
}

/// The tables in Markdown.
fn markdown(report: &Report) -> String {
    let about = &report.about;
    let mut out = String::new();
    // What a builder has added behind the number says nothing to others.
    let kernel = about.kernel.split('-').next().unwrap_or_default();
    let _ = writeln!(
        out,
        "`{}`\n(version {}, {}, Linux {}, {} CPUs,\n{} rounds of {} s, images of {} MiB on {}; \
         cold, direct, sync and reflink on {}):",
        folded(&about.command),
        about.version,
        about.date,
        kernel,
        about.cpus,
        about.rounds,
        about.seconds,
        about.size_mib,
        about.image_fs,
        about.disk_fs
    );
    let scenes = report.scenes().into_iter();
    for scene in scenes.filter(|scene| !races::is_work(scene)) {
        let names = report.contestants(scene);
        let base = base(report, scene);
        let _ = writeln!(out, "\n| {} | {} |", races::title(scene), names.join(" | "));
        let _ = writeln!(out, "|---|{}", "---|".repeat(names.len()));
        for job in report.jobs(scene) {
            let cells: Vec<String> = names
                .iter()
                .map(|name| report.cell(scene, job, name))
                .map(|cell| cell.map_or_else(String::new, |c| plain(report, c, base.as_deref())))
                .collect();
            let _ = writeln!(out, "| {} | {} |", jobs::title(job), cells.join(" | "));
        }
    }
    out.push_str("\n| target | wanted | measured | |\n|---|---|---|---|\n");
    for verdict in &report.verdicts {
        let met = match verdict.met {
            Some(true) => "met",
            Some(false) => "missed",
            None => "",
        };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {met} |",
            verdict.what, verdict.target, verdict.measured
        );
    }
    out
}

fn plain(report: &Report, cell: &Cell, base: Option<&str>) -> String {
    let value = format!("{} {}", number(cell.median), cell.unit.name());
    match against(report, cell, base) {
        Some(ratio) => format!("{value} (x{ratio:.2})"),
        None => value,
    }
}

/// Puts the tables where the README has its two markers.
pub(crate) fn readme(report: &Report, path: &Path) -> Result<()> {
    let text = std::fs::read_to_string(path)?;
    let lacks = || format!("{} lacks the line {BEGIN} or {END}", path.display());
    let (before, rest) = text.split_once(BEGIN).with_context(lacks)?;
    let (_, after) = rest.split_once(END).with_context(lacks)?;
    let new = format!("{before}{BEGIN}\n{}{END}{after}", markdown(report));
    std::fs::write(path, new)?;
    Ok(())
}
