"The server of the pages: ports, passwords, borders, and what is left behind."
import asyncio, http.client, os, signal, socket, subprocess, sys, threading
from pathlib import Path
import pytest

from medchat.core import DISCLAIMER, MedchatError
from medchat.server import LONGEST, LONGEST_UPLOAD, Borders, at_home, check_exposure, check_port, is_loopback, launch_page, launch_settings, page_class, read_auth, serve
from page_client import free_port

root = Path(__file__).resolve().parent.parent


# --- ports and passwords

@pytest.mark.parametrize("port", [0, -1, 65536])
def test_not_a_port(port):
    with pytest.raises(MedchatError, match="not a port"): check_port(port)

@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_and_the_next_one(host):
    with socket.create_server((host, 0)) as s:
        port = s.getsockname()[1]
        with pytest.raises(MedchatError, match=rf"in use: {port}.*--port {port % 65535 + 1}"): check_port(port)
    check_port(port)

@pytest.mark.parametrize("host", ["198.51.100.7", "no such name"])
def test_not_an_address_of_this_machine(host):
    with pytest.raises(MedchatError, match="not an address of this machine"): check_port(free_port(), host)

def test_ports_of_the_system(monkeypatch):
    def bind(*_): raise PermissionError
    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(MedchatError, match="above 1023"): check_port(80)

def test_the_password_may_hold_colons_and_the_environment_may_hold_it(monkeypatch):
    monkeypatch.delenv("MEDCHAT_AUTH", raising=False)
    assert read_auth() is None and read_auth(" ada :a:b:c:d:e") == ("ada", "a:b:c:d:e")
    monkeypatch.setenv("MEDCHAT_AUTH", "grace:12345678")
    assert read_auth() == ("grace", "12345678") and read_auth("ada:abcdefgh") == ("ada", "abcdefgh")

@pytest.mark.parametrize("auth", ["ada", "ada:", "ada:1234567", ":12345678", " :12345678", "sesame-open-12345678"])
def test_no_name_or_a_short_password(auth):
    with pytest.raises(MedchatError, match="8 characters") as e: read_auth(auth)
    assert "1234567" not in str(e.value).replace("sesame-open-12345678"[:20], "")

@pytest.mark.parametrize("host, share, closed", [("127.0.0.1", False, True), ("localhost", False, True), ("127.9.9.9", False, True), ("0.0.0.0", False, False), ("192.168.0.7", False, False), ("::", False, False), ("127.0.0.1", True, False)])
def test_nothing_stands_open_without_a_password(monkeypatch, host, share, closed):
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert is_loopback(host) == (host[0] in "1l" and host != "192.168.0.7")
    if closed: assert check_exposure(host, share, None) == ""; return
    with pytest.raises(MedchatError, match="without a password"): check_exposure(host, share, None)
    said = check_exposure(host, share, ("ada", "12345678"))
    assert "patient" in said and ("relay" in said) == share and "12345678" not in said

def test_a_space_is_open_by_its_own_switch(monkeypatch):
    monkeypatch.setenv("SPACE_ID", "ada/space")
    assert "Space" in check_exposure("0.0.0.0", False, None)

def test_settings(monkeypatch):
    monkeypatch.delenv("SPACE_ID", raising=False)
    monkeypatch.setenv("GRADIO_MCP_SERVER", "True"); monkeypatch.setenv("GRADIO_SHARE", "True"); monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    made = launch_settings({}, "b {color: red}")
    hosts = lambda made: made["app_kwargs"]["middleware"][0].kwargs["hosts"]
    assert (made["server_name"], made["share"], made["mcp_server"], made["enable_monitoring"], made["run_history"], made["ssr_mode"]) == ("127.0.0.1", False, False, False, False, False)
    assert sorted(hosts(made)) == ["127.0.0.1", "localhost"] and made["css"].endswith("b {color: red}")
    assert hosts(launch_settings(dict(server_name="0.0.0.0", auth=("ada", "12345678")))) == ()
    assert launch_settings(dict(server_port=5, mcp_server=True))["mcp_server"] is True
    with pytest.raises(MedchatError, match="without a password"): launch_settings(dict(share=True))
    with pytest.raises(MedchatError, match="MCP asks for no password"): launch_settings(dict(auth=("ada", "12345678"), mcp_server=True))
    monkeypatch.setitem(sys.modules, "google.colab", os)   # there the page is shown through a proxy of another name
    assert hosts(launch_settings({})) == ()


# --- borders, around a server that counts what it reads

