"""Several devices give the results of one: mirrored on two virtual CPU devices, and two processes on loopback.

The networks have batch norm, and `replicated` makes it take its statistics over all replicas. Keras' default takes them
over each replica's share of the batch, and then the results would not agree.
"""

import csv
import json
import os
import pathlib
import socket
import subprocess
import sys

import distributed_job as job
import keras
import numpy as np
import pytest
import tensorflow as tf
from test_runner import run as run_plans, tiny as small_plan

import l2sp_tf as l2sp
from l2sp_tf.files.errors import InputError
from l2sp_tf.penalties.formulas import PENALTIES
from l2sp_tf.training import devices

TIMEOUT = 400  # seconds until workers that hang are killed


def assert_close(found, expected):
    assert set(expected) <= set(found)
    for key, weight in expected.items():
        np.testing.assert_allclose(found[key], weight, atol=1e-5, err_msg=key)


@pytest.fixture(scope="module")
def on_one_device():
    """Weights and log of one fine-tuning under each penalty on one device."""
    return {symbol: job.finetuned(symbol) for symbol in PENALTIES}


@pytest.mark.parametrize("symbol", list(PENALTIES))
def test_mirrored_fine_tuning_is_that_of_one_device(symbol, mirrored, on_one_device, tmp_path):
    weights, history = job.finetuned(symbol, mirrored, tmp_path)
    expected, rows = on_one_device[symbol]
    assert_close(weights, expected)
    for row, other in zip(history, rows, strict=True):
        assert row == pytest.approx(other, abs=1e-4)
    assert not keras.models.load_model(tmp_path / "model.keras").get_layer("bn").synchronized


def run_workers(scenario, folder):
    """Runs two workers on free ports of this machine, and returns the status and the output of each."""
    with socket.socket() as one, socket.socket() as two:
        for s in (one, two):
            s.bind(("localhost", 0))
        addresses = [f"localhost:{s.getsockname()[1]}" for s in (one, two)]
    root = pathlib.Path(__file__).parents[2]
    workers = []
    for index in range(2):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"TF_CONFIG": json.dumps(config), "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(root / "tests/distributed_job.py"), scenario, str(folder)]
        options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        workers.append(subprocess.Popen(command, **options))
    try:
        outputs = [worker.communicate(timeout=TIMEOUT)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [worker.returncode for worker in workers], outputs


@pytest.mark.slow
def test_two_workers_fine_tune_as_one_process_under_every_penalty(tmp_path, on_one_device):
    codes, outputs = run_workers("penalties", tmp_path)
    assert codes == [0, 0], outputs
    for index in range(2):
        for symbol, (expected, history) in on_one_device.items():
            with np.load(tmp_path / f"{symbol}-{index}.npz") as found:
                assert_close(found, expected)
                assert float(found["loss"]) == pytest.approx(history[-1]["cross_entropy"], abs=1e-5)
        assert (tmp_path / f"agreed-{index}").read_text() == "True"
    # two workers that both wrote the log would have mixed their rows
    rows = (tmp_path / "run-l2_sp/log.csv").read_text().splitlines()
    assert len(rows) == 1 + len(on_one_device["l2_sp"][1])
    assert len(list((tmp_path / "run-l2_sp/tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_a_killed_worker_stops_the_other_and_a_restart_resumes_from_the_checkpoint(tmp_path, on_one_device):
    codes, outputs = run_workers("die", tmp_path)
    assert codes == [1, -9] and "A worker of this run was lost in step" in outputs[0], outputs
    codes, outputs = run_workers("restart", tmp_path)
    assert codes == [0, 0], outputs
    expected, history = on_one_device["l2_sp"]
    for index in range(2):
        with np.load(tmp_path / f"restart-{index}.npz") as found:
            assert_close(found, expected)
            assert 2 <= found["first"] <= 3
    rows = list(csv.DictReader((tmp_path / "run/log.csv").open()))
    assert [float(row["cross_entropy"]) for row in rows] == pytest.approx([row["cross_entropy"] for row in history], abs=1e-4)


def test_an_interrupted_mirrored_run_resumes_from_its_checkpoint(mirrored, on_one_device, tmp_path):
    stop = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: [][0] if batch == 2 else None)
    with pytest.raises(IndexError):
        job.finetuned("l2_sp", mirrored, tmp_path, [stop])
    run = job.finetune("l2_sp", strategy=mirrored, run_dir=tmp_path)
    expected, rows = on_one_device["l2_sp"]
    assert run.resumed_at == 3
    assert_close(job.values(run.model), expected)
    for row, other in zip(run.history, rows, strict=True):
        assert row == pytest.approx(other, abs=1e-4)


def tiny(layers=(), **options):
    """A compiled model of one layer and the given ones, built in the current scope."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), *[layer() for layer in layers], keras.layers.Dense(3, dtype="float32")])
    optimizer = options.pop("optimizer", {})
    scaled = options.pop("scaled", None)
    made = keras.optimizers.SGD(0.1, **optimizer)
    made = made if scaled is None else keras.optimizers.LossScaleOptimizer(made, initial_scale=scaled)
    model.compile(made, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return model


REFUSED = {
    "jit_compile": {"jit_compile": True},
    "gradient_accumulation_steps": {"optimizer": {"gradient_accumulation_steps": 2}},
    "ema_overwrite_frequency": {"optimizer": {"use_ema": True, "ema_overwrite_frequency": 2}},
    "clipnorm": {"optimizer": {"clipnorm": 0.05}},
    "global_clipnorm": {"optimizer": {"global_clipnorm": 0.05}},
    "clipvalue": {"optimizer": {"clipvalue": 0.02}},
    "LossScaleOptimizer": {"scaled": 2.0**120},
    "Dropout": {"layers": [lambda: keras.layers.Dropout(0.5)]},
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_keras_gets_wrong_is_refused_before_the_first_step(name, mirrored):
    with mirrored.scope():
        model = tiny(**REFUSED[name])
    with pytest.raises(InputError, match=f"On several replicas .*{name}"):
        devices.fit(model, None, steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_refused_is_still_wrong_in_keras(name, mirrored):
    """If this test fails, Keras has fixed the fault, and the refusal can go."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 4)).astype("float32"), np.arange(32) % 3
    if name == "LossScaleOptimizer":  # an overflow in the second replica's share
        x *= np.where(np.arange(32) % 8 < 4, 1e-3, 1e8)[:, None].astype("float32")

    def weights(scope):
        with scope:
            model = tiny(**REFUSED[name])
            model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        return model.get_weights()

    if name in ("jit_compile", "gradient_accumulation_steps", "ema_overwrite_frequency"):
        with pytest.raises((RuntimeError, tf.errors.InvalidArgumentError)):
            weights(mirrored.scope())
    else:
        one, two = weights(devices.Devices().scope()), weights(mirrored.scope())
        assert np.all(np.isfinite(one[0])) and not np.allclose(one[0], two[0], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "steps_per_execution", "run_eagerly", "momentum", "use_ema", "weight_decay", "Adam"])
def test_what_is_not_refused_is_right_in_keras(name, mirrored):
    options = {
        "steps_per_execution": {"steps_per_execution": 2},
        "run_eagerly": {"run_eagerly": True},
        "momentum": {"optimizer": {"momentum": 0.9, "nesterov": True}},
        "use_ema": {"optimizer": {"use_ema": True, "ema_momentum": 0.5}},
        "weight_decay": {"optimizer": {"weight_decay": 0.1}},
    }.get(name, {})
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 4)).astype("float32"), np.arange(24) % 3
    found = []
    for scope in (devices.Devices().scope(), mirrored.scope()):
        with scope:
            model = tiny(**options)
            if name == "Adam":
                model.compile("adam", model.loss)
            devices.fit(model, tf.data.Dataset.from_tensor_slices((x, y)).batch(8), steps=3)
        found.append(model.get_weights())
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5)


