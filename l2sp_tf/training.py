"""One run: a plain Keras model is compiled and fitted by a recipe."""

import dataclasses
import pathlib
import time

import keras

from l2sp_tf.anchors import Anchors
from l2sp_tf.attach import AnchorGuard, Coverage, attach
from l2sp_tf.data import Dataset, Preprocessing, Task, prepare, training_batches
from l2sp_tf.errors import InputError
from l2sp_tf.models import freeze_first, save_model, with_new_head
from l2sp_tf.monitor import FiniteLoss, Monitor
from l2sp_tf.pixels import PIXELS, named_pixels
from l2sp_tf.recipe import Recipe
from l2sp_tf.regularizers import L2


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished run: the fine-tuned model, what was penalised, where it started, and its log."""

    model: keras.Model
    coverage: Coverage
    anchors: Anchors | None
    history: list
    seconds: float


def preprocessing_of(recipe, pixels=PIXELS["rgb"]):
    """The `Preprocessing` that a recipe asks for, for a network that sees pixels in this format."""
    names = ("resize", "resize_mode", "resize_filter", "crop", "blur", "blur_kernel", "blur_sigma", "mirror")
    return Preprocessing(**{name: getattr(recipe, name) for name in names}, pixels=pixels)


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
):
    """Fine-tunes a copy of a pre-trained classifier under a penalty (sections 3 and 4.2).

    The copy gets a new head; weights shared with `pretrained` are penalised with `penalty`,
    the head with L2 of strength `recipe.beta`. `pretrained` itself is not changed. Python's,
    NumPy's and TensorFlow's random seeds are set to `seed`.

    Args:
        pretrained: a built functional or Sequential Keras model.
        data: a `Task`, or a `Dataset`, which is prepared by the recipe.
        penalty: such as `L2SP(0.1)`.
        recipe: a `Recipe`; the paper's by default.
        pixels: for a `Dataset`, how `pretrained` sees pixels: a `PixelFormat`, or "rgb", "bgr" or "torch".
        anchors: where the penalty pulls to; by default the weights of `pretrained` now.
        fisher: for the Fisher penalties a mapping from weight to F_jj.
        seed: of the head, the order of the images and their augmentation.
        frozen: how many of the first units are frozen, as in `freeze_first` (Fig. 3).
        run_dir: a folder for the log, TensorBoard, `anchors.safetensors` and `model.keras`;
            None writes nothing.
        callbacks: more Keras callbacks.
        verbose: of Keras `fit`: 1 shows a progress bar with the time left.
        save: whether `model.keras` is written to `run_dir`.

    Returns:
        A `Run`.

    Raises:
        InputError: a bad argument.
        FloatingPointError: the loss is not finite.
    """
    recipe = recipe or Recipe()
    if isinstance(data, Dataset) and pixels is None:
        raise InputError('pixels was not given: say how the pre-trained model sees pixels, "rgb", "bgr" or "torch".')
    task = as_task(data, recipe, pixels)
    anchors = anchors if anchors is not None else Anchors.of(pretrained)
    keras.utils.set_random_seed(seed)
    model = with_new_head(pretrained, len(task.classes), seed=seed)
    if frozen:
        freeze_first(model, frozen)
    coverage = attach(model, penalty, anchors, recipe.beta, params=recipe.params, fisher=fisher)
    return _fit(model, coverage, anchors, task, recipe, seed, run_dir, callbacks, verbose, save)


def train_source(model, data, recipe, *, pixels=None, seed=0, run_dir=None, callbacks=(), verbose=1, save=True):
    """Trains a model from scratch on a source task with L2, Eq. (1), by the same path as `finetune`.

    Args:
        model: a built Keras model with random weights, which is trained in place.
        data, recipe, pixels, seed, run_dir, callbacks, verbose, save: as in `finetune`; the strength of L2
            is the recipe's, and pixels are RGB by default.

    Returns:
        A `Run` without anchors.
    """
    task = as_task(data, recipe, pixels)
    keras.utils.set_random_seed(seed)
    alpha = recipe.alpha_for(L2.symbol)
    coverage = attach(model, L2(alpha), None, alpha, params=recipe.params)
    return _fit(model, coverage, None, task, recipe, seed, run_dir, callbacks, verbose, save)


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


def _fit(model, coverage, anchors, task, recipe, seed, run_dir, callbacks, verbose, save):
    """Compiles and fits `model`, which carries the penalties of `coverage`."""
    if run_dir is not None and anchors is not None:
        _keep_anchors(anchors, pathlib.Path(run_dir) / "anchors.safetensors")
    model.compile(
        optimizer=recipe.optimizer(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="cross_entropy"),
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        ],
    )
    batches = training_batches(
        task.train, task.preprocessing, task.mean, batch_size=recipe.batch_size, seed=seed, iterations=recipe.iterations
    )
    monitor = Monitor(run_dir, anchors, log_every=recipe.log_interval, iterations=recipe.iterations)
    began = time.monotonic()
    # One Keras epoch is the whole run, so that the progress bar tells the time left of the run.
    model.fit(
        batches,
        epochs=1,
        steps_per_epoch=recipe.iterations,
        callbacks=[AnchorGuard(coverage), FiniteLoss(), monitor, *callbacks],
        shuffle=False,  # the batches come shuffled
        verbose=verbose,
    )
    seconds = time.monotonic() - began
    if run_dir is not None and save:
        save_model(model, pathlib.Path(run_dir) / "model.keras", task.pixels)
    return Run(model, coverage, anchors, monitor.rows, seconds)


def _keep_anchors(anchors, path):
    """Saves the anchors beside the run, or stops if the folder holds those of another start."""
    if not path.exists():
        anchors.save(path)
    elif Anchors.load(path).digest != anchors.digest:
        raise InputError(
            f"{path} holds other anchors than this run starts from: load them with Anchors.load, or give another run_dir."
        )
