"Tables, folders, Parquet and the Hub: each row a Record or a Reject, whatever stands in the cells."
import datetime, hashlib, io, json, os, re, secrets, subprocess, sys, zipfile
from itertools import islice
from urllib.parse import parse_qs, unquote, urlsplit
import openpyxl, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import given, strategies as st
from PIL import Image
from hub_server import File, Hub, Problem, Repo, git_oid, pointer
from medchat import tables
from medchat.core import MedchatError, Record
from medchat.readers import Reject, find_format, read_records, recognise
from medchat.tables import find_columns, instruction, pick, to_plain, to_row_record, xlsx_rows

def png(colour=0) -> bytes: out = io.BytesIO(); Image.new("L", (4, 4), colour).save(out, "PNG"); return out.getvalue()
def read(source, format, **options): return list(read_records(source, format, **options))
def kinds(found): return [type(x).__name__ for x in found]
def excel(path, *rows, title="Sheet"):
    book = openpyxl.Workbook(); book.active.title = title
    for r in rows: book.active.append(r)
    book.save(path); return path

# ---- columns
@pytest.mark.parametrize("names,columns,found", [
    (["image", "question", "answer"], "", {"image": "image", "question": "question", "answer": "answer"}),
    (["Image Index", "Caption"], "", {"image": "Image Index", "caption": "Caption"}),
    (["file_name", "text", "report"], "", {"image": "file_name", "report": "report"}),
    (["image", "question", "answer", "caption"], "", {"image": "image", "question": "question", "answer": "answer"}),
    (["image", "question", "caption"], "", {"image": "image", "caption": "caption"}),
    (["img", "q", "a"], "image=img,question=q,answer=a", {"image": "img", "question": "q", "answer": "a"}),
    (["img", "q", "a"], " images = IMG , question=q,answer=a ", {"image": "img", "question": "q", "answer": "a"}),
    (["img", "a"], 'image=img,answer=a,question="One, two?"', {"image": "img", "answer": "a", "question": '"One, two?'}),
    (["img", "a, b"], 'image=img,caption="a, b"', {"image": "img", "caption": "a, b"}),
    (["q", "a"], "question=q,answer=a", {"question": "q", "answer": "a"}),
    (["img", "patient's text"], "image=img,caption=patient's text", {"image": "img", "caption": "patient's text"})])
def test_columns(names, columns, found): assert find_columns(names, columns) == found

@pytest.mark.parametrize("names,columns,problem", [
    (["a", "b"], "", "which columns"), (["question", "answer"], "", "which columns"), (["image", "question"], "", "which columns"), (["a"], "image=b,caption=a", "no column 'b' in: .*Its columns: a"),
    (["a", "b"], "image", "role=column"), (["a", "b"], "image=,caption=b", "role=column"), (["a", "b"], "picture=a", "Roles: "), (["a", "b"], "image=a,answer=b", "no pair to learn"),
    (["a", "b"], "image=a", "no pair to learn"), (["a", "b", "c"], "image=a,caption=b,report=c", "no pair to learn"), (["a", "b"], 'image="c",caption=b', "no column 'c'"), (["a"], ",,=", "role=column")])
def test_columns_that_do_not_do(names, columns, problem):
    with pytest.raises(MedchatError, match=problem) as e: find_columns(names, columns)
    assert "\n" not in str(e.value)

@given(st.lists(st.text(max_size=5), max_size=5, unique=True), st.text(alphabet='imagecptonrs=,"x ', max_size=30))
def test_columns_are_found_or_refused(names, columns):
    try: found = find_columns(names, columns)
    except MedchatError: return
    assert all(c in names or c.startswith('"') for c in found.values())

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8) | st.datetimes() | st.dates() | st.times() | st.decimals(), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=8)
@given(values)
def test_any_cell_is_json(value): json.dumps(to_plain(value), allow_nan=False)

@given(st.dictionaries(st.sampled_from(["image", "question", "answer", "context", "split", "group", "id", "answer_type", "x"]), values, max_size=9))
def test_any_row_is_a_record_or_refused(row):
    try: record, blobs = to_row_record(tables.Path("/nonexistent"), "w", pick(row, {r: r for r in ("image", "question", "answer", "context", "split", "group", "id", "answer_type")}))
    except (ValueError, TypeError, KeyError): return
    assert record.images and set(blobs) <= set(record.images) and record.split in (None, "train", "validation", "test") and record.answer_type in ("open", "closed")

