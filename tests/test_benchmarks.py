"Benchmarks: every published number has its source, data that is not the benchmark is refused, and the table shows no number without its rule."
import csv, json, re
from collections import Counter
from pathlib import Path
import pytest
from medchat.benchmarks import BENCHMARKS, Benchmark, Published, benchmark_scores, benchmark_table, check_benchmark, find_benchmark, in_benchmark, list_benchmarks
from medchat.core import MedchatError, Record
from medchat.curate import convert
from medchat.readers import read_records

ROWS = [(b, p) for b in BENCHMARKS.values() for p in b.published]
KNOWN = {"open_recall", "closed_accuracy", "exact_match", "precision", "recall", "f1", *(f"bleu_{n}" for n in (1, 2, 3, 4)), "rouge_1", "rouge_2", "rouge_l", "meteor_exact_stem", "cider", "finding_f1_micro", "finding_f1_macro"}

# ---- the published rows
@pytest.mark.parametrize("b,p", ROWS, ids=lambda x: getattr(x, "name", getattr(x, "model", None)))
def test_published_row_has_its_source(b, p):
    assert re.search(r"arXiv:\d{4}\.\d{5}|doi:10\.\d{4,}/\S+", p.source) and re.search("[Tt]able", p.source) and re.search(r" et al\. 20\d\d", p.source)
    assert p.model and p.protocol and (p.scores or p.other)
    assert all(0 < v < 1 for v in [*p.scores.values(), *p.other.values()])
    assert set(p.scores) <= set(b.scores) and set(p.differs) <= set(p.scores) and all(p.differs.values())

def test_the_rows_of_llava_med():
    "Table 4 of arXiv:2306.00890, as three papers that quote it have it."
    table = {b: [list(p.scores.values()) for p in BENCHMARKS[b].published] for b in ("vqa-rad", "slake", "pathvqa")}
    assert table["vqa-rad"] == [[.5, .6507], [.6152, .8419], [.6439, .8198], [.6475, .8309], [.3623, .6016]]
    assert table["slake"] == [[.7818, .6322], [.8308, .8534], [.8471, .8317], [.8711, .8678], [.4172, .4760]]
    assert table["pathvqa"] == [[.0774, .6320], [.3795, .9121], [.3887, .9165], [.3960, .9109], [.1086, .5975]]
    for b in table: assert all(list(p.scores) == ["open_recall", "closed_accuracy"] == list(p.differs) for p in BENCHMARKS[b].published)

def test_no_row_stands_twice():
    for b in BENCHMARKS.values(): assert len({p.model for p in b.published}) == len(b.published) > 0

@pytest.mark.parametrize("b", BENCHMARKS.values(), ids=str)
def test_benchmark_is_whole(b):
    assert b.name == str(b) and find_benchmark(b.name) is b and b.sources and b.leak and b.prompt.format(question="Where?") == "Where?" and b.split == "test"
    assert set(b.scores) <= KNOWN and len(set(b.scores)) == len(b.scores)
    assert b.convert.startswith("medchat convert FOLDER --format ") and ("--keep-splits" in b.convert) == b.has_split == bool(b.n)
    with pytest.raises(Exception): b.name = "other"

def test_all_of_the_issue_are_there():
    assert list(BENCHMARKS) == ["vqa-rad", "slake", "pathvqa", "iu-xray", "rocov2-captions", "kvasir-vqa"]
    assert [line.split()[0] for line in list_benchmarks().splitlines()] == ["name", *BENCHMARKS]

@pytest.mark.parametrize("name", ["", "vqa_rad", "VQA-RAD", "mimic"])
def test_unknown_name(name):
    with pytest.raises(MedchatError, match="no such benchmark.*Known: vqa-rad, slake, pathvqa, iu-xray, rocov2-captions, kvasir-vqa"): find_benchmark(name)

# ---- tiny folders in each published layout
def picture(path: Path, shade: int):
    from PIL import Image
    import numpy as np
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(shade).integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(path)

