"""From a plan to records: every penalty, strength and seed is run once, and each run leaves a run.json."""

import dataclasses
import json
import pathlib

import keras
import numpy as np

from l2sp_tf import models, records
from l2sp_tf.anchors import Anchors
from l2sp_tf.data import Task, load_dataset, prepare, test_batches
from l2sp_tf.errors import InputError
from l2sp_tf.evaluation import evaluate, retention
from l2sp_tf.files import link_or_copy
from l2sp_tf.fisher import Fisher, fisher_diagonal
from l2sp_tf.monitor import write_histograms
from l2sp_tf.recipe import Recipe
from l2sp_tf.regularizers import PENALTIES, FisherPenalty
from l2sp_tf.training import finetune, preprocessing_of, train_source


@dataclasses.dataclass(frozen=True)
class FisherPlan:
    """How the Fisher diagonal is estimated, on central crops of the source's training images in random order.

    Attributes:
        mode, samples, tolerance: as `fisher_diagonal` takes them.
        images: how many images; None for all.
        batch: images a batch.
        transforms: pairs of a method of `Fisher` ("clip", "epsilon", "normalise") and its value or None.
    """

    mode: str = "rademacher"
    samples: int = 1
    images: int | None = None
    batch: int = 64
    tolerance: float | None = None
    transforms: tuple = ()

    def __post_init__(self):
        for name, value in self.transforms:
            if name not in ("clip", "epsilon", "normalise") or (value is None) != (name == "normalise"):
                raise InputError(f"The Fisher transform {name}={value} is unknown: give clip=MAX, epsilon=VALUE or normalise.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run: the product of penalties, strengths and seeds on one pair of tasks.

    Attributes:
        workdir: the folder that gets anchors/, sources/ and runs/.
        source, target: data sets, as `load_dataset` takes them; source may be None if the
            weights come from elsewhere, and then nothing is measured on the source task.
        backbone: as `models.backbone` takes it, with widths, depths and block.
        weights: "none" to train the source model from scratch, "imagenet", or a file.
        pixels: "rgb", "bgr" or "torch": how the weights see pixels, where their file does not say.
        penalties: symbols of PENALTIES.
        alphas: strengths; empty for the recipe's own of each penalty.
        seeds: one run for each.
        recipe, source_recipe: of fine-tuning and of training from scratch.
        per_class: training images a class of the target; None for all.
        subset_seed: draws them at random; None as `load_dataset` takes it.
        protocol: whose splits: "paper" or "authors".
        data_dir: where TensorFlow Datasets keeps its sets; None for its own default.
        skip_bad_images: leave out images that cannot be decoded.
        save_models: keep each fine-tuned model beside its record.
        fisher: how the Fisher penalties get their F_jj, a `FisherPlan`.
    """

    workdir: pathlib.Path
    source: str | None
    target: str
    backbone: str
    weights: str
    penalties: tuple
    alphas: tuple
    seeds: tuple
    recipe: Recipe
    source_recipe: Recipe
    pixels: str | None = None
    widths: tuple = (16, 32, 64)
    depths: tuple = (1, 1, 1)
    block: str = "basic"
    per_class: int | None = None
    subset_seed: int | None = None
    protocol: str = "paper"
    data_dir: str | None = None
    skip_bad_images: bool = False
    save_models: bool = True
    fisher: FisherPlan = FisherPlan()

    def __post_init__(self):
        for symbol in self.penalties:
            if symbol not in PENALTIES:
                raise InputError(f"The penalty {symbol!r} is unknown: give one of {', '.join(PENALTIES)}.")
            if issubclass(PENALTIES[symbol], FisherPenalty) and self.source is None:
                raise InputError(f"The penalty {symbol} needs source images for its Fisher diagonal: give them with --source.")
        if not self.penalties or not self.seeds:
            raise InputError("There is nothing to run: give at least one penalty and one seed.")
        if self.weights == "none" and self.source is None:
            raise InputError("weights=none trains a source model from scratch: give its data with --source.")
        if self.weights == "none" and self.recipe.mean == "weights":
            raise InputError("mean is weights, but weights=none has no mean yet: give --mean=training or three numbers.")

    def runs(self):
        """The penalties of the product, each with its seed."""
        for symbol in dict.fromkeys(self.penalties):
            for alpha in dict.fromkeys(self.alphas or (self.recipe.alpha_for(symbol),)):
                for seed in dict.fromkeys(self.seeds):
                    yield PENALTIES[symbol](alpha), seed


def run_plan(plan, *, say=print, verbose=0):
    """Runs what of a plan is not yet recorded, and returns all its records.

    Args:
        plan: a `Plan`.
        say: called with a line of text for each step of the work.
        verbose: of Keras `fit`.

    Returns:
        A list of records, in the order of the plan.

    Raises:
        InputError: bad data, weights or settings; finished runs stay.
        OSError: the workdir cannot be written.
    """
    runs = list(plan.runs())  # a bad strength is told before any work is done
    start = _prepare_start(plan, any(isinstance(penalty, FisherPenalty) for penalty, _ in runs), say, verbose)
    done = []
    for number, (penalty, seed) in enumerate(runs, start=1):
        title = f"[{number}/{len(runs)}] {penalty}, seed {seed}"
        done.append(_run(plan, start, penalty, seed, lambda text, title=title: say(f"{title}: {text}"), verbose))
    return done


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
    """What all runs of a plan start from."""

    target: Task
    source: Task | None
    pretrained: keras.Model
    origin: str
    anchors: Anchors
    anchors_path: pathlib.Path
    before: dict | None
    fisher: Fisher | None


def _prepare_start(plan, needs_fisher, say, verbose):
    plan.workdir.mkdir(parents=True, exist_ok=True)
    pixels = models.pixels_of(None if plan.weights == "none" else plan.weights, plan.pixels)
    places = {"protocol": plan.protocol, "data_dir": plan.data_dir, "cache_dir": plan.workdir / "cache"}
    dataset = load_dataset(plan.target, per_class=plan.per_class, seed=plan.subset_seed, **places)
    target = _task(plan, dataset, plan.recipe, pixels, say)
    source = before = None
    if plan.source is not None:
        source = _task(plan, load_dataset(plan.source, **places), plan.source_recipe, pixels, say)
    pretrained, origin = _pretrained(plan, source, say, verbose)
    anchors, anchors_path = _stored_anchors(plan, pretrained)
    if source is not None:
        before = _source_accuracy(pretrained, source, plan.recipe.crops)
        say(f"source model on {source.name}: accuracy {before['accuracy']:.1%} on {before['total']} test images")
    fisher = _fisher(plan, pretrained, source, anchors, say, verbose) if needs_fisher else None
    return _Start(target, source, pretrained, origin, anchors, anchors_path, before, fisher)


def _run(plan, start, penalty, seed, say, verbose):
    """One fine-tuning with its evaluation, or its record if it has one."""
    fisher = start.fisher if isinstance(penalty, FisherPenalty) else None
    settings = _settings(plan, start, penalty, seed, fisher)
    folder = plan.workdir / "runs" / f"{penalty.symbol}-{penalty.alpha:g}-seed{seed}-{records.run_key(settings)}"
    if (folder / "run.json").exists():
        record = records.read_record(folder / "run.json")
        say(f"already finished, target accuracy {record['results']['accuracy']:.1%}")
        return record
    say(f"{plan.recipe.iterations} iterations")
    link_or_copy(start.anchors_path, folder / "anchors.safetensors")
    options = {"fisher": fisher, "seed": seed, "run_dir": folder, "verbose": verbose, "save": plan.save_models}
    run = finetune(start.pretrained, start.target, penalty, plan.recipe, anchors=start.anchors, **options)
    results, kept = evaluate(run.model, start.target, crops=plan.recipe.crops), ""
    if start.source is not None:
        results["source"] = retention(run.model, start.pretrained, start.source, before=start.before, crops=plan.recipe.crops)
        kept = f", source {results['source']['target_statistics']['accuracy']:.1%}"
    record = _write(folder, settings, run, results, fisher)
    say(f"target accuracy {results['accuracy']:.1%}{kept} ({run.seconds:.1f} s)")
    keras.utils.clear_session(free_memory=True)
    return record


def _task(plan, dataset, recipe, pixels, say):
    say(f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images of {len(dataset.classes)} classes")
    mean = recipe.mean_for(dataset.name, pixels)
    options = {"mean": mean, "skip_bad_images": plan.skip_bad_images, "cache_dir": plan.workdir / "cache"}
    task = prepare(dataset, preprocessing_of(recipe, pixels), **options)
    say(f"{dataset.name}: pixels {task.pixels}, {_origin_of_mean(recipe.mean, mean)}")
    skipped = task.train.skipped + task.test.skipped
    if skipped:
        say(f"{dataset.name}: {len(skipped)} images left out that cannot be decoded, the first is {skipped[0]}")
    return task


def _pretrained(plan, source, say, verbose):
    """The pre-trained model, and what tells it from others: trained from scratch, downloaded or read."""
    if plan.weights.endswith(".keras"):
        return models.load_model(plan.weights), "file"
    classes = len(source.classes) if source is not None else models.head_classes(plan.weights) or 1000
    shape = {"image_size": plan.recipe.crop, "widths": plan.widths, "depths": plan.depths, "block": plan.block}
    if plan.weights != "none":
        model = models.backbone(plan.backbone, classes, weights=plan.weights, **shape)
        return model, "imagenet" if plan.weights == "imagenet" else "file"
    keras.utils.set_random_seed(0)
    model = models.backbone(plan.backbone, classes, **shape)
    identity = {"data": source.digest, "skipped": len(source.train.skipped), "recipe": _plain(plan.source_recipe)}
    key = records.run_key({**identity, "backbone": plan.backbone, **_plain(shape), "versions": records.versions()})
    folder = plan.workdir / "sources" / key
    path = folder / "weights.safetensors"
    if path.exists():
        models.load_weights(model, path)
        say(f"source model: trained before, read from {path}")
    else:
        say(f"source model: training {plan.backbone} from scratch, {plan.source_recipe.iterations} iterations")
        run = train_source(model, source, plan.source_recipe, run_dir=folder, verbose=verbose, save=False)
        Anchors.of(model, source.pixels).save(path)
        say(f"source model: trained in {run.seconds:.1f} s")
    return models.detached_copy(model), "scratch"


def _stored_anchors(plan, pretrained):
    """The anchors of the pre-trained model, and the file under the workdir that all runs share."""
    anchors = Anchors.of(pretrained)
    path = plan.workdir / "anchors" / f"{anchors.digest[:16]}.safetensors"
    if path.exists():
        return Anchors.load(path), path
    anchors.save(path)
    return anchors, path


def _source_accuracy(pretrained, source, crops):
    classes = pretrained.output_shape[-1]
    if classes != len(source.classes):
        raise InputError(
            f"The pre-trained model has {classes} classes, but {source.name} has {len(source.classes)}: "
            "give the source data it was trained on, or no --source."
        )
    return evaluate(pretrained, source, crops=crops)


def _fisher(plan, pretrained, source, anchors, say, verbose):
    """The Fisher diagonal of the pre-trained model on the source's training images: estimated once, then read."""
    f = plan.fisher
    count = len(source.train) if f.images is None else min(f.images, len(source.train))
    identity = {"anchors": anchors.digest, "data": source.digest, "skipped": len(source.train.skipped), "images": count}
    identity |= {"mode": f.mode, "samples": f.samples, "tolerance": f.tolerance, "batch": f.batch if f.tolerance else None}
    seen = {"preprocessing": _plain(source.preprocessing), "mean": source.mean.tolist()}
    key = records.run_key({**identity, **seen})
    path = plan.workdir / "fisher" / f"{key}.safetensors"
    if path.exists():
        fisher = Fisher.load(path)
        say(f"Fisher diagonal: estimated before, read from {path}")
    else:
        say(f"Fisher diagonal: {f.mode} on up to {count} images of {source.name}")
        order = np.random.default_rng(0).permutation(len(source.train))[:count]  # so that any part is a fair sample
        batches = test_batches(source.train, source.preprocessing, source.mean, batch_size=f.batch, order=order)
        options = {"tolerance": f.tolerance, "progress": bool(verbose), "source": _short(source.name)}
        fisher = fisher_diagonal(pretrained, batches, f.mode, f.samples, **options)
        fisher.save(path)
        write_histograms(path.parent / "tensorboard" / key, fisher)
    worst = max(fisher.standard_error().values())
    say(f"Fisher diagonal: {fisher.provenance['images']} images, relative standard error of a layer at most {worst:.1%}")
    for name, value in f.transforms:
        fisher = getattr(fisher, name)(*([] if value is None else [value]))
    return fisher


def _settings(plan, start, penalty, seed, fisher):
    """What a run's result depends on; the key of the run is made of it."""
    return {
        "source": _short(start.source.name if start.source is not None else plan.weights),
        "target": _short(start.target.name),
        "target_digest": start.target.digest,
        "source_digest": start.source.digest if start.source is not None else None,
        "skipped": [len(start.target.train.skipped), len(start.target.test.skipped)],
        "per_class": plan.per_class,
        "anchors": start.anchors.digest,
        "weights": start.origin,
        "backbone": plan.backbone,
        "pixels": _plain(start.target.pixels),
        "source_mean": start.source.mean.tolist() if start.source is not None else None,
        "penalty": penalty.symbol,
        "alpha": penalty.alpha,
        "beta": plan.recipe.beta,
        "seed": seed,
        "recipe": _plain(plan.recipe),
        **({"fisher": fisher.digest} if fisher is not None else {}),
    }


def _origin_of_mean(choice, mean):
    """Where the mean of a task comes from, in words."""
    if mean is not None:
        return "which was given" if isinstance(choice, tuple) else f"that of the {choice}"
    return "that of its training images" + (", as the authors publish none for it" if choice == "authors" else "")


def _short(path):
    """The last two parts of a path: enough to tell tasks apart in a table, and no record of a machine."""
    return "/".join(pathlib.Path(path).parts[-2:])


def _write(folder, settings, run, results, fisher):
    record = {
        "settings": settings,
        "versions": records.versions(),
        "coverage": {
            "digest": run.coverage.digest,
            "counts": {name: list(counts) for name, counts in run.coverage.counts.items()},
        },
        "anchors": {"digest": run.anchors.digest, "file": "anchors.safetensors"},
        "results": {**results, "distance": run.history[-1]["distance"], "penalty": run.history[-1]["penalty"]},
        "seconds": run.seconds,
        **({"fisher": fisher.provenance} if fisher is not None else {}),
    }
    records.write_record(folder / "run.json", record)
    return records.read_record(folder / "run.json")


def _plain(value):
    """A dataclass or dict as JSON would give it back, so that keys do not depend on tuples and lists."""
    return json.loads(json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value))
