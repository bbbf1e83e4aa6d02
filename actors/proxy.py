"""The proxy actor: a frozen model in place of an unknown student, run on the teacher's traces."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from actors.teacher import FeatureJob, read_examples
from actors.threads import use_one_thread_on_cpu
from azeotrope import models
from azeotrope.heads.features import compute, write_features
from azeotrope.heads.surrogate import first_block
from azeotrope.logits.vocabulary import share


class ProxyActor:
    """Computes one proxy's hidden states on the teacher's traces; tokens are matched by string."""

    def __init__(self, model: str, teacher: str, index: int) -> None:
        use_one_thread_on_cpu()
        self.loaded = models.load(model)
        # Only the teacher's tokenizer is needed: the token ids are in the traces.
        self.teacher = replace(self.loaded, tokenizer=models.load_tokenizer(teacher))
        self.shared = share(self.teacher.tokenizer, self.loaded.tokenizer, proxy_name=model)
        self.index = index

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for text in batch["job"]:
            job = FeatureJob.model_validate(json.loads(text))
            output = Path(job.folder) / f"proxy-{self.index}" / Path(job.traces).name
            if not output.is_file():
                examples, own = read_examples(job, self.teacher)
                block = None if job.layer is None else first_block(self.loaded.model, job.layer)
                features = compute(
                    self.loaded.model,
                    examples,
                    to_model=self.shared.to_proxy,
                    before_block=block,
                    own=own,
                )
                write_features(output, features)
        return batch
