"The overview of runs: reading damaged folders, what may be compared, filters, thumbs."
import json
from pathlib import Path
import pytest
from hypothesis import given, strategies as st

import medchat.overview as O
from medchat.core import MedchatError
from medchat.dashboard import answer_html, legend, trouble_words
from medchat.metrics import paired_difference
from medchat.overview import *
from eval_maker import by_name, make_answers, make_bare_run, make_eval, make_runs, score
from run_maker import make_hollow_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return make_runs(tmp_path_factory.mktemp("ada"))

@pytest.fixture
def runs(folder): return read_runs(folder)


# --- reading

def test_what_is_a_run(runs):
    assert [r.name for r in runs] == ["cut", "first", "group/<b>third", "second", "young"]
    assert by_name(runs)["cut"].troubles == ["config.json is damaged"] and not by_name(runs)["first"].troubles

@pytest.mark.parametrize("name,content,trouble,lines", [
    ("log.jsonl", '{"step": 1, "loss": 2}\n{"step": 2, "lo', "log.jsonl: 1 line cannot be read", 1),
    ("log.jsonl", '\x00\xff\n[1]\n{"step": 1}\n', "log.jsonl: 2 lines cannot be read", 1),
    ("log.jsonl", "", None, 0),
    ("eval/test.json", '{"tuned": ', "eval/test.json is no evaluation, or damaged", 4),
    ("eval/test.json", '{"tuned": [], "base": 1}', "eval/test.json is no evaluation, or damaged", 4),
    ("eval/test.json", "["*100_000, "eval/test.json is no evaluation, or damaged", 4),
    ("feedback.jsonl", '{"liked": true}\nnonsense\n', "feedback.jsonl: 1 line cannot be read", 4)])
def test_damaged_files_are_said_and_the_rest_is_read(tmp_path, name, content, trouble, lines):
    run = make_bare_run(tmp_path/"runs"/"a")
    make_eval(run)
    (run/name).write_text(content, encoding="latin-1")
    read = read_runs(tmp_path/"runs")[0]
    assert read.troubles == ([trouble] if trouble else []) and len(read.log) == lines
    assert eval_rows([read])[0]["run"] == "a" and (curves([read]) is not None) and (not trouble or trouble in trouble_words([read]))

def test_config_is_missing_or_of_something_else(tmp_path):
    run = make_bare_run(tmp_path/"runs"/"a")
    (run/"config.json").unlink()
    assert read_runs(tmp_path/"runs")[0].troubles == ["config.json is missing"]
    (run/"config.json").write_text("[]")
    assert read_runs(tmp_path/"runs")[0].troubles == ["config.json is damaged"]

def test_answers_that_are_missing_or_odd(tmp_path):
    run = make_bare_run(tmp_path/"runs"/"a")
    make_eval(run, answers=[dict(reply="x"), make_answers([1])[0], dict(make_answers([1])[0], tuned_score=None, types="side", slices=[], ablated=[], tuned_confidence="high")])
    read = read_runs(tmp_path/"runs")[0]
    rows, broken = read_answers(read, "test")
    assert (len(rows), broken) == (2, 1) and len(filter_answers(rows, "right")) == 1 and filter_answers(rows, "wrong") == [] and "lesion 0" in answer_html(rows[1])
    (run/"eval"/"test.jsonl").unlink()
    assert read_answers(read, "test") == ([], 0) and read_answers(read, "../config") == ([], 0)

def test_a_run_of_an_older_medchat(tmp_path):
    run = make_hollow_run(tmp_path/"runs"/"old")
    old = json.loads((run/"eval"/"test.json").read_text())
    (run/"eval"/"test.json").write_text(json.dumps({k: old[k] for k in ("data", "base", "tuned", "always_same")} | dict(by_type=[]))) # no hash, no slices, nothing paired
    read = read_runs(tmp_path/"runs")
    row, = eval_rows(read)
    assert row["closed, tuned"] == "0.910 (0.86-0.96)" and row["asked"] == "?" and row["gain"] is None and row["ECE"] is None and row["data"] == "phantoms"
    assert set(slice_rows(read[0].evals["test"], "type", "closed_accuracy")) == {"all"} and "not comparable" in legend(read)
    assert "secret" not in repr(row) + legend(read) + trouble_words(read) and slice_figure({"old": read[0].evals["test"]})

