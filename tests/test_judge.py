"""A judge that is biased, slow, busy, broken, dishonest or gone: no score is guessed, nothing is asked twice, and the key stays here."""
import json, logging, os, random, re, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from judge_server import JudgeServer, told
from medchat import judge as module
from medchat.core import MedchatError
from medchat.judge import PROMPT, READINGS, Judge, api_address, api_key, judge_messages, judge_replies, question_key, read_answers, read_scores, summarise_ratings

root = Path(__file__).resolve().parent.parent
KEY = "sk-test-0123456789abcdef"
QUICK = dict(timeout=2, attempts=3, wait=.01, longest_wait=.05)
FACTS = ["small left pleural effusion", "fracture of the right clavicle", "mass in the left upper lobe", "enlarged heart", "cyst of the right kidney"]
QUESTIONS = [dict(question=f"What is it? ({i})", reference=f"It is a {f}.", context=f) for i, f in enumerate(FACTS)]
REPLIES = ["left effusion", "fracture", "pneumonia", "enlarged heart", "cyst of the left kidney"]

@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in module.KEYS: monkeypatch.delenv(name, raising=False)

@pytest.fixture
def cache(tmp_path): return tmp_path/"judge"/"answers.jsonl"

def ask(server, cache, questions=QUESTIONS, replies=REPLIES, **more): return judge_replies(questions, replies, server.url, "j", cache, **{**QUICK, **more})
def one(server, cache, **more): return ask(server, cache, QUESTIONS[:1], REPLIES[:1], **more)

# -- both orders

@pytest.mark.parametrize("bias", [0, 1, 3])
def test_swapping_the_roles_gives_the_reciprocal(bias, tmp_path):
    "Whatever the position bias: candidate against reference is reference against candidate, turned over."
    turned = [{**q, "reference": r} for q, r in zip(QUESTIONS, REPLIES)], [q["reference"] for q in QUESTIONS]
    with JudgeServer(bias=bias) as server: there, back = ask(server, tmp_path/"a"), ask(server, tmp_path/"b", *turned)
    assert there["relative"]["value"]*back["relative"]["value"] == pytest.approx(100**2)
    assert (there["candidate_mean"], there["reference_mean"]) == pytest.approx((back["reference_mean"], back["candidate_mean"]))
    in_one_order = there["by_order"]["candidate_first"]["relative"]["value"]*back["by_order"]["candidate_first"]["relative"]["value"]
    assert in_one_order == pytest.approx(100**2) if bias == 0 else in_one_order > 1.2*100**2 # what the other order is for

def test_equal_answers_are_equal_in_spite_of_the_bias(cache):
    "As many words of the facts, but others."
    facts = "left right upper lower".split()
    questions = [dict(question="Where?", reference=" ".join(facts[:2]), context=" ".join(facts))]
    with JudgeServer(bias=3) as server: r = ask(server, cache, questions, [" ".join(facts[2:])])
    assert r["with_context"] == 1
    assert r["relative"]["value"] == 100 and r["candidate_mean"] == r["reference_mean"]
    first, second = (r["by_order"][k]["relative"]["value"] for k in ("candidate_first", "reference_first"))
    assert first > 100 > second and first*second == pytest.approx(100**2)
    assert r["order_changed"]["value"] == 1

def test_a_bias_of_nothing_changes_no_mind(cache):
    with JudgeServer(bias=0) as server: r = ask(server, cache)
    assert r["order_changed"]["value"] == 0 and r["order_changed"]["n"] == len(QUESTIONS)
    assert r["by_order"]["candidate_first"]["relative"] == r["by_order"]["reference_first"]["relative"] == r["relative"]

