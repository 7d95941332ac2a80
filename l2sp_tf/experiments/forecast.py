"""Forecasts the disk space and the time of plans before they run."""

import contextlib
import dataclasses
import datetime
import functools
import math
import shutil
import statistics
import time
import types

import keras
import numpy as np

from l2sp_tf.data.decoding import MEMORY_LIMIT_BYTES, Images, decode, decoded_bytes
from l2sp_tf.data.pipeline import Task
from l2sp_tf.data.store import PixelStore
from l2sp_tf.experiments import records
from l2sp_tf.experiments.plans import needs_fisher
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.plain import plain
from l2sp_tf.penalties.formulas import PENALTIES
from l2sp_tf.training.trainer import finetune

TIMED_STEPS = 12
FIRST_STEPS = 3  # slower than later ones, so left out of the median
ENOUGH_SECONDS = 10  # slow steps are timed for no longer than this
TIMED_IMAGES = 32
FORWARD = 1 / 3  # cost of a forward pass in training steps, by operation count
FISHER_PASS = 1.5  # cost of a draw in gradients, see benchmarks/RESULTS.md


@dataclasses.dataclass(frozen=True)
class Work:
    """The remaining work of one start.

    Attributes:
        made: its `Outline`.
        left: the settings of all runs without a record.
        trains: whether this start trains the source model; of starts that share one, only the first does.
    """

    made: object
    left: tuple
    trains: bool

    @property
    def needs_fisher(self):
        """Whether a remaining run needs F_jj."""
        return any(setting.needs_fisher for setting in self.left)

    @property
    def steps(self):
        """The number of training steps, including those of the source model if it is trained."""
        plan = self.made.plan
        each = plan.setup.recipe.iterations + plan.setup.recipe.head_steps
        return len(self.left) * each + self.trains * plan.setup.source_recipe.iterations

    @property
    def measured(self):
        """The number of forward passes of one image that evaluate the runs and the source model."""
        plan, target, source = self.made.plan, self.made.target, self.made.source
        kept = 0 if source is None else len(source.test)
        crops, r2 = plan.setup.recipe.crops, len(target.train) * (self.made.units > 0)
        folds = sum(setting.fold is not None for setting in self.left)
        whole = len(self.left) - folds
        return whole * (crops * (len(target.test) + 2 * kept) + r2) + crops * (
            folds * len(target.train) // max(plan.sweep.folds, 1) + kept
        )

    @property
    def gradients(self):
        """The cost of estimating F_jj, in gradients of one image."""
        if not self.needs_fisher:
            return 0
        f, source = self.made.plan.setup.fisher, self.made.source
        return f.count(len(source.train)) * (len(source.classes) if f.mode == "exact" else FISHER_PASS * f.samples)


