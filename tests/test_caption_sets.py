"Caption and report sets: layouts as people get them, damaged files, and the published files where they are."
import gzip, io, json, random
from collections import Counter
from pathlib import Path
import pytest
from medchat.core import MedchatError, Record
from medchat.readers import FORMATS, Reject, known_formats, read_records, recognise
from medchat.caption_sets import PROMPTS, _Beside, _cuis, _lists, _r2gen_rows, _split_of, prompt_for, report_sections, report_turns

known_formats()
def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True); path.write_text(text, encoding="utf-8"); return path
def read(*args, **kw): return list(read_records(*args, **kw))
def good(items): return [x for x in items if isinstance(x, Record)]
def why(items): return [x.why for x in items if isinstance(x, Reject)]

# ---- questions and reports

def test_prompts_are_used_evenly_and_stay():
    drawn = Counter(prompt_for("report", str(n)) for n in range(2000))
    assert set(drawn) == set(PROMPTS["report"]) and min(drawn.values()) > 850
    assert prompt_for("caption", "ROCO_00020") == "What does this image show?" # the choice is part of the data: it may not change

@pytest.mark.parametrize("sections,text,used", [
    (dict(findings=" A. ", impression="B."), "Findings: A. Impression: B.", ["findings", "impression"]), (dict(findings="A.", impression=None), "A.", ["findings"]),
    (dict(findings="", impression="XXXX."), "XXXX.", ["impression"]), (dict(findings="", last_paragraph="C."), "C.", ["last_paragraph"]),
    (dict(findings="A.", last_paragraph="C."), "A.", ["findings"]), (dict(impression="B.", last_paragraph="C."), "B.", ["impression"])])
def test_report_turns(sections, text, used):
    turns, names = report_turns("x", sections)
    assert (turns[1].text, names) == (text, used) and turns[0].text in sum(PROMPTS.values(), ())

@pytest.mark.parametrize("sections", [{}, dict(findings=" ", impression=""), dict(findings=["A"], impression="B"), dict(findings=True)])
def test_report_turns_refuses(sections):
    with pytest.raises(ValueError): report_turns("x", sections)

def test_beside_keeps_order_and_counts():
    side = _Beside([("a", [("a:1", "1", 1), ("a:2", "2", 2), ("a:3", "1", 3)]), ("b", [("b:1", "", Reject("b:1", "broken")), ("b:2", "9", "x")])])
    assert side.of("1") == {"a": [1, 3]} and side.of("1") == {"a": [1, 3]} and side.of("7") == {}
    assert [(w, r.why) for w, r in side.left("a caption", "a", "b")] == [("b:1", "broken"), ("a:2", "a without a caption"), ("b:2", "b without a caption")]

@pytest.mark.parametrize("value,cuis", [("C0040405;C0856747", 2), (["C0040405", "C0856747"], 2), ("['C0040405', 'C0856747']", 2), ("C0040405 C0040405", 1), ("", 0), (None, 0), ("none", 0)])
def test_cuis(value, cuis): assert len(_cuis(value)) == cuis

@pytest.mark.parametrize("names,split", [(("valid_captions",), "validation"), (("train-00000-of-00027",), "train"), (("0000", "R_test_7"), "test"),
    (("captions",), None), (("latest_captions",), None), (("restrained",), None), (("caption_prediction_train_labels",), "train")])
def test_split_of(names, split): assert _split_of(*names) == split

def test_split_of_folder(): assert (_split_of("captions", folder="val"), _split_of("captions", folder="my_test_data")) == ("validation", None)

# ---- ROCOv2

CAPTIONS = 'ID,Caption\nR_1," CT, axial"\nR_2,MRI\nR_4,"two\nlines"\n'

@pytest.fixture
def v2(tmp_path):
    home = tmp_path/"rocov2"
    put(home/"train_captions.csv", CAPTIONS); put(home/"train_concepts.csv", "ID,CUIs\nR_4,C0000004\nR_1,C0000001;C0000002\n")
    put(home/"valid_captions.csv", "ID,Caption\nR_9,X-ray\n"); put(home/"valid_concepts.csv", "ID,CUIs\nR_9,C0000009\n")
    return home

