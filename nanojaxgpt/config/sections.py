"""The config's fields, one typed line each: default, comment, range or choices, and rules.

`base_config`, the checks, what a resume and a paper may change, which trials of a sweep share a
program, and docs/config.md all read these lines. 0 or "" means off; whole words, unit last.
"""

import dataclasses
import inspect
import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

Value = TypeVar("Value")

LARGEST = {int: 2**31 - 1, float: 1e30}
ABOVE_ZERO = 1e-30
GATED = ("swiglu", "geglu")  # values of model.mlp with two kernels before the activation
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1: the step takes numbers as float32


@dataclass
class Rule:
    """What a field may hold (`low` to `high`, or one of `choices`), and who sees its value."""

    default: Any
    comment: str
    low: float
    high: float
    choices: tuple[str, ...]  # of a tuple: of each of its items
    resume: bool  # may change when a run is resumed: it does not change what is trained
    traced: bool  # a number that compiled programs take as an argument
    host_only: bool  # no compiled program depends on it, so a sweep's trials share theirs
    place: bool  # where the data and the devices are: not part of a paper's recipe
    item: type = str  # the type of the value, or of the items of a tuple

    def settle(self, kind: Any, flags: dict[str, bool]) -> None:
        """Take the field's annotated type, and the flags that hold for its whole section."""
        self.item = next(iter(get_args(kind)), kind)
        self.high = min(self.high, LARGEST.get(self.item, math.inf))
        for flag, value in flags.items():
            setattr(self, flag, value or getattr(self, flag))
        self.traced = self.traced and kind in (bool, int, float)


def field(
    default: Value,
    comment: str,
    *,
    low: float = 0,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    resume: bool = False,
    traced: bool = False,
    host_only: bool = False,
    place: bool = False,
) -> Value:
    """Declare a field of a section; see Rule. `high` is at most LARGEST of its type."""
    rule = Rule(default, comment, low, high, choices, resume, traced, host_only, place)
    return dataclasses.field(default=default, metadata={"rule": rule})


class Section:
    """The base of the sections. `class S(Section, resume=True)` sets a flag of all its fields."""

    flags: ClassVar[dict[str, bool]] = {}

    def __init_subclass__(cls, **flags: bool) -> None:
        cls.flags = cls.flags | flags
        for name, kind in inspect.get_annotations(cls).items():
            declared = vars(cls).get(name)
            if isinstance(declared, dataclasses.Field) and "rule" in declared.metadata:
                declared.metadata["rule"].settle(kind, cls.flags)

    @classmethod
    def rules(cls) -> dict[str, Rule]:
        """Return the rule of each declared field, in the order of the source."""
        declared = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        return {f.name: f.metadata["rule"] for f in declared if "rule" in f.metadata}

    def given(self) -> dict[str, Any]:
        """Return {field: value}, each value as it was given."""
        return {name: getattr(self, name) for name in self.rules()}


