"""Prepares data sets of Table 1, or others of TensorFlow Datasets, for --source and --target of train.py.

Usage: python prepare.py [flags] NAME...
"""

from absl import flags

from l2sp_tf.cli import command
from l2sp_tf.cli.command import Section
from l2sp_tf.files.errors import InputError

FLAGS = flags.FlagValues()

own = Section(FLAGS, "Flags")
own.string("data_dir", None, "Where TensorFlow Datasets keeps its sets; by default its own folder.")
own.string("manual_dir", None, "Where files lie that were downloaded by hand; by default downloads/manual/NAME there.")
own.bool("checksums", True, "Compare the checksums of Caltech 256 and MIT Indoors 67 (of others always).")


def main(argv=None):
    """Prepares the data sets that the words of a command name, and returns its exit status."""
    return command.run(prepare, FLAGS, argv, title=__doc__)


def prepare(values, names):
    """Prepares each data set that is named."""
    if not names:
        raise InputError("No data set is named: give the names of data sets: stanford_dogs, caltech256, mit_indoors67, ...")
    from l2sp_tf.data.preparation import prepare_tfds

    for name in names:
        prepare_tfds(name, data_dir=values.data_dir, manual_dir=values.manual_dir, checksums=values.checksums)
