"""What breaks when vision-language models are trained: a test for each trap, here or where a comment says.

Training at 4 bits on a CPU
    evaluate, then train: gone gradients     test_models: test_evaluate_then_train_has_the_same_gradients, test_the_trap_is_real_where_the_cpu_has_it
    widths                                   here, and test_blueprints: test_widths_fit_4_bit_blocks
Batches and labels
    pictures decoded into memory             here
    prompts in the loss                      test_batches: test_every_answer_with_its_end_is_learnt_and_nothing_else; here for each family
    rows that teach nothing or everything    test_batches: test_rows_that_teach_nothing_or_everything_are_refused
    truncation                               test_batches: test_nothing_is_cut; here: nothing is cut by a processor
    padding with the end token               here, and test_models: test_a_base_that_pads_with_its_end_token_is_refused
Answers
    left padding, batch == single            test_models: test_padding_side_is_what_was_asked_every_time, test_batch_equals_single, test_rows_with_no_one_and_two_images_in_one_batch
    scores from prompts that hold the answer test_models: test_an_answer_in_the_prompt_is_refused
Runs
    resume                                   test_train: test_stopped_and_resumed_equals_never_stopped
    an adapter that loads as nothing         test_models: test_spoilt_runs_are_one_line, test_a_projector_that_does_not_fit_is_refused
    the projector is left behind             test_families: test_projector_and_head_are_never_targets; test_models: test_an_adapter_comes_back_to_the_same_numbers
    pushing, pulled back and asked           test_publish
Families
    templates that refuse system + image     test_models: test_a_template_that_does_not_fit_gets_the_family_s
    old LLaVA processor files                test_models: test_old_llava_files_insert_as_many_image_tokens_as_there_are_features
    rows of another number of images (Llama) test_models: test_a_row_of_fewer_images_is_not_answered_beside_one_of_more
    what serves which                        test_families: test_only_what_was_tried_is_said_to_serve_it
"""
from itertools import groupby
import pytest
import torch
from fastcore.test import test_eq as eq
from data_maker import make_data, picture, questions
from medchat import models
from medchat.batches import Lessons, VisionCollator, count_tokens
from medchat.blueprints import BLUEPRINTS
from medchat.core import MedchatError
from medchat.curate import read_dataset
from medchat.families import FAMILIES, family_of
from medchat.messages import assistant_message, prompt_messages, user_message
from medchat.models import encode, load_model, template_text

QWEN, LLAMA, LLAVA = TINY = ("qwen2-vl", "llama-3.2-vision", "llava-1.6")
every = pytest.mark.parametrize("name", TINY)

@pytest.fixture(scope="module")
def tiny(bases):
    "Model, processor and family of each tiny base, at full precision."
    found = {name: load_model(folder, load_in_4bit=False) for name, folder in bases.items()}
    return {name: (model, processor, FAMILIES[name]) for name, (model, processor) in found.items()}

def shade(seed, side=112): return picture(seed).resize((side, side))
def row(question="Is it?", answer="yes", n=1, more=(), id="x"):
    turns = [user_message(question, n), assistant_message(answer)]
    for q, a in more: turns += [user_message(q), assistant_message(a)]
    return dict(id=id, messages=turns, images=[shade(k) for k in range(n)])
def collate(tiny, name, *rows): return VisionCollator(*tiny[name][1:])(list(rows))
def forward(model, batch, **change):
    with torch.inference_mode(): return model(**{k: v for k, v in {**batch, **change}.items() if k != "ids"})
ROWS = [row(), row("Where does it lie, and how large is it?", "in the left upper area; it is large"), row("Is it?", "yes", 2, [("Where?", "left"), ("Sure?", "no")]), row("Compare them, please.", "alike", 2)]
def lots(name): # what may share a batch
    return [[ROWS[i] for i in part] for part in models.same_sort(FAMILIES[name], [r["images"] for r in ROWS])]

# ---- 4 bits on a CPU

