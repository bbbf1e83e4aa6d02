"""Signs of collecting a data set, on traffic that is made up: honest keys and thieves.

The rates below hold for this traffic and no other. `python -m pytest -s` shows the scores.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from random import Random
from statistics import median

import pytest

from gateway.extraction import signs
from gateway.extraction.elicitation import asks_for_reasoning
from gateway.extraction.score import Observation, Watch, observe, score
from gateway.policy import Extraction

THRESHOLD = Extraction().threshold
HOUR, DAY = 3600.0, 86400.0
START = 1_700_000_000.0 // DAY * DAY
LEXICON = [a + b + c for a in "btkmsrl" for b in ("a", "e", "o", "ui") for c in "nrlst"]
FOLLOW_UPS = ["why?", "thanks", "and in german?", "shorter please", "go on", "are you sure?"]

Kind = Callable[[Random], list[Observation]]


def words(rng: Random, least: int, most: int) -> str:
    return " ".join(rng.choices(LEXICON, k=rng.randint(least, most)))


def problem(rng: Random) -> str:
    """One of thousands of word problems."""
    return f"{words(rng, 25, 45)} {rng.randint(2, 99)} {words(rng, 8, 15)}?"


def ask(text: str, at: float, **more) -> Observation:
    given = {"max_tokens": None, "temperature": 1.0, "address": "10.0.0.1", "user_agent": "a/1"}
    return observe(text, at=at, **{**given, **more})


def sessions(rng: Random, count: int) -> list[float]:
    """Times of a person's requests: a few sessions on waking days."""
    found: list[float] = []
    while len(found) < count:
        began = START + rng.randrange(20) * DAY + rng.uniform(8, 22) * HOUR
        for _ in range(rng.randint(3, 15)):
            began += rng.expovariate(1 / 90)
            found.append(began)
    return sorted(found)[:count]


def around_the_clock(rng: Random, count: int, per_hour: float) -> list[float]:
    at, found = START, []
    for _ in range(count):
        at += rng.expovariate(per_hour / HOUR)
        found.append(at)
    return found


# Honest keys ---------------------------------------------------------------------------------


def chat(rng: Random) -> list[Observation]:
    """A person: follow-ups, pastes, now and then "step by step", on two addresses."""
    found = []
    for at in sessions(rng, rng.randint(20, 120)):
        kind = rng.random()
        text = words(rng, 5, 40) + ("?" if kind < 0.8 else "")
        if kind < 0.25:
            text = rng.choice(FOLLOW_UPS)
        elif kind < 0.35:
            text = f"explain {words(rng, 3, 8)} step by step"
        elif kind < 0.45:
            text = words(rng, 150, 600)
        found.append(ask(text, at, address=f"10.0.0.{rng.randint(1, 2)}"))
    return found


def pupil(rng: Random) -> list[Observation]:
    """Homework: many problems, some with the wish to see the steps."""
    eager = rng.uniform(0.1, 0.9)
    found = []
    for at in sessions(rng, rng.randint(20, 100)):
        text = problem(rng) if rng.random() < 0.7 else rng.choice(FOLLOW_UPS)
        if rng.random() < eager:
            text += rng.choice([" show your work", " please explain step by step"])
        found.append(ask(text, at))
    return found


def product(rng: Random) -> list[Observation]:
    """A web site with users everywhere: one prompt around what each of them wrote."""
    frame = f"You are the assistant of {words(rng, 12, 20)}. The customer writes: "
    pace = rng.uniform(5, 300)
    return [
        ask(frame + words(rng, 3, 80), at, max_tokens=800, temperature=0.7)
        for at in around_the_clock(rng, 150, pace)
    ]


def table(rng: Random) -> list[Observation]:
    """A developer: one template over a CSV file, at a steady rate, with a fixed length."""
    frame = f"Classify the following review as positive or negative. {words(rng, 5, 20)}. Review: "
    temperature = rng.choice([0.0, 0.0, 1.0])
    return [
        ask(frame + words(rng, 10, 40), START + 4 * i, max_tokens=64, temperature=temperature)
        for i in range(200)
    ]


def labels(rng: Random) -> list[Observation]:
    """A developer who wants each label's probability."""
    return [
        ask(
            f"Is this about {words(rng, 1, 1)}? Answer yes or no. {words(rng, 10, 60)}",
            START + 2 * i,
            max_tokens=1,
            temperature=0.0,
            logprobs=True,
        )
        for i in range(200)
    ]


def health(rng: Random) -> list[Observation]:
    """A monitor: the same prompt for ever."""
    gap = rng.choice([30, 60, 300])
    return [ask("say ok", START + gap * i, max_tokens=5) for i in range(200)]


