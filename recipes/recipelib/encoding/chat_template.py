"""Renders turns as text through a tokenizer's chat template, and has a plain template for models
that come without one.

Templates differ in what they take (system turns, tools, contents as lists of parts) and few say so.
Each is tried with a probe text; what it would leave out in silence is refused or given differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile

import jinja2

from recipelib.prompts import Turn
from recipelib.runtime import UserError

# Turns are told apart by their headers only: no new tokens, so no embeddings to train. A header
# ends in a line break, behind which an answer begins with the tokens that it has by itself.
PLAIN_CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '### Tools:\\n' + tools | tojson + '\\n\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '### ' + message.role | capitalize + ':\\n' + message.content | trim }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n' if message.content or not loop.first }}
        {{- '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
    {%- endfor %}
    {{- (eos_token if message.role == 'assistant' else '') + '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Assistant:\\n' }}
{%- endif %}
"""

FEW_PLACES = 5  # of a conversation; what stands there is rendered one by one

# Stands for a text while a chat template is tried, to see whether and where it is written.
_PROBE = "Probetext"
_PROBE_ARGUMENTS = {"text": "Probewert"}
_PROBE_CALL = {
    "type": "function",
    "id": "call00000",  # Mistral's templates want nine letters and digits
    "function": {"name": _PROBE, "arguments": _PROBE_ARGUMENTS},
}
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _PROBE,
        "description": "text",
        "parameters": {"type": "object", "properties": {}},
    },
}


def ensure_chat_template(tokenizer) -> bool:
    """Give a tokenizer without a chat template the plain one, which is saved with it.

    An answer ends with the eos token. If the tokenizer puts a bos token before every text, the
    template puts it before every chat.

    Returns:
        Whether the tokenizer had none.
    Raises:
        UserError: the tokenizer has no eos token.
    """
    if tokenizer.chat_template is not None:
        return False
    if tokenizer.eos_token is None:
        raise UserError(
            f"tokenizer of {tokenizer.name_or_path}: it has neither a chat template nor an "
            "eos_token, so an answer would never end; set one in tokenizer_config.json"
        )
    first = tokenizer("a")["input_ids"][0]
    frame = "{{- bos_token }}\n" if first == tokenizer.bos_token_id else ""
    tokenizer.chat_template = frame + PLAIN_CHAT_TEMPLATE
    return True


