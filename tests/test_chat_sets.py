"Chat sets: LLaVA-Med, LLaVA, ShareGPT, TRL; each row is a Record or a Reject, with its own pictures."
import base64, json
from collections import Counter
import pytest
from hypothesis import given, strategies as st
from medchat.chat_sets import split_markers, to_picture
from medchat.core import MedchatError, Record
from medchat.readers import Reject, read_records, recognise

PNG = b"\x89PNG\r\n\x1a\n..."
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
Q, A = {"from": "human", "value": "<image>\nLarge?"}, {"from": "gpt", "value": "No"}
U, B = {"role": "user", "content": "<image>Large?"}, {"role": "assistant", "content": "No"}
user = lambda *parts: {"role": "user", "content": list(parts)}
TEXT = {"type": "text", "text": "Large?"}

def put(folder, rows, name="rows.json"):
    path = folder/name; path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path
def one(folder, row, format="sharegpt"): (x,) = read_records(put(folder, [row]), format); return x
def why(folder, row, format="sharegpt"):
    x = one(folder, row, format); assert isinstance(x, Reject), x
    return x.why

# ---- markers
@pytest.mark.parametrize("text,plain,places", [
    ("<image>", "", [0]), ("a", "a", []), ("<image>\na", "a", [0]), ("a\n<image>", "a", [1]), ("a <image> b", "a b", [1]), ("a\n<image>\nb", "a\nb", [1]),
    ("<image> <image>\n<image>a", "a", [0, 0, 0]), ("a<image>b<image>c", "a b c", [1, 3]), ("<Image> a", "<Image> a", [])])
def test_markers(text, plain, places): assert split_markers(text) == (plain, places)

@given(st.lists(st.sampled_from(["<image>", "a", "b c", "\n", " ", "<", ">"])))
def test_no_marker_and_no_word_is_lost(pieces):
    text = "".join(pieces); plain, places = split_markers(text)
    assert len(places) == text.count("<image>") and "".join(plain.split()) == "".join(text.replace("<image>", "").split())
    assert all(0 <= p <= len(plain) for p in places) and places == sorted(places)

# ---- which picture
def test_a_path_in_four_places(tmp_path):
    home = tmp_path/"set"/"data"; (home/"images").mkdir(parents=True); (home/"x").mkdir()
    (home/"images"/"a.png").touch(); (home/"x"/"b.png").touch(); (home/"c.png").touch()
    expected = {"a.png": "images/a.png", "images/a.png": "images/a.png", "data/x/b.png": "x/b.png", "set/data/x/b.png": "x/b.png", "c.png": "c.png",
                "gone.png": "gone.png", "data\\x\\b.png": "x/b.png", f"file://{home}/c.png": "c.png", str(home/"c.png"): "c.png"}
    assert {n: to_picture(home, n)[0] for n in expected} == expected
    assert to_picture(home.parent, "a.png", "data/instruct")[0] == "data/images/a.png"
    assert to_picture(home.parent, "x/b.png", "data")[0] == "data/x/b.png" and to_picture(home.parent, "b.png", "data")[0] == "b.png"

def test_a_picture_beside_the_folder_is_not_taken(tmp_path):
    home = tmp_path/"set"; home.mkdir(); (tmp_path/"secret.png").touch()
    assert to_picture(home, "secret.png")[0] == "secret.png" # that is, set/secret.png, which is not there
    for name in ("../secret.png", str(tmp_path/"secret.png"), f"file://{tmp_path}/secret.png"):
        with pytest.raises(ValueError, match="outside"): to_picture(home, name)
    (home/"images").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="link out"): to_picture(home, "secret.png")

@pytest.mark.parametrize("value", [URI, {"url": URI}, {"image_url": {"url": URI}}, {"base64": URI.partition(",")[2]}, {"bytes": PNG, "path": None}, PNG, {"image": PNG},
                                   {"source": {"type": "base64", "media_type": "image/png", "data": URI.partition(",")[2]}}, URI.replace("data:", "DATA:"), URI[:40] + "\n" + URI[40:]])
def test_a_held_picture(tmp_path, value): assert to_picture(tmp_path, value)[1] == PNG

