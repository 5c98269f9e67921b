"Scoring: every number by hand, none without its n, and none under another's name."
import math, re
import pytest
from hypothesis import given, settings, strategies as st
from medchat.answers import Answer
from medchat.scoring import (SCORES, aligned, calibrate, compare_answers, confusion, differences, majority_replies, mistakes, score_reply, score_table, show_gain, show_p, show_score, slice_scores, summarise_replies, text_scores, text_table)
from question_maker import question

def answers(replies, confidence=.8): return [Answer(r, confidence) for r in replies]
def compare(qs, base, tuned, always=None): return compare_answers(qs, answers(base), answers(tuned), always)
def cells(table): return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]

@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    "Intervals and p-values have tests of their own: here 50 draws are enough."
    from medchat import metrics
    for f in (metrics.bootstrap_interval, metrics.paired_difference): monkeypatch.setattr(f, "__defaults__", tuple(50 if x in (2000, 5000) else x for x in f.__defaults__))

# --- always the same

def test_majority():
    train = [question(i, text="Is it?", reference=r) for i, r in enumerate(["no", "no", "yes"])] + [question(9, text="Side?", reference="left")]
    asked = [question(0, text="is IT"), question(1, text="Side?"), question(2, text="never seen"), question(3, text="Is it?", answer_type="open")]
    assert majority_replies(train, asked) == ["no", "left", "no", ""]

@given(st.permutations(["b", "a", "c", "a", "b"]))
def test_majority_ties_do_not_depend_on_the_order(references):
    assert majority_replies([question(i, reference=r) for i, r in enumerate(references)], [question(0)]) == ["a"]

def test_majority_without_training(): assert majority_replies([], [question(0)]) == [""]

# --- one reply

@pytest.mark.parametrize("q, reply, want", [
    (question(0), "Yes.", (1.0, True)), (question(0), "no", (0.0, True)), (question(0), "yes or no", (0.0, False)), (question(0, reference="no"), "normal", (0.0, False)),
    (question(0, text="CT or MRI?", reference="MRI"), "CT", (0.0, True)), (question(0, answer_type="open", reference="left effusion"), "effusion", (0.5, True)),
    (question(0, answer_type="open", reference="left effusion"), "", (0.0, False)), (question(0, kind="report", reference="no effusion"), "No effusion seen", (1.0, True))])
def test_score_reply(q, reply, want): assert score_reply(q, reply) == want

@pytest.mark.parametrize("reply", ["normal", "nodule", "known", "north", "nothing", "notch", "none", "I do not know", "abnormal", "nose", "unknown", "eyes", "yesterday", "bayes", "polyesters"])
@pytest.mark.parametrize("reference", ["yes", "no"])
def test_letters_of_a_word_are_no_answer(reply, reference):
    "yes and no are words; a script that looks for substrings finds both all over."
    assert score_reply(question(0, reference=reference), reply) == (0.0, False)

@given(st.text(st.characters(categories=["Ll"], max_codepoint=127), min_size=3, max_size=12).filter(lambda w: w != "yes"))
def test_no_word_but_yes_and_no_is_yes_or_no(word):
    assert score_reply(question(0, text="?", reference="no"), f"{word}no no{word}")[0] == score_reply(question(0, text="?", reference="yes"), f"{word}yes yes{word}")[0] == 0

# --- all replies of a model

