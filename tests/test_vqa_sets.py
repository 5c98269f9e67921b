"Question sets: each published layout, its quirks, and the counts that were published with it."
import io, json, random
from collections import Counter
from pathlib import Path
import pytest
from medchat.core import MedchatError, Record
from medchat.readers import Reject, find_format, read_records, recognise
from medchat.vqa_sets import mend_text

RAD = dict(qid=1, image_name="s.jpg", image_organ="CHEST", answer="Yes", answer_type="CLOSED", question_type="PRES", question="Large?", phrase_type="freeform")
SLAKE = dict(img_id=1, img_name="xmlab1/source.jpg", question="What modality?", answer="MRI", q_lang="en", location="Abdomen", modality="MRI", answer_type="OPEN",
             base_type="vqa", content_type="Modality", triple=["vhead", "_", "_"], qid=0)
LXMERT = dict(img_id="val_0000", labelf={"pvqa": [{"yes": 1}, {"hyphae": 1}]}, sentf={"pvqa": ["Silver?", "What?"]})
KVASIR = dict(image_id="a1", image_filename="a1.jpg", question="Is there text?", answer="yes")
X1 = dict(img_id="a1", complexity=1, question="Is text seen?", answer="No text is seen.", original="[]", question_class=["text"])
INFO = dict(answer_type="single_choice", options=["yes", "no"], path="lung_signs")
PMC = {"Figure_path": "PMC1_F1.jpg", "Question": "What?", "Answer": "beta", "Choice A": "A:alpha", "Choice B": "B:beta", "Choice C": "C:gamma", "Choice D": "D:delta", "Answer_label": "B"}
MAPPING = "id_to_img_mapping_frontal_reports.json"

def put(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa, pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl": path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif path.suffix == ".csv":
        import csv
        with open(path, "w", newline="") as f: w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)
    else: path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path

def png(shade=0):
    from PIL import Image
    b = io.BytesIO(); Image.new("L", (4, 4), shade).save(b, "PNG")
    return {"bytes": b.getvalue(), "path": None}

def rad(folder, train, test=()):
    put(folder/"trainset.json", list(train)); put(folder/"testset.json", list(test))
    return list(read_records(folder, "vqa_rad"))

def one(source, format): (r,) = read_records(source, format); return r

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
    (dict(answer_type="HALF"), "unknown answer type"), (dict(answer_type=None), "answer_type is NoneType"), (dict(image_name="../../s.jpg"), "outside"), (dict(image_name=None), "image_name is NoneType"),
    (dict(image_name="/etc/passwd"), "outside"), (dict(qid=None), "qid is NoneType")])
def test_rad_bad_rows(tmp_path, change, why): assert why in rad(tmp_path, [RAD | change])[0].why

@pytest.mark.parametrize("field", ["qid", "image_name", "answer", "answer_type", "question"])
def test_rad_missing_fields(tmp_path, field): assert field in rad(tmp_path, [{k: v for k, v in RAD.items() if k != field}])[0].why

@pytest.mark.parametrize("broken,whole", [("liver \tsplee n\tstomac h\tand esophagus", "liver, spleen, stomach, and esophagus"), ("Heart \tlungs", "Heart, lungs"), ("it\ufffds", "it's"),
    ("(hours?\tminutes?)", "(hours?, minutes?)"), ("in a male\twhat else", "in a male, what else"), ("\ufffd end", "end"), ("Is it a T2 image?", "Is it a T2 image?"), ("two  blanks", "two blanks")])
def test_mend(broken, whole): assert mend_text(broken) == whole

def test_rad_original_layout(tmp_path):
    "The one-file original: test rows are told by their phrase_type."
    (tmp_path/"VQA_RAD Image Folder").mkdir()
    put(tmp_path/"VQA_RAD Dataset Public.json", [RAD, RAD | dict(qid="2", phrase_type="test_freeform"), RAD | dict(qid=3, phrase_type="test_para")])
    found = list(read_records(tmp_path))
    assert [r.split for r in found] == ["train", "test", "test"] and found[0].images == ["VQA_RAD Image Folder/s.jpg"] and found[1].id == "vqa_rad-2"
    assert len(list(read_records(tmp_path, subset="llava-med"))) == 3

