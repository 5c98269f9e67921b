"Evaluation: what is asked, what is counted, what is written, what is refused."
import json, math, os, re
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from PIL import Image

import medchat.evaluate as E
from medchat.core import MedchatError, write_jsonl
from medchat.curate import convert, read_dataset
from medchat.evaluate import (Question, text_scores, text_table, answer_questions, compare_replies, evaluate, leaks_of, majority_replies, plan_batches, read_questions, score_reply,
    score_table, summarise_replies)


# --- a small data set, and runs that need no training

FACTS = [("Is the heart enlarged?", "yes", "closed", ["heart"]), ("Is there fluid?", "no", None, ["fluid", "lung"]), ("Which side?", "Left", "closed", []),
         ("What is seen?", "pleural effusion", "open", "finding")]

def _rows(n_patients=6, extra=()):
    "Questions, a caption and a conversation about each of some patients."
    for p in range(n_patients):
        common = dict(images=[f"images/p{p}.png"], split="test" if p % 2 else "train", group=f"patient {p}", source="made up", licence="CC0-1.0")
        for k, (q, a, kind, types) in enumerate(FACTS):
            if q == "Is the heart enlarged?" and p == 5: a = "no"
            yield dict(id=f"p{p}-{k}", turns=[dict(role="user", text=q), dict(role="assistant", text=a)], kind="vqa", answer_type=kind, meta=dict(question_type=types), **common)
        yield dict(id=f"p{p}-c", turns=[dict(role="user", text="Describe it."), dict(role="assistant", text="A large heart.")], kind="caption", **common)
        yield dict(id=f"p{p}-t", turns=[dict(role=r, text=t) for r, t in (("user", "First?"), ("assistant", "Earlier."), ("user", "Then?"), ("assistant", "Later."))],
                   kind="conversation", **common)
    yield from extra

def _make(folder: Path, rows) -> Path:
    (folder/"images").mkdir(parents=True)
    for p in range(8): Image.new("L", (40 + p, 48), 20 * p).save(folder/"images"/f"p{p}.png")
    write_jsonl(folder/"records.jsonl", rows)
    return convert(folder, folder/"out", keep_splits=True)

@pytest.fixture(scope="module")
def data(tmp_path_factory): return _make(tmp_path_factory.mktemp("data"), _rows())

@pytest.fixture(scope="module")
def dataset(data): return read_dataset(data, "test")

@pytest.fixture(scope="module")
def questions(dataset): return read_questions(dataset)

@pytest.fixture
def a_run(tmp_path):
    def make(name="run", **config):
        (tmp_path/name).mkdir()
        (tmp_path/name/"config.json").write_text(json.dumps(dict(medchat="0", base="tiny-qwen2-vl", base_sha256="aa", load_in_4bit=True) | config))
        return tmp_path/name
    return make

class Fake:
    "A model whose replies are a function of (adapter on, question, row of images)."
    def __init__(self, say): self.say, self.on = say, True
    @contextmanager
    def disable_adapter(self):
        self.on = False
        try: yield
        finally: self.on = True

@pytest.fixture
def fake(monkeypatch):
    "Replaces the model: base says no, tuned knows FACTS. Records each batch."
    calls, known = [], {q: a for q, a, *_ in FACTS} | {"Describe it.": "a heart", "Then?": "later"}
    box = dict(calls=calls, say=lambda on, q, images: known[q] if on else "no", loaded=[])
    def generate(model, processor, messages, images, max_new_tokens):
        calls.append(dict(adapter=model.on, messages=messages, images=images, max_new_tokens=max_new_tokens))
        return [box["say"](model.on, m[-1]["content"][-1]["text"], i) for m, i in zip(messages, images, strict=True)]
    def load(run): box["loaded"].append(Path(run).name); return Fake(box["say"]), None
    monkeypatch.setattr(E, "generate_replies", generate); monkeypatch.setattr(E, "load_run", load)
    return box