def through(headers=(), body=(), path="/gradio_api/queue/join", hosts=("127.0.0.1", "localhost"), kind="http", fails=False):
    "(status, headers, bytes that the server read, what the server saw)."
    sent, read, seen = [], [], []
    async def app(scope, receive, send):
        seen.append((scope, receive, send))
        if scope["type"] != "http": return
        while True:
            message = await receive()
            read.append(message.get("body", b""))
            if not message.get("more_body"): break
        await send(dict(type="http.response.start", status=200, headers=[(b"x-own", b"1")]))
        await send(dict(type="http.response.body", body=b"ok"))
    parts = list(body) or [b""]
    async def receive(): return dict(type="http.request", body=parts.pop(0), more_body=bool(parts))
    async def send(message): sent.append(message)
    scope = dict(type=kind, path=path, headers=[(k.encode(), v.encode()) for k, v in headers])
    asyncio.run(Borders(app, hosts)(scope, receive, send))
    start = sent[0] if sent else dict(status=None, headers=[])
    return start["status"], dict(start["headers"]), sum(map(len, read)), [s for s, r, x in seen if s is scope and (kind == "http") == (x is not send)]

here = ("host", "127.0.0.1:7860")

@pytest.mark.parametrize("host, status", [("127.0.0.1:7860", 200), ("localhost", 200), ("localhost:1", 200), ("evil.example", 403), ("evil.example:7860", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example:80", 403),
    ("evil127.0.0.1", 403), ("", 403), (":7860", 403), ("[::1]:7860", 403), ("evil.example#127.0.0.1", 403), ("127.0.0.1:80:80", 403)])
def test_host_names(host, status):
    done, headers, _, seen = through([("host", host)])
    assert done == status and len(seen) == (status == 200)

def test_no_host_name_at_all(): assert through()[0] == 403 and through(hosts=())[0] == 200

def test_each_reply_tells_the_browser_to_stay_at_home():
    _, headers, _, _ = through([here])
    assert headers[b"x-own"] == b"1" and headers[b"x-content-type-options"] == b"nosniff" and headers[b"referrer-policy"] == b"no-referrer"
    rules = dict(r.strip().split(" ", 1) for r in headers[b"content-security-policy"].decode().split(";"))
    assert rules["default-src"] == "'self'" and rules["object-src"] == "'none'" and rules["form-action"] == "'self'" and not any("http" in r or "*" in r for r in rules.values())

@pytest.mark.parametrize("length, status", [("0", 200), (str(LONGEST), 200), (str(LONGEST + 1), 413), ("9" * 30, 413), ("-1", 413), ("1e3", 413), ("", 413)])
def test_long_requests_are_refused_before_they_are_read(length, status):
    done, _, read, seen = through([here, ("content-length", length)])
    assert (done, len(seen)) == (status, status == 200)

@pytest.mark.parametrize("more", [[], [("content-length", "10")]])
def test_a_body_without_a_length_or_with_a_lie_is_cut(more):
    parts = [bytes(100_000)] * 40
    done, _, read, _ = through([here, *more], parts)
    assert done == 413 and read <= LONGEST
    assert through([here, *more], parts[:10])[::2] == (200, 10**6)

def test_uploads_may_be_longer_but_only_at_their_own_address():
    parts = [bytes(10**6)] * 5
    assert through([here], parts, "/gradio_api/upload")[::2] == (200, 5 * 10**6)
    for path in ("/gradio_api/run/upload", "/gradio_api/call/upload", "/upload/x", "/gradio_api/upload/"): assert through([here], parts, path)[0] == 413, path
    assert through([here, ("content-length", str(LONGEST_UPLOAD + 1))], (), "/gradio_api/upload")[0] == 413
    assert through([here], [bytes(10**7)] * 9, "/gradio_api/upload")[0] == 413

@pytest.mark.parametrize("path", ["/gradio_api/file=http://example.com/x.png", "/gradio_api/file=https://127.0.0.1/", "/gradio_api/file/http://example.com", "/gradio_api/proxy=http://example.com", "/gradio_api/file=file:///etc/passwd"])
def test_no_address_in_an_address(path): assert through([here], (), path)[0] == 403 and through([here], (), path)[3] == []

@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
def test_what_is_no_request_goes_through_untouched(kind): assert through([("host", "evil.example")], kind=kind)[0] is None and len(through(kind=kind)[3]) == 1


# --- at home

@pytest.mark.parametrize("before", [{}, dict(NO_PROXY="ward.example", GRADIO_TEMP_DIR="/somewhere", GRADIO_ANALYTICS_ENABLED="True")])
def test_at_home_puts_everything_back_even_after_an_error(monkeypatch, before):
    names = ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "NO_PROXY", "no_proxy")
    for name in names: monkeypatch.delenv(name, raising=False)
    for name, value in before.items(): monkeypatch.setenv(name, value)
    with pytest.raises(ZeroDivisionError):
        with at_home() as folder:
            (folder/"x").write_text("")
            assert os.environ["GRADIO_TEMP_DIR"] == str(folder) and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and "127.0.0.1" in os.environ["NO_PROXY"]
            assert ("ward.example" in os.environ["NO_PROXY"]) == ("NO_PROXY" in before)
            1 / 0
    assert not folder.exists() and {n: os.environ[n] for n in names if n in os.environ} == before