def test_what_is_sent(cache, capsys):
    with JudgeServer() as server: ask(server, cache)
    assert capsys.readouterr().out == "Judge j: 5 questions with references and replies go to 127.0.0.1 as text, no images (10 requests)\n"
    bodies = [body for _, _, body in server.log]
    assert len(bodies) == 10 and all(set(b) == {"model", "messages", "temperature", "seed", "max_tokens"} and (b["model"], b["temperature"], b["seed"]) == ("j", 0, 3407) for b in bodies)
    assert all(isinstance(m["content"], str) and m["role"] == "user" for b in bodies for m in b["messages"]) # text, no image parts
    pairs = Counter((told(b)["question"], told(b)["facts"], told(b)["A"], told(b)["B"]) for b in bodies)
    assert pairs == Counter((q["question"], q["context"], *ab) for q, r in zip(QUESTIONS, REPLIES) for ab in ((r, q["reference"]), (q["reference"], r)))
    assert not any("Authorization" in headers for _, headers, _ in server.log)

def test_the_reference_stands_for_facts_that_nobody_has_and_is_not_named():
    text = judge_messages(dict(question="Where?", reference="left"), "right", True)[0]["content"]
    assert told(dict(messages=[dict(content=text)])) == dict(question="Where?", facts="left", A="right", B="left")
    assert "reference" not in text.lower() and "candidate" not in text.lower()

@given(st.text(), st.text())
def test_no_answer_ends_the_question(reply, reference):
    "Whatever stands in an answer, it stays a string of one JSON object."
    text = judge_messages(dict(question="Q", reference=reference, context="c"), reply, True)[0]["content"]
    assert json.loads(text.removeprefix(PROMPT)) == dict(question="Q", facts="c", A=reply, B=reference)

# -- scores by hand

def test_by_hand():
    r = summarise_ratings([((6, 8), (4, 10)), ((9, 6), (5, 10)), None, ((7, 7), (7, 7))], ["p", "q", "q", "q"])
    assert r["relative"]["value"] == pytest.approx(100*(10 + 14 + 14)/(18 + 16 + 14)) and (r["relative"]["n"], r["relative"]["groups"], r["unread"]) == (3, 2, 1)
    assert r["mean_of_ratios"]["value"] == pytest.approx(100*(10/18 + 14/16 + 1)/3)
    assert (r["candidate_mean"], r["reference_mean"]) == pytest.approx((38/6, 48/6))
    assert r["by_order"]["candidate_first"]["relative"]["value"] == pytest.approx(100*22/21) and r["by_order"]["reference_first"]["relative"]["value"] == pytest.approx(100*16/27)
    assert r["order_changed"]["value"] == pytest.approx(1/3) # the second: 9 > 6, then 5 < 10

def test_the_interval_is_the_bootstrap_over_groups():
    "The same draws, made here on the ratio itself."
    rng = random.Random(0)
    ratings = [tuple((rng.randint(1, 10), rng.randint(5, 10)) for _ in "ab") for _ in range(60)]
    groups = [f"p{i//3}" for i in range(60)]
    sums = np.array([[sum(ratings[i][k][side] for i in range(3*g, 3*g + 3) for k in (0, 1)) for side in (0, 1)] for g in range(20)], float)
    drawn = np.random.default_rng(1).integers(20, size=(20000, 20))
    low, high = np.quantile(100*sums[drawn, 0].sum(1)/sums[drawn, 1].sum(1), [.025, .975])
    s = summarise_ratings(ratings, groups)["relative"]
    assert s["groups"] == 20 and (s["low"], s["high"]) == pytest.approx((low, high), abs=1.5) and s["low"] < s["value"] < s["high"]
    alone = summarise_ratings(ratings)["relative"]
    assert alone["value"] == s["value"] and alone["groups"] == 60

def test_one_question_has_a_wide_interval_and_none_has_no_score():
    s = summarise_ratings([((9, 9), (9, 9))])["relative"]
    assert s["value"] == 100 and 10 <= s["low"] < 50 and 200 < s["high"] <= 1000
    r = summarise_ratings([None, None], ["p", "q"])
    assert r["unread"] == 2 and r["relative"] == dict(value=None, n=0, groups=0, low=None, high=None) and r["candidate_mean"] is r["by_order"]["reference_first"]["reference_mean"] is None

