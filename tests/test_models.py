"Loading, encoding, answering, adapters: faults and edges."
import ast, json, os, shutil, subprocess, sys, types, warnings
from pathlib import Path
import pytest
from fastcore.test import test_eq as eq
from hypothesis import given, settings, strategies as st
from medchat import models
from medchat.core import MedchatError
from medchat.families import FAMILIES, family_of
from medchat.messages import assistant_message, user_message
from medchat.models import (add_lora, answer_prompts, base_hash, encode, generate_replies, greedy, load_adapter, load_model, load_run, resolve_base, same_sort, set_training, trained_parts)

BASE = "tiny-qwen2-vl"
TINY = [f.name for f in FAMILIES.values() if f.tiny_base]
every = pytest.mark.parametrize("name", TINY)

@pytest.fixture(scope="module")
def loaded(): return load_model(BASE)

@pytest.fixture(scope="module", params=TINY)
def each(request, bases):
    "The tiny base of a family, at 4 bits."
    return load_model(bases[request.param])

def picture(seed=0, side=112):
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (7, 7), dtype=np.uint8)).resize((side, side)).convert("RGB")

def ask(text, n=1): return [user_message(text, n)]

# -- bases

@pytest.mark.parametrize("name, says", [
    ("tiny-nothing", "no such tiny base"), ("./missing", "no such base"), ("/missing/folder", "no such base"), ("word", "no such base"),
    ("a/b/c", "no such base"), ("../x", "no such base"), ("", "no such base"), ("tiny-../..", "no such tiny base"), ("a b/c", "no such base")])
def test_bad_names_are_refused(name, says):
    with pytest.raises(MedchatError, match=says): resolve_base(name)

def test_a_hub_base_offline_is_one_line_with_a_way_out(monkeypatch, tmp_path):
    import huggingface_hub.constants as c
    monkeypatch.setattr(c, "HF_HUB_CACHE", str(tmp_path)); monkeypatch.setattr(c, "HF_HUB_OFFLINE", True)
    with pytest.raises(MedchatError) as e: resolve_base("unsloth/Qwen2-VL-2B-Instruct-bnb-4bit")
    assert "cannot be reached" in str(e.value) and "tiny-qwen2-vl" in str(e.value) and "\n" not in str(e.value) and str(tmp_path) not in str(e.value)

def test_a_cached_hub_base_is_used_without_asking_the_network(monkeypatch, tmp_path):
    import huggingface_hub
    asked = []
    def download(name, local_files_only=False, **_):
        asked.append(local_files_only)
        return resolve_base(BASE)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    eq(resolve_base("someone/else"), resolve_base(BASE))
    eq(asked, [True])

def copy_base(tmp_path, base=BASE):
    folder = tmp_path/"base"
    shutil.copytree(resolve_base(base), folder)
    return folder

