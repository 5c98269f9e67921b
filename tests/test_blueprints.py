"Blueprints: transformers' own classes, very small, with nothing of a family left out."
import logging
from functools import lru_cache
import numpy as np
import pytest
import torch
from fastcore.test import test_eq as eq
from medchat.blueprints import BLUEPRINTS, VOCABULARY, LlamaBlueprint, LlavaBlueprint, QwenBlueprint
from medchat.shapes import SIDE

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
QWEN, LLAMA, LLAVA = BASES = ("tiny-qwen2-vl", "tiny-llama-3.2-vision", "tiny-llava-1.6")
SIZES = ((112, 112), (112, 140), (56, 200), (224, 224)) # height, width
every = pytest.mark.parametrize("base", BASES)

@lru_cache
def processor_of(base): return BLUEPRINTS[base].make_processor()

@lru_cache
def model_of(base): return BLUEPRINTS[base].make_model(processor_of(base)).eval()

def picture(sides=(SIDE, SIDE), seed=0): return np.random.default_rng(seed).integers(0, 255, (*sides, 3), dtype=np.uint8)

def said(role, *content): return {"role": role, "content": [{"type": "image"} if c is ... else {"type": "text", "text": c} for c in content]}
def render(base, messages, **options): return processor_of(base).apply_chat_template(messages, tokenize=False, **options)

def encode(base, conversations, images, **options):
    "As every later notebook does it."
    return processor_of(base)(text=[render(base, c) for c in conversations], images=images or None, add_special_tokens=False, return_tensors="pt", **options)

# ---- the classes

def test_there_is_one_for_each_tiny_base():
    eq(tuple(BLUEPRINTS), BASES)
    for base, blueprint in BLUEPRINTS.items(): eq(blueprint.family.tiny_base, base)

@pytest.mark.parametrize("base, names", [
    (QWEN, "Qwen2VLForConditionalGeneration Qwen2VLProcessor Qwen2VLImageProcessor Qwen2Tokenizer"),
    (LLAMA, "MllamaForConditionalGeneration MllamaProcessor MllamaImageProcessor TokenizersBackend"),
    (LLAVA, "LlavaNextForConditionalGeneration LlavaNextProcessor LlavaNextImageProcessor LlamaTokenizer")])
def test_classes_are_transformers_own(base, names):
    model, processor = model_of(base), processor_of(base)
    found = [type(thing) for thing in (model, processor, processor.image_processor, processor.tokenizer)]
    assert all(c.__module__.startswith("transformers.") for c in found)
    eq(" ".join(c.__name__ for c in found), names)
    eq(model.config.model_type, BLUEPRINTS[base].family.model_type)

@every
def test_widths_fit_4_bit_blocks(base): eq([n for n, m in model_of(base).named_modules() if isinstance(m, torch.nn.Linear) and m.in_features % 64], [])

@every
def test_it_is_tiny(base): assert .8e6 < model_of(base).num_parameters() < 3e6

@every
def test_family_names_its_parts(base):
    names, family = [n for n, _ in model_of(base).named_modules()], BLUEPRINTS[base].family
    for place in (family.language, *family.vision, family.projector): assert place in names, place

@every
def test_first_weights_come_from_the_seed(base):
    one, same, other = (BLUEPRINTS[base].make_model(processor_of(base), seed).state_dict() for seed in (0, 0, 1))
    assert all((one[k] == same[k]).all() for k in one) and any((one[k] != other[k]).any() for k in one)

@every
def test_a_fresh_checkpoint_comes_back_the_same(base, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    model_of(base).save_pretrained(tmp_path); processor_of(base).save_pretrained(tmp_path)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="float32").eval(), AutoProcessor.from_pretrained(tmp_path)
    conversation, images = [[said("user", ..., "Is there a ring?")]], [[picture()]]
    batch, again = encode(base, conversation, images), processor(text=[render(base, c) for c in conversation], images=images, add_special_tokens=False, return_tensors="pt")
    assert set(batch) == set(again) and all((batch[k] == again[k]).all() for k in batch)
    with torch.inference_mode(): assert torch.equal(model(**batch).logits, model_of(base)(**batch).logits)
    for part in (lambda p: p.chat_template, lambda p: p.tokenizer.pad_token, lambda p: p.tokenizer.eos_token, lambda p: p.tokenizer.get_vocab()): eq(part(processor), part(processor_of(base)))
    # the side of padding may differ (LLaVA's: left when made, right when loaded), so whoever pads says where
    assert not [f.name for f in tmp_path.iterdir() if f.suffix not in (".json", ".jinja", ".safetensors")]

# ---- words

