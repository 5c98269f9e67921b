"Studies: DICOM folders, study folders and videos: nothing lost, nobody named."
import io, json, random, re
from collections import Counter
import av, numpy as np, pytest
from hypothesis import given, strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from medchat.core import MedchatError, Record
from medchat.readers import Reject, read_records, recognise
from medchat.studies import find_dicom, hide_folders, identifiers, mask_name, read_video, report_text, spread, study_folders, tag_text, to_bytes, without_metadata

ROOT = "1.2.826.0.1.3680043.10.9999"
SECRETS = ("smithson", "ann marie", "00412-77", "00412", "19500212", "20240229", "9999.5", "a-2024-118", "lovelace")

def read(source, format="dicom", **options): return list(read_records(source, format, **options))
def whys(found): return [x.why for x in found if isinstance(x, Reject)]
def records(found): return [x for x in found if isinstance(x, Record)]
def said(found): return json.dumps([x.to_dict() | {"where": x.where} if isinstance(x, Record) else vars(x) for x in found], ensure_ascii=False).lower()

def film(n=1, study=5, frames=0, modality="CR", **tags):
    "A small complete DICOM data set; the pixels tell which it is."
    rng, ds = np.random.default_rng(n), Dataset()
    pixels = (rng.random(((frames,) if frames else ()) + (24, 32)) * 4000).astype("<u2")
    ds.file_meta = FileMetaDataset(); ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"{ROOT}.{study}", f"{ROOT}.{study}.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ROOT}.{study}.1.{n}"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.StudyDate, ds.AccessionNumber = "Smithson^Ann Marie", "00412-77", "19500212", "20240229", "A-2024-118"
    ds.Modality, ds.BodyPartExamined, ds.ViewPosition, ds.InstanceNumber, ds.SeriesNumber = modality, "CHEST", "PA", n, 1
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 24, 32, 1, "MONOCHROME2", 16, 12, 11, 0
    if frames: ds.NumberOfFrames = frames
    ds.PixelData = pixels.tobytes()
    for k, v in tags.items(): setattr(ds, k, v) if v is not None else delattr(ds, k)
    return ds

def save(path, ds=None, **tags): path.parent.mkdir(parents=True, exist_ok=True); (ds or film(**tags)).save_as(path, enforce_file_format=True); return path

# ---- pictures
@given(st.integers(0, 5000), st.integers(-1, 60))
def test_spread(n, most):
    found = list(spread(n, most))
    assert found == sorted(set(found)) and all(0 <= i < n for i in found) and len(found) == (n if most <= 0 else min(n, most))
    if 1 < most < n: assert (found[0], found[-1]) == (0, n - 1) and max(np.diff(found)) - min(np.diff(found)) <= 1

def test_bytes_hold_nothing_else():
    image = Image.new("L", (9, 9)); image.info.update(comment="Smithson", dpi=(72, 72), exif=b"Exif\0\0x")
    assert to_bytes(image) == to_bytes(Image.new("L", (9, 9))) and Image.open(io.BytesIO(to_bytes(image, "JPEG"))).getexif() == {}

# ---- video
def video(path, seconds=3.0, rate=10, codec="mpeg4", size=(64, 48), pixel="yuv420p"):
    with av.open(str(path), "w") as out:
        s = out.add_stream(codec, rate=rate); s.width, s.height, s.pix_fmt = *size, pixel
        for k in range(round(seconds * rate)):
            a = np.full((size[1], size[0], 3), min(255, 3 * k), np.uint8); a[10:20, k % 40:k % 40 + 10] = 255
            out.mux(s.encode(av.VideoFrame.from_ndarray(a, format="rgb24")))
        out.mux(s.encode())
    return path

@pytest.mark.parametrize("name,codec,pixel", [("a.mp4", "mpeg4", "yuv420p"), ("a.mp4", "libx264", "yuv420p"), ("a.avi", "mjpeg", "yuvj420p"), ("a.avi", "mpeg4", "yuv420p"), ("a.mov", "mpeg4", "yuv420p"), ("a.mkv", "mpeg4", "yuv420p"), ("a.webm", "libvpx-vp9", "yuv420p"), ("a.mpg", "mpeg1video", "yuv420p")])
def test_video_containers(tmp_path, name, codec, pixel):
    try: path = video(tmp_path/name, codec=codec, pixel=pixel, rate=25 if codec == "mpeg1video" else 10)
    except (av.FFmpegError, ValueError): pytest.skip(f"this PyAV cannot write {codec}")
    found = list(read_video(path, 2))
    assert [round(t, 1) for t, _ in found] == [0, 0.5, 1.0, 1.5, 2.0, 2.5] and {(i.mode, i.size) for _, i in found} == {("RGB", (64, 48))}
    levels = [np.asarray(i)[40:, :].mean() for _, i in found]; assert levels == sorted(levels) and levels[-1] > levels[0] + 30

@pytest.mark.parametrize("fps,most,times", [(1, 0, [0, 1, 2]), (0.5, 0, [0, 2]), (0.1, 0, [0]), (10, 3, [0, 1.4, 2.9]), (100, 4, [0, 1.0, 2.0]), (10, 1, [1.4])])
def test_video_rates(tmp_path, fps, most, times):
    found = [t for t, _ in read_video(video(tmp_path/"a.mp4"), fps, most)]
    assert found[:len(times)] == times or len(found) == len(times) and max(abs(a - b) for a, b in zip(found, times)) < 0.11