def test_rocov2_splits_and_joins(v2):
    found = read(v2)
    assert [(r.id, r.split, r.images, r.answer, r.meta.get("cuis")) for r in found] == [("R_1", "train", ["train/R_1.jpg"], "CT, axial", ["C0000001", "C0000002"]),
        ("R_2", "train", ["train/R_2.jpg"], "MRI", None), ("R_4", "train", ["train/R_4.jpg"], "two\nlines", ["C0000004"]), ("R_9", "validation", ["valid/R_9.jpg"], "X-ray", ["C0000009"])]
    assert all(r.kind == "caption" and r.answer_type is None and r.group == r.id and r.source == "ROCOv2" for r in found)

def test_rocov2_parent_and_file(v2, tmp_path):
    assert recognise(tmp_path)[0] == recognise(v2)[0] == recognise(v2/"valid_captions.csv")[0] == "rocov2"
    assert [r.images for r in read(tmp_path)][-1] == ["rocov2/valid/R_9.jpg"]
    assert [r.id for r in read(v2/"valid_captions.csv")] == ["R_9"]

@pytest.mark.parametrize("place", ["train/R_1.jpg", "train_images/R_1.jpg", "images/R_1.jpg", "images/train/R_1.jpg", "R_1.jpg"])
def test_rocov2_finds_the_image(v2, place):
    put(v2/place, "x"); assert read(v2)[0].images == [place]

def test_rocov2_other_image_folder(v2, tmp_path):
    put(tmp_path/"jpgs"/"R_1.jpg", "x"); assert read(v2, images=tmp_path/"jpgs")[0].images == ["R_1.jpg"]

def test_rocov2_spellings(tmp_path):
    "Tabs, other case, ids with a suffix, only the manual concepts, more columns."
    put(tmp_path/"test_captions.csv", "id\tcaption\tmodality\nR_1.jpg\tCT\tct\n"); put(tmp_path/"test_concepts_manual.csv", "ID,CUIs\nR_1.jpg,C0000001\n")
    r, = read(tmp_path)
    assert (r.id, r.images, r.meta) == ("R_1", ["test/R_1.jpg"], {"modality": "ct", "cuis_manual": ["C0000001"]})

def test_rocov2_one_table_of_a_split(tmp_path):
    put(tmp_path/"test_captions.csv", CAPTIONS); put(tmp_path/"test_captions_manual.csv", CAPTIONS)
    assert len(read(tmp_path)) == 3

def test_rocov2_captions_without_a_split(tmp_path):
    put(tmp_path/"captions.csv", "ID,Caption\nROCOv2_2023_test_000001,CT\nother_1,MRI\n")
    assert [r.split for r in read(tmp_path)] == ["test", None]

def test_rocov2_broken_rows(tmp_path):
    put(tmp_path/"test_captions.csv", "ID,Caption\nR_1,\nR_2,CT,too much\n,CT\nR_5,xxx\n../../R_6,CT\nR_7,Xanthoma\n")
    found = read(tmp_path)
    assert why(found) == ["empty caption", "3 cells where 2 columns are", "no id", "placeholder caption: xxx", "image outside the source folder: test/../../R_6.jpg"] and len(good(found)) == 1
    assert len({x.where for x in found}) == 6 if all(hasattr(x, "where") for x in found) else True

def test_rocov2_wrong_columns(tmp_path):
    put(tmp_path/"test_captions.csv", "name,text\nR_1,CT\n"); assert why(read(tmp_path, "rocov2")) == ["missing field 'Caption'"]
    put(tmp_path/"test_captions.csv", "number,Caption\nR_1,CT\n")
    with pytest.raises(MedchatError, match="no column id in"): read(tmp_path, "rocov2")

def parquet(path, rows, schema=None):
    import pyarrow as pa, pyarrow.parquet as pq
    path.parent.mkdir(parents=True, exist_ok=True); pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)

