"Curate: nothing lost, nothing leaked, nothing half-written."
import hashlib, json, os, random, shutil, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from medchat import curate, shelf
from medchat.core import MedchatError
from medchat.curate import convert, count, is_dataset, read_dataset
from medchat.images import load_image

root = Path(__file__).resolve().parent.parent

def picture(path, seed, size=(32, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3)).save(path)

def line(i, images=(), q="Large?", a="Yes", **kw):
    return dict(id=f"r{i}", images=list(images), kind="vqa", turns=[dict(role="user", text=q), dict(role="assistant", text=a)], **kw)

def write(home, rows): home.mkdir(exist_ok=True); (home/"records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows)); return home

@pytest.fixture
def source(tmp_path):
    "12 patients, 3 rows each; a few bad rows."
    home, rows = tmp_path/"source", []
    for p in range(12):
        picture(home/f"images/p{p}.png", p)
        for q in range(3): rows.append(line(f"{p}-{q}", [f"images/p{p}.png"], q=f"Question {q}?", a="Yes" if q else "The left lung", group=f"p{p}", answer_type="closed" if q else "open", licence="CC0-1.0"))
    (home/"images/empty.png").write_bytes(b""); (home/"images/broken.png").write_bytes((home/"images/p0.png").read_bytes()[:100]); (home/"images/unnamed.png").write_bytes((home/"images/p1.png").read_bytes())
    rows += [line("e", ["images/empty.png"]), line("b", ["images/broken.png"]), line("b2", ["images/broken.png"]), line("m", ["images/missing.png"]), line("x", ["../x.png"]), line("n", a=""), line("0-0", a="again"),
             line("s", split="holdout"), line("i", q="<image>")]
    return write(home, rows)

def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
def report(out): return json.loads((out/"report.json").read_text())

# ---- nothing lost
def test_every_row_is_accounted_for(source, tmp_path, capsys):
    out = convert(source, tmp_path/"out", "records", keep_splits=True)
    r, rejects = report(out), [json.loads(l) for l in open(out/"rejects.jsonl")]
    assert r["rows"] == {"in": 45, "out": 36, "rejected": 9, "repeats": 0, "dropped": 0} and len(rejects) == 9 and read_dataset(out, "train").num_rows == 36
    assert r["rejects"]["by_reason"] == {"damaged image": 2, "empty image file": 1, "no such image": 1, "image outside the source folder": 1, "empty answer": 1, "id used twice": 1, "unknown split": 1, "a question without words": 1}
    assert [x["where"] for x in rejects] == [f"records.jsonl:{n}" for n in range(37, 46)] and all(x["why"] and x["row"] for x in rejects)
    said = capsys.readouterr().out
    assert "rows in         45" in said and "rejected         9" in said and "NO TEST" in said and "medchat train --data" in said
    assert (r["images"]["unnamed"], r["images"]["unnamed_first"]) == (1, ["images/unnamed.png"])
    looked = [json.loads(l) for l in open(out/"images.jsonl")]
    assert len(looked) == 12 and looked[0] | dict(sha256="", bytes=0) == dict(path="images/p0.png", sha256="", bytes=0, format="PNG", mode="RGB", width=32, height=24, turned=False, window=None, looks_like=None)
    text = (out/"report.md").read_text()
    assert "| damaged image | 2 | records.jsonl:38" in text and "CC0-1.0" in text

def test_a_lost_row_stops_it(source, tmp_path, monkeypatch):
    records = curate._records
    monkeypatch.setattr(curate, "_records", lambda db, split: list(records(db, split))[1:])
    with pytest.raises(MedchatError, match="rows were lost: 45 in, 35 out, 9 left out"): convert(source, tmp_path/"out", "records", keep_splits=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]

def test_each_image_is_opened_once(source, tmp_path, monkeypatch):
    seen = Counter()
    real = shelf.image_info
    monkeypatch.setattr(shelf, "image_info", lambda p, *args: seen.update([Path(p).name]) or real(p, *args))
    convert(source, tmp_path/"out", "records", keep_splits=True)
    assert set(seen.values()) == {1} and seen["p0.png"] == 1 and seen["broken.png"] == 1

kinds = st.sampled_from(["good", "good", "good", "no image file", "broken", "empty answer", "not a row", "not json", "twice", "text only", "two images"])
@settings(max_examples=15)
@given(st.lists(kinds, min_size=1, max_size=15), st.booleans())
def test_rows_in_equal_rows_out_plus_rejects(tmp_path_factory, what, keep):
    home = tmp_path_factory.mktemp("mix"); picture(home/"a.png", 1); picture(home/"b.png", 2); (home/"broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    make = {"good": lambda i: line(i, ["a.png"]), "no image file": lambda i: line(i, ["gone.png"]), "broken": lambda i: line(i, ["broken.png"]), "empty answer": lambda i: line(i, a=" "), "not a row": lambda i: [i],
            "not json": lambda i: None, "twice": lambda i: line("same"), "text only": lambda i: line(i), "two images": lambda i: line(i, ["a.png", "b.png"])}
    (home/"records.jsonl").write_text("".join(("{broken" if w == "not json" else json.dumps(make[w](i))) + "\n" for i, w in enumerate(what)))
    good = sum(w in ("good", "text only", "two images") for w in what) + ("twice" in what)
    try: out = convert(home, home/"out", "records", keep_splits=keep, repeats="keep", max_rejects=1)
    except MedchatError as e:
        assert not (home/"out").exists() and (good == 0 and "rows were rejected" in str(e) or not keep and "too few groups" in str(e)); return
    data = read_dataset(out)
    assert sum(map(len, data.values())) == good and sum(1 for _ in open(out/"rejects.jsonl")) == len(what) - good

# ---- what is in the folder
def test_plain_datasets_opens_it_anywhere(source, tmp_path):
    "Moved to another place, its source gone, from another working folder, in another process."
    original = (source/"images/p3.png").read_bytes()
    shutil.move(convert(source, tmp_path/"out", "records", keep_splits=True), tmp_path/"elsewhere"); shutil.rmtree(source)
    code = "import sys, datasets; d = datasets.load_from_disk(sys.argv[1])['train']; r = d[9]; print(r['id'], r['images'][0].size, d.column_names); assert d.cast_column('images', datasets.List(datasets.Image(decode=False)))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path/"elsewhere")], cwd="/", capture_output=True, text=True)
    assert "r3-0 (32, 24) ['id', 'messages', 'images'" in done.stdout, done.stderr
    row = read_dataset(tmp_path/"elsewhere", "train")[9]
    assert row["images"][0]["bytes"] == original and row["image_sha256"] == [hashlib.sha256(original).hexdigest()] and row["image_paths"] == ["images/p3.png"]
    assert json.loads(row["meta"]) == {} and row["group"] == "p3" and row["turns"][0] == {"role": "user", "text": "Question 0?"}

def test_load_dataset_opens_it_too(source, tmp_path):
    from datasets import load_dataset
    out = convert(source, tmp_path/"out", "records")
    data = load_dataset(str(out), cache_dir=str(tmp_path/"cache"))
    assert {s: len(d) for s, d in data.items()} == {s: len(d) for s, d in read_dataset(out).items()} and data["test"][0]["images"][0].size == (32, 24)

def test_from_inside_the_source_folder(source, tmp_path, monkeypatch):
    "Image paths that happen to exist from the working folder do not make the bytes disappear."
    monkeypatch.chdir(source)
    convert(".", tmp_path/"out", "records", keep_splits=True); shutil.rmtree(source/"images")
    assert all(i["bytes"] for r in read_dataset(tmp_path/"out", "train") for i in r["images"])

def test_no_path_of_this_machine(source, tmp_path):
    out = convert(source, tmp_path/"out", "records", keep_splits=True)
    for name, data in tree(out).items(): assert str(tmp_path).encode() not in data and str(root).encode() not in data, name

def test_same_input_same_bytes(source, tmp_path):
    a, b = (tree(convert(source, tmp_path/n, "records")) for n in "ab")
    assert a == b and "README.md" in a

def test_only_what_belongs_there(source, tmp_path):
    out = convert(source, tmp_path/"out", "records")
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "dataset_dict.json", "images.jsonl", "rejects.jsonl", "report.json", "report.md", "splits.json", "test", "train", "validation"]
    ids = json.loads((out/"splits.json").read_text())
    assert ids["seed"] == 3407 and {s: ids["splits"][s] for s in ids["splits"]} == {s: d["id"] for s, d in read_dataset(out).items()}

