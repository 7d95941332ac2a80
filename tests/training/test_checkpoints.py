"""Checkpoints are written whole or not at all, and an interrupted run ends like an uninterrupted one."""

import csv
import errno
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import keras
import ml_dtypes
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import l2sp_tf as l2sp
from l2sp_tf.data import Dataset, Split, prepare
from l2sp_tf.models import zoo
from l2sp_tf.models.copies import detached_copy
from l2sp_tf.training import checkpoints as module
from l2sp_tf.training.checkpoints import MANIFEST, Checkpoints, deferred_signals, locked

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = l2sp.Recipe(iterations=12, batch_size=8, log_every=5, params="kernels").replace(
    resize=8, crop=6, blur="none", mirror=False
)
ARRAYS = {
    "a/0": np.arange(6, dtype="float32").reshape(2, 3),
    "a/1": np.array([1.5, -2], ml_dtypes.bfloat16),
    "seed": np.array([1, 2**32 - 1], "uint32"),
    "count": np.array(7, "int64"),
}


def task(seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(20, dtype=np.int32) % 3
    pixels = rng.integers(0, 255, size=(20, 8, 8, 3)).astype("uint8")
    split = Split(tuple(map(str, range(20))), labels, pixels=pixels)
    return prepare(Dataset("made", ("a", "b", "c"), split, split), RECIPE.images)


def network():
    return zoo.small_resnet((6, 6, 3), 4, widths=(4,), depths=(1,))


@pytest.fixture(scope="module")
def pretrained():
    """One network for all tests, which leave it as it is."""
    keras.utils.set_random_seed(0)
    return network()


def after(step, action):
    """A callback that acts after one step."""
    return keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: action() if batch + 1 == step else None)


class CutOffError(Exception):
    """Interrupts a run, in place of any real cause."""


def cut_off():
    raise CutOffError


@pytest.fixture(scope="module")
def finished(pretrained, tmp_path_factory):
    """A finished run and its folder, which tests copy."""
    folder = tmp_path_factory.mktemp("finished")
    return l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, run_dir=folder, verbose=0), folder


@pytest.fixture(scope="module")
def cut_off_run(pretrained, tmp_path_factory):
    """The folder of the same run, interrupted after step 8, with a checkpoint of step 6; tests copy it."""
    folder = tmp_path_factory.mktemp("cut_off")
    options = {"run_dir": folder, "checkpoint_every": 3, "verbose": 0}
    with pytest.raises(CutOffError):
        l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, callbacks=[after(8, cut_off)], **options)
    return folder


def test_what_was_saved_is_loaded_in_its_own_dtype_and_two_are_kept(tmp_path):
    store = Checkpoints(tmp_path / "c")
    assert store.load() is None and store.newest == 0
    for step in (9, 10, 11):
        store.save(step, {**ARRAYS, "count": np.array(step)}, {"text": "ä", "number": 0.1})
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-0000000010", "step-0000000011"]
    found = store.load()
    assert found.step == store.newest == 11 and found.state == {"text": "ä", "number": 0.1}
    assert found.arrays.keys() == ARRAYS.keys() and found.arrays["count"] == 11
    for name in ("a/0", "a/1", "seed"):
        assert found.arrays[name].dtype == ARRAYS[name].dtype and np.array_equal(found.arrays[name], ARRAYS[name])
    store.remove(keep=1)
    assert store.load().step == 11 and len(list(store.folder.iterdir())) == 1
    store.remove()
    assert not store.folder.exists()


