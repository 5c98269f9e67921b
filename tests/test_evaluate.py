"Evaluation: what is asked, what is counted, what is written, what is refused."
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
import medchat.answers as A
import medchat.evaluate as E
import medchat.probes as P
from judge_server import JudgeServer
from medchat import judge as judge_module
from medchat.core import MedchatError
from medchat.curate import convert, read_dataset
from medchat.evaluate import evaluate, leaks_of, look_table, read_questions, trust_lines
from medchat.runs import data_hash
from medchat.scoring import show_p
from question_maker import data, dataset, Fake, fake_answers, KNOWN, make_data, make_rows, questions # with the fixtures
from test_benchmarks import vqa_rad

root = Path(__file__).resolve().parent.parent

@pytest.fixture
def a_run(tmp_path):
    "A run that needs no training: its adapter is its name."
    def make(name="run", adapter=None, **config):
        (tmp_path/name/"adapter").mkdir(parents=True)
        (tmp_path/name/"config.json").write_text(json.dumps(dict(medchat="0", base="tiny-qwen2-vl", base_sha256="aa", load_in_4bit=True) | config))
        (tmp_path/name/"adapter"/"adapter_model.safetensors").write_text(adapter or name); (tmp_path/name/"adapter"/"adapter_config.json").write_text("{}")
        return tmp_path/name
    return make

@pytest.fixture
def fake(monkeypatch):
    "Replaces the model: base says no, tuned knows FACTS. Records each batch."
    box = dict(calls=[], shapes=[], loaded=[], say=lambda on, q, images: KNOWN.get(q, "no") if on else "no")
    def load(run): box["loaded"].append(Path(run).name); return Fake(), None
    monkeypatch.setattr(A, "answer_prompts", lambda *a: fake_answers(box["say"], box["calls"])(*a))
    monkeypatch.setattr(P, "answer_prompts", lambda *a: fake_answers(lambda on, q, images: "left" if on else "right", box["shapes"])(*a))
    monkeypatch.setattr(E, "load_run", load); monkeypatch.setattr(E, "template_text", lambda processor, prompt, _: " / ".join(part.get("text") or "<image>" for m in prompt for part in m["content"]))
    box["asked"] = lambda adapter=None: sum(len(c["messages"]) for c in box["calls"] if adapter in (None, c["adapter"]))
    return box

@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    "Intervals and p-values have tests of their own: here 50 draws are enough."
    from medchat import metrics
    for f in (metrics.bootstrap_interval, metrics.paired_difference): monkeypatch.setattr(f, "__defaults__", tuple(50 if x in (2000, 5000) else x for x in f.__defaults__))

def quick(runs, data, **more): return evaluate(runs, data, **dict(probes=False) | more)
def read(path): return json.loads(path.read_text(encoding="utf-8"))
def rows_of(path): return [json.loads(line) for line in open(path, encoding="utf-8")]
def files(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}
def but(result, *keys): return {k: v for k, v in result.items() if k not in keys}


# --- what is written

@pytest.mark.parametrize("probes", [True, False])
def test_evaluate_writes_what_it_says(data, a_run, fake, capsys, questions, probes):
    run = a_run()
    got, = evaluate([run], data, probes=probes)
    saved = read(run/"eval"/"test.json")
    assert saved == json.loads(json.dumps(got, allow_nan=False)) and sorted(p.name for p in (run/"eval").iterdir()) == ["answers.jsonl", "test.json", "test.jsonl"]
    rows = rows_of(run/"eval"/"test.jsonl")
    assert [r["id"] for r in rows] == [q.id for q in questions]
    for who in ("base", "tuned"):      # every score follows from the kept answers
        for name, s in saved[who].items():
            mine = [r for r in rows if r["score"] == name]
            assert s["n"] == len(mine) and s["value"] == pytest.approx(sum(r[f"{who}_score"] for r in mine) / len(mine))
            assert s["unparsed"] == sum(not r[f"{who}_read"] for r in mine) and s["low"] <= s["value"] <= s["high"]
    for name, d in saved["difference"].items(): assert d["value"] == pytest.approx(saved["tuned"][name]["value"] - saved["base"][name]["value"]) and d["n"] == saved["tuned"][name]["n"]
    assert (saved["base"]["closed_accuracy"]["value"], saved["tuned"]["closed_accuracy"]["value"]) == (pytest.approx(4/9), pytest.approx(8/9))
    assert saved["always_same"]["closed_accuracy"] == pytest.approx(8/9)
    assert (saved["split"], saved["name"], saved["run"], saved["base_name"], saved["limit"], saved["leaks"], saved["benchmark"], saved["judge"]) == ("test", "test", "run", "tiny-qwen2-vl", None, [], None, None)
    assert saved["versions"]["medchat"] and saved["seconds"]["base"] >= 0 and saved["base_sha256"] == "aa" and saved["load_in_4bit"] is True
    assert {(s["by"], s["name"]) for s in saved["slices"]} == {("type", t) for t in ("heart", "fluid", "lung", "finding")}
    out = capsys.readouterr().out
    assert "closed accuracy" in out and "0.889" in out and "+44.4" in out and "too high" not in out and "[yes]" in out and ("its own image" in out) == probes and "open exact match" in out