def test_rad_parent_folder_and_single_file(tmp_path):
    home = tmp_path/"data_RAD"; home.mkdir(); rad(home, [RAD], [RAD | dict(qid=2)])
    assert len(list(read_records(tmp_path, "vqa_rad"))) == 2
    assert [r.split for r in read_records(home/"testset.json", "vqa_rad")] == ["test"]
    assert recognise(home/"testset.json")[0] == recognise(tmp_path)[0] == "vqa_rad"

def test_rad_subset(tmp_path):
    rad(tmp_path, [RAD, RAD | dict(qid=2, phrase_type="para"), RAD | dict(qid=3, phrase_type="frame"), 5], [RAD | dict(qid=4)])
    assert [type(r).__name__ for r in read_records(tmp_path, subset="llava-med")] == ["Record", "Record", "Reject", "Record"]
    with pytest.raises(MedchatError, match="unknown subset"): list(read_records(tmp_path, subset="llava"))

def test_rad_images_elsewhere(tmp_path):
    "With --images the pictures may stand in that folder itself."
    rad(tmp_path/"a", [RAD]); (tmp_path/"b").mkdir(); (tmp_path/"b"/"s.jpg").write_text("x")
    assert next(read_records(tmp_path/"a", "vqa_rad", images=tmp_path/"b")).images == ["s.jpg"]

@pytest.mark.parametrize("card", [True, False])
def test_rad_hub_copy(tmp_path, card):
    "The Hub's Parquet files: in the cache of huggingface_hub, or in a plain folder with the card."
    home = tmp_path/("plain" if card else "datasets--x--vqa-rad/snapshots/abc"); image = png()
    for split, n in (("train", 3), ("test", 2)): put(home/"data"/f"{split}-00000-of-00001.parquet", [dict(image=image, question=f"q{k}?", answer="Yes" if k else "left \tlung") for k in range(n)])
    if card: put(home/"README.md", "---\nlicense: cc0-1.0\npretty_name: VQA-RAD\n---\n# Dataset Card for VQA-RAD")
    assert recognise(home)[0] == recognise(home/"data")[0] == "vqa_rad"
    found = list(read_records(home))
    assert Counter((r.split, r.answer_type) for r in found) == {("train", "open"): 1, ("train", "closed"): 2, ("test", "open"): 1, ("test", "closed"): 1}
    assert found[0].answer == "left, lung" and "mended" in found[0].meta and found[0].blobs == {found[0].images[0]: image["bytes"]} and len({r.id for r in found}) == 5
    with pytest.raises(MedchatError, match="phrase_type"): list(read_records(home, "vqa_rad", subset="llava-med"))

def test_a_parquet_file_without_a_name_is_nobodys(tmp_path):
    put(tmp_path/"x"/"train.parquet", [dict(image=png(), question="q?", answer="a")])
    assert not any(f.sniff(tmp_path/"x") for n in SETS if (f := find_format(tmp_path, n)))

@pytest.mark.parametrize("name", ["trainset.json", "testset.json", "VQA_RAD Dataset Public.json"])
def test_a_json_list_of_ones_own_is_not_vqa_rad(tmp_path, name):
    "Only VQA-RAD's own fields make a JSON file VQA-RAD: a hospital's rows must not get its name and licence, whatever their file and folder are called."
    for folder in ("ward", "vqa-rad"):
        path = put(tmp_path/folder/name, [dict(image="a.jpg", question="Large?", answer="no")])
        for source in (tmp_path/folder, path): assert not any(f.sniff(source) for n in SETS if (f := find_format(source, n)))
    assert recognise(path)[0] == "table"
    put(tmp_path/"ward"/name, [RAD]); assert recognise(tmp_path/"ward")[0] == "vqa_rad"