score = st.integers(1, 10)
ratings = st.lists(st.tuples(st.tuples(score, score), st.tuples(score, score)), min_size=1, max_size=12)

@settings(max_examples=12)
@given(ratings, st.integers(0, 99))
def test_properties_of_the_summary(rows, seed):
    r = summarise_ratings(rows)
    for s in (r["relative"], r["mean_of_ratios"]): assert 10 <= s["low"] <= s["value"] + 1e-9 and s["value"] <= s["high"] + 1e-9 <= 1000 + 2e-9
    turned = summarise_ratings([tuple(pair[::-1] for pair in row) for row in rows])
    assert r["relative"]["value"]*turned["relative"]["value"] == pytest.approx(100**2) and r["order_changed"] == turned["order_changed"]
    mixed = summarise_ratings(random.Random(seed).sample(rows, len(rows)))
    assert mixed["relative"] == pytest.approx(r["relative"]) and mixed["order_changed"] == r["order_changed"]

# -- reading

@pytest.mark.parametrize("text", ["A: 8, B: 6", "A: 8, B: 6\nBecause 3 < 4.", "\n\n A=8; B=6.", "8 6", "8, 6", "8 and 6", "**A: 8, B: 6**", "Answer A: 8/10 | Answer B: 6/10", "Scores: A: 8, B: 6", "a: 8.0, b: 6.0",
    "A: 8\nB: 6\nThe first is better.", '{"A": 8, "B": 6}', '{\n "A": 8,\n "B": 6\n}', "<think>A: 1, B: 1?\n</think>\n\nA: 8, B: 6", "(8, 6)"])
def test_scores_that_can_be_read(text): assert read_scores(text) == (8, 6)

@pytest.mark.parametrize("text", ["", "none", "A: 8", "B: 6, A: 8", "A: 8-9, B: 6", "A: -8, B: 6", "A: 11, B: 6", "A: 0, B: 6", "A: 0.5, B: 6", "A: 80/100, B: 60/100", "A: 8/9, B: 6/9", "A: 8%, B: 6%", "A: eight, B: six", "8 6 7",
    "A has 2 errors, B has 1", "I give A 8 and B 6", "Of the 2 answers, A is better.\nA: 8, B: 6", "<think>A: 8, B: 6", "A: 8, B: 6 or 7", "A: 1e1, B: 6", "A: nan, B: 6", "8.6", "9"*5000 + " 6"])
def test_scores_that_cannot(text): assert read_scores(text) is None

@given(st.text())
def test_reading_never_fails(text): assert read_scores(text) is None or all(1 <= s <= 10 for s in read_scores(text))

@given(st.integers(1, 10), st.integers(1, 10), st.text(alphabet=st.characters(blacklist_characters="<>")))
def test_the_form_that_was_asked_for_is_always_read(a, b, reasons): assert read_scores(f"A: {a}, B: {b}\n{reasons}") == (a, b)

# -- what is kept

def test_a_repeated_run_asks_nothing(cache, capsys):
    with JudgeServer() as server:
        first = ask(server, cache); n = len(server.log)
        assert n == 10 and len(read_answers(cache)) == 10
        assert ask(server, cache) == first and len(server.log) == n
        assert "nothing is sent" in capsys.readouterr().out.splitlines()[-1]
        ask(server, cache, replies=[*REPLIES[:-1], "another"]); assert len(server.log) == n + 2 # only what is new
        judge_replies(QUESTIONS, REPLIES, server.url, "another judge", cache, **QUICK); assert len(server.log) == n + 2 + 10

def test_one_question_put_twice_is_asked_once(cache):
    with JudgeServer() as server: r = ask(server, cache, QUESTIONS[:1]*3, [QUESTIONS[0]["reference"]]*3)
    assert len(server.log) == 1 and r["relative"]["n"] == 3 and r["relative"]["value"] == 100 # both orders are the same words, too

