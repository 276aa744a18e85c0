"""In: texts. Out: a SentencePiece model of theirs that loses nothing, and texts cut for it."""

import io
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece

from nanojaxgpt.errors import DataError

SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside its pieces
WORD_START = re.compile("(?<=[^ ]) ")
AFTER_LETTER = re.compile(r"(?<=\S) ")
# What a tokenizer is trained on, at most: a few seconds' work for merges, twenty for unigrams.
SAMPLE_CHARS = {"bpe": 4_000_000, "unigram": 1_000_000}
CHUNK_CHARS = 2_000
# Characters that SentencePiece keeps for itself; it skips any text that has the second.
RESERVED = str.maketrans({SPACE_MARK: " ", "\u2585": " "})


def train_sentencepiece(texts: Iterable[str], vocab_size: int, algorithm: str) -> bytes:
    """Return a model with `vocab_size` pieces, trained on a sample of `texts`, without loss.

    `algorithm` is bpe (merges) or unigram (a probability for each piece, the likeliest cut).

    Pieces may mix letters with punctuation, and spaces and newlines form runs: on source code both
    together make a text 1.45 times (1024 pieces) to 1.57 times (2048) shorter than the defaults.
    """
    texts = join_short(texts, CHUNK_CHARS)
    chunks = (chunk for text in texts for chunk in cut_at_words(text, CHUNK_CHARS))
    sample = draw_sample(chunks, SAMPLE_CHARS[algorithm] // CHUNK_CHARS)
    if not any(chunk.strip() for chunk in sample):
        raise DataError("the corpus has no text to train a tokenizer on")
    sample = [chunk.translate(RESERVED) for chunk in sample]
    model = train_model(sample, vocab_size, algorithm)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if processor.is_unknown(processor.piece_to_id(SPACE_MARK)):  # no space there, or too rare
        model = train_model(sample, vocab_size, algorithm, required_chars=SPACE_MARK)
    return model


def train_model(sample: list[str], vocab_size: int, algorithm: str, **options: Any) -> bytes:
    """Return the model that SentencePiece trains on the sample. Raises DataError if it can't."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=algorithm,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            max_sentence_length=2**30,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,  # it is written into the model, and with it into its hash
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise DataError(explain_training(str(error), vocab_size)) from error
    return model.getvalue()


def explain_training(message: str, vocab_size: int) -> str:
    """Return the meaning of SentencePiece's message for the user."""
    if most := re.search(r"value <= (\d+)", message):
        return (
            f"the corpus is too small for a SentencePiece vocabulary of {vocab_size}: it gives at "
            f"most {most[1]}; use more text or a lower data.tokenizer_vocab_size"
        )
    if least := re.search(r"\d+ vs (\d+)", message):
        return (
            f"a SentencePiece vocabulary of {vocab_size} is too small for this corpus, whose "
            f"characters and bytes need {least[1]}; raise data.tokenizer_vocab_size"
        )
    return f"SentencePiece can't train {vocab_size} pieces on this corpus: {message}"


def join_short(texts: Iterable[str], size: int) -> Iterator[str]:
    """Yield the texts, as many joined by newlines as it takes to have `size` characters."""
    waiting: list[str] = []
    for text in texts:
        waiting.append(text)
        if sum(map(len, waiting)) >= size:
            yield "\n".join(waiting)
            waiting = []
    if waiting:
        yield "\n".join(waiting)


def draw_sample(items: Iterable[str], size: int) -> list[str]:
    """Return `size` of the items, or all of them, chosen at random but always the same."""
    chooser, sample = random.Random(0), []
    for number, item in enumerate(items):
        if number < size:
            sample.append(item)
        elif (place := chooser.randrange(number + 1)) < size:
            sample[place] = item
    return sample


def cut_after_letters(text: str, size: int) -> Iterator[str]:
    """Yield `text` in parts of at least `size` characters, cut before the first space after one.

    A text without such a place stays whole.
    """
    start = 0
    while space := AFTER_LETTER.search(text, start + size):
        yield text[start : space.start()]
        start = space.start()
    yield text[start:]


# What a pattern is made of that always begins a match at a space after another character: no part
# matches such a space after anything else, looks behind, or looks ahead but past white space.
CONTRACTIONS = re.compile(r"'[a-z]{1,2}|\(\?i:('[a-z]{1,2}\|?)+\)")
SAFE_PARTS = {
    r" ?\p{L}+",
    r" ?\p{N}+",
    r"\p{N}",
    r"\p{N}{1,3}",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
}


def may_cut(settings: dict[str, Any]) -> bool:
    """Return whether cuts before a space after another character can't change a token.

    `settings` are those of a tokenizer.json. It is so where nothing normalizes, no added token
    takes in a space from its right, and every such space begins a new word: by GPT-2's pattern
    (ByteLevel's own), or by one that is made of SAFE_PARTS, among them all white space.
    """
    added = [token for token in settings.get("added_tokens", []) if not token["special"]]
    if settings.get("normalizer") or any(
        token["rstrip"] or re.search(r"\s", token["content"]) for token in added
    ):
        return False
    splitter, begins_words = settings.get("pre_tokenizer") or {}, False
    for step in splitter.get("pretokenizers", [splitter]):
        match step:
            case {"type": "Digits"}:
                pass
            case {"type": "ByteLevel", "add_prefix_space": False}:
                begins_words |= step.get("use_regex", True)
            case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(pattern)}}:
                parts = re.split(r"\|(?![^(]*\))", pattern)
                unknown = [
                    p for p in parts if p not in SAFE_PARTS and not CONTRACTIONS.fullmatch(p)
                ]
                if unknown or step.get("invert"):
                    return False
                begins_words |= r"\s+" in parts
            case _:
                return False
    return begins_words


def cut_at_words(text: str, size: int) -> Iterator[str]:
    """Yield `text` in parts of `size` to 2 * `size` characters, cut before a space if possible."""
    start = 0
    while len(text) - start > size:
        space = WORD_START.search(text, start + size, start + 2 * size)
        stop = space.start() if space else start + 2 * size
        yield text[start:stop]
        start = stop
    yield text[start:]
