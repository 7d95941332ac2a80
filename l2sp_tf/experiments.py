"""From plans to records: every setting is run once, and each run leaves a run.json."""

import dataclasses
import datetime
import functools
import statistics
import time

import keras
import numpy as np

from l2sp_tf import distribution, records
from l2sp_tf.activations import activation_r2, box
from l2sp_tf.checkpoints import Checkpoints
from l2sp_tf.data import test_batches
from l2sp_tf.engines import run_jobs
from l2sp_tf.errors import InputError
from l2sp_tf.evaluation import evaluate, retention
from l2sp_tf.files import link_or_copy
from l2sp_tf.plans import Setting
from l2sp_tf.regularizers import PENALTIES, FisherPenalty
from l2sp_tf.runs import folder_of, run_record, settings_of
from l2sp_tf.selection import Search, accuracy_of, fold_tasks, write_selection
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
        list(plan.runs())  # a bad strength is told before any work is done
        say, verbose = _share(plan, engine, say, verbose)
    options = {"engine": engine, "cpus": cpus, "gpus": gpus, "say": say}
    starts = [_start_of(plan, say, verbose) for plan in plans]
    for plan, start in zip(plans, starts, strict=True):
        if max(plan.frozen or (0,)) > max(start.units - 1, 0):
            most = max(start.units - 1, 0)
            raise InputError(f"frozen is {max(plan.frozen)}, but of this backbone's units at most {most} can be frozen.")
    trials = _jobs((plan, setting) for plan in plans for setting in plan.trials())
    # the number of runs does not depend on what will be chosen
    guesses = [{symbol: plan.grid(symbol)[0] for symbol in plan.penalties} if plan.folds else None for plan in plans]
    count = sum(len(list(plan.runs(start.units, guess))) for plan, start, guess in zip(plans, starts, guesses, strict=True))
    if estimate or dry_run:
        _say_plan(plans, starts, trials, count, say)
    if dry_run:
        return []
    _prepare_fisher(plans, starts)
    work = functools.partial(_run_job, say, verbose)
    choices = _cross_validate(plans, starts, lambda jobs: run_jobs(work, jobs, **options), say)
    jobs = [
        (plan, setting)
        for plan, start, chosen in zip(plans, starts, choices, strict=True)
        for setting in plan.runs(start.units, chosen)
    ]
    found = run_jobs(work, _jobs(jobs), **options)
    selected = {path: None for plan in plans for path in sorted(plan.workdir.glob("selections/*/selection.json"))}
    return found + [records.read_record(path) for path in selected]


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


def _jobs(pairs):
    """Numbered jobs (plan, setting, title), those that would leave the same record only once."""
    unique = list({(plan.start_key(), setting): (plan, setting) for plan, setting in pairs}.values())
    return [(*pair, f"[{number}/{len(unique)}] {pair[1]}") for number, pair in enumerate(unique, start=1)]


def _run_job(say, verbose, job):
    plan, setting, title = job
    return _run(_start_of(plan, say, verbose), plan, setting, lambda text: say(f"{title}: {text}"), verbose)


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


def _run(start, plan, setting, say, verbose):
    """One fine-tuning with its evaluation, or its record if it has one."""
    fisher = start.fisher if isinstance(setting.penalty, FisherPenalty) else None
    recipe = plan.recipe.replace(beta=setting.beta, learning_rate=setting.learning_rate)
    is_fold = setting.fold is not None
    task = _folds(start.target, plan.folds)[setting.fold] if is_fold else start.target
    settings = _settings(plan, start, setting, task, recipe, fisher)
    path = folder_of(plan.workdir, setting, settings) / "run.json"
    strategy = distribution.make_strategy(plan.distribute)
    if distribution.chief_says(strategy, path.exists):
        record = records.read_record(path)
        say(f"already finished, {_outcome(record, is_fold)}")
        return record
    checkpoints = Checkpoints(path.parent / "checkpoints")
    say(f"{recipe.iterations} iterations" + (f", from step {checkpoints.newest} on" if checkpoints.newest else ""))
    options = {"anchors": start.anchors, "fisher": fisher, "seed": setting.seed, "frozen": setting.frozen, "verbose": verbose}
    options |= {"run_dir": path.parent, "checkpoint_every": plan.checkpoint_every, "save": plan.save_models and not is_fold}
    options |= {"strategy": strategy, "jit_compile": plan.jit_compile}
    options |= {} if is_fold else {"measure": lambda run: _measure(run, start, recipe)}
    if distribution.is_chief(strategy):
        link_or_copy(start.anchors_path, path.parent / "anchors.safetensors")
    record = run_record(start.pretrained, task, setting, recipe, settings, **options)
    extra = {
        "fisher": None if fisher is None else _without_weights(fisher.provenance),
        "deterministic": plan.deterministic or None,
    }
    record |= {name: value for name, value in extra.items() if value is not None}
    if distribution.is_chief(strategy):
        records.write_record(path, record)
        checkpoints.remove()
    distribution.wait_for_chief(strategy)
    say(f"{_outcome(record, is_fold)} ({record['seconds']:.1f} s)")
    keras.utils.clear_session(free_memory=True)
    return records.read_record(path)


