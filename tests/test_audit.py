"The audit log: nothing torn, nothing lost, and what was changed shows."
import csv, json, os, random, shutil, signal, sqlite3, subprocess, sys, threading, time
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, PngImagePlugin
from medchat.audit import COLUMNS, START, AuditLog, audit, image_hash, read_head, read_log, row_hash, verify
from medchat.core import MedchatError

root = Path(__file__).resolve().parent.parent
MODEL = dict(model="run", base="tiny", base_sha256="1f"*32, adapter_sha256="2e"*32)

@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path/"run")
    yield log
    log.close()

def fill(log, n=5): return [log.add("ann", MODEL, ["a"*64], f"question {i}", f"reply {i}", ["urgent"] if i % 2 else []) for i in range(n)]

def process(code, *argv): return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE, text=True)

# ---- rows

def test_a_turn_comes_back_as_it_was(log):
    n = log.add("ann", MODEL, ["a"*64], "Is it?\nYes", "no", ["urgent"], kind="report")
    row = next(read_log(log.path.parent))
    assert (row["n"], row["user"], row["prompt"], row["reply"], row["kind"]) == (n, "ann", "Is it?\nYes", "no", "report") == (1, *tuple(row[k] for k in ("user", "prompt", "reply", "kind")))
    assert json.loads(row["identity"]) == MODEL and json.loads(row["fired"]) == ["urgent"] and json.loads(row["image_hashes"]) == ["a"*64]
    assert len(row["time"]) == len("2026-01-01T00:00:00.000000+00:00") and row["time"].endswith("+00:00")
    assert row["previous"] == START and row["hash"] == row_hash(START, row)

def test_feedback_is_a_row_of_its_own(log):
    first = fill(log, 2)[0]
    before = list(read_log(log.path))
    assert [log.feedback(first, liked) for liked in (True, False, None)] == [3, 4, 5]
    log.feedback(first, None, "yes, slightly", user="ben")
    rows = list(read_log(log.path))
    assert rows[:2] == before and [r["liked"] for r in rows[2:]] == [1, 0, None, None] and {r["turn"] for r in rows[2:]} == {1}
    assert rows[-1]["correction"] == "yes, slightly" and rows[-1]["user"] == "ben" and verify(log.path).rows == 6
    for wrong in (0, 3, 99): # 3 is feedback itself
        with pytest.raises(MedchatError, match="no such turn"): log.feedback(wrong, True)
    assert verify(log.path).rows == 6

@settings(max_examples=15)
@given(st.text(st.characters(), max_size=60), st.text(st.characters(), max_size=60), st.lists(st.text(st.characters(), max_size=9), max_size=3))
def test_any_text_can_be_logged_and_holds(tmp_path_factory, prompt, reply, fired):
    folder = tmp_path_factory.mktemp("log")
    log = AuditLog(folder)
    log.add(prompt, {prompt: reply}, [], prompt, reply, fired); log.close()
    row, = read_log(folder)
    plain = lambda text: text.encode("utf-8", "backslashreplace").decode()
    assert (row["prompt"], row["reply"]) == (plain(prompt), plain(reply)) and verify(folder).broken is None
    for out in ("x.csv", "x.parquet"): audit("export", str(folder), str(folder/out))
    shutil.rmtree(folder)

# ---- the chain

def spoiled(log, tmp_path, sql, *values):
    copy = tmp_path/"copy"; shutil.rmtree(copy, ignore_errors=True); copy.mkdir()
    db = sqlite3.connect(copy/"audit.db"); log._db.backup(db)
    db.execute(sql, values); db.commit(); db.close()
    shutil.copy(log.path.with_suffix(".head"), copy/"audit.head")
    return copy

@pytest.mark.parametrize("column", [*COLUMNS[1:], "previous", "hash"])
def test_a_change_in_any_column_shows(log, tmp_path, column):
    fill(log); log.feedback(1, True, "better"); log.feedback(2, False, "other")
    copy = spoiled(log, tmp_path, f"update log set {column} = ? where n = 6", 0 if column == "liked" else 2 if column == "turn" else "other")
    assert verify(copy).broken == 6 and verify(copy).rows == 5
    with pytest.raises(MedchatError, match="broken at row 6"): audit("verify", str(copy))

@pytest.mark.parametrize("sql, row, why", [("delete from log where n = 3", 3, "missing"), ("delete from log where n = 1", 1, "missing"), ("delete from log where n = 5", 5, "missing at the end"), ("delete from log where n > 2", 3, "3 rows are missing at the end"),
    ("delete from log", 1, "5 rows are missing at the end"), ("update log set n = n + 10 where n = 5", 5, "missing"), ("insert into log select 6, time, kind, user, identity, image_hashes, prompt, reply, fired, turn, liked, correction, previous, hash from log where n = 5", 6, "follow")])
