"""Train the whole pocket family from scratch: `python -m azeotrope.pocket.pretrain`.

Writes each member's checkpoint, tokenizer and `training.json` (seed, settings, loss curve and
measured accuracy) to `weights/NAME`. A process uses one thread. Members that are named on the
command line can be trained side by side.
"""

import argparse
import json
import logging
from itertools import islice
from pathlib import Path
from random import Random

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from azeotrope import tokens
from azeotrope.endings import end_ids
from azeotrope.generation import Sampling, generate
from azeotrope.heads import chunked
from azeotrope.models import POCKET, Loaded, parameter_count, save
from azeotrope.pocket import language
from azeotrope.pocket.family import FAMILY, Member, Phase
from azeotrope.pocket.problems import VERSION, Range, problems
from azeotrope.pocket.tokenizer import build as build_tokenizer
from azeotrope.tasks import pocket
from azeotrope.training import LogEntry, fit

logger = logging.getLogger(__name__)
HELD_OUT = 1000
CONTEXT = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("members", nargs="*", default=[member.name for member in FAMILY])
    parser.add_argument("--output", type=Path, default=POCKET)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    family = {member.name: member for member in FAMILY}
    unknown = set(arguments.members) - set(family)
    if unknown:
        parser.error(f"unknown members {sorted(unknown)}; the family is {', '.join(family)}")
    for name in arguments.members:
        train(family[name], arguments.output / name)


def train(member: Member, folder: Path) -> None:
    """Train one member, measure it on held-out problems, and write it."""
    tokenizer = build_tokenizer(member.tokenizer)
    torch.manual_seed(member.phases[0].fit.seed)
    # The special tokens are single strings, so each id is one integer.
    eos, bos, pad = (
        int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]
        for token in ("<eos>", "<bos>", "<pad>")
    )
    model = AutoModelForCausalLM.from_config(member.config(len(tokenizer), eos, bos, pad))
    loaded = Loaded(model, tokenizer)
    log: list[LogEntry] = []
    seconds = 0.0
    for number, phase in enumerate(member.phases):
        data = corpus(tokenizer, phase, seed=1000 * phase.fit.seed + number + 1)

        def loss(items: list[tokens.Example]) -> chunked.TokenSum:
            return chunked.sequence_loss(model, tokens.collate(items, pad))

        def report(entry: LogEntry) -> None:
            if entry.step % 100 == 0:
                logger.info("%s step %d loss %.3f", member.name, entry.step, entry.loss)

        result = fit(list(model.parameters()), data, loss, phase.fit, on_step=report)
        log += result.log
        seconds += result.seconds
    model.eval()
    measured = {
        "test_greedy": accuracy(loaded, "full", 0.0),
        "test_sampled": accuracy(loaded, "full", 1.0),
        "easy_greedy": accuracy(loaded, "easy", 0.0),
    }
    save(Loaded(as_llama(model), tokenizer) if member.architecture == "qwen2" else loaded, folder)
    record = {
        "benchmark": VERSION,
        "member": member.name,
        "role": member.role,
        "parameters": parameter_count(model),
        "phases": [phase.dump() for phase in member.phases],
        "seconds": round(seconds, 1),
        "held_out_problems": HELD_OUT,
        "accuracy": measured,
        "loss": [[entry.step, round(entry.loss, 4)] for entry in log],
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    logger.info("%s %s", member.name, measured)


def as_llama(model: PreTrainedModel) -> PreTrainedModel:
    """The same function written as a Llama with attention biases, bit for bit.

    transformers 5 replaces the stored tokenizer of every `qwen2` checkpoint by Qwen's own, which
    cannot read ours; a `llama` checkpoint keeps the tokenizer it was saved with. Qwen2 differs
    from Llama only by the biases of its query, key and value projections.
    """
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    fields += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    fields += ("rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    fields += ("bos_token_id", "eos_token_id", "pad_token_id")
    same = {name: getattr(model.config, name) for name in fields}
    llama = LlamaForCausalLM(LlamaConfig(**same, attention_bias=True))
    state = model.state_dict()
    for name, value in llama.state_dict().items():
        if name.endswith("o_proj.bias"):
            state[name] = torch.zeros_like(value)
    llama.load_state_dict(state)
    return llama.eval()


def corpus(tokenizer: PreTrainedTokenizerBase, phase: Phase, seed: int) -> list[tokens.Example]:
    """Fresh problems of the train split with reasoning in the phase's notations."""
    rng = Random(seed)
    streams = {
        "full": problems("train", difficulty="full", steps=(2, 4), seed=seed),
        "easy": problems("train", difficulty="easy", steps=(1, 4), seed=seed),
    }
    data: list[tokens.Example] = []
    for index in range(phase.fit.steps * phase.fit.batch_size):
        problem = next(streams["full" if rng.random() < phase.full else "easy"])
        notation = "words" if rng.random() < phase.words else "digits"
        data.append(
            tokens.encode(
                tokenizer,
                [{"role": "user", "content": problem.question}],
                language.reasoning(problem, rng, notation=notation),
                boundary=tokens.Boundary(),
                max_length=CONTEXT,
                id=str(index),
            )
        )
    return data


def accuracy(loaded: Loaded, difficulty: Range, temperature: float) -> float:
    """Share of right answers on the first held-out test problems."""
    task = pocket.build(pocket.Config())
    steps = (3, 4) if difficulty == "full" else (1, 4)
    chosen = list(islice(problems("test", difficulty=difficulty, steps=steps), HELD_OUT))
    sampling = Sampling(temperature=temperature, max_new_tokens=96)
    right = 0
    for start in range(0, HELD_OUT, 250):
        part = chosen[start : start + 250]
        prompts = [
            tokens.encode_prompt(loaded.tokenizer, [{"role": "user", "content": p.question}])
            for p in part
        ]
        completions = generate(
            loaded.model,
            prompts,
            sampling,
            end_ids=end_ids(loaded.tokenizer),
            pad_id=loaded.tokenizer.pad_token_id,  # type: ignore[arg-type]
            seeds=list(range(start, start + len(part))),
        )
        for problem, completion in zip(part, completions, strict=True):
            text = tokens.decode(loaded.tokenizer, completion.ids)
            right += task.extract(text) == str(problem.answer)
    return right / HELD_OUT


if __name__ == "__main__":
    main()