def test_images_stay_undecoded(source, tmp_path, monkeypatch):
    out = convert(source, tmp_path/"out", "records", keep_splits=True); before = tree(out)
    from datasets import Image as Feature
    monkeypatch.setattr(Feature, "decode_example", lambda *a, **k: pytest.fail("decoded"))
    rows = list(read_dataset(out, "train").select(range(3)))
    assert load_image(rows[0]["images"][0]).size == (32, 24) and tree(out) == before

def test_text_only_and_several_images(tmp_path):
    home = tmp_path/"s"; [picture(home/f"{n}.png", n) for n in range(3)]
    out = convert(write(home, [line(0), line(1, ["0.png", "1.png", "2.png"], q="<image>Compare."), line(2, q="Small?")]), tmp_path/"out", "records", keep_splits=True)
    a, b, c = read_dataset(out, "train")
    assert a["images"] == [] and len(b["images"]) == 3 and [p["type"] for p in b["messages"][0]["content"]] == ["image"] * 3 + ["text"]
    assert b["messages"][0]["content"][3]["text"] == "Compare." and [p["type"] for p in c["messages"][0]["content"]] == ["text"]

def test_unicode_everywhere(tmp_path):
    home = tmp_path/"sóurce ✓"; picture(home/"bïld 1.png", 1)
    out = convert(write(home, [line("ä", ["bïld 1.png"], q="心臓は大きいですか?", a="はい", meta={"k": "ß|x"}), line("b", ["bïld 1.png"], a=""), {"id": "\ud800"}]), tmp_path/"öut", "records", keep_splits=True, max_rejects=1)
    assert read_dataset(out, "train")[0]["messages"][1]["content"][0]["text"] == "はい" and report(out)["rows"]["rejected"] == 2
    assert json.loads((out/"rejects.jsonl").read_text().splitlines()[1])["row"] == {"id": "\ud800"}

