"Answers: what is asked, in which batches, of what images; and that no reply is lost, mixed up, or asked for twice."
import json
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
import medchat.answers as A
from medchat.ablation import blank, flipped
from medchat.answers import LONGER, Answer, KeptAnswers, answer_questions, model_key, plan_batches, read_questions
from medchat.core import MedchatError
from medchat.curate import read_dataset
from question_maker import data, dataset, Fake, fake_answers, make_data, make_rows, question, questions # with the fixtures

@pytest.fixture
def fake(monkeypatch):
    "A model that says the question and the width of its image. Records each batch."
    box = dict(calls=[], say=lambda on, q, images: f"{q} {images[0].size[0]}")
    monkeypatch.setattr(A, "answer_prompts", lambda *a: fake_answers(box["say"], box["calls"])(*a))
    box["asked"] = lambda: [m[-1]["content"][-1]["text"] for c in box["calls"] for m in c["messages"]]
    return box

@pytest.fixture
def kept(tmp_path): return lambda *models: KeptAnswers(tmp_path/"eval"/"answers.jsonl", set(models or ("m",)))

def right(questions): return [f"{q.question} {40 + int(q.group[-1])}" for q in questions]
def replies(answers): return [a.reply for a in answers]


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
    a, b, c = read_questions(read_dataset(make_data(tmp_path, rows), "train"))
    assert a.group == b.group != c.group == "c"

def test_slices_have_one_name_whatever_the_source_calls_them(tmp_path):
    metas = [dict(modality="CT", organ="liver"), dict(location="Abdomen"), dict(image_organ="CHEST", body_part="ignored"), dict(body_part="knee", modality=""), {}, dict(organ=None, location="Lung")]
    rows = [dict(id=str(i), images=["images/p1.png"], turns=[dict(role="user", text=f"Q{i}?"), dict(role="assistant", text="yes")], kind="vqa", meta=m) for i, m in enumerate(metas)]
    got = [{k: v for k, v in q.slices.items() if k != "language"} for q in read_questions(read_dataset(make_data(tmp_path, rows), "train"))]
    assert got == [dict(modality="CT", organ="liver"), dict(organ="Abdomen"), dict(organ="CHEST"), dict(organ="knee"), {}, dict(organ="Lung")]


# --- batches

some_questions = st.lists(st.tuples(st.sampled_from(["vqa", "caption", "report"]), st.sampled_from(["closed", "open"]), st.sampled_from("abc"), st.integers(0, 2), st.text(max_size=5)), max_size=40).map(
    lambda rows: [question(i, *row) for i, row in enumerate(rows)])

@given(some_questions, st.integers(1, 9))
def test_batches_are_a_partition(qs, size):
    batches = plan_batches(qs, size)
    assert sorted(i for b in batches for i in b) == list(range(len(qs)))
    for b in batches:
        assert 1 <= len(b) <= size
        assert len({(qs[i].score_name, len(qs[i].image_paths)) for i in b}) == 1
    assert len(batches) <= len(qs) // size + len({(q.score_name, len(q.image_paths)) for q in qs})

@given(some_questions, st.integers(1, 9), st.integers(0, 9))
def test_batches_that_are_left_are_those_that_would_have_followed(qs, size, done):
    "So a command that is stopped and repeated asks in the same batches as one that is not."
    batches = plan_batches(qs, size)
    left = sorted(i for b in batches[done:] for i in b)
    assert [[left[i] for i in b] for b in plan_batches([qs[i] for i in left], size)] == batches[done:]

def test_questions_on_one_patient_stand_together():
    qs = [question(i, group="abc"[i % 3]) for i in range(12)]
    assert [{qs[i].group for i in b} for b in plan_batches(qs, 4)] == [{"a"}, {"b"}, {"c"}]

def test_questions_on_one_image_stand_together():
    qs = [question(i, paths=[f"{i % 3}.png"], text="Q?"*(i + 1)) for i in range(12)]
    assert [{qs[i].image_paths[0] for i in b} for b in plan_batches(qs, 4)] == [{"0.png"}, {"1.png"}, {"2.png"}]

@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_replies_come_back_in_order(dataset, questions, fake, batch_size):
    got = answer_questions(Fake(), None, dataset, questions, batch_size=batch_size)
    assert replies(got) == right(questions)
    assert max(len(c["messages"]) for c in fake["calls"]) <= batch_size

def test_some_of_the_questions(dataset, questions, fake):
    picked = [questions[i] for i in (16, 3, 9)]
    assert replies(answer_questions(Fake(), None, dataset, picked)) == right(picked)
    assert answer_questions(Fake(), None, dataset, []) == []

