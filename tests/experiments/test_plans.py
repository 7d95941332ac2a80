"""Plans: their runs, and the plans of each table and figure."""

import pathlib

import pytest

import l2sp_tf as l2sp
from l2sp_tf.experiments.plans import STUDIES, FisherPlan, Plan, Setting, spread, study
from l2sp_tf.penalties.formulas import PENALTIES
from l2sp_tf.training.recipe import Recipe


def plan(**changes):
    given = {"penalties": ("l2", "l2_sp"), "alphas": (), "seeds": (0, 1), "source": "digits/source", "weights": "none"}
    paths = {"workdir": pathlib.Path("w"), "target": "digits/target", "backbone": "small"}
    return Plan.of(**{**paths, **given, "recipe": Recipe(), "source_recipe": Recipe(), **changes})


def test_runs_are_the_product_in_order_and_each_once():
    runs = list(plan(alphas=(0.1, 1.0, 0.1), betas=(0.01, 0.1), frozen=(0, 2)).runs())
    assert len(runs) == len(set(runs)) == 2 * 2 * 2 * 2 * 2
    assert runs[0] == Setting("l2", 0.1, 0.01, 0.01, frozen=0, seed=0)
    assert [(r.symbol, r.alpha) for r in plan().runs()] == [("l2", 1e-4)] * 2 + [("l2_sp", 0.1)] * 2


def test_a_penalty_has_its_own_strengths_and_the_others_share_alpha():
    made = plan(penalties=("l2", "l2_sp", "l1_sp"), alphas=(0.5,), strengths={"l2_sp": (0.1, 1.0)}, seeds=(0,))
    assert [(r.symbol, r.alpha) for r in made.runs()] == [("l2", 0.5), ("l2_sp", 0.1), ("l2_sp", 1.0), ("l1_sp", 0.5)]
    assert made.setup.key() == plan().setup.key()
    mixed = plan(strengths={"l2_sp": (7.0,)}, folds=2)
    assert [s.alpha for s in mixed.grid("l2_sp")] == [7.0] and len(mixed.grid("l2")) == 4
    for name, expected in (("table_2", {"l2_sp": (7.0,)}), ("figure_1", {})):
        (part,) = study(name, mixed)
        assert part.sweep.strengths == expected and {s.alpha for s in part.grid("l2_sp")} == {7.0}
    assert [part.sweep.learning_rates for part in study("figure_1", plan(folds=2, learning_rates=(0.02,)))] == [(0.02,)]
    assert [part.sweep.learning_rates for part in study("figure_1", plan(folds=2, learning_rates=(0.02, 0.01)))] == [()]


def test_the_fisher_diagonal_has_mean_1_by_default():
    assert FisherPlan().transforms == (("normalise", None),)
    assert {plan(folds=folds).setup.fisher for folds in (0, 2)} == {FisherPlan()}


def test_trials_are_every_setting_on_every_fold():
    made = plan(folds=3, learning_rates=(0.01, 0.02))
    trials = made.trials()
    assert len(trials) == len(set(trials)) == 2 * 4 * 2 * 3
    assert {t.fold for t in trials} == {0, 1, 2} and all(t.seed == t.fold and t.frozen == 0 for t in trials)
    chosen = {symbol: made.grid(symbol)[3] for symbol in made.sweep.penalties}
    assert {(r.symbol, r.alpha, r.learning_rate) for r in made.runs(0, chosen)} == {("l2", 1e-4, 0.02), ("l2_sp", 0.01, 0.02)}
    assert plan().trials() == []


def test_frozen_units_are_spread_over_the_backbone():
    assert spread(3, 8) == (0, 1, 2, 3) and spread(0, 8) == (0,)
    assert spread(34, 8) == (0, 5, 10, 15, 19, 24, 29, 34)
    assert [r.frozen for r in plan(penalties=("l2",), seeds=(0,), frozen=None).runs(units=3)] == [0, 1, 2]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_plans_what_its_table_or_figure_shows(name):
    plans = study(name, plan(folds=5))
    penalties = {symbol for part in plans for symbol in part.sweep.penalties}
    expected = {"figure_1": {"l2_sp"}, "figure_3": {"l2", "l2_sp"}, "figure_2": set(PENALTIES), "all": set(PENALTIES)}
    assert penalties == expected.get(name, {"l2", "l2_sp", "l2_sp_fisher"})
    assert any(part.sweep.frozen is None for part in plans) == (name in ("figure_3", "all"))
    assert any(len(part.sweep.betas) > 1 for part in plans) == (name in ("figure_1", "all"))
    assert len({part.setup.key() for part in plans}) == 1