def test_a_summary_counts_everything():
    qs = [question(i, group=i // 2) for i in range(4)] + [question(9, answer_type="open", reference="a b")]
    got = summarise_replies(qs, ["yes", "no", "yes no", "", "b"])
    assert list(got) == ["closed_accuracy", "open_recall"]
    assert {k: got["closed_accuracy"][k] for k in ("value", "n", "groups", "unparsed")} == dict(value=0.25, n=4, groups=2, unparsed=2)
    with pytest.raises(ValueError): summarise_replies(qs, ["yes"])

def test_each_kind_has_its_score_those_of_questions_first():
    qs = [question(0, kind="report", reference="clear lungs"), question(1, kind="conversation", reference="later"), question(2, answer_type="open", reference="left lung"), question(3), question(4, kind="caption", reference="a large heart")]
    got = summarise_replies(qs, ["Clear.", "", "the left one", "no", "heart"])
    assert list(got) == [*SCORES, "caption_recall", "conversation_recall", "report_recall"]
    assert [(s["value"], s["n"], s["unparsed"]) for s in got.values()] == [(0, 1, 0), (.5, 1, 0), (.5, 1, 0), (0, 1, 1), (.5, 1, 0)]
    assert summarise_replies([], []) == {}

some = st.lists(st.tuples(st.sampled_from(["vqa", "caption", "report", "conversation"]), st.sampled_from(["closed", "open"]), st.sampled_from("abc"), st.sampled_from(["yes", "no", "left", "a nodule", "", "图中有肺"]), st.sampled_from(["yes", "no", "left", "left nodule"])), min_size=1, max_size=14)

@settings(max_examples=40)
@given(some)
def test_every_score_is_between_its_ends_and_every_question_counts(rows):
    qs = [question(i, kind, answer_type, group, reference=reference) for i, (kind, answer_type, group, _, reference) in enumerate(rows)]
    replies = [r[3] for r in rows]
    got = summarise_replies(qs, replies)
    assert sum(s["n"] for s in got.values()) == len(qs)
    for name, s in got.items():
        mine = [(q, r) for q, r in zip(qs, replies) if q.score_name == name]
        assert s["n"] == len(mine) and s["value"] == pytest.approx(sum(score_reply(*x)[0] for x in mine)/len(mine)) and 0 <= s["low"] <= s["value"] <= s["high"] <= 1
        assert s["unparsed"] == sum(not score_reply(*x)[1] for x in mine) and s["groups"] == len({q.group for q, _ in mine})

# --- texts

def test_texts_get_the_scores_of_the_papers():
    report = "The heart is enlarged. No pneumothorax."
    qs = [question(0), question(1, answer_type="open", reference="left lung"), question(2, answer_type="open", reference="nodule", group=7), question(3, kind="report", reference=report)]
    got = text_scores(qs, ["yes", "the left upper lung", "nodule", "The heart is not enlarged. No pneumothorax."])
    assert list(got) == ["open", "report"] # closed questions are no texts
    assert [got["open"][k]["value"] for k in ("exact_match", "precision", "recall", "f1")] == pytest.approx([.5, (2/3 + 1)/2, 1, (.8 + 1)/2])
    assert all(s["n"] == 2 and s["low"] <= s["value"] <= s["high"] for s in got["open"].values())
    assert got["report"]["rouge_1"]["value"] > .9 and got["report"]["finding_f1_micro"]["value"] == 0
    assert {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_1", "rouge_2", "rouge_l", "meteor_exact_stem", "cider", "finding_f1_micro", "finding_f1_macro"} == set(got["report"])
    table = text_table(text_scores(qs, [""]*4), got).splitlines()
    assert len({len(line) for line in table}) == 1 and any(line.startswith("report rouge l") for line in table) and text_table({}, {}) == ""
    assert text_scores(qs[:1], ["yes"]) == {}

def test_precision_and_recall_are_never_swapped():
    "A long reply holds the reference's words among many others: its recall is high, its precision low. A short one the other way round."
    q = [question(0, answer_type="open", reference="left pleural effusion")]
    long, short = (text_scores(q, [reply])["open"] for reply in ("left pleural effusion nodule mass fracture pneumonia edema cardiomegaly", "effusion"))
    assert {k: long[k]["value"] for k in ("recall", "precision", "f1")} == dict(recall=1, precision=pytest.approx(3/9), f1=pytest.approx(.5))
    assert {k: short[k]["value"] for k in ("recall", "precision", "f1")} == dict(recall=pytest.approx(1/3), precision=1, f1=pytest.approx(.5))
    assert summarise_replies(q, ["effusion"])["open_recall"]["value"] == pytest.approx(1/3)

def test_the_recall_of_texts_is_that_of_the_summary():
    qs = [question(i, answer_type="open", reference=r) for i, r in enumerate(("left lung", "nodule", "a mass in the liver"))]
    replies = ["lung", "effusion", "liver mass"]
    assert text_scores(qs, replies)["open"]["recall"]["value"] == pytest.approx(summarise_replies(qs, replies)["open_recall"]["value"])

def test_scores_of_counts_are_those_of_all_texts_together():
    "BLEU of a corpus is no mean of BLEUs; and CIDEr goes to 10."
    from medchat.scores import bleu, cider
    qs = [question(i, kind="report", reference=r, group=i) for i, r in enumerate(("The heart is large.", "No effusion is seen on the left."))]
    replies = ["The heart is large.", "An effusion."]
    got = text_scores(qs, replies)["report"]
    assert [got[f"bleu_{n}"]["value"] for n in (1, 2, 3, 4)] == pytest.approx(list(bleu(replies, [q.reference for q in qs]).values()))
    assert got["cider"]["value"] == pytest.approx(sum(cider(replies, [q.reference for q in qs]))/2) and 1 < got["cider"]["high"] <= 10

# --- which wrong answer

def test_confusion_by_hand():
    qs = [question(i, reference=r) for i, r in enumerate(("yes", "yes", "yes", "no", "no"))] + [question(5, text="Left or right?", reference="Left"), question(6, text="Left or right?", reference="right")]
    qs += [question(7, answer_type="open"), question(8, text="Which plane?", reference="axial"), question(9, kind="report", reference="yes")]
    got = confusion(qs, ["yes", "no", "perhaps", "normal", "No, it is not", "right", "left and right", "yes", "axial", "no"])
    assert got == [dict(choices=["no", "yes"], counts=dict(no=dict(unread=1, no=1), yes=dict(yes=1, no=1, unread=1))), dict(choices=["left", "right"], counts=dict(left=dict(right=1), right=dict(unread=1)))]

@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["yes", "no", "Left", "right"]), st.sampled_from(["yes", "no", "left", "Right.", "maybe", "", "normal", "yes and no"])), max_size=30))
def test_the_diagonal_is_the_accuracy(rows):
    qs = [question(i, reference=r) for i, (r, _) in enumerate(rows)]
    found, summary = confusion(qs, [said for _, said in rows]), summarise_replies(qs, [said for _, said in rows]).get("closed_accuracy")
    counts = [(right, said, n) for table in found for right, row in table["counts"].items() for said, n in row.items()]
    assert sum(n for *_, n in counts) == len(rows)
    if rows:
        assert sum(n for right, said, n in counts if right == said)/len(rows) == pytest.approx(summary["value"])
        assert sum(n for _, said, n in counts if said == "unread") == summary["unparsed"]
    assert all(right in table["choices"] and set(row) <= {*table["choices"], "unread"} for table in found for right, row in table["counts"].items())

