"The page for programs: Gradio's own client, plain HTTP, and MCP."
import asyncio, base64, json, sqlite3
from pathlib import Path
import pytest

from medchat.audit import AuditLog
from medchat.core import DISCLAIMER, sample_data
from medchat.session import Desk
from page_client import Scripted, as_file, served

film = str(sample_data()/"phantoms"/"images"/"p0001.png")
slice_ = str(sample_data()/"dicom"/"slice")
names = ["/ask", "/check_findings", "/draft_report"]

class Doctor(Scripted):
    "A model that says what it should not."
    def stream(self, messages, images, *a, **kw):
        if kw.get("form") or "dose" not in messages[-1]["content"][-1]["text"]: yield from super().stream(messages, images, *a, **kw)
        else: yield "Give amoxicillin 500 mg every 8 hours."

@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    desk = Desk([Scripted("one"), Doctor("two")], folder, AuditLog(folder), per_minute=10**6)
    with served(desk, launch=dict(mcp_server=True)) as c:
        c.desk, c.log = desk, folder/"audit.db"
        yield c

@pytest.fixture(scope="module")
def client(page):
    from gradio_client import Client
    c = Client(page.address, verbose=False, download_files=False)
    yield c
    c.close()

def file(path):
    from gradio_client import handle_file
    return handle_file(path)

def refused(client, **asked):
    from gradio_client.exceptions import AppError
    with pytest.raises(AppError) as e: client.predict(**asked)
    return str(e.value)


# --- by name

def test_the_endpoints_are_named_typed_and_described(client):
    info = client.view_api(return_format="dict", print_info=False)
    assert list(info["named_endpoints"]) == names and not info["unnamed_endpoints"]
    for name, wanted in zip(names, (["image", "question", "model"], ["image", "model"], ["image", "schema", "model"])):
        there = info["named_endpoints"][name]
        assert [p["parameter_name"] for p in there["parameters"]] == wanted
        assert [p["python_type"]["type"] for p in there["parameters"]][1:] == ["str"] * (len(wanted) - 1) and "filepath" in there["parameters"][0]["python_type"]["type"]
        assert {p["parameter_name"]: p["parameter_default"] for p in there["parameters"] if p["parameter_has_default"]}.get("model") == ""
        assert "not for clinical use" in there["description"] and len(there["returns"]) == 1

def test_ask(client):
    reply = client.predict(file(film), "Is the heart enlarged?", api_name="/ask")
    assert reply["reply"] == "You asked: Is the heart enlarged? Turn 1 with 1 image of 136 pixels." and reply["disclaimer"] == DISCLAIMER and reply["model"]["model"] == "one"
    assert set(reply) == {"reply", "probability", "notes", "fired", "model", "disclaimer"}
    assert client.predict(file(film), "Again?", "two", api_name="/ask")["model"]["model"] == "two"

def test_findings(client):
    reply = client.predict(file(film), api_name="/check_findings")
    assert set(reply) == {"findings", "model", "disclaimer"} and reply["disclaimer"] == DISCLAIMER and len(reply["findings"]) == len({f["finding"] for f in reply["findings"]}) == 14
    assert all(set(f) == {"finding", "status", "probability", "reason"} and f["status"] in ("present", "absent", "indeterminate") and 0 <= f["probability"] <= 1 for f in reply["findings"])

@pytest.mark.parametrize("schema", ["radiology", "endoscopy"])
def test_report(client, schema):
    reply = client.predict(file(film), schema, api_name="/draft_report")
    assert set(reply) == {"report", "text", "notes", "model", "disclaimer"} and reply["disclaimer"] == DISCLAIMER and reply["text"] and "impression" in {k.lower() for k in reply["report"]}

def test_a_dicom_file(client, page):
    from medchat.scan import open_upload
    assert f"{open_upload(slice_).view().size[0]} pixels" in client.predict(file(slice_), "What?", api_name="/ask")["reply"]

def test_each_call_is_a_visit_of_its_own(client):
    for _ in range(2): assert "Turn 1 with 1 image" in client.predict(file(film), "What?", api_name="/ask")["reply"]

def test_plain_http(page):
    path = page.upload(Path(film).read_bytes())[1]
    status, _, text = page.call("POST", "/gradio_api/call/ask", dict(data=[as_file(path), "What?", ""]))
    said = page.call("GET", f"/gradio_api/call/ask/{json.loads(text)['event_id']}")[2].decode()
    assert status == 200 and "event: complete" in said and DISCLAIMER in said


# --- the same gates, limits and log

def test_names_do_not_reach_the_model(client):
    reply = client.predict(file(film), "Mr. John Miller, born 12.03.1950: is the heart enlarged?", api_name="/ask")
    assert "Miller" not in json.dumps(reply) and "1950" not in json.dumps(reply) and reply["notes"]

def test_an_emergency_is_answered_without_the_model(client):
    reply = client.predict(file(film), "I have crushing chest pain and cannot breathe", api_name="/ask")
    assert "You asked" not in reply["reply"] and reply["fired"] and reply["disclaimer"] == DISCLAIMER

