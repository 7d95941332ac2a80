"""Fine-tunes a pre-trained network under each penalty and seed, and prints what each gained and lost.

Without flags, trains a small network to recognise scikit-learn's digits. Then fine-tunes it on few images to classify digits
as even or odd, with L2 and L2-SP over several seeds, and prints the table.
"""

import logging
import sys
import time
import warnings

from absl import flags

from l2sp_tf.cli import command
from l2sp_tf.cli.command import Section
from l2sp_tf.files.errors import InputError

FLAGS = flags.FlagValues()

task = Section(FLAGS, "The task")
task.list("target", "digits/target", "Target tasks, named like --source. NAME@N takes N training images of each class.")
task.list(
    "source",
    "",
    "Source tasks: digits/source, a folder <split>/<class>/<file>, a zip of such a folder (X.zip/PREFIX), or a data set that "
    "prepare.py has prepared: imagenet2012, places365_small, stanford_dogs, caltech256, mit_indoors67 or another of TensorFlow "
    "Datasets.",
)
task.string(
    "source_classes",
    None,
    "The classes of the network's outputs in their order, if the source has a part of them: imagenet, or a text file with one "
    "class a line. A line 0-999 stands for numbers, so that the class 7 may be called 007.",
)
task.list(
    "weights",
    "none",
    "Pre-trained weights, one for each source: none (trains a source model), imagenet, a .safetensors, .weights.h5, .h5 or "
    ".keras file, or a preset of KerasHub: its folder, or its name, such as resnet_50_imagenet.",
)
task.integer("per_class", None, "Training images of each target class; by default all (digits: 25).", lower_bound=1)
task.integer("subset_seed", None, "Draw the --per_class images at random; by default take the first (caltech256: seed 0).")
task.string("data_dir", None, "Folder where TensorFlow Datasets keeps its data sets; by default its own.")
task.bool("skip_bad_images", False, "Skip and count images that cannot be decoded, instead of stopping.")

penalties = Section(FLAGS, "The penalties and their strengths")
penalties.list(
    "penalty",
    "l2,l2_sp",
    "Any of l2, l2_sp, l2_sp_fisher, l1_sp, gl_sp, gl_sp_fisher. Strengths may follow after colons: l2:1e-4,l2_sp:0.1:1.",
)
penalties.list("alpha", "", "Strengths of the penalties for which --penalty has none; by default the recipe's.")
penalties.list("beta", "", "Strengths of L2 on the new layer; by default 0.01.")
penalties.enum("params", None, ["kernels", "all"], "Which weights are penalised; by default the protocol's choice.")
penalties.integer(
    "folds",
    None,
    "Number of cross-validation folds that choose alpha, beta and the learning rate. 0 runs every combination. By default 5 in "
    "an experiment, else 0.",
    lower_bound=0,
)
penalties.list("seeds", "0,1,2,3,4", "Random seeds, one run for each.")
penalties.enum(
    "experiment",
    None,
    ["table_2", "table_3", "figure_1", "figure_2", "figure_3", "figure_4", "all"],  # as in experiments.plans
    "Run what a table or figure of the paper needs: its penalties, folds, grids and frozen units.",
)
penalties.list(
    "frozen", "0", "How many of the first units to freeze, one run for each number. all: up to 8 numbers spread evenly."
)

results = Section(FLAGS, "Where results go, and what is kept")
results.string("workdir", None, "Folder for records, logs, models and source models; by default runs/ and the target's name.")
results.string("config", None, "Read flags from a TOML file, such as the config.toml of a run. The command line wins.")
results.bool("dry_run", False, "Print the plan, what it writes and about how long it takes, and stop.")
results.bool("save_models", True, "Keep each fine-tuned model beside its record.")
results.integer(
    "checkpoint_every", 500, "Steps between checkpoints, from which an interrupted run resumes. 0: only the last step."
)
results.integer("log_every", None, "Steps between two rows of a run's log; by default a twentieth of --iterations.")