def test_parquet_forms(tmp_path):
    "Bytes alone, bytes with a path, a path alone; concepts as list, as text, missing; a split by file or by folder."
    png, file = b"\x89PNG\r\n\x1a\n" + b"x", b"\xff\xd8" + b"y"
    parquet(tmp_path/"data"/"train-00000-of-00001.parquet", [dict(image=png, image_id="R_1", caption=" CT", cui="C0000001;C0000002", note="kept", size=float("nan"))])
    parquet(tmp_path/"default"/"validation"/"0000.parquet", [dict(image=dict(bytes=file, path="a.jpg"), image_id="R_2", caption="MRI", cui=["C0000003"])])
    parquet(tmp_path/"default"/"test"/"0000.parquet", [dict(image=dict(bytes=None, path="img/a.jpg"), image_id="ROCO_7", caption="X", cui=None), dict(image=None, image_id="R_4", caption="X", cui=None)])
    found = read(tmp_path)
    assert [(r.id, r.split, r.meta["cuis"], r.source) for r in good(found)] == [("R_1", "train", ["C0000001", "C0000002"], "ROCOv2"), ("ROCO_7", "test", [], "ROCO"), ("R_2", "validation", ["C0000003"], "ROCOv2")]
    assert found[0].meta["note"] == "kept" and found[0].blobs == {found[0].images[0]: png} and found[0].images[0].endswith(".png")
    assert found[1].images == ["img/a.jpg"] and found[1].blobs == {} and why(found) == ["no image in the row: NoneType"]
    assert recognise(tmp_path)[0] == "rocov2" and recognise(tmp_path/"data"/"train-00000-of-00001.parquet")[0] == "rocov2"
    assert [x.where for x in found] == ["train-00000-of-00001.parquet[1]", "test/0000.parquet[1]", "test/0000.parquet[2]", "validation/0000.parquet[1]"]

def test_parquet_without_ids(tmp_path):
    parquet(tmp_path/"x.parquet", [dict(image=b"\xff\xd8y", caption="CT"), dict(image=b"\xff\xd8z", caption=None)])
    found = read(tmp_path/"x.parquet", "rocov2")
    assert found[0].id == "rocov2-x.parquet[1]" and why(found) == ["empty caption"]

# ---- ROCO

def test_roco_depths(tmp_path):
    home = tmp_path/"a"/"data"
    for split in ("validation", "train"):
        for part in ("radiology", "non-radiology"): put(home/split/part/"captions.txt", f"ROCO_{len(split + part)}\t A film of {part}\n")
    for source, n in ((tmp_path/"a", 4), (home, 4), (home/"train", 2), (home/"train"/"radiology", 1), (home/"train"/"radiology"/"captions.txt", 1), (tmp_path, 4)):
        found = read(source)
        assert recognise(source)[0] == "roco" and len(found) == n and all((source if source.is_dir() else source.parent)/r.images[0] == home/r.split/r.meta["part"]/"images"/f"{r.id}.jpg" for r in found)
    assert [r.split for r in read(home)] == ["train"] * 2 + ["validation"] * 2
    assert {r.meta["part"] for r in read(home, subset="non-radiology")} == {"non-radiology"}

def test_roco_damaged_lines(tmp_path):
    at = tmp_path/"radiology"; at.mkdir()
    (at/"captions.txt").write_bytes(b"\xef\xbb\xbfROCO_1\t A film\r\n\r\nROCO_2\t caf\xe9\nROCO_3\t \n\t no id\nROCO_5\ttabs\tin it\nROCO_6\tX-ray.\nROCO_7\t Xxx .\n")
    put(at/"cuis.txt", "ROCO_1\t\t\nROCO_5\t\t\t\tC0000001\t\tC0000002\nROCO_8\tC0000003\n"); put(at/"licences.txt", 'ROCO_ID,PMC_ID,CC\nROCO_1,PMC77_a.jpg,CC BY\n"ROCO_9,\n')
    found = read(at)
    assert why(found)[:4] == ["not UTF-8 text", "empty caption", "no id", "placeholder caption: Xxx ."] and "cuis without a caption" in why(found) and len(why(found)) == 6
    assert [(r.id, r.answer, r.group, r.licence) for r in good(found)] == [("ROCO_1", "A film", "PMC77", "CC BY"), ("ROCO_5", "tabs\tin it", "ROCO_5", ""), ("ROCO_6", "X-ray.", "ROCO_6", "")]
    assert good(found)[1].meta["cuis"] == ["C0000001", "C0000002"]

