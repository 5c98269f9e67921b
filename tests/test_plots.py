"Figures of runs: faults and edges."
import io, json, re
from pathlib import Path
import pytest
from fastcore.test import test_eq as eq
from hypothesis import given, strategies as st
from medchat.core import MedchatError
from medchat.plots import LOOKS, draw_loss, loss_figure, make_live_plot, plot_runs, read_log, smooth, spread

def make_run(folder, rows=None, name="run"):
    run = Path(folder)/name
    run.mkdir(parents=True)
    (run/"config.json").write_text(json.dumps(dict(medchat="0", base="tiny-qwen2-vl")))
    if rows is None: rows = [dict(step=s, loss=3/s + .1) for s in range(1, 41)] + [dict(step=s, eval_loss=3/(s+1) + .2) for s in range(0, 41, 10)]
    if rows: (run/"log.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return run

def test_one_run_draws_into_its_own_folder(tmp_path, capsys):
    run = make_run(tmp_path)
    eq(plot_runs([str(run)]), [run/"loss.png", run/"loss.svg"])
    assert (run/"loss.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (run/"loss.svg").read_text()
    assert "loss.png" in capsys.readouterr().out

@pytest.mark.parametrize("out, files", [("a.png", ["a.png", "a.svg"]), ("a.svg", ["a.png", "a.svg"]), ("deep/er/a.PNG", ["deep/er/a.png", "deep/er/a.svg"]), ("plain", ["plain.png", "plain.svg"])])
def test_several_runs_draw_into_a_file(tmp_path, out, files):
    runs = [str(make_run(tmp_path, name=f"run {i}")) for i in range(7)]
    eq(plot_runs(runs, out=str(tmp_path/out)), [tmp_path/f for f in files])
    assert all((tmp_path/f).is_file() for f in files)
    text = (tmp_path/files[1]).read_text()
    eq(len(re.findall("<!-- run [0-9] (training|validation) -->", text)), 14)

def test_a_single_run_may_be_given_without_a_list(tmp_path): eq(len(plot_runs(str(make_run(tmp_path)))), 2)

def no_log(d): return make_run(d, rows=[])
def broken_log(d):
    run = make_run(d)
    with open(run/"log.jsonl", "a") as f: f.write('{"step": 4')
    return run

@pytest.mark.parametrize("make, says", [(lambda d: d/"none", "not a run folder"), (lambda d: d, "not a run folder"), (no_log, "not logged a step yet"), (broken_log, "not a line of JSON")])
def test_what_cannot_be_drawn_is_one_line_and_leaves_nothing(tmp_path, make, says):
    run = make(tmp_path)
    with pytest.raises(MedchatError, match=says) as e: plot_runs([str(run)])
    assert "\n" not in str(e.value) and not list(tmp_path.rglob("*loss*"))

@pytest.mark.parametrize("kwargs, says", [(dict(runs=[]), "no run to plot"), (dict(out="x.gif"), "unknown kind of figure"), (dict(out="x.pdf"), "unknown kind of figure")])
def test_bad_wishes_are_refused(tmp_path, kwargs, says):
    with pytest.raises(MedchatError, match=says): plot_runs(**{"runs": [str(make_run(tmp_path))], **kwargs})

def test_no_room_to_write(tmp_path, no_write):
    with pytest.raises(MedchatError) as e: plot_runs([str(make_run(tmp_path))], out=str(no_write/"x.png"))
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("rows", [[dict(step=1, loss=2.)], [dict(step=0, eval_loss=2.)], [dict(step=5, loss=0.), dict(step=5, eval_loss=0.)], [dict(step=s, loss=2.) for s in range(1, 3)],
    [dict(step=s, loss=1e6/s) for s in range(1, 9)]], ids=["one step", "only a validation", "zero", "flat", "huge"])
def test_odd_logs_are_drawn(tmp_path, rows): plot_runs([str(make_run(tmp_path, rows))])

def test_the_figure_is_the_same_every_time(tmp_path):
    run = make_run(tmp_path)
    pictures = []
    for _ in range(2):
        plot_runs([str(run)])
        pictures.append((run/"loss.png").read_bytes())
    eq(*pictures)
    assert str(tmp_path) not in (run/"loss.svg").read_text() and "dc:date" not in (run/"loss.svg").read_text()

def test_runs_differ_without_colour():
    from matplotlib.figure import Figure
    axis = Figure().add_subplot()
    log = [dict(step=s, loss=1/s) for s in range(1, 9)] + [dict(step=s, eval_loss=1.) for s in (0, 8)]
    for look in range(len(LOOKS)): draw_loss(axis, log, f"run {look}", look)
    strong = [l for l in axis.lines if l.get_alpha() is None]
    styles = {(str(l._dash_pattern), l.get_marker()) for l in strong}
    eq(len(styles), 2*len(LOOKS))

def test_names_stand_beside_their_lines_and_apart(tmp_path):
    from matplotlib.text import Text
    runs = [str(make_run(tmp_path, name=f"run {i}")) for i in range(4)]
    figure = loss_figure(runs)
    figure.savefig(io.BytesIO(), format="png")
    boxes = [Text.get_window_extent(t) for t in figure.axes[0].texts] # without the arrows
    eq(len(boxes), 8)
    for i, a in enumerate(boxes):
        assert a.x1 <= figure.bbox.x1 and a.y0 >= 0 and a.y1 <= figure.bbox.y1, "a name leaves the figure"
        assert not any(a.overlaps(b) for b in boxes[i+1:]), "two names overlap"

numbers = st.floats(-1e3, 1e3, allow_nan=False)

@given(st.lists(numbers, max_size=12), st.floats(.01, 10))
def test_spread_keeps_order_distance_and_centre(heights, gap):
    out = spread(heights, gap)
    eq(len(out), len(heights))
    pairs = sorted(zip(heights, out))
    assert all(b - a >= gap*.99 for a, b in zip(sorted(out), sorted(out)[1:]))
    assert all(b[1] >= a[1] for a, b in zip(pairs, pairs[1:]) if b[0] > a[0])
    assert all(v >= 0 for v in spread(heights, gap, floor=0.))
    if out: assert abs(sum(out) - sum(heights)) < 1e-6*max(1, len(out))*1e3

@given(st.lists(numbers, min_size=1, max_size=50), st.floats(0, .99))
def test_smooth_stays_between_the_extremes(values, share):
    out = smooth(values, share)
    eq(len(out), len(values)); assert abs(out[0] - values[0]) < 1e-6
    assert all(min(values) - 1e-6 <= v <= max(values) + 1e-6 for v in out)

def test_the_live_plot_draws_in_place_and_not_too_often(tmp_path, monkeypatch):
    import IPython.display as d
    shown = []
    class Page:
        def update(self, image): shown.append(("update", image))
    monkeypatch.setattr(d, "display", lambda image, display_id: shown.append(("new", image)) or Page())
    live = make_live_plot(make_run(tmp_path), every=1000)
    for _ in range(5): live.on_log()
    live.on_train_end()
    eq([how for how, _ in shown], ["new", "update"])
    assert all(image.data.startswith(b"\x89PNG") for _, image in shown)

def test_the_log_of_no_run_is_empty(tmp_path): eq(read_log(tmp_path), [])
