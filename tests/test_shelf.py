"Shelf: each picture opened once, by many threads, into one ledger."
import os, random
from collections import Counter
from pathlib import Path
import pytest
from PIL import Image
from medchat import shelf as module
from medchat.shelf import Shelf, open_ledger

def picture(path, seed, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("L", size, random.Random(seed).randbytes(size[0] * size[1])).save(path)

@pytest.fixture
def make(tmp_path):
    made = []
    def make(n=20, **kw):
        for i in range(n): picture(tmp_path/f"src/{i}.png", i)
        db = open_ledger(tmp_path/f"ledger{len(made)}.db"); made.append((db, Shelf(db, tmp_path/"src", tmp_path/f"work{len(made)}", **kw)))
        return made[-1]
    yield make
    for db, shelf in made: shelf.close(); db.close()

@pytest.mark.parametrize("num_proc", [1, 3])
def test_processes_change_nothing(make, num_proc, tmp_path):
    db, shelf = make(num_proc=num_proc, alone=0); (tmp_path/"src/5.png").write_bytes((tmp_path/"src/2.png").read_bytes()); (tmp_path/"src/6.png").write_bytes(b"")
    paths = [f"{i}.png" for i in range(20)]
    shelf.expect(paths)
    for p in paths:
        try: shelf.look(p)
        except ValueError as e: assert str(e) == "empty image file: 6.png"
    rows = db.execute("select image, path, content, width, height, fault from images order by image").fetchall()
    assert rows == [(i + 1, f"{i}.png", 3 if i == 5 else i + 1, *((None, None, "empty image file: 6.png") if i == 6 else (40, 30, None))) for i in range(20)]

def test_each_is_opened_once_however_often_asked(make, monkeypatch):
    seen, real = Counter(), module.image_info
    monkeypatch.setattr(module, "image_info", lambda p, *a: seen.update([Path(p).name]) or real(p, *a))
    _, shelf = make(5)
    for _ in range(3): shelf.expect([f"{i}.png" for i in range(5)]); [shelf.look(f"{i}.png") for i in range(5)]
    shelf.known.clear(); shelf.look("3.png")
    assert seen == {f"{i}.png": 1 for i in range(5)}

def test_held_pictures_win_over_files(make, tmp_path):
    _, shelf = make(2)
    data = (tmp_path/"src/1.png").read_bytes()
    shelf.expect(["0.png"], {"0.png": data})
    assert shelf.look("0.png")[1] == shelf.look("1.png")[1] and shelf.read("0.png") == data

def test_header_only_decodes_nothing(make, tmp_path):
    db, shelf = make(3, decode=False); (tmp_path/"src/1.png").write_bytes((tmp_path/"src/1.png").read_bytes()[:-300])
    for i in range(3): shelf.look(f"{i}.png") # the cut one passes: that is the price
    assert shelf.match() == 0 and db.execute("select count(*) from images where width = 40 and print is null").fetchone() == (3,)

def test_looks_of_copies_go_along(make, tmp_path):
    "A re-saved picture and a byte copy of it get the look of the first."
    db, shelf = make(0)
    from medchat.samples import draw_phantom
    (tmp_path/"src").mkdir(); film = Image.fromarray(draw_phantom({}, patient=1)); film.save(tmp_path/"src/a.png"); film.save(tmp_path/"src/b.jpg", quality=85)
    (tmp_path/"src/c.jpg").write_bytes((tmp_path/"src/b.jpg").read_bytes()); Image.fromarray(draw_phantom({"nodule": "left upper"}, patient=30)).save(tmp_path/"src/d.png")
    for n in ("a.png", "b.jpg", "c.jpg", "d.png"): shelf.look(n)
    assert shelf.match() == 1 and db.execute("select path, content, look from images order by image").fetchall() == [("a.png", 1, 1), ("b.jpg", 2, 1), ("c.jpg", 2, 1), ("d.png", 4, 4)]

def test_a_crash_costs_one_picture(make, monkeypatch):
    "A process that dies in the middle of its work: its picture is a fault, the others are looked at."
    _, shelf = make(20, num_proc=2, alone=0)
    real = module._look
    monkeypatch.setattr(module, "_look", lambda f, p, d: os._exit(139) if p == "7.png" else real(f, p, d))
    shelf.expect([f"{i}.png" for i in range(20)])
    for i in range(20):
        if i != 7: assert shelf.look(f"{i}.png")[0]
    with pytest.raises(ValueError, match="damaged image: 7.png .it crashes its decoder."): shelf.look("7.png")
