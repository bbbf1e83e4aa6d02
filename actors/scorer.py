"""The scoring actor: how likely the teacher's texts are under the proxies."""

import json
from pathlib import Path

import numpy as np
import torch

from actors.teacher import FeatureJob, read_examples
from actors.threads import use_one_thread_on_cpu
from azeotrope import models
from azeotrope.files import write_json
from azeotrope.logits.chunks import head_logits, token_chunks
from azeotrope.logits.served import logit_cap, scaled
from azeotrope.logits.vocabulary import share
from azeotrope.tokens import Batch, collate

BATCH = 32
"""Texts per pass of a proxy."""


class ScoreActor:
    """Writes, for each trace of a file, the proxies' mean log-probability per token, in nats."""

    def __init__(self, proxies: tuple[str, ...], teacher: str) -> None:
        use_one_thread_on_cpu()
        self.proxies = [models.load(name) for name in proxies]
        tokenizer = models.load_tokenizer(teacher)
        self.teacher = models.Loaded(self.proxies[0].model, tokenizer)
        self.shared = [share(tokenizer, proxy.tokenizer) for proxy in self.proxies]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for text in batch["job"]:
            job = FeatureJob.model_validate(json.loads(text))
            output = Path(job.folder) / f"{Path(job.traces).stem}.json"
            if not output.is_file():
                write_json(output, self._score(job))
        return batch

    @torch.inference_mode()
    def _score(self, job: FeatureJob) -> dict[str, float]:
        examples, _ = read_examples(job, self.teacher)
        scores: dict[str, float] = {}
        for start in range(0, len(examples), BATCH):
            batch = collate(examples[start : start + BATCH], pad_id=0)
            counts = batch.mask.sum(1)
            total = torch.zeros(len(counts))
            for proxy, shared in zip(self.proxies, self.shared, strict=True):
                total += self._sums(proxy, shared.to_proxy, batch)
            means = total / counts / len(self.proxies)
            scores.update(zip(batch.ids, means.tolist(), strict=True))
        return scores

    @staticmethod
    def _sums(proxy: models.Loaded, to_proxy: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The log-probability of each text's completion, in nats.

        A token that the proxy lacks is scored as the proxy's unknown token.
        """
        device = proxy.device
        inputs, targets = to_proxy[batch.input_ids], to_proxy[batch.targets[batch.mask]]
        outputs = proxy.model.base_model(input_ids=inputs.to(device), use_cache=False)
        hidden = scaled(proxy.model, outputs.last_hidden_state[batch.mask.to(device)])
        head, cap = models.head_of(proxy.model), logit_cap(proxy.model)
        parts = []
        for chunk in token_chunks(len(targets), len(head.weight)):
            logits = head_logits(hidden[chunk], head.weight, head.bias, cap=cap)
            log_p = logits.log_softmax(-1)
            parts.append(log_p.gather(-1, targets[chunk, None].to(device))[:, 0].cpu())
        sizes = batch.mask.sum(1).tolist()
        return torch.stack([part.sum() for part in torch.cat(parts).split(sizes)])
