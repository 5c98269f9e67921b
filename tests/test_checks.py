"Finding checks and report drafts: statuses from scripted probabilities, forms that are always kept, an image that is read once."
import json
from dataclasses import asdict
import numpy as np
import pytest
from PIL import Image
from medchat.checks import (CANNOT, MASS, NO, PROCEDURES, QUESTIONS, SCHEMAS, SECTIONS, SENTENCE, SHORT, SITES, SURE, WHAT, YES, check_finding, check_findings, decide,
                            disagreements, draft_report, FindingCheck, longest, section_form, show_checks, taught)
from medchat.core import DISCLAIMER, MedchatError
from medchat.engines import LocalEngine
from medchat.findings import FINDINGS, find_findings
from medchat.messages import user_message
from medchat.models import load_model
from medchat.remote import RemoteEngine, misfit
from medchat.shapes import draw_shapes
from run_maker import make_hollow_run
from chat_server import ChatServer, last_text

class Scripted:
    "An engine with the probabilities and words that it was given."
    name, host, identity = "scripted", "", {}
    def __init__(self, chances=(), said="right side.", has_probabilities=True):
        self.chances, self.said, self.has_probabilities, self.asked, self.forms = dict(chances), said, has_probabilities, [], []
    def new_memory(self): return object()
    def choose(self, messages, images, choices, memory=None):
        assert self.has_probabilities, "asked for what it has not"
        return [self.chances.get(c, 0.) for c in choices]
    def stream(self, messages, images, max_new_tokens=128, stop=None, form=None, memory=None):
        self.asked.append([(m["role"], m["content"][-1]["text"]) for m in messages])
        self.forms.append(form)
        yield self.said if "enum" not in form else CANNOT if CANNOT in form["enum"] else form["enum"][0]

film = Image.new("RGB", (64, 64))

# ---- statuses

@pytest.mark.parametrize("p, mass, status", [(1., 1., "present"), (SURE, 1., "present"), (SURE - 1e-9, 1., "indeterminate"), (.5, 1., "indeterminate"), (1 - SURE + 1e-9, 1., "indeterminate"),
                                             (1 - SURE, 1., "absent"), (0., 1., "absent"), (1., MASS, "present"), (1., MASS - 1e-9, "indeterminate"), (0., 0., "indeterminate")])
def test_the_status_comes_from_two_numbers(p, mass, status): assert decide(p, mass) == status

@pytest.mark.parametrize("chances, status, reply, probability, mass", [
    (dict(yes=.5, Yes=.45, no=.05), "present", "yes", .95, 1.), (dict(yes=.02, no=.5, No=.4), "absent", "no", .02/.92, .92),
    (dict(yes=.5, no=.4), "indeterminate", "yes", .5/.9, .9), (dict(yes=.3, no=.01), "indeterminate", "yes", .3/.31, .31), ({}, "indeterminate", "yes", .5, 0.), (dict(yes=.7, no=.4), "indeterminate", "yes", .7/1.1, 1.)])
def test_spellings_are_added_up(chances, status, reply, probability, mass):
    check = check_finding(Scripted(chances), film, "Edema")
    assert (check.status, check.reply) == (status, reply)
    assert check.probability == pytest.approx(probability) and check.mass == pytest.approx(mass)

def test_the_words_do_not_decide():
    check = check_finding(Scripted(dict(yes=.99), "There is no effusion at all."), film, "Pleural Effusion")
    assert check.status == "present" and check.reason == "There is no effusion at all."

def test_another_threshold():
    engine = Scripted(dict(yes=.75, no=.25))
    assert [check_finding(engine, film, "Edema", sure=s).status for s in (.7, .8)] == ["present", "indeterminate"]
    for s in (.5, 1.01, float("nan")):
        with pytest.raises(MedchatError, match="above 0.5"): check_finding(engine, film, "Edema", sure=s)

@pytest.mark.parametrize("chances, finding, follow", [(dict(yes=.99), "Pleural Effusion", "Where is the pleural effusion?"), (dict(no=.99), "Pleural Effusion", WHAT), (dict(yes=.5, no=.5), "Pleural Effusion", WHAT),
                                                      (dict(yes=.99), "Cardiomegaly", WHAT), (dict(yes=.99), "No Finding", WHAT)])
def test_the_reason_is_asked_for_in_the_same_conversation(chances, finding, follow):
    engine = Scripted(chances)
    check = check_finding(engine, film, finding)
    assert engine.asked == [[("user", QUESTIONS[finding][0]), ("assistant", check.reply), ("user", follow)]]
    assert check.reason_question == follow and engine.forms == [SENTENCE]

