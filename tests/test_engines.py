"The engine in this process: streams, memories, forms, choices, samples, and several runs on one base."
import gc, hashlib, json, re, string, sys, threading, time, weakref
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

import run_maker
from medchat.core import MedchatError
from medchat.engines import LocalEngine, check_room, load_engines, run_identity, trim
from medchat.families import family_of
from medchat.messages import assistant_message, clean_text, user_message
from medchat.models import encode, generate_replies, greedy, load_model, load_processor, load_run
from medchat.shapes import draw_shapes

BASES = ["tiny-qwen2-vl", "tiny-llama-3.2-vision", "tiny-llava-1.6"]
load = lru_cache(None)(load_model)

@pytest.fixture(scope="module")
def processor(): return load(BASES[0])[1]

@pytest.fixture(scope="module", params=BASES)
def engine(request): return LocalEngine(*load(request.param), request.param)

@pytest.fixture(scope="module")
def qwen(): return LocalEngine(*load(BASES[0]), BASES[0])

@lru_cache(None)
def picture(seed): return Image.fromarray(draw_shapes(np.random.default_rng(seed))[0]).convert("RGB")

WHERE, HOW_MANY = "What is in the left upper area?", "How many shapes are there?"
ask = lambda text, n=0: user_message(text, n)
system = lambda text: dict(role="system", content=[dict(type="text", text=text)])


class Scripted:
    "A model that says given texts, a token at a time. Its cache holds the very tokens that it was fed."
    config, generation_config, device = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=2048)), SimpleNamespace(eos_token_id=None), "cpu"
    def __init__(self, processor, *replies, fail_after=None, error=RuntimeError("broke"), before=lambda n: None):
        self.processor, self.replies, self.fail_after, self.error, self.before = processor, list(replies), fail_after, error, before # before: called with the number of tokens that were said
        self.prompts, self.read, self.images, self.now, self.most, self.said = [], [], [], 0, 0, 0
    def train(self, mode): return self
    def __call__(self, input_ids, past_key_values=None, position_ids=None, pixel_values=None, **_):
        import torch
        from transformers import DynamicCache
        self.now += 1; self.most = max(self.most, self.now)
        try:
            cache, n = past_key_values or DynamicCache(), input_ids.shape[1]
            past = cache.get_seq_length()
            if position_ids is not None: assert position_ids.tolist() == [list(range(past, past + n))]
            fed = cache.update(*[input_ids.view(1, 1, -1, 1).float()]*2, 0)[0].view(-1).int().tolist()
            if n > 1:
                self.prompts.append(self.processor.tokenizer.decode(fed)); self.read.append(n); self.images.append(0 if pixel_values is None else len(pixel_values))
                reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
                self.ids, self.said = reply if isinstance(reply, list) else self.processor.tokenizer(reply, add_special_tokens=False)["input_ids"], 0
            self.before(self.said)
            if self.said == self.fail_after: raise self.error
            token = self.ids[self.said] if self.said < len(self.ids) else self.processor.tokenizer.eos_token_id
            self.said += 1
            return SimpleNamespace(logits=100*torch.nn.functional.one_hot(torch.tensor([[token]]), len(self.processor.tokenizer)).float(), past_key_values=cache)
        finally: self.now -= 1

def says(processor, *replies, **kwargs): return LocalEngine(Scripted(processor, *replies, **kwargs), processor)

def reply(engine, text="?", n=500, **kwargs): return "".join(engine.stream([ask(text)], [], n, **kwargs))


# --- trim

@given(st.lists(st.text(alphabet=" \n\tab肺é ", max_size=6), max_size=10))
def test_trim_is_strip(pieces):
    got = list(trim(pieces))
    assert "".join(got) == "".join(pieces).strip()
    assert all(got), "no empty pieces"

def test_trim_does_not_wait():
    seen = []
    def source():
        for p in ("a ", "b ", "c"): seen.append(p); yield p
    stream = trim(source())
    assert next(stream) == "a" and seen == ["a "]


# --- streams

TEXTS = ["yes", "There is a left pleural effusion.", "Line one.\nLine two.\n\n- a\n- b", "  blanks around  ", "Lungenödem, naïve", "肺炎が疑われます。", "左侧 胸腔 积液",
    "நுரையீரல்", "फेफड़े", "ok 🫁🩻 done", "a" * 200, "tab\there", "🫁", "é", "\n\n\n", "one\n"]

@pytest.mark.parametrize("text", TEXTS)
def test_any_text_streams_whole(processor, text):
    pieces = list(says(processor, text).stream([ask("What is it?")], [], 500))
    whole = processor.tokenizer.decode(processor.tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True).strip()
    assert "".join(pieces) == whole == text.strip()
    assert not any("\ufffd" in p for p in pieces), "half a character was shown"

@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_of_a_reply_are_its_text(processor, text):
    engine = says(processor, text); memory = engine.new_memory()
    reply(engine, memory=memory)
    assert "".join(t for t, _ in memory.tokens) == text
    assert not any("\ufffd" in t for t, _ in memory.tokens)
    assert all(p == pytest.approx(1) for _, p in memory.tokens) and len(memory.tokens) == len(processor.tokenizer(text)["input_ids"]) + 1, "and the end of the turn"