def test_roco_old_names(tmp_path):
    "The first releases named the files by revision."
    put(tmp_path/"test"/"radiology"/"captions_tp_test_revised.txt", "ROCO_1\t A film\n"); put(tmp_path/"test"/"radiology"/"keywords_tp_test_revised.txt", "ROCO_1\tfilm\n")
    put(tmp_path/"test"/"radiology"/"cc_tp_test.csv", "ROCO_ID,PMC_ID,CC\nROCO_1,PMC77_a.jpg,CC0\n")
    r, = read(tmp_path); assert (r.meta["keywords"], r.licence, r.split) == (["film"], "CC0", "test")

# ---- IU X-Ray

REPORTS = "uid,MeSH,Problems,image,indication,comparison,findings,impression\n"
def indiana(at, reports, views):
    put(at/"indiana_reports.csv", REPORTS + "".join(f"{u},normal,normal,,,,{f},{i}\n" for u, f, i in reports))
    put(at/"indiana_projections.csv", "uid,filename,projection\n" + "".join(f"{u},{f},{p}\n" for u, f, p in views)); return at

def test_indiana_views_in_any_order(tmp_path):
    views = [("1", "a.png", "Lateral"), ("2", "b.png", "Frontal"), ("1", "c.png", "Frontal"), ("2", "d.png", "Oblique"), ("1", "e.png", "Lateral"), ("2", "f.png", "Lateral")]
    found = read(indiana(tmp_path, [("2", "F", "I"), ("1", "F", "")], views))
    assert [[Path(i).name for i in r.images] for r in found] == [["b.png", "f.png", "d.png"], ["c.png", "a.png", "e.png"]]
    assert found[0].meta["projection"] == ["Frontal", "Lateral", "Oblique"] and [r.group for r in found] == ["CXR2", "CXR1"] and all(r.kind == "report" for r in found)

def test_indiana_every_row_comes_out(tmp_path):
    found = read(indiana(tmp_path, [("1", "", ""), ("2", "F", "I"), ("", "F", "I"), ("4", "F", "I,J")], [("1", "a", "Frontal"), ("3", "b", "Frontal"), ("3", "c", "Frontal"), ("4", "../../x", "Frontal")]))
    assert why(found) == ["neither findings nor impression", "no image of this study", "no uid", "9 cells where 8 columns are", "image without a report", "image without a report"]

def test_indiana_places(tmp_path):
    at = indiana(tmp_path/"iu", [("1", "F", "I")], [("1", "a.png", "Frontal")])
    assert recognise(tmp_path)[0] == recognise(at)[0] == recognise(at/"indiana_reports.csv")[0] == recognise(at/"indiana_projections.csv")[0] == "iu_xray"
    put(at/"images"/"a.png", "x"); assert read(at)[0].images == ["images/a.png"]
    (at/"indiana_projections.csv").unlink()
    with pytest.raises(MedchatError, match="no IU X-Ray reports in"): read(at, "iu_xray")

XML = '<eCitation><uId id="CXR{0}"/><Abstract><AbstractText Label="FINDINGS">{1}</AbstractText><AbstractText Label="IMPRESSION">{2}</AbstractText></Abstract><parentImage id="CXR{0}_IM-1"/></eCitation>'
def test_openi(tmp_path):
    at = tmp_path/"ecgen-radiology"
    for n in (10, 2, 1): put(at/f"{n}.xml", XML.format(n, "Clear <b>lungs</b>.", "Normal &amp; well."))
    put(at/"3.xml", "<html/>"); put(at/"4.xml", ""); put(at/"5.xml", '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><eCitation>&e;</eCitation>'); put(at/"6.xml", "<a>" * 5000)
    put(tmp_path/"NLMCXR_png"/"CXR1_IM-1.png", "x")
    for source in (tmp_path, at):
        found = read(source)
        assert [r.meta["uid"] for r in good(found)] == ["1", "2", "10"] and len(why(found)) == 4 and all("not a report of Open-i" in w for w in why(found))
        assert found[0].images == ["NLMCXR_png/CXR1_IM-1.png"] and found[0].answer == "Findings: Clear lungs. Impression: Normal & well."
        assert recognise(source)[0] == "iu_xray"

