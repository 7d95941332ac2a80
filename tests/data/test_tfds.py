"""TFDS sets: built from dummy files in their creators' layout, split as in Table 1, and read image by image."""

import dataclasses
import io
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from l2sp_tf.data import decode, load_dataset, table_1_rows
from l2sp_tf.files.errors import InputError
from l2sp_tf.reports import tables

tfds = pytest.importorskip("tensorflow_datasets")

from l2sp_tf.data import builders, fetch, preparation, tfds_sets  # noqa: E402
from l2sp_tf.data.preparation import prepare_tfds  # noqa: E402


def encoded(value=0, kind="JPEG", mode="RGB"):
    """A 4 x 4 image of one grey value."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).convert(mode).save(file, kind)
    return file.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def caltech_counts():
    """Images per class with the known facts of the real set: 30,607 images, 80 in the smallest class, 827 of clutter."""
    rest = 30_607 - 827 - 80
    counts = [80] + [rest // 255 + (i < rest % 255) for i in range(255)] + [827]
    assert sum(counts) == 30_607 and min(counts) == 80
    return counts


def write_caltech(folder, counts):
    """Writes 256_ObjectCategories.tar in reverse order with its stray files; image j of a class has grey value j."""
    images = [encoded(j) for j in range(256)]
    members = [
        (f"256_ObjectCategories/{c:03}.thing-{c}/{c:03}_{j:04}.jpg", images[j % 256])
        for c, count in enumerate(counts, start=1)
        for j in range(1, count + 1)
    ]
    strays = [("256_ObjectCategories/198.thing-198/RENAME2", b"#!"), ("256_ObjectCategories/056.thing-56/greg/a/1.jpg", b"x")]
    write_tar(folder / "256_ObjectCategories.tar", [*reversed(members), *strays])


def write_indoors(folder, train=80, test=20, **special):
    """Writes indoorCVPR_09.tar and the two shuffled lists, with unlisted images too; `special` images have other bytes."""
    rooms = [f"room_{c:02}" for c in range(67)]
    image = encoded()
    names = {room: [f"{room}/photo {i}.jpg" for i in range(train + test + 2)] for room in rooms}
    members = [(f"indoorCVPR_09/Images/{name}", special.get(name, image)) for room in rooms for name in names[room]]
    write_tar(folder / "indoorCVPR_09.tar", members)
    rng = np.random.default_rng(0)
    for file, part in (("TrainImages.txt", slice(0, train)), ("TestImages.txt", slice(train, train + test))):
        lines = rng.permutation([name for room in rooms for name in names[room][part]])
        (folder / file).write_text("\n".join(lines) + "\n")


@pytest.fixture
def few_indoors(monkeypatch):
    """Makes MIT Indoors 67 a set of three training images and a test image of each room; returns these numbers."""
    monkeypatch.setattr(builders.MitIndoors67, "COUNTS", {"train": 3 * 67, "test": 67})
    return {"train": 3, "test": 1}


def write_dogs(folder, train=2, test=1, breeds=120):
    """Writes images.tar, lists.tar and annotation.tar in the layout of Stanford Dogs' creators."""
    from scipy.io import savemat

    names = [f"n{c:08}-Breed_{c}/n{c:08}_{i}" for c in range(breeds) for i in range(train + test)]
    xml = "<annotation><size><width>4</width><height>4</height></size><object><bndbox>{}</bndbox></object></annotation>"
    box = "".join(f"<{side}>{value}</{side}>" for side, value in (("xmin", 0), ("ymin", 0), ("xmax", 4), ("ymax", 4)))
    write_tar(folder / "images.tar", [(f"Images/{name}.jpg", encoded()) for name in names])
    write_tar(folder / "annotation.tar", [(f"Annotation/{name}", xml.format(box).encode()) for name in names])
    lists = []
    for kind, keep in (("train", lambda i: i < train), ("test", lambda i: i >= train)):
        chosen = [f"{name}.jpg" for k, name in enumerate(names) if keep(k % (train + test))]
        file = io.BytesIO()
        savemat(file, {"file_list": np.array(chosen, object)[:, None]})
        lists.append((f"{kind}_list.mat", file.getvalue()))
    write_tar(folder / "lists.tar", lists)