def test_a_folder_is_a_base_only_with_safetensors(tmp_path):
    folder = copy_base(tmp_path)
    eq(resolve_base(str(folder)), str(folder))
    (folder/"model.safetensors").rename(folder/"pytorch_model.bin")
    with pytest.raises(MedchatError, match="not a complete base"): load_model(str(folder))
    (folder/"model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(MedchatError, match="not a complete base"): load_model(str(folder))

@pytest.mark.parametrize("spoil, says", [
    (lambda f: (f/"model.safetensors").write_bytes(b"junk"), "cannot load the base"),
    (lambda f: (f/"config.json").write_text("{"), "cannot load the base"),
    (lambda f: (f/"config.json").write_text('{"model_type": "bert"}'), "unknown model family"),
    (lambda f: [p.unlink() for p in f.glob("*token*")], "tokenizer lacks a token"),
    (lambda f: (f/"model.safetensors").write_bytes((f/"model.safetensors").read_bytes()[:-1000]), "cannot load the base")],
    ids=["weights are junk", "config is not JSON", "another family", "no tokenizer", "weights are cut"])
def test_spoilt_bases_are_one_line(tmp_path, spoil, says):
    folder = copy_base(tmp_path)
    spoil(folder)
    with pytest.raises(MedchatError, match=says) as e: load_model(str(folder))
    assert "\n" not in str(e.value)

@every
def test_a_base_with_a_missing_tensor_is_refused_not_filled_with_noise(tmp_path, bases, name):
    from safetensors.torch import load_file, save_file
    folder = copy_base(tmp_path, bases[name])
    weights = load_file(folder/"model.safetensors")
    weights.pop(next(k for k in weights if "q_proj.weight" in k))
    save_file(weights, folder/"model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MedchatError, match="do not fit its configuration.*q_proj"): load_model(str(folder))

def test_code_in_a_checkpoint_is_never_run(tmp_path):
    folder = copy_base(tmp_path)
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForImageTextToText": "evil.Model", "AutoConfig": "evil.Config"}}))
    (folder/"evil.py").write_text(f"open({str(tmp_path/'ran')!r}, 'w')")
    try: load_model(str(folder))
    except MedchatError: pass
    assert not (tmp_path/"ran").exists()

def test_the_hash_is_of_the_weights(tmp_path):
    folder = copy_base(tmp_path)
    eq(base_hash(folder), base_hash(resolve_base(BASE)))
    data = bytearray((folder/"model.safetensors").read_bytes()); data[-1] ^= 1
    (folder/"model.safetensors").write_bytes(data)
    assert base_hash(folder) != base_hash(resolve_base(BASE))

def test_a_processor_of_its_own_is_refused_without_a_question(tmp_path, capfd):
    folder = copy_base(tmp_path)
    config = json.loads((folder/"processor_config.json").read_text())
    (folder/"processor_config.json").write_text(json.dumps({**config, "auto_map": {"AutoProcessor": "evil.EvilProcessor"}, "processor_class": "EvilProcessor"}))
    (folder/"evil.py").write_text(f"open({str(tmp_path/'ran')!r}, 'w')")
    with pytest.raises(MedchatError, match="cannot load the base"): load_model(str(folder))
    assert not (tmp_path/"ran").exists() and "[y/N]" not in "".join(capfd.readouterr())

# -- 4 bits

def test_language_layers_are_at_4_bits_and_nothing_else(each):
    import torch
    model, family = each[0], family_of(each[0].config)
    for name, module in model.named_modules():
        if hasattr(module, "weight") and "Linear" in type(module).__name__:
            eq(type(module).__name__ == "Linear4bit", name.startswith(family.language + "."))
    for name, p in model.named_parameters():
        if name.startswith((*family.vision, family.projector, "lm_head")): eq(p.dtype, torch.float32)
    assert any(name.startswith(family.full_precision) for name, _ in model.named_parameters())

@every
def test_a_base_loads_whole_and_ready(bases, name):
    import torch
    model, processor = load_model(bases[name], load_in_4bit=False)
    assert not any("4bit" in type(m).__name__ for m in model.modules()) and all(p.dtype == torch.float32 for p in model.parameters())
    eq(family_of(model.config).name, name)
    assert not model.training and load_model(bases[name], for_training=True)[0].training
    assert processor.tokenizer.convert_tokens_to_ids(FAMILIES[name].end_of_turn) in model.generation_config.eos_token_id and not model.generation_config.do_sample

def gradients(model, processor):
    from medchat.batches import VisionCollator
    batch = VisionCollator(processor, family_of(model.config))([dict(id="x", messages=ask("What is this?") + [assistant_message("a nodule")], images=[picture()])])
    model.zero_grad()
    model(**{k: v for k, v in batch.items() if k != "ids"}).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}

@every
def test_evaluate_then_train_has_the_same_gradients(bases, name):
    import torch
    found, family = [], FAMILIES[name]
    for evaluate_first in (False, True):
        model, processor = load_model(bases[name], for_training=True)
        model = add_lora(model, vision_layers=True)
        if evaluate_first: generate_replies(model, processor, [ask("What?")], [[picture()]], max_new_tokens=3)
        assert model.training
        found.append(gradients(model, processor))
    eq(set(found[0]), {n for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    for part in (family.language, family.projector, *family.vision): assert any(g.abs().sum() > 0 for n, g in found[0].items() if part in n), part

def test_the_trap_is_real_where_the_cpu_has_it():
    "Without our switch, evaluating a 4-bit model on such a CPU makes it untrainable. When this fails, the switch may go."
    from bitsandbytes.functional import has_avx512bf16
    if not has_avx512bf16(): pytest.skip("this CPU does not repack 4-bit weights")
    model, processor = load_model(BASE, for_training=True)
    model = add_lora(model)
    for m in model.modules():
        if type(m).__name__ == "Linear4bit": m.support_avx512bf16_for_cpu = True
    generate_replies(model, processor, [ask("What?")], [[picture()]], max_new_tokens=3)
    try: grads = gradients(model, processor)
    except RuntimeError: return
    assert len(grads) < sum(p.requires_grad for p in model.parameters()) or not any(g.abs().sum() for g in grads.values())

def test_no_compiled_code_is_fetched_while_loading_and_nothing_is_said(tmp_path, bases):
    "On some CPUs bitsandbytes asks the package `kernels` for code from the Hub, at import. And transformers warns of its own old words."
    (tmp_path/"kernels.py").write_text(f"def get_kernel(*a, **k): open({str(tmp_path/'fetched')!r}, 'w')")
    picture().save(tmp_path/"x.png")
    code = f"""import sys
from medchat.models import *
from medchat.messages import user_message
for base in {list(bases.values())}:
    model, processor = load_model(base, for_training=True)
    generate_replies(add_lora(model), processor, [[user_message('What?', 1)]], [[{str(tmp_path/"x.png")!r}]], 3)
assert 'bitsandbytes' in sys.modules
import kernels; print(kernels.get_kernel)"""
    env = {**os.environ, "PYTHONPATH": f"{Path(models.__file__).parent.parent}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    eq((done.returncode, done.stderr), (0, "")); assert "get_kernel" in done.stdout
    assert not (tmp_path/"fetched").exists()

# -- encode

def test_padding_side_is_what_was_asked_every_time(each):
    _, processor = each
    for side in ("left", "right", "left"):
        mask = encode(processor, [ask("Short?"), ask("A much longer question about the left lung?")], [[picture()], [picture()]], padding_side=side)["attention_mask"]
        eq(mask[0][0].item(), int(side == "right")); eq(mask[0][-1].item(), int(side == "left"))
        assert mask[1].all()

def test_the_template_alone_writes_special_tokens(loaded):
    _, processor = loaded
    ids = encode(processor, [ask("What?")], [[picture()]])["input_ids"][0].tolist()
    text = processor.tokenizer.decode(ids)
    eq(text.count("<|im_start|>system"), 1); assert text.endswith("<|im_start|>assistant\n")
    eq(ids, processor.tokenizer(text, add_special_tokens=False)["input_ids"])

def test_large_images_are_capped_and_the_cap_is_the_family_s(loaded):
    _, processor = loaded
    cap = min(FAMILIES["qwen2-vl"].max_pixels, processor.image_processor.size["longest_edge"])
    batch = encode(processor, [ask("What?")], [[picture(side=3000)]])
    n = int((batch["input_ids"] == processor.image_token_id).sum())
    eq(n, int(batch["image_grid_thw"].prod())//4); assert 1 <= n <= cap // 784

def test_a_base_with_a_huge_cap_gets_ours(tmp_path):
    folder = copy_base(tmp_path)
    file = folder/"processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["size"]["longest_edge"] = 10**8
    file.write_text(json.dumps(config))
    eq(load_model(str(folder))[1].image_processor.size["longest_edge"], 512*784)

def test_rows_with_no_one_and_two_images_in_one_batch(each):
    "Their replies are those to each alone, in their order."
    model, processor = each
    messages = [ask("No image?", 0), ask("One?", 1), ask("Nor here, though it is asked at length?", 0), ask("Two?", 2)]
    images = [[], [picture(1)], [], [picture(1), picture(2, side=84)]]
    together = generate_replies(model, processor, messages, images, max_new_tokens=8)
    eq(together, [generate_replies(model, processor, [m], [i], max_new_tokens=8)[0] for m, i in zip(messages, images)])
    eq(generate_replies(model, processor, [], []), [])

@pytest.mark.parametrize("images, apart", [([[1], [], [1]], [[0, 2], [1]]), ([[], []], [[0, 1]]), ([[1], [1, 2]], [[1], [0]]), ([[]], [[0]])])
def test_sorts_that_may_share_a_batch(images, apart):
    for family in FAMILIES.values(): eq(same_sort(family, images), [list(range(len(images)))] if family.mixes else apart)

def test_sorts_by_the_number_of_images():
    rows = [[1], [], [1, 2], [1], []]
    for family in FAMILIES.values(): eq(same_sort(family, rows), [[0, 1, 2, 3, 4]] if family.mixes else [[2], [0, 3], [1, 4]])
    eq(same_sort(FAMILIES["qwen2-vl"], []), [])

def test_a_row_of_fewer_images_is_not_answered_beside_one_of_more(bases):
    """Words before the mark of an image look at all images, and at what fills up the row (transformers 5.17 takes back a mask
    that would leave a word nothing to look at). When this fails, rows may be grouped by with and without images alone."""
    import torch
    model, processor = load_model(bases["llama-3.2-vision"])
    messages, images = [ask("One?"), ask("Two?", 2)], [[picture(1)], [picture(1), picture(2)]]
    with torch.inference_mode(): both, alone = (model(**encode(processor, messages[:n], images[:n])).logits[0, -1] for n in (2, 1))
    assert (both - alone).abs().max() > 1e-3

def test_batch_equals_single(each):
    model, processor = each
    questions = [ask(q) for q in ("What is in the left upper area?", "Is there a circle?", "Where?", "Describe the image and everything that you can see in it.")]
    images = [[picture(i, side=56 + 28*i)] for i in range(4)]
    together = generate_replies(model, processor, questions, images, max_new_tokens=16)
    eq(together, [generate_replies(model, processor, [q], [i], max_new_tokens=16)[0] for q, i in zip(questions, images)])

def test_images_may_come_in_any_form(each, tmp_path):
    _, processor = each
    picture().save(tmp_path/"x.png")
    data = (tmp_path/"x.png").read_bytes()
    forms = [tmp_path/"x.png", str(tmp_path/"x.png"), data, picture(), {"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path/"x.png")}]
    first, *rest = [encode(processor, [ask("What?")], [[f]])["pixel_values"] for f in forms]
    assert all((r == first).all() for r in rest)

def test_mismatched_and_broken_images_are_refused(each):
    _, processor = each
    with pytest.raises(MedchatError, match="do not match: 1 places, 0 images"): encode(processor, [ask("What?")], [[]])
    with pytest.raises(MedchatError, match="do not match: 0 places, 1 images"): encode(processor, [ask("What?", 0)], [[picture()]])
    with pytest.raises(MedchatError): encode(processor, [ask("What?")], [[b"junk"]])

def test_dataset_rows_and_fresh_messages_give_the_same_tensors(each):
    "Arrow hands parts back with every key, None where there is nothing."
    _, processor = each
    plain = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert (encode(processor, [plain], [[picture()]])["input_ids"] == encode(processor, [ask("What?")], [[picture()]])["input_ids"]).all()

# -- answering

def test_an_answer_in_the_prompt_is_refused(each):
    with pytest.raises(MedchatError, match="already holds the answer"):
        generate_replies(*each, [ask("What?") + [assistant_message("a nodule")]], [[picture()]])

def test_replies_end_at_the_end_token(each, monkeypatch):
    import torch
    model, processor = each
    batch = encode(processor, [ask("What?")], [[picture()]])
    with torch.no_grad(): out = model.generate(**batch, generation_config=greedy(processor, 6))
    fresh = out[0, batch["input_ids"].shape[1]:].tolist()
    ends = greedy(processor, 6, model.generation_config.eos_token_id).eos_token_id
    assert processor.tokenizer.convert_tokens_to_ids(family_of(model.config).end_of_turn) in ends and processor.tokenizer.pad_token_id not in [processor.tokenizer.eos_token_id]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [*ends, fresh[0]]) # call its first word an end token
    with torch.no_grad(): out = model.generate(**batch, generation_config=greedy(processor, 6, model.generation_config.eos_token_id))
    eq(out.shape[1] - batch["input_ids"].shape[1], 1)

def test_the_base_answers_and_stops_by_itself(loaded):
    "The shipped base has learnt to close its replies: none runs to the limit."
    import torch
    model, processor = loaded
    batch = encode(processor, [ask("What is in the left upper area?"), ask("How many shapes are there?")], [[picture()], [picture(3)]])
    with torch.no_grad(): out = model.generate(**batch, generation_config=greedy(processor, 64))
    assert out.shape[1] - batch["input_ids"].shape[1] < 64

def test_generation_is_silent_and_repeatable(each, caplog, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.import_transformers() # its filters come last, so first
        first = generate_replies(*each, [ask("What?")], [[picture()]], max_new_tokens=5)
        eq(generate_replies(*each, [ask("What?")], [[picture()]], max_new_tokens=5), first)
    eq(caplog.text, ""); eq(capfd.readouterr(), ("", ""))

def test_generation_restores_the_mode(loaded):
    model, processor = loaded
    for training in (True, False):
        set_training(model, training)
        generate_replies(model, processor, [ask("What?")], [[picture()]], max_new_tokens=2)
        eq(model.training, training)

# -- answers that share an image: read once, and each as if it were alone

def scan(seed, wide, high):
    "Blocks of grey, of any size."
    import numpy as np
    from PIL import Image
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (7, 7), dtype=np.uint8)).resize((wide, high)).convert("RGB")

def crowd():
    "Prompts of every sort: long and short, no image to two, of four sizes, shared and repeated, in several turns, with words before the image."
    small, tall, wide, large = scan(0, 112, 112), scan(1, 56, 168), scan(2, 224, 84), scan(3, 400, 300)
    system, told = {"role": "system", "content": [{"type": "text", "text": "Be brief, and say only what can be seen."}]}, lambda *turns: [user_message(t, 1 - i) if not i % 2 else assistant_message(t) for i, t in enumerate(turns) if i < 2] + [user_message(t) for t in turns[2:]]
    return [(ask("What is this?"), [small]), (ask("Is there a circle in the left upper area of this image?"), [small]), (ask("Where?"), [tall]), (ask("Is it?"), [wide]), (ask("Describe it."), [large]), (ask("Describe it."), [small]),
        (ask("No image?", 0), []), (ask("What is a square, and what would you say if there were one?", 0), []), (ask("Compare.", 2), [small, wide]), (ask("Which one is larger?", 2), [wide, small]), (ask("Are they the same?", 2), [small, small]),
        (told("How many shapes?", "two", "Where?"), [large]), (told("How many shapes?", "three, I think", "Which colour are they?"), [large]), ([system, *ask("What?")], [small]),
        ([*told("First", "ok"), user_message("And this one?", 1)], [small, tall]), ([*told("First picture of the two", "ok"), user_message("And this one?", 1)], [small, large])]

@pytest.fixture(scope="module")
def alone(each):
    "What `model.generate` says to each of the crowd, asked by itself: the number of tokens -> replies."
    import torch
    model, processor = each
    def one(messages, images, n):
        batch = encode(processor, [messages], [images])
        with torch.no_grad(): out = model.generate(**batch, generation_config=greedy(processor, n, model.generation_config.eos_token_id))
        return processor.tokenizer.decode(out[0, batch["input_ids"].shape[1]:], skip_special_tokens=True).strip()
    return {n: [one(*row, n) for row in crowd()] for n in (1, 20)}

def step_by_step(model, processor, messages, images, n):
    "The likeliest token each time, by a whole forward pass without a cache. Returns the reply and the product of its softmax probabilities."
    import torch
    batch, said, chance = dict(encode(processor, [messages], [images])), [], 1.
    while len(said) < n and not (said and said[-1] in model.generation_config.eos_token_id):
        with torch.no_grad(): logits = model(**batch, use_cache=False).logits[0, -1].double()
        said.append(int(logits.argmax())); chance *= float(logits.softmax(-1).max())
        for key, more in (("input_ids", torch.tensor([[said[-1]]])), ("attention_mask", torch.ones(1, 1, dtype=torch.long)), ("mm_token_type_ids", torch.zeros(1, 1, dtype=torch.long))):
            if key in batch: batch[key] = torch.cat([batch[key], more], 1)
        if "cross_attention_mask" in batch: batch["cross_attention_mask"] = torch.cat([batch["cross_attention_mask"], batch["cross_attention_mask"][:, -1:]], 1)
    return processor.tokenizer.decode(said, skip_special_tokens=True).strip(), chance

@pytest.mark.parametrize("n", [1, 20])
def test_a_crowd_is_answered_as_one_by_one(each, alone, n):
    got = answer_prompts(*each, *zip(*crowd()), max_new_tokens=n)
    wrong = {i: (reply, want) for i, ((reply, _), want) in enumerate(zip(got, alone[n], strict=True)) if reply != want}
    assert not wrong and len(set(alone[n])) > 2, wrong

@settings(max_examples=12)
@given(st.data())
def test_the_company_and_its_order_change_nothing(each, alone, data):
    rows = crowd()
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=10))
    said = [reply for reply, _ in answer_prompts(*each, [rows[i][0] for i in picked], [rows[i][1] for i in picked], max_new_tokens=20)]
    eq(said, [alone[20][i] for i in picked])

@pytest.mark.parametrize("n", [1, 5])
def test_the_confidence_is_the_probability_of_the_whole_reply(each, n):
    rows = crowd()
    got = answer_prompts(*each, *zip(*rows), max_new_tokens=n)
    want = [step_by_step(*each, *row, n) for row in rows]
    wrong = {i: (a, b) for i, (a, b) in enumerate(zip(got, want, strict=True)) if a[0] != b[0] or abs(a[1] - b[1]) > 1e-3 or not 0 < a[1] <= 1}
    assert not wrong and len({round(p, 3) for _, p in want}) > 5, wrong

def test_a_longer_reply_is_less_probable_and_one_that_ended_stays_as_it_was(each):
    rows = crowd()
    short, long, longer = (answer_prompts(*each, *zip(*rows), max_new_tokens=n) for n in (1, 20, 60))
    assert all(a >= b - 1e-5 and b >= c - 1e-5 for (_, a), (_, b), (_, c) in zip(short, long, longer)) and any(a > b for (_, a), (_, b) in zip(short, long))
    ended = [(a, b) for (one, a), (other, b) in zip(long, longer) if one == other]
    assert ended and all(a == pytest.approx(b, abs=1e-5) for a, b in ended)

def test_an_image_is_read_once_however_many_ask_about_it(each, monkeypatch, tmp_path):
    read, see = [], models._see
    monkeypatch.setattr(models, "_see", lambda m, p, starts, pictures: read.append([len(row) for row in pictures]) or see(m, p, starts, pictures))
    one, other, words = scan(0, 112, 112), scan(1, 112, 112), ("What?", "Where is it?", "Is it?", "What is in the upper area?")
    want = answer_prompts(*each, [ask(w) for w in words], [[one], [other], [one], [one]], max_new_tokens=6)
    eq(read, [[1, 1]])
    one.save(tmp_path/"one.png"); other.save(tmp_path/"other.png")
    forms = [lambda f: f.read_bytes(), str, lambda f: f, lambda f: {"bytes": f.read_bytes(), "path": None}, lambda f: {"bytes": None, "path": str(f)}]
    for form in forms:
        read.clear()
        eq([r for r, _ in answer_prompts(*each, [ask(w) for w in words], [[form(tmp_path/f"{n}.png")] for n in ("one", "other", "one", "one")], max_new_tokens=6)], [r for r, _ in want])
        eq(read, [[1, 1]])

def test_answers_restore_the_mode_even_after_a_fault(each, monkeypatch):
    model, processor = each
    def fail(*_): raise RuntimeError("broke")
    for training in (True, False):
        set_training(model, training)
        answer_prompts(model, processor, [ask("What?")], [[picture()]], max_new_tokens=1); eq(model.training, training)
        answer_prompts(model, processor, [], []); eq(model.training, training)
        with monkeypatch.context() as patch:
            patch.setattr(models, "_write", fail)
            with pytest.raises(RuntimeError): answer_prompts(model, processor, [ask("What?")], [[picture()]])
        eq(model.training, training)

def test_no_prompts_no_answers(each):
    eq(answer_prompts(*each, [], []), [])
    with pytest.raises(MedchatError, match="do not match: 1 places, 0 images"): answer_prompts(*each, [ask("What?")], [[]])
    with pytest.raises(MedchatError, match="already holds the answer"): answer_prompts(*each, [ask("What?"), [*ask("What?"), assistant_message("it")]], [[picture()]]*2)

@every
def test_a_base_that_pads_with_its_end_token_is_refused(tmp_path, bases, name):
    folder = copy_base(tmp_path, bases[name])
    file = folder/"tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": FAMILIES[name].end_of_turn}))
    with pytest.raises(MedchatError, match="pads with its end token"): load_model(str(folder))

