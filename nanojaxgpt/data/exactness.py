"""In: a tokenizer. Out: the first text that it changes or miscounts, and what a text loses by it.

Whether text comes back is tried on the tokenizer in hand: its type says little, as a byte-level
vocabulary may lack bytes, and any tokenizer.json may normalize.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nanojaxgpt.data.subwords import SPACE_MARK
from nanojaxgpt.data.tokenizers import END_TOKENS, Tokenizer
from nanojaxgpt.errors import DataError

SENTENCES = (
    "a b",
    "plain words café",
    " The   Quick  brown fox ",
    "# A heading\n\n## Another\n\n\n\tcode(x) {\r\n\t\treturn 1.5e-3;\r}\n    \n",
    "\ta\t\tb\t",
    "\n\n \n  \n",
    "It's 12,345 o'clock; isn't it? (we'll see) --- ### /* */",
    "don 't stop , now .",  # decoders that clean up close these gaps
    "Straße, naïve, ŁÓDŹ, İstanbul, ǆ",
    "Привет, мир! Ελληνικά, Ὀδυσσεύς",
    "日本語のテキスト、全角　空白と１２３、ｶﾅ",
    "我能吞下玻璃而不伤身体。繁體",
    "한국어 \u1112\u1161\u11ab",  # a syllable, and the same one in parts
    "مرحبا بالعالم، شكراً",
    "שלום עולם",
    "नमस्ते दुनिया, हिन्दी, தமிழ், ไทยไม่มีช่องว่าง",
    "e\u0301 \u00e9 A\u030a \u00c5 \u212b \ufb01 \u2126 \u00bd x\u00b2",  # NFC, NFD and NFKC differ
    "\u0323\u0301a a\u0301\u0323",  # marks alone, and out of their canonical order
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "\U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "\u00a0 \u2003 \u200b \u2028 \u3000 \x85 \ufeff \u00ad \ufffd \u2047",
    f"{SPACE_MARK} \u2585 \u0120the \u010a ##ing @@ </w>",  # the marks inside vocabularies
    "<0x0A> <s>x</s> <unk> <pad> [CLS] [MASK] [UNK] <|im_start|> <|endofprompt|>",
)


class Loss(NamedTuple):
    """What a tokenizer changes in texts: all 0 where it is exact."""

    changed_documents: int
    changed_characters: int  # of the text, which don't come back
    miscounted_bytes: int


def probes(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the texts to try: sentences, every byte that UTF-8 has, spellings of special tokens."""
    yield from SENTENCES
    # All of ASCII, all continuation bytes, then every byte that leads two, three and four.
    codes = [*range(0x80), *range(0x80, 0xC0), *range(0xC0, 0x800, 0x40)]
    codes += [max(0x800, lead << 12) for lead in range(16)] + [lead << 18 for lead in range(1, 5)]
    for character in map(chr, codes):
        if character.isprintable() or not character.isspace():
            yield character
        yield f"x{character}y {character} z{character}{character}"
    for spelling in dict.fromkeys((*END_TOKENS, *tokenizer.spellings)):
        yield f"{spelling} a{spelling}b  {spelling}  {spelling.strip()}\n"


def find_loss(tokenizer: Tokenizer) -> str:
    """Return the changed form of the first text that does not come back exactly; "" if all do.

    A text that the tokenizer refuses is not changed by it.
    """
    bytes_V = tokenizer.token_bytes()
    for text in probes(tokenizer):
        try:
            ids = tokenizer.encode(text)
        except DataError:
            continue
        back, size, counted = tokenizer.decode(ids), len(text.encode()), int(bytes_V[ids].sum())
        if back != text:
            return f"{text!r} comes back as {back!r}"
        if counted != size:
            return f"{text!r} has {size} bytes of UTF-8, but its tokens count {counted}"
        if tokenizer.end_id in ids:
            return f"{text!r} is encoded as the end-of-document token"
    return ""


def count_loss(tokenizer: Tokenizer, text: str, ids: np.ndarray, counted: int) -> Loss:
    """Return the loss of one document, whose tokens count for `counted` bytes."""
    back = tokenizer.decode(ids)
    lost = sum((Counter(text) - Counter(back)).values())
    return Loss(int(back != text), lost, abs(counted - len(text.encode())))
