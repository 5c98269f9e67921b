"The dashboard: one answer with its image, the page in a headless Chromium, and the command."
import json, os, re, shutil, signal, socket, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import given, strategies as st

from medchat.server import at_home, launch_page
from medchat.core import DISCLAIMER, MedchatError, write_jsonl
from medchat.dashboard import *
from medchat.overview import COLUMNS, RunFiles, compare_evals, read_answers, read_runs, same_questions, slice_figure
from browser_tab import BrowserTab
from eval_maker import by_name, evil, make_answers, make_bare_run, make_eval, make_runs

root = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return make_runs(tmp_path_factory.mktemp("ada"))

@pytest.fixture
def runs(folder): return read_runs(folder)


# --- what changes, and what may be compared

def test_the_fingerprint_sees_every_kind_of_change(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"runs")
    seen = {fingerprint(tmp_path/"runs")}
    for change in (lambda r: (r/"first"/"log.jsonl").open("a").write("{}\n"), lambda r: make_eval(r/"young"), lambda r: (r/"young"/"feedback.jsonl").write_text("{}\n"), lambda r: make_bare_run(r/"new"), lambda r: shutil.rmtree(r/"second")):
        change(tmp_path/"runs")
        assert (now := fingerprint(tmp_path/"runs")) not in seen
        seen.add(now)
    assert fingerprint(tmp_path/"runs") in seen and fingerprint(tmp_path/"nowhere") == ""

def test_different_data_is_refused(runs):
    r = by_name(runs)
    with pytest.raises(MedchatError, match=r"different data.*Evaluate both on one"): compare_evals((r["first"], "test"), (r["group/<b>third"], "test"))
    with pytest.raises(MedchatError, match="different data"): slice_figure({"a": r["first"].evals["test"], "b": r["group/<b>third"].evals["test"]})
    with pytest.raises(MedchatError, match="with itself"): compare_evals((r["first"], "test"), (r["first"], "test"))
    with pytest.raises(MedchatError, match="does not say"): same_questions([dict(data_sha256="a"), {}])
    notice, figure, *_ = draw_slices(runs, ["first: test", "group/<b>third: test"], "type", "closed_accuracy")
    assert figure is None and "different data" in notice and str(r["first"].path.parent) not in notice
    assert "different data" in pair_words(runs, "first: test", "group/<b>third: test") and "Choose two" in pair_words(runs, "first: test", "nothing")

def test_menus_of_slices_keep_what_was_chosen(runs):
    assert draw_slices(runs, ["first: test"], "modality", "closed_accuracy")[2:] == ((["type", "modality"], "modality"), (["closed_accuracy"], "closed_accuracy"))
    assert draw_slices(runs, ["first: test"], "organ", "gone")[2:] == ((["type", "modality"], "type"), (["closed_accuracy"], "closed_accuracy")) and draw_slices(runs, None, None, None) == ("", None, ([], None), ([], None))


# --- one answer

@given(st.text(), st.text())
def test_everything_said_is_text(said, asked):
    shown = answer_html(dict(id=said, question=asked, reference=evil, base=said, tuned=evil, types=[said], slices=dict(x=evil), ablated={said: dict(reply=evil)}, score=said))
    assert not re.search(r"<(?!/?(div|i|p)\b)[a-z!/?]", re.sub(r"<(div|p) class=(['\"])[a-z -]+\2>", "<div>", shown), re.I)

def test_images_of_an_answer(runs, folder, tmp_path):
    first = by_name(runs)["first"]
    rows, _ = read_answers(first, "test")
    images, why = answer_images(runs, first.evals["test"], rows[2])
    assert [i.size for i in images] == [(66, 64)] and images[0].getpixel((9, 9)) == (80, 0, 0) and why == ""
    for result, row, said in ((dict(first.evals["test"], data_sha256="0"*64), rows[2], "not on this machine"), (first.evals["test"], dict(rows[2], id="other"), "no such question"), (dict(first.evals["test"], split="exam"), rows[2], "no such split")):
        images, why = answer_images(runs, result, row)
        assert images == [] and said in why and str(folder.parent) not in why
    assert find_data([], "0"*64) is None