# -- processor files as they are found

SPOILT = { # what is wrong with a base's own template -> how to make it so
    "never closes a reply": lambda t, f: t.replace(f.end_of_turn, ""),
    "closes it with something else": lambda t, f: t.replace(f.end_of_turn, "<\\s> "),
    "is not there": lambda t, f: None,
    "is broken": lambda t, f: t + "{% if %}",
    "refuses a system message": lambda t, f: "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages with images') }}{% endif %}" + t,
    "drops the system message": lambda t, f: "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + t,
    "rewrites the past": lambda t, f: t + "{{ messages | length }}",
    "drops the image": lambda t, f: t.replace("<|vision_start|><|image_pad|><|vision_end|>", "").replace('"<|image|>" * images', '"" * images').replace('"<image>\\n" * images', '"" * images'),
    "writes the image after the text": lambda t, f: t.replace('{%- for part in message.content %}', '{%- for part in message.content | reverse %}').replace(
        '{{ "<|image|>" * images | length }}{% if', '{% if').replace('{{ text }}<|eot_id|>', '{{ text }}{{ "<|image|>" * images | length }}<|eot_id|>').replace(
        '{{ "<image>\\n" * images | length }}{{ ns.system }}', '{{ ns.system }}').replace('{{ text }} [/INST]', '{{ text }}{{ "<image>\\n" * images | length }} [/INST]'),
    "lacks the first token": lambda t, f: t.replace("{{ bos_token }}", "")}