# fmt: off
@dataclass(frozen=True)
class Model(Section):
    """The model's shape, its layers, and how they are computed."""

    num_layers: int = field(4, "transformer blocks", low=1)
    embed_dim: int = field(128, "width of the residual stream", low=1)
    num_heads: int = field(4, "query heads", low=1)
    num_kv_heads: int = field(0, "0: num_heads; 1: multi-query; in between: grouped-query")
    head_dim: int = field(0, "0: embed_dim / num_heads")
    mlp: str = field("gelu_tanh", "none: attention only",
        choices=("gelu_tanh", "gelu", "relu", "relu2", *GATED, "none"))
    mlp_dim: int = field(0, "0: 4 x embed_dim")
    mlp_dims: tuple[int, ...] = field((0,), "of each layer, repeated over the layers; 0: mlp_dim")
    seq_len: int = field(256, "context length in tokens", low=1)
    vocab_size: int = field(0, "0: the tokenizer's; a larger number pads the embedding table")
    positions: str = field("learned", "how the model knows the order of the tokens",
        choices=("learned", "sinusoidal", "rotary", "alibi", "none"))
    rotary_base: float = field(1e4, "theta of the rotary frequencies", low=ABOVE_ZERO)
    rotary: tuple[str, ...] = field(("",),
        'per layer, repeated: none, or as "base=1e6 fraction=0.25"')
    norm: str = field("layernorm", "of every normalization", choices=("layernorm", "rmsnorm"))
    norm_placement: str = field("pre",
        "sandwich: before a sublayer and after it; output: after it, before adding",
        choices=("pre", "post", "sandwich", "output"))
    norm_bias: bool = field(True, "layernorm only")
    norm_eps: float = field(1e-5, "added to the variance", low=ABOVE_ZERO)
    norm_scale: bool = field(True, "norms multiply by a learned scale")
    norm_offset: float = field(0.0, "added to that scale, as Gemma's 1; the scale starts at 1 - it")
    final_norm: bool = field(True, "normalize before the head")
    parallel_block: bool = field(False, "attention and MLP read the same input")
    parallel_norms: bool = field(False, "in a parallel block the MLP's input has its own norm")
    bias: bool = field(True, "in the projections of bias_in")
    bias_in: str = field("all", "attention: qkv and its output",
        choices=("all", "qkv", "attention"))
    head_bias: bool = field(False, "the head has a bias")
    qk_norm: bool = field(False, "normalize queries and keys, without a bias")
    qk_norm_over: str = field("head", "head: one scale for all heads; width: all heads together",
        choices=("head", "width"))
    windows: tuple[int, ...] = field((0,),
        "attention window per layer in tokens, cycled over the layers; 0: none")
    smeared_keys: bool = field(False, "mix k_t with k_(t-1) by a learned gate per head")
    attention_scale: float = field(0.0, "0: 1 / sqrt(head_dim)")
    attention_softcap: float = field(0.0, "c: scores become c * tanh(scores / c)")
    logit_softcap: float = field(0.0, "c: logits become c * tanh(logits / c)")
    tied_head: bool = field(True, "the head reuses the embedding table")
    num_labels: int = field(0, "rows of a head for labels; 0: what the objective needs")
    dropout: float = field(0.0, "rate for embeddings, attention weights and what a sublayer adds",
        high=BELOW_ONE)
    mup_base_dim: int = field(0, "embed_dim at which muP equals the standard one; 0: no muP")
    embed_multiplier: float = field(1.0, "scales the input of the first layer", traced=True)
    attention_multiplier: float = field(1.0,
        "scales the attention logits, on top of attention_scale", traced=True)
    residual_multiplier: float = field(1.0, "scales what a sublayer adds to the residual stream")
    logit_multiplier: float = field(1.0, "scales the output logits", traced=True)
    init: str = field("gpt2", "fan_in: truncated normal; torch: PyTorch's layer defaults",
        choices=("gpt2", "fan_in", "torch"))
    attention: str = field("auto", "the kernel; auto: by backend", resume=True, place=True,
        choices=("auto", "plain", "xla", "cudnn", "splash"))
    attention_blocks: str = field("",
        'tiles of splash, as "q=1024 kv=512 fused=true"; "": 512; see docs/attention.md',
        resume=True, place=True)
    unroll: int = field(0, "layers per scan iteration; 0: all on CPU, one elsewhere", resume=True,
        place=True)
    remat: str = field("none",
        'what the backward pass recomputes: none, full, dots, dots_no_batch, or all but these, as '
        '"save=q,k,v offload=layer_input"; see docs/accelerators.md', resume=True, place=True)
    param_dtype: str = field("float32", "of the parameters", choices=("float32", "bfloat16"))
    compute_dtype: str = field("float32", "of the activations; auto: bfloat16 where that is faster",
        choices=("float32", "bfloat16", "auto"))


