"""Engines: order, errors and lost workers; those on Ray run where it is installed."""

import os
import pathlib
import signal

import pytest

from l2sp_tf.experiments import engines
from l2sp_tf.files.errors import InputError


def double(job):
    return 2 * job


def fail_on_two(job):
    folder, number = job
    if number == 2:
        raise InputError("the second is bad")
    (pathlib.Path(folder) / str(number)).touch()
    return number


def die_once(job):
    """Kills its own process on the first attempt at the job."""
    folder, number, deaths = job
    with (pathlib.Path(folder) / f"tried-{number}").open("a") as file:
        file.write("x")
    if len((pathlib.Path(folder) / f"tried-{number}").read_text()) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * number


@pytest.fixture(scope="module")
def ray():
    """A local cluster of two workers."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray = pytest.importorskip("ray", reason="needs the extra l2sp-tf[ray]")
    root = str(pathlib.Path(__file__).parents[2])
    paths = os.pathsep.join([root, str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    runtime = {"env_vars": {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}}
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, runtime_env=runtime)
    yield ray
    ray.shutdown()


def test_locally_jobs_run_in_order():
    assert engines.run_jobs(double, [1, 2, 3]) == [2, 4, 6]


def test_an_unknown_engine_and_a_missing_one_are_refused(monkeypatch):
    with pytest.raises(InputError, match="'slurm' is unknown"):
        engines.run_jobs(double, [1], engine="slurm")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"l2sp-tf\[ray\]"):
        engines.run_jobs(double, [1], engine="ray")


def test_ray_gives_the_same_results_in_the_same_order(ray):
    lines = []
    assert engines.run_jobs(double, list(range(6)), engine="ray", say=lines.append) == [0, 2, 4, 6, 8, 10]
    assert lines[-1] == "ray: 6 of 6 jobs finished"


def test_a_job_whose_worker_was_killed_is_run_again(ray, tmp_path):
    jobs = [(str(tmp_path), number, number == 1) for number in range(4)]
    assert engines.run_jobs(die_once, jobs, engine="ray", say=lambda _: None) == [0, 10, 20, 30]
    assert [len((tmp_path / f"tried-{n}").read_text()) for n in range(4)] == [1, 2, 1, 1]


def test_a_worker_lost_too_often_ends_with_one_sentence_and_keeps_the_rest(ray, tmp_path):
    jobs = [(str(tmp_path), number, 99 if number == 0 else 0) for number in range(3)]
    with pytest.raises(InputError, match="lost 4 times"):
        engines.run_jobs(die_once, jobs, engine="ray", say=lambda _: None)
    assert [len((tmp_path / f"tried-{n}").read_text()) for n in range(3)] == [4, 1, 1]


def test_an_error_is_raised_unchanged_after_the_other_jobs_finish(ray, tmp_path):
    with pytest.raises(InputError, match="^the second is bad$"):
        engines.run_jobs(fail_on_two, [(str(tmp_path), n) for n in (2, 1, 3)], engine="ray", say=lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_resources_that_the_cluster_lacks_are_refused_at_once(ray):
    with pytest.raises(InputError, match="64 CPUs and 0 GPUs"):
        engines.run_jobs(double, [1], engine="ray", cpus=64)
