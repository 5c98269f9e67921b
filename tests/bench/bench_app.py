"""Many visitors of the chat page at once, on a tiny base: mixed-up conversations, time to first token, memory, and visitors that vanish.

python tests/bench/bench_app.py [--clients 50] [--seconds 180] [--turns 4] [--vanish 20] [--base tiny-qwen2-vl]

The page is served by a process of its own. Each client is a thread with a session, a film of shapes that nobody else has, and the HTTP that Gradio's script speaks: it uploads its film,
asks --turns questions one after the other in one conversation, compares each answer, letter by letter, with what the same engine said about that film and that history beforehand, clears, and begins again.
Time to first token runs from pressing Send to the first words other than "…", so it holds the wait in the queue: one answer is written at a time. Then --vanish clients hang up in mid-answer, and a last one asks.
"""
import argparse, html, http.client, json, os, secrets, socket, subprocess, sys, tempfile, threading, time
from collections import Counter
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

QUESTIONS = ["What is in the left upper area?", "How many shapes are there?", "And what is in the right lower area?", "Describe the image.", "What is in the right upper area?", "Is there a circle?"]

def make_desk(base):
    "What the visitors share, here and in the server."
    from medchat.engines import LocalEngine
    from medchat.models import load_model
    from medchat.session import Desk
    return Desk([LocalEngine(*load_model(base), base)], per_minute=10**6, max_new_tokens=32)

def serve(port, base):
    "The server's process, until its standard input is closed."
    from medchat.app import build_page
    from medchat.server import at_home, launch_page
    with at_home():
        page = build_page(make_desk(base), "bench")
        launch_page(page, port)
        print("ready", flush=True)
        sys.stdin.read()
        page.close(verbose=False)

def expected_answers(desk, film, turns):
    "What one visitor alone is told about a film, turn by turn, as the page shows it."
    from medchat.session import Session
    from medchat.tabs import turn_text
    tab = Session(desk)
    tab.look(film)
    said = []
    for k in range(turns):
        tab.ask(QUESTIONS[k % len(QUESTIONS)])
        said.append(html.escape(turn_text(list(tab.answer())[-1]), quote=False))
    return said


class Visitor:
    "A tab of the page, without a browser."
    def __init__(self, port):
        self.port, self.session = port, secrets.token_hex(8)
        config = self.call("GET", "/config")
        parts = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
        deps = config["dependencies"]
        on = lambda part, event: next(d for d in deps if [parts[part], event] in [list(t) for t in d["targets"]])
        self.look, self.send, self.clear = on("image", "upload"), on("send", "click"), on("clear", "click")
        self.answer = next(d for d in deps if d.get("trigger_after") == self.send["id"])
        self.values = {parts["language"]: "en", parts["together"]: False}
        self.image, self.question = parts["image"], parts["question"]

    def call(self, method, path, body=None, kind="application/json"):
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            line.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body), {"Content-Type": kind})
            reply = line.getresponse()
            text = reply.read()
            if reply.status != 200: raise RuntimeError(f"{path}: {reply.status} {text[:200]}")
            return json.loads(text)
        finally: line.close()

    def body(self, event, values): return dict(fn_index=event["id"], session_hash=self.session, data=[{**self.values, **values}.get(i) for i in event["inputs"]])
    def press(self, event, values={}): return self.call("POST", "/gradio_api/run/predict", self.body(event, values))["data"]

    def upload(self, data):
        mark = secrets.token_hex(8)
        body = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="film.png"\r\nContent-Type: image/png\r\n\r\n'.encode() + data + f"\r\n--{mark}--\r\n".encode()
        path = self.call("POST", "/gradio_api/upload", body, f"multipart/form-data; boundary={mark}")[0]
        self.press(self.look, {self.image: dict(path=path, meta={"_type": "gradio.FileData"})})

    def listen(self): # an open line on which the server tells how the answer goes on
        self.call("POST", "/gradio_api/queue/join", self.body(self.answer, {}))
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        line.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
        return line, line.getresponse()

    def ask(self, question):
        "(the whole answer, seconds to its first words, seconds to its end)."
        start, first, said = time.perf_counter(), None, None
        notice = self.press(self.send, {self.question: question})[2]
        if notice: raise RuntimeError(notice)
        line, reply = self.listen()
        try:
            for text in reply:
                if not text.startswith(b"data: "): continue
                event = json.loads(text[6:])
                if event["msg"] == "process_generating" and first is None and words_in(event["output"]): first = time.perf_counter() - start
                if event["msg"] == "process_completed":
                    if not event["success"]: raise RuntimeError(str(event["output"])[:200])
                    said = event["output"]["data"][1]["value"][-1]["content"][0]["text"]
                    break
        finally: reply.close(); line.close()
        end = time.perf_counter() - start
        return said, first or end, end

def words_in(output): # does this piece of news hold words of the answer? whole values at first, then what changed
    talk = output["data"][1]
    if isinstance(talk, dict): return talk.get("value", [{}])[-1].get("content", [{"text": "…"}])[0]["text"] != "…"
    return any(change[1][-1] == "text" for change in talk)