@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
def test_lists_in_pieces(size):
    data = dict(train=[{"a": "]}\"", "n": 12}, [1, "é"], 345], info={"x": [1]}, n=12, val=[], test=["x"])
    expect = [("train", x) for x in data["train"]] + [("info", data["info"]), ("n", 12), ("test", "x")]
    assert list(_lists(io.StringIO(json.dumps(data, indent=1)), size)) == expect

@pytest.mark.parametrize("text", ["", "{", '{"a": [1', '{"a": [1]', '{"a": [1]} x', "[1]", '{"a": [1, }', '{"a" [', "nonsense"])
def test_lists_damaged(tmp_path, text):
    path = put(tmp_path/"annotation.json", text)
    if text == "[1]": assert [r for _, r in _r2gen_rows(path)] == [1]; return
    with pytest.raises(MedchatError, match="not JSON"): list(_r2gen_rows(path))

def test_r2gen(tmp_path):
    row = dict(id="CXR7_IM-1", report="Clear.", image_path=["CXR7_IM-1/0.png", "CXR7_IM-1/1.png"], split="val")
    bad = [row | dict(report=""), row | dict(image_path=[]), row | dict(image_path=["../../x.png"]), row | dict(report=None), {"id": 1}, 7]
    put(tmp_path/"iu"/"annotation.json", json.dumps(dict(val=[row, *bad])))
    found = read(tmp_path/"iu")
    assert len(found) == 7 and len(good(found)) == 1 and found[0].split == "validation" and found[0].group == "CXR7" and len(found[0].images) == 2
    put(tmp_path/"m"/"annotation.json", json.dumps(dict(test=[dict(id="dc-1", study_id=50414267, subject_id=10000032, report="Clear.", image_path=["p10/p10000032/s50414267/dc-1.jpg"], split="test")])))
    r, = read(tmp_path/"m")
    assert recognise(tmp_path/"m")[0] == "mimic_cxr" and (r.group, r.split, r.meta["study_id"], r.id) == ("p10000032", "test", 50414267, "mimic_cxr-dc-1")

# ---- MIMIC-CXR

@pytest.mark.parametrize("text,sections", [
    ("FINDINGS: A\n b\n\n IMPRESSION: C", dict(findings="A b", impression="C")), (" FINDINGS:  A\nFINDINGS: B", dict(findings="B")), ("CONCLUSION: C", dict(impression="C")),
    ("HISTORY: H\n\n The end.", dict(history="H The end.", last_paragraph="The end.")), ("No heading at all", dict(last_paragraph="No heading at all")), ("", dict(last_paragraph="")),
    ("Seen at 10:30: fine. FINDINGS: in a line", dict(last_paragraph="Seen at 10:30: fine. FINDINGS: in a line")), ("\r\n FINDINGS:\r\n A\r\n", dict(findings="A"))])
def test_report_sections(text, sections): assert report_sections(text) == sections

SECTIONS = 'study,impression,findings,last_paragraph,comparison\n'
def mimic(at, packed=True):
    put(at/"mimic_cxr_sectioned.csv", SECTIONS + 's50000001,I,F,,None.\ns50000002,,,P,\ns50000003,,,,C\ns50000004,I,,,\n')
    split = "dicom_id,study_id,subject_id,split\na,50000001,10000001,train\nb,50000001,10000001,train\nc,50000002,10000001,train\nd,50000003,12345678,test\ne,50000009,10000009,test\n"
    if packed: (at/"mimic-cxr-2.0.0-split.csv.gz").write_bytes(gzip.compress(split.encode()))
    else: put(at/"mimic-cxr-2.0.0-split.csv", split)
    return at