# ---- slake
SETS = ("vqa_rad", "slake", "path_vqa", "kvasir_vqa", "kvasir_vqa_x1", "endovis18_vqa", "rad_restruct", "pmc_vqa")

def test_slake_quirks(tmp_path):
    put(tmp_path/"train.json", [SLAKE, SLAKE | dict(qid=1, answer=""), SLAKE | dict(qid=2, content_type=" abnormity"), SLAKE | dict(qid=3, q_lang="zh", answer="是", answer_type="CLOSED "), SLAKE | dict(qid=4, content_type=None),
                                SLAKE | dict(qid=5, img_name="xmlab1\\source.jpg"), SLAKE | dict(qid=6, img_name="../x/source.jpg"), SLAKE | dict(qid=7, answer_type="MAYBE"), 7])
    put(tmp_path/"validation.json", [SLAKE | dict(qid=8)]); put(tmp_path/"validate.json", [SLAKE | dict(qid=8)]); put(tmp_path/"test.json", [SLAKE | dict(qid=9)])
    found = list(read_records(tmp_path))
    assert [type(r).__name__ for r in found] == "Record Reject Record Record Record Record Reject Reject Reject Record Record".split()
    assert found[2].meta["content_type"] == "Abnormality" and found[2].meta["question_type"] == ["Abnormality"] and found[4].meta["question_type"] == []
    assert found[3].language == "zh" and found[3].answer_type == "closed" and found[5].images == found[0].images == ["imgs/xmlab1/source.jpg"] and found[5].group == "xmlab1"
    assert [r.split for r in found if isinstance(r, Record)] == ["train"] * 5 + ["validation", "test"] and found[-1].id == "slake-9"
    assert len(list(read_records(tmp_path, language="zh"))) == 2 # and the row that is no object
    with pytest.raises(MedchatError, match="unknown language"): list(read_records(tmp_path, language="de"))

def test_slake_parquet_copy(tmp_path):
    put(tmp_path/"data"/"test-00000-of-00001.parquet", [{k: v for k, v in SLAKE.items() if k != "img_name"} | dict(image=png())])
    r = one(tmp_path, "auto")
    assert r.group == "xmlab1" and r.split == "test" and r.images[0] in r.blobs and "image" not in r.meta

# ---- path_vqa
def test_lxmert_lists(tmp_path):
    rows = [LXMERT, dict(img_id="val_0001", labelf={"pvqa": []}, sentf={"pvqa": []}), LXMERT | dict(sentf={"pvqa": ["one?"]}), LXMERT | dict(labelf={"pvqa": [{}, {"a": 0.3, "b": 1}]}), LXMERT | dict(sentf=[1]), 3]
    put(tmp_path/"pvqa_val.json", rows); put(tmp_path/"pvqa_ans.json", [{"ans": "yes"}])
    found = list(read_records(tmp_path))
    assert [r.why if isinstance(r, Reject) else r.answer for r in found] == ["yes", "hyphae", "no question about this image", "1 questions but 2 answers", "no answer", "b",
        "sentf and labelf must be {name: list}", "a row must be an object, not int"]
    assert found[0].split == "validation" and found[0].group == "val_0000" and found[5].meta["labels"] == {"a": 0.3, "b": 1} and len({r.id for r in found if isinstance(r, Record)}) == 3

@pytest.mark.parametrize("where", ["images/val", "val", "images", ""])
def test_lxmert_images(tmp_path, where):
    put(tmp_path/"pvqa_val.json", [LXMERT]); put(tmp_path/where/"val_0000.jpg", "x")
    assert next(read_records(tmp_path)).images == [f"{where}/val_0000.jpg".lstrip("/")]

