"""From plans to records: every setting is run once, and each run leaves a run.json."""

import dataclasses
import datetime
import functools
import statistics
import time

import keras
import numpy as np

from l2sp_tf import configuration, distribution, records
from l2sp_tf.activations import activation_r2, box
from l2sp_tf.checkpoints import Checkpoints
from l2sp_tf.checks import check_plans
from l2sp_tf.data import test_batches
from l2sp_tf.engines import run_jobs
from l2sp_tf.errors import InputError
from l2sp_tf.evaluation import evaluate, retention
from l2sp_tf.files import link_or_copy, write_text
from l2sp_tf.proximal import frozen_share
from l2sp_tf.regularizers import PENALTIES, FisherPenalty
from l2sp_tf.selection import Candidate, Selection, fold_tasks
from l2sp_tf.starts import prepare_start, short_name
from l2sp_tf.training import finetune

TIMED_STEPS = 12
MOST_STARTS = 4  # kept in memory at once


def run_plan(plan, **options):
    """Runs what of one plan is not yet recorded; as `run_plans`."""
    return run_plans([plan], **options)


def run_plans(plans, *, engine="local", cpus=1, gpus=0, estimate=False, dry_run=False, say=print, verbose=0):
    """Runs what of some plans is not yet recorded, and returns all records of runs on all training images.

    First come the folds of cross-validation, then the runs under what it chose. Each leaves a record under the plan's
    workdir, so that the same call goes on where another was cut off.

    Args:
        plans: a list of `Plan`.
        engine, cpus, gpus: where the runs are computed, as in `engines.run_jobs`.
        estimate: whether the time of what is to be run is measured and said beforehand.
        dry_run: whether to stop after that.
        say: called with a line of text for each step of the work.
        verbose: of Keras `fit`.

    Returns:
        A list of records, in the order of the plans, each once.

    Raises:
        InputError: bad data, weights or settings; finished runs stay.
        OSError: a workdir cannot be written.
    """
    for plan in plans:
        say, verbose = _share(plan, engine, say, verbose)
    check_plans(plans)
    options = {"engine": engine, "cpus": cpus, "gpus": gpus, "say": say}
    # what needs no training comes first, so that its mistakes are told before a source model is trained
    ready = {plan.start_key(): _start_of(plan, say, verbose) for plan in sorted(plans, key=lambda p: p.weights == "none")}
    starts = [ready[plan.start_key()] for plan in plans]
    for plan, start in zip(plans, starts, strict=True):
        if max(plan.frozen or (0,)) > max(start.units - 1, 0):
            most = max(start.units - 1, 0)
            raise InputError(f"frozen is {max(plan.frozen)}, but of this backbone's units at most {most} can be frozen.")
    trials = _jobs((plan, setting, None) for plan in plans for setting in plan.trials())
    # the number of runs does not depend on what will be chosen
    guesses = [{symbol: plan.grid(symbol)[0] for symbol in plan.penalties} if plan.folds else None for plan in plans]
    count = sum(len(list(plan.runs(start.units, guess))) for plan, start, guess in zip(plans, starts, guesses, strict=True))
    if estimate or dry_run:
        _say_plan(plans, starts, trials, count, say)
    if dry_run:
        return []
    _prepare_fisher(plans, starts)
    work = functools.partial(_run_job, say, verbose)
    scored = run_jobs(work, trials, **options)
    jobs = []
    for plan, start in zip(plans, starts, strict=True):
        selections = _select(plan, trials, scored)
        chosen = {symbol: setting for symbol, (setting, _) in selections.items()}
        notes = {symbol: note for symbol, (_, note) in selections.items()}
        jobs += [(plan, setting, notes.get(setting.symbol)) for setting in plan.runs(start.units, chosen)]
        for setting in chosen.values():
            say(f"{plan.target}: cross-validation chose {setting.penalty}, beta {setting.beta:g}, rate {setting.learning_rate:g}")
    return run_jobs(work, _jobs(jobs), **options)


def _share(plan, engine, say, verbose):
    """Makes the strategy of a plan and tells what it cannot share; returns what this worker says and shows."""
    strategy = distribution.make_strategy(plan.distribute)
    if engine != "local" and plan.distribute == "multiworker":
        raise InputError(f"distribute is multiworker and engine is {engine}: give one of them, as each uses all machines.")
    for recipe in (plan.recipe, plan.source_recipe):
        distribution.check_batch_size(strategy, recipe.batch_size)
        distribution.check_optimizer(strategy, recipe.optimizer(), plan.jit_compile is True)
    distribution.check_shared(strategy, plan.workdir)
    return (say, verbose) if distribution.is_chief(strategy) else (lambda text: None, 0)


