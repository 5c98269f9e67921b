"Edge cases of 00_core: errors, records, safe writes, JSON lines."
import errno, json, os, pickle, random, re, select, signal, struct, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import given, strategies as st
from medchat import core
from medchat.core import (MedchatError, Record, Turn, check_record, need, progress, read_jsonl, replacing, sample_data, set_seed, write_jsonl)

def files(folder): return sorted(p.name for p in Path(folder).iterdir())

# ---- errors

@given(st.text(), st.text(max_size=2000), st.text())
def test_error_is_always_one_short_line(problem, value, hint):
    text = str(MedchatError(problem, value, hint))
    assert len(text.splitlines()) <= 1 and len(text) < 700

def test_error_keeps_its_parts_and_survives_pickling():
    e = pickle.loads(pickle.dumps(MedchatError("no such file", Path("a/b"), "Make it")))
    assert str(e) == "no such file: a/b. Make it"
    assert (e.problem, e.value, e.hint) == ("no such file", Path("a/b"), "Make it")

@pytest.mark.parametrize("args, text", [(("p",), "p"), (("p", 0), "p: 0"), (("p", None, "h"), "p. h"), (("p.", None, "h"), "p. h"), (("p", "", "h"), "p:. h")])
def test_error_text(args, text): assert str(MedchatError(*args)) == text

def test_need_imports_and_explains():
    assert need("json", "x") is json
    with pytest.raises(MedchatError, match=r"the chat page needs the package nowhere_x: .*Install it: pip install nowhere_x"): need("nowhere_x", "the chat page")
    with pytest.raises(MedchatError, match=r"Install it: apt-get install y"): need("nowhere_x", "f", "apt-get install y")

# ---- records

turn = st.builds(Turn, st.sampled_from(["user", "assistant"]), st.text())
records = st.builds(Record, id=st.text(), images=st.lists(st.text()), turns=st.lists(turn), kind=st.sampled_from(core.KINDS), answer_type=st.sampled_from([None, "open", "closed"]),
    split=st.none() | st.text(), group=st.none() | st.text(), source=st.text(), licence=st.text(), language=st.text(), meta=st.dictionaries(st.text(), st.none() | st.integers() | st.text()))

@given(records)
def test_record_survives_json(record):
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record

@given(records)
def test_check_record_agrees_with_its_rules(record):
    roles = [t.role for t in record.turns]
    good = bool(record.id) and bool(roles) and len(roles) % 2 == 0 and all(r == ("user", "assistant")[i % 2] for i, r in enumerate(roles)) and all(t.text.strip() for t in record.turns)
    assert (check_record(record) == []) is good

@pytest.mark.parametrize("change, why", [
    ({"id": ""}, "no id"), ({"kind": "xray"}, "unknown kind 'xray'"), ({"answer_type": "yes"}, "unknown answer type 'yes'"),
    ({"turns": []}, "turns must alternate"), ({"turns": [{"role": "user", "text": "q"}]}, "turns must alternate"),
    ({"turns": [{"role": "assistant", "text": "a"}, {"role": "user", "text": "q"}]}, "turns must alternate"),
    ({"turns": [{"role": "user", "text": "\n "}, {"role": "assistant", "text": "a"}]}, "empty question"),
    ({"turns": [{"role": "user", "text": "q"}, {"role": "assistant", "text": ""}]}, "empty answer"),
    ({"turns": [{"role": "user", "text": "q"}, {"role": "assistant", "text": None}]}, "answer is not text"),
    ({"turns": [{"role": "user", "text": 3}, {"role": "assistant", "text": "a"}]}, "question is not text")])
def test_check_record_names_what_is_wrong(change, why):
    row = dict(id="1", images=[], turns=[dict(role="user", text="q"), dict(role="assistant", text="a")], kind="vqa")
    assert check_record(Record.from_dict(row)) == []
    found = check_record(Record.from_dict({**row, **change}))
    assert len(found) == 1 and found[0].startswith(why)

@pytest.mark.parametrize("row, why", [
    ({}, "no id, no images, no turns, no kind"), (dict(id=1, images=[], turns=[], kind="vqa", patient=3), "unknown patient"),
    (dict(id=1, images=[], turns=[{"from": "human"}], kind="vqa"), "turns is a list of"), (dict(id=1, images=[], turns=["hello"], kind="vqa"), "turns is a list of"),
    (dict(id=1, images=[], turns=3, kind="vqa"), "turns is a list of"), (dict(id=1, images=[], turns=None, kind="vqa"), "turns is a list of")])
def test_record_from_a_wrong_dictionary(row, why):
    with pytest.raises(MedchatError, match="not a record") as e: Record.from_dict(row)
    assert why in str(e.value)