class ChatTemplate:
    """Renders turns, and tools that the assistant may call, through a tokenizer's chat template.

    Args:
        options: further arguments of the template, such as enable_thinking.
    """

    def __init__(self, tokenizer, options: Mapping):
        self.tokenizer = tokenizer
        self.options = options
        self._answers: dict = {}  # question about the template -> whether it does so

    def render(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Mapping] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The turns as text. If the template takes no system turn, its text is put in front of the
        first user turn's.

        Raises:
            UserError: no chat template, or one that rejects the turns or leaves out calls of tools.
        """
        return self._apply(self.as_taken(turns), tools, add_generation_prompt)

    def as_taken(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The turns in the form that the template takes."""
        if turns[0]["role"] == "system" and not self._takes_system:
            turns = _join_system(turns)
        if any("tool_calls" in turn for turn in turns):
            turns = [_with_arguments(turn, self._takes_json) for turn in turns]
        return turns

    def prompt(self, turns: Sequence[Turn], tools: Sequence[Mapping] = ()) -> str:
        """The turns and the generation prompt, after which the assistant writes.

        Raises:
            UserError: as `render`, or the template leaves out tools or the turns of tools.
        """
        rendered = self.render(turns, tools, add_generation_prompt=True)
        self._check_tools(turns, tools)
        return rendered

    def _check_tools(self, turns: Sequence[Turn], tools: Sequence[Mapping]) -> None:
        turns = last_exchange(turns)
        if tools and not self._writes("tools", turns, turns, [_PROBE_TOOL]):
            raise self._lost("descriptions of tools")
        returned = len([*takewhile(lambda turn: turn["role"] == "tool", reversed(turns))])
        if returned:
            rest = turns[: len(turns) - returned]
            probes = [{**turn, "content": _PROBE} for turn in turns[len(rest) :]]
            if not self._writes("returned", turns, [*rest, *probes], (), returned):
                raise self._lost("the turns of tools")

    def prompts(
        self, turns: Sequence[Turn], places: Sequence[int], tools: Sequence[Mapping] = ()
    ) -> Callable[[int], str]:
        """Gives for each of these places the `prompt` of the turns before it; raises as `prompt`.

        If the template writes every turn before it reads the next one, the prompts are beginnings
        of the last one, each with the generation prompt behind it. Then the last one is rendered;
        of the others only the first and the last two behind turns of each role, to see that they
        are such beginnings.
        """

        def render(place: int) -> str:
            return self.prompt(turns[:place], tools)

        if len(places) < FEW_PLACES:
            return render
        before, log = turns[: max(places)], _Log()
        taken = self.as_taken(before)
        joined = len(before) - len(taken)  # a system turn has become a part of another turn
        try:
            whole = self._apply(taken, tools, True, log)
        except UserError:  # perhaps because the turns are no list
            return render
        by_role: dict[str, list[int]] = {}
        for place in places:
            by_role.setdefault(turns[place - 1]["role"], []).append(place)
        appended = {
            role
            for role, same in by_role.items()
            if all(
                log.beginning(place - joined, whole) == render(place)
                for place in {same[0], *same[-2:]}
            )
        }

        def prompt(place: int) -> str:
            if turns[place - 1]["role"] not in appended:
                return render(place)
            self._check_tools(turns[:place], tools)
            return log.beginning(place - joined, whole)

        return prompt

    def before_answer(self, turns: Sequence[Turn]) -> str:
        """What the template writes before an answer to these turns."""
        return self._around_answer(turns)[0]

    def after_answer(self, turns: Sequence[Turn]) -> str:
        """What the template writes after an answer to these turns."""
        return self._around_answer([{**turn, "content": "text"} for turn in turns])[1]

    def written(self, turns: Sequence[Turn], last: Turn, tools: Sequence[Mapping] = ()) -> str:
        """What an assistant's turn that calls tools or reasons adds to the rendering of the turns
        before it.

        Calls begin where an answer's text would; where they have a header of their own (gpt-oss),
        they begin behind the generation prompt, as reasoning does.

        Raises:
            UserError: as `render`, or the turn begins at neither of the two.
        """
        whole = self.render([*turns, last], tools)
        starts, what = [self.render(turns, tools, add_generation_prompt=True)], "reasoning"
        if "reasoning_content" not in last:
            starts, what = [self._around_answer(turns, tools)[0], *starts], "calls of tools"
        for start in starts:
            rest = whole[len(start) :]
            if whole.startswith(start) and last.get("reasoning_content", "") in rest:
                return rest
        raise self._lost(f"{what} behind its generation prompt")

    def _around_answer(
        self, turns: Sequence[Turn], tools: Sequence[Mapping] = ()
    ) -> tuple[str, str]:
        rendered = self.render([*turns, {"role": "assistant", "content": _PROBE}], tools)
        before, probe, after = rendered.rpartition(_PROBE)
        if not probe:
            raise self._lost("the assistant's turns")
        return before, after

    def _apply(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Mapping],
        add_generation_prompt: bool,
        log: _Log | None = None,
    ) -> str:
        """The turns as the template writes them; `log` notes how it reads them meanwhile."""
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"tokenizer of {self.tokenizer.name_or_path}: it has no chat template; "
                "pass --rendering text"
            )
        if self._wants_parts:
            turns = [
                {**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns
            ]
        # As `apply_chat_template` does, which goes through all turns four times before it renders.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        turns = [
            {"thinking": turn["reasoning_content"], **turn} if "reasoning_content" in turn else turn
            for turn in turns
        ]
        try:
            template = self.tokenizer.get_chat_template(None, tools or None)
            parts = _compile_jinja_template(template).generate(
                messages=_Turns(turns, log) if log else turns,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self.tokenizer.special_tokens_map, **self.options},
            )
            return "".join(map(log.write, parts) if log else parts)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"chat template of {self.tokenizer.name_or_path}: {reason}; mend the turns"
            ) from None

    # What the template does: each is tried once and kept in `_answers`

    def _lost(self, what: str) -> UserError:
        return UserError(
            f"chat template of {self.tokenizer.name_or_path}: it does not write {what}; pass a "
            "model whose template does, or leave such rows out"
        )

    def _writes(
        self,
        what: str,
        turns: Sequence[Turn],
        probes: Sequence[Turn],
        tools: Sequence[Mapping],
        times: int = 1,
    ) -> bool:
        """Whether the template writes the probe so many times; asked once for the same roles."""
        key = (what, *((turn["role"], "tool_calls" in turn) for turn in turns))
        if key not in self._answers:
            self._answers[key] = self.render(probes, tools).count(_PROBE) >= times
        return self._answers[key]

    def _probe_writes(self, key: str, turns: Sequence[Turn], *more: str) -> bool:
        """Whether the template writes the probe, and `more`, in these turns."""
        if key not in self._answers:
            try:
                written = self._apply(turns, (), False)
                self._answers[key] = all(text in written for text in (_PROBE, *more))
            except UserError:
                if self.tokenizer.chat_template is None:
                    raise
                self._answers[key] = False
        return self._answers[key]

    @property
    def writes_reasoning(self) -> bool:
        """Whether the template writes a turn's reasoning behind its generation prompt."""
        if "reasoning" not in self._answers:
            ask = [{"role": "user", "content": "text"}]
            answer = {"role": "assistant", "content": "text", "reasoning_content": _PROBE}
            whole, start = self._apply([*ask, answer], (), False), self._apply(ask, (), True)
            self._answers["reasoning"] = whole.startswith(start) and _PROBE in whole[len(start) :]
        return self._answers["reasoning"]

    @property
    def _wants_parts(self) -> bool:
        """Whether the template reads a content as a list of parts, as those of vision models do."""
        if "parts" not in self._answers:
            turns = [{"role": "user", "content": _PROBE}]
            self._answers["parts"] = False
            if not self._probe_writes("plain", turns):
                self._answers["parts"] = True
                self._answers["parts"] = self._probe_writes("as parts", turns)
        return self._answers["parts"]

    @property
    def _takes_system(self) -> bool:
        """Whether the template writes a system turn rather than rejecting or swallowing it."""
        turns = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "text"}]
        return self._probe_writes("system", turns)

    @property
    def _takes_json(self) -> bool:
        """Whether the template takes a call's arguments as JSON text, as DeepSeek's does, and not
        as a mapping.

        Raises:
            UserError: the template writes neither.
        """
        turns = [
            {"role": "user", "content": "text"},
            {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]},
        ]
        as_json = [_with_arguments(turn, True) for turn in turns]
        (value,) = _PROBE_ARGUMENTS.values()
        # A template that writes the mapping as Python's `str` does expects JSON text instead.
        if self._probe_writes("calls", turns, value) and not self._probe_writes(
            "calls in Python", turns, str(_PROBE_ARGUMENTS)
        ):
            return False
        if not self._probe_writes("calls in JSON", as_json, value):
            raise self._lost("calls of tools")
        return True