def test_the_papers_five_runs_are_kept_and_figure_1_takes_one_seed():
    (table,) = study("table_2", plan(folds=5, seeds=(0, 1, 2, 3, 4)))
    assert len(list(table.runs(0, {s: table.grid(s)[0] for s in table.sweep.penalties}))) == 15
    (grid,) = study("figure_1", plan(folds=5))
    assert not grid.trials() and len(list(grid.runs())) == 4 * 4


def test_what_a_run_starts_from_does_not_depend_on_the_grid():
    assert plan(alphas=(1.0,), seeds=(3,), folds=2).setup.key() == plan().setup.key()
    others = {"fisher": FisherPlan(mode="exact")}, {"recipe": Recipe().replace(crop=200)}
    for changes in ({"per_class": 3}, {"weights": "w.keras"}, *others):
        assert plan(**changes).setup.key() != plan().setup.key()


def test_mistakes_are_reported():
    for changes, message in (
        ({"penalties": ("l3",)}, "'l3' is unknown"),
        ({"folds": 1}, "folds is 1"),
        ({"folds": True}, "folds is True"),
        ({"folds": -2}, "folds is -2"),
        ({"penalties": ("l2_spp",)}, "Did you mean l2_sp"),
        ({"penalties": ()}, "nothing to run"),
        ({"penalties": ("l2_sp_fisher",), "source": None, "weights": "w"}, "needs source images"),
        ({"penalties": ("l1_sp",)}, "no published strength for the penalty l1_sp"),
        ({"seeds": ()}, "nothing to run"),
        ({"seeds": (1, 2, 1)}, "seeds has 1 twice"),
        ({"seeds": (-1,)}, "seeds is -1"),
        ({"alphas": (0.1, -1.0)}, "alpha is -1.0"),
        ({"alphas": (float("nan"),)}, "alpha is nan"),
        ({"betas": (-0.1,)}, "beta is -0.1"),
        ({"learning_rates": (0.0,)}, "learning_rate is 0.0"),
        ({"strengths": {"l1_sp": (1.0,)}}, "l1_sp has strengths, but is not among the penalties l2, l2_sp"),
        ({"strengths": {"l2": (-1.0,)}}, "alpha of l2 is -1.0"),
        ({"frozen": (-1,)}, "frozen is -1"),
        ({"frozen": ()}, "frozen is empty"),
        ({"per_class": 0}, "per_class is 0"),
        ({"checkpoint_every": 1.5}, "checkpoint_every is 1.5"),
        ({"widths": (4,)}, "1 widths and 3 depths"),
        ({"widths": (4, 0, 1)}, "widths is 0"),
        ({"protocol": "author"}, "Did you mean authors"),
        ({"backbone": "vgg"}, "The backbone 'vgg' is unknown"),
    ):
        with pytest.raises(l2sp.InputError, match=message):
            plan(**changes)
    for changes, message in (
        ({"mode": "random"}, "fisher_mode is 'random'"),
        ({"samples": 0}, "fisher_samples is 0"),
        ({"tolerance": 0}, "fisher_tolerance is 0"),
        ({"transforms": (("clip", float("nan")),)}, "transform clip is nan"),
        ({"transforms": (("clip", None),)}, "The Fisher transform clip has no value"),
    ):
        with pytest.raises(l2sp.InputError, match=message):
            FisherPlan(**changes)
    with pytest.raises(l2sp.InputError, match="'table_9' is unknown"):
        study("table_9", plan())


def test_a_setting_names_itself():
    assert str(Setting("l2_sp", 0.1, 0.01, 0.02, 3, 4)) == "L2SP(alpha=0.1), beta 0.01, rate 0.02, 3 units frozen, seed 4"
    assert str(Setting("l2", 1, 0.01, 0.02, seed=1, fold=1)).endswith("rate 0.02, fold 1")
