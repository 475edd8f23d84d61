"""Faults in a training process that knows nothing of them: put this folder on PYTHONPATH and describe them in FAULTS (JSON).

FAULTS: a list of {"kind": a function's name below, "rank": whose, and either "step": when (updates done) and "once": a file
that is made when the fault has happened, so that it happens once over all starts, or "trigger": a file that makes it happen
and that it removes}. Patches megagpt right after it has been imported.
"""

import ctypes
import errno
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from importlib.abc import MetaPathFinder


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def due(fault: dict, step: int) -> bool:
    """Whether it is this fault's turn, which comes only once."""
    if "trigger" in fault:
        return rank() == fault["rank"] and triggered(fault["trigger"])
    if rank() != fault["rank"] or step < fault["step"] or os.path.exists(fault["once"]):
        return False
    with open(fault["once"], "w") as file:
        file.write(f"{time.time()}\n")
    return True


def triggered(path: str) -> bool:
    try:
        os.rename(path, f"{path}.done")
    except FileNotFoundError:
        return False
    return True


def block_on_fifo(folder: str) -> None:
    path = os.path.join(folder, "stuck_file")
    if not os.path.exists(path):
        os.mkfifo(path)
    with open(path, "rb") as file:  # nobody ever writes
        file.read()


def before_forward(train, fault, action) -> None:
    from megagpt.train import step as training_step

    original = training_step.seed_dropout

    def seed_dropout(config, step, batch):
        if due(fault, step):
            action()
        original(config, step, batch)

    training_step.seed_dropout = seed_dropout