def test_more_frames_a_second_than_there_are(tmp_path): assert len(list(read_video(video(tmp_path/"a.mp4"), 240))) == 30

@pytest.mark.parametrize("fps", [0, -1, 1000, float("nan"), float("inf")])
def test_rates_that_are_none(tmp_path, fps):
    with pytest.raises(MedchatError, match="frames a second"): list(read_video(tmp_path/"a.mp4", fps))

@pytest.mark.parametrize("name,content,problem", [("a.mp4", b"", "not a video.*empty"), ("a.mp4", b"#EXTM3U\nfile:///etc/passwd\n", "not a video"), ("a.mp4", b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video"), ("a.avi", b"RIFF" + bytes(60), "damaged video"),
    ("a.mp4", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"), ("a.mp4", b"\0\0\0\x20ftypisom" + bytes(200), "damaged video|no picture"), ("b.mkv", b"\x1a\x45\xdf\xa3" + bytes(100), "damaged video|no picture")])
def test_no_videos(tmp_path, name, content, problem):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(MedchatError, match=problem) as e: list(read_video(tmp_path/name))
    assert "\n" not in str(e.value)

def test_wrong_suffix_is_read_by_content(tmp_path): assert len(list(read_video(video(tmp_path/"a.avi", codec="mjpeg", pixel="yuvj420p").rename(tmp_path/"b.mp4")))) == 3

def test_sound_alone(tmp_path):
    with av.open(str(tmp_path/"a.mp4"), "w") as out:
        s = out.add_stream("aac", rate=16000); f = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono"); f.rate = 16000
        out.mux(s.encode(f)); out.mux(s.encode())
    with pytest.raises(MedchatError, match="no picture"): list(read_video(tmp_path/"a.mp4"))

@pytest.mark.parametrize("suffix,codec", [("mp4", "mpeg4"), ("avi", "mjpeg"), ("mkv", "mpeg4")])
def test_damaged_videos_never_crash(tmp_path, suffix, codec):
    whole, rng = video(tmp_path/f"a.{suffix}", codec=codec, pixel="yuvj420p" if codec == "mjpeg" else "yuv420p").read_bytes(), random.Random(0)
    for share in (0.1, 0.5, 0.6): # an end that is missing is found out
        (tmp_path/f"b.{suffix}").write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(MedchatError): list(read_video(tmp_path/f"b.{suffix}"))
    for _ in range(25):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 20])): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path/f"b.{suffix}").write_bytes(data)
        try: assert len(list(read_video(tmp_path/f"b.{suffix}", most=8))) <= 8
        except MedchatError as e: assert "\n" not in str(e)

def test_video_memory_is_bounded(tmp_path, peak_bytes):
    path = video(tmp_path/"a.mp4", seconds=60, size=(320, 240))
    def count(): assert sum(1 for _ in read_video(path, 10)) == 600
    assert peak_bytes(count) < 5_000_000

# ---- names
@pytest.mark.parametrize("name,masked", [("SMITHSON_ANN_MARIE/IM1", "XXXX/IM1"), ("AnnMarie-Smithson.dcm", "XXXX"), ("00412-77/a.dcm", "XXXX/a.dcm"), ("ID0041277.dcm", "IDXXXX.dcm"), ("1950-02-12.dcm", "XXXX.dcm"), ("scan_20240229_1.dcm", "scan_XXXX_1.dcm"),
    (f"{ROOT}.5.1.1.dcm", "XXXX.dcm"), ("goldsmithsonian/a.dcm", "goldsmithsonian/a.dcm"), ("A-2024-118.dcm", "XXXX.dcm"), ("IM0001.dcm", "IM0001.dcm"), ("smithson^ann marie.dcm", "XXXX.dcm")])
def test_names_are_masked(name, masked):
    out = mask_name(name, identifiers(film())); assert not any(s in out.lower() for s in SECRETS if s != "smithson" or "gold" not in out)
    if masked != "XXXX": assert out.replace("XXXX_XXXX", "XXXX") == masked

@given(st.text(max_size=30), st.lists(st.text(max_size=8), max_size=4), st.booleans())
def test_any_name(name, words, strict): assert isinstance(mask_name(name, words, strict), str)