@pytest.mark.parametrize("said, reason", [("right side", "right side."), ("right side.", "right side."), (" It is 3.5 cm wide", "It is 3.5 cm wide."), ("really?", "really?")])
def test_one_sentence_with_its_full_stop(said, reason): assert check_finding(Scripted(dict(yes=.99), said), film, "Edema").reason == reason

def test_what_was_never_taught_gets_no_verdict():
    engine = Scripted(dict(yes=.999))
    check = check_finding(engine, film, "Fracture", n_training=0)
    assert check.status == "indeterminate" and check.probability == 1. and not engine.asked and not check.reason_question
    assert check_finding(engine, film, "Fracture", n_training=1).status == "present"

def test_an_unknown_finding():
    with pytest.raises(MedchatError, match="no such finding: edema. One of: Enlarged"): check_finding(Scripted(), film, "edema")

def test_every_finding_has_a_question_that_names_it():
    assert list(QUESTIONS) == list(FINDINGS)
    for finding, (question, place) in QUESTIONS.items():
        assert finding in find_findings(question)
        if place: assert finding in find_findings(f"Where is the {place}?")

# ---- without probabilities

def test_an_engine_without_probabilities_chooses_itself():
    engine = Scripted(has_probabilities=False)
    check = check_finding(engine, film, "Edema")
    assert (check.status, check.reply, check.probability, check.mass) == ("indeterminate", CANNOT, None, None)
    assert engine.forms[0] == dict(enum=["yes", "no", CANNOT])
    assert "no probability" in show_checks([check])

@pytest.mark.parametrize("word, status", [("yes", "present"), ("no", "absent"), (CANNOT, "indeterminate")])
def test_a_server_that_gives_none(word, status):
    "It turns out at the first question; 1.0 for what it said is no probability and is not taken for one."
    reply = lambda body: "left lung" if last_text(body).startswith(("Where", "What")) else word
    with ChatServer(reply=reply, ignores={"logprobs"}) as server:
        check = check_finding(RemoteEngine(server.url, "mute"), film, "Pneumothorax")
    assert (check.status, check.probability, check.mass, check.reason) == (status, None, None, "left lung.")

def test_a_server_that_gives_them():
    reply = lambda body: "left lung" if last_text(body).startswith("Where") else "yes"
    with ChatServer(reply=reply, alternatives={"yes": {"no": .05}}) as server:
        check = check_finding(RemoteEngine(server.url, "able"), film, "Pneumothorax")
    assert check.status == "present" and SURE < check.probability <= 1 and 0 < check.mass <= 1 and check.reason == "left lung."

# ---- the table

def test_a_table_of_fourteen():
    checks = check_findings(Scripted(dict(yes=.97, no=.01)), film, known={"Edema": 7})
    assert next(checks).finding == FINDINGS[0] # one by one
    checks = list(check_findings(Scripted(dict(yes=.97, no=.01)), film, known={"Edema": 7}))
    assert [c.finding for c in checks if c.status == "present"] == ["Edema"] and {c.n_training for c in checks} == {0, 7}
    table = show_checks(checks)
    assert all(finding in table for finding in FINDINGS) and table.endswith(DISCLAIMER) and "██████████ 0.99" in table
    assert {c.n_training for c in check_findings(Scripted(dict(yes=.97)), film)} == {None}
    json.dumps([asdict(c) for c in checks])

# ---- what it was taught

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from medchat.core import Record, Turn, write_jsonl
    from medchat.curate import convert
    from medchat.runs import data_hash
    place = tmp_path_factory.mktemp("taught")
    rows = [("a", "vqa", "Is there a pleural effusion?", "no"), ("b", "vqa", "Is there a pleural effusion?", "yes"), ("c", "vqa", "What is seen?", "a right nodule"), ("d", "vqa", "Is the film normal?", "yes"),
            ("e", "report", "Write a report.", "Rib fracture. No pneumothorax."), ("f", "vqa", "Is there a tube?", "no"), ("t", "vqa", "Is there edema?", "yes")]
    (place/"source").mkdir()
    for i, (name, *_) in enumerate(rows): Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40), dtype="uint8")).save(place/"source"/f"{name}.png")
    write_jsonl(place/"source"/"records.jsonl", (Record(n, [f"{n}.png"], [Turn("user", q), Turn("assistant", a)], kind, split="test" if n == "t" else "train").to_dict() for n, kind, q, a in rows))
    data = convert(place/"source", place/"data", keep_splits=True)
    return place, data, data_hash(data)

def test_taught_counts_the_training_conversations(folder):
    place, data, sha = folder
    counts = lambda **config: {k: v for k, v in taught(make_hollow_run(place/"run", data=str(data), **config)).items() if v}
    assert counts(data_sha256=sha) == {"Pleural Effusion": 2, "Lung Lesion": 1, "No Finding": 1, "Fracture": 1, "Pneumothorax": 1, "Support Devices": 1} # edema: test split only
    assert counts(data_sha256=sha, kinds="report") == {"Fracture": 1, "Pneumothorax": 1}

