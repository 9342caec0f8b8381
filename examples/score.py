"""How likely does a model find a text? The bound with its error bar, at several block sizes, and
bits per byte beside xz.

python examples/score.py [MODEL] [TEXT_FILE]
"""

import lzma
import sys
from pathlib import Path

import bdlm

VERSE = """MACBETH:
To-morrow, and to-morrow, and to-morrow,
Creeps in this petty pace from day to day
To the last syllable of recorded time,
And all our yesterdays have lighted fools
The way to dusty death.
"""


def main(model: str = "shakespeare", file: str | None = None) -> dict[int, bdlm.Score]:
    lm = bdlm.load(model)
    text = VERSE if file is None else Path(file).read_text(encoding="utf-8")
    scores = {}
    for size in (1, 2, 4, lm.spec.block_size):
        scores[size] = score = lm.score(text, block_size=size)
        print(f"{'exact' if size == 1 else 'bound'}, blocks of {size}: {score}")
    packed = lzma.compress(text.encode(), preset=9)
    print(f"xz -9: {8 * len(packed) / len(text.encode()):.3f} bits per byte")
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:3])
