"""Section 4.2's numbers: one frozen dataclass, the schedule, and the two protocols."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras

from l2sp_tf.data.pipeline import Preprocessing
from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError
from l2sp_tf.models.inputs import check_inputs, square_side
from l2sp_tf.models.pixels import PixelFormat, three_numbers
from l2sp_tf.penalties.formulas import PENALTIES

# The authors' code publishes these; the paper chooses alpha by cross-validation.
PUBLISHED_ALPHA = {"l2": 1e-4, "l2_sp": 0.1}
LEARNING_RATES = (0.005, 0.01, 0.02)  # section 4.2: cross-validation chooses among them
SOLVERS = ("sgd", "adam")
PENALTY_STEPS = ("gradient", "proximal", "decoupled")
MEANS = ("training", "authors", "weights")
IMAGES = tuple(Preprocessing().plain())  # names of the image settings of a recipe
OF_IMAGES = (*IMAGES, "mean", "crops")
CHOICES = {
    "params": ("all", "kernels"),
    "crops": (1, 10),
    "solver": SOLVERS,
    "penalty_step": PENALTY_STEPS,
    "moving_statistics": ("source", "fresh"),
    "batch_norm": ("batch", "source"),
}
# The means that the authors' code publishes, by the data set's name.
AUTHORS_MEANS = {
    "mit_indoors67": (123.56, 110.05, 93.74),
    "stanford_dogs": (120.40, 115.22, 98.46),
    "caltech256": (140.48, 135.94, 127.61),
    "places365_small": (115.60, 112.52, 102.82),
    "imagenet2012": (123.68, 116.78, 103.94),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of a fine-tuning; the defaults are section 4.2's.

    Attributes:
        iterations: number of SGD steps.
        decay_at: the step after which the rate is divided by 10; None for two thirds of the
            iterations (6000 of 9000).
        learning_rate: the initial rate; the paper uses 0.005, 0.01 or 0.02 by task.
        momentum, batch_size: of SGD.
        alpha: default strengths by the penalty's symbol, for runs that set none.
        beta: strength of L2 on the new layers: a number, or a dict by the penalty's symbol, with 0.01 for others.
        params: "all" (the paper: all the network parameters) or "kernels" (the authors' code).
        images: how images are made, a `Preprocessing`; the network's pixel format replaces its own.
        crops: 1 (central) or 10 of each image when accuracy is measured.
        mean: the mean to subtract from the images of both tasks. "training" is the mean of each task's training images
            (the paper), "authors" the mean that the authors' code has for each data set, and "weights" the mean stored
            with the pre-trained weights; or three numbers in RGB order. None means "training", but "weights" (nothing)
            for a network that rescales pixels itself.
        log_every: steps between two rows of the log; None for a twentieth of the iterations.
        solver: "sgd" (the paper) or "adam" (with Keras' defaults; ignores `momentum`).
        penalty_step: "gradient" (the paper: the penalty is in the loss), "proximal" (`l2sp_tf.Proximal`) or
            "decoupled" (`l2sp_tf.Decoupled`).
        head_bias: the initial value of the new head's biases.
        smoothing: the epsilon added inside the roots of Eqs. (5)-(7), as in the penalties; proximal steps ignore it.
        moving_statistics: "source" for the pre-trained model's batch-norm statistics, or "fresh" for means of 0 and
            variances of 1, unless units are frozen.
        batch_norm_decay: the decay of these statistics in training; None for each layer's own momentum.
        batch_norm: what batch norm normalises by in training: "batch", the statistics of the batch (the paper), or "source",
            the pre-trained model's moving statistics, which then stay as they are (see `keep_statistics`).
        head_steps: steps of a first phase that trains the new head alone, everything else frozen, before the iterations;
            0 for none (the paper). "Linear probing, then fine-tuning" (Kumar et al. 2022, arXiv 2202.10054).
        head_learning_rate: the rate of that phase, which is constant.
        label_smoothing: epsilon from 0 to below 1: the loss is taken to the shares (1 - epsilon) y + epsilon / K, where y is
            one-hot among K classes; 0 for y itself (the paper). Logged numbers are taken to y.

    Raises:
        InputError: a value has another type, is out of its range, or is not one of its choices.
    """

    iterations: int = 9000
    decay_at: int | None = None
    learning_rate: float = 0.01
    momentum: float = 0.9
    batch_size: int = 64
    alpha: dict = dataclasses.field(default_factory=lambda: dict(PUBLISHED_ALPHA))
    beta: float | dict = 0.01
    params: str = "all"
    images: Preprocessing = Preprocessing()
    crops: int = 1
    mean: str | tuple | None = None
    log_every: int | None = None
    solver: str = "sgd"
    penalty_step: str = "gradient"
    head_bias: float = 0.0
    smoothing: float = 0.0
    moving_statistics: str = "source"
    batch_norm_decay: float | None = None
    batch_norm: str = "batch"
    head_steps: int = 0
    head_learning_rate: float = 0.03
    label_smoothing: float = 0.0

    def __post_init__(self):
        for name in ("iterations", "batch_size"):
            self._set(name, fields.whole(name, getattr(self, name)))
        for name in ("decay_at", "log_every"):
            if getattr(self, name) is not None:
                self._set(name, fields.whole(name, getattr(self, name)))
        self._set("learning_rate", fields.number("learning_rate", self.learning_rate, above=0))
        self._set("head_steps", fields.whole("head_steps", self.head_steps, 0))
        self._set("head_learning_rate", fields.number("head_learning_rate", self.head_learning_rate, above=0))
        self._set("label_smoothing", fields.number("label_smoothing", self.label_smoothing, below=1))
        self._set("momentum", fields.number("momentum", self.momentum, below=1))
        self._check_beta()
        self._set("head_bias", fields.number("head_bias", self.head_bias, least=-math.inf))
        self._set("smoothing", fields.number("smoothing", self.smoothing))
        if self.batch_norm_decay is not None:
            self._set("batch_norm_decay", fields.number("batch_norm_decay", self.batch_norm_decay, below=1))
        for name, choices in CHOICES.items():
            fields.choice(name, getattr(self, name), choices)
        self._check_alpha()
        self._check_mean()
        if not isinstance(self.images, Preprocessing):
            raise InputError(f"images is {self.images!r}: give a Preprocessing.")
        if self.batch_norm == "source" and self.moving_statistics == "fresh":
            raise InputError(
                "batch_norm is source, but moving_statistics is fresh, so that there are no statistics to normalise by: give one "
                "of them another value."
            )
        if self.decay_at is not None and self.decay_at > self.iterations:
            raise InputError(
                f"decay_at is {self.decay_at}, but there are {self.iterations} iterations: give at most {self.iterations}, which "
                "keeps the rate to the end, or leave it out for two thirds of the iterations."
            )

    def _set(self, name, value):
        object.__setattr__(self, name, value)

    def _check_alpha(self):
        if not isinstance(self.alpha, dict):
            raise InputError(f"alpha is {self.alpha!r}: give strengths by the penalty's symbol, as in {PUBLISHED_ALPHA}.")
        for symbol in self.alpha:
            fields.choice("a key of alpha", symbol, tuple(PENALTIES))
        self._set("alpha", {symbol: fields.number(f"alpha of {symbol}", value) for symbol, value in self.alpha.items()})

    def _check_beta(self):
        if not isinstance(self.beta, dict):
            self._set("beta", fields.number("beta", self.beta))
            return
        for symbol in self.beta:
            fields.choice("a key of beta", symbol, tuple(PENALTIES))
        self._set("beta", {symbol: fields.number(f"beta of {symbol}", value) for symbol, value in self.beta.items()})

    def _check_mean(self):
        if self.mean is None or isinstance(self.mean, str) and self.mean in MEANS:
            return
        if isinstance(self.mean, str):
            raise InputError(f"mean is {self.mean!r}: give {', '.join(MEANS)}, or three numbers for red, green, blue.")
        self._set("mean", three_numbers("mean", self.mean))
        if not all(0 <= value <= 255 for value in self.mean):
            raise InputError(f"mean is {self.mean}: give three numbers from 0 to 255, for red, green and blue.")

    @property
    def decay_step(self) -> int:
        """The number of steps taken at the initial rate."""
        return self.decay_at if self.decay_at is not None else self._two_thirds

    @property
    def _two_thirds(self):
        return max(1, round(self.iterations * 2 / 3))

    @property
    def log_interval(self) -> int:
        """Steps between two rows of the log."""
        return self.log_every or max(1, self.iterations // 20)

    def schedule(self) -> keras.optimizers.schedules.LearningRateSchedule:
        """Returns the learning rate by step: the initial rate for `decay_step` steps, then a tenth of it."""
        # Keras keeps the first value up to and including the boundary, and counts steps from 0.
        rates = [self.learning_rate, self.learning_rate / 10]
        return keras.optimizers.schedules.PiecewiseConstantDecay([self.decay_step - 1], rates)

    def for_head(self) -> "Recipe":
        """Returns the settings of the first phase, in which the new head is trained alone."""
        steps, rate = self.head_steps, self.head_learning_rate
        return self.replace(iterations=steps, decay_at=steps, learning_rate=rate, head_steps=0, log_every=None)

    def optimizer(self) -> keras.optimizers.Optimizer:
        """Returns a new optimizer with the schedule, not yet wrapped for `penalty_step`."""
        if self.solver == "adam":
            return keras.optimizers.Adam(self.schedule())
        return keras.optimizers.SGD(self.schedule(), momentum=self.momentum)

    def idle(self, symbols: Sequence[str] | None = None) -> dict[str, str]:
        """Returns the settings that change no result, given the others: a dict from each name to the reason.

        Args:
            symbols: the symbols of the penalties in use; None for any.
        """
        reasons = {}
        if self.solver != "sgd":
            reasons["momentum"] = f"{self.solver} has none"
        if self.images.blur != "gaussian":
            reasons |= dict.fromkeys(("blur_kernel", "blur_sigma"), f"the blur is {self.images.blur}")
        if self.batch_norm == "source" and self.batch_norm_decay is not None:
            reasons["batch_norm_decay"] = "the statistics of batch norm stay those of the source"
        if self.head_steps == 0:
            reasons["head_learning_rate"] = "head_steps is 0"
        if self.penalty_step == "proximal":
            reasons["smoothing"] = "proximal steps have none"
        elif symbols is not None and not any(hasattr(PENALTIES[symbol](1.0), "epsilon") for symbol in symbols):
            reasons["smoothing"] = f"{' and '.join(symbols)} have no root" if len(symbols) > 1 else f"{symbols[0]} has no root"
        return reasons

    def record(self, symbol: str | None = None, images: bool = True) -> dict[str, Any]:
        """Returns the settings that a result depends on, for a record.

        Omits settings without effect. Also omits the default value of settings that older versions did not have, so that
        older records keep their keys.

        Args:
            symbol: of the run's penalty; None for any.
            images: whether the recipe makes the images; if not, its settings of images are left out.
        """
        values = dataclasses.asdict(self.replace(decay_at=None if self.decay_step == self._two_thirds else self.decay_at))
        values = {**values, **self.images.plain()}
        del values["images"]
        values["mean"] = self.mean or "training"
        idle = [*self.idle(None if symbol is None else (symbol,)), *(() if images else OF_IMAGES)]
        newer: dict[str, Any] = {"solver": "sgd", "penalty_step": "gradient"}
        newer |= {"head_bias": 0.0, "smoothing": 0.0, "moving_statistics": "source", "batch_norm_decay": None}
        newer |= {"batch_norm": "batch", "head_steps": 0, "label_smoothing": 0.0}
        kept = {name: value for name, value in values.items() if name not in newer or value != newer[name]}
        return {name: value for name, value in kept.items() if name not in idle}

    def alpha_for(self, symbol: str) -> float:
        """Returns the default strength of a penalty.

        Raises:
            InputError: the recipe has no strength for it.
        """
        if symbol not in self.alpha:
            raise InputError(f"There is no published strength for the penalty {symbol}: give --alpha.")
        return self.alpha[symbol]

    def beta_for(self, symbol: str) -> float:
        """Returns the strength of L2 on the new layers under a penalty."""
        return self.beta.get(symbol, Recipe.beta) if isinstance(self.beta, dict) else self.beta

    def grid_for(self, symbol: str) -> tuple[float, ...]:
        """Returns the default strengths that cross-validation tries for a penalty.

        Raises:
            InputError: the symbol is unknown.
        """
        if symbol not in PENALTIES:
            raise InputError(f"There is no grid of strengths for the penalty {symbol}: give alphas.")
        return PENALTIES[symbol].grid

    def rates(self) -> tuple[float, ...]:
        """Returns the learning rates that cross-validation tries by default.

        They are the paper's if the recipe's rate is one of them, otherwise about a third of it, the rate itself, and about
        three times it.
        """
        rate = self.learning_rate
        if rate in LEARNING_RATES:
            return LEARNING_RATES
        return float(f"{rate / 10**0.5:.1g}"), rate, float(f"{rate * 10**0.5:.1g}")

    def mean_for(self, name: str, pixels: PixelFormat) -> tuple[float, float, float] | None:
        """Returns the mean to subtract from the images of a data set.

        Args:
            name: of the data set, such as "caltech256".
            pixels: the `PixelFormat` of the weights.

        Returns:
            Three numbers in RGB order, or None for the mean of the data set's training images.

        Raises:
            InputError: `mean` is "weights", but the weights carry no mean.
        """
        mean = self.seen_by(pixels).mean
        if mean == "weights" and pixels.mean is None:
            raise InputError(
                "mean is weights, but the weights carry no mean: give three numbers, as in --mean=123.68,116.78,103.94."
            )
        published = AUTHORS_MEANS.get(name.removeprefix("tfds:").split("/")[0])
        choices: dict[Any, Any] = {"training": None, "authors": published, "weights": pixels.mean}
        return choices.get(mean, mean)

    def seen_by(self, pixels: PixelFormat) -> "Recipe":
        """Returns a copy whose `mean` is decided for a network with this pixel format."""
        return self.replace(mean="weights" if pixels.is_raw else "training") if self.mean is None else self

    @property
    def images_set(self) -> list[str]:
        """The names of the settings of images that differ from the defaults."""
        values = {**self.images.plain(), "mean": self.mean, "crops": self.crops}
        usual = {**Preprocessing().plain(), "mean": None, "crops": 1}
        return [name for name in OF_IMAGES if values[name] != usual[name]]

    def replace(self, **changes: Any) -> "Recipe":
        """Returns a copy with other settings, image settings included, as in `recipe.replace(crop=160)`."""
        of_images = {name: changes.pop(name) for name in IMAGES if name in changes}
        if of_images:
            changes["images"] = dataclasses.replace(changes.get("images", self.images), **of_images)
        return dataclasses.replace(self, **changes)

    @classmethod
    def paper(cls) -> "Recipe":
        """Returns the settings in the paper's text."""
        return cls()

    @classmethod
    def authors(cls) -> "Recipe":
        """Returns the settings of the authors' code where it differs, as listed in BUILD_NOTES.md."""
        images: dict[str, Any] = {"images": Preprocessing(resize_filter="bilinear", blur="authors"), "mean": "authors"}
        network: dict[str, Any] = {"head_bias": 0.01, "smoothing": 1e-16, "moving_statistics": "fresh", "batch_norm_decay": 0.9}
        return cls(iterations=9001, decay_at=5000, params="kernels", beta={"l2": 1e-3}, **images, **network)

    @classmethod
    def for_network(
        cls, model: keras.Model, images: int | Any, *, image_size: int | None = None, say: Callable[[str], None] = print
    ) -> "Recipe":
        """Returns settings for a network, images or a number of images that are not the paper's, and says what it chose.

        The rules, which docs/networks.md measures on training images:
        - images are cut to the side that the network takes, and resized and blurred in proportion to the paper's 224 pixels
          (`Preprocessing.for_size`);
        - steps have 32 images, and there are ten epochs of them, but at least 200 and at most 9000 steps;
        - 100 more steps before them train the new head alone, at the rate 0.03;
        - with batch norm, the source's statistics stay; then, and without batch norm, the rate is 0.001.

        Args:
            model: the pre-trained model.
            images: the number of training images; or a `Dataset` or `Task`, which has them.
            image_size: the side of the images in pixels, if the model takes any; 224 by default.
            say: called with a line on what was chosen.

        Raises:
            InputError: the model takes other inputs than images, or images that are not square or not of `image_size`; or
                `images` is no number.
        """
        side = _side_for(model, image_size)
        count = fields.whole("images", images if isinstance(images, int) else len(images.train))
        iterations = min(cls.iterations, max(200, math.ceil(10 * count / 32)))
        has_statistics = any(isinstance(layer, keras.layers.BatchNormalization) for layer in model._flatten_layers())
        made = cls(
            iterations=iterations,
            batch_size=32,
            learning_rate=0.001,
            head_steps=100,
            batch_norm="source" if has_statistics else "batch",
            images=Preprocessing.for_size(side),
        )
        say(made._summary(model, count))
        return made

    def _summary(self, model, count):
        images = self.images
        blur = f"blurred by a kernel of {images.blur_kernel}" if images.blur == "gaussian" else "not blurred"
        kept = ", batch norm keeps the source's statistics" if self.batch_norm == "source" else ""
        return (
            f"{model.name}, {count} training images: crops of {images.crop} pixels from {images.resize}, {blur}; "
            f"{self.head_steps} steps for the head alone, then {self.iterations} at the rate {self.learning_rate:g}, "
            f"{self.batch_size} images each{kept}."
        )

    @classmethod
    def digits(cls, like: "Recipe | None" = None) -> "Recipe":
        """Returns settings for the embedded digits, 8x8 pixels: no mirror (digits have a handedness) and no blur.

        Args:
            like: the recipe for all other settings; the paper's by default.
        """
        alpha = {**PUBLISHED_ALPHA, "l2_sp": 1.0}
        numbers = {"iterations": 200, "decay_at": None, "learning_rate": 0.01, "alpha": alpha}
        return (like or cls()).replace(**numbers, resize=10, crop=8, blur="none", mirror=False)

    @classmethod
    def source(cls, like: "Recipe") -> "Recipe":
        """Returns settings for training a source model from scratch, with images prepared as in the recipe `like`."""
        changes = {"iterations": like.iterations * 4, "decay_at": None, "learning_rate": 0.05, "alpha": {"l2": 1e-4}}
        # settings of fine-tuning or testing alone are reset, so that they do not cause another source training
        own = ["momentum", "beta", "params", "solver", "penalty_step", "log_every"]
        own += ["head_bias", "smoothing", "moving_statistics", "batch_norm_decay", "batch_norm", "head_steps", "label_smoothing"]
        return like.replace(**changes, **{name: getattr(cls(), name) for name in own}, crops=1)


def _side_for(model, image_size):
    """Returns the side of the square images that a model takes: its own, or `image_size` if it takes any.

    Raises:
        InputError: as in `Recipe.for_network`.
    """
    check_inputs(model)
    own = square_side(model.name, *model.input_shape[1:3])
    if own is None:
        return Preprocessing.crop if image_size is None else fields.whole("image_size", image_size)
    if image_size not in (None, own):
        raise InputError(f"image_size is {image_size}, but {model.name} takes images of {own} pixels: leave it out.")
    return own
