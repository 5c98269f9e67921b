"Does it look: the changed images, whose image stands in for whose, and when a model is called blind."
import random
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from medchat.ablation import CHANGES, blank, blind_warnings, drop_of, flipped, noised, other_rows
from medchat.metrics import paired_difference, summarise
from question_maker import question

images = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99)).map(
    lambda x: Image.fromarray(np.random.default_rng(x[2]).integers(0, 256, (x[1], x[0], 3), dtype=np.uint8)))

# --- changed images

@given(images)
def test_a_changed_image_has_the_same_size_and_is_the_same_each_time(image):
    before = image.tobytes()
    for change in filter(None, CHANGES.values()):
        a, b = change(image), change(image.copy())
        assert (a.size, a.mode, a.tobytes()) == (image.size, "RGB", b.tobytes()) and image.tobytes() == before # and the original is left as it was

@given(images)
def test_flipped_twice_is_the_image(image):
    assert flipped(flipped(image)).tobytes() == image.tobytes()
    assert (np.asarray(flipped(image)) == np.asarray(image)[:, ::-1]).all()

@given(images, images)
def test_blank_tells_nothing_but_the_size(image, other):
    assert blank(image).getcolors() == [(image.width*image.height, (128, 128, 128))]
    assert blank(image).tobytes() == blank(other.resize(image.size)).tobytes()

def test_noise_is_heavy_and_not_the_same_for_two_images():
    grey = Image.new("RGB", (100, 100), (128, 128, 128))
    added = np.asarray(noised(grey), float) - 128
    assert abs(added.mean()) < 3 and 55 < added.std() < 64                         # 64, cut at both ends
    assert (added[..., 0] == added[..., 1]).all() and (added[..., 1] == added[..., 2]).all() # grey noise: no colours where there were none
    brighter = np.asarray(noised(Image.new("RGB", (100, 100), (129, 129, 129))), float) - 129
    assert abs(np.corrcoef(added[..., 0].ravel(), brighter[..., 0].ravel())[0, 1]) < .05
    white = np.asarray(noised(Image.new("RGB", (50, 50), "white")))
    assert white.min() >= 0 and (white == 255).mean() > .4                         # cut, not wrapped round

def test_changes_leave_the_seeds_alone():
    np.random.seed(3); random.seed(3); want = np.random.rand(), random.random()
    np.random.seed(3); random.seed(3)
    for change in filter(None, CHANGES.values()): change(Image.new("RGB", (9, 9)))
    assert (np.random.rand(), random.random()) == want

# --- somebody else's image

def split(*patients):
    "Questions on (patient, images, modality), a few each."
    return [question(3*i + k, group=p, paths=paths, text=f"Q{k}?", **({"modality": m} if m else {})) for i, (p, paths, m) in enumerate(patients) for k in range(3)]

some_patients = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 2), st.sampled_from(["", "CT", "MRI"])), min_size=1, max_size=9).map(
    lambda rows: split(*((p, [f"{p}{i}-{k}.png" for k in range(n)], m) for i, (p, n, m) in enumerate(rows))))

@given(some_patients, st.randoms())
def test_another_patient_as_many_images_the_same_modality(qs, rnd):
    rnd.shuffle(qs)
    rows, by_row = other_rows(qs), {q.row: q for q in qs}
    many, alike = {}, {}
    for q in qs: many.setdefault(len(q.image_paths), set()).add(q.group); alike.setdefault((len(q.image_paths), q.slices.get("modality")), set()).add(q.group)
    assert (rows is not None) == (min(map(len, many.values())) > 1)                  # everybody has somebody
    if rows is None: return
    assert len(rows) == len(qs)
    for q, row in zip(qs, rows):
        other = by_row[row]
        assert other.group != q.group and len(other.image_paths) == len(q.image_paths)
        if len(alike[len(q.image_paths), q.slices.get("modality")]) > 1: assert other.slices.get("modality") == q.slices.get("modality")

@given(some_patients, st.randoms())
def test_all_questions_on_one_image_get_the_same_other_one(qs, rnd):
    rnd.shuffle(qs)
    rows, of = other_rows(qs), {}
    for q, row in zip(qs, rows or []): of.setdefault(tuple(q.image_paths), set()).add(tuple(next(x for x in qs if x.row == row).image_paths))
    assert all(len(images) == 1 for images in of.values())

@given(some_patients, st.randoms())
def test_whose_image_it_is_does_not_depend_on_the_order(qs, rnd):
    image_of = lambda rows, asked: None if rows is None else {q.id: next(x for x in qs if x.row == row).group for q, row in zip(asked, rows)}
    mixed = qs[:]; rnd.shuffle(mixed)
    assert image_of(other_rows(qs), qs) == image_of(other_rows(mixed), mixed)

