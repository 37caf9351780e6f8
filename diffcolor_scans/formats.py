"""Finished pictures as files: PNG, TIFF, JPEG, WebP, with the source's metadata, an sRGB profile and their provenance.

XMP marks each result with IPTC's DigitalSourceType "compositeWithTrainedAlgorithmicMedia", a photograph to which a
generative model added its colours, and with the software, the prompt and the run. It is not
"trainedAlgorithmicMedia", as the luminance is the scan's own, and not "algorithmicallyEnhanced", as the colours are
invented and correct nothing.
"""

import io
import re
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import tifffile
from PIL import Image, ImageCms

from diffcolor_scans.decoding import SourceMetadata
from diffcolor_scans.images import Picture

ImageFormat = Literal["png", "tiff", "jpeg", "webp"]
SUFFIX: dict[str, str] = {"png": ".png", "tiff": ".tif", "jpeg": ".jpg", "webp": ".webp"}
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"

_NAMESPACES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "dc": "http://purl.org/dc/elements/1.1/",
    "photoshop": "http://ns.adobe.com/photoshop/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "diffcolor": "https://arxiv.org/abs/2308.01655#",
}
for _prefix, _uri in _NAMESPACES.items():
    ElementTree.register_namespace(_prefix, _uri)
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MAX_SIDE_PX = {"jpeg": 65_500, "webp": 16_383}
_MAX_JPEG_EXIF_BYTES, _MAX_JPEG_XMP_BYTES = 65_533, 65_504  # room in one segment, beside its length and XMP's name
_TIFF_TAGS = (270, 271, 272, 306, 315, 33432)  # description, make, model, date, artist, copyright


@dataclass(frozen=True)
class Provenance:
    """What made a picture."""

    software: str
    model: str
    prompt: str
    run_id: str | None = None
    seed: int | None = None


def encode(
    picture: Picture,
    image_format: ImageFormat,
    provenance: Provenance | None = None,
    source: SourceMetadata | None = None,
) -> bytes:
    """The file's bytes: lossless PNG or TIFF at the picture's bit depth, or an 8-bit access copy as JPEG or WebP.

    source: the scan's EXIF and XMP, kept as far as the format has room: a JPEG has 64 kB for each. A JPEG shows
    transparent pictures on white, and an access copy that is too long for its format is scaled down. The same
    arguments give the same bytes.
    """
    source = source or SourceMetadata()
    xmp = xmp_packet(provenance, source.xmp) if provenance is not None else source.xmp
    if image_format == "png":
        return _png(picture, source.exif, xmp)
    if image_format == "tiff":
        return _tiff(picture.pixels, source.exif, xmp)
    image = picture.to_pil()
    image.thumbnail((_MAX_SIDE_PX[image_format],) * 2)  # only makes it smaller
    if image_format == "jpeg" and image.mode == "RGBA":
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image).convert("RGB")
    exif = source.exif or b""
    options: dict[str, object] = {"quality": 90, "method": 4}
    if image_format == "jpeg":
        options = {"quality": 92, "subsampling": 0, "dpi": _dpi(exif) or (0, 0)}
        exif = exif if len(exif) <= _MAX_JPEG_EXIF_BYTES else b""
        if xmp is not None and len(xmp) > _MAX_JPEG_XMP_BYTES:
            xmp = xmp_packet(provenance) if provenance is not None else None
    buffer = io.BytesIO()
    image.save(buffer, image_format, icc_profile=srgb_profile(), exif=exif, xmp=xmp or b"", **options)
    return buffer.getvalue()