def in_loader(train, fault, action) -> None:
    from megagpt.data import dataset as samples

    original = samples.TokenDataset.sample

    def sample(self, index):
        if due(fault, index // fault["batch"]):
            return action(original, self, index)
        return original(self, index)

    samples.TokenDataset.sample = sample


def lock(train, fault) -> None:
    def action():
        the_lock = threading.Lock()
        the_lock.acquire()
        the_lock.acquire()

    before_forward(train, fault, action)


def busy(train, fault) -> None:
    def action():
        while True:
            pass

    before_forward(train, fault, action)


def collective(train, fault) -> None:
    import torch.distributed

    before_forward(train, fault, lambda: torch.distributed.all_reduce(torch.zeros(7)))


def stopped(train, fault) -> None:
    before_forward(train, fault, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def killed(train, fault) -> None:
    before_forward(train, fault, lambda: os.kill(os.getpid(), signal.SIGKILL))


def out_of_memory(train, fault) -> None:
    """The host's memory does not suffice, or a device's as torch says it."""

    def action():
        import torch

        if fault.get("device"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has too little.")
        torch.empty(1 << 60, dtype=torch.uint8)

    before_forward(train, fault, action)


def out_of_memory_in_evaluation(train, fault) -> None:
    """The host's memory does not suffice for an evaluation."""
    from megagpt.train import between_steps

    def evaluate_sources(*arguments, **options):
        import torch

        return torch.empty(1 << 60, dtype=torch.uint8)

    between_steps.evaluate_sources = evaluate_sources


def interpreter(train, fault) -> None:
    before_forward(train, fault, lambda: ctypes.PyDLL(None).sleep(3600))  # PyDLL keeps the interpreter's lock


def loader(train, fault) -> None:
    in_loader(train, {"batch": 1, **fault}, lambda *_: time.sleep(3600))


def loader_file(train, fault) -> None:
    in_loader(train, fault, lambda *_: block_on_fifo(os.path.dirname(fault["once"])))


def loader_dead(train, fault) -> None:
    from concurrent.futures import Future

    original = train.Loader._start

    def start(self, state):
        key, future = original(self, state)
        return (key, Future()) if due(fault, state.step) else (key, future)

    train.Loader._start = start


def save_file(train, fault) -> None:
    original = train.checkpoint.write_partitions

    def write(folder, *rest):
        if due(fault, int(str(folder).rpartition("_")[2])):
            block_on_fifo(os.path.dirname(fault["once"]))
        return original(folder, *rest)

    train.checkpoint.write_partitions = write


def disk_full(train, fault) -> None:
    original = train.checkpoint.write_partitions

    def write(folder, *rest):
        if due(fault, 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return original(folder, *rest)

    train.checkpoint.write_partitions = write


def evaluation(train, fault) -> None:
    """The thread that evaluates waits for ever for validation data."""
    each_validation_window(fault, lambda: time.sleep(3600))


def slow_evaluation(train, fault) -> None:
    """Each window of validation data takes `seconds`; the file `mark` says that an evaluation has begun."""

    def action():
        with open(fault["mark"], "a"):
            pass
        time.sleep(fault["seconds"])

    each_validation_window({"always": True, **fault}, action)


def each_validation_window(fault, action) -> None:
    from megagpt.data import dataset as samples

    original = samples.TokenDataset.window

    def window(self, index):
        if fault.get("always") or due(fault, fault.get("step", 0)):
            action()
        return original(self, index)

    samples.TokenDataset.window = window


def long_evaluation(train, fault) -> None:
    """Once it is triggered, the next `windows` windows of validation data take `seconds` each."""
    left = [0]

    def action():
        if due(fault, 0):
            left[0] = fault["windows"]
        if left[0] > 0:
            left[0] -= 1
            time.sleep(fault["seconds"])

    each_validation_window({**fault, "always": True}, action)


def slow_tokens(module, fault) -> None:
    original = module.generate_ids

    def generate_ids(*arguments, **options):
        for tokens in original(*arguments, **options):
            with open(fault["mark"], "a"):
                pass
            time.sleep(fault["seconds"])
            yield tokens

    module.generate_ids = generate_ids


def slow_sampling(train, fault) -> None:
    """Each token of generated text takes `seconds`."""
    from megagpt.train import between_steps

    slow_tokens(between_steps, fault)


def sampling_out_of_memory(train, fault) -> None:
    """There is no memory for the sample of text."""
    import torch

    from megagpt.train import between_steps

    def sample(run, state):
        raise torch.OutOfMemoryError("out of memory in the sample")

    between_steps.sample = sample


def slow_answers(train, fault) -> None:
    """Each token of a generated answer takes `seconds`."""
    from megagpt.evaluate import generated_answers

    slow_tokens(generated_answers, fault)


def slow_save(train, fault) -> None:
    """The disk takes `seconds` for each slice of a checkpoint."""
    from megagpt.checkpoint import partitions as pieces

    original = pieces._write_all

    def write_all(file, data):
        time.sleep(fault["seconds"])
        original(file, data)

    pieces._write_all = write_all


def slow_load(train, fault) -> None:
    """Drawing the first weights takes `seconds`, inside C code that no signal interrupts."""
    original = train.draw_weights

    def draw_weights(*arguments):
        if rank() == fault.get("rank", rank()):
            with open(fault["mark"], "a"):
                pass
            sleep_in_c(fault["seconds"])
        original(*arguments)

    train.draw_weights = draw_weights


def short_waits(train, fault) -> None:
    """Collectives give up after `seconds`, not half an hour."""
    from datetime import timedelta

    import torch.distributed as dist

    original = train.init_world

    def init_world(**options):
        world = original(**options)
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=fault["seconds"]), world.control)
        return world

    train.init_world = init_world


def sleep_in_c(seconds: float) -> None:
    """Sleep so long, whatever signals come: each ends the sleep of C, which begins again."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        ctypes.CDLL(None).usleep(int(min(left, 1.0) * 1e6))


def slow_reload(train, fault) -> None:
    """Loading takes `seconds` when the guard goes back, inside C code that no signal interrupts."""
    original, calls = train.load_newest, []

    def load_newest(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            with open(fault["mark"], "a"):
                pass
            sleep_in_c(fault["seconds"])
        return original(*arguments)

    train.load_newest = load_newest


def before_training_forwards(train, action) -> None:
    """Call `action` in each forward pass of the training, not in those of evaluation."""
    import torch

    build = train.build_engine

    def build_engine(*arguments, **options):
        engine = build(*arguments, **options)
        engine.module.register_forward_pre_hook(lambda *_: action() if torch.is_grad_enabled() else None)
        return engine

    train.build_engine = build_engine


def slow_first_forward(train, fault) -> None:
    """The first forward pass takes `seconds`, as one that is compiled does."""

    def wait():
        if not os.path.exists(f"{fault['mark']}_{rank()}"):
            for path in (f"{fault['mark']}_{rank()}", fault["mark"]):
                with open(path, "a"):
                    pass
            sleep_in_c(fault["seconds"])

    before_training_forwards(train, wait)


def slow(train, fault) -> None:
    """One rank's forward passes take longer."""

    def wait():
        if rank() == fault["rank"]:
            time.sleep(0.1)

    before_training_forwards(train, wait)


def poisoned(train, fault) -> None:
    """Samples of some steps are noise, as from a damaged dump: [from, until) in steps, on every rank, at every pass."""
    from dataclasses import replace

    from megagpt.data import dataset as samples

    original = samples.TokenDataset.sample

    def sample(self, index):
        found = original(self, index)
        if any(start * fault["batch"] <= index < end * fault["batch"] for start, end in fault["windows"]):
            noise = samples.np.random.default_rng(index).integers(128, 250, len(found.inputs))
            return replace(found, inputs=noise, targets=noise[::-1].copy())
        return found

    samples.TokenDataset.sample = sample


def not_a_number(train, fault) -> None:
    """The loss is NaN in one micro-batch of `count` steps that follow each other, not next to a save."""
    build = train.build_engine

    def build_engine(*arguments, **options):
        engine = build(*arguments, **options)
        backward, bad_steps = engine.backward, [0]

        def poisoned_backward(loss, *, last):
            between = 2 <= engine.updates % fault.get("save_every", 1 << 30) <= fault.get("save_every", 1 << 30) - 8
            if bad_steps[0] == 0 and between and due(fault, engine.updates):
                bad_steps[0] = fault.get("count", 1)
            backward(loss * float("nan") if bad_steps[0] else loss, last=last)
            bad_steps[0] -= bool(last and bad_steps[0])

        engine.backward = poisoned_backward
        return engine

    train.build_engine = build_engine


def count_fetches(train, fault) -> None:
    """Write into the file `counts` of rank 0, a line per step, what between its first launch and its last would make the host
    wait for a GPU: operations whose result has to be on the host, by name."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "repeat_interleave", "equal")
    found = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.__name__.partition(".")[0]
            found.extend([name] if name in waiting else [])
            return func(*args, **(kwargs or {}))

    def counted(name):
        original = getattr(Tensor, name)

        def method(self, *arguments, **options):
            if threading.current_thread() is threading.main_thread():  # loader and saver work on the host
                found.append(name)
            return original(self, *arguments, **options)

        return method

    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        setattr(Tensor, name, counted(name))
    launch = train.Launch.__call__

    def counting_launch(self, *arguments):
        found.clear()
        with Counter():
            launched = launch(self, *arguments)
        if rank() == 0:
            with open(fault["counts"], "a") as file:
                file.write(json.dumps(found) + "\n")
        return launched

    train.Launch.__call__ = counting_launch


class Patcher(MetaPathFinder):
    """Applies the faults once megagpt.train.loop is there."""

    def find_spec(self, name, path=None, target=None):
        if name != "megagpt.train.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for fault in json.loads(os.environ["FAULTS"]):
                globals()[fault["kind"]](module, fault)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("FAULTS"):
    sys.meta_path.insert(0, Patcher())
