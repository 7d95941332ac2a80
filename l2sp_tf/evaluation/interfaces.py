"""How the images of a model file are made: as the file says, or the record of its run, or the caller where neither does."""

import pathlib
import warnings

from l2sp_tf.data.pipeline import Preprocessing
from l2sp_tf.experiments import records
from l2sp_tf.files.errors import InputError
from l2sp_tf.models import zoo
from l2sp_tf.models.pixels import Interface, PixelFormat, three_numbers

# The squashed images of section 4.1, whose crop is 224 of 256.
USUAL = {"resize_mode": "squash", "resize_filter": "area"}


def interface_at(path, model, **given):
    """The `Interface` of a `.keras` file.

    A file that a run left says it; for one of an earlier version the `run.json` beside it does. Where neither is there, it is
    made of what is given, and one warning tells what had to be assumed.

    Args:
        path: of the file.
        model: what `models.load_model` read from it.
        given: any of `pixels` (a `PixelFormat` or a name), `mean` (three numbers), `resize`, `resize_mode` and
            `resize_filter`; None for what was not given.

    Raises:
        InputError: the file is damaged, contradicts what is given, or leaves its pixel format open.
    """
    if not given.keys() <= {"pixels", "mean", "resize", *USUAL}:
        raise TypeError(f"interface_at takes pixels, mean, resize, {', '.join(USUAL)}, not {', '.join(given)}")
    given = {name: value for name, value in given.items() if value is not None}
    crop = _side(model)
    known = zoo.stored_interface(path) or _of_record(pathlib.Path(path).with_name("run.json"))
    if known is None:
        return _made_of(path, crop, given)
    if known.crop != crop:
        raise InputError(f"{path} says that it sees crops of {known.crop} pixels, but it takes {crop}: use another copy.")
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


def preprocessing_for(interface):
    """The `Preprocessing` by which images are made for a model when it is tested."""
    names = ("resize", "resize_mode", "resize_filter", "crop", "pixels")
    return Preprocessing(**{name: getattr(interface, name) for name in names})


def _side(model):
    """The height and width of the images that a model takes.

    Raises:
        InputError: it takes no square images of a fixed size.
    """
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 4 or not isinstance(shape[1], int) or shape[1:] != (shape[1], shape[1], 3):
        raise InputError(f"The model {model.name!r} takes inputs of the shape {shape}: give one of square images [b, n, n, 3].")
    return shape[1]


def _of_record(path):
    """The `Interface` that the record of a run tells, or None where there is none."""
    if not path.is_file():
        return None
    record = records.read_record(path)
    settings = record["settings"]
    recipe, pixels = settings.get("recipe"), settings.get("pixels")
    if not isinstance(recipe, dict) or not isinstance(pixels, dict):
        return None
    what = f"{path} does not tell how images are made"
    try:
        images = {name: recipe[name] for name in ("resize", "crop")}
        images |= {name: recipe.get(name, usual) for name, usual in {**USUAL, "crops": 1, "mean": "training"}.items()}
        return Interface(PixelFormat(**pixels), **images, classes=record.get("classes"))
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{what} ({str(error)[:300]}): remove it and run its run again.") from error


def _made_of(path, crop, given):
    """The `Interface` of a file that says at most how its weights see pixels."""
    pixels = zoo.pixels_of(path, given.get("pixels"))
    if "mean" in given:
        if zoo.stored_pixels(path) is not None and pixels.mean not in (None, three_numbers("mean", given["mean"])):
            mean, found = _said(given["mean"]), _said(pixels.mean)
            raise InputError(f"mean is {mean}, but {path} was trained with {found}: leave --mean out.")
        pixels = pixels.with_mean(given["mean"])
    images = {"resize": round(crop * 256 / 224), **USUAL}
    assumed = {name: value for name, value in images.items() if name not in given}
    if assumed:
        listed = ", ".join(f"--{name}={value}" for name, value in assumed.items())
        warnings.warn(f"{path} does not say how its images were made: {listed} is assumed.", stacklevel=3)
    images |= {name: given[name] for name in images if name in given}
    return Interface(pixels, **images, crop=crop)


def _said(value):
    """A value as its flag takes it."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