# --- a page

@pytest.fixture(scope="module")
def page():
    import gradio as gr
    with at_home(), page_class("#own {color: red}")(analytics_enabled=False) as page:
        word, file = gr.Textbox("hello"), gr.File()
        word.submit(lambda w: 1 / 0 if w == "fail" else w.upper(), word, word, api_name="loud")
        file.upload(lambda f: "seen", file, word, api_name="file")
    with at_home():
        page.address = launch_page(page, free_port())
        yield page
        page.close(verbose=False)

def fetch(page, path="/", host=None, method="GET", body=None):
    place = page.address.removeprefix("http://")
    line = http.client.HTTPConnection(place, timeout=10)
    line.request(method, path, body, {"Host": host or place, "Content-Type": "application/json"})
    reply = line.getresponse()
    return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read().decode("utf-8", "replace")

def test_a_page_has_the_borders_and_its_own_looks(page):
    status, headers, text = fetch(page)
    assert status == 200 and headers["x-content-type-options"] == "nosniff" and "#own" in text + fetch(page, "/theme.css")[2]
    assert fetch(page, host="evil.example")[0] == 403 and fetch(page, host=page.address.replace("http://127.0.0.1", "localhost"))[0] == 200
    for path in ("/config", "/gradio_api/info", "/nowhere", "/gradio_api/file=/etc/passwd", "/gradio_api/app_id"): assert fetch(page, path)[1]["referrer-policy"] == "no-referrer", path

def test_only_this_machine_is_listened_to(page):
    if not Path("/proc/net/tcp").exists(): pytest.skip("no /proc/net/tcp")
    port = f":{int(page.address.rsplit(':', 1)[1]):04X}"
    listening = [l.split()[1] for l in Path("/proc/net/tcp").read_text().splitlines()[1:] if l.split()[3] == "0A"]
    assert [l for l in listening if l.endswith(port)] == [f"0100007F{port}"]

def test_what_goes_wrong_inside_is_said_without_its_inner_workings(page, capsys):
    import json
    call = lambda name, data: fetch(page, f"/gradio_api/run/{name}", method="POST", body=json.dumps(dict(data=[data])))
    assert json.loads(call("loud", "hello")[2])["data"] == ["HELLO"]
    status, _, text = call("loud", "fail")
    assert status == 500 and json.loads(text)["error"] == "The page cannot do that." and "ZeroDivision" not in text
    assert "ZeroDivisionError" in capsys.readouterr().err
    for file in (dict(path=str(root/"settings.ini")), dict(path="/etc/passwd", meta={"_type": "gradio.FileData"}), dict(path="a\0b"), dict(path=["x"]), [dict(path="/etc/passwd")]):
        assert "was not uploaded" in call("file", file)[2], file

def test_the_port_is_taken(page):
    with pytest.raises(MedchatError, match="in use"): launch_page(page, int(page.address.rsplit(":", 1)[1]))

def test_serve_says_where_and_ends_with_ctrl_c(tmp_path):
    code = """
import sys
from medchat.server import at_home, page_class, serve
from medchat.core import ending_well
with at_home(), ending_well():
    with page_class()(analytics_enabled=False) as page: pass
    serve(page, int(sys.argv[1]), "A page is", open_browser=False)"""
    ends = {}
    for ended in (signal.SIGINT, signal.SIGTERM):
        (place := tmp_path/ended.name).mkdir()
        server = subprocess.Popen([sys.executable, "-c", code, str(free_port())], env=os.environ | dict(PYTHONPATH=str(root), TMPDIR=str(place), PYTHONUNBUFFERED="1"), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        ends[ended] = server, place
    for ended, (server, place) in ends.items():
        lines = []
        for line in server.stdout:
            lines.append(line)
            if "http://" in line: break
        assert lines[0].strip() == DISCLAIMER and "A page is at http://127.0.0.1:" in lines[-1] and list(place.glob("medchat-app-*"))
        server.send_signal(ended)
        rest = server.communicate(timeout=30)[0]
        assert server.returncode == (0 if ended == signal.SIGINT else 128 + ended) and "Traceback" not in rest and not list(place.glob("medchat-app-*")), rest

def test_serve_closes_a_page_that_has_ended_by_itself():
    class Page:
        is_running, share_url, closed = True, None, 0
        def launch(self, **_): pass
        def close(self, verbose): Page.closed += 1; Page.is_running = False
    threading.Timer(.5, lambda: setattr(Page, "is_running", False)).start()
    serve(Page(), free_port(), "It is", open_browser=False)
    assert Page.closed == 1
