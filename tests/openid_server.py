"""Enough of an OpenID provider for the sign-in of a Space: discovery, an authorization code that works once, a signed ID token.

Whoever comes to be authorized is taken for `user`. `server.env()` is what the Hub sets in a Space with `hf_oauth: true`."""
import base64, json, secrets, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlencode, urlsplit
from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey


class OpenID:
    def __init__(self, user: str, token: str): # the access token that he gets
        self.user, self.token, self.client, self.secret, self.codes, self.seen = user, token, "client-of-the-space", secrets.token_urlsafe(12), {}, []
        self.key = RSAKey.generate_key(2048, auto_kid=True)

    def env(self, scopes: str) -> dict[str, str]: return dict(OPENID_PROVIDER_URL=self.url, OAUTH_CLIENT_ID=self.client, OAUTH_CLIENT_SECRET=self.secret, OAUTH_SCOPES=f"openid profile {scopes}")

    def __enter__(self):
        openid = self
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def say(self, status, body=b"", kind="application/json", **headers):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items(): self.send_header(name, value)
                self.end_headers(); self.wfile.write(body)
            def do_GET(self):
                url = urlsplit(self.path); asked = {k: v[0] for k, v in parse_qs(url.query).items()}
                if url.path == "/.well-known/openid-configuration": return self.say(200, openid.about())
                if url.path == "/jwks": return self.say(200, KeySet([openid.key]).as_dict(private=False))
                if url.path == "/authorize": return self.say(302, Location=openid.authorize(asked))
                self.say(404)
            def do_POST(self):
                form = {k: v[0] for k, v in parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()).items()}
                status, reply = openid.exchange(form, self.headers.get("Authorization", ""))
                self.say(status, reply)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_): self.server.shutdown(); self.server.server_close()

    def about(self) -> dict:
        return dict(issuer=self.url, authorization_endpoint=f"{self.url}/authorize", token_endpoint=f"{self.url}/token", jwks_uri=f"{self.url}/jwks", response_types_supported=["code"],
            subject_types_supported=["public"], id_token_signing_alg_values_supported=["RS256"])

    def authorize(self, asked: dict) -> str: # where the browser goes next
        assert asked["client_id"] == self.client and asked["response_type"] == "code", asked
        code = secrets.token_urlsafe(8)
        self.codes[code] = asked; self.seen.append(asked["scope"])
        return f"{asked['redirect_uri']}{'&' if '?' in asked['redirect_uri'] else '?'}{urlencode(dict(code=code, state=asked['state']))}"

    def exchange(self, form: dict, header: str) -> tuple[int, dict]:
        asked = self.codes.pop(form.get("code"), None)
        if header != "Basic " + base64.b64encode(f"{self.client}:{self.secret}".encode()).decode(): return 401, dict(error="invalid_client")
        if not asked or form.get("redirect_uri") != asked["redirect_uri"]: return 400, dict(error="invalid_grant")
        who, now = dict(sub=self.user, name=self.user.title(), preferred_username=self.user, profile=f"{self.url}/{self.user}", picture=f"{self.url}/{self.user}.png"), int(time.time())
        claims = dict(iss=self.url, aud=self.client, iat=now, exp=now + 600, **who, **({"nonce": asked["nonce"]} if "nonce" in asked else {}))
        return 200, dict(access_token=self.token, token_type="Bearer", expires_in=28800, scope=asked["scope"], id_token=jwt.encode(dict(alg="RS256", kid=self.key.kid), claims, self.key))
