"""Fine-tunes a pre-trained network under each penalty and seed, and prints what was gained and lost.

Without flags: trains a small network on scikit-learn's digits (which digit), fine-tunes it on
few images (even or odd) with L2 and with L2-SP over several seeds, and prints the table.
"""

import logging
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags

from l2sp_tf.cli import run_main

STUDIES = ("table_2", "table_3", "figure_1", "figure_2", "figure_3", "figure_4", "all")  # as in l2sp_tf.plans
LEARNING_RATES = (0.005, 0.01, 0.02)  # section 4.2
DEFAULT_FOLDS = 5

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "runs/digits", "Folder for the records, logs, models and cached source models.")
flags.DEFINE_list(
    "source",
    "",
    "Source tasks: digits/source, a folder <split>/<class>/<file>, a zip of one (X.zip/PREFIX), or a data set that prepare.py "
    "has prepared: imagenet2012, places365_small, stanford_dogs, caltech256, mit_indoors67 or another of TensorFlow Datasets.",
)
flags.DEFINE_list("target", "digits/target", "Target tasks, given like --source; with @N, of N training images a class.")
flags.DEFINE_string("data_dir", None, "Where TensorFlow Datasets keeps its sets; by default its own folder.")
flags.DEFINE_integer("per_class", None, "Training images a class of the target; by default all (digits: 25).", lower_bound=1)
flags.DEFINE_integer(
    "subset_seed", None, "Draws the --per_class images at random; by default the first are taken (caltech256: seed 0)."
)
flags.DEFINE_string(
    "backbone",
    "small",
    "small, resnet50, resnet101, resnet152, or one of these of TF-slim or PyTorch: resnet50_slim, resnet18_torch, ...",
)
flags.DEFINE_list("widths", "16,32,64", "Channels of each stage of the small backbone.")
flags.DEFINE_list("depths", "1,1,1", "Blocks of each stage of the small backbone.")
flags.DEFINE_enum("block", "basic", ["basic", "bottleneck"], "Kind of block of the small backbone.")
flags.DEFINE_list(
    "weights",
    "none",
    "none (train the source model), imagenet, or a .safetensors, .weights.h5 or .keras file; one a source.",
)
flags.DEFINE_enum("pixels", None, ["rgb", "bgr", "torch"], "How the weights see pixels, where their file does not say.")
flags.DEFINE_list("mean", None, "Subtracted from images: training, authors, weights or R,G,B; by default as the protocol says.")
flags.DEFINE_enum(
    "experiment", None, list(STUDIES), "What a table or figure of the paper needs: penalties, folds, grids and frozen units."
)
flags.DEFINE_bool("dry_run", False, "Say the plan, what it writes and about how long it takes, and stop.")
flags.DEFINE_enum("engine", "local", ["local", "ray"], "Where the runs are computed: here in turn, or on a Ray cluster.")
flags.DEFINE_enum(
    "distribute",
    "none",
    ["none", "mirrored", "multiworker"],
    "Spread each training over all GPUs here (mirrored), or over the machines of TF_CONFIG, on each of which the same command "
    "is started with a --workdir that all see (multiworker).",
)
flags.DEFINE_integer("run_cpus", 1, "CPUs that a run asks of the Ray cluster.", lower_bound=0)
flags.DEFINE_float("run_gpus", 0, "GPUs, or a part of one, that a run asks of the Ray cluster.", lower_bound=0)
flags.DEFINE_list("penalty", "l2,l2_sp", "Any of l2, l2_sp, l2_sp_fisher, l1_sp, gl_sp, gl_sp_fisher.")
flags.DEFINE_list("alpha", "", "Strengths; by default the recipe's own for each penalty.")
flags.DEFINE_list("beta", "", "Strengths of L2 on the new layer; by default 0.01.")
flags.DEFINE_list("seeds", "0,1,2,3,4", "Seeds, a run for each.")
flags.DEFINE_enum(
    "protocol", "paper", ["paper", "authors"], "Whose numbers are the defaults, and whose split of caltech256 is taken."
)
flags.DEFINE_enum("params", None, ["kernels", "all"], "What is penalised; by default as the protocol says.")
flags.DEFINE_integer("iterations", None, "Steps of fine-tuning.")
flags.DEFINE_integer("source_iterations", None, "Steps of training the source model; by default four times --iterations.")
flags.DEFINE_list("learning_rate", "", "Initial rates of fine-tuning, divided by 10 after two thirds of the steps.")
flags.DEFINE_enum("solver", None, ["sgd", "adam"], "The optimizer: SGD with momentum, as in the paper, or Adam.")
flags.DEFINE_enum(
    "penalty_step",
    None,
    ["gradient", "proximal", "decoupled"],
    "How the penalty is minimised: in the loss, as in the paper; by a proximal map after each step, which leaves weights "
    "exactly at the start; or, for l2 and l2_sp(_fisher), by a pull apart from the gradient.",
)
flags.DEFINE_integer("folds", 0, "Folds of the training images that choose alpha, beta and the rate; 0: every one is run.")
flags.DEFINE_list("frozen", "0", "Numbers of first units that are frozen; all: up to 8 numbers spread over them.")
flags.DEFINE_float("source_learning_rate", 0.05, "Initial rate of training the source model.")
flags.DEFINE_integer("batch_size", None, "Images a step.")
flags.DEFINE_integer("resize", None, "Pixels on a side after resizing, of both sides or of the shorter one.")
flags.DEFINE_enum("resize_mode", None, ["squash", "shorter_side"], "Squash both sides to --resize, or keep the aspect.")
flags.DEFINE_enum("resize_filter", None, ["area", "bilinear"], "Average areas, or interpolate as the authors' code does.")
flags.DEFINE_integer("crop", None, "Side of the crop, in pixels.")
flags.DEFINE_integer("crops", None, "Crops of each test image: 1 (central), or 10 (corners, centre, mirrored; averaged).")
flags.DEFINE_enum("blur", None, ["gaussian", "authors", "none"], "Random blur; authors: their colour distortion instead.")
flags.DEFINE_bool("mirror", None, "Random mirror; off for the digits.")
flags.DEFINE_bool("skip_bad_images", False, "Leave out images that cannot be decoded, and count them, instead of stopping.")
flags.DEFINE_enum(
    "jit_compile", "auto", ["auto", "on", "off"], "Compile the training step by XLA; auto: on a GPU, as on CPUs it is slower."
)
flags.DEFINE_bool("save_models", True, "Keep each fine-tuned model beside its record.")
flags.DEFINE_integer(
    "checkpoint_every", 500, "Steps between two checkpoints, from which an interrupted run goes on; 0: the last step alone."
)
flags.DEFINE_bool("deterministic", False, "Repeat to the bit on one machine: TensorFlow's operations are made deterministic.")
flags.DEFINE_enum("fisher_mode", "rademacher", ["rademacher", "mc", "exact"], "How F_jj is estimated on the source images.")
flags.DEFINE_integer("fisher_samples", 1, "Draws for each image, in the modes rademacher and mc.", lower_bound=1)
flags.DEFINE_integer("fisher_images", None, "Source images for F_jj; by default all of up to 50,000, or 10,000 of more.", lower_bound=1)
flags.DEFINE_integer("fisher_batch", 64, "Images a batch of that pass; one that does not fit is split.", lower_bound=1)
flags.DEFINE_float("fisher_tolerance", None, "Stop that pass when the relative error of every layer is at most this.")
flags.DEFINE_list("fisher_transforms", "", "Applied to F_jj in this order: clip=MAX, epsilon=VALUE, normalise (to mean 1).")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]}: flags start with --")
    from l2sp_tf import report
    from l2sp_tf.experiments import run_plans

    logging.getLogger("tensorflow").setLevel(logging.WARNING)  # below, it tells of each all-reduce that it traces
    plans = plans_from_flags()
    options = {"engine": FLAGS.engine, "cpus": FLAGS.run_cpus, "gpus": FLAGS.run_gpus, "dry_run": FLAGS.dry_run}
    estimate = FLAGS.experiment is not None or FLAGS.folds > 0
    records = run_plans(plans, **options, estimate=estimate, verbose=1 if sys.stdout.isatty() else 0)
    if records:
        print("\n" + report.overview(records).markdown())