def test_data_is_found_beside_the_runs_too(runs, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    sha = by_name(runs)["first"].evals["test"]["data_sha256"]
    assert find_data([RunFiles("x", folder/"first", dict(data="scans"))], sha) == folder.parent/"scans"


# --- bad input

def test_folders_that_cannot_be_shown(tmp_path):
    (tmp_path/"file").write_text(""); (tmp_path/"empty").mkdir()
    for name, said in (("nowhere", "no such folder"), ("file", "not a folder"), ("empty", "no runs in this folder.*medchat train")):
        with pytest.raises(MedchatError, match=said) as e: dashboard(str(tmp_path/name))
        assert "\n" not in str(e.value)

def test_ports(folder):
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        with pytest.raises(MedchatError, match=f"in use: {port}.*--port {port + 1}"): dashboard(str(folder), port=port)
        assert port < choose_port(None, first=port) < port + 20
    for port in (0, 70_000):
        with pytest.raises(MedchatError, match="not a port"): choose_port(port)


# --- in the browser

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]

@pytest.fixture
def served(folder, tmp_path):
    "A page over a copy of the runs."
    shutil.copytree(folder, tmp_path/"runs")
    with at_home():
        page = build_dashboard(tmp_path/"runs", every=.5)
        yield launch_page(page, free_port()), tmp_path/"runs"
        page.close(verbose=False)

class Tab(BrowserTab):
    "A browser tab on the page, and what a person does in it."
    def __init__(self, browser, address, width=1400, height=900): super().__init__(browser, address, "#runs [role=gridcell]", width, height)
    def check(self):
        assert self.page.title() == "runs - medchat dashboard" and self.page.locator(".toast-body.error").count() == 0
        super().check()
    def go(self, name):
        tab = self.page.get_by_role("tab", name=name)
        if tab.is_visible(): tab.click()
        else: self.page.locator(".overflow-menu > button").click(); self.page.locator(".overflow-dropdown button", has_text=name).click()
    def cells(self, table): return [t.strip() for t in self.page.locator(f"#{table} [role=gridcell]").all_inner_texts()]
    def rows(self, table, width): return [c[:width] for c in (lambda all: [all[i:i + width] for i in range(0, len(all), width)])(self.cells(table))]
    def wait(self, selector, text): self.page.wait_for_function("([s, t]) => [...document.querySelectorAll(s)].some(e => e.innerText.includes(t))", arg=[selector, text])
    def sort(self, column, order):
        head = self.page.locator("#runs [role=columnheader]", has_text=column).first
        head.hover(); head.locator("button.cell-menu-button").click()
        self.page.get_by_text(f"Sort {order}").click()
        self.page.wait_for_timeout(300)
    def choose(self, menu, text, clear=False):
        while clear and self.page.locator(f"#{menu} .token-remove:not(.remove-all)").count(): self.page.locator(f"#{menu} .token-remove:not(.remove-all)").first.click()
        self.page.click(f"#{menu} input")
        self.page.locator("[role=option]", has_text=text).first.click()
        self.page.keyboard.press("Escape")

def test_the_page_shows_all_runs_and_sorts(browser, served):
    with Tab(browser, served[0]) as tab:
        width = len(COLUMNS)
        assert [(r[0], r[2], r[9]) for r in tab.rows("runs", width)] == [("first", "A", "0.667 (0.57-0.77)"), ("group/<b>third", "B", "1.000 (0.90-1.00)"), ("second", "A", "0.833 (0.73-0.93)"), ("young", "", "")]
        tab.wait("#legend", "B: scans (bbbbbbbb), test"); tab.wait("#troubles", "cut: config.json is damaged")
        assert str(served[1].parent) not in tab.page.content() and DISCLAIMER in tab.page.inner_text("#draft")
        for column, at in (("closed, tuned", 9), ("validation loss", 6)):
            tab.page.reload(); tab.page.wait_for_selector("#runs [role=gridcell]") # two columns would sort together
            for order in ("ascending", "descending"):
                tab.sort(column, order)
                shown = [r[at] for r in tab.rows("runs", width) if r[at]]
                assert len(shown) >= 3 and shown == sorted(shown, key=lambda t: float(t.split()[0]), reverse=order == "descending"), shown

