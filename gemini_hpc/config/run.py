"""What a run is: every setting, its unit and its bounds. Resolved once, written to RUN_DIR/config.yaml."""

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from gemini_hpc.config.site import SiteConfig
from gemini_hpc.config.validation import Section
from gemini_hpc.core.placement import Form

EXAMPLE = "gemini_hpc.models.job:build"
"""The entry of the example program, whose model is known without building it."""


class TrainConfig(Section):
    """The training loop."""

    entry: str = Field(EXAMPLE, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """where the training is built, MODULE:FUNCTION"""
    steps: int = Field(120, ge=1, le=10**9)
    """steps (optimizer updates) to train"""
    seed: int = Field(1, ge=0, lt=2**63)
    """seed of the weights, of dropout and of the data's order"""
    micro_batch: int = Field(4, ge=1, le=1 << 20)
    """sequences of one rank in one forward and backward pass"""
    grad_accum: int = Field(1, ge=1, le=1 << 20)
    """micro batches per step"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """number format of the model; the optimizer always keeps fp32"""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed settings, merged over ours"""
    threads: int = Field(1, ge=1, le=1024)
    """CPU threads of each worker"""
    allow_nan: bool = False
    """train on when a loss or a gradient is not a finite number; by default such a step is taken back"""


class ModelConfig(Section):
    """The example model and its optimizer."""

    family: Literal["gpt2", "bert", "roberta"] = "gpt2"
    """the architecture"""
    preset: str = "small"
    """a size by its name, such as tiny, small or 10b"""
    seq_len: int = Field(128, ge=1)
    """length of a sequence, tokens"""
    lr: float = Field(1e-3, gt=0)
    """peak learning rate"""
    warmup_steps: int = Field(20, ge=0)
    """steps over which the learning rate rises to its peak"""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's weight decay"""
    grad_clip: float = Field(1.0, ge=0)
    """norm to which gradients are clipped; 0: not at all"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """share of activations dropped"""


class DataConfig(Section):
    """What is trained on."""

    source: Literal["text", "wikipedia", "synthetic"] = "text"
    """kind of data"""
    path: str | tuple[str, ...] | None = None
    """files or folders; null: text from the Python standard library's sources, Wikipedia from the network"""


class ClusterConfig(Section):
    """The machines, one worker each."""

    nodes: int = Field(4, ge=1, le=4096)  # the order to publish a checkpoint names all its files, in one packet
    """nodes that train, which is the number of ranks"""
    spares: int = Field(1, ge=0, le=4096)
    """nodes that stand by"""


class ProtectConfig(Section):
    """How the state of the training is kept safe."""

    replicas: int = Field(2, ge=1)
    """copies of every snapshot in the memory of different nodes, the owner's own included"""
    placement: Form = "mixed"
    """who holds them where replicas do not divide the nodes: mixed (the paper's), ring, overlap or full_tail"""
    mode: Literal["immediate", "interleaved", "blocking", "off"] = "immediate"
    """when replicas are made: immediate, interleaved (while training leaves the network idle), blocking (training waits
    in every step until its snapshot is safe: a failure costs the step in flight alone), or off (of the steps that are
    written to the persistent tier alone)"""
    persist_every: int = Field(40, ge=1)
    """steps between two checkpoints on the persistent tier"""
    keep: int = Field(3, ge=1)
    """newest checkpoints kept on the persistent tier"""

    @field_validator("mode", mode="before")
    @classmethod
    def _off_is_a_mode(cls, value: Any) -> Any:
        """YAML reads a bare `off` as false."""
        return "off" if value is False else value

    @property
    def snapshot_every(self) -> int:
        """Steps between two snapshots."""
        return self.persist_every if self.mode == "off" else 1


class RecoveryConfig(Section):
    """How failures are seen and repaired; every time is a bound in seconds."""

    first_rung: Literal["hot_swap", "rebuild"] = "hot_swap"
    """what is tried first: adopt a rank with the engine that is built, or build the engine anew"""
    heartbeat_s: float = Field(0.1, gt=0)
    """time between two heartbeats of an agent, seconds"""
    heartbeat_timeout_s: float = Field(1.0, gt=0)
    """silence after which a node is suspected, seconds; `suspect_s` later it is evicted"""
    suspect_s: float = Field(0.4, gt=0)
    """how long soft evidence waits for a second witness, seconds"""
    leave_s: float = Field(5.0, gt=0)
    """time for a worker to leave the collectives of an old generation, seconds"""
    build_s: float = Field(120.0, gt=0)
    """time for a worker process to start and build its engine, seconds"""
    fetch_s: float = Field(30.0, gt=0)
    """time to fetch one snapshot, seconds"""
    join_s: float = Field(30.0, gt=0)
    """time for all ranks to join the new group and restore, seconds"""
    collective_s: float = Field(60.0, gt=0)
    """timeout of one collective, seconds"""
    progress_s: float = Field(600.0, gt=0)
    """time without a step of any rank after which all start again from the last one, seconds"""
    world_s: float = Field(10.0, gt=0)
    """time for the window hosts to start an MPI world, seconds"""
    archive_s: float = Field(60.0, gt=0)
    """time to write or read one shard on the persistent tier, seconds"""
    max_restarts: int = Field(3, ge=0)
    """restarts in a row of a worker process before its node loses its rank"""
    max_fruitless: int = Field(20, ge=1)
    """generations in a row that may end before a step is done, before the run is given up"""

    @model_validator(mode="after")
    def _heartbeats_fit(self) -> Self:
        if self.heartbeat_timeout_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"recovery.heartbeat_timeout_s ({self.heartbeat_timeout_s}) is less than two heartbeats of"
                f" {self.heartbeat_s} s: set recovery.heartbeat_timeout_s={10 * self.heartbeat_s:g}"
            )
        if self.suspect_s < 2 * self.heartbeat_s:  # nodes speak when they are asked
            raise ValueError(
                f"recovery.suspect_s ({self.suspect_s}) is less than two heartbeats of {self.heartbeat_s} s, and a node"
                f" that lives could not clear itself: set recovery.suspect_s={4 * self.heartbeat_s:g}"
            )
        return self


