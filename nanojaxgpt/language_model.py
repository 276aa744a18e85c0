"""A language model, ready to use: `load` opens one; it generates, scores and gives its logits."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from nanojaxgpt import checkpoint, config, memory, rundir, sharding
from nanojaxgpt.adapters import Bases, load_pretrained, load_run_params
from nanojaxgpt.batches import without_documents
from nanojaxgpt.config.sections import Config, Objective
from nanojaxgpt.console import warn
from nanojaxgpt.data.loader import (
    RunData,
    check_objective,
    load_run_tokenizer,
    open_source,
    prepare_data,
)
from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.hosts.team import ALONE, Team
from nanojaxgpt.interchange.opening import adopted, config_of, find_model
from nanojaxgpt.interchange.pretrained import Pretrained
from nanojaxgpt.interchange.provenance import (
    HUB,
    SCRATCH,
    Provenance,
    front_matter,
    load_provenance,
    origin_line,
    save_provenance,
)
from nanojaxgpt.interchange.targets import check_free, new_folder
from nanojaxgpt.interchange.templates import (
    ChatTemplate,
    load_template,
    open_template,
    save_template,
)
from nanojaxgpt.model.config import JobConfig, ModelConfig, complete
from nanojaxgpt.model.lora import merge_adapters
from nanojaxgpt.model.parameters import Params, count_params, parameters
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.reference import fill_reference, read_tables
from nanojaxgpt.sample import Sampling, padded_length, stream
from nanojaxgpt.text_stream import TextStream, encode_pair, encode_prompt
from nanojaxgpt.trainable import is_trainable, trained_patterns
from nanojaxgpt.validation import make_evaluation

GGUF_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
LOWER = (
    "To use less memory, lower sample.num_samples, sample.max_tokens or eval.batch_size, or use a "
    "mesh of more devices"
)


class Score(NamedTuple):
    """How a model takes a continuation: its log-probability in nats, and its number of tokens.

    `greedy`: whether greedy decoding would have given it.
    """

    log_probability: float
    greedy: bool
    tokens: int


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model with its parameters, its tokenizer, and the devices that hold it.

    `experiment` is the config that it was trained with, `step` the step of its checkpoint.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    mesh: Mesh
    experiment: JobConfig
    run: Path
    step: int
    chat_template: str = ""
    provenance: Provenance = SCRATCH

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        end_ids: Sequence[int] = (),
    ) -> Iterator[list[str]]:
        """Yield the new text of each prompt as it becomes final, until all have ended.

        Prompts are texts or ids; "" is a new document. A text ends before one of the strings
        `stop`, or with one of the model's end ids or of `end_ids`. The options are those of the
        config's section `sample`. Raises ConfigError, DataError, MemoryExceeded.
        """
        if isinstance(prompts, str):
            raise ConfigError(f"prompts must be a list: [{prompts!r}]")
        ids = [self.encode(prompt) for prompt in prompts]
        if not ids:
            return
        if wrong := [token for token in end_ids if token >= self.tokenizer.vocab_size]:
            last = self.tokenizer.vocab_size - 1
            raise ConfigError(f"sample.end_ids contains {wrong[0]}, but the last id is {last}")
        ends = tuple({*end_ids, *self.end_ids})
        texts = [TextStream(self.tokenizer, prompt, stop, ends) for prompt in ids]
        how = Sampling(temperature, top_k, top_p, min_p, self.tokenizer.vocab_size, ends)
        length = min(self.config.seq_len, max(map(len, ids)) + max_tokens)
        cache = memory.cache_bytes(self.config, len(ids), length)
        held = {"parameters": memory.shard_bytes(self.params), "cache": cache}
        memory.check("sampling", held, self.mesh, lambda: LOWER)
        rng = jax.random.key(seed)
        chunks = stream(self.config, self.params, ids, max_tokens=max_tokens, rng=rng, how=how)
        while not all(text.finish for text in texts):
            with self.on_devices("sampling"):
                chunk = next(chunks, None)
            if chunk is None:
                yield [text.close() for text in texts]
            else:
                yield [text.add(new) for text, new in zip(texts, chunk.tolist(), strict=True)]

    def generate(self, prompts: Sequence[str | Sequence[int]], **options: Any) -> list[str]:
        """Return the text that continues each prompt, without the prompt; see `stream`."""
        found = [""] * len(prompts)
        for parts in self.stream(prompts, **options):
            found = [text + part for text, part in zip(found, parts, strict=True)]
        return found

    def logits(self, inputs: Sequence[str] | np.ndarray) -> np.ndarray:
        """Return the logits of the token after each one, float32 [B, T, V].

        `inputs` are texts, of which shorter ones are followed by rows without meaning, or ids
        [B, T]. Raises ConfigError where they don't fit the context.
        """
        rows = [self.encode(row) if isinstance(row, str) else list(row) for row in inputs]
        longest = max(map(len, rows), default=0)
        if not 0 < longest <= self.config.seq_len:
            raise ConfigError(f"{longest} tokens don't fit a context of {self.config.seq_len}")
        ids_BT = np.zeros((len(rows), padded_length(longest, self.config.seq_len)), np.int32)
        for row, ids in enumerate(rows):
            ids_BT[row, : len(ids)] = ids
        if ids_BT.min() < 0 or ids_BT.max() >= self.config.vocab_size:
            raise ConfigError(f"ids must be from 0 to {self.config.vocab_size - 1}")
        with self.on_devices("the forward pass"):
            logits_BTV = _logits(Transformer(self.config), self.params, ids_BT)
            return np.asarray(logits_BTV)[:, :longest, : self.tokenizer.vocab_size]

    def score(self, prompt: str, continuation: str) -> Score:
        """Return how likely the continuation is after the prompt.

        Both are tokenized as one text, with spaces at the prompt's end moved to the continuation,
        as lm-eval does it; an empty prompt is a new document. Of what is longer than the context
        the end counts. Raises ConfigError where the continuation alone is longer.
        """
        start, rest = encode_pair(self.tokenizer, prompt, continuation)
        count = len(rest)
        if not 0 < count <= self.config.seq_len:
            raise ConfigError(f"a continuation of {count} tokens can't be scored: it must have at "
                              f"least one and fit a context of {self.config.seq_len}")  # fmt: skip
        ids_T = np.array((start + rest)[-self.config.seq_len - 1 :], np.int32)
        logits_TV = self.logits(ids_T[None, :-1])[0, -count:].astype(np.float64)
        top_T = logits_TV.max(-1)
        norm_T = top_T + np.log(np.exp(logits_TV - top_T[:, None]).sum(-1))
        chosen_T = logits_TV[np.arange(count), ids_T[-count:]]
        return Score(float(np.sum(chosen_T - norm_T)), bool(np.all(chosen_T == top_T)), count)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the ids of a prompt; see text_stream.encode_prompt."""
        return encode_prompt(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The model's own chat template. Raises ConfigError where it has none, DataError."""
        if not self.chat_template:
            raise ConfigError(f"{self.run} has no chat template: it is a base model, which "
                              "continues texts; use sample")  # fmt: skip
        return open_template(self.chat_template, self.tokenizer)

    @property
    def vocab_rows(self) -> int:
        """The rows of the vocabulary that count: all that the model started from, or those of
        the tokenizer, after which only padding follows.
        """
        own = self.experiment.init.from_model or self.experiment.init.from_run
        return self.config.vocab_size if own else self.tokenizer.vocab_size

    @property
    def first_id(self) -> int:
        """The id before a text that nothing precedes, as lm-eval chooses it.

        That is the start token, or the bos token that the model's files state, or the end token.
        Raises ConfigError where there is none.
        """
        stated = self.provenance.tokenizer.get("bos_token", -1)
        if self.tokenizer.start_id < 0 <= stated:
            return stated
        return encode_prompt(self.tokenizer, "")[0]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text: the tokenizer's end token, and sample.end_ids."""
        return tuple({self.tokenizer.end_id, *self.experiment.sample.end_ids} - {-1})

    def save(self, folder: str | Path, format: str = "run", dtype: str = "") -> None:
        """Write the model as a run directory, a Hugging Face folder, a GGUF file, or its adapters.

        `format` is run, hf, gguf or peft; but for the last, adapters are merged. `dtype` (default:
        that of the parameters) is float32, bfloat16 or float16, and q8_0 for gguf. Rows of the
        vocabulary that only pad it are left out, unless they are those of the model that it
        started from. Raises ConfigError where there is something at `folder`, or where the format
        can't express the model.
        """
        target = Path(folder)
        rundir.check_folder("folder", target.parent)
        check_free(target)
        if self.config.lora.rank and format != "peft":
            return self.merged().save(folder, format, dtype)
        if (format == "gguf") != (target.suffix == ".gguf"):
            raise ConfigError(
                f"{target} with format={format}: the name of a GGUF file ends in .gguf, and that "
                "of nothing else"
            )
        if format == "peft":
            return self.save_adapters(target, dtype or "float32")
        dtype = dtype or self.config.param_dtype
        cfg = dataclasses.replace(self.config, vocab_size=self.vocab_rows)
        parts = cfg, self.params, self.tokenizer, self.chat_template
        if format == "run":
            self.save_run(target)
        elif format == "hf":
            from nanojaxgpt.interchange import huggingface

            sample = self.experiment.sample.given()
            huggingface.write_folder(target, *parts, sample, dtype, self.card(target.name),
                                     provenance=self.provenance)  # fmt: skip
        elif format == "gguf":
            from nanojaxgpt.interchange import gguf_write

            gguf_write.write_file(target, *parts, target.stem, GGUF_TYPES.get(dtype, dtype),
                                  self.provenance)  # fmt: skip
        else:
            raise ConfigError(f"format={format!r} must be one of run, hf, gguf, peft")

    def merged(self) -> "LanguageModel":
        """Return the model with its adapters added to its kernels; itself where it has none."""
        if not self.config.lora.rank:
            return self
        plain = config.with_fields(self.experiment, {"lora.rank": 0, "lora.base_dtype": ""})
        params = merge_adapters(self.config, self.params)
        return dataclasses.replace(self, config=plain.model, params=params, experiment=plain)

    def save_adapters(self, folder: Path, dtype: str) -> None:
        """Write the adapters for peft; the base is the one that the training started from."""
        from nanojaxgpt.interchange import peft

        if not self.config.lora.rank:
            raise ConfigError(f"{self.run} has no adapters (lora.rank=0): write it as hf or gguf")
        patterns = trained_patterns(self.experiment)
        table = parameters(self.config).values()
        if more := [row.path for row in table
                    if row.kind != "adapter" and is_trainable(row.path, patterns)]:  # fmt: skip
            raise ConfigError(f"beside its adapters {self.run} trained {', '.join(more)}, which a "
                              "folder of peft can't hold here: write it as hf or gguf")  # fmt: skip
        init = self.experiment.init
        base = find_model(init.from_model) if init.from_model else Path(init.from_run)
        family = "" if isinstance(base, Path) else base.family
        name = (init.from_model or init.from_run).removeprefix(HUB)
        card = self.card(folder.name, "peft")
        peft.write_adapter(folder, self.config, self.params, name, family, dtype, card)

    def save_run(self, run: Path) -> None:
        """Write the model as a run directory that every command takes."""
        with new_folder(run) as partial:
            (partial / "tokenizer").mkdir()
            self.tokenizer.save(partial / "tokenizer")
            save_template(partial / "tokenizer", self.chat_template)
            save_provenance(partial, self.provenance)
            rundir.write_text(partial / "config.json", config.to_json(self.experiment))
            known = rundir.read_identity(self.run, "the corpus") if self.run.is_dir() else {}
            data = known.get("data") or {"tokenizer": self.tokenizer.content_hash()}
            devices = [device.device_kind for device in self.mesh.devices.flat]
            rundir.write_identity(partial, self.experiment, data, devices, warn, {})
            keep = checkpoint.Keep(1, 0, 0, dict)
            saved = checkpoint.Checkpoints(partial / "checkpoints", keep)
            saved.save(self.step, {"params": self.params})
            saved.close()

    def card(self, name: str, library: str = "transformers") -> str:
        """Return a model card in Markdown: what the model is, and where it comes from.

        `library` reads what is written; of adapters the card speaks of the whole model.
        """
        cfg, init, known = self.config, self.experiment.init, self.provenance
        size = f"{cfg.num_layers} layers, {cfg.embed_dim} wide, context {cfg.seq_len}"
        known = known if known.name else known._replace(name=init.from_model or init.from_run)
        lines = [*front_matter(known, library), f"# {name}", ""]
        lines += [f"A language model of {count_params(cfg.bare):,} parameters: {size}.", ""]
        if cfg.lora.rank:
            lines += [f"These are its adapters alone (LoRA, rank {cfg.lora.rank}).", ""]
        if known.name:
            lines += [origin_line(known), ""]
        if self.step:
            data = self.experiment.data
            source = ", ".join(data.mixture) or data.source
            lines += [f"Trained with nanojaxgpt to step {self.step} on `{source}`; config "
                      f"{config.config_hash(self.experiment)}.", ""]  # fmt: skip
        return "\n".join(lines)

    def on_devices(self, what: str) -> contextlib.AbstractContextManager:
        """Return the context in which functions run on the mesh, and a lack of memory is told."""
        stack = contextlib.ExitStack()
        stack.enter_context(memory.explained(what, self.mesh, lambda: LOWER))
        stack.enter_context(jax.set_mesh(self.mesh))
        return stack


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Transformer, params: Params, ids_BT: jax.Array) -> jax.Array:
    return model.apply({"params": params}, ids_BT)[0]  # pyright: ignore[reportReturnType]


