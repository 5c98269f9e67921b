"Tiny bases: rows are what the processors make, the recipe learns, and what is shipped looks."
import json, logging
from functools import lru_cache
import numpy as np
import pytest
import torch
import medchat.tiny as tiny
from medchat.blueprints import BLUEPRINTS
from medchat.core import MedchatError, sample_data
from medchat.shapes import SIDE, ask_shapes, ask_words, draw_pool, draw_shapes
from medchat.tiny import LESSONS, answer_shapes, examine, make_tiny_base, teach_answers, teach_sight

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
SHIPPED = list(BLUEPRINTS)
every, shipped = pytest.mark.parametrize("base", BLUEPRINTS), pytest.mark.parametrize("base", SHIPPED)

_make = {base: blueprint.make_processor for base, blueprint in BLUEPRINTS.items()}

@lru_cache
def processor_of(base): return _make[base]()

@lru_cache
def load(base):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    return AutoModelForImageTextToText.from_pretrained(sample_data()/base, dtype="float32"), AutoProcessor.from_pretrained(sample_data()/base)

@lru_cache
def pool(): return draw_pool(100, 5)

@pytest.fixture(autouse=True)
def made_once(monkeypatch):
    "Learning a tokenizer takes a second; that it comes out the same each time is for test_blueprints to say."
    for base, blueprint in BLUEPRINTS.items():
        processor = processor_of(base)
        monkeypatch.setattr(type(blueprint), "make_processor", lambda self, seed=0, processor=processor: processor)

def weights(folder): return (folder/"model.safetensors").read_bytes()

# ---- rows

def conversation(pairs, image):
    part = lambda kind, text=None: {"type": kind, "text": text}
    return [m for i, (q, a) in enumerate(pairs) for m in (
        {"role": "user", "content": [part("image")]*(image and not i) + [part("text", q)]}, {"role": "assistant", "content": [part("text", a)]})]

@every
@pytest.mark.parametrize("sides", [(112, 112), (112, 140), (140, 112), None])
def test_rows_are_what_the_processor_makes_and_only_answers_are_learnt(base, sides):
    processor, family, rng = processor_of(base), BLUEPRINTS[base].family, np.random.default_rng(0)
    for _ in range(15):
        pairs = ask_shapes(draw_shapes(rng)[1], rng, int(rng.integers(1, 6))) + [ask_words(rng)]
        ids, labels = tiny._row(processor, family.end_of_turn, pairs, sides)
        text = processor.apply_chat_template(conversation(pairs, bool(sides)), tokenize=False)
        whole = list(processor(text=[text], images=[[np.zeros((*sides, 3), np.uint8)]] if sides else None, add_special_tokens=False).input_ids[0])
        assert ids == whole[:len(ids)] and len(whole) - len(ids) <= 1 # Qwen2-VL's template has a line feed after the end
        assert len(ids) == len(labels) and all(l in (-100, i) for i, l in zip(ids, labels)) and processor.image_token_id not in labels
        blank = " " if base == "tiny-llava-1.6" else "" # its template writes one before the answer
        answers = [blank + a + family.end_of_turn for _, a in pairs]
        assert [l for l in labels if l != -100] == [i for a in answers for i in processor.tokenizer(a.removeprefix(" "), add_special_tokens=False).input_ids]

@every
def test_labels_are_what_follows_the_prompt(base):
    "As the training notebook makes them, from the length of the prompt."
    processor, end = processor_of(base), BLUEPRINTS[base].family.end_of_turn
    pairs = [("Is there a ring?", "yes")]
    ids, labels = tiny._row(processor, end, pairs, (SIDE, SIDE))
    text = processor.apply_chat_template(conversation(pairs, True)[:1], tokenize=False, add_generation_prompt=True)
    prompt = processor(text=[text], images=[[np.zeros((SIDE, SIDE, 3), np.uint8)]], add_special_tokens=False).input_ids[0]
    assert ids[:len(prompt)] == list(prompt) and labels == [-100]*len(prompt) + ids[len(prompt):]

