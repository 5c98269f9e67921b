"The texts of the page: complete, in their own script, with the same places."
import re, unicodedata
import pytest
from fastcore.test import test_eq as eq
from medchat.core import DISCLAIMER, MedchatError
from medchat.findings import FINDINGS
from medchat.words import LANGUAGES, WORDS, ready_questions, say

SCRIPTS = dict(en="LATIN", ta="TAMIL", hi="DEVANAGARI", zh="CJK")
ALL = [(key, language) for key in WORDS for language in LANGUAGES]

def letters(text, script=""): return [c for c in text if c.isalpha() and unicodedata.name(c, "").startswith(script)]
def places(text): return sorted(re.findall(r"\{\w+\}", text))

def test_every_key_has_every_language_and_nothing_is_empty():
    assert set(SCRIPTS) == set(LANGUAGES) and len(WORDS) > 100
    assert {key for key, said in WORDS.items() if list(said) != list(LANGUAGES)} == set()
    assert [(key, language) for key, language in ALL if not WORDS[key][language].strip()] == []

def test_the_same_places_in_every_language():
    assert [key for key, said in WORDS.items() if len({tuple(places(text)) for text in said.values()}) > 1] == []

def test_each_text_is_in_its_script():
    "What is international (PDF, DICOM, Grad-CAM, A, B, the disclaimer in English) may stand in Latin letters beside it."
    wrong = []
    for key, language in ALL:
        text = re.sub(r"\{\w+\}", "", WORDS[key][language]).replace(DISCLAIMER if language != "en" else "\0", "")
        own, latin = letters(text, SCRIPTS[language]), letters(re.sub(r"PDF|JSON|DICOM|Grad-CAM|MB|\b[AB]\b", "", text), "LATIN")
        others = [c for c in letters(text) if c not in own and "LATIN" not in unicodedata.name(c)]
        if not own or others or (language != "en" and latin): wrong.append((key, language, text))
    assert wrong == []

def test_nothing_was_left_untranslated():
    assert [key for key, said in WORDS.items() if len(set(said.values())) < len(LANGUAGES)] == []

def test_texts_are_clean():
    "In one Unicode form, with no invisible characters and no markup."
    for key, language in ALL:
        text = WORDS[key][language]
        assert text == unicodedata.normalize("NFC", text), (key, language)
        assert not re.search(r"[<>\u200b\u200e\u200f\u202a-\u202e\ufeff]|  |\n", text), (key, language)

def test_the_disclaimer_is_in_english_too():
    for language in LANGUAGES: assert DISCLAIMER in say("disclaimer", language)
    eq(say("disclaimer"), DISCLAIMER)

def test_every_finding_and_status_has_words():
    assert set(FINDINGS) | {"present", "absent", "indeterminate"} <= set(WORDS)

@pytest.mark.parametrize("language,shown", [("zh-CN", "zh"), ("zh-Hans-CN", "zh"), ("TA", "ta"), ("hi-IN", "hi"), ("fr", "en"), ("", "en")])
def test_languages_as_browsers_name_them(language, shown):
    eq(say("send", language), WORDS["send"][shown])

def test_an_unknown_key_and_a_missing_value_raise():
    with pytest.raises(MedchatError, match="no such text: sned"): say("sned", "ta")
    with pytest.raises(KeyError): say("queue", "ta")

def test_values_are_text_not_places():
    eq(say("leaves", host="{n} {0.__class__}"), "Texts and images go to {n} {0.__class__}.")

def test_ready_questions_in_each_language():
    asked = {language: ready_questions(language) for language in LANGUAGES}
    assert {len(questions) for questions in asked.values()} == {5}
    assert "Is the heart enlarged?" in asked["en"] and all(q.endswith(("?", "？")) for questions in asked.values() for q in questions)

def test_the_shipped_fonts_draw_every_text():
    from medchat.transcript import _codes
    assert {c for key, language in ALL for c in WORDS[key][language] if ord(c) not in _codes(True) and not c.isspace()} == set()
