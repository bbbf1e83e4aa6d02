"""Read the hidden size of a model, and the subspace its outputs lie in, off its API.

All logits are z = W h + b with W of shape [vocab, hidden], so those of any number of prompts lie in
an affine space of `hidden` dimensions. An API that shows the k likeliest log-probabilities and
takes a logit bias gives them away, k - 1 tokens a query: k tokens with the same large bias are the
ones that are shown, and their differences are differences of logits,

    log p_i - log p_r = (z_i + bias) - (z_r + bias) = z_i - z_r.

What can be read off is the space of W up to a constant on all logits, which the softmax forgets.
Rows are centred over tokens for that reason, and over prompts to be rid of b. The rank left is

- `hidden` after an RMSNorm, whether the head has a bias or not (without centring over prompts a
  head with a bias would show one more);
- `hidden` - 1 after a LayerNorm, with a bias of its own or without: its outputs have a fixed mean;
- one less than that if some direction of the hidden states moves all logits alike, which a trained
  head does not have by chance;
- never more than the smaller of prompts - 1 and tokens - 1, and then it says nothing but that the
  hidden size is at least so large.

A matrix on the logits, folded into the head, is a change of W: it moves the subspace and leaves
its dimension alone.

References: Carlini et al. 2024, "Stealing Part of a Production Language Model", arXiv:2403.06634;
Finlayson et al. 2024, "Logits of API-Protected LLMs Leak Proprietary Information",
arXiv:2403.09539.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

BIAS = 100.0
"""The greatest bias that common APIs take."""
TOKENS = 1024
"""Tokens looked at where the vocabulary is larger; they must outnumber the hidden size."""
CLEAR_GAP = 10.0
"""Neighbouring singular values of random matrices are closer than this, but for rare ones."""
NOISE_GAP = 3.0
"""The same where rounding explains the lower of the two."""
CACHED_PROMPTS = 64
FINEST_DECIMALS = 6
"""What is shown with more decimals than this counts as exact to float32."""

Shown = Sequence[tuple[int, float]]
"""Token ids with their log-probabilities in nats, likeliest first."""


class RefusedError(PermissionError):
    """The API does not give what was asked for: it refuses the request, or ignores a part of it."""


@runtime_checkable
class Oracle(Protocol):
    """What a thief may ask: the likeliest next tokens after a prompt, under a logit bias."""

    def query(self, prompt_ids: Sequence[int], logit_bias: Mapping[int, float]) -> Shown:
        """Log-probabilities of the shown tokens, after the bias if that is how the API has it.

        Raises:
            RefusedError: if the API does not allow the request.
        """
        ...


class ModelOracle:
    """An API in front of a model here, for measuring what its rules give away.

    The bias is added in float64, so what is exact is limited by the model alone.

    Args:
        top_k: log-probabilities shown a query.
        decimals: what they are rounded to; None shows them as they are.
        allow_bias: whether a logit bias may be combined with log-probabilities.

    Raises:
        ValueError: if `top_k` is not between 1 and the vocabulary, or `decimals` is negative.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        top_k: int = 5,
        decimals: int | None = None,
        allow_bias: bool = True,
    ) -> None:
        self.vocab = int(model.config.get_text_config().vocab_size)
        if not 1 <= top_k <= self.vocab:
            raise ValueError(
                f"top_k must be between 1 and the vocabulary {self.vocab}, got {top_k}"
            )
        if decimals is not None and decimals < 0:
            raise ValueError(f"decimals must be 0 or more, or None for exact, got {decimals}")
        self.model, self.top_k, self.decimals = model, top_k, decimals
        self.allow_bias = allow_bias
        self._logits = lru_cache(maxsize=CACHED_PROMPTS)(self._compute)

    @torch.inference_mode()
    def _compute(self, prompt: tuple[int, ...]) -> Tensor:
        ids = torch.tensor([prompt], device=self.model.device)
        output = self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return output.logits[0, -1].double().cpu()

    def query(self, prompt_ids: Sequence[int], logit_bias: Mapping[int, float]) -> Shown:
        """As the protocol has it.

        Raises:
            RefusedError: if a bias is given and not allowed.
            ValueError: if the prompt is empty, or an id is not in the vocabulary.
        """
        if not prompt_ids:
            raise ValueError("the prompt is empty; give at least one token id")
        unknown = [token for token in (*prompt_ids, *logit_bias) if not 0 <= token < self.vocab]
        if unknown:
            raise ValueError(f"token id {unknown[0]} is not in the vocabulary of {self.vocab}")
        if logit_bias and not self.allow_bias:
            raise RefusedError("logit_bias cannot be combined with logprobs")
        logits = self._logits(tuple(prompt_ids))
        if logit_bias:
            logits = logits.clone()
            logits[list(logit_bias)] += torch.tensor(list(logit_bias.values()), dtype=logits.dtype)
        likeliest, tokens = logits.topk(self.top_k)
        log_p = likeliest - logits.logsumexp(0)
        if self.decimals is not None:
            log_p = log_p.round(decimals=self.decimals)
        return list(zip(tokens.tolist(), log_p.tolist(), strict=True))


