"Where a model looked: maps in the right place, models given back as they were, and the games that test the maps."
import threading
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from medchat import explain
from medchat.core import DISCLAIMER, MedchatError
from medchat.explain import (Grid, Maps, agreement, attention_maps, finding_box, grad_cam, image_grids, lay, overlay, pointing_game, show_maps, shuffle_weights, stretch)
from medchat.families import FAMILIES, family_of
from medchat.messages import user_message
from medchat.models import encode, generate_replies, load_model, load_run
from medchat.samples import FINDINGS, draw_phantom
from medchat.shapes import draw_shapes
from run_maker import make_run

NAMES = [f.tiny_base for f in FAMILIES.values() if f.tiny_base]
SIZES = [(112, 112), (150, 90), (60, 200), (31, 17), (300, 301), (56, 57), (400, 100)]

@pytest.fixture(scope="module", params=NAMES)
def pair(request): return load_model(request.param)

def blobs(size, seed=0):
    "A grey picture whose every corner is of another brightness, with a few large patches."
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)).resize(size, Image.BICUBIC)
    return coarse.convert("RGB")

def ask(n=1, text="Where is the ring?"): return [user_message(text, n)]

# --- places

def seen_patches(batch, config):
    "The mean brightness of each patch, in the order in which the vision tower gives them on, straight from what the processor made."
    if "image_grid_thw" in batch: return batch["pixel_values"].mean(1).numpy()
    pixels, p = batch["pixel_values"][0] if batch["pixel_values"].ndim == 6 else batch["pixel_values"], config.vision_config.patch_size
    def of_tile(tile): return tile.mean(0).unfold(0, p, p).unfold(1, p, p).mean((2, 3)).flatten()
    rows = []
    for k, image in enumerate(pixels):
        if "aspect_ratio_ids" in batch: rows += [torch.cat([torch.full((1,), 99.), of_tile(t)]) for t in image] # one for the tile itself, in front
        else:
            from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
            rows += [of_tile(t) for t in image[:image_size_to_num_patches(batch["image_sizes"][k], config.image_grid_pinpoints, config.vision_config.image_size)]]
    return torch.cat(rows).numpy()

@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_lie_where_the_processor_took_them_from(pair, size):
    "Lay the brightness of the patches over the image: it must be the image."
    model, processor = pair
    images = [blobs((90, 120), 1), blobs(size, 2)]
    batch = encode(processor, [ask(2)], [images])
    values = seen_patches(batch, model.config)
    for which, image in enumerate(images):
        grids = image_grids(model, batch, [i.size for i in images], which, tower=True)
        assert max(g.places.max() for g in grids) < len(values)
        got = lay(values, grids)/lay(np.ones(len(values)), grids)
        want = np.asarray(image.convert("L").resize(got.shape[::-1], Image.BOX), float)
        assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > (.97 if min(image.size) > 40 and len(grids) == 1 else .85), (which, size) # small images are smoothed, and padding darkens the edge of a tile

