"""The command line: `python -m refimpl` explains itself.

Exit codes: 0, all is well; 1, a check failed, a must gate was missed, something is not installed, or a model
is unknown or does not fit; 2, wrong usage; 141, the reader of the output has closed it (as `| head` does).
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from refimpl.footprint import command as footprint
from refimpl.models import DamagedModel, bundled, evaluation, folder_of, load, revision

_EXAMPLES = """
examples:
  python -m refimpl systems                      every system of the survey, by chapter
  python -m refimpl check trace                  judge our implementation as a reader's would be judged
  python -m refimpl evaluate llama-nano --quick  measure a bundled model again, 200 items per gate
  python -m refimpl card llama-mini              what a model was trained on, how, and how good it is
  python -m refimpl footprint meta-llama/Meta-Llama-3-8B --length 8192 --train lora --gpu 24GB
                                                 the bytes of a run by kind, and what would make it fit

exit codes: 0 all is well; 1 a check or a gate failed, a file is missing or damaged, a model is unknown or
does not fit; 2 wrong usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    >>> main(["card", "gpt3"])
    2
    """
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as wrong_usage:  # argparse has printed help (0) or what is wrong (2)
        return int(wrong_usage.code or 0)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        code = options.command(options)
        sys.stdout.flush()  # so that a closed pipe shows here
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + 13  # what a shell reports for a program that SIGPIPE has ended
    except _WrongUsage as error:
        print(f"refimpl: {error}", file=sys.stderr)
        return 2
    except (OSError, DamagedModel) as error:
        print(f"refimpl: {error}", file=sys.stderr)
        return 1


class _WrongUsage(Exception):
    pass


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m refimpl",
        description="The systems of a survey of LLM memory, compression and alignment, written to be read:\n"
        "list them, check them, measure the bundled models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="{systems,check,evaluate,card,footprint}")

    systems = commands.add_parser("systems", help="list the catalogue")
    systems.add_argument("chapter", nargs="?", help="only this chapter")
    systems.set_defaults(command=_systems)

    check = commands.add_parser("check", help="run a check on our own implementation")
    check.add_argument("name", help="name of a check, or all")
    check.set_defaults(command=_check)

    evaluate = commands.add_parser("evaluate", help="measure a bundled model on the gates of its pretraining")
    evaluate.add_argument("name", help="name of a bundled model")
    evaluate.add_argument("--quick", action="store_true", help="200 items per gate: a minute or two")
    evaluate.set_defaults(command=_evaluate)

    card = commands.add_parser("card", help="print a bundled model's card")
    card.add_argument("name", help="name of a bundled model")
    card.set_defaults(command=_card)

    bytes_of = commands.add_parser("footprint", help="the memory that training or serving a model needs")
    footprint.add_arguments(bytes_of)
    bytes_of.set_defaults(command=_footprint)
    return parser


def _systems(options: argparse.Namespace) -> int:
    from refimpl.systems import CHAPTERS, systems

    if options.chapter is not None:
        _one_of("chapter", options.chapter, CHAPTERS)
    for chapter, title in CHAPTERS.items():
        if options.chapter not in (None, chapter):
            continue
        rows = systems(chapter)
        print(f"{title} ({chapter}): {len(rows)}, of which {sum(row.coming for row in rows)} are coming")
        for row in rows:
            print(f"  {row.id:32} {row.kind:10} {row.verdict or 'coming':24} {row.name}")
    return 0


def _check(options: argparse.Namespace) -> int:
    from refimpl import checks

    if options.name == "all":
        names = [name for name in checks.names() if checks.implementation(name) is not None]
    else:
        _one_of("check", options.name, ["all", *checks.names()])
        names = [options.name]
        if checks.implementation(options.name) is None:
            raise _WrongUsage(
                f"check {options.name} judges an exercise, and we have no implementation to run it on; "
                f"call refimpl.checks.run({options.name!r}, your_function)"
            )
    failed = []
    for name in names:
        start = time.perf_counter()
        try:
            checks.run(name)
        except AssertionError as diagnosis:
            failed.append(name)
            print(f"{name}: FAILED after {time.perf_counter() - start:.1f} s: {diagnosis}")
    if len(names) > 1:
        print(f"{len(names) - len(failed)} of {len(names)} checks passed")
    return 1 if failed else 0


def _evaluate(options: argparse.Namespace) -> int:
    _one_of("model", options.name, bundled())
    model, tokenizer = load(options.name)
    stored = evaluation(options.name)
    from refimpl.world.gates import agrees, evaluate_gates, held

    measured = {result["name"]: result for result in stored["gates"]}
    wrong = []
    print(f"{options.name}, revision {revision(options.name)}" + (", 200 items per gate" * options.quick))
    print(f"{'gate':32} {'level':6} {'measured':>24} {'required':>9} {'held':6} {'stored':>8} agree")

    def report(result) -> None:
        """Print one gate's row; a must gate that binds has to hold and to agree with what is stored."""
        before = measured.get(result.name)
        holds, same = held(result, quick=options.quick), before is not None and agrees(result, before)
        if result.level == "must" and result.passed is not None and not (holds and same):
            wrong.append(result.name)
        interval = f"{result.value:.3f} [{result.lo:.3f}, {result.hi:.3f}]"
        verdict = "–" if result.passed is None else "yes" if holds else "NO"
        known = f"{before['value']:.3f}" if before else "none"
        row = f"{result.name:32} {result.level:6} {interval:>24} {result.threshold:9g} {verdict:6} {known:>8}"
        print(row, "yes" if same else "NO", flush=True)

    start = time.perf_counter()
    # On a CPU, small batches are the fast ones: they stay in its caches.
    evaluate_gates(
        model,
        tokenizer,
        options.name,
        quick=options.quick,
        book_score=stored["book_score"],
        max_tokens=2048,
        report=report,
    )
    if stored["book_score"] is None:
        print("book score: not measured at training, since no held-out books were given")
    print(
        f"{time.perf_counter() - start:.0f} s; "
        + (f"must gates that fail or disagree: {', '.join(wrong)}" if wrong else "every must gate holds")
    )
    return 1 if wrong else 0


def _card(options: argparse.Namespace) -> int:
    _one_of("model", options.name, bundled())
    print(f"revision {revision(options.name)}\n")
    print((folder_of(options.name) / "card.md").read_text(encoding="utf-8"), end="")
    return 0


def _footprint(options: argparse.Namespace) -> int:
    try:
        return footprint.footprint(options)
    except ValueError as error:
        raise _WrongUsage(str(error)) from error


def _one_of(what: str, name: str, allowed: Sequence[str]) -> None:
    if name not in allowed:
        raise _WrongUsage(f"unknown {what} {name!r}; allowed: {', '.join(allowed)}")


if __name__ == "__main__":
    sys.exit(main())
