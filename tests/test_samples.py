"The phantoms: the same every time, balanced, labelled as drawn, and safe to write."
from collections import Counter, defaultdict
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from medchat import samples
from medchat.core import MedchatError, Record, check_record, read_jsonl
from medchat.samples import FINDINGS, SPLITS, draw_phantom, make_samples, phantom_records

shipped = Path(__file__).resolve().parent.parent/"sample_data"/"phantoms"

@pytest.fixture(scope="module")
def records(): return [Record.from_dict(row) for _, row in read_jsonl(shipped/"records.jsonl")]

@pytest.fixture(scope="module")
def films(records): return {r.images[0]: r for r in records if r.kind == "caption"}

@pytest.fixture(scope="module")
def made(tmp_path_factory): return make_samples(tmp_path_factory.mktemp("samples")/"phantoms")

def grey(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)

# ---- made again

def test_made_again_bit_for_bit(made):
    "Records byte for byte, images pixel for pixel: the bytes of a PNG depend on the version of zlib."
    assert (made/"records.jsonl").read_bytes() == (shipped/"records.jsonl").read_bytes()
    assert (made/"README.md").read_bytes() == (shipped/"README.md").read_bytes()
    names = sorted(p.name for p in (shipped/"images").iterdir())
    assert sorted(p.name for p in (made/"images").iterdir()) == names
    different = [n for n in names if not np.array_equal(grey(made/"images"/n), grey(shipped/"images"/n))]
    assert different == []

def test_ours_is_written_over_and_nothing_else_stays(made, monkeypatch):
    monkeypatch.setattr(samples, "SPLITS", {"test": 5, "validation": 5, "train": 10})
    out = make_samples(made.parent/"small")
    (out/"images"/"p9999.png").write_bytes(b"left over")
    make_samples(out, seed=2)
    assert len(list((out/"images").iterdir())) == 20 and not (out/"images"/"p9999.png").exists()
    assert "--seed 2" in (out/"README.md").read_text() and [p.name for p in out.parent.iterdir() if ".tmp" in p.name] == []

def test_another_seed_is_another_data_set():
    one, two = phantom_records(0), phantom_records(1)
    assert [r.answer for r in one] != [r.answer for r in two] and phantom_records(0) == one
    a, b = draw_phantom({}, patient=1, seed=0), draw_phantom({}, patient=1, seed=1)
    assert a.shape != b.shape or (a != b).mean() > .5

def test_a_second_film_is_the_same_body_in_another_pose():
    a, b = draw_phantom({}, patient=1, visit=0), draw_phantom({}, patient=1, visit=1)
    assert a.shape != b.shape or (a != b).any()
    bodies = [vars(samples._body(samples._rng(0, p))) for p in (1, 1, 2)]
    assert bodies[0] == bodies[1] != bodies[2]

# ---- what it holds

def test_sizes_and_counts(records, films):
    assert sum(p.stat().st_size for p in shipped.rglob("*") if p.is_file()) < 8_000_000
    assert Counter(r.split for r in films.values()) == SPLITS == {"test": 150, "validation": 100, "train": 600}
    assert {f"images/{p.name}" for p in (shipped/"images").iterdir()} == set(films)
    for path in films:
        image = grey(shipped/path)
        assert image.dtype == np.uint8 and image.ndim == 2 and 112 <= min(image.shape) and max(image.shape) <= 224
        assert image.max() - image.min() > 120

def test_splits_are_disjoint_by_patient(records):
    split_of, group_of = defaultdict(set), defaultdict(set)
    for r in records:
        split_of[r.group].add(r.split)
        group_of[r.images[0]].add(r.group)
    assert all(len(s) == 1 for s in split_of.values()) and all(len(g) == 1 for g in group_of.values())
    assert set(Counter(g for (g,) in group_of.values()).values()) == {1, 2} # films of a patient
    hashes = defaultdict(set)
    for path, (group,) in group_of.items(): hashes[grey(shipped/path).tobytes()].add(path)
    assert all(len(paths) == 1 for paths in hashes.values())

def test_every_record_is_good(records):
    assert [check_record(r) for r in records if check_record(r)] == []
    assert len({r.id for r in records}) == len(records)
    assert {(r.source, r.licence, r.language) for r in records} == {("medchat phantoms", "CC0-1.0", "en")}
    per_film = defaultdict(Counter)
    for r in records:
        assert len(r.images) == 1 and len(r.turns) == 2 and not r.images[0].startswith("/")
        per_film[r.images[0]][r.answer_type or r.kind] += 1
    assert all(c["caption"] == c["report"] == 1 and c["open"] >= 1 for c in per_film.values())
    for split in SPLITS:
        closed = [c["closed"] for path, c in per_film.items() if next(r for r in records if r.images[0] == path).split == split]
        assert 4 <= np.mean(closed) <= 6

