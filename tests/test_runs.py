"The run folder: its log, its checkpoints, and whether a run may go on."
import json, math, os, shutil, signal, threading
from types import SimpleNamespace
import pytest
from fastcore.test import test_eq as eq
from hypothesis import given, strategies as st
from data_maker import make_data, questions
from medchat import runs as module
from medchat.core import MedchatError
from medchat.plots import read_log
from medchat.runs import catching_interrupt, check_numbers, check_run, cut_log, data_hash, last_checkpoint, log_row, make_logger, steps_done, versions

@pytest.fixture(scope="module")
def data(tmp_path_factory): return make_data(tmp_path_factory.mktemp("source"), questions())

# -- the log

def test_a_row_says_what_is_known_in_our_words():
    eq(log_row(3, dict(loss=.5, learning_rate=1e-3, grad_norm=1., mean_token_accuracy=.25, num_tokens=12, contrast=2., epoch=.123456, something=1), 1.239),
       dict(step=3, epoch=.1235, loss=.5, learning_rate=1e-3, grad_norm=1., contrast=2., token_accuracy=.25, tokens=12, seconds=1.24))
    eq(log_row(3, dict(eval_loss=.5, eval_mean_token_accuracy=.75, eval_closed_accuracy=.5, eval_runtime=9), 2), dict(step=3, epoch=0, eval_loss=.5, eval_token_accuracy=.75, closed_accuracy=.5, seconds=2))
    eq(log_row(6, dict(train_loss=1, train_runtime=3), 2), None)

def test_a_row_is_json_that_everybody_reads():
    row = log_row(1, dict(loss=1., grad_norm=math.inf, mean_token_accuracy=math.nan), 1)
    json.loads(json.dumps(row, allow_nan=False)); assert "grad_norm" not in row

class Control: should_save = should_training_stop = False
def state(step, zero=True): return SimpleNamespace(global_step=step, is_world_process_zero=zero)

def told(run, patience, losses, total=100):
    "A logger that was told of validation losses, one a step: the step after which it wants to end."
    logger = make_logger(run, total, patience=patience)
    for step, loss in enumerate(losses):
        logger.on_evaluate(None, state(step), control := Control(), metrics=dict(eval_loss=loss))
        if control.should_training_stop: return step

@pytest.mark.parametrize("patience, losses, end", [(1, [3, 2, 1], None), (1, [3, 3], 1), (2, [3, 4, 2, 3, 1], None), (2, [3, 4, 5], 2), (3, [1, 2, 2, 2], 3), (3, [1, 2, 2, .5, 2, 2, 2], 6), (None, [1, 2, 3, 4], None), (1, [1], None)])
def test_patience_counts_looks_without_a_better_one(tmp_path, patience, losses, end): eq(told(tmp_path, patience, losses), end)

@given(st.lists(st.floats(0, 9), min_size=1, max_size=12), st.integers(1, 4), st.data())
def test_patience_does_not_forget_when_a_run_is_resumed(tmp_path_factory, losses, patience, data):
    run = tmp_path_factory.mktemp("run")
    end = told(run, patience, losses)
    cut = data.draw(st.integers(0, len(losses) if end is None else end))
    (run/"log.jsonl").write_text("".join(json.dumps(dict(step=i, eval_loss=l, seconds=i)) + "\n" for i, l in enumerate(losses[:cut])))
    later = told(run, patience, losses[cut:])
    eq(None if later is None else later + cut, end)

def test_an_end_that_was_decided_stays_decided(tmp_path):
    (tmp_path/"log.jsonl").write_text("".join(json.dumps(dict(step=i, eval_loss=l, seconds=i)) + "\n" for i, l in enumerate((1, 2, 3))))
    eq([make_logger(tmp_path, 100, patience=p).ended for p in (1, 2, 3, None)], [True, True, False, False])

def test_the_last_step_is_no_early_end(tmp_path):
    eq(told(tmp_path, 1, [1, 2], total=1), None)

