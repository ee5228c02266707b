//! Columns of text, and sizes for people.

/// Lays rows out below a line of headings, each column as wide as it needs.
pub fn lay_out(columns: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let headings = columns.iter().map(|heading| (*heading).to_owned()).collect();
    let lines: Vec<Vec<String>> = std::iter::once(headings).chain(rows).collect();
    let width = |column: usize| {
        lines.iter().filter_map(|line| Some(line.get(column)?.chars().count())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// What is known, or `?`.
pub fn known(what: Option<impl ToString>) -> String {
    what.map_or("?".to_owned(), |what| what.to_string())
}

/// A number of bytes in the unit that makes it short.
pub fn size(bytes: u64) -> String {
    let units = [(1 << 40, "TB"), (1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "kB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_need() {
        let rows = [["node-1", "1"], ["n", "12345"]].map(|row| row.map(str::to_owned).to_vec());
        let text = lay_out(&["NAME", "KEYS"], rows.into_iter());
        assert_eq!(text, "NAME    KEYS\nnode-1  1\nn       12345\n");
    }

    #[test]
    fn sizes_are_short() {
        let shown = [0, 1023, 1024, 1_600_000, 3 << 30].map(size);
        assert_eq!(shown, ["0 B", "1023 B", "1.0 kB", "1.5 MB", "3.0 GB"]);
    }
}
