"Images: every mode and fault ends in a bounded RGB picture or in one MedchatError."
import io, struct, zlib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from medchat.core import MedchatError
from medchat.images import image_info, load_image, to_8bit

rng = np.random.default_rng(0)
ramp = np.tile(np.arange(256, dtype="uint8"), (64, 1))
colour = Image.fromarray(np.stack([ramp, ramp[:, ::-1], np.full_like(ramp, 60)], 2))

def encode(im, format, **kw): b = io.BytesIO(); im.save(b, format, **kw); return b.getvalue()
def rgb(source, **kw): return np.asarray(load_image(source, **kw)).astype(int)

@pytest.mark.parametrize("format,kw,tolerance", [("PNG", {}, 0), ("BMP", {}, 0), ("TIFF", {}, 0), ("TIFF", dict(compression="tiff_lzw"), 0), ("PPM", {}, 0),
    ("WEBP", dict(lossless=True), 0), ("JPEG", dict(quality=98, subsampling=0), 4), ("JPEG2000", {}, 4), ("GIF", {}, 70)])
def test_formats(format, kw, tolerance):
    data = encode(colour, format, **kw)
    assert abs(rgb(data) - np.asarray(colour)).max() <= tolerance
    assert image_info(data)["format"] == format

def test_cmyk_jpeg_as_in_pathvqa(tmp_path):
    "A CMYK JPEG comes back in its colours, not as its negative."
    colour.convert("CMYK").save(tmp_path/"cmyk.jpg", quality=98, subsampling=0)
    assert Image.open(tmp_path/"cmyk.jpg").mode == "CMYK"
    assert abs(rgb(tmp_path/"cmyk.jpg") - np.asarray(colour)).mean() < 4

@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_tiff_of_both_byte_orders(order, tmp_path):
    deep = (ramp.astype(int) * 16).astype(order)
    Image.fromarray(deep).save(tmp_path/"deep.tif")
    out = rgb(tmp_path/"deep.tif")
    assert abs(out[..., 0] - ramp).max() <= 3 and len(np.unique(out)) > 200

@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I", "F"])
def test_deep_modes(mode):
    if mode in ("I", "F"): im = Image.fromarray((ramp * 16.0).astype({"I": "int32", "F": "float32"}[mode]))
    else: im = Image.frombytes(mode, (256, 64), (ramp.astype(int) * 16).astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    assert im.mode == mode
    out = rgb(im)
    assert out.min() == 0 and out.max() == 255 and (out == 255).mean() < .05 # Pillow alone makes 93% of this ramp white

def test_signed_and_negative_values():
    out = rgb(Image.fromarray(ramp.astype("int32") - 2000))
    assert abs(out[..., 0] - ramp).max() <= 3

@pytest.mark.parametrize("array,expected", [(np.full((4, 4), 7), 0), (np.full((4, 4), np.nan), 0), (np.zeros((0, 4)), None)])
def test_window_of_nothing(array, expected):
    out, _ = to_8bit(array)
    assert out.shape == array.shape and (expected is None or (out == expected).all())

def test_window_of_a_sparse_mask():
    "A mask whose percentiles coincide still shows what it holds."
    mask = np.zeros((100, 100)); mask[5, 5] = 3
    assert to_8bit(mask)[0][5, 5] == 255

@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_window_never_fails(values):
    out, (lo, hi) = to_8bit(np.array(values, "float32"))
    assert out.dtype == np.uint8 and np.isfinite([lo, hi]).all() and lo <= hi

def test_transparency_is_black():
    for im in (Image.new("RGBA", (8, 8), (255, 255, 255, 0)), Image.new("LA", (8, 8), (255, 0))): assert rgb(im).max() == 0
    half = Image.new("RGBA", (8, 8), (200, 100, 50, 128))
    assert abs(rgb(half)[0, 0] - [100, 50, 25]).max() <= 1

def test_palette_and_its_transparent_colour():
    p = Image.new("P", (8, 8), 0); p.putpalette([250, 200, 150, 10, 20, 30]); p.putpixel((0, 0), 1)
    assert rgb(p)[1, 1].tolist() == [250, 200, 150]
    assert rgb(encode(p, "PNG", transparency=0))[1, 1].tolist() == [0, 0, 0]
    assert rgb(encode(p, "PNG", transparency=0))[0, 0].tolist() == [10, 20, 30]

def test_grey_png_with_transparent_grey():
    assert rgb(encode(Image.new("L", (8, 8), 90), "PNG", transparency=90)).max() == 0

@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif(orientation, tmp_path):
    exif = Image.Exif(); exif[274] = orientation
    small = Image.fromarray(rng.integers(0, 256, (40, 24, 3)).astype("uint8"))
    data = encode(small, "PNG", exif=exif)
    back = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
            6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90}[orientation]
    assert (rgb(data) == back(np.asarray(small))).all()
    assert image_info(data)["turned"] == (orientation != 1)
    assert not load_image(data).getexif() and not load_image(data).info

def test_turned_once():
    "A picture that came out of `load_image` is not turned again."
    exif = Image.Exif(); exif[274] = 6
    once = load_image(encode(colour, "JPEG", exif=exif))
    assert (rgb(once) == np.asarray(once)).all()

def test_animated_takes_the_first_frame():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    assert rgb(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0] # tolerance: pure palette colours
    assert rgb(encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]

