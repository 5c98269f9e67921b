"Shapes and words: pictures hold what their facts say, and answers follow from the facts."
from collections import Counter
import numpy as np
import pytest
import medchat.shapes as shapes
from medchat.shapes import AREAS, GLOSSARY, KINDS, QUESTIONS, SIDE, WORDS, ask_areas, ask_by_kind, ask_shapes, ask_words, blind_score, choose_shapes, draw_pool, draw_shapes

# ---- pictures

def test_pictures_come_from_their_seed():
    (a, f), (b, g), (c, h) = (draw_shapes(np.random.default_rng(s)) for s in (4, 4, 5))
    assert a.dtype == np.uint8 and a.shape == (SIDE, SIDE) and (a == b).all() and f == g and (a != c).any()

def test_a_pool_comes_from_its_seed():
    (a, f), (b, g), (c, h) = (draw_pool(7, s) for s in (4, 4, 5))
    assert a.shape == (7, SIDE, SIDE) and len(f) == 7 and (a == b).all() and f == g and f != h
    assert (a[0] == draw_shapes(np.random.default_rng(4))[0]).all()

@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_lies_in_its_area_and_has_its_shade(area, kind):
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    for size in ("small", "large"):
        for seed in range(5):
            white, black = (shapes._shape_light(x, y, area, dict(kind=kind, shade=s, size=size), np.random.default_rng(seed)) for s in ("white", "black"))
            assert white.max() > 40 and white.min() >= 0 and (black == -white).all()
            middle = (white*x).sum()/white.sum(), (white*y).sum()/white.sum()
            assert (middle[0] > 56) == area.startswith("right") and (middle[1] > 56) == area.endswith("lower")

def test_large_is_larger_than_small():
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    for kind in KINDS:
        small, large = ([(shapes._shape_light(x, y, "left upper", dict(kind=kind, shade="white", size=size), np.random.default_rng(s)) > 20).sum() for s in range(20)] for size in ("small", "large"))
        assert max(small) < min(large), kind

