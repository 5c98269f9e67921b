"The two stages: captions and their instructions, the projector that travels, the contrastive loss."
import hashlib, json, math
from pathlib import Path
import pytest
from fastcore.test import test_eq as eq
from hypothesis import given, settings, strategies as st
from data_maker import make_data, picture, row
from medchat.batches import VisionCollator
from medchat.core import MedchatError
from medchat.curate import read_dataset
from medchat.models import load_model, load_run
from medchat.plots import read_log
from medchat.stages import BRIEF, DETAILED, LONG, ImageProbe, check_start, contrast_loss, instruction, start_projector, to_descriptions
from medchat.train import train

BASE = "tiny-qwen2-vl"
ALIGN = dict(base=BASE, stage="align", max_steps=6, batch_size=4, gradient_accumulation=1, warmup_steps=0, eval_records=4, eval_steps=3, answer_records=2)
LONG_TEXT, SHORT_TEXT = " ".join(["shadow"]*LONG), "a small nodule in the left lung"

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Captions, long and short, of ten pictures, and a question about each."
    rows = [row(f"c{i}", [("Describe.", SHORT_TEXT + f" {i}" if i % 2 else LONG_TEXT), *([("More?", "no")] if i == 3 else [])], [f"{i}.png"], kind="caption", split="train" if i < 8 else "validation") for i in range(10)]
    rows += [row(f"q{i}", [("Is it large?", "yes" if i % 2 else "no")], [f"{i}.png"], split="train" if i < 8 else "validation", answer_type="closed") for i in range(10)]
    rows += [row("c-blind", [("Describe.", "nothing to see")], kind="caption")]
    return make_data(tmp_path_factory.mktemp("source"), rows)

@pytest.fixture(scope="module")
def aligned(data, tmp_path_factory): return train(data, run=tmp_path_factory.mktemp("runs")/"align", **ALIGN)

def tensors(run):
    from safetensors.torch import load_file
    return load_file(Path(run)/"adapter"/"adapter_model.safetensors")

def tree(folder): return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

# -- instructions

@pytest.mark.parametrize("words, wishes", [(1, BRIEF), (29, BRIEF), (30, DETAILED), (31, DETAILED), (500, DETAILED)])
def test_short_captions_answer_a_brief_wish_and_long_ones_a_detailed_one(words, wishes):
    eq({instruction("w " * words, f"r{i}") for i in range(200)}, set(wishes)) # each of them is used

@given(st.text(max_size=300), st.text(max_size=20), st.integers(0, 2**32 - 1))
def test_the_same_record_always_has_the_same_wish(caption, name, seed):
    wish = instruction(caption, name, seed)
    assert wish == instruction(caption, name, seed) and wish in (BRIEF if len(caption.split()) < 30 else DETAILED)

def test_only_captions_with_a_picture_become_descriptions(data):
    split = read_dataset(data)["train"]
    before, files = [json.dumps(r["messages"]) for r in split], tree(data)
    found = to_descriptions(split, seed=1)
    eq([r["id"] for r in found], [f"c{i}" for i in range(8)])
    for i, r in enumerate(found):
        eq([m["role"] for m in r["messages"]], ["user", "assistant"]) # what was asked later goes
        eq([p["type"] for p in r["messages"][0]["content"]], ["image", "text"]); eq(len(r["images"]), 1)
        eq(r["messages"][0]["content"][-1]["text"], instruction(r["messages"][1]["content"][0]["text"], f"c{i}", 1))
        assert r["messages"][0]["content"][-1]["text"] in (BRIEF if i % 2 else DETAILED)
    eq([r["messages"] for r in found], [r["messages"] for r in to_descriptions(split, seed=1)])
    eq([json.dumps(r["messages"]) for r in split], before); eq(tree(data), files) # nothing of the dataset has changed

def test_no_captions_is_an_error(tmp_path):
    data = make_data(tmp_path, [row("a", [("Is it?", "yes")], ["0.png"]), row("b", [("Describe.", "nothing")], kind="caption")])
    with pytest.raises(MedchatError, match="learns from captions, and there are none: caption, vqa. Convert a dataset with captions, or train with --stage instruct"): train(data, run=tmp_path/"run", **ALIGN)
    assert not (tmp_path/"run").exists()

# -- align

