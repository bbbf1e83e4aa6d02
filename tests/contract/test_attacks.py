"""What holds for every attack and clean-up there is, and for those that a newcomer adds.

The modules are discovered, not listed, so a new one is checked by being there.
"""

import importlib
import pickle
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from azeotrope import tasks
from azeotrope.attacks import base as attacks
from azeotrope.attacks.cleanups import base as cleanups
from azeotrope.attacks.cleanups.base import AttackerAssets, Cleanup
from azeotrope.attacks.logit_kd import ALIASES
from azeotrope.attacks.logits.attack import LogitAttack
from azeotrope.attacks.logits.teacher import TeacherHead
from azeotrope.config import Config, ConfigError
from azeotrope.heads.features import compute
from azeotrope.models import Loaded, head_of, load
from azeotrope.tokens import Boundary, encode
from azeotrope.traces import Trace, ground_truth

ROOT = Path(__file__).parents[2]
BOUNDARY = Boundary()
TASK = tasks.build(tasks.PocketConfig())
MODULES = [name for name in attacks.names() if name not in ALIASES]


def module_of(name: str) -> ModuleType:
    module = "logit_kd" if name in ALIASES else name
    return importlib.import_module(f"azeotrope.attacks.{module}")


def allowed_keys(name: str) -> str:
    """The keys of a configuration under this name, as messages list them."""
    config = attacks.resolve({"name": name}).config
    return ", ".join(sorted(config.dump() if name in ALIASES else type(config).model_fields))


def copies_are_equal(config: Config) -> None:
    kind = type(config)
    assert kind.model_validate_json(config.model_dump_json()) == config
    assert kind.model_validate(config.dump()) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.fixture(scope="module")
def student() -> Loaded:
    return load("pocket/small", device="cpu")


@pytest.fixture(scope="module")
def stranger() -> Loaded:
    """A student with another vocabulary than the teacher's."""
    return load("pocket/other", device="cpu")


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    return ground_truth(TASK, TASK.problems("train", 3))


@pytest.fixture(scope="module")
def teacher(traces: list[Trace]) -> TeacherHead:
    """A teacher that has scored the traces, and can be queried about other texts."""
    loaded = load("pocket/teacher", device="cpu")
    texts = [
        encode(
            loaded.tokenizer,
            TASK.messages(trace.question),
            trace.text,
            boundary=BOUNDARY,
            max_length=256,
            id=trace.id,
        )
        for trace in traces
    ]
    head = head_of(loaded.model)
    scored = compute(loaded.model, texts)
    return TeacherHead(loaded.tokenizer, head.weight, head.bias, scored, model=loaded.model)


def attached(name: str, teacher: TeacherHead, student: Loaded) -> attacks.Attack:
    """An attack with its teacher, if it needs one."""
    attack = attacks.resolve({"name": name})
    assert isinstance(attack, LogitAttack) == (attack.needs != "text")
    if isinstance(attack, LogitAttack):
        attack.attach(teacher, student)
    return attack


# Attacks


@pytest.mark.parametrize("name", MODULES)
def test_an_attack_module_follows_the_contract(name: str) -> None:
    module = module_of(name)
    assert module.Config().name == name
    assert get_args(module.Config.model_fields["name"].annotation) == (name,)
    built = module.build(module.Config())
    assert isinstance(built, attacks.Attack)
    assert built.needs in get_args(attacks.Observes)
    assert attacks.resolve({"name": name}).config == module.Config()
    copies_are_equal(module.Config(max_length=64))
    assert pickle.loads(pickle.dumps(built)).config == built.config
    assert module.__doc__


@pytest.mark.parametrize("name", ALIASES)
def test_a_divergence_is_an_attack_of_its_own_name(name: str) -> None:
    short = attacks.resolve({"name": name, "temperature": 2.0}).config
    full = attacks.resolve({"name": "logit_kd", "divergence": name, "temperature": 2.0}).config
    assert short == full
    assert (short.label, short.dump()["name"]) == (name, name)
    copies_are_equal(short)
    assert attacks.resolve(short.dump()).config == short


@pytest.mark.parametrize("name", [name for name in attacks.names() if name != "logit_kd"])
def test_the_documents_name_an_attack(name: str) -> None:
    assert f"`{name}`" in (ROOT / "README.md").read_text()
    assert f"\n| `{name}` |" in (ROOT / "docs/attacks.md").read_text()


