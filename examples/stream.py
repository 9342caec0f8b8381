"""Watch blocks being written: every step of the active block, masked positions as dots.

python examples/stream.py [MODEL] [PROMPT]
"""

import sys

import bdlm


def main(model: str = "shakespeare", prompt: str = "MACBETH:\n", max_new_tokens: int = 48) -> str:
    lm, text = bdlm.load(model), ""
    for chunk in lm.stream(prompt, max_new_tokens=max_new_tokens, drafts=True):
        if chunk.kind == "draft":  # the active block: the text of each cell, None where masked
            cells = ["·" if cell is None else repr(cell)[1:-1] for cell in chunk.cells]
            print("   ", " ".join(cells))
        elif chunk.kind == "text":  # a finished block: these pieces join to the whole text
            text += chunk.text
            print(repr(chunk.text))
        else:
            result = chunk.result
            passes = f"{result.forward_passes} forward passes"
            print(f"\n{result.tokens} tokens in {passes}, {result.seconds:.1f} s")
    print(prompt + text)
    return text


if __name__ == "__main__":
    main(*sys.argv[1:3])
