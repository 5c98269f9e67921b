"stats and show: odd sets, hostile text, bounded memory, the pager in a real terminal, the page in a headless Chromium."
import hashlib, io, json, os, re, select, subprocess, sys, time
from pathlib import Path
import pytest
from PIL import Image

import medchat.look as L
from medchat.core import DISCLAIMER, MedchatError
from medchat.curate import dataset_features
from medchat.findings import FINDINGS
from medchat.look import Pictures, Tally, blocks, facts, findings, find_rows, open_splits, show, spread_of, stats, thumbnail

root = Path(__file__).resolve().parent.parent
HOSTILE = ["<script>alert(1)</script>", "</dd></dl></article><img src=x onerror=alert(1)>", "\x1b[2J\x1b]0;title\x07", "a\u202etxt.exe", "$x^2$ and $", "右肺有结节吗？", "| a | `b` |", "\r\n\x00", "&lt;b&gt;", "\"'><svg onload=alert(1)>"]

def picture(shade=0, size=(24, 16), mode="L", kind="PNG"):
    im = Image.new("L", size, 40 + shade % 200); im.putpixel((shade % size[0], (shade // size[0]) % size[1]), 255)
    im.convert(mode).save(file := io.BytesIO(), kind); return file.getvalue()

def record(i, images=(), q="Is the heart enlarged?", a="yes", kind="vqa", meta=None, **more):
    images = list(images)
    return dict(id=f"r{i}", messages=[], images=[dict(bytes=b, path=None) for b in images], image_paths=[f"images/{i}-{k}.png" for k in range(len(images))],
                image_sha256=[hashlib.sha256(b or b"").hexdigest() for b in images], turns=[dict(role="user", text=q), dict(role="assistant", text=a)], kind=kind,
                answer_type="closed" if a in ("yes", "no") else "open" if kind == "vqa" else None, split="", group=f"g{i}", source="toy", licence="", language="en", meta=json.dumps(meta or {})) | more

def make(home, **splits):
    "A dataset folder, without `convert`."
    from datasets import Dataset, DatasetDict
    DatasetDict({s: Dataset.from_generator(lambda rows=rows: iter(rows() if callable(rows) else rows), features=dataset_features(), cache_dir=str(home/"cache"), split=s,
                                           fingerprint=f"{s}{time.time_ns()}", writer_batch_size=100) for s, rows in splits.items()}).save_to_disk(str(home/"data"))
    for name in ("report.json", "splits.json"): (home/"data"/name).write_text("{}")
    return home/"data"

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "Two splits: VQA about 6 pictures, captions, a study of two pictures, a record without any."
    train = [record(i, [picture(i % 6)], a="yes" if i % 4 else "no", meta=dict(content_type="size", modality="X-Ray")) for i in range(20)]
    train += [record("cap", [picture(7, (200, 30), "RGB", "JPEG")], "Describe it.", "Cardiomegaly. No pleural effusion.", "caption"),
              record("study", [picture(8), picture(9, mode="RGBA")], "Report?", "Findings: edema.", "report", dict(findings={"Edema": "uncertain", "Effusion": "absent"})), record("text", [], "What is edema?", "fluid", "conversation")]
    test = [record(f"t{i}", [picture(20 + i)], a="no", meta=dict(content_type="size", modality="CT")) for i in range(4)]
    return make(tmp_path_factory.mktemp("toy"), train=train, test=test)

@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    rows = [record(i, [picture(i)], f"Q {t}", f"A {t}", meta=dict(question_type=t, modality=t), id=f"{i} {t}", group=t, source=t, image_paths=[t]) for i, t in enumerate(HOSTILE)]
    return make(tmp_path_factory.mktemp("hostile"), train=rows)

# ---- stats

@pytest.mark.filterwarnings("error::UserWarning")
def test_numbers_of_a_toy(toy, tmp_path, capsys):
    m = stats(toy, out=tmp_path/"s")
    said = capsys.readouterr().out
    assert m["records"] == dict(train=23, test=4) and m["pictures"] == dict(train=9, test=4)
    assert m["shares"]["modality"] == dict(train={"x-ray": 20, "not stated": 3}, test={"ct": 4})
    assert m["findings"]["train"]["known"] == 2 and m["findings"]["train"]["present"] == {"cardiomegaly": 1} and m["findings"]["train"]["uncertain"] == {"edema": 1}
    assert m["findings"]["train"]["absent"].keys() == {"pleural effusion", "effusion"}
    size = next(r for r in m["same_answer"] if r["type"] == "size")
    assert size["answer"] == "yes" and size["splits"] == dict(train=dict(n=20, right=15), test=dict(n=4, right=0))   # train's answer, and it fails in test
    assert m["images_per_record"]["train"] == {0: 1, 1: 21, 2: 1} and m["picture_kinds"]["train"] == {"PNG L": 7, "JPEG RGB": 1, "PNG RGBA": 1}
    assert m["longer_side"]["train"] == {24: 8, 200: 1} and m["answers"]["train"]["yes"] == 15
    assert "different pictures" in said and "75.0%" in said and "stats.md" in said
    page = (tmp_path/"s"/"stats.md").read_text()
    assert DISCLAIMER in page and {n for n in re.findall(r"\]\((\w+\.png)\)", page)} == {p.name for p in (tmp_path/"s").glob("*.png")}
    assert json.loads((tmp_path/"s"/"stats.json").read_text())["records"] == m["records"]
    for p in (tmp_path/"s").glob("*.png"): assert Image.open(p).width <= 1200

def test_same_seed_same_files(toy, tmp_path):
    for name in "ab": stats(toy, out=tmp_path/name, seed=5)
    for p in (tmp_path/"a").iterdir(): assert p.read_bytes() == (tmp_path/"b"/p.name).read_bytes(), p.name
    pick = lambda seed: [r["id"] for r in L.pick_samples(open_splits(toy), 5, seed)]
    assert pick(1) == pick(1) != pick(2) and len(set(pick(1))) == 5

def test_default_place_and_what_it_does_not_replace(toy, tmp_path, capsys):
    import shutil
    data = tmp_path/"data"; shutil.copytree(toy, data)
    stats(data); stats(data, "test")                                     # a second time replaces the first
    assert (data/"stats"/"stats.md").exists() and sorted(p.name for p in data.iterdir() if p.name.startswith(".")) == []
    (data/"stats"/"mine.txt").write_text("x")
    with pytest.raises(MedchatError, match="not a folder that stats may replace"): stats(data)
    (tmp_path/"file").write_text(""); (tmp_path/"link").symlink_to(tmp_path)
    for out in (tmp_path/"file", tmp_path/"link", data, tmp_path):
        with pytest.raises(MedchatError, match="may replace"): stats(data, out=out)
    assert (data/"stats"/"mine.txt").exists()

@pytest.mark.parametrize("bad, says", [(dict(split="dev"), "no such split: dev.*train, test"), (dict(samples=-1), "negative")])
def test_stats_errors(toy, tmp_path, bad, says):
    with pytest.raises(MedchatError, match=says): stats(toy, out=tmp_path/"s", **bad)
    assert not (tmp_path/"s").exists()

def test_not_a_dataset(tmp_path):
    for call in (stats, show):
        with pytest.raises(MedchatError, match="no such dataset"): call(tmp_path/"none")
        with pytest.raises(MedchatError, match="not a dataset folder"): call(tmp_path)

def test_no_place_to_write(toy, no_write):
    with pytest.raises(MedchatError, match="cannot write"): stats(toy, out=no_write/"s")
    with pytest.raises(MedchatError, match="cannot write"): show(toy, html=no_write/"s.html")

@pytest.mark.filterwarnings("error::UserWarning")
def test_hostile_text_in_stats(hostile, tmp_path, capsys):
    stats(hostile, out=tmp_path/"s")
    said, page = capsys.readouterr().out, (tmp_path/"s"/"stats.md").read_text()
    for text in (said, page): assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert not re.search(r"(?<!\\)<", page) and "右肺" in said

def test_sets_without_pictures_or_with_damaged_ones(tmp_path, capsys):
    data = make(tmp_path, train=[record(i, []) for i in range(3)])
    m = stats(data, out=tmp_path/"s"); assert m["pictures"] == dict(train=0) and not (tmp_path/"s"/"samples.png").exists()
    show(data); show(data, html=tmp_path/"p.html")
    Image.effect_noise((64, 64), 80).save(whole := io.BytesIO(), "PNG"); half = whole.getvalue()[:2000]
    (tmp_path/"more").mkdir(); data = make(tmp_path/"more", test=[record(0, [b"no picture"]), record(1, [half]), record(2, [b""])])
    m = stats(data, out=tmp_path/"s")
    assert m["picture_kinds"]["test"]["not readable"] == 2 and m["records"] == dict(test=3)
    show(data, html=tmp_path/"q.html"); show(data)
    assert "<img" not in (tmp_path/"q.html").read_text() and "not readable" in capsys.readouterr().out

def test_odd_meta():
    row = dict(kind="vqa", turns=[dict(role="user", text="¿Dónde?")])
    for meta in ("", None, "[1]", "{broken", "3", '{"question_type": {"a": 1}}', '{"modality": 5, "findings": 3}'): assert set(facts({**row, "meta": meta})) == {"question type", "modality", "place", "meta"}
    assert facts({**row, "meta": "{}"})["question type"] == "other words"
    state = lambda v: findings(dict(kind="vqa"), dict(findings={"Edema": v}))
    assert [state(v) for v in (True, 1, "1.0", "Present", "left", ["a"])] == [{"edema": "present"}] * 6
    assert [state(v) for v in (False, 0, 0.0, "Absent")] == [{"edema": "absent"}] * 4 and state(-1) == {"edema": "uncertain"} and state(None) == state("") == {}
    assert findings(dict(kind="vqa"), dict(findings=["Edema"])) == {"edema": "present"} and findings(dict(kind="vqa"), {"findings": 3}) is None

# ---- little memory

def test_tally_never_says_too_much_and_never_misses_by_more_than_it_says():
    import random
    rng, tally, true = random.Random(0), Tally(), {}
    tally.room = 50
    for _ in range(20_000):
        v = min(int(rng.paretovariate(.7)), 10**6); tally.add(v); true[v] = true.get(v, 0) + 1
        assert len(tally) <= 100
    assert tally.n == 20_000 and tally.low_by <= 20_000 / 50
    for v, n in true.items(): assert tally[v] <= n <= tally[v] + tally.low_by

def test_pictures_are_a_fair_sample():
    pictures, n = Pictures(room=500), 20_000
    for k in range(3):
        for i in range(n):
            if (about := pictures.about(hashlib.sha256(b"%d" % i).hexdigest())) is not None: about["records"] += 1; about["even"] = i % 2 == 0
    assert len(pictures.kept) <= 500 and {a["records"] for a in pictures.kept.values()} == {3}
    assert abs(pictures.distinct - n) < .2 * n and .35 < sum(a["even"] for a in pictures.kept.values()) / len(pictures.kept) < .65
    assert pictures.about(hashlib.sha256(b"new").hexdigest(), new=False) is None

def test_pictures_are_not_decoded_and_not_read_whole(toy, monkeypatch):
    from PIL import ImageFile
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for s, d in open_splits(toy).items():
        side = L.Side(); L.count_texts(d, side); L.measure_pictures(d, side)
        assert all("head" in a for a in side.pictures.kept.values())

def test_memory_does_not_grow_with_the_rows(tmp_path):
    "Private memory (not the pages of the mapped file) at 400 and at 4,000 rows of distinct pictures and texts, in one process each."
    noise = os.urandom(40_000)
    def rows(n):
        for i in range(n): yield record(i, [picture(i, (64 + i % 50, 64 + i // 50)) + noise], f"question {i}", f"answer {i} " + "word " * 50, "caption")
    code = """import sys, re, threading, time
from pathlib import Path
from medchat.look import *
import medchat.look as L
most = 0
def look():
    global most
    while True: most = max(most, int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])); time.sleep(.01)
L.Tally.room = 100
splits = open_splits(sys.argv[1])
threading.Thread(target=look, daemon=True).start()
side = Side(pictures=Pictures(room=200))
for d in splits.values(): count_texts(d, side); measure_pictures(d, side)
print(most, side.records)"""
    peaks = []
    for n in (400, 4000):
        (home := tmp_path/str(n)).mkdir(); data = make(home, train=lambda: rows(n))
        done = subprocess.run([sys.executable, "-c", code, str(data)], cwd=root, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        peak, records = map(int, done.stdout.split()); assert records == n; peaks.append(peak / 1e3)
    assert peaks[1] < 1.15 * peaks[0] + 5, peaks

# ---- show

def test_prints_plainly_where_nobody_can_press_a_key(toy, capsys):
    show(toy, n=2); said = capsys.readouterr().out
    assert "── 1 of 27 ── r0 ──" in said and said.count("Q: ") == 2 and "\x1b" not in said and "images/0-0.png · 24 x 16 · PNG L" in said
    show(toy, split="test", start=3); said = capsys.readouterr().out
    assert "── 3 of 4 ── rt2" in said and said.count("Q: ") == 2 and "test · group gt2 · vqa · closed · type size · ct" in said
    show(toy, where=["kind=report"]); said = capsys.readouterr().out
    assert "── 1 of 1 ── rstudy" in said and said.count(" · PNG ") == 2 and "findings edema uncertain, effusion absent" in said

def test_conditions(toy):
    splits = open_splits(toy); ids = lambda *where: [splits[s][i]["id"] for s, i in find_rows(splits, where)]
    assert ids("finding=cardiomegaly") == ["rcap"] and ids("finding=pleural_effusion") == [] and ids("finding=effusion:absent") == ["rcap", "rstudy"] and ids("finding=edema:uncertain") == ["rstudy"]
    assert ids("answer-type=closed", "modality=ct") == [f"rt{i}" for i in range(4)] == ids("answer_type = CLOSED", "modality=CT")
    assert ids("text=HEART  enlarged", "id=R3") == ["r3"] and ids("group=g3") == ["r3"] and ids("question-type=size", "kind=report") == [] and ids("text=a=b") == []
    assert ids("finding=no finding") == [] and ids("finding=No_Finding:absent") == ["rcap", "rstudy"]
    for bad in ("kind", "=x", "kind=", "colour=red", "finding=x:maybe"):
        with pytest.raises(MedchatError, match="not a "): ids(bad)

@pytest.mark.parametrize("found, none", [({}, True), ({"edema": "absent"}, True), ({"support devices": "present"}, True), ({"edema": "uncertain"}, False), ({"fracture": "present"}, False), (None, None)])
def test_no_finding_is_one_too(found, none): assert (L._shows(found, "no finding", "present"), L._shows(found, "no finding", "absent")) == (none is True, none is False)

def test_an_unknown_finding_names_those_that_there_are(toy):
    for sought in ("lump", "Lump:absent", "x_ray"):
        with pytest.raises(MedchatError) as e: show(toy, where=[f"finding={sought}", "kind=report"])
        assert str(e.value).startswith(f"no record meets: finding={sought} and kind=report. ") and "\n" not in str(e.value) and all(f.lower() in str(e.value) for f in FINDINGS) and len(FINDINGS) == 14
    for known in ("fracture", "Pleural_Other:absent"):
        with pytest.raises(MedchatError, match="read from captions and reports.*medchat stats"): show(toy, where=[f"finding={known}"])
    with pytest.raises(MedchatError) as e: show(toy, where=["text=zebra"])
    assert "captions" not in str(e.value) and "medchat stats" in str(e.value)

@pytest.mark.parametrize("bad, says", [(dict(split="dev"), "no such split"), (dict(n=0), "--n counts from 1"), (dict(start=0), "--start counts from 1"), (dict(start=28), "fewer records: 27"),
    (dict(where=["id=zebra"]), "no record meets: id=zebra"), (dict(where=["text=heart", "start"]), "not a condition"), (dict(html="page.txt"), "not the name of an HTML page"), (dict(html="page"), "not the name")])
def test_show_errors(toy, tmp_path, monkeypatch, bad, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MedchatError, match=says): show(toy, **bad)
    assert list(tmp_path.iterdir()) == []

def test_hostile_text_in_the_terminal(hostile, capsys):
    show(hostile); said = capsys.readouterr().out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said) and r"\x1b[2J" in said and r"\u202e" in said and "右肺" in said

def test_terminal_without_utf8(hostile, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file := io.BytesIO(), encoding="ascii"))
    show(hostile); sys.stdout.flush()
    assert rb"\u53f3" in file.getvalue()

def test_blocks():
    im = Image.new("RGB", (3, 4), "red"); im.putpixel((0, 0), (0, 0, 255))
    text = blocks(im); lines = text.split("\n")
    assert len(lines) == 2 and text.count("▀") == 6 and lines[0].startswith("\x1b[38;2;0;0;255m\x1b[48;2;255;0;0m▀") and lines[0].endswith("\x1b[0m")
    assert "38;5;196m" in blocks(im, 40, 256) and "38;5;232m" in blocks(Image.new("L", (1, 1), 0), 40, 256) and "38;5;255m" in blocks(Image.new("L", (1, 1), 255), 40, 256)
    for size in ((4000, 10), (10, 4000), (1, 1)):
        lines = blocks(Image.new("L", size)).split("\n"); assert len(lines) <= 20 and lines[0].count("▀") <= 40

def test_thumbnails_are_small_and_open():
    import base64
    for im, kind in ((Image.effect_noise((900, 700), 80), "jpeg"), (Image.new("RGB", (900, 300), "red"), None)):
        uri, size = thumbnail(im); head, data = uri.split(",")
        opened = Image.open(io.BytesIO(base64.b64decode(data)))
        assert opened.size == size and max(size) == 320 and len(data) < 150_000 and (kind is None or head == f"data:image/{kind};base64")

def test_spread():
    assert spread_of({5: 1}) == "5" and spread_of({0: 1, 10: 1}) == "0 (0-10)" and spread_of({i: 1 for i in range(1, 101)}) == "50 (5-95)"

# ---- the pager, in a terminal

pty = pytest.importorskip("pty", reason="no terminals here")

def in_terminal(code, keys, term="xterm-256color", **env):
    "What a program writes on a terminal that presses `keys`, one after each line of choices."
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": term, "PYTHONPATH": str(root), "COLUMNS": "80", "LINES": "24", **env}); os.environ.pop("NO_COLOR", None)
        os.execv(sys.executable, [sys.executable, "-c", code])
    said, seen, end = b"", 0, time.time() + 60
    while time.time() < end:
        if fd in select.select([fd], [], [], .2)[0]:
            try: new = os.read(fd, 65536)
            except OSError: break
            if not new: break
            said += new
        while said.count(b"q: quit\x1b[0m") > seen and seen < len(keys): os.write(fd, keys[seen]); seen += 1
    else: os.kill(pid, 9); pytest.fail(f"did not end: {said[-500:]}")
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()

def heads(said): return re.findall(r"── (\d+) of \d+ ──", said)

def test_pager(toy):
    code = f"from medchat.look import show; show({str(toy)!r}, split='test'); print('AGAIN'); show({str(toy)!r}, n=2, start=2, where=['kind=vqa'])"
    status, said = in_terminal(code, [b"p", b"\n", b"n", b"p", b"\x1b[B", b"x", b" ", b"nq", b"n", b"n", b"q"], COLORTERM="truecolor")
    assert status == 0, said
    first, _, again = said.partition("AGAIN")
    assert heads(first) == ["1", "2", "3", "2", "3", "4"] and "This is the first one." in first and "That was the last one." in first and "\x1b[38;2;" in first and "▀" in first
    assert re.findall(r"── (\d) ── r\d ──", again) == ["2", "3"] and "That was the last one." in again   # keeps to n and to the conditions

def test_pager_ends_and_leaves_the_terminal_as_it_was(toy):
    code = f"""import os, termios
from medchat.look import show
before = termios.tcgetattr(0)
for _ in range(4): show({str(toy)!r}); assert termios.tcgetattr(0) == before
print("DUMB"); os.environ["TERM"] = "dumb"; show({str(toy)!r}, n=3)"""
    status, said = in_terminal(code, [b"q", b"\x04", b"\x03", b"\x1b"], COLORTERM="")
    paged, _, dumb = said.partition("DUMB")
    assert status == 0 and heads(paged) == ["1"] * 4 and "\x1b[38;5;" in paged and heads(dumb) == ["1", "2", "3"] and "\x1b" not in dumb, said

# ---- the page

def test_page_is_one_file(toy, tmp_path, capsys):
    show(toy, html=tmp_path/"new"/"look.html"); page = (tmp_path/"new"/"look.html").read_text()
    assert page.count("<article>") == 27 and DISCLAIMER in page and page.count("<script>") == 1 and "Records 1 to 27 of 27." in page and "http:" not in page.replace("http-equiv", "") and "https:" not in page
    assert all(src.startswith("data:image/") for src in re.findall(r'(?:src|href)="([^"]*)"', page)) and page.count('loading="lazy"') == 27
    assert [p.name for p in (tmp_path/"new").iterdir()] == ["look.html"]
    show(toy, html=tmp_path/"few.html", n=3, start=2, where=["kind=vqa"]); assert "Records 2 to 4 (there are more) with kind=vqa." in capsys.readouterr().out

def test_a_page_is_replaced_only_on_demand(toy, tmp_path):
    page = tmp_path/"p.html"; page.write_text("mine"); (tmp_path/"link.html").symlink_to(page)
    for name in ("p.html", "link.html"):
        with pytest.raises(MedchatError, match=r"page exists already: .*\.html\. .*--force"): show(toy, html=tmp_path/name)
    assert page.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
    (tmp_path/"d.html").mkdir()
    with pytest.raises(MedchatError, match="not the name of an HTML page"): show(toy, html=tmp_path/"d.html", force=True)
    show(toy, html=page, force=True); assert "<article" in page.read_text()

def test_hostile_text_on_the_page(hostile, tmp_path):
    show(hostile, html=tmp_path/"p.html"); page = (tmp_path/"p.html").read_text(encoding="utf-8")
    body = page.partition("<main>")[2].partition("</main>")[0]
    assert set(re.findall(r"<(\w+)", body)) == {"article", "figure", "img", "figcaption", "div", "h2", "p", "dl", "dt", "dd"} and not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", page)

def test_page_in_a_browser(hostile, tmp_path, browser):
    show(hostile, html=tmp_path/"p.html"); said, asked = [], []
    page = browser.new_page(viewport=dict(width=360, height=700))
    page.on("dialog", lambda d: (said.append(d.message), d.dismiss())); page.on("console", lambda m: said.append(m.text)); page.on("pageerror", lambda e: said.append(str(e)))
    page.on("request", lambda r: asked.append(r.url)); page.goto((tmp_path/"p.html").as_uri())
    assert page.locator("article").count() == len(HOSTILE) and page.inner_text("output") == f"{len(HOSTILE)} of {len(HOSTILE)} shown"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("[...document.images].map(i => i.loading = 'eager').length") == len(HOSTILE)
    page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    page.fill("input", "右肺"); assert page.locator("article:visible").count() == 1 and page.inner_text("output") == f"1 of {len(HOSTILE)} shown"
    page.fill("input", "ALERT svg"); assert page.locator("article:visible").count() == 1
    page.evaluate("const s = document.createElement('script'); s.textContent = 'alert(2)'; document.body.append(s)")   # even inside the page: forbidden
    assert [t for t in said if "Content Security Policy" not in t] == [] and not [u for u in asked if not u.startswith(("file:", "data:"))]
    page.close()

# ---- on the command line

def test_signatures_make_options():
    from medchat.cli import make_parser
    args = make_parser(show, "show", ["data"]).parse_args(["d", "--where", "kind=vqa", "text=a b", "--n", "3", "--html", "x.html", "--force"])
    assert args.force and args.where == ["kind=vqa", "text=a b"] and args.n == 3 and args.html == Path("x.html") and args.data == Path("d")
    args = make_parser(stats, "stats", ["data"]).parse_args(["d", "--split", "test", "--out", "o"])
    assert args.out == Path("o") and args.seed == 3407

def test_real_vqa_rad(real_data, tmp_path):
    from medchat.readers import read_records
    source = real_data/"vqa_rad"/"data_RAD"
    if not source.exists(): pytest.skip("no VQA-RAD")
    records = [r for r in read_records(source, "vqa_rad") if hasattr(r, "turns")][:300]
    row = lambda r: record(r.id, [(source/r.images[0]).read_bytes()], r.question, r.answer, r.kind, r.meta, answer_type=r.answer_type)
    m = stats(make(tmp_path, train=[row(r) for r in records[:250]], test=[row(r) for r in records[250:]]), out=tmp_path/"s")
    assert m["picture_kinds"]["train"].keys() <= {"JPEG RGB", "JPEG L"} and len(m["shares"]["question type"]["train"]) > 5 and m["same_answer"][0]["splits"]["train"]["right"] > 50
