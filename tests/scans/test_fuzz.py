"""Any bytes give a scan or an UnreadableImageError, and nothing else: an archive cannot be trusted."""

import io

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from diffcolor_core import UnreadableImageError, read_scan
from support.pictures import gray_picture

BUDGET = settings(max_examples=300, deadline=None)
FORMATS = {
    "PNG": {},
    "JPEG": {},
    "TIFF": {"compression": "tiff_lzw"},
    "WEBP": {},
    "GIF": {},
    "BMP": {},
    "JPEG2000": {},
    "PPM": {},
    "AVIF": {},
    "PCX": {},
    "SGI": {},
}


def encoded(name: str) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(gray_picture(24, 32)).save(sink, name, **FORMATS[name])
    return sink.getvalue()


def read(data: bytes) -> None:
    try:
        scan = read_scan(data)
    except UnreadableImageError:
        return
    assert np.isfinite(scan.lightness.numpy()).all()
    assert 0 <= float(scan.lightness.min()) <= float(scan.lightness.max()) <= 100.01


@pytest.mark.parametrize("name", FORMATS)
@BUDGET
@given(data=st.data())
def test_a_damaged_picture(name, data):
    whole = bytearray(encoded(name))
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    read(bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole))


@BUDGET
@given(data=st.binary(max_size=400), head=st.sampled_from([encoded(name)[:24] for name in FORMATS]))
def test_noise_after_a_good_beginning(data, head):
    read(head + data)