@pytest.mark.parametrize("value,reason", [("https://x.org/a.png", "nothing is fetched"), ({"url": "HTTP://x.org/a.png"}, "nothing is fetched"), ("s3://b/a.png", "nothing is fetched"),
    ("data:image/png;base64,", "not base64"), ("data:image/png,abc", "not base64"), ("data:", "not base64"), ("data:image/png;base64,ab=c", "not base64"),
    (None, "no image path"), ({}, "no image path"), (7, "no image path"), ({"bytes": None, "path": None}, "no image path"), (b"", "no image in the row"), ("", "no image path")])
def test_no_picture(tmp_path, value, reason):
    with pytest.raises(ValueError, match=reason): to_picture(tmp_path, value)

# ---- one row
@pytest.mark.parametrize("row", [
    {"messages": [U, B], "images": ["a.png"]}, {"messages": [U, B], "image": "a.png"}, {"conversations": [Q, A], "images": ["a.png"]}, {"conversatons": [Q, A], "image": ["a.png"]},
    {"conversation": [U, B], "image": {"path": "a.png", "bytes": None}}, {"messages": [user({"type": "image"}, TEXT), B], "images": ["a.png"]},
    {"messages": [user({"type": "image", "image": "a.png"}, TEXT), B]}, {"messages": [user({"type": "image_url", "image_url": {"url": "a.png"}}, TEXT), B]},
    {"messages": [user({"type": "image_url", "image_url": "a.png"}, TEXT), B]}, {"messages": [user({"type": "image_url", "value": "a.png"}, {"type": "text", "value": "Large?"}), B]},
    {"messages": [user({"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "Large?"}), B]}, {"messages": [user({"image": "a.png"}, {"text": "Large?"}), B]},
    {"messages": [user({"type": "image", "text": None, "image": None}, {"type": "text", "text": "Large?", "image": None}), {"role": "assistant", "content": [{"type": "text", "text": "No", "image": None}]}], "images": ["a.png"]},
    {"messages": [user("<image>", "Large?"), B], "images": ["a.png"]}, {"messages": [user({"type": "image", "image": "a.png"}, TEXT), B], "images": ["a.png"]},
    {"prompt": [{"role": "user", "content": "Large?"}], "completion": [B], "images": ["a.png"]}, {"prompt": "<image>Large?", "completion": "No", "image": "a.png"},
    {"messages": [{"role": "user", "content": "Large?"}, B], "images": ["a.png"]}, {"messages": [{"role": " Human", "content": "Large?<image>"}, {"from": "GPT", "value": "No"}], "images": ["a.png"]}])
def test_all_spellings_of_one_record(tmp_path, row):
    r = one(tmp_path, row)
    assert (r.images, r.question, r.answer, r.kind, r.answer_type, r.meta, r.group) == (["a.png"], "Large?", "No", "vqa", "closed", {}, "a.png")

@pytest.mark.parametrize("row,reason", [
    ({"messages": [U, B], "images": []}, "1 <image> markers, but 0 images"), ({"messages": [U, B]}, "1 <image> markers, but 0 images"), ({"messages": [U, B], "images": ["a", "b"]}, "1 <image> markers, but 2"),
    ({"messages": [user({"type": "image"}, TEXT), B]}, "1 <image> markers, but 0"), ({"messages": [user({"type": "image", "image": "a"}, TEXT), B], "images": ["a", "b"]}, "1 pictures in the messages, but 2 listed"),
    ({"messages": [user({"type": "image", "image": "a"}, {"type": "image"}, TEXT), B]}, "1 <image> markers, but 0"),
    ({"messages": [{"role": "user", "content": "Large?"}, {"role": "assistant", "content": "See <image>"}], "images": ["a"]}, "a picture in an answer"),
    ({"messages": [{"role": "system", "content": "<image>"}, U, B], "images": ["a", "b"]}, "a picture in an answer or a system turn"),
    ({"messages": [U], "images": ["a"]}, "no answer"), ({"messages": [U, B, U], "images": ["a", "b"]}, "no answer"), ({"messages": [B, U, B], "images": ["a"]}, "alternate"),
    ({"messages": [U, U, B], "images": ["a", "b"]}, "alternate"), ({"messages": [{"role": "system", "content": "x"}]}, "no answer"), ({"messages": [U, {"role": "system", "content": "x"}, B], "images": ["a"]}, "alternate"),
    ({"messages": [U, {"role": "assistant", "content": ""}], "images": ["a"]}, "empty answer"), ({"messages": [U, {"role": "assistant", "content": None, "tool_calls": []}], "images": ["a"]}, "content of a message is NoneType"),
    ({"messages": [{"role": "user", "content": "<image>"}, B], "images": ["a"]}, "empty question"), ({"messages": [U, {"role": "tool", "content": "x"}, B], "images": ["a"]}, "unknown speaker: tool"),
    ({"messages": [U, {"content": "x"}], "images": ["a"]}, "unknown speaker: None"), ({"messages": []}, "no conversation"), ({"messages": {}}, "no conversation: its list is dict"), ({"text": "x"}, "no conversation: none of"),
    ({"messages": ["hi", "ho"]}, "a message is str"), ({"messages": [user(7), B]}, "a part of a message is int"), ({"messages": [user({"type": "file"}), B]}, "unknown part of a message: file"),
    ({"messages": [user({"type": "video", "video": "a.mp4"}, TEXT), B]}, "video row"), ({"messages": [user({"type": "video_url"}, TEXT), B]}, "video row"), ({"messages": [user({"type": "input_audio"}, TEXT), B]}, "audio row"),
    ({"messages": [{"role": "user", "content": "<video>What?"}, B]}, "video row"), ({"messages": [U, B], "images": ["a"], "videos": ["a.mp4"]}, "video row"), ({"messages": [U, B], "images": ["a"], "videos": ["v"], "audios": ["a"]}, "video and audio row"),
    ({"messages": [U, B], "images": ["https://x.org/a.png"]}, "nothing is fetched"), ({"messages": [U, B], "images": ["../a.png"]}, "outside"), ({"messages": [U, B], "images": [""]}, "no image path"), ({"messages": [U, B], "images": [None]}, "no image path"),
    ({"messages": [U, B], "images": ["a"], "medchat": 7}, "medchat"), ({"messages": [U, B], "images": ["a"], "medchat": "["}, "medchat"), ({"messages": [U, B], "images": ["a"], "medchat": '{"group": 7}'}, "medchat"),
    ({"messages": [U, B], "images": ["a"], "medchat": '{"source": null}'}, "medchat"), ({"messages": [U, B], "images": ["a"], "medchat": '{"texts": [[9, "a", "b"]]}'}, "medchat"), ({"messages": [U, B], "images": ["a"], "medchat": '{"texts": 3}'}, "medchat"),
    ({"messages": [U, B], "images": ["a"], "medchat": '{"kind": "poem"}'}, "unknown kind"), (["a"], "must be an object"), ("a", "must be an object"), (None, "must be an object")])
def test_a_reason_for_each_bad_row(tmp_path, row, reason): assert reason in why(tmp_path, row)

def test_what_a_row_says_beyond(tmp_path):
    r = one(tmp_path, {"id": 7, "messages": [{"role": "system", "content": "Be brief."}, U, {"role": "assistant", "content": "A"}], "images": ["a.png"], "answer_type": "CLOSED ", "split": "val", "view": "PA", "videos": []})
    assert (r.id, r.answer_type, r.split, r.meta) == ("7", "closed", "validation", {"system": "Be brief.", "view": "PA"})
    assert one(tmp_path, {"messages": [U, B], "images": ["a.png"], "system": "Be brief."}).meta == {"system": "Be brief."}
    assert one(tmp_path, {"messages": [{"role": "user", "content": "这张图片是什么"}, {"role": "assistant", "content": "CT"}]}).language == "zh"

def test_later_pictures_keep_their_places_in_meta(tmp_path):
    r = one(tmp_path, {"messages": [U, B, {"role": "user", "content": "And <image> now?"}, B], "images": ["a.png", "b.png"]})
    assert (r.images, r.kind, r.question, r.meta, r.group) == (["a.png", "b.png"], "conversation", "And now?", {"image_places": [[0, 0], [2, 3]]}, None)

def test_a_corrected_text_stays_corrected(tmp_path):
    kept = json.dumps({"id": "x", "texts": [[0, "Large?", "<b>Large?"], [1, "Yes", "Yes <image>"]]})
    r = one(tmp_path, {"messages": [U, B], "images": ["a.png"], "medchat": kept})
    assert (r.id, r.question, r.answer) == ("x", "<b>Large?", "No")

# ---- files
@pytest.mark.parametrize("name,split", [("train.json", "train"), ("my_val.json", "validation"), ("test-00000-of-00001.json", "test"), ("training.json", "train"), ("latest.json", None), ("detrained.json", None)])
def test_split_by_the_name_of_the_file(tmp_path, name, split):
    (r,) = read_records(put(tmp_path, [{"conversations": [Q, A], "image": "a.png"}], name)); assert r.split == split

def test_files_of_a_folder(tmp_path):
    row = {"id": 1, "messages": [U, B], "images": ["a.png"]}
    put(tmp_path, [row], "en/train.json"); put(tmp_path, [row, row], "zh/train.jsonl"); put(tmp_path, [{"a": 1}], "en/other.json"); put(tmp_path, [row], "deep/er/train.json")
    assert [(r.id, r.where) for r in read_records(tmp_path)] == [("1", "en/train.json[1]"), ("1#2", "zh/train.jsonl:1"), ("1#3", "zh/train.jsonl:2")]
    assert recognise(tmp_path)[0] == "sharegpt" and recognise(tmp_path/"en")[0] == "sharegpt" and recognise(tmp_path/"zh"/"train.jsonl")[0] == "sharegpt"

def test_lines_in_a_json_file(tmp_path):
    path = tmp_path/"rows.json"; path.write_text("\ufeff" + "\n".join(json.dumps({"messages": [U, B], "images": [n]}) for n in "ab") + "\n{broken\n", encoding="utf-8")
    assert [type(x).__name__ for x in read_records(path)] == ["Record", "Record", "Reject"]

@pytest.mark.parametrize("rows,format", [([{"conversations": [Q, A], "image": "a"}], "llava"), ([{"id": "a", "conversations": [Q, A]}], "llava"), ([{"conversatons": [Q, A], "image": "a"}], "llava"), ([{"conversatons": [Q, A], "image": "a", "domain": {}}], "llava_med"),
    ([{"conversations": [Q, A], "images": ["a"]}], "sharegpt"), ([{"messages": [U, B]}], "sharegpt"), ([{"prompt": "q", "completion": "a", "images": ["a"]}], "sharegpt"), ([{"prompt": "q", "completion": "a", "image": "a"}], "sharegpt")])
def test_recognised_by_keys(tmp_path, rows, format): assert recognise(put(tmp_path, rows))[0] == recognise(tmp_path)[0] == format

def test_parquet_as_trl_has_it(tmp_path):
    import datetime, pyarrow as pa, pyarrow.parquet as pq
    rows = [{"messages": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Large?"}]}, {"role": "assistant", "content": [{"type": "text", "text": "No"}]}],
             "images": [{"bytes": PNG, "path": "a.png"}], "score": float("nan"), "day": datetime.date(2020, 1, 2)}]
    (tmp_path/"data").mkdir(); pq.write_table(pa.Table.from_pylist(rows), tmp_path/"data"/"train-00000-of-00001.parquet")
    (r,) = read_records(tmp_path)
    assert (r.split, r.question, list(r.blobs.values()), list(r.blobs), r.meta) == ("train", "Large?", [PNG], r.images, {"day": "2020-01-02"} | ({"score": None} if "score" in r.meta else {}))

@pytest.mark.parametrize("info", ["[]", "{", "{}", '{"x": 3}', '{"x": {"file_name": 3}}', '{"x": {"file_name": "rows.json", "formatting": "sharegpt", "columns": []}}', '{"x": {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"images": []}}}', "[" * 5000])
def test_a_broken_dataset_info_is_passed_over(tmp_path, info):
    put(tmp_path, [{"messages": [U, B], "images": ["a.png"]}]); (tmp_path/"dataset_info.json").write_text(info)
    assert [r.question for r in read_records(tmp_path, "sharegpt")] == ["Large?"]

def test_errors_in_one_line(tmp_path):
    for format in ("llava", "llava_med", "sharegpt"):
        with pytest.raises(MedchatError, match="no conversations in"): list(read_records(tmp_path, format))
        for text in ("", "{", '[{"a"', "nonsense", "version https://git-lfs.github.com/spec/v1\n"):
            (tmp_path/"rows.json").write_text(text)
            try: assert all(isinstance(x, Reject) for x in read_records(tmp_path/"rows.json", format))
            except MedchatError as e: assert "\n" not in str(e)
        (tmp_path/"rows.json").unlink()

# ---- LLaVA-Med
def test_llava_med_fields(tmp_path):
    row = {"id": "123_F1", "image": "123_F1.jpg", "domain": {"ct_scan": True, "mri": False}, "conversatons": [Q, A]}
    r = one(tmp_path, row, "llava_med")
    assert (r.id, r.group, r.source, r.licence, r.meta, r.kind) == ("123_F1", "123", "LLaVA-Med", "CC BY-NC 4.0", {"domain": ["ct_scan"]}, "vqa")
    (r,) = read_records(put(tmp_path, [row], "llava_med_alignment_500k.json")); assert (r.kind, r.answer_type) == ("caption", None)
    assert one(tmp_path, {**row, "image": "synpic12.jpg", "id": 3, "domain": None}, "llava_med").group == "synpic12.jpg"

# ---- whatever a row holds
leaf = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["", "a.png", "<image>", "<video>", "user", "human", "assistant", "image", "text", "../x", URI, "https://x", "\ud800", "\0"])
names = st.sampled_from(["messages", "conversations", "conversatons", "images", "image", "role", "from", "content", "value", "type", "text", "image_url", "url", "bytes", "prompt", "completion", "medchat", "id", "domain", "gpt4_answer", "question_id", "pair_id", "split", "system", "videos", "answer_type", "path"])
anything = st.recursive(leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=6), max_leaves=25)

@given(st.lists(anything, max_size=4), st.sampled_from(["llava", "llava_med", "sharegpt"]))
def test_fuzz_every_row_comes_out(tmp_path_factory, rows, format):
    path = tmp_path_factory.getbasetemp()/"fuzz.json"; path.write_text(json.dumps(rows))
    found = list(read_records(path, format))
    assert len(found) == len(rows) and all(isinstance(x, (Record, Reject)) for x in found)

# ---- published files
def test_llava_med_qa50(real_data):
    found = list(read_records(real_data/"llava_med"))
    assert recognise(real_data/"llava_med")[0] == recognise(real_data/"llava_med"/"data"/"eval")[0] == "llava_med"
    assert len(found) == 193 and not [x for x in found if isinstance(x, Reject)] and len({r.id for r in found}) == 193
    assert Counter(r.kind for r in found) == {"vqa": 143, "caption": 50} and {r.split for r in found} == {"test"} and not [r for r in found if "<image>" in r.question]
    assert len({i for r in found for i in r.images}) == len({r.group for r in found}) == 50
    assert Counter(d for r in found for d in r.meta["domain"]) == {"histology": 44, "ct_scan": 44, "gross": 38, "mri": 38, "chest_xray": 37}
    assert Counter("in_text_mention" in r.meta for r in found) == {True: 179, False: 14} and {r.answer_type for r in found} == {"open", None}

def test_llava_med_pointers(real_data):
    home = real_data/"llava_med_lfs_pointers"
    assert recognise(home)[0] == "llava_med"
    for source in (home, home/"data", *sorted((home/"data"/"instruct").iterdir())):
        with pytest.raises(MedchatError, match="a Git LFS pointer, not the data"): list(read_records(source))

def test_llama_factory_demos(real_data):
    home = real_data/"llava_generic"; data = home/"LLaMA-Factory"/"data"
    for source in (home, home/"LLaMA-Factory", data):
        assert recognise(source)[0] == "sharegpt"
        found = list(read_records(source))
        good = [r for r in found if isinstance(r, Record)]
        assert Counter((x.where.rpartition("/")[2].split(".")[0], type(x).__name__) for x in found) == {("mllm_demo", "Record"): 6, ("v1_multimodal_demo", "Record"): 24,
            ("mllm_audio_demo", "Reject"): 3, ("mllm_video_demo", "Reject"): 3, ("mllm_video_audio_demo", "Reject"): 3}
        assert Counter(x.why.partition(":")[0] for x in found if isinstance(x, Reject)) == {"audio row": 3, "video row": 3, "video and audio row": 3}
        assert all((source/i).is_file() for r in good for i in r.images) and Counter(len(r.images) for r in good) == {1: 20, 2: 10} and Counter(r.language for r in good) == {"en": 15, "zh": 15}
    assert len(list(read_records(data/"mllm_demo.json"))) == 6
