"What the tests of all modules share."
import os, shutil, socket, subprocess, sys, tracemalloc
from pathlib import Path
import pytest
from hypothesis import settings

root = Path(__file__).resolve().parent.parent
settings.register_profile("medchat", deadline=None, max_examples=100, derandomize=True)
settings.load_profile("medchat")

@pytest.fixture(autouse=True, scope="session")
def offline():
    "No test reaches beyond this machine: a connection elsewhere fails as it does without a network."
    connect = socket.socket.connect
    def guarded(sock, address):
        host = address[0] if isinstance(address, tuple) else "localhost" # a unix socket
        if str(host) not in ("localhost", "::1") and not str(host).startswith("127."): raise OSError(101, f"tests stay offline, but one asked for {host}")
        return connect(sock, address)
    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()

@pytest.fixture(scope="session")
def real_data() -> Path:
    "The folder of published data sets, or a skip."
    folder = Path(os.environ.get("MEDCHAT_REAL_DATA") or "/nowhere")
    if not folder.is_dir(): pytest.skip("no real data: set MEDCHAT_REAL_DATA to a folder of published data sets")
    return folder

@pytest.fixture(scope="session")
def chromium() -> str:
    "Path of a Chromium, or a skip; under CI `make test` has made sure that there is one."
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found: return found
    if os.environ.get("CI"): pytest.fail("no Chromium, and CI skips nothing")
    pytest.skip("no Chromium: apt-get install chromium")

@pytest.fixture(scope="module")
def browser(chromium):
    "A headless Chromium that asks nobody for anything, or a skip."
    try: from playwright.sync_api import sync_playwright
    except ImportError:
        if os.environ.get("CI"): pytest.fail("no playwright, and CI skips nothing")
        pytest.skip("no playwright: pip install playwright")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, headless=True, args=flags)
        yield browser
        browser.close()

@pytest.fixture(scope="session")
def bases() -> dict[str, str]:
    "The folder of each family's tiny base."
    from medchat.core import sample_data
    from medchat.families import FAMILIES
    return {family.name: str(sample_data()/family.tiny_base) for family in FAMILIES.values() if family.tiny_base}

@pytest.fixture
def medchat(tmp_path):
    "Run `medchat` in a process of its own, in an empty folder."
    def run(*argv, cwd=tmp_path, **kw):
        code = "import sys; from medchat.cli import main; sys.exit(main())"
        env = {**os.environ, "PYTHONPATH": str(root), **kw.pop("env", {})}
        return subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=cwd, env=env, text=True, capture_output=True, **kw)
    return run

@pytest.fixture
def no_write(tmp_path) -> Path:
    "A folder in which nobody can make a file, not even root: it stands under a file."
    (tmp_path/"a_file").write_text("")
    return tmp_path/"a_file"/"folder"

@pytest.fixture
def peak_bytes():
    "Calls a function three times and gives the least peak of Python's memory, in bytes: what other threads of this process ask for meanwhile can only add to it."
    def once(work):
        tracemalloc.start()
        try: work(); return tracemalloc.get_traced_memory()[1]
        finally: tracemalloc.stop()
    return lambda work: min(once(work) for _ in range(3))
