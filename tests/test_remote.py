"""Servers that are slow, busy, broken, older than the protocol, or gone: the reply is whole or it is an error, and the key stays here."""
import base64, io, json, logging, threading, time
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from chat_server import ChatServer, last_text
from medchat import remote as module
from medchat.core import MedchatError
from medchat.messages import assistant_message, user_message
from medchat.judge import api_address, api_key
from medchat.remote import (KEYS, RemoteEngine, misfit, read_chunk, read_form, said_tokens, spread, sse_events, to_openai, to_response_format, without_thoughts)

KEY = "sk-test-0123456789abcdef"
ASK = [user_message("What is it?")]
SAID = "There is a small effusion."
CHOICES = ["present", "absent", "unsure"]
FINDING = dict(type="object", properties=dict(state={"enum": CHOICES}, reason=dict(type="string", maxLength=60)), required=["state", "reason"], additionalProperties=False)

@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in KEYS: monkeypatch.delenv(name, raising=False)

def engine(server, **more): return RemoteEngine(server.url, "tiny", **{**dict(timeout=5, longest_wait=.02), **more})
def say(server, messages=ASK, images=(), **more): return "".join(engine(server).stream(messages, images, **more))
def picture(seed=0): return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 9, 3)).astype("uint8"))
def fault(mode, **more):
    with ChatServer(mode=mode) as server:
        with pytest.raises(MedchatError) as e: list(engine(server, **more).stream(ASK, []))
        return str(e.value).replace(server.host, "HOST"), len(server.log)

# -- server-sent events

DATA = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1, max_size=12).filter(lambda t: not t.startswith(" "))

@given(st.lists(st.lists(DATA, min_size=1, max_size=3), max_size=4), st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.sampled_from([": ping", ":", "event: x", "id: 1", "retry: 5", "nonsense"]), max_size=4), st.booleans(), st.data())
def test_any_cutting_gives_the_same_events(events, end, noise, bom, draw):
    lines = [line for texts in events for line in (*(x for text in texts for x in (*noise, f"data: {text}")), "")]
    raw = (("\ufeff" if bom else "") + end.join([*lines, ""])).encode()
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)])]
    assert list(sse_events(parts)) == list(sse_events([raw])) == list(sse_events(bytes([b]) for b in raw)) == ["\n".join(texts) for texts in events]

@given(st.lists(st.binary(max_size=30), max_size=8))
def test_bytes_of_any_kind_never_break_the_parser(parts):
    assert list(sse_events(parts)) == list(sse_events([b"".join(parts)]))

def test_lines_of_one_event_are_joined_and_a_cut_one_is_none():
    assert list(sse_events([b"data: a\ndata:b\ndata:  c\n\ndata: cut"])) == ["a\nb\n c"]
    assert list(sse_events([b"data: a\r\n\r"])) == ["a"] and list(sse_events([b"data: a\r", b"\r"])) == ["a"]
    assert list(sse_events([b"data:\n\ndata\n\n: x\n\n"])) == [] # empty events carry nothing

def test_the_error_line_of_older_llama_cpp_is_read(): assert list(sse_events([b'error: {"code":400}\n\n'])) == ['{"error": {"code":400}}']

def test_a_line_without_end_is_refused():
    with pytest.raises(ValueError, match="without end"): list(sse_events(b"x"*65536 for _ in range(40)))

# -- thoughts

@given(st.lists(st.tuples(st.sampled_from(["<think>", "</think>", "<thi", "nk>", "<", "a", " bc", "é", ""])), max_size=12), st.data())
def test_any_cutting_leaves_the_same_thoughts_out(words, draw):
    text = "".join(w for w, in words)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    assert "".join(without_thoughts(pieces)) == "".join(without_thoughts([text]))

