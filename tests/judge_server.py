"""A small judge on this machine: enough of the chat/completions protocol for the unmodified client.

    with JudgeServer(script=["429", "500"]) as server: # two faults, then good answers
        judge_replies(..., url=server.url, ...)

The good judge counts the words that an answer shares with the facts, and gives whatever stands
first `bias` points more. `script` names what the next requests get (a mode each), `mode` what all
others get. `server.log` lists (seconds, headers, body) of every request.
"""
from __future__ import annotations
import json, re, threading, time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def words(text): return set(re.findall(r"\w+", text.lower()))
def told(body): # the JSON object at the end of the question
    text = body["messages"][-1]["content"]
    return json.JSONDecoder().raw_decode(text[text.index("\n\n{") + 2:])[0]


class JudgeServer:
    def __init__(self, mode="good", script=(), bias=1, retry_after="0", slow=0., key=None):
        self.mode, self.script, self.bias, self.retry_after, self.slow, self.key = mode, list(script), bias, retry_after, slow, key
        self.log, self.lock, self.done = [], threading.Lock(), threading.Event()
        self.good_for = None # answers well so many times, then as `mode` says

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"judge": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": .02}, daemon=True).start()
        return self

    def __exit__(self, *_): self.done.set(); self.server.shutdown(); self.server.server_close()

    def next_mode(self):
        with self.lock:
            if self.script: return self.script.pop(0)
            if self.good_for is None: return self.mode
            self.good_for -= 1
            return "good" if self.good_for >= 0 else self.mode

    def scores(self, body):
        row = told(body)
        share = lambda text: len(words(text) & words(row["facts"])) / max(1, len(words(row["facts"])))
        return 1 + round(6*share(row["A"])) + self.bias, 1 + round(6*share(row["B"]))


class JsonHandler(BaseHTTPRequestHandler):
    "Answers with JSON, and says nothing in the terminal."
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass

    def send(self, status, text, **headers):
        data = text.encode()
        self.send_response(status)
        for k, v in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items(): self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        self.wfile.write(data)


class _Handler(JsonHandler):
    def say(self, content): self.send(200, json.dumps(dict(id="0", object="chat.completion", choices=[dict(index=0, finish_reason="stop", message=dict(role="assistant", content=content))])))
    def fail(self, status, message, **headers): self.send(status, json.dumps(dict(error=dict(message=message, type="x"))), **headers)

    def do_POST(self):
        judge = self.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock: judge.log.append((time.monotonic(), dict(self.headers), body))
        if judge.slow: time.sleep(judge.slow)
        if self.path.split("?")[0] != "/v1/chat/completions": return self.fail(404, "no such page")
        if judge.key and self.headers.get("Authorization") != f"Bearer {judge.key}": return self.fail(401, f"wrong key: {self.headers.get('Authorization')}")
        try: getattr(self, "mode_" + judge.next_mode())(judge, body)
        except (BrokenPipeError, ConnectionResetError): self.close_connection = True # the client has left

    def mode_good(self, judge, body): a, b = judge.scores(body); self.say(f"A: {a}, B: {b}\nBy the facts.")
    def mode_even(self, judge, body): self.say("A: 5, B: 5")
    def mode_echo_key(self, judge, body): self.say(f"A: 5, B: 5\nYou sent {self.headers.get('Authorization')}")
    def mode_nonsense(self, judge, body): self.say("Both answers are lovely, number 1 even more so.")
    def mode_out_of_range(self, judge, body): self.say("A: 95, B: 0")
    def mode_null(self, judge, body): self.say(None)
    def mode_429(self, judge, body): self.fail(429, "slow down", Retry_After=judge.retry_after)
    def mode_429_date(self, judge, body): self.fail(429, "slow down", Retry_After=formatdate(time.time() + 2, usegmt=True))
    def mode_500(self, judge, body): self.fail(500, "out of order")
    def mode_503(self, judge, body): self.send(503, "<html>bad gateway</html>")
    def mode_401(self, judge, body): self.fail(401, f"wrong key: {self.headers.get('Authorization')}")
    def mode_418(self, judge, body): self.fail(418, "a teapot")
    def mode_400(self, judge, body): self.fail(400, "too long for this model")
    def mode_302(self, judge, body): self.send(302, "", Location=judge.url + "/elsewhere")
    def mode_truncated(self, judge, body): self.send(200, '{"choices": [{"message": {"role": "assistant", "content": "A: 8, B:')
    def mode_page(self, judge, body): self.send(200, "<html>Welcome to the hotel's network</html>")
    def mode_hang(self, judge, body): judge.done.wait(30); self.close_connection = True
    def mode_drip(self, judge, body): # a byte now and then, for ever
        self.send_response(200); self.send_header("Content-Length", "999999"); self.end_headers()
        while not judge.done.wait(.05): self.wfile.write(b" ")
    def mode_endless(self, judge, body):
        self.send_response(200); self.send_header("Content-Length", str(10**12)); self.end_headers()
        while not judge.done.is_set(): self.wfile.write(b" "*65536)
    def mode_drop(self, judge, body): # hangs up in the middle of the answer
        self.send_response(200); self.send_header("Content-Length", "500"); self.end_headers(); self.wfile.write(b'{"choi'); self.close_connection = True