class _Log:
    """Notes how far a template has read the turns while it writes.

    Attributes:
        begun: for each turn how many letters were written when it was first read.
        ended: how many were when there was no turn left to read.
    """

    def __init__(self):
        self.begun: list[int] = []
        self.ended, self.written, self.count = 0, 0, 0

    def write(self, part: str) -> str:
        self.written += len(part)
        return part

    def read(self, count: int) -> None:
        self.begun += [self.written] * (count - len(self.begun))

    def beginning(self, place: int, whole: str) -> str:
        """What stood there before a turn was read, and what is written behind the last turn."""
        if place == self.count:
            return whole
        return whole[: self.begun[place]] + whole[self.ended :] if place < len(self.begun) else ""


class _Turns(Sequence):
    """Turns as a template reads them; whoever asks for their number has looked at all of them."""

    def __init__(self, turns: Sequence[Turn], log: _Log, first: int = 0):
        self._turns, self._log, self._first = turns, log, first
        log.count = first + len(turns)

    def __bool__(self) -> bool:
        return bool(self._turns)

    def __len__(self) -> int:
        self._log.read(self._log.count)
        return len(self._turns)

    def __iter__(self):
        for place, turn in enumerate(self._turns, start=self._first + 1):
            self._log.read(place)
            yield turn
        self._log.ended = self._log.written

    def __getitem__(self, key):
        if isinstance(key, int) and 0 <= key < len(self._turns):
            self._log.read(self._first + key + 1)
        elif isinstance(key, slice) and key.stop is key.step is None and (key.start or 0) >= 0:
            start = key.start or 0
            return _Turns(self._turns[start:], self._log, self._first + start)
        else:
            self._log.read(self._log.count)
        return self._turns[key]


def last_exchange(turns: Sequence[Turn]) -> list[Turn]:
    """The turns by which a template decides how it writes an answer to all of them: the system's,
    the user's last, and behind it the last calls with their results. However long a conversation
    is, they are few.
    """
    place = len(turns) - 1
    while place and turns[place]["role"] == "tool":
        place -= 1
    question = place
    while question and turns[question]["role"] != "user":
        question -= 1
    asked = [turns[question]] if question < place else []
    system = [turns[0]] if turns[0]["role"] == "system" and question else []
    return [*system, *asked, *turns[place:]]


def _with_arguments(turn: Turn, as_json: bool) -> Turn:
    """The turn; if `as_json`, with the arguments of its calls as JSON text."""
    if not as_json or "tool_calls" not in turn:
        return turn
    calls = []
    for call in turn["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**turn, "tool_calls": calls}


def _join_system(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with the system turn's text put in front of the first user turn's."""
    system, *rest = turns
    for place, turn in enumerate(rest):
        if turn["role"] == "user":
            content = f"{system['content']}\n\n{turn['content']}"
            return [*rest[:place], {**turn, "content": content}, *rest[place + 1 :]]
    return [{"role": "user", "content": system["content"]}, *rest]
