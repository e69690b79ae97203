//! Tables of text, without borders, so that `awk` and `cut` can read them.

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

/// Lines of a table, each ended; numbers (what begins with a digit in every row) are aligned to the right.
pub(crate) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let rows: Vec<Vec<String>> = rows.into_iter().collect();
    let numeric: Vec<bool> = (0..header.len())
        .map(|column| {
            !rows.is_empty()
                && rows.iter().all(|row| row[column].starts_with(|c: char| c.is_ascii_digit() || c == '-'))
        })
        .collect();
    let aligned = |(column, text): (usize, &str)| {
        let alignment = if numeric[column] { CellAlignment::Right } else { CellAlignment::Left };
        Cell::new(text).set_alignment(alignment)
    };
    let mut table = Table::new();
    // A pipe has no width, and a table that is cut at a guessed one loses data.
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().copied().enumerate().map(aligned));
    for row in &rows {
        table.add_row(row.iter().map(String::as_str).enumerate().map(aligned));
    }
    if let Some(first) = table.column_mut(0) {
        first.set_padding((0, 1));
    }
    let mut text = String::new();
    for line in table.to_string().lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Bytes in the unit that leaves one to four digits before the point.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `1 answer`, `2 answers`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_nothing_trails() {
        let rows = vec![vec!["a".to_owned(), "1".to_owned()], vec!["longer".to_owned(), "20".to_owned()]];
        assert_eq!(table(&["NAME", "N"], rows), "NAME     N\na        1\nlonger  20\n");
    }

    #[test]
    fn an_empty_table_is_its_header() {
        assert_eq!(table(&["NAME"], Vec::new()), "NAME\n");
    }

    #[test]
    fn sizes_keep_their_unit_readable() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1024), "1.0 KiB");
        assert_eq!(bytes(395 << 20), "395.0 MiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
    }
}