@pytest.mark.parametrize("name, wrong", [(n, w) for n in TINY for w, spoil in SPOILT.items() if spoil(FAMILIES[n].template, FAMILIES[n]) != FAMILIES[n].template]) # Qwen2-VL has no first token
def test_a_template_that_does_not_fit_gets_the_family_s(each_processor, name, wrong):
    processor, family = each_processor[name], FAMILIES[name]
    processor.chat_template = SPOILT[wrong](family.template, family)
    assert models._settle_processor(processor, models.import_transformers().PretrainedConfig(), family).chat_template == family.template

@pytest.fixture
def each_processor(bases):
    "A processor of each family that may be spoilt; each tokenizer writes its first token by itself, as those of the real bases do."
    from tokenizers.processors import TemplateProcessing
    tf, found = models.import_transformers(), {}
    for name, folder in bases.items():
        found[name] = tf.AutoProcessor.from_pretrained(folder)
        t = found[name].tokenizer
        if t.bos_token: t._tokenizer.post_processor = TemplateProcessing(single=f"{t.bos_token} $A", special_tokens=[(t.bos_token, t.bos_token_id)])
    return found

@every
def test_a_template_that_fits_stays(each_processor, name):
    processor, family = each_processor[name], FAMILIES[name]
    own = processor.chat_template = "{# the base's own #}" + family.template.replace("You are a helpful assistant.", "Be of use.")
    eq(models._settle_processor(processor, models.import_transformers().PretrainedConfig(), family).chat_template, own)

