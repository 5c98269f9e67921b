"Labels, batches and the order of training: faults and edges."
import io, json, random
import pytest
from fastcore.test import test_eq as eq
from hypothesis import given, settings, strategies as st
from data_maker import make_base, make_data, picture, questions, row
from medchat import batches as module
from medchat.batches import Lessons, TokenCounter, VisionCollator, count_tokens, cut_step, make_labels, make_receipt, plan_steps, plan_turns, reply_spans, show_mask
from medchat.core import MedchatError
from medchat.curate import read_dataset
from medchat.families import FAMILIES, family_of
from medchat.messages import assistant_message, user_message
from medchat.models import load_model, same_sort

@pytest.fixture(scope="module")
def loaded():
    model, processor = load_model("tiny-qwen2-vl")
    return processor, family_of(model.config)

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A dataset folder of 12 images with three questions each."
    return make_data(tmp_path_factory.mktemp("source"), questions())

# -- labels

CONVERSATIONS = [
    ([user_message("Is it?", 1), assistant_message("yes")], [["yes"]], 1),
    ([user_message("Is it?", 2), assistant_message("yes"), user_message("Where?"), assistant_message("left, upper.\n\nSecond line"), user_message("Sure?"), assistant_message("no")], None, 2),
    ([user_message("No image at all?"), assistant_message("none")], None, 0),
    ([user_message("Ünïcode größer?", 1), assistant_message("β-Blocker → 5 µg, 心臓")], None, 1),
    ([user_message("assistant\nIs this a trick?", 1), assistant_message("assistant")], None, 1),
    ([user_message("yes yes yes", 1), assistant_message("yes yes yes"), user_message("yes"), assistant_message("yes")], None, 1)]

@pytest.mark.parametrize("messages, _, n", CONVERSATIONS)
def test_every_answer_with_its_end_is_learnt_and_nothing_else(loaded, messages, _, n):
    processor, family = loaded
    batch = VisionCollator(processor, family)([dict(id="x", messages=messages, images=[picture(k) for k in range(n)])])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert all(l in (-100, t) for t, l in zip(ids, labels))
    answers = [m["content"][0]["text"] + family.end_of_turn for m in messages if m["role"] == "assistant"]
    eq(processor.tokenizer.decode([l for l in labels if l != -100]), "".join(answers))
    special = set(processor.tokenizer.convert_tokens_to_ids([t for t in family.masked_tokens if t in processor.tokenizer.get_vocab()]))
    assert not special & set(labels)

def test_labels_survive_batching_and_padding(loaded):
    processor, family = loaded
    collate = VisionCollator(processor, family)
    rows = [dict(id=str(i), messages=m, images=[picture(k) for k in range(n)]) for i, (m, _, n) in enumerate(CONVERSATIONS)]
    batch = collate(rows)
    for k, row in enumerate(rows):
        alone = collate([row])
        n = alone["input_ids"].shape[1]
        eq(batch["input_ids"][k, :n].tolist(), alone["input_ids"][0].tolist()); eq(batch["labels"][k, :n].tolist(), alone["labels"][0].tolist())
        assert (batch["labels"][k, n:] == -100).all() and (batch["attention_mask"][k, n:] == 0).all()

def test_the_brackets_of_the_mask_hold_what_is_learnt(loaded):
    processor, family = loaded
    messages = CONVERSATIONS[1][0]
    shown = show_mask(processor, VisionCollator(processor, family)([dict(id="x", messages=messages, images=[picture(), picture()])]))
    eq([p for p, learnt in shown.pieces if learnt], [m["content"][0]["text"] + "<|im_end|>" for m in messages if m["role"] == "assistant"])
    assert "x16" in str(shown) and "<script" not in shown._repr_html_()
    hostile = show_mask(processor, VisionCollator(processor, family)([dict(id="x", messages=[user_message("<script>alert(1)</script>?"), assistant_message("<b>")], images=[])]))
    assert "<script" not in hostile._repr_html_() and "&lt;b&gt;" in hostile._repr_html_()

class Rewritten:
    "A processor whose chat template is another one."
    def __init__(self, processor, write): self.__dict__.update(tokenizer=processor.tokenizer, image_token_id=processor.image_token_id, write=write)
    def apply_chat_template(self, messages, tokenize, add_generation_prompt): return self.write(messages, add_generation_prompt)

