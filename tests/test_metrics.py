"The scores: edge cases, and properties that must hold for any text."
import math, random, statistics, time

import pytest
from hypothesis import assume, given, settings, strategies as st

from medchat.core import MedchatError
from medchat.metrics import (CHOICES, bootstrap_interval, closed_accuracy, closed_choices, mean, normalise_answer, open_recall,
    parse_choice, score_closed, score_open, summarise, wilson_interval)

texts = st.text(max_size=60)
word = st.sampled_from("yes no left right normal effusion nodule not a the , . - 2 two none isn't ct or mri lung 1.5".split())
phrases = st.lists(word, max_size=10).map(" ".join)
scores = st.lists(st.sampled_from([0.0, 0.25, 1/3, 0.5, 1.0]), min_size=1, max_size=30)


# --- normalise_answer

@pytest.mark.parametrize("text, want", [
    ("", ""), ("   ", ""), ("...", ""), ("A", ""), ("THE lungs", "lungs"), ("Yes.", "yes"), ("yes!?", "yes"),
    ("1,000 ml", "1000 ml"), ("1, 2", "1 2"), ("1,5", "1 5"), ("1.5cm.", "1.5cm"), (".5", "5"), ("5.", "5"), ("v1.2.3", "v1.2.3"), ("e.g. CT", "e g ct"),
    ("isn't", "isnt"), ("isn’t", "isnt"), ("patient's", "patients"), ("(left)", "left"), ("left/right", "left right"),
    ("x-ray", "x ray"), ("None", "0"), ("Ten", "10"), ("twenty", "twenty"), ("no\tneed", "no need"), ("a\nb", "b"),
    ("ＹＥＳ", "yes"), ("有。", "有"), ("左侧，胸腔", "左 侧 胸 腔"), ("இல்லை.", "இல்லை"), ("नहीं।", "नहीं"), ("<|im_end|>", "im end"), ("100%", "100")])
def test_normalise(text, want): assert normalise_answer(text) == want

def test_normalise_takes_numbers(): assert normalise_answer(4) == "4" == normalise_answer("four")   # VQA-RAD has integer answers

@given(texts)
def test_normalise_is_idempotent_and_clean(text):
    once = normalise_answer(text)
    assert normalise_answer(once) == once
    assert once == " ".join(once.split())
    assert normalise_answer(f"  {text}\n") == once

@given(phrases)
def test_normalise_ignores_case(text): assert normalise_answer(text.upper()) == normalise_answer(text)


# --- closed

@pytest.mark.parametrize("question, reference, want", [
    ("", "yes", ("yes", "no")), ("", "No.", ("yes", "no")), ("", "Left side", ("left", "right")), ("", "the RIGHT lung", ("left", "right")),
    ("", "axial", ()), ("", "", ()), ("", "left and right", ()), ("Is it?", "both", ()),
    ("CT or MRI?", "MRI", ("ct", "mri")), ("Is it with or without contrast?", "With contrast", ("with", "without")),
    ("Is this a contrast or non contrast CT?", "non-contrast", ()),                # both words of the pair stand in the reference
    ("Is this a T1 weighted, T2 weighted, or FLAIR image?", "FLAIR", ("weighted", "flair")),
    ("left, right, or both?", "both", ("right", "both")), ("or", "yes", ("yes", "no")), ("or or or", "or", ()),
    ("Is the heart on the left or right?", "Right", ("left", "right"))])
def test_choices(question, reference, want): assert closed_choices(question, reference) == want

@pytest.mark.parametrize("reply, want", [
    ("yes", "yes"), ("YES!", "yes"), ("No", "no"), ("no.", "no"), ("No, it is normal", "no"), ("Yes, the heart is enlarged.", "yes"),
    ("normal", None), ("not", None), ("It is not", None), ("known", None), ("nodule", None), ("none", None), ("north", None), ("eyes", None), ("yesterday", None),
    ("yes no", None), ("Yes, there is no effusion", None), ("", None), ("   ", None), ("maybe", None), ("there is no evidence of it", "no"), ("no no no", "no")])
