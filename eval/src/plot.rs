//! The picture of a run: connections that live and break, and packets that take a chain, over time.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::report::{Moment, Run};

const SIZE: (u32, u32) = (1100, 800);
const FOOT: u32 = 50;
/// Over how many moments a rate is taken: counters arrive about once a second, moments are half a second apart.
const RATE_SPAN: usize = 4;
const WITH: RGBColor = RGBColor(0x1b, 0x7f, 0x4f);
const WITHOUT: RGBColor = RGBColor(0xc0, 0x39, 0x2b);
const QUIET: RGBColor = RGBColor(0x88, 0x88, 0x88);

/// Draws a run and its counterpart without chaining.
///
/// # Errors
/// If the file cannot be written.
pub fn draw(path: &Path, with: &Run, without: &Run) -> Result<()> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    draw_on(&root, with, without).map_err(|error| anyhow!("{}: {error}", path.display()))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw_on(root: &Area<'_>, with: &Run, without: &Run) -> Result<()> {
    root.fill(&WHITE)?;
    let (panels, foot) = root.split_vertically(SIZE.1 - FOOT);
    let panels = panels.split_evenly((3, 1));
    for (line, names) in with.marks.chunks(with.marks.len().div_ceil(2).max(1)).enumerate() {
        let first = line * with.marks.len().div_ceil(2);
        let names: Vec<_> =
            names.iter().enumerate().map(|(i, (_, name))| format!("{} {name}", first + i + 1)).collect();
        let at = (60, 6 + 20 * line as i32);
        foot.draw_text(&names.join("  ·  "), &("sans-serif", 13).into_text_style(&foot), at)?;
    }
    let both = [("with chaining", with, WITH), ("without", without, WITHOUT)];
    panel(&panels[0], "Live connections", with, &both, |run| series(run, |moment| moment.live as f64))?;
    panel(&panels[1], "Broken connections and requests, total", with, &both, |run| {
        series(run, |moment| moment.broken as f64)
    })?;
    let chained = [("with chaining", with, WITH)];
    panel(&panels[2], "Packets sent on along a chain, per second", with, &chained, |run| rate(&run.moments))?;
    root.present()?;
    Ok(())
}

fn panel(
    area: &Area<'_>,
    caption: &str,
    marks_of: &Run,
    runs: &[(&str, &Run, RGBColor)],
    points: impl Fn(&Run) -> Vec<(f64, f64)>,
) -> Result<()> {
    let lines: Vec<_> = runs.iter().map(|(label, run, colour)| (*label, points(run), *colour)).collect();
    let (mut end, mut top) = (1.0_f64, 1.0_f64);
    for (x, y) in lines.iter().flat_map(|(_, points, _)| points) {
        end = end.max(*x);
        top = top.max(*y);
    }
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 17))
        .margin(8)
        .x_label_area_size(28)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..end, 0.0..top * 1.15)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .y_labels(5)
        .x_desc("seconds")
        .label_style(("sans-serif", 12))
        .draw()?;
    for (i, (at, _)) in marks_of.marks.iter().enumerate() {
        let number = format!(" {}", i + 1);
        let style = ("sans-serif", 12).into_font().color(&QUIET);
        chart.draw_series([PathElement::new(vec![(*at, 0.0), (*at, top * 1.15)], QUIET.mix(0.5))])?;
        chart.draw_series([Text::new(number, (*at, top * 1.13), style)])?;
    }
    for (label, points, colour) in lines {
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(label)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::MiddleRight)
        .background_style(WHITE.mix(0.8))
        .label_font(("sans-serif", 12))
        .draw()?;
    Ok(())
}

fn series(run: &Run, value: impl Fn(&Moment) -> f64) -> Vec<(f64, f64)> {
    run.moments.iter().map(|moment| (moment.at_s, value(moment))).collect()
}

/// The growth of the counter per second, over the last [`RATE_SPAN`] moments.
fn rate(moments: &[Moment]) -> Vec<(f64, f64)> {
    let span = |now: usize| (&moments[now.saturating_sub(RATE_SPAN)], &moments[now]);
    (1..moments.len())
        .map(span)
        .filter(|(then, now)| now.at_s > then.at_s)
        .map(|(then, now)| {
            let grown = now.chained_packets.saturating_sub(then.chained_packets) as f64;
            (now.at_s, grown / (now.at_s - then.at_s))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_the_growth_per_second() {
        let at =
            |at_s, chained_packets| Moment { at_s, live: 0, broken: 0, chained_packets, open_windows: 0 };
        assert_eq!(rate(&[at(0.0, 10), at(2.0, 30), at(2.5, 35)]), [(2.0, 10.0), (2.5, 10.0)]);
        assert_eq!(rate(&[]), []);
    }
}
