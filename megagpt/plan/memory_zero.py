"""Memory of the DeepSpeed engine (0.19.8): ZeRO 0 to 3, their flat partitions and buckets, in the order in which they are made.

Stage 0 and stage 1 in bf16 (DeepSpeed's BF16_Optimizer) reduce copies of all gradients after the backward pass; stage 2, and
stage 1 in fp32, fill buckets; stage 3 gathers weights module by module, prefetches up to a number of elements, and frees
weights that are not used again soon.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megagpt.engine.config import DeepSpeedConfig
from megagpt.engine.optim import OPTIMIZERS
from megagpt.plan.timeline import (
    Job,
    Shapes,
    Timeline,
    checkpointing_of,
    play_passes,
    shapes_of,
    state_bytes,
    trace_block,
    update_scratch,
    width_of,
)
from megagpt.plan.trace import Made

ALLREDUCE_ELEMENTS = 500_000_000
"""DeepSpeed's elements_per_buffer: gradients that stage 0 and BF16_Optimizer copy into one buffer to reduce them."""
MAX_REUSE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""DeepSpeed's sub_group_size: elements of a rank's partition that stage 3 updates together."""
NORM_WIDTH = 8
"""Bytes per element in a norm: DeepSpeed computes norms in fp64, one tensor at a time."""


def play_zero(job: Job, engine: DeepSpeedConfig, timeline: Timeline) -> None:
    """Simulate a step of the ZeRO stage that is configured."""
    timeline.change("inputs", 8 * job.micro_batch_size * job.seq_len)
    if engine.zero_stage == 3:
        _play_3(job, engine, timeline)
    elif engine.zero_stage == 0 or (engine.zero_stage == 1 and job.precision == "bf16" and not engine.offload_optimizer):
        _play_whole_gradients(job, engine, timeline)
    else:
        _play_buckets(job, engine, timeline)


def _play_whole_gradients(job: Job, engine: DeepSpeedConfig, timeline: Timeline) -> None:
    """Stage 0, and stage 1 in bf16: whole gradients on every rank."""
    shapes, width = shapes_of(job.model), width_of(job)
    numel = _numel(shapes)
    shards = job.ranks if engine.zero_stage else 1
    timeline.change("weights" if engine.zero_stage else "master weights", width * numel)
    if engine.zero_stage:
        timeline.change("gradients", 4 * numel)
        timeline.change("master weights", 4 * -(-numel // shards))
    timeline.change("optimizer states", _state_bytes(job, shapes) // shards)
    for micro in range(job.accumulation):
        timeline.phase = f"forward {micro + 1}"
        # Later micro-batches add into the gradients of the first, in place.
        play_passes(job, timeline, "kept" if micro == 0 else "taken", micro=micro)
        timeline.drop("activations")
        timeline.change("whole gradients", width * numel if micro == 0 else 0)
        if engine.zero_stage:
            timeline.touch({"whole gradients": 4 * max(shape.numel() for shape in shapes.values())})
    timeline.phase = "update"
    together = min(numel, ALLREDUCE_ELEMENTS + max(shape.numel() for shape in shapes.values()))
    if job.ranks > 1 or engine.zero_stage:  # DeepSpeed also copies them on a single rank; megagpt reduces stage 0 itself
        cast = 2 * together if engine.reduce_dtype == "bf16" else 0
        timeline.touch({"all-reduce buffers": 4 * together + cast})
    timeline.touch(update_scratch(job.optim, _matrices(shapes) // shards if engine.zero_stage else _largest(shapes)))


def _play_buckets(job: Job, engine: DeepSpeedConfig, timeline: Timeline) -> None:
    """Stage 2, and stage 1 in fp32 or with offload: gradients go through buckets into this rank's partition."""
    shapes, width = shapes_of(job.model), width_of(job)
    numel, partition = _numel(shapes), -(-_numel(shapes) // job.ranks)
    offload = engine.offload_optimizer
    timeline.change("weights", width * numel)
    timeline.keep("master weights", 4 * partition, on_host=offload)
    timeline.keep("optimizer states", _state_bytes(job, shapes) // job.ranks, on_host=offload)
    if offload:
        timeline.keep("gradients", 4 * partition, on_host=True)
    buckets = width * engine.reduce_bucket_elements * (2 if engine.overlap_comm else 1)
    largest = max(shape.numel() for shape in shapes.values())
    keeps = engine.zero_stage == 1
    filled = None if keeps else _Buckets(job, engine, timeline, shapes)
    for micro in range(job.accumulation):
        timeline.phase = f"forward {micro + 1}"
        first = micro == 0
        partition_part = "gradients" if first else "gradients of this micro-batch"
        new = 4 * partition if not keeps and not offload and (first or width == 4) else 0
        play_passes(
            job,
            timeline,
            "kept" if keeps and first else "taken",
            micro=micro,
            before_backward={"reduce buckets": 0 if keeps and not first else buckets},
            take=None if filled is None else filled.begin(partition_part, allocates=new > 0),
        )
        timeline.drop("activations")
        if filled is None:
            timeline.change("whole gradients", width * numel if first else 0)
        else:  # what is left in the bucket
            filled.reduce(0)
            timeline.drop("reduce buckets", "gradients of this micro-batch")
            timeline.live["gradients"] = 0 if offload else 4 * partition
    timeline.phase = "update"
    if keeps:  # gradients that are in a bucket have left their own memory
        timeline.touch({"gradients": 4 * partition - min(buckets, width * numel)})
        timeline.drop("whole gradients", "reduce buckets")
        timeline.change("gradients", 4 * partition)
    timeline.touch({"gradients": 4 * partition if width == 4 else NORM_WIDTH * largest})
    if not offload:
        flat = 4 * partition if width == 4 else 0
        timeline.touch({"gradients": flat, **update_scratch(job.optim, _matrices(shapes) // job.ranks)})


class _Buckets:
    """Buckets of gradients in stages 2 and 3, filled as gradients are made. Stage 2 is simulated on the last rank: its
    partition has the last parameters, so it is the first rank that keeps gradients."""

    def __init__(self, job: Job, engine: DeepSpeedConfig, timeline: Timeline, shapes: Shapes) -> None:
        self._timeline, self._rank, self._width, self._stage = timeline, job.ranks - 1, width_of(job), engine.zero_stage
        self._capacity, self._ranks = engine.reduce_bucket_elements, job.ranks
        self._wide = 4 if engine.reduce_dtype == "fp32" else 2
        self._owners: dict[str, list[int]] = {}
        self._numel = {name: shape.numel() for name, shape in shapes.items()}
        self._groups: dict[str, int] = {}
        self._sizes: list[int] = []
        for names in _partitioned_groups(job, shapes):
            whole, start = sum(self._numel[name] for name in names), 0
            size = 2 * -(-whole // (2 * job.ranks))  # padded to a multiple of two elements per rank
            for name in names:
                end = start + self._numel[name]
                self._owners[name] = list(range(start // size, (end - 1) // size + 1))
                self._groups[name], start = len(self._sizes), end
            self._sizes.append(size)
        self._part, self._allocates = "gradients", True
        self._have: set[int] = set()
        self._waiting: list[str] = []

    def begin(self, part: str, *, allocates: bool) -> Callable[[str, int], None]:
        """Begin a micro-batch's backward pass, whose gradients are counted as `part`; returns the function to call for each."""
        self._part, self._allocates, self._have = part, allocates, set()
        return self.take

    def take(self, name: str, live: int) -> None:
        """Put a gradient that has been made into the bucket; `live` bytes of activations are alive beside it."""
        if sum(map(self._numel.__getitem__, self._waiting)) + self._numel[name] > self._capacity:
            self.reduce(live)
        self._waiting.append(name)
        if self._numel[name] > self._capacity:  # stays in its own memory
            self._timeline.change("large gradients", self._width * self._numel[name])

    def reduce(self, live: int) -> None:
        """Reduce the gradients in the bucket while `live` bytes of activations are alive."""
        if self._stage == 3:
            self._timeline.touch({"activations": live, "reduce-scatter buffers": self._scattering()})
        else:
            self._reduce_2(live)
        self._timeline.drop("large gradients")
        self._waiting = []

    def _scattering(self) -> int:
        """Bytes of stage 3's copies: gradients too large for the bucket are widened, and all are put in the order of ranks."""
        sizes = [self._numel[name] for name in self._waiting]
        widened = self._wide * sum(size for size in sizes if size > self._capacity) if self._wide != self._width else 0
        ordered = len(sizes) > 1 or any(size % self._ranks for size in sizes)
        return widened + (self._wide * sum(-(-size // self._ranks) * self._ranks for size in sizes) if ordered else 0)

    def _reduce_2(self, live: int) -> None:
        mine = [name for name in self._waiting if self._rank in self._owners[name]]
        in_fp32 = self._width == 4
        if not in_fp32:  # a sum in fp32 for each group
            self._keep({self._groups[name] for name in mine})
        runs, before = 0, -1
        for owner in (owner for name in self._waiting for owner in self._owners[name]):
            runs += owner != before or (owner == self._rank and not in_fp32)
            before = owner
        elements = sum(map(self._numel.__getitem__, self._waiting))
        flat = self._width if runs > 1 else 0  # a single run is reduced in place
        cast = 0 if self._wide == self._width else self._wide
        self._timeline.touch({"activations": live, "all-reduce buffers": (flat + cast) * elements})
        if in_fp32 and mine:  # one buffer for all groups
            self._keep(set(range(len(self._sizes))))
        self._timeline.touch({"activations": live})

    def _keep(self, groups: set[int]) -> None:
        for group in groups - self._have if self._allocates else ():
            self._timeline.change(self._part, 4 * self._sizes[group])
            self._have.add(group)


def _partitioned_groups(job: Job, shapes: Shapes) -> list[list[str]]:
    """Parameter names by group, grouped as in megagpt.engine.optim.parameter_groups."""
    groups: dict[str, list[str]] = {"matrices": [], "decayed": [], "plain": []}
    for name, shape in shapes.items():
        matrix = OPTIMIZERS[job.optim.kind].matrices_only and name.startswith("blocks.")
        groups["plain" if len(shape) < 2 else "matrices" if matrix else "decayed"].append(name)
    return [names for names in groups.values() if names]


@dataclass
class _Gathered:
    """Stage 3's gathered weights: those available, and those in flight (copied out of a flat buffer when first needed)."""

    numel: dict[str, int]
    order: list[list[str]]
    ranks: int
    width: int
    prefetch: int
    max_live: int
    persistent: frozenset[str]
    available: set[str] = field(default_factory=set)
    in_flight: dict[str, int] = field(default_factory=dict)
    flats: dict[int, tuple[set[str], int]] = field(default_factory=dict)
    position: int = 0
    queue_position: int = 0
    wanted_later: dict[str, int] = field(default_factory=dict)
    gathered: int = 0
    """Elements gathered so far."""

    def bytes(self) -> tuple[int, int]:
        """Bytes of (gathered weights, flat buffers). A single rank uses its shards directly."""
        if self.ranks == 1:
            return 0, 0
        copied = sum(self.numel[name] for name in self.available if name not in self.in_flight)
        return self.width * copied, sum(size for _, size in self.flats.values())

    def modules(self, count: int) -> Iterator[tuple[int, int]]:
        """Run the next `count` modules; yields the bytes while each of them runs."""
        for _ in range(count):
            needed = self.order[self.position]
            self._gather([name for name in needed if name not in self.available])
            self._wait(needed)
            yield self.bytes()
            self._prefetch()
            yield self.bytes()
            self._release(needed)
            self.position += 1

    def _gather(self, names: list[str]) -> None:
        if names:
            key = len(self.flats) and max(self.flats) + 1
            self.available.update(names)
            self.in_flight.update(dict.fromkeys(names, key))
            padded = sum(-(-self.numel[name] // self.ranks) * self.ranks for name in names)
            self.flats[key] = (set(names), self.width * padded)
            self.gathered += padded

    def _wait(self, names: list[str]) -> None:
        """The first wait copies the whole bucket out of its flat buffer; the buffer is freed after the last wait."""
        for name in names:
            for key, (waiting, size) in list(self.flats.items()):
                if name in waiting:
                    for other in [n for n, k in self.in_flight.items() if k == key]:
                        del self.in_flight[other]
                    waiting.discard(name)
                    if not waiting:
                        del self.flats[key]
                    else:
                        self.flats[key] = (waiting, size)

    def _prefetch(self) -> None:
        self.queue_position = max(self.queue_position, self.position + 1)
        live = sum(self.numel[name] for name in self.available)
        limit = min(self.max_live - live, self.prefetch)
        names: list[str] = []
        numel = 0
        while self.queue_position < len(self.order) and numel < limit:
            for name in self.order[self.queue_position]:
                self.wanted_later[name] = max(self.wanted_later.get(name, 0), self.queue_position)
                if name not in self.available and name not in names:
                    names.append(name)
                    numel += self.numel[name]
            self.queue_position += 1
        self._gather(names)

    def _release(self, names: list[str]) -> None:
        for name in names:
            if name in self.persistent or self.wanted_later.get(name, 0) > self.position or self._used_soon(name):
                continue
            self.available.discard(name)

    def _used_soon(self, name: str) -> bool:
        passed = 0
        for later in range(self.position + 1, len(self.order)):
            if name in self.order[later]:
                return True
            passed += sum(self.numel[other] for other in self.order[later])
            if passed >= MAX_REUSE_ELEMENTS:
                return False
        return False


def _play_3(job: Job, engine: DeepSpeedConfig, timeline: Timeline) -> None:
    shapes, width, layers = shapes_of(job.model), width_of(job), job.model.num_layers
    shard = sum(-(-shape.numel() // job.ranks) for shape in shapes.values())
    timeline.keep("weights", width * shard, on_host=engine.offload_parameters)
    timeline.keep("master weights", 4 * shard, on_host=engine.offload_optimizer)
    timeline.keep("optimizer states", _state_bytes(job, shapes) // job.ranks, on_host=engine.offload_optimizer)
    timeline.keep("gradients", 4 * shard, on_host=engine.offload_optimizer)
    reduce_width = 2 if engine.reduce_dtype == "bf16" else 4
    timeline.change("reduce buckets", reduce_width * engine.reduce_bucket_elements)
    if engine.hpz_partition_size > 1:
        timeline.change("secondary weights", width * _numel(shapes) // engine.hpz_partition_size)
    numel = {name: shape.numel() for name, shape in shapes.items()}
    buckets = _Buckets(job, engine, timeline, shapes)
    before, per_block, after, order = _module_order(job, shapes)
    for micro in range(job.accumulation):
        gathered = _new_gathered(job, engine, numel, order)

        def run(modules: int, span_peak: int, gathered: _Gathered = gathered) -> None:
            for weights, flats in gathered.modules(modules):
                timeline.live |= {"gathered weights": weights, "all-gather buffers": flats}
                timeline.touch({"activations": span_peak})
            weights, flats = gathered.bytes()
            timeline.live |= {"gathered weights": weights, "all-gather buffers": flats}

        def backward(modules: int, moments: Sequence[Made], prefix: str = "", gathered: _Gathered = gathered) -> None:
            for made in moments:
                ahead = modules
                if made.parameter:
                    coming = gathered.order[gathered.position : gathered.position + modules]
                    ahead = next((i + 1 for i, names in enumerate(coming) if prefix + made.parameter in names), 0)
                modules -= ahead
                run(ahead, made.peak)
                timeline.touch({"activations": made.peak})
                if made.parameter:
                    buckets.take(prefix + made.parameter, made.live)
            timeline.change("activations", moments[-1].live)

        timeline.phase = f"forward {micro + 1}"
        run(before, trace_block(job, 0, "taken").embedding.peak)
        timeline.span("activations", trace_block(job, 0, "taken").embedding)
        for number in range(layers):
            run(per_block, 0)
            timeline.span("activations", trace_block(job, number, "taken").block)
        run(after, 0)
        timeline.span("activations", trace_block(job, layers - 1, "taken").head)
        timeline.phase = f"backward {micro + 1}"
        backward(after, trace_block(job, layers - 1, "taken").made_by_head)
        for number in reversed(range(layers)):
            if checkpointing_of(job, number) != "none":
                run(per_block, 0)
            backward(per_block, trace_block(job, number, "taken").made_by_block, f"blocks.{number}.")
        backward(before, trace_block(job, 0, "taken").made_by_embedding)
        timeline.drop("activations", "all-gather buffers")
        buckets.reduce(0)
        timeline.live["gathered weights"] = width * sum(
            size for size in numel.values() if size <= engine.stage3_persistence_elements
        )
    timeline.phase = "update"
    together = min(shard, SUB_GROUP_ELEMENTS)
    timeline.touch({} if engine.offload_optimizer else {"gradients": 4 * together, **update_scratch(job.optim, together)})


def gathered_per_micro_batch(job: Job, engine: DeepSpeedConfig) -> tuple[int, int]:
    """Elements that stage 3 gathers in one micro-batch: (forward pass, backward pass), padded to whole shards."""
    numel = {name: shape.numel() for name, shape in shapes_of(job.model).items()}
    before, per_block, after, order = _module_order(job, shapes_of(job.model))
    gathered = _new_gathered(job, engine, numel, order)
    forward = before + per_block * job.model.num_layers + after
    for _ in gathered.modules(forward):
        pass
    in_forward = gathered.gathered
    for _ in gathered.modules(len(order) - forward):
        pass
    return in_forward, gathered.gathered - in_forward


def _new_gathered(job: Job, engine: DeepSpeedConfig, numel: dict[str, int], order: list[list[str]]) -> _Gathered:
    small = frozenset(name for name, size in numel.items() if size <= engine.stage3_persistence_elements)
    return _Gathered(
        numel,
        order,
        job.ranks,
        width_of(job),
        engine.stage3_prefetch_elements,
        engine.stage3_max_live_elements,
        small,
        available=set(small),
    )


def _module_order(job: Job, shapes: Shapes) -> tuple[int, int, int, list[list[str]]]:
    """(modules before the blocks, in a block, after them, all modules' parameters in the order of their use in a step)."""
    modules: dict[str, list[str]] = {}
    for name in shapes:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    if job.model.tied_head and not job.model.classes:
        modules["head"] = ["embedding.weight"]
    names = list(modules)
    # The model and each block are modules too: they have no parameters of their own, but prefetching starts when they begin.
    first = [[], *(modules[name] for name in ("embedding", "positions") if name in modules)]
    last = [modules[name] for name in ("norm", "head", "score") if name in modules]
    blocks = [[[], *(modules[n] for n in names if n.startswith(f"blocks.{i}."))] for i in range(job.model.num_layers)]
    order = [*first, *(module for block in blocks for module in block), *last]
    order += reversed(last)
    for number in reversed(range(job.model.num_layers)):
        if checkpointing_of(job, number) != "none":
            order += blocks[number]
        order += reversed(blocks[number])
    order += reversed(first)
    return len(first), len(blocks[0]), len(last), order


def _numel(shapes: Shapes) -> int:
    return sum(shape.numel() for shape in shapes.values())


def _matrices(shapes: Shapes) -> int:
    """Elements of the parameters that are decayed: DeepSpeed lays them out as one tensor."""
    return sum(shape.numel() for shape in shapes.values() if len(shape) > 1)


def _largest(shapes: Shapes) -> int:
    return max(shape.numel() for shape in shapes.values())


def _state_bytes(job: Job, shapes: Shapes) -> int:
    return sum(state_bytes(job.optim, name, shape) * shape.numel() for name, shape in shapes.items())
