"""Prepares the start of all runs of a plan: both tasks, the pre-trained model, its anchors and its Fisher diagonal."""

import dataclasses
import functools
import json
import pathlib
import warnings

import keras
import numpy as np
import tensorflow as tf
from scipy.stats import binomtest

from l2sp_tf.data.datasets import load_dataset
from l2sp_tf.data.pipeline import Task, prepare, test_batches, undecoded
from l2sp_tf.data.sets import Dataset
from l2sp_tf.evaluation.accuracy import evaluate
from l2sp_tf.experiments import records
from l2sp_tf.experiments.checks import check_head, check_rescaling
from l2sp_tf.experiments.plans import Plan, sample_size
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.plain import plain
from l2sp_tf.files.provenance import RESULTS_VERSION, versions
from l2sp_tf.files.reading import read_json
from l2sp_tf.files.writing import write_text
from l2sp_tf.fisher.diagonal import Fisher
from l2sp_tf.fisher.estimator import fisher_diagonal
from l2sp_tf.models import keras_files, zoo
from l2sp_tf.models.copies import detached_copy
from l2sp_tf.models.inputs import check_inputs
from l2sp_tf.models.pixels import PixelFormat
from l2sp_tf.models.units import unit_count
from l2sp_tf.penalties.anchors import Anchors
from l2sp_tf.training.checkpoints import Checkpoints
from l2sp_tf.training.monitor import write_histograms
from l2sp_tf.training.trainer import train_source


