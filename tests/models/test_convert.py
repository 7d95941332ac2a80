"""Converters give the same logits as the original framework, and one sentence for any bad file."""

import argparse
import collections
import functools
import hashlib
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
import torch_writer
from reference import resnets as reference

import l2sp_tf as l2sp
from l2sp_tf.cli.convert import main
from l2sp_tf.models import convert, keras_files, resnets, zoo
from l2sp_tf.models.pixels import PIXELS, PixelFormat
from l2sp_tf.models.torch_files import read_checkpoint, read_state_dict
from l2sp_tf.models.units import units
from l2sp_tf.penalties.matching import restore

IMAGES = np.random.default_rng(1).normal(size=(2, 33, 33, 3)).astype("float32")  # odd sides show differences in padding
CLASSES = 5
WRITERS = {"zip": torch_writer.torch_zip, "legacy": torch_writer.torch_legacy}


def relative_error(anchors, backbone, images, expected):
    model = resnets.imagenet_resnet(backbone, expected.shape[1], images.shape[1])
    restore(model, anchors)
    return np.abs(model(images, training=False) - expected).max() / np.abs(expected).max()


def write_checkpoint(path, arrays, version=2):
    names, tensors = list(arrays), [tf.constant(a) for a in arrays.values()]
    if version == 1:
        tf.raw_ops.Save(filename=str(path), tensor_names=names, data=tensors)
    else:
        tf.raw_ops.SaveV2(prefix=str(path), tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
    return path


@pytest.fixture(scope="module")
def slim():
    """Random weights under TF-slim's names, and the logits of the loops."""
    weights = reference.Weights(2)
    return reference.slim(IMAGES, weights, CLASSES), weights


@functools.cache
def torch_net(name):
    """The logits of the loops, and random weights under torchvision's names."""
    weights = reference.Weights(3)
    return reference.torch(IMAGES, weights, CLASSES, name), weights


@pytest.mark.parametrize("version", [1, 2])
def test_tf_slim_gives_the_logits_of_the_loops(slim, version, tmp_path):
    logits, weights = slim
    extra = {"global_step": np.array(3), "resnet_v1_50/mean_rgb": np.array([123.0, 116.0, 103.0], "float32")}
    slots = {"resnet_v1_50/conv1/weights/Momentum": np.zeros((7, 7, 3, 64), "float32")}
    path = write_checkpoint(tmp_path / "resnet_v1_50.ckpt", {**weights, **extra, **slots}, version)
    anchors = convert.convert_tf_slim(path, "resnet50_slim")
    assert relative_error(anchors, "resnet50_slim", IMAGES, logits) < 1e-4
    assert PixelFormat(**anchors.metadata["pixels"]) == PIXELS["rgb"].with_mean((123, 116, 103))
    assert anchors.metadata["provenance"]["origin"] == "tf_slim"
    files = anchors.metadata["provenance"]["files"]
    assert files == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in files}
    assert len(files) == (1 if version == 1 else 2)


@pytest.mark.parametrize(("name", "kind"), [("resnet18", "zip"), ("resnet50", "legacy")])
def test_torch_gives_the_logits_of_the_loops(name, kind, tmp_path):
    logits, weights = torch_net(name)
    path = tmp_path / "a.pth"
    WRITERS[kind](path, weights)
    anchors = convert.convert_torch(path, f"{name}_torch")
    assert relative_error(anchors, f"{name}_torch", IMAGES, logits) < 1e-4
    assert PixelFormat(**anchors.metadata["pixels"]) == PIXELS["torch"]


def test_the_variants_differ(slim):
    """The place of the stride changes the logits, so the tests above can fail."""
    logits, weights = slim
    found = {key: weights[convert._slim_name("resnet_v1_50", *key.split("/"))] for key in l2sp.Anchors.of(
        resnets.imagenet_resnet("resnet50_slim", CLASSES, 33))}  # fmt: skip
    found["predictions/kernel"] = found["predictions/kernel"][0, 0]
    assert relative_error(l2sp.Anchors(found), "resnet50_torch", IMAGES, logits) > 1e-2