def write_set(data_dir, name, splits, classes, image=None, keys=("image", "label")):
    """Writes a prepared set without its builder; `splits` maps names to lists of (bytes, label)."""
    features = tfds.features.FeaturesDict(
        {keys[0]: image or tfds.features.Image(), keys[1]: tfds.features.ClassLabel(names=[f"class {c}" for c in range(classes)])}
    )
    infos = []
    folder = data_dir / name / "1.0.0"
    folder.mkdir(parents=True)
    for split, examples in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name.partition("/")[0], split=split, filetype_suffix="tfrecord"
        )
        shards = [examples[i::2] for i in range(2)]  # two shards: positions count across them
        for i, shard in enumerate(shards):
            path = str(template.sharded_filepath(shard_index=i, num_shards=2))
            with tf.io.TFRecordWriter(path) as writer:
                for content, label in shard:
                    values = {
                        keys[0]: tf.train.Feature(bytes_list=tf.train.BytesList(value=[content])),
                        keys[1]: tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                    }
                    writer.write(tf.train.Example(features=tf.train.Features(feature=values)).SerializeToString())
        lengths = [len(shard) for shard in shards]
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=0, filename_template=template))
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=infos, supervised_keys=keys, check_data=False
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Caltech 256 and MIT Indoors 67 from their builders, and Stanford Dogs written by hand, each at its real size."""
    folder = tmp_path_factory.mktemp("data")
    manual = folder / "downloads/manual"
    write_caltech(manual / "caltech256", caltech_counts())
    write_indoors(manual / "mit_indoors67")
    for name in ("caltech256", "mit_indoors67"):
        prepare_tfds(name, data_dir=folder, checksums=False)
    dog = encoded()
    test = [label for label in range(120) for _ in range(72 if label < 60 else 71)]
    splits = {"train": [(dog, label) for label in range(120) for _ in range(100)], "test": [(dog, label) for label in test]}
    write_set(folder, "stanford_dogs", splits, 120)
    return folder


@pytest.fixture
def load(data_dir):
    return lambda spec, **options: load_dataset(spec, data_dir=data_dir, cache_dir=data_dir / "cache", **options)


def test_table_1(data_dir):
    expected = {
        "caltech256/30": (257, 30 * 257, 30_607 - 30 * 257, (30, 30), (50, 797)),
        "caltech256/60": (257, 60 * 257, 30_607 - 60 * 257, (60, 60), (20, 767)),
        "stanford_dogs": (120, 12_000, 8_580, (100, 100), (71, 72)),
        "mit_indoors67": (67, 5_360, 1_340, (80, 80), (20, 20)),
    }
    rows = table_1_rows(data_dir=data_dir, cache_dir=data_dir / "cache")
    columns = ("classes", "train", "test", "train_per_class", "test_per_class")
    assert {row["name"]: tuple(row[column] for column in columns) for row in rows} == expected
    table = tables.table_1(rows)
    assert len(table.rows) == 4 and not table.notes
    cells = ("Caltech 256 - 60", "generic object recog.", "257 (257)", "60 (60)", "20-767 (> 20)", "15,420", "15,187")
    assert table.rows[1] == cells


def test_table_1_by_the_authors_lists(data_dir):
    rows = {row["name"]: row for row in table_1_rows(protocol="authors", data_dir=data_dir, cache_dir=data_dir / "cache")}
    assert [rows[name]["train"] for name in rows] == [7_710, 15_420, 12_000, 5_360]
    assert [rows[name]["test"] for name in rows] == [5_140, 5_140, 8_580, 1_340]
    assert rows["caltech256/30"]["test_per_class"] == rows["caltech256/60"]["test_per_class"] == (20, 20)


def test_table_1_names_the_sets_that_are_not_prepared(tmp_path):
    text = tables.table_1(table_1_rows(data_dir=tmp_path, cache_dir=tmp_path / "cache")).markdown()
    assert text.count("- (257)") == 2 and "- (~ 72)" in text
    assert f"MIT Indoors 67: mit_indoors67 is not prepared in {tmp_path}: run python prepare.py" in text


def grey(split):
    """Returns the grey value of each image: in the dummy Caltech 256, the image's number in its class modulo 256."""
    return decode(split, 4).pixels[:, 0, 0, 0]


