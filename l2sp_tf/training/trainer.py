"""One run: compiles and fits a plain Keras model by a recipe."""

import contextlib
import dataclasses
import functools
from typing import Any

import keras

from l2sp_tf.data.digests import digest_of_rows
from l2sp_tf.data.given import GivenArrays, GivenStream
from l2sp_tf.data.pipeline import Task, prepare
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
from l2sp_tf.training.inputs import taken_as_given, validation_of
from l2sp_tf.training.monitor import FiniteLoss, Monitor
from l2sp_tf.training.objective import Objective, Validation
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
        interface: the `Interface` of the model: how its images are made, and the class of each output; None if the images were
            the caller's.
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
    """Returns the `Interface` of a network that is trained on a task by a recipe; None if the recipe does not make the images."""
    p = task.preprocessing
    if p is None:
        return None
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
    validation_data: Any = None,
    class_weight: dict[int, float] | None = None,
    num_classes: int | None = None,
    data_name: str | None = None,
    **execution: Any,
) -> Run:
    """Fine-tunes a copy of a pre-trained classifier under a penalty (sections 3 and 4.2).

    The copy gets a new head, which is trained alone first if the recipe has `head_steps`. Weights shared with `pretrained` are
    penalised with `penalty`, the head with L2 of the recipe's beta. `pretrained` itself is unchanged. Python's, NumPy's and
    TensorFlow's random seeds are set to `seed`.

    With a `run_dir` the run is saved there from time to time. If Ctrl-C, SIGTERM or a crash interrupts it, the same call
    resumes from the newest checkpoint. It then ends in the same weights and log as an uninterrupted run: to the bit if
    TensorFlow's operations are deterministic. For streams of the caller's this holds if they give the same batches each time.

    Args:
        pretrained: a built functional or Sequential Keras model.
        data: a `Task`, or a `Dataset`, which the recipe prepares; or what Keras' `fit` takes, with images as the network sees
            them: arrays (x, y) or (x, y, sample_weight), in batches of the recipe that are drawn by `seed`; a `tf.data.Dataset`,
            batched or not; or a `keras.utils.PyDataset`. Streams keep their own batches, and are repeated. Labels are
            integers [n] or [n, 1], or shares of the classes [n, K], one-hot or not.
        penalty: such as `L2SP(0.1)`.
        recipe: a `Recipe`; the paper's by default.
        pixels: for a `Dataset`, the pixel format of `pretrained`: a `PixelFormat`, or "rgb", "bgr", "torch", "tf" or "raw".
            It may be left out for a network that rescales pixels itself, as it sees them "raw".
        anchors: the weights to which the penalty pulls; by default the current weights of `pretrained`.
        fisher: for the Fisher penalties, a mapping from weight to F_jj.
        seed: of the head, the order of the images and their augmentation.
        frozen: how many of the first units to freeze, as in `freeze_first` (Fig. 3); 0 freezes nothing, even if `pretrained`
            has frozen layers.
        validation_data: data of the same forms, of which each row of the log gets "val_cross_entropy" and "val_accuracy"; of
            a `Task` or `Dataset` the test images.
        class_weight: as in Keras' `fit`, a dict from the number of a class to its weight in the loss; other classes weigh 1.
        num_classes: K, where the data do not say it: for streams of integers; for arrays of integers it is by default one
            more than the largest label.
        data_name: a name by which `run_dir` knows streams again; by default it knows them by their first batch.
        execution: any of `run_dir`, `save`, `checkpoint_every`, `strategy`, `jit_compile`, `callbacks` and `verbose`, as
            in `Execution`.

    Returns:
        A `Run`.

    Raises:
        InputError: an argument is wrong, or the devices cannot share it; the checkpoint in `run_dir` is of another
            run; another process is at work there; or a stream ends, or gives a batch that is wrong.
        FloatingPointError: the loss is not finite; the checkpoint before it stays.
        ConnectionError: one of several machines was lost.
    """
    recipe, how = recipe or Recipe(), Execution(**execution)
    task, recipe = task_for(pretrained, data, recipe, pixels, how.say, num_classes=num_classes, name=data_name)
    objective = Objective.of(task, recipe, class_weight)
    validation = validation_of(pretrained, validation_data, task, recipe.batch_size, data_name)
    check_streams(task, validation, how, data_name)
    anchors = Anchors.of(pretrained) if anchors is None else anchors if isinstance(anchors, Snapshot) else Anchors(anchors)
    keras.utils.set_random_seed(seed)
    model = with_new_head(pretrained, len(task.classes), seed=seed, bias=recipe.head_bias, say=how.say)
    penalty = smoothed(penalty, recipe.smoothing if recipe.penalty_step != "proximal" else 0)
    beta = recipe.beta_for(getattr(penalty, "symbol", ""))
    penalise = functools.partial(attach, model, penalty, anchors, beta, params=recipe.params, fisher=fisher)

    def training(anchors, recipe):
        return Training(model, penalise(), anchors, recipe, task, seed, objective, validation)

    seconds = _train_head(model, training, recipe, how) if recipe.head_steps else 0.0
    unfreeze(model)
    if frozen:
        freeze_first(model, frozen)
    set_moving_statistics(model, fresh=recipe.moving_statistics == "fresh" and not frozen, decay=recipe.batch_norm_decay)
    run = _fit(training(anchors, recipe), how)
    return dataclasses.replace(run, seconds=run.seconds + seconds)