def test_two_films_of_a_patient_get_two_films():
    qs = split(("a", ["a0"], ""), ("a", ["a1"], ""), ("b", ["b0"], ""), ("b", ["b1"], ""))
    rows = other_rows(qs)
    image = {q.row: q.image_paths[0] for q in qs}
    assert {q.image_paths[0]: image[r] for q, r in zip(qs, rows)} == dict(a0="b0", a1="b1", b0="a0", b1="a1")

@pytest.mark.parametrize("qs", [split(("a", ["x"], "")), split(("a", ["x"], ""), ("a", ["y"], "")), split(("a", ["x"], ""), ("b", ["y", "z"], ""))],
    ids=["one image", "one patient", "no second with as many"])
def test_nobody_else_to_borrow_from(qs): assert other_rows(qs) is None

def test_the_only_one_of_its_modality_gets_another():
    rows = other_rows(qs := split(("a", ["x"], "CT"), ("b", ["y"], "MRI"), ("c", ["z"], "MRI")))
    image = {q.row: q.image_paths[0] for q in qs}
    assert {q.image_paths[0]: image[r] for q, r in zip(qs, rows)} == dict(x="y", y="z", z="y")

def test_no_questions_no_rows(): assert other_rows([]) == []

# --- what it lost

def test_the_drop_by_hand():
    got = drop_of([1, 1, 0, 1], [1, 0, 0, 0], ["a", "a", "b", "b"])
    assert (got["value"], got["n"], got["groups"]) == (.25, 4, 2) and got["drop"]["value"] == .5 and set(got["drop"]) == {"value", "low", "high", "p"} and got["right"] == .75
    assert got["low"] <= .25 <= got["high"] and got["drop"]["p"] == .5 # two patients, both lost: 2 of 4 patterns

@settings(max_examples=12)
@given(st.lists(st.tuples(st.sampled_from([0., .5, 1.]), st.sampled_from([0., .5, 1.]), st.sampled_from("abcde")), min_size=1, max_size=20))
def test_the_drop_is_the_paired_difference(rows):
    right, changed, groups = map(list, zip(*rows))
    got = drop_of(right, changed, groups)
    assert {k: got[k] for k in ("value", "n", "groups", "low", "high")} == summarise(changed, groups)
    assert got["drop"]["value"] == pytest.approx(summarise(right)["value"] - got["value"]) and got["drop"]["p"] == paired_difference(changed, right, groups)["p"]

def simulate(looks: float, n=200, seed=0):
    "Yes/no questions, four a patient, yes in 7 of 10. A model that sees the truth in `looks` of all cases, else says yes; and what it says without its image."
    rng = random.Random(seed)
    truth = [rng.random() < .7 for _ in range(n)]
    others = truth[4:] + truth[:4]
    say = lambda seen: [t if rng.random() < looks else True for t in seen]
    score = lambda said: [float(a == t) for a, t in zip(said, truth)]
    right = score(say(truth))
    groups = [f"p{i//4}" for i in range(n)]
    changed = dict(blank=score([True]*n), other=score(say(others)))
    return {name: dict(closed_accuracy=drop_of(right, scores, groups)) for name, scores in changed.items()}

@pytest.mark.parametrize("seed", range(5))
def test_a_model_that_looks_is_not_warned_of(seed): assert blind_warnings(simulate(.9, seed=seed)) == []

@pytest.mark.parametrize("seed", range(5))
def test_a_model_that_ignores_its_image_is_warned_of_twice(seed):
    looks = simulate(0, seed=seed)
    blank_words, other_words = blind_warnings(looks)
    assert "with a blank image" in blank_words and "with another patient's image" in other_words
    for words in (blank_words, other_words):
        assert words.startswith(f"closed accuracy is {looks['blank']['closed_accuracy']['right']:.2f} with the right image") and "n=200" in words and "95% interval" in words and "drop +0.00" in words and "\n" not in words

def test_one_of_the_two_is_enough():
    "Right answers that follow from the words of a stranger's image, too: it may look, and see nothing that matters."
    looks, blind = simulate(.9), simulate(0)
    assert len(blind_warnings({**looks, "other": blind["other"]})) == len(blind_warnings({**looks, "blank": blind["blank"]})) == 1

def test_a_score_that_is_better_without_the_image_is_warned_of():
    scores, groups = [0.]*20 + [1.]*20, [f"p{i}" for i in range(40)]
    (words,) = blind_warnings(dict(blank=dict(open_recall=drop_of(scores, [1.]*40, groups))))
    assert "open recall is 0.50" in words and "drop -0.50" in words

def test_too_few_questions_show_nothing():
    "Two patients cannot show that it looks, whatever they say."
    (words,) = blind_warnings(dict(blank=dict(closed_accuracy=drop_of([1, 1, 1, 1], [0, 1, 1, 1], list("aabb")))))
    assert "n=4" in words

def test_noise_and_mirror_are_no_reason_to_warn():
    looks = simulate(0)
    assert blind_warnings(dict(noised=looks["blank"], flipped=looks["other"])) == [] == blind_warnings({})
