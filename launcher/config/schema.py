"""The configuration, field by field: types, defaults, units.

Every field is followed by its own documentation. What a single type cannot say (that two fields
exclude each other, that a batch must divide) is in ``rules``. ``job`` and ``optimizer`` are free
mappings with a ``_target_``; ``targets`` checks them against the signature they name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

__all__ = [
    "Accumulate",
    "Axis",
    "BestMode",
    "CheckpointConfig",
    "ClusterConfig",
    "Codec",
    "CompressionConfig",
    "ConsoleStyle",
    "Decay",
    "Device",
    "Dtype",
    "LossScaleConfig",
    "OnFailure",
    "ParallelConfig",
    "PrecisionConfig",
    "RunConfig",
    "ScheduleConfig",
    "Strategy",
    "TrackingConfig",
    "TrainConfig",
    "Verify",
    "Wrap",
]

# OmegaConf reads the annotations at run time, so they are real types: no TYPE_CHECKING imports here.
# Dataclasses are not frozen: a frozen schema breaks Hydra's group overrides.


class Device(str, Enum):
    """Where the workers compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    """The type that autocast computes in; the weights that are stepped stay FP32."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Strategy(str, Enum):
    """How the model, its gradients and its optimizer are laid out over the ranks."""

    ddp = "ddp"
    zero2 = "zero2"
    fsdp = "fsdp"
    hsdp = "hsdp"


class Wrap(str, Enum):
    """What is gathered and freed in one piece when weights are sharded."""

    blocks = "blocks"
    model = "model"


class Codec(str, Enum):
    """How gradients are written for the wire."""

    none = "none"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    powersgd = "powersgd"


class Accumulate(str, Enum):
    """Where 16-bit gradients are summed."""

    wire = "wire"
    fp32 = "fp32"


class Axis(str, Enum):
    """Which reductions of hsdp are compressed."""

    replica = "replica"
    all = "all"


class Decay(str, Enum):
    """The shape of the learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class ConsoleStyle(str, Enum):
    """How rank 0 shows progress."""

    auto = "auto"
    live = "live"
    plain = "plain"
    off = "off"


class Verify(str, Enum):
    """How a checkpoint is looked at before it is loaded."""

    full = "full"
    sizes = "sizes"


class OnFailure(str, Enum):
    """What a run does when a checkpoint could not be written."""

    proceed = "continue"
    stop = "stop"


class BestMode(str, Enum):
    """Which of two values of a metric is the better one."""

    min = "min"
    max = "max"


@dataclass(kw_only=True)
class TrainConfig:
    """How long, and in which portions."""

    max_steps: int | None = None
    """Optimizer steps to attempt (skipped ones count). Exactly one of this and max_epochs."""
    max_epochs: int | None = None
    """Passes over the training data; the last step is filled up from the next epoch."""
    global_batch_size: int | None = None
    """Samples per optimizer step, over all workers. Exactly one of this and accumulation_steps."""
    accumulation_steps: int | None = None
    """Micro-batches per worker and optimizer step; the global batch then grows with the workers."""
    micro_batch_size: int | None = None
    """Samples per forward pass on one worker. Mandatory."""
    max_grad_norm: float | None = None
    """Clip the gradient to this L2 norm (after unscaling); null: no clipping."""
    log_every: int = 10
    """Steps between two lines on a console that is not a terminal. metrics.jsonl has every step."""
    eval_every: int | None = None
    """Steps between two validations; null: at the end only."""
    compile: bool = False
    """Run the model through torch.compile."""
    num_data_workers: int = 0
    """DataLoader processes per worker; 0: load in the worker itself."""
    init_from: str | None = None
    """A .safetensors file (see launch export) with the weights to begin with; null: those that the job builds. A run
    that has a checkpoint goes on from that instead."""


@dataclass(kw_only=True)
class LossScaleConfig:
    """Dynamic loss scaling (Micikevicius et al., 2018). The default rule is torch's, with a floor and a ceiling."""

    enabled: bool = False
    """Scale the loss. FP16 needs it; BF16 and FP32 do not."""
    initial: float = 65536.0
    """The first scale."""
    growth_factor: float = 2.0
    """The scale is multiplied by this after growth_interval steps without overflow."""
    backoff_factor: float = 0.5
    """The scale is multiplied by this on overflow."""
    growth_interval: int = 2000
    """Consecutive steps without overflow before the scale grows."""
    hysteresis: int = 1
    """Overflows to tolerate before the scale backs off; refilled when it grows. 1 is torch's rule."""
    minimum: float = 1.0
    """The scale never falls below this."""
    maximum: float = 16777216.0
    """The scale never rises above this (2^24)."""
    patience: int = 50
    """Consecutive skipped steps with the scale at its minimum (or with no scale) that end the run."""
    attribute: bool = True
    """Look at each rank's gradients once more before they cross the wire, so that an overflow event can name the rank
    that it came from. Only if enabled; costs one more read of the gradients, while the backward pass runs."""


