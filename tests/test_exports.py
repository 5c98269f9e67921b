"Exports: what other tools read, and the same records back."
import hashlib, io, json
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from medchat import curate, exports
from medchat.core import MedchatError, Record, Turn
from medchat.exports import FILES, export_data
from medchat.messages import clean_text, to_messages
from medchat.readers import Reject, read_records

def picture(n, kind="PNG"):
    from PIL import Image
    import numpy as np
    f = io.BytesIO(); Image.fromarray(np.random.default_rng(n).integers(0, 255, (9, 8 + n, 3), np.uint8)).save(f, kind); return f.getvalue()

PICTURES = [picture(0), picture(1, "JPEG"), picture(2, "TIFF"), picture(3, "WEBP"), picture(4, "GIF"), picture(5, "BMP"), picture(6, "JPEG2000"), picture(7, "PPM")]
sha = lambda data: hashlib.sha256(data).hexdigest()

def as_row(record, data):
    d = record.to_dict(); d.pop("images")
    return d | dict(messages=to_messages(record), images=[{"bytes": b, "path": None} for b in data], image_paths=record.images, image_sha256=[sha(b) for b in data], meta=json.dumps(record.meta, ensure_ascii=False))

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Make a dataset of rows in memory, in the place of one on disk."
    from datasets import Dataset, Image, List
    held = {}
    features = curate.dataset_features(); features["images"] = List(Image(decode=False))
    def make(pairs):
        for s in ("train", "validation", "test"):
            if rows := [as_row(r, data) for r, data in pairs if r.split == s]: held[s] = Dataset.from_list(rows, features=features)
    def read(path, split=None): return held[split] if split else held
    def run(pairs, to, out, **kw):
        held.clear(); make(pairs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exports, "read_dataset", read)
            return export_data(Path("data"), to, out, **kw)
    return run

def record(n=0, n_images=1, **kw):
    kw = {"kind": "vqa", "answer_type": "open", "split": "train", "group": "g", "source": "s", "licence": "CC0-1.0", **kw}
    return Record(id=f"r{n}", images=[f"{i}.png" for i in range(n_images)], turns=[Turn("user", "What is it?"), Turn("assistant", "A film.")], **kw)

def same(out, pairs):
    "Is what stands in `out` what was put in?"
    back = list(read_records(out)); assert not [x for x in back if isinstance(x, Reject)], back
    told = lambda r, data: json.dumps(r.to_dict() | {"images": [sha(d) for d in data]}, sort_keys=True)
    read = lambda r, p: r.blobs[p] if p in r.blobs else (out/p).read_bytes()
    assert sorted(told(r, [read(r, p) for p in r.images]) for r in back) == sorted(told(r, data) for r, data in pairs)
    return back

# ---- there and back
words = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12) | st.sampled_from(["Is it <image> large?", "<image>\nA film", "a <|im_end|> b", "<video>x", "\u202eمرحبا", "肺 \u2028 野", "a\nb", '"\\', "<", "x<y>z", "</s>ok", "data:"])
text = st.lists(words, min_size=1, max_size=3).map(" ".join).map(str.strip).filter(lambda t: clean_text(t))
plain = st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False, allow_infinity=False) | words
meta = st.dictionaries(words, st.recursive(plain, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2), max_leaves=4), max_size=3)
one = st.tuples(st.lists(st.tuples(text, text), min_size=1, max_size=3), st.lists(st.sampled_from(PICTURES), max_size=3), st.sampled_from(["caption", "vqa", "report", "conversation"]),
                st.sampled_from(["open", "closed", None]), st.sampled_from(["train", "validation", "test"]), st.none() | words, words, words, st.sampled_from(["en", "zh", "de"]), meta)

def to_pair(n, x):
    turns, data, kind, answer_type, split, group, source, licence, language, meta = x
    return Record(f"r{n}é", [f"{i}.png" for i in range(len(data))], [Turn(role, t) for pair in turns for role, t in zip(("user", "assistant"), pair)], kind, answer_type, split, group, source, licence, language, meta), data

@pytest.mark.parametrize("to", FILES)
@settings(max_examples=15)
@given(rows=st.lists(one, min_size=1, max_size=5))
def test_the_same_records_come_back(made, tmp_path_factory, to, rows):
    pairs = [to_pair(n, x) for n, x in enumerate(rows)]; out = tmp_path_factory.mktemp("out")/"x"
    assert made(pairs, to, out) == out
    same(out, pairs)

