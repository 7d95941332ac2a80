"""Prepares data sets of Table 1, or others of TensorFlow Datasets, for --source and --target of train.py.

Usage: python prepare.py [flags] NAME...
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags

from l2sp_tf.cli.command import run_main

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Where TensorFlow Datasets keeps its sets; by default its own folder.")
flags.DEFINE_string("manual_dir", None, "Where files lie that were downloaded by hand; by default downloads/manual/NAME there.")
flags.DEFINE_bool("checksums", True, "Compare the checksums of Caltech 256 and MIT Indoors 67 (of others always).")


GROUPS = {"Flags": ("data_dir", "manual_dir", "checksums")}


def main(argv):
    """Prepares each data set that is named."""
    from l2sp_tf.files.errors import InputError

    if len(argv) < 2:
        raise InputError("No data set is named: give the names of data sets: stanford_dogs, caltech256, mit_indoors67, ...")
    from l2sp_tf.data.preparation import prepare_tfds

    for name in argv[1:]:
        prepare_tfds(name, data_dir=FLAGS.data_dir, manual_dir=FLAGS.manual_dir, checksums=FLAGS.checksums)


if __name__ == "__main__":
    run_main(main, GROUPS)
