"Transcripts: what stands on the pages, whatever was said."
import hashlib, io, json, random, re, socket, sys
import pypdf, pytest, regex
from fastcore.test import test_eq as eq
from PIL import Image
from medchat import transcript as made
from medchat.core import DISCLAIMER, MedchatError, sample_data
from medchat.audit import image_hash
from medchat.transcript import Transcript, printable, to_dict, unshown, write_json, write_pdf

IDENTITY = dict(model="demo", base="tiny", base_sha256="5e1f" * 16, adapter_sha256="0a9c" * 16)
FONTS = sample_data()/"fonts"

def said(*texts, **more): # user and assistant in turn
    return Transcript("A talk", [dict(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts)], IDENTITY, **more)

def words(text): return " ".join(text.replace("\u200b", "").split())

@pytest.fixture
def read(tmp_path):
    def read(transcript): return pypdf.PdfReader(write_pdf(transcript, tmp_path/"talk.pdf"))
    return read

@pytest.fixture
def text_of(read):
    "All that is said in the PDF, as one line."
    return lambda transcript: words("\n".join(page.extract_text() for page in read(transcript).pages))

def picture(seed=0, size=(64, 48)):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))

# ---- what stands there

def test_text_identity_time_and_page_numbers(text_of, read):
    text = text_of(said("Is the heart enlarged?", "Yes, by a little.", time="2026-11-23T08:30:00+05:30"))
    assert "5e1f" * 16 in read(said()).pages[0].extract_text() # in one piece, to be copied
    for part in ("A talk", "Is the heart enlarged?", "Yes, by a little.", "2026-11-23 03:00 UTC", "5e1f" * 16, "0a9c" * 16, "1 of 1"): assert part in text

def test_a_host_is_named(text_of):
    assert "api.example.org" in text_of(Transcript("t", [], dict(model="m", host="api.example.org")))

def test_notes_confidence_and_report(text_of):
    turns = [dict(role="assistant", text="Pneumonia.", notes=["softened #1"], confidence=0.873, time="not a time")]
    text = text_of(Transcript("t", turns, IDENTITY, report={"Anatomical findings": {"antrum": "normal", "fundus": ["polyp", "erosion"]}, "Plan": "review"}))
    for part in ("softened #1", "0.87", "not a time", "Draft report", "antrum: normal", "fundus: polyp erosion", "Plan", "review"): assert part in text

def test_images_and_heat_maps_are_in_it(read):
    a, b = picture(1), picture(2, (30, 90))
    reader = read(Transcript("t", [dict(role="user", text="?", images=[a, b, a]), dict(role="assistant", text="!", overlays=[("Grad-CAM", picture(3))])], IDENTITY))
    sizes = {image.image.size for page in reader.pages for image in page.images}
    assert sizes == {(64, 48), (30, 90)} and "Grad-CAM" in reader.pages[0].extract_text()

@pytest.mark.parametrize("mode,size", [("L", (50, 40)), ("RGBA", (50, 40)), ("I;16", (50, 40)), ("1", (50, 40)), ("CMYK", (50, 40)), ("RGB", (1, 1)), ("RGB", (5000, 3)), ("RGB", (3, 5000)), ("L", (3000, 3000))])
def test_images_of_every_kind_stay_on_the_page(read, mode, size):
    reader = read(Transcript("t", [dict(role="user", text="last words", images=[Image.new(mode, size)])], IDENTITY))
    assert len(reader.pages) == 1 and "last words" in reader.pages[0].extract_text()
    assert all(max(image.image.size) <= 1200 for image in reader.pages[0].images)

def test_the_image_is_not_changed():
    image = Image.new("RGB", (3000, 2000), "teal")
    made._typeset(Transcript("t", [dict(role="user", text="?", images=[image])], IDENTITY))
    eq(image.size, (3000, 2000))

def test_the_disclaimer_is_on_every_page(read):
    reader = read(said(*["A line that is said again and again. " * 20] * 40))
    assert len(reader.pages) > 5
    for i, page in enumerate(reader.pages):
        assert DISCLAIMER in page.extract_text() and f"{i + 1} of {len(reader.pages)}" in page.extract_text()

def test_an_empty_conversation(text_of):
    text = text_of(Transcript("", [], {}))
    assert DISCLAIMER in text and "Nothing was said." in text and "1 of 1" in text

def test_two_hundred_turns_and_a_very_long_one(read):
    reader = read(said(*[f"This is turn number {i}." for i in range(200)], "word " * 2000))
    text = words("\n".join(page.extract_text() for page in reader.pages))
    assert [i for i in range(200) if f"This is turn number {i}." not in text] == []
    eq(text.count("word"), 2000)

# ---- scripts

SCRIPTS = dict(ta="இதயம் பெரியதாக உள்ளது ஸ்ரீ க்ஷ கௌ", hi="हृदय बड़ा है क्ष त्र ज्ञ श्री निष्कर्ष", zh="心脏增大，双肺未见明显异常。", de="Größe der Lunge: ≥ 5 µm, naïve Œdème")