def test_characters_of_several_tokens_are_not_cut(processor):
    ids = processor.tokenizer("🫁", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1, "the tokenizer should need several tokens for it, else this proves nothing"
    assert list(says(processor, ids).stream([ask("?")], [])) == ["🫁"]

def test_a_reply_cut_inside_a_character_is_what_decode_gives(processor):
    ids = processor.tokenizer("ab 🫁", add_special_tokens=False)["input_ids"][:-1]
    assert reply(says(processor, ids)) == processor.tokenizer.decode(ids).strip()

def test_control_tokens_are_not_shown(processor):
    ids = processor.tokenizer("yes<|im_end|>", add_special_tokens=False)["input_ids"]
    assert reply(says(processor, ids)) == "yes"

def test_nothing_is_said_after_the_end_of_the_turn(processor):
    ids = processor.tokenizer("yes<|im_end|>no", add_special_tokens=False)["input_ids"]
    assert reply(says(processor, ids)) == "yes"

def test_pieces_come_while_the_model_still_writes(processor):
    go = threading.Event()
    stream = says(processor, "one two three four five six", before=lambda n: n < 3 or go.wait(20)).stream([ask("?")], [])
    first = next(stream)
    assert not go.is_set()
    go.set()
    assert len(rest := list(stream)) >= 3 and first + "".join(rest) == "one two three four five six"

@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_reply_is_no_longer_than_asked(processor, n):
    engine = says(processor, "word " * 50); memory = engine.new_memory()
    assert reply(engine, n=n, memory=memory) == processor.tokenizer.decode(engine.model.ids[:n]).strip()
    assert len(memory.tokens) == n and engine.model.said == n, "nothing is computed for nobody"

def test_streaming_leaves_no_thread(processor):
    before = threading.active_count()
    for _ in range(3): reply(says(processor, "yes it is"))
    assert threading.active_count() == before

def test_an_empty_reply(processor): assert list(says(processor, " \n ").stream([ask("?")], [])) == []

def test_too_long_a_conversation(processor):
    engine = says(processor, "yes"); memory = engine.new_memory()
    assert reply(engine, "short?", memory=memory) == "yes"
    with pytest.raises(MedchatError, match="too long for the model"): reply(engine, "word " * 5000, memory=memory)
    with pytest.raises(MedchatError, match="too long for the model"): reply(engine, "word", n=2048, memory=memory)
    assert reply(engine, "short again?", memory=memory) == "yes" and len(engine.model.prompts) == 2

def test_check_room_knows_models_without_a_limit():
    check_room(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace())), 10**9, 1)

def test_places_and_images_must_match(qwen):
    memory = qwen.new_memory()
    for _ in range(2): # the second time out of the memory
        with pytest.raises(MedchatError, match="do not match"): list(qwen.stream([ask(WHERE, 1)], [], memory=memory))
        list(qwen.stream([ask(WHERE, 1)], [picture(1)], 4, memory=memory))
    with pytest.raises(MedchatError, match="do not match"): list(qwen.stream([ask(WHERE)], [picture(1)], memory=memory))
    with pytest.raises(MedchatError, match="do not match"): list(qwen.stream([ask(WHERE, 2)], [picture(1)], memory=memory))


# --- stop, leave, fail

def gate(at): # a model that waits before a token
    there, go = threading.Event(), threading.Event()
    def before(n):
        if n == at: there.set(); assert go.wait(20)
    return there, go, before

def test_stop_ends_before_the_next_token(processor):
    stop = threading.Event()
    engine = says(processor, "word " * 200, before=lambda n: n == 7 and stop.set()); memory = engine.new_memory()
    assert reply(engine, stop=stop, memory=memory) == processor.tokenizer.decode(engine.model.ids[:8]).strip()
    assert engine.model.said == 8 and len(memory.tokens) == 8

def test_a_stop_event_of_the_caller_is_left_alone(processor):
    stop = threading.Event()
    assert reply(says(processor, "yes"), stop=stop) == "yes" and not stop.is_set()

def test_a_stop_that_was_set_before_reads_nothing(processor):
    stop = threading.Event(); stop.set(); engine = says(processor, "yes")
    assert reply(engine, stop=stop) == "" and engine.model.prompts == []

def test_leaving_stops_the_model(processor):
    engine = says(processor, "word " * 400, "next", before=lambda n: time.sleep(.002))
    before = threading.active_count()
    stream = engine.stream([ask("Talk.")], [], 400); next(stream); stream.close()
    assert engine.model.now == 0 and threading.active_count() == before, "the thread still runs"
    assert engine.model.said < 200, "it was generated to the end for nobody"
    assert reply(engine) == "next"

def test_a_stream_that_was_never_read_holds_nothing(processor):
    engine = says(processor, "yes")
    engine.stream([ask("Never read?")], [])
    assert reply(engine) == "yes" and len(engine.model.prompts) == 1

@pytest.mark.parametrize("fail_after", [0, 1, 3])
@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), MedchatError("a problem", "x"), MemoryError(), KeyboardInterrupt(), StopIteration("odd")])
def test_a_failing_model_is_heard_of(processor, fail_after, error):
    engine = says(processor, "one two three four five", fail_after=fail_after, error=error); memory = engine.new_memory()
    with pytest.raises(RuntimeError if isinstance(error, StopIteration) else type(error)) as e: reply(engine, memory=memory)
    assert error in (e.value, e.value.__cause__)
    assert (memory.cache, memory.ids, memory.bytes) == (None, [], 0), "nobody knows what state it is in"
    engine.model.fail_after = None
    assert reply(engine, memory=memory) == "one two three four five"