def test_the_most_asked_choices_come_first():
    qs = [question(i, text="CT or MRI?", reference="CT") for i in range(3)] + [question(9)]
    assert [t["choices"] for t in confusion(qs, [""]*4)] == [["ct", "mri"], ["no", "yes"]] and confusion([], []) == []

# --- mistakes and calibration

def test_mistakes_by_hand():
    qs = [question(0, kind="report", reference="The heart is enlarged. No pleural effusion.", language="en"), question(1, kind="caption", reference="Pneumonia.", language="en"), question(2, kind="report", reference="心脏增大", language="zh"),
          question(3, text="Which side?", reference="left"), question(4, text="Which side?", reference="right"), question(5, kind="conversation", reference="left")]
    got = mistakes(qs, ["Pleural effusion.", "Pneumonia.", "Pneumothorax.", "on the right", "right lung", "right"])
    h = got["hallucinations"]
    assert [(h[k]["value"], h[k]["n"]) for k in ("said_wrong", "missed", "contradicted", "reports_with")] == [(.5, 2), (.5, 2), (.5, 2), (.5, 2)] # the Chinese one is not read
    assert h["examples"] == [dict(id="q0", invented=["Pleural Effusion"], missed=["Cardiomegaly"])]
    assert (got["sides"]["value"], got["sides"]["n"], got["sides"]["asked"]) == (.5, 2, 2) # conversations are no questions about sides
    text = mistakes([question(0, kind="report", reference="Left pleural effusion. Right pneumothorax.", language="en")], ["Right pleural effusion. Right pneumothorax."])["text_sides"]
    assert (text["value"], text["n"]) == (.5, 2) # each finding with itself

def test_no_texts_no_mistakes():
    assert mistakes([question(0, kind="conversation", reference="x")], ["x"]) == dict(hallucinations=None, sides=None, text_sides=None)
    got = mistakes([question(0)], ["yes"])
    assert got["hallucinations"] is None and (got["sides"]["value"], got["sides"]["n"]) == (None, 0)