def test_the_log_is_written_once_by_the_first_process(tmp_path, capsys):
    for zero in (False, True):
        logger = make_logger(tmp_path, 4, before=7.)
        logger.on_train_begin(None, state(0, zero), Control())
        for step in (1, 2): logger.on_log(None, state(step, zero), Control(), logs=dict(loss=.5))
        logger.close()
    rows = read_log(tmp_path)
    eq([r["step"] for r in rows], [1, 2]); assert rows[0]["seconds"] >= 7

def test_ctrl_c_once_saves_and_ends_twice_stops_at_once(tmp_path):
    logger = make_logger(tmp_path, 9)
    logger.on_train_begin(None, state(0), Control())
    logger.interrupt()
    logger.on_step_end(None, state(1), control := Control())
    eq((control.should_save, control.should_training_stop), (True, True))
    with pytest.raises(KeyboardInterrupt): logger.interrupt()
    logger.close()

def test_ctrl_c_is_only_caught_while_it_is_open_and_in_the_main_thread():
    usual, seen = signal.getsignal(signal.SIGINT), []
    with catching_interrupt(lambda *_: seen.append(1)): signal.raise_signal(signal.SIGINT)
    eq((seen, signal.getsignal(signal.SIGINT)), ([1], usual))
    def elsewhere():
        with catching_interrupt(print): seen.append(signal.getsignal(signal.SIGINT))
    (thread := threading.Thread(target=elsewhere)).start(); thread.join()
    eq(seen[1], usual)