class Forecast:
    """Forecasts the disk space and the time of `Work`; images already decoded on disk are not counted.

    Args:
        works: a list of `Work`, one for each start.
    """

    def __init__(self, works):
        self.works = works
        self.images, self.pixels_bytes, self._examples = 0, 0, []
        uses = {}
        for work in works:
            for split, recipe in work.made.uses(work.needs_fisher):
                how = (recipe.images.resize, recipe.images.resize_mode, recipe.images.resize_filter)
                uses.setdefault((work.made.plan.setup.cache_dir, how), []).append(split)
        for (folder, how), splits in uses.items():
            self._add_decoding(PixelStore(folder, how), how, splits)

    def _add_decoding(self, store, how, splits):
        """Counts the images still to be decoded in one way, each once, and their bytes on disk."""
        seen = set()
        for split in splits:
            size = decoded_bytes(split, *how[:2])
            # content keys are read only if the store may hold some of the images; otherwise names identify them
            new = set(split.names) if store.is_empty or size <= MEMORY_LIMIT_BYTES else set(store.lacks(split.keys))
            new -= seen
            seen |= new
            self.images += len(new)
            self.pixels_bytes += size * len(new) // len(split) if size > MEMORY_LIMIT_BYTES else 0
            if new:
                self._examples.append((split, how))

    @property
    def models_bytes(self):
        """The bytes of the models, anchors, source models and Fisher diagonals of the remaining work."""
        total = 0
        for work in self.works:
            saved = sum(setting.fold is None for setting in work.left) * work.made.plan.save_models
            total += _bytes(work.made.network) * (saved + 1 + work.trains + work.needs_fisher)
        return total

    @property
    def checkpoint_bytes(self):
        """The most bytes that the checkpoints of a running run take; they are removed when it ends."""
        most = 0
        for plan, network in ((work.made.plan, work.made.network) for work in self.works if work.steps):
            written = 1 + (plan.setup.recipe.iterations - 1) // plan.checkpoint_every if plan.checkpoint_every else 1
            slots = {"sgd": 1, "adam": 2}[plan.setup.recipe.solver]
            most = max(most, min(written, 3) * (1 + slots) * _bytes(network))  # two are kept while a third is written
        return most

    def disk(self):
        """Returns one line on disk space."""
        workdir = self.works[0].made.plan.setup.workdir
        total, free = self.pixels_bytes + self.models_bytes, shutil.disk_usage(workdir).free
        line = (
            f"disk: about {_size(total)} will be written to {workdir} ({_size(self.pixels_bytes)} of decoded pixels, "
            f"{_size(self.models_bytes)} of models), and {_size(self.checkpoint_bytes)} for the checkpoints of a running run; "
            f"{_size(free)} are free"
        )
        return line + (", which is not enough" if total + self.checkpoint_bytes > free else "")

    def time(self, seconds, decoding=0.0):
        """Returns one line on time.

        Args:
            seconds: of a training step, for each `Work`.
            decoding: seconds to decode one image.
        """
        pairs = list(zip(seconds, self.works, strict=True))
        parts = {"training": sum(step * work.steps for step, work in pairs)}
        measuring = "measuring and F_jj" if any(work.gradients for work in self.works) else "measuring"
        parts[measuring] = sum(
            step / work.made.plan.setup.recipe.batch_size * (FORWARD * work.measured + work.gradients) for step, work in pairs
        )
        parts |= {"decoding": decoding * self.images} if decoding else {}
        listed = ", ".join(f"{_length(value)} of {name}" for name, value in parts.items())
        return f"time: about {_length(sum(parts.values()))} on this machine, one run after the other ({listed})"

    def measured_time(self):
        """Returns `time` after timing some training steps on made-up images and some decodings on this machine."""
        times = {}
        for work in self.works:
            times.setdefault(_network_of(work), 0.0)
            if work.steps and not times[_network_of(work)]:
                times[_network_of(work)] = seconds_per_step(work.made, work.left)
        return self.time([times[_network_of(work)] for work in self.works], self._seconds_per_image())

    def _seconds_per_image(self):
        """Returns the mean time to decode one of the images; the first half warms up and is not counted."""
        spent = []
        for split, how in self._examples:
            for part in np.array_split(np.linspace(0, len(split) - 1, 2 * TIMED_IMAGES).astype(int), 2):
                start = time.perf_counter()
                with contextlib.suppress(InputError):  # bad images are reported when all are decoded
                    decode(split.take(part), how[0], mode=how[1], filter=how[2], memory_limit_bytes=math.inf, every_class=False)
                last = time.perf_counter() - start
            spent.append(last / TIMED_IMAGES)
        return statistics.fmean(spent) if spent else 0.0


def recorded_in(workdir):
    """Reads all records under a workdir, folds included; skips damaged ones, which their own runs report."""
    found = []
    for pattern in ("selections/*/selection.json", "folds/*/run.json", "runs/*/run.json"):
        for path in workdir.glob(pattern):
            with contextlib.suppress(InputError):
                found.append(records.read_record(path))
    return found


