"""The configuration of a training run: everything that its YAML file may hold."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megagpt.checkpoint.ownership import IfRunning
from megagpt.config import Config, UserError
from megagpt.data.open_data import DataConfig
from megagpt.distributed.determinism import Determinism
from megagpt.distributed.device import Device
from megagpt.engine.config import DeepSpeedConfig, EngineConfig, Precision
from megagpt.engine.optim import OptimConfig
from megagpt.evaluate.classes import metrics_of
from megagpt.evaluate.scores_in_training import ScoreConfig, check_metric
from megagpt.model.float8 import Float8
from megagpt.model.gpt import ModelConfig
from megagpt.model.tune import TuneConfig
from megagpt.monitor.config import MonitorConfig
from megagpt.train.profile import ProfileConfig
from megagpt.train.spike_guard import GuardConfig
from megagpt.watchdog.watchdog import WatchdogConfig


class BatchPhase(Config):
    """A batch size for the first steps of a run."""

    until_step: int = Field(gt=0)
    """The first step that no longer uses it."""
    global_batch_size: int = Field(gt=0)
    """Samples per update over all ranks."""


class TrainConfig(Config):
    """One complete training run. The same command starts it and, after any stop, resumes it."""

    run_dir: Path
    """The folder of this run: checkpoints, metrics, ledger, tokenizer, report."""
    seed: int = 0
    """Initial weights and dropout; the order of samples has data.seed."""
    max_steps: int = Field(gt=0)
    """Optimizer updates in the whole run."""
    global_batch_size: int = Field(gt=0)
    """Samples per update over all ranks. Gradient accumulation follows from it, micro_batch_size and the number of ranks."""
    batch_warmup: tuple[BatchPhase, ...] = ()
    """Batch-size warmup schedule, e.g. [{until_step: 1000, global_batch_size: 256}]; steps ascend."""
    micro_batch_size: int = Field(gt=0)
    """Samples that one rank puts through one forward."""
    device: Device = "auto"
    """auto: one GPU per rank where the machine has GPUs, else the CPU. cpu: the CPU, also on a machine with GPUs."""
    precision: Precision = "bf16"
    """fp32, or bf16 with fp32 master weights, gradient sums, reductions and optimizer states (of adamw_bf16_states bf16)."""
    tf32: bool = False
    """Matrix products of fp32 numbers on a GPU in TF32: several times as fast, 10 bits of mantissa. For precision=fp32."""
    float8: Float8 = "none"
    """none, or how the factors of the blocks' matrix products are scaled to 8 bits: tensorwise (faster) or rowwise (finer).
    With precision=bf16, and compile=true for speed; on GPUs from Ada or Hopper on, emulated on CPUs. Needs megagpt[float8]."""
    activation_checkpointing: Literal["none", "selective", "full"] | int = "none"
    """Recompute activations in the backward pass: none, full (every block), n (every n-th block), or selective (every block,
    but the results of matrix products and attention are kept)."""
    compile: bool = False
    """Compile each block with torch.compile: faster steps, a slower start."""
    determinism: Determinism = "none"
    """none; strict: the same bits at every start on the same layout and kind of machine; canonical: besides, on every number of
    ranks and accumulation split (engine.kind=fsdp or zero_stage=1, one micro_batch_size). Each is slower: docs/training.md."""
    model: ModelConfig
    """The model."""
    data: DataConfig
    """The training data."""
    tune: TuneConfig = TuneConfig()
    """What of the model is trained: frozen parameters, or adapters (LoRA). Needs init_from, whose run has to stay: checkpoints
    hold only what is trained."""
    optim: OptimConfig = OptimConfig()
    """Optimizer, learning rate and clipping."""
    engine: EngineConfig = DeepSpeedConfig()
    """How the model is sharded over ranks."""
    monitor: MonitorConfig = MonitorConfig()
    """What is logged and shown."""
    profile: ProfileConfig = ProfileConfig()
    """Which updates torch.profiler records."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """When a run counts as hung."""
    guard: GuardConfig = GuardConfig()
    """When a run goes back to a checkpoint and skips data."""
    evaluate_every_steps: int = Field(default=0, ge=0)
    """Steps between evaluations on the validation split; 0 = only at the end."""
    evaluate_max_samples: int | None = Field(default=None, gt=0)
    """Validation samples per source; null = all."""
    score: ScoreConfig = ScoreConfig()
    """Scores during training: tasks, the harness and generated answers. Weights are the same bits with and without."""
    best_by: str = "loss"
    """The measure for the best checkpoint and early stopping: loss (of validation), TASK.METRIC of `score` (piqa.accuracy), or
    of a classifier classes.accuracy, classes.macro_f1, classes.NAME.f1 (also precision, recall). The lowest loss, perplexity
    and bits_per_byte are the best, the highest of everything else."""
    early_stop_evaluations: int = Field(default=0, ge=0)
    """Evaluations in a row whose validation loss (or best_by) is not better than the best one before them, after which the run
    is done; 0 = never. The best checkpoint stays (checkpoints/best.json)."""
    save_every_steps: int = Field(default=1000, gt=0)
    """Steps between checkpoints; one more is saved at the end and on a stop signal."""
    read_results: Literal["auto", "late", "at_once"] = "auto"
    """When a step's loss and gradient norm are read and checked: late, after the next step was launched, so that a GPU is
    never without work, or at once, before it. auto: late on GPUs. The result is the same."""
    save_in_background: bool = True
    """Copy the state to host memory and write it while training continues; needs host memory for one copy of it."""
    keep_last: int = Field(default=2, gt=0)
    """How many of the newest checkpoints are kept; the best one is kept too."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Checkpoints of multiples of this step are kept for good; 0 = none."""
    export_every_steps: int = Field(default=0, ge=0)
    """Steps between exports of the checkpoint for transformers, to run_dir/exports, beside the training and at low
    priority; 0 = none. A multiple of save_every_steps. Needs megagpt[convert]."""
    export_keep_last: int = Field(default=2, gt=0)
    """How many of the newest exports are kept."""
    sample_every_steps: int = Field(default=0, ge=0)
    """Steps between samples of generated text in the log; 0 = none."""
    sample_prompt: str = "\n"
    """The beginning of the generated text."""
    sample_tokens: int = Field(default=100, gt=0)
    """Tokens per generated sample."""
    init_from: Path | None = None
    """Another run's directory whose newest good checkpoint gives the initial weights (only the weights) of a new run."""
    continue_from: Path | None = None
    """Another run's checkpoint (its `checkpoints/step_...`) with which a new run begins: weights, optimizer states, step and
    place in the data. For a cooldown, or several, from one long run."""
    resume_step: int | None = Field(default=None, ge=0)
    """Resume from the checkpoint of this step; newer ones are quarantined. The same command later resumes this branch."""
    allow_change: tuple[str, ...] = ()
    """Settings that may differ from the checkpoint's although a resume refuses them: model (what keeps the weights' meaning),
    data.shards (other tokens of the same source), data.order (seed, shuffle_block), data.weights (other weights from the next
    sample on; data.weight_changes plans them), data.seq_len (how samples are cut and masked), data (these four),
    data.tokenizer (token ids that mean something else; also of init_from), seed, micro_batch_size, optim.kind (the states of
    the new optimizer begin at zero)."""
    if_running: IfRunning = "refuse"
    """What a start does when another start of this run is alive: refuse (status 2), wait until it has ended, or take_over: the
    older one ends within seconds. A requeued job never takes over, so that two cannot take a run from each other."""
    check: bool = False
    """Check configuration, data, tokenizer and disk space on one process, then exit."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.data.seq_len > self.model.seq_len:
            raise ValueError(f"data.seq_len={self.data.seq_len} is more than model.seq_len={self.model.seq_len}")
        if isinstance(self.activation_checkpointing, int) and self.activation_checkpointing < 1:
            raise ValueError(
                f"activation_checkpointing={self.activation_checkpointing}: none, selective, full, or a number from 1"
            )
        zero_stage = getattr(self.engine, "zero_stage", None)
        if self.tf32 and self.precision == "bf16":
            raise ValueError("tf32=true with precision=bf16: no product of a bf16 run is of fp32 numbers; use precision=fp32")
        if self.activation_checkpointing == "selective" and zero_stage == 3:
            raise ValueError(
                "activation_checkpointing=selective with engine.zero_stage=3: the backward pass fails, since DeepSpeed "
                "gathers weights inside what is recomputed; use full, another stage, or engine.kind=fsdp"
            )
        if self.micro_batch_size > self.global_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} is more than global_batch_size={self.global_batch_size}"
            )
        untils = [phase.until_step for phase in self.batch_warmup]
        if untils != sorted(set(untils)):
            raise ValueError(f"batch_warmup: until_step {untils} do not ascend")
        for phase in self.batch_warmup:
            if phase.global_batch_size < self.micro_batch_size:
                least = f"micro_batch_size={self.micro_batch_size}"
                raise ValueError(f"batch_warmup: global_batch_size={phase.global_batch_size} is less than {least}")
        needed = ("evaluate_every_steps", self.evaluate_every_steps)
        if self.model.classes:
            self._check_classifier()
        elif self.best_by != "loss":
            needed = ("score.every_steps", self.score.every_steps)
            try:
                check_metric(self.score, self.best_by)
            except UserError as error:
                raise ValueError(str(error)) from None
        if self.early_stop_evaluations and not needed[1]:
            raise ValueError(f"early_stop_evaluations={self.early_stop_evaluations} needs {needed[0]}")
        if self.tune.freezes:
            if self.init_from is None:
                raise ValueError("tune freezes weights or adds adapters: it needs init_from, a run or an imported model")
            if self.determinism == "canonical":
                raise ValueError("tune with determinism=canonical is not covered: every parameter has to be trained")
            if self.tune.lora is not None and self.float8 != "none":
                raise ValueError(f"tune.lora with float8={self.float8}: adapters are not computed in float8")
        if self.init_from is not None and self.continue_from is not None:
            raise ValueError("init_from and continue_from are given: a run begins with the one or the other")
        return self

    def _check_classifier(self) -> None:
        """Raise ValueError for what a model that gives no text cannot do."""
        if self.best_by != "loss" and self.best_by not in metrics_of(self.model.classes):
            raise ValueError(
                f"best_by={self.best_by}: loss, or one of {', '.join(metrics_of(self.model.classes))}, is expected"
            )
        if self.score.asks:
            raise ValueError("score with model.classes: a classifier gives no text to score; leave score out")
        if self.sample_every_steps:
            raise ValueError(
                f"sample_every_steps={self.sample_every_steps} with model.classes: a classifier gives no text; set it to 0"
            )

    def batch_size_at(self, step: int) -> int:
        """Samples of the update number `step` (from 0)."""
        sizes = (phase.global_batch_size for phase in self.batch_warmup if step < phase.until_step)
        return next(sizes, self.global_batch_size)

    def batch_sizes(self) -> list[tuple[str, int]]:
        """(setting, samples per step) of every batch size of the run."""
        name, phases = "global_batch_size", self.batch_warmup
        warmup = [(f"batch_warmup until step {phase.until_step}: {name}", phase.global_batch_size) for phase in phases]
        return [(name, self.global_batch_size), *warmup]

    def num_samples(self) -> int:
        """Samples of the whole run."""
        samples = start = 0
        for phase in self.batch_warmup:
            end = min(phase.until_step, self.max_steps)
            samples, start = samples + max(0, end - start) * phase.global_batch_size, max(start, end)
        return samples + (self.max_steps - start) * self.global_batch_size

    @property
    def checkpoint_every(self) -> int:
        """Activations of every n-th block are recomputed; 0 = none."""
        every = self.activation_checkpointing
        return every if isinstance(every, int) else {"none": 0, "selective": 1, "full": 1}[every]

    @property
    def engine_options(self) -> dict[str, Any]:
        """The keyword arguments of build_engine."""
        return {
            "precision": self.precision,
            "micro_batch_size": self.micro_batch_size,
            "checkpoint_every": self.checkpoint_every,
            "checkpoint_selectively": self.activation_checkpointing == "selective",
            "compile_blocks": self.compile,
            "canonical": self.determinism == "canonical",
            "float8": self.float8,
            "tune": self.tune,
        }