def test_align_trains_the_projector_and_nothing_else(aligned, data):
    stored = tensors(aligned)
    assert stored and all("visual.merger" in k for k in stored), list(stored)[:3]
    base = dict(load_model(BASE)[0].named_parameters())
    tuned, processor = load_run(aligned)
    own = dict(tuned.named_parameters())
    moved = {k for k in stored if not bool((stored[k] == base[k.removeprefix("base_model.model.")]).all())}
    eq(moved, set(stored)) # every weight of it
    for name, p in own.items():
        if "modules_to_save" in name: continue
        plain = name.removeprefix("base_model.model.").replace(".original_module", "").replace(".base_layer", "")
        assert "lora_" not in name and (p == base[plain]).all(), name # language and vision as they were
    for name, p in own.items(): # reloaded as saved
        if "modules_to_save" in name: assert (p == stored[name.replace(".modules_to_save.default", "")]).all(), name
    eq(json.loads((aligned/"config.json").read_text())["stage"], "align")
    assert "| trainable parameters | 0 in LoRA" in (aligned/"receipt.md").read_text()

def test_the_receipt_of_align_shows_descriptions(aligned):
    text = (aligned/"receipt.md").read_text()
    assert "| stage | align |" in text and "| conversations | 8 |" in text and any(w in text for w in (*BRIEF, *DETAILED)) and "Is it large?" not in text

def test_align_is_resumed_exactly(aligned, data, tmp_path):
    import signal
    from transformers import TrainerCallback
    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **_): state.global_step == 2 and signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): train(data, run=tmp_path/"run", **ALIGN, callbacks=(Press(),))
    train(data, run=tmp_path/"run", **ALIGN, resume=True)
    a, b = tensors(aligned), tensors(tmp_path/"run")
    eq(set(a), set(b)); assert all((a[k] == b[k]).all() for k in a)

# -- instruct after align

def test_the_projector_is_copied_exactly(aligned):
    model, _ = load_model(BASE)
    before = {n: p.clone() for n, p in model.named_parameters()}
    stored = {k.removeprefix("base_model.model."): v for k, v in tensors(aligned).items()}
    eq(start_projector(model, aligned), sum(v.numel() for v in stored.values()))
    for n, p in model.named_parameters(): assert (p == stored.get(n, before[n])).all(), n

def test_instruct_begins_with_that_projector(aligned, data, tmp_path):
    from transformers import TrainerCallback
    first = {}
    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **_): first.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n})
    run = train(data, run=tmp_path/"run", **{**ALIGN, "stage": "instruct", "max_steps": 2}, learning_rate=1e-3, start_from=aligned, callbacks=(Look(),))
    stored = tensors(aligned)
    eq({n.replace(".modules_to_save.default", "") for n in first}, set(stored))
    for n, p in first.items(): assert (p == stored[n.replace(".modules_to_save.default", "")]).all(), n
    final = tensors(run)
    assert set(stored) < set(final) and any("lora_" in k for k in final) and not all((final[k] == stored[k]).all() for k in stored) # it is trained on, and travels with the adapter
    config = json.loads((run/"config.json").read_text())
    eq((config["stage"], config["start_from"]), ("instruct", str(aligned)))
    load_run(run)
    with pytest.raises(MedchatError, match="made with another start_from"): train(data, run=run, **{**ALIGN, "stage": "instruct", "max_steps": 2}, learning_rate=1e-3, resume=True)

def test_what_cannot_be_started_from(aligned, data, tmp_path):
    import shutil
    model, _ = load_model(BASE)
    before = {n: p.clone() for n, p in model.named_parameters()}
    def altered(name, **change):
        shutil.copytree(aligned, tmp_path/name)
        (tmp_path/name/"config.json").write_text(json.dumps({**json.loads((aligned/"config.json").read_text()), **change}))
        return tmp_path/name
    with pytest.raises(MedchatError, match="has another base"): check_start(altered("other", base_sha256="0"*64), BASE)
    unfinished = altered("unfinished"); shutil.rmtree(unfinished/"adapter")
    with pytest.raises(MedchatError, match="not finished.*Resume it first"): start_projector(model, unfinished)
    plain = train(data, run=tmp_path/"plain", **{**ALIGN, "stage": "instruct", "max_steps": 1, "eval_records": 0}, projector=False)
    assert not any("visual.merger" in k for k in tensors(plain))
    with pytest.raises(MedchatError, match="has no projector for this base"): start_projector(model, plain)
    with pytest.raises(MedchatError, match="not a run folder"): check_start(tmp_path/"none", BASE)
    assert all((p == before[n]).all() for n, p in model.named_parameters()) # refused before a number was changed
    for start in (tmp_path/"other", unfinished, plain, tmp_path/"none"):
        with pytest.raises(MedchatError) as e: train(data, run=tmp_path/"run", **{**ALIGN, "stage": "instruct"}, start_from=start)
        assert "\n" not in str(e.value) and not (tmp_path/"run").exists(), e.value