def test_a_row_of_the_file_says_all_of_one_question(data, a_run, fake, questions):
    evaluate([a_run()], data)
    row = rows_of(a_run("other").parent/"run"/"eval"/"test.jsonl")[0]
    assert but(row, "ablated") == dict(id="p1-0", images=["images/p1.png"], kind="vqa", answer_type="closed", types=["heart"], slices={"language": "en"}, group="patient 1", question="Is the heart enlarged?",
        prompt="<image> / Is the heart enlarged?", reference="yes", score="closed_accuracy", base="no", tuned="yes", base_score=0, tuned_score=1, base_read=True, tuned_read=True, base_confidence=.75, tuned_confidence=.75)
    assert row["ablated"] == {name: dict(reply="yes", score=1, read=True) for name in ("blank", "other", "noised", "flipped")}

def test_without_probes_nothing_more_is_asked(data, a_run, fake):
    run = a_run(); got, = quick([run], data)
    assert fake["asked"]() == 2*18 and not fake["shapes"]
    assert not set(got) & {"looks", "wording", "impossible", "shapes"} and not [w for w in got["warnings"] if "image" in w] and look_table(got) == ""
    assert all(r["ablated"] == {} for r in rows_of(run/"eval"/"test.jsonl"))
    assert not any(words in " ".join(trust_lines(got)) for words in ("shapes", "other words", "declined"))

def test_probes_are_what_was_measured(data, a_run, fake, capsys):
    "The fake knows the questions by heart and never looks: the file says so, and the terminal."
    got, = evaluate([a_run()], data)
    assert {k: list(v) for k, v in got["looks"].items()} == {k: ["closed_accuracy", "open_recall"] for k in ("blank", "other", "noised", "flipped")}
    for scores in got["looks"].values(): assert all(s["drop"]["value"] == 0 and s["n"] == got["tuned"][name]["n"] and s["value"] == got["tuned"][name]["value"] for name, s in scores.items())
    assert len([w for w in got["warnings"] if "nothing shows that it looks" in w]) == 4 and got["shapes"]["base"]["n"] == got["shapes"]["tuned"]["n"] == 100 and got["impossible"]["n"] == 6 and got["wording"]["all_agree"]["n"] > 0
    assert {c["adapter"] for c in fake["shapes"]} == {True, False} and fake["asked"](False) == 18 # the base is asked the questions and the shapes alone
    out = capsys.readouterr().out
    assert all(f"WARNING: {w}" in out for w in got["warnings"]) and look_table(got) in out and all(line in out for line in trust_lines(got))

def test_the_table_of_images_adds_up(tmp_path, a_run, fake):
    "What stands under `right` is of the same questions as what stands beside it: those with an image."
    text_only = [dict(id=f"t{i}", images=[], turns=[dict(role="user", text=f"Is {i} less than 99?"), dict(role="assistant", text="yes")], kind="vqa", answer_type="closed", split="test", group="patient 1") for i in range(9)]
    fake["say"] = lambda on, q, images: "yes" if not images or images[0].getpixel((0, 0)) != (128, 128, 128) else "no"
    got, = evaluate([a_run()], make_data(tmp_path/"d", make_rows(extra=text_only)))
    looks = got["looks"]["blank"]["closed_accuracy"]
    row = re.split(r"\s{2,}", look_table(got).splitlines()[1])
    right, blank = float(row[2]), float(row[3].split()[0])
    assert looks["n"] == 9 and row[:2] == ["closed accuracy", "9"] and blank - right == pytest.approx(float(row[3].split()[1].strip("()"))/100, abs=2e-3)
    for words in [w for w in got["warnings"] if "with the right image" in w]:
        right, changed, drop = map(float, re.search(r"is ([\d.]+) with the right image and ([\d.]+) with .* \(drop ([+-][\d.]+),", words).groups())
        assert right - changed == pytest.approx(drop, abs=.011), words