training = Section(FLAGS, "The training")
training.enum(
    "protocol",
    "paper",
    ["paper", "authors", "network"],
    "Default settings and split of caltech256: the paper's or the authors' code's; network: settings that fit the network, the "
    "image size and the number of images, as Recipe.for_network chooses them.",
)
training.integer("iterations", None, "Steps of fine-tuning.")
training.list("learning_rate", "", "Initial learning rates of fine-tuning; each is divided by 10 after --decay_at steps.")
training.integer("decay_at", None, "Step after which the learning rate is divided by 10; by default two thirds of --iterations.")
training.integer("head_steps", None, "Steps that train the new head alone, before the --iterations; by default 0.", lower_bound=0)
training.float("head_learning_rate", None, "Learning rate of these steps; by default 0.03.")
training.float("label_smoothing", None, "Share of each label that is spread over all classes; by default 0.")
training.integer("batch_size", None, "Images in each step, also when a source model is trained; by default 64.")
training.enum("solver", None, ["sgd", "adam"], "The optimizer: SGD with momentum, as in the paper, or Adam.")
training.float("momentum", None, "Momentum of SGD; by default 0.9.")
training.enum(
    "penalty_step",
    None,
    ["gradient", "proximal", "decoupled"],
    "How the penalty is minimised. gradient: in the loss, as in the paper. proximal: by a proximal map after each step, which "
    "can leave weights exactly at their start. decoupled: by a pull apart from the gradient, for l2, l2_sp and l2_sp_fisher.",
)

images = Section(FLAGS, "The images")
images.integer(
    "resize",
    None,
    "Pixels on a side after resizing, of both sides or of the shorter one; by default the protocol's, in proportion to the crop "
    "of a .keras file.",
)
images.enum("resize_mode", None, ["squash", "shorter_side"], "Squash both sides to --resize, or keep the aspect ratio.")
images.enum("resize_filter", None, ["area", "bilinear"], "Average areas, or interpolate as the authors' code does.")
images.integer("crop", None, "Side of the crop in pixels; by default what a .keras file takes, else the protocol's.")
images.integer("crops", None, "Crops of each test image: 1 (central), or 10 (corners, centre and their mirror images; averaged).")
images.bool("mirror", None, "Mirror training images at random; off for the digits.")
images.list("mean", None, "What to subtract from images: training, authors, weights or R,G,B; by default the protocol's choice.")
images.enum("blur", None, ["gaussian", "authors", "none"], "Random blur. authors: their colour distortion instead.")
images.integer("blur_kernel", None, "Width of the Gaussian blur in pixels, an odd number; by default 5.")
images.list("blur_sigma", None, "Smallest and largest standard deviation of the Gaussian blur in pixels; by default 0.1,2.")

network = Section(FLAGS, "The network")
network.string(
    "backbone",
    "small",
    "small; a network of keras.applications, such as resnet50 or EfficientNetV2B0; efficientnet_lite0 to 2; or a ResNet of "
    "TF-slim or PyTorch, such as resnet50_slim or resnet18_torch. Not for a .keras file or a preset, which is a whole model.",
)
network.enum(
    "pixels",
    None,
    ["rgb", "bgr", "torch", "raw", "tf"],
    "How the weights see pixels, if their file does not say. raw: the network rescales them itself. tf: from -1 to 1.",
)
network.list("widths", "16,32,64", "Channels in each stage of the small backbone.")
network.list("depths", "1,1,1", "Blocks in each stage of the small backbone.")
network.enum("block", "basic", ["basic", "bottleneck"], "Kind of block in the small backbone.")

source = Section(FLAGS, "Training the source model (--weights=none)")
source.integer("source_iterations", None, "Steps of training the source model; by default four times --iterations.")
source.float("source_learning_rate", 0.05, "Initial learning rate of training the source model.")

fisher = Section(FLAGS, "The Fisher diagonal")
fisher.list(
    "fisher_transforms",
    "normalise",
    "Transforms of F_jj, applied in the order given: clip=MAX, epsilon=VALUE, normalise (to mean 1, as the grids assume). none "
    "leaves F_jj raw.",
)
fisher.integer("fisher_images", None, "Source images for F_jj; by default all, or 10,000 of over 50,000.", lower_bound=1)
fisher.enum("fisher_mode", "rademacher", ["rademacher", "mc", "exact"], "How F_jj is estimated on the source images.")
fisher.integer("fisher_samples", 1, "Random draws for each image, in the modes rademacher and mc.", lower_bound=1)
fisher.integer("fisher_batch", 64, "Images in each batch of the estimate. A batch that does not fit is split.", lower_bound=1)
fisher.float("fisher_tolerance", None, "Stop the estimate when the relative error of every layer is at most this.")

protocol = Section(FLAGS, "What the protocol decides")
protocol.float("head_bias", None, "Initial biases of the new head; by default the protocol's.")
protocol.float("smoothing", None, "Added inside the square roots of the penalties; by default the protocol's.")
protocol.enum("moving_statistics", None, ["source", "fresh"], "Initial statistics of batch norm; by default the protocol's.")
protocol.enum(
    "batch_norm",
    None,
    ["batch", "source"],
    "What batch norm normalises by in training: the batch, as in the paper, or the source's statistics, which then stay.",
)
protocol.float("batch_norm_decay", None, "Decay of these statistics during training; by default the protocol's.")

