"Readers: each row is a Record or a Reject, whatever the file holds."
import json, os
import pytest
from hypothesis import given, strategies as st
from medchat import readers
from medchat.core import MedchatError, Record
from medchat.readers import FORMATS, Reject, csv_rows, first_keys, formats, image_path, json_rows, read_records, recognise, split_named

ROW = {"id": "a", "images": ["a.png"], "turns": [{"role": "user", "text": "Large?"}, {"role": "assistant", "text": "Yes"}], "kind": "vqa"}
TUTORIAL = {"image_path": "a.png", "instruction": "Describe.", "context": "", "response": "Clear."}

def write(folder, *rows): (folder/"records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows)); return folder
def one(folder, row): (x,) = read_records(write(folder, row), "records"); return x

# ---- records
def test_own_row_comes_back_equal(tmp_path):
    full = Record.from_dict({**ROW, "answer_type": "closed", "split": "test", "group": "p1", "source": "s", "licence": "CC0-1.0", "language": "de", "meta": {"a": [1, {"b": None}]}})
    assert one(tmp_path, full.to_dict()) == full

def test_file_folder_list_and_bom(tmp_path):
    expected = [Record.from_dict(ROW)]
    assert list(read_records(write(tmp_path, ROW), "records")) == list(read_records(tmp_path/"records.jsonl", "records")) == expected
    (tmp_path/"rows.json").write_text(json.dumps([ROW]), encoding="utf-8-sig")
    assert list(read_records(tmp_path/"rows.json", "records")) == expected
    (tmp_path/"records.jsonl").write_text("\ufeff" + json.dumps(ROW) + "\r\n\r\n")
    assert list(read_records(tmp_path, "records")) == expected

@pytest.mark.parametrize("context,question", [("", "Describe."), (None, "Describe."), ("Cough.", "Describe.\nCough.")])
def test_tutorial_context(tmp_path, context, question): assert one(tmp_path, {**TUTORIAL, "context": context}).question == question
def test_tutorial_without_context(tmp_path): assert one(tmp_path, {k: v for k, v in TUTORIAL.items() if k != "context"}).answer == "Clear."
def test_tutorial_text_only(tmp_path): assert one(tmp_path, {**TUTORIAL, "image_path": ""}).images == []
@pytest.mark.parametrize("image", [0, False, {}, [[]], ["a.png", ""], [None]])
def test_tutorial_image_that_is_none(tmp_path, image): assert "no image path" in one(tmp_path, {**TUTORIAL, "image_path": image}).why
@pytest.mark.parametrize("context", [False, {}, []])
def test_tutorial_context_that_is_none(tmp_path, context): assert "context is" in one(tmp_path, {**TUTORIAL, "context": context}).why
def test_a_link_to_itself_costs_one_row(tmp_path):
    (tmp_path/"loop.png").symlink_to("loop.png")
    assert isinstance(one(tmp_path, {**TUTORIAL, "image_path": "loop.png"}), Reject)
def test_deep_nesting_costs_one_row(tmp_path):
    deep = []
    for _ in range(900): deep = [deep]
    assert isinstance(one(tmp_path, {**TUTORIAL, "extra": deep}), (Reject, Record))
def test_tutorial_extras(tmp_path):
    r = one(tmp_path, {**TUTORIAL, "id": 7, "group": 12, "split": "val", "hospital": "north"})
    assert (r.id, r.group, r.split, r.meta) == ("7", "12", "val", {"hospital": "north"})

def test_ids_are_made_where_missing(tmp_path):
    found = list(read_records(write(tmp_path, TUTORIAL, TUTORIAL), "records"))
    assert len({r.id for r in found}) == 2 and [r.where for r in found] == ["records.jsonl:1", "records.jsonl:2"]

@pytest.mark.parametrize("change,why", [
    ({"turns": None}, "must alternate"), ({"turns": "Large?"}, "turns is str"), ({"turns": [1]}, "role and text"), ({"turns": [{"role": "user"}]}, "role and text"),
    ({"turns": [{"role": "user", "text": "q"}, {"role": "assistant", "text": None}]}, "not text"), ({"turns": [{"role": "user", "text": "q"}, {"role": "assistant", "text": " "}]}, "empty answer"),
    ({"turns": [{"role": "user", "text": ""}, {"role": "assistant", "text": "a"}]}, "empty question"), ({"turns": [{"role": "gpt", "text": "q"}, {"role": "assistant", "text": "a"}]}, "alternate"),
    ({"images": "a.png"}, "images is str, not list"), ({"images": [None]}, "no image path"), ({"images": [""]}, "no image path"), ({"images": ["../a.png"]}, "outside"),
    ({"images": ["/etc/passwd"]}, "outside"), ({"images": ["C:\\a.png"]}, "outside"), ({"images": ["..\\..\\a.png"]}, "outside"), ({"images": ["https://x.org/a.png"]}, "outside"),
    ({"images": ["a\0.png"]}, "zero byte"), ({"kind": "poem"}, "unknown kind"), ({"answer_type": "maybe"}, "unknown answer type"), ({"meta": None}, None), ({"meta": []}, "meta is list"),
    ({"id": ["a"]}, "id is list"), ({"id": True}, "id is bool"), ({"group": {}}, "group is dict"), ({"meta": {"x": "\ud800"}}, "half a Unicode"), ({"id": "\udfff"}, "half a Unicode"),
    ({"turns": [{"role": "user", "text": "q"}, {"role": "assistant", "text": float("nan")}]}, "not text"), ({"id": ""}, "no id")])
def test_one_bad_thing(tmp_path, change, why):
    x = one(tmp_path, {**ROW, **change})
    if why is None: assert isinstance(x, Record)
    else: assert isinstance(x, Reject) and why in x.why and "\n" not in x.why and x.where == "records.jsonl:1"

@pytest.mark.parametrize("drop", ["image_path", "instruction", "response"])
def test_tutorial_field_missing(tmp_path, drop): assert drop in one(tmp_path, {k: v for k, v in TUTORIAL.items() if k != drop}).why

@pytest.mark.parametrize("row", [1, "text", None, [], {}, {"image": "a.png"}, [ROW]])
def test_not_a_row(tmp_path, row): assert isinstance(one(tmp_path, row), Reject)

def test_broken_lines_do_not_stop_the_rest(tmp_path):
    good = json.dumps(ROW).encode()
    (tmp_path/"records.jsonl").write_bytes(b"\n".join([good, b'{"id": ', b"\xff\xfe\x00", good, b"[" * 100_000, b"NaN", good]))
    found = list(read_records(tmp_path, "records"))
    assert [type(x).__name__ for x in found] == ["Record", "Reject", "Reject", "Record", "Reject", "Reject", "Record"]
    assert found[1].where == "records.jsonl:2" and "not a line of JSON" in found[1].why

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from([*ROW, *TUTORIAL, "role", "text"]), x, max_size=4), max_leaves=12)

