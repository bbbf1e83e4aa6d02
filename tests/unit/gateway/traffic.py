"""Simulated traffic: what honest customers and attackers send, as observations of one key."""

from collections.abc import Callable
from random import Random

from gateway.extraction.footprint import Observation, RequestFacts, observe

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


def ask(text: str, at: float, **facts) -> Observation:
    """The observation of one request, with defaults for what the test does not vary."""
    defaults = {"max_tokens": None, "temperature": 1.0, "address": "10.0.0.1", "user_agent": "a/1"}
    return observe(RequestFacts(text=text, at=at, **{**defaults, **facts}))


def sessions(rng: Random, count: int) -> list[float]:
    """Times of a person's requests: a few sessions on waking days."""
    times: list[float] = []
    while len(times) < count:
        at = START + rng.randrange(20) * DAY + rng.uniform(8, 22) * HOUR
        for _ in range(rng.randint(3, 15)):
            at += rng.expovariate(1 / 90)
            times.append(at)
    return sorted(times)[:count]


def around_the_clock(rng: Random, count: int, per_hour: float) -> list[float]:
    at, times = START, []
    for _ in range(count):
        at += rng.expovariate(per_hour / HOUR)
        times.append(at)
    return times


# Honest keys ---------------------------------------------------------------------------------


def chat(rng: Random) -> list[Observation]:
    """A person: follow-ups, pastes, now and then "step by step", on two addresses."""
    requests = []
    for at in sessions(rng, rng.randint(20, 120)):
        kind = rng.random()
        text = words(rng, 5, 40) + ("?" if kind < 0.8 else "")
        if kind < 0.25:
            text = rng.choice(FOLLOW_UPS)
        elif kind < 0.35:
            text = f"explain {words(rng, 3, 8)} step by step"
        elif kind < 0.45:
            text = words(rng, 150, 600)
        requests.append(ask(text, at, address=f"10.0.0.{rng.randint(1, 2)}"))
    return requests


def pupil(rng: Random) -> list[Observation]:
    """Homework: many problems, and a wish to see the steps of some."""
    eager = rng.uniform(0.1, 0.9)
    requests = []
    for at in sessions(rng, rng.randint(20, 100)):
        text = problem(rng) if rng.random() < 0.7 else rng.choice(FOLLOW_UPS)
        if rng.random() < eager:
            text += rng.choice([" show your work", " please explain step by step"])
        requests.append(ask(text, at))
    return requests


def product(rng: Random) -> list[Observation]:
    """A web site with users in all time zones: one prompt around what each of them wrote."""
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
    """A developer who reads the probability of each label."""
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
    """A monitor: the same prompt at a fixed interval."""
    gap = rng.choice([30, 60, 300])
    return [ask("say ok", START + gap * i, max_tokens=5) for i in range(200)]


def coding(rng: Random) -> list[Observation]:
    """An editor: long prompts that share most of their text, in bursts, some of them repeated."""
    file = words(rng, 300, 900)
    requests = []
    for at in sessions(rng, rng.randint(50, 150)):
        if rng.random() < 0.2:
            file = words(rng, 300, 900)
        if not requests or rng.random() > 0.15:
            text = f"Complete this file. {file} {words(rng, 1, 60)}"
        requests.append(ask(text, at, max_tokens=256, temperature=0.2))
    return requests


HONEST: dict[Kind, int] = {
    chat: 400,
    pupil: 150,
    product: 150,
    table: 150,
    labels: 50,
    health: 50,
    coding: 50,
}
"""Kinds of honest keys, and how many of a thousand keys are of each kind."""


# Honest keys that send what an attacker sends --------------------------------------------------


def reasoned_table(rng: Random) -> list[Observation]:
    """A developer whose labels are better with the reasoning before them."""
    frame = "Think step by step, then give the category of this ticket: "
    return [ask(frame + words(rng, 10, 60), START + 4 * i, max_tokens=512) for i in range(200)]


def evaluation(rng: Random) -> list[Observation]:
    """A benchmark with eight samples per question."""
    requests = []
    for row in range(60):
        text = f"Answer with one letter. {problem(rng)}"
        requests += [ask(text, START + 16 * row + 2 * i, max_tokens=256) for i in range(8)]
    return requests


# Attackers -----------------------------------------------------------------------------------


def template_attacker(rng: Random) -> list[Observation]:
    """One template over thousands of problems, with the reasoning, at a steady rate."""
    frame = "Solve the problem. Show your reasoning step by step inside <think> tags. Problem: "
    return [
        ask(frame + problem(rng), START + 8 * i + rng.uniform(0, 4), max_tokens=2048)
        for i in range(500)
    ]


def sampling_attacker(rng: Random) -> list[Observation]:
    """Ten samples of each problem, without asking for the reasoning."""
    requests = []
    for row in range(50):
        text = problem(rng)
        requests += [ask(text, START + 80 * row + 8 * i, max_tokens=1024) for i in range(10)]
    return requests


def logprob_attacker(rng: Random) -> list[Observation]:
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


def patient_attacker(rng: Random) -> list[Observation]:
    """Slow: ten requests per hour with jitter, no template, lengths and languages that vary."""
    wishes = ["step by step please", "show your work", "schritt für schritt", "一步一步", ""]
    requests = []
    for at in around_the_clock(rng, 500, 10):
        text = f"{problem(rng)} {rng.choice(wishes)}"
        requests.append(ask(text, at, max_tokens=rng.choice([None, 500, 800, 1000])))
    return requests


def silent_attacker(rng: Random) -> list[Observation]:
    """The same, with a model that reasons without being asked."""
    return [ask(problem(rng), at) for at in around_the_clock(rng, 500, 10)]


def one_prompt_attacker(rng: Random) -> list[Observation]:
    """Samples one prompt every 30 seconds."""
    text = problem(rng)
    return [ask(text, START + 30 * i) for i in range(500)]