@pytest.mark.parametrize("size", SIZES, ids=str)
def test_words_lie_where_their_patches_do(pair, size):
    model, processor = pair
    images = [blobs((90, 120), 1), blobs(size, 2)]
    batch, sizes = encode(processor, [ask(2)], [images]), [i.size for i in images]
    words, tower = ([image_grids(model, batch, sizes, k, tower=t) for k in (0, 1)] for t in (False, True))
    if family_of(model.config).image_states: # read beside the words: the same numbers
        assert all((a.places == b.places).all() and a.box == b.box for k in (0, 1) for a, b in zip(words[k], tower[k]))
        return
    every = np.concatenate([g.places.ravel() for k in (0, 1) for g in words[k]])
    count = int((batch["input_ids"] == processor.image_token_id).sum())
    assert len(set(every)) == len(every) and 0 <= every.min() and every.max() < count
    if "image_grid_thw" in batch: # a word is the four patches under it
        assert len(every) == count
        for k in (0, 1):
            under = tower[k][0].places.reshape(words[k][0].places.shape[0], 2, -1, 2).transpose(0, 2, 1, 3).reshape(*words[k][0].places.shape, 4)
            assert (under//4 == words[k][0].places[..., None]).all()
        return
    number, at = [], 0 # let the model's own code carry the numbers of the patches to the words
    for k in (0, 1):
        n = sum(g.places.size for g in tower[k])
        number.append(torch.arange(at, at + n).float().view(-1, 16, 1)); at += n
    packed, lengths = model.model.pack_image_features(number, batch["image_sizes"], "default", image_newline=torch.tensor([-1.]))
    packed = torch.cat(packed)[:, 0].numpy()
    assert len(packed) == count and (packed == -1).sum() == count - len(every)
    for k in (0, 1):
        (whole, tiles), (tower_whole, tower_tiles) = words[k], tower[k]
        assert (packed[whole.places] == tower_whole.places).all()
        rows, cols = tower_tiles.places.shape
        cell = (tower_tiles.box[2] - tower_tiles.box[0])/cols, (tower_tiles.box[3] - tower_tiles.box[1])/rows
        left, top = (round((tiles.box[i] - tower_tiles.box[i])/cell[i]) for i in (0, 1))
        assert (packed[tiles.places] == tower_tiles.places[top:top + tiles.places.shape[0], left:left + tiles.places.shape[1]]).all()
        assert np.allclose(np.array(tiles.box) - np.array(tower_tiles.box), [left*cell[0], top*cell[1], -left*cell[0], -top*cell[1]])

@pytest.mark.parametrize("corner", ["left upper", "right upper", "left lower", "right lower"])
@pytest.mark.parametrize("which", [0, 1])
def test_attention_on_one_patch_shows_in_its_place(pair, corner, which, monkeypatch):
    "All the attention on the patch in a corner of one image: its map is hot there, and the other image's map is empty."
    model, processor = pair
    images = [blobs((112, 84)), blobs((80, 112))]
    watch = explain._watch
    def fake(model, batch, start, end):
        layers, logp = watch(model, batch, start, end)
        grid = image_grids(model, batch, [i.size for i in images], which)[-1]
        (left, top, right, bottom), (rows, cols) = grid.box, grid.places.shape # the patches in the corners of the image itself
        row = int(((.999 if "lower" in corner else .001) - top)/(bottom - top)*rows)
        col = int(((.999 if "right" in corner else .001) - left)/(right - left)*cols)
        place = grid.places[row, col]
        crossing = bool(family_of(model.config).image_states)
        column = place if crossing else int((batch["input_ids"][0] == processor.image_token_id).nonzero()[place, 0])
        layers = [torch.zeros_like(a) for a in layers]
        for k in model.config.get_text_config().cross_attention_layers if crossing else range(len(layers)): layers[k][..., column] = 1
        return layers, logp
    monkeypatch.setattr(explain, "_watch", fake)
    maps = attention_maps(model, processor, ask(2), images, "left lower area", which=which)
    rows, cols = maps.total.shape
    assert divmod(int(maps.total.argmax()), cols) == (("lower" in corner)*(rows - 1), ("right" in corner)*(cols - 1))
    assert .1 < maps.grids[0].sum() <= 1 + 1e-6 # part of a patch may lie on padding
    assert attention_maps(model, processor, ask(2), images, "left lower area", which=1 - which).grids.sum() == 0

def test_an_unknown_layout_is_said(pair):
    with pytest.raises(MedchatError, match="nobody knows how this model lays out an image"): image_grids(pair[0], {"pixel_values": 0}, [(9, 9)])

boxes = st.tuples(st.floats(-1, .3), st.floats(-1, .3), st.floats(.7, 2), st.floats(.7, 2))
@given(arrays(float, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.floats(0, 9)), boxes)
def test_laying_keeps_the_mass_that_is_on_the_image(values, box):
    grid = Grid(np.arange(values.size).reshape(values.shape), box)
    got = lay(values.ravel(), [grid])
    share = lambda n, low, high: np.array([max(0, min(1, low + (high-low)*(k+1)/n) - max(0, low + (high-low)*k/n))/((high-low)/n) for k in range(n)])
    on_image = share(values.shape[0], box[1], box[3])[:, None]*share(values.shape[1], box[0], box[2])*values
    assert got.sum() == pytest.approx(on_image.sum()) and (got >= 0).all()
    assert lay(values.ravel(), [Grid(grid.places)]) == pytest.approx(values) # a grid that fits changes nothing

# --- attention and gradient

def test_the_attention_is_that_of_one_whole_pass(pair):
    "Read in two parts, with the cache between: the same weights and the same probabilities as in one."
    model, processor = pair
    batch, start, end = explain._read(model, processor, ask(), [blobs((112, 112))], "left lower area")
    got, logp = explain._watch(model, batch, start, end)
    text = model.config.get_text_config()
    was, text._attn_implementation = text._attn_implementation, "eager"
    try:
        with torch.no_grad(): out = model(**batch, output_attentions=True, use_cache=False)
    finally: text._attn_implementation = was
    assert len(got) == len(out.attentions) == text.num_hidden_layers
    for a, b in zip(got, out.attentions):
        b = b[0][:, start - 1:end - 1]
        assert torch.allclose(a, b[..., :a.shape[-1]], atol=1e-4) and b[..., a.shape[-1]:].abs().sum() < 1e-4
    want = out.logits[0, start - 1:end - 1].float().log_softmax(-1).gather(1, batch["input_ids"][0, start:end, None])[:, 0]
    assert torch.allclose(logp, want, atol=1e-3)

def test_maps_have_one_grid_for_each_token(pair):
    model, processor = pair
    maps = attention_maps(model, processor, ask(), [blobs((112, 112))], "left lower area")
    assert "".join(maps.tokens).strip() == "left lower area" and len(maps.tokens) == len(maps.chances) == len(maps.grids)
    assert maps.grids.shape[1:] in ((4, 4), (8, 8)) and (maps.grids >= 0).all() and all(0 < g.sum() <= 1 for g in maps.grids) and all(0 <= c <= 1 for c in maps.chances)
    assert maps.total == pytest.approx(maps.grids.mean(0)) and maps.chance == pytest.approx(np.prod(maps.chances))

def test_the_gradient_is_what_a_small_change_does(pair, monkeypatch):
    "Make one patch a little stronger before the projector: the reply's log-probability changes by its value times that little."
    model, processor = pair
    batch, start, end = explain._read(model, processor, ask(), [blobs((112, 112), 5)], "left lower area")
    seen, slope = explain._gradient(model, batch, start, end)
    values, name = (seen*slope).sum(-1), family_of(model.config).projector
    def logp(patch, by):
        part = dict(model.named_modules())[name]
        def change(module, args):
            x = args[0].clone(); x.view(-1, x.shape[-1])[patch] *= 1 + by
            return (x,)
        hook = part.register_forward_pre_hook(change)
        with torch.no_grad(): logits = model(**batch).logits[0, start - 1:end - 1]
        hook.remove()
        return float(explain._chances(logits, batch["input_ids"][0, start:end]).sum())
    for patch in values.abs().argsort(descending=True)[:3].tolist():
        assert (logp(patch, 1e-2) - logp(patch, -1e-2))/2e-2 == pytest.approx(float(values[patch]), rel=.1, abs=2e-3)

def test_grad_cam_of_all_sizes(pair):
    for size in SIZES[:4]:
        heat = grad_cam(*pair, ask(), [blobs(size, 3)], "left lower area")
        assert heat.ndim == 2 and (heat >= 0).all() and heat.sum() == pytest.approx(1, abs=1e-5)

def state(model):
    return dict(attention=[m.config._attn_implementation for m in model.modules() if hasattr(m, "config") and hasattr(m.config, "_attn_implementation")],
        trains=[m.training for m in model.modules()], grads=[p.requires_grad for p in model.parameters()], values=[p.grad is None for p in model.parameters()],
        hooks=[(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()], places=[id(m.rope_deltas) for m in model.modules() if "rope_deltas" in vars(m)])

@pytest.mark.parametrize("look", [attention_maps, grad_cam])
def test_the_model_is_given_back_as_it_was(pair, look, monkeypatch):
    model, processor = pair
    picture, lock = blobs((112, 112)), threading.Lock()
    said = generate_replies(model, processor, [ask()], [[picture]])
    before = state(model)
    look(model, processor, ask(), [picture], "left lower area", lock=lock)
    assert state(model) == before and not lock.locked() and generate_replies(model, processor, [ask()], [[picture]]) == said
    before["places"] = state(model)["places"]
    monkeypatch.setattr(explain, "_chances", lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): look(model, processor, ask(), [picture], "left lower area", lock=lock)
    assert state(model) == before and not lock.locked()
    monkeypatch.undo()
    model.train()
    try:
        trains = state(model)
        look(model, processor, ask(), [picture], "left lower area")
        assert state(model) == trains
    finally: model.eval()

@pytest.mark.parametrize("look", [attention_maps, grad_cam])
def test_others_wait_for_the_lock(look, monkeypatch):
    model, processor = load_model(NAMES[0])
    lock, held = threading.Lock(), []
    read = explain._read
    monkeypatch.setattr(explain, "_read", lambda *a: held.append(lock.locked()) or read(*a))
    look(model, processor, ask(), [blobs((112, 112))], "left", lock=lock)
    assert held == [True]

def test_a_tuned_model_at_4_bits_after_a_chat(tmp_path):
    "LoRA on 4-bit weights, after generation without gradients, and from inside such a block."
    model, processor = load_run(make_run(tmp_path/"run"))
    picture = blobs((112, 112))
    with torch.inference_mode():
        said, = generate_replies(model, processor, [ask()], [[picture]], max_new_tokens=6)
        inside = attention_maps(model, processor, ask(), [picture], said or "x"), grad_cam(model, processor, ask(), [picture], said or "x")
    maps, cam = attention_maps(model, processor, ask(), [picture], said or "x"), grad_cam(model, processor, ask(), [picture], said or "x")
    assert np.allclose(maps.grids, inside[0].grids, atol=1e-5) and np.allclose(cam, inside[1], atol=1e-4) and cam.sum() == pytest.approx(1, abs=1e-5)
    assert maps.grids.shape[1:] == (4, 4) and cam.shape == (8, 8)
    assert generate_replies(model, processor, [ask()], [[picture]], max_new_tokens=6) == [said]

def test_a_long_conversation_is_mapped_at_its_end(pair):
    "Earlier turns are part of the prompt, and only the last reply is looked at."
    from medchat.messages import assistant_message
    model, processor = pair
    talk = [*ask(), assistant_message("left lower area"), user_message("Is there a line?")]
    maps = attention_maps(model, processor, talk, [blobs((112, 112))], "no")
    assert "".join(maps.tokens).strip() == "no"
    assert grad_cam(model, processor, talk, [blobs((112, 112))], "no").shape == (8, 8)

@pytest.mark.parametrize("look", [attention_maps, grad_cam])
def test_what_cannot_be_looked_at(look):
    pair = load_model(NAMES[0])
    with pytest.raises(MedchatError, match="no image to look at"): look(*pair, ask(0), [], "yes")
    with pytest.raises(MedchatError, match="an answer without words"): look(*pair, ask(), [blobs((56, 56))], "  ")
    with pytest.raises(MedchatError, match="do not match"): look(*pair, ask(2), [blobs((56, 56))], "yes")
    with pytest.raises(IndexError): look(*pair, ask(), [blobs((56, 56))], "yes", which=1)

def test_a_model_without_attention_says_so(monkeypatch):
    model, processor = load_model(NAMES[0])
    part = model.model.language_model.layers[2].self_attn
    forward = part.forward
    monkeypatch.setattr(part, "forward", lambda *a, **k: (forward(*a, **k)[0], None)) # as faster code does
    with pytest.raises(MedchatError, match="does not tell its attention"): attention_maps(model, processor, ask(), [blobs((56, 56))], "yes")

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["left lower area", "தமிழ் 肺部", "no  effusion, é🫁."])
def test_the_texts_of_the_tokens_are_the_text(name, text):
    from transformers import AutoTokenizer
    from medchat.models import resolve_base
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(name))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = explain._texts(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids) and not any("\ufffd" in p for p in pieces)

