"""Turns the flags of train.py into plans, and a run back into the TOML file that repeats it.

Values are keyed by flag name. A value that is missing or None takes the default of its flag.
"""

import dataclasses
import json
import pathlib

from l2sp_tf.data.datasets import load_dataset
from l2sp_tf.data.pipeline import Preprocessing
from l2sp_tf.experiments.plans import FisherPlan, Plan, Setup, cache_of, study
from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError
from l2sp_tf.models import zoo
from l2sp_tf.penalties.formulas import load_registered
from l2sp_tf.training.recipe import IMAGES, Recipe

DEFAULT_FOLDS = 5  # for --experiment
DIGITS = ("digits/source", "digits/target")
SWEPT = ("alpha", "beta", "learning_rate")  # recipe fields that the flags give as lists
RECIPE = [field.name for field in dataclasses.fields(Recipe) if field.name not in (*SWEPT, "images")] + list(IMAGES)
# plan fields whose flag has the same name and value
PLAIN = (
    *("data_dir", "subset_seed", "protocol", "block", "pixels", "skip_bad_images", "save_models", "checkpoint_every"),
    *("deterministic", "distribute", "backbone", "source_classes"),
)
JIT = {"auto": "auto", "on": True, "off": False}
OF_BACKBONE = ("backbone", "widths", "depths", "block")


def plans_of(values, say=print):
    """Makes one plan for each pair of source and target, or the plans of an experiment.

    Args:
        values: a dict from flag name to value.
        say: called with a line on the settings that were chosen for a network.

    Raises:
        InputError: a value is wrong, or two values contradict each other.
    """
    load_registered()
    for name in ("target", "weights", "penalty"):
        if values.get(name) is not None and not any(values[name]):
            raise InputError(f"--{name} is empty: give a value, or leave it out.")
    sources = _whole_paths("source", values.get("source") or [None])
    weights = _whole_paths("weights", values.get("weights") or ["none"])
    targets = _whole_paths("target", values.get("target") or [DIGITS[1]])
    if len(weights) not in (1, len(sources)):
        raise InputError(
            f"There are {len(sources)} sources but {len(weights)} weights: give one for each source, or one for all."
        )
    pairs = zip(sources, weights * (len(sources) if len(weights) == 1 else 1), strict=True)
    plans = [_plan(values, source, weight, target, targets, say) for source, weight in pairs for target in targets]
    if values.get("experiment") is None:
        return plans
    parts = [part for plan in plans for part in study(values["experiment"], plan)]
    for symbol in plans[0].sweep.strengths:
        if not any(symbol in part.sweep.penalties for part in parts):
            raise InputError(f"--penalty gives strengths of {symbol}, which the experiment {values['experiment']} does not run.")
    return parts


def default_workdir(targets):
    """Returns the default workdir of a task: runs/ and the name of its data set."""
    names = []
    for target in targets:
        path = pathlib.PurePath(_counted(target)[0])
        name = "digits" if str(path) == DIGITS[1] else path.name.removesuffix(".zip")
        names.append(name or "task")
    return pathlib.Path("runs") / "+".join(dict.fromkeys(names))


def _counted(target):
    """Splits "name@count" into the target's name and its training images per class, or None."""
    name, _, count = target.rpartition("@")
    return (name, int(count)) if name and count.isascii() and count.isdigit() else (target, None)


def _plan(values, source, weights, target, targets, say):
    """Makes the plan of one source and one target."""
    target, per_class = _counted(target)
    per_class = values.get("per_class") if per_class is None else per_class
    is_digits = target == DIGITS[1]
    if weights == "none" and source is None and not is_digits:  # an unknown target is reported before the missing source
        load_dataset(target, per_class=per_class, protocol=values.get("protocol") or "paper", data_dir=values.get("data_dir"))
    workdir = pathlib.Path(values.get("workdir") or default_workdir(targets))
    base = Recipe.authors() if values.get("protocol") == "authors" else Recipe.paper()
    if values.get("protocol") == "network":
        base, values = _recipe_for_network(values, weights, target, per_class, workdir, say), {**values, "protocol": "paper"}
    recipe, source_recipe = recipes_of(base, values, weights, is_digits)
    penalties, strengths = _penalties(values.get("penalty") or ["l2", "l2_sp"], values.get("experiment"))
    folds = values.get("folds")
    folds = (DEFAULT_FOLDS if values.get("experiment") is not None else 0) if folds is None else folds
    plain = {name: values[name] for name in PLAIN if values.get(name) is not None}
    if zoo.is_whole_model(weights):
        values, plain = ({name: value for name, value in given.items() if name not in OF_BACKBONE} for given in (values, plain))
    return Plan.of(
        **{"backbone": "small", **plain},
        workdir=workdir,
        source=source or (DIGITS[0] if is_digits else None),
        target=target,
        weights=weights,
        penalties=penalties,
        strengths=strengths,
        alphas=_numbers(values, "alpha", float),
        betas=_numbers(values, "beta", float),
        learning_rates=_numbers(values, "learning_rate", float) or (recipe.rates() if folds else ()),
        frozen=_frozen(values),
        folds=folds,
        seeds=_numbers(values, "seeds", int),
        recipe=recipe,
        source_recipe=source_recipe,
        widths=_numbers(values, "widths", int) or Setup.widths,
        depths=_numbers(values, "depths", int) or Setup.depths,
        per_class=25 if is_digits and per_class is None else per_class,
        jit_compile=JIT[values.get("jit_compile") or "auto"],
        fisher=_fisher(values),
    )