def put(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with open(path, "w", newline="") as f: w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)
    else: path.write_text(json.dumps(rows, ensure_ascii=False))

def vqa_rad(at):
    row = lambda k, image: dict(qid=k, image_name=f"{image}.png", image_organ="CHEST", answer="Yes" if k % 2 else "left lung", answer_type="CLOSED" if k % 2 else "OPEN", question_type="PRES", question=f"What is {k}?", phrase_type="freeform")
    put(at/"trainset.json", [row(k, k % 3) for k in range(6)]); put(at/"testset.json", [row(k, k % 3) for k in range(6, 10)]) # every test image is in train
    for k in range(3): picture(at/"images"/f"{k}.png", k)

def slake(at):
    row = lambda k, image, language="en": dict(img_id=image, img_name=f"xmlab{image}/source.jpg", question=f"What is {k}?", answer="MRI", q_lang=language, location="Abdomen", modality="MRI", answer_type="OPEN", base_type="vqa", content_type="Modality", triple=[], qid=k)
    for n, name in enumerate(("train", "validate", "test")): put(at/f"{name}.json", [row(10*n + k, n) for k in range(3)] + [row(10*n + 5, (n + 1) % 3, "zh")])
    for k in range(3): picture(at/"imgs"/f"xmlab{k}"/"source.jpg", k)

def path_vqa(at):
    for n, name in enumerate(("train", "val", "test")):
        put(at/f"pvqa_{name}.json", [dict(img_id=f"{name}_{k:04}", labelf={"pvqa": [{"yes": 1}, {"hyphae": 1}]}, sentf={"pvqa": ["Silver?", "What?"]}) for k in range(2)])
        for k in range(2): picture(at/"images"/name/f"{name}_{k:04}.jpg", 10*n + k)

def iu_xray(at):
    row = lambda k: dict(id=f"CXR{k}_1", report=f"No effusion, case {k}.", image_path=[f"CXR{k}_1/0.png"])
    put(at/"annotation.json", dict(train=[row(1), row(2)], val=[row(3)], test=[row(4)]))
    for k in range(1, 5): picture(at/"images"/f"CXR{k}_1"/"0.png", k)

def rocov2(at):
    for n, name in enumerate(("train", "test")):
        put(at/f"{name}_captions.csv", [dict(ID=f"ROCOv2_{name}_{k}", Caption=f"A scan of patient {n}{k}.") for k in range(2)])
        for k in range(2): picture(at/name/f"ROCOv2_{name}_{k}.jpg", 10*n + k)

def kvasir_vqa(at):
    put(at/"metadata.csv", [dict(source="Polyps", question=f"Is there text {q}?", answer="yes", img_id=f"a{k}") for k in range(8) for q in range(2)])
    for k in range(8): picture(at/"images"/f"a{k}.jpg", k)

LAYOUTS = {"vqa-rad": vqa_rad, "slake": slake, "pathvqa": path_vqa, "iu-xray": iu_xray, "rocov2-captions": rocov2, "kvasir-vqa": kvasir_vqa}

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A dataset folder of each set, made as the benchmark says."
    made = {}
    for name, write in LAYOUTS.items():
        home = tmp_path_factory.mktemp(name); write(home/"source")
        made[name] = convert(str(home/"source"), home/"data", keep_splits=BENCHMARKS[name].has_split, language="en" if name == "slake" else None, repeats="keep", seed=1)
    return made

@pytest.mark.parametrize("name", LAYOUTS)
def test_recognises_each_set(folders, name):
    warnings = check_benchmark(BENCHMARKS[name], folders[name])
    assert warnings[0] == f"known to leak: {BENCHMARKS[name].leak}"
    assert any("other rows than were published" in w for w in warnings) == bool(BENCHMARKS[name].n) # these are tiny

@pytest.mark.parametrize("name", LAYOUTS)
def test_refuses_every_other_set(folders, name):
    for other in LAYOUTS:
        if other == name: continue
        with pytest.raises(MedchatError, match="this data is not .*Make it: medchat convert") as e: check_benchmark(BENCHMARKS[name], folders[other])
        assert BENCHMARKS[other].sources[0] in str(e.value)