def test_caltech_256_of_the_paper(load):
    data = load("caltech256", per_class=30, seed=5)
    train, test = set(data.train.names), set(data.test.names)
    assert not train & test and len(train | test) == 30_607
    assert data.classes[0] == "001.thing-1" and data.classes[256] == "257.thing-257"
    assert load("caltech256", per_class=30, seed=5).digest == data.digest
    assert load("caltech256", per_class=30, seed=6).digest != data.digest
    assert train < set(load("tfds:caltech256", per_class=60, seed=5).train.names)
    assert load("caltech256/30").digest == load("caltech256", per_class=30, seed=0).digest
    assert data.name == "caltech256-30"


@pytest.mark.parametrize("name", ["caltech256/30", "mit_indoors67"])
def test_every_prepared_set_takes_the_classes_of_a_network(load, name):
    plain = load(name)
    classes = ("another", *reversed(plain.classes))
    moved = load(name, classes=classes)
    assert moved.classes == classes
    for split in ("train", "test"):
        names = [[one.classes[label] for label in getattr(one, split).labels] for one in (plain, moved)]
        assert names[0] == names[1]
    with pytest.raises(InputError, match="not among the 1 of the network's outputs"):
        load(name, classes=("another",))


def test_caltech_256_of_the_authors(load):
    data = load("caltech256", per_class=30, protocol="authors")
    few = dataclasses.replace(data, train=data.train.take(np.arange(90)), test=data.test.take(np.arange(40)))
    np.testing.assert_allclose(grey(few.train), np.tile(np.arange(1, 31), 3), atol=1)
    np.testing.assert_allclose(grey(few.test), np.tile(np.arange(61, 81), 2), atol=1)
    seeded = load("caltech256", per_class=30, seed=1, protocol="authors")
    assert set(seeded.train.names) < set(load("caltech256/60", protocol="authors").train.names)
    assert seeded.test.names == data.test.names and seeded.train.names != data.train.names


def test_indoors_follow_the_lists(data_dir, load):
    data = load("mit_indoors67")
    assert data.classes[:2] == ("room_00", "room_01")
    np.testing.assert_array_equal(data.test.labels, np.repeat(np.arange(67), 20))
    assert len(load("mit_indoors67", per_class=10, seed=0).train) == 670
    with pytest.raises(InputError, match="class 'room_00' of mit_indoors67 has 80"):
        load("mit_indoors67", per_class=81)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("caltech256", {}, "names no split: give caltech256/30"),
        ("caltech256/many", {}, "names no split"),
        ("caltech256/30", {"per_class": 60}, "names no split"),
        ("caltech256", {"per_class": 61, "protocol": "authors"}, "per_class is 61: the authors' lists have at most 60"),
        ("caltech256", {"per_class": 80}, "leaves no test image of 001.thing-1"),
        ("caltech256", {"per_class": 81}, "class '001.thing-1' of caltech256-81 has 80"),
        ("caltech256", {"per_class": 0}, "at least 1"),
        ("caltech256", {"per_class": 30, "protocol": "mine"}, "protocol is 'mine'"),
    ],
)
def test_splits_that_do_not_exist_are_refused(load, spec, options, message):
    with pytest.raises(InputError, match=message):
        load(spec, **options)