def test_each_image_is_opened_once_in_a_batch(dataset, questions, fake, monkeypatch):
    opened, changed, load = [], [], A.load_image
    monkeypatch.setattr(A, "load_image", lambda source: opened.append(1) or load(source))
    closed = [q for q in questions if q.score_name == "closed_accuracy"]
    answer_questions(Fake(), None, dataset, closed, batch_size=100, change=lambda image: changed.append(1) or image)
    assert len(opened) == len(changed) == 3 and len(fake["calls"]) == 1
    shown = [row[0] for row in fake["calls"][0]["images"]]
    assert len({id(image) for image in shown}) == 3                                # the same object, so that it is read once

def test_long_texts_may_be_longer(dataset, questions, fake):
    answer_questions(Fake(), None, dataset, questions, max_new_tokens=10)
    for c in fake["calls"]: assert c["max_new_tokens"] == (10*LONGER if c["messages"][0][-1]["content"][-1]["text"] in ("Describe it.", "Then?") else 10)

def test_images_of_other_rows_and_changed_ones(dataset, questions, fake):
    closed = [q for q in questions if q.score_name == "closed_accuracy"]
    other = {"patient 1": "patient 3", "patient 3": "patient 5", "patient 5": "patient 1"}
    rows = [next(q.row for q in questions if q.group == other[c.group]) for c in closed]
    assert replies(answer_questions(Fake(), None, dataset, closed, rows=rows)) == [f"{q.question} {40 + int(other[q.group][-1])}" for q in closed]
    fake["say"] = lambda on, q, images: str(images[0].getpixel((0, 0)))
    assert replies(answer_questions(Fake(), None, dataset, closed, change=blank)) == ["(128, 128, 128)"]*len(closed)
    assert len(set(replies(answer_questions(Fake(), None, dataset, closed)))) == 3


# --- kept

def test_nothing_is_asked_twice(dataset, questions, fake, kept):
    first = answer_questions(Fake(), None, dataset, questions[::3], kept=kept(), key="m")
    assert len(fake["asked"]()) == len(questions[::3]) and sorted(first) == sorted(kept().known.values())
    whole = answer_questions(Fake(), None, dataset, questions, kept=kept(), key="m", batch_size=5)
    assert replies(whole) == right(questions) and len(fake["asked"]()) == len(questions)  # the rest alone
    again = answer_questions(Fake(), None, dataset, questions[::-1], kept=kept(), key="m", batch_size=1)
    assert again == whole[::-1] and len(fake["asked"]()) == len(questions)
    assert len((kept().path).read_text().splitlines()) == len(questions)

def test_without_a_file_nothing_is_kept_and_nothing_is_written(dataset, questions, fake, monkeypatch, tmp_path):
    "Wherever a default may point to, nobody asked for a file."
    written, plain_open = [], open
    def watched(path, mode="r", *args, **kw):
        if mode[0] not in "wax": return plain_open(path, mode, *args, **kw)
        written.append(str(path)); return plain_open(tmp_path/"caught", mode, *args, **kw)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", watched)
        answer_questions(Fake(), None, dataset, questions, key="m")
        assert not written
        answer_questions(Fake(), None, dataset, questions, key="m")
    assert len(fake["asked"]()) == 2*len(questions) and not written

CHANGED = dict(key=dict(key="n"), longer=dict(max_new_tokens=33), blank=dict(change=blank), flipped=dict(change=flipped))

@pytest.mark.parametrize("what", CHANGED)
def test_whatever_decides_a_reply_is_asked_anew(dataset, questions, fake, kept, what):
    answer_questions(Fake(), None, dataset, questions, kept=kept("m", "n"), key="m")
    fake["calls"].clear(); fake["say"] = lambda on, q, images: "new"
    got = answer_questions(Fake(), None, dataset, questions, kept=kept("m", "n"), **dict(key="m") | CHANGED[what])
    assert set(replies(got)) == {"new"}
    fake["calls"].clear()
    assert replies(answer_questions(Fake(), None, dataset, questions, kept=kept("m", "n"), key="m")) == right(questions) and not fake["calls"] # and both are kept

def test_another_image_is_asked_anew_unless_it_was_asked_about_already(dataset, questions, fake, kept):
    some = [q for q in questions if q.question == "Which side?"]
    rows = [q.row for q in some[1:] + some[:1]]
    answer_questions(Fake(), None, dataset, some[:2], kept=kept(), key="m")
    got = answer_questions(Fake(), None, dataset, some, kept=kept(), key="m", rows=rows)
    assert replies(got) == right(some[1:] + some[:1]) and len(fake["asked"]()) == 3 # the second's was known from its own row, the first's too