class Recorded:
    """Looks up recorded runs of one start by the settings known before its data are decoded.

    Args:
        plan: a `Plan`.
        made: its `Outline`.
        found: the records of its workdir, from `recorded_in`.
        settings_of: maps (plan, start, setting, task, fisher) to the settings of a run's record.
    """

    UNKNOWN = {"pixels", "source_mean", "source_mean_of", "skipped", "fisher"}

    def __init__(self, plan, made, found, settings_of):
        self._plan, self._made, self._settings_of, self._records = plan, made, settings_of, {}
        self._selections = records.selections_of(found)
        for record in records.runs_of(found):
            self._records.setdefault(record["settings"]["seed"], []).append(record)

    def has(self, setting):
        """Whether a run of this setting is recorded; with folds, a run at any strengths that cross-validation chose counts."""
        found = self._records.get(setting.seed, ())
        if not found or self._made.trains_source:
            return False
        if not self._plan.sweep.folds or setting.fold is not None:
            return any(self._is_of(record, setting) for record in found)
        chosen = [r for r in found if any(records.is_chosen(selection, r["settings"]) for selection in self._selections)]
        return any(self._is_of(record, _with_strengths(setting, record["settings"])) for record in chosen)

    def _is_of(self, record, setting):
        is_equal = self._comparable(record["settings"]) == self._known(setting)
        return is_equal and (not setting.needs_fisher or self._has_fisher(record))

    @functools.cache  # noqa: B019  lives only while the plan is announced
    def _known(self, setting):
        made, images = self._made, types.SimpleNamespace(skipped=())
        sides = {"train": images, "test": images, "pixels": made.pixels, "mean": np.zeros(3)}
        names = {name: getattr(made, name) for name in ("target", "source") if getattr(made, name) is not None}
        tasks = {name: types.SimpleNamespace(name=data.name, digest=data.digest, **sides) for name, data in names.items()}
        anchors = types.SimpleNamespace(digest=made.anchors_digest)
        network = {"origin": made.origin, "backbone": made.backbone, "anchors": anchors}
        start = types.SimpleNamespace(**{"source": None, **tasks}, **network, mean_of=None)
        return self._comparable(plain(self._settings_of(self._plan, start, setting, start.target, None)))

    def _comparable(self, settings):
        """Returns the part of a run's identity that is known before its data are decoded."""
        found = records.identity_of_run(settings)
        return {name: value for name, value in found.items() if name.partition(".")[0] not in self.UNKNOWN}

    def _has_fisher(self, record):
        """Whether the F_jj of a record was estimated by the plan's settings."""
        f, found = self._plan.setup.fisher, record.get("fisher", {})
        transforms = [(t["name"], None if t["name"] == "normalise" else t["value"]) for t in found.get("transforms", ())]
        count = f.count(len(self._made.source.train))
        same = [found.get("mode") == f.mode, transforms == list(f.transforms), found.get("images", 0) <= count]
        same.append(f.mode == "exact" or found.get("samples") == f.samples)
        return all(same) and (f.tolerance is not None or self._plan.setup.skip_bad_images or found.get("images") == count)


def _with_strengths(setting, settings):
    """Returns the setting with the strengths and rate of a record: a search may leave the plan's grid."""
    rate = settings["recipe"]["learning_rate"]
    return dataclasses.replace(setting, alpha=settings["alpha"], beta=settings["beta"], learning_rate=rate)


class FirstSteps(keras.callbacks.Callback):
    """Times the first steps of the first training, and reports the seconds per step once.

    Args:
        report: called with the seconds per step.
    """

    may_stop = False

    def __init__(self, report):
        super().__init__()
        self._report, self._times = report, []

    def on_train_begin(self, logs=None):
        self._times = []

    def on_train_batch_end(self, batch, logs=None):
        if self._report is None:
            return
        self._times.append(time.perf_counter())
        steps = self._times[FIRST_STEPS - 1 :]
        if len(self._times) >= TIMED_STEPS or (len(steps) > 2 and steps[-1] - steps[0] > ENOUGH_SECONDS):
            report, self._report = self._report, None
            report(statistics.median(b - a for a, b in zip(steps, steps[1:], strict=False)))


def seconds_per_step(made, left):
    """Returns the median time of a training step on made-up images, the first steps left out.

    Args:
        made: an `Outline`.
        left: the settings of its runs. The first one's penalty is used; L2-SP stands in for a Fisher penalty.
    """
    plan, times = made.plan, []
    recipe = plan.setup.recipe.replace(iterations=TIMED_STEPS, decay_at=None, learning_rate=1e-12)  # cannot diverge
    classes, rng = made.target.classes, np.random.default_rng(0)
    pixels = rng.integers(0, 256, (min(recipe.batch_size, 64), recipe.images.resize, recipe.images.resize, 3), np.uint8)
    images = Images(pixels, np.arange(len(pixels), dtype=np.int32) % len(classes))
    preprocessing = dataclasses.replace(recipe.images, pixels=made.pixels, resize_mode="squash")
    task = Task("made up", classes, "", images, images, np.zeros(3, np.float32), preprocessing)
    symbol = left[0].symbol if left else "l2"
    penalty = PENALTIES["l2_sp" if needs_fisher(symbol) else symbol](1.0)

    def note(seconds):
        times.append(seconds)
        clock.model.stop_training = True

    clock = FirstSteps(note)
    options = {"callbacks": [clock], "verbose": 0, "strategy": plan.devices.strategy, "jit_compile": plan.jit_compile}
    finetune(made.network, task, penalty, recipe, **options)
    return times[0]


def _network_of(work):
    """Returns the settings for which works share one measured step time."""
    setup = work.made.plan.setup
    return setup.backbone, setup.weights, setup.widths, setup.depths, setup.block, repr(setup.recipe)


def _bytes(network):
    return sum(math.prod(variable.shape) * np.dtype(variable.dtype).itemsize for variable in network.variables)


def _size(count):
    """Formats a number of bytes."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _length(seconds):
    """Formats seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))
