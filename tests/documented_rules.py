"""How each documented command is made small enough for a test, or why it is not run."""

import re

FLOAT = "experiments/tiny/tiny.f16.gguf"
SMALL_KV = "--ctx=96 --sequences=2"
# Flags that are added, so that the command takes seconds; the last of a kind counts.
SMALL = {
  "q4jax bench": "--pp=8 --tg=2 --depth=96 --batch=1 --reps=1",
  "q4jax calibrate": "--ctx=32 --sequences=2",
  "q4jax chat": "--chat_template=llama2 --max_tokens=2",
  "q4jax convert": "",
  "q4jax diff": "--ctx=64 --chunks=1",
  "q4jax export": "--max_context=16 --chunk=8",
  "q4jax generate": "--max_tokens=2",
  "q4jax info": "",
  "q4jax perplexity": "--ctx=64 --chunks=1",
  "q4jax qat": "--steps=1 --batch=1 --ctx=16 --sequences=2 --chunks=1",
  "q4jax quantize": "--ctx=32 --sequences=2",
  "q4jax tokenize": "",
  "q4jax verify": "",
  "python -m experiments.bench_int4_matmul": "--shapes=gemm32 --m=1 --formats=q4_0 --reps=1 "
  "--implementations=cpu,xla --rotate_mib=1 --seconds=0.001",
  "python -m experiments.bench_kv_attention": "--slots=64 --layers=1 --reps=1",
  "python -m experiments.drift_injection": "--tokens=16 --sequences=1 --calibration_sequences=1",
  "python -m experiments.end_to_end": "--ctx=64 --sequences=2 --tokens=2",
  "python -m experiments.group_size": "--methods=rtn --bits=4 --group_sizes=128 --rules=absmax "
  "--ctx=64 --chunks=1 --sequences=2",
  "python -m experiments.kv_bottleneck": "--lengths=16 --caches=int4 --tokens=2 --probe_mib=1",
  "python -m experiments.kv_frontier": f"--budgets=0.3 --stores=int4r {SMALL_KV}",
  "python -m experiments.kv_group_size": f"--stores=int4 --groups=32 --rotations=no {SMALL_KV}",
  "python -m experiments.kv_quality": f"{SMALL_KV} --batch=2 --recent=16",
  "python -m experiments.kv_retrieval": "--rows=dense --policies=streaming --keeps=0.4 "
  "--samples=2 --batch=2 --context=64 --pairs=4",
  "python -m experiments.kv_threshold": "--policies=threshold --selects=keep:0.6 "
  f"--depths=16,40 --reps=1 {SMALL_KV}",
  "python -m experiments.profile_decode": "--tokens=4 --runs=1",
  "python -m experiments.qat_variants": "--grids=3:minimum --methods=rtn,lsq:mse --seeds=0 "
  "--steps=1 --batch=1 --ctx=16 --sequences=2 --chunks=1 --text=held_out",
  "python -m experiments.quant_error": "--methods=rtn --bits=4 --groups=32 --rules=absmax "
  "--kquants= --rows=2",
  "python -m experiments.readme_tables": "--check",
  "python -m experiments.reproduce": "--only=quant_error",
  "python -m experiments.sinks": "--sinks=0,4 --window=16 --ctx=96 --prompt=48 --sequences=1",
  "python -m experiments.train_retrieval": "--seconds=1",
  "python -m launch.sweep": "--dry_run",
  "python docs/examples/my_policy.py": "",
}  # fmt: skip
# A pattern of whole command lines -> why only their flags are read.
NOT_RUN = {
  r"python -m experiments.(bench_load|bench_vs_llamacpp) .*": "needs a build of llama.cpp",
  r"python -m experiments.vs_llama_quantize .*": "needs llama-cpp-python",
  r"python -m experiments.tiny.prepare .*": "reads a corpus that is not here",
  r"python -m experiments.train_tiny .*": "needs what experiments.tiny.prepare writes; hours",
  r"python -m experiments.reproduce --full .*": "hours",
  r"python -m oracles.*": "needs the peers; make oracles",
  r"python tiny.stablehlo/run.py .*": "in a process of its own in tests/exported",
  r"q4jax qat .* --resume \.\.\.": "goes on from a run that was killed; tests/qat",
  r"make .*": "sets up an environment; its recipe is read",
}
# Those that take more than 10 s even so.
SLOW = re.compile(
  r".*=gptq.*|.*(end_to_end|drift_injection|qat_variants)\b.*|.*--rows=int4r,keep80,.*"
)
# Command lines that show what an error looks like, and their exit codes.
ERRORS = {
  "q4jax generate model.gguf --prompt=a --temprature=0": 2,
  "q4jax generate nothing.gguf --prompt=a": 1,
}
# Flags whose value is a text, and flags whose value is a file or folder to write.
TEXTS = {"text", "train_text", "file", "held_out", "calibration_text"}
WRITTEN = {"out", "plot", "folder"}
# Names that a block takes for granted: what a reader has by then.
GIVEN = {
  "docs/injection.md": ("prompt",),
  "docs/kv.md": ("q4jax", "model", "prompt"),
  "docs/tokenizer.md": ("metadata",),
}
# Parts of blocks that take long or want another model, and what stands for them here.
CHANGED = {
  "docs/injection.md": {"[0.05, 0.04]": "[0.05]"},  # `tiny` has one KV head
  "docs/tutorials/compress_a_cache.md": {"8 * 1024": "2 * 128", "(8, 1024)": "(2, 128)",
                                         "prompt=768": "prompt=96"},
}  # fmt: skip
