"""Opens exported folders by transformers alone and writes down logits and greedy texts: ``python
native_worker.py FOLDER...``
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

NEW_TOKENS = 8


def try_out(folder: Path) -> None:
    ids_BS = load_file(folder / "prompts.safetensors")["ids"]
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    assert not wrong, wrong
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    texts_BS = model.eval().generate(
        ids_BS, attention_mask=torch.ones_like(ids_BS), do_sample=False, **length
    )
    computed = {"logits": model(ids_BS).logits, "greedy": texts_BS[:, ids_BS.shape[1] :]}
    save_file(
        {name: tensor.contiguous() for name, tensor in computed.items()},
        folder / "computed.safetensors",
    )


if __name__ == "__main__":
    expected, *folders = sys.argv[1:]
    assert transformers.__version__.startswith(expected), transformers.__version__
    transformers.utils.logging.disable_progress_bar()
    with torch.inference_mode():
        for path in folders:
            try_out(Path(path))
