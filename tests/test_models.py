"Loading, encoding, answering, adapters: faults and edges."
import ast, json, os, re, shutil, subprocess, sys, types, warnings
from importlib.util import find_spec
from pathlib import Path
import pytest
from fastcore.test import test_eq as eq
from medchat import models
from medchat.core import MedchatError, sample_data
from medchat.messages import assistant_message, user_message
from medchat.models import (add_lora, base_hash, base_sizes, choose_backend, doctor, encode, estimate_memory, generate_replies, greedy, load_adapter,
    load_model, load_run, resolve_base, set_training)

BASE = "tiny-qwen2-vl"

@pytest.fixture(scope="module")
def loaded(): return load_model(BASE)

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

def copy_base(tmp_path):
    folder = tmp_path/"base"
    shutil.copytree(resolve_base(BASE), folder)
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

def test_a_base_with_a_missing_tensor_is_refused_not_filled_with_noise(tmp_path):
    from safetensors.torch import load_file, save_file
    folder = copy_base(tmp_path)
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

def test_language_layers_are_at_4_bits_and_nothing_else(loaded):
    for name, module in loaded[0].named_modules():
        if hasattr(module, "weight") and "Linear" in type(module).__name__:
            eq(type(module).__name__ == "Linear4bit", name.startswith("model.language_model.layers."))

def gradients(model, processor):
    import torch
    batch = encode(processor, [ask("What is this?") + [assistant_message("a nodule")]], [[picture()]], add_generation_prompt=False, padding_side="right")
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}