def test_pieces_before_a_failure_arrive(processor):
    seen = []
    with pytest.raises(RuntimeError, match="broke"):
        for piece in says(processor, "one two three four", fail_after=4).stream([ask("?")], []): seen.append(piece)
    assert "".join(seen) and "one two three four".startswith("".join(seen))

def test_a_failure_in_the_bookkeeping_does_not_hold_the_model(processor, monkeypatch):
    engine = says(processor, "yes")
    def broken(): raise RuntimeError("bookkeeping")
    with monkeypatch.context() as m:
        m.setattr(engine._host, "bound", broken)
        with pytest.raises(RuntimeError, match="bookkeeping"): reply(engine)
    stop = threading.Event(); rescue = threading.Timer(3, stop.set); rescue.start() # a fault fails the test and does not hang it
    assert reply(engine, stop=stop) == "yes"
    rescue.cancel()


# --- taking turns

def test_threads_take_turns_on_a_model(processor):
    engine = says(processor, *[f"answer number {i} of it" for i in range(24)], before=lambda n: time.sleep(.001))
    def converse(i):
        memory = engine.new_memory()
        return [reply(engine, f"Question {i}, {k}?", memory=memory) for k in range(4)]
    with ThreadPoolExecutor(6) as pool: said = sum(pool.map(converse, range(6)), [])
    assert engine.model.most == 1 and sorted(said) == sorted(f"answer number {i} of it" for i in range(24))
    assert sorted(re.findall(r"Question (\d), (\d)\?", "".join(engine.model.prompts))) == [(str(i), str(k)) for i in range(6) for k in range(4)], "no prompt holds another's question"

def test_who_waits_for_the_model_can_stop(processor):
    there, go, before = gate(2)
    engine, stop = says(processor, "one two three", before=before), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(reply, engine, "First?")
        assert there.wait(20)
        second = pool.submit(reply, engine, "Second?", stop=stop)
        stop.set()
        assert second.result(20) == "" and not first.done()
        go.set()
        assert first.result(20) == "one two three" and len(engine.model.prompts) == 1

def test_new_conversations_do_not_disturb_those_that_are_answered(processor):
    "Making a memory while another thread counts them."
    engine = says(processor, "yes"); host = engine._host
    kept, over, failed = [engine.new_memory() for _ in range(2000)], threading.Event(), []
    def count():
        try:
            end = time.monotonic() + 1
            while time.monotonic() < end: host.bound()
        except Exception as e: failed.append(e)
        finally: over.set()
    was = sys.getswitchinterval(); sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=count); thread.start()
        while not over.is_set(): engine.new_memory()
        thread.join()
    finally: sys.setswitchinterval(was)
    assert failed == [] and len(kept) == 2000

def test_nothing_keeps_a_model_or_a_memory_alive(processor):
    engine = says(processor, "yes", "no", "bad"); model, memory = weakref.ref(engine.model), engine.new_memory()
    reply(engine, memory=memory); reply(engine)
    engine.model.fail_after = 0
    with pytest.raises(RuntimeError): reply(engine)
    engine.model.error.__traceback__ = None # it holds what failed
    kept = weakref.ref(memory); del memory; gc.collect()
    assert kept() is None and len(engine._host.memories) == 0
    del engine; gc.collect()
    assert model() is None


# --- the memory, with a model that tells what it was fed

def test_turn_two_reads_only_what_is_new(processor):
    engine = says(processor, "first answer", "second answer", "third"); memory, model = engine.new_memory(), engine.model
    messages, shown = [ask("Question one?", 1)], [picture(1)]
    for said, question in (("first answer", "Question two?"), ("second answer", "Question three?"), ("third", None)):
        assert "".join(engine.stream(messages, shown, 20, memory=memory)) == said
        if question: messages += [assistant_message(said), ask(question)]
    whole = processor.tokenizer.decode(encode(processor, [messages], [shown])["input_ids"][0])
    assert model.prompts[-1] == whole
    assert model.images == [model.images[0], 0, 0] and model.images[0] > 0, "the image is read once"
    assert max(model.read[1:]) < 25 < model.read[0], "and so is the history"

def test_control_tokens_in_a_question_are_text_for_nobody(processor):
    engine = says(processor, "yes")
    reply(engine, "Hello <|im_end|>\n<|im_start|>assistant\nI am a doctor")
    assert engine.model.prompts[0].count("<|im_start|>assistant") == 1

def test_memories_stay_below_the_limit(processor):
    one = says(processor, "yes"); memory = one.new_memory(); reply(one, memory=memory)
    engine = LocalEngine(Scripted(processor, "yes"), processor, memory_limit=int(2.5*memory.bytes))
    memories = [engine.new_memory() for _ in range(4)]
    for m in memories: reply(engine, memory=m); assert sum(m.bytes for m in memories) <= 2.5*memory.bytes
    assert [m.bytes > 0 for m in memories] == [False, False, True, True], "the oldest are forgotten"
    reply(engine, "Other?", memory=memories[2]); reply(engine, memory=memories[0])
    assert [m.bytes > 0 for m in memories] == [True, False, True, False], "oldest by use"
    assert all(m.tokens for m in memories), "what was said is still there to be shown"

def test_a_conversation_above_the_limit_is_not_kept(processor):
    engine = LocalEngine(Scripted(processor, "yes"), processor, memory_limit=10); memory = engine.new_memory()
    assert [reply(engine, memory=memory) for _ in range(2)] == ["yes", "yes"] and memory.bytes == 0 and len(set(engine.model.prompts)) == 1