@dataclass(frozen=True)
class Data(Section):
    """Which corpus, and how it becomes tokens."""

    source: str = field("stdlib",
        "KIND[:LOCATION]: stdlib, text:PATH, jsonl:URL, ...; see docs/data.md", place=True)
    sha256: str = field("", 'of the download, in hex; separate several by commas; "": not checked',
        resume=True, place=True)
    mixture: tuple[str, ...] = field((),
        'replaces source, weights first: ("3 text:a.txt", "1 text:b.txt")')
    tokenizer: str = field("",
        'bytes, chars, sentencepiece, ...; "": as in init.from_run, else bytes')
    tokenizer_vocab_size: int = field(1024,
        "size of a sentencepiece tokenizer trained on the corpus", low=1)
    lossy_tokenizer: bool = field(False,
        "accept a tokenizer that alters texts, and report the loss", resume=True)
    packing: str = field("wrap",
        "wrap: cut one stream every seq_len; pack: whole, separate documents",
        choices=("wrap", "pack"))
    overlong: str = field("drop",
        "an example for fine-tuning that is longer than a row: drop it, or cut its end",
        choices=("drop", "cut"))
    chat_template: str = field("",
        'Jinja file, plain, none; "": the model\'s own; see docs/data.md')
    validation_fraction: float = field(0.1, "tail of each source that is held out", high=BELOW_ONE)
    validation_documents: int = field(0,
        "hold out the last N documents of each source instead; 0: off")
    validation_source: str = field("", 'validate on this separate source instead; "": off')
    bad_text: str = field("error", "what to do with a document that can't be read",
        choices=("error", "skip"))
    tfds_dir: str = field("", 'folder of prepared TensorFlow Datasets; "": ~/tensorflow_datasets',
        resume=True, place=True)
    manual_dir: str = field("", "folder of your own files, for TFDS builders that need them",
        resume=True, place=True)
    num_workers: int = field(0, "tokenizing processes; 0: one per core", resume=True, place=True)
    prefetch_batches: int = field(2, "batches prepared in advance", low=1, resume=True, place=True)
    cache_dir: str = field("",
        'stores, downloads; "": $XDG_CACHE_HOME/nanojaxgpt, ~/.cache/nanojaxgpt', resume=True,
        place=True)


@dataclass(frozen=True)
class Optim(Section, traced=True):
    """The optimizer and its schedule. Numbers can be swept without a new compilation."""

    optimizer: str = field("adamw", "how a gradient becomes an update",
        choices=("adamw", "adafactor", "lion", "sgd", "muon", "schedule_free"))
    learning_rate: float = field(1e-3, "after the warm-up, before the decay")
    schedule: str = field("cosine", "of the learning rate, after a linear warm-up",
        choices=("cosine", "linear", "constant", "inverse_sqrt", "wsd"))
    warmup_steps: int = field(100, "length of the warm-up")
    final_fraction: float = field(0.1,
        "cosine, linear and wsd end at this fraction of learning_rate", high=1)
    decay_fraction: float = field(0.2, "length of wsd's decay, as a fraction of num_steps", high=1)
    beta1: float = field(0.9, "decay of the first moment, or momentum", high=BELOW_ONE)
    beta2: float = field(0.95, "decay of the second moment", high=BELOW_ONE)
    eps: float = field(1e-8, "added to the root of the second moment", low=ABOVE_ZERO)
    weight_decay: float = field(0.1, "of the parameters that match decay_pattern")
    independent_decay: bool = field(False,
        "scale the decay by the schedule alone, not by learning_rate")
    decay_pattern: str = field(r"_[A-Z]{2,}$", "paths that decay; default: all matrices and tables")
    trainable: tuple[str, ...] = field((),
        'paths that train, first match wins: ("!embed", "."); (): all')
    trainable_layers: int = field(0, "of the layers, train only this many of the last; 0: all")
    rate_multipliers: tuple[str, ...] = field((),
        'learning rate factors by path: ("embed_VD=0.1",); 0 freezes')
    clip_norm: float = field(1.0, "maximum global norm of the gradient; 0: off")
    ema_decay: float = field(0.0,
        "evaluate and save an exponential average of the parameters; 0: off", high=BELOW_ONE)
    spike_factor: float = field(0.0, "skip a gradient this many times the recent norm; 0: off")
    max_skipped_steps: int = field(0, "consecutive skipped updates (spikes, non-finite) tolerated")


@dataclass(frozen=True)
class Lora(Section):
    """Adapters of low rank beside the kernels of a pretrained model; see docs/finetune.md."""

    rank: int = field(0, "of each kernel's adapter; 0: none")
    alpha: float = field(16.0, "an adapter adds alpha / rank times its output", traced=True)
    rank_stabilized: bool = field(False, "alpha / sqrt(rank) instead")
    targets: tuple[str, ...] = field(("layers",),
        "kernels with an adapter: patterns of paths; default: all of attention and MLP")
    dropout: float = field(0.0, "rate for the input of the adapters", high=BELOW_ONE)
    base_dtype: str = field("", "of the frozen kernels: int8 with a scale for each output; \"\": "
        "model.param_dtype", choices=("", "int8"))

    @property
    def divisor(self) -> float:
        """What alpha is divided by."""
        return math.sqrt(self.rank) if self.rank_stabilized else self.rank


