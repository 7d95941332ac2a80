"""Reads the folder of a run: its model, its image settings, its predictions on new images and its retention report."""

import pathlib
import warnings
from collections.abc import Iterable
from typing import Any

import keras

from l2sp_tf.data.datasets import load_dataset
from l2sp_tf.data.pipeline import prepare, preprocessing_for
from l2sp_tf.evaluation.predictions import Predictions, predict
from l2sp_tf.evaluation.report import RetentionReport, distances, retention_report
from l2sp_tf.experiments.records import diverged, read_record
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.types import Path
from l2sp_tf.models import keras_files, zoo
from l2sp_tf.models.pixels import Interface, PixelFormat, three_numbers
from l2sp_tf.penalties.anchors import Anchors
from l2sp_tf.training.recipe import Recipe

# Section 4.1 squashes images to 256 and takes crops of 224.
USUAL = {"resize_mode": "squash", "resize_filter": "area"}


def interface_at(path, model, **given):
    """Returns the `Interface` of a `.keras` file.

    A run stores it in the file; an earlier version stored it in the `run.json` beside it. Without either, it is made from
    the given values, and one warning lists the assumed ones.

    Args:
        path: the file.
        model: the model that `keras_files.load_model` read from it.
        given: any of `pixels` (a `PixelFormat` or a name), `mean` (three numbers), `resize`, `resize_mode` and
            `resize_filter`; None counts as missing.

    Raises:
        InputError: the file is damaged, contradicts a given value, or has no known pixel format.
    """
    if not given.keys() <= {"pixels", "mean", "resize", *USUAL}:
        raise TypeError(f"interface_at takes pixels, mean, resize, {', '.join(USUAL)}, not {', '.join(given)}")
    given = {name: value for name, value in given.items() if value is not None}
    crop = _side(model)
    known = keras_files.stored_interface(path) or _of_record(pathlib.Path(path).with_name("run.json"))
    if known is None:
        return _made_of(path, crop, given)
    if known.crop != crop:
        raise InputError(f"{path} names crops of {known.crop} pixels, but its network takes {crop}: use another copy.")
    for name, value in given.items():
        found = getattr(known, name, None)
        agrees = value == found
        if name == "pixels":
            agrees = zoo.pixels_of(path, value).agrees_with(found)
        elif name == "mean":
            found = known.pixels.mean
            agrees = found is not None and three_numbers("mean", value) == found
        if not agrees:
            raise InputError(f"{name} is {_said(value)}, but {path} was trained with {_said(found)}: leave --{name} out.")
    return known


def _side(model):
    """Returns the side of the square images that a model takes.

    Raises:
        InputError: its input is not square images [b, n, n, 3] of a fixed size.
    """
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 4 or not isinstance(shape[1], int) or shape[1:] != (shape[1], shape[1], 3):
        raise InputError(f"The model {model.name!r} takes inputs of the shape {shape}: give one of square images [b, n, n, 3].")
    return shape[1]


def _of_record(path):
    """Reads the `Interface` from the record of a run; None if there is none."""
    if not path.is_file():
        return None
    record = read_record(path)
    settings = record["settings"]
    recipe, pixels = settings.get("recipe"), settings.get("pixels")
    if not isinstance(recipe, dict) or not isinstance(pixels, dict):
        return None
    what = f"{path} does not say how images are made"
    try:
        images = {name: recipe[name] for name in ("resize", "crop")}
        images |= {name: recipe.get(name, usual) for name, usual in {**USUAL, "crops": 1, "mean": "training"}.items()}
        return Interface(PixelFormat(**pixels), **images, classes=record.get("classes"))
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{what} ({str(error)[:300]}): remove it and repeat the run.") from error


def _made_of(path, crop, given):
    """Makes the `Interface` of a file that stores a pixel format at most."""
    pixels = zoo.pixels_of(path, given.get("pixels"))
    if "mean" in given:
        if keras_files.stored_pixels(path) is not None and pixels.mean not in (None, three_numbers("mean", given["mean"])):
            mean, found = _said(given["mean"]), _said(pixels.mean)
            raise InputError(f"mean is {mean}, but {path} was trained with {found}: leave --mean out.")
        pixels = pixels.with_mean(given["mean"])
    images = {"resize": round(crop * 256 / 224), **USUAL}
    assumed = {name: value for name, value in images.items() if name not in given}
    if assumed:
        listed = ", ".join(f"--{name}={value}" for name, value in assumed.items())
        warnings.warn(f"{path} does not say how its images were made: assuming {listed}.", stacklevel=3)
    images |= {name: given[name] for name in images if name in given}
    return Interface(pixels, **images, crop=crop)