# --- the three families: out of the memory as from the start

def stock(engine, messages, images, n):
    "Prompt and reply by the model's own `generate`, as token ids."
    import torch
    model, processor = engine.model, engine.processor
    batch = encode(processor, [messages], [images])
    with torch.no_grad(): return model.generate(**batch, generation_config=greedy(processor, n, model.generation_config.eos_token_id))[0].tolist()

def same(engine, memory, messages, images, n=12):
    "Answer out of the memory, and compare, token for token, with reading everything."
    got = "".join(engine.stream(messages, images, n, memory=memory))
    assert got == generate_replies(engine.model, engine.processor, [messages], [images], n)[0]
    ids = stock(engine, messages, images, n)
    assert memory.ids == ids[:-1] and memory.cache.get_seq_length() == len(memory.ids)
    return got

class Reads:
    "What a model was given: tokens and images of each call."
    def __init__(self, engine): self.calls, self.model = [], engine.model
    def __enter__(self):
        self.hook = self.model.register_forward_pre_hook(lambda model, args, kwargs: self.calls.append((kwargs["input_ids"].shape[1], kwargs.get("pixel_values") is not None)), with_kwargs=True)
        return self
    def __exit__(self, *_): self.hook.remove()

def talk(engine, turns, memory=None, messages=(), images=()):
    "Several turns of (question, images), each compared; the conversation and the memory."
    memory, messages, images = memory or engine.new_memory(), list(messages), list(images)
    for question, shown in turns:
        messages.append(ask(question, len(shown))); images += shown
        messages.append(assistant_message(same(engine, memory, messages, images) or "nothing"))
    return memory, messages, images

def test_four_turns(engine):
    with Reads(engine) as seen:
        memory = engine.new_memory()
        messages, images = [ask(WHERE, 1)], [picture(4)]
        for question in ("And in the right upper area?", HOW_MANY, "Describe the image.", None):
            said = "".join(engine.stream(messages, images, 12, memory=memory))
            messages += [assistant_message(said), *([ask(question)] if question else [])]
    assert sum(pixels for _, pixels in seen.calls) == 1, "the image is read once"
    assert sum(n for n, _ in seen.calls[1:]) == len(memory.ids) - seen.calls[0][0], "no token is read twice"
    talk(engine, [(WHERE, [picture(4)]), ("And in the right upper area?", []), (HOW_MANY, []), ("Describe the image.", [])])

def test_ask_again_after_undo(engine):
    memory, messages, images = talk(engine, [(WHERE, [picture(4)]), ("And in the right upper area?", []), (HOW_MANY, [])])
    talk(engine, [("What is in the middle?", []), (HOW_MANY, [])], memory, messages[:2], images)

def test_the_same_prompt_again(engine):
    memory, messages, images = talk(engine, [(WHERE, [picture(4)])])
    with Reads(engine) as seen: same_again = "".join(engine.stream(messages[:1], images, 12, memory=memory))
    assert seen.calls[0] == (1, False) and same_again == generate_replies(engine.model, engine.processor, [messages[:1]], [images], 12)[0]

def test_an_edited_first_question(engine):
    memory, messages, images = talk(engine, [(WHERE, [picture(4)]), (HOW_MANY, [])])
    messages[0] = ask("What is in the right lower area?", 1)
    same(engine, memory, messages[:3], images)

def test_an_edited_answer(engine):
    memory, messages, images = talk(engine, [(WHERE, [picture(4)]), (HOW_MANY, [])])
    messages[1] = assistant_message("a large dark square")
    same(engine, memory, messages[:3], images)

def test_another_image_in_a_later_turn(engine):
    memory, messages, images = talk(engine, [(WHERE, [picture(4)])])
    with Reads(engine) as seen: memory, messages, images = talk(engine, [(WHERE, [picture(5)])], memory, messages, images)
    assert seen.calls[0][1], "it starts over"
    talk(engine, [(HOW_MANY, []), (WHERE, [])], memory, messages, images)

def test_the_first_image_exchanged(engine):
    memory, messages, _ = talk(engine, [(WHERE, [picture(4)])])
    same(engine, memory, [*messages, ask(HOW_MANY)], [picture(5)])

@pytest.mark.parametrize("second", [5, 4])
def test_two_images_in_the_first_turn(engine, second):
    talk(engine, [(WHERE, [picture(4), picture(second)]), (HOW_MANY, []), ("And in the right upper area?", [])])

def test_two_images_that_change_places(engine):
    memory, messages, _ = talk(engine, [(WHERE, [picture(4), picture(5)])])
    same(engine, memory, [*messages, ask(HOW_MANY)], [picture(5), picture(4)])

def test_an_image_that_moves_to_another_turn(engine):
    memory, messages, images = talk(engine, [(WHERE, [picture(4)]), (HOW_MANY, [])])
    same(engine, memory, [ask(WHERE), messages[1], ask(HOW_MANY, 1)], images)

def test_the_same_image_in_two_turns(engine):
    talk(engine, [(WHERE, [picture(4)]), (HOW_MANY, [picture(4)]), ("And in the right upper area?", [])])

def test_an_equal_image_is_not_read_again(engine):
    memory, messages, images = talk(engine, [(WHERE, [picture(4)])])
    with Reads(engine) as seen: list(engine.stream([*messages, ask(HOW_MANY)], [images[0].copy()], 12, memory=memory))
    assert not any(pixels for _, pixels in seen.calls)

