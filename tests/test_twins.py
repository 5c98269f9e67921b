"Twins: fingerprints of odd pictures, the search against brute force, limits on memory and wrong input."
import io, tracemalloc
import numpy as np, pytest
from PIL import Image, ImageOps
from hypothesis import given, settings, strategies as st
from medchat.core import MedchatError
from medchat.images import load_image
from medchat.samples import FINDINGS, draw_phantom
from medchat.twins import BITS, COARSE, FINGERPRINT_BYTES, LIKENESS, compare, find_twins, fingerprint, twin_groups
from medchat.twins import _apart

def film(patient, findings={}, size=None, visit=0):
    im = Image.fromarray(draw_phantom(findings, patient=patient, visit=visit))
    return im if size is None else im.resize((size, size), Image.Resampling.BICUBIC)

def saved(im, format, **kw):
    f = io.BytesIO(); im.save(f, format, **kw)
    return Image.open(io.BytesIO(f.getvalue()))

def is_twin(a, b): return bool(find_twins([a, b]))

@pytest.fixture(scope="module")
def one(): return film(3, {"nodule": "left upper"}, 400)

# ---- fingerprints

def test_layout_and_repeat(one):
    print_ = fingerprint(one)
    assert len(print_) == FINGERPRINT_BYTES == 1056 and isinstance(print_, bytes)
    assert fingerprint(one) == print_ == fingerprint(one.copy())
    assert bin(int.from_bytes(print_[:32], "big")).count("1") == 128 # a median splits the bits in halves

def test_the_value_stays(one):
    "A fingerprint that is stored must mean the same in the next version, and on another machine."
    import hashlib
    ramp = (np.add.outer(np.arange(200) ** 2 // 400, np.arange(150) * 3 // 4) * 7 // 5 % 256).astype(np.uint8)
    assert hashlib.sha256(fingerprint(Image.fromarray(ramp))).hexdigest()[:16] == "22d684983fbd6b17"

def test_the_picture_is_not_changed(one):
    im = one.convert("RGB"); before = im.tobytes()
    fingerprint(im)
    assert im.tobytes() == before and im.mode == "RGB" and im.size == (400, 400)

def test_modes_agree_with_load_image(one):
    "A raw decoded picture has the fingerprint of what `load_image` makes of it."
    rgb = one.convert("RGB")
    deep = Image.fromarray((np.asarray(one).astype(np.uint16) * 13 + 100))
    odd = Image.merge("RGBA", (*rgb.split(), Image.linear_gradient("L").resize(one.size)))
    for im in (one, rgb, odd, deep, one.convert("CMYK"), rgb.convert("P"), one.convert("LA"), one.convert("F"), one.convert("I"), one.point(lambda v: 255 * (v > 120)).convert("1"), rgb.convert("YCbCr")):
        assert fingerprint(im) == fingerprint(load_image(im, max_side=None)), im.mode

@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns(one, turn):
    exif = Image.Exif(); exif[274] = turn
    im = saved(one.resize((400, 300)), "JPEG", quality=95, exif=exif)
    assert compare(fingerprint(im), fingerprint(load_image(im)))[0] <= 12
    assert is_twin(fingerprint(im), fingerprint(load_image(im)))

def test_transparent_palette():
    im = film(4).convert("P"); im.info["transparency"] = 0
    assert fingerprint(im) == fingerprint(load_image(im))

@pytest.mark.parametrize("size", [(1, 1), (2, 500), (500, 2), (3, 3), (64, 64), (193, 7), (1, 4000)])
def test_any_size(size):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, size[::-1], dtype=np.uint8))
    assert len(fingerprint(noise)) == FINGERPRINT_BYTES

# ---- blank pictures

def test_blank_matches_only_itself():
    blanks = [Image.new("L", (90, 90), v) for v in (0, 1, 128, 255)] + [Image.new("L", (90, 91)), Image.new("RGB", (90, 90), (9, 9, 9))]
    noisy = [Image.fromarray(np.random.default_rng(s).integers(100, 102, (90, 90), dtype=np.uint8)) for s in range(6)]
    corner = []
    for v in (200, 255):
        im = Image.new("L", (400, 400)); im.paste(v, (2, 2, 20, 10)); corner.append(im)
    prints = [fingerprint(im) for im in blanks + noisy + corner + [film(1)]]
    assert find_twins(prints) == [] and twin_groups(prints) == []
    again = [fingerprint(blanks[0].convert("RGB")), fingerprint(noisy[2])]
    assert find_twins(prints + again) == [(0, len(prints), 0), (8, len(prints) + 1, 0)]
    assert compare(prints[0], prints[0]) == (0, 1.0) and compare(prints[0], prints[-1]) == (256, 0.0)

