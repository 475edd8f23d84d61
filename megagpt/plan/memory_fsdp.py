"""Memory of the FSDP2 engine: fully_shard's units, buffers and gradients, in the order in which it makes them."""

from dataclasses import dataclass

from megagpt.engine.config import FSDPConfig
from megagpt.plan.timeline import (
    Job,
    Shapes,
    Timeline,
    shapes_of,
    shard_elements,
    state_bytes,
    trace_block,
    units_of,
    update_scratch,
    width_of,
)
from megagpt.plan.trace import Gradients


def play_fsdp(job: Job, engine: FSDPConfig, timeline: Timeline) -> None:
    """Simulate a step: each block and the root (embedding, norm, head) gather their weights and scatter their gradients."""
    layers, shapes = job.model.num_layers, shapes_of(job.model)
    shards = engine.shard_size or job.ranks
    width, reduce_width = width_of(job), 2 if engine.reduce_dtype == "bf16" else 4
    local = {name: shard_elements(shape, shards) for name, shape in shapes.items()}
    states = {
        "master weights": 4 * sum(local.values()),
        "optimizer states": sum(state_bytes(job.optim, name, shapes[name]) * size for name, size in local.items()),
    }
    for part, size in states.items():
        timeline.keep(part, size, on_host=engine.cpu_offload)
    timeline.change("inputs", 8 * job.micro_batch_size * job.seq_len)
    block, root = units_of(shapes)
    whole_block, whole_root = (sum(shards * shard_elements(shape, shards) for shape in unit.values()) for unit in (block, root))
    fsdp = _Fsdp(timeline, shards, width, reduce_width, engine.cpu_offload)
    for micro in range(job.accumulation):
        first, last = micro == 0, micro == job.accumulation - 1
        sharded = engine.accumulate == "sharded"  # each micro-batch is as the only one, but for the sum of the shards
        # Later micro-batches add fp32 gradients in place; bf16 gradients are held beside their fp32 sum.
        mode: Gradients = "kept" if first or width == 2 or sharded else "taken"
        timeline.phase = f"forward {micro + 1}"
        fsdp.gather(whole_root, forward=True)
        timeline.span("activations", trace_block(job, 0, mode).embedding)
        for number in range(layers):
            fsdp.gather(whole_block, forward=True)
            timeline.span("activations", trace_block(job, number, mode).block)
            if engine.reshard_after_forward:
                fsdp.free(whole_block)
        timeline.span("activations", trace_block(job, layers - 1, mode).head)
        fsdp.release_flat()
        timeline.phase = f"backward {micro + 1}"
        if engine.reshard_after_forward:
            fsdp.gather_flat(whole_block)
        timeline.span("activations", trace_block(job, layers - 1, mode).head_backward)
        for number in reversed(range(layers)):
            if engine.reshard_after_forward:
                fsdp.copy_out(whole_block)
                if number > 0:
                    fsdp.gather_flat(whole_block)
            timeline.span("activations", trace_block(job, number, mode).block_backward)
            fsdp.end_unit(
                block, whole_block, 0 if sharded else micro, mode, reduces=last or sharded, adds=sharded and not first
            )
        timeline.span("activations", trace_block(job, 0, mode).embedding_backward)
        fsdp.end_unit(root, whole_root, 0 if sharded else micro, mode, reduces=last or sharded, adds=sharded and not first)
        timeline.drop("activations", "reduce-scatter buffers")
    timeline.phase = "update"
    timeline.touch({} if engine.cpu_offload else update_scratch(job.optim, max(local.values())))


@dataclass
class _Fsdp:
    """fully_shard's buffers, as in torch 2.13 (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py)."""

    timeline: Timeline
    shards: int
    width: int
    reduce_width: int
    offloads_gradients: bool
    flat: int = 0

    def gather(self, elements: int, *, forward: bool) -> None:
        """Gather a unit. In the forward pass the flat buffer stays until the next unit has been gathered."""
        before, self.flat = self.flat, 0
        self.gather_flat(elements)
        flat, self.flat = self.flat, before
        self.release_flat()
        self.flat = flat
        self.timeline.change("gathered weights", self.width * elements)

    def gather_flat(self, elements: int) -> None:
        """All-gather into a flat buffer. In bf16 the shard is first cast into another buffer."""
        if self.shards > 1:
            self.flat = self.width * elements
            self.timeline.change("all-gather buffers", self.flat)
            self.timeline.touch({"all-gather buffers": self.width * elements // self.shards if self.width == 2 else 0})

    def copy_out(self, elements: int) -> None:
        """Copy the flat buffer into the unit's weights, and release it."""
        self.timeline.change("gathered weights", self.width * elements)
        self.release_flat()

    def release_flat(self) -> None:
        self.timeline.change("all-gather buffers", -self.flat)
        self.flat = 0

    def free(self, elements: int) -> None:
        self.timeline.change("gathered weights", -self.width * elements)

    def end_unit(
        self, shapes: Shapes, elements: int, micro: int, mode: Gradients, *, reduces: bool, adds: bool = False
    ) -> None:
        """After a unit's backward pass: reduce its gradients, or keep them whole in fp32 until the last micro-batch. `adds`:
        the shard goes into the sum of the micro-batches before."""
        timeline, numel = self.timeline, sum(shape.numel() for shape in shapes.values())
        made = self.width * numel if mode == "kept" else 0
        timeline.change("activations", -made)
        timeline.change("whole gradients", made)
        if self.width == 2 and (micro > 0 or not reduces):  # into the fp32 sum
            if micro == 0:
                timeline.touch({"whole gradients": 4 * max(shape.numel() for shape in shapes.values())})
            timeline.change("whole gradients", (4 * numel if micro == 0 else 0) - made)
        self.free(elements)
        if not reduces:
            return
        timeline.drop("reduce-scatter buffers")
        timeline.change("reduce-scatter buffers", self.reduce_width * elements)
        timeline.change("whole gradients", -(4 * numel if micro > 0 else made))
        shard = elements // self.shards
        timeline.touch({"gradients": self.reduce_width * shard if self.reduce_width == 2 else 0})
        if adds:
            timeline.touch({"gradients": 4 * shard})
        else:
            timeline.keep("gradients", 4 * shard, on_host=self.offloads_gradients)
