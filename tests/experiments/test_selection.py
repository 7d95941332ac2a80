"""Cross-validation: its scores, and that it never sees a test image."""

import dataclasses
import re
import warnings

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold
from test_trainer import RECIPE, task

import l2sp_tf as l2sp
from l2sp_tf.data.given import given
from l2sp_tf.experiments import records, runs, selection as selection_module
from l2sp_tf.experiments.selection import MOST_EXTENSIONS, Candidate, Search, Selection, fold_tasks, search_all
from l2sp_tf.models import zoo
from l2sp_tf.penalties.formulas import PENALTIES


@pytest.fixture(scope="module")
def pretrained():
    return zoo.small_resnet((6, 6, 3), 4, widths=(4,), depths=(1,))


@pytest.fixture
def trained_once(monkeypatch):
    """Trains the first run and gives its model to all others; returns the list of their penalties."""
    calls, made = [], []

    def finetune(pretrained, task, penalty, *args, **more):
        calls.append(penalty)
        if not made:
            made.append(l2sp.finetune(pretrained, task, penalty, *args, **more))
        return made[0]

    monkeypatch.setattr(runs, "finetune", finetune)
    return calls


def test_folds_are_stratified_and_cover_every_training_image_once():
    made = task(count=20)
    parts = fold_tasks(made, 3, seed=1)
    held = np.concatenate([part.test.offsets for part in parts])
    assert sorted(held) == sorted(made.train.offsets)
    for part in parts:
        assert not set(part.train.offsets) & set(part.test.offsets) and len(part.train) + len(part.test) == 20
        counts = np.bincount(part.test.labels)
        assert counts.max() - counts.min() <= 1
        assert part.train.pixels is made.train.pixels
    other = np.concatenate([part.test.offsets for part in fold_tasks(made, 3, seed=2)])
    assert list(other) != list(held)