@cache
def srgb_profile() -> bytes:
    """An sRGB ICC profile without its date of creation, so that it is always the same."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + bytes(12) + profile[36:]


def xmp_packet(provenance: Provenance, source_xmp: bytes | None = None) -> bytes:
    """XMP that says what made a picture, added to the source's own XMP.

    Prompts are data: everything is escaped, and characters that XML cannot hold are dropped. A source packet is
    ignored if it is damaged, nested without end, or declares entities.
    """
    ext, own, rdf_prefix = ("{" + _NAMESPACES[name] + "}" for name in ("Iptc4xmpExt", "diffcolor", "rdf"))
    root, rdf = _parsed(source_xmp) or (None, None)
    if root is None or rdf is None:
        root = ElementTree.Element("{" + _NAMESPACES["x"] + "}xmpmeta")
        rdf = ElementTree.SubElement(root, f"{rdf_prefix}RDF")
    values = {
        f"{ext}DigitalSourceType": DIGITAL_SOURCE_TYPE,
        f"{ext}AISystemUsed": "DiffColor (arXiv 2308.01655)",
        f"{ext}AISystemVersionUsed": f"{provenance.software}, {provenance.model}",
        f"{ext}AIPromptInformation": provenance.prompt,
        "{" + _NAMESPACES["xmp"] + "}CreatorTool": provenance.software,
        f"{own}model": provenance.model,
        f"{own}prompt": provenance.prompt,
    }
    if provenance.run_id is not None:
        values[f"{own}runId"] = provenance.run_id
    if provenance.seed is not None:
        values[f"{own}seed"] = str(provenance.seed)
    for description in rdf:
        for name in values:
            description.attrib.pop(name, None)
            for child in description.findall(name):
                description.remove(child)
    ours = ElementTree.SubElement(rdf, f"{rdf_prefix}Description", {f"{rdf_prefix}about": ""})
    for name, value in values.items():
        ElementTree.SubElement(ours, name).text = _NOT_XML.sub("", value)
    try:
        body = ElementTree.tostring(root, encoding="utf-8")
    except RecursionError:  # thousands of elements within each other
        return xmp_packet(provenance)
    return b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>' + body + b'<?xpacket end="r"?>'


def _parsed(packet: bytes | None) -> tuple[ElementTree.Element, ElementTree.Element] | None:
    if not packet or len(packet) > 1_000_000 or b"<!" in packet:  # no entities, no document types
        return None
    try:
        root = ElementTree.fromstring(packet.strip(b"\0 \r\n"))
    except (ElementTree.ParseError, ValueError):
        return None
    rdf = next(root.iter("{" + _NAMESPACES["rdf"] + "}RDF"), None)
    return None if rdf is None else (root, rdf)


def _tags(exif: bytes | None) -> Image.Exif:
    tags = Image.Exif()
    tags.load(exif or b"")
    return tags


def _dpi(exif: bytes | None) -> tuple[float, float] | None:
    tags = _tags(exif)
    scale = {2: 1.0, 3: 2.54}.get(tags.get(296, 0))  # ResolutionUnit: inch, centimetre
    return None if scale is None else (float(tags[282]) * scale, float(tags[283]) * scale)


def _png(picture: Picture, exif: bytes | None, xmp: bytes | None) -> bytes:
    """The picture's PNG, with profile, resolution, EXIF and XMP in chunks before its data."""
    plain = picture.encode_png()
    after_header = 8 + 25  # signature, IHDR
    chunks = [_png_chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(srgb_profile(), 9))]
    dpi = _dpi(exif)
    if dpi is not None:
        chunks.append(_png_chunk(b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in dpi), 1)))
    if exif:
        chunks.append(_png_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")))
    if xmp:
        chunks.append(_png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    return plain[:after_header] + b"".join(chunks) + plain[after_header:]


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _tiff(pixels: np.ndarray, exif: bytes | None, xmp: bytes | None) -> bytes:
    """A deflated TIFF of 8 or 16 bits. Of EXIF it keeps the tags that are TIFF's own."""
    tags = _tags(exif)
    # Pillow reads all text as Latin-1, so Latin-1 gives back the original bytes
    extra: list[tuple[int, int, int, object, bool]] = [
        (tag, 2, 0, str(tags[tag]).encode("latin-1"), True) for tag in _TIFF_TAGS if tag in tags
    ]
    if xmp:
        extra.append((700, 1, len(xmp), xmp, True))
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        pixels,
        photometric="rgb",
        compression="zlib",
        extrasamples=["unassalpha"] if pixels.shape[-1] == 4 else None,
        resolution=(float(tags[282]), float(tags[283])) if 282 in tags else None,
        resolutionunit=tags.get(296),
        iccprofile=srgb_profile(),
        extratags=extra,
        metadata=None,
        software=False,
    )
    return buffer.getvalue()