def _recipe_for_network(values, weights, target, per_class, workdir, say):
    """Returns `Recipe.for_network` of the network and the training images that the flags name, and says which flags win."""
    if target == DIGITS[1]:
        raise InputError(f"protocol is network, but {target} has settings of its own: leave --protocol out.")
    places = {"data_dir": values.get("data_dir"), "cache_dir": cache_of(workdir)}
    dataset = load_dataset(target, per_class=per_class, seed=values.get("subset_seed"), **places)
    lines, size = [], None
    if zoo.is_whole_model(weights):
        network = zoo.whole_model(weights, values.get("crop"))
        if network.input_shape[1:3] == (None, None):
            size = values.get("crop") or zoo.side_of(weights)
    else:
        stages = {name: _numbers(values, name, int) or getattr(Setup, name) for name in ("widths", "depths")}
        side, block = values.get("crop") or Preprocessing.crop, values.get("block") or Setup.block
        network = zoo.backbone(values.get("backbone") or "small", 2, image_size=side, block=block, **stages)
    recipe = Recipe.for_network(network, dataset, image_size=size, say=lines.append)
    flags = [f"--{name}" for name in (*RECIPE, "learning_rate") if values.get(name) not in (None, [], [""]) and name != "crop"]
    say(" ".join(lines + [f"Flags come before this: {', '.join(flags)}."] * bool(flags)))
    return recipe


def recipes_of(recipe, values, weights, is_digits):
    """Returns the recipes of fine-tuning and of training a source model: `recipe` with the settings given by flags.

    `weights` is a value of `--weights`.
    """
    recipe = Recipe.digits(recipe) if is_digits else recipe
    given = {name: values[name] for name in RECIPE if values.get(name) is not None}
    if "crop" not in given and (side := zoo.side_of(weights)) is not None:
        # keeps the paper's ratio: it resizes to 256 for crops of 224
        given = {"resize": max(side, round(recipe.images.resize * side / recipe.images.crop)), **given, "crop": side}
    if "mean" in given:
        given["mean"] = given["mean"][0] if len(given["mean"]) == 1 else tuple(given["mean"])
    if "blur_sigma" in given:
        given["blur_sigma"] = _numbers(values, "blur_sigma", float)
    if "iterations" in given:
        given.setdefault("decay_at", None)
    recipe = recipe.replace(**given)
    changes = {}
    if values.get("source_iterations") is not None:
        changes["iterations"] = fields.whole("source_iterations", values["source_iterations"])
    if values.get("source_learning_rate") is not None:
        changes["learning_rate"] = fields.number("source_learning_rate", values["source_learning_rate"], above=0)
    return recipe, Recipe.source(recipe).replace(**changes)


def _frozen(values):
    """Returns the numbers of frozen units; None for "all"."""
    given = [str(value) for value in values.get("frozen") or []]
    if "all" not in given:
        return _numbers(values, "frozen", int) or (0,)
    if given != ["all"]:
        raise InputError(f"--frozen={','.join(given)} is not understood: give all alone, or numbers with commas between them.")
    return None


def _penalties(given, experiment):
    """Parses penalties such as l2_sp or l2_sp:0.1:1 into symbols and strengths by symbol."""
    strengths, symbols = {}, []
    for text in given:
        symbol, *numbers = text.split(":")
        symbols.append(symbol)
        try:
            own = tuple(float(number) for number in numbers)
        except ValueError:
            raise InputError(
                f"--penalty={text} is not understood: give a penalty and its strengths, as in --penalty=l2:1e-4,l2_sp:0.1:1."
            ) from None
        if own:
            strengths[symbol] = (*strengths.get(symbol, ()), *own)
    if experiment is None:
        bare = next((text for text in given if text in strengths), None)
        if bare is not None:
            raise InputError(f"--penalty has {bare} both with and without a strength: give all its strengths, or none.")
    return tuple(dict.fromkeys(symbols)), strengths


