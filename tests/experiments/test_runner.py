"""Experiments on the embedded digits: folds, choice, records, resumption, and Ray."""

import os
import pathlib
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from test_engines import ray  # noqa: F401
from test_plans import plan

import l2sp_tf as l2sp
from l2sp_tf.experiments import records, runner, selection
from l2sp_tf.reports import tables
from l2sp_tf.reports.summary import summary
from l2sp_tf.training.checkpoints import Checkpoints
from l2sp_tf.training.recipe import Recipe

RECIPE = Recipe.digits().replace(iterations=6, batch_size=16)
SOURCE_RECIPE = Recipe.source(RECIPE).replace(iterations=20)


def tiny(workdir, **changes):
    options = {"recipe": RECIPE, "source_recipe": SOURCE_RECIPE, "widths": (4,), "depths": (1,), "per_class": 10}
    return plan(workdir=workdir, **{"seeds": (0,), "penalties": ("l2_sp",), "save_models": False, **options, **changes})


def sourceless(finished, workdir, **changes):
    """A plan from the source model of `finished` as a weights file: nothing trains a source or measures what is kept of it."""
    (weights,) = finished[0].setup.workdir.glob("sources/*/weights.safetensors")
    return tiny(workdir, weights=str(weights), source=None, **changes)


def run(plans, **options):
    said = []
    return runner.run_plans(plans, say=said.append, **options), said


@pytest.fixture
def untrained(finished, monkeypatch):
    """Gives every run the results of a finished one in place of training; returns the list of the settings that ran."""
    ran, (record, *_) = [], finished[1]

    def copied(pretrained, task, setting, recipe, settings, **options):
        ran.append(setting)
        return {**record, "settings": settings, "anchors": dict(record["anchors"])}

    monkeypatch.setattr(runner, "run_record", copied)
    return ran


