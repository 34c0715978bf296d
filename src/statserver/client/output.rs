//! What is printed: text, and tables with aligned columns.

use std::io::{self, Write};

/// Prints text, and a newline if it does not end in one.
///
/// # Errors
/// In one line.
pub fn print(text: &str) -> Result<(), String> {
    let end = if text.ends_with('\n') { "" } else { "\n" };
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.write_all(end.as_bytes()));
    match written.and_then(|()| out.flush()) {
        // Whoever read it has seen enough: `keys | head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.map_err(|error| format!("cannot print: {error}")),
    }
}

/// Returns rows as lines, with the columns below each other. `right` says which columns are numbers.
pub fn table(rows: &[Vec<String>], right: &[bool]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells =
            row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match right.get(column) {
                Some(true) => format!("{cell:>width$}"),
                _ => format!("{cell:<width$}"),
            });
        let cells: Vec<String> = cells.collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_below_each_other() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        let rows = [row(["NAME", "PODS", "STATE"]), row(["größer", "12", "ok"]), row(["b", "1234567", ""])];
        let expected = "NAME       PODS  STATE\ngrößer       12  ok\nb       1234567\n";
        assert_eq!(table(&rows, &[false, true]), expected);
    }
}
