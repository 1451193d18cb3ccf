"""The command line: growlib expand | plan | verify | methods | families | cache. What they do: commands.py."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from growlib.errors import GrowError

EXAMPLES = """examples:
  growlib plan small/ --scale width=2 depth=1.5
  growlib expand small/ big/ --set hidden_size=1024 --set num_hidden_layers=24 --exact
  growlib verify small/ big/
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that knows what was meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        known += [str(name) for action in self._actions for name in action.choices or ()]
        quoted = message.partition("invalid choice: ")[2].partition("'")[2].partition("'")[0]
        for word in [quoted] if quoted else message.partition("unrecognized arguments: ")[2].split():
            close = difflib.get_close_matches(word.partition("=")[0], known, n=1)
            message = f"{word!r} is not known" + (f"; did you mean {close[0]!r}?" if close else "")
            break
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 where a verification fails, or 2 for a request that growlib refuses."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    from growlib import commands  # torch and transformers, which `--help` need not wait for

    try:
        return getattr(commands, options.run)(options)
    except GrowError as error:
        print(f"growlib: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `growlib plan ... | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> Parser:
    parser = Parser(
        prog="growlib",
        description="Start a large language model from a small one.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"growlib {version('growlib')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    command = _command(commands, "expand", "grow a checkpoint into a larger one")
    command.add_argument("source", help="a folder or a hub id")
    command.add_argument("destination", help="a folder that does not exist yet")
    _growth_options(command)
    command.add_argument("--dtype", help="of the result, such as bfloat16 (default: the source's)")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: %(default)s)")
    command.add_argument("--push-to-hub", metavar="NAME", help="upload the result there, such as me/big; private")
    command = _command(commands, "plan", "show what a growth would do, without weights and without running it")
    command.add_argument("source", help="a folder (a config.json alone will do) or a hub id")
    _growth_options(command)
    command.add_argument("--json", action="store_true", help="print the plan as JSON")
    command.add_argument("--save", metavar="FILE", help="write the plan for `growlib expand --plan` or GrowthPlan.load")
    command = _command(commands, "verify", "compare what a source and its grown model compute, on random inputs")
    command.add_argument("source", help="the small model: a folder or a hub id")
    command.add_argument("grown", help="the grown model: a folder or a hub id")
    command.add_argument("--streaming", action="store_true", help="layer by layer from disk: for models of any size")
    sampled = "make so many tensors again from the source and the plan, and compare them with the files; runs no model"
    command.add_argument("--tensors", type=int, metavar="N", help=sampled)
    command = _command(commands, "methods", "the growth methods")
    command.add_argument("--bibtex", action="store_true", help="their sources as BibTeX")
    command = _command(commands, "families", "the model types with a table, and the inference of others")
    command.add_argument("--check", metavar="TYPE", help="show the table of a model type, or of your module:Class")
    command.add_argument("--table", metavar="PATH", help="read a table of your own, or a folder of them, before")
    _cache_options(_command(commands, "cache", "write what a teacher says about a dataset, or verify what was written"))
    return parser


def _command(commands: Any, name: str, text: str) -> Parser:
    command: Parser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=name, parser=command)
    return command


def _growth_options(command: Parser) -> None:
    target = command.add_argument_group("the target, in one or several of these ways")
    target.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the config, such as hidden_size=1024",
    )
    target.add_argument(
        "--scale",
        nargs="+",
        default=[],
        metavar="PART=FACTOR",
        help="width=2 (hidden, FFN, heads, KV heads), depth=1.5",
    )
    target.add_argument("--config", metavar="FOLDER", help="a folder with the target's config.json, instead")
    target.add_argument("--plan", metavar="FILE", help="a plan that `growlib plan --save` wrote, instead")
    command.add_argument(
        "--method", help="see `growlib methods`; WIDTH+DEPTH, or module:attribute of your own (default: lossless)"
    )
    command.add_argument("--seed", type=int, help="decides every free value (default: 0)")
    command.add_argument("--exact", action="store_true", help="refuse what does not preserve the function")
    command.add_argument("--table", metavar="PATH", help="a table of your own for the model type: MODEL_TYPE.toml")


def _cache_options(command: Parser) -> None:
    command.usage = "growlib cache TEACHER DATA FOLDER [options] | growlib cache answers FILE FOLDER [options] | "
    command.usage += "growlib cache verify FOLDER [TEACHER DATA]"
    command.add_argument(
        "arguments",
        nargs="+",
        help="TEACHER: a checkpoint, or the address of a server; DATA: a .npy array of token ids, a .jsonl file, or "
        "text; FILE: a .jsonl or .parquet file of a server's answers",
    )
    command.add_argument("--model", metavar="NAME", help="the server's name for the teacher")
    command.add_argument("--tokenizer", metavar="FOLDER", help="of a served teacher")
    command.add_argument("--vocab", type=int, metavar="N", help="token ids of a served teacher (default: tokenizer's)")
    command.add_argument(
        "--store",
        choices=["probabilities", "hidden"],
        default="probabilities",
        help="probabilities, or hidden states and the head once: exact at any temperature (default: %(default)s)",
    )
    command.add_argument("--top-k", type=int, help="probabilities: exact tokens per position (default: 16)")
    command.add_argument("--samples", type=int, help="probabilities: draws per position (default: 12)")
    command.add_argument("--temperature", type=float, help="probabilities: of the softmax (default: 1)")
    command.add_argument("--seed", type=int, help="probabilities: of the draws (default: 0)")
    command.add_argument("--length", type=int, default=512, help="tokens of a block of text (default: %(default)s)")
    command.add_argument("--batch-size", type=int, default=8, help="examples at once (default: %(default)s)")
    command.add_argument("--held-out", metavar="DATA", help="data on which the teacher's own loss is measured")


if __name__ == "__main__":
    sys.exit(main())
