"""train.py, eval.py and prepare.py as a user runs them: the files they leave, and one sentence for each mistake."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import l2sp_tf as l2sp
from l2sp_tf.cli import eval as evaluation, train
from l2sp_tf.cli.command import parse
from l2sp_tf.experiments import configuration, plans
from l2sp_tf.models.pixels import PIXELS, PixelFormat
from l2sp_tf.training import recipe
from l2sp_tf.training.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
QUICK = ["--iterations=6", "--source_iterations=6", "--widths=4", "--depths=1", "--seeds=0,1"]


def run(script, *arguments, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


def refused(script, *arguments, status=2, **kwargs):
    """Runs a command that must fail, and returns its one sentence."""
    result = run(script, *arguments, **kwargs)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture
def eval_py(capsys):
    """Runs eval.py's `main` in this process, where TensorFlow is imported already; returns what it printed."""

    def run_main(*arguments):
        status = evaluation.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    return run_main


def make_folder(root, classes=("cat", "dog"), splits=("train", "test"), count=4):
    rng = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, size=(12, 10, 3)).astype("uint8") + np.uint8(80 * label)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("work")
    return workdir, run("train.py", f"--workdir={workdir}", *QUICK)


def test_train_writes_a_record_for_each_run_and_prints_the_table(finished):
    workdir, result = finished
    assert result.returncode == 0, result.stderr
    records = [json.loads(path.read_text()) for path in sorted(workdir.glob("runs/*/run.json"))]
    assert sorted((r["settings"]["penalty"], r["settings"]["seed"]) for r in records) == [
        ("l2", 0), ("l2", 1), ("l2_sp", 0), ("l2_sp", 1),
    ]  # fmt: skip
    for r in records:
        assert r["results"]["total"] == 547 and r["results"]["source"]["before"]["total"] == 300
        assert r["anchors"]["digest"] == records[0]["anchors"]["digest"]
        assert r["settings"]["pixels"]["channel_order"] == "rgb" and r["settings"]["pixels"]["scale"] == [1.0, 1.0, 1.0]
        assert len(r["settings"]["pixels"]["mean"]) == len(r["settings"]["source_mean"]) == 3
    assert "| L2-SP " in result.stdout and "| L2 " in result.stdout
    assert len(list(workdir.glob("runs/*/model.keras"))) == len(list(workdir.glob("runs/*/log.csv"))) == 4


@pytest.mark.slow
def test_a_second_command_runs_only_what_is_new(finished):
    workdir, first = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("runs/*/run.json")}
    result = run("train.py", f"--workdir={workdir}", *QUICK, "--penalty=l2,l2_sp,l1_sp", "--alpha=0.0001")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("already finished") == 2
    assert "trained before" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(workdir.glob("runs/*/run.json"))) == 8


@pytest.mark.slow
def test_fisher_penalties_estimate_once_and_record_how(finished):
    workdir, _ = finished
    fisher = [
        "--penalty=l2_sp_fisher,gl_sp_fisher",
        "--alpha=1",
        "--seeds=0",
        "--fisher_images=200",
        "--fisher_transforms=normalise",
    ]
    first = run("train.py", f"--workdir={workdir}", *QUICK, *fisher)
    assert first.returncode == 0, first.stderr
    assert "200 images, relative standard error" in first.stdout
    second = run("train.py", f"--workdir={workdir}", *QUICK, *fisher, "--alpha=2", "--penalty=l2_sp_fisher")
    assert second.returncode == 0, second.stderr
    assert "estimated before" in second.stdout
    record = json.loads(next(workdir.glob("runs/l2_sp_fisher-1-*/run.json")).read_text())
    assert record["fisher"]["images"] == 200 and record["fisher"]["mode"] == "rademacher"
    assert [t["name"] for t in record["fisher"]["transforms"]] == ["normalise"]
    assert record["fisher"]["model"] == record["anchors"]["digest"]
    assert len(list(workdir.glob("fisher/*.safetensors"))) == len(list(workdir.glob("fisher/tensorboard/*"))) == 1


def test_eval_prints_the_table_again_and_writes_it(finished, tmp_path, eval_py):
    workdir, first = finished
    printed = eval_py(f"--workdir={workdir}", f"--output={tmp_path}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["summary.csv", "summary.md", "summary.png", "summary.svg"]
    rows = [line for line in first.stdout.splitlines() if line.startswith("| digits")]
    assert rows
    squeezed = " ".join(printed.split())
    assert all(" ".join(row.split()) in squeezed for row in rows)


@pytest.mark.parametrize(("argument", "message"), [("foo", "The argument foo is"), ("--model=x", "--model is for --predict")])
def test_a_mistake_with_eval_is_one_sentence_too(argument, message):
    result = run("eval.py", argument)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}") and "Traceback" not in result.stderr


