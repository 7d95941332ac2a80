"""Untrusted files: a load verifies or ends in one sentence. It runs no code, leaves its folder alone and takes little memory."""

import io
import json
import os
import pathlib
import pickle
import resource
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import h5py
import hostile
import keras
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

import l2sp_tf as l2sp
from l2sp_tf.data import Split, builders, decode, load_dataset
from l2sp_tf.files import reading
from l2sp_tf.files.errors import InputError
from l2sp_tf.fisher.diagonal import Fisher
from l2sp_tf.models import convert, keras_files, zoo
from l2sp_tf.models.pixels import PixelFormat
from l2sp_tf.models.torch_files import read_state_dict

GIGABYTE = 2**30


@pytest.fixture(autouse=True)
def _bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < GIGABYTE


def fuzz(tmp_path, names, counts, seed, seconds):
    """Attacks in a separate process, so that a crash or a lack of memory ends that process alone."""
    folder = pathlib.Path(hostile.__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder.parent, folder, folder / "data")))}
    arguments = [";".join(names), ";".join(map(str, counts)), str(seed), str(tmp_path / "last")]
    ended = subprocess.run(
        [sys.executable, hostile.__file__, *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (24 * GIGABYTE, 24 * GIGABYTE)),
    )
    assert ended.returncode == 0, f"ended by {ended.returncode} at {(tmp_path / 'last').read_text()}: {ended.stderr[-2000:]}"
    found = json.loads(ended.stdout.splitlines()[-1])
    print(found)
    for name, count in zip(names, counts, strict=True):
        assert not found[name]["wrong"], (name, found[name]["wrong"])
        assert found[name]["read"] + found[name]["refused"] == count


def test_damaged_and_forged_files_are_read_rightly_or_refused(tmp_path):
    fuzz(tmp_path, list(hostile.FORMATS), [count for *_, count in hostile.FORMATS.values()], 0, 600)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(hostile.FORMATS))
def test_thousands_of_damaged_and_forged_files(name, tmp_path):
    fuzz(tmp_path, [name], [2000], 1, 3600)


# JSON


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": NaN}', "NaN is not allowed"),
        (b'{"a": -Infinity}', "-Infinity is not allowed"),
        (b'{"a": 1e999}', "Infinity is not allowed"),
        (b"1" * 400, "400 digits"),
        (b"1" * 5000, "5000 digits"),
        (b'{"a": 1, "a": 2}', "a name occurs twice"),
        (b"[" * 101 + b"]" * 101, "nested more than 100"),
        (b"[" * 10**6, "recursion"),
        (b'{"a": "\xff"}', "utf-8"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b'{"a": "\0"}', "control character"),
        (b"", "Expecting value"),
        (b'"' + b"a" * reading.MAX_JSON_BYTES + b'"', "more than the"),
    ],
)
def test_json_is_read_strictly(text, reason):
    with pytest.raises(InputError, match=f"x is damaged .*{reason}"):
        reading.parse_json(text, "x is damaged")


def test_plain_json_is_read():
    assert reading.parse_json('{"a": [1, -2.5e3, null, "\\u0000"]}', "x") == {"a": [1, -2500.0, None, "\0"]}
    assert reading.parse_json("[NaN]", "x", finite=False) == [pytest.approx(float("nan"), nan_ok=True)]


def test_a_disk_error_is_not_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError), reading.refusing("x"):
        (tmp_path / "none").read_bytes()
    with pytest.raises(InputError, match=r"^x \(MemoryError\): use another copy\.$"), reading.refusing("x"):
        raise MemoryError


# Safetensors


