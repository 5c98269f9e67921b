"Uploads: real DICOM files, files that are not what they say, and bombs in a process whose memory is watched."
import copy, gzip, io, json, os, re, struct, subprocess, sys, zipfile, zlib
from pathlib import Path
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from medchat.core import MedchatError, sample_data
from medchat.dicom import dicom_files, quietly, read_dicom, to_frames
from medchat.images import load_image
from medchat.scan import MAX_DICOM_BYTES, MAX_FRAMES, MAX_IMAGE_BYTES, image_hash, open_upload

root = Path(__file__).resolve().parent.parent
film = sample_data()/"phantoms"/"images"/"p0001.png"
slice_ = sample_data()/"dicom"/"slice"

def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
def png(width, height, *more): return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + b"".join(more) + chunk(b"IDAT", zlib.compress(bytes(3000))) + chunk(b"IEND", b"")

def make_dicom(path, pixels, **elements):
    "A grey or RGB DICOM file (array of frames x rows x columns, or with colours) with a patient in it."
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian
    ds, colour = Dataset(), pixels.ndim == 4
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.826.0.1.3680043.8.498.7"
    ds.Modality, ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.StudyDescription = "CT", "ROE^JANE", "MRN99887766", "19610312", "Chest of Jane Roe"
    ds.NumberOfFrames, ds.Rows, ds.Columns, ds.SamplesPerPixel = pixels.shape[0], pixels.shape[1], pixels.shape[2], 3 if colour else 1
    ds.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour: ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = pixels.itemsize * 8
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes()
    with quietly():
        for k, v in elements.items(): setattr(ds, k, v)
        ds.save_as(path, enforce_file_format=True)
    return path

ramp = np.arange(64 * 64, dtype=np.int16).reshape(1, 64, 64)

# --- images

@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "JPEG2000", "PPM"])
def test_formats_are_known_by_content(tmp_path, kind):
    load_image(film).save(tmp_path/"Roe.exe", kind)
    scan = open_upload(tmp_path/"Roe.exe")
    assert (scan.frames, scan.modality, scan.window, scan.window_range, scan.removed, scan.notes) == (1, "", None, None, 0, [])
    assert scan.view().tobytes() == load_image(tmp_path/"Roe.exe").tobytes() and "Roe" not in f"{vars(scan)} {scan}"

def test_sliders_do_nothing_to_a_plain_picture_but_inverting_does(tmp_path):
    scan = open_upload(film)
    assert scan.view(level=10, width=5).tobytes() == scan.view().tobytes() == load_image(film).tobytes()
    assert (np.asarray(scan.view(invert=True)) == 255 - np.asarray(scan.view())).all() and scan.view(invert=False).tobytes() == scan.view().tobytes()

def test_a_view_is_a_copy():
    scan = open_upload(film)
    before = image_hash(scan.view())
    scan.view().paste((255, 0, 0), (0, 0, 50, 50))
    assert image_hash(scan.view()) == before

@pytest.mark.parametrize("kind,suffix", [("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif")])
def test_of_many_pictures_the_first(tmp_path, kind, suffix):
    pages = [Image.new("RGB", (20, 10), (40 * i, 0, 0)) for i in range(5)]
    pages[0].save(tmp_path/f"a.{suffix}", kind, save_all=True, append_images=pages[1:])
    scan = open_upload(tmp_path/f"a.{suffix}")
    assert scan.frames == 1 and scan.notes == ["The file has several pictures; only the first is shown."] and scan.view().getpixel((5, 5))[0] < 20

def test_an_animation_is_read_no_further_than_its_second_picture(tmp_path, monkeypatch):
    from PIL import GifImagePlugin
    pages = [Image.new("L", (64, 48), i % 256) for i in range(400)]
    pages[0].save(tmp_path/"half-an-hour.gif", save_all=True, append_images=pages[1:], duration=4500)
    seen, seek = [], GifImagePlugin.GifImageFile._seek
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "_seek", lambda self, frame, *a, **k: (seen.append(frame), seek(self, frame, *a, **k))[1])
    assert open_upload(tmp_path/"half-an-hour.gif").notes and seen and max(seen) <= 1