@dataclass(frozen=True)
class Subspace:
    """What a thief has learnt of a head, and what it took."""

    hidden_size: int | None
    """The rank found; a lower bound of it if `saturated`; None if nothing was learnt."""
    saturated: bool
    """Whether the singular values show no end of the subspace.

    Then there are too few prompts or tokens, or the hidden size is vocabulary - 1 or more, or the
    log-probabilities are too coarse.
    """
    gap: float
    """Ratio of the last singular value of the subspace to the next; 1 if no end was seen."""
    singular_values: Float[Tensor, " rank"]
    """Of the centred logits, largest first; only those that are not zero by the centring."""
    basis: Float[Tensor, "hidden tokens"]
    """Orthonormal rows that span the logits of `tokens`, up to a constant on all of them."""
    tokens: tuple[int, ...]
    prompts: int
    """How many were read to the end."""
    queries: int
    """All that were sent, the refused one included."""
    refused: str | None = None
    """Why the API stopped answering, if it did."""

    @property
    def label(self) -> str:
        """The hidden size as a table has it: `96`, `>= 128`, or `nothing`."""
        if self.hidden_size is None:
            return "nothing"
        return f">= {self.hidden_size}" if self.saturated else str(self.hidden_size)


def sample_tokens(vocab: int, count: int = TOKENS, *, seed: int = 0) -> list[int]:
    """Ids to look at: all of a small vocabulary, a random part of a large one.

    Raises:
        ValueError: if fewer than two tokens are asked for or there.
    """
    if min(vocab, count) < 2:
        raise ValueError(f"two tokens or more are needed, got vocab {vocab} and count {count}")
    drawn = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    return sorted(drawn[:count].tolist())


def random_prompts(
    vocab: int, count: int, *, length: int = 12, seed: int = 0
) -> list[tuple[int, ...]]:
    """Different prompts of random tokens: their hidden states lie in no smaller space.

    Raises:
        ValueError: if there are not that many prompts of that length.
    """
    if min(vocab, count, length) < 1 or vocab**length < count:
        raise ValueError(
            f"there are no {count} different prompts of {length} tokens out of {vocab}; "
            "make them longer"
        )
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        rows = torch.randint(vocab, (count - len(found), length), generator=generator)
        found.update(dict.fromkeys(tuple(row) for row in rows.tolist()))
    return list(found)


