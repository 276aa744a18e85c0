"""In: a JSON schema. Out: which tokens may come next, so that an answer is JSON that fits it."""

import copy
import functools
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.errors import ConfigError, UserError
from nanojaxgpt.extras import require_package

PROBE = '{"a b":[1,-2.5e3,true,null]}'  # what a tokenizer must keep as it is
LARGEST_SCHEMA = 1 << 16  # characters
KEPT_SCHEMAS = 32  # that were compiled last
LARGEST_MULTIPLE = 10_000  # of all multipleOf in common: the time to compile grows with its square
# Bounds of llguidance for a schema and for a token: some milliseconds, and 40 MB for an answer.
BOUNDS: Any = {"step_max_items": 10_000, "step_lexer_fuel": 100_000, "max_lexer_states": 20_000}
NOTHING = "nothing fits it that this model can write"
# Spaces between values are left out: a weak model may never stop to write them.
COMPACT: Any = {"whitespace_flexible": False}


class Pieces:
    """A tokenizer in the form that llguidance takes."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
        self._tokenizer, ids = tokenizer, range(tokenizer.vocab_size)
        # There must be an end; where a model has none, an id behind all others is never drawn.
        self.ends = list(end_ids) or [tokenizer.vocab_size]
        self.eos_token_id = self.ends[0]
        self.tokens = [b"" if i in self.ends else tokenizer.piece(i) for i in ids]
        self.tokens += [b""] * (max(self.ends) + 1 - len(ids))
        self.special_token_ids = [i for i, piece in enumerate(self.tokens) if not piece]

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._tokenizer.encode(text).tolist()


class Grammar:
    """Where an answer stands in its schema. `allowed_X` has a bit for each id that may follow."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self.matcher, self.words = matcher, -(-vocab_size // 32)
        self.allowed_X = np.zeros(self.words, np.uint32)
        self.is_complete = self._look()

    def take(self, token: int) -> None:
        """Go on after a token. Raises ConfigError where the schema is too complex from there on."""
        self.matcher.consume_token(token)
        self.is_complete = self._look()

    def copy(self) -> "Grammar":
        """Return a grammar that stands at the same place, and goes on by itself."""
        found = copy.copy(self)
        found.matcher = self.matcher.deep_copy()
        return found

    def _look(self) -> bool:
        """Find what may follow, and return whether nothing may: the JSON is complete."""
        matcher = self.matcher
        if not matcher.is_stopped():
            bits = matcher.compute_bitmask()
            self.allowed_X = np.frombuffer(bits, np.uint32)[: self.words]
        check_matcher(matcher)
        if matcher.is_stopped() and matcher.is_accepting():
            return True
        if matcher.is_stopped() or not self.allowed_X.any():
            raise ConfigError(f"schema can't be followed: {NOTHING}")
        return False


class Grammars:
    """The grammars of a model's answers; what a tokenizer and a schema need is made once."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
        self.tokenizer, self.end_ids = tokenizer, end_ids
        self._compiled = functools.lru_cache(KEPT_SCHEMAS)(self._compile)

    def begin(self, schema: str) -> Grammar:
        """Return the grammar of a schema before the first token. Raises ConfigError."""
        require_package("llguidance", "schema", "schema")
        if (size := len(schema)) > LARGEST_SCHEMA:
            raise ConfigError(f"schema has {size:,} characters, more than {LARGEST_SCHEMA:,}")
        return self._compiled(schema).copy()

    @functools.cached_property
    def _pieces(self) -> Any:
        """The tokenizer for llguidance. Raises ConfigError where its ids are not a text's bytes."""
        import llguidance

        try:
            ids = self.tokenizer.encode(PROBE).tolist()
            text = b"".join(map(self.tokenizer.piece, ids)).decode(errors="replace")
        except UserError as error:
            text = str(error)
        if text.strip() != PROBE:
            raise ConfigError(f"schema is not possible with this model: its tokenizer can't write "
                              f"{PROBE} ({text[:100]})")  # fmt: skip
        pieces = Pieces(self.tokenizer, self.end_ids)
        wrapper = llguidance.TokenizerWrapper(pieces)
        return llguidance.LLTokenizer(wrapper, eos_token=pieces.ends)

    def _compile(self, schema: str) -> Grammar:
        """Return the grammar of a schema that was not compiled lately. Raises ConfigError."""
        import llguidance

        kind = llguidance.LLMatcher
        try:
            grammar = kind.grammar_from_json_schema(schema, overrides=COMPACT)
            multiple = common_multiple(json.loads(schema))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"schema can't be read as a JSON object: {error}") from None
        if multiple > LARGEST_MULTIPLE:
            raise ConfigError(f"schema has multipleOf whose common multiple is above "
                              f"{LARGEST_MULTIPLE:,}")  # fmt: skip
        limits = llguidance.LLParserLimits(verbose_errors=False, **BOUNDS)
        matcher = kind(self._pieces, grammar, log_level=0, limits=limits)
        return Grammar(matcher, self.tokenizer.vocab_size)


def check_matcher(matcher: Any) -> None:
    """Raise ConfigError where a matcher has failed."""
    if matcher.is_error():
        problem = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
        if problem.startswith("NoExtension"):
            problem = NOTHING
        raise ConfigError(f"schema can't be followed: {problem[:300]}")


def common_multiple(schema: Any) -> int:
    """Return the least common multiple of all multipleOf in a schema."""
    found, values = 1, [schema]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            number = value.get("multipleOf", 1)
            if type(number) in (int, float):
                found = math.lcm(found, max(Fraction(str(number)).numerator, 1))
            values += value.values()
        elif isinstance(value, list):
            values += value
    return found