def test_the_hash_is_of_what_the_model_sees(tmp_path):
    image = load_image(film)
    image.save(tmp_path/"a.png"); image.save(tmp_path/"b.bmp")
    assert image_hash(open_upload(tmp_path/"a.png").view()) == image_hash(open_upload(tmp_path/"b.bmp").view()) == image_hash(image)
    assert image_hash(Image.new("RGB", (4, 9))) != image_hash(Image.new("RGB", (9, 4))) and image_hash(Image.new("L", (4, 9))) == image_hash(Image.new("RGB", (4, 9)))
    assert image_hash(open_upload(tmp_path/"a.png").view(invert=True)) != image_hash(image)

# --- DICOM

def test_every_sample_looks_as_in_training():
    for path in dicom_files(sample_data()/"dicom"):
        scan, total = open_upload(path), next(to_frames(read_dicom(path), 0))[2]["frames"]
        assert scan.frames == total
        for i in range(total): assert scan.view(i).tobytes() == load_image(next(to_frames(read_dicom(path), i))[1]).tobytes(), (path.name, i)

def test_real_files_look_as_in_training_and_turn_as_their_own_window(real_data):
    opened = 0
    for path in sorted(p for p in (real_data/"dicom").rglob("*") if p.is_file()):
        try: scan = open_upload(path)
        except MedchatError as e: assert path.name in str(e) and str(path.parent) not in str(e) and "\n" not in str(e); continue
        opened += 1
        original = read_dicom(path)
        assert scan.view().tobytes() == load_image(next(to_frames(original, 0))[1]).tobytes(), path
        if scan.window:
            level, width = scan.window
            assert np.abs(np.asarray(scan.view(), int) - np.asarray(scan.view(level=level, width=width), int)).max() <= 1, path
            (low, high), (least, most) = scan.window_range["level"], scan.window_range["width"]
            assert low <= level <= high and 0 < least <= width <= most
        name = str(original.get("PatientName") or "")
        if len(name) > 3: assert name not in f"{scan._dataset} {vars(scan)}", path
    assert opened > 50

def test_pydicoms_own_files_open_or_say_why():
    from pydicom.data import DATA_ROOT
    files, opened = sorted((Path(DATA_ROOT)/"test_files").glob("*.dcm")), 0
    for path in files:
        try: opened += bool(open_upload(path).view().size)
        except MedchatError as e: assert path.name in str(e)
    assert opened > len(files) / 3 > 5

def test_nothing_in_a_scan_says_whose_it_is(tmp_path):
    path = make_dicom(tmp_path/"Roe Jane 1961.dcm", ramp, InstitutionName="St. Elsewhere", ImageComments="Jane Roe, MRN99887766, born 12/03/1961", ReferringPhysicianName="POE^ALAN")
    scan = open_upload(path)
    import pickle
    scan.view()
    held = f"{scan} {scan._dataset} {scan._dataset.file_meta} { {k: v for k, v in vars(scan).items() if k != '_lock'} }".encode() + pickle.dumps(scan._dataset.to_json())
    for word in (b"Roe", b"ROE", b"Jane", b"JANE", b"MRN99887766", b"19610312", b"Elsewhere", b"POE", b"1.2.826.0.1", str(tmp_path).encode()): assert word not in held, word
    assert scan.removed >= 8 and scan.modality == "CT"

@pytest.mark.parametrize("said,shown", [("CT", "CT"), ("ROE^JANE", ""), ("JANEROEXX", ""), ("", ""), ("C", "")])
def test_a_modality_is_a_code(tmp_path, said, shown):
    assert open_upload(make_dicom(tmp_path/"a", ramp, Modality=said)).modality == shown

def test_window_level_and_width(tmp_path):
    scan = open_upload(make_dicom(tmp_path/"a", ramp, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=1000, WindowWidth=2001))
    assert scan.window == (999.5, 2000) and scan.window_range["level"] == (-1024, 3071)
    grey = np.asarray(scan.view(level=0, width=1000))[..., 0]
    values = ramp[0].astype(float) - 1024
    assert (grey[values <= -500] == 0).all() and (grey[values >= 500] == 255).all() and abs(int(grey[values == 0][0]) - 128) <= 1
    assert np.asarray(scan.view(width=10)).std() > np.asarray(scan.view()).std() and scan.view(level=-9e9).getextrema() == ((255, 255),) * 3

