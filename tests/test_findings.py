"Edge cases of medchat.findings: scope of cues, spellings, speed, damaged text, and real reports beside their index."
import csv, random, time
import pytest
from medchat.findings import FINDINGS, STATUSES, find_findings

def got(text): return {f: s for f, s in find_findings(text).items() if f != "No Finding"}
P, A, U = "present", "absent", "uncertain"
CASES = [("Pulmonary oedema.", {"Edema": P}), ("Pulmonary edema is not seen.", {"Edema": A}), ("Pleural effusions", {"Pleural Effusion": P}), ("PLEURAL EFFUSION", {"Pleural Effusion": P}), ("No evidence of pneumothorax", {"Pneumothorax": A}),
    ("without effusion", {"Pleural Effusion": A}), ("free of consolidation", {"Consolidation": A}), ("pneumonia is ruled out", {"Pneumonia": A}), ("cannot rule out pneumonia", {"Pneumonia": U}), ("pneumonia cannot be ruled out", {"Pneumonia": U}),
    ("pneumonia can't be excluded", {"Pneumonia": U}), ("may represent pneumonia", {"Pneumonia": U}), ("the effusion has resolved", {"Pleural Effusion": A}), ("nearly resolved effusion", {"Pleural Effusion": P}), ("resolving effusion", {"Pleural Effusion": P}),
    ("no pneumothorax, effusion or consolidation", {"Pneumothorax": A, "Pleural Effusion": A, "Consolidation": A}), ("no pneumothorax, effusion, or consolidation; mild atelectasis", {"Pneumothorax": A, "Pleural Effusion": A, "Consolidation": A, "Atelectasis": P}),
    ("no pneumothorax but effusion", {"Pneumothorax": A, "Pleural Effusion": P}), ("no pneumothorax. Effusion.", {"Pneumothorax": A, "Pleural Effusion": P}), ("no pneumothorax, however effusion persists", {"Pneumothorax": A, "Pleural Effusion": P}),
    ("normal heart size", {"Cardiomegaly": A}), ("heart size is normal", {"Cardiomegaly": A}), ("heart is not normal", {}), ("the heart is not enlarged", {"Cardiomegaly": A}), ("heart slightly large", {"Cardiomegaly": P}), ("heart failure", {"Edema": P}), ("heart rate is normal", {}),
    ("no change in effusion", {"Pleural Effusion": P}), ("effusion has not changed", {"Pleural Effusion": P}), ("no increase in pneumothorax", {"Pneumothorax": P}), ("no new opacity", {"Lung Opacity": A}), ("pericardial effusion", {}), ("no pericardial or pleural effusion", {"Pleural Effusion": A}),
    ("history of pneumonia", {}), ("old granulomatous infection", {}), ("hydropneumothorax", {"Pneumothorax": P, "Pleural Effusion": P}), ("no hydropneumothorax", {"Pneumothorax": A, "Pleural Effusion": A}), ("mass effect", {}), ("plate-like atelectasis", {"Atelectasis": P}),
    ("vertebral body collapse", {}), ("right lung collapse", {"Atelectasis": P}), ("chest tube removed", {"Support Devices": A}), ("chest tube in place", {"Support Devices": P}), ("paratracheal line", {}), ("fracture line", {"Fracture": P}), ("portable film", {}), ("leading edge", {}),
    ("atelectasis versus pneumonia", {"Atelectasis": U, "Pneumonia": U}), ("atelectasis vs. pneumonia", {"Atelectasis": U, "Pneumonia": U}), ("scarring versus effusion", {"Pleural Effusion": U}), ("effusion/hemothorax", {"Pleural Effusion": P}), ("opacity, scarring or atelectasis", {"Lung Opacity": P, "Atelectasis": P}),
    ("no findings to suggest pneumonia", {"Pneumonia": A}), ("no effusion, possible pneumonia", {"Pleural Effusion": A, "Pneumonia": U}), ("no consolidation, suspicious opacity or effusion", {"Consolidation": A, "Lung Opacity": A, "Pleural Effusion": A}), ("Is the heart enlarged?", {"Cardiomegaly": U}),
    ("effusion.heart is enlarged", {"Pleural Effusion": P, "Cardiomegaly": P}), ("left effusion\nNo pneumothorax\n- Cardiomegaly", {"Pleural Effusion": P, "Pneumothorax": A, "Cardiomegaly": P}), ("no evidence of\npneumothorax", {"Pneumothorax": A}), ("XXXX effusion", {"Pleural Effusion": P}),
    ("costophrenic angles are sharp", {"Pleural Effusion": A}), ("no blunting of the costophrenic angles", {"Pleural Effusion": A}), ("ribs are intact", {"Fracture": A}), ("mediastinum is widened", {"Enlarged Cardiomediastinum": P}), ("mediastinal and hilar contours are normal", {"Enlarged Cardiomediastinum": A})]

