"""Completions and their verdicts, one line per case.

Two rules come from published harnesses and decide cases that a person might decide otherwise. A
completion without any mark counts its last number (GSM8K's flexible extraction in
lm-evaluation-harness), so a year at the end is taken for the answer. Several `####` or `\\boxed{}`
count the last one (GSM8K, MATH).
"""

import pytest

from azeotrope.tasks import answers

# The completion, the reference answer, and whether they agree, in a task of numbers.
NUMERIC = r"""
#### 42 | 42 | yes
####42 | 42 | yes
### 42 | 42 | yes
####⏎42 | 42 | yes
#### ⏎⏎ 42 | 42 | yes
#### 7⏎#### 42 | 42 | yes
#### 42⏎#### 7 | 42 | no
#### 42⏎⏎user: how much is 3 + 4?⏎#### 7 | 42 | yes
#### 42<|im_end|>⏎#### 7 | 42 | yes
#### 42⏎Question: what is next?⏎#### 7 | 42 | yes
#### 4,200 | 4200 | yes
#### 4 200 | 4200 | yes
#### 4200.00 | 4200 | yes
#### 4.200,00 | 4200 | yes
#### 1.234.567,5 | 1234567.5 | yes
#### 1,234,567.5 | 1234567.5 | yes
#### 98,76,543 | 9876543 | yes
#### 4,20 | 420 | no
#### 42,0000 | 420000 | no
so \boxed{4{,}200} | 4200 | yes
so \boxed{4\,200} | 4200 | yes
so \boxed{4\ 200} | 4200 | yes
#### ٤٢ | 42 | yes
#### -42 | -42 | yes
#### −42 | -42 | yes
#### –42 | -42 | yes
#### - 42 | -42 | yes
#### (-42) | -42 | yes
#### +42 | 42 | yes
#### $-42 | -42 | yes
#### -$42 | -42 | yes
#### 42 | -42 | no
#### -42 | 42 | no
#### $42 | 42 | yes
#### 42 $ | 42 | yes
#### €42 | 42 | yes
#### 42€ | 42 | yes
#### £42 | 42 | yes
#### ¥42 | 42 | yes
#### ₹42 | 42 | yes
#### Rs. 42 | 42 | yes
#### 42 USD | 42 | yes
#### 42 dollars | 42 | yes
#### $42.00 per week | 42 | yes
#### 42% | 42 | yes
#### 42\% | 42 | yes
#### 42 percent | 42 | yes
#### .25 | 0.25 | yes
#### 0.250 | 0.25 | yes
#### 1/4 | 0.25 | yes
#### 0.2500001 | 0.25 | no
#### 2/3 | 0.667 | no
#### 1 1/4 | 1.25 | yes
#### 1¼ | 1.25 | yes
#### ¾ | 0.75 | yes
#### \frac{5}{4} | 1.25 | yes
#### \dfrac54 | 1.25 | yes
#### \tfrac{5}{4} | 1.25 | yes
#### 1\frac{1}{4} | 1.25 | yes
#### -\frac{5}{4} | -1.25 | yes
#### \frac{5}{4} cup | 1.25 | yes
#### 1/0 | 0 | no
#### 4e2 | 400 | yes
#### 4.2e3 | 4200 | yes
#### 4E-2 | 0.04 | yes
#### 4 x 10^2 | 400 | yes
#### 4.2 \times 10^{3} | 4200 | yes
#### 4 × 10^2 | 400 | yes
#### 3 million | 3000000 | yes
#### 3 million | 3 | no
#### 42 thousand | 42000 | yes
#### 42 thousand | 42 | no
#### 4k | 4000 | yes
#### 4k | 4 | no
#### 4 kg | 4 | yes
#### 5 dozen | 60 | yes
#### 5 dozen | 5 | no
#### 2 hundred | 200 | yes
#### 42 eggs | 42 | yes
#### 42 eggs/day | 42 | yes
#### 42/day | 42 | yes
#### 42 m^2 | 42 | yes
#### 42 m² | 42 | yes
#### 42 cm^3 | 42 | yes
#### 42 km/h | 42 | yes
#### 42 °C | 42 | yes
#### 42 m | 42 cm | no
#### 42 m | 42 m | yes
#### 42 hours | 42 minutes | no
#### 42 hours | 42 hour | yes
\boxed{42 \text{ cm}} | 42 | yes
\boxed{42\text{ cm}^2} | 42 | yes
\boxed{42~\mathrm{cm}} | 42 | yes
\boxed{42^\circ} | 42 | yes
\boxed{\text{42}} | 42 | yes
\boxed{\$42} | 42 | yes
\boxed{42\%} | 42 | yes
\boxed 42 | 42 | yes
\boxed{42 | 42 | yes
\boxed{} | 42 | no
\(\boxed{42}\) | 42 | yes
\[ \boxed{y = 42} \] | 42 | yes
first \boxed{7}, no, \boxed{42} | 42 | yes
#### \boxed{42} | 42 | yes
#### \[42\] | 42 | yes
#### \(42\) | 42 | yes
#### $42$ | 42 | yes
#### [42] | 42 | yes
#### (42) | 42 | yes
#### "42" | 42 | yes
#### `42` | 42 | yes
#### **42** | 42 | yes
#### __42__ | 42 | yes
#### 42. | 42 | yes
#### 42! | 42 | yes
#### 42; | 42 | yes
#### 42 (forty-two) | 42 | yes
#### ~42 | 42 | yes
#### ≈ 42 | 42 | yes
#### about 42 | 42 | yes
#### Answer: 42 | 42 | yes
#### The answer is 42 | 42 | yes
#### <answer> 42 | 42 | yes
<answer>42</answer> in 3 steps | 42 | yes
#### 40 + 2 = 42 | 42 | yes
#### 42 = 40 + 2 | 42 | yes
#### n = 42 | 42 | yes
#### 42 apples and 7 pears | 42 | yes
#### 42 or 43 | 42 | no
#### 42-43 | 42 | no
#### 42 to 43 | 42 | no
#### 42:30 | 42 | no
#### 3 hours 20 minutes | 200 | no
#### Step 2: add⏎The answer is 42 | 42 | yes
#### Solution⏎40 + 2 gives⏎#### 42 | 42 | yes
#### Step 1⏎#### 42 | 42 | yes
The answer is 42. | 42 | yes
The answer is **42**. | 42 | yes
The answer is: **42** | 42 | yes
The final answer is 42 (of 50). | 42 | yes
The answer is 42 and not 43. | 42 | yes
The answer is not 7. It is 42 | 42 | yes
The answer isn't 7, it is 42 | 42 | yes
The answer is 42.⏎⏎Check: 6 x 7 = 42, in 2 steps. | 42 | yes
Answer: 42⏎Explanation: 50 - 8 | 42 | yes
**Answer:** 42 (of 50 in total) | 42 | yes
**Final Answer: 42**⏎⏎I checked 3 times. | 42 | yes
ANSWER: 42 (since 50 - 8 = 42; 8 left) | 42 | yes
She has 42 | 42 | yes
She has 42 apples left. | 42 | yes
50-8 | 42 | yes
From 50 to 42 | 42 | yes
She had 42 in 2023 | 42 | no
<think>so 7. The answer is 7</think>⏎42 | 42 | yes
<think>#### 7</think>42 | 42 | yes
<think>it must be #### 42 | 42 | no
<think>6 times 7 is 42 | 42 | no
no number at all | 42 | no
"""
# The same where answers are words, choices or expressions.
OTHER = r"""
#### Paris | paris | yes
#### Paris | London | no
The answer is Paris. | Paris | yes
Paris, of course | Paris | no
#### (B) | B | yes
#### B) | B | yes
#### B. | b | yes
\boxed{\text{B}} | B | yes
#### (B) | C | no
#### Straße | STRASSE | yes
#### cafe\u0301 | caf\u00e9 | yes
#### cafe | caf\u00e9 | no
#### 42 | 42 apples | yes
#### 42 pears | 42 apples | no
#### 42 apples | 42 apple | yes
#### 5 m | 5 km | no
#### $5 | 5% | no
#### 50% | 1/2 | no
#### 50% | 50 | yes
#### \frac{1}{2} | 1/2 | yes
#### 2/4 | 1/2 | yes
#### 1/2^{99} | 1/2^{98} | no
#### 1/2^{99} | 1/2^{99} | yes
#### 1e-30 | 2e-30 | no
#### 0.00000000003 | 0.00000000004 | no
#### 1/3004 | 1/3006 | no
#### (3, 4) | (3,4) | yes
#### (3, 4) | (4,3) | no
#### [3, 4] | (3,4) | no
#### 4, 3 | 3, 4 | yes
#### (y+2)^2 | y^2+4y+4 | yes
#### y+2 | y+3 | no
#### \sqrt{3}/3 | 1/\sqrt{3} | yes
#### 4:15 | 4:15 | yes
#### 1:3 | 2:6 | no
#### \infty | \infty | yes
#### 9^9^9^9 | 9 | no
#### 99999999! | 3 | no
"""