def test_nobody_knows_what_was_taught(folder):
    place, data, sha = folder
    assert taught(make_hollow_run(place/"changed", data=str(data), data_sha256="0"*64)) is None
    assert taught(make_hollow_run(place/"gone", data=str(place/"gone_data"), data_sha256=sha)) is None
    with pytest.raises(MedchatError, match="not a run folder"): taught(place)

# ---- real engines of three families

@pytest.fixture(scope="module", params=["qwen2-vl", "llama-3.2-vision", "llava-1.6"])
def engine(request):
    base = f"tiny-{request.param}"
    return LocalEngine(*load_model(base), base)

def images():
    rng = np.random.default_rng(5)
    return [Image.fromarray(draw_shapes(rng)[0]), Image.new("RGB", (90, 60), "white"), Image.fromarray(rng.integers(0, 255, (70, 110, 3), dtype="uint8"))]

def test_checks_end_to_end_and_the_image_is_read_once(engine):
    picture, seen = images()[0], []
    tower = next(m for name, m in engine.model.named_modules() if name.endswith(("visual", "vision_tower", "vision_model")))
    hook = tower.register_forward_hook(lambda *a: seen.append(1))
    try: checks = list(check_findings(engine, picture, ["Pleural Effusion", "Cardiomegaly", "No Finding"]))
    finally: hook.remove()
    assert len(seen) == 1
    for c in checks:
        fresh = check_finding(engine, picture, c.finding) # reading everything anew says the same
        assert (c.status, c.reply, c.reason) == (fresh.status, fresh.reply, fresh.reason)
        assert c.probability == pytest.approx(fresh.probability, abs=2e-3) and 0 <= c.mass <= 1
        assert c.status == decide(c.probability, c.mass) and "\n" not in c.reason and 1 < len(c.reason) <= 162 and c.reason[-1] in ".!?"

def test_probabilities_are_those_of_the_model(engine):
    "What `choose` says of the first words is what the free reply begins with."
    picture, ask = images()[0], [user_message(QUESTIONS["Edema"][0], 1)]
    said, check = "".join(engine.stream(ask, [picture])), check_finding(engine, picture, "Edema")
    yes, no = check.probability*check.mass, (1 - check.probability)*check.mass
    if said in YES: assert yes >= no
    if said in NO: assert no >= yes
    assert engine.choose(ask, [picture], [*YES, *NO]) == pytest.approx([*engine.choose(ask, [picture], YES), *engine.choose(ask, [picture], NO)], abs=1e-4)

def test_drafts_always_obey_their_schema(engine):
    for kind, picture in [("radiology", p) for p in images()] + [("endoscopy", images()[2])]:
        draft = draft_report(engine, picture, kind)
        assert misfit(json.loads(json.dumps(draft.data)), SCHEMAS[kind]) == ""
        assert list(draft.data) == [*SECTIONS[kind], "disclaimer"] and draft.text.endswith(DISCLAIMER)
        assert {name for name, p in draft.probability.items() if p is None} == ({"clinical_info"} if kind == "endoscopy" else set())
        assert all(0 < p <= 1 for p in draft.probability.values() if p is not None)

def test_a_whole_object_always_closes(engine):
    form = section_form("anatomical_findings", SCHEMAS["endoscopy"]["properties"]["anatomical_findings"])
    for picture in images()[:2]:
        memory = engine.new_memory()
        text = "".join(engine.stream([user_message("What is seen?", 1)], [picture], longest(form), form=form, memory=memory))
        assert misfit(json.loads(text), form) == "" and len(memory.tokens) <= len(text.encode()) + 1 <= longest(form) + 1

# ---- drafts

def test_the_longest_object_is_as_long_as_said():
    form = section_form("anatomical_findings", SCHEMAS["endoscopy"]["properties"]["anatomical_findings"])
    full = dict(anatomical_findings=[dict(site=max(SITES, key=len), finding="\U00020000"*SHORT)]*3) # letters of four bytes
    assert misfit(full, form) == ""
    text = json.dumps(full, ensure_ascii=False, separators=(",", ":"))
    assert len(text.encode()) <= longest(form) <= len(text.encode()) + 10
    assert longest(dict(enum=list(PROCEDURES))) >= max(map(len, PROCEDURES))