def recover_logits(
    oracle: Oracle,
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    bias: float = BIAS,
    shown: int | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> Float[Tensor, " tokens"]:
    """Logits of the tokens after a prompt, relative to that of the first: z_i - z_0, in float64.

    It takes ceil((tokens - 1) / (shown - 1)) queries a repeat.

    Args:
        bias: added to the logits of the tokens asked for. It must lift them above all others.
        shown: log-probabilities an answer holds; one query without a bias finds out if None.
        repeats: times to ask and average. From two on, biases are less by a random part of 1 and by
            what is known of the logits, and all that is taken off again after: it dithers what is
            rounded, so that the error of rounded log-probabilities falls with the square root.

    Raises:
        RefusedError: if the API refuses, shows a single token a query, or does not show a token
            that was biased.
        ValueError: if there are fewer than two tokens or one is there twice, the prompt is empty,
            or bias or repeats are not positive.
    """
    _check(tokens, bias, repeats)
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token id")
    if shown is None:
        shown = len(oracle.query(prompt, {}))
    if shown < 2:
        raise RefusedError(
            f"the API shows {shown} log-probabilities a query; differences need at least 2"
        )
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for turn in range(repeats):
        # In random company the error of the reference is spread over all tokens.
        order = 1 + torch.randperm(len(tokens) - 1, generator=generator)
        for part in order.split(shown - 1):
            asked = [tokens[index] for index in (0, *part.tolist())]
            biases = torch.full((len(asked),), bias, dtype=torch.float64)
            if repeats > 1:
                # A token with nearly all of the probability always rounds to the same 0, so what
                # is known of the logits is levelled.
                known = torch.cat([total[:1], total[part]]) / max(turn, 1)
                biases -= known - known.min()
                biases -= torch.rand(len(asked), dtype=torch.float64, generator=generator)
            answer = dict(oracle.query(prompt, dict(zip(asked, biases.tolist(), strict=True))))
            values = [_read(answer, token, bias) for token in asked]
            logits = torch.tensor(values, dtype=torch.float64) - biases
            total[part] += logits[1:] - logits[0]
    return total / repeats


def recover_subspace(
    oracle: Oracle,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    *,
    bias: float = BIAS,
    repeats: int = 1,
    seed: int = 0,
) -> Subspace:
    """Recover the logits of many prompts, and find the dimension of the space they lie in.

    The dimension is where neighbouring singular values lie furthest apart, if that gap is a factor
    of 10, or of 3 where the rounding seen in the answers explains the lower value. Without such a
    gap the values above what float32 and rounding explain are counted, and that is a lower bound.
    It rests on the digits shown: logits that the engine computed in bfloat16 carry an error that
    no answer betrays, and then the bound can be too high.

    A refusal is a result: what was read until then is used, and the reason kept.

    Args:
        prompts: different ones, at least two more than the hidden size; see `random_prompts`.
        tokens: ids to look at, at least two more than the hidden size; see `sample_tokens`.
        bias, repeats: see `recover_logits`.

    Raises:
        ValueError: if there are fewer than two prompts or tokens, one is there twice or empty, or
            bias or repeats are not positive.
    """
    _check(tokens, bias, repeats)
    if len(prompts) < 2 or not all(prompts):
        raise ValueError(f"two prompts or more are needed, none of them empty; got {len(prompts)}")
    if len({tuple(prompt) for prompt in prompts}) < len(prompts):
        raise ValueError("a prompt is there twice; equal prompts would look like a small subspace")
    asked = _Asked(oracle)
    rows: list[Tensor] = []
    refused, shown = None, 2
    try:
        shown = len(asked.query(prompts[0], {}))
        for number, prompt in enumerate(prompts):
            found = recover_logits(
                asked, prompt, tokens, bias=bias, shown=shown, repeats=repeats, seed=seed + number
            )
            rows.append(found)
    except RefusedError as error:
        refused = str(error)
    size, saturated, gap = None, False, 1.0
    values, directions = torch.zeros(0), torch.zeros(0, len(tokens))
    if len(rows) >= 2:
        logits = torch.stack(rows)
        values, directions = _spectrum(logits)
        floor = _noise(logits, shown, bias, asked.rounding / math.sqrt(repeats))
        size, gap = _end(values, floor)
        saturated = size is None
        size = int((values > floor).sum()) if size is None else size
    return Subspace(
        hidden_size=size,
        saturated=saturated,
        gap=gap,
        singular_values=values,
        basis=directions[:size],
        tokens=tuple(tokens),
        prompts=len(rows),
        queries=asked.queries,
        refused=refused,
    )


def _spectrum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and directions of the logits, centred over tokens and over prompts."""
    centred = logits - logits.mean(1, keepdim=True)
    _, values, directions = torch.linalg.svd(centred - centred.mean(0), full_matrices=False)
    # Each of the two centrings makes one value zero, whatever the model is.
    left = min(logits.shape) - 1
    return values[:left], directions[:left]


class _Asked:
    """An oracle that counts what it is asked, and how many decimals it answers with."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.queries, self.decimals = oracle, 0, 0

    def query(self, prompt_ids: Sequence[int], logit_bias: Mapping[int, float]) -> Shown:
        self.queries += 1
        shown = self.oracle.query(prompt_ids, logit_bias)
        while self.decimals < FINEST_DECIMALS and any(
            abs(scaled - round(scaled)) > 1e-3
            for scaled in (value * 10**self.decimals for _, value in shown if math.isfinite(value))
        ):
            self.decimals += 1
        return shown

    @property
    def rounding(self) -> float:
        """Standard deviation of the error of one log-probability, were it uniform."""
        return 10.0**-self.decimals / math.sqrt(12)


def _noise(logits: Tensor, shown: int, bias: float, rounding: float) -> float:
    """A bound on the singular values that errors alone would have.

    A matrix of independent errors of deviation u has none above u (sqrt(rows) + sqrt(columns)).
    The error of the reference is shared by its whole query, which makes up a second such matrix
    with one column a query, each column repeated `shown` - 1 times.
    """
    rows, columns = logits.shape
    # Engines add the bias in float32.
    single = torch.finfo(torch.float32).eps * (bias + float(logits.abs().max()))
    company = shown - 1
    batches = math.ceil((columns - 1) / company)
    own = math.sqrt(rows) + math.sqrt(columns)
    common = math.sqrt(company) * (math.sqrt(rows) + math.sqrt(batches))
    return max(single, rounding) * (own + common)


def _end(values: Tensor, floor: float) -> tuple[int | None, float]:
    """How many singular values come before the clear gap, and its factor; None without one."""
    if len(values) < 2:
        return None, 1.0
    tiny = torch.finfo(values.dtype).tiny
    ratios = values[:-1] / values[1:].clamp(min=tiny)
    needed = torch.where(values[1:] <= floor, NOISE_GAP, CLEAR_GAP)
    clear = (values[:-1] > floor) & (ratios >= needed)
    if not clear.any():
        return None, 1.0
    last = int(ratios.where(clear, 0.0).argmax())
    return last + 1, float(ratios[last])


def _check(tokens: Sequence[int], bias: float, repeats: int) -> None:
    if len(tokens) < 2 or len(set(tokens)) < len(tokens):
        raise ValueError(
            f"two different tokens or more are needed, each once; got {len(tokens)} of which "
            f"{len(set(tokens))} differ"
        )
    if not (bias > 0 and math.isfinite(bias)):
        raise ValueError(f"the bias must be a positive number, got {bias}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")


def _read(answer: Mapping[int, float], token: int, bias: float) -> float:
    value = answer.get(token, -math.inf)
    if not math.isfinite(value):
        raise RefusedError(
            f"the API does not show token {token} under a bias of {bias:g}: it hides what a bias "
            "does, or a greater one is needed"
        )
    return value
