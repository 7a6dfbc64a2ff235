"""The table of QAT variants on its smallest configs."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import qat_variants
from experiments.experiment import text
from experiments.qat_variants import Config, recovered
from q4jax.errors import ConfigError

SMALL = Config(
  chunks=1, grids=("3:minimum",), methods=("rtn", "lsq:mse"), seeds=(0, 1), steps=2, batch=1,
  ctx=16, sequences=2,
)  # fmt: skip


def test_rows(tmp_path: Path) -> None:
  pytest.importorskip("matplotlib")
  rtn, *trained = qat_variants.run(SMALL)
  assert (rtn["method"], rtn["seed"], rtn["bpw"], rtn["curve"]) == ("rtn", None, 3.25, [])
  assert [r["seed"] for r in trained] == [0, 1]
  assert trained[0]["curve"] != trained[1]["curve"] and len(trained[0]["curve"]) == 2
  # Its grid alone, found by mse, is better than rtn's.
  assert all(r["kl"] < rtn["kl"] for r in trained)
  zero, first, _ = recovered([rtn, *trained])
  assert zero["recovered_kl"] == 0
  assert first["recovered_kl"] == pytest.approx(1 - trained[0]["kl"] / rtn["kl"])
  assert first["recovered_ppl"] == pytest.approx(
    1 - np.log(trained[0]["ratio"]) / np.log(rtn["ratio"])
  )
  written = text(qat_variants, [rtn, *trained])  # type: ignore[arg-type]
  assert "±" in written and "| lsq:mse |" in written.replace("  ", " ")
  qat_variants.plot([rtn, *trained], str(tmp_path / "plot.png"))
  assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.slow
def test_beside_a_rounded_cache() -> None:
  def row(**changes: Any) -> dict[str, Any]:
    return qat_variants.run(dataclasses.replace(SMALL, seeds=(0,), **changes))[0]

  plain = row(methods=("rtn",))
  eight, four = (row(methods=("ptq:rtn",), kv_bits=bits) for bits in (8, 4))
  # The student as it runs is the model as it is exported.
  assert eight["kl"] == pytest.approx(plain["kl"], rel=0.02)
  assert four["kl"] > 1.02 * plain["kl"] and four["seed"] is None
  aware = row(methods=("lsq:mse",), kv_bits=4)
  blind = row(methods=("lsq:mse",), kv_bits=4, blind=True)
  assert aware["curve"] != blind["curve"]
  table = qat_variants.table([four, aware, blind])
  assert [r[:2] for r in table[1:]] == [
    ["3:minimum KV4", "ptq:rtn"], ["3:minimum KV4", "lsq:mse"],
    ["3:minimum KV4", "lsq:mse, blind"],
  ]  # fmt: skip
  assert row(methods=("ptq:rtn",), activations="token")["kl"] > plain["kl"]


def test_what_cannot_be() -> None:
  with pytest.raises(ConfigError, match="write ptq:rtn for rtn"):
    qat_variants.run(dataclasses.replace(SMALL, kv_bits=4))
  with pytest.raises(ConfigError, match="no ranges were observed"):
    qat_variants.run(
      dataclasses.replace(SMALL, methods=("lsq:mse",), activations="observed", blind=True)
    )
  with pytest.raises(ConfigError, match="--train_text=none.bin is no file"):
    qat_variants.run(dataclasses.replace(SMALL, train_text="none.bin"))
