"""Flags of a command: the plans they make, the flags without effect, and the file that repeats a run."""

import dataclasses
import pathlib
import tomllib
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_plans import plan

import l2sp_tf as l2sp
from l2sp_tf.data.datasets import load_dataset
from l2sp_tf.experiments.configuration import default_workdir, plans_of, text_of, unused, values_of
from l2sp_tf.experiments.plans import FisherPlan, Setting
from l2sp_tf.models import zoo
from l2sp_tf.penalties.formulas import PENALTIES
from l2sp_tf.training.recipe import IMAGES, Recipe

BASE = {"workdir": "w", "seeds": ["0"]}


def only(**values):
    (made,) = plans_of({**BASE, **values})
    return made


def test_penalties_have_their_own_strengths():
    made = only(penalty=["l2:1e-4", "l2_sp:0.1:1", "l1_sp"], alpha=["0.5"])
    assert [(r.symbol, r.alpha) for r in made.runs()] == [("l2", 1e-4), ("l2_sp", 0.1), ("l2_sp", 1.0), ("l1_sp", 0.5)]
    made = only(penalty=["l2_sp:0.1", "l2_sp:1"])
    assert [(r.symbol, r.alpha) for r in made.runs()] == [("l2_sp", 0.1), ("l2_sp", 1.0)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"penalty": ["l2:much"]}, "--penalty=l2:much is not understood"),
        ({"penalty": ["l2:"]}, "--penalty=l2: is not understood"),
        ({"penalty": ["l2:-1"]}, "alpha of l2 is -1.0"),
        ({"penalty": ["l2:nan"]}, "alpha of l2 is nan"),
        ({"penalty": ["l2", "l2:1"]}, "l2 both with and without a strength"),
        ({"penalty": ["l3:1"]}, "The penalty 'l3' is unknown"),
        ({"penalty": ["gl_sp:1"], "experiment": "table_2"}, "gl_sp, which the experiment table_2 does not run"),
        ({"experiment": "table_2", "folds": 0}, "no published strength for the penalty l2_sp_fisher"),
        ({"seeds": ["0", "0"]}, "seeds has 0 twice"),
        ({"seeds": ["0.5"]}, "not a list of whole numbers"),
        ({"seeds": ["4294967296"]}, "give numbers below 4294967296"),
        ({"source_iterations": -1}, "source_iterations is -1: give a whole number"),
        ({"source_learning_rate": 0.0}, "source_learning_rate is 0.0: give a finite number above 0"),
        ({"target": ["/nonexistent"]}, "no data set '/nonexistent'"),
        ({"frozen": ["all", "2"]}, "--frozen=all,2 is not understood: give all alone"),
        ({"head_bias": float("nan")}, "head_bias is nan: give a finite number."),
        ({"fisher_transforms": ["clip"]}, "The Fisher transform clip has no value: give one, as in clip=0.01"),
        ({"fisher_transforms": ["normalise=2"]}, "normalise takes no value, but has 2.0"),
        ({"fisher_transforms": ["none", "clip=2"]}, "none,clip=2 is not understood: give none alone"),
        ({"iterations": 10, "decay_at": 100}, "decay_at is 100, but there are 10 iterations"),
        ({"mean": ["300", "0", "0"]}, "give three numbers from 0 to 255"),
        ({"penalty": []}, "--penalty is empty"),
        ({"target": [""]}, "--target is empty"),
        ({"weights": []}, "--weights is empty"),
        ({"blur_sigma": ["1"]}, "blur_sigma is"),
        ({"weights": ["missing.keras"]}, "There is no weights file missing.keras"),
    ],
)
def test_mistakes_are_reported(values, message):
    with pytest.raises(l2sp.InputError, match=message):
        plans_of({**BASE, **values})


def test_an_experiment_has_5_folds_by_default():
    strengths = ["l2:1e-4", "l2_sp:0.1", "l2_sp_fisher:0.1"]
    assert only(experiment="table_2").sweep.folds == 5 and only().sweep.folds == 0 and only(folds=3).sweep.folds == 3
    made = only(experiment="table_2", folds=0, penalty=strengths)
    assert made.sweep.folds == 0 and made.trials() == [] and len(list(made.runs())) == 3
    assert made.sweep.learning_rates == () and only(experiment="table_2").sweep.learning_rates == (0.005, 0.01, 0.02)


