"""A penalty from outside the package trains, searches, steps, saves and reports like the paper's."""

import importlib.metadata

import keras
import numpy as np
import pytest
from keras import ops
from test_plans import plan

import l2sp_tf as l2sp
from l2sp_tf.experiments import records
from l2sp_tf.experiments.plans import Setting
from l2sp_tf.experiments.runner import run_plans
from l2sp_tf.penalties.formulas import PAPER, PENALTIES, AnchoredPenalty, load_registered, register_penalty
from l2sp_tf.reports import figures, tables
from l2sp_tf.training.recipe import Recipe

RECIPE = Recipe.digits().replace(iterations=2, batch_size=8, alpha={})


@pytest.fixture(autouse=True)
def _only_the_papers():
    yield
    for symbol in set(PENALTIES) - set(PAPER):
        del PENALTIES[symbol]


def huber(grid=(0.01, 1.0), **methods):
    """Registers a penalty with the value alpha sum_j (sqrt(1 + (w - w0)^2) - 1), and the given methods."""

    class Huber(AnchoredPenalty):
        """A smooth penalty that grows like |w - w0| far from w0."""

        def value(self, w):
            return self.alpha * ops.sum(ops.sqrt(1 + ops.square(self.displacement(w))) - 1)

    for name, method in methods.items():
        setattr(Huber, name, method)
    return register_penalty("huber_sp", "Huber-SP", grid)(Huber)


def small():
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.Dense(2, name="b")(keras.layers.Dense(3, name="a")(inputs)))


def test_its_runs_are_recorded_searched_and_shown_under_its_title(tmp_path):
    huber(grid=(0.5,))  # one strength, which is not extended
    options = {"widths": (2,), "depths": (1,), "per_class": 4, "recipe": RECIPE}
    options["source_recipe"] = RECIPE.replace(alpha={"l2": 1e-4})
    options |= {"workdir": tmp_path, "seeds": (0,)}
    made = plan(penalties=("huber_sp",), folds=2, **options)
    assert [setting.alpha for setting in made.grid("huber_sp")] == [0.5]
    found = run_plans([made, plan(penalties=("l2",), strengths={"l2": (1e-4,)}, **options)], say=lambda line: None)
    PENALTIES.pop("huber_sp")  # tables must work from records alone, as in another process
    assert {r["settings"]["penalty"] for r in records.runs_of(records.read_records(tmp_path))} == {"huber_sp", "l2"}
    for text in (tables.overview(found).markdown(), tables.table_2(found).markdown(), tables.table_csv(found)):
        assert "Huber-SP" in text and "L2" in text
    (path, *_) = figures.write_figure(found, tmp_path, 2)
    assert path.is_file()


def test_it_trains_in_the_models_loss_and_comes_back_from_a_file(tmp_path):
    cls, model = huber(), small()
    anchors = l2sp.Anchors.of(model)
    coverage = l2sp.attach(model, cls(0.5), anchors, new=["b"])
    assert coverage.is_saved
    model.get_layer("a").kernel.assign_add(np.full((4, 3), 2.0))
    expected = 0.5 * 12 * (np.sqrt(5) - 1) + 0.005 * np.sum(np.square(model.get_layer("b").kernel))
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded.get_layer("a").kernel.regularizer) is cls
    assert l2sp.detach(loaded) == 4


def test_optimizers_step_it_if_it_defines_how():
    model = small()
    l2sp.attach(model, huber()(0.5), l2sp.Anchors.of(model), new=["b"])
    for optimizer in (l2sp.Proximal, l2sp.Decoupled):
        with pytest.raises(l2sp.InputError, match=rf"{optimizer.__name__} cannot step Huber\(alpha=0.5\): it can step L2, L2SP"):
            optimizer.of("sgd", model)
    PENALTIES.pop("huber_sp")

    def gradient(self, w):
        d = self.displacement(w)
        return self.alpha * d / ops.sqrt(1 + ops.square(d))

    l2sp.attach(model, huber(gradient=gradient)(0.5), l2sp.Anchors.of(model), new=["b"])
    model.get_layer("a").kernel.assign_add(np.ones((4, 3)))
    before = model.get_layer("a").kernel.numpy()
    model.compile(l2sp.Decoupled.of(keras.optimizers.SGD(0.1), model), lambda y, z: ops.mean(0 * z))
    model.train_on_batch(np.zeros((2, 4)), np.zeros((2, 2)))
    np.testing.assert_allclose(before - model.get_layer("a").kernel.numpy(), 0.1 * 0.5 / np.sqrt(2), rtol=1e-5)


@pytest.mark.parametrize(
    ("symbol", "grid", "message"),
    [
        ("l2_sp", (1.0,), r"The symbol l2_sp is that of l2sp_tf.penalties.formulas.L2SP"),
        ("Huber SP", (1.0,), "The symbol 'Huber SP' is not a word"),
        ("huber_sp", (), "The grid of Huber is empty"),
        ("huber_sp", (-1.0,), "grid is -1.0"),
    ],
)
def test_an_invalid_registration_is_refused(symbol, grid, message):
    class Huber(AnchoredPenalty):
        pass

    with pytest.raises(l2sp.InputError, match=message):
        register_penalty(symbol, "Huber", grid)(Huber)
    with pytest.raises(l2sp.InputError, match="int is not a subclass"):
        register_penalty("other", "Other", (1.0,))(int)


def test_penalties_of_installed_packages_are_imported(monkeypatch):
    entry = importlib.metadata.EntryPoint("huber", "no_such_module_of_penalties", "l2sp_tf.penalties")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] if group == entry.group else [])
    with pytest.raises(l2sp.InputError, match="The penalties of no_such_module_of_penalties cannot be imported"):
        load_registered()
    called = []
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: called.append(huber()))
    load_registered()
    assert called and PENALTIES["huber_sp"] is called[0]
    assert str(Setting("huber_sp", 0.1, 0.01, 0.01)).startswith("Huber(alpha=0.1)")
