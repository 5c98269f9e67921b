"Letters in pictures: seen where they are, and odd pictures endured."
import random
import numpy as np
import pytest
from PIL import Image, ImageDraw
from medchat.letters import TEXT_SUSPECT, looks_like_text, text_boxes

def test_letters_are_seen_and_odd_pictures_are_endured():
    im = Image.new("L", (300, 200), 60); assert looks_like_text(im) == 0
    ImageDraw.Draw(im).text((40, 90), "SMITHSON ANN 1954", fill=200)
    assert looks_like_text(im) >= 0.5 and looks_like_text(Image.eval(im, lambda v: 255 - v)) >= 0.5
    l, t, r, b = text_boxes(im)[0]
    assert 30 <= l < r <= 160 and 85 <= t < b <= 110
    for size in ((1, 1), (3, 2), (5, 400), (2000, 4)): assert looks_like_text(Image.new("RGB", size, "white")) == 0
    ruler = Image.new("L", (300, 300)); [ImageDraw.Draw(ruler).line((280, y, 292, y), fill=255) for y in range(10, 290, 10)]
    assert looks_like_text(ruler) < 0.5
    assert looks_like_text(Image.effect_noise((256, 256), 30)) < 0.5

def test_every_vqa_rad_image_has_its_watermark_found(real_data):
    files = sorted((real_data/"vqa_rad"/"data_RAD"/"images").glob("*.jpg"))[::40]
    assert all(looks_like_text(Image.open(f)) >= 0.5 for f in files)

@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_any_mode(mode):
    im = Image.new("L", (300, 200), 60); ImageDraw.Draw(im).text((40, 90), "SMITHSON ANN 1954", fill=250)
    im = Image.fromarray(np.asarray(im).astype(np.uint16)) if mode == "I;16" else im.convert(mode) if mode != "CMYK" else im.convert("RGB").convert("CMYK")
    assert 0 <= looks_like_text(im) <= 1 and (mode in ("1", "I;16") or looks_like_text(im) >= TEXT_SUSPECT)

def test_fuzz_boxes_lie_in_the_picture():
    rng = random.Random(5)
    for k in range(40):
        w, h = rng.randint(1, 90), rng.randint(1, 90)
        a = np.random.default_rng(k).integers(0, rng.choice([2, 30, 256]), (h, w)).astype(np.uint8) * rng.choice([1, 255])
        assert all(0 <= l < r <= w + 2 and 0 <= t < b <= h + 2 for l, t, r, b in text_boxes(Image.fromarray(a)))