def test_the_negative_of_the_negative(tmp_path):
    one, two = (open_upload(make_dicom(tmp_path/k, ramp, PhotometricInterpretation=k)) for k in ("MONOCHROME1", "MONOCHROME2"))
    for turned in ({}, dict(level=1500, width=900)):
        assert one.view(**turned).tobytes() == two.view(**turned, invert=True).tobytes() != two.view(**turned).tobytes()

def test_padding_stays_black(tmp_path):
    pixels = ramp.copy(); pixels[0, :8] = -2000
    scan = open_upload(make_dicom(tmp_path/"a", pixels, PixelPaddingValue=-2000))
    assert scan.window_range["level"][0] >= 0 and np.asarray(scan.view(level=-3000, width=10))[:8].max() == 0

def test_colour_has_no_window(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3), np.uint8)
    scan = open_upload(make_dicom(tmp_path/"a", pixels))
    assert scan.window is None and scan.window_range is None and (np.asarray(scan.view(level=5, width=5)) == pixels[0]).all()

def test_a_flat_picture_can_be_turned_too(tmp_path):
    scan = open_upload(make_dicom(tmp_path/"a", np.full((1, 8, 8), 7, np.int16)))
    low, high = scan.window_range["width"]
    assert 0 < low <= high and scan.view(level=0, width=1).getextrema() == ((255, 255),) * 3

def test_first_frames_of_many(tmp_path):
    scan = open_upload(make_dicom(tmp_path/"a", (np.arange(305 * 16, dtype=np.int16) % 977).reshape(305, 4, 4)))
    assert scan.frames == MAX_FRAMES and "305 frames; the first 300" in scan.notes[0] and scan.view(299).size == (4, 4)
    with pytest.raises(MedchatError, match="no such frame: 300"): scan.view(300)

@pytest.mark.parametrize("frame,turned", [(-1, {}), (1, {}), (0, dict(level=0, width=0)), (0, dict(width=-5)), (0, dict(width=float("nan"))), (10**30, {})])
def test_what_cannot_be_shown_is_an_error_of_one_line(tmp_path, frame, turned):
    scan = open_upload(make_dicom(tmp_path/"a", ramp))
    with pytest.raises(MedchatError): scan.view(frame, **turned)

def test_frames_that_are_not_there(tmp_path):
    path = make_dicom(tmp_path/"a", np.zeros((2, 8, 8), np.int16))
    ds = read_dicom(path); ds.NumberOfFrames = 10**9; ds.save_as(tmp_path/"b")
    with pytest.raises(MedchatError) as e: open_upload(tmp_path/"b").view(250)
    assert "\n" not in str(e.value)

def test_a_page_may_copy_its_state():
    scan = open_upload(slice_)
    assert copy.deepcopy(scan) is scan

def test_a_directory_names_no_other_files(tmp_path):
    (tmp_path/"DICOMDIR").write_bytes(bytes(128) + b"DICM")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage
    ds, item = Dataset(), Dataset()
    with quietly(): item.ReferencedFileID, item.RecordInUseFlag = ["..", "secret"], 0xFFFF
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, MediaStorageDirectoryStorage, "1.2.3"
    ds.SOPClassUID, ds.SOPInstanceUID, ds.DirectoryRecordSequence = MediaStorageDirectoryStorage, "1.2.3", [item]
    with quietly(): ds.save_as(tmp_path/"DICOMDIR", enforce_file_format=True)
    with pytest.raises(MedchatError, match="a DICOMDIR holds no picture: DICOMDIR") as e: open_upload(tmp_path/"DICOMDIR")
    assert "secret" not in str(e.value)

# --- what is something else

def packed(kind):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z: z.writestr("a.txt", "hello")
    return {"zip": out.getvalue(), "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "svgz": gzip.compress(b"<svg/>"), "html": b"<!doctype html><script>1</script>",
            "pdf": b"%PDF-1.7\n1 0 obj", "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "elf": b"\x7fELF" + bytes(99), "mp4": b"\0\0\0\x18ftypisom" + bytes(99), "text": b"hello", "empty": b"",
            "lfs": b"version https://git-lfs.github.com/spec/v1\n", "psd": b"8BPS" + bytes(99), "ico": b"\0\0\1\0\1\0" + bytes(99), "gz dicom": gzip.compress(slice_.read_bytes())}[kind]

