"A tab of a headless browser that sees what a page asks for: for the tests of the pages."

class BrowserTab:
    "A tab on a page of this machine. It ends well when the page raised nothing and asked nobody else for anything."
    def __init__(self, browser, address, ready, width, height):
        self.context = browser.new_context(viewport=dict(width=width, height=height))
        self.page, self.requests, self.errors = self.context.new_page(), [], []
        self.page.set_default_timeout(20_000)
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(address)
        self.page.wait_for_selector(ready)
    def check(self): # before the tab is closed
        assert [u for u in self.requests if not u.startswith(("http://127.0.0.1:", "data:", "blob:http://127.0.0.1:"))] == [] and self.errors == []
    def __enter__(self): return self
    def __exit__(self, kind, *_):
        try: kind or self.check()
        finally: self.context.close()