@pytest.fixture(scope="module", autouse=True)
def _no_more_values_than_given():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(selection, "MOST_EXTENSIONS", 0)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir after cross-validation between two strengths, with its records and its messages."""
    workdir = tmp_path_factory.mktemp("experiment")
    made = tiny(workdir, folds=2, alphas=(1000.0, 0.1), frozen=(0, 1))
    return made, *run([made], estimate=True)


def test_the_plan_is_announced_with_an_estimate_and_then_run(finished):
    made, found, said = finished
    (plan,) = (line for line in said if line.startswith("plan: "))
    assert plan.startswith("plan: 4 runs on folds and up to 3 values beyond") and plan.endswith(", then 2 runs; 6 are left")
    assert sum(line.startswith("disk: about ") for line in said) == sum(line.startswith("time: about 0:0") for line in said) == 1
    assert sum("[" in line and "accuracy" in line for line in said) == 6
    assert [record["settings"]["frozen"] for record in records.runs_of(found)] == [0, 1]


def test_the_choice_has_the_best_mean_over_the_folds_and_is_recorded(finished):
    made, found, _ = finished
    folds = [records.read_record(path) for path in made.setup.workdir.glob("folds/*/run.json")]
    scores = {
        alpha: np.mean([r["results"]["accuracy"] for r in folds if r["settings"]["alpha"] == alpha])
        for alpha in made.sweep.alphas
    }
    assert {r["settings"]["alpha"] for r in records.runs_of(found)} == {max(scores, key=scores.get)}
    (made,) = records.selections_of(found)
    candidates = {c["alpha"]: np.mean(c["accuracies"]) for c in made["candidates"]}
    assert candidates == pytest.approx(scores) and list(candidates) == [1000, 0.1]
    assert [row["selected"] for row in summary(found)] == [True, True]
    assert records.read_records(finished[0].setup.workdir)[-1] == made
    assert all(r["results"]["total"] == 10 and r["settings"]["fold"][1] == 2 for r in folds)  # of 20 training images


def test_a_record_holds_what_tables_and_figures_need(finished):
    record = finished[1][0]
    assert tables.right(record).sum() == record["results"]["correct"]
    assert list(record["results"]["r2"]) == ["conv1_relu", "conv2_block1_out"]
    assert 0 <= record["results"]["r2"]["conv1_relu"]["med"] <= 1
    frozen = finished[1][1]["results"]["r2"]
    assert frozen["conv1_relu"]["whislo"] == pytest.approx(1)
    assert tables.table_3(finished[1]).rows and tables.table_2(finished[1]).rows[0][1].endswith("(1)")


@pytest.mark.slow
def test_proximal_and_plain_runs_are_kept_apart(tmp_path):
    made = tiny(tmp_path, penalties=("l1_sp",), alphas=(0.1,))
    stepped = made.replace(recipe=RECIPE.replace(penalty_step="proximal", solver="adam"))
    found, said = run([made, stepped])
    assert "penalty_step" not in found[0]["settings"]["recipe"] and "frozen" not in found[0]["results"]
    assert found[1]["settings"]["recipe"]["penalty_step"] == "proximal" and found[1]["settings"]["recipe"]["solver"] == "adam"
    assert set(found[1]["results"]["frozen"]) > {"all", "conv1_conv"}
    assert sum("source model: training" in line for line in said) == 1
    assert [row[0] for row in tables.table_2(found).rows] == ["L1-SP", "L1-SP, Adam, proximal"]
    assert "L1-SP, Adam, proximal" in tables.table_csv(found)


def test_finished_runs_are_not_run_again_and_a_dry_run_runs_nothing(finished):
    made, found, _ = finished
    again, said = run([made])
    assert again == found and sum("already finished" in line for line in said) == 6
    more = made.replace(alphas=(5.0,))
    nothing, said = run([more], dry_run=True)
    assert nothing == [] and not list(made.setup.workdir.glob("folds/l2_sp-5-*"))


def test_an_interrupted_experiment_resumes(finished):
    made, found, _ = finished
    for pattern in ("folds/l2_sp-0.1-fold1-*/run.json", "runs/*/run.json"):
        next(made.setup.workdir.glob(pattern)).unlink()
    again, said = run([made])
    assert sum("already finished" in line for line in said) == 4
    assert [r["settings"] for r in records.runs_of(again)] == [r["settings"] for r in records.runs_of(found)]


@pytest.mark.slow
def test_a_second_cross_validation_replaces_the_first_and_earlier_seeds_do_not_undo_it(finished, tmp_path):
    made = finished[0].replace(workdir=tmp_path, frozen=(0,))
    shutil.copytree(finished[0].setup.workdir / "sources", tmp_path / "sources")
    grid = made.replace(folds=0, seeds=(0, 1))  # seeds without a selection, of both strengths
    first, _ = run([grid])
    assert not records.selections_of(first) and len(tables.table_2(first).rows) == 2
    found, said = run([made])
    assert sum("already finished" in line for line in said) == 1  # the chosen setting is a point of the grid
    chosen = records.selections_of(found)[0]["chosen"]["alpha"]
    (line,) = tables.table_2(records.read_records(tmp_path)).rows
    assert line[1].endswith("(2)")
    other = next(alpha for alpha in made.sweep.alphas if alpha != chosen)
    run([made.replace(alphas=(other, 30 * other))])
    (made_last,) = records.selections_of(records.read_records(tmp_path))
    assert {other, 30 * other} <= {candidate["alpha"] for candidate in made_last["candidates"]}
    (line,) = tables.table_2(records.read_records(tmp_path)).rows
    alpha = made_last["chosen"]["alpha"]
    runs = [r for r in records.read_records(tmp_path) if "results" in r and r["settings"]["alpha"] == alpha]
    runs = [r for r in runs if "fold" not in r["settings"]]  # also those of earlier seeds, where there are any
    expected = [100 * r["results"]["accuracy"] for r in runs]
    assert line[1].startswith(f"{np.mean(expected):.1f}") and (len(runs) == 1 or line[1].endswith(f"({len(runs)})"))


def test_a_choice_belongs_to_its_runs_if_each_penalty_has_its_own_beta(finished, untrained, tmp_path):
    recipe = RECIPE.replace(beta={"l2_sp": 0.02, "l2": 0.001})
    found, _ = run([sourceless(finished, tmp_path, folds=2, penalties=("l2", "l2_sp"), alphas=(0.1,), recipe=recipe)])
    rows = {(row["penalty"], row["beta"]): row["selected"] for row in summary(found)}
    assert rows == {("l2", 0.001): True, ("l2_sp", 0.02): True}


def test_plans_that_share_runs_run_them_once(untrained, tmp_path):
    made = tiny(tmp_path)
    found, said = run([made, made.replace(alphas=(0.1, 1.0))])
    assert [r["settings"]["alpha"] for r in found] == [1.0, 0.1]  # 1 is the digits recipe's alpha
    assert [setting.alpha for setting in untrained] == [1.0, 0.1]
    assert sum("source model: training" in line for line in said) == 1


@pytest.mark.slow
def test_a_diverging_setting_is_recorded_and_not_chosen(tmp_path):
    found, said = run([tiny(tmp_path, folds=2, alphas=(1e12, 0.1))])
    (record,), (made,) = records.runs_of(found), records.selections_of(found)
    assert record["settings"]["alpha"] == 0.1 and made["candidates"][0]["accuracies"] == [None, None]
    assert sum("diverged: The loss is" in line for line in said) == 2


def test_a_sweep_continues_after_every_setting_diverged_now_and_when_repeated(finished, tmp_path):
    diverging = sourceless(finished, tmp_path, folds=2, alphas=(1e12, 1e13))
    plain = sourceless(finished, tmp_path, alphas=(1e12, 0.1))
    for again in (False, True):
        found, said = run([diverging, plain])
        assert sum("every setting of l2_sp diverged" in line for line in said) == 1
        assert sum("already finished" in line for line in said) == (6 if again else 0)
        assert [records.diverged(record) for record in records.runs_of(found)] == [True, False]
        assert [record["chosen"] for record in records.selections_of(found)] == [None]
    table = tables.table_2(records.read_records(tmp_path))
    assert [row for row in table.rows if "diverged" in row[1]] == [("L2-SP, alpha 1e+12", "diverged (1, 1 diverged)")]
    assert "Every setting of L2-SP on digits/target - 10 diverged" in table.notes


@pytest.mark.slow
def test_a_choice_at_the_edge_extends_the_grid_and_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "MOST_EXTENSIONS", 1)
    monkeypatch.setattr(selection, "accuracy_of", lambda record: record["settings"]["alpha"] / 1e4)
    asked = tiny(tmp_path, folds=2, alphas=(0.1, 1.0))
    found, said = run([asked])
    (made,) = records.selections_of(found)
    assert any(line.endswith("then 1 runs; 0 are left") for line in run([asked], dry_run=True)[1])
    assert [c["alpha"] for c in made["candidates"]] == [0.1, 1.0, 10.0] and made["edges"] == ["alpha 10"]
    assert any("at the edge of what was tried (alpha 10)" in line for line in said)
    assert "lies at the edge" in tables.table_2(found).notes


def test_more_folds_than_images_are_refused_before_any_fine_tuning(tmp_path):
    with pytest.raises(l2sp.InputError, match="11 folds"):
        run([tiny(tmp_path, folds=11)])


def kill_one_worker(workdir, killed):
    """Kills a busy Ray worker once the first record exists."""
    for _ in range(1200):
        if list(workdir.glob("folds/*/run.json")):
            for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    command = path.read_bytes()
                except OSError:
                    continue
                if command.startswith(b"ray::l2sp_tf"):
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    killed.append(path.parent.name)
                    return
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="finds workers in /proc")
def test_ray_gives_the_records_of_a_local_run_even_if_a_worker_is_killed(finished, ray, tmp_path):  # noqa: F811
    made = finished[0].replace(workdir=tmp_path)
    killed = []
    killer = threading.Thread(target=kill_one_worker, args=(tmp_path, killed))
    killer.start()
    found, _ = run([made], engine="ray")
    killer.join()
    assert len(killed) == 1
    local = [records.read_record(path) for path in finished[0].setup.workdir.glob("folds/*/run.json")]
    remote = [records.read_record(path) for path in tmp_path.glob("folds/*/run.json")]
    keys = ("alpha", "beta", "frozen", "seed", "fold", "target_digest", "penalty")
    where = lambda record: [record["settings"].get(key) for key in keys]  # noqa: E731
    assert sorted(map(where, remote)) == sorted(map(where, local))
    assert len(found) == 3 and all(set(r) == set(finished[1][0]) for r in records.runs_of(found))


def test_an_interrupted_run_resumes_and_leaves_the_record_of_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    made, (expected, *_), _ = finished
    alpha = expected["settings"]["alpha"]
    cut = made.replace(folds=0, alphas=(alpha,), frozen=(0,), workdir=tmp_path, checkpoint_every=2)
    shutil.copytree(made.setup.workdir / "sources", tmp_path / "sources")
    save = Checkpoints.save

    def saved_then_stopped(self, step, arrays, state):
        save(self, step, arrays, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", saved_then_stopped)
        with pytest.raises(KeyboardInterrupt):
            run([cut])
    (found,), said = run([cut])
    assert any("6 iterations, from step 2 on" in line for line in said)
    assert {**found, "seconds": 0, "time": 0} == {**expected, "seconds": 0, "time": 0}
    assert not list(tmp_path.glob("runs/*/checkpoints"))
