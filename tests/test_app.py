"The chat page: sessions, bad input, the server's borders, and the page in a headless Chromium."
import json, os, re, shutil, signal, socket, subprocess, sys, threading, time
from datetime import datetime, timedelta, timezone
from pathlib import Path
import pytest
from PIL import Image

import medchat.app as A
from medchat.app import Session, at_home, build_app, check_port, example_images, keep_thumb, launch_app, say_error
from medchat.core import DISCLAIMER, MedchatError, sample_data
from browser_tab import BrowserTab
from run_maker import make_hollow_run, make_run

root = Path(__file__).resolve().parent.parent


class Parrot:
    "A chat without a model: says words slowly, and counts how many speak at once."
    pause, now, most, guard = .02, 0, 0, threading.Lock()
    def __init__(self, model=None, processor=None, max_new_tokens=0): self.model, self.processor, self.max_new_tokens, self.messages, self.stopped, self.images = model, processor, max_new_tokens, [], False, []
    def stop(self): self.stopped = True
    def ask(self, text, images=()):
        self.stopped, self.images = False, [*self.images, *images]
        with Parrot.guard: Parrot.now += 1; Parrot.most = max(Parrot.most, Parrot.now)
        try:
            if "fail" in text: raise RuntimeError("CUDA out of memory at /srv/ada/x.py")
            for word in f"You asked {text} and this is turn {len(self.messages) // 2 + 1} about {len(self.images)} image".split() + ["word"] * (200 if "long" in text else 9999 if "endless" in text else 0):
                if self.stopped: break
                time.sleep(Parrot.pause)
                yield " " + word
            self.messages += [text, "answer"]
        finally:
            with Parrot.guard: Parrot.now -= 1

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]