@pytest.mark.parametrize("value,plain", [(3.0, 3), (3.5, 3.5), (True, True), (float("inf"), None), (b"x", None), ([1.0, None, b"x"], [1]), ({"a": None, 1: 2.0}, {"1": 2}), (datetime.date(2026, 1, 2), "2026-01-02"), (datetime.time(8, 5), "08:05:00"), (datetime.timedelta(days=1), "1 day, 0:00:00")])
def test_cells(value, plain): assert to_plain(value) == plain and type(to_plain(value)) is type(plain)

def test_instructions_are_spread_and_stable():
    said = [instruction("caption", f"{n}.png") for n in range(600)]
    assert len(set(said)) == 6 and min(map(said.count, set(said))) > 60 and instruction("caption", "a") == instruction("caption", "a") and instruction("caption", "\ud800")

# ---- table
def test_several_images_in_a_cell(tmp_path):
    (tmp_path/"t.csv").write_text('image,caption\na.png;b.png,one\na.png | b.png,two\n"[""a.png"", ""b.png""]",three\n"[\'a.png\']",four\na.png;,five\n[,six\n')
    found = read(tmp_path/"t.csv", "table")
    assert [x.images if isinstance(x, Record) else x.why for x in found] == [["a.png", "b.png"]] * 3 + [["a.png"], "no image path: ''", ["["]]

def test_all_roles(tmp_path):
    (tmp_path/"t.csv").write_text("image,question,answer,context,id,split,patient_id,answer_type,source,licence,lang,ward\na.png,Large?,Yes,Cough.,7,val,p1,CLOSED ,S,CC0-1.0,de,B\nb.png,Large?,2,,8,fold3,p1,close-ended,S,CC0-1.0,de,B\n")
    a, b = read(tmp_path/"t.csv", "table", columns="image=image,question=question,answer=answer,context=context,id=id,split=split,group=patient_id,answer_type=answer_type,source=source,licence=licence,language=lang")
    assert (a.id, a.question, a.answer, a.split, a.group, a.answer_type, a.source, a.licence, a.language, a.meta) == ("7", "Large?\nCough.", "Yes", "validation", "p1", "closed", "S", "CC0-1.0", "de", {"ward": "B"})
    assert b.split is None and b.meta == {"ward": "B", "split": "fold3"} and b.answer_type == "closed" and b.question == "Large?"

def test_no_image_column_where_one_says_so(tmp_path):
    (tmp_path/"t.csv").write_text("q,a\nWhat is PACS?,An archive.\n")
    assert [r.images for r in read(tmp_path/"t.csv", "table", columns="question=q,answer=a")] == [[]]

def test_images_folder_is_found(tmp_path):
    (tmp_path/"images").mkdir(); (tmp_path/"images"/"a.png").write_bytes(png()); (tmp_path/"t.csv").write_text("image,caption\na.png,x\nb.png,y\n")
    assert [r.images for r in read(tmp_path/"t.csv", "table")] == [["images/a.png"], ["b.png"]]
    assert [r.images for r in read(tmp_path/"t.csv", "table", images=tmp_path/"images")] == [["a.png"], ["b.png"]]

def test_splits_by_file_and_choice_of_table(tmp_path):
    for n in ("train", "val", "test"): (tmp_path/f"{n}.csv").write_text("image,caption\na.png,x\n")
    (tmp_path/"codes.tsv").write_text("code\tmeaning\n1\tx\n")
    found = read(tmp_path, "table")
    assert [(r.id, r.split) for r in found] == [("test.csv[1]", "test"), ("train.csv[1]", "train"), ("val.csv[1]", "validation")] and "table" == recognise(tmp_path)[0]
    (tmp_path/"more.csv").write_text("image,caption\na.png,x\n")
    with pytest.raises(MedchatError, match="several tables in.*Name one of them: more.csv, test.csv"): read(tmp_path, "table")
    with pytest.raises(MedchatError, match="no table with these columns"): read(tmp_path, "table", columns="image=scan,caption=x")
    with pytest.raises(MedchatError, match="no table in"): read(tmp_path/"codes.tsv" if (tmp_path/"e").mkdir() else tmp_path/"e", "table")