def _fisher(values):
    names = ("mode", "samples", "images", "batch", "tolerance")
    given = {name: values[f"fisher_{name}"] for name in names if values.get(f"fisher_{name}") is not None}
    if given.get("mode") == "exact":
        given.pop("samples", None)  # `unused` reports it
    texts = [text for text in values.get("fisher_transforms") or [] if text]
    if not texts:
        return FisherPlan(**given)
    if texts == ["none"]:
        return FisherPlan(**given, transforms=())
    if "none" in texts:
        raise InputError(f"--fisher_transforms={','.join(texts)} is not understood: give none alone, or leave it out.")
    try:
        pairs = [text.partition("=") for text in texts]
        return FisherPlan(**given, transforms=tuple((name, float(value) if equals else None) for name, equals, value in pairs))
    except InputError:
        raise
    except ValueError:
        raise InputError(
            f"--fisher_transforms={','.join(texts)} is not understood: give clip=MAX, epsilon=VALUE or normalise, or none alone."
        ) from None


def _numbers(values, name, kind):
    given = values.get(name) or []
    try:
        return tuple(kind(value) for value in given if value != "")
    except ValueError:
        kinds = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{name}={','.join(map(str, given))} is not a list of {kinds}: put commas between them.") from None


def _whole_paths(name, given):
    """Rejoins a path that was split at its commas.

    Raises:
        InputError: the joined path exists, but one of its parts exists too, or there are other values too.
    """
    paths = list(given)
    for first in range(len(paths)):
        for last in range(len(paths), first + 1, -1):
            joined = ",".join(map(str, paths[first:last]))
            if _lies_there(joined):
                if any(map(_lies_there, paths[first:last])) or len(paths) > last - first:
                    quoted = f"--{name}='\"{joined}\"'"
                    raise InputError(f"--{name} was split at a comma, but there is {joined}: write {quoted} if you mean that.")
                return [joined]
    return paths


def _lies_there(text):
    """Whether a text names a file, a folder or a member of a zip, with or without "@count"."""
    path = pathlib.Path(_counted(text)[0])
    return path.exists() or any(parent.suffix.lower() == ".zip" and parent.is_file() for parent in path.parents)


def unused(values, given, plans):
    """Lists the given flags that have no effect, as pairs (flag, reason).

    Args:
        values: as in `plans_of`.
        given: the names of the given flags.
        plans: the result of `plans_of(values)`.
    """
    reasons = {}
    if all(plan.setup.is_whole_model for plan in plans):
        reasons |= dict.fromkeys(OF_BACKBONE, "a .keras file or a preset brings its own network")
    elif plans[0].setup.backbone != "small":
        reasons |= dict.fromkeys(OF_BACKBONE[1:], f"it belongs to the backbone small, not to {plans[0].setup.backbone}")
    if not any(plan.sweep.needs_fisher for plan in plans):
        names = [f"fisher_{field.name}" for field in dataclasses.fields(FisherPlan)]
        reasons |= dict.fromkeys(names, "no penalty needs a Fisher diagonal")
    if not any(plan.setup.weights == "none" for plan in plans):
        reasons |= dict.fromkeys(
            ("source_iterations", "source_learning_rate"), "no source model is trained, as weights are given"
        )
    symbols = tuple(dict.fromkeys(symbol for plan in plans for symbol in plan.sweep.penalties))
    idle, *others = [plan.setup.recipe.idle(symbols) for plan in plans]
    reasons |= {name: reason for name, reason in idle.items() if all(name in other for other in others)}
    if plans[0].setup.fisher.mode == "exact":
        reasons.setdefault("fisher_samples", "the mode exact draws nothing")
    if all(plan.sweep.penalties and set(plan.sweep.penalties) <= set(plan.sweep.strengths) for plan in plans):
        reasons["alpha"] = "every penalty has its own strengths"
    if all(_counted(target)[1] is not None for target in values.get("target") or []) and values.get("target"):
        reasons["per_class"] = "every target has its own number after @"
    if all(plan.setup.per_class is None for plan in plans):
        reasons["subset_seed"] = "all training images are taken"
    if values.get("engine") == "local":
        reasons |= dict.fromkeys(("run_cpus", "run_gpus"), "the engine is local")
    return [(name, reason) for name, reason in {**reasons, **_fixed(values)}.items() if name in given]


