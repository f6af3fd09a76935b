"""The command, run in this process."""

from merge_engine.cli.main import main


def run_cli(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()
