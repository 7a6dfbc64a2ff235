"""Records transformers' answers in tests/data/transformers.{npz,json}, run in every `make test`.

  pip install torch transformers gguf
  PYTHONPATH=tests python -m oracles.record_transformers

The weights are not kept: `models.weights` draws them anew from each model's seed.
"""

import json

import numpy as np

from oracles import transformers_peer
from oracles.models import FLOAT_SPECS, prompt
from oracles.questions import DATA, SMALL


def main() -> None:
  answers = {
    f"small/{spec.name}": transformers_peer.logits(spec, prompt(spec))[SMALL]
    for spec in FLOAT_SPECS
  }
  DATA.mkdir(exist_ok=True)
  np.savez_compressed(DATA / "transformers.npz", allow_pickle=False, **answers)
  about = {
    "peer": transformers_peer.VERSION,
    "recorded_by": "tests/oracles/record_transformers.py",
  }
  (DATA / "transformers.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
  main()