def test_reports_in_a_language_that_nobody_named_are_read():
    "An empty language counts as English for a benchmark (`in_benchmark`); here, too."
    got = mistakes([question(0, kind="report", reference="Pneumonia.", language="")], ["Pneumothorax."])["hallucinations"]
    assert got and got["said_wrong"]["value"] == 1

def test_calibration_by_hand():
    "Two at 0.9, one of them right; two at 0.6, both right: gaps of 0.4 and 0.4. An open question does not count."
    qs = [question(i) for i in range(4)] + [question(4, answer_type="open")]
    got = calibrate(qs, [Answer("yes", .9), Answer("no", .9), Answer("yes", .6), Answer("Yes.", .6), Answer("yes", .1)])
    assert got["ece"] == pytest.approx(.4) and got["n"] == 4 and got["expected_ece"] > 0
    assert calibrate(qs[4:], [Answer("yes", .1)]) is None

def test_an_unread_reply_is_a_wrong_one_for_the_calibration():
    got = calibrate([question(i) for i in range(2)], [Answer("normal", .95), Answer("yes and no", .95)])
    assert got["ece"] == pytest.approx(.95)

# --- side by side

def test_differences_by_hand():
    qs = [question(i, group=i) for i in range(4)] + [question(9, answer_type="open", reference="left lung")]
    got = differences(qs, ["no", "no", "yes", "yes", "left lung"], ["yes", "yes", "yes", "no", "lung"])
    assert {k: (d["value"], d["n"], d["groups"]) for k, d in got.items()} == dict(closed_accuracy=(.25, 4, 4), open_recall=(-.5, 1, 1))
    assert got["closed_accuracy"]["p"] == 1 and got["closed_accuracy"]["low"] < .25 < got["closed_accuracy"]["high"]

@settings(max_examples=30)
@given(some, st.randoms())
def test_the_difference_is_that_of_the_two_scores(rows, rnd):
    qs = [question(i, kind, answer_type, group, reference=reference) for i, (kind, answer_type, group, _, reference) in enumerate(rows)]
    base, tuned = [r[3] for r in rows], [rnd.choice(["yes", "no", "left nodule", ""]) for _ in rows]
    got = compare(qs, base, tuned)
    assert set(got["difference"]) == set(got["base"]) == set(got["tuned"])
    for k, d in got["difference"].items(): assert d["value"] == pytest.approx(got["tuned"][k]["value"] - got["base"][k]["value"]) and d["n"] == got["tuned"][k]["n"] and d["groups"] == got["tuned"][k]["groups"]

def slices(qs, base=None, tuned=None): return slice_scores(qs, base or ["no"]*len(qs), tuned or ["yes"]*len(qs))

def test_slices_by_hand():
    qs = [question(0, types=["a", "b"], modality="CT"), question(1, types=["b"], reference="no", modality="MRI"), question(2, modality="CT", organ="lung")]
    got = [(s["by"], s["name"], s["tuned"]["closed_accuracy"]["value"], s["base"]["closed_accuracy"]["value"], s["tuned"]["closed_accuracy"]["n"]) for s in slices(qs)]
    assert got == [("type", "a", 1, 0, 1), ("type", "b", .5, .5, 2), ("modality", "CT", 1, 0, 2), ("modality", "MRI", 0, 1, 1)] # all organs that are named are one: nothing to compare

def test_a_slice_is_not_counted_twice():
    "A source may name a type twice."
    (got,) = slices([question(0, types=["b", "b"])])
    assert got["tuned"]["closed_accuracy"]["n"] == 1

def test_slices_by_one_language_alone_are_left_out():
    assert slices([question(i, language="en") for i in range(3)]) == []
    assert [s["name"] for s in slices([question(0, language="en"), question(1, language="zh")])] == ["en", "zh"]

def test_compare_says_everything():
    qs = [question(0, types=["a"]), question(1, types=["b"], reference="no"), question(2), question(3, kind="report", reference="Pneumonia.", language="en")]
    got = compare(qs, ["no"]*4, ["yes"]*4, ["yes", "no", "yes", "Pneumonia."])
    assert set(got) == {"base", "tuned", "difference", "always_same", "slices", "texts", "confusion", "mistakes", "calibration"}
    assert got["always_same"] == dict(closed_accuracy=1.0, report_recall=1.0) and compare(qs, ["no"]*4, ["yes"]*4)["always_same"] is None
    assert [set(got[k]) for k in ("texts", "confusion", "mistakes", "calibration")] == [{"base", "tuned"}]*4
    assert got["base"]["closed_accuracy"]["value"] == pytest.approx(1/3) and got["tuned"]["closed_accuracy"]["value"] == pytest.approx(2/3) # base first, tuned second

