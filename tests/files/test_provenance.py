"""Provenance in records; and results change only with RESULTS_VERSION, which is part of their keys."""

import datetime
import hashlib
import importlib.util
import pathlib
import shutil
import sys

import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf.data import load_dataset, prepare, test_batches
from l2sp_tf.files import provenance
from l2sp_tf.models import zoo

# Results of this version. If a change of the code changes a number, raise RESULTS_VERSION and record the new numbers.
RECORDED = {"version": 2, "cross_entropy": 0.79936, "penalty": 0.42884, "distance": 0.134678, "fisher": 0.485017, "right": 266}


def test_equal_settings_give_the_results_that_are_recorded_for_this_version():
    recipe = l2sp.Recipe.digits().replace(iterations=8, batch_size=16, blur="gaussian", blur_kernel=3, mirror=True)
    target, source = (prepare(load_dataset(f"digits/{name}", per_class=20), recipe.images) for name in ("target", "source"))
    pretrained = zoo.small_resnet((8, 8, 3), 10, widths=(4, 8), depths=(1, 1))
    rng = np.random.default_rng(0)
    for weight in pretrained.weights:  # by hand: Keras' initializers may change with its version
        size, sign = rng.uniform(0.5, 1.5, weight.shape), np.where(rng.uniform(size=weight.shape) < 0.5, 1, -1)
        weight.assign(size * sign / np.sqrt(np.prod(weight.shape[:-1])) if len(weight.shape) > 1 else size)
    fisher = l2sp.fisher_diagonal(
        pretrained, test_batches(source.train, source.preprocessing, source.mean, batch_size=50), "exact"
    )
    run = l2sp.finetune(pretrained, target, l2sp.GroupLassoSPFisher(0.1), recipe, fisher=fisher, verbose=0)
    found = {"version": provenance.RESULTS_VERSION, **{name: run.history[-1][name] for name in ("penalty", "distance")}}
    found["cross_entropy"] = float(np.mean([row["cross_entropy"] for row in run.history]))
    found["fisher"] = float(np.mean([array.mean(dtype="float64") for array in fisher.values()]))
    found["right"] = l2sp.evaluate(run.model, target)["correct"]
    assert abs(found.pop("right") - RECORDED["right"]) <= 2
    assert found == pytest.approx({name: value for name, value in RECORDED.items() if name != "right"}, rel=2e-3)


def test_the_digest_is_that_of_the_source(tmp_path):
    root = pathlib.Path(l2sp.__file__).parent
    sha = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sha.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes() + b"\0")
    assert provenance.source_digest() == sha.hexdigest()[:16]
    shutil.copytree(root, tmp_path / "l2sp_tf")
    with (tmp_path / "l2sp_tf" / "theory.py").open("a") as file:
        file.write("# a change\n")
    spec = importlib.util.spec_from_file_location("copied_provenance", tmp_path / "l2sp_tf/files/provenance.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    other = copied.source_digest()
    assert len(other) == 16 and other != provenance.source_digest()


def test_a_record_names_code_machine_command_and_time(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", "--target=a b/c", "--alpha=0.1"])
    made = provenance.provenance()
    assert made["command"] == "train.py '--target=a b/c' --alpha=0.1"
    assert made["code"]["results"] == provenance.RESULTS_VERSION and len(made["code"]["digest"]) == 16
    assert set(made["machine"]) == {"device", "processors", "architecture"} and made["machine"]["processors"] >= 1
    since = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(made["time"])
    assert abs(since.total_seconds()) < 60
