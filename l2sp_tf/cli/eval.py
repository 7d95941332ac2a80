"""Draws the tables and figures of finished runs again from their records alone: on the screen, as Markdown, CSV, PNG and SVG.

With --report it measures what one model kept of its pre-training, with --predict it names the classes of new images.
"""

import pathlib

from absl import flags

from l2sp_tf.cli import command
from l2sp_tf.cli.command import Section
from l2sp_tf.cli.predict import IMAGES, define_images, write_predictions
from l2sp_tf.files.errors import InputError

FLAGS = flags.FlagValues()

drawn = Section(FLAGS, "Tables and figures")
drawn.list("workdir", "runs/digits", "One --workdir of train.py, or several.")
drawn.multi_enum("table", [], ["1", "2", "3"], "Tables to draw; 1 counts the images of the paper's data sets.")
drawn.multi_enum("figure", [], ["1", "2", "3", "4", "path"], "Figures to draw; path is appendix A's.")
drawn.bool("all", False, "The summary, and every table and figure for which there are runs.")
drawn.string("output", "", "Folder for the files; by default the first workdir, or that of --model.")
drawn.string("data_dir", None, "For --table=1: where TensorFlow Datasets keeps its sets; by default its own folder.")
drawn.enum("protocol", "paper", ["paper", "authors"], "For --table=1: whose splits.")

report = Section(FLAGS, "What a model kept of its pre-training")
report.string(
    "report", None, "Write what one model kept of its pre-training to this HTML file; --workdir is then one run's folder."
)
report.string("anchors", None, "For --report of a --model: the anchors that it started from.")
report.string(
    "source", None, "For --report of a --model: the source task, given as to train.py; without it accuracies are left out."
)
report.string("pretrained", None, "For --report of a --model: the .keras file it started from, if the anchors do not tell.")

predictions = Section(FLAGS, "The classes of new images")
predictions.multi_string(
    "predict",
    [],
    "Name the class of each image in a folder, or of files with commas between, by --model or the run in --workdir.",
)
predictions.bool("skip_bad_images", False, "For --predict: leave out images that cannot be decoded, and say so.")

model = Section(FLAGS, "A model instead of a run")
model.string("model", None, "For --report and --predict instead of a run: the .keras file of a fine-tuned model.")
define_images(FLAGS)


def main(argv=None):
    """Draws, reports or predicts what the words of a command ask for, and returns its exit status."""
    return command.run(evaluate, FLAGS, argv, title=__doc__)


def evaluate(values, arguments):
    """Writes predictions, a report, or else tables and figures."""
    if arguments:
        raise InputError(f"unknown argument {arguments[0]}: flags start with --")
    if values.model is not None and not values.predict and not values.report:
        raise InputError("--model is for --predict or --report: give one of them")
    if values.predict:
        words = [word for text in values.predict for word in ([text] if pathlib.Path(text).exists() else text.split(","))]
        write_predictions(words, pathlib.Path(values.model or values.workdir[0]), values)
    if values.report:
        write_report(values, pathlib.Path(values.report))
    if not values.predict and not values.report:
        draw(values)


def draw(values):
    """Writes the tables and figures that are asked for, or the summary where none is."""
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
    """Writes the page that --report names, and the same for TensorBoard in a folder beside it."""
    from l2sp_tf.experiments.folders import report_of_files, report_of_run

    if (values.model is None) != (values.anchors is None):
        raise InputError("--report needs both --model and --anchors, or the --workdir of one run.")
    if values.model is not None:
        names = ("source", "pretrained", "data_dir", *IMAGES)
        found = report_of_files(values.model, values.anchors, **{name: values[name].value for name in names})
    else:
        found = report_of_run(values.workdir[0])
    folder = path.with_name(f"{path.stem}_tensorboard")
    found.save(path)
    found.log(folder)
    print(f"{found}\nwrote {path}\nwrote {folder}")
