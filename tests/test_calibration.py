"""Calibration: agreement with scikit-learn, hand-worked examples, properties, the figure."""
import json, math, random
import pytest
from hypothesis import given, settings, strategies as st
from medchat.calibration import calibration, plot_calibration
from medchat.core import MedchatError

confidence = st.one_of(st.floats(0, 1), st.sampled_from([0., .1, .2, .3, .5, .7, .9, 1.])) # the edges of bins too
answers = st.lists(st.tuples(confidence, st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=40)
def columns(rows): return [list(c) for c in zip(*rows)]
def close(a, b): assert a == pytest.approx(b, abs=1e-9), (a, b)

# -- agreement

@settings(max_examples=25, deadline=None)
@given(answers, st.sampled_from([5, 10, 15]))
def test_the_bins_agree_with_scikit_learn(rows, bins):
    from sklearn.calibration import calibration_curve
    sure, right, _ = columns(rows)
    full = [b for b in calibration(sure, right, bins=bins)["bins"] if b["n"]]
    if len(set(right)) < 2: sure, right = sure + [sure[0]]*2, right + [0, 1]; full = [b for b in calibration(sure, right, bins=bins)["bins"] if b["n"]] # scikit-learn wants both
    accuracy, mean = calibration_curve(right, sure, n_bins=bins)
    close([b["accuracy"] for b in full], list(accuracy))
    close([b["confidence"] for b in full], list(mean))

@settings(max_examples=40, deadline=None)
@given(answers)
def test_ece_by_the_formula_of_the_paper(rows):
    "Guo et al. 2017, equation 3, with bins ((m-1)/M, m/M]."
    sure, right, _ = columns(rows)
    total, edges = 0., [m/10 for m in range(11)]
    for m in range(10):
        inside = [i for i, c in enumerate(sure) if (edges[m] < c or m == 0) and c <= edges[m + 1]]
        if inside: total += len(inside)/len(sure)*abs(sum(right[i] for i in inside)/len(inside) - sum(sure[i] for i in inside)/len(inside))
    close(calibration(sure, right)["ece"], total)

# -- by hand

def test_by_hand():
    c = calibration([.95, .95, .95, .95, .55, .55], [1, 1, 1, 0, 1, 0], groups="aabbcc")
    close(c["ece"], 4/6*abs(.75 - .95) + 2/6*abs(.5 - .55))
    assert (c["n"], c["groups"]) == (6, 3)
    assert [(p["n"], p["accuracy"], p["threshold"]) for p in c["coverage"]] == [(4, .75, .95), (6, 4/6, .55)]
    assert [(b["low"], b["high"], b["n"]) for b in c["bins"] if b["n"]] == [(.5, .6, 2), (.9, 1., 4)]

def test_equal_confidences_are_answered_together():
    "Else the order of the rows would decide how good the surest half looks."
    c = calibration([.8]*4 + [.6]*2, [1, 0, 1, 0, 1, 1])
    assert [(p["n"], p["accuracy"]) for p in c["coverage"]] == [(4, .5), (6, 4/6)]

def test_an_edge_belongs_to_the_bin_below():
    assert [k for k, b in enumerate(calibration([0., .1, .100001, 1.], [0, 0, 0, 1])["bins"]) for _ in range(b["n"])] == [0, 0, 1, 9]

# -- what it is held against

def test_a_perfect_model_has_the_expected_error_on_average():
    rng = random.Random(0)
    sure = [rng.uniform(.5, 1) for _ in range(60)]
    drawn = [calibration(sure, [int(rng.random() < c) for c in sure]) for _ in range(120)]
    mean = sum(c["ece"] for c in drawn)/len(drawn)
    assert mean > .05 # 60 answers: a perfect model looks badly calibrated
    assert drawn[0]["expected_ece"] == pytest.approx(mean, rel=.1)
    assert .01 < sum(c["ece"] > c["expected_high"] for c in drawn)/len(drawn) < .12 # one in twenty

def test_the_expected_error_of_one_answer_by_hand():
    "Right with probability .8: the gap is .2 in 8 of 10 cases and .8 in 2 of 10."
    assert calibration([.8], [1])["expected_ece"] == pytest.approx(.8*.2 + .2*.8, abs=.03)

def test_with_many_answers_a_perfect_model_comes_to_zero():
    rng = random.Random(1)
    sure = [rng.random() for _ in range(5_000)]
    c = calibration(sure, [int(rng.random() < s) for s in sure])
    assert c["ece"] < .04 and c["expected_ece"] < .03 and c["ece"] < 1.5*c["expected_high"]
    bad = calibration(sure, [int(rng.random() < s*s) for s in sure]) # too sure of itself
    assert bad["ece"] > 5*bad["expected_high"]

def test_certain_and_right_is_no_error_and_certain_and_wrong_the_whole():
    assert calibration([1.]*9, [1]*9)["ece"] == 0 and calibration([1.]*9, [0]*9)["ece"] == 1
    assert calibration([0.]*9, [0]*9)["ece"] == 0 and calibration([1.]*9, [1]*9)["expected_ece"] == 0

def test_patients_make_the_interval_wider_than_questions():
    rng = random.Random(2)
    sure, right, groups = [], [], []
    for patient in range(20): # all answers about a patient are right, or all wrong
        good = rng.random() < .6
        for _ in range(10): sure.append(.8); right.append(int(good)); groups.append(patient)
    alone, together = calibration(sure, right), calibration(sure, right, groups)
    assert together["high"] - together["low"] > 1.5*(alone["high"] - alone["low"])
    assert alone["groups"] == 200 and together["groups"] == 20

# -- properties

@settings(max_examples=20, deadline=None)
@given(answers, st.integers(0, 99))
def test_ranges_order_and_coverage(rows, seed):
    sure, right, groups = columns(rows)
    c = calibration(sure, right, groups)
    assert 0 <= c["low"] <= c["ece"] <= c["high"] <= 1 and 0 <= c["expected_ece"] <= 1 and c["groups"] == len(set(groups))
    assert sum(b["n"] for b in c["bins"]) == c["n"] == len(rows)
    points = c["coverage"]
    assert 1 <= len(points) <= 20 and all(a["coverage"] < b["coverage"] and a["threshold"] > b["threshold"] for a, b in zip(points, points[1:]))
    close([points[-1]["coverage"], points[-1]["accuracy"]], [1, sum(right)/len(right)])
    for p in points:
        inside = [r for s, r in zip(sure, right) if s >= p["threshold"]]
        assert len(inside) == p["n"]; close(sum(inside)/len(inside), p["accuracy"])
    assert calibration(*columns(random.Random(seed).sample(rows, len(rows)))) == c
    assert json.loads(json.dumps(c)) == c

def test_many_points_are_thinned_and_reach_the_end():
    points = calibration([i/1000 for i in range(1000)], [i % 2 for i in range(1000)])["coverage"]
    assert [p["n"] for p in points] == [50*k for k in range(1, 21)]

# -- bad input

def test_without_answers_there_are_no_numbers():
    c = calibration([], [])
    assert c["n"] == 0 and c["groups"] == 0 and c["coverage"] == [] and all(c[k] is None for k in ("ece", "low", "high", "expected_ece", "expected_high"))
    assert len(c["bins"]) == 10 and all(b["n"] == 0 and b["accuracy"] is None for b in c["bins"])

@pytest.mark.parametrize("arguments, message", [(([.5], [1, 0]), r"same length"), (([.5], [1], ["a", "b"]), r"\[1, 1, 2\]"), (([1.2], [1]), "from 0 to 1: 1.2"),
    (([math.nan], [1]), "from 0 to 1: nan"), (([None], [1]), "from 0 to 1"), (([.5], [.5]), "right .* or wrong"), (([.5], [None]), "right .* or wrong")])
def test_bad_input(arguments, message):
    with pytest.raises(MedchatError, match=message): calibration(*arguments)

def test_numpy_columns():
    import numpy as np
    assert calibration(np.array([.9, .8], np.float32), np.array([True, False]), np.array(["a", "b"]))["n"] == 2

def test_a_probability_may_be_rounded_past_one():
    assert calibration([1.0000001, -1e-9], [1, 0])["ece"] == 0

# -- the figure

def test_the_figure_shows_each_model_and_its_n(tmp_path):
    rng = random.Random(3)
    sure = [rng.random() for _ in range(50)]
    figure = plot_calibration(dict(base=calibration(sure, [1, 0]*25), tuned=calibration([], [])))
    figure.savefig(tmp_path/"c.png"); figure.savefig(tmp_path/"c.svg")
    said = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    assert any(t.startswith("base") and t.endswith("n = 50") for t in said) and "tuned: no answers" in said
    reliability, counts, coverage = (next(a for a in figure.axes if key in (a.get_title(), a.get_ylabel())) for key in ("Reliability", "answers", "Accuracy over coverage"))
    assert sum(bar.get_height() for bar in counts.patches) == 50
    assert max(x for line in coverage.lines for x in line.get_xdata()) == 1

def test_a_figure_of_nothing_can_be_drawn(tmp_path):
    plot_calibration({}).savefig(tmp_path/"empty.png")
    assert (tmp_path/"empty.png").stat().st_size > 1000