def _train_head(model, training, recipe, how):
    """Trains the last layer of a model alone, in place, as a run of its own in the folder head/; returns its seconds."""
    for layer in model._flatten_layers(include_self=False):
        layer.trainable = False
    model.outputs[0]._keras_history.operation.trainable = True
    return _fit(training(None, recipe.for_head()), how.for_head()).seconds


def check_streams(task, validation, how, name):
    """Says what is promised of a run in a folder that reads streams of the caller's.

    Raises:
        InputError: the folder would not know them again, or there is a name but no stream.
    """
    streams = [data for data in (task, validation and validation.data) if isinstance(data, GivenStream)]
    if name is not None and not streams:
        raise InputError(f"data_name is {name!r}, but there is no stream, and arrays are known by their content: leave it out.")
    if how.run_dir is None:
        return
    for stream in streams:
        stream.check_known_again()
    if isinstance(task, GivenStream):
        how.say(
            "The data are a stream: an interrupted run resumes from its checkpoint and skips the batches before it, and ends as "
            "without a stop only if the stream gives the same batches each time."
        )


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
    how = Execution(**execution)
    if isinstance(data, (Task, Dataset)):
        task = as_task(data, recipe, pixels, how.say)
        recipe = recipe.seen_by(task.preprocessing.pixels)
    else:
        task, recipe = taken_as_given(model, data, recipe, pixels, num_classes=model.output_shape[-1])
        check_streams(task, None, how, None)
    keras.utils.set_random_seed(seed)
    alpha = recipe.alpha_for(L2.symbol)
    coverage = attach(model, L2(alpha), None, alpha, params=recipe.params)
    return _fit(Training(model, coverage, None, recipe, task, seed, Objective.of(task, recipe)), how)


def task_for(pretrained, data, recipe, pixels, say, **options):
    """Returns the `Task` of a fine-tuning and its recipe with the mean decided; a network that rescales pixels gets them raw.

    Other data than a `Task` or a `Dataset` are taken as they are (see `taken_as_given`, whose `options` are given).

    Raises:
        InputError: the network cannot be fed with images; the pixel format is unknown; a network that rescales pixels itself
            would get others and the recipe does not name their mean; or the options do not fit the data.
    """
    if isinstance(data, GivenArrays):  # a fold
        return data, recipe
    if not isinstance(data, (Task, Dataset)):
        return taken_as_given(pretrained, data, recipe, pixels, say=say, **options)
    if options.get("num_classes") is not None:
        raise InputError(f"num_classes is {options['num_classes']}, but a {type(data).__name__} has its own: leave it out.")
    check_inputs(pretrained)
    rescaling = rescaling_of(pretrained)
    if isinstance(data, Dataset) and pixels is None:
        if rescaling is None:
            names = f"{', '.join(map(repr, list(PIXELS)[:-1]))} or {list(PIXELS)[-1]!r}"
            raise InputError(f"pixels was not given: say how the pre-trained model sees pixels, {names}.")
        pixels = PIXELS["raw"]
        if recipe.mean is None:
            say(f"The model {pretrained.name!r} rescales pixels itself ({rescaling!r}): it gets them raw, from 0 to 255.")
    task = as_task(data, recipe, pixels, say)
    if rescaling is not None and recipe.mean in (None, "authors") and not task.pixels.is_raw:
        advice = "prepare the task with mean=(0, 0, 0)" if isinstance(data, Task) else 'leave pixels out or give "raw"'
        raise InputError(
            f"The model {pretrained.name!r} rescales pixels itself ({rescaling!r}), but would get them as {task.pixels}: "
            f'{advice}, or name the mean in the recipe, as in mean="training".'
        )
    return task, recipe.seen_by(task.preprocessing.pixels)