def test_widths_are_whole_blocks(bases):
    "bitsandbytes cuts a row into blocks of 64: every layer at 4 bits has an input width that is a multiple."
    from medchat.memory import meta_model
    for base in (*bases.values(), *(f.default_base for f in FAMILIES.values())):
        model = meta_model(base)
        family = family_of(model.config)
        eq([n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.startswith(family.full_precision) and m.in_features % 64], [])

def test_frozen_4_bit_weights_let_gradients_through(bases):
    "NF4 runs on a CPU, forward and backward: the frozen weights stay as they are, what is trained moves."
    for name, folder in bases.items():
        model, processor = load_model(folder, for_training=True)
        model = models.add_lora(model, r=4)
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        trained = [p for p in model.parameters() if p.requires_grad]
        step = torch.optim.SGD(trained, 1e-2)
        model(**{k: v for k, v in VisionCollator(processor, FAMILIES[name])([ROWS[0]]).items() if k != "ids"}).loss.backward()
        before = [p.detach().clone() for p in trained]
        step.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, trained)) and all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)

# ---- batches and labels

def test_pictures_stay_undecoded_until_their_batch(tiny, tmp_path, monkeypatch):
    "[convert(x) for x in dataset] decodes every image into memory: a dataset holds bytes, and a batch decodes its own."
    opened = []
    load = models.load_image
    monkeypatch.setattr(models, "load_image", lambda source, *a: opened.append(1) or load(source, *a))
    rows = Lessons(read_dataset(make_data(tmp_path, questions()))["train"])
    count_tokens(tiny[QWEN][1], rows)
    assert all(set(image) == {"bytes", "path"} and image["bytes"][:1] in (b"\x89", b"\xff") for i in range(len(rows)) for image in rows[i]["images"])
    eq(opened, [])
    two = [rows[0], rows[1]]
    collate(tiny, QWEN, *two)
    eq(len(opened), sum(len(r["images"]) for r in two))

@every
def test_image_tokens_and_prompts_are_never_labels(tiny, name):
    "TRL's vision collator leaves image tokens in the loss, and prompts unless told otherwise."
    _, processor, family = tiny[name]
    at = processor.tokenizer.convert_tokens_to_ids
    for rows in lots(name):
        batch = collate(tiny, name, *rows)
        labels = batch["labels"]
        for token in (*family.masked_tokens, processor.tokenizer.pad_token): assert not (labels == at(token)).any(), token
        assert (batch["input_ids"] == processor.image_token_id).any() and (labels[labels != -100] == batch["input_ids"][labels != -100]).all()
        for k, r in enumerate(rows): # what is learnt are the answers with their ends, letter by letter
            learnt = processor.tokenizer.decode(labels[k][labels[k] != -100].tolist())
            eq(learnt.replace(" ", ""), "".join(m["content"][0]["text"] + family.end_of_turn for m in r["messages"] if m["role"] == "assistant").replace(" ", ""))

@every
def test_learnt_and_masked_tokens_in_every_row(tiny, name):
    "Each sample has both."
    for rows in lots(name):
        learnt = collate(tiny, name, *rows)["labels"] != -100
        assert learnt.any(1).all() and (~learnt).any(1).all()