@pytest.mark.parametrize("name,there,images", [("images\\train\\train_0001.jpg", "", "images/train/train_0001.jpg"), ("pvqa\\images\\train\\train_0001.jpg", "images/train/train_0001.jpg", "images/train/train_0001.jpg"),
    ("a/b/train_0001.jpg", "images/train_0001.jpg", "images/train_0001.jpg"), ("train_0001", "train/train_0001.jpg", "train/train_0001.jpg"), ("train_0001.jpg", "", "images/train/train_0001.jpg")])
def test_path_rows_with_image_path(tmp_path, name, there, images):
    put(tmp_path/"rows.json", [dict(image_path=name, question="Is it?", answer="No")])
    if there: put(tmp_path/there, "x")
    r = one(tmp_path, "auto")
    assert r.images == [images] and r.group == "train_0001" and r.split == "train" and r.answer_type == "closed"

@pytest.mark.parametrize("name", ["C:\\pvqa\\train_0001.jpg", "..\\train_0001.jpg", "/pvqa/train_0001.jpg", "", None, 3.5, True])
def test_path_rows_with_a_bad_path(tmp_path, name):
    put(tmp_path/"rows.json", [dict(image_path=name, question="Is it?", answer="No")])
    assert isinstance(one(tmp_path, "path_vqa"), Reject)

def test_path_hub_and_pickle(tmp_path):
    for split in ("train", "validation", "test"): put(tmp_path/"path-vqa"/"data"/f"{split}-00000-of-00001.parquet", [dict(image=png(), question="q?", answer="yes")] * 2)
    assert [r.split for r in read_records(tmp_path/"path-vqa")] == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2
    put(tmp_path/"pvqa"/"qas"/"train"/"train_qa.pkl", "cos\nsystem\n(S'touch pwned'\ntR.")
    assert recognise(tmp_path/"pvqa") == ("path_vqa", "train_qa.pkl is PathVQA's original pickle")
    for source in (tmp_path/"pvqa", tmp_path/"pvqa"/"qas"/"train"/"train_qa.pkl"):
        with pytest.raises(MedchatError, match="a pickle, which is never loaded") as e: list(read_records(source))
        assert "\n" not in str(e.value)

# ---- kvasir
def test_kvasir_forms(tmp_path):
    put(tmp_path/"j"/"train.json", [KVASIR, KVASIR | dict(answer="red; pink ;white"), KVASIR | dict(question="none", answer="nan"), KVASIR | dict(answer="nan"), KVASIR | dict(answer="none"), KVASIR | dict(image_filename=None, image_id=None)])
    put(tmp_path/"c"/"metadata.csv", [dict(source="Polyps", question="How many?", answer=1, img_id="a1"), dict(source="Polyps", question="How many?", answer="", img_id="a1")])
    put(tmp_path/"c"/"images"/"a1.jpg", "x")
    put(tmp_path/"p"/"data"/"00000.parquet", [dict(image=png(), source="Polyps", question="How many?", answer="1", img_id="a1")])
    found = list(read_records(tmp_path/"j"))
    assert [getattr(r, "why", getattr(r, "answer", 0)) for r in found] == ["yes", "red; pink ;white", "placeholder question 'none'", "placeholder answer 'nan'", "none", "img_id is NoneType, not text"]
    assert found[1].meta["answers"] == ["red", "pink", "white"] and found[0].split == "train" and found[0].answer_type == "closed"
    good, bad = read_records(tmp_path/"c")
    assert good.images == ["images/a1.jpg"] and good.group == "a1" and good.split is None and bad.why == "empty answer"
    r = one(tmp_path/"p", "auto")
    assert r.meta == dict(source="Polyps", img_id="a1") and r.group == "a1" and list(r.blobs) == r.images

