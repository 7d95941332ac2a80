"""How large delta files of finished runs are, and what each part of the encoding is worth.

For each run of a workdir of train.py (model.keras beside anchors.safetensors): the share of the weights that differ
from their anchors, and the size of the file as a share of all weights. Then the shared weights alone, without the head and
the file's header: as they are encoded, with XOR in the place of subtraction, deflated without their anchors, and as
places and values.

    python -m benchmarks.delta runs/digits
"""

import argparse
import pathlib
import tempfile
import time
import zlib

import numpy as np

import l2sp_tf as l2sp
from l2sp_tf.models.keras_files import load_model
from l2sp_tf.penalties import delta
from l2sp_tf.penalties.matching import match


def measure(folder):
    """The figures of one run: shares of the bytes of all its weights, and seconds."""
    anchors, model = l2sp.Anchors.load(folder / "anchors.safetensors"), load_model(folder / "model.keras")
    with tempfile.TemporaryDirectory() as place:
        start = time.process_time()
        size = l2sp.save_delta(model, anchors, pathlib.Path(place) / "d.safetensors")
        saved = time.process_time()
        l2sp.load_delta(model, anchors, pathlib.Path(place) / "d.safetensors")
        seconds = saved - start, time.process_time() - saved
    weights = l2sp.Anchors.of(model)
    sizes = dict.fromkeys(("differ", "encoded", "by XOR", "deflated alone", "places and values"), 0)
    numbers = 0
    for key, other in match(weights, anchors).pairs.items():
        bits, base = delta._bits(weights[key]), delta._bits(anchors[other])
        changed = int((bits != base).sum())
        numbers += bits.size
        sizes["differ"] += changed
        sizes["encoded"] += min(delta._packed(bits, base).nbytes, bits.nbytes) if changed else 0
        sizes["deflated alone"] += _deflated(bits)
        sizes["by XOR"] += _deflated(bits ^ base)
        sizes["places and values"] += min(changed * (4 + bits.itemsize), bits.nbytes)
    full = size.full_bytes
    shares = {name: value / full for name, value in sizes.items()} | {"differ": sizes["differ"] / numbers}
    return {"numbers": numbers, **shares, "delta file": size.bytes / full, "seconds": seconds}


def _deflated(bits):
    return min(len(zlib.compress(bits.view("u1").reshape(-1, bits.itemsize).T.tobytes())), bits.nbytes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", type=pathlib.Path)
    runs = sorted(path.parent for path in parser.parse_args().workdir.glob("runs/*/model.keras"))
    columns = ("differ", "delta file", "encoded", "by XOR", "deflated alone", "places and values")
    print("| run | weights | " + " | ".join(columns) + " |\n" + "| --- " * 8 + "|")
    seconds = []
    for run in runs:
        found = measure(run)
        seconds.append(found["seconds"])
        shares = " | ".join(f"{found[name]:.1%}" for name in columns)
        print(f"| {run.name.rpartition('-')[0]} | {found['numbers']:,} | {shares} |", flush=True)
    print(f"seconds of processor time to save and to load, medians: {np.median(seconds, axis=0).round(3).tolist()}")


if __name__ == "__main__":
    main()
