"""Data sets as people have them: names of splits, system files, folders in folders, Unicode, and what is said of them."""

import unicodedata
import zipfile

import numpy as np
import pytest
from test_datasets import PLACES, placed
from test_pipeline import encoded, picture

import l2sp_tf as l2sp
from l2sp_tf.data import load_dataset
from l2sp_tf.data.layout import is_system

CAFE, CAFE_OF_MACOS = "caf\u00e9", "cafe\u0301"


def tree(*splits, classes=("cat", "dog"), count=2):
    places = [(split, split.rpartition("/")[2], name) for split in splits for name in classes]
    return [f"{split}/{name}/{last}{i}.jpg" for split, last, name in places for i in range(count)]


def loaded(root, names, kind, **options):
    return load_dataset(placed(root, names, kind), cache_dir=root / "cache", **options)


def shown(split, root):
    """The paths of a split's images without the folder or zip that holds them."""
    return [name.split("x.zip/")[-1].split("/x/")[-1].removeprefix("pets/") for name in split.names]


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(
    ("splits", "train", "test", "notes"),
    [
        (["train", "test"], "train", "test", ()),
        (["TRAIN", "Test"], "TRAIN", "Test", ()),
        (["train", "val"], "train", "val", ("val/ used as the test split",)),
        (["Training/train", "Training/Validation"], "Training/train", "Training/Validation", None),
        (["train", "valid"], "train", "valid", ("valid/ used as the test split",)),
        (["Training", "Testing"], "Training", "Testing", ()),
        (["training", "testing", "val"], "training", "testing", ("val/ left out (4 images), as there is testing/",)),
        (["train/train", "train/testing"], "train/train", "train/testing", ("read from its folder train",)),
        (["train", "valid", "test"], "train", "test", ("valid/ left out (4 images), as there is test/",)),
        (["my/own/train", "my/own/test"], "my/own/train", "my/own/test", ("read from its folder my/own",)),
    ],
)
def test_splits_are_found_by_one_rule(tmp_path, kind, splits, train, test, notes):
    data = loaded(tmp_path, tree(*splits), kind)
    assert shown(data.train, tmp_path) == tree(train) and shown(data.test, tmp_path) == tree(test)
    assert data.classes == ("cat", "dog") and data.train.labels.tolist() == data.test.labels.tolist() == [0, 0, 1, 1]
    expected = ("read from its folder Training", "Validation/ used as the test split") if notes is None else notes
    assert data.notes == expected
    assert data.remarks() == ("; ".join((f"{data.name}: 8 images", *expected)) if expected else "")


SYSTEM = [
    ".DS_Store",
    "._1.jpg",
    "Thumbs.db",
    "THUMBS.DB",
    "desktop.ini",
    "ehthumbs.db",
    "Icon\r",
    "1.jpg~",
    ".directory",
    "~$a.docx",
]
SYSTEM_FOLDERS = [
    "__MACOSX",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
    ".Trashes",
    ".ipynb_checkpoints",
    "lost+found",
]


@pytest.mark.parametrize("kind", PLACES)
def test_system_files_are_left_out_everywhere_and_counted(tmp_path, kind):
    files = [place + name for place in ("", "train/", "train/cat/", "val/dog/") for name in SYSTEM]
    folders = [f"{place}{name}/cat/1.jpg" for place in ("", "train/", "val/cat/") for name in SYSTEM_FOLDERS]
    data = loaded(tmp_path, tree("train", "val") + files + folders, kind)
    assert shown(data.train, tmp_path) == tree("train") and shown(data.test, tmp_path) == tree("val")
    assert data.notes == (
        "val/ used as the test split",
        f"{len(files) + len(folders)} system files or folders left out",
    )


def test_ordinary_names_are_not_of_the_system():
    assert not any(map(is_system, ("cat", "icon", "Icon.png", "macosx", "a~b", "thumbs", "lost", "recycle", "desktop.ini.png")))
    assert all(map(is_system, SYSTEM + SYSTEM_FOLDERS))


@pytest.mark.parametrize("kind", PLACES)
def test_a_folder_that_is_alone_beside_system_files_and_texts_is_stepped_into(tmp_path, kind):
    names = ["README.txt", "__MACOSX/pets/._a", "pets/data.yaml", "pets/.DS_Store", "cover.jpg", *tree("pets/train", "pets/test")]
    data = loaded(tmp_path, names, kind)
    assert len(data.train) == len(data.test) == 4
    notes = "read from its folder pets", "1 images beside the splits left out", "2 system files or folders left out"
    assert data.notes == notes