def _jobs(triples):
    """Numbered jobs (plan, setting, selection, title), those that would leave the same record only once."""
    unique = list({(plan.start_key(), setting): (plan, setting, selection) for plan, setting, selection in triples}.values())
    return [(*triple, f"[{number}/{len(unique)}] {triple[1]}") for number, triple in enumerate(unique, start=1)]


def _run_job(say, verbose, job):
    plan, setting, selection, title = job
    return _run(_start_of(plan, say, verbose), plan, setting, selection, lambda text: say(f"{title}: {text}"), verbose)


_STARTS = {}


def _start_of(plan, say, verbose):
    """What a plan starts from; the last few are kept."""
    key = plan.start_key()
    if key not in _STARTS:
        while len(_STARTS) >= MOST_STARTS:
            _STARTS.pop(next(iter(_STARTS)))
        _STARTS[key] = prepare_start(plan, say=say, verbose=verbose)
    return _STARTS[key]


def _prepare_fisher(plans, starts):
    """Estimates each Fisher diagonal that is needed here and now, so that no two runs do it at once."""
    for plan, start in zip(plans, starts, strict=True):
        if any(isinstance(plan.grid(symbol)[0].penalty, FisherPenalty) for symbol in plan.penalties):
            start.fisher  # noqa: B018


def _run(start, plan, setting, selection, say, verbose):
    """One fine-tuning with its evaluation, or its record if it has one."""
    fisher = start.fisher if isinstance(setting.penalty, FisherPenalty) else None
    recipe = plan.recipe.replace(beta=setting.beta, learning_rate=setting.learning_rate)
    settings = _settings(plan, start, setting, recipe, fisher)
    path = _folder(plan, setting, settings) / "run.json"
    strategy = distribution.make_strategy(plan.distribute)
    if distribution.chief_says(strategy, path.exists):
        record = records.read_record(path)
        if selection is not None and record.get("selection") != selection and distribution.is_chief(strategy):
            records.write_record(path, {**record, "selection": selection})  # run before as a point of a grid, and chosen now
        say(f"already finished, accuracy {record['results']['accuracy']:.1%}")
        return records.read_record(path)
    checkpoints = Checkpoints(path.parent / "checkpoints")
    say(f"{recipe.iterations} iterations" + (f", from step {checkpoints.newest} on" if checkpoints.newest else ""))
    options = {"anchors": start.anchors, "fisher": fisher, "seed": setting.seed, "frozen": setting.frozen, "verbose": verbose}
    options |= {"run_dir": path.parent, "checkpoint_every": plan.checkpoint_every}
    options |= {"strategy": strategy, "jit_compile": plan.jit_compile}
    if distribution.is_chief(strategy):
        link_or_copy(start.anchors_path, path.parent / "anchors.safetensors")
        write_text(path.parent / "config.toml", configuration.text_of(plan, setting))
    if setting.fold is not None:
        record = _run_fold(fold_tasks(start.target, plan.folds)[setting.fold], start, setting, recipe, options)
    else:
        run = finetune(start.pretrained, start.target, setting.penalty, recipe, save=plan.save_models, **options)
        record = _record_of(run, _measure(run, start, recipe))
    results, seconds = record["results"], record["seconds"]
    extra = {"fisher": None if fisher is None else _without_weights(fisher.provenance), "selection": selection}
    extra["deterministic"] = plan.deterministic or None
    record |= {"settings": settings, "versions": records.versions(), **{k: v for k, v in extra.items() if v is not None}}
    if distribution.is_chief(strategy):
        records.write_record(path, record)
        checkpoints.remove()
    distribution.wait_for_chief(strategy)
    kept = " on the fold" if setting.fold is not None else ""
    kept += f", source {results['source']['target_statistics']['accuracy']:.1%}" if "source" in results else ""
    say(results.get("diverged") or f"accuracy {results['accuracy']:.1%}{kept} ({seconds:.1f} s)")
    keras.utils.clear_session(free_memory=True)
    return records.read_record(path)


def _without_weights(provenance):
    """The provenance of a Fisher diagonal without the hash of each weight, which its `model` sums up."""
    return {name: value for name, value in provenance.items() if name != "weights"}


def _run_fold(task, start, setting, recipe, options):
    """The record of a run on a fold. One that diverges has an accuracy of 0, so that the search goes on without it."""
    try:
        run = finetune(start.pretrained, task, setting.penalty, recipe, save=False, **options)
    except FloatingPointError as error:
        results = {"accuracy": 0.0, "correct": 0, "total": len(task.test), "diverged": str(error)}
        return {"results": results, "seconds": 0.0, "anchors": {"digest": start.anchors.digest}, "coverage": {"digest": ""}}
    return _record_of(run, evaluate(run.model, task, crops=recipe.crops))


