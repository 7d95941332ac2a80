"""Draws the table of finished runs again from their records: on the screen, as Markdown, CSV and PNG."""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags

from l2sp_tf.cli import run_main

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "runs/digits", "The --workdir of train.py.")
flags.DEFINE_string("output", "", "Folder for summary.md, summary.csv and summary.png; by default the workdir.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]}: flags start with --")
    from l2sp_tf import records, report

    found = records.read_records(FLAGS.workdir)
    print(report.table(found) + "\n")
    for path in report.write_summary(found, pathlib.Path(FLAGS.output or FLAGS.workdir)):
        print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