def test_a_template_that_rewrites_the_past_is_refused(loaded):
    processor, family = loaded
    def write(messages, opened): # says at the top how many messages there are, as templates that drop old thoughts do
        return f"{len(messages)}\n" + "".join(f"{m['role']}:{m['content'][-1]['text']}<|im_end|>" for m in messages) + ("assistant:" if opened else "")
    with pytest.raises(MedchatError, match="not a prefix"): reply_spans(Rewritten(processor, write), family, CONVERSATIONS[1][0])

def test_a_template_that_never_closes_a_turn_is_refused(loaded):
    processor, family = loaded
    write = lambda messages, opened: "".join(f"{m['role']}:{m['content'][-1]['text']}\n" for m in messages) + ("assistant:" if opened else "")
    with pytest.raises(MedchatError, match="not a prefix"): reply_spans(Rewritten(processor, write), family, CONVERSATIONS[0][0])

def test_a_row_that_is_not_its_conversation_is_refused(loaded):
    processor, family = loaded
    ids = VisionCollator(processor, family)([dict(id="x", messages=CONVERSATIONS[0][0], images=[picture()])])["input_ids"][0].tolist()
    with pytest.raises(MedchatError, match="does not hold the conversation"): make_labels(processor, family, CONVERSATIONS[4][0], ids)

def test_rows_that_teach_nothing_or_everything_are_refused(loaded, monkeypatch):
    processor, family = loaded
    rows = [dict(id="good", messages=CONVERSATIONS[0][0], images=[picture()]), dict(id="bad-7", messages=[user_message("Only a question?", 0)], images=[])]
    with pytest.raises(MedchatError, match="nothing in a record would be learnt: bad-7"): VisionCollator(processor, family)(rows)
    monkeypatch.setattr(module, "make_labels", lambda p, f, m, ids: ids)
    with pytest.raises(MedchatError, match="everything in a record would be learnt: good"): VisionCollator(processor, family)(rows)

def test_nothing_is_cut(loaded):
    processor, family = loaded
    long = dict(id="long-1", messages=[user_message("word "*500, 1), assistant_message("yes")], images=[picture()])
    with pytest.raises(MedchatError, match=r"too long for the base: long-1: \d+ tokens, at most 300"): VisionCollator(processor, family, max_length=300)([long])
    assert VisionCollator(processor, family)([long])["input_ids"].shape[1] > 500

# -- several questions in one conversation

@pytest.mark.parametrize("turns", [1, 2, 3, 10])
def test_joined_turns_lose_and_repeat_nothing(data, turns):
    split = read_dataset(data)["train"]
    joined = Lessons(split, turns, seed=1)
    eq(sorted(i for row in joined for i in row["id"].split("+")), sorted(split["id"]))
    by_id = {r["id"]: r for r in split}
    for row in joined:
        ids = row["id"].split("+")
        assert len(ids) <= turns and len({i.split("-")[0] for i in ids}) == 1
        eq([p["text"] for m in row["messages"] if m["role"] == "assistant" for p in m["content"]], [by_id[i]["messages"][-1]["content"][0]["text"] for i in ids])
        eq([sum(p["type"] == "image" for p in m["content"]) for m in row["messages"]], [1] + [0]*(2*len(ids) - 1))
        eq(row["images"], by_id[ids[0]]["images"])
    eq([r["id"] for r in joined], [r["id"] for r in Lessons(split, turns, seed=1)])
    if turns == 2: assert [r["id"] for r in joined] != [r["id"] for r in Lessons(split, turns, seed=2)]

def test_the_same_file_name_is_not_the_same_image():
    pictures = [[dict(bytes=b"a", path="x.png")], [dict(bytes=b"b", path="x.png")], [], []]
    eq(sorted(plan_turns(pictures, 5)), [[0], [1], [2], [3]])

def test_the_questions_come_in_another_order_each_time(data):
    split = read_dataset(data)["train"]
    lessons = Lessons(split, 3, seed=1)
    times = [[lessons[i + k*len(lessons)] for i in range(len(lessons))] for k in range(8)]
    for one, *later in zip(*times): # the same questions, each with its answer, and the image first
        pairs = lambda row: [(q["content"][-1]["text"], a["content"][0]["text"]) for q, a in zip(row["messages"][::2], row["messages"][1::2])]
        for again in later:
            eq((sorted(again["id"].split("+")), sorted(pairs(again)), again["images"]), (sorted(one["id"].split("+")), sorted(pairs(one)), one["images"]))
            eq([sum(p["type"] == "image" for p in m["content"]) for m in again["messages"]], [1] + [0]*(len(again["messages"]) - 1))
        if "+" in one["id"]: assert len({r["id"] for r in (one, *later)}) > 1
    eq(times[3], [Lessons(split, 3, seed=1)[i + 3*len(lessons)] for i in range(len(lessons))]) # whoever reads it: a run goes on with the same
    eq([r["id"] for r in lessons], [r["id"] for r in times[0]])
    with pytest.raises(IndexError): lessons[-1]

