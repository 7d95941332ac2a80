"""Plans the runs of a pair of tasks, and of each table and figure of the paper."""

import dataclasses
import functools
import itertools
import json
import pathlib

from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.plain import plain
from l2sp_tf.fisher.diagonal import MODES
from l2sp_tf.models import zoo
from l2sp_tf.optimizers.decoupled import Decoupled
from l2sp_tf.penalties.formulas import PAPER, PENALTIES, FisherPenalty
from l2sp_tf.training.devices import Devices
from l2sp_tf.training.execution import CHECKPOINT_EVERY
from l2sp_tf.training.recipe import Recipe

STUDIES = ("table_2", "table_3", "figure_1", "figure_2", "figure_3", "figure_4", "all")
PENALTIES_OF = {"figure_1": ("l2_sp",), "figure_2": PAPER, "figure_3": ("l2", "l2_sp")}
FIGURE_1_BETAS = (0.0, 0.001, 0.01, 0.1)
MOST_FROZEN = 8
MOST_SEEDS = 2**32
LARGE, LARGE_SAMPLE = 50_000, 10_000  # a source with more than LARGE training images is sampled to LARGE_SAMPLE
PROTOCOLS = ("paper", "authors")


def sample_size(available):
    """Returns how many of the `available` source images suffice for a mean or F_jj: all, or LARGE_SAMPLE of many."""
    return available if available <= LARGE else LARGE_SAMPLE


@dataclasses.dataclass(frozen=True)
class FisherPlan:
    """Settings of the Fisher estimate on central crops of the source's training images, in random order.

    Attributes:
        mode, samples, tolerance: as `fisher_diagonal` takes them.
        images: number of images; None for all, or for LARGE_SAMPLE of a source with more than LARGE.
        batch: images per batch.
        transforms: pairs of a method of `Fisher` ("clip", "epsilon", "normalise") and its value or None, in order. By default
            F_jj is divided by its mean, as the grids of the Fisher penalties assume a mean of 1. Empty keeps the raw F_jj.

    Raises:
        InputError: a value has the wrong type or is out of range.
    """

    mode: str = "rademacher"
    samples: int = 1
    images: int | None = None
    batch: int = 64
    tolerance: float | None = None
    transforms: tuple = (("normalise", None),)

    def __post_init__(self):
        fields.choice("fisher_mode", self.mode, MODES)
        fields.whole("fisher_samples", self.samples)
        if self.mode == "exact" and self.samples != 1:
            raise InputError(f"fisher_samples is {self.samples}, but the mode exact draws nothing: leave it at 1.")
        fields.whole("fisher_batch", self.batch)
        if self.images is not None:
            fields.whole("fisher_images", self.images)
        if self.tolerance is not None:
            fields.number("fisher_tolerance", self.tolerance, above=0)
        for name, value in self.transforms:
            if name not in ("clip", "epsilon", "normalise"):
                raise InputError(f"The Fisher transform {name!r} is unknown: give clip=MAX, epsilon=VALUE or normalise.")
            if name == "normalise" and value is not None:
                raise InputError(f"The Fisher transform normalise takes no value, but has {value}: give normalise alone.")
            if name != "normalise" and value is None:
                raise InputError(f"The Fisher transform {name} has no value: give one, as in {name}=0.01.")
            if value is not None:
                fields.number(f"The Fisher transform {name}", value, above=0)

    def count(self, available):
        """Returns how many of the `available` training images are used."""
        return min(sample_size(available) if self.images is None else self.images, available)


def cache_of(workdir):
    """Returns the folder of decoded pixels and unpacked zips of a workdir."""
    return workdir / "cache"


def needs_fisher(symbol):
    """Whether the penalty of this symbol needs F_jj."""
    return issubclass(PENALTIES[symbol], FisherPenalty)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run: a penalty's symbol, its strengths, learning rate, number of frozen units and seed; the fold, or None."""

    symbol: str
    alpha: float
    beta: float
    learning_rate: float
    frozen: int = 0
    seed: int = 0
    fold: int | None = None

    def on_fold(self, fold):
        """Returns this setting on a fold of cross-validation, with the fold's number as seed."""
        return dataclasses.replace(self, seed=fold, fold=fold)

    def recipe_of(self, recipe):
        """Returns the recipe of this run: with its beta and learning rate."""
        return recipe.replace(beta=self.beta, learning_rate=self.learning_rate)

    @property
    def penalty(self):
        """The penalty with this setting's alpha."""
        return PENALTIES[self.symbol](self.alpha)

    @property
    def needs_fisher(self):
        """Whether the penalty needs F_jj."""
        return needs_fisher(self.symbol)

    def __str__(self):
        where = f"fold {self.fold}" if self.fold is not None else f"seed {self.seed}"
        frozen = f", {self.frozen} units frozen" if self.frozen else ""
        return f"{self.penalty}, beta {self.beta:g}, rate {self.learning_rate:g}{frozen}, {where}"