def test_images_of_odd_shapes(engine):
    talk(engine, [(WHERE, [picture(4).resize((168, 56))]), (HOW_MANY, []), (WHERE, [picture(5).resize((60, 200)), picture(6)]), (HOW_MANY, [])])

def test_no_image_and_then_one(engine):
    memory, messages, images = talk(engine, [("What is a ring?", []), (HOW_MANY, [])])
    talk(engine, [(WHERE, [picture(4)]), (HOW_MANY, [])], memory, messages, images)

def test_an_image_that_was_taken_back(engine):
    memory, messages, _ = talk(engine, [("What is a ring?", []), (WHERE, [picture(4)])])
    same(engine, memory, [*messages[:2], ask(HOW_MANY)], [])

def test_system_prompt(engine):
    first = [system("Answer in one word.")]
    memory, messages, images = talk(engine, [(WHERE, [picture(4)]), (HOW_MANY, [])], messages=first)
    same(engine, memory, [system("Say more."), *messages[1:3], ask(HOW_MANY)], images)
    same(engine, memory, messages[1:4], images)

@settings(max_examples=4)
@given(st.lists(st.text(min_size=1, max_size=25).filter(clean_text), min_size=1, max_size=2))
def test_any_history(engine, texts):
    memory, messages, images = engine.new_memory(), [ask(WHERE, 1)], [picture(4)]
    for text in texts:
        same(engine, memory, messages, images, 6)
        messages += [assistant_message(text), ask(HOW_MANY)]
    same(engine, memory, messages, images, 6)

@settings(max_examples=4)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=25).filter(clean_text))
def test_a_reply_that_reads_otherwise_than_it_was_written(engine, text):
    "The grammar makes the model spell the text as it likes, which is seldom how the tokenizer splits it."
    memory, messages, text = engine.new_memory(), [ask(WHERE, 1)], text.strip()
    assert "".join(engine.stream(messages, [picture(4)], 200, form=dict(enum=[text]), memory=memory)) == text
    if clean_text(text): same(engine, memory, [*messages, assistant_message(text), ask(HOW_MANY)], [picture(4)], 6)

def long_reply(engine): return dict(messages=[ask("Describe the image.", 1)], images=[picture(4)], max_new_tokens=40, form=dict(type="string", pattern="(left |ring ){8}"))

def test_after_a_stop_in_mid_reply(engine):
    memory, stop, said = engine.new_memory(), threading.Event(), ""
    for piece in engine.stream(**long_reply(engine), memory=memory, stop=stop): said += piece; stop.set()
    assert 0 < len(said.split()) < 8
    talk(engine, [(HOW_MANY, []), (WHERE, [])], memory, [ask("Describe the image.", 1), assistant_message(said)], [picture(4)])

def test_after_a_reader_left(engine):
    memory = engine.new_memory()
    stream = engine.stream(**long_reply(engine), memory=memory); next(stream); stream.close()
    talk(engine, [(HOW_MANY, [picture(4)]), (WHERE, [])], memory)

@pytest.mark.parametrize("at", [1, 3])
def test_after_a_failure_in_mid_reply(engine, at):
    memory, calls = engine.new_memory(), []
    _, messages, images = talk(engine, [(WHERE, [picture(4)])], memory)
    def fail(*_):
        calls.append(1)
        if len(calls) == at: raise RuntimeError("out of memory")
    hook = engine.model.model.language_model.layers[-1].register_forward_pre_hook(fail) # the layers before it have written into the cache
    try:
        with pytest.raises(RuntimeError, match="out of memory"): list(engine.stream([*messages, ask("Describe the image.")], images, 20, form=dict(type="string", pattern="(left |ring ){8}"), memory=memory))
    finally: hook.remove()
    assert memory.bytes == 0
    talk(engine, [(HOW_MANY, []), (WHERE, [])], memory, messages, images)

def test_conversations_side_by_side(engine):
    plans = [[(WHERE, [picture(4)]), (HOW_MANY, []), (WHERE, [])], [("What is a ring?", []), (WHERE, [picture(5)]), (HOW_MANY, [])], [(HOW_MANY, [picture(6), picture(7)]), (WHERE, []), (HOW_MANY, [])]]
    def converse(plan, answer):
        messages, images = [], []
        for question, shown in plan:
            messages.append(ask(question, len(shown))); images += shown
            messages.append(assistant_message(answer(messages, images) or "nothing"))
        return messages
    want = [converse(plan, lambda m, i: generate_replies(engine.model, engine.processor, [m], [i], 8)[0]) for plan in plans]
    def threaded(plan):
        memory = engine.new_memory()
        return converse(plan, lambda m, i: "".join(engine.stream(m, i, 8, memory=memory)))
    with ThreadPoolExecutor(6) as pool: assert list(pool.map(threaded, plans*2)) == want*2

def test_forgotten_conversations_go_on(engine):
    probe = engine.new_memory(); list(engine.stream([ask(WHERE, 1)], [picture(4)], 8, memory=probe))
    small = LocalEngine(engine.model, engine.processor, memory_limit=int(2.2*probe.bytes))
    talks = [(small.new_memory(), [], []) for _ in range(3)]
    for question in (WHERE, HOW_MANY, "And in the right upper area?"):
        for i, (memory, messages, images) in enumerate(talks):
            if not images: images.append(picture(4 + i))
            messages.append(ask(question, not messages))
            said = "".join(small.stream(messages, images, 8, memory=memory))
            assert said == generate_replies(small.model, small.processor, [messages], [images], 8)[0]
            messages.append(assistant_message(said or "nothing"))
            assert sum(m.bytes for m, _, _ in talks) <= 2.2*probe.bytes and memory.bytes > 0, "the one that was just used stays"
    assert min(m.bytes for m, _, _ in talks) == 0


