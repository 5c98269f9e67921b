"""Invented findings, sides, rewordings and refusals: hand-worked examples, properties, real questions."""
import json, os, random, time
from collections import Counter
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from medchat.core import MedchatError, read_jsonl, sample_data
from medchat.metrics import normalise_answer
from medchat.scores import finding_scores
from medchat.trust import consistency, declines, hallucinations, impossible_questions, refusals, rephrase, side_confusion, sides

SENTENCES = ["The heart is enlarged.", "Small left pleural effusion.", "No pneumothorax.", "There may be pneumonia.", "The lungs are clear.", "A nodule in the right upper lobe.", "Pulmonary edema.", "No acute disease.", "No pleural effusion.", "Right rib fracture."]
report = st.lists(st.sampled_from(SENTENCES), max_size=4).map(" ".join)
pairs = st.lists(st.tuples(report, report, st.integers(0, 3)), max_size=8)
def columns(rows, n=3): return [list(c) for c in zip(*rows)] or [[] for _ in range(n)]
def close(a, b): assert a == pytest.approx(b, abs=1e-9), (a, b)
EMPTY = dict(value=None, n=0, groups=0, low=None, high=None)

def whole(s): # what holds for every share
    if not s["n"]: assert s == EMPTY
    else: assert 0 <= s["low"] <= s["value"] <= s["high"] <= 1 and 0 < s["groups"] <= s["n"]

# -- invented findings

def test_hallucinations_by_hand():
    found = hallucinations(
        ["Pneumonia. Fracture.", "The heart is enlarged.", "No pleural effusion.", "Possible edema."],
        ["Pneumonia. No fracture.", "No acute disease.", "Pleural effusion. Nodule.", "Edema."], "abcd")
    close(found["said_wrong"]["value"], 2/4) # fracture and heart of pneumonia, fracture, heart, edema (uncertain counts as said)
    close(found["contradicted"]["value"], 1/4) # only the fracture is denied
    close(found["missed"]["value"], 2/4) # effusion and nodule of pneumonia, effusion, nodule, edema
    close(found["reports_with"]["value"], 2/4)
    assert [found[k]["n"] for k in ("said_wrong", "contradicted", "missed", "reports_with")] == [4, 4, 4, 4]
    assert [found[k]["groups"] for k in ("said_wrong", "missed", "reports_with")] == [3, 3, 4] # a patient without a finding has no share in it
    assert found["by_finding"]["Fracture"] == dict(invented=1, contradicted=1, said=1, missed=0, n=0)
    assert found["by_finding"]["Pleural Effusion"] == dict(invented=0, contradicted=0, said=0, missed=1, n=1)
    assert "No Finding" not in found["by_finding"] and set(found["by_finding"]) == {"Pneumonia", "Fracture", "Cardiomegaly", "Pleural Effusion", "Lung Lesion", "Edema"}
    assert found["examples"] == [(0, ["Fracture"], []), (1, ["Cardiomegaly"], []), (2, [], ["Lung Lesion", "Pleural Effusion"])]

def test_examples_are_the_worst_and_bounded():
    replies = ["Pneumonia. Fracture. Edema." if i == 7 else "Pneumonia." for i in range(30)]
    found = hallucinations(replies, [""]*30)
    assert found["examples"][0] == (7, ["Edema", "Pneumonia", "Fracture"], []) and len(found["examples"]) == 20
    assert len(hallucinations(replies, [""]*30, examples=3)["examples"]) == 3

def test_who_always_writes_normal_invents_nothing_and_misses_all():
    found = hallucinations(["The lungs are clear. The heart is normal."]*3, ["Pneumonia.", "Edema.", "Normal."])
    assert found["said_wrong"] == EMPTY and found["reports_with"]["value"] == 0 and found["missed"]["value"] == 1 and found["missed"]["n"] == 2

@settings(max_examples=40, deadline=None)
@given(pairs)
def test_shares_are_those_of_precision_and_recall(rows):
    replies, references, groups = columns(rows)
    found = hallucinations(replies, references, groups)
    for key in ("said_wrong", "contradicted", "missed", "reports_with"): whole(found[key])
    if rows:
        by = {k: v for k, v in finding_scores(replies, references)["by_finding"].items() if k != "No Finding"}
        both = sum(round((v["precision"] or 0)*v["said"]) for v in by.values())
        said, true = (sum(v[k] for v in by.values()) for k in ("said", "n"))
        if said: close(found["said_wrong"]["value"], 1 - both/said); assert found["contradicted"]["value"] <= found["said_wrong"]["value"]
        if true: close(found["missed"]["value"], 1 - both/true)
    assert json.loads(json.dumps(found))["by_finding"] == found["by_finding"]