@pytest.mark.parametrize("language", SCRIPTS)
def test_each_script_is_there_and_in_its_own_font(read, language):
    "pypdf gives back the letters, not always in their order; Latin and Chinese whole."
    reader = read(Transcript("t", [dict(role="user", text=SCRIPTS[language])], IDENTITY, language=language))
    text = words(reader.pages[0].extract_text())
    if language in ("zh", "de"): assert SCRIPTS[language] in text
    for c in SCRIPTS[language]: assert c in text or regex.match(r"\p{M}|\s", c), c
    fonts = " ".join(str(f["/BaseFont"]) for f in reader.pages[0]["/Resources"]["/Font"].values())
    assert dict(ta="NotoSansTamil", hi="NotoSansDevanagari", zh="NotoSansCJKsc", de="NotoSans-Regular")[language] in fonts
    assert "could not be shown" not in text

@pytest.mark.parametrize("text,family,count", [("க்ஷ", "Tamil", 1), ("ஸ்ரீ", "Tamil", 1), ("கொ", "Tamil", 3), ("கா", "Tamil", 2), ("क्ष", "Devanagari", 1), ("त्र", "Devanagari", 1), ("र्क", "Devanagari", 2), ("कर", "Devanagari", 2)])
def test_letters_are_shaped(read, text, family, count):
    "A conjunct of three characters is one glyph; the Tamil o is two, one on each side of its consonant."
    page = read(Transcript("t", [dict(role="user", text=text)], {})).pages[0]
    fonts, drawn, font = {name: str(f["/BaseFont"]) for name, f in page["/Resources"]["/Font"].items()}, b"", ""
    for operands, operator in pypdf.generic.ContentStream(page["/Contents"].get_object(), None).operations:
        if operator == b"Tf": font = fonts[operands[0]]
        if operator in (b"Tj", b"TJ") and family in font:
            drawn += b"".join(p.original_bytes for p in (operands[0] if operator == b"TJ" else operands) if isinstance(p, (pypdf.generic.TextStringObject, pypdf.generic.ByteStringObject)))
    eq(len(drawn), 2 * count) # two bytes each

@pytest.mark.parametrize("text", ["😀 👨‍👩‍👧 🫁 🇮🇳 1️⃣", "العربية עברית", "한국어 日本語 ไทย", "e" + "\u0301" * 500, "\U000e0041\ufeff\u2060", "\ud83d alone \ude00", "\x00\x1b[31m\x7f\x85", "𝕳𝖊𝖆𝖗𝖙"])
def test_strange_text_crashes_nothing(text_of, text):
    assert "and then" in text_of(said(f"{text} and then", "ok"))

def test_what_no_font_has_is_counted(text_of):
    eq(unshown("\ue001 a \ue001\ue002"), ["\ue001", "\ue001", "\ue002"])
    assert "3 characters could not be shown: U+E001, U+E002." in text_of(said("\ue001 a \ue001\ue002"))
    assert "1 character could not be shown: U+E001." in text_of(said("\ue001"))
    assert ", and others." in text_of(said("".join(map(chr, range(0xe000, 0xe020)))))

# ---- hostile

@pytest.mark.parametrize("text", ['#read("/etc/passwd")', '#image("/etc/passwd")', "#panic()", '#import "@preview/x:0.1.0"', "] } ) #", "$x^2$ and $ alone", "\\ \\u{41} \\n", "*b* _i_ `c` ```raw```",
    "<label> @label", "// gone? /* gone? */", "= Heading", "- item + item / term: x", "https://example.org/#x", '"quotes" \'and\' "]', "--- ... ~", "{{n}} {host} %s", "#{sys.inputs}", "</script><b>x</b>", "#d.disclaimer"])
def test_no_text_is_markup(text_of, text):
    "Wherever it stands: title, turns, notes, names, captions, report."
    turn = dict(role="user", text=f"1 {text} 1", notes=[f"2 {text} 2"], overlays=[(f"3 {text} 3", picture())])
    page = text_of(Transcript(f"4 {text} 4", [turn, dict(role=f"5 {text} 5", text="x")], dict(model=f"6 {text} 6"), report={f"7 {text} 7": f"8 {text} 8"}))
    for i in range(1, 9): assert words(f"{i} {text} {i}") in page
    assert "root:" not in page and DISCLAIMER in page

def test_a_language_is_no_markup_either(text_of):
    assert "words" in text_of(said("words", language='"), evil: ('))

def test_the_direction_of_writing_cannot_be_turned(text_of):
    assert "\u202e" not in text_of(said("the heart is \u202elamron\u202c today"))

def test_piled_accents_do_not_reach_the_band():
    assert len(max(regex.findall(r"\p{Mn}+", printable("e" + "\u0301" * 500)), key=len)) == 4
    for text in SCRIPTS.values(): eq(printable(text), text)