@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Image files, and files that are none."
    folder = tmp_path_factory.mktemp("films")
    Image.radial_gradient("L").resize((112, 112)).save(folder/"a.png")
    Image.linear_gradient("L").resize((150, 112)).save(folder/"b.jpg")
    Image.fromarray(__import__("numpy").arange(64 * 64, dtype="uint16").reshape(64, 64)).save(folder/"deep.tiff")
    (folder/"corrupt.png").write_bytes((folder/"a.png").read_bytes()[:300])
    (folder/"text.png").write_text("this is no image")
    (folder/"notes.txt").write_text("this is no image")
    (folder/"page.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    (folder/"empty.png").write_bytes(b"")
    return folder


# --- without a page

def test_sessions_share_nothing_but_the_model(films):
    chat = Parrot(model=object())
    one, two = Session(chat), Session(chat)
    one.look(films/"a.png"); one.ask("x"); list(one.answer())
    assert len(one.turns) == 2 and two.turns == [] and two.image is None and chat.messages == [] and one.chat.model is two.chat.model

@pytest.mark.parametrize("bad", ["corrupt.png", "text.png", "notes.txt", "page.svg", "empty.png", "not-there.png"])
def test_bad_file_changes_nothing(films, bad):
    tab = Session(Parrot())
    tab.look(films/"a.png"); tab.ask("x"); list(tab.answer())
    before = (tab.image, tab.file, list(tab.turns), tab.chat)
    with pytest.raises(MedchatError) as e: tab.look(films/bad)
    assert before == (tab.image, tab.file, list(tab.turns), tab.chat)
    assert str(films) not in say_error(e.value) and bad in say_error(e.value)

def test_same_picture_again_keeps_the_conversation(films, tmp_path):
    tab = Session(Parrot())
    tab.look(films/"a.png"); tab.ask("x"); list(tab.answer())
    shutil.copy(films/"a.png", tmp_path/"other name.png")
    assert not tab.look(tmp_path/"other name.png") and len(tab.turns) == 2
    assert tab.look(films/"b.jpg") and tab.turns == [] and tab.chat.messages == []

def test_new_image_while_an_answer_is_written(films):
    tab = Session(Parrot())
    tab.look(films/"a.png"); tab.ask("long")
    answer = tab.answer(); next(answer)
    tab.look(films/"b.jpg"); tab.ask("y")
    rest = list(answer)                       # the old answer ends soon and touches nothing
    assert len(rest) <= 2 and tab.busy and [t["content"] for t in tab.turns] == ["y", "…"]
    assert "turn 1 about 1 image" in list(tab.answer())[-1]

def test_image_goes_along_once_and_again_after_a_failed_first_turn(films):
    tab = Session(Parrot())
    tab.look(films/"a.png"); tab.ask("fail")
    with pytest.raises(RuntimeError): list(tab.answer())
    assert tab.turns == [] and not tab.busy
    for n in (1, 2):
        tab.ask("x")
        assert f"turn {n} about {n if n > 1 else 2} image" in list(tab.answer())[-1] or n == 1
    assert tab.chat.images.count(tab.image) == 2   # the failed turn and the first good one; not the second

def test_unforeseen_errors_show_no_paths(capsys):
    said = say_error(RuntimeError("CUDA out of memory at /srv/ada/x.py"))
    assert "/srv" not in said and "RuntimeError" in said and "/srv/ada" in capsys.readouterr().err

def test_examples_are_held_out_and_different():
    if not (sample_data()/"phantoms").is_dir(): pytest.skip("no phantoms")
    from medchat.core import read_jsonl
    split = {str(sample_data()/"phantoms"/p): r["split"] for _, r in read_jsonl(sample_data()/"phantoms"/"records.jsonl") for p in r["images"]}
    assert len(set(example_images())) == 4 and {split[p] for p in example_images()} == {"test"}

def test_no_sample_data(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCHAT_SAMPLE_DATA", str(tmp_path))
    assert example_images() == []


@pytest.mark.parametrize("liked", [True, False])
def test_a_thumb_is_a_line_with_time_and_verdict(tmp_path, liked):
    (tmp_path/"feedback.jsonl").write_text("before\n")
    assert keep_thumb(tmp_path, liked)
    before, line, rest = (tmp_path/"feedback.jsonl").read_text().split("\n")
    row = json.loads(line)
    assert (before, rest, list(row), row["liked"]) == ("before", "", ["time", "liked"], liked)
    assert timedelta(0) <= datetime.now(timezone.utc) - datetime.fromisoformat(row["time"]) < timedelta(minutes=1)

@pytest.mark.parametrize("liked", ["", "True", "spam", None, 1, ["x"]])
def test_only_thumbs_are_kept(tmp_path, liked):
    assert not keep_thumb(tmp_path, liked) and list(tmp_path.iterdir()) == []

def test_a_thumb_that_cannot_be_kept_is_said_in_the_terminal(tmp_path, capsys):
    (tmp_path/"feedback.jsonl").mkdir()
    for run in (tmp_path, tmp_path/"nowhere", tmp_path/"feedback.jsonl"/"x"): assert not keep_thumb(run, True)
    assert capsys.readouterr().err.count("a thumb was not kept") == 3 and list(tmp_path.rglob("*")) == [tmp_path/"feedback.jsonl"]

def test_no_thumbs_without_a_folder_that_can_be_written(tmp_path, monkeypatch):
    events = lambda run: [name for f in build_app(Parrot(), run=run).fns.values() for _, name in f.targets]
    assert "like" in events(tmp_path) and "like" not in events(None) and "like" not in events(tmp_path/"nowhere")
    monkeypatch.setattr(os, "access", lambda *a: False) # the superuser may write anywhere
    assert "like" not in events(tmp_path)


# --- bad input

def test_ports(tmp_path):
    for port in (0, -1, 65536):
        with pytest.raises(MedchatError, match="not a port"): check_port(port)
    with socket.create_server(("127.0.0.1", 0)) as s:
        with pytest.raises(MedchatError, match=r"in use: \d+.*--port"): check_port(s.getsockname()[1])
    with socket.create_server(("0.0.0.0", 0)) as s:
        with pytest.raises(MedchatError, match="in use"): check_port(s.getsockname()[1])

def test_not_a_run(tmp_path, medchat):
    done = medchat("app", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not a run folder" in done.stderr

def test_the_upload_folder_goes_even_after_an_error():
    with pytest.raises(ZeroDivisionError):
        with at_home() as folder:
            (folder/"x").write_text("")
            assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
            1 / 0
    assert not folder.exists() and os.environ.get("GRADIO_TEMP_DIR") != str(folder)


# --- the server's borders

@pytest.mark.parametrize("path", ["http://example.com/x.png", "https://127.0.0.1/x.png", "/nowhere/x.png"])
def test_no_image_is_fetched_from_an_address(path):
    import asyncio
    import gradio as gr
    with pytest.raises(gr.Error, match="not uploaded"): asyncio.run(A._scan(gr)().async_move_resource_to_block_cache(path))

@pytest.fixture(scope="module")
def page(films):
    "A page with a parrot, served in this process."
    A_examples, A.example_images = A.example_images, lambda count=4: [str(films/"a.png"), str(films/"b.jpg")]
    with at_home() as folder:
        blocks = build_app(Parrot(), "runs of <b>ada</b>", "tiny")
        address = launch_app(blocks, free_port())
        yield address
        blocks.close(verbose=False)
    A.example_images = A_examples
    assert not folder.exists()

def fetch(address, path="/", host=None):
    import http.client
    name, port = address.removeprefix("http://").split(":")
    c = http.client.HTTPConnection(name, int(port), timeout=10)
    c.request("GET", path, headers={"Host": host or f"{name}:{port}"})
    r = c.getresponse()
    return r.status, dict((k.lower(), v) for k, v in r.getheaders()), r.read().decode("utf-8", "replace")

def test_only_this_machine(page):
    assert fetch(page)[0] == 200
    assert fetch(page, host=page.replace("http://127.0.0.1", "localhost"))[0] == 200
    for host in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", ""): assert fetch(page, host=host or " ")[0] == 403, host
    port = int(page.rsplit(":", 1)[1])
    listening = [l.split()[1] for l in Path("/proc/net/tcp").read_text().splitlines()[1:] if l.split()[3] == "0A"] if Path("/proc/net/tcp").exists() else []
    assert not listening or [l for l in listening if l.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]

def test_page_names_nobody_else(page):
    status, headers, text = fetch(page)
    assert "default-src 'self'" in headers["content-security-policy"] and headers["referrer-policy"] == "no-referrer"
    assert not re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["']?(?:https?:)?//(?!127\.0\.0\.1)[^"'> ]+""", text)
    assert "fonts.googleapis" not in text and "cdnjs" not in text

@pytest.mark.parametrize("path", ["/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file=" + str(root/"settings.ini"), "/gradio_api/file=../../etc/passwd"])
def test_no_other_files(page, path):
    assert fetch(page, path)[0] in (403, 404)


# --- in the browser

class Tab(BrowserTab):
    "A browser tab on the page, and what a person does in it."
    def __init__(self, browser, address, width=1280, height=800): super().__init__(browser, address, "#question textarea", width, height)
    def upload(self, path, new=True):
        old = self.picture()
        self.page.set_input_files("#image input[type=file]", str(path))
        if new: self.page.wait_for_function("old => { const i = document.querySelector('#image .image-frame img'); return i && i.complete && i.naturalWidth && i.src != old && i.src.endsWith('image.png') }", arg=old)
    def picture(self): return self.page.evaluate("(document.querySelector('#image .image-frame img') || {}).src || ''")
    def send(self, text, press=False):
        self.page.fill("#question textarea", text)
        self.page.press("#question textarea", "Enter") if press else self.page.click("#send")
    def done(self, turns): self.page.wait_for_function("n => document.querySelectorAll('#talk [data-testid=bot]').length == n && document.querySelector('#send') && document.querySelector('#send').offsetParent", arg=turns)
    def said(self): return [t.strip() for t in self.page.locator("#talk .message-content").all_inner_texts()]
    def notice(self):
        self.page.wait_for_selector("#notice .medchat-notice")
        return self.page.inner_text("#notice .medchat-notice")
    def disclaimer_in_view(self):
        return self.page.evaluate("""() => { const e = document.querySelector('#draft'), r = e.getBoundingClientRect();
            return e.innerText.includes('Draft. Not for clinical use.') && r.top >= 0 && r.bottom <= innerHeight && r.height > 10 && r.right <= innerWidth && document.elementFromPoint(innerWidth / 2, r.top + r.height / 2).id == 'draft' }""")

@pytest.fixture
def tab(browser, page):
    with Tab(browser, page) as tab: yield tab

def test_errors_are_said_in_the_page_and_nothing_is_lost(tab, films):
    tab.send("Is there anything?")
    assert "no image yet" in tab.notice()
    tab.upload(films/"a.png")
    tab.send("First?", press=True); tab.done(1)
    assert tab.page.locator("#notice .medchat-notice").count() == 0 and tab.page.input_value("#question textarea") == ""
    kept, picture = tab.said(), tab.picture()
    tab.upload(films/"notes.txt", new=False)
    tab.page.get_by_text("Invalid file type: notes.txt").wait_for()            # the browser's part already refuses it
    for bad in ("corrupt.png", "text.png", "empty.png", "page.svg"):
        tab.upload(films/bad, new=False)
        tab.page.wait_for_function("name => (document.querySelector('#notice .medchat-notice') || {}).innerText?.includes(name)", arg=bad)
        tab.page.wait_for_function("() => (document.querySelector('#image .image-frame img') || {}).naturalWidth == 112")
        assert tab.said() == kept
    tab.send("please fail")
    tab.page.wait_for_function("() => (document.querySelector('#notice .medchat-notice') || {}).innerText?.includes('RuntimeError')")
    assert tab.said() == kept and "/home" not in tab.page.inner_text("body") and tab.page.input_value("#question textarea") == "please fail"
    tab.send("Second?"); tab.done(2)
    assert tab.said()[:2] == kept and "turn 2 about 1 image" in tab.said()[3] and tab.disclaimer_in_view()

def test_empty_question(tab, films):
    tab.upload(films/"a.png")
    tab.send("   ")
    assert "no question yet" in tab.notice() and tab.said() == []

def test_stop_keeps_what_was_said(tab, films):
    tab.upload(films/"a.png")
    tab.send("a long one")
    tab.page.wait_for_function("() => document.querySelectorAll('#talk .message-content')[1]?.innerText.includes('word')")
    tab.page.click("#stop"); tab.done(1)
    assert 5 < len(tab.said()[1].split()) < 150
    tab.send("Second?"); tab.done(2)
    assert "turn 2" in tab.said()[3]

def test_examples_and_ready_questions_and_clear(tab, films):
    tab.page.locator("#examples button.gallery-item").nth(1).click()
    tab.page.wait_for_function("() => (document.querySelector('#image .image-frame img') || {}).naturalWidth == 150")
    tab.page.locator("#ready button.gallery-item").first.click(); tab.done(1)
    assert tab.said()[0] == A.example_questions[0] and "about 1 image" in tab.said()[1]
    tab.page.click("#clear")
    tab.page.wait_for_function("() => !document.querySelector('#talk .message-content')")
    tab.send("Again?"); tab.done(1)
    assert "turn 1 about 1 image" in tab.said()[1]
    tab.page.click("#talk button[aria-label=Clear]")
    tab.send("And again?"); tab.done(1)
    assert "turn 1 about 1 image" in tab.said()[1]
    tab.page.locator("#examples button.gallery-item").nth(0).click()     # another image: another conversation
    tab.page.wait_for_function("() => !document.querySelector('#talk .message-content')")

def test_two_browsers_do_not_mix_and_take_turns(browser, page, films):
    Parrot.most = 0
    with Tab(browser, page) as one, Tab(browser, page) as two:
        one.upload(films/"a.png"); two.upload(films/"b.jpg")
        one.send("ONE long"); two.send("TWO")
        two.page.wait_for_selector("#stop:visible")
        one.page.wait_for_function("() => document.querySelectorAll('#talk .message-content')[1]?.innerText.includes('word')")
        one.page.click("#stop")
        one.done(1); two.done(1)
        assert one.said()[0] == "ONE long" and two.said()[0] == "TWO" and "TWO" not in " ".join(one.said()) and "ONE" not in " ".join(two.said())
    assert Parrot.most == 1

def test_who_leaves_frees_the_model(browser, page, films):
    with Tab(browser, page) as gone:
        gone.upload(films/"a.png")
        gone.send("endless")
        gone.page.wait_for_function("() => document.querySelectorAll('#talk .message-content')[1]?.innerText.includes('word')")
    with Tab(browser, page) as tab:
        tab.upload(films/"a.png")
        tab.send("Is it free?"); tab.done(1)

def test_text_stays_text_and_calls_nobody(tab, films):
    tab.upload(films/"a.png")
    evil = '<img src="http://evil.example/x.png" onerror="document.title=1"> ![x](http://evil.example/y.png) <b>b</b> &amp; &lt; a < b * c * d_e_f'
    tab.send(evil); tab.done(1)
    assert tab.said()[0] == evil and "You asked " + evil in tab.said()[1] and not [u for u in tab.requests if "evil" in u]
    assert tab.page.locator("#talk img, #talk b").count() == 0 and "<b>ada</b>" in tab.page.inner_text("#head h1")

def test_what_the_model_sees_is_shown(tab, films):
    tab.upload(films/"deep.tiff")      # no browser shows a 16-bit TIFF
    assert tab.page.evaluate("document.querySelector('#image .image-frame img').naturalWidth") == 64
    tab.send("Grey?"); tab.done(1)

def test_the_page_refuses_to_load_from_elsewhere(browser, page):
    tab = Tab(browser, page)
    asked = []
    tab.context.on("requestfailed", lambda r: asked.append((r.url, r.failure)))
    tab.page.evaluate("() => { const i = new Image(); i.src = 'http://198.51.100.7/x.png'; document.body.append(i); return fetch('http://198.51.100.7/y').catch(() => 0) }")
    tab.page.wait_for_timeout(300)
    assert all("csp" in why.lower() for url, why in asked if "198.51" in url), asked
    tab.context.close()

def test_keyboard_and_names_for_screen_readers(tab):
    for role, name in (("textbox", "Question"), ("button", "Send"), ("button", "Clear"), ("log", "chatbot conversation")):
        assert tab.page.get_by_role(role, name=name, exact=False).first.is_visible(), (role, name)

@pytest.mark.parametrize("width", [360, 390])
def test_phone(browser, page, films, width):
    with Tab(browser, page, width, 800) as tab:
        assert tab.disclaimer_in_view()
        tab.upload(films/"a.png")
        tab.send("A question with many more words than the others have, to see it wrap on a phone?"); tab.done(1)
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width and tab.disclaimer_in_view()
        for part in ("#image", "#talk", "#question", "#send", "#clear"):
            box = tab.page.locator(part).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] >= 36, (part, box)
        tab.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        assert tab.disclaimer_in_view()


# --- thumbs

def test_no_thumbs_without_a_run(tab, films):
    tab.upload(films/"a.png"); tab.send("A thumb?"); tab.done(1)
    assert "Thumbs" not in tab.page.inner_text("#head") and tab.page.get_by_role("button", name="like").count() == 0

@pytest.fixture
def judged(tmp_path):
    "A page with a parrot that keeps thumbs, and its run folder."
    run = tmp_path/"run"
    run.mkdir()
    with at_home():
        blocks = build_app(Parrot(), "run", "tiny", run)
        yield launch_app(blocks, free_port()), run
        blocks.close(verbose=False)

def wait_for(true, seconds=10):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end: time.sleep(.05)
    return true()

def test_a_thumb_is_one_line_without_words_or_images(browser, judged, films):
    address, run = judged
    file = run/"feedback.jsonl"
    lines = lambda: file.read_text().splitlines() if file.exists() else []
    with Tab(browser, address) as tab:
        assert "counted on this machine only, without words or images" in tab.page.inner_text("#head")
        tab.upload(films/"a.png")
        for n, (name, liked) in enumerate((("Like", True), ("Dislike", False)), 1):
            tab.send(f"secret {n}?"); tab.done(n)
            assert len(lines()) == n - 1
            tab.page.get_by_role("button", name=re.compile(f"^{name}d?$", re.I)).last.click()
            assert wait_for(lambda: len(lines()) == n) and json.loads(lines()[-1]) == dict(time=json.loads(lines()[-1])["time"], liked=liked)
        tab.page.wait_for_timeout(300)
        state = lambda: [name for name in tab.page.evaluate("[...document.querySelectorAll('#talk button')].map(b => b.ariaLabel)") if name.endswith("d")]
        assert sorted(state()) == ["Disliked", "Liked"]
        tab.page.get_by_role("button", name="Liked", exact=True).click(); tab.page.wait_for_timeout(300)     # taken back, and pressed again:
        tab.page.get_by_role("button", name="Like", exact=True).first.click(); tab.page.wait_for_timeout(300) # still one answer that was liked
        assert len(lines()) == 2 and all(re.fullmatch(r'\{"time": "[\dT:+-]{25}", "liked": (true|false)\}', line) for line in lines())
        assert list(run.rglob("*")) == [file] and len(tab.said()) == 4 and tab.disclaimer_in_view()
        tab.page.click("#clear"); tab.page.wait_for_function("() => !document.querySelector('#talk .message-content')")
        tab.send("Again?"); tab.done(1)
        assert state() == []
        tab.page.get_by_role("button", name="Like", exact=True).click()
        assert wait_for(lambda: len(lines()) == 3)

def test_the_chat_goes_on_where_no_thumb_can_be_kept(browser, judged, films):
    address, run = judged
    (run/"feedback.jsonl").mkdir()       # not even the superuser can write a line to it
    with Tab(browser, address) as tab:
        tab.upload(films/"a.png"); tab.send("First?"); tab.done(1)
        tab.page.get_by_role("button", name="Like", exact=True).click()
        tab.page.wait_for_timeout(500)
        tab.send("Second?"); tab.done(2)
        assert "turn 2 about 1 image" in tab.said()[3] and tab.page.locator(".toast-body.error, #notice .medchat-notice").count() == 0 and list((run/"feedback.jsonl").iterdir()) == []


# --- the whole way: the command, a real model, a phantom

spy = """
import atexit, os, socket
def note(what):
    with open(os.environ["MEDCHAT_SPY"], "a") as f: f.write(str(what) + "\\n")
for name in ("connect", "connect_ex"):
    def guarded(self, address, real=getattr(socket.socket, name)):
        if isinstance(address, tuple) and not str(address[0]).startswith("127.") and address[0] not in ("localhost", "::1"): note(address)
        return real(self, address)
    setattr(socket.socket, name, guarded)
def lookup(host, *args, real=socket.getaddrinfo, **kw):
    if host not in (None, "127.0.0.1", "localhost", "::1", b"127.0.0.1"): note(host)
    return real(host, *args, **kw)
socket.getaddrinfo = lookup
"""

@pytest.fixture(scope="module")
def real_run(tmp_path_factory): return Path(os.environ.get("MEDCHAT_RUN") or make_run(tmp_path_factory.mktemp("runs")/"demo")).resolve() # for the screenshots: a run that has learnt something

def test_the_whole_way(browser, real_run, tmp_path):
    from medchat.chat import Chat
    film = example_images()[0]
    questions = ["Is the heart enlarged?", "Is there a pleural effusion?"]
    chat, wanted = Chat.of_run(real_run), []
    for n, q in enumerate(questions): wanted += [q, "".join(chat.ask(q, [] if chat.messages else [film])) or "(no answer)"]
    assert wanted[1] != "(no answer)"
    (tmp_path/"spy").mkdir(); (tmp_path/"spy"/"sitecustomize.py").write_text(spy); (tmp_path/"tmp").mkdir()
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | dict(PYTHONPATH=f"{tmp_path/'spy'}:{root}", MEDCHAT_SPY=str(tmp_path/"calls"), TMPDIR=str(tmp_path/"tmp"),
        HTTP_PROXY="http://127.0.0.1:9", PYTHONUNBUFFERED="1")
    port = free_port()
    command = [sys.executable, "-c", "import sys; from medchat.cli import main; sys.exit(main())", "app", str(real_run), "--port", str(port), "--no-open-browser"]
    server = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path)
    lines = []
    try:
        for line in server.stdout:
            lines.append(line)
            if "127.0.0.1" in line: break
        address = f"http://127.0.0.1:{port}"
        assert address in lines[-1], lines
        with Tab(browser, address) as tab:
            assert tab.disclaimer_in_view() and real_run.name in tab.page.inner_text("#head") and "tiny-qwen2-vl" in tab.page.inner_text("#head")
            tab.upload(film)
            for n, q in enumerate(questions): tab.send(q, press=bool(n)); tab.done(n + 1)
            assert tab.said() == wanted and tab.disclaimer_in_view()
            shots = Path(os.environ.get("MEDCHAT_SCREENSHOTS") or tmp_path)
            tab.page.wait_for_timeout(400)
            tab.page.screenshot(path=shots/"app.png")
            tab.page.set_viewport_size(dict(width=390, height=844))
            tab.page.wait_for_timeout(400)
            assert tab.disclaimer_in_view()
            tab.page.screenshot(path=shots/"app-phone.png")
        assert (shots/"app.png").stat().st_size > 10_000
        assert list((tmp_path/"tmp").glob("medchat-app-*"))
        again = subprocess.run(command, env=env, text=True, capture_output=True, cwd=tmp_path)
        assert again.returncode == 2 and again.stderr.count("\n") == 1 and f"in use: {port}" in again.stderr and f"--port {port + 1}" in again.stderr
    finally:
        server.send_signal(signal.SIGINT)
        rest = server.communicate(timeout=20)[0]
    said = "".join(lines) + rest
    assert server.returncode == 0 and "Traceback" not in said and DISCLAIMER in said, said
    assert not list((tmp_path/"tmp").glob("medchat-app-*")) and not (tmp_path/"calls").exists(), (tmp_path/"calls").read_text() if (tmp_path/"calls").exists() else ""

@pytest.mark.parametrize("ended", [signal.SIGTERM, signal.SIGHUP])
def test_terminated_app_cleans_up_too(tmp_path, ended):
    (tmp_path/"tmp").mkdir()
    env = os.environ | dict(PYTHONPATH=f"{root}:{root/'tests'}", TMPDIR=str(tmp_path/"tmp"), PYTHONUNBUFFERED="1")
    code = f"""
import medchat.app as A
from test_app import Parrot
A.Chat = Parrot; Parrot.of_run = classmethod(lambda cls, run: cls())
A.app({str(make_hollow_run(tmp_path/"run"))!r}, {free_port()}, open_browser=False)"""
    server = subprocess.Popen([sys.executable, "-c", code], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in server.stdout:
        lines.append(line)
        if "http://" in line: break
    assert list((tmp_path/"tmp").glob("medchat-app-*")), lines
    server.send_signal(ended)
    rest = server.communicate(timeout=20)[0]
    assert server.returncode == 128 + ended and "Traceback" not in rest and not list((tmp_path/"tmp").glob("medchat-app-*")), rest