def test_a_torn_line_is_asked_again_and_harms_no_other(cache):
    with JudgeServer() as server:
        first = ask(server, cache)
        data = cache.read_bytes()
        for cut in (1, 7, 60):
            cache.write_bytes(data[:-cut]); before = len(server.log) # a cut of 1 takes only the line's end
            assert ask(server, cache) == first and len(server.log) - before == (cut > 1)
            assert len(read_answers(cache)) == 10 and cache.read_bytes().endswith(b"\n")
            before = len(server.log); assert ask(server, cache) == first and len(server.log) == before

def test_broken_lines_in_the_middle(cache):
    with JudgeServer() as server:
        first = ask(server, cache)
        lines = cache.read_bytes().splitlines()
        lines[2], lines[5] = b"\xff\xfe\x00", re.sub(rb'"scores": \[[^]]*\]', b'"scores": [99, 1]', lines[5]) # not text; no scores
        cache.write_bytes(b"\n".join(lines) + b"\n"); before = len(server.log)
        assert ask(server, cache) == first and len(server.log) == before + 2

def test_another_file_is_not_written_to(tmp_path):
    other = tmp_path/"records.jsonl"; other.write_text('{"id": "1", "question": "?"}\n')
    with JudgeServer() as server, pytest.raises(MedchatError, match="not a file of a judge's answers"): one(server, other)
    assert other.read_text() == '{"id": "1", "question": "?"}\n' and not server.log

def test_nothing_is_asked_that_could_not_be_kept(no_write):
    with JudgeServer() as server, pytest.raises(MedchatError, match="cannot (write|read)"): one(server, no_write/"a.jsonl")
    assert not server.log

SCRIPT = """import sys
from medchat.judge import judge_replies
from test_judge import QUESTIONS, REPLIES
judge_replies(QUESTIONS, REPLIES, sys.argv[1], "j", sys.argv[2], workers=2)"""

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_the_next_run_asks_only_the_rest(cache, number):
    with JudgeServer(slow=.15) as server:
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, server.url, str(cache)], env={**os.environ, "PYTHONPATH": f"{root}:{root/'tests'}"}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not (cache.exists() and cache.read_bytes().count(b"\n") >= 3): assert time.monotonic() < end and child.poll() is None; time.sleep(.01)
        child.send_signal(number)
        assert child.wait(20) != 0
        time.sleep(.3); server.slow = 0
        kept, before = len(read_answers(cache)), len(server.log)
        assert 3 <= kept < 10 and before - kept <= (2 if number == signal.SIGKILL else 0) # interrupted, it keeps what was under way
        r = ask(server, cache)
        assert len(server.log) - before == 10 - kept and r["relative"]["n"] == 5

def test_the_endpoint_goes_in_the_middle(cache):
    with JudgeServer(mode="503") as server:
        server.good_for = 4
        with pytest.raises(MedchatError, match=r"does not answer: HTTP 503 .*; tried 3 times; 4 of 10 answers are kept\. .*Repeat the command to go on"): ask(server, cache, workers=1)
        assert len(read_answers(cache)) == 4 and len(server.log) == 4 + 3
        server.good_for = None; server.mode = "good"
        assert ask(server, cache)["relative"]["n"] == 5 and len(server.log) == 4 + 3 + 6

# -- trying again

@pytest.mark.parametrize("fault", ["429", "500", "503", "truncated", "page", "drop"])
def test_a_passing_fault_is_tried_again(fault, cache):
    with JudgeServer(script=[fault, fault]) as server: r = one(server, cache, workers=1)
    assert len(server.log) == 2 + 2 and r["relative"]["n"] == 1 and r["unread"] == 0

@pytest.mark.parametrize("fault, said", [("429", "HTTP 429 slow down"), ("500", "HTTP 500 out of order"), ("truncated", "not a chat completion"), ("page", "not a chat completion: <html>Welcome"), ("drop", "tried 3 times")])
def test_a_lasting_fault_ends(fault, said, cache):
    with JudgeServer(mode=fault) as server, pytest.raises(MedchatError) as e: one(server, cache, workers=1)
    assert len(server.log) == 3 and said in str(e.value) and "\n" not in str(e.value) and server.url in str(e.value) and "kept" not in str(e.value) and not read_answers(cache)