@every
def test_the_end_is_learnt_and_the_padding_is_not(tiny, name):
    "Pad must not equal EOS, or EOS is masked with it and the model never stops."
    model, processor, family = tiny[name]
    pad, end = processor.tokenizer.pad_token_id, processor.tokenizer.convert_tokens_to_ids(family.end_of_turn)
    assert pad not in (None, end) and end in model.generation_config.eos_token_id and pad not in model.generation_config.eos_token_id
    for rows in lots(name):
        batch = collate(tiny, name, *rows)
        for k, r in enumerate(rows): eq(int((batch["labels"][k] == end).sum()), len(r["messages"])//2)
        assert (batch["input_ids"] == pad).any() and (batch["labels"][batch["attention_mask"] == 0] == -100).all()

@every
def test_the_first_token_is_written_once(tiny, name):
    "After a chat template the processor is called with add_special_tokens=False, or it writes BOS a second time."
    from tokenizers.processors import TemplateProcessing
    _, processor, family = tiny[name]
    t = processor.tokenizer
    if t.bos_token is None: return
    was = t._tokenizer.post_processor
    t._tokenizer.post_processor = TemplateProcessing(single=f"{t.bos_token} $A", special_tokens=[(t.bos_token, t.bos_token_id)]) # as the tokenizers of the real bases
    try:
        eq(t("a")["input_ids"][0], t.bos_token_id)
        made = [b for rows in lots(name) for b in (collate(tiny, name, *rows), encode(processor, [r["messages"][:1] for r in rows], [r["images"] for r in rows]))]
        for batch in made:
            for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool()): eq((ids[real].tolist().count(t.bos_token_id), ids[real][0].item()), (1, t.bos_token_id))
    finally: t._tokenizer.post_processor = was

@every
def test_nothing_is_cut_by_a_processor(tiny, name):
    "Truncation must never cut inside an image's tokens: there is none, however long the text and whatever the tokenizer says is its limit."
    _, processor, _ = tiny[name]
    was, processor.tokenizer.model_max_length = processor.tokenizer.model_max_length, 20
    try: batch = collate(tiny, name, row("word " * 300))
    finally: processor.tokenizer.model_max_length = was
    assert batch["input_ids"].shape[1] > 300

def test_trls_own_limit_is_off(tmp_path):
    "TRL cuts at 1,024 tokens unless told otherwise."
    from inspect import signature
    from medchat.train import train, trainer_arguments
    settings = {k: p.default for k, p in signature(train).parameters.items()}
    assert trainer_arguments(tmp_path/"run", "cpu", 1, settings)["max_length"] is None

@every
def test_training_and_answering_see_the_same_picture(tiny, name):
    "One image function for both: other collators resize the training images only."
    _, processor, _ = tiny[name]
    for image in (shade(1), shade(2, 1500), shade(3, 40), picture(4).resize((300, 90)), picture(5).convert("L")):
        learnt = collate(tiny, name, dict(row(), images=[image]))
        asked = encode(processor, [prompt_messages(ROWS[0]["messages"])], [[image]])
        for key in set(asked) - {"input_ids", "attention_mask", "cross_attention_mask", "mm_token_type_ids"}: assert torch.equal(learnt[key], asked[key]), key
        n = asked["input_ids"].shape[1]
        eq(learnt["input_ids"][0, :n].tolist(), asked["input_ids"][0].tolist()) # and the same words before the answer, an unasked-for system message included
        assert (learnt["labels"][0, :n] == -100).all() and (learnt["labels"][0, n:] != -100).any()

@every
def test_an_image_is_not_passed_over(tiny, name):
    "Another picture, another answer: else nothing that is tested on the base proves anything."
    batches_ = [collate(tiny, name, dict(row(), images=[shade(k)])) for k in (1, 2)]
    a, b = (forward(tiny[name][0], b).logits for b in batches_)
    learnt = batches_[0]["labels"] != -100
    assert ((a - b).abs().amax(-1)[learnt] > 1e-4).all()

# ---- Llama-3.2-Vision

def test_llamas_image_is_out_of_range_as_a_label(tiny):
    "<|image|> is one more than the last row of the output layer: unmasked it crashes the loss, or worse on a GPU. (Its number itself: test_blueprints, test_llamas_image_is_one_more_than_the_last_row.)"
    model, processor, _ = tiny[LLAMA]
    batch = collate(tiny, LLAMA, *lots(LLAMA)[0])
    assert forward(model, batch).loss.isfinite()
    with pytest.raises((IndexError, RuntimeError)): forward(model, batch, labels=torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100))