def test_a_loaded_base_has_a_template_that_fits(tmp_path, bases):
    "The same, through the door: LLaVA-1.6's published template never writes the token at the beginning and ends replies with another."
    folder = copy_base(tmp_path, bases["llava-1.6"])
    (folder/"chat_template.jinja").write_text("{% for m in messages %}{% if m.role == 'user' %}[INST] {% for c in m.content %}{% if c.type == 'image' %}<image>\n{% endif %}{% endfor %}"
        "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %} [/INST]{% else %} {{ m.content[0].text }}<\\s> {% endif %}{% endfor %}")
    processor = load_model(str(folder))[1]
    eq(processor.chat_template, FAMILIES["llava-1.6"].template)
    ids = encode(processor, [ask("What?")], [[picture()]])["input_ids"][0].tolist()
    eq(ids.count(processor.tokenizer.bos_token_id), 1); eq(ids[0], processor.tokenizer.bos_token_id)

def as_in_2024(folder, **image_processor):
    "Split a processor's one file into those that transformers wrote until 2025."
    config = json.loads((folder/"processor_config.json").read_text())
    (folder/"preprocessor_config.json").write_text(json.dumps({**config["image_processor"], **image_processor, "processor_class": config["processor_class"]}))
    (folder/"processor_config.json").unlink()
    (folder/"chat_template.json").write_text(json.dumps({"chat_template": (folder/"chat_template.jinja").read_text()}))
    (folder/"chat_template.jinja").unlink()
    return folder

