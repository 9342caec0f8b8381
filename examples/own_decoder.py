"""Write a decoder of your own: a small frozen class. This one fills the next `k` cells of
first-hitting's order at once.

python examples/own_decoder.py [MODEL]
"""

import sys
from dataclasses import dataclass

import bdlm
from bdlm.core.types import Commit
from bdlm.generation.decoders import Decoder, View


@dataclass(frozen=True)
class Several(Decoder):
    """k cells a call, each drawn as if alone: k = 1 is the exact sampler, more is faster and less
    exact."""

    k: int = 2

    def plan(self, masked, keys):
        # known before the call, so the model's head runs on these cells alone
        turn = keys.order().masked_fill(~masked, -1.0)
        last = turn.topk(min(self.k, turn.shape[1]), 1).values[:, -1:]
        return masked & (turn >= last)

    def choose(self, view: View) -> Commit:
        return Commit(view.query_mask, view.drawn(view.query_mask))


def main(model: str = "shakespeare", max_new_tokens: int = 64) -> list[bdlm.RequestOutput]:
    lm, results = bdlm.load(model), []
    for k in (1, 2, 4):
        result = lm.generate("ROMEO:\n", max_new_tokens=max_new_tokens, decoder=Several(k))
        print(
            f"--- k = {k}: {result.tokens_per_forward:.2f} tokens per forward, {result.seconds:.2f}"
            f" s\n{result.text}\n"
        )
        results.append(result)
    same = lm.generate("ROMEO:\n", max_new_tokens=max_new_tokens, decoder="first-hitting")
    print("k = 1 writes the same text as first-hitting:", results[0].text == same.text)
    return results


if __name__ == "__main__":
    main(*sys.argv[1:2])