@dataclasses.dataclass(frozen=True)
class Setup:
    """The origin of all runs of a plan: two tasks, a pre-trained network, and their settings.

    Attributes:
        workdir: the folder for anchors/, sources/ and runs/.
        source, target: data sets, as `load_dataset` takes them. `source` may be None if the weights are given; then
            source accuracy is not measured.
        source_classes: the classes of the network's outputs, as `class_names` takes them, if the source has a part of them.
        backbone: as `zoo.backbone` takes it, with widths, depths and block.
        weights: "none" to train the source model from scratch, "imagenet", or a file.
        recipe, source_recipe: for fine-tuning and for training from scratch.
        pixels: a name of PIXELS: the pixel format of the weights, if their file lacks it.
        per_class: training images per class of the target; None for all.
        subset_seed: the seed that draws them; None as `load_dataset` takes it.
        protocol: the splits of the "paper" or the "authors".
        data_dir: the folder of TensorFlow Datasets; None for its default.
        skip_bad_images: skip images that cannot be decoded.
        fisher: the `FisherPlan` for the Fisher penalties.
        deterministic: make TensorFlow's operations repeat to the bit.

    Raises:
        InputError: a value has the wrong type or is out of range, or two values contradict each other.
    """

    workdir: pathlib.Path
    source: str | None
    target: str
    backbone: str
    weights: str
    recipe: Recipe
    source_recipe: Recipe
    source_classes: str | None = None
    pixels: str | None = None
    widths: tuple = (16, 32, 64)
    depths: tuple = (1, 1, 1)
    block: str = "basic"
    per_class: int | None = None
    subset_seed: int | None = None
    protocol: str = "paper"
    data_dir: str | None = None
    skip_bad_images: bool = False
    fisher: FisherPlan = FisherPlan()
    deterministic: bool = False

    def __post_init__(self):
        object.__setattr__(self, "backbone", zoo.known_name(self.backbone))
        for name, least in (("per_class", 1), ("subset_seed", 0)):
            if getattr(self, name) is not None:
                fields.whole(name, getattr(self, name), least)
        for name in ("widths", "depths"):
            for value in getattr(self, name):
                fields.whole(name, value)
        if len(self.widths) != len(self.depths):
            raise InputError(f"There are {len(self.widths)} widths and {len(self.depths)} depths: give one of each per stage.")
        fields.choice("protocol", self.protocol, PROTOCOLS)
        if self.weights == "none" and self.source is None:
            raise InputError("weights=none trains a source model from scratch: give its data with --source.")
        if self.weights == "none" and self.recipe.mean == "weights":
            raise InputError("mean is weights, but weights=none has no mean yet: give --mean=training or three numbers.")

    def key(self):
        """Returns a text that is equal for setups with the same data and model."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(own | {"recipe": plain(self.recipe), "source_recipe": plain(self.source_recipe)}, default=repr)

    @property
    def is_whole_model(self):
        """Whether the weights are a `.keras` file or a preset of KerasHub, which includes the network."""
        return zoo.is_whole_model(self.weights)

    @property
    def given_weights(self):
        """The weights as `zoo.backbone` takes them: None if the source model is trained from scratch."""
        return None if self.weights == "none" else self.weights

    @functools.cached_property  # a whole model is loaded to see whether it rescales pixels
    def pixel_format(self):
        """The `PixelFormat` of the weights; raises InputError if it is unknown."""
        return zoo.pixels_of(self.given_weights, self.pixels, None if self.is_whole_model else self.backbone)

    @property
    def cache_dir(self):
        """The folder of decoded pixels."""
        return cache_of(self.workdir)

    @property
    def places(self):
        """The protocol and folders of data sets, as `load_dataset` takes them."""
        return {"protocol": self.protocol, "data_dir": self.data_dir, "cache_dir": self.cache_dir}

    @property
    def shape(self):
        """The image size, and the stages of the small backbone, as `zoo.backbone` takes them."""
        return {"image_size": self.recipe.images.crop, "widths": self.widths, "depths": self.depths, "block": self.block}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The varied settings: the product of penalties, strengths, learning rates, frozen units and seeds.

    Attributes:
        penalties: symbols of PENALTIES.
        seeds: one run for each.
        alphas: strengths of all penalties that `strengths` does not name. Empty takes each penalty's alpha from the recipe;
            with folds, its grid.
        betas, learning_rates: replace the recipe's value; empty keeps it.
        strengths: strengths of single penalties, by symbol.
        frozen: numbers of frozen first units, one run for each. None spreads up to 8 numbers over all units but the
            last (Fig. 3).
        folds: with 2 or more, cross-validation on the target's training images chooses alpha, beta and learning rate
            for each penalty; only that choice is run. 0 for none.

    Raises:
        InputError: a value has the wrong type or is out of range, or two values contradict each other.
    """

    penalties: tuple
    seeds: tuple
    alphas: tuple = ()
    betas: tuple = ()
    learning_rates: tuple = ()
    strengths: dict = dataclasses.field(default_factory=dict)
    frozen: tuple | None = (0,)
    folds: int = 0

    def __post_init__(self):
        for name, above in (("alphas", None), ("betas", None), ("learning_rates", 0)):
            object.__setattr__(self, name, fields.each_number(name[:-1], getattr(self, name), above=above))
        fields.whole("folds", self.folds, 0)
        if self.folds == 1:
            raise InputError("folds is 1: give at least 2, or 0 for no cross-validation.")
        for name in ("seeds", "frozen"):
            for value in getattr(self, name) or ():
                fields.whole(name, value, 0)
        if any(seed >= MOST_SEEDS for seed in self.seeds):
            raise InputError(f"seeds has {max(self.seeds)}: give numbers below {MOST_SEEDS}, as NumPy takes no larger ones.")
        twice = next((seed for seed in self.seeds if self.seeds.count(seed) > 1), None)
        if twice is not None:
            raise InputError(f"seeds has {twice} twice, which makes one run, not two: give each seed once.")
        if self.frozen == ():
            raise InputError("frozen is empty: give 0 for nothing frozen.")
        self._check_penalties()
        if not self.penalties or not self.seeds:
            raise InputError("There is nothing to run: give at least one penalty and one seed.")

    def _check_penalties(self):
        for symbol in self.penalties:
            if symbol not in PENALTIES:
                like = fields.nearest(symbol, PENALTIES)
                did_you_mean = f" Did you mean {like}?" if like else ""
                raise InputError(f"The penalty {symbol!r} is unknown: give one of {', '.join(PENALTIES)}.{did_you_mean}")
        for symbol in self.strengths:
            if symbol not in self.penalties:
                raise InputError(f"{symbol} has strengths, but is not among the penalties {', '.join(self.penalties)}: add it.")
        strengths = {symbol: fields.each_number(f"alpha of {symbol}", values) for symbol, values in self.strengths.items()}
        object.__setattr__(self, "strengths", strengths)

    @property
    def needs_fisher(self):
        """Whether any penalty needs F_jj."""
        return any(map(needs_fisher, self.penalties))

    def check_frozen(self, units):
        """Checks the numbers of frozen units against the backbone's number of units (0 if it has no recognisable units).

        Raises:
            InputError: `frozen` exceeds the number of units that can be frozen.
        """
        most = max(units - 1, 0)
        if max(self.frozen or (0,)) > most:
            raise InputError(f"frozen is {max(self.frozen)}, but of this backbone's units at most {most} can be frozen.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep from one setup.

    Attributes:
        setup: the `Setup`.
        sweep: the `Sweep`.
        save_models: keep each fine-tuned model beside its record.
        checkpoint_every: steps between two checkpoints of a run; 0 saves the last step only.
        distribute: the devices of each training, a kind of `devices.make_strategy`.
        jit_compile: whether XLA compiles the training steps, as in `Execution`; not part of a run's key.

    Raises:
        InputError: the setup cannot serve the sweep.
    """

    setup: Setup
    sweep: Sweep
    save_models: bool = True
    checkpoint_every: int = CHECKPOINT_EVERY
    distribute: str = "none"
    jit_compile: bool | str = "auto"

    def __post_init__(self):
        fields.whole("checkpoint_every", self.checkpoint_every, 0)
        for symbol in self.sweep.penalties:
            if needs_fisher(symbol) and self.setup.source is None:
                raise InputError(f"The penalty {symbol} needs source images for its Fisher diagonal: give them with --source.")
            if self.setup.recipe.penalty_step == "decoupled":
                Decoupled.check(PENALTIES[symbol](1.0))
            self.axes(symbol)  # raises if no alphas are known

    @classmethod
    def of(cls, **values):
        """Makes a plan from values named after the attributes of `Setup`, `Sweep` and `Plan`."""
        parts = {part: {name: values.pop(name) for name in names if name in values} for part, names in PARTS.items()}
        return cls(**values, setup=Setup(**parts["setup"]), sweep=Sweep(**parts["sweep"]))

    def replace(self, **changes):
        """Returns a copy with some values changed, named as in `of`."""
        return Plan.of(**{**self.values(), **changes})

    def values(self):
        """Returns its values as `of` takes them."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in PARTS}
        return own | {name: getattr(getattr(self, part), name) for part, names in PARTS.items() for name in names}

    @property
    def devices(self):
        """The `Devices` of each training."""
        return Devices.of(self.distribute)

    def axes(self, symbol):
        """Returns the distinct alphas, betas and learning rates of a penalty, by name."""
        recipe, sweep = self.setup.recipe, self.sweep
        published = recipe.grid_for if sweep.folds else lambda symbol: (recipe.alpha_for(symbol),)
        alphas = sweep.strengths.get(symbol) or sweep.alphas or published(symbol)
        rates = sweep.learning_rates or (recipe.learning_rate,)
        axes = {"alpha": alphas, "beta": sweep.betas or (recipe.beta_for(symbol),), "learning_rate": rates}
        return {name: tuple(dict.fromkeys(values)) for name, values in axes.items()}

    def grid(self, symbol):
        """Returns the settings of a penalty: the product of its alphas, betas and learning rates, in that order."""
        return [Setting(symbol, *combination) for combination in itertools.product(*self.axes(symbol).values())]

    def trials(self):
        """Returns the runs of cross-validation: every setting of every penalty on every fold."""
        settings = (setting for symbol in dict.fromkeys(self.sweep.penalties) for setting in self.grid(symbol))
        return [setting.on_fold(fold) for setting in settings for fold in range(self.sweep.folds)]

    def runs(self, units=0, chosen=None):
        """Yields the settings to run on all training images.

        Args:
            units: the backbone's number of units; needed if `frozen` is None.
            chosen: the setting that cross-validation chose for each penalty, by symbol. Penalties without one are skipped.
                None runs the whole grid.
        """
        sweep = self.sweep
        frozen = sweep.frozen if sweep.frozen is not None else spread(max(units - 1, 0), MOST_FROZEN)
        for symbol in dict.fromkeys(sweep.penalties):
            for setting in self.grid(symbol) if chosen is None else filter(None, [chosen.get(symbol)]):
                for n, seed in itertools.product(dict.fromkeys(frozen), dict.fromkeys(sweep.seeds)):
                    yield dataclasses.replace(setting, frozen=n, seed=seed)


PARTS = {part: [field.name for field in dataclasses.fields(kind)] for part, kind in (("setup", Setup), ("sweep", Sweep))}


def spread(last, most):
    """Returns the whole numbers from 0 to `last`, or `most` of them, evenly spread."""
    count = min(most, last + 1)
    return tuple(round(i * last / max(count - 1, 1)) for i in range(count))


def study(name, plan):
    """Makes the plans of a table or a figure of the paper from a plan with its data, weights and recipe.

    Tables 2 and 3 and Fig. 4 compare L2, L2-SP and L2-SP-Fisher; Fig. 2 compares all penalties. Cross-validation chooses
    their settings. Fig. 3 freezes the first units under L2 and L2-SP. Fig. 1 runs L2-SP over alpha and beta.

    Args:
        name: one of STUDIES.
        plan: a `Plan`. Its penalties are ignored; its strengths, alphas, betas and learning rates are searched.
            Fig. 1 uses the first seed, and one learning rate: the plan's if it has exactly one, else the recipe's.

    Raises:
        InputError: the name is unknown, or the Fisher penalties lack source images.
    """
    if name not in STUDIES:
        raise InputError(f"The experiment {name!r} is unknown: give one of {', '.join(STUDIES)}.")
    if name == "all":
        return [part for each in ("figure_2", "figure_3", "figure_1") for part in study(each, plan)]
    sweep = plan.sweep
    penalties = PENALTIES_OF.get(name, ("l2", "l2_sp", "l2_sp_fisher"))
    changes = {"penalties": penalties, "strengths": {symbol: v for symbol, v in sweep.strengths.items() if symbol in penalties}}
    if name == "figure_1":
        rates = sweep.learning_rates if len(sweep.learning_rates) == 1 else ()
        alphas = sweep.strengths.get("l2_sp") or sweep.alphas or plan.setup.recipe.grid_for("l2_sp")
        changes |= {"strengths": {}, "alphas": alphas, "betas": sweep.betas or FIGURE_1_BETAS, "learning_rates": rates}
        return [plan.replace(**changes, seeds=sweep.seeds[:1], folds=0, frozen=(0,))]
    frozen = sweep.frozen if sweep.frozen is None or any(sweep.frozen) else None
    return [plan.replace(**changes, frozen=frozen if name == "figure_3" else (0,))]