def test_other_words_and_another_image_are_asked_anew(tmp_path, fake, kept):
    from PIL import Image
    def ask(folder, rows, spoil=None):
        data = make_data(folder, rows) if not spoil else spoil(folder, rows)
        dataset = read_dataset(data, "test")
        fake["calls"].clear()
        answer_questions(Fake(), None, dataset, read_questions(dataset), kept=kept(), key="m")
        return len(fake["asked"]())
    def repaint(folder, rows):
        from medchat.curate import convert
        make_data(folder, rows); Image.new("L", (43, 48), 200).save(folder/"images"/"p3.png")
        return convert(folder, folder/"again", keep_splits=True)
    assert [ask(tmp_path/"a", make_rows()), ask(tmp_path/"same", make_rows()), ask(tmp_path/"b", make_rows(), repaint)] == [18, 0, 6] # p3 alone
    reworded = [dict(r, turns=[dict(t, text=t["text"].replace("fluid", "water").replace("First", "Firstly")) for t in r["turns"]]) for r in make_rows()]
    assert ask(tmp_path/"c", reworded) == 6 # a question, and an earlier turn of a conversation, of each patient
    answers_changed = [dict(r, turns=[*r["turns"][:-1], dict(role="assistant", text="other")]) for r in make_rows()]
    assert ask(tmp_path/"d", answers_changed) == 0 # the right answer decides nothing about the reply

def test_the_key_of_a_model(tmp_path):
    adapter = tmp_path/"adapter"; adapter.mkdir()
    (adapter/"adapter_model.safetensors").write_bytes(b"one"); (adapter/"adapter_config.json").write_text('{"lora_alpha": 16}')
    config = dict(base="b", base_sha256="aa", load_in_4bit=True, seed=1)
    want = model_key(config, adapter, True)
    assert want == model_key(config | dict(seed=2, run="moved"), adapter, True) != model_key(config, adapter, False) == model_key(config, adapter, False)
    keys = {want, model_key(config, adapter, False), model_key(config | dict(base_sha256="bb"), adapter, True), model_key(config | dict(load_in_4bit=False), adapter, True)}
    (adapter/"adapter_model.safetensors").write_bytes(b"two")
    assert len({*keys, model_key(config, adapter, True)}) == 5

def test_the_key_knows_the_adapters_settings(tmp_path):
    "PEFT reads the weight of the pairs (lora_alpha / r) from there: the same matrices, another model."
    adapter = tmp_path/"adapter"; adapter.mkdir()
    (adapter/"adapter_model.safetensors").write_bytes(b"one"); (adapter/"adapter_config.json").write_text('{"lora_alpha": 16}')
    before = model_key(dict(base_sha256="aa"), adapter, True)
    base = model_key(dict(base_sha256="aa"), adapter, False)
    (adapter/"adapter_config.json").write_text('{"lora_alpha": 64}')
    assert model_key(dict(base_sha256="aa"), adapter, True) != before and model_key(dict(base_sha256="aa"), adapter, False) == base
    (adapter/"chat_template.jinja").write_text("another")
    assert model_key(dict(base_sha256="aa"), adapter, False) != base # the prompt is another one, for the base too

def test_other_packages_answer_anew(monkeypatch, tmp_path):
    before = model_key(dict(base_sha256="aa"), tmp_path, False)
    known = A.versions()
    monkeypatch.setattr(A, "versions", lambda: known | {"transformers": "99"})
    assert model_key(dict(base_sha256="aa"), tmp_path, False) != before

def test_replies_of_other_models_are_dropped(tmp_path):
    path = tmp_path/"a.jsonl"
    kept = KeptAnswers(path, {"m", "n"})
    for model in ("m", "n"): kept.add({(model, "a"): Answer(f"{model} a", .5), (model, "b"): Answer(f"{model} b", .25)})
    assert KeptAnswers(path, {"m", "n"}).known == kept.known
    left = KeptAnswers(path, {"n", "o"})
    assert left.known == {("n", "a"): ("n a", .5), ("n", "b"): ("n b", .25)} and path.read_text().count('"n"') == 2 and '"m"' not in path.read_text()

# --- the file, killed at any byte

unicode_replies = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=6)

def _write(path, batches):
    kept = KeptAnswers(path, {"m"})
    for k, batch in enumerate(batches): kept.add({("m", f"{k}-{i}"): Answer(text, round(.1*i, 3)) for i, text in enumerate(batch)})
    return kept.known