def coding(rng: Random) -> list[Observation]:
    """An editor: long prompts with much in common, in bursts, now and then once more."""
    file = words(rng, 300, 900)
    found = []
    for at in sessions(rng, rng.randint(50, 150)):
        if rng.random() < 0.2:
            file = words(rng, 300, 900)
        if not found or rng.random() > 0.15:
            text = f"Complete this file. {file} {words(rng, 1, 60)}"
        found.append(ask(text, at, max_tokens=256, temperature=0.2))
    return found


BENIGN: dict[Kind, int] = {
    chat: 400,
    pupil: 150,
    product: 150,
    table: 150,
    labels: 50,
    health: 50,
    coding: 50,
}


# Honest keys that ask for what a thief asks for ----------------------------------------------


def reasoned_table(rng: Random) -> list[Observation]:
    """A developer who found that labels are better with the reasoning before them."""
    frame = "Think step by step, then give the category of this ticket: "
    return [ask(frame + words(rng, 10, 60), START + 4 * i, max_tokens=512) for i in range(200)]


def evaluation(rng: Random) -> list[Observation]:
    """A benchmark with eight samples of each question."""
    found = []
    for row in range(60):
        text = f"Answer with one letter. {problem(rng)}"
        found += [ask(text, START + 16 * row + 2 * i, max_tokens=256) for i in range(8)]
    return found


# Thieves -------------------------------------------------------------------------------------


def template_thief(rng: Random) -> list[Observation]:
    """One template over thousands of problems, with the reasoning, at a steady rate."""
    frame = "Solve the problem. Show your reasoning step by step inside <think> tags. Problem: "
    return [
        ask(frame + problem(rng), START + 8 * i + rng.uniform(0, 4), max_tokens=2048)
        for i in range(500)
    ]


def sampling_thief(rng: Random) -> list[Observation]:
    """Ten samples of each problem, and no word about reasoning."""
    found = []
    for row in range(50):
        text = problem(rng)
        found += [ask(text, START + 80 * row + 8 * i, max_tokens=1024) for i in range(10)]
    return found


def logprob_thief(rng: Random) -> list[Observation]:
    """Reads the distribution of a few prompts, token by token, by banning the likeliest."""
    prompts = [words(rng, 5, 9) for _ in range(3)]
    return [
        ask(
            prompts[i % 3],
            START + 2 * i,
            max_tokens=1,
            temperature=0.0,
            logprobs=i % 2 == 0,
            bans=i % 2 == 1,
        )
        for i in range(500)
    ]


def patient_thief(rng: Random) -> list[Observation]:
    """Slow and low: ten an hour with jitter, no template, lengths and languages that vary."""
    wishes = ["step by step please", "show your work", "schritt für schritt", "一步一步", ""]
    found = []
    for at in around_the_clock(rng, 500, 10):
        text = f"{problem(rng)} {rng.choice(wishes)}"
        found.append(ask(text, at, max_tokens=rng.choice([None, 500, 800, 1000])))
    return found


def silent_thief(rng: Random) -> list[Observation]:
    """The same, of a model that reasons without being asked."""
    return [ask(problem(rng), at) for at in around_the_clock(rng, 500, 10)]


def one_prompt_thief(rng: Random) -> list[Observation]:
    """Samples one prompt every 30 seconds."""
    text = problem(rng)
    return [ask(text, START + 30 * i) for i in range(500)]


THIEVES: dict[Kind, float] = {
    template_thief: 0.8,
    sampling_thief: THRESHOLD,
    logprob_thief: THRESHOLD,
    patient_thief: THRESHOLD,
}


def flagged(kind: Kind, keys: int) -> tuple[int, list[float]]:
    values = [score(kind(Random(f"{kind.__name__}:{key}"))).value for key in range(keys)]
    return sum(value >= THRESHOLD for value in values), values


def show(kind: Kind, values: list[float]) -> None:
    found = sum(value >= THRESHOLD for value in values)
    sys.stdout.write(
        f"\n{kind.__name__:>16}: median {median(values):.2f}, greatest {max(values):.2f}, "
        f"least {min(values):.2f}, {found} of {len(values)} at {THRESHOLD} or above"
    )