def teaches(attack: attacks.Attack, student: Loaded, traces: list[Trace]) -> None:
    examples = attack.examples(student, traces, TASK, BOUNDARY)
    assert [example.id for example in examples] == [trace.id for trace in traces]
    student.model.zero_grad()
    whole = attack.loss(student, examples)
    assert whole.total.isfinite()
    parts = [attack.loss(student, [example]) for example in examples]
    # A sum and a count, so that any split into micro-batches is the same.
    assert whole.count == sum(part.count for part in parts)
    total = sum(part.total.item() for part in parts)
    several = attack.needs == "logits" and len(attack.divergences()) > 1  # type: ignore[attr-defined]
    if several:
        # The larger of two sums is never above the sum of the larger ones.
        assert whole.total.item() <= total * (1 + 1e-5)
        assert whole.total.item() > 0.8 * total
    else:
        assert whole.total.item() == pytest.approx(total, rel=1e-5)
    if whole.total.requires_grad:
        whole.total.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.model.parameters())
    student.model.zero_grad()


@pytest.mark.parametrize("name", attacks.names())
def test_an_attack_teaches_from_traces(
    name: str, teacher: TeacherHead, student: Loaded, traces: list[Trace]
) -> None:
    teaches(attached(name, teacher, student), student, traces)


@pytest.mark.parametrize("name", attacks.names())
def test_an_attack_teaches_a_student_of_another_vocabulary_or_refuses(
    name: str, teacher: TeacherHead, stranger: Loaded, traces: list[Trace]
) -> None:
    if attacks.resolve({"name": name}).needs == "teacher":
        with pytest.raises(ValueError, match="must have one vocabulary"):
            attached(name, teacher, stranger)
    else:
        teaches(attached(name, teacher, stranger), stranger, traces)


@pytest.mark.parametrize("name", attacks.names())
def test_an_attack_that_needs_a_teacher_refuses_to_work_without(
    name: str, student: Loaded, traces: list[Trace]
) -> None:
    attack = attacks.resolve({"name": name})
    if attack.needs == "text":
        assert attack.examples(student, traces, TASK, BOUNDARY)
        return
    label = attack.config.label
    with pytest.raises(ValueError, match=f"{label} learns from a teacher.*; attach one first"):
        attack.examples(student, traces, TASK, BOUNDARY)


@pytest.mark.parametrize("name", attacks.names())
def test_an_attack_refuses_unknown_keys(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        attacks.resolve({"name": name, "max_lenght": 64})
    assert f"unknown key 'max_lenght'; allowed: {allowed_keys(name)}" in str(error.value)
    with pytest.raises(ConfigError, match=r"unknown key 'fit\.step'; allowed: accumulation"):
        attacks.resolve({"name": name, "fit": {"step": 3}})


# Clean-ups


@pytest.mark.parametrize("name", cleanups.names())
def test_a_clean_up_module_follows_the_contract(name: str) -> None:
    module = importlib.import_module(f"azeotrope.attacks.cleanups.{name}")
    (cleanup,) = cleanups.resolve(name).parts
    assert isinstance(cleanup, Cleanup)
    assert cleanup.config.name == name
    assert get_args(module.Config.model_fields["name"].annotation) == (name,)
    copies_are_equal(cleanup.config)
    assert pickle.loads(pickle.dumps(cleanup)).config == cleanup.config
    assert module.__doc__


@pytest.mark.parametrize("name", cleanups.names())
def test_the_documents_name_a_clean_up(name: str) -> None:
    assert f"`{name}`" in (ROOT / "README.md").read_text()
    assert f"\n| `{name}` |" in (ROOT / "docs/attacks.md").read_text()


@pytest.mark.parametrize("name", cleanups.names())
def test_a_clean_up_changes_texts_but_not_which_traces_they_are(
    name: str, traces: list[Trace]
) -> None:
    chain = cleanups.resolve(name)
    before = list(traces)
    once, again = (chain.clean(traces, BOUNDARY, AttackerAssets()) for _ in range(2))
    assert traces == before, "the observed traces stay as they are"
    assert once.traces == again.traces, "a clean-up is deterministic"
    assert {trace.id for trace in once.traces} <= {trace.id for trace in traces}
    assert once.cost.queries >= 0
    assert once.cost.tokens >= 0
    assert once.cost.seconds >= 0
