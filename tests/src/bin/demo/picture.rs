//! The table of the scaling demo as a picture: requests above, pods below, a second after the other.

use std::fmt::Write;

/// One line of the table.
#[derive(Clone, Copy, Debug, Default)]
pub struct Row {
    /// Requests that were sent in this second.
    pub requests: u64,
    /// Requests that the gateway holds.
    pub held: u64,
    /// Requests in flight, by the stats server; `None` if it does not know the key.
    pub in_flight: Option<u64>,
    /// The stats server's decision; `None` if there is none.
    pub desired: Option<u64>,
    /// Pods that are ready.
    pub pods: u64,
}

const WIDTH: f64 = 720.0;
const LEFT: f64 = 40.0;
const STYLE: &str = "text{fill:#1b1f24}.all{fill:#9aa7b4}.part{fill:#0b62c4}.line{fill:none;stroke:#0b62c4;stroke-width:2}\
                     .axis{stroke:#9aa7b4}@media(prefers-color-scheme:dark){text{fill:#e7ebf0}.part{fill:#6cb2ff}\
                     .line{stroke:#6cb2ff}}";

/// A part of the picture with an axis of its own.
struct Panel {
    top: f64,
    height: f64,
    most: u64,
    seconds: usize,
}

impl Panel {
    fn x(&self, second: usize) -> f64 {
        LEFT + (WIDTH - LEFT) * second as f64 / self.seconds.max(1) as f64
    }

    fn y(&self, value: u64) -> f64 {
        self.top + self.height * (1.0 - value as f64 / self.most.max(1) as f64)
    }

    /// Returns the points of a line with a step at each second.
    fn steps(&self, values: &[u64]) -> String {
        let mut points = String::new();
        for (second, value) in values.iter().enumerate() {
            let y = self.y(*value);
            let _ = write!(points, "{:.1},{y:.1} {:.1},{y:.1} ", self.x(second), self.x(second + 1));
        }
        points
    }

    fn area(&self, class: &str, values: &[u64]) -> String {
        let (steps, floor) = (self.steps(values), self.y(0));
        let end = self.x(values.len());
        format!("<polygon class=\"{class}\" points=\"{LEFT},{floor:.1} {steps}{end:.1},{floor:.1}\"/>\n")
    }

    fn frame(&self, title: &str) -> String {
        let (floor, title_y) = (self.y(0), self.top - 12.0);
        let mut frame = format!(
            "<text x=\"0\" y=\"{title_y:.0}\" font-weight=\"600\">{title}</text>\n<path class=\"axis\" \
             d=\"M{LEFT} {floor:.1}H{WIDTH}\"/>\n"
        );
        for value in [0, self.most] {
            let (x, y) = (LEFT - 6.0, self.y(value) + 4.0);
            let _ = writeln!(frame, "<text x=\"{x}\" y=\"{y:.1}\" text-anchor=\"end\">{value}</text>");
        }
        frame
    }
}

/// Returns the picture as SVG.
pub fn draw(rows: &[Row]) -> String {
    let seconds = rows.len();
    let most = |figure: fn(&Row) -> u64| rows.iter().map(figure).max().unwrap_or(0);
    let all = |figure: fn(&Row) -> u64| rows.iter().map(figure).collect::<Vec<_>>();
    let in_flight = |row: &Row| row.in_flight.unwrap_or(0).max(row.held);
    // Without a decision the last one stays in force.
    let desired = rows.iter().scan(0, |last, row| {
        *last = row.desired.unwrap_or(*last);
        Some(*last)
    });
    let desired: Vec<u64> = desired.collect();
    let above = Panel { top: 30.0, height: 110.0, most: most(in_flight), seconds };
    let below =
        Panel { top: 190.0, height: 60.0, most: most(|row| row.pods.max(row.desired.unwrap_or(0))), seconds };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} 290\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<style>{STYLE}</style>\n"
    );
    svg.push_str(&above.area("all", &all(in_flight)));
    svg.push_str(&above.area("part", &all(|row| row.held)));
    svg.push_str(&above.frame("Requests in flight (grey), of which the gateway holds (blue)"));
    svg.push_str(&below.area("all", &all(|row| row.pods)));
    let _ = writeln!(svg, "<polyline class=\"line\" points=\"{}\"/>", below.steps(&desired));
    svg.push_str(&below.frame("Pods that are ready (grey), pods wanted (blue)"));
    for second in (0..=seconds).step_by(10) {
        let (x, y) = (below.x(second), below.y(0) + 18.0);
        let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{second} s</text>");
    }
    svg.push_str("</svg>\n");
    svg
}
