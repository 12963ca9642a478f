"""Text -> ids for one tokenizer, so that text never becomes a control token.

A tokenizer finds its added tokens (`<|im_end|>`, `[MASK]`, `<think>`) wherever their characters
stand, in data too. Here only the chat template, the tokenizer's own frame and the cloze's mask
write them. Text is encoded as usual; where that yields a control token, a break is put inside the
offending characters and the two halves are encoded apart.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache

import jinja2
from tokenizers import AddedToken

from common.errors import UserError

Message = Mapping[str, str]

# Two noncharacters, which Unicode keeps out of interchanged text; should they come all the same,
# see `_guard`.
_BREAK = "\ufdd0\ufdd1"
# A word that stands for a text while a chat template is asked what it writes around it.
_PROBE = "Probetext"


class TextEncoder:
    """Encodes text, chats, clozes and pairs with a fast tokenizer.

    Attributes:
        control_ids: ids that no text may become: added and special tokens, but not unk, which
            stands for what the tokenizer does not know, nor what some tokenizers keep as plain
            added tokens and have no other id for: white space (Gemma's newlines and runs of "▁")
            and single characters (DeepSeek Coder's "ü").
        prefix, middle, suffix: what the tokenizer puts before a text, between the two of a
            pair, and behind.
    """

    def __init__(self, tokenizer, chat_template_kwargs: Mapping | None = None):
        """
        Raises:
            UserError: the tokenizer is a slow one, which knows no offsets.
        """
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer of {tokenizer.name_or_path}: a slow tokenizer gives no offsets; "
                "convert it to tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        added = tokenizer.added_tokens_decoder.items()
        self.control_ids = {
            index for index, token in added if token.special or not _is_plain(token.content)
        }
        self.control_ids |= set(tokenizer.all_special_ids)
        self.control_ids.discard(tokenizer.unk_token_id)
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        self._backend.add_special_tokens([AddedToken(_BREAK, normalized=False, special=True)])
        self._break_id = self._backend.token_to_id(_BREAK)
        self._find_frame()
        one, two = ("".join(self._plain_tokens(text)) for text in ("a", " a"))
        self._doubles_space = one[0] in "▁Ġ" and two != one
        # For answers, which recur in their thousands; prompts would only fill it.
        self.encode = lru_cache(maxsize=4096)(self._encode)
        self._chat_probe: dict = {}

    def _find_frame(self) -> None:
        """The tokens that the tokenizer adds around one text and around a pair, read off encodings
        of a letter.
        """
        one = self.tokenizer("a", return_special_tokens_mask=True)
        two = self.tokenizer("a", "a", return_special_tokens_mask=True, return_token_type_ids=True)
        body = one["special_tokens_mask"].index(0)
        length = one["special_tokens_mask"].count(0)
        self.prefix = one["input_ids"][:body]
        self.suffix = one["input_ids"][body + length :]
        second = len(two["input_ids"]) - len(self.suffix) - length
        self.middle = two["input_ids"][body + length : second]
        types = two["token_type_ids"]
        self.has_token_types = "token_type_ids" in self.tokenizer.model_input_names
        self._pair_types = (
            types[0],
            types[body + length] if self.middle else types[0],
            types[second],
        )

    # Text

    def _guard(self, text: str) -> str:
        """The text with a break inside everything that the tokenizer would take for a control
        token, the unk token's name included. A control token that a single character stands for
        cannot be broken: it is left out.
        """
        # A break that the data brings is broken itself: its halves stay text.
        text = text.replace(_BREAK, _BREAK[0] + _BREAK + _BREAK[1])
        unk_id, unk = self.tokenizer.unk_token_id, self.tokenizer.unk_token
        while True:
            encoding = self._backend.encode(text, add_special_tokens=False)
            found = {}
            for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                # Some added tokens take the white space beside them into their offsets.
                token = text[start:end].strip() or text[start:end]
                if index in self.control_ids or (index == unk_id and token == unk):
                    found[text.index(token, start)] = token
            if not found:
                return text
            for start, token in sorted(found.items(), reverse=True):
                first = token[0] if len(token) > 1 else ""
                text = text[:start] + first + _BREAK + text[start + 1 :]

    def _plain_tokens(self, text: str) -> list[str]:
        return self._backend.encode(text, add_special_tokens=False).tokens

    def _ids(self, guarded: str) -> list[int]:
        ids = self._backend.encode(guarded, add_special_tokens=False).ids
        return [index for index in ids if index != self._break_id]

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._ids(self._guard(text)))

    def continuation(self, text: str) -> list[int]:
        """Ids of a text that follows another. Tokenizers of Llama 2's kind put a space before every
        text, even one that begins with a space: they are given it without its own.
        """
        return list(self.encode(text[1:] if self._doubles_space and text[:1] == " " else text))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The [start, end) characters of each token of a text."""
        return self._backend.encode(text, add_special_tokens=False).offsets

    @property
    def end(self) -> list[int]:
        """The end marker of the text rendering.

        Raises:
            UserError: the tokenizer has no end token.
        """
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer of {self.tokenizer.name_or_path}: it has no eos_token, so an answer "
                "would never end; set one in tokenizer_config.json"
            )
        return [self.tokenizer.eos_token_id]

    def text_prompt(self, text: str) -> list[int]:
        """A prompt as generation sees it: the tokenizer's frame in front, nothing behind."""
        return [*self.prefix, *self._encode(text)]

    # Masked models

    def cloze(self, before: str, after: str, masks: int) -> tuple[list[int], list[int]]:
        """Ids of `before [MASK]... after` in the tokenizer's frame, and the positions of the masks.

        Raises:
            UserError: the tokenizer has no mask token.
        """
        mask = self.tokenizer.mask_token
        if mask is None:
            raise UserError(
                f"tokenizer of {self.tokenizer.name_or_path}: it has no mask token; pass a masked "
                "model for a cloze"
            )
        text = self._guard(before) + mask * masks + self._guard(after)
        ids = [*self.prefix, *self._ids(text), *self.suffix]
        # Data was kept from becoming the mask, so these are the template's own.
        return ids, [
            place for place, index in enumerate(ids) if index == self.tokenizer.mask_token_id
        ]

    def word(self, word: str, before: str) -> list[int]:
        """Ids of a label word where the cloze has its mask: with a space if one stands before the
        mask.
        """
        return list(self.encode((" " if before[-1:].isspace() else "") + word))

    def pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Ids and token types of a sentence pair in the tokenizer's frame."""
        left = [*self.prefix, *self._encode(first)]
        right = [*self.encode(second), *self.suffix]
        types = [self._pair_types[0]] * len(left) + [self._pair_types[1]] * len(self.middle)
        return left + self.middle + right, types + [self._pair_types[2]] * len(right)

    # Chat

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the turns and of the template's generation prompt, after which the answer is
        written.

        Raises:
            UserError: no chat template, or one that rejects the turns.
        """
        return self._ids(self._render_chat(messages, add_generation_prompt=True))

    def chat_answer(self, text: str) -> list[int]:
        """Ids of an answer in a chat, without the end marker."""
        return list(self.encode(text.strip()))

    def chat_end(self, messages: Sequence[Message]) -> list[int]:
        """What the chat template writes after an answer to these turns, up to its first control
        token.

        What follows that token (often a newline) is never generated, so it is not trained.
        """
        key = tuple(message["role"] for message in messages)
        if key not in self._chat_probe:
            probe = [{**message, "content": "text"} for message in messages]
            whole = self._render_chat([*probe, {"role": "assistant", "content": _PROBE}])
            ids = self._ids(whole.rpartition(_PROBE)[2])
            ends = [place for place, index in enumerate(ids) if index in self.control_ids]
            self._chat_probe[key] = ids[: ends[0] + 1] if ends else [*ids, *self.end]
        return self._chat_probe[key]

    def _render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        messages = [{**message, "content": self._guard(message["content"])} for message in messages]
        if messages[0]["role"] == "system" and not self._takes_system:
            messages = _join_system(messages)
        return self._apply(messages, add_generation_prompt)

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"tokenizer of {self.tokenizer.name_or_path}: it has no chat template; "
                "pass --rendering text"
            )
        if self._wants_parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                for message in messages
            ]
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.chat_template_kwargs,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"chat template of {self.tokenizer.name_or_path}: {reason}; mend the turns"
            ) from None

    def _probe_writes(self, key: str, messages: Sequence[Message]) -> bool:
        if key not in self._chat_probe:
            try:
                self._chat_probe[key] = _PROBE in self._apply(messages, False)
            except UserError:
                if self.tokenizer.chat_template is None:
                    raise
                self._chat_probe[key] = False
        return self._chat_probe[key]

    @property
    def _wants_parts(self) -> bool:
        """Whether the template reads a content as a list of parts, as those of vision models do."""
        if "parts" not in self._chat_probe:
            turns = [{"role": "user", "content": _PROBE}]
            self._chat_probe["parts"] = False
            if not self._probe_writes("plain", turns):
                self._chat_probe["parts"] = True
                self._chat_probe["parts"] = self._probe_writes("as parts", turns)
        return self._chat_probe["parts"]

    @property
    def _takes_system(self) -> bool:
        """Whether the template writes a system turn rather than rejecting or swallowing it."""
        turns = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "text"}]
        return self._probe_writes("system", turns)


def _is_plain(added: str) -> bool:
    return len(added) == 1 or added.replace("▁", " ").isspace()


def _join_system(messages: Sequence[Message]) -> list[Message]:
    """The turns with the system text in front of the first user turn's."""
    system, *rest = messages
    for place, message in enumerate(rest):
        if message["role"] == "user":
            content = f"{system['content']}\n\n{message['content']}"
            return [*rest[:place], {**message, "content": content}, *rest[place + 1 :]]
    return [{"role": "user", "content": system["content"]}, *rest]