# ---- DICOM
def test_nothing_of_a_patient_gets_out(tmp_path):
    "Identifiers in file names, folders, tags and texts: in no record and in no reject, whatever becomes of the file."
    home = tmp_path/"set"
    save(home/"Smithson_Ann_19500212"/"00412-77_1.dcm", film(1, StudyDescription="Chest of Smithson", OperatorsName="Lovelace^Ada", ImageComments="Ann Marie moved, MRN 00412-77"))
    save(home/"Smithson_Ann_19500212"/f"{ROOT}.5.1.2.dcm", film(2, modality="US")); save(home/"Smithson_Ann_19500212"/"A-2024-118.dcm", film(3, PixelData=None)); save(home/"Smithson_Ann_19500212"/"smithson4.dcm", film(4, PixelData=b"00"))
    whole = (home/"Smithson_Ann_19500212"/"00412-77_1.dcm").read_bytes()
    (home/"Smithson_Ann_19500212"/"smithson_cut.dcm").write_bytes(whole[:len(whole) // 2]); (home/"Smithson_Ann_19500212"/"smithson.dcm").write_bytes(b"none"); save(home/"Smithson_Ann_19500212"/"smithson5.dcm", film(5, Modality="OT"))
    (tmp_path/"t.csv").write_text(f"SOPInstanceUID,question,answer,remark\n{ROOT}.5.1.1,Is Ann Marie Smithson well?,\"Seen 29.02.2024, MRN 00412-77, Dr. Lovelace\",smithson\n{ROOT}.5.1.1,Smithson?,,\n{ROOT}.5.1.4,Smithson?,yes,\n{ROOT}.5.8,Smithson?,yes,\n")
    for options in ({}, {"allow_burned_in": True}, {"texts": tmp_path/"t.csv"}, {"texts": tmp_path/"t.csv", "allow_burned_in": True}):
        found = read(home, **options)
        assert len(found) == 7 + (3 if "texts" in options else 0) - ("texts" in options) and len({x.where for x in found}) == len(found)
        assert not [s for s in SECRETS if s in said(found)], said(found)
        assert all(s not in b.lower() for r in records(found) for b in r.blobs.values() for s in (b"smithson", b"00412"))
    texts = records(read(home, texts=tmp_path/"t.csv"))
    assert len(texts) == 1 and texts[0].meta["masked"] and "XXXX" in texts[0].answer

def test_one_file_one_record(tmp_path):
    save(tmp_path/"b"/"2.dcm", n=2); save(tmp_path/"a"/"1", n=1, PatientID="P2"); (tmp_path/"notes.txt").write_text("x"); (tmp_path/"bad.dcm").write_bytes(b"")
    found = read(tmp_path, shift_key="0123456789abcdef")
    assert [x.where for x in found] == ["bad.dcm[1]", "a/1[2]", "b/2.dcm[3]"] and [r.id for r in records(found)] == ["dicom-2", "dicom-3"]
    a, b = records(found)
    assert a.group != b.group and a.answer == "Computed radiography of the chest, PA view." and a.kind == "vqa" and a.images == list(a.blobs) and a.source == "DICOM" and a.meta["removed"] and "patient" not in a.meta
    assert [x.to_dict() for x in records(read(tmp_path, shift_key="0123456789abcdef"))] == [a.to_dict(), b.to_dict()], "the same secret, the same pseudonyms"
    other = records(read(tmp_path)); assert other[0].group != a.group and other[0].images == a.images
    assert [r.id for r in records(read(tmp_path/"b"/"2.dcm"))] == ["dicom-1"] and recognise(tmp_path)[0] == recognise(tmp_path/"a"/"1")[0] == "dicom"

def test_frames(tmp_path):
    save(tmp_path/"a.dcm", n=1, frames=5)
    count = lambda **k: (r := read(tmp_path, **k)[0]).meta.get("frame", len(r.images))
    assert (count(), count(frames="first"), count(frames="4"), count(frames="all")) == (2, 0, 4, 5)
    assert "no such frame" in whys(read(tmp_path, frames="9"))[0] and "unknown choice" in whys(read(tmp_path, frames="some"))[0]

def test_texts_by_each_key(tmp_path):
    home = tmp_path/"set"
    for n in (1, 2): save(home/f"s{n}"/"same.dcm", n=n, study=n)
    save(home/"s1"/"one.dcm", n=3, study=1)
    def ask(head, *rows): (tmp_path/"t.csv").write_text("\n".join([head, *rows]) + "\n"); return read(home, texts=tmp_path/"t.csv")
    found = ask("SOP_Instance_UID,caption", f"{ROOT}.1.1.1,A", f"{ROOT}.1.1.1,B", f"{ROOT}.9,C")
    assert [(r.id, r.answer, r.kind, r.meta["text"]) for r in records(found)] == [("dicom-2-1", "A", "caption", "t.csv[1]"), ("dicom-2-2", "B", "caption", "t.csv[2]")]
    assert whys(found) == ["no text for this image", "no text for this image", "no DICOM file has this SOPInstanceUID"]
    found = ask("file,report", "one.dcm,O", "same.dcm,S", "s2\\same.dcm,T", "./nowhere.dcm,N")
    assert [(r.where, r.answer) for r in records(found)] == [("s1/one.dcm[1]", "O"), ("s2/same.dcm[3]", "T")] and whys(found) == ["no text for this image", "no DICOM file has this name", "no DICOM file has this name"]
    found = ask("StudyInstanceUID,report", f"{ROOT}.1,R", f"{ROOT}.9,C")
    assert [(r.id, r.answer, len(r.images), r.meta["files"]) for r in records(found)] == [("study-1", "R", 2, 2)] and whys(found) == ["no text for this study (1 files)", "no DICOM file has this StudyInstanceUID"]
    found = ask("file,question,answer", "one.dcm,Q?,", "one.dcm,,A", "same.dcm,Q?")
    assert Counter(w.split(" (")[0] for w in whys(found)) == {"empty answer": 1, "empty question": 1, "no text for this image": 2, "2 cells where 3 columns are": 1}

@pytest.mark.parametrize("head,problem", [("a,report", "no column SOPInstanceUID.*Its columns: a, report"), ("file,x", "which columns")])
def test_bad_tables_of_texts(tmp_path, head, problem):
    save(tmp_path/"a.dcm"); (tmp_path/"t.csv").write_text(f"{head}\n1,2\n")
    with pytest.raises(MedchatError, match=problem): read(tmp_path, texts=tmp_path/"t.csv")
    with pytest.raises(MedchatError, match="no such table"): read(tmp_path, texts=tmp_path/"no.csv")

def test_a_study_is_in_order_and_at_most_16(tmp_path):
    for n in range(1, 41): save(tmp_path/"set"/f"{(n * 7) % 41:03}.dcm", n=n)
    save(tmp_path/"set"/"us.dcm", n=99, modality="US", InstanceNumber=0)
    (tmp_path/"t.csv").write_text(f"StudyInstanceUID,report\n{ROOT}.5,R\n")
    found = read(tmp_path/"set", texts=tmp_path/"t.csv"); (r,) = records(found)
    assert len(r.images) == len(r.meta["pictures"]) == 15 and r.meta["files"] == 41 and whys(found) == ["text may be burned into the picture: modality US: ultrasound"]
    first = records(read(tmp_path/"set"/f"{(40 * 7) % 41:03}.dcm"))[0]; assert r.images[-1] == first.images[0]

def test_dicomdir_names_what_is_missing(tmp_path):
    from pydicom.fileset import FileSet
    fs = FileSet()
    for n in (1, 2): fs.add(film(n, SpecificCharacterSet="ISO_IR 6", PatientSex="F", StudyTime="1", StudyID="1", SeriesNumber=1))
    fs.write(tmp_path/"cd"); files = [p for p, _ in find_dicom(tmp_path/"cd"/"DICOMDIR")]; assert len(files) == 2
    files[0].unlink()
    for source in (tmp_path/"cd", tmp_path/"cd"/"DICOMDIR"):
        found = read(source); assert len(records(found)) == 1 and whys(found) == ["the DICOMDIR names it, but it is not there"] and not [s for s in SECRETS if s in said(found)]

def test_links_out_of_the_folder(tmp_path):
    save(tmp_path/"out.dcm"); (tmp_path/"set").mkdir(); (tmp_path/"set"/"a.dcm").symlink_to(tmp_path/"out.dcm"); save(tmp_path/"set"/"b.dcm", n=2)
    assert [type(x).__name__ for x in read(tmp_path/"set")] == ["Reject", "Record"]

def test_no_dicom_at_all(tmp_path):
    (tmp_path/"a.txt").write_text("x")
    with pytest.raises(MedchatError, match="no DICOM files in"): read(tmp_path)
    with pytest.raises(MedchatError, match="shift key is too short"): read(tmp_path, shift_key="short")

def test_damaged_dicom_is_a_record_or_a_reject(tmp_path):
    whole, rng = save(tmp_path/"whole", n=1).read_bytes(), random.Random(1)
    for k in range(60):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 8])): data[rng.randrange(132, 1000)] ^= 1 << rng.randrange(8)
        (tmp_path/"set").mkdir(exist_ok=True); (tmp_path/"set"/f"{k:02}.dcm").write_bytes(data if k % 3 else data[:rng.randrange(len(data))])
    found = read(tmp_path/"set")
    assert len(found) == 60 and all("\n" not in w for w in whys(found)) and len(records(found)) > 5