def test_no_question_is_asked_twice_of_a_film(records):
    asked = Counter((r.images[0], r.question) for r in records)
    assert max(asked.values()) == 1

def test_every_finding_is_there_often_enough(films):
    findings = [r.meta["findings"] for r in films.values() if r.split == "train"]
    assert .15 <= np.mean([not f for f in findings]) <= .25 and max(map(len, findings)) == 3
    for name, places in FINDINGS.items():
        for place in places:
            assert sum(f.get(name) == place for f in findings) >= {1: 120, 2: 60, 4: 30}[len(places)], (name, place)

def test_findings_that_hide_each_other_are_never_together(films):
    for r in films.values():
        f = r.meta["findings"]
        spots = [f[n] for n in ("nodule", "consolidation") if n in f]
        assert len(set(spots)) == len(spots)
        for place in spots:
            side, level = place.split()
            assert not (level == "lower" and f.get("effusion") == side) and not (level == "upper" and f.get("pneumothorax") == side)
            assert not (place == "left lower" and "cardiomegaly" in f)

# ---- the answers

def words(text): return set(text.lower().replace(",", " ").replace(".", " ").replace("?", " ").split())

def test_answers_agree_with_the_labels(records):
    "Worked out again, by other code, from the labels and the words of the question."
    noun = {"heart": "cardiomegaly", "effusion": "effusion", "pneumothorax": "pneumothorax", "nodule": "nodule", "consolidation": "consolidation", "tube": "tube"}
    for r in (r for r in records if r.kind == "vqa"):
        found, kind, q = r.meta["findings"], r.meta["question_type"], words(r.question)
        about = [name for word, name in noun.items() if word in q]
        if kind in ("normal", "abnormality"): assert about == [] and r.meta["finding"] == "overall"
        else: assert about == [r.meta["finding"]]
        place = " ".join(w for w in ("left", "right", "upper", "lower") if w in q)
        if kind == "presence": want = "yes" if about[0] in found and not place else "no"
        elif kind == "place": want = "yes" if found.get(about[0]) == place == r.meta["place"] else "no"
        elif kind == "normal": want = "no" if found else "yes"
        elif kind == "side": want = found[about[0]].split()[0]
        elif kind == "where": want = found[about[0]] + (" lung" if " " in found[about[0]] else " side")
        else:
            assert kind == "abnormality" and (r.answer == "none") == (not found)
            want = r.answer
            assert len(found) == (0 if r.answer == "none" else r.answer.count(",") + 1)
            for part, name in zip(r.answer.split(", "), found):
                assert noun[part.split()[-1]] == name and (found[name] is True or part.startswith(found[name]))
        assert r.answer == want, r
        assert r.answer == r.answer.lower() and r.answer_type == ("open" if kind in ("where", "abnormality") else "closed")

def test_captions_and_reports_name_what_is_there(records):
    for r in (r for r in records if r.kind in ("caption", "report")):
        found = r.meta["findings"]
        assert len(r.answer.split()) <= 45
        if r.kind == "report":
            findings, impression = r.answer.removeprefix("Findings: ").split(" Impression: ")
            assert ("enlarged" in findings) == ("cardiomegaly" in found) == ("normal size" not in findings)
            assert impression == ("normal." if not found else impression) and len(found) == (0 if impression == "normal." else impression.count(",") + 1)
        for name in set(FINDINGS) - {"cardiomegaly"}: assert (f"a pleural {name}" in r.answer or f"a {name}" in r.answer) == (name in found), r
        for name, place in found.items():
            if place is not True: assert f"{name} {'in' if ' ' in place else 'on'} the {place}" in r.answer

def test_the_question_does_not_give_the_answer_away(records):
    for split in SPLITS:
        texts, types = defaultdict(Counter), defaultdict(Counter)
        for r in records:
            if r.split != split or r.answer_type != "closed": continue
            texts[r.question][r.answer] += 1
            types[r.meta["question_type"]][r.answer] += 1
        assert set(types) == {"presence", "place", "normal", "side"}
        for answers in [*texts.values(), *types.values()]: assert len(answers) == 2 and len(set(answers.values())) == 1, (split, answers)

