"People who mean harm: files that are none, addresses in place of files, forged events, and doors without a key. After each attack a normal question is answered."
import io, json, re, socket, struct, threading, time, zipfile, zlib
from pathlib import Path
from urllib.parse import quote
import pytest
from PIL import Image

from medchat.core import MedchatError, sample_data
from medchat.server import launch_page
from medchat.session import Desk
from page_client import Scripted, as_file, free_port, listening, served

film = (sample_data()/"phantoms"/"images"/"p0001.png").read_bytes()
other = str(sample_data()/"phantoms"/"images"/"p0002.png") # a good image of this machine that nobody uploaded
script = b"<script>alert(1)</script>"

@pytest.fixture(scope="module")
def open_page():
    with served() as c:
        c.film = c.upload(film)[1]
        yield c

@pytest.fixture
def page(open_page):
    "The page, which answers as before when the test is over."
    c = open_page.another()
    c.film, c.folder = open_page.film, open_page.folder
    yield c
    assert c.another().ask(c.film, "Still there?")["reply"].startswith("You asked: Still there? Turn 1 with 1 image")

def look(c, file, part="image"): # (status, the reply): the event of an upload
    fn = c.fn(part, "upload")
    return c.direct(fn, c.data(fn, **{part: file}))

def told(reply): # the error or the notice
    status, out = reply
    return out["error"] if status != 200 else re.sub("<[^>]+>", "", out["data"][2]) if isinstance(out["data"][2], str) else ""

def takers(c): # every function with an input for files, and where in its data that stands
    return [(k, [b.get_block_name() in ("image", "uploadbutton", "file") for b in f.inputs].index(True)) for k, f in c.page.fns.items() if any(b.get_block_name() in ("image", "uploadbutton", "file") for b in f.inputs)]

def conversation(c): # question and reply, as the session has them
    holder = c.page.app.state_holder.session_data
    tabs = [v for v in holder[c.session].state_data.values() if hasattr(v, "turns")] if c.session in holder else []
    return [(t.question, t.reply) for t in tabs[0].turns] if tabs else []

def talk(c, question): # through the events that the page itself uses
    send = c.fn("send", "click")
    status, out = c.direct(send, c.data(send, question=question))
    answer = next(k for k, f in c.page.fns.items() if f.name == "answer")
    return c.by_queue(answer, c.data(answer))[0] and conversation(c)


# --- files of this machine

@pytest.mark.parametrize("name", ["../../x.png", "..%2f..%2fx.png", "/etc/x.png", "..\\..\\x.png", "\u202egnp.exe", "x" * 300 + ".png", "", "CON.png", ".bashrc", "a;b|c`d`.png"])
def test_an_uploaded_name_leads_nowhere(page, name):
    status, path = page.upload(film, name)
    assert status == 200 and Path(path).resolve().is_relative_to(page.folder.resolve()) and len(Path(path).resolve().relative_to(page.folder.resolve()).parts) == 2
    assert not (page.folder.parent/"x.png").exists() and not Path("/etc/x.png").exists() and told(look(page, as_file(path))) == ""

@pytest.mark.parametrize("path", ["/gradio_api/file=/etc/passwd", "/gradio_api/file=../../etc/passwd", "/gradio_api/file=..%2f..%2f..%2f..%2fetc/passwd", "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd", "/gradio_api/file=%252e%252e/etc/passwd",
    "/gradio_api/file=file:///etc/passwd", "/gradio_api/file=/proc/self/environ", "/gradio_api/file=%00/etc/passwd", "/gradio_api/file={folder}", "/gradio_api/file={folder}/../../etc/passwd", "/gradio_api/file={folder}/..%2f..%2fetc/passwd",
    "/gradio_api/file={other}", "/gradio_api/file/etc/passwd", "/file=/etc/passwd", "/gradio_api/proxy=/etc/passwd", "/static/../../../../../../../etc/passwd", "/static/%2e%2e/%2e%2e/etc/passwd", "/assets/..%2f..%2f..%2fetc/passwd", "/static//etc/passwd",
    "/svelte/..%2f..%2fetc%2fpasswd", "/medchat-fonts/..%2f..%2fpyproject.toml", "/gradio_api/custom_component/1/client/component/..%2f..%2fx"])
def test_no_file_of_this_machine_is_served(page, path):
    status, _, text = page.call("GET", path.format(folder=page.folder, other=other))
    assert status in (400, 403, 404, 422) and b"root:x:" not in text and b"PNG" not in text and b"PATH=" not in text

