"""Checks: one function per system or exercise that raises AssertionError with a diagnosis in words.

`refimpl/checks/<chapter>/<system>.py` holds `check_<system>(implementation)`; `<chapter>/exercises.py` holds
those of the chapter's exercises. The tests call them on refimpl, the notebooks on a reader's function, the
cross-checks on a peer library. A check computes its reference itself: apart from this package it imports
nothing of refimpl. Where refimpl has an implementation of its own, the module names it: `IMPLEMENTATION =
{"trace": "refimpl.trace:trace"}`.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["check", "get", "implementation", "names", "require", "require_close", "require_error", "run"]


def names() -> list[str]:
    """The names of all checks, sorted; `check_trace` is called "trace".

    >>> "trace" in names() and "bits_per_byte" in names()
    True
    """
    return sorted(_found())


def get(name: str) -> Callable:
    """The function `check_<name>`; ValueError for an unknown name."""
    return getattr(_module_of(name), f"check_{name}")


def implementation(name: str) -> object | None:
    """What refimpl itself offers to check `name`: a function or class; None for an exercise.

    >>> implementation("bits_per_byte") is None
    True
    """
    target = getattr(_module_of(name), "IMPLEMENTATION", {}).get(name)
    if target is None:
        return None
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def run(name: str, candidate: object | None = None) -> None:
    """Run check `name` on `candidate`, or on refimpl's own implementation.

    Raises AssertionError with a diagnosis if the candidate is wrong, ValueError for an unknown name and for
    an exercise without a candidate.
    """
    function = get(name)
    candidate = implementation(name) if candidate is None else candidate
    if candidate is None:
        raise ValueError(f"name: {name!r} checks an exercise; pass your function as second argument")
    function(candidate)


def check(function: Callable[[object], None]) -> Callable[[object], None]:
    """Make a check of `function`: it says "passed", or "not attempted yet" for a stub that raises
    NotImplementedError.

    >>> @check
    ... def check_two(f):
    ...     require(f() == 2, f"f() is {f()}, not 2")
    >>> def stub(): raise NotImplementedError
    >>> check_two(stub); check_two(lambda: 2)
    two: not attempted yet
    two: passed
    """
    name = function.__name__.removeprefix("check_")

    @wraps(function)
    def checked(candidate: object) -> None:
        try:
            function(candidate)
        except NotImplementedError:
            print(f"{name}: not attempted yet")
        else:
            print(f"{name}: passed")

    return checked


def require(condition: object, diagnosis: str) -> None:
    """AssertionError with `diagnosis` unless `condition` (`assert` would vanish under `python -O`)."""
    if not condition:
        raise AssertionError(diagnosis)


def require_close(actual: Tensor, expected: Tensor, tolerance: float, diagnosis: str) -> None:
    """AssertionError unless `actual` is a tensor of the shape of `expected` and nowhere further than
    `tolerance` from it.

    >>> require_close(torch.tensor([1., 2.]), torch.tensor([1., 2.5]), 0.1, "scores")
    Traceback (most recent call last):
    AssertionError: scores: differs by 0.5 at index (1,): 2 instead of 2.5
    """
    require(isinstance(actual, Tensor), f"{diagnosis}: a {type(actual).__name__} instead of a tensor")
    require(
        actual.shape == expected.shape,
        f"{diagnosis}: shape {list(actual.shape)} instead of {list(expected.shape)}",
    )
    require(bool(torch.isfinite(actual).all()), f"{diagnosis}: holds values that are not finite")
    gap = (actual.detach().double() - expected.detach().double()).abs()
    if gap.numel() and gap.max() > tolerance:
        where = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
        raise AssertionError(
            f"{diagnosis}: differs by {gap[where].item():.2g} at index {where}: "
            f"{actual[where].item():.4g} instead of {expected[where].item():.4g}"
        )


def require_error(error: type[Exception], function: Callable[[], object], diagnosis: str) -> None:
    """AssertionError unless calling `function` raises `error`."""
    try:
        function()
    except error:
        return
    except Exception as other:
        message = f"{diagnosis}: raised {type(other).__name__} instead of {error.__name__}"
        raise AssertionError(message) from other
    raise AssertionError(f"{diagnosis}: raised nothing instead of {error.__name__}")


def _found() -> dict[str, str]:
    """Name of each check -> its module. Files are read, not imported: a check that is asked for loads no
    other, and a notebook is up to date as long as its own checks are."""
    found: dict[str, str] = {}
    for info in pkgutil.walk_packages(__path__, prefix=f"{__name__}."):
        if info.ispkg:
            continue
        text = Path(info.module_finder.path, f"{info.name.rpartition('.')[2]}.py").read_text("utf-8")
        for name in re.findall(r"^def check_(\w+)", text, re.MULTILINE):
            if name in found:
                raise RuntimeError(f"two checks are called {name!r}: in {found[name]} and in {info.name}")
            found[name] = info.name
    return found


def _module_of(name: str) -> object:
    found = _found()
    if name not in found:
        raise ValueError(f"name: no check {name!r}; allowed: {', '.join(sorted(found))}")
    return importlib.import_module(found[name])