@pytest.mark.parametrize("fault, says, timeout", [("hang", "no answer within 0.4 s", .4), ("drip", "no answer within 0.4 s", .4), ("endless", "not a chat completion", 4)]) # the last is cut at a length, long before its time
def test_an_answer_that_never_ends(fault, says, timeout, cache):
    with JudgeServer(mode=fault) as server:
        start = time.monotonic()
        with pytest.raises(MedchatError, match=says): one(server, cache, workers=1, attempts=2, timeout=timeout)
        assert len(server.log) == 2 and time.monotonic() - start < 5

def test_nobody_there(cache):
    with JudgeServer() as server: pass
    with pytest.raises(MedchatError, match="does not answer: .*tried 3 times"): one(server, cache)

@pytest.mark.parametrize("fault, after, cap, low, high", [("429", "1", 60, 1, 3), ("429", "3600", .3, .3, 2), ("429_date", "", 60, .5, 4), ("429", "soon", 60, 0, .8), ("429", "-5", 60, 0, .8)])
def test_retry_after_is_honoured_up_to_a_cap(fault, after, cap, low, high, cache):
    with JudgeServer(script=[fault], retry_after=after) as server: one(server, cache, workers=1, longest_wait=cap)
    assert len(server.log) == 3 and low <= server.log[1][0] - server.log[0][0] < high

def test_pauses_double(monkeypatch):
    pauses = []
    with JudgeServer(mode="500") as server, Judge(server.url, "j", attempts=5, wait=.01, longest_wait=.05) as judge:
        monkeypatch.setattr(judge._stopped, "wait", lambda s: pauses.append(s))
        with pytest.raises(MedchatError, match="tried 5 times"): judge.ask([dict(role="user", content="x")])
    assert pauses == [0, .01, .02, .04, .05]

@pytest.mark.parametrize("mode, says", [("401", "HTTP 401"), ("302", "It has moved"), ("418", "HTTP 418 a teapot")])
def test_what_asking_again_cannot_mend(mode, says, cache):
    with JudgeServer(mode=mode) as server, pytest.raises(MedchatError, match=says) as e: one(server, cache, workers=1)
    assert len(server.log) == 1 and server.url in str(e.value)

def test_a_wrong_path(cache):
    with JudgeServer() as server, pytest.raises(MedchatError, match="/v2/chat/completions refuses: HTTP 404 no such page. Check the address") as e:
        judge_replies(QUESTIONS, REPLIES, server.url.replace("/v1", "/v2") + "?token=secret", "j", cache, workers=1, **QUICK)
    assert len(server.log) == 1 and "secret" not in str(e.value)

def test_a_question_that_is_refused_is_unread_and_asked_again_next_time(cache):
    with JudgeServer(script=["good", "400"]) as server:
        r = ask(server, cache, workers=1)
        assert r["unread"] == 1 and r["relative"]["n"] == 4 and len(read_answers(cache)) == 9
        assert ask(server, cache)["unread"] == 0 and len(server.log) == 11

def test_when_all_are_refused_that_is_an_error(cache):
    with JudgeServer(mode="400") as server, pytest.raises(MedchatError, match="takes no question: HTTP 400 too long"): ask(server, cache, workers=1)
    assert 3 <= len(server.log) <= 5 and not read_answers(cache)

@pytest.mark.parametrize("mode", ["nonsense", "out_of_range", "null"])
def test_what_cannot_be_read_is_counted_not_guessed(mode, cache):
    with JudgeServer(mode=mode) as server:
        r = ask(server, cache)
        assert r["unread"] == 5 and r["relative"]["n"] == 0 and r["relative"]["value"] is None and len(server.log) == 10*READINGS
        assert ask(server, cache) == r and len(server.log) == 10*READINGS # kept
    kept = read_answers(cache).values()
    assert len(kept) == 10 and all(row["scores"] is None for row in kept)