def test_missing_and_added_rows_show(log, tmp_path, sql, row, why):
    fill(log)
    found = verify(spoiled(log, tmp_path, sql))
    assert found.broken == row and why in found.why

def test_bytes_in_a_row_show(log, tmp_path):
    fill(log)
    assert verify(spoiled(log, tmp_path, "update log set reply = x'ff00' where n = 3")).broken == 3

def test_swapped_rows_show(log, tmp_path):
    fill(log)
    copy = spoiled(log, tmp_path, "update log set n = case n when 2 then -3 else -2 end where n in (2, 3)")
    db = sqlite3.connect(copy/"audit.db"); db.execute("update log set n = -n where n < 0"); db.commit(); db.close()
    assert verify(copy).broken == 2

def test_a_head_that_is_gone_or_torn_or_another_shows(log):
    fill(log); head = log.path.with_suffix(".head")
    kept = head.read_text()
    for text in ("", "{", "[]", '{"count": "x", "hash": ""}', '{"count": 4, "hash": "00"}', '{"count": 6, "hash": "00"}', '{"count": -1, "hash": "00"}', '{"count": 1e400, "hash": ""}', '{"count": NaN, "hash": ""}'):
        head.write_text(text); assert verify(log.path).broken is not None, text
    head.unlink(); assert "no head file" in verify(log.path).why
    with pytest.raises(MedchatError, match="what its head says"): log.add("ann", {}, [], "q", "r", [])
    head.write_text(kept); assert verify(log.path).broken is None and log.add("ann", {}, [], "q", "r", []) == 6

def test_a_head_that_lags_is_no_alarm_and_is_made_good(log):
    fill(log, 3); head = log.path.with_suffix(".head"); old = head.read_text()
    fill(log, 1); head.write_text(old) # killed between the two writes
    assert verify(log.path).broken is None and verify(log.path).rows == 4
    fill(log, 1); assert read_head(log.path)[0] == 5 and verify(log.path).rows == 5

def test_a_cut_log_is_not_written_on(log, tmp_path):
    fill(log); copy = spoiled(log, tmp_path, "delete from log where n = 5")
    with pytest.raises(MedchatError, match="what its head says"): AuditLog(copy)
    assert verify(copy).broken == 5 # and it still shows

def test_what_the_head_hash_kept_elsewhere_is_good_for(log, tmp_path):
    "Who rewrites both files makes a chain that holds, but not the same head."
    fill(log); elsewhere = verify(log.path).head
    forged = AuditLog(tmp_path/"forged"); fill(forged, 4); forged.add("ann", MODEL, ["a"*64], "question 4", "another reply", [])
    assert verify(forged.path).broken is None and verify(forged.path).head != elsewhere
    forged.close()

def test_it_goes_on_after_a_restart(tmp_path):
    for k in range(3):
        log = AuditLog(tmp_path); fill(log, 2); log.close()
        assert verify(tmp_path).rows == 2*(k + 1) and verify(tmp_path/"audit.db").broken is None

# ---- many writers, sudden ends

def test_threads_share_one_log(log):
    jobs = [threading.Thread(target=fill, args=(log, 8)) for _ in range(6)]
    [j.start() for j in jobs]; [j.join() for j in jobs]
    assert verify(log.path).rows == 48 and verify(log.path).broken is None and read_head(log.path)[0] == 48

def test_reading_while_others_write(tmp_path):
    log = AuditLog(tmp_path); log.close()
    jobs = [process("import sys; from medchat.audit import AuditLog\nlog = AuditLog(sys.argv[1])\nfor i in range(30): log.add(sys.argv[2], {}, [], 'q', 'r' * 3000, [])", tmp_path, k) for k in range(2)]
    seen = []
    while any(j.poll() is None for j in jobs): seen.append(verify(tmp_path)); time.sleep(.02)
    assert [j.wait() for j in jobs] == [0, 0] and all(c.broken is None for c in seen)
    assert [c.rows for c in seen] == sorted(c.rows for c in seen) and verify(tmp_path).rows == 60

def test_a_kill_at_any_moment_loses_no_finished_turn(tmp_path):
    code = "import sys; from medchat.audit import AuditLog\nlog = AuditLog(sys.argv[1])\nprint('ready', flush=True)\nwhile True: print(log.add('ann', {}, [], 'q', 'r' * 5000, []), flush=True)"
    rng, least = random.Random(3407), 0
    for _ in range(8):
        job = process(code, tmp_path)
        assert job.stdout.readline() == "ready\n"
        time.sleep(rng.random()*.12)
        job.send_signal(signal.SIGKILL)
        said = [int(line) for line in job.stdout.read().splitlines() if line.strip()]; job.wait()
        least = max([least, *said])
        chain = verify(tmp_path)
        assert chain.broken is None and chain.rows in (least, least + 1), (chain, least) # at most the one that was under way
        least = chain.rows
        assert all(len(row["reply"]) == 5000 for row in read_log(tmp_path))
    assert least > 8

