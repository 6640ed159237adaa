"""Opens an exported folder with vLLM alone and writes what it returns.

Started as ``python vllm_model.py FOLDER PROMPTS OUTPUTS``.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams, TokensPrompt

NEW_TOKENS = 16


def try_out(folder: str, prompts: str, answers: str) -> None:
    """Greedy texts [B, NEW_TOKENS], their log-probabilities, and those of the prompts' tokens but
    the first [B, S - 1].
    """
    ids_BS = load_file(prompts)["ids"]
    length = ids_BS.shape[1] + NEW_TOKENS
    model = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=length,
        max_num_seqs=len(ids_BS),
        enable_prefix_caching=False,
    )
    asked = SamplingParams(
        temperature=0.0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0,
        detokenize=False,
    )
    outputs = model.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in ids_BS.tolist()], asked, use_tqdm=False
    )
    greedy, new, given = [], [], []
    for output, ids in zip(outputs, ids_BS.tolist(), strict=True):
        said = output.outputs[0]
        greedy.append(list(said.token_ids))
        new.append(
            [
                found[token].logprob
                for found, token in zip(said.logprobs, said.token_ids, strict=True)
            ]
        )
        given.append(
            [
                found[token].logprob
                for found, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
            ]
        )
    computed = {
        "greedy": torch.tensor(greedy),
        "greedy logprobs": torch.tensor(new),
        "prompt logprobs": torch.tensor(given),
    }
    save_file(computed, answers)


if __name__ == "__main__":
    try_out(*sys.argv[1:])