@pytest.mark.parametrize("text, labels", CASES)
def test_cases(text, labels): assert got(text) == labels

NOT = [("There {is not} a pneumothorax.", {"Pneumothorax": A}), ("I {do not} see an effusion.", {"Pleural Effusion": A}), ("The heart {is not} enlarged.", {"Cardiomegaly": A}), ("There {are not} any nodules.", {"Lung Lesion": A}), ("The film {does not} show consolidation.", {"Consolidation": A}),
    ("The patient {has not} developed a pneumothorax.", {"Pneumothorax": A}), ("An effusion {was not} seen.", {"Pleural Effusion": A}), ("Nodules {were not} found.", {"Lung Lesion": A}), ("An effusion {has not} been seen.", {"Pleural Effusion": A}), ("The scan {did not} reveal a mass.", {"Lung Lesion": A}),
    ("I {cannot} see a pneumothorax.", {"Pneumothorax": A}), ("I {can not} see a pneumothorax.", {"Pneumothorax": A}), ("A pneumothorax {cannot} be seen.", {"Pneumothorax": A}), ("An effusion {could not} be identified.", {"Pleural Effusion": A}), ("We {could not} find a fracture.", {"Fracture": A}),
    ("Pneumonia {is not} likely.", {"Pneumonia": A}), ("I {do not} think there is a pneumothorax.", {"Pneumothorax": A}), ("I {do not} believe this is pneumonia.", {"Pneumonia": A}), ("I {would not} call this pneumonia.", {"Pneumonia": A}), ("There {does not} appear to be an effusion or a pneumothorax.", {"Pleural Effusion": A, "Pneumothorax": A}),
    ("There {is not} a pneumothorax, but there is an effusion.", {"Pneumothorax": A, "Pleural Effusion": P}), ("There {is not} a pneumothorax and there's a small effusion.", {"Pneumothorax": A, "Pleural Effusion": P}), ("Consolidation is present; I {do not} see an effusion.", {"Consolidation": P, "Pleural Effusion": A}),
    ("I {cannot} exclude pneumonia.", {"Pneumonia": U}), ("Pneumonia {could not} be ruled out.", {"Pneumonia": U}), ("An effusion {could not} be completely excluded.", {"Pleural Effusion": U}), ("Pneumonia {has not} been excluded.", {"Pneumonia": U}), ("An effusion {is not} excluded.", {"Pleural Effusion": U}),
    ("This {does not} exclude pneumonia.", {"Pneumonia": U}), ("It {might not} be pneumonia.", {"Pneumonia": U}), ("I {am not} sure there is an effusion.", {"Pleural Effusion": U}), ("It {is not} clear if there is an effusion.", {"Pleural Effusion": U}), ("{Is not} there an effusion?", {"Pleural Effusion": U}),
    ("The effusion {has not} resolved.", {"Pleural Effusion": P}), ("The effusion {has not} changed.", {"Pleural Effusion": P}), ("The pneumonia {did not} clear.", {"Pneumonia": P}), ("The pneumothorax {is not} larger.", {"Pneumothorax": P}), ("The chest tube {has not} been removed.", {"Support Devices": P}),
    ("The nodule {is not} calcified.", {"Lung Lesion": P}), ("The fracture {is not} displaced.", {"Fracture": P}), ("The effusion {should not} be drained.", {"Pleural Effusion": P}), ("A nodule that {was not} seen before.", {"Lung Lesion": P}), ("The opacity {was not} seen on the prior film.", {"Lung Opacity": P}),
    ("The left base {cannot} be evaluated because of an effusion.", {"Pleural Effusion": P}), ("You {cannot} miss the pneumothorax.", {"Pneumothorax": P}), ("The heart {is not} normal.", {}), ("The lungs {are not} clear.", {})]

@pytest.mark.parametrize("short", ["{} not", "{}n't", "{}n’t", "{}nt", "{} n't"])
@pytest.mark.parametrize("text, labels", NOT)
def test_contractions_of_not(text, labels, short):
    verb = text[text.index("{") + 1:text.index("}")]
    stem = verb.removesuffix("not").strip()
    if short == "{} not": said = verb
    elif stem == "am": return # "amn't" is not said
    else: said = short.format("ca" if stem == "can" else stem)
    text = text.replace("{" + verb + "}", said)
    assert got(text) == got(text.upper()) == labels, text

