"""One run: compiles and fits a plain Keras model by a recipe."""

import contextlib
import dataclasses
import functools
import hashlib
from typing import Any

import keras

from l2sp_tf.data.pipeline import Task, prepare, training_batches
from l2sp_tf.data.sets import Dataset
from l2sp_tf.files.arrays import Snapshot
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.plain import plain
from l2sp_tf.files.provenance import RESULTS_VERSION
from l2sp_tf.files.types import Weights
from l2sp_tf.models.batch_norm import fuse_batch_norm, keep_statistics, set_moving_statistics
from l2sp_tf.models.heads import with_new_head
from l2sp_tf.models.inputs import check_inputs
from l2sp_tf.models.keras_files import save_model
from l2sp_tf.models.pixels import PIXELS, Interface, PixelFormat, named_pixels
from l2sp_tf.models.rescaling import rescaling_of
from l2sp_tf.models.units import freeze_first, unfreeze
from l2sp_tf.optimizers.decoupled import Decoupled
from l2sp_tf.optimizers.proximal import Proximal
from l2sp_tf.penalties.anchors import Anchors
from l2sp_tf.penalties.attachment import AnchorGuard, Coverage, attach
from l2sp_tf.penalties.formulas import L2, Penalty, smoothed
from l2sp_tf.training.checkpoints import Checkpointing, deferred_signals, locked
from l2sp_tf.training.devices import copy_weights, fit
from l2sp_tf.training.execution import Execution
from l2sp_tf.training.monitor import FiniteLoss, Monitor
from l2sp_tf.training.recipe import Recipe


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished run: the fine-tuned model, its penalties, its anchors and its log.

    Attributes:
        model: the fine-tuned `keras.Model`.
        coverage: the `Coverage`.
        anchors: the `Anchors`, or None.
        history: the rows of the log, dicts.
        seconds: training time in seconds, summed over all interrupted attempts.
        resumed_at: the step of the checkpoint from which it resumed, 0 for none.
        stopped_at: the step at which a callback stopped the training early, or None.
        interface: the `Interface` of the model: how its images are made, and the class of each output.
    """

    model: keras.Model
    coverage: Coverage
    anchors: Snapshot | None
    history: list
    seconds: float
    resumed_at: int = 0
    stopped_at: int | None = None
    interface: Interface | None = None


def interface_of(task, recipe):
    """Returns the `Interface` of a network that is trained on a task by a recipe."""
    p = task.preprocessing
    images = (task.pixels, p.resize, p.resize_mode, p.resize_filter, p.crop)
    return Interface(*images, crops=recipe.crops, mean=recipe.mean, classes=task.classes)


def finetune(
    pretrained: keras.Model,
    data: Any,
    penalty: Penalty,
    recipe: Recipe | None = None,
    *,
    pixels: PixelFormat | str | None = None,
    anchors: Weights | None = None,
    fisher: Weights | None = None,
    seed: int = 0,
    frozen: int = 0,
    **execution: Any,
) -> Run:
    """Fine-tunes a copy of a pre-trained classifier under a penalty (sections 3 and 4.2).

    The copy gets a new head, which is trained alone first if the recipe has `head_steps`. Weights shared with `pretrained` are
    penalised with `penalty`, the head with L2 of the recipe's beta. `pretrained` itself is unchanged. Python's, NumPy's and
    TensorFlow's random seeds are set to `seed`.

    With a `run_dir` the run is saved there from time to time. If Ctrl-C, SIGTERM or a crash interrupts it, the same call
    resumes from the newest checkpoint. It then ends in the same weights and log as an uninterrupted run: to the bit if
    TensorFlow's operations are deterministic.

    Args:
        pretrained: a built functional or Sequential Keras model.
        data: a `Task`, or a `Dataset`, which the recipe prepares.
        penalty: such as `L2SP(0.1)`.
        recipe: a `Recipe`; the paper's by default.
        pixels: for a `Dataset`, the pixel format of `pretrained`: a `PixelFormat`, or "rgb", "bgr", "torch", "tf" or "raw".
            It may be left out for a network that rescales pixels itself, as it sees them "raw".
        anchors: the weights to which the penalty pulls; by default the current weights of `pretrained`.
        fisher: for the Fisher penalties, a mapping from weight to F_jj.
        seed: of the head, the order of the images and their augmentation.
        frozen: how many of the first units to freeze, as in `freeze_first` (Fig. 3); 0 freezes nothing, even if `pretrained`
            has frozen layers.
        execution: any of `run_dir`, `save`, `checkpoint_every`, `strategy`, `jit_compile`, `callbacks` and `verbose`, as
            in `Execution`.

    Returns:
        A `Run`.

    Raises:
        InputError: an argument is wrong, or the devices cannot share it; the checkpoint in `run_dir` is of another
            run; or another process is at work there.
        FloatingPointError: the loss is not finite; the checkpoint before it stays.
        ConnectionError: one of several machines was lost.
    """
    recipe, how = recipe or Recipe(), Execution(**execution)
    task, recipe = task_for(pretrained, data, recipe, pixels, how.say)
    anchors = Anchors.of(pretrained) if anchors is None else anchors if isinstance(anchors, Snapshot) else Anchors(anchors)
    keras.utils.set_random_seed(seed)
    model = with_new_head(pretrained, len(task.classes), seed=seed, bias=recipe.head_bias, say=how.say)
    penalty = smoothed(penalty, recipe.smoothing if recipe.penalty_step != "proximal" else 0)
    beta = recipe.beta_for(getattr(penalty, "symbol", ""))
    penalise = functools.partial(attach, model, penalty, anchors, beta, params=recipe.params, fisher=fisher)
    seconds = _train_head(model, penalise, task, recipe, seed, how) if recipe.head_steps else 0.0
    unfreeze(model)
    if frozen:
        freeze_first(model, frozen)
    set_moving_statistics(model, fresh=recipe.moving_statistics == "fresh" and not frozen, decay=recipe.batch_norm_decay)
    run = _fit(Training(model, penalise(), anchors, task, recipe, seed), how)
    return dataclasses.replace(run, seconds=run.seconds + seconds)


def _train_head(model, penalise, task, recipe, seed, how):
    """Trains the last layer of a model alone, in place, as a run of its own in the folder head/; returns its seconds."""
    for layer in model._flatten_layers(include_self=False):
        layer.trainable = False
    model.outputs[0]._keras_history.operation.trainable = True
    return _fit(Training(model, penalise(), None, task, recipe.for_head(), seed), how.for_head()).seconds


def train_source(
    model: keras.Model,
    data: Any,
    recipe: Recipe,
    *,
    pixels: PixelFormat | str | None = None,
    seed: int = 0,
    **execution: Any,
) -> Run:
    """Trains a model from scratch on a source task with L2, Eq. (1), by the same path as `finetune`.

    Args:
        model: a built Keras model with random weights; it is trained in place.
        data, recipe, pixels, seed, execution: as in `finetune`; the strength of L2 is the recipe's, and pixels are RGB by
            default.

    Returns:
        A `Run` without anchors.
    """
    how, task = Execution(**execution), as_task(data, recipe, pixels)
    keras.utils.set_random_seed(seed)
    alpha = recipe.alpha_for(L2.symbol)
    coverage = attach(model, L2(alpha), None, alpha, params=recipe.params)
    return _fit(Training(model, coverage, None, task, recipe.seen_by(task.preprocessing.pixels), seed), how)


def task_for(pretrained, data, recipe, pixels, say):
    """Returns the `Task` of a fine-tuning and its recipe with the mean decided; a network that rescales pixels gets them raw.

    Raises:
        InputError: the network cannot be fed with images; the pixel format is unknown; or a network that rescales pixels
            itself would get others and the recipe does not name their mean.
    """
    check_inputs(pretrained)
    rescaling = rescaling_of(pretrained)
    if isinstance(data, Dataset) and pixels is None:
        if rescaling is None:
            names = f"{', '.join(map(repr, list(PIXELS)[:-1]))} or {list(PIXELS)[-1]!r}"
            raise InputError(f"pixels was not given: say how the pre-trained model sees pixels, {names}.")
        pixels = PIXELS["raw"]
        if recipe.mean is None:
            say(f"The model {pretrained.name!r} rescales pixels itself ({rescaling!r}): it gets them raw, from 0 to 255.")
    task = as_task(data, recipe, pixels)
    if rescaling is not None and recipe.mean in (None, "authors") and not task.pixels.is_raw:
        advice = "prepare the task with mean=(0, 0, 0)" if isinstance(data, Task) else 'leave pixels out or give "raw"'
        raise InputError(
            f"The model {pretrained.name!r} rescales pixels itself ({rescaling!r}), but would get them as {task.pixels}: "
            f'{advice}, or name the mean in the recipe, as in mean="training".'
        )
    return task, recipe.seen_by(task.preprocessing.pixels)


def as_task(data, recipe, pixels):
    """Returns `data` if it is a `Task`, or prepares a `Dataset` by the recipe; errors as in `finetune`."""
    pixels = None if pixels is None else named_pixels(pixels)
    if isinstance(data, Task):
        if pixels is not None and not pixels.agrees_with(data.preprocessing.pixels):
            raise InputError(f"pixels is {pixels}, but the task was prepared for {data.preprocessing.pixels}: prepare it again.")
        return data
    if isinstance(data, Dataset):
        pixels = pixels or PIXELS["rgb"]
        return prepare(data, recipe.images.with_pixels(pixels), mean=recipe.mean_for(data.name, pixels))
    raise InputError(f"data is a {type(data).__name__}: give what l2sp_tf.data.load_dataset or prepare returns.")


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """The training of one run: model, penalties, data, recipe and seed.

    Attributes:
        model: a Keras model that carries the penalties of `coverage`.
        coverage: the `Coverage`.
        anchors: the `Anchors`, or None.
        task: the `Task`.
        recipe: the `Recipe`.
        seed: of the order of the images and their augmentation.
    """

    model: keras.Model
    coverage: Coverage
    anchors: Snapshot | None
    task: Task
    recipe: Recipe
    seed: int

    @property
    def identity(self):
        """A dict that identifies this run, with a hash of all weights."""
        coverage, task, penalties = self.coverage, self.task, {}
        for weight in coverage.weights:
            penalties.setdefault(weight.group, []).append(str(weight))
        return {
            "recipe": plain(self.recipe.record()),
            "code": RESULTS_VERSION,
            "seed": self.seed,
            "penalty": {group: sorted(set(texts)) for group, texts in penalties.items()},
            "coverage": coverage.digest,
            "anchors": coverage.anchors_digest,
            "start": Anchors.of(self.model).digest,
            "data": {"name": task.name, "digest": task.digest, "images": images_digest(task), "mean": task.mean.tolist()},
            "pixels": plain(task.preprocessing.pixels),
        }

    def compile(self, model, jit_compile):
        """Compiles the model, or its copy, and wraps the optimizer if the recipe asks for another penalty step.

        Returns:
            The metrics.
        """
        metrics = [
            keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="cross_entropy"),
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        ]
        around = {"proximal": Proximal.of, "decoupled": Decoupled.of}.get(self.recipe.penalty_step)
        optimizer = self.recipe.optimizer()
        optimizer = around(optimizer, model) if around else optimizer
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=metrics, jit_compile=jit_compile)
        # otherwise its variables are created while the step is traced, which is then traced twice
        model.optimizer.build(model.trainable_variables)
        return metrics

    def batches(self, first_step, part):
        """Returns one worker's part of each training batch, from a step on."""
        task, recipe = self.task, self.recipe
        options = {"batch_size": recipe.batch_size, "seed": self.seed, "iterations": recipe.iterations}
        return training_batches(task.train, task.preprocessing, task.mean, first_step=first_step, part=part, **options)

    def keep_anchors(self, path, step):
        """Saves the anchors beside a new run, or checks those beside a run that resumes after `step`.

        Raises:
            InputError: the saved anchors are missing, or are other anchors.
        """
        if self.anchors is None:
            return
        if not path.exists() and step:
            raise InputError(
                f"{path} is missing, but the run has a checkpoint of step {step}: put the file back, or remove them."
            )
        if not path.exists():
            self.anchors.with_metadata(pixels=self.task.preprocessing.pixels.plain()).save(path)
        elif Anchors.load(path).digest != self.anchors.digest:
            raise InputError(
                f"{path} holds other anchors than this run starts from: load them with Anchors.load, or give another run_dir."
            )