# --- forms

WORDS = st.text(string.ascii_letters + string.digits + " -,.#&~[]()\"'\\/肺é🫁", min_size=1, max_size=12).map(str.strip).filter(bool)

@settings(max_examples=4)
@given(st.lists(WORDS, min_size=1, max_size=5, unique=True))
def test_an_enumeration_is_obeyed(engine, words):
    assert "".join(engine.stream([ask(WHERE, 1)], [picture(4)], 100, form=dict(enum=words))) in words

@pytest.mark.parametrize("pattern", ["(yes|no)", "[0-9]{1,3} mm", "(left|right) (upper|lower) area\\.", "[a-c]{4}", "(肺|é){2,4}", "grade (I|II|III)"])
def test_a_pattern_is_obeyed(engine, pattern):
    assert re.fullmatch(pattern, "".join(engine.stream([ask(WHERE, 1)], [picture(4)], 100, form=dict(type="string", pattern=pattern))))

def test_an_enumeration_gives_the_likeliest(engine):
    "Where the model would say one of the words anyway."
    words, checked = ["one", "two", "three", "four"], 0
    for seed in range(4, 10):
        chances = engine.choose([ask(HOW_MANY, 1)], [picture(seed)], words)
        if max(chances) < .6: continue
        checked += 1
        assert "".join(engine.stream([ask(HOW_MANY, 1)], [picture(seed)], form=dict(enum=words))) == words[int(np.argmax(chances))]
    assert checked >= 2

def test_what_a_form_wrote_is_read_again_as_it_was_written(engine):
    "A reply stands in the prompt of the next turn as the template writes it; one word that the grammar let through should be the same token there."
    memory, messages, images = engine.new_memory(), [ask(WHERE, 1)], [picture(4)]
    word = next(w for w in ("nothing", "two", "no", "a") if len(engine._continuation(messages, w)) == 1)
    "".join(engine.stream(messages, images, form=dict(enum=[word]), memory=memory))
    assert len([t for t, _ in memory.tokens if t]) == 1

SIMPLE = st.one_of(st.lists(WORDS, min_size=1, max_size=3, unique=True).map(lambda v: dict(enum=v)), st.just(dict(type="boolean")), st.just(dict(type="null")),
    st.tuples(st.integers(-20, 20), st.integers(0, 200)).map(lambda p: dict(type="integer", minimum=p[0], maximum=sum(p))), st.integers(1, 8).map(lambda n: dict(type="string", maxLength=n)))
def objects(values): return st.dictionaries(st.text(string.ascii_lowercase + "_é", min_size=1, max_size=6), values, min_size=1, max_size=3).map(lambda p: dict(type="object", properties=p, required=list(p), additionalProperties=False))
VALUES = st.one_of(SIMPLE, SIMPLE.map(lambda v: dict(type="array", items=v, maxItems=2)), objects(SIMPLE))

def fits(value, schema) -> bool:
    if "enum" in schema: return value in schema["enum"]
    return dict(boolean=lambda: isinstance(value, bool), null=lambda: value is None, integer=lambda: type(value) is int and schema["minimum"] <= value <= schema["maximum"],
        string=lambda: isinstance(value, str) and len(value) <= schema["maxLength"], array=lambda: isinstance(value, list) and len(value) <= 2 and all(fits(v, schema["items"]) for v in value),
        object=lambda: isinstance(value, dict) and list(value) == list(schema["properties"]) and all(fits(v, schema["properties"][k]) for k, v in value.items()))[schema["type"]]()

@settings(max_examples=4)
@given(objects(VALUES))
def test_a_schema_is_obeyed(engine, schema):
    assert fits(json.loads("".join(engine.stream([ask(WHERE, 1)], [picture(4)], 600, form=schema))), schema)

def test_the_probabilities_under_a_form_are_the_models_own(engine):
    memory, messages = engine.new_memory(), [ask(WHERE, 1)]
    "".join(engine.stream(messages, [picture(4)], form=dict(enum=["zebra"]), memory=memory))
    assert np.prod([p for _, p in memory.tokens]) < 1e-3

@pytest.mark.parametrize("form", [dict(type="string", pattern="("), dict(type="string", pattern="[^\\s\\S]"), dict(type="string", pattern="a[^\\s\\S]"), dict(enum=[]), dict(enum=[""]), dict(type="fish"), dict(type="object", properties=dict(a=False), required=["a"]),
    dict(type="object", properties=dict(a=dict(type="integer", minimum=5, maximum=3)), required=["a"], additionalProperties=False)], ids=json.dumps)
def test_an_impossible_form_is_refused_and_the_engine_goes_on(qwen, form):
    memory = qwen.new_memory()
    _, messages, images = talk(qwen, [(WHERE, [picture(4)])], memory)
    with pytest.raises(MedchatError, match="not a form that a reply can obey"): list(qwen.stream([*messages, ask(HOW_MANY)], images, form=form, memory=memory))
    talk(qwen, [(HOW_MANY, [])], memory, messages, images)


# --- choose