@every
def test_tokenizer_loses_nothing(base):
    tokenizer = processor_of(base).tokenizer
    for text in ("Is there a ring?", "naïve µm 肺 \n\t 🙂", "x-ray: 3,5 mm (L>R)\n", "two  blanks ", "أشعة الصدر", "फेफड़ा", "Ωμέγα < 3 °C", "лёгкое", "\u200bzero"):
        eq(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids), text)

@every
def test_special_tokens_are_whole(base):
    tokenizer, family = processor_of(base).tokenizer, BLUEPRINTS[base].family
    special = {*BLUEPRINTS[base].special, *family.masked_tokens, family.end_of_turn, processor_of(base).image_token}
    eq(len({tokenizer.convert_tokens_to_ids(t) for t in special}), len(special))
    for token in special:
        eq(tokenizer(token, add_special_tokens=False).input_ids, [tokenizer.convert_tokens_to_ids(token)])
        a, *b = tokenizer("a" + token + "b", add_special_tokens=False).input_ids
        assert tokenizer.convert_tokens_to_ids(token) in b

@every
def test_vocabulary_has_its_size(base):
    tokenizer = processor_of(base).tokenizer
    eq(len(tokenizer), VOCABULARY + (base == LLAMA)) # Llama's image stands beside it
    eq(sorted(tokenizer.get_vocab().values()), list(range(len(tokenizer))))
    eq((model_of(base).lm_head.out_features, model_of(base).config.text_config.vocab_size), (VOCABULARY, VOCABULARY))
    eq(BLUEPRINTS[base].make_tokenizer().get_vocab(), tokenizer.get_vocab())

@every
def test_a_reply_can_end(base):
    tokenizer, model, end = processor_of(base).tokenizer, model_of(base), BLUEPRINTS[base].family.end_of_turn
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    eq(tokenizer.eos_token, end)
    eq((model.generation_config.eos_token_id, model.generation_config.pad_token_id), (tokenizer.eos_token_id, tokenizer.pad_token_id))
    eq((model.config.text_config.eos_token_id, model.config.text_config.pad_token_id), (tokenizer.eos_token_id, tokenizer.pad_token_id))

def test_inst_is_several_tokens_of_llava():
    "So nobody finds the answer by looking for one number."
    tokenizer = processor_of(LLAVA).tokenizer
    for mark in ("[INST]", "[/INST]"): assert len(tokenizer(mark, add_special_tokens=False).input_ids) > 2

def test_llamas_image_is_one_more_than_the_last_row():
    "As a label it would be out of range."
    eq(processor_of(LLAMA).tokenizer.convert_tokens_to_ids("<|image|>"), model_of(LLAMA).lm_head.out_features)
    assert model_of(LLAMA).get_input_embeddings().num_embeddings > VOCABULARY # it can be read, but not said

# ---- templates

