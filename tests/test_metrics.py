"The scores: edge cases, and properties that must hold for any text."
import json, math, random, statistics, time

import pytest
from hypothesis import assume, given, settings, strategies as st

from medchat.core import MedchatError
from medchat.metrics import bootstrap_interval, mean, normalise_answer, open_recall, paired_difference, score_open, summarise, wilson_interval

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
    for score in (open_recall,):
        value = score(*zip(*pairs))
        assert value == score(*zip(*mixed)) and 0 <= value <= 1

@pytest.mark.parametrize("score", [open_recall])
def test_no_rows_no_score_and_unequal_rows(score):
    assert score([], []) is None
    with pytest.raises(MedchatError, match="one reference for each reply"): score(["yes", "no"], ["yes"])

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


# --- the difference of two models on the same questions

right = st.lists(st.tuples(st.sampled_from([0., 1.]), st.sampled_from([0., 1.])), min_size=1, max_size=11)
shares = st.lists(st.tuples(*[st.sampled_from([0., .25, 1/3, .5, 1.])]*2, st.integers(0, 4)), min_size=1, max_size=24)

def _columns(rows): return [list(c) for c in zip(*rows)]

@settings(max_examples=60)
@given(right)
def test_one_question_a_patient_is_mcnemars_exact_test(rows):
    from scipy.stats import binomtest
    first, second = _columns(rows)
    better, worse = sum(b > a for a, b in rows), sum(a > b for a, b in rows)
    got = paired_difference(first, second, resamples=1100)
    assert got["p"] == pytest.approx(binomtest(min(better, worse), better + worse).pvalue if better + worse else 1.)
    assert got["value"] == pytest.approx((better - worse)/len(rows)) and (got["n"], got["groups"]) == (len(rows), len(rows))

@pytest.mark.parametrize("better, worse", [(40, 20), (30, 25), (60, 58), (20, 2)])
def test_many_patients_are_near_mcnemars_exact_test(better, worse):
    "Too many sign patterns to try all: 5,000 are drawn."
    from scipy.stats import binomtest
    p, want = paired_difference([0]*better + [1]*worse + [1]*50, [1]*better + [0]*worse + [1]*50)["p"], binomtest(worse, better + worse).pvalue
    assert abs(p - want) < 4*math.sqrt(max(want, 1/5000)*(1 - want)/5000) + 1/5000 and p > 0

@given(shares)
def test_the_sign_flip_test_against_brute_force(rows):
    from fractions import Fraction
    from itertools import product
    sums = {}
    for a, b, g in rows: sums[g] = sums.get(g, 0) + Fraction(b).limit_denominator(99) - Fraction(a).limit_denominator(99)
    patterns = [abs(sum(s*d for s, d in zip(signs, sums.values()))) for signs in product((1, -1), repeat=len(sums))]
    want = sum(p >= abs(sum(sums.values())) for p in patterns)/len(patterns)
    assert paired_difference(*_columns(rows), resamples=50)["p"] == pytest.approx(want)

def test_a_difference_by_hand():
    "Three patients: +1 and +1, +1/2, 0. Of the four patterns of signs two give a sum as far from 0 as 2.5. All three drawn are c in 1 of 27 draws, and a as often: more than 2.5%."
    got = paired_difference([0, 0, .5, .5], [1, 1, 1, .5], ["a", "a", "b", "c"])
    assert got == dict(value=2.5/4, n=4, groups=3, low=0, high=1, p=.5)

@settings(max_examples=60)
@given(st.lists(st.tuples(*[st.sampled_from([0., .25, 1/3, .5, 1.])]*2, st.integers(0, 30)), min_size=1, max_size=60))
def test_the_other_way_round_is_the_same_with_another_sign(rows):
    "Exactly: who compares A with B and who compares B with A must not report two intervals or two p."
    first, second, groups = _columns(rows)
    there, back = paired_difference(first, second, groups, resamples=100), paired_difference(second, first, groups, resamples=100)
    assert [back[k] for k in ("value", "low", "high", "p")] == pytest.approx([-there["value"], -there["high"], -there["low"], there["p"]], abs=1e-9)

@settings(max_examples=60)
@given(shares, st.randoms())
def test_order_and_names_of_patients_do_not_matter(rows, rnd):
    first, second, groups = _columns(rows)
    want, mixed = paired_difference(first, second, groups, resamples=100), rows[:]
    rnd.shuffle(mixed)
    first, second, groups = _columns(mixed)
    assert paired_difference(first, second, [f"p{g}" for g in groups], resamples=100) == want

