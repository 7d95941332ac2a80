"""What each setting of a recipe does for a real network on small images: accuracy on held-out training images, and source kept.

EfficientNet-Lite0 with its ImageNet weights is fine-tuned by L2-SP on four fifths of a target's training images, once for
each setting, and judged on the last fifth. The source is judged on its training split too, so that no test image is read.

    python -m benchmarks.recipes --source SOURCE --targets DOGS,CALTECH,CLOTHING --workdir FOLDER

SOURCE is a folder or zip of photographs of ImageNet's classes, named by their WordNet identifiers. A second call goes on where
the first one stopped.
"""

import argparse
import dataclasses
import json
import pathlib

import l2sp_tf as l2sp
from benchmarks.common import machine, table
from l2sp_tf.data.datasets import load_dataset
from l2sp_tf.data.pipeline import Preprocessing, prepare
from l2sp_tf.experiments.selection import fold_tasks
from l2sp_tf.models.pixels import PIXELS

SIZE, BATCH, STEPS = 128, 32, 200
RELATIVE = Preprocessing.for_size(SIZE)
NONE, BLUR = {"blur": "none"}, {"blur_kernel": RELATIVE.blur_kernel, "blur_sigma": RELATIVE.blur_sigma}
KEPT, PROBED = {"batch_norm": "source"}, {"head_steps": 100}
# the name of each row and its settings, beside SIZE, BATCH and STEPS; written down before any of them was run
ROWS = {
    "the paper's: blur of 5 pixels, statistics of the batch, rate 0.01": {"learning_rate": 0.01},
    "blur relative to the size": BLUR | {"learning_rate": 0.01},
    "no blur": NONE | {"learning_rate": 0.01},
    "no blur, rate 0.001": NONE | {"learning_rate": 0.001},
    "no blur, head first": NONE | PROBED | {"learning_rate": 0.01},
    "no blur, the source's statistics": NONE | KEPT | {"learning_rate": 0.01},
    "no blur, the source's statistics, rate 0.001": NONE | KEPT | {"learning_rate": 0.001},
    "no blur, the source's statistics, head first, rate 0.0003": NONE | KEPT | PROBED | {"learning_rate": 0.0003},
    "no blur, the source's statistics, head first, rate 0.001": NONE | KEPT | PROBED | {"learning_rate": 0.001},
    "no blur, the source's statistics, head first, rate 0.003": NONE | KEPT | PROBED | {"learning_rate": 0.003},
    "relative blur, the source's statistics, head first, rate 0.001": BLUR | KEPT | PROBED | {"learning_rate": 0.001},
    "the head alone, 300 steps": NONE | KEPT | PROBED | {"head_steps": 300, "learning_rate": 0.03, "iterations": 1},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", required=True)
    parser.add_argument("--targets", required=True)
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--rows", help="the numbers of the rows to run, from 1; all by default")
    given = parser.parse_args()
    names = list(ROWS)
    chosen = names if given.rows is None else [names[int(number) - 1] for number in given.rows.split(",")]
    pretrained = l2sp.load_pretrained("efficientnet_lite0", image_size=SIZE)
    images = Preprocessing(resize=RELATIVE.resize, crop=SIZE, pixels=PIXELS["raw"])
    cache = given.workdir / "cache"
    source = prepare(load_dataset(given.source, classes="imagenet", cache_dir=cache), images, mean=(0, 0, 0))
    source = dataclasses.replace(source, test=source.train)
    before = measured(given.workdir / "before.json", l2sp.evaluate, pretrained, source)
    found = {}
    for target in given.targets.split(","):
        task = prepare(load_dataset(target, cache_dir=cache), images, mean=(0, 0, 0))
        held_out = fold_tasks(task, 5)[0]
        for name in chosen:
            folder = given.workdir / f"{pathlib.Path(target).name}-{given.alpha:g}-{names.index(name) + 1}"
            recipe = l2sp.Recipe(batch_size=BATCH, iterations=STEPS, mean=(0, 0, 0), images=images).replace(**ROWS[name])
            run = (pretrained, held_out, source, before, recipe, given.alpha, folder)
            found[name, target] = measured(folder / "found.json", result, *run)
    print(report(found, chosen, given.targets.split(","), before))


def measured(path, measure, *arguments):
    """Reads what an earlier call measured, or measures it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measure(*arguments)))
    return json.loads(path.read_text())


def result(pretrained, held_out, source, before, recipe, alpha, folder):
    task = dataclasses.replace(held_out, preprocessing=recipe.images)
    try:
        run = l2sp.finetune(pretrained, task, l2sp.L2SP(alpha), recipe, run_dir=folder, save=False, verbose=0)
    except FloatingPointError:
        return {"accuracy": None}
    kept = l2sp.retention(run.model, pretrained, source, before=before)
    accuracy = l2sp.evaluate(run.model, task)["accuracy"]
    sources = {name: kept[name]["accuracy"] for name in ("target_statistics", "source_statistics")}
    found = {"accuracy": accuracy, **sources, "seconds": run.seconds}
    print(folder.name, {name: round(value, 3) for name, value in found.items()}, flush=True)
    return found


def report(found, names, targets, before):
    def cell(row):
        if row["accuracy"] is None:
            return "diverged"
        return f"{row['accuracy']:.1%} / {row['target_statistics']:.1%} / {row['source_statistics']:.1%}"

    rows = [[name, *(cell(found[name, target]) for target in targets)] for name in names]
    heads = [pathlib.Path(target).name for target in targets]
    note = f"Held-out accuracy / source kept with the target's and the source's statistics; before {before['accuracy']:.1%}."
    return "\n\n".join([table(["setting", *heads], rows), note, machine()])


if __name__ == "__main__":
    main()