# --- over the image

heats = arrays(float, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.floats(0, 5))
@given(heats, st.tuples(st.integers(2, 50), st.integers(2, 50)), st.floats(0, 1), st.sampled_from(["RGB", "L", "RGBA"]))
def test_an_overlay_has_the_size_of_its_image(heat, size, strength, mode):
    image = blobs(size).convert(mode)
    got = overlay(image, heat, strength)
    assert got.size == size and got.mode == "RGB" and stretch(heat, size).shape == size[::-1]
    if strength == 0 or not heat.any(): assert got.tobytes() == image.convert("RGB").tobytes()

def test_the_hottest_place_changes_most_and_the_coldest_not_at_all():
    grey, heat = Image.new("RGB", (100, 60), (90, 90, 90)), np.zeros((3, 5))
    heat[0, 4] = 2
    change = [abs(np.asarray(overlay(grey, heat, s), int) - 90).sum(-1) for s in (.2, .5, 1)]
    for c in change: assert c[:15, 85:].mean() > 0 and (c[45:, :40] == 0).all() and np.unravel_index(c.argmax(), c.shape)[1] > 80
    assert change[0].sum() < change[1].sum() < change[2].sum()
    assert overlay(grey, heat*7, .5).tobytes() == overlay(grey, heat, .5).tobytes() # only the shape of the map counts