def test_a_file_is_read_again_only_when_it_changed(tmp_path, monkeypatch):
    file, n = tmp_path/"log.jsonl", []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (n.append(self), real(self))[1])
    file.write_text('{"step": 1}\n')
    assert [read_lines(file) for _ in range(3)] == [([dict(step=1)], 0)]*3 and len(n) == 1
    file.write_text('{"step": 1}\n{"step": 2}\n')
    assert len(read_lines(file)[0]) == 2 and len(n) == 2
    file.unlink()
    assert read_lines(file) == ([], 0)

json_like = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from("tuned base closed_accuracy value low high n slices looks blank drop difference calibration ece warnings data_sha256 limit data by name".split()), x, max_size=5), max_leaves=15)

@given(st.dictionaries(st.sampled_from("slices looks difference calibration warnings leaks notes data_sha256 data split limit".split()), json_like), st.dictionaries(st.sampled_from(["closed_accuracy", "open_recall"]), json_like), st.lists(st.dictionaries(st.sampled_from(["step", "loss", "eval_loss", "liked", "time"]), json_like), max_size=4))
def test_no_file_breaks_the_table(result, scores, rows):
    run = RunFiles("a", Path("a"), dict(base=scores, data=rows), rows, {"test": result | dict(tuned=scores, base=scores)}, rows)
    row, = eval_rows([run])
    assert list(row) == list(COLUMNS) and all(row[c] is None or isinstance(row[c], (int, float)) for c, kind in COLUMNS.items() if kind == "number") and json.dumps(row, allow_nan=False)
    liked_rows([run]); legend([run]); slice_names([run.evals["test"]]); slice_rows(run.evals["test"], "type", "closed_accuracy")


# --- the table

def test_the_table(runs):
    rows = {(r["run"], r["evaluation"]): r for r in eval_rows(runs)}
    assert list(rows) == [("first", "test"), ("group/<b>third", "test"), ("second", "test"), ("young", "")]
    first = rows["first", "test"]
    assert (first["base model"], first["data"], first["steps"], first["validation loss"], first["n"]) == ("tiny-qwen2-vl", "scans", 3, 1.6, 6)
    assert (first["closed, base"], first["closed, tuned"], first["gain"], first["gain, 95%"], first["p"]) == ("0.200 (0.10-0.30)", "0.667 (0.57-0.77)", 46.7, "+10 to +50", .012)
    assert (first["lost without image"], first["ECE"], first["warnings"], first["open recall"]) == (25.0, .125, 1, "")
    assert [r["asked"] for r in rows.values()] == ["A", "B", "A", ""] and rows["young", ""]["steps"] == 1

@given(st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.sampled_from([None, 10]), st.sampled_from(["test", "validation"])), max_size=8))
def test_one_letter_is_one_set_of_questions(asked):
    runs = [RunFiles(f"r{i}", Path(), evals={"e": dict(data_sha256=sha, limit=limit, split=split, tuned={}, base={})}) for i, (sha, limit, split) in enumerate(asked)]
    sets = question_sets(runs)
    assert sorted(m for members in sets.values() for m in members) == sorted((r.name, "e") for r in runs)
    letter = {m[0]: letter for letter, members in sets.items() for m in members}
    for i, one in enumerate(asked):
        assert (letter[f"r{i}"] == "?") == (one[0] is None)
        for j, other in enumerate(asked): assert (letter[f"r{i}"] == letter[f"r{j}"]) == (one == other or one[0] is other[0] is None)

@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_scores_sort_as_text_as_they_do_as_numbers(values):
    values = [round(v, 3) for v in values]
    assert sorted(O._score_text(score(v)) for v in values) == [O._score_text(score(v)) for v in sorted(values)]


# --- what may be compared

def test_the_paired_difference_is_that_of_the_answers(runs):
    r = by_name(runs)
    found = compare_evals((r["first"], "test"), (r["second"], "test"))
    assert found == {"closed_accuracy": paired_difference([1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0], [f"g{i}" for i in range(6)])}
    back = compare_evals((r["second"], "test"), (r["first"], "test"))
    assert back["closed_accuracy"]["value"] == pytest.approx(-found["closed_accuracy"]["value"]) == pytest.approx(-1/6)