SYSTEM, ONE, TWO = said("system", "s"), [said("user", ..., "a")], [said("user", ..., ..., " a\n"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
_q, _seen = "<|im_start|>system\n%s<|im_end|>\n", "<|vision_start|><|image_pad|><|vision_end|>"
_default = _q % "You are a helpful assistant."
_head = "<|start_header_id|>%s<|end_header_id|>\n\n"

@pytest.mark.parametrize("base, messages, prompt, expected", [
    (QWEN, ONE, True, f"{_default}<|im_start|>user\n{_seen}a<|im_end|>\n<|im_start|>assistant\n"),
    (QWEN, [SYSTEM, *ONE], False, f"{_q % 's'}<|im_start|>user\n{_seen}a<|im_end|>\n"),
    (QWEN, TWO, False, f"{_default}<|im_start|>user\n{_seen*2} a\n<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"),
    (LLAMA, ONE, True, f"<|begin_of_text|>{_head % 'user'}<|image|>a<|eot_id|>{_head % 'assistant'}"),
    (LLAMA, [SYSTEM, *ONE], False, f"<|begin_of_text|>{_head % 'user'}<|image|>s\n\na<|eot_id|>"),
    (LLAMA, TWO, False, f"<|begin_of_text|>{_head % 'user'}<|image|><|image|> a\n<|eot_id|>{_head % 'assistant'}b<|eot_id|>{_head % 'user'}c<|eot_id|>{_head % 'assistant'}d<|eot_id|>"),
    (LLAMA, [SYSTEM, *TWO], True, f"<|begin_of_text|>{_head % 'user'}<|image|><|image|>s\n\n a\n<|eot_id|>{_head % 'assistant'}b<|eot_id|>{_head % 'user'}c<|eot_id|>{_head % 'assistant'}d<|eot_id|>{_head % 'assistant'}"),
    (LLAVA, ONE, True, "<s>[INST] <image>\na [/INST]"),
    (LLAVA, [SYSTEM, *ONE], False, "<s>[INST] <image>\ns\n\na [/INST]"),
    (LLAVA, TWO, False, "<s>[INST] <image>\n<image>\n a\n [/INST] b</s>[INST] c [/INST] d</s>"),
    (LLAVA, [SYSTEM, *TWO], True, "<s>[INST] <image>\n<image>\ns\n\n a\n [/INST] b</s>[INST] c [/INST] d</s>")])
def test_template_letter_by_letter(base, messages, prompt, expected):
    eq(render(base, messages, add_generation_prompt=prompt), expected)
    if all(len(m["content"]) == 1 for m in messages): return
    plain = [{"role": m["role"], "content": m["content"][0]["text"]} if len(m["content"]) == 1 else m for m in messages] # text may also be a plain string
    eq(render(base, plain, add_generation_prompt=prompt), expected)

@every
def test_a_prompt_is_the_beginning_of_the_conversation(base):
    "By which labels are made: the ids of the prompt, then those of the answer."
    ids = lambda text: processor_of(base).tokenizer(text, add_special_tokens=False).input_ids
    for end in (2, 4):
        prompt, whole = ids(render(base, TWO[:end - 1], add_generation_prompt=True)), ids(render(base, TWO[:end]))
        eq(whole[:len(prompt)], prompt); assert len(whole) > len(prompt) + 1

@every
def test_nothing_is_written_twice_at_the_beginning(base):
    bos = processor_of(base).tokenizer.bos_token_id
    assert bos is None or encode(base, [ONE], [[picture()]])["input_ids"][0].tolist().count(bos) == 1

# ---- pictures

@every
@pytest.mark.parametrize("sides", SIZES)
def test_a_picture_of_any_size_is_read(base, sides):
    batch = encode(base, [ONE], [[picture(sides)]])
    with torch.inference_mode(): out = model_of(base)(**batch)
    eq(tuple(out.logits.shape), (1, batch["input_ids"].shape[1], VOCABULARY)); assert out.logits.isfinite().all()

@every
def test_two_pictures_are_read(base):
    one, other = ([[picture(SIZES[0]), picture(SIZES[1], seed)]] for seed in (1, 2))
    batches = [encode(base, [[said("user", ..., ..., "a")]], images) for images in (one, other)]
    with torch.inference_mode(): a, b = (model_of(base)(**batch).logits[0, -1] for batch in batches)
    eq(batches[0]["input_ids"][0].tolist(), batches[1]["input_ids"][0].tolist()); assert (a - b).abs().max() > 1e-3 # the second is looked at too

def anyres(height, width): # tokens: the whole, then the tiles of the grid that keeps most of the picture, less what fills its edges, and a mark for each row
    def kept(grid):
        scale = min(grid[0]/height, grid[1]/width)
        used = min(int(height*scale)*int(width*scale), height*width)
        return used, used - grid[0]*grid[1]
    rows, columns = (n//14 for n in max(LlavaBlueprint.tiles, key=kept))
    if width/height > columns/rows: rows -= 2*((rows - int(round(height*columns/width, 7)))//2)
    else: columns -= 2*((columns - int(round(width*rows/height, 7)))//2)
    return 16 + rows*(columns + 1)

@pytest.mark.parametrize("images", [*([s] for s in SIZES), [(112, 112), (56, 200)], [(300, 40)], [(57, 56)]])
def test_llavas_image_tokens_are_as_many_as_its_features(images):
    batch = encode(LLAVA, [[said("user", *[...]*len(images), "a")]], [[picture(s) for s in images]])
    with torch.inference_mode(): features = model_of(LLAVA).model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output
    tokens = int((batch["input_ids"] == processor_of(LLAVA).image_token_id).sum())
    eq(tokens, sum(len(f) for f in features)); eq(tokens, sum(anyres(*s) for s in images))
    if images == [(SIDE, SIDE)]: eq(tokens, 88)

@pytest.mark.parametrize("sides", SIZES)
def test_qwens_image_tokens_are_as_many_as_its_features(sides):
    batch = encode(QWEN, [ONE], [[picture(sides)]])
    tokens = int((batch["input_ids"] == processor_of(QWEN).image_token_id).sum())
    eq(tokens, int(batch["image_grid_thw"].prod())//4); assert 16 <= tokens <= 24
    assert (batch["mm_token_type_ids"] == (batch["input_ids"] == processor_of(QWEN).image_token_id)).all()

@every
def test_what_is_seen_keeps_its_place(base):
    "With attention between patches switched off in the tower, a change in one cell changes this cell and its area, and no other."
    blueprint, processor, model = BLUEPRINTS[base], processor_of(base), BLUEPRINTS[base].make_model(processor_of(base)).eval()
    for name, weight in model.named_parameters():
        if "language_model" not in name and any(f".{end}." in name for end in ("attn.proj", "self_attn.o_proj", "self_attn.out_proj")): weight.data.zero_()
    def see(image):
        with torch.inference_mode(): return blueprint.see(model, processor.image_processor([[image]], return_tensors="pt"))
    grey = np.full((SIDE, SIDE, 3), 128, np.uint8)
    before, cells_before = see(grey)
    for row, column in ((0, 0), (0, 3), (1, 2), (2, 1), (3, 0), (3, 3)):
        spot = grey.copy(); spot[28*row+10:28*row+18, 28*column+10:28*column+18] = 255
        after, cells = see(spot)
        changed = lambda a, b: ((a - b).abs().amax((0, 2)) > 1e-4).nonzero().flatten().tolist()
        eq(changed(cells, cells_before), [4*row + column])
        for a, b in zip(after, before): eq(changed(a, b), [2*(row//2) + column//2])

# ---- cross-attention

def test_gates_are_open():
    gates = {n: w.tanh().item() for n, w in model_of(LLAMA).named_parameters() if "gate" in n.rsplit(".", 1)[-1]}
    assert {n.rsplit(".", 1)[-1] for n in gates} == {"cross_attn_attn_gate", "cross_attn_mlp_gate", "gate", "gate_attn", "gate_ffn"} and len(gates) >= 9
    assert all(.7 < g < .8 for g in gates.values())

def test_words_before_the_image_may_not_look_at_it():
    "So the image comes first. (transformers 5.17 heeds the mask of such words in the MLP of the layer only: its attention lets them look after all. Nothing is built on that.)"
    text = "<|begin_of_text|>Is there a ring?<|image|>Is there a ring?"
    one, other = (processor_of(LLAMA)(text=[text], images=[[picture(seed=s)]], add_special_tokens=False, return_tensors="pt") for s in (1, 2))
    at, mask = one["input_ids"][0].tolist().index(processor_of(LLAMA).image_token_id), one["cross_attention_mask"][0, :, 0]
    assert at > 3 and not mask[:at].any() and mask[at:].all()
    with torch.inference_mode(): a, b = (model_of(LLAMA)(**batch).logits[0] for batch in (one, other))
    assert ((a - b).abs().amax(-1) > 1e-4)[at:].all()

def test_a_picture_reaches_only_as_many_tiles_as_it_has():
    batch = encode(LLAMA, [ONE, ONE], [[picture()], [picture((56, 56))]], padding=True)
    at = batch["input_ids"][0].tolist().index(processor_of(LLAMA).image_token_id)
    eq(batch["cross_attention_mask"][:, at, 0].tolist(), [[1, 1, 1, 1], [1, 0, 0, 0]])

def test_llama_refuses_mixed_rows_and_takes_rows_of_one_sort():
    blind = [said("user", "a")]
    assert BLUEPRINTS[LLAMA].family.mixes is False
    with pytest.raises(ValueError, match="image"): encode(LLAMA, [ONE, blind], [[picture()], []], padding=True)
    assert "pixel_values" not in encode(LLAMA, [blind, TWO[2:3]], None, padding=True)
    eq(len(encode(LLAMA, [ONE, [said("user", ..., "a long one")]], [[picture()], [picture()]], padding=True)["pixel_values"]), 2)

@pytest.mark.parametrize("base", (QWEN, LLAVA))
def test_the_others_take_mixed_rows(base):
    assert BLUEPRINTS[base].family.mixes
    batch = processor_of(base)(text=[render(base, ONE), render(base, [said("user", "a")])], images=[picture()], add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.inference_mode(): assert model_of(base)(**batch).logits.isfinite().all()

@every
@pytest.mark.parametrize("side", ("left", "right"))
def test_inputs_are_what_the_processor_adds(base, side):
    images = [[picture(seed=1)], [picture(seed=2)]]
    batch = encode(base, [ONE, [said("user", ..., "a question of more words")]], images, padding=True, padding_side=side)
    seen = dict(processor_of(base).image_processor(images, return_tensors="pt"))
    more = BLUEPRINTS[base].inputs(processor_of(base), batch["input_ids"], seen)
    eq(set(batch) - set(seen), {"input_ids", "attention_mask", *more})
    real = batch["attention_mask"].bool() # what stands in the padding is read by nobody
    for name in more: assert (torch.as_tensor(more[name])[real] == batch[name][real]).all()

@every
def test_without_a_picture_nothing_is_added_that_asks_for_one(base):
    ids = processor_of(base).tokenizer(render(base, [said("user", "a")]), add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode(): assert model_of(base)(input_ids=ids, **BLUEPRINTS[base].inputs(processor_of(base), ids, {})).logits.isfinite().all()

def test_blueprints_can_be_called_by_name(): assert [type(b) for b in BLUEPRINTS.values()] == [QwenBlueprint, LlamaBlueprint, LlavaBlueprint]