def test_lessons_tell_who_has_images(tmp_path):
    data = make_data(tmp_path, [row(f"r{i}", [("Why?", "so")], [f"{i}.png"] if i % 3 else []) for i in range(9)])
    split = read_dataset(data)["train"]
    for turns in (1, 4):
        joined = Lessons(split, turns)
        eq([len(r["images"]) for r in joined], joined.sees)

# -- the order of training

@st.composite
def tasks(draw):
    n = draw(st.integers(1, 60))
    mixes = draw(st.booleans())
    seeing = [draw(st.booleans()) for _ in range(n)]
    sorts = [list(range(n))] if mixes else [s for s in ([i for i in range(n) if seeing[i] == b] for b in (True, False)) if s]
    passes, world, each = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    return dict(lengths=[draw(st.integers(1, 400)) for _ in range(n)], sorts=sorts, size=passes*world*each, least=passes*world, seed=draw(st.integers(0, 9))), passes, world

@given(tasks())
def test_a_plan_goes_through_every_row_once_and_never_mixes(task):
    plan, _, _ = task
    steps = plan_steps(**plan)
    sort_of = {i: k for k, sort in enumerate(plan["sorts"]) for i in sort}
    for step in steps:
        eq(len({sort_of[i] for i in step}), 1)
        assert plan["least"] <= len(step) < plan["size"] + plan["least"] # fewer rows than every process and pass needs join the step before
    for sort in plan["sorts"]:
        seen = sorted(i for step in steps for i in step if i in set(sort))
        eq(seen, sorted(sort * -(-plan["least"] // len(sort)))) # once; a sort with fewer rows than one step needs: as often as it must
    eq(steps, plan_steps(**plan))
    longest = max(max(plan["lengths"][i] for i in step) for step in steps)
    eq(max(plan["lengths"][i] for i in steps[0]), longest) # what does not fit fails at once

@given(tasks(), st.integers(1, 40))
def test_a_longer_plan_begins_anew_only_when_all_rows_had_their_turn(task, count):
    plan, _, _ = task
    once = len(plan_steps(**plan))
    steps = plan_steps(**plan, count=count)
    eq(len(steps), count)
    if count >= 2*once: # the longest step goes to the front, the others keep their order: each row comes at least once in the first round and a step
        n, rows = len(plan["lengths"]), {i for sort in plan["sorts"] for i in sort}
        eq({i % n for step in steps[:once + 1] for i in step}, rows)
        eq({i for step in steps for i in step if i < n}, rows) # the first time; the rows of the second are counted on
        assert max(i for step in steps for i in step) < n * -(-count // once)

@given(tasks())
def test_a_step_holds_the_same_rows_however_it_is_cut(task):
    plan, passes, world = task
    for step in plan_steps(**plan):
        parts = [part for rank in range(world) for part in cut_step(step, passes, rank, world)]
        eq(sorted(i for part in parts for i in part), sorted(step))
        assert all(parts) and max(map(len, parts)) - min(map(len, parts)) <= 2, parts # no process waits for another, none has nothing to do
        eq(len(parts), passes*world)

@settings(max_examples=30)
@given(st.integers(60, 400), st.sampled_from([2, 4, 8]), st.integers(0, 99))
def test_rows_of_a_step_are_of_similar_length(n, size, seed):
    chooser = random.Random(seed)
    lengths = [chooser.randint(10, 500) for _ in range(n)]
    waste = lambda steps: sum(max(lengths[i] for i in s)*len(s) - sum(lengths[i] for i in s) for s in steps)
    assert waste(plan_steps(lengths, [list(range(n))], size, seed=seed)) < .35*waste([list(range(n))[k:k+size] for k in range(0, n, size)])

def test_another_seed_is_another_order():
    one, other = (plan_steps([1]*40, [list(range(40))], 4, seed=s) for s in (1, 2))
    assert one != other and sorted(map(sorted, one)) != sorted(map(sorted, other))

# -- counting tokens

SIZES = [(112, 112), (1, 1), (1, 200), (3, 500), (56, 200), (113, 139), (640, 480), (1023, 769), (2000, 40)]

@pytest.mark.parametrize("base", ["tiny-qwen2-vl", "tiny-llama-3.2-vision", "tiny-llava-1.6"])
def test_counted_is_what_the_processor_makes(base):
    from medchat.blueprints import BLUEPRINTS
    processor, family = BLUEPRINTS[base].make_processor(), BLUEPRINTS[base].family
    collate, counter = VisionCollator(processor, family), TokenCounter(processor)
    rows = [dict(id=str(k), messages=[user_message("What is seen?", 1), assistant_message("a nodule")], images=[picture(size=size)]) for k, size in enumerate(SIZES)]
    rows += [dict(id="two", messages=[user_message("Compare.", 2), assistant_message("the same")], images=[picture(size=(112, 112)), picture(size=(640, 480))]),
             dict(id="none", messages=[user_message("Ünïcode 心臓?"), assistant_message("β"), user_message("Sure?"), assistant_message("yes")], images=[])]
    for r in rows:
        try: made = collate([r])
        except ValueError as e: # Qwen2-VL reads nothing that is 200 times longer than wide
            assert "aspect ratio" in str(e) and 200 < max(r["images"][0].size)/min(r["images"][0].size); continue
        eq((r["id"], counter.row(r)), (r["id"], int(made["attention_mask"].sum())))
    assert len(counter.known) <= len(SIZES) # each size once

def test_a_turned_photograph_is_counted_as_it_will_be_seen(loaded):
    processor, family = loaded
    exif = picture().getexif(); exif[0x0112] = 6 # turn it by a quarter
    picture(size=(224, 56)).save(file := io.BytesIO(), "JPEG", exif=exif)
    r = dict(id="x", messages=[user_message("What?", 1), assistant_message("a")], images=[dict(bytes=file.getvalue(), path="x.jpg")])
    eq(TokenCounter(processor).row(r), int(VisionCollator(processor, family)([r])["attention_mask"].sum()))

def test_a_record_that_is_too_long_is_named_while_counting(loaded, tmp_path):
    split = read_dataset(make_data(tmp_path, [row(f"r{i}", [(f"Why {i}?" if i != 37 else "why "*300, "so")]) for i in range(60)]))["train"]
    with pytest.raises(MedchatError, match=r"too long for the base: r37: \d+ tokens, at most 200"): count_tokens(loaded[0], split, 200)
    lengths = count_tokens(loaded[0], split)
    eq((len(lengths), lengths.index(max(lengths))), (60, 37))

# -- the receipt

def test_the_receipt_refuses_a_wrong_count(loaded, data):
    processor, family = loaded
    rows = Lessons(read_dataset(data)["train"])
    lengths = count_tokens(processor, rows)
    assert "| tokens in a conversation |" in make_receipt(VisionCollator(processor, family), rows, lengths, {})
    with pytest.raises(MedchatError, match="another number of tokens than was counted"): make_receipt(VisionCollator(processor, family), rows, [n + 1 for n in lengths], {})

def test_the_longest_conversation_is_looked_at(loaded, tmp_path):
    rows = Lessons(read_dataset(make_data(tmp_path, [row(f"r{i}", [(f"Why {i}?", "so " * (400 if i == 53 else 1))]) for i in range(90)]))["train"])
    lengths = count_tokens(loaded[0], rows)
    assert str(max(lengths)) in make_receipt(VisionCollator(*loaded), rows, lengths, {}) and max(lengths) > 300
    broken = VisionCollator(*loaded, max_length=300)
    with pytest.raises(MedchatError, match="too long for the base: r53"): make_receipt(broken, rows, lengths, {})

# -- a family that does not mix

def test_with_and_without_images_apart_where_the_family_wants_it(tmp_path):
    from medchat.blueprints import BLUEPRINTS
    blueprint = BLUEPRINTS["tiny-llama-3.2-vision"]
    rows = [dict(id="a", messages=[user_message("Is it?", 1), assistant_message("yes")], images=[picture()]), dict(id="b", messages=[user_message("Is it?"), assistant_message("yes")], images=[])]
    with pytest.raises(MedchatError, match="llama-3.2-vision cannot hold conversations with different numbers of images: a, b. Group them with plan_steps"): VisionCollator(blueprint.make_processor(), blueprint.family)(rows)
    eq(same_sort(blueprint.family, [r["images"] for r in rows]), [[0], [1]])
    eq(same_sort(FAMILIES["qwen2-vl"], [r["images"] for r in rows]), [[0, 1]])