def test_kvasir_x1_forms(tmp_path):
    put(tmp_path/"j"/"test.jsonl", [X1, X1 | dict(original='[{"q": "a", "a": "b"}]', question_class="['x', 'y']"), X1 | dict(original="[not json", question_class=None)])
    put(tmp_path/"p"/"data"/"train-00000-of-00001.parquet", [X1]); put(tmp_path/"c"/"train.csv", [X1 | dict(question_class="['text']")])
    found = list(read_records(tmp_path/"j"))
    assert [r.meta["question_type"] for r in found] == [["text"], ["x", "y"], []] and found[1].meta["original"] == [{"q": "a", "a": "b"}] and found[2].meta["original"] == "[not json"
    assert [one(tmp_path/f, "auto").meta["complexity"] for f in "pc"] == [1, 1] and [recognise(tmp_path/f)[0] for f in "jpc"] == ["kvasir_vqa_x1"] * 3

def test_kvasir_is_not_x1(tmp_path):
    put(tmp_path/"metadata.csv", [dict(source="Polyps", question="How many?", answer=1, img_id="a1")])
    with pytest.raises(MedchatError, match="no Kvasir-VQA-x1 files in"): list(read_records(tmp_path, "kvasir_vqa_x1"))

# ---- endovis18_vqa
def endo(tmp_path, text="What organ is it?|kidney\n", seq=1, kind="Classification", frame="frame000"):
    path = tmp_path/f"seq_{seq}"/"vqa"/kind/f"{frame}_QA.txt"; path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode()); return path

def test_endovis_lines(tmp_path):
    endo(tmp_path, b"What organ is it?|kidney\r\n\r\nno bar\n\xff|x\nWhere is it? & What is it?|Idle\nA & B?|\nWhat is a|b|c\n")
    found = list(read_records(tmp_path))
    assert [r.why if isinstance(r, Reject) else (r.question, r.answer) for r in found] == [("What organ is it?", "kidney"), "no | between question and answer", "not UTF-8 text",
        ("Where is it?", "Idle"), ("What is it?", "Idle"), "empty answer", ("What is a", "b|c")]
    assert found[0].where.endswith("frame000_QA.txt:1") and len({r.id for r in found if isinstance(r, Record)}) == 4

def test_endovis_sources_splits_and_folders(tmp_path):
    for seq in (1, 2, 8): path = endo(tmp_path/"EndoVis-18-VQA", seq=seq)
    put(tmp_path/"EndoVis-18-VQA"/"seq_2"/"left_fr"/"frame000.png", "x")
    found = list(read_records(tmp_path))
    assert [(r.split, r.group) for r in found] == [("validation", "seq_1"), ("train", "seq_2"), (None, "seq_8")]
    assert [r.images[0] for r in found][:2] == ["seq_1/left_frames/frame000.png", "seq_2/left_fr/frame000.png"]
    assert one(path, "auto").id == one(path.parents[2], "auto").id == found[2].id

def test_endovis_sentences(tmp_path):
    endo(tmp_path, "q?|The organ being operated is kidney\n", kind="Sentence")
    assert one(tmp_path, "auto").answer == "The organ being operated is kidney" # the only one there
    endo(tmp_path)
    assert one(tmp_path, "auto").answer == "kidney"
    assert len({r.id for s in ("sentence", "classification") for r in read_records(tmp_path, subset=s)}) == 2

def test_endovis_frames_in_order(tmp_path):
    for n in (10, 9, 100): endo(tmp_path, frame=f"frame{n}")
    assert [Path(r.images[0]).stem for r in read_records(tmp_path)] == ["frame9", "frame10", "frame100"]

# ---- rad_restruct
def test_restruct(tmp_path):
    put(tmp_path/MAPPING, {"1": ["CXR1_a", "CXR1_b"], "2": [], "3": ["../x"], "5": "CXR5"})
    rows = [["Signs?", ["yes"], [], INFO], ["Where?", ["left", "right"], [["Signs?", ["yes"]]], INFO | dict(options=["left", "right"])], ["No answer?", [], [], INFO], ["short"], {}, ["q", ["a"], [["broken"]], INFO], ["q", ["a"], [], None]]
    put(tmp_path/"train_qa_pairs"/"1.json", rows)
    for n in (2, 3, 4, 5): put(tmp_path/"val_qa_pairs"/f"{n}.json", rows[:1])
    put(tmp_path/"test_qa_pairs"/"1.json", "[cut"); put(tmp_path/"test_qa_pairs"/"2.json", {"a": 1})
    found = list(read_records(tmp_path))
    assert [type(r).__name__ for r in found] == ["Record"] * 2 + ["Reject"] * 11
    assert found[0].answer_type == "closed" and found[0].images == ["images/CXR1_a.png", "images/CXR1_b.png"] and found[0].split == "train" and found[0].group == "1"
    assert found[1].answer == "left, right" and found[1].answer_type == "open" and len(found[1].turns) == 4 and found[1].meta["answers"] == ["left", "right"]
    assert "report 4 has no picture" in found[9].why and "not JSON" in found[11].why and all("\n" not in r.why for r in found[2:])