def test_a_score_that_guessing_reaches_is_called_out(data, a_run, fake, capsys):
    fake["say"] = lambda on, q, images: "no"
    got, = quick([a_run()], data)
    words = f"closed accuracy is {got['tuned']['closed_accuracy']['value']:.3f}; always giving the most frequent answer gets {got['always_same']['closed_accuracy']:.3f} (n=9)"
    assert words in got["warnings"] and f"WARNING: {words}" in capsys.readouterr().out

def test_images_of_other_data_that_were_trained_on(tmp_path, data, a_run, fake, capsys):
    "The folder's own report knows nothing of the folder that the run was trained on."
    other = make_data(tmp_path/"other", [dict(row, split="test") for row in make_rows()])   # all six films, three of them of the training split
    trained = dict(data=str(data), data_sha256=data_hash(data))
    got, = quick([a_run(**trained)], other)
    assert got["leaks"] == ["3 of 6 images were in its training data"] and got["notes"] == [] and "WARNING: 3 of 6 images were in its training data. The scores are too high." in capsys.readouterr().out
    assert quick([a_run("same", **trained)], data)[0]["leaks"] == []
    for name, config in (("gone", dict(data=str(tmp_path/"gone"), data_sha256="0")), ("changed", dict(data=str(data), data_sha256="0")), ("old", {})):
        got, = quick([a_run(name, **config)], other)
        assert got["leaks"] == [] and "nobody knows whether they share images" in got["notes"][0]

def test_scores_of_other_data_are_kept(tmp_path, data, a_run, fake, capsys):
    run, other = a_run(), make_data(tmp_path/"other", make_rows(4))
    quick([run], data); first = {p.name: p.read_bytes() for p in (run/"eval").iterdir() if p.name != "answers.jsonl"}
    quick([run], data)
    assert {p.name for p in (run/"eval").iterdir()} == {*first, "answers.jsonl"}              # the same data: the same name
    capsys.readouterr(); got, = quick([run], other)
    older = f"test-{data_hash(data)[:8]}"
    assert {p.name for p in (run/"eval").iterdir()} == {*first, "answers.jsonl", f"{older}.json", f"{older}.jsonl"} and f"kept as {older}.json" in capsys.readouterr().out
    assert (run/"eval"/f"{older}.jsonl").read_bytes() == first["test.jsonl"] and read(run/"eval"/"test.json")["data_sha256"] == data_hash(other) != data_hash(data)

def test_nothing_of_this_machine_is_written(data, a_run, fake):
    run = a_run(); evaluate([run], data)
    for f in (run/"eval").iterdir(): assert str(run.parent) not in f.read_text() and str(data.parent) not in f.read_text() and str(root) not in f.read_text()

def test_no_answer_leaves_for_the_hub(data, a_run, fake):
    "Questions, replies and references of patients stay here; scores go."
    from medchat.publish import files_to_push
    run = a_run(); (run/"adapter"/"adapter_config.json").write_text('{"r": 16}')
    fake["say"] = lambda on, q, images: "Mrs Miller"
    evaluate([run], data)
    import numpy as np
    from safetensors.numpy import save_file
    save_file({"lora": np.zeros(4, np.float32)}, run/"adapter"/"adapter_model.safetensors")
    going = files_to_push(run)
    assert "medchat/eval/test.json" in going and not any(name.endswith(".jsonl") for name in going)
    for name, content in going.items():
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode("latin-1")
        assert "Mrs Miller" not in text and "p1-0" not in text and "Is the heart enlarged?" not in text and "patient 1" not in text, name

@pytest.mark.parametrize("probes", [True, False])
def test_the_same_answers_give_the_same_file(data, a_run, fake, probes):
    one, two = a_run("one"), a_run("two")
    evaluate([one], data, probes=probes); evaluate([two], data, probes=probes, batch_size=1)
    assert (one/"eval"/"test.jsonl").read_bytes() == (two/"eval"/"test.jsonl").read_bytes()
    a, b = (but(read(r/"eval"/"test.json"), "run", "seconds", "batch_size") for r in (one, two))
    assert a == b

def test_the_model_card_finds_the_scores(data, a_run, fake):
    from medchat.publish import read_scores
    run = a_run(); got, = quick([run], data)
    rows = {r["score"]: r for r in read_scores(run)}
    assert set(rows) >= {k.replace("_", " ") for k in got["tuned"]}
    assert rows["closed accuracy"]["base"]["value"] == got["base"]["closed_accuracy"]["value"] and rows["closed accuracy"]["tuned"]["n"] == 9


# --- nothing twice