def plans_from_flags():
    """The plans that the flags describe: one for each source and target, or those of an experiment."""
    from l2sp_tf.errors import InputError
    from l2sp_tf.plans import study

    sources, weights = FLAGS.source or [None], FLAGS.weights
    if len(weights) not in (1, len(sources)):
        raise InputError(
            f"There are {len(sources)} sources but {len(weights)} weights: give one for each source, or one for all."
        )
    pairs = zip(sources, weights * (len(sources) if len(weights) == 1 else 1), strict=True)
    plans = [plan_from_flags(source, weight, target) for source, weight in pairs for target in FLAGS.target]
    return plans if FLAGS.experiment is None else [part for plan in plans for part in study(FLAGS.experiment, plan)]


def plan_from_flags(source, weights, target):
    """The plan that the flags describe for one pair of tasks."""
    from l2sp_tf.plans import FisherPlan, Plan

    name, _, count = target.rpartition("@")
    target, per_class = (name, int(count)) if name and count.isdigit() else (target, FLAGS.per_class)
    is_digits = target == "digits/target"
    recipe, source_recipe = recipes_from_flags(is_digits)
    folds = FLAGS.folds or (DEFAULT_FOLDS if FLAGS.experiment is not None else 0)
    rates = _numbers("learning_rate", float) or (LEARNING_RATES if folds else ())
    return Plan(
        workdir=pathlib.Path(FLAGS.workdir),
        source=source or ("digits/source" if is_digits else None),
        target=target,
        backbone=FLAGS.backbone,
        weights=weights,
        pixels=FLAGS.pixels,
        penalties=tuple(FLAGS.penalty),
        alphas=_numbers("alpha", float),
        betas=_numbers("beta", float),
        learning_rates=rates,
        frozen=None if FLAGS.frozen == ["all"] else _numbers("frozen", int),
        folds=folds,
        seeds=_numbers("seeds", int),
        recipe=recipe,
        source_recipe=source_recipe,
        widths=_numbers("widths", int),
        depths=_numbers("depths", int),
        block=FLAGS.block,
        per_class=25 if is_digits and per_class is None else per_class,
        subset_seed=FLAGS.subset_seed,
        protocol=FLAGS.protocol,
        data_dir=FLAGS.data_dir,
        skip_bad_images=FLAGS.skip_bad_images,
        save_models=FLAGS.save_models,
        checkpoint_every=FLAGS.checkpoint_every,
        deterministic=FLAGS.deterministic,
        distribute=FLAGS.distribute,
        jit_compile={"auto": "auto", "on": True, "off": False}[FLAGS.jit_compile],
        fisher=FisherPlan(
            mode=FLAGS.fisher_mode,
            samples=FLAGS.fisher_samples,
            images=FLAGS.fisher_images,
            batch=FLAGS.fisher_batch,
            tolerance=FLAGS.fisher_tolerance,
            # the grids that cross-validation searches are for an F_jj of mean 1
            transforms=_transforms() or ((("normalise", None),) if folds else ()),
        ),
    )


