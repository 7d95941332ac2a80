"""Runs plans: every setting once, with one run.json for each run."""

import collections
import functools

import keras
import numpy as np

from l2sp_tf.data.datasets import drawing_seed
from l2sp_tf.data.pipeline import test_batches
from l2sp_tf.evaluation.accuracy import evaluate, retention
from l2sp_tf.evaluation.activations import activation_r2, box
from l2sp_tf.experiments import configuration, records
from l2sp_tf.experiments.checks import check_plans
from l2sp_tf.experiments.engines import run_jobs
from l2sp_tf.experiments.forecast import FirstSteps, Forecast, Recorded, Work, recorded_in
from l2sp_tf.experiments.plans import Setting
from l2sp_tf.experiments.runs import folder_of, run_record, settings_of
from l2sp_tf.experiments.selection import MOST_EXTENSIONS, Search, fold_tasks, search_all, write_selection
from l2sp_tf.experiments.starts import exactness, outline, prepare_start, short_name
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.writing import link_or_copy, write_text
from l2sp_tf.training.checkpoints import Checkpoints


def run_plan(plan, **options):
    """Calls `run_plans` with one plan."""
    return run_plans([plan], **options)


def run_plans(plans, *, engine="local", cpus=1, gpus=0, estimate=False, dry_run=False, say=print, verbose=0):
    """Runs all settings of the plans that have no record yet.

    The folds of cross-validation run first, then the settings that it chose. Each run writes a record under the plan's
    workdir: after an interruption, the same call resumes.

    Args:
        plans: a list of `Plan`.
        engine, cpus, gpus: as in `engines.run_jobs`.
        estimate: measure the time on made-up images first; otherwise the first steps of the first training give it.
        dry_run: stop after the estimate.
        say: called with a line of text for each step of the work.
        verbose: of Keras `fit`.

    Returns:
        A list of records, each once: the runs on all training images in the order of the plans, then the selections
        under their workdirs.

    Raises:
        InputError: bad data, weights or settings; finished runs keep their records.
        OSError: a workdir cannot be written.
    """
    for plan in plans:
        say, verbose = _share(plan, engine, say, verbose)
    check_plans(plans)
    made = _outlines(plans, say)
    forecast = _say_plan(plans, made, say)
    if dry_run or estimate or engine != "local":
        say(forecast.measured_time())
    if dry_run:
        return []
    report = lambda seconds: say(forecast.time([seconds] * len(forecast.works)))  # noqa: E731
    clock = () if estimate or engine != "local" else (FirstSteps(report),)
    try:
        return _run_all(plans, made, clock, verbose, {"engine": engine, "cpus": cpus, "gpus": gpus, "say": say})
    finally:
        _NEEDED.clear()
        _STARTS.clear()
        _folds.cache_clear()


def _outlines(plans, say):
    """Makes the `Outline` of each start, by `Setup.key`."""
    made = {}
    for plan in plans:
        key = plan.setup.key()
        if key not in made:
            made[key] = outline(plan, say=say)
        plan.sweep.check_frozen(made[key].units)
    return made


def _run_all(plans, made, clock, verbose, options):
    """Decodes the data, prepares the starts, and runs all settings without a record."""
    say, units = options["say"], {key: start.units for key, start in made.items()}
    for start in made.values():
        start.tasks  # noqa: B018  a bad image raises before any training
    _NEEDED.update(plan.setup.key() for plan in plans)  # keeps every start until all runs are known
    questions = {}
    for i, plan in enumerate(plans):
        start = _start_of(plan, say, verbose, made=made.pop(plan.setup.key(), None), callbacks=clock)
        if plan.sweep.needs_fisher:
            start.fisher  # noqa: B018  computed now, so that no two workers estimate it at once
        questions |= {(i, symbol): _question(plan, start, symbol) for symbol in plan.sweep.penalties if plan.sweep.folds}
    if options["engine"] != "local":
        _STARTS.clear()  # each worker prepares its own start
    work = functools.partial(_run_job, say, verbose)

    def run(jobs):
        if options["engine"] == "local":
            _NEEDED.update(job[0].setup.key() for job in jobs)
        return run_jobs(work, jobs, **options)

    choices = _cross_validate(plans, questions, run, say)
    pairs = zip(plans, choices, strict=True)
    jobs = _jobs((plan, setting) for plan, chosen in pairs for setting in plan.runs(units[plan.setup.key()], chosen))
    _NEEDED.subtract(plan.setup.key() for plan in plans)
    found = run(jobs)
    selected = {path: None for plan in plans for path in sorted(plan.setup.workdir.glob("selections/*/selection.json"))}
    return found + [records.read_record(path) for path in selected]