def test_the_newest_checkpoint_has_the_largest_step_whatever_the_clock_says(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    zone = os.environ.get("TZ")
    for step, now, place in ((10, 2e9, "Asia/Tokyo"), (20, 1e9, "America/New_York")):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        monkeypatch.setenv("TZ", place)
        time.tzset()
        store.save(step, ARRAYS, {})
        for path in tmp_path.rglob("*"):
            if f"{step:010d}" in str(path):
                os.utime(path, (now, now))
    assert store.load().step == 20
    monkeypatch.undo()
    assert os.environ.get("TZ") == zone
    time.tzset()


def killed_in_a_save(folder, number):
    """Saves step 3 in a process that dies at its number-th call that changes the disk; returns whether it died."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == number:
                    os._exit(9)
                return function(*args, **kwargs)

            return call

        for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "open"):
            setattr(os, name, dying(getattr(os, name)))
        Checkpoints(folder).save(3, ARRAYS, {"number": 3})
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_process_killed_at_any_moment_of_a_save_leaves_the_old_or_the_new_one(tmp_path):
    steps, number = [], 0
    while True:
        number += 1
        store = Checkpoints(tmp_path / str(number))
        store.save(1, ARRAYS, {"number": 1})
        store.save(2, ARRAYS, {"number": 2})
        died = killed_in_a_save(store.folder, number)
        found = store.load()
        assert found.state == {"number": found.step} and np.array_equal(found.arrays["a/0"], ARRAYS["a/0"])
        steps.append(found.step)
        store.save(4, ARRAYS, {"number": 4})
        assert store.load().step == 4
        assert len(list(store.folder.iterdir())) == 2  # nothing is left of the interrupted save
        if not died:
            break
    assert number > 10 and set(steps) == {2, 3} and steps == sorted(steps)


@pytest.mark.parametrize("name", [module.ARRAYS, module.STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_older_one(tmp_path, name, damage):
    store = Checkpoints(tmp_path)
    store.save(1, ARRAYS, {"number": 1})
    store.save(2, ARRAYS, {"number": 2})
    path = tmp_path / "step-0000000002" / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    if (name, damage) == (MANIFEST, "gone"):  # an uncommitted checkpoint looks like this
        assert store.load().step == 1
    else:
        with pytest.warns(UserWarning, match="step-0000000002 is skipped"):
            assert store.load().step == 1
    store.save(2, ARRAYS, {"number": 2})
    assert store.load().step == 2


def rows_of(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tensors = {
        tag: [(e.step, e.tensor_proto.SerializeToString()) for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]
    }
    return (folder / "log.csv").read_bytes(), tensors


def interrupted(folder, *how):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, str(ROOT / "tests/interrupted.py"), str(folder), *how]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def check_same(folder, other, result, digest):
    """Checks that everything a run leaves is the same to the bit."""
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[2] == digest
    assert rows_of(folder) == rows_of(other)
    one, two = (keras.models.load_model(place / "model.keras").get_weights() for place in (folder, other))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, interrupted(folder).stdout.split()[-1]


def test_a_run_killed_in_a_save_then_stopped_by_sigterm_ends_in_the_same_bits(tmp_path_factory, tmp_path):
    died = interrupted(tmp_path, "write:9")
    assert died.returncode == -signal.SIGKILL and list(tmp_path.glob("checkpoints/.part-*"))
    stopped = interrupted(tmp_path, "term:8")
    assert stopped.returncode == -signal.SIGTERM
    assert Checkpoints(tmp_path / "checkpoints").newest % 5, "the stop leaves a checkpoint of its own step"
    whole = tmp_path_factory.mktemp("whole")
    result = interrupted(tmp_path, f"then:{whole}")  # an uninterrupted run follows in the same process
    begins, resumed_at, _, again, first, digest = result.stdout.split()
    assert (begins, again, first) == ("begins", "begins", "0") and int(resumed_at) > 5
    check_same(tmp_path, whole, result, digest)
    assert not list(tmp_path.glob("checkpoints/.part-*"))


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_in_the_same_bits(uninterrupted, tmp_path):
    folder, digest = uninterrupted
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, str(ROOT / "tests/interrupted.py")]
    draw = random.Random(0)
    for number in range(20):
        place = tmp_path / f"{number}"
        child = subprocess.Popen([*command, str(place)], stdout=subprocess.PIPE, text=True, env=environment)
        assert child.stdout.readline() == "begins\n"
        while child.poll() is None and not list(place.glob("checkpoints/step-*")):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.6))  # out of about the second that the other 25 steps and the saves take
        child.kill()
        child.wait()
        child.stdout.close()
        check_same(place, folder, interrupted(place), digest)
        shutil.rmtree(place)


def test_an_interrupted_run_resumes_from_its_checkpoint(pretrained, finished, cut_off_run, tmp_path):
    whole, options = finished[0], {"run_dir": tmp_path / "b", "checkpoint_every": 3, "verbose": 0}
    shutil.copytree(cut_off_run, tmp_path / "b")
    run = l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, **options)
    assert (whole.resumed_at, run.resumed_at) == (0, 6)
    for one, two in zip(whole.model.get_weights(), run.model.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    assert [row["step"] for row in run.history] == [5, 10, 12]
    for one, two in zip(whole.history, run.history, strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    again = l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, **options)
    assert again.resumed_at == 12 and again.history == run.history and 0 < again.seconds <= run.seconds
    for one, two in zip(again.model.get_weights(), run.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert [int(row["step"]) for row in csv.DictReader((tmp_path / "b/log.csv").open())] == [5, 10, 12]
    assert [path.name for path in (tmp_path / "b/checkpoints").iterdir()] == ["step-0000000012"]


def test_the_checkpoint_of_another_run_stops_with_all_differences(pretrained, finished, tmp_path):
    options, run = {"run_dir": tmp_path, "verbose": 0}, finished[0]
    shutil.copytree(finished[1], tmp_path, dirs_exist_ok=True)
    other = RECIPE.replace(learning_rate=0.02, momentum=0.5)
    with pytest.raises(l2sp.InputError) as caught:
        l2sp.finetune(pretrained, task(1), l2sp.L2SP(0.3), other, seed=4, **options)
    for part in (
        "recipe.learning_rate was 0.01 and is 0.02",
        "recipe.momentum was 0.9 and is 0.5",
        "seed was 0 and is 4",
        "alpha=0.1",
        "alpha=0.3",
        "data.digest was",
    ):
        assert part in str(caught.value)
    moved = detached_copy(pretrained)
    moved.layers[1].set_weights([weight + 1 for weight in moved.layers[1].get_weights()])
    with pytest.raises(l2sp.InputError, match="start was .* and is"):
        l2sp.finetune(moved, task(), l2sp.L2SP(0.1), RECIPE, anchors=run.anchors, **options)


def test_anchors_beside_a_run_that_are_damaged_or_of_another_model_stop_it(pretrained, cut_off_run, tmp_path):
    options = {"run_dir": tmp_path, "checkpoint_every": 3, "verbose": 0}
    shutil.copytree(cut_off_run, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "anchors.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(l2sp.InputError, match="damaged"):
        l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, **options)
    l2sp.Anchors.of(network()).save(path)
    with pytest.raises(l2sp.InputError, match="other anchors"):
        l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, **options)
    path.unlink()
    with pytest.raises(l2sp.InputError, match="anchors.safetensors is missing"):
        l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, **options)


@pytest.mark.parametrize("fault", ["full disk", "no permission", "no folder"])
def test_a_failed_save_brings_a_warning_and_training_continues(pretrained, tmp_path, monkeypatch, fault):
    options = {"run_dir": tmp_path, "checkpoint_every": 3, "verbose": 0}
    save, calls = module.save_arrays, []

    def failing(path, arrays, format, metadata):
        calls.append(path)
        if len(calls) == 1:
            return save(path, arrays, format, metadata)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC if fault == "full disk" else errno.EACCES, fault)

    if fault == "no folder":
        tmp_path.mkdir(exist_ok=True)
        (tmp_path / "checkpoints").write_text("in the way")
    else:
        monkeypatch.setattr(module, "save_arrays", failing)
    with pytest.warns(UserWarning, match="checkpoint of step 6 could not be saved .*training continues"):
        run = l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, **options)
    assert run.history[-1]["step"] == 12
    if fault != "no folder":
        assert Checkpoints(tmp_path / "checkpoints").load().step == 3
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000000003"]


def test_a_log_that_cannot_be_written_brings_one_warning(pretrained, tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.warns(UserWarning, match="log in .* cannot be written") as caught:
        run = l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, run_dir=tmp_path, verbose=0)
    assert len([w for w in caught if "cannot be written" in str(w.message)]) == 1 and len(run.history) == 3


@pytest.fixture
def _interruptible():
    """Sets SIGINT to Python's default: a shell that runs the tests with & makes them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_and_sigterm_leave_a_checkpoint_and_take_their_usual_effect(pretrained, tmp_path):
    options = {"run_dir": tmp_path, "checkpoint_every": 100, "verbose": 0}
    ctrl_c = after(4, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, callbacks=[ctrl_c], **options)
    assert Checkpoints(tmp_path / "checkpoints").newest in (4, 5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        terminate = after(4, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as caught:
            l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, callbacks=[terminate], **options)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143 and seen == [signal.SIGTERM]
    assert Checkpoints(tmp_path / "checkpoints").newest in (8, 9, 10)
    assert l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, **options).history[-1]["step"] == 12


@pytest.mark.usefixtures("_interruptible")
def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred_signals() as caught:
        signal.raise_signal(signal.SIGINT)
    assert not caught and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.usefixtures("_interruptible")
def test_a_second_signal_takes_effect_at_once():
    with deferred_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        caught.clear()


def test_two_runs_in_one_folder(pretrained, tmp_path):
    run = lambda: l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, run_dir=tmp_path, verbose=0)  # noqa: E731
    with locked(tmp_path), pytest.raises(l2sp.InputError, match="Another run is at work in"):
        run()
    script = f"import filelock, time; lock = filelock.FileLock({str(tmp_path / '.lock')!r}); lock.acquire(); "
    script += "print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(l2sp.InputError, match="Another run is at work in"):
            run()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert run().history[-1]["step"] == 12  # the lock of a process that died is free