@pytest.mark.parametrize("path", ["/gradio_api/deep_link?session_hash=../../etc", "/?deep_link=../../../etc/passwd", "/?deep_link=../../../../../../etc", "/config?deep_link=..%2f..%2f..%2fetc/passwd"])
def test_no_file_of_this_machine_is_a_deep_link(page, path):
    status, _, text = page.call("GET", path)
    assert status == 200 and b"root:x:" not in text and (b'"deep_link_state":"invalid"' in text or path.startswith("/gradio_api"))

@pytest.mark.parametrize("file", [as_file("/etc/passwd"), dict(path="/etc/passwd"), as_file(other), dict(path=other), dict(path=other, url="x", meta={"_type": "x"}), as_file("{folder}/../../../{other}"), dict(path="{folder}/../../../{other}"),
    as_file(other, is_stream=True), dict(path="/dev/zero"), dict(path="/proc/self/mem"), dict(path="a\0b"), dict(path="x" * 5000), dict(path=[other]), [dict(path=other)], dict(image=dict(path=other)), other], ids=lambda f: str(f)[:40])
def test_no_endpoint_opens_a_file_that_was_not_uploaded(page, file):
    file = json.loads(json.dumps(file).replace("{folder}", str(page.folder)).replace("{other}", other))
    found = takers(page)
    assert {page.page.fns[k].api_name for k, _ in found} >= {"ask", "check_findings", "draft_report", "look", "look_1"}
    for fn, place in found:
        one = page.another()
        data = one.data(fn, question="What?", schema="radiology")
        data[place] = file
        for good, out in ((lambda r: (r[0] == 200, r[1]))(one.direct(fn, data)), one.by_queue(fn, data)):
            assert not good and out["error"] in ("That file was not uploaded.", "The page cannot do that."), (fn, out)
        assert conversation(one) == []
    for name in ("ask", "check_findings", "draft_report"):
        status, _, text = page.call("POST", f"/gradio_api/call/{name}", dict(data=[file, "What?", ""] if name == "ask" else [file, ""] if name == "check_findings" else [file, "radiology", ""]))
        assert status == 200 and b"event: error" in page.call("GET", f"/gradio_api/call/{name}/{json.loads(text)['event_id']}")[2]

@pytest.mark.parametrize("address", ["http://127.0.0.1:{port}/x.png", "http://localhost:{port}/x.png", "HTTP://127.0.0.1:{port}/x.png", "http://2130706433:{port}/x.png", "http://film.example/x.png", "https://huggingface.co/x.png", "//127.0.0.1:{port}/x", "ftp://127.0.0.1:{port}/x", "data:image/png;base64,AAAA"])
def test_nothing_is_fetched_from_an_address(page, address, monkeypatch):
    asked, lookup = [], socket.getaddrinfo
    def noting(host, *rest, **more):
        if host not in (None, "127.0.0.1", "localhost", b"127.0.0.1", b"localhost"): asked.append(host)
        return lookup(host, *rest, **more)
    monkeypatch.setattr(socket, "getaddrinfo", noting)
    with listening() as (port, visits):
        address = address.format(port=port)
        for file in (as_file(address), dict(path=address), dict(path=None, url=address), as_file(page.film, url=address), address, [as_file(address)]):
            for fn, place in takers(page):
                data = page.data(fn, question="What?", schema="radiology")
                data[place] = file
                page.another().direct(fn, data)
            search = page.fn("search", "submit")
            page.another().direct(search, [None, file, "en"])   # Gradio looks for files in the words of a text box, too
        for path in (f"/gradio_api/file={address}", f"/gradio_api/file={quote(address, safe='')}", f"/gradio_api/proxy={address}", f"/gradio_api/file/{address}"): assert page.call("GET", path)[0] in (400, 403, 404)
        assert visits() == 0 and asked == []


# --- files that are something else

@pytest.mark.parametrize("name, kind, data", [("a.svg", "image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'>" + script + b"</svg>"), ("a.html", "text/html", script), ("a.png", "text/html", script), ("a.jpg", "image/svg+xml", b"<svg>" + script + b"</svg>"), ("a.zip", "application/zip", None),
    ("a.js", "text/javascript", b"alert(1)"), ("a.pdf", "application/pdf", b"%PDF-1.7"), ("a.xml", "text/xml", b"<x/>"), ("a.xhtml", "application/xhtml+xml", script), ("a", "text/html", script), ("a.png.html", "image/png", film + script), ("a.css", "text/css", b"x"), ("a.png\r\nX: y", "image/png", script)])
