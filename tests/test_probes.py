"Probes with models that are nothing but a rule: one that always says yes, one that sees, one that repeats the question."
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace
import pytest
import medchat.probes as P
from medchat.ablation import CHANGES
from medchat.answers import Answer
from medchat.probes import probe_impossible, probe_looks, probe_shapes, probe_wording, reword
from question_maker import question

# a split: each patient has one film, on which the heart is enlarged or not, and the nodule on one side
TRUTH = {i: dict(large=i % 2 == 0, side="left" if i % 3 else "right") for i in range(12)}

def film(i): return f"film{i}.png"

@pytest.fixture(scope="module")
def questions():
    qs = []
    for i, t in TRUTH.items():
        common = dict(group=f"p{i}", paths=[film(i)], modality="x-ray", organ="chest", language="en")
        qs += [question(4*i, text="Is the heart enlarged?", reference="yes" if t["large"] else "no", **common), question(4*i + 1, text="On which side is the nodule, left or right?", reference=t["side"], **common),
               question(4*i + 2, text="Where is the nodule?", answer_type="open", reference=f"{t['side']} lung", **common), question(4*i + 3, kind="report", text="Describe the film.", reference="Clear.", **common)]
    return qs

class Ask:
    "In place of a model: `say(question, film or None, change)`. Keeps what it was asked."
    def __init__(self, say, of=()): self.say, self.asked, self.row = say, [], {q.row: q for q in of}
    def __call__(self, questions, change=None, rows=None, desc=""):
        self.asked.append(dict(questions=list(questions), change=change, rows=rows, desc=desc))
        shown = [self.row[r] if rows else q for q, r in zip(questions, rows or questions)]
        return [Answer(self.say(q, int(s.image_paths[0].strip("film.png")) if s.image_paths and s.image_paths[0].startswith("film") else None, change), .9) for q, s in zip(questions, shown)]

def always_yes(q, film, change): return "yes"
def echo(q, film, change): return q.question

def sees(q, film, change):
    "Right about what it is shown; a blank image shows nothing, a mirrored one the other side."
    if film is None or (change and change.__name__ == "blank"): return "I cannot tell"
    t = TRUTH[film]
    side = {"left": "right", "right": "left"}[t["side"]] if change and change.__name__ == "flipped" else t["side"]
    if "blood pressure" in q.question or not any(w in q.question.lower() for w in ("heart look", "heart appear", "heart enlarged", "nodule", "film")): return "That is not visible."
    if "nodule" in q.question: return f"{side} lung" if q.answer_type == "open" else side
    return "yes" if t["large"] else "no"

def everything(say, questions):
    ask = Ask(say, questions)
    return ask, ask(questions)

# --- its image

def test_a_model_that_looks_loses_what_the_image_gave(questions):
    ask, answers = everything(sees, questions)
    looks, changed = probe_looks(ask, questions, answers)
    assert list(looks) == list(CHANGES) and all(list(s) == ["closed_accuracy", "open_recall"] for s in looks.values())
    for name, s in looks["blank"].items(): assert (s["value"], s["n"], s["groups"]) == (0, 24 if name == "closed_accuracy" else 12, 12) and s["drop"]["value"] == 1 and s["drop"]["low"] > 0 and s["drop"]["p"] < .001
    assert looks["noised"]["closed_accuracy"]["drop"]["value"] == 0                       # this one sees through noise
    assert looks["flipped"]["closed_accuracy"]["value"] == .5                             # the sides are wrong now, the hearts are not
    assert looks["flipped"]["open_recall"]["value"] == .5                                 # "left lung" for "right lung"
    for i, q in enumerate(questions): assert set(changed[i]) == (set() if q.kind == "report" else set(CHANGES))
    assert changed[1]["flipped"].reply != answers[1].reply and changed[0]["blank"].reply == "I cannot tell"

def test_another_patients_image_is_what_the_answer_is_about(questions):
    from medchat.ablation import other_rows
    ask, answers = everything(sees, questions)
    _, changed = probe_looks(ask, questions, answers)
    asked = [q for q in questions if q.kind == "vqa"]
    film_of = dict(zip([q.id for q in asked], [int(ask.row[r].image_paths[0].strip("film.png")) for r in other_rows(asked)]))
    for i, q in enumerate(questions):
        if q.kind == "vqa": assert film_of[q.id] != int(q.group[1:]) and changed[i]["other"].reply == sees(q, film_of[q.id], None)

def test_a_model_that_always_says_yes_loses_nothing(questions):
    from medchat.ablation import blind_warnings
    from medchat.scoring import summarise_replies
    ask, answers = everything(always_yes, questions)
    looks, _ = probe_looks(ask, questions, answers)
    for scores in looks.values():
        for s in scores.values(): assert s["drop"]["value"] == 0 and s["drop"]["p"] == 1
    found = blind_warnings(looks)
    assert len(found) == 4 and all("nothing shows that it looks" in w for w in found)     # two scores, blank and another's