@pytest.mark.parametrize("name", ["loss", "eval_loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_named_with_its_records(tmp_path, name, value):
    check_numbers(tmp_path, 3, {name: 1., "other": value}, ["a"]); eq(list(tmp_path.iterdir()), [])
    with pytest.raises(MedchatError, match=f"the {name} is no longer a number: step 3") as e: check_numbers(tmp_path, 3, {name: value}, ["a", "b"])
    assert "\n" not in str(e.value)
    eq(json.loads((tmp_path/"bad_batch.json").read_text()), dict(step=3, what=name, records=[] if name == "eval_loss" else ["a", "b"])) # at a look nothing is noted

# -- checkpoints

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")

def make_checkpoint(run, step, without=(), state=None):
    folder = run/"checkpoints"/f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in set(FILES) - set(without): (folder/name).write_text(json.dumps(dict(global_step=step)) if state is None else state)
    return folder

def test_the_newest_by_number(tmp_path):
    eq(last_checkpoint(tmp_path), None)
    for step in (2, 100, 20): make_checkpoint(tmp_path, step)
    eq(last_checkpoint(tmp_path).name, "checkpoint-100")
    eq((steps_done(last_checkpoint(tmp_path)), steps_done(None)), (100, 0))

@pytest.mark.parametrize("missing", FILES)
def test_a_checkpoint_that_lacks_a_file_is_passed_over(tmp_path, missing):
    make_checkpoint(tmp_path, 2); make_checkpoint(tmp_path, 4, without=[missing])
    eq(last_checkpoint(tmp_path).name, "checkpoint-2")

@pytest.mark.parametrize("state", ["", "{", "[]", "null", "{}", '{"global_step": "4"}', '{"global_st', "\x00"*10])
def test_a_checkpoint_whose_state_is_cut_short_is_passed_over(tmp_path, state):
    make_checkpoint(tmp_path, 2); make_checkpoint(tmp_path, 4, state=state)
    eq(last_checkpoint(tmp_path).name, "checkpoint-2")

def test_a_checkpoint_of_several_processes_has_the_random_state_of_each(tmp_path):
    (tmp_path/"config.json").write_text(json.dumps(dict(base="b", medchat="1", processes=2)))
    for step in (2, 4):
        folder = make_checkpoint(tmp_path, step, without=["rng_state.pth"])
        for rank in range(2 if step == 2 else 1): (folder/f"rng_state_{rank}.pth").write_text("")
    eq(last_checkpoint(tmp_path).name, "checkpoint-2")

# -- going on

def test_cutting_takes_away_what_will_be_done_again(tmp_path):
    eq(cut_log(tmp_path, 3), 0.)
    rows = [dict(step=s, loss=1., seconds=s*1.5) for s in range(6)]
    for name in ("log.jsonl", "answers.jsonl"): (tmp_path/name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    eq(cut_log(tmp_path, 3), 4.5)
    for name in ("log.jsonl", "answers.jsonl"): eq([json.loads(l) for l in (tmp_path/name).open()], rows[:4])
    (tmp_path/".best.77.tmp").mkdir(); (tmp_path/".best.77.tmp"/"half").write_text(""); (tmp_path/".config.json.77.tmp").write_text("")
    eq(cut_log(tmp_path, -1), 0.); eq(read_log(tmp_path), [])
    eq(sorted(p.name for p in tmp_path.iterdir()), ["answers.jsonl", "log.jsonl"])

@given(st.integers(1, 200))
def test_a_line_that_was_cut_short_is_no_obstacle(tmp_path_factory, n):
    run = tmp_path_factory.mktemp("run")
    text = "".join(json.dumps(dict(step=s, loss=.25, word="β", seconds=s)) + "\n" for s in range(5)).encode()
    (run/"log.jsonl").write_bytes(text[:-n])
    cut_log(run, 99)
    kept = (run/"log.jsonl").read_bytes()
    assert text.startswith(kept) and (not kept or kept.endswith(b"\n")) and len(text) - n - len(kept) < 60

def config(**more): return dict(base="b", medchat="1", base_sha256="0", data_sha256="1", data="d", learning_rate=1., versions={}, patience=None, eval_steps=3) | more

def test_what_may_differ_and_what_may_not(tmp_path):
    run = tmp_path/"run"
    eq(check_run(run, config(), False), None); eq(check_run(run, config(), True), None)
    run.mkdir(); (run/"config.json").write_text(json.dumps(config()))
    with pytest.raises(MedchatError, match="already there.*--resume"): check_run(run, config(), False)
    make_checkpoint(run, 2)
    eq(check_run(run, config(data="elsewhere", versions=dict(torch="3"), eval_steps=4, save_steps=9), True).name, "checkpoint-2")
    for key, value, name in (("base_sha256", "2", "base"), ("data_sha256", "2", "data"), ("learning_rate", 2., "learning_rate"), ("contrast", .1, "contrast"), ("patience", 3, "patience")):
        with pytest.raises(MedchatError, match=f"made with another {name}: "): check_run(run, config(**{key: value}), True)
    (run/"config.json").write_text(json.dumps(config(patience=3)))
    with pytest.raises(MedchatError, match="made with another eval_steps"): check_run(run, config(patience=3, eval_steps=4), True) # it decides when the run ends

def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path/"thesis.doc").write_text("mine")
    with pytest.raises(MedchatError, match="already there"): check_run(tmp_path, config(), False)
    with pytest.raises(MedchatError, match="not a run folder"): check_run(tmp_path, config(), True)
    with pytest.raises(MedchatError, match="not a folder"): check_run(tmp_path/"thesis.doc", config(), True)

# -- fingerprints

def test_other_shards_are_other_data(data, tmp_path):
    other = shutil.copytree(data, tmp_path/"data")
    eq(data_hash(other), data_hash(data))
    shutil.rmtree(other/"train"); shutil.copytree(other/"test", other/"train")
    assert data_hash(other) != data_hash(data)

def test_what_is_no_dataset_has_no_fingerprint(tmp_path):
    with pytest.raises(MedchatError, match="not a dataset folder.*medchat convert"): data_hash(tmp_path)

def test_versions_name_what_a_result_depends_on():
    found = versions()
    assert {"python", "medchat", "torch", "transformers", "trl", "peft", "datasets"} <= set(found) and all(found.values())