@pytest.mark.parametrize("probes", [True, False])
def test_a_repeated_command_asks_nothing_and_writes_the_same(data, a_run, fake, probes):
    run = a_run()
    fake["say"] = lambda on, q, images: (KNOWN.get(q, "no"), 1/3 + len(q)/1e6 + images[0].size[0]/1e7) # a confidence with many digits
    first, = evaluate([run], data, probes=probes); one = files(run/"eval"); fake["calls"].clear()
    second, = evaluate([run], data, probes=probes)
    assert fake["asked"]() == 0 and but(first, "seconds") == but(second, "seconds")
    assert {k: v for k, v in files(run/"eval").items() if k.endswith("l")} == {k: v for k, v in one.items() if k.endswith("l")}

def test_a_quick_look_first_then_the_rest(data, a_run, fake):
    run = a_run()
    quick([run], data, limit=10); assert fake["asked"](True) == fake["asked"](False) == 10
    quick([run], data); assert fake["asked"](True) == fake["asked"](False) == 18
    evaluate([run], data); assert fake["asked"](False) == 18 # probes are asked of the tuned model alone

def test_what_changes_the_replies_is_asked_anew(data, a_run, fake):
    run = a_run()
    def asked(change=lambda: None, **more):
        change(); fake["calls"].clear(); quick([run], data, **more)
        return fake["asked"](False), fake["asked"](True)
    assert asked() == (18, 18) and asked() == (0, 0)
    assert asked(max_new_tokens=31) == (18, 18) and asked() == (0, 0)
    assert asked(lambda: (run/"adapter"/"adapter_model.safetensors").write_text("trained on")) == (0, 18)    # the base said what it said
    assert asked(lambda: (run/"config.json").write_text((run/"config.json").read_text().replace('"aa"', '"bb"'))) == (18, 18)
    assert '"yes"' in (run/"eval"/"answers.jsonl").read_text() and len(rows_of(run/"eval"/"answers.jsonl")) == 36 # of other weights nothing is left

def test_runs_that_share_a_base_ask_it_once(data, a_run, fake):
    quick([a_run("a"), a_run("b"), a_run("c", base_sha256="bb"), a_run("d", load_in_4bit=False)], data)
    assert (fake["asked"](True), fake["asked"](False)) == (4 * 18, 3 * 18) and fake["loaded"] == ["a", "b", "c", "d"]

@pytest.mark.parametrize("error", [RuntimeError("broke"), KeyboardInterrupt()])
def test_breaking_off_leaves_the_old_files(data, a_run, fake, error):
    run = a_run(); quick([run], data)
    before = files(run/"eval")
    def fail(on, q, images): raise error
    say, fake["say"] = fake["say"], fail
    with pytest.raises(type(error)): quick([run], data, max_new_tokens=9)
    assert files(run/"eval") == before
    fake["say"] = say; fake["calls"].clear(); quick([run], data)
    assert fake["asked"]() == 0

@pytest.mark.parametrize("error", [RuntimeError("broke"), KeyboardInterrupt()])
def test_breaking_off_anywhere_loses_one_batch(data, a_run, fake, error):
    whole, = evaluate([a_run("whole")], data, batch_size=4)
    total, want, say, left = fake["asked"](), (a_run("x").parent/"whole"/"eval"/"test.jsonl").read_bytes(), fake["say"], [0]
    def stops(on, q, images):
        left[0] -= 1
        if left[0] < 0: raise error
        return say(on, q, images)
    run, fake["say"] = a_run("stopped", adapter="whole"), stops
    fake["calls"].clear()
    for tries in range(99):
        left[0] = 13                                    # three batches, then it breaks
        try: got, = evaluate([run], data, batch_size=4); break
        except type(error): pass
    said = fake["asked"]()
    assert 5 < tries < 60 and said <= total + 4*tries and (run/"eval"/"test.jsonl").read_bytes() == want and but(got, "run", "seconds") == but(whole, "run", "seconds")

def test_too_large_a_batch_says_what_to_do(data, a_run, fake):
    def fail(on, q, images): raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
    fake["say"] = fail
    with pytest.raises(MedchatError, match="not enough memory for a batch: 3 questions. Try --batch-size 1"): quick([a_run()], data)

def test_breaking_off_the_first_time_leaves_the_answers_alone(data, a_run, fake, monkeypatch):
    run = a_run()
    def full(path, rows): raise MedchatError("cannot write", path, "No space left on device")
    monkeypatch.setattr(E, "write_jsonl", full)
    with pytest.raises(MedchatError): quick([run], data)
    assert [p.name for p in (run/"eval").iterdir()] == ["answers.jsonl"]


# --- several runs, parts of a split

def test_one_run_needs_no_list(data, a_run, fake):
    run = a_run()
    assert len(quick(str(run), data)) == len(quick(run, data)) == 1