# --- questions

def test_questions_of_a_split(questions):
    assert len(questions) == 3 * 6 and {q.group for q in questions} == {"patient 1", "patient 3", "patient 5"}
    by_id = {q.id: q for q in questions}
    assert by_id["p1-1"].answer_type == "closed", "no answer type, but the answer is no"
    assert (by_id["p1-0"].types, by_id["p1-1"].types, by_id["p1-2"].types, by_id["p1-3"].types) == (["heart"], ["fluid", "lung"], [], ["finding"])
    assert [by_id[f"p1-{k}"].score_name for k in "0123ct"] == ["closed_accuracy"] * 3 + ["open_recall", "caption_recall", "conversation_recall"]
    assert by_id["p1-0"].image_paths == ["images/p1.png"]

def test_no_prompt_holds_its_answer(questions):
    for q in questions:
        assert q.prompt[-1]["role"] == "user" and q.prompt[-1]["content"][-1]["text"] == q.question
        assert q.reference not in json.dumps(q.prompt)

def test_a_conversation_keeps_its_earlier_turns(questions):
    q = next(q for q in questions if q.kind == "conversation")
    assert [m["role"] for m in q.prompt] == ["user", "assistant", "user"] and (q.question, q.reference) == ("Then?", "Later.")

def test_groups_fall_back_to_the_image_then_to_the_row(tmp_path):
    rows = [dict(id=i, images=images, turns=[dict(role="user", text=f"Q{i}?"), dict(role="assistant", text="yes")], kind="vqa") for i, images in (("a", ["images/p1.png"]), ("b", ["images/p1.png"]), ("c", []))]
    a, b, c = read_questions(read_dataset(_make(tmp_path, rows), "train"))
    assert a.group == b.group != c.group == "c"


# --- batches

def _question(i, kind="vqa", answer_type="closed", group="g", images=1, text="Q?", reference="yes", types=()):
    return Question(i, f"q{i}", kind, answer_type, text, reference, [dict(role="user", content=[dict(type="text", text=text)])], group, ["x.png"] * images, list(types))

some_questions = st.lists(st.tuples(st.sampled_from(["vqa", "caption", "report"]), st.sampled_from(["closed", "open"]), st.sampled_from("abc"), st.integers(0, 2), st.text(max_size=5)), max_size=40).map(
    lambda rows: [_question(i, *row) for i, row in enumerate(rows)])

@given(some_questions, st.integers(1, 9))
def test_batches_are_a_partition(qs, size):
    batches = plan_batches(qs, size)
    assert sorted(i for b in batches for i in b) == list(range(len(qs)))
    for b in batches:
        assert 1 <= len(b) <= size
        assert len({(qs[i].score_name, len(qs[i].image_paths)) for i in b}) == 1
    assert len(batches) <= len(qs) // size + len({(q.score_name, len(q.image_paths)) for q in qs})

def test_questions_on_one_patient_stand_together():
    qs = [_question(i, group="abc"[i % 3]) for i in range(12)]
    assert [{qs[i].group for i in b} for b in plan_batches(qs, 4)] == [{"a"}, {"b"}, {"c"}]

@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_replies_come_back_in_order(dataset, questions, fake, batch_size):
    fake["say"] = lambda on, q, images: f"{q} {images[0].size[0]}"
    got = answer_questions(Fake(None), None, dataset, questions, batch_size=batch_size)
    assert got == [f"{q.question} {40 + int(q.group[-1])}" for q in questions]
    assert max(len(c["messages"]) for c in fake["calls"]) <= batch_size

def test_some_of_the_questions(dataset, questions, fake):
    fake["say"] = lambda on, q, images: f"{q} {images[0].size[0]}"
    picked = [questions[i] for i in (16, 3, 9)]
    assert answer_questions(Fake(None), None, dataset, picked) == [f"{q.question} {40 + int(q.group[-1])}" for q in picked]