@every
@pytest.mark.parametrize("about, reading", [("areas", 0), ("all", 8)])
def test_a_step_is_32_conversations(base, about, reading):
    batches = tiny._lesson_batches(base, processor_of(base), pool(), np.random.default_rng(0), about, reading)
    assert [len(b["input_ids"]) for b in batches] == ([16, 16] if not reading else [12, 12, 8])
    for batch in batches:
        ids, pad = batch["input_ids"], processor_of(base).tokenizer.pad_token_id
        assert ((ids == pad) == (batch["attention_mask"] == 0)).all() and (batch["labels"][ids == pad] == -100).all() and (batch["labels"] != -100).any(1).all()
        assert ("pixel_values" in batch) == (ids == processor_of(base).image_token_id).any().item()
    assert batches[0]["input_ids"].shape[1] <= batches[1]["input_ids"].shape[1]

@every
def test_batches_are_what_the_processor_makes(base):
    processor, rng = processor_of(base), np.random.default_rng(2)
    images, facts = pool()
    pairs = [ask_shapes(facts[i], rng, n) for i, n in enumerate((1, 4, 2))]
    rows = [tiny._row(processor, BLUEPRINTS[base].family.end_of_turn, p, (SIDE, SIDE)) for p in pairs]
    ours = tiny._batch(base, processor, rows, dict(tiny._patches(processor, images[:3])))
    pictures = [[torch.from_numpy(i)[None].expand(3, -1, -1)] for i in images[:3]]
    theirs = processor(text=[processor.apply_chat_template(conversation(p, True), tokenize=False).removesuffix("\n") for p in pairs], images=pictures,
        add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    assert set(ours) - {"labels"} == set(theirs)
    real = ours["attention_mask"].bool()
    for name in theirs:
        a, b = torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])
        assert a.shape == b.shape and ((a == b)[real].all() if a.shape[:2] == real.shape else (a == b).all()), name

# ---- the recipe

@every
def test_the_recipe_learns(base, tmp_path):
    recipe = make_tiny_base(base, tmp_path/base, pictures=200, lessons=(("sight", dict(steps=6)), ("answers", dict(steps=4, about="areas", learning_rate=3e-3)), ("answers", dict(steps=1, about="all", reading=8))))
    sight, areas, _ = ((l["loss"][0], l["loss"][-1]) for l in recipe["lessons"])
    assert sight[1] < .95*sight[0] and areas[1] < .7*areas[0], recipe
    assert not [f.name for f in (tmp_path/base).iterdir() if f.suffix not in (".json", ".jinja", ".safetensors")]

def test_sight_is_learnt_by_what_sees_only():
    for base in BLUEPRINTS:
        model = BLUEPRINTS[base].make_model(processor_of(base)); before = {n: w.clone() for n, w in model.named_parameters()}
        teach_sight(base, model, processor_of(base), pool(), steps=1)
        changed = {n for n, w in model.named_parameters() if (w != before[n]).any()}
        assert changed and not [n for n in changed if "language_model" in n or "lm_head" in n]

@every
def test_every_part_learns_to_answer(base):
    "Gates included: a Llama whose tower got no gradient would look at nothing."
    model = BLUEPRINTS[base].make_model(processor_of(base)); before = {n: w.clone() for n, w in model.named_parameters()}
    teach_answers(base, model, processor_of(base), pool(), steps=2, about="areas")
    still = [n for n, w in model.named_parameters() if (w == before[n]).all()]
    assert len(still) < 6 and not [n for n in still if "gate" in n or "proj" in n.rsplit(".", 2)[-2]], still

FEW = (("sight", dict(steps=1)), ("answers", dict(steps=2, about="areas")))

def test_the_same_seed_makes_the_same_bytes(tmp_path):
    for name in "ab": make_tiny_base("tiny-llama-3.2-vision", tmp_path/name, pictures=40, lessons=FEW)
    assert weights(tmp_path/"a") == weights(tmp_path/"b")

def test_a_stopped_rebuild_goes_on_with_the_next_lesson(tmp_path, monkeypatch):
    taught, base = [], "tiny-llama-3.2-vision"
    def stop(*_, **__): raise KeyboardInterrupt
    for name in "ab":
        with monkeypatch.context() as m:
            m.setattr(tiny, "teach_answers", stop)
            with pytest.raises(KeyboardInterrupt): make_tiny_base(base, tmp_path/name, pictures=40, lessons=FEW)
    half = json.loads((tmp_path/"a"/"recipe.json").read_text())
    assert [l["name"] for l in half["lessons"]] == ["sight"] and weights(tmp_path/"a") == weights(tmp_path/"b")
    see = tiny.teach_sight
    monkeypatch.setattr(tiny, "teach_sight", lambda *a, **k: taught.append("sight") or see(*a, **k))
    whole = make_tiny_base(base, tmp_path/"a", pictures=40, lessons=FEW); make_tiny_base(base, tmp_path/"b", pictures=40, lessons=FEW)
    assert not taught and whole["lessons"][0] == half["lessons"][0] and [l["name"] for l in whole["lessons"]] == ["sight", "answers"]
    assert weights(tmp_path/"a") == weights(tmp_path/"b") # stopped at the same place: the same bytes
    make_tiny_base(base, tmp_path/"c", pictures=40, lessons=FEW)
    a, c = (_read(tmp_path/name) for name in "ac") # never stopped: the same but for what half precision rounds away between two lessons
    assert max((a[k] - c[k]).abs().max().item() for k in a) < .01
    taught.clear()
    assert [l["name"] for l in make_tiny_base(base, tmp_path/"a", pictures=41, lessons=FEW[:1])["lessons"]] == ["sight"] and taught # another recipe starts anew