@pytest.mark.parametrize("folds", [0, 2])
def test_the_fisher_diagonal_is_normalised_whatever_the_folds(folds):
    raw = {"fisher_transforms": ["none"]}
    assert only(folds=folds).setup.fisher.transforms == (("normalise", None),)
    assert only(folds=folds, **raw).setup.fisher.transforms == ()
    clipped = only(folds=folds, fisher_transforms=["clip=2.5", "normalise"]).setup.fisher
    assert clipped.transforms == (("clip", 2.5), ("normalise", None))


def test_the_exact_fisher_diagonal_takes_no_draws():
    values = {"penalty": ["l2_sp_fisher:1"], "fisher_mode": "exact", "fisher_samples": 4}
    assert only(**values).setup.fisher == only(**values | {"fisher_samples": 1}).setup.fisher
    assert ("fisher_samples", "the mode exact draws nothing") in unused(values, set(values), plans_of(values | {"seeds": ["0"]}))
    with pytest.raises(l2sp.InputError, match="fisher_samples is 4, but the mode exact draws nothing"):
        FisherPlan(mode="exact", samples=4)


def test_numbers_of_the_recipe_that_flags_give():
    made = only(target=["t"], source=["s"], momentum=0.5, decay_at=7, log_every=3, blur_kernel=3, blur_sigma=["0.2", "1"])
    recipe = made.setup.recipe
    assert (recipe.momentum, recipe.decay_at, recipe.log_every, recipe.images.blur_kernel) == (0.5, 7, 3, 3)
    assert recipe.images.blur_sigma == (0.2, 1.0)
    authors = {"target": ["t"], "source": ["s"], "protocol": "authors"}
    assert only(**authors).setup.recipe == Recipe.authors()
    assert only(**authors, iterations=90).setup.recipe.decay_step == 60
    assert only(**authors, iterations=90, decay_at=50).setup.recipe.decay_step == 50


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["digits/target"], "digits"),
        (["path/to/images"], "images"),
        (["images.zip"], "images"),
        (["images.zip/animals@30"], "animals"),
        (["caltech256@30", "caltech256@60", "stanford_dogs"], "caltech256+stanford_dogs"),
        (["/"], "task"),
    ],
)
def test_the_workdir_is_named_after_the_task(targets, expected):
    assert default_workdir(targets) == pathlib.Path("runs") / expected
    made = plans_of({"target": targets, "source": ["s"], "seeds": ["0"]})
    assert {part.setup.workdir for part in made} == {pathlib.Path("runs") / expected}


def model_file(path, shape=(16, 16, 3), classes=4):
    inputs = keras.Input(shape)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3, name="conv")(inputs))
    keras.Model(inputs, keras.layers.Dense(classes, name="head")(x)).save(path)
    return str(path)


def test_the_crop_is_the_size_that_a_keras_file_takes(tmp_path):
    weights, task = [model_file(tmp_path / "m.keras", (128, 128, 3))], {"target": ["t"]}
    made = only(weights=weights, **task)
    assert (made.setup.recipe.images.crop, made.setup.recipe.images.resize) == (128, 146)  # 256/224 of it
    assert only(weights=weights, crop=96, **task).setup.recipe.images.crop == 96  # `check_plans` refuses it
    images = only(weights=weights, resize=128, **task).setup.recipe.images
    assert (images.crop, images.resize) == (
        128,
        128,
    )
    free = [model_file(tmp_path / "free.keras", (None, None, 3))]
    assert only(weights=free, **task).setup.recipe.images.crop == 224
    keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(2)]).save(tmp_path / "s.keras")
    assert only(weights=[str(tmp_path / "s.keras")], **task).setup.recipe.images.crop == 32
    with pytest.raises(l2sp.InputError, match="takes images of 16x20 pixels, but crops are square"):
        only(weights=[model_file(tmp_path / "wide.keras", (16, 20, 3))], **task)