def test_yes_no_by_words(reply, want): assert parse_choice(reply, ("yes", "no")) == want

@pytest.mark.parametrize("reply, want", [
    ("left", "left"), ("on the right side", "right"), ("left-sided", "left"), ("leftover", None), ("bright", None), ("upright", None), ("left and right", None),
    ("not left", None), ("not left, right", "right"), ("both", None), ("bilateral", None)])
def test_left_right_by_words(reply, want): assert parse_choice(reply, ("left", "right")) == want

@pytest.mark.parametrize("reply, reference, question, want", [
    ("yes", "yes", "", (True, True)), ("yes", "no", "", (False, True)), ("yes and no", "no", "", (False, False)), ("normal", "no", "", (False, False)),
    ("abnormal", "normal", "", (False, True)), ("normal", "abnormal", "", (False, True)), ("not normal", "normal", "", (False, True)),
    ("It looks normal", "normal", "", (True, True)), ("", "normal", "", (False, False)), ("", "yes", "", (False, False)),
    ("gray matter", "white matter", "Is gray or white matter seen?", (False, True)), ("white", "white matter", "Is gray or white matter seen?", (True, True)),
    ("CT or MRI", "MRI", "CT or MRI?", (False, False)), ("non-contrast CT", "non-contrast", "contrast or non contrast?", (True, True)),
    ("contrast", "non-contrast", "contrast or non contrast?", (False, True)), ("non-contrast", "contrast", "contrast or non contrast?", (False, True)),
    ("matter white", "white matter", "", (False, True)), ("2", "Two", "", (True, True)), ("anything", "", "", (False, True)), ("", "", "", (False, False))])
def test_score_closed(reply, reference, question, want): assert score_closed(reply, reference, question) == want

@pytest.mark.parametrize("answer", ["yes", "no", "left", "right", "axial", "Left side", "non-contrast", "both", "In the bowels"])
def test_the_reference_itself_is_right(answer):
    assert score_closed(answer, answer, "") == (True, True)
    assert closed_accuracy([answer] * 3, [answer] * 3) == 1.0

def test_real_closed_references_score_themselves():
    import json, os; from pathlib import Path
    folder = Path(os.environ.get("MEDCHAT_REAL_DATA", "nowhere"))/"vqa_rad"/"data_RAD"
    if not folder.is_dir(): pytest.skip("no VQA-RAD on this machine")
    rows = [r for name in ("trainset.json", "testset.json") for r in json.loads((folder/name).read_text()) if str(r["answer_type"]).strip() == "CLOSED"]
    assert len(rows) > 1500
    wrong = [(r["question"], r["answer"]) for r in rows if score_closed(str(r["answer"]), str(r["answer"]), r["question"]) != (True, True)]
    assert not wrong

def test_always_the_same_answer_is_half_right_on_balanced_questions():
    references = ["yes", "no"] * 50
    assert closed_accuracy(["yes"] * 100, references) == closed_accuracy(["no"] * 100, references) == 0.5
    assert closed_accuracy(["yes no"] * 100, references) == 0.0                     # the substring rule says 1.0 here

def test_wrong_answers_count():
    # LLaVA-Med's script appends nothing for a parsed, wrong reply: its accuracy here is 1 of 1
    assert closed_accuracy(["yes", "yes", "yes"], ["yes", "no", "no"]) == pytest.approx(1/3)

@given(phrases, phrases, phrases)
def test_score_closed_is_consistent(reply, reference, question):
    right, parsed = score_closed(reply, reference, question)
    assert parsed or not right                                                     # unparsed is never right
    choices = closed_choices(question, reference)
    if choices: assert parsed == (parse_choice(reply, choices) is not None)
    assert score_closed(reply.upper(), reference.upper(), question.upper()) == (right, parsed)

@given(texts, st.sampled_from(CHOICES))
def test_a_choice_is_a_word_of_the_reply(reply, choices):
    said = parse_choice(reply, choices)
    assert said is None or (said in choices and said in normalise_answer(reply).split())

