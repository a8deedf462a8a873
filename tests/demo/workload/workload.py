"""The demo's application, in the container: it loads a model as any application does and knows nothing of SCZ-SMM.

Prints what only the real weights give (the tokens nearest to a word, by the cosine of their embeddings) and the flags
of the mount on which the weights lie. One line a fact, `key: value`. Needs numpy and safetensors, which lie beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
from safetensors import safe_open

EMBEDDINGS = "embeddings.word_embeddings.weight"


def nearest(folder: Path, word: str, count: int) -> list[str]:
    """The `count` vocabulary entries whose embeddings point most nearly the way of `word`'s."""
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    with safe_open(folder / "model.safetensors", framework="numpy") as weights:
        table = weights.get_tensor(EMBEDDINGS)
    directions = table / np.linalg.norm(table, axis=1, keepdims=True)
    likeness = directions @ directions[vocabulary.index(word)]
    order = np.argsort(-likeness)
    return [vocabulary[index] for index in order if vocabulary[index] != word][:count]


def mount_of(path: Path) -> str:
    """The line of /proc/self/mountinfo for the mount that holds `path`."""
    found = ""
    longest = -1
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        point = Path(line.split()[4])
        # the last of equals: a later mount covers an earlier one
        if path.is_relative_to(point) and len(point.parts) >= longest:
            found, longest = line, len(point.parts)
    return found


def main() -> int:
    """Read the command line, load, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("/models/minilm"), help="folder with model.safetensors")
    parser.add_argument("--word", default="king")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--hold", action="store_true", help="afterwards, stay until standard input is closed")
    parser.add_argument("--hold-seconds", type=float, default=0, help="afterwards, stay for so long")
    arguments = parser.parse_args()

    began = time.monotonic()
    with safe_open(arguments.model / "model.safetensors", framework="numpy") as weights:
        tensors = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118, not a dict
    print(f"tensors: {len(tensors)} with {sum(int(np.prod(shape)) for shape in tensors.values()):,} parameters")
    print(f"nearest to {arguments.word}: {', '.join(nearest(arguments.model, arguments.word, arguments.count))}")
    print(f"mount: {mount_of(arguments.model.resolve())}")
    print(f"writable: {'yes' if os.access(arguments.model, os.W_OK) else 'no'}")
    print(f"took: {(time.monotonic() - began) * 1000:.0f} ms", flush=True)
    if arguments.hold:
        print("holding", flush=True)
        sys.stdin.buffer.read()
    elif arguments.hold_seconds:
        print("holding", flush=True)
        time.sleep(arguments.hold_seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