def test_half_of_the_no_to_a_place_are_hard(records):
    no = [r for r in records if r.split == "train" and r.meta["question_type"] == "place" and r.answer == "no"]
    assert .4 < np.mean([r.meta["finding"] in r.meta["findings"] for r in no]) < .6

# ---- what is drawn

def change(name, place, patient):
    "How much brighter the finding makes each pixel, and body coordinates of the pixels (x to the viewer's right)."
    plain, drawn = draw_phantom({}, patient=patient).astype(float), draw_phantom({name: place}, patient=patient).astype(float)
    x, y = samples._frame(samples._film(samples._rng(0, patient, 0, 1)))
    return drawn - plain, x, y

@pytest.mark.parametrize("patient", [1, 7, 30])
@pytest.mark.parametrize("name,place", [(n, p) for n, places in FINDINGS.items() for p in places if p is not True])
def test_left_is_on_the_viewers_right(name, place, patient):
    delta, x, y = change(name, place, patient)
    side = 1 if place.startswith("left") else -1
    width = delta.shape[1]
    viewers_right, viewers_left = np.abs(delta[:, width // 2:]).sum(), np.abs(delta[:, : width // 2]).sum()
    assert (viewers_right > 3 * viewers_left) if side == 1 else (viewers_left > 3 * viewers_right)
    centre = (np.abs(delta) * y).sum() / np.abs(delta).sum()
    if name in ("nodule", "consolidation"): assert (centre < -.1) == place.endswith("upper") and (centre > 0) == place.endswith("lower")
    if name == "effusion": assert centre > .2 and delta.sum() > 0   # low, and white
    if name == "pneumothorax": assert delta[y < -.3].sum() < 0      # high, and black

@pytest.mark.parametrize("name,place", [(n, p) for n, places in FINDINGS.items() for p in places])
def test_a_finding_is_large_and_bright_enough_to_be_seen(name, place):
    for patient in range(40, 52):
        delta, x, y = change(name, place, patient)
        area = (np.abs(delta) >= 30).mean() * 112 * 112 # pixels of a film of 112
        assert area >= 50, (name, place, patient, area)  # a disc of 4 pixels radius

def test_heart_is_larger_than_half_the_chest_only_when_it_should():
    for patient in range(60, 80):
        delta, x, y = change("cardiomegaly", True, patient)
        grown = np.abs(x[delta > 20])
        assert grown.size > 200 and (delta[np.abs(x) > .8] == 0).mean() > .99

# ---- bad input

@pytest.mark.parametrize("bad", [{"cyst": True}, {"nodule": "left"}, {"tube": "left"}, {"effusion": True}])
def test_unknown_finding(bad):
    with pytest.raises(MedchatError, match="no such finding"): draw_phantom(bad)

@pytest.mark.parametrize("content", ["thesis.txt", "README.md", "images/scan.dcm", "records.jsonl"])
def test_a_foreign_folder_is_left_alone(tmp_path, content):
    (tmp_path/"mine"/"images").mkdir(parents=True)
    (tmp_path/"mine"/content).write_text("years of work")
    with pytest.raises(MedchatError, match="medchat samples --out"): make_samples(tmp_path/"mine")
    assert (tmp_path/"mine"/content).read_text() == "years of work" and [p.name for p in tmp_path.iterdir()] == ["mine"]

def test_our_folder_with_a_stranger_in_it_is_left_alone(made):
    for stranger in (made/"notes.txt", made/"images"/"scan.jpg"):
        stranger.write_text("years of work")
        with pytest.raises(MedchatError, match="not empty"): make_samples(made)
        assert stranger.read_text() == "years of work"
        stranger.unlink()

def test_a_file_is_left_alone(tmp_path):
    (tmp_path/"f").write_text("years of work")
    with pytest.raises(MedchatError, match="medchat samples --out"): make_samples(tmp_path/"f")
    assert (tmp_path/"f").read_text() == "years of work"

def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(samples, "write_jsonl", stop)
    monkeypatch.setattr(samples, "SPLITS", {"test": 5, "validation": 5, "train": 5})
    with pytest.raises(KeyboardInterrupt): make_samples(tmp_path/"new"/"phantoms")
    assert list(tmp_path.iterdir()) == []

def test_a_place_where_nobody_may_write(no_write):
    with pytest.raises(MedchatError, match="cannot write"): make_samples(no_write/"phantoms")

def test_the_command(medchat, tmp_path):
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"a.txt").write_text("x")
    for argv in (["--out", "mine"], ["--out", "x", "--seed", "one"], ["--out", "x", "--seed=-1"], []):
        done = medchat("samples", *argv)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
