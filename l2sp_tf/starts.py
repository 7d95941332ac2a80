"""What the runs of a plan start from: both tasks, the pre-trained model, its anchors and its Fisher diagonal."""

import dataclasses
import functools
import pathlib
import warnings

import keras
import numpy as np
import tensorflow as tf
from scipy.stats import binomtest

from l2sp_tf import models, records
from l2sp_tf.anchors import Anchors
from l2sp_tf.checkpoints import Checkpoints
from l2sp_tf.copies import detached_copy
from l2sp_tf.data import Task, load_dataset, prepare, test_batches
from l2sp_tf.distribution import chief_says, is_chief, make_strategy, wait_for_chief
from l2sp_tf.errors import InputError
from l2sp_tf.evaluation import evaluate
from l2sp_tf.fisher import Fisher, fisher_diagonal
from l2sp_tf.monitor import write_histograms
from l2sp_tf.plans import Plan
from l2sp_tf.provenance import RESULTS_VERSION, versions
from l2sp_tf.training import preprocessing_of, train_source
from l2sp_tf.units import units


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
        say, verbose: as in `prepare_start`.
    """

    plan: Plan
    target: Task
    source: Task | None
    pretrained: keras.Model
    origin: str
    anchors: Anchors
    anchors_path: pathlib.Path
    before: dict | None
    say: object
    verbose: int

    @functools.cached_property
    def fisher(self):
        """The Fisher diagonal of the pre-trained model on the source's training images, transformed as the plan says."""
        return _fisher(self.plan, self.pretrained, self.source, self.anchors, self.say, self.verbose)

    @property
    def backbone(self):
        """The name of the network: that of a `.keras` file is the file's own, whatever the plan says."""
        return self.pretrained.name if str(self.plan.weights).endswith(".keras") else self.plan.backbone

    @functools.cached_property
    def units(self):
        """How many units can be frozen: 0 if the backbone's units cannot be told."""
        try:
            return len(units(self.pretrained))
        except InputError:
            return 0


def prepare_start(plan, *, say=print, verbose=0):
    """Loads the data of a plan, and trains or loads its pre-trained model; what was made before is read.

    Args:
        plan: a `Plan`.
        say: called with a line of text for each step.
        verbose: of Keras `fit`.

    Raises:
        InputError: bad data or weights.
        OSError: the workdir cannot be written.
    """
    if plan.deterministic:
        tf.config.experimental.enable_op_determinism()
    plan.workdir.mkdir(parents=True, exist_ok=True)
    pixels = models.pixels_of(None if plan.weights == "none" else plan.weights, plan.pixels)
    places = {"protocol": plan.protocol, "data_dir": plan.data_dir, "cache_dir": plan.workdir / "cache"}
    dataset = load_dataset(plan.target, per_class=plan.per_class, seed=plan.subset_seed, **places)
    target = _task(plan, dataset, plan.recipe, pixels, say)
    source = before = None
    if plan.source is not None:
        source = _task(plan, load_dataset(plan.source, **places), plan.source_recipe, pixels, say)
    pretrained, origin = _pretrained(plan, source, say, verbose)
    anchors, anchors_path = _stored_anchors(plan, pretrained, source.pixels if origin == "scratch" else pixels)
    if source is not None:
        before = _source_accuracy(pretrained, source, plan.recipe.crops)
        say(f"source model on {source.name}: accuracy {before['accuracy']:.1%} on {before['total']} test images")
        _doubt(before, source, origin)
    return Start(plan, target, source, pretrained, origin, anchors, anchors_path, before, say, verbose)


