"""Damaged sources of every format: a data set that is right, or one line that says what is wrong.

FUZZ_SECONDS=600 FUZZ_SEED=7 python tests/test_fuzz.py runs new cases for ten minutes and lists what failed;
python tests/test_fuzz.py SEED runs one case again and shows its error."""
import contextlib, copy, csv, gzip, hashlib, io, json, os, random, re, resource, shutil, signal, struct, subprocess, sys, tempfile, time, traceback, zipfile, zlib
from collections import Counter
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from medchat.core import MedchatError
from medchat.curate import convert, read_dataset
from medchat.readers import known_formats

# ---- small pictures and small sources, each row with a text of its own
def picture(n, kind="PNG"):
    a = np.random.default_rng(n).integers(0, 255, (6, 6, 3), np.uint8).repeat(5, 0).repeat(5, 1) # blocks, no two pictures alike
    b = io.BytesIO(); Image.fromarray(a).save(b, kind); return b.getvalue()

def put(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True); kind = path.suffix
    if kind == ".parquet":
        import pyarrow as pa, pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind in (".csv", ".tsv", ".gz") and not isinstance(rows, (str, bytes)):
        with (gzip.open if kind == ".gz" else open)(path, "wt", newline="", encoding="utf-8") as f:
            w = csv.DictWriter(f, rows[0], delimiter="\t" if kind == ".tsv" else ","); w.writeheader(); w.writerows(rows)
    elif kind == ".xlsx":
        import openpyxl
        book = openpyxl.Workbook(); [book.active.append(r) for r in [list(rows[0]), *(list(r.values()) for r in rows)]]; book.save(path)
    else: path.write_bytes(rows if isinstance(rows, bytes) else (rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)) + "\n" if kind == ".jsonl" else json.dumps(rows)).encode())
    return path

def pics(d, names):
    for n, name in enumerate(names): put(d/name, picture(n, "JPEG" if name.endswith(".jpg") else "PNG"))

Q, A = (lambda n: f"Is there a finding of kind {n} here?"), (lambda n: f"Yes, a finding of kind {n} é")
MAKERS = {}
def maker(name, format=None, **options):
    def keep(f): MAKERS[name] = (f, format or name.split("/")[0], options); return f
    return keep

@maker("records")
def _(d):
    pics(d, [f"i/{n}.png" for n in range(4)])
    put(d/"records.jsonl", [dict(id=f"r{n}", images=[f"i/{n}.png"], turns=[dict(role="user", text=Q(n)), dict(role="assistant", text=A(n))], kind="vqa", split=["train", "test"][n % 2], group=f"g{n}", meta={"n": n}) for n in range(4)])
@maker("records/tutorial")
def _(d): pics(d, [f"{n}.png" for n in range(4)]); return put(d/"rows.json", [dict(image_path=f"{n}.png", instruction=Q(n), context="", response=A(n)) for n in range(4)])
@maker("vqa_rad")
def _(d):
    pics(d, [f"images/s{n}.jpg" for n in range(4)])
    rows = [dict(qid=n, image_name=f"s{n}.jpg", image_organ="CHEST", answer=A(n), answer_type="CLOSED ", question_type="PRES", question=Q(n), phrase_type="freeform") for n in range(4)]
    put(d/"trainset.json", rows[:3]); put(d/"testset.json", rows[3:])
@maker("vqa_rad/parquet")
def _(d): put(d/"vqa-rad"/"data"/"train-00000-of-00001.parquet", [dict(image={"bytes": picture(n), "path": None}, question=Q(n), answer=A(n)) for n in range(4)])
@maker("slake")
def _(d):
    pics(d, [f"imgs/xmlab{n}/source.jpg" for n in range(4)])
    rows = [dict(img_id=n, img_name=f"xmlab{n}/source.jpg", question=Q(n), answer=A(n), q_lang="en", location="Abdomen", answer_type="OPEN", content_type="Organ", triple=["a", "_", "_"], qid=n) for n in range(4)]
    for name, rs in dict(train=rows[:2], validate=rows[2:3], test=rows[3:]).items(): put(d/f"{name}.json", rs)
@maker("path_vqa/lists")
def _(d):
    pics(d, [f"images/val/val_{n:04}.jpg" for n in range(3)])
    put(d/"pvqa_val.json", [dict(img_id=f"val_{n:04}", labelf={"pvqa": [{A(n): 1}, {A(n + 9): 1}]}, sentf={"pvqa": [Q(n), Q(n + 9)]}) for n in range(3)])