# --- tables

def test_the_table_is_aligned():
    qs = [question(0, types=["a long name of a type"]), question(1, kind="report", reference="x")]
    lines = score_table(compare(qs, ["no", ""], ["yes", "x"])).splitlines()
    assert len({len(line) for line in lines}) == 1 and "+100.0" in lines[1] and "1.000" in lines[1] and lines[1].startswith("closed accuracy")

def test_every_score_in_the_table_has_its_n_and_interval():
    qs = [question(i, types=["pres" if i % 2 else "size"], group=i//4, modality="CT" if i % 3 else "MRI", reference="yes" if i % 5 else "no") for i in range(1200)] + [question(2000 + i, answer_type="open", reference="left lung", types=["place"]) for i in range(7)]
    result = compare(qs, ["no"]*len(qs), ["yes"]*1200 + ["lung"]*7, ["yes"]*len(qs))
    head, *rows = cells(score_table(result))
    assert head == ["n", "always same", "base", "tuned", "gain", "p", "unread"]
    assert [(r[0], r[1]) for r in rows] == [("closed accuracy", "1,200"), ("open recall", "7"), ("place open", "7"), ("pres closed", "600"), ("size closed", "600"), ("modality CT closed", "800"), ("modality MRI closed", "400")]
    for row in rows: assert len([c for c in row if re.fullmatch(r"\d\.\d{3} \(\d\.\d\d-\d\.\d\d\)", c)]) == 2, row                     # base and tuned, each with its interval
    assert re.fullmatch(r"\+60\.0 \(\+\d+ to \+\d+\)", rows[0][5]) and rows[0][2] == "0.800" and rows[0][6] == show_p(result["difference"]["closed_accuracy"]["p"]) and rows[0][-1] == "0 / 0" and "7 / 0" not in rows[0]
    assert rows[1][-1] == "0 / 0" and rows[3][-2].startswith(("+", "-"))

def test_unread_replies_are_in_the_table():
    rows = cells(score_table(compare([question(i) for i in range(3)], ["normal", "", "yes"], ["yes", "yes no", "no"])))
    assert rows[1][-1] == "2 / 1"

def test_the_text_table_has_n_for_each():
    qs = [question(i, answer_type="open", reference="left lung") for i in range(3)] + [question(9, kind="report", reference="No effusion.")]
    got = compare(qs, [""]*4, ["lung"]*3 + ["Effusion."])["texts"]
    head, *rows = cells(text_table(**got))
    assert head == ["n", "base", "tuned"] and [r[1] for r in rows] == ["3"]*4 + ["1"]*5 and all(len(r) == 4 for r in rows)

def test_how_numbers_are_shown():
    assert show_score(dict(value=.5, low=.25, high=1, n=3)) == "0.500 (0.25-1.00)" and show_score(dict(value=None, low=None, high=None, n=0)) == "-"
    assert show_gain(dict(value=-.1234, low=-.25, high=.004)) == "-12.3 (-25 to +0)"
    assert aligned([["", "n"], ["a", "1,000"]]) == "       n\na  1,000"

def test_slices_have_the_scores_of_their_open_answers():
    qs = [question(0, answer_type="open", reference="left lung", types=["where"]), question(1, answer_type="open", reference="nodule", types=["what"]), question(2, types=["is"])]
    found = {row["name"]: row["texts"] for row in slice_scores(qs, ["", "", "yes"], ["left lung", "effusion", "yes"])}
    assert found["is"] == dict(base={}, tuned={}) and found["where"]["tuned"]["exact_match"]["value"] == 1 and found["what"]["tuned"]["exact_match"]["value"] == 0 == found["where"]["base"]["f1"]["value"]
    assert {"precision", "recall", "f1", "bleu_1", "bleu_4"} <= set(found["where"]["tuned"]) and found["where"]["tuned"]["f1"]["n"] == 1
