"""The extraction score and its signs, worked out by hand."""

from random import Random

import pytest
from traffic import HOUR, START, ask, template_attacker, words

from gateway.extraction import score as score_module
from gateway.extraction import signs
from gateway.extraction.score import Watch, score
from gateway.policy import Extraction

THRESHOLD = Extraction().threshold


def test_automation_alone_stays_below_the_threshold() -> None:
    purpose = {signs.elicitation, signs.probing, signs.repetition}
    clear = 1.0
    for sign in signs.SIGNS:
        assert sign.weight < THRESHOLD
        clear *= 1 if sign.measure in purpose else 1 - sign.weight
    assert 1 - clear == pytest.approx(1 - 0.85 * 0.8 * 0.75 * 0.85 * 0.9 * 0.9)
    assert 1 - clear < THRESHOLD < 1 - clear * 0.4


def test_no_requests_score_zero() -> None:
    assert score(()).value == 0
    assert score(()).reasons == ()


def test_a_score_by_hand() -> None:
    # 60 requests in a minute. 60/75 ask for reasoning, which is above 0.7, so 0.6 in full. 86,400
    # per day are 69,120 with the harmless ones, so 0.15 in full. 60/75 have one length, which is
    # 0.8, so 0. The repetitions are at temperature 0 and no sign.
    requests = [ask("think aloud", START + i, max_tokens=9, temperature=0.0) for i in range(60)]
    result = score(requests)
    assert result.value == pytest.approx(1 - 0.4 * 0.85)
    assert result.reasons == (
        "60 of 60 requests ask for the reasoning (0.60)",
        "86,400 requests per day (0.15)",
    )
    assert score(requests[::-1]) == result


def test_few_requests_are_not_enough() -> None:
    requests = template_attacker(Random(0))
    values = [score(requests[:count]).value for count in (1, 5, 20, 100, 500)]
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
    different = [ask(f"{words(Random(i), 5, 5)} {i}x", START + 40 * i) for i in range(31)]
    assert (
        share(signs.repetition(sorted([*again, *different], key=lambda request: request.at))) == 0
    )
    fast = [ask("a b c d", START + i) for i in range(90)]
    assert share(signs.repetition(fast)) == pytest.approx(89 / 105)
    assert share(signs.repetition([ask("a", START + i, temperature=0.0) for i in range(9)])) == 0
    # Probabilities of labels are an honest use; those of long answers, or with bans, are probing.
    label = [ask(str(i), START, logprobs=True, max_tokens=1) for i in range(10)]
    assert share(signs.probing(label)) == 0
    banned = ask("x", START, bans=True, max_tokens=1)
    assert share(signs.probing([*label, banned])) == pytest.approx(11 / 26)
    assert share(signs.probing([ask(str(i), START, logprobs=True) for i in range(10)])) == 0.4
    # A refused request for labels counts as probing. It sampled nothing, so it is no repetition.
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


def test_a_watch_keeps_the_last_requests_of_the_last_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(score_module, "MOST_KEYS", 2)
    watch = Watch(window=2)
    requests = [ask(str(i), START + i) for i in range(5)]
    for request in requests[:3]:
        watch.add("a", request)
    watch.add("b", requests[3])
    assert watch.of("a") == (requests[1], requests[2])
    watch.add("a", requests[4])
    watch.add("c", requests[0])
    assert watch.of("a") == (requests[2], requests[4])
    assert watch.of("b") == ()
    assert watch.of("c") == (requests[0],)
    assert len(watch) == 2
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Watch(window=0)
