"""What an image file is, by its bytes and whatever its name: its kind, sides, orientation and transparency."""

import dataclasses
import io
import re
import struct

from PIL import BmpImagePlugin, GifImagePlugin, Image, WebPImagePlugin

from l2sp_tf.files.reading import MAX_IMAGE_BYTES, MAX_PIXELS

KINDS = "JPEG, PNG, GIF, BMP or WebP"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FIRST_BYTES = 32  # as many as `kind_of` looks at
BY_PILLOW = {
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
}
BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # the sizes that a header has had since OS/2
ORIENTATION = 0x112  # the tag of Exif
MAX_PARTS = 10**5  # segments or chunks of a file that are looked at
READER = 2  # raise it if an image whose `reading` is not 0 is read otherwise


@dataclasses.dataclass(frozen=True)
class Header:
    """What an image file says about itself.

    Attributes:
        kind: "JPEG", "PNG", "GIF", "BMP" or "WebP".
        sides: the height and width that are stored, before the image is turned upright.
        orientation: Exif's, from 1 (upright) to 8.
        transparent: whether pixels may be transparent.
    """

    kind: str
    sides: tuple
    orientation: int = 1
    transparent: bool = False

    @property
    def reading(self):
        """0 if the stored pixels are shown as they are, as all images once were; otherwise what is done to them, in bits."""
        return (self.orientation - 1) | 8 * self.transparent | 16 * (self.kind in BY_PILLOW)


def kind_of(content):
    """Returns "JPEG", "PNG", "GIF", "BMP" or "WebP" by the first bytes of a file, or None."""
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if content.startswith(PNG_SIGNATURE):
        return "PNG"
    if content.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "WebP"
    if content.startswith(b"BM") and int.from_bytes(content[14:18], "little") in BMP_HEADERS:
        return "BMP"
    return None


def header_of(content):
    """Reads the `Header` of an image file; decodes nothing.

    Args:
        content: its bytes.

    Raises:
        ValueError: it cannot be an image that is read here; the message is the reason.
    """
    if not content:
        raise ValueError("empty")
    if len(content) > MAX_IMAGE_BYTES:
        raise ValueError(too_large(len(content), MAX_IMAGE_BYTES, "bytes"))
    kind = kind_of(content)
    if kind is None:
        raise ValueError(f"not a {KINDS}")
    try:
        header = {"JPEG": _jpeg, "PNG": _png}.get(kind, _by_pillow)(content)
    except Image.DecompressionBombError:
        raise ValueError(f"too large: more than the {MAX_PIXELS:,} pixels allowed") from None
    except Exception:  # readers of damaged files raise exceptions of any kind
        raise ValueError("truncated or damaged") from None
    if min(header.sides) < 1:
        raise ValueError("truncated or damaged")
    return header


def too_large(count, limit, unit):
    """Returns the reason for which a file or an image is not read, in words."""
    return f"too large: {count:,} {unit}, more than the {limit:,} allowed"


def reading_of(content):
    """Returns the `reading` of an image file's `Header`, and 0 if it is no image."""
    try:
        return header_of(content).reading
    except ValueError:
        return 0


def _jpeg(content):
    """Walks the segments up to the first scan, as libjpeg does: bytes between two segments are skipped."""
    sides, orientation, place = None, 1, 2
    marker = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
    for _ in range(MAX_PARTS):
        found = marker.search(content, place)
        code, place = found[1][0], found.end()
        if code == 0xDA:
            break
        if code == 0x01 or 0xD0 <= code <= 0xD7:  # these have no length
            continue
        (length,) = struct.unpack_from(">H", content, place)
        if code == 0xE1 and orientation == 1 and content[place + 2 : place + 8] == b"Exif\0\0":
            orientation = orientation_of(content[place + 8 : place + length])
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC) and sides is None:
            sides = struct.unpack_from(">HH", content, place + 3)
        place += length
    if sides is None:
        raise ValueError("no frame")
    return Header("JPEG", sides, orientation)


def _png(content):
    width, height, _, colours = struct.unpack_from(">IIBB", content, 16)
    transparent, orientation, place = colours in (4, 6), 1, len(PNG_SIGNATURE)
    for _ in range(MAX_PARTS):
        if place + 8 > len(content):
            break
        length, name = struct.unpack_from(">I4s", content, place)
        transparent |= name == b"tRNS"
        if name == b"eXIf":
            orientation = orientation_of(content[place + 8 : place + 8 + length])
        place += length + 12
    return Header("PNG", (height, width), orientation, transparent)


def _by_pillow(content):
    image = opened(content)
    if image.width * image.height > MAX_PIXELS:  # before it is asked for more
        return Header(kind_of(content), (image.height, image.width))
    outside = kind_of(content) == "GIF" and image.tile[0].extents != (0, 0, *image.size)
    transparent = image.mode == "RGBA" or "transparency" in image.info or outside
    exif = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    return Header(kind_of(content), (image.height, image.width), orientation_of(exif), transparent)


def opened(content):
    """Opens a GIF, BMP or WebP in Pillow, which decodes nothing yet; raises whatever Pillow raises."""
    return BY_PILLOW[kind_of(content)](io.BytesIO(content))


def orientation_of(exif):
    """Returns the orientation in a block of Exif, from 1 to 8; 1 if the block is damaged or has none.

    Exif's library is not asked: it reads all tags and warns of each odd one, and every photograph has such a block.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        (place,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, place)
        for entry in range(place + 2, place + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == ORIENTATION and kind in (3, 4):  # a short or a long number
                (value,) = struct.unpack_from(order + {3: "H", 4: "I"}[kind], exif, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
