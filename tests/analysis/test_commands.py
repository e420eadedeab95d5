"""Promises of the command lines of tools/analyze.py, visualize.py and benchmark.py."""

import analyze
import benchmark
import pytest
import visualize

COMMANDS = {
    analyze: ["model", "stages", "results"],
    visualize: ["data", "training", "results", "tsne", "stages"],
    benchmark: ["forward", "train-step", "sample", "assign", "deploy", "data", "eval"],
}


@pytest.mark.parametrize("tool", COMMANDS, ids=lambda tool: tool.__name__)
def test_every_command_is_in_the_help_and_has_its_own(tool, capsys):
    for command in ([], *([name] for name in COMMANDS[tool])):
        with pytest.raises(SystemExit) as ended:
            tool.main([*command, "--help"])
        assert ended.value.code == 0
        assert all(name in capsys.readouterr().out for name in command or COMMANDS[tool][:1])
    with pytest.raises(SystemExit) as ended:
        tool.main([])
    assert ended.value.code == 2
