//! The races as bars.
//!
//! Imports: `contestants` (names), `races` (titles), `report`; `plotters`.
//! Never: shows a scene that the raw file has not taken part in.

use crate::contestants::RAW;
use crate::races;
use crate::report::Report;
use anyhow::{Result, anyhow};
use plotters::prelude::*;
use std::path::Path;

const WIDTH: u32 = 1000;
const PANEL: u32 = 300;
const COLOURS: [RGBColor; 8] = [
    RGBColor(0x4e, 0x79, 0xa7),
    RGBColor(0xa0, 0xcb, 0xe8),
    RGBColor(0xf2, 0x8e, 0x2b),
    RGBColor(0xe1, 0x57, 0x59),
    RGBColor(0x76, 0xb7, 0xb2),
    RGBColor(0x59, 0xa1, 0x4f),
    RGBColor(0xb0, 0x7a, 0xa1),
    RGBColor(0x9c, 0x75, 0x5f),
];

/// A bar: its place, its width, the ratio, the contestant's number.
struct Bar {
    left: f64,
    width: f64,
    ratio: f64,
    colour: RGBColor,
}

/// Writes one panel for each scene of the report, as SVG.
pub(crate) fn draw(report: &Report, path: &Path) -> Result<()> {
    let scenes: Vec<&str> = report
        .scenes()
        .into_iter()
        .filter(|scene| report.contestants(scene).contains(&RAW))
        .collect();
    if scenes.is_empty() {
        return Ok(());
    }
    let height = PANEL * scenes.len() as u32;
    let root = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    let failed = |e: &dyn std::fmt::Display| anyhow!("cannot draw {}: {e}", path.display());
    root.fill(&WHITE).map_err(|e| failed(&e))?;
    for (area, scene) in root.split_evenly((scenes.len(), 1)).iter().zip(scenes) {
        panel(report, scene, area).map_err(|e| failed(&e))?;
    }
    root.present().map_err(|e| failed(&e))
}

fn bars(report: &Report, scene: &str, names: &[&str]) -> Vec<(usize, Bar)> {
    let width = 0.85 / names.len() as f64;
    let mut bars = Vec::new();
    for (group, job) in report.jobs(scene).iter().enumerate() {
        let Some(raw) = report.cell(scene, job, RAW) else {
            continue;
        };
        for (number, name) in names.iter().enumerate() {
            let cell = report.cell(scene, job, name);
            let Some(ratio) = cell.and_then(|cell| cell.ratio_to(raw)) else {
                continue;
            };
            let bar = Bar {
                left: group as f64 + 0.075 + number as f64 * width,
                width: width * 0.95,
                ratio: ratio.median,
                colour: COLOURS[number % COLOURS.len()],
            };
            bars.push((number, bar));
        }
    }
    bars
}

fn panel<B: DrawingBackend>(
    report: &Report,
    scene: &str,
    area: &DrawingArea<B, plotters::coord::Shift>,
) -> Result<(), String> {
    let names: Vec<&str> = report
        .contestants(scene)
        .into_iter()
        .filter(|name| *name != RAW)
        .collect();
    let jobs = report.jobs(scene);
    let bars = bars(report, scene, &names);
    let most = bars.iter().map(|(_, bar)| bar.ratio).fold(1.0, f64::max);
    let said = |e: &dyn std::fmt::Display| e.to_string();
    let mut chart = ChartBuilder::on(area)
        .caption(
            format!("{}: times the raw file", races::title(scene)),
            ("sans-serif", 16),
        )
        .margin(10)
        .x_label_area_size(24)
        .y_label_area_size(40)
        .build_cartesian_2d(0.0..jobs.len() as f64, 0.0..most * 1.1)
        .map_err(|e| said(&e))?;
    // A label stands under the middle of its group.
    let label = |x: &f64| {
        let is_middle = (x.fract() - 0.5).abs() < 0.01;
        let job = is_middle.then(|| jobs.get(*x as usize)).flatten();
        job.map_or_else(String::new, |job| (*job).to_owned())
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(2 * jobs.len() + 1)
        .x_label_formatter(&label)
        .draw()
        .map_err(|e| said(&e))?;
    for (number, name) in names.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let own = bars.iter().filter(|(owner, _)| *owner == number);
        let shapes = own.map(|(_, bar)| {
            let corners = [(bar.left, 0.0), (bar.left + bar.width, bar.ratio)];
            Rectangle::new(corners, bar.colour.filled())
        });
        chart
            .draw_series(shapes)
            .map_err(|e| said(&e))?
            .label(*name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 10, y + 4)], colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .draw()
        .map_err(|e| said(&e))
}