def _fixed(values):
    """Returns the flags that an experiment ignores, with the reasons."""
    experiment = values.get("experiment")
    if experiment is None:
        return {}
    fixed = {}
    if not all(":" in text for text in values.get("penalty") or []):
        fixed["penalty"] = f"the experiment {experiment} has its own penalties; give strengths for those, as in --penalty=l2:1e-4"
    if experiment not in ("figure_3", "all"):
        fixed["frozen"] = f"the experiment {experiment} freezes nothing"
    if experiment == "figure_1":
        fixed["folds"] = "the experiment figure_1 runs its whole grid"
        if len(values.get("learning_rate") or []) > 1:
            fixed["learning_rate"] = "the experiment figure_1 has one rate, and takes the recipe's"
        if len(values.get("seeds") or []) > 1:
            fixed["seeds"] = "the experiment figure_1 has one seed, and takes the first"
    return fixed


def values_of(plan, setting):
    """Returns the flags that repeat one run of a plan; for a run on a fold, all folds of its setting.

    Args:
        plan: a `Plan`.
        setting: one of its `Setting`s.

    Returns:
        A dict from flag name to value.
    """
    recipe, fisher = plan.setup.recipe, plan.setup.fisher
    of_plan, setup = plan.values(), plan.setup
    values = {"workdir": str(setup.workdir), "source": setup.source and [setup.source], "target": [setup.target]}
    values |= {"weights": [setup.weights], "per_class": setup.per_class}
    values |= {name: of_plan[name] for name in PLAIN}
    values |= {name: list(of_plan[name]) for name in ("widths", "depths")}
    values |= {"penalty": [f"{setting.symbol}:{setting.alpha!r}"], "beta": [setting.beta]}
    values |= {"learning_rate": [setting.learning_rate], "frozen": [setting.frozen]}
    values |= {"seeds": [setting.seed] if setting.fold is None else list(plan.sweep.seeds[:1])}
    values |= {"folds": 0 if setting.fold is None else plan.sweep.folds}
    numbers = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)} | recipe.images.plain()
    values |= {name: numbers[name] for name in RECIPE}
    values |= {
        "mean": [recipe.mean] if isinstance(recipe.mean, str) else recipe.mean and list(recipe.mean),
        "blur_sigma": list(recipe.images.blur_sigma),
    }
    source = plan.setup.source_recipe
    values |= {"source_iterations": source.iterations, "source_learning_rate": source.learning_rate}
    values |= {"jit_compile": next(name for name, value in JIT.items() if value is plan.jit_compile or value == plan.jit_compile)}
    values |= {f"fisher_{name}": getattr(fisher, name) for name in ("mode", "samples", "images", "batch", "tolerance")}
    transforms = [name if value is None else f"{name}={value!r}" for name, value in fisher.transforms]
    values |= {"fisher_transforms": transforms or ["none"]}
    return {name: value for name, value in values.items() if value is not None}


def text_of(plan, setting):
    """Returns the TOML text with which `train.py --config` repeats a run; a comment lists the fields that no flag can set."""
    values = values_of(plan, setting)
    plans = plans_of(values)
    idle = {name for name, _ in unused(values, set(values), plans)}
    fewer = {name: value for name, value in values.items() if name not in idle}
    if plans_of(fewer) == plans:  # otherwise these flags still distinguish the run
        values = fewer
    lines = [f"# Repeats {setting}: python train.py --config=FILE"]
    if setting.fold is not None:
        lines = [f"# Repeats the {plan.sweep.folds} folds of {setting}: python train.py --config=FILE"]
    if differing := _without_flags(plan, setting, values):
        lines.append(f"# It was started from Python. This file leaves out what no flag can set: {', '.join(differing)}.")
    return "\n".join([*lines, *(f"{name} = {_toml(value)}" for name, value in values.items())]) + "\n"


def _without_flags(plan, setting, values):
    """Lists the fields of a plan that its flags cannot restore."""
    (again,) = plans_of(values)
    made = {"penalties": (setting.symbol,), "strengths": {setting.symbol: (setting.alpha,)}, "alphas": ()}
    made |= {"betas": (setting.beta,), "learning_rates": (setting.learning_rate,), "frozen": (setting.frozen,)}
    swept = {name: getattr(again.setup.recipe, name) for name in ("beta", "learning_rate")}  # each run has its own
    made |= {"recipe": plan.setup.recipe.replace(**swept), "folds": again.sweep.folds, "seeds": again.sweep.seeds}
    found, expected = again.values(), plan.replace(**made).values()
    names = [name for name, value in found.items() if value != expected[name]]
    idle = OF_BACKBONE if plan.setup.is_whole_model else ()
    return [name for name in names if name not in idle]


def _toml(value):
    """Formats a value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, (int, float)):
        return repr(value)
    text = json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return text.encode("utf-8", "replace").decode()
