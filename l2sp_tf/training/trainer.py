"""One run: a plain Keras model is compiled and fitted by a recipe."""

import contextlib
import dataclasses
import hashlib
import pathlib

import keras

from l2sp_tf.data.pipeline import Preprocessing, Task, prepare, training_batches
from l2sp_tf.data.sets import Dataset
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.plain import plain
from l2sp_tf.files.provenance import RESULTS_VERSION
from l2sp_tf.models.batch_norm import fuse_batch_norm, set_moving_statistics
from l2sp_tf.models.heads import with_new_head
from l2sp_tf.models.pixels import PIXELS, Interface, named_pixels
from l2sp_tf.models.units import freeze_first, unfreeze
from l2sp_tf.models.zoo import save_model
from l2sp_tf.optimizers.decoupled import Decoupled
from l2sp_tf.optimizers.proximal import Proximal
from l2sp_tf.penalties.anchors import Anchors
from l2sp_tf.penalties.attachment import AnchorGuard, Coverage, attach
from l2sp_tf.penalties.formulas import L2, smoothed
from l2sp_tf.training import devices
from l2sp_tf.training.checkpoints import Checkpointing, Checkpoints, deferred_signals, locked
from l2sp_tf.training.monitor import FiniteLoss, Monitor
from l2sp_tf.training.recipe import Recipe