def test_a_dose_is_held_back(client):
    reply = client.predict(file(film), "Which dose was given?", "two", api_name="/ask")
    assert "amoxicillin" not in reply["reply"] and "500" not in reply["reply"] and reply["fired"]

def test_calls_are_in_the_log(client, page):
    client.predict(file(film), "A question for the log?", api_name="/ask")
    client.predict(file(film), api_name="/check_findings")
    book, rows = sqlite3.connect(page.log), []
    for (name,) in book.execute("select name from sqlite_master where type = 'table'").fetchall(): rows += map(str, book.execute(f"select * from {name}"))
    assert any("A question for the log?" in r and "127.0.0.1" in r for r in rows) and any("(finding check)" in r for r in rows)

def test_errors_are_sentences(client, tmp_path):
    (tmp_path/"notes.png").write_text("no image")
    assert "Not an image (notes.png). Known formats" in refused(client, image=file(str(tmp_path/"notes.png")), question="What?", api_name="/ask")
    assert "no question yet" in refused(client, image=file(film), question="  ", api_name="/ask")
    assert "no image yet" in refused(client, image=None, question="What?", api_name="/ask")
    assert "No such model (gpt). There are: one, two" in refused(client, image=file(film), question="What?", model="gpt", api_name="/ask")
    assert "too long" in refused(client, image=file(film), question="why? " * 1000, api_name="/ask")
    assert "/tmp" not in (said := refused(client, image=file(film), schema="novel", api_name="/draft_report")) and "radiology" in said
    assert "no image yet" in refused(client, image=None, api_name="/check_findings")
    assert client.predict(file(film), "Still there?", api_name="/ask")["reply"]

def test_the_limit_of_questions_holds_for_programs_too(page, client, monkeypatch):
    monkeypatch.setattr(page.desk, "per_minute", 3); page.desk._asked.clear()
    done = [client.predict(file(film), "What?", api_name="/ask"), client.predict(file(film), api_name="/check_findings"), client.predict(file(film), api_name="/draft_report")]
    assert len(done) == 3
    for name, more in (("/ask", dict(question="What?")), ("/check_findings", {}), ("/draft_report", {})): assert "Too many questions in a minute" in refused(client, image=file(film), api_name=name, **more)

def test_with_a_password():
    from gradio_client import Client
    from gradio_client.exceptions import AuthenticationError
    with served(auth=("ada", "correct horse")) as c:
        with pytest.raises(AuthenticationError): Client(c.address, verbose=False)
        one = Client(c.address, auth=("ada", "correct horse"), verbose=False, download_files=False)
        assert one.predict(file(film), "What?", api_name="/ask")["disclaimer"] == DISCLAIMER
        one.close()


# --- MCP

def with_mcp(page, job):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client
    async def run():
        async with streamablehttp_client(f"{page.address}/gradio_api/mcp/") as (read, write, _):
            async with ClientSession(read, write) as session:
                await session.initialize()
                return await job(session)
    return asyncio.run(run())

def test_mcp_lists_three_tools(page):
    tools = with_mcp(page, lambda s: s.list_tools()).tools
    assert sorted(t.name.split("_", 1)[-1] if t.name.startswith("scripted") else t.name for t in tools) == ["ask", "check_findings", "draft_report"]
    for t in tools: assert "not for clinical use" in t.description and "image" in t.inputSchema["properties"]
    ask = next(t for t in tools if t.name.endswith("ask"))
    assert set(ask.inputSchema["properties"]) == {"image", "question", "model"} and "what to ask" in json.dumps(ask.inputSchema)

def mcp_ask(page, image, question="Is the heart enlarged?", tool="ask"):
    async def job(s):
        name = next(t.name for t in (await s.list_tools()).tools if t.name.endswith(tool))
        return await s.call_tool(name, dict(image=image, **(dict(question=question) if tool == "ask" else {})))
    done = with_mcp(page, job)
    return done.isError, "\n".join(c.text for c in done.content)

def test_mcp_asks_about_an_uploaded_image(page):
    path = page.upload(Path(film).read_bytes())[1]
    failed, said = mcp_ask(page, f"{page.address}/gradio_api/file={path}")
    assert not failed and "You asked: Is the heart enlarged? Turn 1 with 1 image of 136 pixels." in said and DISCLAIMER in said
    failed, said = mcp_ask(page, f"{page.address}/gradio_api/file={path}", tool="check_findings")
    assert not failed and "Cardiomegaly" in said

def test_mcp_asks_about_base64(page):
    failed, said = mcp_ask(page, "data:image/png;base64," + base64.b64encode(Path(film).read_bytes()).decode())
    assert not failed and "Turn 1 with 1 image of 136 pixels." in said and DISCLAIMER in said

@pytest.mark.parametrize("image", ["/etc/passwd", film.replace("p0001", "p0002"), "http://127.0.0.1:9/x.png", "https://film.example/x.png", "data:image/png;base64,AAAA", "data:text/html;base64,PHNjcmlwdD4=", "x", "", "{address}/gradio_api/file=/etc/passwd", "{address}/gradio_api/file=" + film])
def test_mcp_opens_no_other_file_and_fetches_nothing(page, image):
    failed, said = mcp_ask(page, image.replace("{address}", page.address))
    assert failed and "You asked" not in said and "root:" not in said