@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(unicode_replies, min_size=1, max_size=3))
def test_any_reply_comes_back(tmp_path, batches):
    "Line separators of Unicode, emoji, nothing at all."
    (tmp_path/"a.jsonl").unlink(missing_ok=True)
    assert _write(tmp_path/"a.jsonl", batches) == KeptAnswers(tmp_path/"a.jsonl", {"m"}).known

@given(confidence=st.floats(0, 1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_confidence_is_the_same_before_and_after(tmp_path, confidence):
    "A repeated command must not write other numbers than the first: what is known now is what is known when it is read again."
    (tmp_path/"a.jsonl").unlink(missing_ok=True)
    kept = KeptAnswers(tmp_path/"a.jsonl", {"m"}); kept.add({("m", "a"): Answer("yes", confidence)})
    assert KeptAnswers(tmp_path/"a.jsonl", {"m"}).known == kept.known

BATCHES = [["yes", "no"], ["左侧胸腔积液", ""], ["🫁 \"quoted\" \\ \n new line", "no"]]

def test_killed_at_any_byte_loses_the_torn_line_alone(tmp_path):
    "And what is added after the torn place is found again, too."
    path = tmp_path/"a.jsonl"
    known = _write(path, BATCHES)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        left = KeptAnswers(path, {"m"})
        complete = (whole[:cut] + b"\n").count(b"}\n")
        assert list(left.known.items()) == list(known.items())[:complete], cut
        for k in known: left.add({k: known[k]})
        assert KeptAnswers(path, {"m"}).known == left.known == known, f"cut at byte {cut} of {len(whole)}: {whole[max(0, cut - 20):cut]!r}"

@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.one_of(st.binary(max_size=60), st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["model", "ask", "reply", "confidence"]), x, max_size=4), max_leaves=8), max_size=4)
    .map(lambda rows: "\n".join(map(json.dumps, rows)).encode())))
def test_a_file_of_anything_is_a_file_without_replies_or_with(tmp_path, content):
    path = tmp_path/"a.jsonl"; path.write_bytes(content)
    kept = KeptAnswers(path, {"m"})
    kept.add({("m", "mine"): Answer("yes", .5)})
    assert KeptAnswers(path, {"m"}).known == kept.known and kept.known["m", "mine"] == ("yes", .5)

def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path/"file").write_text("")
    for path in (tmp_path/"file"/"answers.jsonl", tmp_path):
        with pytest.raises(MedchatError, match="cannot write"): KeptAnswers(path, {"m"}).add({("m", "a"): Answer("yes", .5)})

# --- breaking off

@pytest.mark.parametrize("error", [RuntimeError("broke"), KeyboardInterrupt()])
def test_breaking_off_keeps_what_was_said(dataset, questions, fake, kept, error):
    said = []
    def stop_after_seven(on, q, images):
        if len(said) == 7: raise error
        said.append(q); return f"{q} {images[0].size[0]}"
    fake["say"] = stop_after_seven
    with pytest.raises(type(error)): answer_questions(Fake(), None, dataset, questions, batch_size=3, kept=kept(), key="m")
    assert len(kept().known) == 6                                              # two batches of three; the third broke
    fake["calls"].clear(); fake["say"] = lambda on, q, images: f"{q} {images[0].size[0]}"
    assert replies(answer_questions(Fake(), None, dataset, questions, batch_size=3, kept=kept(), key="m")) == right(questions)
    assert len(fake["asked"]()) == len(questions) - 6

@pytest.mark.parametrize("says, hint", [("CUDA out of memory. Tried to allocate 20 GiB", "Try --batch-size 4"), ("DefaultCPUAllocator: not enough memory: Out Of Memory", "Try --batch-size 4")])
def test_too_large_a_batch_says_what_to_do(dataset, questions, fake, says, hint):
    def fail(on, q, images): raise RuntimeError(says)
    fake["say"] = fail
    ask = [questions[0]]*18
    with pytest.raises(MedchatError, match="not enough memory for a batch: 18 questions. " + hint): answer_questions(Fake(), None, dataset, ask)
    with pytest.raises(MedchatError, match="--batch-size 1$"): answer_questions(Fake(), None, dataset, ask, batch_size=2)

def test_other_faults_stay_what_they_are(dataset, questions, fake):
    def fail(on, q, images): raise RuntimeError("device-side assert")
    fake["say"] = fail
    with pytest.raises(RuntimeError, match="device-side"): answer_questions(Fake(), None, dataset, questions)