def rows(table: str) -> list[tuple[str, str, bool]]:
    cases = []
    for line in table.strip().splitlines():
        completion, reference, verdict = line.replace("\\u0301", "\u0301").rsplit(" | ", 2)
        reference = reference.replace("\\u00e9", "\u00e9")
        cases.append((completion.replace("⏎", "\n"), reference, verdict == "yes"))
    return cases


def agrees(completion: str, reference: str, *, numeric: bool) -> bool:
    answer = answers.extract(completion, numeric=numeric)
    return answer is not None and answers.same(answer, reference)


def test_there_are_enough_cases() -> None:
    assert len(rows(NUMERIC)) + len(rows(OTHER)) >= 150


@pytest.mark.parametrize(("completion", "reference", "right"), rows(NUMERIC))
def test_numbers(completion: str, reference: str, right: bool) -> None:
    assert agrees(completion, reference, numeric=True) == right


@pytest.mark.parametrize(("completion", "reference", "right"), rows(OTHER))
def test_other_answers(completion: str, reference: str, right: bool) -> None:
    assert agrees(completion, reference, numeric=False) == right


def test_long_digits_are_no_number() -> None:
    # Python refuses to convert more than 4,300 digits, and quadratic time is near before that.
    assert answers.number("9" * 5000) is None
    assert not answers.same("9" * 5000, "9" * 4999)
    assert agrees("#### " + "9" * 5000 + "\n#### 42", "42", numeric=True)