@given(st.lists(values, max_size=6))
def test_any_json_rows_in_equals_rows_out(rows):
    "One Record or Reject for each row, for whatever JSON."
    import tempfile, pathlib
    with tempfile.TemporaryDirectory() as d:
        found = list(read_records(write(pathlib.Path(d), *rows), "records"))
    assert len(found) == len(rows) and all(isinstance(x, (Record, Reject)) for x in found)

# ---- paths
def test_links(tmp_path):
    "A link that ends inside is followed; one that leaves is refused; the cache of huggingface_hub is made of links and works."
    home = tmp_path/"home"; home.mkdir(); (tmp_path/"secret.png").write_text("x"); (home/"real.png").write_text("x")
    os.symlink(home/"real.png", home/"inside.png"); os.symlink(tmp_path/"secret.png", home/"outside.png"); os.symlink(tmp_path, home/"up")
    assert image_path(home, "inside.png") == "inside.png"
    for bad in ("outside.png", "up/secret.png"):
        with pytest.raises(ValueError, match="link out of"): image_path(home, bad)
    snap, blobs = tmp_path/"repo"/"snapshots"/"abc", tmp_path/"repo"/"blobs"; snap.mkdir(parents=True); blobs.mkdir()
    (blobs/"123").write_text("x"); os.symlink(blobs/"123", snap/"a.png")
    assert image_path(snap, "a.png") == "a.png"

