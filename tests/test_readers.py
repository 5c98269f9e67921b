"Readers: each row is a Record or a Reject, whatever the file holds."
import json, os
from collections import Counter
import pytest
from hypothesis import given, strategies as st
from medchat import readers
from medchat.core import MedchatError, Record
from medchat.readers import FORMATS, Reject, find_format, image_path, json_lines, mend_text, read_records, to_text

ROW = {"id": "a", "images": ["a.png"], "turns": [{"role": "user", "text": "Large?"}, {"role": "assistant", "text": "Yes"}], "kind": "vqa"}
TUTORIAL = {"image_path": "a.png", "instruction": "Describe.", "context": "", "response": "Clear."}
RAD = dict(qid=1, image_name="s.jpg", image_organ="CHEST", answer="Yes", answer_type="CLOSED", question_type="PRES", question="Large?", phrase_type="freeform")

def write(folder, *rows): (folder/"records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows)); return folder
def one(folder, row): (x,) = read_records(write(folder, row), "records"); return x
def rad(folder, train, test=()):
    (folder/"trainset.json").write_text(json.dumps(list(train))); (folder/"testset.json").write_text(json.dumps(list(test)))
    return list(read_records(folder, "vqa_rad"))

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
@pytest.mark.parametrize("make,problem", [
    (lambda d: (d/"x", "records"), "no such file or folder"), (lambda d: (d, "records"), "no records.jsonl in"), (lambda d: (d, "vqa_rad"), "no VQA-RAD files in"),
    (lambda d: (d, "vqa-rad"), "unknown format: vqa-rad. Known formats: records, vqa_rad"),
    (lambda d: ((d/"trainset.json").write_text("{"), (d, "vqa_rad"))[1], "not JSON"), (lambda d: ((d/"trainset.json").write_text("{}"), (d, "vqa_rad"))[1], "not a list of rows"),
    (lambda d: ((d/"trainset.json").write_text(""), (d, "vqa_rad"))[1], "The file is empty"), (lambda d: ((d/"trainset.json").write_bytes(b"\xff\xfe["), (d, "vqa_rad"))[1], "not UTF-8"),
    (lambda d: ((d/"trainset.json").write_text("version https://git-lfs.github.com/spec/v1\n"), (d, "vqa_rad"))[1], "Git LFS pointer"),
    (lambda d: ((d/"records.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n"), (d, "records"))[1], "Git LFS pointer"),
    (lambda d: ((d/"records.jsonl").mkdir(), (d, "records"))[1], "no records.jsonl")])
def test_bad_sources(tmp_path, make, problem):
    source, format = make(tmp_path)
    with pytest.raises(MedchatError, match=problem) as e: list(read_records(source, format))
    assert "\n" not in str(e.value)

def test_a_reader_cannot_skip_a_row(tmp_path):
    "A reader that returns nothing for a row is found out, not believed."
    readers.reader("_sloppy", "test", rows=lambda s: iter([("x:1", 1), ("x:2", 2)]))(lambda base, where, row: None)
    try: assert [type(x) for x in read_records(tmp_path, "_sloppy")] == [Reject, Reject]
    finally: FORMATS.pop("_sloppy")

# ---- vqa_rad
def test_rad_quirks(tmp_path):
    found = rad(tmp_path, [RAD, RAD | dict(qid=2, answer=4), RAD | dict(qid=3, answer_type="CLOSED "), RAD | dict(qid=4, question_type="PRES, ATRIB"), RAD | dict(qid=5, question_type="PRSE"),
                           RAD | dict(qid=6, question_type="Other"), RAD | dict(qid=7, question_type=None)], [RAD | dict(qid=8)])
    assert all(isinstance(r, Record) for r in found)
    assert found[1].answer == "4" and found[2].answer_type == "closed"
    assert [r.meta["question_type"] for r in found[3:7]] == [["PRES", "ATTRIB"], ["PRES"], ["OTHER"], []]
    assert [r.split for r in found] == ["train"] * 7 + ["test"]
    assert found[0].images == ["images/s.jpg"] and found[0].group == "s.jpg" and found[0].licence == "CC0-1.0"

@pytest.mark.parametrize("change,why", [(dict(answer=""), "empty answer"), (dict(answer=None), "answer is NoneType"), (dict(answer="\t"), "empty answer"), (dict(question=""), "empty question"),
    (dict(answer_type="HALF"), "unknown answer type"), (dict(answer_type=None), "answer_type is NoneType"), (dict(image_name="../../s.jpg"), "outside"), (dict(image_name=None), "image_name is NoneType")])
def test_rad_bad_rows(tmp_path, change, why): assert why in rad(tmp_path, [RAD | change])[0].why

@pytest.mark.parametrize("field", ["qid", "image_name", "answer", "answer_type", "question"])
def test_rad_missing_fields(tmp_path, field): assert field in rad(tmp_path, [{k: v for k, v in RAD.items() if k != field}])[0].why

@pytest.mark.parametrize("broken,whole", [("liver \tsplee n\tstomac h\tand esophagus", "liver, spleen, stomach, and esophagus"), ("Heart \tlungs", "Heart, lungs"), ("it\ufffds", "it's"),
    ("(hours?\tminutes?)", "(hours?, minutes?)"), ("in a male\twhat else", "in a male, what else"), ("\ufffd end", "end"), ("Is it a T2 image?", "Is it a T2 image?"), ("two  blanks", "two blanks")])
def test_mend(broken, whole): assert mend_text(broken) == whole

def test_rad_original_layout(tmp_path):
    "The one-file original: test rows are told by their phrase_type."
    (tmp_path/"VQA_RAD Image Folder").mkdir()
    (tmp_path/"VQA_RAD Dataset Public.json").write_text(json.dumps([RAD, RAD | dict(qid=2, phrase_type="test_freeform"), RAD | dict(qid=3, phrase_type="test_para")]))
    found = list(read_records(tmp_path, "vqa_rad"))
    assert [r.split for r in found] == ["train", "test", "test"] and found[0].images == ["VQA_RAD Image Folder/s.jpg"]

def test_rad_parent_folder_and_single_file(tmp_path):
    home = tmp_path/"data_RAD"; home.mkdir(); rad(home, [RAD], [RAD | dict(qid=2)])
    assert len(list(read_records(tmp_path, "vqa_rad"))) == 2
    assert [r.split for r in read_records(home/"testset.json", "vqa_rad")] == ["test"]

def test_rad_as_published(real_data):
    "The real files: every row becomes a Record, with the known quirks mended."
    found = list(read_records(real_data/"vqa_rad"/"data_RAD", "vqa_rad"))
    assert len(found) == 3515 and all(isinstance(r, Record) for r in found)
    assert Counter(r.split for r in found) == {"train": 3064, "test": 451}
    assert Counter(r.answer_type for r in found) == {"closed": 2095, "open": 1420}
    assert len({r.id for r in found}) == 3515 and len({r.images[0] for r in found}) == 314
    assert sum(r.answer.isdigit() and r.meta["qid"] in (2392, 2393, 2485, 2486, 2670, 2671, 3494, 3495, 3496, 3497) for r in found) == 10
    assert not any(c in t.text for r in found for t in r.turns for c in "\t\ufffd")
    assert sum("mended" in r.meta for r in found) == 11
    assert {t for r in found for t in r.meta["question_type"]} == {"PRES", "POS", "ABN", "SIZE", "OTHER", "MODALITY", "ATTRIB", "PLANE", "COLOR", "ORGAN", "COUNT"}
    assert {r.group for r in found if r.split == "test"} <= {r.group for r in found if r.split == "train"}