@pytest.mark.parametrize("strength", [-.1, 1.1, float("nan")])
def test_strength_is_a_share(strength):
    with pytest.raises(MedchatError, match="strength goes from 0 to 1"): overlay(blobs((9, 9)), np.ones((2, 2)), strength)

@pytest.mark.parametrize("n", [1, 9])
def test_a_figure_for_any_length(n, tmp_path):
    maps = Maps(["$a_{", "", *["x"]*28][:n], [.5]*n, np.ones((n, 4, 4)))
    for cam in (None, np.ones((8, 8))):
        figure = show_maps(blobs((40, 40)), maps, cam)
        assert len([a for a in figure.axes if a.images]) == n + 2 + (cam is not None) and figure.get_supxlabel() == DISCLAIMER
        figure.savefig(tmp_path/"f.png")
        assert (tmp_path/"f.png").stat().st_size > 1000

# --- the game

cases = st.tuples(heats, st.tuples(st.integers(4, 24), st.integers(4, 24))).flatmap(lambda c: st.tuples(st.just(c[0]), st.just(c[1]),
    st.tuples(st.integers(0, c[1][0] - 2), st.integers(0, c[1][1] - 2)).flatmap(lambda p: st.tuples(st.just(p[0]), st.just(p[1]), st.integers(p[0] + 1, c[1][0]), st.integers(p[1] + 1, c[1][1])))))