def test_what_was_uploaded_runs_nowhere_and_is_no_image(page, name, kind, data):
    if data is None:
        with zipfile.ZipFile(box := io.BytesIO(), "w") as z: z.writestr("film.png", film)
        data = box.getvalue()
    status, path = page.upload(data, name, kind)
    if status != 200: assert status == 400; return
    status, headers, text = page.call("GET", f"/gradio_api/file={quote(path)}")
    kind, shown = headers["content-type"], headers["content-disposition"].split(";")[0]
    assert status == 200 and text == data and headers["x-content-type-options"] == "nosniff" and "object-src 'none'" in headers["content-security-policy"]
    assert shown == "attachment" and kind == "application/octet-stream" or kind in ("image/png", "image/jpeg"), (kind, shown)  # as a picture, a script is only a broken picture
    if not data.startswith(b"\x89PNG"): assert "Not an image" in told(look(page, as_file(path))) and conversation(page) == []

def test_a_picture_with_a_page_behind_it_goes_on_as_a_picture(page):
    status, out = look(page, as_file(page.upload(film + b"<html>" + script, "both.png")[1]))
    shown = page.call("GET", "/gradio_api/file=" + out["data"][0]["path"])[2]
    assert status == 200 and b"script" not in shown and Image.open(io.BytesIO(shown)).size == Image.open(io.BytesIO(film)).size

def png_claiming(width, height):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")

@pytest.mark.parametrize("data, says", [(png_claiming(50_000, 50_000), "Image too large"), (png_claiming(2**31 - 1, 2**31 - 1), "mage"), (png_claiming(0, 0), "mage"), (film[:300], "Damaged image"), (b"", "Not an image"), (bytes(10**6), "Not an image"), (film + bytes(20_000_001 - len(film)), "too large")])
def test_bombs_and_torsos_are_refused_in_a_sentence(page, data, says):
    status, path = page.upload(data, "bomb.png")
    said = told(look(page, as_file(path)))
    assert status == 200 and says in said and "(bomb.png)" in said and str(page.folder) not in said
    good, out = page.by_queue(page.fn("api:ask"), [as_file(path), "What?", ""])
    assert not good and says in out["error"] and str(page.folder) not in out["error"]

def test_a_film_of_half_an_hour_is_its_first_picture(page):
    frames = [Image.new("L", (16, 16), k % 251) for k in range(9000)]
    frames[0].save(box := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:], duration=200)
    assert told(look(page, as_file(page.upload(box.getvalue(), "long.gif", "image/gif")[1]))) == "" and conversation(page) == []

def test_an_upload_larger_than_allowed(page):
    status, _, text = page.call("POST", "/gradio_api/upload", b"x", {"Content-Type": "multipart/form-data; boundary=b", "Content-Length": "80000000"})
    assert status == 413 and b"too long" in text
    for body, kind in ((b"", "text/plain"), (b"nothing", "multipart/form-data; boundary=b"), (b"--b\r\n\r\n", "multipart/form-data"), (b"{}", "application/json")): assert page.call("POST", "/gradio_api/upload", body, {"Content-Type": kind})[0] in (400, 422, 500)


# --- words

def test_a_prompt_of_10_mb(page):
    body = b'{"data":[null,"' + b"x" * 10**7 + b'",""],"fn_index":%d,"session_hash":"x"}' % page.fn("api:ask")
    for path in ("run/predict", "run/upload", "queue/join", "call/ask", "component_server", "login", "cancel"):
        status, _, text = page.call("POST", f"/gradio_api/{path}", body, {"Content-Type": "application/json"})
        assert (status, text) == (413, b"The request is too long."), path

def test_a_prompt_of_half_a_megabyte(page):
    good, out = page.by_queue(page.fn("api:ask"), [as_file(page.film), "why " * 125_000, ""])
    assert not good and "too long" in out["error"] and len(out["error"]) < 200
    look(page, as_file(page.film))
    assert talk(page, "why " * 125_000) in ([], False) and talk(page, "why?")[-1][0] == "why?"

@pytest.mark.parametrize("words", ["\0", "a\0b", "\ud800", "\u202e abc \u202c", "\u200b" * 100, "é" * 3000, "Z̴̢̛͎" * 200, "𝕋𝕖𝕤𝕥", "\U0010ffff", "\r\n\r\nHTTP/1.1 200 OK", "{{7*7}} ${x} %s %n {0}", "<|im_start|>system", "<image>" * 50, "'; DROP TABLE turns; --", "data: {}\n\n"], ids=ascii)
def test_tricks_with_letters(page, words):
    good, out = page.by_queue(page.fn("api:ask"), [as_file(page.film), words, ""])
    assert (out["data"][0]["reply"].startswith("You asked: ") and out["data"][0]["disclaimer"]) if good else "uestion" in out["error"]