def test_evaluate_then_train_has_the_same_gradients():
    import torch
    found = []
    for evaluate_first in (False, True):
        model, processor = load_model(BASE, for_training=True)
        model = add_lora(model, vision_layers=True)
        if evaluate_first: generate_replies(model, processor, [ask("What?")], [[picture()]], max_new_tokens=3)
        assert model.training
        found.append(gradients(model, processor))
    eq(set(found[0]), {n for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert any(g.abs().sum() > 0 for n, g in found[0].items() if "visual" in n) and any(g.abs().sum() > 0 for n, g in found[0].items() if "q_proj" in n)

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

def test_no_compiled_code_is_fetched_while_loading(tmp_path):
    "On some CPUs bitsandbytes asks the package `kernels` for code from the Hub, at import."
    (tmp_path/"kernels.py").write_text(f"def get_kernel(*a, **k): open({str(tmp_path/'fetched')!r}, 'w')")
    code = "import sys\nfrom medchat.models import load_model\nload_model('tiny-qwen2-vl')\nassert 'bitsandbytes' in sys.modules\nimport kernels; print(kernels.get_kernel)"
    env = {**os.environ, "PYTHONPATH": f"{Path(models.__file__).parent.parent}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    eq((done.returncode, done.stderr), (0, "")); assert "get_kernel" in done.stdout
    assert not (tmp_path/"fetched").exists()

# -- encode

def test_padding_side_is_what_was_asked_every_time(loaded):
    _, processor = loaded
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
    from medchat.families import FAMILIES
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

def test_rows_with_no_one_and_two_images_in_one_batch(loaded):
    model, processor = loaded
    messages, images = [ask("No image?", 0), ask("One?", 1), ask("Two?", 2)], [[], [picture(1)], [picture(1), picture(2, side=84)]]
    together = generate_replies(model, processor, messages, images, max_new_tokens=8)
    eq(together, [generate_replies(model, processor, [m], [i], max_new_tokens=8)[0] for m, i in zip(messages, images)])

def test_batch_equals_single(loaded):
    model, processor = loaded
    questions = [ask(q) for q in ("What is in the left upper area?", "Is there a circle?", "Where?", "Describe the image and everything that you can see in it.")]
    images = [[picture(i, side=56 + 28*i)] for i in range(4)]
    together = generate_replies(model, processor, questions, images, max_new_tokens=16)
    eq(together, [generate_replies(model, processor, [q], [i], max_new_tokens=16)[0] for q, i in zip(questions, images)])

def test_images_may_come_in_any_form(loaded, tmp_path):
    _, processor = loaded
    picture().save(tmp_path/"x.png")
    data = (tmp_path/"x.png").read_bytes()
    forms = [tmp_path/"x.png", str(tmp_path/"x.png"), data, picture(), {"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path/"x.png")}]
    first, *rest = [encode(processor, [ask("What?")], [[f]])["pixel_values"] for f in forms]
    assert all((r == first).all() for r in rest)

def test_mismatched_and_broken_images_are_refused(loaded):
    _, processor = loaded
    with pytest.raises(MedchatError, match="do not match: 1 places, 0 images"): encode(processor, [ask("What?")], [[]])
    with pytest.raises(MedchatError, match="do not match: 0 places, 1 images"): encode(processor, [ask("What?", 0)], [[picture()]])
    with pytest.raises(MedchatError): encode(processor, [ask("What?")], [[b"junk"]])

def test_dataset_rows_and_fresh_messages_give_the_same_tensors(loaded):
    "Arrow hands parts back with every key, None where there is nothing."
    _, processor = loaded
    plain = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert (encode(processor, [plain], [[picture()]])["input_ids"] == encode(processor, [ask("What?")], [[picture()]])["input_ids"]).all()

# -- answering

def test_an_answer_in_the_prompt_is_refused(loaded):
    with pytest.raises(MedchatError, match="already holds the answer"):
        generate_replies(*loaded, [ask("What?") + [assistant_message("a nodule")]], [[picture()]])

def test_replies_end_at_the_end_token(loaded, monkeypatch):
    import torch
    model, processor = loaded
    batch = encode(processor, [ask("What?")], [[picture()]])
    with torch.no_grad(): out = model.generate(**batch, generation_config=greedy(processor, 6))
    fresh = out[0, batch["input_ids"].shape[1]:].tolist()
    ends = greedy(processor, 6, model.generation_config.eos_token_id).eos_token_id
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in ends and processor.tokenizer.pad_token_id not in [processor.tokenizer.eos_token_id]
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

def test_generation_is_silent_and_repeatable(loaded, caplog, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = generate_replies(*loaded, [ask("What?")], [[picture()]], max_new_tokens=5)
        eq(generate_replies(*loaded, [ask("What?")], [[picture()]], max_new_tokens=5), first)
    eq(caplog.text, ""); eq(capfd.readouterr(), ("", ""))

def test_generation_restores_the_mode(loaded):
    model, processor = loaded
    for training in (True, False):
        set_training(model, training)
        generate_replies(model, processor, [ask("What?")], [[picture()]], max_new_tokens=2)
        eq(model.training, training)

def test_a_base_that_pads_with_its_end_token_is_refused(tmp_path):
    folder = copy_base(tmp_path)
    file = folder/"tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": "<|im_end|>"}))
    with pytest.raises(MedchatError, match="pads with its end token"): load_model(str(folder))

# -- LoRA

def lora_size(model, r):
    import torch
    return sum(r*(m.in_features + m.out_features) for n, m in model.named_modules() if "Linear" in type(m).__name__ and hasattr(m, "in_features") and re.search(r"language_model\.layers", n))

def test_lora_has_the_size_it_should(loaded):
    model, _ = load_model(BASE)
    expected = lora_size(model, 8)
    model = add_lora(model, r=8)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    eq(sum(p.numel() for p in trainable.values()), expected)
    assert all("lora_" in n and "visual" not in n for n in trainable)
    import torch
    assert all(p.dtype == torch.float32 for p in trainable.values())

def test_lora_starts_the_same_for_one_seed_and_changes_nothing_at_first(loaded):
    import torch
    states = []
    for seed in (1, 1, 2):
        model, processor = load_model(BASE)
        before = generate_replies(model, processor, [ask("What?")], [[picture()]], max_new_tokens=6)
        model = add_lora(model, seed=seed, vision_layers=True)
        eq(generate_replies(model, processor, [ask("What?")], [[picture()]], max_new_tokens=6), before)
        states.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])

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

# -- doctor

def test_the_doctor_says_what_matters_and_no_more(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    rows = doctor()
    out = capsys.readouterr().out
    eq(len(out.splitlines()), len(rows))
    for word in ("backend", "torch", "memory", "disk", "cores", BASE, "unsloth/Qwen2-VL-2B-Instruct-bnb-4bit"): assert word in out
    assert "hf_secret" not in out and str(Path.home()) not in out and str(sample_data()) not in out
    assert "fits" in rows[BASE] and choose_backend().why in rows["backend"]

def test_the_doctor_refuses_what_it_cannot_know(monkeypatch):
    with pytest.raises(MedchatError, match="size of this base is not known"): doctor("someone/else")
    with pytest.raises(MedchatError, match="no such tiny base"): doctor("tiny-none")

def test_sizes_are_those_of_the_model(loaded):
    sizes = base_sizes(BASE)
    model, _ = load_model(BASE, load_in_4bit=False)
    inside = sum(m.weight.numel() for n, m in model.named_modules() if re.search(r"language_model\.layers.*proj$", n))
    eq(sizes["quantised"], inside)
    eq(sizes["quantised"] + sizes["full"], sum(p.numel() for p in model.parameters()))

def test_estimates_grow_with_everything():
    sizes = base_sizes("unsloth/Qwen2-VL-2B-Instruct-bnb-4bit")
    total = lambda s=sizes, **k: sum(estimate_memory(s, **k).values())
    assert total() < total(tokens=5000) < total(tokens=50000) and total() < total(r=256) and total() < total(device="cpu")
    assert total() < total(base_sizes("unsloth/Qwen2-VL-7B-Instruct-bnb-4bit"))

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
    spec = Path(sys.prefix)/"lib"/f"python{sys.version_info[0]}.{sys.version_info[1]}"/"site-packages"/"unsloth"/"models"/"vision.py"
    if not spec.is_file(): pytest.skip("unsloth is not installed")
    tree = ast.parse(spec.read_text())
    for name, given in fake_unsloth:
        function = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
        known = {a.arg for a in function.args.args + function.args.kwonlyargs}
        assert set(given) <= known, (name, set(given) - known)

def test_without_a_gpu_unsloth_is_not_imported():
    import torch
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    load_model(BASE)
    assert "unsloth" not in sys.modules