def _read(folder):
    from safetensors.torch import load_file
    return {k: w.float() for k, w in load_file(folder/"model.safetensors").items()}

def test_another_bases_folder_is_not_taken_for_this_one(tmp_path):
    make_tiny_base("tiny-llama-3.2-vision", tmp_path/"base", pictures=40, lessons=FEW[:1])
    make_tiny_base("tiny-qwen2-vl", tmp_path/"base", pictures=40, lessons=FEW[:1])
    assert json.loads((tmp_path/"base"/"config.json").read_text())["model_type"] == "qwen2_vl"

@pytest.mark.parametrize("name", ["tiny-dragon", "", "qwen2-vl"])
def test_an_unknown_base_is_one_line(name, tmp_path):
    with pytest.raises(MedchatError, match="There are: tiny-qwen2-vl, tiny-llama-3.2-vision, tiny-llava-1.6") as e: make_tiny_base(name, tmp_path/"base")
    assert "\n" not in str(e.value) and not (tmp_path/"base").exists()

# ---- what is shipped

@shipped
def test_shipped_files_are_complete_and_safe(base):
    names = {p.name for p in (sample_data()/base).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "chat_template.jinja", "recipe.json"} <= names
    assert not [n for n in names if not n.endswith((".safetensors", ".json", ".jinja"))]

def test_shipped_bases_are_small(): assert 0 < sum(f.stat().st_size for base in SHIPPED for f in (sample_data()/base).rglob("*")) <= 8_000_000

@shipped
def test_shipped_base_was_made_by_the_recipe(base):
    recipe, (model, processor), fresh = json.loads((sample_data()/base/"recipe.json").read_text()), load(base), processor_of(base)
    assert [(l["name"], l["options"]) for l in recipe["lessons"]] == [(n, o) for n, o in LESSONS + BLUEPRINTS[base].more_lessons]
    assert 30 < sum(l["minutes"] for l in recipe["lessons"]) < 360 # the second with other work beside it
    assert processor.chat_template == fresh.chat_template == BLUEPRINTS[base].family.template and processor.tokenizer.get_vocab() == fresh.tokenizer.get_vocab()
    made = BLUEPRINTS[base].make_model(fresh)
    assert {n: w.shape for n, w in model.named_parameters()} == {n: w.shape for n, w in made.named_parameters()} and model.config.model_type == made.config.model_type

@shipped
def test_shipped_base_looks(base):
    exam = examine(*load(base), count=400, seed=2**30)
    assert exam["right_picture"] >= .85, exam["right_picture"]
    assert exam["wrong_picture"] <= exam["blind"] + .03 < .6, exam

@shipped
def test_batch_and_single_answers_agree(base):
    images, facts = pool()
    questions = [ask_shapes(f, np.random.default_rng(3))[0][0] for f in facts[:8]]
    assert answer_shapes(*load(base), images[:8], questions) == [answer_shapes(*load(base), images[i:i+1], [q])[0] for i, q in enumerate(questions)]

@shipped
def test_shipped_gates_are_open(base):
    gates = [w.tanh().abs().item() for n, w in load(base)[0].named_parameters() if n.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate"))]
    assert bool(gates) == (base == "tiny-llama-3.2-vision") and all(g > .1 for g in gates)

@shipped
def test_it_still_answers_at_4_bits(base):
    from medchat.models import load_model
    model, processor = load_model(base)[:2]
    assert "Linear4bit" in {type(m).__name__ for m in model.modules()}
    exam = examine(model, processor, count=64, seed=2**30)
    assert exam["right_picture"] >= .7, exam["right_picture"]
