"The report page: every score with its n, foreign text, missing parts, errors, the browser and the PDF."
import copy, io, json, os, re, shutil
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
import pytest
from hypothesis import given, strategies as st
from PIL import Image

import medchat.page as P, medchat.review as R, medchat.sections as S
from medchat.core import DISCLAIMER, MedchatError, read_jsonl, sample_data, write_jsonl
from medchat.curate import convert
from medchat.page import page_html, print_pdf, report
from medchat.scoring import guess_warnings
from medchat.review import alarms, find_images, pick_answers, plot_looks, plot_scores, read_evaluation
from medchat.sections import answer_html, score_cell
from run_maker import make_hollow_run, make_run

WORDS = "closed_accuracy open_recall caption_recall report_recall".split()


class Page(HTMLParser):
    "What stands on a page: tags with their attributes, headings, rows of tables, all text."
    def __init__(self, html):
        super().__init__()
        self.tags, self.rows, self.headings, self.text, self.inside = [], [], [], "", None
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr": self.rows.append([])
        if tag in ("td", "th"): self.rows[-1].append("")
        if tag in ("td", "th", "h1", "h2", "h3", "style"): self.inside = tag
        if tag in ("h1", "h2", "h3"): self.headings.append("")
    def handle_endtag(self, tag):
        if tag == self.inside: self.inside = None
    def handle_data(self, data):
        if self.inside == "style": return
        self.text += data
        if self.inside in ("td", "th"): self.rows[-1][-1] += data
        if self.inside in ("h1", "h2", "h3"): self.headings[-1] += data
    def having(self, tag): return [attrs for name, attrs in self.tags if name == tag]

@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    "A real run on the phantoms, really evaluated: (run, data)."
    import medchat.evaluate as E
    home = tmp_path_factory.mktemp("home")
    rows = [r for _, r in read_jsonl(sample_data()/"phantoms"/"records.jsonl")]
    few = {g for split, n in (("train", 8), ("test", 25)) for g in list(dict.fromkeys(r["group"] for r in rows if r["split"] == split))[:n]}
    rows = [r for r in rows if r["group"] in few]
    (home/"source"/"images").mkdir(parents=True)
    for path in {p for r in rows for p in r["images"]}: shutil.copy(sample_data()/"phantoms"/path, home/"source"/path)
    write_jsonl(home/"source"/"records.jsonl", rows)
    data = convert(home/"source", str(home/"films"), keep_splits=True)
    run = make_run(home/"chest"); shutil.rmtree(run/"eval") # a made-up one
    with pytest.MonkeyPatch.context() as few: # questions of the probes: the page only shows them
        for probe, much in (("probe_shapes", dict(count=20)), ("probe_wording", dict(most=16)), ("probe_impossible", dict(most=8))): few.setattr(E, probe, partial(getattr(E, probe), **much))
        E.evaluate([str(run)], str(data), limit=48, max_new_tokens=6)
    return run, data

@pytest.fixture(scope="module")
def made(evaluated): return read_evaluation(evaluated[0])

@pytest.fixture(scope="module")
def written(evaluated):
    "The page of the real run, with its images."
    run, data = evaluated
    return Path(report(str(run), data=str(data))).read_text(encoding="utf-8")

@pytest.fixture
def copied(evaluated, tmp_path):
    "A copy of the run without weights, to spoil, and a function that changes its evaluation."
    run = tmp_path/"chest"
    shutil.copytree(evaluated[0], run, ignore=shutil.ignore_patterns("adapter", "answers.jsonl", "*.html", "*.pdf"))
    def change(**new):
        file = run/"eval"/"test-48.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **new}))
    return run, change

def page_of(result, rows, images=lambda id: None): return Page(page_html(result, rows, dict(base="x", medchat="0"), images))


# --- what stands on it

