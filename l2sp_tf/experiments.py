"""From plans to records: every setting is run once, and each run leaves a run.json."""

import collections
import dataclasses
import functools

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
from l2sp_tf.forecast import FirstSteps, Forecast, Recorded, Work
from l2sp_tf.proximal import frozen_share
from l2sp_tf.regularizers import PENALTIES, FisherPenalty
from l2sp_tf.selection import Candidate, Selection, fold_tasks
from l2sp_tf.starts import outline, prepare_start, short_name
from l2sp_tf.training import finetune


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
        estimate: whether the time is measured on made-up images before anything else; otherwise it is told by the first
            steps of the first training.
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
    made = _outlines(plans, say)
    forecast = _say_plan(plans, made, say)
    if dry_run or estimate or engine != "local":
        say(forecast.measured_time())
    if dry_run:
        return []
    tell = lambda seconds: say(forecast.time([seconds] * len(forecast.works)))  # noqa: E731
    clock = () if estimate or engine != "local" else (FirstSteps(tell),)
    try:
        return _run_all(plans, made, clock, verbose, {"engine": engine, "cpus": cpus, "gpus": gpus, "say": say})
    finally:
        _NEEDED.clear()
        _STARTS.clear()


def _outlines(plans, say):
    """The `Outline` of each start, by its key."""
    made = {}
    for plan in plans:
        key = plan.start_key()
        if key not in made:
            made[key] = outline(plan, say=say)
        most = max(made[key].units - 1, 0)
        if max(plan.frozen or (0,)) > most:
            raise InputError(f"frozen is {max(plan.frozen)}, but of this backbone's units at most {most} can be frozen.")
    return made


def _run_all(plans, made, clock, verbose, options):
    """Decodes, trains what the plans start from, and runs what has no record."""
    say, units = options["say"], {key: start.units for key, start in made.items()}
    for start in made.values():
        start.tasks  # noqa: B018  a bad image is told before anything is trained
    trials = _jobs((plan, setting, None) for plan in plans for setting in plan.trials())
    if options["engine"] == "local":
        _NEEDED.update(plan.start_key() for plan in (*plans, *(job[0] for job in trials)))
    for plan in plans:
        start = _start_of(plan, say, verbose, made=made.pop(plan.start_key(), None), callbacks=clock)
        if any(issubclass(PENALTIES[symbol], FisherPenalty) for symbol in plan.penalties):
            start.fisher  # noqa: B018  here and now, so that no two runs estimate it at once
    if options["engine"] != "local":
        _STARTS.clear()  # each worker prepares its own
    work = functools.partial(_run_job, say, verbose)
    scored = run_jobs(work, trials, **options)
    jobs = []
    for plan in plans:
        selections = _select(plan, trials, scored)
        chosen = {symbol: setting for symbol, (setting, _) in selections.items()}
        notes = {symbol: note for symbol, (_, note) in selections.items()}
        jobs += [(plan, setting, notes.get(setting.symbol)) for setting in plan.runs(units[plan.start_key()], chosen)]
        for setting in chosen.values():
            say(f"{plan.target}: cross-validation chose {setting.penalty}, beta {setting.beta:g}, rate {setting.learning_rate:g}")
    jobs = _jobs(jobs)
    if options["engine"] == "local":
        _NEEDED.clear()
        _NEEDED.update(job[0].start_key() for job in jobs)
    return run_jobs(work, jobs, **options)


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
    record = _run(_start_of(plan, say, verbose), plan, setting, selection, lambda text: say(f"{title}: {text}"), verbose)
    _NEEDED.subtract([plan.start_key()])
    if _NEEDED[plan.start_key()] == 0:
        _STARTS.pop(plan.start_key(), None)
    return record


_STARTS = {}
_NEEDED = collections.Counter()  # jobs to come in this process, by start; a Ray worker knows of none


def _start_of(plan, say, verbose, **options):
    """What a plan starts from, held until the last job that needs it; where none is known to come, until another is asked for."""
    key = plan.start_key()
    if key not in _STARTS:
        for other in [other for other in _STARTS if _NEEDED[other] <= 0]:
            del _STARTS[other]
        _STARTS[key] = prepare_start(plan, say=say, verbose=verbose, **options)
    return _STARTS[key]


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
    options |= {"strategy": strategy, "jit_compile": plan.jit_compile, "callbacks": start.callbacks}
    if distribution.is_chief(strategy):
        link_or_copy(start.anchors_path, path.parent / "anchors.safetensors")
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


def _say_plan(plans, made, say):
    """Says how many runs there are and are left, and what disk they take; returns the `Forecast`."""
    counted, left = set(), {key: [] for key in made}
    for plan in plans:
        key = plan.start_key()
        recorded = Recorded(plan, made[key], _settings)
        for setting in (*plan.trials(), *plan.runs(made[key].units, _guess(plan))):
            if (key, setting) not in counted and not recorded.has(setting):
                left[key].append(setting)
            counted.add((key, setting))
    trials = sum(setting.fold is not None for _, setting in counted)
    count = sum(map(len, left.values()))
    say(f"plan: {trials} runs on folds, then {len(counted) - trials} runs; {count} are left")
    first = {start.trained_path: key for key, start in reversed(made.items()) if start.trains_source}
    forecast = Forecast([Work(start, tuple(left[key]), key in first.values()) for key, start in made.items()])
    say(forecast.disk())
    return forecast


def _guess(plan):
    """Any setting of each penalty in place of what cross-validation will choose: the number of runs is the same."""
    return {symbol: plan.grid(symbol)[0] for symbol in plan.penalties} if plan.folds else None


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
    if start.mean_of is not None:
        settings["source_mean_of"] = start.mean_of
    if setting.fold is not None:
        settings["fold"] = [setting.fold, plan.folds]
    return {**settings, "fisher": fisher.digest} if fisher is not None else settings


def _folder(plan, setting, settings):
    """The folder of a run, under folds/ or runs/ of the workdir."""
    kind, number = ("folds", f"fold{setting.fold}") if setting.fold is not None else ("runs", f"seed{setting.seed}")
    return plan.workdir / kind / f"{setting.symbol}-{setting.alpha:g}-{number}-{records.run_key(settings)}"
