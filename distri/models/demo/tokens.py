"""The demo model's tokenizer: CLIP's byte-pair format, every word of the language one token.

Letters are tokens too, so any other word is spelt out rather than refused.
"""

import itertools
import json
import string
from pathlib import Path

from transformers import CLIPTokenizer

from distri.models.demo.sentences import vocabulary

MAX_TOKENS = 32
_END = "</w>"


def merges_of(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges under which each word becomes one token, found by byte-pair counting over the words themselves."""
    pieces = {word: [*word[:-1], word[-1] + _END] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        counts: dict[tuple[str, str], int] = {}
        for parts in pieces.values():
            for pair in itertools.pairwise(parts):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            return merges
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        pieces = {word: _merge(parts, best) for word, parts in pieces.items()}


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _vocab_of(merges: list[tuple[str, str]]) -> dict[str, int]:
    letters = [*string.ascii_lowercase, *string.digits, *".,;:!?'-"]
    tokens = [*letters, *(letter + _END for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer of the demo language, sentences padded to `MAX_TOKENS` with the end token."""
    merges = merges_of(vocabulary())
    return CLIPTokenizer(vocab=_vocab_of(merges), merges=merges, model_max_length=MAX_TOKENS)


def write_plain_files(folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` into `folder`, for readers that do not know `tokenizer.json`."""
    merges = merges_of(vocabulary())
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "vocab.json").write_text(json.dumps(_vocab_of(merges)))
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