def test_every_score_with_its_n(made, written):
    result, page = made[0], Page(written)
    for name in result["tuned"]:
        b, t, d = result["base"][name], result["tuned"][name], result["difference"][name]
        row = next(r for r in page.rows if r and r[0] == name.replace("_", " ") and len(r) == 9)
        assert row[1:3] == [f"{t['n']:,}", f"{t['groups']:,}"] and row[3] == f"{result['always_same'][name]:.3f}"
        for cell, s in ((row[4], b), (row[5], t)): assert cell == f"{s['value']:.3f} {s['low']:.2f}–{s['high']:.2f}"
        assert row[6].startswith(f"{100*d['value']:+.1f}".replace("-", "−")) and row[8] == f"{b['unparsed']} / {t['unparsed']}"

def test_every_text_score_slice_and_matrix(made, written):
    result, page = made[0], Page(written)
    for sort, scores in result["texts"]["tuned"].items():
        for name, s in scores.items(): assert any(r[:2] == [name.replace("_", " "), f"{s['n']:,}"] and r[3].startswith(f"{s['value']:.3f}") for r in page.rows if len(r) == 4), (sort, name)
    for part in result["slices"]:
        for name, s in part["tuned"].items(): assert any(r[0] == part["name"] + name.replace("_", " ") and r[1] == f"{s['n']:,}" and r[3].startswith(f"{s['value']:.3f}") for r in page.rows if len(r) == 5), part["name"]
    for who in ("base", "tuned"):
        for c in result["confusion"][who]:
            for right, counts in c["counts"].items(): assert any(r[0] == right and r[-1] == str(sum(counts.values())) and sorted(map(int, r[1:-1]), reverse=True)[:len(counts)] == sorted(counts.values(), reverse=True) for r in page.rows if r[-1].isdigit() and all(c.isdigit() for c in r[1:]))

def test_ablation_calibration_and_trust(made, written):
    result, page = made[0], Page(written)
    for change, words in R._IMAGES.items():
        for name, s in result["looks"].get(change, {}).items():
            assert any(r[:2] == [words, f"{s['n']:,}"] and r[2].startswith(f"{s['value']:.3f}") and r[3].startswith(f"{100*s['drop']['value']:+.1f}".replace("-", "−")) for r in page.rows if len(r) == 5), (change, name)
    for who in ("base", "tuned"):
        c = result["calibration"][who]
        assert any(r[:2] == [who, str(c["n"])] and r[2].startswith(f"{c['ece']:.3f}") and r[3] == f"{c['expected_ece']:.3f}" for r in page.rows)
    shares = {r[0]: r[1:] for r in page.rows if len(r) == 3}
    assert f"n = {result['shapes']['tuned']['n']}" in shares["Plain shapes: what it had learnt before"][1] and f"{result['shapes']['base']['value']:.3f}" in shares["Plain shapes: what it had learnt before"][0]
    assert f"n = {result['impossible']['n']}" in shares["Declined what no such image can show"][1]

def test_opening_and_order(made, written):
    result, page = made[0], Page(written)
    assert page.headings[0] == "chest" and DISCLAIMER in page.text and f"{len(made[1]):,} (" in page.text
    assert written.index("Read this first") < written.index("What it must not be used for") < written.index("What was evaluated") < written.index('id="scores"')
    assert result["warnings"] and all(x.rstrip(".").lower() in page.text.lower() for x in result["warnings"]) and "Only 48 of the split" in page.text
    found = re.findall(r'<section id="(\w+)"', written)
    assert found == "what scores texts slices confusion looks calibration trust answers repeat".split()
    assert [a["href"] for a in page.having("a")] == [f"#{k}" for k in found[1:]]
    assert "medchat evaluate chest --data films --limit 48 --max-new-tokens 6" in page.text and "medchat report chest --name test-48 --data films" in page.text

