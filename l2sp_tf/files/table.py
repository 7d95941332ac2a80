"""A table of text, written as Markdown and as CSV."""

import csv
import io
import pathlib
import typing

from l2sp_tf.files.writing import write_text


class Table(typing.NamedTuple):
    """Columns, rows of text, and notes below."""

    columns: tuple
    rows: list
    notes: str = ""

    def markdown(self):
        """Returns the table in Markdown with aligned columns, the notes in a paragraph below."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
        text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([*text, "", self.notes] if self.notes else text)

    def csv(self):
        """Returns the table as comma-separated values, without the notes."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def save(self, folder, name):
        """Writes `name`.md and `name`.csv to a folder, and returns their paths.

        Raises:
            OSError: the folder cannot be written.
        """
        paths = [pathlib.Path(folder) / f"{name}.{ending}" for ending in ("md", "csv")]
        write_text(paths[0], self.markdown() + "\n")
        write_text(paths[1], self.csv())
        return paths
