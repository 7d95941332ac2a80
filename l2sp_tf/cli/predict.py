"""Names the class of each image with a fine-tuned model: the first on the screen, all of them in predictions.csv.

Usage: python -m l2sp_tf.cli.predict [flags] IMAGE_OR_FOLDER...
"""

import pathlib

from absl import flags

from l2sp_tf.cli import command
from l2sp_tf.cli.command import Section
from l2sp_tf.files.errors import InputError

IMAGES = ("pixels", "mean", "resize", "resize_mode", "resize_filter")
MOST_ROWS = 20


def define_images(values):
    """Defines the flags that say how a model's images are made, for this command and `eval.py`."""
    images = Section(values, "How the images of a --model are made, if its file does not say")
    images.enum("pixels", None, ["rgb", "bgr", "torch", "raw", "tf"], "How the model sees pixels.")
    images.list("mean", None, "R,G,B: what to subtract from the images.")
    images.integer("resize", None, "Side of images before the crop; by default 256 / 224 of the crop.")
    images.enum("resize_mode", None, ["squash", "shorter_side"], "Squash both sides to --resize, or keep the aspect ratio.")
    images.enum("resize_filter", None, ["area", "bilinear"], "Average areas, or interpolate.")


FLAGS = flags.FlagValues()

own = Section(FLAGS, "The model, and where its answers go")
own.string("model", None, "The .keras file of a fine-tuned model.")
own.string("workdir", None, "The folder of a run, instead of --model.")
own.string("output", "", "A folder, or a path that ends in .csv; by default the folder of the model.")
own.bool("skip_bad_images", False, "Skip and report images that cannot be decoded.")
define_images(FLAGS)


def main(argv=None):
    """Predicts as the command line says, and returns the exit status."""
    return command.run(predict, FLAGS, argv, title=__doc__)


def predict(values, images):
    """Checks that there are images and one model, and writes the predictions."""
    if not images:
        raise InputError("No image is named: give image files, or folders of them.")
    if (values.model is None) == (values.workdir is None):
        raise InputError("Give either --model, a .keras file, or --workdir, the folder of a run.")
    write_predictions(images, pathlib.Path(values.model or values.workdir), values)


def write_predictions(images, model, values):
    """Writes the class of every image to predictions.csv, and prints those of the first.

    Args:
        images: a list of files and folders.
        model: the path of a `.keras` file, or of the folder of a run.
        values: parsed flags, with `output`, `skip_bad_images` and those of `define_images`.
    """
    from l2sp_tf.experiments.folders import predict_images
    from l2sp_tf.files.writing import write_text

    given = {name: values[name].value for name in IMAGES}
    predictions = predict_images(model, images, skip_bad_images=values.skip_bad_images, **given)
    output = pathlib.Path(values.output or (model.parent if model.is_file() else model))
    path = output if output.suffix == ".csv" else output / "predictions.csv"
    write_text(path, predictions.table().csv())
    print(f"{predictions.table(MOST_ROWS).markdown()}\n\nwrote {path}")


if __name__ == "__main__":
    raise SystemExit(main())