def visit(port, film, wanted, until, results, lock):
    "One client's work until the time is over."
    try: tab = Visitor(port); tab.upload(film)
    except Exception as e:
        with lock: results.append(("error", f"{type(e).__name__}: {e}"[:200], 0, 0))
        return
    while time.monotonic() < until:
        try:
            for k, right in enumerate(wanted):
                if time.monotonic() >= until: break
                said, first, end = tab.ask(QUESTIONS[k % len(QUESTIONS)])
                with lock: results.append(("good" if said == right else "mixed up", f"{said!r} instead of {right!r}", first, end))
            tab.press(tab.clear)
        except Exception as e:
            with lock: results.append(("error", f"{type(e).__name__}: {e}"[:200], 0, 0))
            time.sleep(1)
            tab.press(tab.clear)

def memory(pid, what="VmRSS"): # MB
    return next(int(l.split()[1]) / 1024 for l in Path(f"/proc/{pid}/status").read_text().splitlines() if l.startswith(what))

def vanish(port, film):
    "Press Send, wait until the server has the question, and hang up."
    tab = Visitor(port)
    tab.upload(film)
    tab.press(tab.send, {tab.question: QUESTIONS[0]})
    line, reply = tab.listen()
    line.sock and line.sock.shutdown(socket.SHUT_RDWR)
    reply.close(); line.close()

def report(results, seconds, before, warm, after, peak):
    kinds = Counter(kind for kind, *_ in results)
    first, end = ([r[k] for r in results if r[0] != "error"] or [0, 0] for k in (2, 3))
    q = lambda v: f"p50 {median(v):.2f} s, p95 {quantiles(v, n=20)[-1]:.2f} s, longest {max(v):.2f} s"
    print(f"answers: {kinds['good']} right, {kinds['mixed up']} mixed up, {kinds['error']} errors; {len(first) / seconds:.1f} a second")
    print(f"time to first token: {q(first)}\ntime to the whole answer: {q(end)}")
    print(f"memory of the server: {before:.0f} MB at first, {warm:.0f} MB at half time, {after:.0f} MB at the end, {peak:.0f} MB at most")
    for kind, what, *_ in [r for r in results if r[0] != "good"][:5]: print(f"  {kind}: {what}")
    return kinds["mixed up"] + kinds["error"]

def load(port, films, wanted, seconds, pid):
    "All clients at once; their results, and the memory at half time."
    results, lock, until = [], threading.Lock(), time.monotonic() + seconds
    threads = [threading.Thread(target=visit, args=(port, film, right, until, results, lock)) for film, right in zip(films, wanted)]
    for t in threads: t.start()
    time.sleep(seconds / 2)
    warm = memory(pid)
    for t in threads: t.join()
    return results, warm

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--clients", type=int, default=50)
    p.add_argument("--seconds", type=float, default=180)
    p.add_argument("--turns", type=int, default=4, help="questions in one conversation")
    p.add_argument("--vanish", type=int, default=20, help="clients that hang up in mid-answer")
    p.add_argument("--base", default="tiny-qwen2-vl")
    p.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.serve: return serve(a.serve, a.base)
    import numpy as np
    from PIL import Image
    from medchat.shapes import draw_shapes
    with tempfile.TemporaryDirectory() as place:
        paths = [Path(place)/f"{k}.png" for k in range(a.clients)]
        for k, path in enumerate(paths): Image.fromarray(draw_shapes(np.random.default_rng(k))[0]).convert("RGB").save(path)
        desk, films = make_desk(a.base), [path.read_bytes() for path in paths]
        wanted = [expected_answers(desk, path, a.turns) for path in paths]
        print(f"{a.clients} clients, {a.seconds:.0f} s, {a.base}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {len({tuple(w) for w in wanted})} different conversations of {a.turns} turns", flush=True)
        with socket.create_server(("127.0.0.1", 0)) as s: port = s.getsockname()[1]
        with subprocess.Popen([sys.executable, __file__, "--serve", str(port), "--base", a.base], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout.readline().strip() == "ready", "the server did not start"
                tab = Visitor(port); tab.upload(films[0]); tab.ask(QUESTIONS[0])
                before, start = memory(server.pid), time.monotonic()
                results, warm = load(port, films, wanted, a.seconds, server.pid)
                bad = report(results, time.monotonic() - start, before, warm, memory(server.pid), memory(server.pid, "VmHWM"))
                for k in range(a.vanish): vanish(port, films[k % len(films)])
                tab = Visitor(port); tab.upload(films[0])
                said, first, end = tab.ask(QUESTIONS[0])
                print(f"after {a.vanish} clients that hung up in mid-answer: {'right' if said == wanted[0][0] else 'WRONG'}, first words after {first:.2f} s")
            finally:
                server.stdin.close()
                try: server.wait(30)
                except subprocess.TimeoutExpired: server.kill()
    sys.exit(bool(bad or said != wanted[0][0]))

if __name__ == "__main__": main()