def safetensors_file(path, header, content=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**8) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        b"\x80\x02cposix\nsystem\n.",
    ],
)
def test_invalid_headers(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    for read in (l2sp.Anchors.load, Fisher.load, keras_files.stored_pixels, read_state_dict):
        stored = (keras_files.stored_pixels, read_state_dict)
        if content[8:] != b"{}" or len(content) == 10 and content[0] != 2 or read not in stored:
            with pytest.raises(InputError):
                read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]},  # 2^66 bytes are 0 in 64 bits
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]},
        {"dtype": "O", "shape": [1], "data_offsets": [0, 8]},
    ],
)
def test_shapes_beyond_the_file(tmp_path, tensor):
    path = safetensors_file(tmp_path / "a.safetensors", {"a": tensor}, b"\0" * 8)
    for read in (l2sp.Anchors.load, keras_files.stored_pixels, read_state_dict):
        with pytest.raises(InputError, match="damaged"):
            read(path)


def signed(path, arrays, entries=None, **metadata):
    """Writes a file with a right sha256, whatever its manifest and header say."""
    from l2sp_tf.files.arrays import _sha256_of, manifest_of

    header = {**metadata, "manifest": json.dumps(manifest_of(arrays) if entries is None else entries)}
    header["sha256"] = _sha256_of(header)
    path.write_bytes(safetensors.numpy.save(arrays, header))
    return path


@pytest.mark.parametrize("dtype", ["O", "i4,i4", "datetime64[s]", "S8", "V8", "__name__", "finfo", "no such", 7, None, ["f4"]])
def test_manifests_name_numbers_only(tmp_path, dtype):
    array = np.zeros(3, "int64")
    entry = {"name": "a", "shape": [3], "dtype": dtype, "sha256": l2sp.Anchors({"a": array}).manifest[0]["sha256"]}
    for kind in (entry, {**entry, "dtype": "int64", "more": 1}):
        with pytest.raises(InputError, match="damaged"):
            l2sp.Anchors.load(signed(tmp_path / "a.safetensors", {"a": array}, [kind], format="l2sp_tf.anchors.v1"))


def test_an_invalid_pixel_format(tmp_path):
    arrays = {"a": np.zeros(3, "float32")}
    digest = l2sp.Anchors(arrays).digest
    for text in (
        '{"mean": [1e999, 0, 0]}',
        '{"mean": [' + "9" * 99 + "," + "9" * 400 + ", 0]}",
        '{"scale": {}}',
        "[]",
        '{"x": 1}',
    ):
        path = signed(tmp_path / "a.safetensors", arrays, format="l2sp_tf.anchors.v1", digest=digest, pixels=text)
        with pytest.raises(InputError, match=r"The pixel format in .*a\.safetensors is damaged"):
            keras_files.stored_pixels(path)
    with pytest.raises(InputError, match="three finite numbers"):
        PixelFormat(mean=(10**400, 0, 0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("statistics", {"a": [float("nan"), 8, 1, 1]}),
        ("statistics", {"a": [2, float("inf"), 1, 1]}),
        ("statistics", {"a": [2, 8, 1]}),
        ("statistics", {"a": ["2", 8, 1, 1]}),
        ("statistics", [1]),
        ("provenance", {"images": float("nan")}),
        ("provenance", {"images": 0}),
        ("provenance", {"mode": ["mc"]}),
        ("provenance", {"transforms": None}),
        ("provenance", {"weights": None}),
        ("provenance", {"weights": ["0" * 64]}),
        ("provenance", {"weights": {"a/kernel": 1}}),
        ("provenance", {"weights": {"a/kernel": None}}),
        ("provenance", None),
    ],
)
def test_a_fisher_diagonal_has_counts_that_are_numbers(tmp_path, field, value):
    good = hostile.make_fisher(tmp_path)
    fisher = Fisher.load(good)
    provenance, statistics = fisher.provenance, fisher._statistics
    if field == "statistics":
        statistics = value
    else:
        provenance = value and {**provenance, **value}
    header = {"provenance": json.dumps(provenance), "statistics": json.dumps(statistics), "format": "l2sp_tf.fisher.v1"}
    path = signed(tmp_path / "b.safetensors", dict(fisher), digest=fisher.digest, **header)
    with pytest.raises(InputError, match="The Fisher diagonal in .* is damaged"):
        Fisher.load(path)