@settings(max_examples=60)
@given(st.lists(cases, min_size=1, max_size=3), st.sampled_from([0, .03, .2]))
def test_the_game_by_counting_points(rows, tolerance):
    hits, chances, masses, areas = [], [], [], []
    for heat, (w, h), (l, t, r, b) in rows:
        big, e = stretch(heat, (w, h)), tolerance*max(w, h)
        points = [(x, y) for y in range(h) for x in range(w)]
        near = {(x, y) for x, y in points if l - e <= x + .5 <= r + e and t - e <= y + .5 <= b + e}
        inside = {(x, y) for x, y in points if l <= x < r and t <= y < b}
        (rows_, cols), top = heat.shape, [(k, j) for k in range(heat.shape[0]) for j in range(heat.shape[1]) if heat[k, j] == heat.max()]
        middles = [((j + .5)*w/cols, (k + .5)*h/rows_) for k, j in top]
        hits.append(sum(l - e <= x <= r + e and t - e <= y <= b + e for x, y in middles)/len(top)); chances.append(len(near)/len(points)); areas.append(len(inside)/len(points))
        total = sum(float(big[y, x]) for x, y in points)
        masses.append(sum(float(big[y, x]) for x, y in inside)/total if total else areas[-1])
    got = pointing_game([h for h, *_ in rows], [b for *_, b in rows], [s for _, s, _ in rows], tolerance=tolerance)
    assert got["hit"]["value"] == pytest.approx(np.mean(hits)) and got["chance"] == pytest.approx(np.mean(chances))
    assert got["mass"]["value"] == pytest.approx(np.mean(masses), rel=1e-3, abs=1e-5) and got["area"] == pytest.approx(np.mean(areas)) and got["hit"]["n"] == len(rows)

