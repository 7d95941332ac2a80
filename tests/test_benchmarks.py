"""The benchmarks' own arithmetic, and that they measure what they say on a small network."""

import numpy as np
import pytest

from benchmarks import batch_norm, common, default_job, penalties, results, scaling


def test_each_round_runs_every_step_once_and_begins_with_another():
    seen = []
    times = common.paired_times([lambda: seen.append("a"), lambda: seen.append("b"), lambda: seen.append("c")], 2, warm_up=1)
    assert seen == list("abcbcacab")
    assert times.shape == (2, 3) and np.all(times > 0)


def test_spread_is_the_median_and_the_tenths():
    assert common.spread(np.arange(11) / 10, 2) == "0.50 [0.10, 0.90]"


def test_a_step_carries_the_penalty_that_it_was_made_with(small_network):
    found = penalties.steps(small_network(), ["l2", "l2_sp", "l2_sp_fisher"], batch=2)
    # Keras gives the mean of the loss over all steps so far; four were run to trace them.
    sums = [5 * found["none"](), *(number * step() for number, step in enumerate(found.values(), start=6))]
    losses = dict(zip(found, np.diff(sums), strict=True))
    assert losses["none, again"] == pytest.approx(losses["none"], abs=1e-3)
    of_the_head = losses["l2_sp"] - losses["none"]  # the weights of S are at their anchors
    assert losses["l2"] - losses["none"] > 2 * of_the_head > 0
    assert losses["l2_sp_fisher"] == pytest.approx(losses["l2_sp"], abs=1e-3)
    assert found["none, again"] is found["none"]


def test_the_two_batch_norms_are_steps_of_one_model(small_network):
    plain, fused = batch_norm.steps(small_network(), batch=3)
    assert fused() == pytest.approx(plain(), rel=1e-4)


def test_the_command_prints_the_ratio_of_each_penalty(small_network, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["penalties", "--network=small", "--image_size=6", "--batch=2", "--rounds=3", "--penalties=l1_sp"]
    )
    monkeypatch.setattr(penalties, "backbone", lambda name, classes, image_size: small_network(classes))
    penalties.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["| none", "| l1_sp", "| none, again"]
    assert rows[0][2] == "1.000 [1.000, 1.000]" and float(rows[1][2].split()[0]) > 0


@pytest.mark.parametrize(("symbol", "tensors"), [("l2", 2), ("gl_sp", 3), ("l2_sp_fisher", 4)])
def test_bytes_are_those_of_the_weights_their_anchors_and_their_gradient(symbol, tensors):
    weights = [scaling.keras.Variable(np.full(shape, 0.5, "float32")) for shape in [(3, 3, 2, 4), (5, 2)]]
    step, moved = scaling.penalty_step(symbol, weights)
    assert moved == 4 * tensors * (72 + 10)
    assert step() > 0


def test_kernels_add_up_to_about_the_size_asked_for():
    for millions in (1, 10, 100):
        assert sum(np.prod(shape) for shape in scaling.shapes_of(millions)) == pytest.approx(millions * 1e6, rel=0.1)
    assert scaling.copy_rate(megabytes=1, rounds=1) > 0


def test_a_part_inside_another_counts_for_itself(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0])  # opened; outer; inner; inner ends; outer ends
    monkeypatch.setattr(default_job.time, "perf_counter", lambda: next(now))
    clock = default_job.Clock()
    clock.timed("outer", clock.timed("inner", lambda: None))()
    assert clock.seconds == {"other": 1.0, "outer": 2.0 + 8.0, "inner": 4.0}


def test_the_parts_of_the_default_job_are_there():
    from l2sp_tf.experiments import runner, runs, starts
    from l2sp_tf.training import trainer

    modules = {"experiments": runner, "runs": runs, "starts": starts, "starts.zoo": starts.zoo, "training": trainer}
    assert all(callable(getattr(modules[module], name)) for places in default_job.PARTS.values() for module, name in places)


def test_one_section_of_the_results_is_replaced_and_the_others_stay(monkeypatch, tmp_path):
    path = tmp_path / "RESULTS.md"
    monkeypatch.setattr(results, "PATH", path)
    for number, only in enumerate(["memory,cost", "penalties", "memory"]):
        monkeypatch.setattr(results, "measured", lambda runs, number=number: f"`{runs[0][0]}`\n\n| {number} |\n")
        monkeypatch.setattr("sys.argv", ["results", f"--only={only}"])
        results.main()
    found = results.sections(path.read_text())
    assert list(found) == ["penalties", "memory", "cost"]
    assert [found[name].split("|")[1] for name in found] == [" 1 ", " 2 ", " 0 "]
    assert path.read_text() == results.joined(found)


def test_a_benchmark_that_fails_does_not_stop_the_others(monkeypatch, tmp_path):
    path = tmp_path / "RESULTS.md"
    monkeypatch.setattr(results, "PATH", path)
    monkeypatch.setattr(results, "BENCHMARKS", {"none": [["no_such_benchmark"]], "own": [["results", "--help"]]})
    monkeypatch.setattr("sys.argv", ["results", "--only=none,own"])
    with pytest.raises(SystemExit, match="none failed; run them again with --only=none"):
        results.main()
    assert "`python -m benchmarks.results --help`" in results.sections(path.read_text())["own"]


def test_what_is_printed_becomes_paragraphs_and_tables():
    assert results._paragraphs("a\nb\n| x |\n| --- |\n\nc\n") == "a\n\nb\n\n| x |\n| --- |\n\nc"


def test_an_unknown_benchmark_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["results", "--only=speed"])
    with pytest.raises(SystemExit):
        results.main()
    assert "unknown benchmark speed" in capsys.readouterr().err