def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before_and_names_a_layer(pretrained, tmp_path):
    def spoil():
        variable = next(v for v in callback.model.variables if v.path == "conv2_block1_1_conv/kernel")
        variable.assign(variable * np.float32(1e30))

    callback = after(8, spoil)
    with pytest.raises(FloatingPointError) as caught:
        l2sp.finetune(
            pretrained, task(), l2sp.L2SP(0.1), RECIPE, run_dir=tmp_path, checkpoint_every=3, callbacks=[callback], verbose=0
        )
    assert "after step 9" in str(caught.value) and "conv2_block1_1_bn/moving_" in str(caught.value)
    found = Checkpoints(tmp_path / "checkpoints").load()
    assert found.step == 6 and all(np.isfinite(array.astype("float32")).all() for array in found.arrays.values())


def test_weights_that_are_not_finite_are_never_saved(pretrained, tmp_path):
    def spoil():
        variable = callback.model.trainable_variables[0]
        variable.assign(variable * np.float32("nan"))

    callback = after(12, spoil)
    callbacks = [callback]
    module_order = {"run_dir": tmp_path, "checkpoint_every": 6, "callbacks": callbacks, "verbose": 0}
    run = l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, **module_order)  # the callback comes after the last save
    assert np.isnan(run.model.trainable_variables[0].numpy()).all()
    keeper = module.Checkpointing(None, [], 5)
    keeper.set_model(run.model)
    keeper.keep(Checkpoints(tmp_path / "other"), {}, 1)
    with pytest.raises(FloatingPointError, match="not finite after step 1, first"):
        keeper.on_train_batch_end(0)
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_from_a_stranger_that_lacks_parts_is_refused(pretrained, finished, tmp_path):
    options = {"run_dir": tmp_path, "verbose": 0}
    shutil.copytree(finished[1], tmp_path, dirs_exist_ok=True)
    store = Checkpoints(tmp_path / "checkpoints")
    found = store.load()
    cases = [
        ({}, found.arrays, "of another run"),
        ({**found.state, "seconds": "long"}, found.arrays, "lacks its log"),
        ({**found.state, "monitor": {}}, found.arrays, "lacks its log"),
        (found.state, {"model/0": np.zeros(3)}, "holds other variables"),
    ]
    for state, arrays, message in cases:
        store.save(13, arrays, state)
        with pytest.raises(l2sp.InputError, match=message):
            l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, **options)
        shutil.rmtree(store.folder / "step-0000000013")
    versions = {**found.state["versions"], "keras": "1.0"}
    store.save(13, found.arrays, {**found.state, "versions": versions})
    with pytest.warns(UserWarning, match='keras was "1.0"'):
        l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, **options)


def resident_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="the resident size is read from /proc")
def test_memory_is_flat_over_two_thousand_steps(tmp_path):
    import l2sp_tf.data

    recipe = l2sp.Recipe.digits().replace(iterations=2000)
    data = l2sp_tf.data.load_dataset("digits/target", per_class=25)
    model = zoo.small_resnet((8, 8, 3), 10, widths=(16, 32, 64), depths=(1, 1, 1))
    sizes = []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: sizes.append(resident_bytes()))
    l2sp.finetune(model, data, l2sp.L2SP(1.0), recipe, pixels="rgb", run_dir=tmp_path, callbacks=[watch], verbose=0)
    early, late = sizes[199], sizes[-1]
    print(json.dumps({"MiB at 10%": early / 2**20, "MiB at 100%": late / 2**20}))
    assert late < 1.02 * early + 2**24