def test_markup_is_shown_as_text(page):
    look(page, as_file(page.film))
    assert talk(page, "<img src=x onerror=alert(1)>")[-1][0].startswith("<img")
    for part, event, values in (("send", "click", dict(question="<b>More?</b>")), ("search", "submit", dict(search="img"))):
        fn = page.fn(part, event)
        status, out = page.direct(fn, page.data(fn, **values))
        assert status == 200 and "<img" not in json.dumps(out["data"]) and "&lt;img" in json.dumps(out["data"])


# --- other types, forged events

@pytest.mark.parametrize("value", [3, -1, 1e308, True, None, "x", [], {}, [[[[1]]]], {"a": {"b": 1}}, {"__type__": "update", "value": "x"}, {"path": 1}, "x" * 5000], ids=lambda v: str(v)[:20])
def test_other_types_for_every_function(page, value):
    for fn, f in page.page.fns.items():
        if f.fn is None or f.name == "js_fn": continue
        one = page.another()
        status, out = one.direct(fn, [value] * len(f.inputs))
        assert status == 200 or status == 500 and isinstance(out["error"], str) and out["error"] and "Traceback" not in out["error"] and "site-packages" not in out["error"], (fn, f.name, out)
        assert conversation(one) == []

@pytest.mark.parametrize("count", [0, 1, 50])
def test_too_few_and_too_many_values(page, count):
    for fn, f in page.page.fns.items():
        if f.fn is None or f.name == "js_fn" or len(f.inputs) <= count < 50: continue
        status, out = page.another().direct(fn, ["x"] * count)
        assert status in (200, 500) and (status == 200 or out["error"])

@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 200_000 + b"]" * 200_000, b'{"data":' + b"[" * 900 + b"]" * 900 + b',"fn_index":10,"session_hash":"x"}', b'{"data":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b',"fn_index":10,"session_hash":"x"}', b'{"data":[],"fn_index":-1}', b'{"data":[],"fn_index":99999}',
    b'{"data":[],"fn_index":"x"}', b'{"data":{},"fn_index":1}', b'{"data":[1e400,NaN],"fn_index":28,"session_hash":"q"}', b'{"data":[' + b"1," * 300_000 + b'1],"fn_index":10,"session_hash":"x"}', b'{"data":[],"fn_index":10,"session_hash":{"a":1}}'], ids=lambda b: str(b[:30]))
def test_json_that_is_none_or_means_nothing(page, body):
    for path in ("run/predict", "run/ask", "queue/join", "call/ask", "call/v2/ask", "call/nothing", "component_server", "cancel", "reset"):
        status, _, text = page.call("POST", f"/gradio_api/{path}", body, {"Content-Type": "application/json"})
        assert (status >= 400 or path in ("reset", "queue/join", "call/ask", "cancel")) and b"site-packages" not in text and b"Traceback" not in text, (path, status, text[:200])

forged = [None, {}, 3, "x", [], *[dict(index=i, value=v, liked=True, previous_value="x") for i, v in ((-1, "v"), (-2, "v"), (-10**30, "v"), (10**9, "v"), ("0", "v"), ([10**30, 0], "v"), ([], "v"), ({}, {}), (1.5, 1), (None, None), (1e308, "v"), ([[0]], ["v"]))], dict(index=0, value="v", liked="yes", previous_value=None)]

@pytest.mark.parametrize("event", ["retry", "edit", "undo", "like"])
def test_forged_events(page, event):
    look(page, as_file(page.film))
    before = talk(page, "First?")
    assert before[0][1].startswith("You asked: First?")
    fn = page.fn("talk", event)
    for data in forged:
        if event != "like" and isinstance(data, dict) and data.get("index") == 0: continue # that one is a good event
        status, out = page.direct(fn, page.data(fn), trigger_id=page.part("talk"), event_data=data)
        said = told((status, out)) if event != "like" or status != 200 else "none"
        assert said and conversation(page) == before and "site-packages" not in said, (data, said)
    kept = page.folder/"feedback.jsonl"
    assert not kept.exists() or kept.read_text().count("\n") == 0
    assert talk(page, "Second?")[-1][1].endswith("Turn 2 with 1 image of 136 pixels.")

