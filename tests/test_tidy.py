"Tidy: texts are cleaned, and say what they said."
import time, unicodedata
import pytest
from hypothesis import given, strategies as st
from medchat.core import Record, Turn
from medchat.tidy import choose_images, is_placeholder, most_different, tidy_record, tidy_text

@given(st.text(max_size=200))
def test_twice_is_once(text):
    once, _ = tidy_text(text)
    assert tidy_text(once) == (once, []) and unicodedata.is_normalized("NFC", once)

@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=60))
def test_letters_numbers_and_signs_stay(text):
    assert [c for c in tidy_text(text)[0] if not c.isspace()] == [c for c in unicodedata.normalize("NFC", text).replace("\ufffd", "") if not c.isspace()]

@pytest.mark.parametrize("text,clean", [("a\tb", "a b"), ("a \u00a0 b", "a b"), ("a\r\nb\rc", "a\nb\nc"), ("a\n \n\t\n b", "a\n\nb"), ("\ufeffa", "a"), ("so\u00adft", "soft"), ("a\x00b", "ab"), ("\u202eabc", "abc"),
    ("நோய்\u200cகள்", "நோய்\u200cகள்"), ("क्\u200dष", "क्\u200dष"), ("e\u0301", "é"), ("ﬁne", "ﬁne"), ("2 × 3 cm²", "2 × 3 cm²"), ("👍🏽", "👍🏽")])
def test_cases(text, clean): assert tidy_text(text)[0] == clean

def test_linear():
    for bad in (" " * 200_000, "\n " * 100_000, "a \u200b" * 50_000):
        start = time.perf_counter(); tidy_text(bad); assert time.perf_counter() - start < 2

@pytest.mark.parametrize("text", ["nan", " NaN ", "null", "N/A", "#N/A", "XXXX", "XXX.", "XXXX, XXXX.", "xxxx", "-", "--", "?", "", "''", "[]", "\u200b"])
def test_placeholders(text): assert is_placeholder(tidy_text(text)[0])
@pytest.mark.parametrize("text", ["none", "None", "no", "0", "x", "XX", "xxl", "XXXX effusion", "nano", "N", "na+", "unknown", "無", "5", "A.", "é"])
def test_no_placeholders(text): assert not is_placeholder(text)

def record(q, a): return Record("r", [], [Turn("user", q), Turn("assistant", a)], "vqa")
@pytest.mark.parametrize("q,a,why", [("q", " ", "empty answer"), ("q", "nan", "placeholder instead of an answer: nan"), ("\u200b", "a", "empty question"), ("q", "\ufffd", "empty answer")])
def test_refused(q, a, why):
    with pytest.raises(ValueError, match=why): tidy_record(record(q, a))

def test_question_marks_may_ask(): tidy_record(record("?", "yes")) # a placeholder is refused as an answer only

def test_choice_keeps_order_and_notes(tmp_path):
    from PIL import Image
    for i, v in enumerate((0, 0, 255, 128)): Image.effect_noise((64, 64), 10 + 40 * i).point(lambda x, v=v: (x + v) // 2).save(tmp_path/f"{i}.png")
    r = Record("r", [f"{i}.png" for i in range(4)], [Turn("user", "q"), Turn("assistant", "a")], "report")
    choose_images(r, [tmp_path/p for p in r.images], 2, "sharpest")
    assert r.images == ["2.png", "3.png"] and r.meta == {"chosen_images": "sharpest", "left_out_images": ["0.png", "1.png"]}
    choose_images(r, [tmp_path/p for p in r.images], 2); assert r.meta["chosen_images"] == "sharpest"

def test_most_different_never_repeats():
    from medchat.twins import FINGERPRINT_BYTES
    same = [bytes(FINGERPRINT_BYTES)] * 5
    assert most_different(same, 3) == [0, 1, 2] and most_different(same, 9) == [0, 1, 2, 3, 4]