def test_records_are_read_one_by_one_in_any_order(tmp_path):
    kinds = [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "L"), ("JPEG", "L")]
    examples = [(encoded(10 * i, *kinds[i % 4]), i % 3) for i in range(20)]
    write_set(tmp_path, "mnist", {"train": examples, "test": examples[:6]}, 3)
    data = load_dataset("mnist", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    order = [*range(0, 20, 2), *range(1, 20, 2)]  # one shard after the other
    assert [data.train.read(i) for i in range(20)] == [examples[i][0] for i in order]
    np.testing.assert_array_equal(data.train.labels, [examples[i][1] for i in order])
    some = data.train.take(np.array([7, 0, 19]))
    images = decode(some, 4)
    np.testing.assert_allclose(images.pixels[:, 0, 0, 0], [10 * order[i] for i in (7, 0, 19)], atol=1)
    np.testing.assert_array_equal(images.labels, [examples[order[i]][1] for i in (7, 0, 19)])
    assert some.names[1] == "mnist train image 0"


def test_the_digest_follows_images_and_labels(tmp_path):
    def digest(number, examples):
        write_set(tmp_path / str(number), "mnist", {"train": examples, "test": examples}, 2)
        return load_dataset("mnist", data_dir=tmp_path / str(number), cache_dir=tmp_path / "cache").digest

    examples = [(encoded(i), i % 2) for i in range(6)]
    changed = [*examples[:5], (encoded(99), 1)]
    moved = [*examples[:5], (examples[5][0], 0)]
    digests = [digest(i, e) for i, e in enumerate((examples, examples, changed, moved))]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_a_bad_image_is_named(tmp_path):
    write_set(tmp_path, "mnist", {"train": [(encoded(), 0), (b"no image", 0)], "test": [(encoded(), 0)]}, 2)
    data = load_dataset("mnist", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match=r"mnist train image 1 \(neither a JPEG nor a PNG\)"):
        decode(data.train, 4)
    assert decode(data.train, 4, skip_bad_images=True).skipped == ("mnist train image 1",)


def test_the_index_is_made_once_and_again_for_other_shards(tmp_path, monkeypatch):
    examples = [(encoded(i), 0) for i in range(4)]
    write_set(tmp_path, "mnist", {"train": examples, "test": examples}, 2)
    options = {"data_dir": tmp_path, "cache_dir": tmp_path / "cache"}
    first = load_dataset("mnist", **options)
    with monkeypatch.context() as patch:
        patch.setattr(tfds_sets, "_index_of_shard", None)
        assert load_dataset("mnist", **options).digest == first.digest
    shard = pathlib.Path(first.train.records.shards[0])
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(InputError, match="tfrecord-00000-of-00002 is damaged: remove that folder, and run prepare.py again"):
        load_dataset("mnist", **options)
    shard.unlink()
    with pytest.raises(InputError, match="tfrecord-00000-of-00002 is missing"):
        load_dataset("mnist", **options)


def test_the_validation_images_serve_where_test_has_no_labels(tmp_path):
    splits = {"train": [(encoded(), 0)] * 2, "validation": [(encoded(), 0)] * 3, "test": [(encoded(), -1)] * 4}
    for name in ("places365_small", "mnist"):
        write_set(tmp_path, name, splits, 2)
    options = {"data_dir": tmp_path, "cache_dir": tmp_path / "cache"}
    assert len(load_dataset("places365_small", **options).test) == 3
    with pytest.raises(InputError, match="The test images of mnist have no labels"):
        load_dataset("mnist", **options)


def test_a_set_with_a_configuration(tmp_path):
    for size in (8, 16):
        examples = [(encoded(size), 0)]
        write_set(tmp_path, f"imagenet_resized/{size}x{size}", {"train": examples, "validation": examples}, 2)
    options = {"data_dir": tmp_path, "cache_dir": tmp_path / "cache"}
    for size in (8, 16):
        assert grey(load_dataset(f"tfds:imagenet_resized/{size}x{size}", **options).train).tolist() == [size]


def test_sets_that_are_not_classification_tasks_are_refused(tmp_path):
    options = {"data_dir": tmp_path, "cache_dir": tmp_path / "cache"}
    write_set(tmp_path, "mnist", {"train": [(encoded(), 0)] * 2}, 2)
    with pytest.raises(InputError, match=r"mnist has only the splits train, but train and test \(or validation\) are needed"):
        load_dataset("mnist", **options)
    text = tfds.features.Text()
    write_set(tmp_path, "ag_news_subset", {"train": [(b"x", 0)], "test": [(b"x", 0)]}, 1, image=text, keys=("text", "label"))
    with pytest.raises(InputError, match=r"ag_news_subset has no image with a class as its label \(its features: label, text\)"):
        load_dataset("ag_news_subset", **options)


def test_keys_that_the_features_lack_are_refused(tmp_path):
    write_set(tmp_path, "mnist", {"train": [(encoded(), 0)], "test": [(encoded(), 0)]}, 2)
    (path,) = tmp_path.glob("mnist/*/dataset_info.json")
    path.write_text(path.read_text().replace('"input": "image"', '"input": "picture"').replace('"image"', '"picture"'))
    with pytest.raises(InputError, match=r"mnist has no image with a class as its label \(its features: image, label\)"):
        load_dataset("mnist", data_dir=tmp_path)


def test_an_unknown_or_unprepared_set_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="no data set 'stanford_cats': give digits/source.*caltech256"):
        load_dataset("stanford_cats", data_dir=tmp_path)
    unfinished = tmp_path / "caltech256" / "incomplete.AB12CD_1.0.0"
    unfinished.mkdir(parents=True)
    for name in ("caltech256/30", "stanford_dogs", "imagenet2012"):
        folder = name.partition("/")[0]
        with pytest.raises(InputError, match=f"{folder} is not prepared in .*: run python prepare.py .* {folder} first"):
            load_dataset(name, data_dir=tmp_path)