def test_a_smooth_ramp_matches_nothing_else():
    ramps = [fingerprint(Image.linear_gradient("L")), fingerprint(ImageOps.invert(Image.linear_gradient("L"))), fingerprint(Image.radial_gradient("L"))]
    assert find_twins(ramps + [fingerprint(film(p)) for p in range(5)]) == []

# ---- what is a twin

COPIES = {"png": lambda im: saved(im, "PNG"), "jpeg 50": lambda im: saved(im, "JPEG", quality=50), "webp": lambda im: saved(im, "WEBP", quality=60), "small": lambda im: im.resize((100, 100)),
          "large": lambda im: im.resize((800, 800)), "squeezed": lambda im: im.resize((336, 224)), "gamma": lambda im: im.point(lambda v: 255 * (v / 255) ** .85), "dark": lambda im: im.point(lambda v: v * .8),
          "cut": lambda im: im.crop((4, 4, im.width - 4, im.height - 4)), "border": lambda im: ImageOps.expand(im, 6, 255), "rgb": lambda im: im.convert("RGB"),
          "16 bits": lambda im: Image.fromarray(np.asarray(im).astype(np.uint16) * 200 + 50)}

@pytest.mark.parametrize("way", COPIES)
def test_copies_are_found(way):
    for p in range(8):
        im = film(p, {"effusion": "left"} if p % 2 else {}, 400)
        assert is_twin(fingerprint(im), fingerprint(COPIES[way](im))), p

@pytest.mark.parametrize("way", ["mirror", "flip", "quarter", "half"])
def test_mirrored_and_turned_are_others(one, way):
    ways = {"mirror": ImageOps.mirror, "flip": ImageOps.flip, "quarter": lambda im: im.rotate(90), "half": lambda im: im.rotate(180)}
    assert not is_twin(fingerprint(one), fingerprint(ways[way](one)))

def test_patients_are_kept_apart():
    "The drawn films of 150 patients, with all findings: no pair."
    rng = np.random.default_rng(5)
    names = list(FINDINGS)
    prints = [fingerprint(film(5000 + p, {} if p % 3 == 0 else {(n := names[p % len(names)]): FINDINGS[n][rng.integers(len(FINDINGS[n]))]})) for p in range(150)]
    assert find_twins(prints) == []

@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=30)
def test_compare_is_symmetric_and_bounded(p, q):
    a, b = fingerprint(film(p)), fingerprint(film(q))
    bits, likeness = compare(a, b)
    assert compare(b, a) == (bits, pytest.approx(likeness, abs=1e-4))
    assert 0 <= bits <= 256 and likeness <= 1.0001 and (p != q or (bits, round(likeness, 4)) == (0, 1))

# ---- the search

def brute(prints, bits=BITS, likeness=LIKENESS):
    o = np.frombuffer(b"".join(prints), np.uint8).reshape(-1, FINGERPRINT_BYTES)
    i, j = np.triu_indices(len(o), 1)
    apart = _apart(o[i, :32], o[j, :32])
    near = (apart <= bits) & (_apart(o[i, :8], o[j, :8]) <= COARSE) & o[i, 32:].any(1) & o[j, 32:].any(1)
    i, j, apart = i[near], j[near], apart[near]
    good = np.array([compare(prints[a], prints[b])[1] >= likeness for a, b in zip(i, j)], dtype=bool) # one by one
    return sorted(zip(i[good].tolist(), j[good].tolist(), apart[good].tolist()))

