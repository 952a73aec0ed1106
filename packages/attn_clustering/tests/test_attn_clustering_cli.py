import pytest
from attn_clustering.cli import MISSING, main


def test_help_says_what_is_missing(capsys):
    assert main([]) == 0
    assert " ".join(MISSING.split()) in " ".join(capsys.readouterr().out.split())


def test_a_command_that_does_not_exist_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--seed", "1"])
    assert stop.value.code == 2
    assert "no command 'train' yet" in capsys.readouterr().err