@maker("path_vqa/json")
def _(d): pics(d, [f"images/train/train_{n:04}.jpg" for n in range(3)]); put(d/"rows.json", [dict(image_path=f"images\\train\\train_{n:04}.jpg", question=Q(n), answer=A(n)) for n in range(3)])
@maker("path_vqa/parquet")
def _(d): put(d/"path-vqa"/"data"/"test-00000-of-00001.parquet", [dict(image={"bytes": picture(n), "path": None}, question=Q(n), answer=A(n)) for n in range(3)])
@maker("kvasir_vqa")
def _(d): pics(d, [f"images/a{n}.jpg" for n in range(4)]); put(d/"metadata.csv", [dict(source="Polyps", question=Q(n), answer=A(n), img_id=f"a{n}") for n in range(4)])
@maker("kvasir_vqa_x1")
def _(d): pics(d, [f"images/a{n}.jpg" for n in range(4)]); put(d/"train.jsonl", [dict(img_id=f"a{n}", complexity=1, question=Q(n), answer=A(n), original='[{"q": "a", "a": "b"}]', question_class=["text"]) for n in range(4)])
@maker("endovis18_vqa")
def _(d):
    for s in (1, 2):
        pics(d/f"seq_{s}", []); [put(d/f"seq_{s}"/"left_frames"/f"frame{n:03}.png", picture(10 * s + n)) for n in range(2)]
        for n in range(2): put(d/f"seq_{s}"/"vqa"/"Classification"/f"frame{n:03}_QA.txt", f"{Q(10 * s + n)}|{A(10 * s + n)}\nWhat is it {s}{n}?|A kidney {s}{n}\n")
@maker("rad_restruct")
def _(d):
    pics(d, [f"images/CXR{n}.png" for n in range(3)]); put(d/"id_to_img_mapping_frontal_reports.json", {str(n): [f"CXR{n}"] for n in range(3)})
    info = dict(answer_type="single_choice", options=["yes", "no"], path="lung_signs")
    for n in range(3): put(d/["train_qa_pairs", "test_qa_pairs"][n % 2]/f"{n}.json", [[Q(n), [A(n)], [], info], [Q(n + 9), [A(n + 9)], [[Q(n), [A(n)]]], info]])
@maker("pmc_vqa")
def _(d):
    pics(d, [f"images/PMC{n}_F1.jpg" for n in range(3)])
    put(d/"train.csv", [{"Figure_path": f"PMC{n}_F1.jpg", "Question": Q(n), "Answer": A(n), "Choice A": "A:alpha", "Choice B": f"B:{A(n)}", "Choice C": "C:gamma", "Choice D": "D:delta", "Answer_label": "B"} for n in range(3)])
@maker("rocov2")
def _(d):
    for s, ns in (("train", (0, 1, 2)), ("valid", (3,))):
        pics(d, []); [put(d/s/f"R_{n}.jpg", picture(n, "JPEG")) for n in ns]
        put(d/f"{s}_captions.csv", [dict(ID=f"R_{n}", Caption=f" {A(n)}, axial") for n in ns]); put(d/f"{s}_concepts.csv", [dict(ID=f"R_{n}", CUIs=f"C000000{n};C0000009") for n in ns])
    put(d/"license_information.csv", [dict(ID=f"R_{n}", Attribution="CC BY [x]", PMCID=f"PMC{n}") for n in range(4)])
@maker("rocov2/parquet")
def _(d): put(d/"data"/"train-00000-of-00001.parquet", [dict(image={"bytes": picture(n), "path": "a.png"}, image_id=f"R_{n}", caption=A(n), cui=["C0000001"]) for n in range(3)])
@maker("roco")
def _(d):
    at = d/"data"/"train"/"radiology"; pics(at, [f"images/ROCO_{n}.jpg" for n in range(3)])
    put(at/"captions.txt", "".join(f"ROCO_{n}\t {A(n)}\n" for n in range(3))); put(at/"cuis.txt", "".join(f"ROCO_{n}\tC000000{n}\n" for n in range(3))); put(at/"licences.txt", "ROCO_ID,PMC_ID,CC\n" + "".join(f"ROCO_{n},PMC{n}_a.jpg,CC BY\n" for n in range(3)))
