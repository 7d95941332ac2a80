"""Checks the retention report: numbers against loops, the rebuilt start, and a page that loads nothing."""

import dataclasses
import html.parser
import json
import math
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import l2sp_tf as l2sp
from l2sp_tf.data import load_dataset
from l2sp_tf.evaluation.report import distances, pretrained_of
from l2sp_tf.experiments import records
from l2sp_tf.experiments.folders import predict_images, report_of_files, report_of_run
from l2sp_tf.files.provenance import provenance
from l2sp_tf.models import keras_files
from l2sp_tf.models.copies import detached_copy
from l2sp_tf.models.pixels import PIXELS


def moved_copy(pretrained, classes=4, amount=0.1):
    model = l2sp.with_new_head(pretrained, classes, seed=1)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign_add(np.abs(rng.normal(size=weight.shape)) * amount)
    return model


def batches(n=10, classes=3):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 6, 6, 3)).astype("float32"), rng.integers(classes, size=n)
    return [(x[:6], y[:6]), (x[6:], y[6:])]


def test_distances_are_those_of_a_loop(small_network):
    pretrained = small_network()
    anchors, model = l2sp.Anchors.of(pretrained), moved_copy(pretrained)
    layers, new = distances(model, anchors)
    assert [layer.layer for layer in layers] == ["conv1_conv", "conv1_bn", "conv2_conv"]
    assert new == ["new_head/kernel", "new_head/bias"]
    for row, names in zip(layers, [("kernel", "bias"), ("gamma", "beta"), ("kernel", "bias")], strict=True):
        moved = norm = count = 0
        for name in names:
            w, w0 = getattr(model.get_layer(row.layer), name).numpy(), anchors[f"{row.layer}/{name}"]
            for j in np.ndindex(*w.shape):
                moved += (float(w[j]) - float(w0[j])) ** 2
                norm += float(w0[j]) ** 2
                count += 1
        assert row.numbers == count
        assert row.distance == pytest.approx(math.sqrt(moved)) and row.norm == pytest.approx(math.sqrt(norm))
    report = l2sp.retention_report(model, anchors)
    assert report.distance == pytest.approx(math.sqrt(sum(row.distance**2 for row in layers)))
    assert report.accuracies is None and report.r2 == {}
    ranked = report.most_moved(2)
    assert ranked[0].relative >= ranked[1].relative >= min(row.relative for row in layers)


def test_a_weight_at_zero_has_no_relative_distance_and_a_model_at_its_anchors_none_at_all(small_network):
    pretrained = small_network()
    anchors = l2sp.Anchors(
        {**l2sp.Anchors.of(pretrained), **{f"conv1_bn/{n}": np.zeros(4, "float32") for n in ("gamma", "beta")}}
    )
    report = l2sp.retention_report(pretrained, anchors)
    assert [row.relative for row in report.layers] == [0.0, None, 0.0, 0.0]
    same = l2sp.retention_report(pretrained, l2sp.Anchors.of(pretrained))
    assert same.distance == 0 and same.most_moved() == []
    assert "No layer moved" in l2sp.retention_report(pretrained, l2sp.Anchors.of(pretrained)).html()
    pretrained.get_layer("conv2_conv").bias.assign([np.nan] * 5)
    assert l2sp.retention_report(pretrained, anchors).most_moved()[0].layer == "conv2_conv"
    assert "not finite" in l2sp.retention_report(pretrained, anchors).html()


def test_other_anchors_are_refused(small_network):
    with pytest.raises(l2sp.InputError, match="shares no weights"):
        l2sp.retention_report(small_network(), l2sp.Anchors({"other/kernel": np.ones(3)}))