@settings(max_examples=25, deadline=None)
@given(pairs, st.integers(0, 99))
def test_the_order_of_the_rows_does_not_matter(rows, seed):
    mixed = random.Random(seed).sample(rows, len(rows))
    a, b = hallucinations(*columns(rows)), hallucinations(*columns(mixed))
    assert {k: v for k, v in a.items() if k != "examples"} == {k: v for k, v in b.items() if k != "examples"}
    assert sorted(r[1:] for r in a["examples"]) == sorted(r[1:] for r in b["examples"])
    assert side_confusion(*columns(rows)) == side_confusion(*columns(mixed))
    three = lambda rows: ([[a, b, a] for a, b, _ in rows], [a for a, *_ in rows], [b for _, b, _ in rows], [g for *_, g in rows])
    assert consistency(*three(rows)) == consistency(*three(mixed)) and refusals([a for a, *_ in rows]) == refusals([a for a, *_ in mixed])

# -- sides

@pytest.mark.parametrize("text, named", [("left", "l"), ("on the right side", "r"), ("Left upper lobe.", "l"), ("left-sided effusion", "l"), ("RUL opacity", "r"), ("LLL", "l"), ("left or right", "lr"), ("bilateral", "lr"), ("both lungs", "lr"), ("both nodules are on the left", "l"),
    ("left ventricle", "l"), ("the right heart border", "r"), ("not left but right", "r"), ("It is not on the left, it is on the right.", "r"), ("no left effusion", ""), ("there isn't a left effusion", ""), ("I cannot tell left from right", ""), ("upright film", ""), ("bright", ""), ("midline", ""), ("", ""),
    ("not only left", "l"), ("左侧", "l"), ("右肺上叶", "r"), ("左右两侧", "lr"), ("双肺", "lr"), ("不在左侧，在右侧", "r"), ("无左侧胸腔积液", ""), ("Bilateral effusions, larger on the left.", "lr"), ("LEFT", "l")])
def test_sides(text, named): assert sides(text) == {dict(l="left", r="right")[c] for c in named}

def test_side_confusion_by_hand():
    found = side_confusion(["left", "right", "right lung", "both", "?", "left"], ["left", "left", "right", "left", "right", "left and right"], "aabbcd")
    assert {k: found[k] for k in ("n", "asked", "none", "both", "groups")} == dict(n=3, asked=5, none=1, both=1, groups=2)
    close(found["value"], 1/3)

def test_by_finding_compares_each_finding_with_itself():
    swapped, right = "Right pleural effusion. A nodule in the left upper lung.", "Left pleural effusion. A nodule in the right upper lung."
    assert side_confusion([swapped], [right])["asked"] == 0 # both sides stand in the report
    assert side_confusion([swapped], [right], by_finding=True)["value"] == 1 and side_confusion([swapped], [right], by_finding=True)["n"] == 2
    assert side_confusion([right], [right], by_finding=True)["value"] == 0
    assert side_confusion(["No left effusion. Right nodule."], ["Left effusion. Right nodule."], by_finding=True)["n"] == 1 # what is not reported has no side to confuse
    impression = "There is a nodule in the left upper lung. Impression: left upper nodule, right effusion."
    assert side_confusion([impression], ["Left nodule."], by_finding=True)["value"] == 0 # a sentence with two sides does not say whose they are

phrases = st.sampled_from(["left", "right", "bilateral", "no left", "the right lung", "none", "", "左", "右肺"])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(phrases, phrases, st.integers(0, 3)), max_size=8))
def test_every_asked_side_is_counted_once(rows):
    found = side_confusion(*columns(rows))
    whole({k: found[k] for k in EMPTY})
    assert found["n"] + found["none"] + found["both"] == found["asked"]
    same = side_confusion([b for _, b, _ in rows], [b for _, b, _ in rows])
    assert same["value"] in (0, None) and same["none"] == same["both"] == 0

# -- rewordings

FRAME = set("is are be there does do can you see seen look appear show shows shown contain here this image in on within the any what which where part located location of visible present evident identified found observed side or picture film".split()) # words around the matter; sides, findings and negations are none of them
def matter(text): return Counter(w for w in normalise_answer(text).split() if w not in FRAME or w in ("left", "right"))

