"""Inputs and outputs of a network: its pixel format, how its images are made, and the class of each output."""

import dataclasses
import json
import math

from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import MAX_PIXELS, parse_json


@dataclasses.dataclass(frozen=True)
class PixelFormat:
    """The pixel format that a network was trained on: (x - mean) * scale of RGB pixels x from 0 to 255, in some channel order.

    Attributes:
        channel_order: "rgb" or "bgr", the order in which the network gets the channels.
        scale: three factors in RGB order.
        mean: the mean of the training images, three numbers from 0 to 255 in RGB order; None if unknown.

    Raises:
        InputError: an attribute is out of its range.
    """

    channel_order: str = "rgb"
    scale: tuple = (1.0, 1.0, 1.0)
    mean: tuple | None = None

    def __post_init__(self):
        if self.channel_order not in ("rgb", "bgr"):
            raise InputError(f"channel_order is {self.channel_order!r}: it must be rgb or bgr")
        object.__setattr__(self, "scale", three_numbers("scale", self.scale))
        if not all(self.scale):
            raise InputError(f"scale is {self.scale}: no factor may be 0")
        if self.mean is not None:
            object.__setattr__(self, "mean", three_numbers("mean", self.mean))

    def __str__(self):
        if self.is_raw:
            return "raw"
        scale = "" if self.scale == (1.0, 1.0, 1.0) else f", scale {_listed(self.scale)}"
        return f"{self.channel_order}{scale}, mean {'not known' if self.mean is None else _listed(self.mean)}"

    def agrees_with(self, other):
        """Whether order and scale are equal; the mean may differ, because each run chooses which mean it subtracts."""
        return (self.channel_order, self.scale) == (other.channel_order, other.scale)

    @property
    def is_raw(self):
        """Whether the network sees pixels from 0 to 255 as they are: it rescales them itself, so no mean is subtracted."""
        return self.scale == (1.0, 1.0, 1.0) and self.mean == (0.0, 0.0, 0.0)

    def with_mean(self, mean):
        """Returns a copy with another mean."""
        return dataclasses.replace(self, mean=mean)

    def plain(self):
        """Returns the attributes as a dict of JSON values."""
        return dataclasses.asdict(self)

    def to_json(self):
        """Returns the text that `from_json` reads."""
        return json.dumps(self.plain())

    @classmethod
    def from_json(cls, text, where):
        """Reads a text that `to_json` wrote.

        Args:
            text: the text.
            where: the file that held it, for the message.

        Raises:
            InputError: it is something else.
        """
        return _read(lambda values: cls(**values), text, f"The pixel format in {where} is damaged")


@dataclasses.dataclass(frozen=True)
class Interface:
    """How a network's images are made, and the class of each output: what its answers depend on besides its weights.

    Attributes:
        pixels: a `PixelFormat`, with the mean to subtract.
        resize, resize_mode, resize_filter, crop: as in `l2sp_tf.data.Preprocessing`.
        crops: 1 (central) or 10 for each image; the probabilities of ten are averaged.
        mean: the source of the mean, as in a `Recipe`; images of another task get their mean in the same way.
        classes: the names of the classes in the order of the outputs, or None if unknown.

    Raises:
        InputError: an attribute is out of its range.
    """

    pixels: PixelFormat
    resize: int
    resize_mode: str
    resize_filter: str
    crop: int
    crops: int = 1
    mean: str | tuple = "training"
    classes: tuple | None = None

    def __post_init__(self):
        for name in ("resize", "crop", "crops"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value**2 <= MAX_PIXELS:
                raise InputError(f"{name} is {str(value)[:30]}: give a whole number from 1 to {math.isqrt(MAX_PIXELS)}")
        for name in ("resize_mode", "resize_filter"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} is {str(getattr(self, name))[:30]}: give a name")
        if not isinstance(self.mean, str):
            object.__setattr__(self, "mean", three_numbers("mean", self.mean))
        if self.classes is not None:
            classes = tuple(self.classes) if isinstance(self.classes, (list, tuple)) else ()
            if not classes or not all(isinstance(name, str) for name in classes):
                raise InputError(f"classes is {str(self.classes)[:30]}: give a list of names")
            object.__setattr__(self, "classes", classes)

    def to_json(self):
        """Returns the text that `from_json` reads, without the pixel format."""
        values = dataclasses.asdict(self)
        del values["pixels"]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text, pixels, where):
        """Reads a text that `to_json` wrote; `where` is the file that held it, for the message.

        Raises:
            InputError: it is something else.
        """
        return _read(lambda values: cls(pixels, **values), text, f"What {where} says of its images and classes is damaged")


def named_pixels(name):
    """Returns the pixel format called "rgb", "bgr", "torch", "raw" or "tf", or a given `PixelFormat` unchanged.

    Raises:
        InputError: the name is unknown.
    """
    if isinstance(name, PixelFormat):
        return name
    if name not in PIXELS:
        raise InputError(f"The pixel format {name!r} is unknown: give one of {', '.join(PIXELS)}.")
    return PIXELS[name]


def three_numbers(name, values):
    """Returns three finite floats as a tuple.

    Raises:
        InputError: the values are something else; the message calls them `name`.
    """
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if isinstance(values, str) or len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise InputError(f"{name} is {values!r}: give three finite numbers, for red, green and blue")
    return numbers


def _read(make, text, what):
    """Calls `make` on the values in a JSON text; `what` begins the sentence of an error."""
    values = parse_json(text, what)
    try:
        return make(values)
    except (TypeError, ValueError) as error:  # InputError is a ValueError
        raise InputError(f"{what} ({str(error)[:300]}): use another copy.") from error


def _listed(numbers):
    return "/".join(f"{number:.4g}" for number in numbers)


PIXELS = {
    "rgb": PixelFormat(),  # TF-slim, and networks that this project trains from scratch
    "bgr": PixelFormat("bgr", mean=(123.68, 116.779, 103.939)),  # ImageNet ResNets of keras.applications
    "torch": PixelFormat(  # torchvision divides by 255, and by the standard deviations of ImageNet
        scale=tuple(1 / (255 * deviation) for deviation in (0.229, 0.224, 0.225)),
        mean=tuple(255 * mean for mean in (0.485, 0.456, 0.406)),
    ),
    "raw": PixelFormat(mean=(0, 0, 0)),  # networks that rescale pixels themselves: EfficientNet, ConvNeXt, MobileNetV3
    "tf": PixelFormat(scale=(1 / 127.5,) * 3, mean=(127.5,) * 3),  # from -1 to 1: MobileNetV2, Inception, Xception, NASNet
}