@given(texts, texts, texts)
def test_any_text_gets_a_score(reply, reference, question):
    assert set(map(type, score_closed(reply, reference, question))) == {bool}
    assert 0 <= score_open(reply, reference) <= 1


# --- open

@pytest.mark.parametrize("reply, reference, want", [
    ("left pleural effusion", "left pleural effusion", 1), ("Effusion, pleural: LEFT!", "left pleural effusion", 1), ("effusion", "left pleural effusion", 1/3),
    ("effusion effusion", "left effusion", 1/2), ("", "effusion", 0), ("effusion", "", 0), ("", "", 1), ("the a", "an", 1), ("seven", "7", 1),
    ("no effusions", "effusion", 0), ("lung lung", "lung lung nodule", 2/3), ("everything left right effusion nodule", "nodule", 1)])
def test_score_open(reply, reference, want): assert score_open(reply, reference) == pytest.approx(want)

def _llava_med_recall(reply, reference):
    "What LLaVA-Med's calculate_f1score returns as recall, for texts in which no word repeats."
    a, b = set(normalise_answer(reply).split()), set(normalise_answer(reference).split())
    return len(a & b) / len(b)

@given(st.lists(word, max_size=8), st.lists(word, min_size=1, max_size=8))
def test_recall_agrees_with_llava_med_without_repeats(reply, reference):
    a, b = (" ".join(dict.fromkeys(normalise_answer(" ".join(x)).split())) for x in (reply, reference))
    assume(b)
    assert score_open(a, b) == pytest.approx(_llava_med_recall(a, b))

@given(texts, texts)
def test_recall_identity_and_growth(a, b):
    assert score_open(a, a) == 1
    assume(normalise_answer(b))
    assert score_open(f"{a} \n {b}", b) == 1 >= score_open(a, b)

@given(st.lists(st.tuples(phrases, phrases), min_size=1, max_size=8), st.randoms())
def test_order_does_not_matter(pairs, rnd):
    mixed = pairs[:]; rnd.shuffle(mixed)
    for score in (open_recall, closed_accuracy):
        value = score(*zip(*pairs))
        assert value == score(*zip(*mixed)) and 0 <= value <= 1

@pytest.mark.parametrize("score", [open_recall, closed_accuracy])
def test_no_rows_no_score_and_unequal_rows(score):
    assert score([], []) is None
    with pytest.raises(MedchatError, match="one reference for each reply"): score(["yes", "no"], ["yes"])

def test_questions_must_match_too():
    with pytest.raises(MedchatError): closed_accuracy(["ct"], ["ct"], ["CT or MRI?", "more"])
    assert closed_accuracy(["the ct is better than mri"], ["ct"], ["CT or MRI?"]) == 0.0
    assert closed_accuracy(["the ct is better than mri"], ["ct"]) == 1.0


# --- intervals