@pytest.mark.parametrize(("name", "blocks"), [("resnet101_slim", 33), ("resnet152_slim", 50), ("resnet34_torch", 16)])
def test_deeper_ones_have_their_units_and_can_be_frozen(name, blocks):
    model = resnets.imagenet_resnet(name, 10, 32)
    assert len(units(model)) == 1 + blocks == l2sp.freeze_first(model, 3)
    assert {layer.momentum for layer in model.layers if layer.name.endswith("_bn")} == {0.9}


def test_numbers_of_weights_are_the_published_ones():
    counts = {"resnet18_torch": 11_689_512, "resnet50_torch": 25_557_032, "resnet50_slim": 25_557_032}
    for name, count in counts.items():
        assert sum(np.prod(w.shape) for w in resnets.imagenet_resnet(name, 1000, 32).trainable_weights) == count


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.backbone."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_ema", "network"])
def test_checkpoints_of_any_trainer_are_unwrapped(key, prefix, tmp_path):
    """A trainer's file has the weights under some key, beside other things, and all names may share a prefix."""
    state = {f"{prefix}a.weight": np.arange(6.0, dtype="float32"), f"{prefix}a.b.c": np.ones(2, "float32")}
    others = {"epoch": 90, "arch": "resnet18", "optimizer": {"lr": 0.1}, "scheduler": {}}
    torch_writer.torch_zip(tmp_path / "x.pth", state, lambda tensors: tensors if key is None else {**others, key: tensors})
    found = convert._without_shared_prefix(read_state_dict(tmp_path / "x.pth"))
    assert list(found) == ["a.weight", "a.b.c"]
    for one, two in zip(found.values(), state.values(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_state_dict_is_chosen_among_several(tmp_path):
    path, one, two = tmp_path / "x.pth", np.zeros(2, "float32"), np.ones(2, "float32")

    def write(**states):
        wrap = lambda tensors: {"epoch": 1, **{name: {"w": tensors[key]} for name, key in states.items()}}  # noqa: E731
        torch_writer.torch_zip(path, {"one": one, "two": two}, wrap)

    write(model="one", model_ema="two")
    np.testing.assert_array_equal(read_state_dict(path)["w"], one)
    np.testing.assert_array_equal(read_state_dict(path, "model_ema")["w"], two)
    with pytest.raises(l2sp.InputError, match="no state dict called 'ema': it has model, model_ema"):
        read_state_dict(path, "ema")
    write(generator="one", critic="two")
    with pytest.raises(l2sp.InputError, match="several state dicts: choose one of generator, critic by --state"):
        read_state_dict(path)
    torch_writer.torch_zip(path, {"w": one})
    with pytest.raises(l2sp.InputError, match="no state dict called 'ema': it has one without a name"):
        read_state_dict(path, "ema")


def test_a_file_without_a_head_leaves_the_networks_own(tmp_path):
    _, weights = torch_net("resnet18")
    body = {f"module.{name}": a for name, a in weights.items() if not name.startswith("fc.")}
    torch_writer.torch_zip(tmp_path / "a.pth", body)
    assert main([str(tmp_path / "a.pth"), str(tmp_path / "w.safetensors"), "--backbone=resnet18_torch"]) == 0
    model = zoo.backbone("resnet18_torch", 7, image_size=32, weights=tmp_path / "w.safetensors")
    assert not keras_files.has_head(tmp_path / "w.safetensors", model)
    np.testing.assert_array_equal(model.get_layer("conv1_conv").get_weights()[0], weights["conv1.weight"].transpose(2, 3, 1, 0))
    del body["module.layer1.0.conv1.weight"]
    torch_writer.torch_zip(tmp_path / "b.pth", body)
    with pytest.raises(l2sp.InputError, match=r"layer1.0.conv1.weight \(3, 3, 64, 64\) / missing"):
        convert.convert_torch(tmp_path / "b.pth", "resnet18_torch")
    with pytest.raises(l2sp.InputError, match="fc.weight .* / missing"):  # classes asks for a head
        convert.convert_torch(tmp_path / "a.pth", "resnet18_torch", classes=5)


def test_safetensors_of_torchvision_are_read(tmp_path):
    name, (logits, weights) = "resnet18", torch_net("resnet18")
    safetensors.numpy.save_file(weights, tmp_path / "w.safetensors")
    anchors = convert.convert_torch(tmp_path / "w.safetensors", f"{name}_torch", pixels="rgb")
    assert relative_error(anchors, f"{name}_torch", IMAGES, logits) < 1e-4
    assert PixelFormat(**anchors.metadata["pixels"]) == PIXELS["rgb"]


TIMM = pathlib.Path(__file__).parents[1] / "reference" / "timm_resnets.npz"
QUICK = ("resnet26", "resnet34")


def timm_array(name, shape):
    """The numbers under a name of timm's state dict for which its logits were recorded."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.array(7, "int64")
    if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        return rng.uniform(0.5, 1.5, shape).astype("float32")
    return rng.normal(0, np.sqrt(2 / (np.prod(shape[1:]) if len(shape) > 1 else 25)), shape).astype("float32")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in resnets.DEPTHS])
def test_timm_gives_the_recorded_logits(name, tmp_path):
    """The file has the float64 logits of timm 1.0.31, and the names and shapes of its state dict."""
    recorded = np.load(TIMM)
    arrays = {n: timm_array(n, shape) for n, shape in json.loads(recorded[f"{name}_shapes"].tobytes()).items()}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    anchors = convert.convert_torch(tmp_path / "model.safetensors", f"{name}_torch")
    assert relative_error(anchors, f"{name}_torch", IMAGES, recorded[name]) < 1e-5


def timm_config(name="resnet18", **changes):
    """The part that matters of the config.json that timm saves beside a model."""
    trained = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "input_size": [3, 224, 224]}
    options = {"num_classes": 5, "in_chans": 3, "global_pool": "avg"}
    config = {"architecture": name, "num_classes": 5, "global_pool": "avg", "model_args": options, "pretrained_cfg": trained}
    return config | changes


HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
# what timm's config.json says, and the pixel format or the message that follows for resnet18_torch
SAID = {
    "the backbone": (timm_config(), PIXELS["torch"]),
    "with a tag": (timm_config("resnet18.a1_in1k"), PIXELS["torch"]),
    "with a prefix": (timm_config("gluon_resnet18_v1b"), PIXELS["torch"]),
    "other pixels": (timm_config(pretrained_cfg=HALF), PIXELS["tf"]),
    "the first format": ({"architecture": "resnet18", **HALF}, PIXELS["tf"]),
    "of another program": ({"architectures": ["ResNetForImageClassification"]}, PIXELS["torch"]),
    "without a size": (timm_config("resnet"), PIXELS["torch"]),
    "blurred": (timm_config("resnetblur18"), "says that the network is 'resnetblur18', which differs from resnet18_torch"),
    "anti-aliased": (timm_config("resnetaa50d.sw_in12k"), "'resnetaa50d.sw_in12k', which differs"),
    "squeezed": (timm_config("seresnet18"), "'seresnet18', which differs"),
    "deeper": (timm_config("resnet182"), "'resnet182', which differs"),
    "dilated": (timm_config(model_args={"output_stride": 8}), "built with output_stride=8"),
    "pooled otherwise": (timm_config(global_pool="max"), "built with global_pool='max'"),
    "of bytes": (timm_config(pretrained_cfg={"mean": [124, 116, 104], "std": [58, 57, 57]}), "not from 0 to 1: give --pixels"),
}


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    safetensors.numpy.save_file(torch_net("resnet18")[1], path)
    return path


@pytest.mark.parametrize("kind", SAID)
def test_what_timm_says_beside_the_weights_is_heard(kind, weights_file, monkeypatch):
    """Weights of resnetblur18 and resnetaa18 have the names and shapes of resnet18, and compute something else."""
    monkeypatch.setattr(convert, "_match", lambda arrays, *_: arrays)  # it takes most of the time
    config, expected = SAID[kind]
    weights_file.with_name("config.json").write_text(json.dumps(config))
    if isinstance(expected, str):
        with pytest.raises(l2sp.InputError, match=expected):
            convert.convert_torch(weights_file, "resnet18_torch")
        return
    anchors = convert.convert_torch(weights_file, "resnet18_torch")
    assert PixelFormat(**anchors.metadata["pixels"]) == expected
    if expected != PIXELS["torch"]:
        with pytest.raises(l2sp.InputError, match="says that the network sees pixels as rgb, scale .* leave pixels out"):
            convert.convert_torch(weights_file, "resnet18_torch", pixels="torch")


@pytest.mark.parametrize("kind", list(WRITERS))
def test_checkpoints_with_a_trainers_flags_are_read(kind, tmp_path):
    """timm and torchvision's scripts keep an argparse.Namespace in their checkpoints."""
    weights = torch_net("resnet18")[1]
    flags = argparse.Namespace(model="resnet18", lr=0.1, mean=None, std=None, model_kwargs={}, milestones=[30, 60], pair=(1, 2))
    others = {"epoch": 3, "arch": "resnet18", "args": flags, "version": 2, "metric": 71.2}
    path = tmp_path / "last.pth.tar"
    WRITERS[kind](path, weights, lambda tensors: {**others, "state_dict": tensors})
    arrays, found = read_checkpoint(path)
    assert found == {**others, "args": vars(flags)} and arrays.keys() == weights.keys()
    assert (
        convert.convert_torch(path, "resnet18_torch").keys() == convert.convert_torch(path, "resnet18_torch", pixels="rgb").keys()
    )
    flags.mean, flags.std = HALF["mean"], HALF["std"]
    WRITERS[kind](path, weights, lambda tensors: {**others, "state_dict": tensors})
    assert PixelFormat(**convert.convert_torch(path, "resnet18_torch").metadata["pixels"]) == PIXELS["tf"]
    WRITERS[kind](path, weights, lambda tensors: {**others, "arch": "resnetblur18", "state_dict": tensors})
    with pytest.raises(l2sp.InputError, match="'resnetblur18', which differs from resnet18_torch"):
        convert.convert_torch(path, "resnet18_torch")


def test_a_file_that_does_not_name_its_network_is_said_to(tmp_path, capsys):
    weights = torch_net("resnet18")[1]
    for wrap, count in ((lambda tensors: tensors, 1), (lambda tensors: {"arch": "resnet18", "state_dict": tensors}, 0)):
        torch_writer.torch_zip(tmp_path / "a.pth", weights, wrap)
        convert.convert_torch(tmp_path / "a.pth", "resnet18_torch")
        assert capsys.readouterr().out.count("does not name its network") == count


def test_averaged_weights_of_torch_are_unwrapped(tmp_path):
    """torch.optim.swa_utils.AveragedModel counts beside the network, outside of the prefix that all names share."""
    weights = torch_net("resnet18")[1]
    averaged = {"n_averaged": np.array(3, "int64"), **{f"module.module.{name}": a for name, a in weights.items()}}
    torch_writer.torch_zip(tmp_path / "a.pth", averaged)
    found = convert.convert_torch(tmp_path / "a.pth", "resnet18_torch")
    np.testing.assert_array_equal(found["conv1_conv/kernel"], weights["conv1.weight"].transpose(2, 3, 1, 0))


@pytest.mark.parametrize("legacy", [False, True])
def test_files_that_torch_itself_saved_are_read(legacy, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: the files of torch_writer stand in for its own")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = collections.OrderedDict(
        a=base.t(), b=base[1:3, 2:5], c=torch.tensor(3), d=base.half(), e=base.bfloat16(), f=torch.nn.Parameter(base.double())
    )
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "t.pth", _use_new_zipfile_serialization=not legacy)
    found = read_state_dict(tmp_path / "t.pth")
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name].astype("float64"), tensor.detach().double().numpy())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torch_itself_gives_the_logits_of_the_loops(name):
    """Checks the oracle against PyTorch's own operations, if PyTorch is installed."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: the loops of reference_resnets stand in for it")
    logits, weights = torch_net(name)
    w = {k: torch.tensor(a) for k, a in weights.items()}
    f = torch.nn.functional

    def bn(x, at):
        return f.batch_norm(x, w[f"{at}.running_mean"], w[f"{at}.running_var"], w[f"{at}.weight"], w[f"{at}.bias"])

    x = torch.tensor(IMAGES).permute(0, 3, 1, 2)
    x = f.max_pool2d(bn(f.conv2d(x, w["conv1.weight"], stride=2, padding=3), "bn1").relu(), 3, 2, 1)
    for stage, blocks in enumerate(reference.DEPTHS[name], start=1):
        for block in range(blocks):
            at, y, n = f"layer{stage}.{block}", x, 1
            stride = 2 if stage > 1 and block == 0 else 1
            while f"{at}.conv{n}.weight" in w:
                kernel = w[f"{at}.conv{n}.weight"]
                strided = n == (1 if name == "resnet18" else 2)
                y = f.conv2d(y if n == 1 else y.relu(), kernel, stride=stride if strided else 1, padding=kernel.shape[-1] // 2)
                y, n = bn(y, f"{at}.bn{n}"), n + 1
            if f"{at}.downsample.0.weight" in w:
                x = bn(f.conv2d(x, w[f"{at}.downsample.0.weight"], stride=stride), f"{at}.downsample.1")
            x = (x + y).relu()
    found = f.linear(x.mean((2, 3)), w["fc.weight"], w["fc.bias"]).numpy()
    assert np.abs(found - logits).max() / np.abs(logits).max() < 1e-4


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo > {self.path}",)


def hostile(path, content):
    """Writes a zip like torch.save's, whose pickle is the given bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return path


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_pickled_code_is_refused_and_not_run(kind, tmp_path):
    content = pickle.dumps({"conv1.weight": Bomb(tmp_path / "ran")}, 2)
    start = b"".join(pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    path = tmp_path / "a.pth"
    path.write_bytes({"bare": b"", "legacy": start, "zip": b""}[kind] + content)
    if kind == "zip":
        hostile(path, content)
    with pytest.raises(l2sp.InputError, match="system, which no state dict needs"):
        read_state_dict(path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)  # proof that the pickle would run its code
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cbuiltins\neval\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",  # names eval by STACK_GLOBAL
        b"\x80\x04\x8c\x0bcollections\x8c\x16OrderedDict.__init__.x\x93.",
        b"\x80\x02\x82\x01.",  # an extension
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00xK\x01sb.",  # sets an attribute of a stand-in
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # calls a marker
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",  # makes an object
        b"\x80\x02cargparse\nNamespace\nK\x01\x85\x81.",  # with an argument
        b"\x80\x02cargparse\nNamespace\n)\x81K\x01b.",  # flags without names
        b"\x80\x02cargparse\nNamespace\n)R.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a string longer than the file
        b"\x80\x02K\x01r\xff\xff\xff\xff.",  # a memo of 2^32 places
        b"\x80\x02(((",
        b"",
        b"\x80\x02]q\x00h\x00a.",
    ],
)
def test_pickles_that_describe_no_tensors_are_refused(content, tmp_path):
    with pytest.raises(l2sp.InputError, match="not a state dict"):
        read_state_dict(hostile(tmp_path / "a.pth", content))