def test_a_folder_of_links_in_a_circle_ends(tmp_path):
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "pets").symlink_to(tmp_path / "pets")
    with pytest.raises(l2sp.InputError, match="no train/ and no test/"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(("train", "test"), [(CAFE, CAFE_OF_MACOS), (CAFE_OF_MACOS, CAFE)])
def test_a_class_is_one_in_both_unicode_forms(tmp_path, kind, train, test):
    assert unicodedata.normalize("NFC", CAFE_OF_MACOS) == CAFE != CAFE_OF_MACOS
    # in the form of macOS "cafe" with an accent comes before "cafy", in NFC after it
    names = tree("train", classes=(train, "cafy")) + tree("test", classes=(test, "cafy"))
    data = loaded(tmp_path, names, kind)
    assert data.classes == ("cafy", CAFE)
    for split in (data.train, data.test):
        assert [unicodedata.normalize("NFC", path.parent.name) for path in split.files] == ["cafy", "cafy", CAFE, CAFE]
        assert split.labels.tolist() == [0, 0, 1, 1] and all(path.is_file() for path in split.files)
    some = load_dataset(placed(tmp_path, names, kind), cache_dir=tmp_path / "cache", classes=[CAFE_OF_MACOS, "a", "cafy"])
    assert some.train.labels.tolist() == some.test.labels.tolist() == [2, 2, 0, 0]


def test_the_digest_is_that_of_the_data_and_not_of_the_split_or_the_form(tmp_path):
    digests = set()
    for number, (test, name) in enumerate([("test", CAFE), ("val", CAFE_OF_MACOS), ("pets/valid", CAFE)]):
        root, top = tmp_path / str(number), "pets/" if "/" in test else ""
        for split in (f"{top}train", test):
            for c in (name, "dog"):
                (root / split / c).mkdir(parents=True)
                (root / split / c / "1.png").write_bytes(split.removeprefix(top)[:2].encode() + c[:1].encode())
        (root / test / "dog" / "1.png").write_bytes(b"test")
        (root / test / name / "1.png").write_bytes(b"another")
        digests.add(load_dataset(root).digest)
    assert len(digests) == 1


@pytest.mark.parametrize("kind", PLACES)
def test_images_without_an_ending_are_found_by_their_content(tmp_path, kind):
    contents = {kind: encoded(picture(4, 4, 3), kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "WebP")}
    root, names = tmp_path / "x", {"JPEG": "a", "PNG": "b.dat", "GIF": "c.", "BMP": "d.jpg.bak", "WebP": "e.image"}
    for split in ("train", "test"):
        for c in ("cat", "dog"):
            (root / split / c).mkdir(parents=True)
            for image, content in contents.items():
                (root / split / c / names[image]).write_bytes(content)
    where = root
    if kind != "folder":
        where = tmp_path / "x.zip"
        with zipfile.ZipFile(where, "w") as file:
            for path in root.rglob("*"):
                file.write(path, path.relative_to(tmp_path if kind == "folder in a zip" else root))
        where = where / "x" if kind == "folder in a zip" else where
    data = load_dataset(where, cache_dir=tmp_path / "cache")
    assert [name.rpartition("/")[2] for name in data.test.names] == sorted(names.values()) * 2
    (root / "train/cat/BMW.txt").write_text("BM is a make of cars, and this is no image")
    with pytest.raises(l2sp.InputError, match="BMW.txt is not an image"):
        load_dataset(root)


def test_test_images_that_are_training_images_are_said(tmp_path):
    root = tmp_path / "set"
    for split in ("train", "test"):
        for number, c in enumerate(("cat", "dog")):
            (root / split / c).mkdir(parents=True)
            for i in range(3):
                seed = 10 * number + i + 100 * (split == "test" and i > 0)
                (root / split / c / f"{split}{i}.png").write_bytes(encoded(picture(4, 4, 3, seed=seed), "PNG"))
    data = load_dataset(root)
    with pytest.warns(
        UserWarning, match=r"2 of the 6 test images of .* such as .*test/cat/test0.png, which is .*train/cat/train0.png"
    ):
        digest = data.digest
    few = data.subset(1)
    few = type(data)(few.name, few.classes, data.train.take([1, 2, 4, 5]), data.test)
    assert few.digest != digest  # and no warning: none of these is a test image
    assert np.bincount(few.train.labels).tolist() == [2, 2]
