"""How a network sees pixels: the order of its channels, their scale and mean, a property of its weights."""

import dataclasses
import json
import math

from l2sp_tf.errors import InputError
from l2sp_tf.reading import parse_json


@dataclasses.dataclass(frozen=True)
class PixelFormat:
    """What the weights of a network were trained on: (x - mean) * scale of RGB pixels x from 0 to 255, in some order.

    Attributes:
        channel_order: "rgb" or "bgr", the order in which the network gets the channels.
        scale: three factors in RGB order.
        mean: of the training images, three numbers from 0 to 255 in RGB order; None where it is not known.

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
        scale = "" if self.scale == (1.0, 1.0, 1.0) else f", scale {_listed(self.scale)}"
        return f"{self.channel_order}{scale}, mean {'not known' if self.mean is None else _listed(self.mean)}"

    def agrees_with(self, other):
        """Whether order and scale are the same; the mean that is subtracted is a choice of the run."""
        return (self.channel_order, self.scale) == (other.channel_order, other.scale)

    def with_mean(self, mean):
        """A copy with another mean."""
        return dataclasses.replace(self, mean=mean)

    def to_json(self):
        """The text that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text, where):
        """Reads what `to_json` wrote.

        Args:
            text: the text.
            where: the file it was found in, for the message.

        Raises:
            InputError: it is something else.
        """
        what = f"The pixel format in {where} is damaged"
        values = parse_json(text, what)
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:  # InputError is a ValueError
            raise InputError(f"{what} ({str(error)[:300]}): use another copy.") from error


def named_pixels(name):
    """The pixel format called "rgb", "bgr" or "torch"; a `PixelFormat` is returned as it is.

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(name, PixelFormat):
        return name
    if name not in PIXELS:
        raise InputError(f"The pixel format {name!r} is unknown: give one of {', '.join(PIXELS)}.")
    return PIXELS[name]


def three_numbers(name, values):
    """Three finite floats as a tuple.

    Raises:
        InputError: they are something else; the message calls them `name`.
    """
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if isinstance(values, str) or len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise InputError(f"{name} is {values!r}: give three finite numbers, for red, green and blue")
    return numbers


def _listed(numbers):
    return "/".join(f"{number:.4g}" for number in numbers)


PIXELS = {
    "rgb": PixelFormat(),  # TF-slim, and what this project trains from scratch
    "bgr": PixelFormat("bgr", mean=(123.68, 116.779, 103.939)),  # ImageNet ResNets of keras.applications
    "torch": PixelFormat(  # torchvision divides by 255, and by the standard deviations of ImageNet
        scale=tuple(1 / (255 * deviation) for deviation in (0.229, 0.224, 0.225)),
        mean=tuple(255 * mean for mean in (0.485, 0.456, 0.406)),
    ),
}
