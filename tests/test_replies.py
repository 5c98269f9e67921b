"Reading replies: what they choose, by rules; edge cases, and properties that must hold for any text."
import pytest
from hypothesis import given, strategies as st

from medchat.core import MedchatError
from medchat.metrics import normalise_answer, score_open
from medchat.replies import CHOICES, STATUSES, closed_accuracy, closed_choices, is_doubtful, parse_choice, parse_letter, parse_options, parse_status, parse_yes_no, read_closed, score_closed

texts = st.text(max_size=60)
word = st.sampled_from("yes no left right normal effusion nodule not a the , . - 2 two none isn't ct or mri lung 1.5".split())
phrases = st.lists(word, max_size=10).map(" ".join)

# --- closed

@pytest.mark.parametrize("question, reference, want", [
    ("", "yes", ("yes", "no")), ("", "No.", ("yes", "no")), ("", "Left side", ("left", "right")), ("", "the RIGHT lung", ("left", "right")),
    ("", "axial", ()), ("", "", ()), ("", "left and right", ()), ("Is it?", "both", ()),
    ("CT or MRI?", "MRI", ("ct", "mri")), ("Is it with or without contrast?", "With contrast", ("with", "without")),
    ("Is this a contrast or non contrast CT?", "non-contrast", ()),                # both words of the pair stand in the reference
    ("Is this a T1 weighted, T2 weighted, or FLAIR image?", "FLAIR", ("weighted", "t2 weighted", "flair")),
    ("left, right, or both?", "both", ("left", "right", "both")), ("or", "yes", ("yes", "no")), ("or or or", "or", ()),
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
    if choices and choices not in (CHOICES[0], STATUSES): assert parsed == (parse_choice(reply, choices) is not None)
    assert score_closed(reply.upper(), reference.upper(), question.upper()) == (right, parsed)

@given(texts, st.sampled_from(CHOICES))
def test_a_choice_is_a_word_of_the_reply(reply, choices):
    said = parse_choice(reply, choices)
    assert said is None or (said in choices and said in normalise_answer(reply).split())

@given(texts, texts, texts)
def test_any_text_gets_a_score(reply, reference, question):
    assert set(map(type, score_closed(reply, reference, question))) == {bool}
    assert 0 <= score_open(reply, reference) <= 1



@pytest.mark.parametrize("reply, want", [("Possibly", True), ("It is likely a cyst", True), ("unlikely", True), ("cannot be determined", True), ("I can't tell", True), ("It is not entirely clear", True), ("may be present", True),
    ("suspicious for a nodule", True), ("不确定", True), ("可能有", True), ("Yes", False), ("no", False), ("known cyst", False), ("in May", False), ("the hilum is clear", False), ("", False), ("没有", False), ("clear lungs", False)])
def test_doubt(reply, want): assert is_doubtful(reply) == want

@pytest.mark.parametrize("reply, question, want", [
    ("The heart is enlarged", "Is the heart enlarged?", "yes"), ("It isn't enlarged", "Is the heart enlarged?", "no"), ("not enlarged", "Is the heart enlarged?", "no"), ("enlarged", "Is the heart enlarged?", "yes"),
    ("It is not", "Is the heart enlarged?", "no"), ("It is", "Is the heart enlarged?", None), ("normal", "Is the heart enlarged?", None), ("the liver is enlarged", "Is the heart enlarged?", None),
    ("No evidence of it", "Is there an effusion?", "no"), ("There is no effusion", "Is there an effusion?", "no"), ("There is no pneumothorax", "Is there an effusion?", None), ("no pneumothorax", "", "no"),
    ("No, there is a pneumothorax", "Is there an effusion?", "no"), ("Probably yes", "Is there an effusion?", None), ("yes and no", "Is there an effusion?", None), ("nodule", "Is there a nodule?", "yes"),
    ("没有", "图中有异常吗?", "no"), ("有", "图中有异常吗?", "yes"), ("不包含", "", "no"), ("是的。", "", "yes"), ("不正常", "看起来正常吗?", "no"), ("正常", "看起来正常吗?", "yes"), ("非常正常", "看起来正常吗?", None), ("肝脏", "图中有异常吗?", None)])
def test_yes_no(reply, question, want): assert parse_yes_no(reply, question) == want

@pytest.mark.parametrize("reply, want", [("present", "present"), ("not present", "absent"), ("absent", "absent"), ("not absent", "present"), ("positive", "present"), ("Negative.", "absent"), ("equivocal", "indeterminate"),
    ("possibly present", "indeterminate"), ("indeterminate", "indeterminate"), ("Yes", "present"), ("No", "absent"), ("present, absent", None), ("", None), ("representation", None)])
def test_status(reply, want): assert parse_status(reply) == want

OPTIONS = "What is seen? A) Effusion B) Pleural effusion C) A mass D. None"
@pytest.mark.parametrize("reply, want", [("A", "A"), ("b", None), ("B.", "B"), ("(C)", "C"), ("Answer: D", "D"), ("The answer is C.", "C"), ("pleural effusion", "B"), ("an effusion", "A"), ("A mass", "C"), ("A pleural effusion is seen", "B"),
    ("A and B", None), ("A, B", None), ("E", None), ("", None), ("not a mass", None), ("possibly a mass", None), ("a left effusion", "A")])
def test_letters(reply, want): assert parse_letter(reply, parse_options(OPTIONS)) == want

@pytest.mark.parametrize("question, want", [("(A) CT (B) MRI", {"A": "CT", "B": "MRI"}), ("A. yes\nB. no", {"A": "yes", "B": "no"}), ("A: x; B: y; C: z", {"A": "x", "B": "y", "C": "z"}), ("Is this vitamin A?", {}), ("B) one C) two", {}), ("A) one", {}), ("", {})])
def test_options(question, want): assert parse_options(question) == want

@pytest.mark.parametrize("reply, reference, question, want", [
    ("left lung", "Left Kidney", "Which is bigger in this image,left lung or left kidney?", (False, True)), ("Left kidney", "Left Kidney", "Which is bigger in this image,left lung or left kidney?", (True, True)),
    ("small bowel", "Right Kidney", "Which is smaller in this image, small bowel or right kidney?", (False, True)), ("the image shows the liver", "Liver", "Which is the biggest in this image,lung,liver or heart?", (True, True)),
    ("lung and liver", "Liver", "Which is the biggest in this image,lung,liver or heart?", (False, False)), ("coronal", "Coronal Plane", "Which plane is it, transverse plane or coronal plane?", (False, False)),
    ("maybe", "not sure", "Is it?", (True, True)), ("yes", "maybe", "Is it?", (False, True)), ("maybe", "yes", "Is it?", (False, False)),
    ("B", "MRI", "Which? A) CT B) MRI", (True, True)), ("MRI", "B", "Which? A) CT B) MRI", (True, True)), ("A", "B", "Which? A) CT B) MRI", (False, True)), ("a b", "B", "Which? A) CT B) MRI", (False, False)),
    ("包括", "包含", "图片中包含肺吗?", (True, True)), ("不存在", "没有", "胃是否存在于图像中?", (True, True)), ("肺", "肝脏", "哪个更大?", (False, True)), ("肝脏", "肝脏", "哪个更大?", (True, True)), ("不是肝脏", "肝脏", "哪个更大?", (False, True)),
    ("indeterminate", "Indeterminate", "Effusion?", (True, True)), ("cannot be excluded", "indeterminate", "Effusion?", (True, True)), ("yes", "present", "Effusion?", (True, True))])
def test_closed_of_every_sort(reply, reference, question, want): assert score_closed(reply, reference, question) == want

def test_real_slake_references_score_themselves():
    import json, os; from pathlib import Path
    folder = Path(os.environ.get("MEDCHAT_REAL_DATA", "nowhere"))/"slake"/"Slake1.0"
    if not folder.is_dir(): pytest.skip("no SLAKE on this machine")
    rows = [r for name in ("train", "validate") for r in json.loads((folder/f"{name}.json").read_text()) if r["answer_type"] == "CLOSED"]
    assert len(rows) > 4500
    assert not [(r["question"], r["answer"]) for r in rows if score_closed(str(r["answer"]), str(r["answer"]), r["question"]) != (True, True)]
    for language, yes, no in (("en", "Yes", "No"), ("zh", "是的", "不是")): # each yes/no question is answered by both words, and one of them is right
        asked = [r for r in rows if r["q_lang"] == language and closed_choices(r["question"], r["answer"]) == ("yes", "no")]
        assert len(asked) > 1900
        assert not [(r["question"], r["answer"]) for r in asked if [score_closed(w, r["answer"], r["question"]) for w in (yes, no)] not in ([(True, True), (False, True)], [(False, True), (True, True)])]

def test_no_substring_decides(): # a published script takes yes and no from anywhere in the reply
    for reply in ("normal", "not", "known", "nodule", "abnormal", "eyes", "noted", "cannot"): assert parse_choice(reply, ("yes", "no")) is None
    assert closed_accuracy(["normal", "nodule", "known"], ["no"]*3) == 0.0

def test_questions_must_match_too():
    with pytest.raises(MedchatError): closed_accuracy(["ct"], ["ct"], ["CT or MRI?", "more"])
    assert closed_accuracy(["the ct is better than mri"], ["ct"], ["CT or MRI?"]) == 0.0
    assert closed_accuracy(["the ct is better than mri"], ["ct"]) == 1.0