@pytest.mark.parametrize("left", ["nothing", "the class"])
def test_old_llava_files_insert_as_many_image_tokens_as_there_are_features(tmp_path, bases, left):
    "They lack patch_size and the rest: the processor would write one token for a whole image, or one too many."
    folder = as_in_2024(copy_base(tmp_path, bases["llava-1.6"]))
    if left == "the class": (folder/"processor_config.json").write_text('{"processor_class": "LlavaNextProcessor"}')
    model, processor = load_model(str(folder))
    eq((processor.patch_size, processor.vision_feature_select_strategy, processor.num_additional_image_tokens), (14, "default", 1))
    for images in ([picture()], [picture(side=60)], [picture().resize((150, 70))], [picture(), picture(side=50)]):
        batch = encode(processor, [ask("What?", len(images))], [images])
        features = model.model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output
        eq(int((batch["input_ids"] == processor.image_token_id).sum()), sum(map(len, features)))
    whole = load_model(bases["llava-1.6"])[1]
    eq(encode(whole, [ask("What?")], [[picture()]])["input_ids"].tolist(), encode(processor, [ask("What?")], [[picture()]])["input_ids"].tolist())

@pytest.mark.parametrize("size", [dict(size=None, min_pixels=3136, max_pixels=12845056), dict(size=dict(min_pixels=3136, max_pixels=12845056), min_pixels=3136, max_pixels=12845056),
    dict(size=dict(shortest_edge=3136, longest_edge=12845056))], ids=["at the top", "at the top and within", "today's"])
def test_pixels_are_capped_however_the_files_say_it(tmp_path, bases, size):
    folder = as_in_2024(copy_base(tmp_path, bases["qwen2-vl"]), **size)
    file = folder/"preprocessor_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if v is not None}))
    processor = load_model(str(folder))[1]
    n = int((encode(processor, [ask("What?")], [[picture(side=1024)]])["input_ids"] == processor.image_token_id).sum())
    assert 480 <= n <= 512, n
    n = int((encode(processor, [ask("What?")], [[picture(side=112)]])["input_ids"] == processor.image_token_id).sum())
    eq(n, 16)

def test_old_llama_files_load(tmp_path, bases):
    model, processor = load_model(str(as_in_2024(copy_base(tmp_path, bases["llama-3.2-vision"]))))
    now = load_model(bases["llama-3.2-vision"])
    eq(processor.chat_template, FAMILIES["llama-3.2-vision"].template)
    eq(generate_replies(model, processor, [ask("What?")], [[picture()]], 5), generate_replies(*now, [ask("What?")], [[picture()]], 5))

# -- LoRA

def lora_size(model, r):
    places = family_of(model.config).language
    return sum(r*(m.in_features + m.out_features) for n, m in model.named_modules() if "Linear" in type(m).__name__ and hasattr(m, "in_features") and n.startswith(places))

@every
def test_lora_has_the_size_it_should(bases, name):
    import torch
    family, (model, _) = FAMILIES[name], load_model(bases[name])
    expected, projector = lora_size(model, 8), sum(p.numel() for p in model.get_submodule(family.projector).parameters())
    model = add_lora(model, r=8)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    eq(sum(p.numel() for p in trainable.values()), expected + projector)
    assert all("lora_" in n and family.language in n or "modules_to_save" in n and family.projector in n for n in trainable)
    assert all(p.dtype == torch.float32 for p in trainable.values())
    eq(trained_parts(model), {"LoRA": expected, "projector": projector, "all": sum(p.numel() for p in load_model(bases[name], load_in_4bit=False)[0].parameters()) + expected})