def _task(plan, dataset, recipe, pixels, say):
    say(f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images of {len(dataset.classes)} classes")
    mean = recipe.mean_for(dataset.name, pixels)
    options = {"mean": mean, "skip_bad_images": plan.skip_bad_images, "cache_dir": plan.workdir / "cache"}
    task = prepare(dataset, preprocessing_of(recipe, pixels), **options)
    say(f"{dataset.name}: pixels {task.pixels}, {_origin_of_mean(recipe.mean, mean)}")
    skipped = task.train.skipped + task.test.skipped
    if skipped:
        say(f"{dataset.name}: {len(skipped)} images left out that cannot be decoded, the first is {skipped[0]}")
    return task


def _pretrained(plan, source, say, verbose):
    """The pre-trained model, and what tells it from others: trained from scratch, downloaded or read."""
    if plan.weights.endswith(".keras"):
        return models.load_model(plan.weights), "file"
    classes = len(source.classes) if source is not None else models.head_classes(plan.weights) or 1000
    shape = {"image_size": plan.recipe.crop, "widths": plan.widths, "depths": plan.depths, "block": plan.block}
    if plan.weights != "none":
        model = models.backbone(plan.backbone, classes, weights=plan.weights, **shape)
        return model, "imagenet" if plan.weights == "imagenet" else "file"
    keras.utils.set_random_seed(0)
    model = models.backbone(plan.backbone, classes, **shape)
    identity = {"data": source.digest, "skipped": len(source.train.skipped), "recipe": records.plain(plan.source_recipe.record())}
    made = {"backbone": plan.backbone, **records.plain(shape), "versions": versions(), "code": RESULTS_VERSION}
    key = records.run_key({**identity, **made})
    folder = plan.workdir / "sources" / key
    path = folder / "weights.safetensors"
    strategy = make_strategy(plan.distribute)
    if chief_says(strategy, path.exists):
        models.load_weights(model, path)
        say(f"source model: trained before, read from {path}")
    else:
        say(f"source model: training {plan.backbone} from scratch, {plan.source_recipe.iterations} iterations")
        options = {"run_dir": folder, "save": False, "checkpoint_every": plan.checkpoint_every, "verbose": verbose}
        options |= {"strategy": strategy, "jit_compile": plan.jit_compile}
        run = train_source(model, source, plan.source_recipe, **options)
        if is_chief(strategy):
            Anchors.of(model, source.pixels).save(path)
            Checkpoints(folder / "checkpoints").remove()
        wait_for_chief(strategy)
        models.load_weights(model, path)  # the same in every worker, to the bit
        say(f"source model: trained in {run.seconds:.1f} s")
    return detached_copy(model), "scratch"


def _stored_anchors(plan, pretrained, pixels):
    """The anchors of the pre-trained model, and the file under the workdir that all runs share.

    The file also says how the model sees pixels, so that it can be the weights of another fine-tuning.
    """
    anchors = Anchors.of(pretrained, pixels)
    seen = records.run_key(records.plain(pixels))
    path = plan.workdir / "anchors" / f"{anchors.digest[:16]}-{seen}.safetensors"
    if path.exists():
        return Anchors.load(path), path
    if is_chief(make_strategy(plan.distribute)):
        anchors.save(path)
    return anchors, path


def _source_accuracy(pretrained, source, crops):
    classes = pretrained.output_shape[-1]
    if classes != len(source.classes):
        raise InputError(
            f"The pre-trained model has {classes} classes, but {source.name} has {len(source.classes)}: "
            "give the source data it was trained on, or no --source."
        )
    return evaluate(pretrained, source, crops=crops)


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
    f = plan.fisher
    count = len(source.train) if f.images is None else min(f.images, len(source.train))
    identity = {"anchors": anchors.digest, "data": source.digest, "skipped": len(source.train.skipped), "images": count}
    identity |= {"mode": f.mode, "samples": f.samples, "tolerance": f.tolerance, "batch": f.batch if f.tolerance else None}
    seen = {"preprocessing": records.plain(source.preprocessing), "mean": source.mean.tolist(), "code": RESULTS_VERSION}
    key = records.run_key({**identity, **seen})
    path = plan.workdir / "fisher" / f"{key}.safetensors"
    strategy = make_strategy(plan.distribute)
    if chief_says(strategy, path.exists):
        say(f"Fisher diagonal: estimated before, read from {path}")
    else:
        say(f"Fisher diagonal: {f.mode} on up to {count} images of {source.name}")
        order = np.random.default_rng(0).permutation(len(source.train))[:count]  # so that any part is a fair sample
        batches = test_batches(source.train, source.preprocessing, source.mean, batch_size=f.batch, order=order)
        options = {"tolerance": f.tolerance, "progress": bool(verbose), "source": short_name(source.name)}
        if is_chief(strategy):
            fisher = fisher_diagonal(pretrained, batches, f.mode, f.samples, **options)
            fisher.save(path)
            write_histograms(path.parent / "tensorboard" / key, fisher)
        wait_for_chief(strategy)
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