@pytest.mark.parametrize("finding", ["", " polyp", 'a "polyp"', "a\\b", "two\nlines", "x"*(SHORT + 1)])
def test_what_could_not_be_written_plainly_is_no_finding(finding):
    part = SCHEMAS["endoscopy"]["properties"]["anatomical_findings"]
    assert misfit([dict(site="pylorus", finding=finding)], part)
    assert not misfit([dict(site="pylorus", finding="polyp, 3.5 mm; Größe?")], part)

class Tokened(Scripted):
    "Keeps tokens, as a real memory does."
    def new_memory(self): return type("M", (), dict(tokens=[("right", .25), (" side", 1.)]))()

@pytest.mark.parametrize("finding, status, report, want", [
    ("Edema", "present", "No pulmonary edema.", "the report calls it absent"), ("Edema", "present", "Possible pulmonary edema.", "the report is not certain"), ("Edema", "present", "A fracture.", "the report does not name it"),
    ("Edema", "present", "Pulmonary edema.", ""), ("Edema", "absent", "Pulmonary edema.", "the report calls it present"), ("Edema", "indeterminate", "Pulmonary edema.", "the report calls it present"), ("Edema", "absent", "No edema.", ""),
    ("Edema", "absent", "Possible edema.", ""), ("No Finding", "present", "A left pleural effusion.", "the report names a finding"), ("No Finding", "absent", "No pneumothorax.", "the report names none"), ("No Finding", "present", "No pneumothorax.", ""),
    ("No Finding", "absent", "A left pleural effusion.", "")])
def test_what_a_report_says_otherwise(finding, status, report, want):
    check = FindingCheck(finding, status, "", "", .93, 1.)
    assert disagreements([check], report) == ([f"{finding}: the finding check says {status} (0.93), {want}."] if want else [])

def test_a_check_and_its_own_sentences():
    said = [FindingCheck("Edema", "absent", "", "no", .02, 1., WHAT, "a left effusion."), FindingCheck("Pleural Effusion", "indeterminate", "", "no", .3, 1., WHAT, "a left effusion."), FindingCheck("Pneumothorax", "present", "", "yes", .95, 1., "Where is the pneumothorax?", "left.")]
    assert disagreements(said) == ["Pleural Effusion: the finding check says indeterminate (0.30), its own sentence calls it present."]
    assert disagreements([FindingCheck("Pleural Effusion", "indeterminate", "", "no", .3, 1., reason="The training data never name it.", n_training=0)], "A left effusion.") == []

def test_sections_are_asked_in_one_conversation():
    engine = Tokened(said="left effusion")
    draft = draft_report(engine, film)
    assert draft.data == dict(findings="left effusion", impression="left effusion", disclaimer=DISCLAIMER)
    assert [text for _, text in engine.asked[1]] == [WHAT, "left effusion", SECTIONS["radiology"]["impression"][1]]
    assert draft.probability == dict(findings=pytest.approx(.5), impression=pytest.approx(.5))
    assert draft.text == f"Findings\nleft effusion\n\nImpression\nleft effusion\n\n{DISCLAIMER}"

def test_given_sections_are_kept_and_told():
    engine = Scripted(said="effusion")
    draft = draft_report(engine, film, given=dict(findings="Left effusion, corrected."))
    assert draft.data["findings"] == "Left effusion, corrected." and engine.asked[0][1] == ("assistant", "Left effusion, corrected.") and len(engine.asked) == 1
    assert draft.probability == dict(findings=None, impression=None)

@pytest.mark.parametrize("kind, given, wrong", [("radiology", dict(findings="x"*401), "length of 401"), ("radiology", dict(impression=7), "impression is no string"), ("radiology", dict(plan="rest"), "no such section: plan"),
                                                ("endoscopy", dict(anatomical_findings=[dict(site="moon", finding="x")]), "none of"), ("endoscopy", dict(procedure="Biopsy"), "none of"), ("letter", {}, "no such kind of report: letter")])
def test_what_is_given_has_to_fit(kind, given, wrong):
    said = Scripted(said="effusion")
    with pytest.raises(MedchatError, match=wrong): draft_report(said, film, kind, given={"clinical_info": "x", **given} if kind == "endoscopy" else given)

def test_a_remote_draft():
    words = dict(procedure="Upper gastrointestinal endoscopy", site="gastric antrum erosions")
    reply = lambda body: next((said for asked, said in words.items() if asked in last_text(body)), "Erosive gastritis.")
    with ChatServer(reply=reply) as server:
        draft = draft_report(RemoteEngine(server.url, "far"), film, "endoscopy", given=dict(clinical_info="Pain."))
    assert misfit(draft.data, SCHEMAS["endoscopy"]) == "" and draft.data["anatomical_findings"] == [dict(site="gastric antrum", finding="gastric antrum erosions")]
    assert "- gastric antrum: gastric antrum erosions" in draft.text and draft.text.startswith("Clinical information\nPain.")