def test_record_meta_is_not_shared():
    a, b = Record("a", [], [], "vqa"), Record("b", [], [], "vqa")
    a.meta["x"] = 1
    assert b.meta == {}

# ---- replacing

@pytest.mark.parametrize("trouble", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), FileNotFoundError(2, "No such file", "source.csv"), OSError("no errno")])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_failure_leaves_the_old_and_nothing_else(tmp_path, trouble, kind):
    target = tmp_path/"t"
    if kind == "file": target.write_text("old")
    else: target.mkdir(); (target/"a").write_text("old")
    with pytest.raises(type(trouble)) as e:
        with replacing(target) as tmp:
            if kind == "file": tmp.write_text("ne")
            else: tmp.mkdir(); (tmp/"b").write_text("ne")
            raise trouble
    assert e.value is trouble # not called a write error when it is none
    assert files(tmp_path) == ["t"] and (target if kind == "file" else target/"a").read_text() == "old"

@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_full_disk_is_a_one_line_error(tmp_path, code):
    with pytest.raises(MedchatError, match="cannot write: .*/deep/t. ") as e:
        with replacing(tmp_path/"very"/"deep"/"t") as tmp:
            tmp.write_text("half")
            raise OSError(code, os.strerror(code))
    assert os.strerror(code) in str(e.value) and files(tmp_path) == []

def test_parents_are_made_and_stay_on_success(tmp_path):
    with replacing(tmp_path/"a"/"b"/"t") as tmp: tmp.write_text("x")
    assert (tmp_path/"a"/"b"/"t").read_text() == "x" and files(tmp_path/"a"/"b") == ["t"]

def test_parents_that_were_there_or_hold_other_things_stay_on_failure(tmp_path):
    (tmp_path/"here").mkdir()
    with pytest.raises(ZeroDivisionError):
        with replacing(tmp_path/"here"/"new"/"t") as tmp:
            (tmp_path/"here"/"new"/"other").write_text("somebody else's")
            1/0
    assert files(tmp_path/"here"/"new") == ["other"]
    with pytest.raises(ZeroDivisionError):
        with replacing(tmp_path/"here"/"empty"/"deep"/"t") as tmp: 1/0
    assert files(tmp_path/"here") == ["new"]

def test_no_write_access(no_write):
    with pytest.raises(MedchatError, match="cannot write: .*Choose a place where you may write"):
        with replacing(no_write/"t") as tmp: tmp.write_text("x")

@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_no_write_access_in_a_folder_that_exists():
    with pytest.raises(MedchatError, match="cannot write: /proc/self/t"):
        with replacing("/proc/self/t") as tmp: tmp.mkdir()

def test_a_folder_is_not_replaced_by_a_file_nor_the_other_way(tmp_path):
    (tmp_path/"folder").mkdir(); (tmp_path/"folder"/"keep").write_text("x"); (tmp_path/"file").write_text("x")
    with pytest.raises(MedchatError, match="cannot write"):
        with replacing(tmp_path/"folder") as tmp: tmp.write_text("y")
    with pytest.raises(MedchatError, match="cannot write"):
        with replacing(tmp_path/"file") as tmp: tmp.mkdir()
    assert files(tmp_path) == ["file", "folder"] and files(tmp_path/"folder") == ["keep"]

def test_when_the_swap_fails_the_old_folder_comes_back(tmp_path, monkeypatch):
    (tmp_path/"t").mkdir(); (tmp_path/"t"/"keep").write_text("old")
    real, calls = os.replace, []
    def failing(a, b):
        calls.append(a)
        if len(calls) == 2: raise OSError(errno.EIO, "Input/output error", str(a))
        return real(a, b)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(MedchatError, match="cannot write"):
        with replacing(tmp_path/"t") as tmp: tmp.mkdir()
    assert files(tmp_path) == ["t"] and files(tmp_path/"t") == ["keep"]

def test_links_are_followed(tmp_path):
    (tmp_path/"big").mkdir(); (tmp_path/"big"/"data").mkdir()
    (tmp_path/"link").symlink_to(tmp_path/"big"/"data")
    with replacing(tmp_path/"link") as tmp: tmp.mkdir(); (tmp/"x").write_text("x")
    assert (tmp_path/"link").is_symlink() and files(tmp_path/"big") == ["data"] and files(tmp_path/"big"/"data") == ["x"]

def test_relative_and_odd_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "a", "./b/", "../" + tmp_path.name + "/c", "ein Ö.txt", "x" * 200:
        with replacing(name) as tmp: tmp.write_text("x")
        assert Path(name.rstrip("/")).read_text() == "x"