@pytest.mark.parametrize("keys", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_few_honest_keys_are_suspected(keys: int) -> None:
    assert sum(BENIGN.values()) == 1000
    wrong = 0
    for kind, count in BENIGN.items():
        found, values = flagged(kind, count * keys // 1000)
        show(kind, values)
        wrong += found
    sys.stdout.write(f"\nfalse positives: {wrong} of {keys}\n")
    assert wrong <= keys / 100


@pytest.mark.parametrize("kind", [table, labels, product, health])
def test_a_program_alone_is_not_suspected(kind: Kind) -> None:
    found, values = flagged(kind, 3)
    assert found == 0
    assert max(values) <= 0.66


@pytest.mark.parametrize("kind", THIEVES)
def test_thieves_are_found(kind: Kind) -> None:
    found, values = flagged(kind, 3)
    show(kind, values)
    assert found == 3
    assert min(values) >= THIEVES[kind]


@pytest.mark.parametrize("kind", [reasoned_table, evaluation])
def test_honest_keys_that_cannot_be_told_from_thieves(kind: Kind) -> None:
    # Stated, so that nobody believes otherwise.
    found, values = flagged(kind, 3)
    show(kind, values)
    assert found == 3


@pytest.mark.parametrize("kind", [silent_thief, one_prompt_thief])
def test_thieves_that_cannot_be_told_from_honest_keys(kind: Kind) -> None:
    found, values = flagged(kind, 3)
    show(kind, values)
    assert found == 0


# The score -----------------------------------------------------------------------------------


def test_automation_alone_stays_below_the_threshold() -> None:
    purpose = {signs.elicitation, signs.probing, signs.repetition}
    clear = 1.0
    for sign in signs.SIGNS:
        assert sign.weight < THRESHOLD
        clear *= 1 if sign.measure in purpose else 1 - sign.weight
    assert 1 - clear == pytest.approx(1 - 0.85 * 0.8 * 0.75 * 0.85 * 0.9 * 0.9)
    assert 1 - clear < THRESHOLD < 1 - clear * 0.4


def test_nothing_is_no_sign() -> None:
    assert score(()).value == 0
    assert score(()).reasons == ()


def test_a_score_by_hand() -> None:
    # 60 requests in a minute: 60/75 ask for reasoning, above 0.7, so 0.6 in full; 86,400 a day are
    # 69,120 with the harmless ones, so 0.15; 60/75 have one length, which is 0.8, so 0. The
    # repetitions are at temperature 0 and no sign.
    seen = [ask("think aloud", START + i, max_tokens=9, temperature=0.0) for i in range(60)]
    found = score(seen)
    assert found.value == pytest.approx(1 - 0.4 * 0.85)
    assert found.reasons == (
        "60 of 60 requests ask for the reasoning (0.60)",
        "86,400 requests a day (0.15)",
    )
    assert score(seen[::-1]) == found


def test_few_requests_are_no_reason() -> None:
    seen = template_thief(Random(0))
    values = [score(seen[:count]).value for count in (1, 5, 20, 100, 500)]
    assert values == sorted(values)
    assert values[0] < 0.2
    assert values[2] < THRESHOLD <= values[3]


def test_signs_by_hand() -> None:
    def share(measured: signs.Measured) -> float:
        return measured[0]

    # Five prompts with one beginning are a template; four are not.
    frame = "please sort the following things by their size "
    forms = [ask(f"{frame} {words(Random(i), 20, 20)}", START) for i in range(5)]
    assert share(signs.template(forms)) == pytest.approx(5 / 20)
    assert share(signs.template(forms[:4])) == 0
    # One prompt with other numbers and names each time.
    named = [
        ask(f"what does {name} owe if he has 1{name}{i}?", START)
        for i, name in enumerate(["Ann", "Bob", "Eve", "Max", "Joe"])
    ]
    assert share(signs.template(named)) == pytest.approx(5 / 20)
    # 10 of 40 times the same prompt again: nine repetitions of one prompt, in 20 minutes.
    again = [ask("a b c d", START + 60 * i) for i in range(10)]
    others = [ask(f"{words(Random(i), 5, 5)} {i}x", START + 40 * i) for i in range(31)]
    assert share(signs.repetition(sorted([*again, *others], key=lambda o: o.at))) == 0
    fast = [ask("a b c d", START + i) for i in range(90)]
    assert share(signs.repetition(fast)) == pytest.approx(89 / 105)
    assert share(signs.repetition([ask("a", START + i, temperature=0.0) for i in range(9)])) == 0
    # Probabilities of labels are none of a thief's; those of long answers, or beside bans, are.
    label = [ask(str(i), START, logprobs=True, max_tokens=1) for i in range(10)]
    assert share(signs.probing(label)) == 0
    banned = ask("x", START, bans=True, max_tokens=1)
    assert share(signs.probing([*label, banned])) == pytest.approx(11 / 26)
    assert share(signs.probing([ask(str(i), START, logprobs=True) for i in range(10)])) == 0.4
    # A label that is refused was asked for all the same; what is refused is not sampled.
    refused = [ask("b", START + i, logprobs=True, max_tokens=1, refused=True) for i in range(10)]
    assert share(signs.probing([*label, *refused])) == pytest.approx(10 / 35)
    assert share(signs.repetition(refused)) == 0
    # Twelve parts with one request each: no spread at all, over eleven hours.
    even = [ask("a", START + i * HOUR) for i in range(12)]
    assert share(signs.steadiness(even)) == pytest.approx(12 / 27)
    # One request in the first part and eleven in the last.
    late = [ask("a", START), *[ask("a", START + 11 * HOUR + i) for i in range(11)]]
    assert share(signs.steadiness(late)) == 0
    proxies = [ask("a", START, address=str(i)) for i in range(10)]
    assert share(signs.addresses(proxies)) == 0.4
    lengths = [ask("a", START, max_tokens=8) for _ in range(6)] + [ask("a", START)] * 4
    assert share(signs.fixed_length(lengths)) == pytest.approx(6 / 25)


# What is kept --------------------------------------------------------------------------------


def test_no_words_are_kept() -> None:
    kept = asdict(ask("My secret is 42, Alice.", START, address="192.0.2.7", user_agent="curl/8"))
    assert not [value for value in kept.values() if isinstance(value, str | bytes)]


def test_hashes_compare_under_one_secret_alone() -> None:
    def seen(text: str, secret: bytes) -> Observation:
        return ask(text, START, secret=secret)

    one, other = b"1" * 16, b"2" * 16
    assert seen("What is  2\nplus 3?", one).prompt == seen("what is 2 plus 3?", one).prompt
    assert seen("what is 2 plus 3?", one).prompt != seen("what is 2 plus 4?", one).prompt
    assert seen("what is 2 plus 3?", one).template == seen("what is 7 plus 41.5?", one).template
    assert seen("does Ann know?", one).template == seen("does Bob know?", one).template
    first, second = seen("a b c d e f g h i", one), seen("a b c d e f g h i", other)
    for name in ("prompt", "template", "head", "tail", "ip_hash", "user_agent_hash"):
        assert getattr(first, name) != getattr(second, name)
    # The same words mean something else in another place.
    assert len({first.template, first.head, first.tail, first.prompt}) == 4


def test_short_prompts_have_no_form() -> None:
    assert ask("why not?", START).template is None
    assert ask("a b c d e f g h", START).head is None
    assert ask("a b c d e f g h i", START).head is not None


def test_a_weak_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="16 to 64 bytes, got 3"):
        ask("a", START, secret=b"abc")


def test_the_middle_of_a_long_prompt_is_hashed_and_not_searched() -> None:
    filler = "a " * 5000
    first, second = ask(f"{filler}x {filler}", START), ask(f"{filler}y {filler}", START)
    assert first.prompt != second.prompt
    assert first.template == second.template
    assert ask(f"{filler} step by step", START).elicits_reasoning


def test_instructions_ask_too() -> None:
    assert ask("2 + 2?", START, instructions="Think aloud.").elicits_reasoning
    assert not ask("2 + 2?", START).elicits_reasoning


@pytest.mark.parametrize(
    "text",
    [
        "Solve it Step-by-Step.",
        "show me all of your work",
        "Explain your full thought process",
        "answer inside <think> tags",
        "Löse das SCHRITT für Schritt",
        "résous étape par étape",
        "resuélvelo paso a paso",
        "реши шаг за шагом",
        "请一步一步地解答",
        "ステップバイステップで",
        "단계별로 설명해 줘",
        "\uff53\uff54\uff45\uff50 by step",
    ],
)
def test_wishes_for_reasoning_are_understood(text: str) -> None:
    assert asks_for_reasoning(text)


@pytest.mark.parametrize(
    "text",
    ["what is the reason for rain?", "I like your work", "the last steps", "think of a name", ""],
)
def test_other_wishes_are_not(text: str) -> None:
    assert not asks_for_reasoning(text)


def test_a_watch_keeps_the_last_requests_of_the_last_keys() -> None:
    watch = Watch(window=2, keys=2)
    seen = [ask(str(i), START + i) for i in range(5)]
    for item in seen[:3]:
        watch.add("a", item)
    watch.add("b", seen[3])
    assert watch.of("a") == (seen[1], seen[2])
    watch.add("a", seen[4])
    watch.add("c", seen[0])
    assert (watch.of("a"), watch.of("b"), watch.of("c")) == ((seen[2], seen[4]), (), (seen[0],))
    assert len(watch) == 2
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Watch(window=0)
