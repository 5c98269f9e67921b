"Messages: markers, order of parts, Arrow round trip, prompts."
import json
import pytest
from hypothesis import given, strategies as st
from medchat.core import MedchatError, Record, Turn
from medchat.messages import assistant_message, clean_text, prompt_messages, to_messages, user_message

MARKERS = ["<image>", "<IMAGE>", "</image>", "<image_1>", "<image 2>", "<img>", "<video>", "<|image_pad|>", "<|im_end|>", "<|image|>", "<|endoftext|>", "<s>", "</s>"]

def record(*texts, images=()):
    return Record("r", list(images), [Turn(("user", "assistant")[i % 2], t) for i, t in enumerate(texts)], "conversation")

@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("form", ["{}\nIs it large?", "Is it large?{}", "{} {}Is it large?", "Is it large?\n{}", "{}Is it large?{}"])
def test_markers_go(marker, form):
    assert clean_text(form.format(marker, marker)) == "Is it large?"

@pytest.mark.parametrize("text", ["a < b > c", "size <5 mm", "|x| > 2", "<imaging> findings", "p < 0.05 | n > 3", "first line\nsecond line", "T2 <|> T1", "images 1 and 2"])
def test_medicine_stays(text): assert clean_text(text) == text

@given(st.lists(st.sampled_from(MARKERS + ["<", ">", "|", "image", "im_end", " ", "2", "a", "\n", "<|", "|>"]), max_size=30).map("".join))
def test_no_marker_survives(text):
    "Pieces of markers cannot join into a new one; cleaning twice changes nothing."
    clean = clean_text(text)
    assert clean_text(clean) == clean and not any(m in clean.lower() for m in map(str.lower, MARKERS))

def test_long_blanks_are_fast():
    import time
    start = time.time(); clean_text(" " * 200_000 + "x" + "<|" * 20_000)
    assert time.time() - start < 5

@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=4), st.integers(0, 3))
def test_shape(pairs, n):
    "Images stand first in the first question and nowhere else; the roles alternate."
    r = record(*[t for p in pairs for t in p], images=[f"{i}.png" for i in range(n)])
    try: messages = to_messages(r)
    except MedchatError as e: assert "without words" in str(e); return
    assert [m["role"] for m in messages] == ["user", "assistant"] * len(pairs)
    assert [p["type"] for p in messages[0]["content"]] == ["image"] * n + ["text"]
    assert all([p["type"] for p in m["content"]] == ["text"] for m in messages[1:])
    assert prompt_messages(messages) == messages[:-1]

def test_text_only(): assert to_messages(record("Why?", "Because."))[0]["content"] == [{"type": "text", "text": "Why?"}]

def test_same_shape_in_chat_and_training():
    r = record("<image>Is it large?", "Yes.", "Where?", "Left.", images=["a.png"])
    assert to_messages(r) == [user_message("Is it large?", 1), assistant_message("Yes."), user_message("Where?"), assistant_message("Left.")]

def test_prompt_never_holds_the_answer():
    r = record("q one", "SECRET1", "q two", "SECRET2", images=["a.png"])
    prompt = json.dumps(prompt_messages(to_messages(r)))
    assert "SECRET1" in prompt and "SECRET2" not in prompt

def test_prompt_does_not_change_its_input():
    messages = to_messages(record("q", "a")); before = json.dumps(messages)
    prompt_messages(messages).clear()
    assert json.dumps(messages) == before

@pytest.mark.parametrize("turns", [[], [Turn("user", "q")], [Turn("assistant", "a"), Turn("user", "q")], [Turn("system", "s"), Turn("user", "q")],
                                   [Turn("user", "q"), Turn("user", "q")], [Turn("user", "q"), Turn("assistant", "a"), Turn("user", "q")]])
def test_wrong_turns(turns):
    with pytest.raises(MedchatError, match="must alternate"): to_messages(Record("r", [], turns, "vqa"))

@pytest.mark.parametrize("text", ["", "  ", "<image>", "<image>\n<image>", "<|im_end|>"])
def test_no_words(text):
    with pytest.raises(MedchatError, match="question without words"): user_message(text, 1)
    with pytest.raises(MedchatError, match="answer without words"): assistant_message(text)

def test_arrow_round_trip(tmp_path):
    "What the dataset gives back equals what was built, across rows with 0, 1 and 3 images."
    from datasets import Dataset, load_from_disk
    from medchat.curate import dataset_features
    rows = [to_messages(record("q", "a", "q2", "a2", images=["x"] * n)) for n in (0, 1, 3)]
    features = dataset_features()
    Dataset.from_dict({"messages": rows}, features=type(features)({"messages": features["messages"]})).save_to_disk(tmp_path/"d")
    assert load_from_disk(tmp_path/"d")["messages"][:] == rows

def test_trl_accepts_the_format():
    "TRL recognises the rows as conversational, and applies a template to them."
    from trl.data_utils import is_conversational
    assert is_conversational({"messages": to_messages(record("q", "a", images=["x"]))})

@pytest.mark.parametrize("text", ["q " + "<image"*9000 + ">" + "1>"*9000, "<"*20000 + "image>"*20000])
def test_markers_in_markers_take_no_long_time(text):
    clean = clean_text(text)
    assert clean_text(clean) == clean and "<image>" not in clean