@dataclasses.dataclass(frozen=True, eq=False)
class Outline:
    """The facts known of a start before any decoding or training.

    Attributes:
        plan: the `Plan`.
        target, source: a `Dataset` each; source may be None.
        pixels: the network's pixel format, with the mean stored in given weights.
        network: the pre-trained model; with weights "none", the untrained network.
        say: as in `prepare_start`.
    """

    plan: Plan
    target: Dataset
    source: Dataset | None
    pixels: PixelFormat
    network: keras.Model
    say: object

    @functools.cached_property
    def units(self):
        """The number of units of the network; 0 if it has no recognisable units."""
        return unit_count(self.network)

    @property
    def backbone(self):
        """The name of the network; for a `.keras` file, the name in the file."""
        return _backbone_name(self.plan, self.network)

    @property
    def origin(self):
        """The origin of the weights: "scratch", "imagenet" or "file"."""
        return {"none": "scratch", "imagenet": "imagenet"}.get(self.plan.setup.weights, "file")

    @functools.cached_property
    def anchors_digest(self):
        """The digest of the anchors; None if the source model is not trained yet."""
        if self.plan.setup.weights == "none":
            return Anchors.load(self.trained_path).digest if self.is_trained else None
        return Anchors.of(self.network).digest

    @property
    def trains_source(self):
        """Whether the source model must still be trained, on all training images of the source."""
        return self.plan.setup.weights == "none" and not self.is_trained

    @functools.cached_property
    def is_trained(self):
        """Whether the weights of a source model trained from scratch exist."""
        return self.plan.devices.chief_says(self.trained_path.exists)

    @functools.cached_property
    def trained_path(self):
        """The file for the weights of a source model trained from scratch."""
        plan = self.plan
        skipped = len(self.source_images.skipped)
        identity = {"data": self.source.digest, "skipped": skipped, "recipe": plain(plan.setup.source_recipe.record())}
        made_by = {"backbone": plan.setup.backbone, "versions": versions(), "code": RESULTS_VERSION, **exactness(plan)}
        key = records.run_key({**identity, **plain(plan.setup.shape), **made_by})
        return plan.setup.workdir / "sources" / key / "weights.safetensors"

    @functools.cached_property
    def source_mean(self):
        """The mean to subtract from source images, and its origin in words: three numbers, or None to compute it from images."""
        plan = self.plan
        mean = plan.setup.source_recipe.mean_for(self.source.name, self.pixels)
        if mean is not None:
            return mean, _origin_of_mean(plan.setup.source_recipe.mean, mean, self.pixels)
        known = keras_files.stored_pixels(self.trained_path) if plan.setup.weights == "none" and self.is_trained else self.pixels
        if not self.trains_source and known.mean is not None:  # the mean that training subtracted
            return known.mean, "that of the weights"
        if self.mean_of is not None:
            return None, f"that of {len(self.mean_of)} of its {len(self.source.train)} training images, drawn at random"
        return None, _origin_of_mean(plan.setup.source_recipe.mean, None, self.pixels)

    @functools.cached_property
    def mean_of(self):
        """The positions of the source's training images that an otherwise unknown mean is computed from; None for all."""
        count = sample_size(len(self.source.train))
        return None if self.trains_source or count == len(self.source.train) else sample_order(self.source.train)[:count]

    def uses(self, with_fisher):
        """Lists the images that runs decode, as pairs of a `Split` and its recipe.

        Args:
            with_fisher: whether F_jj is estimated.
        """
        plan = self.plan
        uses = [(self.target.train, plan.setup.recipe), (self.target.test, plan.setup.recipe)]
        if self.source is None:
            return uses
        train, needed = self.source.train, 0
        if with_fisher:
            needed = plan.setup.fisher.count(len(train))
        if self.trains_source or self.source_mean[0] is None:
            needed = max(needed, len(train) if self.mean_of is None else len(self.mean_of))
        some = [(train.take(sample_order(train)[:needed]) if needed < len(train) else train, plan.setup.source_recipe)]
        return uses + [(self.source.test, plan.setup.source_recipe)] + some * (needed > 0)

    @functools.cached_property
    def source_images(self):
        """The training images of the source, decoded on demand."""
        preprocessing, options = _preparation(self.plan, self.plan.setup.source_recipe, self.pixels)
        return undecoded(self.source.train, preprocessing, **options)

    @functools.cached_property
    def tasks(self):
        """The target and the source `Task`, or None; all images for training and testing are decoded here.

        A bad image thus raises before any training.
        """
        plan = self.plan
        mean = plan.setup.recipe.mean_for(self.target.name, self.pixels)
        origin = _origin_of_mean(plan.setup.recipe.mean, mean, self.pixels)
        target = self._task(self.target, plan.setup.recipe, mean, origin)
        _decode([target.train, target.test], target.name, self.say)
        if self.source is None:
            return target, None
        options = {"train": self.source_images, "mean_of": self.mean_of}
        source = self._task(self.source, plan.setup.source_recipe, *self.source_mean, **options)
        _decode([source.test] + [source.train] * self.trains_source, source.name, self.say)
        return target, source

    def _task(self, dataset, recipe, mean, origin, **options):
        preprocessing, strictness = _preparation(self.plan, recipe, self.pixels)
        task = prepare(dataset, preprocessing, mean=mean, **strictness, **options)
        self.say(f"{dataset.name}: {'; '.join((f'pixels {task.pixels}, {origin}', *dataset.changes))}")
        return task


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """The common start of all runs of a plan.

    Attributes:
        plan: the `Plan`.
        target, source: a `Task` each; source may be None.
        pretrained: the pre-trained model.
        origin: "scratch", "imagenet" or "file".
        anchors, anchors_path: of the pre-trained model, and their file.
        before: the source accuracy of the pre-trained model, as `evaluate` returns it, or None.
        mean_of: the number of training images that the source's mean was computed from, if not all; or None.
        units: the number of units of the network; 0 if it has no recognisable units.
        say, verbose, callbacks: as in `prepare_start`.
    """

    plan: Plan
    target: Task
    source: Task | None
    pretrained: keras.Model
    origin: str
    anchors: Anchors
    anchors_path: pathlib.Path
    before: dict | None
    mean_of: int | None
    units: int
    say: object
    verbose: int
    callbacks: tuple

    @functools.cached_property
    def fisher(self):
        """The Fisher diagonal of the pre-trained model on the source's training images, with the plan's transforms."""
        return _fisher(self.plan, self.pretrained, self.source, self.anchors, self.say, self.verbose)

    @property
    def anchors_origin(self):
        """The origin of the anchors for the records: the recipe of a source model, or the name of a file."""
        if self.origin == "scratch":
            return {"recipe": plain(self.plan.setup.source_recipe.record())}
        return {"weights": short_name(self.plan.setup.weights)} if self.origin == "file" else {}

    @property
    def backbone(self):
        """The name of the network, as in `Outline`."""
        return _backbone_name(self.plan, self.pretrained)


def outline(plan, *, say=print):
    """Finds the data and the network of a plan, and checks that they fit; decodes and trains nothing.

    Raises:
        InputError: bad data or weights.
        OSError: the workdir cannot be written.
    """
    if plan.setup.deterministic:
        tf.config.experimental.enable_op_determinism()
    plan.setup.workdir.mkdir(parents=True, exist_ok=True)
    pixels = plan.setup.pixel_format
    target = load_dataset(plan.setup.target, per_class=plan.setup.per_class, seed=plan.setup.subset_seed, **plan.setup.places)
    source = None
    if plan.setup.source is not None:
        source = load_dataset(plan.setup.source, classes=plan.setup.source_classes, **plan.setup.places)
    for dataset, recipe in ((target, plan.setup.recipe), (source, plan.setup.source_recipe)):
        if dataset is not None:
            recipe.mean_for(dataset.name, pixels)  # raises if the mean is unknown
            counts = f"{len(dataset.train)} training and {len(dataset.test)} test images of {len(dataset.classes)} classes"
            say(f"{dataset.name}: {'; '.join((counts, *dataset.notes))}")
    network = _network(plan.setup, source)
    check_inputs(network)
    check_rescaling(plan.setup, network, pixels)
    if source is not None:
        check_head(plan.setup, network, source)
    return Outline(plan, target, source, pixels, network, say)