def _record_of(run, results):
    """What a record says of a run and its results."""
    counts = {name: list(counts) for name, counts in run.coverage.counts.items()}
    frozen = {"frozen": frozen_share(run.model)} if "frozen" in run.history[-1] else {}
    return {
        "coverage": {"digest": run.coverage.digest, "counts": counts},
        "anchors": {"digest": run.anchors.digest, "file": "anchors.safetensors"},
        "results": {**results, "distance": run.history[-1]["distance"], "penalty": run.history[-1]["penalty"], **frozen},
        "seconds": run.seconds,
    }


def _measure(run, start, recipe):
    """What a run on all training images is measured by: target accuracy, source accuracy, and R² of activations."""
    results = evaluate(run.model, start.target, crops=recipe.crops, answers=True)
    results["right"] = np.packbits(results["right"]).tobytes().hex()
    if start.source is not None:
        results["source"] = retention(run.model, start.pretrained, start.source, before=start.before, crops=recipe.crops)
    if start.units:
        target = start.target
        batches = test_batches(target.train, target.preprocessing, target.mean, batch_size=recipe.batch_size)
        results["r2"] = {name: box(values) for name, values in activation_r2(run.model, start.pretrained, batches).items()}
    return results


def _select(plan, trials, scored):
    """By symbol, the setting that has the highest mean accuracy over the folds, and a note of all scores for the record."""
    if not plan.folds:
        return {}
    accuracy = {(job[0].start_key(), job[1]): record["results"]["accuracy"] for job, record in zip(trials, scored, strict=True)}
    chosen = {}
    for symbol in dict.fromkeys(plan.penalties):
        candidates = []
        for s in plan.grid(symbol):
            folds = tuple(accuracy[plan.start_key(), dataclasses.replace(s, seed=fold, fold=fold)] for fold in range(plan.folds))
            candidates.append(Candidate(s.alpha, s.beta, s.learning_rate, folds))
        best = Selection(type(s.penalty), plan.recipe, tuple(candidates)).best
        chosen[symbol] = (
            plan.grid(symbol)[candidates.index(best)],
            {
                "folds": plan.folds,
                "candidates": records.plain([[c.alpha, c.beta, c.learning_rate, c.mean] for c in candidates]),
            },
        )
    return chosen


def _say_plan(plans, starts, trials, count, say):
    """Says how many runs there are, and about how long the training of those without a record will take here."""
    finished = [len(list(path.glob("*/run.json"))) for name in ("folds", "runs") for path in {p.workdir / name for p in plans}]
    left = max(0, len(trials) + count - sum(finished))
    seconds = left * plans[0].recipe.iterations * _seconds_per_step(plans[0], starts[0]) if left else 0
    length = datetime.timedelta(seconds=round(seconds))
    say(f"plan: {len(trials)} runs on folds, then {count} runs; {left} are left, about {length} of training on this machine")


def _seconds_per_step(plan, start):
    """The median time of a training step here, after the first ones."""
    times = []
    clock = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: times.append(time.perf_counter()))
    recipe = plan.recipe.replace(iterations=TIMED_STEPS, decay_at=None)
    setting = next(iter(plan.grid(plan.penalties[0])))
    penalty = PENALTIES["l2_sp"](1.0) if isinstance(setting.penalty, FisherPenalty) else setting.penalty
    finetune(start.pretrained, start.target, penalty, recipe, anchors=start.anchors, callbacks=[clock], verbose=0)
    return statistics.median(b - a for a, b in zip(times[2:], times[3:], strict=False))


def _settings(plan, start, setting, recipe, fisher):
    """What a run's result depends on; the key of the run is made of it."""
    settings = {
        "source": short_name(start.source.name if start.source is not None else plan.weights),
        "target": short_name(start.target.name),
        "target_digest": start.target.digest,
        "source_digest": start.source.digest if start.source is not None else None,
        "skipped": [len(start.target.train.skipped), len(start.target.test.skipped)],
        "per_class": plan.per_class,
        "anchors": start.anchors.digest,
        "weights": start.origin,
        "backbone": plan.backbone,
        "pixels": records.plain(start.target.pixels),
        "source_mean": start.source.mean.tolist() if start.source is not None else None,
        "penalty": setting.symbol,
        "alpha": setting.alpha,
        "beta": setting.beta,
        "seed": setting.seed,
        "frozen": setting.frozen,
        "recipe": records.plain(recipe.record()),
    }
    if setting.fold is not None:
        settings["fold"] = [setting.fold, plan.folds]
    return {**settings, "fisher": fisher.digest} if fisher is not None else settings


def _folder(plan, setting, settings):
    """The folder of a run, under folds/ or runs/ of the workdir."""
    kind, number = ("folds", f"fold{setting.fold}") if setting.fold is not None else ("runs", f"seed{setting.seed}")
    return plan.workdir / kind / f"{setting.symbol}-{setting.alpha:g}-{number}-{records.run_key(settings)}"
