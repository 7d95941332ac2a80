"""Reports what an interrupted command left on disk."""

import contextlib

from l2sp_tf.training.checkpoints import Checkpoints

CLOCK = 1.0  # seconds by which a disk's clock may lag


def kept(plans, since):
    """Lists the finished runs, and the last saved step of each unfinished run.

    Args:
        plans: the plans of the command.
        since: the start of the command, by `time.time()`.

    Returns:
        A list of lines.
    """
    lines = []
    lengths = {"sources": {plan.setup.source_recipe.iterations for plan in plans}}
    lengths |= dict.fromkeys(("folds", "runs"), {plan.setup.recipe.iterations for plan in plans})
    for workdir in dict.fromkeys(plan.setup.workdir for plan in plans):
        finished = [path for kind in ("folds", "runs") for path in sorted(workdir.glob(f"{kind}/*/run.json"))]
        new = [path.parent.name for path in finished if path.stat().st_mtime >= since - CLOCK]
        named = f", of this command {', '.join(new)}" if new else ""
        lines.append(f"finished in {workdir}: {len(finished)} runs{named}")
        for kind, result in (("sources", "weights.safetensors"), ("folds", "run.json"), ("runs", "run.json")):
            for folder in sorted(workdir.glob(f"{kind}/*/")):
                if not (folder / result).exists() and _touched(folder) >= since - CLOCK:
                    lines.append(_state(folder, lengths[kind]))
    return lines


def _touched(folder):
    """Returns the time of the last write to a folder or its entries."""
    times = [folder.stat().st_mtime]
    with contextlib.suppress(FileNotFoundError):  # a worker may still be removing checkpoints
        times += [path.stat().st_mtime for path in folder.iterdir()]
    return max(times)


def _state(folder, lengths):
    step = Checkpoints(folder / "checkpoints").newest
    of = f" of {next(iter(lengths))}" if len(lengths) == 1 else ""
    where = f"saved after step {step}{of}" if step else "not saved yet, and will start over"
    return f"under way: {folder.parent.name}/{folder.name}, {where}"