@pytest.mark.parametrize("text, labels", [("Patient has NT-proBNP of 900 and an effusion.", {"Pleural Effusion": P}), ("This is likely pneumonia.", {"Pneumonia": U}), ("This is unlikely to be pneumonia.", {"Pneumonia": A}), ("It won't be pneumonia.", {"Pneumonia": A})])
def test_what_only_looks_like_one(text, labels): assert got(text) == labels

LUNGS = {"Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"}
@pytest.mark.parametrize("text", ["The lungs are clear.", "Clear lungs", "lungs: clear", "The lungs are otherwise clear", "low volumes in both lungs but they are clear", "The lungs are clear bilaterally."])
def test_clear_lungs(text): assert got(text) == dict.fromkeys(LUNGS, A)

@pytest.mark.parametrize("text", ["The left lung is clear", "lungs are clear of consolidation", "the lungs are well expanded"])
def test_not_all_clear(text): assert not LUNGS - {"Consolidation"} & set(got(text))

def test_the_stronger_statement_wins():
    assert got("No effusion. Possible effusion.") == got("Possible effusion. No effusion.") == {"Pleural Effusion": U}
    assert got("Lungs are clear. A nodule in the right lung.")["Lung Lesion"] == P

@pytest.mark.parametrize("text, there", [("Normal chest.", 1), ("No acute disease.", 1), ("No acute cardiopulmonary abnormality.", 1), ("PICC line. Lungs clear.", 1), ("No effusion.", 1), ("Effusion.", 0), ("Possible effusion.", 0), ("", 0), ("left lung", 0), ("no", 0), ("yes", 0), ("axial CT", 0)])
def test_no_finding(text, there): assert ("No Finding" in find_findings(text)) == there

def test_names_and_order():
    assert len(FINDINGS) == len(set(FINDINGS)) == 14 and FINDINGS[-1] == "No Finding" and STATUSES == ("absent", "uncertain", "present")
    found = find_findings("Tube. Fracture. Effusion. Cardiomegaly. No nodule.")
    assert list(found) == [f for f in FINDINGS if f in found] and set(found.values()) <= set(STATUSES)

def test_damaged_text_is_no_error():
    rng, text = random.Random(0), "The heart is mildly enlarged; no pneumothorax, effusion or consolidation? Opacity may represent pneumonia/atelectasis vs. mass.\n"
    for _ in range(400):
        damaged = "".join(rng.choice([c, c, c, c, "", rng.choice("\0\ufffd\n.,;?/é\ud800 ")]) for c in text)
        assert set(find_findings(damaged)) <= set(FINDINGS)
    for odd in ("", " ", "\n", "\0", "...", "???", "\ud800"): assert find_findings(odd) == {}

@pytest.mark.parametrize("text", ["a" * 100_000, "no " * 33_000, "effusion " * 11_000, "not significant interval " * 4_000, "normal heart " * 7_000, ", the " * 16_000, "no effusion, " * 7_500, " " * 100_000, "." * 100_000, "the a b c d " * 8_000, "and the a b " * 8_000, "or " * 33_000, "/" * 100_000, "effusion. " * 10_000, "history of " * 9_000])
def test_long_text_takes_linear_time(text):
    def seconds(text): start = time.process_time(); find_findings(text); return time.process_time() - start
    whole = seconds(text)
    assert whole < 2 or whole < 20 * seconds(text[:len(text) // 8]) # 8 times the text

def test_fast_enough_for_a_whole_data_set():
    reports = [f"The heart is mildly enlarged, {i}. No pneumothorax or effusion in bed {i}. Left basilar opacity {i} may represent pneumonia or atelectasis. PICC line tip {i} cm above the carina." for i in range(1000)]
    start = time.process_time()
    for report in reports: find_findings(report)
    assert time.process_time() - start < 3 # nothing repeats here; about 0.4 s on two old cores

def test_indiana_reports_beside_their_index(real_data):
    with open(real_data/"iu_xray_kaggle"/"indiana_reports.csv", newline="", encoding="utf-8") as f: rows = [r for r in csv.DictReader(f) if r["findings"] or r["impression"]]
    found = [find_findings(f"{r['findings']}\n{r['impression']}") for r in rows]
    for finding, word, least in (("Cardiomegaly", "Cardiomegaly", .89), ("Pleural Effusion", "Pleural Effusion", .91), ("Atelectasis", "Pulmonary Atelectasis", .89), ("Consolidation", "Consolidation", .88), ("Fracture", "Fractures, Bone", .87)):
        said, true = ({i for i, f in enumerate(found) if f.get(finding) == P}, {i for i, r in enumerate(rows) if word in r["Problems"].split(";")})
        assert 2 * len(said & true) / (len(said) + len(true)) > least, finding
