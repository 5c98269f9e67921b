"""A chat/completions server on this machine: enough of the protocol, streaming included, for the unmodified client.

    with ChatServer(reply="A small effusion.", script=["429"]) as server: # one fault, then good answers
        RemoteEngine(server.url, "tiny") ...

`reply` is what it says: a text, or a function of the request's body. `mode` names how it behaves
(a `mode_` below), `script` names how the next requests go. `lacks` lists the options that it does
not take: "logprobs" or "response_format" (refused with `refuses_with`), "max_tokens", "temperature" (as hosted
models that think refuse them); `ignores` lists what it passes over in silence. `cut` is how the
stream is cut: "event" (one write for each event), "byte", or a number of bytes.
`server.log` lists (seconds, headers, body) of every request.

Bodies and events follow what the servers send: OpenAI (`{"error": {"message", "type", "param", "code"}}`),
vLLM (errors in a stream as `data: {"error": ...}`), llama.cpp (`{"error": {"code", "message", "type"}}`, and
until late 2025 an `error:` line in a stream), Ollama (usage with empty choices at the end).
"""
from __future__ import annotations
import json, math, re, threading, time
from email.utils import formatdate
from http.server import ThreadingHTTPServer
from judge_server import JsonHandler

def tokens_of(text): return re.findall(r"\s*\w+|\s*[^\w\s]|\s+", text)

def last_text(body): # what the last message says
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

def obey(schema, said): # a value that fits the schema, made of what the model wants to say
    if "enum" in schema: return next((c for c in schema["enum"] if said.lower().startswith(c.lower())), schema["enum"][0])
    kind = schema.get("type")
    if kind == "object": return {k: obey(s, said) for k, s in schema["properties"].items()}
    if kind == "array": return [obey(schema["items"], said)] * schema.get("minItems", 1)
    return {"string": said, "boolean": True, "integer": 1, "number": .5, "null": None}[kind]


class ChatServer:
    def __init__(self, reply="There is a small effusion.", mode="good", script=(), lacks=(), ignores=(), cut="event", alternatives=None, retry_after="0", refuses_with=400, key=None):
        self.reply, self.mode, self.script, self.lacks, self.ignores, self.cut = reply, mode, list(script), set(lacks), set(ignores), cut
        self.alternatives = alternatives or {} # token -> {other token: probability}; the token itself has what is left
        self.retry_after, self.refuses_with, self.key = retry_after, refuses_with, key
        self.log, self.lock, self.done = [], threading.Lock(), threading.Event()
        self.left = threading.Event() # a client hung up in mid-stream

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"chat": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self.url = f"http://{self.host}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": .02}, daemon=True).start()
        return self

    def __exit__(self, *_): self.done.set(); self.server.shutdown(); self.server.server_close()

    def next_mode(self):
        with self.lock: return self.script.pop(0) if self.script else self.mode

    @property
    def bodies(self): return [body for *_, body in self.log]

    def text(self, body): # what is said to a request
        said = self.reply(body) if callable(self.reply) else self.reply
        form = body.get("response_format")
        return json.dumps(obey(form["json_schema"]["schema"], said), ensure_ascii=False) if form and "response_format" not in self.ignores else said

    def logprobs(self, token, n): # as `choices[0].logprobs` of one token
        others = self.alternatives.get(token.strip(), {})
        row = lambda t, p: dict(token=t, logprob=math.log(p) if p else -9999., bytes=list(t.encode()))
        mine = row(token, 1 - sum(others.values()) if others else .9)
        tops = sorted([mine, *(row(t, p) for t, p in others.items())], key=lambda r: -r["logprob"])[:n]
        return dict(content=[{**mine, "top_logprobs": tops}], refusal=None)