def test_questions_without_an_image_have_none_to_take_away(questions):
    ask, answers = everything(sees, questions)
    text_only = [replace(q, image_paths=[], prompt=[dict(role="user", content=[dict(type="text", text=q.question)])]) for q in questions[:3]]
    looks, changed = probe_looks(ask, [*text_only, *questions], [*answers[:3], *answers])
    assert looks["blank"]["closed_accuracy"]["n"] == 24 and changed[:3] == [{}]*3
    assert not any(q.image_paths == [] for call in ask.asked[1:] for q in call["questions"])
    nothing = Ask(sees)
    assert probe_looks(nothing, text_only, answers[:3]) == ({}, [{}]*3) and not nothing.asked
    assert probe_looks(nothing, [], []) == ({}, [])

def test_reports_are_asked_where_there_is_nothing_else(questions):
    reports = [q for q in questions if q.kind == "report"]
    ask, answers = everything(always_yes, reports)
    looks, changed = probe_looks(ask, reports, answers)
    assert {n: list(s) for n, s in looks.items()} == {n: ["report_recall"] for n in CHANGES} and all(set(c) == set(CHANGES) for c in changed)

def test_one_patient_alone_has_no_other(questions):
    mine = questions[:4]
    ask, answers = everything(sees, mine)
    looks, changed = probe_looks(ask, mine, answers)
    assert list(looks) == ["blank", "noised", "flipped"] and "other" not in changed[0]

# --- other words

def test_who_sees_says_the_same_in_other_words(questions):
    ask, answers = everything(sees, questions)
    got = probe_wording(ask, questions, answers)
    assert (got["all_agree"]["value"], got["all_agree"]["n"], got["always_right"]["value"], got["flipped"]["value"], got["examples"]) == (1, 36, 1, 0, [])
    asked = ask.asked[1]["questions"]
    assert all(q.kind == "vqa" and q.prompt[-1]["content"][-1]["text"] == q.question and q.prompt[-1]["content"][0]["type"] == "image" for q in asked)
    assert {q.question for q in asked}.isdisjoint({q.question for q in questions})

def test_who_always_says_yes_is_consistent_and_half_right(questions):
    hearts = [q for q in questions if "heart" in q.question]
    ask, answers = everything(always_yes, hearts)
    got = probe_wording(ask, hearts, answers)
    assert (got["all_agree"]["value"], got["always_right"]["value"], got["flipped"]["value"]) == (1, .5, 0)

def test_who_goes_by_the_words_is_caught(questions):
    hearts = [q for q in questions if "heart" in q.question]
    ask, answers = everything(lambda q, film, change: "yes" if q.question.startswith("Is") else "no", hearts)
    got = probe_wording(ask, hearts, answers)
    assert got["all_agree"]["value"] == 0 and got["flipped"]["value"] == 1 and got["flipped"]["n"] == 6 and 0 < len(got["examples"]) <= 10
    for e in got["examples"]: assert set(e) == {"id", "question", "reply", "wording", "its_reply"} and e["reply"] == "yes" and e["its_reply"] == "no" and e["wording"] != e["question"]

def test_echo_is_no_agreement(questions):
    "What cannot be read agrees with nothing."
    hearts = [q for q in questions if "heart" in q.question]
    ask, answers = everything(lambda q, film, change: "maybe", hearts)
    assert probe_wording(ask, hearts, answers)["all_agree"]["value"] == 0

def test_at_most_so_many_are_reworded_evenly(questions):
    ask, answers = everything(sees, questions)
    got = probe_wording(ask, questions, answers, most=6)
    assert got["all_agree"]["n"] == 6 and len({q.group for q in ask.asked[1]["questions"]}) == 6

def test_nothing_to_reword():
    ask = Ask(always_yes)
    got = probe_wording(ask, [question(0, text="Why?")], [Answer("yes", .5)])
    assert not ask.asked and got["all_agree"]["n"] == 0 and got["all_agree"]["value"] is None and got["examples"] == []

def test_the_last_turn_of_a_conversation_is_reworded_without_a_second_image():
    talk = [dict(role="user", content=[dict(type="image"), dict(type="text", text="First?")]), dict(role="assistant", content=[dict(type="text", text="So.")]), dict(role="user", content=[dict(type="text", text="Is the heart enlarged?")])]
    q = replace(question(0, text="Is the heart enlarged?"), prompt=talk)
    new = reword(q, "Does the heart look enlarged?")
    assert sum(part["type"] == "image" for turn in new.prompt for part in turn["content"]) == 1 and new.prompt[:2] == talk[:2] and new.prompt[-1]["content"][-1]["text"] == "Does the heart look enlarged?"
    assert q.prompt == talk and (new.row, new.id, new.reference, new.image_paths) == (q.row, q.id, q.reference, q.image_paths)
    alone = reword(question(0, images=0, text="Is the heart enlarged?"), "Other?")
    assert [part["type"] for part in alone.prompt[0]["content"]] == ["text"]
    two = reword(question(0, images=2), "Other?")
    assert [part["type"] for part in two.prompt[0]["content"]] == ["image", "image", "text"]