def test_only_the_seed_and_a_note_change_between_readings(cache):
    with JudgeServer(script=["nonsense", "out_of_range"]) as server: r = one(server, cache, workers=1)
    assert r["unread"] == 0 and len(server.log) == 4
    first, second, third = (body for _, _, body in server.log[:3])
    assert (first["seed"], second["seed"], third["seed"]) == (3407, 3408, 3409) and second["temperature"] == 0
    assert second["messages"][0]["content"].startswith(first["messages"][0]["content"]) and told(second) == told(first) == told(third)
    assert question_key("j", first["messages"]) in read_answers(cache) # under the question as it was first put

def test_a_question_read_in_one_order_only_does_not_count(cache):
    with JudgeServer(script=["nonsense"]*READINGS) as server: r = ask(server, cache, workers=1)
    assert r["unread"] == 1 and all(s["n"] == 4 for s in (r["relative"], r["order_changed"], r["by_order"]["candidate_first"]["relative"])) and r["ratings"].count(None) == 1

# -- the key

@pytest.mark.parametrize("mode", ["good", "401", "echo_key", "500", "nonsense"])
def test_the_key_is_sent_and_stays_nowhere(mode, cache, monkeypatch, caplog, capsys):
    monkeypatch.setenv("MEDCHAT_JUDGE_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    error = ""
    with JudgeServer(mode=mode) as server:
        try: r = one(server, cache)
        except MedchatError as e: error = f"{e} {e.value} {e.hint}"; r = {}
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.log) and server.log
    assert bool(error) == (mode in ("401", "500"))
    out = capsys.readouterr()
    everything = out.out + out.err + error + caplog.text + json.dumps(r) + repr(Judge(server.url, "j")) + "".join(f.read_text() for f in cache.parent.rglob("*") if f.is_file())
    assert KEY not in everything and "with the key of MEDCHAT_JUDGE_KEY" in out.out
    if mode == "401": assert "wrong key: Bearer ***. Set MEDCHAT_JUDGE_KEY to a key of this judge" in error
    if mode == "echo_key": assert "You sent Bearer ***" in everything

def test_which_key(monkeypatch):
    assert api_key() == ("", "")
    monkeypatch.setenv("OPENAI_API_KEY", "b"); assert api_key() == ("OPENAI_API_KEY", "b")
    monkeypatch.setenv("MEDCHAT_JUDGE_KEY", "a"); assert api_key() == ("MEDCHAT_JUDGE_KEY", "a")
    monkeypatch.setenv("MEDCHAT_JUDGE_KEY", ""); assert api_key() == ("", "") # none on purpose

@pytest.mark.parametrize("key", ["sk-one\nX-Header: two", "two words", "schlüssel"])
def test_a_key_that_is_none_is_not_shown(key, cache, monkeypatch):
    monkeypatch.setenv("MEDCHAT_JUDGE_KEY", key)
    with JudgeServer() as server, pytest.raises(MedchatError, match="MEDCHAT_JUDGE_KEY is no key") as e: one(server, cache)
    assert key not in str(e.value) and not server.log

@pytest.mark.parametrize("url", ["http://judge.example.org/v1", "http://10.0.0.7:8000/v1", "http://localhost.example.org/v1", "HTTP://0.0.0.0/v1", "http://127.0.0.1.example.org/v1"])
def test_no_key_over_plain_http_to_another_machine(url, cache, monkeypatch):
    assert api_address(url) # without a key it may
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(MedchatError, match="the key would travel unprotected") as e: judge_replies(QUESTIONS, REPLIES, url, "j", cache)
    assert KEY not in str(e.value) and not cache.exists()

@pytest.mark.parametrize("url", ["https://judge.example.org/v1", "http://localhost:8000/v1", "http://127.0.0.1/v1", "http://127.1.2.3:80/v1", "http://[::1]:8000/v1"])
def test_where_a_key_may_go(url): assert api_address(url, KEY)[1] == url.replace(":80/", "/") + "/chat/completions"

