"Tiny bases: the pictures are what the facts say, the recipe learns, and what is shipped looks."
import json
import numpy as np
import pytest
import torch
import medchat.tiny as tiny
from medchat.core import sample_data
from medchat.tiny import (AREAS, KINDS, SIDE, SPECIAL, VOCABULARY, answer_shapes, ask_areas, ask_by_kind, ask_shapes, ask_words, blind_score, draw_shapes, examine, make_base,
    make_processor, make_tiny_base, make_tokenizer)

SHIPPED = sample_data()/"tiny-qwen2-vl"

@pytest.fixture(scope="module")
def processor(): return make_processor()

@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration
    return Qwen2VLForConditionalGeneration.from_pretrained(SHIPPED, dtype="float32"), AutoProcessor.from_pretrained(SHIPPED)

# ---- pictures and questions

def test_pictures_come_from_their_seed():
    (a, f), (b, g), (c, h) = (draw_shapes(np.random.default_rng(s)) for s in (4, 4, 5))
    assert a.dtype == np.uint8 and a.shape == (SIDE, SIDE) and (a == b).all() and f == g and (a != c).any()

@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_lies_in_its_area_and_has_its_shade(area, kind):
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    for size in ("small", "large"):
        for seed in range(5):
            white, black = (tiny._shape_light(x, y, area, dict(kind=kind, shade=s, size=size), np.random.default_rng(seed)) for s in ("white", "black"))
            assert white.max() > 40 and white.min() >= 0 and (black == -white).all()
            middle = (white*x).sum()/white.sum(), (white*y).sum()/white.sum()
            assert (middle[0] > 56) == area.startswith("right") and (middle[1] > 56) == area.endswith("lower")

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
    one, two = ([p for _ in range(4000) for p in ask_shapes(tiny._choose(rng), rng, 4) if p[1] in ("yes", "no")] for _ in range(2))
    assert abs(np.mean([a == "yes" for _, a in one]) - .5) < .04
    assert blind_score(one, two) < .56

def test_blind_score_counts_exact_answers(): assert blind_score([("a", "1"), ("a", "1"), ("a", "2"), ("b", "3")], [("a", "1"), ("a", "2"), ("b", "3"), ("c", "1")]) == .75

# ---- tokenizer, template, labels

def test_tokenizer_loses_nothing_and_keeps_special_tokens_whole():
    tokenizer = make_tokenizer()
    assert len(tokenizer) == VOCABULARY and len({tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}) == len(SPECIAL)
    for text in ("Is there a ring?", "naïve µm 肺 \n\t 🙂", "<|im_start|>user\nhi<|im_end|>"): assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert all(len(tokenizer(t).input_ids) == 1 for t in SPECIAL)
    assert make_tokenizer().get_vocab() == tokenizer.get_vocab()

def test_template_is_that_of_qwen2_vl(processor):
    image, text = {"type": "image"}, lambda t: {"type": "text", "text": t}
    render = lambda messages, **k: processor.apply_chat_template(messages, tokenize=False, **k)
    system, picture = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", "<|vision_start|><|image_pad|><|vision_end|>"
    assert render([{"role": "user", "content": [image, image, text("a")]}], add_generation_prompt=True) == f"{system}<|im_start|>user\n{picture*2}a<|im_end|>\n<|im_start|>assistant\n"
    assert render([{"role": "user", "content": "a"}, {"role": "assistant", "content": [text("b")]}]) == f"{system}<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert render([{"role": "system", "content": "s"}, {"role": "user", "content": [text(" a\n")]}]) == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n a\n<|im_end|>\n"

@pytest.mark.parametrize("image_tokens", [0, 16, 20])
def test_rows_are_what_the_processor_makes_and_only_answers_are_learnt(processor, image_tokens):
    pairs = [("Is there a ring?", "yes"), ("What is in the left upper area?", "large black cloud")]
    ids, labels = tiny._row(processor.tokenizer, pairs, image_tokens)
    content = lambda q, first: ([{"type": "image"}] if first and image_tokens else []) + [{"type": "text", "text": q}]
    text = processor.apply_chat_template([m for i, (q, a) in enumerate(pairs) for m in ({"role": "user", "content": content(q, not i)}, {"role": "assistant", "content": a})], tokenize=False)
    picture = np.zeros((SIDE, SIDE if image_tokens < 20 else SIDE + 28, 3), np.uint8)
    assert ids == list(processor(text=text, images=[picture] if image_tokens else None).input_ids[0])[:-1]
    assert [i for i, l in zip(ids, labels) if l != -100] == [i for _, a in pairs for i in processor.tokenizer(a + "<|im_end|>").input_ids]

