"""``python -m dcngen <command>``: finds the command and hands the remaining arguments on.

Nothing but the chosen command's module is imported, so ``info`` works where half of the dependencies are missing and
every ``--help`` is quick.
"""

import difflib
import importlib
import os
import sys

# command: (module with a main(argv) function, one line for the help)
COMMANDS = {
    "info": ("dcngen.info", "what was found on this machine: versions, compiled operators, caches"),
    "data": ("dcngen.data.cli", "fetch and prepare a data set, draw a contact sheet"),
    "evaluate": ("dcngen.evaluation.evaluate", "FID and KID of a folder of pictures against a data set"),
    "compare": ("dcngen.evaluation.cli", "compare trained runs under one plan: table and HTML report"),
    "params": ("dcngen.models.params", "parameter counts of the U-Nets"),
    "export": ("dcngen.diffusion.export", "write a pipeline folder that loads without dcngen installed"),
    "bench": ("dcngen.bench", "measure the operator and the models on this machine"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m dcngen <command> [arguments]",
            "",
            *lines,
            "",
            "`python -m dcngen <command> --help` lists a command's arguments.",
            "Training is `accelerate launch train_ldm.py --config configs/<name>.yaml`, sampling `python sample.py`.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status (2 for an unknown command, 1 for an error the user can mend)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        import dcngen

        print(f"dcngen {dcngen.__version__}")
        return 0
    name, arguments = argv[0], argv[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        print(f"dcngen: unknown command {name!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[name][0]).main(arguments) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, FileNotFoundError, ModuleNotFoundError) as error:
        if os.environ.get("DCNGEN_TRACEBACK") or not str(error):
            raise
        print(f"{type(error).__name__}: {error}\n(DCNGEN_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
        return 1