def test_a_run_is_called_by_its_folder_wherever_one_stands(data, a_run, fake, monkeypatch):
    run = a_run("mine"); monkeypatch.chdir(run)
    assert quick(".", data)[0]["run"] == quick([run], data)[0]["run"] == "mine"

def test_several_runs_are_compared_on_the_same_questions(data, a_run, fake, capsys):
    from medchat.metrics import paired_difference
    say, loads = fake["say"], []
    fake["say"] = lambda on, q, images: say(on, q, images) if not on or fake["loaded"][-1] == "a" else "yes" if fake["loaded"][-1] == "b" else "a left pleural effusion"
    runs = [a_run(n) for n in "abc"]
    a, b, c = quick(runs, data)
    out = capsys.readouterr().out
    assert "against" not in a and list(b["against"]) == list(c["against"]) == ["a"]
    for run, result in zip(runs, (a, b, c)):
        assert read(run/"eval"/"test.json") == json.loads(json.dumps(result))
        for name, d in result.get("against", {}).get("a", {}).items():
            mine, first = ([(r["tuned_score"], r["group"]) for r in rows_of(x/"eval"/"test.jsonl") if r["score"] == name] for x in (run, runs[0]))
            assert d == json.loads(json.dumps(paired_difference([s for s, _ in first], [s for s, _ in mine], [g for _, g in mine])))
            line, = [line for line in out.splitlines() if line.startswith(f"{result['run']} - a ") and name.replace("_", " ") in line]
            assert f"{100*d['value']:+.1f} (" in line and line.endswith("  " + show_p(d["p"])) and re.search(rf"\s{d['n']}\s", line)
    assert set(c["against"]["a"]) == set(a["tuned"]) and c["against"]["a"]["closed_accuracy"]["value"] == pytest.approx(c["tuned"]["closed_accuracy"]["value"] - a["tuned"]["closed_accuracy"]["value"])

def test_a_limit_is_spread_and_kept_apart(data, a_run, fake, questions, capsys):
    run = a_run()
    for limit in (6, 18, 100): quick([run], data, limit=limit)
    ids = lambda name: [r["id"] for r in rows_of(run/"eval"/name)]
    assert ids("test-6.jsonl") == [q.id for q in questions[::3]]
    assert sorted(p.name for p in (run/"eval").glob("*.json")) == ["test-6.json", "test.json"] and len(ids("test.jsonl")) == 18
    assert read(run/"eval"/"test-6.json")["limit"] == 6 and read(run/"eval"/"test.json")["limit"] is None
    assert "6 of its questions" in capsys.readouterr().out

def test_another_split(data, a_run, fake, capsys):
    run = a_run(); got, = quick([run], data, split="train")
    assert (run/"eval"/"train.json").is_file() and "WARNING" in capsys.readouterr().out and got["leaks"]

def test_a_leak_is_called_out(tmp_path, a_run, fake, capsys):
    shared = dict(id="x", images=["images/p1.png"], turns=[dict(role="user", text="Is there fluid?"), dict(role="assistant", text="no")], kind="vqa", split="train", group="other")
    leaky = make_data(tmp_path/"d", make_rows(extra=[shared]))
    run = a_run(); got, = quick([run], leaky)
    out = capsys.readouterr().out
    assert "WARNING: 1 of 3 test images also stand in train" in out and "too high" in out and read(run/"eval"/"test.json")["leaks"] == got["leaks"] != []

def test_a_leak_between_other_splits_is_not_ours(data, tmp_path):
    copy = shutil.copytree(data, tmp_path/"copy"); report = read(copy/"report.json")
    leak = dict(split="validation", also_in="train", images=1, of_images=2, groups=0, of_groups=2, rows=3, of_rows=4)
    (copy/"report.json").write_text(json.dumps(report | dict(leaks=[leak])))
    assert leaks_of(copy, "test") == [] and len(leaks_of(copy, "validation")) == 1

def test_without_a_training_split(tmp_path, a_run, fake, capsys):
    data = make_data(tmp_path/"d", [dict(r, split="test") for r in make_rows()])
    got, = quick([a_run()], data)
    assert got["always_same"] is None and got["tuned"]["closed_accuracy"]["n"] == 18 and "closed accuracy" in capsys.readouterr().out