def test_reading_has_answers():
    rng = np.random.default_rng(0)
    pairs = [ask_words(rng) for _ in range(300)]
    assert all(q and a for q, a in pairs) and ("What does nodule mean?", tiny.GLOSSARY["nodule"]) in pairs
    assert all(a == q.split(": ", 1)[1] for q, a in pairs if q.startswith("Repeat: "))

# ---- the recipe

def test_widths_fit_4_bit_blocks(processor):
    model = make_base(processor)
    assert all(m.in_features % 64 == 0 for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert 1e6 < model.num_parameters() < 3e6
    assert all((a == b).all() for a, b in zip(model.state_dict().values(), make_base(processor).state_dict().values()))

def test_the_recipe_learns(tmp_path):
    recipe = make_tiny_base(tmp_path/"base", pictures=600, lessons=(("sight", dict(steps=60)), ("answers", dict(steps=30, about="areas")), ("answers", dict(steps=30, about="all"))))
    first, last = zip(*((np.mean(l["loss"][:3]), np.mean(l["loss"][-5:])) for l in recipe["lessons"]))
    assert last[0] < .8*first[0] and last[1] < .5*first[1] and last[2] < first[2], recipe

def test_a_stopped_rebuild_goes_on_with_the_next_lesson(tmp_path, monkeypatch):
    lessons, taught = (("sight", dict(steps=2)), ("answers", dict(steps=2, about="areas"))), []
    def stop(*_, **__): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(tiny, "teach_answers", stop)
        with pytest.raises(KeyboardInterrupt): make_tiny_base(tmp_path/"base", pictures=80, lessons=lessons)
    half = json.loads((tmp_path/"base"/"recipe.json").read_text())
    assert [l["name"] for l in half["lessons"]] == ["sight"]
    see = tiny.teach_sight
    monkeypatch.setattr(tiny, "teach_sight", lambda *a, **k: taught.append("sight") or see(*a, **k))
    whole = make_tiny_base(tmp_path/"base", pictures=80, lessons=lessons)
    assert not taught and whole["lessons"][0] == half["lessons"][0] and [l["name"] for l in whole["lessons"]] == ["sight", "answers"]
    assert [l["name"] for l in make_tiny_base(tmp_path/"base", pictures=81, lessons=lessons[:1])["lessons"]] == ["sight"] and taught # another recipe starts anew

# ---- what is shipped

def test_shipped_files_are_complete_and_small():
    names = {p.name for p in SHIPPED.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "recipe.json"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl", ".py"))] and sum(p.stat().st_size for p in SHIPPED.iterdir()) < 5e6

def test_shipped_base_was_made_by_the_recipe(shipped, processor):
    recipe = json.loads((SHIPPED/"recipe.json").read_text())
    assert [(l["name"], l["options"]) for l in recipe["lessons"]] == [(n, o) for n, o in tiny.LESSONS]
    assert sum(l["minutes"] for l in recipe["lessons"]) < 90
    assert shipped[1].chat_template == processor.chat_template and shipped[1].tokenizer.get_vocab() == processor.tokenizer.get_vocab()

def test_shipped_base_looks(shipped):
    exam = examine(*shipped, count=400, seed=2**30)
    assert exam["right_picture"] >= .85, exam["right_picture"]
    assert exam["wrong_picture"] <= exam["blind"] + .03 < .6, exam

def test_batch_and_single_answers_agree(shipped):
    rng = np.random.default_rng(3)
    drawn = [draw_shapes(rng) for _ in range(8)]
    images, questions = np.stack([i for i, _ in drawn]), [ask_shapes(f, rng)[0][0] for _, f in drawn]
    assert answer_shapes(*shipped, images, questions) == [answer_shapes(*shipped, images[i:i+1], [q])[0] for i, q in enumerate(questions)]