def test_ctrl_c_in_a_real_process(tmp_path):
    code = "import sys, time\nfrom medchat.core import replacing\nwith replacing('t') as tmp:\n  tmp.mkdir(); (tmp/'half').write_text('x'); print('ready', flush=True); time.sleep(60)"
    p = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(core.__file__).parent.parent)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert p.stdout.readline() == b"ready\n" and len(files(tmp_path)) == 1
    p.send_signal(signal.SIGINT)
    p.communicate(timeout=20)
    assert p.returncode != 0 and files(tmp_path) == []

# ---- JSON lines

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=8)

@given(rows=st.lists(st.dictionaries(st.text(alphabet=st.characters()), json_values, max_size=4), max_size=5))
def test_json_lines_survive_any_text(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("j")/"rows.jsonl"
    assert write_jsonl(path, rows) == len(rows)
    assert list(read_jsonl(path)) == list(enumerate(rows, 1))

def test_lone_surrogates_and_line_separators(tmp_path):
    rows = [{"t": "\ud800 \u2028 \u2029 \x85 \r\n \x0c"}]
    write_jsonl(tmp_path/"r", rows)
    assert [row for _, row in read_jsonl(tmp_path/"r")] == rows

@pytest.mark.parametrize("text, line, why", [
    (b'{"a": 1}\n{"a"', 2, "not a line of JSON"), (b'\n\n{"a": \xff}', 3, "not a line of JSON"), (b'[1]\n', 1, "not a JSON object"), (b'{}\nnull\n', 2, "not a JSON object"),
    (b'{}\n"text"\n', 2, "not a JSON object"), (b"[" * 100_000, 1, "not a line of JSON"), (b"\x00\x01", 1, "not a line of JSON"), (b"\xff\xfe{\x00}\x00", 1, "not a line of JSON")])
def test_broken_lines_are_named(tmp_path, text, line, why):
    (tmp_path/"r.jsonl").write_bytes(text)
    with pytest.raises(MedchatError, match=why) as e: list(read_jsonl(tmp_path/"r.jsonl"))
    assert e.value.value == f"{tmp_path/'r.jsonl'}:{line}"

def test_byte_order_mark_and_windows_lines(tmp_path):
    (tmp_path/"r").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert list(read_jsonl(tmp_path/"r")) == [(1, {"a": 1}), (3, {"a": 2})]

@pytest.mark.parametrize("path, why", [("nowhere", "No such file"), (".", "Is a directory")])
def test_unreadable(tmp_path, monkeypatch, path, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MedchatError, match=re.escape(f"cannot read: {path}".rstrip(".") + f". {why}")): list(read_jsonl(path))

def test_reading_is_lazy(tmp_path):
    (tmp_path/"r").write_text('{"a": 1}\nbroken\n')
    assert next(read_jsonl(tmp_path/"r")) == (1, {"a": 1})

def test_a_value_that_json_cannot_hold_leaves_nothing(tmp_path):
    with pytest.raises(TypeError): write_jsonl(tmp_path/"new"/"r", [{"a": 1}, {"a": {1, 2}}])
    assert files(tmp_path) == []

# ---- the rest

@pytest.mark.parametrize("seed", [0, 3407, -1, 2**40])
def test_seed_reaches_numpy_and_random(seed):
    import numpy
    draw = lambda: (set_seed(seed), random.random(), numpy.random.rand())[1:]
    assert draw() == draw()

def test_seed_does_not_import_torch():
    code = "import sys\nfrom medchat.core import set_seed\nset_seed(1)\nassert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(Path(core.__file__).parent.parent)})

def test_progress_is_silent_where_nobody_watches(capfd):
    assert list(progress(iter("abc"), total=3, desc="x")) == ["a", "b", "c"]
    assert capfd.readouterr() == ("", "")

def test_progress_shows_on_a_terminal():
    import fcntl, pty, termios
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    code = "from medchat.core import progress\nfor _ in progress(range(3), desc='reading'): pass"
    subprocess.run([sys.executable, "-c", code], check=True, stderr=theirs, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path(core.__file__).parent.parent)})
    assert select.select([mine], [], [], 5)[0] and b"reading" in os.read(mine, 10_000)

def test_sample_data(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCHAT_SAMPLE_DATA", str(tmp_path))
    assert sample_data() == tmp_path
    monkeypatch.setenv("MEDCHAT_SAMPLE_DATA", str(tmp_path/"nowhere"))
    with pytest.raises(MedchatError, match="no sample_data folder: .*nowhere"): sample_data()
    monkeypatch.delenv("MEDCHAT_SAMPLE_DATA")
    monkeypatch.chdir(tmp_path)
    assert sample_data() == Path(core.__file__).parent.parent/"sample_data"