@every
@pytest.mark.parametrize("choice, lora, projector", [(dict(language_layers=False), False, True), (dict(projector=False), True, False), (dict(language_layers=False, vision_layers=True, projector=False), True, False)],
    ids=["projector only", "LoRA only", "vision only"])
def test_only_what_was_asked_for_is_trained(bases, name, choice, lora, projector):
    parts = trained_parts(model := add_lora(load_model(bases[name])[0], **choice))
    eq((parts["LoRA"] > 0, parts["projector"] > 0), (lora, projector))
    if choice.get("vision_layers"): assert all(any(v in n for v in FAMILIES[name].vision) for n, p in model.named_parameters() if p.requires_grad)

def test_training_nothing_is_refused(loaded):
    with pytest.raises(MedchatError, match="nothing to train"): add_lora(loaded[0], language_layers=False, projector=False)

@every
def test_lora_starts_the_same_for_one_seed_and_changes_nothing_at_first(bases, name):
    import torch
    states = []
    for seed in (1, 1, 2):
        model, processor = load_model(bases[name])
        before = generate_replies(model, processor, [ask("What?")], [[picture()]], max_new_tokens=6)
        model = add_lora(model, seed=seed, vision_layers=True)
        eq(generate_replies(model, processor, [ask("What?")], [[picture()]], max_new_tokens=6), before)
        states.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])

# -- adapters

def shaken(model):
    "The same, with everything that is trained moved a little."
    import torch
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad: p.data += .05*torch.randn_like(p)
    return model.eval()

def logits(model, processor):
    import torch
    with torch.inference_mode(): return model(**encode(processor, [ask("What is in the left upper area?")], [[picture()]])).logits

WAYS = {"LoRA + projector": dict(), "projector only": dict(language_layers=False), "LoRA only": dict(projector=False), "everything": dict(vision_layers=True)}

@every
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_comes_back_to_the_same_numbers(bases, name, way, tmp_path):
    import torch
    from safetensors import safe_open
    base, processor = load_model(bases[name])
    untouched = logits(base, processor)
    model = shaken(add_lora(base, r=4, **WAYS[way]))
    before = logits(model, processor)
    model.save_pretrained(tmp_path/"run"/"adapter", save_embedding_layers=False)
    tuned = load_adapter(load_model(bases[name])[0], tmp_path/"run"/"adapter")
    assert torch.equal(logits(tuned.eval(), processor), before) and (before - untouched).abs().max() > 1e-3
    with safe_open(str(tmp_path/"run"/"adapter"/"adapter_model.safetensors"), "pt") as f: keys = set(f.keys())
    lora, projector = {k for k in keys if "lora_" in k}, {k for k in keys if FAMILIES[name].projector + "." in k}
    eq(lora | projector, keys); eq((bool(lora), bool(projector)), (way != "projector only", way != "LoRA only"))
    eq(sum(p.requires_grad for p in tuned.parameters()), 0)

MISSING = "does not fit its base: a key is missing. First: .*{projector}"

@every
@pytest.mark.parametrize("way, spoil, says", [("LoRA + projector", "lose", MISSING), ("LoRA + projector", "lose all", MISSING), ("projector only", "lose all", MISSING), ("projector only", "rename", MISSING),
    ("LoRA + projector", "shrink", "cannot load the adapter"), ("LoRA + projector", "add", "does not fit its base: 0 keys missing, 1 left over")])