@pytest.mark.parametrize("kind", ["zip", "svg", "svgz", "html", "pdf", "eps", "elf", "mp4", "text", "empty", "lfs", "psd", "ico", "gz dicom"])
@pytest.mark.parametrize("name", ["x.png", "x.dcm"])
def test_other_files_are_refused_by_content(tmp_path, kind, name):
    (tmp_path/name).write_bytes(packed(kind))
    with pytest.raises(MedchatError) as e: open_upload(tmp_path/name)
    assert e.value.value == name and str(tmp_path) not in str(e.value) and "\n" not in str(e.value)

@pytest.mark.parametrize("kind", ["zip", "html", "pdf"])
@pytest.mark.parametrize("first", ["PNG", "JPEG", "GIF", "BMP"])
def test_of_two_things_at_once_only_the_pixels_go_on(tmp_path, kind, first):
    load_image(film).save(out := io.BytesIO(), first)
    (tmp_path/"a.jpg").write_bytes(out.getvalue() + packed(kind))                  # a GIFAR is a GIF with a zip behind it
    scan = open_upload(tmp_path/"a.jpg")
    assert scan.view().tobytes() == load_image(out.getvalue()).tobytes()
    scan.view().save(made := io.BytesIO(), "PNG")
    assert packed(kind)[-20:] not in made.getvalue() and scan.view().info == {}

def test_a_picture_in_the_preamble_of_a_dicom_file_is_not_looked_at(tmp_path):
    data = bytearray(slice_.read_bytes()); data[:6] = b"GIF89a"
    (tmp_path/"a.gif").write_bytes(data)
    assert open_upload(tmp_path/"a.gif").modality == "CT" and open_upload(tmp_path/"a.gif")._dataset.preamble == bytes(128)

def test_texts_and_exif_of_a_picture_end_here(tmp_path):
    exif = Image.Exif(); exif[0x010E] = "Jane Roe"
    load_image(film).save(tmp_path/"a.jpg", exif=exif, comment=b"Jane Roe")
    scan = open_upload(tmp_path/"a.jpg")
    assert scan.view().info == {} and not scan.view().getexif() and "Roe" not in str(vars(scan))

# --- places

def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path/"pipe")
    for path in (tmp_path, tmp_path/"none", tmp_path/"pipe", Path("/dev/null"), tmp_path/("x" * 300)):
        with pytest.raises(MedchatError) as e: open_upload(path)
        assert "\n" not in str(e.value) and f"{tmp_path}/" not in str(e.value)