@dataclass(frozen=True)
class Mesh(Section, resume=True, place=True):
    """Devices per axis; -1: all that remain."""

    slice: int = field(1,
        "TPU slices on the data-center network; the other axes are within a slice", low=-1)
    data: int = field(-1, "replicas of the model, each with its own rows", low=-1)
    fsdp: int = field(1, "splits the rows and the weights, which are gathered when used", low=-1)
    sequence: int = field(1, "splits the tokens of each row", low=-1)
    tensor: int = field(1, "splits attention heads and the MLP", low=-1)


@dataclass(frozen=True)
class Train(Section):
    """Steps, batches, the loss, and what is logged."""

    num_steps: int = field(1000, "updates in all", low=1, traced=True)
    batch_size: int = field(32, "global batch, in sequences", low=1)
    ramp_batch_size: int = field(0,
        "batch size of the first step, doubled up to batch_size; 0: off")
    ramp_steps: int = field(0, "steps until batch_size is reached")
    accumulation_steps: int = field(1, "micro-batches that each batch is split into", low=1)
    seed: int = field(0, "of the initial values, the order of the data and dropout", traced=True)
    z_loss: float = field(0.0, "weight of log(Z)^2 in the loss", traced=True)
    loss_chunks: int = field(1, "parts of the sequence; only one part's logits exist at a time",
        low=1)
    log_every_steps: int = field(10, "steps between two records", low=1, resume=True,
        host_only=True)
    trackers: tuple[str, ...] = field(("jsonl",), "see docs/trackers.md", resume=True,
        host_only=True, choices=("jsonl", "tensorboard", "wandb", "trackio"))
    gc_every_steps: int = field(100,
        "steps between two collections of Python's garbage; 0: whenever Python likes", resume=True,
        host_only=True)
    hang_timeout_seconds: float = field(300.0,
        "exit 70 if a step exceeds it and 10 median steps; 0: off", resume=True)