machines = Section(FLAGS, "Machines")
machines.enum("jit_compile", "auto", ["auto", "on", "off"], "Compile the training step with XLA. auto: only on GPUs.")
machines.enum(
    "distribute",
    "none",
    ["none", "mirrored", "multiworker"],
    "Spread each training over all GPUs of this machine (mirrored), or over the machines of TF_CONFIG (multiworker): start the "
    "same command on each, with a --workdir that all of them see.",
)
machines.enum("engine", "local", ["local", "ray"], "Where runs are computed: here one after the other, or on a Ray cluster.")
machines.integer("run_cpus", 1, "CPUs that each run requests from the Ray cluster.", lower_bound=0)
machines.float("run_gpus", 0, "GPUs, or a part of one, that each run requests from the Ray cluster.", lower_bound=0)
machines.bool("deterministic", False, "Use deterministic operations of TensorFlow: a run repeats to the bit on one machine.")

# Flag names of other programs, and the flags that mean the same here.
OTHER_NAMES = {
    **dict.fromkeys(("epochs", "epoch", "steps", "num_steps", "max_steps", "iters"), "iterations"),
    **dict.fromkeys(("lr", "rate", "base_lr", "learning_rates"), "learning_rate"),
    **dict.fromkeys(("model", "checkpoint", "pretrained", "ckpt", "load"), "weights"),
    **dict.fromkeys(("dataset", "data", "images", "train", "train_dir", "input"), "target"),
    **dict.fromkeys(("output", "output_dir", "out", "logdir", "log_dir", "save_dir", "results", "dir"), "workdir"),
    **dict.fromkeys(("seed", "runs", "repeats", "random_seed"), "seeds"),
    **dict.fromkeys(("batch", "bs", "train_batch_size"), "batch_size"),
    **dict.fromkeys(("optimizer", "optim"), "solver"),
    **dict.fromkeys(("regularizer", "penalties", "method"), "penalty"),
    **dict.fromkeys(("alphas", "strength", "strengths", "weight_decay", "wd", "l2_sp"), "alpha"),
    **dict.fromkeys(("arch", "architecture", "network"), "backbone"),
    **dict.fromkeys(("image_size", "img_size", "size", "input_size"), "crop"),
    **dict.fromkeys(("flip", "hflip"), "mirror"),
    **dict.fromkeys(("cv", "cross_validation", "kfold"), "folds"),
    **dict.fromkeys(("freeze", "frozen_layers"), "frozen"),
    **dict.fromkeys(("table", "figure"), "experiment"),
    **dict.fromkeys(("xla", "jit"), "jit_compile"),
    **dict.fromkeys(("recipe", "cfg", "config_file"), "config"),
}


def main(argv=None):
    """Fine-tunes as the command line says, and returns the exit status."""
    return command.run(fine_tune, FLAGS, argv, title=__doc__, others=OTHER_NAMES)


def fine_tune(values, arguments):
    """Runs the plans that the flags describe, and prints the table."""
    if arguments:
        raise InputError(f"The argument {arguments[0]} is unknown: flags start with --, as in --target={arguments[0]}.")
    from l2sp_tf.experiments import interruption
    from l2sp_tf.experiments.configuration import plans_of
    from l2sp_tf.experiments.runner import run_plans
    from l2sp_tf.reports import tables

    logging.getLogger("tensorflow").setLevel(logging.WARNING)  # at INFO it reports every all-reduce
    plans, began = plans_of(values.flag_values_dict()), time.time()
    warn_of_unused(values, plans)
    if values.crop is None:
        print_sizes(plans)
    try:
        records = run_plans(
            plans,
            engine=values.engine,
            cpus=values.run_cpus,
            gpus=values.run_gpus,
            estimate=values.experiment is not None or bool(values.folds),
            dry_run=values.dry_run,
            verbose=1 if sys.stdout.isatty() else 0,
        )
    except KeyboardInterrupt:
        print("\n".join(interruption.kept(plans, began)), file=sys.stderr)
        raise
    if records:
        print("\n" + tables.overview(records).markdown())


def warn_of_unused(values, plans):
    """Warns of each flag that is given but has no effect."""
    from l2sp_tf.experiments.configuration import unused

    given = {name for name in values if values[name].present}
    for name, reason in unused(values.flag_values_dict(), given, plans):
        warnings.warn(f"--{name} is ignored: {reason}", stacklevel=1)


def print_sizes(plans):
    """Prints the image sizes that the .keras files decide."""
    sizes = {plan.setup.weights: plan.setup.recipe.images for plan in plans if plan.setup.is_whole_model}
    for weights, images in sizes.items():
        print(f"{weights}: images are resized to {images.resize} and cropped to {images.crop} pixels")