def test_restruct_sources(tmp_path):
    home = tmp_path/"data"/"radrestruct"; put(home/MAPPING, {"1": ["a"]}); path = put(home/"val_qa_pairs"/"1.json", [["Signs?", ["yes"], [], INFO]])
    for source in (tmp_path, home, path.parent, path): assert recognise(source)[0] == "rad_restruct" and one(source, "auto").id == "rad_restruct-val-1-1"
    (home/MAPPING).unlink()
    with pytest.raises(MedchatError, match="no Rad-ReStruct files in"): list(read_records(home, "rad_restruct"))

# ---- pmc_vqa
def test_pmc_answers(tmp_path):
    v2 = {k: v for k, v in PMC.items() if k != "Answer_label"}
    rows = [PMC, PMC | {"Answer": "B:beta", "Answer_label": ""}, PMC | {"Answer": "Beta.", "Answer_label": ""}, PMC | {"Answer": "alpha"}, PMC | {"Answer": "epsilon", "Answer_label": ""}, PMC | {"Answer": "", "Answer_label": ""},
            PMC | {"Answer": "epsilon"}, PMC | {"Choice C": ""}, PMC | {"Question": ""}, PMC | {"Figure_path": "../x.jpg"}]
    put(tmp_path/"train.csv", rows); put(tmp_path/"test_2.csv", [v2 | {"Answer": "D", "Caption": "c"}])
    found = list(read_records(tmp_path))
    assert [r.why if isinstance(r, Reject) else r.answer for r in found] == ["beta", "beta", "beta", "answer 'alpha' is not choice B", "answer 'epsilon' is none of the choices", "no answer", "beta", "empty Choice C",
        "empty question", "image outside the source folder: ../x.jpg", "delta"]
    assert found[0].question == "What?\nA: alpha\nB: beta\nC: gamma\nD: delta" and found[0].group == "PMC1" and found[-1].meta["answer_letter"] == "D" and found[-1].split == "test" and found[-1].meta["Caption"] == "c"

def test_pmc_versions(tmp_path):
    for n in ("train", "test", "train_2", "test_2", "test_clean"): put(tmp_path/f"{n}.csv", [PMC])
    put(tmp_path/"images"/"PMC1_F1.jpg", "x"); put(tmp_path/"figures"/"PMC1_F1.jpg", "x")
    found = list(read_records(tmp_path))
    assert len(found) == 4 == len({r.id for r in found}) and Counter(r.images[0].split("/")[0] for r in found) == {"images": 2, "figures": 2}
    assert [len(list(read_records(tmp_path, subset=s))) for s in ("v1", "v2", "clean")] == [2, 2, 1] and one(tmp_path/"test_clean.csv", "auto").split == "test"

def test_pmc_early_spelling(tmp_path):
    put(tmp_path/"test.csv", [{**{k: v for k, v in PMC.items() if not k.startswith("Answer")}, "Anwser": " B:beta"}])
    assert one(tmp_path, "auto").answer == "beta"