def test_only_common_questions_are_paired(tmp_path):
    one, two = make_bare_run(tmp_path/"runs"/"one"), make_bare_run(tmp_path/"runs"/"two")
    make_eval(one, tuned=(1, 1, 1, 1, 1, 1)); rows = make_answers((0, 0, 0))
    make_eval(two, limit=3, answers=[rows[0], dict(rows[1], reference="no"), dict(rows[2], tuned_score=None)])
    a, b = read_runs(tmp_path/"runs")
    found = compare_evals((a, "test"), (b, "test"))
    assert found["closed_accuracy"]["n"] == 1 and found["closed_accuracy"]["value"] == -1
    with pytest.raises(MedchatError, match="different questions of the same data"): slice_figure({"a": a.evals["test"], "b": b.evals["test"]})
    make_eval(two, answers=[dict(rows[0], question="Another?")])
    with pytest.raises(MedchatError, match="no question in common"): compare_evals((a, "test"), (read_runs(tmp_path/"runs")[1], "test"))

def test_slices_show_every_part_once_with_its_interval(runs):
    r = by_name(runs)
    figure = slice_figure({"first": r["first"].evals["test"], "second": r["second"].evals["test"]}, "modality")
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["all (n=6)", "CT (n=20)", "MRI (n=20)"]
    assert [round(p.get_width(), 3) for p in axis.patches] == [.667]*3 + [.833]*3 and len(axis.containers) == 4
    assert [t.get_text() for t in slice_figure({"$first$": r["first"].evals["test"]}).legends[0].get_texts()] == ["base", "first"]
    many = dict(r["first"].evals["test"], slices=[dict(by="type", name=f"t{i}", tuned=dict(closed_accuracy=score(.5, i + 1))) for i in range(60)])
    assert len(slice_figure({"x": many}).axes[0].get_yticklabels()) == O.MOST_SLICES

def test_curves_of_chosen_runs(runs):
    r = by_name(runs)
    figure = curves([r["first"], r["group/<b>third"]])
    said = {t.get_text() for t in figure.axes[0].texts}
    assert {"first training", "first validation"} <= said and any("third" in t for t in said) and curves([]) is None and curves([r["cut"]])


# --- answers

def test_filters(runs):
    rows, _ = read_answers(by_name(runs)["first"], "test")
    lines = lambda *a, **k: [i for i, _ in filter_answers(rows, *a, **k)]
    assert (lines(), lines("wrong"), lines("right"), lines("unread")) == ([1, 2, 3, 4, 5, 6], [2, 5], [1, 3, 4, 6], [6])
    assert (lines("better than base"), lines("worse than base"), lines(score="open_recall"), lines(kind="side"), lines(text="LESION 3")) == ([1, 3, 4, 6], [], [], [2, 4, 6], [4])

@given(st.lists(st.tuples(st.sampled_from([0., .3, .5, 1., None]), st.sampled_from(["a", "b"]), st.text(max_size=8), st.booleans()), max_size=12), st.sampled_from(list(SHOWS)), st.text(max_size=3))
def test_a_filter_takes_a_part_in_order(made, show, text):
    rows = [dict(question=q, reference="r", base="b", tuned="t", base_score=.3, tuned_score=s, tuned_read=read, types=[kind], score="x") for s, kind, q, read in made]
    found, less = filter_answers(rows, show), filter_answers(rows, show, kind="a", text=text)
    assert [i for i, _ in found] == sorted({i for i, _ in found}) and all(rows[i - 1] is row for i, row in found) and all(x in found for x in less)
    assert len(filter_answers(rows, "right")) + len(filter_answers(rows, "wrong")) == sum(r["tuned_score"] is not None for r in rows)

# --- feedback

def test_thumbs(tmp_path):
    run = make_bare_run(tmp_path/"runs"/"a")
    (run/"feedback.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [dict(time="2026-11-23T10:00:00+00:00", liked=True)]*30 + [dict(liked="yes"), dict(liked=1), {}] + [dict(time="2026-11-23T11:00:00+00:00", liked=False)]*10) + '{"liked": tr')
    row, = liked_rows(read_runs(tmp_path/"runs"))
    assert row == {"run": "a", "n": 40, "liked": 30, "share": "0.750 (0.60-0.86)", "last 20": "0.500 (0.30-0.70)", "last time": "2026-11-23T11:00:00"}
    assert liked_rows([RunFiles("b", Path())]) == []