# -- settings of the stages

@pytest.mark.parametrize("change, says", [(dict(stage="first"), "unknown stage: first. Known: align, instruct"), (dict(stage="instruct", contrast=.1), "belongs to the first stage"), (dict(kinds="vqa"), "learns from captions: vqa"),
    (dict(contrast=.1, batch_size=1), "compares the pictures of a batch: batch_size 1"), (dict(stage="instruct", start_from="x", projector=False), "the projector is switched off"), (dict(contrast=-.1), "contrast must not be below 0")])
def test_settings_that_contradict_their_stage(data, tmp_path, change, says):
    with pytest.raises(MedchatError, match=says) as e: train(data, run=tmp_path/"run", **{**ALIGN, **change})
    assert "\n" not in str(e.value) and not (tmp_path/"run").exists()

# -- the contrastive loss

def by_hand(images, captions, temperature):
    "InfoNCE, written out with lists."
    unit = lambda v: [x / math.sqrt(sum(y*y for y in v)) for x in v]
    a, b = list(map(unit, images)), list(map(unit, captions))
    like = [[sum(x*y for x, y in zip(u, v)) / temperature for v in b] for u in a]
    loss = lambda rows: sum(math.log(sum(math.exp(x) for x in row)) - row[k] for k, row in enumerate(rows)) / len(rows)
    return (loss(like) + loss([list(c) for c in zip(*like)])) / 2

@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(0, 99), st.sampled_from([.07, .5, 1.]))
def test_contrast_is_what_is_calculated_by_hand(n, seed, temperature):
    import torch
    torch.manual_seed(seed)
    a, b = torch.randn(n, 5), torch.randn(n, 5)
    assert abs(contrast_loss(a, b, temperature).item() - by_hand(a.tolist(), b.tolist(), temperature)) < 1e-4

def test_contrast_at_its_ends():
    import torch
    eq(contrast_loss(torch.randn(1, 5), torch.randn(1, 5)).item(), 0.)
    assert contrast_loss(torch.eye(4), torch.eye(4)).item() < 1e-4
    assert abs(contrast_loss(torch.ones(4, 3), torch.ones(4, 3)).item() - math.log(4)) < 1e-5
    assert contrast_loss(torch.eye(4), torch.eye(4).roll(1, 0)).item() > 10

def test_the_probe_sees_the_pictures_and_the_words():
    import torch
    model, processor = load_model(BASE)
    from medchat.families import family_of
    from medchat.messages import assistant_message, user_message
    family = family_of(model.config)
    rows = [dict(id=str(k), messages=[user_message("What?", 1), assistant_message(a)], images=[picture(k)]) for k, a in enumerate(("yes", "a nodule in the left lung"))]
    batch = VisionCollator(processor, family)(rows)
    probe = ImageProbe(model)
    inputs = {k: v for k, v in batch.items() if k not in ("ids", "labels")}
    with torch.no_grad():
        model(**inputs)
        features = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output.view(2, 16, -1)
        assert torch.allclose(probe.images(batch["input_ids"], processor.image_token_id), features.mean(1), atol=1e-5)
        words = [model.get_input_embeddings()(torch.tensor([t for t in labels if t != -100])).mean(0) for labels in batch["labels"].tolist()]
        assert torch.allclose(probe.captions(batch["input_ids"], batch["labels"]), torch.stack(words), atol=1e-5)

def test_contrast_is_learnt(data, tmp_path):
    "With a weight of 1, and with one that is too small to matter but lets the loss be seen."
    with_it, without = (read_log(train(data, run=tmp_path/f"run{weight}", **{**ALIGN, "max_steps": 30, "batch_size": 8, "eval_records": 0, "learning_rate": 5e-3}, contrast=weight)) for weight in (1., 1e-9))
    one, other = ([r["contrast"] for r in rows] for rows in (with_it, without))
    eq((len(one), round(one[0], 4)), (30, round(other[0], 4)))
    assert abs(one[0] - math.log(8)) < .5 and sum(one[-5:])/5 < sum(one[:5])/5 - .1 and one[-1] < other[-1] - .05, (one, other)
    assert abs(with_it[0]["loss"] - without[0]["loss"] - one[0]) < 1e-3 # the sum of both

def test_without_contrast_the_log_does_not_speak_of_it(aligned): assert not any("contrast" in r for r in read_log(aligned))
