"""Descriptions of sweeps: which trials they make, their hashes, and what is refused."""

import dataclasses
import hashlib
import json
import tomllib
from pathlib import Path

import pytest

from experiments import quant_error
from launch.trials import describe, load
from q4jax.errors import ConfigError

SWEEPS = sorted((Path(__file__).parents[2] / "launch" / "sweeps").glob("*.toml"))


def sweep(text):
  return describe("s", tomllib.loads(f'experiment = "quant_error"\n{text}'))


def flags(text):
  return [dict(trial.flags) for trial in sweep(text).trials]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_the_examples_are_right(path):
  assert load(path).trials


def test_crossed_and_zipped():
  found = flags("""
    flags = {rows = 8}
    cross = {bits = [3, 4], groups = [["8", "32"], "channel"]}
    [[zip]]
    rules = ["absmax", "minimum"]
    methods = ["rtn", ["rtn", "hqq"]]
  """)
  assert found == [
    {"rows": "8", "bits": bits, "groups": groups, "rules": rules, "methods": methods}
    for bits in ("3", "4")
    for groups in ("8,32", "channel")
    for rules, methods in (("absmax", "rtn"), ("minimum", "rtn,hqq"))
  ]


def test_the_command():
  [trial] = sweep('flags = {bits = [3, 4], model = "a b"}').trials
  assert trial.command("x.json") == [
    "python", "-m", "experiments.quant_error", "--bits=3,4", "--model=a b", "--out=x.json"
  ]  # fmt: skip


def test_no_flags_is_one_trial():
  assert flags("") == [{}]


def test_the_hash_is_of_all_options_defaults_too():
  [trial] = sweep("flags = {bits = 3}").trials
  config = dataclasses.asdict(dataclasses.replace(quant_error.Config(), bits=(3,)))
  del config["out"]
  text = json.dumps(["quant_error", getattr(quant_error, "VERSION", 1), config], sort_keys=True)
  assert trial.hash == hashlib.sha256(text.encode()).hexdigest()[:12]
  [same] = sweep("cross = {bits = [[3]]}\nflags = {rows = 128}").trials
  [other] = sweep("flags = {bits = 3, rows = 64}").trials
  assert same.hash == trial.hash != other.hash


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("flags = {bit = 3}", "no flag 'bit'; nearest: bits"),
    ("flags = {bits = 3.5}", "'bits' is to be 3.5; expected int"),
    ('cross = {bits = [3, "4"]}', "'bits' is to be '4'; expected int"),
    ("flags = {rows = true}", "'rows' is to be True"),
    ("flags = {groups = 32}", "'groups' is to be 32; expected str"),
    ("cross = {bits = 3}", "'bits' is to take 3; expected a list"),
    ("cross = {bits = []}", "'bits' is to take \\[\\]"),
    ("cross = {bits = [3, 3]}", "trials 1 and 2 are the same"),
    ("flags = {bits = 3}\ncross = {bits = [3]}", "'bits' is given 2 times"),
    ('flags = {out = "x"}', "'out' is not a description's"),
    ('[[zip]]\nbits = [3, 4]\nrules = ["absmax"]', "bits has 2, rules has 1"),
    ("zip = {bits = [3]}", "write \\[\\[zip\\]\\]"),
    ("workers = 3", "no key 'workers'"),
    ("timeout = 3", "no key 'timeout'; nearest: timeout_s"),
    ("retries = -1", "retries is -1"),
    ("timeout_s = nan", "timeout_s is nan"),
    ("flags = 3", "flags is 3; expected a table"),
  ],
)
def test_refused(text, message):
  with pytest.raises(ConfigError, match=message):
    sweep(text)


@pytest.mark.parametrize(
  ("experiment", "message"),
  [
    ("quant_eror", "no experiment 'quant_eror'; nearest: quant_error"),
    ("", "no experiment ''"),
    ("a.b", "no experiment 'a.b'"),
    ("provenance", "'provenance' has no Config"),
    (3, "experiment is missing"),
  ],
)
def test_experiments_refused(experiment, message):
  with pytest.raises(ConfigError, match=message):
    describe("s", {"experiment": experiment})


def test_files_refused(tmp_path):
  with pytest.raises(ConfigError, match="none.toml: .* cannot be read: No such file"):
    load(tmp_path / "none.toml")
  path = tmp_path / "bad.toml"
  path.write_text("experiment = ")
  with pytest.raises(ConfigError, match="bad.toml: .* not TOML"):
    load(path)
  path.write_text('experiment = "quant_error"\nflags = {bit = 3}')
  with pytest.raises(ConfigError, match="bad.toml: .* no flag 'bit'"):
    load(path)