THINGS = ["a pleural effusion", "an enlarged heart", "free air", "evidence of pneumonia", "any nodules", "a nodule in the left upper lung", "a pneumothorax on the right", "fluid under the diaphragm", "two nodules"]
WHOLES = ["the heart", "the lungs", "this chest film", "the left costophrenic angle", "the nodule in the right lung", "these vessels"]
question = st.one_of(
    st.builds("{} {}{}?".format, st.sampled_from(["Is there", "Are there", "Do you see", "Does the film show"]), st.sampled_from(THINGS), st.just("")),
    st.builds("Can {} be seen{}?".format, st.sampled_from(THINGS), st.sampled_from(["", " in this image", " on the chest film", " here"])),
    st.builds("{} {} {}{}?".format, st.sampled_from(["Is", "Are"]), st.sampled_from(WHOLES), st.sampled_from(["enlarged", "normal", "slightly blunted"]), st.sampled_from(["", " in this image"])),
    st.builds("{} {} on the {}?".format, st.sampled_from(["Is", "Are"]), st.sampled_from(WHOLES), st.sampled_from(["left or the right", "right or left", "left or right side"])),
    st.builds("{} {}?".format, st.sampled_from(["Where is", "On which side is", "Where are"]), st.sampled_from(WHOLES)),
    st.builds("What {} {}{}?".format, st.sampled_from(["abnormality", "abnormalities", "organ system"]), st.sampled_from(["is seen", "are shown", "can be seen"]), st.sampled_from(["", " in this image"])))

@settings(max_examples=300, deadline=None)
@given(question)
def test_rephrasing_keeps_the_matter(q):
    ways = rephrase(q)
    assert ways and len(set(ways)) == len(ways) and q not in ways
    for way in ways:
        assert matter(way) == matter(q), way
        assert way[0].isupper() and way.endswith("?") and "  " not in way and "{" not in way
        for again in rephrase(way): assert matter(again) == matter(q), again # and once more
        order = lambda t: [w for w in normalise_answer(t).split() if w in ("left", "right")]
        if sides(q) == {"left", "right"}: assert order(way) == order(q) # the options stay in their order

def test_rephrasing_by_hand():
    assert rephrase("Is there a pleural effusion?") == ["Does this image show a pleural effusion?", "Can a pleural effusion be seen here?"]
    assert rephrase("is the heart enlarged") == ["Does the heart look enlarged?", "Does the heart appear enlarged?"]
    assert rephrase("Are the lungs clear on this film?")[0] == "Do the lungs look clear on this film?"
    assert rephrase("Does the chest x-ray show a nodule?") == ["Is there a nodule on the chest x-ray?", "Can a nodule be seen on the chest x-ray?"]
    assert rephrase("Is the heart visible?") == ["Does this image show the heart?", "Can the heart be seen here?"]
    assert rephrase("Is the nodule on the right or the left?") == ["On which side is the nodule, right or left?", "Which side is the nodule on, right or left?"]
    assert rephrase("Where is the nodule located?") == ["Where is the nodule?", "What is the location of the nodule?"]
    assert rephrase("What is seen in this image?") == ["What can be seen in this image?", "What is shown in this image?", "What does this image show?"]

@pytest.mark.parametrize("q", ["", "?", "Is there no effusion?", "Isn't there an effusion?", "Is there an effusion or a nodule?", "Is it normal?", "Is there a mass that is calcified?", "Is the heart not enlarged?", "Is the heart larger than normal?", "Is there an absent kidney?",
    "Is the contour a mirror image of normal?", "Where is the location of the mass?", "Is there a history of cancer?", "Is the lesion on the left or right side of the brain?", "Is the lesion on the left or right in the image?", "Describe the film.", "Why is there an effusion?", "Is this a CT or an MRI?",
    "How many nodules are there?", "Are the lungs free of disease?", "Is there a nodule? Answer yes or no.", "肺部有异常吗?", "Is there a nodule, a mass?", "Is the left or the right lung clear?", "Is the nodule on the left or the left?"])
def test_where_no_rule_is_sure_nothing_is_said(q): assert rephrase(q) == []

def test_long_questions_take_no_time():
    start = time.perf_counter()
    for q in ("Is there a " + "nodule "*3000 + "seen or", "Is the " + "heart "*3000, "Where is the " + "left "*3000 + "located in", "Can " + "a "*3000 + "be", "What " + "the image "*2000): rephrase(q)
    assert time.perf_counter() - start < 5

