"""Every option of merge.py and consolidate.py reaches what it is for."""

import argparse
from pathlib import Path

import consolidate
import merge
import pytest

# Whose options go to a function, and what they may be.
TOOLS = {
    merge: (
        "recipelib.adapters.merge_adapter",
        {
            "adapter": ["other"],
            "output": ["--output", "elsewhere"],
            "model_name_or_path": ["--model_name_or_path", "base"],
            "dtype": ["--dtype", "bfloat16"],
        },
    ),
    consolidate: (
        "consolidate.consolidate",
        {"checkpoint": ["other"], "output": ["--output", "elsewhere"]},
    ),
}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_every_option_of_a_tool_reaches_what_it_is_for(tool, monkeypatch, capsys):
    function, options = TOOLS[tool]
    given: list[tuple] = []
    monkeypatch.setattr(function, lambda *args: given.append(args) or Path("folder"))
    tool.main(["folder"])
    for argv in options.values():
        tool.main(argv if not argv[0].startswith("--") else ["folder", *argv])
    assert len({*given}) == len(given) == 1 + len(options)

    def stop(parser, argv):
        assert {action.dest for action in parser._actions} == {"help", *options}
        raise StopIteration

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(StopIteration):
        tool.main([])