@pytest.mark.parametrize("packed", [True, False])
def test_mimic_sections(tmp_path, packed):
    found = read(mimic(tmp_path, packed))
    assert [(r.id, r.images, r.split, r.group) for r in good(found)] == [
        ("mimic_cxr-s50000001", ["files/p10/p10000001/s50000001/a.jpg", "files/p10/p10000001/s50000001/b.jpg"], "train", "p10000001"), ("mimic_cxr-s50000002", ["files/p10/p10000001/s50000002/c.jpg"], "train", "p10000001")]
    assert why(found) == ["neither findings nor impression", "no image of this study", "image without a report"] and "Credentialed" in found[0].licence
    assert recognise(tmp_path)[0] == recognise(tmp_path/"mimic_cxr_sectioned.csv")[0] == "mimic_cxr"

def test_mimic_images_elsewhere(tmp_path):
    at = mimic(tmp_path/"reports"); put(tmp_path/"jpg"/"p10/p10000001/s50000001/a.jpg", "x")
    assert read(at, images=tmp_path/"jpg")[0].images[0] == "p10/p10000001/s50000001/a.jpg"

def test_mimic_damaged(tmp_path):
    at = mimic(tmp_path); packed = (at/"mimic-cxr-2.0.0-split.csv.gz").read_bytes()
    for data in (packed[:40], b"not gzip", b"version https://git-lfs.github.com/spec/v1\n"):
        (at/"mimic-cxr-2.0.0-split.csv.gz").write_bytes(data)
        with pytest.raises(MedchatError): read(at)
    with pytest.raises(MedchatError, match="no MIMIC-CXR reports in"): read(put(tmp_path/"empty"/"x.txt", "").parent, "mimic_cxr")
    bad = put(tmp_path/"t"/"files/p10/p10000001/s50000001.txt", ""); bad.write_bytes(b"FINDINGS: \xff")
    assert why(read(tmp_path/"t")) == ["not UTF-8 text"]

# ---- all of them

@pytest.mark.parametrize("name", ["roco", "rocov2", "iu_xray", "mimic_cxr"])
def test_says_what_it_wants(tmp_path, name):
    put(tmp_path/"readme.txt", "nothing here")
    for source in (tmp_path, tmp_path/"readme.txt"):
        assert FORMATS[name].sniff(source) == ""
        with pytest.raises(MedchatError, match="It must hold"): read(source, name)
    assert FORMATS[name].sniff(tmp_path/"nowhere") == "" and FORMATS[name].origin.count("https://doi.org/") == 1

def test_damage_gives_rejects_or_one_line(tmp_path):
    "Cut, flipped and overwritten files: records, rejects or one MedchatError, never another exception."
    rng, makers = random.Random(7), {}
    v2 = tmp_path/"v2"; put(v2/"test_captions.csv", CAPTIONS); put(v2/"test_concepts.csv", "ID,CUIs\nR_1,C0000001\n"); put(v2/"license_information.csv", "ID,PMCID,Attribution,Link\nR_1,PMC1,CC BY [x],l\n")
    ro = tmp_path/"ro"/"radiology"; put(ro/"captions.txt", "ROCO_1\t A film\nROCO_2\t B\n"); put(ro/"licences.txt", "ROCO_ID,PMC_ID,CC\nROCO_1,PMC77_a.jpg,CC BY\n"); put(ro/"semtypes.txt", "ROCO_1\tT1\ta\n")
    iu = indiana(tmp_path/"iu", [("1", "F", "I"), ("2", "F", "I")], [("1", "a.png", "Lateral"), ("2", "b.png", "Frontal")])
    xm = tmp_path/"xm"/"ecgen-radiology"; put(xm/"1.xml", XML.format(1, "F", "I")); put(xm/"2.xml", XML.format(2, "F", "I"))
    r2 = tmp_path/"r2"; put(r2/"annotation.json", json.dumps(dict(train=[dict(id="a", report="b", image_path=["a/0.png"])] * 3)))
    mi = mimic(tmp_path/"mi")
    for at, name in ((v2, "rocov2"), (ro, "roco"), (iu, "iu_xray"), (xm, "iu_xray"), (r2, "iu_xray"), (mi, "mimic_cxr")):
        for path in sorted(p for p in at.rglob("*") if p.is_file()):
            whole = path.read_bytes()
            for _ in range(12):
                data = bytearray(whole)
                match rng.randrange(4):
                    case 0: data = data[:rng.randrange(len(data))]
                    case 1: data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                    case 2: at_ = rng.randrange(len(data)); data[at_:at_] = rng.choice([b"\0", b"\xff\xfe", b'"', b",,", b"\t", b"NaN", b"\xed\xa0\x80", b"../"])
                    case 3: data = bytearray(rng.randbytes(50))
                path.write_bytes(bytes(data))
                FORMATS[name].sniff(at)
                try: found = read(at, name)
                except MedchatError as e: assert "\n" not in str(e); continue
                for x in good(found): assert x.answer.strip() and all(".." not in Path(i).parts for i in x.images)
            path.write_bytes(whole)