def test_each_image_is_opened_once_in_a_batch(dataset, questions, fake, monkeypatch):
    opened, load = [], E.load_image
    monkeypatch.setattr(E, "load_image", lambda source: opened.append(1) or load(source))
    answer_questions(Fake(None), None, dataset, [q for q in questions if q.score_name == "closed_accuracy"], batch_size=100)
    assert len(opened) == 3 and len(fake["calls"]) == 1

def test_long_texts_may_be_longer(dataset, questions, fake):
    answer_questions(Fake(None), None, dataset, questions, max_new_tokens=10)
    for c in fake["calls"]: assert c["max_new_tokens"] == (40 if c["messages"][0][-1]["content"][-1]["text"] in ("Describe it.", "Then?") else 10)


# --- always the same

def test_majority():
    train = [_question(i, text="Is it?", reference=r) for i, r in enumerate(["no", "no", "yes"])] + [_question(9, text="Side?", reference="left")]
    asked = [_question(0, text="is IT"), _question(1, text="Side?"), _question(2, text="never seen"), _question(3, text="Is it?", answer_type="open")]
    assert majority_replies(train, asked) == ["no", "left", "no", ""]

@given(st.permutations(["b", "a", "c", "a", "b"]))
def test_majority_ties_do_not_depend_on_the_order(references):
    assert majority_replies([_question(i, reference=r) for i, r in enumerate(references)], [_question(0)]) == ["a"]

def test_majority_without_training(): assert majority_replies([], [_question(0)]) == [""]


# --- scores

@pytest.mark.parametrize("question, reply, want", [
    (_question(0), "Yes.", (1.0, True)), (_question(0), "no", (0.0, True)), (_question(0), "yes or no", (0.0, False)), (_question(0, reference="no"), "normal", (0.0, False)),
    (_question(0, text="CT or MRI?", reference="MRI"), "CT", (0.0, True)), (_question(0, answer_type="open", reference="left effusion"), "effusion", (0.5, True)),
    (_question(0, answer_type="open", reference="left effusion"), "", (0.0, False)), (_question(0, kind="report", reference="no effusion"), "No effusion seen", (1.0, True))])
def test_score_reply(question, reply, want): assert score_reply(question, reply) == want