# ---- splits and leaks
def test_leak_by_bytes_under_another_name(tmp_path, capsys):
    home = tmp_path/"s"; picture(home/"a.png", 1); shutil.copy(home/"a.png", home/"b.png"); picture(home/"c.png", 3)
    out = convert(write(home, [line(0, ["a.png"], group="p0", split="train"), line(1, ["b.png"], group="p1", split="test"), line(2, ["c.png"], group="p2", split="test")]), tmp_path/"out", "records", keep_splits=True)
    (leak,) = report(out)["leaks"]
    assert (leak["images"], leak["of_images"], leak["groups"], leak["rows"]) == (1, 2, 0, 1)
    assert "LEAK: 1 of 2 test images also stand in train (1 of 2 rows). Fix: medchat convert" in capsys.readouterr().out

def test_leak_by_group_with_other_images(tmp_path, capsys):
    home = tmp_path/"s"; picture(home/"a.png", 1); picture(home/"b.png", 2)
    convert(write(home, [line(0, ["a.png"], group="p0", split="train"), line(1, ["b.png"], group="p0", split="val")]), tmp_path/"out", "records", keep_splits=True)
    assert "LEAK: 1 of 1 validation groups also stand in train" in capsys.readouterr().out

def test_split_names(tmp_path):
    rows = [line(i, q=f"{i}?", split=s) for i, s in enumerate(["train", "TRAINING", "val", "dev", "valid", "validate", "validation", "test", " Testing ", None])]
    data = read_dataset(convert(write(tmp_path/"s", rows), tmp_path/"out", "records", keep_splits=True))
    assert {s: len(d) for s, d in data.items()} == {"train": 3, "validation": 5, "test": 2} and set(data["validation"]["split"]) == {"validation"}

def test_published_split_is_kept(source, tmp_path):
    rows = [json.loads(l) | {"split": "test"} for l in open(source/"records.jsonl")][:36]
    data = read_dataset(convert(write(source, rows), tmp_path/"out", "records"))
    assert json.loads(data["train"][0]["meta"])["published_split"] == "test" and data["train"][0]["split"] == "train"