@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 300))
def test_bounded(w, h, side):
    out = load_image(Image.new("L", (w, h), 9), max_side=side).size
    assert max(out) <= side or out == (w, h) and max(w, h) <= side
    assert max(out) == min(side, max(w, h)) and min(out) >= 1
    if min(out) > 1: assert abs(out[0] / out[1] - w / h) <= (w / h) * (.5 / min(out) + .5 / max(out) + 1e-6) * 2

def test_small_pictures_keep_their_pixels(): assert (rgb(encode(colour, "PNG")) == np.asarray(colour)).all()

def test_thin_line_survives_shrinking():
    a = np.zeros((2000, 2000), "uint8"); a[:, 1001] = 255
    assert rgb(Image.fromarray(a), max_side=250).max() > 15

def test_no_bound(): assert load_image(Image.new("L", (1500, 20)), max_side=None).size == (1500, 20)

def test_source_kinds_agree(tmp_path):
    path = tmp_path/"äöü ✓ #1?.png"; colour.save(path)
    data = path.read_bytes()
    for source in (path, str(path), data, bytearray(data), memoryview(data), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, colour):
        assert (rgb(source) == np.asarray(colour)).all()

def test_the_given_picture_is_not_changed():
    im = Image.fromarray(ramp.astype("int32")); before = np.asarray(im).copy()
    load_image(im, max_side=10)
    assert im.mode == "I" and (np.asarray(im) == before).all()

def bomb(side):
    "A valid PNG header that promises side x side pixels."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")

@pytest.mark.parametrize("side", [9_500, 14_000, 60_000])
def test_decompression_bomb(side, recwarn):
    with pytest.raises(MedchatError, match="image too large"): load_image(bomb(side))
    assert not recwarn.list

@pytest.mark.parametrize("data,problem", [(b"", "empty image file"), (b"\0", "not an image"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"), (b"<html>404</html>", "not an image"),
    (encode(colour, "PNG")[:200], "damaged image"), (encode(colour, "JPEG")[:-600], "damaged image")])
def test_bad_bytes(data, problem, tmp_path):
    (tmp_path/"bad.png").write_bytes(data)
    for source in (data, tmp_path/"bad.png"):
        with pytest.raises(MedchatError, match=problem) as e: load_image(source)
        assert "\n" not in str(e.value)
    assert "bad.png" in str(e.value)

@pytest.mark.parametrize("source,problem", [("nowhere/x.png", "no such image"), (".", "not an image file"), ("/dev/null", "not an image file"), ("a\0b.png", "cannot read|no such"),
    (None, "not an image: NoneType"), (7, "not an image: int"), ({"bytes": None, "path": None}, "empty image"), ("x" * 5000, "cannot read|no such")])
def test_bad_sources(source, problem):
    with pytest.raises(MedchatError, match=problem): load_image(source)

def test_bad_bound():
    with pytest.raises(MedchatError, match="max_side"): load_image(colour, max_side=0)

SEEDS = [encode(colour, "PNG"), encode(colour, "JPEG"), encode(colour.convert("CMYK"), "JPEG"), encode(colour, "GIF"), encode(colour, "TIFF"), encode(colour, "WEBP"),
         encode(colour, "BMP"), encode(colour, "JPEG2000"), encode(Image.fromarray(ramp.astype("uint16") * 9), "PNG"), encode(Image.fromarray(ramp.astype("uint16") * 9), "TIFF"), encode(colour.convert("P"), "PNG")]

@settings(max_examples=500)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=0, max_size=6), st.integers(0, 3)), min_size=1, max_size=5))
def test_damaged_bytes(data, hits):
    "Whatever is cut, written over or left out: a picture, or a MedchatError of one line."
    data = bytearray(data)
    for at, junk, kind in hits:
        at %= max(1, len(data))
        if kind == 0: data = data[:at]
        elif kind == 1: data[at:at + len(junk)] = junk
        elif kind == 2: data[at:at] = junk
        else: del data[at:at + len(junk)]
    try: out = load_image(bytes(data), max_side=64)
    except MedchatError as e: assert "\n" not in str(e); return
    assert out.mode == "RGB" and max(out.size) <= 64

@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_random_bytes(data):
    with pytest.raises(MedchatError): load_image(data)

def test_real_pictures(real_data):
    "All modes and sizes of the published sets at hand."
    files = [*real_data.glob("vqa_rad/data_RAD/images/*.jpg")][:25] + [*real_data.glob("nih_cxr14_sample/**/*.png")] + [*real_data.glob("llava_med/**/*.jpg")] + [*real_data.glob("rocov2/**/*.jpg")]
    assert len(files) > 30
    for f in files:
        im = load_image(f); assert im.mode == "RGB" and max(im.size) <= 1024 and np.asarray(im).std() > 1

@pytest.mark.parametrize("mode", ["LAB", "HSV", "YCbCr", "RGBX", "La", "RGBa", "PA"])
def test_rare_modes(mode):
    im = Image.frombytes(mode, (8, 8), bytes(range(64)) * len(Image.new(mode, (1, 1)).tobytes()))
    assert load_image(im).mode == "RGB" and load_image(im).size == (8, 8)

def test_lab_tiff(): assert image_info(encode(Image.new("LAB", (8, 8), (200, 128, 128)), "TIFF"))["mode"] == "LAB"

def test_truncated_picture_that_was_only_opened(tmp_path):
    (tmp_path/"cut.png").write_bytes(encode(colour, "PNG")[:200])
    with pytest.raises(MedchatError, match="damaged image"): load_image(Image.open(tmp_path/"cut.png"))