@pytest.mark.parametrize("kind", list(WRITERS))
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_truncated_files_are_refused(kind, part, tmp_path):
    path = tmp_path / "a.pth"
    WRITERS[kind](path, {"a": np.ones((30, 30), "float32"), "b": np.ones(500, "float32")})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(l2sp.InputError, match="damaged or not a state dict"):
        read_state_dict(path)


@pytest.mark.parametrize(
    "change", [{"shape": (40,)}, {"shape": (2**40, 2**40), "strides": (0, 0)}, {"shape": (-1,)}, {"strides": (2**50,)}]
)
def test_tensors_beyond_their_storage_are_refused(change, tmp_path):
    array = np.ones(30, "float32")
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr(
            "archive/data.pkl",
            torch_writer.pickled({"a": torch_writer.Tensor("0", array, **{"shape": (30,), "strides": (1,), **change})}),
        )
        archive.writestr("archive/data/0", array.tobytes())
    with pytest.raises(l2sp.InputError, match="beyond its storage|impossible sizes"):
        read_state_dict(tmp_path / "a.pth")


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    with pytest.raises(l2sp.InputError, match="compressed"):
        read_state_dict(path)
    torch_writer.torch_legacy(path, {"a": np.ones(3, "float32")})
    content = path.read_bytes()
    path.write_bytes(content[:-20] + struct.pack("<q", 2**60) + content[-12:])
    with pytest.raises(l2sp.InputError, match="beyond the end of the file"):
        read_state_dict(path)