@pytest.mark.parametrize("facts,answer", [({}, None), ({"modality": "SC"}, None), ({"modality": "ct", "body_part": "head"}, "Computed tomography of the head."), ({"modality": "MG", "body_part": "BREAST", "view": "MLO"}, "Mammography of the breast, medio-lateral oblique view."),
    ({"modality": "CT", "body_part": "XXXX"}, "Computed tomography."), ({"modality": "CT", "body_part": "Mr. 7"}, "Computed tomography."), ({"modality": "DX", "body_part": "CHEST", "view": "weird"}, "Digital radiography of the chest.")])
def test_tag_text(facts, answer): assert tag_text(facts).get("answer") == answer

def test_every_real_file_is_accounted_for(real_data):
    home = real_data/"dicom"/"pydicom"; found = read(home)
    assert len(found) == 110 and len({x.where for x in found}) == 110 and all("\n" not in w and "Traceback" not in w for w in whys(found))
    rejected = {x.where.rpartition("[")[0]: x.why for x in found if isinstance(x, Reject)}
    assert "truncated" in rejected["MR_truncated.dcm"] and "truncated" in rejected["rtplan_truncated.dcm"] and "no pixels" in rejected["rtplan.dcm"] and "burned" in rejected["examples_rgb_color.dcm"] and rejected["meta_missing_tsyntax.dcm"]
    assert len(records(found)) >= 42 and sum("burned into" in w for w in rejected.values()) >= 35
    assert len(records(read(home, allow_burned_in=True))) > len(records(found))
    for name in ("DICOMDIR", "DICOMDIR-bigEnd", "DICOMDIR-implicit", "DICOMDIR-nooffset", "DICOMDIR-nopatient", "DICOMDIR-reordered"): assert len(records(read(home/"dicomdirtests"/name))) == 31
    assert len(records(read(home/"dicomdirtests"))) == 31 and len({r.group for r in records(read(home/"dicomdirtests"))}) == 2

# ---- study folders
def make(folder, files):
    for name, content in files.items():
        path = folder/name; path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"): Image.new("L", (8, 8), content).save(path)
        elif path.suffix in (".mp4", ".avi") and not isinstance(content, bytes): video(path, **content)
        else: path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode())
    return folder