def _share(plan, engine, say, verbose):
    """Checks that the devices can run the plan; returns `say` and `verbose`, silenced in all workers but the chief."""
    if engine != "local" and plan.distribute == "multiworker":
        raise InputError(f"distribute is multiworker and engine is {engine}: give one of them, as each uses all machines.")
    for recipe in (plan.setup.recipe, plan.setup.source_recipe):
        plan.devices.check_batch_size(recipe.batch_size)
        plan.devices.check_optimizer(recipe.optimizer(), plan.jit_compile is True)
    plan.devices.check_shared(plan.setup.workdir)
    return (say, verbose) if plan.devices.is_chief else (lambda text: None, 0)


def _jobs(pairs):
    """Returns jobs (plan, setting, numbered title); pairs with the same record appear once."""
    unique = list({(plan.setup.key(), setting): (plan, setting) for plan, setting in pairs}.values())
    return [(*pair, f"[{number}/{len(unique)}] {pair[1]}") for number, pair in enumerate(unique, start=1)]


def _run_job(say, verbose, job):
    plan, setting, title = job
    record = _run(_start_of(plan, say, verbose), plan, setting, lambda text: say(f"{title}: {text}"), verbose)
    _NEEDED.subtract([plan.setup.key()])
    if _NEEDED[plan.setup.key()] == 0:
        _STARTS.pop(plan.setup.key(), None)
    return record


_STARTS: dict = {}
_NEEDED: collections.Counter = collections.Counter()  # pending jobs of this process, by start; empty in a Ray worker


def _start_of(plan, say, verbose, **options):
    """Returns the `Start` of a plan. It is cached until its last pending job; without pending jobs, until the next start."""
    key = plan.setup.key()
    if key not in _STARTS:
        for other in [other for other in _STARTS if _NEEDED[other] <= 0]:
            del _STARTS[other]
        _STARTS[key] = prepare_start(plan, say=say, verbose=verbose, **options)
    return _STARTS[key]


def _run(start, plan, setting, say, verbose):
    """Fine-tunes and evaluates one setting, or reads its record if it has one; returns the record."""
    fisher = start.fisher if setting.needs_fisher else None
    recipe = setting.recipe_of(plan.setup.recipe)
    is_fold = setting.fold is not None
    task = _folds(start.target, plan.sweep.folds)[setting.fold] if is_fold else start.target
    settings = _settings(plan, start, setting, task, fisher)
    path = folder_of(plan.setup.workdir, setting, settings) / "run.json"
    devices = plan.devices
    if devices.chief_says(path.exists):
        record = records.read_record(path)
        say(f"already finished, {_outcome(record, is_fold)}")
        return record
    checkpoints = Checkpoints(path.parent / "checkpoints")
    say(f"{recipe.iterations} iterations" + (f", from step {checkpoints.newest} on" if checkpoints.newest else ""))
    options = {"anchors": start.anchors, "fisher": fisher, "seed": setting.seed, "frozen": setting.frozen, "verbose": verbose}
    options |= {"run_dir": path.parent, "checkpoint_every": plan.checkpoint_every, "save": plan.save_models and not is_fold}
    options |= {"strategy": devices.strategy, "jit_compile": plan.jit_compile, "callbacks": start.callbacks}
    options |= {} if is_fold else {"measure": lambda run: _measure(run, start, recipe)}
    if devices.is_chief:
        link_or_copy(start.anchors_path, path.parent / "anchors.safetensors")
        write_text(path.parent / "config.toml", configuration.text_of(plan, setting))
    record = run_record(start.pretrained, task, setting, recipe, settings, **options)
    record["anchors"] |= start.anchors_origin
    if fisher is not None:
        record["fisher"] = _without_weights(fisher.provenance)
    if devices.is_chief:
        records.write_record(path, record)
        for part in (checkpoints, Checkpoints(path.parent / "head" / "checkpoints")):
            part.remove()
    devices.wait_for_chief()
    say(f"{_outcome(record, is_fold)} ({record['seconds']:.1f} s)")
    keras.utils.clear_session(free_memory=True)
    return records.read_record(path)


_folds = functools.lru_cache(maxsize=1)(fold_tasks)  # cached: each fold's mean is a sum over all its pixels


def _outcome(record, is_fold):
    """Describes the result of a run in words."""
    if records.diverged(record):
        return f"diverged: {record['results']['diverged']}"
    text = f"accuracy {record['results']['accuracy']:.1%}" + (" on the fold" if is_fold else "")
    source = record["results"].get("source")
    return text + (f", source {source['target_statistics']['accuracy']:.1%}" if source else "")


def _without_weights(provenance):
    """Drops the hashes of single weights from the provenance of a Fisher diagonal; its `model` entry covers them."""
    return {name: value for name, value in provenance.items() if name != "weights"}


def _measure(run, start, recipe):
    """Measures a run on all training images: target accuracy, source accuracy, and R² of activations."""
    results = evaluate(run.model, start.target, crops=recipe.crops, answers=True)
    results["right"] = np.packbits(results["right"]).tobytes().hex()
    if start.source is not None:
        results["source"] = retention(run.model, start.pretrained, start.source, before=start.before, crops=recipe.crops)
    if start.units:
        target = start.target
        batches = test_batches(target.train, target.preprocessing, target.mean, batch_size=recipe.batch_size)
        results["r2"] = {name: box(values) for name, values in activation_r2(run.model, start.pretrained, batches).items()}
    return results


