"""Makes one run and its record: the settings that its result depends on, and the result or the divergence."""

import hashlib
import math

from l2sp_tf.evaluation.accuracy import evaluate
from l2sp_tf.experiments import records
from l2sp_tf.files.arrays import digest_of_arrays
from l2sp_tf.files.plain import plain
from l2sp_tf.files.provenance import RESULTS_VERSION, provenance
from l2sp_tf.optimizers.proximal import frozen_share
from l2sp_tf.penalties.formulas import PAPER
from l2sp_tf.training.trainer import finetune


def settings_of(setting, task, recipe, anchors, fisher=None, **more):
    """Returns everything that a run's result depends on; the key of its `records.identity_of_run` names the run.

    Args:
        setting: a `plans.Setting`.
        task: the target `Task` or `GivenArrays`, or a fold.
        recipe: the setting's beta and learning rate replace its own.
        anchors: an `Anchors`.
        fisher: a `Fisher` or a mapping, for the Fisher penalties.
        more: settings of the plan, such as "source", "weights" and "backbone".
    """
    recipe = _seen_by(setting.recipe_of(recipe), task)
    if setting.frozen:
        recipe = recipe.replace(moving_statistics="source")  # with frozen units, `finetune` keeps the source statistics
    settings = {
        **more,
        "target_digest": task.digest,
        "anchors": digest_of_arrays(anchors),
        "pixels": None if task.pixels is None else plain(task.pixels),
        "penalty": setting.symbol,
        "alpha": float(setting.alpha),
        "beta": float(setting.beta),
        "seed": setting.seed,
        "frozen": setting.frozen,
        "recipe": plain(recipe.record(setting.symbol, images=task.pixels is not None)),
        "code": RESULTS_VERSION,
    }
    if setting.symbol not in PAPER:  # tables know the titles of the paper's penalties
        settings["penalty_title"] = setting.penalty.title
    return settings if fisher is None else {**settings, "fisher": digest_of_arrays(fisher)}


def folder_of(workdir, setting, settings):
    """Returns the folder of a run, under folds/ or runs/ of a workdir."""
    kind, number = ("folds", f"fold{setting.fold}") if setting.fold is not None else ("runs", f"seed{setting.seed}")
    return workdir / kind / f"{setting.symbol}-{setting.alpha:g}-{number}-{records.run_key(records.identity_of_run(settings))}"


def run_record(pretrained, task, setting, recipe, settings, measure=None, **options):
    """Fine-tunes, measures, and returns the record. For a diverged run, "results" holds only the reason.

    Args:
        pretrained, task, recipe: as in `finetune`.
        setting: a `plans.Setting`.
        settings: from `settings_of`.
        measure: maps the `Run` to its results; by default the accuracy on the task's test images.
        options: other arguments of `finetune`; must include anchors.
    """
    record = {"settings": settings, **provenance(), "anchors": {"digest": digest_of_arrays(options["anchors"])}}

    def diverged(reason, coverage="", seconds=0.0):
        return {**record, "coverage": {"digest": coverage}, "results": {"diverged": reason}, "seconds": seconds}

    try:
        run = finetune(pretrained, task, setting.penalty, _seen_by(recipe, task), **options)
    except FloatingPointError as error:
        return diverged(str(error))
    last = {name: value for name, value in run.history[-1].items() if name in ("distance", "penalty")}
    endless = next((name for name, value in last.items() if not math.isfinite(value)), None)
    if endless is not None:  # no loss was computed after the last step
        reason = f"The {endless} is {last[endless]} after step {run.history[-1]['step']}."
        return diverged(reason, run.coverage.digest, run.seconds)
    results = evaluate(run.model, task, crops=recipe.crops) if measure is None else measure(run)
    if results.get("nan") == results["total"]:
        return diverged(f"The outputs are NaN on all {results['total']} test images.", run.coverage.digest, run.seconds)
    if "frozen" in run.history[-1]:
        last["frozen"] = frozen_share(run.model)
    if run.stopped_at is not None:
        last["stopped_at"] = run.stopped_at
    counts = {name: list(counts) for name, counts in run.coverage.counts.items()}
    record["coverage"] = {"digest": run.coverage.digest, "counts": counts}
    record["anchors"]["file"] = "anchors.safetensors"
    results = {**results, **last, "test_digest": test_digest(task)}
    return {**record, "results": results, "seconds": run.seconds, "classes": list(task.classes)}


def _seen_by(recipe, task):
    return recipe if task.pixels is None else recipe.seen_by(task.pixels)


def test_digest(task):
    """Returns sixteen hexadecimal digits that are equal for the same test images in the same order."""
    sha = hashlib.sha256(repr((task.digest, task.test.skipped, len(task.test))).encode() + task.test.labels.tobytes())
    return sha.hexdigest()[:16]