def test_a_summary_counts_everything():
    qs = [_question(i, group=i // 2) for i in range(4)] + [_question(9, answer_type="open", reference="a b")]
    got = summarise_replies(qs, ["yes", "no", "yes no", "", "b"])
    assert list(got) == ["closed_accuracy", "open_recall"]
    assert {k: got["closed_accuracy"][k] for k in ("value", "n", "groups", "unparsed")} == dict(value=0.25, n=4, groups=2, unparsed=2)
    with pytest.raises(ValueError): summarise_replies(qs, ["yes"])

def test_compare_by_type():
    qs = [_question(0, types=["a", "b"]), _question(1, types=["b"], reference="no"), _question(2)]
    got = compare_replies(qs, ["no"] * 3, ["yes"] * 3, ["yes", "no", "yes"])
    assert [(t["type"], t["tuned"]["closed_accuracy"]["value"], t["tuned"]["closed_accuracy"]["n"]) for t in got["by_type"]] == [("a", 1.0, 1), ("b", 0.5, 2)]
    assert got["always_same"] == dict(closed_accuracy=1.0) and compare_replies(qs, ["no"] * 3, ["yes"] * 3)["always_same"] is None

def test_the_table_is_aligned():
    qs = [_question(0, types=["a long name of a type"]), _question(1, kind="report", reference="x")]
    lines = score_table(compare_replies(qs, ["no", ""], ["yes", "x"])).splitlines()
    assert len({len(line) for line in lines}) == 1 and "+100.0" in lines[1] and "1.000" in lines[1] and lines[1].startswith("closed accuracy")

def test_texts_get_the_scores_of_the_papers():
    report = "The heart is enlarged. No pneumothorax."
    qs = [_question(0), _question(1, answer_type="open", reference="left lung"), _question(2, answer_type="open", reference="nodule", group=7), _question(3, kind="report", reference=report)]
    got = text_scores(qs, ["yes", "the left upper lung", "nodule", "The heart is not enlarged. No pneumothorax."])
    assert list(got) == ["open", "report"] # closed questions are no texts
    assert [got["open"][k]["value"] for k in ("exact_match", "precision", "recall", "f1")] == pytest.approx([.5, (2/3 + 1)/2, 1, (.8 + 1)/2])
    assert all(s["n"] == 2 and s["low"] <= s["value"] <= s["high"] for s in got["open"].values())
    assert got["report"]["rouge_1"]["value"] > .9 and got["report"]["finding_f1_micro"]["value"] == 0
    assert {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_1", "rouge_2", "rouge_l", "meteor_exact_stem", "cider", "finding_f1_micro", "finding_f1_macro"} == set(got["report"])
    table = text_table(text_scores(qs, [""]*4), got).splitlines()
    assert len({len(line) for line in table}) == 1 and any(line.startswith("report rouge l") for line in table) and text_table({}, {}) == ""
    assert text_scores(qs[:1], ["yes"]) == {}


# --- the whole of it

def test_evaluate_writes_what_it_says(data, a_run, fake, capsys, questions):
    run = a_run()
    got, = evaluate([run], data)
    saved = json.loads((run/"eval"/"test.json").read_text())
    assert saved == got and sorted(p.name for p in (run/"eval").iterdir()) == ["test.json", "test.jsonl"]
    rows = [json.loads(line) for line in open(run/"eval"/"test.jsonl")]
    assert [r["id"] for r in rows] == [q.id for q in questions]
    for who in ("base", "tuned"):      # every score follows from the kept answers
        for name, s in saved[who].items():
            mine = [r for r in rows if r["score"] == name]
            assert s["n"] == len(mine) and s["value"] == pytest.approx(sum(r[f"{who}_score"] for r in mine) / len(mine))
            assert s["unparsed"] == sum(not r[f"{who}_read"] for r in mine) and s["low"] <= s["value"] <= s["high"]
    assert (saved["base"]["closed_accuracy"]["value"], saved["tuned"]["closed_accuracy"]["value"]) == (pytest.approx(4/9), pytest.approx(8/9))
    assert saved["always_same"]["closed_accuracy"] == pytest.approx(8/9)
    assert (saved["split"], saved["run"], saved["base_name"], saved["limit"], saved["leaks"]) == ("test", "run", "tiny-qwen2-vl", None, [])
    assert saved["versions"]["medchat"] and saved["seconds"]["base"] >= 0
    out = capsys.readouterr().out
    assert "closed accuracy" in out and "0.889" in out and "+44.4" in out and "WARNING" not in out and "[yes]" in out

def test_nothing_of_this_machine_is_written(data, a_run, fake):
    run = a_run(); evaluate([run], data)
    for f in (run/"eval").iterdir(): assert str(run.parent) not in f.read_text() and str(data.parent) not in f.read_text()

def test_the_same_answers_give_the_same_file(data, a_run, fake):
    one, two = a_run("one"), a_run("two")
    evaluate([one], data); evaluate([two], data, batch_size=1)
    assert (one/"eval"/"test.jsonl").read_bytes() == (two/"eval"/"test.jsonl").read_bytes()
    a, b = (json.loads((r/"eval"/"test.json").read_text()) for r in (one, two))
    for k in ("run", "seconds", "batch_size"): a.pop(k); b.pop(k)
    assert a == b

def test_the_model_card_finds_the_scores(data, a_run, fake):
    from medchat.publish import read_scores
    run = a_run(); got, = evaluate([run], data)
    rows = {r["score"]: r for r in read_scores(run)}
    assert set(rows) >= {k.replace("_", " ") for k in got["tuned"]}
    assert rows["closed accuracy"]["base"]["value"] == got["base"]["closed_accuracy"]["value"] and rows["closed accuracy"]["tuned"]["n"] == 9

def test_runs_that_share_a_base_ask_it_once(data, a_run, fake):
    evaluate([a_run("a"), a_run("b"), a_run("c", base_sha256="bb"), a_run("d", load_in_4bit=False)], data)
    asked = {on: sum(len(c["messages"]) for c in fake["calls"] if c["adapter"] is on) for on in (True, False)}
    assert asked == {True: 4 * 18, False: 3 * 18} and fake["loaded"] == ["a", "b", "c", "d"]

def test_one_run_needs_no_list(data, a_run, fake):
    run = a_run()
    assert len(evaluate(str(run), data)) == len(evaluate(run, data)) == 1

def test_a_limit_is_spread_and_kept_apart(data, a_run, fake, questions, capsys):
    run = a_run()
    evaluate([run], data, limit=6); evaluate([run], data, limit=18); evaluate([run], data, limit=100)
    rows = lambda name: [json.loads(line)["id"] for line in open(run/"eval"/name)]
    assert rows("test-6.jsonl") == [q.id for q in questions[::3]]
    assert sorted(p.name for p in (run/"eval").glob("*.json")) == ["test-6.json", "test.json"] and len(rows("test.jsonl")) == 18
    assert json.loads((run/"eval"/"test-6.json").read_text())["limit"] == 6 and json.loads((run/"eval"/"test.json").read_text())["limit"] is None
    assert "6 of its questions" in capsys.readouterr().out

def test_another_split(data, a_run, fake, capsys):
    run = a_run(); got, = evaluate([run], data, split="train")
    assert (run/"eval"/"train.json").is_file() and "WARNING" in capsys.readouterr().out and got["leaks"]

def test_a_leak_is_called_out(tmp_path, a_run, fake, capsys):
    shared = dict(id="x", images=["images/p1.png"], turns=[dict(role="user", text="Is there fluid?"), dict(role="assistant", text="no")], kind="vqa", split="train", group="other")
    leaky = _make(tmp_path/"d", _rows(extra=[shared]))
    run = a_run(); got, = evaluate([run], leaky)
    out = capsys.readouterr().out
    assert "WARNING: 1 of 3 test images also stand in train" in out and "too high" in out and json.loads((run/"eval"/"test.json").read_text())["leaks"] == got["leaks"] != []

def test_a_leak_between_other_splits_is_not_ours(data, tmp_path):
    import shutil
    copy = shutil.copytree(data, tmp_path/"copy"); report = json.loads((copy/"report.json").read_text())
    leak = dict(split="validation", also_in="train", images=1, of_images=2, groups=0, of_groups=2, rows=3, of_rows=4)
    (copy/"report.json").write_text(json.dumps(report | dict(leaks=[leak])))
    assert leaks_of(copy, "test") == [] and len(leaks_of(copy, "validation")) == 1

def test_without_a_training_split(tmp_path, a_run, fake):
    data = _make(tmp_path/"d", [dict(r, split="test") for r in _rows()])
    got, = evaluate([a_run()], data)
    assert got["always_same"] is None and got["tuned"]["closed_accuracy"]["n"] == 18


# --- refusals: one line, before any work, nothing written

def test_refusals(data, a_run, fake, tmp_path):
    run, plain = a_run(), tmp_path/"plain"; plain.mkdir()
    for call, problem in ((lambda: evaluate([run], data, split="exam"), "no such split: exam. .*train, test"), (lambda: evaluate([run, plain], data), "not a run folder"),
                          (lambda: evaluate([run, tmp_path/"nowhere"], data), "not a run folder"), (lambda: evaluate([run], plain), "not a dataset folder"),
                          (lambda: evaluate([run], tmp_path/"nowhere"), "no such dataset folder"), (lambda: evaluate([], data), "no run to evaluate"),
                          (lambda: evaluate([run], data, limit=0), "limit must be at least 1"), (lambda: evaluate([run], data, batch_size=0), "batch_size must be at least 1"),
                          (lambda: evaluate([run], data, max_new_tokens=0), "max_new_tokens must be at least 1")):
        with pytest.raises(MedchatError, match=problem) as e: call()
        assert "\n" not in str(e.value)
    assert not fake["calls"] and not fake["loaded"] and not (run/"eval").exists()

def test_no_write_access_is_seen_first(data, a_run, fake, monkeypatch):
    run = a_run(); monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(MedchatError, match="cannot write"): evaluate([run], data)
    assert not fake["calls"]

@pytest.mark.parametrize("error", [RuntimeError("broke"), KeyboardInterrupt()])
def test_breaking_off_leaves_the_old_files(data, a_run, fake, error):
    run = a_run(); evaluate([run], data)
    before = {p.name: p.read_bytes() for p in (run/"eval").iterdir()}
    def fail(on, q, images): raise error
    fake["say"] = fail
    with pytest.raises(type(error)): evaluate([run], data)
    assert {p.name: p.read_bytes() for p in (run/"eval").iterdir()} == before

def test_too_large_a_batch_says_what_to_do(data, a_run, fake):
    def fail(on, q, images): raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
    fake["say"] = fail
    with pytest.raises(MedchatError, match="not enough memory for a batch: 3 questions. Try --batch-size 1"): evaluate([a_run()], data)

def test_breaking_off_the_first_time_leaves_nothing(data, a_run, fake, monkeypatch):
    run = a_run()
    def full(path, rows): raise MedchatError("cannot write", path, "No space left on device")
    monkeypatch.setattr(E, "write_jsonl", full)
    with pytest.raises(MedchatError): evaluate([run], data)
    assert not (run/"eval").exists() or not list((run/"eval").iterdir())


# --- with a real model

@pytest.fixture(scope="module")
def real_run(tmp_path_factory, data):
    "A run whose adapter holds random numbers, so that it differs from its base."
    import torch
    from medchat.models import add_lora, base_hash, load_model, resolve_base
    run = tmp_path_factory.mktemp("runs")/"random"
    model, processor = load_model("tiny-qwen2-vl", for_training=True)
    model = add_lora(model)
    torch.manual_seed(0)
    for n, p in model.named_parameters():
        if "lora_B" in n: p.data.normal_(0, 0.3)
    model.save_pretrained(run/"adapter", save_embedding_layers=False); processor.save_pretrained(run/"adapter")
    (run/"config.json").write_text(json.dumps(dict(medchat="0", base="tiny-qwen2-vl", base_sha256=base_hash(resolve_base("tiny-qwen2-vl")), load_in_4bit=True)))
    return run

def test_real_replies(real_run, data, dataset, questions):
    "Batches of any size, single questions, and the base loaded by itself: the same replies."
    from medchat.models import generate_replies, load_run
    evaluate([real_run], data, batch_size=7, max_new_tokens=8)
    rows = [json.loads(line) for line in open(real_run/"eval"/"test.jsonl")]
    assert any(r["base"] != r["tuned"] for r in rows), "the adapter changes nothing: this test proves nothing"
    for who in ("tuned", "base"):
        model, processor = load_run(real_run, with_adapter=who == "tuned")
        limit = lambda q: 8 if q.kind == "vqa" else 32
        single = [generate_replies(model, processor, [q.prompt], [dataset[q.row]["images"]], max_new_tokens=limit(q))[0] for q in questions]
        assert [r[who] for r in rows] == single

def test_real_evaluation_repeats_itself(real_run, data):
    evaluate([real_run], data, limit=9, max_new_tokens=8); one = (real_run/"eval"/"test-9.jsonl").read_bytes()
    evaluate([real_run], data, limit=9, max_new_tokens=8)
    assert (real_run/"eval"/"test-9.jsonl").read_bytes() == one
