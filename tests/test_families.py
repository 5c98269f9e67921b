"The table of families, checked against a model of each: the published ones without weights, the tiny ones with them."
import ast, io, re, tokenize
from functools import lru_cache
from pathlib import Path
import pytest
from fastcore.test import test_eq as eq
import medchat
from medchat.core import MedchatError
from medchat.families import FAMILIES, family_of, lora_targets

CHOICES = [dict(language_layers=l, vision_layers=v, attention=a, mlp=m) for l in (True, False) for v in (True, False)
           for a in (True, False) for m in (True, False) if (l or v) and (a or m)]
TINY = [f.name for f in FAMILIES.values() if f.tiny_base]

@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request): return FAMILIES[request.param]

@lru_cache
def meta(base):
    from medchat.memory import meta_model
    return meta_model(base)

@pytest.fixture(scope="module", params=[f"{n}/{kind}" for n, f in FAMILIES.items() for kind in ("published", "tiny") if kind == "published" or f.tiny_base])
def built(request, bases):
    "A family and the architecture of one of its bases."
    name, kind = request.param.split("/")
    return FAMILIES[name], meta(FAMILIES[name].default_base if kind == "published" else bases[name])

@lru_cache
def processor_of(folder):
    from medchat.models import import_transformers
    return import_transformers().AutoProcessor.from_pretrained(folder)

def chosen(model, family, **choice):
    return {n for n, _ in model.named_modules() if re.fullmatch(lora_targets(family, **choice), n)}

# ---- the entries

def test_every_field_is_filled(family):
    may_be_empty = dict(tiny_base=None, max_pixels=None, image_states=0, mixes=False)
    for name, value in vars(family).items():
        if not value: assert name in may_be_empty and value == may_be_empty[name] and type(value) is type(may_be_empty[name]), f"{family.name}.{name} is empty"
    for name in ("masked_tokens", "vision", "full_precision", "served_by"): assert isinstance(getattr(family, name), tuple), name # a lone string would be taken letter by letter
    assert set(family.attention) == set(family.mlp) == {"language", "vision"}
    assert all(isinstance(names, tuple) for names in (*family.attention.values(), *family.mlp.values()))
    assert family.default_base in family.configs and all("/" in base for base in family.configs)

def test_the_default_bases_are_those_that_were_promised():
    eq([FAMILIES[n].default_base for n in ("llama-3.2-vision", "qwen2-vl", "llava-1.6")],
       ["unsloth/Llama-3.2-11B-Vision-Instruct-bnb-4bit", "unsloth/Qwen2-VL-2B-Instruct-bnb-4bit", "unsloth/llava-v1.6-mistral-7b-hf-bnb-4bit"])
    eq([FAMILIES[n].tiny_base for n in ("llama-3.2-vision", "qwen2-vl", "llava-1.6")], ["tiny-llama-3.2-vision", "tiny-qwen2-vl", "tiny-llava-1.6"])

def test_no_two_families_share_a_name_a_type_or_a_base():
    for key in (lambda f: [f.name], lambda f: [f.model_type], lambda f: [f.tiny_base] if f.tiny_base else [], lambda f: list(f.configs)):
        seen = [x for f in FAMILIES.values() for x in key(f)]
        eq(len(seen), len(set(seen)))
    eq(list(FAMILIES), [f.name for f in FAMILIES.values()])

def test_only_what_was_tried_is_said_to_serve_it():
    "facts of the programs: no llama.cpp and no vLLM for Llama-3.2-Vision; llama.cpp answers differently from LLaVA-1.6."
    eq({n: set(f.served_by) for n, f in FAMILIES.items() if f.tiny_base}, {"qwen2-vl": {"transformers", "vllm", "llama.cpp"}, "llama-3.2-vision": {"transformers"}, "llava-1.6": {"transformers", "vllm"}})

# ---- against the models

def test_prefixes_are_those_of_the_model(built):
    family, model = built
    names = [n for n, _ in model.named_modules()]
    for prefix in (family.language, *family.vision, family.projector, *family.full_precision):
        assert any(n == prefix or n.startswith(prefix + ".") for n in names), prefix
    assert family_of(model.config) is family and family_of(model.config.to_dict()) is family
    inside = lambda name, *places: any(name == p or name.startswith(p + ".") for p in places)
    assert not inside(family.projector, family.language, *family.vision) and not any(inside(v, family.language) for v in family.vision)
    for n, p in model.named_parameters(): # what is stored at 4 bits is the language model, and no weight is of two parts
        assert sum(inside(n, part) for part in (family.language, family.projector, *family.vision)) <= 1, n
        if inside(n, *family.vision, family.projector): assert inside(n, *family.full_precision), n
        if inside(n, family.language): assert not n.startswith(family.full_precision), n

@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "+".join(k for k, v in c.items() if v))
def test_targets_are_exactly_the_linear_layers_asked_for(built, choice):
    import torch
    (family, model), places = built, {}
    for place, tower in [(family.language, "language"), *((v, "vision") for v in family.vision)]: places[place] = tower
    def wanted(name):
        tower = next((t for place, t in places.items() if name.startswith(place + ".")), None)
        if tower is None or not choice[f"{tower}_layers"]: return False
        return choice["attention"] if "attn" in name else choice["mlp"]
    got = chosen(model, family, **choice)
    eq(got, {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and wanted(n)})
    assert got
    for place, tower in places.items(): # each layer of each tower that was asked for
        if not choice[f"{tower}_layers"]: continue
        eq({int(n.removeprefix(place + ".").split(".")[0]) for n in got if n.startswith(place + ".")}, set(range(len(model.get_submodule(place)))))