def test_paths_with_commas_are_put_together_again_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats,dogs").mkdir()
    (tmp_path / "a,b.zip").write_bytes(b"")
    for target in ("cats,dogs", "a,b.zip/inner", "cats,dogs@30"):
        assert only(target=target.split(","), source=["s"]).setup.target == target.removesuffix("@30")
    assert only(target=["cats,dogs"], source=["s"]).setup.target == "cats,dogs"
    with pytest.raises(l2sp.InputError, match="but there is cats,dogs: write --target='\"cats,dogs\"'"):
        plans_of({**BASE, "target": ["x", "cats", "dogs"], "source": ["s"]})
    (tmp_path / "cats").mkdir()
    with pytest.raises(l2sp.InputError, match="split at a comma"):
        plans_of({**BASE, "target": ["cats", "dogs"], "source": ["s"]})


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"fisher_mode": "mc"}, {"fisher_mode"}),
        ({"fisher_mode": "mc", "penalty": ["l2_sp_fisher:1"]}, set()),
        ({"momentum": 0.5, "solver": "adam"}, {"momentum"}),
        ({"momentum": 0.5}, set()),
        ({"target": ["t"], "source": ["s"], "subset_seed": 3}, {"subset_seed"}),
        ({"target": ["t@4"], "source": ["s"], "subset_seed": 3}, set()),
        ({"target": ["t@4", "u@5"], "source": ["s"], "per_class": 3}, {"per_class"}),
        ({"target": ["t@4", "u"], "source": ["s"], "per_class": 3}, set()),
        ({"penalty": ["l2:1", "l2_sp:2"], "alpha": ["0.1"]}, {"alpha"}),
        ({"penalty": ["l2:1", "l2_sp"], "alpha": ["0.1"]}, set()),
        ({"blur_kernel": 3}, {"blur_kernel"}),  # the digits have no blur
        ({"widths": ["4"], "depths": ["1"], "backbone": "resnet50"}, {"widths", "depths"}),
        ({"experiment": "figure_1", "folds": 3, "frozen": ["1"]}, {"folds", "frozen"}),
        ({"experiment": "figure_1", "learning_rate": ["0.1", "0.2"]}, {"learning_rate"}),
        ({"experiment": "figure_1", "seeds": ["0", "1"]}, {"seeds"}),
        ({"experiment": "figure_1", "seeds": ["1"]}, set()),
        ({"target": ["digits/target", "t"], "source": ["s"], "blur_kernel": 3}, set()),  # the other target has a blur
        ({"experiment": "figure_3", "frozen": ["1"]}, set()),
        ({"experiment": "table_2", "penalty": ["l2"]}, {"penalty"}),
        ({"experiment": "table_2", "penalty": ["l2:0.1"]}, set()),
        ({"engine": "local", "run_cpus": 2}, {"run_cpus"}),
        ({"weights": ["w.safetensors"], "source_iterations": 4}, {"source_iterations"}),
    ],
)
def test_flags_without_effect_are_listed(values, names):
    values = {**BASE, **values}
    assert {name for name, _ in unused(values, set(values), plans_of(values))} == names


def test_a_backbone_beside_a_keras_file_has_no_effect(tmp_path):
    values = {**BASE, "target": ["t"], "weights": [model_file(tmp_path / "m.keras")], "backbone": "resnet50", "widths": ["4"]}
    (made,) = plans_of(values)
    assert {name for name, _ in unused(values, set(values), [made])} == {"backbone", "widths"}
    assert made == only(target=["t"], weights=values["weights"])


RUNS = [
    ({}, Setting("l2_sp", 0.1, 0.01, 0.01)),
    ({"penalties": ("gl_sp_fisher",), "alphas": (0.25,)}, Setting("gl_sp_fisher", 0.25, 0.5, 0.02, frozen=2, seed=3)),
    ({"recipe": Recipe.authors(), "protocol": "authors", "per_class": 30}, Setting("l2", 1e-4, 0.01, 0.01)),
    ({"recipe": Recipe(solver="adam", momentum=0.3, mean=(1, 2.5, 3))}, Setting("l2", 1e-4, 0.01, 0.01)),
    ({"fisher": FisherPlan("exact", transforms=(("clip", 0.1), ("normalise", None)))}, Setting("l2", 1e-4, 0.01, 0.01)),
    (
        {"fisher": FisherPlan(transforms=()), "penalties": ("l2_sp_fisher",), "alphas": (1,)},
        Setting("l2_sp_fisher", 1, 0.01, 0.01),
    ),
    ({"jit_compile": True, "distribute": "mirrored", "deterministic": True}, Setting("l2", 1e-4, 0.01, 0.01)),
    ({"target": 'a,b\\c "d" é', "source": "x\ty"}, Setting("l2", 1e-4, 0.01, 0.01)),
    ({"folds": 3, "seeds": (4, 5)}, Setting("l2", 1e-4, 0.01, 0.01, seed=1, fold=1)),
]