def scattered(n, seed=0):
    "Fingerprints in clusters, with hashes 0 to 80 bits from the first of their cluster."
    rng = np.random.default_rng(seed)
    bases = [np.frombuffer(fingerprint(film(p)), np.uint8) for p in range(20)]
    made = []
    for _ in range(n):
        row = bases[rng.integers(20)].copy()
        for bit in rng.choice(256, rng.integers(0, 80), replace=False): row[bit // 8] ^= 1 << (bit % 8)
        made.append(row.tobytes())
    return made

@pytest.mark.parametrize("bits,likeness", [(BITS, LIKENESS), (10, 0.9), (75, 0.6)])
def test_search_equals_brute_force(bits, likeness):
    prints = scattered(250)
    found = find_twins(prints, bits, likeness)
    assert found == brute(prints, bits, likeness) and len(found) > 10

def test_search_over_several_blocks():
    "More rows than one block of the product of matrices, twins at its borders."
    rng = np.random.default_rng(1)
    prints = np.frombuffer(b"".join(scattered(1)), np.uint8).repeat(2600).reshape(FINGERPRINT_BYTES, 2600).T.copy()
    prints[:, :32] = rng.integers(0, 256, (2600, 32))
    pairs = [(0, 2599), (511, 512), (2047, 2048), (100, 101), (511, 2559), (512, 2048 + 511)]
    pairs = [(a, b) for k, (a, b) in enumerate(pairs) if not {a, b} & {x for p in pairs[:k] for x in p}]
    for a, b in pairs: prints[b] = prints[a]; prints[b, 31] ^= 5
    assert find_twins(prints) == [(a, b, 2) for a, b in sorted(pairs)]
    assert twin_groups(prints) == [[a, b] for a, b in sorted(pairs)]

def components(n, pairs):
    up = list(range(n))
    def root(i):
        while up[i] != i: i = up[i]
        return i
    for i, j, _ in pairs:
        a, b = sorted((root(i), root(j))); up[b] = a
    groups = {}
    for i in range(n): groups.setdefault(root(i), []).append(i)
    return [g for g in groups.values() if len(g) > 1]

@pytest.mark.parametrize("seed", range(4))
def test_groups_are_the_components_of_the_pairs(seed):
    prints = scattered(200, seed) + [fingerprint(Image.new("L", (9, 9), v)) for v in (0, 5, 0)]
    prints += prints[:7]
    assert twin_groups(prints) == components(len(prints), find_twins(prints))

def test_order_does_not_matter():
    prints = scattered(150, 3)
    order = np.random.default_rng(0).permutation(len(prints)).tolist()
    moved = {tuple(sorted((order[i], order[j]))) for i, j, _ in find_twins([prints[k] for k in order])}
    assert moved == {(i, j) for i, j, _ in find_twins(prints)}

def test_forms_of_input():
    prints = scattered(30)
    array = np.frombuffer(b"".join(prints), np.uint8).reshape(30, -1)
    assert find_twins(prints) == find_twins(array) == find_twins(list(array)) == find_twins(tuple(map(bytearray, prints)))
    assert find_twins([]) == twin_groups([]) == find_twins(prints[:1]) == twin_groups(prints[:1]) == []
    assert find_twins(np.zeros((0, FINGERPRINT_BYTES), np.uint8)) == []

@pytest.mark.parametrize("bad", [[b""], [b"x" * 1055], [bytes(1056), b"x" * 1057]])
def test_wrong_input(bad):
    for f in find_twins, twin_groups:
        with pytest.raises(MedchatError, match="not a fingerprint: number"): f(bad)

def test_many_copies_stay_cheap():
    "3,000 copies of one picture are 4.5 million pairs: `twin_groups` keeps none of them."
    one = np.frombuffer(fingerprint(film(1)), np.uint8)
    rng, prints = np.random.default_rng(0), np.repeat(one[None], 3000, 0)
    for row in prints: row[rng.integers(0, 32)] ^= np.uint8(1 << rng.integers(8))
    tracemalloc.start()
    groups = twin_groups(prints)
    _, peak = tracemalloc.get_traced_memory(); tracemalloc.stop()
    assert groups == [list(range(3000))] and peak < 150e6

# ---- real pictures

def test_vqa_rad_has_no_twins(real_data):
    paths = sorted((real_data/"vqa_rad"/"data_RAD"/"images").glob("*.jpg"))
    if not paths: pytest.skip("no VQA-RAD")
    ims = [load_image(p, max_side=None) for p in paths[:60]]
    prints = [fingerprint(im) for im in ims]
    assert find_twins(prints) == []
    copies = [fingerprint(saved(im.resize((im.width // 2, im.height // 2)), "JPEG", quality=60)) for im in ims]
    assert [(i, j - len(ims)) for i, j, _ in find_twins(prints + copies)] == [(i, i) for i in range(len(ims))]

def test_one_slice_in_many_encodings(real_data):
    pydicom = pytest.importorskip("pydicom")
    from medchat.images import to_8bit
    names = ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "CT_small.dcm"]
    paths = [real_data/"dicom"/"pydicom"/n for n in names]
    if not all(p.is_file() for p in paths): pytest.skip("no DICOM files")
    prints = [fingerprint(Image.fromarray(to_8bit(pydicom.dcmread(p).pixel_array)[0])) for p in paths]
    assert twin_groups(prints) == [[0, 1, 2, 3]]