def test_thoughts_are_not_shown():
    for text, shown in {"<think>a</think>b": "b", "a<think>b</think>c<think>d": "ac", "2 < 3 <thinker>": "2 < 3 <thinker>", "<think>never ends": "", "ends in <th": "ends in <th"}.items():
        assert "".join(without_thoughts(text)) == shown
    with ChatServer(reply="<think>Is it large? No.</think>\nSmall.", cut="byte") as server:
        memory = module.RemoteMemory()
        assert say(server, memory=memory) == "Small."
        assert "".join(t for t, _ in memory.tokens).strip() == "Small."
    with ChatServer(mode="reasoning") as server: assert say(server) == SAID

# -- what is sent

def test_images_stand_where_they_stood_and_lose_nothing():
    first, second = picture(1), picture(2)
    talk = [dict(role="system", content=[dict(type="text", text="Be brief.")]), user_message("One?", 1), assistant_message("Yes."), user_message("Two?", 1)]
    system, one, answer, two = to_openai(talk, [first, second])
    assert (system["content"], answer["content"]) == ("Be brief.", "Yes.")
    assert [p["type"] for p in one["content"]] == [p["type"] for p in two["content"]] == ["image_url", "text"]
    for m, im in ((one, first), (two, second)):
        head, _, data = m["content"][0]["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64" and Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == im.tobytes()

@pytest.mark.parametrize("n", [0, 2])
def test_images_without_places_are_refused(n):
    with pytest.raises(MedchatError, match="images and their places differ"): to_openai([user_message("One?", 1)], [picture()]*n)

def test_a_request_is_greedy_and_seeded():
    with ChatServer() as server:
        assert say(server, [user_message("What is it?", 1)], [picture()], max_new_tokens=9) == SAID
        body, headers = server.bodies[0], server.log[0][1]
    assert {k: body[k] for k in ("model", "stream", "temperature", "seed", "max_tokens", "logprobs", "top_logprobs")} == dict(model="tiny", stream=True, temperature=0, seed=3407, max_tokens=9, logprobs=True, top_logprobs=1)
    assert "Authorization" not in headers

# -- the stream

@pytest.mark.parametrize("mode", ["good", "crlf", "comments", "slow", "whole"])
@pytest.mark.parametrize("cut", ["event", "byte", 7])
def test_every_way_to_say_it_gives_the_same_text(mode, cut):
    text = "Größe: 3 mm, வீக்கம், 心脏 – normal 🫀."
    with ChatServer(reply=text, mode=mode, cut=cut) as server: assert say(server) == text

def test_pieces_come_as_they_are_written():
    with ChatServer(mode="slow", reply="one two three four") as server:
        stream = engine(server).stream(ASK, [])
        assert next(stream) == "one" and not server.left.is_set()
        assert list(stream) == [" two", " three", " four"]

def test_chances_of_the_tokens_are_kept():
    with ChatServer(reply="It is large.", alternatives={"large": {"small": .4}}) as server:
        memory = engine(server).new_memory()
        assert memory.tokens == []
        say(server, memory=memory)
        assert [(t, pytest.approx(p)) for t, p in memory.tokens] == [("It", .9), (" is", .9), (" large", .6), (".", .9)]

@pytest.mark.parametrize("how", ["lacks", "ignores"])
def test_without_chances_the_memory_is_empty_and_it_is_said(how):
    with ChatServer(**{how: {"logprobs"}}) as server:
        remote, memory = engine(server), module.RemoteMemory()
        assert remote.has_probabilities
        for _ in range(2): assert "".join(remote.stream(ASK, [], memory=memory)) == SAID
        assert memory.tokens == [] and not remote.has_probabilities and remote.lacks == {"logprobs"}
        assert len(server.log) == (3 if how == "lacks" else 2) # refused once, never asked for again
        assert not {"logprobs", "top_logprobs"} & server.bodies[-1].keys()

def test_hosted_models_that_think_are_asked_as_they_want():
    with ChatServer(lacks={"logprobs", "max_tokens", "temperature"}) as server:
        remote = engine(server)
        assert "".join(remote.stream(ASK, [], max_new_tokens=7)) == SAID and remote.lacks == {"logprobs", "max_tokens", "temperature"}
        assert server.bodies[-1]["max_completion_tokens"] == 7 and "temperature" not in server.bodies[-1]
        list(remote.stream(ASK, [])); assert len(server.log) == 5

@pytest.mark.parametrize("status", [400, 422, 500, 501])
def test_whatever_the_number_of_a_refusal(status):
    with ChatServer(reply="absent", lacks={"response_format", "logprobs"}, refuses_with=status) as server:
        remote = engine(server)
        assert list(remote.stream(ASK, [], form={"enum": CHOICES})) == ["absent"] and remote.lacks == {"response_format", "logprobs"} and len(server.log) == 3

def test_a_refusal_that_nothing_mends_is_not_held_against_options():
    with ChatServer(mode="400") as server:
        remote = engine(server)
        with pytest.raises(MedchatError, match="maximum context length"): list(remote.stream(ASK, [], form=FINDING))
        assert remote.lacks == set()
        server.mode = "good"
        list(remote.stream(ASK, [])); assert server.bodies[-1]["logprobs"]

def test_an_unnamed_refusal_ends():
    with ChatServer(lacks={"all"}) as server:
        with pytest.raises(MedchatError, match="HTTP 400 invalid request"): list(engine(server).stream(ASK, [], form=FINDING))
        assert len(server.log) == 3 # as it is, without chances, without both

# -- stop

@pytest.mark.parametrize("mode", ["half_hang", "hang", "silent", "slow"])
def test_a_stop_is_heard_at_once(mode):
    with ChatServer(mode=mode, reply="one two " + "three "*200) as server:
        stop, said, at = threading.Event(), [], []
        def halt(): at.append(time.monotonic()); stop.set()
        if mode in ("hang", "silent"): threading.Timer(.3, halt).start()
        for piece in engine(server, timeout=30).stream(ASK, [], stop=stop):
            said.append(piece)
            if len(said) == 2: halt()
        assert time.monotonic() - at[0] < 5 and said == (["one", " two"] if mode in ("half_hang", "slow") else []) # the server would have taken 10 s or more
        if mode != "hang": assert server.left.wait(5) # it was hung up

def test_a_stop_set_before_sends_nothing():
    with ChatServer() as server:
        stop = threading.Event(); stop.set()
        assert list(engine(server).stream(ASK, [], stop=stop)) == [] and server.log == []

def test_a_stop_ends_the_wait_for_a_busy_server():
    with ChatServer(mode="429", retry_after="30") as server:
        stop = threading.Event(); threading.Timer(.2, stop.set).start()
        before = time.monotonic()
        assert list(engine(server, longest_wait=30).stream(ASK, [], stop=stop)) == [] and time.monotonic() - before < 5

def test_a_reader_who_goes_away_hangs_up():
    with ChatServer(mode="half_hang") as server:
        stream = engine(server).stream(ASK, [])
        next(stream); stream.close()
        assert server.left.wait(5)

# -- faults

def test_busy_servers_are_asked_again():
    with ChatServer(script=["429", "500"]) as server: assert say(server) == SAID and len(server.log) == 3
    with ChatServer(script=["503", "429_date"]) as server: assert say(server) == SAID

@pytest.mark.parametrize("mode", ["429", "500", "503"])
def test_but_not_without_end(mode):
    message, n = fault(mode)
    assert n == 3 and f"the model at http://HOST/v1/chat/completions does not answer: HTTP {mode}" in message and "tried 3 times" in message

def test_retry_after_is_bounded():
    with ChatServer(script=["429"], retry_after="3600") as server:
        before = time.monotonic()
        assert say(server) == SAID and time.monotonic() - before < 5

@pytest.mark.parametrize("mode, said, hint", [("401", "refuses: HTTP 401", "Set MEDCHAT_CHAT_KEY"), ("404", "The model `tiny` does not exist", "the name of the model"), ("302", "refuses: HTTP 302", "give its new address"), ("400", "maximum context length", "Start a new conversation"),
    ("page", "no chat completion came from", "often ends in /v1"), ("error_200", "the reply broke off: no provider is there", ""), ("garbage", "no chat completion", ""), ("odd", "no chat completion", "")])
def test_what_asking_again_cannot_mend_is_said_at_once(mode, said, hint):
    message, n = fault(mode)
    assert said in message and hint in message and n == (2 if mode == "400" else 1) # once more without chances of tokens

@pytest.mark.parametrize("mode, said", [("drop", "the reply broke off"), ("fade", "did not end it"), ("stream_error", "EngineCore encountered an issue"), ("error_line", "exceeds the available context size")])
def test_half_a_reply_is_an_error_and_not_a_reply(mode, said):
    with ChatServer(mode=mode) as server:
        pieces = []
        with pytest.raises(MedchatError, match=said):
            for piece in engine(server).stream(ASK, []): pieces.append(piece)
        assert len(server.log) == 1 # never asked again once words were shown
        assert "".join(pieces) == {"drop": "There is", "fade": "There is", "stream_error": "There", "error_line": ""}[mode]

@pytest.mark.parametrize("mode", ["hang", "silent", "half_hang"])
def test_silence_ends(mode):
    message, n = fault(mode, timeout=.4)
    assert "no answer within 0.4 s" in message and n == 1

@pytest.mark.parametrize("mode", ["endless", "endless_line"])
def test_a_reply_without_end_is_cut(mode, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 300_000); monkeypatch.setattr(module, "LONGEST_LINE", 200_000)
    assert "without end" in fault(mode)[0]

def test_an_error_without_end_is_cut(): assert "HTTP 500" in fault("flood", attempts=1)[0]

def test_nobody_there():
    with pytest.raises(MedchatError, match="does not answer.*Look whether it runs"): list(RemoteEngine("http://127.0.0.1:9/v1", "tiny").stream(ASK, []))

# -- the key

@pytest.mark.parametrize("mode", ["401", "good"])
def test_the_key_goes_to_the_server_and_nowhere_else(mode, monkeypatch, caplog):
    monkeypatch.setenv("MEDCHAT_CHAT_KEY", KEY); caplog.set_level(logging.DEBUG)
    with ChatServer(mode=mode, key=KEY if mode == "good" else None) as server:
        remote = engine(server)
        assert KEY not in remote.leaves(1) + repr(remote) + str(remote.identity)
        if mode == "good": assert "".join(remote.stream(ASK, [])) == SAID
        else:
            with pytest.raises(MedchatError) as e: list(remote.stream(ASK, []))
            assert KEY not in str(e.value) and "***" in str(e.value)
        assert server.log[0][1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in caplog.text

def test_the_key_does_not_follow_a_redirect(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer(mode="302") as server:
        with pytest.raises(MedchatError, match="302"): list(engine(server).stream(ASK, []))
        assert len(server.log) == 1

def test_addresses_that_would_give_the_key_away(monkeypatch):
    monkeypatch.setenv("MEDCHAT_CHAT_KEY", KEY)
    with pytest.raises(MedchatError, match="the key would travel unprotected.*export MEDCHAT_CHAT_KEY="): RemoteEngine("http://model.example.org/v1", "m")
    with pytest.raises(MedchatError) as e: RemoteEngine("https://ada:secret@model.example.org/v1", "m")
    assert "secret" not in str(e.value) and "MEDCHAT_CHAT_KEY" in str(e.value) and "JUDGE" not in str(e.value)
    with pytest.raises(MedchatError, match="not the address of a model"): RemoteEngine("ftp://x/v1", "m")
    assert api_address("https://model.example.org/v1?v=2", KEY)[1] == "https://model.example.org/v1/chat/completions"

def test_whose_key_it_is(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "other"); assert api_key(KEYS) == ("OPENAI_API_KEY", "other")
    monkeypatch.setenv("MEDCHAT_CHAT_KEY", ""); assert api_key(KEYS) == ("", "") # switched off
    monkeypatch.setenv("MEDCHAT_CHAT_KEY", "two words")
    with pytest.raises(MedchatError) as e: api_key(KEYS)
    assert "two words" not in str(e.value)

@pytest.mark.parametrize("url, said", [("http://127.0.0.1:8000/v1", "go to another program on this computer (127.0.0.1:8000)"), ("http://[::1]:8000/v1", "on this computer"), ("https://api.example.org/v1", "leave this computer for api.example.org."), ("http://192.0.2.1/v1", "for 192.0.2.1, unencrypted.")])
def test_what_leaves_is_said(url, said):
    remote = RemoteEngine(url, "m")
    assert said in remote.leaves(0) and "image" not in remote.leaves(0) and " 1 image " in remote.leaves(1) and " 2 images " in remote.leaves(2)
    assert remote.host == remote.identity["host"] != "" and remote.identity["model"] == remote.name == "m"

def test_no_proxy_gets_what_is_for_this_machine(monkeypatch):
    with ChatServer() as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"): monkeypatch.setenv(name, "http://127.0.0.1:9")
        assert say(server) == SAID

# -- forms

@pytest.mark.parametrize("form, said", [({"enum": CHOICES}, "absent"), ({"type": "string", "pattern": "[a-z]+"}, "absent"), (FINDING, json.dumps(dict(state="absent", reason="absent")))])
@pytest.mark.parametrize("server", [{}, dict(lacks={"response_format"}), dict(ignores={"response_format"})])
def test_forms_are_kept_to_whatever_the_server_does(form, said, server):
    reply = lambda body: "absent" if "response_format" in body and not server else f"Here it is:\n```json\n{said}\n```" if form is FINDING else said
    with ChatServer(reply=reply, **server) as s:
        assert list(engine(s).stream(ASK, [], form=form)) == [said]
        assert s.bodies[0]["response_format"]["json_schema"]["strict"] is True and s.bodies[0]["response_format"]["json_schema"]["schema"]["type"] == "object"

def test_a_form_that_is_refused_is_put_in_words_and_not_asked_for_again():
    with ChatServer(reply="present", lacks={"response_format"}) as server:
        remote = engine(server)
        for _ in range(2): assert list(remote.stream([user_message("Is it?", 1)], [picture()], form={"enum": CHOICES})) == ["present"]
        assert len(server.log) == 3 and "response_format" not in server.bodies[1] and "one of these and nothing else: present, absent, unsure" in last_text(server.bodies[2])

def test_a_misfit_is_asked_for_once_more_with_the_reason():
    replies = iter(["It depends.", "Absent."])
    with ChatServer(reply=lambda body: next(replies), ignores={"response_format"}) as server:
        assert list(engine(server).stream(ASK, [], form={"enum": CHOICES})) == ["absent"]
        assert "nothing else" not in last_text(server.bodies[0]) and "Your last answer did not: reply.answer is none of" in last_text(server.bodies[1])

def test_a_model_that_does_not_keep_to_it_is_an_error():
    with ChatServer(reply="It depends.", ignores={"response_format"}) as server:
        with pytest.raises(MedchatError, match="tiny does not keep to the form: reply is no JSON: It depends."): list(engine(server).stream(ASK, [], form=FINDING))
        assert len(server.log) == 2

def test_a_cut_off_form_is_an_error():
    with ChatServer(reply="absent") as server:
        with pytest.raises(MedchatError, match="Allow a longer reply"): list(engine(server).stream(ASK, [], max_new_tokens=4, form=FINDING))

def test_patterns_hold_for_the_whole_text():
    rule = to_response_format({"type": "string", "pattern": "[0-9]+ mm|none"})["json_schema"]["schema"]["properties"]["answer"]
    assert rule == dict(type="string", pattern="^([0-9]+ mm|none)$") # llama.cpp wants both ends
    form = {"type": "string", "pattern": "[0-9]+ mm|none"}
    assert read_form('{"answer": "12 mm"}', form) == ("12 mm", "") and read_form("12 mm", form) == ("12 mm", "") and read_form("12 mm wide", form)[1]

JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab{\"", max_size=4), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3), max_leaves=6)
SCHEMA = st.recursive(st.sampled_from([{}, dict(type="string"), dict(type="string", pattern="^a+$"), dict(type="string", minLength=1, maxLength=2), dict(type="integer", minimum=0), dict(type="number", maximum=3), dict(type="boolean"), dict(type=["null", "string"]), dict(enum=["a", "ab"]), dict(const="b")]),
    lambda inner: st.builds(lambda i, a, b: dict(type="array", items=i, minItems=a, maxItems=b), inner, st.integers(0, 2), st.integers(0, 3)) | st.builds(lambda p, r, a: dict(type="object", properties=p, required=r, additionalProperties=a), st.dictionaries(st.text("ab", max_size=1), inner, max_size=2), st.lists(st.sampled_from(["a", "b"]), max_size=1), st.booleans()) | st.builds(lambda i: dict(anyOf=i), st.lists(inner, min_size=1, max_size=2)), max_leaves=4)

@settings(max_examples=400)
@given(JSON, SCHEMA)
def test_the_validator_agrees_with_jsonschema(value, schema):
    jsonschema = pytest.importorskip("jsonschema")
    assert bool(misfit(value, schema)) == (not jsonschema.Draft202012Validator(schema).is_valid(value))

def test_strange_words_of_a_form_are_not_passed_over():
    for form in ({"$ref": "#/a"}, {"type": "object", "properties": {"a": {"oneOf": []}}}):
        with pytest.raises(MedchatError, match="words that medchat does not check"): misfit({"a": 1}, form)

# -- choosing

def test_chances_of_the_choices():
    with ChatServer(reply="present", alternatives={"present": {"absent": .2, "unsure": .05, "maybe": .1}}) as server:
        remote = engine(server)
        assert remote.choose(ASK, [], CHOICES) == pytest.approx([.65, .2, .05]) and remote.has_probabilities
        assert server.bodies[0]["top_logprobs"] == 20 and server.bodies[0]["response_format"]["json_schema"]["schema"]["properties"]["answer"]["enum"] == CHOICES

@pytest.mark.parametrize("how", [dict(lacks={"logprobs"}), dict(ignores={"logprobs"}), dict(lacks={"logprobs", "response_format"})])
def test_without_chances_a_choice_is_one_and_that_is_no_probability(how):
    with ChatServer(reply="absent", **how) as server:
        remote = engine(server)
        assert remote.choose(ASK, [], CHOICES) == [0., 1., 0.] and not remote.has_probabilities

def test_chances_without_forms():
    with ChatServer(reply="Absent, I think.", lacks={"response_format"}, alternatives={"Absent": {"Present": .3}}) as server:
        assert engine(server).choose(ASK, [], CHOICES) == pytest.approx([.3, .7, 0])

def test_nothing_to_choose_from_in_the_answer():
    with ChatServer(reply="It depends.", ignores={"response_format"}) as server:
        with pytest.raises(MedchatError, match="does not keep to the form"): engine(server).choose(ASK, [], CHOICES)

T = lambda text, p=1., **others: [text.encode(), p, {k.encode(): v for k, v in others.items()}]

def test_spread_by_hand():
    assert spread([T("pre", .6, abs=.3, un=.1), T("sent", .9)], CHOICES) == pytest.approx([.6, .3, .1])
    assert spread([T("<think>"), T("present or absent"), T("</think>"), T(" "), T("absent", .8, present=.2)], CHOICES) == pytest.approx([.2, .8, 0])
    assert spread([T('{"answer":'), T(' "p', .7, **{' "a': .2, "x": .1}), T("resent")], CHOICES) == pytest.approx([.7, .2, 0]) # a token that reaches into the word
    assert spread([T("p", .5, q=.5)], ["pa", "pb"]) == pytest.approx([.25, .25]) # cut off before it could be told
    assert spread([T("left", .9, right=.1)], ["left", "right", "none"]) == pytest.approx([.9, .1, 0])
    tamil = "ஆம்".encode()
    assert spread([[tamil[:4], .9, {"இ".encode(): .1}], [tamil[4:], 1., {}]], ["ஆம்", "இல்லை"]) == pytest.approx([.9, .1]) # half a letter at the end of a token

@given(st.lists(st.sampled_from(["yes", "no", "yes, but", "not sure", "n"]), min_size=1, unique=True), st.lists(st.tuples(st.sampled_from(["y", "yes", "n", "no", "t", " sure", ",", " but", "{", '"']), st.floats(0, 1), st.dictionaries(st.sampled_from([b"y", b"n", b"no", b"x", b"yes"]), st.floats(0, 1), max_size=3)), max_size=6), st.booleans())
def test_shares_are_never_more_than_what_there_is(choices, rows, wrapped):
    tokens = [[b'{"answer": "', 1., {}]] if wrapped else []
    for text, p, others in rows:
        others = {k: v for k, v in others.items() if k != text.encode()}
        total = max(1., p + sum(others.values()))
        tokens.append([text.encode(), p/total, {k: v/total for k, v in others.items()}])
    shares = spread(tokens, choices)
    assert all(s >= 0 for s in shares) and sum(shares) <= 1 + 1e-9

def test_tokens_of_what_was_said():
    wrapped = [T('{"'), T("answer"), T('": "'), T("left", .5), T(" lung", .4), T('"}')]
    assert said_tokens(wrapped, bare=True) == [("left", .5), (" lung", .4)] and len(said_tokens(wrapped)) == 6
    assert said_tokens([T("left", .5)], bare=True) == [("left", .5)] and said_tokens([]) == []

def test_chances_in_every_dialect():
    row = lambda **more: json.dumps(dict(choices=[dict(delta=dict(content="a"), logprobs=dict(content=[dict(token="a", **more)]))]))
    assert read_chunk(row(logprob=0.))[1] == [[b"a", 1., {}]]
    assert read_chunk(row(logprob=-9999., bytes=None, top_logprobs=None))[1] == [[b"a", 0., {}]] # vLLM's minus infinity
    assert read_chunk(row(logprob=0., bytes=[195], top_logprobs=[dict(token="b", logprob=-9999.)]))[1] == [[b"\xc3", 1., {b"b": 0.}]]
    assert read_chunk('{"choices": [], "usage": {}}') == ("", [], False) and read_chunk(" [DONE] ")[2]

# -- sampling

def test_samples_have_seeds_of_their_own():
    with ChatServer(reply=lambda body: f"<think>x</think> reply {body['seed']} ") as server:
        assert engine(server).sample(ASK, [], n=6, temperature=.7, seed=5) == [f"reply {i}" for i in range(5, 11)]
        assert {body["temperature"] for body in server.bodies} == {.7} and not any("logprobs" in body for body in server.bodies)

def test_a_failed_sample_is_an_error():
    with ChatServer(mode="404") as server:
        with pytest.raises(MedchatError, match="does not exist"): engine(server).sample(ASK, [], n=3)

def test_two_conversations_at_the_same_time_stay_apart():
    with ChatServer(reply=lambda body: f"You said {last_text(body)}", mode="slow") as server:
        remote, said = engine(server), {}
        threads = [threading.Thread(target=lambda i=i: said.update({i: "".join(remote.stream([user_message(f"number {i}")], []))})) for i in range(6)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert said == {i: f"You said number {i}" for i in range(6)}
