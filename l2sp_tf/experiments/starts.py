"""What the runs of a plan start from: both tasks, the pre-trained model, its anchors and its Fisher diagonal."""

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
from l2sp_tf.experiments.checks import check_classes
from l2sp_tf.experiments.plans import Plan, sample_size
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.plain import plain
from l2sp_tf.files.provenance import RESULTS_VERSION, versions
from l2sp_tf.files.reading import read_json
from l2sp_tf.files.writing import write_text
from l2sp_tf.fisher.diagonal import Fisher
from l2sp_tf.fisher.estimator import fisher_diagonal
from l2sp_tf.models import zoo
from l2sp_tf.models.copies import detached_copy
from l2sp_tf.models.pixels import PixelFormat
from l2sp_tf.models.units import unit_count
from l2sp_tf.penalties.anchors import Anchors
from l2sp_tf.training.checkpoints import Checkpoints
from l2sp_tf.training.monitor import write_histograms
from l2sp_tf.training.trainer import train_source


@dataclasses.dataclass(frozen=True, eq=False)
class Outline:
    """What is known of a start before an image is decoded or a model trained.

    Attributes:
        plan: the `Plan`.
        target, source: a `Dataset` each; source may be None.
        pixels: how the network sees pixels, with the mean that given weights carry.
        network: the pre-trained model; with weights "none" that model with random weights.
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
        """How many units can be frozen: 0 if the backbone's units cannot be told."""
        return unit_count(self.network)

    @property
    def backbone(self):
        """The name of the network: that of a `.keras` file is the file's own, whatever the plan says."""
        return _backbone_name(self.plan, self.network)

    @property
    def origin(self):
        """Where the weights come from: "scratch", "imagenet" or "file"."""
        return {"none": "scratch", "imagenet": "imagenet"}.get(self.plan.setup.weights, "file")

    @functools.cached_property
    def anchors_digest(self):
        """The digest of the anchors; None where the source model is trained first."""
        if self.plan.setup.weights == "none":
            return Anchors.load(self.trained_path).digest if self.is_trained else None
        return Anchors.of(self.network).digest

    @property
    def trains_source(self):
        """Whether the source model is trained first, on all training images of the source."""
        return self.plan.setup.weights == "none" and not self.is_trained

    @functools.cached_property
    def is_trained(self):
        """Whether the source model of weights "none" was trained before."""
        return self.plan.devices.chief_says(self.trained_path.exists)

    @functools.cached_property
    def trained_path(self):
        """Where the weights of the source model of weights "none" lie, or will lie."""
        plan = self.plan
        skipped = len(self.source_images.skipped)
        identity = {"data": self.source.digest, "skipped": skipped, "recipe": plain(plan.setup.source_recipe.record())}
        made_by = {"backbone": plan.setup.backbone, "versions": versions(), "code": RESULTS_VERSION, **exactness(plan)}
        key = records.run_key({**identity, **plain(plan.setup.shape), **made_by})
        return plan.setup.workdir / "sources" / key / "weights.safetensors"

    @functools.cached_property
    def source_mean(self):
        """The mean to subtract from source images: three numbers, or None where images tell it, and in words whose it is."""
        plan = self.plan
        mean = plan.setup.source_recipe.mean_for(self.source.name, self.pixels)
        if mean is not None:
            return mean, _origin_of_mean(plan.setup.source_recipe.mean, mean)
        known = zoo.stored_pixels(self.trained_path) if plan.setup.weights == "none" and self.is_trained else self.pixels
        if not self.trains_source and known.mean is not None:  # the network was trained on images without it
            return known.mean, "that of the weights"
        if self.mean_of is not None:
            return None, f"that of {len(self.mean_of)} of its {len(self.source.train)} training images, drawn at random"
        return None, _origin_of_mean(plan.setup.source_recipe.mean, None)

    @functools.cached_property
    def mean_of(self):
        """The positions of the source's training images whose mean is taken where nothing else tells it; None for all."""
        count = sample_size(len(self.source.train))
        return None if self.trains_source or count == len(self.source.train) else sample_order(self.source.train)[:count]

    def uses(self, with_fisher):
        """What runs look at, with F_jj or without: a list of pairs of a `Split` and the recipe by which it is decoded."""
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
        """The training images of the source, decoded as far as they are asked for."""
        preprocessing, options = _preparation(self.plan, self.plan.setup.source_recipe, self.pixels)
        return undecoded(self.source.train, preprocessing, **options)

    @functools.cached_property
    def tasks(self):
        """The target and the source, or None, as a `Task` each; what the runs train and test on is decoded.

        A bad image among them is thereby told before anything is trained.
        """
        plan = self.plan
        mean = plan.setup.recipe.mean_for(self.target.name, self.pixels)
        target = self._task(self.target, plan.setup.recipe, mean, _origin_of_mean(plan.setup.recipe.mean, mean))
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
        self.say(f"{dataset.name}: pixels {task.pixels}, {origin}")
        return task


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """What all runs of a plan start from.

    Attributes:
        plan: the `Plan`.
        target, source: a `Task` each; source may be None.
        pretrained: the pre-trained model.
        origin: "scratch", "imagenet" or "file".
        anchors, anchors_path: of the pre-trained model, and their file.
        before: the source accuracy of the pre-trained model, as `evaluate` returns it, or None.
        mean_of: of how many training images the source's mean is, where it is not of all and nothing else told it; or None.
        units: how many units can be frozen: 0 if the backbone's units cannot be told.
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
        """The Fisher diagonal of the pre-trained model on the source's training images, transformed as the plan says."""
        return _fisher(self.plan, self.pretrained, self.source, self.anchors, self.say, self.verbose)

    @property
    def anchors_origin(self):
        """Where the anchors come from, in words for the records: the recipe of a source model, or the name of a file."""
        if self.origin == "scratch":
            return {"recipe": plain(self.plan.setup.source_recipe.record())}
        return {"weights": short_name(self.plan.setup.weights)} if self.origin == "file" else {}

    @property
    def backbone(self):
        """The name of the network, as in `Outline`."""
        return _backbone_name(self.plan, self.pretrained)