def _said(value):
    """Formats a value as its flag takes it."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def model_file(folder):
    """Returns the path of the model in the folder of a run.

    Raises:
        InputError: there is none; the message gives the reason, or names a run in a subfolder.
    """
    path = pathlib.Path(folder) / "model.keras"
    if path.is_file():
        return path
    if (path.parent / "run.json").is_file():
        record = read_record(path.parent / "run.json")
        if diverged(record):
            reason = str(record["results"]["diverged"]).rstrip(".")
            raise InputError(f"The run in {folder} diverged and left no model ({reason}): give the folder of another run.")
        raise InputError(f"The run in {folder} kept no model.keras: run it with --save_models, in another --workdir.")
    runs = sorted(path.parent.glob("runs/*/model.keras"))
    hint = f"one of the runs under it, such as {runs[0].parent}" if runs else "the folder of a run with its model"
    raise InputError(f"There is no model.keras in {folder}: give {hint}.")


def report_of_run(folder):
    """Reports on a run of `train.py` from its folder; accuracies and R² come from its record.

    Raises:
        InputError: the folder has no `run.json`, `model.keras` or `anchors.safetensors`, or its run diverged.
    """
    folder = pathlib.Path(folder)
    if not (folder / "run.json").is_file():
        runs = sorted(path.parent.name for path in folder.glob("runs/*/run.json"))
        hint = f"one of the runs under it, such as {folder / 'runs' / runs[0]}" if runs else "the folder of a finished run"
        raise InputError(f"There is no run.json in {folder}: give {hint}.")
    record = read_record(folder / "run.json")
    layers, new = distances(keras_files.load_model(model_file(folder)), Anchors.load(folder / "anchors.safetensors"))
    settings, results = record["settings"], record["results"]
    facts = {
        "penalty": f"{settings['penalty']}, alpha {settings['alpha']:g}, beta {settings['beta']:g}",
        "seed": str(settings["seed"]),
        "target task": settings["target"],
        "target accuracy": f"{results['accuracy']:.1%} of {results['total']} images",
    }
    title = f"{settings['penalty']} on {settings['target']}"
    return RetentionReport(title, facts, layers, new, results.get("source"), settings["source"], results.get("r2", {}))


def report_of_files(model, anchors, *, source=None, source_classes=None, pretrained=None, data_dir=None, say=str, **given):
    """Reports on a `.keras` file and its anchors; source images are prepared by the file's `Interface`.

    Args:
        model, anchors: the paths.
        source, source_classes: the source task and its classes as `load_dataset` takes them, or None.
        pretrained: the path of the `.keras` file that training started from, if the anchors cannot restore it.
        data_dir: the folder of TensorFlow Datasets.
        say: called with a line on how the source's images are read, if there is something to say.
        given: image settings that the file lacks, as `interface_at` takes them.

    Raises:
        InputError: a file is missing or damaged, or the files do not fit together.
    """
    tuned, w0 = keras_files.load_model(model), Anchors.load(anchors)
    task, crops = None, 1
    if source is not None:
        interface = interface_at(model, tuned, **given)
        dataset, crops = load_dataset(source, classes=source_classes, data_dir=data_dir), interface.crops
        # the file's mean may be that of the target's images: apply the same choice of mean to the source
        mean = Recipe(mean=interface.mean).mean_for(dataset.name, interface.pixels)
        if remarks := dataset.remarks():
            say(remarks)
        task = prepare(dataset, preprocessing_for(interface), mean=mean)
    start = None if pretrained is None else keras_files.load_model(pretrained)
    return retention_report(tuned, w0, source=task, pretrained=start, title=pathlib.Path(model).name, crops=crops)


def predict_images(
    model: keras.Model | Path,
    images: Path | Iterable[Path],
    interface: Interface | None = None,
    *,
    batch_size: int = 64,
    skip_bad_images: bool = False,
    **given: Any,
) -> Predictions:
    """Predicts the class of each image and its probability, with the crops and scores of `evaluate`.

    Args:
        model: the path of a `.keras` file or of a run's folder with one, or a Keras classifier with one output.
        images: a folder, searched recursively, or a list of JPEG, PNG, GIF, BMP or WebP files.
        interface: the image settings and the class of each output, such as the `interface` of a `Run`; by default
            a path's own. Unnamed outputs are called by their number.
        batch_size: crops per step.
        skip_bad_images: skip undecodable images with a warning instead of raising.
        given: image settings that the file lacks, as `interface_at` takes them.

    Returns:
        `Predictions`; for a folder, in the order of the paths.

    Raises:
        InputError: the model's file is missing or damaged, or lacks image settings; there is no image, or one
            cannot be decoded; the interface does not fit the model.
    """
    if not isinstance(model, keras.Model):
        model, interface = _read(pathlib.Path(model), interface, given)
    return predict(model, images, interface, batch_size=batch_size, skip_bad_images=skip_bad_images)


def _read(path, interface, given):
    """Reads the model and the `Interface` of a `.keras` file or of a run's folder."""
    if path.is_dir():
        path = model_file(path)
    model = keras_files.load_model(path)
    interface = interface_at(path, model, **given) if interface is None else interface
    if interface.pixels.mean is None:
        raise InputError(f"{path} does not say which mean is subtracted from its images: give --mean=R,G,B.")
    if interface.classes is None:
        warnings.warn(f"{path} does not name its classes: they are called by the number of their output.", stacklevel=3)
    return model, interface