@dataclass(kw_only=True)
class PrecisionConfig:
    """The arithmetic of the forward and backward pass."""

    dtype: Dtype = Dtype.float32
    """What autocast computes in."""
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    """Dynamic loss scaling."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model is laid out over the workers."""

    strategy: Strategy = Strategy.ddp
    """ddp: FP32 weights on every rank. zero2: FP32 weights, gradients and optimizer state in shards, the weights to
    compute with whole between forward and backward. fsdp: these in shards too. hsdp: shards inside a group of
    shard_size ranks, replicas across groups."""
    shard_size: int | None = None
    """hsdp: ranks that share one replica; null: those of one node."""
    wrap: Wrap = Wrap.blocks
    """blocks: each of Job.blocks(model) by itself, the rest together. model: everything together."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""
    find_unused_parameters: bool = False
    """ddp: needed by models in which some parameters get no gradient in some steps; costs a walk of the graph."""
    bucket_mib: float | None = None
    """ddp: gradients cross the wire in portions of about this size; null: torch's, a small one and then 25 MiB; on CPUs
    with 16 or 8 bits a value 8 MiB, which leaves the link less time with nothing to do."""


@dataclass(kw_only=True)
class CompressionConfig:
    """How gradients cross the wire. Sums and means are the same; what encoding loses is reported in metrics.jsonl."""

    codec: Codec = Codec.none
    """none: FP32. fp16, bf16: 16 bits a value. int8: 8 bits a value and a scale for each block. powersgd: each matrix
    as a product of two thin ones (ddp, and hsdp's replicas)."""
    accumulate: Accumulate = Accumulate.fp32
    """fp16, bf16. wire: the backend sums in 16 bits (on CPUs, with several ranks on each host, over the hosts). fp32:
    values go to the rank that owns them, which sums in FP32 and sends 16 bits back; that sum cannot overflow."""
    block_size: int = 128
    """int8: values that share a scale, a multiple of 4. Smaller: more exact, and 4 bytes more for each block."""
    error_feedback: bool = False
    """Keep what encoding has lost, and add it to the next step's gradients: two FP32 numbers a parameter and rank more
    memory. For all but accumulate=wire."""
    axis: Axis | None = None
    """hsdp. replica: between the replicas only, FP32 inside each. all: both. null: replica under hsdp, else all."""
    rank: int = 4
    """powersgd: columns of the thin matrices."""
    start_step: int = 100
    """powersgd: steps with FP32 gradients before it starts; at least 2."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate as a function of the applied steps (skipped ones do not count)."""

    decay: Decay = Decay.constant
    """What follows the warm-up, up to the last step."""
    warmup_steps: int = 0
    """Applied steps over which the rate rises linearly from lr / warmup_steps to lr."""
    final_fraction: float = 0.0
    """What is left of lr at the last step, as a fraction (linear, cosine)."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the state of a run is saved, how many checkpoints are kept, and how they are trusted. Whatever these say,
    a run that is asked to stop saves after the step at which all ranks have stopped, and so does one that ends."""

    enabled: bool = True
    """false: nothing is saved, and nothing is looked for: a run that stops is lost."""
    every_steps: int | None = None
    """Steps between two checkpoints; null: by the clock alone."""
    every_minutes: float | None = 10.0
    """Minutes between two checkpoints; null: by steps alone."""
    keep: int = 2
    """The newest checkpoints that are kept; of damaged ones that were set aside as many."""
    keep_best: int = 0
    """The best checkpoints that are kept beside them. Above 0, a validation that is the best so far is saved
    too, and there must be validation data."""
    best_metric: str = "loss"
    """The validation metric that they are judged by: loss, or one of the job's. One that is not there ends the run."""
    best_mode: BestMode = BestMode.min
    """Whether its lowest (min) or highest (max) value is the best."""
    asynchronous: bool = True
    """Copy the state to host memory and write it while training goes on; false: training waits for the disk."""
    verify: Verify = Verify.full
    """Before loading. full: read every byte and compare its digest. sizes: look only at which files there are, and
    at their sizes: faster on huge checkpoints, and blind to a flipped bit."""
    on_failure: OnFailure = OnFailure.proceed
    """When a checkpoint could not be written. continue: say so and train on; the former checkpoints stay. stop: end
    the run with exit code 1."""
    trust_shared_directory: bool = False
    """Load checkpoints from folders that another user could have written into."""


@dataclass(kw_only=True)
class ClusterConfig:
    """Where the processes come from."""

    kind: str = "local"
    """local: this machine. slurm: a job of SLURM. torchrun: processes that it has started; set by T-minus alone."""
    nodes: int | str = 1
    """Machines. slurm: also a range, such as 2-4: SLURM gives what is there each time that the job starts, and the
    global batch stays what it is. Where it does not divide over all that are there, the others stay idle."""
    processes_per_node: int | None = None
    """Workers per machine; null: one per GPU, or 2 where there is none."""
    max_restarts: int = 0
    """Restarts after a worker has failed, counted anew from each newly published checkpoint; 0: none. A launch's
    failure before its first step is not retried. On SLURM, attempts that are lost with their node count too."""
    partition: str | None = None
    """slurm, as all that follow. null: the cluster's default."""
    account: str | None = None
    """Who pays; null: your default."""
    qos: str | None = None
    """Quality of service; null: your default."""
    time_limit_min: int = 60
    """Minutes after which SLURM ends the job. It stops and saves before that, and goes on in another turn."""
    gpus_per_node: int | None = None
    """GPUs of each machine; null: none."""
    cpus_per_task: int | None = None
    """CPUs of each machine, shared by its workers (there is one task per node); null: the cluster's default."""
    memory_gib: float | None = None
    """Memory of each machine; null: the cluster's default; 0: all that it has."""
    requeue: bool = True
    """Whether a job that was stopped with time left to train goes back into the queue and on by itself."""
    signal_lead_seconds: int = 120
    """Before the time limit, at least, all workers are asked to stop and save; longer where a step and a save have been
    seen to take longer."""
    max_parallel_jobs: int | None = None
    """A sweep's runs that are trained at once; null: as many as fit."""
    rendezvous_timeout_seconds: int = 300
    """How long the machines wait for each other at the start."""
    interface: str | None = None
    """The network interface that they talk over, such as ib0; null: the one whose route leads to the others."""
    container_image: str | None = None
    """An image for pyxis (srun --container-image)."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders to see in the container beside the project's, the run's and the snapshot's: FROM:TO."""
    python: str | None = None
    """The Python to run, in the container if there is one; null: the one that submits."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load in the job, in this order."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Variables to set in the job; null as a value: as it is where the job is submitted."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell to run on the job's first node before the workers start. One that fails ends the job: end it with
    ``|| true`` if it may."""
    snapshot: bool = True
    """Copy the project's code into the run as it is when it is submitted, and run that; false: what is there then."""
    snapshot_limit_mib: float = 200.0
    """A project that is larger is refused: data, or results, are not meant to be copied. .gitignore leaves them out."""
    wait: bool = False
    """Follow the job until the run has ended, with its exit code, instead of returning at once."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Any other option of sbatch, passed on as it is: {constraint: a100, exclusive: true}."""


@dataclass(kw_only=True)
class TrackingConfig:
    """Who is told, beside metrics.jsonl."""

    console: ConsoleStyle = ConsoleStyle.auto
    """auto: a live line on a terminal, a plain line every log_every steps elsewhere."""


@dataclass(kw_only=True)
class RunConfig:
    """One run, whole. ``launch --cfg job`` prints it."""

    name: str = "run"
    """The folder below runs_root that the run's directory is made in."""
    seed: int = 0
    """Initial weights, order of samples, dropout: the same seed gives the same run."""
    device: Device = Device.auto
    """auto: cuda where there is a GPU, else cpu."""
    runs_root: str = "runs"
    """The folder of all runs, relative to the current folder."""
    run_dir: str | None = None
    """A run directory to use instead of a new one below runs_root. A run that is there already goes on."""
    job: dict[str, Any] = field(default_factory=dict)
    """The learning problem: _target_ (a launcher.Job) and its arguments."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, and in which portions."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """The arithmetic."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout over the workers."""
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    """The gradients' way over the wire."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """_target_ (a torch.optim.Optimizer), lr and its other arguments."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over time."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is saved when, and what is kept."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the processes come from."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Who is told."""
