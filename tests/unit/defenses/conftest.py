"""Fixtures for the tests of CMI; each is made once, and no test changes it."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from azeotrope.models import Loaded
    from azeotrope.tokens import Example


@pytest.fixture(scope="session")
def teacher() -> "Loaded":
    from azeotrope import models

    return models.load("pocket/teacher", device="cpu")


@pytest.fixture(scope="session")
def truth(teacher: "Loaded") -> "list[Example]":
    """Reference solutions, which no model wrote."""
    from cmi_cases import truth_examples

    return truth_examples(teacher)


@pytest.fixture(scope="session")
def own(teacher: "Loaded") -> "list[Example]":
    """Completions that the teacher writes."""
    from cmi_cases import own_examples

    return own_examples(teacher)


@pytest.fixture(scope="session")
def case(teacher: "Loaded", own: "list[Example]", truth: "list[Example]") -> Callable:
    """Makes surrogates cut at a layer, and the features that belong to them."""
    from cmi_cases import case_maker

    return case_maker(teacher, own, truth)