def test_a_file_cannot_ask_for_a_huge_head(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"predictions/bias": np.zeros((10**6, 0), "float32")}, path)
    with h5py.File(tmp_path / "x.h5", "w"):
        pass
    classes = keras_files.head_classes(path)
    with pytest.raises(InputError, match="resnet50_slim with 1000000 classes has more numbers than a file of its size can hold"):
        zoo.backbone("resnet50_slim", classes, image_size=32, weights=path)
    arrays = {"fc.bias": np.zeros(10**6, "float32")}
    with pytest.raises(InputError, match="head of 1000000 classes, and with it more numbers"):
        convert._match(arrays, "resnet50_torch", convert._torch_names, None, path)


# Keras models and HDF5


def keras_file(path, change=lambda name, content: content, extra=None):
    """Writes the model of `hostile` with changed members."""
    keras_files.save_model(hostile.model(), path, hostile.PIXELS["rgb"])
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**members, **(extra or {})}.items():
            changed = change(name, content)
            if changed is not None:
                archive.writestr(name, changed)
    return path


def config_of(old, new):
    def change(name, content):
        if name != "config.json":
            return content
        assert old in content.decode()
        return content.decode().replace(old, new).encode()

    return change


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"class_name": "Conv2D"', '"class_name": "Lambda"'),
        ('"module": "keras.layers", "class_name": "Conv2D"', '"module": "stranger", "class_name": "Layer"'),
        (
            '"module": "keras.layers", "class_name": "Conv2D"',
            '"module": "keras.src.utils.torch_utils", "class_name": "TorchModuleWrapper"',
        ),
        ('"class_name": "Conv2D"', '"class_name": "TFSMLayer"'),
        (
            '"activation": "linear"',
            '"activation": {"module": "keras.utils", "class_name": "function", "config": "get_file", "registered_name": "x"}',
        ),
        (
            '"activation": "linear"',
            '"activation": {"class_name": "__lambda__", "config": {"value": ["4wEAAAA=", null, null]}}',
        ),
        ('"filters": 3', '"filters": 1000000000000'),
        ('"filters": 3', '"filters": 9' + "9" * 200),
        ('"filters": 3', '"filters": NaN'),
        ('"units": 2', '"units": -2'),
        ('"units": 2', '"units": 2, "units": 2'),
        ('"units": 2', '"units": ' + "[" * 10**5),
    ],
)
def test_an_untrusted_model_runs_no_code_and_takes_little_memory(tmp_path, monkeypatch, old, new):
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    path = keras_file(tmp_path / "m.keras", config_of(old, new))
    with pytest.raises(InputError, match="cannot be loaded|m.keras has"):
        keras_files.load_model(path)
    assert "stranger" not in sys.modules and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "extra",
    [
        {"../x": b""},
        {"/x": b""},
        {"assets\\..\\x": b""},
        {"model.weights.h5": None},
        {"config.json": None},
        {"config.json": b"\xff"},
    ],
)
def test_members_of_a_model(tmp_path, extra):
    path = keras_file(tmp_path / "m.keras", lambda name, content: extra.get(name, content), extra)
    with pytest.raises(InputError, match="m.keras"):
        keras_files.load_model(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.keras"]


def test_other_endings_are_refused(tmp_path):
    (tmp_path / "m.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(InputError, match="give the path of a .keras file"):
        keras_files.load_model(tmp_path / "m.h5")


def with_link(file, secret):
    del file["layers/conv2d/vars/0"]
    file["layers/conv2d/vars/0"] = h5py.ExternalLink(str(secret), "/secret")


def with_soft_link(file, secret):
    del file["layers/conv2d/vars/1"]
    file["layers/conv2d/vars/1"] = h5py.SoftLink("/layers/batch_normalization/vars/0")


def with_virtual(file, secret):
    del file["layers/conv2d/vars/0"]
    layout = h5py.VirtualLayout((3, 3, 3, 3), "float32")
    layout[...] = h5py.VirtualSource(str(secret), "secret", (3, 3, 3, 3))
    file.create_virtual_dataset("layers/conv2d/vars/0", layout)


def with_external(file, secret):
    del file["layers/conv2d/vars/0"]
    file.create_dataset("layers/conv2d/vars/0", (3, 3, 3, 3), "float32", external=[(str(secret), 0, 324)])


def with_shape(file, secret):
    del file["layers/conv2d/vars/1"]
    file.create_dataset("layers/conv2d/vars/1", (2**40,), "float32", chunks=(1024,), fillvalue=1)


def with_chunks(file, secret):
    del file["layers/conv2d/vars/1"]
    file.create_dataset("layers/conv2d/vars/1", (3,), "float32", chunks=(2**28,), maxshape=(None,), compression="gzip")


def with_texts(file, secret):
    del file["layers/conv2d/vars/1"]
    file["layers/conv2d/vars/1"] = ["a", "b", "c"]


@pytest.mark.parametrize(
    "change",
    [with_link, with_soft_link, with_virtual, with_external, with_shape, with_chunks, with_texts],
    ids=lambda f: f.__name__,
)
def test_arrays_in_other_files_and_invalid_arrays(tmp_path, change):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["secret"] = np.ones((3, 3, 3, 3), "float32")
    path = hostile.make_h5(tmp_path)
    with h5py.File(path, "a") as file:
        change(file, tmp_path / "secret.h5")
    before = l2sp.Anchors.of(hostile.model()).digest
    with pytest.raises(InputError, match="is damaged .*(link|lies in another file|unpack to more)"):
        keras_files.load_weights(hostile.model(), path)
    assert l2sp.Anchors.of(hostile.model()).digest == before
    content = path.read_bytes()
    path = keras_file(tmp_path / "m.keras", lambda name, old: content if name == "model.weights.h5" else old)
    with pytest.raises(InputError, match="cannot be loaded .*(link|lies in another file|unpack to more)"):
        keras_files.load_model(path)


def test_bfloat16_weights_are_read(tmp_path):
    keras.config.set_dtype_policy("bfloat16")
    try:
        made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    finally:
        keras.config.set_dtype_policy("float32")
    made.save_weights(tmp_path / "b.weights.h5")
    before = l2sp.Anchors.of(made).digest
    made.set_weights([np.zeros((4, 3)), np.zeros(3)])
    keras_files.load_weights(made, tmp_path / "b.weights.h5")
    assert l2sp.Anchors.of(made).digest == before


# PyTorch files and checkpoints


def nested(levels):
    """Returns a pickle of pairs that hold one tuple twice, and so on: 2^levels items."""
    pairs = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(levels))
    return b"K\x01q\x00" + pairs


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b".",  # a bytearray of 64 GiB
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
        b"\x80\x02}" + nested(60) + b"K\x01s.",
        b"\x80\x02}(" + nested(60) + b"K\x01u.",
        b"\x80\x02(" + nested(60) + b"K\x01d.",
        b"\x80\x04\x8f(" + nested(60) + b"\x90.",
        b"\x80\x02ccollections\nOrderedDict\n]](" + nested(60) + b"K\x01ea\x85R.",
        b"\x80\x02(X\x07\x00\x00\x00storage" + nested(60) + b"K\x01K\x01K\x01tQ.",
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + nested(60) + b"X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",  # its hash would overflow the stack
        b"\x80\x02ccollections\nOrderedDict\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b.",
    ],
)
def test_pickles_that_would_never_end(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    with pytest.raises(InputError, match="damaged or not a state dict"):
        read_state_dict(tmp_path / "a.pth")


def test_keys_of_an_old_file_that_would_never_end(tmp_path):
    parts = [pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {})]
    (tmp_path / "a.pth").write_bytes(b"".join(parts) + b"\x80\x02](" + nested(60) + b"e.")
    with pytest.raises(InputError, match="it uses a tuple as a name"):
        read_state_dict(tmp_path / "a.pth")


