"""Checks plans before anything is decoded or trained."""

import tempfile

from l2sp_tf.data.datasets import load_dataset
from l2sp_tf.experiments.selection import check_folds
from l2sp_tf.files.errors import InputError
from l2sp_tf.models import keras_files, zoo
from l2sp_tf.models.heads import head_of
from l2sp_tf.models.rescaling import rescaling_of
from l2sp_tf.models.units import unit_count

SMALL = 75  # pixels; no backbone needs larger images


def check_plans(plans):
    """Checks that the files, backbones, data sets and folders of the plans fit together.

    Args:
        plans: a list of `Plan`.

    Raises:
        InputError: names the first mistake.
    """
    for workdir in {plan.setup.workdir for plan in plans}:
        _check_writable(workdir)
    for setup in {plan.setup.key(): plan.setup for plan in plans}.values():
        _check_weights(setup)
    built = {}
    for plan in plans:
        setup = plan.setup
        if not setup.is_whole_model and (setup.recipe.images.crop < SMALL or max(plan.sweep.frozen or (0,))):
            key = (setup.backbone, *setup.shape.values())
            if key not in built:
                built[key] = _units_of(setup)
            plan.sweep.check_frozen(built[key])
    found = {}
    for plan in plans:
        _check_data(plan, found)


def _check_writable(workdir):
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise InputError(f"The workdir {workdir} cannot be written ({error}): give another --workdir.") from error


def _check_weights(setup):
    """Checks that the weights exist, name their pixel format and accept the recipe's images."""
    _ = setup.pixel_format  # raises if it is unknown
    shape = zoo.whole_shape(setup.weights) if setup.is_whole_model else None
    if shape is None:
        return
    *sides, channels = shape
    crop = setup.recipe.images.crop
    if channels not in (None, 3):
        raise InputError(f"{setup.weights} takes images of {channels} channels, but these have 3: give a model of RGB images.")
    _ = zoo.side_of(setup.weights)  # raises if the two sides differ
    if any(side not in (None, crop) for side in sides):
        raise InputError(
            f"{setup.weights} takes images of {'x'.join(str(side or 'any') for side in sides)} pixels, but crop is {crop}: "
            "leave --crop out, or give a model of that size."
        )


def _units_of(setup):
    """Returns the number of units of the backbone; 0 if it has no recognisable units."""
    try:
        model = zoo.backbone(setup.backbone, 2, **setup.shape)
    except InputError:
        raise
    except ValueError as error:  # Keras: the image is below the least size, or a layer would get an empty input
        raise InputError(
            f"Images of {setup.shape['image_size']} pixels are too small for the backbone {setup.backbone} "
            f"({_first_line(error)}): give a larger --crop."
        ) from error
    return unit_count(model)


def _first_line(error):
    return str(error).partition("\n")[0].rstrip(".")[:200]


def _check_data(plan, found):
    """Checks the data sets of a plan against its folds and weights; caches them in `found`."""
    setup, places = plan.setup, plan.setup.places

    def load(spec, **options):
        key = (spec, *places.values(), *options.values())
        if key not in found:
            found[key] = load_dataset(spec, **places, **options)
        return found[key]

    target = load(setup.target, per_class=setup.per_class, seed=setup.subset_seed)
    if plan.sweep.folds and not setup.skip_bad_images:
        check_folds(plan.sweep.folds, target)
    source = None if setup.source is None else load(setup.source, classes=setup.source_classes)
    classes = None if setup.weights in ("none", "imagenet") else keras_files.head_classes(setup.weights)
    classes = 1000 if setup.weights == "imagenet" else classes
    if source is not None and classes is not None:
        check_classes(classes, source)


def check_head(setup, network, source):
    """Checks that a pre-trained network can classify the source's images: it has a head, of as many classes.

    Raises:
        InputError: it cannot.
    """
    if len(network.outputs) != 1:
        raise InputError(f"The model {network.name!r} has {len(network.outputs)} outputs: give a model of one.")
    if not _has_head(setup, network):
        raise InputError(
            f"{setup.weights} has no head, so that it cannot classify the images of {source.name}: give a file with one, or "
            "leave --source out."
        )
    check_classes(network.output_shape[-1], source)


def _has_head(setup, network):
    if setup.is_whole_model:
        return bool(head_of(network).keys)
    return setup.weights in ("none", "imagenet") or keras_files.has_head(setup.weights, network)


def check_rescaling(setup, network, pixels):
    """Checks that a network which rescales pixels itself gets them raw, unless its file or --mean names another mean.

    Raises:
        InputError: it would get other pixels.
    """
    rescaling = rescaling_of(network)
    if rescaling is None or zoo.stored_pixels(setup.weights) is not None:
        return
    if setup.recipe.mean is None and not pixels.is_raw:
        raise InputError(
            f"The network {network.name!r} rescales pixels itself ({rescaling!r}), but --pixels says {pixels}: leave --pixels "
            "out, or name with --mean what is subtracted before."
        )
    if setup.recipe.mean == "authors":  # the default of their protocol, whose networks do not rescale
        raise InputError(
            f"The network {network.name!r} rescales pixels itself ({rescaling!r}), but the authors' means would be subtracted "
            "before: give --mean=weights to subtract nothing, or --mean=training."
        )


def check_classes(count, source):
    """Checks that a pre-trained model has as many classes as its source data.

    Raises:
        InputError: the numbers differ.
    """
    if count != len(source.classes):
        raise InputError(
            f"The pre-trained model has {count} classes, but {source.name} has {len(source.classes)}: "
            "give the source data it was trained on, or leave --source out."
        )
