"""A run whose base is shared out (`--shard`), in two processes on a CPU: torchrun --nproc-per-node 2 shard_on_cpu.py RUN SETTINGS-AS-JSON

accelerate shares a base out on accelerators only, though FSDP itself works on a CPU as well. Here it is told that a CPU will
do; everything else is as on GPUs: the trainer's FSDP, the parts of the 4-bit weights, the gathered adapter."""
import inspect, json, re, sys, textwrap
from pathlib import Path
import torch
from accelerate import state
from accelerate.utils import DistributedType # the source below names it

torch.set_num_threads(1)
source, n = re.subn(r"(elif self\.distributed_type in \[\s*)(DistributedType\.MULTI_GPU)", r"\1DistributedType.MULTI_CPU, \2", textwrap.dedent(inspect.getsource(state.AcceleratorState.__init__)))
assert n == 1, "accelerate has changed: look at AcceleratorState.__init__"
made = {}
exec(compile(source, state.__file__, "exec"), state.__dict__, made)
state.AcceleratorState.__init__ = made["__init__"]

from medchat import train as module
from transformers import TrainerCallback
run, s = Path(sys.argv[1]), json.loads(sys.argv[2])

def watched(*args, make=module.make_trainer, **kwargs):
    trainer = make(*args, **kwargs)
    class Look(TrainerCallback):
        "Writes down what this process holds."
        def on_train_begin(self, args, state, control, model=None, **_):
            weights = list(model.parameters())
            mine = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in weights)
            found = dict(shared=trainer.is_fsdp_enabled, share=mine / sum(p.numel() for p in weights), four_bit=sum(p.dtype == torch.uint8 for p in weights))
            (run/f"rank{trainer.args.process_index}.json").write_text(json.dumps(found))
    trainer.add_callback(Look())
    return trainer

module.make_trainer = watched
dataset, lessons = module.read_lessons(s)
module._work(run, s, module.make_config(s, dataset, lessons), None, 0., (), (dataset, lessons))