def test_a_checkpoint_of_whole_numbers_is_refused(tmp_path):
    tf.raw_ops.SaveV2(prefix=str(tmp_path / "a.ckpt"), tensor_names=["a/b"], shape_and_slices=[""], tensors=[tf.range(5)])
    with pytest.raises(InputError, match="not real numbers"):
        convert.convert_tf_slim(tmp_path / "a.ckpt", "resnet50_slim")


# Images, zips and folders of them


def png(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    good = hostile.picture("PNG")
    return good[:12] + header + struct.pack(">I", zlib.crc32(header)) + good[33:]


def long_png(length):
    """Returns a valid PNG with one line of grey pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", length, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(length + 1))), chunk(b"IEND", b"")]
    )


def huge_jpeg(width, height):
    good = hostile.picture("JPEG")
    place = good.index(b"\xff\xc0") + 5
    return good[:place] + struct.pack(">HH", height, width) + good[place + 4 :]


def huge(kind):
    """An image whose header declares 60,000 x 60,000 pixels, or as many as a WebP can."""
    content = bytearray(hostile.picture(kind))
    if kind == "GIF":
        content[6:10] = struct.pack("<HH", 60_000, 60_000)
    elif kind == "BMP":
        content[18:26] = struct.pack("<ii", 60_000, 60_000)
    else:  # VP8L: 14 bits for each side less one
        assert content[12:16] == b"VP8L"
        content[21:25] = struct.pack("<I", 2**28 - 1)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (png(60_000, 60_000), "squash", "too large: 3,600,000,000 pixels, more than the 178,956,970 allowed"),
        (png(2**31 - 1, 2**31 - 1), "squash", "too large: 4,611,686,014,132,420,609 pixels, .*"),
        (png(2**31, 2), "squash", "too large: 4,294,967,296 pixels, .*"),
        (png(0, 2), "shorter_side", "truncated or damaged"),
        (huge_jpeg(60_000, 60_000), "squash", "too large: 3,600,000,000 pixels, .*"),
        (huge_jpeg(65_500, 65_500), "shorter_side", "too large: 4,290,250,000 pixels, .*"),
        (huge("GIF"), "squash", "too large: 3,600,000,000 pixels, .*"),
        (huge("BMP"), "squash", "too large: 3,600,000,000 pixels, .*"),
        (huge("WebP"), "squash", "too large: .*"),
        # 1 x 10^6 pixels would become 256 x 256,000,000
        (long_png(10**6), "shorter_side", "too large: 65,536,000,000 pixels once the shorter side is 256, more than .*"),
    ],
)
def test_images_of_absurd_size(tmp_path, content, mode, reason):
    path = tmp_path / "i.png"
    path.write_bytes(content)
    split = Split(("the image",), np.zeros(1, np.int32), files=(path,))
    with pytest.raises(InputError, match=rf"the image \({reason}\)\. "):
        decode(split, 256, mode=mode)


def test_a_line_of_pixels_is_squashed(tmp_path):
    (tmp_path / "i.png").write_bytes(long_png(10**6))
    split = Split(("line",), np.zeros(1, np.int32), files=(tmp_path / "i.png",))
    assert decode(split, 8).pixels.shape == (1, 8, 8, 3)


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    with (tmp_path / "i.png").open("wb") as file:
        file.write(hostile.picture("PNG"))
        file.truncate(2**40)  # sparse: the disk stores none of it
    split = Split(("sparse",), np.zeros(1, np.int32), files=(tmp_path / "i.png",))
    with pytest.raises(InputError, match=r"sparse \(too large: 1,099,511,627,776 bytes, more than the 268,435,456 allowed\)"):
        decode(split, 8)


def image_folder(root):
    for number, place in enumerate(("train/a", "train/b", "test/a", "test/b")):
        (root / place).mkdir(parents=True)
        (root / place / "1.png").write_bytes(hostile.picture("PNG", number))
    return root


def test_pipes_and_devices_are_not_images(tmp_path):
    folder = image_folder(tmp_path)
    os.mkfifo(folder / "train/a/2.png")
    with pytest.raises(InputError, match="train/a/2.png/ is not an image"):
        load_dataset(folder)
    (folder / "train/a/2.png").unlink()
    (folder / "train/a/2.png").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="train/a/2.png/ is not an image"):
        load_dataset(folder)


def images_zip(path, method=zipfile.ZIP_DEFLATED, **more):
    with zipfile.ZipFile(path, "w", method) as archive:
        for number, name in enumerate(("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png")):
            archive.writestr(name, hostile.picture("PNG", number))
        for name, content in more.items():
            archive.writestr(name, content)
    return path


def with_size(path, size):
    """Changes the unpacked size of the first member in both of its headers."""
    content = bytearray(path.read_bytes())
    content[22:26] = size.to_bytes(4, "little")
    place = content.index(b"PK\x01\x02")
    content[place + 24 : place + 28] = size.to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(("size", "message"), [(2**32 - 2, "would unpack to"), (10, "damaged"), (0, "damaged")])
def test_a_zip_that_lies_about_sizes(tmp_path, size, message):
    path = images_zip(tmp_path / "x.zip")
    with_size(path, size)
    with pytest.raises(InputError, match=f"x.zip.*{message}"):
        load_dataset(path, cache_dir=tmp_path / "cache")
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p != path]


def test_a_zip_that_unpacks_to_far_more_than_it_has(tmp_path):
    path = images_zip(tmp_path / "x.zip", **{f"train/a/{i}0.png": bytes(2**26) for i in range(6)})
    assert path.stat().st_size < 10**6
    with pytest.raises(InputError, match="would unpack to"):
        load_dataset(path, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "name", ["train/a\\1.png", "x" * 300, "train/" + "é" * 150 + "/1.png", "train/../../x.png", "\\\\host\\x.png"]
)
def test_invalid_names_in_a_zip(tmp_path, name):
    path = images_zip(tmp_path / "x.zip", **{name: b""})
    with pytest.raises(InputError, match="x.zip holds"):
        load_dataset(path, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_name_ends_at_a_nul(tmp_path):
    path = images_zip(tmp_path / "x.zip", **{"train/a/9.pngX../../../evil": hostile.picture("PNG")})
    path.write_bytes(path.read_bytes().replace(b"9.pngX../", b"9.png\0../"))
    assert "train/a/9.png" in str(load_dataset(path, cache_dir=tmp_path / "cache").train.names)
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_rare_methods_and_encryption(tmp_path, method):
    with pytest.raises(InputError, match="with the method deflate"):
        load_dataset(images_zip(tmp_path / "x.zip", method), cache_dir=tmp_path / "cache")
    path = images_zip(tmp_path / "y.zip")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="without encryption"):
        load_dataset(path, cache_dir=tmp_path / "cache")


def test_links_and_duplicate_names(tmp_path):
    path = images_zip(tmp_path / "x.zip")
    link = zipfile.ZipInfo("train/a/2.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="a link or a device"):
        load_dataset(path, cache_dir=tmp_path / "cache")
    path = images_zip(tmp_path / "y.zip")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("train/a/1.png", b"another")
    with pytest.raises(InputError, match="occurs twice"):
        load_dataset(path, cache_dir=tmp_path / "cache")


# Prepared sets and tars


def prepared(tmp_path):
    hostile.make_shard("*", tmp_path)
    return tmp_path / "mnist/1.0.0"


def load_prepared(tmp_path):
    return load_dataset("mnist", data_dir=tmp_path, cache_dir=tmp_path / "cache")


def test_a_shard_cut_short_between_two_records(tmp_path):
    shard = next(prepared(tmp_path).glob("*train.tfrecord-00000*"))
    content = shard.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    shard.write_bytes(content[: length + 16])
    with pytest.raises(InputError, match="train has 3 images, not 4: remove that folder"):
        load_prepared(tmp_path)


@pytest.mark.parametrize("length", [2**31, 2**40, 2**63, 2**64 - 1])
def test_a_record_that_claims_to_be_huge(tmp_path, length):
    shard = next(prepared(tmp_path).glob("*train.tfrecord-00000*"))
    header = struct.pack("<Q", length)
    with tf.io.TFRecordWriter(str(tmp_path / "x")) as writer:  # the checksum of such a length, as TensorFlow makes it
        writer.write(b"")
    shard.write_bytes(header + masked_crc(header) + shard.read_bytes()[12:])
    assert (tmp_path / "x").read_bytes()[8:12] == masked_crc(bytes(8))
    with pytest.raises(InputError, match="is damaged: remove that folder"):
        load_prepared(tmp_path)


def masked_crc(content):
    """Returns the checksum of TFRecords: CRC-32C bit by bit, rotated and shifted."""
    crc = 2**32 - 1
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 2**32 - 1
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def test_a_label_beyond_the_classes(tmp_path):
    from test_tfds import write_set

    write_set(tmp_path, "mnist", {split: [(hostile.picture("PNG"), 7)] * 4 for split in ("train", "test")}, 2)
    with pytest.raises(InputError, match="a label is 7, beyond its classes"):
        load_prepared(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("features.json", "tensorflow_datasets.core.features.image_feature.Image", "stranger.Image"),
        ("features.json", '"numClasses": "2"', '"numClasses": "1000000000000"'),
        ("dataset_info.json", "{DATASET}-{SPLIT}", "../{DATASET}-{SPLIT}"),
        ("dataset_info.json", "{DATASET}-{SPLIT}", "/etc/{DATASET}-{SPLIT}"),
        ("dataset_info.json", '"name"', '"name": "a", "name"'),
        ("dataset_info.json", "{", "[" * 10**5),
    ],
)
def test_damaged_descriptions_of_a_prepared_set(tmp_path, monkeypatch, file, old, new):
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    path = prepared(tmp_path) / file
    text = path.read_text()
    assert old in text
    path.write_bytes(text.replace(old, new).encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="mnist.* is damaged"):
        load_prepared(tmp_path)
    assert "stranger" not in sys.modules and not (tmp_path / "ran").exists()


def test_a_damaged_index_is_reported(tmp_path):
    prepared(tmp_path)
    load_prepared(tmp_path)
    index = next((tmp_path / "cache").glob("index-mnist-train-*"))
    index.write_bytes(index.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"index-mnist-train-\w+\.npz is damaged .*: remove it"):
        load_prepared(tmp_path)


def test_a_tar_with_a_sparse_member_and_links(tmp_path):
    name = "256_ObjectCategories/001.x/001_0001.jpg"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.size = tarfile.GNUTYPE_SPARSE, 0
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[483:495] = b"%011o\0" % (2**33 - 1)  # the size it unpacks to
        header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
        archive.fileobj.write(header)
        archive.offset += 512
        link = tarfile.TarInfo("../x")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert builders._members(tmp_path / "a.tar") == [name]
    found = builders._Builder._generate_examples(None, tmp_path / "a.tar", [(name, "x")])
    assert len(next(found)[1]["image"]) <= reading.MAX_IMAGE_BYTES


def test_a_tar_cut_short(tmp_path):
    path = hostile.make_tar(tmp_path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(InputError, match="damaged or not a tar file"):
        builders._members(path)


@pytest.mark.parametrize("width", [40_000, 65_535])
def test_pictures_of_other_kinds_of_absurd_size(width):
    gif, bmp = (bytearray(hostile.picture(kind)) for kind in ("GIF", "BMP"))
    gif[6:10] = struct.pack("<HH", width, width)
    frame = bytearray(hostile.picture("GIF"))
    place = frame.index(b",\0\0\0\0")
    frame[place + 5 : place + 9] = struct.pack("<HH", width, width)
    bmp[18:26] = struct.pack("<ii", width, -width)
    for content in map(bytes, (gif, frame, bmp)):
        assert builders.as_jpeg_or_png(content) == content  # unchanged, so that `decode` names it
    for kind in ("GIF", "BMP"):
        assert builders.as_jpeg_or_png(hostile.picture(kind)).startswith(b"\x89PNG")
    assert builders._declared_pixels(hostile.picture("GIF")) == 2 * 9 * 7


def test_frames_of_a_gif_are_counted():
    from PIL import Image

    file = io.BytesIO()
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (5, 6), np.uint8)) for i in range(4)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert builders._declared_pixels(file.getvalue()) == 5 * 6 * 5