def test_errors_show_no_folder_and_no_words_of_the_file(tmp_path):
    (tmp_path/"ward 7").mkdir()
    cut = slice_.read_bytes()
    for name, data in {"a.png": film.read_bytes()[:700], "b.dcm": cut[:len(cut) // 2], "c.dcm": cut[:400], "d.dcm": bytes(128) + b"DICM" + b"ROE^JANE" * 40, "e.jpg": b"\xff\xd8\xff" + b"ROE^JANE" * 40}.items():
        (tmp_path/"ward 7"/name).write_bytes(data)
        with pytest.raises(MedchatError) as e: open_upload(tmp_path/"ward 7"/name).view()
        assert name in str(e.value) and "ward" not in str(e.value) and "ROE" not in str(e.value), str(e.value)

def test_limits_of_bytes_are_asked_first(tmp_path):
    for name, head, size in (("a.png", b"\x89PNG", MAX_IMAGE_BYTES), ("a.dcm", bytes(128) + b"DICM", MAX_DICOM_BYTES)):
        with open(tmp_path/name, "wb") as f: f.write(head); f.truncate(size + 1)   # a hole: it takes no space
        with pytest.raises(MedchatError, match=f"the file is too large: {name}.*at most {size:,}"): open_upload(tmp_path/name)

# --- bombs

bombs_code = """
import json, resource, sys
from pathlib import Path
from medchat.core import MedchatError
from medchat.scan import open_upload
for warm in sys.argv[2:]: open_upload(warm).view()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
out = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    before = peak()
    try: open_upload(path).view(); said = "opened"
    except MedchatError as e: said = str(e)
    out[path.name] = said, peak() - before
print(json.dumps(out))
"""

def deflated(path, size):
    "A DICOM file of the deflated transfer syntax whose pixel data is `size` zeros."
    from pydicom.uid import DeflatedExplicitVRLittleEndian
    ds = read_dicom(slice_)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.Rows = ds.Columns = 8; ds.PixelData = bytes(128)
    with quietly(): ds.save_as(path, enforce_file_format=True)
    data = path.read_bytes()
    at = 144 + int.from_bytes(data[140:144], "little")
    body = zlib.decompress(data[at:], -15)
    body = body[:body.rindex(b"\xe0\x7f\x10\x00")] + b"\xe0\x7f\x10\x00OW\0\0" + struct.pack("<I", size)
    packer = zlib.compressobj(9, wbits=-15)
    path.write_bytes(data[:at] + packer.compress(body) + b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush())

def test_bombs_are_refused_without_memory(tmp_path):
    here = tmp_path/"bombs"; here.mkdir()
    (here/"size.png").write_bytes(png(50_000, 50_000))
    (here/"most.png").write_bytes(png(2**31 - 1, 2**31 - 1))
    (here/"text.png").write_bytes(png(40, 40, *(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(60 << 20))) for _ in range(3))))
    (here/"profile.png").write_bytes(png(40, 40, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(150 << 20)))))
    (here/"size.gif").write_bytes(b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\2L\1\0;")
    (here/"size.bmp").write_bytes(b"BM" + struct.pack("<IHHIIiiHHIIiiII", 154, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(100))
    (here/"size.ppm").write_bytes(b"P6 60000 60000 255\n" + bytes(99))
    (here/"size.tif").write_bytes(b"II*\0\x08\0\0\0\x09\0" + b"".join(struct.pack("<HHII", *e) for e in ((256, 4, 1, 60_000), (257, 4, 1, 60_000), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 200), (277, 3, 1, 1), (278, 4, 1, 60_000), (279, 4, 1, 50))) + bytes(99))
    Image.new("RGB", (9_460, 9_460)).save(here/"size.webp", quality=1, method=0)   # the format knows 16,383 at most; making that takes long
    make_dicom(here/"size.dcm", ramp, Rows=50_000, Columns=50_000)
    make_dicom(here/"frames.dcm", ramp, NumberOfFrames=2**31 - 1)
    make_dicom(here/"depth.dcm", ramp, Rows=9_000, Columns=9_000, BitsAllocated=32, BitsStored=32, HighBit=31)
    deflated(here/"deflated.dcm", 300 << 20)
    done = subprocess.run([sys.executable, "-c", bombs_code, here, film, slice_], env={**os.environ, "PYTHONPATH": str(root)}, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 13 and {name: grew for name, (_, grew) in found.items() if grew > 120} == {}, found
    assert {name for name, (said, _) in found.items() if said == "opened"} <= {"profile.png", "text.png"}, found # small pictures: what they carry is not unpacked whole
    for name in ("size.png", "most.png", "size.gif", "size.bmp", "size.ppm", "size.tif", "size.webp", "size.dcm"): assert found[name][0].startswith("image too large"), found[name]
    assert found["deflated.dcm"][0].startswith("a deflated file that unpacks to too much: deflated.dcm")

# --- damage

@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["png", "dcm", "rle", "jpg", "gif", "webp"]), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12), st.floats(0, 1), st.booleans())
def test_damaged_files_open_or_say_so(tmp_path, kind, changes, end, cut):
    if kind in ("dcm", "rle"): data = bytearray((slice_ if kind == "dcm" else sample_data()/"dicom"/"rle.dcm").read_bytes())
    else:
        load_image(film, 64).save(out := io.BytesIO(), dict(png="PNG", jpg="JPEG", gif="GIF", webp="WEBP")[kind])
        data = bytearray(out.getvalue())
    for at, value in changes: data[min(int(at * min(len(data), 3000)), len(data) - 1)] = value
    (tmp_path/"a").write_bytes(data[:int(len(data) * end)] if cut else data)
    try: assert open_upload(tmp_path/"a").view().mode == "RGB"
    except MedchatError as e: assert "\n" not in str(e) and str(tmp_path) not in str(e)