def test_a_batch_that_replicas_cannot_share_is_refused(mirrored):
    pretrained, anchors, _ = job.start()
    with pytest.raises(InputError, match="batch_size is 7, which 2 replicas cannot share"):
        l2sp.finetune(
            pretrained, job.task(), l2sp.L2SP(0.1), job.RECIPE.replace(batch_size=7), anchors=anchors, strategy=mirrored
        )


def test_a_plan_that_cannot_be_distributed_is_refused_at_the_start(mirrored, tmp_path, monkeypatch):
    made = small_plan(tmp_path, distribute="mirrored")
    with pytest.raises(InputError, match="batch_size is 15"):
        run_plans([made.replace(recipe=made.setup.recipe.replace(batch_size=15))])
    with pytest.raises(InputError, match="On several replicas jit_compile fails"):
        run_plans([made.replace(jit_compile=True)])
    monkeypatch.setattr("l2sp_tf.training.devices.make_strategy", lambda kind: None)
    with pytest.raises(InputError, match="distribute is multiworker and engine is ray"):
        run_plans([made.replace(distribute="multiworker")], engine="ray")
    monkeypatch.undo()
    monkeypatch.setattr(type(made.setup.recipe), "optimizer", lambda recipe: keras.optimizers.SGD(0.1, clipnorm=1.0))
    with pytest.raises(InputError, match="clipnorm clips each replica's share"):
        run_plans([made])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_plan_on_two_devices_leaves_the_record_of_one(mirrored, tmp_path):
    made = small_plan(tmp_path, distribute="mirrored")
    (record,), _ = run_plans([made])
    (other,), said = run_plans([made.replace(distribute="none")])
    assert other == record and any("already finished" in line for line in said)  # the devices are not part of a run's identity


@pytest.mark.parametrize(
    "config",
    [
        None,
        "{",
        "[]",
        '{"cluster": {"worker": ["a:1", "b:1"]}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}',
        '{"cluster": {"worker": ["a:1", "b:1"], "ps": ["c:1"]}, "task": {"type": "worker", "index": 1}}',
    ],
)
def test_a_missing_or_wrong_cluster_is_refused(config, monkeypatch):
    if config is None:
        monkeypatch.delenv("TF_CONFIG", raising=False)
    else:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(InputError, match="TF_CONFIG does not name two workers"):
        devices.make_strategy("multiworker")


def test_other_strategies_are_refused(monkeypatch):
    config = {"cluster": {"worker": ["localhost:1", "localhost:2"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    tf.constant(0)
    with pytest.raises(InputError, match="before TensorFlow computes"):
        devices.make_strategy("multiworker")
    with pytest.raises(InputError, match="'tpu'"):
        devices.make_strategy("tpu")
    assert devices.make_strategy("none") is None and devices.Devices().part == (0, 1)


@pytest.mark.slow
def test_keras_own_fit_fails_on_several_machines(tmp_path):
    """The reason for our own loop: if this test fails, Keras has fixed the fault."""
    codes, outputs = run_workers("keras", tmp_path)
    assert codes == [0, 0], outputs
    for index in range(2):
        assert "PerReplica" in (tmp_path / f"keras-{index}").read_text()
