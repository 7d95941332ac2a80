"""Data sets: the splits of the digits, folder layouts, zips, and the errors for bad ones."""

import stat
import zipfile

import numpy as np
import pytest

from l2sp_tf.data import sets
from l2sp_tf.data.datasets import load_dataset
from l2sp_tf.files.errors import InputError

LAYOUT = [f"{split}/{name}/{i}.jpg" for split in ("train", "test") for name in ("cat", "dog") for i in range(3)]


def write_folder(root, names):
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.split("/", 1)[-1].encode())
    return root


def write_zip(path, names):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            file.writestr(name, name)
    return path


PLACES = ("folder", "zip", "folder in a zip")


def placed(root, names, kind):
    """Writes files as a folder, a zip or a folder in a zip, and returns the path that names the data set."""
    if kind == "folder":
        return write_folder(root / "x", names)
    if kind == "zip":
        return write_zip(root / "x.zip", names)
    return write_zip(root / "x.zip", ["other/1.txt", *(f"pets/{name}" for name in names)]) / "pets"


def without(*dropped):
    return [name for name in LAYOUT if not name.startswith(dropped)]


def files_below(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def digits():
    return {name: load_dataset(f"digits/{name}") for name in ("source", "target")}


def test_digits_sizes(digits):
    source, target = digits["source"], digits["target"]
    assert source.classes == tuple("0123456789") and target.classes == ("even", "odd")
    assert [len(s) for d in (source, target) for s in (d.train, d.test)] == [800, 300, 150, 547]
    assert source.train.pixels.shape == (800, 8, 8, 1) and source.train.pixels.dtype == np.uint8
    assert source.train.labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(source.train.labels), [80] * 10)
    np.testing.assert_array_equal(np.bincount(source.test.labels), [30] * 10)
    np.testing.assert_array_equal(np.bincount(target.train.labels), [75, 75])


def test_digits_share_no_image_and_leave_none_out(digits):
    names = [name for d in digits.values() for split in (d.train, d.test) for name in split.names]
    assert len(names) == len(set(names)) == 1797


def test_digits_pixels_and_labels_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for name, label_of in (("source", lambda d: d), ("target", lambda d: d % 2)):
        for split in (digits[name].train, digits[name].test):
            for shown, label, pixels in list(zip(split.names, split.labels, split.pixels, strict=True))[::7]:
                i = int(shown.split()[-1])
                assert label == label_of(bunch.target[i])
                assert all(pixels[y, x, 0] == round(bunch.images[i][y, x] * 255 / 16) for y in range(8) for x in range(8))


def test_digits_are_always_the_same(digits):
    assert load_dataset("digits/target").digest == digits["target"].digest
    assert digits["source"].digest != digits["target"].digest
    assert len(digits["source"].digest) == 64


def test_subset_takes_the_first_of_each_class(digits):
    target = digits["target"]
    subset = target.subset(25)
    expected = [n for label in (0, 1) for n, k in zip(target.train.names, target.train.labels, strict=True) if k == label]
    expected = set(expected[:25] + expected[75:100])
    assert set(subset.train.names) == expected and len(subset.train) == 50
    assert subset.test is target.test and subset.digest != target.digest
    np.testing.assert_array_equal(np.bincount(subset.train.labels), [25, 25])


def test_random_subsets_follow_the_seed_and_nest(digits):
    target = digits["target"]
    assert target.subset(10, seed=1).train.names == target.subset(10, seed=1).train.names
    assert target.subset(10, seed=1).train.names != target.subset(10, seed=2).train.names
    assert set(target.subset(10, seed=1).train.names) < set(target.subset(20, seed=1).train.names)