def test_no_number_without_n(made):
    "Every table with a score has an n in its head, in its rows or in its cells."
    page = page_html(*made, dict(base="x", medchat="0"), lambda id: None)
    for table in re.findall(r"<table.*?</table>", page):
        if "<b>" in table: assert ">n</th>" in table or "n = " in table, table[:200]

def test_blind_model_is_called_out(made, monkeypatch):
    monkeypatch.setattr(S, "figure_html", lambda *_, **__: "")
    result = copy.deepcopy(made[0])
    for name, s in result["looks"]["blank"].items(): s["drop"] = dict(value=0., low=-.1, high=.1, p=1.)
    assert page_of(result, []).text.count("nothing shows that it looks. It is not clearly") == len(result["looks"]["blank"])
    for change in result["looks"].values():
        for s in change.values(): s["drop"] = dict(value=.3, low=.2, high=.4, p=.001)
    assert "nothing shows that it looks. It is not" not in page_of(result, []).text

def test_leaks_and_notes_come_first(made):
    result = made[0] | dict(leaks=["3 images stand in train too"], notes=["known to leak: all"], warnings=[])
    assert alarms(result)[:2] == ["3 images stand in train too. The scores are too high.", "Known to leak: all."]
    page = page_html(result, [], {}, lambda id: None)
    assert page.index("3 images stand in train") < page.index('id="scores"')

def test_worse_than_guessing_and_than_before_is_said_first(made):
    s = lambda v, **more: dict(value=v, n=1234, groups=9, low=v - .05, high=v + .05, **more)
    about = lambda tuned, same, gain: alarms(made[0] | dict(warnings=guess_warnings(dict(tuned=(mine := dict(closed_accuracy=s(tuned))), always_same=same and dict(closed_accuracy=same))), notes=[], leaks=[], limit=None, tuned=mine, difference=dict(closed_accuracy=s(gain, p=.01))))
    assert about(.4, .5, .2) == ["Closed accuracy is 0.400; always giving the most frequent answer gets 0.500 (n=1,234)."] and about(.6, .5, .2) == about(.4, None, .2) == about(.6, .5, -.01) == []
    assert about(.6, .5, -.2) == ["Closed accuracy is worse than that of the untuned model (n=1,234)."]

def test_judge_benchmark_and_other_runs(made):
    s = lambda v: dict(value=v, n=30, groups=30, low=v - 5, high=v + 5)
    judge = dict(model="a <judge>", relative=s(81.25), candidate_mean=6.51, reference_mean=8.01, order_changed=dict(value=.1, n=30, groups=30, low=.05, high=.2), unread=1)
    result = made[0] | dict(benchmark="vqa-rad", judge=dict(base=None, tuned=judge), against=dict(other=made[0]["difference"]))
    html = page_html(result, [], {}, lambda id: None)
    page = Page(html)
    assert ["tuned", "30", "81.2 76–86", "6.51", "8.01", "0.100 0.05–0.20", "1"] in page.rows and "a &lt;judge&gt;" in html
    assert any(r[0] == "LLaVA-Med (from LLaVA)" and r[1].startswith("0.6152") and "2306.00890" in r[-1] for r in page.rows) and any(r[0] == "chest" and r[-1] == "this run" for r in page.rows)
    assert "Against other" in page.headings and "--benchmark vqa-rad" in page.text

def test_same_page_twice(made):
    assert page_html(*made, {}, lambda id: None) == page_html(*made, {}, lambda id: None)


# --- foreign text, this machine

EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)>\x1b[31m'

def test_foreign_text_is_escaped(made):
    result, rows = copy.deepcopy(made[0]), copy.deepcopy(made[1])
    for row in rows:
        for key in ("id", "question", "reference", "base", "tuned", "prompt"): row[key] = EVIL + row[key]
        row["types"], row["images"] = [EVIL], [EVIL + ".png"]
        for a in row["ablated"].values(): a["reply"] = EVIL
    for key in ("run", "base_name", "data", "split"): result[key] = "x" + EVIL
    result |= dict(leaks=[EVIL], warnings=[EVIL], notes=[EVIL], against={EVIL: result["difference"]}, versions={EVIL: EVIL}, slices=[dict(s, name=EVIL, by=EVIL) for s in result["slices"]])
    result["confusion"]["tuned"] = [dict(choices=[EVIL, "no"], counts={EVIL: {EVIL: 3, "unread": 1}})]
    result["wording"]["examples"] = [dict(id=EVIL, question=EVIL, reply=EVIL, wording=EVIL, its_reply=EVIL)]
    html = page_html(result, rows, dict(data=EVIL, steps=EVIL), lambda id: None)
    page = Page(html)
    assert not page.having("script") and not [a for _, attrs in page.tags for a in attrs if a.startswith("on")] and "\x1b" not in html
    assert page.text.count("<script>alert(1)</script>") > 20 # it is shown, as text
    assert all(a["src"].startswith("data:") for a in page.having("img")) and {name for name, _ in page.tags} == {name for name, _ in page_of(*made).tags} | {"h3"}

def test_self_contained(written):
    page = Page(written)
    assert not page.having("script") and not page.having("link") and not page.having("iframe")
    found = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset", "action", "data")]
    assert found and all(v.startswith(("data:image/", "#")) for v in found)
    style = re.search(r"<style>(.*?)</style>", written, re.S)[1]
    assert "url(" not in style and "@import" not in style and "http" not in style and "{" in style and "&gt;" not in style
    policy = next(a["content"] for a in page.having("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src" not in policy

def test_no_paths_of_this_machine(evaluated, made, written):
    home = str(evaluated[0].parent)
    assert home not in written and str(Path.home()) + "/" not in written and "secret-ward" not in written
    result = made[0] | dict(base_name=f"{home}/models/my-base", data=f"{home}/films", run=r"C:\Users\ada\runs\chest")
    page = page_of(result, made[1]).text
    assert home not in page and "my-base" in page and "ada" not in page and "--data films" in page

@pytest.mark.parametrize("value, shown", [("/data/ada/x", "x"), ("~/models/x", "x"), ("../x", "x"), (r"C:\runs\x", "x"), ("unsloth/Qwen2-VL", "unsloth/Qwen2-VL"), ("tiny-qwen2-vl", "tiny-qwen2-vl"), ("C:/runs/x", "x")])
def test_names(value, shown): assert R._name(value) == shown


# --- missing parts

MISSING = dict(looks={}, wording=None, impossible=None, shapes=None, always_same=None, slices=[], judge=None, notes=[], limit=None, warnings=[], benchmark=None, texts=dict(base={}, tuned={}), confusion=dict(base=[], tuned=[]),
    calibration=dict(base=None, tuned=None), mistakes=dict(base=dict(hallucinations=None, sides=None), tuned=dict(hallucinations=None, sides=None)))

@pytest.mark.parametrize("key", [*MISSING, "everything"])
def test_missing_parts(made, key, monkeypatch):
    if key not in ("looks", "always_same", "calibration", "everything"): monkeypatch.setattr(S, "figure_html", lambda *_, **__: "") # the figures do not change
    page = page_of(made[0] | (MISSING if key == "everything" else {key: MISSING[key]}), made[1])
    assert "Scores" in page.headings and "None" not in page.text and "nan" not in re.split(r"\W+", page.text)
    if key == "looks": assert "Does it look?" not in page.headings and "not tried with other images" in page.text
    if key == "everything": assert [x for x in page.headings if not x[-1].isdigit()] == ["chest", "Read this first", "What it must not be used for", "What was evaluated", "Scores", "Worst and best answers", "How to repeat it"]

@pytest.mark.parametrize("key", "looks wording impossible shapes judge notes limit benchmark seconds date".split())
def test_keys_that_need_not_be_there(made, key, monkeypatch):
    if key != "looks": monkeypatch.setattr(S, "figure_html", lambda *_, **__: "")
    assert "Scores" in page_of({k: v for k, v in made[0].items() if k != key}, made[1]).headings

def test_a_score_of_nothing_is_a_dash(made):
    nothing = dict(value=None, n=0, groups=0, low=None, high=None)
    result = copy.deepcopy(made[0]) | dict(always_same=dict(closed_accuracy=None), looks={})
    for who in ("base", "tuned"): result[who] = dict(closed_accuracy=nothing | dict(unparsed=0))
    result["difference"] = dict(closed_accuracy=nothing | dict(p=None))
    result["slices"] = [dict(by="type", name="x", base=dict(closed_accuracy=nothing), tuned=dict(closed_accuracy=nothing))]
    rows = page_of(result, []).rows
    assert ["closed accuracy", "0", "0", "–", "–", "–", "–", "–", "0 / 0"] in rows and ["xclosed accuracy", "0", "–", "–", "–"] in rows
    assert plot_scores(result) is None and plot_looks(result) is None and score_cell(None) == "–"

def test_pushed_run_without_answers(copied):
    "Answers of patients stay where they were made: the page of a pulled run has none, nor examples."
    run, change = copied
    (run/"eval"/"test-48.jsonl").unlink()
    result = json.loads((run/"eval"/"test-48.json").read_text())
    for part in (result["wording"], result["impossible"], result["mistakes"]["base"]["hallucinations"], result["mistakes"]["tuned"]["hallucinations"]): del part["examples"]
    change(**result); (run/"eval"/"test-48.json").write_text(json.dumps(result))
    page = Page(report(str(run)).read_text())
    assert "did not come with this run" in page.text and "Answers that changed" not in page.text and "Does it look?" in page.headings

def test_ablation_of_fewer_questions(made):
    "Questions without an image are not probed: the right score is then that of the probed ones."
    result = copy.deepcopy(made[0])
    s, own = result["looks"]["blank"]["closed_accuracy"], result["tuned"]["closed_accuracy"]
    assert R._looked(result)["closed_accuracy"]["right"] == {k: own[k] for k in ("value", "n", "low", "high")}
    s["n"] -= 1; s["right"] = .123
    assert R._looked(result)["closed_accuracy"]["right"] == dict(value=.123, n=s["n"], low=None, high=None)
    assert ["its own image", f"{s['n']}", "0.123", "–", "–"] in page_of(result, []).rows and plot_looks(result) is not None


# --- the best and the worst

row = st.fixed_dictionaries(dict(tuned_score=st.sampled_from([0., .25, .5, .75, 1.]), tuned_confidence=st.floats(0, 1), score=st.sampled_from(WORDS), group=st.sampled_from("abcdef")))

@given(st.lists(row, max_size=60), st.integers(1, 20))
def test_best_and_worst(rows, count):
    rows = [dict(r, id=f"{i:03}") for i, r in enumerate(rows)]
    worst, best = pick_answers(rows, count)
    for found, side in ((worst, [r for r in rows if r["tuned_score"] < .5]), (best, [r for r in rows if r["tuned_score"] >= .5])):
        ids, groups = [r["id"] for r in found], [r["group"] for r in found]
        assert len(set(ids)) == len(ids) <= count and set(ids) <= {r["id"] for r in side} and all(groups.count(g) <= 2 for g in groups)
        patients = {r["group"] for r in side}
        assert len(found) == min(count, sum(min(2, sum(r["group"] == g for r in side)) for g in patients)) # no place stays empty
        if len(patients) >= count: assert len(set(groups)) == len(groups) # no patient twice while there are others
        sign = 1 if found is worst else -1
        for name in WORDS: # of one kind and one patient, the one shown first is the worst of them
            for g in patients:
                mine = sorted((r for r in side if r["score"] == name and r["group"] == g), key=lambda r: (sign*r["tuned_score"], -r["tuned_confidence"], r["id"]))
                shown = [r for r in found if r["score"] == name and r["group"] == g]
                assert shown == mine[:len(shown)]
    assert (worst, best) == pick_answers(rows[::-1], count) # the order in the file does not matter

def test_the_surest_error_is_first_and_kinds_take_turns():
    rows = [dict(id=f"{k}{i}", score=k, group=f"{k}{i}", tuned_score=0., tuned_confidence=1 - i/10) for k in WORDS[:2] for i in range(5)]
    assert [r["id"] for r in pick_answers(rows, 4)[0]] == ["closed_accuracy0", "open_recall0", "closed_accuracy1", "open_recall1"] and pick_answers(rows)[1] == [] and pick_answers([]) == ([], [])

def test_cards(evaluated, made, written):
    worst, best = pick_answers(made[1])
    page = Page(written)
    assert f"Worst {len(worst)}" in page.headings and f"Best {len(best)}" in page.headings
    assert len(page.having("article")) == len(worst) + len(best) == len([a for a in page.having("img") if a.get("alt", "").startswith("image ")]) and not [a for a in page.having("div") if a.get("class") == "missing"]
    for r in worst + best: assert r["id"] in page.text and r["question"][:100] in page.text


# --- images

def test_where_images_come_from(evaluated, made, tmp_path):
    (run, data), (result, rows) = evaluated, made
    for config in (dict(data=str(data)), dict(data=str(data.with_name("train-data")))): # that of the training, or one beside it with the right name
        images, note = find_images(result, config)
        assert note == "" and images(rows[0]["id"])[0]["bytes"] == (sample_data()/"phantoms"/rows[0]["images"][0]).read_bytes() and images("nobody") is None
    for config, why in ((dict(data="/nowhere/films"), "was not found"), ({}, "was not found"), (dict(data=None), "was not found")):
        images, note = find_images(result, config)
        assert why in note and images(rows[0]["id"]) is None and "nowhere" not in note
    images, note = find_images(result | dict(data_sha256="0" * 64), dict(data=str(data)))
    assert "has changed since" in note and images(rows[0]["id"]) is None
    with pytest.raises(MedchatError, match="not the data that was evaluated: .*evaluate again"): find_images(result | dict(data_sha256="0" * 64), dict(data=str(data)), str(data))
    with pytest.raises(MedchatError, match="no such dataset folder: nowhere"): find_images(result, {}, "nowhere")
    with pytest.raises(MedchatError, match="not a dataset folder"): find_images(result, {}, str(tmp_path))

def test_note_for_a_page_without_images(copied, capsys):
    page = Page(report(str(copied[0])).read_text())
    assert "Without images: the dataset folder films was not found" in page.text and [a for a in page.having("div") if a.get("class") == "missing"] and "Without images" in capsys.readouterr().out

def test_bad_and_many_images(made):
    noise = io.BytesIO(); Image.effect_noise((3000, 2000), 90).save(noise, "PNG")
    good, bad, none = dict(bytes=noise.getvalue(), path="a.png"), dict(bytes=b"no image at all", path="b.png"), dict(bytes=None, path="c.png")
    row = made[1][0] | dict(images=["a.png", "b.png", "c.png", "d.png"])
    html = S.h.to_xml(answer_html(row, [good, bad, none]), indent=False)
    src = Page(html).having("img")
    assert len(src) == 1 and len(src[0]["src"]) < 40_000 and max(int(src[0]["width"]), int(src[0]["height"])) == S.SIDE and html.count("no image") == 1 and "and 2 more" in html
    for images in (None, [], [bad], [none]): assert "no image" in S.h.to_xml(answer_html(made[1][0], images), indent=False)
    assert "asked without an image" in S.h.to_xml(answer_html(made[1][0] | dict(images=[]), None), indent=False)

def test_long_texts_are_cut_and_the_page_stays_small(made, written):
    rows = [dict(r, tuned="word " * 50_000, reference="x" * 100_000, question="y" * 100_000) for r in made[1]]
    assert len(page_html(made[0], rows, {}, lambda id: None)) < 700_000 and len(written) < 1_500_000


# --- errors

def test_not_evaluated(tmp_path, evaluated):
    with pytest.raises(MedchatError, match="not a run folder"): report(str(tmp_path))
    with pytest.raises(MedchatError, match="not a run folder: nowhere"): report("nowhere")
    run = make_hollow_run(tmp_path/"new"); shutil.rmtree(run/"eval")
    with pytest.raises(MedchatError, match="not evaluated yet: .*Next: medchat evaluate .*new --data DIR"): report(str(run))
    with pytest.raises(MedchatError, match="no such evaluation: slake. There is: test-48"): report(str(evaluated[0]), name="slake")

def test_older_format(tmp_path):
    with pytest.raises(MedchatError, match="another version of medchat: .*test.json: no run, base_name.*Repeat: medchat evaluate"): report(str(make_hollow_run(tmp_path/"old")))

@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": "x"}', "\xff\xfe", "null"])
def test_damaged_scores(copied, text):
    (copied[0]/"eval"/"test-48.json").write_text(text, encoding="latin-1")
    with pytest.raises(MedchatError, match="evaluation file.*Repeat: medchat evaluate"): report(str(copied[0]))
    assert not list((copied[0]/"eval").glob("*.html"))

@pytest.mark.parametrize("new", [dict(tuned=dict(closed_accuracy=dict(value=.5))), dict(slices=[3]), dict(confusion=None), dict(calibration=dict(base=None)), dict(mistakes={}), dict(texts=[]), dict(base=None), dict(tuned=[])])
def test_scores_of_another_shape(copied, new):
    run, change = copied
    change(**new); (run/"eval"/"test-48.jsonl").unlink()
    with pytest.raises(MedchatError, match="Repeat: medchat evaluate"): report(str(run))
    assert not list((run/"eval").glob("*.html")) and not list((run/"eval").glob(".*"))

def test_damaged_answers(copied):
    run, _ = copied
    file = run/"eval"/"test-48.jsonl"; lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(MedchatError, match="not those of the scores: test-48.jsonl has 47, test-48.json 48"): report(str(run))
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:50])
    with pytest.raises(MedchatError, match="damaged file of answers: .*test-48.jsonl:48. Repeat"): report(str(run))
    file.write_text("\n".join(json.dumps({k: v for k, v in json.loads(x).items() if k != "tuned_score"}) for x in lines))
    with pytest.raises(MedchatError, match="does not hold what it should: .*KeyError"): report(str(run))

def test_the_newest_evaluation(copied):
    run, change = copied
    old = run/"eval"/"test-48.json"
    for name, age in (("test", 50), ("vqa-rad", 10)):
        (run/"eval"/f"{name}.json").write_text(json.dumps(json.loads(old.read_text()) | dict(name=name)))
        os.utime(run/"eval"/f"{name}.json", (1e9 - age, 1e9 - age))
    os.utime(old, (1e9 - 100, 1e9 - 100))
    assert read_evaluation(run)[0]["name"] == "vqa-rad" and read_evaluation(run, "test")[0]["name"] == "test" and read_evaluation(run, "test-48.json")[0]["name"] == "test-48"
    os.utime(run/"eval"/"test.json", (1e9 - 10, 1e9 - 10))
    assert read_evaluation(run)[0]["name"] == "test" # of the same age
    day = json.loads(old.read_text())["date"]
    assert f"test.json, evaluated on {day}" in report(str(run), name="test").read_text()
    (run/"eval"/"test.json").write_text(json.dumps({k: v for k, v in json.loads(old.read_text()).items() if k != "date"})); os.utime(run/"eval"/"test.json", (1e9, 1e9))
    assert "test-48.json, written on 2001-09-09" in report(str(run), name="test").read_text() # an older file has none: then the day of the file

def test_where_it_is_written(copied, tmp_path, no_write, monkeypatch):
    run, _ = copied
    monkeypatch.setattr(S, "figure_html", lambda *_, **__: "") # as in every page
    assert report(str(run)) == run/"eval"/"test-48.html"
    assert report(str(run), out=str(tmp_path/"new"/"a.htm")).is_file()
    for out in ("report.pdf", "report", str(tmp_path)):
        with pytest.raises(MedchatError, match="not the name of an HTML page"): report(str(run), out=out)
    with pytest.raises(MedchatError, match="cannot write"): report(str(run), out=str(no_write/"a.html"))


# --- the PDF, and the browser

def test_no_browser(copied, monkeypatch, tmp_path):
    monkeypatch.setattr(P.shutil, "which", lambda name: None); monkeypatch.setattr(P, "_ELSEWHERE", ()); monkeypatch.setattr(P.Path, "home", lambda: tmp_path); monkeypatch.delenv("LOCALAPPDATA", raising=False)
    with pytest.raises(MedchatError, match="a PDF needs a browser.*apt-get install chromium.*playwright install chromium"): report(str(copied[0]), pdf=True)
    assert not list((copied[0]/"eval").glob("*.html"))
    brought = tmp_path/".cache/ms-playwright/chromium-1200/chrome-linux64/chrome"
    brought.parent.mkdir(parents=True); brought.write_text("")
    assert P.find_browser() == str(brought)

@pytest.mark.parametrize("does", ["exit 3", "echo no display >&2", "for a in \"$@\"; do case $a in --print-to-pdf=*) echo hello > \"${a#*=}\";; esac; done", "sleep 60"])
def test_a_browser_that_does_not_print(tmp_path, monkeypatch, does):
    fake = tmp_path/"chromium"; fake.write_text(f"#!/bin/sh\n{does}\n"); fake.chmod(0o755); (tmp_path/"a.html").write_text("x")
    monkeypatch.setattr(P, "find_browser", lambda: str(fake))
    with pytest.raises(MedchatError, match="the browser did not print: chromium.*Open the page in any browser"): print_pdf(tmp_path/"a.html", tmp_path/"a.pdf", wait=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "chromium"]

def test_pdf(evaluated, chromium, tmp_path):
    page = report(str(evaluated[0]), data=str(evaluated[1]), out=str(tmp_path/"a page.html"), pdf=True)
    pdf = page.with_suffix(".pdf").read_bytes()
    assert pdf.startswith(b"%PDF-") and b"%%EOF" in pdf[-1024:] and len(re.findall(rb"/Type\s*/Page\b", pdf)) > 3 and len(pdf) < 5_000_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a page.html", "a page.pdf"]

@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_the_browser(browser, written, tmp_path, width, scheme):
    (page := tmp_path/"page.html").write_text(written, encoding="utf-8")
    context = browser.new_context(viewport=dict(width=width, height=844), color_scheme=scheme)
    tab, said, asked = context.new_page(), [], []
    tab.on("console", lambda m: said.append(m.text)); tab.on("pageerror", lambda e: said.append(str(e))); tab.on("request", lambda r: asked.append(r.url))
    tab.goto(page.as_uri()); tab.wait_for_load_state("load")
    assert not said and [a for a in asked if not a.startswith("data:")] == [page.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    over = tab.evaluate("[...document.querySelectorAll('h1,h2,h3,p,dd,dt,li,article,pre')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))")
    assert not over
    cut = tab.evaluate("[...document.querySelectorAll('.scroll')].filter(e => e.querySelector('table') && e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60))")
    assert not cut # no table needs to be scrolled
    dark = sum(map(int, re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])) < 200
    assert dark == (scheme == "dark")
    context.close()