@pytest.mark.parametrize("kind", ["task", "arrays"])
def test_equal_images_in_several_folds_bring_a_warning(kind, pretrained):
    made, again = task(count=20), np.r_[:20, 3, 3, 7]
    made = dataclasses.replace(made, train=made.train.take(again), mean=np.zeros(3, "float32"))
    if kind == "arrays":
        pixels = np.stack([made.train[i][:6, :6] for i in range(23)])
        made = given((pixels, made.train.labels), pretrained, batch_size=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = fold_tasks(made, 3, seed=1)
    splits = StratifiedKFold(3, shuffle=True, random_state=1).split(made.train.labels, made.train.labels)
    fold_of = {int(i): fold for fold, (_, held) in enumerate(splits) for i in held}
    count = sum(any(again[i] == again[j] and fold_of[i] != fold_of[j] for j in range(23)) for i in range(23))
    assert count and [str(w.message)[:60] for w in caught] == [
        f"{count} of the 23 training images of {made.name} are equal to one in another"[:60]
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold_tasks(task(count=20), 3)
    assert len(parts) == 3


def test_each_fold_subtracts_the_mean_of_its_own_training_images_unless_one_was_given():
    made = task(count=20)
    for part in fold_tasks(made, 3):
        pixels = np.stack([part.train[i] for i in range(len(part.train))]).astype("float64")
        np.testing.assert_allclose(part.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-6)
        assert not np.array_equal(part.mean, made.mean)
    fixed = dataclasses.replace(made, mean=np.float32([1, 2, 3]))
    assert all(np.array_equal(part.mean, [1, 2, 3]) for part in fold_tasks(fixed, 3))


def test_more_folds_than_images_of_a_class_are_refused():
    for folds in (1, 7):
        with pytest.raises(l2sp.InputError, match=f"{folds} folds .* has 6 training images"):
            fold_tasks(task(count=20), folds)


@pytest.fixture
def as_given(monkeypatch):
    """Keeps searches within the given grid."""
    monkeypatch.setattr(selection_module, "MOST_EXTENSIONS", 0)


@pytest.mark.usefixtures("as_given")
def test_scores_are_those_of_fine_tuning_on_the_rest_of_each_fold(pretrained):
    made = task()
    grid = {"alphas": (1.0,), "betas": (0.1,), "learning_rates": (1e-6, 0.05)}
    selection = l2sp.cross_validate(pretrained, made, l2sp.L2SP, RECIPE, **grid, folds=2, seed=3)
    settings = [(c.alpha, c.beta, c.learning_rate) for c in selection.candidates]
    assert settings == [(1.0, 0.1, r) for r in (1e-6, 0.05)] and selection.edges == ("learning_rate 0.05",)
    assert selection.best.learning_rate == 0.05 and selection.best.mean > 0.8  # the other rate learns nothing
    part = fold_tasks(made, 2, seed=3)[1]
    recipe = RECIPE.replace(beta=0.1, learning_rate=0.05)
    alone = l2sp.finetune(pretrained, part, l2sp.L2SP(1.0), recipe, seed=1, verbose=0)
    assert selection.candidates[1].accuracies[1] == pytest.approx(l2sp.evaluate(alone.model, part)["accuracy"], abs=0.11)
    assert isinstance(selection.best_penalty, l2sp.L2SP) and selection.best_penalty.alpha == selection.best.alpha
    assert (selection.best_recipe.beta, selection.best_recipe.learning_rate) == (0.1, selection.best.learning_rate)
    assert str(selection).count("chosen") == 1


def test_test_images_are_never_read(pretrained):
    class Forbidden:
        def __getattr__(self, name):
            raise AssertionError(f"test images were touched: {name}")

    made = dataclasses.replace(task(), test=Forbidden())
    l2sp.cross_validate(pretrained, made, l2sp.L2, RECIPE.replace(iterations=2), alphas=(0.1,), learning_rates=(0.01,), folds=2)


def test_the_best_of_equals_is_the_strongest_penalty_and_grids_have_defaults():
    candidates = tuple(
        Candidate(alpha, 0.01, 0.01, accuracies) for alpha, accuracies in ((1, (0.5, 0.7)), (2, (0.6, 0.6)), (3, (0.1,)))
    )
    assert Selection(l2sp.L2, RECIPE, candidates).best.alpha == 2
    fast = Candidate(2, 0.01, 0.02, (0.6, 0.6))
    assert Selection(l2sp.L2, RECIPE, (*candidates, fast)).best is candidates[1]
    assert all(len(RECIPE.grid_for(symbol)) > 2 for symbol in PENALTIES)
    with pytest.raises(l2sp.InputError, match="no grid"):
        RECIPE.grid_for("other")


def searched(axes, score):
    """Runs a search scored by a function; returns it and its settings in the order of the rounds."""
    search, rounds = Search("l2_sp", axes, folds=1), []

    def run(pairs):
        rounds.append([(s.alpha, s.beta, s.learning_rate) for _, s in pairs])
        found = [score(*values) for values in rounds[-1]]
        return [{"results": {"diverged": "so"} if accuracy is None else {"accuracy": accuracy}} for accuracy in found]

    search_all({"any": search}, run)
    return search.selection(RECIPE), rounds


def axes(alphas, betas=(0.01,), rates=(0.01,)):
    return {"alpha": alphas, "beta": betas, "learning_rate": rates}


@pytest.mark.parametrize("power", range(-7, 8))
def test_a_grid_grows_until_the_best_lies_inside_or_the_limit_is_met(power):
    peak = 10.0**power
    score = lambda alpha, beta, rate: 1 / (1 + abs(np.log10(alpha / peak)))  # noqa: E731
    selection, rounds = searched(axes((0.01, 0.1, 1.0)), score)
    tried = sorted(candidate.alpha for candidate in selection.candidates)
    nearest = 10.0 ** min(max(power, -5), 3)
    assert selection.best.alpha == pytest.approx(nearest)
    if -5 < power < 3:
        assert selection.edges == () and tried[0] < selection.best.alpha < tried[-1]
        assert len(tried) == 3 + max(0, power + 1, -power - 1)  # no more than needed
    else:
        assert selection.edges == (f"alpha {nearest:g}",) and len(tried) == 3 + MOST_EXTENSIONS
        assert "at the edge" in str(selection)
    assert len({values for part in rounds for values in part}) == sum(map(len, rounds)) == len(tried)


def test_alpha_and_rate_grow_together_as_a_grid():
    # an anchor allows higher rates: the best setting is in a corner outside the grid
    score = lambda alpha, beta, rate: -abs(np.log2(rate / 0.08)) - abs(np.log10(alpha / 10)) + 0.6 * np.log10(alpha)  # noqa: E731
    selection, _ = searched(axes((0.1, 1.0), rates=(0.01, 0.02)), score)
    assert (selection.best.alpha, selection.best.learning_rate) == (10, 0.08)
    alphas, rates = ({getattr(c, name) for c in selection.candidates} for name in ("alpha", "learning_rate"))
    assert len(selection.candidates) == len(alphas) * len(rates)


def test_one_value_stays_one_and_nothing_is_tried_beyond_zero():
    selection, rounds = searched(axes((0.0, 0.1), betas=(0.5,)), lambda alpha, *_: -alpha)
    assert len(rounds) == 1 and selection.best.alpha == 0 and selection.edges == ()
    selection, _ = searched(axes((0.0, 0.1)), lambda alpha, *_: alpha)
    assert selection.best.alpha == 100 and selection.edges == ("alpha 100",)
    selection, rounds = searched(axes((3.0,)), lambda *_: 0.5)
    assert rounds == [[(3.0, 0.01, 0.01)]] and selection.edges == ()


def test_a_search_in_which_all_diverged_has_a_result():
    selection, rounds = searched(axes((0.1, 1.0)), lambda *_: None)
    assert selection.best is None and len(rounds) == 1 and "Every setting diverged" in str(selection)
    for name in ("best_penalty", "best_recipe"):
        with pytest.raises(l2sp.InputError, match="Every setting of L2SP diverged"):
            getattr(selection, name)
    record = selection.record({"source": "s", "target": "t", "penalty": "l2_sp"}, 2)
    records.check_record(record, "selection.json")
    assert record["chosen"] is None


def test_diverging_settings_bound_the_grid_and_are_not_chosen():
    selection, _ = searched(axes((0.1, 1.0)), lambda alpha, *_: alpha if alpha < 50 else None)
    assert selection.best.alpha == 10 and max(c.alpha for c in selection.candidates) == 100 and selection.edges == ()
    half = Candidate(5, 0.01, 0.01, (0.9, None))
    assert half.mean == 0.45 and not half.diverged
    assert Selection(l2sp.L2, RECIPE, (half, Candidate(1, 0.01, 0.01, (0.5, 0.5)))).best.alpha == 1


@pytest.mark.usefixtures("as_given")
def test_a_diverging_setting_is_not_chosen(pretrained):
    options = {"learning_rates": (0.01,), "folds": 2}
    selection = l2sp.cross_validate(pretrained, task(), l2sp.L2SP, RECIPE, alphas=(1e12, 0.1), **options)
    assert selection.candidates[0].accuracies == (None, None) and selection.best.alpha == 0.1


def test_an_interrupted_search_resumes_and_leaves_its_record(pretrained, trained_once, tmp_path, monkeypatch):
    options = {"alphas": (0.1,), "learning_rates": (0.05,), "folds": 2, "run_dir": tmp_path}
    made, recipe = task(), RECIPE.replace(iterations=2)
    calls, finetune = trained_once, runs.finetune

    def interrupted(*args, **more):
        run = finetune(*args, **more)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run

    monkeypatch.setattr(runs, "finetune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        l2sp.cross_validate(pretrained, made, l2sp.L2SP, recipe, **options)
    assert not list(tmp_path.glob("selections/*"))
    selection = l2sp.cross_validate(pretrained, made, l2sp.L2SP, recipe, **options)
    assert len(calls) == 2 * len(selection.candidates) + 1
    (path,) = tmp_path.glob("selections/*/selection.json")
    record = records.read_record(path)
    assert record["chosen"]["alpha"] == selection.best.alpha and len(record["candidates"]) == len(selection.candidates)
    again = l2sp.cross_validate(pretrained, made, l2sp.L2SP, recipe, **options)
    assert again == selection and len(calls) == 2 * len(selection.candidates) + 1
    assert records.read_record(path) == record  # its time too
    other = l2sp.cross_validate(pretrained, made, l2sp.L2SP, recipe, **(options | {"alphas": (0.01,)}))
    (path,) = tmp_path.glob("selections/*/selection.json")
    assert records.read_record(path)["chosen"]["alpha"] == other.best.alpha == 0.01


def test_runs_on_other_images_preparations_and_models_are_not_confused(pretrained, tmp_path, monkeypatch):
    made, count = task(count=20), []

    def diverging(*args, **more):
        count.append(args)
        raise FloatingPointError("The loss is nan after step 1.")

    monkeypatch.setattr(runs, "finetune", diverging)
    options = {"alphas": (0.1,), "learning_rates": (0.05,), "folds": 2, "run_dir": tmp_path}
    options["anchors"] = l2sp.Anchors.of(pretrained)
    other = zoo.small_resnet((6, 6, 3), 4, widths=(4,), depths=(1,))
    other.layers[1].set_weights([weight + 1 for weight in other.layers[1].get_weights()])
    tasks = [
        made,
        dataclasses.replace(made, train=made.train.take(np.arange(18))),
        dataclasses.replace(made, train=made.train.take(np.arange(2, 20))),
        dataclasses.replace(made, mean=made.mean + 1),
        dataclasses.replace(made, preprocessing=dataclasses.replace(made.preprocessing, mirror=not made.preprocessing.mirror)),
    ]
    for again in range(2):
        for number, each in enumerate([*tasks, made]):
            l2sp.cross_validate(other if number == len(tasks) else pretrained, each, l2sp.L2SP, RECIPE, **options)
        assert len(count) == 2 * (len(tasks) + 1), again  # a second call reads the first's records


@pytest.mark.usefixtures("as_given")
def test_strengths_are_numbers_in_any_form_and_f_jj_any_mapping(pretrained, trained_once, tmp_path):
    made, kernels = task(), {key: np.ones_like(value) for key, value in l2sp.Anchors.of(pretrained).items()}
    options = {"folds": 2, "fisher": kernels, "run_dir": tmp_path}
    first = l2sp.cross_validate(pretrained, made, l2sp.L2SPFisher, RECIPE, alphas=(0.1, 1.0), learning_rates=(0.01,), **options)
    forms = [(np.array([0.1, 1.0]), 0.01), ([np.float64(0.1), 1, 1.0], [0.01]), (iter((0.1, 1)), np.float64(0.01))]
    for alphas, rates in forms:
        found = l2sp.cross_validate(pretrained, made, l2sp.L2SPFisher, RECIPE, alphas=alphas, learning_rates=rates, **options)
        assert found.candidates == first.candidates
    assert len(trained_once) == len(list(tmp_path.glob("folds/*/run.json"))) == 4  # every form reuses the runs of the first
    kernels = {key: value * 2 for key, value in kernels.items()}
    l2sp.cross_validate(
        pretrained, made, l2sp.L2SPFisher, RECIPE, alphas=0.1, learning_rates=0.01, **options | {"fisher": kernels}
    )
    assert len(trained_once) == len(list(tmp_path.glob("folds/*/run.json"))) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alphas": ()}, "alphas is empty"),
        ({"alphas": np.array([])}, "alphas is empty"),
        ({"betas": []}, "betas is empty"),
        ({"learning_rates": ()}, "learning_rates is empty"),
        ({"learning_rates": 0}, "learning_rates is 0: give a finite number above 0"),
        ({"alphas": (0.1, -1)}, "alphas is -1"),
        ({"alphas": np.nan}, "alphas is nan"),
        ({"alphas": "0.1"}, "alphas is '0.1': give numbers"),
        ({"betas": {"l2": 1}}, "betas is {'l2': 1}: give numbers"),
        ({"folds": 2.5}, "folds is 2.5: give a whole number"),
    ],
)
def test_anything_but_a_list_of_numbers_gives_one_sentence(arguments, message, pretrained):
    with pytest.raises(l2sp.InputError, match=re.escape(message)):
        l2sp.cross_validate(pretrained, task(), l2sp.L2SP, RECIPE, **arguments)


def test_a_single_setting_never_replaces_a_choice(tmp_path):
    question = {"source": "s", "target": "t", "penalty": "l2_sp"}

    def write(*alphas):
        candidates = tuple(Candidate(alpha, 0.01, 0.01, (0.5, 0.5 + alpha / 10)) for alpha in alphas)
        path = selection_module.write_selection(tmp_path, Selection(l2sp.L2SP, RECIPE, candidates).record(question, 2))
        return records.read_record(path)["chosen"]["alpha"]

    assert (write(0.1), write(0.1, 1.0), write(2.0, 3.0)) == (0.1, 1.0, 3.0)
    with pytest.warns(UserWarning, match="A single setting is not a choice"):
        assert write(0.1) == 3.0


def test_a_penalty_is_given_as_a_class(pretrained):
    for wrong in (l2sp.L2SP(0.1), "l2_sp", dict):
        with pytest.raises(l2sp.InputError, match="give a class, one of L2, L2SP"):
            l2sp.cross_validate(pretrained, task(), wrong, RECIPE)