@pytest.mark.parametrize("kind", ["vqa", "caption", "report", "conversation"])
def test_a_split_of_one_kind_alone(tmp_path, a_run, fake, kind, capsys):
    "No closed question, no open one, no report: what was not asked is not there, and nothing falls over."
    rows = [dict(r, kind="report") if kind == "report" else r for r in make_rows() if r["kind"] == ("caption" if kind == "report" else kind)]
    got, = evaluate([a_run()], make_data(tmp_path/"d", rows))
    assert set(got["tuned"]) == ({"closed_accuracy", "open_recall"} if kind == "vqa" else {f"{kind}_recall"}) and (got["calibration"]["tuned"] is None) == (kind != "vqa")
    assert set(got["looks"]["blank"]) == set(got["tuned"]) and (got["mistakes"]["tuned"]["hallucinations"] is None) == (kind in ("vqa", "conversation")) and (got["mistakes"]["tuned"]["sides"] is None) == (kind != "vqa")
    assert "None" not in capsys.readouterr().out

def test_questions_without_images_and_one_patient(tmp_path, a_run, fake):
    rows = [dict(id=f"t{i}", images=[], turns=[dict(role="user", text=f"Is {i} less than 99?"), dict(role="assistant", text="yes")], kind="vqa", split="test", group="p") for i in range(3)]
    got, = evaluate([a_run("a")], make_data(tmp_path/"d", rows))
    assert got["looks"] == {} and got["impossible"] is None and got["warnings"] == [] and got["tuned"]["closed_accuracy"]["n"] == 3
    one, = evaluate([a_run("b")], make_data(tmp_path/"e", [r for r in make_rows() if r["group"] == "patient 1"]))
    assert list(one["looks"]) == ["blank", "noised", "flipped"] and one["tuned"]["closed_accuracy"]["groups"] == 1


# --- benchmarks and judges

@pytest.fixture(scope="module")
def rad(tmp_path_factory):
    "VQA-RAD in small: every test image stands in train, too."
    home = tmp_path_factory.mktemp("rad"); vqa_rad(home/"source")
    return convert(str(home/"source"), home/"data", keep_splits=True)

def test_a_benchmark_has_its_name_its_table_and_its_warnings(rad, a_run, fake, capsys):
    run = a_run(); got, = quick([run], rad, benchmark="vqa-rad")
    assert (got["benchmark"], got["name"], got["split"], got["limit"]) == ("vqa-rad", "vqa-rad", "test", None) and read(run/"eval"/"vqa-rad.json") == json.loads(json.dumps(got)) and len(rows_of(run/"eval"/"vqa-rad.jsonl")) == 4
    out = capsys.readouterr().out
    assert "VQA-RAD (Lau et al. 2018" in out and "LLaVA-Med (BiomedCLIP)" in out and re.search(r"^run +0\.\d{3} \([\d.]+-[\d.]+\) n 2 .* this run$", out, re.M)
    assert any("2 of 272 closed, 2 of 179 open" in note for note in got["notes"]) and all(f"WARNING: {note}" in out for note in got["notes"])
    assert any("3 of 3 test images also stand in train" in leak for leak in got["leaks"]) and re.search("WARNING: 3 of 3 test images also stand in train.*too high", out) and "all 203 test images stand in train too" in out # measured, and known

def test_a_benchmark_refuses_what_it_is_not(rad, data, a_run, fake):
    run = a_run()
    for more, on, problem in ((dict(benchmark="slake"), rad, "this data is not SLAKE"), (dict(benchmark="vqa-rad"), data, "this data is not VQA-RAD"), (dict(benchmark="vqa-rad", limit=3), rad, "scored on all of its questions"),
                              (dict(benchmark="vqa-rad", split="train"), rad, "has a split of its own"), (dict(benchmark="nobody's"), rad, "no such benchmark.*Known: vqa-rad")):
        with pytest.raises(MedchatError, match=problem): evaluate([run], on, **more)
    assert not fake["loaded"] and not (run/"eval").exists()

@pytest.fixture
def no_key(monkeypatch):
    for name in judge_module.KEYS: monkeypatch.delenv(name, raising=False)

def test_a_judge_rates_base_and_tuned(data, a_run, fake, no_key, capsys):
    run = a_run()
    with JudgeServer() as server:
        got, = quick([run], data, judge=server.url, judge_model="j")
        asked = len(server.log)
        bodies = json.dumps([body for *_, body in server.log])
        again, = quick([run], data, judge=server.url, judge_model="j")
        assert len(server.log) == asked > 0 and again["judge"] == got["judge"]         # nothing twice
    assert set(got["judge"]) == {"base", "tuned"} and got["judge"]["tuned"]["model"] == "j" and got["judge"]["tuned"]["of"] == 9 # three open, three captions, three conversations
    assert got["judge"]["tuned"]["relative"]["value"] > got["judge"]["base"]["relative"]["value"]    # no, no, no against words of the reference
    assert "image_url" not in bodies and "base64" not in bodies and "patient 1" not in bodies and "p1-" not in bodies
    out = capsys.readouterr().out
    assert re.search(r"judged by j, tuned: [\d.]+ \([\d.]+-[\d.]+\) where the references have 100, of \d+", out) and read(run/"eval"/"test.json")["judge"] == json.loads(json.dumps(again["judge"]))
    for f in (run/"eval").iterdir(): assert str(run.parent) not in f.read_text()