# ---- all of them
MAKE = {"vqa_rad": lambda d: put(d/"trainset.json", [RAD]), "slake": lambda d: put(d/"train.json", [SLAKE]), "path_vqa": lambda d: put(d/"pvqa_val.json", [LXMERT]), "kvasir_vqa": lambda d: put(d/"test.json", [KVASIR]),
        "kvasir_vqa_x1": lambda d: put(d/"train.jsonl", [X1]), "endovis18_vqa": lambda d: endo(d), "rad_restruct": lambda d: (put(d/MAPPING, {"1": ["a"]}), put(d/"val_qa_pairs"/"1.json", [["Signs?", ["yes"], [], INFO]])),
        "pmc_vqa": lambda d: put(d/"train.csv", [PMC])}

@pytest.mark.parametrize("name", SETS)
def test_each_is_recognised_and_only_once(tmp_path, name):
    MAKE[name](tmp_path/"a"/"b")
    for source in (tmp_path, tmp_path/"a", tmp_path/"a"/"b"):
        assert [n for n in SETS if find_format(source, n).sniff(source)] == [name]
        assert isinstance(next(read_records(source)), Record)

@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[1, null, [], {}]", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "\udcff", "[" * 5000, "x,y\n1,2\n"])
def test_anything_gives_records_rejects_or_one_line(tmp_path, name, content):
    MAKE[name](tmp_path)
    for path in [p for p in tmp_path.rglob("*.*") if p.is_file()]:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        f = find_format(tmp_path, name); assert isinstance(f.sniff(tmp_path), str) and isinstance(f.sniff(path), str)
        for source in (tmp_path, path):
            try: assert all(isinstance(r, (Record, Reject)) for r in read_records(source, name))
            except MedchatError as e: assert "\n" not in str(e)

@pytest.mark.parametrize("name", SETS)
def test_damaged_files(tmp_path, name):
    "Bytes flipped, and the file cut: never anything but records, rejects and one-line errors."
    MAKE[name](tmp_path); rng = random.Random(0)
    for path in [p for p in tmp_path.rglob("*.*") if p.is_file()]:
        whole = path.read_bytes()
        for k in range(40):
            data = bytearray(whole)
            if k % 2: del data[rng.randrange(len(data)):]
            else:
                for _ in range(3): data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data)
            find_format(tmp_path, name).sniff(tmp_path)
            try: assert all(isinstance(r, (Record, Reject)) for r in read_records(tmp_path, name))
            except MedchatError as e: assert "\n" not in str(e)
        path.write_bytes(whole)

VALUES = [None, True, 0, -1, 2.5, float("nan"), "", " ", "x", "../x", "\0", "\ud800", [], [None], {}, {"a": 1}, "a" * 3000]

@pytest.mark.parametrize("name,row", [("vqa_rad", RAD), ("slake", SLAKE), ("path_vqa", LXMERT), ("kvasir_vqa", KVASIR), ("kvasir_vqa_x1", X1)])
def test_any_value_in_any_field(tmp_path, name, row):
    "Rows in = rows out, whatever a field holds; a record keeps to its folder."
    rows = [row | {k: v} for k in row for v in VALUES]
    path = MAKE[name](tmp_path)
    put(path, [row, *rows])
    found = list(read_records(path, name))
    assert all(isinstance(r, (Record, Reject)) for r in found) and len(found) >= len(rows) + 1 and isinstance(found[0], Record)
    assert not any(".." in p or p.startswith("/") for r in found if isinstance(r, Record) for p in r.images)

def test_rows_are_read_one_by_one(tmp_path):
    "The first row is there before a later one is read: what is broken at the end is not reached."
    path = put(tmp_path/"train.json", [SLAKE | dict(qid=n, question="What? " * 200) for n in range(2000)])
    path.write_text(path.read_text()[:-5])
    rows = read_records(path, "slake")
    assert [next(rows).id for _ in range(100)][-1] == "slake-99"
    with pytest.raises(MedchatError, match="not JSON"): list(rows)

# ---- as published
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

