"""Megatron-Core's GPTDataset and BlendedDataset train on our shards."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.indexed import IndexedReader

# In a process of its own: Megatron's blending needs a process group.
PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.megatron_tokenizer import MegatronLegacyTokenizer

class Tokenizer(MegatronLegacyTokenizer):
    vocab, inv_vocab, vocab_size, eod, pad = {}, {}, 300, 0, 0
    def tokenize(self, text): raise NotImplementedError

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
config = GPTDatasetConfig(
    random_seed=0, sequence_length=64, blend=(sys.argv[2:], [0.7, 0.3]), split="1,0,0", path_to_cache=sys.argv[1], tokenizer=Tokenizer("none"),
    reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True, create_attention_mask=False,
)
blended = BlendedMegatronDatasetBuilder(GPTDataset, [100, 0, 0], lambda: True, config).build()[0]
print(json.dumps([type(blended).__name__, [[source.tolist(), blended[number]["tokens"].tolist()] for number, source in
                 enumerate(blended.dataset_index[:100])]]))
"""


def test_megatrons_blended_dataset_reads_our_shards_document_by_document(tmp_path: Path) -> None:
    documents = []
    for number, name in enumerate(("one", "two")):
        source = random.Random(number)
        texts = [" ".join(str(source.random()) for _ in range(3)) for _ in range(200)]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
        section = {"kind": "jsonl", "input": [str(tmp_path / f"{name}.jsonl")]}
        config = DataConfig.model_validate(
            {
                "source": section,
                "tokenizer": {"kind": "train_bpe", "vocab_size": 300},
                "validation_share": 0.0,
            }
        )
        manifest = build(config, Output(tmp_path / "data", name)).manifest
        reader = IndexedReader(manifest.folder / manifest.splits["train"].shards[0].prefix)
        documents.append({tuple(reader[index].tolist()) for index in range(len(reader))})
    arguments = [
        str(tmp_path / "cache"),
        *(str(tmp_path / "data" / name) for name in ("one", "two")),
    ]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    kind, samples = json.loads(result.stdout.splitlines()[-1])
    assert kind == "BlendedDataset" and len(samples) == 100
    whole = 0
    for source, tokens in samples:
        ends = [place for place, token in enumerate(tokens) if token == 0]
        for begin, end in pairwise(ends):
            whole += 1
            assert tuple(tokens[begin + 1 : end + 1]) in documents[source]
            assert tuple(tokens[begin + 1 : end + 1]) not in documents[1 - source]
    assert whole > 20 and 60 <= sum(source == 0 for source, _ in samples) <= 80