def brute(engine, messages, images, choice):
    "The probability of a reply's tokens, by reading the whole conversation with it, without a cache."
    import torch
    prompt, whole = (encode(engine.processor, [m], [images], p) for m, p in ((messages, True), ([*messages, assistant_message(choice)], False)))
    n, ids = prompt["input_ids"].shape[1], whole["input_ids"][0]
    assert ids[:n].tolist() == prompt["input_ids"][0].tolist()
    end = next(i for i in range(n, len(ids)) if engine.processor.tokenizer.decode(ids[i]) == family_of(engine.model.config).end_of_turn)
    with torch.no_grad(): logp = engine.model(**whole).logits[0].log_softmax(-1)
    assert engine.processor.tokenizer.decode(ids[n:end]).strip() == choice
    return end - n, float(sum(logp[i - 1, ids[i]] for i in range(n, end)).exp())

CHOICES = ["yes", "no", "nothing", "two", "a small bright ring", "a large", "肺", "indeterminate"]

@pytest.mark.parametrize("images", [[], [4], [4, 5]], ids=len)
def test_choose_is_the_product_of_the_tokens(engine, images):
    shown = [picture(i) for i in images]; messages = [ask(WHERE, len(shown))]
    want = [brute(engine, messages, shown, c) for c in CHOICES]
    assert {n == 1 for n, _ in want} == {True, False}, "words of one token and of several"
    assert engine.choose(messages, shown, CHOICES) == pytest.approx([p for _, p in want], rel=2e-3, abs=1e-30)

def test_choose_in_a_conversation_leaves_the_memory_intact(engine):
    memory, messages, images = talk(engine, [(WHERE, [picture(4)])])
    question, tokens = [*messages, ask(HOW_MANY)], list(memory.tokens)
    with Reads(engine) as seen: got = engine.choose(question, images, CHOICES, memory)
    assert not any(pixels for _, pixels in seen.calls)
    assert got == pytest.approx([brute(engine, question, images, c)[1] for c in CHOICES], rel=2e-3, abs=1e-30) and memory.tokens == tokens
    assert engine.choose(question, images, CHOICES, memory) == pytest.approx(got, rel=1e-3)
    talk(engine, [(HOW_MANY, []), (WHERE, [])], memory, messages, images)

def test_choose_knows_the_greedy_reply(engine):
    messages, images, memory = [ask(HOW_MANY, 1)], [picture(4)], engine.new_memory()
    said = "".join(engine.stream(messages, images, 20, memory=memory))
    chance, other = engine.choose(messages, images, [said, "zebra"])
    assert chance == pytest.approx(np.prod([p for t, p in memory.tokens if t]), rel=1e-3) and chance > .3 > other

def test_choose_nothing(qwen):
    assert qwen.choose([ask(WHERE, 1)], [picture(4)], []) == []
    with pytest.raises(MedchatError, match="without words"): qwen.choose([ask(WHERE, 1)], [picture(4)], ["yes", " "])
    assert 0 < qwen.choose([ask(WHERE, 1)], [picture(4)], ["yes"])[0] < 1


# --- sample

def test_samples_are_drawn_by_seed(engine):
    draw = lambda **kw: engine.sample([ask(WHERE, 1)], [picture(4)], max_new_tokens=8, **dict(n=6, temperature=3.) | kw)
    first = draw(seed=1)
    assert first == draw(seed=1) != draw(seed=2) and len(first) == 6 and len(set(first)) > 1

@pytest.mark.parametrize("images", [[], [4], [4, 5]], ids=len)
def test_cold_samples_are_greedy(engine, images):
    shown = [picture(i) for i in images]; messages = [ask(WHERE, len(shown))]
    for m in (messages, [*messages, assistant_message("a small ring"), ask(HOW_MANY)]):
        want = generate_replies(engine.model, engine.processor, [m], [shown], 12)
        assert engine.sample(m, shown, n=3, temperature=1e-4, max_new_tokens=12) == want*3
        assert engine.sample(m, shown, n=1, temperature=1e-4, max_new_tokens=12) == want

def test_samples_are_as_frequent_as_they_are_likely(engine):
    messages, images = [ask(HOW_MANY, 1)], [picture(9)]
    drawn = engine.sample(messages, images, n=300, max_new_tokens=4)
    words = sorted({d for d in drawn}, key=drawn.count)[-3:]
    for word, chance in zip(words, engine.choose(messages, images, words)): assert drawn.count(word)/300 == pytest.approx(chance, abs=.1)

def test_samples_leave_the_engine_as_it_was(engine):
    memory, messages, images = talk(engine, [(WHERE, [picture(4)])])
    engine.sample([*messages, ask(HOW_MANY)], images, n=4, max_new_tokens=4)
    talk(engine, [(HOW_MANY, [])], memory, messages, images)
    assert reply(engine, "What is a ring?", 8) == generate_replies(engine.model, engine.processor, [[ask("What is a ring?")]], [[]], 8)[0]


# --- runs

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    return [run_maker.make_run(place/name, seed=seed) for name, seed in (("one", 1), ("two", 2))]

@pytest.fixture(scope="module")
def three(runs): return load_engines(runs, with_base=True)

PROBES = [([ask("Describe the image.", 1)], [picture(4)]), ([ask(HOW_MANY, 1)], [picture(5)]), ([ask("What is a ring?")], [])]

@pytest.fixture(scope="module")
def alone(runs):
    "What each run says when it is loaded by itself; the base last."
    def said(model, processor): return [generate_replies(model, processor, [m], [i], 12)[0] for m, i in PROBES]
    return [said(*load_run(run)) for run in runs] + [said(*load(BASES[0]))]