@pytest.mark.parametrize("k, n, low, high", [   # by hand from the formula; the first and third are also in Newcombe 1998, table I
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_published_values(k, n, low, high):
    assert wilson_interval(k/n, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))

@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_wilson_properties(n, share, level):
    low, high = wilson_interval(share, n, level)
    assert 0 <= low <= share <= high <= 1 and high > low
    mirror = wilson_interval(1 - share, n, level)
    assert mirror == (pytest.approx(1 - high, abs=1e-9), pytest.approx(1 - low, abs=1e-9))
    more_low, more_high = wilson_interval(share, n * 4, level)
    assert more_high - more_low < high - low

def test_wilson_of_nothing(): assert wilson_interval(0.0, 0) == (0.0, 1.0)

@settings(max_examples=40, deadline=None)
@given(scores, st.randoms())
def test_interval_range_and_permutation(values, rnd):
    groups = [rnd.randrange(5) for _ in values]
    low, high = bootstrap_interval(values, groups, resamples=200)
    assert 0 <= low <= high <= 1 and high > low                  # never without a width
    order = list(range(len(values))); rnd.shuffle(order)
    assert bootstrap_interval([values[i] for i in order], [f"p{groups[i]}" for i in order], resamples=200) == (low, high)   # nor do group names matter

def test_interval_of_independent_answers_is_near_the_normal_one():
    values = [1.0] * 300 + [0.0] * 100
    low, high = bootstrap_interval(values)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == (pytest.approx(0.75 - half, abs=0.01), pytest.approx(0.75 + half, abs=0.01))

def test_groups_widen_the_interval():
    values, patients = [1.0] * 60 + [0.0] * 40, [i // 10 for i in range(100)]
    width = lambda i: i[1] - i[0]
    assert width(bootstrap_interval(values, patients)) > 2 * width(bootstrap_interval(values))
    assert bootstrap_interval(values, range(100)) == bootstrap_interval(values)

def test_interval_covers_the_truth():
    "95% intervals over clustered data should hold the true mean about 95% of the time; over independent rows far less."
    rng, grouped, naive, trials = random.Random(0), 0, 0, 150
    for _ in range(trials):
        values, groups = [], []
        for g in range(40):
            p = rng.choice([0.3, 0.9])                           # the true mean is 0.6
            values += [float(rng.random() < p) for _ in range(8)]; groups += [g] * 8
        for low, high, is_grouped in [(*bootstrap_interval(values, groups, resamples=200), 1), (*bootstrap_interval(values, resamples=200), 0)]:
            grouped += is_grouped and low <= 0.6 <= high; naive += (not is_grouped) and low <= 0.6 <= high
    assert grouped / trials > 0.88 > naive / trials

@pytest.mark.parametrize("values, groups", [([1.0] * 30, ()), ([0.0] * 30, ()), ([1.0], ()), ([0.5, 0.5], ()), ([1, 0] * 9, [i // 2 for i in range(18)]), ([1, 0, 1], [7, 7, 7])])
def test_interval_without_spread_falls_back_to_wilson(values, groups):
    n = len(set(groups)) or len(values)
    assert bootstrap_interval(values, groups) == wilson_interval(statistics.fmean(values), n)

def test_interval_is_seeded():
    values = [i % 3 / 2 for i in range(50)]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)

def test_interval_leaves_the_global_seed_alone():
    import numpy as np
    np.random.seed(5); want = np.random.rand(); np.random.seed(5)
    bootstrap_interval([0, 1, 1])
    assert np.random.rand() == want

def test_unequal_groups():
    with pytest.raises(MedchatError): bootstrap_interval([1, 0], ["a"])

def test_summary():
    got = summarise([1, 1, 0, 0, 1, 1], ["a", "a", "b", "b", "c", "c"])
    assert (got["value"], got["n"], got["groups"]) == (pytest.approx(2/3), 6, 3) and got["low"] < 2/3 < got["high"]
    assert summarise([]) == dict(value=None, n=0, groups=0, low=None, high=None)
    assert mean([]) is None and mean([0.1] * 10) == pytest.approx(0.1)

def test_a_large_set_is_quick():
    start = time.perf_counter()
    bootstrap_interval([i % 2 for i in range(20_000)], [i // 6 for i in range(20_000)])
    assert time.perf_counter() - start < 5

def test_a_statistic_of_counts_agrees_with_the_mean_it_generalises():
    import numpy as np
    chooser = random.Random(1)
    scores, groups = [chooser.random() for _ in range(60)], [chooser.randrange(12) for _ in range(60)]
    ratio = lambda sums: np.asarray(sums)[..., 0]/np.asarray(sums)[..., 1]
    assert bootstrap_interval([(s, 1) for s in scores], groups, statistic=ratio) == bootstrap_interval(scores, groups)
    assert summarise([(s, 1) for s in scores], groups, statistic=ratio) == pytest.approx(summarise(scores, groups))
    assert summarise([], statistic=ratio) == summarise([])
    f1 = lambda c: 2*np.asarray(c)[..., 0]/(np.asarray(c)[..., 1] + np.asarray(c)[..., 2])
    got = summarise([(1, 2, 1), (0, 1, 3), (2, 2, 2)], ["a", "b", "a"], statistic=f1)
    assert got["value"] == pytest.approx(2*3/(5 + 6)) and (got["n"], got["groups"]) == (3, 2) and got["low"] <= got["value"] <= got["high"]