@settings(max_examples=60)
@given(shares)
def test_the_difference_is_in_its_interval_and_that_of_the_means(rows):
    first, second, groups = _columns(rows)
    got = paired_difference(first, second, groups, resamples=200)
    assert got["value"] == pytest.approx(mean(second) - mean(first), abs=1e-12)
    assert -1 <= got["low"] <= got["value"] + 1e-12 and got["value"] - 1e-12 <= got["high"] <= 1 and got["high"] > got["low"] and 0 < got["p"] <= 1
    assert json.loads(json.dumps(got)) == got                                       # plain numbers, for the file

@given(st.lists(st.sampled_from([-1., 0., 1.]), min_size=1, max_size=5), st.integers(1, 2))
def test_questions_of_one_patient_are_no_further_evidence(patients, each):
    "Where all questions of a patient changed alike, counting them as independent can only make p smaller."
    first, second = ([float(d == s) for d in patients for _ in range(each)] for s in (-1, 1))
    groups = [i for i in range(len(patients)) for _ in range(each)]
    grouped, naive, once = paired_difference(first, second, groups, resamples=600), paired_difference(first, second, resamples=600), paired_difference(first[::each], second[::each], resamples=600)
    assert grouped["p"] >= naive["p"] - 1e-9 and grouped["p"] == pytest.approx(once["p"]) and grouped["value"] == pytest.approx(naive["value"])

def test_groups_widen_the_interval_of_a_difference():
    first, second, groups = [0.]*120, [float(i//10 % 2) for i in range(120)], [i//10 for i in range(120)]
    width = lambda d: d["high"] - d["low"]
    assert width(paired_difference(first, second, groups)) > 2*width(paired_difference(first, second))

def test_pairs_that_agree_say_more_than_two_intervals():
    "Two models with the same hard questions: their intervals overlap, their difference is clear."
    first, second = [1.]*60 + [0.]*40, [1.]*70 + [0.]*30
    a, b, d = summarise(first), summarise(second), paired_difference(first, second)
    assert a["high"] > b["low"] and d["low"] > 0 and d["p"] == pytest.approx(2/2**10)

def test_no_difference():
    assert paired_difference([], []) == dict(value=None, n=0, groups=0, low=None, high=None, p=None)
    same = paired_difference([1, 0, .5]*8, [1, 0, .5]*8)
    assert (same["value"], same["p"]) == (0, 1) and same["low"] == -same["high"] < 0   # not a width of nothing: it is known from 24 questions alone
    assert paired_difference([1]*10, [1]*10)["high"] > paired_difference([1]*100, [1]*100)["high"] > 0
    all_better = paired_difference([0]*6, [1]*6, ["one patient"]*6)
    assert (all_better["value"], all_better["high"], all_better["p"], all_better["groups"]) == (1, 1, 1, 1) and all_better["low"] < .3

@pytest.mark.parametrize("columns", [([1], [1, 0]), ([1, 0], [1, 0], ["a"]), ([1, 0], [])])
def test_unequal_columns_have_no_difference(columns):
    with pytest.raises(MedchatError): paired_difference(*columns)

def test_the_difference_is_seeded_and_leaves_the_global_seed_alone():
    import numpy as np
    rows = [[float(i % 3 == 0) for i in range(90)], [float(i % 4 == 0) for i in range(90)]]
    np.random.seed(5); want = np.random.rand(); np.random.seed(5)
    assert paired_difference(*rows) == paired_difference(*rows) and np.random.rand() == want
    assert paired_difference(*rows, seed=1) != paired_difference(*rows)
    narrow, wide = paired_difference(*rows, level=.5), paired_difference(*rows, level=.99)
    assert wide["low"] < narrow["low"] and narrow["high"] < wide["high"]

def test_p_and_interval_keep_their_promise():
    "Two equal models, patients of eight alike questions: p below 5% in about 5% of all trials, and the interval holds 0 in about 95%. Without groups neither is so."
    rng, trials, early, naive, holds = random.Random(0), 200, 0, 0, 0
    for _ in range(trials):
        first, second, groups = [], [], []
        for g in range(30):
            a, b = rng.random() < .5, rng.random() < .5
            first += [float(a)]*8; second += [float(b)]*8; groups += [g]*8
        grouped, alone = paired_difference(first, second, groups, resamples=300), paired_difference(first, second, resamples=300)
        early += grouped["p"] < .05; naive += alone["p"] < .05; holds += grouped["low"] <= 0 <= grouped["high"]
    assert early/trials < .08 < .3 < naive/trials and holds/trials > .9

def test_a_large_comparison_takes_little_time_and_memory():
    "6,000 patients, 5,000 draws: not a table of all draws at once."
    import tracemalloc
    tracemalloc.start(); start = time.process_time()
    try: paired_difference([i % 2 for i in range(6_000)], [i % 3 == 0 for i in range(6_000)])
    finally: (_, peak), took = tracemalloc.get_traced_memory(), time.process_time() - start; tracemalloc.stop()
    assert took < 10 and peak < 200e6, f"{peak/1e6:.0f} MB"
