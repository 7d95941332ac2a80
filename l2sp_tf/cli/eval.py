"""Draws tables and figures of finished runs from their records alone: on the screen, as Markdown, CSV, PNG and SVG.

With --report, measures what one model kept of its pre-training. With --predict, names the classes of new images.
"""

import pathlib

from absl import flags

from l2sp_tf.cli import command
from l2sp_tf.cli.command import Section
from l2sp_tf.cli.predict import IMAGES, define_images, write_predictions
from l2sp_tf.files.errors import InputError

FLAGS = flags.FlagValues()

drawn = Section(FLAGS, "Tables and figures")
drawn.list("workdir", "runs/digits", "One or several --workdir of train.py.")
drawn.multi_enum("table", [], ["1", "2", "3"], "Tables to draw. Table 1 counts the images of the paper's data sets.")
drawn.multi_enum("figure", [], ["1", "2", "3", "4", "path"], "Figures to draw; path is that of appendix A.")
drawn.bool("all", False, "Draw the summary, and every table and figure that has runs.")
drawn.string("output", "", "Folder for the files; by default the first --workdir, or the folder of --model.")
drawn.string(
    "data_dir", None, "Folder where TensorFlow Datasets keeps its data sets, for --table=1 and --source; by default its own."
)
drawn.enum("protocol", "paper", ["paper", "authors"], "The protocol whose splits --table=1 counts.")

report = Section(FLAGS, "What a model kept of its pre-training")
report.string("report", None, "Write a report to this HTML file, on --model or on the run in --workdir.")
report.string("anchors", None, "For a --model: the file of the anchors that it started from.")
report.string("source", None, "For a --model: the source task, named as for train.py. Without it, accuracies are left out.")
report.string("source_classes", None, "For a --model: the classes of its outputs before, as for train.py.")
report.string("pretrained", None, "For a --model: the .keras file that it started from, if the anchors do not determine it.")

predictions = Section(FLAGS, "The classes of new images")
predictions.multi_string(
    "predict",
    [],
    "Name the class of each image in a folder, or of files with commas between, with --model or the run in --workdir.",
)
predictions.bool("skip_bad_images", False, "Skip and report images that cannot be decoded.")

model = Section(FLAGS, "A model instead of a run")
model.string("model", None, "The .keras file of a fine-tuned model, for --report or --predict.")
define_images(FLAGS)


def main(argv=None):
    """Draws, reports or predicts as the command line says, and returns the exit status."""
    return command.run(evaluate, FLAGS, argv, title=__doc__)


def evaluate(values, arguments):
    """Writes predictions and a report if asked for, else tables and figures."""
    if arguments:
        raise InputError(f"The argument {arguments[0]} is unknown: flags start with --.")
    if values.model is not None and not values.predict and not values.report:
        raise InputError("--model is for --predict or --report: give one of them.")
    if values.predict:
        words = [word for text in values.predict for word in ([text] if pathlib.Path(text).exists() else text.split(","))]
        write_predictions(words, pathlib.Path(values.model or values.workdir[0]), values)
    if values.report:
        write_report(values, pathlib.Path(values.report))
    if not values.predict and not values.report:
        draw(values)


def draw(values):
    """Writes the tables and figures that the flags name; if they name none, the summary."""
    from l2sp_tf.experiments.records import read_records
    from l2sp_tf.reports import figures

    folder = pathlib.Path(values.output or values.workdir[0])
    parts = [(figures.write_table, int(n)) for n in values.table if n != "1"]
    parts += [(figures.write_figure, int(n)) for n in values.figure if n != "path"]
    written = []
    if "1" in values.table:
        written += write_table_1(values, folder)
    if "path" in values.figure:
        written += figures.save(figures.figure_path(), folder, "figure_path")
    if parts or values.all or not written:
        found = [record for workdir in values.workdir for record in read_records(workdir)]
        for write, number in parts:
            written += write(found, folder, number)
        if not parts:
            written += (figures.write_all if values.all else figures.write_summary)(found, folder)
    for path in written:
        print(f"wrote {path}")


def write_table_1(values, folder):
    """Counts the images of the paper's data sets, and writes Table 1."""
    from l2sp_tf.data.datasets import table_1_rows
    from l2sp_tf.reports import tables

    table = tables.table_1(table_1_rows(protocol=values.protocol, data_dir=values.data_dir))
    print(table.markdown() + "\n")
    return table.save(folder, "table_1")


def write_report(values, path):
    """Writes the HTML page, and the same data for TensorBoard to a folder beside it."""
    if (values.model is None) != (values.anchors is None):
        raise InputError("--report needs both --model and --anchors, or the --workdir of one run.")
    from l2sp_tf.experiments.folders import report_of_files, report_of_run  # slow to import

    if values.model is not None:
        names = ("source", "source_classes", "pretrained", "data_dir", *IMAGES)
        found = report_of_files(values.model, values.anchors, say=print, **{name: values[name].value for name in names})
    else:
        found = report_of_run(values.workdir[0])
    folder = path.with_name(f"{path.stem}_tensorboard")
    found.save(path)
    found.log(folder)
    print(f"{found}\nwrote {path}\nwrote {folder}")