@given(st.lists(st.sampled_from(["..", ".", "a", "b", "", "~", "C:", "...", " "]), min_size=1, max_size=8), st.sampled_from(["/", "\\"]))
def test_no_path_leaves(parts, sep):
    base = readers.Path("/nonexistent/base")
    try: out = image_path(base, sep.join(parts))
    except ValueError: return
    assert ".." not in out.split("/") and not out.startswith("/") and os.path.normpath(base/out).startswith(str(base) + "/")

def test_absolute_path_inside_is_made_relative(tmp_path): assert image_path(tmp_path, str(tmp_path/"x"/"a.png")) == "x/a.png"

# ---- sources
def lfs(path): path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 132\n"); return path

@pytest.mark.parametrize("make,problem", [
    (lambda d: (d/"x", "records"), "no such file or folder"), (lambda d: (d, "records"), "no records.jsonl in"), (lambda d: (d, "vqa-rad"), "unknown format: vqa-rad. Known formats: auto, records, vqa_rad"),
    (lambda d: (d, "auto"), "no format recognises"), (lambda d: (lfs(d/"train.json"), "auto"), "Git LFS pointer"), (lambda d: (lfs(d/"train.json").parent, "auto"), "Git LFS pointer"),
    (lambda d: ((d/"r.json").write_text("{"), (d/"r.json", "records"))[1], "not JSON"), (lambda d: ((d/"r.json").write_text("{}"), (d/"r.json", "records"))[1], "not a list of rows"),
    (lambda d: ((d/"r.json").write_text(""), (d/"r.json", "records"))[1], "The file is empty"), (lambda d: ((d/"r.json").write_bytes(b"\xff\xfe["), (d/"r.json", "records"))[1], "not UTF-8"),
    (lambda d: (lfs(d/"records.jsonl"), "records"), "Git LFS pointer"), (lambda d: ((d/"records.jsonl").mkdir(), (d, "records"))[1], "no records.jsonl")])
def test_bad_sources(tmp_path, make, problem):
    source, format = make(tmp_path)
    with pytest.raises(MedchatError, match=problem) as e: list(read_records(source, format))
    assert "\n" not in str(e.value)

def test_options_and_images(tmp_path):
    write(tmp_path, ROW)
    with pytest.raises(MedchatError, match="format records takes no option: allow-burned-in. It takes: none"): read_records(tmp_path, "records", allow_burned_in=True)
    with pytest.raises(MedchatError, match="no such folder of images"): read_records(tmp_path, "records", images=tmp_path/"gone")
    (tmp_path/"elsewhere").mkdir()
    assert [r.images for r in read_records(tmp_path, "records", images=tmp_path/"elsewhere")] == [["a.png"]]
    assert recognise(tmp_path) == ("records", "records.jsonl holds turns and images") == recognise(tmp_path/"records.jsonl")

def test_every_format_is_listed():
    said = formats()
    assert len(FORMATS) >= 20 and all(name in said and f.about for name, f in FORMATS.items())
    assert {name for name, f in FORMATS.items() if "https://" not in f.origin} == {"records", "table", "parquet", "study"} # layouts of our own and of anybody; the others say where they are described

@pytest.mark.parametrize("name,split", [("train", "train"), ("qa_Val", "validation"), ("TEST-2", "test"), ("validate", "validation"), ("train_test", None), ("attest", None), ("", None), ("test_val_train", None), ("train-train", "train"),
    ("trainset.json", "train"), ("valid_captions", "validation"), ("testing", "test"), ("restrained", None), ("dev.jsonl", "validation")])
def test_split_names(name, split): assert split_named(name) == split

# ---- rows of files
lists = st.lists(values, max_size=8)