def _cross_validate(plans, questions, run, say):
    """Chooses a setting for each penalty of each plan with folds, and records each selection.

    Returns:
        A list with a dict from symbol to `Setting` for each plan, or None for a plan without folds. Penalties whose
        every setting diverged are missing.
    """
    places = [(i, symbol) for i, plan in enumerate(plans) if plan.sweep.folds for symbol in plan.sweep.penalties]
    searches = {(i, symbol): Search(symbol, plans[i].axes(symbol), plans[i].sweep.folds) for i, symbol in places}

    def run_all(pairs):
        jobs = _jobs((plans[i], setting) for (i, _), setting in pairs)
        found = {(job[0].setup.key(), job[1]): record for job, record in zip(jobs, run(jobs), strict=True)}
        return [found[plans[i].setup.key(), setting] for (i, _), setting in pairs]

    search_all(searches, run_all)
    choices = [{} if plan.sweep.folds else None for plan in plans]
    for (i, symbol), search in searches.items():
        choices[i] |= _choice(plans[i], questions[i, symbol], search, say)
    return choices


def _question(plan, start, symbol):
    """Returns `records.question` for the selection of a penalty's setting."""
    setting = plan.grid(symbol)[0]
    fisher = start.fisher if setting.needs_fisher else None
    return records.question(_settings(plan, start, setting, start.target, fisher))


def _choice(plan, question, search, say):
    """Records the selection of a search; returns its choice as {symbol: `Setting`}, or {} if every setting diverged."""
    selection, symbol = search.selection(plan.setup.recipe), search.symbol
    if plan.devices.is_chief:
        write_selection(plan.setup.workdir, selection.record(question, plan.sweep.folds))
    if selection.best is None:
        say(f"{plan.setup.target}: every setting of {symbol} diverged in cross-validation, so none is run on all training images")
        return {}
    best = Setting(symbol, selection.best.alpha, selection.best.beta, selection.best.learning_rate)
    edge = f", at the edge of what was tried ({', '.join(selection.edges)})" if selection.edges else ""
    say(f"{plan.setup.target}: cross-validation chose {best.penalty}, beta {best.beta:g}, rate {best.learning_rate:g}{edge}")
    return {symbol: best}


def _say_plan(plans, made, say):
    """Says how many runs the plans have, how many are left, and their disk space; returns the `Forecast`."""
    counted, left = set(), {key: [] for key in made}
    found = {workdir: recorded_in(workdir) for workdir in {plan.setup.workdir for plan in plans}}
    for plan in plans:
        key = plan.setup.key()
        recorded = Recorded(plan, made[key], found[plan.setup.workdir], _settings)
        for setting in (*plan.trials(), *plan.runs(made[key].units, _guess(plan))):
            if (key, setting) not in counted and not recorded.has(setting):
                left[key].append(setting)
            counted.add((key, setting))
    trials = sum(setting.fold is not None for _, setting in counted)
    count = sum(map(len, left.values()))
    swept = ((plan, symbol) for plan in plans if plan.sweep.folds for symbol in plan.sweep.penalties)
    grows = any(len(values) > 1 for plan, symbol in swept for values in plan.axes(symbol).values())
    more = f" and up to {MOST_EXTENSIONS} values beyond the end of a grid at which its best lies" if grows else ""
    say(f"plan: {trials} runs on folds{more}, then {len(counted) - trials} runs; {count} are left")
    first = {start.trained_path: key for key, start in reversed(made.items()) if start.trains_source}
    forecast = Forecast([Work(start, tuple(left[key]), key in first.values()) for key, start in made.items()])
    say(forecast.disk())
    return forecast


def _guess(plan):
    """Returns the first setting of each penalty in place of the future choice: the number of runs is the same."""
    return {symbol: plan.grid(symbol)[0] for symbol in plan.sweep.penalties} if plan.sweep.folds else None


def _settings(plan, start, setting, task, fisher):
    """Returns everything that a run's result depends on; its key is a hash of this."""
    source = start.source
    settings = {
        "source": short_name(source.name if source is not None else plan.setup.weights),
        "target": short_name(start.target.name),
        "source_digest": source.digest if source is not None else None,
        "skipped": [len(start.target.train.skipped), len(start.target.test.skipped)],
        "per_class": plan.setup.per_class,
        "subset_seed": drawing_seed(plan.setup.target, plan.setup.per_class, plan.setup.subset_seed, plan.setup.protocol),
        "protocol": plan.setup.protocol,
        "weights": start.origin,
        "backbone": start.backbone,
        "source_mean": source.mean.tolist() if source is not None else None,
        **exactness(plan),
    }
    if start.mean_of is not None:
        settings["source_mean_of"] = start.mean_of
    if setting.fold is not None:
        settings["fold"] = [setting.fold, plan.sweep.folds]
    return settings_of(setting, task, plan.setup.recipe, start.anchors, fisher, **settings)