def test_the_layers_that_look_at_the_image_are_targets_too():
    family = FAMILIES["llama-3.2-vision"]
    model = meta(family.default_base)
    crossing = {n for n in chosen(model, family, mlp=False) if ".cross_attn." in n}
    eq(crossing, {f"{family.language}.{i}.cross_attn.{p}" for i in model.config.text_config.cross_attention_layers for p in ("q_proj", "k_proj", "v_proj", "o_proj")})
    eq(len(crossing), 8*4)

def test_projector_and_head_are_never_targets(built):
    family, model = built
    for choice in CHOICES:
        assert not [n for n in chosen(model, family, **choice) if n.startswith(family.projector) or "lm_head" in n or "embed" in n]

def test_a_layer_number_does_not_match_by_its_beginning(family):
    for place, choice in [(family.language, {}), *((v, dict(language_layers=False, vision_layers=True)) for v in family.vision)]:
        pattern, name = lora_targets(family, **choice), family.attention["vision" if choice else "language"][0]
        for right in (f"{place}.12.self_attn.{name}", f"base_model.model.{place}.0.attn.{name}"): assert re.fullmatch(pattern, right), right
        for wrong in (f"{place}.x.self_attn.{name}", f"{place}.1.self_attn.{name}.lora_A", f"other{place}.1.self_attn.my_{name}",
                      place.replace(".", "x") + f".1.self_attn.{name}", f"{place}.1.self_attn.my_{name}", f"{place}s.1.self_attn.{name}"):
            assert not re.fullmatch(pattern, wrong), wrong

@pytest.mark.parametrize("name", TINY)
def test_tokens_are_those_of_the_tokenizer(bases, name):
    family, processor = FAMILIES[name], processor_of(bases[name])
    tokenizer = processor.tokenizer
    for token in (*family.masked_tokens, family.end_of_turn):
        eq(tokenizer(token, add_special_tokens=False)["input_ids"], [tokenizer.convert_tokens_to_ids(token)])
        assert tokenizer.convert_tokens_to_ids(token) != tokenizer.unk_token_id, token
    assert processor.image_token in family.masked_tokens and family.end_of_turn not in family.masked_tokens
    eq(tokenizer.eos_token, family.end_of_turn)
    assert tokenizer.pad_token not in (None, family.end_of_turn)

@pytest.mark.parametrize("name", TINY)
def test_the_template_fits_and_is_the_base_s(bases, name):
    from medchat.models import _template_fits
    family, processor = FAMILIES[name], processor_of(bases[name])
    eq(processor.chat_template, family.template)
    assert _template_fits(processor, family)

# ---- adding a family is one entry

TRACE = re.compile(r"qwen|mllama|llama.?3|llava.?(next|v?1\.?6)|mistral|" + "|".join(re.escape(x) for f in FAMILIES.values() for x in (f.name, f.model_type)), re.I)

def traces(source: str) -> list[str]:
    "Where code, not comments or docstrings, knows a family by name. Default values and examples may name a base that ships."
    tree = ast.parse(source)
    lines = {n.lineno for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))}
    starts = {(node.body[0].lineno, node.body[0].col_offset) for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and node.body and isinstance(node.body[0], ast.Expr)}
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE) or token.start in starts or token.start[0] in lines: continue
        if TRACE.search(re.sub(r"\btiny-[\w.-]+", "", token.string)): found.append(f"{token.start[0]}: {token.string[:80]}")
    return found

def test_traces_are_found():
    "The search itself: what it must find, and what it may not."
    for bad in ('if model.config.model_type == "qwen2_vl": pass', 'x = FAMILIES["llama-3.2-vision"]', 'y = "mllama" in name', 'class_ = transformers.LlavaNextProcessor', 'z = "Qwen2.5-VL"'): assert traces(bad), bad
    for good in ('x = 1 # qwen2_vl', '"about mllama"', 'def f(base="tiny-qwen2-vl"): pass', 'def f():\n    "Of LLaVA-1.6."', 'from transformers import MllamaProcessor', 'to = "llava"'): assert not traces(good), (good, traces(good))

# blueprints: one maker of a tiny base for each
@pytest.mark.parametrize("path", [p for p in sorted(Path(medchat.__file__).parent.glob("*.py")) if p.stem not in ("families", "blueprints", "_modidx")], ids=lambda p: p.stem)
def test_nothing_else_asks_which_family_it_has(path): eq(traces(path.read_text(encoding="utf-8")), [])

def test_the_fourth_family_is_an_entry_and_nothing_more():
    "No module but the table knows its name, and it is estimated, loaded and adapted like the others."
    from medchat.memory import base_sizes
    family = FAMILIES["qwen2.5-vl"]
    for path in Path(medchat.__file__).parent.glob("*.py"):
        if path.stem != "families": assert not re.search(r"qwen2[._]5", path.read_text(encoding="utf-8"), re.I), path.name
    sizes = base_sizes(family.default_base)
    assert sizes["LoRA"] > 0 and sizes["projector"] > 0

# ---- refusals

@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": "qwen2"}, {"model_type": "QWEN2_VL"}, {"model_type": "llava"}, {"model_type": "mllama_text_model"}, object()])
def test_unknown_families_are_refused(config):
    with pytest.raises(MedchatError, match="unknown model family.*Known: qwen2-vl, llama-3.2-vision, llava-1.6"): family_of(config)

def test_nothing_to_train_is_refused(family):
    for choice in (dict(language_layers=False), dict(attention=False, mlp=False)):
        with pytest.raises(MedchatError, match="nothing to train"): lora_targets(family, **choice)