def test_eval_reports_what_a_run_kept(finished, tmp_path, eval_py):
    workdir, _ = finished
    folder = next(workdir.glob("runs/l2_sp*"))
    printed = eval_py(f"--workdir={folder}", f"--report={tmp_path / 'page.html'}")
    assert "moved most" in printed and {path.name for path in tmp_path.iterdir()} == {"page.html", "page_tensorboard"}
    record = json.loads((folder / "run.json").read_text())
    before = record["results"]["source"]["before"]["accuracy"]
    assert f"{before:.1%}" in (tmp_path / "page.html").read_text()
    message = refused("eval.py", f"--report={tmp_path / 'x.html'}", f"--model={folder / 'model.keras'}")
    assert "needs both --model and --anchors" in message


def test_eval_draws_the_papers_tables_and_figures(finished, tmp_path, eval_py):
    workdir, _ = finished
    everything = run("eval.py", f"--workdir={workdir}", f"--output={tmp_path}", "--all")
    assert everything.returncode == 0, everything.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert {"table_2.md", "table_2_tests.csv", "table_3.csv", "figure_2.svg", "summary.png"} <= names
    assert "left out: There are no runs for Fig. 3" in everything.stdout
    part = eval_py(f"--workdir={tmp_path}", f"--data_dir={tmp_path}", "--table=1", "--figure=path")
    assert "caltech256/30 is not prepared" in part or "caltech256 is not prepared" in part
    assert {"table_1.md", "table_1.csv", "figure_path.png", "figure_path.svg"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_a_folder_of_images_with_the_weights_of_a_keras_file(finished, tmp_path):
    workdir, _ = finished
    weights = next(workdir.glob("runs/l2_sp*/model.keras"))
    folder = make_folder(tmp_path / "images")
    (folder / "train/cat/0.png").write_bytes((folder / "train/cat/0.png").read_bytes()[:60])
    arguments = [f"--workdir={tmp_path / 'w'}", f"--target={folder}", f"--weights={weights}", "--resize=10", "--crop=8", *QUICK]
    message = refused("train.py", *arguments)
    assert "train/cat/0.png" in message and "--skip_bad_images" in message
    images = ["--resize_mode=shorter_side", "--blur=authors", "--crops=10"]
    result = run("train.py", *arguments, "--skip_bad_images", "--penalty=l2_sp", "--seeds=0", *images)
    assert result.returncode == 0, result.stderr
    assert "left out 1 images" in result.stdout
    record = json.loads(next((tmp_path / "w").glob("runs/*/run.json")).read_text())
    assert record["results"]["total"] == 8 and "source" not in record["results"]
    recipe = record["settings"]["recipe"]
    assert (recipe["resize"], recipe["resize_mode"], recipe["blur"], recipe["crops"]) == (10, "shorter_side", "authors", 10)


@pytest.mark.slow
def test_weights_without_a_pixel_format_need_the_flag(finished, tmp_path):
    workdir, _ = finished
    weights, bare = next(workdir.glob("sources/*/weights.safetensors")), tmp_path / "bare.safetensors"
    anchors = l2sp.Anchors.load(weights)
    l2sp.Anchors(anchors).save(bare)  # older files carry no pixel format
    folder = make_folder(tmp_path / "images")
    arguments = [f"--workdir={tmp_path / 'w'}", f"--target={folder}", "--resize=10", "--crop=8", "--penalty=l2_sp", *QUICK]
    arguments += ["--seeds=0", "--nosave_models"]
    assert "--pixels=rgb, bgr, torch, raw or tf" in refused("train.py", *arguments, f"--weights={bare}")
    for flags, expected in (
        ([f"--weights={weights}", "--mean=weights"], PixelFormat(**anchors.metadata["pixels"])),
        ([f"--weights={bare}", "--pixels=torch", "--mean=1,2,3"], PIXELS["torch"].with_mean((1, 2, 3))),
    ):
        result = run("train.py", *arguments, *flags, f"--workdir={tmp_path / expected.channel_order / str(len(flags[0]))}")
        assert result.returncode == 0, result.stderr
        assert f"pixels {expected}" in result.stdout
        path = next((tmp_path / expected.channel_order / str(len(flags[0]))).glob("runs/*/run.json"))
        settings = json.loads(path.read_text())["settings"]
        assert PixelFormat(**settings["pixels"]) == expected and settings["source_mean"] is None


def test_mistakes_get_one_sentence_and_a_status(finished, tmp_path, capsys):
    workdir, _ = finished
    weights = next(workdir.glob("sources/*/weights.safetensors"))
    folder = make_folder(tmp_path / "images")
    uneven = make_folder(tmp_path / "uneven")
    (uneven / "test/dog").rename(uneven / "test/wolf")
    at = f"--workdir={tmp_path / 'w'}"
    cases = [
        (["--penalty=l3"], "penalty 'l3' is unknown"),
        (["--penalty=l1_sp"], "no published strength"),
        (["--penalty=l2_sp_fisher", "--alpha=1", f"--target={folder}", f"--weights={weights}"], "needs source images"),
        (["--fisher_transforms=clip"], "Fisher transform clip"),
        (["--fisher_transforms=clip=x"], "is not understood"),
        (["--alpha=-1"], "alpha is -1"),
        (["--alpha=much"], "not a list of numbers"),
        (["--seeds=x"], "not a list of whole numbers"),
        (["--iterations=0"], "iterations is 0"),
        (["--backbone=vgg"], "backbone 'vgg' is unknown"),
        (["--target=nowhere", "--source=digits/source"], "nowhere"),
        (["--target=caltech256", "--source=digits/source"], "caltech256 with per_class=None names no split"),
        (["--target=stanford_dogs", "--source=digits/source", f"--data_dir={tmp_path}"], "run python prepare.py --data_dir="),
        ([f"--target={uneven}", f"--weights={weights}"], "wolf"),
        ([f"--target={folder}"], "give its data with --source"),
        (["--crop=99"], "crop is 99"),
        (["--crops=5"], "crops is 5"),
        ([f"--weights={weights}"], "architecture"),
        (["--weights=missing.keras"], "no weights file missing.keras"),
        (["--pixels=torch"], "A model trained from scratch sees pixels as rgb"),
        ([f"--weights={weights}", "--pixels=bgr"], "weights.safetensors sees pixels as rgb"),
        (["--mean=target"], "mean is 'target'"),
        (["--mean=1,2"], "mean is ('1', '2')"),
        (["--mean="], "mean is ()"),
        (["--mean=weights"], "weights=none has no mean yet"),
        (["--penalty=l1_sp", "--alpha=1", "--penalty_step=decoupled"], "Decoupled cannot step L1SP"),
        (["--folds=1"], "folds is 1"),
        (["--folds=99"], "99 folds were asked for"),
        (["--frozen=9"], "frozen is 9, but of this backbone's units at most 3 can be frozen"),
        (["--learning_rate=fast"], "not a list of numbers"),
        (["--source=a,b", "--weights=x,y,z"], "2 sources but 3 weights"),
        (["--seeds=1,2,1"], "seeds has 1 twice"),
        (["--penalty=l2:0.1,l2_sp:x"], "--penalty=l2_sp:x is not understood"),
        (["--momentum=1"], "momentum is 1.0"),
        (["--decay_at=0"], "decay_at is 0"),
        (["--blur_kernel=4"], "blur_kernel is 4"),
        (["--beta=-1"], "beta is -1.0"),
        (["--source=digits/target", f"--weights={weights}"], "has 10 classes, but digits/target has 2"),
        (["--backbone=resnet50", "--resize=16", "--crop=16"], "Images of 16 pixels are too small for the backbone resnet50"),
    ]
    for arguments, message in cases:
        assert train.main([at, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.glob("w/runs/*"))


def plans_of(*words):
    """The plans that the flags of train.py describe."""
    values, _ = parse(words, train.FLAGS)
    return configuration.plans_of(values.flag_values_dict())


def test_flags_describe_a_plan_for_each_pair_of_tasks():
    pairs = ["--source=a,b", "--weights=x.h5,y.h5", "--target=t@30,t@60", "--beta=0.01,0.1", "--frozen=0,2"]
    found = plans_of(*pairs, "--learning_rate=0.02")
    assert [(p.setup.source, p.setup.weights, p.setup.target, p.setup.per_class) for p in found] == [
        (source, weights, "t", n) for source, weights in (("a", "x.h5"), ("b", "y.h5")) for n in (30, 60)
    ]
    sweeps = [p.sweep for p in found]
    assert {(s.betas, s.frozen, s.learning_rates, s.folds) for s in sweeps} == {((0.01, 0.1), (0, 2), (0.02,), 0)}


def test_flags_describe_the_plans_of_an_experiment():
    first, *_ = plans_of("--experiment=figure_3")
    assert first.sweep.penalties == ("l2", "l2_sp") and first.sweep.folds == 5
    (plan,) = plans_of("--experiment=table_2")
    assert (plan.setup.source, plan.setup.target, plan.setup.per_class) == ("digits/source", "digits/target", 25)
    assert plan.sweep.learning_rates == (0.005, 0.01, 0.02) and plan.setup.fisher.transforms == (("normalise", None),)
    assert [len(p.sweep.betas) for p in plans_of("--experiment=figure_1")] == [4]
    assert plan.jit_compile == "auto"
    for text, value in (("on", True), ("off", False)):
        assert {p.jit_compile for p in plans_of("--experiment=table_2", f"--jit_compile={text}")} == {value}


def test_flags_have_the_choices_of_the_library():
    for name, choices in (("solver", recipe.SOLVERS), ("penalty_step", recipe.PENALTY_STEPS), ("experiment", plans.STUDIES)):
        assert train.FLAGS[name].parser.enum_values == list(choices)


@pytest.mark.slow
def test_prepare_names_what_is_missing_in_one_sentence(tmp_path):
    assert "give names such as stanford_dogs" in refused("prepare.py")
    assert "did you mean --manual_dir?" in refused("prepare.py", "--manualdir=x")
    assert "There is no data set 'nowhere' to prepare" in refused("prepare.py", f"--data_dir={tmp_path}", "nowhere")
    manual = f"--manual_dir={tmp_path / 'files'}"
    message = refused("prepare.py", f"--data_dir={tmp_path}", manual, "imagenet2012")
    assert f"put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into {tmp_path / 'files'}" in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_flags_that_do_not_exist_and_folders_that_cannot_be_written(tmp_path):
    assert "There is no flag --penlaty: did you mean --penalty?" in refused("train.py", "--penlaty=l2")
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refused("train.py", f"--workdir={tmp_path / 'file' / 'w'}", *QUICK)
    assert "There is no folder" in refused("eval.py", f"--workdir={tmp_path / 'none'}")


def test_a_full_disk_stops_with_a_sentence_and_keeps_finished_runs(finished, tmp_path):
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    workdir, _ = finished
    count = len(list(workdir.glob("runs/*/run.json")))
    import resource

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}", *QUICK, "--seeds=7"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, preexec_fn=limit)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr and "error: " in result.stderr
    assert len(list(workdir.glob("runs/*/run.json"))) == count


@pytest.mark.slow
def test_a_file_of_flags_repeats_a_run(finished, tmp_path):
    workdir, _ = finished
    folders = sorted(workdir.glob("runs/l2_sp-*"))
    again = run("train.py", f"--config={folders[0] / 'config.toml'}")
    assert again.returncode == 0, again.stderr
    assert "[1/1]" in again.stdout and "already finished" in again.stdout and "ignored" not in again.stderr
    assert sorted(workdir.glob("runs/l2_sp-*")) == folders
    source = next(workdir.glob("sources/*"))
    shutil.copytree(source, tmp_path / "w" / "sources" / source.name)
    elsewhere = run("train.py", f"--config={folders[0] / 'config.toml'}", f"--workdir={tmp_path / 'w'}")
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert [path.name for path in tmp_path.glob("w/runs/*")] == [folders[0].name]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_stopped_command_says_what_was_saved(finished, tmp_path, number, status):
    workdir, _ = finished
    source = next(workdir.glob("sources/*"))
    shutil.copytree(source, tmp_path / "sources" / source.name)
    arguments = [f"--workdir={tmp_path}", *QUICK, "--seeds=0", "--penalty=l2", "--iterations=200000", "--checkpoint_every=20"]
    arguments += ["--source_iterations=6", "--nosave_models"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]

    def unignored():  # tests in the background inherit an ignored SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)

    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": unignored}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
    try:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("runs/*/checkpoints/step-*/manifest.json")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, error
    (folder,) = tmp_path.glob("runs/*")
    step = Checkpoints(folder / "checkpoints").newest
    lines = error.splitlines()[-3:]
    assert lines[0] == f"finished in {tmp_path}: 0 runs"
    assert lines[1] == f"under way: runs/{folder.name}, saved after step {step} of 200000" and step >= 20
    assert lines[2].startswith("stopped") and "the same command" in lines[2] and "Traceback" not in error


def test_help_lists_every_flag_once_under_a_heading():
    result = run("train.py", "--help")
    assert result.returncode == 0
    headings = train.FLAGS.flags_by_module_dict()
    named = [flag.name for group in headings.values() for flag in group]
    assert sorted(named) == sorted(train.FLAGS)
    assert set(train.OTHER_NAMES.values()) <= set(named) and not set(train.OTHER_NAMES) & set(named)
    assert re.findall(r"^  --(?:\[no\])?(\w+)", result.stdout, re.M) == named
    assert re.findall(r"^(\S.*):$", result.stdout, re.M) == list(headings)
    for flag in ("--penalty", "--alpha", "--seeds", "--workdir", "--weights", "--[no]mirror", "--protocol"):
        assert flag in result.stdout


def test_help_comes_before_anything_slow_is_imported():
    code = "from l2sp_tf.cli import command, eval, predict, prepare, train; import sys; train.main(['--help']); eval.main(['-h'])"
    code += "; print(sorted({'tensorflow', 'keras', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
