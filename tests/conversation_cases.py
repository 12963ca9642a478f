"""Random conversations in every order that is read, with calls of tools where a test wants them,
and what must be supervised of them.
"""

from hypothesis import strategies as st
from tokenizers_for_tests import TRL_TEMPLATES

from recipelib.encoding.prompt_encoder import IGNORED

# The templates that write calls of tools and their descriptions.
_FAMILIES = (
    *("diffusion_gemma", "gemma4", "glm4moe", "gptoss", "lfm2_2_5", "lfm2_v2", "llama3_1"),
    *("llama3_2", "muse_glimmer", "nemotron_3", "qwen2_5", "qwen3"),
)
TAKES_CALLS = [
    name
    for name in TRL_TEMPLATES
    if name.startswith(_FAMILIES) and not name.startswith("qwen2_5_vl")
]
_FOLLOW = {"user": ["assistant"], "assistant": ["user", "tool"], "tool": ["assistant", "tool"]}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "description": "Which town."}},
            "required": ["town"],
        },
    },
}


def call(name, **arguments):
    return {
        "type": "function",
        "id": "call00001",
        "function": {"name": name, "arguments": arguments},
    }


@st.composite
def conversations(draw, texts, *, calls=None, tools=True, longest=6):
    """Turns that end with the assistant's.

    Args:
        texts: of the turns.
        calls: of the arguments of calls, one of which then stands before every tool's turn.
        tools: whether tools have turns.
    """
    # What begins with a thought is read as one, see test_reasoning.
    texts = texts.filter(lambda text: not text.lstrip().startswith("<think>"))
    turns, role = [], "user"
    if draw(st.booleans()):
        turns.append({"role": "system", "content": draw(texts)})
    length = len(turns) + draw(st.integers(2, longest))
    while len(turns) < length or turns[-1]["role"] != "assistant":
        turns.append({"role": role, "content": draw(texts)})
        choices = [one for one in _FOLLOW[role] if one != "tool" or tools]
        if calls is not None and role == "assistant":
            choices = ["user"]
            if len(turns) < length and draw(st.booleans()):
                turns[-1]["content"] = draw(st.one_of(st.just(""), texts))
                turns[-1]["tool_calls"] = [call("weather", **draw(calls))]
                choices = ["tool"]
        if calls is not None and role == "tool":
            choices = ["assistant"]
        role = draw(st.sampled_from(choices))
    return turns


def answered(messages):
    """The same turns, the assistant's without the white space around them, as they are learned."""
    return [
        {**one, "content": one["content"].strip()} if one["role"] == "assistant" else one
        for one in messages
    ]


def arguments(texts, names=("town", "n")):
    values = st.one_of(texts, st.integers(-9, 9))
    return st.dictionaries(st.sampled_from(names), values, min_size=1)


def supervised_runs(labels):
    """The [start, end) of each unbroken stretch that is supervised."""
    runs = []
    for place, label in enumerate(labels):
        if label == IGNORED:
            continue
        if runs and runs[-1][1] == place:
            runs[-1][1] = place + 1
        else:
            runs.append([place, place + 1])
    return runs


def targets(examples):
    """The labels of each stretch that is supervised."""
    return [labels[a:b] for _, labels in examples for a, b in supervised_runs(labels)]