def load(
    model: str | Path,
    *,
    mesh: Mesh | Mapping[str, int] | None = None,
    step: int = 0,
    report: Callable[[str], None] = warn,
    bases: Bases | None = None,
) -> LanguageModel:
    """Return a model: of a run directory, a Hugging Face folder, a .gguf file, or hf:OWNER/NAME.

    Of a run its newest good checkpoint, or that of `step`. `mesh` is a mesh or the sizes of its
    axes, as in {"fsdp": 2, "tensor": 2}; the default is one device. Models that are loaded with
    the same `bases` share the arrays of a common base. Raises ConfigError, DataError,
    CheckpointError, MemoryExceeded.
    """
    source = find_model(model)
    return open_model(source, config_of(source), mesh, step, report, bases)


def open_model(
    source: Path | Pretrained,
    cfg: Config,
    mesh: Mesh | Mapping[str, int] | None = None,
    step: int = 0,
    report: Callable[[str], None] = warn,
    bases: Bases | None = None,
    team: Team = ALONE,
) -> LanguageModel:
    """Return an opened model, whose config may have been changed where the model is not.

    Of several processes, a `team`, each holds the parts that the mesh gives to its devices.
    """
    if not isinstance(mesh, Mesh):
        devices = jax.devices() if mesh else jax.devices()[:1]
        mesh = sharding.make_mesh(mesh or {}, devices)
    if isinstance(source, Path):
        origin, tokenizer = source, load_run_tokenizer(source, report)
        template, provenance = load_template(source / "tokenizer"), load_provenance(source)
    else:
        origin, tokenizer, template = source.origin, source.tokenizer, source.chat_template
        provenance = source.provenance
        cfg = adopted(cfg, source.config, str(origin))
    with jax.set_mesh(mesh):
        dtype = sharding.compute_dtype(cfg.model.compute_dtype, sharding.platform())
    job_cfg = complete(config.with_fields(cfg, {"model.compute_dtype": dtype}))
    with memory.explained("loading the model", mesh, lambda: LOWER), jax.set_mesh(mesh):
        memory.check_model("the model", job_cfg.model, mesh, 0, LOWER)
        if isinstance(source, Path):
            step, params = load_run_params(source, job_cfg.model, mesh, step, report, team, bases)
        else:
            params = load_pretrained(source, job_cfg.model, mesh, bases)
    return LanguageModel(job_cfg.model, params, tokenizer, mesh, job_cfg, origin, step, template,
                         provenance)  # fmt: skip