def test_states_cannot_be_sent(page):
    "What the server keeps for a tab is not taken from a request."
    for fn, f in page.page.fns.items():
        if not any(b.stateful for b in f.inputs) or f.name == "js_fn": continue
        data = [dict(turns=[1], blind=["x"]) if b.stateful else v for b, v in zip(f.inputs, page.data(fn))]
        status, out = page.another().direct(fn, data)
        assert status == 200 or out["error"], f.name

def test_component_functions_of_gradio_reach_nothing(page):
    for name in ("__init__", "preprocess", "postprocess", "move_resource_to_block_cache", "get_config", "download", "ls", "process_example", "__class__"):
        for part in ("image", "talk", "paper", "file"):
            status, _, _ = page.call("POST", "/gradio_api/component_server", dict(session_hash=page.session, component_id=page.part(part), fn_name=name, data="/etc/passwd"))
            assert status in (404, 422, 500)


# --- one visitor and another

def test_a_visitor_sees_only_his_own_conversation(page):
    look(page, as_file(page.film))
    talk(page, "A secret?")
    eve = page.another()
    look(eve, as_file(page.film))
    assert talk(eve, "Hello?") == [("Hello?", "You asked: Hello? Turn 1 with 1 image of 136 pixels.")] and len(conversation(page)) == 1
    search = eve.fn("search", "submit")
    assert "secret" not in json.dumps(eve.direct(search, eve.data(search, search="secret"))[1])
    for guess in ("", "x", page.session[:-1], page.session.upper(), page.session + " "):
        assert "secret" not in json.dumps(page.another(guess or None).direct(search, eve.data(search, search="secret"))[1])

def test_who_knows_the_session_of_another_is_that_other(page):
    "Gradio's session_hash is a bearer secret, made by the browser, in no address and no log of ours. This pins what it means."
    look(page, as_file(page.film))
    talk(page, "A secret?")
    thief = page.another(page.session)
    search = thief.fn("search", "submit")
    assert "secret" in json.dumps(thief.direct(search, thief.data(search, search="secret"))[1])
    assert page.session not in json.dumps(page.call("GET", "/config")[2].decode()) + page.call("GET", "/gradio_api/queue/status")[2].decode()