def test_choosing_a_run_shows_its_curve_and_its_answers(browser, served):
    with Tab(browser, served[0]) as tab:
        tab.sort("validation loss", "descending") # the row that is clicked is no longer the one at that place
        assert [r[0] for r in tab.rows("runs", len(COLUMNS))][1] != "group/<b>third"
        tab.page.locator("#runs [role=gridcell]", has_text="second").first.click()
        tab.wait("#chosen", "second: test")
        tab.go("Curves")
        tab.page.wait_for_selector("#curve img")
        assert tab.page.locator("#curve_runs .token").all_inner_texts() == ["second"]
        picture = tab.page.get_attribute("#curve img", "src")
        tab.choose("curve_runs", "first")
        tab.page.wait_for_function("old => document.querySelector('#curve img').src != old", arg=picture)
        tab.go("Answers")
        assert tab.page.input_value("#eval input").startswith("second: test")
        tab.wait("#count", "6 of 6 answers")

def test_one_answer_with_its_image_and_a_script_that_stays_text(browser, served):
    with Tab(browser, served[0]) as tab:
        tab.go("Answers")
        tab.wait("#count", "6 of 6 answers")
        assert tab.rows("answers", 7)[0][4] == evil and tab.page.locator("#answers img, #answers script, #answers b, #answers a, #answers strong").count() == 0
        tab.page.locator("#answers [role=gridcell]", has_text="lesion 0").click()
        tab.page.wait_for_selector("#images img")
        card = tab.page.inner_text("#answer")
        assert all(t in card for t in (evil, "blind reply", "confidence 0.90", "closed accuracy", "CT")) and tab.page.locator("#answer img, #answer script, #answer strong, #answer a").count() == 0
        assert tab.page.evaluate("document.querySelector('#images img').naturalWidth") == 64
        tab.page.locator("#answers [role=gridcell]", has_text="lesion 3").click()
        tab.wait("#answer", "lesion 3")
        tab.page.wait_for_function("() => document.querySelector('#images img')?.naturalWidth == 67")
        tab.choose("show", "wrong")
        tab.wait("#count", "2 of 6 answers")
        assert [r[0] for r in tab.rows("answers", 7)] == ["2", "5"] and tab.page.inner_text("#answer").strip() == ""
        tab.page.fill("#text textarea, #text input", "lesion 4")
        tab.wait("#count", "1 of 6 answers")
        tab.page.locator("#answers [role=gridcell]", has_text="lesion 4").click()
        tab.wait("#answer", "lesion 4")

def test_no_image_where_the_data_is_gone(browser, served):
    with Tab(browser, served[0]) as tab:
        tab.page.locator("#runs [role=gridcell]", has_text="third").first.click()
        tab.wait("#chosen", "third")
        tab.go("Answers"); tab.wait("#count", "6 of 6")
        tab.page.wait_for_function("() => document.querySelector('#eval input').value.includes('third')")
        tab.page.locator("#answers [role=gridcell]", has_text="lesion 0").click()
        tab.wait("#answer", "not on this machine")
        assert tab.page.locator("#images img").count() == 0

def test_slices_and_pairs_of_different_data_are_refused(browser, served):
    with Tab(browser, served[0]) as tab:
        tab.go("Slices")
        tab.page.wait_for_selector("#slices img")
        tab.wait("#paired", "second: test minus first: test"); tab.wait("#paired", "+16.7")
        tab.choose("second", "third")
        tab.wait("#paired", "different data")
        tab.choose("slice_evals", "third")
        tab.wait("#slice_notice", "different data")
        assert tab.page.locator("#slices img").count() == 0