def as_task(data, recipe, pixels, say):
    """Returns `data` if it is a `Task`, or prepares a `Dataset` by the recipe and says its remarks; errors as in `finetune`."""
    pixels = None if pixels is None else named_pixels(pixels)
    if isinstance(data, Task):
        if pixels is not None and not pixels.agrees_with(data.preprocessing.pixels):
            raise InputError(f"pixels is {pixels}, but the task was prepared for {data.preprocessing.pixels}: prepare it again.")
        return data
    pixels = pixels or PIXELS["rgb"]
    if remarks := data.remarks():
        say(remarks)
    return prepare(data, recipe.images.with_pixels(pixels), mean=recipe.mean_for(data.name, pixels))


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """The training of one run: model, penalties, data, recipe and seed.

    Attributes:
        model: a Keras model that carries the penalties of `coverage`.
        coverage: the `Coverage`.
        anchors: the `Anchors`, or None.
        recipe: the `Recipe`.
        task: the `Task`, `GivenArrays` or `GivenStream`.
        seed: of the order of the images and their augmentation.
        objective: the `Objective`.
        validation: the `Validation`, or None.
    """

    model: keras.Model
    coverage: Coverage
    anchors: Snapshot | None
    recipe: Recipe
    task: Task | GivenArrays | GivenStream
    seed: int
    objective: Objective
    validation: Validation | None = None

    @property
    def identity(self):
        """A dict that identifies this run, with a hash of all weights."""
        coverage, penalties, images, weights = self.coverage, {}, self.task.preprocessing, self.objective.class_weight
        for weight in coverage.weights:
            penalties.setdefault(weight.group, []).append(str(weight))
        return {
            "recipe": plain(self.recipe.record(images=images is not None)),
            "code": RESULTS_VERSION,
            "seed": self.seed,
            "penalty": {group: sorted(set(texts)) for group, texts in penalties.items()},
            "coverage": coverage.digest,
            "anchors": coverage.anchors_digest,
            "start": Anchors.of(self.model).digest,
            "data": data_identity(self.task),
            **({} if images is None else {"pixels": plain(images.pixels)}),
            **({} if weights is None else {"class_weight": list(weights)}),
            **({} if self.validation is None else {"validation": self.validation.identity}),
        }

    def compile(self, model, jit_compile):
        """Compiles the model, or its copy, and wraps the optimizer if the recipe asks for another penalty step.

        Returns:
            The metrics.
        """
        around = {"proximal": Proximal.of, "decoupled": Decoupled.of}.get(self.recipe.penalty_step)
        optimizer = self.recipe.optimizer()
        optimizer = around(optimizer, model) if around else optimizer
        metrics = self.objective.compile(model, optimizer, jit_compile)
        # otherwise its variables are created while the step is traced, which is then traced twice
        model.optimizer.build(model.trainable_variables)
        return metrics

    def batches(self, first_step, part):
        """Returns one worker's part of each training batch, from a step on."""
        options = {"batch_size": self.recipe.batch_size, "seed": self.seed, "iterations": self.recipe.iterations}
        return self.objective.feed(self.task.train_batches(first_step=first_step, part=part, **options))

    def check_shares(self, devices):
        """Raises an InputError unless devices can get equal shares of each batch."""
        if isinstance(self.task, GivenStream):
            self.task.check_shares(devices.replicas)
        else:
            devices.check_batch_size(self.recipe.batch_size)

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
            images = self.task.preprocessing
            known = {} if images is None else {"pixels": images.pixels.plain()}
            self.anchors.with_metadata(**known).save(path)
        elif Anchors.load(path).digest != self.anchors.digest:
            raise InputError(
                f"{path} holds other anchors than this run starts from: load them with Anchors.load, or give another run_dir."
            )


def _fit(training, how):
    """Fits the model of a `Training`, or its copy on several devices, as an `Execution` says."""
    recipe, devices, folder = training.recipe, how.devices, how.run_dir
    training.check_shares(devices)
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
            options |= {"validation": training.validation, "metrics": metrics if training.objective.has_weights else ()}
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
            with errors_of(training.task):
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


def errors_of(task):
    """Returns a context that raises what went wrong in reading a stream of the caller's."""
    return task.errors() if isinstance(task, GivenStream) else contextlib.nullcontext()


def data_identity(task):
    """Identifies what a task trains on: a dict of its name, its content, its part of it and its mean, where it has them."""
    made = {"name": task.name, "digest": task.digest}
    if not isinstance(task, GivenStream):
        made["images"] = digest_of_rows(task.train)
    return made if task.mean is None else {**made, "mean": task.mean.tolist()}
