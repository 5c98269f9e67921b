"Sizes and memory: the real models' shapes without their weights, and advice before training."
import re
from functools import lru_cache
from pathlib import Path
import pytest
from fastcore.test import test_eq as eq
from medchat import memory
from medchat.core import MedchatError, sample_data
from medchat.families import FAMILIES
from medchat.memory import base_sizes, doctor, estimate_memory, free_memory, memory_advice, meta_model
from medchat.models import choose_backend, load_model

BASE = "tiny-qwen2-vl"
REAL = {f.name: f.default_base for f in FAMILIES.values()}
SHIPPED = [f.tiny_base for f in FAMILIES.values() if f.tiny_base and (sample_data()/f.tiny_base).is_dir()]
TINY = [f.name for f in FAMILIES.values() if f.tiny_base]
sizes_of = lru_cache(base_sizes)
def total(sizes, device="cuda", *a, **k): return sum(estimate_memory(sizes, device, *a, **k).values())

@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    "Whoever asks the Hub for a file fails its test; a look into the cache is no question to the Hub."
    import huggingface_hub
    look = huggingface_hub.snapshot_download
    def download(name, *a, local_files_only=False, **k):
        if not local_files_only: pytest.fail(f"{name} would be downloaded")
        return look(name, *a, local_files_only=True, **k)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

@pytest.fixture
def known(monkeypatch):
    "Sizes that were looked up are not looked up again."
    monkeypatch.setattr(memory, "base_sizes", sizes_of)

# ---- sizes

@pytest.mark.parametrize("name, lora, projector, billions", [("llama-3.2-vision", 52_428_800, 31_461_376, 10.67), ("llava-1.6", 41_943_040, 20_979_712, 7.57), ("qwen2-vl", 18_464_768, 34_087_936, 2.21)])
def test_the_default_lora_has_the_published_size(name, lora, projector, billions):
    "r=16, language layers, attention + MLP, as the published comparison of the three counts them; the projector on top."
    s = sizes_of(REAL[name])
    eq(s["LoRA"], lora)
    assert abs(s["total"]/1e9 - billions) < .006, s["total"]
    eq(s["projector"], projector)

@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_add_up(name):
    s, model, f = sizes_of(REAL[name]), meta_model(REAL[name]), FAMILIES[name]
    eq(s["total"], sum(p.numel() for p in model.parameters())); eq(s["quantised"] + s["full"], s["total"])
    eq(s["projector"], sum(p.numel() for p in model.get_submodule(f.projector).parameters()))
    assert all(p.device.type == "meta" for p in model.parameters())
    assert .5 < s["quantised"]/s["total"] < 1 and 0 < s["LoRA"] < .02*s["total"]

@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_follow_the_options(name):
    s = sizes_of(REAL[name])
    half, more, alone = (sizes_of(REAL[name], **o) for o in (dict(r=8, projector=False), dict(vision_layers=True), dict(language_layers=False)))
    eq((2*half["LoRA"], half["projector"]), (s["LoRA"], 0))
    assert more["LoRA"] > s["LoRA"]
    eq((alone["LoRA"], alone["projector"]), (0, s["projector"])) # the first stage
    eq({x["total"] for x in (s, half, more, alone)}, {s["total"]})

def test_the_copies_of_unsloth_are_the_makers_models():
    for f in FAMILIES.values():
        groups = {}
        for base, config in f.configs.items(): groups.setdefault(base.rsplit("/", 1)[1].removesuffix("-bnb-4bit").lower(), []).append(config)
        for configs in groups.values(): assert len(configs) > 1 and all(c == configs[0] for c in configs)

@pytest.mark.parametrize("name", TINY)
def test_sizes_are_those_of_the_loaded_model(bases, name):
    "Of the shapes on the meta device, and of what really lies at 4 bits."
    s, f = sizes_of(bases[name]), FAMILIES[name]
    whole, small = load_model(bases[name], load_in_4bit=False)[0], load_model(bases[name])[0]
    eq(s["total"], sum(p.numel() for p in whole.parameters()))
    eq(s["quantised"], sum(m.weight.numel() for n, m in whole.named_modules() if re.search(r"language_model\.layers.*proj$", n)))
    packed = {n: m for n, m in small.named_modules() if type(m).__name__ == "Linear4bit"}
    eq(s["quantised"], sum(m.in_features*m.out_features for m in packed.values()))
    eq({n: p.shape for n, p in meta_model(bases[name]).named_parameters()}, {n: p.shape for n, p in whole.named_parameters()})
    state = lambda w: w.numel()*w.element_size() + w.quant_state.absmax.numel()*w.quant_state.absmax.element_size()
    stored = sum(state(m.weight) for m in packed.values()) + sum(p.numel()*p.element_size() for p in small.parameters() if not hasattr(p, "quant_state"))
    assert abs(estimate_memory(s, "cpu")["weights"]*1e9/stored - 1) < .03, (estimate_memory(s, "cpu")["weights"]*1e9, stored)

def test_a_model_without_weights_takes_no_memory():
    import psutil
    before = psutil.Process().memory_info().rss
    meta_model(REAL["llama-3.2-vision"])
    assert psutil.Process().memory_info().rss - before < 3e8

@pytest.mark.parametrize("base", ["someone/else", "tiny", "no such/base", "./nowhere"])
def test_an_unknown_base_is_one_line(base):
    for ask in (meta_model, base_sizes, doctor):
        with pytest.raises(MedchatError, match="size of this base is not known.*Known: unsloth/Qwen2-VL-2B-Instruct-bnb-4bit") as e: ask(base)
        assert "\n" not in str(e.value)
    with pytest.raises(MedchatError, match="no such tiny base"): base_sizes("tiny-none")