def test_study_folders(tmp_path):
    make(tmp_path, {"a/report.txt": "A.", "a/10.png": 1, "a/2.png": 2, "a/more/1.jpg": 3, "b/Report.JSON": {"findings": "F", "impression": "I"}, "b/x.mp4": dict(seconds=40, rate=2), "b/still.png": 5, "c/deep/report.md": "C.", "c/deep/1.png": 4, "d/1.png": 1, "e/report.txt": "E.",
        "f/report.txt": "", "f/1.png": 1, "g/report.txt": b"\xff\xfe\xfa", "g/1.png": 1, "h/report.json": "{", "h/1.png": 1, "i/report.json": [], "i/1.png": 1, "j/report.txt": "J", "j/x.mp4": b"\0\0\0\x20ftypisom" + bytes(90), "k/report.txt": "K", "k/1.dcm": b"x",
        "test/l/report.txt": "L", "test/l/1.png": 1, "m/report.txt": "x" * (1 << 21), "m/1.png": 1, "empty/readme.md": "x", "n/report.txt": "N", "n/report.json": {}, "n/1.png": 1, ".git/report.txt": "x"})
    found = read(tmp_path, "study")
    got = {x.where: (x.answer, len(x.images), x.kind, x.split) if isinstance(x, Record) else x.why for x in found}
    want = [("A.", 3, "report", None), ("Findings: F\nImpression: I", 17, "report", None), ("C.", 1, "report", None), "no report.txt, report.md or report.json beside these pictures", "no image or video", "empty report", "not UTF-8 text",
        "not JSON", "the report is list, not an object", "damaged video: video 1", "no image or video: it holds DICOM, so read it with --format dicom --texts", "a report of 2,097,152 bytes", "two reports: report.json, report.txt", ("L", 1, "report", "test")]
    assert got.pop("study[10]").startswith(want.pop(9)) and list(got.values()) == want and list(got) == [f"study[{n}]" for n in range(1, 15) if n != 10]
    assert [p.relative_to(tmp_path).as_posix() for p, _ in study_folders(tmp_path)] == ["a", "b", "c/deep", "d", "e", "f", "g", "h", "i", "j", "k", "m", "n", "test/l"]
    a, b = found[0], found[1]
    assert a.images == list(a.blobs) and a.group == a.id == "study-1" and a.meta["stills"] == 3 and [Image.open(io.BytesIO(d)).getpixel((0, 0)) for d in a.blobs.values()] == [2, 1, 3] # 2.png before 10.png
    assert len(b.blobs) == 17 and [f["seconds"] for f in b.meta["frames"]][:2] == [0, 3.0] and b.meta["frames"][-1] == {"video": 1, "seconds": 39} and b.meta["report"] == {"findings": "F", "impression": "I"}
    assert recognise(tmp_path)[0] == recognise(tmp_path/"a")[0] == recognise(tmp_path/"c")[0] == "study"
    assert [r.id for r in read(tmp_path/"a", "study")] == ["study-1"]

def test_study_frames(tmp_path):
    make(tmp_path, {"a/report.txt": "A.", "a/x.mp4": dict(seconds=20, rate=2)})
    count = lambda **k: len(read(tmp_path, "study", **k)[0].images)
    assert (count(), count(frames="all"), count(frames="4"), count(frames="middle"), count(frames="first"), count(fps=0.1), count(frames="all", fps=2.0)) == (16, 20, 4, 1, 1, 2, 40)
    for bad in ({"frames": "some"}, {"frames": "0"}, {"fps": 0.0}):
        with pytest.raises(MedchatError): read(tmp_path, "study", **bad)

def test_study_reports_name_nobody(tmp_path):
    report = {"PatientName": "Smithson, Ann Marie", "patient_id": "00412-77", "DOB": "1950-02-12", "findings": "Ann Marie Smithson has a polyp (ID 00412-77).", "conclusion": "Polyp. Dr. Lovelace", "examiner": None}
    make(tmp_path, {"1/report.json": report, "1/1.png": 1, "2/report.json": report | {"findings": "None."}, "2/1.png": 2, "3/report.json": {"patient": {"name": "Roe, Jo", "id": 7}, "text": "Jo Roe is well."}, "3/1.png": 3, "smithson_00412-77/report.json": report, "smithson_00412-77/1.png": 4})
    found = read(tmp_path, "study"); a, b, c, d = found
    assert not [s for s in SECRETS[:4] if s in json.dumps([r.to_dict() for r in (a, b, c)]).lower()] and "roe" not in c.answer.lower()
    assert a.group == b.group == d.group == "patient-1" and c.group == "patient-2" and "polyp" in a.answer.lower()

def test_links_and_pointers_in_studies(tmp_path):
    (tmp_path/"secret.txt").write_text("secret"); make(tmp_path/"set", {"a/1.png": 1, "b/report.txt": "B", "c/report.txt": "version https://git-lfs.github.com/spec/v1\n", "c/1.png": 2}); video(tmp_path/"out.mp4")
    (tmp_path/"set"/"a"/"report.txt").symlink_to(tmp_path/"secret.txt"); (tmp_path/"set"/"b"/"x.mp4").symlink_to(tmp_path/"out.mp4")
    assert [w.split(":")[0] for w in whys(read(tmp_path/"set", "study"))] == ["image is a link out of the source folder", "image is a link out of the source folder", "a Git LFS pointer, not a report"]