# Preparing


def no_network(monkeypatch):
    def refuse(request):
        raise ConnectionRefusedError("no network")

    monkeypatch.setattr(fetch, "_open", refuse)


def everything_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_stanford_dogs_by_the_builder_of_tfds(tmp_path, monkeypatch):
    write_dogs(tmp_path / "manual")
    monkeypatch.setattr(tfds.download.DownloadManager, "_register_or_validate_checksums", lambda *_, **__: None)
    prepare_tfds("stanford_dogs", data_dir=tmp_path, manual_dir=tmp_path / "manual", checksums=False)
    data = load_dataset("stanford_dogs", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    row = data.characteristics()
    assert (row["classes"], row["train"], row["test"]) == (120, 240, 120)
    assert row["train_per_class"] == (2, 2) and row["test_per_class"] == (1, 1)
    assert data.classes[0] == "n00000000-breed_0"


def test_odd_formats_become_png(tmp_path, few_indoors):
    special = {"room_00/photo 0.jpg": encoded(200, "GIF", "L"), "room_00/photo 1.jpg": encoded(100, "BMP")}
    write_indoors(tmp_path / "manual", **few_indoors, **special)
    prepare_tfds("mit_indoors67", data_dir=tmp_path, manual_dir=tmp_path / "manual", checksums=False)
    train = load_dataset("mit_indoors67", data_dir=tmp_path, cache_dir=tmp_path / "cache").train
    assert grey(train.take(np.arange(3))).tolist() == [200, 100, 0]
    assert builders.as_jpeg_or_png(b"no image") == b"no image"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: (m / "TrainImages.txt").write_text("room_00/photo 0.jpg\n"), "TrainImages.txt names 1 images instead of 5360"),
        (lambda m: write_tar(m / "indoorCVPR_09.tar", []), "lacks 6700 images that the lists name, such as room_00/photo 0"),
        (lambda m: (m / "indoorCVPR_09.tar").write_bytes(b"x" * 5000), "indoorCVPR_09.tar is damaged or not a tar file"),
    ],
)
def test_wrong_files_leave_nothing(tmp_path, spoil, message):
    write_indoors(tmp_path / "manual")
    spoil(tmp_path / "manual")
    with pytest.raises(InputError, match=message) as error:
        prepare_tfds("mit_indoors67", data_dir=tmp_path, manual_dir=tmp_path / "manual", checksums=False)
    assert "\n" not in str(error.value)
    assert {name.partition("/")[0] for name in everything_below(tmp_path)} == {"manual"}