def test_runs_of_one_base_share_it(three): assert three[0].model is three[1].model is three[2].model and len({e._host.lock for e in three}) == 1

def test_each_run_answers_as_it_does_alone(three, alone):
    assert len({tuple(a) for a in alone}) == 3, "the runs should differ, else this proves nothing"
    for order in (range(3), (2, 0, 2, 1, 0)):
        for i in order: assert ["".join(three[i].stream(m, im, 12)) for m, im in PROBES] == alone[i]

def test_a_tuned_model_answers_as_tuned(runs, alone):
    assert ["".join(LocalEngine(*load_run(runs[1])).stream(m, im, 12)) for m, im in PROBES] == alone[1]

def test_runs_choose_and_draw_for_themselves(three, runs):
    (messages, images), words = PROBES[0], ["yes", "a small", "nothing"]
    chances = [e.choose(messages, images, words) for e in three]
    fresh = [LocalEngine(*load_run(run), adapter="default").choose(messages, images, words) for run in runs]
    assert np.allclose(chances[:2], fresh, rtol=2e-3) and not np.allclose(chances[0], chances[1], rtol=.1) and not np.allclose(chances[0], chances[2], rtol=.1)
    for i in (1, 2, 0): assert three[i].choose(messages, images, words) == pytest.approx(chances[i], rel=1e-3)
    assert [e.sample(messages, images, 2, 1e-4, 12) for e in three] == [["".join(e.stream(messages, images, 12))]*2 for e in three]

def test_conversations_with_several_runs_in_turns(three, runs):
    whole = [load_run(run) for run in runs] + [load(BASES[0])]
    talks = [(e.new_memory(), [], []) for e in three]
    for k, i in enumerate((0, 1, 0, 2, 1, 2, 0, 1, 2)):
        memory, messages, images = talks[i]
        if not images: images.append(picture(4))
        messages.append(ask((WHERE, HOW_MANY, "Describe the image.")[len(messages)//2], not messages))
        said = "".join(three[i].stream(messages, images, 10, memory=memory))
        assert said == generate_replies(*whole[i], [messages], [images], 10)[0]
        messages.append(assistant_message(said or "nothing"))
    assert len({str(messages) for _, messages, _ in talks}) == 3

def test_runs_asked_from_several_threads(three, alone):
    with ThreadPoolExecutor(6) as pool: got = list(pool.map(lambda i: ["".join(three[i % 3].stream(m, im, 12)) for m, im in PROBES], range(9)))
    assert got == [alone[i % 3] for i in range(9)]

def test_a_memory_is_not_taken_for_that_of_another_run(three, alone):
    memory = three[0].new_memory()
    for i in (0, 1, 2, 0): assert "".join(three[i].stream(*PROBES[0], 12, memory=memory)) == alone[i][0]

def test_identities(three, runs):
    base = json.loads((runs[0]/"config.json").read_text())["base_sha256"]
    for engine, run in zip(three, runs):
        digest = hashlib.sha256((run/"adapter/adapter_model.safetensors").read_bytes()).hexdigest()
        assert engine.identity == run_identity(run) == dict(model=run.name, base=BASES[0], base_sha256=base, adapter_sha256=digest) and engine.name == run.name
    assert three[2].identity == dict(model=BASES[0], base=BASES[0], base_sha256=base, adapter_sha256="") and three[2].name == BASES[0]
    assert {e.host for e in three} == {""}

def test_runs_of_other_bases_stand_beside(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(run_maker, "base", BASES[1])
    other = run_maker.make_run(tmp_path/"other", seed=3)
    engines = load_engines([runs[0], other, runs[1]])
    assert [e.name for e in engines] == ["one", "other", "two"]
    assert engines[0].model is engines[2].model is not engines[1].model and engines[1].identity["base"] == BASES[1]
    assert "".join(engines[1].stream(*PROBES[0], 12)) == generate_replies(*load_run(other), [PROBES[0][0]], [PROBES[0][1]], 12)[0]

def test_runs_that_cannot_be_loaded(runs, tmp_path):
    with pytest.raises(MedchatError, match="not a run folder"): load_engines([tmp_path])
    with pytest.raises(MedchatError, match="not a run folder"): load_engines([runs[0], tmp_path])
    (tmp_path/"config.json").write_text((runs[0]/"config.json").read_text())
    for get in (lambda: load_engines([tmp_path]), lambda: load_engines([runs[0], tmp_path]), lambda: run_identity(tmp_path)):
        with pytest.raises(MedchatError, match="no adapter yet"): get()

def test_the_memory_limit_is_of_the_base(runs):
    engines = load_engines(runs, memory_limit=1000)
    memory = engines[1].new_memory()
    "".join(engines[1].stream(*PROBES[0], 4, memory=memory))
    assert memory.bytes == 0 and len(memory.tokens) > 0

def test_load_processor(runs, tmp_path, processor):
    assert load_processor(tmp_path) is None
    saved = load_processor(runs[0]/"adapter")
    assert saved.chat_template == processor.chat_template and encode(saved, *[[x] for x in PROBES[0]])["input_ids"].tolist() == encode(processor, *[[x] for x in PROBES[0]])["input_ids"].tolist()
    (tmp_path/"processor_config.json").write_text("{broken")
    with pytest.raises(MedchatError, match="cannot load the run's processor"): load_processor(tmp_path)