_folds = functools.lru_cache(maxsize=1)(fold_tasks)  # their means are sums over all pixels


def _outcome(record, is_fold):
    """What came of a run, in words."""
    if records.diverged(record):
        return f"diverged: {record['results']['diverged']}"
    text = f"accuracy {record['results']['accuracy']:.1%}" + (" on the fold" if is_fold else "")
    source = record["results"].get("source")
    return text + (f", source {source['target_statistics']['accuracy']:.1%}" if source else "")


def _without_weights(provenance):
    """The provenance of a Fisher diagonal without the hash of each weight, which its `model` sums up."""
    return {name: value for name, value in provenance.items() if name != "weights"}


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


def _cross_validate(plans, starts, run, say):
    """For each plan with folds the chosen setting of each penalty, by symbol, and a record of each selection; else None.

    The penalties whose every setting diverged are left out. All searches go on side by side, so that `run` gets many jobs.
    """
    searches = {(i, symbol): Search(plan.axes(symbol)) for i, plan in enumerate(plans) if plan.folds for symbol in plan.penalties}
    while pending := {place: values for place, search in searches.items() if (values := search.pending())}:
        settings = {place: [Setting(place[1], *values) for values in found] for place, found in pending.items()}
        jobs = _jobs(
            (plans[i], dataclasses.replace(setting, seed=fold, fold=fold))
            for (i, _), found in settings.items()
            for setting in found
            for fold in range(plans[i].folds)
        )
        scores = {(job[0].start_key(), job[1]): accuracy_of(made) for job, made in zip(jobs, run(jobs), strict=True)}
        for (i, symbol), found in settings.items():
            plan = plans[i]
            key = lambda s, fold, plan=plan: (plan.start_key(), dataclasses.replace(s, seed=fold, fold=fold))  # noqa: E731
            told = {(s.alpha, s.beta, s.learning_rate): [scores[key(s, fold)] for fold in range(plan.folds)] for s in found}
            searches[i, symbol].tell(told)
    choices = [{} if plan.folds else None for plan in plans]
    for (i, symbol), search in searches.items():
        choices[i] |= _choice(plans[i], starts[i], symbol, search, say)
    return choices


def _choice(plan, start, symbol, search, say):
    """The setting that a search chose, by symbol, and its record; nothing where every one diverged."""
    selection = search.selection(PENALTIES[symbol], plan.recipe)
    setting = plan.grid(symbol)[0]
    fisher = start.fisher if isinstance(setting.penalty, FisherPenalty) else None
    settings = _settings(plan, start, setting, start.target, plan.recipe, fisher)
    if distribution.is_chief(distribution.make_strategy(plan.distribute)):
        write_selection(plan.workdir, selection.record(records.question(settings), plan.folds))
    if selection.best is None:
        say(f"{plan.target}: every setting of {symbol} diverged in cross-validation, so none is run on all training images")
        return {}
    best = Setting(symbol, selection.best.alpha, selection.best.beta, selection.best.learning_rate)
    edge = f", at the edge of what was tried ({', '.join(selection.edges)})" if selection.edges else ""
    say(f"{plan.target}: cross-validation chose {best.penalty}, beta {best.beta:g}, rate {best.learning_rate:g}{edge}")
    return {symbol: best}


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


def _settings(plan, start, setting, task, recipe, fisher):
    """What a run's result depends on; the key of the run is made of it."""
    source = start.source
    settings = {
        "source": short_name(source.name if source is not None else plan.weights),
        "target": short_name(start.target.name),
        "source_digest": source.digest if source is not None else None,
        "skipped": [len(start.target.train.skipped), len(start.target.test.skipped)],
        "per_class": plan.per_class,
        "subset_seed": plan.subset_seed,
        "protocol": plan.protocol,
        "weights": start.origin,
        "backbone": start.backbone,
        "source_mean": source.mean.tolist() if source is not None else None,
    }
    if setting.fold is not None:
        settings["fold"] = [setting.fold, plan.folds]
    return settings_of(setting, task, recipe, start.anchors, fisher, **settings)
