//! Tables for people: columns under their names, numbers to the right.

/// A table.
#[derive(Debug)]
pub(super) struct Table {
    /// Names, and whether the column is text.
    head: Vec<(&'static str, bool)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Columns of text, aligned to the left, are marked with `<` before their name; the others are numbers.
    pub(super) fn new(head: &[&'static str]) -> Self {
        let column = |&name: &&'static str| match name.strip_prefix('<') {
            Some(name) => (name, true),
            None => (name, false),
        };
        Self { head: head.iter().map(column).collect(), rows: Vec::new() }
    }

    /// Adds a row; it must have as many cells as there are columns.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().collect();
        debug_assert_eq!(cells.len(), self.head.len());
        self.rows.push(cells);
    }

    /// Its text, without a line's end at the end.
    pub(super) fn text(&self) -> String {
        let head: Vec<String> = self.head.iter().map(|&(name, _)| name.to_owned()).collect();
        let lines: Vec<&Vec<String>> = std::iter::once(&head).chain(&self.rows).collect();
        let width = |column: usize| {
            lines
                .iter()
                .filter_map(|line| line.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.head.len()).map(width).collect();
        let line = |cells: &Vec<String>| {
            let cells = cells.iter().zip(&widths).enumerate();
            let aligned = cells.map(|(column, (cell, &width))| match self.head[column].1 {
                true => format!("{cell:<width$}"),
                false => format!("{cell:>width$}"),
            });
            aligned.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        lines.into_iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["<SHARD", "BLOCKS"]);
        table.row(["kv-0".to_owned(), "12".to_owned()]);
        table.row(["a-long-name".to_owned(), "1234567".to_owned()]);
        assert_eq!(table.text(), "SHARD         BLOCKS\nkv-0              12\na-long-name  1234567");
    }
}