def test_a_running_training_and_new_thumbs_appear(browser, served):
    address, runs = served
    with Tab(browser, address) as tab:
        assert "9" not in [r[5] for r in tab.rows("runs", len(COLUMNS))]
        with open(runs/"young"/"log.jsonl", "a") as f: f.write('{"step": 9, "loss": 2.5}\n{"step": 9, "eval_loss": 2.25}\n{"step": 10, "lo')
        tab.page.wait_for_function("() => [...document.querySelectorAll('#runs [role=gridcell]')].some(e => e.innerText.trim() == '2.25')")
        tab.wait("#troubles", "young: log.jsonl: 1 line cannot be read")
        make_bare_run(runs/"newborn", (7.,))
        tab.wait("#runs [role=gridcell]", "newborn")
        tab.go("Thumbs"); tab.wait("#liked_notice", "Nobody has pressed")
        write_jsonl(runs/"first"/"feedback.jsonl", [dict(time="2026-11-23T10:00:00+00:00", liked=True)]*3)
        tab.wait("#liked [role=gridcell]", "1.000 (0.44-1.00)")
        shutil.rmtree(runs)
        tab.go("Runs"); tab.wait("#troubles", "cannot be read any more")

def test_an_answer_of_a_file_that_changed_is_not_taken_for_another(browser, served):
    address, runs = served
    with Tab(browser, address) as tab:
        tab.go("Answers"); tab.wait("#count", "6 of 6")
        write_jsonl(runs/"first"/"eval"/"test.jsonl", make_answers((0, 1))[::-1])
        tab.page.locator("#answers [role=gridcell]", has_text="lesion 1").click()
        tab.wait("#answer", "This answer is gone")
        tab.go("Runs"); tab.page.click("#again"); tab.go("Answers"); tab.wait("#count", "2 of 2")

@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window(browser, served, width):
    with Tab(browser, served[0], width, 800) as tab:
        for name, part in (("Runs", "#runs"), ("Curves", "#curve img"), ("Slices", "#slices img"), ("Answers", "#answers"), ("Thumbs", "#liked_notice")):
            tab.go(name)
            tab.page.wait_for_selector(part)
            box = tab.page.locator(part).bounding_box()
            assert tab.page.evaluate("document.documentElement.scrollWidth") <= width and box["x"] >= 0 and box["x"] + box["width"] <= width, (name, box)

def test_no_other_files_and_no_other_hosts(served, folder):
    import http.client
    def fetch(path, host=None):
        c = http.client.HTTPConnection(*served[0].removeprefix("http://").split(":"), timeout=10)
        c.request("GET", path, headers={"Host": host or served[0].removeprefix("http://")})
        r = c.getresponse()
        return r.status, r.getheader("content-security-policy")
    assert fetch("/")[0] == 200 and "default-src 'self'" in fetch("/")[1] and fetch("/", "evil.example")[0] == 403
    for path in ("/etc/passwd", served[1]/"first"/"config.json", served[1]/"first"/"eval"/"test.jsonl", folder.parent/"src"/"p0.png"): assert fetch(f"/gradio_api/file={path}")[0] in (403, 404), path


# --- the command

def test_the_command_serves_and_ends(folder, tmp_path):
    (tmp_path/"tmp").mkdir()
    env = os.environ | dict(PYTHONPATH=str(root), TMPDIR=str(tmp_path/"tmp"), PYTHONUNBUFFERED="1")
    server = subprocess.Popen([sys.executable, "-c", f"from medchat.dashboard import dashboard; dashboard({str(folder)!r}, {free_port()}, open_browser=False)"], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in server.stdout:
        lines.append(line)
        if "http://127.0.0.1" in line: break
    assert "5 runs of runs at" in lines[-1] and list((tmp_path/"tmp").glob("medchat-app-*"))
    server.send_signal(signal.SIGINT)
    rest = server.communicate(timeout=20)[0]
    assert server.returncode == 0 and "Traceback" not in rest and DISCLAIMER in "".join(lines) and not list((tmp_path/"tmp").glob("medchat-*")), rest