def prepare_start(plan, *, say=print, verbose=0, made=None, callbacks=()):
    """Decodes the data of a plan, and trains or loads its pre-trained model; reuses earlier results on disk.

    Args:
        plan: a `Plan`.
        say: called with a line of text for each step.
        verbose: of Keras `fit`.
        made: the plan's `Outline`, or None to make it.
        callbacks: Keras callbacks for each training.

    Raises:
        InputError: bad data or weights.
        OSError: the workdir cannot be written.
    """
    made = made or outline(plan, say=say)
    target, source = made.tasks
    pretrained = _pretrained(made, source, say, verbose, callbacks)
    anchors, anchors_path = _stored_anchors(plan, pretrained, source.pixels if made.origin == "scratch" else made.pixels)
    before = mean_of = None
    if source is not None:
        before = _source_accuracy(plan, pretrained, source, anchors)
        say(f"source model on {source.name}: accuracy {before['accuracy']:.1%} on {before['total']} test images")
        _doubt(before, source, made.origin)
        mean_of = len(made.mean_of) if made.source_mean[0] is None and made.mean_of is not None else None
    found = (pretrained, made.origin, anchors, anchors_path, before, mean_of, made.units)
    return Start(plan, target, source, *found, say, verbose, tuple(callbacks))


def _backbone_name(plan, network):
    return network.name if plan.setup.is_whole_model else plan.setup.backbone


def sample_order(split):
    """Returns a random order of a split's images, int64 [n]; any first part of it is a fair sample."""
    return np.random.default_rng(0).permutation(len(split))


def _preparation(plan, recipe, pixels):
    """Returns the `Preprocessing` of a plan's images, and the decoding options of `prepare`."""
    strictness = {"skip_bad_images": plan.setup.skip_bad_images, "cache_dir": plan.setup.cache_dir}
    return recipe.images.with_pixels(pixels), strictness


def _decode(splits, name, say):
    """Decodes all images of the splits, and says how many were skipped."""
    skipped = [image for split in splits for image in split.images.skipped]
    if skipped:
        say(f"{name}: left out {len(skipped)} images that cannot be decoded, the first is {skipped[0]}")


def _network(setup, source):
    """Downloads or reads the pre-trained model; with weights "none", makes the untrained network."""
    if setup.is_whole_model:
        return zoo.whole_model(setup.weights, setup.recipe.images.crop)
    classes = len(source.classes) if source is not None else keras_files.head_classes(setup.weights) or 1000
    if setup.weights == "none":
        keras.utils.set_random_seed(0)
    return zoo.backbone(setup.backbone, classes, weights=setup.given_weights, **setup.shape)


def _pretrained(made, source, say, verbose, callbacks):
    """Returns the pre-trained model; with weights "none", trains it or reads its earlier weights."""
    plan, model = made.plan, made.network
    if plan.setup.weights != "none":
        return model
    path, devices = made.trained_path, plan.devices
    if devices.chief_says(path.exists):  # another plan may have trained it since the outline was made
        keras_files.load_weights(model, path)
        say(f"source model: trained before, read from {path}")
        return detached_copy(model)
    say(f"source model: training {plan.setup.backbone} from scratch, {plan.setup.source_recipe.iterations} iterations")
    folder = path.parent
    options = {"run_dir": folder, "save": False, "checkpoint_every": plan.checkpoint_every, "verbose": verbose}
    options |= {"strategy": devices.strategy, "jit_compile": plan.jit_compile, "callbacks": callbacks}
    run = train_source(model, source, plan.setup.source_recipe, **options)
    if devices.is_chief:
        Anchors.of(model, {"pixels": source.pixels.plain()}).save(path)
        Checkpoints(folder / "checkpoints").remove()
    devices.wait_for_chief()
    keras_files.load_weights(model, path)  # every worker reads the same bits
    say(f"source model: trained in {run.seconds:.1f} s")
    return detached_copy(model)


def _stored_anchors(plan, pretrained, pixels):
    """Returns the anchors of the pre-trained model, and their file under the workdir, which all runs share.

    The file stores the pixel format too, so that it can serve as weights of another fine-tuning.
    """
    anchors = Anchors.of(pretrained, {"pixels": pixels.plain()})
    seen = records.run_key(plain(pixels))
    path = plan.setup.workdir / "anchors" / f"{anchors.digest[:16]}-{seen}.safetensors"
    if path.exists():
        return Anchors.load(path), path
    if plan.devices.is_chief:
        anchors.save(path)
    return anchors, path