def test_report_and_folder_say_the_same(folders):
    for name, folder in folders.items():
        assert check_benchmark(BENCHMARKS[name], json.loads((folder/"report.json").read_text())) == check_benchmark(BENCHMARKS[name], str(folder))

def test_a_leak_is_measured_in_the_folder(folders):
    assert any(w.startswith("measured here: 3 of 3 test images also stand in train") for w in check_benchmark(BENCHMARKS["vqa-rad"], folders["vqa-rad"]))
    assert not any("measured here" in w for w in check_benchmark(BENCHMARKS["pathvqa"], folders["pathvqa"]))

def test_counts_the_rows_that_are_missing(folders):
    (said,) = [w for w in check_benchmark(BENCHMARKS["vqa-rad"], folders["vqa-rad"]) if "other rows" in w]
    assert "2 of 272 closed, 2 of 179 open" in said and "left out" not in said

def test_kvasir_has_no_published_split(folders):
    assert any(w.startswith("no split was published: this one is by group, 80/10/10, seed 1") for w in check_benchmark(BENCHMARKS["kvasir-vqa"], folders["kvasir-vqa"]))

@pytest.mark.parametrize("name", [n for n in LAYOUTS if BENCHMARKS[n].has_split])
def test_refuses_a_split_dealt_anew(name, tmp_path):
    LAYOUTS[name](tmp_path/"source")
    out = convert(str(tmp_path/"source"), tmp_path/"data", shares="50/50" if name != "vqa-rad" else "50/25/25")
    with pytest.raises(MedchatError) as e: check_benchmark(BENCHMARKS[name], out)
    assert e.value.problem == "the published split was not kept" and "by group" in str(e.value.value) and "--keep-splits --out DIR" in e.value.hint

def test_refuses_a_copy_without_splits(tmp_path):
    "The Kaggle copy of IU X-Ray names no split: its rows all go to train."
    put(tmp_path/"indiana_reports.csv", [dict(uid=k, MeSH="", Problems="", image="", indication="", comparison="", findings=f"Clear {k}.", impression="") for k in (1, 2)])
    put(tmp_path/"indiana_projections.csv", [dict(uid=k, filename=f"{k}.png", projection="Frontal") for k in (1, 2)])
    for k in (1, 2): picture(tmp_path/"images"/"images_normalized"/f"{k}.png", k)
    out = convert(str(tmp_path), tmp_path/"data", format="iu_xray", keep_splits=True)
    with pytest.raises(MedchatError, match="no test split: train.*annotation.json"): check_benchmark(BENCHMARKS["iu-xray"], out)

def test_counts_english_alone_in_slake(folders, tmp_path):
    "With both languages in the folder the rows themselves are counted; with Chinese alone nothing counts."
    slake(tmp_path/"source")
    both, zh = (convert(str(tmp_path/"source"), tmp_path/(language or "both"), keep_splits=True, language=language) for language in (None, "zh"))
    one, two = ([w for w in check_benchmark(BENCHMARKS["slake"], f) if "other rows" in w] for f in (folders["slake"], both))
    assert one == two and "3 of 645 open" in one[0]
    assert not [w for w in check_benchmark(BENCHMARKS["slake"], json.loads((both/"report.json").read_text())) if "other rows" in w] # the report does not tell
    with pytest.raises(MedchatError, match="no row of test counts for slake: languages zh"): check_benchmark(BENCHMARKS["slake"], zh)

def test_in_benchmark():
    assert [in_benchmark(BENCHMARKS["slake"], *x) for x in (("vqa", "en"), ("vqa", ""), ("vqa", "zh"), ("caption", "en"))] == [True, True, False, False]
    assert in_benchmark(BENCHMARKS["iu-xray"], "report") and in_benchmark(BENCHMARKS["rocov2-captions"], "caption") and not in_benchmark(BENCHMARKS["iu-xray"], "vqa")

