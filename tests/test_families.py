"The table of families, checked against a real model of each."
import re
import pytest
from fastcore.test import test_eq as eq
from medchat.core import MedchatError
from medchat.families import FAMILIES, family_of, lora_targets

CHOICES = [dict(language_layers=l, vision_layers=v, attention=a, mlp=m) for l in (True, False) for v in (True, False)
           for a in (True, False) for m in (True, False) if (l or v) and (a or m)]

@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request): return FAMILIES[request.param]

@pytest.fixture(scope="module")
def base(family):
    from medchat.models import load_model
    return load_model(family.tiny_base, load_in_4bit=False)

def chosen(model, family, **choice):
    return {n for n, _ in model.named_modules() if re.fullmatch(lora_targets(family, **choice), n)}

def test_every_field_is_filled(family):
    for name, value in vars(family).items(): assert value, f"{family.name}.{name} is empty"
    assert set(family.attention) == set(family.mlp) == {"language", "vision"}
    assert family.default_base in family.sizes

def test_prefixes_and_tokens_are_those_of_the_model(family, base):
    model, processor = base
    names = [n for n, _ in model.named_modules()]
    for prefix in (family.language, family.vision, family.projector, *family.full_precision):
        assert any(n == prefix or n.startswith(prefix + ".") for n in names), prefix
    vocabulary = processor.tokenizer.get_vocab()
    for token in (*family.masked_tokens, family.end_of_turn): assert token in vocabulary, token
    assert processor.image_token in family.masked_tokens
    assert family_of(model.config) is family

@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "+".join(k for k, v in c.items() if v))
def test_targets_are_exactly_the_linear_layers_asked_for(family, base, choice):
    import torch
    model, got = base[0], chosen(base[0], family, **choice)
    def wanted(name):
        tower = next((t for t in ("language", "vision") if name.startswith(getattr(family, t) + ".")), None)
        if tower is None or not choice[f"{tower}_layers"]: return False
        return choice["attention"] if "attn" in name else choice["mlp"]
    eq(got, {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and wanted(n)})
    assert got

def test_projector_and_head_are_never_targets(family, base):
    for choice in CHOICES:
        assert not [n for n in chosen(base[0], family, **choice) if n.startswith(family.projector) or "lm_head" in n]

def test_a_layer_number_does_not_match_by_its_beginning(family):
    pattern = lora_targets(family)
    assert re.fullmatch(pattern, f"{family.language}.12.self_attn.q_proj")
    for wrong in (f"{family.language}.x.self_attn.q_proj", f"{family.language}.1.self_attn.q_proj.lora_A", f"other{family.language}.1.self_attn.my_q_proj",
                  family.language.replace(".", "x") + ".1.self_attn.q_proj"):
        assert not re.fullmatch(pattern, wrong), wrong

@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": "qwen2"}, {"model_type": "QWEN2_VL"}, object()])
def test_unknown_families_are_refused(config):
    with pytest.raises(MedchatError, match="unknown model family.*Known: qwen2-vl"): family_of(config)