def test_repeats_are_merged_and_listed(tmp_path, capsys):
    home = tmp_path/"s"; picture(home/"a.png", 1); shutil.copy(home/"a.png", home/"copy.png"); picture(home/"b.png", 2)
    rows = [line(0, ["a.png"]), line(1, ["copy.png"], q=" LARGE? ", a="yes"), line(2, ["a.png"], a="No"), line(3, ["b.png"]), line(4), line(5, ["a.png"], split="test"), line(6, ["a.png"], a="Yes, it is")]
    for repeats, keep, dropped in (("merge", True, ["r1"]), ("keep", True, [])):
        out = convert(write(home, rows), tmp_path/"out", "records", keep_splits=keep, repeats=repeats, force=True)
        left = [json.loads(l) for l in open(out/"rejects.jsonl")]
        assert [x["where"] for x in left] == dropped and all(x["why"] == "repeat of r0" and x["row"]["id"] == x["where"] for x in left)
        r = report(out); assert r["rows"]["repeats"] == len(dropped) and r["rows"]["in"] == 7 == r["rows"]["out"] + len(left)
    assert "repeated         1   dropped" in capsys.readouterr().out
    for conflicts, out_rows in (("keep", 6), ("drop", 2)):
        r = report(convert(home, tmp_path/"out", "records", keep_splits=True, conflicts=conflicts, force=True))
        assert r["conflicts"]["questions"] == 1 and r["conflicts"]["rows"] == 4 and r["rows"]["out"] == out_rows

# ---- bad input, and nothing half-written
def left(folder): return sorted(p.name for p in folder.iterdir())

@pytest.mark.parametrize("args,kw,problem", [
    (("gone", "records", "out"), {}, "no such file or folder: gone"), (("source", "csv", "out"), {}, "unknown format: csv. Known formats: auto, records, vqa_rad"), (("source", "vqa_rad", "out"), {}, "no VQA-RAD files in: source"),
    (("source/images", "records", "out"), {}, "no records.jsonl in: source/images"), (("source/images/p0.png", "records", "out"), {}, "rows were rejected: not a line of JSON"),
    (("source", "records", "out"), dict(shares="80/30"), "not the shares of a split: 80/30"), (("source", "records", "source"), {}, "would replace its source"), (("source", "records", "."), {}, "not a folder to write to|would replace"),
    (("source", "records", "source/.."), {}, "would replace its source"), (("source", "records", "source/records.jsonl"), {}, "not a folder"), (("source", "records", "mine"), {}, "not a dataset of medchat: mine"), (("source", "records", "mine"), dict(force=True), "not a dataset of medchat: mine"),
    (("source/records.jsonl/x", "records", "out"), {}, "no such file"), (("empty.jsonl", "records", "out"), {}, "no rows in"), (("none.jsonl", "records", "out"), {}, "2 of 2 rows were rejected: empty answer: 2, such as none.jsonl:1: empty answer"), (("few.jsonl", "records", "out"), dict(keep_splits=False), "too few groups to split: 1")])
def test_errors(source, tmp_path, monkeypatch, args, kw, problem):
    monkeypatch.chdir(tmp_path); Path("mine").mkdir(); Path("mine/thesis.txt").write_text("irreplaceable"); Path("empty.jsonl").write_text("\n\n")
    Path("none.jsonl").write_text("".join(json.dumps(line(i, a="")) + "\n" for i in range(2))); Path("few.jsonl").write_text(json.dumps(line(0)) + "\n")
    before = tree(tmp_path)
    source, format, out = args
    with pytest.raises(MedchatError, match=problem) as e: convert(source, out, format, **dict(keep_splits=True) | kw)
    for rejects in tmp_path.glob("*.rejects.jsonl"): assert rejects.name in str(e.value); rejects.unlink()
    assert "\n" not in str(e.value) and tree(tmp_path) == before and left(tmp_path) == ["empty.jsonl", "few.jsonl", "mine", "none.jsonl", "source"]

def test_force(source, tmp_path):
    out = convert(source, tmp_path/"out", "records", keep_splits=True); before = tree(out)
    with pytest.raises(MedchatError, match="dataset exists already.*--force"): convert(source, out, "records", keep_splits=True)
    assert tree(out) == before
    convert(source, out, "records", force=True)
    assert report(out)["made"]["split"] == "by group, 80/10/10" and left(tmp_path) == ["out", "source"]
    (out/"notes.txt").write_text("mine"); before = tree(out)
    with pytest.raises(MedchatError, match="other files too.*notes.txt"): convert(source, out, "records", keep_splits=True, force=True)
    assert tree(out) == before

def test_empty_folder_is_fine(source, tmp_path): (tmp_path/"out").mkdir(); assert is_dataset(convert(source, tmp_path/"out", "records", keep_splits=True))
def test_nested_new_folder(source, tmp_path): assert is_dataset(convert(source, tmp_path/"a"/"b"/"out", "records", keep_splits=True))

