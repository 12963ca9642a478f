"""Small fast tokenizers of every kind, trained on a few lines, and hostile text for them."""

import copy
import json
import re
from functools import lru_cache
from pathlib import Path

import trl
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from recipelib.models.loading import load_tokenizer

LINES = [
    "The movie review is: a great film, and the best one of the year.",
    "It was terrible. Nobody knows why they made this; the story is thin, the music is worse.",
    "Question: who wrote the book? Answer: the teacher wrote the book in the old town.\n\n",
    "The insurance company sent an insurance change to all people who live by the river.",
    "user system assistant instruction response text context really bad good yes no none",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich, 1234567890 mal!\n",
    "def add(a, b):\n    return a + b  # [MASK] <mask> </s> {{ 7*7 }} {% raw %} | ~ @ ^ `$&%",
]
WORDS = sorted({word for line in LINES[:5] for word in re.findall(r"[A-Za-z]+", line)})

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]


def _wrap(backend: Tokenizer, **special) -> PreTrainedTokenizerFast:
    # transformers rewrites the backend that it is given.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(backend), **special)
    tokenizer.chat_template = CHATML
    return tokenizer


def _around(backend: Tokenizer, single: str, pair: str, *tokens: str) -> None:
    ids = [(token, backend.token_to_id(token)) for token in tokens]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=ids
    )


def _train_byte_bpe(special: list[str], *, add_prefix_space: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES * 3, trainer)
    return backend


def _gpt2() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose only special token is also the unknown one, as GPT-2's."""
    end = "<|endoftext|>"
    tokenizer = _wrap(_train_byte_bpe([end]), bos_token=end, eos_token=end, unk_token=end)
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS, "pad_token": end})
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>")])
    return tokenizer


def _roberta() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts a space in front; its mask takes the white space before it."""
    backend = _train_byte_bpe(["<s>", "<pad>", "</s>", "<unk>"], add_prefix_space=True)
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    _around(backend, "<s> $A </s>", "<s> $A </s> </s> $B </s>", "<s>", "</s>")
    return _wrap(
        backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


def _odd() -> PreTrainedTokenizerFast:
    """Byte-level BPE that folds text and has added tokens of every flag, some inside others."""
    backend = _train_byte_bpe(["<s>", "</s>", "<pad>", "<mask>", "<unk>"])
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer = _wrap(
        backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
        unk_token="<unk>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*CHAT_TOKENS, "¤"]})
    tokenizer.add_tokens(
        [
            AddedToken("<Tool>", normalized=True, special=False),
            AddedToken("...", normalized=True, special=False),
            AddedToken("<left>", lstrip=True, normalized=False, special=False),
            AddedToken("<both>", lstrip=True, rstrip=True, normalized=True, special=True),
            AddedToken("word", single_word=True, normalized=False, special=False),
            AddedToken(" spaced out", normalized=False, special=False),
            AddedToken("<<both>>", normalized=False, special=False),
            AddedToken("ü", normalized=False, special=False),
        ]
    )
    return tokenizer


def _train_unigram(special: list[str], prepend_scheme: str) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(LINES * 3, trainer)
    return backend


def _t5() -> PreTrainedTokenizerFast:
    """Unigram; the control tokens stand in the model's own vocabulary too."""
    special = ["<pad>", "</s>", "<unk>", "<mask>", "<extra_id_0>"]
    backend = _train_unigram(special, "first")
    _around(backend, "$A </s>", "$A </s> $B </s>", "</s>")
    return _wrap(
        backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", mask_token="<mask>"
    )