# --- what cannot be seen

def test_who_sees_declines_what_no_image_shows(questions):
    ask, _ = everything(sees, questions)
    got = probe_impossible(ask, questions, most=5)
    asked = ask.asked[1]["questions"]
    assert (got["value"], got["made_up"], got["empty"]) == (1, 0, 0) and got["n"] == len(asked) > 10 and got["groups"] == 5
    assert any("kidney" in q.question for q in asked) and not any("lung" in q.question for q in asked)  # a film of a chest shows lungs
    assert all((q.kind, q.answer_type) == ("vqa", "open") for q in asked) and all(e["declined"] and e["why"] for e in got["examples"]) and len(got["examples"]) == 10

@pytest.mark.parametrize("say", [always_yes, echo, lambda q, film, change: "on the left"])
def test_who_answers_everything_makes_it_up(questions, say):
    ask, _ = everything(say, questions)
    got = probe_impossible(ask, questions)
    assert got["value"] == 0 and got["made_up"] == got["n"] and not any(e["declined"] for e in got["examples"])

def test_saying_nothing_is_neither(questions):
    ask, _ = everything(lambda *_: "", questions)
    got = probe_impossible(ask, questions)
    assert (got["value"], got["made_up"], got["empty"]) == (0, 0, got["n"])

def test_each_image_is_asked_once_and_at_most_so_many(questions):
    ask, _ = everything(always_yes, questions)
    probe_impossible(ask, questions, most=4)
    asked = ask.asked[1]["questions"]
    assert len({q.image_paths[0] for q in asked}) == 4 and len({(q.image_paths[0], q.question) for q in asked}) == len(asked)

def test_of_an_unknown_image_only_what_none_shows():
    ask = Ask(always_yes)
    got = probe_impossible(ask, [question(0)])
    assert {q.question for q in ask.asked[0]["questions"]} == {"What is the patient's blood pressure?", "Which medicine did the patient take this morning?"} and got["n"] == 2

def test_without_images_nothing_is_impossible():
    ask = Ask(always_yes)
    talk = replace(question(1), prompt=[*question(1).prompt, dict(role="assistant", content=[]), *question(1, images=0).prompt])
    assert probe_impossible(ask, [question(0, images=0), talk]) is None and not ask.asked and probe_impossible(ask, []) is None

# --- shapes

@pytest.fixture
def shapes(monkeypatch):
    "The model says what `box['say']` says; the right answers are known from the drawing."
    box, right = dict(calls=[], who="base"), {}
    ask = P.ask_shapes
    def remember(facts, rng):
        pairs = ask(facts, rng); right.setdefault(len(right), pairs[0]); return pairs
    def answer(model, processor, messages, images, max_new_tokens=64):
        box["calls"].append(len(messages))
        at = box.setdefault(f"at {box['who']}", 0); box[f"at {box['who']}"] += len(messages)
        for k, m in enumerate(messages): assert m[-1]["content"][-1]["text"] == right[at + k][0] and len(images[k]) == 1
        return [(box["say"](box["who"], right[at + k][1], at + k), .5) for k in range(len(messages))]
    monkeypatch.setattr(P, "ask_shapes", remember); monkeypatch.setattr(P, "answer_prompts", answer)
    return box

def being(box, who):
    @contextmanager
    def being():
        was = box["who"]; box["who"] = who
        try: yield
        finally: box["who"] = was
    return being()

def test_what_was_forgotten(shapes):
    shapes["say"] = lambda who, answer, i: answer.upper() + "." if who == "base" or i % 2 else "a heart"
    got = probe_shapes(dict(base=being(shapes, "base"), tuned=being(shapes, "tuned")), None, None, count=20, batch_size=8)
    assert (got["base"]["value"], got["base"]["n"], got["tuned"]["value"], got["difference"]["value"]) == (1, 20, .5, -.5) and got["difference"]["p"] < .01 and shapes["calls"] == [8, 8, 4]*2

def test_the_same_shapes_each_time_and_no_difference_for_one(shapes):
    seen = []
    shapes["say"] = lambda who, answer, i: seen.append(answer) or ""
    got = probe_shapes(dict(base=nullcontext()), None, None, count=10)
    assert set(got) == {"base"} and got["base"]["value"] == 0
    rng = __import__("numpy").random.default_rng(2**31 + 1)
    from medchat.shapes import ask_shapes, draw_shapes
    facts = [draw_shapes(rng)[1] for _ in range(10)]
    assert seen == [ask_shapes(f, rng)[0][1] for f in facts]
