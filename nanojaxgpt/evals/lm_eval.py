"""A model as lm-eval takes one, in the same process: `lm_eval.simple_evaluate(model=Adapter(...))`.

Requests go through the same scorer and sampler as `eval --tasks`. Greedy decoding only.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

from nanojaxgpt.console import with_bar
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.evals.generation import generate_texts
from nanojaxgpt.evals.scoring import Pair, roll, score_pairs
from nanojaxgpt.interchange.templates import BREAK, break_control, split_control
from nanojaxgpt.language_model import LanguageModel, Score, load

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
GREEDY = {"do_sample": False, "temperature": 0.0}  # what lm-eval's tasks say of greedy decoding
DEFAULT_TOKENS = 256  # as `lm_eval --model hf` has it


class Adapter(TemplateLM):
    """A LanguageModel, or with `pretrained` a MODEL to load: a run, a folder, a file, hf:NAME.

    `batch_size` is eval.batch_size; "auto" leaves it to the scorer. `device` can only be the one
    that JAX has. Raises what `load` raises.
    """

    def __init__(
        self,
        model: LanguageModel | None = None,
        pretrained: str = "",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str = "",
    ) -> None:
        super().__init__()
        if (model is None) == (not pretrained):
            raise ConfigError("give a model, or pretrained=MODEL")
        model = model or load(pretrained)
        platform = model.mesh.devices.flat[0].platform
        if device.partition(":")[0] not in ("", platform, *(["cuda"] if platform == "gpu" else [])):
            raise ConfigError(f"device={device!r}: JAX runs on {platform} here; set JAX_PLATFORMS")
        if max_batch_size is not None:
            raise ConfigError("max_batch_size does not apply: set batch_size, or leave it at auto")
        if str(batch_size) != "auto":
            settings = replace(model.experiment.eval, batch_size=int(batch_size))
            model = replace(model, experiment=replace(model.experiment, eval=settings))
        self.model = model
        # lm-eval forks for its bootstrap samples: a fork of a process that runs JAX may hang.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text. Raises ConfigError where the tokenizer has none."""
        if self.model.tokenizer.end_id < 0:
            raise ConfigError(f"lm-eval needs an end token, which the tokenizer "
                              f"{self.model.tokenizer.kind} does not have")  # fmt: skip
        return self.model.tokenizer.end_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text without a context."""
        return self.model.first_id

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self.model.config.seq_len

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return ids, after the start token where the tokenizer has one and the text lacks it.

        What spells a control token becomes that token, as chat templates need it.
        """
        tokenizer, ids = self.model.tokenizer, list[int]()
        for part, token in split_control(string, tokenizer.control):
            plain = part.replace(BREAK, "")
            ids += tokenizer.encode(plain).tolist() if plain else []
            ids += [token] if token >= 0 else []
        start = tokenizer.start_id
        if start >= 0 and add_special_tokens is not False and ids[:1] != [start]:
            ids.insert(0, start)
        return ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return (log-probability, greedy) of each request; those of one context share it."""
        same: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, _) in enumerate(requests):
            same.setdefault(tuple(context), []).append(number)
        members = list(same.values())
        questions = [
            [Pair(requests[number][1], requests[number][2]) for number in one] for one in members
        ]
        found: list[Any] = [None] * len(requests)
        for (question, row), score in self._score(questions, disable_tqdm):
            number = members[question][row]
            answer = score.log_probability, score.greedy
            found[number] = answer
            self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return found

    def _score(
        self, questions: Sequence[Sequence[Pair]], quiet: bool
    ) -> Iterator[tuple[tuple[int, int], Score]]:
        each = iter if quiet else lambda batches: with_bar(batches, "scoring")
        for _, scores in score_pairs(self.model, questions, each=each):
            yield from scores

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each text, of which every token is scored once."""
        ids = [self.tok_encode(request.args[0]) for request in requests]
        questions = [roll(text, self.prefix_token_id, self.max_length) for text in ids]
        sums = [0.0] * len(requests)
        for (question, _), score in self._score(questions, disable_tqdm):
            sums[question] += score.log_probability
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text after each prompt, up to a stop string. Raises ConfigError to sample."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(generation_limits(request.args[1]), []).append(number)
        found = [""] * len(requests)
        for (max_tokens, until), members in groups.items():
            prompts = [self.tok_encode(requests[number].args[0]) for number in members]
            prompts = [ids or [self.prefix_token_id] for ids in prompts]
            each = iter if disable_tqdm else lambda batches: with_bar(batches, "generating")
            for _, texts in generate_texts(self.model, prompts, max_tokens, until, each=each):
                for place, text in texts.items():
                    number = members[place]
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation in the model's template; else up to the last message's end."""
        text = self.model.template.text(chat_history, answer=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = break_control(chat_history[-1]["content"], self.model.tokenizer.control).strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the model's template where one is asked for."""
        return self.model.chat_template if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """A name for the tokenizer, by which lm-eval keeps requests."""
        return f"{self.model.tokenizer.kind}-{self.model.tokenizer.content_hash()}"


def generation_limits(settings: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Return the number of tokens and the stop strings of lm-eval's settings for generation.

    Raises ConfigError for what would not be greedy decoding, or is not known.
    """
    until = settings.get("until") or []
    until = (until,) if isinstance(until, str) else tuple(until)
    limits = [settings[name] for name in LIMITS if settings.get(name) is not None]
    for name, value in settings.items():
        if name in ("until", *LIMITS) or value is None:
            continue
        if name not in GREEDY or value != GREEDY[name]:
            raise ConfigError(f"{name}={value!r} of a task's generation: only greedy decoding is "
                              "supported (do_sample=False, temperature=0)")  # fmt: skip
    return int(limits[0]) if limits else DEFAULT_TOKENS, until