def test_phantom_questions_keep_their_meaning():
    "Each rewording that is itself a phantom question asks for the same thing."
    rows = [row for _, row in read_jsonl(sample_data()/"phantoms"/"records.jsonl")]
    about = {row["turns"][0]["text"]: (row["meta"]["question_type"], row["meta"]["finding"], row["meta"].get("place")) for row in rows}
    ways = {q: rephrase(q) for q in about}
    assert all(ways[q] for q, (kind, *_) in about.items() if kind in ("presence", "place", "normal", "side", "where"))
    met = [(about[q], about[way]) for q in about for way in ways[q] if way in about]
    assert len(met) >= 8 and all(a == b for a, b in met)
    assert all(matter(way) == matter(q) for q in about for way in ways[q])

@pytest.mark.skipif(not (Path(os.environ.get("MEDCHAT_REAL_DATA", "-"))/"vqa_rad").is_dir(), reason="needs VQA-RAD")
def test_real_questions_keep_their_matter():
    asked = {row["question"].strip() for name in ("trainset", "testset") for row in json.loads((Path(os.environ["MEDCHAT_REAL_DATA"])/"vqa_rad"/"data_RAD"/f"{name}.json").read_text(encoding="utf-8"))}
    ways = {q: rephrase(q) for q in asked}
    assert sum(map(bool, ways.values())) > 300
    for q, said in ways.items():
        assert not said or not set(normalise_answer(q).split()) & set("not no nor without absent than isnt".split()), q
        for way in said:
            lost = matter(q) - matter(way) + (matter(way) - matter(q))
            assert not lost, (q, way, lost)
            assert sides(way) == sides(q)

# -- consistency

def test_consistency_by_hand():
    found = consistency([["yes", "Yes, there is.", "no"], ["no", "No."], ["right", "left"], ["a nodule", "effusion"], ["yes"]],
        ["Is there a nodule?", "Is there a nodule?", "Left or right?", "What is seen?", "Is there an effusion?"], ["yes", "yes", "left", "effusion", "yes"], "aabbc")
    close(found["all_agree"]["value"], 1/4) # the second question; the last has one wording and is left out
    close(found["pairs"]["value"], (1 + 1 + 0 + 0)/(3 + 1 + 1 + 1))
    assert found["always_right"]["value"] == 0 and found["always_right"]["n"] == 4
    assert found["flipped"] == dict(found["flipped"], value=1, n=1, groups=1) # only the first was right to begin with

def test_what_cannot_be_read_agrees_with_nothing():
    found = consistency([["maybe yes, maybe no", "maybe yes, maybe no"]], ["Is there a nodule?"], ["yes"])
    assert found["all_agree"]["value"] == 0 and found["pairs"]["value"] == 0
    assert consistency([["", ""]], ["What is it?"], ["a nodule"])["all_agree"]["value"] == 0

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.lists(st.sampled_from(["yes", "no", "Yes.", "unclear", ""]), max_size=4), st.sampled_from(["yes", "no"]), st.integers(0, 3)), max_size=8))
def test_consistency_holds_together(rows):
    found = consistency([r for r, *_ in rows], ["Is there a nodule?"]*len(rows), [r for _, r, _ in rows], [g for *_, g in rows])
    for s in found.values(): whole(s)
    agree, pairs, right, flipped = (found[k] for k in ("all_agree", "pairs", "always_right", "flipped"))
    assert agree["n"] == right["n"] == sum(len(r) > 1 for r, *_ in rows)
    if agree["n"]: assert right["value"] <= agree["value"] + 1e-9
    if flipped["n"]: close(right["value"]*right["n"], (1 - flipped["value"])*flipped["n"]) # right in every wording = right at first and not flipped
    same = consistency([[r[0]]*3 for r, *_ in rows if r and r[0] in ("yes", "no")], ["Is there a nodule?"]*sum(bool(r) and r[0] in ("yes", "no") for r, *_ in rows), ["yes"]*sum(bool(r) and r[0] in ("yes", "no") for r, *_ in rows))
    assert same["all_agree"]["value"] in (1, None) and same["flipped"]["value"] in (0, None)

# -- questions without an answer