def test_pipes_and_folders_are_no_files(tmp_path):
    "A pipe would wait for ever."
    import os
    save(tmp_path/"d"/"a.dcm"); os.mkfifo(tmp_path/"d"/"b.dcm"); make(tmp_path/"s", {"a/report.txt": "A.", "a/1.png": 1, "b/1.png": 2, "c/report.txt": "C.", "e/report.txt": "12", "e/1.png": 3})
    os.mkfifo(tmp_path/"s"/"a"/"2.png"); os.mkfifo(tmp_path/"s"/"b"/"report.txt"); os.mkfifo(tmp_path/"s"/"c"/"x.mp4")
    assert whys(read(tmp_path/"d")) == ["it holds no DICOM image"] and whys(read(tmp_path/"s", "study")) == ["not a file", "not a file", "not a file", "a report without words"]
    with pytest.raises(MedchatError, match="not a file"): list(read_video(tmp_path/"s"/"c"/"x.mp4"))
    with pytest.raises(MedchatError, match="not a file"): read(tmp_path/"d"/"b.dcm")

def test_names_in_no_encoding(tmp_path):
    import os
    (tmp_path/"s").mkdir()
    for n in (1, 2): os.rename(save(tmp_path/"s"/"x.dcm", n=n), os.path.join(os.fsencode(tmp_path/"s"), b"\xff%d.dcm" % n))
    for by, key in (("StudyInstanceUID", f"{ROOT}.5"), ("file", "x.dcm"), ("SOPInstanceUID", f"{ROOT}.5.1.1")):
        (tmp_path/"t.csv").write_text(f"{by},report\n{key},R\n"); found = read(tmp_path/"s", texts=tmp_path/"t.csv")
        assert found and all("\n" not in w for w in whys(found)) and len(records(found)) == (by != "file")
    assert len(read(tmp_path/"s")) == 2

def test_no_studies(tmp_path):
    for source, problem in ((tmp_path, "no studies in"), (make(tmp_path, {"x.bin": b"x"})/"x.bin", "not a folder")):
        with pytest.raises(MedchatError, match=problem): read(source, "study")

@pytest.mark.parametrize("key,kept", [("findings", True), ("patientHistory", True), ("organ_name", True), ("Patient Name", False), ("patient_id", False), ("MRN", False), ("dateOfBirth", True), ("birthDate", False), ("exam date", False), ("reported_by", False), ("Endoscopist", False),
    ("endoscopist_name", False), ("last_name", False), ("polyp_number", True), ("case_id", False), ("accessionNumber", False), ("impression", True), ("studyUid", False), ("patient_position", True)])
def test_which_fields_name_somebody(key, kept):
    assert bool(report_text({key: "Value"})[1]) == (kept and key != "dateOfBirth")

def test_study_folder_names(tmp_path):
    make(tmp_path, {"2024-02-29_00412771/report.txt": "A.", "2024-02-29_00412771/1.png": 1, "2024-02-29_00412772/report.txt": "B.", "2024-02-29_00412772/1.png": 2, "case 7/report.txt": "C.", "case 7/1.png": 3})
    found = read(tmp_path, "study")
    assert len({r.id for r in found}) == len({r.group for r in found}) == 3 and not any("004127" in said([r]) or "case" in r.id + r.group for r in found)

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3), max_leaves=8)
@given(st.dictionaries(st.sampled_from(["findings", "Impression", "patientName", "patient", "x", "recommendations", "date", "clinicalHistory", ""]), values, max_size=8))
def test_any_report(held):
    text, fields, who, number = report_text(held)
    assert isinstance(text, str) and not {"patientName", "patient", "date"} & set(fields)

# ---- pictures that others have written
def noted(suffix, mode="RGB", side=1, seed=1, **how):
    from PIL.PngImagePlugin import PngInfo
    out, exif, notes = io.BytesIO(), Image.Exif(), PngInfo(); exif[274], exif[270] = side, "Ann Smith"; notes.add_itxt("Comment", "Ann Smith")
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3)).astype(np.uint8)).convert(mode)
    image.save(out, suffix, exif=exif, **how, **({"comment": b"Ann Smith"} if suffix in ("JPEG", "GIF") else {"pnginfo": notes} if suffix == "PNG" else {}))
    return out.getvalue()