@pytest.mark.parametrize("content,problem", [(b"", "empty table"), (b"\n\n", "empty table"), (b"image,image\na,b\n", "two columns"), (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer")])
def test_bad_tables(tmp_path, content, problem):
    (tmp_path/"t.csv").write_bytes(content)
    with pytest.raises(MedchatError, match=problem): read(tmp_path/"t.csv", "table")

def test_excel_cells(tmp_path):
    day = datetime.datetime(2026, 3, 1)
    path = excel(tmp_path/"t.xlsx", [None, None], ["image", "question", "answer", "seen", "n"], ["a.png", "How many?", 3.0, day, 1.25], [None] * 5, ["b.png", "Is it?", True, None, None],
                 ["c.png", "Sum?", "=1+1", None, None], ["d.png", "Err?", "#DIV/0!", None, None], ["e.png", "More?", "x", None, None, "extra"], ["f.png", "When?", day, None, None])
    found = read(path, "table")
    assert [x.answer if isinstance(x, Record) else x.why for x in found] == ["3", "answer is bool, not text", "empty answer", "answer shows #DIV/0!", "6 cells where 5 columns are", "2026-03-01"]
    assert found[0].meta == {"seen": "2026-03-01", "n": 1.25} and found[0].where == "t.xlsx[row 3]"

def test_excel_keeps_the_computed_value(tmp_path):
    "A formula gives the value that Excel saved beside it."
    path = excel(tmp_path/"t.xlsx", ["image", "caption"], ["a.png", "=1+1"])
    with zipfile.ZipFile(path) as z: files = {n: z.read(n) for n in z.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    files[sheet] = re.sub(rb"<v\s*/>|<v></v>", b"<v>2</v>", files[sheet]); assert b"<v>2</v>" in files[sheet]
    with zipfile.ZipFile(path, "w") as z:
        for n, data in files.items(): z.writestr(n, data)
    assert [r.answer for r in read(path, "table")] == ["2"]

@pytest.mark.parametrize("damage", [lambda d: d[:len(d) // 2], lambda d: b"", lambda d: b"PK" + d[2:200], lambda d: d.replace(b"xl/worksheets", b"xl/workshoots"), lambda d: b"version https://git-lfs.github.com/spec/v1\noid x\n"])
def test_damaged_excel(tmp_path, damage):
    path = excel(tmp_path/"t.xlsx", ["image", "caption"], ["a.png", "x"]); path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MedchatError) as e: read(path, "table")
    assert "\n" not in str(e.value) and recognise_quietly(path) == ""

def recognise_quietly(path): return find_format(path, "table").sniff(path)

def test_flipped_bits_in_excel(tmp_path):
    import random
    path, rng = excel(tmp_path/"t.xlsx", ["image", "caption"], *[[f"{n}.png", f"text {n}"] for n in range(20)]), random.Random(0)
    whole = path.read_bytes()
    for _ in range(60):
        data = bytearray(whole); data[rng.randrange(len(data))] ^= 1 << rng.randrange(8); path.write_bytes(data)
        try: assert all(isinstance(x, (Record, Reject)) for x in read(path, "table"))
        except MedchatError: pass

def test_excel_that_unpacks_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "UNPACKED", 1000)
    with pytest.raises(MedchatError, match="too large to unpack"): read(excel(tmp_path/"t.xlsx", ["image", "caption"], ["a", "x"]), "table")

NS = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
def by_excel(path, sheet, strings, bomb=""):
    "A workbook as Excel itself writes it: shared strings, styles for dates, a sheet that says its size."
    rel, part = "http://schemas.openxmlformats.org/officeDocument/2006/relationships", "application/vnd.openxmlformats-officedocument.spreadsheetml"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("[Content_Types].xml", '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>' + "".join(
            f'<Override PartName="/xl/{n}" ContentType="{part}.{k}+xml"/>' for n, k in (("workbook.xml", "sheet.main"), ("worksheets/sheet1.xml", "worksheet"), ("sharedStrings.xml", "sharedStrings"), ("styles.xml", "styles"))) + "</Types>")
        z.writestr("_rels/.rels", f'<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r1" Type="{rel}/officeDocument" Target="xl/workbook.xml"/></Relationships>')
        z.writestr("xl/workbook.xml", f'<workbook {NS} xmlns:r="{rel}"><sheets><sheet name="Cases" sheetId="1" r:id="r1"/></sheets></workbook>')
        z.writestr("xl/_rels/workbook.xml.rels", '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">' + "".join(f'<Relationship Id="r{i}" Type="{rel}/{k}" Target="{t}"/>' for i, (k, t) in enumerate((("worksheet", "worksheets/sheet1.xml"), ("sharedStrings", "sharedStrings.xml"), ("styles", "styles.xml")), 1)) + "</Relationships>")
        z.writestr("xl/styles.xml", f'<styleSheet {NS}><fonts count="1"><font/></fonts><fills count="1"><fill><patternFill/></fill></fills><borders count="1"><border/></borders><cellStyleXfs count="1"><xf/></cellStyleXfs><cellXfs count="2"><xf/><xf numFmtId="14" applyNumberFormat="1"/></cellXfs></styleSheet>')
        z.writestr("xl/sharedStrings.xml", f"{bomb}<sst {NS}>" + "".join(f"<si>{t}</si>" for t in strings) + "</sst>")
        z.writestr("xl/worksheets/sheet1.xml", f'<worksheet {NS}><dimension ref="A1"/><sheetData>{sheet}</sheetData></worksheet>')
    return path

def test_excel_as_excel_writes_it(tmp_path):
    cell = lambda ref, value, kind="n", style=0, formula="": f'<c r="{ref}" t="{kind}" s="{style}">{f"<f>{formula}</f>" if formula else ""}<v>{value}</v></c>'
    strings = ["<t>image</t>", "<t>question</t>", "<t>answer</t>", "<t>seen</t>", "<t>a.png</t>", "<r><t>How </t></r><r><t>many?</t></r>"]
    row = lambda n, *cells: f'<row r="{n}">{"".join(cells)}</row>'
    sheet = row(2, *(cell(f"{c}2", i, "s") for i, c in enumerate("ABCD"))) + row(3, cell("A3", 4, "s"), cell("B3", 5, "s"), cell("C3", "3"), cell("D3", 46082, style=1)) + row(5, cell("A5", 4, "s"), cell("B5", 5, "s"), cell("C5", "0.1", formula="1/10")) \
        + row(6, cell("A6", 4, "s"), cell("B6", 5, "s"), cell("C6", "#REF!", "e")) + row(7, cell("A7", 4, "s"), cell("C7", "x &amp; y", "str")) + row(8, cell("A8", 4, "s"), cell("B8", 5, "s"), cell("C8", 1, "b"))
    found = read(by_excel(tmp_path/"t.xlsx", sheet, strings), "table")
    assert [(x.question, x.answer, x.meta) if isinstance(x, Record) else x.why for x in found] == [("How many?", "3", {"seen": "2026-03-01"}), ("How many?", "0.1", {}), "answer shows #REF!", "empty question", "answer is bool, not text"]

def test_excel_with_an_entity_bomb(tmp_path):
    bomb = '<!DOCTYPE s [<!ENTITY a "' + "x" * 1000 + '">' + "".join(f'<!ENTITY {chr(98 + k)} "{f"&{chr(97 + k)};" * 50}">' for k in range(8)) + "]>"
    path = by_excel(tmp_path/"t.xlsx", '<row r="1"><c r="A1" t="s"><v>0</v></c></row><row r="2"><c r="A2" t="s"><v>0</v></c></row>', ["<t>&i;</t>"], bomb)
    with pytest.raises(MedchatError, match="not an Excel file"): read(path, "table")

def test_json_tables(tmp_path):
    rows = [{"scan": "a.png", "q": "Q?", "a": 3}, {"scan": "b.png", "q": "Q?"}, 5]
    (tmp_path/"t.json").write_text(json.dumps(rows)); (tmp_path/"t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("t.json", "t.jsonl"):
        found = read(tmp_path/name, "table", columns="image=scan,question=q,answer=a")
        assert [x.answer if isinstance(x, Record) else x.why for x in found][:2] == ["3", "empty answer"] and isinstance(found[2], Reject)
    (tmp_path/"u.json").write_text(json.dumps([{"image": "a.png", "question": "Q?", "answer": "A"}]))
    assert "columns that read as image=image, question=question, answer=answer" in find_format(tmp_path, "table").sniff(tmp_path/"u.json")

def test_old_excel(tmp_path):
    (tmp_path/"t.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    with pytest.raises(MedchatError, match="old Excel format"): read(tmp_path/"t.xls", "table")

def test_excel_memory_does_not_grow(tmp_path, peak_bytes):
    book = openpyxl.Workbook(write_only=True); sheet = book.create_sheet(); sheet.append(["image", "caption"])
    for n in range(1500): sheet.append([f"{n}.png", n])
    book.save(tmp_path/"t.xlsx")
    early = peak_bytes(lambda: sum(1 for _ in islice(xlsx_rows(tmp_path/"t.xlsx"), 300)))
    def count(): assert sum(1 for _ in xlsx_rows(tmp_path/"t.xlsx")) == 1500
    assert peak_bytes(count) < early + 2_000_000

def test_nih_by_named_columns(real_data):
    home = real_data/"nih_cxr14_sample"
    columns = 'image=Image Index,answer=Finding Labels,group=Patient ID,question="Which findings does the chest X-ray show?"'
    found = read(home, "table", columns=columns)
    assert len(found) == 5365 and all(isinstance(r, Record) for r in found) and found[0].images == ["images/00000001_000.png"] and (found[0].answer, found[0].group) == ("Cardiomegaly", "1")
    assert sum((home/r.images[0]).is_file() for r in found) == 7 and found[0].meta["Patient Age"] == "57" and {r.question for r in found} == {"Which findings does the chest X-ray show?"}
    with pytest.raises(MedchatError, match="Its columns: id, Atelectasis"): read(home/"data.csv", "table", columns="image=Image Index,caption=x")

# ---- folder
def make(folder, files):
    for name, content in files.items():
        path = folder/name; path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode())
    return folder

def test_folder_of_pairs(tmp_path):
    found = read(make(tmp_path, {"a.png": png(), "a.txt": "\ufeffClear.", "B.JPG": png(), "B.json": {"question": "Q?", "answer": 3.0, "image": "/etc/passwd"}, "val/c.png": png(), "val/c.json": {"report": "R", "by": "x"}, "d.png": png(),
        "d.jpg": png(), "e.txt": "alone", "f.png": png(), "f.txt": b"\xff\xfe\xfa", "g.png": png(), "g.json": "{", "h.png": png(), "h.txt": "x", "h.json": {"caption": "x"}, "i.png": png(), "i.json": [], "README.txt": "about", "LICENSE.txt": "x",
        ".hidden.png": png(), "__MACOSX/a.png": png(), "k.png": png(), "k.txt": "x" * (1 << 21), "notes.docx": b"x", "test/deep/l.png": png(), "test/deep/l.txt": "L", "readme_scan.png": png()}), "folder")
    got = {x.where: (x.kind, x.answer, x.split) if isinstance(x, Record) else x.why for x in found}
    assert got == {"B.JPG": ("vqa", "3", None), "a.png": ("caption", "Clear.", None), "d.jpg": "no text for this image", "d.png": "no text for this image", "e.txt": "no image for this text", "f.png": "not UTF-8 text: f.txt",
        "g.png": "not JSON: g.json", "h.png": "several files of one name: h.json, h.png, h.txt", "i.png#1": "i.json holds list, not an object", "k.png": "a text of 2,097,152 bytes: k.txt", "readme_scan.png": "no text for this image",
        "test/deep/l.png": ("caption", "L", "test"), "val/c.png": ("report", "R", "validation")}
    assert {r.id: r.images for r in found if isinstance(r, Record)}["B.JPG"] == ["B.JPG"] and recognise(tmp_path)[0] == "folder"

def test_image_folder(tmp_path):
    make(tmp_path, {"train/metadata.jsonl": '{"file_name": "a.png", "text": "A"}\n{"file_name": "sub\\\\b.png", "text": "B"}\n{"file_names": ["a.png", "c.png"], "text": "AC"}\n{bad\n{"file_name": "../x.png", "text": "X"}\n{"file_name": null, "text": "N"}\n',
        "train/a.png": png(), "train/c.png": png(), "train/sub/b.png": png(), "train/sub/lost.png": png(), "test/metadata.jsonl": '{"file_name": "a.png", "text": "T", "n": 1.0}\n', "test/a.png": png()})
    found = read(tmp_path, "folder")
    assert [(x.images, x.split) if isinstance(x, Record) else x.why for x in found] == [(["test/a.png"], "test"), (["train/a.png"], "train"), (["train/sub/b.png"], "train"), (["train/a.png", "train/c.png"], "train"),
        found[4].why, (["x.png"], "train"), "no image", "no row of metadata.jsonl names this image"]
    assert "not a line of JSON" in found[4].why and len({x.where for x in found}) == 8
    assert recognise(tmp_path) == ("folder", "test/metadata.jsonl names images by file_name") and recognise(tmp_path/"train")[0] == "folder"

def test_metadata_paths_stay_inside(tmp_path):
    make(tmp_path/"set", {"metadata.csv": "file_name,text\n../secret.png,x\n/etc/passwd,x\n", "a.png": png()}); (tmp_path/"secret.png").write_bytes(png())
    assert all(isinstance(x, Reject) for x in read(tmp_path/"set", "folder"))

def test_texts_that_are_links_or_pointers(tmp_path):
    make(tmp_path, {"secret.txt": "secret", "set/a.png": png(), "set/b.png": png(), "set/b.txt": "version https://git-lfs.github.com/spec/v1\noid x\n", "set/c.png": png(), "set/c.txt": "C"})
    os.symlink(tmp_path/"secret.txt", tmp_path/"set"/"a.txt"); os.symlink("loop.txt", tmp_path/"set"/"loop.txt")
    found = read(tmp_path/"set", "folder")
    assert [x.answer if isinstance(x, Record) else x.why for x in found] == ["the text is a link out of the folder: a.txt", "a Git LFS pointer, not a text: b.txt", "C", found[3].why] and isinstance(found[3], Reject)

def test_names_in_no_encoding(tmp_path):
    (tmp_path/"s").mkdir()
    for name, data in ((b"\xff.png", png()), (b"\xff.txt", b"x"), (b"ok.png", png()), (b"ok.txt", b"x")): open(os.path.join(os.fsencode(tmp_path/"s"), name), "wb").write(data)
    assert [type(x).__name__ for x in read(tmp_path/"s", "folder")] == ["Record", "Reject"]

def test_folder_without_anything(tmp_path):
    for source, problem in ((tmp_path, "no images with texts in"), (make(tmp_path, {"a.bin": b"x"})/"a.bin", "not a folder")):
        with pytest.raises(MedchatError, match=problem): read(source, "folder")
    assert find_format(tmp_path, "folder").sniff(tmp_path) == ""

# ---- parquet
def table_of(path, **columns): path.parent.mkdir(parents=True, exist_ok=True); pq.write_table(pa.table(columns), path); return path

def test_parquet_forms(tmp_path):
    whole = {"bytes": png(), "path": "a.png"}
    table_of(tmp_path/"data"/"train-00000-of-00002.parquet", image=[whole, {"bytes": None, "path": "../b.png"}, None], question=["Q?"] * 3, answer=["a", "b", "c"])
    table_of(tmp_path/"data"/"train-00001-of-00002.parquet", image=[whole], question=["Q?"], answer=["d"])
    found = read(tmp_path, "parquet")
    assert [(x.split, x.where) if isinstance(x, Record) else x.why for x in found] == [("train", "train-00000-of-00002.parquet[1]"), "image outside the source folder: ../b.png", "no image", ("train", "train-00001-of-00002.parquet[1]")]
    assert found[0].blobs == {found[0].images[0]: png()} and found[0].group == found[0].images[0] == found[3].images[0]

def test_parquet_bytes_lists_paths_and_odd_names(tmp_path):
    table_of(tmp_path/"a.parquet", scan=[png()], caption=["x"], mask=[None])
    table_of(tmp_path/"b.parquet", image=[[{"bytes": png(), "path": None}, {"bytes": png(9), "path": None}]], report=["x"])
    table_of(tmp_path/"c.parquet", image=["x/a.png"], caption=["x"], when=[datetime.date(2026, 1, 1)], n=pa.array([None], pa.float64()))
    a, b, c = (read(tmp_path/f"{n}.parquet", "parquet")[0] for n in "abc")
    assert len(a.blobs) == 1 and len(b.images) == len(b.blobs) == 2 and b.kind == "report" and c.images == ["x/a.png"] and c.meta == {"when": "2026-01-01"}
    with pytest.raises(MedchatError, match="Its columns: scan, caption, mask"): read(tmp_path/"a.parquet", "parquet", columns="image=img,caption=caption")

def test_parquet_splits_by_folder_subsets_and_snapshots(tmp_path):
    cache = tmp_path/"datasets--ada--vqa"
    for revision in ("aaa", "bbb"):
        for name in ("en/train/0000.parquet", "en/test/0000.parquet", "zh/train/0000.parquet"): table_of(cache/"snapshots"/revision/name, image=[png()], caption=[f"{revision} {name}"])
    with pytest.raises(MedchatError, match="several revisions"): read(cache, "parquet")
    (cache/"refs").mkdir(); (cache/"refs"/"main").write_text("bbb")
    found = read(cache, "parquet")
    assert [(r.answer, r.split) for r in found] == [("bbb en/test/0000.parquet", "test"), ("bbb en/train/0000.parquet", "train"), ("bbb zh/train/0000.parquet", "train")] and len({r.id for r in found}) == 3
    assert len(read(cache, "parquet", subset="zh")) == 1 and recognise(cache)[0] == "parquet"
    with pytest.raises(MedchatError, match="no Parquet files in.*None in a folder called fr"): read(cache, "parquet", subset="fr")

def test_parquet_that_is_none(tmp_path):
    (tmp_path/"a.parquet").write_bytes(b"PAR1" + bytes(20))
    with pytest.raises(MedchatError, match="not a Parquet file"): read(tmp_path, "parquet")
    assert find_format(tmp_path, "parquet").sniff(tmp_path) == ""

# ---- the Hub: the requests that `datasets` makes, answered as the Hub does
class DataHandler:
    def answer(self, status, data=b"", headers=None): # an error closes the connection, and says so
        return super().answer(status, data, {**(headers or {}), **({"Connection": "close"} if status >= 400 else {})})
    def route(self):
        hub, url = self.hub, urlsplit(self.path); path, query = unquote(url.path), parse_qs(url.query)
        def files(repo, revision):
            found = hub.repos.get(f"datasets/{repo}")
            if found is None or found.private and not self.who(): self.body(); raise Problem(404 if self.who() else 401, "Repository not found", "RepoNotFound")
            commit = found.at(revision or "main")
            if commit is None: self.body(); raise Problem(404, "Invalid rev id", "RevisionNotFound")
            return commit[0], commit[2]
        entry = lambda p, f: {"type": "file", "path": p, "size": f.size, "oid": f.oid, **({"lfs": {"oid": f.lfs, "size": f.size, "pointerSize": 130}} if f.lfs else {})}
        if g := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            oid, held = files(g[1], g[2])
            return self.answer(200, {"_id": "0", "id": g[1], "author": "ada", "sha": oid, "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "lastModified": "2026-01-01T00:00:00.000Z",
                                     "createdAt": "2026-01-01T00:00:00.000Z", "cardData": {"license": "cc0-1.0"}, "siblings": [{"rfilename": p} for p in sorted(held)]})
        if g := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            held = {p: f for p, f in files(g[1], g[2])[1].items() if not g[3] or p.startswith(g[3] + "/")}
            if g[3] and not held: raise Problem(404, "Entry not found", "EntryNotFound")
            top, dirs = (g[3] + "/") if g[3] else "", {}
            if query.get("recursive", [""])[0].lower() == "true": return self.answer(200, [entry(p, f) for p, f in sorted(held.items())])
            for p in held:
                if "/" in (rest := p.removeprefix(top)): dirs[top + rest.split("/")[0]] = 1
            return self.answer(200, [{"type": "directory", "path": d, "size": 0, "oid": "0" * 40} for d in dirs] + [entry(p, f) for p, f in sorted(held.items()) if "/" not in p.removeprefix(top)])
        if g := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            body = self.body(); wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]; held = files(g[1], g[2])[1]
            dirs = {p.rsplit("/", n)[0] for p in held for n in range(1, p.count("/") + 1)}
            return self.answer(200, [entry(p, held[p]) for p in wanted if p in held] + [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in wanted if p in dirs])
        if g := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            oid, held = files(g[1], g[2])
            if g[3] not in held: raise Problem(404, "Entry not found", "EntryNotFound")
            f = held[g[3]]; about = {"X-Repo-Commit": oid, "ETag": f'"{f.oid}"', "Accept-Ranges": "bytes"}
            if f.lfs: return self.answer(302, b"", {**about, "X-Linked-ETag": f'"{f.lfs}"', "X-Linked-Size": str(f.size), "Location": f"{hub.cdn}/cdn/{f.lfs}?sig={hub.sign(f.lfs)}"})
            return self.send(hub.blobs[f.oid], about)
        return super().route()

class DataHub(Hub):
    def __enter__(self):
        super().__enter__(); self.server.RequestHandlerClass = type("DataHandler", (DataHandler, self.server.RequestHandlerClass), {})
        return self
    def put(self, repo, files, private=False):
        "A commit of a data set with these files; its id."
        def stored(name, data):
            if not name.endswith(".parquet"): return self.store(data)
            oid = hashlib.sha256(data).hexdigest(); self.lfs[oid] = data
            return File(git_oid(pointer(oid, len(data))), len(data), oid)
        commits = self.repos.setdefault(f"datasets/{repo}", Repo(private)).commits
        commits.append((secrets.token_hex(20), "c", {n: stored(n, d) for n, d in files.items()}))
        return commits[-1][0]

def parquet_bytes(**columns): out = io.BytesIO(); pq.write_table(pa.table(columns), out); return out.getvalue()

SCRIPT = """import json, sys
from medchat.core import MedchatError, Record
from medchat.readers import read_records
for job in json.loads(sys.argv[1]):
    try: print(json.dumps([x.to_dict() | {"blobs": {k: len(v) for k, v in x.blobs.items()}} if isinstance(x, Record) else {"why": x.why, "where": x.where} for x in read_records(format="hub", **job)]))
    except MedchatError as e: print(json.dumps({"error": str(e)}))"""

def ask(hub, home, *jobs, **env):
    "What a process of its own reads from the Hub."
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(jobs)], env={**os.environ, **hub.env(home), "USE_TORCH": "0", **env}, text=True, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line[:1] in "[{"]

def test_hub_by_its_protocol(tmp_path):
    whole = {"bytes": png(), "path": "a.png"}
    with DataHub() as hub:
        old = hub.put("ada/vqa", {"data/train-00000-of-00001.parquet": parquet_bytes(image=[whole], question=["Old?"], answer=["yes"])})
        new = hub.put("ada/vqa", {"data/train-00000-of-00001.parquet": parquet_bytes(image=[whole, {"bytes": png(9), "path": "b.png"}, None], question=["Q?"] * 3, answer=["yes", "left", "no"], ward=["A", "B", "C"]),
                                  "data/test-00000-of-00001.parquet": parquet_bytes(image=[whole], question=["Q?"], answer=["no"], ward=["A"]), "README.md": b"---\nlicense: cc0-1.0\n---\n"})
        hub.put("ada/paths", {"train.jsonl": b'{"image": "pictures/a.png", "caption": "A"}\n{"image": "../../x.png", "caption": "B"}\n{"image": "/etc/passwd", "caption": "C"}\n{"image": "pictures/none.png", "caption": "D"}\n', "pictures/a.png": png(3)})
        hub.put("ada/two", {"README.md": b"---\nconfigs:\n- config_name: en\n  data_files: en.csv\n- config_name: zh\n  data_files: zh.csv\n---\n", "en.csv": b"image,text\nen.png,E\n", "zh.csv": b"image,text\nzh.png,Z\n", "en.png": png(1), "zh.png": png(2)})
        hub.put("ada/script", {"script.py": b"raise SystemExit('ran')\n"}); hub.put("ada/folder", {"train/metadata.jsonl": b'{"file_name": "a.png", "text": "A"}\n', "train/a.png": png(5)})
        hub.put("ada/private", {"a.csv": b"image,text\n"}, private=True)
        said = ask(hub, tmp_path/"home", dict(source="ada/vqa"), dict(source="ada/vqa", streaming=True), dict(source="ada/vqa", revision=old), dict(source="ada/paths"), dict(source="ada/two:zh"), dict(source="ada/two", subset="en"),
                   dict(source="ada/two"), dict(source="ada/two:fr"), dict(source="ada/nothing"), dict(source="ada/vqa", revision="no-such"), dict(source="ada/vqa", columns="image=scan,caption=x"), dict(source="ada/script"),
                   dict(source="ada/folder"), dict(source="ada/folder", streaming=True), dict(source="ada/private"))
        both, streamed, was, paths, zh, en, neither, fr, nothing, norev, nocol, script, folder, sfolder, private = said
        offline, other = ask(hub, tmp_path/"home", dict(source="ada/vqa"), dict(source="ada/vqa", revision=new), HF_HUB_OFFLINE="1")
    assert both == streamed and [(r.get("split"), r.get("why")) for r in both] == [("train", None), ("train", None), (None, "no image"), ("test", None)] or both[3]["split"] == "test"
    r = both[0]
    assert (r["id"], r["source"], r["licence"], r["meta"], r["answer_type"]) == ("ada/vqa/train[1]", "ada/vqa", "cc0-1.0", {"ward": "A", "revision": new}, "closed") and list(r["blobs"].values()) == [len(png())]
    assert [(x["turns"][0]["text"], x["meta"]["revision"]) for x in was] == [("Old?", old)]
    assert len(paths[0]["blobs"]) == 1 and [x.get("why", "")[:28] for x in paths] == ["", "image outside the data set: ", "image outside the data set: ", "no such image in the data se"]
    assert [x["turns"][1]["text"] for x in zh + en] == ["Z", "E"] and zh[0]["source"] == "ada/two:zh"
    for x, why in ((neither, "datasets cannot load"), (fr, "datasets cannot load"), (nothing, "no such data set on the Hub"), (norev, "no such revision"), (nocol, "no column 'scan'"), (script, "datasets cannot load"), (private, "no such data set")):
        assert why in x["error"] and "\n" not in x["error"], x
    assert [len(x["blobs"]) for x in folder + sfolder] == [1, 1] and folder[0]["turns"][1]["text"] == "A"
    assert [(x["turns"], x["meta"]) for x in offline] == [(x["turns"], x["meta"]) for x in was], "without the Hub: what was read last, and its revision"
    assert "of another revision" in other["error"]

def test_hub_out_of_reach(tmp_path):
    hub = Hub()
    with hub: pass
    (said,) = ask(hub, tmp_path/"home", dict(source="ada/vqa"))
    assert "cannot reach the Hub" in said["error"] and "\n" not in said["error"]

def test_hub_rows_cannot_read_files_of_this_machine(tmp_path):
    "A Parquet row that names a local file in place of bytes gets nothing."
    (tmp_path/"secret.png").write_bytes(png())
    table_of(tmp_path/"set"/"train.parquet", image=pa.array([{"bytes": None, "path": str(tmp_path/"secret.png")}]), caption=["x"])
    (x,) = read(str(tmp_path/"set"), "hub")
    assert isinstance(x, Reject) and "outside the data set" in x.why

@pytest.mark.parametrize("source", ["", "a b", "../x", "a/b/c", "https://huggingface.co/datasets/a/b", "a/b:c:d/../e"])
def test_not_an_id(source):
    with pytest.raises(MedchatError): read(source, "hub")