@every
def test_the_image_stands_before_the_words(tiny, name):
    "Text before <|image|> has no cross-attention to it: the image comes first, in the message and in what the template writes."
    _, processor, _ = tiny[name]
    eq([p["type"] for p in user_message("What?", 2)["content"]], ["image", "image", "text"])
    for system in ([], [{"role": "system", "content": [{"type": "text", "text": "You read X-rays."}]}]):
        text = template_text(processor, [*system, user_message("What is it?", 1)], True)
        assert 0 <= text.index(processor.image_token) < text.index("What is it?")
        if system: assert name == QWEN or text.index(processor.image_token) < text.index("You read X-rays.")

def test_the_cross_attention_mask_covers_the_whole_message(tiny):
    "Prompt/completion collators do not extend it over the answer, which then is learnt blindly."
    _, processor, _ = tiny[LLAMA]
    for rows in lots(LLAMA):
        batch = collate(tiny, LLAMA, *rows)
        mask, ids = batch["cross_attention_mask"], batch["input_ids"]
        eq(mask.shape[:2], ids.shape)
        for k, r in enumerate(rows):
            n, first = int(batch["attention_mask"][k].sum()), ids[k].tolist().index(processor.image_token_id)
            last = max(i for i, t in enumerate(ids[k].tolist()) if t == processor.image_token_id)
            assert (mask[k, last:n, :len(r["images"])].sum(-1) > 0).all() # each word from the last image on, the answers of all turns among them, sees every image
            assert not mask[k, :first].any() and not mask[k, :, len(r["images"]):].any()
            assert mask[k, :n][batch["labels"][k, :n] != -100].flatten(1).any(1).all()

def test_llamas_processor_refuses_a_mixture_and_our_collator_says_it_in_a_line(tiny):
    "Rows with and without images in one batch."
    _, processor, family = tiny[LLAMA]
    rows = [row(id="seen"), row(n=0, id="blind")]
    with pytest.raises(MedchatError, match="cannot hold conversations with different numbers of images: seen, blind") as e: collate(tiny, LLAMA, *rows)
    assert "\n" not in str(e.value) and not family.mixes
    with pytest.raises(ValueError): encode(processor, [r["messages"] for r in rows], [r["images"] for r in rows])
    assert "pixel_values" not in collate(tiny, LLAMA, rows[1]) and forward(tiny[LLAMA][0], collate(tiny, LLAMA, rows[1])).loss.isfinite()

@pytest.mark.parametrize("name", (QWEN, LLAVA))
def test_the_others_take_a_mixture(tiny, name):
    "And a row's loss does not depend on what it shares a batch with."
    model, rows = tiny[name][0], [row(), row("Why is that so?", "so it is", 0), row("Two?", "yes", 2)]
    mixed = collate(tiny, name, *rows)
    together = forward(model, mixed).logits
    for k, r in enumerate(rows):
        n = int(mixed["attention_mask"][k].sum())
        assert (together[k, :n] - forward(model, collate(tiny, name, r)).logits[0]).abs().max() < 1e-3