def test_a_caption_stands_for_its_image(data, a_run, fake, no_key):
    from judge_server import told
    with JudgeServer() as server:
        quick([a_run()], data, judge=server.url, judge_model="j")
        facts = {(t["question"], t["facts"]) for t in (told(body) for *_, body in server.log)}
    assert facts == {("What is seen?", "A large heart."), ("Then?", "A large heart."), ("Describe it.", "A large heart.")} # of a caption it is the reference itself

def test_answers_stay_when_the_judge_is_away(data, a_run, fake, no_key, monkeypatch):
    run = a_run(); monkeypatch.setattr(E, "judge_replies", lambda *a, **k: (_ for _ in ()).throw(MedchatError("cannot reach the judge", "http://localhost:9")))
    with pytest.raises(MedchatError, match="judge"): quick([run], data, judge="http://localhost:9/v1", judge_model="j")
    fake["calls"].clear(); monkeypatch.undo()
    assert len(rows_of(run/"eval"/"answers.jsonl")) == 36

def test_closed_questions_need_no_judge(rad, tmp_path, a_run, fake, no_key):
    rows = [r for r in make_rows() if r.get("answer_type") == "closed"]
    with JudgeServer() as server: got, = quick([a_run()], make_data(tmp_path/"d", rows), judge=server.url, judge_model="j")
    assert got["judge"] is None and not server.log


# --- refusals: one line, before any work, nothing written

def test_refusals(data, a_run, fake, tmp_path):
    run, plain = a_run(), tmp_path/"plain"; plain.mkdir()
    for call, problem in ((lambda: evaluate([run], data, split="exam"), "no such split: exam. .*train, test"), (lambda: evaluate([run, plain], data), "not a run folder"),
                          (lambda: evaluate([run, tmp_path/"nowhere"], data), "not a run folder"), (lambda: evaluate([run], plain), "not a dataset folder"),
                          (lambda: evaluate([run], tmp_path/"nowhere"), "no such dataset folder"), (lambda: evaluate([], data), "no run to evaluate"),
                          (lambda: evaluate([run], data, limit=0), "limit must be at least 1"), (lambda: evaluate([run], data, batch_size=0), "batch_size must be at least 1"),
                          (lambda: evaluate([run], data, max_new_tokens=0), "max_new_tokens must be at least 1"), (lambda: evaluate([run], data, limit=-3), "limit must be at least 1"),
                          (lambda: evaluate([run], data, judge="http://localhost:9/v1"), "a judge needs an address and a model.*--judge-model"), (lambda: evaluate([run], data, judge_model="j"), "a judge needs an address and a model")):
        with pytest.raises(MedchatError, match=problem) as e: call()
        assert "\n" not in str(e.value)
    assert not fake["calls"] and not fake["loaded"] and not (run/"eval").exists()

def test_an_address_that_is_none_is_seen_before_the_work(data, a_run, fake):
    "Not after an hour of answers."
    run = a_run()
    with pytest.raises(MedchatError): quick([run], data, judge="not an address", judge_model="j")
    assert not fake["calls"] and not fake["loaded"]

def test_no_write_access_is_seen_first(data, a_run, fake, monkeypatch):
    run = a_run(); monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(MedchatError, match="cannot write"): evaluate([run], data)
    assert not fake["calls"]

@pytest.mark.parametrize("spoil", [lambda run: (run/"eval").write_text(""), lambda run: (run/"eval"/"answers.jsonl").mkdir(parents=True)], ids=["a file", "a folder"])
def test_what_stands_in_the_way_is_said_in_one_line(data, a_run, fake, spoil):
    run = a_run(); spoil(run)
    with pytest.raises(MedchatError, match="cannot write|cannot read") as e: quick([run], data)
    assert "\n" not in str(e.value)

def test_an_empty_split(data, dataset, a_run, fake, monkeypatch):
    monkeypatch.setattr(E, "read_dataset", lambda folder, split: dataset.select([]))
    with pytest.raises(MedchatError, match="nothing to evaluate: the split is empty"): evaluate([a_run()], data)
    assert not fake["loaded"]