def test_what_is_asked_fits_what_is_known():
    chest, brain, nothing = (dict(impossible_questions(x)) for x in ("chest x-ray", "MRI, Brain", ""))
    assert len(nothing) == 2 and set(nothing) < set(chest) & set(brain)
    assert any("kidney" in q for q in chest) and not any("lung" in q for q in chest) and any("lung" in q for q in brain) and not any("brain" in q for q in brain)
    assert not any("kidney" in q for q, _ in impossible_questions("CT chest")) # the scan may reach down to them
    assert not any("kidney" in q for q, _ in impossible_questions("x-ray of chest and abdomen"))
    assert not any("colour" in q for q, _ in impossible_questions("endoscopy, stomach")) and any("colour" in q for q, _ in impossible_questions("ct"))
    assert not any("colour" in q for q, _ in impossible_questions("PET CT, chest")) and dict(impossible_questions("whole-body MRI")).keys() == dict(impossible_questions("mri")).keys()

words = st.lists(st.sampled_from("x-ray ct mri pet chest brain knee abdomen prostate whole-body lung kidney nothing 肺".split()), max_size=4).map(", ".join)
@settings(max_examples=100, deadline=None)
@given(words, words)
def test_knowing_more_parts_never_asks_for_one_of_them(a, b):
    asked = [q for q, why in impossible_questions(f"{a}, {b}") if why]
    assert len(asked) == len(set(asked)) and len(asked) >= 2
    named = lambda part, word: any(word in q.lower() for q in asked) and part in f"{a}, {b}".split(", ")
    assert not named("brain", "brain") and not named("lung", "lung") and not named("prostate", "prostate") and not named("kidney", "kidney") and not named("chest", "lung")

@pytest.mark.parametrize("reply", ["No.", "none", "None of these", "There is no kidney in this image.", "The kidneys are not visible.", "The left kidney is not visible.", "It cannot be seen", "I can't tell from this image.", "This is a chest X-ray; the brain is not shown.", "not applicable", "N/A", "unknown",
    "I don't know", "The image does not show the foot.", "It isn't possible to determine this.", "Unable to answer", "The foot lies outside the field of view.", "This is a grey-scale image. Colours cannot be seen.", "I cannot tell whether left, or right.", "无法判断", "看不到肾脏", "图像中没有肾脏", "不知道"])
def test_declines(reply): assert declines(reply)

@pytest.mark.parametrize("reply", ["", "left", "The left kidney.", "yes", "No, it is on the left.", "The kidneys are normal.", "pink", "120/80 mmHg", "No. 3 metatarsal", "There is no doubt: the left one.", "not the left but the right one", "The tumour is on the left with no spread.", "It cannot be excluded.",
    "The patient shown has a fracture.", "I'm not sure, maybe left", "The foot is not shown, but the fracture is on the right.", "normal", "note the nodule", "左侧", "左侧肾脏有肿瘤，没有出血", "It's not in the left kidney"])
def test_does_not_decline(reply): assert not declines(reply)

def test_refusals_by_hand():
    found = refusals(["not visible", "left", "", "no", "red", "None.", "none can be seen", "没有"], "aabbcccc")
    assert (found["value"], found["n"], found["groups"], found["made_up"], found["bare"], found["empty"]) == (2/8, 8, 3, 2, 3, 1)

# -- bad input

def test_nothing_to_count_gives_no_numbers():
    found = hallucinations([], [])
    assert all(found[k] == EMPTY for k in ("said_wrong", "contradicted", "missed", "reports_with")) and found["by_finding"] == {} and found["examples"] == []
    assert side_confusion([], []) == dict(**EMPTY, asked=0, none=0, both=0) == side_confusion([], [], by_finding=True)
    assert set(map(str, consistency([], [], []).values())) == {str(EMPTY)} and refusals([]) == dict(**EMPTY, made_up=0, bare=0, empty=0)

@pytest.mark.parametrize("call", [lambda: hallucinations(["a"], []), lambda: hallucinations(["a"], ["a"], ["x", "y"]), lambda: side_confusion(["a"], ["a", "b"]), lambda: consistency([["a", "b"]], ["q"], []), lambda: consistency([["a", "b"]], ["q"], ["r"], [1, 2]), lambda: refusals(["a"], [1, 2])])
def test_columns_of_other_lengths(call):
    with pytest.raises(MedchatError, match="one entry of each for each reply"): call()

def test_groups_may_be_an_array():
    import numpy as np
    assert refusals(["no", "left"], np.array(["a", "b"]))["groups"] == 2

@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_any_text_can_be_read(text):
    assert sides(text) <= {"left", "right"} and declines(text) in (True, False)
    assert all(isinstance(way, str) for way in rephrase(text)) and len(impossible_questions(text)) >= 2
