//! What is printed: text, and tables with aligned columns.

use std::io::{self, IsTerminal, Write};

/// Clears a terminal and goes to its first line.
const CLEAR: &str = "\x1b[2J\x1b[H";
/// The longest cell of a table, in characters. A name has at most 512 bytes.
const MAX_CELL: usize = 600;

/// Prints text, and a newline if it does not end in one. What a server says may contain anything, so
/// other control characters are printed as escapes: a terminal must not obey them.
///
/// # Errors
/// In one line.
pub fn print(text: &str) -> Result<(), String> {
    let end = if text.ends_with('\n') { "" } else { "\n" };
    write(&format!("{}{end}", without_controls(text, &['\n'])))
}

/// Separates what was printed from what will be.
///
/// # Errors
/// In one line.
pub fn clear() -> Result<(), String> {
    write(if io::stdout().is_terminal() { CLEAR } else { "\n" })
}

/// Returns text as one line, with its control characters as escapes.
pub fn in_one_line(text: &str) -> String {
    without_controls(text.trim_end(), &[])
}

fn without_controls(text: &str, allowed: &[char]) -> String {
    text.chars().fold(String::new(), |mut plain, character| {
        match character.is_control() && !allowed.contains(&character) {
            true => plain.extend(character.escape_default()),
            false => plain.push(character),
        }
        plain
    })
}

fn write(text: &str) -> Result<(), String> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Whoever read it has seen enough: `keys | head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.map_err(|error| format!("cannot print: {error}")),
    }
}

/// Returns rows as lines, with the columns below each other. `right` says which columns are numbers.
pub fn table(rows: &[Vec<String>], right: &[bool]) -> String {
    let shown = |cell: &String| in_one_line(cell).chars().take(MAX_CELL).collect();
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(shown).collect()).collect();
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

    #[test]
    fn what_a_server_says_is_no_command_to_a_terminal() {
        let hostile = "\u{1b}[31mred\nnext\r\u{9b}31m größer";
        assert_eq!(in_one_line(hostile), "\\u{1b}[31mred\\nnext\\r\\u{9b}31m größer");
        assert_eq!(table(&[vec![hostile.into()]], &[]).lines().count(), 1);
        assert_eq!(without_controls("a\n\u{7}", &['\n']), "a\n\\u{7}");
        // Nor is a name of any length a panic.
        let line = table(&[vec!["m".repeat(100_000), "x".into()]], &[true, true]);
        assert_eq!(line, format!("{}  x\n", "m".repeat(MAX_CELL)));
    }
}