def test_changed_texts_are_said(tmp_path):
    path_vqa(tmp_path/"source")
    out = convert(str(tmp_path/"source"), tmp_path/"data", keep_splits=True, lowercase=True)
    assert "all texts were made lower case" in check_benchmark(BENCHMARKS["pathvqa"], out)
    report = json.loads((out/"report.json").read_text())
    assert "texts were masked: 3 places" in check_benchmark(BENCHMARKS["pathvqa"], report | dict(removed=dict(name=2, date=1)))
    assert any("left out in all splits: 4 rejected, 2 repeats; see rejects.jsonl" in w for w in check_benchmark(BENCHMARKS["pathvqa"], report | dict(rows=dict(rejected=4, repeats=2, dropped=0))))

@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"source": {}}', '{"source": {"VQA-RAD": 3}}', '{"source": {"VQA-RAD": 3, "SLAKE": 1}}', '{"source": {"VQA-RAD": 3}, "made": {"split": "published"}}'])
def test_damaged_reports_are_one_line(tmp_path, content):
    if content is not None: (tmp_path/"report.json").write_text(content)
    with pytest.raises(MedchatError): check_benchmark(BENCHMARKS["vqa-rad"], tmp_path)

# ---- the table
S = lambda value, n=9: dict(value=value, n=n, groups=3, low=None if value is None else value - .1, high=None if value is None else value + .1)
TOY = Benchmark("toy", "Toy", ("toy",), "medchat convert", ("open_recall", "f1", "exact_match"), "it leaks", (
    Published("one", "A et al. 2020, arXiv:2000.00001, Table 1", "tuned", dict(open_recall=.5, f1=.6789), dict(f1="counted twice")), Published("another one", "B", "untuned", dict(f1=.5), dict(f1="counted twice"), {"ODD": .25})))

def cells(text): return [re.split(r"\s{2,}", line) for line in text.split("\n\n")[1].splitlines()]

def test_table_rows_and_dashes():
    head, ours, one, other = cells(benchmark_table(TOY, dict(open_recall=S(.5, 1234), exact_match=S(None, 0)), "mine"))
    assert head == ["", "open recall", "f1", "exact match", "source"]
    assert ours == ["mine", "0.500 (0.40-0.60) n 1,234", "-", "-", "this run"]
    assert one == ["one", "0.5000", "0.6789*", "-", "A et al. 2020, arXiv:2000.00001, Table 1"] and other == ["another one", "-", "0.500*", "-", "B"]

def test_table_notes_say_each_thing_once():
    notes = benchmark_table(TOY, {}).split("\n\n")[2].splitlines()
    assert notes == ["* f1: counted twice", "one: tuned", "another one: untuned", "not comparable, another one: ODD 0.25", "-: not published, or by another rule than ours", "leak: it leaks"]

@pytest.mark.parametrize("b", BENCHMARKS.values(), ids=str)
def test_table_is_aligned(b):
    text = benchmark_table(b, {s: S(.5) for s in b.scores}, "a model")
    lines = text.split("\n\n")[1].splitlines()
    ends = {line.index(source) for line, source in zip(lines, ["source", "this run", *(p.source for p in b.published)])}
    assert len(ends) == 1 and len(lines) == 2 + len(b.published) and text.splitlines()[0] == b.title and not any(line != line.rstrip() for line in text.splitlines())

@pytest.mark.parametrize("b,p", ROWS, ids=lambda x: getattr(x, "name", getattr(x, "model", None)))
def test_no_number_without_its_rule(b, p):
    "A number that differs has a star and a note; one of another rule stands only in a note."
    text = benchmark_table(b, {})
    table, notes = text.split("\n\n")[1:]
    (line,) = [x for x in table.splitlines() if x.startswith(p.model + "  ")]
    shown = line[:line.index(p.source)].removeprefix(p.model).split()
    assert len(shown) == len(b.scores) and [x == "-" for x in shown] == [s not in p.scores for s in b.scores] and [x.endswith("*") for x in shown] == [s in p.differs for s in b.scores]
    assert [float(x.rstrip("*")) for x in shown if x != "-"] == [p.scores[s] for s in b.scores if s in p.scores]
    for why in p.differs.values(): assert why in notes
    for name, value in p.other.items(): assert f"{name} {value}" in notes and f"{value}" not in line

