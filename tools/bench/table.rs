//! Samples in, medians and ratios out, as text or JSON.
//!
//! Imports: `jobs`, `stand` (the name of the raw loop); std, `serde_json`.
//! Never: leaves out a sample that it was given.

use crate::jobs::Measured;
use crate::stand::RAW;
use serde_json::{Value, json};
use std::fmt::Write;

/// The samples of one cell.
#[derive(Debug)]
struct Cell {
    place: String,
    measured: Measured,
    subject: String,
    samples: Vec<f64>,
}

impl Cell {
    fn median(&self) -> f64 {
        let mut sorted = self.samples.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() % 2 {
            0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
            _ => sorted[middle],
        }
    }

    /// Half of what lies between the lowest and the highest sample, in percent of the median.
    fn spread(&self) -> f64 {
        let least = self.samples.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.samples.iter().copied().fold(0.0, f64::max);
        (most - least) / 2.0 / self.median() * 100.0
    }
}

/// All samples, cells in the order in which they first came.
#[derive(Debug, Default)]
pub(crate) struct Results {
    cells: Vec<Cell>,
}

/// The distinct values of a list, in the order of their first appearance.
fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for value in all {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

impl Results {
    /// Adds a sample.
    pub(crate) fn add(&mut self, place: &str, measured: Measured, subject: &str, value: f64) {
        let cell = self.cells.iter_mut().find(|cell| {
            cell.place == place && cell.measured == measured && cell.subject == subject
        });
        match cell {
            Some(cell) => cell.samples.push(value),
            None => self.cells.push(Cell {
                place: place.to_owned(),
                measured,
                subject: subject.to_owned(),
                samples: vec![value],
            }),
        }
    }

    fn cell(&self, place: &str, measured: Measured, subject: &str) -> Option<&Cell> {
        self.cells.iter().find(|cell| {
            cell.place == place && cell.measured == measured && cell.subject == subject
        })
    }

    /// How a cell compares with the raw loop's; `None` for what that has no cell for.
    fn ratio(&self, cell: &Cell) -> Option<f64> {
        let raw = self.cell(&cell.place, cell.measured, RAW)?;
        Some(cell.median() / raw.median())
    }

    /// One table for each place: medians, and in brackets their ratio to the raw loop.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        for place in distinct(self.cells.iter().map(|cell| cell.place.as_str())) {
            let here = || self.cells.iter().filter(|cell| cell.place == place);
            let subjects = distinct(here().map(|cell| cell.subject.as_str()));
            let _ = write!(out, "\n{place}\n{:32}", "");
            for subject in &subjects {
                let _ = write!(out, " {subject:>18}");
            }
            out.push('\n');
            for measured in distinct(here().map(|cell| cell.measured)) {
                let arrow = if measured.more { '+' } else { '-' };
                let row = format!("{} {} {arrow}", measured.row, measured.unit);
                let _ = write!(out, "{row:32}");
                for subject in &subjects {
                    let shown = self
                        .cell(place, measured, subject)
                        .map_or_else(String::new, |cell| self.shown(cell));
                    let _ = write!(out, " {shown:>18}");
                }
                out.push('\n');
            }
        }
        let _ = writeln!(
            out,
            "\nmedians, (xN) the ratio to the raw loop; + more is better, - less is better"
        );
        out
    }

    fn shown(&self, cell: &Cell) -> String {
        let median = cell.median();
        let decimals = usize::from(median < 100.0);
        match self.ratio(cell) {
            Some(ratio) if cell.subject != RAW => format!("{median:.decimals$} (x{ratio:.2})"),
            _ => format!("{median:.decimals$}"),
        }
    }

    /// Everything, samples included.
    pub(crate) fn json(&self) -> Value {
        let cells = self.cells.iter().map(|cell| {
            json!({
                "place": cell.place,
                "measured": cell.measured.row,
                "unit": cell.measured.unit,
                "more_is_better": cell.measured.more,
                "subject": cell.subject,
                "median": cell.median(),
                "spread_percent": cell.spread(),
                "ratio_to_raw": self.ratio(cell),
                "samples": cell.samples,
            })
        });
        json!({ "schema_version": 1, "cells": cells.collect::<Vec<_>>() })
    }
}