def test_weights_that_do_not_fit_are_listed_on_both_sides(slim, tmp_path):
    _, weights = slim
    path = write_checkpoint(tmp_path / "c.ckpt", weights)
    with pytest.raises(l2sp.InputError, match=r"block2/unit_5/.* / missing.* and \d+ more"):
        convert.convert_tf_slim(path, "resnet152_slim")
    with pytest.raises(l2sp.InputError, match="has a head of 5 classes, not 1000"):
        convert.convert_tf_slim(path, "resnet50_slim", classes=1000)
    changed = {**weights, "resnet_v1_50/extra": np.zeros(3, "float32")}
    changed["resnet_v1_50/conv1/weights"] = np.zeros((7, 7, 3, 32), "float32")
    path = write_checkpoint(tmp_path / "d.ckpt", changed)
    with pytest.raises(l2sp.InputError) as error:
        convert.convert_tf_slim(path, "resnet50_slim")
    assert "resnet_v1_50/conv1/weights (7, 7, 3, 64) / (7, 7, 3, 32)" in str(error.value)
    assert "resnet_v1_50/extra missing / (3,)" in str(error.value)
    with pytest.raises(l2sp.InputError, match="give one of resnet50_slim"):
        convert.convert_tf_slim(path, "resnet50")


def test_files_that_are_not_checkpoints_are_refused(slim, tmp_path):
    with pytest.raises(l2sp.InputError, match="There is no checkpoint"):
        convert.convert_tf_slim(tmp_path / "none.ckpt", "resnet50_slim")
    (tmp_path / "a.ckpt").write_bytes(b"no checkpoint" * 100)
    with pytest.raises(l2sp.InputError, match="damaged or not a checkpoint"):
        convert.convert_tf_slim(tmp_path / "a.ckpt", "resnet50_slim")
    path = write_checkpoint(tmp_path / "b.ckpt", slim[1])
    part = next(tmp_path.glob("b.ckpt.data-*"))
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(l2sp.InputError, match="damaged or not a checkpoint"):
        convert.convert_tf_slim(path, "resnet50_slim")


