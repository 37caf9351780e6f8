import io
import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffcolor_core import Picture, read_picture, read_scan
from diffcolor_scans.decoding import SourceMetadata
from diffcolor_scans.formats import DIGITAL_SOURCE_TYPE, SUFFIX, Provenance, encode, xmp_packet

PROVENANCE = Provenance(
    software="DiffColor Archive 0.1.0",
    model="demo (sha256:1)",
    prompt="a <red> ball & 'box' \0 é",
    run_id="run-1",
    seed=7,
)
EIGHT = Picture(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
SIXTEEN = Picture(np.random.default_rng(0).integers(0, 65536, (24, 40, 4), dtype=np.uint16))


def jpeg_with_metadata() -> bytes:
    exif = Image.Exif()
    exif[271], exif[315], exif[33432], exif[274] = "Kodak", "A. Photographer", "The Archive", 6
    exif.get_ifd(0x8769)[36867] = "1905:01:02 03:04:05"
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" dc:source="box 12"/>'
        b"</rdf:RDF></x:xmpmeta>"
    )
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 30), 90, np.uint8)).save(buffer, "JPEG", exif=exif, xmp=xmp)
    return buffer.getvalue()


@pytest.mark.parametrize("image_format", ["png", "tiff"])
@pytest.mark.parametrize("picture", [EIGHT, SIXTEEN], ids=["8 bit", "16 bit with alpha"])
def test_lossless_formats_keep_every_sample(image_format, picture):
    data = encode(picture, image_format, PROVENANCE)
    back = read_picture(data)
    assert back.pixels.dtype == picture.pixels.dtype
    np.testing.assert_array_equal(back.pixels, picture.pixels)
    assert encode(picture, image_format, PROVENANCE) == data


@pytest.mark.parametrize("image_format", SUFFIX)
@pytest.mark.parametrize("picture", [EIGHT, SIXTEEN], ids=["8 bit", "16 bit with alpha"])
def test_every_format_has_an_srgb_profile_and_opens(image_format, picture):
    with Image.open(io.BytesIO(encode(picture, image_format, PROVENANCE))) as image:
        image.load()
        assert image.size == (40, 24)
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        assert "sRGB" in ImageCms.getProfileDescription(profile)


@pytest.mark.parametrize("image_format", SUFFIX)
@pytest.mark.parametrize("picture", [EIGHT, SIXTEEN], ids=["8 bit", "16 bit with alpha"])
def test_exiftool_reads_what_made_the_picture(tmp_path, image_format, picture):
    if shutil.which("exiftool") is None:
        pytest.skip("exiftool is not installed (Debian: libimage-exiftool-perl)")
    path = tmp_path / f"picture{SUFFIX[image_format]}"
    path.write_bytes(encode(picture, image_format, PROVENANCE, read_scan(jpeg_with_metadata()).metadata))
    done = subprocess.run(["exiftool", "-j", "-G1", "-n", str(path)], capture_output=True, check=True, text=True)
    (found,) = json.loads(done.stdout)
    assert found["XMP-iptcExt:DigitalSourceType"] == DIGITAL_SOURCE_TYPE
    assert found["XMP-xmp:CreatorTool"] == "DiffColor Archive 0.1.0"
    assert found["XMP-diffcolor:Prompt"] == "a <red> ball & 'box'  é"
    assert found["XMP-diffcolor:RunId"] == "run-1"
    assert found["XMP-dc:Source"] == "box 12"
    assert found["IFD0:Artist"] == "A. Photographer"
    assert found["IFD0:Copyright"] == "The Archive"
    assert found.get("IFD0:Orientation", 1) == 1
    assert "ExifTool:Error" not in found
    assert "ExifTool:Warning" not in found


def test_a_rotated_scan_is_upright_and_says_so():
    scan = read_scan(jpeg_with_metadata())
    assert (scan.height_px, scan.width_px) == (30, 20)
    exif = Image.Exif()
    exif.load(scan.metadata.exif)
    assert 274 not in exif
    assert exif.get_ifd(0x8769)[36867] == "1905:01:02 03:04:05"


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"not xml",
        b"<a/>",
        b'<!DOCTYPE a [<!ENTITY e "x">]><x:xmpmeta xmlns:x="adobe:ns:meta/">&e;</x:xmpmeta>',
        b"\xff\xfe" + bytes(100),
    ],
)
def test_damaged_or_dangerous_xmp_of_the_source_is_passed_over(packet):
    assert xmp_packet(PROVENANCE, packet) == xmp_packet(PROVENANCE)


