"""A source with a part of the classes of a network's outputs: labels count the outputs."""

import keras
import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf import data
from l2sp_tf.data.datasets import class_names
from l2sp_tf.evaluation.accuracy import evaluate


def folder(root, train, test, count=2):
    rng = np.random.default_rng(0)
    for part, classes in (("train", train), ("test", test)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 256, (8, 8, 3)).astype("uint8")
                keras.utils.save_img(root / part / name / f"{i}.png", image, scale=False)
    return root


def names_of(dataset, split):
    """The class of each image by its path, and by its label."""
    split = getattr(dataset, split)
    return [path.parent.name for path in split.files], [dataset.classes[label] for label in split.labels]


ALL = ["zebra", "ant", "cat", "bee", "dog"]


def test_labels_count_the_outputs_whatever_part_each_split_has(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(ALL) + "\n\n")
    root = folder(tmp_path / "set", ["ant", "bee", "zebra"], ["bee", "dog"])
    for classes in (ALL, str(tmp_path / "names.txt")):
        dataset = data.load_dataset(root, classes=classes)
        assert dataset.classes == tuple(ALL)
        for split in ("train", "test"):
            by_path, by_label = names_of(dataset, split)
            assert by_path == by_label
    with pytest.raises(l2sp.InputError, match="classes of .* differ"):
        data.load_dataset(root)


def test_a_class_that_is_no_output_and_bad_files_are_refused(tmp_path):
    root = folder(tmp_path / "set", ["ant", "bee"], ["ant"])
    with pytest.raises(l2sp.InputError, match=r"not among the 2 of the network's outputs \('bee'\)"):
        data.load_dataset(root, classes=["ant", "dog"])
    with pytest.raises(l2sp.InputError, match="have 'ant' twice"):
        data.load_dataset(root, classes=["ant", "bee", "ant"])
    with pytest.raises(l2sp.InputError, match="no file .*none.txt of class names"):
        data.load_dataset(root, classes=str(tmp_path / "none.txt"))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(l2sp.InputError, match="not a text file of class names"):
        data.load_dataset(root, classes=tmp_path / "bad.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(l2sp.InputError, match="no class names"):
        data.load_dataset(root, classes=tmp_path / "empty.txt")


def test_numbers_are_numbers_only_if_asked(tmp_path):
    root = folder(tmp_path / "set", ["2", "007", "11"], ["2"])
    (tmp_path / "numbers.txt").write_text("0-11")
    numbered = data.load_dataset(root, classes=tmp_path / "numbers.txt")
    assert [int(name) for name in names_of(numbered, "train")[0]] == numbered.train.labels.tolist()
    with pytest.raises(l2sp.InputError, match="'007'"):
        data.load_dataset(root, classes=[str(i) for i in range(12)])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["7", "007"], "classes of .* twice: give each once"),
        (["cafe\u0301", "caf\u00e9"], "train/ has two folders 'caf\u00e9', which differ only in their Unicode form"),
    ],
)
def test_folders_that_are_one_class_are_refused(names, message, tmp_path):
    root = folder(tmp_path / "set", names, names[:1])
    (tmp_path / "names.txt").write_text("0-11" if names[0] == "7" else "caf\u00e9\nb", "utf-8")
    with pytest.raises(l2sp.InputError, match=message):
        data.load_dataset(root, classes=tmp_path / "names.txt")


def test_a_range_without_numbers_is_refused(tmp_path):
    (tmp_path / "names.txt").write_text("5-2")
    with pytest.raises(l2sp.InputError, match="There are no class names: give one a line"):
        class_names(tmp_path / "names.txt")


def test_names_are_compared_in_one_unicode_form(tmp_path):
    root = folder(tmp_path / "set", ["cafe\u0301"], ["cafe\u0301"])  # as macOS writes "cafe" with an accent
    assert data.load_dataset(root, classes=["a", "caf\u00e9"]).train.labels.tolist() == [1, 1]


def test_imagenets_classes_are_built_in_and_sorted():
    names = class_names("imagenet")
    assert len(names) == 1000 and list(names) == sorted(names)
    assert (names[0], names[207], names[281], names[999]) == ("n01440764", "n02099601", "n02123045", "n15075141")


def test_accuracy_is_that_of_keras_on_the_whole_head(tmp_path):
    """Against `predict` of Keras and labels written by hand."""
    dataset = data.load_dataset(folder(tmp_path / "set", ALL, ["bee", "dog", "zebra"], count=5), classes=ALL)
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(5)])
    model.set_weights([np.random.default_rng(0).normal(size=w.shape) for w in model.get_weights()])
    task = data.prepare(dataset, data.Preprocessing(resize=8, crop=8), mean=(0, 0, 0))
    images = np.stack([keras.utils.img_to_array(keras.utils.load_img(path)) for path in dataset.test.files])
    answers = [ALL[i] for i in model.predict(images, verbose=0).argmax(1)]
    right = [answer == path.parent.name for answer, path in zip(answers, dataset.test.files, strict=True)]
    assert evaluate(model, task)["accuracy"] == np.mean(right)