def test_the_draw_of_a_class_ignores_the_other_classes(tmp_path):
    def data(classes):
        names = [f"{s}/{c}/{i:02}.jpg" for s in ("train", "test") for c in classes for i in range(20)]
        return load_dataset(write_folder(tmp_path / classes, names))

    both, one = data("ab"), data("bc")
    drawn = [[p.name for p in d.subset(5, seed=3).train.files if p.parent.name == "b"] for d in (both, one)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != [p.name for p in both.subset(5, seed=3).train.files if p.parent.name == "a"]


def test_a_subset_that_a_class_cannot_fill_is_refused(digits):
    with pytest.raises(InputError, match="per_class is 76, but class 'even'.* has 75 training images: give fewer"):
        digits["target"].subset(76)
    with pytest.raises(InputError, match="at least 1"):
        digits["target"].subset(0)


def test_folder(tmp_path):
    names = [*LAYOUT, "train/cat/.DS_Store", "train/dog/Thumbs.db", "test/cat/X.PNG", "test/cat/y.JPeG", "README.md"]
    data = load_dataset(str(write_folder(tmp_path, names)))
    assert data.classes == ("cat", "dog")
    assert data.train.names == tuple(f"{tmp_path}/train/{c}/{i}.jpg" for c in ("cat", "dog") for i in range(3))
    assert [p.name for p in data.test.files] == ["0.jpg", "1.jpg", "2.jpg", "X.PNG", "y.JPeG", "0.jpg", "1.jpg", "2.jpg"]
    assert data.test.labels.tolist() == [0] * 5 + [1] * 3 and data.test.labels.dtype == np.int32
    assert data.train.pixels is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([*LAYOUT, "train/cat/notes.txt"], r"train/cat/notes.txt is not an image"),
        ([*LAYOUT, "train/cat/more/"], r"train/cat/more/ is not an image"),
        ([*LAYOUT, "train/9.jpg"], r"train/9.jpg lies in no class folder"),
        ([*without("test/dog"), "test/dog/"], r"test/dog holds no images: add some"),
        (["train/cat/", "test/cat/"], r"/train holds no images"),
        ([*without("test"), "test/"], r"/test holds no images"),
        (["empty/"], r"no train/ and no test/ \(or val/\): it holds empty"),
        (["README.md"], r"holds no images: give digits/source"),
        (without("train"), r"has no train/: it holds test"),
        (without("test"), r"has no test/ \(or val/\): it holds train"),
        (["cat/1.jpg", "dog/2.jpg"], r"has images without splits"),
        (["1.jpg", "2.jpg"], r"has images without splits"),
        ([*LAYOUT, "images/cat/1.jpg"], r"folders other than train and test: images"),
        ([*LAYOUT, "Train/cat/1.jpg"], r"Train/ and train/, which differ only in case: give one"),
        ([*without("test"), "val/cat/1.jpg", "valid/cat/1.jpg"], r"has val and valid but no test: rename"),
        (["train/cat/1.jpg", "val/cat/2.jpg"], r"has one class, 'cat': a classifier needs at least two"),
        ([*LAYOUT, "train/caf\u00e9/1.jpg", "train/cafe\u0301/1.jpg"], r"train/ has two folders 'caf\u00e9', which differ only"),
        ([*LAYOUT, "train/cat/noending"], r"train/cat/noending is not an image: class folders hold JPEG, PNG, GIF, BMP or"),
        (["pets/train/cat/1.jpg", "pets/train/dog/1.jpg"], r"pets has no test/ \(or val/\): it holds train"),
        ([*LAYOUT, "Training/cat/1.jpg"], r"train and Training, which mean the same split: give one"),
        (["pets/readme.txt"], r"no train/ and no test/ \(or val/\): it holds pets"),
        (["pets/cat/1.jpg", "pets/dog/1.jpg"], r"no train/ and no test/ \(or val/\): it holds pets"),
        ([*LAYOUT, "train/ant/1.jpg", "test/bee/1.jpg"], r"only in train: ant; only in test: bee"),
    ],
)
@pytest.mark.parametrize("kind", PLACES)
def test_a_wrong_layout_is_named(tmp_path, names, message, kind):
    where = placed(tmp_path, names, kind)
    with pytest.raises(InputError, match=message) as error:
        load_dataset(where, cache_dir=tmp_path / "cache")
    assert str(where) in str(error.value)
    assert "one class" in message or not (tmp_path / "cache").exists()


@pytest.mark.parametrize("spec", ["digits", "digits/other", "/no/such/folder", "", "/no/such.zip/target"])
def test_an_unknown_data_set_lists_what_is_accepted(spec):
    with pytest.raises(InputError, match="digits/source, digits/target, a folder"):
        load_dataset(spec)