def _source_accuracy(plan, pretrained, source, anchors):
    """Returns the accuracy of the pre-trained model on the source's test images; measures it once, then reads it."""
    identity = {"anchors": anchors.digest, "data": source.digest, "skipped": len(source.test.skipped), **_seen(source)}
    key = records.run_key({**identity, "crops": plan.setup.recipe.crops, "versions": versions(), "code": RESULTS_VERSION})
    path = plan.setup.workdir / "before" / f"{key}.json"
    if plan.devices.chief_says(lambda: _is_measured(path)):
        return read_json(path, f"{path} is damaged")
    before = evaluate(pretrained, source, crops=plan.setup.recipe.crops)
    if plan.devices.is_chief:
        write_text(path, json.dumps(before) + "\n")
    return before


def _is_measured(path):
    try:
        return path.exists() and {"accuracy", "correct", "total"} <= set(read_json(path, f"{path} is damaged"))
    except (InputError, TypeError):
        return False


def exactness(plan):
    """Returns the key entry for deterministic operations: results without them are never reused for results with them."""
    return {"deterministic": True} if plan.setup.deterministic else {}


def _seen(task):
    """Returns the key entries for the preprocessing of a task's images."""
    return {"preprocessing": plain(task.preprocessing), "mean": task.mean.tolist()}


def _doubt(before, source, origin):
    """Warns if the source accuracy is not clearly above chance: retention would then mean nothing.

    The exact binomial test at level 1e-3 compares it with 2/K, or with 1/K + (1 - 1/K)/10 for few classes. The bound is
    twice 1/K since sorting the classes by name may leave the first two of K in place.
    """
    chance = 1 / len(source.classes)
    bound = chance + min(chance, (1 - chance) / 10)
    if bound >= 1 or binomtest(before["correct"], before["total"], bound, "greater").pvalue <= 1e-3:
        return
    causes = (
        "the classes may be in another order than the model's outputs, or the images may not be preprocessed as in its "
        "training (--pixels, --mean, --resize)"
    )
    if origin == "scratch":
        causes = "it may need more training (--source_iterations); its class order and preprocessing are those of its training"
    warnings.warn(
        f"The source accuracy on {source.name} is {before['accuracy']:.1%} of {before['total']} images, and chance is "
        f"{chance:.1%}: {causes}.",
        stacklevel=2,
    )


def _fisher(plan, pretrained, source, anchors, say, verbose):
    """Returns the Fisher diagonal of the pre-trained model on source training images; estimates it once, then reads it."""
    f, train = plan.setup.fisher, source.train
    order = sample_order(train.split)[: f.count(len(train.split))]
    skipped = len(train.sample(order).skipped) if plan.setup.skip_bad_images else 0
    count = len(order) - skipped
    identity = {"anchors": anchors.digest, "data": source.digest, "skipped": skipped, "images": count}
    identity |= {"mode": f.mode, "samples": f.samples, "tolerance": f.tolerance, "batch": f.batch if f.tolerance else None}
    key = records.run_key({**identity, **_seen(source), "code": RESULTS_VERSION, **exactness(plan)})
    path = plan.setup.workdir / "fisher" / f"{key}.safetensors"
    devices = plan.devices
    if devices.chief_says(path.exists):
        say(f"Fisher diagonal: estimated before, read from {path}")
    else:
        say(f"Fisher diagonal: {f.mode} on up to {count} images of {source.name}")
        options = {"tolerance": f.tolerance, "progress": bool(verbose), "source": short_name(source.name)}
        if devices.is_chief:
            batches = test_batches(train.sample(order), source.preprocessing, source.mean, batch_size=f.batch)
            fisher = fisher_diagonal(pretrained, batches, f.mode, f.samples, **options)
            fisher.save(path)
            write_histograms(path.parent / "tensorboard" / key, fisher)
        devices.wait_for_chief()
    fisher = Fisher.load(path)
    worst = max(fisher.standard_error().values())
    say(f"Fisher diagonal: {fisher.provenance['images']} images, relative standard error of a layer at most {worst:.1%}")
    for name, value in f.transforms:
        fisher = getattr(fisher, name)(*([] if value is None else [value]))
    return fisher


def _origin_of_mean(choice, mean, pixels):
    """Describes the origin of a task's mean."""
    if choice is None and pixels.is_raw:
        return "as the network rescales them itself"
    if mean is not None:
        return "which was given" if isinstance(choice, tuple) else f"that of the {choice}"
    return "that of its training images" + (", as the authors publish none for it" if choice == "authors" else "")


def short_name(path):
    """Keeps the last two parts of the path: enough for a table, nothing about the machine."""
    return "/".join(pathlib.Path(path).parts[-2:])