def test_a_wrong_number_of_classes(tmp_path):
    write_caltech(tmp_path / "manual", [2] * 9)
    with pytest.raises(InputError, match="has 9 classes, but caltech256 has 257"):
        prepare_tfds("caltech256", data_dir=tmp_path, manual_dir=tmp_path / "manual", checksums=False)


def test_a_wrong_checksum_of_a_manual_file(tmp_path):
    write_caltech(tmp_path / "manual", [2] * 9)
    with pytest.raises(InputError, match="its md5 is .* and should be 67b4f42ca05d46448c6bb8ecd2220f6d"):
        prepare_tfds("caltech256", data_dir=tmp_path, manual_dir=tmp_path / "manual")


@pytest.mark.parametrize("name", ["caltech256", "mit_indoors67", "stanford_dogs", "places365_small", "mnist"])
def test_without_a_network_one_sentence_and_no_leftovers(tmp_path, monkeypatch, name):
    no_network(monkeypatch)
    with pytest.raises(InputError, match=r"cannot be downloaded \(no network\): ") as error:
        prepare_tfds(name, data_dir=tmp_path)
    assert "\n" not in str(error.value) and everything_below(tmp_path) == []


def test_missing_manual_files_are_named(tmp_path):
    manual = tmp_path / "manual"
    manual.mkdir()
    (manual / "ILSVRC2012_img_train.tar").write_bytes(b"")
    with pytest.raises(InputError, match="download imagenet2012 by hand: put ILSVRC2012_img_val.tar into .*manual"):
        prepare_tfds("imagenet2012", data_dir=tmp_path, manual_dir=manual)


def test_an_unknown_set_cannot_be_prepared(tmp_path):
    with pytest.raises(InputError, match="no data set 'stanford_cats' to prepare: give the name of one of stanford_dogs"):
        prepare_tfds("stanford_cats", data_dir=tmp_path)


def test_leftovers_of_a_killed_preparation_are_removed_and_a_prepared_set_stays(tmp_path, monkeypatch, few_indoors):
    manual = tmp_path / "manual"
    write_indoors(manual, **few_indoors)
    litter = [tmp_path / "mit_indoors67/incomplete.AB12CD_1.0.0", tmp_path / "downloads/mit_indoors67/x.tmp.0a"]
    for folder in litter:
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"x")
    path = prepare_tfds("mit_indoors67", data_dir=tmp_path, manual_dir=manual, checksums=False)
    assert path.is_dir() and not any(folder.exists() for folder in litter)
    monkeypatch.setattr(preparation, "_prepare", None)
    assert prepare_tfds("mit_indoors67", data_dir=tmp_path) == path


def test_only_one_process_at_a_time_prepares_a_set(tmp_path):
    with preparation._alone(tmp_path, "caltech256"):
        with pytest.raises(InputError, match="caltech256 is being prepared in .* by another process: wait for it"):
            prepare_tfds("caltech256", data_dir=tmp_path)
        with preparation._alone(tmp_path, "mnist"):
            pass
    assert everything_below(tmp_path) == []