def outline(plan, *, say=print):
    """Finds the data and the network of a plan, and checks that they fit; nothing is decoded or trained.

    Raises:
        InputError: bad data or weights.
        OSError: the workdir cannot be written.
    """
    if plan.setup.deterministic:
        tf.config.experimental.enable_op_determinism()
    plan.setup.workdir.mkdir(parents=True, exist_ok=True)
    pixels = zoo.pixels_of(None if plan.setup.weights == "none" else plan.setup.weights, plan.setup.pixels)
    target = load_dataset(plan.setup.target, per_class=plan.setup.per_class, seed=plan.setup.subset_seed, **plan.setup.places)
    source = None if plan.setup.source is None else load_dataset(plan.setup.source, **plan.setup.places)
    for dataset, recipe in ((target, plan.setup.recipe), (source, plan.setup.source_recipe)):
        if dataset is not None:
            recipe.mean_for(dataset.name, pixels)  # raises where nobody tells it
            counts = f"{len(dataset.train)} training and {len(dataset.test)} test images of {len(dataset.classes)} classes"
            say(f"{dataset.name}: {counts}")
    network = _network(plan.setup, source)
    if source is not None:
        check_classes(network.output_shape[-1], source)
    return Outline(plan, target, source, pixels, network, say)


def prepare_start(plan, *, say=print, verbose=0, made=None, callbacks=()):
    """Decodes the data of a plan, and trains or loads its pre-trained model; what was made before is read.

    Args:
        plan: a `Plan`.
        say: called with a line of text for each step.
        verbose: of Keras `fit`.
        made: the plan's `Outline`, if there is one.
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
    """A random order of a split's images, so that any first part of it is a fair sample: int64 [n]."""
    return np.random.default_rng(0).permutation(len(split))