def test_the_source_does_not_speak_for_us():
    """A source that claims another DigitalSourceType loses that claim, and keeps the rest."""
    packet = xmp_packet(Provenance("other software", "model", "prompt"))
    ours = xmp_packet(PROVENANCE, packet).decode()
    assert ours.count("DigitalSourceType>") == 2  # one element: its start and its end
    assert "other software" not in ours


def test_jpeg_lays_transparency_on_white():
    pixels = np.zeros((8, 8, 4), np.uint8)
    picture = read_picture(encode(Picture(pixels), "jpeg", PROVENANCE, SourceMetadata()))
    assert picture.pixels.min() > 250


def nested_xmp(depth: int) -> bytes:
    body = "<rdf:li>" * depth + "</rdf:li>" * depth
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f"<rdf:Description>{body}</rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


def test_xmp_nested_without_end_is_passed_over():
    assert xmp_packet(PROVENANCE, nested_xmp(3000)) == xmp_packet(PROVENANCE)
    assert b"rdf:li" in xmp_packet(PROVENANCE, nested_xmp(30))


@pytest.mark.parametrize("image_format", SUFFIX)
@pytest.mark.parametrize("provenance", [PROVENANCE, None], ids=["marked", "unmarked"])
def test_metadata_too_large_for_a_container_costs_no_picture(image_format, provenance):
    exif = Image.Exif()
    exif[270] = "a" * 70_000
    large = SourceMetadata(exif.tobytes(), xmp_packet(PROVENANCE)[:-20] + b" " * 70_000 + b'<?xpacket end="r"?>')
    data = encode(EIGHT, image_format, provenance, large)
    assert read_picture(data).pixels.shape == EIGHT.pixels.shape
    if provenance is not None:
        assert DIGITAL_SOURCE_TYPE.encode() in data
    if image_format != "jpeg":
        assert b"a" * 70_000 in data


@pytest.mark.parametrize(("image_format", "limit"), [("jpeg", 65_500), ("webp", 16_383)])
def test_an_access_copy_fits_its_format(image_format, limit):
    long = Picture(np.full((2, 66_000, 3), 90, np.uint8))
    assert read_picture(encode(long, image_format)).pixels.shape[1] == limit


@pytest.mark.parametrize("image_format", ["png", "tiff"])
def test_a_primary_is_never_scaled(image_format):
    long = Picture(np.full((2, 66_000, 3), 90, np.uint8))
    assert read_picture(encode(long, image_format)).pixels.shape == (2, 66_000, 3)


@pytest.mark.parametrize("image_format", SUFFIX)
def test_resolution_and_text_beyond_ascii_are_kept(image_format):
    exif = Image.Exif()
    exif[270], exif[282], exif[283], exif[296], exif[274] = "Zürich 東京".encode(), 400.0, 300.0, 3, 6
    exif.get_ifd(0x8769)[42036] = "Zeiß".encode()  # lens model
    source = io.BytesIO()
    Image.fromarray(np.full((20, 30), 90, np.uint8)).save(source, "JPEG", exif=exif)
    data = encode(EIGHT, image_format, PROVENANCE, read_scan(source.getvalue()).metadata)
    with Image.open(io.BytesIO(data)) as image:
        found = image.getexif()
        assert found[270].encode("latin-1").decode() == "Zürich 東京"
        assert (found[282], found[283], found[296]) == (300, 400, 3)  # turned upright
        if image_format != "tiff":  # keeps TIFF's own tags only
            assert found.get_ifd(0x8769)[42036] == "Zeiß".encode()
        if image_format != "webp":
            assert image.info["dpi"] == pytest.approx((300 * 2.54, 400 * 2.54), abs=0.5)


def test_the_resolution_of_a_jpegs_own_header_is_kept():
    source = io.BytesIO()
    Image.fromarray(np.full((20, 30), 90, np.uint8)).save(source, "JPEG", dpi=(600, 600))
    data = encode(EIGHT, "tiff", PROVENANCE, read_scan(source.getvalue()).metadata)
    with Image.open(io.BytesIO(data)) as image:
        assert image.info["dpi"] == (600, 600)


@pytest.mark.parametrize("resolution", [0.0, 1e9, 1e-9])
@pytest.mark.parametrize("image_format", SUFFIX)
def test_an_absurd_resolution_is_none(image_format, resolution):
    exif = Image.Exif()
    exif[270], exif[282], exif[283] = "", resolution, resolution
    source = io.BytesIO()
    Image.fromarray(np.full((20, 30), 90, np.uint8)).save(source, "JPEG", exif=exif)
    data = encode(EIGHT, image_format, PROVENANCE, read_scan(source.getvalue()).metadata)
    assert read_picture(data).pixels.shape == EIGHT.pixels.shape