@pytest.mark.parametrize("suffix,mode,how", [("JPEG", "RGB", {}), ("JPEG", "L", {"progressive": True}), ("JPEG", "RGB", {"progressive": True, "quality": 30}), ("JPEG", "CMYK", {}), ("JPEG", "RGB", {"restart_marker_blocks": 1}), ("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "LA", {}),
    ("PNG", "I;16", {}), ("PNG", "1", {}), ("WEBP", "RGB", {}), ("TIFF", "RGB", {}), ("TIFF", "I;16", {}), ("GIF", "P", {})])
@pytest.mark.parametrize("side", [1, 3, 6])
def test_pictures_without_their_notes(suffix, mode, how, side):
    from medchat.images import to_rgb
    if mode == "I;16":
        out, exif = io.BytesIO(), Image.Exif(); exif[274], exif[270] = side, "Ann Smith"
        Image.fromarray((np.arange(600).reshape(20, 30) * 90).astype(np.uint16)).save(out, suffix, exif=exif); before = out.getvalue()
    else: before = noted(suffix, mode, side, **how)
    after = without_metadata(before + b"Ann Smith")
    assert b"Ann Smith" not in after and without_metadata(after) == after
    assert np.array_equal(np.asarray(to_rgb(Image.open(io.BytesIO(after)))), np.asarray(to_rgb(Image.open(io.BytesIO(before)))))

def test_damaged_pictures_end_in_a_line():
    rng = random.Random(2)
    for whole in (noted("JPEG", progressive=True), noted("PNG", "P"), noted("TIFF"), noted("WEBP")):
        for k in range(60):
            data = bytearray(whole); n = rng.randrange(len(data))
            data = data[:n] if k % 2 else data[:n] + bytes([rng.randrange(256)]) + data[n + 1:]
            try: without_metadata(bytes(data))
            except MedchatError as e: assert "\n" not in str(e)

@pytest.mark.parametrize("name,hidden", [("a.dcm", "a.dcm"), ("Smith_Ann/IM1", "XXXX/IM1"), ("Li-Wei/li_3.dcm", "XXXX/XXXX_3.dcm"), ("series 3/ct_chest/IM0004", "series 3/ct_chest/IM0004"), ("98/CT5N/2062", "98/CT5N/2062"), ("Søren/x/søren.dcm", "XXXX/x/XXXX.dcm"), ("smithson/smithsonian.dcm", "XXXX/smithsonian.dcm"), ("", "")])
def test_folders_are_hidden(name, hidden): assert hide_folders(name) == hidden

@given(st.text(max_size=30))
def test_any_folder(name): assert hide_folders(name).count("/") == name.count("/")

# ---- from one end to the other: what stands in a dataset folder
PEOPLE = [("Brannigan", "Adelheid", "77120-4", "19410307"), ("Castellanos", "Dmitri", "MC558102", "19620918"), ("Eskildsen", "Ottoline", "00934.12", "19550721"), ("Fairweather", "Percival", "8841207", "19300215"), ("Kowalczyk", "Rosalind", "K-20117", "19981130")]
PLANTED = ["Okonkwo", "Mount Ararat", "14 Juniper Road", "(555) 014-7788", "CASTLE7", "R4471902", "Lindqvist"]

def archive(home):
    "32 files of five patients in ten kinds, with identifiers in tags, names and folders; the strings that must not get out."
    gone = [*PLANTED]
    for n in range(32):
        family, given, number, born = PEOPLE[n % 5]; study, when = 100 + n // 2 * 2 + n % 5 * 1000, f"2021{n % 12 + 1:02}{n % 27 + 1:02}"
        modality = ("CR", "CT", "MR", "MG", "PT", "NM", "XA", "RF", "US", "OT")[n % 10]
        ds = film(n + 1, study, modality=modality, frames=3 if modality == "XA" else 0, PatientName=f"{family}^{given}", PatientID=number, PatientBirthDate=born, StudyDate=when, SeriesDate=when, AccessionNumber="R4471902", InstitutionName="Mount Ararat Hospital",
            ReferringPhysicianName="Okonkwo^Ada", PatientAddress="14 Juniper Road", PatientTelephoneNumbers="(555) 014-7788", StationName="CASTLE7", StudyDescription=f"CHEST {family} {when}", ImageComments=f"{given} {family}, MRN {number}, read by Dr. Lindqvist", OperatorsName="Lindqvist^Per")
        ds.private_block(0x0009, "ACME", create=True).add_new(1, "LO", f"{family} private")
        path = save(home/f"{family}_{given}"/f"study {when}"/(f"{family}{n}_{number}.dcm", f"{ds.SOPInstanceUID}", f"IM{n:04}", f"{given[0]}{family}_{born}_{n}.dcm")[n % 4], ds)
        gone += [family, number, born, when, f"{when[:4]}-{when[4:6]}-{when[6:]}", str(ds.StudyInstanceUID), str(ds.SOPInstanceUID), path.name if n % 4 != 2 else family, path.parent.name, given]
    whole = path.read_bytes()
    (path.parent/f"{family}_cut.dcm").write_bytes(whole[:len(whole) // 2]); (path.parent/f"{family}.dcm").write_bytes(b"none"); gone += [f"{family}_cut"]
    with open(home.parent/"texts.csv", "w") as f:
        f.write("StudyInstanceUID,report,ward\n")
        for n in range(0, 32, 3): f.write(f"{ROOT}.{100 + n // 2 * 2 + n % 5 * 1000},\"{PEOPLE[n % 5][1]} {PEOPLE[n % 5][0]} (MRN {PEOPLE[n % 5][2]}) was seen by Dr. Okonkwo. Film {n} is clear.\",CASTLE7\n")
        f.write(f"{ROOT}.99999,Brannigan is well.,CASTLE7\n")
    return sorted(set(gone), key=len, reverse=True)

def everything(out): # every byte of a dataset folder, and the names of its files; the pictures of rows apart
    from datasets import load_from_disk
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    return files, [row for split in load_from_disk(str(out)).values() for row in split.cast_column("images", __import__("datasets").List(__import__("datasets").Image(decode=False)))]

def chunks(png): # the kinds of a PNG's chunks
    at, kinds = 8, []
    while at < len(png): kinds.append(png[at + 4:at + 8]); at += 12 + int.from_bytes(png[at:at + 4], "big")
    return kinds

def nothing_of(gone, files):
    for name, data in files.items():
        low = name.encode().lower() + b"\n" + data.lower()
        assert not [g for g in gone if g.lower().encode() in low], (name, [g for g in gone if g.lower().encode() in low])

@pytest.mark.parametrize("options", [{}, {"allow_burned_in": True, "frames": "all"}, {"texts": "texts.csv", "allow_burned_in": True}])
def test_an_archive_from_end_to_end(tmp_path, options):
    from medchat.curate import convert
    gone, key = archive(tmp_path/"set"), "0123456789abcdef"
    if "texts" in options: options = options | {"texts": tmp_path/"texts.csv"}
    out = convert(tmp_path/"set", tmp_path/"out", "dicom", max_rejects=1, shares="60/20/20", shift_key=key, **options)
    files, rows = everything(out)
    nothing_of([*gone, key, key[::-1]], files)
    assert len(rows) >= 10 and {"report.md", "report.json", "images.jsonl", "splits.json", "rejects.jsonl"} <= set(files) and any(n.endswith(".arrow") for n in files)
    splits = {}
    for row in rows:
        assert all(re.fullmatch(r"images/[0-9a-f]{24}\.png", p) for p in row["image_paths"]) and re.fullmatch("P-[0-9A-F]{12}", row["group"])
        assert all(set(chunks(i["bytes"])) == {b"IHDR", b"IDAT", b"IEND"} for i in row["images"]) and json.loads(row["meta"])["removed"]["private removed"] > 0
        splits.setdefault(row["group"], set()).add(row["split"])
    assert len(splits) >= 4 and all(len(s) == 1 for s in splits.values()) and len(set.union(*splits.values())) == 3
    report = json.loads(files["report.json"]); page = files["report.md"].decode()
    assert "## De-identification" in page and all(f"| {what} | {report['removed'][what]:,} |" in page for what in ("private removed", "uids mapped", "dates shifted", "names and ids replaced", "texts masked"))
    assert report["rows"]["in"] == sum(1 for _ in (out/"rejects.jsonl").open()) + len(rows)

def test_the_same_key_gives_the_same_bytes(tmp_path):
    from medchat.curate import convert
    archive(tmp_path/"set"); tree = lambda out: everything(out)[0]
    convert(tmp_path/"set", tmp_path/"a", "dicom", max_rejects=1, shares="60/20/20", shift_key="0123456789abcdef"); convert(tmp_path/"set", tmp_path/"b", "dicom", max_rejects=1, shares="60/20/20", shift_key="0123456789abcdef")
    a, b = tree(tmp_path/"a"), tree(tmp_path/"b")
    assert list(a) == list(b) and [n for n in a if a[n] != b[n]] == []
    convert(tmp_path/"set", tmp_path/"c", "dicom", max_rejects=1, shares="60/20/20"); convert(tmp_path/"set", tmp_path/"d", "dicom", max_rejects=1, shares="60/20/20")
    groups = [{r["group"] for r in everything(tmp_path/n)[1]} for n in "acd"]
    assert [len(g) for g in groups] == [5] * 3 and not groups[0] & groups[1] and not groups[1] & groups[2], "without it everybody gets another name each time"

def test_the_samples_from_end_to_end(tmp_path):
    from medchat.core import sample_data
    from medchat.curate import convert
    files, rows = everything(convert(sample_data()/"dicom", tmp_path/"out", "dicom", allow_burned_in=True, shares="70/30"))
    nothing_of(["Sample^Ada", "Ada", "SA-100", "Example^Bo", "Muster", "19540312", "20240229", "1.2.826.0", "29.02.2024", "film1", "palette.dcm"], files)
    assert len(rows) == 6 and len({r["group"] for r in rows}) == 3

def test_study_folders_from_end_to_end(tmp_path):
    from medchat.curate import convert
    for n in range(12):
        family, given, number, born = PEOPLE[n % 5]; folder = tmp_path/"set"/f"{family}_{given}_{born}"/f"visit_{number}_{n}"; folder.mkdir(parents=True)
        (folder/f"{family}_{n}.jpg").write_bytes(noted("JPEG", side=6, seed=n).replace(b"Ann Smith", family[:9].ljust(9).encode())); Image.effect_noise((40 + n, 30), 60).save(folder/f"{given}.png")
        if n == 3: video(folder/f"{family}.mp4", seconds=2)
        if n % 2: (folder/"report.json").write_text(json.dumps({"patient_name": f"{given} {family}", "patient_id": number, "findings": f"{family} has a polyp, case {n}.", "exam_date": born}))
        else: (folder/"report.txt").write_text(f"Patient: {family}, {given}\nMRN {number}, DOB {born}. A polyp, case {n}. Dr. Okonkwo")
    (folder/"report.md").write_text("another"); (tmp_path/"set"/"Fairweather_P").mkdir(); (tmp_path/"set"/"Fairweather_P"/"Fairweather.png").write_bytes(b"none")
    out = convert(tmp_path/"set", tmp_path/"out", "study", max_rejects=1, shares="60/20/20"); files, rows = everything(out)
    nothing_of([x for p in PEOPLE for x in p] + ["Okonkwo", "visit_"], files)
    assert len(rows) == 11 and all(re.fullmatch(r"images/[0-9a-f]{24}\.(png|jpg)", p) for r in rows for p in r["image_paths"]) and all(re.fullmatch(r"(study|patient)-\d+", r["group"]) for r in rows)
    seen = {}
    for r in rows: seen.setdefault(r["group"], set()).add(r["split"])
    assert all(len(s) == 1 for s in seen.values())
