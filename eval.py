"""Draws the tables and figures of finished runs again from their records alone: on the screen, as Markdown, CSV, PNG and SVG."""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags

from l2sp_tf.cli import run_main

FLAGS = flags.FLAGS
flags.DEFINE_list("workdir", "runs/digits", "One --workdir of train.py, or several.")
flags.DEFINE_multi_enum("table", [], ["2", "3"], "Tables of the paper to draw; without a table or figure, the summary is.")
flags.DEFINE_multi_enum("figure", [], ["1", "2", "3", "4", "path"], "Figures to draw; path is appendix A's.")
flags.DEFINE_bool("all", False, "The summary, and every table and figure for which there are runs.")
flags.DEFINE_string("output", "", "Folder for the files; by default the first workdir.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]}: flags start with --")
    from l2sp_tf import figures, records

    if FLAGS.figure == ["path"]:
        for path in figures.save(figures.figure_path(), FLAGS.output or ".", "figure_path"):
            print(f"wrote {path}")
        return
    found = [record for workdir in FLAGS.workdir for record in records.read_records(workdir)]
    folder = pathlib.Path(FLAGS.output or FLAGS.workdir[0])
    if FLAGS.all:
        written = figures.write_all(found, folder, say=print)
    elif FLAGS.table or FLAGS.figure:
        written = [path for n in FLAGS.table for path in figures.write_table(found, folder, int(n), say=print)]
        written += [path for n in FLAGS.figure for path in figures.write_figure(found, folder, int(n))]
    else:
        written = figures.write_summary(found, folder, say=print)
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