def test_a_full_disk_tears_nothing(log):
    fill(log, 2)
    log._db.execute(f"pragma max_page_count = {log._db.execute('pragma page_count').fetchone()[0] + 1}")
    with pytest.raises(MedchatError, match="full") as e: [log.add("ann", {}, [], "q", "r"*20_000, []) for _ in range(9)]
    assert "disk is full" in e.value.hint and verify(log.path).broken is None
    rows = verify(log.path).rows
    log._db.execute("pragma max_page_count = 1000000"); assert log.add("ann", {}, [], "q", "r", []) == rows + 1

def test_places_where_nobody_can_write(no_write, tmp_path):
    with pytest.raises(MedchatError, match="cannot use the audit log"): AuditLog(no_write)
    (tmp_path/"audit.db").write_bytes(b"no database at all, but long enough to be looked at" * 50)
    with pytest.raises(MedchatError, match="not an audit log"): AuditLog(tmp_path)
    with pytest.raises(MedchatError, match="not an audit log"): verify(tmp_path)
    with pytest.raises(MedchatError, match="no audit log"): verify(tmp_path/"nothing")

def test_a_head_that_cannot_be_written_is_told_and_the_row_stays(log, monkeypatch):
    fill(log, 1)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(MedchatError, match="cannot write"): fill(log, 1)
    monkeypatch.undo()
    assert verify(log.path).rows == 2 and verify(log.path).broken is None and fill(log, 1) == [3]

# ---- images

def test_images_are_kept_only_when_asked_for(tmp_path):
    image, tagged = Image.radial_gradient("L"), PngImagePlugin.PngInfo()
    tagged.add_text("PatientName", "ROE^JANE"); image.save(tmp_path/"tagged.png", pnginfo=tagged)
    plain, keeping = AuditLog(tmp_path/"a"), AuditLog(tmp_path/"b", keep_images=tmp_path/"b"/"images")
    loaded = Image.open(tmp_path/"tagged.png")
    assert plain.add_image(loaded) == keeping.add_image(loaded) == keeping.add_image(image) == image_hash(image)
    assert not list((tmp_path/"a").rglob("*.png"))
    kept, = (tmp_path/"b"/"images").iterdir()
    assert kept.stem == image_hash(Image.open(kept)) and b"ROE" not in kept.read_bytes() and not Image.open(kept).info
    assert image_hash(image) != image_hash(image.rotate(90).point(lambda v: v ^ 1)) and image_hash(Image.new("RGB", (2, 3))) != image_hash(Image.new("RGB", (3, 2)))
    plain.close(); keeping.close()

# ---- the command

def test_exports_hold_every_row(log, tmp_path):
    import pyarrow.parquet
    fill(log, 3); log.feedback(2, True); log.add("=1+1", {}, [], "=cmd|' /C calc'!A0", "-5", []); log.add("@x", {}, [], "\tq", "+1", [])
    audit("export", str(log.path.parent), str(tmp_path/"x.parquet")); audit("export", str(log.path), str(tmp_path/"x.csv"))
    rows = pyarrow.parquet.read_table(tmp_path/"x.parquet").to_pylist()
    assert [r["n"] for r in rows] == [1, 2, 3, 4, 5, 6] and rows[3]["liked"] is True and rows[0]["liked"] is None and rows[4]["prompt"] == "=cmd|' /C calc'!A0"
    last = START
    for row in rows: # the exported table can be checked again
        assert row["hash"] == row_hash(last, {**row, "liked": None if row["liked"] is None else int(row["liked"])}); last = row["hash"]
    with open(tmp_path/"x.csv", newline="", encoding="utf-8") as f: cells = list(csv.reader(f))
    assert len(cells) == 7 and cells[0][:2] == ["n", "time"] and not [c for row in cells[1:] for c in row if c[:1] in tuple("=+-@\t\r\n") and c]
    assert cells[5][6:8] == ["'=cmd|' /C calc'!A0", "'-5"] and cells[6][6:8] == ["'\tq", "'+1"]

def test_the_command_says_what_is_wrong(log, tmp_path, capsys):
    fill(log, 2); audit("verify", str(log.path.parent))
    assert f"2 rows, and the chain holds\nhead {verify(log.path).head}" in capsys.readouterr().out
    for argv, says in ((("export", str(log.path)), "name a file"), (("export", str(log.path), "x.txt"), "name a file"), (("burn", str(log.path)), "unknown action"), (("export", str(tmp_path/"no"), str(tmp_path/"x.csv")), "no audit log")):
        with pytest.raises(MedchatError, match=says): audit(*argv)
    assert not list(tmp_path.glob("x.*"))
