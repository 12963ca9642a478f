"""Encodes text with one tokenizer so that text never becomes a control token.

A tokenizer finds its added tokens (`<|im_end|>`, `[MASK]`, `<think>`) wherever their characters
stand, in data too. Here only the chat template, the tokenizer's own frame and the cloze's mask
write them. Text is encoded as usual; where that yields a control token, a break is put inside the
offending characters and the two halves are encoded apart.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import cached_property, lru_cache
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from recipelib.encoding.chat_template import FEW_PLACES, ChatTemplate, last_exchange
from recipelib.prompts import Turn
from recipelib.runtime import UserError, digest

_MOST_LETTERS = 2**20  # of pieces of chats whose ids are kept: some 10 MB
# Two noncharacters, which text that is exchanged must not hold, says Unicode; `_guard` handles text
# that holds them all the same.
_BREAK = "\ufdd0\ufdd1"


class TextEncoder:
    """Encodes text, chats, clozes and pairs with a fast tokenizer.

    Attributes:
        control_ids: ids that no text may become: added and special tokens. Not among them are unk,
            which stands for what the tokenizer does not know, and plain added tokens for which some
            tokenizers have no other id: white space (Gemma's newlines and runs of "▁") and single
            characters (DeepSeek Coder's "ü").
        prefix, middle, suffix: ids that the tokenizer puts before a text, between the two texts of
            a pair, and behind.
        has_token_types: whether the model takes token types.
    """

    def __init__(self, tokenizer, chat_template_kwargs: Mapping | None = None):
        """
        Raises:
            UserError: the tokenizer is a slow one, which has no offsets.
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
        # The eos token ends an answer even if it is also the unk token, as in GPT-2.
        self._end_ids = self.control_ids | {tokenizer.eos_token_id}
        self._special = [
            token for index, token in added if token.special and index in self.control_ids
        ]
        self._has_thoughts = any(token.content == "<think>" for _, token in added)
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        self._backend.add_special_tokens([AddedToken(_BREAK, normalized=False, special=True)])
        self._break_id = self._backend.token_to_id(_BREAK)
        self._find_literals(dict(added))
        self._find_frame()
        bare, spaced = ("".join(self._plain_tokens(text)) for text in ("a", " a"))
        self._doubles_space = bare[0] in "▁Ġ" and spaced != bare
        # Caches answers, which recur in their thousands; prompts would only fill the cache.
        self.encode = lru_cache(maxsize=4096)(self._encode)
        self.chat = ChatTemplate(tokenizer, self.chat_template_kwargs)
        self._chat_ends: dict[tuple, tuple[list[int], bool]] = {}

    @cached_property
    def identity(self) -> str:
        """A key for the tokenizer and its chat template."""
        tokenizer, template = self.tokenizer, self.tokenizer.chat_template
        control = (tokenizer.special_tokens_map, sorted(self.control_ids))
        own = (control, template, self.chat_template_kwargs)
        # Some chat templates write the day into each conversation.
        today = date.today().isoformat() if "strftime_now" in str(template) else ""
        return digest(type(tokenizer).__name__, self._backend.to_str(), own, today)

    def _find_literals(self, added: Mapping[int, AddedToken]) -> None:
        """Make the patterns of what may become a control token, and of where a tokenizer divides
        text before it looks for anything else.
        """
        normalizer = self._backend.normalizer
        self._normalize = normalizer.normalize_str if normalizer else None
        names = {self.tokenizer.convert_ids_to_tokens(index) for index in self.control_ids}
        names |= {self.tokenizer.unk_token, _BREAK} - {None}
        names |= {name.strip() or name for name in names}
        names |= {name.replace("▁", " ") for name in names}
        if self._normalize:
            names |= {self._normalize(name) for name in names}
        self._controls = _either(names - {""})
        # A byte-level tokenizer writes a byte that is no letter as one of these characters: a token
        # that is spelled with them stands for text that looks otherwise.
        self._disguised = any("\x80" <= letter <= "\u0143" for name in names for letter in name)
        # Before it normalizes text, a tokenizer divides it at these tokens, the longest first.
        raw = {token.content: index for index, token in added.items() if not token.normalized}
        raw[_BREAK] = self._break_id
        self._raw = _either(raw)
        self._divides = {name for name, index in raw.items() if index in self.control_ids}
        self._divides.add(_BREAK)
        if any(token.single_word for token in added.values()):
            self._divides = set()  # what stands beside such a token decides whether it is one
        # Some tokens take the white space before them, which is encoded with them, then.
        self._take_space = {token.content for token in added.values() if token.lstrip}
        self._divides_by_pattern = _divides_by_pattern(self._backend)
        self._divided: tuple[str, int, list[int]] = "", 0, []
        self._header = ""
        self._pieces: dict[str, list[int]] = {}
        self._letters = 0  # of these pieces

    def _find_frame(self) -> None:
        """Read the tokens that the tokenizer adds around a text and around a pair off encodings of
        a letter.
        """
        single = self.tokenizer("a", return_special_tokens_mask=True)
        pair = self.tokenizer("a", "a", return_special_tokens_mask=True, return_token_type_ids=True)
        body = single["special_tokens_mask"].index(0)
        length = single["special_tokens_mask"].count(0)
        self.prefix = single["input_ids"][:body]
        self.suffix = single["input_ids"][body + length :]
        second = len(pair["input_ids"]) - len(self.suffix) - length
        self.middle = pair["input_ids"][body + length : second]
        types = pair["token_type_ids"]
        self.has_token_types = "token_type_ids" in self.tokenizer.model_input_names
        self._pair_types = (
            types[0],
            types[body + length] if self.middle else types[0],
            types[second],
        )

    # Text

    def _guard(self, text: str) -> str:
        """The text with a break inside everything that the tokenizer would take for a control
        token, or for the unk token's name. A control token of a single character cannot be broken;
        it is removed.
        """
        if not self._looks_controlled(text):
            return text
        # If the text holds a break already, that is broken itself: its halves stay text.
        text = text.replace(_BREAK, _BREAK[0] + _BREAK + _BREAK[1])
        unk_id, unk = self.tokenizer.unk_token_id, self.tokenizer.unk_token
        while True:
            encoding = self._backend.encode(text, add_special_tokens=False)
            controls = {}
            for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                # The offsets of some added tokens include the white space beside them.
                token = text[start:end].strip() or text[start:end]
                if index in self.control_ids or (index == unk_id and token == unk):
                    controls[text.index(token, start)] = token
            if not controls:
                return text
            for start, token in sorted(controls.items(), reverse=True):
                first = token[0] if len(token) > 1 else ""
                text = text[:start] + first + _BREAK + text[start + 1 :]

    def _looks_controlled(self, text: str) -> bool:
        """Whether a text has to be encoded to see if anything in it becomes a control token."""
        return (
            self._disguised
            or self._controls.search(text) is not None
            or (self._normalize and self._controls.search(self._normalize(text)) is not None)
        )

    def _plain_tokens(self, text: str) -> list[str]:
        return self._backend.encode(text, add_special_tokens=False).tokens

    def _encoding(self, text: str) -> Encoding:
        """A text's encoding, whose offsets nobody reads. Only where `tokenizers` uses no threads is
        it made without them: after a batch in threads each fork of this process would warn.
        """
        if os.environ.get("TOKENIZERS_PARALLELISM") == "false":
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0]
        return self._backend.encode(text, add_special_tokens=False)

    def _ids(self, guarded: str) -> list[int]:
        ids = self._encoding(guarded).ids
        return [index for index in ids if index != self._break_id]

    def chat_ids(self, guarded: str) -> list[int]:
        """Ids of a chat whose turns were guarded before they were rendered. It is encoded from one
        control token to the next, as the tokenizer divides it: what a chat shares with an earlier
        one is not encoded again.
        """
        seen, start, ids = self._divided
        if not guarded.startswith(seen):
            start, ids = 0, []
        ids, last = list(ids), None
        for match in self._raw.finditer(guarded, start):
            if match[0] in self._divides and match.start() > start:
                takes_space = match[0] in self._take_space
                end = match.end() if takes_space else match.start()
                ids += self._piece(guarded[start:end], takes_space)
                start, last = match.start(), match
        if last:
            self._divided = guarded[: last.end()], start, list(ids)
        self._header = guarded[start:]
        return ids + self._piece(self._header)

    def _piece(self, piece: str, with_control: bool = False) -> list[int]:
        """Ids of a piece of a guarded text, without the control token that it may end with."""
        if piece in self._pieces:
            return self._pieces[piece]
        ids = self._encoding(piece).ids
        if with_control:
            ids.pop()
        return self._keep(piece, [index for index in ids if index != self._break_id])

    def _keep(self, piece: str, ids: list[int]) -> list[int]:
        self._letters += len(piece)
        if self._letters > _MOST_LETTERS:
            self._pieces.clear()
            self._letters = len(piece)
        self._pieces[piece] = ids
        return ids

    def remember_answer(self, answer: str, ids: Sequence[int]) -> None:
        """Keep the ids of an answer to the last `chat_prompt` for the prompts of later turns, if
        the tokenizer gives it the same ones there, behind its header.
        """
        if self._stands_apart(self._header, answer) and not self._looks_controlled(answer):
            self._keep(self._header + answer, [*self._piece(self._header), *ids])

    def _stands_apart(self, header: str, answer: str) -> bool:
        """Whether the tokenizer divides text between a header, which may begin with a control
        token, and an answer, and leaves the header as it is alone. Where it does so by patterns,
        from left to right, only the beginning of the answer decides.
        """
        control = self._raw.match(header)
        before = header[control.end() :] if control else header
        if not self._divides_by_pattern:
            return False
        if self._controls.search(before + answer[:64]):
            return False
        divide = self._backend.pre_tokenizer.pre_tokenize_str
        alone, together = divide(before), divide(before + answer[:8])
        return alone == together[: len(alone)]

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._ids(self._guard(text)))

    def special_token(self, text: str) -> str | None:
        """The first special token whose characters stand in a text."""
        contents = (token.content for token in self._special)
        return next((content for content in contents if content in text), None)

    def continuation(self, text: str) -> list[int]:
        """Ids of a text that follows another.

        Tokenizers of Llama 2's kind put a space before every text, even one that begins with a
        space. They get such a text without its own space; a text that begins with no space is
        encoded behind another one, whose ids are then removed.
        """
        if not self._doubles_space:
            return list(self.encode(text))
        return list(self.encode(text[1:])) if text[:1] == " " else self._inside(text)

    def _inside(self, text: str) -> list[int]:
        """Ids of a text that the tokenizer must not put a space before."""
        for before in ("\n", "=", "a"):
            start, ids = self.encode(before), self.encode(before + text)
            if ids[: len(start)] == start:  # else a token spans both
                return list(ids[len(start) :])
        return list(self.encode(text))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The [start, end) characters of each token of a text."""
        return self._backend.encode(text, add_special_tokens=False).offsets

    @cached_property
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
        """A prompt as generation sees it: the tokenizer's prefix in front, nothing behind. An empty
        prompt becomes a bos or eos token, because an answer needs a token to be predicted from.
        """
        first = self.tokenizer.bos_token_id
        return [*self.prefix, *self._encode(text)] or (self.end if first is None else [first])

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
        # Data cannot become the mask, so every mask id is one of these masks.
        return ids, [
            place for place, index in enumerate(ids) if index == self.tokenizer.mask_token_id
        ]

    def word(self, word: str, before: str) -> list[int]:
        """Ids of a label word in place of the cloze's mask: with a space in front if one stands
        before the mask.
        """
        return list(self.encode((" " if before[-1:].isspace() else "") + word))

    def pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Ids and token types of a sentence pair in the tokenizer's frame."""
        left = [*self.prefix, *self._encode(first)]
        right = [*self.encode(second), *self.suffix]
        types = [self._pair_types[0]] * len(left) + [self._pair_types[1]] * len(self.middle)
        return left + self.middle + right, types + [self._pair_types[2]] * len(right)

    # Chat

    def guard_turns(
        self, messages: Sequence[Turn], tools: Sequence[Mapping] = ()
    ) -> tuple[list[Turn], list[Mapping]]:
        """The turns and tools as a chat template gets them: without weights, and with every text
        guarded.
        """
        turns = [
            {
                key: value if key == "role" else self._guard_inside(value)
                for key, value in turn.items()
                if key != "weight"
            }
            for turn in messages
        ]
        return turns, self._guard_inside(tools)

    def chat_prompt(
        self, messages: Sequence[Turn], tools: Sequence[Mapping] = (), *, guarded: bool = False
    ) -> list[int]:
        """Ids of the turns and of the template's generation prompt, after which the answer is
        written.

        Args:
            tools: descriptions of functions that the assistant may call.
            guarded: whether both come from `guard_turns`.
        Raises:
            UserError: no chat template, or one that rejects the turns or leaves a part out.
        """
        if not guarded:
            messages, tools = self.guard_turns(messages, tools)
        return self.chat_ids(self.chat.prompt(messages, tools))

    def chat_answer(self, text: str) -> list[int]:
        """Ids of an answer in a chat, without the end marker."""
        text = text.strip()
        return list(self.encode(text)) if self._answers_spaced else self._inside(text)

    @cached_property
    def _answers_spaced(self) -> bool:
        """Whether an answer in a chat has the ids of a text by itself, before which a tokenizer of
        Llama 2's kind puts a space. That is so with Llama 2's own chat template, not with others.
        """
        if not self._doubles_space:
            return True
        head, text = self.chat.before_answer([{"role": "user", "content": "text"}]), "text"
        ids, alone = self._ids(head + text), self._ids(text)
        return ids[-len(alone) :] == alone

    def chat_end(self, messages: Sequence[Turn]) -> list[int]:
        """The end marker: ids that the chat template writes after an answer to these turns, up to
        and including the first control token; if it writes none, the eos token ends them.

        What follows that token (often a newline) is never generated, so it is not trained.
        """
        return self._chat_end(messages)[0]

    def _chat_end(self, messages: Sequence[Turn]) -> tuple[list[int], bool]:
        """The end marker, and whether the chat template writes it itself."""
        messages = last_exchange(messages)
        key = tuple((message["role"], "tool_calls" in message) for message in messages)
        if key not in self._chat_ends:
            ids = self._ids(self.chat.after_answer(self.guard_turns(messages)[0]))
            ends = [place for place, index in enumerate(ids) if index in self._end_ids]
            end = ids[: ends[0] + 1] if ends else [*ids, *self.end]
            self._chat_ends[key] = end, bool(ends)
        return self._chat_ends[key]

    def with_reasoning(self, messages: Sequence[Turn]) -> list[Turn]:
        """The turns as the chat template can write them: if it does not write reasoning, that is
        put in front of the answer, as text.

        Raises:
            UserError: the model has tokens for reasoning, but its chat template does not write them
                behind its generation prompt.
        """
        reasons = any("reasoning_content" in turn for turn in messages)
        if not reasons or self.chat.writes_reasoning:
            return list(messages)
        if self._has_thoughts:
            raise UserError(
                f"chat template of {self.tokenizer.name_or_path}: it does not write reasoning "
                "behind its generation prompt; remove the reasoning, pass a model whose template "
                """does, or, where it is turned off, --chat_template_kwargs '{"enable_thinking": """
                "true}'"
            )
        turns = []
        for turn in messages:
            turn, thought = dict(turn), turn.get("reasoning_content")
            if thought is not None:
                del turn["reasoning_content"]
                turn["content"] = f"<think>\n{thought}\n</think>\n\n{turn['content']}"
            turns.append(turn)
        return turns

    def chat_written(
        self, messages: Sequence[Turn], last: Turn, tools: Sequence[Mapping] = ()
    ) -> list[int]:
        """Ids of an assistant's turn that calls tools or reasons, as the model is to write it after
        `chat_prompt` of the turns before, up to the end marker: an answer's, or one of its own
        (gpt-oss).

        Args:
            messages, last, tools: from `guard_turns`.
        Raises:
            UserError: as `chat_prompt`.
        """
        ids = self._ids(self.chat.written(messages, last, tools))
        end, written = self._chat_end(messages)
        ends = {end[-1]} if end[-1] in ids else self._end_ids
        places = [place for place, index in enumerate(ids) if index in ends]
        return ids[: places[-1] + 1] if places and written else [*ids, *self.end]

    def chat_writings(
        self, messages: Sequence[Turn], places: Sequence[int], tools: Sequence[Mapping] = ()
    ) -> Callable[[int], list[int]]:
        """Gives for each of these places `chat_written` of the turn there, after those before it;
        raises as `chat_written`.

        Of many the first and the last two are rendered behind all turns before them. If the last
        exchange alone gives the same, it does for the others, too: else a conversation would cost
        the square of its length.
        """

        def behind(turns: Sequence[Turn], place: int) -> list[int]:
            return self.chat_written(turns, messages[place], tools)

        alike = len(places) >= FEW_PLACES and all(
            behind(messages[:place], place) == behind(last_exchange(messages[:place]), place)
            for place in (places[0], *places[-2:])
        )
        before = last_exchange if alike else list
        return lambda place: behind(before(messages[:place]), place)

    def _guard_inside(self, value: Any) -> Any:
        """A value, such as tools or calls, with every text in it guarded, keys included."""
        if isinstance(value, str):
            return self._guard(value)
        if isinstance(value, Mapping):
            return {self._guard(key): self._guard_inside(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard_inside(inner) for inner in value]
        return value


def _divides_by_pattern(backend: Tokenizer) -> bool:
    """Whether a tokenizer divides text by patterns that look at nothing behind them, and changes
    none of it.
    """
    layout = json.loads(backend.to_str())
    first = layout["pre_tokenizer"] or {"type": None}
    steps = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    patterns = [step["pattern"].get("Regex", "") for step in steps if "pattern" in step]
    return (
        layout["normalizer"] is None
        and layout["model"].get("dropout") is None
        and all(step["type"] in ("Split", "ByteLevel", "Digits") for step in steps)
        and not any(step.get("add_prefix_space") for step in steps)
        and not any(re.search(r"\(\?<|(?<!\[)\^|\\[AGbB]", pattern) for pattern in patterns)
    )


def _either(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the first of the names in a text; of several that begin there, the
    longest.
    """
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _is_plain(added: str) -> bool:
    return len(added) == 1 or added.replace("▁", " ").isspace()