class Drill(Section):
    """A failure on purpose, on the real thing."""

    step: int = Field(ge=1)
    """the step in which it strikes"""
    phase: Literal["forward", "backward", "optimizer", "snapshot", "replication", "after"] = "backward"
    """the moment in the step"""
    rank: int = Field(0, ge=0)
    """the rank that is struck"""
    action: Literal["kill_node", "kill_worker", "stop_worker"] = "kill_node"
    """kill_node: all processes and the memory of the node; kill_worker: the training process alone; stop_worker: that
    one hangs"""


def _one_drill(values: dict[str, Any]) -> tuple[Drill, ...]:
    """On this machine kill one node halfway, where the run is long enough and has nodes to show it with."""
    train, cluster = values["train"], values["cluster"]
    if values["site"].kind != "local" or train.steps < 2 or cluster.spares < 1 or cluster.nodes < 2:
        return ()
    return (Drill(step=train.steps // 2, rank=min(2, cluster.nodes - 1)),)


class RunConfig(Section):
    """A whole run."""

    name: str = Field("gpt2-gemini", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """name of the run, part of its directory's"""
    train: TrainConfig = TrainConfig()
    """the training loop"""
    model: ModelConfig = ModelConfig()
    """the example model"""
    data: DataConfig = DataConfig()
    """what is trained on"""
    cluster: ClusterConfig = ClusterConfig()
    """the machines"""
    protect: ProtectConfig = ProtectConfig()
    """how the state is kept safe"""
    recovery: RecoveryConfig = RecoveryConfig()
    """how failures are seen and repaired"""
    site: SiteConfig = SiteConfig()
    """where the run lives"""
    drills: tuple[Drill, ...] = Field(default_factory=_one_drill)
    """failures on purpose; by default one node is killed halfway, on the embedded cluster with a spare"""
    verify: bool = Field(default_factory=lambda values: values["site"].kind == "local")
    """train the undisturbed reference after the run and compare all losses; by default on the embedded cluster"""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problem = next(_contradictions(self), None)
        if problem:
            raise ValueError(problem)
        return self


def _contradictions(run: RunConfig) -> Iterator[str]:
    nodes, spares, replicas = run.cluster.nodes, run.cluster.spares, run.protect.replicas
    if run.train.precision == "fp16" and not run.site.gpus_per_node:
        yield "train.precision is fp16, which DeepSpeed does on GPUs only: set train.precision=bf16"
    stage = run.train.deepspeed.get("zero_optimization", {"stage": 3})
    if not isinstance(stage, dict) or stage.get("stage", 3) != 3:
        yield "train.deepspeed.zero_optimization.stage must be 3, the only one that is made safe here: leave it out"
    if nodes < replicas:
        yield (
            f"protect.replicas is {replicas} but cluster.nodes is {nodes}, and each copy needs its own node:"
            f" set protect.replicas={nodes} or cluster.nodes={replicas}"
        )
    gpus, limit = (nodes + spares) * (run.site.gpus_per_node or 0), run.site.gpu_limit
    if limit is not None and gpus > limit:
        yield (
            f"the run takes {gpus} GPUs, those of its {spares} spares included, and site {run.site.name} lets a user"
            f" hold {limit} (site.gpu_limit): set cluster.nodes or cluster.spares lower"
        )
    for number, drill in enumerate(run.drills):
        key = f"drills.{number}"
        if drill.step > run.train.steps:
            yield (
                f"{key}.step is {drill.step} but train.steps is {run.train.steps}:"
                f" set {key}.step={max(1, run.train.steps // 2)}, or drills=[] for a run without drills"
            )
        if drill.rank >= nodes:
            yield (
                f"{key}.rank is {drill.rank} but the ranks are 0 to {nodes - 1}:"
                f" set {key}.rank={nodes - 1}, or drills=[] for a run without drills"
            )
        if drill.action == "kill_node" and spares == 0:
            yield (
                f"{key} kills a node but there is no spare to take over:"
                f" set cluster.spares=1, or {key}.action=kill_worker, or drills=[] for a run without drills"
            )