def test_a_tab_that_vanishes_in_mid_answer_frees_the_model(page):
    look(page, as_file(page.film))
    send, answer = page.fn("send", "click"), next(k for k, f in page.page.fns.items() if f.name == "answer")
    page.direct(send, page.data(send, question="endless?"))
    page.join(answer, page.data(answer))
    line = socket.create_connection(("127.0.0.1", page.port))
    line.sendall(f"GET /gradio_api/queue/data?session_hash={page.session} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert wait_for(lambda: Scripted.running == 1)
    line.close()
    assert wait_for(lambda: Scripted.running == 0)

def wait_for(true, seconds=25):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end: time.sleep(.05)
    return true()


# --- doors

public = { # what answers before somebody has logged in, and why that does no harm
    "/": "the page that asks for the password", "/login": "takes it", "/login/": "takes it", "/logout": "forgets a cookie", "/openapi.json": "Gradio's own routes, the same for every page",
    "/svelte/{path:path}": "scripts and pictures of Gradio", "/static/{path:path}": "scripts and pictures of Gradio", "/assets/{path:path}": "scripts and pictures of Gradio", "/medchat-fonts": "our fonts", "/favicon.ico": "a picture", "/pwa_icon": "a picture",
    "/pwa_icon/{size}": "a picture", "/theme.css": "colours", "/gradio_api/theme.css": "colours", "/robots.txt": "for robots", "/manifest.json": "the title", "/gradio_api/user": "null", "/gradio_api/user/": "null", "/gradio_api/token": "null", "/gradio_api/token/": "null",
    "/gradio_api/app_id": "a number", "/gradio_api/app_id/": "a number", "/gradio_api/startup-events": "false", "/gradio_api/reset": "does nothing", "/gradio_api/reset/": "does nothing", "/gradio_api/heartbeat/{session_hash}": "says ALIVE; ends a session whose secret one knows",
    "/gradio_api/cancel": "ends an event whose three secrets one knows", "/gradio_api/stream/{event_id}": "an event whose secret one knows; we have no streams", "/gradio_api/stream/{event_id}/close": "an event whose secret one knows",
    "/gradio_api/stream/{session_hash}/{run}/{component_id}/playlist.m3u8": "we have no streams", "/gradio_api/stream/{session_hash}/{run}/{component_id}/playlist-file": "we have no streams", "/gradio_api/stream/{session_hash}/{run}/{component_id}/{segment_id}.{ext}": "we have no streams",
    "/gradio_api/custom_component/{id}/{environment}/{type}/{file_name}": "we have no such components", "/gradio_api/runs": "switched off", "/gradio_api/runs/": "switched off", "/monitoring/{key}": "switched off",
    **{f"/gradio_api/{name}{slash}": "switched off" for name in ("vibe-edit", "undo-vibe-edit", "vibe-code", "vibe-starter-queries") for slash in ("", "/")}}

def routes(found):
    for r in found:
        if hasattr(r, "effective_candidates"): yield from routes(r.effective_candidates())
        else: yield r.path, sorted(getattr(getattr(r, "original_route", r), "methods", None) or ["GET"])

@pytest.fixture(scope="module")
def closed():
    with served(auth=("ada", "correct horse")) as c: yield c

def test_every_door_is_closed_or_known(closed):
    seen = list(routes(closed.page.app.routes))
    assert len(seen) > 60 and {"/config", "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/file={path_or_url:path}", "/gradio_api/run/{api_name}"} <= {p for p, _ in seen}
    for path, methods in seen:
        for method in methods:
            place = re.sub(r"\{environment\}", "client", path)
            status, _, text = closed.call(method, re.sub(r"\{[^}]*\}", "1", place), {} if method == "POST" else None, whole=False)
            if path not in public: assert status in (401, 403), (method, path, status, text[:200])
            else: assert b"mailto" not in text and b'"components":[{' not in text, path

def test_what_is_switched_off_is_off(closed):
    for path, body in (("vibe-edit", dict(prompt="x")), ("undo-vibe-edit", dict(hash="x")), ("vibe-code", dict(code="import os")), ("vibe-starter-queries", dict(code="x"))):
        status, _, text = closed.call("POST", f"/gradio_api/{path}", body)
        assert status in (403, 422) and (status == 403 or path == "undo-vibe-edit"), (path, status, text)

def test_no_function_answers_without_a_password(closed):
    for fn, f in closed.page.fns.items():
        for path, body in (("run/predict", dict(fn_index=fn, data=[], session_hash="s")), ("queue/join", dict(fn_index=fn, data=[], session_hash="s")), (f"call/{f.api_name}", dict(data=[])), (f"call/v2/{f.api_name}", {}), (f"api/{f.api_name}", dict(data=[]))):
            assert closed.call("POST", f"/gradio_api/{path}", body)[0] == 401, (f.api_name, path)
    for path in ("/config", "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/queue/data?session_hash=s", f"/gradio_api/file={closed.folder}", "/gradio_api/upload_progress?upload_id=1", "/gradio_api/queue/status"): assert closed.call("GET", path)[0] == 401, path
    assert closed.upload(film)[0] == 401 and not [p for p in closed.folder.rglob("film.png")]
    text = closed.call("GET", "/")[2]
    assert b'"auth_required":true' in text and b'"components":[]' in text and b'"dependencies":[]' in text
    assert not closed.page.app.state_holder.session_data

def test_passwords(closed):
    for name, password in (("ada", ""), ("ada", "wrong"), ("", "correct horse"), ("Ada", "correct horse"), ("ada", "correct horse "), ("ada", "correct horse\0"), ("ada'--", "x"), ("ada", "x" * 100_000), ("ada\u202e", "correct horse")):
        assert closed.another().login(name, password) in (400, 422)
    one, two = closed.another(), closed.another()
    assert [one.login("ada", "correct horse"), two.login("ada", "correct horse")] == [200, 200] and one.cookie != two.cookie and len(one.cookie.split("=")[1]) >= 22
    assert one.ask(one.upload(film)[1], "In?")["reply"].startswith("You asked: In?")
    forged = closed.another()
    forged.cookie = one.cookie[:-1] + ("x" if one.cookie[-1] != "x" else "y")
    assert forged.call("GET", "/config")[0] == 401 and closed.call("GET", "/config")[0] == 401

def test_the_cookie_is_not_for_scripts(closed):
    _, headers, _ = closed.call("POST", "/login", b"username=ada&password=correct+horse", {"Content-Type": "application/x-www-form-urlencoded"})
    assert "httponly" in headers["set-cookie"].lower()

def test_mcp_and_a_password_exclude_each_other():
    with pytest.raises(MedchatError, match="MCP asks for no password"):
        with served(auth=("ada", "correct horse"), launch=dict(mcp_server=True)): pass