def test_a_file_that_is_not_a_zip_lists_what_is_accepted(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(InputError, match="no data set .*weights.h5'"):
        load_dataset(tmp_path / "weights.h5")


@pytest.mark.filterwarnings("ignore:.*are training images too")
@pytest.mark.parametrize("prefix", ["", "target/", "a/b/"])
def test_zip_equals_its_folder(tmp_path, prefix):
    # write_folder's files contain their own names without the split, so a zip of the folder has the same digest
    folder = write_folder(tmp_path / "folder", LAYOUT)
    archive = tmp_path / "objects.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"{prefix}README.md" if prefix else "README.md", "not an image")
        for name in LAYOUT:
            file.write(folder / name, prefix + name)
    spec = f"{archive}/{prefix}".rstrip("/")
    data = load_dataset(spec, cache_dir=tmp_path / "cache")
    assert data.digest == load_dataset(folder).digest
    assert data.name == spec and data.train.names[0] == f"{spec}/train/cat/0.jpg"
    assert {p.relative_to(tmp_path).parts[0] for p in data.train.files} == {"cache"}
    assert len(files_below(tmp_path / "cache")) == len(LAYOUT)


def test_a_zip_is_unpacked_once_and_again_when_it_changes(tmp_path):
    archive = write_zip(tmp_path / "x.zip", LAYOUT)
    first = load_dataset(archive, cache_dir=tmp_path / "cache").train.files[0]
    stamp = first.stat().st_mtime_ns
    assert load_dataset(archive, cache_dir=tmp_path / "cache").train.files[0].stat().st_mtime_ns == stamp
    write_zip(archive, [*LAYOUT, "train/cat/new.jpg"])
    assert len(load_dataset(archive, cache_dir=tmp_path / "cache").train) == 7


def test_two_folders_of_a_zip_do_not_share_a_cache(tmp_path):
    archive = write_zip(tmp_path / "x.zip", [f"{top}/{name}" for top in "ab" for name in LAYOUT])
    files = [load_dataset(f"{archive}/{top}", cache_dir=tmp_path / "cache").train.files[0] for top in "ab"]
    assert [path.read_text() for path in files] == ["a/train/cat/0.jpg", "b/train/cat/0.jpg"]


def test_an_interrupted_extraction_leaves_nothing(tmp_path, monkeypatch):
    archive, cache = write_zip(tmp_path / "x.zip", LAYOUT), tmp_path / "cache"
    opened = zipfile.ZipFile.open

    def interrupted(file, member):
        if "dog" in member.filename:
            raise KeyboardInterrupt
        return opened(file, member)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "open", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_dataset(archive, cache_dir=cache)
    assert list(cache.iterdir()) == []
    assert len(load_dataset(archive, cache_dir=cache).train) == 6


def test_a_zip_without_that_folder(tmp_path):
    with pytest.raises(InputError, match="x.zip has no folder 'source'"):
        load_dataset(f"{write_zip(tmp_path / 'x.zip', LAYOUT)}/source", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("member", ["../evil.jpg", "train/../../evil.jpg", "/evil.jpg", "..\\evil.jpg", "C:\\evil.jpg"])
def test_a_member_that_leads_out_is_named_and_nothing_written(tmp_path, member):
    archive = write_zip(tmp_path / "x.zip", [*LAYOUT, member])
    with pytest.raises(InputError, match="leads out of") as error:
        load_dataset(archive, cache_dir=tmp_path / "deep" / "cache")
    assert repr(member) in str(error.value)
    assert files_below(tmp_path) == ["x.zip"]


def test_a_link_is_named(tmp_path):
    archive = write_zip(tmp_path / "x.zip", LAYOUT)
    link = zipfile.ZipInfo("train/cat/link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="'train/cat/link.jpg', which is a link"):
        load_dataset(archive, cache_dir=tmp_path / "cache")


def test_a_zip_bomb_is_refused(tmp_path, monkeypatch):
    archive = write_zip(tmp_path / "x.zip", LAYOUT)
    infolist = zipfile.ZipFile.infolist

    def inflated(file):
        members = infolist(file)
        members[0].file_size = 2**30 + 100 * archive.stat().st_size + 1
        return members

    monkeypatch.setattr(zipfile.ZipFile, "infolist", inflated)
    with pytest.raises(InputError, match="would unpack to"):
        load_dataset(archive, cache_dir=tmp_path / "cache")


def test_a_truncated_zip(tmp_path):
    archive = write_zip(tmp_path / "x.zip", LAYOUT)
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(InputError, match="x.zip is damaged"):
        load_dataset(f"{archive}/target", cache_dir=tmp_path / "cache")


def test_a_zip_with_a_damaged_member(tmp_path):
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in LAYOUT:
            file.writestr(name, "content of " + name)
    archive.write_bytes(archive.read_bytes().replace(b"content of test/dog/2", b"kontent of test/dog/2"))
    with pytest.raises(InputError, match="x.zip is damaged"):
        load_dataset(archive, cache_dir=tmp_path / "cache")
    assert files_below(tmp_path) == ["x.zip"]


@pytest.mark.filterwarnings("ignore:.*are training images too")
def test_the_digest_follows_labels_names_and_bytes(tmp_path):
    def digest():
        return load_dataset(tmp_path).digest

    write_folder(tmp_path, LAYOUT)
    digests = [digest()]
    (tmp_path / "train/cat/0.jpg").write_bytes(b"other")
    digests.append(digest())
    (tmp_path / "train/cat/0.jpg").rename(tmp_path / "train/dog/9.jpg")
    digests.append(digest())
    (tmp_path / "train/dog/9.jpg").rename(tmp_path / "train/dog/8.jpg")
    digests.append(digest())
    assert len(set(digests)) == 4


def test_the_default_cache_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sets.tempfile, "tempdir", str(tmp_path))
    data = load_dataset(write_zip(tmp_path / "x.zip", LAYOUT))
    folder = data.train.files[0].relative_to(tmp_path).parts[0]
    assert folder.startswith("l2sp_tf-cache-")
    assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


def test_a_split_that_does_not_add_up_is_refused():
    with pytest.raises(InputError, match="1 names, 2 labels and 1 images"):
        sets.Split(("a",), np.zeros(2, np.int32), pixels=np.zeros((1, 2, 2, 1), np.uint8))
    with pytest.raises(InputError, match="either pixels or files"):
        sets.Split((), np.zeros(0, np.int32))