def test_memory_does_not_grow_with_rows(tmp_path, peak_bytes):
    def peak(n):
        at = tmp_path/str(n); put(at/"train_captions.csv", "ID,Caption\n" + "".join(f"R_{i:06d},A caption of some length for picture {i}\n" for i in range(n)))
        put(at/"train_concepts.csv", "ID,CUIs\n" + "".join(f"R_{i:06d},C0000001;C0000002\n" for i in range(n)[::-1]))
        def count(): assert sum(isinstance(x, Record) for x in read_records(at)) == n
        return peak_bytes(count)
    small, large = peak(200), peak(2000)
    assert large < 1.3 * small + 200_000

# ---- the published files

def test_roco_as_published(real_data):
    found = read(real_data/"roco", "roco")
    assert len(found) == 8180 and all(isinstance(r, Record) for r in found) # no XXX. in this part
    assert Counter(r.licence for r in found) == {"CC BY": 3382, "CC BY-NC-SA": 1515, "CC BY-NC": 1320, "NO-CC CODE": 1016, "CC BY-NC-ND": 914, "CC BY-ND": 22, "CC0": 6, "CC BY-SA": 5}
    assert {r.split for r in found} == {"validation"} and len({r.id for r in found}) == 8180 and len({r.group for r in found}) == 7417
    assert found[0].answer.startswith("Axial computed") and found[0].meta["semtypes"]["T061"] == "Therapeutic or Preventive Procedure" and len(found[0].meta["keywords"]) == 11
    assert sum("keywords" not in r.meta for r in found) == 1 and all(r.group.startswith("PMC") for r in found)
    assert recognise(real_data/"roco"/"data"/"validation"/"radiology"/"captions.txt")[0] == "roco"

def test_rocov2_as_published(real_data):
    found = read(real_data/"rocov2", "rocov2")
    assert len(found) == len({r.id for r in found}) == 9927 and all(isinstance(r, Record) and r.split == "test" for r in found)
    assert all(r.meta["cuis"] for r in found) and found[0].images == ["test/ROCOv2_2023_test_000001.jpg"] and found[-1].id == "ROCOv2_2023_test_009972"
    assert not any(r.answer[0].isspace() for r in found)

def test_indiana_as_published(real_data):
    found = read(real_data/"iu_xray_kaggle", "iu_xray")
    assert len(found) == 3851 and Counter(why(found)) == {"neither findings nor impression": 25}
    assert Counter(tuple(r.meta["sections"]) for r in good(found)) == {("findings", "impression"): 3331, ("impression",): 489, ("findings",): 6}
    assert sum(len(r.images) for r in good(found)) == 7426 and {len(r.images) for r in good(found)} == {1, 2, 3, 4, 5} # 7,466 views less the 40 of the rejected
    assert sum("XXXX" in r.answer for r in good(found)) == 1780
    assert all(r.meta["projection"] == sorted(r.meta["projection"]) for r in good(found)) # Frontal before Lateral
    assert len({r.id for r in good(found)}) == len({r.group for r in good(found)}) == 3826