def _fit(training, how):
    """Fits the model of a `Training`, or its copy on several devices, as an `Execution` says."""
    recipe, devices, folder = training.recipe, how.devices, how.run_dir
    devices.check_batch_size(recipe.batch_size)
    # a run without a folder on one device needs no identity, which hashes all weights
    identity = None if folder is None and how.strategy is None else training.identity
    devices.check_same_run(identity)
    trained = devices.replicated(training.model)
    fuse_batch_norm(trained)
    if recipe.batch_norm == "source":
        keep_statistics(trained)
    with contextlib.ExitStack() as stack:
        if how.writes:
            stack.enter_context(locked(folder))
            training.keep_anchors(folder / "anchors.safetensors", how.checkpoints.newest)
        with devices.scope():
            metrics = training.compile(trained, how.jit_compile)
            options = {"log_every": recipe.log_interval, "iterations": recipe.iterations, "may_stop": how.may_stop}
            monitor = Monitor(folder if how.writes else None, training.anchors, **options)
            keeper = Checkpointing(monitor, metrics, recipe.iterations)
            if folder is not None:
                stops = stack.enter_context(deferred_signals()) if devices.is_one_process else ()
                keeper.keep(how.checkpoints, identity, how.checkpoint_every, stops, writes=how.writes)
            resumed_at = keeper.restore(trained)
        devices.check_same_run(resumed_at)
        if resumed_at < recipe.iterations and keeper.stopped_at is None:
            callbacks = [AnchorGuard(training.coverage), FiniteLoss(resumed_at), monitor, keeper, *how.callbacks]
            batches = training.batches(resumed_at, devices.part)
            fit(trained, batches, steps=recipe.iterations - resumed_at, callbacks=callbacks, verbose=how.verbose)
        else:
            monitor.rewrite(trained)
    copy_weights(trained, training.model)
    interface = interface_of(training.task, recipe)
    if how.writes and how.save:
        save_model(training.model, folder / "model.keras", interface)
    if how.writes:
        how.checkpoints.remove(keep=1)
    found = (training.model, training.coverage, training.anchors, monitor.rows)
    return Run(*found, keeper.seconds, resumed_at, keeper.stopped_at, interface)


def images_digest(task):
    """Identifies the part of a data set that a task trains on: a hash in hexadecimal."""
    return hashlib.sha256(task.train.labels.tobytes() + task.train.places.tobytes()).hexdigest()