@pytest.mark.parametrize("bias", [True, False])
def test_the_start_is_rebuilt_from_the_anchors(small_network, bias):
    base = small_network()
    pretrained = keras.Model(base.inputs[0], keras.layers.Dense(3, use_bias=bias, name="old")(base.get_layer("pool").output))
    model = moved_copy(pretrained)
    x = batches()[0][0]
    rebuilt = pretrained_of(model, l2sp.Anchors.of(pretrained))
    np.testing.assert_array_equal(rebuilt(x, training=False), pretrained(x, training=False))
    same_head = detached_copy(pretrained)
    same_head.set_weights([w + 1 for w in pretrained.get_weights()])
    again = pretrained_of(same_head, l2sp.Anchors.of(pretrained))
    np.testing.assert_array_equal(again(x, training=False), pretrained(x, training=False))


def test_the_report_asks_for_a_start_that_it_cannot_rebuild(small_network):
    pretrained = small_network()
    model = moved_copy(pretrained)
    anchors = l2sp.Anchors({k: v for k, v in l2sp.Anchors.of(pretrained).items() if k != "predictions/kernel"})
    with pytest.raises(l2sp.InputError, match="give the model that it started from"):
        l2sp.retention_report(model, anchors, source=batches())
    assert l2sp.retention_report(model, anchors, source=batches(), pretrained=pretrained).accuracies["before"]["total"] == 10


def test_a_start_of_two_last_layers_is_not_rebuilt_with_one():
    inputs = keras.Input((4,))
    features = keras.layers.Dense(4, name="stem")(inputs)
    x = keras.layers.Dense(4, use_bias=False, name="first")(features)
    pretrained = keras.Model(inputs, keras.layers.Dense(3, use_bias=False, name="second")(x))
    model = keras.Model(inputs, keras.layers.Dense(2, name="new_head")(features))
    with pytest.raises(l2sp.InputError, match="more than one last Dense layer"):
        pretrained_of(model, l2sp.Anchors.of(pretrained))


def test_accuracies_and_r2_are_those_of_the_library(small_network):
    pretrained = small_network()
    model = moved_copy(pretrained)
    report = l2sp.retention_report(model, l2sp.Anchors.of(pretrained), source=batches())
    assert report.accuracies == l2sp.retention(model, pretrained, batches())
    assert set(report.r2) == {"conv1_conv", "conv1_bn", "conv2_conv"}  # all shared layers, as none has a unit's name
    x = np.concatenate([x for x, _ in batches()])
    a, b = (keras.Model(m.inputs[0], m.get_layer("conv1_bn").output)(x, training=False).numpy() for m in (pretrained, model))
    expected = [np.corrcoef(a[..., k].ravel(), b[..., k].ravel())[0, 1] ** 2 for k in range(4)]
    assert report.r2["conv1_bn"]["med"] == pytest.approx(np.median(expected), rel=1e-4)
    assert report.r2["conv1_bn"]["features"] == 4