def recipes_from_flags(is_digits):
    """The recipes of fine-tuning and of training a source model."""
    from l2sp_tf.recipe import Recipe

    recipe = Recipe.paper() if FLAGS.protocol == "paper" else Recipe.authors()
    if is_digits:
        recipe = Recipe.digits(recipe)
    names = ("params", "iterations", "batch_size", "resize", "resize_mode", "resize_filter", "crop", "crops", "blur", "mirror")
    names += ("solver", "penalty_step")
    given = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    if FLAGS.mean is not None:
        given["mean"] = tuple(FLAGS.mean) if len(FLAGS.mean) > 1 else FLAGS.mean[0]
    recipe = recipe.replace(**given)
    if FLAGS.iterations is not None:
        recipe = recipe.replace(decay_at=None)
    source_recipe = Recipe.source(recipe).replace(learning_rate=FLAGS.source_learning_rate)
    if FLAGS.source_iterations is not None:
        source_recipe = source_recipe.replace(iterations=FLAGS.source_iterations)
    return recipe, source_recipe


def _transforms():
    """The pairs of name and value that --fisher_transforms lists."""
    from l2sp_tf.errors import InputError

    pairs = [text.partition("=") for text in FLAGS.fisher_transforms if text]
    try:
        return tuple((name, float(value) if equals else None) for name, equals, value in pairs)
    except ValueError:
        given = ",".join(FLAGS.fisher_transforms)
        raise InputError(f"--fisher_transforms={given} is not understood: give clip=MAX, epsilon=VALUE or normalise.") from None


def _numbers(name, kind):
    from l2sp_tf.errors import InputError

    try:
        return tuple(kind(value) for value in FLAGS[name].value if value)
    except ValueError:
        raise InputError(
            f"--{name}={','.join(FLAGS[name].value)} is no list of numbers: give them with commas between."
        ) from None


if __name__ == "__main__":
    run_main(main)
