"""The two kinds of tokenizer that Stable Diffusion 3.5 needs, trained on the captions: CLIP's
byte-level BPE and T5's Unigram.

Both are built by the public classes of transformers, so `save_pretrained` and `from_pretrained`
give the same tokenizer back."""

import json
from collections import Counter

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

from benchmarks.tiny.architecture import PROMPT_TOKENS

VOCABULARY = 2560
BOS, EOS, PAD, UNK, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "<pad>", "<unk>", "</w>"
COMMON = (
    "a an the of in on with and by for to from at is style drawing picture photo photograph "
    "painting icon emoji sketch image "
    "illustration cartoon sticker logo symbol flat noto black white monochrome outline line "
    "art red orange yellow green blue "
    "purple pink brown grey gray gold silver small big large little happy sad cute old new "
    "bright dark light simple colourful "
    "colorful background one two three shaded glossy watercolour pixel ink pencil my your sks "
    "this that it"
)
# captions are many already, so their words become single tokens before any other word is merged
COMMON_WEIGHT = 400


def corpus(captions: list[str]) -> list[str]:
    """Lines to train on: the captions, and common words."""
    lines = captions + [COMMON] * COMMON_WEIGHT
    return lines + [line.lower() for line in lines if line != line.lower()]


def build_clip_tokenizer(
    captions: list[str], vocabulary: int = VOCABULARY, length: int = PROMPT_TOKENS
) -> CLIPTokenizer:
    """CLIP's BPE: every byte, alone and at a word's end, is a token, so that any text encodes; then
    the merges.
    """
    # an empty one: its normalizer and pre-tokenizer are the ones used later
    probe = CLIPTokenizer()._tokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    trained.normalizer, trained.pre_tokenizer = probe.normalizer, probe.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 512, end_of_word_suffix=END_OF_WORD, show_progress=False
    )
    trained.train_from_iterator(corpus(captions), trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + END_OF_WORD for letter in letters]
    merges = merges[: vocabulary - len(tokens) - 2]
    tokens += list(dict.fromkeys(left + right for left, right in merges))
    vocab = {token: index for index, token in enumerate([*tokens, BOS, EOS])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def build_t5_tokenizer(captions: list[str]) -> T5TokenizerFast:
    """T5's Unigram with printable ASCII always present; other letters become <unk>, as in T5
    itself.
    """
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = T5TokenizerFast(extra_ids=0)._tokenizer.pre_tokenizer
    special = [PAD, "</s>", UNK]
    ascii_letters = [chr(code) for code in range(33, 127)] + ["▁"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=ascii_letters,
        unk_token=UNK,
        show_progress=False,
    )
    trained.train_from_iterator(corpus(captions), trainer)
    pieces = [
        (piece, score)
        for piece, score in json.loads(trained.to_str())["model"]["vocab"]
        if piece not in special
    ]
    known = {piece for piece, _ in pieces}
    floor = min(score for _, score in pieces) - 5.0
    pieces += [(letter, floor) for letter in ascii_letters if letter not in known]
    words = [piece for piece in _pieces(captions) if piece not in known]
    pieces += [(piece, -7.0) for piece in words]
    vocab = [(token, 0.0) for token in special] + pieces
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=PROMPT_TOKENS)


def _pieces(captions: list[str]) -> list[str]:
    """Words of the captions as T5 writes them, "▁apple", most frequent first."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update("▁" + word for word in caption.replace(",", "").split())
    return [piece for piece, _ in counts.most_common()]