@maker("iu_xray")
def _(d):
    pics(d, [f"images/{n}.png" for n in range(4)]); head = "uid MeSH Problems image indication comparison findings impression".split()
    put(d/"indiana_reports.csv", [dict(zip(head, [n, "normal", "normal", "", "", "", A(n), f"Impression {n}"])) for n in range(2)])
    put(d/"indiana_projections.csv", [dict(uid=n // 2, filename=f"{n}.png", projection=["Frontal", "Lateral"][n % 2]) for n in range(4)])
@maker("iu_xray/xml")
def _(d):
    pics(d, [f"NLMCXR_png/CXR{n}_IM-1.png" for n in range(3)])
    for n in range(3): put(d/"ecgen-radiology"/f"{n}.xml", f'<eCitation><uId id="CXR{n}"/><Abstract><AbstractText Label="FINDINGS">{A(n)}</AbstractText><AbstractText Label="IMPRESSION">Normal {n}</AbstractText></Abstract><parentImage id="CXR{n}_IM-1"/></eCitation>')
@maker("iu_xray/r2gen")
def _(d): pics(d, [f"images/CXR{n}_IM-1/0.png" for n in range(3)]); put(d/"annotation.json", dict(train=[dict(id=f"CXR{n}_IM-1", report=A(n), image_path=[f"CXR{n}_IM-1/0.png"], split="train") for n in range(2)], val=[dict(id="CXR2_IM-1", report=A(2), image_path=["CXR2_IM-1/0.png"], split="val")]))
@maker("mimic_cxr")
def _(d):
    pics(d, [f"files/p10/p1000000{n}/s5000000{n}/d{n}.jpg" for n in range(3)])
    put(d/"mimic_cxr_sectioned.csv", [dict(study=f"s5000000{n}", impression=f"Impression {n}", findings=A(n), last_paragraph="", comparison="") for n in range(3)])
    put(d/"mimic-cxr-2.0.0-split.csv.gz", [dict(dicom_id=f"d{n}", study_id=f"5000000{n}", subject_id=f"1000000{n}", split="train") for n in range(3)])
    put(d/"mimic-cxr-2.0.0-metadata.csv.gz", [dict(dicom_id=f"d{n}", subject_id=f"1000000{n}", study_id=f"5000000{n}", ViewPosition="PA") for n in range(3)])
@maker("mimic_cxr/tree")
def _(d):
    pics(d, [f"files/p10/p1000000{n}/s5000000{n}/d{n}.jpg" for n in range(3)])
    for n in range(3): put(d/"files"/"p10"/f"p1000000{n}"/f"s5000000{n}.txt", f"FINAL REPORT\n FINDINGS: {A(n)}\n\n IMPRESSION: Normal {n}\n")
chat = lambda n: [{"from": "human", "value": f"<image>\n{Q(n)}"}, {"from": "gpt", "value": A(n)}]
talk = lambda n: [{"role": "user", "content": f"<image>{Q(n)}"}, {"role": "assistant", "content": A(n)}]
@maker("llava_med")
def _(d): pics(d, [f"images/10{n}_F1.jpg" for n in range(3)]); put(d/"llava_med_instruct_60k.json", [dict(id=f"10{n}_F1", image=f"10{n}_F1.jpg", domain={"mri": True, "ct_scan": False}, conversatons=chat(n)) for n in range(3)])
@maker("llava")
def _(d): pics(d, [f"{n}.png" for n in range(3)]); put(d/"train.json", [dict(id=f"x{n}", image=f"{n}.png", conversations=chat(n)) for n in range(3)])
@maker("llava/jsonl")
def _(d): pics(d, [f"{n}.png" for n in range(3)]); put(d/"train.jsonl", [dict(id=f"x{n}", image=f"{n}.png", conversations=chat(n)) for n in range(3)])
@maker("sharegpt")
def _(d): pics(d, [f"{n}.png" for n in range(3)]); put(d/"train.json", [dict(messages=talk(n), images=[f"{n}.png"]) for n in range(3)])
@maker("sharegpt/parquet")
def _(d): put(d/"train.parquet", [dict(messages=talk(n), images=[{"bytes": picture(n), "path": None}]) for n in range(3)])
rows = lambda: [dict(image=f"{n}.png", question=Q(n), answer=A(n), patient_id=f"p{n}", note=f"n{n}", age=40 + n) for n in range(4)]
def flat(kind):
    def make(d): pics(d, [f"{n}.png" for n in range(4)]); put(d/f"train.{kind}", rows())
    return make
for k in ("csv", "tsv", "xlsx"): maker(f"table/{k}")(flat(k))
def flat_file(kind):
    def make(d): flat(kind)(d); return d/f"train.{kind}"
    return make
for k in ("json", "jsonl"): maker(f"table/{k}")(flat_file(k))
@maker("folder")
def _(d): pics(d, [f"train/{n}.png" for n in range(3)]); [put(d/"train"/f"{n}.txt", A(n)) for n in range(2)]; put(d/"train"/"2.json", [dict(question=Q(2), answer=A(2)), dict(question=Q(3), answer=A(3))])
@maker("folder/metadata")
def _(d): pics(d, [f"train/{n}.png" for n in range(3)]); put(d/"train"/"metadata.csv", [dict(file_name=f"{n}.png", text=A(n)) for n in range(3)])
@maker("parquet")
def _(d): put(d/"train.parquet", [dict(image={"bytes": picture(n), "path": None}, question=Q(n), answer=A(n), when=n / 3) for n in range(4)])

def dicom_files(d):
    from pydicom.dataset import Dataset, FileMetaDataset
    for n in range(3):
        ds = Dataset(); ds.file_meta = FileMetaDataset(); ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientName, ds.PatientID, ds.StudyDate = "1.2.3", "1.2.3.1", "Doe^Jo", f"77{n}", "20240229"
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.1.{n}"
        ds.Modality, ds.BodyPartExamined, ds.ViewPosition = "CR", "CHEST", "PA"
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 24, 32, 1, "MONOCHROME2", 16, 12, 11, 0
        ds.PixelData = (np.random.default_rng(n).random((24, 32)) * 4000).astype("<u2").tobytes()
        (d/"a").mkdir(exist_ok=True, parents=True); ds.save_as(d/"a"/f"{n}.dcm", enforce_file_format=True)
@maker("dicom")
def _(d): dicom_files(d)
@maker("dicom/texts", texts="texts.csv")
def _(d): dicom_files(d); put(d/"texts.csv", [dict(file=f"{n}.dcm", report=A(n)) for n in range(3)])
@maker("study")
def _(d):
    for n in range(3): pics(d, []); [put(d/f"s{n}"/f"{k}.png", picture(10 * n + k)) for k in range(2)]; put(d/f"s{n}"/["report.txt", "report.md", "report.json"][n], {"findings": A(n)} if n == 2 else A(n))
@maker("study/video")
def _(d):
    av = pytest.importorskip("av")
    for n in range(2):
        put(d/f"v{n}"/"report.txt", A(n))
        with av.open(str(d/f"v{n}"/"x.mp4"), "w") as out:
            s = out.add_stream("mpeg4", rate=4); s.width, s.height, s.pix_fmt = 64, 48, "yuv420p"
            for k in range(8): out.mux(s.encode(av.VideoFrame.from_ndarray(np.random.default_rng(10 * n + k).integers(0, 255, (48, 64, 3), np.uint8), format="rgb24")))
            out.mux(s.encode())

# ---- damage: each function changes the source and says how many rows it may have made different
PICTURES = (".png", ".jpg")
ODD = [None, True, False, float("nan"), float("inf"), -1, 0, 3.5, 10**30, [], {}, [[["x"]]], {"a": {"b": [1]}}, [None], "", "   ", "nan", "x" * 5000, "word " * 60000, "../../etc/passwd", "/etc/passwd", "..", ".", "/", "a\nb.png", "\x00",
       "a\x00b", "C:\\x.png", "\ud800", "\u202e\u200b", "🩻", "<image>" * 9, "<image>", "~", "%s{}", "-", "=1+1", "http://localhost/x.png", "file:///etc/passwd", "data:image/png;base64,AAAA", "version https://git-lfs", "images/../../x.png", "é" * 200 + ".png",
       {"bytes": "x", "path": None}, {"bytes": None, "path": "../x.png"}, {"text": "x"}, "en", "[1, 2", "['a.png', 'b.png']", "{" * 40, "TEST", "1e400", "0" * 5000, list(range(50)), "x\ty", "a|b", "a;b", '"', "C0000001", "a/b/c/d"]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
def png_of(w, h, bits=8, color=0, data=b"\0" * 99): return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, color, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
BOMBS = [png_of(40000, 40000), png_of(2**31 - 1, 2**31 - 1), png_of(0, 5), png_of(30000, 2000, data=bytes(2000)), b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + bytes(20), b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0),
         b"P6 60000 60000 255\n", b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\3\1\x22\0\2\x11\1\3\x11\1\xff\xd9", b"II*\0\x08\0\0\0" + b"\xff" * 60]

def files_of(d): return sorted(p for p in d.rglob("*") if p.is_file() and not p.is_symlink())
def choose(rng, d): # data files as often as pictures
    files = [p for p in files_of(d) if p.stat().st_size]; data = [p for p in files if p.suffix not in PICTURES]
    return rng.choice(data if data and rng.random() < 0.65 else files)
loose = lambda p: 99 if p.suffix in (".parquet", ".dcm", ".mp4", ".xlsx", ".gz") else 1 # nothing in them tells a flipped bit

def truncate(rng, d): p = choose(rng, d); data = p.read_bytes(); p.write_bytes(data[:rng.randrange(max(1, len(data)))]); return loose(p)
def flip(rng, d):
    p, k = choose(rng, d), rng.choice([1, 1, 2, 8]); data = bytearray(p.read_bytes())
    for _ in range(k): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    p.write_bytes(data); return 2 * k * loose(p)
def empty(rng, d): choose(rng, d).write_bytes(b""); return 0
def noise(rng, d): p = choose(rng, d); p.write_bytes(rng.randbytes(rng.choice([1, 20, 1000, 70000]))); return p.suffix in (".txt", ".md") # one letter is a text
def pointer(rng, d): choose(rng, d).write_bytes(LFS); return 0
def nuls(rng, d): p = choose(rng, d); data = p.read_bytes(); at = rng.randrange(len(data) + 1); p.write_bytes(data[:at] + b"\0" * rng.choice([1, 5, 5000]) + data[at:]); return 2 * loose(p)
def cut_out(rng, d): p = choose(rng, d); data = p.read_bytes(); a, b = sorted(rng.randrange(len(data) + 1) for _ in "ab"); p.write_bytes(data[:a] + data[b:]); return 2 * loose(p)
def twice(rng, d): p = choose(rng, d); data = p.read_bytes(); p.write_bytes(data + data[rng.choice([0, len(data) // 2]):]); return 2 * loose(p)
def spoil_marks(rng, d):
    p = choose(rng, d); data = p.read_bytes(); marks = [m.start() for m in re.finditer(rb'[",{}\[\]:\n\t|<>;&]', data)] or [0]; at = rng.choice(marks)
    p.write_bytes(data[:at] + rng.choice([b"", b'"', b"\n", b",", b"\t", b"\r", b"]", b'"a', b"\\", b"<"]) + data[at + 1:]); return 3 * loose(p)
def recode(rng, d):
    p = choose(rng, d)
    with contextlib.suppress(ValueError): p.write_bytes(p.read_bytes().decode("utf-8").encode(rng.choice(["latin-1", "utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7", "cp037"])))
    return 99 # in latin-1 an é is lost, and a row with it
def other_end(rng, d):
    p = choose(rng, d); os.rename(p, p.with_suffix(rng.choice([".json", ".jsonl", ".csv", ".tsv", ".xlsx", ".parquet", ".png", ".txt", ".xml", ".dcm", ".mp4", ".gz", "", ".JPG", ".pkl"]))); return 99
def gone(rng, d): choose(rng, d).unlink(); return 0
def folder_for_file(rng, d): p = choose(rng, d); p.unlink(); p.mkdir(); return 0
def fifo(rng, d): p = choose(rng, d); p.unlink(); os.mkfifo(p); return 0
def link(rng, d):
    p = choose(rng, d); data = p.read_bytes(); p.unlink()
    out = d.parent/f"outside{p.suffix}"; out.write_bytes(data); os.symlink(rng.choice([out, p.name, "/etc/passwd", "/dev/zero", "/nowhere", ".."]), p); return 0
def loop(rng, d): os.symlink(rng.choice([d, "..", ".", "self"]), d/"self"); os.symlink(d, choose(rng, d).parent/"zz_up"); return 0
def bomb(rng, d):
    files = [p for p in files_of(d) if p.suffix in PICTURES]
    if files: rng.choice(files).write_bytes(rng.choice(BOMBS))
    return 0
def odd_names(rng, d):
    at = choose(rng, d).parent
    for name in (b"a\nb.png", b"\xff\xfe.png", b"..png", "é\u202e.txt".encode(), b"\xff.json", b"-rf", b"con", b"x" * 250 + b".csv"):
        if rng.random() < 0.5: open(os.path.join(os.fsencode(at), name), "wb").write(rng.choice([b"", b"x", picture(99), b"{}"]))
    return 99
def swap_contents(rng, d):
    a, b = choose(rng, d), choose(rng, d); x, y = a.read_bytes(), b.read_bytes(); a.write_bytes(y); b.write_bytes(x); return 99

def spots(value, path=()): # where something stands in nested lists and dictionaries
    yield path
    for k, v in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else (): yield from spots(v, (*path, k))
def change(rng, held): # a value, a key or a row of what a file holds
    at = rng.choice([s for s in spots(held) if s] or [()])
    if not at: return rng.choice(ODD)
    parent = held
    for k in at[:-1]: parent = parent[k]
    act = rng.random()
    if act < 0.15: del parent[at[-1]]
    elif act < 0.25 and isinstance(parent, list): parent.insert(at[-1], copy.deepcopy(parent[at[-1]]))
    elif act < 0.3 and isinstance(parent, dict): parent[rng.choice(["x", "", "image", "id", "video", "medchat", "split", "turns"])] = parent.pop(at[-1])
    elif act < 0.35: parent[at[-1]] = [copy.deepcopy(parent[at[-1]])]
    else: parent[at[-1]] = copy.deepcopy(rng.choice(ODD))
    return held
def field(rng, d):
    files = [p for p in files_of(d) if p.suffix in (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".xlsx", ".gz")]
    if not files: return 0
    p = rng.choice(files); k = rng.choice([1, 1, 3])
    if p.suffix == ".json":
        with contextlib.suppress(ValueError): json.loads(p.read_text()); k = 0
        if k: return 0 # changed before, and no JSON since
        text = json.dumps([change(rng, json.loads(p.read_text())) for _ in "x"][0])
        if rng.random() < 0.1: text = re.sub(r'"[^"]{3,}"', lambda m: rng.choice([m[0]] * 5 + ["[" * 50000, "9" * 6000, "1e999", "-Infinity", '"\\ud800"', '{"a":' * 3000]), text, count=3)
        p.write_text(text); return 4
    if p.suffix == ".jsonl": put(p, [change(rng, json.loads(x)) if rng.random() < 0.4 else json.loads(x) for x in p.read_text().splitlines()]); return 99
    if p.suffix == ".parquet":
        import pyarrow.parquet as pq
        held = pq.read_table(p).to_pylist()
        for row in held:
            if rng.random() < 0.5: name = rng.choice(list(row)); row[name] = rng.choice([None, row[name], {"bytes": rng.randbytes(40), "path": "x.png"} if isinstance(row[name], dict) else None, "" if isinstance(row[name], str) else None, "nan" if isinstance(row[name], str) else None])
        if rng.random() < 0.3: name = rng.choice(list(held[0])); held = [{k: v for k, v in r.items() if k != name} for r in held] # a column is missing
        if rng.random() < 0.2: name = rng.choice(list(held[0]) or ["x"]); value = rng.choice([1, 2.5, float("nan"), [1], b"x", True, {"x": 1}]); held = [r | {name: value} for r in held]
        put(p, held); return 4
    if p.suffix == ".xlsx":
        import openpyxl
        book = openpyxl.load_workbook(p); sheet = book.active
        for _ in range(k):
            with contextlib.suppress(Exception): sheet.cell(rng.randint(1, 5), rng.randint(1, 7)).value = rng.choice([v for v in ODD if not isinstance(v, (list, dict))])
        book.save(p); return 99
    opener = gzip.open if p.suffix == ".gz" else open
    with opener(p, "rt", newline="", encoding="utf-8") as f: cells = list(csv.reader(f, delimiter="\t" if p.suffix == ".tsv" else ","))
    for _ in range(k):
        row = rng.choice(cells or [[]]); at = rng.randrange(len(row) or 1); value = str(rng.choice(ODD)).encode("utf-8", "replace").decode()
        act = rng.random()
        if act < 0.15 and row: row.pop(at)
        elif act < 0.3: row.insert(at, value)
        elif act < 0.4: [r.pop(at) for r in cells if len(r) > at]
        elif act < 0.5: cells.insert(rng.randrange(len(cells) + 1), list(row))
        elif row: row[at] = value
    with opener(p, "wt", newline="", encoding="utf-8") as f: csv.writer(f, delimiter="\t" if p.suffix == ".tsv" else ",").writerows(cells)
    return 99 if cells and k else 0 # a wrong header makes all rows other rows

DAMAGE = [truncate, truncate, flip, flip, empty, noise, pointer, nuls, cut_out, twice, spoil_marks, spoil_marks, recode, other_end, gone, folder_for_file, fifo, link, loop, bomb, odd_names, swap_contents] + [field] * 8

# ---- one case
class Hang(BaseException): "A conversion that takes too long."
def on_alarm(*_): raise Hang("20 seconds")
sha = lambda data: hashlib.sha256(data).hexdigest()

def kept(out): # (what was said, sha256 of the pictures) of each row, after looking at the pictures
    found = []
    for part in read_dataset(out).values():
        for r in part:
            shas = [sha(i["bytes"]) for i in r["images"]]
            assert shas == r["image_sha256"], "a picture that is not the one that was checked"
            for i in r["images"]: Image.open(io.BytesIO(i["bytes"])).load()
            assert r["turns"] and all(t["text"].strip() for t in r["turns"]) and [t["role"] for t in r["turns"]] == ["user", "assistant"] * (len(r["turns"]) // 2), "a row without question or answer"
            found.append((tuple(t["text"] for t in r["turns"]), tuple(shas)))
    return found

def run(source, out, format, options):
    "The dataset, or the MedchatError."
    old = signal.signal(signal.SIGALRM, on_alarm); signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        with contextlib.redirect_stdout(io.StringIO()): return convert(source, out, format, max_rejects=1, keep_splits=True, num_proc=1, **options)
    except MedchatError as e: return e
    finally: signal.setitimer(signal.ITIMER_REAL, 0); signal.signal(signal.SIGALRM, old)

def options_of(name, home): return {k: home/v if k == "texts" else v for k, v in MAKERS[name][2].items()}
class Shop:
    "Whole sources, made once, and what they hold."
    def __init__(self, at): self.at, self.made = at, {}
    def whole(self, name):
        if name in self.made: return self.made[name]
        home = self.at/name.replace("/", "-")/"set"; home.mkdir(parents=True)
        source = (MAKERS[name][0](home) or home).relative_to(home)
        out = run(home/source, home.parent/"out", MAKERS[name][1], options_of(name, home))
        assert not isinstance(out, MedchatError), (name, out)
        rows = kept(out); left = (out/"rejects.jsonl").read_text()
        assert rows and not left and len(set(rows)) == len(rows), (name, left)
        self.made[name] = home, source, rows
        return self.made[name]

def one_case(shop, seed, name=None):
    "Damage a source by a seed and convert it; AssertionError or another exception when something is wrong."
    rng = random.Random(seed); name = name or rng.choice(sorted(MAKERS)); format = rng.choice([MAKERS[name][1], MAKERS[name][1], "auto"])
    whole, source, rows = shop.whole(name)
    with tempfile.TemporaryDirectory(dir=shop.at) as tmp:
        tmp = Path(tmp); home = tmp/"set"; shutil.copytree(whole, home); (tmp/"t").mkdir(); (tmp/"o").mkdir()
        may, damages = 0, sorted(rng.sample(DAMAGE, rng.choice([1, 1, 1, 2])), key=lambda f: f is not field) # a field is changed in a whole file
        one_case.said = f"seed {seed}: {name} as {format}: {', '.join(f.__name__ for f in damages)}"
        for damage in damages:
            if any(p.stat().st_size for p in files_of(home)): may += damage(rng, home)
        held = {sha(p.read_bytes()) for p in files_of(home) if p.suffix in PICTURES}
        old, tempfile.tempdir = tempfile.tempdir, str(tmp/"t")
        try: out = run(home/source, tmp/"o"/"out", format, options_of(name, home))
        finally: tempfile.tempdir = old
        left = sorted(p.name for p in (tmp/"o").iterdir()) + sorted(p.name for p in (tmp/"t").iterdir())
        if isinstance(out, MedchatError):
            assert "\n" not in str(out) and 5 < len(str(out)) < 2000 and "fault in medchat" not in str(out), f"said {out}"
            assert left in ([], ["out.rejects.jsonl"]), f"left behind: {left}"
            return "refused"
        assert left == ["out"], f"left behind: {left}"
        report = json.loads((out/"report.json").read_text("utf-8")); now = kept(out)
        rejects = [json.loads(line) for line in (out/"rejects.jsonl").read_bytes().splitlines()]
        assert report["rows"]["in"] == len(now) + len(rejects), f"{report['rows']['in']} in, {len(now)} out, {len(rejects)} rejects"
        assert all(r["where"] and r["why"] and "Traceback" not in r["why"] for r in rejects), rejects
        check_rows(rows, now, held, may, name, report["made"]["format"] == MAKERS[name][1])
        return "converted"

def check_rows(rows, now, held, may, name, same):
    "Each row is one of the whole source, or one whose picture was changed on the disk; all but the few that damage may have changed."
    told = lambda said: said if same and name != "dicom" else said[-1] # another format asks another question; what is asked about a DICOM file goes by its place
    by_said, before = {}, {s for _, shas in rows for s in shas}
    for said, shas in rows: by_said.setdefault(told(said), []).append(shas)
    like = lambda x, y: x == y or x in held - before
    def right(said, shas):
        if name == "study": return any(all(any(like(x, y) for y in b) for x in shas) for b in by_said.get(told(said), ())) # nobody says which pictures a study has
        return any(len(shas) == len(b) and all(map(like, shas, b)) for b in by_said.get(told(said), ()))
    wrong = [r for r in now if not right(*r)]
    assert len(wrong) <= may, f"{len(wrong)} wrong rows, where {may} may be: {str(wrong[:2])[:500]}"

# ---- the tests
@pytest.fixture(scope="module")
def shop(tmp_path_factory): return Shop(tmp_path_factory.mktemp("fuzz"))

def test_every_format_has_a_source(): assert {m[1] for m in MAKERS.values()} == set(known_formats()) - {"hub"}

@pytest.mark.parametrize("name", sorted(MAKERS))
def test_damaged(shop, name):
    for seed in range(int(os.environ.get("FUZZ_CASES", 24))):
        try: one_case(shop, seed, name)
        except BaseException as e: e.add_note(one_case.said) if hasattr(e, "add_note") else None; raise

# ---- the command, and files made to fill a disk or a memory
SAY = "import sys; from medchat.cli import main; c = main(); print(next(int(l.split()[1]) // 1024 for l in open('/proc/self/status') if l.startswith('VmHWM'))); sys.exit(c)" # ru_maxrss would count what the parent had

def command(*argv, cwd):
    "(exit code, the line on stderr, peak memory in MB, seconds) of the command in a process of its own."
    t = time.time(); done = subprocess.run([sys.executable, "-c", SAY, "convert", *map(str, argv)], cwd=cwd, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "TMPDIR": str(cwd)}, text=True, capture_output=True, timeout=60)
    return done.returncode, done.stderr, int(done.stdout.split()[-1]), time.time() - t

def refused(home, *argv):
    code, said, peak, seconds = command(home/"set", "--out", home/"out", *argv, cwd=home)
    assert code == 2 and said.startswith("medchat: ") and said.count("\n") == 1 and "Traceback" not in said and peak < 1000 and seconds < 30, (code, said, peak, seconds)
    assert not set(p.name for p in home.iterdir()) - {"set", "out.rejects.jsonl"}, "something is left"
    return said

def xlsx_bomb(path):
    "A sheet of one text that unpacks to 900 MB."
    put(path, rows()); held = {n: zipfile.ZipFile(path).read(n) for n in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in held.items():
            if not name.endswith("sheet1.xml"): z.writestr(name, data); continue
            with z.open(name, "w", force_zip64=True) as f:
                f.write(b'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData><row r="1"><c r="A1" t="inlineStr"><is><t>')
                for _ in range(900): f.write(b"a" * 1_000_000)
                f.write(b"</t></is></c></row></sheetData></worksheet>")

def test_a_zip_bomb(tmp_path):
    xlsx_bomb(tmp_path/"set"/"train.xlsx")
    assert "too large to unpack" in refused(tmp_path, "--format", "table")

def test_a_gzip_bomb(tmp_path):
    MAKERS["mimic_cxr"][0](tmp_path/"set")
    with gzip.open(tmp_path/"set"/"mimic-cxr-2.0.0-split.csv.gz", "wb", 1) as f:
        for _ in range(600): f.write(bytes(1_000_000))
    assert "too large when it is unpacked" in refused(tmp_path)

@pytest.mark.parametrize("bomb", range(len(BOMBS)))
def test_picture_bombs(shop, tmp_path, bomb):
    whole, source, _ = shop.whole("llava"); home = tmp_path/"set"; shutil.copytree(whole, home)
    for p in home.glob("*.png"): p.write_bytes(BOMBS[bomb])
    t, peak = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert isinstance(out := run(home, tmp_path/"out", "llava", {}), MedchatError) and "3 of 3 rows were rejected" in str(out), out
    assert time.time() - t < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000, "memory"

@pytest.mark.parametrize("name,file,data,says", [("slake", "train.json", LFS, "a Git LFS pointer"), ("slake", "train.json", b'[{"a": 1}, {"b', "not JSON"), ("table/csv", "train.csv", b"image;x\n1;2\n", "which columns"), ("table/xlsx", "train.xlsx", b"PK\3\4", "not an Excel file"),
    ("parquet", "train.parquet", b"PAR1", "not a Parquet file"), ("rocov2", "train_captions.csv", b"number,Caption\n1,2\n", "no column id"), ("records", "records.jsonl", b"\xff\xfe{", "rows were rejected"), ("records", "records.jsonl", b"", "no rows in")])
def test_the_command_says_it_in_one_line(tmp_path, name, file, data, says):
    MAKERS[name][0](tmp_path/"set"); (tmp_path/"set"/file).write_bytes(data)
    assert says in refused(tmp_path, "--format", MAKERS[name][1])

def main():
    "Run new cases for FUZZ_SECONDS, or one case again."
    with tempfile.TemporaryDirectory() as tmp:
        shop = Shop(Path(tmp))
        if len(sys.argv) > 1: print(one_case(shop, int(sys.argv[1]), *sys.argv[2:]), one_case.said); return
        end, seed, seen, counts, slow = time.time() + float(os.environ.get("FUZZ_SECONDS", 60)), int(os.environ.get("FUZZ_SEED", 0)) * 10**6, {}, Counter(), (0, "")
        while time.time() < end:
            seed += 1; t = time.time()
            try: counts[one_case(shop, seed)] += 1
            except KeyboardInterrupt: raise
            except BaseException as e:
                at = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__) if "medchat" in f.filename or "test_fuzz" in f.filename][-1]
                key = f"{type(e).__name__} at {at}"; counts["failed"] += 1; seen.setdefault(key, []).append(f"{one_case.said}: {str(e)[:300]}")
                if len(seen[key]) <= 2: print(key, "|", seen[key][-1], flush=True)
            slow = max(slow, (time.time() - t, one_case.said))
        print(dict(counts), "slowest", slow, "peak MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        for key, cases in seen.items(): print(len(cases), key)

if __name__ == "__main__": main()