def test_scores_are_picked_in_order():
    summary, texts = dict(closed_accuracy=S(.1), open_recall=S(.2), caption_recall=S(.3)), dict(open=dict(f1=S(.4), bleu_1=S(.5)), report=dict(bleu_1=S(.6), rouge_l=S(.7)))
    assert {k: v["value"] for k, v in benchmark_scores(BENCHMARKS["vqa-rad"], summary, texts).items()} == dict(open_recall=.2, closed_accuracy=.1, f1=.4)
    assert list(benchmark_scores(BENCHMARKS["vqa-rad"], summary, texts)) == ["open_recall", "closed_accuracy", "f1"]
    assert {k: v["value"] for k, v in benchmark_scores(BENCHMARKS["iu-xray"], summary, texts).items()} == dict(bleu_1=.6, rouge_l=.7)
    assert benchmark_scores(BENCHMARKS["rocov2-captions"], {}) == {}

# ---- what the sentences on leaks say, counted in the real files
def found(folder, **options): return [r for r in read_records(folder, **options) if isinstance(r, Record)]
def pictures(rows, *splits): return {p for r in rows for p in r.images if r.split in splits}

def test_vqa_rad_leak_as_said(real_data):
    leak = BENCHMARKS["vqa-rad"].leak
    for subset, said in (("", "all 203 test images"), ("llava-med", "202 in the 1,797 train rows")):
        rows = found(real_data/"vqa_rad"/"data_RAD", subset=subset)
        assert said in leak and len(pictures(rows, "test") & pictures(rows, "train")) == (202 if subset else 203) and (not subset or sum(r.split == "train" for r in rows) == 1797)
    assert len(pictures(rows, "test")) == 203 and Counter(r.answer_type for r in rows if r.split == "test") == BENCHMARKS["vqa-rad"].n

def test_slake_leak_as_said(real_data):
    rows = found(real_data/"slake"/"Slake1.0")
    held = pictures(rows, "validation")
    assert f"of the {len(held)} validation images of both languages {len(held & pictures(rows, 'train'))} stand in train too" in BENCHMARKS["slake"].leak
    english = [r for r in rows if r.language == "en"]
    assert not pictures(english, "validation") & pictures(english, "train")
    n = {k: sum(1 for _ in csv.DictReader(open(real_data/"slake"/"Slake1.0"/f"test_{f}.csv", encoding="utf-8"))) for k, f in (("closed", "close"), ("open", "open"))}
    assert n == BENCHMARKS["slake"].n

def test_iu_and_kvasir_leaks_as_said(real_data):
    reports = Counter(r.answer for r in found(real_data/"iu_xray_kaggle"))
    assert f"{sum(n for n in reports.values() if n > 1):,} of {sum(reports.values()):,}" in BENCHMARKS["iu-xray"].leak
    rows = Counter((r.group, r.question.lower(), r.answer.lower()) for r in found(real_data/"kvasir_vqa"))
    assert f"{sum(rows.values()) - len(rows):,} of {sum(rows.values()):,}" in BENCHMARKS["kvasir-vqa"].leak

def test_rocov2_rows_as_said(real_data): assert len(found(real_data/"rocov2")) == BENCHMARKS["rocov2-captions"].n["caption"]

def test_vqa_rad_as_published_warns_of_its_leak_alone(real_data, tmp_path):
    out = convert(str(real_data/"vqa_rad"/"data_RAD"), tmp_path/"rad", keep_splits=True, subset="llava-med", verify="header")
    first, second = check_benchmark(BENCHMARKS["vqa-rad"], out)
    assert first.startswith("known to leak: all 203") and second.startswith("measured here: 202 of 203 test images also stand in train")