def test_llama_reads_at_most_four_tiles_of_560():
    "Up to 4 tiles of 560 px, each 40 x 40 patches and a class token, whatever the size of the picture."
    from transformers import MllamaImageProcessor
    images = MllamaImageProcessor(size=dict(height=560, width=560), max_image_tiles=4)
    for width, height in ((224, 224), (1120, 1120), (3000, 2000), (4000, 300)):
        seen = images([[picture(0).resize((width, height))]], return_tensors="pt")
        eq(tuple(seen["pixel_values"].shape), (1, 1, 4, 3, 560, 560))
        assert 1 <= int(seen["aspect_ratio_mask"].sum()) <= 4
    eq(FAMILIES[LLAMA].image_states, 4*((560//14)**2 + 1)); eq(FAMILIES[LLAMA].image_tokens, 1)

def test_closed_gates_ignore_the_image(tiny):
    "Mllama's cross-attention gates start at zero: an untrained one ignores the image altogether. (Ours are open: test_blueprints, test_gates_are_open.)"
    model, processor, _ = tiny[LLAMA]
    fresh = type(model)(model.config).eval()
    gates = {n: p for n, p in fresh.named_parameters() if n.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate"))}
    assert len(gates) == 4 and not any(p.any() for p in gates.values())
    one, other = (collate(tiny, LLAMA, dict(row(), images=[shade(k)])) for k in (1, 2))
    assert torch.equal(forward(fresh, one).logits, forward(fresh, other).logits)
    assert not torch.equal(forward(model, one).logits, forward(model, other).logits)

# ---- Qwen2-VL

@pytest.fixture(scope="module")
def real_qwen():
    "The tiny tokenizer with the image settings of the published base, its cap off."
    from transformers import Qwen2VLImageProcessor
    processor = BLUEPRINTS["tiny-qwen2-vl"].make_processor()
    processor.image_processor = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)
    return processor

def tokens(processor, width, height=None):
    batch = encode(processor, [[user_message("What?", 1)]], [[dict(bytes=png(width, height or width), path=None)]])
    return int((batch["input_ids"] == processor.image_token_id).sum())

def png(width, height):
    import io
    from PIL import Image
    out = io.BytesIO(); Image.new("L", (width, height)).save(out, "PNG")
    return out.getvalue()

def test_qwens_pixels_are_capped(real_qwen, monkeypatch):
    "Image tokens = H x W / 784: 1024 x 1024 -> 1,369, 2048 x 2048 -> 5,329. The family's cap makes it 512 at most."
    from medchat.images import load_image
    monkeypatch.setattr(models, "load_image", lambda source: load_image(source, None)) # without our own bound on the sides
    eq([tokens(real_qwen, side) for side in (1024, 2048)], [1369, 5329])
    settled = models._settle_processor(real_qwen, None, FAMILIES[QWEN])
    for sides in ((1024, 1024), (2048, 2048), (3000, 200), (5000, 4000)): assert 256 < tokens(settled, *sides) <= 512 == FAMILIES[QWEN].image_tokens, sides
    eq(tokens(settled, 224), 64) # small ones stay

def test_qwens_pixels_are_flat_across_the_batch(tiny):
    "pixel_values has no row for each conversation: image_grid_thw says what is whose, so it is never cut by batch index."
    model, processor, _ = tiny[QWEN]
    rows = [row(n=0), row(n=2), dict(row(), images=[picture(7).resize((112, 140))])]
    batch = collate(tiny, QWEN, *rows)
    eq(len(batch["image_grid_thw"]), 3); eq(len(batch["pixel_values"]), int(batch["image_grid_thw"].prod(1).sum()))
    assert batch["pixel_values"].dim() == 2 and len(batch["pixel_values"]) != len(rows)
    eq([(ids == processor.image_token_id).sum().item() for ids in batch["input_ids"]], [0, *(int(g.sum()) for g in (batch["image_grid_thw"].prod(1)//4).split([2, 1]))])
    assert forward(model, batch).loss.isfinite()

def test_our_loader_never_cuts_a_batch(tiny):
    "What slices tensors by row (a dispatching data loader, a gatherer) would tear pictures apart: our loader hands on what the collator made."
    from medchat.train import make_loader
    rows = [row(id="a"), row(n=2, id="b"), row(id="c")]
    made = list(make_loader(rows, [[0, 1], [2]], VisionCollator(*tiny[QWEN][1:]), 0, False))
    eq([b["ids"] for b in made], [["a", "b"], ["c"]]); eq([len(b["image_grid_thw"]) for b in made], [3, 1])

def test_qwens_marks_are_masked_in_an_answer_too(tiny):
    "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|> are never learnt: clean_text takes them out of texts, and labels pass over them."
    _, processor, family = tiny[QWEN]
    assert {"<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"} <= set(family.masked_tokens)
    eq(assistant_message("it <|vision_start|>is<|video_pad|> so")["content"][0]["text"], "it is so")
    dirty = dict(row(), messages=[user_message("Is it?", 1), {"role": "assistant", "content": [{"type": "text", "text": "yes<|vision_end|>no"}]}])
    batch = collate(tiny, QWEN, dirty)
    at = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    eq(int((batch["input_ids"] == at).sum()), 2); assert at not in batch["labels"]

def test_qwens_system_message_is_the_same_in_training_and_answering(tiny):
    "The template adds a default system message where there is none."
    _, processor, _ = tiny[QWEN]
    learnt, asked = template_text(processor, ROWS[0]["messages"], False), template_text(processor, ROWS[0]["messages"][:1], True)
    assert learnt.startswith(asked) and asked.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    own = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *ROWS[0]["messages"]]
    assert template_text(processor, own, False).count("<|im_start|>system") == 1 and "helpful" not in template_text(processor, own, False)

# ---- LLaVA-1.6

@pytest.fixture(scope="module")
def real_llava():
    "The tiny tokenizer with the image settings of the published base."
    from transformers import LlavaNextImageProcessor
    processor = BLUEPRINTS["tiny-llava-1.6"].make_processor()
    processor.image_processor = LlavaNextImageProcessor(size=dict(shortest_edge=336), crop_size=dict(height=336, width=336),
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])
    return processor

def test_llavas_token_counts(real_llava):
    "AnyRes: 336 x 336 -> 1,176, 1024 x 1024 -> 2,928, and no picture has more."
    eq([tokens(real_llava, side) for side in (336, 672, 1024)], [1176, 2928, 2928])
    for sides in ((640, 480), (1024, 300), (300, 1024), (900, 1000), (50, 50), (1000, 20)): assert 576 < tokens(real_llava, *sides) <= FAMILIES[LLAVA].image_tokens == 2928, sides

def test_llavas_counts_need_what_the_processor_is_told(real_llava):
    "Without patch_size, vision_feature_select_strategy and num_additional_image_tokens the count is wrong, or none."
    right = tokens(real_llava, 336)
    for name, value in (("vision_feature_select_strategy", None), ("num_additional_image_tokens", 0)):
        was = getattr(real_llava, name); setattr(real_llava, name, value)
        assert tokens(real_llava, 336) != right
        setattr(real_llava, name, was)
    was, real_llava.patch_size = real_llava.patch_size, None
    with pytest.raises(TypeError): tokens(real_llava, 336)
    real_llava.patch_size = was
    eq(tokens(real_llava, 336), right)

def test_llavas_batches_carry_image_sizes(tiny):
    "By which the model takes the filling away from each picture's edges; without them it cannot."
    model, _, _ = tiny[LLAVA]
    batch = collate(tiny, LLAVA, row(n=2), dict(row(), images=[picture(3).resize((90, 60))]), row(n=0))
    eq(batch["image_sizes"].tolist(), [[112, 112], [112, 112], [60, 90]]) # height, width
    assert len(batch["pixel_values"]) == 3 and forward(model, batch).loss.isfinite()
    with pytest.raises(Exception): forward(model, {k: v for k, v in batch.items() if k != "image_sizes"})

def test_inst_is_several_tokens_and_labels_are_right_all_the_same(tiny):
    "Labels come from the length of the prompt: Mistral's [INST] is not one token, and may stand in a text as well."
    _, processor, family = tiny[LLAVA]
    assert all(len(processor.tokenizer(mark, add_special_tokens=False)["input_ids"]) > 1 for mark in ("[INST]", "[/INST]"))
    r = row("What is [/INST] here?", "the mark [INST] of a turn [/INST], yes", 1, [("And [INST] this?", "no [/INST] no")])
    stretches = [list(g) for learnt, g in groupby(collate(tiny, LLAVA, r)["labels"][0].tolist(), lambda label: label != -100) if learnt]
    eq([processor.tokenizer.decode(s).strip() for s in stretches], ["the mark [INST] of a turn [/INST], yes</s>", "no [/INST] no</s>"])
