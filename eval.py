"""Draws the tables and figures of finished runs again from their records alone: on the screen, as Markdown, CSV, PNG and SVG.

With --report it measures what one model kept of its pre-training, with --predict it names the classes of new images.
"""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags

from l2sp_tf.cli.command import run_main
from l2sp_tf.files.errors import InputError

FLAGS = flags.FLAGS
flags.DEFINE_list("workdir", "runs/digits", "One --workdir of train.py, or several.")
flags.DEFINE_multi_enum("table", [], ["1", "2", "3"], "Tables to draw; 1 counts the images of the paper's data sets.")
flags.DEFINE_multi_enum("figure", [], ["1", "2", "3", "4", "path"], "Figures to draw; path is appendix A's.")
flags.DEFINE_bool("all", False, "The summary, and every table and figure for which there are runs.")
flags.DEFINE_string("data_dir", None, "For --table=1: where TensorFlow Datasets keeps its sets; by default its own folder.")
flags.DEFINE_enum("protocol", "paper", ["paper", "authors"], "For --table=1: whose splits.")
flags.DEFINE_string(
    "report", None, "Write what one model kept of its pre-training to this HTML file; --workdir is then one run's folder."
)
flags.DEFINE_multi_string(
    "predict",
    [],
    "Name the class of each image in a folder, or of files with commas between, by --model or the run in --workdir.",
)
flags.DEFINE_string("model", None, "For --report and --predict instead of a run: the .keras file of a fine-tuned model.")
flags.DEFINE_string("anchors", None, "For --report of a --model: the anchors that it started from.")
flags.DEFINE_string(
    "source", None, "For --report of a --model: the source task, given as to train.py; without it accuracies are left out."
)
flags.DEFINE_string("pretrained", None, "For --report of a --model: the .keras file it started from, if the anchors do not tell.")
flags.DEFINE_enum("pixels", None, ["rgb", "bgr", "torch"], "For --model: how it sees pixels, where its file does not say.")
flags.DEFINE_list("mean", None, "For --model: R,G,B, subtracted from its images, where its file does not say.")
flags.DEFINE_integer(
    "resize", None, "For --model: side of images before the crop, where its file does not say; by default 256 / 224 of the crop."
)
flags.DEFINE_enum(
    "resize_mode", None, ["squash", "shorter_side"], "For --model: how images are resized, where its file does not say."
)
flags.DEFINE_enum("resize_filter", None, ["area", "bilinear"], "For --model: by what filter, where its file does not say.")
flags.DEFINE_bool("skip_bad_images", False, "For --predict: leave out images that cannot be decoded, and say so.")
flags.DEFINE_string("output", "", "Folder for the files; by default the first workdir, or that of --model.")

IMAGES = ("pixels", "mean", "resize", "resize_mode", "resize_filter")
MOST_ROWS = 20


def main(argv):
    if len(argv) > 1:
        raise InputError(f"unknown argument {argv[1]}: flags start with --")
    if FLAGS.model is not None and not FLAGS.predict and not FLAGS.report:
        raise InputError("--model is for --predict or --report: give one of them")
    if FLAGS.predict:
        write_predictions()
    if FLAGS.report:
        write_report(pathlib.Path(FLAGS.report))
    if FLAGS.predict or FLAGS.report:
        return
    from l2sp_tf.experiments import records
    from l2sp_tf.reports import figures

    folder = pathlib.Path(FLAGS.output or FLAGS.workdir[0])
    parts = [(figures.write_table, int(n)) for n in FLAGS.table if n != "1"]
    parts += [(figures.write_figure, int(n)) for n in FLAGS.figure if n != "path"]
    written = []
    if "1" in FLAGS.table:
        written += write_table_1(folder)
    if "path" in FLAGS.figure:
        written += figures.save(figures.figure_path(), folder, "figure_path")
    if parts or FLAGS.all or not written:
        found = [record for workdir in FLAGS.workdir for record in records.read_records(workdir)]
        for write, number in parts:
            written += write(found, folder, number)
        if not parts:
            written += (figures.write_all if FLAGS.all else figures.write_summary)(found, folder)
    for path in written:
        print(f"wrote {path}")


def write_report(path):
    """Writes the page that --report names, and the same for TensorBoard in a folder beside it."""
    from l2sp_tf.experiments.folders import report_of_files, report_of_run

    if (FLAGS.model is None) != (FLAGS.anchors is None):
        raise InputError("--report needs both --model and --anchors, or the --workdir of one run.")
    if FLAGS.model is not None:
        names = ("source", "pretrained", "data_dir", *IMAGES)
        report = report_of_files(FLAGS.model, FLAGS.anchors, **{name: FLAGS[name].value for name in names})
    else:
        report = report_of_run(FLAGS.workdir[0])
    folder = path.with_name(f"{path.stem}_tensorboard")
    report.save(path)
    report.log(folder)
    print(f"{report}\nwrote {path}\nwrote {folder}")


def write_predictions():
    """Prints the classes of the first images that --predict names, and writes those of all to predictions.csv."""
    from l2sp_tf.experiments.folders import predict_images
    from l2sp_tf.files.writing import write_text

    model = pathlib.Path(FLAGS.model or FLAGS.workdir[0])
    images = [path for text in FLAGS.predict for path in ([text] if pathlib.Path(text).exists() else text.split(","))]
    given = {name: FLAGS[name].value for name in IMAGES}
    predictions = predict_images(model, images, skip_bad_images=FLAGS.skip_bad_images, **given)
    output = pathlib.Path(FLAGS.output or (model.parent if model.is_file() else model))
    path = output if output.suffix == ".csv" else output / "predictions.csv"
    write_text(path, predictions.table().csv())
    print(f"{predictions.table(MOST_ROWS).markdown()}\n\nwrote {path}")


def write_table_1(folder):
    """Counts the images of the paper's data sets, and writes Table 1."""
    from l2sp_tf import data
    from l2sp_tf.reports import tables

    table = tables.table_1(data.table_1_rows(protocol=FLAGS.protocol, data_dir=FLAGS.data_dir))
    print(table.markdown() + "\n")
    return table.save(folder, "table_1")


if __name__ == "__main__":
    run_main(main)