def test_maps_at_random_score_chance():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 60, (600, 2))
    got = pointing_game(rng.random((600, 7, 7)), [(x, y, x + 40, y + 40) for x, y in corners], [(100, 100)]*600)
    assert got["hit"]["low"] < got["chance"] < got["hit"]["high"] and got["mass"]["value"] == pytest.approx(got["area"], abs=.01)

def test_no_maps_no_score(): assert pointing_game([], [], [])["hit"] == dict(value=None, n=0, groups=0, low=None, high=None)

def test_two_films_of_a_patient_count_as_one():
    heat = np.zeros((4, 4)); heat[0, 0] = 1
    play = lambda groups: pointing_game([heat]*8, [(0, 0, 25, 25)]*4 + [(75, 75, 100, 100)]*4, [(100, 100)]*8, groups)["hit"]
    assert play("aaaabbbb")["groups"] == 2 and play("aaaabbbb")["high"] - play("aaaabbbb")["low"] > play(())["high"] - play(())["low"]

@pytest.mark.parametrize("name", NAMES)
def test_a_map_points_where_the_question_does_and_a_shuffled_model_does_not(name):
    model, processor = load_model(name)
    rng, images, boxes, asked, answers = np.random.default_rng(77), [], [], [], []
    while len(images) < 24:
        drawn, facts = draw_shapes(rng)
        kinds = [s["kind"] for s in facts["areas"].values()]
        area = next((a for a, k in zip(facts["areas"], kinds) if kinds.count(k) == 1), None)
        if not area: continue
        left, top = 56*area.startswith("right"), 56*area.endswith("lower")
        images.append(Image.fromarray(drawn).convert("RGB")); boxes.append((left, top, left + 56, top + 56)); answers.append(f"{area} area")
        asked.append([user_message(f"Where is the {facts['areas'][area]['kind']}?", 1)])
    play = lambda look: pointing_game([look(model, processor, a, [i], r) for a, i, r in zip(asked, images, answers)], boxes, [i.size for i in images])
    attention, gradient = play(lambda *a: attention_maps(*a).total), play(grad_cam)
    assert attention["hit"]["low"] > attention["chance"] and attention["mass"]["low"] > attention["area"]
    assert gradient["mass"]["low"] > gradient["area"]
    shuffle_weights(model)
    attention, gradient = play(lambda *a: attention_maps(*a).total), play(grad_cam)
    for got in (attention, gradient): assert got["hit"]["low"] <= got["chance"] and got["mass"]["value"] == pytest.approx(got["area"], abs=.1)