def evaluate(
    model: LanguageModel, source: str = "", report: Callable[[str], None] = warn
) -> dict[str, Any]:
    """Return loss, perplexity, bits per byte and the number of tokens that were scored.

    Of a run with another objective it returns that one's metrics, see objectives/. Over the run's
    validation split, or all of another source, written as data.source. Raises
    ConfigError, DataError, MemoryExceeded.
    """
    cfg = model.experiment
    data = model_data(model, source, report)
    if cfg.objective.kind in ("distill", "policy"):  # teachers and rewards belong to training
        cfg = dataclasses.replace(cfg, objective=Objective())
    check_objective(cfg.objective.kind, data)
    finish = without_documents
    if cfg.objective.has_reference:
        tables = {} if source else read_tables(model.run, {"data": data.identity})
        if not tables:
            raise ConfigError(
                f"objective.loss={cfg.objective.loss} compares with a reference, which is known "
                f"for the data of {model.run} alone: evaluate that, without --data"
            )
        finish = fill_reference(tables["validation"])
    with model.on_devices("the evaluation"):
        held = {"parameters": checkpoint.abstract_params(model.config, model.mesh)}
        transformer = Transformer(model.config)
        run_evaluation = make_evaluation(cfg, data, model.mesh, transformer, held)
        found = run_evaluation(model.params, finish=finish)
    if not found["tokens"] and source:
        raise DataError(f"{source} has nothing to score: it is shorter than two tokens")
    if not found["tokens"]:
        raise DataError(
            f"{model.run} has no held-out data to validate on; set data.validation_fraction, "
            "data.validation_documents or data.validation_source (for a task: train_fraction), "
            "and train again"
        )
    return found


def model_data(model: LanguageModel, source: str, report: Callable[[str], None]) -> RunData:
    """Return the data of a model's run, or another source read with the model's tokenizer."""
    cfg = model.experiment
    if source:
        identity = (
            rundir.read_identity(model.run, "the labels", report) if model.run.is_dir() else {}
        )
        labels = tuple(identity.get("data", {}).get("labels", ()))
        folder, template = config.cache_dir(cfg), model.chat_template
        return open_source(source, model.tokenizer, cfg.data, folder, report, template, labels)
    data = prepare_data(cfg, report, model.run)
    rundir.check_identity(model.run, data.identity)
    return data