class _Handler(JsonHandler):
    def fail(self, status, message, kind="invalid_request_error", **headers):
        self.send(status, json.dumps(dict(error=dict(message=message, type=kind, param=None, code=status))), **headers)

    def do_POST(self):
        chat = self.chat
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with chat.lock: chat.log.append((time.monotonic(), dict(self.headers), body))
        if self.path.split("?")[0] != "/v1/chat/completions": return self.fail(404, "no such page")
        if chat.key and self.headers.get("Authorization") != f"Bearer {chat.key}": return self.fail(401, f"Incorrect API key provided: {self.headers.get('Authorization')}", "authentication_error")
        if refused := self.refusal(body): return self.fail(chat.refuses_with, refused)
        try: getattr(self, "mode_" + chat.next_mode())(body)
        except (BrokenPipeError, ConnectionResetError): chat.left.set(); self.close_connection = True # the client has gone

    def refusal(self, body): # words of the servers: OpenAI's thinking models, vLLM, llama.cpp
        lacks = self.chat.lacks
        if "logprobs" in lacks and body.get("logprobs"): return "You are not allowed to request logprobs from this model"
        if "response_format" in lacks and "response_format" in body: return 'response_format type must be one of "text" or "json_object", but got: json_schema'
        if "max_tokens" in lacks and "max_tokens" in body: return "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        if "temperature" in lacks and "temperature" in body: return "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
        if "all" in lacks: return "invalid request" # names nothing
        if body.get("top_logprobs", 0) > 20: return "top_logprobs must be between 0 and 20"

    # ---- a stream
    def begin(self):
        self.send_response(200); self.send_header("Content-Type", "text/event-stream; charset=utf-8"); self.send_header("Transfer-Encoding", "chunked"); self.end_headers()

    def chunk(self, data):
        if data: self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data)); self.wfile.flush()

    def put(self, text): # cut as the server cuts
        data, n = text.encode(), {"event": 10**9, "byte": 1}.get(self.chat.cut, self.chat.cut)
        for i in range(0, len(data), n): self.chunk(data[i:i+n])

    def end(self): self.wfile.write(b"0\r\n\r\n"); self.wfile.flush()

    def event(self, body, token=None, end="\n\n", **choice):
        row = dict(index=0, delta={} if token is None else dict(content=token), logprobs=None, finish_reason=None, **choice) if "finish_reason" not in choice else dict(index=0, delta={}, logprobs=None, **choice)
        if token is not None and body.get("logprobs") and "logprobs" not in self.chat.ignores: row["logprobs"] = self.chat.logprobs(token, body.get("top_logprobs", 0))
        self.put("data: " + json.dumps(dict(id="chatcmpl-1", object="chat.completion.chunk", created=1, model=body["model"], choices=[row]), ensure_ascii=False) + end)

    def tokens(self, body): return tokens_of(self.chat.text(body))[:body.get("max_tokens") or body.get("max_completion_tokens")]

    def mode_good(self, body, tokens=None, end="\n\n", pause=0.):
        self.begin()
        for token in self.tokens(body) if tokens is None else tokens:
            self.event(body, token, end)
            if pause and self.chat.done.wait(pause): return
        self.event(body, finish_reason="stop")
        self.put('data: {"object": "chat.completion.chunk", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 9}}\n\n')
        self.put("data: [DONE]\n\n"); self.end()

    def mode_crlf(self, body): self.mode_good(body, end="\r\n\r\n")
    def mode_comments(self, body): # OpenRouter's and llama.cpp's signs of life
        self.begin()
        for token in self.tokens(body): self.put(": PROCESSING\n\n:\n\nevent: message\nid: 7\nretry: 10\n"); self.event(body, token)
        self.event(body, finish_reason="stop"); self.put("data: [DONE]\n\n"); self.end()
    def mode_slow(self, body): self.mode_good(body, pause=.05)
    def mode_endless(self, body):
        self.begin()
        while not self.chat.done.is_set(): self.event(body, "more "*200)
    def mode_endless_line(self, body):
        self.begin()
        while not self.chat.done.is_set(): self.put("data: " + "x"*65536)
    def mode_silent(self, body): # signs of life, and never a word
        self.begin()
        while not self.chat.done.wait(.02): self.put(": still here\n\n")
    def mode_hang(self, body): self.chat.done.wait(30); self.close_connection = True
    def mode_half_hang(self, body): # some words, then nothing more
        self.begin()
        for token in self.tokens(body)[:2]: self.event(body, token)
        while not self.chat.done.wait(.02): self.connection.settimeout(.001); self.look() # does the client leave?
    def look(self):
        try: gone = not self.connection.recv(1)
        except TimeoutError: return
        if gone: raise BrokenPipeError
    def mode_drop(self, body): # dies in mid-stream
        self.begin()
        for token in self.tokens(body)[:2]: self.event(body, token)
        self.put('data: {"choices": [{"del'); self.close_connection = True
    def mode_fade(self, body): # ends in good order, but never said that the reply is whole
        self.begin()
        for token in self.tokens(body)[:2]: self.event(body, token)
        self.end()
    def mode_stream_error(self, body): # vLLM, and llama.cpp since late 2025
        self.begin(); self.event(body, self.tokens(body)[0])
        self.put('data: {"error": {"message": "EngineCore encountered an issue", "type": "InternalServerError", "param": null, "code": 500}}\n\ndata: [DONE]\n\n'); self.end()
    def mode_error_line(self, body): # llama.cpp until late 2025
        self.begin(); self.put('error: {"code":400,"message":"the request exceeds the available context size","type":"invalid_request_error"}\n\n'); self.end()
    def mode_garbage(self, body): self.begin(); self.put("data: {not json\n\n"); self.end()
    def mode_odd(self, body): self.begin(); self.put('data: {"choices": "none"}\n\ndata: [1]\n\ndata: {"choices": [{"delta": {"content": 5}}]}\n\n'); self.end()
    def mode_whole(self, body): # passes "stream" over
        row = dict(index=0, finish_reason="stop", message=dict(role="assistant", content=self.chat.text(body)))
        self.send(200, json.dumps(dict(id="1", object="chat.completion", choices=[row])))
    def mode_reasoning(self, body): # a thought in a field of its own: vLLM, Ollama
        self.begin()
        self.put('data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "", "reasoning_content": "Let me think."}}]}\n\ndata: {"choices": [{"index": 0, "delta": {"content": null, "reasoning": "Hm."}}]}\n\n')
        for token in self.tokens(body): self.event(body, token)
        self.event(body, finish_reason="stop"); self.put("data: [DONE]\n\n"); self.end()

    # ---- faults
    def mode_429(self, body): self.fail(429, "slow down", "rate_limit_error", Retry_After=self.chat.retry_after)
    def mode_429_date(self, body): self.fail(429, "slow down", Retry_After=formatdate(time.time() + 2, usegmt=True))
    def mode_500(self, body): self.fail(500, "out of order", "server_error")
    def mode_503(self, body): self.send(503, "<html>bad gateway</html>", Content_Type="text/html")
    def mode_400(self, body): self.fail(400, "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens")
    def mode_401(self, body): self.fail(401, f"wrong key: {self.headers.get('Authorization')}")
    def mode_404(self, body): self.fail(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
    def mode_302(self, body): self.send(302, "", Location=self.chat.url + "/elsewhere")
    def mode_page(self, body): self.send(200, "<html>Welcome to the hotel's network</html>", Content_Type="text/html")
    def mode_error_200(self, body): self.send(200, '{"error": {"message": "no provider is there", "code": 502}}')
    def mode_flood(self, body): # an error that never ends
        self.send_response(500); self.send_header("Content-Length", str(10**12)); self.end_headers()
        while not self.chat.done.is_set(): self.wfile.write(b" "*65536)