def test_a_base_of_another_family_is_refused(tmp_path):
    (tmp_path/"config.json").write_text('{"model_type": "bert"}'); (tmp_path/"model.safetensors").write_bytes(b"")
    with pytest.raises(MedchatError, match="unknown model family: bert"): base_sizes(str(tmp_path))

def test_shapes_are_counted_before_they_were_packed(tmp_path, bases):
    "A base that was stored at 4 bits says so in its configuration; its sizes are those of its layers, all the same."
    import json
    config = json.loads((Path(bases["llava-1.6"])/"config.json").read_text())
    (tmp_path/"config.json").write_text(json.dumps({**config, "quantization_config": dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")}))
    (tmp_path/"model.safetensors").write_bytes(b"")
    eq(base_sizes(str(tmp_path)), sizes_of(bases["llava-1.6"]))

def test_where_unsloth_is_a_model_without_weights_is_none_of_its_business(monkeypatch):
    import sys, types
    monkeypatch.setitem(sys.modules, "unsloth", types.SimpleNamespace()) # has nothing that could be called
    eq(base_sizes(BASE)["LoRA"], sizes_of(BASE)["LoRA"])

# ---- memory

def test_the_11b_fits_16_gb_at_a_batch_of_2():
    s = sizes_of(REAL["llama-3.2-vision"])
    assert 8 < total(s, batch_size=2) < 16 and total(s, batch_size=2, tokens=512) < 16
    assert memory_advice(s, "cuda", 2, 4, 512, 15.8).startswith("fits") # what a T4 has

def test_estimates_grow_with_everything():
    s = sizes_of(REAL["qwen2-vl"])
    assert total(s) < total(s, tokens=5000) < total(s, tokens=50000) and total(s) < total(s, batch_size=3) and total(s) < total(s, "cpu")
    assert total(s) < total(sizes_of("unsloth/Qwen2-VL-7B-Instruct-bnb-4bit")) and total(s) < total(sizes_of(REAL["qwen2-vl"], r=64)) and total(sizes_of(REAL["qwen2-vl"], projector=False)) < total(s)
    order = [total(sizes_of(REAL[n])) for n in ("qwen2-vl", "qwen2.5-vl", "llava-1.6", "llama-3.2-vision")]
    eq(order, sorted(order))
    for name in FAMILIES: assert all(v > 0 for v in estimate_memory(sizes_of(REAL[name])).values())
    eq(estimate_memory(s), estimate_memory(s, "cuda", 2, FAMILIES["qwen2-vl"].image_tokens + 128)) # a whole image, where nobody says how long

def test_what_is_read_beside_the_words_costs_too():
    s = sizes_of(REAL["llama-3.2-vision"])
    assert s["image_states"] == 6404 and total(s) > total({**s, "image_states": 0}) + .1

@pytest.fixture(scope="module")
def eleven(): return sizes_of(REAL["llama-3.2-vision"])

@pytest.mark.parametrize("free, batch, accumulation, says", [
    (80, 2, 4, r"fits: training needs about \d+\.\d GB, 80.0 GB are free$"),
    (16, 64, 1, r"may not fit: .* 16.0 GB are free. Would fit: --batch-size \d+ --gradient-accumulation \d+$"),
    (6, 4, 1, r"will not fit: .* GB with one conversation at a time. Would fit: --base unsloth/Qwen2-VL-2B-Instruct-bnb-4bit$"),
    (.5, 4, 1, r"will not fit: .* Use a tiny base: --base tiny-qwen2-vl$")])
def test_advice(known, eleven, free, batch, accumulation, says):
    line = memory_advice(eleven, "cuda", batch, accumulation, 400, free)
    assert re.match(says, line) and "\n" not in line, line

def test_advice_is_the_largest_batch_that_fits_and_the_step_stays_at_least_as_large(eleven):
    for free in (12.5, 14, 16, 20):
        if not (found := re.search(r"--batch-size (\d+) --gradient-accumulation (\d+)", memory_advice(eleven, "cuda", 24, 3, 400, free))): continue
        batch, accumulation = map(int, found.groups())
        assert total(eleven, "cuda", batch, 400) < free <= total(eleven, "cuda", batch + 1, 400)
        assert batch*accumulation >= 72 > batch*(accumulation - 1)
    assert re.search("--batch-size", memory_advice(eleven, "cuda", 24, 3, 400, 14))

def test_what_is_free_is_what_the_machine_says():
    import psutil
    assert 0 < free_memory() <= psutil.virtual_memory().total/1e9

# ---- the doctor

def test_the_doctor_says_what_matters_and_no_more(capsys, monkeypatch, known):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    rows = doctor()
    out = capsys.readouterr().out
    eq(len(out.splitlines()), len(rows))
    for word in ("backend", "torch", "memory", "disk", "cores", *REAL.values(), *SHIPPED): assert word in out, word
    assert "hf_secret" not in out and str(Path.home()) not in out and str(sample_data()) not in out
    assert rows[BASE].startswith("fits") and choose_backend().why in rows["backend"]
    assert "52,428,800 in LoRA" in rows[REAL["llama-3.2-vision"]]
    if choose_backend().device == "cpu": assert all("too slow to train without a GPU" in rows[b] for b in REAL.values()) and "too slow" not in rows[BASE]

def test_the_doctor_judges_one_base(capsys):
    rows = doctor(BASE)
    assert "unsloth/" not in "".join(rows) and rows[BASE].startswith("fits")

def test_the_doctor_knows_when_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1.2)
    rows = doctor(REAL["llama-3.2-vision"])
    assert rows[REAL["llama-3.2-vision"]].startswith("does not fit") and "1.2 GB are free" in rows[REAL["llama-3.2-vision"]]