def test_shuffling_keeps_the_numbers_and_loses_their_order():
    (a, _), (b, _), (c, _) = (load_model(NAMES[0]) for _ in range(3))
    shuffle_weights(a, 1), shuffle_weights(b, 1)
    moved = 0
    for p, q, r in zip(a.parameters(), b.parameters(), c.parameters()):
        assert torch.equal(p, q) and p.shape == r.shape and torch.equal(p.flatten().sort()[0], r.flatten().sort()[0])
        moved += not torch.equal(p, r)
    assert moved > .8*len(list(a.parameters()))

@pytest.mark.parametrize("name", FINDINGS)
def test_the_box_holds_what_the_finding_changes(name):
    for k, place in enumerate(FINDINGS[name]):
        film = dict(patient=50 + k, visit=k % 2, seed=5)
        l, t, r, b = finding_box({name: place}, name, **film)
        changed = abs(draw_phantom({name: place}, **film).astype(int) - draw_phantom({}, **film)) > 15
        h, w = changed.shape
        assert 0 <= l < r <= w and 0 <= t < b <= h
        outside = changed.copy(); outside[t:b, l:r] = False
        assert not outside.any() and all(edge.any() for edge in (changed[t, l:r], changed[b-1, l:r], changed[t:b, l], changed[t:b, r-1]))
        if place is not True: assert ((l + r)/2 > w/2) == place.startswith("left") # the patient's left is on the viewer's right

def test_a_box_beside_another_finding():
    "Only what the one finding changes, on a film with two."
    both = {"cardiomegaly": True, "nodule": "right upper"}
    l, t, r, b = finding_box(both, "nodule", patient=60, seed=1)
    h, w = draw_phantom(both, patient=60, seed=1).shape
    assert r - l < .25*w and b - t < .25*h and (l + r)/2 < w/2 and (t + b)/2 < h/2

# --- agreement

@pytest.mark.parametrize("samples, reply, question, value", [
    (["yes", "Yes.", "Yes, there is one.", "no"], "yes", "Is there a nodule?", .75),
    (["There is no nodule.", "no", "There is a nodule."], "No.", "Is there a nodule?", 2/3),
    (["maybe", "yes or no", "", "Yes"], "Yes, there is a nodule.", "Is there a nodule?", .25),
    (["On the left.", "right", "left"], "left", "Is it on the left or the right?", 2/3),
    (["left lower lung", "Left upper lung.", "left"], "left upper lung", "Where is the nodule?", 1/3), # the same side is not the same place
    (["a nodule", "Nodule", "a mass"], "nodule", "What is it?", None),
    (["B", "B) lung", "A"], "B", "Which organ? A) heart B) lung", 2/3),
    (["absent", "present"], "Absent.", "Is it present, absent or indeterminate?", .5)])
def test_saying_the_same(samples, reply, question, value):
    from medchat.metrics import normalise_answer, wilson_interval
    got = agreement(samples, reply, question)
    if value is None: value = sum(normalise_answer(s) == normalise_answer(reply) for s in samples)/len(samples)
    assert got["value"] == pytest.approx(value) and got["n"] == len(samples)
    assert (got["low"], got["high"]) == pytest.approx(wilson_interval(value, len(samples))) and got["low"] <= value <= got["high"]

@pytest.mark.parametrize("reply", ["", "...", "?"])
def test_a_reply_without_words_agrees_with_its_like(reply): assert agreement(["", "yes"], reply, "Is it?")["value"] == .5

@given(st.lists(st.sampled_from(["yes", "no", "left upper nodule", ""]), max_size=8), st.sampled_from(["yes", "left upper nodule"]))
def test_the_order_of_the_samples_does_not_matter(samples, reply): assert agreement(samples, reply) == agreement(samples[::-1], reply)