@dataclass(frozen=True)
class Objective(Section):
    """What training minimizes. The traced numbers can be swept without a new compilation."""

    kind: str = field("language",
        "preference and reward learn from pairs, policy from rewards; see docs/finetune.md",
        choices=("language", "classify", "preference", "reward", "distill", "policy"))
    loss: str = field("dpo", "of kind=preference; orpo and simpo need no reference",
        choices=("dpo", "ipo", "orpo", "simpo"))
    beta: float = field(0.1, "preference: scale of the implicit reward; orpo: lambda",
        low=ABOVE_ZERO, traced=True)
    label_smoothing: float = field(0.0, "dpo and simpo: how likely a pair is the wrong way round",
        high=0.5, traced=True)
    margin: float = field(0.0, "simpo and reward: by how much the chosen answer should win",
        traced=True)
    nll_weight: float = field(0.0,
        "dpo, ipo, simpo: weight of the chosen answer's mean loss per token; orpo has it with 1",
        traced=True)
    centering: float = field(0.0, "reward: weight of (chosen + rejected)^2, to stay near 0",
        traced=True)
    teacher: str = field("", "distill: the MODEL whose probabilities are learned")
    temperature: float = field(1.0, "distill: divides the logits of both models", low=ABOVE_ZERO,
        traced=True)
    jsd_beta: float = field(0.0,
        "distill: 0: KL(teacher, student); 1: KL(student, teacher); between: generalized JSD",
        high=1, traced=True)
    group_size: int = field(8, "policy: completions of each prompt", low=2)
    max_tokens: int = field(64, "policy: tokens of a completion, at most", low=1)
    sample_temperature: float = field(1.0,
        "policy: of the samples, and of the log-probabilities that are trained", low=1e-2)
    aggregation: str = field("dapo",
        "policy: grpo: completions count alike; dapo: tokens; dr_grpo: over group x max_tokens",
        choices=("dapo", "grpo", "dr_grpo"))
    ratio: str = field("token", "policy: of each token, or of the whole sequence as in GSPO",
        choices=("token", "sequence"))
    clip_low: float = field(0.2, "policy: ratios below 1 - this are clipped", high=1, traced=True)
    clip_high: float = field(0.2, "policy: ratios above 1 + this are clipped", traced=True)
    kl: float = field(0.0, "policy: weight of the KL from where training started; 0: off",
        traced=True)
    updates: int = field(1, "policy: updates on the same samples", low=1)
    reward: str = field("", "policy: FILE.py:FUNCTION(prompt, completion, record) -> a number")
    reward_seconds: float = field(10.0, "policy: the most that a call may take", low=1e-3,
        resume=True, host_only=True)

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the model with the one that training started from."""
        return self.kind == "preference" and self.loss in ("dpo", "ipo")


@dataclass(frozen=True)
class Eval(Section, resume=True):
    """The validation loss and benchmarks during training."""

    every_steps: int = field(100, "0: only at the end", host_only=True)
    batch_size: int = field(0, "0: train.batch_size")
    num_batches: int = field(0, "0: the whole validation split")
    tasks: tuple[str, ...] = field((), "benchmarks: names, or FILE.json[:NAME]; see docs/evals.md")
    tasks_every_steps: int = field(0, "0: only at the end", host_only=True)
    tasks_limit: int = field(0, "questions of each task; 0: all")
    tasks_data: str = field("", "the folder of the tasks' files", place=True)


@dataclass(frozen=True)
class Checkpoint(Section, resume=True, host_only=True):
    """When the state is saved, and which checkpoints are kept."""

    every_steps: int = field(100, "0: only at the end")
    keep_last: int = field(2, "newest checkpoints to keep", low=1)
    keep_every_steps: int = field(0, "also keep multiples of this step; 0: off")
    keep_best: int = field(1, "best checkpoints to keep, by validation loss")


@dataclass(frozen=True)
class Init(Section):
    """What the first step starts from."""

    from_run: str = field("", "start from the parameters of this run")
    from_model: str = field("",
        "start from this model, whose section model and tokenizer it takes; see docs/models.md")
    state: str = field("params", "all: also its optimizer state, step and place in the data",
        host_only=True, choices=("params", "all"))
    step: int = field(0, "checkpoint of from_run; 0: the newest", host_only=True)
    scale: float = field(1.0,
        "scales the random initial values of all matrices; unused with from_run and from_model",
        host_only=True)


@dataclass(frozen=True)
class Sample(Section, resume=True, host_only=True):
    """The defaults of the commands `sample`, `chat` and `generate`."""

    prompt: str = field("\n", '"": a new document, from the tokenizer\'s end token')
    max_tokens: int = field(256, "new tokens of a sample", low=1)
    num_samples: int = field(1, "continuations of the prompt", low=1, high=1 << 16)
    temperature: float = field(0.8, "below 1e-5: greedy")
    top_k: int = field(0, "sample from the k likeliest tokens; 0: off")
    top_p: float = field(1.0, "sample from the fewest tokens of this total probability", high=1)
    min_p: float = field(0.0, "leave out tokens below this fraction of the likeliest", high=1)
    seed: int = field(0, "of the random choices")
    stop: tuple[str, ...] = field((), "the text ends before the first of these strings")
    end_ids: tuple[int, ...] = field((),
        "token ids that end a sample, besides the tokenizer's end token")


# fmt: on
@dataclass(frozen=True)
class Config:
    """All sections. `config.typed` makes it of a ConfigDict; model.config has that of a job."""

    model: Model = Model()
    data: Data = Data()
    optim: Optim = Optim()
    lora: Lora = Lora()
    mesh: Mesh = Mesh()
    train: Train = Train()
    objective: Objective = Objective()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    init: Init = Init()
    sample: Sample = Sample()


def kinds(config: type[Config]) -> dict[str, type[Section]]:
    """Return the class of each section by its name."""
    return get_type_hints(config)


def rules() -> dict[str, Rule]:
    """Return the rule of each field by its dotted name, in the order of the source."""
    return {
        f"{section}.{name}": rule
        for section, kind in kinds(Config).items()
        for name, rule in kind.rules().items()
    }