@pytest.mark.parametrize("url", ["", "localhost:8000/v1", "ftp://h/v1", "http:///v1", "file:///etc/passwd", "http://h\n/v1", "judge"])
def test_no_address(url):
    with pytest.raises(MedchatError, match="not the address of a judge") as e: api_address(url)
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("url", ["https://ada:geheim@h/v1?token=geheim", "http://ada:geh@eim@h/v1", "ftp://ada:geheim@h/v1", "https://geheim@h/v1#geheim"])
def test_passwords_in_an_address_are_refused_and_not_shown(url):
    with pytest.raises(MedchatError) as e: api_address(url)
    assert "geh" not in str(e.value) and "ada" not in str(e.value)

def test_the_query_goes_along_and_is_not_shown(cache, capsys):
    assert str(api_address("https://h/openai/v1/?api-version=7")[0]) == "https://h/openai/v1/chat/completions?api-version=7"
    assert api_address("https://h/v1/chat/completions")[1] == api_address("https://h/v1")[1] == "https://h/v1/chat/completions"
    with JudgeServer() as server: judge_replies(QUESTIONS[:1], REPLIES[:1], server.url + "?token=secret", "j", cache, **QUICK)
    assert len(server.log) == 2 and "secret" not in capsys.readouterr().out + cache.read_text()

def test_a_local_judge_is_not_asked_through_a_proxy(cache, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"): monkeypatch.delenv(name, raising=False)
    with JudgeServer() as server: assert one(server, cache)["relative"]["n"] == 1

# -- input

def test_bad_input(cache):
    go = lambda questions, replies, **more: judge_replies(questions, replies, "http://127.0.0.1:9/v1", "j", cache, **more)
    for wrong, says in ((lambda: go([], []), "nothing to judge"), (lambda: go(QUESTIONS, REPLIES[:2]), r"one reply for each question: \[5, 2\]"), (lambda: go(QUESTIONS, REPLIES, groups=["p"]), r"one group for each question: \[5, 1\]"),
        (lambda: go([dict(question="?", reference=" ")], ["x"]), "without text or reference: number 0"), (lambda: go([dict(reference="x")], ["x"]), "without text"), (lambda: go(QUESTIONS, REPLIES, max_questions=0), "max_questions=0"), (lambda: go(QUESTIONS, REPLIES, workers=0), "workers=0")):
        with pytest.raises(MedchatError, match=says): wrong()
    assert not cache.exists()

def test_a_sample_is_the_same_for_every_model_and_keeps_its_groups(cache):
    questions = [dict(question=f"Q{i}", reference=f"answer {i}", context=f"answer {i}") for i in range(40)]
    with JudgeServer() as server:
        a = ask(server, cache, questions, ["x"]*40, groups=[f"p{i//2}" for i in range(40)], max_questions=6)
        b = ask(server, cache, questions, ["y"]*40, max_questions=6)
    assert a["places"] == b["places"] and len(set(a["places"])) == 6 and (a["of"], a["asked"], a["relative"]["n"]) == (40, 6, 6)
    assert {told(body)["question"] for _, _, body in server.log} == {f"Q{i}" for i in a["places"]}
    assert a["relative"]["groups"] == len({i//2 for i in a["places"]}) and b["relative"]["groups"] == 6

def test_any_number_of_workers_gives_the_same(tmp_path):
    with JudgeServer(bias=2) as server: assert ask(server, tmp_path/"1", workers=1) == ask(server, tmp_path/"2", workers=8)

def test_empty_and_foreign_replies(cache):
    "An empty reply is an answer without a word; Chinese, quotes and half a surrogate go through."
    with JudgeServer(bias=0) as server: r = ask(server, cache, QUESTIONS[:4], ["", None, '左侧 "胸腔积液"\n}', "\ud83d"])
    assert r["unread"] == 0 and r["relative"]["n"] == 4 and r["relative"]["value"] < 50
    with JudgeServer() as server: assert ask(server, cache, [{**QUESTIONS[0], "context": None}, QUESTIONS[1]], ["", ""])["with_context"] == 1
