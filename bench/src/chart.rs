//! The picture: the first answer of every case, one bar each, with its spread.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::case::Case;
use crate::error::{Error, Result};
use crate::outcome::{Outcome, Row};
use crate::sample::Spread;

const WIDTH: u32 = 860;
const BAR_HEIGHT: u32 = 26;
/// Room for names on the left, for values on the right, for the title above and the axis below.
const MARGIN: (u32, u32, u32, u32) = (230, 130, 70, 30);

/// Writes an SVG with one bar for each row that has a first answer: median as the bar, least and most as the line.
///
/// # Errors
/// The file cannot be written.
pub fn draw(outcome: &Outcome, path: &Path) -> Result<()> {
    let wrong = |problem: String| Error::Chart { path: path.to_owned(), problem };
    let text = picture(outcome).map_err(&wrong)?;
    std::fs::write(path, text).map_err(|error| wrong(error.to_string()))
}

fn picture(outcome: &Outcome) -> std::result::Result<String, String> {
    let bars: Vec<(&Row, Spread)> =
        outcome.results.iter().filter_map(|row| Some((row, row.first_answer_ms?))).collect();
    let height = MARGIN.2 + MARGIN.3 + BAR_HEIGHT * bars.len() as u32;
    let most = bars.iter().map(|(_, spread)| spread.max).fold(1.0, f64::max);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        let failed = |error: DrawingAreaErrorKind<_>| format!("{error:?}");
        root.fill(&WHITE).map_err(failed)?;
        let font = |size: u32| ("sans-serif", size).into_font().color(&BLACK);
        let title = "Milliseconds from the command to the first answer";
        root.draw_text(title, &font(18), (12, 12)).map_err(failed)?;
        let machine = &outcome.machine;
        let under = format!(
            "{}: {} cores of {}, Linux {}; medians, lines from least to most",
            outcome.date, machine.cores, machine.processor, machine.kernel
        );
        root.draw_text(&under, &font(12), (12, 38)).map_err(failed)?;
        let room = f64::from(WIDTH - MARGIN.0 - MARGIN.1);
        let x = |value: f64| MARGIN.0 as i32 + (value / most * room) as i32;
        for (index, (row, spread)) in bars.iter().enumerate() {
            let top = (MARGIN.2 + BAR_HEIGHT * index as u32) as i32;
            let middle = top + BAR_HEIGHT as i32 / 2;
            let right = font(13).pos(Pos::new(HPos::Right, VPos::Center));
            let name = format!("{} ({})", row.case.name(), row.store.name());
            root.draw_text(&name, &right, (MARGIN.0 as i32 - 8, middle)).map_err(failed)?;
            let bar = [(x(0.0), top + 4), (x(spread.median), top + BAR_HEIGHT as i32 - 4)];
            root.draw(&Rectangle::new(bar, colour(row.case).filled())).map_err(failed)?;
            let line = vec![(x(spread.min), middle), (x(spread.max), middle)];
            root.draw(&PathElement::new(line, BLACK.stroke_width(1))).map_err(failed)?;
            let left = font(13).pos(Pos::new(HPos::Left, VPos::Center));
            let value = format!("{:.0} ms", spread.median);
            root.draw_text(&value, &left, (x(spread.max) + 8, middle)).map_err(failed)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

fn colour(case: Case) -> RGBColor {
    match case {
        Case::Running | Case::Cold => RGBColor(150, 150, 150),
        Case::CriuEager | Case::CriuLazy => RGBColor(225, 150, 60),
        Case::RewarmEager | Case::RewarmLazy | Case::RewarmLazyRecorded => RGBColor(60, 130, 190),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Place;
    use crate::machine::Machine;

    #[test]
    fn each_row_with_an_answer_is_a_bar_with_its_value() {
        let row = |case, median| Row {
            case,
            store: Place::FileWarm,
            rounds: 1,
            resume_ms: None,
            first_answer_ms: median,
            present_ms: None,
            bytes_read: None,
            cpu_ms: None,
        };
        let spread = Spread { median: 123.0, min: 100.0, max: 200.0 };
        let outcome = Outcome {
            machine: Machine { processor: "P".into(), cores: 2, memory_bytes: 1, kernel: "6".into() },
            date: "2026-01-01".into(),
            results: vec![row(Case::CriuLazy, Some(spread)), row(Case::RewarmLazy, None)],
        };
        let svg = picture(&outcome).unwrap();
        assert!(svg.contains("criu-lazy (file-warm)") && svg.contains("123 ms"), "{svg}");
        assert!(!svg.contains("rewarm-lazy"), "no answer, no bar");
    }
}