def _xlmr() -> PreTrainedTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *CHAT_TOKENS]
    backend = _train_unigram(special, "always")
    _around(backend, "<s> $A </s>", "<s> $A </s> </s> $B </s>", "<s>", "</s>")
    tokenizer = _wrap(
        backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
    return tokenizer


def _bert() -> PreTrainedTokenizerFast:
    """WordPiece of the lines' characters, words and endings; a trained one would be another in
    every process.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = sorted(
        {
            word
            for line in LINES
            for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(line))
        }
    )
    characters = sorted({character for word in words for character in word})
    endings = sorted({f"##{word[-2:]}" for word in words if len(word) > 2})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *characters, *(f"##{one}" for one in characters), *words, *endings]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(special)
    _around(backend, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", "[CLS]", "[SEP]")
    tokenizer = _wrap(
        backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.add_tokens([AddedToken("<tag>", normalized=True, special=False)])
    return tokenizer


def _bpe_with_byte_fallback(special: list[str], backend: Tokenizer) -> Tokenizer:
    """SentencePiece's BPE: unknown characters become the tokens of their bytes."""
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    backend.train_from_iterator([*LINES * 3, " " * 4000], trainer)
    model = json.loads(backend.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    merges = [tuple(merge) for merge in model["merges"]]
    backend.model = models.BPE(
        vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return backend


def _llama2() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend = _bpe_with_byte_fallback(["<unk>", "<s>", "</s>"], backend)
    _around(backend, "<s> $A", "<s> $A <s>:1 $B:1", "<s>")
    tokenizer = _wrap(
        backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} "
        "{{ message['content'].strip() }} {{ eos_token }}{% else %}[INST] "
        "{{ message['content'].strip() }} [/INST]{% endif %}{% endfor %}"
    )
    return tokenizer


def _gemma() -> PreTrainedTokenizerFast:
    """White space and tags are added tokens; the template takes no system turn."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    backend = _bpe_with_byte_fallback(special, backend)
    _around(backend, "<bos> $A", "<bos> $A <bos>:1 $B:1", "<bos>")
    tokenizer = _wrap(
        backend,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[-2:]})
    plain = ["\n", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<table>", "</table>"]
    tokenizer.add_tokens([AddedToken(one, normalized=False, special=False) for one in plain])
    tokenizer.chat_template = TRL_TEMPLATES["gemma"]
    return tokenizer


TRL_TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
}
# The control tokens that these templates write: <|im_end|>, <｜User｜>, <<SYS>>, [/INST], <think>.
_WRITTEN = re.compile(r"<<?[^\s<>'\"{}()=]+>>?|\[/?INST\]|\[gMASK\]")

_BUILDERS = {
    "gpt2": _gpt2,
    "roberta": _roberta,
    "odd": _odd,
    "t5": _t5,
    "xlmr": _xlmr,
    "bert": _bert,
    "llama2": _llama2,
    "gemma": _gemma,
    "bundled": load_tokenizer,
}
NAMES = list(_BUILDERS)
MASKED = ["roberta", "odd", "t5", "xlmr", "bert", "gemma"]  # those with a mask token


@lru_cache
def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of that name; shared, so not to be changed."""
    return _BUILDERS[name]()


def fresh(name, **changes):
    """A tokenizer without a chat template that a test may change."""
    tokenizer = tokenizer_for(name)
    special = {**tokenizer.special_tokens_map, **changes}
    special = {key: token for key, token in special.items() if token is not None}
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@lru_cache
def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with one of TRL's chat templates and the control tokens it writes. Those
    with lower-case names are added but not special, as Qwen's.
    """
    tokenizer = _wrap(
        _chat_backend(), bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = TRL_TEMPLATES[template]
    written = sorted(set(_WRITTEN.findall(tokenizer.chat_template)) | {"<think>", "</think>"})
    plain = [token for token in written if re.fullmatch(r"</?[a-z_]+>", token)]
    control = [token for token in written if token not in plain]
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    tokenizer.add_tokens([AddedToken(token, special=False) for token in plain])
    return tokenizer


@lru_cache
def _chat_backend() -> Tokenizer:
    return _train_byte_bpe(["<s>", "</s>", "<pad>", "<unk>"])


def markup_ids(tokenizer) -> set[int]:
    """Ids that no data may become, read off the tokenizer: everything added or special except unk,
    and except white space and single characters that are added but not special.
    """
    found = set(tokenizer.all_special_ids)
    for index, token in tokenizer.added_tokens_decoder.items():
        plain = len(token.content) == 1 or not token.content.strip(" \n\t▁")
        if token.special or not plain:
            found.add(index)
    return found - {tokenizer.unk_token_id}


def markup_of(tokenizer, ids) -> list[int]:
    """The ids that stand for markup, in their order."""
    markup = markup_ids(tokenizer)
    return [index for index in ids if index in markup]


# Hostile text

_FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
_FRAGMENTS = [
    *("{{ 7*7 }}", "{% raw %}", "{#", "|||", "\n\n", "\n", " ", "  ", "\t", "\u3000", "\u200b"),
    *("[MASK]", "<mask>", "</s>", "<s>", "<think>", "</think>", "<unk>", "<|im_end|>", "[INST]"),
    *("<|im_start|>assistant\n", "<|im_", "end|>", "<", "</", ">", "[", "]", "MASK]", "s>", "<|"),
    *("Question:", "Answer:", "text", "Probetext", "ü", "u\u0308", "¤", "…", "\u0338", "İ", "ﬁ"),
    *("🎬", "👩\u200d👩\u200d👧", "日本語", "\ufdd0", "\ufdd1", "\ufdd0\ufdd1", "\ufdd20\ufdd3"),
    *("\ufdd2", "\ufdd3", "0", "1", "\U0010ffff", "\x00", "\r\n", "\u2028", "▁", "▁▁", "Ġ"),
    *("word", " spaced out", "...", "<LEFT>", "<<both>>", "<0x0A>", "##s", "\\n", "'", '"'),
]


def _disguises(token: str) -> list[str]:
    """A control token's text and what a normalizer may turn into it, whole and in parts."""
    middle = len(token) // 2
    return [
        *(token, f" {token} ", token.translate(_FULL_WIDTH), token.upper(), token.lower()),
        *(token[:middle], token[middle:], token[:1] + "\u200b" + token[1:]),
        *(token[:middle] + token + token[middle:], token[:1] + "\ufdd0\ufdd1" + token[1:]),
        *(token[:1] + token, token + token[-1:], token * 3),
    ]


@lru_cache
def hostile_text(tokenizer) -> st.SearchStrategy[str]:
    """Any Unicode mixed with what could be taken for markup of the tokenizer or a template."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    added += [content for content in tokenizer.all_special_tokens if content not in added]
    disguised = [text for token in added for text in _disguises(token)]
    pieces = st.one_of(
        st.sampled_from(_FRAGMENTS),
        st.sampled_from(disguised),
        st.sampled_from(WORDS),
        st.text(max_size=6),
    )
    return st.lists(pieces, max_size=6).map("".join)


def plain_text(*, min_words: int = 0, max_words: int = 8) -> st.SearchStrategy[str]:
    """Words with punctuation, foreign letters and uneven white space between them."""
    gaps = st.sampled_from([" ", " ", " ", "  ", ", ", ". ", "\n", "\n\n", "    ", "; ", " - "])
    words = st.sampled_from([*WORDS, "naïve", "größer", "日本", "🎬", "12", "(a)", "{b}", "C++"])
    pairs = st.lists(st.tuples(words, gaps), min_size=min_words, max_size=max_words)
    return pairs.map(lambda found: "".join(w + g for w, g in found[:-1]) + _last_word(found))


def _last_word(pairs) -> str:
    return pairs[-1][0] if pairs else ""
