"""Prepares data sets of Table 1 or of TensorFlow Datasets, for --source and --target of train.py.

Usage: python prepare.py [flags] NAME...
"""

from absl import flags

from l2sp_tf.cli import command
from l2sp_tf.cli.command import Section
from l2sp_tf.files.errors import InputError

FLAGS = flags.FlagValues()

own = Section(FLAGS, "Flags")
own.string("data_dir", None, "Folder where TensorFlow Datasets keeps its data sets; by default its own.")
own.string("manual_dir", None, "Folder of files that you downloaded by hand; by default downloads/manual/NAME in --data_dir.")
own.bool("checksums", True, "Compare the checksums of Caltech 256 and MIT Indoors 67; those of others are always compared.")


def main(argv=None):
    """Prepares the data sets that the command line names, and returns the exit status."""
    return command.run(prepare, FLAGS, argv, title=__doc__)


def prepare(values, names):
    """Prepares each named data set."""
    if not names:
        raise InputError("No data set is named: give names such as stanford_dogs, caltech256 or mit_indoors67.")
    from l2sp_tf.data.preparation import prepare_tfds

    for name in names:
        prepare_tfds(name, data_dir=values.data_dir, manual_dir=values.manual_dir, checksums=values.checksums)