def test_no_write_access(source, no_write):
    with pytest.raises(MedchatError, match="cannot write"): convert(source, no_write, "records", keep_splits=True)

def test_disk_too_small(source, tmp_path, monkeypatch):
    monkeypatch.setattr(curate.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(MedchatError, match="not enough disk space: .* MB needed, 0 MB free"): convert(source, tmp_path/"out", "records", keep_splits=True)
    assert left(tmp_path) == ["source"]

def run(code, cwd, **kw): return subprocess.Popen([sys.executable, "-c", code], cwd=cwd, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def test_disk_full_while_writing(source, tmp_path):
    "A true write error from the operating system, deep inside Arrow: one line, and the old dataset stands."
    picture(source/"images/p0.png", 0, size=(400, 400))
    out = convert(source, tmp_path/"out", "records", keep_splits=True); before = tree(out)
    code = """import resource, signal
from medchat.core import MedchatError
from medchat.curate import convert
import datasets, pyarrow
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try: convert('source', 'out', 'records', force=True)
except MedchatError as e: print('ERROR', e)"""
    said, err = run(code, tmp_path).communicate(timeout=120)
    assert said.startswith("ERROR cannot write: out. File too large"), said + err
    assert tree(out) == before and left(tmp_path) == ["out", "source"]

@pytest.mark.parametrize("stage", ["reading", "writing train"])
@pytest.mark.parametrize("ended", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ended_in_the_middle(source, tmp_path, stage, ended):
    "The process ends, nothing is left, the old dataset stands."
    out = convert(source, tmp_path/"out", "records", keep_splits=True); before = tree(out)
    code = f"""import time
from medchat import curate, shelf
def slow(it, total=None, desc=''):
    for x in it:
        yield x
        if desc == {stage!r}: print('NOW', flush=True); time.sleep(.5)
curate.progress = slow
from medchat.cli import main
raise SystemExit(main("convert source --format records --out out --force --keep-splits".split()))"""
    p = run(code, tmp_path)
    assert p.stdout.readline().strip() == "NOW"
    p.send_signal(ended); _, err = p.communicate(timeout=60)
    assert p.returncode == 128 + ended and "Traceback" not in err
    assert tree(out) == before and left(tmp_path) == ["out", "source"]

def test_killed_at_any_point(source, tmp_path):
    "SIGKILL at ten moments between start and end: the old dataset stands or comes back, the next conversion clears what was left, and the result is the same to the byte."
    for p in range(12, 60): picture(source/f"images/p{p}.png", p, size=(200, 200))
    with open(source/"records.jsonl", "a") as f: f.writelines(json.dumps(line(f"m{p}", [f"images/p{p}.png"], q=f"{p}?", group=f"p{p}")) + "\n" for p in range(12, 60))
    expected = tree(convert(source, tmp_path/"out", "records", seed=7)); before = tree(convert(source, tmp_path/"out", "records", seed=8, force=True)); assert before != expected
    code = """import sys
from medchat.cli import main
print('NOW', flush=True)
raise SystemExit(main("convert source --format records --out out --force --seed 7 --num-proc 2".split()))"""
    def start(): p = run(code, tmp_path, start_new_session=True); assert p.stdout.readline().strip() == "NOW"; return p
    began = time.perf_counter(); p = start(); p.communicate(timeout=120); whole = time.perf_counter() - began
    assert tree(tmp_path/"out") == expected
    convert(source, tmp_path/"out", "records", seed=8, force=True)
    rng, killed = random.Random(0), 0
    for k in range(10):
        p = start(); time.sleep(whole * (k + rng.random()) / 10 * .9)
        p.kill(); p.communicate(timeout=60); killed += p.returncode == -signal.SIGKILL
        assert not (tmp_path/"out").exists() or tree(tmp_path/"out") in (before, expected)
    assert killed >= 5
    left_behind = {x.name for x in tmp_path.iterdir()} - {"out", "source"}
    convert(source, tmp_path/"out", "records", seed=7, force=True, num_proc=1)
    assert tree(tmp_path/"out") == expected and left(tmp_path) == ["out", "source"], left_behind

def test_killed_while_the_folders_change_places(source, tmp_path):
    "Between moving the old dataset aside and putting the new one there: the old one comes back, and nothing is lost."
    out = convert(source, tmp_path/"out", "records"); before = tree(out)
    dead = subprocess.Popen(["true"]); dead.wait()
    out.rename(tmp_path/f".out.{dead.pid}.old"); (tmp_path/f".out.{dead.pid}.tmp").mkdir()
    with pytest.raises(MedchatError, match="dataset exists already"): convert(source, out, "records")
    assert tree(out) == before
    convert(source, out, "records", force=True); assert left(tmp_path) == ["out", "source"]

def test_processes_end_with_the_conversion(source, tmp_path):
    "After SIGKILL the processes that decode notice, and end."
    for p in range(12, 200): picture(source/f"images/p{p}.png", p, size=(300, 300))
    with open(source/"records.jsonl", "a") as f: f.writelines(json.dumps(line(f"m{p}", [f"images/p{p}.png"], group=f"p{p}")) + "\n" for p in range(12, 200))
    code = """from medchat import shelf
start = shelf._Process.start
def started(self): start(self); print(self.running.pid, flush=True)
shelf._Process.start = started
from medchat.curate import convert
convert('source', 'out', 'records', num_proc=2)"""
    p = run(code, tmp_path); pids = [int(p.stdout.readline()) for _ in range(2)]
    p.kill(); p.communicate(timeout=60)
    end = time.time() + 20
    alive = lambda pid: os.path.exists(f"/proc/{pid}") and open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    while any(map(alive, pids)) and time.time() < end: time.sleep(.05)
    assert not any(map(alive, pids))

def test_memory_does_not_grow_with_the_rows(tmp_path):
    "Peak of a conversion of 6,000 rows against that of 600."
    def peak(n):
        home = tmp_path/f"s{n}"; home.mkdir()
        for i in range(n): Image.frombytes("L", (16, 16), random.Random(i).randbytes(256)).save(home/f"{i}.png")
        write(home, [line(i, [f"{i}.png"], group=f"p{i}") for i in range(n)])
        code = f"""from medchat.curate import convert
convert('s{n}', 'out{n}', 'records', num_proc=1)
print('PEAK', next(int(l.split()[1]) / 1024 for l in open('/proc/self/status') if l.startswith('VmHWM')))"""
        said, err = run(code, tmp_path).communicate(timeout=200); return float(said.rpartition("PEAK")[2])
    small, large = peak(600), peak(6000)
    assert large < 1.15 * small and large < 700, (small, large)

def test_header_only(source, tmp_path):
    "Bytes pass through: a picture whose end is missing is not noticed, and the report says what was not looked for."
    (source/"images/p3.png").write_bytes((source/"images/p3.png").read_bytes()[:-500])
    r = report(convert(source, tmp_path/"out", "records", verify="header"))
    assert r["rows"]["out"] == 37 and "damaged image" not in r["rejects"]["by_reason"] and r["images"]["checked"] == "header" and "near-duplicates were not looked for" in (tmp_path/"out"/"report.md").read_text()
    assert report(convert(source, tmp_path/"full", "records", max_rejects=.3))["rows"]["out"] == 33

def test_near_duplicates(tmp_path, capsys):
    "A film saved again as JPEG under another name in the other split is a leak; by group the two stay together."
    from medchat.samples import draw_phantom
    home = tmp_path/"s"; home.mkdir()
    for i in range(12): Image.fromarray(draw_phantom({}, patient=100 + i)).resize((300, 300)).save(home/f"{i}.png")
    Image.open(home/"0.png").resize((200, 200)).save(home/"again.jpg", quality=80)
    write(home, [line(i, [f"{i}.png"], split="train" if i < 10 else "test", group=f"p{i}") for i in range(12)] + [line("x", ["again.jpg"], split="test", group="q")])
    (leak,) = report(convert(home, tmp_path/"out", keep_splits=True))["leaks"]
    assert (leak["images"], leak["near"], leak["rows"]) == (0, 1, 1) and "1 more look like one there" in capsys.readouterr().out
    data = {s: set(d["id"]) for s, d in read_dataset(convert(home, tmp_path/"out", force=True)).items()}
    assert sum({"r0", "rx"} <= ids for ids in data.values()) == 1 and report(tmp_path/"out")["leaks"] == []
    looks = [json.loads(l) for l in open(tmp_path/"out"/"images.jsonl")]
    assert {x["path"]: x["looks_like"] for x in looks if x["looks_like"]} == {"again.jpg": "0.png"}

def test_too_many_rejects_keep_their_list(source, tmp_path):
    with pytest.raises(MedchatError, match="9 of 45 rows were rejected: .*All of them: .*out.rejects.jsonl. To go on without them: --max-rejects 1"): convert(source, tmp_path/"out", "records", max_rejects=.1)
    assert left(tmp_path) == ["out.rejects.jsonl", "source"] and len((tmp_path/"out.rejects.jsonl").read_text().splitlines()) == 9

def test_texts_are_cleaned_and_counted(tmp_path):
    home = tmp_path/"s"; rows = [line(0, q=" Is it\tlarge? ", a="Yes\u200b"), line(1, q="So\u00ad?", a="NaN"), line(2, q="Who?", a="Seen by Dr. Miller."), line(3, q="Plain?", a="Plain.")]
    r = report(convert(write(home, rows), tmp_path/"out", "records", keep_splits=True, max_rejects=1, lowercase=True, scrub=True))
    assert r["rejects"]["by_reason"] == {"placeholder instead of an answer": 1} and r["steps"]["controls"]["rows"] == 2 and r["removed"] == {"name": 1}
    assert [d["turns"][1]["text"] for d in read_dataset(tmp_path/"out", "train")] == ["yes", "seen by dr. XXXX.", "plain."]

def test_most_images(tmp_path):
    home = tmp_path/"s"; [picture(home/f"{n}.png", n // 2) for n in range(6)]
    out = convert(write(home, [line(0, [f"{n}.png" for n in range(6)])]), tmp_path/"out", "records", keep_splits=True, max_images=3)
    row = read_dataset(out, "train")[0]
    assert row["image_paths"] == ["0.png", "2.png", "4.png"] and json.loads(row["meta"])["left_out_images"] == ["1.png", "3.png", "5.png"] and report(out)["chosen"] == 1

def test_count(source, medchat):
    said = medchat("count", "source")
    assert said.returncode == 0 and "45 rows, 3 rejected" in said.stdout and "no split" in said.stdout

def test_image_changed_or_gone_meanwhile(source, tmp_path, monkeypatch):
    real = curate.write_split
    for change, problem in ((lambda p: p.write_bytes(b"other"), "image changed while converting: images/p5.png"), (lambda p: p.unlink(), "image vanished while converting: images/p5.png")):
        monkeypatch.setattr(curate, "write_split", lambda *a: (change(source/"images/p5.png"), real(*a)))
        with pytest.raises(MedchatError, match=problem): convert(source, tmp_path/"out", "records", keep_splits=True)
        picture(source/"images/p5.png", 5)
    assert left(tmp_path) == ["source"]

# ---- read_dataset
def test_read_dataset_errors(source, tmp_path):
    out = convert(source, tmp_path/"out", "records", keep_splits=True)
    for path, split, problem in ((tmp_path/"gone", None, "no such dataset folder"), (source, None, "not a dataset folder"), (out/"train", None, "not a dataset folder"), (source/"records.jsonl", None, "not a dataset folder"), (out, "test", "no such split: test. .* has: train")):
        with pytest.raises(MedchatError, match=problem): read_dataset(path, split)
    for f in (out/"train").glob("*.arrow"): f.write_bytes(f.read_bytes()[:1000])
    with pytest.raises(MedchatError, match="damaged dataset folder"): read_dataset(out)

def test_command_line(source, tmp_path, medchat):
    ok = medchat("convert", "source", "--out", "out")
    assert ok.returncode == 0 and "rows out        36" in ok.stdout, ok.stderr
    bad = medchat("convert", "source", "--format", "poem", "--out", "out2")
    assert bad.returncode == 2 and bad.stderr.strip().count("\n") == 0 and "unknown format: poem. Known formats" in bad.stderr

# ---- the real thing
@pytest.fixture(scope="module")
def rad(real_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rad")
    return {keep: convert(real_data/"vqa_rad", folder/str(keep), keep_splits=keep) for keep in (True, False)}

def test_vqa_rad_as_published(rad):
    r = report(rad[True])
    assert r["rows"] == {"in": 3515, "out": 3046, "rejected": 0, "repeats": 469, "dropped": 0} and {s: x["rows"] for s, x in r["splits"].items()} == {"train": 2595, "test": 451}
    assert {s: sum(x.values()) for s, x in r["read"].items()} == {"train": 3064, "test": 451}
    (leak,) = r["leaks"]
    assert (leak["images"], leak["of_images"], leak["rows"], leak["of_rows"]) == (203, 203, 451, 451)
    assert (r["conflicts"]["questions"], r["conflicts"]["rows"]) == (24, 48)
    assert r["steps"]["mended by the reader"]["rows"] == 11 and r["images"]["unnamed"] == 1 and r["images"]["files"] == 314
    assert "**203 of 203 test images also stand in train" in (rad[True]/"report.md").read_text()
    assert sum(f.stat().st_size for f in rad[True].rglob("*")) < 200e6

def test_vqa_rad_by_group(rad):
    r = report(rad[False])
    assert r["leaks"] == [] and r["rows"] | {"in": 0} == {"in": 0, "out": 3032, "rejected": 0, "repeats": 483, "dropped": 0}
    assert {s: round(x["rows"] / 3032, 2) for s, x in r["splits"].items()} == {"train": .8, "validation": .1, "test": .1}
    for s in r["splits"].values(): assert abs(s["strata"]["vqa closed"] / s["rows"] - sum(x["strata"]["vqa closed"] for x in r["splits"].values()) / 3032) < .01
    data = read_dataset(rad[False])
    images = {s: set(h for x in d["image_sha256"] for h in x) for s, d in data.items()}
    assert not images["test"] & images["train"] and not images["validation"] & images["train"] and not images["test"] & images["validation"]
    assert load_image(data["test"][0]["images"][0]).mode == "RGB"

# ---- what a newcomer tripped over
def test_columns_make_a_table(tmp_path, medchat):
    home = tmp_path/"s"; [picture(home/f"{n}.png", n) for n in range(4)]
    (home/"t.csv").write_text("Bild,Frage,Antwort\n" + "".join(f"{n}.png,Large {n}?,yes\n" for n in range(4)))
    assert len(read_dataset(convert(home/"t.csv", tmp_path/"out", columns="image=Bild,question=Frage,answer=Antwort", keep_splits=True), "train")) == 4
    bad = medchat("convert", "s/t.csv", "--out", "out2")
    assert bad.returncode == 2 and "Bild, Frage, Antwort" in bad.stderr and "--columns" in bad.stderr

def test_the_fix_that_is_printed_works(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path); home = tmp_path/"s"; [picture(tmp_path/f"elsewhere/{n}.png", n) for n in range(6)]
    write(home, [line(n, [f"{n}.png"], q=f"Seen by Dr. Miller {n}?", group=f"p{n}", split="train") for n in range(6)] + [line("x", a="")])
    convert("s", "out", images="elsewhere", scrub=True, max_rejects=.5, keep_splits=True)
    fix = next(l for l in capsys.readouterr().out.splitlines() if "NO TEST" in l).partition("Fix: medchat ")[2]
    assert "--images elsewhere" in fix and "--scrub" in fix and "--max-rejects 0.5" in fix
    from medchat.cli import main
    assert main(fix.split()) == 0 and set(read_dataset("out")) == {"train", "validation", "test"} and report(Path("out"))["removed"]

def test_a_dataset_is_no_source(source, tmp_path):
    out = convert(source, tmp_path/"out", "records")
    for work in (lambda: convert(out, tmp_path/"again"), lambda: count(out)):
        with pytest.raises(MedchatError, match="a dataset folder already"): work()

@pytest.mark.parametrize("kw", [dict(max_rejects=30), dict(max_rejects=-1), dict(max_rejects=float("nan")), dict(num_proc=0)])
def test_numbers_out_of_range(source, tmp_path, kw):
    with pytest.raises(MedchatError, match="share from 0 to 1|at least 1"): convert(source, tmp_path/"out", "records", **kw)

def test_a_success_clears_the_list_of_a_failure(source, tmp_path):
    with pytest.raises(MedchatError): convert(source, tmp_path/"out", "records", max_rejects=0)
    assert left(tmp_path) == ["out.rejects.jsonl", "source"]
    convert(source, tmp_path/"out", "records"); assert left(tmp_path) == ["out", "source"]

def test_where_the_images_may_be(tmp_path):
    with pytest.raises(MedchatError, match="Where the images lie elsewhere: --images DIR"): convert(write(tmp_path/"s", [line(0, ["gone.png"])]), tmp_path/"out")