CHECKPOINT_EVERY = 500  # steps


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished run: the fine-tuned model, what was penalised, where it started, and its log.

    Attributes:
        model: the fine-tuned `keras.Model`.
        coverage: the `Coverage`.
        anchors: the `Anchors`, or None.
        history: the rows of the log, dicts.
        seconds: the time of training, before interruptions too.
        resumed_at: the step at which a checkpoint was taken up, 0 for none.
        stopped_at: the step at which a callback stopped the training before its end, or None.
        interface: the `Interface` of the model: how its images are made, and which output is which class.
    """

    model: keras.Model
    coverage: Coverage
    anchors: Anchors | None
    history: list
    seconds: float
    resumed_at: int = 0
    stopped_at: int | None = None
    interface: Interface | None = None


def preprocessing_of(recipe, pixels=PIXELS["rgb"]):
    """The `Preprocessing` that a recipe asks for, for a network that sees pixels in this format."""
    names = ("resize", "resize_mode", "resize_filter", "crop", "blur", "blur_kernel", "blur_sigma", "mirror")
    return Preprocessing(**{name: getattr(recipe, name) for name in names}, pixels=pixels)


def interface_of(task, recipe):
    """The `Interface` of a network that is trained on a task by a recipe."""
    p = task.preprocessing
    images = (task.pixels, p.resize, p.resize_mode, p.resize_filter, p.crop)
    return Interface(*images, crops=recipe.crops, mean=recipe.mean, classes=task.classes)


def finetune(
    pretrained,
    data,
    penalty,
    recipe=None,
    *,
    pixels=None,
    anchors=None,
    fisher=None,
    seed=0,
    frozen=0,
    run_dir=None,
    callbacks=(),
    verbose=1,
    save=True,
    checkpoint_every=CHECKPOINT_EVERY,
    strategy=None,
    jit_compile="auto",
):
    """Fine-tunes a copy of a pre-trained classifier under a penalty (sections 3 and 4.2).

    The copy gets a new head; weights shared with `pretrained` are penalised with `penalty`,
    the head with L2 of the recipe's beta. `pretrained` itself is not changed. Python's,
    NumPy's and TensorFlow's random seeds are set to `seed`.

    With a `run_dir` the run is saved there from time to time. If it is cut off, by Ctrl-C, SIGTERM or a
    crash, the same call takes up the newest checkpoint, and ends in the same weights and log as a run
    that was not cut off: to the bit where TensorFlow's operations are deterministic.

    Args:
        pretrained: a built functional or Sequential Keras model.
        data: a `Task`, or a `Dataset`, which is prepared by the recipe.
        penalty: such as `L2SP(0.1)`.
        recipe: a `Recipe`; the paper's by default.
        pixels: for a `Dataset`, how `pretrained` sees pixels: a `PixelFormat`, or "rgb", "bgr" or "torch".
        anchors: where the penalty pulls to; by default the weights of `pretrained` now.
        fisher: for the Fisher penalties a mapping from weight to F_jj.
        seed: of the head, the order of the images and their augmentation.
        frozen: how many of the first units are frozen, as in `freeze_first` (Fig. 3); with 0 nothing is, whatever is frozen
            in `pretrained`.
        run_dir: a folder for the log, TensorBoard, checkpoints, `anchors.safetensors` and `model.keras`;
            None writes nothing.
        callbacks: more Keras callbacks; what they remember is not in the checkpoints. A run that one of them stops is over:
            it has its log, its checkpoint and its model, and the same call does not go on with it.
        verbose: of Keras `fit`: 1 shows a progress bar with the time left.
        save: whether `model.keras` is written to `run_dir`.
        checkpoint_every: steps between two checkpoints; 0 for none but the last step's.
        strategy: the devices to train on, from `distribution.make_strategy`; None for one. On several machines the
            function is called on each, and the first writes `run_dir`.
        jit_compile: whether XLA compiles the step, as Keras' `compile` takes it: True, False or "auto".

    Returns:
        A `Run`.

    Raises:
        InputError: a bad argument, or one that the devices cannot share; the checkpoint in `run_dir` is of another
            run; another process is at work there.
        FloatingPointError: the loss is not finite; the checkpoint before it stays.
        ConnectionError: one of several machines was lost.
    """
    recipe = recipe or Recipe()
    if isinstance(data, Dataset) and pixels is None:
        raise InputError('pixels was not given: say how the pre-trained model sees pixels, "rgb", "bgr" or "torch".')
    task = as_task(data, recipe, pixels)
    anchors = anchors if anchors is not None else Anchors.of(pretrained)
    keras.utils.set_random_seed(seed)
    say = print if verbose else _say_nothing
    model = with_new_head(pretrained, len(task.classes), seed=seed, bias=recipe.head_bias, say=say)
    unfreeze(model)
    if frozen:
        freeze_first(model, frozen)
    set_moving_statistics(model, fresh=recipe.moving_statistics == "fresh" and not frozen, decay=recipe.batch_norm_decay)
    penalty = smoothed(penalty, recipe.smoothing if recipe.penalty_step != "proximal" else 0)
    beta = recipe.beta_for(getattr(penalty, "symbol", ""))
    coverage = attach(model, penalty, anchors, beta, params=recipe.params, fisher=fisher)
    folder = None if run_dir is None else _RunFolder(run_dir, save, checkpoint_every)
    return _fit(model, coverage, anchors, task, recipe, seed, folder, callbacks, verbose, strategy, jit_compile)


def _say_nothing(line):
    """Takes the lines that a quiet run does not print."""


def train_source(
    model,
    data,
    recipe,
    *,
    pixels=None,
    seed=0,
    run_dir=None,
    callbacks=(),
    verbose=1,
    save=True,
    checkpoint_every=CHECKPOINT_EVERY,
    strategy=None,
    jit_compile="auto",
):
    """Trains a model from scratch on a source task with L2, Eq. (1), by the same path as `finetune`.

    Args:
        model: a built Keras model with random weights, which is trained in place.
        data, recipe, pixels, seed, run_dir, callbacks, verbose, save, checkpoint_every, strategy, jit_compile: as in
            `finetune`; the strength of L2 is the recipe's, and pixels are RGB by default.

    Returns:
        A `Run` without anchors.
    """
    task = as_task(data, recipe, pixels)
    keras.utils.set_random_seed(seed)
    alpha = recipe.alpha_for(L2.symbol)
    coverage = attach(model, L2(alpha), None, alpha, params=recipe.params)
    folder = None if run_dir is None else _RunFolder(run_dir, save, checkpoint_every)
    return _fit(model, coverage, None, task, recipe, seed, folder, callbacks, verbose, strategy, jit_compile)


def as_task(data, recipe, pixels):
    """The `Task` that `data` is, or that it becomes when it is prepared by the recipe; errors as in `finetune`."""
    pixels = None if pixels is None else named_pixels(pixels)
    if isinstance(data, Task):
        if pixels is not None and not pixels.agrees_with(data.preprocessing.pixels):
            raise InputError(f"pixels is {pixels}, but the task was prepared for {data.preprocessing.pixels}: prepare it again.")
        return data
    if isinstance(data, Dataset):
        pixels = pixels or PIXELS["rgb"]
        return prepare(data, preprocessing_of(recipe, pixels), mean=recipe.mean_for(data.name, pixels))
    raise InputError(f"data is a {type(data).__name__}: give what l2sp_tf.data.load_dataset or prepare returns.")


class _RunFolder:
    """The folder of a run, and what is kept there."""

    def __init__(self, path, save, checkpoint_every):
        if checkpoint_every < 0:
            raise InputError(f"checkpoint_every is {checkpoint_every}: give a number of steps, or 0 for the last step alone.")
        self.path, self.save, self.checkpoint_every = pathlib.Path(path), save, checkpoint_every
        self.checkpoints = Checkpoints(self.path / "checkpoints")


def _fit(model, coverage, anchors, task, recipe, seed, folder, callbacks, verbose, strategy, jit_compile):
    """Compiles and fits `model`, which carries the penalties of `coverage`, or a copy of it on the devices of a strategy.

    Of several machines the first alone writes to the `_RunFolder`; all read its checkpoints.
    """
    devices.check_batch_size(strategy, recipe.batch_size)
    # hashes all weights, which a run that nobody else takes part in and that is not kept does not need
    identity = None if folder is None and strategy is None else _identity(model, coverage, task, recipe, seed)
    devices.check_same_run(strategy, identity)
    writes = folder is not None and devices.is_chief(strategy)
    trained = devices.replicated(model, strategy)
    fuse_batch_norm(trained)
    with contextlib.ExitStack() as stack:
        if writes:
            stack.enter_context(locked(folder.path))
            if anchors is not None:
                kept = anchors.with_metadata(pixels=task.preprocessing.pixels.plain())
                _keep_anchors(kept, folder.path / "anchors.safetensors", folder.checkpoints.newest)
        with devices.scope(strategy):
            metrics = _compile(trained, recipe, jit_compile)
            options = {"log_every": recipe.log_interval, "iterations": recipe.iterations}
            options["may_stop"] = any(getattr(callback, "may_stop", True) for callback in callbacks)
            monitor = Monitor(folder.path if writes else None, anchors, **options)
            keeper = Checkpointing(monitor, metrics, recipe.iterations)
            if folder is not None:
                stops = stack.enter_context(deferred_signals()) if devices.is_one_process(strategy) else ()
                keeper.keep(folder.checkpoints, identity, folder.checkpoint_every, stops, writes=writes)
            start = keeper.restore(trained)
        devices.check_same_run(strategy, start)
        if start < recipe.iterations and keeper.stopped_at is None:
            callbacks = [AnchorGuard(coverage), FiniteLoss(start), monitor, keeper, *callbacks]
            options = {"seed": seed, "start": start, "iterations": recipe.iterations, "part": devices.part_of(strategy)}
            batches = training_batches(task.train, task.preprocessing, task.mean, batch_size=recipe.batch_size, **options)
            devices.fit(trained, batches, steps=recipe.iterations - start, callbacks=callbacks, verbose=verbose)
        else:
            monitor.rewrite(trained)
    devices.copy_weights(trained, model)
    interface = interface_of(task, recipe)
    if writes and folder.save:
        save_model(model, folder.path / "model.keras", interface)
    if writes:
        folder.checkpoints.remove(keep=1)
    return Run(model, coverage, anchors, monitor.rows, keeper.seconds, start, keeper.stopped_at, interface)


def _compile(model, recipe, jit_compile):
    """Compiles a model, with what takes the step of its penalties if the recipe asks for it; returns the metrics."""
    metrics = [
        keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="cross_entropy"),
        keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
    ]
    around = {"proximal": Proximal.of, "decoupled": Decoupled.of}.get(recipe.penalty_step)
    optimizer = around(recipe.optimizer(), model) if around else recipe.optimizer()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=metrics, jit_compile=jit_compile)
    model.optimizer.build(model.trainable_variables)  # else they are made while the step is traced, which is then traced twice
    return metrics


def _identity(model, coverage, task, recipe, seed):
    """What makes a run this one and no other."""
    penalties = {}
    for weight in coverage.weights:
        penalties.setdefault(weight.group, []).append(str(weight))
    return {
        "recipe": plain(recipe.record()),
        "code": RESULTS_VERSION,
        "seed": seed,
        "penalty": {group: sorted(set(texts)) for group, texts in penalties.items()},
        "coverage": coverage.digest,
        "anchors": coverage.anchors_digest,
        "start": Anchors.of(model).digest,
        "data": {"name": task.name, "digest": task.digest, "images": images_digest(task), "mean": task.mean.tolist()},
        "pixels": plain(task.preprocessing.pixels),
    }


def images_digest(task):
    """Tells which part of its data set a task trains on: a hash in hexadecimal."""
    return hashlib.sha256(task.train.labels.tobytes() + task.train.places.tobytes()).hexdigest()


def _keep_anchors(anchors, path, step):
    """Saves the anchors beside a new run, or stops if those of one that goes on after `step` are lost or others."""
    if not path.exists() and step:
        raise InputError(f"{path} is missing, but the run has a checkpoint of step {step}: put the file back, or remove them.")
    if not path.exists():
        anchors.save(path)
    elif Anchors.load(path).digest != anchors.digest:
        raise InputError(
            f"{path} holds other anchors than this run starts from: load them with Anchors.load, or give another run_dir."
        )
