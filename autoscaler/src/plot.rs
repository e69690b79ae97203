//! The Pareto picture: what each policy costs against how many requests get a slot in time, one panel for each trace.
//!
//! Outcomes whose names differ only in settings (`tracker down_delay=0s`, `tracker down_delay=5s`) are one family with one
//! colour; those of a family that no other of it beats on both axes are joined by a line.

use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::error::{Error, Result};
use crate::simulate::Outcome;

const PANEL: (u32, u32) = (640, 420);
/// What is below this is not drawn: the differences that matter lie above it.
const PERCENT_MIN: f64 = 90.0;
const FONT: &str = "sans-serif";
/// Told apart also by those who do not see all colours (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];

/// What the policies made of one trace.
#[derive(Debug, Clone, Copy)]
pub struct Panel<'a> {
    /// The trace.
    pub title: &'a str,
    /// One point each.
    pub outcomes: &'a [Outcome],
}

type Failure = Box<dyn std::error::Error + Send + Sync>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Writes the picture of all panels, side by side, to an SVG file.
///
/// # Errors
/// The file cannot be written.
pub fn pareto(path: &Path, panels: &[Panel<'_>]) -> Result<()> {
    let failed = |source: Failure| Error::Draw { path: path.to_owned(), source };
    // Drawn into memory: a picture that fails half way leaves no file.
    let mut svg = String::new();
    draw(&mut svg, panels).map_err(failed)?;
    std::fs::write(path, svg).map_err(|source| failed(source.into()))
}

fn draw(svg: &mut String, panels: &[Panel<'_>]) -> Result<(), Failure> {
    let families = families(panels);
    let size = (PANEL.0 * panels.len().max(1) as u32, PANEL.1);
    let root = SVGBackend::with_string(svg, size).into_drawing_area();
    root.fill(&WHITE).map_err(told)?;
    for (area, panel) in root.split_evenly((1, panels.len().max(1))).iter().zip(panels) {
        draw_panel(area, panel, &families)?;
    }
    root.present().map_err(told)
}

fn draw_panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    panel: &Panel<'_>,
    families: &[String],
) -> Result<(), Failure> {
    let cost_max =
        panel.outcomes.iter().map(|outcome| outcome.replica_seconds_per_request).fold(0.0, f64::max);
    let share_min = panel.outcomes.iter().map(percent).fold(100.0, f64::min);
    let low = (share_min - 1.0).floor().clamp(PERCENT_MIN, 98.0);
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, (FONT, 16))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..(cost_max * 1.08).max(0.01), low..100.0 + (100.0 - low) * 0.03)
        .map_err(told)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc("replica-seconds for each request")
        .y_desc("% of requests with a slot in time")
        .label_style((FONT, 12))
        .draw()
        .map_err(told)?;
    for (index, family) in families.iter().enumerate() {
        let points: Vec<(f64, f64)> = panel
            .outcomes
            .iter()
            .filter(|outcome| family_of(&outcome.name) == family && percent(outcome) >= low)
            .map(|outcome| (outcome.replica_seconds_per_request, percent(outcome)))
            .collect();
        draw_family(&mut chart, family, points, COLOURS[index % COLOURS.len()])?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.9))
        .border_style(RGBColor(180, 180, 180))
        .label_font((FONT, 12))
        .draw()
        .map_err(told)
}

fn draw_family(
    chart: &mut Chart<'_, '_>,
    family: &str,
    points: Vec<(f64, f64)>,
    colour: RGBColor,
) -> Result<(), Failure> {
    let radius = if points.len() > 1 { 2 } else { 5 };
    chart.draw_series(LineSeries::new(front(&points), colour.stroke_width(2))).map_err(told)?;
    chart
        .draw_series(points.into_iter().map(|point| Circle::new(point, radius, colour.filled())))
        .map_err(told)?
        .label(family)
        .legend(move |at| Circle::new((at.0 + 10, at.1), 4, colour.filled()));
    Ok(())
}

/// The points that no other beats on both axes, cheapest first.
fn front(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut sorted = points.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
    let mut best = f64::NEG_INFINITY;
    sorted.retain(|(_, share)| {
        let better = *share > best;
        best = best.max(*share);
        better
    });
    sorted
}

fn percent(outcome: &Outcome) -> f64 {
    outcome.within_target * 100.0
}

fn family_of(name: &str) -> &str {
    name.split(' ').next().unwrap_or(name)
}

/// Each family once, in the order of the outcomes.
fn families(panels: &[Panel<'_>]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for outcome in panels.iter().flat_map(|panel| panel.outcomes) {
        let family = family_of(&outcome.name);
        if !found.iter().any(|known| known == family) {
            found.push(family.to_owned());
        }
    }
    found
}

/// The library's errors borrow what they are about.
fn told(error: impl std::fmt::Display) -> Failure {
    error.to_string().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_leaves_out_what_is_beaten() {
        let points = [(1.0, 99.0), (0.5, 90.0), (0.7, 80.0), (2.0, 99.0), (0.5, 85.0)];
        assert_eq!(front(&points), [(0.5, 90.0), (1.0, 99.0)]);
    }
}