def test_rad_as_llava_med_counts(real_data):
    "Table 8 of LLaVA-Med: 1,797/451 rows, 770/179 open and 1,027/272 closed."
    found = list(read_records(real_data/"vqa_rad", subset="llava-med"))
    assert Counter((r.split, r.answer_type) for r in found) == {("train", "open"): 770, ("train", "closed"): 1027, ("test", "open"): 179, ("test", "closed"): 272}
    triple = lambda r: (r.group, r.question, r.answer)
    train, test = ([triple(r) for r in found if r.split == s] for s in ("train", "test"))
    assert len(train) - len(set(train)) == 3 and sum(t in set(test) for t in train) == 1 # what the Hub's copy dropped: 1,793 rows

def test_slake_as_published(real_data):
    found = list(read_records(real_data/"slake"))
    rejects = [r for r in found if isinstance(r, Reject)]
    assert len(found) == 11934 and [(r.row["qid"], r.why) for r in rejects] == [(1622, "empty answer")]
    good = [r for r in found if isinstance(r, Record)]
    assert Counter((r.split, r.language) for r in good) == {("train", "en"): 4918, ("train", "zh"): 4916, ("validation", "en"): 1053, ("validation", "zh"): 1046}
    assert Counter((r.split, r.answer_type) for r in good if r.language == "en") == {("train", "open"): 2975, ("train", "closed"): 1943, ("validation", "open"): 631, ("validation", "closed"): 422}
    assert len({r.id for r in good}) == len(good) and {r.meta["content_type"] for r in good} == {"Organ", "Position", "Abnormality", "KG", "Modality", "Size", "Plane", "Quantity", "Color", "Shape"}
    groups = lambda split, language: {r.group for r in good if r.split == split and r.language == language}
    assert not groups("train", "en") & groups("validation", "en") and groups("train", "zh") & groups("validation", "en") # each alone keeps its images apart, together they do not
    # LLaVA-Med counts rows with the empty answer: 4,919 and 1,053; its 1,061 test rows are those of the two tables made of test.json
    from medchat.readers import csv_rows
    assert [sum(1 for _ in csv_rows(real_data/"slake"/"Slake1.0"/f"test_{n}.csv")) for n in ("open", "close")] == [645, 416]

def test_path_vqa_as_published(real_data):
    "The validation list of PathVQA holds exactly the 6,279 questions of LLaVA-Med's table; 6,259 of them differ, as in the Hub's copy."
    found = list(read_records(real_data/"path_vqa"))
    good = [r for r in found if isinstance(r, Record)]
    assert Counter(r.why for r in found if isinstance(r, Reject)) == {"no question about this image": 160}
    assert len(good) == 6279 == len({r.id for r in good}) and len({(r.group, r.question, r.answer) for r in good}) == 6259
    assert Counter(r.answer_type for r in good) == {"open": 3144, "closed": 3135} and {r.split for r in good} == {"validation"} and len({r.group for r in good}) == 832

def test_kvasir_as_published(real_data):
    found = list(read_records(real_data/"kvasir_vqa"))
    good = [r for r in found if isinstance(r, Record)]
    assert len(found) == 12082 and Counter(r.why for r in found if isinstance(r, Reject)) == {"placeholder question 'none'": 10}
    assert sum(r.answer == "none" for r in good) == 2174 and sum("answers" in r.meta for r in good) == sum(";" in r.answer for r in good) > 1000
    assert len({r.id for r in good}) == 12072 and not any("rigth" in a for r in good for a in r.meta.get("answers", ()))

def test_restruct_as_published(real_data):
    found = list(read_records(real_data/"radrestruct"))
    assert len(found) == 913 and all(isinstance(r, Record) for r in found) and len({r.group for r in found}) == 20 and {r.split for r in found} == {"test"}
    assert Counter(len(r.turns) // 2 - 1 for r in found) == {0: 560, 1: 271, 2: 26, 3: 23, 4: 18, 5: 14, 6: 1} and sum(len(r.meta["answers"]) > 1 for r in found) == 4
    assert Counter(len(r.images) for r in found if len(r.turns) == 2)[2] > 0