@pytest.mark.parametrize("to", FILES)
def test_through_convert_and_back_again(tmp_path, to):
    src = tmp_path/"src"; (src/"images").mkdir(parents=True)
    for n, data in enumerate(PICTURES[:6]): (src/"images"/f"{n}").write_bytes(data)
    rows = [dict(id=f"r{n}", images=[f"images/{n % 6}"][:n % 4] + [f"images/{(n + 1) % 6}"][:n % 3], group=f"g{n % 6}", split=("train", "validation", "test")[n % 3], kind="vqa", answer_type="open", source="ß", licence="CC0-1.0",
                 language="en", meta={"n": n if n % 2 else str(n)}, turns=[dict(role=r, text=f"{t} {n} é") for r, t in (("user", "Q"), ("assistant", "A")) for _ in (0,)] * (1 + n % 2)) for n in range(12)]
    (src/"records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = tmp_path/"data"; curate.convert(src, data, "records", keep_splits=True)
    told = lambda path: sorted(json.dumps({k: v for k, v in row.items() if k not in ("images", "image_paths")}, sort_keys=True) for ds in curate.read_dataset(path).values() for row in ds)
    out = export_data(data, to, tmp_path/to)
    assert len(told(data)) == 12 and told(curate.convert(out, tmp_path/"again", keep_splits=True)) == told(data)

# ---- what the tools see
PAIRS = [(record(0, 0), []), (record(1), PICTURES[:1]), (record(2, 2, split="test"), PICTURES[:2]), (record(3), PICTURES[:1]), (record(4, split="validation", meta={"a": 1}), PICTURES[1:2]), (record(5, meta={"a": ["x"]}), PICTURES[:1])]

def test_llava(made, tmp_path, capsys):
    out = made(PAIRS, "llava", tmp_path/"x"); assert "--image_folder" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "export.json", "images", "test.json", "train.json", "validation.json"]
    rows = json.loads((out/"train.json").read_text())
    assert [r["id"] for r in rows] == ["r1", "r0", "r3", "r5"] # one with a picture first
    assert rows[0]["conversations"] == [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A film."}] and "image" not in rows[1]
    assert (out/rows[0]["image"]).read_bytes() == PICTURES[0] and isinstance(json.loads((out/"test.json").read_text())[0]["image"], list)
    assert sorted(p.suffix for p in (out/"images").iterdir()) == [".jpg", ".png"]

@pytest.mark.parametrize("to", ["sharegpt", "llamafactory"])
def test_as_llama_factory_loads_it(made, tmp_path, to):
    "Its loader: load_dataset('json'), the columns that dataset_info.json names, as many <image> as pictures, roles in turn, files from the folder."
    from datasets import load_dataset
    out = made(PAIRS, to, tmp_path/"x")
    if to == "llamafactory":
        info = json.loads((out/"dataset_info.json").read_text()); assert list(info) == ["data_train", "data_validation", "data_test"]
        assert info["data_train"] == dict(file_name="train.json", formatting="sharegpt", columns=dict(messages="messages", images="images"), tags=dict(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant"))
    n = 0
    for split in ("train", "validation", "test"):
        for row in load_dataset("json", data_files=[str(out/f"{split}.json")], split="train", cache_dir=str(tmp_path/"c")):
            assert [m["role"] for m in row["messages"]] == ["user", "assistant"] and isinstance(row["medchat"], str); n += 1
            assert sum(m["content"].count("<image>") for m in row["messages"]) == len(row["images"] or []) and all((out/i).is_file() for i in row["images"] or [])
    assert n == len(PAIRS)

def test_many_text_rows_before_the_first_picture(made, tmp_path):
    "datasets takes the types from the first ten megabytes of a JSON file."
    from datasets import load_dataset
    long = Record("x", [], [Turn("user", "Q " + "w" * 200_000), Turn("assistant", "A")], "vqa", split="train")
    pairs = [(Record(f"t{n}", [], long.turns, "vqa", split="train"), []) for n in range(60)] + [PAIRS[1]]
    out = made(pairs, "sharegpt", tmp_path/"x")
    assert (out/"train.json").stat().st_size > 11e6
    assert sum(len(r["images"]) for r in load_dataset("json", data_files=[str(out/"train.json")], split="train", cache_dir=str(tmp_path/"c"))) == 1
    same(out, pairs)

def test_as_trl_loads_it(made, tmp_path):
    from datasets import load_dataset
    out = made([p for p in PAIRS if p[1]], "trl", tmp_path/"x")
    ds = load_dataset(str(out), cache_dir=str(tmp_path/"c"))
    assert {s: len(d) for s, d in ds.items()} == {"train": 3, "validation": 1, "test": 1} and ds["train"].column_names == ["id", "messages", "images", "medchat"]
    assert [i.size for i in ds["test"][0]["images"]] == [(8, 9), (9, 9)] and ds["train"][0]["messages"][0]["content"] == [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    assert load_dataset("parquet", data_files=str(out/"train.parquet"), split="train", cache_dir=str(tmp_path/"c"))[0]["images"][0].size == (8, 9)

def test_jsonl_and_one_split(made, tmp_path):
    out = made(PAIRS, "jsonl", tmp_path/"x"); same(out, PAIRS)
    assert len((out/"records.jsonl").read_text().splitlines()) == 6
    out = made(PAIRS, "jsonl", tmp_path/"y", split="test"); same(out, PAIRS[2:3])
    out = made(PAIRS, "llava", tmp_path/"z", split="test"); assert not (out/"train.json").exists()
    about = json.loads((out/"export.json").read_text())
    assert (about["to"], about["rows"], about["images"], about["licences"]) == ("llava", {"test": 1}, 2, {"CC0-1.0": 1}) and "CC0-1.0" in (out/"README.md").read_text()

# ---- whose folder it is
def test_refusals(made, tmp_path, monkeypatch):
    run = lambda out, force=False: made(PAIRS, "llava", out, force=force)
    out = run(tmp_path/"x"); before = (out/"train.json").read_bytes()
    with pytest.raises(MedchatError, match="export exists already.*--force"): run(out)
    (out/"old").mkdir(); (out/"old"/"f").touch()
    for force in (False, True):
        with pytest.raises(MedchatError, match="holds other files too"): run(out, force)
    (out/"old"/"f").unlink(); (out/"old").rmdir()
    assert run(out, force=True) == out and (out/"train.json").read_bytes() == before and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    for text in (None, "{", "[]", '{"files": 3}', '{"to": 1}'):
        other = tmp_path/"other"; other.mkdir(exist_ok=True); (other/"a.txt").touch()
        if text: (other/"export.json").write_text(text)
        with pytest.raises(MedchatError, match="not an export of medchat"): run(other, True)
    (tmp_path/"file").touch(); (tmp_path/"link").symlink_to(out); (tmp_path/"empty").mkdir()
    for bad in ("file", "link"):
        with pytest.raises(MedchatError, match="not a folder"): run(tmp_path/bad, True)
    run(tmp_path/"empty")
    monkeypatch.chdir(tmp_path)
    for bad in (Path("data"), Path("data/in/it"), Path(".")):
        with pytest.raises(MedchatError, match="lie in one another|not a folder to write"): run(bad, True)

def test_a_fault_leaves_nothing(made, tmp_path, monkeypatch):
    made(PAIRS, "llava", tmp_path/"x"); before = sorted(p.name for p in (tmp_path/"x").iterdir())
    monkeypatch.setattr(exports, "_readme", lambda *a: 1 / 0)
    for force, out in ((True, "x"), (False, "y")):
        with pytest.raises(ZeroDivisionError): made(PAIRS, "llava", tmp_path/out, force=force)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"] and sorted(p.name for p in (tmp_path/"x").iterdir()) == before

def test_errors_in_one_line(made, tmp_path, no_write):
    with pytest.raises(MedchatError, match="unknown form: yolo"): made(PAIRS, "yolo", tmp_path/"x")
    with pytest.raises(MedchatError, match="cannot write"): made(PAIRS, "llava", no_write)
    bad = (record(1), PICTURES[:1]); row = as_row(*bad)
    with pytest.raises(MedchatError, match="damaged dataset folder"): exports.write_picture(tmp_path, PICTURES[1], row["image_sha256"][0])

def test_no_dataset(tmp_path):
    with pytest.raises(MedchatError, match="no such dataset folder"): export_data(tmp_path/"nowhere", "llava", tmp_path/"x")
    with pytest.raises(MedchatError, match="not a dataset folder"): export_data(tmp_path, "llava", tmp_path.parent/"x")