def test_a_run_without_an_adapter_is_refused_before_its_neighbour_is_asked(data, a_run, fake):
    good, bad = a_run("good"), a_run("bad")
    shutil.rmtree(bad/"adapter")
    with pytest.raises(MedchatError, match="adapter"): quick([good, bad], data)
    assert not fake["calls"]


# --- with a real model

@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    "A run whose adapter holds random numbers, so that it differs from its base."
    import torch
    from medchat.models import add_lora, base_hash, load_model, resolve_base
    run = tmp_path_factory.mktemp("runs")/"random"
    model, processor = load_model("tiny-qwen2-vl", for_training=True)
    model = add_lora(model)
    torch.manual_seed(0)
    for n, p in model.named_parameters():
        if "lora_B" in n: p.data.normal_(0, 0.3)
    model.save_pretrained(run/"adapter", save_embedding_layers=False); processor.save_pretrained(run/"adapter")
    (run/"config.json").write_text(json.dumps(dict(medchat="0", base="tiny-qwen2-vl", base_sha256=base_hash(resolve_base("tiny-qwen2-vl")), load_in_4bit=True)))
    return run

@pytest.fixture
def copied(real_run, tmp_path): return lambda name="one": shutil.copytree(real_run, tmp_path/name/"random")

def test_real_replies(copied, data, dataset, questions):
    "Batches of any size, single questions, and the base loaded by itself: the same replies."
    from medchat.models import encode, greedy, load_run
    import torch
    run = copied(); quick([run], data, batch_size=7, max_new_tokens=8)
    rows = rows_of(run/"eval"/"test.jsonl")
    assert any(r["base"] != r["tuned"] for r in rows), "the adapter changes nothing: this test proves nothing"
    for who in ("tuned", "base"):
        model, processor = load_run(run, with_adapter=who == "tuned")
        for q, row in zip(questions, rows):
            batch = encode(processor, [q.prompt], [dataset[q.row]["images"]])
            with torch.no_grad(): out = model.generate(**batch, generation_config=greedy(processor, 8 if q.kind == "vqa" else 32, model.generation_config.eos_token_id))
            assert row[who] == processor.tokenizer.decode(out[0, batch["input_ids"].shape[1]:], skip_special_tokens=True).strip() and 0 < row[f"{who}_confidence"] <= 1

def test_real_evaluation_repeats_itself(copied, data):
    "Asked anew in another folder, and not asked in the same: the same bytes."
    one, two = copied("one"), copied("two")
    first, = evaluate([one], data, limit=9, max_new_tokens=8); before = (one/"eval"/"test-9.jsonl").read_bytes()
    assert (one/"eval"/"test-9.jsonl").read_bytes() == before
    again, = evaluate([one], data, limit=9, max_new_tokens=8)
    anew, = evaluate([two], data, limit=9, max_new_tokens=8)
    assert (one/"eval"/"test-9.jsonl").read_bytes() == (two/"eval"/"test-9.jsonl").read_bytes() == before
    assert but(first, "seconds") == but(again, "seconds") == but(anew, "seconds")
    for f in (one/"eval").iterdir(): assert str(one.parent) not in f.read_text() and str(data.parent) not in f.read_text()

def test_killed_on_the_way_and_repeated(copied, data):
    "SIGKILL in the middle, then the same command: the file of an evaluation that nobody stopped, byte for byte."
    whole, killed = copied("whole"), copied("killed")
    code = f"""import time, medchat.answers as A
from medchat.evaluate import evaluate
answer = A.answer_prompts
A.answer_prompts = lambda *a: (time.sleep(.2), answer(*a))[1]
evaluate([{str(killed)!r}], {str(data)!r}, batch_size=2, max_new_tokens=8)"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    want, = evaluate([whole], data, batch_size=2, max_new_tokens=8)
    kept, ends = killed/"eval"/"answers.jsonl", time.monotonic() + 120
    while not (kept.is_file() and kept.read_bytes().count(b"\n") > 20) and time.monotonic() < ends and process.poll() is None: time.sleep(.01)
    process.send_signal(signal.SIGKILL); process.wait()
    before = kept.read_bytes()
    assert 20 < before.count(b"\n") < (whole/"eval"/"answers.jsonl").read_bytes().count(b"\n") and not (killed/"eval"/"test.json").exists()
    got, = evaluate([killed], data, batch_size=2, max_new_tokens=8)
    assert kept.read_bytes().startswith(before[:before.rfind(b"\n") + 1])
    assert (killed/"eval"/"test.jsonl").read_bytes() == (whole/"eval"/"test.jsonl").read_bytes() and but(got, "seconds") == but(want, "seconds")