@given(lists, st.integers(1, 40), st.sampled_from([None, 1]))
def test_json_rows_agree_with_json(rows, size, indent):
    "Piece by piece, whatever the size of a piece, gives what reading the whole gives."
    import io
    text = json.dumps(rows, indent=indent)
    assert json.dumps(list(readers._elements(io.StringIO(text), size))) == json.dumps(rows)

@given(lists.filter(len), st.integers(0, 10**6))
def test_a_cut_list_is_never_whole(rows, at):
    import io
    text = json.dumps(rows); text = text[:at % len(text)]
    with pytest.raises((ValueError, TypeError)): list(readers._elements(io.StringIO(text), 16))

@pytest.mark.parametrize("text", ["[1, 2", "[1 2]]", "[1, 2] 3", "[tru]", "[1, }", "", "   ", "[", '["a', "[1,"])
def test_damaged_lists(tmp_path, text):
    (tmp_path/"a.json").write_text(text)
    with pytest.raises(MedchatError, match="not JSON"): list(json_rows(tmp_path/"a.json"))

def test_json_rows_stream(tmp_path, peak_bytes):
    "A list of 60 MB is read in a fraction of that."
    with open(tmp_path/"big.json", "w") as f: f.write("[" + ",".join([json.dumps(dict(a="x" * 1000))] * 60_000) + "]")
    def count(): assert sum(1 for _ in json_rows(tmp_path/"big.json")) == 60_000
    assert peak_bytes(count) < 12e6

def table(tmp_path, data, name="t.csv", **kw): (tmp_path/name).write_bytes(data if isinstance(data, bytes) else data.encode()); return [r for _, r in csv_rows(tmp_path/name, **kw)]

def test_tables(tmp_path):
    assert table(tmp_path, 'a,b\n1,"x\ny"\n\n2,"q""q"\n') == [dict(a="1", b="x\ny"), dict(a="2", b='q"q')]
    assert table(tmp_path, "\ufeffa;b\r\n1;2\r\n") == [dict(a="1", b="2")] == table(tmp_path, "a\tb\n1\t2\n", "t.tsv") == table(tmp_path, "a,b\n1,2\n".encode("utf-16"))
    assert table(tmp_path, "1,2\n3,4\n", columns=["a", "b"]) == [dict(a="1", b="2"), dict(a="3", b="4")]
    rows = table(tmp_path, b'a,b\n1\n1,2,3\n\xe9,2\n1,2\n5,"open\n6,7\n')
    assert [type(r).__name__ for r in rows] == ["Reject", "Reject", "Reject", "dict", "Reject"] and rows[2].why == "not UTF-8 text"
    for bad, problem in (("", "an empty table"), ("a,a\n1,2\n", "two columns of one name")):
        with pytest.raises(MedchatError, match=problem): table(tmp_path, bad)

@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)).filter(lambda r: any(r)), max_size=6))
def test_what_csv_writes_comes_back(tmp_path_factory, rows):
    import csv, io
    f = io.StringIO(newline=""); csv.writer(f).writerows([("a", "b"), *rows])
    try: data = f.getvalue().encode()
    except UnicodeEncodeError: return
    found = table(tmp_path_factory.mktemp("csv"), data)
    assert [list(r.values()) for r in found] == [[c.replace("\0", "\ufffd") for c in r] for r in rows]

def test_first_keys_never_raises(tmp_path):
    for n, data in enumerate([b"", b"[", b"[1]", b"{}", b"\xff", b"PAR1", b"a,a\n", b"[" * 5000]):
        for kind in ("json", "jsonl", "csv", "tsv", "parquet", "png"):
            (tmp_path/f"{n}.{kind}").write_bytes(data); assert isinstance(first_keys(tmp_path/f"{n}.{kind}"), set)

def test_a_reader_cannot_skip_a_row(tmp_path):
    "A reader that returns nothing for a row is found out, not believed."
    readers.reader("_sloppy", "test", rows=lambda s: iter([("x:1", 1), ("x:2", 2)]))(lambda base, where, row: None)
    try: assert [type(x) for x in read_records(tmp_path, "_sloppy")] == [Reject, Reject]
    finally: FORMATS.pop("_sloppy")
