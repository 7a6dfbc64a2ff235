"""The benchmark's peer really is llama.cpp's product."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from experiments.ggml_peer import GgmlMatmul

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("rows", [1, 5])
def test_products_are_those_of_the_weights(rows: int) -> None:
  llama_cpp = pytest.importorskip("llama_cpp")
  folder = Path(llama_cpp.__file__).parent / "lib"
  rng = np.random.default_rng(0)
  kind = gguf.GGMLQuantizationType.Q8_0
  ws = [gguf.quantize(rng.standard_normal((96, 256), np.float32), kind) for _ in range(2)]
  x = rng.standard_normal((rows, 256), np.float32)
  peer = GgmlMatmul(folder, "q8_0", ws, x, threads=2)
  peer()
  for i, w in enumerate(ws):
    expected = x @ gguf.dequantize(w, kind).T
    assert np.abs(peer.product(i) - expected).max() < 0.01 * np.abs(expected).max()


def test_a_folder_without_the_libraries(tmp_path: Path) -> None:
  with pytest.raises(OSError, match="libggml-base"):
    GgmlMatmul(tmp_path, "q8_0", [np.zeros((1, 34), np.uint8)], np.zeros((1, 32), np.float32), 1)