@pytest.mark.parametrize("area", AREAS)
def test_a_corner_lies_in_its_corner(area):
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    light = shapes._corner_light(x, y, area, "white", np.random.default_rng(0))
    at = -1 if area.endswith("lower") else 0, -1 if area.startswith("right") else 0
    assert light[at] > 40 and light[-1 - at[0], -1 - at[1]] < 1 and abs(light[SIDE//2, SIDE//2]) < 1
    assert (shapes._corner_light(x, y, area, "black", np.random.default_rng(0)) == -light).all()

def test_a_line_and_an_oval_are_where_they_should_be():
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    for seed in range(30):
        third = {place: (light*x).sum()/light.sum() for place in ("left", "middle", "right") for light in [shapes._line_light(x, y, place, np.random.default_rng(seed))]}
        assert third["left"] < 42 < third["middle"] < 71 < third["right"], (seed, third)
        wide, narrow = ((shapes._oval_light(x, y, w, np.random.default_rng(seed)) > 12)[SIDE//2].sum() for w in ("wide", "narrow"))
        assert wide > narrow

# ---- questions

def test_answers_follow_from_the_facts():
    facts = dict(areas={"left upper": dict(kind="ring", shade="white", size="small"), "right lower": dict(kind="bar", shade="black", size="large")},
        corners={"right upper": "black"}, line="middle", oval=None)
    rng, seen = np.random.default_rng(0), {}
    for _ in range(400):
        for q, a in ask_shapes(facts, rng, 5): assert seen.setdefault(q, a) == a
    expected = {"What is in the left upper area?": "small white ring", "What is in the right upper area?": "nothing", "Is there a ring on the left?": "yes",
        "Is there a ring on the right?": "no", "Where is the bar?": "right lower area", "Is the bar on the left or the right?": "right", "Is the ring small?": "yes",
        "Is the bar white or black?": "black", "How many shapes are there?": "two", "Where is the line?": "middle", "Is there an oval?": "no",
        "What is in the right upper corner?": "black", "Does the picture show a bar in the upper half?": "no",
        "Describe the picture.": "a small white ring in the left upper area; a large black bar in the right lower area; a black corner in the right upper area; a line in the middle."}
    assert {q: seen.get(q) for q in expected} == expected

@pytest.mark.parametrize("about", QUESTIONS)
def test_no_lesson_contradicts_itself(about):
    rng = np.random.default_rng(1)
    for _ in range(300):
        facts, seen = choose_shapes(rng), {}
        for _ in range(4):
            pairs = QUESTIONS[about](facts, rng)
            assert pairs and all(q and a for q, a in pairs) and len({q for q, _ in pairs}) == len(pairs)
            for q, a in pairs:
                if q not in ("Where are the shapes?", "How do the shapes look?"): assert seen.setdefault(q, a) == a # those are lists in shuffled order

def test_a_picture_of_nothing_has_questions_too():
    facts = dict(areas={}, corners={}, line=None, oval=None)
    seen = {p for s in range(200) for p in ask_shapes(facts, np.random.default_rng(s), 3)}
    assert {a for q, a in seen if q.startswith("Is there")} == {"no"} and ("Describe the picture.", "nothing.") in seen and ("How many shapes are there?", "none") in seen

def test_areas_are_asked_for_once_each():
    _, facts = draw_shapes(np.random.default_rng(1))
    orders = {tuple(q for q, _ in ask_areas(facts, np.random.default_rng(s))) for s in range(20)}
    assert len(orders) > 5 and all(sorted(o) == sorted(f"What is in the {a} area?" for a in AREAS) for o in orders)

def test_questions_by_kind_are_true():
    shape = lambda kind, shade="white", size="small": dict(kind=kind, shade=shade, size=size)
    facts = dict(areas={"left upper": shape("ring"), "right lower": shape("bar", "black", "large"), "left lower": shape("cross"), "right upper": shape("cross")}, corners={}, line=None, oval=None)
    asked = [ask_by_kind(facts, np.random.default_rng(s), listed=True) for s in range(40)]
    assert {a[0] for a in asked} == {("Where are the shapes?", "ring left upper, bar right lower"), ("Where are the shapes?", "bar right lower, ring left upper")}
    assert {a[1] for a in asked} == {("How do the shapes look?", "ring white small, bar black large"), ("How do the shapes look?", "bar black large, ring white small")}
    truth = {"Where is the ring?": "left upper area", "Where is the bar?": "right lower area", "Is the ring white or black?": "white", "Is the bar white or black?": "black",
        "Is the ring small or large?": "small", "Is the bar small or large?": "large", "Is there a ring?": "yes", "Is there a bar?": "yes", **{f"Is there a {k}?": "no" for k in ("circle", "triangle", "cloud")}}
    assert {p for a in asked for p in a[2:]} == set(truth.items()) # nothing about the crosses, of which there are two
    assert ask_by_kind(facts, np.random.default_rng(0), listed=False)[0][0] in truth
    nothing = dict(facts, areas={})
    assert [a for _, a in ask_by_kind(nothing, np.random.default_rng(0), listed=True)] == ["nothing"]*4

def test_yes_and_no_cannot_be_guessed():
    rng = np.random.default_rng(9)
    one, two = ([p for _ in range(4000) for p in ask_shapes(choose_shapes(rng), rng, 4) if p[1] in ("yes", "no")] for _ in range(2))
    assert abs(np.mean([a == "yes" for _, a in one]) - .5) < .04
    assert blind_score(one, two) < .56

def test_all_sorts_of_questions_are_asked():
    rng = np.random.default_rng(3)
    openings = Counter(q.split()[0] for _ in range(2000) for q, _ in ask_shapes(choose_shapes(rng), rng))
    assert set(openings) == {"What", "Is", "Does", "Where", "On", "How", "Describe"} and min(openings.values()) > 10

def test_blind_score_counts_exact_answers(): assert blind_score([("a", "1"), ("a", "1"), ("a", "2"), ("b", "3")], [("a", "1"), ("a", "2"), ("b", "3"), ("c", "1")]) == .75

# ---- words

def test_reading_has_answers():
    rng = np.random.default_rng(0)
    pairs = [ask_words(rng) for _ in range(300)]
    assert all(q and a for q, a in pairs) and ("What does nodule mean?", GLOSSARY["nodule"]) in pairs
    assert all(a == q.split(": ", 1)[1] for q, a in pairs if q.startswith(("Repeat: ", "Say: ")))
    assert all(GLOSSARY[a] == q.removeprefix("What is the word for ").removesuffix("?") for q, a in pairs if q.startswith("What is the word"))

def test_words_of_the_chest_are_read_before_they_are_seen():
    "The phantoms' findings and places are among the words, so that LoRA need not teach how to say them."
    assert {"cardiomegaly", "effusion", "pneumothorax", "nodule", "left", "right", "upper", "lower", "lung", "pleural", "mediastinum", "yes"} <= {*GLOSSARY, *WORDS}