@pytest.mark.parametrize("letter", ["W", "ஜௌ", "क्ष", "。", "心", "—", "\ue001"])
def test_an_endless_word_stays_within_the_margins(letter):
    page = Image.open(io.BytesIO(made._typeset(Transcript("W" * 60, [dict(role="user", text=letter * 250)], dict(model=letter * 60)), format="png", ppi=72))).convert("L")
    text = page.crop((0, 65, page.width, page.height)) # below the band
    left, _, right, bottom = text.point(lambda v: 255 * (v < 200)).getbbox()
    assert left > 50 and right < page.width - 50 and right - left > 200 and bottom < page.height

def test_lines_and_blanks_stay(text_of, read):
    page = read(said("one\r\ntwo\n\n  - three")).pages[0].extract_text()
    assert re.search(r"one\s*\n\s*two\s*\n\s*- three", page)

# ---- files

def test_a_failing_write_leaves_nothing(tmp_path, no_write, monkeypatch):
    for write in (write_pdf, write_json):
        with pytest.raises(MedchatError, match="cannot write"): write(said("a"), no_write/"talk")
    (tmp_path/"talk.pdf").write_text("the old one")
    (tmp_path/"talk.json").write_text("the old one")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyError): write_pdf(Transcript("t", [dict(role="user")], {}), tmp_path/"talk.pdf")
    monkeypatch.setattr(made, "to_dict", lambda t: 1 / 0)
    with pytest.raises(ZeroDivisionError): write_json(said("a"), tmp_path/"talk.json")
    assert sorted(tmp_path.iterdir()) == before and (tmp_path/"talk.pdf").read_text() == (tmp_path/"talk.json").read_text() == "the old one"

def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made._typeset(said("a", "b"))
    assert list(tmp_path.iterdir()) == []

def test_no_connection_is_made(tmp_path, monkeypatch):
    def refuse(*a): raise AssertionError("a connection")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert write_pdf(said('#import "@preview/tablex:0.0.8"'), tmp_path/"a.pdf").stat().st_size > 1000

def test_json_round_trip(tmp_path):
    image = picture(4)
    talk = Transcript("Título 心", [dict(role="user", text="half \ud83d pair \x00 \u202e", images=[image], time="2026-11-23T07:00:00Z"), dict(role="assistant", text=SCRIPTS["ta"], confidence=0.5, notes=["n"], overlays=[("map", image)])], IDENTITY, language="ta", report={"Plan": ["a", "b"]})
    kept = json.loads(write_json(talk, tmp_path/"talk.json").read_text(encoding="utf-8"))
    eq(kept, to_dict(talk))
    eq(kept["disclaimer"], DISCLAIMER)
    eq([t["text"] for t in kept["turns"]], [t["text"] for t in talk.turns]) # as it was said
    facts = dict(sha256=image_hash(image), width=64, height=48)
    eq(kept["turns"][0]["images"], [facts])
    eq(kept["turns"][1]["overlays"], [dict(caption="map", **facts)])
    assert len((tmp_path/"talk.json").read_bytes()) < 2000 # no pixels

def test_time_is_now_when_not_said():
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", said().time)

def test_without_typst_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "typst", None)
    with pytest.raises(MedchatError, match="pip install typst"): write_pdf(said("a"), tmp_path/"a.pdf")
    assert list(tmp_path.iterdir()) == []

# ---- fonts

def test_fonts_are_those_of_the_recipe_and_small():
    sums = dict(reversed(line.split()) for line in (FONTS/"SHA256SUMS").read_text().splitlines())
    fonts = {p.name for p in FONTS.iterdir() if p.suffix in (".ttf", ".otf")}
    assert fonts == set(sums) and len(fonts) == 9
    for name in fonts: eq(hashlib.sha256((FONTS/name).read_bytes()).hexdigest(), sums[name])
    assert 0 < sum(p.stat().st_size for p in FONTS.iterdir()) < 4_000_000
    assert "SIL OPEN FONT LICENSE Version 1.1" in (FONTS/"OFL.txt").read_text()

def test_fonts_cover_what_they_promise():
    hanzi = [bytes([a, b]).decode("gb2312") for a in range(0xb0, 0xf8) for b in range(0xa1, 0xff) if a != 0xd7 or b < 0xfa]
    eq(len(hanzi), 6763)
    codes = made._codes(True)
    tamil = [c for c in range(0xb82, 0xbfb) if regex.match(r"\p{Assigned}", chr(c))]
    for wanted in (map(ord, hanzi), range(0x20, 0x7f), range(0xa1, 0x17f), range(0x905, 0x93a), range(0x958, 0x970), tamil): assert [hex(c) for c in wanted if c not in codes] == []

def test_a_pdf_is_written_without_the_shipped_fonts(tmp_path, monkeypatch):
    caches = (made.load_fonts, made._codes)
    try:
        for cache in caches: cache.cache_clear()
        monkeypatch.setenv("MEDCHAT_SAMPLE_DATA", str(tmp_path/"nowhere"))
        text = pypdf.PdfReader(write_pdf(said("Plain words", "naïve ≥"), tmp_path/"a.pdf")).pages[0].extract_text()
        assert "Plain words" in text and DISCLAIMER in text
        assert made._font_folder() is None and ord("a") in made._codes(True) and 0x5fc3 not in made._codes(True)
    finally:
        for cache in caches: cache.cache_clear()