def test_the_command_writes_what_load_weights_reads(tmp_path, capsys):
    name, (logits, weights) = "resnet18", torch_net("resnet18")
    torch_writer.torch_zip(tmp_path / "a.pth", weights)
    output = tmp_path / "w.safetensors"
    arguments = [str(tmp_path / "a.pth"), str(output), f"--backbone={name}_torch", "--mean=115.6,112.52,102.82"]
    assert main(arguments) == 0
    assert f"{name}_torch, 5 classes, pixels rgb, scale" in capsys.readouterr().out
    model = zoo.backbone(f"{name}_torch", CLASSES, image_size=33, weights=str(output))
    np.testing.assert_allclose(model(IMAGES, training=False), logits, rtol=1e-3, atol=1e-4 * np.abs(logits).max())
    assert zoo.pixels_of(str(output)) == PIXELS["torch"].with_mean((115.6, 112.52, 102.82))
    assert keras_files.head_classes(output) == CLASSES
    digest = hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
    assert l2sp.Anchors.load(output).metadata["provenance"] == {
        "origin": "torch", "backbone": f"{name}_torch", "files": {"a.pth": digest},
    }  # fmt: skip


def test_the_command_prints_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.pth").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    for arguments, status, message in (
        (["a.pth", "w.safetensors", "--backbone=resnet50_torch"], 2, "not a state dict"),
        (["a.pth", "w.bin", "--backbone=resnet50_torch"], 2, "does not end in .safetensors"),
        (["none.pth", "w.safetensors", "--backbone=resnet50_torch"], 2, "There is no file none.pth"),
        (["a.pth", "w.safetensors", "--backbone=vgg16"], 2, "backbone 'vgg16' cannot be read"),
        (["a.pth", "w.safetensors", "--backbone=resnet50_torch", "--pixels=grey"], 2, "pixel format 'grey' is unknown"),
        (["a.pth", "w.safetensors", "--backbone=resnet50_torch", "--mean=1,2"], 2, "mean is ['1', '2']"),
    ):
        assert main(arguments) == status
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_the_module_is_a_command(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "l2sp_tf.cli.convert", "none.ckpt", "w.safetensors", "--backbone=resnet50_slim"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: There is no checkpoint none.ckpt" in result.stderr