def _preparation(plan, recipe, pixels):
    """How a plan's images are prepared: a `Preprocessing`, and where and how strictly they are decoded."""
    strictness = {"skip_bad_images": plan.setup.skip_bad_images, "cache_dir": plan.setup.workdir / "cache"}
    return recipe.images.with_pixels(pixels), strictness


def _decode(splits, name, say):
    """Decodes all images of some splits, and says how many were left out."""
    skipped = [image for split in splits for image in split.images.skipped]
    if skipped:
        say(f"{name}: {len(skipped)} images left out that cannot be decoded, the first is {skipped[0]}")


def _network(setup, source):
    """The pre-trained model, downloaded or read; with weights "none" that model with random weights."""
    if setup.is_whole_model:
        return zoo.load_model(setup.weights)
    classes = len(source.classes) if source is not None else zoo.head_classes(setup.weights) or 1000
    if setup.weights == "none":
        keras.utils.set_random_seed(0)
    return zoo.backbone(setup.backbone, classes, weights=None if setup.weights == "none" else setup.weights, **setup.shape)


def _pretrained(made, source, say, verbose, callbacks):
    """The pre-trained model: trained from scratch, downloaded or read."""
    plan, model = made.plan, made.network
    if plan.setup.weights != "none":
        return model
    path, devices = made.trained_path, plan.devices
    if devices.chief_says(path.exists):  # perhaps since a moment ago, for another plan
        zoo.load_weights(model, path)
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
    zoo.load_weights(model, path)  # the same in every worker, to the bit
    say(f"source model: trained in {run.seconds:.1f} s")
    return detached_copy(model)


def _stored_anchors(plan, pretrained, pixels):
    """The anchors of the pre-trained model, and the file under the workdir that all runs share.

    The file also says how the model sees pixels, so that it can be the weights of another fine-tuning.
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
    """The accuracy of the pre-trained model on the source's test images: measured once, then read."""
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
    """Whether operations are deterministic, as a key has it: what was made without cannot stand for what was made with."""
    return {"deterministic": True} if plan.setup.deterministic else {}


def _seen(task):
    """How a network sees the images of a task, as a key has it."""
    return {"preprocessing": plain(task.preprocessing), "mean": task.mean.tolist()}


def _doubt(before, source, origin):
    """Warns of a source accuracy that is not clearly above chance: the table of what was kept would mean nothing.

    Clearly is at 1e-3, by the exact binomial test; above chance is above twice 1/K, or for few classes above the tenth part of
    the way from 1/K to 1. An order of classes by name where another was meant leaves the first two of K in their places.
    """
    chance = 1 / len(source.classes)
    bound = chance + min(chance, (1 - chance) / 10)
    if bound >= 1 or binomtest(before["correct"], before["total"], bound, "greater").pvalue <= 1e-3:
        return
    causes = (
        "the classes may be in another order than the model's outputs, or the images may not be preprocessed as it was "
        "trained (--pixels, --mean, --resize)"
    )
    if origin == "scratch":
        causes = "it may be trained too little (--source_iterations); the order of its classes and its preprocessing are its own"
    warnings.warn(
        f"The source accuracy on {source.name} is {before['accuracy']:.1%} of {before['total']} images, and chance is "
        f"{chance:.1%}: {causes}.",
        stacklevel=2,
    )


def _fisher(plan, pretrained, source, anchors, say, verbose):
    """The Fisher diagonal of the pre-trained model on the source's training images: estimated once, then read."""
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


def _origin_of_mean(choice, mean):
    """Where the mean of a task comes from, in words."""
    if mean is not None:
        return "which was given" if isinstance(choice, tuple) else f"that of the {choice}"
    return "that of its training images" + (", as the authors publish none for it" if choice == "authors" else "")


def short_name(path):
    """The last two parts of a path: enough to tell tasks apart in a table, and no record of a machine."""
    return "/".join(pathlib.Path(path).parts[-2:])
