//! Draws the figures: an SVG file, and the processor time in the terminal.

use crate::load::{AS_FAST_AS_IT_GOES, Load, Measured};
use plotters::prelude::*;
use textplots::{Chart, LabelBuilder, LabelFormat, Plot, Shape};

type Points = Vec<(Load, Measured, Measured)>;
type Line = (&'static str, RGBColor, fn(&(Load, Measured, Measured)) -> f64);

const BLUE: RGBColor = RGBColor(11, 111, 124);
const GREY: RGBColor = RGBColor(140, 140, 140);

/// Returns where the SVG file is.
pub fn draw(charts: &[(&str, Points)]) -> String {
    for (title, points) in charts {
        let of = |figure: fn(&(Load, Measured, Measured)) -> f64| -> Vec<(f32, f32)> {
            points.iter().map(|point| (x(title, point).log10() as f32, figure(point) as f32)).collect()
        };
        let (ours, floor) = (of(|p| p.1.cpu_us), of(|p| p.2.cpu_us));
        println!("\nprocessor µs a delivery against {title} (powers of ten): brooklet ───, floor the other line");
        let (first, last) = (ours[0].0, ours[ours.len() - 1].0);
        Chart::new(120, 48, first, last)
            .lineplot(&Shape::Lines(&ours))
            .lineplot(&Shape::Lines(&floor))
            .y_label_format(LabelFormat::Custom(Box::new(|value| format!("{value:.1} µs"))))
            .nice();
    }
    let path = format!("{}/bench.svg", env!("CARGO_TARGET_TMPDIR"));
    draw_svg(&path, charts).expect("drawing the plot");
    path
}

/// The place on the axis. What went as fast as it could stands at the rate that it reached.
fn x(title: &str, (load, ours, _): &(Load, Measured, Measured)) -> f64 {
    match title {
        "subscribers" => load.subscribers as f64,
        _ if load.rate == AS_FAST_AS_IT_GOES => ours.per_second / load.subscribers as f64,
        _ => load.rate as f64,
    }
}

fn draw_svg(path: &str, charts: &[(&str, Points)]) -> Result<(), Box<dyn std::error::Error>> {
    let cpu: [Line; 2] = [("brooklet", BLUE, |p| p.1.cpu_us), ("floor", GREY, |p| p.2.cpu_us)];
    let time: [Line; 4] = [
        ("brooklet p50", BLUE, |p| p.1.p50_ms),
        ("brooklet p99", RGBColor(98, 203, 214), |p| p.1.p99_ms),
        ("floor p50", GREY, |p| p.2.p50_ms),
        ("floor p99", RGBColor(200, 200, 200), |p| p.2.p99_ms),
    ];
    let area = SVGBackend::new(path, (1100, 760)).into_drawing_area();
    area.fill(&WHITE)?;
    for (panel, (which, (title, points))) in
        area.split_evenly((2, 2)).iter().zip((0..4).map(|n| (n / 2, &charts[n % 2])))
    {
        let (what, lines) =
            if which == 0 { ("processor µs a delivery", &cpu[..]) } else { ("ms to a subscriber", &time[..]) };
        let xs: Vec<f64> = points.iter().map(|point| x(title, point)).collect();
        let ys = || lines.iter().flat_map(|line| points.iter().map(line.2));
        let (top, bottom) = (ys().fold(0.0, f64::max) * 1.3, ys().fold(f64::MAX, f64::min) * 0.7);
        let mut chart = ChartBuilder::on(panel)
            .caption(format!("{what}, by {title}"), ("sans-serif", 18))
            .margin(14)
            .x_label_area_size(34)
            .y_label_area_size(54)
            .build_cartesian_2d((xs[0]..xs[xs.len() - 1]).log_scale(), (bottom..top).log_scale())?;
        chart.configure_mesh().x_desc(*title).y_desc(what).draw()?;
        for (name, colour, figure) in lines {
            let line: Vec<(f64, f64)> = points.iter().map(|point| (x(title, point), figure(point))).collect();
            let series = LineSeries::new(line, colour.stroke_width(2)).point_size(3);
            let colour = *colour;
            chart
                .draw_series(series)?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
        }
        let corner = if which == 0 { SeriesLabelPosition::LowerLeft } else { SeriesLabelPosition::UpperLeft };
        chart.configure_series_labels().position(corner).background_style(WHITE.mix(0.8)).border_style(GREY).draw()?;
    }
    area.present()?;
    Ok(())
}
