"""Files of all kinds, whatever their names, become the pixels that a person sees: against Pillow, and NumPy in float64."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps
from test_pipeline import encoded, picture, split_of

import l2sp_tf as l2sp
from l2sp_tf.data import Preprocessing, decode, digests, load_dataset, prepare
from l2sp_tf.data.codecs import decode_bytes
from l2sp_tf.data.headers import header_of, kind_of, orientation_of
from l2sp_tf.data.store import PixelStore


def pixels_of(content):
    """The pixels that the library makes of a file, at the size it has."""
    return decode_bytes(tf.constant(content), min(header_of(content).sides), "shorter_side", "area").numpy()


def on_white(colour, alpha, most=255):
    """Draws an image [h, w, 3 or 1] on white by its opacity [h, w], in float64 and rounded."""
    alpha = np.float64(alpha)[..., None] / most
    return np.round(np.broadcast_to(255 * (alpha * colour / most + 1 - alpha), (*alpha.shape[:2], 3))).astype(np.uint8)


def png(samples, depth, colours, **chunks):
    """A PNG file written by hand: samples uint16 [h, w, c] of `depth` bits, and more chunks before the pixels."""
    height, width, channels = samples.shape
    if depth == 16:
        lines = [row.astype(">u2").tobytes() for row in samples]
    else:
        bits = (samples.reshape(height, -1, 1) >> np.arange(depth - 1, -1, -1)) & 1
        lines = [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]
    parts = {"IHDR": struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0), **chunks}
    parts |= {"IDAT": zlib.compress(b"".join(b"\0" + line for line in lines)), "IEND": b""}
    made = [(name.encode(), content) for name, content in parts.items()]
    packed = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in made]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def bmp_of_32_bits(rgba, header=40, upside_down=True):
    """A BMP file written by hand: without alpha (header 40), or with the masks of version 4 (header 108)."""
    height, width = rgba.shape[:2]
    body = np.ascontiguousarray((rgba[::-1] if upside_down else rgba)[..., [2, 1, 0, 3]]).tobytes()
    fields = (header, width, height if upside_down else -height, 1, 32, 0 if header == 40 else 3, len(body), 0, 0, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000).ljust(header - 40, b"\0") if header > 40 else b""
    return (
        struct.pack("<2sIHHI", b"BM", 14 + header + len(body), 0, 0, 14 + header)
        + struct.pack("<IiiHHIIiiII", *fields)
        + masks
        + body
    )


RGB, GREY, ALPHA = picture(5, 8, 3), picture(5, 8, seed=1), picture(5, 8, seed=2)
RGBA = np.dstack([RGB, ALPHA])
PALETTE = Image.fromarray(RGB).quantize(16)
COLOURS = np.array(PALETTE.convert("RGB"))
SEEN = np.where(np.array(PALETTE) == 3, 0, 255)  # a palette whose colour 3 is transparent
DEEP = np.random.default_rng(3).integers(0, 2**16, (5, 8, 4)).astype(np.uint16)


def gif_with_a_small_picture():
    """A GIF of 8 x 5 pixels whose only picture has 3 x 2, at (4, 1)."""
    small = encoded(Image.fromarray(GREY[:2, :3]), "GIF")
    place = small.index(b",\0\0\0\0")
    return small[:6] + struct.pack("<HH", 8, 5) + small[10:place] + struct.pack("<cHH", b",", 4, 1) + small[place + 5 :]


def small_on_white():
    expected = np.full((5, 8, 3), 255, np.uint8)
    expected[1:3, 4:7] = GREY[:2, :3, None]
    return expected


def frames():
    first, *others = (Image.fromarray(picture(5, 8, seed=i)) for i in (1, 5, 6))
    return encoded(first, "GIF", save_all=True, append_images=others)


EXACT = {
    "PNG": (encoded(RGB, "PNG"), RGB),
    "PNG, grey": (encoded(GREY, "PNG"), GREY),
    "PNG, palette": (encoded(PALETTE, "PNG"), COLOURS),
    "PNG, alpha": (encoded(RGBA, "PNG"), on_white(RGB, ALPHA)),
    "PNG, opaque alpha": (encoded(np.dstack([RGB, GREY * 0 + 255]), "PNG"), RGB),
    "PNG, grey and alpha": (encoded(Image.fromarray(np.dstack([GREY, ALPHA])), "PNG"), on_white(GREY[..., None], ALPHA)),
    "PNG, palette, tRNS": (encoded(PALETTE, "PNG", transparency=3), on_white(COLOURS, SEEN)),
    "PNG, tRNS": (
        png(RGB.astype(np.uint16), 8, 2, tRNS=struct.pack(">HHH", *RGB[2, 3])),
        on_white(RGB, np.where((RGB[2, 3] == RGB).all(-1), 0, 255)),
    ),
    "PNG, grey, tRNS": (
        png(GREY[..., None].astype(np.uint16), 8, 0, tRNS=struct.pack(">H", GREY[2, 3])),
        on_white(GREY[..., None], np.where(GREY[2, 3] == GREY, 0, 255)),
    ),
    **{
        f"PNG, grey of {depth} bits": (
            png((GREY[..., None] >> (8 - depth)).astype(np.uint16), depth, 0),
            (GREY >> (8 - depth)) * np.uint8(255 // (2**depth - 1)),
        )
        for depth in (1, 2, 4)
    },
    "GIF": (encoded(PALETTE, "GIF"), COLOURS),
    "GIF, grey": (encoded(GREY, "GIF"), GREY),
    "GIF, transparency": (encoded(PALETTE, "GIF", transparency=3), on_white(COLOURS, SEEN)),
    "GIF, a small picture": (gif_with_a_small_picture(), small_on_white()),
    "GIF, three pictures": (frames(), GREY),
    "BMP": (encoded(RGB, "BMP"), RGB),
    "BMP, grey": (encoded(GREY, "BMP"), GREY),
    "BMP, palette": (encoded(PALETTE, "BMP"), COLOURS),
    "BMP, 1 bit": (encoded(Image.fromarray(GREY > 127), "BMP"), np.where(GREY > 127, 255, 0).astype(np.uint8)),
    "BMP, 32 bits": (bmp_of_32_bits(RGBA), RGB),  # the fourth byte means nothing
    "BMP, 32 bits from the top": (bmp_of_32_bits(RGBA, upside_down=False), RGB),
    "BMP, alpha": (bmp_of_32_bits(RGBA, header=108), on_white(RGB, ALPHA)),
    "WebP": (encoded(RGB, "WebP", lossless=True), RGB),
    "WebP, alpha": (encoded(RGBA, "WebP", lossless=True, exact=True), on_white(RGB, ALPHA)),
}


@pytest.mark.parametrize("name", EXACT)
def test_pixels_are_those_of_the_file(name):
    content, expected = EXACT[name]
    assert kind_of(content[:32]) == name.partition(",")[0]
    found = pixels_of(content)
    assert found.dtype == np.uint8 and found.shape == (5, 8, 3)
    np.testing.assert_array_equal(found, expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize(("colours", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_become_the_upper_8(colours, channels):
    samples = DEEP[..., :channels]
    colour, alpha = (samples[..., :-1], samples[..., -1]) if channels in (2, 4) else (samples, np.uint16(65535) + 0 * GREY)
    found = pixels_of(png(samples, 16, colours)).astype(int)
    assert np.abs(found - on_white(colour, alpha, most=65535)).max() <= 2
    if channels in (1, 3):
        np.testing.assert_array_equal(found, np.broadcast_to(samples >> 8, found.shape))


def test_cmyk_jpegs_are_printed_on_white_paper():
    yy, xx = np.mgrid[:32, :48]
    cmyk = np.stack([xx * 5, yy * 7, 255 - xx * 3, yy * 2], -1).astype(np.uint8)
    content = encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=98, subsampling=0)
    expected = np.round((255 - np.float64(cmyk[..., :3])) * (255 - np.float64(cmyk[..., 3:])) / 255)
    assert np.abs(pixels_of(content) - expected).max() <= 6


def test_jpegs_that_lie_upright_are_what_tensorflow_decodes():
    for options in ({}, {"progressive": True}, {"exif": exif_of(1)}, {"quality": 30, "subsampling": 2}):
        content = encoded(picture(24, 40, 3), "JPEG", **options)
        np.testing.assert_array_equal(pixels_of(content), tf.io.decode_jpeg(content, channels=3).numpy())


# Orientation


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x10F], exif[0x112], exif[0x11A] = "a maker", orientation, 72.0
    return exif


def smooth(height=24, width=40):
    yy, xx = np.mgrid[:height, :width]
    return np.stack([xx * 6, yy * 10, (xx + yy) * 3], -1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"quality": 97, "subsampling": 0}), ("PNG", {}), ("WebP", {"lossless": True})]
)
def test_images_are_turned_upright(tmp_path, kind, options, orientation):
    content = encoded(smooth(), kind, exif=exif_of(orientation), **options)
    stored = content
    if kind == "JPEG":  # decoders of JPEG differ a little, so Pillow turns what TensorFlow decoded
        stored = encoded(tf.io.decode_jpeg(content, channels=3).numpy(), "PNG", exif=exif_of(orientation))
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(stored))).convert("RGB"))
    assert header_of(content).orientation == orientation and expected.shape[:2] == ((24, 40) if orientation < 5 else (40, 24))
    np.testing.assert_array_equal(pixels_of(content), expected)
    if kind == "PNG":  # the chunk may lie behind the pixels, where some tools write it
        place = content.index(b"eXIf") - 4
        end = place + 12 + int.from_bytes(content[place : place + 4])
        moved = content[:place] + content[end:-12] + content[place:end] + content[-12:]
        np.testing.assert_array_equal(pixels_of(moved), expected)
    if kind == "JPEG":  # both sides are estimated alike
        split = split_of(tmp_path, {"a.jpg": content})
        assert decode(split, 12, mode="shorter_side").sides.tolist() == [[12, 20] if orientation < 5 else [20, 12]]


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_orientation_is_read_in_both_orders_and_is_1_where_it_is_none(order):
    def block(kind, value, count=1, place=8):
        start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", place)
        value = struct.pack(order + {3: "HH", 4: "I", 2: "I"}[kind], *([value, 0] if kind == 3 else [value]))
        return start + struct.pack(f"{order}H", count) + struct.pack(f"{order}HHI", 0x112, kind, 1) + value

    assert [orientation_of(block(kind, value)) for kind in (3, 4) for value in range(10)] == [1, 1, 2, 3, 4, 5, 6, 7, 8, 1] * 2
    assert orientation_of(block(3, 6)[:-4]) == orientation_of(block(3, 6, place=10**6)) == orientation_of(block(2, 6)) == 1
    rng = np.random.default_rng(0)
    for length in range(60):
        assert 1 <= orientation_of(block(3, 6)[: rng.integers(0, 22)] + rng.bytes(length)) <= 8


# What was made of earlier pixels


def photographs(root):
    """A data set with one turned photograph, one transparent screenshot and a GIF of the name .jpg among plain images."""
    contents = {
        "train/a/plain.png": encoded(picture(6, 9, 3, seed=1), "PNG"),
        "train/a/turned.jpg": encoded(smooth(), "JPEG", exif=exif_of(6)),
        "train/b/plain.jpg": encoded(smooth(20, 30), "JPEG"),
        "train/b/screenshot.png": encoded(picture(6, 9, 4, seed=2), "PNG"),
        "test/a/other.jpg": encoded(picture(6, 9, seed=3), "GIF"),
        "test/b/plain.png": encoded(picture(6, 9, 3, seed=4), "PNG"),
    }
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def earlier_digest(dataset):
    """The digest of a data set as versions computed it that read all images as they were stored."""
    sha = hashlib.sha256(repr(dataset.classes).encode())
    for split in (dataset.train, dataset.test):
        sha.update(f"{len(split)}".encode() + np.asarray(split.labels, "<i4").tobytes())
        for path in split.files:
            content = path.read_bytes()
            sha.update(repr((path.parts[-2:], len(content), hashlib.sha256(content).hexdigest())).encode())
    return sha.hexdigest()


def test_digests_change_only_where_pixels_do(tmp_path):
    data = load_dataset(photographs(tmp_path / "set"), cache_dir=tmp_path / "cache")
    plain = {name.rpartition("/")[2].startswith("plain"): name for name in data.train.names + data.test.names}
    assert set(plain) == {True, False}
    for split in (data.train, data.test):
        for path, key in zip(split.files, split.keys, strict=True):
            assert (key == hashlib.sha256(path.read_bytes()).digest()[:16]) == path.stem.startswith("plain")
    assert data.digest != earlier_digest(data)
    again = load_dataset(tmp_path / "set", cache_dir=tmp_path / "cache")  # remembered
    assert again.digest == data.digest and again.changes == data.changes
    assert data.changes == ("1 turned upright by Exif", "1 with transparency drawn on white")
    assert data.remarks() == f"{tmp_path}/set: 6 images; 1 turned upright by Exif; 1 with transparency drawn on white"
    for name in ("train/a/turned.jpg", "train/b/screenshot.png", "test/a/other.jpg"):
        (tmp_path / "set" / name).write_bytes(encoded(picture(5, 7, 3, seed=len(name)), "PNG"))
    plain = load_dataset(tmp_path / "set")
    assert plain.digest == earlier_digest(plain) and plain.remarks() == ""


def test_remembered_digests_are_those_of_this_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -60)  # files just written are remembered too
    before, cache = load_dataset(photographs(tmp_path / "set"), cache_dir=tmp_path / "cache").digest, tmp_path / "cache"
    monkeypatch.setattr(digests, "READER", digests.READER + 1)
    assert load_dataset(tmp_path / "set", cache_dir=cache).digest == load_dataset(tmp_path / "set").digest != before


def test_cached_pixels_of_an_earlier_reading_are_not_used(tmp_path):
    split = load_dataset(photographs(tmp_path / "set")).train
    store, marks = PixelStore(tmp_path / "cache", (6, "squash", "area")), picture(4, 6, 6, 3, seed=9)
    with store.writing():
        store.append([hashlib.sha256(path.read_bytes()).digest()[:16] for path in split.files], list(marks))
    images, fresh = decode(split, 6, memory_limit_bytes=0, cache_dir=tmp_path / "cache"), decode(split, 6)
    for i, path in enumerate(split.files):
        np.testing.assert_array_equal(images[i], marks[i] if path.stem == "plain" else fresh[i])


def test_one_line_says_what_was_changed_and_left_out(tmp_path, capsys):
    import keras

    photographs(tmp_path / "set" / "pets")
    (tmp_path / "set" / "pets" / "test").rename(tmp_path / "set" / "pets" / "valid")
    (tmp_path / "set" / "pets" / "train" / "a" / "Thumbs.db").write_bytes(b"")
    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(3), keras.layers.Dense(2)])
    recipe = l2sp.Recipe().replace(resize=6, crop=4, blur="none", iterations=1, batch_size=2)
    for verbose in (0, 1):
        data = load_dataset(tmp_path / "set")
        l2sp.finetune(model, data, l2sp.L2SP(0.1), recipe, pixels="rgb", verbose=verbose)
        printed = capsys.readouterr().out
        line = (
            f"{tmp_path}/set: 6 images; read from its folder pets; valid/ used as the test split; 1 system files or folders left "
            "out; 1 turned upright by Exif; 1 with transparency drawn on white\n"
        )
        assert printed.count(line) == verbose and bool(printed) == verbose


def test_a_prepared_task_shows_what_a_person_sees(tmp_path):
    """Through `load_dataset` and `prepare`, against Pillow and NumPy, at the size that the images have."""
    for number, (split, c) in enumerate((split, c) for split in ("train", "test") for c in "ab"):
        (tmp_path / split / c).mkdir(parents=True)
        for o in range(1, 9):
            image = Image.fromarray(picture(7, 7, 4, seed=10 * number + o))
            image.save(tmp_path / split / c / f"{split}{o}.png", exif=exif_of(o))
            image.save(tmp_path / split / c / f"{split}{o}.jpg", "WebP", lossless=True, exact=True, exif=exif_of(o))
    task = prepare(load_dataset(tmp_path), Preprocessing(resize=7, crop=7), mean=(0, 0, 0))
    for i, path in enumerate(task.test.split.files):
        rgba = np.float64(ImageOps.exif_transpose(Image.open(path)).convert("RGBA")) / 255
        expected = np.round(255 * (rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]))
        np.testing.assert_array_equal(task.test[i], expected)
    assert len(task.test) == 32


def test_records_of_tensorflow_datasets_are_read_as_it_reads_them():
    turned, clear = encoded(smooth(), "JPEG", exif=exif_of(6)), encoded(RGBA, "PNG")
    options = {"mode": "shorter_side", "filter": "area", "as_stored": True}
    np.testing.assert_array_equal(decode_bytes(tf.constant(turned), 24, **options), tf.io.decode_jpeg(turned, channels=3))
    np.testing.assert_array_equal(decode_bytes(tf.constant(clear), 5, **options), RGB)
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode_bytes(tf.constant(encoded(RGB, "GIF")), 5, **options)


BAD = {
    "GIF": "truncated or damaged",
    "BMP": "truncated or damaged",
    "WebP": "truncated or damaged",
    "TIFF": "not a JPEG, PNG, GIF, BMP or WebP",
    "ICO": "not a JPEG, PNG, GIF, BMP or WebP",
}


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff", encoded(RGB, "JPEG").replace(b"\xff\xc0", b"\xff\xe9"), b"BM", b"GIF89a"]
)
def test_a_file_without_sides_is_bad_and_has_a_digest(tmp_path, content):
    split = split_of(tmp_path, {"good.png": encoded(RGB, "PNG"), "bad.jpg": content})
    assert split.keys[1] == hashlib.sha256(content).digest()[:16]
    for mode in ("squash", "shorter_side"):
        assert decode(split, 4, mode=mode, skip_bad_images=True).skipped == (f"{tmp_path}/bad.jpg",)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_for_what_it_is(tmp_path, kind):
    content = encoded(picture(40, 40, 3), kind)
    contents = {"good.png": encoded(RGB, "PNG"), "bad.jpg": content[: len(content) * 2 // 3]}
    with pytest.raises(l2sp.InputError, match=rf"1 of 2 images cannot be decoded: .*bad.jpg \({BAD[kind]}\)\. "):
        decode(split_of(tmp_path, contents), 4)
    kept = decode(split_of(tmp_path, contents), 5, skip_bad_images=True)
    assert len(kept) == 1 and kept.skipped == (f"{tmp_path}/bad.jpg",)