def test_a_projector_that_does_not_fit_is_refused(bases, name, way, spoil, says, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file
    model, family = add_lora(load_model(bases[name])[0], r=4, **WAYS[way]), FAMILIES[name]
    model.save_pretrained(tmp_path/"run"/"adapter", save_embedding_layers=False)
    file = tmp_path/"run"/"adapter"/"adapter_model.safetensors"
    weights = load_file(file)
    mine = sorted(k for k in weights if family.projector + "." in k)
    if spoil == "lose": del weights[mine[0]]
    if spoil == "lose all": weights = {k: v for k, v in weights.items() if k not in mine}
    if spoil == "rename": weights = {k.replace(family.projector, family.projector.removeprefix("model.")) if k in mine else k: v for k, v in weights.items()}
    if spoil == "shrink": weights[mine[0]] = weights[mine[0]][:-1].contiguous()
    if spoil == "add": weights[mine[0] + "er"] = torch.zeros(3)
    save_file(weights, file)
    with pytest.raises(MedchatError, match=says.format(projector=family.projector)) as e: load_adapter(load_model(bases[name])[0], file.parent)
    assert "\n" not in str(e.value)

# -- runs

@pytest.fixture
def run(tmp_path):
    folder = tmp_path/"run"
    model, processor = load_model(BASE)
    model = add_lora(model)
    model.save_pretrained(folder/"adapter", save_embedding_layers=False); processor.save_pretrained(folder/"adapter")
    (folder/"config.json").write_text(json.dumps(dict(medchat="0", base=BASE, base_sha256=base_hash(resolve_base(BASE)), load_in_4bit=True)))
    return folder

def test_a_run_loads_with_its_adapter(run):
    import torch
    from safetensors.torch import load_file, save_file
    file = run/"adapter"/"adapter_model.safetensors"
    weights = load_file(file)
    save_file({k: torch.full_like(v, .01) for k, v in weights.items()}, file)
    model, processor = load_run(run)
    assert all((p == .01).all() for n, p in model.named_parameters() if "lora_" in n)
    assert not model.training and not any(p.requires_grad for n, p in model.named_parameters())
    base, _ = load_run(run, with_adapter=False)
    assert not any("lora_" in n for n, _ in base.named_parameters())

@pytest.mark.parametrize("make", [lambda d: d/"missing", lambda d: d, lambda d: (d/"file").write_text("x") and d/"file",
    lambda d: (d/"config.json").write_text('["a"]') and d, lambda d: (d/"config.json").write_text('{"model_type": "qwen2_vl"}') and d, lambda d: (d/"config.json").write_bytes(b"\xff\xfe") and d],
    ids=["missing", "empty", "file", "list", "a base", "not text"])
def test_what_is_not_a_run_is_refused(tmp_path, make):
    with pytest.raises(MedchatError, match="not a run folder.*medchat train"): load_run(make(tmp_path))

def spoil_keys(run, change):
    from safetensors.torch import load_file, save_file
    file = run/"adapter"/"adapter_model.safetensors"
    save_file({k2: v for k, v in load_file(file).items() if (k2 := change(k))}, file)

@pytest.mark.parametrize("spoil, says", [
    (lambda r: shutil.rmtree(r/"adapter"), "no adapter yet.*--resume"),
    (lambda r: (r/"adapter"/"adapter_model.safetensors").write_bytes(b"junk"), "cannot load the adapter"),
    (lambda r: (r/"adapter"/"adapter_config.json").unlink(), "cannot load the adapter"),
    (lambda r: (r/"adapter"/"adapter_config.json").write_text("{"), "cannot load the adapter"),
    (lambda r: spoil_keys(r, lambda k: k.replace("language_model.", "")), "does not fit its base: 56 keys missing, 56 left over"),
    (lambda r: spoil_keys(r, lambda k: None if "layers.0.self_attn.q_proj.lora_A" in k else k), "1 keys missing, 0 left over"),
    (lambda r: spoil_keys(r, lambda k: k if "layers.0" in k else k + "x"), "does not fit its base"),
    (lambda r: (r/"config.json").write_text((r/"config.json").read_text().replace('"base_sha256": "', '"base_sha256": "0')), "not the one this run was trained on"),
    (lambda r: (r/"config.json").write_text(json.dumps({**json.loads((r/"config.json").read_text()), "base": "tiny-gone"})), "no such tiny base")],
    ids=["no adapter", "junk", "no config", "config not JSON", "renamed keys", "a key missing", "keys left over", "another base", "base gone"])
def test_spoilt_runs_are_one_line(run, spoil, says):
    spoil(run)
    with warnings.catch_warnings(record=True) as seen:
        with pytest.raises(MedchatError, match=says) as e: load_run(run)
    assert "\n" not in str(e.value) and not seen

def test_an_adapter_of_another_rank_is_refused(run):
    file = run/"adapter"/"adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 4}))
    with pytest.raises(MedchatError, match="cannot load the adapter"): load_run(run)

# -- the unsloth backend, which needs a GPU: here only that we call it as it wants to be called

@pytest.fixture
def fake_unsloth(monkeypatch):
    calls = []
    class FastVisionModel:
        from_pretrained = staticmethod(lambda name, **kw: calls.append(("from_pretrained", kw)) or models._load_transformers(name, models.FAMILIES["qwen2-vl"], True, "cpu"))
        get_peft_model = staticmethod(lambda model, **kw: calls.append(("get_peft_model", kw)) or model)
        for_training = staticmethod(lambda model: calls.append(("for_training", {})))
        for_inference = staticmethod(lambda model: calls.append(("for_inference", {})))
    monkeypatch.setitem(sys.modules, "unsloth", types.SimpleNamespace(FastVisionModel=FastVisionModel))
    monkeypatch.setattr(models, "choose_backend", lambda: models.Backend("unsloth", "cuda", "a fake"))
    return calls

def test_unsloth_is_called_with_arguments_it_has(fake_unsloth):
    model, _ = load_model(BASE, for_training=True)
    add_lora(model, r=8, vision_layers=True)
    eq([name for name, _ in fake_unsloth], ["from_pretrained", "for_training", "get_peft_model"])
    eq(fake_unsloth[0][1]["trust_remote_code"], False)
    given = fake_unsloth[2][1]
    eq((given["modules_to_save"], given["r"]), ([FAMILIES["qwen2-vl"].projector], 8)); assert "visual" in given["target_modules"]
    spec = Path(sys.prefix)/"lib"/f"python{sys.version_info[0]}.{sys.version_info[1]}"/"site-packages"/"unsloth"/"models"/"vision.py"
    if not spec.is_file(): pytest.skip("unsloth is not installed")
    tree = ast.parse(spec.read_text())
    for name, given in fake_unsloth:
        function = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
        known = {a.arg for a in function.args.args + function.args.kwonlyargs}
        assert set(given) <= known, (name, set(given) - known)

def test_the_projector_alone_is_trained_by_peft(fake_unsloth):
    "Unsloth's way to add LoRA has no word for no layers at all."
    model, _ = load_model(BASE, for_training=True)
    parts = trained_parts(add_lora(model, language_layers=False))
    eq([name for name, _ in fake_unsloth], ["from_pretrained", "for_training"])
    assert parts["LoRA"] == 0 < parts["projector"]

def test_without_the_projector_unsloth_is_not_asked_for_it(fake_unsloth):
    add_lora(load_model(BASE)[0], projector=False)
    eq(fake_unsloth[-1][0], "get_peft_model"); eq(fake_unsloth[-1][1]["modules_to_save"], None)

def test_without_a_gpu_unsloth_is_not_imported():
    import torch
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    load_model(BASE)
    assert "unsloth" not in sys.modules