@pytest.mark.parametrize(("changes", "setting"), RUNS)
def test_the_file_of_a_run_repeats_it(changes, setting):
    base = {"target": "t", "source": "s", "recipe": Recipe(), **changes}
    made = plan(**base, source_recipe=Recipe.source(base["recipe"]).replace(iterations=7))
    text = text_of(made, setting)
    (again,) = plans_of(tomllib.loads(text))
    runs = again.trials() if setting.fold is not None else list(again.runs())
    assert setting in runs and len(runs) == (made.sweep.folds if setting.fold is not None else 1)
    swept = {"beta": made.setup.recipe.beta, "learning_rate": made.setup.recipe.learning_rate}
    again = again.replace(recipe=again.setup.recipe.replace(**swept))
    assert again.setup.key() == made.setup.key() and again.save_models == made.save_models
    assert (again.jit_compile, again.distribute, again.checkpoint_every) == (made.jit_compile, made.distribute, 500)
    assert "no flag can set" not in text


def test_the_file_of_a_run_names_the_fields_that_no_flag_can_set():
    made = plan(target="t", source="s", source_recipe=Recipe(momentum=0.1))
    assert "no flag can set: source_recipe." in text_of(made, Setting("l2", 1e-4, 0.01, 0.01))


def test_every_value_of_a_run_has_a_flag():
    from test_docs import flags_of

    recipe = Recipe(decay_at=5, log_every=2, batch_norm_decay=0.9, mean="training")
    made = plan(per_class=3, subset_seed=1, data_dir="d", pixels="rgb", recipe=recipe)
    made = made.replace(fisher=FisherPlan(images=4, tolerance=0.5))
    assert set(values_of(made, Setting("l2", 1e-4, 0.01, 0.01))) <= set(flags_of("train.py"))
    named = {"alpha", "beta", "learning_rate", "images"}
    fields = {*IMAGES, *(field.name for field in dataclasses.fields(Recipe))}
    assert fields - named <= set(values_of(made, Setting("l2", 1e-4, 0.01, 0.01)))
    assert set(PENALTIES) == {"l2", "l2_sp", "l2_sp_fisher", "l1_sp", "gl_sp", "gl_sp_fisher"}


def test_the_protocol_network_is_the_recipe_for_the_network_with_the_given_flags(tmp_path):
    keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]).save(tmp_path / "m.keras")
    for i in range(2):
        for split, name in (("train", "ab"[i]), ("test", "ab"[i])):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            keras.utils.save_img(tmp_path / "data" / split / name / f"{split}.png", np.full((8, 8, 3), 90.0 * i + 9 * len(split)))
    given = {"target": [str(tmp_path / "data")], "protocol": "network"}
    for other in ({"weights": [str(tmp_path / "m.keras")]}, {"weights": ["imagenet"], "backbone": "mobilenetv2", "crop": 96}):
        said = []
        (made,) = plans_of({**BASE, **given, **other, "head_steps": 7, "folds": 2}, said.append)
        model = (
            zoo.backbone("mobilenetv2", 2, image_size=96) if "crop" in other else keras.saving.load_model(tmp_path / "m.keras")
        )
        assert made.setup.recipe == Recipe.for_network(model, 2, say=lambda line: None).replace(head_steps=7)
        assert made.setup.protocol == "paper" and made.sweep.learning_rates == (0.0003, 0.001, 0.003)
        assert len(said) == 1 and "2 training images" in said[0] and said[0].endswith("Flags come before this: --head_steps.")
        setting = next(iter(made.runs()))
        (again,) = plans_of(values_of(made, setting))
        assert setting.recipe_of(again.setup.recipe) == setting.recipe_of(made.setup.recipe)


def test_the_protocol_network_unpacks_a_zip_where_its_plan_does_and_is_not_for_the_digits(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        for split, grey in (("train", 10), ("test", 60)):
            for name in "ab":
                image = tf.io.encode_png(np.full((8, 8, 3), grey + ord(name), "uint8")).numpy()
                file.writestr(f"{split}/{name}/0.png", image)
    given = {"target": [str(tmp_path / "data.zip")], "weights": ["imagenet"], "backbone": "mobilenetv2", "protocol": "network"}
    (made,) = plans_of({**BASE, **given, "workdir": str(tmp_path / "w")}, [].append)
    unpacked = load_dataset(made.setup.target, **made.setup.places).train.files[0]
    assert [path for path in tmp_path.rglob("0.png") if "train" in path.parts and "a" in path.parts] == [unpacked]
    with pytest.raises(l2sp.InputError, match="protocol is network, but digits/target has settings of its own"):
        plans_of({**BASE, "protocol": "network"})
