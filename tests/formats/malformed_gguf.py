"""A corpus of malformed GGUF files, each made from one good file by one change.

`corpus()` gives the cases by name. To add one, add a line to the generator of its kind: here for
what breaks the format, in `not_a_llama` for valid files that no model can be made of.
"""

from dataclasses import replace

from formats import not_a_llama
from formats.raw_gguf import (
  ARRAY,
  BOOL,
  F32,
  F64,
  I32,
  MAIN,
  STRING,
  TYPES,
  U8,
  U16,
  U32,
  U64,
  Case,
  Cases,
  Gguf,
  Value,
  array,
  good,
  one_file,
  scalar,
  string,
  text,
  u32,
  u64,
)


def corpus() -> dict[str, Case]:
  """All cases by name, which is also a folder name."""
  base = good()
  kinds = {
    "truncated": _truncated(base),
    "header": _header(base),
    "key": _keys(base),
    "tensor": _tensors(base),
    "split": _splits(base),
    "model": not_a_llama.cases(base),
  }
  cases: dict[str, Case] = {}
  for kind, named in kinds.items():
    for name, case in named:
      full = f"{kind}-{name}".replace(" ", "-")
      assert full not in cases, full
      cases[full] = case
  return cases


def _truncated(base: Gguf) -> Cases:
  for length in (0, 1, 4, 23):
    yield f"to {length} bytes", one_file(base.encode()[:length], "bytes long")
  whole = base.encode()
  at, seen = 0, set()
  for label, part in base.parts():
    header = label not in ("magic", "version", "tensor count", "key count", "padding")
    if header and label not in seen:
      seen.add(label)
      says = "truncated" if label == "tensor data" else ""
      yield f"before {label}", one_file(whole[:at], says)
      yield f"within {label}", one_file(whole[: at + len(part) // 2], says)
    at += len(part)
  values = {"string": text("abcd"), "number": scalar(F64, 1.0), "bool": scalar(BOOL, 1)}
  values |= {"numbers": array(U32, [1, 2]), "strings": array(STRING, ["abcd", "efgh"])}
  for name, value in values.items():
    single = Gguf((("key", value),), ()).parts()
    data = b"".join(part for label, part in single if label != "padding")
    for length in range(24, len(data), 1 if name == "strings" else 3):
      yield f"single {name} to {length}", one_file(data[:length], "")
  # The last tensor's 128 bytes need no padding.
  yield "last byte", one_file(whole[:-1], "output_norm.weight")


def _header(base: Gguf) -> Cases:
  for name, magic in {
    "ggml": b"ggml",
    "ggjt": b"tjgg",
    "zip": b"PK\3\4",
    "web page": b"<!DO",
    "lower case": b"gguf",
    "big-endian": b"FUGG",
  }.items():
    yield f"magic {name}", one_file(replace(base, magic=magic), "not a GGUF file")
  for version in (0, 1, 4, 99, 2**32 - 1):
    yield f"version {version}", one_file(replace(base, version=version), f"version {version} ")
  for version in (2, 3):
    yield f"big-endian {version}", one_file(replace(base, version=version << 24), "big-endian")
  left = "and the rest of the file holds"
  for name, count in {"2e12": 2**12, "2e32": 2**32, "2e63": 2**63, "2e64": 2**64 - 1}.items():
    tensors, keys = replace(base, num_tensors=count), replace(base, num_keys=count)
    yield f"tensor count {name}", one_file(tensors, f"{count} tensors, {left}")
    yield f"key count {name}", one_file(keys, f"{count} keys, {left}")
  yield "one tensor more", one_file(replace(base, num_tensors=len(base.tensors) + 1), "tensor 11")
  yield "one key more", one_file(replace(base, num_keys=len(base.keys) + 1), "tensor 0")
  yield "one key fewer", one_file(replace(base, num_keys=len(base.keys) - 1), "tensor")
  yield "no keys", one_file(replace(base, num_keys=0), "tensor")
  many = 2**16 + 1
  yield (
    "too many keys",
    one_file(b"GGUF" + u32(3) + u64(0) + u64(many) + bytes(14 * many), "limit is 65536"),
  )
  yield (
    "too many tensors",
    one_file(b"GGUF" + u32(3) + u64(many) + u64(0) + bytes(33 * many), "limit is 65536"),
  )
  yield "only zeros", one_file(bytes(4096), "not a GGUF file")
  yield "only 0xff", one_file(b"GGUF" + u32(3) + b"\xff" * 4096, "tensors")


def _keys(base: Gguf) -> Cases:
  def add(value: Value, says: str, name: str | bytes = "odd.key") -> Case:
    return one_file(base.with_key(name, value), says)

  one = scalar(U32, 1)
  yield "empty", add(one, "empty", name="")
  yield "too long", add(one, "65536 bytes", name="k" * 65536)
  yield "bad utf-8", add(one, "UTF-8", name=b"odd\xff.key")
  odd = base.with_key("odd.key", one)
  start = odd.encode().index(string("odd.key"))
  for name, length in {"2e32": 2**32, "2e63": 2**63, "2e64": 2**64 - 1}.items():
    data = odd.encode()
    yield f"length {name}", one_file(data[:start] + u64(length) + data[start + 8 :], "key 17")
  yield "twice", one_file(replace(base, keys=(*base.keys, base.keys[2])), "llama.block_count")
  for kind in (13, 14, 255, 2**31, 2**32 - 1):
    yield f"value type {kind}", add(Value(kind, u64(0)), f"unknown type {kind}")
  for name, length in {"2e40": 2**40, "2e63": 2**63, "2e64": 2**64 - 1}.items():
    yield f"string length {name}", add(text("x", length), str(length))
    yield f"string array length {name}", add(array(STRING, ["x"], length), str(length))
    element = Value(ARRAY, u32(STRING) + u64(2) + string("x") + string("y", length))
    yield f"string of array length {name}", add(element, "string 1")
  for name, length in {"2e40": 2**40, "2e61": 2**61, "2e63": 2**63, "2e64": 2**64 - 1}.items():
    yield f"array length {name}", add(array(F64, [1.0], length), f"{length * 8} bytes")
  yield "array one longer", add(array(U8, [1], len(base.encode())), "odd.key")
  yield "bool array length", add(array(BOOL, [1], 2**63), str(2**63))
  bad_utf8 = {"byte": b"\xff", "overlong": b"\xc0\x80", "surrogate": b"\xed\xa0\x80"}
  for name, data in {**bad_utf8, "cut": "é".encode()[:1], "beyond": b"\xf4\x90\x80\x80"}.items():
    yield f"string bad utf-8 {name}", add(text(data), "UTF-8")
    yield f"string array bad utf-8 {name}", add(array(STRING, ["ok", data]), "string 1")
  for value in (2, 255):
    yield f"bool {value}", add(scalar(BOOL, value), "neither 0 nor 1")
    yield f"bool array {value}", add(array(BOOL, [0, 1, value, 0]), "neither 0 nor 1")
  strings = u32(STRING) + u64(2**21) + bytes(8 * 2**21)
  yield "too many strings", add(Value(ARRAY, strings), "limit is")
  yield "nested array", add(array(ARRAY, []), "array of arrays")
  inner = u32(ARRAY) + u64(1)
  yield "nested arrays", add(Value(ARRAY, inner * 10000 + u32(U8) + u64(0)), "array of arrays")
  yield "array of unknown", add(Value(ARRAY, u32(13) + u64(1) + u64(0)), "unknown type 13")

  def align(value: Value) -> Case:
    return add(value, "general.alignment", name="general.alignment")

  for number in (0, 1, 2, 4, 24, 33, 2**21, 2**31):
    yield f"alignment {number}", align(scalar(U32, number))
  yield "alignment u64", align(scalar(U64, 2**63))
  yield "alignment negative", align(scalar(I32, -32))
  yield "alignment float", align(scalar(F32, 32.0))
  yield "alignment bool", align(scalar(BOOL, 1))
  yield "alignment string", align(text("32"))
  yield "alignment array", align(array(U32, [32]))


def _tensors(base: Gguf) -> Cases:
  last = len(base.tensors) - 1

  def change(says: str, index: int = 2, **changes: object) -> Case:
    return one_file(base.with_tensor(index, **changes), says)

  yield "name empty", change("empty", name="")
  yield "name 64 bytes", change("64 bytes", name="n" * 64)
  yield "name 100 kB", change("100000 bytes", name="n" * 100_000)
  yield "name bad utf-8", change("UTF-8", name=b"\xff.weight")
  for name, length in {"2e32": 2**32, "2e63": 2**63, "2e64": 2**64 - 1}.items():
    yield f"name length {name}", change(str(length), name_length=length)
  yield "name twice", change("occurs twice", name="token_embd.weight")
  for count in (0, 5, 2**31, 2**32 - 1):
    yield f"{count} dimensions", change(f"{count} dimensions", num_dims=count)
  for ne in ((0,), (0, 32), (32, 0), (32, 32, 0), (32, 32, 1, 0)):
    yield f"zero in ne {len(ne)} {ne.index(0)}", change("dimension of 0", ne=ne)
  huge: dict[str, tuple[int, ...]] = {"2e63": (2**63,), "2e32 2e32": (2**32, 2**32)}
  huge |= {"2e64": (2**64 - 32, 1), "wrap to 32": (2**59 + 32, 32), "2e62 4": (2**62, 4)}
  for name, dims in {**huge, "2e256": (2**63,) * 4}.items():
    yield f"ne {name}", change("the file ends at", ne=dims)
    yield f"ne {name} f32", change("the file ends at", index=1, ne=dims)
  yield "one row more", change("the file ends at", index=last, ne=(32, 2))
  yield "rows not of blocks", change("not a multiple of q4_0", ne=(48, 32))
  yield "rows shorter than a block", change("not a multiple of q4_0", ne=(16, 64))
  yield "rows not of super-blocks", change("not a multiple of q4_k", type=int(TYPES.Q4_K))
  for number in (42, 99, 255, 2**31, 2**32 - 1):
    yield f"type {number}", change(f"number {number}", type=number)
  for kind in ("IQ2_XXS", "IQ1_M", "TQ1_0", "MXFP4", "I32", "F64", "Q8_1", "Q8_K"):
    yield f"type {kind}", change(kind, type=int(TYPES[kind]))
  yield "type removed", change("Q4_2", type=4)
  for offset in (1, 16, 31):
    yield f"offset {offset}", change("not a multiple of the alignment", index=1, offset=offset)
  far = {"2e40": 2**40, "2e63": 2**63, "wraps": 2**64 - 32, "end": len(base.encode()) // 32 * 32}
  for name, offset in far.items():
    yield f"offset {name}", change("the file ends at", offset=offset)
  yield "offset as another's", change("overlap", index=1, offset=0)
  yield "offset inside another", change("overlap", index=last, offset=64)
  yield "overlap by 32", change("overlap", ne=(32, 33))
  zeros = tuple(replace(tensor, offset=0) for tensor in base.tensors)
  yield "all at 0", one_file(replace(base, tensors=zeros), "overlap")
  wide = replace(base, alignment=64).with_key("general.alignment", scalar(U32, 64))
  yield "aligned to less", one_file(wide.with_tensor(3, offset=32), "the alignment 64")


def shards_of(base: Gguf, count: int = 2, total: int | None = None) -> list[Gguf]:
  """A good model as `count` files; the first has all keys, the tensors are dealt out in order."""
  total = len(base.tensors) if total is None else total
  per_file = -(-len(base.tensors) // count)
  shards = []
  for i in range(count):
    shard = replace(base, tensors=base.tensors[i * per_file :][:per_file])
    shard = shard if i == 0 else replace(shard, keys=())
    shard = shard.with_key("split.no", scalar(U16, i)).with_key("split.count", scalar(U16, count))
    shards.append(shard.with_key("split.tensors.count", scalar(I32, total)))
  return shards


def shard_name(i: int, count: int = 2) -> str:
  return f"model-{i + 1:05}-of-{count:05}.gguf"


def split_files(shards: list[Gguf]) -> dict[str, bytes]:
  return {shard_name(i, len(shards)): shard.encode() for i, shard in enumerate(shards)}


def _splits(base: Gguf) -> Cases:
  first, second = shards_of(base)
  files = split_files([first, second])
  a, b = files

  def case(says: str, first: Gguf = first, second: Gguf = second) -> Case:
    return Case(split_files([first, second]), says)

  yield "second missing", Case({a: files[a]}, b)
  yield "first missing", Case({b: files[b]}, a)
  three = split_files(shards_of(base, 3))
  del three[shard_name(1, 3)]
  yield "middle missing", Case(three, shard_name(1, 3))
  yield "second is the first", Case({a: files[a], b: files[a]}, "split.no is 0")
  yield "first is the second", Case({a: files[b], b: files[b]}, "split.no is 1")
  yield "swapped", Case({a: files[b], b: files[a]}, "split.no")
  yield (
    "second claims to be first",
    case("split.no is 0", second=second.with_key("split.no", scalar(U16, 0))),
  )
  yield "first has no number", case("token_embd", second=replace(second, tensors=first.tensors))
  yield "second empty", Case({**files, b: b""}, b)
  yield "second cut", Case({**files, b: files[b][:-1]}, b)
  yield "second not gguf", Case({**files, b: bytes(100)}, b)
  yield "second without split keys", case("split.no", second=replace(second, keys=()))
  yield (
    "second of another model",
    case("general.name", second=second.with_key("general.name", text("other"))),
  )
  yield (
    "second of another kind of key",
    case("llama.block_count", second=second.with_key("llama.block_count", text("1"))),
  )
  yield (
    "second of another vocabulary",
    case(
      "tokenizer.ggml.scores", second=second.with_key("tokenizer.ggml.scores", array(F32, [1.0]))
    ),
  )
  yield "counts differ", case("split.count", second=second.with_key("split.count", scalar(U16, 3)))
  for key in ("split.no", "split.count", "split.tensors.count"):
    yield f"{key} string", case(key, first=first.with_key(key, text("1")))
    yield f"{key} bool", case(key, first=first.with_key(key, scalar(BOOL, 1)))
    yield f"{key} array", case(key, first=first.with_key(key, array(U16, [2])))
    yield f"{key} negative", case("split.", first=first.with_key(key, scalar(I32, -1)))
    yield f"{key} 2e63", case(key, first=first.with_key(key, scalar(U64, 2**63)))
  yield "count in name", Case({shard_name(0, 3): files[a]}, "split.count says 2")
  yield "count without name", Case({MAIN: files[a]}, "split.count says 2")
  yield "name without count", Case({a: base.encode()}, "the file's name 2")
  yield "number 0 in name", Case({"model-00000-of-00002.gguf": files[a], **files}, "file 0 of 2")
  yield "number 3 in name", Case({"model-00003-of-00002.gguf": files[a], **files}, "file 3 of 2")
  many = first.with_key("split.count", scalar(U32, 99999))
  yield "99999 files", Case({shard_name(0, 99999): many.encode()}, "00002-of-99999")
  for total in (0, 10, 12, 2**31 - 1):
    yield f"tensors {total} of 11", Case(split_files(shards_of(base, total=total)), "split.tensors")
  yield (
    "single of two tensors",
    one_file(base.with_key("split.tensors.count", scalar(I32, 2)), "split.tensors.count"),
  )
  yield (
    "single with a string",
    one_file(base.with_key("split.tensors.count", text("11")), "split.tensors.count"),
  )
  yield "single not first", one_file(base.with_key("split.no", scalar(U16, 1)), "split.no")