class Links(html.parser.HTMLParser):
    """Collects the tags of a page and everything that it would load."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "background")]

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_escapes_names(small_network, tmp_path):
    pretrained = small_network()
    evil = '<script>alert("x")</script>&'
    inputs = keras.Input((6, 6, 3))
    named = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(keras.layers.Conv2D(4, 3, name="a<b>&c")(inputs))))
    anchors = l2sp.Anchors.of(named)
    report = l2sp.retention_report(
        moved_copy(named, 3), anchors, title=evil
    )  # no images: TensorFlow cannot trace a layer of such a name
    report.save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    links = Links()
    links.feed(page)
    assert links.loads == [] and "url(" not in page and "@import" not in page and "http" not in page
    assert "script" not in links.tags and "b" in links.tags and page.count("<b>") == len(report.most_moved())
    assert evil in links.text and "a<b>&c" in links.text
    assert "<b>&c" not in report.markdown()
    report = l2sp.retention_report(moved_copy(pretrained), l2sp.Anchors.of(pretrained), source=batches())
    assert f">{report.accuracies['before']['accuracy']:.1%}<" in report.html()
    widths = [float(w) for w in re.findall(r'class="bar" width="([\d.]+)"', report.html())]
    assert len(widths) == 3 and max(widths) == 100


def test_tensorboard_gets_totals_and_curves_over_depth(small_network, tmp_path):
    pretrained = small_network()
    report = l2sp.retention_report(moved_copy(pretrained), l2sp.Anchors.of(pretrained), source=batches())
    report.log(tmp_path)
    found = {}
    for path in tmp_path.iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, tf.make_ndarray(value.tensor)))
    assert found["retention/distance"] == [(0, np.float32(report.distance))]
    assert found["retention/source_accuracy/before"][0][1] == np.float32(report.accuracies["before"]["accuracy"])
    curve = found["retention/relative_distance_by_depth"]
    assert [step for step, _ in curve] == [0, 1, 2]
    np.testing.assert_allclose([value for _, value in curve], [row.relative for row in report.layers], rtol=1e-6)
    assert len(found["retention/median_r2_by_depth"]) == 3 and "retention/layers" in found


def make_run(folder, pretrained, results):
    model = moved_copy(pretrained)
    keras_files.save_model(model, folder / "model.keras", PIXELS["rgb"])
    l2sp.Anchors.of(pretrained).save(folder / "anchors.safetensors")
    settings = {"source": "s", "target": "t", "penalty": "l2_sp", "alpha": 0.1, "beta": 0.01, "seed": 3}
    digest = {"digest": "0"}
    record = {"settings": settings, "coverage": digest, "anchors": digest, "results": results, **provenance()}
    records.write_record(folder / "run.json", record)
    return model


def test_the_report_of_a_run_takes_its_numbers_from_the_record(small_network, tmp_path):
    pretrained = small_network()
    one = {"accuracy": 0.5, "correct": 5, "total": 10}
    source = {"before": one, "target_statistics": one, "source_statistics": one}
    source |= {"drop_target_statistics": 0.0, "drop_source_statistics": 0.0}
    folder = tmp_path / "w" / "runs" / "one"
    model = make_run(folder, pretrained, {**one, "source": source})
    report = report_of_run(folder)
    assert report.layers == distances(model, l2sp.Anchors.of(pretrained))[0]
    assert report.accuracies == source and report.facts["seed"] == "3" and report.source == "s"
    with pytest.raises(l2sp.InputError, match=r"no run.json in .*give one of the runs under it, such as .*one"):
        report_of_run(tmp_path / "w")
    (folder / "model.keras").unlink()
    with pytest.raises(l2sp.InputError, match="kept no model.keras: run it with --save_models"):
        report_of_run(folder)
    record = records.read_record(folder / "run.json") | {"results": {"diverged": "The loss is nan after step 3."}}
    records.write_record(folder / "run.json", record)
    for ask in (report_of_run, lambda folder: predict_images(folder, [])):
        with pytest.raises(l2sp.InputError, match=r"diverged and left no model \(The loss is nan after step 3\)"):
            ask(folder)


def test_the_report_of_files_measures_on_the_source(tmp_path, monkeypatch):
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, name="conv1_conv")(inputs))
    pretrained = keras.Model(inputs, keras.layers.Dense(10, name="predictions")(x))
    make_run(tmp_path, pretrained, {"accuracy": 0.5, "correct": 5, "total": 10})
    digits, lines = dataclasses.replace(load_dataset("digits/source"), notes=("val/ used as the test split",)), []
    monkeypatch.setattr("l2sp_tf.experiments.folders.load_dataset", lambda *names, **options: digits)
    files = tmp_path / "model.keras", tmp_path / "anchors.safetensors"
    report = report_of_files(*files, source="digits/source", say=lines.append)
    assert lines == ["digits/source: 1100 images; val/ used as the test split"]
    assert report.accuracies["before"]["total"] == 300 and report.source == "digits/source"
    assert list(report.r2) == ["conv1_conv"] and json.dumps(report.r2)
